//! What stays on flash of one cached disk, by 4 KiB blocks: the S3-FIFO family, made for flash.
//!
//! ```text
//!   read miss ──▶ probation ──used again──────────────▶ main  (CLOCK, updated in place)
//!      │          in memory ──not sequential, thrift──▶ trial ──used──▶ main, without a write
//!      │              └──else──▶ ghost                    └──else──▶ ghost
//!      ├── known to the ghost list, or the cache has room ──▶ main
//!      └── part of a very long sequential stream ──▶ ghost
//!   drained write ──▶ main: it is on flash already
//! ```
//!
//! *Probation* (1 % of the cache by default, [`Settings::probation_permille`]) holds the newest
//! misses in memory; most blocks are never read again and never reach the flash. *Trial* is the
//! one part that differs from S3-FIFO: a small queue on flash for blocks that left probation
//! unused, as far as writes are to be had (see `budget`) and not for sequential runs. It makes up
//! for a probation a tenth of what S3-FIFO takes. *Main* is a CLOCK of two bits a block.
//!
//! It decides and stores no data: what is on flash is what the cached disk's index says. Uses and
//! place of a block (4 bits, [`Mark`]) lie with its index entry ([`Marks`]); here are only the
//! queues (5 bytes a block), the ghost list (2 bytes an entry) and probation: under 8 bytes a
//! cached block in all, taken by [`Policy::set_capacity`] and not while it runs.
//!
//! Order: [`Policy::read`] before a read; when the data of an admitted block is on flash and in the
//! index, [`Policy::filled`]; [`Policy::drained`] when a written block became clean; and after each
//! of them [`Policy::evict`] until it returns `None`. A fill that fails is simply never `filled`.
//!
//! Invariants:
//! - P1 the queues hold at most `capacity` entries once `evict` has returned `None`.
//! - P2 a victim is neither pinned nor absent.
//! - P3 a block has a place in its mark only if a queue holds it. The reverse is not so: a block
//!   that the disk forgot leaves a stale entry, which counts until a sweep meets it.
//! - P4 every call is O(1): a sweep gives each entry it passes over one use less, or ends.

mod budget;
mod ghost;
mod mark;
mod probation;
mod ring;
mod share;
mod stream;

pub use mark::{BlockHasher, Mark, MarkMap, Marks, Place};
pub use ring::BLOCKS_MAX;
pub use share::Share;

use crate::base::clock::Nanos;
use budget::{Thrift, WearBudget};
use ghost::Ghost;
use probation::{Leaver, Probation};
use ring::{Fifo, Pool};
use std::ops::Range;
use stream::{Followed, Streams};

/// Bytes of a block.
pub const BLOCK_BYTES: u64 = 4096;

/// Uses that a mark can count.
const USES_MAX: u8 = 3;

/// The ghost list remembers nine tenths as many blocks as the cache holds.
const GHOST_PERCENT: u64 = 90;

/// Trial gives way first when it holds more of the cache. With 6 the mean over all traces is a
/// little better and the worst point a little worse than LRU.
const TRIAL_PERCENT: u64 = 8;

/// Probation is at least 1 MiB, so that it means something on a small cache, but no more than a
/// tenth of it.
const PROBATION_BLOCKS_MIN: u64 = 256;
const PROBATION_SHARE_MAX: u64 = 10;

/// Entries that one call of [`Policy::reclaim`] passes over at most.
const SWEEP_MAX: u64 = 4096;

/// How a policy is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Clean blocks on flash.
    pub capacity_blocks: u64,
    /// Blocks in probation, in thousandths of the capacity.
    pub probation_permille: u32,
    /// At least so many, but no more than a tenth of the capacity.
    pub probation_blocks_min: u64,
    /// A stream that has read so many blocks goes past the cache from there.
    pub stream_blocks: u32,
}

impl Settings {
    /// 1 % of probation; streams bypass from 128 MiB. They need not sooner: what follows on the
    /// read before it never comes to trial, so a scan passes through probation and is gone.
    pub fn new(capacity_blocks: u64) -> Self {
        Self {
            capacity_blocks,
            probation_permille: 10,
            probation_blocks_min: PROBATION_BLOCKS_MIN,
            stream_blocks: 32_768,
        }
    }
}

/// What to do about a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is on flash.
    Hit,
    /// It is in this slot of probation.
    Probed { slot: u32 },
    /// Fetch it and keep it in this slot of probation, whose block has to leave first.
    Probation { slot: u32, leaves: Option<Leaves> },
    /// Fetch it and write it to flash.
    Admit,
    /// Fetch it and keep nothing.
    Bypass,
}

/// A block that leaves probation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaves {
    pub block: u64,
    /// Write the slot's data to flash, then call [`Policy::filled`] with this. `None`: drop it.
    pub to: Option<Place>,
}

/// Since the start, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub reads: u64,
    /// Of reads: on flash, and in probation.
    pub hits: u64,
    pub probed: u64,
    pub bypassed: u64,
    /// Blocks written to flash because they were read.
    pub fills: u64,
    /// Blocks not written for lack of [`Policy::set_write_budget`].
    pub refused: u64,
    pub evicted: u64,
}

/// See the module.
pub struct Policy {
    settings: Settings,
    probation: Probation,
    ghost: Ghost,
    pool: Pool,
    trial: Fifo,
    main: Fifo,
    /// The block that came last, on its way into a queue: a sweep that finds all others used must
    /// not take the one that was just written.
    newest: Option<(u64, Place)>,
    full: bool,
    streams: Streams,
    wear: WearBudget,
    thrift: Thrift,
    counters: Counters,
}

impl Policy {
    pub fn new(settings: Settings) -> Self {
        let mut policy = Self {
            settings,
            probation: Probation::default(),
            ghost: Ghost::default(),
            pool: Pool::default(),
            trial: Fifo::default(),
            main: Fifo::default(),
            newest: None,
            full: false,
            streams: Streams::default(),
            wear: WearBudget::default(),
            thrift: Thrift::default(),
            counters: Counters::default(),
        };
        policy.set_capacity(settings.capacity_blocks);
        policy
    }

    /// Changes how many blocks may be on flash. More are usable at once; if fewer,
    /// [`Policy::evict`] names what has to go. Blocks in slots from [`Policy::probation_slots`] on
    /// are dropped.
    pub fn set_capacity(&mut self, blocks: u64) {
        self.settings.capacity_blocks = blocks;
        self.thrift.resize(blocks);
        self.ghost.resize(blocks * GHOST_PERCENT / 100);
        self.pool.resize((blocks + 1).max(self.len()));
        self.trial.resize(&self.pool);
        self.main.resize(&self.pool);
        let share = blocks * u64::from(self.settings.probation_permille) / 1000;
        let least = self.settings.probation_blocks_min.min(blocks / PROBATION_SHARE_MAX);
        let ghost = &mut self.ghost;
        self.probation.resize(share.max(least) as usize, |leaver| ghost.insert(leaver.block));
    }

    /// As [`Policy::set_capacity`], and another probation.
    pub fn set(&mut self, settings: Settings) {
        self.settings = settings;
        self.set_capacity(settings.capacity_blocks);
    }

    pub fn capacity_blocks(&self) -> u64 {
        self.settings.capacity_blocks
    }

    /// 4 KiB buffers that probation needs.
    pub fn probation_slots(&self) -> usize {
        self.probation.slots()
    }

    /// Blocks on flash, stale entries included.
    pub fn len(&self) -> u64 {
        self.trial.len() + self.main.len() + u64::from(self.newest.is_some())
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Of everything here; marks are the index's.
    pub fn memory_bytes(&self) -> usize {
        let queues = self.trial.memory_bytes() + self.main.memory_bytes();
        let lists = self.ghost.memory_bytes() + self.probation.memory_bytes();
        size_of::<Self>() + self.pool.memory_bytes() + queues + lists
    }

    /// Whether the flash has no space that nobody uses: then what is read for the first time is not
    /// kept just because there are fewer blocks than may be.
    pub fn set_full(&mut self, full: bool) {
        self.full = full;
    }

    /// Bytes a day that may be written to flash, `None` without limit. Admission slows when they
    /// are used up.
    pub fn set_write_budget(&mut self, bytes_per_day: Option<u64>) {
        self.wear.set(bytes_per_day);
    }

    /// The write budget is used up for now.
    pub fn is_over_budget(&self) -> bool {
        !self.wear.allows(BLOCK_BYTES)
    }

    /// Time passes; the write budget grows. Call it once a turn or so.
    pub fn tick(&mut self, now: Nanos) {
        self.wear.tick(now);
    }

    /// The journal wrote so many bytes, or the disk for its own sake: they wear the flash as fills
    /// do.
    pub fn charge(&mut self, bytes: u64) {
        self.wear.charge(bytes);
    }

    /// A guest reads `block`.
    pub fn read(&mut self, block: u64, marks: &mut impl Marks) -> Verdict {
        if let Some(mark) = marks.mark(block) {
            let used = self.hit(block, mark);
            if used != mark {
                marks.set_mark(block, used);
            }
            return Verdict::Hit;
        }
        let followed = self.follow(block);
        if let Some(slot) = self.probation.touch(block) {
            self.counters.probed += 1;
            return Verdict::Probed { slot };
        }
        self.miss(block, followed)
    }

    /// A guest reads `block`, which is in the index with this mark; the one that it is to have.
    pub fn hit(&mut self, block: u64, mark: Mark) -> Mark {
        self.follow(block);
        self.counters.hits += 1;
        mark.used()
    }

    fn follow(&mut self, block: u64) -> Followed {
        self.counters.reads += 1;
        self.thrift.read();
        self.streams.follow(block)
    }

    fn miss(&mut self, block: u64, followed: Followed) -> Verdict {
        self.thrift.miss();
        let affordable = self.wear.allows(BLOCK_BYTES);
        let known = self.ghost.contains(block);
        if known && affordable {
            self.ghost.take(block);
            self.fill(true);
            return Verdict::Admit;
        }
        let below = !self.full && self.len() < self.settings.capacity_blocks;
        let room = below && !self.probation.has_room();
        if room && affordable {
            self.fill(false);
            return Verdict::Admit;
        }
        if followed.before >= self.settings.stream_blocks {
            self.counters.bypassed += 1;
            self.ghost.insert(block);
            return Verdict::Bypass;
        }
        self.counters.refused += u64::from((known || room) && !affordable);
        let (slot, leaver) = self.probation.insert(block, followed.adjacent);
        Verdict::Probation { slot, leaves: leaver.map(|leaver| self.leave(leaver)) }
    }

    /// Accounts for a block that will be written. Free space is filled for nothing.
    fn fill(&mut self, thrifty: bool) {
        self.counters.fills += 1;
        self.wear.charge(BLOCK_BYTES);
        if thrifty {
            self.thrift.fill();
        }
    }

    /// Where a block goes that leaves probation.
    fn leave(&mut self, leaver: Leaver) -> Leaves {
        let Leaver { block, used, sequential } = leaver;
        let to = match used {
            true => Some(Place::Main),
            false => (!sequential && self.thrift.allows()).then_some(Place::Trial),
        };
        let affordable = self.wear.allows(BLOCK_BYTES);
        if to.is_some() && affordable {
            self.fill(true);
            return Leaves { block, to };
        }
        self.counters.refused += u64::from(to.is_some());
        self.ghost.insert(block);
        Leaves { block, to: None }
    }

    /// The data of `block` is on flash and in the index: it was admitted (to [`Place::Main`]) or
    /// left probation.
    pub fn filled(&mut self, block: u64, to: Place, marks: &mut impl Marks) {
        let mark = marks.mark(block).expect("a block that was filled is in the index");
        // A write came in between and was drained: the block has its place.
        if mark.place().is_none() {
            self.enter(block, to, marks);
        }
    }

    /// A guest writes `block`: what is in memory of it is stale, and what the index says soon new.
    /// It keeps its mark, and so its place.
    pub fn written(&mut self, block: u64) {
        if self.probation.remove(block) {
            self.ghost.insert(block);
        }
    }

    /// A guest writes all of `blocks`.
    pub fn written_range(&mut self, blocks: Range<u64>) {
        if blocks.end - blocks.start <= self.probation.slots() as u64 {
            return blocks.for_each(|block| self.written(block));
        }
        let ghost = &mut self.ghost;
        self.probation.remove_range(&blocks, |block| ghost.insert(block));
    }

    /// The slot of probation that `block` is in.
    pub fn probation_slot(&self, block: u64) -> Option<u32> {
        self.probation.slot(block)
    }

    /// The newest version of `block`, which is in the index, was drained: it is clean now, and in
    /// main. It is on flash already, so it costs nothing; a block that stayed there was used.
    pub fn drained(&mut self, block: u64, marks: &mut impl Marks) {
        let mark = marks.mark(block).expect("a block that was drained is in the index");
        if mark.place().is_some() {
            marks.set_mark(block, mark.used());
            return;
        }
        self.ghost.take(block);
        self.enter(block, Place::Main, marks);
        marks.set_mark(block, Mark::at(Place::Main).with_uses(mark.uses()));
    }

    /// `block`, which is in the index, was on flash when the daemon began.
    pub fn restored(&mut self, block: u64, uses: u8, marks: &mut impl Marks) {
        if marks.mark(block).is_some_and(|mark| mark.place().is_none()) {
            self.enter(block, Place::Main, marks);
            marks.set_mark(block, Mark::at(Place::Main).with_uses(uses));
        }
    }

    fn enter(&mut self, block: u64, to: Place, marks: &mut impl Marks) {
        assert!(self.len() <= self.settings.capacity_blocks, "evict() ran since the last entry");
        if let Some((block, place)) = self.newest.replace((block, to)) {
            self.push(block, place);
        }
        marks.set_mark(block, Mark::at(to));
    }

    fn push(&mut self, block: u64, place: Place) {
        match place {
            Place::Trial => self.trial.push(block, &mut self.pool),
            Place::Main => self.main.push(block, &mut self.pool),
        }
    }

    /// `block` is discarded, or its copy was found damaged: the disk drops it from its index.
    pub fn forget(&mut self, block: u64) {
        self.probation.remove(block);
    }

    /// While there is more on flash than may be: the block that goes. Its mark has no place any
    /// more; the caller drops it from the index and frees its space. Pinned blocks that are met
    /// leave their queue instead and come back when drained.
    pub fn evict(&mut self, marks: &mut impl Marks) -> Option<u64> {
        while self.len() > self.settings.capacity_blocks {
            if let Some(block) = self.step(marks) {
                return Some(block);
            }
        }
        None
    }

    /// As [`Policy::evict`], whatever the capacity: the space is wanted for something else. `None`:
    /// nothing can go, or the sweep was long: ask again while [`Policy::is_empty`] is false.
    pub fn reclaim(&mut self, marks: &mut impl Marks) -> Option<u64> {
        let steps = self.len().min(SWEEP_MAX);
        (0..steps).find_map(|_| self.step(marks))
    }

    /// Takes one entry off the queue whose turn it is; its block, if that is the victim.
    fn step(&mut self, marks: &mut impl Marks) -> Option<u64> {
        let trial_most = self.settings.capacity_blocks * TRIAL_PERCENT / 100;
        if self.trial.len() + self.main.len() == 0 {
            let (block, place) = self.newest.take()?;
            self.push(block, place);
        }
        let from_trial = self.trial.len() > trial_most || self.main.len() == 0;
        let (place, queue) = match from_trial {
            true => (Place::Trial, &mut self.trial),
            false => (Place::Main, &mut self.main),
        };
        let block = queue.pop(&mut self.pool)?;
        let victim = self.sweep(block, place, marks);
        self.counters.evicted += u64::from(victim);
        victim.then_some(block)
    }

    /// Looks at an entry that was taken off its queue; whether it is the victim.
    fn sweep(&mut self, block: u64, place: Place, marks: &mut impl Marks) -> bool {
        let Some(mark) = marks.mark(block).filter(|mark| mark.place() == Some(place)) else {
            return false;
        };
        if marks.is_pinned(block) {
            // It comes back when it has been drained, as a block that was used.
            marks.set_mark(block, mark.without_place().used());
            return false;
        }
        if mark.uses() == 0 {
            if place == Place::Trial {
                self.ghost.insert(block);
            }
            marks.set_mark(block, Mark::default());
            return true;
        }
        let left = if place == Place::Trial { 0 } else { mark.uses() - 1 };
        self.main.push(block, &mut self.pool);
        marks.set_mark(block, Mark::at(Place::Main).with_uses(left));
        false
    }
}

/// A 64-bit hash without patterns of neighbouring blocks.
fn mix(block: u64) -> u64 {
    let mut hash = block.wrapping_add(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod model;
#[cfg(test)]
#[path = "policy_test.rs"]
mod tests;
