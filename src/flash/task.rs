//! The slow path of a flash volume: a request that needs more than one operation per piece. A task
//! works through its ranges piece by piece, one at a time.
//!
//! ```text
//! next -+- in place, drive can do it -----------------> Bounce / Clear ------------------> next
//!       +- part of a block -- hold --> Merge (read) --> Bounce (write), hold let go -----> next
//!       +- whole thin extents to give back -- hold --> Unmap (pool answers), hold let go > next
//!       +- no place, another's hold, no buffer: parked, and tried again -----------------> next
//!       `- no piece left --> Flush if the guest's write cache is off --> end
//! ```

use super::extents::ExtentRange;
use super::holds::Owner;
use super::places::EXTENT_SECTORS;
use super::thin::ThinKind;
use super::volume::{DISK, Direct, FlashVolume, count, slice, submit_flush};
use crate::base::clock::Nanos;
use crate::base::units::SECTOR_BYTES;
use crate::io::buffer::{PinnedBuffer, Segment, gather, scatter};
use crate::io::disk::{Errno, Operation, OperationKind};
use crate::io::volume::{Io, Outcome, RequestKind, SectorRange};

/// Bytes of a bounce buffer, and of the buffer of zeros.
const BOUNCE_BYTES: usize = 256 << 10;

/// Bounce buffers of one volume; further tasks wait.
const BOUNCES_MAX: usize = 16;

/// Zeros written by one operation, as segments of the buffer of zeros.
const ZERO_SEGMENTS_MAX: u64 = 16;

/// A request and how far it has come.
pub(super) struct Task {
    kind: RequestKind,
    ranges: Vec<SectorRange>,
    /// Guest memory, for reads and writes.
    segments: Vec<Segment>,
    /// Position: a range, and the next sector in it.
    range: usize,
    at: u64,
    step: Step,
    /// When it was parked first.
    pub(super) parked_at: Option<Nanos>,
    buffer: Option<PinnedBuffer>,
}

/// What is under way, and up to which sector it brings the task.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Next,
    /// Waits for a hold on the block of the piece, to write it in part.
    HoldMerge {
        end: u64,
    },
    /// Reads the blocks that are to be written in part.
    Merge {
        end: u64,
    },
    /// Reads into, or writes from, the bounce buffer.
    Bounce {
        end: u64,
    },
    /// Zero, discard or writing of zeros.
    Clear {
        end: u64,
        kind: OperationKind,
    },
    /// Waits for a hold on whole extents, to give them back.
    HoldUnmap {
        end: u64,
    },
    /// Waits for the pool to take them.
    Unmap {
        end: u64,
    },
    /// The flush after the last piece.
    Flush,
}

impl Task {
    pub(super) fn new(kind: RequestKind, ranges: &[SectorRange], segments: &[Segment]) -> Self {
        let at = ranges.first().map_or(0, |range| range.start);
        Self {
            kind,
            ranges: ranges.to_vec(),
            segments: segments.to_vec(),
            range: 0,
            at,
            step: Step::Next,
            parked_at: None,
            buffer: None,
        }
    }

    /// The current range's start, the next sector and the range's end; `None` at the end of all.
    fn position(&mut self) -> Option<(u64, u64, u64)> {
        while let Some(range) = self.ranges.get(self.range) {
            let end = range.start + range.count;
            if self.at < end {
                return Some((range.start, self.at, end));
            }
            self.range += 1;
            self.at = self.ranges.get(self.range).map_or(0, |next| next.start);
        }
        None
    }

    /// Guest memory of the sectors `at..end` of the only range.
    fn memory(&self, start: u64, at: u64, end: u64) -> Vec<Segment> {
        let mut part = Vec::new();
        let skip = ((at - start) * SECTOR_BYTES) as usize;
        slice(&self.segments, skip, ((end - at) * SECTOR_BYTES) as usize, &mut part);
        part
    }

    fn unmaps(&self) -> bool {
        matches!(self.kind, RequestKind::Discard | RequestKind::WriteZeroes { unmap: true })
    }
}

/// What became of the attempt to begin the next piece.
enum Begun {
    /// Nothing to do up to this sector.
    Skip(u64),
    /// An operation, a hold or the pool will go on.
    Wait,
    /// To be tried again.
    Park,
}

impl FlashVolume {
    /// Goes on with a task that is not waiting for anything, or tries a parked one again.
    pub(super) fn resume(&mut self, id: u32, io: &mut dyn Io) {
        let mut task = self.slots[id as usize].task.take().expect("only tasks are resumed");
        if !self.is_inside(&task.ranges) {
            return self.task_failed(id, task, io);
        }
        let transfer = match task.kind {
            RequestKind::Read => Some(OperationKind::Read),
            RequestKind::Write => Some(OperationKind::Write),
            _ => None,
        };
        if let (Some(kind), [range]) = (transfer, &task.ranges[..]) {
            if kind == OperationKind::Write && !self.map_all(*range) {
                let refused = self.is_refused(*range);
                return match refused {
                    true => self.task_failed(id, task, io),
                    false => self.park(id, task, io),
                };
            }
            if self.is_aligned(*range, &task.segments) {
                let range = *range;
                return match self.direct((id, kind), range, &task.segments, io) {
                    Direct::Submitted => {}
                    Direct::Held | Direct::Unmapped => self.park(id, task, io),
                };
            }
        }
        while let Some(position) = task.position() {
            let begun = match task.kind {
                RequestKind::Read | RequestKind::Write => {
                    self.begin_transfer(id, &mut task, position, io)
                }
                _ => self.begin_clear(id, &mut task, position, io),
            };
            match begun {
                Begun::Skip(end) => task.at = end,
                Begun::Wait => {
                    self.slots[id as usize].task = Some(task);
                    return;
                }
                Begun::Park => return self.park(id, task, io),
            }
        }
        self.task_done(id, task, io);
    }

    fn park(&mut self, id: u32, mut task: Box<Task>, io: &dyn Io) {
        task.parked_at.get_or_insert(io.now());
        self.slots[id as usize].task = Some(task);
        self.parked.push(id);
    }

    /// Forgets a request if it is parked: nothing of it is under way then. What the pool was asked
    /// for is withdrawn when nobody is left who waits for it.
    pub(super) fn forget(&mut self, id: u32) -> bool {
        let Some(at) = self.parked.iter().position(|parked| *parked == id) else { return false };
        self.parked.remove(at);
        let slot = &mut self.slots[id as usize];
        (slot.failed, slot.flush_after) = (false, false);
        let mut task = slot.task.take().expect("only tasks are parked");
        self.drop_buffer(&mut task);
        if self.parked.is_empty() && !self.mapping.is_empty() {
            self.mapping.clear();
            self.keeper.withdraw();
        }
        true
    }

    fn task_failed(&mut self, id: u32, mut task: Box<Task>, io: &mut dyn Io) {
        self.drop_buffer(&mut task);
        self.end(id, Outcome::Failed, io);
    }

    fn task_done(&mut self, id: u32, mut task: Box<Task>, io: &mut dyn Io) {
        self.drop_buffer(&mut task);
        let slot = &mut self.slots[id as usize];
        if std::mem::take(&mut slot.flush_after) {
            slot.pending = 1;
            task.step = Step::Flush;
            slot.task = Some(task);
            submit_flush(id, io);
        } else {
            self.end(id, Outcome::Done, io);
        }
    }

    /// True if every extent of the range has a place; else asks the pool for the missing ones.
    fn map_all(&mut self, range: SectorRange) -> bool {
        let last = (range.start + range.count).div_ceil(EXTENT_SECTORS);
        let extents = range.start / EXTENT_SECTORS..last;
        let missing: Vec<u64> = extents.filter(|extent| !self.places.is_mapped(*extent)).collect();
        if missing.is_empty() {
            return true;
        }
        if !self.thin || self.is_held(range.start, range.start + range.count) {
            return false;
        }
        let asked = &mut self.mapping;
        let refused = &self.refused;
        let ask: Vec<u64> = missing
            .into_iter()
            .filter(|extent| !refused.contains(extent) && asked.insert(*extent))
            .collect();
        if !ask.is_empty() {
            self.keeper.send(ThinKind::Map(ask));
        }
        false
    }

    fn is_refused(&self, range: SectorRange) -> bool {
        let last = (range.start + range.count).div_ceil(EXTENT_SECTORS);
        !self.thin || self.refused.range(range.start / EXTENT_SECTORS..last).next().is_some()
    }

    /// A transfer through a buffer. A write in part of a block goes by hold, read and write.
    fn begin_transfer(
        &mut self,
        id: u32,
        task: &mut Task,
        (start, at, range_end): (u64, u64, u64),
        io: &mut dyn Io,
    ) -> Begun {
        let (place, end) = self.places.piece(at, range_end.min(at + self.bounce_sectors()));
        if self.is_held(at, end) {
            return Begun::Park;
        }
        let Some(_) = place else {
            task.memory(start, at, end).iter().for_each(Segment::zero);
            return Begun::Skip(end);
        };
        if !self.take_buffer(task) {
            return Begun::Park;
        }
        let (cover_first, cover_end) = self.cover(at, end);
        if task.kind == RequestKind::Read {
            count(&self.counters.bounced, 1);
            task.step = Step::Bounce { end };
            self.submit_cover(id, task, OperationKind::Read, (at, end), io);
        } else if (cover_first, cover_end) == (at, end) {
            count(&self.counters.bounced, 1);
            self.fill(task, start, (at, end));
            task.step = Step::Bounce { end };
            self.submit_cover(id, task, OperationKind::Write, (at, end), io);
        } else {
            task.step = Step::HoldMerge { end };
            self.hold(cover_first, cover_end, Owner::Task(id));
        }
        Begun::Wait
    }

    /// Discards and zeroes: whole thin extents are given back, the rest is zeroed in place.
    fn begin_clear(
        &mut self,
        id: u32,
        task: &mut Task,
        (_, at, range_end): (u64, u64, u64),
        io: &mut dyn Io,
    ) -> Begun {
        if self.is_held(at, range_end) {
            return Begun::Park;
        }
        let whole_end = self.whole_extents(at, range_end);
        if task.unmaps() && self.thin && whole_end > at {
            let mut extents = at / EXTENT_SECTORS..whole_end.div_ceil(EXTENT_SECTORS);
            if !extents.any(|extent| self.places.is_mapped(extent)) {
                return Begun::Skip(whole_end);
            }
            task.step = Step::HoldUnmap { end: whole_end };
            self.hold(at, whole_end, Owner::Task(id));
            return Begun::Wait;
        }
        let mut limit = range_end;
        if task.unmaps() && self.thin {
            limit = limit.min((at / EXTENT_SECTORS + 1) * EXTENT_SECTORS);
        }
        let (place, end) = self.places.piece(at, limit);
        let Some(offset) = place else { return Begun::Skip(end) };
        let block = u64::from(self.geometry.block_bytes) / SECTOR_BYTES;
        let inner = (at.next_multiple_of(block), end - end % block);
        if at != inner.0 || inner.0 >= inner.1 {
            // Up to the next whole block, in part: merged with zeros.
            let end = end.min((at / block + 1) * block);
            if !self.take_buffer(task) {
                return Begun::Park;
            }
            let (cover_first, cover_end) = self.cover(at, end);
            task.step = Step::HoldMerge { end };
            self.hold(cover_first, cover_end, Owner::Task(id));
            return Begun::Wait;
        }
        self.clear(id, task, (at, inner.1, offset), io);
        Begun::Wait
    }

    /// Zeroes whole blocks by the best means that the drive has not refused.
    fn clear(
        &mut self,
        id: u32,
        task: &mut Task,
        (at, end, offset): (u64, u64, u64),
        io: &mut dyn Io,
    ) {
        let kind = if task.unmaps() && !self.discard_refused {
            OperationKind::Discard
        } else if !self.zero_refused {
            OperationKind::Zero
        } else {
            OperationKind::Write
        };
        let mut segments = Vec::new();
        let mut end = end;
        if kind == OperationKind::Write {
            count(&self.counters.zeros_written, 1);
            end = end.min(at + ZERO_SEGMENTS_MAX * self.bounce_sectors());
            let zeros = self.zeros.get_or_insert_with(|| PinnedBuffer::new(BOUNCE_BYTES)).segment();
            let mut left = ((end - at) * SECTOR_BYTES) as usize;
            while left > 0 {
                segments.push(zeros.part(0, left));
                left -= left.min(BOUNCE_BYTES);
            }
        }
        task.step = Step::Clear { end, kind };
        self.under_way(id, at, end);
        let length = (end - at) * SECTOR_BYTES;
        io.submit(DISK, Operation { kind, offset, length, segments: &segments }, id.into());
    }

    /// The end of the run of whole extents that begins at `at`; `at` itself if none does. The
    /// volume's last extent is whole if the range reaches the volume's end.
    fn whole_extents(&self, at: u64, range_end: u64) -> u64 {
        if !at.is_multiple_of(EXTENT_SECTORS) {
            return at;
        }
        if range_end == self.sectors {
            return range_end;
        }
        range_end - range_end % EXTENT_SECTORS
    }

    fn bounce_sectors(&self) -> u64 {
        // A block is kept free for the parts of blocks at both ends.
        (BOUNCE_BYTES as u64 - 2 * u64::from(self.geometry.block_bytes)) / SECTOR_BYTES
    }

    /// `at..end` widened to whole blocks.
    fn cover(&self, at: u64, end: u64) -> (u64, u64) {
        let block = u64::from(self.geometry.block_bytes) / SECTOR_BYTES;
        (at - at % block, end.next_multiple_of(block))
    }

    fn take_buffer(&mut self, task: &mut Task) -> bool {
        if task.buffer.is_none() {
            if self.bounces == BOUNCES_MAX {
                return false;
            }
            self.bounces += 1;
            task.buffer = Some(PinnedBuffer::new(BOUNCE_BYTES));
        }
        true
    }

    fn drop_buffer(&mut self, task: &mut Task) {
        if task.buffer.take().is_some() {
            self.bounces -= 1;
            self.retry = true;
        }
    }

    /// The part of the task's buffer that holds `at..end`.
    fn window(&self, task: &Task, at: u64, end: u64) -> Segment {
        let (first, _) = self.cover(at, end);
        let buffer = task.buffer.as_ref().expect("taken before").segment();
        let skip = ((at - first) * SECTOR_BYTES) as usize;
        buffer.part(skip, ((end - at) * SECTOR_BYTES) as usize)
    }

    /// Puts the guest's bytes, or zeros, for `at..end` into the buffer.
    fn fill(&self, task: &Task, start: u64, (at, end): (u64, u64)) {
        let window = self.window(task, at, end);
        if task.kind != RequestKind::Write {
            return window.zero();
        }
        let mut bytes = vec![0; window.length()];
        gather(&task.memory(start, at, end), &mut bytes);
        window.copy_from(&bytes);
    }

    /// Reads or writes the blocks around `at..end` into or from the buffer.
    fn submit_cover(
        &mut self,
        id: u32,
        task: &Task,
        kind: OperationKind,
        (at, end): (u64, u64),
        io: &mut dyn Io,
    ) {
        let (first, cover_end) = self.cover(at, end);
        let offset = self.places.place(first).expect("a piece that is transferred has a place");
        let length = (cover_end - first) * SECTOR_BYTES;
        let buffer = task.buffer.as_ref().expect("taken before").segment();
        self.under_way(id, first, cover_end);
        let segments = [buffer.part(0, length as usize)];
        io.submit(DISK, Operation { kind, offset, length, segments: &segments }, id.into());
    }

    fn under_way(&mut self, id: u32, first: u64, end: u64) {
        let slot = &mut self.slots[id as usize];
        slot.first = first;
        slot.end = end;
        slot.pending = 1;
    }

    /// The hold that a task asked for is its own now.
    pub(super) fn granted(&mut self, id: u32, io: &mut dyn Io) {
        let mut task = self.slots[id as usize].task.take().expect("only tasks ask for holds");
        match task.step {
            Step::HoldMerge { end } if self.places.place(task.at).is_some() => {
                count(&self.counters.merged, 1);
                let at = task.at;
                task.step = Step::Merge { end };
                self.submit_cover(id, &task, OperationKind::Read, (at, end), io);
                self.slots[id as usize].task = Some(task);
            }
            // The place was given back, or the end moved, while the task waited.
            Step::HoldMerge { .. } => self.step_over(id, task, None, io),
            Step::HoldUnmap { end } if end <= self.sectors => {
                let start = task.at / EXTENT_SECTORS;
                let extents = ExtentRange { start, count: end.div_ceil(EXTENT_SECTORS) - start };
                task.step = Step::Unmap { end };
                self.slots[id as usize].task = Some(task);
                self.keeper.send(ThinKind::Unmap(vec![extents]));
            }
            Step::HoldUnmap { .. } => self.step_over(id, task, None, io),
            _ => unreachable!("only these steps wait for a hold"),
        }
    }

    /// Lets go of the hold; goes on after `end`, or tries the same piece again if none.
    fn step_over(&mut self, id: u32, mut task: Box<Task>, end: Option<u64>, io: &mut dyn Io) {
        self.slots[id as usize].held = false;
        self.release(id);
        task.step = Step::Next;
        task.at = end.unwrap_or(task.at);
        self.slots[id as usize].task = Some(task);
        self.resume(id, io);
    }

    /// The pool has answered for these extents.
    pub(super) fn unmapped(&mut self, ranges: &[ExtentRange], done: bool, io: &mut dyn Io) {
        let waits = |task: &Task| {
            let start = task.at / EXTENT_SECTORS;
            matches!(task.step, Step::Unmap { .. }) && ranges.iter().any(|r| r.start == start)
        };
        let slot = |slot: &super::volume::Slot| slot.task.as_deref().is_some_and(waits);
        let Some(id) = self.slots.iter().position(slot) else { return };
        let task = self.slots[id].task.take().expect("just seen");
        let Step::Unmap { end } = task.step else { unreachable!("just seen") };
        let id = id as u32;
        if done {
            let extents: u64 = ranges.iter().map(|range| range.count).sum();
            count(&self.counters.extents_unmapped, extents);
            return self.step_over(id, task, Some(end), io);
        }
        self.slots[id as usize].held = false;
        self.release(id);
        self.task_failed(id, task, io);
    }

    /// The operation of a task's piece has ended.
    pub(super) fn task_completed(&mut self, id: u32, result: Result<(), Errno>, io: &mut dyn Io) {
        let mut task = self.slots[id as usize].task.take().expect("checked by the caller");
        if let (Step::Clear { kind, .. }, Err(errno)) = (task.step, result)
            && errno.is_unsupported()
            && kind != OperationKind::Write
        {
            self.discard_refused |= kind == OperationKind::Discard;
            self.zero_refused |= kind == OperationKind::Zero;
            self.piece_ended(id);
            return self.step_over(id, task, None, io);
        }
        if let Err(errno) = result {
            self.drive_failed(id, errno, io);
            self.piece_ended(id);
            self.slots[id as usize].held = false;
            self.release(id);
            return self.task_failed(id, task, io);
        }
        let start = task.ranges.get(task.range).map_or(0, |range| range.start);
        match task.step {
            Step::Merge { end } => {
                let at = task.at;
                self.fill(&task, start, (at, end));
                task.step = Step::Bounce { end };
                self.submit_cover(id, &task, OperationKind::Write, (at, end), io);
                self.slots[id as usize].task = Some(task);
            }
            Step::Bounce { end } => {
                if task.kind == RequestKind::Read {
                    let window = self.window(&task, task.at, end);
                    let mut bytes = vec![0; window.length()];
                    window.copy_to(&mut bytes);
                    scatter(&bytes, &task.memory(start, task.at, end));
                }
                self.piece_ended(id);
                self.step_over(id, task, Some(end), io);
            }
            Step::Clear { end, .. } => {
                self.piece_ended(id);
                self.step_over(id, task, Some(end), io);
            }
            Step::Flush => self.end(id, Outcome::Done, io),
            _ => unreachable!("no operation is under way in the other steps"),
        }
    }
}
