//! What a verified sector holds: whose it is, where it belongs, which write it came from.
//!
//! Every byte of a sector follows from its [`Stamp`], so that a sector that was lost, torn, put in
//! the wrong place or taken from somebody else is told apart from a good one.

/// Bytes of one stamped sector, the smallest unit a disk may tear at.
pub const SECTOR_BYTES: usize = 512;

const CHECKSUM_AT: usize = SECTOR_BYTES - 4;

/// The identity of one sector's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Tells runs and disks apart.
    pub run: u64,
    /// Byte offset of the sector on its disk or in its file.
    pub address: u64,
    /// Which write of this address, counted from 1.
    pub sequence: u64,
}

impl Stamp {
    /// Makes `sector` the content that this stamp stands for.
    pub fn write(self, sector: &mut [u8; SECTOR_BYTES]) {
        sector[0..8].copy_from_slice(&self.run.to_le_bytes());
        sector[8..16].copy_from_slice(&self.address.to_le_bytes());
        sector[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        let filler = self.address.rotate_left(32) ^ self.sequence ^ self.run;
        for word in sector[24..CHECKSUM_AT].chunks_mut(8) {
            let length = word.len();
            word.copy_from_slice(&filler.to_le_bytes()[..length]);
        }
        let checksum = crc32c::crc32c(&sector[..CHECKSUM_AT]);
        sector[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
    }

    /// Reads the stamp of an intact sector; `None` if the sector is not one that was stamped.
    pub fn read(sector: &[u8; SECTOR_BYTES]) -> Option<Self> {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|index| sector[at + index]));
        let stored = u32::from_le_bytes(std::array::from_fn(|index| sector[CHECKSUM_AT + index]));
        (crc32c::crc32c(&sector[..CHECKSUM_AT]) == stored).then(|| Self {
            run: word(0),
            address: word(8),
            sequence: word(16),
        })
    }
}

/// Stamps all sectors of `block`, which begins at `first.address`.
pub fn write_block(block: &mut [u8], first: Stamp) {
    let (sectors, rest) = block.as_chunks_mut::<SECTOR_BYTES>();
    assert!(rest.is_empty(), "a block is whole sectors");
    for (index, sector) in sectors.iter_mut().enumerate() {
        at(first, index).write(sector);
    }
}

/// What the first wrong sector of `block` is, if one is: the address and what stands there.
pub fn first_mismatch(block: &[u8], first: Stamp) -> Option<String> {
    let (sectors, rest) = block.as_chunks::<SECTOR_BYTES>();
    assert!(rest.is_empty(), "a block is whole sectors");
    sectors.iter().enumerate().find_map(|(index, sector)| {
        let expected = at(first, index);
        let found = Stamp::read(sector);
        (found != Some(expected)).then(|| match found {
            Some(stamp) => format!("expected {expected:?}, found {stamp:?}"),
            None if sector.iter().all(|byte| *byte == 0) => {
                format!("expected {expected:?}, found zeros")
            }
            None => format!("expected {expected:?}, found no stamp"),
        })
    })
}

fn at(first: Stamp, index: usize) -> Stamp {
    Stamp { address: first.address + (index * SECTOR_BYTES) as u64, ..first }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Stamp = Stamp { run: 7, address: 1 << 20, sequence: 3 };

    #[test]
    fn a_block_reads_back_as_it_was_stamped() {
        let mut block = vec![0; 4096];
        write_block(&mut block, FIRST);
        assert_eq!(first_mismatch(&block, FIRST), None);
    }

    #[test]
    fn any_flipped_bit_is_found() {
        let mut block = vec![0; 4096];
        write_block(&mut block, FIRST);
        for byte in (0..block.len()).step_by(7) {
            block[byte] ^= 0x10;
            assert!(first_mismatch(&block, FIRST).is_some(), "byte {byte}");
            block[byte] ^= 0x10;
        }
    }

    #[test]
    fn an_older_write_another_place_and_another_run_are_found() {
        for wrong in [
            Stamp { sequence: 2, ..FIRST },
            Stamp { address: FIRST.address + 4096, ..FIRST },
            Stamp { run: 8, ..FIRST },
        ] {
            let mut block = vec![0; 4096];
            write_block(&mut block, wrong);
            assert!(first_mismatch(&block, FIRST).is_some(), "{wrong:?}");
        }
    }
}
