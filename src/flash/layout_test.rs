//! FORMAT.md, the layout and the bytes that are written are the same.

use super::*;
use crate::base::byte_table::{assert_documented, number};
use crate::flash::extents::ExtentRange;
use crate::flash::pool::tests::{make, thick};
use crate::flash::record::{self, Link};
use crate::flash::root::salt;
use crate::io::sim::SimDisk;

#[test]
fn format_md_shows_the_layout_that_the_code_uses() {
    for (heading, layout, length) in [
        ("Root", ROOT_LAYOUT, BLOCK_BYTES),
        ("Table header", TABLE_LAYOUT, TABLE_HEADER_BYTES),
        ("Allocation", ALLOCATION_LAYOUT, ALLOCATION_HEADER_BYTES),
        ("Run", RUN_LAYOUT, RUN_BYTES),
        ("Unscrubbed range", RANGE_LAYOUT, RANGE_BYTES),
        ("Record header", RECORD_LAYOUT, RECORD_HEADER_BYTES as u64),
    ] {
        assert_documented(include_str!("FORMAT.md"), heading, layout, length as usize);
        let (offset, bytes, _) = layout[layout.len() - 1];
        assert_eq!((offset + bytes) as u64, length, "{heading} ends where its last field does");
    }
}

#[test]
fn metadata_is_small_and_sized_for_the_worst_case() {
    for device_bytes in [POOL_BYTES_MIN, 64 * MIB, 8 << 30, 1 << 42, POOL_BYTES_MAX] {
        let (table_capacity, log_bytes) = area_sizes(device_bytes);
        let share = 4 * (table_capacity + log_bytes) * 1000 / device_bytes;
        assert!(share <= if device_bytes < 1 << 30 { 500 } else { 5 }, "{device_bytes}: {share}");
        assert!(log_bytes >= 256 * KIB);
    }
}

#[test]
fn roots_tables_and_runs_are_written_as_the_layout_says() {
    let disk = SimDisk::new(24 * MIB);
    let mut pool = make(&disk, None);
    let first = pool.create(thick("vm/0", 2 * MIB)).expect("created");
    pool.create(thick("vm/first", 2 * MIB + 4096)).expect("created");
    pool.remove(first).expect("removed");
    pool.checkpoint().expect("written");
    let root = pool.store.root.clone();
    let block = disk.peek(root_offset(root.sequence, 0), BLOCK_BYTES as usize);
    let areas = root.plan.areas;
    for (name, value) in [
        ("magic", u64::from_le_bytes(*ROOT_MAGIC)),
        ("version", 1),
        ("features", 0),
        ("sequence", 2),
        ("device bytes", 24 * MIB),
        ("extent bytes", MIB),
        ("active area", 1),
        ("table bytes", root.table_bytes),
        ("table checksum", root.table_checksum.into()),
        ("record sequence", 4),
        ("salt", salt(&[9; 16], 2)),
        ("table capacity", root.plan.table_capacity),
        ("log bytes", root.plan.log_bytes),
        ("area 0 copy 0", areas[0][0]),
        ("area 0 copy 1", areas[0][1]),
        ("area 1 copy 0", areas[1][0]),
        ("area 1 copy 1", areas[1][1]),
        ("name bytes", 4),
    ] {
        assert_eq!(number(ROOT_LAYOUT, name, &block), value, "{name}");
    }
    assert_eq!((&block[16..32], &block[137..141]), (&[9; 16][..], &b"test"[..]));
    let table = disk.peek(areas[1][0], root.table_bytes as usize);
    for (name, value) in
        [("next id", 3), ("allocations", 1), ("unscrubbed ranges", 1), ("device extents", 24)]
    {
        assert_eq!(number(TABLE_LAYOUT, name, &table), value, "{name}");
    }
    assert_eq!(number(TABLE_LAYOUT, "root sequence", &table), 2);
    let entry = &table[TABLE_HEADER_BYTES as usize..];
    for (name, value) in [
        ("id", 2),
        ("size bytes", 2 * MIB + 4096),
        ("name bytes", 8),
        ("class", 0),
        ("flags", 0),
        ("attribute bytes", 2),
        ("runs", 1),
    ] {
        assert_eq!(number(ALLOCATION_LAYOUT, name, entry), value, "{name}");
    }
    let rest = &entry[ALLOCATION_HEADER_BYTES as usize..];
    assert_eq!(&rest[..10], b"vm/first{}");
    for (name, value) in
        [("logical", 0), ("physical", 7), ("count", 3), ("reserved", 0), ("generation", 2)]
    {
        assert_eq!(number(RUN_LAYOUT, name, &rest[10..]), value, "{name}");
    }
    let range = &rest[10 + RUN_BYTES as usize..];
    assert_eq!(
        (number(RANGE_LAYOUT, "start", range), number(RANGE_LAYOUT, "count", range)),
        (5, 2)
    );
    assert_eq!(range.len() as u64, RANGE_BYTES);
}

#[test]
fn records_are_written_as_the_layout_says() {
    let link = Link { salt: 0x1122_3344_5566_7788, sequence: 77, previous: 99 };
    let physical = ExtentRange { start: 5, count: 6 };
    let (bytes, checksum) =
        record::encode(&[crate::flash::change::Change::Clean { physical }], link);
    for (name, value) in [
        ("magic", u64::from_le_bytes(*RECORD_MAGIC)),
        ("salt", link.salt),
        ("sequence", 77),
        ("record bytes", BLOCK_BYTES),
        ("payload bytes", 17),
        ("previous checksum", 99),
        ("checksum", checksum.into()),
        ("changes", 1),
        ("reserved", 0),
    ] {
        assert_eq!(number(RECORD_LAYOUT, name, &bytes), value, "{name}");
    }
    assert_eq!((bytes[48], bytes[49], bytes[57]), (7, 5, 6), "tag, start, count");
    assert_eq!(bytes.len() as u64, BLOCK_BYTES);
}
