//! Room: drained segments become slabs, and slabs are emptied when the log needs segments.
//!
//! All of it goes step by step, so that no step takes long. Nobody waits for it: when no segment
//! is free, a slab is dropped as it is (C4).

use super::fill::Moving;
use super::slabs::SlotAt;
use super::{Core, capacity, reserve};
use crate::base::clock::Nanos;
use crate::cache::index::Swept;
use crate::cache::segment::SegmentState;
use crate::cache::status::count;
use crate::io::volume::Io;
use std::time::Duration;

/// Entries of the index that one step of a sorting looks at.
const SORT_STEP: usize = 512;

/// From one such step to the next, so that requests have nine tenths of the time; the log that runs
/// out of segments does not wait for it.
const SORT_PAUSE: Duration = Duration::from_micros(200);

/// Slots of a slab that one step empties.
const LEAVE_STEP: u32 = 256;

/// Blocks that one step drops when the index runs out of memory.
const RECLAIM_STEP: usize = 256;

/// Drained segments are sorted when there are as many as the reserve, so that what is overwritten
/// there is free soon, and at the latest when there are so many: all of the index is swept for it,
/// and after a crash the log is read from the oldest of them on.
const UNSORTED_MAX: u64 = 128;

impl Core {
    /// Gives up what is clean when free segments or the index's memory run short.
    pub(in crate::cache) fn make_room(&mut self, io: &mut dyn Io) {
        self.clean.policy.tick(io.now());
        self.tidy_slots();
        self.write_summaries(io);
        self.sort(io.now());
        self.empty(io);
        // A cache that is to be smaller holds less in time.
        let most = capacity(self.shape, &self.clean.slabs);
        let much = self.index.is_full() || self.clean.policy.len() > most;
        let reclaims = much && self.reclaim();
        self.tidy_slots();
        self.save(io);
        let leaves = self.clean.leaving.is_some() || self.is_leaving();
        let soon = io.now() + Duration::from_micros(50);
        if leaves || reclaims {
            self.wake_at(soon, io);
        } else if self.segments.is_sorting() {
            self.wake_at(soon.max(self.clean.sort_at), io);
        }
    }

    /// A slab is being emptied: it ends when the last read there has.
    pub(in crate::cache) fn is_emptying(&self) -> bool {
        self.clean.leaving.is_some()
    }

    /// The log may run out of free segments soon.
    fn is_scarce(&self) -> bool {
        self.segments.coming() < reserve(self.shape)
    }

    /// A slab is behind the end that the allocation is to have.
    fn is_leaving(&self) -> bool {
        self.segments.leaving() > 0 && self.clean.slabs.leaver().is_some()
    }

    /// Drops blocks, since each takes memory in the index. False: there is none.
    fn reclaim(&mut self) -> bool {
        for dropped in 0..RECLAIM_STEP {
            let (policy, mut marks) = self.policy();
            let Some(block) = policy.reclaim(&mut marks) else { return dropped > 0 };
            marks.index.drop_block(block);
        }
        true
    }

    /// Goes on with making slabs of drained segments.
    fn sort(&mut self, now: Nanos) {
        if now < self.clean.sort_at && !self.is_scarce() {
            return;
        }
        if !self.segments.is_sorting() {
            let most = reserve(self.shape).min(UNSORTED_MAX);
            let short = self.index.is_full()
                || self.segments.is_leaving_unsorted()
                || (self.is_scarce() && self.clean.slabs.victim(true).is_none());
            if self.segments.unsorted() < most && !short {
                return;
            }
            // The end of a slab is its table's.
            let journal = &self.journal;
            if !self.segments.begin_sorting(|segment| !journal.summarises(segment)) {
                return;
            }
            self.clean.cursor = 0;
            for segment in self.segments.sorting() {
                self.clean.slabs.begin_sorting(*segment);
            }
        }
        self.clean.sort_at = now + SORT_PAUSE;
        let mut found = std::mem::take(&mut self.clean.found);
        let (segments, slabs) = (&self.segments, &self.clean.slabs);
        let mut looked = 0;
        let keep = |Swept { whole, position }| {
            looked += 1;
            let Some(segment) = segments.of_position(position) else { return true };
            if segments.get(segment).state != SegmentState::Sorting {
                return true;
            }
            let slot = whole.zip(slabs.place(segment, position));
            found.extend(slot);
            slot.is_some()
        };
        let done = self.index.sweep(&mut self.clean.cursor, SORT_STEP, keep);
        count(&self.status.counters.swept, looked);
        for (block, at) in found.drain(..) {
            let position = self.clean.slabs.position(at);
            // It may have been seen before, or dropped for one of those before.
            let there = self.index.whole(block).is_some_and(|piece| piece.position == position);
            if there && self.clean.slabs.owner(at).is_none() {
                self.clean.slabs.give(at, block);
                let (policy, mut marks) = self.policy();
                policy.drained(block, &mut marks);
                self.evict();
            }
        }
        self.clean.found = found;
        if done {
            let waits = self.keeps_tables();
            for segment in self.segments.sorting() {
                self.clean.slabs.sorted(*segment);
                match waits {
                    true => self.clean.save.sorted(*segment),
                    false => self.clean.slabs.end_sorting(*segment),
                }
            }
            self.segments.end_sorting();
        }
    }

    /// Goes on with emptying a slab, or begins with one, if the log needs segments.
    fn empty(&mut self, io: &mut dyn Io) {
        let (free, reserve) = (self.segments.counts().free, reserve(self.shape));
        let hurry = self.journal.stalled || free < reserve / 4;
        let leaver = if self.segments.leaving() > 0 { self.clean.slabs.leaver() } else { None };
        if self.clean.leaving.is_none() && (leaver.is_some() || self.is_scarce()) {
            let victim = leaver.or_else(|| self.clean.slabs.victim(free <= reserve / 2));
            let Some(segment) = victim else { return };
            self.segments.empty(segment);
            self.clean.slabs.leave(segment);
            self.clean.leaving = Some(SlotAt { segment, slot: 0 });
        }
        let Some(mut at) = self.clean.leaving else { return };
        let slots = self.clean.slabs.slots();
        let end = if hurry { slots } else { slots.min(at.slot + LEAVE_STEP) };
        while at.slot < end && self.leaves(at, hurry, io) {
            at.slot += 1;
        }
        self.clean.leaving = Some(at);
        if at.slot < slots {
            return;
        }
        self.tidy_slots();
        if (hurry || !self.is_filling()) && self.clean.slabs.live_of(at.segment) > 0 {
            // Moves that failed; and nobody waits for those under way.
            (0..slots).for_each(|slot| self.drop_slot(SlotAt { slot, ..at }));
            self.tidy_slots();
        }
        let empty = self.clean.slabs.live_of(at.segment) == 0;
        let busy = self.segments.is_pinned(at.segment) || self.clean.save.writes(at.segment);
        if empty && !busy {
            self.clean.leaving = None;
            if !self.end_table(at.segment, io) {
                self.table_ended(at.segment);
            }
        }
    }

    /// Nothing on flash says that the segment is a slab (T3): the log may have it.
    pub(super) fn table_ended(&mut self, segment: u32) {
        self.clean.slabs.end(segment);
        self.clean.save.forget(segment);
        self.segments.emptied(segment);
        count(&self.status.counters.retired, 1);
    }

    /// Moves or drops what a slot holds. False: later. What was used moves in any case; what was
    /// not goes with its slab if that is old, for then the policy's hand would have come to it.
    fn leaves(&mut self, at: SlotAt, hurry: bool, io: &mut dyn Io) -> bool {
        let Some(block) = self.clean.slabs.owner(at) else { return true };
        let position = self.clean.slabs.position(at);
        let piece = self.index.whole(block).filter(|piece| piece.position == position);
        let used = self.index.mark(block).is_some_and(|mark| mark.uses() > 0);
        let slabs = &mut self.clean.slabs;
        let worth = used || (slabs.is_young(at.segment) && slabs.has_room());
        if let Some(piece) = piece.filter(|_| worth && !hurry) {
            match self.begin_move(block, piece, io) {
                Moving::Begun => return true,
                Moving::Later => return false,
                Moving::Never => {}
            }
        }
        self.drop_slot(at);
        true
    }

    fn drop_slot(&mut self, at: SlotAt) {
        let Some(block) = self.clean.slabs.owner(at) else { return };
        let position = self.clean.slabs.position(at);
        let pieces: Vec<_> =
            self.index.pieces_of(block).filter(|piece| piece.position == position).collect();
        count(&self.status.counters.squeezed, u64::from(!pieces.is_empty()));
        pieces.into_iter().for_each(|piece| self.index.forget(piece));
    }

    /// Writes wait for space that only draining can give.
    pub(in crate::cache) fn is_short(&self) -> bool {
        let full = self.segments.drained_or_free() == 0;
        !self.journal.is_idle() && (full || self.index.is_full())
    }
}
