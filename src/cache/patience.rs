//! Patience with the backing: an operation for a guest that fails there is tried again, later and
//! later, for as long as the disk's policy says; then its request fails.
//!
//! Flushes are not: a second one would prove nothing of the writes before the first
//! (`io/README.md`), so the guest is told. What the drainer writes it tries for ever by itself.

use super::core::{Core, Token};
use crate::base::clock::Nanos;
use crate::io::disk::Errno;
use crate::io::volume::Io;
use std::time::Duration;

/// The pause before the first attempt after a failure; it doubles up to the last.
const PAUSE_FIRST: Duration = Duration::from_millis(50);
const PAUSE_LAST: Duration = Duration::from_secs(1);

/// See the module.
pub(super) struct Patience {
    /// How long an operation is tried.
    pub limit: Duration,
    /// Operations that failed: whose, and its number.
    waiting: Vec<(Token, u32)>,
    /// When they are tried again.
    at: Option<Nanos>,
    pause: Duration,
    /// The last operation failed that told.
    failing: bool,
}

impl Patience {
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, waiting: Vec::new(), at: None, pause: PAUSE_FIRST, failing: false }
    }

    /// The backing fails what guests ask of it.
    pub(super) fn is_failing(&self) -> bool {
        self.failing
    }

    /// Operations that wait for the backing.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }
}

impl Core {
    /// Keeps an operation that failed, begun at `begun`, for another attempt. False: it has failed
    /// for good.
    pub(super) fn bears(
        &mut self,
        operation: (Token, u32),
        (errno, begun): (Errno, Nanos),
        io: &mut dyn Io,
    ) -> bool {
        let late = io.now() - begun >= self.patience.limit;
        if errno.is_unsupported() || late || self.is_fenced() {
            return false;
        }
        let patience = &mut self.patience;
        patience.failing = true;
        patience.waiting.push(operation);
        if patience.at.is_none() {
            patience.at = Some(io.now() + patience.pause);
            patience.pause = (patience.pause * 2).min(PAUSE_LAST);
        }
        self.wake_for_backing(io);
        true
    }

    fn wake_for_backing(&mut self, io: &mut dyn Io) {
        if let Some(at) = self.patience.at {
            self.wake_at(at, io);
        }
    }

    /// An operation of the backing has succeeded. What waits is not tried sooner for that: it may
    /// be about a place that is bad for good.
    pub(super) fn backing_answers(&mut self) {
        self.patience.failing = false;
        if self.patience.waiting.is_empty() {
            self.patience.pause = PAUSE_FIRST;
        }
    }

    /// The backing of a disk that was alone is there: what waits is tried now.
    pub(super) fn backing_came(&mut self, io: &mut dyn Io) {
        self.patience.failing = false;
        self.patience.pause = PAUSE_FIRST;
        self.patience.at = Some(io.now());
        self.try_backing(io);
    }

    /// Tries what waits, if it is time.
    pub(super) fn try_backing(&mut self, io: &mut dyn Io) {
        if self.patience.at.is_none_or(|at| at > io.now()) {
            return self.wake_for_backing(io);
        }
        self.patience.at = None;
        for (kind, number) in std::mem::take(&mut self.patience.waiting) {
            match kind {
                Token::Read => self.submit_read(number, io),
                _ => self.submit_around(number, io),
            }
        }
    }

    /// Forgets what waits for the backing of a request, if that is all of it that is under way.
    pub(super) fn stop_waiting(&mut self, id: u32) -> bool {
        let of = |core: &Self, (kind, number): (Token, u32)| match kind {
            Token::Read => core.reads.slot(number),
            _ => core.arounds.slot(number),
        };
        let waiting = std::mem::take(&mut self.patience.waiting);
        let (mine, others): (Vec<_>, Vec<_>) =
            waiting.iter().copied().partition(|operation| of(self, *operation) == id);
        let reads = |(kind, number): &(Token, u32)| (*kind == Token::Read).then_some(*number);
        let joins: usize =
            waiting.iter().filter_map(reads).map(|number| self.reads.joins(number, id)).sum();
        let parts = mine.len() + joins;
        let all = parts > 0 && parts == self.slots[id as usize].under_way as usize;
        if !all {
            self.patience.waiting = waiting;
            return false;
        }
        waiting.iter().filter_map(reads).for_each(|number| self.reads.leave(number, id));
        self.patience.waiting = others;
        for (kind, number) in mine {
            match kind {
                // Others may want what it fetches.
                Token::Read if self.reads.hand_over(number) => {
                    self.patience.waiting.push((kind, number));
                }
                Token::Read => {
                    let fetch = self.reads.release(number);
                    fetch.iter().for_each(|fetch| self.give_up_fetch(number, fetch));
                }
                _ => self.arounds.release(number),
            }
        }
        true
    }

    /// Nothing is tried any more: the disk is fenced.
    pub(super) fn lose_patience(&mut self, io: &mut dyn Io) {
        self.patience.at = None;
        for (kind, number) in std::mem::take(&mut self.patience.waiting) {
            match kind {
                Token::Read => self.read_failed(number, io),
                _ => self.around_failed(number, io),
            }
        }
    }
}
