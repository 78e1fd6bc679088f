//! The slot tables: written behind everybody's back, so that what is kept outlives the daemon.
//!
//! ```text
//! Idle → Pages → Flush → Flushing → Root → Idle
//! ```
//!
//! A *save* brings the tables on flash up to a point: pages that differ are written and flushed,
//! then a root says that the tables know of every write up to that point (*through*), and from
//! which segment on the log is needed to tell the rest. Recovery lays the log over the tables, and
//! trusts them only if the log begins before or at that point. So a save that is late or fails
//! costs warmth after a crash and nothing else.
//!
//! Invariants:
//! - T1 a root with a later *through* is written only when all that changed before it is on flash.
//! - T2 a slab that was sorted gives no slots before a root that knows it as one: until then its
//!   records are the log's.
//! - T3 a segment that was a slab is free only when its table says so, or no table counts.
//! - T4 a flush of the flash that fails may have cost any page since the one before, whoever asked
//!   for it: so all flushes are the log's, and after one that fails no table counts.
//! - T5 while writes pass the log by, no table counts: the epoch of the tables has moved on. A
//!   golden image is read alone: nothing passes, and its tables count while it is the same.

use super::slabs::SlotAt;
use super::table::{self, TableEntry, TablePlace};
use super::{Clean, Core};
use crate::base::clock::Nanos;
use crate::cache::core::Token;
use crate::cache::layout::{BLOCK_BYTES, SLOTS_PER_PAGE};
use crate::cache::roots::RootWish;
use crate::cache::status::count;
use crate::io::buffer::PinnedBuffer;
use crate::io::disk::{Errno, Operation, OperationKind};
use crate::io::volume::Io;
use std::time::Duration;

/// Pages under way at most.
const PAGES_MAX: usize = 16;

/// What is kept since the last save may be lost in a crash: this long at most, while it works.
const SAVE_EVERY: Duration = Duration::from_secs(5);

/// Sorted segments give slots after the next save: so often, at most.
const SAVE_SORTED_EVERY: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Step {
    #[default]
    Idle,
    Pages,
    /// Waits for the log's next flush, which is begun; and for its end.
    Flush,
    Flushing,
    Root,
}

/// A page being written.
struct Page {
    buffer: PinnedBuffer,
    under_way: u32,
    segment: u32,
    /// It ends the segment's table.
    ends: bool,
}

/// See the module.
#[derive(Default)]
pub(super) struct Save {
    step: Step,
    /// Of this one: the point, and the first segment of the log that is needed.
    through: u64,
    log_from: u64,
    /// The segment whose pages are looked at next.
    next: u32,
    pages: Vec<Option<Page>>,
    under_way: usize,
    /// Tables being ended.
    ending: usize,
    failed: bool,
    ended: Option<Nanos>,
    /// Somebody waits for the next one that begins.
    asked: bool,
    answers: bool,
    /// Sorted before it began, and since.
    fresh: Vec<u32>,
    fresh_next: Vec<u32>,
}

impl Save {
    /// A segment was sorted: the next save makes it a slab for good.
    pub(super) fn sorted(&mut self, segment: u32) {
        self.fresh_next.push(segment);
    }

    /// A page of the segment's table is being written.
    pub(super) fn writes(&self, segment: u32) -> bool {
        self.pages.iter().flatten().any(|page| page.segment == segment)
    }

    /// The segment is no slab any more.
    pub(super) fn forget(&mut self, segment: u32) {
        self.fresh.retain(|other| *other != segment);
        self.fresh_next.retain(|other| *other != segment);
    }
}

impl Clean {
    /// A save waits for a flush of the flash.
    pub(in crate::cache) fn wants_flush(&self) -> bool {
        self.save.step == Step::Flush
    }

    /// A flush has been begun that covers what was written.
    pub(in crate::cache) fn flush_begun(&mut self) {
        if self.wants_flush() {
            self.save.step = Step::Flushing;
        }
    }

    /// No table counts any more: slabs give their slots at once, and all pages are to be written.
    pub(in crate::cache) fn forget_tables(&mut self) {
        let save = &mut self.save;
        let fresh: Vec<u32> = save.fresh.drain(..).chain(save.fresh_next.drain(..)).collect();
        fresh.into_iter().for_each(|segment| self.slabs.end_sorting(segment));
        self.slabs.forget_tables();
    }
}

impl Core {
    /// Whether tables may count: every write is in the log, or there is none.
    pub(in crate::cache) fn keeps_tables(&self) -> bool {
        self.mode.tells_all(self.golden) && !self.switching && !self.is_fenced()
    }

    /// Somebody wants all that is kept to outlive the daemon. False: that cannot be.
    pub(in crate::cache) fn ask_save(&mut self) -> bool {
        let can = self.keeps_tables();
        self.clean.save.asked |= can;
        can
    }

    /// Goes on with the save under way, or begins one whose time has come.
    pub(in crate::cache) fn save(&mut self, io: &mut dyn Io) {
        match self.clean.save.step {
            Step::Idle => self.begin_save(io),
            Step::Pages => {}
            Step::Flush | Step::Flushing | Step::Root => return,
        }
        if self.clean.save.step == Step::Pages {
            self.write_pages(io);
        }
    }

    fn begin_save(&mut self, io: &mut dyn Io) {
        let save = &self.clean.save;
        let wanted = save.asked || !save.fresh_next.is_empty() || self.clean.slabs.is_dirty();
        if !wanted || !self.keeps_tables() {
            if wanted && std::mem::take(&mut self.clean.save.asked) {
                self.write_root(RootWish::Checkpoint, io);
            }
            return;
        }
        let now = io.now();
        let every = if save.fresh_next.is_empty() { SAVE_EVERY } else { SAVE_SORTED_EVERY };
        let due = save.ended.map_or(now, |ended| ended + every).max(self.clean.rest.until());
        if due > now && !save.asked {
            return self.wake_at(due, io);
        }
        let (through, log_from) = (self.journal.durable_through, self.segments.log_from());
        let save = &mut self.clean.save;
        (save.through, save.log_from) = (through, log_from);
        (save.step, save.next, save.failed) = (Step::Pages, 0, false);
        save.answers = std::mem::take(&mut save.asked);
        save.fresh.append(&mut save.fresh_next);
    }

    fn write_pages(&mut self, io: &mut dyn Io) {
        while self.clean.save.under_way < PAGES_MAX && !self.clean.save.failed {
            let Some((segment, page)) = self.clean.slabs.next_dirty(self.clean.save.next) else {
                self.clean.save.next = u32::MAX;
                break;
            };
            self.clean.save.next = segment;
            self.write_page(segment, page, io);
        }
        let save = &mut self.clean.save;
        let done = save.next == u32::MAX || save.failed;
        if !done || save.under_way > 0 || save.ending > 0 {
            return;
        }
        if save.failed {
            return self.fail_save(io);
        }
        save.step = Step::Flush;
        self.flush_if_due(io);
    }

    fn write_page(&mut self, segment: u32, page: u32, io: &mut dyn Io) {
        let slabs = &self.clean.slabs;
        let first = page * SLOTS_PER_PAGE;
        let last = slabs.slots().min(first + SLOTS_PER_PAGE);
        let mut entries = Vec::new();
        for slot in first..last {
            let at = SlotAt { segment, slot };
            let Some(block) = slabs.owner(at) else { continue };
            let position = slabs.position(at);
            let Some(piece) = self.index.whole(block).filter(|piece| piece.position == position)
            else {
                continue;
            };
            let uses = self.index.mark(block).map_or(0, |mark| mark.uses());
            entries.push(TableEntry { slot, block, checksum: piece.checksum, uses });
        }
        let epoch = self.roots.root.slab_epoch;
        let place = TablePlace { epoch, segment, page, life: slabs.life(segment) };
        let bytes = table::encode(place, &entries, self.roots.root.secret);
        self.clean.slabs.clean(segment, page);
        self.submit_page((segment, page), &bytes, false, io);
        self.clean.save.under_way += 1;
    }

    fn submit_page(
        &mut self,
        (segment, page): (u32, u32),
        bytes: &[u8],
        ends: bool,
        io: &mut dyn Io,
    ) {
        let buffer = PinnedBuffer::new(BLOCK_BYTES as usize);
        buffer.segment().copy_from(bytes);
        let segments = [buffer.segment()];
        let pages = &mut self.clean.save.pages;
        let number = pages.iter().position(Option::is_none).unwrap_or_else(|| {
            pages.push(None);
            pages.len() - 1
        });
        let offset = self.shape.table_offset(segment, page);
        let (kind, length) = (OperationKind::Write, BLOCK_BYTES);
        let write = Operation { kind, offset, length, segments: &segments };
        self.clean.policy.charge(length);
        count(&self.status.counters.kept_bytes, length);
        let under_way = self.submit_flash(write, Token::Table.pack(number as u32), io);
        self.clean.save.pages[number] = Some(Page { buffer, under_way, segment, ends });
    }

    /// The segment is no slab any more. True: its table says so, or will have said so when
    /// [`Self::table_ended`] is called.
    pub(super) fn end_table(&mut self, segment: u32, io: &mut dyn Io) -> bool {
        if !self.clean.slabs.has_table(segment) {
            return false;
        }
        let epoch = self.roots.root.slab_epoch;
        let place = TablePlace { epoch, segment, page: 0, life: 0 };
        let bytes = table::encode(place, &[], self.roots.root.secret);
        self.submit_page((segment, 0), &bytes, true, io);
        self.clean.save.ending += 1;
        true
    }

    /// A part of a page has been done.
    pub(in crate::cache) fn table_completed(
        &mut self,
        number: u32,
        result: Result<(), Errno>,
        io: &mut dyn Io,
    ) {
        let save = &mut self.clean.save;
        save.failed |= result.is_err();
        let page = save.pages[number as usize].as_mut().expect("a page was under way");
        page.under_way -= 1;
        if page.under_way > 0 {
            return;
        }
        let page = save.pages[number as usize].take().expect("it was just seen");
        drop(page.buffer);
        match page.ends {
            true => {
                save.ending -= 1;
                if result.is_err() {
                    self.move_on(io);
                }
                self.table_ended(page.segment);
            }
            false => save.under_way -= 1,
        }
    }

    /// A flush of the flash has ended.
    pub(in crate::cache) fn flushed_tables(&mut self, good: bool, io: &mut dyn Io) {
        let waits = self.clean.save.step == Step::Flushing;
        match good {
            true if waits => self.flushed_pages(io),
            true => {}
            false if waits => self.fail_save(io),
            false => self.move_on(io),
        }
    }

    fn flushed_pages(&mut self, io: &mut dyn Io) {
        if !self.keeps_tables() {
            return self.fail_save(io);
        }
        let save = &mut self.clean.save;
        save.step = Step::Root;
        let root = &mut self.roots.root;
        root.slabs_through = save.through;
        root.clean_from = root.clean_from.max(save.log_from);
        self.write_root(RootWish::Tables, io);
    }

    /// The root is durable.
    pub(in crate::cache) fn saved(&mut self, io: &mut dyn Io) {
        for segment in std::mem::take(&mut self.clean.save.fresh) {
            self.clean.slabs.end_sorting(segment);
        }
        self.end_save(io);
    }

    pub(in crate::cache) fn end_save(&mut self, io: &mut dyn Io) {
        let save = &mut self.clean.save;
        save.step = Step::Idle;
        save.ended = Some(io.now());
        if std::mem::take(&mut save.answers) {
            self.write_root(RootWish::Checkpoint, io);
        }
    }

    /// Something of the tables could not be written: none counts until all are written anew.
    fn fail_save(&mut self, io: &mut dyn Io) {
        self.move_on(io);
        self.end_save(io);
    }

    fn move_on(&mut self, io: &mut dyn Io) {
        if !self.is_fenced() {
            log::warn!("{}: the tables of the clean cache cannot be written", self.name);
            self.roots.root.slab_epoch += 1;
            self.write_root(RootWish::Cold, io);
        }
        self.clean.forget_tables();
    }
}
