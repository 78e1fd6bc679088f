//! What the policy keeps with each block's index entry.

use super::{USES_MAX, mix};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Which queue holds a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Trial,
    Main,
}

/// Four bits: uses 0 to 3, and the place. Zero, as a new index entry has it: no place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark(u8);

impl Mark {
    /// Bits that an index entry must have to spare.
    pub const BITS: u32 = 4;

    pub fn from_bits(bits: u8) -> Self {
        Self(bits & ((1 << Self::BITS) - 1))
    }

    pub fn bits(self) -> u8 {
        self.0
    }

    pub(super) fn at(place: Place) -> Self {
        Self(if place == Place::Trial { 1 << 2 } else { 2 << 2 })
    }

    pub fn place(self) -> Option<Place> {
        match self.0 >> 2 {
            1 => Some(Place::Trial),
            2 => Some(Place::Main),
            _ => None,
        }
    }

    pub fn uses(self) -> u8 {
        self.0 & USES_MAX
    }

    #[must_use]
    pub(super) fn with_uses(self, uses: u8) -> Self {
        Self(self.0 & !USES_MAX | uses.min(USES_MAX))
    }

    #[must_use]
    pub(super) fn used(self) -> Self {
        self.with_uses(self.uses() + 1)
    }

    #[must_use]
    pub(super) fn without_place(self) -> Self {
        Self(self.0 & USES_MAX)
    }
}

/// The marks of the blocks that are on flash, as the cached disk's index keeps them.
///
/// A mark belongs to the block, not to a version of it: an overwrite keeps it. When the disk drops
/// a block from its index, its mark is gone.
pub trait Marks {
    /// `None`: no part of the block is on flash.
    fn mark(&self, block: u64) -> Option<Mark>;

    /// Of a block that is on flash; else nothing happens.
    fn set_mark(&mut self, block: u64, mark: Mark);

    /// It is dirty: the backing does not have it.
    fn is_pinned(&self, block: u64) -> bool;
}

/// Hashes block numbers.
#[derive(Clone, Copy, Default)]
pub struct BlockHasher(u64);

impl Hasher for BlockHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = mix(self.0 ^ u64::from(*byte));
        }
    }

    fn write_u64(&mut self, block: u64) {
        self.0 = mix(block);
    }
}

/// Marks in a map of their own, for tests and for trying a policy on a trace.
#[derive(Clone, Default)]
pub struct MarkMap {
    marks: HashMap<u64, (Mark, bool), BuildHasherDefault<BlockHasher>>,
}

impl MarkMap {
    /// `block` is on flash from now on.
    pub fn insert(&mut self, block: u64) {
        self.marks.entry(block).or_default();
    }

    /// It is not any more; whether it was.
    pub fn remove(&mut self, block: u64) -> bool {
        self.marks.remove(&block).is_some()
    }

    /// Sets whether a block that is on flash is dirty.
    pub fn pin(&mut self, block: u64, pinned: bool) {
        if let Some(entry) = self.marks.get_mut(&block) {
            entry.1 = pinned;
        }
    }

    pub fn contains(&self, block: u64) -> bool {
        self.marks.contains_key(&block)
    }

    pub fn len(&self) -> usize {
        self.marks.len()
    }

    pub fn is_empty(&self) -> bool {
        self.marks.is_empty()
    }
}

impl Marks for MarkMap {
    fn mark(&self, block: u64) -> Option<Mark> {
        self.marks.get(&block).map(|(mark, _)| *mark)
    }

    fn set_mark(&mut self, block: u64, mark: Mark) {
        if let Some(entry) = self.marks.get_mut(&block) {
            entry.0 = mark;
        }
    }

    fn is_pinned(&self, block: u64) -> bool {
        self.marks.get(&block).is_some_and(|(_, pinned)| *pinned)
    }
}
