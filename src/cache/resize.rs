//! Another size of the allocation, step by step while the disk serves; what it holds stays.
//!
//! ```text
//! Settle → Leave → Root → Given     shrink: what lies behind the new end is drained and forgotten
//! Root                              growth: what is new can be used as soon as the root says so
//! ```
//!
//! The pool grows an allocation before the disk hears of it, and takes extents back after the disk
//! has told that it is done with them. So the allocation is never smaller than any root says, and
//! an opening after a crash uses all of it: the old size or the new one (FORMAT.md, "If power fails
//! here").

use super::disk::CachedDisk;
use super::journal::Pending;
use super::layout::{ROOTS_BYTES, SEGMENTS_MIN, Shape};
use super::message::Reply;
use super::place::Place;
use super::recover::index_bytes;
use super::root::LogEnd;
use super::roots::RootWish;
use crate::base::planted::{Bug, planted};
use crate::base::units::Bytes;
use crate::base::{Error, ErrorKind, Result};
use crate::io::volume::Io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// A write that has a part in the log is finished: its other parts were measured by the
    /// present size.
    Settle,
    /// Segments behind the new end are drained and forgotten.
    Leave,
    /// Both places of the root get the new size.
    Root,
    /// The disk is done; the pool takes the rest back.
    Given,
}

/// A resize under way.
pub(super) struct Resizing {
    to: Shape,
    /// Of an allocation that has grown.
    place: Option<Place>,
    step: Step,
    /// Roots that have been begun.
    roots: u32,
    /// A drain was asked for and has not been answered.
    drains: Arc<AtomicBool>,
    reply: Option<Reply<Result<()>>>,
}

impl Resizing {
    fn new(to: Shape, place: Option<Place>, step: Step, reply: Reply<Result<()>>) -> Self {
        Self { to, place, step, roots: 0, drains: Arc::default(), reply: Some(reply) }
    }

    /// The size that the disk is being brought to.
    pub(super) fn to_bytes(&self) -> u64 {
        self.to.allocation_bytes
    }

    fn is_leaving(&self) -> bool {
        matches!(self.step, Step::Settle | Step::Leave)
    }
}

impl CachedDisk {
    pub(super) fn begin_grow(&mut self, place: Place, reply: Reply<Result<()>>) {
        let now = self.core.segments.shape();
        let to = Shape::with(place.size_bytes(), now.segment_bytes);
        let to = to.and_then(|to| match to.allocation_bytes >= now.allocation_bytes {
            true => Ok(to),
            false => Err(self.invalid("it is larger already")),
        });
        match to.and_then(|to| self.make_way().map(|()| to)) {
            Ok(to) => self.resizing = Some(Resizing::new(to, Some(place), Step::Root, reply)),
            Err(error) => reply(Err(error)),
        }
    }

    pub(super) fn begin_shrink(&mut self, size_bytes: u64, reply: Reply<Result<()>>) {
        match self.smaller(size_bytes).and_then(|to| self.make_way().map(|()| to)) {
            Ok(to) => {
                self.core.settling = true;
                self.resizing = Some(Resizing::new(to, None, Step::Settle, reply));
            }
            Err(error) => reply(Err(error)),
        }
    }

    fn smaller(&self, size_bytes: u64) -> Result<Shape> {
        let now = self.core.segments.shape();
        let least = ROOTS_BYTES + SEGMENTS_MIN * now.segment_bytes;
        if size_bytes > now.allocation_bytes {
            return Err(self.invalid("it is smaller already"));
        }
        Shape::with(size_bytes, now.segment_bytes).map_err(|_| {
            let text = format!(
                "it cannot have {}: its log has segments of {}, and the least that it works with \
                 is {}",
                Bytes(size_bytes),
                Bytes(now.segment_bytes),
                Bytes(least.next_multiple_of(ROOTS_BYTES))
            );
            self.invalid(&text)
        })
    }

    fn invalid(&self, text: &str) -> Error {
        Error::new(ErrorKind::Invalid, format!("{}: {text}", self.core.name))
    }

    /// Whoever wants another size now has it: a shrink that has taken nothing away yet ends.
    fn make_way(&mut self) -> Result<()> {
        let busy = |text: &str| Error::new(ErrorKind::Busy, text);
        if self.core.is_fenced() || self.is_closed() {
            let text = format!("{}: it serves no more", self.core.name);
            return Err(Error::new(ErrorKind::Fenced, text));
        }
        match &self.resizing {
            Some(resizing) if resizing.is_leaving() => {
                let text = format!("{}: another size was asked for meanwhile", self.core.name);
                self.stay(busy(&text));
                Ok(())
            }
            Some(_) => {
                let text = format!("{}: it is being resized: try again", self.core.name);
                Err(busy(&text))
            }
            None => Ok(()),
        }
    }

    /// The resize ends before it has changed anything that lasts.
    fn stay(&mut self, why: Error) {
        let Some(mut resizing) = self.resizing.take() else { return };
        let core = &mut self.core;
        (core.settling, core.frozen) = (false, false);
        core.shape = core.segments.shape();
        core.segments.limit(core.shape.segments() as u32);
        core.limit_clean(core.shape.segments() as u32);
        if let Some(reply) = resizing.reply.take() {
            reply(Err(why));
        }
    }

    /// Goes on with the resize under way, as far as it can.
    pub(super) fn resize(&mut self, io: &mut dyn Io) {
        let Some(step) = self.resizing.as_ref().map(|resizing| resizing.step) else { return };
        if step == Step::Given {
            return;
        }
        if self.core.is_fenced() || self.is_closed() {
            let text = format!("{}: fenced or detached meanwhile", self.core.name);
            return self.stay(Error::new(ErrorKind::Fenced, text));
        }
        match step {
            Step::Settle => self.resize_settles(io),
            Step::Leave => self.resize_leaves(io),
            Step::Root => self.resize_root(io),
            Step::Given => {}
        }
    }

    fn resize_settles(&mut self, io: &mut dyn Io) {
        let Some(resizing) = &mut self.resizing else { return };
        let core = &mut self.core;
        let begun = core.journal.pending.front().is_some_and(|pending| match pending {
            Pending::Request(id) => core.slots[*id as usize].done > 0,
            Pending::Mark(_) => false,
        });
        if begun {
            return;
        }
        core.settling = false;
        core.shape = resizing.to;
        core.segments.limit(resizing.to.segments() as u32);
        core.limit_clean(resizing.to.segments() as u32);
        if core.journal.filling.back().is_some_and(|last| core.segments.leaves(last.segment)) {
            core.close_filling(io);
        }
        resizing.step = Step::Leave;
        self.resize_leaves(io);
    }

    fn resize_leaves(&mut self, io: &mut dyn Io) {
        let Some(resizing) = &mut self.resizing else { return };
        let segments = &self.core.segments;
        if segments.leaving() == 0 {
            resizing.step = Step::Root;
            return self.resize_root(io);
        }
        if !segments.is_leaving_dirty() || resizing.drains.swap(true, Ordering::Acquire) {
            return;
        }
        // What has no place yet gets one that stays.
        let drains = resizing.drains.clone();
        let reply = Box::new(move |_| drains.store(false, Ordering::Release));
        self.core.journal.flush_wanted |= !self.core.journal.is_durable();
        let (drainer, mut host) = self.drainer(io);
        drainer.drain(None, false, reply, &mut host);
    }

    fn resize_root(&mut self, io: &mut dyn Io) {
        let changing = self.is_changing();
        let Some(resizing) = &mut self.resizing else { return };
        let core = &mut self.core;
        let shrinks = resizing.place.is_none();
        let empty = shrinks && core.segments.counts().dirty == 0;
        if resizing.roots > 0 || changing || (empty && !core.journal.order.is_empty()) {
            return;
        }
        if shrinks && !empty && !core.segments.is_told() {
            // What was begun comes to be durable.
            core.journal.flush_wanted |= !core.journal.is_durable();
            return;
        }
        if shrinks {
            core.renew_tables();
        }
        let root = &mut core.roots.root;
        root.shape = resizing.to;
        if empty && !planted(Bug::ShrinkForgetsNumbers) {
            // No header is left that says how far the numbers have come: the root does, as it does
            // at an opening.
            let journal = &mut core.journal;
            core.frozen = true;
            journal.incarnation += 1;
            journal.edge = true;
            root.incarnation = journal.incarnation;
            root.next_won = journal.next_won;
            root.next_epoch = journal.epoch + 1;
            root.end = LogEnd {
                segment: core.segments.next_sequence() - 1,
                batch: journal.next_batch,
                checksum: journal.previous_checksum,
            };
        }
        resizing.roots = 1;
        core.write_root(RootWish::Resize, io);
    }

    /// A root with the new size is durable.
    pub(super) fn resize_rooted(&mut self, io: &mut dyn Io) {
        let Some(resizing) = &mut self.resizing else { return };
        let core = &mut self.core;
        if resizing.roots == 1 {
            // In both places, so that no older root can come up again.
            resizing.roots = 2;
            return core.write_root(RootWish::Resize, io);
        }
        self.resized();
    }

    /// The flash refuses the root. An opening uses all of an allocation that has grown, and the
    /// next root says so; one that is to shrink stays, since no root may say more than there is.
    pub(super) fn resize_refused(&mut self) {
        let Some(resizing) = &self.resizing else { return };
        if resizing.place.is_some() {
            self.core.roots.root.shape = resizing.to;
            return self.resized();
        }
        self.stay(self.core.refused_by_flash("its cache keeps its size"));
    }

    /// The other size is in force.
    fn resized(&mut self) {
        let Some(resizing) = &mut self.resizing else { return };
        let core = &mut self.core;
        let to = resizing.to;
        core.frozen = false;
        core.shape = to;
        core.segments.reshape(to);
        core.reshape_clean(to);
        core.index.set_limit(index_bytes(to.allocation_bytes));
        let reply = resizing.reply.take();
        match resizing.place.take() {
            Some(place) => {
                core.place = place;
                self.resizing = None;
            }
            None => {
                core.place = core.place.truncated(to.allocation_bytes);
                resizing.step = Step::Given;
            }
        }
        if let Some(reply) = reply {
            reply(Ok(()));
        }
    }
}

#[cfg(test)]
#[path = "resize_test.rs"]
mod tests;
