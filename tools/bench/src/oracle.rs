//! What a disk must hold: every sector's last acknowledged write.
//!
//! Each 512-byte sector that is written carries a stamp: the disk's id, the sector's address, a
//! sequence number and a checksum over all of it. Requests under way never overlap (the oracle
//! refuses a range that touches one), so there is exactly one right answer to every read: a write
//! that was lost, done twice after a later one, torn, or put elsewhere shows as a wrong stamp.

use crate::Result;
use crate::report::ViolationKind::Wrong;
use crate::report::violation;

pub const SECTOR_BYTES: usize = 512;

/// Sequence number of a sector that reads as zeros.
const ZEROS: u32 = 0;

pub struct Oracle {
    id: u64,
    /// The first sector of the disk that is tested.
    start: u64,
    /// Per sector: the sequence number that it must hold; `None`: not known yet.
    sectors: Vec<Option<u32>>,
    busy: Vec<bool>,
    sequence: u32,
}

/// A range of sectors that a request works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub start: u64,
    pub count: u32,
}

impl Oracle {
    /// For sectors `start..start + count`, whose content is unknown until written.
    pub fn new(id: u64, start: u64, count: u64) -> Self {
        let count = count as usize;
        Self { id, start, sectors: vec![None; count], busy: vec![false; count], sequence: ZEROS }
    }

    fn indices(&self, range: Range) -> std::ops::Range<usize> {
        let first = (range.start - self.start) as usize;
        first..first + range.count as usize
    }

    /// Reserves a range for a request; false if another is under way there.
    pub fn reserve(&mut self, range: Range) -> bool {
        let indices = self.indices(range);
        if self.busy[indices.clone()].iter().any(|busy| *busy) {
            return false;
        }
        self.busy[indices].fill(true);
        true
    }

    pub fn release(&mut self, range: Range) {
        let indices = self.indices(range);
        self.busy[indices].fill(false);
    }

    /// Fills `bytes` with stamps for a write of `range` and returns its sequence number.
    pub fn stamp(&mut self, range: Range, bytes: &mut [u8]) -> u32 {
        self.sequence += 1;
        for (address, sector) in (range.start..).zip(bytes.chunks_exact_mut(SECTOR_BYTES)) {
            stamp(sector, self.id, address, self.sequence);
        }
        self.sequence
    }

    /// A write of `range` was acknowledged.
    pub fn written(&mut self, range: Range, sequence: u32) {
        let indices = self.indices(range);
        self.sectors[indices].fill(Some(sequence));
    }

    /// A discard or write-zeroes of `range` was acknowledged.
    pub fn zeroed(&mut self, range: Range) {
        self.written(range, ZEROS);
    }

    /// Compares what a read of `range` returned.
    pub fn check(&self, range: Range, bytes: &[u8]) -> Result<()> {
        let expected = &self.sectors[self.indices(range)];
        for ((address, sector), expected) in
            (range.start..).zip(bytes.chunks_exact(SECTOR_BYTES)).zip(expected)
        {
            let Some(expected) = *expected else { continue };
            let found = sequence_of(sector, self.id, address)?;
            if found != expected {
                let text = format!(
                    "sector {address} holds write {found}, not {expected}: \
                     the later one is lost or the earlier one was done twice"
                );
                return violation(Wrong, text);
            }
        }
        Ok(())
    }

    /// Sectors with a known content.
    pub fn known(&self) -> usize {
        self.sectors.iter().flatten().count()
    }
}

fn stamp(sector: &mut [u8], id: u64, address: u64, sequence: u32) {
    sector[..8].copy_from_slice(&id.to_le_bytes());
    sector[8..16].copy_from_slice(&address.to_le_bytes());
    sector[16..20].copy_from_slice(&sequence.to_le_bytes());
    sector[24..].fill(sequence as u8 | 1);
    let sum = checksum(sector);
    sector[20..24].copy_from_slice(&sum.to_le_bytes());
}

fn checksum(sector: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&sector[..20]), &sector[24..])
}

/// The sequence number that a sector carries; zeros count as [`ZEROS`].
fn sequence_of(sector: &[u8], id: u64, address: u64) -> Result<u32> {
    if sector.iter().all(|byte| *byte == 0) {
        return Ok(ZEROS);
    }
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| sector[at + byte]));
    let half = |at: usize| u32::from_le_bytes(std::array::from_fn(|byte| sector[at + byte]));
    if half(20) != checksum(sector) {
        return violation(Wrong, format!("sector {address} is torn or corrupt"));
    }
    if (word(0), word(8)) != (id, address) {
        let text = format!(
            "sector {address} of disk {id:#x} holds sector {} of disk {:#x}",
            word(8),
            word(0)
        );
        return violation(Wrong, text);
    }
    Ok(half(16))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: Range = Range { start: 100, count: 2 };

    /// An oracle after two acknowledged writes of the same range, and their bytes.
    fn written_twice() -> (Oracle, Vec<u8>, Vec<u8>) {
        let mut oracle = Oracle::new(7, 96, 16);
        let (mut old, mut new) = (vec![0; 1024], vec![0; 1024]);
        for bytes in [&mut old, &mut new] {
            assert!(oracle.reserve(RANGE));
            let sequence = oracle.stamp(RANGE, bytes);
            oracle.written(RANGE, sequence);
            oracle.release(RANGE);
        }
        (oracle, old, new)
    }

    #[test]
    fn the_last_acknowledged_write_is_right_and_nothing_else() {
        let (mut oracle, old, new) = written_twice();
        oracle.check(RANGE, &new).unwrap();
        let lies: [(&str, Vec<u8>); 5] = [
            ("is lost", old.clone()),
            ("lost", vec![0; 1024]),
            ("lost", [&new[..512], &old[512..]].concat()),
            ("torn", [&new[..300], &old[300..]].concat()),
            ("holds sector", [&new[512..], &new[..512]].concat()),
        ];
        for (word, bytes) in lies {
            let error = oracle.check(RANGE, &bytes).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        oracle.zeroed(RANGE);
        oracle.check(RANGE, &[0; 1024]).unwrap();
        assert!(oracle.check(RANGE, &new).is_err(), "a discarded block came back");
    }

    #[test]
    fn requests_under_way_do_not_overlap() {
        let mut oracle = Oracle::new(7, 0, 16);
        assert!(oracle.reserve(Range { start: 4, count: 4 }));
        assert!(!oracle.reserve(Range { start: 7, count: 2 }));
        assert!(oracle.reserve(Range { start: 8, count: 8 }));
        oracle.release(Range { start: 4, count: 4 });
        assert!(oracle.reserve(Range { start: 0, count: 8 }));
    }
}
