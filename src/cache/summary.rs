//! The summary of a closed segment: all its batches' headers again, at its end, so that recovery
//! reads one stretch instead of walking from batch to batch. Written when all of the segment's
//! batches are durable. Without it nothing is lost but time.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use super::layout::{
    BLOCK_BYTES, NUMBER_MAX, SUMMARY_FOOT_BYTES, SUMMARY_ITEM_BYTES, SUMMARY_MAGIC,
};
use super::root::seed;
use crate::base::checksum::crc32c;
use crate::base::codec::{Reader, Writer};

/// The last bytes of a summary, which say how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SummaryFoot {
    pub salt: u64,
    /// Of the segment.
    pub sequence: u64,
    pub incarnation: u64,
    /// WON of the segment's last record.
    pub last_won: u64,
    /// Sequence of its last batch.
    pub last_batch: u64,
    /// The whole summary, which ends where the segment does.
    pub summary_bytes: u32,
    pub batches: u32,
    pub(super) checksum: u32,
}

/// Collects the headers of a segment's batches.
#[derive(Default)]
pub struct SummaryBuilder {
    items: Vec<u8>,
    batches: u32,
}

/// Bytes of the summary if items of `items_bytes` are in it.
pub fn summary_bytes(items_bytes: u64) -> u64 {
    let whole = items_bytes.saturating_add(SUMMARY_FOOT_BYTES as u64);
    whole.checked_next_multiple_of(BLOCK_BYTES).unwrap_or(u64::MAX)
}

/// Bytes that a batch with a header of `header_bytes` takes of the summary.
pub fn item_bytes(header_bytes: u32) -> u64 {
    u64::from(header_bytes).saturating_add(SUMMARY_ITEM_BYTES as u64)
}

impl SummaryBuilder {
    pub fn clear(&mut self) {
        self.items.clear();
        self.batches = 0;
    }

    /// Adds the header of the batch at byte `position` of the segment.
    pub fn add(&mut self, position: u32, header: &[u8]) {
        self.items.extend_from_slice(&position.to_le_bytes());
        self.items.extend_from_slice(&(header.len() as u32).to_le_bytes());
        self.items.extend_from_slice(&[0; 8]);
        self.items.extend_from_slice(header);
        self.batches = self.batches.saturating_add(1);
    }

    /// The summary: whole blocks, to be written at the end of the segment. Of `foot`, lengths and
    /// checksum are filled in.
    pub fn finish(&self, foot: SummaryFoot) -> Vec<u8> {
        let length = summary_bytes(self.items.len() as u64) as usize;
        let mut writer = Writer::new();
        writer.bytes(&self.items).pad_to(length.saturating_sub(SUMMARY_FOOT_BYTES));
        writer.bytes(SUMMARY_MAGIC).u64(foot.salt).u64(foot.sequence).u64(foot.incarnation);
        writer.u64(foot.last_won).u64(foot.last_batch);
        writer.u32(length as u32).u32(self.batches).u32(0);
        let mut bytes = writer.into_bytes();
        let checksum = crc32c(seed(foot.salt), &bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes
    }
}

impl SummaryFoot {
    /// A foot to be given to [`SummaryBuilder::finish`].
    pub fn new(salt: u64, sequence: u64, incarnation: u64) -> Self {
        Self {
            salt,
            sequence,
            incarnation,
            last_won: 0,
            last_batch: 0,
            summary_bytes: 0,
            batches: 0,
            checksum: 0,
        }
    }

    /// The foot at the end of `bytes`, if it is of the segment with `salt` and could be whole. Its
    /// checksum is still to be checked, by [`decode`].
    pub fn decode(bytes: &[u8], salt: u64, segment_bytes: u64) -> Option<Self> {
        let start = bytes.len().checked_sub(SUMMARY_FOOT_BYTES)?;
        let mut reader = Reader::new(bytes.get(start..)?);
        if reader.array()? != *SUMMARY_MAGIC || reader.u64()? != salt {
            return None;
        }
        let mut number = || reader.u64().filter(|value| *value <= NUMBER_MAX);
        let (sequence, incarnation, last_won, last_batch) =
            (number()?, number()?, number()?, number()?);
        let (summary_bytes, batches) = (reader.u32()?, reader.u32()?);
        let (_reserved, checksum) = (reader.u32()?, reader.u32()?);
        let whole = u64::from(summary_bytes).is_multiple_of(BLOCK_BYTES) && summary_bytes > 0;
        (whole && u64::from(summary_bytes) < segment_bytes).then_some(Self {
            salt,
            sequence,
            incarnation,
            last_won,
            last_batch,
            summary_bytes,
            batches,
            checksum,
        })
    }
}

/// The headers in a whole summary, each with its position in the segment; `None` if a bit of it is
/// wrong. Never fails on any bytes.
pub fn decode<'a>(bytes: &'a [u8], foot: &SummaryFoot) -> Option<Vec<(u32, &'a [u8])>> {
    if bytes.len() != foot.summary_bytes as usize {
        return None;
    }
    let (body, stored) = bytes.split_last_chunk::<4>()?;
    let right = crc32c(seed(foot.salt), body) == u32::from_le_bytes(*stored);
    if !right || foot.checksum != u32::from_le_bytes(*stored) {
        return None;
    }
    let items = body.get(..bytes.len().checked_sub(SUMMARY_FOOT_BYTES)?)?;
    let mut reader = Reader::new(items);
    let mut headers = Vec::new();
    for _ in 0..foot.batches {
        let (position, length) = (reader.u32()?, reader.u32()?);
        let _reserved = reader.u64()?;
        headers.push((position, reader.bytes(length as usize)?));
    }
    Some(headers)
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_gives_back_its_headers_and_no_damaged_one_passes() {
        let mut builder = SummaryBuilder::default();
        builder.add(4096, &[7; 88]);
        builder.add(12288, &[8; 5000]);
        let foot = SummaryFoot { last_won: 9, last_batch: 3, ..SummaryFoot::new(11, 5, 2) };
        let bytes = builder.finish(foot);
        assert_eq!(bytes.len() as u64, summary_bytes(item_bytes(88) + item_bytes(5000)));
        let read = SummaryFoot::decode(&bytes, 11, 1 << 20).expect("a foot");
        assert_eq!((read.sequence, read.last_won, read.batches), (5, 9, 2));
        let headers = decode(&bytes, &read).expect("a whole summary");
        assert_eq!(headers, [(4096, &[7; 88][..]), (12288, &[8; 5000][..])]);
        assert_eq!(SummaryFoot::decode(&bytes, 12, 1 << 20), None, "another segment's");
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            let foot = SummaryFoot::decode(&damaged, 11, 1 << 20);
            assert_eq!(foot.and_then(|foot| decode(&damaged, &foot)), None, "byte {at}");
        }
    }
}
