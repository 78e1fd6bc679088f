//! A cached disk whose allocation grows and shrinks while it serves.

use crate::base::ErrorKind;
use crate::base::Result;
use crate::base::units::{KIB, MIB};
use crate::cache::disk::tests::{DISK_BYTES, Rig, options, shape};
use crate::cache::message::CacheMessage;
use crate::cache::place::Place;
use crate::io::buffer::PinnedBuffer;
use crate::io::disk::{Disk, Errno};
use crate::io::sim::{Failure, Faults};
use crate::io::volume::{Outcome, RequestKind, SectorRange};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const SEGMENT: u64 = 64 * KIB;

/// What other owners of extents that were given back have written there.
const FOREIGN: u8 = 0xd1;

/// The allocation's bytes with so many segments.
fn bytes(segments: u64) -> u64 {
    MIB + segments * SEGMENT
}

/// As the pool and control do it: extents first, then the disk.
fn grow(rig: &mut Rig, segments: u64) -> Result<()> {
    let (before, after) = (rig.flash.geometry().size_bytes, bytes(segments));
    rig.flash.set_size(after);
    rig.flash.poke(before, &vec![0; (after - before) as usize]);
    let place = Place::whole(after);
    rig.ask(|reply| CacheMessage::Grow { place, reply })
}

/// The disk first, then the pool, which gives the extents to others.
fn shrink(rig: &mut Rig, segments: u64) -> Result<()> {
    let (before, after) = (rig.flash.geometry().size_bytes, bytes(segments));
    rig.ask(|reply| CacheMessage::Shrink { size_bytes: after, reply })?;
    rig.flash.poke(after, &vec![FOREIGN; (before - after) as usize]);
    rig.flash.set_size(after);
    rig.tell(CacheMessage::Shrunk);
    Ok(())
}

fn size(rig: &mut Rig) -> (u64, Option<u64>) {
    rig.ask(|reply| CacheMessage::Status { reply });
    let gauges = rig.status.gauges();
    (gauges.size_bytes, gauges.resizing_to)
}

#[test]
fn a_shrink_keeps_what_is_dirty_and_gives_back_what_it_says() {
    let mut rig = Rig::new(shape(16, SEGMENT), options());
    for at in 0..40 {
        rig.write(at * 30, 30);
    }
    rig.drain();
    for at in 0..12 {
        rig.write(at * 40, 40);
    }
    rig.ask(|reply| CacheMessage::Status { reply });
    assert!(rig.status.gauges().dirty_bytes > 0);
    shrink(&mut rig, 5).expect("shrunk");
    assert_eq!(size(&mut rig), (bytes(5), None));
    rig.check();
    for at in 0..40 {
        rig.write(at * 50, 50);
    }
    rig.check();
    let foreign = rig.flash.peek(bytes(5), (11 * SEGMENT) as usize);
    assert!(foreign.iter().all(|byte| *byte == FOREIGN), "nothing was written there any more");
    let mut again = rig.killed(options());
    again.check();
    again.drain();
    assert_eq!(size(&mut again), (bytes(5), None));
}

/// Writes that wait for a full log, over a backing that is away, go on at once.
#[test]
fn growth_is_usable_at_once() {
    let mut rig = Rig::new(shape(4, SEGMENT), options());
    let fail = Failure { after: 0, forever: true, errno: Errno::EIO, torn: false };
    rig.backing.set_faults(Faults { fail: Some(fail), ..Faults::default() });
    let buffer = PinnedBuffer::new(8192);
    buffer.segment().copy_from(&[7; 8192]);
    for at in 0..60 {
        let range = SectorRange { start: at * 16, count: 16 };
        let part = [buffer.segment()];
        rig.reactor.submit(RequestKind::Write, &[range], &part).expect("fewer than 64");
    }
    let mut ended = 0;
    for _ in 0..100 {
        rig.reactor.turn(false);
        ended += rig.reactor.ended().len();
    }
    assert!((10..40).contains(&ended), "the log is full: {ended} of 60 writes have a place");
    grow(&mut rig, 20).expect("grown");
    for _ in 0..100 {
        rig.reactor.turn(false);
        ended += rig.reactor.ended().iter().filter(|ended| ended.1 == Outcome::Done).count();
    }
    assert_eq!(ended, 60);
    rig.backing.set_faults(Faults::default());
    rig.truth[..60 * 8192].fill(7);
    rig.check();
    rig.drain();
    let misses = |rig: &mut Rig| {
        let before = rig.status.counters.misses.load(Ordering::Relaxed);
        rig.check_range(0, 60 * 16);
        rig.status.counters.misses.load(Ordering::Relaxed) - before
    };
    assert_eq!(misses(&mut rig), 0, "all of it is cached");
    shrink(&mut rig, 17).expect("shrunk");
    grow(&mut rig, 30).expect("grown");
    assert_eq!(misses(&mut rig), 0, "all of it is cached as before");
    rig.killed(options()).check();
}

#[test]
fn too_small_is_refused_with_the_least_that_there_can_be() {
    let mut rig = Rig::new(shape(16, 512 * KIB), options());
    let refused = rig.ask(|reply| CacheMessage::Shrink { size_bytes: 2 * MIB, reply });
    let error = refused.expect_err("four segments are needed");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let text = "vm/disk: it cannot have 2MiB: its log has segments of 512KiB, and the least that \
                it works with is 3MiB";
    assert_eq!(error.to_string(), text);
    rig.ask(|reply| CacheMessage::Shrink { size_bytes: 3 * MIB, reply }).expect("the least");
    let busy = rig.ask(|reply| CacheMessage::Shrink { size_bytes: 3 * MIB, reply });
    assert_eq!(busy.expect_err("not given back yet").kind(), ErrorKind::Busy);
}

#[test]
fn resizes_up_and_down_under_requests_and_kills_lose_nothing() {
    for seed in 0..6 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut rig = Rig::new(shape(6, SEGMENT), options());
        let mut segments = 6;
        for _ in 0..40 {
            for _ in 0..random.usize(0..40) {
                rig.random_step(&mut random, 50);
            }
            let to = random.u64(4..20);
            match to > segments {
                true => grow(&mut rig, to).expect("grown"),
                false => shrink(&mut rig, to).expect("shrunk"),
            }
            segments = to;
            if random.u8(0..4) == 0 {
                rig = rig.killed(options());
                rig.check();
            }
        }
        rig.check();
        rig.drain();
        assert_eq!(size(&mut rig), (bytes(segments), None), "seed {seed}");
        rig.killed(options()).check();
    }
}

/// What hit before a growth hits after it: a growth drops nothing.
#[test]
fn twenty_resizes_under_requests_drop_nothing_at_a_growth() {
    let mut rig = Rig::new(shape(6, SEGMENT), options());
    let mut random = fastrand::Rng::with_seed(20);
    let requests = |rig: &mut Rig, random: &mut fastrand::Rng| {
        for _ in 0..60 {
            let start = random.u64(0..DISK_BYTES / 4096) * 8;
            match random.u8(0..3) {
                0 => rig.write(start, 8),
                _ => rig.check_range(start, 8),
            }
        }
    };
    let kept = |rig: &mut Rig| {
        rig.ask(|reply| CacheMessage::Status { reply });
        rig.status.gauges().index_pieces
    };
    for round in 0..10 {
        requests(&mut rig, &mut random);
        // Room is made for the log until there is enough.
        rig.drain();
        rig.reactor.rest(Duration::from_secs(1));
        let before = kept(&mut rig);
        assert!(before > 0, "something is cached");
        grow(&mut rig, 12 + round % 3).expect("grown");
        let after = kept(&mut rig);
        assert!(after >= before, "round {round}: {after} blocks after the growth, {before} before");
        rig.check();
        requests(&mut rig, &mut random);
        shrink(&mut rig, 6 + round % 3).expect("shrunk");
        rig.check();
    }
    rig.drain();
    rig.killed(options()).check();
}

/// Everything was drained and lay behind the new end: no header is left that knows the numbers.
#[test]
fn numbers_go_on_when_all_segments_are_gone() {
    let mut rig = Rig::new(shape(12, SEGMENT), options());
    // The first four segments are in use and drained, the newest lies behind.
    for at in 0..22 {
        rig.write(at * 30, 30);
    }
    rig.drain();
    rig.ask(|reply| CacheMessage::Status { reply });
    let before = rig.status.gauges().head_won;
    shrink(&mut rig, 4).expect("shrunk");
    let mut rig = rig.killed(options());
    rig.ask(|reply| CacheMessage::Status { reply });
    assert_eq!(rig.status.gauges().head_won, before);
    rig.check();
    rig.write(3, 5);
    let mut rig = rig.killed(options());
    rig.check();
    grow(&mut rig, 12).expect("grown");
    for at in 0..30 {
        rig.write(at * 30, 30);
    }
    let mut rig = rig.killed(options());
    rig.check();
    rig.drain();
}

/// The host died when the root had the smaller size and the pool had not taken the rest back.
#[test]
fn an_opening_uses_all_of_the_allocation() {
    let mut rig = Rig::new(shape(12, SEGMENT), options());
    for at in 0..40 {
        rig.write(at * 30, 30);
    }
    let refused = rig.ask(|reply| CacheMessage::Shrink { size_bytes: bytes(5), reply });
    refused.expect("the disk has shrunk");
    rig.write(0, 9);
    let mut rig = rig.killed(options());
    assert_eq!(size(&mut rig), (bytes(12), None), "the old size");
    rig.check();
    for at in 0..90 {
        rig.write(at * 30, 30);
    }
    let mut rig = rig.killed(options());
    rig.check();
    rig.drain();
}

#[test]
fn a_shrink_that_waits_for_the_backing_makes_way_for_a_growth() {
    let mut rig = Rig::new(shape(8, SEGMENT), options());
    let fail = Failure { after: 0, forever: true, errno: Errno::EIO, torn: false };
    rig.backing.set_faults(Faults { fail: Some(fail), ..Faults::default() });
    // About a segment each.
    for at in 0..6 {
        rig.write(at * 60, 60);
    }
    let answer: Arc<Mutex<Option<Result<()>>>> = Arc::default();
    let slot = answer.clone();
    let reply = Box::new(move |result| *slot.lock().expect("one thread") = Some(result));
    rig.tell(CacheMessage::Shrink { size_bytes: bytes(4), reply });
    assert_eq!(size(&mut rig), (bytes(8), Some(bytes(4))));
    assert!(answer.lock().expect("one thread").is_none(), "it is dirty");
    grow(&mut rig, 10).expect("grown");
    let ended = answer.lock().expect("one thread").take().expect("answered");
    assert_eq!(ended.expect_err("another size").kind(), ErrorKind::Busy);
    assert_eq!(size(&mut rig), (bytes(10), None));
    rig.write(1000, 60);
    rig.backing.set_faults(Faults::default());
    rig.check_range(0, DISK_BYTES / 512);
    rig.drain();
}
