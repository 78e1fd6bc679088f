//! Damage and deceit: rot in any structure of the log is found or harmless, a guest's forged
//! records are never taken for records, and every request agrees with the model.

#[path = "cache/rig.rs"]
mod rig;

use rig::{Rig, Setup, World, run_all, scale};
use vflash::base::units::SECTOR_BYTES;
use vflash::cache::CacheState;
use vflash::cache::layout::ROOT_OFFSETS;
use vflash::cache::record::{BatchEncoder, BatchLink, Plan};
use vflash::cache::scan::{Scan, ScannedSegment, scan};
use vflash::io::crash::Explorer;
use vflash::io::disk::Disk;
use vflash::io::sim::{Spoiling, Spoilt};

#[derive(Clone, Copy, Debug)]
enum Damage {
    Bit,
    EightBits,
    Garbage,
    Zeros,
    /// What another place of the flash holds.
    Misdirected,
    /// What was here a lap ago.
    Old,
    /// Half of a block.
    Torn,
    Unreadable,
    /// As unreadable, the first time.
    Heals,
    Slow,
}

const DAMAGES: [Damage; 10] = [
    Damage::Bit,
    Damage::EightBits,
    Damage::Garbage,
    Damage::Zeros,
    Damage::Misdirected,
    Damage::Old,
    Damage::Torn,
    Damage::Unreadable,
    Damage::Heals,
    Damage::Slow,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Structure {
    Root,
    SegmentHeader,
    BatchHeader,
    Payload,
    Summary,
}

const STRUCTURES: [Structure; 5] = [
    Structure::Root,
    Structure::SegmentHeader,
    Structure::BatchHeader,
    Structure::Payload,
    Structure::Summary,
];

/// Byte offsets of the first, a middle and the last one of a kind.
fn places(scan: &Scan, structure: Structure) -> Vec<u64> {
    let shape = scan.root.shape;
    let mut all = Vec::new();
    if structure == Structure::Root {
        all.extend_from_slice(ROOT_OFFSETS.as_flattened());
    }
    for segment in &scan.segments {
        let start = shape.segment_offset(segment.index);
        match structure {
            Structure::Root => {}
            Structure::SegmentHeader => all.push(start),
            Structure::Summary => all.push(start + shape.segment_bytes - 512),
            Structure::BatchHeader | Structure::Payload => {
                for batch in &segment.batches {
                    let at = start + u64::from(batch.position);
                    let payload = structure == Structure::Payload;
                    let inside = if payload { batch.header.data_start } else { 0 };
                    if !payload || batch.header.data_sectors > 0 {
                        all.push(at + u64::from(inside));
                    }
                }
            }
        }
    }
    let picks = [0, all.len() / 2, all.len().saturating_sub(1)];
    picks.iter().filter_map(|pick| all.get(*pick).copied()).collect()
}

fn inflict(world: &World, old: &World, at: u64, damage: Damage) {
    let (flash, before) = (&world.0[0], &old.0[0]);
    let rest = flash.geometry().size_bytes - at;
    let mut block = flash.peek(at, rest.min(4096) as usize);
    let sector = SECTOR_BYTES as usize;
    let spoil = |how| flash.spoil(Spoilt { offset: at, length: SECTOR_BYTES, how });
    let other = before.peek(1 << 20, block.len());
    match damage {
        Damage::Bit => block[37] ^= 4,
        Damage::EightBits => block[40] ^= 0xFF,
        Damage::Garbage => {
            block[..sector].iter_mut().for_each(|byte| *byte = byte.wrapping_mul(7) ^ 0x5A)
        }
        Damage::Zeros => block[..sector].fill(0),
        Damage::Misdirected => block = other,
        Damage::Old => block = before.peek(at, block.len()),
        Damage::Torn => {
            let half = block.len() / 2 / sector * sector;
            block[..half].copy_from_slice(&before.peek(at, half));
        }
        Damage::Unreadable => return spoil(Spoiling::Unreadable { reads: u32::MAX }),
        Damage::Heals => return spoil(Spoiling::Unreadable { reads: 1 }),
        Damage::Slow => return spoil(Spoiling::Slow { polls: 1000 }),
    }
    flash.poke(at, &block);
}

/// A disk with a log that has gone round, a part of it drained; and how it was a lap before.
fn damaged_disk(seed: u64) -> (Rig, World, World) {
    let mut rig = Rig::new(Setup { strong: true, segments: 8, ..Setup::of(seed) });
    (0..150).for_each(|_| rig.write_somewhere());
    rig.drain(None);
    let old = rig.world.killed(seed);
    (0..100).for_each(|_| rig.write_somewhere());
    rig.drain(None);
    (0..60).for_each(|_| rig.write_somewhere());
    rig.finish();
    let world = rig.world.killed(seed);
    (rig, old, world)
}

#[derive(Default)]
struct Found {
    cells: u64,
    harmless: u64,
    fenced: u64,
    tail: u64,
}

/// Never a wrong byte; a shorter log only if what is missing is the last append.
fn judge_damage(rig: &Rig, world: &World, what: &str, found: &mut Found) {
    found.cells += 1;
    let full = rig.model.head();
    let setup = Setup { reorder: false, ..rig.setup };
    let opened = world.open(&setup);
    let (disk, _) = opened.unwrap_or_else(|error| panic!("{what}: it does not open: {error}"));
    let mut after = Rig::on(setup, world.clone(), disk, rig.model.clone());
    let head = after.head();
    if matches!(after.state(), CacheState::Fenced(_)) {
        found.fenced += 1;
        return;
    }
    let known = scan(&mut world.medium(), 0).map_or(0, |scan| {
        let headers = scan.segments.iter().flat_map(|segment| &segment.batches);
        headers.map(|batch| batch.header.durable_through).max().unwrap_or(0)
    });
    assert!(head >= known, "{what}: {known} was known to be durable, {head} is left");
    match after.check_guest(head) {
        Ok(()) if head == full => found.harmless += 1,
        Ok(()) => found.tail += 1,
        Err(text) => {
            assert!(text.contains("failed"), "{what}: wrong bytes were served: {text}");
            after.head();
            let fenced = matches!(after.state(), CacheState::Fenced(_));
            assert!(fenced, "{what}: damaged data must fence the disk");
            found.fenced += 1;
        }
    }
    let lost = full - head;
    assert!(lost <= 12, "{what}: {lost} writes are gone, and nothing was said");
}

#[test]
fn damage_is_found_or_harmless_and_never_served() {
    let mut found = Found::default();
    for seed in 0..4 * scale() {
        let (rig, old, world) = damaged_disk(seed);
        let scan = scan(&mut world.medium(), 256).expect("a log");
        for structure in STRUCTURES {
            for at in places(&scan, structure) {
                for damage in DAMAGES {
                    let world = world.killed(seed);
                    inflict(&world, &old, at, damage);
                    let what = format!("seed {seed}: {damage:?} in {structure:?} at byte {at}");
                    judge_damage(&rig, &world, &what, &mut found);
                }
            }
        }
    }
    let Found { cells, harmless, fenced, tail } = found;
    println!(
        "crash suite: media faults: {cells} states, 0 failures ({fenced} fenced, {harmless} \
         harmless, {tail} taken for a torn end)"
    );
    assert!(cells >= 300 && fenced >= 20 && harmless >= 50, "{fenced} {harmless} {tail}");
}

/// A batch as somebody makes it who knows all but the secret: it says that all up to `last` was
/// durable.
fn sealed_without_the_secret(segment: &ScannedSegment, last: u64) -> [u8; 512] {
    let plan = Plan::default().mark(b"forged");
    let mut encoder = BatchEncoder::default();
    encoder.begin(plan, 512, (last, segment.header.epoch + 1));
    encoder.mark(b"forged", false);
    let link = BatchLink {
        salt: 0x5a17,
        incarnation: segment.header.incarnation,
        sequence: segment.header.first_batch + 1000,
        durable_through: last,
        ..BatchLink::default()
    };
    let (header, _) = encoder.seal(link);
    let mut bytes = [0; 512];
    bytes[..header.len()].copy_from_slice(header);
    bytes
}

/// A guest reads what the flash holds (it cannot, but may guess) and writes it as its data: whole
/// batches and segment headers, as they are and with the next numbers.
fn forge(seed: u64) -> u64 {
    let mut rig = Rig::new(Setup { reorder: false, ..Setup::of(seed) });
    for _ in 0..40 {
        (0..3).for_each(|_| rig.write_somewhere());
        rig.finish();
        let scan = scan(&mut rig.world.medium(), 256).expect("a log");
        let shape = scan.root.shape;
        let Some(segment) = rig.random.choice(&scan.segments) else { continue };
        let start = shape.segment_offset(segment.index);
        let from = match rig.random.choice(&segment.batches) {
            Some(batch) if rig.random.bool() => start + u64::from(batch.position),
            _ => start,
        };
        let mut bytes = rig.world.0[0].peek(from, 32 << 10);
        if rig.random.bool() {
            // The next sequence, without the secret to seal it.
            bytes[48] = bytes[48].wrapping_add(1);
        }
        if rig.random.bool() {
            let last = scan.next_won + rig.random.u64(1..1000);
            bytes[..512].copy_from_slice(&sealed_without_the_secret(segment, last));
        }
        rig.write_foreign(1500, &bytes[..16 << 10]);
    }
    let explorer =
        Explorer { samples: 4, exhaustive_max: 1, points_max: 60, ..Explorer::new(seed) };
    rig::explore(&rig, &explorer, |case, world| rig.judge(case, &world, 0))
}

#[test]
fn forged_records_are_never_accepted() {
    let seeds: Vec<u64> = (0..8 * scale()).collect();
    let states = run_all("forged records", &seeds, |seed| forge(*seed));
    assert!(rig::alone() || states >= 2_000, "{states} states are too few");
}

/// Requests of all kinds, many under way, a log that is too small for them: every read is judged,
/// the disk is killed and opened again, and in the end the backing is the disk.
fn conform(seed: u64) -> u64 {
    let mut rig = Rig::new(Setup::of(seed));
    let mut requests = 0;
    for _ in 0..10 {
        (0..400).for_each(|_| rig.step());
        rig.finish();
        assert_eq!(rig.failed, 0, "seed {seed}");
        requests += rig.requests;
        rig.check_guest(rig.model.head()).unwrap_or_else(|text| panic!("seed {seed}: {text}"));
        let world = rig.world.killed(seed);
        let (disk, next_won) = world.open(&rig.setup).expect("opened");
        let mut model = (*rig.model).clone();
        model.skip_to(next_won);
        rig = Rig::on(rig.setup, world, disk, std::sync::Arc::new(model));
    }
    rig.drain(None);
    rig.check_backing(rig.model.head());
    requests
}

#[test]
fn every_request_agrees_with_the_model() {
    let seeds: Vec<u64> = (0..10 * scale()).collect();
    let requests = run_all("model conformance (requests)", &seeds, |seed| conform(*seed));
    assert!(requests >= 30_000, "{requests} requests are too few");
}
