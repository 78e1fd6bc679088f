//! What a drainer says of itself, and of drains that were asked for.

use crate::cache::order::Refusal;
use crate::io::disk::Errno;
use std::time::Duration;

/// Why a drain that was asked for did not get there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DrainError {
    Refused(Refusal),
    /// The log is damaged behind this point, the last good one.
    Corrupt {
        last_good: u64,
    },
}

/// Called once, when the point is durable in the backing.
pub type DrainReply = Box<dyn FnOnce(Result<u64, DrainError>) + Send>;

/// What the drainer does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainState {
    Idle,
    Draining,
    /// The backing, the sidecar or the flash failed; it is tried again.
    Retrying(Errno),
    /// The log is damaged behind `last_good`.
    Corrupt {
        last_good: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainStatus {
    pub state: DrainState,
    pub drained: u64,
    pub head: u64,
    /// The point that somebody waits for, the farthest.
    pub goal: Option<u64>,
    pub dirty_bytes: u64,
    /// Age of the oldest write that is not drained.
    pub oldest: Duration,
    /// Bytes of log a second; 0 before the first group.
    pub rate: u64,
    /// Until all that is dirty now is drained, at that rate.
    pub eta: Option<Duration>,
    pub groups: u64,
    pub retries: u64,
    /// Bytes written to the backing.
    pub drained_bytes: u64,
}
