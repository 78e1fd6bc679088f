//! The rules behind [`plan`](super::plan): object by object, every one looked at before a step
//! is given out.

use super::decode::nearest;
use super::mistake::{Located, Mistake, Place};
use super::plan::{Actual, ActualPool, ActualVolume, DeviceState, Role, full_name};
use super::planner_shared::Homes;
use super::schema::{
    Class, Device, Flash, POOL_BYTES_MIN, Pool, Storage, VirtualMachine, Volume, VolumeName,
};
use super::settings::{CacheShare, VolumeSettings};
use super::step::{Action, NewVolume, Plan, Step};
use crate::base::limits::EXPORTS_MAX;
use crate::base::units::{Bytes, EXTENT_BYTES};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub(super) struct Planner<'a> {
    pub(super) actual: &'a Actual,
    pools: Vec<Step>,
    creations: Vec<Step>,
    pub(super) shares: Vec<Step>,
    growths: Vec<Step>,
    updates: Vec<Step>,
    pub(super) destructions: Vec<Step>,
    pub(super) mistakes: Vec<Mistake>,
    /// Bytes that each pool has left to give; what this plan destroys is not among them. Of a pool
    /// that is yet to be made all bytes: its own tables are the executor's to count.
    free_bytes: BTreeMap<String, u64>,
    /// Volumes that there will be before anything is destroyed.
    pub(super) volume_count: usize,
    pub(super) homes: Homes,
    /// Volumes of cached disks that go, and where that is asked for: what becomes of a disk shows
    /// when all are known.
    pub(super) leaving: BTreeMap<VolumeName, Place>,
    /// Backings and sidecars, and the volume that has each, as which of the two.
    pub(super) taken: BTreeMap<String, (VolumeName, &'static str)>,
    /// Consistency groups: their disks, and the pool of each.
    pub(super) groups: BTreeMap<String, Vec<(VolumeName, String)>>,
}

/// The space that a volume takes of a pool: all of a flash volume, the cache of a cached disk.
struct Space<'a> {
    pool: &'a Located<String>,
    size: &'a Located<u64>,
    class: Class,
    thin: bool,
    cached: bool,
    /// Of a cache whose size follows its use.
    share: Option<CacheShare>,
}

impl<'a> Space<'a> {
    /// `None`: it is another volume's.
    fn of(storage: &'a Storage) -> Option<Self> {
        match storage {
            Storage::Flash(flash) => {
                let (class, thin) = (flash.class.value, flash.thin.value);
                let (pool, size) = (&flash.pool, &flash.size);
                Some(Self { pool, size, class, thin, cached: false, share: None })
            }
            Storage::Cached(cached) => {
                let (pool, size, class) = (&cached.pool, &cached.size, Class::Nonvolatile);
                Some(Self { pool, size, class, thin: false, cached: true, share: cached.share })
            }
            Storage::Shared(_) => None,
        }
    }
}

impl<'a> Planner<'a> {
    pub(super) fn new(actual: &'a Actual) -> Self {
        let free = |pool: &ActualPool| (pool.name.clone(), pool.free_bytes);
        Self {
            actual,
            pools: Vec::new(),
            creations: Vec::new(),
            shares: Vec::new(),
            growths: Vec::new(),
            updates: Vec::new(),
            destructions: Vec::new(),
            mistakes: Vec::new(),
            free_bytes: actual.pools.iter().map(free).collect(),
            volume_count: actual.volumes.len(),
            homes: Homes::default(),
            leaving: BTreeMap::new(),
            taken: BTreeMap::new(),
            groups: BTreeMap::new(),
        }
    }

    pub(super) fn finish(mut self) -> Result<Plan, Vec<Mistake>> {
        self.finish_leaving();
        if !self.mistakes.is_empty() {
            return Err(self.mistakes);
        }
        let keeps = |keeps| move |step: &Step| step.action.keeps_log() == Some(keeps);
        let leaves = |step: &Step| matches!(step.action, Action::LeaveDisk { .. });
        // Whoever shares a disk comes when that keeps its log, and is gone when that ends.
        let (first, updates): (Vec<_>, Vec<_>) = self.updates.into_iter().partition(keeps(true));
        let (last, updates): (Vec<_>, Vec<_>) = updates.into_iter().partition(keeps(false));
        let (leaves, destroys): (Vec<_>, Vec<_>) = self.destructions.into_iter().partition(leaves);
        let made = [self.pools, self.creations, first, self.shares, self.growths, updates];
        let phases = made.into_iter().chain([leaves, last, destroys]);
        Ok(Plan { steps: phases.flatten().collect() })
    }

    pub(super) fn mistake(&mut self, place: &Place, message: impl Into<String>) {
        self.mistakes.push(Mistake::new(place, message));
    }

    fn actual_pool(&self, name: &str) -> Option<&'a ActualPool> {
        self.actual.pools.iter().find(|pool| pool.name == name)
    }

    pub(super) fn pool(&mut self, pool: &Pool) {
        let (name, actual) = (&pool.name.value, self.actual_pool(&pool.name.value));
        // Should the pool be refused, its volumes need no complaint of their own.
        self.free_bytes.entry(name.clone()).or_insert(u64::MAX);
        match (&pool.device.value, actual) {
            (Device::Path(path), actual) => self.pool_on(pool, path, actual),
            (device, Some(actual)) if actual.device == *device => {}
            (_, Some(actual)) => self.pool_elsewhere(pool, actual),
            (Device::Null { size_bytes }, None) => {
                self.new_pool(pool, *size_bytes, None, None);
            }
        }
    }

    fn pool_on(&mut self, pool: &Pool, path: &PathBuf, actual: Option<&'a ActualPool>) {
        let name = &pool.name.value;
        let shown = path.display();
        let state = self.actual.devices.get(path).unwrap_or(&DeviceState::Missing);
        match (state, actual) {
            (DeviceState::Pool { name: found }, Some(actual)) if found == name => {
                self.known_pool(pool, path, actual);
            }
            (DeviceState::Pool { name: found }, _) => {
                let text = format!(
                    "{shown} holds pool `{found}`: write `name: {found}`, or another device"
                );
                self.mistake(&pool.device.place, text);
            }
            (_, Some(actual)) => self.pool_elsewhere(pool, actual),
            (DeviceState::Missing, None) => match &pool.size {
                Some(size) => self.new_pool(pool, size.value, Some(size.value), None),
                None if path.starts_with("/dev") => {
                    self.mistake(&pool.device.place, format!("there is no {shown}: correct it"));
                }
                None => {
                    let text = format!(
                        "there is no {shown}: correct it, or add `size: 64GiB` to have a file made"
                    );
                    self.mistake(&pool.device.place, text);
                }
            },
            (DeviceState::Blank { size_bytes }, None) => self.blank(pool, path, *size_bytes),
            (DeviceState::Foreign { size_bytes, content }, None) => match &pool.size {
                None => self.new_pool(pool, *size_bytes, None, Some(content.clone())),
                Some(size) => {
                    let text = format!(
                        "{shown} exists and holds {content}: `size` is for a file to be created, \
                         leave it out"
                    );
                    self.mistake(&size.place, text);
                }
            },
        }
    }

    fn pool_elsewhere(&mut self, pool: &Pool, actual: &ActualPool) {
        let text = format!(
            "pool `{name}` is on {device} already, and pools do not move: write `device: {device}`",
            name = actual.name,
            device = actual.device
        );
        self.mistake(&pool.device.place, text);
    }

    /// A file or device without content.
    fn blank(&mut self, pool: &Pool, path: &Path, size_bytes: u64) {
        let shown = path.display();
        match &pool.size {
            Some(size) if size.value < size_bytes => {
                let text = format!(
                    "{shown} exists with {}: leave `size` out to use all of it",
                    Bytes(size_bytes)
                );
                self.mistake(&size.place, text);
            }
            Some(size) => {
                let longer = (size.value > size_bytes).then_some(size.value);
                self.new_pool(pool, size.value, longer, None);
            }
            None => self.new_pool(pool, size_bytes, None, None),
        }
    }

    fn new_pool(
        &mut self,
        pool: &Pool,
        size_bytes: u64,
        file_bytes: Option<u64>,
        overwrites: Option<String>,
    ) {
        if size_bytes < POOL_BYTES_MIN {
            let text = format!(
                "{} has {}: a pool takes at least {}; take a larger device, or add `size` for a \
                 file",
                pool.device.value,
                Bytes(size_bytes),
                Bytes(POOL_BYTES_MIN)
            );
            return self.mistake(&pool.device.place, text);
        }
        self.free_bytes.insert(pool.name.value.clone(), size_bytes);
        let (name, device) = (pool.name.value.clone(), pool.device.value.clone());
        let action = Action::CreatePool { name, device, file_bytes, overwrites };
        self.pools.push(Step { place: pool.name.place.clone(), action });
    }

    /// The pool is on its device: open and large enough?
    fn known_pool(&mut self, pool: &Pool, path: &Path, actual: &ActualPool) {
        let name = &actual.name;
        if !actual.open {
            let action = Action::OpenPool { name: name.clone(), device: path.to_owned() };
            self.pools.push(Step { place: pool.name.place.clone(), action });
        }
        let Some(Located { value: to_bytes, place }) = &pool.size else { return };
        let (from_bytes, to_bytes) = (actual.size_bytes, *to_bytes);
        let Some(more) = to_bytes.checked_sub(from_bytes) else {
            let size = Bytes(from_bytes);
            let text = format!("pool `{name}` has {size}, and pools do not shrink: write `{size}`");
            return self.mistake(place, text);
        };
        if more > 0 {
            if let Some(free) = self.free_bytes.get_mut(name) {
                *free = free.saturating_add(more);
            }
            let action = Action::GrowPool { name: name.clone(), from_bytes, to_bytes };
            self.pools.push(Step { place: place.clone(), action });
        }
    }

    pub(super) fn volume(&mut self, machine: &VirtualMachine, volume: &Volume) {
        let name = full_name(machine, volume);
        if self.actual.unreadable.contains_key(&name) || self.shared(&name, volume) {
            return;
        }
        if let Storage::Cached(cached) = &volume.storage
            && !self.cached(&name, cached)
        {
            return;
        }
        let Some(space) = Space::of(&volume.storage) else { return };
        if !self.free_bytes.contains_key(&space.pool.value) {
            return self.unknown_pool(space.pool);
        }
        let actual = self.actual.volumes.iter().find(|actual| actual.name == name);
        match actual {
            None => self.create_volume(name, &space, volume),
            Some(actual) => {
                self.change_volume(actual, &space, volume);
                self.come_back(actual, volume);
            }
        }
        self.grants(machine, volume);
    }

    fn unknown_pool(&mut self, pool: &Located<String>) {
        let known: Vec<&str> = self.free_bytes.keys().map(String::as_str).collect();
        let name = &pool.value;
        let text = match nearest(name, &known) {
            Some(near) => format!("there is no pool `{name}`: write `{near}`, or declare it"),
            None => format!("there is no pool `{name}`: declare it with `kind: Pool`"),
        };
        self.mistake(&pool.place, text);
    }

    fn create_volume(&mut self, name: VolumeName, space: &Space<'_>, volume: &Volume) {
        self.volume_count = self.volume_count.saturating_add(1);
        if self.volume_count > EXPORTS_MAX {
            let text = format!("one volume too many: a daemon serves at most {EXPORTS_MAX}");
            return self.mistake(&volume.name.place, text);
        }
        let size_bytes = self.first_size(space);
        if !space.thin {
            self.take(space, size_bytes);
        }
        let action = Action::CreateVolume(NewVolume {
            name,
            pool: space.pool.value.clone(),
            size_bytes,
            class: space.class,
            thin: space.thin,
            settings: volume.settings.clone(),
        });
        self.creations.push(Step { place: volume.name.place.clone(), action });
    }

    /// A cache with a minimum begins with what its pool has left, if that is less than its size.
    fn first_size(&self, space: &Space<'_>) -> u64 {
        let size = space.size.value;
        let free = self.free_bytes.get(&space.pool.value).copied().unwrap_or(u64::MAX);
        let whole = free.saturating_sub(free.checked_rem(EXTENT_BYTES).unwrap_or(0));
        space.share.map_or(size, |share| whole.clamp(share.minimum_bytes, size))
    }

    /// Takes `bytes` of the pool for this plan, or complains.
    fn take(&mut self, space: &Space<'_>, bytes: u64) {
        let pool = &space.pool.value;
        let Some(free) = self.free_bytes.get_mut(pool) else { return };
        match free.checked_sub(bytes) {
            Some(left) => *free = left,
            None => {
                let (needed, left) = (Bytes(bytes), Bytes(*free));
                let thin = if space.cached { "" } else { " make it thin," };
                let text = format!(
                    "pool `{pool}` has {left} left for this, and {needed} are needed: make it \
                     smaller,{thin} or grow the pool"
                );
                self.mistake(&space.size.place, text);
            }
        }
    }

    fn change_volume(&mut self, actual: &ActualVolume, space: &Space<'_>, volume: &Volume) {
        let name = &actual.name;
        let refused = match &volume.storage {
            Storage::Flash(flash) => self.refuse_fixed(actual, flash),
            Storage::Cached(cached) => self.refuse_fixed_cached(actual, cached, volume),
            Storage::Shared(_) => true,
        };
        if refused {
            return;
        }
        let settings = &volume.settings;
        self.refuse_while_attached(actual, settings, &volume.name.place);
        let pool = actual.pool.clone();
        if actual.settings != *settings {
            let (from, to) = (actual.settings.clone(), settings.clone());
            let action = Action::UpdateVolume { name: name.clone(), pool: pool.clone(), from, to };
            self.updates.push(Step { place: volume.name.place.clone(), action });
        }
        self.serve_again(name, &volume.name.place);
        let from_bytes = actual.size_bytes;
        // What lies between is not the manifest's to say.
        let to_bytes = space.share.map_or(space.size.value, |share| {
            from_bytes.clamp(share.minimum_bytes, share.maximum_bytes)
        });
        let (name, place) = (name.clone(), space.size.place.clone());
        let action =
            Action::ResizeCache { name: name.clone(), pool: pool.clone(), from_bytes, to_bytes };
        match to_bytes.checked_sub(from_bytes) {
            Some(0) => {}
            Some(more) if space.cached => {
                self.take(space, more);
                self.growths.push(Step { place, action });
            }
            None if space.cached => self.updates.push(Step { place, action }),
            Some(more) => {
                if !actual.thin {
                    self.take(space, more);
                }
                let action = Action::GrowVolume { name, pool, from_bytes, to_bytes };
                self.growths.push(Step { place, action });
            }
            None => {
                let action = Action::ShrinkVolume { name, pool, from_bytes, to_bytes };
                self.destructions.push(Step { place, action });
            }
        }
    }

    /// Whatever else is to change of it: it may be what serves it again, and that does no harm.
    pub(super) fn serve_again(&mut self, name: &VolumeName, place: &Place) {
        if self.actual.down.contains(name) {
            let action = Action::ServeVolume { name: name.clone() };
            self.updates.push(Step { place: place.clone(), action });
        }
    }

    /// True, after a complaint, if something is to change that a running guest would not bear.
    pub(super) fn refuse_while_attached(
        &mut self,
        actual: &ActualVolume,
        settings: &VolumeSettings,
        place: &Place,
    ) -> bool {
        let name = &actual.name;
        let fixed = [
            ("queues", actual.settings.queues != settings.queues),
            ("readOnly", actual.settings.read_only != settings.read_only),
        ];
        let before = self.mistakes.len();
        for (field, _) in fixed.iter().filter(|(_, differs)| *differs && actual.attached) {
            let text = format!(
                "{name} is attached, and `{field}` cannot change under a running guest: detach it \
                 first, or leave `{field}` as it was"
            );
            self.mistake(place, text);
        }
        self.mistakes.len() != before
    }

    /// True, after a complaint, if something is to change that is fixed when a volume is made.
    fn refuse_fixed(&mut self, actual: &ActualVolume, flash: &Flash) -> bool {
        let name = &actual.name;
        let class = actual.class;
        if let Some(cache) = &actual.settings.cache {
            let backing = &cache.backing;
            let text = format!(
                "{name} is a cached disk of {backing}: write its `cache` and `backing`, or detach \
                 it first with `vflash detach {name}`"
            );
            self.mistake(&flash.pool.place, text);
            return true;
        }
        let fixed = [
            (&flash.pool.place, "pool", actual.pool.clone(), flash.pool.value != actual.pool),
            (&flash.class.place, "class", class.name().to_owned(), flash.class.value != class),
            (&flash.thin.place, "thin", actual.thin.to_string(), flash.thin.value != actual.thin),
        ];
        let mut refused = false;
        for (place, field, value, differs) in fixed {
            if differs {
                let text = format!(
                    "{name} has `{field}: {value}`, fixed when it was made: write that, or \
                     destroy it first with `vflash reclaim {name}`"
                );
                self.mistake(place, text);
                refused = true;
            }
        }
        refused
    }

    /// Volumes of the machine that its list lacks.
    pub(super) fn surplus(&mut self, machine: &VirtualMachine) {
        let wanted = |name: &VolumeName| {
            machine.volumes.iter().any(|volume| volume.name.value == name.volume)
        };
        let actual = self.actual;
        let of_machine = |volume: &&ActualVolume| volume.name.machine == machine.name.value;
        for volume in actual.volumes.iter().filter(of_machine) {
            let granted = matches!(volume.role, Role::Door { granted: true, .. } | Role::Left);
            if !wanted(&volume.name) && !granted {
                let or = ", or put it back into `volumes`";
                self.delete(volume, &machine.name.place, !volume.attached, or);
            }
        }
    }

    /// Nothing can be said of volumes of the machine whose settings cannot be read, and nothing is
    /// done to them.
    pub(super) fn unreadable(&mut self, machine: &VirtualMachine) {
        let actual = self.actual;
        for (name, reason) in &actual.unreadable {
            if name.machine == machine.name.value {
                self.refuse_unreadable(name, reason, &machine.name.place);
            }
        }
    }

    fn refuse_unreadable(&mut self, name: &VolumeName, reason: &str, place: &Place) {
        let text = format!(
            "the settings of {name} cannot be read ({reason}): start the vflashd that wrote them, \
             or give the volume up with `vflash reclaim --force {name}`"
        );
        self.mistake(place, text);
    }

    /// The deletion of a volume, if there is one of that name.
    pub(super) fn deletion(&mut self, name: &VolumeName, place: &Place, force: bool) {
        if let Some(reason) = self.actual.unreadable.get(name) {
            return self.refuse_unreadable(name, reason, place);
        }
        if let Some(volume) = self.actual.volumes.iter().find(|actual| actual.name == *name) {
            self.delete(volume, place, force || !volume.attached, ", or force it");
        }
    }

    pub(super) fn delete(&mut self, volume: &ActualVolume, place: &Place, allowed: bool, or: &str) {
        let name = volume.name.clone();
        if !allowed {
            let text = format!("{name} is to be deleted, and is attached: detach it first{or}");
            return self.mistake(place, text);
        }
        if volume.settings.cache.is_some() || volume.role != Role::Own {
            self.leaving.insert(name, place.clone());
            return;
        }
        let (pool, size_bytes) = (volume.pool.clone(), volume.size_bytes);
        let action = Action::DeleteVolume { name, pool, size_bytes, backing: None };
        self.destructions.push(Step { place: place.clone(), action });
    }
}
