//! FORMAT.md, the layouts and the bytes that are written are the same; no bytes make a decoder
//! panic, and what it accepts is sound.

use super::group::GroupWriter;
use super::identity::{Identity, Kind};
use super::redo::*;
use super::roster::{Peer, Roster};
use super::stamp::*;
use crate::base::byte_table::{assert_documented, number};
use crate::base::checksum::{content, crc32c};
use crate::base::limits::CONSISTENCY_GROUP_MAX;
use crate::base::units::MIB;
use std::time::{Duration, Instant};

pub(super) fn stamp() -> Stamp {
    Stamp {
        disk: [7; 16],
        sequence: 41,
        owner: Owner {
            host: [1; 16],
            instance: [2; 16],
            allocation: [3; 16],
            host_name: "alpha".into(),
            volume: "web-1/root".into(),
        },
        owner_epoch: 5,
        first_epoch: 4,
        owned_ms: 1_767_225_599_001,
        stamped_ms: 1_767_225_600_000,
        identity: Identity {
            kind: Kind::File,
            size_bytes: 8 * MIB,
            block_bytes: 512,
            fingerprint: [11, 12],
        },
        state: State::Dirty,
        drain: DrainMode::Grouped,
        point: Point { won: 100, time_ms: 1_767_225_598_000, others: 3 },
        dirty_bytes: 12 * MIB,
        oldest_dirty_ms: 1_767_225_590_000,
        retired_group: 8,
        group_bytes_max: 2 * MIB,
        committed_step: 5 << 32 | 9,
        roster: Roster { name: "db".into(), members: vec![peer("log"), peer("root")] },
    }
}

fn peer(name: &str) -> Peer {
    Peer {
        volume: format!("web-1/{name}"),
        backing: format!("/mnt/{name}.raw"),
        sidecar: format!("/mnt/{name}.raw.vflash"),
    }
}

fn id() -> GroupId {
    GroupId { disk: [7; 16], owner_epoch: 5, number: 9 }
}

fn group() -> super::group::Finished {
    let mut writer = GroupWriter::new(Layout::new(2 * MIB), id());
    writer.set_step(StepId::of_leader(id()));
    writer.data(3, &[5; 1024]);
    writer.zero(8, 1 << 20);
    writer.discard((1 << 20) + 8, 1);
    writer.data(1 << 21, &[6; 512]);
    let span = Span { from: 100, to: 120, point_ms: 77, dirty_bytes: 88, part: true, others: 4 };
    writer.finish(span)
}

#[test]
fn format_md_shows_the_layout_that_the_code_uses() {
    for (heading, layout, length) in [
        ("Stamp", STAMP_LAYOUT, STAMP_BYTES),
        ("Group header", HEADER_LAYOUT, HEADER_BYTES),
        ("Entry", ENTRY_LAYOUT, ENTRY_BYTES as usize),
    ] {
        assert_documented(include_str!("FORMAT.md"), heading, layout, length);
    }
}

#[test]
fn stamps_are_written_as_the_layout_says() {
    let bytes = stamp().encode();
    for (name, value) in [
        ("magic", u64::from_le_bytes(*STAMP_MAGIC)),
        ("version", 1),
        ("features", 1),
        ("sequence", 41),
        ("owner epoch", 5),
        ("owned since", 1_767_225_599_001),
        ("stamped at", 1_767_225_600_000),
        ("size bytes", 8 * MIB),
        ("block bytes", 512),
        ("kind", 1),
        ("state", 1),
        ("drain", 2),
        ("reserved", 0),
        ("point", 100),
        ("point time", 1_767_225_598_000),
        ("dirty bytes", 12 * MIB),
        ("oldest dirty", 1_767_225_590_000),
        ("retired group", 8),
        ("group bytes", 2 * MIB),
        ("committed step", 5 << 32 | 9),
        ("consistency group bytes", 2),
        ("members", 2),
        ("others", 3),
        ("first epoch", 4),
        ("host name bytes", 5),
        ("volume bytes", 10),
        ("checksum", crc32c(0, &bytes[..4092]).into()),
    ] {
        assert_eq!(number(STAMP_LAYOUT, name, &bytes), value, "{name}");
    }
    assert_eq!((&bytes[16..32], &bytes[64..80]), (&[7; 16][..], &[1; 16][..]));
    assert_eq!((&bytes[80..96], &bytes[96..112]), (&[2; 16][..], &[3; 16][..]));
    assert_eq!((bytes[128], bytes[136]), (11, 12), "both halves of the fingerprint");
    assert_eq!((&bytes[201..206], &bytes[265..275]), (&b"alpha"[..], &b"web-1/root"[..]));
    assert_eq!(Stamp::decode(&bytes), StampBlock::Valid(Box::new(stamp())));
    assert_eq!(stamp().offsets(), [16 << 10, 48 << 10]);
    assert_eq!(stamp().next(1).offsets(), [0, 32 << 10]);
}

#[test]
fn groups_are_written_as_the_layout_says() {
    let group = group();
    let header = &group.header_block;
    for (name, value) in [
        ("magic", u64::from_le_bytes(*REDO_MAGIC)),
        ("version", 1),
        ("features", 1),
        ("owner epoch", 5),
        ("number", 9),
        ("from", 100),
        ("to", 120),
        ("point time", 77),
        ("dirty bytes", 88),
        ("flags", 1),
        ("entries", 4),
        ("data bytes", 1536),
        ("table checksum", crc32c(id().salt(), &group.table[..128]).into()),
        ("step", 5 << 32 | 9),
        ("others", 4),
        ("checksum", crc32c(0, &header[..508]).into()),
    ] {
        assert_eq!(number(HEADER_LAYOUT, name, header), value, "{name}");
    }
    assert_eq!((&header[16..32], header.len()), (&[7; 16][..], 4096));
    let last = &group.table[96..128];
    for (name, value) in [
        ("start", 1 << 21),
        ("count", 1),
        ("kind", 1),
        ("data checksum", content(id().salt().into(), &[6; 512]).into()),
        ("data position", 1024),
    ] {
        assert_eq!(number(ENTRY_LAYOUT, name, last), value, "{name}");
    }
    let layout = Layout::new(2 * MIB);
    assert_eq!(GroupHeader::decode(header, &layout), HeaderBlock::Valid(group.header));
    let entries = decode_table(&group.table, &group.header, 1 << 22).expect("a table");
    let kinds: Vec<_> = entries.iter().map(|entry| (entry.start, entry.count)).collect();
    assert_eq!(kinds, [(3, 2), (8, 1 << 20), ((1 << 20) + 8, 1), (1 << 21, 1)]);
    assert_eq!(decode_table(&group.table, &group.header, 1 << 20), Err(TableFault::Impossible));
    let other = GroupHeader { id: GroupId { number: 11, ..id() }, ..group.header };
    let stale = decode_table(&group.table, &other, 1 << 22);
    assert_eq!(stale, Err(TableFault::Checksum), "another group's table does not pass (G4)");
}

#[test]
fn slots_do_not_overlap_and_are_as_long_as_said() {
    for group_bytes_max in [GROUP_BYTES_MIN, 5 * MIB, GROUP_BYTES_DEFAULT, GROUP_BYTES_MAX] {
        let layout = Layout::new(group_bytes_max);
        assert_eq!(layout.header_offset(0), 64 << 10);
        for slot in [0, 1] {
            assert_eq!(layout.table_offset(slot), layout.header_offset(slot) + 4096);
            let table = layout.data_offset(slot) - layout.table_offset(slot);
            assert!(table >= group_bytes_max / 2048 * 32);
            assert_eq!(layout.data_offset(slot) + group_bytes_max, layout.header_offset(slot + 1));
        }
        assert_eq!(layout.sidecar_bytes(), layout.header_offset(2));
    }
    assert_eq!(Layout::group_bytes_for(4096), MIB);
    assert_eq!(Layout::group_bytes_for(16 * MIB + 512), 4 * MIB + 4096);
    assert_eq!(Layout::group_bytes_for(u64::MAX), 32 * MIB);
}

#[test]
fn long_names_are_cut_between_characters() {
    let mut stamp = stamp();
    stamp.owner.host_name = "ä".repeat(63);
    stamp.owner.volume = "x".repeat(500);
    let StampBlock::Valid(read) = Stamp::decode(&stamp.encode()) else { panic!("valid") };
    assert_eq!(read.owner.host_name, "ä".repeat(31));
    assert_eq!(read.owner.volume, "x".repeat(127));
}

#[test]
fn every_changed_bit_is_found() {
    let layout = Layout::new(2 * MIB);
    let (stamp, group) = (stamp().encode(), group());
    for bit in 0..4096 * 8 {
        let mut bytes = stamp.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(!matches!(Stamp::decode(&bytes), StampBlock::Valid(_)), "bit {bit} of a stamp");
    }
    for bit in 0..512 * 8 {
        let mut bytes = group.header_block.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let block = GroupHeader::decode(&bytes, &layout);
        assert!(
            matches!(block, HeaderBlock::Damaged(_) | HeaderBlock::Foreign),
            "bit {bit} of a header: {block:?}"
        );
    }
    for bit in 0..128 * 8 {
        let mut bytes = group.table.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let table = decode_table(&bytes, &group.header, 1 << 22);
        assert_eq!(table, Err(TableFault::Checksum), "bit {bit} of a table");
    }
}

#[test]
fn newer_versions_and_unknown_features_are_told_from_damage() {
    let layout = Layout::new(2 * MIB);
    for (at, version, features) in [(8, 2, 1), (12, 1, 2)] {
        let mut bytes = stamp().encode();
        bytes[at] = 2;
        seal(&mut bytes, 4092);
        assert_eq!(Stamp::decode(&bytes), StampBlock::Newer { version, features });
        let mut bytes = group().header_block;
        bytes[at] = 2;
        seal(&mut bytes, 508);
        let block = GroupHeader::decode(&bytes, &layout);
        assert_eq!(block, HeaderBlock::Newer { version, features });
    }
    assert_eq!(Stamp::decode(&[0; 4096]), StampBlock::Empty);
    assert_eq!(Stamp::decode(&[9; 4096]), StampBlock::Foreign);
    assert_eq!(GroupHeader::decode(&[0; 4096], &layout), HeaderBlock::Empty);
}

/// What belongs to a consistency group has the feature, so that a build from before there were any
/// refuses it; all else has none, so that such a build reads it.
#[test]
fn only_what_belongs_to_a_consistency_group_has_its_feature() {
    let mut plain = stamp();
    (plain.committed_step, plain.roster, plain.point.others) = (0, Roster::default(), 0);
    let features = |stamp: &Stamp| number(STAMP_LAYOUT, "features", &stamp.encode());
    assert_eq!(features(&plain), 0);
    assert!(plain.encode()[392..4092].iter().all(|byte| *byte == 0), "reserved in those builds");
    let (led, point) = (Stamp { committed_step: 7, ..plain.clone() }, plain.point);
    let roster = Stamp { roster: stamp().roster, ..plain.clone() };
    let others = Stamp { point: Point { others: 1, ..point }, ..plain.clone() };
    assert_eq!([led, roster, others].map(|stamp| features(&stamp)), [1; 3]);
    let step = Some(StepId::of_leader(id()));
    let header = |step, others| {
        let header = group().header;
        let span = Span { others, ..header.span };
        let block = GroupHeader { step, span, ..header }.encode();
        number(HEADER_LAYOUT, "features", &block)
    };
    assert_eq!([header(None, 0), header(step, 0), header(None, 1), header(step, 1)], [0, 1, 1, 1]);
}

#[test]
fn a_point_has_no_more_numbers_of_others_than_there_are() {
    let layout = Layout::new(2 * MIB);
    let (mut stamp, mut group) = (stamp().encode(), group().header_block);
    for (others, sound) in [(100_u64, true), (101, false), (u64::MAX, false)] {
        stamp[4084..4092].copy_from_slice(&others.to_le_bytes());
        seal(&mut stamp, 4092);
        assert_eq!(matches!(Stamp::decode(&stamp), StampBlock::Valid(_)), sound, "{others}");
    }
    for (others, sound) in [(120_u64, true), (121, false), (u64::MAX, false)] {
        group[124..132].copy_from_slice(&others.to_le_bytes());
        seal(&mut group, 508);
        let valid = matches!(GroupHeader::decode(&group, &layout), HeaderBlock::Valid(_));
        assert_eq!(valid, sound, "{others}");
    }
}

fn seal(bytes: &mut [u8], at: usize) {
    let checksum = crc32c(0, &bytes[..at]);
    bytes[at..at + 4].copy_from_slice(&checksum.to_le_bytes());
}

/// How long each fuzz loop runs: `VFLASH_FUZZ_SECONDS`, else two seconds.
fn fuzz_duration() -> Duration {
    let seconds = std::env::var("VFLASH_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(2))
}

fn mutate(random: &mut fastrand::Rng, bytes: &mut [u8]) {
    for _ in 0..random.usize(1..6) {
        let at = random.usize(..bytes.len());
        let end = (at + random.choice([1, 2, 4, 8]).expect("four")).min(bytes.len());
        match random.u8(0..3) {
            0 => bytes[at] ^= 1 << random.u8(0..8),
            1 => bytes[at..end].fill(random.choice([0, 0xff]).expect("two")),
            _ => random.fill(&mut bytes[at..end]),
        }
    }
}

#[test]
fn fuzz_mutated_stamps_and_groups_never_panic_and_what_passes_is_sound() {
    let mut random = fastrand::Rng::with_seed(23);
    let layout = Layout::new(2 * MIB);
    let (mut rounds, mut passed) = (0_u64, 0_u64);
    let begun = Instant::now();
    while begun.elapsed() < fuzz_duration() {
        let mut bytes = stamp().encode();
        let fields = if random.bool() { 16..400 } else { 392..4092 };
        mutate(&mut random, &mut bytes[fields]);
        seal(&mut bytes, 4092);
        if let StampBlock::Valid(stamp) = Stamp::decode(&bytes) {
            assert!(Layout::new(stamp.group_bytes_max).sidecar_bytes() < 3 << 30);
            assert!(stamp.sequence <= NUMBER_MAX && stamp.first_epoch <= stamp.owner_epoch);
            assert!(stamp.point.others <= stamp.point.won && stamp.committed_step <= NUMBER_MAX);
            assert!(stamp.roster.members.len() <= CONSISTENCY_GROUP_MAX);
            passed += 1;
        }
        let group = group();
        let mut header = group.header_block.clone();
        let mut table = group.table.clone();
        if random.bool() {
            mutate(&mut random, &mut header[16..132]);
        }
        mutate(&mut random, &mut table[..128]);
        // The table's checksum is made to fit, so that its content is looked at.
        let salt = match GroupHeader::decode(&header, &layout) {
            HeaderBlock::Valid(header) => header.id.salt(),
            _ => id().salt(),
        };
        header[96..100].copy_from_slice(&crc32c(salt, &table[..128]).to_le_bytes());
        seal(&mut header, 508);
        if let HeaderBlock::Valid(header) = GroupHeader::decode(&header, &layout)
            && let Ok(entries) = decode_table(&table, &header, 1 << 22)
        {
            let mut end = 0;
            for entry in entries {
                assert!(entry.count > 0 && entry.start >= end, "{entry:?}");
                end = entry.start + entry.count;
                assert!(end <= 1 << 22, "{entry:?}");
                if let Content::Data { position, .. } = entry.content {
                    assert!(position + entry.length() <= header.data_bytes, "{entry:?}");
                }
            }
            passed += 1;
        }
        rounds += 1;
    }
    println!("fuzz of stamps and groups: {rounds} rounds, {passed} passed, 0 failures");
    assert!(passed > 0 && passed < 2 * rounds, "both outcomes are reached");
}
