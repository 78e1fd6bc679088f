//! How many distinct blocks were used since a block's last use: its reuse distance.
//!
//! Each block has a place on a time line, moved to the end by every use; a Fenwick tree counts the
//! places taken after it. When the line is used up, its gaps are closed. Two marks divide the line
//! in *eras*: the blocks that were last used before the first, between them, and since the second.

use crate::cache::policy::BlockHasher;
use std::collections::HashMap;
use std::hash::BuildHasherDefault;

const GAP: u64 = u64::MAX;

/// Parts of the time line.
pub(super) const ERAS: usize = 3;

/// What was used since a block's last use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Distance {
    /// Of the last use.
    pub era: usize,
    /// Blocks, by the era of their own last use.
    pub blocks: [u64; ERAS],
}

impl Distance {
    pub(super) fn blocks(&self) -> u64 {
        self.blocks.iter().sum()
    }
}

pub(super) struct Stack {
    places: HashMap<u64, u32, BuildHasherDefault<BlockHasher>>,
    /// The block of each place.
    line: Vec<u64>,
    /// Of places taken; one more than the line.
    tree: Vec<u32>,
    /// Where eras begin but the first.
    marks: [usize; ERAS - 1],
    end: usize,
}

impl Stack {
    /// For so many blocks at first; more make it grow.
    pub(super) fn new(blocks: usize) -> Self {
        let length = blocks.max(1) * 2;
        let mut places = HashMap::default();
        places.reserve(blocks);
        Self { places, line: vec![GAP; length], tree: vec![0; length + 1], marks: [0; 2], end: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    pub(super) fn contains(&self, block: u64) -> bool {
        self.places.contains_key(&block)
    }

    /// A use of `block`: its distance, `None` if it was not here.
    pub(super) fn touch(&mut self, block: u64) -> Option<Distance> {
        if self.end == self.line.len() {
            self.close_gaps();
        }
        let old = self.places.insert(block, self.end as u32);
        let distance = old.map(|old| {
            let distance = self.distance(old as usize);
            self.clear(old as usize);
            distance
        });
        self.line[self.end] = block;
        self.add(self.end, 1);
        self.end += 1;
        distance
    }

    fn distance(&self, place: usize) -> Distance {
        let era = self.marks.iter().filter(|mark| **mark <= place).count();
        let mut blocks = [0; ERAS];
        let mut before = self.count_before(place + 1);
        for (index, blocks) in blocks.iter_mut().enumerate().skip(era) {
            let end = self.marks.get(index).map(|mark| self.count_before(*mark));
            let end = end.unwrap_or(self.places.len() as u32);
            *blocks = u64::from(end - before);
            before = end;
        }
        Distance { era, blocks }
    }

    /// A new era begins; the first two become one.
    pub(super) fn turn(&mut self) {
        self.marks = [self.marks[1], self.end];
    }

    /// Blocks of the first era.
    pub(super) fn first_len(&self) -> u64 {
        self.count_before(self.marks[0]).into()
    }

    /// Removes the blocks of the first era.
    pub(super) fn forget_first(&mut self) {
        for place in 0..self.marks[0] {
            if self.line[place] != GAP {
                self.remove(self.line[place]);
            }
        }
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

    /// Places taken before this one.
    fn count_before(&self, place: usize) -> u32 {
        let (mut at, mut sum) = (place, 0_u32);
        while at > 0 {
            sum += self.tree[at];
            at &= at - 1;
        }
        sum
    }

    /// Blocks move together; the line doubles if more than half of it is taken.
    fn close_gaps(&mut self) {
        self.marks = self.marks.map(|mark| self.count_before(mark) as usize);
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
        // Blocks and the turns before their last use.
        let (mut stack, mut list) = (Stack::new(4), Vec::<(u64, usize)>::new());
        let mut turns = 0;
        for _ in 0..20_000 {
            let block = (random.f64().powi(3) * 300.0) as u64;
            let place = list.iter().position(|(other, _)| *other == block);
            let era = |turn: usize| (turn + ERAS - 1).saturating_sub(turns);
            match random.u8(..100) {
                0..10 => {
                    stack.remove(block);
                    place.map(|place| list.remove(place));
                }
                10 => {
                    stack.turn();
                    turns += 1;
                }
                11 => {
                    stack.forget_first();
                    list.retain(|(_, turn)| era(*turn) > 0);
                }
                _ => {
                    let expected = place.map(|place| {
                        let mut blocks = [0; ERAS];
                        list[place + 1..].iter().for_each(|(_, turn)| blocks[era(*turn)] += 1);
                        Distance { era: era(list[place].1), blocks }
                    });
                    assert_eq!(stack.touch(block), expected);
                    place.map(|place| list.remove(place));
                    list.push((block, turns));
                }
            }
            assert_eq!(stack.len(), list.len());
            assert_eq!(stack.contains(block), list.iter().any(|(other, _)| *other == block));
        }
    }
}
