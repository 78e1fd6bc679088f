//! The data of probation: a buffer a slot, taken when it is needed, within what the daemon may take
//! for all disks.

use crate::base::limits::PROBATION_BYTES_MAX;
use crate::cache::policy::{BLOCK_BYTES, Settings};
use std::sync::atomic::{AtomicU64, Ordering};

/// What all disks together have taken.
static TAKEN: AtomicU64 = AtomicU64::new(0);

pub(super) type Block = [u8; BLOCK_BYTES as usize];

#[derive(Default)]
struct Place {
    data: Option<Box<Block>>,
    /// The data is that of the slot's block.
    there: bool,
}

/// See the module.
pub(super) struct Held {
    places: Vec<Place>,
    taken_bytes: u64,
}

impl Held {
    /// Takes a part of the daemon's memory; the settings with probation as large as it may be.
    pub(super) fn new(settings: Settings) -> (Self, Settings) {
        let mut held = Self { places: Vec::new(), taken_bytes: 0 };
        let settings = held.resize(settings);
        (held, settings)
    }

    /// As [`Self::new`], for a cache of another size.
    pub(super) fn resize(&mut self, settings: Settings) -> Settings {
        TAKEN.fetch_sub(self.taken_bytes, Ordering::Relaxed);
        let permille = u64::from(settings.probation_permille);
        let least = settings.probation_blocks_min.min(settings.capacity_blocks / 10);
        let wanted = (settings.capacity_blocks * permille / 1000).max(least) * BLOCK_BYTES;
        let mut taken = 0;
        let take = |before: u64| {
            taken = wanted.min(PROBATION_BYTES_MAX.saturating_sub(before));
            Some(before + taken)
        };
        // Nothing else depends on what it guards.
        let _ = TAKEN.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        let blocks = taken / BLOCK_BYTES;
        self.taken_bytes = taken;
        match taken < wanted {
            true => Settings {
                probation_permille: (blocks * 1000 / settings.capacity_blocks.max(1)) as u32,
                probation_blocks_min: blocks,
                ..settings
            },
            false => settings,
        }
    }

    /// Only the first `slots` are used any more.
    pub(super) fn truncate(&mut self, slots: usize) {
        self.places.truncate(slots);
    }

    /// The slot has another block, or none: what it holds is nobody's.
    pub(super) fn clear(&mut self, slot: u32) {
        if let Some(place) = self.places.get_mut(slot as usize) {
            place.there = false;
        }
    }

    /// The data of the slot's block has come.
    pub(super) fn put(&mut self, slot: u32, block: &Block) {
        if self.places.len() <= slot as usize {
            self.places.resize_with(slot as usize + 1, Place::default);
        }
        let place = &mut self.places[slot as usize];
        place
            .data
            .get_or_insert_with(|| Box::new([0; BLOCK_BYTES as usize]))
            .copy_from_slice(block);
        place.there = true;
    }

    pub(super) fn get(&self, slot: u32) -> Option<&Block> {
        let place = self.places.get(slot as usize).filter(|place| place.there)?;
        place.data.as_deref()
    }

    pub(super) fn memory_bytes(&self) -> usize {
        let data = self.places.iter().filter(|place| place.data.is_some()).count();
        data * BLOCK_BYTES as usize + self.places.capacity() * size_of::<Place>()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        TAKEN.fetch_sub(self.taken_bytes, Ordering::Relaxed);
    }
}
