//! What a cached disk is told by its own side in other threads, through `Volume::message`.

use super::alone::ClaimedBacking;
use super::curve::MissCurve;
use super::drain::DrainReply;
use super::order::Point;
use super::place::Place;
use super::root::Mode;
use crate::backing::stamp::DrainMode;
use crate::base::Result;
use std::time::Duration;

/// Called once with the answer; dropped uncalled if the disk goes first.
pub type Reply<T> = Box<dyn FnOnce(T) + Send>;

/// See the module.
pub enum CacheMessage {
    /// Drain up to a point, or to all that is committed; with `hold`, and stay there until
    /// [`CacheMessage::LetGo`].
    Drain {
        to: Option<u64>,
        hold: bool,
        reply: DrainReply,
    },
    LetGo,
    /// The points that have a name, in order.
    Points {
        reply: Reply<Vec<Point>>,
    },
    /// Names the point that the log has come to; answered with it when the mark is durable.
    Mark {
        name: String,
        reply: Reply<Result<u64>>,
    },
    /// Makes the next opening fast: all is durable and the root says how far all is drained.
    Checkpoint {
        reply: Reply<Result<()>>,
    },
    /// Answered when the mode is durable and in force. Refused while draining is held, if the mode
    /// needs it.
    SetMode {
        mode: Mode,
        reply: Reply<Result<()>>,
    },
    SetDrainMode {
        mode: DrainMode,
    },
    /// Strong: a write is durable when it is acknowledged. Else when the guest has flushed.
    SetDurability {
        strong: bool,
    },
    SetStaleness {
        staleness_max: Duration,
    },
    /// The allocation has grown to `place`, which begins with what it was. Answered when that is
    /// durable in the root and usable.
    Grow {
        place: Place,
        reply: Reply<Result<()>>,
    },
    /// Brings the disk to fewer bytes of its allocation, with all that is not drained: answered
    /// when the rest is not used any more. From then on nothing is resized before
    /// [`CacheMessage::Shrunk`].
    Shrink {
        size_bytes: u64,
        reply: Reply<Result<()>>,
    },
    /// The allocation has the size that was answered, or stays as it was.
    Shrunk,
    /// How long a request that needs the backing is tried there before it fails.
    SetBackingTimeout {
        limit: Duration,
    },
    /// How much may be written to the flash before what is read is not kept any more; `None`:
    /// without limit.
    SetWriteBudget {
        bytes_per_day: Option<u64>,
    },
    /// To a disk that was opened alone, which has been given its backing and sidecar as disks 1 and
    /// 2: they are its own. The drain begins.
    Claimed {
        backing: Box<ClaimedBacking>,
    },
    /// To a disk that was opened alone: its backing is not its own any more, and why. It is fenced.
    Refused {
        why: String,
    },
    /// Clean detach: drains all, retires the redo group, stamps the backing clean. Nothing is
    /// served any more.
    Close {
        reply: Reply<Result<()>>,
    },
    /// Leaves the consistency group: drains all, and goes on by itself when the others' stamps do
    /// not name it any more. Writes wait for the last of it.
    Leave {
        reply: Reply<Result<()>>,
    },
    /// Something has changed in the consistency group.
    Wake,
    /// What share of the guest's reads would miss at any size of the cache.
    Curve {
        reply: Reply<MissCurve>,
    },
    /// Brings the gauges up to date.
    Status {
        reply: Reply<()>,
    },
}
