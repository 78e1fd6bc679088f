//! A trace through the policy alone: what is on flash is a map, and every fill is done at once.

use crate::reference::{Lru, belady_misses};
use crate::trace::Trace;
use vflash::cache::policy::{BLOCK_BYTES, Leaves, MarkMap, Place, Policy, Settings, Verdict};

/// Sizes of the cache, in shares of the footprint, as in the tables that this is compared with.
pub const SHARES: [f64; 4] = [0.01, 0.05, 0.1, 0.25];

/// What is done with writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writes {
    /// They count as reads do: misses that are kept. The tables that this is compared with do so.
    AsReads,
    /// They become clean cache in place, as drained journal data does; only reads are counted.
    Kept,
    /// They are dropped once they are in the backing; only reads are counted.
    Dropped,
    /// They are left out of the trace.
    Ignored,
}

/// What to simulate.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub writes: Writes,
    /// Probation, in thousandths of the cache, and blocks at least.
    pub probation_permille: u32,
    pub probation_blocks_min: u64,
    /// Blocks after which a stream bypasses the cache.
    pub stream_blocks: u32,
    /// Belady's as well: slow and hungry.
    pub belady: bool,
}

impl Default for Options {
    fn default() -> Self {
        let Settings { probation_permille, probation_blocks_min, stream_blocks, .. } =
            Settings::new(0);
        let writes = Writes::AsReads;
        let belady = false;
        Self { writes, probation_permille, probation_blocks_min, stream_blocks, belady }
    }
}

/// One policy on one trace with one size.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    pub trace: String,
    pub policy: &'static str,
    pub share: f64,
    /// Of cache in all: probation is taken from it.
    pub blocks: u64,
    /// Accesses that were counted, and those that missed.
    pub accesses: u64,
    pub misses: u64,
    /// Bytes written to flash by fills.
    pub fill_bytes: u64,
}

impl Point {
    pub fn miss_ratio(&self) -> f64 {
        self.misses as f64 / self.accesses.max(1) as f64
    }
}

/// Distinct 4 KiB blocks of a trace.
pub fn footprint(trace: &Trace, writes: Writes) -> u64 {
    let mut blocks: Vec<u64> = accesses(trace, writes).map(|(block, _)| block).collect();
    blocks.sort_unstable();
    blocks.dedup();
    blocks.len() as u64
}

fn accesses(trace: &Trace, writes: Writes) -> impl Iterator<Item = (u64, bool)> {
    let all = trace.accesses();
    all.filter(move |(_, write)| !(*write && writes == Writes::Ignored))
        .map(move |(block, write)| (block, write && writes != Writes::AsReads))
}

/// All policies at all sizes.
pub fn run(trace: &Trace, options: &Options) -> Vec<Point> {
    let footprint = footprint(trace, options.writes);
    let mut points = Vec::new();
    for share in SHARES {
        let blocks = ((footprint as f64 * share) as u64).max(2);
        let point = |policy, counts: Counts| Point {
            trace: trace.name.clone(),
            policy,
            share,
            blocks,
            accesses: counts.reads,
            misses: counts.misses,
            fill_bytes: counts.fills * BLOCK_BYTES,
        };
        points.push(point("LRU", lru(trace, options, blocks)));
        points.push(point("vflash", vflash(trace, options, blocks)));
        if options.belady && options.writes == Writes::AsReads {
            let order: Vec<u64> = accesses(trace, options.writes).map(|access| access.0).collect();
            let misses = belady_misses(&order, blocks as usize);
            points
                .push(point("Belady", Counts { reads: order.len() as u64, misses, fills: misses }));
        }
    }
    points
}

#[derive(Clone, Copy, Default)]
struct Counts {
    reads: u64,
    misses: u64,
    fills: u64,
}

fn lru(trace: &Trace, options: &Options, blocks: u64) -> Counts {
    let mut cache = Lru::new(blocks as usize);
    let mut counts = Counts::default();
    for (block, write) in accesses(trace, options.writes) {
        match (write, options.writes) {
            (true, Writes::Dropped) => cache.remove(block),
            (true, _) => _ = cache.access(block),
            (false, _) => {
                counts.reads += 1;
                let missed = u64::from(!cache.access(block));
                counts.misses += missed;
                counts.fills += missed;
            }
        }
    }
    counts
}

/// The policy, and a map instead of an index and flash.
struct Cache {
    policy: Policy,
    marks: MarkMap,
}

fn vflash(trace: &Trace, options: &Options, blocks: u64) -> Counts {
    let slots = (blocks * u64::from(options.probation_permille) / 1000)
        .max(options.probation_blocks_min.min(blocks / 10))
        .max(1);
    let settings = Settings {
        capacity_blocks: blocks - slots,
        probation_permille: options.probation_permille,
        probation_blocks_min: options.probation_blocks_min,
        stream_blocks: options.stream_blocks,
    };
    let mut cache = Cache { policy: Policy::new(settings), marks: MarkMap::default() };
    let mut misses = 0;
    for (block, write) in accesses(trace, options.writes) {
        match (write, options.writes) {
            (true, Writes::Dropped) => {
                cache.policy.forget(block);
                cache.marks.remove(block);
            }
            (true, _) => cache.write(block),
            (false, _) => misses += u64::from(!cache.read(block)),
        }
    }
    let counters = cache.policy.counters();
    Counts { reads: counters.reads, misses, fills: counters.fills }
}

impl Cache {
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

    fn fill(&mut self, block: u64, to: Place) {
        self.marks.insert(block);
        self.policy.filled(block, to, &mut self.marks);
        self.make_room();
    }

    /// A write, drained at once.
    fn write(&mut self, block: u64) {
        self.policy.written(block);
        self.marks.insert(block);
        self.policy.drained(block, &mut self.marks);
        self.make_room();
    }

    fn make_room(&mut self) {
        while let Some(victim) = self.policy.evict(&mut self.marks) {
            self.marks.remove(victim);
        }
    }
}
