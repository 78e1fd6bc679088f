//! From what is wanted and what is to the steps between. Pure.
//!
//! Invariants:
//! - P1: planning again after the steps were carried out gives no step; also after only the first
//!   few were, then the rest.
//! - P2: a plan is refused as a whole, with every reason at its place in the manifest, and nothing
//!   in it waits for a check that could have been made here.
//! - P3: what is not named in a manifest stays: other pools, and the volumes of other machines. A
//!   machine's `volumes` is the whole list, so a volume missing from it is planned to be deleted,
//!   which like all destruction takes a confirmation ([`Plan::unconfirmed`]).

use super::mistake::Mistake;
use super::planner::Planner;
use super::schema::{Backing, Class, Device, VirtualMachine, Volume, VolumeName, Wanted};
use super::settings::VolumeSettings;
use super::step::Plan;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Bytes of a socket's path, as `sockaddr_un` holds them with the closing zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// What there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Actual {
    /// Pools in service, and pools found on wanted devices.
    pub pools: Vec<ActualPool>,
    /// The volumes of all these pools.
    pub volumes: Vec<ActualVolume>,
    /// Volumes that are not served though they should be: a change took them down and failed.
    pub down: BTreeSet<VolumeName>,
    /// Volumes whose settings cannot be read, with the reason: they are not in `volumes`.
    pub unreadable: BTreeMap<VolumeName, String>,
    /// What is at the paths of [`Wanted::devices`]; a path left out counts as missing.
    pub devices: BTreeMap<PathBuf, DeviceState>,
    /// What backings are known by, by how manifests write them: two names of one disk have the same
    /// identity. One left out is known by its name.
    pub backings: BTreeMap<String, String>,
}

impl Actual {
    /// What the disk that a manifest writes so is known by.
    pub(super) fn identity<'a>(&'a self, backing: &'a str) -> &'a str {
        self.backings.get(backing).map_or(backing, String::as_str)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActualPool {
    pub name: String,
    pub device: Device,
    /// Bytes of the device or file that the pool knows of; a file may have grown since.
    pub size_bytes: u64,
    /// Bytes that new allocations can take, freed ones that are still to be zeroed included.
    pub free_bytes: u64,
    /// In service; else only found.
    pub open: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActualVolume {
    pub name: VolumeName,
    pub pool: String,
    pub size_bytes: u64,
    pub class: Class,
    pub thin: bool,
    pub settings: VolumeSettings,
    /// A machine has it connected.
    pub attached: bool,
    pub role: Role,
}

/// Whose disk a volume is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Role {
    #[default]
    Own,
    /// Its own by name; its machine has left it to others.
    Left,
    /// Another volume's: pool and size are that one's.
    Door {
        of: VolumeName,
        /// By that one's `sharedWith`.
        granted: bool,
    },
}

/// What is at a path that a pool is wanted on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// No such file; its directory is there.
    Missing,
    /// A file or device without any content.
    Blank { size_bytes: u64 },
    /// The pool of this name, which is among [`Actual::pools`].
    Pool { name: String },
    /// Something else, in words: `an ext4 file system`.
    Foreign { size_bytes: u64, content: String },
}

/// The steps that make `actual` what is `wanted`.
pub fn plan(wanted: &Wanted, actual: &Actual) -> Result<Plan, Vec<Mistake>> {
    let mut planner = Planner::new(actual);
    planner.find_homes(wanted);
    wanted.pools.iter().for_each(|pool| planner.pool(pool));
    for machine in &wanted.machines {
        machine.volumes.iter().for_each(|volume| planner.volume(machine, volume));
        planner.surplus(machine);
        planner.unreadable(machine);
    }
    planner.finish()
}

/// The steps that delete the volumes that `wanted` names. An attached one is a mistake unless
/// `force`. Pools stay.
pub fn plan_deletion(wanted: &Wanted, actual: &Actual, force: bool) -> Result<Plan, Vec<Mistake>> {
    let mut planner = Planner::new(actual);
    for (machine, volume) in wanted.volumes() {
        planner.deletion(&full_name(machine, volume), &volume.name.place, force);
        for other in &volume.shared_with {
            let name = VolumeName::new(other.value.as_str(), volume.name.value.as_str());
            planner.deletion(&name, &other.place, force);
        }
    }
    planner.finish()
}

/// The socket of a volume.
pub fn socket_path(run_dir: &Path, name: &VolumeName) -> PathBuf {
    run_dir.join(&name.machine).join(format!("{}.sock", name.volume))
}

/// The volumes whose sockets would have paths too long for the kernel in `run_dir`.
pub fn check_sockets(wanted: &Wanted, run_dir: &Path) -> Vec<Mistake> {
    let too_long = |(machine, volume): (&VirtualMachine, &Volume)| {
        let path = socket_path(run_dir, &full_name(machine, volume));
        let length = path.as_os_str().as_bytes().len();
        (length > SOCKET_PATH_BYTES_MAX).then(|| {
            let text = format!(
                "the socket {} has {length} characters, and Linux takes {SOCKET_PATH_BYTES_MAX}: \
                 shorten the names, or take a shorter run directory",
                path.display()
            );
            Mistake::new(&volume.name.place, text)
        })
    };
    wanted.volumes().filter_map(too_long).collect()
}

/// What the disks of all cached volumes are called, in manifest and pools, for
/// [`Actual::backings`].
pub fn backings(wanted: &Wanted, actual: &Actual) -> Vec<String> {
    let wanted = wanted.volumes().filter_map(|(_, volume)| volume.storage.backing());
    let wanted = wanted.map(|backing| Backing::to_string(&backing.value));
    let actual = actual.volumes.iter().filter_map(|volume| volume.settings.cache.as_ref());
    let mut names: Vec<String> = wanted.chain(actual.map(|cache| cache.backing.clone())).collect();
    names.sort();
    names.dedup();
    names
}

pub(super) fn full_name(machine: &VirtualMachine, volume: &Volume) -> VolumeName {
    VolumeName::new(machine.name.value.as_str(), volume.name.value.as_str())
}
