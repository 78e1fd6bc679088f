//! An allocation while nobody serves it: reads in parallel, writes that are durable when they
//! return. For opening, formatting and looking.

use super::cursor::Cursor;
use super::layout::{BLOCK_BYTES, ROOT_OFFSETS, root_offsets};
use super::place::Place;
use super::root::Root;
use crate::io::buffer::PinnedBuffer;
use crate::io::disk::{Completion, Disk, DiskGeometry, Errno, Operation, OperationKind};

/// Reads under way at most.
const DEPTH: usize = 8;

/// See the module.
pub struct Medium {
    disk: Box<dyn Disk + Send>,
    place: Place,
    completions: Vec<Completion>,
}

impl Medium {
    pub fn new(disk: Box<dyn Disk + Send>, place: Place) -> Self {
        Self { disk, place, completions: Vec::new() }
    }

    pub fn geometry(&self) -> DiskGeometry {
        self.disk.geometry()
    }

    pub fn place(&self) -> &Place {
        &self.place
    }

    /// `length` bytes at `offset` of the allocation.
    pub fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
        self.read_many(&[(offset, length)]).pop().expect("one answer to one question")
    }

    /// Ranges of the allocation, by offset and length, in parallel.
    pub fn read_many(&mut self, ranges: &[(u64, usize)]) -> Vec<Result<Vec<u8>, Errno>> {
        let mut results: Vec<Result<Vec<u8>, Errno>> = Vec::with_capacity(ranges.len());
        for group in ranges.chunks(DEPTH) {
            let buffers: Vec<PinnedBuffer> = group
                .iter()
                .map(|(_, length)| PinnedBuffer::new(length.next_power_of_two()))
                .collect();
            let mut failed: Vec<Option<Errno>> = vec![None; group.len()];
            let mut under_way = 0;
            for (number, ((offset, length), buffer)) in group.iter().zip(&buffers).enumerate() {
                let whole = buffer.segment();
                for part in self.place.parts(*offset, *length as u64) {
                    let segments = [whole.part(part.skip as usize, part.length as usize)];
                    let read = Operation {
                        kind: OperationKind::Read,
                        offset: part.offset,
                        length: part.length,
                        segments: &segments,
                    };
                    self.disk.submit(read, number as u64);
                    under_way += 1;
                }
            }
            self.wait(under_way, |token, errno| failed[token as usize] = Some(errno));
            for (((_, length), buffer), failed) in group.iter().zip(&buffers).zip(failed) {
                let mut bytes = vec![0; *length];
                Cursor::new(&[buffer.segment()], 0).copy_to(&mut bytes);
                results.push(failed.map_or(Ok(bytes), Err));
            }
        }
        results
    }

    /// Writes both copies of the root, durably.
    pub fn write_root(&mut self, root: &Root) -> Result<(), Errno> {
        self.write_block(&root.encode(), &root_offsets(root.sequence))
    }

    /// Writes zeros over the four copies of the roots, durably.
    pub fn wipe_roots(&mut self) -> Result<(), Errno> {
        self.write_block(&[0; BLOCK_BYTES as usize], ROOT_OFFSETS.as_flattened())
    }

    /// Writes zeros over a block that begins at `offset`, durably.
    pub fn wipe(&mut self, offset: u64) -> Result<(), Errno> {
        self.write_block(&[0; BLOCK_BYTES as usize], &[offset])
    }

    /// Writes one block to several places, durably.
    fn write_block(&mut self, block: &[u8], offsets: &[u64]) -> Result<(), Errno> {
        let buffer = PinnedBuffer::new(BLOCK_BYTES as usize);
        buffer.segment().copy_from(block);
        let segments = [buffer.segment()];
        for offset in offsets {
            let part = self.place.parts(*offset, BLOCK_BYTES).next().expect("one extent has it");
            let kind = OperationKind::WriteDurable;
            let (offset, length) = (part.offset, BLOCK_BYTES);
            self.disk.submit(Operation { kind, offset, length, segments: &segments }, 0);
        }
        let mut result = Ok(());
        self.wait(offsets.len(), |_, errno| result = Err(errno));
        result
    }

    /// Makes everything durable that was written before.
    pub fn flush(&mut self) -> Result<(), Errno> {
        let kind = OperationKind::Flush;
        self.disk.submit(Operation { kind, offset: 0, length: 0, segments: &[] }, 0);
        let mut result = Ok(());
        self.wait(1, |_, errno| result = Err(errno));
        result
    }

    fn wait(&mut self, mut under_way: usize, mut failed: impl FnMut(u64, Errno)) {
        while under_way > 0 {
            self.completions.clear();
            self.disk.poll(&mut self.completions, true);
            for completion in &self.completions {
                under_way -= 1;
                if let Err(errno) = completion.result {
                    failed(completion.token, errno);
                }
            }
        }
    }
}
