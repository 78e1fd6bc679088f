//! Writes past the log, in the modes that do not journal: straight to the backing.
//!
//! Nothing of the log is dirty then, and the cached copies of what is written are forgotten before
//! the write begins (X1). The root said durably, before the first of these writes, that the log's
//! drained content is not to be trusted after a restart (X2).
//!
//! A guest may write less than a block of the backing (it was told the block, but partitions begin
//! where they began when the disk was made): such a block is read, changed and written. Two
//! requests never do that with one block at a time, so that neither undoes the other, and they do
//! it in the order in which they came (X3).

use super::core::{BACKING, Core, Token};
use super::cursor::Cursor;
use crate::base::clock::Nanos;
use crate::base::units::SECTOR_BYTES;
use crate::io::buffer::PinnedBuffer;
use crate::io::disk::{Errno, Operation, OperationKind};
use crate::io::volume::{Io, Outcome, RequestKind, SectorRange};

/// Bytes of one operation from memory of our own at most.
const PART_BYTES: u64 = 1 << 20;

/// Where the bytes of a write come from.
#[derive(Default)]
enum Source {
    /// Nothing is transferred.
    #[default]
    Nothing,
    /// The guest's memory, from this byte of the request on.
    Guest(usize),
    Own(PinnedBuffer),
    /// Memory that all writes of zeros share.
    Zeros,
}

/// A part of a block: it is read as a whole, and written when this has been put into it.
#[derive(Clone, Copy)]
struct Edge {
    /// Bytes of the block.
    from: usize,
    bytes: usize,
    /// Byte of the request; none: zeros.
    skip: Option<usize>,
}

/// One operation on the backing.
struct AroundOp {
    slot: u32,
    kind: OperationKind,
    offset: u64,
    length: u64,
    source: Source,
    /// It is read first.
    edge: Option<Edge>,
    begun: Nanos,
}

/// Requests past the log.
#[derive(Default)]
pub(super) struct Arounds {
    ops: Vec<Option<AroundOp>>,
    spare: Vec<u32>,
    /// Requests that have not ended.
    requests: u32,
    /// Those of them that change the disk, in the order of their coming, if they may share blocks.
    line: Vec<u32>,
    zeros: Option<PinnedBuffer>,
}

impl Arounds {
    pub(super) fn is_idle(&self) -> bool {
        self.requests == 0
    }

    /// Whose request an operation is of.
    pub(super) fn slot(&self, number: u32) -> u32 {
        self.ops[number as usize].as_ref().expect("it is under way").slot
    }

    /// An operation is not tried again.
    pub(super) fn release(&mut self, number: u32) {
        self.ops[number as usize] = None;
        self.spare.push(number);
    }
}

impl Core {
    /// Begins a request that changes the disk or flushes it, past the log.
    pub(super) fn around(&mut self, id: u32, io: &mut dyn Io) {
        self.arounds.requests += 1;
        if self.slots[id as usize].kind == Some(RequestKind::Flush) {
            return self.begin_around(id, (OperationKind::Flush, 0, 0), Source::Nothing, io);
        }
        assert!(!self.golden, "nobody writes a golden image");
        let ranges = std::mem::take(&mut self.slots[id as usize].ranges);
        for range in &ranges {
            self.changing(id, *range);
            self.index.remove(range.start, range.count);
        }
        self.slots[id as usize].ranges = ranges;
        if self.block_sectors() > 1 {
            self.arounds.line.push(id);
            if self.must_wait(self.arounds.line.len() - 1) {
                return;
            }
        }
        self.go_around(id, io);
    }

    /// Sectors of a block of the backing.
    fn block_sectors(&self) -> u64 {
        u64::from(self.backing.block_bytes) / SECTOR_BYTES
    }

    /// Whether the request at `at` of the line shares a block with one before it, and one of the
    /// two writes only a part of it.
    fn must_wait(&self, at: usize) -> bool {
        let block = self.block_sectors();
        let ranges = |at: usize| &self.slots[self.arounds.line[at] as usize].ranges;
        let partial = |range: &SectorRange| {
            !range.start.is_multiple_of(block) || !range.count.is_multiple_of(block)
        };
        let blocks = |range: &SectorRange| {
            (range.start / block, (range.start + range.count).div_ceil(block))
        };
        let collide = |one: &SectorRange, other: &SectorRange| {
            let ((from, to), (start, end)) = (blocks(one), blocks(other));
            from < end && start < to && (partial(one) || partial(other))
        };
        let mut before = (0..at).flat_map(ranges);
        before.any(|one| ranges(at).iter().any(|other| collide(one, other)))
    }

    /// Goes on with a request: one range after the other.
    fn go_around(&mut self, id: u32, io: &mut dyn Io) {
        let slot = &mut self.slots[id as usize];
        let next = slot.ranges.get(slot.done as usize).copied().filter(|_| !slot.failed);
        slot.done += 1;
        let kind = slot.kind.expect("the request is under way");
        let write = kind == RequestKind::Write;
        if let Some(range) = next {
            return self.range_around(id, range, write, io);
        }
        // Zeros are not durable by themselves.
        if !write
            && self.journal.strict
            && !slot.failed
            && slot.done == slot.ranges.len() as u64 + 1
        {
            return self.begin_around(id, (OperationKind::Flush, 0, 0), Source::Nothing, io);
        }
        self.end_around(id, io);
    }

    fn end_around(&mut self, id: u32, io: &mut dyn Io) {
        let slot = &self.slots[id as usize];
        let outcome = if slot.failed { Outcome::Failed } else { Outcome::Done };
        self.leave_line(id);
        self.end_or_refuse(id, outcome, io);
        self.go_on_around(io);
    }

    fn leave_line(&mut self, id: u32) {
        self.changed(id);
        self.arounds.requests -= 1;
        self.arounds.line.retain(|other| *other != id);
    }

    /// Forgets a request that has nothing under way. `waited`: since that was forgotten before.
    pub(super) fn forget_request_around(&mut self, id: u32, waited: bool, io: &mut dyn Io) -> bool {
        let slot = &self.slots[id as usize];
        let lines_up = self.arounds.line.contains(&id) && slot.done == 0;
        let begun = waited && slot.kind.is_some_and(|kind| kind != RequestKind::Read);
        if lines_up || begun {
            self.leave_line(id);
            self.go_on_around(io);
        }
        lines_up || begun
    }

    /// Begins what a request kept waiting that has left the line.
    fn go_on_around(&mut self, io: &mut dyn Io) {
        for at in 0..self.arounds.line.len() {
            let Some(next) = self.arounds.line.get(at).copied() else { return };
            if self.slots[next as usize].done == 0 && !self.must_wait(at) {
                self.go_around(next, io);
            }
        }
    }

    /// How writes go there: durable at once if the guest wants that.
    fn around_kind(&self) -> OperationKind {
        if self.journal.strict { OperationKind::WriteDurable } else { OperationKind::Write }
    }

    /// The whole blocks of a range, and the parts of blocks at its ends.
    fn range_around(&mut self, id: u32, range: SectorRange, write: bool, io: &mut dyn Io) {
        let block = self.block_sectors();
        let (start, end) = (range.start, range.start + range.count);
        let (whole, whole_end) = (start.next_multiple_of(block), end / block * block);
        // A request cannot end before all of its operations have begun.
        self.slots[id as usize].under_way += 1;
        if whole > whole_end {
            self.edge_around(id, (start, end), write, io);
        } else {
            if start < whole {
                self.edge_around(id, (start, whole), write, io);
            }
            if whole < whole_end {
                match write {
                    true => self.write_around(id, (whole, whole_end), io),
                    false => self.zero_around(id, (whole, whole_end), io),
                }
            }
            if whole_end < end {
                self.edge_around(id, (whole_end, end), write, io);
            }
        }
        self.part_ended(id, io);
    }

    /// Byte of the request where a sector of the disk is.
    fn byte_of(&self, id: u32, sector: u64) -> usize {
        ((sector - self.slots[id as usize].range().start) * SECTOR_BYTES) as usize
    }

    /// A part of one block.
    fn edge_around(&mut self, id: u32, (start, end): (u64, u64), write: bool, io: &mut dyn Io) {
        let block = u64::from(self.backing.block_bytes);
        let offset = start * SECTOR_BYTES / block * block;
        let edge = Edge {
            from: (start * SECTOR_BYTES - offset) as usize,
            bytes: ((end - start) * SECTOR_BYTES) as usize,
            skip: write.then(|| self.byte_of(id, start)),
        };
        let source = Source::Own(PinnedBuffer::new(block as usize));
        let kind = OperationKind::Read;
        self.slots[id as usize].under_way += 1;
        let (length, edge, begun) = (block, Some(edge), io.now());
        self.add_around(AroundOp { slot: id, kind, offset, length, source, edge, begun }, io);
    }

    /// Whole blocks of a write: from the guest's memory if the backing can read that.
    fn write_around(&mut self, id: u32, (start, end): (u64, u64), io: &mut dyn Io) {
        let (offset, length) = (start * SECTOR_BYTES, (end - start) * SECTOR_BYTES);
        let (kind, skip) = (self.around_kind(), self.byte_of(id, start));
        if self.is_direct(id, (start, end - start), offset, self.backing) {
            return self.begin_around(id, (kind, offset, length), Source::Guest(skip), io);
        }
        let mut done = 0;
        while done < length {
            let part = (length - done).min(PART_BYTES);
            let buffer = PinnedBuffer::new((part as usize).next_power_of_two());
            self.copy_from_guest(id, (skip + done as usize, part as usize), (&buffer, 0));
            self.begin_around(id, (kind, offset + done, part), Source::Own(buffer), io);
            done += part;
        }
    }

    /// Copies `bytes` from byte `skip` of a request to byte `at` of a buffer.
    fn copy_from_guest(
        &self,
        id: u32,
        (skip, bytes): (usize, usize),
        (buffer, at): (&PinnedBuffer, usize),
    ) {
        let mut source = Cursor::new(&self.slots[id as usize].segments, skip);
        let mut piece = [0; 4096];
        for done in (0..bytes).step_by(piece.len()) {
            let piece = &mut piece[..(bytes - done).min(4096)];
            source.copy_to(piece);
            buffer.segment().part(at + done, piece.len()).copy_from(piece);
        }
    }

    /// Whole blocks of zeros: written where the backing cannot zero, since what it only hints at
    /// cannot be relied on.
    fn zero_around(&mut self, id: u32, (start, end): (u64, u64), io: &mut dyn Io) {
        let (offset, length) = (start * SECTOR_BYTES, (end - start) * SECTOR_BYTES);
        if self.backing.zero {
            let zero = (OperationKind::Zero, offset, length);
            return self.begin_around(id, zero, Source::Nothing, io);
        }
        let kind = self.around_kind();
        let mut done = 0;
        while done < length {
            let part = (length - done).min(PART_BYTES);
            self.begin_around(id, (kind, offset + done, part), Source::Zeros, io);
            done += part;
        }
    }

    fn begin_around(
        &mut self,
        id: u32,
        (kind, offset, length): (OperationKind, u64, u64),
        source: Source,
        io: &mut dyn Io,
    ) {
        self.slots[id as usize].under_way += 1;
        let begun = io.now();
        let op = AroundOp { slot: id, kind, offset, length, source, edge: None, begun };
        self.add_around(op, io);
    }

    fn add_around(&mut self, op: AroundOp, io: &mut dyn Io) {
        let Arounds { ops, spare, .. } = &mut self.arounds;
        let number = spare.pop().unwrap_or_else(|| {
            ops.push(None);
            (ops.len() - 1) as u32
        });
        ops[number as usize] = Some(op);
        self.submit_around(number, io);
    }

    /// Submits an operation, perhaps again.
    pub(super) fn submit_around(&mut self, number: u32, io: &mut dyn Io) {
        let mut segments = std::mem::take(&mut self.reads.scratch);
        segments.clear();
        let arounds = &mut self.arounds;
        let op = arounds.ops[number as usize].as_ref().expect("it is under way");
        let &AroundOp { slot, kind, offset, length, .. } = op;
        match &op.source {
            Source::Nothing => {}
            Source::Guest(skip) => {
                let guest = &self.slots[slot as usize].segments;
                Cursor::new(guest, *skip).take(length as usize, &mut segments);
            }
            Source::Own(buffer) => segments.push(buffer.segment().part(0, length as usize)),
            Source::Zeros => {
                let new = || PinnedBuffer::new(PART_BYTES as usize);
                let zeros = arounds.zeros.get_or_insert_with(new);
                segments.push(zeros.segment().part(0, length as usize));
            }
        }
        let operation = Operation { kind, offset, length, segments: &segments };
        io.submit(BACKING, operation, Token::Around.pack(number));
        self.reads.scratch = segments;
    }

    /// An operation has ended.
    pub(super) fn around_completed(
        &mut self,
        number: u32,
        result: Result<(), Errno>,
        io: &mut dyn Io,
    ) {
        let op = self.arounds.ops[number as usize].as_ref().expect("it is under way");
        let (slot, kind, begun) = (op.slot, op.kind, op.begun);
        let sectors = (op.offset / SECTOR_BYTES, (op.offset + op.length) / SECTOR_BYTES);
        let Err(errno) = result else {
            self.backing_answers();
            return self.around_done(number, io);
        };
        if kind == OperationKind::Zero && errno.is_unsupported() {
            self.backing.zero = false;
            self.zero_around(slot, sectors, io);
            return self.forget_around(number, io);
        }
        let again = kind != OperationKind::Flush;
        if !again || !self.bears((Token::Around, number), (errno, begun), io) {
            self.around_failed(number, io);
        }
    }

    /// An operation has succeeded: a block that is written in part is written now.
    fn around_done(&mut self, number: u32, io: &mut dyn Io) {
        let kind = self.around_kind();
        let place = self.arounds.ops.get_mut(number as usize).and_then(Option::take);
        let mut op = place.expect("it is under way");
        let edge = op.edge.take();
        if let (Some(Edge { from, bytes, skip }), Source::Own(buffer)) = (edge, &op.source) {
            match skip {
                Some(skip) => self.copy_from_guest(op.slot, (skip, bytes), (buffer, from)),
                None => buffer.segment().part(from, bytes).zero(),
            }
            op.kind = kind;
            self.arounds.ops[number as usize] = Some(op);
            return self.submit_around(number, io);
        }
        self.arounds.ops[number as usize] = Some(op);
        self.forget_around(number, io);
    }

    /// An operation has failed for good.
    pub(super) fn around_failed(&mut self, number: u32, io: &mut dyn Io) {
        let op = self.arounds.ops[number as usize].as_ref().expect("it is under way");
        self.slots[op.slot as usize].failed = true;
        self.forget_around(number, io);
    }

    fn forget_around(&mut self, number: u32, io: &mut dyn Io) {
        let op = self.arounds.ops[number as usize].take().expect("it is under way");
        self.arounds.spare.push(number);
        self.part_ended(op.slot, io);
    }

    fn part_ended(&mut self, id: u32, io: &mut dyn Io) {
        let slot = &mut self.slots[id as usize];
        slot.under_way -= 1;
        if slot.under_way > 0 {
            return;
        }
        match slot.kind {
            Some(RequestKind::Flush) => self.end_around(id, io),
            _ => self.go_around(id, io),
        }
    }
}
