//! Damage on the medium: whatever happens to one copy is repaired from the other; what happens to
//! both is refused; never is anything else served.

use super::*;
use crate::base::units::{EXTENT_BYTES, KIB, MIB};
use crate::flash::change::AllocationId;
use crate::flash::layout::VERSION;
use crate::flash::pool::tests::{make, thick, thin};
use crate::flash::{Pool, ThinKind, ThinRequest};
use crate::io::sim::{SimDisk, sim_geometry};
use std::time::{Duration, Instant};

const DEVICE_BYTES: u64 = 24 * MIB;

/// How a block goes bad.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Bit,
    EightBits,
    GarbageSector,
    Zeros,
    /// What the block held before the last time it was written.
    Old,
    /// The block behind it.
    Misplaced,
}

const DAMAGES: [Damage; 6] = [
    Damage::Bit,
    Damage::EightBits,
    Damage::GarbageSector,
    Damage::Zeros,
    Damage::Old,
    Damage::Misplaced,
];

/// The same pool twice: as it is, and as it was some operations ago.
struct Image {
    now: SimDisk,
    old: SimDisk,
    root: Root,
    table: Table,
    /// Bytes of the log from its start, by record.
    records: Vec<u64>,
}

fn image(records: u64) -> Image {
    let disk = SimDisk::new(DEVICE_BYTES);
    let mut pool = make(&disk, Some(64 * KIB));
    for index in 0..5 {
        pool.create(thick(&format!("vm/{index}"), MIB)).expect("created");
    }
    let id = pool.create(thin("vm/thin", 6 * MIB)).expect("created");
    pool.checkpoint().expect("root 2");
    pool.remove(AllocationId(2)).expect("removed");
    let old = SimDisk::with(disk.content(), sim_geometry(DEVICE_BYTES), 0);
    pool.checkpoint().expect("root 3");
    pool.checkpoint().expect("root 4");
    let mut ends = Vec::new();
    for index in 0..records {
        ends.push(pool.store.log_end);
        let kind = if index % 2 == 0 {
            ThinKind::Map(vec![index % 6])
        } else {
            ThinKind::Unmap(vec![super::super::extents::ExtentRange { start: index % 6, count: 2 }])
        };
        pool.thin_batch(&[ThinRequest { id, kind }]).remove(0).expect("done");
    }
    Image {
        now: disk,
        old,
        root: pool.store.root.clone(),
        table: pool.table.clone(),
        records: ends,
    }
}

fn damage(image: &Image, disk: &SimDisk, offset: u64, kind: Damage, random: &mut fastrand::Rng) {
    let mut block = disk.peek(offset, BLOCK_BYTES as usize);
    match kind {
        Damage::Bit => block[random.usize(0..48)] ^= 1 << random.u8(0..8),
        Damage::EightBits => {
            for _ in 0..8 {
                block[random.usize(0..64)] ^= 1 << random.u8(0..8);
            }
        }
        Damage::GarbageSector => random.fill(&mut block[..512]),
        Damage::Zeros => block.fill(0),
        Damage::Old => block = image.old.peek(offset, BLOCK_BYTES as usize),
        Damage::Misplaced => block = disk.peek(offset + BLOCK_BYTES, BLOCK_BYTES as usize),
    }
    disk.poke(offset, &block);
}

fn copy(image: &Image) -> SimDisk {
    SimDisk::with(image.now.content(), sim_geometry(DEVICE_BYTES), 0)
}

/// Offsets of both copies of every kind of block: name, copies, and whether damage to both copies
/// may look like a power cut.
fn targets(image: &Image) -> Vec<(String, [u64; 2], bool)> {
    let root = &image.root;
    let mut targets = vec![
        ("root".to_owned(), [0, 1].map(|copy| root_offset(root.sequence, copy)), false),
        ("table".to_owned(), root.table_offsets(), false),
    ];
    for (index, at) in image.records.iter().enumerate() {
        let last = index + 1 == image.records.len();
        targets.push((format!("record {index}"), root.log_offsets().map(|log| log + at), last));
    }
    targets
}

#[test]
fn a_damaged_copy_is_repaired_and_damage_to_both_is_refused() {
    let mut random = fastrand::Rng::with_seed(5);
    let mut cells = 0;
    for records in [0, 1, 3] {
        let image = image(records);
        for (name, offsets, last) in targets(&image) {
            for kind in DAMAGES {
                for _ in 0..8 {
                    for copies in [&offsets[..1], &offsets[1..]] {
                        let disk = copy(&image);
                        damage(&image, &disk, copies[0], kind, &mut random);
                        let pool = Pool::open(Box::new(disk.clone()));
                        let mut pool = pool.unwrap_or_else(|e| panic!("{name} {kind:?}: {e}"));
                        assert!(pool.table == image.table, "{name} {kind:?}");
                        let report = pool.check();
                        assert!(report.is_clean(), "repaired: {name} {:?}", report.findings);
                        cells += 1;
                    }
                    let disk = copy(&image);
                    offsets.iter().for_each(|at| damage(&image, &disk, *at, kind, &mut random));
                    let before = disk.peek(0, DEVICE_BYTES as usize);
                    match Pool::open(Box::new(disk.clone())) {
                        Ok(pool) => {
                            // Root 3 with its log is the same state as root 4 without one; and a
                            // last record that is gone twice is a torn append.
                            let same = pool.table == image.table;
                            assert!(same || last, "{name} {kind:?}: the past is served");
                        }
                        Err(error) => {
                            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                            assert!(error.to_string().contains("byte"), "{error}");
                            assert!(disk.peek(0, DEVICE_BYTES as usize) == before, "untouched");
                        }
                    }
                    cells += 1;
                }
            }
        }
    }
    println!("media faults: {cells} cells, 0 failures");
    assert!(cells > 1000, "{cells}");
}

#[test]
fn a_torn_append_ends_the_log_and_a_damaged_middle_is_corruption() {
    let image = image(3);
    let logs = image.root.log_offsets();
    let wipe = |disk: &SimDisk, at: u64| {
        logs.iter().for_each(|log| disk.poke(log + at + 512, &[0xff; 512]));
    };
    let disk = copy(&image);
    wipe(&disk, image.records[2]);
    let mut pool = Pool::open(Box::new(disk.clone())).expect("a torn append is no damage");
    assert!(pool.table != image.table && pool.check().is_clean());
    // The place is used again, and what was torn there does not come back.
    pool.remove(AllocationId(1)).expect("removed");
    let again = Pool::open(Box::new(disk)).expect("opens");
    assert_eq!(again.table, pool.table);
    for middle in &image.records[..2] {
        let disk = copy(&image);
        wipe(&disk, *middle);
        let error = Pool::open(Box::new(disk.clone())).err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("damaged in both copies"), "{error}");
        let report = Pool::check_offline(Box::new(disk), &CheckProgress::default());
        let report = report.expect("a pool");
        assert!(!report.is_clean() && report.findings[0].text.contains("damaged"));
    }
}

#[test]
fn check_names_what_is_damaged_and_changes_nothing() {
    let image = image(2);
    for (name, offsets, _) in targets(&image) {
        for offset in offsets {
            let disk = copy(&image);
            disk.poke(offset + 16, &[0xee; 16]);
            let before = disk.peek(0, DEVICE_BYTES as usize);
            let report = Pool::check_offline(Box::new(disk.clone()), &CheckProgress::default());
            let report = report.expect("a pool");
            let [finding] = &report.findings[..] else { panic!("{name}: {:?}", report.findings) };
            assert_eq!((finding.offset, finding.repairable), (offset, true), "{name}");
            assert!(disk.peek(0, DEVICE_BYTES as usize) == before, "{name}");
        }
    }
}

#[test]
fn a_newer_version_is_refused_and_not_a_byte_is_touched() {
    let image = image(1);
    for (at, value) in [(8, VERSION + 1), (12, 1)] {
        let disk = copy(&image);
        for offset in ROOT_OFFSETS.as_flattened() {
            let mut block = disk.peek(*offset, BLOCK_BYTES as usize);
            block[at..at + 4].copy_from_slice(&value.to_le_bytes());
            let checksum = crc32c(0, &block[..4092]);
            block[4092..].copy_from_slice(&checksum.to_le_bytes());
            disk.poke(*offset, &block);
        }
        let before = disk.peek(0, DEVICE_BYTES as usize);
        let error = Pool::open(Box::new(disk.clone())).err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("newer vflash"), "{error}");
        assert!(Pool::format(Box::new(disk.clone()), "p").is_err());
        assert!(disk.peek(0, DEVICE_BYTES as usize) == before, "untouched");
    }
}

#[test]
fn a_device_that_was_cut_short_is_refused() {
    let image = image(1);
    image.now.set_size(DEVICE_BYTES - EXTENT_BYTES);
    let error = Pool::open(Box::new(image.now.clone())).err().expect("refused");
    assert!(error.to_string().contains("cut short"), "{error}");
}

#[test]
fn guest_bytes_that_look_like_a_record_are_none() {
    let image = image(1);
    let disk = copy(&image);
    let mut pool = Pool::open(Box::new(disk.clone())).expect("opens");
    // The owner's attributes hold a record of this very pool, sequence and salt as expected, but
    // a record is only looked for where one ends and at whole blocks behind.
    let link = pool.store.link;
    let (forged, _) = record::encode(&[Change::Remove { id: AllocationId(1) }], link.next(0));
    let attributes = forged[..4096].to_vec();
    pool.set_attributes(AllocationId(3), attributes).expect("set");
    let again = Pool::open(Box::new(disk)).expect("opens");
    assert_eq!(again.table, pool.table);
}

/// How long each fuzz loop runs: `VFLASH_FUZZ_SECONDS`, else two seconds.
fn fuzz_duration() -> Duration {
    let seconds = std::env::var("VFLASH_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(2))
}

/// Mutates roots, tables, logs and whole images, with checksums made good again, and opens them:
/// no panic, no hang, and what opens is sound. Returns the rounds.
fn fuzz_for(duration: Duration, seed: u64) -> (u64, u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let image = image(3);
    let begun = Instant::now();
    let (mut rounds, mut opened) = (0, 0);
    while begun.elapsed() < duration {
        let round_seed = random.u64(..);
        let announce = Announce(round_seed);
        opened += u64::from(fuzz_once(&image, round_seed));
        drop(announce);
        rounds += 1;
    }
    (rounds, opened)
}

struct Announce(u64);

impl Drop for Announce {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("fuzz round failed; repeat it with fuzz_once(&image(3), {})", self.0);
        }
    }
}

fn fuzz_once(image: &Image, seed: u64) -> bool {
    let mut random = fastrand::Rng::with_seed(seed);
    let disk = copy(image);
    let mut root = image.root.clone();
    let kind = random.u8(0..4);
    if kind == 0 {
        mutate_table(image, &disk, &mut root, &mut random);
    } else if kind == 1 {
        let at = image.records[random.usize(..image.records.len())];
        for log in root.log_offsets() {
            let mut record = disk.peek(log + at, BLOCK_BYTES as usize);
            mutate(&mut random, &mut record[24..200]);
            seal_record(&mut record, root.salt);
            disk.poke(log + at, &record);
        }
    }
    let mut block = root.encode();
    if kind >= 2 {
        mutate(&mut random, &mut block[..210]);
        if kind == 2 {
            let checksum = crc32c(0, &block[..4092]);
            block[4092..].copy_from_slice(&checksum.to_le_bytes());
        }
    }
    for offset in ROOT_OFFSETS.as_flattened() {
        disk.poke(*offset, &block);
    }
    match Pool::open(Box::new(disk)) {
        Ok(mut pool) => {
            let report = pool.check();
            assert!(report.is_clean(), "what opens is sound: {:?}", report.findings);
            // It must also be usable.
            let _ = pool.create(thin("vm/after", MIB));
            true
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

fn mutate_table(image: &Image, disk: &SimDisk, root: &mut Root, random: &mut fastrand::Rng) {
    let offsets = root.table_offsets();
    let mut table = disk.peek(offsets[0], image.root.table_bytes as usize);
    mutate(random, &mut table);
    if random.u8(0..4) == 0 {
        table.truncate(random.usize(..table.len()));
    }
    root.table_bytes = table.len() as u64;
    root.table_checksum = crc32c(0, &table);
    offsets.iter().for_each(|offset| disk.poke(*offset, &table));
    // The log goes on from this table, so that its records are applied to it.
    let (mut at, mut previous) = (0, root.table_checksum);
    for _ in &image.records {
        let mut record = disk.peek(root.log_offsets()[0] + at, BLOCK_BYTES as usize);
        record[32..36].copy_from_slice(&previous.to_le_bytes());
        seal_record(&mut record, root.salt);
        previous = u32::from_le_bytes([record[36], record[37], record[38], record[39]]);
        root.log_offsets().iter().for_each(|log| disk.poke(log + at, &record));
        at += record.len() as u64;
    }
}

fn seal_record(record: &mut [u8], salt: u64) {
    record[36..40].fill(0);
    let checksum = crc32c(salt as u32, record);
    record[36..40].copy_from_slice(&checksum.to_le_bytes());
}

fn mutate(random: &mut fastrand::Rng, bytes: &mut [u8]) {
    for _ in 0..random.usize(1..5) {
        let at = random.usize(..bytes.len());
        match random.u8(0..4) {
            0 => bytes[at] ^= 1 << random.u8(0..8),
            1 => bytes[at] = random.choice([0, 1, 0x7f, 0x80, 0xff]).expect("five"),
            2 => bytes[at] = random.u8(..),
            _ => {
                let end = (at + random.choice([2, 4, 8]).expect("three")).min(bytes.len());
                let fill = random.choice([0, 0xff]).expect("two");
                bytes[at..end].fill(fill);
            }
        }
    }
}

#[test]
fn fuzz_mutated_metadata_never_panics_and_what_opens_is_sound() {
    let (rounds, opened) = fuzz_for(fuzz_duration(), 17);
    println!("fuzz of roots, tables and logs: {rounds} rounds, {opened} opened, 0 failures");
    assert!(opened > 0 && opened < rounds, "both outcomes are reached");
}
