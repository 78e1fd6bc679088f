//! A descriptor chain as segments of guest memory (2.7).
//!
//! What holds for every chain that is returned: each segment lies in guest memory, no more than
//! [`SEGMENTS_PER_CHAIN_MAX`] of them; the readable ones come before the writable ones. The walk is
//! bounded by the ring size, or by the indirect table, whatever the guest links together.

use crate::base::codec::Reader;
use crate::io::buffer::Segment;

/// Bytes of one descriptor.
pub const DESCRIPTOR_BYTES: usize = 16;

/// Segments of one chain, header and status included: what one system call takes (`UIO_MAXIOV`).
pub const SEGMENTS_PER_CHAIN_MAX: usize = 1024;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Guest memory as the chain needs it.
pub trait Memory {
    /// The host memory behind guest-physical `address`: at most `length` bytes, at least one; less
    /// than `length` where a region ends and another goes on. `None` where nothing is mapped.
    fn translate(&self, address: u64, length: u64) -> Option<Segment>;
}

/// What is wrong with a chain. The guest made it, so this is a count and a status, not an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// A descriptor or buffer lies outside guest memory.
    OutsideMemory,
    /// A descriptor index at or past the table's end.
    IndexOutOfRange,
    /// More descriptors than the table holds: a loop.
    TooLong,
    /// More segments than one request may have.
    TooManySegments,
    /// An indirect descriptor inside an indirect table, combined with NEXT, or of a wrong length.
    BadIndirect,
    /// A device-readable descriptor after a device-writable one.
    ReadableAfterWritable,
}

#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        Some(Self {
            address: reader.u64()?,
            length: reader.u32()?,
            flags: reader.u16()?,
            next: reader.u16()?,
        })
    }
}

fn descriptor(table: &Segment, index: u16) -> Option<Descriptor> {
    let offset = usize::from(index).checked_mul(DESCRIPTOR_BYTES)?;
    let bytes: [u8; DESCRIPTOR_BYTES] = table.part(offset, DESCRIPTOR_BYTES).read()?;
    Descriptor::decode(&bytes)
}

/// The segments of a chain, reused from request to request.
#[derive(Default)]
pub struct Chain {
    /// Device-readable segments, then device-writable ones.
    segments: Vec<Segment>,
    readable: usize,
    /// An indirect table that spans memory regions, copied together.
    table: Vec<u8>,
}

impl Chain {
    pub fn new() -> Self {
        Self { segments: Vec::with_capacity(SEGMENTS_PER_CHAIN_MAX), ..Self::default() }
    }

    pub fn readable(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or_default()
    }

    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or_default()
    }

    /// Reads the chain that starts at `head` of `table`, the ring's descriptor table.
    pub fn read<M: Memory>(
        &mut self,
        memory: &M,
        table: &Segment,
        head: u16,
    ) -> Result<(), Malformed> {
        self.segments.clear();
        self.readable = 0;
        let mut left = table.length() / DESCRIPTOR_BYTES;
        let mut index = head;
        loop {
            left = left.checked_sub(1).ok_or(Malformed::TooLong)?;
            let entry = descriptor(table, index).ok_or(Malformed::IndexOutOfRange)?;
            if entry.flags & INDIRECT != 0 {
                // 2.7.5.3.1: INDIRECT excludes NEXT.
                if entry.flags & NEXT != 0 {
                    return Err(Malformed::BadIndirect);
                }
                return self.read_indirect(memory, entry);
            }
            self.push(memory, entry)?;
            if entry.flags & NEXT == 0 {
                return Ok(());
            }
            index = entry.next;
        }
    }

    fn read_indirect<M: Memory>(&mut self, memory: &M, entry: Descriptor) -> Result<(), Malformed> {
        let length = entry.length as usize;
        let entries = length / DESCRIPTOR_BYTES;
        if !length.is_multiple_of(DESCRIPTOR_BYTES)
            || entries == 0
            || entries > SEGMENTS_PER_CHAIN_MAX
        {
            return Err(Malformed::BadIndirect);
        }
        let whole = memory
            .translate(entry.address, u64::from(entry.length))
            .ok_or(Malformed::OutsideMemory)?;
        if whole.length() == length {
            return self.read_table(memory, |index| descriptor(&whole, index), entries);
        }
        let mut copy = std::mem::take(&mut self.table);
        copy.resize(length, 0);
        let result = copy_in(memory, entry.address, &mut copy).and_then(|()| {
            self.read_table(memory, |index| descriptor_of_copy(&copy, index), entries)
        });
        self.table = copy;
        result
    }

    fn read_table<M: Memory>(
        &mut self,
        memory: &M,
        descriptor: impl Fn(u16) -> Option<Descriptor>,
        entries: usize,
    ) -> Result<(), Malformed> {
        let mut index = 0;
        for _ in 0..entries {
            let entry = descriptor(index).ok_or(Malformed::IndexOutOfRange)?;
            if entry.flags & INDIRECT != 0 {
                return Err(Malformed::BadIndirect);
            }
            self.push(memory, entry)?;
            if entry.flags & NEXT == 0 {
                return Ok(());
            }
            index = entry.next;
        }
        Err(Malformed::TooLong)
    }

    fn push<M: Memory>(&mut self, memory: &M, entry: Descriptor) -> Result<(), Malformed> {
        let writable = entry.flags & WRITE != 0;
        if !writable && self.readable < self.segments.len() {
            return Err(Malformed::ReadableAfterWritable);
        }
        let mut address = entry.address;
        let mut left = u64::from(entry.length);
        while left > 0 {
            let segment = memory.translate(address, left).ok_or(Malformed::OutsideMemory)?;
            if self.segments.len() >= SEGMENTS_PER_CHAIN_MAX {
                return Err(Malformed::TooManySegments);
            }
            self.segments.push(segment);
            let length = segment.length() as u64;
            left = left.checked_sub(length).ok_or(Malformed::OutsideMemory)?;
            address = address.checked_add(length).ok_or(Malformed::OutsideMemory)?;
        }
        if !writable {
            self.readable = self.segments.len();
        }
        Ok(())
    }
}

fn descriptor_of_copy(table: &[u8], index: u16) -> Option<Descriptor> {
    let offset = usize::from(index).checked_mul(DESCRIPTOR_BYTES)?;
    Descriptor::decode(table.get(offset..)?)
}

fn copy_in<M: Memory>(memory: &M, mut address: u64, target: &mut [u8]) -> Result<(), Malformed> {
    let mut rest = target;
    while !rest.is_empty() {
        let segment =
            memory.translate(address, rest.len() as u64).ok_or(Malformed::OutsideMemory)?;
        let copied = segment.copy_to(rest);
        rest = rest.get_mut(copied..).ok_or(Malformed::OutsideMemory)?;
        address = address.checked_add(copied as u64).ok_or(Malformed::OutsideMemory)?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "chain_test.rs"]
pub(crate) mod tests;
