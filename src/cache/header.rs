//! A segment's header: 4 KiB at its beginning, written in one append with its first batch. It
//! links the segment to the one before and says which batches of that one no longer count.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use super::layout::{BLOCK_BYTES, NUMBER_MAX, SEGMENT_MAGIC, SEGMENT_VERSION};
use super::root::{Root, seed};
use crate::base::checksum::crc32c;
use crate::base::codec::Reader;
use crate::base::seal::{Seal, seal};

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    pub incarnation: u64,
    /// Of this use of the segment: batches carry it.
    pub salt: u64,
    /// Greater than that of every segment used before.
    pub sequence: u64,
    /// Sequence of the segment that the log goes on from; 0: none. Segments between the two were
    /// given up and hold nothing that counts.
    pub previous: u64,
    /// Sequence of its first batch. Batches of earlier segments from this one on do not count.
    pub first_batch: u64,
    pub first_won: u64,
    /// Epoch of the first record.
    pub epoch: u64,
    /// As in a batch.
    pub durable_through: u64,
    pub drained_through: u64,
    /// Checksum of the batch before `first_batch`.
    pub previous_checksum: u32,
}

const SEAL: Seal = Seal { magic: SEGMENT_MAGIC, version: SEGMENT_VERSION, features: 0 };

impl SegmentHeader {
    /// One block.
    pub fn encode(&self, root: &Root) -> Vec<u8> {
        let mut writer = SEAL.begin();
        writer.bytes(&root.log_uuid);
        writer.u64(self.incarnation).u64(self.salt).u64(self.sequence).u64(self.previous);
        writer.u64(self.first_batch).u64(self.first_won).u64(self.epoch);
        writer.u64(self.durable_through).u64(self.drained_through);
        writer.u32(self.previous_checksum);
        seal(writer, BLOCK_BYTES as usize, seed(root.secret))
    }

    /// The header in `block`, if it is one of this log. Never fails on any bytes.
    pub fn decode(block: &[u8], root: &Root) -> Option<Self> {
        let (body, stored) = block.split_last_chunk::<4>()?;
        let mut reader = Reader::new(body);
        if reader.array()? != *SEGMENT_MAGIC
            || crc32c(seed(root.secret), body) != u32::from_le_bytes(*stored)
        {
            return None;
        }
        let (version, _reserved) = (reader.u32()?, reader.u32()?);
        if version != SEGMENT_VERSION || reader.array()? != root.log_uuid {
            return None;
        }
        let mut number = || reader.u64().filter(|value| *value <= NUMBER_MAX);
        let incarnation = number()?;
        let salt = reader.u64()?;
        let mut number = || reader.u64().filter(|value| *value <= NUMBER_MAX);
        let header = Self {
            incarnation,
            salt,
            sequence: number()?,
            previous: number()?,
            first_batch: number()?,
            first_won: number()?,
            epoch: number()?,
            durable_through: number()?,
            drained_through: number()?,
            previous_checksum: reader.u32()?,
        };
        (header.sequence > header.previous && header.first_batch > 0).then_some(header)
    }
}
