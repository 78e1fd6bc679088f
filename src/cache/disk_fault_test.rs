//! A flash that fails to flush, and a backing that fails to read and write for a while.

use super::tests::*;
use super::*;
use crate::base::units::{KIB, SECTOR_BYTES};
use crate::cache::scan::scan;
use crate::io::buffer::PinnedBuffer;
use crate::io::crash::Explorer;
use crate::io::sim::{Failure, Faults, SimDisk, sim_geometry};
use crate::io::volume::{RequestId, SectorRange};

fn weak() -> CacheOptions {
    CacheOptions { strong: false, ..options() }
}

fn failing(forever: bool) -> Faults {
    let fail = Failure { after: 0, forever, errno: Errno::EIO, torn: true };
    Faults { fail: Some(fail), ..Faults::default() }
}

fn flushes_fail(flush_failures: u32) -> Faults {
    Faults { flush_failures, ..Faults::default() }
}

fn state(rig: &mut Rig) -> CacheState {
    rig.ask(|reply| CacheMessage::Status { reply });
    rig.status.gauges().state
}

/// What the worst power cut leaves of the flash, as the next daemon serves it.
fn after_the_worst_cut(rig: &Rig) -> Rig {
    let flash = &rig.flash;
    let cut = Explorer::new(1).cut(&flash.recording(), flash.position(), 0);
    let mut after = Rig::on(cut, again(&rig.backing), weak());
    after.truth = rig.truth.clone();
    after
}

/// The simulated drive drops for good what a failed flush should have covered.
#[test]
fn what_a_failed_flush_should_have_covered_is_written_again() {
    for failures in 1..4 {
        let mut rig = Rig::new(shape(6, 64 * KIB), weak());
        rig.flash.record();
        for round in 0..40 {
            rig.write(round * 24 % 3000, 30);
            if round % 5 == 0 {
                rig.flash.set_faults(flushes_fail(failures));
                assert_eq!(rig.reactor.flush(), Outcome::Done);
                after_the_worst_cut(&rig).check();
            }
        }
        assert_eq!(rig.reactor.flush(), Outcome::Done);
        let counters = &rig.status.counters;
        assert!(counters.flush_failures.load(Ordering::Relaxed) >= u64::from(failures));
        after_the_worst_cut(&rig).drain();
        rig.drain();
    }
}

/// All of the log holds what is not durable: writing it again needs no space.
#[test]
fn a_log_full_of_what_is_not_durable_survives_failed_flushes() {
    let mut rig = Rig::new(shape(4, 64 * KIB), weak());
    for round in 0..12 {
        rig.flash.set_faults(flushes_fail(2));
        rig.write(round * 100, 900);
    }
    rig.check();
    rig.drain();
    assert!(rig.status.counters.flush_failures.load(Ordering::Relaxed) > 10);
}

/// A save of the tables flushes the flash when all of the log is durable; that flush ends after an
/// append that was durable by itself, and says less.
#[test]
fn a_flush_that_ends_late_takes_no_durability_back() {
    let mut rig = Rig::new(shape(6, 64 * KIB), options());
    rig.write(0, 8);
    let mode = Mode::WriteThrough;
    rig.ask(|reply| CacheMessage::SetMode { mode, reply }).expect("switched");
    let slow = |slow_polls| Faults { slow_polls, ..Faults::default() };
    // The drain of this write is under way all the time.
    rig.backing.set_faults(slow(60));
    let (first, _buffer) = begin(&mut rig, RequestKind::Write, 8, 8);
    (0..10).for_each(|_| rig.reactor.turn(false));
    rig.flash.set_faults(slow(30));
    let flushes = rig.flash.operations();
    rig.tell(CacheMessage::Checkpoint { reply: Box::new(|saved| saved.expect("saved")) });
    rig.reactor.turn(false);
    assert_eq!(rig.flash.operations(), flushes + 1, "the flush alone");
    rig.flash.set_faults(Faults::default());
    let (second, _other) = begin(&mut rig, RequestKind::Write, 16, 8);
    (0..10).for_each(|_| rig.reactor.turn(false));
    let durable = |rig: &Rig| rig.reactor.volume.core.journal.durable_through;
    assert_eq!((durable(&rig), rig.reactor.ended()), (3, vec![]), "appended, not drained");
    rig.backing.set_faults(Faults::default());
    let mut ended = Vec::new();
    for _ in 0..1000 {
        rig.reactor.turn(false);
        assert_eq!(durable(&rig), 3);
        ended.extend(rig.reactor.ended());
    }
    assert_eq!(ended, [(first, Outcome::Done), (second, Outcome::Done)]);
}

#[test]
fn what_is_lost_in_a_failed_flush_fences_the_disk_and_names_the_last_good_point() {
    let mut rig = Rig::new(shape(6, 64 * KIB), weak());
    rig.write(0, 8);
    assert_eq!(rig.reactor.flush(), Outcome::Done);
    rig.write(64, 8);
    rig.write(80, 8);
    let scan = scan(&mut medium(&again(&rig.flash)), 0).expect("a log");
    let segment = &scan.segments[0];
    let batch = &segment.batches[2];
    let at = scan.root.shape.segment_offset(segment.index) + u64::from(batch.position);
    rig.flash.poke(at + u64::from(batch.header.data_start), &[0; 512]);
    rig.flash.set_faults(flushes_fail(1));
    assert_eq!(rig.reactor.flush(), Outcome::Failed);
    assert_eq!(rig.reactor.write(0, &[1; 512]), Outcome::Failed);
    let CacheState::Fenced(why) = state(&mut rig) else { panic!("fenced") };
    assert!(why.contains("has lost what was written") && why.contains("up to point 1"), "{why}");
}

#[test]
fn a_flash_that_neither_flushes_nor_writes_fences_the_disk() {
    let mut rig = Rig::new(shape(6, 64 * KIB), weak());
    rig.write(0, 8);
    assert_eq!(rig.reactor.flush(), Outcome::Done);
    rig.write(8, 8);
    rig.flash.set_faults(failing(true));
    assert_eq!(rig.reactor.flush(), Outcome::Failed);
    let CacheState::Fenced(why) = state(&mut rig) else { panic!("fenced") };
    assert!(why.contains("up to point 1 is safe"), "{why}");
    let mut after = rig.killed(weak());
    after.check_range(0, 8);
}

/// A disk whose first 64 sectors only the backing has.
fn cold(mode: Mode) -> Rig {
    let backing = SimDisk::new(DISK_BYTES);
    let pattern: Vec<u8> = (0..64 * SECTOR_BYTES).map(|at| at as u8 ^ 0x5a).collect();
    backing.poke(0, &pattern);
    let mut rig = Rig::on(formatted(shape(6, 64 * KIB)), backing, options());
    rig.truth[..pattern.len()].copy_from_slice(&pattern);
    if mode != Mode::WriteBack {
        rig.ask(|reply| CacheMessage::SetMode { mode, reply }).expect("switched");
    }
    rig
}

/// Submits without waiting; the buffer must stay.
fn begin(rig: &mut Rig, kind: RequestKind, start: u64, count: u64) -> (RequestId, PinnedBuffer) {
    let buffer = PinnedBuffer::new((count * SECTOR_BYTES) as usize);
    buffer.segment().copy_from(&vec![7; (count * SECTOR_BYTES) as usize]);
    let range = SectorRange { start, count };
    let id = rig.reactor.submit(kind, &[range], &[buffer.segment()]).expect("room");
    (id, buffer)
}

/// Lets time pass in small steps; what ended.
fn pass(rig: &mut Rig, seconds: u64) -> Vec<(RequestId, Outcome)> {
    let mut ended = Vec::new();
    for _ in 0..seconds * 20 {
        rig.reactor.advance(Duration::from_millis(50));
        rig.reactor.turn(false);
        ended.extend(rig.reactor.ended());
    }
    ended
}

#[test]
fn a_read_waits_for_a_backing_that_is_away_and_is_right_when_it_is_back() {
    let mut rig = cold(Mode::WriteBack);
    rig.backing.set_faults(failing(true));
    let (id, buffer) = begin(&mut rig, RequestKind::Read, 3, 20);
    assert_eq!(pass(&mut rig, 50), []);
    assert_eq!(state(&mut rig), CacheState::WaitingForBacking);
    assert_eq!(rig.status.gauges().waiting_for_backing, 1);
    rig.backing.set_faults(Faults::default());
    assert_eq!(pass(&mut rig, 2), [(id, Outcome::Done)]);
    let mut bytes = vec![0; 20 * 512];
    buffer.segment().copy_to(&mut bytes);
    assert!(bytes == rig.truth[3 * 512..23 * 512]);
    assert_eq!(state(&mut rig), CacheState::Serving);
}

#[test]
fn a_backing_that_stays_away_fails_a_read_when_its_time_is_over() {
    let mut rig = cold(Mode::WriteBack);
    rig.backing.set_faults(failing(true));
    let limit = Duration::from_secs(5);
    rig.tell(CacheMessage::SetBackingTimeout { limit });
    let (id, _buffer) = begin(&mut rig, RequestKind::Read, 0, 8);
    assert_eq!(pass(&mut rig, 4), []);
    assert_eq!(pass(&mut rig, 3), [(id, Outcome::Failed)]);
    rig.backing.set_faults(Faults::default());
    rig.check();
}

#[test]
fn what_the_flash_holds_is_read_and_written_while_the_backing_is_away() {
    let mut rig = cold(Mode::WriteBack);
    rig.write(100, 30);
    rig.drain();
    rig.write(130, 30);
    rig.backing.set_faults(failing(true));
    let (waiting, _buffer) = begin(&mut rig, RequestKind::Read, 0, 8);
    assert_eq!(pass(&mut rig, 1), []);
    let before = rig.reactor.now();
    let (hit, _other) = begin(&mut rig, RequestKind::Read, 100, 60);
    let (write, _third) = begin(&mut rig, RequestKind::Write, 100, 8);
    let mut ended = Vec::new();
    while ended.len() < 2 {
        rig.reactor.turn(false);
        ended.extend(rig.reactor.ended());
    }
    assert_eq!(rig.reactor.now(), before, "without waiting for anything");
    assert!(
        ended.iter().all(|(id, outcome)| [hit, write].contains(id) && *outcome == Outcome::Done)
    );
    rig.backing.set_faults(Faults::default());
    assert_eq!(pass(&mut rig, 2), [(waiting, Outcome::Done)]);
}

/// One place of the backing is bad for good: what is tried there is bounded, and nobody else waits.
#[test]
fn attempts_grow_apart_while_others_succeed() {
    let mut rig = cold(Mode::WriteBack);
    rig.backing.set_faults(failing(true));
    let (_bad, _buffer) = begin(&mut rig, RequestKind::Read, 0, 8);
    let before = rig.backing.operations();
    assert_eq!(pass(&mut rig, 30), []);
    let attempts = rig.backing.operations() - before;
    assert!((20..60).contains(&attempts), "{attempts} attempts in 30 s");
}

#[test]
fn writes_past_the_log_wait_for_the_backing_and_flushes_tell_the_truth() {
    for mode in [Mode::WriteAround, Mode::ReadOnly, Mode::Bypass] {
        let mut rig = cold(mode);
        rig.write(0, 8);
        rig.backing.set_faults(failing(true));
        assert_eq!(rig.reactor.flush(), Outcome::Failed, "what it covers may be lost");
        let (write, _data) = begin(&mut rig, RequestKind::Write, 1000, 8);
        let (zeroes, _none) = {
            let range = SectorRange { start: 5, count: 9 };
            let kind = RequestKind::WriteZeroes { unmap: true };
            (rig.reactor.submit(kind, &[range], &[]).expect("room"), ())
        };
        let (read, _more) = begin(&mut rig, RequestKind::Read, 32, 8);
        assert_eq!(pass(&mut rig, 20), [], "{mode:?}");
        rig.backing.set_faults(Faults::default());
        let mut ended = pass(&mut rig, 2);
        ended.sort_unstable_by_key(|(id, _)| id.0);
        let mut wanted = [write, zeroes, read].map(|id| (id, Outcome::Done));
        wanted.sort_unstable_by_key(|(id, _)| id.0);
        assert_eq!(ended, wanted, "{mode:?}");
        rig.truth[1000 * 512..1008 * 512].fill(7);
        rig.truth[5 * 512..14 * 512].fill(0);
        rig.check();
        assert!(rig.backing.peek(0, DISK_BYTES as usize) == rig.truth, "{mode:?}");
    }
}

#[test]
fn a_fence_ends_what_waits_for_the_backing() {
    let mut rig = cold(Mode::WriteBack);
    rig.backing.set_faults(failing(true));
    let (read, _buffer) = begin(&mut rig, RequestKind::Read, 0, 8);
    assert_eq!(pass(&mut rig, 1), []);
    rig.flash.set_faults(failing(true));
    let (write, _data) = begin(&mut rig, RequestKind::Write, 100, 8);
    let mut ended = pass(&mut rig, 1);
    ended.sort_unstable_by_key(|(id, _)| id.0);
    let mut wanted = [(read, Outcome::Failed), (write, Outcome::Failed)];
    wanted.sort_unstable_by_key(|(id, _)| id.0);
    assert_eq!(ended, wanted);
    assert!(matches!(state(&mut rig), CacheState::Fenced(_)));
}

/// A backing of 4 KiB blocks that can neither zero nor discard.
fn coarse() -> SimDisk {
    let mut geometry = sim_geometry(DISK_BYTES);
    (geometry.block_bytes, geometry.memory_alignment) = (4096, 4096);
    (geometry.zero, geometry.discard) = (false, false);
    SimDisk::with(SimDisk::new(DISK_BYTES).content(), geometry, 3)
}

/// Two ranges of one request share a block, and so do sixty requests under way together.
#[test]
fn parts_of_one_block_do_not_undo_each_other() {
    for mode in [Mode::WriteAround, Mode::ReadOnly, Mode::Bypass] {
        let mut rig = Rig::on(formatted(shape(6, 64 * KIB)), coarse(), options());
        rig.ask(|reply| CacheMessage::SetMode { mode, reply }).expect("switched");
        rig.write(0, 64);
        rig.zero(RequestKind::Discard, &[(1, 2), (4, 2), (7, 20), (30, 1)]);
        rig.check();
        let faults = Faults { reorder: true, slow_polls: 1, ..Faults::default() };
        rig.backing.set_faults(faults);
        let parts: Vec<_> = (0..60).map(|at| begin(&mut rig, RequestKind::Write, at, 1)).collect();
        let mut ended = Vec::new();
        while ended.len() < parts.len() {
            rig.reactor.turn(true);
            ended.extend(rig.reactor.ended());
        }
        assert!(ended.iter().all(|(_, outcome)| *outcome == Outcome::Done), "{mode:?}");
        rig.truth[..60 * 512].fill(7);
        rig.check();
        assert!(rig.backing.peek(0, DISK_BYTES as usize) == rig.truth, "{mode:?}");
    }
}

/// Overlapping writes of parts of blocks are done in the order in which they came.
#[test]
fn overlapping_parts_of_a_block_keep_their_order() {
    let mut rig = Rig::on(formatted(shape(6, 64 * KIB)), coarse(), options());
    let mode = Mode::WriteAround;
    rig.ask(|reply| CacheMessage::SetMode { mode, reply }).expect("switched");
    rig.backing.set_faults(Faults { reorder: true, slow_polls: 2, ..Faults::default() });
    let mut random = fastrand::Rng::with_seed(4);
    let mut buffers = Vec::new();
    for value in 1..=50u8 {
        let (start, count) = (random.u64(0..12), random.u64(1..7));
        let bytes = (count * SECTOR_BYTES) as usize;
        let buffer = PinnedBuffer::new(8192);
        buffer.segment().copy_from(&[value; 8192]);
        let part = [buffer.segment().part(0, bytes)];
        let range = SectorRange { start, count };
        rig.reactor.submit(RequestKind::Write, &[range], &part).expect("room");
        let from = (start * SECTOR_BYTES) as usize;
        rig.truth[from..from + bytes].fill(value);
        buffers.push(buffer);
    }
    let mut ended = 0;
    while ended < buffers.len() {
        rig.reactor.turn(true);
        ended += rig.reactor.ended().len();
    }
    rig.check();
}

/// Its memory may go with it: nothing of it is tried any more, and nobody waits for it.
#[test]
fn a_front_end_that_goes_takes_along_what_waits_for_the_backing() {
    for mode in [Mode::WriteBack, Mode::WriteAround] {
        let backing = coarse();
        let mut rig = Rig::on(formatted(shape(6, 64 * KIB)), backing, options());
        rig.ask(|reply| CacheMessage::SetMode { mode, reply }).expect("switched");
        rig.backing.set_faults(failing(true));
        let (read, _first) = begin(&mut rig, RequestKind::Read, 640, 8);
        let mut gone = vec![read];
        if mode == Mode::WriteAround {
            // The second waits for the first, in whose block it lies.
            gone.push(begin(&mut rig, RequestKind::Write, 3, 2).0);
            gone.push(begin(&mut rig, RequestKind::Write, 5, 2).0);
        }
        assert_eq!(pass(&mut rig, 3), []);
        for id in gone {
            assert!(rig.reactor.let_go(id), "{mode:?}: {id:?} only waits");
            pass(&mut rig, 1);
        }
        rig.backing.set_faults(Faults::default());
        assert_eq!(pass(&mut rig, 3), [], "{mode:?}");
        assert_eq!(rig.reactor.operations(), 0);
        // The third was begun when the second went, as far as a failing backing let it.
        rig.write(0, 40);
        rig.check();
        let mode = Mode::WriteThrough;
        rig.ask(|reply| CacheMessage::SetMode { mode, reply }).expect("nothing is under way");
    }
}
