//! One io_uring: everything that a reactor waits for goes through it.
//!
//! The ring belongs to the thread that made it (`SINGLE_ISSUER`, `DEFER_TASKRUN`): completions are
//! only produced inside [`Ring::submit`] and [`Ring::wait`], so nothing interrupts the reactor's
//! own work. Operations are queued without a system call, and handed over, many at once, by the
//! next of these.

use super::buffer::Segment;
use super::disk::{Errno, Operation, OperationKind};
use super::pinned::{PinnedMemory, Slots};
use crate::base::units::SECTOR_BYTES;
use crate::base::{Error, ErrorKind, Result};
use io_uring::types::{CloneBuffersFlags, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

/// Submission entries. More than one turn of a reactor queues; a fuller turn submits twice.
const ENTRIES: u32 = 1024;

/// Files (drives and backings) registered at a time.
const FILES_MAX: u32 = 1024;

/// Segments of operations that are queued and not yet handed over.
const SEGMENTS_QUEUED_MAX: usize = 4096;

/// Bits of a token that belong to the caller; the rest carries the length, so that a short transfer
/// is seen.
pub const TOKEN_BITS: u32 = 43;
const LENGTH_BITS: u32 = 64 - TOKEN_BITS;
const TOKEN_MASK: u64 = (1 << TOKEN_BITS) - 1;

/// Bytes of one transfer at most.
const OPERATION_BYTES_MAX: u64 = ((1 << LENGTH_BITS) - 1) * SECTOR_BYTES;

/// A registered file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileIndex(u32);

/// What has ended: the caller's token and the result.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    pub token: u64,
    /// Flags of the poll, or 0; short transfers are `EIO`.
    pub result: std::result::Result<u32, Errno>,
    /// A multishot poll goes on.
    pub more: bool,
}

/// The ring and what is queued for it.
pub struct Ring {
    uring: IoUring,
    /// Segments of queued operations: the kernel copies them when they are handed over.
    segments: Vec<Segment>,
    files_free: Vec<u32>,
    /// Memory that the kernel need not look up.
    slots: Slots,
    /// The kernel takes vectors of such memory (Linux 6.15).
    vectored: bool,
    queued: usize,
}

impl Ring {
    /// Makes the ring for the calling thread, the only one that may use it.
    pub fn new() -> Result<Self> {
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(ENTRIES * 4)
            .setup_clamp()
            .build(ENTRIES)
            .map_err(|error| {
                let text = "cannot set up io_uring (Linux 6.1 or later is needed, and \
                            kernel.io_uring_disabled must be 0)";
                Error::io(text, error)
            })?;
        uring
            .submitter()
            .register_files_sparse(FILES_MAX)
            .map_err(|error| Error::io("cannot register files with io_uring", error))?;
        let mut probe = Probe::new();
        uring
            .submitter()
            .register_probe(&mut probe)
            .map_err(|error| Error::io("cannot ask io_uring what it can do", error))?;
        Ok(Self {
            uring,
            segments: Vec::with_capacity(SEGMENTS_QUEUED_MAX),
            files_free: (0..FILES_MAX).rev().collect(),
            slots: Slots::default(),
            vectored: probe.is_supported(opcode::ReadvFixed::CODE)
                && probe.is_supported(opcode::WritevFixed::CODE),
            queued: 0,
        })
    }

    /// Registers `file`, which the ring keeps open until [`Ring::unregister`].
    pub fn register(&mut self, file: BorrowedFd<'_>) -> Result<FileIndex> {
        let index = self
            .files_free
            .pop()
            .ok_or_else(|| Error::new(ErrorKind::Full, "no more files can be registered"))?;
        let registered = self.uring.submitter().register_files_update(index, &[file.as_raw_fd()]);
        match registered {
            Ok(_) => Ok(FileIndex(index)),
            Err(error) => {
                self.files_free.push(index);
                Err(Error::io("cannot register a file with io_uring", error))
            }
        }
    }

    /// Gives a registered file back. No operation on it may be under way.
    pub fn unregister(&mut self, file: FileIndex) {
        const NONE: RawFd = -1;
        self.uring
            .submitter()
            .register_files_update(file.0, &[NONE])
            .expect("a registered slot can be emptied");
        self.files_free.push(file.0);
    }

    /// From now on operations of which all memory lies in one chunk of `memory` use it pinned.
    ///
    /// # Errors
    /// [`ErrorKind::Full`]: the ring knows as much as it can. [`ErrorKind::Io`]: the kernel is too
    /// old.
    pub fn learn(&mut self, memory: &PinnedMemory) -> Result<()> {
        let slot = self.slots.free(memory.chunks()).ok_or_else(|| {
            Error::new(ErrorKind::Full, "a reactor knows no more than 16384 GiB of pinned memory")
        })?;
        let replace = CloneBuffersFlags::DST_REPLACE;
        self.uring
            .submitter()
            .register_buffers_clone_offset(memory.ring(), 0, slot, memory.chunks(), replace)
            .map_err(|error| {
                Error::io("cannot use pinned memory with io_uring (Linux 6.13 is needed)", error)
            })?;
        self.slots.add(memory.memory(), slot);
        Ok(())
    }

    /// Forgets what was learnt. No operation on it may be queued; one that is under way keeps its
    /// pages.
    pub fn forget(&mut self, memory: &PinnedMemory) {
        let Some((slot, count)) = self.slots.remove(memory.memory()) else { return };
        let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let nothing = vec![nothing; count as usize];
        // SAFETY: no memory is registered.
        unsafe { self.uring.submitter().register_buffers_update(slot, &nothing, None) }
            .expect("slots that were filled can be emptied");
    }

    /// Queues an operation. `token` is below 2^[`TOKEN_BITS`].
    pub fn operate(&mut self, file: FileIndex, operation: &Operation<'_>, token: u64) {
        assert!(token <= TOKEN_MASK, "a token keeps to its bits");
        assert!(operation.length <= OPERATION_BYTES_MAX || operation.segments.is_empty());
        let file = Fixed(file.0);
        let user_data = token | (operation.length / SECTOR_BYTES) << TOKEN_BITS;
        let entry = match operation.kind {
            OperationKind::Read | OperationKind::Write | OperationKind::WriteDurable => {
                self.transfer(file, operation).user_data(user_data)
            }
            OperationKind::Flush => opcode::Fsync::new(file)
                .flags(io_uring::types::FsyncFlags::DATASYNC)
                .build()
                .user_data(token),
            OperationKind::Zero => fallocate(file, operation, libc::FALLOC_FL_ZERO_RANGE, token),
            OperationKind::Discard => fallocate(file, operation, libc::FALLOC_FL_PUNCH_HOLE, token),
        };
        self.push(entry);
    }

    fn transfer(&mut self, file: Fixed, operation: &Operation<'_>) -> squeue::Entry {
        let read = operation.kind == OperationKind::Read;
        let flags = match operation.kind {
            OperationKind::WriteDurable => libc::RWF_DSYNC,
            _ => 0,
        };
        let offset = operation.offset;
        let slot = self.slots.find(operation.segments);
        if let [segment] = operation.segments {
            let (address, length) = (segment.address(), segment.length() as u32);
            return match (read, slot) {
                (true, None) => opcode::Read::new(file, address, length).offset(offset).build(),
                (true, Some(slot)) => {
                    opcode::ReadFixed::new(file, address, length, slot).offset(offset).build()
                }
                (false, None) => {
                    opcode::Write::new(file, address, length).offset(offset).rw_flags(flags).build()
                }
                (false, Some(slot)) => opcode::WriteFixed::new(file, address, length, slot)
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
            };
        }
        let (vector, count) = self.vector(operation.segments);
        match (read, slot.filter(|_| self.vectored)) {
            (true, None) => opcode::Readv::new(file, vector, count).offset(offset).build(),
            (true, Some(slot)) => {
                opcode::ReadvFixed::new(file, vector, count, slot).offset(offset).build()
            }
            (false, None) => {
                opcode::Writev::new(file, vector, count).offset(offset).rw_flags(flags).build()
            }
            (false, Some(slot)) => opcode::WritevFixed::new(file, vector, count, slot)
                .offset(offset)
                .rw_flags(flags)
                .build(),
        }
    }

    /// Keeps `segments` for the kernel until the next submission.
    fn vector(&mut self, segments: &[Segment]) -> (*const libc::iovec, u32) {
        let count = segments.len();
        assert!(0 < count && count <= SEGMENTS_QUEUED_MAX, "a transfer has a bounded vector");
        if self.segments.len() + count > SEGMENTS_QUEUED_MAX {
            self.submit();
        }
        // The vector never grows past its capacity, so queued entries' pointers stay good.
        let start = self.segments.len();
        self.segments.extend_from_slice(segments);
        (self.segments[start..].as_ptr().cast(), count as u32)
    }

    /// Queues a poll that reports each time `fd` becomes readable, until cancelled.
    pub fn poll(&mut self, fd: BorrowedFd<'_>, token: u64) {
        assert!(token <= TOKEN_MASK, "a token keeps to its bits");
        let entry = opcode::PollAdd::new(io_uring::types::Fd(fd.as_raw_fd()), libc::POLLIN as u32)
            .multi(true)
            .build()
            .user_data(token);
        self.push(entry);
    }

    /// Queues the end of the poll with `token`; both it and this report once more.
    pub fn cancel_poll(&mut self, token: u64, cancel_token: u64) {
        assert!(cancel_token <= TOKEN_MASK, "a token keeps to its bits");
        self.push(opcode::PollRemove::new(token).build().user_data(cancel_token));
    }

    fn push(&mut self, entry: squeue::Entry) {
        loop {
            // SAFETY: what the entry points at is kept by the caller until completion (guest
            // memory), or by `self.segments` until the kernel copied it; descriptors are
            // registered, or kept open by the caller until the poll has ended.
            if unsafe { self.uring.submission().push(&entry) }.is_ok() {
                self.queued += 1;
                return;
            }
            self.submit();
        }
    }

    /// Entries queued and not handed over.
    pub fn queued(&self) -> usize {
        self.queued
    }

    /// Completions that [`Ring::submit`] would produce are pending, or are there already.
    pub fn ready(&mut self) -> bool {
        let submission = self.uring.submission();
        let pending = submission.taskrun() || submission.cq_overflow();
        drop(submission);
        pending || !self.uring.completion().is_empty()
    }

    /// Hands over what is queued and runs completions, without waiting.
    pub fn submit(&mut self) {
        let result = self.uring.submit();
        self.entered(result);
    }

    /// Hands over what is queued, runs completions, and waits until there is one; for `timeout` at
    /// most, if there is one.
    pub fn wait(&mut self, timeout: Option<Duration>) {
        let timeout = timeout.map(Timespec::from);
        let mut arguments = SubmitArgs::new();
        if let Some(timeout) = &timeout {
            arguments = arguments.timespec(timeout);
        }
        let result = self.uring.submitter().submit_with_args(1, &arguments);
        self.entered(result);
    }

    fn entered(&mut self, result: std::io::Result<usize>) {
        match result {
            Ok(_) => {}
            // A time-out, a signal, or completions that must be reaped first: all are met by the
            // next turn.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)
                ) => {}
            Err(error) => panic!("io_uring_enter failed in a way that has no remedy: {error}"),
        }
        if self.uring.submission().is_empty() {
            self.segments.clear();
            self.queued = 0;
        }
    }

    /// The next completion that is there already.
    pub fn ended(&mut self) -> Option<Ended> {
        self.uring.completion().next().map(|entry| {
            let user_data = entry.user_data();
            let length = (user_data >> TOKEN_BITS) * SECTOR_BYTES;
            let result = match u32::try_from(entry.result()) {
                Err(_) => Err(Errno(-entry.result())),
                Ok(bytes) if length != 0 && u64::from(bytes) != length => Err(Errno::EIO),
                Ok(value) => Ok(value),
            };
            let more = cqueue::more(entry.flags());
            Ended { token: user_data & TOKEN_MASK, result, more }
        })
    }
}

fn fallocate(file: Fixed, operation: &Operation<'_>, mode: i32, token: u64) -> squeue::Entry {
    opcode::Fallocate::new(file, operation.length)
        .offset(operation.offset)
        .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
        .build()
        .user_data(token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::buffer::AlignedBuffer;
    use std::os::fd::AsFd;

    const LONG: Option<Duration> = Some(Duration::from_secs(10));

    fn run(ring: &mut Ring, file: FileIndex, operation: &Operation<'_>) -> Ended {
        ring.operate(file, operation, 77);
        ring.wait(LONG);
        let ended = ring.ended().expect("one completion");
        assert_eq!(ended.token, 77);
        ended
    }

    #[test]
    fn what_is_written_is_read_and_zeroed() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let mut ring = Ring::new().unwrap();
        let index = ring.register(file.as_fd()).unwrap();
        let mut buffer = AlignedBuffer::new(8192);
        buffer.fill(7);
        // SAFETY: the buffer outlives the operations, and is only looked at between them.
        let segment = unsafe { buffer.segment() };
        let parts = [segment.part(0, 512), segment.part(4096, 3584)];
        let write =
            Operation { kind: OperationKind::Write, offset: 512, length: 4096, segments: &parts };
        assert_eq!(run(&mut ring, index, &write).result, Ok(4096));
        let flush = Operation { kind: OperationKind::Flush, offset: 0, length: 0, segments: &[] };
        assert_eq!(run(&mut ring, index, &flush).result, Ok(0));
        let zero =
            Operation { kind: OperationKind::Zero, offset: 1024, length: 1024, segments: &[] };
        assert_eq!(run(&mut ring, index, &zero).result, Ok(0));
        buffer.fill(1);
        let whole = [segment];
        let read =
            Operation { kind: OperationKind::Read, offset: 0, length: 8192, segments: &whole };
        assert_eq!(run(&mut ring, index, &read).result, Ok(8192));
        let expected =
            |at: usize| u8::from((512..1024).contains(&at) || (2048..4608).contains(&at));
        assert!(buffer.iter().enumerate().all(|(at, byte)| *byte == 7 * expected(at)));
        let last = Operation { offset: (1 << 20) - 4096, ..read };
        assert_eq!(run(&mut ring, index, &last).result, Err(Errno::EIO), "a short read");
        ring.unregister(index);
        assert!(run(&mut ring, index, &read).result.is_err(), "the slot is empty");
    }

    /// The number of transfers of pinned memory that the kernel has done would be best; that a page
    /// which was replaced after it was pinned is not touched shows as much.
    #[test]
    fn memory_that_a_ring_has_learnt_is_used_as_it_was_pinned_until_it_is_forgotten() {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let mut ring = Ring::new().unwrap();
        let index = ring.register(file.as_fd()).unwrap();
        let length = std::num::NonZeroUsize::new(64 << 10).unwrap();
        let (access, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
        // SAFETY: a fresh mapping at an address of the kernel's choice, which is never unmapped.
        let base = unsafe { mmap_anonymous(None, length, access, flags) }.unwrap().cast();
        // SAFETY: it stays mapped.
        let memory = unsafe { Segment::new(base, length.get()) };
        memory.copy_from(&[7; 64 << 10]);
        let pinned = PinnedMemory::new(memory, || true).unwrap();
        ring.learn(&pinned).unwrap();
        let flags = flags | MapFlags::MAP_FIXED;
        let address = std::num::NonZeroUsize::new(base.as_ptr() as usize);
        // SAFETY: replaces our own mapping by another of the same length.
        unsafe { mmap_anonymous(address, length, access, flags) }.unwrap();
        let parts = [memory.part(0, 4096), memory.part(8192, 512)];
        for segments in [&parts[..1], &parts[..]] {
            let length = super::super::buffer::total_bytes(segments) as u64;
            let write = Operation { kind: OperationKind::Write, offset: 4096, length, segments };
            let read = Operation { kind: OperationKind::Read, ..write };
            let pinned = segments.len() == 1 || ring.vectored;
            assert_eq!(run(&mut ring, index, &write).result, Ok(length as u32));
            let mut seen = vec![1; length as usize];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut seen, 4096).unwrap();
            assert!(seen.iter().all(|byte| *byte == 7 * u8::from(pinned)), "the pages of then");
            assert_eq!(run(&mut ring, index, &read).result, Ok(length as u32));
            assert_eq!(parts[0].read(), Some([0; 16]), "nor are they written by a read");
        }
        ring.forget(&pinned);
        ring.forget(&pinned);
        let write = Operation {
            kind: OperationKind::WriteDurable,
            offset: 4096,
            length: 4096,
            segments: &parts[..1],
        };
        assert_eq!(run(&mut ring, index, &write).result, Ok(4096));
        let mut seen = vec![1; 4096];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut seen, 4096).unwrap();
        assert!(seen.iter().all(|byte| *byte == 0), "the pages of now");
        ring.learn(&pinned).unwrap();
        assert_eq!(run(&mut ring, index, &write).result, Ok(4096));
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut seen, 4096).unwrap();
        assert!(seen.iter().all(|byte| *byte == 7), "it can be learnt again");
    }

    #[test]
    fn a_poll_reports_every_write_of_an_eventfd_and_can_be_cancelled() {
        let event = nix::sys::eventfd::EventFd::new().unwrap();
        let mut ring = Ring::new().unwrap();
        ring.poll(event.as_fd(), 5);
        for _ in 0..3 {
            ring.submit();
            event.write(1).unwrap();
            ring.wait(LONG);
            let ended = ring.ended().expect("the poll reports");
            assert_eq!((ended.token, ended.more), (5, true));
            assert!(ring.ended().is_none());
        }
        ring.cancel_poll(5, 6);
        ring.wait(LONG);
        let mut tokens: Vec<_> =
            std::iter::from_fn(|| ring.ended()).map(|e| (e.token, e.more)).collect();
        tokens.sort_unstable();
        assert_eq!(tokens, [(5, false), (6, false)]);
    }

    #[test]
    fn waiting_ends_at_the_timeout() {
        let mut ring = Ring::new().unwrap();
        ring.wait(Some(Duration::from_millis(1)));
        assert!(ring.ended().is_none());
    }
}
