//! The drainer over simulated disks and a log made by hand, judged by the model.

use super::*;
use crate::backing::identity::{Identity, Kind as BackingKind};
use crate::backing::recover::{RecoverOptions, inspect, recover};
use crate::backing::sidecar::write_stamp;
use crate::backing::stamp::{Owner, Point, State as StampState};
use crate::base::units::SECTOR_BYTES;
use crate::cache::model::{self, Model};
use crate::cache::record::piece_checksum;
use crate::cache::record::{BatchEncoder, BatchLink, EntryHead, Kind, Plan, RecordOrigin};
use crate::io::blocking::Blocking;
use crate::io::crash::{CrashCase, Explorer, Loss};
use crate::io::disk::{Completion, Disk};
use crate::io::sim::{Failure, Faults, SimDisk};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::Mutex;

const SECTORS: u64 = 4096;
const SEGMENT_BYTES: u64 = 64 << 10;
const HEADER_BYTES: u64 = 4096;
const GROUP_MAX: u64 = 1 << 20;

/// The owner of a drainer: a log in segments of one simulated disk, roots in memory.
struct Host {
    /// Flash, backing, sidecar.
    disks: Vec<SimDisk>,
    under_way: [usize; 3],
    /// Committed bytes of each segment; segment 1 is the first.
    segments: Vec<u64>,
    sequence: u64,
    now: Nanos,
    wake: Option<Nanos>,
    roots: VecDeque<(u32, u64)>,
    roots_fail: u32,
}

fn salt(segment: u64) -> u64 {
    segment.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl DrainHost for Host {
    fn now(&self) -> Nanos {
        self.now
    }

    fn wall_ms(&self) -> u64 {
        1_700_000_000_000 + self.now.0 / 1_000_000
    }

    fn seek(&self, _won: u64) -> LogCursor {
        LogCursor { segment: 1, offset: HEADER_BYTES }
    }

    fn log(&self, cursor: LogCursor) -> LogStretch {
        let end = self.segments[cursor.segment as usize - 1];
        if cursor.offset < end {
            let offset = cursor.segment * SEGMENT_BYTES + cursor.offset;
            let (length, salt) = (end - cursor.offset, salt(cursor.segment));
            return LogStretch::Batches { offset, length, salt };
        }
        match self.segments.len() as u64 > cursor.segment {
            true => {
                LogStretch::Next(LogCursor { segment: cursor.segment + 1, offset: HEADER_BYTES })
            }
            false => LogStretch::End,
        }
    }

    fn place(&self, offset: u64, length: u64) -> (u64, u64) {
        // The device has it in pieces of 20 KiB, as an allocation may lie.
        (offset, length.min(20_480 - offset % 20_480))
    }

    fn submit(&mut self, disk: DiskIndex, operation: Operation<'_>, token: u32) {
        assert!(token < DRAIN_TOKENS);
        self.under_way[usize::from(disk.0)] += 1;
        self.disks[usize::from(disk.0)].submit(operation, token.into());
    }

    fn write_root(&mut self, won: u64, _epoch: u64, token: u32) {
        self.roots.push_back((token, won));
    }

    fn wake_at(&mut self, at: Nanos) {
        self.wake = Some(self.wake.map_or(at, |wake| wake.min(at)));
    }
}

struct Rig {
    host: Host,
    drainer: Drainer,
    model: Model,
    random: fastrand::Rng,
    /// A FLUSH lies before the next record.
    edge: bool,
    epoch: u64,
    /// Event time and the drain position from then on.
    reported: Vec<(u64, u64)>,
}

fn stamp_of(mode: DrainMode, geometry: DiskGeometry) -> Stamp {
    Stamp {
        disk: [3; 16],
        sequence: 1,
        owner: Owner { allocation: [9; 16], ..Owner::default() },
        owner_epoch: 1,
        first_epoch: 1,
        owned_ms: 1,
        stamped_ms: 1,
        identity: Identity {
            kind: BackingKind::File,
            size_bytes: SECTORS * SECTOR_BYTES,
            block_bytes: geometry.block_bytes,
            fingerprint: [0; 2],
        },
        state: StampState::Dirty,
        drain: mode,
        point: Point::default(),
        dirty_bytes: 0,
        oldest_dirty_ms: 0,
        retired_group: 0,
        group_bytes_max: GROUP_MAX,
        committed_step: 0,
        roster: Default::default(),
    }
}

impl Rig {
    fn new(seed: u64, mode: DrainMode, geometry: impl Fn(&mut DiskGeometry)) -> Self {
        let layout = Layout::new(GROUP_MAX);
        let mut shape = crate::io::sim::sim_geometry(SECTORS * SECTOR_BYTES);
        geometry(&mut shape);
        let backing = SimDisk::with(Default::default(), shape, seed);
        let disks = vec![SimDisk::new(64 << 20), backing, SimDisk::new(layout.sidecar_bytes())];
        let stamp = stamp_of(mode, shape);
        write_stamp(&mut Blocking::new(Box::new(disks[2].clone())), &stamp).expect("stamped");
        let options = DrainOptions {
            mode,
            staleness_max: Duration::from_secs(10),
            backing: shape,
            sidecar: Some(SidecarState { layout, stamp, last_group: 0, live: None }),
            drained: 0,
            drained_epoch: 0,
            head: 0,
            away: false,
            dirty_bytes: 0,
            memory: DrainMemory::of_daemon(),
        };
        let host = Host {
            disks,
            under_way: [0; 3],
            segments: vec![HEADER_BYTES],
            sequence: 1,
            now: Nanos(0),
            wake: None,
            roots: VecDeque::new(),
            roots_fail: 0,
        };
        let drainer = Drainer::new(options, Nanos(0));
        let random = fastrand::Rng::with_seed(seed);
        let model = Model::new(SECTORS);
        Self { host, drainer, model, random, edge: false, epoch: 0, reported: vec![(0, 0)] }
    }

    /// Records the backing and the sidecar from now on.
    fn record(&self) {
        SimDisk::record_together(&[&self.host.disks[1], &self.host.disks[2]]);
    }

    /// Appends one batch with one record to the log.
    fn append(&mut self, kind: Kind, continued: bool, (start, count): (u64, u64), data: &[u8]) {
        let plan = match kind {
            Kind::Write => Plan::default().write(start, count),
            _ => Plan::default().range(),
        };
        let length = u64::from(plan.batch_bytes(4096));
        if self.host.segments.last().expect("one") + length > SEGMENT_BYTES {
            self.host.segments.push(HEADER_BYTES);
        }
        let segment = self.host.segments.len() as u64;
        let end = self.host.segments.last_mut().expect("one");
        let offset = segment * SEGMENT_BYTES + *end;
        *end += length;
        let edge = std::mem::take(&mut self.edge);
        self.epoch += u64::from(edge);
        let mut encoder = BatchEncoder::default();
        encoder.begin(plan, 4096, (self.model.head(), self.epoch));
        let origin = RecordOrigin::default();
        encoder.entry(EntryHead { kind, edge, continued, origin, start, count });
        let mut at = start;
        let mut rest = data;
        while !rest.is_empty() {
            let sectors = (8 - at % 8).min(rest.len() as u64 / SECTOR_BYTES);
            let (piece, next) = rest.split_at((sectors * SECTOR_BYTES) as usize);
            encoder.checksum(piece_checksum(piece));
            (at, rest) = (at + sectors, next);
        }
        let link = BatchLink {
            salt: salt(segment),
            incarnation: 1,
            sequence: self.host.sequence,
            ..BatchLink::default()
        };
        self.host.sequence += 1;
        let (header, _) = encoder.seal(link);
        self.host.disks[0].poke(offset, header);
        self.host.disks[0].poke(offset + u64::from(plan.data_start(4096)), data);
        if !continued {
            let head = self.model.head();
            self.drainer.committed(head, length, &mut self.host);
        }
    }

    fn write(&mut self, start: u64, count: u64) {
        let won = self.model.write(start, count);
        // A large request is split into records of one request.
        let mut at = start;
        while at < start + count {
            let part = (start + count - at).min(64);
            let data = model::data(won, at, part);
            self.append(Kind::Write, at + part < start + count, (at, part), &data);
            at += part;
        }
    }

    fn flush(&mut self) {
        self.model.flush();
        self.edge = true;
        self.drainer.points_mut().edge(self.model.head(), self.epoch + 1);
    }

    /// One random request of a guest.
    fn step(&mut self) {
        let start = self.random.u64(0..200);
        let block = u64::from(self.host.disks[1].geometry().optimal_bytes);
        assert_eq!(block, 4096);
        match self.random.u32(0..20) {
            0..14 => {
                let count = self.random.u64(1..=16);
                self.write(start, count);
            }
            14 => self.write(start, 150),
            15..18 => {
                let count = self.random.u64(1..=40);
                self.model.zero(&[(start, count)]);
                let kind = if self.random.bool() { Kind::Discard } else { Kind::Zeroes };
                self.append(kind, false, (start, count), &[]);
            }
            _ => self.flush(),
        }
    }

    /// One turn of a reactor; whether anything happened.
    fn turn(&mut self) -> bool {
        let mut completions = Vec::new();
        let mut moved = false;
        for disk in 0..3 {
            self.host.disks[disk].poll(&mut completions, false);
            self.host.under_way[disk] -= completions.len();
            for Completion { token, result } in completions.drain(..) {
                moved = true;
                self.drainer.completed(token as u32, result, &mut self.host);
            }
        }
        if let Some((token, _)) = self.host.roots.pop_front() {
            moved = true;
            let failed = self.host.roots_fail > 0;
            self.host.roots_fail = self.host.roots_fail.saturating_sub(1);
            let result = if failed { Err(Errno::EIO) } else { Ok(()) };
            self.drainer.completed(token, result, &mut self.host);
        }
        if self.host.wake.is_some_and(|wake| wake <= self.host.now) {
            moved = true;
            self.host.wake = None;
            self.drainer.timer(&mut self.host);
        }
        if self.reported.last().expect("one").1 != self.drainer.drained() {
            self.reported.push((self.host.disks[1].position(), self.drainer.drained()));
        }
        moved
    }

    /// Turns until nothing moves but time.
    fn settle(&mut self) {
        while self.turn() || self.host.under_way.iter().sum::<usize>() > 0 {}
    }

    /// Lets time pass to the next timer.
    fn wait(&mut self) -> bool {
        let Some(wake) = self.host.wake.take() else { return false };
        self.host.now = Nanos(self.host.now.0.max(wake.0));
        self.drainer.timer(&mut self.host);
        self.settle();
        true
    }

    /// Drains up to `to` or all, whatever it takes; the answer.
    fn drain(&mut self, to: Option<u64>, hold: bool) -> Result<u64, DrainError> {
        let answer = Arc::new(Mutex::new(None));
        let told = answer.clone();
        let reply = Box::new(move |result| *told.lock().expect("unpoisoned") = Some(result));
        self.drainer.drain(to, hold, reply, &mut self.host);
        self.until(|| answer.lock().expect("unpoisoned").take())
    }

    fn retire(&mut self, clean: bool) -> Result<u64, DrainError> {
        let answer = Arc::new(Mutex::new(None));
        let told = answer.clone();
        let reply = Box::new(move |result| *told.lock().expect("unpoisoned") = Some(result));
        self.drainer.retire(clean, reply, &mut self.host);
        self.until(|| answer.lock().expect("unpoisoned").take())
    }

    fn until<T>(&mut self, mut answer: impl FnMut() -> Option<T>) -> T {
        for _ in 0..100_000 {
            if let Some(answer) = answer() {
                return answer;
            }
            if !self.turn() {
                self.wait();
            }
        }
        panic!("no answer: {:?}", self.drainer.status(self.host.now));
    }

    /// Another process goes on where this drainer is; the group that it finds in the sidecar.
    fn restart(&mut self, mode: DrainMode) -> Option<(u64, u64)> {
        assert_eq!(self.host.under_way, [0; 3], "nothing is under way");
        let mut sidecar = Blocking::new(Box::new(self.host.disks[2].clone()));
        let standing =
            inspect(&mut sidecar, RecoverOptions::default()).expect("read").expect("a stamp");
        let live = standing.live.map(|live| live.span);
        let sidecar = SidecarState {
            layout: Layout::new(GROUP_MAX),
            stamp: standing.stamp,
            last_group: standing.next_group - 1,
            live: live.map(|span| span.point()),
        };
        let options = DrainOptions {
            mode,
            sidecar: Some(sidecar),
            drained: self.drainer.drained(),
            drained_epoch: self.drainer.drained_epoch(),
            head: self.model.head(),
            away: false,
            dirty_bytes: 1 << 20,
            ..self.drainer.options.clone()
        };
        self.drainer = Drainer::new(options, self.host.now);
        live.map(|span| (span.from, span.to))
    }

    fn check_backing(&self, point: u64) {
        check(&self.model, point, &self.host.disks[1]);
    }

    fn faults(&self, disk: usize, after: u64, forever: bool, errno: Errno) {
        let fail = Some(Failure { after, forever, errno, torn: true });
        self.host.disks[disk].set_faults(Faults { fail, ..Default::default() });
    }
}

fn reader(disk: &SimDisk) -> impl FnMut(u64, &mut [u8]) + '_ {
    |start, bytes: &mut [u8]| {
        bytes.copy_from_slice(&disk.peek(start * SECTOR_BYTES, bytes.len()));
    }
}

fn check(model: &Model, point: u64, disk: &SimDisk) {
    if let Err(difference) = model.check_point(point, &mut reader(disk)) {
        panic!("the backing is not at point {point}: {difference}");
    }
}

const MODES: [DrainMode; 2] = [DrainMode::Ordered, DrainMode::Grouped];

#[test]
fn everything_that_was_committed_comes_to_the_backing() {
    for seed in 0..12 {
        let mode = MODES[seed as usize % 2];
        let geometry = move |shape: &mut DiskGeometry| {
            shape.zero = seed % 3 != 0;
            shape.discard = seed % 4 != 0;
            shape.block_bytes = if seed >= 8 { 4096 } else { 512 };
        };
        let mut rig = Rig::new(seed, mode, geometry);
        let reorder = Faults { reorder: true, ..Default::default() };
        rig.host.disks.iter().for_each(|disk| disk.set_faults(reorder.clone()));
        for _ in 0..30 {
            (0..10).for_each(|_| rig.step());
            rig.settle();
            rig.wait();
        }
        let head = rig.model.head();
        assert_eq!(rig.drain(None, false), Ok(head));
        rig.check_backing(head);
        let status = rig.drainer.status(rig.host.now);
        assert_eq!((status.state, status.dirty_bytes), (DrainState::Idle, 0));
        assert!(status.groups > 10 && status.rate > 0, "{status:?}");
        assert_eq!(rig.retire(true), Ok(head));
    }
}

#[test]
fn the_backing_is_exactly_at_each_point_that_was_asked_for() {
    for seed in 0..10 {
        let mut rig = Rig::new(seed, MODES[seed as usize % 2], |_| {});
        (0..120).for_each(|_| rig.step());
        let head = rig.model.head();
        let mut at = rig.drainer.drained();
        while at < head {
            at = (at + rig.random.u64(1..12)).min(head);
            assert_eq!(rig.drain(Some(at), true), Ok(at));
            rig.settle();
            rig.wait();
            rig.check_backing(at);
            assert_eq!(rig.drainer.drained(), at, "it stays there");
        }
        let passed = rig.drain(Some(0), false);
        assert!(matches!(passed, Err(DrainError::Refused(_))), "{passed:?}");
    }
}

/// The sidecar and the backing fail in every way, at every operation, once or for a while.
#[test]
fn whatever_fails_is_written_again() {
    let mut retries = 0;
    for seed in 0..60 {
        let mut rig = Rig::new(seed, MODES[seed as usize % 2], |_| {});
        (0..80).for_each(|_| rig.step());
        let disk = if seed % 3 == 0 { 2 } else { 1 };
        let kind = [Errno::EIO, Errno(libc::ENOSPC), Errno(libc::ETIMEDOUT)][seed as usize % 3];
        rig.faults(disk, rig.random.clone().u64(0..30), seed % 5 == 0, kind);
        rig.host.roots_fail = (seed % 4) as u32;
        for _ in 0..6 {
            rig.wait();
        }
        rig.host.disks.iter().for_each(|disk| disk.set_faults(Faults::default()));
        let head = rig.model.head();
        assert_eq!(rig.drain(None, false), Ok(head));
        rig.check_backing(head);
        let status = rig.drainer.status(rig.host.now);
        retries += status.retries;
        assert_eq!(status.state, DrainState::Idle, "the trouble is over");
    }
    assert!(retries > 30, "{retries} retries");
}

/// The flash is thrown away at every write of a drain: what the backing and its sidecar give is
/// one point (ordered: epochs and part of one), at least as new as the last one reported.
#[test]
fn flash_lost_at_any_write_of_a_drain_leaves_a_point() {
    let mut states = 0;
    for seed in 0..16 {
        let mode = MODES[seed as usize % 2];
        let mut rig = Rig::new(seed, mode, |_| {});
        let reorder = Faults { reorder: true, ..Default::default() };
        rig.host.disks.iter().for_each(|disk| disk.set_faults(reorder.clone()));
        rig.record();
        for _ in 0..6 {
            (0..6).for_each(|_| rig.step());
            rig.settle();
            rig.wait();
        }
        rig.drain(None, false).expect("drained");
        let recordings = [1, 2].map(|disk: usize| rig.host.disks[disk].recording());
        for losses in [[Loss::Unflushed; 2], [Loss::UnderWay; 2]] {
            let explorer = Explorer { samples: 8, exhaustive_max: 2, ..Explorer::new(seed) };
            states += explorer.explore_together(&recordings, &losses, |case, disks| {
                judge_lost_flash(&rig, mode, case, &disks);
            });
        }
    }
    println!("flash lost: {states} states, 0 failures");
    let alone = std::env::var_os("VFLASH_CRASH_CASE").is_some();
    assert!(alone || states > 5_000, "{states} states are too few");
}

fn judge_lost_flash(rig: &Rig, mode: DrainMode, case: CrashCase, disks: &[SimDisk]) {
    let mut blocking = [0, 1].map(|disk: usize| Blocking::new(Box::new(disks[disk].clone())));
    let [backing, sidecar] = &mut blocking;
    let recovery = recover(backing, sidecar, RecoverOptions::default(), &mut |_| {});
    let standing = recovery.expect("recovered").expect("a stamp").standing;
    let reported = rig.reported.iter().rfind(|(at, _)| *at <= case.point).expect("one").1;
    let point = standing.point.won;
    if mode == DrainMode::Grouped {
        assert!(point >= reported, "point {point} is older than {reported}, as reported");
        return check(&rig.model, point, &disks[0]);
    }
    // The stamp is behind; what counts is what was reported. It may be further.
    let legal = |drained| rig.model.check_epoch(drained, &mut reader(&disks[0])).is_ok();
    let least = reported.max(point);
    assert!((least..=rig.model.head()).any(legal), "no epochs from {least} on: {case}");
}

/// Killed within a group, in every state of it: the next process finishes it from the log, without
/// another group and without passing its end.
#[test]
fn a_group_that_was_cut_is_finished_from_the_log() {
    let mut finished = 0;
    for seed in 0..40 {
        let mut rig = Rig::new(seed, DrainMode::Grouped, |_| {});
        (0..60).for_each(|_| rig.step());
        rig.settle();
        rig.faults(1, seed / 2, true, Errno::EIO);
        (0..3).for_each(|_| _ = rig.wait());
        rig.host.disks[1].set_faults(Faults::default());
        let live = rig.restart(MODES[seed as usize % 2]);
        if let Some((from, to)) = live.filter(|(_, to)| *to > rig.drainer.drained()) {
            finished += 1;
            assert_eq!(from, rig.drainer.drained());
            let inside = rig.drainer.reach(to - 1).err().map(|refusal| refusal.reason);
            let reason = Some(crate::cache::order::Reason::InsideGroup);
            assert!(inside == reason || to - 1 == from, "{inside:?}");
            let headers = rig.host.disks[2].peek(0, 128 << 10);
            assert_eq!(rig.drain(Some(to), true), Ok(to));
            rig.check_backing(to);
            let same = rig.host.disks[2].peek(0, 128 << 10) == headers;
            assert!(same || seed % 2 == 0, "no group was written again");
        }
        rig.drainer.let_go(&mut rig.host);
        let head = rig.model.head();
        assert_eq!(rig.drain(None, false), Ok(head));
        rig.check_backing(head);
        assert_eq!(rig.retire(true), Ok(head));
    }
    assert!(finished > 10, "{finished} groups were cut");
}

#[test]
fn damage_in_the_log_stops_the_drain_before_it() {
    for seed in 0..8 {
        let mut rig = Rig::new(seed, MODES[seed as usize % 2], |_| {});
        (0..30).for_each(|_| rig.step());
        // A byte of data rots; then all of it is drained, or tried.
        let victim = rig.model.write(300, 8);
        let data = model::data(victim, 300, 8);
        let before = (rig.host.segments.len() as u64, *rig.host.segments.last().expect("one"));
        rig.append(Kind::Write, false, (300, 8), &data);
        let segment = rig.host.segments.len() as u64;
        let batch = if segment == before.0 { before.1 } else { HEADER_BYTES };
        let at = segment * SEGMENT_BYTES + batch + if seed % 4 < 2 { 4096 + 700 } else { 20 };
        rig.host.disks[0].poke(at, &[0xEE; 3]);
        (0..10).for_each(|_| rig.step());
        rig.settle();
        let last_good = victim - 1;
        let found = rig.drain(None, false);
        assert_eq!(found, Err(DrainError::Corrupt { last_good }), "seed {seed}");
        // Ordered: the epochs before it; of its own group nothing.
        let drained = rig.drainer.drained();
        assert!(drained < victim && (seed % 2 == 0 || drained == 0), "{drained}");
        rig.check_backing(drained);
        let status = rig.drainer.status(rig.host.now);
        assert_eq!(status.state, DrainState::Corrupt { last_good });
        assert_eq!(rig.drain(Some(last_good), false), Ok(last_good));
        rig.check_backing(last_good);
        let beyond = rig.drain(Some(victim), false);
        assert_eq!(beyond, Err(DrainError::Corrupt { last_good }));
    }
}

#[test]
fn a_read_of_the_log_that_fails_once_is_done_again() {
    let mut rig = Rig::new(1, DrainMode::Grouped, |_| {});
    (0..40).for_each(|_| rig.step());
    rig.faults(0, 1, false, Errno::EIO);
    let head = rig.model.head();
    assert_eq!(rig.drain(None, false), Ok(head));
    rig.check_backing(head);
    assert!(rig.drainer.status(rig.host.now).retries > 0);
}

#[test]
fn a_request_larger_than_a_group_is_drained_in_parts_and_is_no_point_before_its_end() {
    for mode in MODES {
        let mut rig = Rig::new(1, mode, |_| {});
        rig.write(0, 8);
        rig.write(8, 3900);
        rig.flush();
        rig.write(4, 8);
        assert_eq!(rig.drain(None, false), Ok(3));
        rig.check_backing(3);
        let groups = rig.drainer.status(rig.host.now).groups;
        assert!(groups >= 1, "{groups}");
    }
}

/// Blocks that are written in part take most of the room, which a request is begun without.
#[test]
fn a_request_that_has_room_in_a_group_is_never_in_the_backing_in_part() {
    for seed in 0..8 {
        let mode = MODES[seed as usize % 2];
        let mut rig = Rig::new(seed, mode, |shape| shape.block_bytes = 4096);
        for _ in 0..400 {
            let start = rig.random.u64(0..SECTORS - 150);
            let count = if rig.random.u8(0..4) == 0 { 150 } else { 1 };
            rig.write(start, count);
        }
        rig.drainer.drain(None, false, Box::new(|_| {}), &mut rig.host);
        let (mut at, mut groups) = (0, 0);
        while at < rig.model.head() {
            assert!(rig.turn() || rig.wait(), "it goes on");
            if at < rig.drainer.drained() {
                (at, groups) = (rig.drainer.drained(), groups + 1);
                rig.check_backing(at);
            }
        }
        assert!(groups > 3, "{groups} groups");
    }
}

#[test]
fn the_mode_can_change_while_it_runs() {
    let mut rig = Rig::new(5, DrainMode::Grouped, |_| {});
    rig.record();
    for round in 0..12 {
        (0..10).for_each(|_| rig.step());
        rig.drainer.set_mode(MODES[round % 2]);
        let head = rig.model.head();
        assert_eq!(rig.drain(None, false), Ok(head));
        rig.check_backing(head);
    }
    // No group is finished again after ordered writes have followed it.
    let recordings = [1, 2].map(|disk: usize| rig.host.disks[disk].recording());
    let explorer = Explorer { samples: 4, exhaustive_max: 1, ..Explorer::new(5) };
    explorer.explore_together(&recordings, &[Loss::Unflushed; 2], |case, disks| {
        judge_lost_flash(&rig, DrainMode::Ordered, case, &disks);
    });
}

/// Checksums of a whole group take long: other guests of the reactor wait for a part at most.
#[test]
fn a_redo_group_is_put_together_a_part_in_each_turn() {
    let mut rig = Rig::new(31, DrainMode::Grouped, |_| {});
    // Runs of their own, of 4 KiB each, half of them where no block begins.
    (0..150).for_each(|index| rig.write(index * 20 + index % 2, 8));
    rig.drainer.drain(None, false, Box::new(|_| {}), &mut rig.host);
    let (mut turns, mut before) = (0, 0);
    for _ in 0..10_000 {
        rig.turn();
        let Some(summing) = &rig.drainer.summing else { continue };
        let bytes = (summing.runs - before) as u64 * 4096;
        assert!(bytes <= sum::TURN_BYTES, "{bytes} bytes in one turn");
        turns += u64::from(bytes > 0);
        before = summing.runs;
        // Whatever else has the drainer look again is no turn of its own.
        rig.drainer.set_urgent(false, &mut rig.host);
        let summing = rig.drainer.summing.as_ref();
        assert_eq!(summing.map(|summing| summing.runs), Some(before));
    }
    assert!(turns >= 150 * 4096 / sum::TURN_BYTES, "all in {turns} turns");
    assert_eq!(rig.drainer.drained(), rig.model.head());
    rig.check_backing(rig.model.head());
}

/// A group that is on its way goes there as a whole: a point inside is refused, or the group ends
/// there.
#[test]
fn a_point_inside_a_group_under_way_is_reached_exactly_or_refused() {
    let (mut reached, mut refused) = (0, 0);
    for turns in 0..40 {
        for mode in MODES {
            let mut rig = Rig::new(turns, mode, |_| {});
            (0..60).for_each(|index| rig.write(index * 5, 4));
            rig.drainer.drain(None, false, Box::new(|_| {}), &mut rig.host);
            (0..turns).for_each(|_| _ = rig.turn());
            match rig.drain(Some(30), true) {
                Ok(point) => {
                    assert_eq!(point, 30);
                    rig.check_backing(30);
                    reached += 1;
                }
                Err(DrainError::Refused(_)) => refused += 1,
                Err(error) => panic!("{error:?}"),
            }
        }
    }
    assert!(reached > 0 && refused > 0, "{reached} reached, {refused} refused");
}
