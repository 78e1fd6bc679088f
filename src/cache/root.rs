//! The root: one 4 KiB block that says which log this is, where it ends and what it has drained.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use super::layout::{BLOCK_BYTES, NUMBER_MAX, ROOT_MAGIC, Shape, VERSION};
use crate::base::codec::Reader;
use crate::base::planted::{Bug, planted};
use crate::base::seal::{Seal, SealedBlock, seal};
use crate::io::disk::DiskGeometry;

/// How a cached disk treats writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// A write is acknowledged when the log has it, and drained later.
    #[default]
    WriteBack,
    /// A write is acknowledged when the log has it and it has been drained.
    WriteThrough,
    /// Writes go to the backing alone; what the cache holds of the range is dropped.
    WriteAround,
    /// As write-around, for disks that are mostly read.
    ReadOnly,
    /// Nothing touches the cache.
    Bypass,
}

impl Mode {
    /// Writes are journalled.
    pub fn journals(self) -> bool {
        matches!(self, Self::WriteBack | Self::WriteThrough)
    }

    /// Whatever differs from what was kept is in the log: all writes go there, or there is none,
    /// since the disk is a `golden` image. Bypass keeps nothing.
    pub fn tells_all(self, golden: bool) -> bool {
        self.journals() || (golden && self == Self::ReadOnly)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::WriteBack => "write-back",
            Self::WriteThrough => "write-through",
            Self::WriteAround => "write-around",
            Self::ReadOnly => "read-only",
            Self::Bypass => "bypass",
        }
    }

    fn code(self) -> u8 {
        match self {
            Self::WriteBack => 0,
            Self::WriteThrough => 1,
            Self::WriteAround => 2,
            Self::ReadOnly => 3,
            Self::Bypass => 4,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::WriteBack,
            1 => Self::WriteThrough,
            2 => Self::WriteAround,
            3 => Self::ReadOnly,
            4 => Self::Bypass,
            _ => return None,
        })
    }
}

/// What the backing was when the cache was made for it; another one is refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackingIdentity {
    pub size_bytes: u64,
    pub block_bytes: u32,
    /// File, block device, NBD: the backing's own numbers.
    pub kind: u32,
    /// What the backing can say of itself that survives a reboot; zeros if nothing.
    pub fingerprint: [u8; 16],
}

/// Where the log of earlier incarnations ends: batches from `batch` on do not count, whatever
/// they look like, unless this incarnation wrote them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogEnd {
    /// Sequence of the last segment that counts; 0: none.
    pub segment: u64,
    /// Sequence of the first batch that does not.
    pub batch: u64,
    /// Checksum of the last batch that does.
    pub checksum: u32,
}

/// A cache's root, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    pub log_uuid: [u8; 16],
    /// Of the virtual disk: the backing's stamp has the same.
    pub disk_uuid: [u8; 16],
    /// Of roots: the highest valid one counts.
    pub sequence: u64,
    pub shape: Shape,
    /// One more, durably, each time the log is opened for writing.
    pub incarnation: u64,
    /// Of this log alone: seeds what must not be forged.
    pub secret: u64,
    /// Segments below this sequence hold only records that are drained.
    pub oldest_segment: u64,
    /// The backing (with its sidecar) holds every write up to this WON.
    pub drained_through: u64,
    /// The epoch of that WON.
    pub drained_epoch: u64,
    /// No WON from this on was given when the root was written by an opening.
    pub next_won: u64,
    pub next_epoch: u64,
    pub end: LogEnd,
    pub mode: Mode,
    /// Drained segments below this sequence are not to be trusted: writes passed them by.
    pub clean_from: u64,
    /// Slot tables of another epoch do not count. 0: none does.
    pub slab_epoch: u64,
    /// The slot tables know of every write up to this WON.
    pub slabs_through: u64,
    /// Detached cleanly: all is drained and nobody has opened the log since.
    pub clean: bool,
    pub backing: BackingIdentity,
    /// The log was opened without its backing and has not had it since: the newest WON that was in
    /// it, or drained, the first time.
    pub alone_since: Option<u64>,
    /// What the backing writes without reading, as guests are told; 0: not known.
    pub optimal_bytes: u32,
}

/// What a root's block turned out to be.
pub type RootBlock = SealedBlock<Box<Root>>;

const SEAL: Seal = Seal { magic: ROOT_MAGIC, version: VERSION, features: 0 };

const FLAG_CLEAN: u8 = 1;

impl Root {
    pub fn encode(&self) -> Vec<u8> {
        let flags = if self.clean { FLAG_CLEAN } else { 0 };
        let mut writer = SEAL.begin();
        writer.bytes(&self.log_uuid).bytes(&self.disk_uuid).u64(self.sequence);
        writer.u64(self.shape.allocation_bytes).u64(self.shape.segment_bytes);
        writer.u64(self.incarnation).u64(self.secret).u64(self.oldest_segment);
        writer.u64(self.drained_through).u64(self.drained_epoch);
        writer.u64(self.next_won).u64(self.next_epoch);
        writer.u64(self.end.segment).u64(self.end.batch).u32(self.end.checksum);
        writer.u8(self.mode.code()).u8(flags).u16(0);
        let backing = &self.backing;
        writer.u64(backing.size_bytes).u32(backing.block_bytes).u32(backing.kind);
        writer.bytes(&backing.fingerprint).u64(self.clean_from);
        writer.u64(self.slab_epoch).u64(self.slabs_through);
        let alone = self.alone_since.map_or(0, |won| won.saturating_add(1));
        writer.u64(alone).u32(self.optimal_bytes);
        seal(writer, BLOCK_BYTES as usize, 0)
    }

    /// The backing as it was, for guests of a disk whose backing is away: nothing can be asked of
    /// it, and any memory and block that it may need is kept to.
    pub fn geometry(&self) -> DiskGeometry {
        let block_bytes = self.backing.block_bytes;
        DiskGeometry {
            size_bytes: self.backing.size_bytes,
            block_bytes,
            optimal_bytes: self.optimal_bytes.max(block_bytes),
            memory_alignment: BLOCK_BYTES as u32,
            zero: false,
            discard: false,
        }
    }

    /// Never fails on any bytes.
    pub fn decode(block: &[u8]) -> RootBlock {
        SEAL.open(block, |reader| Self::fields(reader).map(Box::new))
    }

    fn fields(reader: &mut Reader<'_>) -> Option<Self> {
        let number = |reader: &mut Reader<'_>| reader.u64().filter(|value| *value <= NUMBER_MAX);
        let log_uuid = reader.array()?;
        let disk_uuid = reader.array()?;
        let sequence = number(reader)?;
        let shape = Shape { allocation_bytes: reader.u64()?, segment_bytes: reader.u64()? };
        let incarnation = number(reader)?;
        let secret = reader.u64()?;
        let oldest_segment = number(reader)?;
        let drained_through = number(reader)?;
        let drained_epoch = number(reader)?;
        let next_won = number(reader)?;
        let next_epoch = number(reader)?;
        let end =
            LogEnd { segment: number(reader)?, batch: number(reader)?, checksum: reader.u32()? };
        let mode = Mode::from_code(reader.u8()?)?;
        let flags = reader.u8()?;
        let _reserved = reader.u16()?;
        let backing = BackingIdentity {
            size_bytes: reader.u64()?,
            block_bytes: reader.u32()?,
            kind: reader.u32()?,
            fingerprint: reader.array()?,
        };
        let clean_from = number(reader)?;
        // Zeros in version 1.
        let (slab_epoch, slabs_through) = (number(reader)?, number(reader)?);
        let alone_since = number(reader)?.checked_sub(1);
        let optimal_bytes = reader.u32()?;
        (shape.is_valid() && flags & !FLAG_CLEAN == 0).then_some(Self {
            log_uuid,
            disk_uuid,
            sequence,
            shape,
            incarnation,
            secret,
            oldest_segment,
            drained_through,
            drained_epoch,
            next_won,
            next_epoch,
            end,
            mode,
            clean_from,
            slab_epoch,
            slabs_through,
            clean: flags & FLAG_CLEAN != 0,
            backing,
            alone_since,
            optimal_bytes,
        })
    }
}

/// The salt of segment `sequence`: nobody who does not know the secret can guess it, and no two
/// uses of one segment have the same.
pub fn salt(secret: u64, incarnation: u64, sequence: u64) -> u64 {
    if planted(Bug::PreviousLapAccepted) {
        return 0;
    }
    let mut mixed: u64 = 0;
    for word in [secret, incarnation, sequence] {
        // SplitMix64's finish, which spreads every bit of the word over the whole.
        mixed = (mixed ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
    }
    mixed
}

/// The seed of checksums that are bound to `salt`.
pub fn seed(salt: u64) -> u32 {
    (salt ^ (salt >> 32)) as u32
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#[path = "root_test.rs"]
pub(in crate::cache) mod tests;
