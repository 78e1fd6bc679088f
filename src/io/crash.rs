//! The crash-state explorer: from the recorded log of one run, every disk that a power cut could
//! have left (README.md, "What a power cut leaves").
//!
//! Crash points are the submission of every write, zero and discard and the completion of every
//! flush and durable write. At each, an operation is *durable* if a successful flush was submitted
//! after the operation completed and has itself completed; no failed flush may lie between. Every
//! other one that was submitted is kept, dropped or torn at 512 bytes: all combinations when there
//! are at most [`Explorer::exhaustive_max`] of them, else a seeded sample.

use super::disk::{DiskGeometry, OperationKind};
use super::sim::{Content, Logged, Recording, SECTOR_BYTES, SimDisk};
use std::fmt;

/// Names one crash state of a recording, and so repeats a failure: `VFLASH_CRASH_CASE=` its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CrashCase {
    pub seed: u64,
    /// Events up to and including this one have happened (see [`SimDisk::position`]).
    pub point: u64,
    /// Among the states of this point.
    pub index: u64,
}

impl fmt::Display for CrashCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.seed, self.point, self.index)
    }
}

/// What becomes of an operation that was not durable when the power went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Kept,
    Dropped,
    /// Some of its sectors, by seed.
    Torn(u64),
}

/// How to explore. The seed decides tears and samples.
#[derive(Clone, Debug)]
pub struct Explorer {
    pub seed: u64,
    /// Up to so many operations in doubt, every combination of fates is visited.
    pub exhaustive_max: usize,
    /// States per crash point where there are more.
    pub samples: u64,
    /// Visits this state alone.
    pub only: Option<String>,
}

impl Explorer {
    /// The usual depth. `VFLASH_CRASH_CASE` in the environment repeats a single state.
    pub fn new(seed: u64) -> Self {
        let only = std::env::var("VFLASH_CRASH_CASE").ok();
        Self { seed, exhaustive_max: 5, samples: 64, only }
    }

    /// Calls `visit` with a fresh disk for each crash state; returns how many there were. If
    /// `visit` panics, the case is printed.
    pub fn explore(&self, recording: &Recording, mut visit: impl FnMut(CrashCase, SimDisk)) -> u64 {
        let mut settled = Settled { content: recording.base.clone(), applied: 0 };
        let mut states = 0;
        for point in crash_points(&recording.log) {
            let rest = settled.advance(&recording.log, point);
            let doubtful = rest.iter().filter(|(_, durable)| !durable).count();
            let combinations = 3u64.checked_pow(doubtful as u32).unwrap_or(u64::MAX);
            let exhaustive = doubtful <= self.exhaustive_max;
            let count = if exhaustive { combinations } else { self.samples };
            for index in 0..count {
                let case = CrashCase { seed: self.seed, point, index };
                if self.only.as_ref().is_some_and(|only| *only != case.to_string()) {
                    continue;
                }
                let content = settled.content.clone();
                let fates = Fates { case, exhaustive };
                let disk = fates.disk(content, &rest, recording.geometry);
                let announce = Announce(case);
                visit(case, disk);
                drop(announce);
                states += 1;
            }
        }
        states
    }

    /// The state after a power cut at `point`, one of many by `index`. State 0 is the worst:
    /// nothing is there that is not durable.
    pub fn cut(&self, recording: &Recording, point: u64, index: u64) -> SimDisk {
        let mut settled = Settled { content: recording.base.clone(), applied: 0 };
        let rest = settled.advance(&recording.log, point);
        let case = CrashCase { seed: self.seed, point, index };
        let fates = Fates { case, exhaustive: index == 0 };
        fates.disk(settled.content, &rest, recording.geometry)
    }
}

/// Says which state it was if the visit panics.
struct Announce(CrashCase);

impl Drop for Announce {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("crash state failed; repeat it with VFLASH_CRASH_CASE={}", self.0);
        }
    }
}

fn crash_points(log: &[Logged]) -> Vec<u64> {
    let mut points = vec![0];
    for entry in log {
        let submitted = Some(entry.submitted);
        let (begin, end) = match entry.kind {
            OperationKind::Flush => (None, entry.completed),
            OperationKind::WriteDurable => (submitted, entry.completed),
            _ => (submitted, None),
        };
        points.extend(begin.into_iter().chain(end));
    }
    points.sort_unstable();
    points.dedup();
    points
}

/// The durable beginning of the log, applied; it only grows from point to point.
struct Settled {
    content: Content,
    applied: usize,
}

impl Settled {
    /// Applies what is certain at `point`; returns the rest that was submitted by then, in order,
    /// and whether each is durable.
    fn advance<'a>(&mut self, log: &'a [Logged], point: u64) -> Vec<(&'a Logged, bool)> {
        let mut rest = Vec::new();
        for entry in &log[self.applied..] {
            if entry.submitted > point {
                break;
            }
            if entry.kind == OperationKind::Flush {
                if rest.is_empty() {
                    self.applied += 1;
                }
                continue;
            }
            let durable = is_durable(entry, log, point);
            if durable && rest.is_empty() {
                apply(&mut self.content, entry);
                self.applied += 1;
            } else {
                rest.push((entry, durable));
            }
        }
        rest
    }
}

fn is_durable(entry: &Logged, log: &[Logged], point: u64) -> bool {
    let Some(completed) = entry.completed.filter(|at| *at <= point && !entry.failed) else {
        return false;
    };
    if entry.kind == OperationKind::WriteDurable {
        return true;
    }
    let flushes = log
        .iter()
        .skip_while(|other| other.submitted <= completed)
        .filter(|other| other.kind == OperationKind::Flush)
        .filter(|flush| flush.completed.is_some_and(|at| at <= point));
    // The flush that ended first decides: a failed one may have dropped the write for good.
    flushes.min_by_key(|flush| flush.completed).is_some_and(|flush| !flush.failed)
}

fn apply(content: &mut Content, entry: &Logged) {
    match entry.kind {
        OperationKind::Write | OperationKind::WriteDurable => {
            content.write(entry.offset, &entry.data);
        }
        OperationKind::Zero | OperationKind::Discard => content.zero(entry.offset, entry.length),
        OperationKind::Read | OperationKind::Flush => {}
    }
}

struct Fates {
    case: CrashCase,
    exhaustive: bool,
}

impl Fates {
    fn disk(
        &self,
        mut content: Content,
        rest: &[(&Logged, bool)],
        geometry: DiskGeometry,
    ) -> SimDisk {
        let CrashCase { seed, point, index } = self.case;
        let mut random = fastrand::Rng::with_seed(
            seed ^ point.rotate_left(32) ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        );
        let mut digits = index;
        for (entry, durable) in rest {
            if *durable {
                apply(&mut content, entry);
                continue;
            }
            let digit = if self.exhaustive { digits % 3 } else { random.u64(0..3) };
            digits /= 3;
            let fate = match digit {
                0 => Fate::Dropped,
                1 => Fate::Kept,
                _ => Fate::Torn(random.u64(..)),
            };
            apply_fate(&mut content, entry, fate);
        }
        SimDisk::with(content, geometry, random.u64(..))
    }
}

/// A tear keeps the beginning, the end, or any set of the sectors.
fn apply_fate(content: &mut Content, entry: &Logged, fate: Fate) {
    let seed = match fate {
        Fate::Dropped => return,
        Fate::Kept => return apply(content, entry),
        Fate::Torn(seed) => seed,
    };
    let mut random = fastrand::Rng::with_seed(seed);
    let sectors = entry.length / SECTOR_BYTES;
    let cut = random.u64(0..=sectors);
    let kind = random.u8(0..3);
    // Ranges of many sectors (a zeroed gigabyte) are torn in at most 64 pieces.
    let piece = sectors.div_ceil(64).max(1);
    let mut start = 0;
    while start < sectors {
        let end = (start + piece).min(sectors);
        let kept = match kind {
            0 => start < cut,
            1 => start >= cut,
            _ => random.bool(),
        };
        if kept {
            let (from, to) = ((start * SECTOR_BYTES) as usize, (end * SECTOR_BYTES) as usize);
            let data = if entry.data.is_empty() { &[] } else { &entry.data[from..to] };
            let part = Logged {
                offset: entry.offset + start * SECTOR_BYTES,
                length: (end - start) * SECTOR_BYTES,
                data: data.into(),
                ..entry.clone()
            };
            apply(content, &part);
        }
        start = end;
    }
}
