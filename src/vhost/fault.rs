//! Shared memory cut short under us.
//!
//! A front end may truncate a file that it shares (guest memory, in-flight area, dirty log);
//! touching a page past its end raises SIGBUS, which would end the daemon and with it every other
//! VM's disk. So the signal's handler puts zero pages over the region that was hit and marks it:
//! that guest's connection is then dropped, and nobody else notices. (System calls on such memory
//! fail with EFAULT by themselves.)

use crate::base::limits::{EXPORTS_MAX, MEMORY_REGIONS_MAX};
use crate::base::{Error, ErrorKind, Result};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use std::fs::File;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use vm_memory::{FileOffset, MmapRegion};

/// Regions watched at a time: what all exports may have, with in-flight area and log, so that no
/// guest takes the place of another's. Places that were never used take no memory.
const WATCHED_MAX: usize = EXPORTS_MAX * (MEMORY_REGIONS_MAX + 2);

/// A watched region; free when `length` is 0. Claimed with `base` first and `length` after it, and
/// let go of by `length`: whoever reads `base`, `length` and the same `base` again has seen one
/// region, or none.
struct Watched {
    claimed: AtomicBool,
    base: AtomicUsize,
    length: AtomicUsize,
    faulted: AtomicBool,
}

static WATCHED: [Watched; WATCHED_MAX] = [const {
    Watched {
        claimed: AtomicBool::new(false),
        base: AtomicUsize::new(0),
        length: AtomicUsize::new(0),
        faulted: AtomicBool::new(false),
    }
}; WATCHED_MAX];

/// Regions that were cut short since the start.
static FAULTS: AtomicUsize = AtomicUsize::new(0);

/// Grows with each region that is cut short, after it is marked: who has looked at its own need
/// not look again before.
pub fn count() -> usize {
    FAULTS.load(Ordering::Acquire)
}

static INSTALLED: OnceLock<nix::Result<()>> = OnceLock::new();

/// A file of the front end, mapped shared and watched.
pub struct SharedMapping {
    // Dropped in this order: not watched any more, then unmapped.
    guard: Guard,
    region: MmapRegion,
}

impl SharedMapping {
    /// Maps `length` bytes of `file` from `offset`. The file must be that long now.
    pub fn map(file: File, offset: u64, length: u64) -> Result<Self> {
        let file_length = file
            .metadata()
            .map_err(|error| Error::io("cannot look at a shared file", error))?
            .len();
        if length == 0 || offset.checked_add(length).is_none_or(|end| end > file_length) {
            let text = format!(
                "{length:#x} bytes at {offset:#x} were to be shared, of a file of {file_length:#x}"
            );
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let length = whole_pages(&file, length)? as usize;
        let region = MmapRegion::from_file(FileOffset::new(file, offset), length)
            .map_err(|error| Error::with(ErrorKind::Io, "cannot map a shared file", error))?;
        let base = NonNull::new(region.as_ptr()).expect("a mapping is not at address zero");
        Ok(Self { guard: Guard::new(base, length)?, region })
    }

    /// The file was cut short; zero pages stand in for it.
    pub fn faulted(&self) -> bool {
        self.guard.faulted()
    }
}

/// A file of huge pages is mapped in whole ones, and can only be unmapped, and replaced by zero
/// pages, in whole ones. Such a file has no other length than that.
fn whole_pages(file: &File, length: u64) -> Result<u64> {
    let found =
        fstatfs(file).map_err(|error| Error::io("cannot look at a shared file", error.into()))?;
    match found.filesystem_type() {
        HUGETLBFS_MAGIC => Ok(length.next_multiple_of(found.block_size() as u64)),
        _ => Ok(length),
    }
}

impl Deref for SharedMapping {
    type Target = MmapRegion;

    fn deref(&self) -> &MmapRegion {
        &self.region
    }
}

/// Watches one mapping until dropped, which must be before it is unmapped.
struct Guard {
    slot: usize,
}

impl Guard {
    /// Watches `length` bytes at `base`, a shared file mapping.
    fn new(base: NonNull<u8>, length: usize) -> Result<Self> {
        (*INSTALLED.get_or_init(install))
            .map_err(|error| Error::io("cannot handle SIGBUS", error.into()))?;
        let free = |watched: &Watched| {
            let claim =
                watched.claimed.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed);
            claim.is_ok()
        };
        let slot = WATCHED.iter().position(free).ok_or_else(|| {
            Error::new(ErrorKind::Full, "too many guest memory regions on this host")
        })?;
        let watched = &WATCHED[slot];
        watched.faulted.store(false, Ordering::Relaxed);
        watched.base.store(base.as_ptr() as usize, Ordering::Release);
        watched.length.store(length, Ordering::Release);
        Ok(Self { slot })
    }

    /// The handler has replaced the region's pages.
    fn faulted(&self) -> bool {
        WATCHED[self.slot].faulted.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let watched = &WATCHED[self.slot];
        watched.length.store(0, Ordering::Release);
        watched.claimed.store(false, Ordering::Release);
    }
}

fn install() -> nix::Result<()> {
    let action = SigAction::new(
        SigHandler::SigAction(handle),
        SaFlags::SA_SIGINFO | SaFlags::SA_NODEFER,
        SigSet::empty(),
    );
    // SAFETY: the handler calls only mmap and, to end the process, sigaction: both are plain system
    // calls; it reads atomics and allocates nothing.
    unsafe { sigaction(Signal::SIGBUS, &action) }.map(|_| ())
}

extern "C" fn handle(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid siginfo for SIGBUS, whose address field is set.
    let address = unsafe { (*info).si_addr() } as usize;
    for watched in &WATCHED {
        let base = watched.base.load(Ordering::Acquire);
        let length = watched.length.load(Ordering::Acquire);
        // The entry that is looked for is in use, so it does not change meanwhile.
        if address.wrapping_sub(base) >= length || watched.base.load(Ordering::Relaxed) != base {
            continue;
        }
        // SAFETY: the range is a mapping of ours that a Guard watches; fresh zero pages over the
        // whole of it keep every segment valid.
        let mapped = unsafe {
            libc::mmap(
                base as *mut libc::c_void,
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if mapped != libc::MAP_FAILED {
            watched.faulted.store(true, Ordering::Release);
            FAULTS.fetch_add(1, Ordering::Release);
            return;
        }
    }
    // Not guest memory: our own fault. Back to the default action, which the access repeats into.
    // SAFETY: restoring SIG_DFL is async-signal-safe.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}
