//! Building a redo group, piece by piece, for a drain that submits it as it goes.
//!
//! The drain adds what it merged in ascending order; each piece of data is told where in the
//! sidecar it goes, one behind the other, so that large buffers can be filled and written before
//! the group is complete. Table and header come last. Nothing but the table is held here.

use super::redo::{
    BLOCK_BYTES, Content, ENTRY_BYTES, ENTRY_SECTORS_MAX, Entry, GroupHeader, GroupId, Layout,
    Span, StepId,
};
use crate::base::checksum::{content, crc32c};
use crate::base::codec::Writer;
use crate::base::units::SECTOR_BYTES;

/// A group that is being built.
pub struct GroupWriter {
    layout: Layout,
    id: GroupId,
    step: Option<StepId>,
    table: Writer,
    entries: u32,
    data_bytes: u64,
    /// Where the last entry ended, in sectors of the backing.
    end: u64,
}

/// What is left to be written when a group is complete. All of it, and the data, and a flush after
/// that, make it count (G1).
pub struct Finished {
    pub header: GroupHeader,
    /// Where the table goes, in bytes of the sidecar.
    pub table_offset: u64,
    /// Whole blocks; empty for a group without entries.
    pub table: Vec<u8>,
    /// Where the header goes. Not before the group before this one is in place and flushed (G2).
    pub header_offset: u64,
    /// One block.
    pub header_block: Vec<u8>,
}

impl GroupWriter {
    pub fn new(layout: Layout, id: GroupId) -> Self {
        let table = Writer::new();
        Self { layout, id, step: None, table, entries: 0, data_bytes: 0, end: 0 }
    }

    /// The group is a part of `step`: it counts when that is committed.
    pub fn set_step(&mut self, step: StepId) {
        self.step = Some(step);
    }

    pub fn id(&self) -> GroupId {
        self.id
    }

    /// Bytes of data so far.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Where the data of this group begins, in bytes of the sidecar; a whole block.
    pub fn data_offset(&self) -> u64 {
        self.layout.data_offset(Layout::slot_of(self.id.number))
    }

    /// Whether `entries` more with `data_bytes` more of data fit.
    pub fn fits(&self, entries: u64, data_bytes: u64) -> bool {
        let table_bytes = (u64::from(self.entries) + entries) * ENTRY_BYTES;
        table_bytes <= self.layout.table_bytes_max
            && self.data_bytes + data_bytes <= self.layout.data_bytes_max
    }

    /// Adds data for the sectors from `start`, whole ones, at most 1 MiB of them. Returns where the
    /// bytes go in the sidecar: right behind those of the data added before.
    ///
    /// # Panics
    /// If it does not fit ([`GroupWriter::fits`]), or does not lie behind what was added before.
    pub fn data(&mut self, start: u64, bytes: &[u8]) -> u64 {
        let length = bytes.len() as u64;
        assert!(length.is_multiple_of(SECTOR_BYTES), "data is whole sectors");
        let count = length / SECTOR_BYTES;
        assert!(count <= ENTRY_SECTORS_MAX, "an entry of {count} sectors");
        let position = self.data_bytes;
        let checksum = content(self.id.salt().into(), bytes);
        self.add(Entry { start, count, content: Content::Data { position, checksum } }, length);
        self.data_bytes += length;
        self.data_offset() + position
    }

    /// Adds sectors that read as zeros afterwards and keep their space. Panics as `data` does.
    pub fn zero(&mut self, start: u64, count: u64) {
        self.add(Entry { start, count, content: Content::Zero }, 0);
    }

    /// Adds sectors that read as zeros afterwards and may lose their space. Panics as `data` does.
    pub fn discard(&mut self, start: u64, count: u64) {
        self.add(Entry { start, count, content: Content::Discard }, 0);
    }

    fn add(&mut self, entry: Entry, data_bytes: u64) {
        assert!(self.fits(1, data_bytes), "the group has room for the entry");
        assert!(entry.count > 0 && entry.start >= self.end, "entries ascend and do not overlap");
        entry.encode(&mut self.table);
        self.entries += 1;
        self.end = entry.start + entry.count;
    }

    pub fn finish(self, span: Span) -> Finished {
        let slot = Layout::slot_of(self.id.number);
        let mut table = self.table.into_bytes();
        let header = GroupHeader {
            id: self.id,
            span,
            step: self.step,
            entries: self.entries,
            data_bytes: self.data_bytes,
            table_checksum: crc32c(self.id.salt(), &table),
        };
        table.resize(table.len().next_multiple_of(BLOCK_BYTES as usize), 0);
        Finished {
            header,
            table_offset: self.layout.table_offset(slot),
            table,
            header_offset: self.layout.header_offset(slot),
            header_block: header.encode(),
        }
    }
}
