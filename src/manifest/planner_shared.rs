//! The planner's rules for disks that several machines have: one volume brings the cache, the
//! others are doors to it.
//!
//! The volume that brings the cache is the disk's *home*: the one that has it already, else the
//! first in the manifest that has a `cache`. Everything about the cache is said there.

use super::mistake::{Located, Place};
use super::plan::{ActualVolume, Role, full_name};
use super::planner::Planner;
use super::schema::{Backing, Cached, Storage, VirtualMachine, Volume, VolumeName, Wanted};
use super::settings::{Access, CacheSettings, VolumeSettings};
use super::step::{Action, Step};
use crate::base::limits::{DOORS_MAX, EXPORTS_MAX};
use crate::base::units::Bytes;
use std::collections::{BTreeMap, BTreeSet};

/// The volume that brings a disk's cache.
#[derive(Clone)]
pub(super) struct Home {
    pub(super) name: VolumeName,
    pool: String,
    size_bytes: u64,
    cache: CacheSettings,
    read_only: bool,
}

/// What all rules need to know before the first is applied.
#[derive(Default)]
pub(super) struct Homes {
    /// By the disk's identity.
    by_disk: BTreeMap<String, Home>,
    /// Volumes that stand in the manifest themselves, with their disks' identities.
    declared: BTreeMap<VolumeName, Option<String>>,
    /// Of machines in the manifest.
    access: BTreeMap<String, Access>,
}

impl Home {
    fn of_actual(volume: &ActualVolume, cache: &CacheSettings) -> Self {
        Self {
            name: volume.name.clone(),
            pool: volume.pool.clone(),
            size_bytes: volume.size_bytes,
            cache: cache.clone(),
            read_only: volume.settings.read_only,
        }
    }

    fn of_wanted(name: VolumeName, cached: &Cached, read_only: bool) -> Self {
        let (pool, size_bytes) = (cached.pool.value.clone(), cached.size.value);
        Self { name, pool, size_bytes, cache: cached.settings(), read_only }
    }

    /// By the keys of `cache:`, in the words of the manifest.
    fn described(&self) -> [(&'static str, String); 13] {
        let CacheSettings {
            mode,
            drain,
            staleness_ms: _,
            durability,
            backing_timeout_ms: _,
            write_budget_bytes,
            backing: _,
            sidecar,
            consistency_group,
            share,
        } = &self.cache;
        let (size, weight) = (self.size_bytes, share.map_or(1, |share| share.weight));
        let minimum = share.map_or(size, |share| share.minimum_bytes);
        let maximum = share.map_or(size, |share| share.maximum_bytes);
        let budget = write_budget_bytes.map_or("none".to_owned(), |bytes| Bytes(bytes).to_string());
        let staleness = std::time::Duration::from_millis(self.cache.staleness_ms());
        [
            ("pool", self.pool.clone()),
            ("size", Bytes(self.size_bytes).to_string()),
            ("mode", mode.name().to_owned()),
            ("drain", drain.map_or("by sidecar", |drain| drain.name()).to_owned()),
            ("maxStaleness", format!("{staleness:?}")),
            ("durability", durability.name().to_owned()),
            ("backingTimeout", format!("{}ms", self.cache.backing_timeout_ms())),
            ("flashWriteBudget", budget),
            ("sidecar", sidecar.clone().unwrap_or_else(|| "beside it".to_owned())),
            ("consistencyGroup", consistency_group.clone().unwrap_or_else(|| "none".to_owned())),
            ("minimum", Bytes(minimum).to_string()),
            ("maximum", Bytes(maximum).to_string()),
            ("weight", weight.to_string()),
        ]
    }
}

impl Planner<'_> {
    /// Finds out which volume brings each disk.
    pub(super) fn find_homes(&mut self, wanted: &Wanted) {
        let actual = self.actual;
        let homes = &mut self.homes;
        for volume in &actual.volumes {
            if let (Some(cache), Role::Own | Role::Left) = (&volume.settings.cache, &volume.role) {
                let disk = actual.identity(&cache.backing).to_owned();
                homes.by_disk.insert(disk, Home::of_actual(volume, cache));
            }
        }
        for (machine, volume) in wanted.volumes() {
            let name = full_name(machine, volume);
            let access = &volume.settings.access;
            homes.access.entry(name.machine.clone()).or_insert_with(|| access.clone());
            let backing = volume.storage.backing().map(|backing| backing.value.to_string());
            let disk = backing.map(|backing| actual.identity(&backing).to_owned());
            homes.declared.insert(name.clone(), disk.clone());
            let (Storage::Cached(cached), Some(disk)) = (&volume.storage, disk) else { continue };
            let home = Home::of_wanted(name, cached, volume.settings.read_only);
            match homes.by_disk.get_mut(&disk) {
                // Its settings are to be those of the manifest.
                Some(known) if known.name == home.name => *known = home,
                Some(_) => {}
                None => drop(homes.by_disk.insert(disk, home)),
            }
        }
    }

    /// True if the volume is no disk of its own: it is a door, or there was a complaint.
    pub(super) fn shared(&mut self, name: &VolumeName, volume: &Volume) -> bool {
        let Some(backing) = volume.storage.backing() else { return self.is_door(name, volume) };
        let disk = self.actual.identity(&backing.value.to_string()).to_owned();
        match self.homes.by_disk.get(&disk).cloned() {
            Some(home) if home.name != *name => {
                self.declared_door(name, volume, &home);
                true
            }
            Some(_) if matches!(volume.storage, Storage::Cached(_)) => self.is_door(name, volume),
            Some(_) => {
                let disk = &backing.value;
                let text = format!("{name} brings the cache of {disk}: write its `cache`");
                self.mistake(&backing.place, text);
                true
            }
            None => {
                self.no_home(backing);
                true
            }
        }
    }

    fn no_home(&mut self, backing: &Located<Backing>) {
        let text = format!(
            "no volume of this host caches {}: add `cache: {{pool: nvme0, size: 16GiB}}`, or \
             declare the volume that does",
            backing.value
        );
        self.mistake(&backing.place, text);
    }

    /// Complains if what is to be a disk of its own is a door to another.
    fn is_door(&mut self, name: &VolumeName, volume: &Volume) -> bool {
        let actual = self.actual.volumes.iter().find(|actual| actual.name == *name);
        let Some(Role::Door { of, .. }) = actual.map(|actual| &actual.role) else { return false };
        let text = format!(
            "{name} shares the disk of {of}: write the `backing` of that, or detach it first with \
             `vflash detach {name}`"
        );
        self.mistake(&volume.name.place, text);
        true
    }

    /// A volume of the manifest whose disk another volume brings.
    fn declared_door(&mut self, name: &VolumeName, volume: &Volume, home: &Home) {
        let before = self.mistakes.len();
        let (of, place) = (&home.name, &volume.name.place);
        if of.machine == name.machine {
            let text = format!("{of} is this disk already, and a machine has a disk once");
            let place = volume.storage.backing().map_or(place, |backing| &backing.place);
            return self.mistake(place, text);
        }
        if let Some(first) = volume.shared_with.first() {
            let text = format!("{of} brings the cache of this disk: write `sharedWith` there");
            self.mistake(&first.place, text);
        }
        if let Storage::Cached(cached) = &volume.storage {
            self.refuse_other_settings(home, cached, volume.settings.read_only);
        }
        let settings = VolumeSettings { cache: None, ..volume.settings.clone() };
        if self.mistakes.len() == before {
            self.door(name, home, false, (settings, place));
        }
    }

    /// What is said of the cache besides must be what its home says.
    fn refuse_other_settings(&mut self, home: &Home, cached: &Cached, read_only: bool) {
        let here = Home::of_wanted(home.name.clone(), cached, read_only);
        let pairs = home.described().into_iter().zip(here.described());
        for ((key, there), (_, here)) in pairs {
            let given = cached.given.iter().find(|(given, _)| *given == key);
            let Some((_, place)) = given.filter(|_| there != here) else { continue };
            let text = format!(
                "{} brings the cache of this disk, with `{key}: {there}`: write that, or leave \
                 `{key}` out",
                home.name
            );
            self.mistake(place, text);
        }
    }

    /// Plans that `name` is a door to `home`'s disk.
    fn door(
        &mut self,
        name: &VolumeName,
        home: &Home,
        granted: bool,
        (settings, place): (VolumeSettings, &Place),
    ) {
        if home.read_only && !settings.read_only {
            let text = format!(
                "{} is read-only, for all that have its disk: write `readOnly: true`",
                home.name
            );
            return self.mistake(place, text);
        }
        if !settings.read_only
            && let Some(text) = home.cache.refuse_writers()
        {
            return self.mistake(place, format!("{name} writes the disk of {}: {text}", home.name));
        }
        let actual = self.actual.volumes.iter().find(|actual| actual.name == *name);
        let from = match actual.map(|actual| (actual, &actual.role)) {
            None => {
                self.volume_count = self.volume_count.saturating_add(1);
                if self.volume_count > EXPORTS_MAX {
                    let text =
                        format!("one volume too many: a daemon serves at most {EXPORTS_MAX}");
                    return self.mistake(place, text);
                }
                None
            }
            Some((actual, Role::Door { of, granted: was })) if *of == home.name => {
                self.serve_again(name, place);
                if actual.settings == settings && *was == granted {
                    return;
                }
                if self.refuse_while_attached(actual, &settings, place) {
                    return;
                }
                Some(actual.settings.clone())
            }
            Some(_) => {
                let text = format!(
                    "{name} is another volume, and cannot become a door to {}: rename one, or \
                     remove it first",
                    home.name
                );
                return self.mistake(place, text);
            }
        };
        let (name, of) = (name.clone(), home.name.clone());
        let action = Action::ShareDisk { name, of, granted, from, to: settings };
        self.shares.push(Step { place: place.clone(), action });
    }

    /// The machines of `sharedWith`, and those that are no more among them.
    pub(super) fn grants(&mut self, machine: &VirtualMachine, volume: &Volume) {
        let Some(backing) = volume.storage.backing() else { return };
        let disk = self.actual.identity(&backing.value.to_string()).to_owned();
        let Some(home) = self.homes.by_disk.get(&disk).cloned() else { return };
        let mut granted = BTreeSet::new();
        for other in &volume.shared_with {
            let name = VolumeName::new(other.value.as_str(), volume.name.value.as_str());
            granted.insert(name.clone());
            if other.value == machine.name.value {
                let text = "a machine has its own disk: leave it out of `sharedWith`";
                self.mistake(&other.place, text);
                continue;
            }
            match self.homes.declared.get(&name) {
                // What it says of itself counts.
                Some(Some(declared)) if *declared == disk => continue,
                Some(_) => {
                    let text = format!("{name} is another volume in this manifest: rename one");
                    self.mistake(&other.place, text);
                    continue;
                }
                None => {}
            }
            let access = self.homes.access.get(&other.value);
            let access = access.unwrap_or(&volume.settings.access).clone();
            let settings = VolumeSettings { cache: None, access, ..volume.settings.clone() };
            self.door(&name, &home, true, (settings, &other.place));
        }
        let actual = self.actual;
        let of_home = |actual: &&ActualVolume| {
            actual.role == Role::Door { of: home.name.clone(), granted: true }
        };
        for door in actual.volumes.iter().filter(of_home) {
            if !granted.contains(&door.name) && !self.homes.declared.contains_key(&door.name) {
                let or = ", or put its machine back into `sharedWith`";
                self.delete(door, &volume.name.place, !door.attached, or);
            }
        }
        self.other_writers(&home, volume);
    }

    /// Machines that this manifest does not tell of write the disk too.
    fn other_writers(&mut self, home: &Home, volume: &Volume) {
        let Some(text) = home.cache.refuse_writers().filter(|_| !home.read_only) else { return };
        let actual = self.actual;
        let other = actual.volumes.iter().find(|actual| {
            actual.role == Role::Door { of: home.name.clone(), granted: false }
                && !actual.settings.read_only
                && !self.homes.access.contains_key(&actual.name.machine)
        });
        if let Some(other) = other {
            let text = format!("{} writes the disk of {}: {text}", other.name, home.name);
            self.mistake(&volume.name.place, text);
        }
    }

    /// A home that its machine had left has it again.
    pub(super) fn come_back(&mut self, actual: &ActualVolume, volume: &Volume) {
        if actual.role != Role::Left {
            return;
        }
        let (name, of) = (actual.name.clone(), actual.name.clone());
        let to = VolumeSettings { cache: None, ..volume.settings.clone() };
        let action = Action::ShareDisk { name, of, granted: false, from: None, to };
        self.shares.push(Step { place: volume.name.place.clone(), action });
    }

    /// Whose last machine leaves it is drained and detached; else the disk stays for the others.
    pub(super) fn finish_leaving(&mut self) {
        let actual = self.actual;
        for home in &actual.volumes {
            let Some(cache) = &home.settings.cache else { continue };
            let role = |volume: &ActualVolume| match &volume.role {
                Role::Door { of, .. } => *of == home.name,
                Role::Own => volume.name == home.name,
                Role::Left => false,
            };
            let has = actual.volumes.iter().filter(|volume| role(volume));
            let (leaving, staying): (Vec<_>, Vec<_>) =
                has.partition(|volume| self.leaving.contains_key(&volume.name));
            let coming = self.shares.iter().filter(|step| {
                matches!(&step.action, Action::ShareDisk { of, from: None, .. } if *of == home.name)
            });
            let coming: Vec<Place> = coming.map(|step| step.place.clone()).collect();
            // The home's own number is kept for it.
            let count = staying.iter().filter(|volume| volume.name != home.name).count();
            if let Some(place) = coming.last()
                && count.saturating_add(coming.len()) >= DOORS_MAX
            {
                let text = format!("one machine too many: a disk is shared by at most {DOORS_MAX}");
                self.mistake(place, text);
            }
            let last = staying.is_empty() && coming.is_empty();
            for volume in &leaving {
                let Some(place) = self.leaving.get(&volume.name).cloned() else { continue };
                let (name, of) = (volume.name.clone(), home.name.clone());
                if !last || name != of {
                    let action = Action::LeaveDisk { name, of };
                    self.destructions.push(Step { place, action });
                }
            }
            let name = leaving.last().map_or(&home.name, |volume| &volume.name);
            if let (true, Some(place)) = (last, self.leaving.get(name)) {
                let action = Action::DeleteVolume {
                    name: home.name.clone(),
                    pool: home.pool.clone(),
                    size_bytes: home.size_bytes,
                    backing: Some(cache.backing.clone()),
                };
                self.destructions.push(Step { place: place.clone(), action });
            }
        }
    }
}
