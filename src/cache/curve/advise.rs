//! What curves are for: what a little more or less would do, and who should have how much.

use super::MissCurve;
use crate::cache::policy::Share;

/// Steps that a space is divided in.
const STEPS: u64 = 256;

/// What a cache of another size would do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Advice {
    pub blocks: u64,
    pub hit_ratio: f64,
    /// More hits than now, as a share of all reads.
    pub change: f64,
}

/// A cache of `blocks` now, of `step` less, and of `step` more.
pub fn advise(curve: &MissCurve, blocks: u64, step: u64) -> [Advice; 3] {
    let now = 1.0 - curve.miss_ratio(blocks);
    [blocks.saturating_sub(step), blocks, blocks.saturating_add(step)].map(|blocks| {
        let hit_ratio = 1.0 - curve.miss_ratio(blocks);
        Advice { blocks, hit_ratio, change: hit_ratio - now }
    })
}

/// A disk as it is.
#[derive(Clone, Copy, Debug)]
pub struct Standing<'a> {
    pub curve: &'a MissCurve,
    /// Of its cache.
    pub blocks: u64,
    /// That it cannot go below.
    pub min: u64,
    /// Blocks move between disks of one space only, here its number.
    pub space: usize,
}

/// A step of cache from one disk, or from free space, to another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Move {
    pub from: Option<usize>,
    pub to: usize,
    /// More hits, as a share of the reads of all disks.
    pub gain: f64,
}

/// Of all moves of `step` blocks the one that brings most hits, if any brings some. `free`: blocks
/// of each space that nobody has.
pub fn best_move(disks: &[Standing], free: &[u64], step: u64) -> Option<Move> {
    let reads: f64 = disks.iter().map(|disk| disk.curve.reads()).sum();
    let hits = |disk: &Standing, blocks: u64| {
        (disk.curve.miss_ratio(disk.blocks) - disk.curve.miss_ratio(blocks)) * disk.curve.reads()
    };
    let mut moves: Vec<Move> = Vec::new();
    for (to, taker) in disks.iter().enumerate() {
        let won = hits(taker, taker.blocks.saturating_add(step));
        if free.get(taker.space).is_some_and(|free| *free >= step) {
            moves.push(Move { from: None, to, gain: won / reads.max(1.0) });
        }
        for (from, giver) in disks.iter().enumerate() {
            let gives = giver.space == taker.space && giver.blocks >= giver.min + step;
            if from != to && gives {
                let gain = won + hits(giver, giver.blocks - step);
                moves.push(Move { from: Some(from), to, gain: gain / reads.max(1.0) });
            }
        }
    }
    // What costs nobody anything, if it brings as much.
    let better = |a: &Move, b: &Move| {
        a.gain.total_cmp(&b.gain).then(a.from.is_none().cmp(&b.from.is_none()))
    };
    moves.into_iter().filter(|best| best.gain > 0.0).max_by(better)
}

/// A disk that wants a part of a space.
#[derive(Clone, Copy, Debug)]
pub struct Demand<'a> {
    pub share: Share,
    pub curve: &'a MissCurve,
    /// How much its hits count beside its weight.
    pub reads_per_second: f64,
}

/// Divides `total` blocks so that the weighted hits a second are as many as may be: each gets his
/// minimum, then the rest goes step by step where it brings most. It looks past flat parts of a
/// curve (a cliff is worth the way to it). What brings nothing goes by weight.
///
/// The sum is at most `total`, if that covers all minimums, and each part between its minimum and
/// maximum. O(steps² × disks): for once a minute, not for every read.
pub fn partition(total: u64, demands: &[Demand]) -> Vec<u64> {
    let mut parts: Vec<u64> = demands.iter().map(|demand| demand.share.min).collect();
    let step = (total / STEPS).max(1);
    let mut left = total.saturating_sub(parts.iter().sum());
    while left > 0 {
        let best = demands.iter().zip(&parts).enumerate().filter_map(|(index, (demand, part))| {
            let (gain, blocks) = best_way(demand, *part, left, step)?;
            Some((gain, blocks, index))
        });
        let Some((_, blocks, index)) = best.max_by(|a, b| a.0.total_cmp(&b.0)) else { break };
        parts[index] += blocks;
        left -= blocks;
    }
    spread(left, demands, &mut parts);
    parts
}

/// Of all ways to give more, the one that gains most per block: its gain and its blocks.
fn best_way(demand: &Demand, part: u64, left: u64, step: u64) -> Option<(f64, u64)> {
    let Share { max, weight, .. } = demand.share;
    let room = left.min(max.saturating_sub(part)).min(demand.curve.blocks_max().max(part) - part);
    let ways = (1..=room.div_ceil(step)).map(|count| (count * step).min(room));
    let now = demand.curve.miss_ratio(part);
    let worth = demand.reads_per_second * f64::from(weight);
    let gain = |blocks: u64| {
        let gain = (now - demand.curve.miss_ratio(part + blocks)) * worth / blocks as f64;
        (gain, blocks)
    };
    ways.map(gain).filter(|(gain, _)| *gain > 0.0).max_by(|a, b| a.0.total_cmp(&b.0))
}

/// Divides what is left by weight, within the maximums.
fn spread(mut left: u64, demands: &[Demand], parts: &mut [u64]) {
    loop {
        let room = |(demand, part): &(&Demand, &mut u64)| **part < demand.share.max;
        let open = demands.iter().zip(parts.iter_mut()).filter(room);
        let weights: u64 = open.map(|(demand, _)| u64::from(demand.share.weight)).sum();
        if left == 0 || weights == 0 {
            return;
        }
        let round = left;
        for (demand, part) in demands.iter().zip(parts.iter_mut()).filter(room) {
            let fair = u128::from(round) * u128::from(demand.share.weight) / u128::from(weights);
            let more = (fair as u64).max(1).min(left).min(demand.share.max - *part);
            *part += more;
            left -= more;
        }
    }
}
