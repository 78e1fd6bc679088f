//! Every power cut of a grouped drain and of its recovery, nested, over two simulated disks:
//! backing and sidecar are exactly one point afterwards, and never one older than was reported.

use super::*;
use crate::backing::format_test::stamp as some_stamp;
use crate::backing::group::{Finished, GroupWriter};
use crate::backing::redo::{GroupId, Span};
use crate::backing::stamp::State;
use crate::base::units::MIB;
use crate::io::crash::Explorer;
use crate::io::disk::{Completion, Disk, DiskGeometry, Operation, OperationKind};
use crate::io::sim::{Faults, SimDisk, sim_geometry};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

const BACKING_BYTES: u64 = 256 << 10;
const SECTORS: u64 = BACKING_BYTES / SECTOR_BYTES;

fn layout() -> Layout {
    Layout::new(MIB)
}

/// Both disks, and the times (one of each disk) at which something happened to either.
#[derive(Clone)]
struct Pair {
    backing: SimDisk,
    sidecar: SimDisk,
    moments: Arc<Mutex<Vec<(u64, u64)>>>,
}

/// A handle on one disk of a pair that notes the moments.
struct Watched {
    disk: SimDisk,
    pair: Pair,
}

impl Disk for Watched {
    fn geometry(&self) -> DiskGeometry {
        self.disk.geometry()
    }

    fn submit(&mut self, operation: Operation<'_>, token: u64) {
        let read = operation.kind == OperationKind::Read;
        self.disk.submit(operation, token);
        if !read {
            self.pair.note();
        }
    }

    fn poll(&mut self, completions: &mut Vec<Completion>, wait: bool) {
        self.disk.poll(completions, wait);
        self.pair.note();
    }
}

impl Pair {
    fn new(backing: SimDisk, sidecar: SimDisk) -> Self {
        backing.record();
        sidecar.record();
        let pair = Self { backing, sidecar, moments: Arc::default() };
        pair.note();
        pair
    }

    fn position(&self) -> (u64, u64) {
        (self.backing.position(), self.sidecar.position())
    }

    fn note(&self) {
        let mut moments = self.moments.lock().expect("no panic");
        let now = self.position();
        if moments.last() != Some(&now) {
            moments.push(now);
        }
    }

    fn blocking(&self) -> (Blocking, Blocking) {
        let watched = |disk: &SimDisk| {
            Blocking::new(Box::new(Watched { disk: disk.clone(), pair: self.clone() }))
        };
        (watched(&self.backing), watched(&self.sidecar))
    }

    /// The disks after a power cut at a moment: index 0 keeps nothing that is not durable.
    fn cut(&self, moment: (u64, u64), index: u64) -> (SimDisk, SimDisk) {
        let explorer = |seed| Explorer { seed, ..Explorer::new(seed) };
        let (one, other) = (index % 4, index / 4);
        let backing = explorer(index).cut(&self.backing.recording(), moment.0, one);
        let sidecar = explorer(index ^ 99).cut(&self.sidecar.recording(), moment.1, other);
        (backing, sidecar)
    }
}

/// What the drain did, and what it may be held to.
struct Drained {
    pair: Pair,
    /// Content of the backing at each point.
    points: BTreeMap<u64, Vec<u8>>,
    /// The moment at which a point was reported as reached, and the point.
    reported: Vec<((u64, u64), u64)>,
}

/// The changes of one group, as a model and as a group.
fn fill(
    random: &mut fastrand::Rng,
    writer: &mut GroupWriter,
    image: &mut [u8],
) -> Vec<(u64, Vec<u8>)> {
    let mut pieces = Vec::new();
    let mut at = random.u64(0..20);
    while at < SECTORS {
        let count = random.u64(1..24).min(SECTORS - at);
        let (start, end) = ((at * SECTOR_BYTES) as usize, ((at + count) * SECTOR_BYTES) as usize);
        match random.u8(0..5) {
            0 => {
                writer.zero(at, count);
                image[start..end].fill(0);
            }
            1 => {
                writer.discard(at, count);
                image[start..end].fill(0);
            }
            _ => {
                let data: Vec<u8> = (start..end).map(|_| random.u8(..)).collect();
                pieces.push((writer.data(at, &data), data.clone()));
                image[start..end].copy_from_slice(&data);
            }
        }
        at += count + random.u64(0..60);
    }
    pieces
}

fn put(sidecar: &mut Blocking, offset: u64, bytes: &[u8]) {
    sidecar.write_copies(&[offset], bytes).expect("written");
}

/// Data goes out in whole blocks, as a drain's buffers do.
fn put_data(sidecar: &mut Blocking, offset: u64, pieces: &[(u64, Vec<u8>)]) {
    let mut stream: Vec<u8> = pieces.iter().flat_map(|(_, data)| data.clone()).collect();
    for (index, (at, data)) in pieces.iter().enumerate() {
        let before: usize = pieces[..index].iter().map(|(_, data)| data.len()).sum();
        assert_eq!(*at, offset + before as u64, "{} bytes lie behind the others", data.len());
    }
    stream.resize(stream.len().next_multiple_of(BLOCK_BYTES as usize), 0);
    for (index, chunk) in stream.chunks(16 << 10).enumerate() {
        put(sidecar, offset + (index as u64) * (16 << 10), chunk);
    }
}

fn first_stamp() -> Stamp {
    let mut stamp = Stamp { group_bytes_max: MIB, retired_group: 0, ..some_stamp() };
    stamp.identity.size_bytes = BACKING_BYTES;
    stamp.point = Point { time_ms: 1, ..Point::default() };
    stamp
}

fn new_pair(seed: u64) -> Pair {
    let backing = SimDisk::new(BACKING_BYTES);
    let sidecar = SimDisk::with(Default::default(), sim_geometry(layout().sidecar_bytes()), seed);
    write_stamp(&mut Blocking::new(Box::new(sidecar.clone())), &first_stamp()).expect("written");
    Pair::new(backing, sidecar)
}

/// The rule of a drain that a test breaks to see that it is noticed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Plant {
    Nothing,
    /// G2: the next header before the backing's flush.
    HeaderEarly,
    /// G1: the group is applied before it is durable.
    ApplyBeforeFlush,
}

/// Drains `groups` groups, and stamps the disk clean if `detach`. Every moment of it is recorded.
fn drain(seed: u64, groups: u64, detach: bool, plant: Plant) -> Drained {
    let mut random = fastrand::Rng::with_seed(seed);
    let pair = new_pair(seed);
    let (mut backing, mut sidecar) = pair.blocking();
    let mut image = vec![0; BACKING_BYTES as usize];
    let mut points = BTreeMap::from([(0, image.clone())]);
    let mut reported = vec![(pair.position(), 0)];
    let mut point = 0;
    for number in 1..=groups {
        let id = GroupId { disk: [7; 16], owner_epoch: 5, number };
        let mut writer = GroupWriter::new(layout(), id);
        let data_offset = writer.data_offset();
        let pieces = fill(&mut random, &mut writer, &mut image);
        let to = point + random.u64(1..50);
        let span = Span { from: point, to, point_ms: to, ..Span::default() };
        let Finished { header, table_offset, table, header_offset, header_block } =
            writer.finish(span);
        put_data(&mut sidecar, data_offset, &pieces);
        put(&mut sidecar, table_offset, &table);
        if plant != Plant::HeaderEarly {
            backing.flush().expect("the group before is in place");
        }
        put(&mut sidecar, header_offset, &header_block);
        if plant != Plant::ApplyBeforeFlush {
            sidecar.flush().expect("committed");
        }
        points.insert(to, image.clone());
        reported.push((pair.position(), to));
        let entries = decode_table(&table, &header, SECTORS).expect("a table");
        let source = (&mut sidecar, data_offset);
        apply(&mut backing, source, (&header, &entries), &mut |_| {}).expect("applied");
        point = to;
    }
    if detach {
        backing.flush().expect("in place");
        let mut stamp = first_stamp().next(9);
        stamp.state = State::Clean;
        stamp.point = Point { won: point, time_ms: point, others: 0 };
        stamp.retired_group = groups;
        write_stamp(&mut sidecar, &stamp).expect("clean");
        // From now on the backing is anybody's.
        let foreign = vec![0x5a; 4096];
        backing.write_copies(&[8192], &foreign).expect("written");
        image[8192..8192 + 4096].copy_from_slice(&foreign);
        backing.flush().expect("flushed");
        points.insert(u64::MAX, image.clone());
    }
    drop((backing, sidecar));
    Drained { pair, points, reported }
}

fn recover_pair(pair: &Pair) -> Result<Recovery> {
    let (mut backing, mut sidecar) = pair.blocking();
    let options = RecoverOptions { now_ms: 99, ..Default::default() };
    Ok(recover(&mut backing, &mut sidecar, options, &mut |_| {})?.expect("a stamp"))
}

/// Recovers, and holds the result to `points` and to the point that was last reported.
fn hold(pair: &Pair, drained: &Drained, moment: (u64, u64)) -> bool {
    let recovery = recover_pair(pair).expect("recovers");
    let standing = recovery.standing;
    let image = pair.backing.peek(0, BACKING_BYTES as usize);
    if standing.stamp.is_clean() {
        let (last, _) = drained.points.range(..u64::MAX).next_back().expect("a point");
        return standing.point.won == *last && recovery.applied.is_none();
    }
    let reached = |(at, _): &&((u64, u64), u64)| at.0 <= moment.0 && at.1 <= moment.1;
    let reported = drained.reported.iter().filter(reached).map(|(_, point)| *point).max();
    standing.point.won >= reported.unwrap_or(0)
        && drained.points.get(&standing.point.won) == Some(&image)
}

/// How much to visit: of every so many moments one, so many states each, and within each the states
/// of its recovery, so deep.
#[derive(Clone, Copy)]
struct Depth {
    stride: usize,
    samples: u64,
    nested: u32,
}

/// Visits crash states. Returns states visited and states that broke a promise.
fn visit(drained: &Drained, depth: Depth) -> (u64, u64) {
    let moments = drained.pair.moments.lock().expect("no panic").clone();
    let (mut states, mut broken) = (0, 0);
    for moment in moments.into_iter().step_by(depth.stride) {
        for index in 0..depth.samples {
            let (backing, sidecar) = drained.pair.cut(moment, index);
            let pair = Pair::new(backing.clone(), sidecar.clone());
            states += 1;
            broken += u64::from(!hold(&pair, drained, moment));
            if depth.nested > 0 {
                let inner = nested(&pair, drained, moment, depth);
                states += inner.0;
                broken += inner.1;
            }
        }
    }
    (states, broken)
}

/// Crashes of the recovery that `pair` has just recorded.
fn nested(pair: &Pair, drained: &Drained, moment: (u64, u64), depth: Depth) -> (u64, u64) {
    let moments = pair.moments.lock().expect("no panic").clone();
    let (mut states, mut broken) = (0, 0);
    for inner in moments.into_iter().step_by(depth.stride) {
        for index in [0, 1, 7] {
            let (backing, sidecar) = pair.cut(inner, index);
            let again = Pair::new(backing, sidecar);
            states += 1;
            broken += u64::from(!hold(&again, drained, moment));
            if depth.nested > 1 && index == 7 {
                let depth = Depth { nested: depth.nested - 1, ..depth };
                let deeper = nested(&again, drained, moment, depth);
                states += deeper.0;
                broken += deeper.1;
            }
        }
    }
    (states, broken)
}

#[test]
fn every_power_cut_of_a_grouped_drain_and_of_its_recovery_leaves_exactly_a_point() {
    let (mut states, begun) = (0, std::time::Instant::now());
    for (seed, groups, detach) in [(1, 1, false), (2, 3, true), (3, 2, true), (4, 4, false)] {
        let drained = drain(seed, groups, detach, Plant::Nothing);
        let (visited, broken) =
            visit(&drained, Depth { stride: 1, samples: 3, nested: u32::from(groups < 3) });
        assert_eq!(broken, 0, "seed {seed}: of {visited} states");
        states += visited;
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!("backing recovery: {states} crash states, 0 failures, {seconds:.1} s");
    assert!(states > 10_000, "{states}");
}

/// Not a power cut but a kill: what it wrote is visible, and nothing of it durable.
#[test]
fn a_group_found_after_a_kill_is_made_durable_before_it_is_applied() {
    let (mut broken, mut states) = (0, 0);
    for seed in 0..6 {
        let mut random = fastrand::Rng::with_seed(seed);
        let pair = new_pair(seed);
        let (_, mut sidecar) = pair.blocking();
        let id = GroupId { disk: [7; 16], owner_epoch: 5, number: 1 };
        let mut writer = GroupWriter::new(layout(), id);
        let data_offset = writer.data_offset();
        let mut image = vec![0; BACKING_BYTES as usize];
        let points = BTreeMap::from([(0, image.clone())]);
        let pieces = fill(&mut random, &mut writer, &mut image);
        let span = Span { from: 0, to: 9, ..Default::default() };
        let group = writer.finish(span);
        put_data(&mut sidecar, data_offset, &pieces);
        put(&mut sidecar, group.table_offset, &group.table);
        put(&mut sidecar, group.header_offset, &group.header_block);
        let mut drained = Drained { pair, points, reported: Vec::new() };
        drained.points.insert(9, image);
        let recovery = recover_pair(&drained.pair).expect("recovers");
        assert_eq!(recovery.standing.point.won, 9);
        drained.reported.push((drained.pair.position(), 9));
        let visited = visit(&drained, Depth { stride: 1, samples: 8, nested: 0 });
        states += visited.0;
        broken += visited.1;
    }
    assert_eq!(broken, 0, "of {states}");
    assert!(states > 500, "{states}");
}

#[test]
fn crashes_nested_three_deep_leave_exactly_a_point() {
    let drained = drain(11, 1, false, Plant::Nothing);
    let (states, broken) = visit(&drained, Depth { stride: 11, samples: 2, nested: 3 });
    println!("backing recovery, nested: {states} crash states");
    assert_eq!(broken, 0);
    assert!(states > 1000, "{states}");
}

#[test]
fn a_drain_that_breaks_a_rule_is_caught() {
    for plant in [Plant::HeaderEarly, Plant::ApplyBeforeFlush] {
        let (_, broken) =
            visit(&drain(2, 3, false, plant), Depth { stride: 1, samples: 8, nested: 0 });
        assert!(broken > 0, "the oracle sees it");
    }
}

/// A drain of two groups, the second committed and not applied.
fn committed() -> (Pair, BTreeMap<u64, Vec<u8>>) {
    let drained = drain(5, 2, false, Plant::Nothing);
    let (_, point) = drained.reported[2];
    let (at, _) = drained.reported[2];
    assert!(point > 0);
    let (backing, sidecar) = drained.pair.cut(at, 0);
    (Pair::new(backing, sidecar), drained.points)
}

#[test]
fn recovery_reports_and_a_second_one_finds_nothing_to_do() {
    let (pair, points) = committed();
    let (_, mut sidecar) = pair.blocking();
    let before =
        inspect(&mut sidecar, RecoverOptions::default()).expect("readable").expect("a stamp");
    assert_eq!(before.live.map(|header| header.id.number), Some(2));
    assert_eq!(before.next_group, 3);
    let recovery = recover_pair(&pair).expect("recovers");
    let applied = recovery.applied.expect("a group");
    assert!(applied.bytes > 0 && applied.header.id.number == 2);
    let point = recovery.standing.point.won;
    assert_eq!(point, before.point.won);
    assert_eq!(pair.backing.peek(0, BACKING_BYTES as usize), points[&point]);
    let again = recover_pair(&pair).expect("recovers");
    assert_eq!((again.applied, again.standing.point.won), (None, point));
    assert_eq!(again.standing.stamp.retired_group, 2);
}

#[test]
fn a_failing_disk_fails_recovery_and_the_next_one_finishes() {
    let (pair, points) = committed();
    let (last, image) = points.range(..u64::MAX).next_back().expect("a point");
    for operations in 0.. {
        let (backing, sidecar) = (pair.backing.content(), pair.sidecar.content());
        let copy = Pair::new(
            SimDisk::with(backing, pair.backing.geometry(), 1),
            SimDisk::with(sidecar, pair.sidecar.geometry(), 2),
        );
        let fail = crate::io::sim::Failure {
            after: operations,
            forever: false,
            errno: Errno(libc::ENOSPC),
            torn: true,
        };
        // One and the same count over both disks is not needed: each fails in its turn.
        let disk = if operations % 2 == 0 { &copy.backing } else { &copy.sidecar };
        disk.set_faults(Faults { fail: Some(fail), ..Default::default() });
        let first = recover_pair(&copy);
        disk.set_faults(Faults::default());
        if let Err(error) = &first {
            assert!(error.to_string().contains("byte"), "{error}");
        }
        let again = recover_pair(&copy).expect("recovers");
        assert_eq!(again.standing.point.won, *last);
        assert_eq!(&copy.backing.peek(0, BACKING_BYTES as usize), image);
        if operations > 60 {
            assert!(first.is_ok(), "more operations than there are");
            return;
        }
    }
}

fn refused(pair: &Pair, damage: Damage) -> Error {
    let before = pair.backing.peek(0, BACKING_BYTES as usize);
    let (mut backing, mut sidecar) = pair.blocking();
    let options = RecoverOptions { damage, now_ms: 1, word: None };
    let error = recover(&mut backing, &mut sidecar, options, &mut |_| {}).expect_err("refused");
    assert_eq!(pair.backing.peek(0, BACKING_BYTES as usize), before, "untouched");
    error
}

#[test]
fn a_damaged_header_is_refused_and_passed_over_only_when_told() {
    let (pair, _) = committed();
    let at = layout().header_offset(0);
    let mut header = pair.sidecar.peek(at, 512);
    header[60] ^= 4;
    pair.sidecar.poke(at, &header);
    let error = refused(&pair, Damage::Refuse);
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let text = error.to_string();
    assert!(text.contains("redo slot 0 is damaged: wrong checksum; attach the disk on host alpha"));
    let (mut backing, mut sidecar) = pair.blocking();
    let options = RecoverOptions { damage: Damage::Skip, now_ms: 1, word: None };
    let recovery = recover(&mut backing, &mut sidecar, options, &mut |_| {}).expect("passed over");
    let standing = recovery.expect("a stamp").standing;
    assert!(standing.findings.iter().any(|text| text.contains("slot 0 is damaged")));
}

#[test]
fn a_group_whose_data_is_torn_does_not_count_and_its_predecessor_is_not_applied_again() {
    let (pair, points) = committed();
    let at = layout().data_offset(0) + 512;
    let mut data = pair.sidecar.peek(at, 512);
    data[3] ^= 1;
    pair.sidecar.poke(at, &data);
    let before = pair.backing.position();
    let recovery = recover_pair(&pair).expect("recovers");
    assert_eq!(recovery.applied, None);
    assert_eq!(pair.backing.position(), before, "the backing is not touched");
    let point = recovery.standing.point.won;
    assert_eq!(points.keys().nth(1), Some(&point), "the point before the torn group");
    assert_eq!(recovery.standing.findings, ["group 2 was not written whole"]);
}

#[test]
fn newer_formats_rolled_back_stamps_and_short_sidecars_are_refused_untouched() {
    let (pair, _) = committed();
    let at = layout().header_offset(0);
    let header = pair.sidecar.peek(at, 4096);
    let sealed = |change: &dyn Fn(&mut [u8])| {
        let mut bytes = header.clone();
        change(&mut bytes);
        let checksum = crate::base::checksum::crc32c(0, &bytes[..508]);
        bytes[508..512].copy_from_slice(&checksum.to_le_bytes());
        bytes
    };
    pair.sidecar.poke(at, &sealed(&|bytes| bytes[8] = 2));
    let error = refused(&pair, Damage::Skip);
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    pair.sidecar.poke(at, &sealed(&|bytes| bytes[32] = 6));
    let error = refused(&pair, Damage::Skip);
    assert_eq!(error.kind(), ErrorKind::Fenced);
    assert!(error.to_string().contains("(owner epoch 5, the group's 6)"), "{error}");
    pair.sidecar.poke(at, &sealed(&|bytes| bytes[32] = 4));
    let recovery = recover_pair(&pair).expect("a fenced owner's group is passed over");
    assert_eq!(recovery.applied, None);
    assert!(recovery.standing.findings[0].contains("an owner that was fenced"));
    assert_eq!(recovery.standing.next_group, 3);
    pair.sidecar.poke(at, &header);
    pair.sidecar.set_size(layout().sidecar_bytes() - 4096);
    assert!(refused(&pair, Damage::Skip).to_string().contains("was cut short"));
}

#[test]
fn stamps_survive_one_damaged_copy_and_are_completed() {
    let (pair, _) = committed();
    let [one, other] = first_stamp().offsets();
    pair.sidecar.poke(one, &[0xff; 4096]);
    let recovery = recover_pair(&pair).expect("recovers");
    assert!(recovery.standing.findings.iter().any(|text| text.contains("not a stamp")));
    assert_eq!(pair.sidecar.peek(one, 4096), first_stamp().encode(), "completed");
    assert_eq!(pair.sidecar.peek(other, 4096), first_stamp().encode());
    let sidecar = SimDisk::new(layout().sidecar_bytes());
    let mut blocking = Blocking::new(Box::new(sidecar.clone()));
    assert_eq!(inspect(&mut blocking, RecoverOptions::default()).expect("readable"), None, "empty");
    sidecar.poke(0, b"precious data");
    let error = inspect(&mut blocking, RecoverOptions::default()).expect_err("not a sidecar");
    assert!(error.to_string().contains("this is not a sidecar"), "{error}");
    let mut damaged = first_stamp().encode();
    damaged[100] ^= 1;
    sidecar.poke(0, &damaged);
    let error = inspect(&mut blocking, RecoverOptions::default()).expect_err("damaged");
    assert!(error.to_string().contains("every copy of the owner stamp is damaged"), "{error}");
}
