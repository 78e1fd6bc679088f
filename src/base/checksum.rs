//! Checksums of everything on flash: CRC32C (Castagnoli) of what we write ourselves, XXH3 of what
//! guests do.
//!
//! A CRC is linear: all blocks of one length that end in their own CRC32C, as file systems'
//! metadata may, have the same CRC32C, whatever the seed. So it cannot tell one guest's block from
//! another, nor a torn one from whole ones.

use twox_hash::XxHash3_64;

/// CRC32C of `bytes`, continued from `seed` (0 to start; a salt to bind the sum to one log).
pub fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    ::crc32c::crc32c_append(seed, bytes)
}

/// The low half of XXH3-64 of a guest's `bytes`, with `seed` (a salt binds the sum to its place).
pub fn content(seed: u64, bytes: &[u8]) -> u32 {
    XxHash3_64::oneshot_with_seed(seed, bytes) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_vector_of_rfc_3720() {
        assert_eq!(crc32c(0, &[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(0, b"123456789"), 0xe306_9283);
    }

    #[test]
    fn known_vectors_of_xxh3() {
        assert_eq!(content(0, b""), 0x38d3_94c2);
        assert_eq!(content(0, b"abc"), 0x892f_3950);
    }

    #[test]
    fn seed_continues_a_sum() {
        assert_eq!(crc32c(crc32c(0, b"1234"), b"56789"), crc32c(0, b"123456789"));
    }

    #[test]
    fn blocks_that_end_in_their_own_crc_are_told_apart() {
        let block = |fill: u8| {
            let mut block = vec![fill; 4092];
            let sum = crc32c(7, &block);
            block.extend(sum.to_le_bytes());
            block
        };
        let (one, other) = (block(1), block(2));
        assert_eq!(crc32c(7, &one), crc32c(7, &other), "which is why");
        assert_ne!(content(7, &one), content(7, &other));
    }
}
