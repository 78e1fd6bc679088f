//! An open pool as control sees it: its keeper, and the facts about it as of a moment ago.
//!
//! Facts are read from the pool once a second and after each change. Whoever only looks reads
//! those, so that a drive that hangs hangs nobody but who changes something on it.

use super::api::{self, PoolState};
use crate::base::units::Bytes;
use crate::base::{Error, ErrorKind, Result};
use crate::flash::{
    AllocationId, CheckProgress, CheckReport, Class, FormatOptions, Keeper, KeeperOptions, Pool,
    ScrubStatus, Space, Watermark,
};
use crate::io::disk::DiskTarget;
use crate::io::file::{Device, FileDisk, Preallocation};
use crate::manifest::schema::{VolumeName, is_name};
use nix::fcntl::{FallocateFlags, fallocate};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

/// How long a pool that is still held is waited for: by I/O of a killed daemon, most likely.
pub(super) const HELD_WAIT: Duration = Duration::from_secs(10);

/// An allocation, without its runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllocationFacts {
    pub id: AllocationId,
    pub size_bytes: u64,
    pub mapped_bytes: u64,
    pub thin: bool,
    pub class: Class,
    pub attributes: Vec<u8>,
}

#[derive(Clone, Debug)]
pub struct PoolFacts {
    pub space: Space,
    pub fenced: bool,
    /// By name.
    pub allocations: BTreeMap<String, AllocationFacts>,
}

impl PoolFacts {
    /// Thin volumes want what the pool does not have.
    fn lack(&self) -> Option<String> {
        let wants = |facts: &AllocationFacts| facts.thin && facts.mapped_bytes < facts.size_bytes;
        let lacks = self.space.watermark == Watermark::Full && self.allocations.values().any(wants);
        let text = "it is full, and thin volumes on it promise more than they have: their writes \
                    wait or fail; reclaim or shrink volumes, or grow the pool";
        lacks.then(|| text.to_owned())
    }

    pub(super) fn of(pool: &Pool) -> Self {
        let facts = |allocation: &crate::flash::Allocation| AllocationFacts {
            id: allocation.id,
            size_bytes: allocation.size_bytes,
            mapped_bytes: allocation.mapped_bytes(),
            thin: allocation.thin,
            class: allocation.class,
            attributes: allocation.attributes.clone(),
        };
        let allocations = pool.allocations();
        Self {
            space: pool.space(),
            fenced: pool.is_fenced(),
            allocations: allocations.map(|found| (found.name.clone(), facts(found))).collect(),
        }
    }
}

pub struct OpenPool {
    pub name: String,
    pub uuid: [u8; 16],
    /// As it was named: a path, or `null:SIZE`.
    pub device: String,
    pub target: DiskTarget,
    /// None once stopped.
    keeper: RwLock<Option<Keeper>>,
    facts: Mutex<PoolFacts>,
    /// One refresh at a time: a pool that hangs must not gather threads.
    refreshing: Mutex<()>,
    checking: Arc<CheckProgress>,
}

/// A pool of another making may have names that no manifest, command or path can say.
fn check_names(pool: &Pool) -> Result<()> {
    let refused = |what: String| {
        let text = format!(
            "{what}, which vflash never gives: the pool was made or changed by something else, and \
             is left as it is"
        );
        Err(Error::new(ErrorKind::Unsupported, text))
    };
    if !is_name(pool.name()) {
        return refused(format!("the pool's name is {:?}", pool.name()));
    }
    let foreign = pool.allocations().find(|found| VolumeName::parse(&found.name).is_none());
    match foreign {
        Some(found) => refused(format!("allocation {} has the name {:?}", found.id.0, found.name)),
        None => Ok(()),
    }
}

/// A pool to be made.
#[derive(Clone, Debug)]
pub struct NewPool {
    pub name: String,
    pub device: String,
    /// For a file to be created.
    pub size_bytes: Option<u64>,
    /// Of a file to be created.
    pub preallocation: Preallocation,
    /// What the device holds may be destroyed.
    pub overwrite: bool,
}

impl OpenPool {
    /// Opens the pool on `device`, at the latest when it has been held by somebody else for
    /// `held_wait`; a null device gets a new one named `name`.
    pub fn open(device: &str, name: Option<&str>, held_wait: Duration) -> Result<Self> {
        // What fails before this names the device itself.
        let context = |error: Error| error.context(device);
        let opened = Device::open(device, held_wait)?;
        let pool = match opened.null {
            true => Pool::format(opened.disk, name.unwrap_or("null")),
            false => Pool::open(opened.disk).and_then(|pool| check_names(&pool).map(|()| pool)),
        };
        Self::start(pool.map_err(context)?, device, opened.target)
    }

    /// Makes a pool; a file made for it is removed again if that fails.
    pub fn create(new: &NewPool) -> Result<Self> {
        let context = |error: Error| error.context(format!("making pool {}", new.name));
        if !is_name(&new.name) {
            // Neither a manifest nor a path of the API could name it.
            let text = "names are small letters, digits and inner hyphens, 63 at most";
            return Err(context(Error::new(ErrorKind::Invalid, text)));
        }
        let path = Path::new(&new.device);
        let made_file = new.size_bytes.is_some() && !path.exists();
        let zeroed = match new.size_bytes {
            Some(size) => prepare_file(path, size, new.preallocation).map_err(context)?,
            None => false,
        };
        let made = Device::open(&new.device, HELD_WAIT).and_then(|opened| {
            let options = FormatOptions {
                name: new.name.clone(),
                overwrite: new.overwrite,
                zeroed: zeroed || opened.null,
                ..FormatOptions::default()
            };
            let pool = Pool::format_with(opened.disk, options)?;
            Self::start(pool, &new.device, opened.target)
        });
        if made.is_err() && made_file {
            // The cause is already on its way to the caller.
            let _ = std::fs::remove_file(path);
        }
        made.map_err(context)
    }

    fn start(pool: Pool, device: &str, target: DiskTarget) -> Result<Self> {
        let facts = PoolFacts::of(&pool);
        Ok(Self {
            name: pool.name().to_owned(),
            uuid: pool.uuid(),
            device: device.to_owned(),
            target,
            keeper: RwLock::new(Some(Keeper::start(pool, KeeperOptions::default())?)),
            facts: Mutex::new(facts),
            refreshing: Mutex::default(),
            checking: Arc::default(),
        })
    }

    /// Runs `work` with the keeper.
    ///
    /// # Errors
    /// [`ErrorKind::Gone`]: the pool was closed.
    pub fn with_keeper<R>(&self, work: impl FnOnce(&Keeper) -> Result<R>) -> Result<R> {
        let keeper = self.keeper.read().unwrap_or_else(PoisonError::into_inner);
        let gone = || Error::new(ErrorKind::Gone, format!("pool {} was closed", self.name));
        work(keeper.as_ref().ok_or_else(gone)?)
    }

    /// Runs `change` on the pool, then takes its facts anew.
    pub fn change<R: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Pool) -> Result<R> + Send + 'static,
    ) -> Result<R> {
        let result = self.with_keeper(|keeper| keeper.call(change)?);
        self.refresh()?;
        result
    }

    /// Takes the facts anew. Returns at once if somebody is at it already.
    pub fn refresh_if_idle(&self) {
        if let Ok(_guard) = self.refreshing.try_lock()
            && let Err(error) = self.refresh()
        {
            log::debug!("pool {}: {error}", self.name);
        }
    }

    pub fn refresh(&self) -> Result<()> {
        let facts = self.with_keeper(|keeper| keeper.call(|pool| PoolFacts::of(pool)))?;
        *self.lock_facts() = facts;
        Ok(())
    }

    pub fn facts(&self) -> PoolFacts {
        self.lock_facts().clone()
    }

    pub fn allocation(&self, name: &str) -> Option<AllocationFacts> {
        self.lock_facts().allocations.get(name).cloned()
    }

    fn lock_facts(&self) -> MutexGuard<'_, PoolFacts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why its keeper has ended by itself.
    pub fn keeper_failure(&self) -> Option<String> {
        self.with_keeper(|keeper| Ok(keeper.failure())).unwrap_or_default()
    }

    pub fn scrub(&self) -> ScrubStatus {
        self.with_keeper(|keeper| Ok(keeper.scrub_status())).unwrap_or_default()
    }

    /// Checks what is on flash. Meanwhile [`OpenPool::report`] says how far it is.
    pub fn check(&self) -> Result<CheckReport> {
        let progress = self.checking.clone();
        self.with_keeper(|keeper| keeper.call(move |pool| pool.check_with(&progress)))
    }

    /// Thin volumes' requests that wait until there is space.
    pub fn waiting(&self) -> usize {
        self.with_keeper(|keeper| Ok(keeper.waiting())).unwrap_or_default()
    }

    /// Ends the keeper after what was asked of it before; the device is free afterwards.
    pub fn stop(&self) {
        let keeper = self.keeper.write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(keeper) = keeper {
            keeper.stop();
        }
    }

    pub fn space_left(&self) -> api::PoolSpace {
        let api::Space { watermark, free_bytes, .. } = api_space(self.facts().space);
        api::PoolSpace { pool: self.name.clone(), watermark, free_bytes }
    }

    pub fn report(&self) -> api::Pool {
        let facts = self.facts();
        let scrub = self.scrub();
        let fenced = "a commit failed and its outcome is open; see the log for the device's error";
        let (state, message) = match (self.keeper_failure(), facts.fenced) {
            (Some(failure), _) => (PoolState::Failed, Some(failure)),
            (None, true) => (PoolState::Fenced, Some(fenced.to_owned())),
            (None, false) => (PoolState::Ok, scrub.failure.or_else(|| facts.lack())),
        };
        api::Pool {
            name: self.name.clone(),
            uuid: uuid::Uuid::from_bytes(self.uuid).to_string(),
            device: self.device.clone(),
            state,
            message,
            space: Some(api_space(facts.space)),
            scrubbed_bytes: scrub.scrubbed_bytes,
            waiting_requests: self.waiting(),
            check: self
                .checking
                .bytes()
                .map(|(done_bytes, total_bytes)| api::CheckProgress { done_bytes, total_bytes }),
            volumes: facts.allocations.len(),
        }
    }
}

/// A pool without a drive: any number may have the same description.
pub fn is_null(device: &str) -> bool {
    device.starts_with("null:")
}

/// Makes the file, or makes it as long as `size_bytes`. True: it is known to be all zeros.
fn prepare_file(path: &Path, size_bytes: u64, preallocation: Preallocation) -> Result<bool> {
    if !path.exists() {
        FileDisk::create(path, size_bytes, preallocation)?;
        return Ok(true);
    }
    let found = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file);
    let length = found.map(|found| found.len());
    if let Some(length) = length.filter(|length| *length > size_bytes) {
        let text = format!(
            "{} has {} already: give that as the size, or another file",
            path.display(),
            Bytes(length)
        );
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    let was_empty = length == Some(0);
    lengthen(path, size_bytes)?;
    Ok(was_empty)
}

/// Makes a file longer, with its space reserved; leaves a device and a longer file as they are.
pub fn lengthen(path: &Path, size_bytes: u64) -> Result<()> {
    let failed = |error| {
        let text = format!("making {} {} long", path.display(), Bytes(size_bytes));
        Error::io(text, error)
    };
    let file = std::fs::File::options().write(true).open(path).map_err(failed)?;
    let found = file.metadata().map_err(failed)?;
    if !found.is_file() || found.len() >= size_bytes {
        return Ok(());
    }
    let more = (size_bytes - found.len()) as libc::off_t;
    fallocate(&file, FallocateFlags::empty(), found.len() as libc::off_t, more)
        .map_err(|errno| failed(errno.into()))?;
    file.sync_all().map_err(failed)
}

pub fn file_preallocation(preallocation: api::Preallocation) -> Preallocation {
    match preallocation {
        api::Preallocation::Reserved => Preallocation::Reserved,
        api::Preallocation::Written => Preallocation::Written,
    }
}

fn api_space(space: Space) -> api::Space {
    api::Space {
        total_bytes: space.total_bytes,
        allocated_bytes: space.allocated_bytes,
        free_bytes: space.free_bytes,
        scrub_bytes: space.scrub_bytes,
        metadata_bytes: space.metadata_bytes,
        provisioned_bytes: space.provisioned_bytes,
        watermark: api_watermark(space.watermark),
    }
}

pub fn api_watermark(watermark: Watermark) -> api::Watermark {
    match watermark {
        Watermark::Normal => api::Watermark::Normal,
        Watermark::High => api::Watermark::High,
        Watermark::Critical => api::Watermark::Critical,
        Watermark::Full => api::Watermark::Full,
    }
}
