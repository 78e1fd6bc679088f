//! The crash-state explorer: from the recorded log of one run, every disk that a power cut could
//! have left (README.md, "What a power cut leaves").
//!
//! Crash points are the submission of every write, zero and discard and the completion of every
//! flush and durable write. At each, an operation is *durable* if a successful flush was submitted
//! after the operation completed and has itself completed; no failed flush may lie between. A
//! durable write is durable when it completes. Every other operation that was submitted is kept,
//! dropped or torn at 512 bytes: all combinations when there are at most
//! [`Explorer::exhaustive_max`] of them, else a seeded sample.
//!
//! Several disks that were recorded together end at one instant, each with its own [`Loss`].

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

/// What the end of the host does to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Its power goes too: only what was flushed is certain.
    Unflushed,
    /// It lives on, as shared storage does: all that had completed is certain, and what was under
    /// way may have happened in whole, in part or not at all.
    UnderWay,
}

/// How to explore. The seed decides tears and samples.
#[derive(Clone, Debug)]
pub struct Explorer {
    pub seed: u64,
    /// Up to so many operations in doubt, every combination of fates is visited.
    pub exhaustive_max: usize,
    /// States per crash point where there are more.
    pub samples: u64,
    /// Where there are more crash points, so many of them are visited, by seed.
    pub points_max: usize,
    /// Visits this state alone.
    pub only: Option<String>,
}

impl Explorer {
    /// The usual depth. `VFLASH_CRASH_CASE` in the environment repeats a single state.
    pub fn new(seed: u64) -> Self {
        let only = std::env::var("VFLASH_CRASH_CASE").ok();
        Self { seed, exhaustive_max: 5, samples: 64, points_max: usize::MAX, only }
    }

    /// Calls `visit` with a fresh disk for each crash state; returns how many there were. If
    /// `visit` panics, the case is printed.
    pub fn explore(&self, recording: &Recording, mut visit: impl FnMut(CrashCase, SimDisk)) -> u64 {
        let one = std::slice::from_ref(recording);
        self.explore_together(one, &[Loss::Unflushed], |case, disks| {
            disks.into_iter().for_each(|disk| visit(case, disk));
        })
    }

    /// As [`Self::explore`], over disks that were recorded together: the same instant for all,
    /// and for each what it loses then.
    pub fn explore_together(
        &self,
        recordings: &[Recording],
        losses: &[Loss],
        mut visit: impl FnMut(CrashCase, Vec<SimDisk>),
    ) -> u64 {
        let mut histories = histories(recordings, losses);
        let mut states = 0;
        for point in self.crash_points(recordings) {
            let rests: Vec<Vec<Entry<'_>>> =
                histories.iter_mut().map(|history| history.advance(point)).collect();
            let doubtful = rests.iter().flatten().filter(|entry| !entry.certain).count();
            let combinations = 3u64.checked_pow(doubtful as u32).unwrap_or(u64::MAX);
            let exhaustive = doubtful <= self.exhaustive_max;
            let count = if exhaustive { combinations } else { self.samples };
            for index in 0..count {
                let case = CrashCase { seed: self.seed, point, index };
                if self.only.as_ref().is_some_and(|only| *only != case.to_string()) {
                    continue;
                }
                let mut fates = Fates::new(case, exhaustive);
                let disks = histories.iter().zip(&rests).map(|(history, rest)| {
                    fates.disk(history.content.clone(), rest, history.recording.geometry)
                });
                let disks = disks.collect();
                let announce = Announce(case);
                visit(case, disks);
                drop(announce);
                states += 1;
            }
        }
        states
    }

    /// The state after a power cut at `point`, one of many by `index`. State 0 is the worst:
    /// nothing is there that is not durable.
    pub fn cut(&self, recording: &Recording, point: u64, index: u64) -> SimDisk {
        let mut history = History::new(recording, Loss::Unflushed);
        let rest = history.advance(point);
        let case = CrashCase { seed: self.seed, point, index };
        Fates::new(case, index == 0).disk(history.content, &rest, recording.geometry)
    }

    /// As [`Self::cut`], for disks that were recorded together.
    pub fn cut_together(
        &self,
        recordings: &[Recording],
        losses: &[Loss],
        (point, index): (u64, u64),
    ) -> Vec<SimDisk> {
        let case = CrashCase { seed: self.seed, point, index };
        let mut fates = Fates::new(case, index == 0);
        let cut = |mut history: History<'_>| {
            let rest = history.advance(point);
            fates.disk(history.content, &rest, history.recording.geometry)
        };
        histories(recordings, losses).into_iter().map(cut).collect()
    }

    fn crash_points(&self, recordings: &[Recording]) -> Vec<u64> {
        let mut points = vec![0];
        for entry in recordings.iter().flat_map(|recording| &recording.log) {
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
        if points.len() > self.points_max {
            let mut random = fastrand::Rng::with_seed(self.seed);
            points = random.choose_multiple(points, self.points_max);
            points.sort_unstable();
        }
        points
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

fn histories<'a>(recordings: &'a [Recording], losses: &[Loss]) -> Vec<History<'a>> {
    assert_eq!(recordings.len(), losses.len(), "each disk has its loss");
    recordings.iter().zip(losses).map(|(recording, loss)| History::new(recording, *loss)).collect()
}

/// An operation that had been submitted at a crash point.
struct Entry<'a> {
    logged: &'a Logged,
    certain: bool,
}

/// One disk's log, and its certain beginning, applied; it only grows from point to point.
struct History<'a> {
    recording: &'a Recording,
    /// From when on each operation of the log is certain, if ever.
    certain_from: Vec<Option<u64>>,
    content: Content,
    applied: usize,
}

impl<'a> History<'a> {
    fn new(recording: &'a Recording, loss: Loss) -> Self {
        let certain_from = certain_from(&recording.log, loss);
        Self { recording, certain_from, content: recording.base.clone(), applied: 0 }
    }

    /// Applies what is certain at `point`; returns the rest that was submitted by then, in order.
    fn advance(&mut self, point: u64) -> Vec<Entry<'a>> {
        let mut rest = Vec::new();
        let log = self.recording.log.iter().zip(&self.certain_from).skip(self.applied);
        for (logged, certain_from) in log.take_while(|(logged, _)| logged.submitted <= point) {
            let certain = certain_from.is_some_and(|from| from <= point);
            let flush = logged.kind == OperationKind::Flush;
            if rest.is_empty() && (certain || flush) {
                apply(&mut self.content, logged);
                self.applied += 1;
            } else if !flush {
                rest.push(Entry { logged, certain });
            }
        }
        rest
    }
}

/// For each operation of a log: the time from which on no end of the host can undo it.
fn certain_from(log: &[Logged], loss: Loss) -> Vec<Option<u64>> {
    let flushes: Vec<&Logged> =
        log.iter().filter(|entry| entry.kind == OperationKind::Flush).collect();
    // Of each flush and all later ones, the one that ended first.
    let mut first_ended = vec![None; flushes.len() + 1];
    for (index, flush) in flushes.iter().enumerate().rev() {
        let own = flush.completed.map(|at| (at, flush.failed));
        first_ended[index] = own.into_iter().chain(first_ended[index + 1]).min();
    }
    let certain = |entry: &Logged| {
        let completed = entry.completed.filter(|_| !entry.failed)?;
        if loss == Loss::UnderWay || entry.kind == OperationKind::WriteDurable {
            return Some(completed);
        }
        let later = flushes.partition_point(|flush| flush.submitted <= completed);
        // The flush that ended first decides: a failed one may have dropped the write for good.
        first_ended[later].filter(|(_, failed)| !failed).map(|(at, _)| at)
    };
    log.iter().map(certain).collect()
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

/// Decides over the operations in doubt, one after the other over all disks.
struct Fates {
    exhaustive: bool,
    /// Base 3, while exhaustive.
    digits: u64,
    random: fastrand::Rng,
}

impl Fates {
    fn new(case: CrashCase, exhaustive: bool) -> Self {
        let CrashCase { seed, point, index } = case;
        let random = fastrand::Rng::with_seed(
            seed ^ point.rotate_left(32) ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        );
        Self { exhaustive, digits: index, random }
    }

    fn disk(
        &mut self,
        mut content: Content,
        rest: &[Entry<'_>],
        geometry: DiskGeometry,
    ) -> SimDisk {
        for entry in rest {
            match entry.certain {
                true => apply(&mut content, entry.logged),
                false => apply_fate(&mut content, entry.logged, self.next()),
            }
        }
        SimDisk::with(content, geometry, self.random.u64(..))
    }

    fn next(&mut self) -> Fate {
        let digit = if self.exhaustive { self.digits % 3 } else { self.random.u64(0..3) };
        self.digits /= 3;
        match digit {
            0 => Fate::Dropped,
            1 => Fate::Kept,
            _ => Fate::Torn(self.random.u64(..)),
        }
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
