//! What the daemon serves: a volume takes checked requests of its guests and completes them.
//!
//! A volume lives on one reactor and is called by it alone, so it needs no locks. It never blocks:
//! it submits operations through [`Io`] and is called back with their completions. The same volume
//! runs on a simulated `Io` in tests.

use super::buffer::Segment;
use super::disk::{Errno, Operation};
use crate::base::clock::Nanos;
use std::any::Any;

/// Bits of the tokens that a volume gives its operations.
pub const TOKEN_BITS: u32 = 30;

/// Names a request under way. Dense: below [`Volume::attach`]'s `requests_max`, reused after
/// completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(pub u32);

/// One of the disks that a volume was given, by position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskIndex(pub u8);

/// A run of 512-byte sectors of the volume, within its capacity (checked by the caller).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectorRange {
    pub start: u64,
    pub count: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// One range; the segments hold exactly its bytes.
    Read,
    /// One range; the segments hold exactly its bytes.
    Write,
    /// No range. Completes when every write that completed before it is durable.
    Flush,
    /// Ranges read as zeros afterwards and may lose their space.
    Discard,
    /// Ranges read as zeros afterwards. `unmap`: they may lose their space.
    WriteZeroes { unmap: bool },
}

/// Where a request came from, so that a journal can tell a replayed one: the in-flight area's
/// counter of its queue. It names the same request again after the daemon was restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The door that it came through, which stands for the in-flight area: each virtual machine
    /// that shares the volume has its own.
    pub door: u16,
    pub queue: u16,
    pub counter: u64,
    /// The request was under way when an earlier daemon died.
    pub replayed: bool,
}

#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    pub id: RequestId,
    pub kind: RequestKind,
    pub ranges: &'a [SectorRange],
    /// Guest memory; stays mapped until the request is completed.
    pub segments: &'a [Segment],
    pub origin: Origin,
}

/// How a request ended, as the guest's status byte will say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// `VIRTIO_BLK_S_OK`
    Done,
    /// `VIRTIO_BLK_S_IOERR`
    Failed,
    /// `VIRTIO_BLK_S_UNSUPP`
    Unsupported,
}

/// What a reactor offers a volume during a call.
pub trait Io {
    /// The time of this turn of the reactor.
    fn now(&self) -> Nanos;

    /// Submits to one of the volume's disks; the completion comes as [`Volume::completed`] with
    /// `token`, which is below 2^[`TOKEN_BITS`]. The memory behind the segments must stay until
    /// then.
    fn submit(&mut self, disk: DiskIndex, operation: Operation<'_>, token: u64);

    /// Ends a request. Each is ended exactly once.
    fn complete(&mut self, request: RequestId, outcome: Outcome);

    /// Asks for [`Volume::timer`] at `at` or soon after. A later call replaces an earlier one.
    fn wake_at(&mut self, at: Nanos);
}

/// A virtual disk as its reactor sees it.
pub trait Volume: Send {
    /// Called once, on the reactor, before any request: at most `requests_max` are under way at a
    /// time. All memory of the data path is taken here.
    fn attach(&mut self, requests_max: u32);

    /// A guest's request, already checked against capacity, read-only and features.
    fn submit(&mut self, request: Request<'_>, io: &mut dyn Io);

    /// All that one look at the queues found has been submitted: a volume that gathers requests
    /// begins their operations now at the latest.
    fn gathered(&mut self, _io: &mut dyn Io) {}

    /// An operation of this volume has completed.
    fn completed(&mut self, token: u64, result: Result<(), Errno>, io: &mut dyn Io);

    /// The time asked for by [`Io::wake_at`] has come.
    fn timer(&mut self, _io: &mut dyn Io) {}

    /// A message from the volume's own side in another thread.
    fn message(&mut self, _message: Box<dyn Any + Send>, _io: &mut dyn Io) {}

    /// The queue of this request stops, or its front end has gone. A request that waits, for space
    /// say, and of which nothing is under way, is forgotten: true, and it is not ended. It is still
    /// marked in the in-flight area, so a front end that comes back asks again. Any other goes on
    /// and is ended as ever.
    fn let_go(&mut self, _request: RequestId, _io: &mut dyn Io) -> bool {
        false
    }

    /// The guest switched its write cache (virtio-blk `writeback` in the config space).
    /// False: every write must be durable when it completes. Of several guests the strictest
    /// counts.
    fn set_write_cache(&mut self, _enabled: bool) {}
}
