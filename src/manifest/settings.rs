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

/// The version of a cached disk's that has more doors than its own: a build that does not know
/// them would leave machines without their disks.
const VERSION_SHARED: u32 = 3;

/// The settings of a volume; the default is what an empty manifest means.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VolumeSettings {
    pub limits: Limits,
    /// Queues offered to the guest; `None`: as many as there can be.
    pub queues: Option<u16>,
    pub read_only: bool,
    /// The guest's memory is pinned while it is attached.
    #[serde(default, skip_serializing_if = "is_default")]
    pub pin_memory: bool,
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
    /// Bytes a day that log and fills may write to the flash before fills wait; `None`: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_budget_bytes: Option<u64>,
    /// As a manifest writes it; a path is absolute.
    pub backing: String,
    /// `None`: beside the backing.
    pub sidecar: Option<String>,
    /// The disks of one name are drained together, in one order; all in one pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistency_group: Option<String>,
    /// Its size follows its use. `None`: it is as large as it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<CacheShare>,
}

/// How large a cache may be that shares its pool with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CacheShare {
    /// Reserved: it is never smaller.
    pub minimum_bytes: u64,
    /// It is never larger.
    pub maximum_bytes: u64,
    /// How much a hit counts beside one of another cache.
    pub weight: u32,
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

    /// What keeps several machines from writing a disk with these settings, and what to write.
    pub fn refuse_writers(&self) -> Option<String> {
        if matches!(self.mode, CacheMode::WriteBack | CacheMode::WriteThrough) {
            return None;
        }
        Some(format!(
            "`mode: {}` writes past the log, so a write that a kill cuts off is done again, over \
             what another machine has written since: write `mode: write-back` or `mode: \
             write-through`, or have all others read only (`readOnly: true`)",
            self.mode.name()
        ))
    }

    /// What keeps a disk with these settings out of its consistency group: the key, and what to
    /// write.
    pub fn refuse_in_group(&self) -> Option<(&'static str, String)> {
        self.consistency_group.as_ref()?;
        let refuse = |key, is: &str, why, fix| {
            let text = format!("`{key}: {is}` {why}: write {fix}, or leave `consistencyGroup` out");
            Some((key, text))
        };
        if !matches!(self.mode, CacheMode::WriteBack | CacheMode::WriteThrough) {
            let why = "writes past the log, and `consistencyGroup` keeps the order of the log";
            return refuse("mode", self.mode.name(), why, "`mode: write-back`");
        }
        if self.drain == Some(Drain::Ordered) {
            let why = "moves each disk by itself, and `consistencyGroup` moves all by redo groups";
            return refuse("drain", "ordered", why, "`drain: grouped`");
        }
        if self.durability == Durability::Flush {
            let why = "may lose a write of one disk and keep a later one of another";
            return refuse("durability", "flush", why, "`durability: strong`");
        }
        None
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

/// A further machine's way to a cached disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Door {
    /// `VM/VOLUME`
    pub name: String,
    /// From 1; the disk's own door is 0. It names requests in the log, so it stays.
    pub number: u16,
    /// By `sharedWith` of the disk's own volume, not by a volume of the machine.
    pub granted: bool,
    /// Without `cache`, which the disk has once.
    pub settings: VolumeSettings,
}

/// Who else has a cached disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sharing {
    /// The volume that the disk is named after has left it to the others.
    pub left: bool,
    pub doors: Vec<Door>,
}

/// All that a pool keeps of a volume beside its extents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    pub settings: VolumeSettings,
    /// Of a cached disk.
    pub log: Option<LogIdentity>,
    /// Likewise.
    pub sharing: Sharing,
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
    #[serde(default, skip_serializing_if = "StoredSharing::is_default")]
    sharing: StoredSharing,
}

#[derive(Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredSharing {
    left: bool,
    doors: Vec<StoredDoor>,
}

/// A door in few bytes: what is as by default is left out.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct StoredDoor {
    name: String,
    number: u16,
    #[serde(default, skip_serializing_if = "is_default")]
    granted: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    limits: Limits,
    #[serde(default, skip_serializing_if = "is_default")]
    queues: Option<u16>,
    #[serde(default, skip_serializing_if = "is_default")]
    read_only: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    pin_memory: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    access: Access,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl StoredSharing {
    fn is_default(&self) -> bool {
        is_default(self)
    }
}

impl From<Door> for StoredDoor {
    fn from(door: Door) -> Self {
        let Door { name, number, granted, settings } = door;
        // The pattern names every field, so that a new one cannot be forgotten here.
        let VolumeSettings { limits, queues, read_only, pin_memory, .. } = settings;
        let VolumeSettings { when_full: _, access, cache: _, .. } = settings;
        Self { name, number, granted, limits, queues, read_only, pin_memory, access }
    }
}

impl From<StoredDoor> for Door {
    fn from(door: StoredDoor) -> Self {
        let StoredDoor { name, number, granted, limits, queues, read_only, .. } = door;
        let StoredDoor { pin_memory, access, .. } = door;
        let settings = VolumeSettings {
            limits,
            queues,
            read_only,
            pin_memory,
            access,
            ..VolumeSettings::default()
        };
        Self { name, number, granted, settings }
    }
}

impl Attributes {
    /// The bytes that a pool keeps; below 1 KiB for any settings that a manifest can give, but for
    /// the paths and the further doors of a cached disk.
    #[allow(clippy::expect_used)]
    pub fn encode(&self) -> Vec<u8> {
        let Self { settings, log, sharing } = self.clone();
        let version = match (&settings.cache, sharing == Sharing::default()) {
            (None, _) => VERSION,
            (Some(_), true) => VERSION_CACHED,
            (Some(_), false) => VERSION_SHARED,
        };
        let Sharing { left, doors } = sharing;
        let sharing = StoredSharing { left, doors: doors.into_iter().map(Into::into).collect() };
        let stored = Stored { version, settings, log, sharing };
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
        if !(VERSION..=VERSION_SHARED).contains(&version.version) {
            let text = format!(
                "the settings of a volume in the pool have version {}, and this vflashd reads \
                 versions {VERSION} to {VERSION_SHARED}: start the vflashd that wrote them",
                version.version
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let stored: Stored = serde_json::from_slice(bytes).map_err(corrupt)?;
        let cached = stored.settings.cache.is_some();
        let shared = !stored.sharing.is_default();
        if cached != (version.version >= VERSION_CACHED)
            || shared != (version.version == VERSION_SHARED)
            || cached != stored.log.is_some()
        {
            let text = "the settings of a volume in the pool contradict each other; `vflash pool \
                        check` tells whether the pool is whole";
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        let StoredSharing { left, doors } = stored.sharing;
        let sharing = Sharing { left, doors: doors.into_iter().map(Into::into).collect() };
        Ok(Self { settings: stored.settings, log: stored.log, sharing })
    }
}

impl VolumeSettings {
    /// As [`Attributes::encode`], of a flash volume.
    pub fn encode(&self) -> Vec<u8> {
        Attributes { settings: self.clone(), ..Attributes::default() }.encode()
    }

    /// As [`Attributes::decode`].
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        Ok(Attributes::decode(bytes)?.settings)
    }
}
