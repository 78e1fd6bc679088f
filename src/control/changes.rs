//! Changes of single things. Each is durable when it returns; who calls holds the changes lock.

use super::api::{self, Check, CreatePool, ErrorCode, EventKind, Failure, Pools, Volume};
use super::engine::Engine;
use super::inspect;
use super::pool::{NewPool, OpenPool, file_preallocation, is_null, lengthen};
use super::restoring::FailedPool;
use super::served::{self, Served};
use crate::base::units::{Bytes, EXTENT_BYTES, SECTOR_BYTES};
use crate::base::{Error, ErrorKind};
use crate::flash::{self, AllocationId, NewAllocation};
use crate::manifest::{Attributes, DeviceState, LogIdentity, VolumeSettings};
use std::sync::Arc;
use std::time::Duration;

type Result<T> = std::result::Result<T, Failure>;

/// How long an attached volume may take to stop using a tail that is cut off.
const SHRINK_WAIT: Duration = Duration::from_secs(10);

/// Sizes are multiples of it, as in a manifest: what is made here can be exported and applied.
const SIZE_UNIT_BYTES: u64 = EXTENT_BYTES;

/// A volume to be made.
#[derive(Clone, Debug)]
pub struct NewVolume {
    /// `VM/VOLUME`
    pub name: String,
    pub pool: String,
    pub size_bytes: u64,
    pub thin: bool,
    pub class: flash::Class,
    pub settings: VolumeSettings,
}

impl NewVolume {
    fn attributes(&self) -> Vec<u8> {
        let log = self
            .settings
            .cache
            .as_ref()
            .map(|_| LogIdentity { uuid: uuid::Uuid::new_v4(), ..LogIdentity::default() });
        Attributes { settings: self.settings.clone(), log, ..Attributes::default() }.encode()
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = match error.kind() {
            ErrorKind::Io => ErrorCode::Io,
            ErrorKind::Full => ErrorCode::Full,
            ErrorKind::Corrupt => ErrorCode::Corrupt,
            ErrorKind::Fenced => ErrorCode::Fenced,
            ErrorKind::Unsupported => ErrorCode::Unsupported,
            ErrorKind::Invalid => ErrorCode::Invalid,
            ErrorKind::Gone => ErrorCode::NotFound,
            ErrorKind::Busy => ErrorCode::Busy,
        };
        Self::new(code, error.to_string())
    }
}

/// Refuses what would be done to volume `name` unless that is confirmed. `what` would: all that a
/// person needs to decide, sizes above all. That nothing was done is for whoever ends there to say.
pub(super) fn require(name: &str, confirm: &[String], what: &str) -> Result<()> {
    if confirm.iter().any(|confirmed| confirmed == name) {
        return Ok(());
    }
    let failure = Failure::new(ErrorCode::Unconfirmed, format!("{name}: {what}"));
    Err(Failure { unconfirmed: vec![name.to_owned()], ..failure })
}

/// Pools.
impl Engine {
    pub fn pools(&self) -> Pools {
        let mut pools: Vec<_> = self.open_pools().iter().map(|pool| pool.report()).collect();
        let state = self.state();
        let closed = |state, name: &String, device: &String, message| api::Pool {
            name: name.clone(),
            uuid: String::new(),
            device: device.clone(),
            state,
            message,
            space: None,
            scrubbed_bytes: 0,
            waiting_requests: 0,
            check: None,
            volumes: 0,
        };
        pools.extend(state.failed.iter().map(|(device, failed)| {
            let name = failed.name(device).to_owned();
            closed(api::PoolState::Failed, &name, device, Some(failed.reason.clone()))
        }));
        pools.extend(
            state
                .making
                .iter()
                .map(|(name, device)| closed(api::PoolState::Making, name, device, None)),
        );
        Pools { pools }
    }

    pub fn pool(&self, name: &str) -> Result<api::Pool> {
        let Pools { pools } = self.pools();
        match pools.into_iter().find(|pool| pool.name == name || pool.device == name) {
            Some(pool) => Ok(pool),
            None => self.open_pool_named(name).map(|pool| pool.report()),
        }
    }

    /// Makes a pool. Its file may take minutes to write, so other changes go on meanwhile.
    pub fn create_pool(&self, request: &CreatePool) -> Result<api::Pool> {
        let new = NewPool::from(request);
        let changes = self.changes.begin(&format!("making pool {}", new.name))?;
        self.refuse_pool(&new)?;
        let _making = Making::begin(self, &new);
        drop(changes);
        let pool = OpenPool::create(&new)?;
        let _changes = self.changes.begin_in_time(&format!("making pool {}", new.name));
        Ok(self.take_up_new(pool)?.report())
    }

    pub(super) fn make_pool(&self, new: &NewPool) -> Result<Arc<OpenPool>> {
        self.refuse_pool(new)?;
        self.take_up_new(OpenPool::create(new)?)
    }

    fn take_up_new(&self, pool: OpenPool) -> Result<Arc<OpenPool>> {
        let pool = self.take_up(pool, EventKind::PoolCreated)?;
        self.remember_pools();
        Ok(pool)
    }

    fn refuse_pool(&self, new: &NewPool) -> Result<()> {
        let busy = |text| Err(Failure::new(ErrorCode::Busy, text));
        {
            let state = self.state();
            if let Some(other) = state.pools.get(&new.name) {
                return busy(format!("pool {} exists already, on {}", new.name, other.device));
            }
            let same = |(name, device): &(&String, &String)| {
                **name == new.name || (**device == new.device && !is_null(device))
            };
            if let Some((name, device)) = state.making.iter().find(same) {
                return busy(format!("pool {name} is being made already, on {device}"));
            }
        }
        if self.is_open(&new.device) {
            return busy(format!("{} is a pool already that is open", new.device));
        }
        new.examine()
    }

    pub fn check_pool(&self, name: &str) -> Result<Check> {
        let pool = self.open_pool_named(name)?;
        Ok(Check::from_report(&pool.name, pool.check()?))
    }

    pub fn grow_pool(&self, name: &str) -> Result<api::Pool> {
        let _changes = self.changes.begin(&format!("growing pool {name}"))?;
        Ok(self.take_up_growth(name)?.report())
    }

    /// Makes the pool's file longer, and the pool with it.
    pub(super) fn lengthen_pool(&self, name: &str, size_bytes: u64) -> Result<()> {
        let pool = self.open_pool_named(name)?;
        lengthen(std::path::Path::new(&pool.device), size_bytes)?;
        self.take_up_growth(name).map(drop)
    }

    fn take_up_growth(&self, name: &str) -> Result<Arc<OpenPool>> {
        let pool = self.open_pool_named(name)?;
        let before = pool.facts().space.total_bytes;
        pool.change(|pool| pool.grow())?;
        let after = pool.facts().space.total_bytes;
        let text = format!("grown from {} to {}", Bytes(before), Bytes(after));
        self.events().add(EventKind::PoolGrown, format!("pool {name}"), text);
        Ok(pool)
    }

    /// Takes a pool out of service and out of the list of pools to be opened, also one that could
    /// not be opened; by its name, or by the path of its device. What it holds stays.
    pub fn close(&self, name: &str, request: &api::ClosePool) -> Result<Pools> {
        let _changes = self.changes.begin(&format!("closing pool {name}"))?;
        let failed = {
            let mut state = self.state();
            let named =
                |device: &str, failed: &FailedPool| failed.name(device) == name || device == name;
            let failed = state.failed.extract_if(.., |device, failed| named(device, failed));
            failed.map(|(device, failed)| failed.name(&device).to_owned()).next()
        };
        let closed = if let Some(failed) = failed {
            self.remember_pools();
            failed
        } else {
            let pool = self.open_pool_named(name)?;
            let of_pool = |served: &&Served| Arc::ptr_eq(&served.pool, &pool);
            let volumes: Vec<String> =
                self.state().volumes.values().filter(of_pool).map(|v| v.name.clone()).collect();
            self.refuse_attached(&volumes, request.force)?;
            self.close_pool(&pool.name)?;
            pool.name.clone()
        };
        let text = "taken out of service; what it holds stays";
        self.events().add(EventKind::PoolClosed, format!("pool {closed}"), text);
        Ok(self.pools())
    }

    /// Takes a pool out of service: its volumes first, then the device.
    pub(super) fn close_pool(&self, name: &str) -> Result<()> {
        let pool = self.open_pool_named(name)?;
        for volume in pool.facts().allocations.keys() {
            if let Ok(served) = self.served(volume) {
                self.stop_disk(&served)?;
                let mut state = self.state();
                for door in state.doors_of(volume) {
                    state.volumes.remove(&door.name);
                }
                state.volumes.remove(volume);
            }
        }
        {
            let mut state = self.state();
            state.pools.remove(name);
            state.watched.remove(name);
        }
        pool.stop();
        self.remember_pools();
        Ok(())
    }
}

/// Says which sizes next to it a volume can have.
fn odd_size(name: &str, size_bytes: u64) -> String {
    let below = size_bytes - size_bytes % SIZE_UNIT_BYTES;
    let above = below.saturating_add(SIZE_UNIT_BYTES);
    let sizes = match below {
        0 => Bytes(above).to_string(),
        _ => format!("{} or {}", Bytes(below), Bytes(above)),
    };
    format!("volume {name} cannot have {}: write {sizes}", Bytes(size_bytes))
}

/// A pool that is being made: it is listed, and its name and device are taken, until this goes.
struct Making<'a> {
    engine: &'a Engine,
    name: String,
}

impl<'a> Making<'a> {
    fn begin(engine: &'a Engine, new: &NewPool) -> Self {
        engine.state().making.insert(new.name.clone(), new.device.clone());
        Self { engine, name: new.name.clone() }
    }
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        self.engine.state().making.remove(&self.name);
    }
}

impl From<&CreatePool> for NewPool {
    fn from(request: &CreatePool) -> Self {
        Self {
            name: request.name.clone(),
            device: request.device.clone(),
            size_bytes: request.size_bytes,
            preallocation: file_preallocation(request.preallocation),
            overwrite: request.confirm.contains(&request.device),
        }
    }
}

impl NewPool {
    /// Refuses a device that holds something, unless that may be destroyed.
    pub fn examine(&self) -> Result<()> {
        let null = is_null(&self.device);
        if !null && !std::path::Path::new(&self.device).is_absolute() {
            let text = format!(
                "device `{0}` is a relative path, and whoever reads it works in another directory: \
                 write an absolute one, as /srv/{0}",
                self.device
            );
            return Err(Failure::new(ErrorCode::Invalid, text));
        }
        if self.overwrite || null {
            return Ok(());
        }
        let content = match inspect::look(std::path::Path::new(&self.device))?.state {
            DeviceState::Missing | DeviceState::Blank { .. } => return Ok(()),
            DeviceState::Pool { name } => format!("pool {name}"),
            DeviceState::Foreign { content, .. } => content,
        };
        let text = format!("{} holds {content}, which would be destroyed", self.device);
        let unconfirmed = vec![self.device.clone()];
        Err(Failure { unconfirmed, ..Failure::new(ErrorCode::Unconfirmed, text) })
    }
}

impl Check {
    /// For an open pool and for the command line on a pool that nobody holds.
    pub fn from_report(pool: &str, report: flash::CheckReport) -> Self {
        let bytes = |extents: u64| extents * crate::base::units::EXTENT_BYTES;
        Self {
            pool: pool.to_owned(),
            clean: report.is_clean(),
            volumes: report.allocations,
            mapped_bytes: bytes(report.extents_mapped),
            scrub_bytes: bytes(report.extents_unscrubbed),
            free_bytes: bytes(report.extents_clean),
            metadata_bytes: bytes(report.extents_metadata),
            findings: report
                .findings
                .into_iter()
                .map(|finding| api::Finding {
                    offset_bytes: finding.offset,
                    text: finding.text,
                    repairable: finding.repairable,
                })
                .collect(),
        }
    }
}

/// Volumes.
impl Engine {
    /// Makes an allocation; it is not served yet.
    pub(super) fn make_volume(&self, new: &NewVolume) -> Result<(Arc<OpenPool>, AllocationId)> {
        let pool = self.open_pool_named(&new.pool)?;
        self.host.run_dir.socket(&new.name)?;
        let allocation = NewAllocation {
            name: new.name.clone(),
            size_bytes: new.size_bytes,
            thin: new.thin,
            class: new.class,
            attributes: new.attributes(),
        };
        let wanted = if new.thin { 0 } else { new.size_bytes };
        let made = pool.with_keeper(|keeper| {
            keeper.call_after_scrub(wanted, move |pool| pool.create(allocation))?
        });
        pool.refresh()?;
        Ok((pool, made?))
    }

    /// Opens the socket of a volume that was made.
    pub(super) fn serve(&self, pool: &Arc<OpenPool>, name: &str) -> Result<()> {
        let facts = pool.allocation(name).ok_or_else(|| {
            Failure::new(ErrorCode::NotFound, format!("volume {name} is not in {}", pool.name))
        })?;
        let served = Served::start(&self.host, pool, name, &facts);
        let (failure, cached) = (served.failure.clone(), served.is_cached());
        self.state().volumes.insert(name.to_owned(), served);
        if cached && failure.is_none() {
            return self.open_cache(name);
        }
        match failure {
            None => Ok(()),
            Some(text) => Err(Failure::new(ErrorCode::Io, text)),
        }
    }

    /// Changes settings. Other limits take effect in place; anything else serves the volume anew,
    /// which an attached guest notices as a reconnect.
    ///
    /// # Errors
    /// The settings are as before. [`ErrorCode::Busy`]: the volume is being taken down, and to be
    /// served again when its requests have ended ([`Engine::serve_again`]).
    pub(super) fn set_settings(&self, name: &str, settings: &VolumeSettings) -> Result<()> {
        let served = self.served(name)?;
        if served.is_cached() {
            return self.set_cached_settings(&served, settings);
        }
        let note = |settings: &VolumeSettings| {
            let (id, attributes) = (served.id, settings.encode());
            served.pool.change(move |pool| pool.set_attributes(id, attributes))
        };
        let same = VolumeSettings { limits: settings.limits, ..served.settings.clone() };
        if served.is_served() && same == *settings {
            note(settings)?;
            self.host.server.set_limits(served.export_id()?, served::limits(settings.limits))?;
            if let Some(served) = self.state().volumes.get_mut(name) {
                served.settings = settings.clone();
            }
            return Ok(());
        }
        // Before anything is changed: requests may not end in time.
        served.stop(&self.host)?;
        let serve = || self.serve(&served.pool, name);
        note(settings).map_err(Failure::from).and_then(|()| serve()).inspect_err(|_| {
            let noted = note(&served.settings).map_err(Failure::from);
            if let Err(failure) = serve().and(noted) {
                log::error!("volume {name}: serving it as before: {failure}");
            }
        })
    }

    /// Serves a volume that a change has taken down and left so ([`Served::is_down`]).
    pub(super) fn serve_again(&self, name: &str) -> Result<()> {
        let served = self.served(name)?;
        if !served.is_down() {
            return Ok(());
        }
        if served.is_cached() {
            let home = self.home_of(name)?;
            return self.exchange(&home, &served, &|_| Ok(()), false).map(drop);
        }
        served.stop(&self.host)?;
        self.serve(&served.pool, name)
    }

    /// Makes a volume larger; its guest is not told yet.
    pub(super) fn grow(&self, name: &str, size_bytes: u64) -> Result<()> {
        let served = self.served(name)?;
        let id = served.id;
        let grown = served.pool.with_keeper(|keeper| keeper.resize(id, size_bytes, SHRINK_WAIT));
        served.pool.refresh()?;
        Ok(grown?)
    }

    /// Tells the guest the size that the volume has by now.
    pub(super) fn announce(&self, name: &str) -> Result<()> {
        let served = self.served(name)?;
        if let Some(export) = served.link.export() {
            let sectors = served.facts()?.size_bytes / SECTOR_BYTES;
            self.host.server.set_capacity(export, sectors)?;
        }
        Ok(())
    }

    /// Cuts a volume's tail off. The guest is told first, so that it asks for nothing there that
    /// would fail for a reason it does not know.
    pub(super) fn shrink(&self, name: &str, size_bytes: u64) -> Result<()> {
        let served = self.served(name)?;
        let id = served.id;
        if let Some(export) = served.link.export() {
            self.host.server.set_capacity(export, size_bytes / SECTOR_BYTES)?;
        }
        let shrunk = served.pool.with_keeper(|keeper| keeper.resize(id, size_bytes, SHRINK_WAIT));
        if let Err(error) = shrunk {
            self.announce(name)?;
            return Err(error.into());
        }
        Ok(served.pool.refresh()?)
    }

    /// Takes a volume down and destroys it.
    pub(super) fn destroy(&self, name: &str) -> Result<()> {
        let served = self.served(name)?;
        if served.is_cached() {
            return self.detach_clean(&served);
        }
        let id = served.id;
        served.stop(&self.host)?;
        if let Err(error) = served.pool.change(move |pool| pool.remove(id)) {
            // It exists on, so it is served on.
            self.serve(&served.pool, name)?;
            return Err(error.into());
        }
        self.host.run_dir.forget(name);
        self.state().volumes.remove(name);
        self.events().add(EventKind::Deleted, served.object(), "destroyed; its space is scrubbed");
        Ok(())
    }

    pub fn resize(&self, name: &str, request: &api::Resize) -> Result<Volume> {
        let _changes = self.changes.begin(&format!("the resize of {name}"))?;
        let cached = self.served(name)?.is_cached();
        let old = self.served(name)?.facts()?.size_bytes;
        if request.size_bytes == 0 || !request.size_bytes.is_multiple_of(SIZE_UNIT_BYTES) {
            return Err(Failure::new(ErrorCode::Invalid, odd_size(name, request.size_bytes)));
        }
        if cached {
            self.resize_cache(name, request.size_bytes)?;
            return self.volume(name);
        }
        if request.size_bytes < old {
            let kept = Bytes(request.size_bytes);
            let what = format!("of its {}, what lies behind {kept} would be lost", Bytes(old));
            require(name, &request.confirm, &what)?;
            self.shrink(name, request.size_bytes)?;
        } else if request.size_bytes > old {
            self.grow(name, request.size_bytes)?;
            self.announce(name)?;
        }
        if request.size_bytes != old {
            self.note_resize(name, old, request.size_bytes);
        }
        self.volume(name)
    }

    pub(super) fn note_resize(&self, name: &str, old: u64, new: u64) {
        let text = format!("resized from {} to {}", Bytes(old), Bytes(new));
        self.events().add(EventKind::Resized, format!("volume {name}"), text);
    }

    pub fn reclaim(&self, name: &str, request: &api::Reclaim) -> Result<api::Plan> {
        let _changes = self.changes.begin(&format!("the reclaim of {name}"))?;
        let served = self.home_of(name)?;
        let holders = self.holders(&served);
        if holders.len() > 1 && holders.contains(&name.to_owned()) {
            return self.reclaim_door(name, request);
        }
        self.refuse_attached(&holders, request.force)?;
        if let (false, Err(error)) =
            (request.force, Attributes::decode(&served.facts()?.attributes))
        {
            let text = format!(
                "the settings of {name} cannot be read ({error}), so nobody can say what it holds: \
                 start the vflashd that wrote them, or give it up with --force"
            );
            return Err(Failure::new(ErrorCode::Unsupported, text));
        }
        require(name, &request.confirm, &what_reclaiming_does(&served)?)?;
        if request.force {
            self.refuse_dirty(&served)?;
        }
        let size = served.facts().map_or(0, |facts| facts.size_bytes);
        self.destroy(&served.name)?;
        let step = api::Step {
            action: api::Action::Delete,
            object: served.object(),
            detail: format!("{} in pool {}", Bytes(size), served.pool.name),
            destroys: true,
        };
        Ok(api::Plan { steps: vec![step], destroys: vec![name.to_owned()], done: true })
    }

    /// What only the flash of a cached disk holds is not given up by force.
    fn refuse_dirty(&self, served: &Served) -> Result<()> {
        let dirty = served.dirty_bytes()?;
        if dirty == 0 {
            return Ok(());
        }
        let name = &served.name;
        let text = format!(
            "cached disk {name} holds {} that its backing lacks: `vflash detach {name}` drains \
             and detaches it, with `--lost` it gives them up",
            Bytes(dirty)
        );
        Err(Failure::new(ErrorCode::Busy, text))
    }

    pub(super) fn refuse_attached(&self, names: &[String], force: bool) -> Result<()> {
        let state = self.state();
        let attached = |name: &&String| {
            state.volumes.get(*name).is_some_and(|volume| volume.link.is_attached())
        };
        let names: Vec<_> = names.iter().filter(attached).map(String::as_str).collect();
        if force || names.is_empty() {
            return Ok(());
        }
        let text = format!(
            "{} in use by a virtual machine: take it away from that first (`vflash detach --qmp` \
             or `--ch-api`), or use --force",
            names.join(", ")
        );
        Err(Failure::new(ErrorCode::Busy, text))
    }
}

/// For whoever has to confirm it.
fn what_reclaiming_does(served: &Served) -> Result<String> {
    let facts = served.facts()?;
    let size = Bytes(facts.size_bytes);
    if let Some(cache) = &served.settings.cache {
        let (backing, pool) = (&cache.backing, &served.pool.name);
        return Ok(format!(
            "it would be drained to {backing} and detached, freeing {size} of {pool}"
        ));
    }
    let written = match facts.thin {
        true => format!(", {} of it in use", Bytes(facts.mapped_bytes)),
        false => String::new(),
    };
    Ok(format!("all that it holds ({size}{written}) would be destroyed"))
}
