//! The dirty log of a live migration (vhost-user, "Migration").
//!
//! While `VHOST_F_LOG_ALL` is negotiated, every guest page that we or the drive write is marked in
//! a bitmap shared with the front end: one bit a 4 KiB page of guest-physical memory. A page is
//! marked after its bytes are in place and before the guest is told.

use super::fault::SharedMapping;
use crate::base::Result;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use vm_memory::VolatileMemory;

const PAGE_BYTES: u64 = 4096;

/// The bitmap as the front end shared it.
#[derive(Clone)]
pub struct DirtyLog {
    mapping: Arc<SharedMapping>,
}

impl DirtyLog {
    /// Maps `size` bytes of bitmap at `offset` of `file`.
    pub fn map(file: File, offset: u64, size: u64) -> Result<Self> {
        let mapping = SharedMapping::map(file, offset, size)
            .map_err(|error| error.context("the dirty log"))?;
        Ok(Self { mapping: Arc::new(mapping) })
    }

    /// Marks the pages of `length` bytes at guest-physical `address`. What lies past the bitmap is
    /// not the front end's concern and is left out.
    pub fn mark(&self, address: u64, length: u64) {
        if length == 0 {
            return;
        }
        let last = address.saturating_add(length - 1) / PAGE_BYTES;
        for page in address / PAGE_BYTES..=last {
            let Ok(byte) = usize::try_from(page / 8) else { return };
            let Ok(cell) = self.mapping.get_atomic_ref::<AtomicU8>(byte) else { return };
            cell.fetch_or(1 << (page % 8), Ordering::Relaxed);
        }
    }

    /// Its file was cut short.
    pub fn faulted(&self) -> bool {
        self.mapping.faulted()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn every_touched_page_is_marked_and_no_other() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        assert!(DirtyLog::map(file.try_clone().unwrap(), 4090, 8).is_err(), "past the file");
        let log = DirtyLog::map(file.try_clone().unwrap(), 0, 4).unwrap();
        log.mark(0, 0);
        log.mark(4095, 2);
        log.mark(9 * 4096, 4096);
        log.mark(31 * 4096, 1 << 40);
        log.mark(u64::MAX, 7);
        let mut bytes = [0; 5];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [0b11, 0b10, 0, 0b1000_0000, 0]);
    }
}
