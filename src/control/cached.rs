//! A cached disk while it is opened and served: flash, backing and sidecar put together.
//!
//! The order at opening is what keeps an old owner from being taken for a new one, whatever kills
//! the daemon in between: the backing is claimed; the pool notes the epoch of that claim; only then
//! the log is opened for writing; only then it is served.

use super::alone::{AWAY_WAIT, Alone, Asked, hangs, is_away};
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
use crate::cache::scan::{Scan, read_root, scan};
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
pub(super) const LOCK_WAIT: Duration = Duration::from_secs(5);

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
    /// As it must be, and worth knowing.
    pub notes: Vec<String>,
}

/// What is known of a cached disk beside its reactor.
pub struct Cached {
    pub status: Arc<CacheStatus>,
    /// Identity of the disk, whoever caches it.
    pub disk: [u8; 16],
    /// Of the backing, and so of what the guest sees.
    pub geometry: DiskGeometry,
    pub read_only: bool,
    /// Why it can be in no mode that keeps a log; `None`: it can.
    pub no_log: Option<&'static str>,
    /// The mode that the log was in when it was opened.
    pub mode: Mode,
    /// An earlier daemon served it last in a mode that keeps no log.
    pub past_log: bool,
    /// It was opened alone.
    pub alone: Option<Alone>,
    /// Point that draining stays at, plus 1; 0: it goes on.
    pub held: AtomicU64,
    /// Bytes that its curve would give it, if its size follows its use; 0: not known yet.
    pub goal_bytes: AtomicU64,
    /// The consistency group that it was opened in.
    pub group: Option<Arc<Consistency>>,
}

/// What an opening works on, beside the log and the backing.
pub(super) struct Opening<'a> {
    opener: &'a Opener,
    pool: &'a OpenPool,
    name: &'a str,
    id: AllocationId,
    allocation_bytes: u64,
    settings: Attributes,
    cache: CacheSettings,
    log: LogIdentity,
    group: Option<Arc<Consistency>>,
    /// Of the group as its stamp has it.
    generation: u64,
    past_log: bool,
    waker: Waker,
}

/// Opens the disk of an allocation; made anew if it never was. One whose backing is away is opened
/// alone ([`super::alone`]), if it may be. `waker` has it look at its consistency group again.
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

pub(super) fn open_backing_for(
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
    pub(super) fn new(
        opener: &'a Opener,
        pool: &'a OpenPool,
        name: &'a str,
        waker: Waker,
    ) -> Result<Self> {
        let facts = pool.allocation(name).ok_or_else(|| {
            let text = format!("there is no allocation {name} in pool {}", pool.name);
            Error::new(ErrorKind::Gone, text)
        })?;
        let settings = Attributes::decode(&facts.attributes)?;
        let (Some(cache), Some(log)) = (settings.settings.cache.clone(), settings.log.clone())
        else {
            return Err(Error::new(ErrorKind::Invalid, "it is a flash volume"));
        };
        let (id, allocation_bytes) = (facts.id, facts.size_bytes);
        Shape::of(allocation_bytes)?;
        let group = opener.groups.of(pool, name, &cache)?;
        Ok(Self {
            opener,
            pool,
            name,
            id,
            allocation_bytes,
            settings,
            cache,
            log,
            group,
            generation: 0,
            past_log: false,
            waker,
        })
    }

    fn medium(&self) -> Result<Medium> {
        medium(&self.pool.target, place(self.pool, self.id)?)
    }

    fn run(self) -> Result<CachedVolume> {
        let mut medium = self.medium()?;
        let root = self.root(&mut medium)?;
        let lone = root.as_ref().filter(|root| self.may_be_alone(root));
        let asked = Asked::begin(&self.cache, self.is_golden(), lone.is_some())?;
        let Some(root) = lone else {
            let backing = asked.wait().map_err(|error| self.why_it_waits(root.is_some(), error))?;
            return self.open_on(root, (medium, backing));
        };
        let why = match asked.wait_for(AWAY_WAIT) {
            Some(Ok(backing)) => return self.open_on(Some(root.clone()), (medium, backing)),
            Some(Err(error)) if is_away(&error) => error,
            Some(Err(error)) => return Err(error),
            None => hangs(&self.cache),
        };
        self.open_alone(root, medium, why, asked)
    }

    fn open_on(
        mut self,
        root: Option<Root>,
        (mut medium, mut backing): (Medium, Backing),
    ) -> Result<CachedVolume> {
        self.tell(&mut backing)?;
        if self.is_golden() {
            let claimed =
                Claimed { stamp: None, recovery: None, live: None, cold: false, next_group: 1 };
            let log = (root, None);
            let (opened, stamp) = self.open_log(log, (&mut medium, &mut backing), &claimed)?;
            return self.put_together(opened, stamp, (&backing, &claimed));
        }
        let claim = self.wanted(root.as_ref(), &backing);
        if let Some((opened, claimed)) = self.take_up(&claim, (&mut medium, &mut backing))? {
            let stamp = claimed.stamp.clone();
            return self.put_together(opened, stamp, (&backing, &claimed));
        }
        self.past_log = root.as_ref().is_some_and(|root| !root.mode.journals());
        let scan = match &root {
            Some(root) => {
                let scan = self.look(&claim, (&mut medium, &mut backing));
                Some(scan.map_err(|error| self.no_log(root, error))?)
            }
            None => None,
        };
        let claimed = self.claim(&claim, &mut backing)?;
        let opened = self.open_log((root, scan), (&mut medium, &mut backing), &claimed);
        if opened.is_err() && !self.log.formatted {
            self.give_back(&mut backing);
        }
        let (opened, stamp) = opened?;
        self.put_together(opened, stamp, (&backing, &claimed))
    }

    /// The way out of a log that its backing cannot have.
    fn no_log(&self, root: &Root, error: Error) -> Error {
        if error.kind() != ErrorKind::Unsupported || root.mode != Mode::WriteThrough {
            return error;
        }
        let text = format!(
            "{error}; its log holds nothing that was acknowledged and is not in the backing: give \
             it up (`vflash detach {} --lost`) and apply the disk anew, in a mode without a log or \
             on what can have one",
            self.name
        );
        Error::new(ErrorKind::Unsupported, text)
    }

    /// Whether the disk may go on without its backing for a while: it was served here before, in
    /// write-back, and nobody but a person who gives its flash up can have taken it over since.
    fn may_be_alone(&self, root: &Root) -> bool {
        let served = root.incarnation > 0 && !root.clean && self.log.owner_epoch > 0;
        let writeback = root.mode == Mode::WriteBack && self.cache.mode == CacheMode::WriteBack;
        // A member of a group goes with the others, which may be further.
        let lone = self.group.is_none() && !self.is_golden();
        served && writeback && lone && self.has_sidecar()
    }

    /// What keeps a disk from being served while its backing is away. `made`: it was served before.
    fn why_it_waits(&self, made: bool, error: Error) -> Error {
        if !made || !is_away(&error) {
            return error;
        }
        let why = match &self.cache.consistency_group {
            Some(group) => format!("it goes with the others of consistency group `{group}`"),
            None if self.is_golden() => "its image may be another one by then".to_owned(),
            None if self.cache.mode == CacheMode::WriteBack => {
                "its flash cannot be trusted alone".to_owned()
            }
            None => format!("in mode {} its writes need the backing", self.cache.mode.name()),
        };
        let text = format!("{error}; guests wait, without an error, until that is back: {why}");
        Error::new(error.kind(), text)
    }

    fn open_alone(
        self,
        root: &Root,
        mut medium: Medium,
        why: Error,
        asked: Asked,
    ) -> Result<CachedVolume> {
        let mut how = cache::OpenOptions::new(root.backing, self.allocation_bytes);
        how.alone = true;
        let opened = cache::recover::open(&mut medium, &how)?;
        if opened.fence.is_some() {
            return Err(why);
        }
        let geometry = opened.root.geometry();
        let away = DiskTarget::Away { geometry };
        let disks = vec![self.pool.target.clone(), away.clone(), away];
        let why = why.context(format!("cached disk {}", self.name)).to_string();
        let told = format!("{why}: it is served from its flash alone until that is back");
        let alone = Alone::new(opened.root.clone(), opened.known, why, asked);
        let mut side = Side::new(geometry);
        (side.alone, side.findings) = (Some(alone), vec![told]);
        Ok(self.compose(opened, None, disks, side))
    }

    /// The root of the log; `None` if it was never written.
    fn root(&self, medium: &mut Medium) -> Result<Option<Root>> {
        if !self.log.formatted {
            return Ok(None);
        }
        match read_root(medium) {
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

    /// What the leader of its consistency group says, if its last group is in doubt.
    pub(super) fn tell(&self, backing: &mut Backing) -> Result<()> {
        self.opener.groups.tell(backing)
    }

    fn has_sidecar(&self) -> bool {
        super::caching::sidecar(&self.cache).is_some()
    }

    fn drain(&self) -> DrainMode {
        let grouped = self.has_sidecar() && !self.is_golden();
        drain_mode(self.cache.drain.filter(|_| grouped), grouped)
    }

    /// What is claimed.
    pub(super) fn wanted(&mut self, root: Option<&Root>, backing: &Backing) -> Claim {
        let log = &self.log;
        // A log that is there is drained first, whatever is wanted next.
        let modes = [Some(cache_mode(self.cache.mode)), root.map(|root| root.mode)];
        let journals = modes.into_iter().flatten().any(Mode::journals);
        let dirty = journals || backing.description().no_log.is_none();
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
    fn take_up(
        &mut self,
        claim: &Claim,
        (medium, backing): (&mut Medium, &mut Backing),
    ) -> Result<Option<(Opened, Claimed)>> {
        let Some(claimed) = backing.take_up(claim)? else { return Ok(None) };
        let Some(live) = claimed.live else { return Ok(None) };
        self.taken_up()?;
        let mut how = self.how(backing, true);
        if self.group.is_some() {
            // The point before the group may be another disk's number: the log does not know it.
            (how.shared, how.drained_through, how.drained_others) = (true, live.from, live.from);
        }
        let opened = cache::recover::open(medium, &how)?;
        if !opened.can_finish(&live) {
            return Ok(None);
        }
        // The stamp stays as it was: no step begins before the disk has written another.
        self.generation = 0;
        Ok(Some((opened, claimed)))
    }

    /// The epoch goes on, and with it what the log is never behind of.
    pub(super) fn taken_up(&mut self) -> Result<()> {
        if self.log.grouped && self.drain() != DrainMode::Grouped {
            self.log.grouped = false;
            self.note()?;
        }
        Ok(())
    }

    fn how(&self, backing: &Backing, stamped: bool) -> cache::OpenOptions {
        let identity = backing_identity(backing.description(), stamped);
        let mut how = cache::OpenOptions::new(identity, self.allocation_bytes);
        how.optimal_bytes = backing.description().geometry.optimal_bytes;
        how.golden = self.is_golden();
        how
    }

    /// Looks at the log before the backing is claimed: an older one than the backing has seen is
    /// refused before anything is changed.
    fn look(&self, claim: &Claim, (medium, backing): (&mut Medium, &mut Backing)) -> Result<Scan> {
        let scan = scan(medium, self.how(backing, true).clean_segments_max)?;
        let (standing, verdict) = backing.judge(claim)?;
        if let Some(standing) = standing.filter(|_| !verdict.cold) {
            cache::recover::check_age(&scan, &standing.point, self.group.is_some())
                .map_err(|error| way_out(error, self.name))?;
        }
        Ok(scan)
    }

    pub(super) fn claim(&mut self, claim: &Claim, backing: &mut Backing) -> Result<Claimed> {
        let claimed = backing.claim(claim, &mut |_| {})?;
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

    /// `scan`: what the log was looked at for, if it was.
    fn open_log(
        &mut self,
        (root, scan): (Option<Root>, Option<Scan>),
        (medium, backing): (&mut Medium, &mut Backing),
        claimed: &Claimed,
    ) -> Result<(Opened, Option<Stamp>)> {
        let stamp = claimed.stamp.clone();
        let mut how = self.how(backing, stamp.is_some());
        if self.is_golden() {
            // Without anything to tell by, it is another image each time.
            let generation = backing.generation()?;
            let generation = generation.unwrap_or_else(|| Uuid::new_v4().as_u64_pair().into());
            how.backing.fingerprint = fingerprint(generation);
        }
        // What is cached of another image is forgotten: it was never dirty.
        let root = root.filter(|root| !self.is_golden() || root.backing == how.backing);
        if root.is_none() {
            let disk = stamp.as_ref().map_or_else(|| *Uuid::new_v4().as_bytes(), |s| s.disk);
            let (secret, _) = Uuid::new_v4().as_u64_pair();
            let options = FormatOptions {
                shape: Shape::of(self.allocation_bytes)?,
                log_uuid: *self.log.uuid.as_bytes(),
                disk_uuid: disk,
                secret,
                mode: cache_mode(self.cache.mode),
                backing: how.backing,
                overwrite: true,
            };
            cache::recover::format(medium, &options)?;
        }
        let point = stamp.as_ref().map(|stamp| stamp.point).unwrap_or_default();
        (how.drained_through, how.drained_others) = (point.won, point.others);
        how.cold = claimed.cold;
        how.shared = self.group.is_some();
        let opened = match scan {
            Some(scan) => cache::recover::open_scanned(medium, scan, &how),
            None => cache::recover::open(medium, &how),
        };
        let opened = opened.map_err(|error| way_out(error, self.name))?;
        let stamp = self.opened_at(opened.drained, stamp, backing)?;
        Ok((opened, stamp))
    }

    /// The log is open and drained up to there: stamp and pool say so.
    pub(super) fn opened_at(
        &mut self,
        drained: u64,
        mut stamp: Option<Stamp>,
        backing: &mut Backing,
    ) -> Result<Option<Stamp>> {
        if let (Some(before), (_, Some(sidecar))) = (&stamp, backing.disks())
            && before.point.won < drained
        {
            // An ordered drain stamps now and then only; groups are compared with the stamp.
            let mut now = before.next(unix_ms());
            now.point = Point { won: drained, ..Point::default() };
            write_stamp(sidecar, &now)?;
            stamp = Some(now);
        }
        self.log.formatted = true;
        self.log.point = stamp.as_ref().map_or(0, |stamp| stamp.point.won);
        self.log.grouped = stamp.is_some() && self.drain() == DrainMode::Grouped;
        self.note()?;
        Ok(stamp)
    }

    /// A disk that could not be made leaves its backing to others.
    fn give_back(&mut self, backing: &mut Backing) {
        let options =
            crate::backing::recover::RecoverOptions { now_ms: unix_ms(), ..Default::default() };
        if let Err(error) = backing.take_over_lost(self.name, options, &mut |_| {}) {
            log::warn!("{}: giving its backing back: {error}", self.name);
        }
    }

    fn put_together(
        self,
        opened: Opened,
        stamp: Option<Stamp>,
        (backing, claimed): (&Backing, &Claimed),
    ) -> Result<CachedVolume> {
        let description = backing.description();
        let (target, sidecar_target) = backing.targets();
        let disks = [Some(self.pool.target.clone()), Some(target), sidecar_target];
        let disks = disks.into_iter().flatten().collect();
        let joining = stamp.as_ref().zip(self.group.clone()).map(|(stamp, group)| {
            let joining = Joining {
                peer: super::together::peer(self.name, &self.cache)?,
                disk: stamp.disk,
                committed_step: stamp.committed_step,
                generation: self.generation,
                next_won: opened.next_won(),
                waker: self.waker.clone(),
            };
            Ok::<_, Error>((group, joining))
        });
        let joining = joining.transpose()?;
        let sidecar = stamp.map(|stamp| sidecar_state(stamp, claimed));
        let mut side = Side::new(description.geometry);
        (side.read_only, side.no_log) = (description.read_only, description.no_log);
        side.findings = opened.findings.clone();
        side.findings.extend(opened.fence.clone());
        if !description.flush {
            let text = "its server cannot flush: FLUSHes of guests fail, and nobody knows what is \
                        durable there";
            side.findings.push(text.to_owned());
        }
        side.notes.extend(self.waits(backing));
        let mut volume = self.compose(opened, sidecar, disks, side);
        if let Some((group, joining)) = joining {
            volume.disk.join(group.join(joining));
        }
        Ok(volume)
    }

    /// Which writes of a guest wait now, if any do: with a log of its own nobody notices.
    fn waits(&self, backing: &Backing) -> Option<String> {
        let held = backing.held().filter(|_| self.cache.mode != CacheMode::WriteBack)?;
        Some(format!(
            "guests' writes wait until {}s after the opening: as long the NBD server may carry out \
             what a killed daemon had left with it; reads go on",
            held.as_secs()
        ))
    }

    fn compose(
        self,
        opened: Opened,
        sidecar: Option<SidecarState>,
        disks: Vec<DiskTarget>,
        side: Side,
    ) -> CachedVolume {
        let mut options = CacheOptions::new(self.name);
        options.strong = self.cache.durability == Durability::Strong;
        options.drain = self.drain();
        options.memory = self.opener.memory.clone();
        options.staleness_max = Duration::from_millis(self.cache.staleness_ms());
        options.backing_timeout = Duration::from_millis(self.cache.backing_timeout_ms());
        options.write_budget = self.cache.write_budget_bytes;
        options.golden = self.is_golden();
        let (disk_uuid, mode) = (opened.root.disk_uuid, opened.root.mode);
        let Side { geometry, read_only, no_log, alone, findings, notes } = side;
        let disk = CachedDisk::new(opened, options, geometry, sidecar);
        let side = Cached {
            status: disk.status(),
            disk: disk_uuid,
            geometry,
            read_only,
            no_log,
            mode,
            past_log: self.past_log,
            alone,
            held: AtomicU64::new(0),
            goal_bytes: AtomicU64::new(0),
            group: self.group,
        };
        CachedVolume { disk, disks, side: Arc::new(side), findings, notes }
    }
}

/// What is known of the backing when the disk is put together.
struct Side {
    geometry: DiskGeometry,
    read_only: bool,
    no_log: Option<&'static str>,
    alone: Option<Alone>,
    findings: Vec<String>,
    notes: Vec<String>,
}

impl Side {
    fn new(geometry: DiskGeometry) -> Self {
        let (findings, notes) = (Vec::new(), Vec::new());
        Self { geometry, read_only: false, no_log: None, alone: None, findings, notes }
    }
}

pub(super) fn sidecar_state(stamp: Stamp, claimed: &Claimed) -> SidecarState {
    SidecarState {
        layout: Layout::new(stamp.group_bytes_max),
        stamp,
        last_group: claimed.next_group - 1,
        live: claimed.live.map(|live| live.point()),
    }
}

/// The way out of a log that does not fit its backing.
pub(super) fn way_out(error: Error, name: &str) -> Error {
    match error.kind() {
        ErrorKind::Fenced => {
            Error::new(ErrorKind::Fenced, format!("{error}: `vflash detach {name} --lost`"))
        }
        _ => error,
    }
}

/// What the log's root compares the backing with. Where there is an owner stamp, that one tells
/// whether it is the same disk, and may be told that it is though it looks like another.
pub(super) fn backing_identity(description: &Description, stamped: bool) -> BackingIdentity {
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
