//! Descriptor chains, good and malformed.
#![allow(clippy::indexing_slicing, clippy::unwrap_used, clippy::arithmetic_side_effects)]

use super::*;
use crate::io::buffer::AlignedBuffer;

/// Two regions of guest memory that are adjacent in guest addresses but not in host memory.
pub(crate) struct TestMemory {
    pub(crate) low: AlignedBuffer,
    pub(crate) high: AlignedBuffer,
}

pub(crate) const BASE: u64 = 0x1000_0000;
pub(crate) const REGION_BYTES: u64 = 64 << 10;

impl TestMemory {
    pub(crate) fn new() -> Self {
        Self {
            low: AlignedBuffer::new(REGION_BYTES as usize),
            high: AlignedBuffer::new(REGION_BYTES as usize),
        }
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let left = (bytes.len() - done) as u64;
            let segment = self.translate(address + done as u64, left).unwrap();
            done += segment.copy_from(&bytes[done..]);
        }
    }

    pub(crate) fn descriptor(&self, table: u64, index: u16, entry: (u64, u32, u16, u16)) {
        let mut bytes = Vec::new();
        bytes.extend(entry.0.to_le_bytes());
        bytes.extend(entry.1.to_le_bytes());
        bytes.extend(entry.2.to_le_bytes());
        bytes.extend(entry.3.to_le_bytes());
        self.write(table + u64::from(index) * 16, &bytes);
    }

    pub(crate) fn table(&self, entries: u64) -> Segment {
        self.translate(BASE, entries * 16).unwrap()
    }
}

impl Memory for TestMemory {
    fn translate(&self, address: u64, length: u64) -> Option<Segment> {
        let offset = address.checked_sub(BASE)?;
        let (buffer, offset) = match offset.checked_sub(REGION_BYTES) {
            None => (&self.low, offset),
            Some(offset) => (&self.high, offset),
        };
        if offset >= REGION_BYTES || length == 0 {
            return None;
        }
        // SAFETY: the buffers outlive every chain of these tests, and no reference into them is
        // held while a segment is used.
        let whole = unsafe { buffer.segment() };
        Some(whole.part(offset as usize, length as usize))
    }
}

fn read(memory: &TestMemory, entries: u64, head: u16) -> Result<(Vec<usize>, usize), Malformed> {
    let mut chain = Chain::new();
    chain.read(memory, &memory.table(entries), head)?;
    let lengths = chain.readable().iter().chain(chain.writable()).map(Segment::length).collect();
    Ok((lengths, chain.readable().len()))
}

#[test]
fn a_direct_chain_gives_its_segments_in_order() {
    let memory = TestMemory::new();
    memory.descriptor(BASE, 3, (BASE + 4096, 16, NEXT, 0));
    memory.descriptor(BASE, 0, (BASE + 8192, 512, NEXT | WRITE, 2));
    memory.descriptor(BASE, 2, (BASE + 9000, 1, WRITE, 0));
    assert_eq!(read(&memory, 4, 3), Ok((vec![16, 512, 1], 1)));
}

#[test]
fn a_buffer_over_two_regions_becomes_two_segments() {
    let memory = TestMemory::new();
    memory.descriptor(BASE, 0, (BASE + REGION_BYTES - 100, 300, WRITE, 0));
    assert_eq!(read(&memory, 4, 0), Ok((vec![100, 200], 0)));
}

#[test]
fn an_indirect_table_over_two_regions_is_read_whole() {
    let memory = TestMemory::new();
    let table = BASE + REGION_BYTES - 24;
    memory.descriptor(BASE, 1, (table, 48, INDIRECT, 0));
    memory.descriptor(table, 0, (BASE + 4096, 16, NEXT, 1));
    memory.descriptor(table, 1, (BASE + 4096, 32, NEXT | WRITE, 2));
    memory.descriptor(table, 2, (BASE + 4096, 1, WRITE, 0));
    assert_eq!(read(&memory, 4, 1), Ok((vec![16, 32, 1], 1)));
}

#[test]
fn every_malformed_chain_is_named() {
    let memory = TestMemory::new();
    let end = BASE + 2 * REGION_BYTES;
    let table = BASE + 4096;
    let check = |entry, expected| {
        memory.descriptor(BASE, 0, entry);
        assert_eq!(read(&memory, 4, 0), Err(expected), "{entry:?}");
    };
    check((table, 16, NEXT, 0), Malformed::TooLong);
    check((table, 16, NEXT, 4), Malformed::IndexOutOfRange);
    check((end - 8, 16, 0, 0), Malformed::OutsideMemory);
    check((u64::MAX - 4, 16, 0, 0), Malformed::OutsideMemory);
    check((table, 24, INDIRECT, 0), Malformed::BadIndirect);
    check((table, 0, INDIRECT, 0), Malformed::BadIndirect);
    check((table, 1025 * 16, INDIRECT, 0), Malformed::BadIndirect);
    check((table, 16, INDIRECT | NEXT, 0), Malformed::BadIndirect);
    check((0, 16, INDIRECT, 0), Malformed::OutsideMemory);
    assert_eq!(read(&memory, 4, 4), Err(Malformed::IndexOutOfRange));

    memory.descriptor(BASE, 0, (table, 32, INDIRECT, 0));
    memory.descriptor(table, 0, (table, 16, INDIRECT, 0));
    assert_eq!(read(&memory, 4, 0), Err(Malformed::BadIndirect));
    memory.descriptor(table, 0, (table, 1, NEXT | WRITE, 1));
    memory.descriptor(table, 1, (table, 1, NEXT, 0));
    assert_eq!(read(&memory, 4, 0), Err(Malformed::ReadableAfterWritable));
    memory.descriptor(table, 1, (table, 1, NEXT | WRITE, 1));
    assert_eq!(read(&memory, 4, 0), Err(Malformed::TooLong));
    memory.descriptor(table, 0, (table, 1, NEXT | WRITE, 2));
    assert_eq!(read(&memory, 4, 0), Err(Malformed::IndexOutOfRange), "past the indirect table");
}

#[test]
fn empty_buffers_are_skipped() {
    let memory = TestMemory::new();
    memory.descriptor(BASE, 0, (0, 0, NEXT, 1));
    memory.descriptor(BASE, 1, (BASE + 4096, 7, WRITE, 0));
    assert_eq!(read(&memory, 4, 0), Ok((vec![7], 0)));
}
