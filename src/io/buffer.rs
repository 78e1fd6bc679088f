//! Memory that devices read and write: segments of guest memory and aligned buffers of our own.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::BTreeMap;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, compiler_fence};
use std::sync::{Mutex, PoisonError};

/// A run of memory that an operation transfers to or from.
///
/// It may be guest memory, which the guest changes whenever it likes; so there is no way to a
/// `&[u8]` from here, only copies.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Segment {
    address: NonNull<u8>,
    length: usize,
}

// SAFETY: a segment is an address; whoever made it promised that it stays mapped (Segment::new).
unsafe impl Send for Segment {}

impl Segment {
    /// # Safety
    /// `length` bytes at `address` stay mapped, readable and writable until the last operation
    /// that was given this segment has completed. Nothing else is promised: others may write them
    /// at any time.
    pub unsafe fn new(address: NonNull<u8>, length: usize) -> Self {
        Self { address, length }
    }

    pub fn address(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// Bytes.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The part that starts `offset` bytes in and is `length` bytes long; both are clamped to the
    /// segment.
    #[must_use]
    pub fn part(&self, offset: usize, length: usize) -> Self {
        let offset = offset.min(self.length);
        let length = length.min(self.length - offset);
        // SAFETY: offset is at most the length of the mapped run, so the sum stays within it or
        // one past its end.
        let address = unsafe { self.address.add(offset) };
        Self { address, length }
    }

    /// Copies out of the segment into `target`; returns the bytes copied, the shorter of the two.
    pub fn copy_to(&self, target: &mut [u8]) -> usize {
        let length = self.length.min(target.len());
        // SAFETY: `length` bytes are mapped on both sides (Segment::new); `target` is exclusively
        // ours, so they do not overlap. A guest may write meanwhile: the bytes are then any mix,
        // which is the guest's own business, and no reference to them exists.
        unsafe {
            std::ptr::copy_nonoverlapping(self.address.as_ptr(), target.as_mut_ptr(), length)
        };
        length
    }

    /// Copies `source` into the segment; returns the bytes copied, the shorter of the two.
    pub fn copy_from(&self, source: &[u8]) -> usize {
        let length = self.length.min(source.len());
        // SAFETY: as in copy_to, with the sides swapped.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), self.address.as_ptr(), length) };
        length
    }

    /// The first `N` bytes; `None` if there are fewer. Where `N` is known and small this is a few
    /// instructions, which [`Self::copy_to`] is not.
    #[inline]
    pub fn read<const N: usize>(&self) -> Option<[u8; N]> {
        // SAFETY: as in copy_to; the bytes of an array need no alignment.
        let bytes = (N <= self.length).then(|| unsafe { self.address.cast::<[u8; N]>().read() });
        // What is checked is what is used: the compiler must not read the guest's memory again.
        compiler_fence(Ordering::SeqCst);
        bytes
    }

    /// Puts `N` bytes at the beginning; false, and nothing is written, if they do not fit.
    #[inline]
    pub fn write<const N: usize>(&self, source: [u8; N]) -> bool {
        let fits = N <= self.length;
        if fits {
            // SAFETY: as in copy_from.
            unsafe { self.address.cast::<[u8; N]>().write(source) };
        }
        fits
    }

    /// Zeroes the segment.
    pub fn zero(&self) {
        // SAFETY: the whole run is mapped and writable (Segment::new).
        unsafe { std::ptr::write_bytes(self.address.as_ptr(), 0, self.length) };
    }
}

/// Total bytes of `segments`.
pub fn total_bytes(segments: &[Segment]) -> usize {
    segments.iter().map(Segment::length).sum()
}

/// Copies `segments` in order into `target`; returns the bytes copied.
pub fn gather(segments: &[Segment], target: &mut [u8]) -> usize {
    let mut done = 0;
    for segment in segments {
        done += segment.copy_to(&mut target[done..]);
    }
    done
}

/// Copies `source` into `segments` in order; returns the bytes copied.
pub fn scatter(source: &[u8], segments: &[Segment]) -> usize {
    let mut done = 0;
    for segment in segments {
        done += segment.copy_from(&source[done..]);
    }
    done
}

/// Zeroed memory with an alignment that any drive's DMA accepts.
pub struct AlignedBuffer {
    address: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer owns its memory alone.
unsafe impl Send for AlignedBuffer {}
// SAFETY: shared access gives only `&[u8]`.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// Alignment in bytes: a page, which covers every logical block size in use.
    pub const ALIGNMENT: usize = 4096;

    /// `length` is in bytes and must not be zero.
    pub fn new(length: usize) -> Self {
        assert!(length > 0, "an aligned buffer holds at least one byte");
        let layout = Layout::from_size_align(length, Self::ALIGNMENT)
            .expect("buffer lengths are far below isize::MAX");
        // SAFETY: the layout's size is not zero.
        let address = unsafe { alloc_zeroed(layout) };
        let Some(address) = NonNull::new(address) else { handle_alloc_error(layout) };
        Self { address, layout }
    }

    /// The buffer as a segment for operations.
    ///
    /// # Safety
    /// The buffer must outlive the last operation that was given the segment, and must not be
    /// accessed through references while one is under way.
    pub unsafe fn segment(&self) -> Segment {
        // SAFETY: the memory is mapped for as long as the buffer lives, which the caller promises
        // to be long enough.
        unsafe { Segment::new(self.address, self.layout.size()) }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the memory is ours, initialised (zeroed) and as long as the layout says.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.layout.size()) }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in deref, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), self.layout.size()) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this very layout.
        unsafe { dealloc(self.address.as_ptr(), self.layout) };
    }
}

/// Memory for operations that safe code may hand to a disk: once taken from the system it is never
/// given back, only pooled, so a segment of it stays mapped whatever its holder forgets. Like
/// guest memory it is reached by copies alone.
///
/// For metadata and for the slow path (bounces): taking one may allocate.
pub struct PinnedBuffer {
    memory: Segment,
}

static PINNED: Mutex<BTreeMap<usize, Vec<Segment>>> = Mutex::new(BTreeMap::new());

impl PinnedBuffer {
    /// Zeroed memory of `length` bytes (not zero), aligned as [`AlignedBuffer`].
    pub fn new(length: usize) -> Self {
        let mut pool = PINNED.lock().unwrap_or_else(PoisonError::into_inner);
        let memory = match pool.get_mut(&length).and_then(Vec::pop) {
            Some(memory) => memory,
            None => {
                let buffer = ManuallyDrop::new(AlignedBuffer::new(length));
                // SAFETY: the buffer is never dropped, and nobody holds a reference into it.
                unsafe { buffer.segment() }
            }
        };
        memory.zero();
        Self { memory }
    }

    /// The whole buffer. An operation that is given it should end before the buffer is dropped:
    /// the next holder would see its bytes.
    pub fn segment(&self) -> Segment {
        self.memory
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        let mut pool = PINNED.lock().unwrap_or_else(PoisonError::into_inner);
        pool.entry(self.memory.length()).or_default().push(self.memory);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gather_and_scatter_walk_the_segments_in_order() {
        let mut buffer = AlignedBuffer::new(4096);
        buffer[..6].copy_from_slice(b"abcdef");
        // SAFETY: the buffer outlives the segment, and is not borrowed while it is used.
        let whole = unsafe { buffer.segment() };
        let parts = [whole.part(4, 2), whole.part(0, 3), whole.part(4095, 10), whole.part(9999, 1)];
        assert_eq!(total_bytes(&parts), 6);
        let mut out = [b'-'; 8];
        assert_eq!(gather(&parts, &mut out), 6);
        assert_eq!(&out, b"efabc\0--");
        assert_eq!(scatter(b"12345", &parts), 5);
        assert_eq!(&buffer[..6], b"345d12");
    }

    #[test]
    fn what_does_not_fit_is_neither_read_nor_written() {
        let mut buffer = AlignedBuffer::new(4096);
        buffer[..6].copy_from_slice(b"abcdef");
        // SAFETY: the buffer outlives the segment, and is not borrowed while it is used.
        let part = unsafe { buffer.segment() }.part(1, 4);
        assert_eq!((part.read(), part.read::<5>()), (Some(*b"bcde"), None));
        assert_eq!((part.write(*b"1234"), part.write(*b"56789")), (true, false));
        assert_eq!(&buffer[..6], b"a1234f");
    }

    #[test]
    fn a_pinned_buffer_is_zeroed_whenever_it_is_taken() {
        let length = 12_288;
        let first = PinnedBuffer::new(length);
        let address = first.segment().address();
        first.segment().copy_from(b"tenant A");
        drop(first);
        let second = PinnedBuffer::new(length);
        assert_eq!(second.segment().address(), address, "memory is pooled");
        let mut seen = [1; 8];
        second.segment().copy_to(&mut seen);
        assert_eq!(seen, [0; 8]);
    }
}
