//! Roots: what is written is read, what is damaged is told apart.

use super::*;
use crate::base::checksum::crc32c;
use crate::base::units::MIB;

pub(in crate::cache) fn sample() -> Root {
    Root {
        log_uuid: [1; 16],
        disk_uuid: [2; 16],
        sequence: 3,
        shape: Shape::of(64 * MIB).expect("a shape"),
        incarnation: 4,
        secret: 5,
        oldest_segment: 6,
        drained_through: 7,
        drained_epoch: 8,
        next_won: 9,
        next_epoch: 10,
        end: LogEnd { segment: 11, batch: 12, checksum: 13 },
        mode: Mode::WriteThrough,
        clean_from: 18,
        slab_epoch: 19,
        slabs_through: 20,
        clean: true,
        backing: BackingIdentity {
            size_bytes: 14,
            block_bytes: 15,
            kind: 16,
            fingerprint: [17; 16],
        },
        alone_since: Some(21),
        optimal_bytes: 23,
    }
}

#[test]
fn a_root_is_read_as_it_was_written_and_every_flipped_bit_is_seen() {
    let bytes = sample().encode();
    assert_eq!(Root::decode(&bytes), RootBlock::Valid(Box::new(sample())));
    for at in (0..228).chain(4080..4096) {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            let decoded = Root::decode(&damaged);
            let expected =
                if at < 8 { RootBlock::Foreign } else { RootBlock::Damaged("wrong checksum") };
            assert_eq!(decoded, expected, "byte {at} bit {bit}");
        }
    }
    assert_eq!(Root::decode(&[0; 4096]), RootBlock::Empty);
}

#[test]
fn a_newer_root_is_told_from_a_damaged_one() {
    let mut bytes = sample().encode();
    bytes[8] = 3;
    let checksum = crc32c(0, &bytes[..4092]);
    bytes[4092..].copy_from_slice(&checksum.to_le_bytes());
    assert_eq!(Root::decode(&bytes), RootBlock::Newer { version: 3, features: 0 });
    bytes[8] = 1;
    bytes[13] = 1;
    let checksum = crc32c(0, &bytes[..4092]);
    bytes[4092..].copy_from_slice(&checksum.to_le_bytes());
    assert_eq!(Root::decode(&bytes), RootBlock::Newer { version: 1, features: 256 });
}

#[test]
fn salts_differ_between_logs_incarnations_and_segments() {
    let mut seen = std::collections::BTreeSet::new();
    for secret in 0..4 {
        for incarnation in 0..8 {
            for sequence in 0..64 {
                assert!(seen.insert(salt(secret, incarnation, sequence)));
            }
        }
    }
    assert_eq!(seen.len(), 2048);
}
