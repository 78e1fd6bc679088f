//! Policies to compare with, each plainly what its name says: LRU, and Belady's, which knows the
//! future and cannot be beaten.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::BuildHasherDefault;
use vflash::cache::policy::BlockHasher;

type Blocks<T> = HashMap<u64, T, BuildHasherDefault<BlockHasher>>;

/// The least recently used block goes; every miss is kept.
pub struct Lru {
    capacity: usize,
    /// Slot of each block; slots are linked from the newest to the oldest and round.
    slots: Blocks<u32>,
    links: Vec<Link>,
}

#[derive(Clone, Copy)]
struct Link {
    block: u64,
    newer: u32,
    older: u32,
}

/// Slot 0 holds the two ends.
const ENDS: u32 = 0;

impl Lru {
    pub fn new(capacity: usize) -> Self {
        let ends = Link { block: u64::MAX, newer: ENDS, older: ENDS };
        Self { capacity: capacity.max(1), slots: Blocks::default(), links: vec![ends] }
    }

    fn link(&mut self, slot: u32) -> &mut Link {
        &mut self.links[slot as usize]
    }

    fn take_out(&mut self, slot: u32) {
        let Link { newer, older, .. } = *self.link(slot);
        self.link(newer).older = older;
        self.link(older).newer = newer;
    }

    fn put_first(&mut self, slot: u32) {
        let first = std::mem::replace(&mut self.link(ENDS).older, slot);
        self.link(first).newer = slot;
        (self.link(slot).newer, self.link(slot).older) = (ENDS, first);
    }

    /// Whether it was a hit; now it is the newest.
    pub fn access(&mut self, block: u64) -> bool {
        if let Some(slot) = self.slots.get(&block).copied() {
            self.take_out(slot);
            self.put_first(slot);
            return true;
        }
        let slot = if self.slots.len() < self.capacity {
            self.links.push(Link { block, newer: ENDS, older: ENDS });
            (self.links.len() - 1) as u32
        } else {
            let oldest = self.link(ENDS).newer;
            self.take_out(oldest);
            let gone = std::mem::replace(&mut self.link(oldest).block, block);
            self.slots.remove(&gone);
            oldest
        };
        self.slots.insert(block, slot);
        self.put_first(slot);
        false
    }

    /// Drops a block, as if it was never there.
    pub fn remove(&mut self, block: u64) {
        let Some(slot) = self.slots.remove(&block) else { return };
        self.take_out(slot);
        // The last slot moves into the gap, so that slots stay dense.
        let last = (self.links.len() - 1) as u32;
        let moved = *self.link(last);
        if slot != last {
            *self.link(slot) = moved;
            self.link(moved.newer).older = slot;
            self.link(moved.older).newer = slot;
            self.slots.insert(moved.block, slot);
        }
        self.links.pop();
    }
}

/// Misses of the best there can be: the block that is used last, or never again, goes.
pub fn belady_misses(accesses: &[u64], capacity: usize) -> u64 {
    let mut next: Blocks<u64> = Blocks::default();
    let mut uses = vec![u64::MAX; accesses.len()];
    for (at, block) in accesses.iter().enumerate().rev() {
        uses[at] = next.insert(*block, at as u64).unwrap_or(u64::MAX);
    }
    let mut held: BTreeMap<u64, u64> = BTreeMap::new();
    let mut order: BTreeSet<(u64, u64)> = BTreeSet::new();
    let mut misses = 0;
    for (block, next) in accesses.iter().zip(uses) {
        match held.insert(*block, next) {
            Some(was) => drop(order.remove(&(was, *block))),
            None => {
                misses += 1;
                if held.len() > capacity.max(1)
                    && let Some((_, gone)) = order.pop_last()
                {
                    held.remove(&gone);
                }
            }
        }
        order.insert((next, *block));
    }
    misses
}
