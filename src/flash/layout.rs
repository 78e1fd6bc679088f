//! Where everything lies on the device and how long it is. FORMAT.md shows the same tables; a test
//! holds them together.

use super::extents::{ExtentRange, ExtentSet};
#[cfg(test)]
use crate::base::byte_table::Field;
use crate::base::units::{EXTENT_BYTES, KIB, MIB};
use crate::base::{Error, ErrorKind, Result};

/// The version this build writes and the only one it reads.
pub(super) const VERSION: u32 = 1;

/// Bytes of every metadata block: roots, and the unit of tables and records.
pub(super) const BLOCK_BYTES: u64 = 4 * KIB;

pub(super) const ROOT_MAGIC: &[u8; 8] = b"VFLASHPL";
pub(super) const TABLE_MAGIC: &[u8; 8] = b"VFLASHTB";
pub(super) const RECORD_MAGIC: &[u8; 8] = b"VFLASHRC";

/// Byte offset of root `sequence`: two alternating places, two copies of each, all in extent 0 and
/// far enough apart that one bad block or one misplaced write hits one copy.
pub(super) fn root_offset(sequence: u64, copy: usize) -> u64 {
    let copies = ROOT_OFFSETS[(sequence % 2) as usize];
    copies[copy]
}

pub(super) const ROOT_OFFSETS: [[u64; 2]; 2] = [[64 * KIB, 576 * KIB], [320 * KIB, 832 * KIB]];

#[cfg(test)]
pub(super) const ROOT_LAYOUT: &[Field] = &[
    (0, 8, "magic"),
    (8, 4, "version"),
    (12, 4, "features"),
    (16, 16, "uuid"),
    (32, 8, "sequence"),
    (40, 8, "device bytes"),
    (48, 4, "extent bytes"),
    (52, 4, "active area"),
    (56, 8, "table bytes"),
    (64, 4, "table checksum"),
    (68, 4, "reserved"),
    (72, 8, "record sequence"),
    (80, 8, "salt"),
    (88, 8, "table capacity"),
    (96, 8, "log bytes"),
    (104, 8, "area 0 copy 0"),
    (112, 8, "area 0 copy 1"),
    (120, 8, "area 1 copy 0"),
    (128, 8, "area 1 copy 1"),
    (136, 1, "name bytes"),
    (137, 63, "name"),
    (4092, 4, "checksum"),
];

#[cfg(test)]
pub(super) const TABLE_LAYOUT: &[Field] = &[
    (0, 8, "magic"),
    (8, 16, "uuid"),
    (24, 8, "root sequence"),
    (32, 8, "next id"),
    (40, 8, "allocations"),
    (48, 8, "unscrubbed ranges"),
    (56, 8, "device extents"),
];
pub(super) const TABLE_HEADER_BYTES: u64 = 64;

#[cfg(test)]
pub(super) const ALLOCATION_LAYOUT: &[Field] = &[
    (0, 8, "id"),
    (8, 8, "size bytes"),
    (16, 2, "name bytes"),
    (18, 1, "class"),
    (19, 1, "flags"),
    (20, 4, "attribute bytes"),
    (24, 8, "runs"),
];
pub(super) const ALLOCATION_HEADER_BYTES: u64 = 32;

#[cfg(test)]
pub(super) const RUN_LAYOUT: &[Field] = &[
    (0, 4, "logical"),
    (4, 4, "physical"),
    (8, 4, "count"),
    (12, 4, "reserved"),
    (16, 8, "generation"),
];
pub(super) const RUN_BYTES: u64 = 24;

#[cfg(test)]
pub(super) const RANGE_LAYOUT: &[Field] = &[(0, 8, "start"), (8, 8, "count")];
#[cfg(test)]
pub(super) const RANGE_BYTES: u64 = 16;

#[cfg(test)]
pub(super) const RECORD_LAYOUT: &[Field] = &[
    (0, 8, "magic"),
    (8, 8, "salt"),
    (16, 8, "sequence"),
    (24, 4, "record bytes"),
    (28, 4, "payload bytes"),
    (32, 4, "previous checksum"),
    (36, 4, "checksum"),
    (40, 4, "changes"),
    (44, 4, "reserved"),
];
pub(super) const RECORD_HEADER_BYTES: usize = 48;

/// Where a record's checksum is, which it is computed without.
pub(super) const RECORD_CHECKSUM: std::ops::Range<usize> = 36..40;

/// Bytes of a pool's name.
pub const POOL_NAME_BYTES_MAX: usize = 63;

/// Bytes of an allocation's name.
pub const NAME_BYTES_MAX: usize = 255;

/// Bytes of an allocation's attributes.
pub const ATTRIBUTES_BYTES_MAX: usize = 4096;

/// The smallest pool: below, metadata would be most of it.
pub const POOL_BYTES_MIN: u64 = 16 * MIB;

/// Extent numbers are 32 bits on flash.
pub(super) const POOL_BYTES_MAX: u64 = EXTENT_BYTES * (u32::MAX as u64);

/// Roots, records and ids count from 1 and never get near this; more is damage.
pub(super) const SEQUENCE_MAX: u64 = 1 << 62;

/// The largest log, so that reading a damaged root cannot ask for all memory.
pub(super) const LOG_BYTES_MAX: u64 = 64 * MIB;

/// The smallest log: room for a few records between checkpoints.
pub(super) const LOG_BYTES_MIN: u64 = 4 * BLOCK_BYTES;

/// Headers, names and attributes of all allocations of the largest pool.
const ENTRY_BYTES_MAX: u64 = 16 * MIB;

/// Where metadata lies besides the roots: two areas (one active), each twice. An area is a table
/// followed by a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Size of the device that the pool uses.
    pub device_bytes: u64,
    pub table_capacity: u64,
    pub log_bytes: u64,
    /// Byte offsets by area and copy.
    pub areas: [[u64; 2]; 2],
}

impl Plan {
    pub(super) fn extents(&self) -> u64 {
        self.device_bytes / EXTENT_BYTES
    }

    fn area_bytes(&self) -> u64 {
        self.table_capacity.saturating_add(self.log_bytes)
    }

    pub(super) fn area_extents(&self) -> u64 {
        self.area_bytes().div_ceil(EXTENT_BYTES)
    }

    /// Bytes for names, attributes and headers of all allocations together: what the table can
    /// hold beyond the worst case of its runs (every extent a run of its own).
    pub(super) fn entry_bytes_max(&self) -> u64 {
        self.table_capacity.saturating_sub(runs_bytes_max(self.extents()))
    }

    /// Extents that are not for data. An error names what is wrong with the plan itself.
    pub(super) fn metadata(&self) -> Result<ExtentSet> {
        let corrupt = |text: &str| Error::new(ErrorKind::Corrupt, format!("the root says {text}"));
        let aligned = |bytes: u64| bytes.is_multiple_of(BLOCK_BYTES);
        if self.device_bytes < POOL_BYTES_MIN || self.device_bytes > POOL_BYTES_MAX {
            return Err(corrupt("a device size that no pool has"));
        }
        if !aligned(self.table_capacity) || !aligned(self.log_bytes) {
            return Err(corrupt("table and log are not whole blocks"));
        }
        let log = LOG_BYTES_MIN..=LOG_BYTES_MAX;
        if !log.contains(&self.log_bytes) || self.entry_bytes_max() > ENTRY_BYTES_MAX + BLOCK_BYTES
        {
            return Err(corrupt("table and log have impossible sizes"));
        }
        if self.table_capacity < runs_bytes_max(self.extents()) {
            return Err(corrupt("the table is too small for its worst case"));
        }
        let mut metadata = ExtentSet::default();
        assert!(metadata.insert(ExtentRange { start: 0, count: 1 }), "the set was empty");
        for offset in self.areas.into_iter().flatten() {
            let area = ExtentRange { start: offset / EXTENT_BYTES, count: self.area_extents() };
            let inside = offset.is_multiple_of(EXTENT_BYTES) && area.end() <= self.extents();
            if !inside || !metadata.insert(area) {
                return Err(corrupt("metadata areas overlap or lie outside the device"));
            }
        }
        Ok(metadata)
    }
}

/// The table's length when no two extents are in one run: an extent is in a run or in an
/// unscrubbed range, never in both.
fn runs_bytes_max(extents: u64) -> u64 {
    TABLE_HEADER_BYTES + extents * RUN_BYTES
}

/// Sizes of table and log for a device: entries get a four-thousandth of it, the log what is left
/// of the area's last extent.
pub(super) fn area_sizes(device_bytes: u64) -> (u64, u64) {
    let entries = (device_bytes / 4096).clamp(256 * KIB, ENTRY_BYTES_MAX);
    let worst = runs_bytes_max(device_bytes / EXTENT_BYTES) + entries;
    let table_capacity = worst.next_multiple_of(BLOCK_BYTES);
    let area = (table_capacity + 256 * KIB).next_multiple_of(EXTENT_BYTES);
    (table_capacity, area - table_capacity)
}

#[cfg(test)]
#[path = "layout_test.rs"]
mod tests;
