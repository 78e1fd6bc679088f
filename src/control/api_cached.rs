//! What goes over the API socket about cached disks; [`super::api`] has the rest.

use super::api::wire;
pub use crate::manifest::{CacheMode, Drain as DrainKind, Durability};
use serde::{Deserialize, Serialize};

wire! {
    #[derive(Copy, Eq)]
    pub enum CacheState {
        /// Its backing has not answered yet.
        Opening,
        /// It could not be opened; it is tried again where that may help.
        Failed,
        Serving,
        Draining,
        /// The backing fails; writes go on until the log is full.
        WaitingForBacking,
        /// Acknowledged data is damaged: nothing is served.
        Fenced,
        /// All is in the backing, and nothing more is taken.
        Closed,
    }

    /// A cached disk beside what every volume has.
    pub struct Cache {
        pub backing: String,
        /// Volumes that have the disk, each with a socket of its own.
        pub doors: Vec<String>,
        pub sidecar: Option<String>,
        /// Of the pool.
        pub size_bytes: u64,
        /// The size that it is being brought to.
        pub resizing_to_bytes: Option<u64>,
        /// Bytes behind that end that are still in use: to be drained and forgotten.
        pub leaving_bytes: u64,
        /// If its size follows its use.
        pub share: Option<Share>,
        /// In force.
        pub mode: CacheMode,
        /// What was asked for last.
        pub mode_wanted: CacheMode,
        pub drain: DrainKind,
        pub staleness_ms: u64,
        pub durability: Durability,
        /// How long a request is tried at a backing that fails.
        pub backing_timeout_ms: u64,
        /// Bytes a day that may be written to the flash before what is read is not kept.
        pub write_budget_bytes: Option<u64>,
        /// It is drained together with the other disks of this group, in one order.
        pub consistency_group: Option<String>,
        pub state: CacheState,
        /// Why it is not simply serving.
        pub message: Option<String>,
        /// Bytes of log that the backing lacks.
        pub dirty_bytes: u64,
        pub oldest_dirty_ms: u64,
        /// Thousandths of the log that hold what the backing lacks.
        pub log_fill_permille: u64,
        /// The newest committed write.
        pub head_won: u64,
        /// The backing is here.
        pub drained_won: u64,
        pub epoch: u64,
        /// Draining stays at this point until it is told to go on.
        pub held_at: Option<u64>,
        /// Bytes of log a second.
        pub drain_rate_bytes: u64,
        pub drain_eta_ms: Option<u64>,
        /// Requests that wait for space in the log.
        pub waiting_requests: u64,
        pub index_bytes: u64,
        pub index_pieces: u64,
        /// Single blocks on flash that the backing has too.
        pub clean_bytes: u64,
        /// Blocks in memory that were read once.
        pub probation_bytes: u64,
        /// What is read is not kept: the backing reads faster than the flash.
        pub backing_faster: bool,
        /// Memory that knows what is worth keeping, beside the index.
        pub policy_bytes: u64,
        /// What is read is not written to the flash: the write budget is used up for now.
        pub budget_used_up: bool,
        pub counters: Vec<CacheCounter>,
    }

    /// Between what sizes a cache follows its use.
    pub struct Share {
        pub minimum_bytes: u64,
        pub maximum_bytes: u64,
        /// How much its hits count beside those of others.
        pub weight: u32,
        /// The size that its curve gives it; it comes there by steps that are worth it.
        pub goal_bytes: Option<u64>,
    }

    /// In `GET /v1/status`.
    pub struct CachedDisk {
        /// `VM/VOLUME`
        pub name: String,
        pub cache: Cache,
    }

    /// Since the disk was opened.
    pub struct CacheCounter {
        pub name: String,
        pub value: u64,
    }

    /// `POST …/drain`
    #[derive(Default)]
    #[serde(deny_unknown_fields)]
    pub struct Drain {
        /// A write-order number; all that is committed without it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub to: Option<u64>,
        /// Instead: the name of a mark.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub point: Option<String>,
        /// Stay at that point until the next call without it.
        #[serde(default)]
        pub hold: bool,
    }

    /// A drain that was begun, or is done.
    pub struct Draining {
        pub target_won: u64,
        pub drained_won: u64,
        pub done: bool,
    }

    #[derive(Copy, Eq)]
    pub enum PointKind {
        /// The backing is here.
        Drained,
        /// A FLUSH of the guest lies behind this write.
        Flush,
        /// Named by a person.
        Mark,
        /// The newest committed write.
        Head,
    }

    pub struct Point {
        pub won: u64,
        pub kind: PointKind,
        /// Of a mark.
        pub name: Option<String>,
        /// That a FLUSH ended.
        pub epoch: Option<u64>,
    }

    /// `GET …/points`
    pub struct Points {
        pub points: Vec<Point>,
    }

    /// `GET …/curve`
    pub struct Curve {
        /// `VM/VOLUME`
        pub name: String,
        /// Of its cache at present.
        pub size_bytes: u64,
        /// Blocks of 4 KiB that were read; older reads count less and less.
        pub reads: u64,
        /// From no cache to where more brings nothing.
        pub points: Vec<CurvePoint>,
    }

    pub struct CurvePoint {
        /// Of a cache.
        pub size_bytes: u64,
        /// Of a million reads, so many would hit.
        pub hits_per_million: u64,
    }

    /// `GET /v1/advice`
    pub struct Advice {
        pub step_bytes: u64,
        pub disks: Vec<DiskAdvice>,
        /// The move of a step that brings most hits, if any does.
        pub best: Option<AdviceMove>,
    }

    /// What a step less or more would do to a cached disk.
    pub struct DiskAdvice {
        /// `VM/VOLUME`
        pub name: String,
        pub pool: String,
        /// Of its cache at present.
        pub size_bytes: u64,
        pub reads: u64,
        pub less_hits_per_million: u64,
        pub hits_per_million: u64,
        pub more_hits_per_million: u64,
    }

    pub struct AdviceMove {
        /// `VM/VOLUME`; none: from what nobody has.
        pub from: Option<String>,
        pub to: String,
        pub bytes: u64,
        /// Of a million reads of all disks, so many more would hit.
        pub gain_per_million: u64,
    }

    /// `POST …/mark`
    #[serde(deny_unknown_fields)]
    pub struct Mark {
        pub name: String,
    }

    /// `POST …/mode`
    #[serde(deny_unknown_fields)]
    pub struct SetMode {
        pub mode: CacheMode,
    }

    /// `POST …/detach`
    #[derive(Default)]
    #[serde(deny_unknown_fields)]
    pub struct Detach {
        /// Give up what only the flash holds.
        #[serde(default)]
        pub lost: bool,
        /// Must hold `VM/VOLUME` for that.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        pub confirm: Vec<String>,
    }
}

super::api::written_as_on_the_wire! { CacheState PointKind }
