//! Guest memory: a memfd, mapped once, shared with the back end.

use crate::Result;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

const HUGE_PAGE_BYTES: usize = 2 << 20;

/// All offsets are in bytes from the start, which is guest-physical address 0.
pub struct GuestMemory {
    file: OwnedFd,
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping is owned, and reached through volatile accesses and atomics only.
unsafe impl Send for GuestMemory {}

impl GuestMemory {
    /// Maps `length` bytes, rounded up to huge pages, at an address that is a multiple of one, so
    /// that alignment is never what is measured. With `hugetlb` it is made of reserved huge pages.
    pub fn new(length: usize, hugetlb: bool) -> Result<Self> {
        let length = length.next_multiple_of(HUGE_PAGE_BYTES);
        let mut flags = MFdFlags::MFD_CLOEXEC;
        if hugetlb {
            flags |= MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
        }
        let file = memfd_create(c"guest-memory", flags)?;
        nix::unistd::ftruncate(&file, length as i64)?;
        let base = map_aligned(&file, length).map_err(|error| match hugetlb {
            true => format!("{} huge pages of 2 MiB: {error}", length / HUGE_PAGE_BYTES).into(),
            false => error,
        })?;
        Ok(Self { file, base, length })
    }

    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub fn raw_file(&self) -> i32 {
        self.file.as_raw_fd()
    }

    pub fn length(&self) -> usize {
        self.length
    }

    /// Where the memory is mapped here: the user address that the back end is told.
    pub fn user_address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    fn at(&self, offset: usize, length: usize) -> *mut u8 {
        assert!(offset.checked_add(length).is_some_and(|end| end <= self.length));
        // SAFETY: within the mapping, as just checked.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// Two bytes as an atomic.
    pub fn u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: mapped for as long as `self`; ring fields are aligned to two bytes, and the back
        // end accesses them atomically as well.
        unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) }
    }

    pub fn load_u16(&self, offset: usize) -> u16 {
        self.u16(offset).load(Ordering::Acquire)
    }

    pub fn store_u16(&self, offset: usize, value: u16) {
        self.u16(offset).store(value, Ordering::Release);
    }

    pub fn write(&self, offset: usize, bytes: &[u8]) {
        // SAFETY: the target is mapped and long enough; `bytes` is not in it.
        unsafe {
            self.at(offset, bytes.len()).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
    }

    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        // SAFETY: the source is mapped and long enough; `bytes` is not in it.
        unsafe {
            self.at(offset, bytes.len()).copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len());
        }
    }

    pub fn fill(&self, offset: usize, length: usize, byte: u8) {
        // SAFETY: the target is mapped and long enough.
        unsafe { self.at(offset, length).write_bytes(byte, length) };
    }

    pub fn load_u8(&self, offset: usize) -> u8 {
        // SAFETY: mapped; the back end may write it, hence volatile.
        unsafe { self.at(offset, 1).read_volatile() }
    }
}

/// Maps the whole of `file` at a multiple of a huge page.
fn map_aligned(file: &OwnedFd, length: usize) -> Result<NonNull<u8>> {
    let reserved = NonZeroUsize::new(length + HUGE_PAGE_BYTES).ok_or("no guest memory")?;
    let quiet = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    // SAFETY: a fresh mapping at an address of the kernel's choice; nothing can reach into it.
    let area = unsafe { mmap_anonymous(None, reserved, ProtFlags::PROT_NONE, quiet)? };
    let start = area.as_ptr() as usize;
    let base = start.next_multiple_of(HUGE_PAGE_BYTES);
    let end = base + length;
    let size = NonZeroUsize::new(length).ok_or("no guest memory")?;
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE | MapFlags::MAP_FIXED;
    // SAFETY: replaces a part of the area just reserved, which is ours alone.
    let mapped = unsafe { mmap(NonZeroUsize::new(base), size, access, flags, file, 0) };
    for (from, bytes) in [(start, base - start), (end, start + reserved.get() - end)] {
        if let (Some(from), true) = (NonNull::new(from as *mut _), bytes > 0) {
            // SAFETY: the parts of the reservation beside the mapping, which nobody uses.
            unsafe { munmap(from, bytes)? };
        }
    }
    Ok(mapped?.cast())
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of this length, with no reference left.
        let unmapped = unsafe { munmap(self.base.cast(), self.length) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_shared_and_begins_at_a_huge_page() {
        let memory = GuestMemory::new(3 << 20, false).unwrap();
        assert_eq!(memory.length(), 4 << 20);
        assert_eq!(memory.user_address() % HUGE_PAGE_BYTES as u64, 0);
        memory.write(memory.length() - 4, b"last");
        let mut bytes = [0; 4];
        nix::sys::uio::pread(memory.file(), &mut bytes, memory.length() as i64 - 4).unwrap();
        assert_eq!(&bytes, b"last");
    }

    #[test]
    fn nothing_is_reached_outside() {
        let memory = GuestMemory::new(1, false).unwrap();
        let outside = std::panic::catch_unwind(|| memory.load_u8(memory.length()));
        assert!(outside.is_err());
    }
}
