//! Reads: pieces from the flash straight into guest memory, zeros, and the rest from the backing.
//!
//! Invariants:
//! - R1 nothing is answered before every piece from the log matched its checksum where it lies now:
//!   in guest memory, or in a copy of our own that was put there.
//! - R2 a mismatch is read again privately before it counts: a guest may write to its own buffer
//!   while we read into it.
//! - R3 the segment under a read is pinned: the log does not write there before the read has ended.
//!   A slot of a slab may be written anew: then the block is looked up again.

use super::clean::Fetch;
use super::core::{BACKING, Core, Token};
use super::cursor::Cursor;
use super::index::{BLOCK_SECTORS, Found, Piece};
use super::record::piece_checksum;
use super::root::Mode;
use super::status::count;
use crate::base::clock::Nanos;
use crate::base::planted::{Bug, planted};
use crate::base::units::SECTOR_BYTES;
use crate::io::buffer::{PinnedBuffer, Segment};
use crate::io::disk::{DiskGeometry, Errno, Operation, OperationKind};
use crate::io::volume::{Io, Outcome, SectorRange};
use std::sync::atomic::Ordering;

/// Bytes that one bounced read of the backing moves at most.
const BOUNCE_BYTES: u64 = 256 << 10;

/// Sectors that one operation reads at most: the ring's limit is far above.
const READ_SECTORS_MAX: u64 = (64 << 20) / SECTOR_BYTES;

/// Times that a piece is read before it counts as damaged.
const ATTEMPTS_MAX: u8 = 3;

/// A piece within a read: checked as it was stored.
struct Check {
    piece: Piece,
    /// Byte of the read where its first stored sector is.
    at: usize,
}

/// One operation, or one that its device has in several places.
#[derive(Default)]
struct ReadOp {
    slot: u32,
    /// Sectors of the disk that are wanted.
    start: u64,
    count: u64,
    /// Empty for a read of the backing.
    checks: Vec<Check>,
    /// Pinned; none for the backing.
    segment: Option<u32>,
    /// What is read, in bytes of the allocation or the backing.
    offset: u64,
    length: u64,
    /// Byte of the read where the wanted sectors begin.
    skip: usize,
    /// Of a read of the backing that brings whole blocks, for others too.
    fetch: Option<Fetch>,
    bounce: Option<PinnedBuffer>,
    attempts: u8,
    /// The first attempt, and this one.
    begun: Nanos,
    submitted: Nanos,
    under_way: u32,
    failed: bool,
}

/// Reads under way.
#[derive(Default)]
pub(super) struct Reads {
    ops: Vec<ReadOp>,
    spare: Vec<u32>,
    found: Vec<Found>,
    segments: Vec<Segment>,
    /// One piece at a time, while it is checked.
    piece: Vec<u8>,
    /// For operations that are split.
    pub scratch: Vec<Segment>,
}

impl Reads {
    pub(super) fn attach(&mut self, requests_max: u32) {
        self.ops.reserve(requests_max as usize);
        self.spare.reserve(requests_max as usize);
    }

    /// A fetch under way.
    pub(super) fn fetch(&mut self, number: u32) -> &mut Fetch {
        self.ops[number as usize].fetch.as_mut().expect("the read fetches")
    }

    /// What the read brings of a block is not to be kept.
    pub(super) fn stale(&mut self, number: u32, block: u64) {
        self.fetch(number).stale(block);
    }

    /// Whose request an operation is of.
    pub(super) fn slot(&self, number: u32) -> u32 {
        self.ops[number as usize].slot
    }

    /// Parts of a request that wait for what an operation fetches for another one.
    pub(super) fn joins(&self, number: u32, id: u32) -> usize {
        self.ops[number as usize].fetch.as_ref().map_or(0, |fetch| fetch.joins(id))
    }

    /// A request does not wait any more for what an operation fetches for another one.
    pub(super) fn leave(&mut self, number: u32, id: u32) {
        if let Some(fetch) = &mut self.ops[number as usize].fetch {
            fetch.leave(id);
        }
    }

    /// The operation is that of a request which joined it, if there is one.
    pub(super) fn hand_over(&mut self, number: u32) -> bool {
        let op = &mut self.ops[number as usize];
        let Some(heir) = op.fetch.as_mut().and_then(Fetch::pop) else { return false };
        (op.slot, op.start, op.count) = (heir.slot, heir.start, heir.count);
        op.begun = heir.begun;
        op.skip = (heir.start * SECTOR_BYTES - op.offset) as usize;
        true
    }

    /// An operation on the backing is not tried again.
    pub(super) fn release(&mut self, number: u32) -> Option<Fetch> {
        self.ops[number as usize].bounce = None;
        self.spare.push(number);
        self.ops[number as usize].fetch.take()
    }

    fn take(&mut self) -> u32 {
        self.spare.pop().unwrap_or_else(|| {
            self.ops.push(ReadOp::default());
            (self.ops.len() - 1) as u32
        })
    }
}

impl Core {
    /// Begins a read.
    pub(super) fn read(&mut self, id: u32, io: &mut dyn Io) {
        let SectorRange { start, count: sectors } = self.slots[id as usize].range();
        // The request cannot end before all of its parts have begun.
        self.slots[id as usize].under_way = 1;
        self.read_range(id, start, sectors, io);
        self.read_ended(id, io);
    }

    /// Begins to read a part of a request, from where it is now.
    fn read_range(&mut self, id: u32, start: u64, sectors: u64, io: &mut dyn Io) {
        let mut found = std::mem::take(&mut self.reads.found);
        found.clear();
        let stale = planted(Bug::StaleRead)
            && self.status.counters.hits.load(Ordering::Relaxed).is_multiple_of(64);
        if self.mode == Mode::Bypass || stale {
            found.push(Found::Absent { start, count: sectors });
        } else {
            self.index.lookup(start, sectors, &mut found);
        }
        let mut at = 0;
        while let Some(first) = found.get(at) {
            at += match *first {
                Found::Zero { start, count: sectors } => {
                    self.zero_guest(id, start, sectors);
                    1
                }
                Found::Absent { start, count: sectors } => {
                    self.read_absent(id, (start, sectors), io);
                    1
                }
                Found::Piece(..) => self.read_pieces(id, &found[at..], io),
            };
        }
        self.reads.found = found;
    }

    fn zero_guest(&mut self, id: u32, start: u64, sectors: u64) {
        let slot = &self.slots[id as usize];
        let skip = (start - slot.range().start) * SECTOR_BYTES;
        Cursor::new(&slot.segments, skip as usize).zero((sectors * SECTOR_BYTES) as usize);
    }

    /// Reads a range of the backing, straight or in bounced parts.
    pub(super) fn read_backing(&mut self, id: u32, start: u64, sectors: u64, io: &mut dyn Io) {
        self.read_backing_since(io.now(), (id, start, sectors), io);
    }

    /// As [`Self::read_backing`], for a request that has waited for the backing since `begun`.
    pub(super) fn read_backing_since(
        &mut self,
        begun: Nanos,
        (id, start, sectors): (u32, u64, u64),
        io: &mut dyn Io,
    ) {
        let (mut at, end) = (start, start + sectors);
        while at < end {
            let direct = self.is_direct(id, (at, end - at), at * SECTOR_BYTES, self.backing);
            let most = if direct { READ_SECTORS_MAX } else { BOUNCE_BYTES / SECTOR_BYTES };
            let sectors = (end - at).min(most);
            let number = self.reads.take();
            let op = &mut self.reads.ops[number as usize];
            (op.slot, op.start, op.count) = (id, at, sectors);
            op.checks.clear();
            op.segment = None;
            op.fetch = None;
            (op.attempts, op.begun) = (0, begun);
            (op.offset, op.length, op.skip) = (at * SECTOR_BYTES, sectors * SECTOR_BYTES, 0);
            op.bounce = None;
            if !direct {
                bounce(op, self.backing);
            }
            self.slots[id as usize].under_way += 1;
            self.submit_read(number, io);
            at += sectors;
        }
    }

    /// Reads whole blocks of the backing, of which the request wants a range; the read's number.
    pub(super) fn read_fetch(
        &mut self,
        id: u32,
        (start, sectors): (u64, u64),
        fetch: Fetch,
        io: &mut dyn Io,
    ) -> u32 {
        let number = self.reads.take();
        let op = &mut self.reads.ops[number as usize];
        (op.slot, op.start, op.count) = (id, start, sectors);
        op.checks.clear();
        op.segment = None;
        (op.attempts, op.begun) = (0, io.now());
        (op.offset, op.length) = fetch.range();
        op.skip = (start * SECTOR_BYTES - op.offset) as usize;
        op.fetch = Some(fetch);
        op.bounce = None;
        bounce(op, self.backing);
        self.slots[id as usize].under_way += 1;
        self.submit_read(number, io);
        number
    }

    /// Reads pieces that lie one behind the other in one segment; how many of `found` that is.
    fn read_pieces(&mut self, id: u32, found: &[Found], io: &mut dyn Io) -> usize {
        let Some(Found::Piece(first, _)) = found.first().copied() else { return 0 };
        let whole = |piece: &Piece| piece.count == piece.stored;
        let segment = self.segments.of_position(first.position);
        let number = self.reads.take();
        let op = &mut self.reads.ops[number as usize];
        op.checks.clear();
        let (mut taken, mut sectors) = (0, 0);
        for other in found {
            let Found::Piece(piece, _) = *other else { break };
            let next = first.position + sectors;
            let follows = taken == 0
                || (whole(&first)
                    && whole(&piece)
                    && piece.position == next
                    && sectors < READ_SECTORS_MAX
                    && self.segments.of_position(piece.position) == segment);
            if !follows {
                break;
            }
            op.checks.push(Check { piece, at: (sectors * SECTOR_BYTES) as usize });
            sectors += u64::from(piece.stored);
            taken += 1;
        }
        let last = op.checks.last().expect("the first is a piece").piece;
        (op.slot, op.start, op.count) = (id, first.start, last.end() - first.start);
        op.segment = segment;
        op.attempts = 0;
        op.fetch = None;
        (op.offset, op.length) = (first.position * SECTOR_BYTES, sectors * SECTOR_BYTES);
        op.skip = usize::from(first.skip) * SECTOR_BYTES as usize;
        op.bounce = None;
        let range = (op.start, op.count);
        let direct = whole(&first) && self.is_direct(id, range, op_offset(first), self.flash);
        if !direct {
            bounce(&mut self.reads.ops[number as usize], self.flash);
        }
        if let Some(segment) = segment {
            self.segments.pin(segment);
        }
        count(&self.status.counters.hits, taken as u64);
        self.touch(&found[..taken]);
        self.slots[id as usize].under_way += 1;
        self.submit_read(number, io);
        taken
    }

    /// Whether the device can read the range straight into the guest's memory.
    pub(super) fn is_direct(
        &mut self,
        id: u32,
        (start, sectors): (u64, u64),
        offset: u64,
        geometry: DiskGeometry,
    ) -> bool {
        let slot = &self.slots[id as usize];
        let skip = ((start - slot.range().start) * SECTOR_BYTES) as usize;
        let mut parts = std::mem::take(&mut self.reads.segments);
        parts.clear();
        let length = sectors * SECTOR_BYTES;
        Cursor::new(&slot.segments, skip).take(length as usize, &mut parts);
        let block = u64::from(geometry.block_bytes);
        let aligned = offset.is_multiple_of(block)
            && length.is_multiple_of(block)
            && parts.iter().all(|part| {
                part.address().addr().is_multiple_of(geometry.memory_alignment as usize)
                    && part.length().is_multiple_of(block as usize)
            });
        self.reads.segments = parts;
        aligned
    }

    /// Submits an operation, perhaps again.
    pub(super) fn submit_read(&mut self, number: u32, io: &mut dyn Io) {
        let op = &mut self.reads.ops[number as usize];
        op.attempts = op.attempts.saturating_add(1);
        op.failed = false;
        op.submitted = io.now();
        let (slot, start, offset, length) = (op.slot, op.start, op.offset, op.length);
        let flash = op.segment.is_some();
        count(&self.status.counters.backing_read_bytes, if flash { 0 } else { op.length });
        let mut segments = std::mem::take(&mut self.reads.segments);
        segments.clear();
        match &op.bounce {
            Some(buffer) => segments.push(buffer.segment().part(0, length as usize)),
            None => {
                let slot = &self.slots[slot as usize];
                let skip = ((start - slot.range().start) * SECTOR_BYTES) as usize;
                Cursor::new(&slot.segments, skip).take(length as usize, &mut segments);
            }
        }
        let kind = OperationKind::Read;
        let read = Operation { kind, offset, length, segments: &segments };
        let token = Token::Read.pack(number);
        let parts = if flash {
            self.submit_flash(read, token, io)
        } else {
            io.submit(BACKING, read, token);
            1
        };
        self.reads.segments = segments;
        self.reads.ops[number as usize].under_way = parts;
    }

    /// A part of a read has been done. True if the flash had what was read.
    pub(super) fn read_completed(
        &mut self,
        number: u32,
        result: Result<(), Errno>,
        io: &mut dyn Io,
    ) -> bool {
        let op = &mut self.reads.ops[number as usize];
        op.under_way -= 1;
        op.failed |= result.is_err();
        if op.under_way > 0 {
            return false;
        }
        let (flash, begun, failed) = (op.segment.is_some(), op.begun, op.failed);
        if !failed {
            self.clean.measured(flash, op.length, io.now() - op.submitted);
        }
        match result {
            Err(errno) if !flash => {
                if !self.bears((Token::Read, number), (errno, begun), io) {
                    self.read_failed(number, io);
                }
                return false;
            }
            Ok(()) if !flash => self.backing_answers(),
            _ => {}
        }
        let good = !failed && self.deliver(number);
        match good || !flash {
            true => self.finish_read(number, good, io),
            false => self.read_is_bad(number, io),
        }
        good && flash
    }

    /// What was read from the flash does not match, or could not be read.
    fn read_is_bad(&mut self, number: u32, io: &mut dyn Io) {
        if self.has_moved(number) {
            // A slot may be written anew while it is read.
            return self.read_again(number, io);
        }
        count(&self.status.counters.mismatches, 1);
        if self.reads.ops[number as usize].attempts >= ATTEMPTS_MAX {
            return self.damaged(number, io);
        }
        let op = &mut self.reads.ops[number as usize];
        if op.bounce.is_none() {
            bounce(op, self.flash);
        }
        self.submit_read(number, io);
    }

    /// A read of the backing has failed for good.
    pub(super) fn read_failed(&mut self, number: u32, io: &mut dyn Io) {
        let id = self.reads.ops[number as usize].slot;
        self.slots[id as usize].failed = true;
        self.finish_read(number, false, io);
    }

    /// What the operation read is where it belongs, or it failed; also for those who joined it.
    fn finish_read(&mut self, number: u32, good: bool, io: &mut dyn Io) {
        let id = self.reads.ops[number as usize].slot;
        let fetch = self.reads.ops[number as usize].fetch.take();
        let bounce = self.end_read(number);
        if let Some(fetch) = fetch {
            let memory = bounce.as_ref().filter(|_| good).map(PinnedBuffer::segment);
            self.fetched(number, fetch, memory, io);
        }
        self.read_ended(id, io);
    }

    /// The read's number is free; the memory of our own that it used.
    fn end_read(&mut self, number: u32) -> Option<PinnedBuffer> {
        let op = &mut self.reads.ops[number as usize];
        if let Some(segment) = op.segment.take() {
            self.segments.unpin(segment);
        }
        self.reads.spare.push(number);
        op.bounce.take()
    }

    /// Whether the index does not name any more what was read.
    fn has_moved(&self, number: u32) -> bool {
        let op = &self.reads.ops[number as usize];
        op.checks.iter().any(|Check { piece, .. }| {
            let mut now = self.index.pieces_of(piece.start / BLOCK_SECTORS);
            !now.any(|now| (now.position, now.checksum) == (piece.position, piece.checksum))
        })
    }

    /// Reads what the operation was to read from where it is now.
    fn read_again(&mut self, number: u32, io: &mut dyn Io) {
        let op = &self.reads.ops[number as usize];
        let (id, start, sectors) = (op.slot, op.start, op.count);
        drop(self.end_read(number));
        self.read_range(id, start, sectors, io);
        self.read_ended(id, io);
    }

    /// Checks what was read and puts it into the guest's memory, if it is not there already.
    fn deliver(&mut self, number: u32) -> bool {
        let mut piece = std::mem::take(&mut self.reads.piece);
        piece.resize((BLOCK_SECTORS * SECTOR_BYTES) as usize, 0);
        let good = self.check(number, &mut piece);
        self.reads.piece = piece;
        good
    }

    fn check(&self, number: u32, piece: &mut [u8]) -> bool {
        let op = &self.reads.ops[number as usize];
        let slot = &self.slots[op.slot as usize];
        let skip = ((op.start - slot.range().start) * SECTOR_BYTES) as usize;
        let Some(bounce) = &op.bounce else {
            let mut guest = Cursor::new(&slot.segments, skip);
            return op.checks.iter().all(|check| {
                let bytes = &mut piece[..usize::from(check.piece.stored) * 512];
                guest.copy_to(bytes);
                piece_checksum(bytes) == check.piece.checksum
            });
        };
        let mut guest = Cursor::new(&slot.segments, skip);
        let memory = bounce.segment();
        if op.checks.is_empty() {
            let mut left = (op.count * SECTOR_BYTES) as usize;
            let mut at = op.skip;
            while left > 0 {
                let length = left.min(piece.len());
                memory.part(at, length).copy_to(piece);
                guest.copy_from(&piece[..length]);
                (at, left) = (at + length, left - length);
            }
            return true;
        }
        // Where the first stored sector is: the drive's block may begin before it.
        let first = &op.checks[0].piece;
        let base = (first.position * SECTOR_BYTES - op.offset) as usize;
        op.checks.iter().all(|check| {
            let Piece { stored, skip, count, checksum, .. } = check.piece;
            let bytes = &mut piece[..usize::from(stored) * 512];
            memory.part(base + check.at, bytes.len()).copy_to(bytes);
            let right = piece_checksum(bytes) == checksum;
            if right {
                let from = usize::from(skip) * 512;
                guest.copy_from(&bytes[from..from + usize::from(count) * 512]);
            }
            right
        })
    }

    /// The log lost what it should hold: of drained data the backing has it, else the disk is
    /// fenced.
    fn damaged(&mut self, number: u32, io: &mut dyn Io) {
        let op = &self.reads.ops[number as usize];
        let (id, start, sectors, offset) = (op.slot, op.start, op.count, op.offset);
        let segment = *self.segments.get(op.segment.expect("it was read from the log"));
        if segment.is_clean() || segment.last_won <= self.drained {
            log::warn!(
                "{}: a copy of drained data at byte {offset} of the cache is damaged; it was \
                 dropped and read from the backing",
                self.name
            );
            count(&self.status.counters.dropped, 1);
            for check in &op.checks {
                self.index.forget(check.piece);
            }
            return self.read_again(number, io);
        }
        let last_good = segment.first_won.saturating_sub(1).max(self.drained);
        let text = format!(
            "sectors {start} to {} are damaged in the cache at byte {offset} and not drained; the \
             last good point is {last_good} or later: drain to it, or detach the disk as lost",
            start + sectors - 1
        );
        self.slots[id as usize].failed = true;
        drop(self.end_read(number));
        self.fence(text, io);
        self.read_ended(id, io);
    }

    /// A part of the request has ended; all, perhaps.
    pub(super) fn read_ended(&mut self, id: u32, io: &mut dyn Io) {
        let slot = &mut self.slots[id as usize];
        slot.under_way -= 1;
        if slot.under_way > 0 {
            return;
        }
        let outcome = if slot.failed { Outcome::Failed } else { Outcome::Done };
        self.end_or_refuse(id, outcome, io);
    }
}

fn op_offset(first: Piece) -> u64 {
    first.position * SECTOR_BYTES
}

/// Makes the read one of whole blocks of the device, into memory of our own.
fn bounce(op: &mut ReadOp, geometry: DiskGeometry) {
    let block = u64::from(geometry.block_bytes);
    let start = op.offset / block * block;
    let end = (op.offset + op.length).next_multiple_of(block);
    op.skip += (op.offset - start) as usize;
    (op.offset, op.length) = (start, end - start);
    op.bounce = Some(PinnedBuffer::new((op.length as usize).next_power_of_two()));
}
