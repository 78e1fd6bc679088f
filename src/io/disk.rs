//! What the daemon stands on: a drive, a file, or a simulation of one.

use super::buffer::Segment;
use std::fmt;
use std::fs::File;
use std::sync::Arc;

/// What a disk can do, fixed while it is open except for its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskGeometry {
    /// Bytes; a multiple of `block_bytes`.
    pub size_bytes: u64,
    /// Offsets and lengths of transfers are multiples of this (the logical block size).
    pub block_bytes: u32,
    /// Writes of this many bytes, so aligned, need no read inside the drive (the physical block
    /// size).
    pub optimal_bytes: u32,
    /// Memory addresses of transfers are multiples of this.
    pub memory_alignment: u32,
    /// [`OperationKind::Zero`] is done by the drive or file system rather than refused.
    pub zero: bool,
    /// [`OperationKind::Discard`] is done rather than refused.
    pub discard: bool,
}

/// What an operation does. Lengths and offsets are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperationKind {
    /// Fills the segments.
    Read,
    /// Writes the segments. Completed means: later reads see it, a crash of the daemon does not
    /// lose it. Durable against power loss only after a completed `Flush` that was submitted after
    /// this write completed.
    Write,
    /// As `Write`, and durable when it completes. Says nothing of other operations: one that
    /// failed leaves a write, not a flush, in doubt.
    WriteDurable,
    /// Makes every write, zero and discard that completed before it was submitted durable.
    Flush,
    /// The range reads as zeros afterwards and stays allocated. Durability as for `Write`.
    Zero,
    /// The range may be given back by the drive and reads as zeros afterwards. Durability as for
    /// `Write`.
    Discard,
}

/// An operation as it is submitted. The memory behind `segments` must stay until completion; the
/// slice itself only until `submit` returns.
#[derive(Clone, Copy, Debug)]
pub struct Operation<'a> {
    pub kind: OperationKind,
    /// Bytes from the start of the disk.
    pub offset: u64,
    /// Bytes. Equals the sum of the segments for reads and writes; 0 for a flush.
    pub length: u64,
    /// Empty unless reading or writing.
    pub segments: &'a [Segment],
}

impl OperationKind {
    /// Writes its segments.
    pub fn writes(self) -> bool {
        matches!(self, Self::Write | Self::WriteDurable)
    }

    /// Moves its segments' bytes.
    pub fn transfers(self) -> bool {
        self == Self::Read || self.writes()
    }
}

/// Why an operation failed: the `errno` of the operating system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    pub const EIO: Self = Self(libc::EIO);

    /// The disk is away.
    pub const AWAY: Self = Self(libc::ENOTCONN);

    /// The disk refuses this kind of operation and another way must be taken.
    pub fn is_unsupported(self) -> bool {
        matches!(self.0, libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS | libc::ENOTTY)
    }
}

impl From<Errno> for std::io::Error {
    fn from(errno: Errno) -> Self {
        Self::from_raw_os_error(errno.0)
    }
}

/// The end of an operation. Short transfers are failures (`EIO`): a disk either moves all bytes or
/// says why not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// As given at submission.
    pub token: u64,
    pub result: Result<(), Errno>,
}

/// A disk with explicit completions. Operations may complete in any order; overlapping ones that
/// are under way together have no order between them.
pub trait Disk {
    fn geometry(&self) -> DiskGeometry;

    /// Takes an operation on; never blocks for long and never fails here.
    fn submit(&mut self, operation: Operation<'_>, token: u64);

    /// Appends what has completed. With `wait`, blocks until at least one operation has completed
    /// if any is under way.
    fn poll(&mut self, completions: &mut Vec<Completion>, wait: bool);
}

/// Called by a disk's own threads, after completions have become ready to be polled.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// A disk that does its I/O in threads of its own, such as one behind a network connection.
pub trait OpenDisk: fmt::Debug + Send + Sync {
    fn geometry(&self) -> DiskGeometry;

    /// A handle of its own: what is submitted through it completes there. `waker` is called, in
    /// another thread and perhaps once for many, whenever [`Disk::poll`] has something.
    fn open(&self, waker: Waker) -> crate::base::Result<Box<dyn Disk + Send>>;
}

/// What a reactor opens to reach a disk on its own: the shared description of a file or device, a
/// disk with threads of its own, or nothing at all.
#[derive(Clone, Debug)]
pub enum DiskTarget {
    /// I/O goes through this very open file description, which carries the exclusive lock.
    File { file: Arc<File>, geometry: DiskGeometry },
    /// Operations are handed over to it, and the reactor is woken when they have completed.
    Threaded(Arc<dyn OpenDisk>),
    /// Every operation succeeds at once and moves no bytes. For benchmarks only.
    Null { size_bytes: u64 },
    /// It is away, and as large and coarse as it was: operations fail with `ENOTCONN` until the
    /// reactor is given another in its place.
    Away { geometry: DiskGeometry },
}

impl DiskTarget {
    /// The geometry that volumes on this disk are told. A null disk takes anything.
    pub fn geometry(&self) -> DiskGeometry {
        match self {
            Self::File { geometry, .. } | Self::Away { geometry } => *geometry,
            Self::Threaded(disk) => disk.geometry(),
            Self::Null { size_bytes } => DiskGeometry {
                size_bytes: *size_bytes,
                block_bytes: 512,
                optimal_bytes: 4096,
                memory_alignment: 1,
                zero: true,
                discard: true,
            },
        }
    }
}
