//! Batches: what is written is read, and no damaged bytes pass or panic.

use super::*;
use crate::base::units::KIB;

const ALIGN: u32 = 4096;
const LINK: BatchLink = BatchLink {
    salt: 0x0123_4567_89ab_cdef,
    incarnation: 2,
    sequence: 40,
    previous_checksum: 5,
    durable_through: 9,
    drained_through: 3,
};

fn head(kind: Kind, start: u64, count: u64) -> EntryHead {
    let origin = RecordOrigin { door: 5, queue: 1, counter: start };
    EntryHead { kind, edge: false, continued: false, origin, start, count }
}

/// A whole batch with data: two writes, one of them of two records, a discard, a mark.
fn sample() -> Vec<u8> {
    let writes = [(63, 9, true), (100, 1, false), (8, 8, false)];
    let mut plan = Plan::default().range().mark(b"noon!");
    for (start, count, _) in writes {
        plan = plan.write(start, count);
    }
    let mut batch = vec![0; plan.batch_bytes(ALIGN) as usize];
    let mut at = plan.data_start(ALIGN) as usize;
    let mut encoder = BatchEncoder::default();
    encoder.begin(plan, ALIGN, (10, 7));
    for (index, (start, count, continued)) in writes.into_iter().enumerate() {
        let edge = index == 2;
        encoder.entry(EntryHead { continued, edge, ..head(Kind::Write, start, count) });
        let mut sector = start;
        while sector < start + count {
            let length = (piece_sectors(sector, start + count) * SECTOR_BYTES) as usize;
            batch[at..at + length].fill(sector as u8);
            encoder.checksum(piece_checksum(&batch[at..at + length]));
            at += length;
            sector += length as u64 / SECTOR_BYTES;
        }
    }
    encoder.mark(b"noon!", false);
    encoder.entry(EntryHead { edge: true, ..head(Kind::Discard, 1 << 20, 1 << 21) });
    let (bytes, _) = encoder.seal(LINK);
    assert_eq!(bytes.len(), plan.header_bytes as usize, "the plan was right");
    batch[..bytes.len()].copy_from_slice(bytes);
    batch
}

#[test]
fn a_batch_is_read_as_it_was_written() {
    let bytes = sample();
    let batch = Batch::decode(&bytes, LINK.salt).expect("whole");
    batch.verify(&bytes).expect("right data");
    let header = batch.header;
    assert_eq!((header.first_won, header.next_won, header.entries), (10, 13, 5));
    assert_eq!((header.epoch, header.last_epoch, header.continued), (7, 9, false));
    assert_eq!((header.sequence, header.previous_checksum), (40, 5));
    assert_eq!((header.durable_through, header.drained_through), (9, 3));
    let seen: Vec<_> = batch
        .entries()
        .map(|entry| (entry.kind, entry.won, entry.epoch, entry.start, entry.count, entry.data))
        .collect();
    let expected = [
        (Kind::Write, 10, 7, 63, 9, Some(4096)),
        (Kind::Write, 10, 7, 100, 1, Some(4096 + 9 * 512)),
        (Kind::Write, 11, 8, 8, 8, Some(4096 + 10 * 512)),
        (Kind::Mark, 11, 8, 0, 0, None),
        (Kind::Discard, 12, 9, 1 << 20, 1 << 21, None),
    ];
    assert_eq!(seen, expected);
    let first = batch.entries().next().expect("an entry");
    let pieces: Vec<_> = first.pieces().map(|piece| (piece.start, piece.count)).collect();
    assert_eq!(pieces, [(63, 1), (64, 8)], "a piece lies in one block of the disk");
    assert_eq!(batch.entries().nth(3).expect("a mark").name, b"noon!");
    assert_eq!(first.origin, RecordOrigin { door: 5, queue: 1, counter: 63 });
}

#[test]
fn every_flipped_bit_is_seen() {
    let bytes = sample();
    let header = Batch::decode(&bytes, LINK.salt).expect("whole").header;
    let data_end = header.data_start as usize + 18 * 512;
    for at in (0..header.header_bytes as usize).chain(header.data_start as usize..data_end) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        let decoded = Batch::decode(&damaged, LINK.salt);
        let passes = decoded.is_ok_and(|batch| batch.verify(&damaged).is_ok());
        assert!(!passes, "byte {at}");
    }
    assert!(matches!(Batch::decode(&bytes, LINK.salt ^ 1), Err(Bad::Checksum)), "another segment");
    assert!(matches!(Batch::decode(&bytes[..100], LINK.salt), Err(Bad::Short(_))));
    assert!(matches!(Batch::decode(&[0; 100], LINK.salt), Err(Bad::Nothing)));
}

/// Damage whose checksum is right: only the checks of the fields stand between it and a panic.
#[test]
fn no_bytes_under_a_right_checksum_make_the_decoder_panic() {
    let bytes = sample();
    let mut random = fastrand::Rng::with_seed(1);
    let mut shapes = 0;
    for _ in 0..20_000 {
        let mut damaged = bytes.clone();
        for _ in 0..random.usize(1..4) {
            let at = random.usize(4..260);
            let any = random.u8(..);
            damaged[at] = random.choice([0, 1, 0x7f, 0xff, any]).expect("one");
        }
        let length = u32::from_le_bytes([damaged[4], damaged[5], damaged[6], damaged[7]]) as usize;
        if let Some(header) = damaged.get(..length).filter(|header| header.len() >= 88) {
            let checksum = header_checksum(header, LINK.salt);
            damaged[BATCH_CHECKSUM].copy_from_slice(&checksum.to_le_bytes());
        }
        match Batch::decode(&damaged, LINK.salt) {
            Ok(batch) => {
                assert_eq!(batch.entries().count(), usize::from(batch.header.entries));
                let _ = batch.verify(&damaged);
            }
            Err(Bad::Shape) => shapes += 1,
            Err(_) => {}
        }
    }
    assert!(shapes > 1000, "the checks of the fields were reached: {shapes}");
}

#[test]
fn a_batch_can_be_sealed_again_for_another_place() {
    let mut encoder = BatchEncoder::default();
    let plan = Plan::default().range();
    encoder.begin(plan, 512, (3, 1));
    encoder.entry(head(Kind::Zeroes, 5, 6));
    encoder.seal(LINK);
    let other = BatchLink { salt: 77, sequence: 41, durable_through: 2, ..LINK };
    let (bytes, checksum) = encoder.seal(other);
    let mut whole = bytes.to_vec();
    whole.resize(plan.batch_bytes(512) as usize, 0);
    let batch = Batch::decode(&whole, 77).expect("whole");
    assert_eq!((batch.header.sequence, batch.header.checksum), (41, checksum));
    assert_eq!(batch.header.durable_through, 2);
    assert!(Batch::decode(&whole, LINK.salt).is_err());
}

#[test]
fn a_plan_knows_the_length_of_what_is_written() {
    assert_eq!(pieces(0, 8), 1);
    assert_eq!(pieces(7, 2), 2);
    assert_eq!(pieces(63, 9), 2);
    assert_eq!(pieces(3, 0), 1, "rounding; no record has no sectors");
    let plan = Plan::default().write(0, 8);
    assert_eq!((plan.data_start(4096), plan.batch_bytes(4096)), (4096, 8192));
    assert_eq!((plan.data_start(512), plan.batch_bytes(512)), (512, 4608));
    let group = (0..32).fold(Plan::default(), |plan, at| plan.write(at * 8, 8));
    assert_eq!(u64::from(group.batch_bytes(4096)), 132 * KIB, "32 writes share one header");
}
