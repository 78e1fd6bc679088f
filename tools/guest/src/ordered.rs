//! Writes whose order can be told from the disk alone: number *n* goes to a place that follows
//! from *n*, and begins when number *n − 1* has ended. So the disk after *n* writes is known, and
//! whatever point an image stands for, it must be one of these.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::stamp::{self, SECTOR_BYTES, Stamp};

/// Bytes of one write.
pub const BLOCK_BYTES: usize = 4096;

/// Where and how the writes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ordered {
    /// Bytes of the disk that are written, from its start.
    pub bytes: u64,
    /// Tells runs apart.
    pub run: u64,
    /// A flush follows each so many writes.
    pub flush: u64,
}

impl Ordered {
    /// What write `number` (from 1) puts where.
    pub fn stamp(&self, number: u64) -> Stamp {
        let blocks = self.bytes / BLOCK_BYTES as u64;
        let block = fastrand::Rng::with_seed(self.run ^ number).u64(..blocks);
        Stamp { run: self.run, address: block * BLOCK_BYTES as u64, sequence: number }
    }

    /// After how many writes the disk was as `image` is, exactly; an error if it never was.
    pub fn point_of(&self, image: &Path) -> Result<u64> {
        let file = File::open(image).with_context(|| format!("open {}", image.display()))?;
        let mut found = BTreeMap::new();
        let mut block = vec![0; BLOCK_BYTES];
        for address in (0..self.bytes).step_by(BLOCK_BYTES) {
            file.read_exact_at(&mut block, address)
                .with_context(|| format!("read {} at {address}", image.display()))?;
            let Some(first) = block.first_chunk::<SECTOR_BYTES>() else { continue };
            if let Some(stamp) = Stamp::read(first).filter(|stamp| stamp.run == self.run) {
                let whole = Stamp { address, ..stamp };
                if let Some(what) = stamp::first_mismatch(&block, whole) {
                    bail!("the block at {address} is torn: {what}");
                }
                found.insert(address, stamp.sequence);
            } else if block.iter().any(|byte| *byte != 0) {
                bail!("the block at {address} was never written so");
            }
        }
        let point = found.values().copied().max().unwrap_or(0);
        let mut expected = BTreeMap::new();
        for number in 1..=point {
            expected.insert(self.stamp(number).address, number);
        }
        match expected.iter().find(|(address, number)| found.get(address) != Some(number)) {
            Some((address, number)) => bail!(
                "write {point} is there, but the block at {address} holds write {:?} instead of \
                 {number}: no point in time",
                found.get(address)
            ),
            None => Ok(point),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORDERED: Ordered = Ordered { bytes: 1 << 20, run: 5, flush: 16 };

    fn image_after(writes: u64, skip: Option<u64>) -> tempfile::NamedTempFile {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(ORDERED.bytes).unwrap();
        let mut block = vec![0; BLOCK_BYTES];
        for number in (1..=writes).filter(|number| Some(*number) != skip) {
            let stamp = ORDERED.stamp(number);
            stamp::write_block(&mut block, stamp);
            image.as_file().write_all_at(&block, stamp.address).unwrap();
        }
        image
    }

    #[test]
    fn every_point_is_recognized() {
        for point in [0, 1, 17, 400] {
            assert_eq!(ORDERED.point_of(image_after(point, None).path()).unwrap(), point);
        }
    }

    #[test]
    fn a_write_that_is_missing_before_a_later_one_is_found() {
        // One that nothing overwrote.
        let image = image_after(100, Some(99));
        assert!(ORDERED.point_of(image.path()).unwrap_err().to_string().contains("no point"));
    }

    #[test]
    fn a_torn_block_is_found() {
        let image = image_after(10, None);
        let address = ORDERED.stamp(10).address;
        image.as_file().write_all_at(&[0; SECTOR_BYTES], address + 512).unwrap();
        assert!(ORDERED.point_of(image.path()).unwrap_err().to_string().contains("torn"));
    }
}
