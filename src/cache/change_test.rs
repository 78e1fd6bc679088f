//! Changes of mode that meet requests, failures and each other.

use super::*;
use crate::base::units::{KIB, SECTOR_BYTES};
use crate::cache::disk::tests::{DISK_BYTES, Rig, options, shape};
use crate::cache::message::CacheMessage;
use crate::cache::status::CacheState;
use crate::io::buffer::PinnedBuffer;
use crate::io::sim::{Failure, Faults};
use crate::io::volume::{Origin, Outcome, RequestId, RequestKind, SectorRange};
use std::sync::Mutex;

/// More turns than anything here takes that goes on.
const TURNS: usize = 300;

fn fails(forever: bool) -> Faults {
    let fail = Failure { after: 0, forever, errno: Errno::EIO, torn: false };
    Faults { fail: Some(fail), ..Faults::default() }
}

fn flush_fails() -> Faults {
    Faults { flush_failures: 1, ..Faults::default() }
}

fn rig_in(mode: Mode) -> Rig {
    let mut rig = Rig::new(shape(6, 64 * KIB), options());
    rig.ask(|reply| CacheMessage::SetMode { mode, reply }).expect("changed");
    rig
}

/// What a change came to; `None`: it is under way.
type Answer = Arc<Mutex<Option<Result<()>>>>;

/// Begins a change: to another mode, or the detach.
fn begin(rig: &mut Rig, to: Option<Mode>) -> Answer {
    let answer = Answer::default();
    let slot = answer.clone();
    let reply = Box::new(move |result| *slot.lock().expect("one thread") = Some(result));
    rig.tell(match to {
        Some(mode) => CacheMessage::SetMode { mode, reply },
        None => CacheMessage::Close { reply },
    });
    rig.reactor.turn(false);
    answer
}

fn taken(answer: &Answer) -> Option<Result<()>> {
    answer.lock().expect("one thread").take()
}

/// Submits a write of 4 KiB. The buffer stays until the request has ended.
fn submit(rig: &mut Rig, start: u64, value: u8) -> (RequestId, PinnedBuffer) {
    let buffer = PinnedBuffer::new(4096);
    buffer.segment().copy_from(&[value; 4096]);
    let range = SectorRange { start, count: 8 };
    let segments = [buffer.segment()];
    let id = rig.reactor.submit(RequestKind::Write, &[range], &segments).expect("room");
    let from = (start * SECTOR_BYTES) as usize;
    rig.truth[from..from + 4096].fill(value);
    (id, buffer)
}

/// Turns until the request has ended, but not for ever.
fn outcome(rig: &mut Rig, id: RequestId) -> Option<Outcome> {
    for _ in 0..TURNS {
        rig.reactor.turn(false);
        if let Some((_, outcome)) = rig.reactor.ended().into_iter().find(|(other, _)| *other == id)
        {
            return Some(outcome);
        }
        // Whatever is tried again is tried now.
        rig.reactor.advance(std::time::Duration::from_millis(20));
    }
    None
}

fn mode(rig: &mut Rig) -> Mode {
    rig.ask(|reply| CacheMessage::Status { reply });
    rig.status.gauges().mode
}

/// A write that waited for the change goes past the log as all others do there: one in the log
/// would come to the backing later than newer ones.
#[test]
fn a_write_that_waited_for_a_change_that_failed_never_overwrites_a_newer_one() {
    for to in [Some(Mode::WriteBack), Some(Mode::WriteThrough), None] {
        let mut rig = rig_in(Mode::WriteAround);
        rig.write(100, 8);
        rig.backing.set_faults(flush_fails());
        let answer = begin(&mut rig, to);
        let (older, _older) = submit(&mut rig, 64, 1);
        assert_eq!(outcome(&mut rig, older), Some(Outcome::Done), "{to:?}");
        let error = taken(&answer).expect("it has ended").expect_err("the flush failed");
        assert!(error.to_string().contains("failed to flush"), "{error}");
        let (newer, _newer) = submit(&mut rig, 64, 2);
        assert_eq!(outcome(&mut rig, newer), Some(Outcome::Done), "{to:?}");
        assert_eq!(mode(&mut rig), Mode::WriteAround, "{to:?}");
        rig.check();
        rig.drain();
        rig.check();
    }
}

/// A flush that fails says so once, and the one who is told must be the guest: an operator cannot
/// write its data again.
#[test]
fn a_flush_that_failed_for_a_change_fails_the_next_one_of_the_guest() {
    for to in [Some(Mode::WriteBack), None] {
        let mut rig = rig_in(Mode::WriteAround);
        rig.write(64, 8);
        rig.backing.set_faults(flush_fails());
        assert!(taken(&settled(&mut rig, to)).expect("it has ended").is_err());
        assert_eq!(rig.reactor.flush(), Outcome::Failed, "{to:?}");
        assert_eq!(rig.reactor.flush(), Outcome::Done, "{to:?}: it was told");
    }
    // Also in the mode that the second attempt brings.
    let mut rig = rig_in(Mode::WriteAround);
    rig.write(64, 8);
    rig.backing.set_faults(flush_fails());
    assert!(taken(&settled(&mut rig, Some(Mode::WriteBack))).expect("it has ended").is_err());
    let second = settled(&mut rig, Some(Mode::WriteBack));
    assert!(taken(&second).expect("it has ended").is_ok());
    assert_eq!(rig.reactor.flush(), Outcome::Failed);
    assert_eq!(rig.reactor.flush(), Outcome::Done);
    rig.drain();
}

/// Begins a change and waits for its end.
fn settled(rig: &mut Rig, to: Option<Mode>) -> Answer {
    let answer = begin(rig, to);
    for _ in 0..TURNS {
        if answer.lock().expect("one thread").is_some() {
            break;
        }
        rig.reactor.turn(false);
        rig.reactor.advance(std::time::Duration::from_millis(20));
    }
    answer
}

/// Of two flushes under way together one alone is told of a failure: so a guest's waits.
#[test]
fn a_flush_that_comes_during_a_change_is_told_of_its_failure() {
    let mut rig = rig_in(Mode::WriteAround);
    rig.write(64, 8);
    rig.backing.set_faults(flush_fails());
    let answer = begin(&mut rig, Some(Mode::WriteBack));
    let flush = rig.reactor.submit(RequestKind::Flush, &[], &[]).expect("room");
    assert_eq!(outcome(&mut rig, flush), Some(Outcome::Failed));
    assert!(taken(&answer).expect("it has ended").is_err());
    assert_eq!(rig.reactor.flush(), Outcome::Done, "it was told");
    // A change that succeeds lets it go on.
    let answer = begin(&mut rig, Some(Mode::WriteBack));
    let flush = rig.reactor.submit(RequestKind::Flush, &[], &[]).expect("room");
    assert_eq!(outcome(&mut rig, flush), Some(Outcome::Done));
    assert!(taken(&answer).expect("it has ended").is_ok());
}

/// A file system turns read-only at an error: one that means nothing is none.
#[test]
fn a_flush_that_failed_with_nothing_to_flush_is_the_operators_alone() {
    let mut rig = rig_in(Mode::WriteAround);
    rig.write(64, 8);
    assert_eq!(rig.reactor.flush(), Outcome::Done);
    rig.backing.set_faults(flush_fails());
    assert!(taken(&settled(&mut rig, Some(Mode::WriteBack))).expect("it has ended").is_err());
    assert_eq!(rig.reactor.flush(), Outcome::Done);
}

/// The writes of a guest that is killed with its daemon, in the log and not answered.
#[test]
fn in_write_through_a_replayed_write_is_answered_when_the_backing_has_it() {
    let mut rig = rig_in(Mode::WriteThrough);
    rig.backing.set_faults(fails(true));
    let origin = |replayed| Origin { door: 0, queue: 3, counter: 1000, replayed };
    let buffer = PinnedBuffer::new(4096);
    buffer.segment().copy_from(&[5; 4096]);
    let range = [SectorRange { start: 8, count: 8 }];
    let data = [buffer.segment()];
    let write = RequestKind::Write;
    let first = rig.reactor.submit_from(origin(false), write, &range, &data).expect("room");
    rig.truth[4096..8192].fill(5);
    assert_eq!(outcome(&mut rig, first), None, "the backing fails");
    let mut rig = rig.killed(options());
    rig.backing.set_faults(fails(true));
    let again = rig.reactor.submit_from(origin(true), write, &range, &data).expect("room");
    assert_eq!(outcome(&mut rig, again), None, "the backing still fails");
    rig.backing.set_faults(Faults::default());
    rig.reactor.advance(std::time::Duration::from_secs(60));
    assert_eq!(outcome(&mut rig, again), Some(Outcome::Done));
    assert_eq!(rig.backing.peek(4096, 4096), [5; 4096]);
    let replayed = rig.status.counters.replayed.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(replayed, 1, "it was not done again");
    rig.check();
}

#[test]
fn a_disk_that_is_held_keeps_its_mode_until_it_is_let_go() {
    let mut rig = Rig::new(shape(6, 64 * KIB), options());
    rig.write(0, 8);
    let held = rig.ask(|reply| CacheMessage::Drain { to: Some(1), hold: true, reply });
    assert_eq!(held, Ok(1));
    rig.write(8, 8);
    for to in [Some(Mode::WriteAround), Some(Mode::WriteThrough), None] {
        let error = taken(&settled(&mut rig, to)).expect("it is refused").expect_err("held");
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains("`vflash drain vm/disk`"), "{error}");
        rig.write(16, 8);
    }
    rig.tell(CacheMessage::LetGo);
    assert!(taken(&settled(&mut rig, Some(Mode::WriteAround))).expect("it has ended").is_ok());
    rig.write(24, 8);
    assert!(rig.backing.peek(0, DISK_BYTES as usize) == rig.truth);
}

/// Writes wait for a change only when there is little left to do.
#[test]
fn writes_go_on_while_what_the_log_has_is_drained_for_a_change() {
    for to in [Some(Mode::WriteAround), Some(Mode::Bypass), None] {
        let mut rig = Rig::new(shape(32, 64 * KIB), options());
        (0..20).for_each(|at| rig.write(at * 8, 8));
        rig.backing.set_faults(fails(true));
        let answer = begin(&mut rig, to);
        for at in 0..8 {
            let (id, _data) = submit(&mut rig, at * 8, at as u8);
            assert_eq!(outcome(&mut rig, id), Some(Outcome::Done), "{to:?}, write {at}");
        }
        assert!(taken(&answer).is_none(), "{to:?}: the backing is away");
        rig.ask(|reply| CacheMessage::Status { reply });
        assert_eq!(rig.status.gauges().state, CacheState::WaitingForBacking);
        rig.backing.set_faults(Faults::default());
        rig.reactor.advance(std::time::Duration::from_secs(60));
        for _ in 0..TURNS {
            rig.reactor.turn(false);
        }
        taken(&answer).expect("the backing is back").expect("done");
        assert!(rig.backing.peek(0, DISK_BYTES as usize) == rig.truth, "{to:?}");
    }
}

/// The backing goes away after so many operations of a change: before the last steps, which are
/// short, nobody waits for it.
#[test]
fn an_outage_in_a_change_holds_up_no_write_but_those_that_need_the_backing() {
    for after in 0..6 {
        let mut rig = Rig::new(shape(32, 64 * KIB), options());
        (0..20).for_each(|at| rig.write(at * 8, 8));
        let fail = Failure { after, forever: true, errno: Errno::EIO, torn: false };
        rig.backing.set_faults(Faults { fail: Some(fail), ..Faults::default() });
        let answer = begin(&mut rig, Some(Mode::WriteAround));
        // Written at every moment of it.
        let mut writes = Vec::new();
        for at in 0..30 {
            writes.push(submit(&mut rig, 400 + at * 8, at as u8 + 1));
            rig.reactor.turn(false);
        }
        let mut left: Vec<RequestId> = writes.iter().map(|(id, _)| *id).collect();
        for _ in 0..TURNS {
            rig.reactor.turn(false);
            for (id, outcome) in rig.reactor.ended() {
                assert_eq!(outcome, Outcome::Done);
                left.retain(|other| *other != id);
            }
        }
        let changed = mode(&mut rig) == Mode::WriteAround;
        assert!(changed || left.is_empty(), "{after}: {} writes wait", left.len());
        rig.backing.set_faults(Faults::default());
        rig.reactor.advance(std::time::Duration::from_secs(30));
        for _ in 0..TURNS {
            rig.reactor.turn(false);
        }
        drop(rig.reactor.ended());
        taken(&answer).expect("the backing is back").expect("done");
        rig.check();
        assert!(rig.backing.peek(0, DISK_BYTES as usize) == rig.truth, "{after}");
    }
}
