//! The clean cache: what of the backing stays on flash, and how it comes there.
//!
//! ```text
//!  drained segment ──sorted──► slab ◄──written, in the background──┐
//!                                │                                 │
//!        read ◄── hit ───────────┘            probation in memory ─┤ what is read again
//!        read ◄── miss: fetched once, for all who wait ────────────┘ leaves for the flash
//! ```
//!
//! [`policy`](super::policy) decides what is worth keeping; here it is done. Everything is a part
//! of [`Core`]: `fetch.rs` brings misses from the backing, `fill.rs` writes slots, `room.rs` turns
//! drained segments into slabs and empties slabs for the log, `slabs.rs` knows the slots; `save.rs`
//! writes the slot tables (`table.rs`) from which `load.rs` knows them after a restart.
//!
//! Invariants:
//! - C1 nothing of the backing is kept that was fetched while its block was being written: a write
//!   makes fetches, fills and moves of its blocks *stale* before the index hears of it.
//! - C2 a block is fetched as a whole, and only if nothing of it is in the index.
//! - C3 the index names no slot whose write has not ended, and what it names is verified when it
//!   is read.
//! - C4 nothing here is needed to go on: what cannot be kept, moved or written is dropped.

mod fetch;
mod fill;
mod held;
pub(in crate::cache) mod load;
mod rest;
mod room;
mod save;
mod slabs;
mod speed;
pub(in crate::cache) mod table;

pub(in crate::cache) use fetch::Fetch;

use super::core::Core;
use super::index::{BLOCK_SECTORS, Index};
use super::layout::Shape;
use super::policy::{BlockHasher, Mark, Marks, Policy, Settings};
use super::read::Reads;
use super::segment::Segments;
use crate::base::clock::Nanos;
use crate::base::planted::{Bug, planted};
use crate::io::volume::SectorRange;
use fill::Fill;
use held::Held;
use load::LoadedSlab;
use rest::Rest;
use save::Save;
use slabs::{Slabs, SlotAt};
use speed::Speed;
use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::ops::Range;
use std::time::Duration;

/// Numbers of operations by block.
type ByBlock = HashMap<u64, u32, BuildHasherDefault<BlockHasher>>;

/// See the module.
pub(in crate::cache) struct Clean {
    pub policy: Policy,
    pub slabs: Slabs,
    held: Held,
    speed: Speed,
    /// Blocks being fetched that others may join, and the read that fetches each.
    fetching: ByBlock,
    /// Blocks being written to slots.
    filling: ByBlock,
    fills: Vec<Fill>,
    spare: Vec<u32>,
    /// After writes to slots have failed.
    rest: Rest,
    /// Ranges that writes past the log are changing, with their requests.
    changing: Vec<(u32, SectorRange)>,
    /// How far the index has been swept for the segments being sorted, and what was found.
    cursor: u64,
    found: Vec<(u64, SlotAt)>,
    /// The next step of that, unless it is urgent.
    sort_at: Nanos,
    /// The next slot of the slab that is leaving.
    leaving: Option<SlotAt>,
    save: Save,
    positions: Vec<u64>,
}

/// Free segments that are kept for the log.
pub(in crate::cache) fn reserve(shape: Shape) -> u64 {
    (shape.segments() / 32).max(1)
}

/// Entries of the policy's queues at most: one for each slot, since what the log takes it takes
/// slab by slab, and a tenth more, since a block that goes with its slab leaves its entry behind.
fn capacity(shape: Shape, slabs: &Slabs) -> u64 {
    shape.segments() * u64::from(slabs.slots()) * 11 / 10
}

impl Clean {
    /// `incarnation`: the log's; nobody else has it. `write_budget`: bytes a day.
    pub(in crate::cache) fn new(shape: Shape, incarnation: u64, write_budget: Option<u64>) -> Self {
        let slabs = Slabs::new(shape, (incarnation << 32) + 1);
        let (held, settings) = Held::new(Settings::new(capacity(shape, &slabs)));
        let mut policy = Policy::new(settings);
        policy.set_write_budget(write_budget);
        Self {
            policy,
            slabs,
            held,
            speed: Speed::default(),
            fetching: ByBlock::default(),
            filling: ByBlock::default(),
            fills: Vec::new(),
            spare: Vec::new(),
            rest: Rest::default(),
            changing: Vec::new(),
            cursor: 0,
            found: Vec::new(),
            sort_at: Nanos::default(),
            leaving: None,
            save: Save::default(),
            positions: Vec::new(),
        }
    }

    /// A guest's write changes these sectors: whatever is on its way of them is stale (C1).
    pub(in crate::cache) fn overwritten(&mut self, start: u64, count: u64, reads: &mut Reads) {
        if planted(Bug::StaleClean) {
            return;
        }
        let blocks = blocks(start, count);
        self.policy.written_range(blocks.clone());
        take_out(&mut self.fetching, &blocks, |block, read| reads.stale(read, block));
        let fills = &mut self.fills;
        take_out(&mut self.filling, &blocks, |_, fill| fills[fill as usize].stale());
    }

    /// Bytes of memory, less the index and the data of probation.
    pub(in crate::cache) fn memory_bytes(&self) -> usize {
        self.policy.memory_bytes() + self.slabs.memory_bytes()
    }

    /// A read of so many bytes took so long.
    pub(in crate::cache) fn measured(&mut self, flash: bool, bytes: u64, took: Duration) {
        match flash {
            _ if bytes > speed::BYTES_MAX => {}
            true => self.speed.flash_read(took),
            false => self.speed.backing_read(took),
        }
    }

    /// Nothing is kept, since the backing reads faster than the flash.
    pub(in crate::cache) fn is_past(&self) -> bool {
        self.speed.backing_faster()
    }

    /// Nothing is kept for a while, since the flash fails to be written.
    pub(in crate::cache) fn is_flash_failing(&self) -> bool {
        self.rest.is_failing()
    }

    /// Bytes of data in memory.
    pub(in crate::cache) fn held_bytes(&self) -> usize {
        self.held.memory_bytes()
    }
}

/// The marks of blocks, as the index keeps them.
struct IndexMarks<'a> {
    index: &'a mut Index,
    segments: &'a Segments,
}

impl Marks for IndexMarks<'_> {
    fn mark(&self, block: u64) -> Option<Mark> {
        self.index.mark(block)
    }

    fn set_mark(&mut self, block: u64, mark: Mark) {
        self.index.set_mark(block, mark);
    }

    fn is_pinned(&self, block: u64) -> bool {
        let mut pieces = self.index.pieces_of(block);
        let dirty = pieces.any(|piece| self.segments.is_dirty(piece.position));
        dirty && !planted(Bug::DirtyEvicted)
    }
}

/// The blocks that a range of sectors touches.
fn blocks(start: u64, count: u64) -> Range<u64> {
    start / BLOCK_SECTORS..(start + count).div_ceil(BLOCK_SECTORS)
}

/// Takes what is in the map of these blocks out of it.
fn take_out(map: &mut ByBlock, blocks: &Range<u64>, mut taken: impl FnMut(u64, u32)) {
    if map.is_empty() {
        return;
    }
    if blocks.end - blocks.start <= map.len() as u64 {
        for block in blocks.clone() {
            map.remove(&block).into_iter().for_each(|number| taken(block, number));
        }
        return;
    }
    map.retain(|block, number| {
        let hit = blocks.contains(block);
        if hit {
            taken(*block, *number);
        }
        !hit
    });
}

impl Core {
    /// The log can spare no segment. Free slots are no room: overwritten blocks leave them all the
    /// time, and what stays in slabs that are emptied needs them.
    fn is_full(&self) -> bool {
        self.segments.counts().free <= reserve(self.shape)
    }

    /// The policy, and the marks that it wants.
    fn policy(&mut self) -> (&mut Policy, IndexMarks<'_>) {
        let marks = IndexMarks { index: &mut self.index, segments: &self.segments };
        (&mut self.clean.policy, marks)
    }

    /// Takes over the slabs that an earlier daemon left; the index has what they hold by now, and
    /// what the log has of it later.
    pub(in crate::cache) fn adopt_slabs(&mut self, slabs: Vec<LoadedSlab>) {
        self.index.watch();
        for LoadedSlab { segment, life, entries } in slabs {
            self.clean.slabs.adopt(segment, life);
            for entry in &entries {
                let at = SlotAt { segment, slot: entry.slot };
                let position = self.clean.slabs.position(at);
                let mut pieces = self.index.pieces_of(entry.block);
                let Some(piece) = pieces.find(|piece| piece.position == position) else {
                    // The table does not know it yet.
                    self.clean.slabs.changed(at);
                    continue;
                };
                drop(pieces);
                self.clean.slabs.adopted(at, entry.block);
                if piece.count < piece.stored {
                    self.clean.slabs.changed(at);
                }
                let (policy, mut marks) = self.policy();
                policy.restored(entry.block, entry.uses, &mut marks);
                self.evict();
            }
            self.clean.slabs.end_sorting(segment);
        }
        self.tidy_slots();
    }

    /// A write past the log begins: until it ends nothing that it touches is kept.
    pub(in crate::cache) fn changing(&mut self, id: u32, range: SectorRange) {
        self.clean.changing.push((id, range));
        self.clean.overwritten(range.start, range.count, &mut self.reads);
    }

    /// It has ended.
    pub(in crate::cache) fn changed(&mut self, id: u32) {
        self.clean.changing.retain(|(other, _)| *other != id);
    }

    /// Segments from `count` on are to go; all stay if that is all of them.
    pub(in crate::cache) fn limit_clean(&mut self, count: u32) {
        self.clean.slabs.limit(count);
    }

    /// The allocation is about to end earlier. What comes to lie behind its end may hold tables of
    /// now when it is the cache's again: none of them counts from the next root on.
    pub(in crate::cache) fn renew_tables(&mut self) {
        self.roots.root.slab_epoch += 1;
        self.clean.forget_tables();
    }

    /// The allocation has another size; what lay in the segments that are gone has left.
    pub(in crate::cache) fn reshape_clean(&mut self, shape: Shape) {
        let clean = &mut self.clean;
        clean.slabs.reshape(shape);
        let settings = clean.held.resize(Settings::new(capacity(shape, &clean.slabs)));
        clean.policy.set(settings);
        clean.held.truncate(clean.policy.probation_slots());
        self.evict();
        self.tidy_slots();
    }

    /// Lets the policy's victims go.
    fn evict(&mut self) {
        let (policy, mut marks) = self.policy();
        while let Some(block) = policy.evict(&mut marks) {
            marks.index.drop_block(block);
        }
    }

    /// Takes note of the slots that the index does not name any more.
    pub(in crate::cache) fn tidy_slots(&mut self) {
        let mut positions = std::mem::take(&mut self.clean.positions);
        self.index.displaced(&mut positions);
        let slabs = &mut self.clean.slabs;
        for position in positions.drain(..) {
            let Some(at) = slabs.at(position) else { continue };
            let Some(block) = slabs.owner(at) else { continue };
            if self.index.pieces_of(block).any(|piece| piece.position == position) {
                slabs.changed(at);
            } else {
                slabs.free(at);
            }
        }
        self.clean.positions = positions;
    }
}
