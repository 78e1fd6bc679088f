//! The policy against its slow model, its invariants, and what it is for.

use super::model::Model;
use super::*;
use std::collections::BTreeSet;
use std::time::Duration;

/// A cache of nothing but marks: does what the policy says at once.
struct Cache {
    policy: Policy,
    marks: MarkMap,
    writes: u64,
}

impl Cache {
    fn new(settings: Settings) -> Self {
        Self { policy: Policy::new(settings), marks: MarkMap::default(), writes: 0 }
    }

    fn fill(&mut self, block: u64, to: Place) {
        self.marks.insert(block);
        self.policy.filled(block, to, &mut self.marks);
        self.writes += 1;
        self.make_room();
    }

    fn make_room(&mut self) {
        while let Some(block) = self.policy.evict(&mut self.marks) {
            assert!(!self.marks.is_pinned(block), "P2: {block} is pinned");
            assert!(self.marks.remove(block), "P2: {block} is on flash");
        }
        assert!(self.policy.len() <= self.policy.capacity_blocks(), "P1");
    }

    /// Whether it was a hit.
    fn read(&mut self, block: u64) -> bool {
        match self.policy.read(block, &mut self.marks) {
            Verdict::Hit | Verdict::Probed { .. } => return true,
            Verdict::Admit { .. } => self.fill(block, Place::Main),
            Verdict::Probation { leaves: Some(Leaves { block, to: Some(to) }), .. } => {
                self.fill(block, to);
            }
            Verdict::Probation { .. } | Verdict::Bypass => {}
        }
        false
    }

    fn touch(&mut self, block: u64, write: bool) {
        match write {
            true => self.write(block),
            false => _ = self.read(block),
        }
    }

    /// A write that is drained before anything else happens.
    fn write(&mut self, block: u64) {
        self.policy.written(block);
        self.marks.insert(block);
        self.policy.drained(block, &mut self.marks);
        self.make_room();
    }
}

/// Blocks as a guest's are: few are hot, some come in runs.
fn pick(random: &mut fastrand::Rng, span: u64, last: u64) -> u64 {
    match random.u8(..10) {
        0..3 => (last + 1) % span,
        _ => (random.f64().powi(4) * span as f64) as u64,
    }
}

/// The policy and its model side by side; some blocks are dirty.
struct Pair {
    cache: Cache,
    model: Model,
    dirty: BTreeSet<u64>,
    now: Nanos,
}

impl Pair {
    fn read(&mut self, block: u64, fails: bool, place: &str) {
        let Cache { policy, marks, .. } = &mut self.cache;
        let verdict = policy.read(block, marks);
        assert_eq!(verdict, self.model.read(block), "{place}");
        let fill = match verdict {
            Verdict::Admit { free } => Some((block, Place::Main, free)),
            Verdict::Probation { leaves: Some(leaves), .. } => {
                leaves.to.map(|to| (leaves.block, to, false))
            }
            _ => None,
        };
        if let Some((block, _, free)) = fill.filter(|_| fails) {
            policy.dropped(block, free);
            self.model.dropped(block, free);
        } else if let Some((block, to, _)) = fill {
            marks.insert(block);
            policy.filled(block, to, marks);
            self.model.marks.entry(block).or_default();
            self.model.enter(block, to);
        }
    }

    fn write(&mut self, block: u64) {
        self.cache.policy.written(block);
        self.cache.marks.insert(block);
        self.cache.marks.pin(block, true);
        self.model.written(block);
        self.dirty.insert(block);
    }

    fn drain(&mut self) {
        let Some(block) = self.dirty.pop_first() else { return };
        self.cache.marks.pin(block, false);
        self.cache.policy.drained(block, &mut self.cache.marks);
        self.model.drained(block);
    }

    fn forget(&mut self, block: u64) {
        if !self.dirty.contains(&block) {
            self.cache.policy.forget(block);
            self.cache.marks.remove(block);
            self.model.forget(block);
        }
    }

    fn set(&mut self, budget: Option<u64>, capacity: u64) {
        self.cache.policy.set_write_budget(budget);
        self.model.wear.set(budget);
        self.cache.policy.set_capacity(capacity);
        self.model.set_capacity(capacity);
    }

    fn tick(&mut self, millis: u64) {
        self.now = self.now + Duration::from_millis(millis);
        self.cache.policy.tick(self.now);
        self.model.wear.tick(self.now);
    }

    fn make_room(&mut self, place: &str) {
        loop {
            let victim = self.cache.policy.evict(&mut self.cache.marks);
            let expected = self.model.evict(|block| self.dirty.contains(&block));
            assert_eq!(victim, expected, "{place}");
            let Some(victim) = victim else { break };
            assert!(!self.dirty.contains(&victim) && self.cache.marks.remove(victim), "P2");
        }
        assert!(self.cache.policy.len() <= self.cache.policy.capacity_blocks(), "P1: {place}");
    }
}

#[test]
fn it_does_what_its_slow_model_does() {
    for seed in 0..30 {
        let mut random = fastrand::Rng::with_seed(seed);
        let settings = Settings {
            stream_blocks: 20,
            probation_blocks_min: 1 + seed % 40,
            ..Settings::new(random.u64(20..800))
        };
        let (cache, model) = (Cache::new(settings), Model::new(settings));
        let mut pair = Pair { cache, model, dirty: BTreeSet::new(), now: Nanos(0) };
        let mut last = 0;
        for step in 0..20_000 {
            let place = format!("seed {seed} step {step}");
            last = pick(&mut random, 2000, last);
            match random.u16(..1000) {
                0..700 => pair.read(last, random.u8(..20) == 0, &place),
                700..850 => pair.write(last),
                850..960 => pair.drain(),
                960..990 => pair.forget(last),
                990..994 => {
                    let budget = random.bool().then(|| random.u64(..40_000_000_000));
                    pair.set(budget, random.u64(20..800));
                }
                _ => pair.tick(random.u64(..100)),
            }
            pair.make_room(&place);
        }
        assert_eq!(pair.cache.marks.len(), pair.model.marks.len());
    }
}

#[test]
fn every_place_in_a_mark_has_its_queue_entry() {
    let mut cache = Cache::new(Settings::new(500));
    let mut random = fastrand::Rng::with_seed(3);
    let mut last = 0;
    for _ in 0..50_000 {
        last = pick(&mut random, 3000, last);
        cache.touch(last, random.u8(..4) == 0);
    }
    let placed = (0..3000)
        .filter(|block| cache.marks.mark(*block).is_some_and(|mark| mark.place().is_some()));
    assert_eq!(placed.count() as u64, cache.policy.len(), "P3");
    assert_eq!(cache.marks.len() as u64, cache.policy.len());
}

#[test]
fn a_scan_does_not_push_out_the_working_set() {
    let mut cache = Cache::new(Settings::new(2000));
    for round in 0..20 {
        // Not one after the other, which would be a stream.
        let hits = (0..1000).filter(|block| cache.read(block * 7919 % 1000 * 3)).count();
        assert!(round == 0 || hits == 1000, "{hits} in round {round}");
    }
    // A scan of ten times the cache, in pieces too short to be bypassed.
    for piece in 0..1000_u64 {
        (0..20).for_each(|block| cache.touch(1_000_000 + piece * 100 + block, false));
    }
    let hits = (0..1000).filter(|block| cache.read(block * 3)).count();
    // The younger half of probation was used only within the correlation window.
    assert!(hits >= 900, "{hits} of 1000 are still there");
}

#[test]
fn a_long_stream_goes_past_the_cache() {
    let mut cache = Cache::new(Settings { stream_blocks: 64, ..Settings::new(2000) });
    // While there is room even a stream is kept.
    (0..4000).for_each(|block| cache.touch(block * 2, false));
    let before = cache.policy.counters().fills;
    for block in 0..100_000 {
        cache.read(1_000_000 + block);
    }
    let counters = cache.policy.counters();
    assert!(counters.bypassed > 99_000, "{counters:?}");
    // But for a few that the ghost list mistook.
    assert!(counters.fills - before < 1000, "{counters:?}");
    // Another guest's reads between do not hide it.
    for block in 0..20_000 {
        cache.read(5_000_000 + block);
        cache.read(9_000_000 + block * 17 % 65_536);
    }
    assert!(cache.policy.counters().bypassed > counters.bypassed + 19_000);
}

#[test]
fn growth_is_usable_at_once_and_shrinking_evicts_only_what_is_too_much() {
    let mut cache = Cache::new(Settings::new(4000));
    let mut random = fastrand::Rng::with_seed(5);
    let ratio = |cache: &mut Cache, random: &mut fastrand::Rng, reads: u32| {
        let block = |random: &mut fastrand::Rng| (random.f64().powi(3) * 20_000.0) as u64 * 2;
        (0..reads).filter(|_| cache.read(block(random))).count() as f64 / f64::from(reads)
    };
    ratio(&mut cache, &mut random, 40_000);
    let mut sizes = Vec::new();
    for turn in 0..20 {
        let before = ratio(&mut cache, &mut random, 40_000);
        let held = cache.marks.len();
        cache.policy.set_capacity(2000);
        cache.make_room();
        assert!(cache.marks.len() <= 2000 && held > 3900, "turn {turn}: {held}");
        let small = ratio(&mut cache, &mut random, 40_000);
        assert!(small < before, "turn {turn}: {small} of {before}");
        cache.policy.set_capacity(4000);
        let evicted = cache.policy.counters().evicted;
        while cache.policy.len() < 3900 {
            ratio(&mut cache, &mut random, 100);
        }
        assert_eq!(cache.policy.counters().evicted, evicted, "turn {turn}: room was not used");
        ratio(&mut cache, &mut random, 40_000);
        let after = ratio(&mut cache, &mut random, 40_000);
        assert!(after >= before - 0.01, "turn {turn}: {after} after growth, {before} before");
        sizes.push(cache.policy.memory_bytes());
    }
    assert!(sizes.iter().max().unwrap() <= &(sizes[0] * 11 / 10), "{sizes:?}");
}

#[test]
fn pinned_blocks_are_never_victims_and_come_back_when_drained() {
    let mut cache = Cache::new(Settings::new(300));
    let mut random = fastrand::Rng::with_seed(7);
    (0..300).for_each(|block| cache.write(block * 5));
    // They are overwritten: dirty again.
    for block in 0..100 {
        cache.policy.written(block * 5);
        cache.marks.pin(block * 5, true);
    }
    for _ in 0..20_000 {
        cache.read(10_000 + random.u64(..2000) * 2);
    }
    for block in 0..100 {
        assert!(cache.marks.contains(block * 5), "P2: {block} went while dirty");
        cache.marks.pin(block * 5, false);
        cache.policy.drained(block * 5, &mut cache.marks);
        cache.make_room();
    }
    assert!(cache.policy.len() <= 300);
    assert!((0..100).all(|block| cache.read(block * 5)), "as used blocks they go to main");
}

#[test]
fn the_write_budget_slows_fills_and_nothing_else() {
    let run = |budget: Option<u64>| {
        let mut cache = Cache::new(Settings::new(1000));
        cache.policy.set_write_budget(budget);
        let mut random = fastrand::Rng::with_seed(9);
        let mut hits = 0;
        for step in 0..200_000_u64 {
            // 200 s.
            cache.policy.tick(Nanos(step * 1_000_000));
            hits += u64::from(cache.read((random.f64().powi(3) * 8000.0) as u64 * 2));
        }
        (cache.writes * BLOCK_BYTES, hits, cache.policy.counters().refused)
    };
    let (free, free_hits, refused) = run(None);
    assert_eq!(refused, 0);
    // A tenth of what was written, in a day of which 200 s and an hour's saving count.
    let budget = free / 10 * 86_400 / 3_800;
    let (slow, slow_hits, refused) = run(Some(budget));
    assert!(slow <= free / 10 + BLOCK_BYTES, "{slow} bytes of {free}");
    assert!(slow > free / 12 && refused > 0);
    assert!(slow_hits > free_hits / 2, "{slow_hits} hits of {free_hits}");
}

#[test]
fn it_takes_less_than_eight_bytes_a_block() {
    for gib in [1_u64, 16, 64] {
        let blocks = (gib << 30) / BLOCK_BYTES;
        let policy = Policy::new(Settings::new(blocks));
        let bytes = policy.memory_bytes() as f64 / blocks as f64;
        println!("{gib} GiB: {bytes:.2} bytes a block");
        assert!(bytes <= 8.0, "{bytes} bytes a block");
    }
}

#[test]
fn nothing_is_allocated_while_it_runs() {
    let mut cache = Cache::new(Settings::new(5000));
    let before = cache.policy.memory_bytes();
    let mut random = fastrand::Rng::with_seed(11);
    let mut last = 0;
    for _ in 0..300_000 {
        last = pick(&mut random, 40_000, last);
        cache.touch(last, random.u8(..3) == 0);
    }
    assert_eq!(cache.policy.memory_bytes(), before);
}

#[test]
fn a_fill_that_is_dropped_costs_nothing_and_its_block_stays_known() {
    let mut policy = Policy::new(Settings::new(1000));
    let mut marks = MarkMap::default();
    // One fill is all that may be written.
    policy.set_write_budget(Some(24 * BLOCK_BYTES));
    let mut admitted = 0;
    for block in 0..1000 {
        let verdict = policy.read(block * 2, &mut marks);
        if let Verdict::Admit { free } = verdict {
            policy.dropped(block * 2, free);
            admitted += 1;
            let known = Verdict::Admit { free: false };
            assert_eq!(policy.read(block * 2, &mut marks), known, "{block} is known");
            policy.dropped(block * 2, false);
        }
    }
    assert!(admitted > 500, "there is room: {admitted}");
    assert_eq!((policy.len(), marks.len(), policy.counters().fills), (0, 0, 0));
    assert_eq!(policy.counters().refused, 0, "the budget has what it had");
}
