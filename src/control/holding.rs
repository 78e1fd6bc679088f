//! Holds of cached disks, and what does not go with them.

use super::api::{ErrorCode, Failure};
use super::api_cached::CacheMode;
use super::cached::cache_mode;
use super::engine::Engine;
use super::served::Served;
use crate::cache::Mode;
use std::sync::atomic::Ordering;

type Result<T> = std::result::Result<T, Failure>;

impl Engine {
    /// The disk, and those that are drained with it.
    fn drained_together(&self, served: &Served) -> Vec<Served> {
        let group = |one: &Served| one.settings.cache.as_ref()?.consistency_group.clone();
        let with = |one: &&Served| {
            one.name == served.name
                || (one.home.is_none() && group(one).is_some() && group(one) == group(served))
        };
        self.state().volumes.values().filter(with).cloned().collect()
    }

    /// In write-through no write is answered before it is drained: held, all of them would hang. So
    /// would a change of mode.
    pub(super) fn refuse_hold(&self, served: &Served) -> Result<()> {
        for one in self.drained_together(served) {
            let (Some(cached), Some(cache)) = (&one.cached, &one.settings.cache) else { continue };
            let (name, wanted) = (&one.name, cache_mode(cache.mode));
            let in_force = one.gauges(cached)?.mode;
            if [wanted, in_force].contains(&Mode::WriteThrough) {
                let text = format!(
                    "cached disk {name} is in write-through, where no write is answered before it \
                     is drained: held, all would wait; `vflash mode {name} write-back` comes first"
                );
                return Err(Failure::new(ErrorCode::Invalid, text));
            }
            if in_force != wanted {
                let text = format!(
                    "cached disk {name} is going from {} to {}, and is drained for that: try again \
                     when it is there",
                    in_force.name(),
                    wanted.name()
                );
                return Err(Failure::new(ErrorCode::Busy, text));
            }
        }
        Ok(())
    }

    /// A disk that is held keeps its mode: the next one may need what is held back.
    pub(super) fn refuse_held(&self, served: &Served, mode: CacheMode) -> Result<()> {
        let now = served.settings.cache.as_ref().map(|cache| cache.mode);
        if now == Some(mode) || mode == CacheMode::WriteBack {
            return Ok(());
        }
        for one in self.drained_together(served) {
            let held = one.cached.as_ref().map_or(0, |cached| cached.held.load(Ordering::Relaxed));
            if let Some(point) = held.checked_sub(1) {
                let name = &one.name;
                let text = format!(
                    "cached disk {name} is held at point {point}: `vflash drain {name}` ends the \
                     hold; try again then"
                );
                return Err(Failure::new(ErrorCode::Busy, text));
            }
        }
        Ok(())
    }
}
