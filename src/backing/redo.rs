//! The redo group: what one step of a grouped drain writes to the backing, put beside it first.
//! Pure; [`super::group`] builds groups, [`super::recover`] finishes them.
//!
//! - G1 A group counts when all of it validates: header, table and every entry's data. One flush
//!   of the sidecar makes it so.
//! - G2 The header of a group is written only after the group before it is in place in the backing
//!   and flushed there. So a valid header proves that, whether its own group is whole or not, and
//!   no group but the one with the highest number is ever applied.
//! - G3 A header is one sector and is therefore never torn: one that is not valid is damage.
//! - G4 Checksums of table and data start from a salt of disk, epoch and number: what an earlier
//!   group left in the same place does not pass.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use super::stamp::{NUMBER_MAX, Point};
#[cfg(test)]
use crate::base::byte_table::Field;
use crate::base::checksum::crc32c;
use crate::base::codec::{Reader, Writer};
use crate::base::seal::{Seal, SealedBlock, seal};
use crate::base::units::{MIB, SECTOR_BYTES};

/// Bytes of a header: one sector (G3).
pub const HEADER_BYTES: usize = 512;

/// Bytes of a table's entry.
pub const ENTRY_BYTES: u64 = 32;

/// Sectors of one entry's data: what recovery holds in memory at a time.
pub const ENTRY_SECTORS_MAX: u64 = MIB / SECTOR_BYTES;

/// The version that this build writes, and the newest that it reads.
pub const REDO_VERSION: u32 = 1;

/// What a group holds unless told otherwise.
pub const GROUP_BYTES_DEFAULT: u64 = 32 * MIB;

/// The smallest and the largest group.
pub const GROUP_BYTES_MIN: u64 = MIB;
pub const GROUP_BYTES_MAX: u64 = 1024 * MIB;

/// The group is a part of a step of a consistency group, and counts when its leader says so; or it
/// leads to a point of one.
const FEATURE_STEP: u32 = 1;

pub(super) const REDO_MAGIC: &[u8; 8] = b"VFLASHRD";

/// Transfers to the sidecar are multiples of this, whatever the device.
pub const BLOCK_BYTES: u64 = 4096;

/// Where the stamps end and the slots begin.
const SLOTS_OFFSET: u64 = 64 << 10;

/// A table has an entry for every so many bytes of data: what a group of scattered small writes
/// needs; of smaller ones a group holds less.
const BYTES_PER_ENTRY: u64 = 2048;

#[cfg(test)]
pub(super) const HEADER_LAYOUT: &[Field] = &[
    (0, 8, "magic"),
    (8, 4, "version"),
    (12, 4, "features"),
    (16, 16, "disk"),
    (32, 8, "owner epoch"),
    (40, 8, "number"),
    (48, 8, "from"),
    (56, 8, "to"),
    (64, 8, "point time"),
    (72, 8, "dirty bytes"),
    (80, 4, "flags"),
    (84, 4, "entries"),
    (88, 8, "data bytes"),
    (96, 4, "table checksum"),
    (100, 16, "leader"),
    (116, 8, "step"),
    (124, 8, "others"),
    (132, 376, "reserved"),
    (508, 4, "checksum"),
];

#[cfg(test)]
pub(super) const ENTRY_LAYOUT: &[Field] = &[
    (0, 8, "start"),
    (8, 8, "count"),
    (16, 4, "kind"),
    (20, 4, "data checksum"),
    (24, 8, "data position"),
];

/// Where things lie in a sidecar: stamps, then two slots for groups, used in turn. A slot is a
/// block with the header, the table, the data. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Data of a group, at most.
    pub data_bytes_max: u64,
    /// Room for the table.
    pub table_bytes_max: u64,
}

impl Layout {
    /// `group_bytes_max` must be possible ([`Layout::is_possible`]).
    pub fn new(group_bytes_max: u64) -> Self {
        assert!(Self::is_possible(group_bytes_max), "a group of {group_bytes_max} bytes");
        let entries = group_bytes_max.div_ceil(BYTES_PER_ENTRY);
        Self {
            data_bytes_max: group_bytes_max,
            table_bytes_max: entries.saturating_mul(ENTRY_BYTES).next_multiple_of(BLOCK_BYTES),
        }
    }

    /// Whether groups may be so large.
    pub fn is_possible(group_bytes_max: u64) -> bool {
        (GROUP_BYTES_MIN..=GROUP_BYTES_MAX).contains(&group_bytes_max)
            && group_bytes_max.is_multiple_of(BLOCK_BYTES)
    }

    /// How large groups are for a disk of this size: for a small one a quarter of it.
    pub fn group_bytes_for(disk_bytes: u64) -> u64 {
        let quarter = disk_bytes.div_euclid(4).clamp(GROUP_BYTES_MIN, GROUP_BYTES_DEFAULT);
        quarter.next_multiple_of(BLOCK_BYTES)
    }

    /// Which slot a group goes to.
    pub fn slot_of(number: u64) -> u64 {
        number.rem_euclid(2)
    }

    pub fn header_offset(&self, slot: u64) -> u64 {
        let slot_bytes =
            BLOCK_BYTES.saturating_add(self.table_bytes_max).saturating_add(self.data_bytes_max);
        SLOTS_OFFSET.saturating_add(slot.saturating_mul(slot_bytes))
    }

    pub fn table_offset(&self, slot: u64) -> u64 {
        self.header_offset(slot).saturating_add(BLOCK_BYTES)
    }

    pub fn data_offset(&self, slot: u64) -> u64 {
        self.table_offset(slot).saturating_add(self.table_bytes_max)
    }

    /// Bytes of the whole sidecar.
    pub fn sidecar_bytes(&self) -> u64 {
        self.header_offset(2)
    }
}

/// Which group it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupId {
    /// UUID of the disk.
    pub disk: [u8; 16],
    /// Of the owner that wrote it.
    pub owner_epoch: u64,
    /// From 1, one more each time, across owners.
    pub number: u64,
}

impl GroupId {
    /// From which checksums of table and data start (G4).
    pub fn salt(&self) -> u32 {
        let sum = crc32c(0, &self.disk);
        let sum = crc32c(sum, &self.owner_epoch.to_le_bytes());
        crc32c(sum, &self.number.to_le_bytes())
    }
}

/// A step of a consistency group: redo groups of all its disks that count together or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepId {
    /// UUID of the disk whose stamp says whether the step is committed.
    pub leader: [u8; 16],
    /// Grows; never the same twice for one leader.
    pub number: u64,
}

/// Bits of a step's number that are the number of the leader's redo group; above them its epoch.
const STEP_GROUP_BITS: u32 = 32;

impl StepId {
    /// The step that a redo group of its leader belongs to.
    pub fn of_leader(id: GroupId) -> Self {
        let group = id.number & (1_u64 << STEP_GROUP_BITS).wrapping_sub(1);
        let number = id.owner_epoch.wrapping_shl(STEP_GROUP_BITS) | group;
        Self { leader: id.disk, number: number & NUMBER_MAX.wrapping_sub(1) }
    }
}

/// What a group takes the backing from and to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// The backing is at this point before.
    pub from: u64,
    /// And at this one after.
    pub to: u64,
    /// When the write `to` was acknowledged, in milliseconds of the Unix epoch.
    pub point_ms: u64,
    /// What the flash still holds besides, when the group was made.
    pub dirty_bytes: u64,
    /// The request after `to` is in it as far as there was room: one larger than a group.
    pub part: bool,
    /// The last so many numbers up to `to` are of other disks of its consistency group.
    pub others: u64,
}

impl Span {
    /// Where the backing is afterwards.
    pub fn point(&self) -> Point {
        Point { won: self.to, time_ms: self.point_ms, others: self.others }
    }
}

/// A group's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupHeader {
    pub id: GroupId,
    pub span: Span,
    /// `None`: it counts by itself.
    pub step: Option<StepId>,
    /// In the table.
    pub entries: u32,
    /// In the data area.
    pub data_bytes: u64,
    pub table_checksum: u32,
}

/// What a header's sector turned out to be.
pub type HeaderBlock = SealedBlock<GroupHeader>;

const SEAL: Seal = Seal { magic: REDO_MAGIC, version: REDO_VERSION, features: FEATURE_STEP };

const FLAG_PART: u32 = 1;

impl GroupHeader {
    /// One block: the header and zeros behind it.
    pub fn encode(&self) -> Vec<u8> {
        let plain = self.step.is_none() && self.span.others == 0;
        let mut writer = SEAL.begin_with(if plain { 0 } else { FEATURE_STEP });
        writer.bytes(&self.id.disk);
        writer.u64(self.id.owner_epoch).u64(self.id.number);
        writer.u64(self.span.from).u64(self.span.to).u64(self.span.point_ms);
        writer.u64(self.span.dirty_bytes).u32(if self.span.part { FLAG_PART } else { 0 });
        writer.u32(self.entries).u64(self.data_bytes).u32(self.table_checksum);
        let none = StepId { leader: [0; 16], number: 0 };
        let step = self.step.unwrap_or(none);
        writer.bytes(&step.leader).u64(step.number).u64(self.span.others);
        let mut bytes = seal(writer, HEADER_BYTES, 0);
        bytes.resize(BLOCK_BYTES as usize, 0);
        bytes
    }

    /// Looks at the first sector of `block`. Never fails on any bytes.
    pub fn decode(block: &[u8], layout: &Layout) -> HeaderBlock {
        let Some(sector) = block.get(..HEADER_BYTES) else {
            return HeaderBlock::Damaged("the block is short");
        };
        SEAL.open(sector, |reader| Self::fields(reader).filter(|header| header.fits(layout)))
    }

    fn fields(reader: &mut Reader<'_>) -> Option<Self> {
        let id =
            GroupId { disk: reader.array()?, owner_epoch: reader.u64()?, number: reader.u64()? };
        let (from, to) = (reader.u64()?, reader.u64()?);
        let (point_ms, dirty_bytes) = (reader.u64()?, reader.u64()?);
        let flags = reader.u32()?;
        let (entries, data_bytes) = (reader.u32()?, reader.u64()?);
        let table_checksum = reader.u32()?;
        let step = StepId { leader: reader.array()?, number: reader.u64()? };
        let step = (step.number > 0).then_some(step);
        let others = reader.u64()?;
        if from > to
            || others > to
            || [to, id.owner_epoch, id.number].iter().any(|one| *one > NUMBER_MAX)
        {
            return None;
        }
        let part = flags & FLAG_PART != 0;
        let span = Span { from, to, point_ms, dirty_bytes, part, others };
        Some(Self { id, span, step, entries, data_bytes, table_checksum })
    }

    fn fits(&self, layout: &Layout) -> bool {
        self.table_bytes() <= layout.table_bytes_max && self.data_bytes <= layout.data_bytes_max
    }

    /// Bytes of the table.
    pub fn table_bytes(&self) -> u64 {
        u64::from(self.entries).saturating_mul(ENTRY_BYTES)
    }
}

/// What an entry puts into its sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// `position` in bytes from the start of the data area.
    Data {
        position: u64,
        checksum: u32,
    },
    Zero,
    Discard,
}

/// Sectors of the backing and what a group puts there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// In sectors.
    pub start: u64,
    /// In sectors.
    pub count: u64,
    pub content: Content,
}

impl Entry {
    pub(super) fn encode(&self, writer: &mut Writer) {
        let (kind, checksum, position) = match self.content {
            Content::Data { position, checksum } => (1, checksum, position),
            Content::Zero => (2, 0, 0),
            Content::Discard => (3, 0, 0),
        };
        writer.u64(self.start).u64(self.count).u32(kind).u32(checksum).u64(position);
    }

    fn decode(reader: &mut Reader<'_>) -> Option<Self> {
        let (start, count) = (reader.u64()?, reader.u64()?);
        let (kind, checksum, position) = (reader.u32()?, reader.u32()?, reader.u64()?);
        let content = match kind {
            1 => Content::Data { position, checksum },
            2 => Content::Zero,
            3 => Content::Discard,
            _ => return None,
        };
        Some(Self { start, count, content })
    }

    /// Byte offset in the backing.
    pub fn offset(&self) -> u64 {
        self.start.saturating_mul(SECTOR_BYTES)
    }

    /// Bytes in the backing.
    pub fn length(&self) -> u64 {
        self.count.saturating_mul(SECTOR_BYTES)
    }

    /// Where it ends, in sectors, if it means something: behind `from`, within the disk, and its
    /// data within the data area.
    fn end(&self, from: u64, sectors: u64, data_bytes: u64) -> Option<u64> {
        let end = self.start.checked_add(self.count)?;
        if self.count == 0 || self.start < from || end > sectors {
            return None;
        }
        if let Content::Data { position, .. } = self.content {
            let inside = position.checked_add(self.length())? <= data_bytes;
            let aligned = position.is_multiple_of(SECTOR_BYTES);
            if self.count > ENTRY_SECTORS_MAX || !inside || !aligned {
                return None;
            }
        }
        Some(end)
    }
}

/// Why a table is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableFault {
    /// Not the bytes that the header tells of: the group was not written whole.
    Checksum,
    /// The right bytes, and they make no sense for a disk of this size.
    Impossible,
}

/// The entries of `header`'s table, in ascending order and disjoint, within a disk of `sectors`.
/// `bytes` may go on behind the table. Never fails on any bytes but by a fault.
pub fn decode_table(
    bytes: &[u8],
    header: &GroupHeader,
    sectors: u64,
) -> Result<Vec<Entry>, TableFault> {
    let length = usize::try_from(header.table_bytes()).map_err(|_| TableFault::Impossible)?;
    let table = bytes.get(..length).ok_or(TableFault::Checksum)?;
    if crc32c(header.id.salt(), table) != header.table_checksum {
        return Err(TableFault::Checksum);
    }
    let mut reader = Reader::new(table);
    let mut entries = Vec::with_capacity(header.entries as usize);
    let mut end = 0;
    while reader.remaining() > 0 {
        let entry = Entry::decode(&mut reader).ok_or(TableFault::Impossible)?;
        end = entry.end(end, sectors, header.data_bytes).ok_or(TableFault::Impossible)?;
        entries.push(entry);
    }
    Ok(entries)
}
