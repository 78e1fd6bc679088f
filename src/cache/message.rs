//! What a cached disk is told by its own side in other threads, through `Volume::message`.

use super::drain::DrainReply;
use super::order::Point;
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
    /// Answered when the mode is durable and in force.
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
    /// Clean detach: drains all, retires the redo group, stamps the backing clean. Nothing is
    /// served any more.
    Close {
        reply: Reply<Result<()>>,
    },
    /// Leaves the consistency group: drains all, and goes on by itself when the others' stamps do
    /// not name it any more. Writes wait meanwhile.
    Leave {
        reply: Reply<Result<()>>,
    },
    /// Something has changed in the consistency group.
    Wake,
    /// Brings the gauges up to date.
    Status {
        reply: Reply<()>,
    },
}
