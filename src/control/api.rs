//! What goes over the API socket, for both sides: the daemon and the command line.
//!
//! The prose is in openapi.yaml, which a test holds to these types field by field. Names are
//! camelCase as in manifests; sizes are bytes, times are milliseconds of the Unix epoch.

use super::api_cached::{Cache, CachedDisk};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};

/// The run directory unless told otherwise.
pub const RUN_DIR: &str = "/run/vflash";

/// The environment variable that names the run directory.
pub const RUN_DIR_VARIABLE: &str = "VFLASH_RUN_DIR";

/// Bytes of a request body. Manifests of a thousand machines fit.
pub const BODY_BYTES_MAX: usize = 8 << 20;

/// Entries of a virtqueue that front ends are told to use.
pub const QUEUE_SIZE: u16 = 256;

/// The API's socket in a run directory.
pub fn socket_path(run_dir: &Path) -> PathBuf {
    run_dir.join("api.sock")
}

macro_rules! wire {
    ($($(#[$attribute:meta])* pub $kind:ident $name:ident $body:tt)*) => {$(
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(rename_all = "camelCase")]
        $(#[$attribute])*
        pub $kind $name $body
    )*};
}
pub(super) use wire;

wire! {
    /// `GET /healthz`
    pub struct Health {
        pub state: State,
        pub problems: Vec<String>,
    }

    #[derive(Copy, Eq)]
    pub enum State {
        /// Pools are still being opened.
        Starting,
        Ok,
        /// Some pool or volume is not served, or the manifests of `-f` were not applied.
        Degraded,
    }

    /// `GET /v1/status`
    pub struct Status {
        pub version: String,
        pub pid: u32,
        /// Differs between two daemons; sequence numbers of events start anew with it.
        pub instance: String,
        pub run_dir: String,
        pub started_ms: u64,
        pub reactors: usize,
        pub state: State,
        pub problems: Vec<String>,
        pub pools: usize,
        /// Of the open ones.
        pub space: Vec<PoolSpace>,
        pub volumes: usize,
        pub attached: usize,
        /// Sequence number of the newest event.
        pub last_event: u64,
        /// Of all volumes.
        pub waiting: Option<Waiting>,
        pub caches: Vec<CachedDisk>,
    }

    /// Requests that are taken and wait for something else than the drive: for space, most of all.
    #[derive(Copy, Eq)]
    pub struct Waiting {
        pub requests: u64,
        /// How long the oldest of them has waited.
        pub oldest_ms: u64,
    }

    /// How full a pool is.
    pub struct PoolSpace {
        pub pool: String,
        pub watermark: Watermark,
        pub free_bytes: u64,
    }

    /// Where the bytes of a pool are.
    pub struct Space {
        pub total_bytes: u64,
        pub allocated_bytes: u64,
        /// Can be given out at once.
        pub free_bytes: u64,
        /// Freed, to be zeroed before the next owner gets it.
        pub scrub_bytes: u64,
        pub metadata_bytes: u64,
        /// Sizes of all volumes; more than the device if thin ones promise more.
        pub provisioned_bytes: u64,
        pub watermark: Watermark,
    }

    #[derive(Copy, Eq)]
    pub enum Watermark {
        Normal,
        /// At least 80 % allocated.
        High,
        /// At least 95 %.
        Critical,
        Full,
    }

    #[derive(Copy, Eq)]
    pub enum PoolState {
        Ok,
        /// A commit failed; changes are refused until it is settled.
        Fenced,
        /// Could not be opened, or its keeper has ended by a defect.
        Failed,
        /// Its file is being made.
        Making,
    }

    pub struct Pool {
        pub name: String,
        /// Empty if the pool could not be opened.
        pub uuid: String,
        pub device: String,
        pub state: PoolState,
        /// Why the state is not `ok`.
        pub message: Option<String>,
        pub space: Option<Space>,
        /// Since the daemon started.
        pub scrubbed_bytes: u64,
        /// Requests of thin volumes that wait until there is space.
        pub waiting_requests: usize,
        /// A check under way.
        pub check: Option<CheckProgress>,
        pub volumes: usize,
    }

    /// How far a check has come.
    pub struct CheckProgress {
        pub done_bytes: u64,
        /// Of metadata to be read.
        pub total_bytes: u64,
    }

    pub struct Pools {
        pub pools: Vec<Pool>,
    }

    /// `POST /v1/pools`
    #[serde(deny_unknown_fields)]
    pub struct CreatePool {
        pub name: String,
        /// A block device, or a file.
        pub device: String,
        /// For a file to be created; an existing file or device is used whole.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub size_bytes: Option<u64>,
        /// Of a file to be created.
        #[serde(default)]
        pub preallocation: Preallocation,
        /// Devices whose content may be destroyed, by path.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        pub confirm: Vec<String>,
    }

    /// `POST …/close`
    #[serde(deny_unknown_fields)]
    pub struct ClosePool {
        /// Also if volumes of it are attached.
        #[serde(default)]
        pub force: bool,
    }

    pub struct Check {
        pub pool: String,
        /// No finding.
        pub clean: bool,
        pub findings: Vec<Finding>,
        pub volumes: usize,
        pub mapped_bytes: u64,
        pub scrub_bytes: u64,
        pub free_bytes: u64,
        pub metadata_bytes: u64,
    }

    pub struct Finding {
        /// On the device.
        pub offset_bytes: u64,
        pub text: String,
        /// The other copy is whole: the next opening repairs it, nothing is lost.
        pub repairable: bool,
    }

    /// `GET /v1/manifest`
    pub struct Manifest {
        /// YAML documents that make anew what there is.
        pub text: String,
    }

    /// What the blocks of a new pool file are.
    #[derive(Copy, Eq, Default)]
    pub enum Preallocation {
        /// Their space is reserved; the file system notes the first write to each.
        #[default]
        Reserved,
        /// Zeros are written over the whole file once, so that no later write is the first.
        Written,
    }

    #[derive(Copy, Eq)]
    pub enum Class {
        Volatile,
        Nonvolatile,
    }

    pub struct Limits {
        pub iops: Option<u64>,
        pub bandwidth_bytes: Option<u64>,
        pub burst_ms: u64,
    }

    #[derive(Copy, Eq)]
    pub enum VolumeState {
        /// Its backing has not answered yet; its socket opens when it does.
        Opening,
        /// Its socket is open.
        Served,
        /// Not served, or being taken down; see the message.
        Failed,
        /// Its machine has left its disk, which stays for others.
        Left,
        /// It failed by a defect: its socket is open and its requests fail.
        Fenced,
    }

    pub struct Volume {
        /// `VM/VOLUME`
        pub name: String,
        pub pool: String,
        /// The volume whose disk it shares; none: its own.
        pub disk_of: Option<String>,
        pub size_bytes: u64,
        /// Bytes of the device that it holds.
        pub mapped_bytes: u64,
        pub thin: bool,
        pub class: Class,
        pub read_only: bool,
        pub limits: Limits,
        pub serial: String,
        pub socket: String,
        pub state: VolumeState,
        pub message: Option<String>,
        pub attached: bool,
        /// The VMM's process, where it is attached.
        pub peer_pid: Option<i32>,
        pub queues_running: u16,
        /// Guest memory is to be pinned.
        pub pin_memory: bool,
        /// Of the guest, where it is attached.
        pub memory_bytes: u64,
        /// Of these, pinned and used so.
        pub pinned_bytes: u64,
        pub write_cache: bool,
        /// Pieces copied since the daemon started, because the drive cannot take the guest's
        /// memory as it lies.
        pub bounced_pieces: u64,
        /// None if nothing does.
        pub waiting: Option<Waiting>,
        pub operations: Vec<Operations>,
        /// Of a cached disk.
        pub cache: Option<Cache>,
    }

    /// Counters since the daemon started, per kind of request.
    pub struct Operations {
        pub kind: String,
        pub operations: u64,
        pub bytes: u64,
        pub errors: u64,
    }

    pub struct Volumes {
        pub volumes: Vec<Volume>,
    }

    /// What a front end needs to attach a volume.
    pub struct Attachment {
        pub name: String,
        pub socket: String,
        pub serial: String,
        pub size_bytes: u64,
        pub read_only: bool,
        /// A front end may use as many, and must not ask for more.
        pub queues_max: u16,
        pub queue_size: u16,
        pub attached: bool,
    }

    /// `POST …/resize`
    #[serde(deny_unknown_fields)]
    pub struct Resize {
        pub size_bytes: u64,
        /// Must hold `VM/VOLUME` to shrink it: what is behind the new end is lost.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        pub confirm: Vec<String>,
    }

    /// `POST …/reclaim`
    #[serde(deny_unknown_fields)]
    pub struct Reclaim {
        /// Also if it is attached.
        #[serde(default)]
        pub force: bool,
        /// Must hold `VM/VOLUME`: its content is lost.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        pub confirm: Vec<String>,
    }

    /// A file of manifests.
    #[derive(Eq)]
    #[serde(deny_unknown_fields)]
    pub struct Source {
        /// Stands in messages as the file name.
        pub name: String,
        /// Where relative paths start; absolute. Without it they are refused.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub directory: Option<String>,
        pub text: String,
    }

    /// `POST /v1/apply`, `/v1/diff`, `/v1/delete`
    #[serde(deny_unknown_fields)]
    pub struct Change {
        pub sources: Vec<Source>,
        /// For deletion: also what is attached.
        #[serde(default)]
        pub force: bool,
        /// What may be destroyed: `VM/VOLUME`, or the path of a device that becomes a pool.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        pub confirm: Vec<String>,
    }

    /// What a change consists of, or consisted of.
    pub struct Plan {
        pub steps: Vec<Step>,
        /// What must be confirmed first.
        pub destroys: Vec<String>,
        /// The steps were carried out.
        pub done: bool,
    }

    #[derive(Copy, Eq)]
    pub enum Action {
        Create,
        Open,
        Update,
        Resize,
        Delete,
    }

    pub struct Step {
        pub action: Action,
        /// `pool NAME` or `volume VM/VOLUME`
        pub object: String,
        /// What changes, from what to what.
        pub detail: String,
        pub destroys: bool,
    }

    #[derive(Copy, Eq)]
    pub enum EventKind {
        Started,
        PoolOpened,
        PoolFailed,
        PoolCreated,
        PoolGrown,
        PoolClosed,
        Watermark,
        ScrubProgress,
        Created,
        Deleted,
        Resized,
        /// A cache takes or gives a step of its pool, by the curves.
        Balanced,
        Updated,
        Attached,
        Detached,
        WriteCache,
        Drained,
        LogFull,
        BackingAway,
        BackingBack,
        Fenced,
        Error,
    }

    pub struct Event {
        /// Counts from 1 in each daemon, without gaps.
        pub sequence: u64,
        pub time_ms: u64,
        pub kind: EventKind,
        /// `pool NAME`, `volume VM/VOLUME` or `vflashd`
        pub object: String,
        pub message: String,
    }

    pub struct Events {
        /// Of the daemon; when it changes, ask again from 0.
        pub instance: String,
        pub events: Vec<Event>,
        /// Events after the asked-for number that were forgotten already.
        pub lost: u64,
        /// To be asked from next.
        pub last: u64,
    }

    /// A mistake in a manifest.
    pub struct Mistake {
        pub file: String,
        pub line: u32,
        pub column: u32,
        pub message: String,
    }

    #[derive(Copy, Eq)]
    pub enum ErrorCode {
        /// The request is wrong; see `mistakes` for manifests.
        Invalid,
        /// Something would be destroyed that is not in `confirm`.
        Unconfirmed,
        NotFound,
        /// Attached, in use, or there already.
        Busy,
        Full,
        Forbidden,
        NotAllowed,
        TooLarge,
        Timeout,
        Unsupported,
        Fenced,
        Corrupt,
        Io,
        Internal,
        Overloaded,
    }

    /// The body of every answer that is not a success.
    pub struct Failure {
        pub code: ErrorCode,
        /// What failed, where, and what to do.
        pub message: String,
        #[serde(default)]
        pub mistakes: Vec<Mistake>,
        /// With `unconfirmed`: what must be named.
        #[serde(default)]
        pub unconfirmed: Vec<String>,
    }
}

/// How a wire enum is written.
macro_rules! written_as_on_the_wire {
    ($($name:ident)*) => {$(
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let value = serde_json::to_value(self).map_err(|_| std::fmt::Error)?;
                f.pad(value.as_str().ok_or(std::fmt::Error)?)
            }
        }
    )*};
}
pub(super) use written_as_on_the_wire;

written_as_on_the_wire! {
    State Watermark PoolState Preallocation Class VolumeState Action EventKind ErrorCode
}

/// As a manifest's compiler message: `file:line:column: message`.
impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: {}", self.file, self.line, self.column, self.message)
    }
}

/// The message, then each mistake on a line of its own.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        self.mistakes.iter().try_for_each(|mistake| write!(f, "\n{mistake}"))
    }
}

impl std::error::Error for Failure {}

impl ErrorCode {
    /// The HTTP status that goes with it.
    pub fn status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::NotAllowed => 405,
            Self::Timeout => 408,
            Self::Unconfirmed | Self::Busy => 409,
            Self::TooLarge => 413,
            Self::Internal | Self::Io | Self::Corrupt => 500,
            Self::Unsupported => 501,
            Self::Overloaded | Self::Fenced => 503,
            Self::Full => 507,
        }
    }
}

impl Failure {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), mistakes: Vec::new(), unconfirmed: Vec::new() }
    }
}
