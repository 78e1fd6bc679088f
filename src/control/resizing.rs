//! Another size of a cached disk's flash, while it is served. What it holds stays.
//!
//! Growth: the pool gives extents, then the disk uses them. Shrinking: the disk drains and forgets
//! what lies behind the new end, then the pool takes the extents back. So the allocation is never
//! smaller than the disk takes it to be, whatever dies in between.

use super::api::{ErrorCode, EventKind, Failure};
use super::cached::Cached;
use super::caching::ANSWER_WAIT;
use super::engine::{Engine, Everything};
use super::served::{Host, Served};
use crate::base::units::Bytes;
use crate::base::{Error, ErrorKind};
use crate::cache::{CacheMessage, Place};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

type Result<T> = std::result::Result<T, Failure>;

/// How long one call waits for a shrink, which may have to drain first.
const SHRINK_WAIT: Duration = Duration::from_secs(2);

impl Engine {
    /// Brings a cached disk to another size of its pool. A shrink that takes long goes on after
    /// this returns; an event tells its end.
    ///
    /// # Errors
    /// `Full`: the pool has not so much. `Invalid`: too small; the least is named. `Busy`: it is
    /// held at a point, not served, or another resize is at its end.
    pub(super) fn resize_cache(&self, name: &str, size_bytes: u64) -> Result<()> {
        let served = self.home_of(name)?;
        let old = served.facts()?.size_bytes;
        if size_bytes < old {
            return self.shrink_cache(served, size_bytes);
        }
        let Some(cached) = &served.cached else {
            return self.without(&served, || grow_allocation(&served, size_bytes).map(drop));
        };
        if size_bytes == old && cached.status.gauges().resizing_to.is_none() {
            return Ok(());
        }
        // To the size that it has: ends a shrink under way.
        self.without(&served, || {
            let place = grow_allocation(&served, size_bytes)?;
            let grown = served.ask(ANSWER_WAIT, |reply| CacheMessage::Grow { place, reply })?;
            if let Err(error) = grown {
                take_back(&served, old);
                return Err(error.into());
            }
            Ok(())
        })?;
        note(&self.host, &served, (old, size_bytes));
        Ok(())
    }

    fn shrink_cache(&self, served: Served, size_bytes: u64) -> Result<()> {
        let (served, cached) = self.cached(&served.name)?;
        let gauges = served.gauges(&cached)?;
        if gauges.resizing_to == Some(size_bytes) {
            return Ok(());
        }
        if cached.held.load(Ordering::Relaxed) > 0 && gauges.dirty_bytes > 0 {
            let text = format!(
                "cached disk {0} is held at a point, and what its backing lacks must stay on the \
                 flash: `vflash drain {0}` lets it go",
                served.name
            );
            return Err(Failure::new(ErrorCode::Busy, text));
        }
        let shrunk = served.asked(|reply| CacheMessage::Shrink { size_bytes, reply });
        let everything = self.everything.clone();
        let end = Shrink { host: self.host.clone(), everything, served, cached, size_bytes };
        match shrunk.recv_timeout(SHRINK_WAIT) {
            Ok(result) => Ok(result.and_then(|()| end.give_back())?),
            Err(RecvTimeoutError::Timeout) => {
                end.wait_for(shrunk);
                Ok(())
            }
            Err(RecvTimeoutError::Disconnected) => {
                let text = format!("cached disk {} is being taken down", end.served.name);
                Err(Failure::new(ErrorCode::NotFound, text))
            }
        }
    }
}

/// Lengthens the allocation; where it lies.
fn grow_allocation(served: &Served, size_bytes: u64) -> Result<Place> {
    let id = served.id;
    let name = served.name.clone();
    let place = served.pool.change(move |pool| {
        pool.resize(id, size_bytes)?;
        let gone = || Error::new(ErrorKind::Gone, format!("{name}: its allocation is gone"));
        let allocation = pool.allocation(id).ok_or_else(gone)?;
        Ok(Place::new(allocation.size_bytes, allocation.runs()))
    });
    Ok(place?)
}

/// The disk does not want what it was given.
fn take_back(served: &Served, size_bytes: u64) {
    let id = served.id;
    if let Err(error) = served.pool.change(move |pool| pool.resize(id, size_bytes)) {
        log::warn!("{}: it stays larger than it is used: {error}", served.object());
    }
}

fn note(host: &Host, served: &Served, (from, to): (u64, u64)) {
    let text = format!("its cache was resized from {} to {}", Bytes(from), Bytes(to));
    host.events.add(EventKind::Resized, served.object(), text);
}

/// A shrink under way.
struct Shrink {
    host: Host,
    everything: Arc<Mutex<Everything>>,
    served: Served,
    cached: Arc<Cached>,
    size_bytes: u64,
}

impl Shrink {
    /// A thread waits until the disk is done.
    fn wait_for(self, shrunk: Receiver<crate::base::Result<()>>) {
        let object = self.served.object();
        let spawned = std::thread::Builder::new().name("shrink".to_owned()).spawn(move || {
            // Dropped unanswered when the disk is taken down: it keeps its size.
            let Ok(result) = shrunk.recv() else { return };
            let (events, object) = (self.host.events.clone(), self.served.object());
            if let Err(error) = result.and_then(|()| self.give_back()) {
                let text = format!("its cache keeps its size: {error}");
                events.add(EventKind::Error, object, text);
            }
        });
        if let Err(error) = spawned {
            log::warn!("{object}: starting a thread that waits for a shrink: {error}");
        }
    }

    /// The disk is done with what lies behind the new end: the pool takes it back, unless the disk
    /// was opened anew meanwhile, which uses all there is.
    fn give_back(&self) -> crate::base::Result<()> {
        let _opening = self.served.opening.lock().unwrap_or_else(PoisonError::into_inner);
        let same = {
            let state = self.everything.lock().unwrap_or_else(PoisonError::into_inner);
            let there = state.volumes.get(&self.served.name);
            let there = there.and_then(|there| there.cached.as_ref());
            there.is_some_and(|there| Arc::ptr_eq(there, &self.cached))
        };
        if !same {
            let text = format!("{} was opened anew meanwhile", self.served.name);
            return Err(Error::new(ErrorKind::Busy, text));
        }
        let from = self.served.facts()?.size_bytes;
        let (id, to) = (self.served.id, self.size_bytes);
        let resized = self.served.pool.change(move |pool| pool.resize(id, to));
        self.served.link.send(Box::new(CacheMessage::Shrunk));
        resized?;
        note(&self.host, &self.served, (from, to));
        Ok(())
    }
}
