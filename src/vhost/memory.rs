//! Guest memory: the regions that the front end shares, mapped here.
//!
//! A region stays mapped while anything refers to its [`Region`]; queues hold the whole
//! [`MemoryTable`], so nothing is unmapped before the last queue that could touch it has stopped.

use super::fault::SharedMapping;
use crate::base::limits::MEMORY_REGIONS_MAX;
use crate::base::planted::{Bug, planted};
use crate::base::{Error, ErrorKind, Result};
use crate::io::buffer::Segment;
use crate::io::pinned::PinnedMemory;
use crate::virtio::chain::Memory;
use std::cell::Cell;
use std::fs::File;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

/// One region as the front end announced it. Addresses and sizes are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    pub guest_address: u64,
    pub size: u64,
    /// Where the front end has mapped it; ring addresses come in this space.
    pub user_address: u64,
    /// Offset in the file.
    pub file_offset: u64,
}

/// A mapped region.
pub struct Region {
    info: RegionInfo,
    base: NonNull<u8>,
    mapping: SharedMapping,
    /// It was asked for that it is pinned.
    asked: AtomicBool,
    /// Once it is.
    pinned: OnceLock<PinnedMemory>,
    /// The reactor's ring uses it pinned.
    registered: AtomicBool,
}

// SAFETY: the region is an address range that stays mapped until drop; it is only reached through
// segments and atomics.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `info` from `file`.
    pub fn map(info: RegionInfo, file: File) -> Result<Self> {
        let ends =
            [info.guest_address, info.user_address].map(|start| start.checked_add(info.size));
        if ends.contains(&None) {
            let text = format!(
                "memory region at guest address {:#x}, {:#x} bytes, wraps around the address space",
                info.guest_address, info.size
            );
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let mapping = SharedMapping::map(file, info.file_offset, info.size).map_err(|error| {
            error.context(format_args!("memory region at guest address {:#x}", info.guest_address))
        })?;
        let base = NonNull::new(mapping.as_ptr()).expect("a mapping is not at address zero");
        let (asked, pinned, registered) = (false.into(), OnceLock::new(), false.into());
        Ok(Self { info, base, mapping, asked, pinned, registered })
    }

    /// True once: that it is pinned is to be asked for.
    pub fn ask_to_pin(&self) -> bool {
        !self.asked.swap(true, Ordering::Relaxed)
    }

    /// Pins it, as long as it is `wanted`. Takes long: see [`PinnedMemory`].
    pub fn pin(&self, wanted: impl Fn() -> bool) -> Result<()> {
        let pinned = PinnedMemory::new(self.part(0, self.info.size), wanted).map_err(|error| {
            let address = self.info.guest_address;
            error.context(format_args!("guest memory at {address:#x}"))
        })?;
        assert!(self.pinned.set(pinned).is_ok(), "a region is pinned once");
        Ok(())
    }

    pub fn pinned(&self) -> Option<&PinnedMemory> {
        self.pinned.get()
    }

    /// The reactor's ring uses it pinned.
    pub fn is_registered(&self) -> bool {
        self.registered.load(Ordering::Relaxed)
    }

    pub fn set_registered(&self, registered: bool) {
        self.registered.store(registered, Ordering::Relaxed);
    }

    pub fn info(&self) -> RegionInfo {
        self.info
    }

    fn part(&self, offset: u64, length: u64) -> Segment {
        assert!(offset < self.info.size, "the caller looked the region up");
        let length = length.min(self.info.size - offset);
        // SAFETY: offset + length lies within the mapping, which lives as long as the table that
        // every queue and request under way holds.
        unsafe { Segment::new(self.base.add(offset as usize), length as usize) }
    }
}

/// All regions of one connection.
#[derive(Default)]
pub struct MemoryTable {
    /// In order of guest address; they do not overlap.
    regions: Vec<Arc<Region>>,
    /// The region that served the last translation: requests cluster.
    last: Cell<usize>,
}

// SAFETY: `last` is only a hint and each table is used by one thread at a time (queues own theirs,
// see `MemoryTable::clone`).
unsafe impl Send for MemoryTable {}

impl Clone for MemoryTable {
    fn clone(&self) -> Self {
        Self { regions: self.regions.clone(), last: Cell::new(0) }
    }
}

impl MemoryTable {
    /// Adds a region; refused if it overlaps another or there are too many.
    pub fn add(&mut self, region: Region) -> Result<()> {
        let RegionInfo { guest_address, size, .. } = region.info;
        if self.regions.len() >= MEMORY_REGIONS_MAX {
            let text = format!("more than {MEMORY_REGIONS_MAX} memory regions");
            return Err(Error::new(ErrorKind::Full, text));
        }
        let at = self.regions.partition_point(|other| other.info.guest_address < guest_address);
        let before = at.checked_sub(1).and_then(|at| self.regions.get(at));
        let overlaps = before
            .is_some_and(|other| other.info.guest_address + other.info.size > guest_address)
            || self
                .regions
                .get(at)
                .is_some_and(|other| guest_address + size > other.info.guest_address);
        if overlaps && !planted(Bug::RegionsOverlap) {
            let text =
                format!("memory region at guest address {guest_address:#x} overlaps another");
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        self.regions.insert(at, Arc::new(region));
        Ok(())
    }

    /// Removes the region that was added with the same address, size and user address.
    pub fn remove(&mut self, info: RegionInfo) -> Result<()> {
        let found = self.regions.iter().position(|region| {
            region.info.guest_address == info.guest_address
                && region.info.user_address == info.user_address
                && region.info.size == info.size
        });
        match found {
            Some(at) => {
                self.regions.remove(at);
                self.last.set(0);
                Ok(())
            }
            None => {
                let text = format!("no memory region at guest address {:#x}", info.guest_address);
                Err(Error::new(ErrorKind::Gone, text))
            }
        }
    }

    pub fn len(&self) -> usize {
        self.regions.len()
    }

    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Whether that very region is in it.
    pub fn has(&self, region: &Arc<Region>) -> bool {
        self.regions.iter().any(|other| Arc::ptr_eq(other, region))
    }

    /// A mapped file was cut short under us and its pages were replaced: the guest is broken.
    pub fn faulted(&self) -> bool {
        self.regions.iter().any(|region| region.mapping.faulted())
    }

    /// `length` bytes at the front end's `user_address`, in one region, aligned to `alignment`.
    pub fn translate_user(
        &self,
        user_address: u64,
        length: u64,
        alignment: u64,
    ) -> Option<Segment> {
        let region = self.regions.iter().find(|region| {
            user_address
                .checked_sub(region.info.user_address)
                .is_some_and(|offset| offset < region.info.size)
        })?;
        let segment = region.part(user_address - region.info.user_address, length);
        let aligned = (segment.address() as u64).is_multiple_of(alignment);
        (segment.length() as u64 == length && aligned).then_some(segment)
    }

    /// The guest-physical address of the front end's `user_address`.
    pub fn guest_address(&self, user_address: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = user_address.checked_sub(region.info.user_address)?;
            (offset < region.info.size).then(|| region.info.guest_address + offset)
        })
    }

    /// The guest-physical address behind a host address, for the dirty log.
    pub fn guest_address_of(&self, host: *const u8) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = (host as u64).checked_sub(region.base.as_ptr() as u64)?;
            (offset < region.info.size).then(|| region.info.guest_address + offset)
        })
    }
}

impl Memory for MemoryTable {
    fn translate(&self, address: u64, length: u64) -> Option<Segment> {
        let within = |region: &Region| {
            address
                .checked_sub(region.info.guest_address)
                .filter(|offset| *offset < region.info.size)
        };
        if let Some(region) = self.regions.get(self.last.get())
            && let Some(offset) = within(region)
        {
            return Some(region.part(offset, length));
        }
        let after = self.regions.partition_point(|region| region.info.guest_address <= address);
        let index = after.checked_sub(1)?;
        let region = self.regions.get(index)?;
        let offset = within(region)?;
        self.last.set(index);
        Some(region.part(offset, length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::unix::fs::FileExt;

    fn region(guest_address: u64, size: u64, file: &File) -> Result<Region> {
        let info = RegionInfo {
            guest_address,
            size,
            user_address: guest_address + 0x1000,
            file_offset: 0,
        };
        Region::map(info, file.try_clone().unwrap())
    }

    fn file(size: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        file
    }

    #[test]
    fn translation_stops_at_the_end_of_a_region_and_goes_on_in_the_next() {
        let (low, high) = (file(0x4000), file(0x4000));
        let mut table = MemoryTable::default();
        table.add(region(0x8000, 0x4000, &high).unwrap()).unwrap();
        table.add(region(0x4000, 0x4000, &low).unwrap()).unwrap();
        assert_eq!(table.translate(0x7ff0, 0x20).unwrap().length(), 0x10);
        table.translate(0x8000, 4).unwrap().copy_from(b"high");
        let mut bytes = [0; 4];
        high.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"high");
        for outside in [0, 0x3fff, 0xc000, u64::MAX] {
            assert!(table.translate(outside, 1).is_none(), "{outside:#x}");
        }
        assert_eq!(table.guest_address(0x5010), Some(0x4010));
        assert!(table.translate_user(0x8ff8, 16, 8).is_none(), "a ring must lie in one region");
        assert!(table.translate_user(0x5001, 16, 8).is_none(), "and be aligned");
        assert!(table.translate_user(0x5000, 16, 8).is_some());
    }

    #[test]
    fn bad_regions_are_refused() {
        let file = file(0x4000);
        let mut table = MemoryTable::default();
        table.add(region(0x4000, 0x4000, &file).unwrap()).unwrap();
        for (address, size) in [(0x4000, 0x1000), (0x7000, 0x2000), (0x3000, 0x1001)] {
            let error = table.add(region(address, size, &file).unwrap()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
        }
        for (address, size) in [(0x8000, 0), (0x8000, 0x4001), (u64::MAX - 0x2000, 0x4000)] {
            assert!(region(address, size, &file).is_err(), "{address:#x} {size:#x}");
        }
    }

    #[test]
    fn a_file_cut_short_reads_as_zeros_and_is_reported() {
        let file = file(0x4000);
        let mut table = MemoryTable::default();
        table.add(region(0x4000, 0x4000, &file).unwrap()).unwrap();
        table.translate(0x7000, 4).unwrap().copy_from(b"gone");
        assert!(!table.faulted());
        file.set_len(0).unwrap();
        let mut bytes = [1; 4];
        table.translate(0x7000, 4).unwrap().copy_to(&mut bytes);
        assert_eq!(bytes, [0; 4]);
        assert!(table.faulted());
    }
    #[test]
    fn a_region_that_ends_inside_a_huge_page_can_be_cut_short() {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
        let file = File::from(memfd_create(c"huge", flags).unwrap());
        file.set_len(4 << 20).unwrap();
        let mut table = MemoryTable::default();
        table.add(region(0, 3 << 20, &file).unwrap()).unwrap();
        // On a host without huge pages to spare this does the same.
        file.set_len(0).unwrap();
        let mut bytes = [1; 4];
        table.translate(0, 4).unwrap().copy_to(&mut bytes);
        assert_eq!(bytes, [0; 4]);
        assert!(table.faulted());
    }
}
