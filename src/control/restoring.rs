//! Pools at the start of the daemon, and those that could not be opened then.

use super::api::EventKind;
use super::engine::Engine;
use super::pool::{HELD_WAIT, OpenPool, is_null};
use super::watch_cache::Retry;
use crate::base::{Error, Result};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// A pool that could not be opened.
#[derive(Clone, Debug)]
pub(super) struct FailedPool {
    /// Its name when it was in service; `None`: nobody knows of a pool there.
    pub known_as: Option<String>,
    pub reason: String,
    retry: Option<Retry>,
}

impl FailedPool {
    /// What is wrong with it. The reason says where it was looked for.
    pub(super) fn problem(&self) -> String {
        let name = self.known_as.as_ref().map_or(String::new(), |name| format!(" {name}"));
        format!("pool{name}: {}", self.reason)
    }

    /// What the pool on `device` is called.
    pub(super) fn name<'a>(&'a self, device: &'a str) -> &'a str {
        self.known_as.as_deref().unwrap_or(device)
    }
}

/// A device, and the name of the pool on it if that is known.
type Wanted = (String, Option<String>);

impl Engine {
    /// Opens the pools of the last daemon and those given, and serves what they hold. What cannot
    /// be opened is noted, does not stop the rest, and is tried again.
    pub fn restore(&self, devices: &[String]) {
        let _changes = self.changes.begin_in_time("the start");
        let remembered = self.host.run_dir.remembered().unwrap_or_else(|error| {
            self.events().add(EventKind::Error, "vflashd", error.to_string());
            Vec::new()
        });
        let known = remembered.into_iter().map(|pool| (pool.device, Some(pool.name)));
        self.open_all(known.collect());
        // Not before: a copy of one that is known must not take its place.
        self.open_all(devices.iter().map(|device| (absolute(device), None)).collect());
        // Nor before: a daemon killed meanwhile must leave the whole list behind.
        self.remember_pools();
    }

    /// Opens pools side by side: one that waits for its device holds up no other.
    fn open_all(&self, pools: Vec<Wanted>) {
        let mut wanted: Vec<Wanted> = Vec::new();
        for pool in pools {
            if !self.is_known(&pool) && !wanted.contains(&pool) {
                wanted.push(pool);
            }
        }
        let (done, opened) = channel();
        std::thread::scope(|scope| {
            for wanted in &wanted {
                let done = done.clone();
                scope.spawn(move || {
                    let pool = OpenPool::open(&wanted.0, wanted.1.as_deref(), HELD_WAIT);
                    done.send((wanted, pool)).expect("it is waited for");
                });
            }
            drop(done);
            for (wanted, pool) in opened {
                let taken = pool.and_then(|pool| self.take_up(pool, EventKind::PoolOpened));
                if let Err(error) = taken {
                    self.note_failed(wanted, &error);
                }
            }
        });
    }

    /// It is open, or could not be opened a moment ago.
    fn is_known(&self, (device, name): &Wanted) -> bool {
        let state = self.state();
        // A null pool that is given is the one that is remembered.
        let again =
            |pool: &OpenPool| (name.is_none() || !is_null(device)) && pool.device == *device;
        state.failed.contains_key(device) || state.pools.values().any(|pool| again(pool))
    }

    fn note_failed(&self, (device, name): &Wanted, error: &Error) {
        let failed = FailedPool {
            known_as: name.clone(),
            reason: error.to_string(),
            retry: Retry::default().next(error.kind()),
        };
        let object = format!("pool {}", failed.name(device));
        self.events().add(EventKind::PoolFailed, object, error.to_string());
        self.state().failed.insert(device.clone(), failed);
    }

    /// Tries those again that could not be opened, when their time has come. Changes that are
    /// under way go first.
    pub fn retry_pools(&self) {
        // A device that hangs must not gather threads.
        let Ok(_retrying) = self.retrying.try_lock() else { return };
        let now = Instant::now();
        let due: Vec<Wanted> = {
            let mut state = self.state();
            let due = |failed: &mut FailedPool| {
                failed.retry.as_mut().is_some_and(|retry| retry.is_due(now))
            };
            let due = state.failed.iter_mut().filter_map(|(device, failed)| {
                due(failed).then(|| (device.clone(), failed.known_as.clone()))
            });
            due.collect()
        };
        for wanted in due {
            if let Err(error) = self.retry_pool(&wanted)
                && let Some(failed) = self.state().failed.get_mut(&wanted.0)
            {
                failed.reason = error.to_string();
                failed.retry = failed.retry.and_then(|retry| retry.next(error.kind()));
            }
        }
    }

    fn retry_pool(&self, (device, name): &Wanted) -> Result<()> {
        let pool = OpenPool::open(device, name.as_deref(), Duration::ZERO)?;
        let changes = self.changes.begin_within("opening a pool", Duration::ZERO);
        if changes.is_err() || !self.state().failed.contains_key(device) {
            pool.stop();
            return Ok(());
        }
        self.take_up(pool, EventKind::PoolOpened)?;
        self.remember_pools();
        Ok(())
    }
}

/// A device as it is named from anywhere.
fn absolute(device: &str) -> String {
    match std::path::absolute(device) {
        Ok(path) if !is_null(device) => path.display().to_string(),
        _ => device.to_owned(),
    }
}
