//! The composition: pools, the vhost-user server, and a volume for each allocation.
//!
//! Two locks. `changes` is held throughout a change, so that changes do not mix. `state` is held
//! only to read or replace entries, never while anything is waited for, so that looking is always
//! possible. What exists is what the pools hold; nothing here is written down anywhere else.

use super::api::{
    Attachment, ErrorCode, EventKind, Failure, Health, QUEUE_SIZE, State, Status, Volume, Volumes,
    Waiting,
};
use super::cached::Opener;
use super::events::{EventLog, now_ms};
use super::pool::{HELD_WAIT, OpenPool, is_null};
use super::restoring::FailedPool;
use super::rundir::{Remembered, RunDir};
use super::served::{Host, Served};
use super::turns::Turns;
use super::watch::Watched;
use super::watch_cache::WatchedCache;
use crate::base::clock::Nanos;
use crate::base::{Error, ErrorKind, Result};
use crate::cache::memory::DrainMemory;
use crate::vhost::{Server, ServerOptions};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How long a change under way is waited for at the end.
const CHANGE_WAIT: Duration = Duration::from_secs(5);

/// How long pools may take to stop at the end: all they wait for is their drives.
const POOLS_WAIT: Duration = Duration::from_secs(5);

/// How long the threads of the data path may take to answer, before this daemon is hung.
const LIFE_WAIT: Duration = Duration::from_secs(10);

pub struct Engine {
    pub(super) host: Host,
    started_ms: u64,
    reactors: usize,
    /// What the last daemon served is served again.
    restored: watch::Sender<bool>,
    pub(super) changes: Turns,
    /// Held while pools are tried again.
    pub(super) retrying: Mutex<()>,
    pub(super) everything: Arc<Mutex<Everything>>,
}

/// What there is, by name.
#[derive(Default)]
pub(super) struct Everything {
    pub pools: BTreeMap<String, Arc<OpenPool>>,
    /// Pools that could not be opened, by device.
    pub failed: BTreeMap<String, FailedPool>,
    /// Pools whose file is being made, by name: the device.
    pub making: BTreeMap<String, String>,
    /// By `VM/VOLUME`.
    pub volumes: BTreeMap<String, Served>,
    /// Why the manifests of `-f` were not applied.
    pub manifest_failure: Option<String>,
    /// The last look at each pool.
    pub watched: BTreeMap<String, Watched>,
    /// When each volume's drive last failed it, as far as that was told.
    pub drive_errors: BTreeMap<String, Nanos>,
    /// The last look at each cached disk.
    pub caches: BTreeMap<String, WatchedCache>,
}

impl Engine {
    /// Starts the data path; serves nothing yet.
    pub fn start(run_dir: RunDir, options: &ServerOptions) -> Result<Self> {
        let instance = uuid::Uuid::new_v4();
        let events = Arc::new(EventLog::new(instance.to_string()));
        let opener =
            Opener { instance, groups: Default::default(), memory: DrainMemory::of_daemon() };
        let server = Server::start(options)?;
        let host = Host { server, events, run_dir: Arc::new(run_dir), opener };
        host.events.add(EventKind::Started, "vflashd", env!("CARGO_PKG_VERSION"));
        Ok(Self {
            host,
            started_ms: now_ms(),
            reactors: options.reactors,
            restored: watch::Sender::new(false),
            changes: Turns::default(),
            retrying: Mutex::default(),
            everything: Arc::default(),
        })
    }

    pub fn events(&self) -> &EventLog {
        &self.host.events
    }

    pub(super) fn state(&self) -> MutexGuard<'_, Everything> {
        self.everything.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything that was to be served from the start is, as far as it can be.
    pub fn set_restored(&self) {
        self.restored.send_replace(true);
    }

    /// Becomes true when that is so.
    pub fn follow_restored(&self) -> watch::Receiver<bool> {
        self.restored.subscribe()
    }

    pub(super) fn is_open(&self, device: &str) -> bool {
        !is_null(device) && self.state().pools.values().any(|pool| pool.device == device)
    }

    /// Opens a pool and serves its volumes.
    pub(super) fn open_pool(&self, device: &str, name: Option<&str>) -> Result<Arc<OpenPool>> {
        let pool = self.take_up(OpenPool::open(device, name, HELD_WAIT)?, EventKind::PoolOpened)?;
        self.remember_pools();
        Ok(pool)
    }

    /// Makes an open pool one of ours.
    pub(super) fn take_up(&self, pool: OpenPool, kind: EventKind) -> Result<Arc<OpenPool>> {
        let pool = Arc::new(pool);
        let refusal = self.refuses(&pool);
        if let Some(error) = refusal {
            pool.stop();
            return Err(error);
        }
        {
            let mut state = self.state();
            state.failed.remove(&pool.device);
            state.pools.insert(pool.name.clone(), pool.clone());
        }
        let text = format!("on {}, {} volumes", pool.device, pool.facts().allocations.len());
        self.host.events.add(kind, format!("pool {}", pool.name), text);
        for (name, facts) in pool.facts().allocations {
            let served = Served::start(&self.host, &pool, &name, &facts);
            self.state().volumes.insert(name, served.clone());
            self.list_doors(&served);
        }
        self.open_caches(&pool);
        Ok(pool)
    }

    /// Names of pools, and of volumes in all pools, are unique on a host.
    fn refuses(&self, pool: &OpenPool) -> Option<Error> {
        let state = self.state();
        let text = if let Some(other) = state.pools.get(&pool.name) {
            format!("pool {} is open already, on {}", pool.name, other.device)
        } else if let Some(other) = failed_elsewhere(&state, pool) {
            // A copy, most likely: guests must not find their disks in an earlier state unasked.
            format!(
                "pool {0} was open on {other}, which is there and cannot be opened now: if this is \
                 to take its place, `vflash pool close {0}` first",
                pool.name
            )
        } else {
            let facts = pool.facts();
            let twice = facts.allocations.keys().find(|name| state.volumes.contains_key(*name))?;
            format!("pool {}: volume {twice} exists in another pool that is open", pool.name)
        };
        Some(Error::new(ErrorKind::Busy, format!("{}: {text}", pool.device)))
    }

    pub(super) fn remember_pools(&self) {
        let state = self.state();
        let open = state
            .pools
            .values()
            .map(|pool| Remembered { name: pool.name.clone(), device: pool.device.clone() });
        // A drive that is away today may be back at the next start.
        let failed = state.failed.iter().filter_map(|(device, failed)| {
            Some(Remembered { name: failed.known_as.clone()?, device: device.clone() })
        });
        let pools: Vec<Remembered> = open.chain(failed).collect();
        drop(state);
        if let Err(error) = self.host.run_dir.remember(&pools) {
            self.host.events.add(EventKind::Error, "vflashd", error.to_string());
        }
    }

    /// By its name, or by the path of its device.
    pub(super) fn open_pool_named(
        &self,
        name: &str,
    ) -> std::result::Result<Arc<OpenPool>, Failure> {
        let state = self.state();
        let on_device = || {
            let mut pools = state.pools.values();
            pools.find(|pool| pool.device == name && !is_null(name))
        };
        state.pools.get(name).or_else(on_device).cloned().ok_or_else(|| {
            let text = format!("there is no pool `{name}`; `vflash get pools` lists them");
            Failure::new(ErrorCode::NotFound, text)
        })
    }

    pub(super) fn served(&self, name: &str) -> std::result::Result<Served, Failure> {
        self.state().volumes.get(name).cloned().ok_or_else(|| {
            let text = format!("there is no volume `{name}`; `vflash get volumes` lists them");
            Failure::new(ErrorCode::NotFound, text)
        })
    }

    pub fn volumes(&self) -> Volumes {
        let served: Vec<Served> = self.state().volumes.values().cloned().collect();
        // One that was deleted meanwhile is left out.
        let volumes = served.iter().filter_map(|served| served.report(&self.host).ok()).collect();
        Volumes { volumes }
    }

    pub fn volume(&self, name: &str) -> std::result::Result<Volume, Failure> {
        Ok(self.served(name)?.report(&self.host)?)
    }

    pub fn attachment(&self, name: &str) -> std::result::Result<Attachment, Failure> {
        let served = self.served(name)?;
        served.export_id()?;
        if served.left {
            let text = format!("{name} has left its disk to others: apply a manifest with it");
            return Err(Failure::new(ErrorCode::Invalid, text));
        }
        Ok(Attachment {
            name: served.name.clone(),
            socket: served.socket.display().to_string(),
            serial: served.serial.clone(),
            size_bytes: served.size_bytes(&served.facts()?),
            read_only: served.settings.read_only
                || served.cached.as_ref().is_some_and(|cached| cached.read_only),
            queues_max: served.queues(),
            queue_size: QUEUE_SIZE,
            attached: served.link.is_attached(),
        })
    }

    pub fn health(&self) -> Health {
        let problems = self.problems();
        let state = match problems.is_empty() {
            _ if !*self.restored.borrow() => State::Starting,
            true => State::Ok,
            false => State::Degraded,
        };
        Health { state, problems }
    }

    fn problems(&self) -> Vec<String> {
        let state = self.state();
        let failed = state.failed.values().map(FailedPool::problem);
        let pools: Vec<_> = state.pools.values().map(|pool| pool.report()).collect();
        let pools = pools
            .into_iter()
            .filter_map(|pool| pool.message.map(|text| format!("pool {}: {text}", pool.name)));
        let volumes = state.volumes.values().filter_map(|volume| {
            volume.problem().map(|reason| format!("{}: {reason}", volume.object()))
        });
        failed
            .chain(pools)
            .chain(volumes)
            .chain(state.manifest_failure.clone())
            .chain(self.changes.problem())
            .collect()
    }

    pub fn status(&self) -> Status {
        let served: Vec<Served> = self.state().volumes.values().cloned().collect();
        let homes = served.iter().filter(|served| served.home.is_none());
        let caches = homes.filter_map(Served::cached_disk).collect();
        Status { caches, ..self.summary() }
    }

    /// The status but for cached disks, which wakes nobody.
    pub(super) fn summary(&self) -> Status {
        let Health { state, problems } = self.health();
        let everything = self.state();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            instance: self.events().instance().to_owned(),
            run_dir: self.host.run_dir.path().display().to_string(),
            started_ms: self.started_ms,
            reactors: self.reactors,
            state,
            problems,
            pools: everything.pools.len() + everything.failed.len(),
            space: everything.pools.values().map(|pool| pool.space_left()).collect(),
            volumes: everything.volumes.len(),
            attached: everything
                .volumes
                .values()
                .filter(|volume| volume.link.is_attached())
                .count(),
            last_event: self.events().last(),
            waiting: waiting_in_all(everything.volumes.values()),
            caches: Vec::new(),
        }
    }

    pub fn run_dir(&self) -> &std::path::Path {
        self.host.run_dir.path()
    }

    /// Whether the threads that guests depend on go on: the socket thread and all reactors.
    pub fn answers(&self) -> bool {
        let answers = self.host.server.answers(LIFE_WAIT);
        if let Err(error) = &answers {
            log::error!("systemd is not told that all is well: {error}");
        }
        answers.is_ok()
    }

    /// The open pools, to look at without holding anything.
    pub fn open_pools(&self) -> Vec<Arc<OpenPool>> {
        self.state().pools.values().cloned().collect()
    }

    /// Takes a pool's facts anew and tells what is worth an event.
    pub fn watch(&self, pool: &OpenPool) {
        pool.refresh_if_idle();
        let now = Watched::look(pool);
        let before = self.state().watched.get(&pool.name).cloned().unwrap_or_default();
        let now = before.tell(now, &pool.name, self.events());
        self.state().watched.insert(pool.name.clone(), now);
    }

    /// Stops serving. No request is under way when this returns. Those that wait for space or for a
    /// backing stay in their guests' in-flight areas: the next daemon, for which guests wait, does
    /// them.
    pub fn stop(&self) -> Result<()> {
        // A change that waits for a drive must not keep the guests' requests from being ended.
        let _changes = self.changes.begin_within("the stop", CHANGE_WAIT).ok();
        let pools = self.open_pools();
        let restless = self.rest_caches();
        if restless > 0 {
            log::warn!("{restless} backings do not answer: what they lack is on the flash");
        }
        let waiting =
            pools.iter().map(|pool| pool.waiting()).sum::<usize>() + self.parked_requests();
        if waiting > 0 {
            log::info!("{waiting} requests wait for space: the next daemon does them");
        }
        // A write that a log has taken in part stays until there is space for the rest of it, and
        // what a backing was asked for until that answers.
        let held_up = || restless > 0 || self.held_up_requests() > 0;
        let stopped = self.host.server.clone().stop_unless(held_up);
        stop_pools(pools);
        match stopped {
            Err(error) if held_up() && error.kind() == ErrorKind::Busy => Ok(()),
            stopped => stopped,
        }
    }
}

/// Stops pools side by side. One whose drive does not answer is left to the end of the process.
fn stop_pools(pools: Vec<Arc<OpenPool>>) {
    let (done, stopped) = channel();
    let mut left: BTreeSet<String> = pools.iter().map(|pool| pool.name.clone()).collect();
    for pool in pools {
        let done = done.clone();
        let stop = move || {
            pool.stop();
            // Nobody waits any more if it took too long.
            let _ = done.send(pool.name.clone());
        };
        if let Err(error) = std::thread::Builder::new().name("stop".to_owned()).spawn(stop) {
            log::error!("starting a thread to stop a pool: {error}");
        }
    }
    drop(done);
    let deadline = Instant::now() + POOLS_WAIT;
    while let Ok(name) = stopped.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        left.remove(&name);
    }
    for name in left {
        log::error!("pool {name} does not come to rest: does its drive answer?");
    }
}

fn waiting_in_all<'a>(volumes: impl Iterator<Item = &'a Served>) -> Option<Waiting> {
    volumes.filter_map(Served::waiting).reduce(|all, one| Waiting {
        requests: all.requests + one.requests,
        oldest_ms: all.oldest_ms.max(one.oldest_ms),
    })
}

/// The device that is there, is known as a pool of this name, and could not be opened.
fn failed_elsewhere<'a>(state: &'a Everything, pool: &OpenPool) -> Option<&'a str> {
    let known = |(device, failed): &(&String, &FailedPool)| {
        failed.known_as.as_ref() == Some(&pool.name)
            && **device != pool.device
            && std::path::Path::new(device).exists()
    };
    state.failed.iter().find(known).map(|(device, _)| device.as_str())
}

#[cfg(test)]
#[path = "engine_test.rs"]
mod tests;
