//! Miss-ratio curves: what share of a disk's reads would miss at any size of its cache.
//!
//! [`Sampler`] watches a disk in less than 1 MiB (SHARDS: reuse distances among a sample of its
//! blocks, chosen by hash); [`Exact`] does the same with every block, for comparison. Both make a
//! [`MissCurve`], which [`advise()`] and [`partition`] read and [`draw`] shows. The curves are
//! those of LRU: what the policy reaches is a little better, and moves with them.
//!
//! A sample that is full lowers its rate. So that one large scan does not spoil it for good, it
//! forgets blocks that were not used for two periods, unless others of them are, and its rate goes
//! up again ([`Sampler::age`]). Blocks are then sampled at the rate of the period of their last
//! use, and each read counts at the rate at which its block was sampled then: so a change of the
//! rate puts no read on a wrong distance.

pub mod advise;
pub mod draw;
mod stack;

pub use advise::{Advice, Demand, Move, Standing, advise, best_move, partition};

use crate::cache::policy::BLOCK_BYTES;
use stack::{ERAS, Stack};
use std::collections::BinaryHeap;

/// Blocks in the sample at most, by default: the memory stays below 1 MiB.
pub const SAMPLES_MAX: usize = 8192;

/// The space of hashes; the sampling rate is a threshold in it.
const HASH_BITS: u32 = 32;

/// Where each block is sampled.
const THRESHOLD_MAX: u64 = 1 << HASH_BITS;

/// Blocks that two periods have not used stay in the sample as long as of so many one is used in
/// each period: a large working set that is read slowly needs them.
const OLD_PART: u64 = 32;

/// Of a reuse distance, so many leading bits below the first are kept.
const BUCKET_BITS: u32 = 6;

/// Reuse distances below 2^40 blocks.
const BUCKETS: usize = (40 - BUCKET_BITS as usize + 1) << BUCKET_BITS;

/// Weights by reuse distance: exact up to 64 blocks, then within 1.6 %.
struct Histogram {
    weights: Vec<f64>,
    total: f64,
}

impl Histogram {
    fn new() -> Self {
        Self { weights: vec![0.0; BUCKETS], total: 0.0 }
    }

    fn bucket(distance: u64) -> usize {
        let bits = 64 - (distance >> BUCKET_BITS).leading_zeros();
        if bits == 0 {
            return distance as usize;
        }
        let low = (distance >> (bits - 1)) as usize - (1 << BUCKET_BITS);
        (((bits as usize) << BUCKET_BITS) + low).min(BUCKETS - 1)
    }

    /// The first distance of the bucket after this one.
    fn end(bucket: usize) -> u64 {
        let bits = bucket >> BUCKET_BITS;
        let low = bucket as u64 & ((1 << BUCKET_BITS) - 1);
        if bits == 0 { low + 1 } else { ((1 << BUCKET_BITS) + low + 1) << (bits - 1) }
    }

    fn add(&mut self, distance: Option<u64>, weight: f64) {
        self.total += weight;
        if let Some(distance) = distance {
            self.weights[Self::bucket(distance)] += weight;
        }
    }

    /// `reads`: how many there really were; what the sample lacks of them, or has too much, is put
    /// on the shortest distance (SHARDS-adj: the hottest blocks are what a sample misjudges).
    fn curve(&self, reads: f64) -> MissCurve {
        let mut hits = reads - self.total;
        let mut points = vec![(0, 1.0)];
        for (bucket, weight) in self.weights.iter().enumerate() {
            hits += weight;
            if *weight > 0.0 {
                let least = points.last().map_or(1.0, |(_, ratio): &(u64, f64)| *ratio);
                let ratio = (1.0 - hits / reads.max(1.0)).clamp(0.0, least);
                // Flat up to where the bucket begins.
                let begin = bucket.checked_sub(1).map_or(0, Self::end);
                if points.last().is_some_and(|(blocks, _)| *blocks < begin) {
                    points.push((begin, least));
                }
                points.push((Self::end(bucket), ratio));
            }
        }
        MissCurve { points, reads }
    }
}

/// A curve: from no cache, where all misses, on.
#[derive(Clone, Debug, PartialEq)]
pub struct MissCurve {
    /// Blocks of cache and miss ratio: up and down, respectively.
    points: Vec<(u64, f64)>,
    reads: f64,
}

impl MissCurve {
    /// From sizes in blocks, growing, and miss ratios; `None` if they make no curve.
    pub fn from_points(points: Vec<(u64, f64)>, reads: f64) -> Option<Self> {
        let falls = |pair: &[(u64, f64)]| pair[0].0 < pair[1].0 && pair[0].1 >= pair[1].1;
        let begins = points.first().is_some_and(|(blocks, _)| *blocks == 0);
        let ratios = points.iter().all(|(_, ratio)| (0.0..=1.0).contains(ratio));
        (begins && ratios && points.windows(2).all(falls)).then_some(Self { points, reads })
    }

    /// Of a cache of so many blocks.
    pub fn miss_ratio(&self, blocks: u64) -> f64 {
        let above = self.points.partition_point(|(size, _)| *size <= blocks);
        let (size, ratio) = self.points[above - 1];
        let Some((next, lower)) = self.points.get(above) else { return ratio };
        let part = (blocks - size) as f64 / (next - size) as f64;
        ratio + (lower - ratio) * part
    }

    /// The size from which on more cache brings nothing.
    pub fn blocks_max(&self) -> u64 {
        self.points.last().map_or(0, |(blocks, _)| *blocks)
    }

    /// Reads that were watched; the older ones count less after [`Sampler::age`].
    pub fn reads(&self) -> f64 {
        self.reads
    }

    /// Mean difference of two curves over sizes up to `blocks`.
    pub fn mean_error(&self, other: &Self, blocks: u64) -> f64 {
        let steps = 400;
        let size = |step: u64| (u128::from(blocks) * u128::from(step) / steps) as u64;
        let error =
            |step| (self.miss_ratio(size(step as u64)) - other.miss_ratio(size(step as u64))).abs();
        (1..=steps).map(error).sum::<f64>() / steps as f64
    }
}

/// What a sampled block was before it was used.
enum Used {
    Again(stack::Distance),
    First,
    /// Sampled since a short time, and perhaps used before that.
    Unknown,
}

/// Watches the reads of one disk. Memory is taken once, [`Sampler::memory_bytes`].
pub struct Sampler {
    stack: Stack,
    /// The sample by hash: the highest goes first.
    hashes: BinaryHeap<(u32, u64)>,
    /// Blocks with a hash below are sampled: those last used in each era. None is below the one
    /// before it.
    thresholds: [u64; ERAS],
    samples_max: usize,
    histogram: Histogram,
    reads: f64,
    period: Period,
}

/// What was seen since the last era began.
#[derive(Default)]
struct Period {
    /// Blocks used, sampled or not.
    uses: u64,
    /// Of blocks of the sample that were of the first era.
    old: u64,
}

impl Default for Sampler {
    fn default() -> Self {
        Self::new(SAMPLES_MAX)
    }
}

impl Sampler {
    pub fn new(samples_max: usize) -> Self {
        Self {
            stack: Stack::new(samples_max + 1),
            hashes: BinaryHeap::with_capacity(samples_max + 1),
            thresholds: [THRESHOLD_MAX; ERAS],
            samples_max,
            histogram: Histogram::new(),
            reads: 0.0,
            period: Period::default(),
        }
    }

    /// A guest reads `block`.
    pub fn read(&mut self, block: u64) {
        self.reads += 1.0;
        let Some(used) = self.touch(block) else { return };
        // Each sampled block stands for so many.
        let scales = self.thresholds.map(|threshold| THRESHOLD_MAX as f64 / threshold as f64);
        match used {
            Used::Again(distance) => {
                let eras = distance.blocks.iter().zip(scales);
                let blocks: f64 = eras.map(|(blocks, scale)| *blocks as f64 * scale).sum();
                self.histogram.add(Some(blocks as u64), scales[distance.era]);
            }
            Used::First => self.histogram.add(None, scales[0]),
            Used::Unknown => {}
        }
    }

    /// A guest writes `block`, which is in the cache from then on: neither a hit nor a miss.
    pub fn write(&mut self, block: u64) {
        self.touch(block);
    }

    /// A use of `block`, if it is one of the sample.
    fn touch(&mut self, block: u64) -> Option<Used> {
        self.period.uses += 1;
        let hash = (stack::mix(block) >> HASH_BITS) as u32;
        if u64::from(hash) >= self.thresholds[ERAS - 1] {
            return None;
        }
        if let Some(distance) = self.stack.touch(block) {
            self.period.old += u64::from(distance.era == 0);
            return Some(Used::Again(distance));
        }
        let first = u64::from(hash) < self.thresholds[0];
        self.hashes.push((hash, block));
        if self.hashes.len() > self.samples_max {
            let highest = self.hashes.peek().map_or(0, |(hash, _)| *hash);
            self.lower_threshold(u64::from(highest).max(1));
        }
        Some(if first { Used::First } else { Used::Unknown })
    }

    /// The blocks with the highest hashes leave the sample.
    fn lower_threshold(&mut self, to: u64) {
        self.thresholds = self.thresholds.map(|threshold| threshold.min(to));
        while let Some((hash, block)) = self.hashes.peek().copied()
            && u64::from(hash) >= to
        {
            self.hashes.pop();
            self.stack.remove(block);
        }
    }

    /// Halves the weight of all that was seen: called once a period, the curve follows what the
    /// guest does now. A period with less uses than the sample has places is a part of the next:
    /// nothing is forgotten while a guest is idle.
    pub fn age(&mut self) {
        self.reads /= 2.0;
        self.histogram.total /= 2.0;
        self.histogram.weights.iter_mut().for_each(|weight| *weight /= 2.0);
        if self.period.uses >= self.samples_max as u64 {
            let old = std::mem::take(&mut self.period).old;
            let old_used = old > 0 && old * OLD_PART >= old + self.stack.first_len();
            self.turn(old_used);
        }
    }

    /// A new era begins. `old_used`: blocks of the first one are worth their place.
    fn turn(&mut self, old_used: bool) {
        let [first, second, last] = self.thresholds;
        // What is two eras becomes one of one rate.
        if first == THRESHOLD_MAX || (old_used && first == last) {
            return self.stack.turn();
        }
        self.stack.forget_first();
        self.stack.turn();
        let Self { hashes, stack, .. } = self;
        hashes.retain(|(_, block)| stack.contains(*block));
        let (mut next, mut expected) = (last, hashes.len());
        while expected * 2 < self.samples_max && next < THRESHOLD_MAX {
            next = (next * 2).min(THRESHOLD_MAX);
            expected *= 2;
        }
        self.thresholds = [second, last, next];
    }

    pub fn curve(&self) -> MissCurve {
        self.histogram.curve(self.reads)
    }

    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>()
            + self.stack.memory_bytes()
            + self.hashes.capacity() * size_of::<(u32, u64)>()
            + self.histogram.weights.capacity() * size_of::<f64>()
    }
}

/// Every reuse distance of every block: what [`Sampler`] estimates. Memory grows with the blocks.
pub struct Exact {
    stack: Stack,
    histogram: Histogram,
}

impl Default for Exact {
    fn default() -> Self {
        Self { stack: Stack::new(1024), histogram: Histogram::new() }
    }
}

impl Exact {
    /// Notes a read of `block`.
    pub fn read(&mut self, block: u64) {
        let distance = self.stack.touch(block);
        self.histogram.add(distance.map(|distance| distance.blocks()), 1.0);
    }

    /// As [`Sampler::write`].
    pub fn write(&mut self, block: u64) {
        self.stack.touch(block);
    }

    pub fn curve(&self) -> MissCurve {
        self.histogram.curve(self.histogram.total)
    }

    /// Distinct blocks.
    pub fn footprint_blocks(&self) -> u64 {
        self.stack.len() as u64
    }
}

/// Blocks of so many bytes, whole ones.
pub fn blocks_of(bytes: u64) -> u64 {
    bytes / BLOCK_BYTES
}

#[cfg(test)]
#[path = "curve_test.rs"]
mod tests;
