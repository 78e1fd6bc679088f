//! What follows a failed flush of the flash: what it should have covered is read back, verified and
//! written again, durably, where it lies.
//!
//! Another flush would prove nothing: the drive may have dropped what the first one should have
//! made durable (`io/README.md`). The guest's memory is long gone; but the flash may still have
//! what was written, and each piece has its checksum. Bytes and place stay the same, so the end of
//! the host in the middle of it changes nothing: what was whole before is whole throughout.
//!
//! Appends go on meanwhile; what they write is for the next flush. But an append that had been
//! written when the flush was submitted is one that it should have covered, though it did not count
//! yet: all appends that had a place when the flush failed are written again when they count.

use super::core::{Core, Token};
use super::header::SegmentHeader;
use super::journal::{Covered, FAILURES_MAX};
use super::layout::BLOCK_BYTES;
use super::record::{Bad, Batch};
use super::segment::Doubtful;
use super::status::count;
use crate::io::buffer::PinnedBuffer;
use crate::io::disk::{Errno, Operation, OperationKind};
use crate::io::volume::Io;
use std::collections::VecDeque;

/// The rest of the tokens of a flush: 0 is the flush itself.
pub(super) const REWRITE: u32 = 1;

/// Times that a part is read before what it should hold counts as lost.
const READS_MAX: u32 = 3;

/// See the module.
pub(super) struct Rewrite {
    /// What counted when its part of the flush's work was taken up.
    covered: Covered,
    /// Batches below were under way, at least, when the flush failed.
    until: u64,
    /// What of it is not durable yet, in the log's order.
    left: VecDeque<Doubtful>,
    /// What of the first is being read or written.
    buffer: PinnedBuffer,
    length: usize,
    writing: bool,
    under_way: u32,
    failed: bool,
    reads: u32,
    /// Writes that failed one after the other.
    failures: u32,
}

impl Core {
    /// A flush failed that should have covered `covered`.
    pub(super) fn rewrite(&mut self, covered: Covered, errno: Errno, io: &mut dyn Io) {
        log::warn!(
            "{}: the flash failed to flush ({}): what is not known to be durable is written again",
            self.name,
            std::io::Error::from(errno)
        );
        count(&self.status.counters.flush_failures, 1);
        let left = self.rewrite_parts(covered);
        let bytes = (BLOCK_BYTES + self.shape.batch_bytes_max()).next_power_of_two();
        self.journal.rewrite = Some(Rewrite {
            covered,
            until: self.journal.next_batch,
            left,
            buffer: PinnedBuffer::new(bytes as usize),
            length: 0,
            writing: false,
            under_way: 0,
            failed: false,
            reads: 0,
            failures: 0,
        });
        self.rewrite_next(io);
    }

    fn rewrite_parts(&mut self, covered: Covered) -> VecDeque<Doubtful> {
        let left: VecDeque<Doubtful> = self.segments.doubtful(covered.end).into();
        // A segment of marks alone may be drained, and must not be used again meanwhile.
        left.iter().for_each(|part| self.segments.pin(part.segment));
        left
    }

    /// More counts now: goes on if that was waited for.
    pub(super) fn rewrite_more(&mut self, io: &mut dyn Io) {
        let waits = |rewrite: &Rewrite| rewrite.left.is_empty();
        if self.journal.rewrite.as_ref().is_some_and(waits) {
            self.rewrite_next(io);
        }
    }

    /// Reads the next part, takes up what has come to count, or tells that all is durable.
    fn rewrite_next(&mut self, io: &mut dyn Io) {
        let Some(rewrite) = self.journal.rewrite.as_mut() else { return };
        if rewrite.left.is_empty() {
            let (covered, until) = (rewrite.covered, rewrite.until);
            if covered.batch + 1 >= until {
                self.journal.rewrite = None;
                return self.flushed(covered, io);
            }
            if self.journal.counted_batch == covered.batch {
                return;
            }
            self.durable(covered);
            let covered = self.journal.covered();
            let left = self.rewrite_parts(covered);
            let Some(rewrite) = self.journal.rewrite.as_mut() else { return };
            (rewrite.covered, rewrite.left) = (covered, left);
        }
        let Some(rewrite) = self.journal.rewrite.as_mut() else { return };
        let Some(first) = rewrite.left.front() else { return };
        let most = rewrite.buffer.segment().length() as u64;
        rewrite.length = most.min(first.to - first.from) as usize;
        rewrite.writing = false;
        self.rewrite_submit(OperationKind::Read, io);
    }

    fn rewrite_submit(&mut self, kind: OperationKind, io: &mut dyn Io) {
        let Some(rewrite) = self.journal.rewrite.as_mut() else { return };
        let Some(first) = rewrite.left.front() else { return };
        let offset = self.shape.segment_offset(first.segment) + first.from;
        let segments = [rewrite.buffer.segment().part(0, rewrite.length)];
        let length = rewrite.length as u64;
        (rewrite.failed, rewrite.reads) = (false, rewrite.reads + u32::from(!rewrite.writing));
        let operation = Operation { kind, offset, length, segments: &segments };
        let parts = self.submit_flash(operation, Token::Flush.pack(REWRITE), io);
        if let Some(rewrite) = self.journal.rewrite.as_mut() {
            rewrite.under_way = parts;
        }
    }

    /// A part of a read or a write has ended.
    pub(super) fn rewrite_completed(&mut self, result: Result<(), Errno>, io: &mut dyn Io) {
        let rewrite = self.journal.rewrite.as_mut().expect("something is written again");
        rewrite.under_way -= 1;
        rewrite.failed |= result.is_err();
        let (ended, writing) = (rewrite.under_way == 0, rewrite.writing);
        if !ended || self.is_fenced() {
            return;
        }
        match writing {
            false => self.rewrite_read(io),
            true => self.rewrite_written(io),
        }
    }

    /// What was read is written if it is what it should be.
    fn rewrite_read(&mut self, io: &mut dyn Io) {
        let Some(rewrite) = self.journal.rewrite.as_ref() else { return };
        let whole = if rewrite.failed { None } else { self.rewrite_whole(rewrite) };
        let reads = rewrite.reads;
        match whole {
            None if reads < READS_MAX => self.rewrite_submit(OperationKind::Read, io),
            None => self.rewrite_lost(io),
            Some(length) => {
                if let Some(rewrite) = self.journal.rewrite.as_mut() {
                    (rewrite.length, rewrite.writing, rewrite.reads) = (length, true, 0);
                }
                self.rewrite_submit(OperationKind::WriteDurable, io);
            }
        }
    }

    fn rewrite_written(&mut self, io: &mut dyn Io) {
        let Some(rewrite) = self.journal.rewrite.as_mut() else { return };
        if rewrite.failed {
            rewrite.failures += 1;
            if rewrite.failures > FAILURES_MAX {
                let text = format!(
                    "the flash fails to flush and to write again what it has not flushed; \
                     everything up to point {} is safe on it: replace the drive, or detach the \
                     disk",
                    self.journal.durable_through
                );
                return self.fence(text, io);
            }
            return self.rewrite_submit(OperationKind::WriteDurable, io);
        }
        rewrite.failures = 0;
        let Some(first) = rewrite.left.front_mut() else { return };
        first.from += rewrite.length as u64;
        if first.from == first.to {
            let segment = first.segment;
            rewrite.left.pop_front();
            self.segments.unpin(segment);
        }
        self.rewrite_next(io);
    }

    /// How many bytes of what was read are whole and undamaged: the segment's header, if it begins
    /// with that, and batches.
    fn rewrite_whole(&self, rewrite: &Rewrite) -> Option<usize> {
        let first = rewrite.left.front()?;
        let segment = self.segments.get(first.segment);
        let mut bytes = vec![0; rewrite.length];
        rewrite.buffer.segment().copy_to(&mut bytes);
        let mut done = 0;
        if first.from == 0 {
            let block = bytes.get(..BLOCK_BYTES as usize)?;
            let header = SegmentHeader::decode(block, &self.roots.root)?;
            if header.salt != segment.salt || header.sequence != segment.sequence {
                return None;
            }
            done = block.len();
        }
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            match Batch::decode(rest, segment.salt) {
                Ok(batch) => match rest.get(..batch.header.batch_bytes as usize) {
                    Some(whole) if batch.verify(whole).is_ok() => done += whole.len(),
                    Some(_) => return None,
                    None => break,
                },
                Err(Bad::Short(_)) => break,
                Err(_) => return None,
            }
        }
        let end = first.from + rewrite.length as u64 == first.to;
        // The last one is whole, and the buffer has room for any.
        let missing = done < bytes.len() && end;
        (done > 0 && !missing).then_some(done)
    }

    fn rewrite_lost(&mut self, io: &mut dyn Io) {
        let first = self.journal.rewrite.as_ref().and_then(|rewrite| rewrite.left.front());
        let offset = first.map_or(0, |first| self.shape.segment_offset(first.segment) + first.from);
        let text = format!(
            "the flash failed to flush and has lost what was written at byte {offset} of the \
             cache; everything up to point {} is safe on it: drain to it, or detach the disk as \
             lost",
            self.journal.durable_through
        );
        self.fence(text, io);
    }
}
