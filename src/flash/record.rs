//! Records and the log: one record per commit, each a whole number of blocks, chained by sequence
//! and checksum, written twice.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use super::change::Change;
use super::layout::{BLOCK_BYTES, RECORD_CHECKSUM, RECORD_HEADER_BYTES, RECORD_MAGIC};
use crate::base::checksum::crc32c;
use crate::base::codec::{Reader, Writer};
use crate::base::{Error, ErrorKind, Result};

/// What the next record must say to belong to the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub salt: u64,
    pub sequence: u64,
    /// Checksum of the record before, of the table for the first.
    pub previous: u32,
}

impl Link {
    /// The link after a record with `checksum`.
    pub(super) fn next(self, checksum: u32) -> Self {
        Self { sequence: self.sequence.saturating_add(1), previous: checksum, ..self }
    }
}

/// A record's bytes and checksum.
pub(super) fn encode(changes: &[Change], link: Link) -> (Vec<u8>, u32) {
    let mut payload = Writer::new();
    changes.iter().for_each(|change| change.encode(&mut payload));
    let payload = payload.into_bytes();
    let length = RECORD_HEADER_BYTES.saturating_add(payload.len());
    let length = length.next_multiple_of(BLOCK_BYTES as usize);
    let mut writer = Writer::new();
    writer.bytes(RECORD_MAGIC).u64(link.salt).u64(link.sequence);
    writer.u32(length as u32).u32(payload.len() as u32).u32(link.previous).u32(0);
    writer.u32(changes.len() as u32).u32(0).bytes(&payload).pad_to(length);
    let mut bytes = writer.into_bytes();
    let checksum = checksum(&bytes, link.salt).expect("a record is longer than its header");
    let field = bytes.get_mut(RECORD_CHECKSUM).expect("the field is in the header");
    field.copy_from_slice(&checksum.to_le_bytes());
    (bytes, checksum)
}

/// Of the whole record, its own field taken as zero; `None` if it is shorter than that.
fn checksum(bytes: &[u8], salt: u64) -> Option<u32> {
    let head = bytes.get(..RECORD_CHECKSUM.start)?;
    let tail = bytes.get(RECORD_CHECKSUM.end..)?;
    Some(crc32c(crc32c(crc32c(salt as u32, head), &[0; 4]), tail))
}

/// A record found in a log.
#[derive(Debug)]
struct Found {
    sequence: u64,
    previous: u32,
    checksum: u32,
    length: usize,
    /// `None`: they say what this build does not know.
    changes: Option<Vec<Change>>,
}

/// The record that begins at the front of `bytes`, if it is whole and of the log with `salt`.
fn decode(bytes: &[u8], salt: u64) -> Option<Found> {
    let reader = &mut Reader::new(bytes);
    if reader.array::<8>()? != *RECORD_MAGIC || reader.u64()? != salt {
        return None;
    }
    let sequence = reader.u64()?;
    let length = usize::try_from(reader.u32()?).ok()?;
    let payload_bytes = usize::try_from(reader.u32()?).ok()?;
    let previous = reader.u32()?;
    let stored = reader.u32()?;
    let count = reader.u32()?;
    let _reserved = reader.u32()?;
    if length < RECORD_HEADER_BYTES || !length.is_multiple_of(BLOCK_BYTES as usize) {
        return None;
    }
    if checksum(bytes.get(..length)?, salt)? != stored {
        return None;
    }
    let payload = bytes.get(RECORD_HEADER_BYTES..length)?;
    let payload = payload.get(..payload_bytes).unwrap_or_default();
    let changes = changes(payload, count);
    Some(Found { sequence, previous, checksum: stored, length, changes })
}

fn changes(payload: &[u8], count: u32) -> Option<Vec<Change>> {
    let reader = &mut Reader::new(payload);
    (0..count).map(|_| Change::decode(reader)).collect()
}

/// What a log holds.
#[derive(Debug, Default)]
pub(super) struct Log {
    /// The changes of each record, with its sequence.
    pub records: Vec<(u64, Vec<Change>)>,
    /// Bytes from the log's start to the first byte after the last record.
    pub end: u64,
    /// The link of the next record.
    pub next: Option<Link>,
    /// Copy, and bytes from the log's start, of records that are whole in the other copy only.
    pub damaged: Vec<(usize, std::ops::Range<usize>)>,
}

/// Reads a log from its two copies (`None`: unreadable). Ends at the first place where neither
/// holds the next record: a torn append. If a later place holds a whole record, the log was
/// damaged instead, and that is an error; so is a whole record that cannot be understood, which a
/// newer build has written.
pub(super) fn scan(copies: &[Option<Vec<u8>>; 2], first: Link) -> Result<Log> {
    let mut log = Log::default();
    let mut link = first;
    let mut at = 0;
    loop {
        let next =
            |found: &Found| (found.sequence, found.previous) == (link.sequence, link.previous);
        let found = [0, 1].map(|copy| found_at(copies, copy, at, first.salt).filter(next));
        let whole = found.each_ref().map(Option::is_some);
        let Some(record) = found.into_iter().flatten().next() else { break };
        let Some(changes) = record.changes else {
            let text = format!(
                "record {} at byte {at} of the log is whole and says what this vflashd does not \
                 know: start the vflashd that wrote it",
                record.sequence
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        let end = at.saturating_add(record.length);
        let damaged = whole.into_iter().enumerate().filter(|(_, whole)| !whole);
        log.damaged.extend(damaged.map(|(copy, _)| (copy, at..end)));
        at = end;
        link = link.next(record.checksum);
        log.records.push((record.sequence, changes));
    }
    let blocks = copies.iter().flatten().map(Vec::len).max().unwrap_or(0);
    for later in (at..blocks).step_by(BLOCK_BYTES as usize) {
        for copy in [0, 1] {
            if let Some(found) = found_at(copies, copy, later, first.salt) {
                let text = format!(
                    "record {} at byte {at} of the log is damaged in both copies, but record {} \
                     at byte {later} is whole",
                    link.sequence, found.sequence
                );
                return Err(Error::new(ErrorKind::Corrupt, text));
            }
        }
    }
    log.end = at as u64;
    log.next = Some(link);
    Ok(log)
}

fn found_at(copies: &[Option<Vec<u8>>; 2], copy: usize, at: usize, salt: u64) -> Option<Found> {
    decode(copies.get(copy)?.as_ref()?.get(at..)?, salt)
}

#[cfg(test)]
#[allow(clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::flash::AllocationId;

    #[test]
    fn a_whole_record_that_is_not_understood_is_no_torn_one() {
        let link = Link { salt: 9, sequence: 1, previous: 0 };
        let (mut bytes, _) = encode(&[Change::Remove { id: AllocationId(3) }], link);
        let scanned = |bytes: &[u8]| scan(&[Some(bytes.to_vec()), Some(bytes.to_vec())], link);
        assert_eq!(scanned(&bytes).expect("it is read").records.len(), 1);
        bytes[RECORD_HEADER_BYTES] = 99;
        assert_eq!(scanned(&bytes).expect("it is torn").records.len(), 0);
        let checksum = checksum(&bytes, link.salt).expect("it is long enough");
        bytes[RECORD_CHECKSUM].copy_from_slice(&checksum.to_le_bytes());
        let error = scanned(&bytes).expect_err("a newer build wrote it");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
}
