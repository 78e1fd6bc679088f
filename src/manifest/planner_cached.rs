//! The planner's rules for cached disks: a backing and a sidecar have one cache each, and what a
//! cache was made with stays.

use super::mistake::{Located, Place};
use super::plan::ActualVolume;
use super::planner::Planner;
use super::schema::{Cached, Volume, VolumeName};
use super::settings::VolumeSettings;
use crate::base::limits::CONSISTENCY_GROUP_MAX;

/// What makes a sidecar of a backing's own path.
const SIDECAR_END: &str = ".vflash";

impl Planner<'_> {
    /// False, after complaints, if the disk cannot be as it is wanted.
    pub(super) fn cached(&mut self, name: &VolumeName, cached: &Cached) -> bool {
        let before = self.mistakes.len();
        if let Some(group) = &cached.consistency_group {
            self.consistency_group(name, group, &cached.pool.value);
        }
        let backing = &cached.backing;
        self.take_place(name, &backing.value.to_string(), &backing.place, "backing");
        if let Some(sidecar) = &cached.sidecar {
            let path = sidecar.value.display().to_string();
            self.take_place(name, &path, &sidecar.place, "sidecar");
        } else {
            let path = format!("{}{SIDECAR_END}", backing.value);
            self.take_place(name, &path, &backing.place, "sidecar");
        }
        self.mistakes.len() == before
    }

    /// All disks of a group are in one pool, which knows who belongs to it.
    fn consistency_group(&mut self, name: &VolumeName, group: &Located<String>, pool: &str) {
        let of_group = |volume: &&ActualVolume| {
            let cache = volume.settings.cache.as_ref();
            cache.is_some_and(|cache| cache.consistency_group.as_ref() == Some(&group.value))
        };
        for other in self.actual.volumes.iter().filter(of_group) {
            let wanted = (other.name.clone(), other.pool.clone());
            let members = self.groups.entry(group.value.clone()).or_default();
            if !members.contains(&wanted) {
                members.push(wanted);
            }
        }
        let members = self.groups.entry(group.value.clone()).or_default();
        let elsewhere = members.iter().find(|(_, other)| other != pool).cloned();
        if !members.iter().any(|(member, _)| member == name) {
            members.push((name.clone(), pool.to_owned()));
        }
        let count = members.len();
        if let Some((other, other_pool)) = elsewhere.filter(|(other, _)| other != name) {
            let text = format!(
                "{other} of consistency group `{}` has its cache in pool {other_pool}: all disks \
                 of a group are in one pool; write `pool: {other_pool}`, or another group",
                group.value
            );
            self.mistake(&group.place, text);
        } else if count > CONSISTENCY_GROUP_MAX {
            let text = format!(
                "consistency group `{}` has {count} disks, and there may be \
                 {CONSISTENCY_GROUP_MAX}: write another group",
                group.value
            );
            self.mistake(&group.place, text);
        }
    }

    /// Notes that `name` has the place for itself, or complains.
    fn take_place(&mut self, name: &VolumeName, what: &str, place: &Place, kind: &'static str) {
        let other = self.taken.get(what).cloned().or_else(|| self.owner_of(what));
        match other.filter(|(other, _)| other != name) {
            Some((other, there)) => {
                let text = format!(
                    "{other} has {what} as its {there}, and this wants it as its {kind}: name \
                     another, or detach that one first with `vflash detach {other}`"
                );
                self.mistake(place, text);
            }
            None => drop(self.taken.insert(what.to_owned(), (name.clone(), kind))),
        }
    }

    /// The volume that has a path or URL, and what as.
    fn owner_of(&self, what: &str) -> Option<(VolumeName, &'static str)> {
        self.actual.volumes.iter().find_map(|volume| {
            let cache = volume.settings.cache.as_ref()?;
            let beside = || format!("{}{SIDECAR_END}", cache.backing);
            let sidecar = cache.sidecar.clone().unwrap_or_else(beside);
            let places = [("backing", &cache.backing), ("sidecar", &sidecar)];
            let (kind, _) = places.into_iter().find(|(_, place)| *place == what)?;
            Some((volume.name.clone(), kind))
        })
    }

    /// True, after a complaint, if something is to change that is fixed when a cache is made.
    pub(super) fn refuse_fixed_cached(
        &mut self,
        actual: &ActualVolume,
        cached: &Cached,
        volume: &Volume,
    ) -> bool {
        let name = &actual.name;
        let Some(cache) = &actual.settings.cache else {
            let text = format!(
                "{name} is a flash volume: write its `flash`, or destroy it first with `vflash \
                 reclaim {name}`"
            );
            self.mistake(&cached.place, text);
            return true;
        };
        let wanted = cached.settings();
        let sidecar = |path: &Option<String>| path.clone().unwrap_or_else(|| "beside it".into());
        let sidecar_place = cached.sidecar.as_ref().map_or(&cached.place, |path| &path.place);
        let read_only = |settings: &VolumeSettings| settings.read_only.to_string();
        let read_only = (read_only(&actual.settings), read_only(&volume.settings));
        let fixed = [
            (&volume.name.place, "readOnly", read_only),
            (&cached.pool.place, "pool", (actual.pool.clone(), cached.pool.value.clone())),
            (&cached.backing.place, "backing", (cache.backing.clone(), wanted.backing.clone())),
            (sidecar_place, "sidecar", (sidecar(&cache.sidecar), sidecar(&wanted.sidecar))),
        ];
        let before = self.mistakes.len();
        for (place, field, (is, wanted)) in fixed {
            if is != wanted {
                let text = format!(
                    "{name} has `{field}: {is}`, fixed when it was made: write that, or detach it \
                     first with `vflash detach {name}`"
                );
                self.mistake(place, text);
            }
        }
        self.mistakes.len() != before
    }
}
