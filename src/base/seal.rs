//! Sealed blocks: a magic, a version, features, the fields, zeros, and a CRC32C of all that at the
//! very end.
//!
//! These keep their places in every later version, so that an older build can tell "newer" from
//! "damaged", and refuse without touching a byte.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use super::checksum::crc32c;
use super::codec::{Reader, Writer};

/// What tells one kind of sealed block from others.
#[derive(Clone, Copy, Debug)]
pub struct Seal {
    pub magic: &'static [u8; 8],
    /// The version this build writes, and the newest that it reads.
    pub version: u32,
    /// Bits of features that it knows.
    pub features: u32,
}

/// What a block turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealedBlock<T> {
    Valid(T),
    /// All zeros: never written, or wiped.
    Empty,
    /// A whole one of a version or with features that this build does not know.
    Newer {
        version: u32,
        features: u32,
    },
    Damaged(&'static str),
    /// Something else's bytes.
    Foreign,
}

impl Seal {
    /// The head of a block; the fields go behind it.
    pub fn begin(self) -> Writer {
        self.begin_with(0)
    }

    /// As [`Seal::begin`], of a block that only builds which know these `features` may read.
    pub fn begin_with(self, features: u32) -> Writer {
        let mut writer = Writer::new();
        writer.bytes(self.magic).u32(self.version).u32(features);
        writer
    }

    /// Takes a block apart; `fields` reads what is behind its head, `None` if that is impossible.
    /// Never fails on any bytes.
    pub fn open<T>(
        self,
        block: &[u8],
        fields: impl FnOnce(&mut Reader<'_>) -> Option<T>,
    ) -> SealedBlock<T> {
        if block.iter().all(|byte| *byte == 0) {
            return SealedBlock::Empty;
        }
        let Some((body, stored)) = block.split_last_chunk::<4>() else {
            return SealedBlock::Damaged("the block is short");
        };
        if !body.starts_with(self.magic) {
            return SealedBlock::Foreign;
        }
        if crc32c(0, body) != u32::from_le_bytes(*stored) {
            return SealedBlock::Damaged("wrong checksum");
        }
        let mut reader = Reader::new(body);
        let head = (reader.array::<8>(), reader.u32(), reader.u32());
        let (Some(_), Some(version), Some(features)) = head else {
            return SealedBlock::Damaged("the block is short");
        };
        if version > self.version || features & !self.features != 0 {
            return SealedBlock::Newer { version, features };
        }
        match fields(&mut reader) {
            Some(value) => SealedBlock::Valid(value),
            None => SealedBlock::Damaged("a field has an impossible value"),
        }
    }
}

/// What was written, zeros, and at the end of `length` bytes its CRC32C, continued from `seed`.
pub fn seal(mut writer: Writer, length: usize, seed: u32) -> Vec<u8> {
    writer.pad_to(length.saturating_sub(4));
    let mut bytes = writer.into_bytes();
    let checksum = crc32c(seed, &bytes);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    assert_eq!(bytes.len(), length, "the fields leave room for the checksum");
    bytes
}

#[cfg(test)]
#[allow(clippy::indexing_slicing)]
mod tests {
    use super::*;

    const SEAL: Seal = Seal { magic: b"VFLASHXX", version: 2, features: 4 };

    fn open(block: &[u8]) -> SealedBlock<u64> {
        SEAL.open(block, |reader| reader.u64().filter(|value| *value < 100))
    }

    fn block(seal: Seal, value: u64) -> Vec<u8> {
        let mut writer = seal.begin();
        writer.u64(value);
        super::seal(writer, 512, 0)
    }

    #[test]
    fn a_sealed_block_is_told_from_all_others() {
        let whole = block(SEAL, 7);
        assert_eq!((whole.len(), open(&whole)), (512, SealedBlock::Valid(7)));
        assert_eq!(open(&block(Seal { version: 1, ..SEAL }, 7)), SealedBlock::Valid(7));
        let newer = SealedBlock::Newer { version: 3, features: 0 };
        assert_eq!(open(&block(Seal { version: 3, ..SEAL }, 7)), newer);
        let featured = |features| {
            let mut writer = SEAL.begin_with(features);
            writer.u64(7);
            super::seal(writer, 512, 0)
        };
        assert_eq!(open(&featured(4)), SealedBlock::Valid(7), "a feature that is known");
        assert_eq!(open(&featured(6)), SealedBlock::Newer { version: 2, features: 6 });
        let impossible = SealedBlock::Damaged("a field has an impossible value");
        assert_eq!(open(&block(SEAL, 100)), impossible);
        assert_eq!(open(&[0; 512]), SealedBlock::Empty);
        assert_eq!(open(&[9; 512]), SealedBlock::Foreign);
        assert_eq!(open(&[9; 3]), SealedBlock::Damaged("the block is short"));
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            assert!(!matches!(open(&damaged), SealedBlock::Valid(_)), "byte {at}");
        }
    }
}
