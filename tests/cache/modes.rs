//! Changes of mode under the rig's disk, with requests under way or without, and what a guest may
//! rely on meanwhile.

use super::{Rig, UnderWay};
use std::sync::{Arc, Mutex};
use vflash::base::Result;
use vflash::cache::{CacheMessage, Mode};

/// What changes of mode leave open.
#[derive(Default)]
pub(super) struct Modes {
    change: Option<Change>,
    /// A flush of a change failed, and the guest has not been told.
    untold: bool,
    /// FLUSHes of the guest that failed: what it wrote before, it cannot rely on any more.
    pub(super) told: u64,
}

/// A change under way; `to`: another mode, or the detach.
struct Change {
    to: Option<Mode>,
    from_past_log: bool,
    from_through: bool,
    /// All writes up to here had been acknowledged when it began.
    acked: u64,
    answer: Arc<Mutex<Option<Result<()>>>>,
}

fn is_past_log(mode: Mode) -> bool {
    !matches!(mode, Mode::WriteBack | Mode::WriteThrough)
}

impl Rig {
    /// All writes up to this one have been acknowledged: past the log they end in any order.
    pub(super) fn acked_all(&self) -> u64 {
        let won = |under_way: &UnderWay| match under_way {
            UnderWay::Write { won } => Some(*won),
            _ => None,
        };
        let oldest = self.under_way.values().filter_map(|(under_way, _)| won(under_way)).min();
        oldest.map_or(self.acked, |oldest| self.acked.min(oldest - 1))
    }

    /// An acknowledged write survives a power cut.
    pub(super) fn is_strong(&self) -> bool {
        let Modes { change, untold, told } = &self.modes;
        let into = |to: Mode| is_past_log(to) != self.now.past_log;
        let across = change
            .as_ref()
            .is_some_and(|change| change.from_past_log || change.to.is_none_or(into));
        self.setup.strong && !self.now.past_log && !across && !untold && *told == 0
    }

    /// An acknowledged write survives the loss of the flash.
    pub(super) fn is_backed(&self) -> bool {
        self.now.through && !self.modes.untold && self.modes.told == 0
    }

    /// A change was begun and has not been looked after since.
    pub(crate) fn is_changing(&self) -> bool {
        self.modes.change.is_some()
    }

    /// A change is under way while requests are.
    pub(crate) fn meets_a_change(&self) -> bool {
        let goes_on = |change: &Change| change.answer.lock().expect("one thread").is_none();
        self.modes.change.as_ref().is_some_and(goes_on) && self.under_way() > 0
    }

    /// FLUSHes of the guest that have failed.
    pub(crate) fn told(&self) -> u64 {
        self.modes.told
    }

    /// Begins a change to another mode, or the detach.
    pub(crate) fn begin_change(&mut self, to: Option<Mode>) {
        assert!(!self.is_changing(), "one at a time");
        let (from_past_log, from_through) = (self.now.past_log, self.now.through);
        let acked = self.acked_all();
        let answer = Arc::new(Mutex::new(None));
        let slot = answer.clone();
        let reply = Box::new(move |result| *slot.lock().expect("one thread") = Some(result));
        // Meanwhile it may be in either: neither promise is given.
        (self.now.past_log, self.now.through) = (false, false);
        self.note();
        self.modes.change = Some(Change { to, from_past_log, from_through, acked, answer });
        self.tell(match to {
            Some(mode) => CacheMessage::SetMode { mode, reply },
            None => CacheMessage::Close { reply },
        });
    }

    /// What the change under way has come to, if it has ended. One that leaves the log drains, and
    /// the way back flushes the backing: what was acknowledged before is kept.
    pub(crate) fn changed(&mut self) -> Option<Result<()>> {
        let answer = self.modes.change.as_ref()?.answer.lock().expect("one thread").take()?;
        let Change { to, from_past_log, from_through, acked, .. } = self.modes.change.take()?;
        match (&answer, to) {
            (Ok(()), Some(mode)) => {
                self.now.past_log = is_past_log(mode);
                self.now.through = mode == Mode::WriteThrough;
                let across = self.now.past_log != from_past_log;
                if across && !self.modes.untold && self.modes.told == 0 {
                    self.now.kept = self.now.kept.max(acked);
                    self.now.backed = self.now.backed.max(acked);
                }
            }
            (Ok(()), None) => {}
            (Err(_), _) => {
                (self.now.past_log, self.now.through) = (from_past_log, from_through);
                self.modes.untold |= from_past_log;
            }
        }
        self.note();
        Some(answer)
    }

    /// Waits for the change under way.
    pub(crate) fn await_change(&mut self) -> Result<()> {
        for _ in 0..1_000_000 {
            self.turn(false);
            if let Some(answer) = self.changed() {
                return answer;
            }
            self.turn(true);
        }
        panic!("seed {}: no end of the change: {:?}", self.setup.seed, self.state());
    }

    /// Waits for the change under way, if there is one.
    pub(crate) fn await_change_if_any(&mut self) -> Result<()> {
        if self.is_changing() { self.await_change() } else { Ok(()) }
    }

    /// Another mode, with nothing under way.
    pub(crate) fn set_mode(&mut self, mode: Mode) {
        self.finish();
        self.begin_change(Some(mode));
        self.await_change().expect("switched");
    }
}
