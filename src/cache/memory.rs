//! Memory of groups being drained: all cached disks of a daemon share what there is beside the
//! little that each may always have. Whoever gets none drains smaller groups.

use crate::base::limits::DRAIN_BYTES_SHARED;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

/// Bytes of a chunk of pinned memory, the unit in which it is given; and of one transfer at most.
pub const CHUNK_BYTES: u64 = 1 << 20;

/// See the module.
#[derive(Debug)]
pub struct DrainMemory {
    /// Chunks that nobody has; below zero if more had to be given than there are.
    left: AtomicI64,
    /// Below this disks give back what they do not use.
    short: i64,
}

impl DrainMemory {
    pub fn new(bytes: u64) -> Arc<Self> {
        let chunks = (bytes / CHUNK_BYTES) as i64;
        Arc::new(Self { left: AtomicI64::new(chunks), short: chunks / 4 })
    }

    /// As much as a daemon has.
    pub fn of_daemon() -> Arc<Self> {
        Self::new(DRAIN_BYTES_SHARED)
    }

    /// A chunk, if one is left.
    pub(super) fn take(&self) -> bool {
        let one_less = |left: i64| (left > 0).then_some(left - 1);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok()
    }

    /// A chunk, whether one is left or not.
    pub(super) fn overdraw(&self) {
        self.left.fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn give(&self, chunks: usize) {
        self.left.fetch_add(chunks as i64, Ordering::Relaxed);
    }

    /// Others may be waiting.
    pub(super) fn is_short(&self) -> bool {
        self.left.load(Ordering::Relaxed) < self.short
    }

    /// Bytes that nobody has.
    pub fn left_bytes(&self) -> u64 {
        self.left.load(Ordering::Relaxed).max(0) as u64 * CHUNK_BYTES
    }
}
