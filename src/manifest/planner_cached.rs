//! The planner's rules for cached disks: a backing and a sidecar have one cache each, and what a
//! cache was made with stays.

use super::mistake::Place;
use super::plan::ActualVolume;
use super::planner::Planner;
use super::schema::{Cached, VolumeName};

/// What makes a sidecar of a backing's own path.
const SIDECAR_END: &str = ".vflash";

impl Planner<'_> {
    /// False, after complaints, if the disk cannot be as it is wanted.
    pub(super) fn cached(&mut self, name: &VolumeName, cached: &Cached) -> bool {
        let before = self.mistakes.len();
        if let Some(group) = &cached.consistency_group {
            let text = "`consistencyGroup` is not in this version of vflash: leave it out; each \
                        disk is consistent by itself";
            self.mistake(&group.place, text);
        }
        let backing = &cached.backing;
        self.share(name, &backing.value.to_string(), &backing.place, "backing");
        if let Some(sidecar) = &cached.sidecar {
            let path = sidecar.value.display().to_string();
            self.share(name, &path, &sidecar.place, "sidecar");
        } else {
            let path = format!("{}{SIDECAR_END}", backing.value);
            self.share(name, &path, &backing.place, "sidecar");
        }
        self.mistakes.len() == before
    }

    /// Notes that `name` has the place for itself, or complains.
    fn share(&mut self, name: &VolumeName, what: &str, place: &Place, kind: &str) {
        let other = self.shared.get(what).cloned().or_else(|| self.owner_of(what));
        match other.filter(|other| other != name) {
            Some(other) => {
                let text = format!(
                    "{other} has {what} already, and {kind}s are not shared in this version of \
                     vflash: name another, or detach that one first with `vflash detach {other}`"
                );
                self.mistake(place, text);
            }
            None => drop(self.shared.insert(what.to_owned(), name.clone())),
        }
    }

    /// The volume that has a path or URL as backing or sidecar.
    fn owner_of(&self, what: &str) -> Option<VolumeName> {
        let has = |volume: &&ActualVolume| {
            volume.settings.cache.as_ref().is_some_and(|cache| {
                let beside = || format!("{}{SIDECAR_END}", cache.backing);
                cache.backing == what || cache.sidecar.clone().unwrap_or_else(beside) == what
            })
        };
        self.actual.volumes.iter().find(has).map(|volume| volume.name.clone())
    }

    /// True, after a complaint, if something is to change that is fixed when a cache is made.
    pub(super) fn refuse_fixed_cached(&mut self, actual: &ActualVolume, cached: &Cached) -> bool {
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
        let fixed = [
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
