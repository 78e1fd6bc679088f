//! How many distinct blocks were used since a block's last use: its reuse distance.
//!
//! Each block has a place on a time line, moved to the end by every use; a Fenwick tree counts the
//! places taken after it. When the line is used up, its gaps are closed.

use crate::cache::policy::BlockHasher;
use std::collections::HashMap;
use std::hash::BuildHasherDefault;

const GAP: u64 = u64::MAX;

pub(super) struct Stack {
    places: HashMap<u64, u32, BuildHasherDefault<BlockHasher>>,
    /// The block of each place.
    line: Vec<u64>,
    /// Of places taken; one more than the line.
    tree: Vec<u32>,
    end: usize,
}

impl Stack {
    /// For so many blocks at first; more make it grow.
    pub(super) fn new(blocks: usize) -> Self {
        let length = blocks.max(1) * 2;
        let mut places = HashMap::default();
        places.reserve(blocks);
        Self { places, line: vec![GAP; length], tree: vec![0; length + 1], end: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// A use of `block`: its distance, `None` if it was not here.
    pub(super) fn touch(&mut self, block: u64) -> Option<u64> {
        if self.end == self.line.len() {
            self.close_gaps();
        }
        let old = self.places.insert(block, self.end as u32);
        let distance = old.map(|old| {
            let before = self.count_to(old as usize);
            self.clear(old as usize);
            self.places.len() as u64 - u64::from(before)
        });
        self.line[self.end] = block;
        self.add(self.end, 1);
        self.end += 1;
        distance
    }

    pub(super) fn remove(&mut self, block: u64) {
        if let Some(place) = self.places.remove(&block) {
            self.clear(place as usize);
        }
    }

    fn clear(&mut self, place: usize) {
        self.line[place] = GAP;
        self.add(place, -1);
    }

    fn add(&mut self, place: usize, amount: i32) {
        let mut at = place + 1;
        while at < self.tree.len() {
            self.tree[at] = self.tree[at].wrapping_add_signed(amount);
            at += at & at.wrapping_neg();
        }
    }

    /// Places taken up to this one.
    fn count_to(&self, place: usize) -> u32 {
        let (mut at, mut sum) = (place + 1, 0_u32);
        while at > 0 {
            sum += self.tree[at];
            at &= at - 1;
        }
        sum
    }

    /// Blocks move together; the line doubles if more than half of it is taken.
    fn close_gaps(&mut self) {
        let mut end = 0;
        for at in 0..self.line.len() {
            let block = self.line[at];
            if block != GAP {
                self.line[end] = block;
                self.places.insert(block, end as u32);
                end += 1;
            }
        }
        let length = if end * 2 > self.line.len() { self.line.len() * 2 } else { self.line.len() };
        self.line.resize(length, GAP);
        self.line[end..].fill(GAP);
        self.tree.clear();
        self.tree.resize(length + 1, 0);
        (0..end).for_each(|place| self.add(place, 1));
        self.end = end;
    }

    pub(super) fn memory_bytes(&self) -> usize {
        // A table of the standard library is at most seven eighths full and has a byte an entry.
        let table = (self.places.capacity() * 8 / 7).next_power_of_two();
        table * (size_of::<(u64, u32)>() + 1)
            + self.line.capacity() * size_of::<u64>()
            + self.tree.capacity() * size_of::<u32>()
    }
}

/// As the policy hashes blocks.
pub(super) fn mix(block: u64) -> u64 {
    use std::hash::Hasher;
    let mut hasher = BlockHasher::default();
    hasher.write_u64(block);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_those_of_a_list_that_is_searched() {
        let mut random = fastrand::Rng::with_seed(1);
        let (mut stack, mut list) = (Stack::new(4), Vec::<u64>::new());
        for _ in 0..20_000 {
            let block = (random.f64().powi(3) * 300.0) as u64;
            let place = list.iter().position(|other| *other == block);
            if random.u8(..10) == 0 {
                stack.remove(block);
                place.map(|place| list.remove(place));
            } else {
                let expected = place.map(|place| (list.len() - 1 - place) as u64);
                assert_eq!(stack.touch(block), expected);
                place.map(|place| list.remove(place));
                list.push(block);
            }
            assert_eq!(stack.len(), list.len());
        }
    }
}
