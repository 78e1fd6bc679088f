//! Writes past the log, in the modes that do not journal: straight to the backing.
//!
//! Nothing of the log is dirty then, and the cached copies of what is written are forgotten before
//! the write begins (X1). The root said durably, before the first of these writes, that the log's
//! drained content is not to be trusted after a restart (X2).

use super::core::{BACKING, Core, Token};
use super::cursor::Cursor;
use crate::base::units::SECTOR_BYTES;
use crate::io::buffer::{PinnedBuffer, Segment};
use crate::io::disk::{Errno, Operation, OperationKind};
use crate::io::volume::{Io, Outcome, RequestKind, SectorRange};

/// Bytes of one operation of these at most.
const PART_BYTES: u64 = 1 << 20;

impl Core {
    /// Begins a request that changes the disk or flushes it, past the log.
    pub(super) fn around(&mut self, id: u32, io: &mut dyn Io) {
        let kind = self.slots[id as usize].kind.expect("the request is under way");
        self.slots[id as usize].under_way = 1;
        self.arounds += 1;
        let ranges = std::mem::take(&mut self.slots[id as usize].ranges);
        for range in &ranges {
            self.changing(id, *range);
            self.index.remove(range.start, range.count);
        }
        match kind {
            RequestKind::Read => unreachable!("reads go through the index"),
            RequestKind::Flush => self.submit_around(id, (OperationKind::Flush, 0, 0), &[], io),
            RequestKind::Write => self.write_around(id, ranges[0], io),
            RequestKind::Discard | RequestKind::WriteZeroes { .. } => {
                ranges.iter().for_each(|range| self.zero_around(id, *range, io));
            }
        }
        self.slots[id as usize].ranges = ranges;
        self.around_completed(id, Ok(()), io);
    }

    fn submit_around(
        &mut self,
        id: u32,
        (kind, offset, length): (OperationKind, u64, u64),
        segments: &[Segment],
        io: &mut dyn Io,
    ) {
        self.slots[id as usize].under_way += 1;
        let operation = Operation { kind, offset, length, segments };
        io.submit(BACKING, operation, Token::Around.pack(id));
    }

    /// How writes go there: durable at once if the guest wants that.
    fn around_kind(&self) -> OperationKind {
        if self.journal.strict { OperationKind::WriteDurable } else { OperationKind::Write }
    }

    fn write_around(&mut self, id: u32, range: SectorRange, io: &mut dyn Io) {
        let block = u64::from(self.backing.block_bytes);
        let (offset, length) = (range.start * SECTOR_BYTES, range.count * SECTOR_BYTES);
        if !offset.is_multiple_of(block) || !length.is_multiple_of(block) {
            // The guest was told the backing's block size.
            self.slots[id as usize].failed = true;
            return;
        }
        let kind = self.around_kind();
        let segments = std::mem::take(&mut self.slots[id as usize].segments);
        let alignment = self.backing.memory_alignment as usize;
        let aligned = segments.iter().all(|segment| {
            segment.address().addr().is_multiple_of(alignment)
                && segment.length().is_multiple_of(block as usize)
        });
        if aligned {
            self.submit_around(id, (kind, offset, length), &segments, io);
        } else {
            let mut source = Cursor::new(&segments, 0);
            let mut done = 0;
            while done < length {
                let part = (length - done).min(PART_BYTES);
                let buffer = PinnedBuffer::new((part as usize).next_power_of_two());
                let mut piece = [0; 4096];
                for at in (0..part as usize).step_by(piece.len()) {
                    let bytes = piece.len().min(part as usize - at);
                    source.copy_to(&mut piece[..bytes]);
                    buffer.segment().part(at, bytes).copy_from(&piece);
                }
                let memory = buffer.segment().part(0, part as usize);
                self.slots[id as usize].bounces.push(buffer);
                self.submit_around(id, (kind, offset + done, part), &[memory], io);
                done += part;
            }
        }
        self.slots[id as usize].segments = segments;
    }

    /// Zeros are written: what the backing refuses or only hints at cannot be relied on.
    fn zero_around(&mut self, id: u32, range: SectorRange, io: &mut dyn Io) {
        let block = u64::from(self.backing.block_bytes);
        let (offset, length) = (range.start * SECTOR_BYTES, range.count * SECTOR_BYTES);
        if !offset.is_multiple_of(block) || !length.is_multiple_of(block) {
            self.slots[id as usize].failed = true;
            return;
        }
        if self.backing.zero {
            return self.submit_around(id, (OperationKind::Zero, offset, length), &[], io);
        }
        let kind = self.around_kind();
        let buffer = PinnedBuffer::new(PART_BYTES as usize);
        let mut done = 0;
        while done < length {
            let part = (length - done).min(PART_BYTES);
            let memory = buffer.segment().part(0, part as usize);
            self.submit_around(id, (kind, offset + done, part), &[memory], io);
            done += part;
        }
        self.slots[id as usize].bounces.push(buffer);
    }

    /// A part of a request past the log has ended; all, perhaps.
    pub(super) fn around_completed(&mut self, id: u32, result: Result<(), Errno>, io: &mut dyn Io) {
        let slot = &mut self.slots[id as usize];
        slot.under_way -= 1;
        slot.failed |= result.is_err();
        if slot.under_way > 0 {
            return;
        }
        let zeroes =
            matches!(slot.kind, Some(RequestKind::Discard | RequestKind::WriteZeroes { .. }));
        if zeroes && self.journal.strict && !slot.failed && slot.done == 0 {
            // Zeros are not durable by themselves.
            slot.done = 1;
            return self.submit_around(id, (OperationKind::Flush, 0, 0), &[], io);
        }
        let outcome = if slot.failed { Outcome::Failed } else { Outcome::Done };
        self.arounds -= 1;
        self.changed(id);
        self.end(id, outcome, io);
    }
}
