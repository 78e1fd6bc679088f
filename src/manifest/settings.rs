//! What can be changed about a volume while it exists, and how the pool remembers it: JSON in the
//! allocation's attributes, so that a restart without manifests restores every socket.

use crate::base::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

/// The version that [`VolumeSettings::encode`] writes.
const VERSION: u32 = 1;

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
struct Stored<S> {
    version: u32,
    settings: S,
}

impl VolumeSettings {
    /// The bytes that a pool keeps; below 1 KiB for any settings that a manifest can give.
    #[allow(clippy::expect_used)]
    pub fn encode(&self) -> Vec<u8> {
        let stored = Stored { version: VERSION, settings: self };
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
        if version.version != VERSION {
            let text = format!(
                "the settings of a volume in the pool have version {}, and this vflashd reads \
                 version {VERSION}: start the vflashd that wrote them",
                version.version
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let stored: Stored<Self> = serde_json::from_slice(bytes).map_err(corrupt)?;
        Ok(stored.settings)
    }
}
