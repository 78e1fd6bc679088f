//! The volume against a plain array of bytes, over disks of every shape.

use super::*;
use crate::base::units::{EXTENT_BYTES, MIB};
use crate::flash::places::EXTENT_SECTORS;
use crate::flash::{
    Class, FormatOptions, Keeper, KeeperOptions, NewAllocation, Pool, VolumeOptions,
};
use crate::io::buffer::AlignedBuffer;
use crate::io::crash::Explorer;
use crate::io::sim::{Content, Failure, Faults, SimDisk, sim_geometry};
use crate::io::sim_reactor::{SimReactor, inbox};
use std::time::Duration;

const POOL_BYTES: u64 = 40 * MIB;
const VOLUME_BYTES: u64 = 5 * MIB + 12_288;

struct Bench {
    disk: SimDisk,
    keeper: Keeper,
    id: AllocationId,
    counters: Arc<VolumeCounters>,
    reactor: SimReactor<FlashVolume>,
}

impl Bench {
    fn new(geometry: DiskGeometry, thin: bool) -> Self {
        Self::with(geometry, thin, FullPolicy::Fail)
    }

    /// A volume whose extents are scattered: other allocations were removed in between.
    fn with(geometry: DiskGeometry, thin: bool, full: FullPolicy) -> Self {
        let disk = SimDisk::with(Content::default(), geometry, 3);
        let options = FormatOptions { name: "volumes".into(), zeroed: true, ..Default::default() };
        let mut pool = Pool::format_with(Box::new(disk.clone()), options).expect("format");
        let new = |name: String, extents: u64, thin| NewAllocation {
            name,
            size_bytes: extents * MIB,
            thin,
            class: Class::Volatile,
            attributes: Vec::new(),
        };
        let mut others = Vec::new();
        for index in 0..24 {
            others.push(pool.create(new(format!("vm/{index}"), 1, false)).expect("create"));
        }
        for id in others.iter().step_by(2) {
            pool.remove(*id).expect("remove");
        }
        while pool.scrub_step(POOL_BYTES).expect("scrub").left_bytes > 0 {}
        let mut all = new("vm/it".into(), 1, thin);
        all.size_bytes = VOLUME_BYTES;
        let id = pool.create(all).expect("create");
        let keeper = Keeper::start(pool, KeeperOptions::default()).expect("keeper");
        let (notify, messages) = inbox();
        let counters = Arc::new(VolumeCounters::default());
        let options = VolumeOptions { notify, full, geometry, counters: counters.clone() };
        let volume = keeper.volume(id, options).expect("volume");
        let reactor = SimReactor::new(volume, vec![Box::new(disk.clone())], messages, 16);
        Self { disk, keeper, id, counters, reactor }
    }

    /// Where the pool says that an extent of the volume is.
    fn extent(&self, logical: u64) -> Option<u64> {
        let id = self.id;
        let extent = self.keeper.call(move |pool| {
            let run = pool.allocation(id)?.run_of(logical)?;
            Some(run.physical + logical - run.logical)
        });
        extent.expect("the keeper runs")
    }

    fn whole(&mut self, bytes: u64) -> Vec<u8> {
        let mut content = vec![1; bytes as usize];
        assert_eq!(self.reactor.read(0, &mut content), Outcome::Done);
        content
    }
}

fn shapes() -> Vec<DiskGeometry> {
    let mut shapes = Vec::new();
    for (block_bytes, memory_alignment) in [(512, 1), (512, 512), (4096, 512), (4096, 4096)] {
        for (zero, discard) in [(true, true), (true, false), (false, false)] {
            let geometry = sim_geometry(POOL_BYTES);
            shapes.push(DiskGeometry { block_bytes, memory_alignment, zero, discard, ..geometry });
        }
    }
    shapes
}

/// Ranges that do not touch each other, though perhaps the same block.
fn disjoint(random: &mut fastrand::Rng, sectors: u64, count: u64) -> Vec<SectorRange> {
    let share = sectors / count;
    let mut ranges = Vec::new();
    for index in 0..count {
        let (from, to) = (index * share, (index + 1) * share);
        let whole = from.next_multiple_of(EXTENT_SECTORS);
        if count < 4 && whole + EXTENT_SECTORS <= to && random.bool() {
            // Whole extents, and perhaps a bit more.
            let count = (to - whole).min(EXTENT_SECTORS + random.choice([0, 8]).expect("two"));
            ranges.push(SectorRange { start: whole, count });
            continue;
        }
        let start = if random.bool() { from } else { random.u64(from..to) };
        let longest = if random.u8(0..4) == 0 { to - start } else { (to - start).min(64) };
        let mut count = random.u64(1..=longest);
        if random.bool() {
            count = count.next_multiple_of(8).min(to - start);
        }
        ranges.push(SectorRange { start, count });
    }
    ranges
}

/// Cuts memory of `length` bytes into segments, aligned or not, with gaps between.
fn memory(random: &mut fastrand::Rng, whole: Segment, base: usize, length: usize) -> Vec<Segment> {
    let step = random.choice([1usize, 512, 4096]).expect("three");
    let mut segments = Vec::new();
    let (mut at, mut left) = (base + random.usize(0..3) * step, length);
    while left > 0 {
        let part = if random.bool() { left } else { (random.usize(1..9) * step).min(left) };
        segments.push(whole.part(at, part));
        at += part.next_multiple_of(step);
        left -= part;
    }
    segments
}

#[test]
fn random_requests_on_disks_of_every_shape_agree_with_an_array() {
    for (index, geometry) in shapes().into_iter().enumerate() {
        for thin in [false, true] {
            let mut random = fastrand::Rng::with_seed(index as u64 * 2 + u64::from(thin));
            let mut bench = Bench::new(geometry, thin);
            bench.disk.set_faults(Faults { reorder: true, ..Default::default() });
            let mut model = vec![0u8; VOLUME_BYTES as usize];
            for round in 0..60 {
                bench.reactor.volume.set_write_cache(random.bool());
                batch(&mut bench, &mut model, &mut random);
                if round % 20 == 19 {
                    assert!(bench.whole(VOLUME_BYTES) == model, "{geometry:?} thin {thin}");
                }
            }
            let counters = &bench.counters;
            let merged = counters.merged.load(Ordering::Relaxed);
            assert_eq!(merged > 0, geometry.block_bytes > 512, "parts of blocks are merged");
            let zeros = counters.zeros_written.load(Ordering::Relaxed);
            assert_eq!(zeros > 0, !geometry.zero, "zeros are written where the drive cannot");
            let bounced = counters.bounced.load(Ordering::Relaxed);
            assert!(bounced > 0, "odd memory is bounced");
            let given = counters.extents_unmapped.load(Ordering::Relaxed);
            assert_eq!(given > 0, thin, "a thin volume gives extents back");
            let report = bench.keeper.call(|pool| pool.check()).expect("runs");
            assert!(report.is_clean(), "{:?}", report.findings);
            bench.keeper.stop();
        }
    }
}

/// Several requests at once on ranges of their own; reads are compared with the model.
fn batch(bench: &mut Bench, model: &mut [u8], random: &mut fastrand::Rng) {
    let count = random.u64(1..9);
    let ranges = disjoint(random, VOLUME_BYTES / SECTOR_BYTES, count);
    let bytes = |range: &SectorRange| (range.count * SECTOR_BYTES) as usize;
    let place = |range: &SectorRange| (range.start * SECTOR_BYTES) as usize;
    let needed: usize = ranges.iter().map(|range| bytes(range) + 32_768).sum();
    let mut buffer = AlignedBuffer::new(needed);
    for (word, chunk) in (random.u64(..)..u64::MAX).zip(buffer.chunks_mut(8)) {
        chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
    }
    // SAFETY: the buffer lives until all requests have ended, and is not borrowed before.
    let whole = unsafe { buffer.segment() };
    let mut base = 0;
    let mut reads = Vec::new();
    let mut left = 0;
    for range in &ranges {
        let segments = memory(random, whole, base, bytes(range));
        let end = segments
            .last()
            .map_or(base, |last| last.address().addr() + last.length() - whole.address().addr());
        base = end.next_multiple_of(4096);
        let kind = match random.u8(0..6) {
            0 | 1 => RequestKind::Read,
            2 | 3 => RequestKind::Write,
            4 => RequestKind::Discard,
            _ => RequestKind::WriteZeroes { unmap: random.bool() },
        };
        let target = &mut model[place(range)..place(range) + bytes(range)];
        match kind {
            RequestKind::Read => reads.push((*range, segments.clone())),
            RequestKind::Write => _ = crate::io::buffer::gather(&segments, target),
            _ => target.fill(0),
        }
        let transfers = matches!(kind, RequestKind::Read | RequestKind::Write);
        let segments = if transfers { &segments[..] } else { &[] };
        bench.reactor.submit(kind, &[*range], segments).expect("a free slot");
        left += 1;
    }
    while left > 0 {
        bench.reactor.turn(true);
        for (_, outcome) in bench.reactor.ended() {
            assert_eq!(outcome, Outcome::Done);
            left -= 1;
        }
    }
    for (range, segments) in reads {
        let mut seen = vec![0; bytes(&range)];
        crate::io::buffer::gather(&segments, &mut seen);
        assert!(seen == model[place(&range)..place(&range) + bytes(&range)], "{range:?}");
    }
}

#[test]
fn with_the_write_cache_off_a_completed_write_survives_the_worst_power_cut() {
    for (write_cache, thin) in [(false, false), (false, true), (true, false)] {
        let mut bench = Bench::new(sim_geometry(POOL_BYTES), thin);
        bench.disk.record();
        bench.reactor.volume.set_write_cache(write_cache);
        assert_eq!(bench.reactor.write(4096, &[0x5a; 8192]), Outcome::Done);
        let after_cut = |bench: &Bench| {
            let disk = Explorer::new(1).cut(&bench.disk.recording(), u64::MAX, 0);
            let pool = Pool::open(Box::new(disk.clone())).expect("open");
            let allocation = pool.allocation(bench.id).expect("there");
            let place = allocation.run_of(2).map(|run| run.physical + 2 - run.logical);
            place.map(|extent| disk.peek(extent * EXTENT_BYTES, 8192))
        };
        let seen = after_cut(&bench);
        assert_eq!(seen == Some(vec![0x5a; 8192]), !write_cache);
        assert_eq!(bench.reactor.flush(), Outcome::Done);
        assert_eq!(after_cut(&bench), Some(vec![0x5a; 8192]), "flushed");
        bench.keeper.stop();
    }
}

#[test]
fn a_failing_disk_fails_requests_once_each_and_nothing_hangs() {
    for thin in [false, true] {
        for after in 0..12 {
            for forever in [false, true] {
                let geometry = DiskGeometry { block_bytes: 4096, ..sim_geometry(POOL_BYTES) };
                let mut bench = Bench::new(geometry, thin);
                let fail = Failure { after, forever, errno: Errno::EIO, torn: true };
                bench.disk.set_faults(Faults { fail: Some(fail), ..Default::default() });
                let range = |start, count| SectorRange { start, count };
                let mut failed = 0;
                for start in [0, 3, 2045] {
                    failed += u32::from(bench.reactor.write(start, &[3; 3072]) != Outcome::Done);
                }
                for range in [range(0, 4096), range(5, 9)] {
                    let ended = bench.reactor.run(RequestKind::Discard, &[range], &[]);
                    failed += u32::from(ended != Outcome::Done);
                }
                assert!(!forever || failed > 0 || after > 8, "a dead disk is noticed");
                bench.disk.set_faults(Faults::default());
                assert_eq!(bench.reactor.write(8, &[4; 4096]), Outcome::Done, "and it heals");
                let mut seen = [0; 4096];
                assert_eq!(bench.reactor.read(8, &mut seen), Outcome::Done);
                assert_eq!(seen, [4; 4096]);
                let report = bench.keeper.call(|pool| pool.check()).expect("runs");
                assert!(report.is_clean(), "{:?}", report.findings);
                bench.keeper.stop();
            }
        }
    }
}

#[test]
fn a_volume_grows_and_shrinks_while_it_is_used() {
    for thin in [false, true] {
        let mut bench = Bench::new(sim_geometry(POOL_BYTES), thin);
        let wait = Duration::from_secs(30);
        assert_eq!(bench.reactor.write(0, &vec![7; VOLUME_BYTES as usize]), Outcome::Done);
        let sectors = VOLUME_BYTES / SECTOR_BYTES;
        let mut bytes = [1; 4096];
        assert_eq!(bench.reactor.read(sectors, &mut bytes), Outcome::Failed, "beyond the end");
        bench.keeper.resize(bench.id, 9 * MIB, wait).expect("grow");
        bench.reactor.turn(false);
        assert_eq!(bench.reactor.read(sectors, &mut bytes), Outcome::Done);
        assert_eq!(bytes, [0; 4096], "what is added reads as zeros");
        // A write is under way in the tail: the shrink waits for it.
        bench.disk.set_faults(Faults { slow_polls: 3, ..Default::default() });
        let buffer = PinnedBuffer::new(MIB as usize);
        buffer.segment().copy_from(&vec![7; MIB as usize]);
        let tail = SectorRange { start: 2 * MIB / SECTOR_BYTES, count: MIB / SECTOR_BYTES };
        let write = bench.reactor.submit(RequestKind::Write, &[tail], &[buffer.segment()]);
        let (keeper, id) = (bench.keeper.clone(), bench.id);
        let shrink = std::thread::spawn(move || keeper.resize(id, MIB + 8192, wait));
        let mut ended = Vec::new();
        while !shrink.is_finished() {
            bench.reactor.turn(false);
            ended.extend(bench.reactor.ended());
        }
        shrink.join().expect("no panic").expect("shrunk");
        assert_eq!(ended, [(write.expect("submitted"), Outcome::Done)], "ended before the cut");
        assert_eq!(bench.reactor.read(tail.start, &mut bytes), Outcome::Failed, "it is gone");
        assert_eq!(bench.reactor.read(tail.start / 2, &mut bytes), Outcome::Done);
        assert_eq!(bytes, [7; 4096]);
        bench.keeper.resize(bench.id, 3 * MIB, wait).expect("grow again");
        bench.reactor.turn(false);
        let whole = bench.whole(3 * MIB);
        let (kept, new) = whole.split_at(MIB as usize + 8192);
        assert!(kept.iter().all(|byte| *byte == 7) && new.iter().all(|byte| *byte == 0));
        // And what is written there lands where the pool says, not where the old tail was.
        assert_eq!(bench.reactor.write(tail.start, &[9; 4096]), Outcome::Done);
        let extent = bench.extent(2).expect("mapped");
        assert_eq!(bench.disk.peek(extent * EXTENT_BYTES, 4096), [9; 4096]);
        bench.keeper.stop();
    }
}

#[test]
fn a_shrink_that_was_given_up_never_happens() {
    let mut bench = Bench::new(sim_geometry(POOL_BYTES), true);
    assert_eq!(bench.reactor.write(0, &vec![7; VOLUME_BYTES as usize]), Outcome::Done);
    bench.disk.set_faults(Faults { slow_polls: 3, ..Default::default() });
    let buffer = PinnedBuffer::new(4096);
    let tail = SectorRange { start: 2 * MIB / SECTOR_BYTES, count: 8 };
    let read = bench.reactor.submit(RequestKind::Read, &[tail], &[buffer.segment()]);
    let shrunk = bench.keeper.resize(bench.id, MIB, Duration::ZERO);
    assert_eq!(shrunk.expect_err("the volume uses its tail").kind(), ErrorKind::Busy);
    while bench.reactor.operations() > 0 {
        bench.reactor.turn(false);
    }
    assert_eq!(bench.reactor.ended(), [(read.expect("submitted"), Outcome::Done)]);
    bench.disk.set_faults(Faults::default());
    assert!(bench.whole(VOLUME_BYTES).iter().all(|byte| *byte == 7), "all of it is there");
    bench.keeper.stop();
}

#[test]
fn a_full_pool_fails_or_delays_first_writes_as_the_volume_says() {
    for full in [FullPolicy::Fail, FullPolicy::Wait] {
        let mut bench = Bench::with(sim_geometry(POOL_BYTES), true, full);
        let filler = bench.keeper.call(|pool| {
            let size_bytes = pool.space().free_bytes;
            let name = "vm/filler".to_owned();
            let attributes = Vec::new();
            let class = Class::Volatile;
            pool.create(NewAllocation { name, size_bytes, thin: false, class, attributes })
        });
        let filler = filler.expect("runs").expect("fills the pool");
        if full == FullPolicy::Fail {
            assert_eq!(bench.reactor.write(0, &[1; 4096]), Outcome::Failed);
            bench.keeper.call(move |pool| pool.remove(filler)).expect("runs").expect("removed");
        } else {
            let buffer = PinnedBuffer::new(4096);
            let range = SectorRange { start: 0, count: 8 };
            let id = bench.reactor.submit(RequestKind::Write, &[range], &[buffer.segment()]);
            // A call is answered after what was sent before it, so the request waits by now.
            bench.keeper.call(|_| ()).expect("runs");
            bench.reactor.turn(false);
            assert_eq!(bench.reactor.ended(), []);
            bench.keeper.call(move |pool| pool.remove(filler)).expect("runs").expect("removed");
            while bench.reactor.ended() != [(id.expect("submitted"), Outcome::Done)] {
                bench.reactor.turn(true);
            }
        }
        assert_eq!(bench.reactor.write(0, &[1; 4096]), Outcome::Done);
        bench.keeper.stop();
    }
}

#[test]
fn a_write_that_waits_for_space_is_let_go_of_and_done_when_it_comes_again() {
    let mut bench = Bench::with(sim_geometry(POOL_BYTES), true, FullPolicy::Wait);
    let filler = bench.keeper.call(|pool| {
        let size_bytes = pool.space().free_bytes;
        pool.create(crate::flash::pool::tests::thick("vm/filler", size_bytes))
    });
    let filler = filler.expect("runs").expect("fills the pool");
    let buffer = PinnedBuffer::new(4096);
    buffer.segment().copy_from(&[7; 4096]);
    let data = [buffer.segment()];
    let range = [SectorRange { start: 0, count: 8 }];
    let waiting = |bench: &Bench| {
        // A call is answered after what was sent before it.
        bench.keeper.call(|_| ()).expect("runs");
        (bench.counters.waiting.load(Ordering::Relaxed), bench.keeper.waiting())
    };
    let id = bench.reactor.submit(RequestKind::Write, &range, &data).expect("a slot");
    assert_eq!(waiting(&bench), (1, 1));
    assert!(bench.reactor.let_go(id));
    assert_eq!(waiting(&bench), (0, 0), "the pool is not asked for it any more");
    assert!(!bench.reactor.let_go(id), "once");
    let again = bench.reactor.submit(RequestKind::Write, &range, &data).expect("a slot");
    assert_eq!(waiting(&bench), (1, 1), "it is asked for anew");
    bench.keeper.call(move |pool| pool.remove(filler)).expect("runs").expect("removed");
    while bench.reactor.ended() != [(again, Outcome::Done)] {
        bench.reactor.turn(true);
    }
    assert_eq!(waiting(&bench), (0, 0));
    // What is under way is not let go of: the drive still reads the guest's memory.
    bench.disk.set_faults(Faults { slow_polls: 3, ..Default::default() });
    let id = bench.reactor.submit(RequestKind::Write, &range, &data).expect("a slot");
    assert!(!bench.reactor.let_go(id));
    while bench.reactor.ended() != [(id, Outcome::Done)] {
        bench.reactor.turn(true);
    }
    bench.keeper.stop();
}

#[test]
fn what_waits_for_the_pool_when_the_keeper_stops_is_left_without_an_answer() {
    let mut bench = Bench::with(sim_geometry(POOL_BYTES), true, FullPolicy::Wait);
    assert_eq!(bench.reactor.write(0, &[1; 4096]), Outcome::Done);
    let filler = bench.keeper.call(|pool| {
        let size_bytes = pool.space().free_bytes;
        pool.create(crate::flash::pool::tests::thick("vm/filler", size_bytes))
    });
    filler.expect("runs").expect("fills the pool");
    let buffer = PinnedBuffer::new(4096);
    let write = |bench: &mut Bench, extent: u64| {
        let range = SectorRange { start: extent * EXTENT_SECTORS, count: 8 };
        bench.reactor.submit(RequestKind::Write, &[range], &[buffer.segment()]).expect("a slot");
    };
    write(&mut bench, 1);
    bench.keeper.call(|_| ()).expect("runs");
    assert_eq!(bench.keeper.waiting(), 1, "no extent is left");
    bench.keeper.clone().stop();
    // It ended while the guest went on: what it would have been asked for waits as well.
    write(&mut bench, 2);
    let first = [SectorRange { start: 0, count: EXTENT_SECTORS }];
    bench.reactor.submit(RequestKind::Discard, &first, &[]).expect("a slot");
    bench.reactor.turn(false);
    assert_eq!(bench.reactor.ended(), [], "nobody is told of a failure");
    let mut seen = [0; 4096];
    let read = SectorRange { start: 3 * EXTENT_SECTORS, count: 8 };
    bench.reactor.submit(RequestKind::Read, &[read], &[buffer.segment()]).expect("a slot");
    bench.reactor.turn(false);
    let ended = bench.reactor.ended();
    assert_eq!(ended.iter().map(|(_, outcome)| *outcome).collect::<Vec<_>>(), [Outcome::Done]);
    buffer.segment().copy_to(&mut seen);
    assert_eq!(seen, [0; 4096], "what needs no pool is served until the end");
}

/// The cost of the single-operation path, without disk and reactor. Printed; the bound is wide
/// because other tests run meanwhile.
/// Counts what a volume asks of its reactor.
#[derive(Default)]
struct Counts {
    submitted: u64,
    completed: u64,
    others: u64,
}

impl Io for Counts {
    fn now(&self) -> crate::base::clock::Nanos {
        crate::base::clock::Nanos(0)
    }
    fn submit(&mut self, _: DiskIndex, _: Operation<'_>, _: u64) {
        self.submitted += 1;
    }
    fn complete(&mut self, _: RequestId, _: Outcome) {
        self.completed += 1;
    }
    fn wake_at(&mut self, _: crate::base::clock::Nanos) {
        self.others += 1;
    }
}

/// How long it takes is measured by `cargo xtask bench`, with a pool that has no drive.
#[test]
fn the_fast_path_is_one_operation_and_takes_no_memory() {
    let bench = Bench::new(sim_geometry(POOL_BYTES), false);
    let mut volume = bench.reactor.volume;
    let buffer = PinnedBuffer::new(4096);
    let segments = [buffer.segment()];
    let origin = crate::io::volume::Origin { door: 0, queue: 0, counter: 0, replayed: false };
    let mut io = Counts::default();
    let capacity = volume.parked.capacity() + volume.holds.capacity();
    let rounds = 10_000;
    for round in 0..rounds {
        let ranges = [SectorRange { start: round * 8 % 10_240, count: 8 }];
        let id = RequestId((round % 16) as u32);
        let kind = if round % 2 == 0 { RequestKind::Read } else { RequestKind::Write };
        volume.submit(Request { id, kind, ranges: &ranges, segments: &segments, origin }, &mut io);
        assert!(volume.slots[id.0 as usize].task.is_none(), "no task is made of it");
        assert_eq!(io.submitted, round + 1, "one operation each");
        volume.completed(id.0.into(), Ok(()), &mut io);
        assert_eq!(io.completed, round + 1, "and its end is the request's");
    }
    assert_eq!(io.others, 0);
    assert_eq!(volume.parked.capacity() + volume.holds.capacity(), capacity);
    assert_eq!(bench.counters.bounced.load(Ordering::Relaxed), 0);
    bench.keeper.stop();
}

#[test]
fn an_extent_is_given_back_only_when_nothing_is_under_way_on_it_and_nothing_starts_there() {
    let mut bench = Bench::new(sim_geometry(POOL_BYTES), true);
    assert_eq!(bench.reactor.write(0, &[1; 4096]), Outcome::Done);
    let extent = [SectorRange { start: 0, count: EXTENT_SECTORS }];
    let block = [SectorRange { start: 8, count: 8 }];
    let buffer = PinnedBuffer::new(4096);
    buffer.segment().copy_from(&[2; 4096]);
    let data = [buffer.segment()];
    // A write is under way: the discard waits for it before it asks the pool.
    bench.disk.set_faults(Faults { slow_polls: 3, ..Default::default() });
    let first = bench.reactor.submit(RequestKind::Write, &block, &data).expect("submitted");
    let discard = bench.reactor.submit(RequestKind::Discard, &extent, &[]).expect("submitted");
    bench.reactor.turn(false);
    assert!(bench.extent(0).is_some() && bench.reactor.ended().is_empty(), "still its own");
    // The keeper is kept from answering: a new write waits, and does not reach the disk.
    let (release, gate) = std::sync::mpsc::channel::<()>();
    let (entered, inside) = std::sync::mpsc::channel();
    let keeper = bench.keeper.clone();
    let busy = std::thread::spawn(move || {
        keeper.call(move |_| {
            entered.send(()).expect("the test listens");
            gate.recv().expect("released");
        })
    });
    inside.recv().expect("the keeper is busy");
    bench.reactor.turn(true);
    assert_eq!(bench.reactor.ended(), [(first, Outcome::Done)]);
    let operations = bench.disk.operations();
    let second = bench.reactor.submit(RequestKind::Write, &block, &data).expect("submitted");
    bench.reactor.turn(false);
    assert_eq!(bench.disk.operations(), operations, "the extent is on its way out");
    release.send(()).expect("waits");
    busy.join().expect("no panic").expect("runs");
    let mut ended = Vec::new();
    while ended.len() < 2 {
        bench.reactor.turn(true);
        ended.extend(bench.reactor.ended());
    }
    ended.sort_by_key(|(id, _)| id.0);
    let mut expected = [(discard, Outcome::Done), (second, Outcome::Done)];
    expected.sort_by_key(|(id, _)| id.0);
    assert_eq!(ended, expected);
    let place = bench.extent(0).expect("mapped anew") * EXTENT_BYTES;
    assert_eq!(bench.disk.peek(place, 4096), [0; 4096], "what was discarded");
    assert_eq!(bench.disk.peek(place + 4096, 4096), [2; 4096], "what was written after");
    bench.keeper.stop();
}
