//! The ways out of a cached disk: drained and clean, or given up by name.

use super::api::{self, ErrorCode, EventKind, Failure};
use super::api_cached::Detach;
use super::cached::{self, Cached};
use super::caching::{CLOSE_WAIT, undrainable};
use super::engine::Engine;
use super::served::Served;
use crate::backing::recover::{Damage, RecoverOptions};
use crate::base::clock::unix_ms;
use crate::base::units::Bytes;
use crate::cache::status::CacheGauges;
use crate::cache::{self, CacheMessage};
use crate::manifest::{Attributes, CacheSettings};
use std::sync::atomic::Ordering;
use std::time::Duration;

type Result<T> = std::result::Result<T, Failure>;

/// How long one call waits for a drain; who wants to see the end asks again.
const DRAIN_WAIT: Duration = Duration::from_secs(5);

/// How long a backing that is given up may take to answer.
const LOST_PATIENCE: Duration = Duration::from_secs(20);

/// The ways out.
impl Engine {
    pub fn detach(&self, name: &str, request: &Detach) -> Result<api::Plan> {
        let _changes = self.changes.begin(&format!("the detach of {name}"))?;
        let served = self.home_of(name)?;
        let holders = self.holders(&served);
        if holders.len() > 1 && holders.contains(&name.to_owned()) {
            return self.detach_door(name, request.lost);
        }
        let Some(cache) = served.settings.cache.clone() else {
            let text = format!(
                "{name} is a flash volume, and its content is nowhere else: take it away from a VM \
                 with --qmp or --ch-api, or destroy it with `vflash reclaim {name}`"
            );
            return Err(Failure::new(ErrorCode::Invalid, text));
        };
        self.refuse_attached(&holders, false)?;
        let detail = match request.lost {
            false => {
                self.detach_clean(&served)?;
                format!("all is in {}; its space on {} is free", cache.backing, served.pool.name)
            }
            true => self.detach_lost(&served, &cache, &request.confirm)?,
        };
        let step = api::Step {
            action: api::Action::Delete,
            object: served.object(),
            detail,
            destroys: request.lost,
        };
        let destroys = if request.lost { vec![served.name.clone()] } else { Vec::new() };
        Ok(api::Plan { steps: vec![step], destroys, done: true })
    }

    /// Drains all, leaves the backing clean and nobody's, frees the flash.
    pub(super) fn detach_clean(&self, served: &Served) -> Result<()> {
        let name = &served.name;
        let formatted = Attributes::decode(&served.facts()?.attributes)?.log;
        if formatted.is_some_and(|log| !log.formatted) && served.cached.is_none() {
            // It was never served.
            return self.without(served, || self.free(served, "it was never opened"));
        }
        if let Some(reason) = &served.failure {
            let text = format!(
                "cached disk {name} is not served, and what only the flash holds cannot be \
                 drained: {reason}. Bring its backing back, or give up what it lacks with `vflash \
                 detach {name} --lost`"
            );
            return Err(Failure::new(ErrorCode::Busy, text));
        }
        let (served, cached) = self.cached(name)?;
        if served.gauges(&cached)?.state != cache::CacheState::Closed {
            self.drain_for_good(&served, &cached)?;
            served.ask(CLOSE_WAIT, |reply| CacheMessage::Close { reply })??;
        }
        self.without(&served, || {
            self.stop_disk(&served)?;
            self.free(&served, "detached: all is in the backing")
        })
    }

    pub(super) fn drain_for_good(&self, served: &Served, cached: &Cached) -> Result<()> {
        let name = &served.name;
        served.link.send(Box::new(CacheMessage::LetGo));
        cached.held.store(0, Ordering::Relaxed);
        let drain = |reply| CacheMessage::Drain { to: None, hold: false, reply };
        match served.ask(DRAIN_WAIT, drain) {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(undrainable(name, error)),
            Err(_) => {
                let left = served.gauges(cached)?.dirty_bytes;
                let text = format!(
                    "cached disk {name} is being drained, {} left: `vflash drain {name} --wait` \
                     waits for it",
                    Bytes(left)
                );
                Err(Failure::new(ErrorCode::Busy, text))
            }
        }
    }

    /// Gives the allocation back to the pool.
    fn free(&self, served: &Served, why: &str) -> Result<()> {
        let id = served.id;
        served.pool.change(move |pool| pool.remove(id))?;
        self.host.run_dir.forget(&served.name);
        self.host.opener.groups.expel(&served.name, None);
        {
            let mut state = self.state();
            for door in state.doors_of(&served.name) {
                self.host.run_dir.forget(&door.name);
                state.volumes.remove(&door.name);
            }
            state.volumes.remove(&served.name);
            state.caches.remove(&served.name);
        }
        self.events().add(EventKind::Deleted, served.object(), why);
        Ok(())
    }

    /// Ends serving a cached disk; it stays in the list as one that is not open.
    pub(super) fn take_down(&self, served: &Served) -> Result<()> {
        self.without(served, || self.stop_disk(served))?;
        let mut state = self.state();
        if let Some(there) = state.volumes.get_mut(&served.name) {
            (there.cached, there.failure) = (None, None);
        }
        state.for_doors(&served.name, |door| (door.cached, door.failure) = (None, None));
        Ok(())
    }

    /// Gives up what only the flash holds; says what that is before it does anything.
    fn detach_lost(
        &self,
        served: &Served,
        cache: &CacheSettings,
        confirm: &[String],
    ) -> Result<String> {
        let name = &served.name;
        if served.settings.read_only {
            self.without(served, || {
                self.stop_disk(served)?;
                self.free(served, "detached: nothing was ever written")
            })?;
            return Ok(format!("nothing of {name} is lost: {} was only read", cache.backing));
        }
        let lost = match &served.cached {
            Some(cached) => loss(served, cached, cache),
            None => self.without(served, || Ok(loss_of_backing(served, cache)))?,
        };
        if !confirm.contains(name) {
            let unconfirmed = vec![name.clone()];
            return Err(Failure { unconfirmed, ..Failure::new(ErrorCode::Unconfirmed, lost) });
        }
        self.without(served, || {
            self.stop_disk(served)?;
            let left = self.give_up(served, cache);
            if left.is_err() {
                self.settle_others(served, cache)?;
            }
            self.free(served, &lost)?;
            self.retry_caches_now(&served.pool);
            match left {
                Ok(()) => Ok(lost),
                Err(error) => Ok(format!("{lost}; its owner stamp stays: {error}")),
            }
        })
    }
}

/// What is lost with the flash of a disk that is served.
fn loss(served: &Served, cached: &Cached, cache: &CacheSettings) -> String {
    let gauges = served.gauges(cached).unwrap_or_else(|_| cached.status.gauges());
    let (name, backing) = (&served.name, &cache.backing);
    let CacheGauges { dirty_bytes, oldest_dirty, drained_won, head_won, .. } = gauges;
    if dirty_bytes == 0 {
        return format!("nothing of {name} is lost: {backing} is at point {drained_won}");
    }
    format!(
        "of {name}, {} of acknowledged writes (points {} to {head_won}), the oldest {}s old, are \
         on the flash alone and are lost; {backing} is at point {drained_won}",
        Bytes(dirty_bytes),
        drained_won + 1,
        oldest_dirty.as_secs()
    )
}

/// As [`loss`], of a disk that could not be opened, by what its backing says.
fn loss_of_backing(served: &Served, cache: &CacheSettings) -> String {
    let lost = cached::open_backing(cache, Some(LOST_PATIENCE))
        .and_then(|mut backing| backing.lost(Damage::Skip));
    match lost {
        Ok(Some(lost)) => lost.text,
        Ok(None) => format!("{} is clean: by its stamp nothing is lost", cache.backing),
        Err(error) => format!(
            "all that the flash holds of {} and {} lacks is lost, and how much that is cannot be \
             told: {error}",
            served.name, cache.backing
        ),
    }
}

impl Engine {
    /// Makes the backing clean and nobody's, if it is this allocation's.
    fn give_up(&self, served: &Served, cache: &CacheSettings) -> crate::base::Result<()> {
        let groups = &self.host.opener.groups;
        let mut backing = cached::open_backing(cache, Some(LOST_PATIENCE))?;
        // A step that it was about to commit is committed, or it is not: the others go by that.
        if let Some(word) = backing.word()? {
            groups.expel(&served.name, Some(word));
        }
        groups.tell(&mut backing)?;
        let Some(standing) = backing.standing(Damage::Skip)? else { return Ok(()) };
        let log = Attributes::decode(&served.facts()?.attributes)?.log.unwrap_or_default();
        let owner = &standing.stamp.owner;
        if owner.allocation != *log.uuid.as_bytes() {
            return Ok(());
        }
        let confirm = owner.volume.clone();
        let options = RecoverOptions { damage: Damage::Skip, now_ms: unix_ms(), word: None };
        backing.take_over_lost(&confirm, options, &mut |_| {}).map(drop)
    }
}
