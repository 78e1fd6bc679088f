//! Sampled curves against exact ones, and what is made of them. Curves of real traces are tested by
//! `tools/replay`.

use super::*;
use crate::cache::policy::{Leaves, MarkMap, Place, Policy, Settings, Share, Verdict};

/// A guest: a hot set, a loop and one-time reads.
fn reads(seed: u64, count: usize) -> Vec<u64> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut at = 0;
    let mut read = || match random.u8(..10) {
        0..5 => (random.f64().powi(3) * 50_000.0) as u64,
        5..9 => {
            at = (at + 1) % 30_000;
            1_000_000 + at
        }
        _ => 2_000_000 + random.u64(..1 << 40),
    };
    (0..count).map(|_| read()).collect()
}

/// What an LRU cache really does.
fn lru_misses(reads: &[u64], blocks: usize) -> usize {
    let mut list: Vec<u64> = Vec::new();
    let mut misses = 0;
    for block in reads {
        match list.iter().position(|other| other == block) {
            Some(at) => drop(list.remove(at)),
            None => misses += 1,
        }
        list.push(*block);
        if list.len() > blocks {
            list.remove(0);
        }
    }
    misses
}

#[test]
fn the_exact_curve_is_what_a_cache_does() {
    let mut random = fastrand::Rng::with_seed(1);
    let reads: Vec<u64> = (0..20_000).map(|_| (random.f64().powi(2) * 60.0) as u64).collect();
    let mut exact = Exact::default();
    reads.iter().for_each(|block| exact.read(*block));
    let curve = exact.curve();
    for blocks in [1, 2, 5, 17, 40, 59, 60, 100] {
        let misses = lru_misses(&reads, blocks) as f64 / reads.len() as f64;
        let told = curve.miss_ratio(blocks as u64);
        assert!((told - misses).abs() < 1e-9, "{blocks}: {told}, in truth {misses}");
    }
    assert_eq!((curve.miss_ratio(0), exact.footprint_blocks()), (1.0, 60));
}

#[test]
fn a_sampled_curve_is_close_and_small() {
    for seed in 0..3 {
        let (mut sampler, mut exact) = (Sampler::default(), Exact::default());
        for block in reads(seed, 1_000_000) {
            sampler.read(block);
            exact.read(block);
        }
        let error = sampler.curve().mean_error(&exact.curve(), 120_000);
        assert!(error < 0.02, "mean error {error}");
        assert!(sampler.thresholds[2] < 1 << 30, "it is a sample");
        assert!(sampler.memory_bytes() <= 1 << 20, "{} bytes", sampler.memory_bytes());
    }
}

#[test]
fn one_very_hot_block_does_not_mislead_a_small_sample() {
    for hot in 0..8 {
        let mut random = fastrand::Rng::with_seed(hot);
        let (mut sampler, mut exact) = (Sampler::new(2048), Exact::default());
        for _ in 0..300_000 {
            let block = if random.u8(..10) < 4 { hot } else { 100 + random.u64(..40_000) };
            sampler.read(block);
            exact.read(block);
        }
        let error = sampler.curve().mean_error(&exact.curve(), 40_000);
        assert!(error < 0.02, "hot block {hot}: mean error {error}");
    }
}

#[test]
fn a_curve_never_rises_and_an_aged_one_follows_the_guest() {
    let mut sampler = Sampler::new(512);
    (0..200_000_u64).for_each(|read| sampler.read(read % 50_000));
    let before = sampler.curve();
    let (low, high) = (before.miss_ratio(40_000), before.miss_ratio(60_000));
    assert!(low > 0.9 && high < 0.4, "{low} {high}");
    let ratios: Vec<f64> = (0..600).map(|size| before.miss_ratio(size * 100)).collect();
    assert!(ratios.windows(2).all(|pair| pair[1] <= pair[0]));
    for _ in 0..10 {
        sampler.age();
        (0..100_000_u64).for_each(|read| sampler.read(read % 10_000));
    }
    let after = sampler.curve().miss_ratio(20_000);
    assert!(after < 0.1, "{after}");
}

#[test]
fn one_large_scan_does_not_spoil_a_curve_for_good() {
    let (mut sampler, mut exact) = (Sampler::new(2048), Exact::default());
    (0..4_000_000).for_each(|block| sampler.read(1_000_000 + block));
    let scanned = sampler.thresholds[2];
    assert!(scanned < THRESHOLD_MAX / 1000, "of 30 000 blocks it has 15");
    let mut random = fastrand::Rng::with_seed(2);
    let mut period = |sampler: &mut Sampler, exact: &mut Exact| {
        for _ in 0..100_000 {
            let block = (random.f64().powi(2) * 30_000.0) as u64;
            sampler.read(block);
            exact.read(block);
        }
        sampler.age();
    };
    // The scan is two periods old after three, and counts less with each one more.
    (0..14).for_each(|_| period(&mut sampler, &mut exact));
    let error = sampler.curve().mean_error(&exact.curve(), 40_000);
    assert!(error < 0.02, "mean error {error}");
    assert!(sampler.thresholds[0] >= scanned * 32, "{:?}", sampler.thresholds);
    // An idle night changes nothing: in the morning all is still known.
    (0..20).for_each(|_| sampler.age());
    period(&mut sampler, &mut exact);
    let error = sampler.curve().mean_error(&exact.curve(), 40_000);
    assert!(error < 0.02, "after a night: mean error {error}");
}

#[test]
fn a_large_working_set_that_is_read_slowly_is_seen_whole() {
    let mut sampler = Sampler::new(2048);
    let mut random = fastrand::Rng::with_seed(3);
    for _ in 0..80 {
        (0..20_000).for_each(|_| sampler.read(random.u64(..200_000)));
        sampler.age();
    }
    // Almost all reads are of blocks that were used periods ago.
    let curve = sampler.curve();
    assert!(curve.miss_ratio(250_000) < 0.1, "{}", curve.miss_ratio(250_000));
    assert!((curve.miss_ratio(100_000) - 0.5).abs() < 0.05, "{}", curve.miss_ratio(100_000));
}

#[test]
fn a_change_of_the_rate_moves_no_read_to_a_wrong_distance() {
    let (mut sampler, mut exact) = (Sampler::default(), Exact::default());
    sampler.lower_threshold(THRESHOLD_MAX / 32);
    let mut rounds = |sampler: &mut Sampler, count: u64| {
        for read in 0..count * 60_000 {
            sampler.read(read * 7919 % 60_000);
            exact.read(read * 7919 % 60_000);
        }
    };
    rounds(&mut sampler, 1);
    sampler.turn(false);
    assert_eq!(sampler.thresholds[ERAS - 1], THRESHOLD_MAX / 8);
    // Each block was used before the change, and three of four were not sampled then.
    rounds(&mut sampler, 1);
    sampler.turn(false);
    rounds(&mut sampler, 1);
    let error = sampler.curve().mean_error(&exact.curve(), 120_000);
    assert!(error < 0.02, "mean error {error}");
}

#[test]
fn what_was_written_hits_when_it_is_read_and_counts_as_no_read() {
    let (mut sampler, mut exact) = (Sampler::new(2048), Exact::default());
    let mut random = fastrand::Rng::with_seed(9);
    for round in 0..200_000_u64 {
        sampler.write(round);
        exact.write(round);
        let behind = random.u64(1..20_000).min(round);
        sampler.read(round - behind);
        exact.read(round - behind);
    }
    let (curve, truth) = (sampler.curve(), exact.curve());
    assert_eq!(curve.reads(), 200_000.0);
    assert!(truth.miss_ratio(40_000) < 0.01 && truth.miss_ratio(5_000) > 0.5);
    let error = curve.mean_error(&truth, 40_000);
    assert!(error < 0.02, "mean error {error}");
}

#[test]
fn a_curve_is_made_anew_from_its_points() {
    let points = vec![(0, 1.0), (100, 0.5), (200, 0.4)];
    let curve = MissCurve::from_points(points, 10.0).expect("a curve");
    assert_eq!((curve.miss_ratio(150), curve.reads()), (0.45, 10.0));
    for wrong in [vec![], vec![(1, 1.0)], vec![(0, 0.5), (0, 0.4)], vec![(0, 0.5), (9, 0.6)]] {
        assert_eq!(MissCurve::from_points(wrong, 1.0), None);
    }
    assert_eq!(MissCurve::from_points(vec![(0, f64::NAN)], 1.0), None);
}

#[test]
fn the_best_move_takes_where_it_costs_least_and_stays_within_a_space() {
    let slope = |reads: f64, end: f64| {
        MissCurve::from_points(vec![(0, 1.0), (1000, end)], reads).expect("a curve")
    };
    let (steep, flat, busy) = (slope(100.0, 0.0), slope(100.0, 0.9), slope(1000.0, 0.0));
    let at = |curve, space| Standing { curve, blocks: 500, min: 100, space };
    let disks = [at(&steep, 0), at(&flat, 0), at(&busy, 1)];
    let best = best_move(&disks, &[0, 0], 100).expect("a move");
    assert_eq!((best.from, best.to), (Some(1), 0), "nothing leaves its pool");
    assert!((best.gain - (10.0 - 1.0) / 1200.0).abs() < 1e-9, "{best:?}");
    let best = best_move(&disks, &[100, 99], 100).expect("a move");
    assert_eq!((best.from, best.to), (None, 0), "free space costs nobody anything");
    let bound = disks.map(|disk| Standing { min: 450, ..disk });
    assert_eq!(best_move(&bound, &[0, 0], 100), None, "minimums stay");
    assert_eq!(best_move(&[at(&flat, 0), at(&flat, 0)], &[0], 100), None, "no gain, no move");
}

fn cliff(blocks: u64, misses_after: f64) -> MissCurve {
    let points = vec![(0, 1.0), (blocks - 1, 0.99), (blocks, misses_after)];
    MissCurve { points, reads: 1e6 }
}

#[test]
fn advice_is_read_off_the_curve() {
    let curve = MissCurve { points: vec![(0, 1.0), (100, 0.5), (200, 0.4)], reads: 1e6 };
    let [less, now, more] = advise(&curve, 100, 50);
    assert_eq!((less.blocks, now.blocks, more.blocks), (50, 100, 150));
    assert!((less.change + 0.25).abs() < 1e-9 && (more.change - 0.05).abs() < 1e-9);
    assert_eq!((now.hit_ratio, now.change), (0.5, 0.0));
    assert_eq!(advise(&curve, 100, 1000)[0].blocks, 0);
}

#[test]
fn space_goes_to_where_it_brings_most_and_over_a_cliff() {
    let share = Share { min: 100, max: 10_000, weight: 1 };
    // A scanner gains nothing at all; a loop of 4000 blocks gains all or nothing.
    let scanner = MissCurve { points: vec![(0, 1.0)], reads: 1e6 };
    let (near, far) = (cliff(4000, 0.1), cliff(9000, 0.1));
    let demand = |curve| Demand { share, curve, reads_per_second: 100.0 };
    let parts = partition(5000, &[demand(&scanner), demand(&near), demand(&far)]);
    assert!(parts[1] >= 4000, "{parts:?}");
    assert_eq!(parts.iter().sum::<u64>(), 5000);
    // Twice the hits a second for twice the space are worth as much: with three times, it wins.
    let busy = Demand { reads_per_second: 300.0, ..demand(&far) };
    let parts = partition(9300, &[demand(&scanner), demand(&near), busy]);
    assert!(parts[2] >= 9000, "{parts:?}");
    let heavy = Demand { share: Share { weight: 3, ..share }, ..demand(&far) };
    let parts = partition(9300, &[demand(&scanner), demand(&near), heavy]);
    assert!(parts[2] >= 9000, "{parts:?}");
}

/// A disk of one space: its guest, its curve and its cache.
struct Disk {
    sampler: Sampler,
    policy: Policy,
    marks: MarkMap,
    share: Share,
}

impl Disk {
    fn read(&mut self, block: u64) -> bool {
        self.sampler.read(block);
        let fill = match self.policy.read(block, &mut self.marks) {
            Verdict::Hit | Verdict::Probed { .. } => return true,
            Verdict::Admit => Some((block, Place::Main)),
            Verdict::Probation { leaves: Some(Leaves { block, to: Some(to) }), .. } => {
                Some((block, to))
            }
            Verdict::Probation { .. } | Verdict::Bypass => None,
        };
        if let Some((block, to)) = fill {
            self.marks.insert(block);
            self.policy.filled(block, to, &mut self.marks);
        }
        self.make_room();
        false
    }

    fn make_room(&mut self) {
        while let Some(victim) = self.policy.evict(&mut self.marks) {
            self.marks.remove(victim);
        }
    }
}

#[test]
fn space_moves_from_a_scanner_to_a_guest_that_reads_again() {
    let total = 8000;
    let disk = |share| Disk {
        sampler: Sampler::new(2048),
        policy: Policy::new(Settings::new(total / 2)),
        marks: MarkMap::default(),
        share,
    };
    let scanner = disk(Share { min: 500, max: total, weight: 1 });
    let mut disks = [scanner, disk(Share { min: 500, max: 7800, weight: 1 })];
    let mut random = fastrand::Rng::with_seed(6);
    let (mut at, mut hits) = (0, [0.0; 12]);
    for period in &mut hits {
        for _ in 0..40_000 {
            at += 1;
            disks[0].read(at % 1_000_000);
            let block = (random.f64().powi(3) * 30_000.0) as u64;
            *period += f64::from(u8::from(disks[1].read(block))) / 40_000.0;
        }
        let curves = disks.each_ref().map(|disk| disk.sampler.curve());
        let demand = |(disk, curve): (&Disk, _)| Demand {
            share: disk.share,
            curve,
            reads_per_second: 1000.0,
        };
        let demands: Vec<Demand> = disks.iter().zip(&curves).map(demand).collect();
        let parts = partition(total, &demands);
        for (disk, part) in disks.iter_mut().zip(parts) {
            disk.policy.set_capacity(part);
            disk.make_room();
            disk.sampler.age();
        }
    }
    let parts = disks.each_ref().map(|disk| disk.policy.capacity_blocks());
    assert!(parts[0] >= 500 && parts[1] >= 7000, "{parts:?}");
    assert_eq!(parts.iter().sum::<u64>(), total);
    assert!(hits[11] > hits[0] + 0.08, "{hits:?}");
}

#[test]
fn parts_stay_between_minimum_and_maximum() {
    let mut random = fastrand::Rng::with_seed(4);
    for _ in 0..200 {
        let curves: Vec<MissCurve> =
            (0..random.usize(1..8)).map(|_| cliff(random.u64(2..9000), random.f64())).collect();
        let share = |random: &mut fastrand::Rng| {
            let min = random.u64(..500);
            Share { min, max: min + random.u64(..5000), weight: random.u32(1..10) }
        };
        let demands: Vec<Demand> = curves
            .iter()
            .map(|curve| Demand {
                share: share(&mut random),
                curve,
                reads_per_second: random.f64() * 1e4,
            })
            .collect();
        let total = random.u64(4000..20_000);
        let parts = partition(total, &demands);
        assert!(parts.iter().sum::<u64>() <= total);
        let within =
            |(part, demand): (&u64, &Demand)| (demand.share.min..=demand.share.max).contains(part);
        assert!(parts.iter().zip(&demands).all(within));
        let wanted: u64 = demands.iter().map(|demand| demand.share.max).sum();
        assert_eq!(parts.iter().sum::<u64>(), total.min(wanted), "nothing is left over");
    }
}

#[test]
fn a_table_and_a_picture_show_the_present_size() {
    let curve = MissCurve { points: vec![(0, 1.0), (1 << 18, 0.5), (1 << 19, 0.25)], reads: 1e6 };
    let table = draw::table(&curve, 1 << 30);
    assert!(table.contains("  1.00 GiB  50.0 %  <- now\n"), "{table}");
    assert!(table.contains("  2.00 GiB  75.0 %\n"), "{table}");
    let picture = draw::svg(&curve, 1 << 30, "web-1/<root>");
    assert!(picture.contains("<title>web-1/&lt;root&gt;</title>"), "{picture}");
    assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
    // In the middle of both axes.
    assert!(picture.contains("L320.0 180.0"), "{picture}");
    assert!(!picture.contains("NaN"));
    let empty = Sampler::default().curve();
    assert!(!draw::svg(&empty, 0, "").contains("NaN") && empty.miss_ratio(5) == 1.0);
}
