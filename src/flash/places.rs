//! Where a volume's extents are on the device: four bytes per extent, in chunks that take no memory
//! before something of them has a place. A thin volume may be far larger than its pool.

use super::extents::ExtentRange;
use super::table::Run;
use crate::base::units::{EXTENT_BYTES, SECTOR_BYTES};

pub(super) const EXTENT_SECTORS: u64 = EXTENT_BYTES / SECTOR_BYTES;

/// In a chunk: the extent has no place yet and reads as zeros.
const UNMAPPED: u32 = u32::MAX;

/// Extents of a chunk: 16 KiB of memory for 4 GiB of the volume.
const CHUNK_EXTENTS: u64 = 4096;

/// Device extent of each extent.
type Chunk = Box<[u32; CHUNK_EXTENTS as usize]>;

/// See the module.
#[derive(Default)]
pub(super) struct Places {
    /// Extents of the volume.
    extents: u64,
    chunks: Vec<Option<Chunk>>,
}

impl Places {
    pub(super) fn resize(&mut self, size_bytes: u64) {
        self.forget(ExtentRange { start: size_bytes.div_ceil(EXTENT_BYTES), count: self.extents });
        self.extents = size_bytes.div_ceil(EXTENT_BYTES);
        self.chunks.resize_with(self.extents.div_ceil(CHUNK_EXTENTS) as usize, || None);
    }

    /// Takes over where extents are; what lies beyond the end is stale news.
    pub(super) fn learn(&mut self, runs: impl Iterator<Item = Run>) {
        for run in runs {
            for index in 0..run.count.min(self.extents.saturating_sub(run.logical)) {
                let place = u32::try_from(run.physical + index).expect("POOL_BYTES_MAX");
                let extent = run.logical + index;
                let chunk = &mut self.chunks[(extent / CHUNK_EXTENTS) as usize];
                let chunk = chunk.get_or_insert_with(|| Box::new([UNMAPPED; _]));
                chunk[(extent % CHUNK_EXTENTS) as usize] = place;
            }
        }
    }

    /// These have no place any more.
    pub(super) fn forget(&mut self, range: ExtentRange) {
        let end = range.end().min(self.extents);
        let mut at = range.start;
        while at < end {
            let (inside, chunk) = (at % CHUNK_EXTENTS, (at / CHUNK_EXTENTS) as usize);
            let count = (CHUNK_EXTENTS - inside).min(end - at);
            if let Some(chunk) = &mut self.chunks[chunk] {
                chunk[inside as usize..(inside + count) as usize].fill(UNMAPPED);
            }
            at += count;
        }
    }

    #[inline]
    fn get(&self, extent: u64) -> Option<u32> {
        let chunk = self.chunks.get((extent / CHUNK_EXTENTS) as usize)?.as_ref()?;
        let place = chunk[(extent % CHUNK_EXTENTS) as usize];
        (place != UNMAPPED).then_some(place)
    }

    /// Byte offset on the device of a sector of the volume.
    #[inline]
    pub(super) fn place(&self, sector: u64) -> Option<u64> {
        let extent = self.get(sector / EXTENT_SECTORS)?;
        let inside = sector % EXTENT_SECTORS * SECTOR_BYTES;
        Some(u64::from(extent) * EXTENT_BYTES + inside)
    }

    #[inline]
    pub(super) fn is_mapped(&self, extent: u64) -> bool {
        self.get(extent).is_some()
    }

    /// The longest part of `first..end` that begins at `first` and lies in one piece on the
    /// device, or has no place throughout: its offset on the device, and its end.
    #[inline]
    pub(super) fn piece(&self, first: u64, end: u64) -> (Option<u64>, u64) {
        let start = self.place(first);
        let mut at = (first / EXTENT_SECTORS + 1) * EXTENT_SECTORS;
        while at < end && self.place(at) == start.map(|start| start + (at - first) * SECTOR_BYTES) {
            at += EXTENT_SECTORS;
        }
        (start, at.min(end))
    }

    pub(super) fn all_mapped(&self, first: u64, end: u64) -> bool {
        (first / EXTENT_SECTORS..end.div_ceil(EXTENT_SECTORS)).all(|extent| self.is_mapped(extent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::units::{MIB, TIB};

    #[test]
    fn a_promise_takes_no_memory_and_what_was_cut_off_does_not_come_back() {
        let mut places = Places::default();
        places.resize(1024 * TIB);
        let far = 512 * TIB / EXTENT_BYTES;
        places.learn([Run { logical: far - 2, physical: 7, count: 4, generation: 1 }].into_iter());
        let chunks = || places.chunks.iter().flatten().count();
        assert_eq!(chunks(), 2, "those that the run lies in");
        assert_eq!(places.place(far * EXTENT_SECTORS + 3), Some(9 * EXTENT_BYTES + 3 * 512));
        assert!(places.is_mapped(far + 1) && !places.is_mapped(far + 2) && !places.is_mapped(0));
        places.forget(ExtentRange { start: far - 2, count: 1 });
        assert!(!places.is_mapped(far - 2) && places.is_mapped(far - 1));
        places.resize(512 * TIB + MIB);
        places.resize(1024 * TIB);
        assert!(places.is_mapped(far) && !places.is_mapped(far + 1));
        assert!(!places.is_mapped(1024 * TIB / EXTENT_BYTES), "beyond the end");
    }
}
