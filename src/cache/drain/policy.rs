//! When to drain and how hard: how much is dirty, how old it is, and how the backing bears it.

use crate::base::clock::Nanos;
use std::collections::VecDeque;
use std::time::Duration;

/// Draining begins when the oldest dirty write is this old,
const START_AGE: Duration = Duration::from_secs(1);

/// or so many bytes of log are dirty.
const START_BYTES: u64 = 8 << 20;

/// Commits remembered at most; the older half is thinned beyond.
const SAMPLES_MAX: usize = 1024;

/// Commits closer together than this are one.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(10);

/// Operations under way at the backing: at least, at first, at most.
const DEPTH_MIN: usize = 4;
const DEPTH_FIRST: usize = 16;
const DEPTH_MAX: usize = 64;

/// The backing is overloaded when an operation takes so many times what it takes at best.
const OVERLOAD: u32 = 4;

/// After a group the drainer rests so many times as long as it took, while the guest writes: below
/// these thousandths of the log that are dirty. Else a burst that the log has room for would run at
/// the speed of the backing, since both want the same flash and the same core.
const RESTS: [(u64, u32); 2] = [(250, 3), (500, 1)];

/// A commit: the log was at `won` and had `bytes` in all.
#[derive(Clone, Copy)]
struct Sample {
    won: u64,
    /// The first commit that it stands for.
    at: Nanos,
    bytes: u64,
}

/// What is committed and not drained.
pub(super) struct Dirty {
    drained: u64,
    head: u64,
    /// Bytes of log, ever; up to the head and up to the drain position.
    bytes: u64,
    drained_bytes: u64,
    samples: VecDeque<Sample>,
}

impl Dirty {
    /// `bytes` of log lie between `drained` and `head` since before `now`.
    pub(super) fn new((drained, head): (u64, u64), bytes: u64, now: Nanos) -> Self {
        let mut samples = VecDeque::new();
        if head > drained {
            samples.push_back(Sample { won: head, at: now, bytes });
        }
        Self { drained, head, bytes, drained_bytes: 0, samples }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.head <= self.drained
    }

    /// The newest committed write.
    pub(super) fn head(&self) -> u64 {
        self.head
    }

    /// Bytes of log, ever.
    pub(super) fn committed_bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn bytes(&self) -> u64 {
        if self.is_empty() { 0 } else { self.bytes - self.drained_bytes }
    }

    pub(super) fn committed(&mut self, won: u64, bytes: u64, now: Nanos) {
        self.head = won;
        self.bytes += bytes;
        let last = self.samples.back_mut();
        match last.filter(|last| now - last.at < SAMPLE_INTERVAL && last.won > self.drained) {
            Some(last) => (last.won, last.bytes) = (won, self.bytes),
            None => self.samples.push_back(Sample { won, at: now, bytes: self.bytes }),
        }
        if self.samples.len() > SAMPLES_MAX {
            self.thin();
        }
    }

    /// Two samples become one that is as old as the older: ages are never told too low.
    fn thin(&mut self) {
        let older = self.samples.len() / 2;
        let mut kept = VecDeque::with_capacity(SAMPLES_MAX);
        let mut first: Option<Sample> = None;
        for (index, sample) in self.samples.iter().enumerate() {
            match first.take() {
                Some(first) => kept.push_back(Sample { at: first.at, ..*sample }),
                None if index < older => first = Some(*sample),
                None => kept.push_back(*sample),
            }
        }
        kept.extend(first);
        self.samples = kept;
    }

    /// Everything up to `won` is drained, some `bytes` of log since the last time.
    pub(super) fn drained(&mut self, won: u64, bytes: u64) {
        self.drained = won;
        self.drained_bytes += bytes;
        while let Some(sample) = self.samples.front().copied().filter(|sample| sample.won <= won) {
            self.drained_bytes = self.drained_bytes.max(sample.bytes);
            self.samples.pop_front();
        }
        let most = self.samples.front().map_or(self.bytes, |next| next.bytes);
        self.drained_bytes = self.drained_bytes.min(most);
    }

    /// When the oldest dirty write was committed, at the latest.
    pub(super) fn oldest(&self) -> Option<Nanos> {
        self.samples.front().map(|sample| sample.at).filter(|_| !self.is_empty())
    }

    /// When `won` was committed, at the earliest.
    pub(super) fn time_of(&self, won: u64) -> Option<Nanos> {
        self.samples.iter().find(|sample| sample.won >= won).map(|sample| sample.at)
    }

    /// Whether draining should begin by itself; else when to ask again.
    pub(super) fn due(&self, staleness_max: Duration, now: Nanos) -> Result<(), Option<Nanos>> {
        let Some(oldest) = self.oldest() else { return Err(None) };
        let begin = oldest + START_AGE.min(staleness_max / 4);
        if self.bytes() >= START_BYTES || now >= begin { Ok(()) } else { Err(Some(begin)) }
    }
}

/// How many operations the backing is given at once.
pub(super) struct Pace {
    depth: usize,
    /// What an operation takes at best.
    floor: Duration,
    /// What operations have taken lately.
    recent: Duration,
    counted: u32,
    /// Full speed: the log is full, or somebody waits.
    pub(super) urgent: bool,
    /// Thousandths of the log that are dirty.
    pub(super) fill: u64,
    /// Bytes of log a second.
    pub(super) rate: u64,
}

impl Pace {
    pub(super) fn new() -> Self {
        let zero = Duration::ZERO;
        Self {
            depth: DEPTH_FIRST,
            floor: zero,
            recent: zero,
            counted: 0,
            urgent: false,
            fill: 0,
            rate: 0,
        }
    }

    pub(super) fn depth(&self) -> usize {
        if self.urgent { DEPTH_MAX } else { self.depth }
    }

    /// An operation of the backing took `took`. Slower ones than `OVERLOAD` times the best mean
    /// that guests of that storage wait because of us.
    pub(super) fn ended(&mut self, took: Duration) {
        let best = if self.floor.is_zero() { took } else { self.floor.min(took) };
        // The best fades, so that a storage that has become slower for good is learnt.
        self.floor = best + best / 1024;
        self.recent = self.recent - self.recent / 16 + took / 16;
        self.counted += 1;
        if self.counted.is_multiple_of(64) {
            self.depth = match self.recent > self.floor * OVERLOAD {
                true => (self.depth / 2).max(DEPTH_MIN),
                false => (self.depth + 4).min(DEPTH_MAX),
            };
        }
    }

    /// How long to leave flash and cores to the guest after a group of `bytes` that took `took`,
    /// while the guest wrote `written`.
    pub(super) fn rest(&self, took: Duration, bytes: u64, written: u64) -> Duration {
        let times =
            RESTS.iter().find(|(below, _)| self.fill < *below).map_or(0, |(_, times)| *times);
        if written < bytes / 4 { Duration::ZERO } else { took * times }
    }

    /// A group of `bytes` of log took `took`, all in all.
    pub(super) fn group_ended(&mut self, bytes: u64, took: Duration) {
        let rate = (bytes as f64 / took.as_secs_f64().max(1e-6)) as u64;
        self.rate = if self.rate == 0 { rate } else { self.rate - self.rate / 4 + rate / 4 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Nanos {
        Nanos(ms * 1_000_000)
    }

    #[test]
    fn draining_begins_with_age_or_amount() {
        let staleness = Duration::from_secs(60);
        let mut dirty = Dirty::new((5, 5), 0, at(0));
        assert_eq!(dirty.due(staleness, at(10_000)), Err(None), "nothing is dirty");
        dirty.committed(6, 4096, at(10_000));
        assert_eq!(dirty.due(staleness, at(10_999)), Err(Some(at(11_000))));
        assert_eq!(dirty.due(staleness, at(11_000)), Ok(()));
        assert_eq!(dirty.due(Duration::from_secs(2), at(10_500)), Ok(()), "a strict bound");
        dirty.committed(7, START_BYTES, at(10_001));
        assert_eq!(dirty.due(staleness, at(10_001)), Ok(()));
        assert_eq!(dirty.bytes(), START_BYTES + 4096);
        dirty.drained(7, 0);
        assert_eq!((dirty.bytes(), dirty.oldest()), (0, None));
    }

    #[test]
    fn ages_are_never_told_too_low_however_many_commits_there_are() {
        let mut dirty = Dirty::new((0, 0), 0, at(0));
        for won in 1..=20_000 {
            dirty.committed(won, 512, at(won * 20));
            assert!(dirty.samples.len() <= SAMPLES_MAX + 1);
        }
        for won in (0..20_000).step_by(97) {
            dirty.drained(won, 97 * 512);
            assert!(dirty.oldest().expect("dirty") <= at((won + 1) * 20), "{won}");
            assert!(dirty.bytes() + 97 * 512 >= (20_000 - won) * 512, "{won}");
        }
        dirty.drained(20_000, 0);
        assert_eq!((dirty.bytes(), dirty.oldest()), (0, None));
    }

    #[test]
    fn a_guest_that_writes_goes_first_while_there_is_room() {
        let (took, mib) = (Duration::from_millis(100), 1 << 20);
        let rest = |fill, written| Pace { fill, ..Pace::new() }.rest(took, 32 * mib, written);
        assert_eq!(rest(100, 32 * mib), took * 3);
        assert_eq!(rest(300, 32 * mib), took);
        assert_eq!(rest(600, 32 * mib), Duration::ZERO, "the log fills");
        assert_eq!(rest(100, mib), Duration::ZERO, "the guest hardly writes");
    }

    #[test]
    fn a_backing_that_slows_down_is_given_less_at_once_and_more_when_it_recovers() {
        let mut pace = Pace::new();
        let run = |pace: &mut Pace, ms, count| {
            (0..count).for_each(|_| pace.ended(Duration::from_millis(ms)));
            pace.depth()
        };
        assert_eq!(run(&mut pace, 2, 2000), DEPTH_MAX);
        assert_eq!(run(&mut pace, 50, 500), DEPTH_MIN);
        pace.urgent = true;
        assert_eq!(pace.depth(), DEPTH_MAX, "the log is full");
        pace.urgent = false;
        assert!(run(&mut pace, 2, 2000) > DEPTH_FIRST);
    }
}
