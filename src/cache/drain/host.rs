//! What a drainer needs of the disk that owns it.

use crate::base::clock::Nanos;
use crate::io::disk::Operation;
use crate::io::volume::DiskIndex;

/// A place in the log: a segment by its sequence, and bytes in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogCursor {
    pub segment: u64,
    pub offset: u64,
}

/// What is committed from a cursor on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogStretch {
    /// Whole batches: their first byte in the allocation, their bytes, their segment's salt.
    Batches {
        offset: u64,
        length: u64,
        salt: u64,
    },
    /// The segment ends here; the log goes on there.
    Next(LogCursor),
    End,
}

/// What the drainer needs of the disk that owns it. Tokens come back in
/// [`Drainer::completed`](super::Drainer::completed).
pub trait DrainHost {
    fn now(&self) -> Nanos;

    /// Milliseconds of the Unix epoch.
    fn wall_ms(&self) -> u64;

    /// Where reading begins to find the record after `won`: at its batch or before.
    fn seek(&self, won: u64) -> LogCursor;

    fn log(&self, cursor: LogCursor) -> LogStretch;

    /// Of a disk in a consistency group: all its numbers up to here are durable in the log, and it
    /// gives none of them any more.
    fn frontier(&self) -> u64 {
        u64::MAX
    }

    /// The device's offset of byte `offset` of the allocation, and how many of `length` bytes lie
    /// together there.
    fn place(&self, offset: u64, length: u64) -> (u64, u64);

    fn submit(&mut self, disk: DiskIndex, operation: Operation<'_>, token: u32);

    /// Makes the drain position durable on the flash: a root.
    fn write_root(&mut self, won: u64, epoch: u64, token: u32);

    /// Asks for [`Drainer::timer`](super::Drainer::timer) at `at`; an earlier wish of the owner's
    /// own stays.
    fn wake_at(&mut self, at: Nanos);
}
