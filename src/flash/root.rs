//! The root: one 4 KiB block that says which table and log are the pool.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use super::layout::{BLOCK_BYTES, Plan, ROOT_MAGIC, SEQUENCE_MAX, VERSION};
use crate::base::codec::Reader;
use crate::base::seal::{Seal, SealedBlock, seal};
use crate::base::units::EXTENT_BYTES;

/// A pool's root, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Root {
    pub uuid: [u8; 16],
    /// Of roots: the highest valid one is the pool.
    pub sequence: u64,
    pub plan: Plan,
    /// Which of the two areas holds the table and the log.
    pub active: usize,
    pub table_bytes: u64,
    pub table_checksum: u32,
    /// Sequence of the log's first record.
    pub record_sequence: u64,
    /// Of this log alone: records of an earlier log in the same place do not pass.
    pub salt: u64,
    pub name: String,
}

/// What a root's block turned out to be.
pub(super) type RootBlock = SealedBlock<Box<Root>>;

const SEAL: Seal = Seal { magic: ROOT_MAGIC, version: VERSION, features: 0 };

impl Root {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut writer = SEAL.begin();
        writer.bytes(&self.uuid).u64(self.sequence);
        writer.u64(self.plan.device_bytes).u32(EXTENT_BYTES as u32).u32(self.active as u32);
        writer.u64(self.table_bytes).u32(self.table_checksum).u32(0);
        writer.u64(self.record_sequence).u64(self.salt);
        writer.u64(self.plan.table_capacity).u64(self.plan.log_bytes);
        for offset in self.plan.areas.into_iter().flatten() {
            writer.u64(offset);
        }
        writer.u8(self.name.len() as u8).bytes(self.name.as_bytes());
        seal(writer, BLOCK_BYTES as usize, 0)
    }

    /// Never fails on any bytes.
    pub(super) fn decode(block: &[u8]) -> RootBlock {
        SEAL.open(block, |reader| Self::fields(reader).map(Box::new))
    }

    fn fields(reader: &mut Reader<'_>) -> Option<Self> {
        let uuid = reader.array()?;
        let sequence = reader.u64()?;
        let device_bytes = reader.u64()?;
        if u64::from(reader.u32()?) != EXTENT_BYTES {
            return None;
        }
        let active = usize::try_from(reader.u32()?).ok().filter(|active| *active < 2)?;
        let table_bytes = reader.u64()?;
        let table_checksum = reader.u32()?;
        let _reserved = reader.u32()?;
        let record_sequence = reader.u64()?;
        let salt = reader.u64()?;
        let table_capacity = reader.u64()?;
        let log_bytes = reader.u64()?;
        let areas = [[reader.u64()?, reader.u64()?], [reader.u64()?, reader.u64()?]];
        let length = usize::from(reader.u8()?);
        let name = String::from_utf8(reader.bytes(63)?.get(..length)?.to_vec()).ok()?;
        if table_bytes > table_capacity || sequence.max(record_sequence) > SEQUENCE_MAX {
            return None;
        }
        let plan = Plan { device_bytes, table_capacity, log_bytes, areas };
        Some(Self {
            uuid,
            sequence,
            plan,
            active,
            table_bytes,
            table_checksum,
            record_sequence,
            salt,
            name,
        })
    }

    /// Byte offsets of the two copies of the active table.
    pub(super) fn table_offsets(&self) -> [u64; 2] {
        let [first, second] = self.plan.areas;
        if self.active == 0 { first } else { second }
    }

    /// Byte offsets of the two copies of the log.
    pub(super) fn log_offsets(&self) -> [u64; 2] {
        self.table_offsets().map(|offset| offset.saturating_add(self.plan.table_capacity))
    }
}

/// The salt of the log that belongs to root `sequence`: differs between pools and between logs of
/// one pool, and is the same whenever the same run is repeated.
pub(super) fn salt(uuid: &[u8; 16], sequence: u64) -> u64 {
    let (low, high) = uuid.split_at(8);
    let word =
        |half: &[u8]| half.iter().fold(0u64, |sum, byte| sum.wrapping_shl(8) | u64::from(*byte));
    let mixed =
        word(low) ^ word(high).rotate_left(17) ^ sequence.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    fastrand::Rng::with_seed(mixed).u64(..)
}
