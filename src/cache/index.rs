//! The index: where the newest version of every sector lies in the log. In memory only; it is
//! rebuilt from the log.
//!
//! A *piece* is the part of a write inside one 4 KiB block of the disk, so it has 1 to 8 sectors
//! and one checksum. Pieces are disjoint. Each takes 16 bytes; sorted runs of them (leaves) hang in
//! a map by block. Beside them are the ranges that read as zeros, disjoint from all pieces. With
//! each block lies what the policy of the clean cache notes of it, for as long as a piece does.
//!
//! Invariants:
//! - I1 pieces and zero ranges are disjoint: each sector has one newest version or none.
//! - I2 the pieces of one block lie in one leaf, so a piece is cut and replaced within its leaf.
//! - I3 a leaf at block *b* holds the pieces of all blocks from *b* to the next leaf's.

use super::policy::Mark;
use crate::base::planted::{Bug, planted};
use std::collections::BTreeMap;
use std::ops::Range;

/// Sectors of a block of the disk: no piece reaches over its edge.
pub const BLOCK_SECTORS: u64 = 8;

/// Pieces of a leaf at most; one more splits it.
const LEAF_PIECES_MAX: usize = 256;

/// A leaf with fewer is joined with its neighbour if both fit with room to spare.
const LEAF_PIECES_MIN: usize = 64;

/// Room that a leaf takes at a time.
const LEAF_GROWTH: usize = 8;

const PIECE_BYTES: usize = size_of::<Packed>();

/// What a leaf costs beside its pieces: its entry in the map (32 bytes, nodes two thirds full) and
/// the allocator's header and rounding.
const LEAF_OVERHEAD_BYTES: usize = 72;

/// What a zero range costs.
const ZERO_BYTES: usize = 48;

/// [`Index::sweep`]'s cursor has come to the zero ranges.
const SWEEP_ZEROS: u64 = 1 << 63;

/// Sectors in the log that hold the newest version of sectors of the disk. All within one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First sector of the disk that is still visible.
    pub start: u64,
    /// Visible sectors, 1 to 8.
    pub count: u8,
    /// Stored sectors before the first visible one.
    pub skip: u8,
    /// Stored sectors, 1 to 8: what the checksum covers.
    pub stored: u8,
    /// First stored sector, in sectors of the allocation.
    pub position: u64,
    /// XXH3 of the stored sectors.
    pub checksum: u32,
}

/// What a sweep meets: a piece, or a range of zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Swept {
    /// The block, if the piece is all of one and all of it is visible.
    pub whole: Option<u64>,
    /// In sectors of the allocation.
    pub position: u64,
}

/// What a lookup finds, clipped to the range that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// And what the policy notes of its block.
    Piece(Piece, Mark),
    /// Reads as zeros.
    Zero { start: u64, count: u64 },
    /// Not in the log.
    Absent { start: u64, count: u64 },
}

impl Piece {
    pub fn end(&self) -> u64 {
        self.start + u64::from(self.count)
    }

    /// The part that lies within `first..end`; they overlap.
    #[must_use]
    pub fn clip(&self, first: u64, end: u64) -> Self {
        let start = self.start.max(first);
        let end = self.end().min(end);
        assert!(start < end, "a piece is clipped to a range that it overlaps");
        let cut = if planted(Bug::WrongHalf) { 0 } else { start - self.start };
        let skip = self.skip + cut as u8;
        Self { start, count: (end - start) as u8, skip, ..*self }
    }
}

/// A [`Piece`] in 16 bytes, ordered by `start`. From the top: start 40 bits, count - 1, skip,
/// stored - 1 (3 each), position 40, checksum 32, 3 to spare, the mark of its block 4.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Packed(u128);

const START_SHIFT: u32 = 88;
const COUNT_SHIFT: u32 = 85;
const SKIP_SHIFT: u32 = 82;
const STORED_SHIFT: u32 = 79;
const POSITION_SHIFT: u32 = 39;
const CHECKSUM_SHIFT: u32 = 7;
const MARK_MASK: u128 = (1 << Mark::BITS) - 1;

/// Sectors of a disk, and of an allocation, that the index can name: 512 TiB.
pub const SECTORS_MAX: u64 = 1 << 40;

impl Packed {
    fn new(piece: Piece) -> Self {
        let Piece { start, count, skip, stored, position, checksum } = piece;
        assert!(start < SECTORS_MAX && position < SECTORS_MAX, "{piece:?} can be named");
        assert!(count >= 1 && skip + count <= stored && stored <= 8, "{piece:?} is stored");
        assert!(start / BLOCK_SECTORS == (piece.end() - 1) / BLOCK_SECTORS, "{piece:?}: one block");
        Self(
            u128::from(start) << START_SHIFT
                | u128::from(count - 1) << COUNT_SHIFT
                | u128::from(skip) << SKIP_SHIFT
                | u128::from(stored - 1) << STORED_SHIFT
                | u128::from(position) << POSITION_SHIFT
                | u128::from(checksum) << CHECKSUM_SHIFT,
        )
    }

    fn field(self, shift: u32, bits: u32) -> u64 {
        (self.0 >> shift) as u64 & ((1 << bits) - 1)
    }

    fn start(self) -> u64 {
        (self.0 >> START_SHIFT) as u64
    }

    fn end(self) -> u64 {
        self.start() + self.field(COUNT_SHIFT, 3) + 1
    }

    fn block(self) -> u64 {
        self.start() / BLOCK_SECTORS
    }

    fn position(self) -> u64 {
        self.field(POSITION_SHIFT, 40)
    }

    fn mark(self) -> Mark {
        Mark::from_bits((self.0 & MARK_MASK) as u8)
    }

    fn with_mark(self, mark: Mark) -> Self {
        Self(self.0 & !MARK_MASK | u128::from(mark.bits()))
    }

    fn swept(self) -> Swept {
        let Piece { start, count, .. } = self.piece();
        let whole = (u64::from(count) == BLOCK_SECTORS).then_some(start / BLOCK_SECTORS);
        Swept { whole, position: self.position() }
    }

    fn piece(self) -> Piece {
        Piece {
            start: self.start(),
            count: self.field(COUNT_SHIFT, 3) as u8 + 1,
            skip: self.field(SKIP_SHIFT, 3) as u8,
            stored: self.field(STORED_SHIFT, 3) as u8 + 1,
            position: self.position(),
            checksum: self.field(CHECKSUM_SHIFT, 32) as u32,
        }
    }
}

type Leaf = Vec<Packed>;

/// A range that reads as zeros; its start is its key.
#[derive(Clone, Copy)]
struct Zero {
    end: u64,
    /// The record that says so, in sectors of the allocation.
    position: u64,
}

/// See the module.
pub struct Index {
    /// By the first block of each; the one at block 0 is always there.
    leaves: BTreeMap<u64, Leaf>,
    zeros: BTreeMap<u64, Zero>,
    pieces: usize,
    /// Pieces that the leaves have room for.
    capacity: usize,
    limit_bytes: usize,
    /// Where pieces lay that were changed or removed since the last look, if anybody looks.
    displaced: Option<Vec<u64>>,
}

impl Index {
    /// `limit_bytes`: where [`Self::is_full`] begins; the owner keeps to it, not the index.
    pub fn new(limit_bytes: usize) -> Self {
        let leaves = BTreeMap::from([(0, Leaf::new())]);
        let zeros = BTreeMap::new();
        Self { leaves, zeros, pieces: 0, capacity: 0, limit_bytes, displaced: None }
    }

    /// From now on notes where pieces lay that are changed or removed.
    pub fn watch(&mut self) {
        self.displaced = Some(Vec::new());
    }

    /// Moves the positions of pieces that were changed or removed since the last call, in sectors
    /// of the allocation, to `positions`; those that a sweep dropped are not among them.
    pub fn displaced(&mut self, positions: &mut Vec<u64>) {
        if let Some(displaced) = &mut self.displaced {
            positions.append(displaced);
        }
    }

    /// Entries: pieces and zero ranges.
    pub fn len(&self) -> usize {
        self.pieces + self.zeros.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All memory of the index, the allocator's overhead included.
    pub fn memory_bytes(&self) -> usize {
        self.capacity * PIECE_BYTES
            + self.leaves.len() * LEAF_OVERHEAD_BYTES
            + self.zeros.len() * ZERO_BYTES
    }

    /// Another size of cache, another limit.
    pub fn set_limit(&mut self, limit_bytes: usize) {
        self.limit_bytes = limit_bytes;
    }

    pub fn is_full(&self) -> bool {
        self.memory_bytes() >= self.limit_bytes
    }

    /// The newest version of its sectors.
    pub fn insert(&mut self, piece: Piece) {
        let packed = Packed::new(piece);
        self.cut_zeros(piece.start, piece.end());
        let key = self.leaf_key(packed.block());
        self.replace(key, piece.start, piece.end(), Some(packed));
    }

    /// `count` sectors from `start` read as zeros from the record at `position` on.
    pub fn insert_zero(&mut self, start: u64, count: u64, position: u64) {
        self.remove(start, count);
        if count > 0 {
            self.zeros.insert(start, Zero { end: start + count, position });
        }
    }

    /// An older version: it shows only where nothing newer is.
    pub fn insert_if_absent(&mut self, piece: Piece) {
        for (start, end) in self.gaps(piece.start, u64::from(piece.count)) {
            self.insert(piece.clip(start, end));
        }
    }

    /// As [`Self::insert_zero`], for an older record.
    pub fn insert_zero_if_absent(&mut self, start: u64, count: u64, position: u64) {
        for (start, end) in self.gaps(start, count) {
            self.zeros.insert(start, Zero { end, position });
        }
    }

    fn gaps(&self, start: u64, count: u64) -> Vec<(u64, u64)> {
        let mut found = Vec::new();
        self.lookup(start, count, &mut found);
        let gap = |found| match found {
            Found::Absent { start, count } => Some((start, start + count)),
            _ => None,
        };
        found.into_iter().filter_map(gap).collect()
    }

    /// Appends what covers `count` sectors from `start`: in order, without gaps, clipped.
    pub fn lookup(&self, start: u64, count: u64, found: &mut Vec<Found>) {
        let end = start + count;
        let mut at = start;
        let mut pieces = self.pieces_in(start, end).peekable();
        let mut zeros = self.zeros_in(start, end).peekable();
        while at < end {
            let piece = pieces.peek().map_or(end, |piece| piece.start().max(at));
            let zero = zeros.peek().map_or(end, |(zero, _)| (*zero).max(at));
            let next = piece.min(zero);
            if next > at {
                found.push(Found::Absent { start: at, count: next - at });
                at = next;
            } else if piece == at {
                let packed = pieces.next().expect("peeked");
                let piece = packed.piece().clip(at, end);
                at = piece.end();
                found.push(Found::Piece(piece, packed.mark()));
            } else {
                let zero_end = zeros.next().expect("peeked").1.min(end);
                found.push(Found::Zero { start: at, count: zero_end - at });
                at = zero_end;
            }
        }
    }

    /// Forgets a range: it is absent afterwards.
    pub fn remove(&mut self, start: u64, count: u64) {
        let end = start + count;
        if count == 0 {
            return;
        }
        self.cut_zeros(start, end);
        let first = self.leaf_key(start / BLOCK_SECTORS);
        let last = (end - 1) / BLOCK_SECTORS;
        let keys: Vec<u64> = self.leaves.range(first..=last).map(|(key, _)| *key).collect();
        for key in keys.into_iter().rev() {
            self.replace(key, start, end, None);
            self.join(key);
        }
    }

    /// What is visible of a block.
    pub fn pieces_of(&self, block: u64) -> impl Iterator<Item = Piece> {
        let start = block * BLOCK_SECTORS;
        self.pieces_in(start, start + BLOCK_SECTORS).map(Packed::piece)
    }

    /// The one piece that is all of a block, if there is such a one.
    pub fn whole(&self, block: u64) -> Option<Piece> {
        self.pieces_of(block).next().filter(|piece| u64::from(piece.count) == BLOCK_SECTORS)
    }

    /// What the policy noted of a block; `None`: no piece of it is here.
    pub fn mark(&self, block: u64) -> Option<Mark> {
        let start = block * BLOCK_SECTORS;
        self.pieces_in(start, start + BLOCK_SECTORS).next().map(Packed::mark)
    }

    /// Notes it with all pieces of the block. An insertion keeps it.
    pub fn set_mark(&mut self, block: u64, mark: Mark) {
        let leaf = self.leaves.range_mut(..=block).next_back();
        let (key, leaf) = leaf.expect("the leaf at block 0 is always there");
        let start = block * BLOCK_SECTORS;
        let range = overlap((*key, leaf), start, start + BLOCK_SECTORS);
        leaf[range].iter_mut().for_each(|piece| *piece = piece.with_mark(mark));
    }

    /// Neither a piece nor zeros of the block are here.
    pub fn is_absent(&self, block: u64) -> bool {
        let (start, end) = (block * BLOCK_SECTORS, (block + 1) * BLOCK_SECTORS);
        self.pieces_in(start, end).next().is_none() && self.zeros_in(start, end).next().is_none()
    }

    /// Forgets all pieces of a block; where it reads as zeros, it goes on to.
    pub fn drop_block(&mut self, block: u64) {
        let key = self.leaf_key(block);
        let start = block * BLOCK_SECTORS;
        self.replace(key, start, start + BLOCK_SECTORS, None);
        self.join(key);
    }

    /// Forgets what is still visible of `piece`, and nothing that came later.
    pub fn forget(&mut self, piece: Piece) {
        let now = self.pieces_of(piece.start / BLOCK_SECTORS);
        let same = |now: &Piece| (now.position, now.checksum) == (piece.position, piece.checksum);
        let left: Vec<Piece> = now.filter(same).collect();
        left.into_iter().for_each(|piece| self.remove(piece.start, piece.count.into()));
    }

    /// Looks at some `budget` entries from `cursor` (0 to begin) on and drops those that `keep`
    /// refuses. True when the whole index has been gone through.
    pub fn sweep(
        &mut self,
        cursor: &mut u64,
        budget: usize,
        mut keep: impl FnMut(Swept) -> bool,
    ) -> bool {
        let mut left = budget.max(1);
        while *cursor & SWEEP_ZEROS == 0 {
            if left == 0 {
                return false;
            }
            let key = self.leaf_key(*cursor);
            let leaf = self.leaves.get_mut(&key).expect("leaf_key names a leaf");
            let (pieces, capacity) = (leaf.len(), leaf.capacity());
            leaf.retain(|piece| keep(piece.swept()));
            shrink(leaf);
            self.pieces -= pieces - leaf.len();
            self.capacity -= capacity - leaf.capacity();
            left = left.saturating_sub(pieces.max(1));
            let next = self.leaves.range(key + 1..).next().map(|(key, _)| *key);
            *cursor = next.unwrap_or(SWEEP_ZEROS);
            self.join(key);
        }
        let from = *cursor & !SWEEP_ZEROS;
        let seen: Vec<(u64, u64)> = self
            .zeros
            .range(from..)
            .take(left)
            .map(|(start, zero)| (*start, zero.position))
            .collect();
        for (start, position) in &seen {
            if !keep(Swept { whole: None, position: *position }) {
                self.zeros.remove(start);
            }
        }
        if let Some((start, _)) = seen.last() {
            *cursor = (start + 1) | SWEEP_ZEROS;
        }
        seen.len() < left
    }

    /// The key of the leaf that holds `block` (I3).
    fn leaf_key(&self, block: u64) -> u64 {
        let leaf = self.leaves.range(..=block).next_back();
        *leaf.expect("the leaf at block 0 is always there").0
    }

    /// Pieces that overlap `start..end`.
    fn pieces_in(&self, start: u64, end: u64) -> impl Iterator<Item = Packed> {
        let first = start / BLOCK_SECTORS;
        let leaf = self.leaves.range(..=first).next_back();
        let (key, leaf) = leaf.expect("the leaf at block 0 is always there");
        // A block's pieces lie in one leaf (I2): most lookups need no other.
        let last = end.div_ceil(BLOCK_SECTORS);
        let others = (last > first + 1).then(|| self.leaves.range(first + 1..last));
        let others = others.into_iter().flatten();
        let others = others.flat_map(move |(key, leaf)| &leaf[overlap((*key, leaf), start, end)]);
        leaf[overlap((*key, leaf), start, end)].iter().chain(others).copied()
    }

    /// Starts and ends of zero ranges that overlap `start..end`.
    fn zeros_in(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
        let before = self.zeros.range(..start).next_back().filter(|(_, zero)| zero.end > start);
        let inside = self.zeros.range(start..end.max(start));
        before.into_iter().chain(inside).map(|(start, zero)| (*start, zero.end))
    }

    fn cut_zeros(&mut self, start: u64, end: u64) {
        if self.zeros.is_empty() {
            return;
        }
        let cut: Vec<u64> = self.zeros_in(start, end).map(|(start, _)| start).collect();
        for from in cut {
            let zero = self.zeros.remove(&from).expect("it was just seen");
            if from < start {
                self.zeros.insert(from, Zero { end: start, ..zero });
            }
            if zero.end > end {
                self.zeros.insert(end, zero);
            }
        }
    }

    /// Puts `new` in the place of all that lies in `start..end` in one leaf; what sticks out on
    /// either side stays.
    fn replace(&mut self, key: u64, start: u64, end: u64, new: Option<Packed>) {
        let leaf = self.leaves.get_mut(&key).expect("leaf_key names a leaf");
        let (pieces, capacity) = (leaf.len(), leaf.capacity());
        let range = overlap((key, leaf), start, end);
        let inside = &leaf[range.clone()];
        let outside = |packed: Option<&Packed>, from: u64, to: u64| {
            let packed = *packed?;
            let piece = packed.piece();
            let sticks_out = piece.start < to && from < piece.end();
            sticks_out.then(|| Packed::new(piece.clip(from, to)).with_mark(packed.mark()))
        };
        let new = new.map(|new| new.with_mark(mark_of(leaf, new.block())));
        if let Some(displaced) = &mut self.displaced {
            displaced.extend(inside.iter().map(|piece| piece.position()));
        }
        let left = outside(inside.first(), 0, start);
        let right = outside(inside.last(), end, u64::MAX);
        let added = [left, new, right].into_iter().flatten();
        let grown = pieces - range.len() + added.clone().count();
        if grown > capacity {
            leaf.reserve_exact(grown + LEAF_GROWTH - pieces);
        }
        // Two ends of one old piece, with a hole or a new piece between: the only way to grow.
        let (at, removed) = (range.start, range.len());
        leaf.splice(at..at + removed, added);
        if new.is_none() {
            shrink(leaf);
        }
        let full = leaf.len() > LEAF_PIECES_MAX;
        self.pieces = self.pieces + leaf.len() - pieces;
        self.capacity = self.capacity + leaf.capacity() - capacity;
        if full {
            self.split(key, at);
        }
    }

    /// Splits a leaf between two blocks (I2): in the middle, or before its last block if that is
    /// where it grows, so that sequential writes fill their leaves.
    fn split(&mut self, key: u64, grown_at: usize) {
        let leaf = self.leaves.get_mut(&key).expect("leaf_key names a leaf");
        let appended = grown_at + BLOCK_SECTORS as usize >= leaf.len();
        let middle = if appended { leaf.len() - 1 } else { leaf.len() / 2 };
        let block = leaf[middle].block();
        let at = leaf.partition_point(|piece| piece.block() < block);
        assert!(at > 0, "a leaf of more than a block's pieces has a block before its middle");
        let before = leaf.capacity();
        let tail = leaf.split_off(at);
        shrink(leaf);
        self.capacity = self.capacity + leaf.capacity() + tail.capacity() - before;
        self.leaves.insert(block, tail);
    }

    /// Joins a leaf that has become small with the one before it, so that holes cost nothing.
    fn join(&mut self, key: u64) {
        let small = self.leaves.get(&key).is_some_and(|leaf| leaf.len() < LEAF_PIECES_MIN);
        if key == 0 || !small {
            return;
        }
        let before = self.leaf_key(key - 1);
        let length = self.leaves[&key].len();
        if length > 0 && self.leaves[&before].len() + length > LEAF_PIECES_MAX - LEAF_PIECES_MIN {
            return;
        }
        let tail = self.leaves.remove(&key).expect("it was just seen");
        let leaf = self.leaves.get_mut(&before).expect("leaf_key names a leaf");
        let capacity = leaf.capacity() + tail.capacity();
        leaf.reserve_exact(tail.len());
        leaf.extend_from_slice(&tail);
        self.capacity = self.capacity + leaf.capacity() - capacity;
    }
}

/// What is noted of a block; nothing if none of it is here.
fn mark_of(leaf: &[Packed], block: u64) -> Mark {
    let first = leaf.partition_point(|piece| piece.block() < block);
    let there = leaf.get(first).filter(|piece| piece.block() == block);
    there.map_or(Mark::default(), |piece| piece.mark())
}

/// The pieces of a leaf, here with its key, that overlap `start..end`.
fn overlap((key, leaf): (u64, &[Packed]), start: u64, end: u64) -> Range<usize> {
    let first = first_at((key, leaf), start);
    // Whoever asks for many pieces looks at each of them anyway.
    let overlapping = leaf[first..].iter().take_while(|piece| piece.start() < end);
    first..first + overlapping.count()
}

/// The first piece that ends behind `start`. Where blocks lie one behind the other, as disks are
/// filled, it is as far from the beginning as its block from the leaf's: one look, where a search
/// of a large index waits for memory at most of its steps.
fn first_at((key, leaf): (u64, &[Packed]), start: u64) -> usize {
    let guess = (start / BLOCK_SECTORS).wrapping_sub(key) as usize;
    match leaf.get(guess) {
        Some(piece) if piece.start() <= start && start < piece.end() => guess,
        _ => leaf.partition_point(|piece| piece.end() <= start),
    }
}

fn shrink(leaf: &mut Leaf) {
    if leaf.capacity() > leaf.len() + 2 * LEAF_GROWTH {
        leaf.shrink_to(leaf.len() + LEAF_GROWTH);
    }
}

#[cfg(test)]
#[path = "index_test.rs"]
mod tests;
