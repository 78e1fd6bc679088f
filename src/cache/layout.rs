//! Where everything lies in a cache's allocation and how long it is. FORMAT.md shows the same
//! tables; a test holds them together.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

#[cfg(test)]
use crate::base::byte_table::Field;
use crate::base::units::{Bytes, KIB, MIB};
use crate::base::{Error, ErrorKind, Result};

/// The version this build writes; it reads all up to it. Segments and batches are as in version 1.
pub const VERSION: u32 = 2;
pub const SEGMENT_VERSION: u32 = 1;

pub const ROOT_MAGIC: &[u8; 8] = b"VFLASHCA";
pub const SEGMENT_MAGIC: &[u8; 8] = b"VFLASHSG";
pub const SUMMARY_MAGIC: &[u8; 8] = b"VFLASHSM";
pub const BATCH_MAGIC: &[u8; 4] = b"VFBT";

/// Bytes of a root, of a segment's header and of a summary's foot.
pub const BLOCK_BYTES: u64 = 4 * KIB;

/// Bytes before the first segment.
pub const ROOTS_BYTES: u64 = MIB;

/// Two alternating roots, each twice, far enough apart that one bad block hits one copy.
pub const ROOT_OFFSETS: [[u64; 2]; 2] = [[64 * KIB, 576 * KIB], [320 * KIB, 832 * KIB]];

/// Byte offsets of the two copies of root `sequence`.
pub fn root_offsets(sequence: u64) -> [u64; 2] {
    let [even, odd] = ROOT_OFFSETS;
    if sequence.is_multiple_of(2) { even } else { odd }
}

/// Smallest and largest segment: a small one is for tests.
pub const SEGMENT_BYTES_MIN: u64 = 64 * KIB;
pub const SEGMENT_BYTES_MAX: u64 = 8 * MIB;

/// Fewer segments could not be written, drained and swept at the same time.
pub const SEGMENTS_MIN: u64 = 4;

/// Largest batch: a segment holds several.
pub const BATCH_BYTES_MAX: u64 = 512 * KIB;

/// Numbers of roots, incarnations, segments, batches, WONs and epochs never get near this; more is
/// damage.
pub const NUMBER_MAX: u64 = 1 << 62;

/// Sectors of a disk: the index keeps sector numbers in 40 bits.
pub const SECTORS_MAX: u64 = 1 << 40;

/// Bytes of an allocation: the index keeps positions in sectors in 40 bits.
pub const ALLOCATION_BYTES_MAX: u64 = SECTORS_MAX * crate::base::units::SECTOR_BYTES;

/// Bytes of a mark's name.
pub const NAME_BYTES_MAX: usize = 255;

/// Fixed part of a batch's header, and of a record's entry.
pub const BATCH_HEADER_BYTES: u32 = 88;
pub const ENTRY_BYTES: u32 = 32;
/// Where a batch's checksum is, which it is computed without.
pub const BATCH_CHECKSUM: std::ops::Range<usize> = 24..28;

/// Foot of a summary and head of each of its batches.
pub const SUMMARY_FOOT_BYTES: usize = 64;
pub const SUMMARY_ITEM_BYTES: usize = 16;

/// A page of a slab's slot table: its header, its entries, and where its checksum is.
pub const TABLE_MAGIC: &[u8; 8] = b"VFLASHST";
pub const TABLE_HEADER_BYTES: usize = 64;
pub const TABLE_ENTRY_BYTES: usize = 16;
pub const TABLE_CHECKSUM: std::ops::Range<usize> = 32..36;
pub const SLOTS_PER_PAGE: u32 = 252;

#[cfg(test)]
pub(super) const ROOT_LAYOUT: &[Field] = &[
    (0, 8, "magic"),
    (8, 4, "version"),
    (12, 4, "features"),
    (16, 16, "log uuid"),
    (32, 16, "disk uuid"),
    (48, 8, "sequence"),
    (56, 8, "allocation bytes"),
    (64, 8, "segment bytes"),
    (72, 8, "incarnation"),
    (80, 8, "secret"),
    (88, 8, "oldest segment"),
    (96, 8, "drained through"),
    (104, 8, "drained epoch"),
    (112, 8, "next WON"),
    (120, 8, "next epoch"),
    (128, 8, "end segment"),
    (136, 8, "end batch"),
    (144, 4, "end checksum"),
    (148, 1, "mode"),
    (149, 1, "flags"),
    (150, 2, "reserved"),
    (152, 8, "backing bytes"),
    (160, 4, "backing block"),
    (164, 4, "backing kind"),
    (168, 16, "backing fingerprint"),
    (184, 8, "clean from"),
    (192, 8, "slab epoch"),
    (200, 8, "slabs through"),
    (208, 8, "alone since"),
    (216, 4, "backing optimal"),
    (4092, 4, "checksum"),
];

#[cfg(test)]
pub(super) const SEGMENT_LAYOUT: &[Field] = &[
    (0, 8, "magic"),
    (8, 4, "version"),
    (12, 4, "reserved"),
    (16, 16, "log uuid"),
    (32, 8, "incarnation"),
    (40, 8, "salt"),
    (48, 8, "sequence"),
    (56, 8, "previous sequence"),
    (64, 8, "first batch"),
    (72, 8, "first WON"),
    (80, 8, "epoch"),
    (88, 8, "durable through"),
    (96, 8, "drained through"),
    (104, 4, "previous checksum"),
    (4092, 4, "checksum"),
];

#[cfg(test)]
pub(super) const BATCH_LAYOUT: &[Field] = &[
    (0, 4, "magic"),
    (4, 4, "header bytes"),
    (8, 4, "data start"),
    (12, 4, "batch bytes"),
    (16, 2, "entries"),
    (18, 2, "flags"),
    (20, 4, "previous checksum"),
    (24, 4, "checksum"),
    (28, 4, "reserved"),
    (32, 8, "salt"),
    (40, 8, "incarnation"),
    (48, 8, "sequence"),
    (56, 8, "first WON"),
    (64, 8, "epoch"),
    (72, 8, "durable through"),
    (80, 8, "drained through"),
];

#[cfg(test)]
pub(super) const ENTRY_LAYOUT: &[Field] = &[
    (0, 1, "kind"),
    (1, 1, "flags"),
    (2, 2, "queue"),
    (4, 2, "name bytes"),
    (6, 2, "reserved"),
    (8, 8, "counter"),
    (16, 8, "start"),
    (24, 8, "count"),
];

#[cfg(test)]
pub(super) const SUMMARY_ITEM_LAYOUT: &[Field] =
    &[(0, 4, "position"), (4, 4, "header bytes"), (8, 8, "reserved")];

#[cfg(test)]
pub(super) const SUMMARY_FOOT_LAYOUT: &[Field] = &[
    (0, 8, "magic"),
    (8, 8, "salt"),
    (16, 8, "sequence"),
    (24, 8, "incarnation"),
    (32, 8, "last WON"),
    (40, 8, "last batch"),
    (48, 4, "summary bytes"),
    (52, 4, "batches"),
    (56, 4, "reserved"),
    (60, 4, "checksum"),
];

#[cfg(test)]
pub(super) const TABLE_LAYOUT: &[Field] = &[
    (0, 8, "magic"),
    (8, 8, "epoch"),
    (16, 8, "life"),
    (24, 4, "segment"),
    (28, 4, "page"),
    (32, 4, "checksum"),
    (36, 4, "entries"),
    (40, 24, "reserved"),
];

#[cfg(test)]
pub(super) const TABLE_ENTRY_LAYOUT: &[Field] =
    &[(0, 8, "block"), (8, 4, "checksum"), (12, 4, "reserved")];

/// Sizes that follow from the allocation: fixed when the cache is formatted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub allocation_bytes: u64,
    /// A power of two.
    pub segment_bytes: u64,
}

impl Shape {
    /// The usual shape: 64 segments or more, of 1 to 8 MiB.
    pub fn of(allocation_bytes: u64) -> Result<Self> {
        let wanted = (allocation_bytes / 64).clamp(MIB, SEGMENT_BYTES_MAX);
        let segment_bytes =
            if wanted.is_power_of_two() { wanted } else { wanted.next_power_of_two() / 2 };
        Self::with(allocation_bytes, segment_bytes)
    }

    /// A given size of segments.
    ///
    /// # Errors
    /// `Invalid`: the allocation holds fewer than four segments, or segments have no such size.
    pub fn with(allocation_bytes: u64, segment_bytes: u64) -> Result<Self> {
        let shape = Self { allocation_bytes, segment_bytes };
        if shape.is_valid() {
            return Ok(shape);
        }
        let need = SEGMENTS_MIN.saturating_mul(MIB).saturating_add(ROOTS_BYTES);
        let text = format!(
            "a cache of {} with segments of {} holds fewer than {SEGMENTS_MIN} segments; give it \
             {} or more",
            Bytes(allocation_bytes),
            Bytes(segment_bytes),
            Bytes(need)
        );
        Err(Error::new(ErrorKind::Invalid, text))
    }

    pub(super) fn is_valid(self) -> bool {
        let sizes = SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX;
        self.segment_bytes.is_power_of_two()
            && sizes.contains(&self.segment_bytes)
            && self.segments() >= SEGMENTS_MIN
            && self.segments() <= u64::from(u32::MAX)
            && self.allocation_bytes <= ALLOCATION_BYTES_MAX
    }

    /// Segments of the allocation.
    pub fn segments(self) -> u64 {
        let rest = self.allocation_bytes.saturating_sub(ROOTS_BYTES);
        rest.checked_div(self.segment_bytes).unwrap_or(0)
    }

    /// Byte offset in the allocation of segment `index`.
    pub fn segment_offset(self, index: u32) -> u64 {
        ROOTS_BYTES.saturating_add(u64::from(index).saturating_mul(self.segment_bytes))
    }

    /// Byte offset in the allocation of a page of the slot table of segment `index`, if that is a
    /// slab: the first one is the last block of the segment.
    pub fn table_offset(self, index: u32, page: u32) -> u64 {
        let end = self.segment_offset(index).saturating_add(self.segment_bytes);
        end.saturating_sub(u64::from(page).saturating_add(1).saturating_mul(BLOCK_BYTES))
    }

    /// The segment that holds byte `offset` of the allocation.
    pub fn segment_of(self, offset: u64) -> Option<u32> {
        // A division for each entry of the index would be felt.
        let index =
            offset.checked_sub(ROOTS_BYTES)?.checked_shr(self.segment_bytes.trailing_zeros())?;
        u32::try_from(index).ok().filter(|index| u64::from(*index) < self.segments())
    }

    /// Bytes of a batch at most.
    pub fn batch_bytes_max(self) -> u64 {
        (self.segment_bytes / 4).min(BATCH_BYTES_MAX)
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#[path = "layout_test.rs"]
mod tests;
