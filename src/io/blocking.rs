//! One operation after the other on a [`Disk`], for metadata: every call returns when its
//! operations have completed.

use super::buffer::{PinnedBuffer, Segment};
use super::disk::{Completion, Disk, DiskGeometry, Errno, Operation, OperationKind};

/// Bytes moved by one operation, and the size of the staging buffers.
const CHUNK_BYTES: usize = 1 << 20;

/// A disk used synchronously. Offsets and lengths are in bytes and multiples of the block size.
pub struct Blocking {
    disk: Box<dyn Disk + Send>,
    completions: Vec<Completion>,
    /// The disk refused `Zero` once: zeros are written from then on.
    zero_refused: bool,
}

impl Blocking {
    pub fn new(disk: Box<dyn Disk + Send>) -> Self {
        Self { disk, completions: Vec::new(), zero_refused: false }
    }

    pub fn geometry(&self) -> DiskGeometry {
        self.disk.geometry()
    }

    /// `length` bytes at `offset`.
    pub fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; length];
        for (index, chunk) in bytes.chunks_mut(CHUNK_BYTES).enumerate() {
            let (_buffer, segment) = staging(chunk.len());
            let at = offset + (index * CHUNK_BYTES) as u64;
            self.run(&[transfer(OperationKind::Read, at, &[segment])])?;
            segment.copy_to(chunk);
        }
        Ok(bytes)
    }

    /// Writes `bytes` at every one of `offsets`, with no order between the copies. All are tried,
    /// also if one fails.
    pub fn write_copies(&mut self, offsets: &[u64], bytes: &[u8]) -> Result<(), Errno> {
        let mut result = Ok(());
        for (index, chunk) in bytes.chunks(CHUNK_BYTES).enumerate() {
            let (_buffer, segment) = staging(chunk.len());
            segment.copy_from(chunk);
            let segments = [segment];
            let at = (index * CHUNK_BYTES) as u64;
            let writes: Vec<Operation<'_>> = offsets
                .iter()
                .map(|offset| transfer(OperationKind::Write, offset + at, &segments))
                .collect();
            result = result.and(self.run(&writes));
        }
        result
    }

    /// Writes all parts, each with its offset; they do not overlap and have no order.
    pub fn write_many(&mut self, parts: &[(u64, Vec<u8>)]) -> Result<(), Errno> {
        let chunks = parts.iter().flat_map(|(offset, bytes)| {
            let chunks = bytes.chunks(CHUNK_BYTES).enumerate();
            chunks.map(move |(index, chunk)| (offset + (index * CHUNK_BYTES) as u64, chunk))
        });
        let staged: Vec<(u64, PinnedBuffer, [Segment; 1])> = chunks
            .map(|(at, chunk)| {
                let (buffer, segment) = staging(chunk.len());
                segment.copy_from(chunk);
                (at, buffer, [segment])
            })
            .collect();
        let writes: Vec<Operation<'_>> = staged
            .iter()
            .map(|(at, _, segments)| transfer(OperationKind::Write, *at, segments))
            .collect();
        self.run(&writes)
    }

    /// Makes every write that was completed before durable.
    pub fn flush(&mut self) -> Result<(), Errno> {
        self.run(&[Operation { kind: OperationKind::Flush, offset: 0, length: 0, segments: &[] }])
    }

    /// The range reads as zeros afterwards: by the drive if it can, else by writing them.
    pub fn zero(&mut self, offset: u64, length: u64) -> Result<(), Errno> {
        if self.geometry().zero && !self.zero_refused {
            let zero = Operation { kind: OperationKind::Zero, offset, length, segments: &[] };
            match self.run(&[zero]) {
                Err(errno) if errno.is_unsupported() => self.zero_refused = true,
                result => return result,
            }
        }
        let buffer = PinnedBuffer::new(CHUNK_BYTES);
        let mut done = 0;
        while done < length {
            let part = buffer.segment().part(0, (length - done).min(CHUNK_BYTES as u64) as usize);
            self.run(&[transfer(OperationKind::Write, offset + done, &[part])])?;
            done += part.length() as u64;
        }
        Ok(())
    }

    /// As [`Self::zero`], and the range may lose its space.
    pub fn discard(&mut self, offset: u64, length: u64) -> Result<(), Errno> {
        let discard = Operation { kind: OperationKind::Discard, offset, length, segments: &[] };
        match self.geometry().discard.then(|| self.run(&[discard])) {
            Some(Err(errno)) if errno.is_unsupported() => self.zero(offset, length),
            Some(result) => result,
            None => self.zero(offset, length),
        }
    }

    /// Submits all, waits for all; the first failure in order of completion.
    fn run(&mut self, operations: &[Operation<'_>]) -> Result<(), Errno> {
        for (token, operation) in operations.iter().enumerate() {
            self.disk.submit(*operation, token as u64);
        }
        self.completions.clear();
        while self.completions.len() < operations.len() {
            self.disk.poll(&mut self.completions, true);
        }
        self.completions.iter().try_for_each(|completion| completion.result)
    }
}

fn transfer(kind: OperationKind, offset: u64, segments: &[Segment]) -> Operation<'_> {
    let length = segments.iter().map(Segment::length).sum::<usize>() as u64;
    Operation { kind, offset, length, segments }
}

/// A buffer of a few sizes only, since they are pooled by size, and the part of it that is used.
fn staging(length: usize) -> (PinnedBuffer, Segment) {
    let buffer = PinnedBuffer::new(length.next_power_of_two());
    let segment = buffer.segment().part(0, length);
    (buffer, segment)
}
