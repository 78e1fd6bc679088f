//! Every power cut, also one during recovery, leaves a cached disk that has all acknowledged writes
//! and shows exactly one point of the guest's history.

#[path = "cache/rig.rs"]
mod rig;

use rig::{Rig, Setup, alone, explore, run_all, scale};
use std::sync::Arc;
use vflash::cache::{CacheMessage, Mode, model};
use vflash::io::buffer::PinnedBuffer;
use vflash::io::crash::Explorer;
use vflash::io::sim::Faults;
use vflash::io::volume::{Origin, Outcome, RequestKind, SectorRange};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Write4K,
    Write512,
    Overlap,
    /// More than half of the log.
    Large,
    Discard,
    Zeroes,
    Flush,
    DrainPart,
    DrainAll,
    /// As much time as a drain by policy waits for.
    Time,
    Mark,
    Mode,
    Detach,
}

const STEPS: [Step; 13] = [
    Step::Write4K,
    Step::Write512,
    Step::Overlap,
    Step::Large,
    Step::Discard,
    Step::Zeroes,
    Step::Flush,
    Step::DrainPart,
    Step::DrainAll,
    Step::Time,
    Step::Mark,
    Step::Mode,
    Step::Detach,
];

fn carry_out(rig: &mut Rig, step: Step) {
    match step {
        Step::Write4K => rig.write(64, 8),
        Step::Write512 => rig.write(67, 1),
        Step::Overlap => {
            rig.write(60, 8);
            rig.write(63, 9);
        }
        Step::Large => rig.write(40, 300),
        Step::Discard => rig.zero(RequestKind::Discard, &[(62, 5), (70, 30)]),
        Step::Zeroes => rig.zero(RequestKind::WriteZeroes { unmap: false }, &[(66, 3)]),
        Step::Flush => rig.flush(),
        Step::DrainPart => {
            let to = rig.model.head().saturating_sub(1).max(rig.moment(u64::MAX).drained);
            rig.drain(Some(to));
        }
        Step::DrainAll => rig.drain(None),
        Step::Time => rig.wait_for_the_drain(),
        Step::Mark => {
            let name = "before upgrade".to_owned();
            rig.ask(|reply| CacheMessage::Mark { name, reply }).expect("marked");
            rig.ask(|reply| CacheMessage::Checkpoint { reply }).expect("checkpointed");
        }
        Step::Mode => {
            let mode = Mode::WriteThrough;
            rig.ask(|reply| CacheMessage::SetMode { mode, reply }).expect("switched");
        }
        Step::Detach => rig.close(),
    }
}

/// Runs steps one by one and judges every end; a disk that was detached is opened again.
fn bounded(seed: u64, steps: &[Step]) -> u64 {
    let mut rig = Rig::new(Setup { segments: 4, ..Setup::of(seed) });
    rig.write(60, 20);
    rig.finish();
    rig.flush();
    rig.write(63, 2);
    rig.finish();
    for (index, step) in steps.iter().enumerate() {
        carry_out(&mut rig, *step);
        if *step == Step::Detach && index + 1 < steps.len() {
            break;
        }
    }
    rig.finish();
    let explorer = Explorer { samples: 24, exhaustive_max: 3, ..Explorer::new(seed) };
    explore(&rig, &explorer, |case, world| {
        rig.judge(case, &world, u32::from(case.index == 1 && case.point % 16 == 0))
    })
}

#[test]
fn every_crash_state_of_one_and_two_operations_is_a_point() {
    let mut workloads: Vec<(u64, Vec<Step>)> = Vec::new();
    for (index, first) in STEPS.iter().enumerate() {
        workloads.push((index as u64, vec![*first]));
        for (other, second) in STEPS.iter().enumerate() {
            workloads.push(((index * STEPS.len() + other) as u64, vec![*first, *second]));
        }
    }
    assert_eq!(workloads.len(), 182);
    let states = run_all("bounded exhaustive", &workloads, |(seed, steps)| bounded(*seed, steps));
    assert!(alone() || states >= 20_000, "{states} states are too few");
}

/// A long run: the log goes round at least three times.
fn long(seed: u64) -> u64 {
    let mut rig = Rig::new(Setup::of(seed));
    let log_bytes = rig.setup.segments * 64 * 1024;
    let appended =
        |rig: &Rig| rig.status.counters.appended_bytes.load(std::sync::atomic::Ordering::Relaxed);
    while appended(&rig) < 4 * log_bytes {
        rig.step();
    }
    rig.finish();
    let explorer =
        Explorer { samples: 4, exhaustive_max: 1, points_max: 300, ..Explorer::new(seed) };
    explore(&rig, &explorer, |case, world| rig.judge(case, &world, 0))
}

#[test]
fn every_crash_state_of_long_random_runs_is_a_point() {
    let seeds: Vec<u64> = (0..16 * scale()).collect();
    let states = run_all("long random runs", &seeds, |seed| long(*seed));
    assert!(alone() || states >= 20_000 * scale(), "{states} states are too few");
}

/// With plain writes, a flash whose flushes fail now and then: the drive drops for good what such a
/// flush should have covered.
fn flushes_fail(seed: u64) -> u64 {
    let mut rig = Rig::new(Setup { strong: false, ..Setup::of(seed) });
    for _ in 0..16 {
        let flush_failures = rig.random.u32(0..3);
        rig.world.0[0].set_faults(Faults { reorder: true, flush_failures, ..Faults::default() });
        (0..12).for_each(|_| rig.step());
        rig.finish();
        rig.flush();
    }
    rig.finish();
    assert_eq!(rig.failed, 0, "seed {seed}: guests saw errors");
    let explorer =
        Explorer { samples: 6, exhaustive_max: 1, points_max: 200, ..Explorer::new(seed) };
    explore(&rig, &explorer, |case, world| rig.judge(case, &world, 0))
}

#[test]
fn what_a_failed_flush_of_the_flash_should_have_covered_is_not_lost() {
    let seeds: Vec<u64> = (0..12 * scale()).collect();
    let states = run_all("failed flushes of the flash", &seeds, |seed| flushes_fail(*seed));
    assert!(alone() || states >= 5_000 * scale(), "{states} states are too few");
}

/// Ends within recovery, within the recovery from that, and once more.
fn nested(seed: u64) -> u64 {
    let mut rig = Rig::new(Setup::of(seed));
    for _ in 0..60 {
        rig.step();
    }
    rig.finish();
    let explorer =
        Explorer { samples: 2, exhaustive_max: 0, points_max: 20, ..Explorer::new(seed) };
    explore(&rig, &explorer, |case, world| rig.judge(case, &world, 3))
}

#[test]
fn a_crash_inside_recovery_changes_nothing() {
    let seeds: Vec<u64> = (0..4 * scale()).collect();
    let states = run_all("nested recovery", &seeds, |seed| nested(*seed));
    assert!(alone() || states >= 2_000, "{states} states are too few");
}

/// Crash after crash: each daemon goes on from what the one before it left.
fn generations(seed: u64) -> u64 {
    let mut rig = Rig::new(Setup::of(seed));
    for _ in 0..12 {
        let steps = rig.random.u32(1..60);
        (0..steps).for_each(|_| rig.step());
        if rig.random.bool() {
            rig.finish();
        }
        rig = rig.next_generation();
    }
    rig.drain(None);
    rig.check_backing(rig.model.head());
    12
}

#[test]
fn crash_after_crash_nothing_is_lost() {
    let seeds: Vec<u64> = (0..150 * scale()).collect();
    let states = run_all("generations", &seeds, |seed| generations(*seed));
    assert!(alone() || states >= 1_200, "{states} states are too few");
}

/// A write of 4 KiB of a machine, the `counter`-th of its queue; its data are those of write `won`.
fn write_as(rig: &mut Rig, (door, counter): (u16, u64), (won, start): (u64, u64), replayed: bool) {
    let buffer = PinnedBuffer::new(4096);
    buffer.segment().copy_from(&model::data(won, start, 8));
    let origin = Origin { door, queue: 1, counter, replayed };
    let range = [SectorRange { start, count: 8 }];
    let data = [buffer.segment()];
    rig.reactor.submit_from(origin, RequestKind::Write, &range, &data).expect("room");
    loop {
        rig.reactor.turn(true);
        if let Some((_, outcome)) = rig.reactor.ended().pop() {
            return assert_eq!(outcome, Outcome::Done);
        }
    }
}

/// Guests of one disk that were not told of their last writes before the daemon was killed make
/// them again, when newer ones lie over some of them; and one makes a write that never came so far.
fn replays(seed: u64) -> u64 {
    let mut rig = Rig::new(Setup { segments: 6, ..Setup::of(seed) });
    let (mut writes, mut counters) = (Vec::new(), [0; 2]);
    for _ in 0..24 {
        let (door, start) = (rig.random.u16(0..2), rig.random.u64(0..6) * 4);
        let counter = &mut counters[usize::from(door)];
        *counter += 1;
        let won = Arc::make_mut(&mut rig.model).write(start, 8);
        write_as(&mut rig, (door, *counter), (won, start), false);
        writes.push(((door, *counter), won, start));
    }
    let head = rig.model.head();
    let world = rig.world.killed(seed);
    let (disk, _) = world.open(&rig.setup).expect("opened");
    let mut after = Rig::on(rig.setup, world, disk, rig.model.clone());
    for (request, won, start) in writes {
        if rig.random.bool() {
            write_as(&mut after, request, (won, start), true);
        }
    }
    after.check_guest(head).unwrap_or_else(|text| panic!("seed {seed}: {text}"));
    assert_eq!(after.head(), head, "seed {seed}: nothing was appended");
    let door = u16::from(counters[1] < counters[0]);
    let won = Arc::make_mut(&mut after.model).write(0, 8);
    write_as(&mut after, (door, counters[usize::from(door)] + 1), (won, 0), true);
    after.check_guest(won).unwrap_or_else(|text| panic!("seed {seed}: {text}"));
    24
}

#[test]
fn what_is_in_the_log_is_not_appended_again_when_it_is_replayed() {
    let seeds: Vec<u64> = (0..40 * scale()).collect();
    let states = run_all("replayed writes", &seeds, |seed| replays(*seed));
    assert!(states >= 900, "{states} writes are too few");
}
