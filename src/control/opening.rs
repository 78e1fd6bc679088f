//! Opening cached disks while everything else goes on: each in a thread of its own, since storage
//! that hangs hangs whoever asks it; again and again until it comes.

use super::alone::{Stand, is_away};
use super::api::{ErrorCode, EventKind, Failure};
use super::cached::{self, Cached};
use super::caching::REST_WAIT;
use super::engine::{Engine, Everything};
use super::pool::OpenPool;
use super::served::{Host, Served};
use super::sharing::stop_disk;
use super::watch_cache::Retry;
use crate::base::{Error, ErrorKind, Result};
use crate::cache::CacheMessage;
use crate::cache::consistency::Waker;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// How long a start waits for all cached disks of a pool: those that take longer are served later.
const START_WAIT: Duration = Duration::from_secs(10);

/// How long whoever makes a cached disk waits for its backing.
const MAKE_WAIT: Duration = Duration::from_secs(30);

/// What a thread that opens works on.
#[derive(Clone)]
struct Task {
    host: Host,
    everything: Arc<Mutex<Everything>>,
    served: Served,
}

impl Task {
    /// Opens the disk and serves it, or looks for the backing of one that is served alone.
    fn run(self) -> Result<()> {
        match self.served.cached.clone() {
            Some(cached) => self.look_for_backing(&cached),
            None => {
                let opening = self.served.opening.clone();
                let _opening = match opening.try_lock() {
                    Err(TryLockError::WouldBlock) => return Err(under_way(&self.served.name)),
                    lock => lock,
                };
                self.open()
            }
        }
    }

    /// Opens the disk and serves it, if it is still to be served when that is done. The caller
    /// holds its `opening`.
    fn open(mut self) -> Result<()> {
        if !self.is_wanted() {
            return Ok(());
        }
        self.served.renew_link(&self.host);
        let home = self.served.name.clone();
        let mut doors = lock(&self.everything).doors_of(&home);
        doors.iter_mut().for_each(|door| door.renew_link(&self.host));
        let link = self.served.link.clone();
        let waker: Waker = Arc::new(move || link.send(Box::new(CacheMessage::Wake)));
        let opened = cached::open(&self.host.opener, &self.served.pool, &self.served.name, waker);
        let told = |opened: &cached::CachedVolume| {
            let findings = opened.findings.iter().map(|text| (EventKind::Error, text.clone()));
            let notes = opened.notes.iter().map(|text| (EventKind::Updated, text.clone()));
            findings.chain(notes).collect()
        };
        let told: Vec<(EventKind, String)> = opened.as_ref().map(told).unwrap_or_default();
        let result = match opened {
            Ok(opened) => self.served.export_cached(&self.host, opened, &mut doors),
            Err(error) => Err(error),
        };
        if result.is_ok() {
            for (kind, text) in told {
                self.host.events.add(kind, self.served.object(), text);
            }
        }
        self.publish(&result, doors);
        result
    }

    /// Claims the backing of a disk that was opened alone, if it is back.
    fn look_for_backing(self, cached: &Arc<Cached>) -> Result<()> {
        let (Some(alone), Some(cache)) = (cached.looks_for_backing(), &self.served.settings.cache)
        else {
            return Ok(());
        };
        // Storage may hang: nobody is kept from the disk meanwhile.
        let found = alone.ask(cache);
        let opening = self.served.opening.clone();
        let _opening = opening.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(served) = self.still(cached) else { return Ok(()) };
        let (host, name) = (&self.host, &served.name);
        let context = |error: Error| error.context(format!("cached disk {name}"));
        let found = found.map_err(context);
        let claim = |backing| alone.claim((&host.opener, &served.pool, name), backing);
        match (found.and_then(claim), alone.stand()) {
            (Ok(found), Stand::Away(_)) => {
                let export = served.export_id()?;
                host.server.give_disks(export, found.disks)?;
                let backing = Box::new(found.claimed);
                served.link.send(Box::new(CacheMessage::Claimed { backing }));
                alone.stands(Stand::Claimed);
                Ok(())
            }
            (Ok(found), _) => {
                drop(found);
                self.open_anew(served)
            }
            (Err(error), stand) => {
                let text = error.to_string();
                let away = is_away(&error) || error.kind() == ErrorKind::Busy;
                match stand {
                    Stand::Away(_) if away => alone.stands(Stand::Away(text)),
                    Stand::Away(_) => {
                        alone.stands(Stand::Refused(text.clone()));
                        served.link.send(Box::new(CacheMessage::Refused { why: text }));
                    }
                    Stand::Refused(_) | Stand::Claimed => {}
                }
                let mut everything = lock(&self.everything);
                let watched = everything.caches.entry(name.clone()).or_default();
                watched.retry = watched.retry.map(Retry::soon);
                Err(error)
            }
        }
    }

    /// The volume as it is listed now, if it still has this disk.
    fn still(&self, cached: &Arc<Cached>) -> Option<Served> {
        let everything = lock(&self.everything);
        let there = everything.volumes.get(&self.served.name)?;
        let same = there.cached.as_ref().is_some_and(|there| Arc::ptr_eq(there, cached));
        same.then(|| there.clone())
    }

    /// The backing that was refused is the right one again: the disk, which is fenced, is taken
    /// down and opened as ever.
    fn open_anew(self, served: Served) -> Result<()> {
        let name = served.name.clone();
        let doors = lock(&self.everything).doors_of(&name);
        stop_disk(&self.host, &served, &doors)?;
        let failed = |listed: &mut Served| {
            (listed.cached, listed.failure) = (None, Some("it was fenced".to_owned()));
        };
        {
            let mut everything = lock(&self.everything);
            everything.volumes.get_mut(&name).into_iter().for_each(failed);
            everything.for_doors(&name, failed);
        }
        Self { served: Served { cached: None, ..served }, ..self }.open()
    }

    /// What its machines had under way when an earlier daemon ended may be done again, at any time.
    fn note_past_log(&self, doors: &[Served]) {
        if !self.served.cached.as_ref().is_some_and(|cached| cached.past_log) {
            return;
        }
        let own = (!self.served.left).then_some(&self.served);
        let writing = own.into_iter().chain(doors).filter(|door| !door.settings.read_only);
        for door in writing {
            if let Err(error) = self.host.run_dir.set_past_log(&door.name, true) {
                self.host.events.add(EventKind::Error, door.object(), error.to_string());
            }
        }
    }

    fn is_wanted(&self) -> bool {
        let everything = lock(&self.everything);
        let there = everything.volumes.get(&self.served.name);
        there.is_some_and(|there| there.id == self.served.id && there.cached.is_none())
    }

    /// Shows what became of it.
    fn publish(mut self, result: &Result<()>, doors: Vec<Served>) {
        let name = self.served.name.clone();
        let (object, events) = (self.served.object(), self.host.events.clone());
        let mut everything = lock(&self.everything);
        let Some(there) = everything.volumes.get_mut(&name) else {
            drop(everything);
            // Its pool was closed meanwhile.
            if let Err(error) = stop_disk(&self.host, &self.served, &doors) {
                log::error!("{object}: {error}");
            }
            return;
        };
        let before = there.failure.take();
        match result {
            Ok(()) => {
                self.note_past_log(&doors);
                self.served.settings = there.settings.clone();
                *there = self.served.clone();
                for door in doors {
                    everything.volumes.insert(door.name.clone(), door);
                }
                everything.caches.remove(&name);
                drop(everything);
                self.served.resume_mode(&self.host);
                if before.is_some() {
                    events.add(EventKind::BackingBack, object, "opened, and served again");
                }
            }
            Err(error) => {
                let text = error.to_string();
                let told = before.as_ref() == Some(&text);
                there.failure = Some(text.clone());
                everything.for_doors(&name, |door| door.failure = Some(text.clone()));
                let retry = everything.caches.entry(name).or_default();
                retry.retry = retry.retry.and_then(|retry| retry.next(error.kind()));
                drop(everything);
                if !told {
                    events.add(EventKind::Error, object, text);
                }
            }
        }
    }
}

fn lock(everything: &Mutex<Everything>) -> MutexGuard<'_, Everything> {
    everything.lock().unwrap_or_else(PoisonError::into_inner)
}

fn under_way(name: &str) -> Error {
    let text = format!("cached disk {name} is being opened: its backing takes long; try again");
    Error::new(ErrorKind::Busy, text)
}

impl Engine {
    /// Opens all cached disks of a pool, side by side.
    pub(super) fn open_caches(&self, pool: &Arc<OpenPool>) {
        let of_pool = |served: &&Served| {
            served.home.is_none() && served.is_opening() && Arc::ptr_eq(&served.pool, pool)
        };
        let wanted: Vec<Served> = self.state().volumes.values().filter(of_pool).cloned().collect();
        let begun: Vec<_> = wanted.into_iter().map(|served| self.begin_opening(served)).collect();
        let deadline = Instant::now() + START_WAIT;
        for (name, opened) in begun {
            let wait = deadline.saturating_duration_since(Instant::now());
            if let Err(RecvTimeoutError::Timeout) = opened.recv_timeout(wait) {
                log::warn!("cached disk {name}: its backing does not answer yet; it is waited for");
            }
        }
    }

    fn begin_opening(&self, served: Served) -> (String, Receiver<Result<()>>) {
        let (done, opened) = channel();
        let name = served.name.clone();
        let task = Task { host: self.host.clone(), everything: self.everything.clone(), served };
        let spawned = std::thread::Builder::new().name("open".to_owned()).spawn(move || {
            // Nobody may be waiting any more.
            let _ = done.send(task.run());
        });
        if let Err(error) = spawned {
            log::error!("cached disk {name}: starting a thread to open it: {error}");
        }
        (name, opened)
    }

    /// Opens a cached disk that was made just now.
    pub(super) fn open_cache(&self, name: &str) -> std::result::Result<(), Failure> {
        let (_, opened) = self.begin_opening(self.served(name)?);
        match opened.recv_timeout(MAKE_WAIT) {
            Ok(result) => Ok(result?),
            Err(_) => Err(under_way(name).into()),
        }
    }

    /// Tries those again that could not be opened, or were opened alone, when their time has come.
    pub(super) fn retry_caches(&self) {
        let now = Instant::now();
        let due: Vec<Served> = {
            let mut state = self.state();
            let failed = |served: &&Served| {
                let alone = |cached: &Arc<Cached>| cached.looks_for_backing().is_some();
                let waits = served.failure.is_some() || served.cached.as_ref().is_some_and(alone);
                served.home.is_none() && served.is_cached() && waits
            };
            let failed: Vec<Served> = state.volumes.values().filter(failed).cloned().collect();
            let due = |served: &Served| {
                let watched = state.caches.entry(served.name.clone()).or_default();
                watched.retry.as_mut().is_some_and(|retry| retry.is_due(now))
            };
            failed.into_iter().filter(due).collect()
        };
        for served in due {
            let _ = self.begin_opening(served);
        }
    }

    /// Tries those of a pool again that could not be opened: what they waited for has changed.
    pub(super) fn retry_caches_now(&self, pool: &Arc<OpenPool>) {
        let failed = |served: &&Served| {
            let of_pool = served.home.is_none() && Arc::ptr_eq(&served.pool, pool);
            of_pool && served.is_cached() && served.failure.is_some()
        };
        let failed: Vec<Served> = self.state().volumes.values().filter(failed).cloned().collect();
        failed.into_iter().for_each(|served| drop(self.begin_opening(served)));
    }

    /// Takes a cached disk down for a change, and keeps it from being opened meanwhile.
    pub(super) fn without<R>(
        &self,
        served: &Served,
        work: impl FnOnce() -> std::result::Result<R, Failure>,
    ) -> std::result::Result<R, Failure> {
        let deadline = Instant::now() + REST_WAIT;
        let _opening = loop {
            match served.opening.try_lock() {
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(Failure::new(ErrorCode::Busy, under_way(&served.name).to_string()));
                }
                lock => break lock,
            }
        };
        work()
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self { at: Instant::now(), pause: Duration::from_secs(1) }
    }
}
