//! FORMAT.md, the layout and the bytes that are written are the same.

use super::*;
use crate::base::byte_table::{assert_documented, number};
use crate::cache::header::SegmentHeader;
use crate::cache::record::{BatchEncoder, BatchLink, EntryHead, Kind, Plan, RecordOrigin};
use crate::cache::root::tests::sample;
use crate::cache::summary::{SummaryBuilder, SummaryFoot};

#[test]
fn format_md_shows_the_layout_that_the_code_uses() {
    for (heading, layout, length) in [
        ("Root", ROOT_LAYOUT, BLOCK_BYTES as usize),
        ("Segment header", SEGMENT_LAYOUT, BLOCK_BYTES as usize),
        ("Batch header", BATCH_LAYOUT, BATCH_HEADER_BYTES as usize),
        ("Record entry", ENTRY_LAYOUT, ENTRY_BYTES as usize),
        ("Summary item", SUMMARY_ITEM_LAYOUT, SUMMARY_ITEM_BYTES),
        ("Summary foot", SUMMARY_FOOT_LAYOUT, SUMMARY_FOOT_BYTES),
        ("Slot table page", TABLE_LAYOUT, TABLE_HEADER_BYTES),
        ("Slot table entry", TABLE_ENTRY_LAYOUT, TABLE_ENTRY_BYTES),
    ] {
        assert_documented(include_str!("FORMAT.md"), heading, layout, length);
    }
}

fn holds(layout: &[Field], bytes: &[u8], fields: &[(&str, u64)]) {
    for (name, value) in fields {
        assert_eq!(number(layout, name, bytes), *value, "{name}");
    }
}

#[test]
fn roots_and_segment_headers_are_written_as_the_layout_says() {
    let root = sample();
    let fields = [
        ("magic", u64::from_le_bytes(*ROOT_MAGIC)),
        ("version", 2),
        ("features", 0),
        ("log uuid", 0x0101_0101_0101_0101),
        ("disk uuid", 0x0202_0202_0202_0202),
        ("sequence", 3),
        ("allocation bytes", 64 * MIB),
        ("segment bytes", MIB),
        ("incarnation", 4),
        ("secret", 5),
        ("oldest segment", 6),
        ("drained through", 7),
        ("drained epoch", 8),
        ("next WON", 9),
        ("next epoch", 10),
        ("end segment", 11),
        ("end batch", 12),
        ("end checksum", 13),
        ("mode", 1),
        ("flags", 1),
        ("backing bytes", 14),
        ("backing block", 15),
        ("backing kind", 16),
        ("backing fingerprint", 0x1111_1111_1111_1111),
        ("clean from", 18),
        ("slab epoch", 19),
        ("slabs through", 20),
        ("alone since", 22),
        ("backing optimal", 23),
    ];
    holds(ROOT_LAYOUT, &root.encode(), &fields);
    let header = SegmentHeader {
        incarnation: 1,
        salt: 2,
        sequence: 4,
        previous: 3,
        first_batch: 5,
        first_won: 6,
        epoch: 7,
        durable_through: 8,
        drained_through: 9,
        previous_checksum: 10,
    };
    let bytes = header.encode(&root);
    let fields = [
        ("magic", u64::from_le_bytes(*SEGMENT_MAGIC)),
        ("version", 1),
        ("incarnation", 1),
        ("salt", 2),
        ("sequence", 4),
        ("previous sequence", 3),
        ("first batch", 5),
        ("first WON", 6),
        ("epoch", 7),
        ("durable through", 8),
        ("drained through", 9),
        ("previous checksum", 10),
    ];
    holds(SEGMENT_LAYOUT, &bytes, &fields);
    assert_eq!(SegmentHeader::decode(&bytes, &root), Some(header));
    let other = crate::cache::root::Root { secret: 6, ..root };
    assert_eq!(SegmentHeader::decode(&bytes, &other), None, "sealed with the log's secret");
}

#[test]
fn batches_and_summaries_are_written_as_the_layout_says() {
    let mut encoder = BatchEncoder::default();
    let plan = Plan::default().write(63, 9).mark(b"noon");
    encoder.begin(plan, 4096, (6, 7));
    let origin = RecordOrigin { door: 0, queue: 3, counter: 4 };
    encoder.entry(EntryHead {
        kind: Kind::Write,
        edge: true,
        continued: false,
        origin,
        start: 63,
        count: 9,
    });
    encoder.checksum(0xaa);
    encoder.checksum(0xbb);
    encoder.mark(b"noon", false);
    let link = BatchLink {
        salt: 1,
        incarnation: 2,
        sequence: 3,
        previous_checksum: 4,
        durable_through: 5,
        drained_through: 4,
    };
    let (bytes, checksum) = encoder.seal(link);
    let fields = [
        ("magic", u64::from(u32::from_le_bytes(*BATCH_MAGIC))),
        ("header bytes", 88 + 32 + 8 + 32 + 4),
        ("data start", 4096),
        ("batch bytes", 12288),
        ("entries", 2),
        ("flags", 0),
        ("previous checksum", 4),
        ("checksum", checksum.into()),
        ("salt", 1),
        ("incarnation", 2),
        ("sequence", 3),
        ("first WON", 6),
        ("epoch", 7),
        ("durable through", 5),
        ("drained through", 4),
    ];
    holds(BATCH_LAYOUT, bytes, &fields);
    let entry = &bytes[88..];
    let fields =
        [("kind", 1), ("flags", 1), ("queue", 3), ("counter", 4), ("start", 63), ("count", 9)];
    holds(ENTRY_LAYOUT, entry, &fields);
    let mark = &bytes[88 + 32 + 8..];
    holds(ENTRY_LAYOUT, mark, &[("kind", 4), ("flags", 0), ("name bytes", 4), ("count", 0)]);
    assert_eq!(&mark[32..], b"noon");
    let mut builder = SummaryBuilder::default();
    builder.add(4096, bytes);
    let foot = SummaryFoot { last_won: 6, last_batch: 3, ..SummaryFoot::new(1, 8, 2) };
    let summary = builder.finish(foot);
    holds(SUMMARY_ITEM_LAYOUT, &summary, &[("position", 4096), ("header bytes", 164)]);
    let fields = [
        ("magic", u64::from_le_bytes(*SUMMARY_MAGIC)),
        ("salt", 1),
        ("sequence", 8),
        ("incarnation", 2),
        ("last WON", 6),
        ("last batch", 3),
        ("summary bytes", 4096),
        ("batches", 1),
    ];
    holds(SUMMARY_FOOT_LAYOUT, &summary[summary.len() - 64..], &fields);
}

#[test]
fn segments_fill_the_allocation() {
    for (allocation, segment, count) in
        [(5 * MIB, MIB, 4), (300 * MIB, 4 * MIB, 74), (16 << 30, 8 * MIB, 2047)]
    {
        let shape = Shape::of(allocation).expect("a shape");
        assert_eq!((shape.segment_bytes, shape.segments()), (segment, count));
        let last = shape.segment_offset(count as u32 - 1);
        assert!(last + segment <= allocation);
        assert_eq!(shape.segment_of(last), Some(count as u32 - 1));
        assert_eq!(shape.segment_of(last + segment), None);
        assert_eq!(shape.segment_of(ROOTS_BYTES - 1), None);
    }
    assert!(Shape::of(5 * MIB - 1).is_err(), "fewer than four segments");
    assert!(Shape::with(5 * MIB, 3 << 16).is_err(), "no power of two");
}

#[test]
fn slot_tables_are_written_as_the_layout_says() {
    let (place, entries) = crate::cache::clean::table::tests::sample();
    let bytes = crate::cache::clean::table::encode(place, &entries, 77);
    assert_eq!(bytes.len() as u64, BLOCK_BYTES);
    let fields = [
        ("magic", u64::from_le_bytes(*TABLE_MAGIC)),
        ("epoch", 1),
        ("life", 2),
        ("segment", 3),
        ("page", 1),
        ("entries", 3),
    ];
    holds(TABLE_LAYOUT, &bytes, &fields);
    let entry = &bytes[TABLE_HEADER_BYTES..][..TABLE_ENTRY_BYTES];
    holds(TABLE_ENTRY_LAYOUT, entry, &[("block", 8 | 3 << 40), ("checksum", 8), ("reserved", 0)]);
}
