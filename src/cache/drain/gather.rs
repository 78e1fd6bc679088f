//! Gathering a group: records from the log, verified, in order of their WONs.

use super::read::Next;
use super::{DrainHost, Drainer, Group, State};
use crate::backing::stamp::DrainMode;
use crate::base::planted::{Bug, planted};
use crate::base::units::SECTOR_BYTES;
use crate::cache::record::{Batch, Entry, Kind, piece_checksum};
use crate::io::disk::Errno;

/// A record that cannot be read or verified is read so many times before it counts as lost.
const READ_ATTEMPTS: u32 = 3;

/// Sectors of zeros in one group: a backing that cannot zero gets them as data.
const ZERO_SECTORS_MAX: u64 = 1 << 25;

/// What became of a batch.
enum Taken {
    Whole,
    /// The group ends before this record of it.
    Until(u16),
    /// A piece's data are not what they were.
    Damaged,
}

impl Drainer {
    pub(super) fn begin_group(&mut self, limit: u64, host: &mut dyn DrainHost) {
        let drained = self.drained();
        if !self.positioned {
            self.positioned = true;
            self.reader.seek(host.seek(drained));
            self.group.taken = 0;
        }
        self.group = Group {
            from: drained,
            to: drained,
            point: drained,
            limit,
            part: false,
            full: false,
            start: (self.reader.cursor(), self.group.taken),
            log_bytes: 0,
            zeros: 0,
            begun: host.now(),
            committed: self.dirty.committed_bytes(),
            ..self.group
        };
        self.attempts = 0;
        self.merged.clear();
        self.state = State::Gather;
    }

    /// True when the state has changed.
    pub(super) fn gather(&mut self, host: &mut dyn DrainHost) -> bool {
        if self.again {
            if self.reader.is_busy() || self.is_pausing(host) {
                return false;
            }
            self.gather_again();
        }
        // Behind the newest write of this disk there may be points that are others' numbers.
        let end = self.group.limit.min(self.dirty.head());
        while self.group.to < end {
            match self.reader.next(host) {
                Next::Wait => return false,
                Next::Batch(length) => match self.take_batch(length) {
                    Taken::Whole => {
                        self.reader.advance(length);
                        self.group.log_bytes += length as u64;
                        self.group.taken = 0;
                    }
                    Taken::Until(taken) => {
                        self.group.taken = taken;
                        break;
                    }
                    Taken::Damaged => return self.suspect(Errno(libc::EBADMSG), host),
                },
                Next::Failed(errno) => return self.suspect(errno, host),
                // The owner says that more is committed than the log holds.
                Next::Bad | Next::End => return self.suspect(Errno(libc::EBADMSG), host),
            }
        }
        let Group { from, to, part, part_won, .. } = self.group;
        if part && to > from && !planted(Bug::RequestTorn) {
            // Less room than it seemed, of spans, blocks or memory: the next group has it whole.
            (self.group.limit, self.again) = (part_won - 1, true);
            return true;
        }
        self.gathered(host);
        true
    }

    /// In the memory that it has: what fitted once must fit again.
    pub(super) fn gather_again(&mut self) {
        let (cursor, taken) = self.group.start;
        self.reader.seek(cursor);
        self.merged.clear_again();
        self.again = false;
        let from = self.group.from;
        self.group = Group {
            to: from,
            taken,
            part: false,
            full: false,
            log_bytes: 0,
            zeros: 0,
            ..self.group
        };
    }

    /// What was read is not right: it is read again, since a drive may err once; then it is lost.
    fn suspect(&mut self, errno: Errno, host: &mut dyn DrainHost) -> bool {
        self.attempts += 1;
        self.retries += 1;
        if self.attempts >= READ_ATTEMPTS {
            self.corrupt();
            return true;
        }
        self.trouble = Some(errno);
        self.again = true;
        self.pause(host);
        self.is_pausing(host);
        false
    }

    /// Takes the batch's records until the group is full or at its limit.
    fn take_batch(&mut self, length: usize) -> Taken {
        let (bytes, salt) = self.reader.batch(length);
        let batch = Batch::decode(bytes, salt).expect("the reader has decoded it");
        let grouped = self.options.mode == DrainMode::Grouped || self.is_finishing();
        let group = &mut self.group;
        for (index, entry) in batch.entries().enumerate().skip(usize::from(group.taken)) {
            if entry.kind == Kind::Mark || entry.won <= group.from {
                continue;
            }
            let begun = group.to > group.from || group.part;
            let beyond = entry.won > group.limit;
            let next_epoch = !grouped && begun && entry.epoch != group.epoch;
            // A request of several records begins in the first half or waits: so it seldom ends
            // beyond the group, which would be gathered again without it.
            let large = begun && !group.part && entry.continued && self.merged.is_half_full();
            let data = if entry.kind == Kind::Write { entry.count } else { 0 };
            let zeros = if entry.kind == Kind::Write { 0 } else { entry.count };
            let full = !self.merged.has_room(data)
                || (begun && group.zeros.saturating_add(zeros) > ZERO_SECTORS_MAX);
            if beyond || next_epoch || large || full {
                assert!(begun || beyond, "an empty group has room for one record");
                group.full = !beyond;
                return Taken::Until(index as u16);
            }
            if !is_whole(&entry, bytes) {
                return Taken::Damaged;
            }
            match entry.kind {
                Kind::Write => self.merged.write(entry.start, data_of(&entry, bytes)),
                Kind::Discard => self.merged.zero(entry.start, entry.count, true),
                Kind::Zeroes => self.merged.zero(entry.start, entry.count, false),
                Kind::Mark => {}
            }
            group.zeros += zeros;
            group.epoch = entry.epoch;
            group.part = entry.continued;
            group.part_won = entry.won;
            if !entry.continued {
                group.to = entry.won;
            }
        }
        Taken::Whole
    }
}

fn data_of<'a>(entry: &Entry<'_>, bytes: &'a [u8]) -> &'a [u8] {
    let from = entry.data.unwrap_or(0) as usize;
    &bytes[from..from + (entry.count * SECTOR_BYTES) as usize]
}

/// Whether the record's data are what its checksums say.
fn is_whole(entry: &Entry<'_>, bytes: &[u8]) -> bool {
    entry.pieces().all(|piece| {
        let from = piece.data as usize;
        let data = bytes.get(from..from + usize::from(piece.count) * SECTOR_BYTES as usize);
        data.map(piece_checksum) == Some(piece.checksum)
    })
}
