//! A page of a slab's slot table, as bytes (FORMAT.md). Pure.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use crate::base::checksum::crc32c;
use crate::base::codec::{Reader, Writer};
use crate::cache::layout::{
    BLOCK_BYTES, NUMBER_MAX, SLOTS_PER_PAGE, TABLE_CHECKSUM, TABLE_HEADER_BYTES, TABLE_MAGIC,
};
use crate::cache::policy::BLOCKS_MAX;
use crate::cache::root::seed;

/// Bits of an entry's first word that name the block.
const BLOCK_BITS: u32 = 40;

/// A slot that holds a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableEntry {
    pub slot: u32,
    pub block: u64,
    /// Of the block's content.
    pub checksum: u32,
    /// How often it was used lately, as the policy counts.
    pub uses: u8,
}

/// What a page is of: it counts nowhere else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cache) struct TablePlace {
    /// The root's.
    pub(super) epoch: u64,
    pub(super) segment: u32,
    /// In the slab, from its end.
    pub(super) page: u32,
    /// New each time that a segment becomes a slab; 0: it is none any more.
    pub(super) life: u64,
}

/// The page with these entries, all of it in order. `secret`: the log's.
pub(in crate::cache) fn encode(place: TablePlace, entries: &[TableEntry], secret: u64) -> Vec<u8> {
    let first = place.page.saturating_mul(SLOTS_PER_PAGE);
    let mut writer = Writer::new();
    writer.bytes(TABLE_MAGIC).u64(place.epoch).u64(place.life);
    writer.u32(place.segment).u32(place.page).u32(0).u32(entries.len() as u32);
    writer.pad_to(TABLE_HEADER_BYTES);
    let mut left = entries.iter().peekable();
    for slot in first..first.saturating_add(SLOTS_PER_PAGE) {
        match left.next_if(|entry| entry.slot == slot) {
            Some(entry) => {
                let block = entry.block.saturating_add(1) | u64::from(entry.uses) << BLOCK_BITS;
                writer.u64(block).u32(entry.checksum).u32(0);
            }
            None => _ = writer.u64(0).u64(0),
        }
    }
    assert!(left.next().is_none(), "a page has the entries of its own slots, in order");
    let mut bytes = writer.into_bytes();
    assert_eq!(bytes.len() as u64, BLOCK_BYTES, "a table page is one block");
    let checksum = page_checksum(&bytes, secret).to_le_bytes();
    if let Some(field) = bytes.get_mut(TABLE_CHECKSUM) {
        field.copy_from_slice(&checksum);
    }
    bytes
}

/// A page of `epoch` (`None`: of any) at its place, if that is what lies there: its life and
/// entries. Never fails on any bytes.
pub(in crate::cache) fn decode(
    bytes: &[u8],
    (epoch, segment, page): (Option<u64>, u32, u32),
    secret: u64,
) -> Option<(u64, Vec<TableEntry>)> {
    let mut reader = Reader::new(bytes);
    if reader.array::<8>()? != *TABLE_MAGIC || bytes.len() as u64 != BLOCK_BYTES {
        return None;
    }
    let stored = bytes.get(TABLE_CHECKSUM)?.first_chunk::<4>()?;
    if u32::from_le_bytes(*stored) != page_checksum(bytes, secret) {
        return None;
    }
    let (its_epoch, life) = (reader.u64()?, reader.u64()?);
    let its_place = (reader.u32()?, reader.u32()?);
    let _checksum = reader.u32()?;
    let count = reader.u32()?;
    let other = its_place != (segment, page) || epoch.is_some_and(|epoch| epoch != its_epoch);
    if other || life > NUMBER_MAX {
        return None;
    }
    let mut reader = Reader::new(bytes.get(TABLE_HEADER_BYTES..)?);
    let mut entries = Vec::new();
    let first = page.checked_mul(SLOTS_PER_PAGE)?;
    for slot in first..first.checked_add(SLOTS_PER_PAGE)? {
        let (word, checksum, _reserved) = (reader.u64()?, reader.u32()?, reader.u32()?);
        let Some(block) = (word & BLOCKS_MAX.saturating_sub(1)).checked_sub(1) else { continue };
        let uses = (word >> BLOCK_BITS) as u8 & 3;
        entries.push(TableEntry { slot, block, checksum, uses });
    }
    (entries.len() as u64 == u64::from(count)).then_some((life, entries))
}

/// CRC32C of a page, its own field taken as zero.
fn page_checksum(bytes: &[u8], secret: u64) -> u32 {
    let (before, rest) = bytes.split_at(TABLE_CHECKSUM.start.min(bytes.len()));
    let (_, after) = rest.split_at(rest.len().min(4));
    crc32c(crc32c(crc32c(seed(secret), before), &[0; 4]), after)
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used)]
pub(in crate::cache) mod tests {
    use super::*;

    pub(in crate::cache) fn sample() -> (TablePlace, Vec<TableEntry>) {
        let entry = |slot, block, checksum, uses| TableEntry { slot, block, checksum, uses };
        let place = TablePlace { epoch: 1, segment: 3, page: 1, life: 2 };
        (place, vec![entry(252, 7, 8, 3), entry(300, BLOCKS_MAX - 3, 9, 0), entry(503, 0, 1, 1)])
    }

    #[test]
    fn a_page_counts_in_its_place_and_epoch_alone() {
        let (place, entries) = sample();
        let bytes = encode(place, &entries, 77);
        assert_eq!(decode(&bytes, (Some(1), 3, 1), 77), Some((2, entries)));
        for (wrong, secret) in [((2, 3, 1), 77), ((1, 4, 1), 77), ((1, 3, 0), 77), ((1, 3, 1), 78)]
        {
            let (epoch, segment, page) = wrong;
            let wrong = (Some(epoch), segment, page);
            assert_eq!(decode(&bytes, wrong, secret), None, "{wrong:?} {secret}");
        }
    }

    #[test]
    fn no_bytes_make_a_page_panic_and_no_flipped_bit_is_missed() {
        let (place, entries) = sample();
        let bytes = encode(place, &entries, 77);
        let mut random = fastrand::Rng::with_seed(4);
        for _ in 0..3000 {
            let mut other = bytes.clone();
            let at = random.usize(0..other.len());
            other[at] ^= 1 << random.u8(0..8);
            assert_eq!(decode(&other, (Some(1), 3, 1), 77), None, "byte {at}");
            other.truncate(random.usize(0..other.len()));
            assert_eq!(decode(&other, (Some(1), 3, 1), 77), None);
        }
    }
}
