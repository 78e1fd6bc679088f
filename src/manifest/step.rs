//! What a plan consists of, and how it reads.
//!
//! A plan is carried out all or nothing: everything that can be checked is checked before the first
//! step, the steps that destroy come last, and those before them are undone (a created volume is
//! removed, a grown one cut back, settings set back) should a later one fail, but for pools, which
//! stay as they were made. Once something was destroyed nothing is undone: what was made may be to
//! take its place. Each step may also be repeated: planning anew gives the rest.

use super::mistake::{Mistake, Place};
use super::schema::{CacheMode, Class, Device, Drain, Durability, VolumeName};
use super::settings::{CacheSettings, CacheShare, Limits, Principal, VolumeSettings};
use crate::base::units::Bytes;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Steps in the order in which they are safe: pools, new volumes, modes that keep a log, doors,
/// growth, settings, who leaves, modes that keep none, and last what destroys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub steps: Vec<Step>,
}

/// One change, and where in the manifest it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub place: Place,
    pub action: Action,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Makes the file if it is missing, formats and opens. Undo: close, and delete the file that
    /// was made. Not undone on a file or device that was there: it would not be what it was.
    CreatePool {
        name: String,
        device: Device,
        /// Of a file to be made, or of an empty one to be made longer.
        file_bytes: Option<u64>,
        /// What is on the device now and will be gone.
        overwrites: Option<String>,
    },
    /// Takes a pool that was found on its device into service. Undo: close.
    OpenPool { name: String, device: PathBuf },
    /// Makes the pool's file longer, then the pool. Not undone: a larger pool harms nobody.
    GrowPool { name: String, from_bytes: u64, to_bytes: u64 },
    /// Undo: remove.
    CreateVolume(NewVolume),
    /// Opens a door to the disk of another volume, or changes its settings; `of` itself gets its
    /// own door back. Undo: leave, or set back.
    ShareDisk {
        name: VolumeName,
        of: VolumeName,
        granted: bool,
        /// Of a door that is there.
        from: Option<VolumeSettings>,
        to: VolumeSettings,
    },
    /// Undo: shrink back; the guest cannot have written behind the old end before it was told.
    GrowVolume { name: VolumeName, pool: String, from_bytes: u64, to_bytes: u64 },
    /// The cache of a cached disk, which loses nothing: one that shrinks drains first. Undo: the
    /// same back.
    ResizeCache { name: VolumeName, pool: String, from_bytes: u64, to_bytes: u64 },
    /// Opens the socket of a volume that a change has taken down and left so.
    ServeVolume { name: VolumeName },
    /// Undo: set back.
    UpdateVolume { name: VolumeName, pool: String, from: VolumeSettings, to: VolumeSettings },
    /// Destroys what lies behind the new end.
    ShrinkVolume { name: VolumeName, pool: String, from_bytes: u64, to_bytes: u64 },
    /// Closes a door; the disk stays for those who have others.
    LeaveDisk { name: VolumeName, of: VolumeName },
    /// Destroys the volume.
    DeleteVolume {
        name: VolumeName,
        pool: String,
        size_bytes: u64,
        /// Of a cached disk, which is drained and detached: the backing keeps its content.
        backing: Option<String>,
    },
}

/// A volume to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewVolume {
    pub name: VolumeName,
    pub pool: String,
    pub size_bytes: u64,
    pub class: Class,
    pub thin: bool,
    pub settings: VolumeSettings,
}

impl Plan {
    /// What is, is what should be.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// What must be named by the one who applies, because the plan destroys it: `VM/VOLUME`, or
    /// the path of a device.
    pub fn destroys(&self) -> impl Iterator<Item = String> {
        self.steps.iter().filter_map(|step| step.action.destroys())
    }

    /// The steps that destroy something that is not among `confirmed`, as mistakes.
    pub fn unconfirmed(&self, confirmed: &[String]) -> Vec<Mistake> {
        let unconfirmed = |step: &Step| {
            let name = step.action.destroys().filter(|name| !confirmed.contains(name))?;
            let (object, detail) = (step.action.object(), step.action.detail());
            let or = match step.action {
                Action::ShrinkVolume { from_bytes, .. } => {
                    format!("write `{}`, which it has, or ", Bytes(from_bytes))
                }
                _ => String::new(),
            };
            let text = format!("{object}: {detail}; {or}confirm by naming `{name}`");
            Some(Mistake::new(&step.place, text))
        };
        self.steps.iter().filter_map(unconfirmed).collect()
    }
}

impl Action {
    /// The name to be confirmed before content is destroyed.
    pub fn destroys(&self) -> Option<String> {
        match self {
            Self::ShrinkVolume { name, .. } | Self::DeleteVolume { name, .. } => {
                Some(name.to_string())
            }
            Self::CreatePool { device, overwrites: Some(_), .. } => Some(device.to_string()),
            _ => None,
        }
    }

    /// Of a cached disk that is to keep every write in its log from now on, as it must while
    /// several machines write it; or false: not any more.
    pub(super) fn keeps_log(&self) -> Option<bool> {
        let Self::UpdateVolume { from, to, .. } = self else { return None };
        let keeps = |settings: &VolumeSettings| {
            settings.cache.as_ref().map(|cache| cache.refuse_writers().is_none())
        };
        let (was, will_be) = (keeps(from)?, keeps(to)?);
        (was != will_be).then_some(will_be)
    }

    /// `pool NAME` or `volume VM/VOLUME`
    pub fn object(&self) -> String {
        match self {
            Self::CreatePool { name, .. }
            | Self::OpenPool { name, .. }
            | Self::GrowPool { name, .. } => format!("pool {name}"),
            Self::CreateVolume(NewVolume { name, .. })
            | Self::GrowVolume { name, .. }
            | Self::ResizeCache { name, .. }
            | Self::UpdateVolume { name, .. }
            | Self::ServeVolume { name }
            | Self::ShareDisk { name, .. }
            | Self::LeaveDisk { name, .. }
            | Self::ShrinkVolume { name, .. }
            | Self::DeleteVolume { name, .. } => format!("volume {name}"),
        }
    }

    /// `+` makes, `~` changes, `-` deletes.
    pub fn symbol(&self) -> char {
        match self {
            Self::CreatePool { .. }
            | Self::OpenPool { .. }
            | Self::CreateVolume(_)
            | Self::ShareDisk { from: None, .. } => '+',
            Self::GrowPool { .. }
            | Self::ShareDisk { .. }
            | Self::GrowVolume { .. }
            | Self::ResizeCache { .. }
            | Self::UpdateVolume { .. }
            | Self::ServeVolume { .. }
            | Self::ShrinkVolume { .. } => '~',
            Self::DeleteVolume { .. } | Self::LeaveDisk { .. } => '-',
        }
    }

    /// What changes, from what to what.
    pub fn detail(&self) -> String {
        let sizes = |from: u64, to: u64| format!("size {} -> {}", Bytes(from), Bytes(to));
        match self {
            Self::CreatePool { device, file_bytes, overwrites, .. } => {
                let mut text = format!("create on {device}");
                if let Some(bytes) = file_bytes {
                    text.push_str(&format!(", a file of {}", Bytes(*bytes)));
                }
                if let Some(content) = overwrites {
                    text.push_str(&format!(", destroying {content}"));
                }
                text
            }
            Self::OpenPool { device, .. } => format!("open on {}", device.display()),
            Self::GrowPool { from_bytes, to_bytes, .. }
            | Self::GrowVolume { from_bytes, to_bytes, .. } => sizes(*from_bytes, *to_bytes),
            Self::ResizeCache { from_bytes, to_bytes, .. } => {
                format!("cache {} -> {}", Bytes(*from_bytes), Bytes(*to_bytes))
            }
            Self::CreateVolume(volume) => created(volume),
            Self::UpdateVolume { from, to, .. } => changes(from, to),
            Self::ServeVolume { .. } => "serve it again".to_owned(),
            Self::ShareDisk { name, of, from: None, to, .. } => {
                let disk = if name == of { "its disk again".to_owned() } else { disk_of(of) };
                differences(disk, to, &VolumeSettings::default())
            }
            Self::ShareDisk { from: Some(from), to, .. } if from != to => changes(from, to),
            Self::ShareDisk { of, granted: true, .. } => format!("granted by {of}"),
            Self::ShareDisk { .. } => "declared by its own machine".to_owned(),
            Self::LeaveDisk { name, of } if name == of => {
                "leave its disk to those who share it".to_owned()
            }
            Self::LeaveDisk { of, .. } => format!("leave {}", disk_of(of)),
            Self::ShrinkVolume { from_bytes, to_bytes, .. } => {
                let sizes = sizes(*from_bytes, *to_bytes);
                format!("{sizes}, destroying what lies behind {}", Bytes(*to_bytes))
            }
            Self::DeleteVolume { pool, backing: Some(backing), .. } => {
                format!("drain to {backing} and detach, giving its space on {pool} back")
            }
            Self::DeleteVolume { pool, size_bytes, .. } => {
                format!("delete {} on {pool}, destroying its content", Bytes(*size_bytes))
            }
        }
    }
}

/// As `vflash diff` prints it.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return writeln!(f, "No changes.");
        }
        for Step { action, .. } in &self.steps {
            writeln!(f, "{} {}: {}", action.symbol(), action.object(), action.detail())?;
        }
        let count = |symbol| self.steps.iter().filter(|s| s.action.symbol() == symbol).count();
        let (new, changed, gone) = (count('+'), count('~'), count('-'));
        writeln!(f, "{new} to create, {changed} to change, {gone} to delete.")
    }
}

fn created(volume: &NewVolume) -> String {
    let size = Bytes(volume.size_bytes);
    let thin = if volume.thin { ", thin" } else { "" };
    let text = match &volume.settings.cache {
        None => format!("{size} on {}, {}{thin}", volume.pool, volume.class.name()),
        Some(cache) => {
            let mut text = format!("{} cached in {size} on {}", cache.backing, volume.pool);
            if let Some(sidecar) = &cache.sidecar {
                text.push_str(&format!(", sidecar {sidecar}"));
            }
            text
        }
    };
    let default = VolumeSettings {
        cache: volume.settings.cache.as_ref().map(|_| default_cache()),
        ..VolumeSettings::default()
    };
    differences(text, &volume.settings, &default)
}

fn disk_of(home: &VolumeName) -> String {
    format!("the disk of {home}")
}

/// The text, and every setting that is not as by default.
fn differences(mut text: String, settings: &VolumeSettings, default: &VolumeSettings) -> String {
    for ((field, value), (_, default)) in described(settings).into_iter().zip(described(default)) {
        if value != default {
            text.push_str(&format!(", {field} {value}"));
        }
    }
    text
}

/// `field from -> to` of every setting that differs.
fn changes(from: &VolumeSettings, to: &VolumeSettings) -> String {
    let (from, to) = (described(from), described(to));
    let pairs = from.into_iter().zip(to);
    let changed = pairs.filter(|((_, from), (_, to))| from != to);
    let texts = changed.map(|((field, from), (_, to))| format!("{field} {from} -> {to}"));
    texts.collect::<Vec<_>>().join(", ")
}

/// Every setting by the name and in the words of the manifest. The pattern names every field, so
/// that a new one cannot be forgotten here.
fn described(settings: &VolumeSettings) -> Vec<(&'static str, String)> {
    let VolumeSettings { limits, queues, read_only, pin_memory, when_full, access, cache } =
        settings;
    let Limits { iops, bandwidth, burst_ms } = limits;
    let or = |text: Option<String>, none: &str| text.unwrap_or_else(|| none.to_owned());
    let who = |who: &Option<Principal>| or(who.as_ref().map(ToString::to_string), "daemon");
    let mut described = vec![
        ("iops", or(iops.map(|iops| iops.to_string()), "none")),
        ("bandwidth", or(bandwidth.map(|bytes| format!("{}/s", Bytes(bytes))), "none")),
        ("burst", format!("{:?}", Duration::from_millis(*burst_ms))),
        ("readOnly", read_only.to_string()),
        ("pinMemory", pin_memory.to_string()),
        ("queues", or(queues.map(|queues| queues.to_string()), "all")),
        ("whenFull", when_full.name().to_owned()),
        ("owner", who(&access.owner)),
        ("group", who(&access.group)),
        ("mode", format!("{:04o}", access.mode)),
    ];
    if let Some(cache) = cache {
        // Backing and sidecar never change.
        let CacheSettings {
            mode,
            drain,
            staleness_ms: _,
            durability,
            backing_timeout_ms: _,
            write_budget_bytes,
            backing: _,
            sidecar: _,
            consistency_group,
            share,
        } = cache;
        let part = |part: fn(&CacheShare) -> u64| share.as_ref().map(part);
        let bytes = |bytes: Option<u64>| or(bytes.map(|bytes| Bytes(bytes).to_string()), "size");
        let timeout = Duration::from_millis(cache.backing_timeout_ms());
        let staleness = Duration::from_millis(cache.staleness_ms());
        described.extend([
            ("cache mode", mode.name().to_owned()),
            ("drain", drain.map_or("by sidecar", Drain::name).to_owned()),
            ("maxStaleness", format!("{staleness:?}")),
            ("durability", durability.name().to_owned()),
            ("consistencyGroup", or(consistency_group.clone(), "none")),
            ("minimum", bytes(part(|share| share.minimum_bytes))),
            ("maximum", bytes(part(|share| share.maximum_bytes))),
            ("weight", or(part(|share| share.weight.into()).map(|w| w.to_string()), "1")),
            ("backingTimeout", format!("{timeout:?}")),
            (
                "flashWriteBudget",
                or(write_budget_bytes.map(|bytes| Bytes(bytes).to_string()), "none"),
            ),
        ]);
    }
    described
}

fn default_cache() -> CacheSettings {
    CacheSettings {
        mode: CacheMode::default(),
        drain: None,
        staleness_ms: None,
        durability: Durability::default(),
        backing_timeout_ms: None,
        write_budget_bytes: None,
        backing: String::new(),
        sidecar: None,
        consistency_group: None,
        share: None,
    }
}
