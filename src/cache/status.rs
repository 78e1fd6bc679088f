//! What a cached disk says of itself: one writer, any readers.

use super::segment::SegmentCounts;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// What the disk does at the moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum CacheState {
    #[default]
    Serving,
    Draining,
    /// The backing fails; what is written to the log goes on until that is full.
    WaitingForBacking,
    /// All is in the backing, and nothing more is taken.
    Closed,
    /// Nothing is served any more; why, and what to do.
    Fenced(String),
}

/// Gauges as they were at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheGauges {
    pub state: CacheState,
    pub dirty_bytes: u64,
    pub oldest_dirty: Duration,
    pub segments: SegmentCounts,
    pub segment_bytes: u64,
    /// Newest WON that is durable in the log.
    pub head_won: u64,
    pub drained_won: u64,
    pub epoch: u64,
    /// Bytes of log a second.
    pub drain_rate: u64,
    pub drain_eta: Option<Duration>,
    pub index_bytes: u64,
    pub index_pieces: u64,
    /// Bytes of single blocks on flash, and in memory on their way there.
    pub clean_bytes: u64,
    pub probation_bytes: u64,
    /// The backing reads faster than the flash: what is read is not kept.
    pub backing_faster: bool,
    /// Memory of the clean cache, less the index and the data in it.
    pub policy_bytes: u64,
    /// The write budget is used up for now: nothing that is read is written to the flash.
    pub budget_used_up: bool,
    /// The flash fails to be written: nothing is kept for a while, then it is tried again.
    pub flash_failing: bool,
    /// Requests that wait for space.
    pub parked: u64,
    /// Operations for guests that failed at the backing and are tried again.
    pub waiting_for_backing: u64,
    pub mode: super::root::Mode,
    /// Bytes of the allocation that the disk uses.
    pub size_bytes: u64,
    /// The size that it is being brought to.
    pub resizing_to: Option<u64>,
    /// Of a million reads, the hits that the curve has for the present size and for
    /// twice that; as of a second ago.
    pub curve_hits: [u64; 2],
}

impl CacheGauges {
    /// Thousandths of the log that hold records that are not drained.
    pub fn log_fill_permille(&self) -> u64 {
        self.segments.dirty_permille()
    }
}

/// Counters since the disk was opened.
#[derive(Debug, Default)]
pub struct CacheCounters {
    /// Pieces of reads found on the flash: blocks of 4 KiB, or parts of one. What it lacks is
    /// counted by blocks: in `misses`, `probation_hits` or `joined`.
    pub hits: AtomicU64,
    /// Blocks that reads had brought from the backing.
    pub misses: AtomicU64,
    pub batches: AtomicU64,
    pub records: AtomicU64,
    pub appended_bytes: AtomicU64,
    /// Appends that failed and were done again elsewhere.
    pub append_failures: AtomicU64,
    /// Flushes of the flash that failed; what they should have covered was written again.
    pub flush_failures: AtomicU64,
    /// Pieces whose checksum did not match where they were read first.
    pub mismatches: AtomicU64,
    /// Damaged copies of drained data that were dropped.
    pub dropped: AtomicU64,
    /// Blocks read from probation in memory, and those that came with a fetch of another read.
    pub probation_hits: AtomicU64,
    pub joined: AtomicU64,
    /// Blocks written to slots because they were read, and those that were not for lack of a slot,
    /// of time or of luck.
    pub fills: AtomicU64,
    pub fills_dropped: AtomicU64,
    /// Blocks that were worth a slot and got none for lack of write budget.
    pub fills_refused: AtomicU64,
    /// Bytes written to the flash to keep what was read or drained: fills, moves and slot tables.
    pub kept_bytes: AtomicU64,
    /// Bytes read from the backing for guests.
    pub backing_read_bytes: AtomicU64,
    /// Blocks that moved to another slab, and that went since their slab did.
    pub moves: AtomicU64,
    pub squeezed: AtomicU64,
    /// Blocks that the policy let go, and that went past the cache.
    pub evicted: AtomicU64,
    pub bypassed: AtomicU64,
    /// Replayed requests that the log had already.
    pub replayed: AtomicU64,
    /// Clean segments that were given up for new ones, and entries of the index that were looked
    /// at to forget them.
    pub retired: AtomicU64,
    pub swept: AtomicU64,
    /// Times that writes had to wait for a free segment.
    pub stalls: AtomicU64,
    pub drain_bytes: AtomicU64,
    pub drain_groups: AtomicU64,
    pub drain_retries: AtomicU64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct CacheStatus {
    pub counters: CacheCounters,
    gauges: Mutex<CacheGauges>,
}

impl CacheStatus {
    pub fn gauges(&self) -> CacheGauges {
        self.gauges.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set(&self, gauges: CacheGauges) {
        *self.gauges.lock().unwrap_or_else(PoisonError::into_inner) = gauges;
    }
}

/// Adds to a counter that this thread alone writes.
pub(super) fn count(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed) + more, Ordering::Relaxed);
}
