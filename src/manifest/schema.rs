//! What a manifest says, after it was read and found right. The reference is in the README.

use super::mistake::{Located, Place};
use super::settings::{CacheSettings, CacheShare, VolumeSettings};
use crate::base::units::{Bytes, MIB};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// The only version there is.
pub const API_VERSION: &str = "vflash/v1";

/// Bytes of the smallest pool: below, its tables leave nothing to give.
pub const POOL_BYTES_MIN: u64 = 16 * MIB;

/// Characters of the name of a pool, a machine or a volume, as in DNS labels.
pub const NAME_LENGTH_MAX: usize = 63;

/// Everything that the sources want.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub pools: Vec<Pool>,
    pub machines: Vec<VirtualMachine>,
}

impl Wanted {
    /// The paths of all pools, whose states a plan needs to know.
    pub fn devices(&self) -> impl Iterator<Item = &PathBuf> {
        self.pools.iter().filter_map(|pool| match &pool.device.value {
            Device::Path(path) => Some(path),
            Device::Null { .. } => None,
        })
    }

    /// All volumes with their machines, in the order of the text.
    pub fn volumes(&self) -> impl Iterator<Item = (&VirtualMachine, &Volume)> {
        let of = |machine| move |volume| (machine, volume);
        self.machines.iter().flat_map(move |machine| machine.volumes.iter().map(of(machine)))
    }
}

/// `kind: Pool`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    pub name: Located<String>,
    pub device: Located<Device>,
    /// Bytes of the file, which is made if it is missing.
    pub size: Option<Located<u64>>,
}

/// What a pool lies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Device {
    /// A block device or a file; absolute if the source named its directory.
    Path(PathBuf),
    /// Nothing: writes go nowhere, reads are zeros. For benchmarks.
    Null { size_bytes: u64 },
}

/// As a manifest writes it.
impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Null { size_bytes } => write!(f, "null:{}", Bytes(*size_bytes)),
        }
    }
}

/// `kind: VirtualMachine`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtualMachine {
    pub name: Located<String>,
    /// All volumes that the machine is to have.
    pub volumes: Vec<Volume>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    pub name: Located<String>,
    pub storage: Storage,
    /// Machines that have the disk too, each as a volume of the same name.
    pub shared_with: Vec<Located<String>>,
    /// The machine's `access:` included.
    pub settings: VolumeSettings,
}

/// Where a volume's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Storage {
    Flash(Flash),
    Cached(Box<Cached>),
    /// A disk that another volume of the host caches.
    Shared(Located<Backing>),
}

impl Storage {
    pub fn backing(&self) -> Option<&Located<Backing>> {
        match self {
            Self::Flash(_) => None,
            Self::Cached(cached) => Some(&cached.backing),
            Self::Shared(backing) => Some(backing),
        }
    }
}

/// `flash:` — an allocation of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flash {
    pub pool: Located<String>,
    /// Bytes; whole extents.
    pub size: Located<u64>,
    pub class: Located<Class>,
    /// Space is taken when it is first written, and given back when the guest discards it.
    pub thin: Located<bool>,
}

/// What the guest is told about its device, fixed when the volume is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Class {
    /// Its content may be gone after the host or the machine was restarted.
    Volatile,
    /// Its content stays until the volume is deleted.
    #[default]
    Nonvolatile,
}

impl Class {
    pub fn name(self) -> &'static str {
        match self {
            Self::Volatile => "volatile",
            Self::Nonvolatile => "nonvolatile",
        }
    }
}

/// `cache:` and `backing:` — a shared disk behind a write-back cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cached {
    /// Of `cache:`.
    pub place: Place,
    /// Its keys, and where each has its value.
    pub given: Vec<(&'static str, Place)>,
    pub pool: Located<String>,
    /// Bytes of the pool that journal and clean data take; whole extents.
    pub size: Located<u64>,
    pub mode: CacheMode,
    /// `None`: grouped where a sidecar is possible.
    pub drain: Option<Drain>,
    /// How far the backing may be behind.
    pub staleness_max: Option<Duration>,
    /// Disks of one group keep a common write order.
    pub consistency_group: Option<Located<String>>,
    pub durability: Durability,
    /// How long a request is tried at a backing that fails.
    pub backing_timeout: Option<Duration>,
    /// Bytes a day.
    pub write_budget: Option<u64>,
    /// Where stamp and redo records go; `None`: beside the backing.
    pub sidecar: Option<Located<PathBuf>>,
    /// Of `minimum`, `maximum` and `weight`, if there is one of them.
    pub share: Option<CacheShare>,
    pub backing: Located<Backing>,
}

impl Cached {
    /// What the pool remembers of it.
    pub(super) fn settings(&self) -> CacheSettings {
        let ms =
            |time: Option<Duration>| time.and_then(|time| u64::try_from(time.as_millis()).ok());
        CacheSettings {
            mode: self.mode,
            drain: self.drain,
            staleness_ms: ms(self.staleness_max),
            durability: self.durability,
            backing_timeout_ms: ms(self.backing_timeout),
            write_budget_bytes: self.write_budget,
            backing: self.backing.value.to_string(),
            sidecar: self.sidecar.as_ref().map(|path| path.value.display().to_string()),
            consistency_group: self.consistency_group.as_ref().map(|group| group.value.clone()),
            share: self.share,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheMode {
    #[default]
    WriteBack,
    WriteThrough,
    WriteAround,
    ReadOnly,
    Bypass,
}

impl CacheMode {
    pub const ALL: [Self; 5] =
        [Self::WriteBack, Self::WriteThrough, Self::WriteAround, Self::ReadOnly, Self::Bypass];

    pub fn name(self) -> &'static str {
        match self {
            Self::WriteBack => "write-back",
            Self::WriteThrough => "write-through",
            Self::WriteAround => "write-around",
            Self::ReadOnly => "read-only",
            Self::Bypass => "bypass",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Drain {
    /// Epochs merged through a redo sidecar.
    Grouped,
    /// Epoch by epoch.
    Ordered,
}

impl Drain {
    pub fn name(self) -> &'static str {
        match self {
            Self::Grouped => "grouped",
            Self::Ordered => "ordered",
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Durability {
    /// Each acknowledged write is on flash.
    #[default]
    Strong,
    /// What a flush covers is on flash.
    Flush,
}

impl Durability {
    pub fn name(self) -> &'static str {
        match self {
            Self::Strong => "strong",
            Self::Flush => "flush",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A file or a block device.
    Path(PathBuf),
    /// `nbd://…` or `nbd+unix:///…`
    Nbd(String),
}

/// As a manifest writes it.
impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Nbd(url) => f.write_str(url),
        }
    }
}

/// A volume's full name, written `VM/VOLUME`; unique on a host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeName {
    pub machine: String,
    pub volume: String,
}

impl VolumeName {
    pub fn new(machine: impl Into<String>, volume: impl Into<String>) -> Self {
        Self { machine: machine.into(), volume: volume.into() }
    }

    /// Reads `VM/VOLUME`; `None` if that is not two names.
    pub fn parse(text: &str) -> Option<Self> {
        let (machine, volume) = text.split_once('/')?;
        (is_name(machine) && is_name(volume)).then(|| Self::new(machine, volume))
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.machine, self.volume)
    }
}

/// Small letters, digits and inner hyphens, at most [`NAME_LENGTH_MAX`].
pub fn is_name(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=NAME_LENGTH_MAX).contains(&text.len())
        && text.chars().all(plain)
        && !text.starts_with('-')
        && !text.ends_with('-')
}
