//! Probation: the newest misses, whose data waits in memory for a second use.
//!
//! Slots are reused in turn, so the list is first-in first-out; the caller keeps one 4 KiB buffer a
//! slot. A use while a block is among the younger half counts as part of the same access (the
//! correlation window of Clock2Q+): guests read one block in several requests.

use super::mix;
use std::ops::Range;

const FREE: u64 = u64::MAX;
const NO_SLOT: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Slot {
    block: u64,
    used: bool,
    sequential: bool,
}

const EMPTY: Slot = Slot { block: FREE, used: false, sequential: false };

/// A block that had to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Leaver {
    pub block: u64,
    /// Used again outside the correlation window.
    pub used: bool,
    /// It came in a sequential run.
    pub sequential: bool,
}

/// See the module.
#[derive(Default)]
pub(super) struct Probation {
    slots: Vec<Slot>,
    /// Open addressing, a power of two of at least twice the slots.
    table: Vec<u32>,
    /// The slot that is used next: the oldest.
    next: usize,
}

impl Probation {
    pub(super) fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Changes the number of slots; blocks in slots that go away are told to `leave`.
    pub(super) fn resize(&mut self, slots: usize, mut leave: impl FnMut(Leaver)) {
        let slots = slots.max(1);
        for slot in self.slots.iter().skip(slots).filter(|slot| slot.block != FREE) {
            leave(slot.leaver());
        }
        self.slots.resize(slots, EMPTY);
        self.next %= slots;
        self.table = vec![NO_SLOT; (slots * 2).next_power_of_two()];
        for slot in 0..slots {
            if self.slots[slot].block != FREE {
                self.link(slot);
            }
        }
    }

    fn link(&mut self, slot: usize) {
        let mask = self.table.len() - 1;
        let mut at = mix(self.slots[slot].block) as usize & mask;
        while self.table[at] != NO_SLOT {
            at = (at + 1) & mask;
        }
        self.table[at] = slot as u32;
    }

    /// Position in the table.
    fn find(&self, block: u64) -> Option<usize> {
        let mask = self.table.len() - 1;
        let mut at = mix(block) as usize & mask;
        loop {
            match self.table[at] {
                NO_SLOT => return None,
                slot if self.slots[slot as usize].block == block => return Some(at),
                _ => at = (at + 1) & mask,
            }
        }
    }

    /// Takes an entry out of the table and closes the gap.
    fn unlink(&mut self, mut gap: usize) {
        let mask = self.table.len() - 1;
        let mut at = gap;
        loop {
            at = (at + 1) & mask;
            let slot = self.table[at];
            if slot == NO_SLOT {
                break;
            }
            let home = mix(self.slots[slot as usize].block) as usize & mask;
            // It may move if its home is not between the gap and where it is.
            if (at.wrapping_sub(home) & mask) >= (at.wrapping_sub(gap) & mask) {
                self.table[gap] = slot;
                gap = at;
            }
        }
        self.table[gap] = NO_SLOT;
    }

    /// A read: the block's slot, if it is here.
    pub(super) fn touch(&mut self, block: u64) -> Option<u32> {
        let slot = self.table[self.find(block)?];
        let age = (self.next + self.slots.len() - 1 - slot as usize) % self.slots.len();
        if age >= self.slots.len() / 2 {
            self.slots[slot as usize].used = true;
        }
        Some(slot)
    }

    /// The next slot has no block yet, or lost it.
    pub(super) fn has_room(&self) -> bool {
        self.slots[self.next].block == FREE
    }

    /// Puts a block into the oldest slot, whose block leaves.
    pub(super) fn insert(&mut self, block: u64, sequential: bool) -> (u32, Option<Leaver>) {
        let slot = self.next;
        self.next = (self.next + 1) % self.slots.len();
        let old = self.slots[slot];
        let leaver = (old.block != FREE).then(|| {
            let at = self.find(old.block).expect("a block in a slot is in the table");
            self.unlink(at);
            old.leaver()
        });
        self.slots[slot] = Slot { block, used: false, sequential };
        self.link(slot);
        (slot as u32, leaver)
    }

    /// Forgets a block; whether it was here.
    pub(super) fn remove(&mut self, block: u64) -> bool {
        let Some(at) = self.find(block) else { return false };
        let slot = self.table[at] as usize;
        self.unlink(at);
        self.slots[slot] = EMPTY;
        true
    }

    /// Forgets all blocks of a range, and tells which.
    pub(super) fn remove_range(&mut self, blocks: &Range<u64>, mut gone: impl FnMut(u64)) {
        for slot in 0..self.slots.len() {
            let block = self.slots[slot].block;
            if block != FREE && blocks.contains(&block) {
                self.remove(block);
                gone(block);
            }
        }
    }

    /// The slot that a block is in.
    pub(super) fn slot(&self, block: u64) -> Option<u32> {
        self.find(block).map(|at| self.table[at])
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Slot>() + self.table.capacity() * size_of::<u32>()
    }
}

impl Slot {
    fn leaver(&self) -> Leaver {
        Leaver { block: self.block, used: self.used, sequential: self.sequential }
    }
}
