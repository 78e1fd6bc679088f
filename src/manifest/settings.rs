//! What can be changed about a volume while it exists, and how the pool remembers it: JSON in the
//! allocation's attributes, so that a restart without manifests restores every socket.

use super::schema::{CacheMode, Drain, Durability};
use crate::base::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

/// The version of a flash volume's attributes.
const VERSION: u32 = 1;

/// The version of a cached disk's: a build that does not know caches must not serve the log as if
/// it were the disk.
const VERSION_CACHED: u32 = 2;

/// The settings of a volume; the default is what an empty manifest means.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VolumeSettings {
    pub limits: Limits,
    /// Queues offered to the guest; `None`: as many as there can be.
    pub queues: Option<u16>,
    pub read_only: bool,
    /// Matters to thin volumes alone.
    pub when_full: WhenFull,
    pub access: Access,
    /// `None`: a flash volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheSettings>,
}

/// The settings of a cached disk; backing and sidecar are fixed when it is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CacheSettings {
    pub mode: CacheMode,
    /// `None`: grouped where a sidecar is possible.
    pub drain: Option<Drain>,
    /// `None`: [`STALENESS_MS`].
    pub staleness_ms: Option<u64>,
    pub durability: Durability,
    /// `None`: [`BACKING_TIMEOUT_MS`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_timeout_ms: Option<u64>,
    /// As a manifest writes it; a path is absolute.
    pub backing: String,
    /// `None`: beside the backing.
    pub sidecar: Option<String>,
}

/// How far a backing may be behind unless told otherwise, in milliseconds.
pub const STALENESS_MS: u64 = 10_000;

/// How long a request is tried at a backing that fails unless told otherwise, in milliseconds:
/// shorter than what a Linux guest calls a hung task.
pub const BACKING_TIMEOUT_MS: u64 = 60_000;

impl CacheSettings {
    pub fn backing_timeout_ms(&self) -> u64 {
        self.backing_timeout_ms.unwrap_or(BACKING_TIMEOUT_MS)
    }

    pub fn staleness_ms(&self) -> u64 {
        self.staleness_ms.unwrap_or(STALENESS_MS)
    }
}

/// What only the daemon says of a cached disk's log: it tells one allocation of a backing from
/// another, and a backing that was rolled back from one that was not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LogIdentity {
    /// Of the log; the backing's owner stamp names it.
    pub uuid: uuid::Uuid,
    /// The last epoch of ownership that the log had its backing in; 0: it never had.
    pub owner_epoch: u64,
    /// The backing's point when it was claimed for that epoch: it is never behind it again.
    pub point: u64,
    /// In that epoch the backing was drained in groups alone, so that it is never behind the
    /// log's own drain position.
    pub grouped: bool,
    /// The roots of the log have been written: without them it is damaged, not new.
    pub formatted: bool,
}

/// All that a pool keeps of a volume beside its extents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    pub settings: VolumeSettings,
    /// Of a cached disk.
    pub log: Option<LogIdentity>,
}

/// Rate limits; the default is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Limits {
    /// Requests per second.
    pub iops: Option<u64>,
    /// Bytes per second.
    pub bandwidth: Option<u64>,
    /// How long unused allowance is saved up, in milliseconds.
    pub burst_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { iops: None, bandwidth: None, burst_ms: 100 }
    }
}

/// What a write to a thin volume does when the pool has no extent left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum WhenFull {
    /// Waits until there is space.
    #[default]
    Wait,
    /// Fails, as on a full drive.
    Enospc,
}

impl WhenFull {
    pub fn name(self) -> &'static str {
        match self {
            Self::Wait => "wait",
            Self::Enospc => "enospc",
        }
    }
}

/// Who may connect to a volume's socket; virtual machine monitors run as users of their own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Access {
    /// `None`: the daemon's own.
    pub owner: Option<Principal>,
    /// `None`: the daemon's own.
    pub group: Option<Principal>,
    /// Permission bits, at most 0o777.
    pub mode: u32,
}

impl Default for Access {
    fn default() -> Self {
        Self { owner: None, group: None, mode: 0o600 }
    }
}

/// A user or a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Principal {
    Id(u32),
    Name(String),
}

impl std::fmt::Display for Principal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Id(id) => write!(f, "{id}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    version: u32,
    settings: VolumeSettings,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    log: Option<LogIdentity>,
}

impl Attributes {
    /// The bytes that a pool keeps; below 1 KiB for any settings that a manifest can give, but for
    /// the paths of a cached disk.
    #[allow(clippy::expect_used)]
    pub fn encode(&self) -> Vec<u8> {
        let Self { settings, log } = self.clone();
        let version = if settings.cache.is_some() { VERSION_CACHED } else { VERSION };
        let stored = Stored { version, settings, log };
        serde_json::to_vec(&stored).expect("strings and numbers always go into JSON")
    }

    /// Reads what [`encode`](Self::encode) wrote. Anything unknown is refused, a newer version by
    /// name, because settings half understood would be served to a guest.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let corrupt = |error| {
            let text = "the settings of a volume in the pool cannot be read; `vflash pool check` \
                        tells whether the pool is whole";
            Error::with(ErrorKind::Corrupt, text, error)
        };
        let version: Version = serde_json::from_slice(bytes).map_err(corrupt)?;
        if ![VERSION, VERSION_CACHED].contains(&version.version) {
            let text = format!(
                "the settings of a volume in the pool have version {}, and this vflashd reads \
                 versions {VERSION} and {VERSION_CACHED}: start the vflashd that wrote them",
                version.version
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let stored: Stored = serde_json::from_slice(bytes).map_err(corrupt)?;
        let cached = stored.settings.cache.is_some();
        if cached != (version.version == VERSION_CACHED) || cached != stored.log.is_some() {
            let text = "the settings of a volume in the pool contradict each other; `vflash pool \
                        check` tells whether the pool is whole";
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        Ok(Self { settings: stored.settings, log: stored.log })
    }
}

impl VolumeSettings {
    /// As [`Attributes::encode`], of a flash volume.
    pub fn encode(&self) -> Vec<u8> {
        Attributes { settings: self.clone(), log: None }.encode()
    }

    /// As [`Attributes::decode`].
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        Ok(Attributes::decode(bytes)?.settings)
    }
}
