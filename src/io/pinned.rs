//! Memory that is pinned once, so that rings need not look its pages up for each operation.
//!
//! The kernel keeps such pages until the last who has them lets go, wherever they are mapped
//! meanwhile and whether at all. Pinning memory that was never touched takes seconds for each GiB
//! and has to be done by a thread that nobody waits for; that a ring [learns](super::uring::Ring)
//! of pinned memory takes microseconds.

use super::buffer::Segment;
use crate::base::{Error, ErrorKind, Result};
use io_uring::IoUring;
use std::os::fd::{AsRawFd, RawFd};

/// Bytes of one registered buffer at most: the kernel's limit.
const CHUNK_BYTES: usize = 1 << 30;

/// Registered buffers of one ring at most: the kernel's limit.
const SLOTS_MAX: u32 = 1 << 14;

/// Pinned memory, in chunks that each fill a slot of a ring's table.
pub struct PinnedMemory {
    /// Does nothing but have the memory, so that others can take it over.
    uring: IoUring,
    memory: Segment,
}

impl PinnedMemory {
    /// Pins `memory`, and looks before each GiB whether it is still `wanted`.
    ///
    /// # Errors
    /// [`ErrorKind::Gone`]: it is not. [`ErrorKind::Io`]: the kernel refuses, and what can be done.
    pub fn new(memory: Segment, wanted: impl Fn() -> bool) -> Result<Self> {
        let failed = |error: std::io::Error| {
            let remedy = match error.raw_os_error() {
                Some(libc::ENOMEM) => {
                    "not so much memory may be locked, or there is no such memory: raise the \
                     daemon's limit (LimitMEMLOCK=infinity), or give it CAP_IPC_LOCK"
                }
                _ => "memory of a memfd, of tmpfs or of huge pages can be pinned",
            };
            let bytes = memory.length();
            Error::io(format!("cannot pin {bytes} bytes of memory ({remedy})"), error)
        };
        let uring = IoUring::new(1).map_err(failed)?;
        let chunks = chunks(memory);
        uring.submitter().register_buffers_sparse(chunks.len() as u32).map_err(failed)?;
        for (slot, chunk) in (0u32..).zip(chunks) {
            if !wanted() {
                return Err(Error::new(ErrorKind::Gone, "the memory is not wanted any more"));
            }
            let vector =
                [libc::iovec { iov_base: chunk.address().cast(), iov_len: chunk.length() }];
            // SAFETY: the memory is mapped now (Segment::new); from then on the kernel keeps the
            // pages themselves, mapped or not.
            unsafe { uring.submitter().register_buffers_update(slot, &vector, None) }
                .map_err(failed)?;
        }
        Ok(Self { uring, memory })
    }

    pub(super) fn memory(&self) -> Segment {
        self.memory
    }

    pub(super) fn chunks(&self) -> u32 {
        chunks(self.memory).len() as u32
    }

    /// The ring that others take the memory over from.
    pub(super) fn ring(&self) -> RawFd {
        self.uring.as_raw_fd()
    }
}

fn chunks(memory: Segment) -> impl ExactSizeIterator<Item = Segment> {
    let count = memory.length().div_ceil(CHUNK_BYTES);
    (0..count).map(move |chunk| memory.part(chunk * CHUNK_BYTES, CHUNK_BYTES))
}

/// Which slots of a ring's table hold which memory.
#[derive(Default)]
pub(super) struct Slots {
    /// In order of address; they do not overlap.
    known: Vec<Known>,
    /// The one that was found last: operations cluster.
    last: usize,
}

#[derive(Clone, Copy)]
struct Known {
    /// Addresses.
    start: usize,
    end: usize,
    /// Slot of the first chunk.
    slot: u32,
    chunks: u32,
}

impl Slots {
    /// The first of `chunks` slots in a row that are free.
    pub(super) fn free(&self, chunks: u32) -> Option<u32> {
        let mut taken: Vec<_> =
            self.known.iter().map(|known| (known.slot, known.slot + known.chunks)).collect();
        taken.sort_unstable();
        let mut free = 0;
        for (start, end) in taken {
            if start - free >= chunks {
                break;
            }
            free = end;
        }
        (free + chunks <= SLOTS_MAX).then_some(free)
    }

    /// `memory` is in the slots from `slot` on.
    pub(super) fn add(&mut self, memory: Segment, slot: u32) {
        let start = memory.address().addr();
        let end = start + memory.length();
        let at = self.known.partition_point(|other| other.start < start);
        let apart = self.known.get(at).is_none_or(|next| end <= next.start);
        assert!(apart && (at == 0 || self.known[at - 1].end <= start), "memory is known once");
        let chunks = chunks(memory).len() as u32;
        self.known.insert(at, Known { start, end, slot, chunks });
    }

    /// The slots that `memory` was in, first and count, which are free from now on.
    pub(super) fn remove(&mut self, memory: Segment) -> Option<(u32, u32)> {
        let start = memory.address().addr();
        let at = self.known.iter().position(|known| known.start == start)?;
        let known = self.known.remove(at);
        Some((known.slot, known.chunks))
    }

    /// The slot that all of `segments` lie in, which are not empty.
    #[inline]
    pub(super) fn find(&mut self, segments: &[Segment]) -> Option<u16> {
        if self.known.is_empty() { None } else { self.find_known(segments) }
    }

    fn find_known(&mut self, segments: &[Segment]) -> Option<u16> {
        let first = segments.first()?.address().addr();
        let within = |known: &Known| known.start <= first && first < known.end;
        if !self.known.get(self.last).is_some_and(within) {
            let after = self.known.partition_point(|known| known.start <= first);
            self.last = after.checked_sub(1).filter(|at| within(&self.known[*at]))?;
        }
        let known = self.known[self.last];
        let chunk = (first - known.start) / CHUNK_BYTES;
        let start = known.start + chunk * CHUNK_BYTES;
        let end = known.end.min(start + CHUNK_BYTES);
        let inside = |segment: &Segment| {
            let address = segment.address().addr();
            start <= address && address + segment.length() <= end
        };
        let all_inside = segments.iter().all(inside);
        all_inside.then_some((known.slot + chunk as u32) as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ptr::{NonNull, without_provenance_mut};

    const GIB: usize = 1 << 30;

    /// Addresses only: nothing is mapped there.
    fn memory(start: usize, length: usize) -> Segment {
        let address = NonNull::new(without_provenance_mut(start)).unwrap();
        // SAFETY: the segment is compared and never used.
        unsafe { Segment::new(address, length) }
    }

    #[test]
    fn an_operation_is_found_in_the_one_chunk_that_has_all_of_it() {
        let mut slots = Slots::default();
        slots.add(memory(16 * GIB, 2 * GIB + 4096), 5);
        slots.add(memory(8 * GIB, 4096), 1);
        let find = |slots: &mut Slots, parts: &[(usize, usize)]| {
            let parts: Vec<_> = parts.iter().map(|(at, length)| memory(*at, *length)).collect();
            slots.find(&parts)
        };
        assert_eq!(find(&mut slots, &[(16 * GIB, 4096)]), Some(5));
        assert_eq!(find(&mut slots, &[(17 * GIB, 512), (18 * GIB - 512, 512)]), Some(6));
        assert_eq!(find(&mut slots, &[(18 * GIB, 4096)]), Some(7));
        assert_eq!(find(&mut slots, &[(8 * GIB, 4096)]), Some(1));
        for apart in [
            vec![(17 * GIB - 512, 1024)],
            vec![(17 * GIB, 512), (16 * GIB, 512)],
            vec![(18 * GIB, 4608)],
            vec![(8 * GIB, 512), (16 * GIB, 512)],
            vec![(8 * GIB - 512, 512)],
            vec![(12 * GIB, 512)],
            vec![(20 * GIB, 512)],
            vec![],
        ] {
            assert_eq!(find(&mut slots, &apart), None, "{apart:x?}");
        }
    }

    #[test]
    fn slots_are_given_again_and_never_twice() {
        let mut slots = Slots::default();
        let blocks = [memory(GIB, 3 * GIB), memory(8 * GIB, GIB), memory(16 * GIB, 2 * GIB)];
        for (block, expected) in blocks.iter().zip([0, 3, 4]) {
            let slot = slots.free(chunks(*block).len() as u32);
            assert_eq!(slot, Some(expected));
            slots.add(*block, expected);
        }
        assert_eq!(slots.free(1), Some(6));
        assert_eq!(slots.remove(blocks[1]), Some((3, 1)));
        assert_eq!((slots.free(1), slots.free(2)), (Some(3), Some(6)));
        assert_eq!(slots.remove(blocks[0]), Some((0, 3)));
        assert_eq!((slots.free(4), slots.free(5)), (Some(0), Some(6)));
        assert_eq!(slots.remove(blocks[0]), None, "it is not known any more");
        assert_eq!(slots.find(&[memory(GIB, 512)]), None);
        assert_eq!(slots.find(&[memory(16 * GIB, 512)]), Some(4));
        assert_eq!(slots.free(SLOTS_MAX - 6), Some(6));
        assert_eq!(slots.free(SLOTS_MAX - 5), None, "the kernel has no more");
    }
}
