//! A consistency group of two disks: a log on one, data that refers to it on the other. Whatever
//! ends when, no disk is ahead of the other in the order that the guests wrote in, and with the
//! flash gone both backings are at one point.

#[path = "cache/rig.rs"]
mod rig;

use rig::{DISK_BYTES, Setup, World, alone, identity, run_all, scale};
use std::any::Any;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vflash::backing::recover::{RecoverOptions, Standing, Word, inspect, recover, take_up};
use vflash::backing::redo::Layout;
use vflash::backing::roster::{Peer, Roster};
use vflash::backing::sidecar::write_stamp;
use vflash::backing::stamp::{Point, State};
use vflash::backing::together::word_of;
use vflash::base::units::{MIB, SECTOR_BYTES};
use vflash::cache::consistency::{Consistency, Joining};
use vflash::cache::drain::{DrainError, SidecarState};
use vflash::cache::message::Reply;
use vflash::cache::recover::{OpenOptions, Opened, open};
use vflash::cache::{CacheMessage, CacheState, CacheStatus, CachedDisk};
use vflash::io::buffer::PinnedBuffer;
use vflash::io::crash::{Explorer, Loss};
use vflash::io::disk::{Disk, Errno};
use vflash::io::sim::{Failure, Faults, SimDisk};
use vflash::io::sim_reactor::{SimReactor, inbox};
use vflash::io::volume::{Outcome, RequestKind, SectorRange};

/// Sectors of each client, on both disks.
const AREA: u64 = 400;
const CLIENTS: u64 = 3;

/// One that writes a record to the log, waits until that is done, and then writes data that refers
/// to the record; and so on.
#[derive(Clone, Default)]
struct Client {
    /// Where on the data disk each record's data went, from record 1 on: sector, sectors.
    data: Vec<(u64, u64)>,
    /// Records and data that were acknowledged.
    acked: [u64; 2],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Doing {
    Nothing,
    Writing { disk: usize, id: u32 },
}

const SECTOR: usize = SECTOR_BYTES as usize;

fn sector(client: u64, record: u64, at: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    for words in bytes.chunks_exact_mut(32) {
        for (word, value) in words.chunks_exact_mut(8).zip([MAGIC, client, record, at]) {
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes
}

const MAGIC: u64 = 0x6772_6f75_7021;

/// The record that a sector is of, 0 if it was never written; `None`: it is nobody's.
fn record_of(client: u64, at: u64, bytes: &[u8]) -> Option<u64> {
    let record = u64::from_le_bytes(bytes[16..24].try_into().expect("eight bytes"));
    let expected = if record == 0 { [0; SECTOR] } else { sector(client, record, at) };
    (bytes == expected).then_some(record)
}

/// Sends a message to a disk.
type Sender = Arc<dyn Fn(Box<dyn Any + Send>) + Send + Sync>;

struct Pair {
    setups: [Setup; 2],
    worlds: [World; 2],
    group: Arc<Consistency>,
    reactors: Vec<SimReactor<CachedDisk>>,
    sends: Vec<Sender>,
    statuses: Vec<Arc<CacheStatus>>,
    clients: Vec<Client>,
    doing: Vec<(Doing, Option<PinnedBuffer>)>,
    random: fastrand::Rng,
    /// Position, and what each disk had reported as drained and each client had acknowledged.
    moments: Vec<(u64, [u64; 2], Vec<Client>)>,
}

fn setups(seed: u64, more: u64) -> [Setup; 2] {
    let setup = |member| {
        let segments = more + 6 + (seed + u64::from(member)) % 3;
        Setup { grouped: true, strong: true, segments, member, ..Setup::of(seed) }
    };
    [setup(0), setup(1)]
}

fn peer(member: usize) -> Peer {
    let volume = ["vm/log", "vm/data"][member].to_owned();
    Peer { backing: format!("/{volume}"), sidecar: format!("/{volume}.vflash"), volume }
}

/// The group's order of leading is that of the names: the data disk leads.
fn roster() -> Roster {
    Roster { name: "db".into(), members: vec![peer(1), peer(0)] }
}

/// What each says as a leader.
fn words(worlds: &[World; 2]) -> [Option<Word>; 2] {
    [0, 1].map(|member: usize| word_of(&mut worlds[member].blocking(2)).expect("readable"))
}

/// Finishes both on the shared storage, as any host can: the points that they are at.
fn recover_pair(worlds: &[World; 2]) -> [u64; 2] {
    let words = words(worlds);
    [0, 1].map(|member| {
        let (world, word) = (&worlds[member], words[1 - member]);
        let options = RecoverOptions { word, ..Default::default() };
        let (mut backing, mut sidecar) = (world.blocking(1), world.blocking(2));
        let done = recover(&mut backing, &mut sidecar, options, &mut |_| {});
        done.expect("recovered").expect("stamped").standing.point.won
    })
}

/// Opens a disk's log as a daemon that starts does. `shared`: the disk is in the group.
fn open_log(world: &World, shared: bool) -> (Standing, vflash::base::Result<Opened>) {
    let standing = inspect(&mut world.blocking(2), RecoverOptions::default());
    let standing = standing.expect("readable").expect("stamped");
    let mut how = OpenOptions::new(identity(), 64 * MIB);
    let point = standing.point;
    (how.drained_through, how.drained_others) = (point.won, point.others);
    how.shared = shared;
    (standing, open(&mut world.medium(), &how))
}

/// A disk whose last group counts and is not retired: its log finishes that while it serves.
fn take_up_one(world: &World, word: Option<Word>) -> Option<(Opened, Standing, Point)> {
    let options = RecoverOptions { word, ..Default::default() };
    let standing = take_up(&mut world.blocking(2), options).expect("readable").expect("stamped");
    let live = standing.live?.span;
    let mut how = OpenOptions::new(identity(), 64 * MIB);
    (how.shared, how.drained_through, how.drained_others) = (true, live.from, live.from);
    let opened = open(&mut world.medium(), &how).expect("opened");
    opened.can_finish(&live).then(|| (opened, standing, live.point()))
}

/// Opens the disks as a daemon that starts does: what a log can finish is left to it, on worlds of
/// half of the seeds.
fn open_pair(setups: &[Setup; 2], worlds: &[World; 2]) -> Vec<(CachedDisk, Joining)> {
    if setups[0].seed % 2 == 1 {
        recover_pair(worlds);
    }
    let words = words(worlds);
    let open_one = |member: usize| {
        let (setup, world) = (&setups[member], &worlds[member]);
        let (opened, standing, live) = match take_up_one(world, words[1 - member]) {
            Some((opened, standing, live)) => (opened, standing, Some(live)),
            None => {
                let (standing, opened) = open_log(world, true);
                (opened.expect("opened"), standing, None)
            }
        };
        let mut stamp = standing.stamp;
        if live.is_none() {
            stamp = stamp.next(1);
            (stamp.state, stamp.roster) = (State::Dirty, roster());
            stamp.owner.volume = peer(member).volume;
            write_stamp(&mut world.blocking(2), &stamp).expect("stamped");
        }
        let joining = Joining {
            peer: peer(member),
            disk: stamp.disk,
            committed_step: stamp.committed_step,
            generation: u64::from(live.is_none()),
            next_won: opened.next_won(),
            waker: Arc::new(|| {}),
        };
        let layout = Layout::new(stamp.group_bytes_max);
        let last_group = standing.next_group - 1;
        let sidecar = SidecarState { layout, stamp, last_group, live };
        let geometry = world.0[1].geometry();
        (CachedDisk::new(opened, setup.options(), geometry, Some(sidecar)), joining)
    };
    vec![open_one(0), open_one(1)]
}

impl Pair {
    fn new(seed: u64) -> Self {
        Self::with(setups(seed, 0))
    }

    fn with(setups: [Setup; 2]) -> Self {
        let worlds = [World::new(&setups[0]), World::new(&setups[1])];
        let clients = vec![Client::default(); CLIENTS as usize];
        let pair = Self::on(setups, worlds, clients);
        pair.record();
        pair
    }

    fn on(setups: [Setup; 2], worlds: [World; 2], clients: Vec<Client>) -> Self {
        let opened = open_pair(&setups, &worlds);
        let last = opened.iter().map(|(_, joining)| joining.next_won).max().expect("two") - 1;
        let group = Consistency::new(last, roster());
        let (mut reactors, mut sends, mut statuses) = (Vec::new(), Vec::new(), Vec::new());
        for ((mut disk, mut joining), world) in opened.into_iter().zip(&worlds) {
            world.set_faults(&Faults { reorder: true, ..Default::default() });
            let (send, receiver) = inbox();
            let wake = send.clone();
            joining.waker = Arc::new(move || wake(Box::new(CacheMessage::Wake)));
            disk.join(group.join(joining));
            statuses.push(disk.status());
            let disks = world.0.iter().map(|disk| Box::new(disk.clone()) as Box<dyn Disk + Send>);
            reactors.push(SimReactor::new(disk, disks.collect(), receiver, 32));
            sends.push(send);
        }
        let doing = clients.iter().map(|_| (Doing::Nothing, None)).collect();
        let random = fastrand::Rng::with_seed(setups[0].seed);
        let moments = vec![(0, [0; 2], clients.clone())];
        Self { setups, worlds, group, reactors, sends, statuses, clients, doing, random, moments }
    }

    fn disks(&self) -> Vec<&SimDisk> {
        self.worlds.iter().flat_map(|world| world.0.iter()).collect()
    }

    fn record(&self) {
        SimDisk::record_together(&self.disks());
    }

    /// The client's next write.
    fn submit(&mut self, index: usize) {
        let client = &mut self.clients[index];
        let (number, base) = (index as u64, index as u64 * AREA);
        let [records, data] = client.acked;
        let (disk, record, start, count) = match records == data {
            // The log has room for so many.
            true if records == AREA => return,
            true => {
                let record = records + 1;
                if client.data.len() as u64 == records {
                    let large = self.random.u8(0..12) == 0;
                    let count = if large { 100 } else { self.random.u64(1..9) };
                    client.data.push((base + self.random.u64(0..AREA - 100), count));
                }
                (0, record, base + record - 1, 1)
            }
            false => {
                let (start, count) = client.data[records as usize - 1];
                (1, records, start, count)
            }
        };
        let bytes: Vec<u8> =
            (start..start + count).flat_map(|at| sector(number, record, at)).collect();
        let buffer = PinnedBuffer::new(bytes.len());
        buffer.segment().copy_from(&bytes);
        let ranges = [SectorRange { start, count }];
        let segments = [buffer.segment()];
        let id = self.reactors[disk].submit(RequestKind::Write, &ranges, &segments);
        if let Some(id) = id {
            self.doing[index] = (Doing::Writing { disk, id: id.0 }, Some(buffer));
        }
    }

    fn turn(&mut self) {
        let first = self.random.usize(0..2);
        for disk in [first, 1 - first] {
            self.reactors[disk].turn(false);
            for (id, outcome) in self.reactors[disk].ended() {
                assert_eq!(outcome, Outcome::Done, "a guest sees no error");
                let of = Doing::Writing { disk, id: id.0 };
                if let Some(index) = self.doing.iter().position(|(doing, _)| *doing == of) {
                    self.doing[index] = (Doing::Nothing, None);
                    self.clients[index].acked[disk] += 1;
                }
            }
        }
        let drained = [0, 1].map(|disk: usize| self.statuses[disk].gauges().drained_won);
        let at = self.worlds[0].position();
        let (last, before, _) = self.moments.last().expect("the first");
        let newer = [drained[0].max(before[0]), drained[1].max(before[1])];
        match *last == at && *before == newer {
            true => self.moments.last_mut().expect("it is there").2 = self.clients.clone(),
            false => self.moments.push((at, newer, self.clients.clone())),
        }
    }

    fn idle(&self) -> bool {
        self.doing.iter().all(|(doing, _)| *doing == Doing::Nothing)
    }

    fn pass_time(&mut self, by: Duration) {
        self.reactors.iter_mut().for_each(|reactor| reactor.advance(by));
    }

    /// Clients write and time passes.
    fn work(&mut self, steps: u64) {
        for _ in 0..steps {
            for index in 0..self.clients.len() {
                if self.doing[index].0 == Doing::Nothing && self.random.bool() {
                    self.submit(index);
                }
            }
            self.turn();
            if self.random.u8(0..4) == 0 {
                let by = Duration::from_millis(self.random.u64(1..400));
                self.pass_time(by);
            }
            if self.random.u8(0..16) == 0 {
                // Its flush of the flash is under way among appends.
                let disk = self.random.usize(0..2);
                let reply = Box::new(|saved: vflash::base::Result<()>| saved.expect("saved"));
                (self.sends[disk])(Box::new(CacheMessage::Checkpoint { reply }));
            }
        }
    }

    fn finish(&mut self) {
        self.until("writes end", |pair| pair.idle());
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        for _ in 0..200_000 {
            if done(self) {
                return;
            }
            self.turn();
            if self.reactors.iter().all(|reactor| reactor.operations() == 0) {
                self.pass_time(Duration::from_millis(20));
            }
        }
        let states: Vec<CacheState> =
            self.statuses.iter().map(|status| status.gauges().state).collect();
        panic!("seed {}: {what}: it hangs: {states:?}", self.setups[0].seed);
    }

    fn begin<T: Send + 'static>(
        &self,
        disk: usize,
        message: impl FnOnce(Reply<T>) -> CacheMessage,
    ) -> Arc<Mutex<Option<T>>> {
        let answer = Arc::new(Mutex::new(None));
        let slot = answer.clone();
        let reply: Reply<T> =
            Box::new(move |value| *slot.lock().expect("one thread") = Some(value));
        (self.sends[disk])(Box::new(message(reply)));
        answer
    }

    fn ask<T: Send + 'static>(
        &mut self,
        disk: usize,
        message: impl FnOnce(Reply<T>) -> CacheMessage,
    ) -> T {
        let answer = self.begin(disk, message);
        self.until("an answer", |_| answer.lock().expect("one thread").is_some());
        answer.lock().expect("one thread").take().expect("it was just seen")
    }

    fn drain(&mut self, disk: usize, to: Option<u64>, hold: bool) -> Result<u64, DrainError> {
        self.ask(disk, |reply| CacheMessage::Drain { to, hold, reply })
    }

    fn drained(&mut self) -> [u64; 2] {
        [0, 1].map(|disk: usize| {
            self.ask(disk, |reply| CacheMessage::Status { reply });
            self.statuses[disk].gauges().drained_won
        })
    }

    /// What had been promised at a crash point.
    fn moment(&self, point: u64) -> &(u64, [u64; 2], Vec<Client>) {
        let later = self.moments.partition_point(|(at, ..)| *at <= point);
        &self.moments[later.saturating_sub(1)]
    }

    /// How far each client is by what both disks show: every record up to one, and all data up to
    /// that record's or the one before. Anything else is out of order.
    fn judge(&self, read: &mut dyn FnMut(usize, u64, &mut [u8])) -> Vec<[u64; 2]> {
        let judge = |(index, client): (usize, &Client)| {
            let (number, base) = (index as u64, index as u64 * AREA);
            let mut both = [0, 1].map(|_: usize| vec![0; (AREA * SECTOR_BYTES) as usize]);
            let mut seen = both.iter_mut().enumerate().map(|(disk, bytes)| {
                read(disk, base, bytes);
                let sectors = bytes.chunks_exact(SECTOR_BYTES as usize);
                let records = (base..).zip(sectors).map(|(at, bytes)| {
                    let record = record_of(number, at, bytes);
                    record.unwrap_or_else(|| panic!("client {index}: sector {at} is nobody's"))
                });
                records.collect::<Vec<u64>>()
            });
            let (log, data) = (seen.next().expect("two"), seen.next().expect("two"));
            let records = log.iter().max().copied().unwrap_or(0);
            for (at, record) in (1..).zip(&log) {
                let expected = if at <= records { at } else { 0 };
                assert_eq!(*record, expected, "client {index}: the log has {records} but not {at}");
            }
            let newest = data.iter().max().copied().unwrap_or(0);
            assert!(
                newest <= records,
                "client {index}: data of {newest}, and the log ends at {records}"
            );
            assert!(
                records <= newest + 1,
                "client {index}: record {records}, and data of {newest}"
            );
            let mut expected = vec![0; AREA as usize];
            for (record, (start, count)) in (1..=newest).zip(&client.data) {
                let from = (start - base) as usize;
                expected[from..from + *count as usize].fill(record);
            }
            let odd =
                (base..).zip(data.iter().zip(&expected)).filter(|(_, (is, wanted))| is != wanted);
            let odd: Vec<_> = odd.collect();
            assert!(odd.is_empty(), "client {index}: not those of 1..={newest}: {odd:?}");
            [records, newest]
        };
        self.clients.iter().enumerate().map(judge).collect()
    }

    /// The flash is gone: both are at one point, not older than what had been reported.
    fn judge_without_flash(&self, point: u64, worlds: &[World; 2]) {
        let points = recover_pair(worlds);
        assert_eq!(points[0], points[1], "the disks are at different points");
        let reported = self.moment(point).1;
        let newest = reported[0].max(reported[1]);
        assert!(points[0] >= newest, "{points:?} is older than {newest}, as reported");
        self.judge(&mut |disk, start, bytes| {
            bytes.copy_from_slice(&worlds[disk].0[1].peek(start * SECTOR_BYTES, bytes.len()));
        });
    }

    /// As the guests see it, whoever is opened first.
    fn judge_guests(&mut self) -> Vec<[u64; 2]> {
        let mut both = [0, 1].map(|_: usize| vec![0; DISK_BYTES as usize]);
        for (disk, bytes) in both.iter_mut().enumerate() {
            for (part, chunk) in (0..).zip(bytes.chunks_mut(64 << 10)) {
                let buffer = PinnedBuffer::new(chunk.len());
                let range = SectorRange { start: part * 128, count: chunk.len() as u64 / 512 };
                let segments = [buffer.segment()];
                let id = self.reactors[disk].submit(RequestKind::Read, &[range], &segments);
                let id = id.expect("a free place");
                for _ in 0..100_000 {
                    self.reactors[disk].turn(false);
                    let ended = self.reactors[disk].ended();
                    if let Some((_, outcome)) = ended.iter().find(|(ended, _)| *ended == id) {
                        assert_eq!(*outcome, Outcome::Done);
                        break;
                    }
                }
                buffer.segment().copy_to(chunk);
            }
        }
        self.judge(&mut |disk, start, bytes| {
            let from = (start * SECTOR_BYTES) as usize;
            bytes.copy_from_slice(&both[disk][from..from + bytes.len()]);
        })
    }

    fn check_backings(&self) -> Vec<[u64; 2]> {
        self.judge(&mut |disk, start, bytes| {
            bytes.copy_from_slice(&self.worlds[disk].0[1].peek(start * SECTOR_BYTES, bytes.len()));
        })
    }
}

/// Two worlds without their flash.
fn shared_storage(disks: Vec<SimDisk>) -> [World; 2] {
    let mut disks = disks.into_iter();
    [0, 1].map(|_: usize| World::without_flash(disks.by_ref().take(2).collect()))
}

/// A run that drains by itself and when asked. In every third one a redo group of the data disk is
/// full before all is in it that the log disk has in its own: less is agreed on than was gathered.
fn run(seed: u64) -> Pair {
    let full = seed % 3 == 2;
    let mut setups = setups(seed, if full { 60 } else { 0 });
    if full {
        // Blocks that are written in part count as a whole.
        setups[1].block_bytes = 4096;
    }
    let mut pair = Pair::with(setups);
    let staleness_max = Duration::from_secs(if full { 3600 } else { 10 });
    for send in &pair.sends {
        send(Box::new(CacheMessage::SetStaleness { staleness_max }));
    }
    for round in 0..4 {
        pair.work(if full { 240 } else { 60 });
        if round % 2 == 0 {
            pair.finish();
            let disk = pair.random.usize(0..2);
            pair.drain(disk, None, false).expect("drained");
        }
    }
    pair.finish();
    pair
}

fn flash_lost(seed: u64) -> u64 {
    let pair = run(seed);
    let recordings: Vec<_> = [1, 2, 4, 5].map(|disk: usize| pair.disks()[disk].recording()).into();
    let explorer =
        Explorer { samples: 4, exhaustive_max: 2, points_max: 120, ..Explorer::new(seed) };
    let mut states = 0;
    for losses in [[Loss::Unflushed; 4], [Loss::UnderWay; 4]] {
        explorer.explore_together(&recordings, &losses, |case, disks| {
            let worlds = shared_storage(disks);
            if case.index % 8 == 1 {
                states += nested(&pair, case.point, case.seed ^ case.point, &worlds);
            } else {
                pair.judge_without_flash(case.point, &worlds);
                states += 1;
            }
        });
    }
    states
}

/// Every end of the recovery too.
fn nested(pair: &Pair, point: u64, seed: u64, worlds: &[World; 2]) -> u64 {
    let disks = || worlds.iter().flat_map(|world| world.0[1..].iter());
    SimDisk::record_together(&disks().collect::<Vec<_>>());
    pair.judge_without_flash(point, worlds);
    let recordings: Vec<_> = disks().map(SimDisk::recording).collect();
    let explorer = Explorer {
        only: None,
        samples: 2,
        exhaustive_max: 1,
        points_max: 8,
        ..Explorer::new(seed)
    };
    1 + explorer.explore_together(&recordings, &[Loss::Unflushed; 4], |_, disks| {
        pair.judge_without_flash(point, &shared_storage(disks));
    })
}

#[test]
fn without_the_flash_no_disk_is_ahead_of_another() {
    let seeds: Vec<u64> = (0..12 * scale()).collect();
    let states = run_all("consistency group, flash lost", &seeds, |seed| flash_lost(*seed));
    assert!(alone() || states >= 8_000 * scale(), "{states} states are too few");
}

/// With the flash: what was acknowledged is there, and it goes on from there.
fn host_lost(seed: u64) -> u64 {
    let pair = run(seed);
    let recordings: Vec<_> = pair.disks().into_iter().map(SimDisk::recording).collect();
    let explorer =
        Explorer { samples: 2, exhaustive_max: 0, points_max: 40, ..Explorer::new(seed) };
    let (all, storage) = (Loss::Unflushed, Loss::UnderWay);
    let mut states = 0;
    for losses in [[all; 6], [all, storage, storage, all, storage, storage]] {
        let mut again = 0;
        let explored = explorer.explore_together(&recordings, &losses, |case, disks| {
            let (log, data) = disks.split_at(3);
            let world = |disks: &[SimDisk]| {
                World(disks.to_vec().try_into().unwrap_or_else(|_| panic!("three")))
            };
            let worlds = [world(log), world(data)];
            let mut heir = Pair::on(pair.setups, worlds, pair.clients.clone());
            heir.record();
            let found = heir.judge_guests();
            let acked = pair.moment(case.point).2.iter().map(|client| client.acked);
            for (found, acked) in found.iter().zip(acked) {
                assert!(found[0] >= acked[0] && found[1] >= acked[1], "{acked:?} became {found:?}");
            }
            if case.index % 4 == 1 {
                for (client, found) in heir.clients.iter_mut().zip(&found) {
                    client.acked = *found;
                }
                heir.work(10);
                heir.finish();
                heir.drain(0, None, false).expect("drained");
                heir.drain(1, None, false).expect("drained");
                let there = heir.check_backings();
                let acked: Vec<_> = heir.clients.iter().map(|client| client.acked).collect();
                assert_eq!(there, acked, "all is in the backings");
                again += lost_again(&heir, case.seed ^ case.point);
            }
        });
        states += explored + again;
    }
    states
}

/// The flash of those who went on where others had ended is gone too.
fn lost_again(heir: &Pair, seed: u64) -> u64 {
    let recordings: Vec<_> = [1, 2, 4, 5].map(|disk: usize| heir.disks()[disk].recording()).into();
    let limits = Explorer::new(seed);
    let explorer = Explorer { only: None, samples: 1, exhaustive_max: 0, points_max: 12, ..limits };
    explorer.explore_together(&recordings, &[Loss::UnderWay; 4], |case, disks| {
        heir.judge_without_flash(case.point, &shared_storage(disks));
    })
}

#[test]
fn with_the_flash_nothing_acknowledged_is_lost() {
    let seeds: Vec<u64> = (0..6 * scale()).collect();
    let states = run_all("consistency group, host lost", &seeds, |seed| host_lost(*seed));
    assert!(alone() || states >= 600, "{states} states are too few");
}

#[test]
fn a_number_of_either_disk_is_a_point_of_both() {
    let mut pair = Pair::with(setups(3, 60));
    pair.drain(0, Some(0), true).expect("held");
    pair.work(24);
    pair.finish();
    assert_eq!(pair.drained(), [0, 0], "one that is held holds both");
    let marked = pair.ask(1, |reply| CacheMessage::Mark { name: "here".into(), reply });
    let marked = marked.expect("marked");
    assert_eq!(marked, pair.group.last(), "a mark names a point of all");
    let before: Vec<_> = pair.clients.iter().map(|client| client.acked).collect();
    pair.work(12);
    pair.finish();
    (pair.sends[0])(Box::new(CacheMessage::LetGo));
    assert_eq!(pair.drain(0, Some(marked), true), Ok(marked));
    pair.until("the other is there", |pair| pair.drained() == [marked, marked]);
    assert_eq!(pair.check_backings(), before, "both backings are at the mark");
    let refused = pair.drain(1, Some(marked - 1), false);
    assert!(matches!(refused, Err(DrainError::Refused(_))), "{refused:?}");
    let ahead = pair.drain(1, Some(pair.group.last() + 1), false);
    assert!(matches!(ahead, Err(DrainError::Refused(_))), "{ahead:?}");
}

#[test]
fn while_one_backing_is_down_no_disk_advances_and_writes_go_on() {
    let mut pair = Pair::new(4);
    pair.work(20);
    pair.finish();
    pair.drain(0, None, false).expect("drained");
    let fail = Failure { after: 0, forever: true, errno: Errno::EIO, torn: true };
    let down = Faults { fail: Some(fail), reorder: true, ..Faults::default() };
    pair.worlds[1].0[1].set_faults(down.clone());
    pair.worlds[1].0[2].set_faults(down);
    let before = pair.drained();
    let acked = |pair: &Pair| pair.clients.iter().map(|client| client.acked[0]).sum::<u64>();
    let acked_before = acked(&pair);
    pair.work(60);
    assert!(acked(&pair) > acked_before, "writes go on");
    (0..50).for_each(|_| {
        pair.turn();
        pair.pass_time(Duration::from_secs(1));
    });
    assert_eq!(pair.drained(), before, "no disk goes on alone");
    pair.judge_without_flash(u64::MAX, &[0, 1].map(|disk: usize| pair.worlds[disk].killed(1)));
    let healthy = Faults { reorder: true, ..Faults::default() };
    pair.worlds[1].set_faults(&healthy);
    pair.finish();
    pair.drain(0, None, false).expect("drained");
    pair.drain(1, None, false).expect("drained");
    let all: Vec<_> = pair.clients.iter().map(|client| client.acked).collect();
    assert_eq!(pair.check_backings(), all);
}

/// Both of one moment, each in turn with the flash of an earlier one.
#[test]
fn a_flash_that_is_older_than_its_backing_is_told_by_the_numbers_of_its_own_disk() {
    let mut pair = Pair::new(6);
    pair.work(40);
    pair.finish();
    let older = [0, 1].map(|disk: usize| pair.worlds[disk].killed(1));
    pair.work(40);
    pair.finish();
    pair.drain(0, None, false).expect("drained");
    let worlds = [0, 1].map(|disk: usize| pair.worlds[disk].killed(1));
    recover_pair(&worlds);
    for (world, older) in worlds.iter().zip(&older) {
        let [_, backing, sidecar] = world.0.clone();
        let (standing, opened) = open_log(&World([older.0[0].clone(), backing, sidecar]), true);
        let error = opened.err().expect("refused").to_string();
        let wanted = format!("older than its backing, which is at point {}", standing.point.won);
        assert!(error.contains(&wanted), "{error}");
        assert!(open_log(world, true).1.is_ok(), "with its own flash");
    }
}

#[test]
fn a_disk_leaves_when_the_others_need_no_word_of_it() {
    let mut pair = Pair::new(5);
    pair.work(80);
    pair.finish();
    while pair.clients[0].acked[0] != pair.clients[0].acked[1] {
        pair.submit(0);
        pair.finish();
    }
    // The data disk leads. The last number is the log's.
    pair.submit(0);
    pair.finish();
    pair.drain(0, None, false).expect("drained");
    let fail = Failure { after: 0, forever: true, errno: Errno::EIO, torn: true };
    let down = Faults { fail: Some(fail), reorder: true, ..Faults::default() };
    pair.worlds[0].0[2].set_faults(down);
    let left = pair.begin(1, |reply| CacheMessage::Leave { reply });
    (0..50).for_each(|_| {
        pair.turn();
        pair.pass_time(Duration::from_secs(1));
    });
    let is_left = || left.lock().expect("one thread").is_some();
    assert!(!is_left(), "the other's stamp still names it");
    pair.worlds[0].set_faults(&Faults { reorder: true, ..Faults::default() });
    pair.until("it leaves", |_| is_left());
    left.lock().expect("one thread").take().expect("it was just seen").expect("left");
    assert_eq!(pair.group.roster().1.members, vec![peer(0)]);
    let storage = [0, 1].map(|disk: usize| pair.worlds[disk].killed(1));
    for (disk, world) in storage.iter().enumerate() {
        let standing = inspect(&mut world.blocking(2), RecoverOptions::default());
        let standing = standing.expect("readable").expect("stamped");
        assert_eq!(standing.doubt, None);
        let members = [vec![peer(0)], vec![]];
        assert_eq!(standing.stamp.roster.members, members[disk], "of disk {disk}");
        assert_eq!(standing.live, None, "its last group is retired");
    }
    let (standing, opened) = open_log(&storage[1], false);
    assert!(standing.point.others > 0, "{:?}", standing.point);
    assert!(opened.expect("it opens by itself").next_won() > standing.point.won);
    // Both go on by themselves.
    pair.work(40);
    pair.finish();
    pair.drain(1, None, false).expect("drained");
    pair.drain(0, None, false).expect("drained");
    let all: Vec<_> = pair.clients.iter().map(|client| client.acked).collect();
    assert_eq!(pair.check_backings(), all);
    let refused = pair.ask(1, |reply| CacheMessage::Leave { reply });
    assert!(refused.expect_err("refused").to_string().contains("in no consistency group"));
    pair.ask(0, |reply| CacheMessage::Close { reply }).expect("closed");
    assert!(pair.group.roster().1.is_empty());
}

/// Of an idle disk, whose own drain would wait for nothing.
#[test]
fn a_flush_that_ends_late_holds_no_other_disk_up() {
    let mut pair = Pair::new(8);
    pair.work(20);
    pair.finish();
    while pair.clients[0].acked[0] != pair.clients[0].acked[1] {
        pair.submit(0);
        pair.finish();
    }
    pair.drain(0, None, false).expect("drained");
    let flash = pair.worlds[0].0[0].clone();
    flash.set_faults(Faults { slow_polls: 60, ..Faults::default() });
    let flushes = flash.operations();
    let saved = pair.begin(0, |reply| CacheMessage::Checkpoint { reply });
    pair.reactors[0].turn(false);
    assert_eq!(flash.operations(), flushes + 1, "the flush alone");
    flash.set_faults(Faults::default());
    pair.submit(0);
    pair.finish();
    assert!(saved.lock().expect("one thread").is_none(), "the record was first");
    (0..200).for_each(|_| pair.turn());
    pair.submit(0);
    pair.finish();
    pair.drain(1, None, false).expect("drained");
    let all: Vec<_> = pair.clients.iter().map(|client| client.acked).collect();
    assert_eq!(pair.check_backings(), all);
}

#[test]
fn a_leader_that_is_lost_for_good_at_any_step_holds_nobody_up() {
    for after in 0..24 {
        let mut pair = Pair::new(7);
        pair.work(40);
        pair.finish();
        let fail = Failure { after, forever: true, errno: Errno::EIO, torn: false };
        let down = Faults { fail: Some(fail), reorder: true, ..Faults::default() };
        pair.worlds[1].0[2].set_faults(down);
        pair.begin(0, |reply| CacheMessage::Drain { to: None, hold: false, reply });
        for _ in 0..400 {
            pair.turn();
            pair.pass_time(Duration::from_millis(5));
        }
        drop(pair.reactors.pop());
        pair.group.expel("vm/data", None);
        let drain = |reply| CacheMessage::Drain { to: None, hold: false, reply };
        let answer = pair.begin(0, drain);
        for _ in 0..5_000 {
            pair.reactors[0].turn(false);
            pair.pass_time(Duration::from_millis(5));
        }
        let answer = answer.lock().expect("one thread").take();
        assert!(matches!(answer, Some(Ok(_))), "after {after}: {answer:?}");
        let mut bytes = vec![0; SECTOR];
        for (client, number) in pair.clients.iter().zip(0..) {
            for record in 1..=client.acked[0] {
                let at = number * AREA + record - 1;
                bytes.copy_from_slice(&pair.worlds[0].0[1].peek(at * SECTOR_BYTES, SECTOR));
                assert_eq!(record_of(number, at, &bytes), Some(record), "after {after}");
            }
        }
    }
}
