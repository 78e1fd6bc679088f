//! Where a volume's extents are on the device: a flat array, four bytes per extent.

use super::extents::ExtentRange;
use super::table::Run;
use crate::base::units::{EXTENT_BYTES, SECTOR_BYTES};

pub(super) const EXTENT_SECTORS: u64 = EXTENT_BYTES / SECTOR_BYTES;

/// In the map: the extent has no place yet and reads as zeros.
const UNMAPPED: u32 = u32::MAX;

/// See the module.
#[derive(Default)]
pub(super) struct Places {
    /// Device extent of each extent of the volume.
    map: Vec<u32>,
}

impl Places {
    pub(super) fn resize(&mut self, size_bytes: u64) {
        self.map.resize(size_bytes.div_ceil(EXTENT_BYTES) as usize, UNMAPPED);
    }

    /// Takes over where extents are; what lies beyond the end is stale news.
    pub(super) fn learn(&mut self, runs: impl Iterator<Item = Run>) {
        for run in runs {
            for index in 0..run.count {
                if let Some(place) = self.map.get_mut((run.logical + index) as usize) {
                    *place = u32::try_from(run.physical + index).expect("POOL_BYTES_MAX");
                }
            }
        }
    }

    /// These have no place any more.
    pub(super) fn forget(&mut self, range: ExtentRange) {
        for extent in range.start..range.end() {
            if let Some(place) = self.map.get_mut(extent as usize) {
                *place = UNMAPPED;
            }
        }
    }

    /// Byte offset on the device of a sector of the volume.
    #[inline]
    pub(super) fn place(&self, sector: u64) -> Option<u64> {
        let extent = *self.map.get((sector / EXTENT_SECTORS) as usize)?;
        let inside = sector % EXTENT_SECTORS * SECTOR_BYTES;
        (extent != UNMAPPED).then(|| u64::from(extent) * EXTENT_BYTES + inside)
    }

    #[inline]
    pub(super) fn is_mapped(&self, extent: u64) -> bool {
        self.map.get(extent as usize).is_some_and(|place| *place != UNMAPPED)
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
