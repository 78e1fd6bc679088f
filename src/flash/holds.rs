//! Holds: ranges of a volume on which nothing new may start. A hold is granted when what was under
//! way there has ended, in the order in which holds were asked for (V2, V3 of `volume.rs`).

use super::volume::{FlashVolume, Slot};
use crate::base::units::SECTOR_BYTES;
use crate::io::volume::Io;
use std::sync::atomic::Ordering;

/// Sectors on which nothing new may start.
pub(super) struct Hold {
    pub first: u64,
    pub end: u64,
    pub owner: Owner,
    /// Pieces under way and older holds that overlap; at zero the hold is granted.
    pub blockers: u32,
}

pub(super) enum Owner {
    Task(u32),
    /// Taken by `grant` when it is called.
    Shrink(Option<Box<dyn FnOnce() + Send>>),
}

impl FlashVolume {
    pub(super) fn is_held(&self, first: u64, end: u64) -> bool {
        self.holds.iter().any(|hold| hold.first < end && first < hold.end)
    }

    /// Nothing is under way any more on the slot's sectors.
    pub(super) fn piece_ended(&mut self, id: u32) {
        let slot = &mut self.slots[id as usize];
        let (first, end) = (slot.first, slot.end);
        (slot.first, slot.end) = (0, 0);
        if self.holds.is_empty() || std::mem::take(&mut slot.held) {
            return;
        }
        for hold in self.holds.iter_mut().filter(|hold| hold.first < end && first < hold.end) {
            hold.blockers -= 1;
        }
    }

    /// Asks that nothing new starts on `first..end`; granted when what is there has ended.
    pub(super) fn hold(&mut self, first: u64, end: u64, owner: Owner) {
        let overlaps = |from: u64, to: u64| from < end && first < to;
        let under_way =
            |slot: &&Slot| slot.pending > 0 && !slot.held && overlaps(slot.first, slot.end);
        let pieces = self.slots.iter().filter(under_way).count();
        let older = self.holds.iter().filter(|hold| overlaps(hold.first, hold.end)).count();
        self.holds.push(Hold { first, end, owner, blockers: (pieces + older) as u32 });
    }

    /// Lets go of the task's hold.
    pub(super) fn release(&mut self, id: u32) {
        let mine = |hold: &Hold| matches!(hold.owner, Owner::Task(owner) if owner == id);
        let Some(index) = self.holds.iter().position(mine) else { return };
        self.release_at(index);
    }

    /// Shrinks that wait are not wanted any more.
    pub(super) fn give_up_shrinks(&mut self) {
        let shrinks = |hold: &Hold| matches!(hold.owner, Owner::Shrink(_));
        while let Some(index) = self.holds.iter().position(shrinks) {
            self.release_at(index);
        }
    }

    fn release_at(&mut self, index: usize) {
        let gone = self.holds.remove(index);
        let younger = self.holds[index..].iter_mut();
        for hold in younger.filter(|hold| hold.first < gone.end && gone.first < hold.end) {
            hold.blockers -= 1;
        }
        self.retry = true;
    }

    /// Grants holds whose time has come and tries parked tasks again, until nothing moves.
    pub(super) fn settle(&mut self, io: &mut dyn Io) {
        loop {
            let ready = |hold: &Hold| match &hold.owner {
                Owner::Task(id) => hold.blockers == 0 && !self.slots[*id as usize].held,
                Owner::Shrink(_) => hold.blockers == 0,
            };
            if let Some(index) = self.holds.iter().position(ready) {
                self.grant(index, io);
            } else if std::mem::take(&mut self.retry) {
                for id in std::mem::take(&mut self.parked) {
                    self.resume(id, io);
                }
            } else {
                return self.note_waiting();
            }
        }
    }

    /// Parked tasks are tried again in their order, so the first waits longest.
    fn note_waiting(&self) {
        let oldest = self.parked.first().and_then(|id| self.slots[*id as usize].task.as_ref());
        let since = oldest.and_then(|task| task.parked_at).unwrap_or_default();
        self.counters.waiting_since.store(since.0, Ordering::Relaxed);
        self.counters.waiting.store(self.parked.len() as u64, Ordering::Relaxed);
    }

    fn grant(&mut self, index: usize, io: &mut dyn Io) {
        let hold = &mut self.holds[index];
        match &mut hold.owner {
            Owner::Task(id) => {
                let id = *id;
                self.slots[id as usize].held = true;
                self.granted(id, io);
            }
            Owner::Shrink(done) => {
                let done = done.take();
                let sectors = hold.first;
                self.set_size(sectors * SECTOR_BYTES);
                self.release_at(index);
                if let Some(done) = done {
                    done();
                }
            }
        }
    }
}
