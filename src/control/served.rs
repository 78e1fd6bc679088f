//! A volume while it is served: an allocation of a pool behind a socket.
//!
//! A volume that cannot be served stays in the list with the reason; it stops nobody else.

use super::api::{self, Class, EventKind, Operations, VolumeState};
use super::cached::{Cached, CachedVolume, Opener};
use super::events::EventLog;
use super::pool::{AllocationFacts, OpenPool};
use super::rundir::RunDir;
use crate::base::clock::Nanos;
use crate::base::limits::QUEUES_MAX;
use crate::base::units::SECTOR_BYTES;
use crate::base::{Error, ErrorKind, Result};
use crate::flash::{self, AllocationId, DriveErrors, FullPolicy, VolumeCounters, VolumeOptions};
use crate::io::disk::{DiskGeometry, DiskTarget};
use crate::io::volume::Volume;
use crate::manifest::{Attributes, Door, Principal, VolumeSettings, WhenFull};
use crate::metrics::{OperationClass, VolumeMetrics};
use crate::qos;
use crate::vhost::{Export, ExportEvent, ExportId, NewDoor, Server, SocketAccess};
use crate::virtio::Device;
use std::any::Any;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// For so long after the last error of a drive somebody should look after it.
const DRIVE_ERRORS_SHOWN: Duration = Duration::from_secs(600);

/// What serving needs besides the volume.
#[derive(Clone)]
pub struct Host {
    pub server: Server,
    pub events: Arc<EventLog>,
    pub run_dir: Arc<RunDir>,
    pub opener: Opener,
}

#[derive(Clone)]
pub struct Served {
    /// `VM/VOLUME`
    pub name: String,
    pub pool: Arc<OpenPool>,
    pub id: AllocationId,
    pub settings: VolumeSettings,
    pub serial: String,
    pub socket: PathBuf,
    pub link: Arc<Link>,
    pub metrics: Arc<VolumeMetrics>,
    pub counters: Arc<VolumeCounters>,
    /// Why it is not served.
    pub failure: Option<String>,
    /// Of a cached disk: what is known of it once it was opened.
    pub cached: Option<Arc<Cached>>,
    /// Of a cached disk: held while it is opened, and by whoever takes it down.
    pub opening: Arc<Mutex<()>>,
    /// The volume whose disk this is a door to; `None`: it is its own.
    pub home: Option<String>,
    /// Of its door.
    pub number: u16,
    /// By `sharedWith` of its home.
    pub granted: bool,
    /// Its machine has left its disk to others: it has no socket.
    pub left: bool,
}

/// The way to a volume on its reactor, and what its socket last told.
pub struct Link {
    server: Server,
    route: Mutex<Route>,
    attached: AtomicBool,
    write_cache: AtomicBool,
    /// Its machine shares no memory, and waits for ever.
    misses_memory: AtomicBool,
    /// Why it is not what it should be, though it has an export.
    trouble: Mutex<Option<(VolumeState, String)>>,
}

enum Route {
    /// Its export is being made. A guest may connect before its id is known here, so answers to
    /// its first requests wait.
    Waiting(Vec<Box<dyn Any + Send>>),
    Known(ExportId),
    Closed,
}

impl Link {
    fn new(server: Server, write_cache: bool) -> Self {
        Self {
            server,
            route: Mutex::new(Route::Waiting(Vec::new())),
            attached: AtomicBool::new(false),
            write_cache: AtomicBool::new(write_cache),
            misses_memory: AtomicBool::new(false),
            trouble: Mutex::default(),
        }
    }

    fn set_trouble(&self, state: VolumeState, text: impl Into<String>) {
        let trouble = Some((state, text.into()));
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    pub fn trouble(&self) -> Option<(VolumeState, String)> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Brings a message to the volume; one that is closed gets none.
    pub fn send(&self, message: Box<dyn Any + Send>) {
        match &mut *self.route.lock().unwrap_or_else(PoisonError::into_inner) {
            Route::Waiting(messages) => messages.push(message),
            Route::Known(id) => deliver(&self.server, *id, message),
            Route::Closed => {}
        }
    }

    pub(super) fn open(&self, id: ExportId) {
        let mut route = self.route.lock().unwrap_or_else(PoisonError::into_inner);
        if let Route::Waiting(messages) = std::mem::replace(&mut *route, Route::Known(id)) {
            messages.into_iter().for_each(|message| deliver(&self.server, id, message));
        }
    }

    fn close(&self) -> Option<ExportId> {
        let mut route = self.route.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *route, Route::Closed) {
            Route::Known(id) => Some(id),
            _ => None,
        }
    }

    pub fn export(&self) -> Option<ExportId> {
        match *self.route.lock().unwrap_or_else(PoisonError::into_inner) {
            Route::Known(id) => Some(id),
            _ => None,
        }
    }

    pub fn is_attached(&self) -> bool {
        self.attached.load(Ordering::Relaxed)
    }
}

/// An export that is gone needs no message any more.
fn deliver(server: &Server, id: ExportId, message: Box<dyn Any + Send>) {
    if let Err(error) = server.message(id, message) {
        log::debug!("a message to a volume: {error}");
    }
}

/// What the drive has failed, in words.
pub(super) fn drive_errors(errors: &DriveErrors) -> String {
    format!(
        "the drive failed {} operations, the last at byte {} of the volume: {}; the kernel's log \
         may say why",
        errors.count,
        errors.offset,
        std::io::Error::from(errors.errno)
    )
}

impl Served {
    /// Serves the allocation, or says in `failure` why not.
    pub fn start(host: &Host, pool: &Arc<OpenPool>, name: &str, facts: &AllocationFacts) -> Self {
        let attributes = Attributes::decode(&facts.attributes);
        let left = attributes.as_ref().is_ok_and(|attributes| attributes.sharing.left);
        let settings = attributes.map(|attributes| attributes.settings);
        let link = Link::new(host.server.clone(), host.run_dir.write_cache(name));
        let mut served = Self {
            name: name.to_owned(),
            pool: pool.clone(),
            id: facts.id,
            settings: settings.as_ref().cloned().unwrap_or_default(),
            serial: serial(pool.uuid, facts.id, facts.class),
            socket: host.run_dir.socket(name).unwrap_or_default(),
            link: Arc::new(link),
            metrics: Arc::default(),
            counters: Arc::default(),
            failure: None,
            cached: None,
            opening: Arc::default(),
            home: None,
            number: 0,
            granted: false,
            left,
        };
        let exported = settings.and_then(|settings| match settings.cache {
            Some(_) => Ok(()),
            None => served.export(host, facts),
        });
        if let Err(error) = exported {
            served.fail(host, &error);
        }
        served
    }

    /// A door to this disk, which is opened with it.
    pub(super) fn door(&self, host: &Host, door: &Door) -> Self {
        let Door { name, number, granted, settings } = door.clone();
        let link = Link::new(host.server.clone(), host.run_dir.write_cache(&name));
        Self {
            socket: host.run_dir.socket(&name).unwrap_or_default(),
            link: Arc::new(link),
            metrics: Arc::default(),
            counters: Arc::default(),
            settings: VolumeSettings { cache: self.settings.cache.clone(), ..settings },
            name,
            number,
            granted,
            home: Some(self.name.clone()),
            left: false,
            cached: None,
            ..self.clone()
        }
    }

    /// The allocation's name, which is its home's.
    pub fn disk_name(&self) -> &str {
        self.home.as_deref().unwrap_or(&self.name)
    }

    /// A cached disk, which takes longer to open: [`super::opening`] does it.
    pub fn is_cached(&self) -> bool {
        self.settings.cache.is_some()
    }

    /// It is a cached disk that is being opened for the first time.
    pub fn is_opening(&self) -> bool {
        self.is_cached() && self.cached.is_none() && self.failure.is_none()
    }

    /// For another attempt to serve it.
    pub(super) fn renew_link(&mut self, host: &Host) {
        let link = Link::new(host.server.clone(), host.run_dir.write_cache(&self.name));
        self.link = Arc::new(link);
    }

    pub(super) fn fail(&mut self, host: &Host, error: &Error) {
        self.link.close();
        host.events.add(EventKind::Error, self.object(), error.to_string());
        self.failure = Some(error.to_string());
    }

    /// As events and plans name it.
    pub fn object(&self) -> String {
        format!("volume {}", self.name)
    }

    fn export(&mut self, host: &Host, facts: &AllocationFacts) -> Result<()> {
        self.socket = host.run_dir.prepare(&self.name)?;
        let geometry = self.pool.target.geometry();
        let link = self.link.clone();
        let options = VolumeOptions {
            notify: Arc::new(move |message| link.send(message)),
            full: full_policy(self.settings.when_full),
            geometry,
            counters: self.counters.clone(),
        };
        let volume = self.pool.with_keeper(|keeper| keeper.volume(self.id, options))?;
        let geometry = DiskGeometry { size_bytes: facts.size_bytes, ..geometry };
        let disks = vec![self.pool.target.clone()];
        let added = self.add(host, (geometry, self.settings.read_only), Box::new(volume), disks);
        if added.is_err() {
            self.detach_from_pool();
        }
        added
    }

    /// Serves a cached disk that was opened, to all that have it. A door that cannot be opened
    /// keeps nobody else from the disk.
    pub(super) fn export_cached(
        &mut self,
        host: &Host,
        opened: CachedVolume,
        doors: &mut [Self],
    ) -> Result<()> {
        let CachedVolume { disk, disks, side, .. } = opened;
        let mut doors = doors.iter_mut();
        let first = match self.left {
            false => &mut *self,
            true => doors.next().ok_or_else(|| super::sharing::nobody(&self.name))?,
        };
        first.show(host, &side)?;
        let read_only = first.settings.read_only || side.read_only;
        first.add(host, (side.geometry, read_only), Box::new(disk), disks)?;
        let export = first.export_id()?;
        if self.left {
            self.link.open(export);
            (self.cached, self.failure) = (Some(side.clone()), None);
        }
        for door in doors {
            if let Err(error) = door.join(host, export, &side) {
                door.fail(host, &error);
            }
        }
        Ok(())
    }

    /// Opens one more door to a disk that is served as `export`.
    pub(super) fn join(&mut self, host: &Host, export: ExportId, side: &Arc<Cached>) -> Result<()> {
        self.show(host, side)?;
        let read_only = self.settings.read_only || side.read_only;
        let door = self.new_door(host, (side.geometry, read_only))?;
        self.link.open(host.server.join(export, self.number, door)?);
        Ok(())
    }

    /// What a guest and an operator see of an opened disk.
    fn show(&mut self, host: &Host, side: &Arc<Cached>) -> Result<()> {
        self.socket = host.run_dir.prepare(&self.name)?;
        self.serial = cached_serial(side.disk);
        (self.cached, self.failure) = (Some(side.clone()), None);
        Ok(())
    }

    fn add(
        &self,
        host: &Host,
        device: (DiskGeometry, bool),
        volume: Box<dyn Volume>,
        disks: Vec<DiskTarget>,
    ) -> Result<()> {
        let export = Export { door: self.new_door(host, device)?, volume, disks };
        self.link.open(host.server.add_with_door(self.number, export)?);
        Ok(())
    }

    fn new_door(
        &self,
        host: &Host,
        (geometry, read_only): (DiskGeometry, bool),
    ) -> Result<NewDoor> {
        Ok(NewDoor {
            name: self.name.clone(),
            socket: self.socket.clone(),
            access: socket_access(&self.settings.access)?,
            device: Device {
                capacity_sectors: geometry.size_bytes / SECTOR_BYTES,
                block_bytes: geometry.block_bytes,
                optimal_bytes: geometry.optimal_bytes,
                read_only,
                discard: true,
                serial: self.serial.clone(),
                queues: self.queues(),
            },
            write_cache: self.link.write_cache.load(Ordering::Relaxed),
            pin_memory: self.settings.pin_memory,
            limits: limits(self.settings.limits),
            metrics: self.metrics.clone(),
            events: self.listener(host),
        })
    }

    /// Queues that a front end may use.
    pub fn queues(&self) -> u16 {
        let most = QUEUES_MAX as u16;
        self.settings.queues.map_or(most, |queues| queues.clamp(1, most))
    }

    /// Called on the socket thread.
    fn listener(&self, host: &Host) -> Arc<dyn Fn(ExportEvent) + Send + Sync> {
        let (host, link) = (host.clone(), self.link.clone());
        let (name, object) = (self.name.clone(), self.object());
        Arc::new(move |event| match event {
            ExportEvent::Attached { peer_pid } => {
                link.attached.store(true, Ordering::Relaxed);
                let by = peer_pid.map_or(String::new(), |pid| format!(" by process {pid}"));
                host.events.add(EventKind::Attached, &object, format!("attached{by}"));
            }
            ExportEvent::Detached => {
                link.attached.store(false, Ordering::Relaxed);
                link.misses_memory.store(false, Ordering::Relaxed);
                host.events.add(EventKind::Detached, &object, "detached");
            }
            ExportEvent::WriteCache { enabled } => {
                if link.write_cache.swap(enabled, Ordering::Relaxed) == enabled {
                    return;
                }
                if let Err(error) = host.run_dir.set_write_cache(&name, enabled) {
                    host.events.add(EventKind::Error, &object, error.to_string());
                }
                let text = if enabled { "on" } else { "off" };
                host.events.add(EventKind::WriteCache, &object, format!("write cache {text}"));
            }
            ExportEvent::Taken { peer_pid } => {
                let by = peer_pid.map_or("another".to_owned(), |pid| format!("process {pid}"));
                let text = format!(
                    "one more front end waits at its socket, which serves one at a time: {by} \
                     has it"
                );
                host.events.add(EventKind::Error, &object, text);
            }
            ExportEvent::MissesMemory { missing } => {
                link.misses_memory.store(missing, Ordering::Relaxed);
                if missing {
                    host.events.add(EventKind::Error, &object, memory_missing(&name));
                }
            }
            ExportEvent::NotPinned { reason } => {
                let text = format!("pinMemory has no effect until it is attached anew: {reason}");
                host.events.add(EventKind::Error, &object, text);
            }
            ExportEvent::Refused { reason } => {
                host.events.add(EventKind::Error, &object, reason);
            }
            ExportEvent::Fenced { reason } => {
                link.set_trouble(VolumeState::Fenced, &reason);
                host.events.add(EventKind::Fenced, &object, reason);
            }
        })
    }

    /// Ends serving: nothing is under way when this returns.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`]: something is, and does not end. Its socket goes as soon as it has; what
    /// was to follow must be asked for again.
    pub fn stop(&self, host: &Host) -> Result<()> {
        if self.link.export().is_some() {
            // The thread that removes serves everybody's sockets: nothing may keep it waiting.
            self.rest(super::caching::REST_WAIT)?;
            self.close_socket(host)?;
            self.detach_from_pool();
        }
        Ok(())
    }

    /// Closes this door: nothing that came through it is under way when this returns. With the
    /// last one, the disk must have come to rest before.
    pub(super) fn close_socket(&self, host: &Host) -> Result<()> {
        if let Some(export) = self.link.export().filter(|_| !self.left) {
            match host.server.remove(export) {
                // One that ended Busy the last time has ended since.
                Err(error) if error.kind() == ErrorKind::Gone => {}
                Err(error) => {
                    let text = format!(
                        "it is being taken down: {error}; ask again for what that was for, or \
                         apply a manifest with it to have it served again"
                    );
                    self.link.set_trouble(VolumeState::Failed, text);
                    return Err(error.context(format_args!("volume {}", self.name)));
                }
                Ok(()) => {}
            }
        }
        self.link.close();
        self.link.attached.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn detach_from_pool(&self) {
        let detached = self.pool.with_keeper(|keeper| {
            keeper.detached(self.id);
            Ok(())
        });
        if let Err(error) = detached {
            log::debug!("volume {}: {error}", self.name);
        }
    }

    /// The export of a volume that is served.
    pub fn export_id(&self) -> Result<ExportId> {
        let (state, message) = self.condition();
        let export = self.link.export().filter(|_| state != VolumeState::Failed);
        export.ok_or_else(|| {
            let reason = message.unwrap_or_else(|| "it is being taken down".to_owned());
            let text = format!("volume {} is not served: {reason}", self.name);
            Error::new(ErrorKind::Fenced, text)
        })
    }

    /// Whether it is served, and if not why.
    fn condition(&self) -> (VolumeState, Option<String>) {
        match (&self.failure, self.link.trouble()) {
            (Some(failure), _) => (VolumeState::Failed, Some(failure.clone())),
            (None, Some((state, text))) => (state, Some(text)),
            (None, None) if self.is_opening() => (VolumeState::Opening, None),
            (None, None) if self.left => (VolumeState::Left, None),
            (None, None) => (VolumeState::Served, None),
        }
    }

    pub fn is_served(&self) -> bool {
        !matches!(self.condition().0, VolumeState::Failed | VolumeState::Opening)
    }

    /// A change has taken it down, and what was to follow failed: it is served again when somebody
    /// asks for it.
    pub(super) fn is_down(&self) -> bool {
        let taken = matches!(self.link.trouble(), Some((VolumeState::Failed, _)));
        let shut = self.link.export().is_none() && !self.is_opening() && !self.left;
        self.failure.is_none() && (taken || shut)
    }

    pub fn is_fenced(&self) -> bool {
        self.condition().0 == VolumeState::Fenced
    }

    /// What somebody should look after.
    pub fn problem(&self) -> Option<String> {
        let cache = || self.cache_problem().filter(|_| self.home.is_none());
        let waiting = || self.waiting_problem();
        self.message().or_else(cache).or_else(waiting).or_else(|| self.drive_problem())
    }

    /// What is wrong with it, or with its machine.
    fn message(&self) -> Option<String> {
        let missing = self.link.misses_memory.load(Ordering::Relaxed);
        self.condition().1.or_else(|| missing.then(|| memory_missing(&self.name)))
    }

    /// Requests of a flash volume that wait.
    pub fn waiting(&self) -> Option<api::Waiting> {
        let requests = self.counters.waiting.load(Ordering::Relaxed);
        let since = Nanos(self.counters.waiting_since.load(Ordering::Relaxed));
        let oldest_ms = Nanos::now().since(since).as_millis() as u64;
        (requests > 0 && since > Nanos::default()).then_some(api::Waiting { requests, oldest_ms })
    }

    /// Others of a volume that waits for space wait, too: for a moment, until it is mapped.
    fn waiting_problem(&self) -> Option<String> {
        let waiting = self.waiting().filter(|_| self.pool.waiting() > 0)?;
        Some(format!(
            "writes wait for space in pool {} ({}, the oldest for {}s): reclaim or shrink other \
             volumes, or grow the pool",
            self.pool.name,
            waiting.requests,
            waiting.oldest_ms / 1000
        ))
    }

    /// The drive has failed operations lately.
    fn drive_problem(&self) -> Option<String> {
        let errors = self.counters.drive_errors()?;
        let ago = Nanos::now().since(errors.at);
        (ago < DRIVE_ERRORS_SHOWN)
            .then(|| format!("{} ({}s ago)", drive_errors(&errors), ago.as_secs()))
    }

    pub fn facts(&self) -> Result<AllocationFacts> {
        self.pool.allocation(self.disk_name()).ok_or_else(|| {
            let text = format!("volume {} is no more in pool {}", self.name, self.pool.name);
            Error::new(ErrorKind::Gone, text)
        })
    }

    pub fn report(&self, host: &Host) -> Result<api::Volume> {
        let facts = self.facts()?;
        let export = self.link.export().filter(|_| !self.left);
        let status = export.and_then(|id| host.server.status(id).ok());
        let status = status.unwrap_or_default();
        Ok(api::Volume {
            name: self.name.clone(),
            pool: self.pool.name.clone(),
            disk_of: self.home.clone(),
            size_bytes: self.size_bytes(&facts),
            mapped_bytes: facts.mapped_bytes,
            thin: facts.thin,
            class: api_class(facts.class),
            read_only: self.settings.read_only,
            limits: api::Limits {
                iops: self.settings.limits.iops,
                bandwidth_bytes: self.settings.limits.bandwidth,
                burst_ms: self.settings.limits.burst_ms,
            },
            serial: self.serial.clone(),
            socket: self.socket.display().to_string(),
            state: self.condition().0,
            message: self.message(),
            attached: status.connected,
            peer_pid: status.peer_pid,
            queues_running: status.queues_running,
            pin_memory: self.settings.pin_memory,
            memory_bytes: status.memory_bytes,
            pinned_bytes: status.pinned_bytes,
            write_cache: self.link.write_cache.load(Ordering::Relaxed),
            bounced_pieces: self.counters.bounced.load(Ordering::Relaxed),
            waiting: self.waiting(),
            operations: self.operations(),
            cache: self.cache_report(&facts),
        })
    }

    /// What the guest sees; 0 if that is not known, of a cached disk that could not be opened.
    pub fn size_bytes(&self, facts: &AllocationFacts) -> u64 {
        match self.is_cached() {
            true => self.cached.as_ref().map_or(0, |cached| cached.geometry.size_bytes),
            false => facts.size_bytes,
        }
    }

    fn operations(&self) -> Vec<Operations> {
        let snapshot = self.metrics.snapshot();
        let operations = OperationClass::ALL.iter().map(|class| {
            let counted = snapshot.class(*class);
            Operations {
                kind: class.name().to_owned(),
                operations: counted.operations(),
                bytes: counted.bytes,
                errors: counted.errors,
            }
        });
        operations.collect()
    }
}

fn memory_missing(name: &str) -> String {
    format!(
        "its virtual machine shares no memory with vflashd, so it waits for its disk for ever: \
         start it with shared memory, as `vflash attach {name} --print qemu` (or libvirt, \
         cloud-hypervisor) shows"
    )
}

pub fn limits(limits: crate::manifest::Limits) -> qos::Limits {
    let burst = Duration::from_millis(limits.burst_ms);
    qos::Limits { iops: limits.iops, bandwidth: limits.bandwidth, burst }
}

fn full_policy(when_full: WhenFull) -> FullPolicy {
    match when_full {
        WhenFull::Wait => FullPolicy::Wait,
        WhenFull::Enospc => FullPolicy::Fail,
    }
}

/// Looks the names up.
///
/// # Errors
/// [`ErrorKind::Invalid`]: no such user or group.
pub fn socket_access(access: &crate::manifest::Access) -> Result<SocketAccess> {
    use nix::unistd::{Group, User};
    let unknown = |kind: &str, name: &str| {
        let text = format!("`access` of the socket: there is no {kind} `{name}` on this host");
        Error::new(ErrorKind::Invalid, text)
    };
    let uid = match &access.owner {
        None => None,
        Some(Principal::Id(id)) => Some(*id),
        Some(Principal::Name(name)) => {
            let user = User::from_name(name).ok().flatten();
            Some(user.ok_or_else(|| unknown("user", name))?.uid.as_raw())
        }
    };
    let gid = match &access.group {
        None => None,
        Some(Principal::Id(id)) => Some(*id),
        Some(Principal::Name(name)) => {
            let group = Group::from_name(name).ok().flatten();
            Some(group.ok_or_else(|| unknown("group", name))?.gid.as_raw())
        }
    };
    Ok(SocketAccess { uid, gid, mode: access.mode })
}

pub fn api_class(class: flash::Class) -> Class {
    match class {
        flash::Class::Volatile => Class::Volatile,
        flash::Class::Nonvolatile => Class::Nonvolatile,
    }
}

/// What the guest reads as the disk's serial number: its class, and an identity that no other
/// volume of the pool ever had or will have. 20 bytes, all that GET_ID can tell.
fn serial(pool: [u8; 16], id: AllocationId, class: flash::Class) -> String {
    let class = match class {
        flash::Class::Volatile => "vo",
        flash::Class::Nonvolatile => "nv",
    };
    let (head, _) = pool.split_first_chunk::<8>().expect("16 bytes hold 8");
    let identity = u64::from_be_bytes(*head).wrapping_add(id.0) & 0xff_ffff_ffff;
    format!("vflash-{class}-{identity:010x}")
}

/// As [`serial`], of a cached disk: it stays when the disk moves to another host.
fn cached_serial(disk: [u8; 16]) -> String {
    let digits: String = disk.iter().take(5).map(|byte| format!("{byte:02x}")).collect();
    format!("vflash-ca-{digits}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_names_the_class_and_fits_get_id() {
        let pool = [0xff; 16];
        let first = serial(pool, AllocationId(1), flash::Class::Volatile);
        let second = serial(pool, AllocationId(2), flash::Class::Nonvolatile);
        assert_eq!(first, "vflash-vo-0000000000");
        assert_eq!(second, "vflash-nv-0000000001");
        assert_eq!(first.len(), crate::virtio::config::ID_BYTES);
        let cached = cached_serial([0xab; 16]);
        assert_eq!(cached, "vflash-ca-ababababab");
        assert_eq!(cached.len(), crate::virtio::config::ID_BYTES);
    }
}
