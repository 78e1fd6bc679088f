//! A cached disk while it is opened and served: flash, backing and sidecar put together.
//!
//! The order at opening is what keeps an old owner from being taken for a new one, whatever kills
//! the daemon in between: the backing is claimed; the pool notes the epoch of that claim; only then
//! the log is opened for writing; only then it is served.

use super::pool::OpenPool;
use super::together::Groups;
use crate::backing::fence::{Claim, Remembered};
use crate::backing::nbd::NbdOptions;
use crate::backing::open::{Backing, Claimed, Description, OpenOptions};
use crate::backing::redo::Layout;
use crate::backing::sidecar::write_stamp;
use crate::backing::spec::Spec;
use crate::backing::stamp::{DrainMode, Owner, Point, Stamp, State};
use crate::base::clock::unix_ms;
use crate::base::{Error, ErrorKind, Result};
use crate::cache::consistency::{Consistency, Joining, Waker};
use crate::cache::drain::SidecarState;
use crate::cache::memory::DrainMemory;
use crate::cache::root::{BackingIdentity, Root};
use crate::cache::scan::read_root;
use crate::cache::{
    self, CacheOptions, CacheStatus, CachedDisk, FormatOptions, Medium, Mode, Opened, Place, Shape,
};
use crate::flash::AllocationId;
use crate::io::disk::{DiskGeometry, DiskTarget};
use crate::io::file::FileDisk;
use crate::manifest::{Attributes, CacheMode, CacheSettings, Drain, Durability, LogIdentity};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use uuid::Uuid;

/// For locks of backing and sidecar: of another daemon, or of I/O that a killed one left.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// Who opens: the same for all disks of a daemon.
#[derive(Clone)]
pub struct Opener {
    /// New with each start of a daemon.
    pub instance: Uuid,
    pub groups: Groups,
    /// For draining.
    pub memory: Arc<DrainMemory>,
}

/// An opened cached disk, to be handed to a reactor.
pub struct CachedVolume {
    pub disk: CachedDisk,
    /// Flash, backing and, if there is one, sidecar.
    pub disks: Vec<DiskTarget>,
    pub side: Arc<Cached>,
    /// What is worth telling of its state.
    pub findings: Vec<String>,
}

/// What is known of a cached disk beside its reactor.
pub struct Cached {
    pub status: Arc<CacheStatus>,
    /// Identity of the disk, whoever caches it.
    pub disk: [u8; 16],
    /// Of the backing, and so of what the guest sees.
    pub geometry: DiskGeometry,
    pub read_only: bool,
    /// Why it cannot be write-back; `None`: it can.
    pub no_writeback: Option<&'static str>,
    /// The mode that the log was in when it was opened.
    pub mode: Mode,
    /// Point that draining stays at, plus 1; 0: it goes on.
    pub held: AtomicU64,
    /// Bytes that its curve would give it, if its size follows its use; 0: not known yet.
    pub goal_bytes: AtomicU64,
    /// The consistency group that it was opened in.
    pub group: Option<Arc<Consistency>>,
}

/// What an opening works on.
struct Opening<'a> {
    opener: &'a Opener,
    pool: &'a OpenPool,
    name: &'a str,
    id: AllocationId,
    allocation_bytes: u64,
    settings: Attributes,
    cache: CacheSettings,
    log: LogIdentity,
    medium: Medium,
    backing: Backing,
    group: Option<Arc<Consistency>>,
    /// Of the group as its stamp has it.
    generation: u64,
    waker: Waker,
}

/// Opens the disk of an allocation; made anew if it never was. `waker` has it look at its
/// consistency group again.
///
/// # Errors
/// With what an operator can do. What is there stays as it is, but for a group that was finished.
pub fn open(opener: &Opener, pool: &OpenPool, name: &str, waker: Waker) -> Result<CachedVolume> {
    let context = |error: Error| error.context(format!("cached disk {name}"));
    Opening::new(opener, pool, name, waker).and_then(Opening::run).map_err(context)
}

/// The backing of a disk's settings, opened and locked; changes nothing. `patience`: of an
/// operation on a server that does not answer; `None`: for ever, as is right under a cache.
pub fn open_backing(cache: &CacheSettings, patience: Option<Duration>) -> Result<Backing> {
    open_backing_for(cache, false, patience)
}

fn open_backing_for(
    cache: &CacheSettings,
    reading: bool,
    patience: Option<Duration>,
) -> Result<Backing> {
    Backing::open(&OpenOptions {
        reading,
        spec: Spec::parse(&cache.backing)?,
        sidecar: cache.sidecar.as_ref().map(Into::into),
        wait: LOCK_WAIT,
        nbd: NbdOptions { patience, ..NbdOptions::default() },
    })
}

/// Where an allocation lies.
pub fn place(pool: &OpenPool, id: AllocationId) -> Result<Place> {
    pool.with_keeper(|keeper| {
        let place = keeper.call(move |pool| {
            let allocation = pool.allocation(id)?;
            Some(Place::new(allocation.size_bytes, allocation.runs()))
        })?;
        place.ok_or_else(|| Error::new(ErrorKind::Gone, "its allocation is gone"))
    })
}

/// The allocation of a cached disk, to be read and written before a reactor has it.
pub fn medium(target: &DiskTarget, place: Place) -> Result<Medium> {
    let disk = FileDisk::shared(target).ok_or_else(|| {
        let text = "the pool is on a null device, which keeps nothing: take another pool";
        Error::new(ErrorKind::Invalid, text)
    })?;
    Ok(Medium::new(Box::new(disk), place))
}

impl<'a> Opening<'a> {
    fn new(opener: &'a Opener, pool: &'a OpenPool, name: &'a str, waker: Waker) -> Result<Self> {
        let facts = pool.allocation(name).ok_or_else(|| {
            let text = format!("there is no allocation {name} in pool {}", pool.name);
            Error::new(ErrorKind::Gone, text)
        })?;
        let settings = Attributes::decode(&facts.attributes)?;
        let (Some(cache), Some(log)) = (settings.settings.cache.clone(), settings.log.clone())
        else {
            return Err(Error::new(ErrorKind::Invalid, "it is a flash volume"));
        };
        Shape::of(facts.size_bytes)?;
        let id = facts.id;
        let group = opener.groups.of(pool, name, &cache)?;
        let medium = medium(&pool.target, place(pool, id)?)?;
        let mut backing = open_backing_for(&cache, settings.settings.read_only, None)?;
        opener.groups.tell(&mut backing)?;
        Ok(Self {
            opener,
            pool,
            name,
            id,
            allocation_bytes: facts.size_bytes,
            settings,
            cache,
            log,
            medium,
            backing,
            group,
            generation: 0,
            waker,
        })
    }

    fn run(mut self) -> Result<CachedVolume> {
        let root = self.root()?;
        if self.is_golden() {
            let claimed =
                Claimed { stamp: None, recovery: None, live: None, cold: false, next_group: 1 };
            let (opened, stamp) = self.open_log(root, &claimed)?;
            return self.put_together(opened, stamp, &claimed);
        }
        let claim = self.wanted(root.as_ref());
        if let Some((opened, claimed)) = self.take_up(&claim)? {
            let stamp = claimed.stamp.clone();
            return self.put_together(opened, stamp, &claimed);
        }
        let claimed = self.claim(&claim)?;
        let opened = self.open_log(root, &claimed);
        if opened.is_err() && !self.log.formatted {
            self.give_back();
        }
        let (opened, stamp) = opened?;
        self.put_together(opened, stamp, &claimed)
    }

    /// The root of the log; `None` if it was never written.
    fn root(&mut self) -> Result<Option<Root>> {
        if !self.log.formatted {
            return Ok(None);
        }
        match read_root(&mut self.medium) {
            Ok((root, _)) if root.log_uuid == *self.log.uuid.as_bytes() => Ok(Some(root)),
            Ok(_) => {
                let text = "its allocation holds the log of another disk: nothing was changed";
                Err(Error::new(ErrorKind::Corrupt, text))
            }
            Err(error) if error.kind() == ErrorKind::Gone => {
                let text = format!(
                    "its log is gone from the flash, and what it had not drained with it: `vflash \
                     detach {} --lost` gives it up",
                    self.name
                );
                Err(Error::new(ErrorKind::Corrupt, text))
            }
            Err(error) => Err(error),
        }
    }

    /// All that have the disk read it, and nobody owns the image.
    fn is_golden(&self) -> bool {
        self.settings.settings.read_only
    }

    fn drain(&self) -> DrainMode {
        let grouped = self.backing.sidecar_path().is_some() && !self.is_golden();
        drain_mode(self.cache.drain.filter(|_| grouped), grouped)
    }

    /// What is claimed.
    fn wanted(&mut self, root: Option<&Root>) -> Claim {
        let log = &self.log;
        let writeback = self.backing.description().writeback;
        let dirty = writeback || self.cache.mode == CacheMode::WriteBack;
        let (generation, roster) =
            self.group.as_ref().map(|group| group.roster()).unwrap_or_default();
        self.generation = generation;
        Claim {
            owner: Owner {
                host: host(),
                instance: *self.opener.instance.as_bytes(),
                allocation: *log.uuid.as_bytes(),
                host_name: host_name(),
                volume: self.name.to_owned(),
            },
            remembered: root.map(|root| Remembered {
                disk: root.disk_uuid,
                owner_epoch: log.owner_epoch,
                point: if log.grouped { log.point.max(root.drained_through) } else { log.point },
                dirty: !root.clean,
            }),
            state: if dirty { State::Dirty } else { State::Clean },
            drain: self.drain(),
            create: true,
            adopt: false,
            group_bytes_max: None,
            new_disk: *Uuid::new_v4().as_bytes(),
            roster,
            now_ms: unix_ms(),
        }
    }

    /// Goes on where a killed daemon was within a group, without finishing that before it serves.
    /// `None`: the log cannot finish it, or there is nothing to finish.
    fn take_up(&mut self, claim: &Claim) -> Result<Option<(Opened, Claimed)>> {
        let Some(claimed) = self.backing.take_up(claim)? else { return Ok(None) };
        let Some(live) = claimed.live else { return Ok(None) };
        if self.log.grouped && self.drain() != DrainMode::Grouped {
            self.log.grouped = false;
            self.note()?;
        }
        let identity = backing_identity(self.backing.description(), true);
        let mut how = cache::OpenOptions::new(identity, self.allocation_bytes);
        if self.group.is_some() {
            // The point before the group may be another disk's number: the log does not know it.
            (how.shared, how.drained_through, how.drained_others) = (true, live.from, live.from);
        }
        let opened = cache::recover::open(&mut self.medium, &how)?;
        if !opened.can_finish(&live) {
            return Ok(None);
        }
        // The stamp stays as it was: no step begins before the disk has written another.
        self.generation = 0;
        Ok(Some((opened, claimed)))
    }

    fn claim(&mut self, claim: &Claim) -> Result<Claimed> {
        let claimed = self.backing.claim(claim, &mut |_| {})?;
        if let Some(stamp) = &claimed.stamp {
            self.log.owner_epoch = stamp.owner_epoch;
            self.log.point = stamp.point.won;
        }
        self.log.grouped &= self.drain() == DrainMode::Grouped;
        self.note()?;
        Ok(claimed)
    }

    /// Makes what is known of the log durable in the pool.
    fn note(&mut self) -> Result<()> {
        self.settings.log = Some(self.log.clone());
        let (id, attributes) = (self.id, self.settings.encode());
        self.pool.change(move |pool| pool.set_attributes(id, attributes))
    }

    fn open_log(
        &mut self,
        root: Option<Root>,
        claimed: &Claimed,
    ) -> Result<(Opened, Option<Stamp>)> {
        let mut stamp = claimed.stamp.clone();
        let stamped = stamp.is_some();
        let mut identity = backing_identity(self.backing.description(), stamped);
        if self.is_golden() {
            // Without anything to tell by, it is another image each time.
            let generation = self.backing.generation()?;
            let generation = generation.unwrap_or_else(|| Uuid::new_v4().as_u64_pair().into());
            identity.fingerprint = fingerprint(generation);
        }
        // What is cached of another image is forgotten: it was never dirty.
        let root = root.filter(|root| !self.is_golden() || root.backing == identity);
        if root.is_none() {
            let disk = stamp.as_ref().map_or_else(|| *Uuid::new_v4().as_bytes(), |s| s.disk);
            let (secret, _) = Uuid::new_v4().as_u64_pair();
            let options = FormatOptions {
                shape: Shape::of(self.allocation_bytes)?,
                log_uuid: *self.log.uuid.as_bytes(),
                disk_uuid: disk,
                secret,
                mode: cache_mode(self.cache.mode),
                backing: identity,
                overwrite: true,
            };
            cache::recover::format(&mut self.medium, &options)?;
        }
        let mut how = cache::OpenOptions::new(identity, self.allocation_bytes);
        let point = stamp.as_ref().map(|stamp| stamp.point).unwrap_or_default();
        (how.drained_through, how.drained_others) = (point.won, point.others);
        how.cold = claimed.cold;
        how.shared = self.group.is_some();
        let opened = cache::recover::open(&mut self.medium, &how).map_err(|error| {
            if error.kind() != ErrorKind::Fenced {
                return error;
            }
            let text = format!("{error}: `vflash detach {} --lost`", self.name);
            Error::new(ErrorKind::Fenced, text)
        })?;
        if let (Some(before), (_, Some(sidecar))) = (&stamp, self.backing.disks())
            && before.point.won < opened.drained
        {
            // An ordered drain stamps now and then only; groups are compared with the stamp.
            let mut now = before.next(unix_ms());
            now.point = Point { won: opened.drained, ..Point::default() };
            write_stamp(sidecar, &now)?;
            stamp = Some(now);
        }
        self.log.formatted = true;
        self.log.point = stamp.as_ref().map_or(0, |stamp| stamp.point.won);
        self.log.grouped = stamped && self.drain() == DrainMode::Grouped;
        self.note()?;
        Ok((opened, stamp))
    }

    /// A disk that could not be made leaves its backing to others.
    fn give_back(&mut self) {
        let options =
            crate::backing::recover::RecoverOptions { now_ms: unix_ms(), ..Default::default() };
        if let Err(error) = self.backing.take_over_lost(self.name, options, &mut |_| {}) {
            log::warn!("{}: giving its backing back: {error}", self.name);
        }
    }

    fn put_together(
        self,
        opened: Opened,
        stamp: Option<Stamp>,
        claimed: &Claimed,
    ) -> Result<CachedVolume> {
        let description = self.backing.description().clone();
        let mut options = CacheOptions::new(self.name);
        options.strong = self.cache.durability == Durability::Strong;
        options.drain = self.drain();
        options.memory = self.opener.memory.clone();
        options.staleness_max = Duration::from_millis(self.cache.staleness_ms());
        options.backing_timeout = Duration::from_millis(self.cache.backing_timeout_ms());
        options.write_budget = self.cache.write_budget_bytes;
        let (target, sidecar_target) = self.backing.targets();
        let disks: Vec<DiskTarget> = [Some(self.pool.target.clone()), Some(target), sidecar_target]
            .into_iter()
            .flatten()
            .collect();
        let joining = stamp.as_ref().zip(self.group.as_ref()).map(|(stamp, group)| {
            let joining = Joining {
                peer: super::together::peer(self.name, &self.cache)?,
                disk: stamp.disk,
                committed_step: stamp.committed_step,
                generation: self.generation,
                next_won: opened.next_won(),
                waker: self.waker.clone(),
            };
            Ok::<_, Error>((group.clone(), joining))
        });
        let joining = joining.transpose()?;
        let sidecar = stamp.map(|stamp| SidecarState {
            layout: Layout::new(stamp.group_bytes_max),
            stamp,
            last_group: claimed.next_group - 1,
            live: claimed.live.map(|live| live.point()),
        });
        let (disk_uuid, mode) = (opened.root.disk_uuid, opened.root.mode);
        let mut findings = opened.findings.clone();
        findings.extend(opened.fence.clone());
        let mut disk = CachedDisk::new(opened, options, description.geometry, sidecar);
        if let Some((group, joining)) = joining {
            disk.join(group.join(joining));
        }
        let side = Cached {
            status: disk.status(),
            disk: disk_uuid,
            geometry: description.geometry,
            read_only: description.read_only,
            no_writeback: description.reason,
            mode,
            held: AtomicU64::new(0),
            goal_bytes: AtomicU64::new(0),
            group: self.group,
        };
        Ok(CachedVolume { disk, disks, side: Arc::new(side), findings })
    }
}

/// What the log's root compares the backing with. Where there is an owner stamp, that one tells
/// whether it is the same disk, and may be told that it is though it looks like another.
fn backing_identity(description: &Description, stamped: bool) -> BackingIdentity {
    let identity = &description.identity;
    let mut fingerprint = [0; 16];
    if !stamped {
        fingerprint = self::fingerprint(identity.fingerprint);
    }
    BackingIdentity {
        size_bytes: identity.size_bytes,
        block_bytes: identity.block_bytes,
        kind: 0,
        fingerprint,
    }
}

fn fingerprint(words: [u64; 2]) -> [u8; 16] {
    let [first, second] = words.map(u64::to_le_bytes);
    std::array::from_fn(|at| if at < 8 { first[at] } else { second[at - 8] })
}

pub fn drain_mode(wanted: Option<Drain>, sidecar: bool) -> DrainMode {
    match wanted {
        Some(Drain::Ordered) => DrainMode::Ordered,
        _ if sidecar => DrainMode::Grouped,
        _ => DrainMode::Ordered,
    }
}

pub fn cache_mode(mode: CacheMode) -> Mode {
    match mode {
        CacheMode::WriteBack => Mode::WriteBack,
        CacheMode::WriteThrough => Mode::WriteThrough,
        CacheMode::WriteAround => Mode::WriteAround,
        CacheMode::ReadOnly => Mode::ReadOnly,
        CacheMode::Bypass => Mode::Bypass,
    }
}

/// This host, the same after a restart.
fn host() -> [u8; 16] {
    let text = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    Uuid::parse_str(text.trim()).map_or([0; 16], |id| *id.as_bytes())
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}
