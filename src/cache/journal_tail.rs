//! What follows an append: again elsewhere if it failed, flushes, summaries, and the end of it all
//! when the disk is fenced.

use super::core::{Core, FLASH, Token};
use super::journal::{Covered, FAILURES_MAX, Pending};
use super::layout::BLOCK_BYTES;
use super::record::BatchHeader;
use super::root::Mode;
use super::status::count;
use super::summary::{SummaryFoot, item_bytes, summary_bytes};
use crate::base::planted::{Bug, planted};
use crate::io::buffer::PinnedBuffer;
use crate::io::disk::{Errno, Operation, OperationKind};
use crate::io::volume::{Io, Outcome};

impl Core {
    /// If the oldest append has failed: waits for those behind it, then begins all of them again.
    pub(super) fn fail_appends(&mut self, io: &mut dyn Io) {
        let journal = &self.journal;
        let Some(first) = journal.order.front().copied() else { return };
        let waits = journal.order.iter().any(|index| journal.appends[*index].under_way > 0);
        if !journal.appends[first].failed || journal.again == Some(0) || waits {
            return;
        }
        count(&self.status.counters.append_failures, 1);
        self.journal.failures += 1;
        if self.journal.failures > FAILURES_MAX {
            let last = self.journal.counted_won;
            let safe = match self.mode {
                Mode::WriteThrough => format!(
                    "every write that was acknowledged is in the backing: replace the drive, or \
                     give the flash up, which loses none of them (`vflash detach {} --lost`)",
                    self.name
                ),
                _ => format!(
                    "everything up to point {last} is safe on it: replace the drive, or detach \
                     the disk"
                ),
            };
            return self.fence(format!("the flash fails every write of the log; {safe}"), io);
        }
        self.give_up_segments();
        let journal = &mut self.journal;
        for index in &journal.order {
            journal.appends[*index].failed = true;
        }
        journal.next_batch = journal.counted_batch + 1;
        journal.previous_checksum = journal.counted_checksum;
        journal.again = Some(0);
        self.append_again(io);
    }

    /// Nothing more is appended where an append failed, nor behind it.
    fn give_up_segments(&mut self) {
        let journal = &mut self.journal;
        let mut filling = std::mem::take(&mut journal.filling);
        filling.retain_mut(|filling| {
            let touched = journal
                .order
                .iter()
                .any(|index| journal.appends[*index].segment == filling.segment);
            if filling.full && !touched {
                return true;
            }
            filling.full = true;
            let freed = self.segments.give_up(filling.segment);
            if freed {
                journal.builders.push(std::mem::take(&mut filling.builder));
            }
            !freed
        });
        journal.filling = filling;
    }

    /// Gives appends that failed another place. False: there is no room for all of them yet.
    pub(super) fn append_again(&mut self, io: &mut dyn Io) -> bool {
        while let Some(done) = self.journal.again {
            let Some(index) = self.journal.order.get(done).copied() else {
                self.journal.again = None;
                break;
            };
            let journal = &self.journal;
            let append = &journal.appends[index];
            let BatchHeader { first_won, header_bytes, .. } = append.encoder.batch().header;
            let fits = journal.filling.back().filter(|last| !last.full).is_some_and(|last| {
                let summary = summary_bytes(last.items_bytes + item_bytes(header_bytes));
                let end = u64::from(last.position) + u64::from(append.batch_bytes);
                end + summary <= self.shape.segment_bytes
            });
            if !fits && !self.roll(first_won) {
                return false;
            }
            self.journal.appends[index].failed = false;
            self.journal.again = Some(done + 1);
            self.submit_append(index, io);
        }
        true
    }

    /// A guest's FLUSH: what completed before it is durable when it completes.
    pub(super) fn guest_flush(&mut self, id: u32, io: &mut dyn Io) {
        self.journal.edge = true;
        if self.journal.is_durable() || planted(Bug::FlushSkipsWrites) {
            return self.end(id, Outcome::Done, io);
        }
        self.journal.flush_waiting.push(id);
        self.flush_if_due(io);
    }

    /// Flushes the flash if somebody waits for it or it is time.
    pub(super) fn flush_if_due(&mut self, io: &mut dyn Io) {
        let tables = self.clean.wants_flush();
        let journal = &mut self.journal;
        if journal.is_durable() && journal.flush_waiting.is_empty() && !tables {
            (journal.flush_wanted, journal.flush_due) = (false, None);
            return;
        }
        let due = journal.flush_due.is_some_and(|at| at <= io.now());
        let wanted = journal.flush_wanted || due || tables || !journal.flush_waiting.is_empty();
        if journal.flush.is_some() || !wanted {
            return;
        }
        (journal.flush_wanted, journal.flush_due) = (false, None);
        std::mem::swap(&mut journal.flush_current, &mut journal.flush_waiting);
        journal.flush = Some(journal.covered());
        self.clean.flush_begun();
        let kind = OperationKind::Flush;
        let flush = Operation { kind, offset: 0, length: 0, segments: &[] };
        io.submit(FLASH, flush, Token::Flush.pack(0));
    }

    /// A flush of the flash has ended.
    pub(super) fn flush_completed(&mut self, result: Result<(), Errno>, io: &mut dyn Io) {
        let covered = self.journal.flush.expect("a flush was under way");
        if self.is_fenced() {
            return;
        }
        let trusted = result.is_ok() || planted(Bug::FlashFlushTrusted);
        self.flushed_tables(trusted, io);
        match result {
            Err(errno) if !trusted => self.rewrite(covered, errno, io),
            _ => self.flushed(covered, io),
        }
    }

    /// What a flush was to cover is durable, or with it more.
    pub(super) fn flushed(&mut self, covered: Covered, io: &mut dyn Io) {
        self.journal.flush = None;
        self.durable(covered);
        for id in std::mem::take(&mut self.journal.flush_current) {
            self.end(id, Outcome::Done, io);
        }
        self.write_summaries(io);
        self.answer(io);
        self.flush_if_due(io);
    }

    /// When writes wait for space, an open segment that is all drained is of no use.
    pub(super) fn close_drained(&mut self, io: &mut dyn Io) {
        let waits = !self.journal.pending.is_empty() && self.journal.order.is_empty();
        let Some(filling) = self.journal.filling.back().filter(|_| waits) else { return };
        let segment = self.segments.get(filling.segment);
        if !filling.full && segment.last_won <= self.drained && segment.end > 0 {
            self.close_filling(io);
        }
    }

    /// Appends no more to the open segment, if there is one.
    pub(super) fn close_filling(&mut self, io: &mut dyn Io) {
        let Some(filling) = self.journal.filling.back_mut().filter(|last| !last.full) else {
            return;
        };
        filling.full = true;
        self.segments.close(filling.segment);
        // Before it can be given to somebody else.
        self.write_summaries(io);
        self.segments.drained(self.drained);
    }

    /// Writes the summaries of segments that are full and durable.
    pub(super) fn write_summaries(&mut self, io: &mut dyn Io) {
        while let Some(first) = self.journal.filling.front() {
            let segment = *self.segments.get(first.segment);
            if !first.full || segment.grows() || segment.durable_end < segment.end {
                return;
            }
            let first = self.journal.filling.pop_front().expect("it was just seen");
            let foot = SummaryFoot {
                last_won: segment.last_won,
                last_batch: first.last_batch,
                ..SummaryFoot::new(segment.salt, segment.sequence, self.journal.incarnation)
            };
            let bytes = first.builder.finish(foot);
            self.journal.builders.push(first.builder);
            self.submit_summary(first.segment, &bytes, io);
        }
    }

    fn submit_summary(&mut self, segment: u32, bytes: &[u8], io: &mut dyn Io) {
        let length = bytes.len() as u64;
        let buffer = PinnedBuffer::new(bytes.len().next_power_of_two());
        buffer.segment().copy_from(bytes);
        let segments = [buffer.segment().part(0, bytes.len())];
        let number = self.journal.summaries.iter().position(Option::is_none);
        let number = number.unwrap_or_else(|| {
            self.journal.summaries.push(None);
            self.journal.summaries.len() - 1
        });
        let end = self.shape.segment_offset(segment) + self.shape.segment_bytes;
        assert!(length + BLOCK_BYTES < self.shape.segment_bytes, "room was kept for the summary");
        self.segments.pin(segment);
        let kind = OperationKind::Write;
        let write = Operation { kind, offset: end - length, length, segments: &segments };
        let parts = self.submit_flash(write, Token::Summary.pack(number as u32), io);
        self.journal.summaries[number] = Some((segment, parts, buffer));
    }

    /// A part of a summary has been written, or not: nothing depends on it.
    pub(super) fn summary_completed(&mut self, number: u32) {
        let place = &mut self.journal.summaries[number as usize];
        let (segment, parts, _) = place.as_mut().expect("a summary was under way");
        *parts -= 1;
        if *parts == 0 {
            let segment = *segment;
            *place = None;
            self.segments.unpin(segment);
        }
    }

    /// The disk is fenced: nothing that waits will be done.
    pub(super) fn abandon_writes(&mut self, io: &mut dyn Io) {
        let journal = &mut self.journal;
        let mut requests: Vec<u32> = Vec::new();
        requests.extend(journal.acks.drain(..).map(|ack| ack.slot));
        for index in &journal.order {
            requests.extend(journal.appends[*index].requests.drain(..).map(|(slot, _)| slot));
        }
        requests.extend(journal.pending.drain(..).filter_map(|pending| match pending {
            Pending::Request(slot) => Some(slot),
            Pending::Mark(_) => None,
        }));
        requests.append(&mut journal.flush_waiting);
        requests.append(&mut journal.flush_current);
        for id in requests {
            self.refuse(id, io);
        }
    }
}
