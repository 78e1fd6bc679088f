//! Which slot of which slab holds which block. Pure.
//!
//! A *slab* is a segment that holds clean copies of single blocks: a drained segment of the log
//! whose blocks stay where they are, or a free one. It is cut into *slots* of a block each, from
//! its beginning; its end is kept for the slot table (FORMAT.md). What a reader may use is what the
//! index says; this knows which slots nobody uses.
//!
//! Invariants:
//! - S1 a slot has at most one owner, and an owner whose piece in the index lies elsewhere is gone
//!   before anything else is written there.
//! - S2 a slab that is leaving gives no slots, nor does one behind the end that the allocation is
//!   to have.

use crate::base::units::SECTOR_BYTES;
use crate::cache::layout::{BLOCK_BYTES, SLOTS_PER_PAGE, Shape};
use crate::cache::policy::BLOCKS_MAX;

const OWNER_BYTES: usize = 5;

/// Sectors of a slot.
const SLOT_SECTORS: u64 = BLOCK_BYTES / SECTOR_BYTES;

/// The owner of a slot that is being written.
const RESERVED: u64 = BLOCKS_MAX - 2;

/// A slot of the allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cache) struct SlotAt {
    pub(super) segment: u32,
    pub(super) slot: u32,
}

/// What a segment is to this.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Use {
    #[default]
    None,
    /// Its owners are being found.
    Sorting,
    /// They are all known; it gives no slots yet.
    Fresh,
    Gives,
    Leaving,
}

#[derive(Clone, Copy, Default)]
struct Slab {
    state: Use,
    /// It may have a table on flash that counts.
    table: bool,
    /// New each time; never 0.
    life: u64,
    /// Slots that have an owner.
    live: u32,
    /// No free slot is before this one.
    hint: u32,
    /// It is in `roomy`.
    roomy: bool,
    /// Table pages that differ from what was written last.
    dirty: u64,
}

/// See the module.
pub(in crate::cache) struct Slabs {
    shape: Shape,
    pages: u32,
    slots: u32,
    /// Of all slots of the allocation: block + 1; 0: free.
    owners: Vec<[u8; OWNER_BYTES]>,
    slabs: Vec<Slab>,
    /// Those that may have free slots, the one in use last.
    roomy: Vec<u32>,
    live: u64,
    /// Slabs with dirty pages.
    dirty: u64,
    next_life: u64,
    /// Segments from this one on are to go.
    limit: u32,
}

/// Table pages of a slab.
pub(in crate::cache) fn table_pages(shape: Shape) -> u32 {
    let blocks = shape.segment_bytes / BLOCK_BYTES;
    blocks.div_ceil(u64::from(SLOTS_PER_PAGE) + 1) as u32
}

impl Slabs {
    /// `life`: of the first slab; later ones go on from there. Nobody else ever had it.
    pub(super) fn new(shape: Shape, life: u64) -> Self {
        let pages = table_pages(shape);
        let slots = (shape.segment_bytes / BLOCK_BYTES) as u32 - pages;
        let segments = shape.segments() as usize;
        Self {
            shape,
            pages,
            slots,
            owners: vec![[0; OWNER_BYTES]; segments * slots as usize],
            slabs: vec![Slab::default(); segments],
            roomy: Vec::with_capacity(segments),
            live: 0,
            dirty: 0,
            next_life: life,
            limit: segments as u32,
        }
    }

    /// Only the first `count` segments give slots from now on.
    pub(super) fn limit(&mut self, count: u32) {
        let before = std::mem::replace(&mut self.limit, count);
        (before..count).for_each(|segment| self.note_room(segment));
    }

    /// The allocation has more segments, or fewer: those that go are no slabs any more.
    pub(super) fn reshape(&mut self, shape: Shape) {
        let segments = shape.segments() as usize;
        let gone = self.slabs.get(segments..).unwrap_or_default();
        assert!(gone.iter().all(|slab| slab.state == Use::None), "what goes has left");
        self.owners.resize(segments * self.slots as usize, [0; OWNER_BYTES]);
        self.slabs.resize(segments, Slab::default());
        self.roomy.retain(|segment| (*segment as usize) < segments);
        self.shape = shape;
        self.limit(segments as u32);
    }

    /// Slots of a slab.
    pub(super) fn slots(&self) -> u32 {
        self.slots
    }

    /// Slots that have an owner.
    pub(in crate::cache) fn live(&self) -> u64 {
        self.live
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.owners.capacity() * OWNER_BYTES
            + self.slabs.capacity() * size_of::<Slab>()
            + self.roomy.capacity() * size_of::<u32>()
    }

    fn start(&mut self, segment: u32, state: Use, life: u64) {
        let slab = &mut self.slabs[segment as usize];
        assert_eq!(slab.state, Use::None, "a segment becomes a slab once");
        *slab = Slab { state, life, roomy: slab.roomy, ..Slab::default() };
    }

    fn new_life(&mut self) -> u64 {
        self.next_life += 1;
        self.next_life - 1
    }

    /// The segment becomes a slab without owners.
    pub(super) fn begin(&mut self, segment: u32) {
        let life = self.new_life();
        self.start(segment, Use::Gives, life);
        self.set_dirty(segment, self.all_pages());
        self.note_room(segment);
    }

    /// The segment becomes a slab whose owners are yet to be found.
    pub(super) fn begin_sorting(&mut self, segment: u32) {
        let life = self.new_life();
        self.start(segment, Use::Sorting, life);
    }

    /// All its owners have been found: it gives no slots before [`Self::end_sorting`].
    pub(super) fn sorted(&mut self, segment: u32) {
        self.slabs[segment as usize].state = Use::Fresh;
        self.set_dirty(segment, self.all_pages());
    }

    pub(super) fn end_sorting(&mut self, segment: u32) {
        let slab = &mut self.slabs[segment as usize];
        if slab.state == Use::Fresh {
            slab.state = Use::Gives;
            self.note_room(segment);
        }
    }

    /// The segment was a slab when the daemon began; its owners are given next.
    pub(super) fn adopt(&mut self, segment: u32, life: u64) {
        self.start(segment, Use::Fresh, life);
        self.slabs[segment as usize].table = true;
    }

    /// Whether the slab gives slots.
    pub(super) fn gives(&self, segment: u32) -> bool {
        self.slabs[segment as usize].state == Use::Gives
    }

    /// The slab gives no more slots: it is to be emptied.
    pub(super) fn leave(&mut self, segment: u32) {
        self.slabs[segment as usize].state = Use::Leaving;
    }

    /// The segment is no slab any more; nothing has a slot there.
    pub(super) fn end(&mut self, segment: u32) {
        self.set_dirty(segment, 0);
        let slab = &mut self.slabs[segment as usize];
        assert!(slab.state == Use::Leaving && slab.live == 0, "an empty slab ends");
        slab.state = Use::None;
        slab.table = false;
    }

    pub(super) fn is_slab(&self, segment: u32) -> bool {
        self.slabs[segment as usize].state != Use::None
    }

    /// Slots of the slab that have an owner.
    pub(super) fn live_of(&self, segment: u32) -> u32 {
        self.slabs[segment as usize].live
    }

    pub(super) fn life(&self, segment: u32) -> u64 {
        self.slabs[segment as usize].life
    }

    fn all_pages(&self) -> u64 {
        (1 << self.pages) - 1
    }

    fn set_dirty(&mut self, segment: u32, dirty: u64) {
        let slab = &mut self.slabs[segment as usize];
        self.dirty += u64::from(dirty != 0);
        self.dirty -= u64::from(slab.dirty != 0);
        slab.dirty = dirty;
    }

    /// What the tables on flash say differs from what is so.
    pub(super) fn is_dirty(&self) -> bool {
        self.dirty > 0
    }

    /// The first page to be written, from this segment on.
    pub(super) fn next_dirty(&self, from: u32) -> Option<(u32, u32)> {
        let slabs = (0..).zip(&self.slabs).skip(from as usize);
        let mut dirty = slabs
            .filter(|(_, slab)| slab.dirty != 0 && !matches!(slab.state, Use::None | Use::Sorting));
        dirty.next().map(|(segment, slab)| (segment, slab.dirty.trailing_zeros()))
    }

    /// The page is being written as it is now.
    pub(super) fn clean(&mut self, segment: u32, page: u32) {
        let dirty = self.slabs[segment as usize].dirty & !(1 << page);
        self.set_dirty(segment, dirty);
        self.slabs[segment as usize].table = true;
    }

    pub(super) fn has_table(&self, segment: u32) -> bool {
        self.slabs[segment as usize].table
    }

    /// No table on flash counts any more.
    pub(super) fn forget_tables(&mut self) {
        for segment in 0..self.slabs.len() as u32 {
            if self.is_slab(segment) {
                self.set_dirty(segment, self.all_pages());
                self.slabs[segment as usize].table = false;
            }
        }
    }

    fn note_room(&mut self, segment: u32) {
        let slab = &mut self.slabs[segment as usize];
        let gives = slab.state == Use::Gives && segment < self.limit;
        if !slab.roomy && gives && slab.live < self.slots {
            slab.roomy = true;
            self.roomy.push(segment);
        }
    }

    fn index(&self, at: SlotAt) -> usize {
        at.segment as usize * self.slots as usize + at.slot as usize
    }

    fn set(&mut self, at: SlotAt, owner: Option<u64>) {
        let value = owner.map_or(0, |block| block + 1).to_le_bytes();
        let index = self.index(at);
        self.owners[index].copy_from_slice(&value[..OWNER_BYTES]);
        self.changed(at);
    }

    fn get(&self, at: SlotAt) -> Option<u64> {
        let mut value = [0; 8];
        value[..OWNER_BYTES].copy_from_slice(&self.owners[self.index(at)]);
        u64::from_le_bytes(value).checked_sub(1)
    }

    /// The block that the slot was given to.
    pub(super) fn owner(&self, at: SlotAt) -> Option<u64> {
        self.get(at).filter(|block| *block != RESERVED)
    }

    /// Takes a free slot, to be written; `None`: there is none.
    pub(super) fn take(&mut self) -> Option<SlotAt> {
        let segment = self.roomy()?;
        let mut at = SlotAt { segment, slot: self.slabs[segment as usize].hint };
        while self.get(at).is_some() {
            at.slot += 1;
        }
        self.give(at, RESERVED);
        self.slabs[segment as usize].hint = at.slot + 1;
        Some(at)
    }

    /// There is a free slot to be taken.
    pub(super) fn has_room(&mut self) -> bool {
        self.roomy().is_some()
    }

    /// The slab that gives the next slot.
    fn roomy(&mut self) -> Option<u32> {
        while let Some(segment) = self.roomy.last().copied() {
            let slab = &mut self.slabs[segment as usize];
            let gives = slab.state == Use::Gives && segment < self.limit;
            if gives && slab.live < self.slots {
                return Some(segment);
            }
            self.roomy.pop();
            slab.roomy = false;
        }
        None
    }

    /// Fewer slabs have begun since this one than there are segments.
    pub(super) fn is_young(&self, segment: u32) -> bool {
        self.next_life - self.life(segment) <= self.slabs.len() as u64
    }

    /// A free slot gets an owner: the block's copy is there already.
    pub(super) fn give(&mut self, at: SlotAt, block: u64) {
        assert_eq!(self.get(at), None, "a slot has one owner");
        self.set(at, Some(block));
        self.slabs[at.segment as usize].live += 1;
        self.live += 1;
    }

    /// As [`Self::give`], of what the table says already.
    pub(super) fn adopted(&mut self, at: SlotAt, block: u64) {
        let dirty = self.slabs[at.segment as usize].dirty;
        self.give(at, block);
        self.set_dirty(at.segment, dirty);
    }

    /// A slot that was taken has been written with this block.
    pub(super) fn written(&mut self, at: SlotAt, block: u64) {
        assert_eq!(self.get(at), Some(RESERVED), "a slot is written when it was taken");
        self.set(at, Some(block));
    }

    /// The slot is free.
    pub(super) fn free(&mut self, at: SlotAt) {
        assert!(self.get(at).is_some(), "a slot that has an owner is freed");
        self.set(at, None);
        let slab = &mut self.slabs[at.segment as usize];
        slab.live -= 1;
        slab.hint = slab.hint.min(at.slot);
        self.live -= 1;
        self.note_room(at.segment);
    }

    /// What the slot's table page says of it is not so any more, though it stays taken.
    pub(super) fn changed(&mut self, at: SlotAt) {
        let dirty = self.slabs[at.segment as usize].dirty | 1 << (at.slot / SLOTS_PER_PAGE);
        self.set_dirty(at.segment, dirty);
    }

    /// The slot at sector `position` of the allocation, if a slab has one that begins there.
    pub(super) fn at(&self, position: u64) -> Option<SlotAt> {
        let segment = self.shape.segment_of(position * SECTOR_BYTES)?;
        let at = self.place(segment, position)?;
        self.is_slab(segment).then_some(at)
    }

    /// As [`Self::at`], were the segment a slab.
    pub(super) fn place(&self, segment: u32, position: u64) -> Option<SlotAt> {
        let inside = position - self.shape.segment_offset(segment) / SECTOR_BYTES;
        let slot = (inside / SLOT_SECTORS) as u32;
        (inside.is_multiple_of(SLOT_SECTORS) && slot < self.slots)
            .then_some(SlotAt { segment, slot })
    }

    /// Where a slot begins, in sectors of the allocation.
    pub(super) fn position(&self, at: SlotAt) -> u64 {
        self.shape.segment_offset(at.segment) / SECTOR_BYTES + u64::from(at.slot) * SLOT_SECTORS
    }

    /// The slab that is given up first: the one with the fewest owners. `fresh`: also if it gives
    /// no slots yet.
    pub(super) fn victim(&self, fresh: bool) -> Option<u32> {
        self.fewest(0, fresh)
    }

    /// As [`Self::victim`], of those that are to go.
    pub(super) fn leaver(&self) -> Option<u32> {
        self.fewest(self.limit, true)
    }

    fn fewest(&self, from: u32, fresh: bool) -> Option<u32> {
        let may = |slab: &Slab| slab.state == Use::Gives || (fresh && slab.state == Use::Fresh);
        let slabs = (0..).zip(&self.slabs).skip(from as usize).filter(|(_, slab)| may(slab));
        slabs.min_by_key(|(_, slab)| slab.live).map(|(segment, _)| segment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::units::{KIB, MIB};

    #[test]
    fn slots_go_round_and_no_two_owners_share_one() {
        let shape = Shape::with(MIB + 4 * 64 * KIB, 64 * KIB).expect("a shape");
        let mut slabs = Slabs::new(shape, 1);
        assert_eq!((slabs.slots(), slabs.pages), (15, 1));
        assert_eq!(slabs.take(), None, "there is no slab");
        slabs.begin(2);
        slabs.begin(3);
        let mut random = fastrand::Rng::with_seed(1);
        let mut owners = std::collections::BTreeMap::new();
        for block in 0..5000 {
            match slabs.take() {
                Some(at) => {
                    slabs.written(at, block);
                    let position = slabs.position(at);
                    assert_eq!(slabs.at(position), Some(at));
                    assert_eq!(slabs.at(position + 1), None, "slots are aligned");
                    assert_eq!(owners.insert(position, block), None);
                }
                None => assert_eq!(owners.len(), 30),
            }
            while owners.len() > random.usize(0..=30) {
                let choice = random.usize(0..owners.len());
                let (position, block) = owners.iter().nth(choice).expect("one");
                let (position, block) = (*position, *block);
                let at = slabs.at(position).expect("a slot");
                assert_eq!(slabs.owner(at), Some(block));
                slabs.free(at);
                owners.remove(&position);
            }
            assert_eq!(slabs.live(), owners.len() as u64);
        }
        slabs.leave(2);
        let victim = slabs.victim(false);
        assert_eq!(victim, Some(3));
        while let Some(at) = slabs.take() {
            assert_eq!(at.segment, 3, "a slab that is leaving gives nothing");
        }
    }

    #[test]
    fn slabs_behind_the_limit_give_nothing_and_are_given_up_first() {
        let shape = Shape::with(MIB + 6 * 64 * KIB, 64 * KIB).expect("a shape");
        let mut slabs = Slabs::new(shape, 1);
        (0..6).for_each(|segment| slabs.begin(segment));
        assert_eq!(slabs.leaver(), None);
        let taken = slabs.take().expect("a slot");
        assert_eq!(taken.segment, 5);
        slabs.written(taken, 7);
        slabs.limit(4);
        assert_eq!(slabs.leaver(), Some(4), "the one with fewer owners");
        while let Some(at) = slabs.take() {
            assert!(at.segment < 4, "{at:?}");
        }
        slabs.limit(6);
        let again = slabs.take().expect("the limit was taken back");
        assert!(again.segment >= 4);
        slabs.free(again);
        slabs.limit(4);
        slabs.free(taken);
        for segment in [4, 5] {
            assert_eq!(slabs.leaver(), Some(segment));
            slabs.leave(segment);
            slabs.end(segment);
        }
        assert_eq!(slabs.leaver(), None);
        slabs.reshape(Shape::with(MIB + 4 * 64 * KIB, 64 * KIB).expect("a shape"));
        assert_eq!(slabs.take(), None, "those that stay are full");
        slabs.reshape(shape);
        slabs.begin(5);
        assert_eq!(slabs.take().map(|at| at.segment), Some(5));
    }

    #[test]
    fn table_pages_have_an_entry_for_each_slot() {
        for segment_bytes in [64 * KIB, MIB, 4 * MIB, 8 * MIB] {
            let shape = Shape::with(MIB + 4 * segment_bytes, segment_bytes).expect("a shape");
            let slabs = Slabs::new(shape, 1);
            assert!(slabs.pages * SLOTS_PER_PAGE >= slabs.slots());
            assert!(slabs.pages < 64, "one bit a page");
        }
    }
}
