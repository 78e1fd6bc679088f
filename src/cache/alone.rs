//! A disk that was opened from its flash alone, since its backing was away: what the log has is
//! read, all writes are taken, and reads that miss wait as they do when a backing goes away under
//! a running disk (`patience.rs`).
//!
//! Invariants:
//! - N1 nothing is asked of the backing, and nothing drained, before somebody has claimed it and
//!   compared it with what the log knew *before* it went on alone ([`Known`]): what was appended
//!   since proves nothing.
//! - N2 the root says so until then, over any number of restarts, and says that the backing is
//!   there before the drain begins.
//! - N3 a backing that was refused fences the disk.

use super::core::Core;
use super::disk::CachedDisk;
use super::drain::SidecarState;
use crate::backing::redo::Span;
use crate::backing::stamp::Point;
use crate::base::{Error, ErrorKind, Result};
use crate::io::disk::DiskGeometry;
use crate::io::volume::Io;

/// How far a log and its backing were when they were last together, as the log knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    pub drained: u64,
    /// The newest write in the log, or drained.
    pub newest: u64,
}

impl Known {
    /// Whether the log has all that a group does which is live in the sidecar.
    pub fn can_finish(&self, group: &Span) -> bool {
        self.drained >= group.from && self.newest >= group.point().own()
    }

    /// Nothing is drained before it is durable in the log, and nothing of the log is written over
    /// before its root says that it is drained. So a backing at a `point` that is ahead of both
    /// has seen a later flash.
    ///
    /// # Errors
    /// [`ErrorKind::Fenced`]: it is.
    pub fn check_age(&self, point: &Point) -> Result<()> {
        if point.own() <= self.newest {
            return Ok(());
        }
        let text = format!(
            "the flash is older than its backing, which is at point {}, and the flash knows \
             nothing after {}: put back what the pool held last, or give up what this one holds",
            point.won, self.newest
        );
        Err(Error::new(ErrorKind::Fenced, text))
    }
}

/// A backing that was claimed for a disk that was opened alone.
#[derive(Clone, Debug)]
pub struct ClaimedBacking {
    pub geometry: DiskGeometry,
    /// The point that backing and sidecar hold, if they know of a later one than the flash.
    pub drained_through: u64,
    pub sidecar: SidecarState,
}

impl Core {
    pub(super) fn is_alone(&self) -> bool {
        self.roots.root.alone_since.is_some()
    }
}

impl CachedDisk {
    /// The backing is there: disks 1 and 2 lead to it from now on.
    pub(super) fn claimed(&mut self, claimed: ClaimedBacking, io: &mut dyn Io) {
        let (core, ..) = self.parts();
        assert!(core.is_alone(), "{}: a backing is claimed once", core.name);
        core.roots.root.alone_since = None;
        core.backing = claimed.geometry;
        core.sidecar = true;
        let newest_epoch = core.journal.epoch;
        core.backing_came(io);
        let (drainer, mut host) = self.drainer(io);
        drainer.claimed(claimed, newest_epoch, &mut host);
    }
}
