//! The journal: takes writes to the log, many in one append.
//!
//! ```text
//! pending → (planned, copied, checksummed) → under way → counted → answered
//! ```
//!
//! Invariants:
//! - W1 requests get their WONs in the order in which they came, at the moment they are given a
//!   place in the log; so what completed before another one came has the smaller WON.
//! - W2 appends count strictly in order: the index and the guest hear of a batch only when it and
//!   all before it have been written.
//! - W3 with strong durability a write is answered when `durable_through` has come to it.
//! - W4 after a failed append nothing is written behind it: it and all after it are appended
//!   again, the same records with the same WONs, in a new segment.
//! - W5 a request larger than a batch begins a batch of its own, so that a log that ends within it
//!   ends before that batch.

use super::consistency::Consistency;
use super::core::{Core, Token};
use super::cursor::Cursor;
use super::header::SegmentHeader;
use super::index::Piece;
use super::layout::{BLOCK_BYTES, Shape};
use super::record::{
    BLOCK_SECTORS, BatchEncoder, BatchLink, EntryHead, Kind, Plan, RecordOrigin, piece_checksum,
};
use super::rewrite::Rewrite;
use super::root::{Mode, salt};
use super::status::count;
use super::summary::{SummaryBuilder, item_bytes, summary_bytes};
use crate::base::clock::Nanos;
use crate::base::planted::{Bug, planted};
use crate::base::units::SECTOR_BYTES;
use crate::io::buffer::PinnedBuffer;
use crate::io::disk::{Errno, Operation, OperationKind};
use crate::io::volume::{Io, Outcome, RequestKind};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Appends under way or waiting to count.
const APPENDS_MAX: usize = 4;

/// Appends that fail one after the other before the flash counts as failing.
pub(super) const FAILURES_MAX: u32 = 5;

/// With plain writes, the log is flushed this long after the first that is not durable, if no
/// guest asks for it: only what is durable can be drained.
const FLUSH_AFTER: Duration = Duration::from_millis(500);

const HEADER: usize = BLOCK_BYTES as usize;
const PIECE_BYTES: usize = (BLOCK_SECTORS * SECTOR_BYTES) as usize;

/// What is to be appended.
pub(super) enum Pending {
    Request(u32),
    /// A name for the point that the log has come to.
    Mark(String),
}

/// A record of the batch that is being planned.
pub(super) struct Pick {
    slot: u32,
    range: usize,
    start: u64,
    count: u64,
    pub(super) continued: bool,
    edge: bool,
    /// The request is whole with this one.
    last: bool,
}

/// One batch on its way.
pub(super) struct Append {
    /// A segment header's place, then the batch.
    pub(super) buffer: PinnedBuffer,
    pub(super) encoder: BatchEncoder,
    pub(super) plan: Plan,
    /// The segment and the byte in it.
    pub(super) segment: u32,
    pub(super) position: u32,
    pub(super) batch_bytes: u32,
    pub(super) sequence: u64,
    pub(super) checksum: u32,
    /// Written so that it is durable when it has been written.
    pub(super) durable: bool,
    pub(super) under_way: u32,
    pub(super) failed: bool,
    /// Requests that are whole with it, and the WON of each one's last record.
    pub(super) requests: Vec<(u32, u64)>,
    pub(super) marks: Vec<String>,
}

/// A segment that is appended to, or whose summary is still to be written.
pub(super) struct Filling {
    pub(super) segment: u32,
    /// Where the next batch goes.
    pub(super) position: u32,
    /// Of the summary, for all batches that have a place.
    pub(super) items_bytes: u64,
    /// Of batches that count.
    pub(super) builder: SummaryBuilder,
    pub(super) last_batch: u64,
    /// No more is appended.
    pub(super) full: bool,
}

/// What a batch needs of a request to be answered.
pub(super) struct Ack {
    pub(super) won: u64,
    pub(super) slot: u32,
}

/// How far a flush makes the log durable: the last WON and batch, the segment and the byte in it
/// where that ends, and the bytes of log since the last time.
#[derive(Clone, Copy)]
pub(super) struct Covered {
    pub won: u64,
    pub batch: u64,
    pub end: (u64, u32),
    pub bytes: u64,
}

/// Where the drainer is told of what has come to count.
#[derive(Default)]
pub(super) struct News {
    /// FLUSH boundaries: the last WON and the epoch that ended.
    pub edges: Vec<(u64, u64)>,
    pub marks: Vec<(String, u64)>,
    /// Bytes of log that have become durable.
    pub bytes: u64,
    /// `durable_through` has moved.
    pub durable: bool,
}

/// See the module.
pub(super) struct Journal {
    pub incarnation: u64,
    /// Answer only what is durable.
    pub strong: bool,
    /// Each write is its own epoch.
    pub strict: bool,
    pub pending: VecDeque<Pending>,
    pub(super) appends: Vec<Append>,
    /// In the log's order, oldest first; indices of `appends`.
    pub(super) order: VecDeque<usize>,
    pub(super) spare: Vec<usize>,
    pub(super) picks: Vec<Pick>,
    pub(super) filling: VecDeque<Filling>,
    /// Builders of summaries, to be used again.
    pub(super) builders: Vec<SummaryBuilder>,
    pub(super) summaries: Vec<Option<(u32, u32, PinnedBuffer)>>,
    /// An append failed: the first so many of `order` have been appended again.
    pub(super) again: Option<usize>,
    pub(super) failures: u32,
    /// The link of the next batch.
    pub(super) next_batch: u64,
    pub(super) previous_checksum: u32,
    /// Of the last batch that counts.
    pub(super) counted_batch: u64,
    pub(super) counted_checksum: u32,
    pub next_won: u64,
    /// Where numbers come from, if other disks get some of them.
    pub numbers: Option<Arc<Consistency>>,
    /// `next_won` was given to a request whose last record is still to be appended.
    pub(super) reserved: bool,
    pub epoch: u64,
    /// A guest FLUSH lies before the next record.
    pub edge: bool,
    /// Everything up to here counts.
    pub counted_won: u64,
    pub durable_through: u64,
    /// The last batch that is durable with all before it.
    pub(super) durable_batch: u64,
    /// The end of what counts: segment, byte in it.
    pub(super) counted_end: (u64, u32),
    pub(super) uncounted_bytes: u64,
    pub(super) acks: VecDeque<Ack>,
    /// A flush of the flash under way, or what follows one that failed.
    pub(super) flush: Option<Covered>,
    pub(super) rewrite: Option<Rewrite>,
    pub(super) flush_waiting: Vec<u32>,
    pub(super) flush_current: Vec<u32>,
    pub(super) flush_due: Option<Nanos>,
    pub(super) flush_wanted: bool,
    pub(super) align: u32,
    /// Writes wait for a free segment.
    pub(super) stalled: bool,
    pub news: News,
}

/// Where a log goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LogHead {
    pub incarnation: u64,
    pub next_won: u64,
    /// Of the next record.
    pub epoch: u64,
    pub next_batch: u64,
    pub checksum: u32,
    /// All before it is durable.
    pub durable_through: u64,
}

impl Journal {
    pub(super) fn new(head: LogHead, strong: bool, align: u32) -> Self {
        Self {
            incarnation: head.incarnation,
            strong,
            strict: false,
            pending: VecDeque::new(),
            appends: Vec::new(),
            order: VecDeque::new(),
            spare: Vec::new(),
            picks: Vec::new(),
            filling: VecDeque::new(),
            builders: Vec::new(),
            summaries: Vec::new(),
            again: None,
            failures: 0,
            next_batch: head.next_batch,
            previous_checksum: head.checksum,
            counted_batch: head.next_batch - 1,
            counted_checksum: head.checksum,
            next_won: head.next_won,
            numbers: None,
            reserved: false,
            epoch: head.epoch,
            // An opening is an edge: epochs go on above all that were seen.
            edge: true,
            counted_won: head.durable_through,
            durable_through: head.durable_through,
            durable_batch: head.next_batch - 1,
            counted_end: (0, 0),
            uncounted_bytes: 0,
            acks: VecDeque::new(),
            flush: None,
            rewrite: None,
            flush_waiting: Vec::new(),
            flush_current: Vec::new(),
            flush_due: None,
            flush_wanted: false,
            align,
            stalled: false,
            news: News::default(),
        }
    }

    /// Takes all memory that appends need.
    pub(super) fn attach(&mut self, shape: Shape) {
        let bytes = HEADER + shape.batch_bytes_max() as usize;
        for index in 0..APPENDS_MAX {
            self.appends.push(Append {
                buffer: PinnedBuffer::new(bytes),
                encoder: BatchEncoder::default(),
                plan: Plan::default(),
                segment: 0,
                position: 0,
                batch_bytes: 0,
                sequence: 0,
                checksum: 0,
                durable: false,
                under_way: 0,
                failed: false,
                requests: Vec::new(),
                marks: Vec::new(),
            });
            self.spare.push(index);
        }
    }

    /// Nothing is under way or owed an answer, and all that counts is durable.
    pub(super) fn is_settled(&self) -> bool {
        self.order.is_empty() && self.acks.is_empty() && self.is_durable() && self.flush.is_none()
    }

    /// Nothing waits to be appended.
    pub(super) fn is_idle(&self) -> bool {
        self.pending.is_empty() && self.order.is_empty()
    }

    /// The segment's summary is yet to be written, or being written.
    pub(super) fn summarises(&self, segment: u32) -> bool {
        let mut under_way = self.summaries.iter().flatten();
        self.filling.iter().any(|filling| filling.segment == segment)
            || under_way.any(|(other, ..)| *other == segment)
    }

    /// All that counts is durable.
    pub(super) fn is_durable(&self) -> bool {
        self.durable_batch == self.counted_batch
    }

    fn fits(&self, plan: Plan, shape: Shape) -> bool {
        let bytes = u64::from(plan.batch_bytes(self.align));
        let (position, items) = match self.filling.back().filter(|filling| !filling.full) {
            Some(filling) => (u64::from(filling.position), filling.items_bytes),
            None => (BLOCK_BYTES, 0),
        };
        let summary = summary_bytes(items + item_bytes(plan.header_bytes));
        bytes <= shape.batch_bytes_max() && position + bytes + summary <= shape.segment_bytes
    }

    /// All that counts now.
    pub(super) fn covered(&mut self) -> Covered {
        Covered {
            won: self.counted_won,
            batch: self.counted_batch,
            end: self.counted_end,
            bytes: std::mem::take(&mut self.uncounted_bytes),
        }
    }

    fn fits_fresh(&self, plan: Plan, shape: Shape) -> bool {
        u64::from(plan.batch_bytes(self.align)) <= shape.batch_bytes_max()
    }
}

/// What planning came to.
enum Planned {
    Batch(Plan),
    Nothing,
    /// The open segment is too full for the next record.
    NextSegment,
}

/// Sectors that one WON covers at most: a write larger than a quarter of the log could not be
/// drained while it is appended.
fn won_sectors_max(shape: Shape) -> u64 {
    (shape.segments() - 2) * shape.segment_bytes / 4 / SECTOR_BYTES / BLOCK_SECTORS * BLOCK_SECTORS
}

impl Core {
    /// Appends what waits, as far as there is room.
    pub(super) fn pump(&mut self, io: &mut dyn Io) {
        if self.is_fenced() || self.frozen {
            return;
        }
        if self.journal.again.is_some() && !self.append_again(io) {
            return;
        }
        while !self.journal.spare.is_empty() && !self.index.is_full() {
            match self.plan() {
                Planned::Nothing => break,
                Planned::NextSegment => {
                    if !self.roll(self.journal.next_won) {
                        break;
                    }
                }
                Planned::Batch(plan) => {
                    let no_segment = self.journal.filling.back().is_none_or(|last| last.full);
                    if no_segment && !self.roll(self.journal.next_won) {
                        break;
                    }
                    self.append(plan, io);
                }
            }
        }
        self.close_drained(io);
        self.flush_if_due(io);
    }

    /// Chooses the records of the next batch.
    fn plan(&mut self) -> Planned {
        let shape = self.shape;
        let journal = &mut self.journal;
        let mut picks = std::mem::take(&mut journal.picks);
        picks.clear();
        let mut plan = Plan::default();
        let mut next_segment = false;
        for at in 0..journal.pending.len() {
            let id = match &journal.pending[at] {
                Pending::Request(id) => *id,
                Pending::Mark(_) if self.switching => break,
                Pending::Mark(name) => {
                    let with = plan.mark(name.as_bytes());
                    if !journal.fits(with, shape) {
                        next_segment = journal.fits_fresh(with, shape);
                        break;
                    }
                    plan = with;
                    continue;
                }
            };
            let slot = &self.slots[id as usize];
            if (self.switching || self.settling) && slot.done == 0 {
                break;
            }
            assert!(self.mode.journals(), "past the log nothing comes into it");
            let edge = journal.strict || (journal.edge && picks.is_empty());
            let edge = edge && slot.done == 0;
            if slot.kind != Some(RequestKind::Write) {
                let with = slot.ranges.iter().fold(plan, |plan, _| plan.range());
                if !journal.fits(with, shape) {
                    next_segment = journal.fits_fresh(with, shape);
                    break;
                }
                plan = with;
                pick_ranges(id, &slot.ranges, edge, &mut picks);
                continue;
            }
            let (whole, more) = pick_write(id, slot, edge, (journal, shape, plan, &mut picks));
            plan = more;
            if !whole || journal.reserved {
                next_segment = plan.entries == 0;
                break;
            }
        }
        journal.picks = picks;
        match (plan.entries, next_segment) {
            (0, true) => Planned::NextSegment,
            (0, false) => Planned::Nothing,
            _ => Planned::Batch(plan),
        }
    }

    /// Closes the open segment and opens another. False: none is free.
    pub(super) fn roll(&mut self, won: u64) -> bool {
        let journal = &mut self.journal;
        let Some(index) = self.segments.open(won) else {
            let again = std::mem::replace(&mut journal.stalled, true);
            count(&self.status.counters.stalls, u64::from(!again));
            return false;
        };
        journal.stalled = false;
        if let Some(last) = journal.filling.back_mut().filter(|last| !last.full) {
            last.full = true;
            self.segments.close(last.segment);
        }
        let sequence = self.segments.get(index).sequence;
        self.segments.set_salt(index, salt(self.roots.root.secret, journal.incarnation, sequence));
        let mut builder = journal.builders.pop().unwrap_or_default();
        builder.clear();
        journal.filling.push_back(Filling {
            segment: index,
            position: BLOCK_BYTES as u32,
            items_bytes: 0,
            builder,
            last_batch: 0,
            full: false,
        });
        true
    }

    /// Builds the planned batch and submits it.
    fn append(&mut self, plan: Plan, io: &mut dyn Io) {
        let journal = &mut self.journal;
        let index = journal.spare.pop().expect("there is a spare one");
        let picks = std::mem::take(&mut journal.picks);
        journal.number(&picks);
        let append = &mut journal.appends[index];
        append.plan = plan;
        append.requests.clear();
        append.marks.clear();
        append.failed = false;
        append.batch_bytes = plan.batch_bytes(journal.align);
        let first_won = journal.next_won;
        let mark_first = matches!(journal.pending.front(), Some(Pending::Mark(_)));
        let first_edge = !mark_first && picks.first().is_some_and(|pick| pick.edge);
        let epoch = journal.epoch + u64::from(first_edge);
        append.encoder.begin(plan, journal.align, (first_won, epoch));
        let mut at = HEADER + plan.data_start(journal.align) as usize;
        let mut picks_left = picks.iter();
        for _ in 0..plan.entries {
            if let Some(Pending::Mark(_)) = journal.pending.front() {
                let Some(Pending::Mark(name)) = journal.pending.pop_front() else { break };
                append.encoder.mark(name.as_bytes(), false);
                append.marks.push(name);
                continue;
            }
            let pick = picks_left.next().expect("an entry is a mark or was picked");
            let slot = &mut self.slots[pick.slot as usize];
            journal.epoch += u64::from(pick.edge);
            journal.edge &= !pick.edge;
            at = append.record(pick, slot, at);
            if !pick.continued {
                journal.next_won += 1;
            }
            if pick.last {
                append.requests.push((pick.slot, journal.next_won - 1));
                journal.pending.pop_front();
            }
        }
        let (data_end, end) = (at, HEADER + append.batch_bytes as usize);
        append.buffer.segment().part(data_end, end - data_end).zero();
        journal.picks = picks;
        journal.order.push_back(index);
        count(&self.status.counters.batches, 1);
        count(&self.status.counters.records, plan.entries.into());
        self.submit_append(index, io);
    }

    /// Gives the append its place in the open segment, seals and submits it.
    pub(super) fn submit_append(&mut self, index: usize, io: &mut dyn Io) {
        let drained_through = self.drained;
        let journal = &mut self.journal;
        let filling = journal.filling.back_mut().expect("a segment is open");
        let append = &mut journal.appends[index];
        let segment = *self.segments.get(filling.segment);
        append.segment = filling.segment;
        append.position = filling.position;
        append.sequence = journal.next_batch;
        append.durable = journal.strong;
        let link = BatchLink {
            salt: segment.salt,
            incarnation: journal.incarnation,
            sequence: journal.next_batch,
            previous_checksum: journal.previous_checksum,
            durable_through: journal.durable_through,
            drained_through,
        };
        let (bytes, checksum) = append.encoder.seal(link);
        append.checksum = checksum;
        let target = append.buffer.segment();
        let length = bytes.len();
        target.part(HEADER, length).copy_from(bytes);
        let data_start = append.plan.data_start(journal.align) as usize;
        target.part(HEADER + length, data_start - length).zero();
        let first = u64::from(append.position) == BLOCK_BYTES;
        if first {
            let batch = append.encoder.batch().header;
            let header = SegmentHeader {
                incarnation: journal.incarnation,
                salt: segment.salt,
                sequence: segment.sequence,
                previous: self.segments.before(filling.segment),
                first_batch: journal.next_batch,
                first_won: batch.first_won,
                epoch: batch.epoch,
                durable_through: journal.durable_through,
                drained_through,
                previous_checksum: journal.previous_checksum,
            };
            target.copy_from(&header.encode(&self.roots.root));
        }
        filling.position += append.batch_bytes;
        filling.items_bytes += item_bytes(append.plan.header_bytes);
        journal.next_batch += 1;
        journal.previous_checksum = checksum;
        let skip = if first { 0 } else { HEADER };
        let bytes = HEADER - skip + append.batch_bytes as usize;
        let offset =
            self.shape.segment_offset(append.segment) + u64::from(append.position) + skip as u64
                - BLOCK_BYTES;
        let segments = [target.part(skip, bytes)];
        let strong = append.durable;
        let durable = strong && !planted(Bug::AckBeforeFlush);
        let kind = if durable { OperationKind::WriteDurable } else { OperationKind::Write };
        self.segments.appending(append.segment);
        count(&self.status.counters.appended_bytes, bytes as u64);
        self.clean.policy.charge(bytes as u64);
        let write = Operation { kind, offset, length: bytes as u64, segments: &segments };
        let parts = self.submit_flash(write, Token::Append.pack(index as u32), io);
        self.journal.appends[index].under_way = parts;
    }

    /// A part of an append has been written.
    pub(super) fn append_completed(
        &mut self,
        index: u32,
        result: Result<(), Errno>,
        io: &mut dyn Io,
    ) {
        let append = &mut self.journal.appends[index as usize];
        append.under_way -= 1;
        append.failed |= result.is_err();
        if self.is_fenced() {
            return;
        }
        let ready = |append: &Append| append.under_way == 0 && !append.failed;
        while let Some(first) = self.journal.order.front().copied()
            && ready(&self.journal.appends[first])
        {
            self.journal.order.pop_front();
            self.journal.again = self.journal.again.map(|again| again - 1);
            self.counts(first, io);
            self.journal.spare.push(first);
        }
        self.fail_appends(io);
        self.answer(io);
    }

    /// A batch and all before it have been written: it counts.
    fn counts(&mut self, index: usize, io: &mut dyn Io) {
        let journal = &mut self.journal;
        let append = &mut journal.appends[index];
        let batch = append.encoder.batch();
        let base = self.shape.segment_offset(append.segment) + u64::from(append.position);
        for entry in batch.entries() {
            if entry.edge {
                journal.news.edges.push((entry.won.saturating_sub(1), entry.epoch - 1));
            }
            self.clean.overwritten(entry.start, entry.count, &mut self.reads);
            match entry.kind {
                Kind::Write => {
                    for piece in entry.pieces() {
                        self.index.insert(Piece {
                            start: piece.start,
                            count: piece.count,
                            skip: 0,
                            stored: piece.count,
                            position: (base + u64::from(piece.data)) / SECTOR_BYTES,
                            checksum: piece.checksum,
                        });
                    }
                }
                Kind::Discard | Kind::Zeroes => {
                    self.index.insert_zero(entry.start, entry.count, base / SECTOR_BYTES);
                }
                Kind::Mark => {}
            }
        }
        let header = batch.header;
        // Numbers that a crash undid are no writes: without a request that ends here nothing new.
        let ends = header.next_won > header.first_won;
        let whole = if ends { header.next_won - 1 } else { journal.counted_won };
        let last_won = if header.continued { header.next_won } else { whole };
        let end = append.position + append.batch_bytes;
        self.segments.grew(append.segment, end, last_won);
        let sequence = self.segments.get(append.segment).sequence;
        journal.counted_won = whole;
        journal.counted_end = (sequence, end);
        journal.counted_batch = append.sequence;
        journal.counted_checksum = append.checksum;
        journal.uncounted_bytes += u64::from(append.batch_bytes);
        journal.failures = 0;
        let filling = journal.filling.iter_mut().find(|other| other.segment == append.segment);
        let filling = filling.expect("a segment that is appended to is known");
        filling.builder.add(append.position, append.encoder.bytes());
        filling.last_batch = append.sequence;
        for (slot, won) in append.requests.drain(..) {
            journal.acks.push_back(Ack { won, slot });
        }
        // Of a group's points, the last that anybody has.
        let point = if journal.numbers.is_some() { header.next_won - 1 } else { whole };
        let named = append.marks.drain(..).map(|name| (name, point));
        journal.news.marks.extend(named);
        if append.durable && journal.durable_batch + 1 == append.sequence {
            let covered = journal.covered();
            self.durable(covered);
        } else if journal.strong {
            journal.flush_wanted = true;
        } else if journal.flush_due.is_none() {
            let at = io.now() + FLUSH_AFTER;
            journal.flush_due = Some(at);
            self.wake_at(at, io);
        }
        self.write_summaries(io);
        self.rewrite_more(io);
    }

    /// The log is durable that far, if it is not further already: a flush that began when all was
    /// durable may end after an append that was durable by itself.
    pub(super) fn durable(&mut self, covered: Covered) {
        let journal = &mut self.journal;
        if covered.batch < journal.durable_batch && !planted(Bug::FlushTakesBack) {
            assert_eq!(covered.bytes, 0, "what such a flush covered was durable before");
            return;
        }
        journal.durable_through = covered.won;
        journal.durable_batch = covered.batch;
        journal.news.bytes += covered.bytes;
        journal.news.durable = true;
        self.segments.durable(covered.end.0, covered.end.1);
    }

    /// Ends requests whose time has come.
    pub(super) fn answer(&mut self, io: &mut dyn Io) {
        let journal = &self.journal;
        let reached = match (self.mode, journal.strong) {
            (Mode::WriteThrough, _) if !planted(Bug::ThroughUndrained) => self.drained,
            (_, true) => journal.durable_through,
            (_, false) => journal.counted_won,
        };
        while let Some(ack) = self.journal.acks.front() {
            if ack.won > reached {
                return;
            }
            let slot = ack.slot;
            self.journal.acks.pop_front();
            self.end(slot, Outcome::Done, io);
        }
    }
}

/// The ranges of a discard as records of one request.
fn pick_ranges(
    slot: u32,
    ranges: &[crate::io::volume::SectorRange],
    edge: bool,
    picks: &mut Vec<Pick>,
) {
    for (range, sectors) in ranges.iter().enumerate() {
        let last = range + 1 == ranges.len();
        picks.push(Pick {
            slot,
            range,
            start: sectors.start,
            count: sectors.count,
            continued: !last,
            edge: edge && range == 0,
            last,
        });
    }
}

/// As much of a write as has room: whether that is all of it, and the plan with it.
fn pick_write(
    id: u32,
    slot: &super::core::Slot,
    edge: bool,
    (journal, shape, plan, picks): (&Journal, Shape, Plan, &mut Vec<Pick>),
) -> (bool, Plan) {
    let range = slot.range();
    let (mut done, mut plan, mut edge) = (slot.done, plan, edge);
    let unit = won_sectors_max(shape);
    while done < range.count {
        let start = range.start + done;
        // A very large write has several WONs.
        let rest = (unit - done % unit).min(range.count - done);
        let mut count = rest;
        if !journal.fits(plan.write(start, rest), shape) {
            let large = !journal.fits_fresh(Plan::default().write(start, rest), shape);
            if plan.entries > 0 || !large || !journal.fits(batch_full(start, shape), shape) {
                return (false, plan);
            }
            while count > 0 && !journal.fits(plan.write(start, count), shape) {
                count = less(start, count);
            }
        }
        assert!(count > 0, "a batch holds at least a block");
        done += count;
        plan = plan.write(start, count);
        let (continued, last) = (count < rest, done == range.count);
        picks.push(Pick { slot: id, range: 0, start, count, continued, edge, last });
        edge = false;
        // The number behind one that was given before may be another disk's by now.
        if continued || journal.reserved {
            return (last, plan);
        }
    }
    (true, plan)
}

/// The plan of about the largest batch, of one write.
fn batch_full(start: u64, shape: Shape) -> Plan {
    let blocks = shape.batch_bytes_max() / 2 / (BLOCK_SECTORS * SECTOR_BYTES);
    Plan::default().write(start, blocks * BLOCK_SECTORS)
}

/// A little less, so that it ends at a block's edge.
fn less(start: u64, count: u64) -> u64 {
    let end = (start + count - 1) / BLOCK_SECTORS * BLOCK_SECTORS;
    end.saturating_sub(start)
}

impl Append {
    /// Encodes a record and copies its data behind byte `at` of the buffer; where the next goes.
    fn record(&mut self, pick: &Pick, slot: &mut super::core::Slot, at: usize) -> usize {
        let kind = match slot.kind {
            Some(RequestKind::Write) => Kind::Write,
            Some(RequestKind::Discard | RequestKind::WriteZeroes { unmap: true }) => Kind::Discard,
            _ => Kind::Zeroes,
        };
        let whole = pick.last || pick.continued;
        // The parts of a very large write are told apart: only the last one stands for it.
        let origin = if whole { slot.origin } else { RecordOrigin::NONE };
        let (start, count) = (pick.start, pick.count);
        let (edge, continued) = (pick.edge, pick.continued);
        self.encoder.entry(EntryHead { kind, edge, continued, origin, start, count });
        if kind != Kind::Write {
            return at;
        }
        let skip = (start - slot.ranges[pick.range].start) * SECTOR_BYTES;
        let mut source = Cursor::new(&slot.segments, skip as usize);
        let target = self.buffer.segment();
        let mut piece = [0; PIECE_BYTES];
        let (mut sector, end, mut at) = (start, start + count, at);
        while sector < end {
            let sectors = (BLOCK_SECTORS - sector % BLOCK_SECTORS).min(end - sector);
            let bytes = &mut piece[..(sectors * SECTOR_BYTES) as usize];
            source.copy_to(bytes);
            self.encoder.checksum(piece_checksum(bytes));
            target.part(at, bytes.len()).copy_from(bytes);
            at += bytes.len();
            sector += sectors;
        }
        slot.done += count;
        at
    }
}
