//! A cached disk on three simulated disks, a guest that drives it, and the judgement of what any
//! end of the host may leave. Shared by the suites; each uses a part of it.
#![allow(dead_code, unused_imports, reason = "each suite uses a part")]

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vflash::backing::identity::{Identity, Kind};
use vflash::backing::recover::{Damage, RecoverOptions, Standing, recover, take_up};
use vflash::backing::redo::Layout;
use vflash::backing::sidecar::write_stamp;
use vflash::backing::stamp::{DrainMode, Owner, Point, Stamp, State};
use vflash::base::clock::Nanos;
use vflash::base::units::{KIB, MIB, SECTOR_BYTES};
use vflash::cache::drain::SidecarState;
use vflash::cache::message::Reply;
use vflash::cache::model::{self, Model};
use vflash::cache::recover::{FormatOptions, OpenOptions, Opened, format, open};
use vflash::cache::root::BackingIdentity;
use vflash::cache::scan::scan;
use vflash::cache::{
    CacheMessage, CacheOptions, CacheState, CacheStatus, CachedDisk, Known, Medium, Mode, Place,
    Shape,
};
use vflash::io::blocking::Blocking;
use vflash::io::buffer::PinnedBuffer;
use vflash::io::crash::{CrashCase, Explorer, Loss};
use vflash::io::disk::{Disk, DiskGeometry};
use vflash::io::sim::{Content, Faults, Recording, SimDisk, sim_geometry};
use vflash::io::sim_reactor::{SimReactor, inbox};
use vflash::io::volume::{Outcome, RequestKind, SectorRange};

#[path = "away.rs"]
mod away;
#[path = "drains.rs"]
mod drains;
#[path = "jobs.rs"]
mod jobs;
#[path = "modes.rs"]
mod modes;
#[path = "sizes.rs"]
mod sizes;

use away::Port;
pub(crate) use jobs::{LOSSES, alone, clip, explore, named, run_all, scale};
use modes::Modes;
pub(crate) use sizes::{SEGMENTS_MAX, allocation_bytes};

pub(crate) const SECTORS: u64 = 2048;
pub(crate) const DISK_BYTES: u64 = SECTORS * SECTOR_BYTES;
const GROUP_MAX: u64 = MIB;
const REQUESTS_MAX: u32 = 32;
const UUID: [u8; 16] = [2; 16];

/// What kind of disk.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Setup {
    pub(crate) seed: u64,
    pub(crate) grouped: bool,
    pub(crate) strong: bool,
    pub(crate) segments: u64,
    pub(crate) reorder: bool,
    /// Of the allocation when it is opened; 0: all of the flash.
    pub(crate) allocation_bytes: u64,
    /// Bytes of a block of the backing.
    pub(crate) block_bytes: u32,
    /// All that have it read it.
    pub(crate) golden: bool,
    /// Tells the disks of a consistency group apart.
    pub(crate) member: u8,
    /// The clock of the day; without one it stands still.
    pub(crate) wall_ms: Option<fn() -> u64>,
}

impl Setup {
    /// Both drain modes, both durabilities, several log lengths.
    pub(crate) fn of(seed: u64) -> Self {
        let (grouped, strong, segments) = (seed % 2 == 1, seed % 4 < 3, 4 + seed % 3);
        let (reorder, block_bytes) = (true, 512);
        Self { seed, grouped, strong, segments, reorder, block_bytes, ..Self::default() }
    }

    /// Of the disk.
    pub(crate) fn uuid(&self) -> [u8; 16] {
        [UUID[0] + self.member; 16]
    }

    pub(crate) fn options(&self) -> CacheOptions {
        let drain = if self.grouped { DrainMode::Grouped } else { DrainMode::Ordered };
        let mut options = CacheOptions::new("vm/disk");
        (options.strong, options.drain) = (self.strong, drain);
        options.golden = self.golden;
        // A reactor's time begins at 0, and passes when the test says so.
        (options.now, options.wall_ms) = (|| Nanos(0), self.wall_ms.unwrap_or(|| 1_000_000));
        options
    }
}

/// Flash, backing, sidecar.
#[derive(Clone)]
pub(crate) struct World(pub(crate) [SimDisk; 3]);

impl World {
    pub(crate) fn new(setup: &Setup) -> Self {
        let shape = Shape::with(allocation_bytes(setup.segments), 64 * KIB).expect("a shape");
        let layout = Layout::new(GROUP_MAX);
        let most = if setup.allocation_bytes > 0 { SEGMENTS_MAX } else { setup.segments };
        let sizes = [allocation_bytes(most), DISK_BYTES, layout.sidecar_bytes()];
        let mut world = Self(sizes.map(SimDisk::new));
        let geometry = DiskGeometry { block_bytes: setup.block_bytes, ..sim_geometry(DISK_BYTES) };
        world.0[1] = SimDisk::with(Content::default(), geometry, 0);
        let options = FormatOptions {
            shape,
            log_uuid: [1; 16],
            disk_uuid: setup.uuid(),
            secret: setup.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5eed,
            mode: Mode::WriteBack,
            backing: identity(),
            overwrite: false,
        };
        format(&mut world.medium(), &options).expect("formatted");
        let stamp = first_stamp(setup);
        write_stamp(&mut world.blocking(2), &stamp).expect("stamped");
        world
    }

    /// Backing and sidecar alone.
    pub(crate) fn without_flash(disks: Vec<SimDisk>) -> Self {
        let [backing, sidecar] = disks.try_into().unwrap_or_else(|_| panic!("two disks"));
        Self([SimDisk::new(1 << 20), backing, sidecar])
    }

    pub(crate) fn medium(&self) -> Medium {
        self.medium_of(self.0[0].geometry().size_bytes)
    }

    /// Of the allocation that the setup has.
    fn medium_for(&self, setup: &Setup) -> Medium {
        match setup.allocation_bytes {
            0 => self.medium(),
            bytes => self.medium_of(bytes),
        }
    }

    fn medium_of(&self, bytes: u64) -> Medium {
        Medium::new(Box::new(self.0[0].clone()), Place::whole(bytes))
    }

    pub(crate) fn blocking(&self, disk: usize) -> Blocking {
        Blocking::new(Box::new(self.0[disk].clone()))
    }

    pub(crate) fn record(&self) {
        let [flash, backing, sidecar] = &self.0;
        SimDisk::record_together(&[flash, backing, sidecar]);
    }

    pub(crate) fn recordings(&self) -> [Recording; 3] {
        [0, 1, 2].map(|disk: usize| self.0[disk].recording())
    }

    pub(crate) fn position(&self) -> u64 {
        self.0[0].position()
    }

    pub(crate) fn set_faults(&self, faults: &Faults) {
        self.0.iter().for_each(|disk| disk.set_faults(faults.clone()));
    }

    /// What a killed daemon leaves.
    pub(crate) fn killed(&self, seed: u64) -> Self {
        Self([0, 1, 2].map(|disk: usize| {
            let disk = &self.0[disk];
            SimDisk::with(disk.content(), disk.geometry(), seed)
        }))
    }

    /// Finishes a group on the shared storage.
    pub(crate) fn recover(&self) -> vflash::base::Result<Standing> {
        let (mut backing, mut sidecar) = (self.blocking(1), self.blocking(2));
        let options = RecoverOptions::default();
        let recovery = recover(&mut backing, &mut sidecar, options, &mut |_| {})?;
        Ok(recovery.expect("there is a stamp").standing)
    }

    fn how(&self, setup: &Setup) -> OpenOptions {
        OpenOptions { golden: setup.golden, ..OpenOptions::new(identity(), 64 * MIB) }
    }

    /// A live group is left for the log to finish, in some worlds.
    fn take_up(&self, setup: &Setup) -> vflash::base::Result<Option<(Opened, Standing, Point)>> {
        let finished_first = setup.seed % 8 < 2;
        let options = RecoverOptions { damage: Damage::Skip, ..Default::default() };
        let standing = take_up(&mut self.blocking(2), options)?.expect("there is a stamp");
        let Some(live) = standing.live.filter(|_| !finished_first) else { return Ok(None) };
        let how = self.how(setup);
        let opened = open(&mut self.medium_for(setup), &how)?;
        let can = opened.can_finish(&live.span);
        Ok(can.then_some((opened, standing, live.span.point())))
    }

    /// Opens the disk as a daemon that starts does; also the next WON.
    pub(crate) fn open(&self, setup: &Setup) -> vflash::base::Result<(CachedDisk, u64)> {
        let (opened, standing, live) = match self.take_up(setup)? {
            Some((opened, standing, live)) => (opened, standing, Some(live)),
            None => {
                let standing = self.recover()?;
                let mut how = self.how(setup);
                how.drained_through = standing.point.won;
                (open(&mut self.medium_for(setup), &how)?, standing, None)
            }
        };
        let mut stamp = standing.stamp;
        if stamp.is_clean() {
            stamp = stamp.next(1);
            stamp.state = State::Dirty;
            write_stamp(&mut self.blocking(2), &stamp)?;
        }
        let layout = Layout::new(stamp.group_bytes_max);
        let last_group = standing.next_group - 1;
        let next_won = opened.root.next_won;
        let sidecar = SidecarState { layout, stamp, last_group, live };
        let geometry = self.0[1].geometry();
        Ok((CachedDisk::new(opened, setup.options(), geometry, Some(sidecar)), next_won))
    }
}

pub(crate) fn identity() -> BackingIdentity {
    BackingIdentity { size_bytes: DISK_BYTES, block_bytes: 512, kind: 1, fingerprint: [0; 16] }
}

fn first_stamp(setup: &Setup) -> Stamp {
    let (kind, fingerprint) = (Kind::File, [0; 2]);
    Stamp {
        disk: setup.uuid(),
        sequence: 1,
        owner: Owner { allocation: [1; 16], ..Owner::default() },
        owner_epoch: 1,
        first_epoch: 1,
        owned_ms: 1,
        stamped_ms: 1,
        identity: Identity { kind, size_bytes: DISK_BYTES, block_bytes: 512, fingerprint },
        state: State::Dirty,
        drain: if setup.grouped { DrainMode::Grouped } else { DrainMode::Ordered },
        point: Point::default(),
        dirty_bytes: 0,
        oldest_dirty_ms: 0,
        retired_group: 0,
        group_bytes_max: GROUP_MAX,
        committed_step: 0,
        roster: Default::default(),
    }
}

/// What was promised at a time.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moment {
    pub(crate) at: u64,
    /// Every crash from now on keeps this write and all before it.
    pub(crate) kept: u64,
    /// And without the flash this one.
    pub(crate) backed: u64,
    /// Writes that were submitted.
    pub(crate) submitted: u64,
    /// The drain position as the disk reports it.
    pub(crate) drained: u64,
    /// Of the allocation in its pool; 0: all of the flash.
    pub(crate) allocation_bytes: u64,
    /// Writes pass the log by: the backing alone is the disk.
    pub(crate) past_log: bool,
    /// Writes are answered when the backing has them.
    pub(crate) through: bool,
}

enum UnderWay {
    Write { won: u64 },
    Flush { covers: u64 },
    Read { start: u64, oldest: u64, length: usize },
}

/// A guest and its disk.
pub(crate) struct Rig {
    pub(crate) setup: Setup,
    pub(crate) world: World,
    pub(crate) reactor: SimReactor<CachedDisk>,
    pub(crate) status: Arc<CacheStatus>,
    send: Arc<dyn Fn(Box<dyn Any + Send>) + Send + Sync>,
    pub(crate) model: Arc<Model>,
    pub(crate) random: fastrand::Rng,
    under_way: BTreeMap<u32, (UnderWay, Option<PinnedBuffer>)>,
    pub(crate) moments: Vec<Moment>,
    now: Moment,
    /// Writes up to here have been acknowledged.
    acked: u64,
    /// Requests that ended otherwise than well.
    pub(crate) failed: u64,
    /// The shared storage is away; and what the disk has to show when it is back.
    away: Arc<AtomicBool>,
    pub(crate) alone: Option<Known>,
    modes: Modes,
    pub(crate) requests: u64,
}

impl Rig {
    /// A new disk, recorded from the beginning.
    pub(crate) fn new(setup: Setup) -> Self {
        let world = World::new(&setup);
        let (disk, _) = world.open(&setup).expect("opened");
        let rig = Self::on(setup, world, disk, Arc::new(Model::new(SECTORS)));
        rig.world.record();
        rig
    }

    pub(crate) fn on(setup: Setup, world: World, disk: CachedDisk, model: Arc<Model>) -> Self {
        world.set_faults(&Faults { reorder: setup.reorder, ..Default::default() });
        let status = disk.status();
        let (send, receiver) = inbox();
        let away = Arc::new(AtomicBool::new(false));
        let [flash, backing, sidecar] = world.0.clone();
        let mut disks: Vec<Box<dyn Disk + Send>> = vec![Box::new(flash)];
        disks.extend([backing, sidecar].map(|disk| Box::new(Port::new(disk, away.clone())) as _));
        let reactor = SimReactor::new(disk, disks, receiver, REQUESTS_MAX);
        let random = fastrand::Rng::with_seed(setup.seed);
        let kept = model.head();
        let allocation_bytes = setup.allocation_bytes;
        let now = Moment { kept, submitted: kept, allocation_bytes, ..Moment::default() };
        Self {
            setup,
            world,
            reactor,
            status,
            send,
            model,
            random,
            under_way: BTreeMap::new(),
            moments: vec![now],
            now,
            acked: kept,
            failed: 0,
            away,
            alone: None,
            modes: Modes::default(),
            requests: 0,
        }
    }

    fn note(&mut self) {
        self.now.at = self.world.position();
        self.now.submitted = self.model.head();
        self.moments.push(self.now);
    }

    /// A very large write has several numbers: see `won_sectors_max` in the journal.
    fn parts(&self, start: u64, count: u64) -> Vec<(u64, u64)> {
        let unit = (self.setup.segments - 2) * 64 * KIB / 4 / SECTOR_BYTES / 8 * 8;
        let starts = (0..count).step_by(unit as usize);
        starts.map(|done| (start + done, unit.min(count - done))).collect()
    }

    pub(crate) fn write(&mut self, start: u64, count: u64) {
        let parts = self.parts(start, count);
        let wons = self.model.head() + 1..;
        let data: Vec<u8> = wons
            .zip(&parts)
            .flat_map(|(won, (start, count))| model::data(won, *start, *count))
            .collect();
        let buffer = PinnedBuffer::new(data.len());
        buffer.segment().copy_from(&data);
        let range = SectorRange { start, count };
        let id = self.submit(RequestKind::Write, &[range], &[buffer.segment()]);
        let model = Arc::make_mut(&mut self.model);
        parts.iter().for_each(|(start, count)| _ = model.write(*start, *count));
        let won = model.head();
        self.under_way.insert(id, (UnderWay::Write { won }, Some(buffer)));
        self.note();
    }

    /// Writes bytes that are not the model's, at most 16 KiB, where nobody looks.
    pub(crate) fn write_foreign(&mut self, start: u64, data: &[u8]) {
        let buffer = PinnedBuffer::new(data.len());
        buffer.segment().copy_from(data);
        let range = SectorRange { start, count: data.len() as u64 / SECTOR_BYTES };
        let id = self.submit(RequestKind::Write, &[range], &[buffer.segment()]);
        let won = Arc::make_mut(&mut self.model).zero(&[]);
        self.under_way.insert(id, (UnderWay::Write { won }, Some(buffer)));
        self.note();
        self.finish();
    }

    pub(crate) fn zero(&mut self, kind: RequestKind, ranges: &[(u64, u64)]) {
        let sectors: Vec<SectorRange> = ranges
            .iter()
            .map(|(start, count)| SectorRange { start: *start, count: *count })
            .collect();
        let id = self.submit(kind, &sectors, &[]);
        let won = Arc::make_mut(&mut self.model).zero(ranges);
        self.under_way.insert(id, (UnderWay::Write { won }, None));
        self.note();
    }

    pub(crate) fn flush(&mut self) {
        let covers = self.acked_all();
        let id = self.submit(RequestKind::Flush, &[], &[]);
        self.under_way.insert(id, (UnderWay::Flush { covers }, None));
    }

    pub(crate) fn read(&mut self, start: u64, count: u64) {
        let length = (count * SECTOR_BYTES) as usize;
        let buffer = PinnedBuffer::new(length);
        let range = SectorRange { start, count };
        let oldest = self.acked;
        let id = self.submit(RequestKind::Read, &[range], &[buffer.segment()]);
        self.under_way.insert(id, (UnderWay::Read { start, oldest, length }, Some(buffer)));
    }

    /// Waits for a free place, then submits.
    fn submit(
        &mut self,
        kind: RequestKind,
        ranges: &[SectorRange],
        segments: &[vflash::io::buffer::Segment],
    ) -> u32 {
        self.requests += 1;
        loop {
            if let Some(id) = self.reactor.submit(kind, ranges, segments) {
                return id.0;
            }
            self.turn(true);
        }
    }

    pub(crate) fn turn(&mut self, wait: bool) {
        self.reactor.turn(wait);
        for (id, outcome) in self.reactor.ended() {
            self.ended(id.0, outcome);
        }
        self.now.drained = self.status.gauges().drained_won.max(self.now.drained);
        self.note();
    }

    fn ended(&mut self, id: u32, outcome: Outcome) {
        let (what, buffer) = self.under_way.remove(&id).expect("it was submitted");
        if outcome != Outcome::Done {
            self.failed += 1;
            self.modes.told += u64::from(matches!(what, UnderWay::Flush { .. }));
            return;
        }
        match what {
            UnderWay::Write { won } => {
                self.acked = self.acked.max(won);
                self.now.backed = if self.is_backed() { self.acked } else { self.now.backed };
                if self.is_strong() {
                    self.now.kept = self.now.kept.max(won);
                }
            }
            UnderWay::Flush { covers } => {
                if self.modes.told == 0 {
                    self.now.kept = self.now.kept.max(covers);
                }
                Arc::make_mut(&mut self.model).flush();
            }
            UnderWay::Read { start, oldest, length } => {
                let mut bytes = vec![0; length];
                buffer.expect("a read has one").segment().copy_to(&mut bytes);
                let range = (oldest.min(self.acked), self.model.head());
                if let Err(difference) = self.model.check_read(start, &bytes, range) {
                    panic!("seed {}: a read is wrong: {difference}", self.setup.seed);
                }
            }
        }
    }

    /// Waits until every request has ended.
    pub(crate) fn finish(&mut self) {
        let mut idle = 0;
        while !self.under_way.is_empty() {
            self.turn(true);
            idle += 1;
            assert!(
                idle < 1_000_000,
                "seed {}: requests hang: {:?}",
                self.setup.seed,
                self.state()
            );
        }
    }

    pub(crate) fn under_way(&self) -> usize {
        self.under_way.len()
    }

    pub(crate) fn tell(&self, message: CacheMessage) {
        (self.send)(Box::new(message));
    }

    /// Sends a message and turns until it is answered.
    pub(crate) fn ask<T: Send + 'static>(
        &mut self,
        message: impl FnOnce(Reply<T>) -> CacheMessage,
    ) -> T {
        let answer = Arc::new(Mutex::new(None));
        let slot = answer.clone();
        self.tell(message(Box::new(move |value| {
            *slot.lock().expect("one thread") = Some(value);
        })));
        for _ in 0..1_000_000 {
            self.turn(false);
            if let Some(answer) = answer.lock().expect("one thread").take() {
                return answer;
            }
            self.turn(true);
        }
        let state = self.state();
        panic!("seed {}: no answer: {state:?}", self.setup.seed);
    }

    pub(crate) fn close(&mut self) {
        self.finish();
        self.ask(|reply| CacheMessage::Close { reply }).expect("closed");
        self.now.drained = self.now.drained.max(self.model.head());
        self.note();
    }

    pub(crate) fn state(&self) -> CacheState {
        self.status.gauges().state
    }

    /// The newest write that the disk has, as it says itself.
    pub(crate) fn head(&mut self) -> u64 {
        self.ask(|reply| CacheMessage::Status { reply });
        self.status.gauges().head_won
    }

    /// Reads every sector that was ever changed, through the disk, and compares with `point`.
    pub(crate) fn check_guest(&mut self, point: u64) -> Result<(), String> {
        let model = self.model.clone();
        let reactor = &mut self.reactor;
        let mut failed = None;
        let found = model.check_point(point, &mut |start, bytes: &mut [u8]| {
            for (index, part) in bytes.chunks_mut(64 << 10).enumerate() {
                let at = start + index as u64 * 128;
                if reactor.read(at, part) != Outcome::Done {
                    failed = Some(at);
                }
            }
        });
        match (failed, found) {
            (Some(at), _) => Err(format!("reading from sector {at} failed")),
            (None, Err(difference)) => Err(difference.to_string()),
            (None, Ok(())) => Ok(()),
        }
    }

    /// The moment at a crash point.
    pub(crate) fn moment(&self, point: u64) -> Moment {
        let later = self.moments.partition_point(|moment| moment.at <= point);
        self.moments[later.saturating_sub(1)]
    }

    /// A random request, mostly small ones in a small area; now and then time passes.
    pub(crate) fn step(&mut self) {
        if self.random.u8(0..8) == 0 {
            let by = Duration::from_millis(self.random.u64(1..800));
            self.pass_time(by);
        }
        let count = match self.random.u32(0..16) {
            0 => self.random.u64(60..160),
            1..6 => 8,
            _ => self.random.u64(1..12),
        };
        let area = if self.random.bool() { 160 } else { SECTORS - 160 };
        let start = self.random.u64(0..area);
        match self.random.u32(0..24) {
            0 => self.zero(RequestKind::Discard, &[(start, count), (start + 300, 3)].map(clip)),
            1 => self.zero(RequestKind::WriteZeroes { unmap: false }, &[(start, count)]),
            2 | 3 if self.setup.grouped => self.flush(),
            2 | 3 => {
                // Nothing else is under way, so that every write has one epoch.
                self.finish();
                self.flush();
                self.finish();
            }
            4..7 => self.read(start, count),
            _ => self.write(start, count),
        }
        if self.random.u8(0..4) == 0 {
            self.turn(false);
        }
    }

    /// A small write, or now and then zeros or a FLUSH: nothing that needs the backing.
    pub(crate) fn write_somewhere(&mut self) {
        let (start, count) = (self.random.u64(0..400), self.random.u64(1..12));
        match self.random.u32(0..12) {
            0 => self.zero(RequestKind::Discard, &[(start, count)]),
            1 => {
                self.finish();
                self.flush();
                self.finish();
            }
            _ => self.write(start, count),
        }
    }

    /// Ends the host at a random instant and goes on from one of the states that it may leave: a
    /// new daemon, the next generation.
    pub(crate) fn next_generation(self) -> Self {
        self.next(false)
    }

    /// As [`Self::next_generation`]; `alone`: while the shared storage is away.
    pub(crate) fn next(mut self, alone: bool) -> Self {
        let point = self.random.u64(0..=self.world.position());
        let index = self.random.u64(0..64);
        let recordings = self.world.recordings();
        let explorer = Explorer::new(self.random.u64(..));
        let losses = LOSSES[self.random.usize(0..2)];
        let disks = explorer.cut_together(&recordings, &losses, (point, index));
        let world = World(disks.try_into().unwrap_or_else(|_| panic!("three disks")));
        let moment = self.moment(point);
        let seed = self.setup.seed;
        let announce = format!("seed {seed}, point {point}, index {index}");
        let seen = scan(&mut world.medium(), 256).expect("a log").next_won;
        let setup = self.setup.at(moment);
        let (disk, next_won, known) = match alone {
            true => world.open_alone(&setup).map(|(disk, next, known)| (disk, next, Some(known))),
            false => world.open(&setup).map(|(disk, next)| (disk, next, None)),
        }
        .expect("it opens");
        assert!(next_won >= seen, "{announce}: number {next_won} is given again, below {seen}");
        let mut rig = Self::on(setup, world, disk, self.model.clone());
        rig.alone = known;
        if alone {
            rig.put_away();
        }
        let head = rig.head();
        let Moment { kept, submitted, .. } = moment;
        assert!((kept..=submitted).contains(&head), "{announce}: {head} not in {moment:?}");
        if !alone && let Err(text) = rig.check_guest(head) {
            rig.head();
            panic!("{announce}: {text}; {:?}", rig.state());
        }
        Arc::make_mut(&mut rig.model).cut(head, next_won);
        while rig.reactor.operations() > 0 {
            rig.turn(true);
        }
        (rig.acked, rig.now.kept, rig.random) = (head, head, self.random);
        rig.world.record();
        rig.now.at = 0;
        rig.moments = vec![rig.now];
        rig
    }

    /// Judges what a killed daemon left: everything that completed is there.
    pub(crate) fn judge_killed(&self, world: &World, kept: u64) {
        let submitted = self.model.head();
        self.judge_once(Moment { at: 0, kept, submitted, ..Moment::default() }, world);
        self.judge_once(Moment { kept, submitted, ..Moment::default() }, world);
    }

    /// Judges one state that the end of the host may leave: opens it and looks. `depth`: at so
    /// many levels also every end of the opening itself. Returns the states visited.
    pub(crate) fn judge(&self, case: CrashCase, world: &World, depth: u32) -> u64 {
        let moment = self.moment(case.point);
        if depth > 0 {
            world.record();
        }
        let mut after = self.judge_once(moment, world);
        let mut states = 1;
        if depth > 0 {
            let recordings = world.recordings();
            let explorer = Explorer {
                only: None,
                samples: 1,
                exhaustive_max: 0,
                points_max: 4,
                ..Explorer::new(case.seed ^ case.point)
            };
            explorer.explore_together(&recordings, &LOSSES[0], |inner, disks| {
                let world = World(disks.try_into().unwrap_or_else(|_| panic!("three disks")));
                // The moment is that of the outer end.
                let inner = CrashCase { point: case.point, index: inner.index * 8, ..inner };
                states += self.judge(inner, &world, depth - 1);
            });
        }
        if case.index % 8 == 1 {
            after.drain_and_check();
        }
        states
    }

    fn judge_once(&self, moment: Moment, world: &World) -> Rig {
        let setup = Setup { reorder: false, ..self.setup.at(moment) };
        let opened = world.open(&setup);
        let (disk, _) = opened.unwrap_or_else(|error| panic!("it does not open: {error}"));
        let mut rig = Rig::on(setup, world.clone(), disk, self.model.clone());
        let state = rig.state();
        let head = rig.head();
        assert!(!matches!(state, CacheState::Fenced(_)), "a clean end is no corruption: {state:?}");
        let Moment { kept, submitted, .. } = moment;
        assert!(head >= kept, "writes {}..={kept} are lost", head + 1);
        assert!(head <= submitted, "write {head} was never submitted, {submitted} was the last");
        if let Err(what) = rig.check_guest(head) {
            panic!("the guest's disk is not at point {head}: {what}");
        }
        rig
    }

    /// As [`Self::judge`], where writes went past the log, which gives them no numbers: every
    /// sector is at a version that it may have. Past the log the backing alone is such a disk.
    pub(crate) fn judge_versions(&self, case: CrashCase, world: &World) -> u64 {
        let moment = self.moment(case.point);
        let Moment { kept, past_log, .. } = moment;
        let submitted = self.submitted_by(case.point);
        let mut bytes = vec![0; DISK_BYTES as usize];
        if past_log {
            world.reader()(0, &mut bytes);
            if let Err(difference) = self.model.check_read(0, &bytes, (kept, submitted)) {
                panic!("the backing alone, {moment:?}: {difference}");
            }
        }
        let setup = Setup { reorder: false, ..self.setup };
        let opened = world.open(&setup);
        let (disk, _) = opened.unwrap_or_else(|error| panic!("it does not open: {error}"));
        let mut after = Rig::on(setup, world.clone(), disk, self.model.clone());
        let state = after.state();
        assert!(!matches!(state, CacheState::Fenced(_)), "a clean end is no damage: {state:?}");
        assert_eq!(after.reactor.read(0, &mut bytes), Outcome::Done);
        if let Err(difference) = self.model.check_read(0, &bytes, (kept, submitted)) {
            panic!("the guest's disk, {moment:?}: {difference}");
        }
        let reached = after.ask(|reply| CacheMessage::Drain { to: None, hold: false, reply });
        reached.expect("drained");
        let mut drained = vec![0; bytes.len()];
        after.world.reader()(0, &mut drained);
        assert!(bytes == drained, "the backing is the disk after a drain");
        1
    }

    /// Drains all; the backing is then the disk.
    fn drain_and_check(&mut self) {
        let head = self.head();
        let reached = self.ask(|reply| CacheMessage::Drain { to: None, hold: false, reply });
        assert_eq!(reached, Ok(head), "all is drained");
        self.check_backing(head);
    }

    pub(crate) fn check_backing(&self, point: u64) {
        if let Err(difference) = self.model.check_point(point, &mut self.world.reader()) {
            panic!("the backing is not at point {point}: {difference}");
        }
    }

    /// As [`Self::judge_without_flash`], and again after every end of that recovery itself.
    pub(crate) fn judge_recovery(&self, case: CrashCase, world: &World) -> u64 {
        world.record();
        self.judge_without_flash(case, world);
        let recordings = world.recordings();
        let explorer = Explorer {
            only: None,
            samples: 2,
            exhaustive_max: 1,
            points_max: 8,
            ..Explorer::new(case.seed ^ case.point)
        };
        let losses = [Loss::Unflushed; 2];
        1 + explorer.explore_together(&recordings[1..], &losses, |_, disks| {
            self.judge_without_flash(case, &World::without_flash(disks));
        })
    }

    /// Judges a state in which the flash is gone: what the shared storage gives by itself.
    pub(crate) fn judge_without_flash(&self, case: CrashCase, world: &World) {
        let standing = world.recover().unwrap_or_else(|error| panic!("no recovery: {error}"));
        let reported = self.moment(case.point).drained;
        let point = standing.point.won;
        if self.setup.grouped && !standing.part {
            assert!(point >= reported, "point {point} is older than {reported}, as reported");
            if let Err(difference) = self.model.check_point(point, &mut world.reader()) {
                panic!("backing and sidecar are not at point {point}: {difference}");
            }
            return;
        }
        let least = reported.max(point);
        let legal = |drained| self.model.check_epoch(drained, &mut world.reader()).is_ok();
        assert!((least..=self.model.head()).any(legal), "no epochs from {least} on");
    }
}
