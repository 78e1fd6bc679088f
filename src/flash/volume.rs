//! A flash volume: an allocation as a virtual disk.
//!
//! The fast path turns a read or write whose extents are mapped into operations on the drive, with
//! the guest's own memory, and keeps 32 bytes per request. Everything else is a *task* (`task.rs`):
//! unmapped extents, buffers that the drive cannot take, blocks written in part, discard, zeroes.
//!
//! Invariants:
//! - V1 an extent is written only after the record that maps it is durable.
//! - V2 an extent is given back only when nothing is under way on it, and nothing starts there
//!   until the pool has answered: a *hold*.
//! - V3 a block is written in part only under a hold on it.
//! - V4 with the guest's write cache off, a write completes only after a flush that was submitted
//!   after the write had completed.
//! - V5 every request is completed exactly once.

use super::change::AllocationId;
use super::holds::{Hold, Owner};
use super::keeper::ThinSender;
use super::places::Places;
use super::table::{Allocation, Run};
use super::task::Task;
use super::thin::ThinKind;
use crate::base::clock::Nanos;
use crate::base::units::SECTOR_BYTES;
use crate::base::{ErrorKind, Result};
use crate::io::buffer::{PinnedBuffer, Segment};
use crate::io::disk::{DiskGeometry, Errno, Operation, OperationKind};
use crate::io::volume::{
    DiskIndex, Io, Outcome, Request, RequestId, RequestKind, SectorRange, Volume,
};
use std::any::Any;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A volume stands on one disk.
pub(super) const DISK: DiskIndex = DiskIndex(0);

/// What a thin volume does when the pool has no extent left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FullPolicy {
    /// Writes wait until there is space.
    #[default]
    Wait,
    /// Writes fail with an I/O error, as a full drive's would.
    Fail,
}

/// Counters of one volume: one writer, any readers.
#[derive(Debug, Default)]
pub struct VolumeCounters {
    /// Pieces copied through a buffer, because the drive could not take the guest's memory.
    pub bounced: AtomicU64,
    /// Blocks read, merged and written, because a request covered them in part.
    pub merged: AtomicU64,
    /// Pieces zeroed by writing zeros, because the drive can neither zero nor discard.
    pub zeros_written: AtomicU64,
    /// Extents mapped on first write.
    pub extents_mapped: AtomicU64,
    /// Extents given back by a discard.
    pub extents_unmapped: AtomicU64,
    /// A gauge: requests that wait, for the pool most of all.
    pub waiting: AtomicU64,
    /// A gauge: since when the oldest of them does, on the monotonic clock.
    pub waiting_since: AtomicU64,
    /// See [`Self::drive_errors`].
    pub last_drive_error: Mutex<Option<DriveErrors>>,
}

impl VolumeCounters {
    /// What the drive failed since the volume is served; `None`: nothing.
    pub fn drive_errors(&self) -> Option<DriveErrors> {
        *self.last_drive_error.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Operations of a volume that its drive failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriveErrors {
    pub count: u64,
    /// Of the last one: why, when, and the byte of the volume where it began.
    pub errno: Errno,
    pub at: Nanos,
    pub offset: u64,
}

pub(super) fn count(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed) + more, Ordering::Relaxed);
}

/// What a volume is told by its own side in other threads, through `Volume::message`.
pub enum VolumeMessage {
    /// The allocation has this size, larger or as it was before a shrink that is given up; `runs`
    /// are all of it.
    Sized { size_bytes: u64, runs: Vec<Run> },
    /// Use nothing from `size_bytes` on any more. `done` is called when nothing is under way
    /// there; only then may the pool cut the tail off. Dropped uncalled if the volume goes first.
    Shrink { size_bytes: u64, done: Box<dyn FnOnce() + Send> },
    /// The pool's answer to a thin volume.
    Thin { kind: ThinKind, reply: Result<Vec<Run>> },
}

/// A request under way.
#[derive(Default)]
pub(super) struct Slot {
    /// Sectors that operations are under way on; empty for a flush.
    pub first: u64,
    pub end: u64,
    /// Operations under way.
    pub pending: u32,
    pub failed: bool,
    /// Must be flushed before it is completed.
    pub flush_after: bool,
    /// The piece under way lies under its task's own hold.
    pub held: bool,
    pub task: Option<Box<Task>>,
}

/// See the module.
pub struct FlashVolume {
    pub(super) id: AllocationId,
    pub(super) thin: bool,
    pub(super) geometry: DiskGeometry,
    pub(super) keeper: ThinSender,
    pub(super) counters: Arc<VolumeCounters>,
    pub(super) places: Places,
    pub(super) sectors: u64,
    write_cache: bool,
    /// Offsets and lengths of the guest that need no care: below the block size in sectors.
    sector_mask: u64,
    memory_mask: usize,
    pub(super) slots: Vec<Slot>,
    pub(super) holds: Vec<Hold>,
    /// Tasks to be tried again when a hold, a buffer or an extent comes free.
    pub(super) parked: Vec<u32>,
    /// Something came free.
    pub(super) retry: bool,
    /// Logical extents asked for and not yet answered.
    pub(super) mapping: BTreeSet<u64>,
    /// Extents the pool could not map: the tasks that wait for them fail.
    pub(super) refused: BTreeSet<u64>,
    pub(super) bounces: usize,
    /// The drive refused these once: another way is taken from then on.
    pub(super) zero_refused: bool,
    pub(super) discard_refused: bool,
    pub(super) zeros: Option<PinnedBuffer>,
    scratch: Vec<Segment>,
}

/// What the fast path made of a request.
pub(super) enum Direct {
    Submitted,
    /// A hold lies over it.
    Held,
    /// It writes to extents that have no place.
    Unmapped,
}

impl FlashVolume {
    pub(super) fn new(
        allocation: &Allocation,
        geometry: DiskGeometry,
        keeper: ThinSender,
        counters: Arc<VolumeCounters>,
    ) -> Self {
        let mut volume = Self {
            id: allocation.id,
            thin: allocation.thin,
            geometry,
            keeper,
            counters,
            places: Places::default(),
            sectors: 0,
            write_cache: true,
            sector_mask: u64::from(geometry.block_bytes) / SECTOR_BYTES - 1,
            memory_mask: geometry.memory_alignment as usize - 1,
            slots: Vec::new(),
            holds: Vec::new(),
            parked: Vec::new(),
            retry: false,
            mapping: BTreeSet::new(),
            refused: BTreeSet::new(),
            bounces: 0,
            zero_refused: !geometry.zero,
            discard_refused: !geometry.discard,
            zeros: None,
            scratch: Vec::new(),
        };
        volume.set_size(allocation.size_bytes);
        volume.places.learn(allocation.runs());
        volume
    }

    pub(super) fn set_size(&mut self, size_bytes: u64) {
        self.sectors = size_bytes / SECTOR_BYTES;
        self.places.resize(size_bytes);
    }

    /// Whether the drive can take the transfer as it is.
    pub(super) fn is_aligned(&self, range: SectorRange, segments: &[Segment]) -> bool {
        let block_mask = self.geometry.block_bytes as usize - 1;
        let mut memory = 0;
        let mut length = 0;
        for segment in segments {
            memory |= segment.address().addr();
            length |= segment.length();
        }
        (range.start | range.count) & self.sector_mask == 0
            && memory & self.memory_mask == 0
            && length & block_mask == 0
    }

    /// A transfer that needs no care: one operation per piece, into the guest's own memory.
    pub(super) fn direct(
        &mut self,
        (id, kind): (u32, OperationKind),
        range: SectorRange,
        segments: &[Segment],
        io: &mut dyn Io,
    ) -> Direct {
        let (first, end) = (range.start, range.start + range.count);
        if !self.holds.is_empty() && self.is_held(first, end) {
            return Direct::Held;
        }
        let (place, piece_end) = self.places.piece(first, end);
        if let (Some(offset), true) = (place, piece_end == end) {
            let length = range.count * SECTOR_BYTES;
            self.start(id, (first, end), kind);
            io.submit(DISK, Operation { kind, offset, length, segments }, id.into());
            return Direct::Submitted;
        }
        if kind == OperationKind::Write && !self.places.all_mapped(first, end) {
            return Direct::Unmapped;
        }
        self.start(id, (first, end), kind);
        let mut pending = 0;
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut at = first;
        while at < end {
            let (place, piece_end) = self.places.piece(at, end);
            let skip = ((at - first) * SECTOR_BYTES) as usize;
            let length = (piece_end - at) * SECTOR_BYTES;
            slice(segments, skip, length as usize, &mut scratch);
            match place {
                Some(offset) => {
                    let operation = Operation { kind, offset, length, segments: &scratch };
                    io.submit(DISK, operation, id.into());
                    pending += 1;
                }
                None => scratch.iter().for_each(Segment::zero),
            }
            at = piece_end;
        }
        self.scratch = scratch;
        self.slots[id as usize].pending = pending;
        if pending == 0 {
            self.finish(id, io);
        }
        Direct::Submitted
    }

    /// Notes an operation under way on `first..end`.
    fn start(&mut self, id: u32, (first, end): (u64, u64), kind: OperationKind) {
        let flush_after = !self.write_cache && kind == OperationKind::Write;
        let slot = &mut self.slots[id as usize];
        slot.first = first;
        slot.end = end;
        slot.pending = 1;
        slot.flush_after |= flush_after;
    }

    /// All operations of the request have ended: completes it, or flushes first (V4).
    pub(super) fn finish(&mut self, id: u32, io: &mut dyn Io) {
        self.piece_ended(id);
        let slot = &mut self.slots[id as usize];
        if slot.flush_after && !slot.failed {
            slot.flush_after = false;
            slot.pending = 1;
            submit_flush(id, io);
            return;
        }
        let outcome = if slot.failed { Outcome::Failed } else { Outcome::Done };
        self.end(id, outcome, io);
    }

    pub(super) fn end(&mut self, id: u32, outcome: Outcome, io: &mut dyn Io) {
        let slot = &mut self.slots[id as usize];
        slot.failed = false;
        slot.flush_after = false;
        slot.task = None;
        io.complete(RequestId(id), outcome);
    }

    /// The drive failed an operation of the request.
    pub(super) fn drive_failed(&self, id: u32, errno: Errno, io: &dyn Io) {
        if errno.0 == libc::EFAULT {
            // The guest's memory is not there any more: no fault of the drive.
            return;
        }
        let mut errors =
            self.counters.last_drive_error.lock().unwrap_or_else(PoisonError::into_inner);
        let count = errors.map_or(1, |errors| errors.count + 1);
        let offset = self.slots[id as usize].first * SECTOR_BYTES;
        *errors = Some(DriveErrors { count, errno, at: io.now(), offset });
    }

    /// Whether every range lies in the volume as it is now: it may have shrunk since the caller
    /// looked.
    pub(super) fn is_inside(&self, ranges: &[SectorRange]) -> bool {
        ranges.iter().all(|range| {
            range.start.checked_add(range.count).is_some_and(|end| end <= self.sectors)
        })
    }

    fn answered(&mut self, kind: ThinKind, reply: Result<Vec<Run>>, io: &mut dyn Io) {
        match kind {
            ThinKind::Map(extents) => {
                for extent in &extents {
                    self.mapping.remove(extent);
                }
                match reply {
                    Ok(runs) => {
                        count(&self.counters.extents_mapped, runs.len() as u64);
                        self.places.learn(runs.into_iter());
                    }
                    Err(error) => {
                        log::warn!("volume {}: {error}", self.id.0);
                        self.refused.extend(extents);
                    }
                }
                for id in std::mem::take(&mut self.parked) {
                    self.resume(id, io);
                }
                self.refused.clear();
            }
            ThinKind::Unmap(ranges) => {
                // A fenced pool changed nothing. After any other failure the outcome is open, and
                // the extents may be another's already.
                let kept = reply.as_ref().is_err_and(|error| error.kind() == ErrorKind::Fenced);
                for range in ranges.iter().filter(|_| !kept) {
                    self.places.forget(*range);
                }
                self.unmapped(&ranges, reply.is_ok(), io);
            }
        }
    }
}

pub(super) fn submit_flush(id: u32, io: &mut dyn Io) {
    let flush = Operation { kind: OperationKind::Flush, offset: 0, length: 0, segments: &[] };
    io.submit(DISK, flush, id.into());
}

/// The part of `segments` that begins `skip` bytes in, into `target`.
pub(super) fn slice(segments: &[Segment], skip: usize, length: usize, target: &mut Vec<Segment>) {
    target.clear();
    let (mut skip, mut left) = (skip, length);
    for segment in segments {
        if left == 0 {
            return;
        }
        let part = segment.part(skip, left);
        skip -= skip.min(segment.length());
        left -= part.length();
        if part.length() > 0 {
            target.push(part);
        }
    }
}

impl Volume for FlashVolume {
    fn attach(&mut self, requests_max: u32) {
        self.slots.resize_with(requests_max as usize, Slot::default);
    }

    fn submit(&mut self, request: Request<'_>, io: &mut dyn Io) {
        let Request { id: RequestId(id), kind, ranges, segments, .. } = request;
        if !self.is_inside(ranges) {
            io.complete(request.id, Outcome::Failed);
            return;
        }
        let transfer = match kind {
            RequestKind::Read => Some(OperationKind::Read),
            RequestKind::Write => Some(OperationKind::Write),
            RequestKind::Flush => {
                self.slots[id as usize].pending = 1;
                submit_flush(id, io);
                return;
            }
            RequestKind::Discard | RequestKind::WriteZeroes { .. } => None,
        };
        if let (Some(kind), [range]) = (transfer, ranges)
            && self.is_aligned(*range, segments)
            && let Direct::Submitted = self.direct((id, kind), *range, segments, io)
        {
            return;
        }
        self.slots[id as usize].flush_after = !self.write_cache && kind != RequestKind::Read;
        self.slots[id as usize].task = Some(Box::new(Task::new(kind, ranges, segments)));
        self.resume(id, io);
        self.settle(io);
    }

    fn completed(&mut self, token: u64, result: std::result::Result<(), Errno>, io: &mut dyn Io) {
        let id = token as u32;
        let slot = &mut self.slots[id as usize];
        assert!(slot.pending > 0, "a completion belongs to an operation under way");
        slot.pending -= 1;
        if slot.task.is_some() {
            self.task_completed(id, result, io);
            self.settle(io);
            return;
        }
        if let Err(errno) = result {
            slot.failed = true;
            self.drive_failed(id, errno, io);
        }
        if self.slots[id as usize].pending == 0 {
            self.finish(id, io);
            if !self.holds.is_empty() {
                self.settle(io);
            }
        }
    }

    fn message(&mut self, message: Box<dyn Any + Send>, io: &mut dyn Io) {
        let Ok(message) = message.downcast::<VolumeMessage>() else {
            log::error!("volume {}: a message that is not for a flash volume", self.id.0);
            return;
        };
        match *message {
            VolumeMessage::Sized { size_bytes, runs } => {
                self.give_up_shrinks();
                self.set_size(size_bytes);
                self.places.learn(runs.into_iter());
            }
            VolumeMessage::Shrink { size_bytes, done }
                if size_bytes / SECTOR_BYTES >= self.sectors =>
            {
                done();
            }
            VolumeMessage::Shrink { size_bytes, done } => {
                self.hold(size_bytes / SECTOR_BYTES, u64::MAX, Owner::Shrink(Some(done)));
            }
            VolumeMessage::Thin { kind, reply } => self.answered(kind, reply, io),
        }
        self.settle(io);
    }

    fn let_go(&mut self, request: RequestId, io: &mut dyn Io) -> bool {
        let forgotten = self.forget(request.0);
        if forgotten {
            self.settle(io);
        }
        forgotten
    }

    fn set_write_cache(&mut self, enabled: bool) {
        self.write_cache = enabled;
    }
}

#[cfg(test)]
#[path = "volume_test.rs"]
mod tests;
