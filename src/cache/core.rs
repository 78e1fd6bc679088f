//! Everything of a cached disk but its drainer: what journal, reads and roots work on.
//!
//! It is one state machine in several files: `journal.rs` takes writes to the log, `read.rs` reads,
//! `clean/` keeps what is drained or read, `around.rs` writes past the log, `patience.rs` tries
//! again what the backing failed to do, `rewrite.rs` what the flash failed to flush, `roots.rs`
//! writes roots. [`super::disk`] puts it together with the drainer and hands out what completes.

use super::around::Arounds;
use super::clean::Clean;
use super::curve::Sampler;
use super::index::Index;
use super::journal::{Journal, Pending};
use super::layout::Shape;
use super::patience::Patience;
use super::place::Place;
use super::read::Reads;
use super::record::{BLOCK_SECTORS, RecordOrigin};
use super::root::Mode;
use super::roots::Roots;
use super::segment::Segments;
use super::status::CacheStatus;
use crate::base::clock::Nanos;
use crate::base::planted::{Bug, planted};
use crate::io::buffer::Segment;
use crate::io::disk::{DiskGeometry, Operation};
use crate::io::volume::{
    DiskIndex, Io, Origin, Outcome, Request, RequestId, RequestKind, SectorRange,
};
use std::sync::Arc;

pub(super) const FLASH: DiskIndex = DiskIndex(0);
pub(super) const BACKING: DiskIndex = DiskIndex(1);

/// Whose operation a token is; the rest of it is that one's own number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Append,
    Read,
    Root,
    /// A flush of the flash.
    Flush,
    Summary,
    /// A write past the log.
    Around,
    /// A flush of the backing between two modes.
    Change,
    Drain,
    /// A slot of the clean cache, and a table of slots.
    Fill,
    Table,
}

const TOKEN_SHIFT: u32 = 26;

impl Token {
    pub(super) fn pack(self, number: u32) -> u64 {
        assert!(number >> TOKEN_SHIFT == 0, "a number keeps to its bits");
        (self as u64) << TOKEN_SHIFT | u64::from(number)
    }

    pub(super) fn unpack(token: u64) -> (Self, u32) {
        let kinds = [
            Self::Append,
            Self::Read,
            Self::Root,
            Self::Flush,
            Self::Summary,
            Self::Around,
            Self::Change,
            Self::Drain,
            Self::Fill,
            Self::Table,
        ];
        let kind = kinds[(token >> TOKEN_SHIFT) as usize];
        (kind, (token & ((1 << TOKEN_SHIFT) - 1)) as u32)
    }
}

/// A request under way.
#[derive(Default)]
pub(super) struct Slot {
    pub kind: Option<RequestKind>,
    pub ranges: Vec<SectorRange>,
    pub segments: Vec<Segment>,
    pub origin: RecordOrigin,
    /// Sectors of a write that have been given a place in the log; past the log, ranges begun.
    pub done: u64,
    /// Operations under way, of reads and of writes past the log.
    pub under_way: u32,
    pub failed: bool,
}

impl Slot {
    fn is_write(&self) -> bool {
        self.kind == Some(RequestKind::Write)
    }

    pub(super) fn range(&self) -> SectorRange {
        *self.ranges.first().expect("reads and writes have one range")
    }
}

/// What becomes of requests when the disk is fenced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FencePolicy {
    /// They fail with an I/O error.
    #[default]
    Fail,
    /// They wait until the disk is closed.
    Hold,
}

/// See the module.
pub(super) struct Core {
    /// Names the disk in messages.
    pub name: String,
    pub shape: Shape,
    pub place: Place,
    pub flash: DiskGeometry,
    pub backing: DiskGeometry,
    /// There is a third disk, for redo groups.
    pub sidecar: bool,
    pub index: Index,
    pub segments: Segments,
    pub slots: Vec<Slot>,
    pub journal: Journal,
    pub reads: Reads,
    pub roots: Roots,
    pub status: Arc<CacheStatus>,
    pub mode: Mode,
    /// All that have the disk read it.
    pub golden: bool,
    /// A mode change is under way: nothing new that writes is begun.
    pub switching: bool,
    /// The log is about to have fewer segments: a write that has a part in it is finished first.
    pub settling: bool,
    /// A root of a new incarnation is being written: nothing is appended meanwhile.
    pub frozen: bool,
    pub policy: FencePolicy,
    /// Why nothing is served.
    pub fenced: Option<String>,
    /// Requests that wait behind a fence.
    pub held: Vec<u32>,
    /// Requests past the log under way.
    pub arounds: Arounds,
    pub patience: Patience,
    /// Origins in the log as recovery found it, sorted: a replayed one is done already.
    pub origins: Vec<RecordOrigin>,
    pub clean: Clean,
    /// The earliest time that anybody asked for.
    pub wake: Option<Nanos>,
    pub drained: u64,
    /// Watches what the guest reads and writes.
    pub sampler: Sampler,
}

impl Core {
    pub(super) fn attach(&mut self, requests_max: u32) {
        self.slots.resize_with(requests_max as usize, || Slot {
            ranges: Vec::with_capacity(crate::base::limits::RANGES_MAX),
            segments: Vec::with_capacity(crate::base::limits::SEGMENTS_MAX),
            ..Slot::default()
        });
        self.journal.attach(self.shape);
        self.reads.attach(requests_max);
    }

    /// Keeps a copy of the request.
    pub(super) fn take(&mut self, request: &Request<'_>) -> u32 {
        let Origin { door, queue, counter, .. } = request.origin;
        let slot = &mut self.slots[request.id.0 as usize];
        assert!(slot.kind.is_none(), "a request's number is free until it ends");
        slot.kind = Some(request.kind);
        slot.ranges.clear();
        slot.ranges.extend(request.ranges.iter().filter(|range| range.count > 0));
        slot.segments.clear();
        slot.segments.extend_from_slice(request.segments);
        slot.origin = RecordOrigin { door, queue, counter };
        (slot.done, slot.under_way, slot.failed) = (0, 0, false);
        request.id.0
    }

    /// Shows the guest's request to the curve, by blocks of 4 KiB.
    pub(super) fn watch(&mut self, id: u32) {
        let slot = &self.slots[id as usize];
        let reads = slot.kind == Some(RequestKind::Read);
        let Some(range) = slot.ranges.first().filter(|_| reads || slot.is_write()) else { return };
        let last = (range.start + range.count - 1) / BLOCK_SECTORS;
        for block in range.start / BLOCK_SECTORS..=last {
            match reads {
                true => self.sampler.read(block),
                false => self.sampler.write(block),
            }
        }
    }

    /// Whether recovery found the request in the log, from before the daemon began.
    pub(super) fn is_in_log(&self, origin: RecordOrigin) -> bool {
        if planted(Bug::DoorsAlike) {
            let alike =
                |of: &RecordOrigin| (of.queue, of.counter) == (origin.queue, origin.counter);
            return self.origins.iter().any(alike);
        }
        self.origins.binary_search(&origin).is_ok()
    }

    /// Ends a request.
    pub(super) fn end(&mut self, id: u32, outcome: Outcome, io: &mut dyn Io) {
        let slot = &mut self.slots[id as usize];
        assert!(slot.kind.take().is_some(), "a request ends once");
        io.complete(RequestId(id), outcome);
    }

    /// Ends a request; one that failed since the disk is fenced goes the way of all others.
    pub(super) fn end_or_refuse(&mut self, id: u32, outcome: Outcome, io: &mut dyn Io) {
        match outcome {
            Outcome::Failed if self.is_fenced() => self.refuse(id, io),
            outcome => self.end(id, outcome, io),
        }
    }

    pub(super) fn is_fenced(&self) -> bool {
        self.fenced.is_some()
    }

    /// Stops serving: `why` says what was found, where, and what to do.
    pub(super) fn fence(&mut self, why: String, io: &mut dyn Io) {
        if self.is_fenced() {
            return;
        }
        log::error!("{}: fenced: {why}", self.name);
        self.fenced = Some(why);
        self.abandon_writes(io);
        self.lose_patience(io);
    }

    /// A request that comes to a fenced disk.
    pub(super) fn refuse(&mut self, id: u32, io: &mut dyn Io) {
        match self.policy {
            FencePolicy::Fail => self.end(id, Outcome::Failed, io),
            FencePolicy::Hold => self.held.push(id),
        }
    }

    /// Forgets a request that waits: behind a fence, for its first place in the log, or for the
    /// backing, with nothing under way.
    pub(super) fn forget(&mut self, id: u32, io: &mut dyn Io) -> bool {
        let slot = &self.slots[id as usize];
        let begun = slot.done > 0 || slot.under_way > 0;
        let held = self.held.iter().position(|held| *held == id);
        let is_it = |pending: &Pending| matches!(pending, Pending::Request(other) if *other == id);
        let pending = self.journal.pending.iter().position(is_it).filter(|_| !begun);
        match (held, pending) {
            (Some(at), _) => _ = self.held.swap_remove(at),
            (None, Some(at)) => _ = self.journal.pending.remove(at),
            (None, None) => {
                let waits = self.stop_waiting(id);
                if !self.forget_request_around(id, waits, io) && !waits {
                    return false;
                }
            }
        }
        self.slots[id as usize].kind = None;
        true
    }

    /// Submits a range of the allocation, in the parts that the device has it in. How many.
    pub(super) fn submit_flash(
        &mut self,
        operation: Operation<'_>,
        token: u64,
        io: &mut dyn Io,
    ) -> u32 {
        let Operation { kind, offset, length, segments } = operation;
        let mut parts = 0;
        let mut scratch = std::mem::take(&mut self.reads.scratch);
        for part in self.place.parts(offset, length) {
            parts += 1;
            let (offset, length) = (part.offset, part.length);
            if length == operation.length {
                io.submit(FLASH, Operation { kind, offset, length, segments }, token);
                continue;
            }
            scratch.clear();
            super::cursor::Cursor::new(segments, part.skip as usize)
                .take(length as usize, &mut scratch);
            io.submit(FLASH, Operation { kind, offset, length, segments: &scratch }, token);
        }
        self.reads.scratch = scratch;
        parts
    }

    /// Asks for the timer at `at` or earlier.
    pub(super) fn wake_at(&mut self, at: Nanos, io: &mut dyn Io) {
        if self.wake.is_none_or(|wake| at < wake) {
            self.wake = Some(at);
            io.wake_at(at);
        }
    }

    /// Requests that wait for space, and not just for their turn.
    pub(super) fn parked(&self) -> u64 {
        let space = self.journal.stalled || self.index.is_full();
        if space { self.journal.pending.len() as u64 } else { 0 }
    }
}
