//! A cached disk whose backing is away when it is opened: served from its flash alone, and claimed
//! when the backing is back.
//!
//! ```text
//! Away ---- backing answers, claim passes ----> Claimed: all goes on, the drain begins
//!   |                                              ^
//!   `--- claim fails ----> Refused: fenced --------'  opened anew when the claim passes after all
//! ```
//!
//! The claim is that of any opening: lock, stamp, identity, ages. What the disk has acknowledged
//! meanwhile is in its log, and nothing has gone to the backing. So a backing that was given to
//! somebody else meanwhile is met as by a host that was cut off from its storage while it ran.

use super::cached::{
    Cached, LOCK_WAIT, Opener, Opening, backing_identity, open_backing_for, sidecar_state, way_out,
};
use super::pool::OpenPool;
use crate::backing::open::Backing;
use crate::base::{Error, ErrorKind, Result};
use crate::cache::recover::check_backing;
use crate::cache::root::Root;
use crate::cache::{ClaimedBacking, Known};
use crate::io::disk::DiskTarget;
use crate::manifest::CacheSettings;
use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long an opening waits for storage that says nothing at all: for both locks, and a moment.
pub(super) const AWAY_WAIT: Duration = LOCK_WAIT.saturating_mul(2).saturating_add(LOCK_WAIT);

/// A backing that was asked for in a thread of its own: who asks storage that hangs hangs with it.
pub struct Asked {
    answer: Receiver<Result<Backing>>,
}

impl Asked {
    /// Opens and locks the backing and has it read something; changes nothing. `reading`: as
    /// [`crate::backing::open::OpenOptions`] has it. `stamped`: it has a sidecar, wherever that is.
    pub(super) fn begin(cache: &CacheSettings, reading: bool, stamped: bool) -> Result<Self> {
        let (done, answer) = channel();
        let cache = cache.clone();
        let ask = move || {
            let mut backing = open_backing_for(&cache, reading, None)?;
            if stamped {
                backing.find_sidecar()?;
            }
            backing.probe()?;
            Ok(backing)
        };
        let spawned = std::thread::Builder::new().name("ask".to_owned()).spawn(move || {
            // Nobody may be waiting any more: then the locks are let go.
            drop(done.send(ask()));
        });
        spawned.map_err(|error| Error::io("starting a thread that opens a backing", error))?;
        Ok(Self { answer })
    }

    pub(super) fn wait(self) -> Result<Backing> {
        self.answer.recv().unwrap_or_else(|RecvError| Err(died()))
    }

    /// `None`: it hangs.
    pub(super) fn wait_for(&self, wait: Duration) -> Option<Result<Backing>> {
        match self.answer.recv_timeout(wait) {
            Ok(answer) => Some(answer),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(died())),
        }
    }
}

fn died() -> Error {
    Error::new(ErrorKind::Gone, "the thread that opens its backing failed: see the log")
}

/// Storage that cannot be reached, rather than one that says something wrong.
pub(super) fn is_away(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Io | ErrorKind::Gone)
}

pub(super) fn hangs(cache: &CacheSettings) -> Error {
    let text = format!("backing {} has not answered for {AWAY_WAIT:?}", cache.backing);
    Error::new(ErrorKind::Io, text)
}

/// Where a disk that was opened alone stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stand {
    /// Why it cannot be claimed yet.
    Away(String),
    /// Why it cannot be claimed.
    Refused(String),
    Claimed,
}

/// What a disk that was opened alone has to show when its backing is back.
pub struct Alone {
    /// As it was opened.
    root: Root,
    known: Known,
    stand: Mutex<Stand>,
    /// A question that storage has not answered yet.
    asked: Mutex<Option<Asked>>,
}

/// A backing that was claimed: its disks, and what the cache is told.
pub(super) struct Found {
    pub disks: Vec<DiskTarget>,
    pub claimed: ClaimedBacking,
}

impl Alone {
    pub(super) fn new(root: Root, known: Known, why: String, asked: Asked) -> Self {
        let (stand, asked) = (Mutex::new(Stand::Away(why)), Mutex::new(Some(asked)));
        Self { root, known, stand, asked }
    }

    pub(super) fn stand(&self) -> Stand {
        self.stand_mut().clone()
    }

    pub(super) fn stands(&self, stand: Stand) {
        *self.stand_mut() = stand;
    }

    fn stand_mut(&self) -> MutexGuard<'_, Stand> {
        self.stand.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for the backing, once more if the last question was answered.
    pub(super) fn ask(&self, cache: &CacheSettings) -> Result<Backing> {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let question = match asked.take() {
            Some(question) => question,
            None => Asked::begin(cache, false, true)?,
        };
        question.wait_for(AWAY_WAIT).unwrap_or_else(|| {
            *asked = Some(question);
            Err(hangs(cache))
        })
    }

    /// Claims a backing that is back for the disk `name`, as an opening does.
    ///
    /// # Errors
    /// As [`super::cached::open`], word for word.
    pub(super) fn claim(
        &self,
        (opener, pool, name): (&Opener, &OpenPool, &str),
        mut backing: Backing,
    ) -> Result<Found> {
        let context = |error: Error| error.context(format!("cached disk {name}"));
        // It is in no consistency group: nobody wakes it.
        let opening = Opening::new(opener, pool, name, Arc::new(|| ()));
        opening.and_then(|opening| self.claim_for(opening, &mut backing, name)).map_err(context)
    }

    fn claim_for(
        &self,
        mut opening: Opening<'_>,
        backing: &mut Backing,
        name: &str,
    ) -> Result<Found> {
        opening.tell(backing)?;
        let claim = opening.wanted(Some(&self.root), backing);
        let whole = |error| way_out(error, name);
        let taken = backing.take_up(&claim)?;
        let taken =
            taken.filter(|taken| taken.live.is_some_and(|live| self.known.can_finish(&live)));
        let (claimed, stamp) = match taken {
            Some(taken) => {
                opening.taken_up()?;
                let stamp = taken.stamp.clone();
                (taken, stamp)
            }
            None => {
                if let (Some(standing), _) = backing.judge(&claim)? {
                    self.known.check_age(&standing.point).map_err(whole)?;
                }
                let claimed = opening.claim(&claim, backing)?;
                let stamp = claimed.stamp.clone();
                let stamp = opening.opened_at(self.known.drained, stamp, backing)?;
                (claimed, stamp)
            }
        };
        assert!(!claimed.cold, "{name}: what is dirty is refused rather than forgotten");
        let identity = backing_identity(backing.description(), stamp.is_some());
        check_backing(&self.root, &identity).map_err(whole)?;
        let (target, sidecar) = backing.targets();
        let (Some(stamp), Some(sidecar)) = (stamp, sidecar) else {
            let text = "it has no sidecar any more: restore it";
            return Err(Error::new(ErrorKind::Fenced, text));
        };
        let drained_through = match claimed.live {
            Some(_) => self.known.drained,
            None => stamp.point.won,
        };
        let geometry = backing.description().geometry;
        let sidecar_state = sidecar_state(stamp, &claimed);
        let claimed = ClaimedBacking { geometry, drained_through, sidecar: sidecar_state };
        Ok(Found { disks: vec![target, sidecar], claimed })
    }
}

impl Cached {
    /// It was opened alone, and its backing is still to be claimed.
    pub(super) fn looks_for_backing(&self) -> Option<&Alone> {
        self.alone.as_ref().filter(|alone| alone.stand() != Stand::Claimed)
    }
}
