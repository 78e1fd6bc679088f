//! Space of a pool follows its use: caches with a `minimum` and a `maximum` are brought, by small
//! steps, to the sizes with which most reads hit.
//!
//! Once a period each pool is looked at ([`next`], pure): the curves say how its space is divided
//! best (`cache::curve::partition`), and the cache that gains most takes a step, of what is free or
//! of the cache that has most above its part. Nothing moves for a gain below `GAIN_MIN`, nor
//! while a resize is under way, so sizes do not swing; a sixteenth of the pool is left for new
//! volumes.

use super::advising::Curved;
use super::api::EventKind;
use super::engine::Engine;
use super::pool::OpenPool;
use crate::base::units::{Bytes, EXTENT_BYTES};
use crate::cache::curve::{Demand, MissCurve, blocks_of, partition};
use crate::cache::policy::{BLOCK_BYTES, Share};
use crate::manifest::CacheShare;
use std::sync::atomic::Ordering;

/// More hits that a cache must come to, as a share of the reads of all that share the pool.
const GAIN_MIN: f64 = 0.01;

/// Reads of 4 KiB before a curve is believed.
const READS_MIN: f64 = 1000.0;

/// A step is this part of the space that is shared, and this part of the pool stays free.
const STEP_PART: u64 = 16;
const FREE_PART: u64 = 16;

/// A cache whose size follows its use.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    pub curve: &'a MissCurve,
    pub bytes: u64,
    pub share: CacheShare,
}

/// What is done next: a cache, its new size, and the size that it is on its way to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    pub index: usize,
    pub to_bytes: u64,
    pub goal_bytes: u64,
}

/// The sizes with which most reads would hit, if `free_bytes` more could be given out.
pub fn goals(parts: &[Part], free_bytes: u64) -> Vec<u64> {
    let total = blocks_of(parts.iter().map(|part| part.bytes).sum::<u64>() + free_bytes);
    let demands: Vec<Demand> = parts.iter().map(demand).collect();
    let whole = |blocks: u64| blocks * BLOCK_BYTES / EXTENT_BYTES * EXTENT_BYTES;
    partition(total, &demands).into_iter().map(whole).collect()
}

fn demand<'a>(part: &Part<'a>) -> Demand<'a> {
    let CacheShare { minimum_bytes, maximum_bytes, weight } = part.share;
    let (min, max) = (blocks_of(minimum_bytes), blocks_of(maximum_bytes));
    let reads_per_second = part.curve.reads();
    Demand { share: Share { min, max, weight }, curve: part.curve, reads_per_second }
}

/// The next step, if one is worth it.
pub fn next(parts: &[Part], free_bytes: u64) -> Option<Step> {
    let goals = goals(parts, free_bytes);
    let total: u64 = parts.iter().map(|part| part.bytes).sum::<u64>() + free_bytes;
    let step = (total / STEP_PART).next_multiple_of(EXTENT_BYTES);
    let reads: f64 = parts.iter().map(|part| weighted_reads(part)).sum();
    let hits = |part: &Part, bytes: u64| {
        let ratio = |bytes| part.curve.miss_ratio(blocks_of(bytes));
        (ratio(part.bytes) - ratio(bytes)) * weighted_reads(part) / reads.max(1.0)
    };
    let gain = |(index, part): (usize, &Part)| (hits(part, goals[index]), index);
    let grows = |(index, part): &(usize, &Part)| {
        goals[*index] > part.bytes && part.curve.reads() >= READS_MIN
    };
    let candidates = parts.iter().enumerate().filter(grows).map(gain);
    let (gain, index) = candidates.max_by(|a, b| a.0.total_cmp(&b.0))?;
    let more = step.min(goals[index] - parts[index].bytes);
    if free_bytes >= more {
        let worth = gain >= GAIN_MIN;
        let to_bytes = parts[index].bytes + more;
        return worth.then_some(Step { index, to_bytes, goal_bytes: goals[index] });
    }
    // Somebody gives it up; what he loses counts.
    let surplus = |(index, part): (usize, &Part)| (part.bytes.saturating_sub(goals[index]), index);
    let (most, giver) = parts.iter().enumerate().map(surplus).max()?;
    let less = most.min(step);
    let lost = -hits(&parts[giver], goals[giver]);
    let worth = most > 0 && gain - lost >= GAIN_MIN;
    let to_bytes = parts[giver].bytes - less;
    worth.then_some(Step { index: giver, to_bytes, goal_bytes: goals[giver] })
}

fn weighted_reads(part: &Part) -> f64 {
    part.curve.reads() * f64::from(part.share.weight)
}

impl Engine {
    /// One step in each pool, where one is worth it.
    pub fn balance(&self) {
        let shared: Vec<Curved> = self.curves_of(|settings| settings.share.is_some());
        for pool in self.open_pools() {
            let of_pool = |disk: &&Curved| disk.served.pool.name == pool.name;
            let disks: Vec<&Curved> = shared.iter().filter(of_pool).collect();
            let busy = |disk: &&Curved| {
                let gauges = disk.served.cached.as_ref().map(|cached| cached.status.gauges());
                gauges.is_none_or(|gauges| gauges.resizing_to.is_some())
            };
            if !disks.is_empty() && !disks.iter().any(busy) {
                self.balance_pool(&pool, &disks);
            }
        }
    }

    fn balance_pool(&self, pool: &OpenPool, disks: &[&Curved]) {
        let space = pool.facts().space;
        let reserve = space.total_bytes / FREE_PART;
        let free = (space.free_bytes + space.scrub_bytes).saturating_sub(reserve);
        let parts = disks.iter().map(|disk| part(disk)).collect::<Option<Vec<Part>>>();
        let Some(parts) = parts else { return };
        for (disk, goal) in disks.iter().zip(goals(&parts, free)) {
            if let Some(cached) = &disk.served.cached {
                cached.goal_bytes.store(goal, Ordering::Relaxed);
            }
        }
        let Some(step) = next(&parts, free) else { return };
        let (disk, part) = (disks[step.index], &parts[step.index]);
        let hits = |bytes: u64| 100.0 * (1.0 - part.curve.miss_ratio(blocks_of(bytes)));
        let text = format!(
            "its cache goes from {} to {}, on the way to {}: hits {:.1} % -> {:.1} %",
            Bytes(part.bytes),
            Bytes(step.to_bytes),
            Bytes(step.goal_bytes),
            hits(part.bytes),
            hits(step.goal_bytes)
        );
        let _changes = self.changes.begin_in_time(&format!("balancing {}", disk.served.name));
        match self.resize_cache(&disk.served.name, step.to_bytes) {
            Ok(()) => self.events().add(EventKind::Balanced, disk.served.object(), text),
            Err(failure) => log::warn!("{}: {text}: {failure}", disk.served.object()),
        }
    }
}

fn part(disk: &Curved) -> Option<Part<'_>> {
    let share = disk.served.settings.cache.as_ref()?.share?;
    Some(Part { curve: &disk.curve, bytes: disk.size_bytes, share })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::units::GIB;

    fn curve(points: &[(u64, f64)], reads: f64) -> MissCurve {
        let points = points.iter().map(|(bytes, ratio)| (blocks_of(*bytes), *ratio)).collect();
        MissCurve::from_points(points, reads).expect("a curve")
    }

    fn share(minimum: u64, maximum: u64) -> CacheShare {
        CacheShare { minimum_bytes: minimum * GIB, maximum_bytes: maximum * GIB, weight: 1 }
    }

    /// Carries steps out until none is worth it; the sizes in GiB, and how many steps.
    fn settle(parts: &mut [Part], free: &mut u64) -> (Vec<u64>, usize) {
        for steps in 0..200 {
            let Some(Step { index, to_bytes, .. }) = next(parts, *free) else {
                return (parts.iter().map(|part| part.bytes / GIB).collect(), steps);
            };
            let part = &mut parts[index];
            let within = part.share.minimum_bytes..=part.share.maximum_bytes;
            assert!(within.contains(&to_bytes), "{part:?} to {to_bytes}");
            *free = (*free + part.bytes).checked_sub(to_bytes).expect("only what is free");
            part.bytes = to_bytes;
        }
        panic!("sizes swing");
    }

    #[test]
    fn space_moves_from_a_scanner_to_a_guest_that_reads_again_step_by_step() {
        let scan = curve(&[(0, 1.0)], 1e6);
        let zipf = curve(&[(0, 1.0), (10 * GIB, 0.5), (40 * GIB, 0.1)], 1e6);
        let part = |curve| Part { curve, bytes: 20 * GIB, share: share(2, 36) };
        let mut parts = [part(&scan), part(&zipf)];
        let mut free = 0;
        let (sizes, steps) = settle(&mut parts, &mut free);
        assert!(sizes[1] >= 34 && sizes[0] <= 6, "{sizes:?}");
        assert!(steps >= 10, "small steps: {steps}");
        assert_eq!(next(&parts, free), None, "and there it stays");
    }

    #[test]
    fn free_space_is_taken_only_for_a_gain_and_never_above_the_maximum() {
        let zipf = curve(&[(0, 1.0), (100 * GIB, 0.0)], 1e6);
        let idle = curve(&[(0, 1.0)], 0.0);
        let part = |curve, most| Part { curve, bytes: 4 * GIB, share: share(4, most) };
        let mut free = 60 * GIB;
        let (sizes, _) = settle(&mut [part(&zipf, 30), part(&idle, 50)], &mut free);
        assert!([29, 30].contains(&sizes[0]) && sizes[1] == 4, "{sizes:?}");
        // A curve of few reads, and a gain of little.
        let few = curve(&[(0, 1.0), (100 * GIB, 0.0)], 10.0);
        assert_eq!(next(&[part(&few, 30)], 60 * GIB), None);
        let flat = curve(&[(0, 1.0), (4 * GIB, 0.5), (30 * GIB, 0.495)], 1e6);
        assert_eq!(next(&[part(&flat, 30)], 60 * GIB), None);
    }

    #[test]
    fn weight_decides_between_equals() {
        let zipf = curve(&[(0, 1.0), (30 * GIB, 0.0)], 1e6);
        let part = |weight| Part {
            curve: &zipf,
            bytes: 15 * GIB,
            share: CacheShare { weight, ..share(3, 30) },
        };
        let (sizes, _) = settle(&mut [part(1), part(3)], &mut 0);
        assert!(sizes[1] > 25, "{sizes:?}");
        let (sizes, steps) = settle(&mut [part(2), part(2)], &mut 0);
        assert_eq!((sizes[0] + sizes[1], steps < 20), (30, true), "{sizes:?}");
    }
}
