//! Every power cut in every mode and in every step of a change between two: what was durable is
//! there, nothing older comes back, and past the log the backing alone is the disk.

#[path = "cache/rig.rs"]
mod rig;

use rig::{DISK_BYTES, Rig, Setup, World, alone, explore, named, run_all, scale};
use std::time::Duration;
use vflash::backing::recover::{RecoverOptions, inspect};
use vflash::cache::{CacheState, Mode};
use vflash::io::crash::{CrashCase, Explorer};
use vflash::io::disk::{Errno, OperationKind};
use vflash::io::sim::{Failure, Faults};
use vflash::io::volume::RequestKind;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Write4K,
    Write512,
    Overlap,
    Discard,
    Zeroes,
    Flush,
    Drain,
    /// As much time as a drain by policy waits for.
    Time,
    To(Mode),
}

const STEPS: [Step; 13] = [
    Step::Write4K,
    Step::Write512,
    Step::Overlap,
    Step::Discard,
    Step::Zeroes,
    Step::Flush,
    Step::Drain,
    Step::Time,
    Step::To(Mode::WriteBack),
    Step::To(Mode::WriteThrough),
    Step::To(Mode::WriteAround),
    Step::To(Mode::ReadOnly),
    Step::To(Mode::Bypass),
];

const MODES: [Mode; 5] =
    [Mode::WriteBack, Mode::WriteThrough, Mode::WriteAround, Mode::ReadOnly, Mode::Bypass];

fn carry_out(rig: &mut Rig, step: Step) {
    match step {
        Step::Write4K => rig.write(64, 8),
        Step::Write512 => rig.write(67, 1),
        Step::Overlap => {
            rig.write(60, 8);
            // One after the other: past the log there is no order between requests under way.
            rig.finish();
            rig.write(63, 9);
        }
        Step::Discard => rig.zero(RequestKind::Discard, &[(62, 5), (70, 30)]),
        Step::Zeroes => rig.zero(RequestKind::WriteZeroes { unmap: false }, &[(66, 3)]),
        Step::Flush => rig.flush(),
        Step::Drain => rig.drain(None),
        Step::Time => rig.wait_for_the_drain(),
        Step::To(mode) => rig.set_mode(mode),
    }
    rig.finish();
}

fn setup(seed: u64) -> Setup {
    let block_bytes = if seed.is_multiple_of(3) { 4096 } else { 512 };
    Setup { block_bytes, ..Setup::of(seed) }
}

/// With the flash; what was written through is there without it too.
fn judge(rig: &Rig, case: CrashCase, world: &World) -> u64 {
    let moment = rig.moment(case.point);
    if !moment.through {
        return rig.judge_versions(case, world);
    }
    let storage = world.killed(case.seed);
    storage.recover().expect("recovered");
    let mut bytes = vec![0; DISK_BYTES as usize];
    storage.reader()(0, &mut bytes);
    let legal = (moment.backed, rig.submitted_by(case.point));
    if let Err(difference) = rig.model.check_read(0, &bytes, legal) {
        panic!("without the flash, {moment:?}: {difference}");
    }
    rig.judge_versions(case, world)
}

fn bounded(seed: u64, from: Mode, steps: &[Step]) -> u64 {
    let mut rig = Rig::new(Setup { segments: 4, ..setup(seed) });
    rig.write(60, 20);
    rig.finish();
    rig.set_mode(from);
    rig.write(63, 2);
    rig.finish();
    steps.iter().for_each(|step| carry_out(&mut rig, *step));
    let explorer = Explorer { samples: 2, exhaustive_max: 0, points_max: 8, ..Explorer::new(seed) };
    explore(&rig, &explorer, |case, world| judge(&rig, case, &world))
}

#[test]
fn every_crash_state_of_two_operations_in_each_mode_keeps_what_was_durable() {
    let mut workloads: Vec<(u64, Mode, [Step; 2])> = Vec::new();
    for from in MODES {
        for first in STEPS {
            for second in STEPS {
                workloads.push((workloads.len() as u64, from, [first, second]));
            }
        }
    }
    assert_eq!(workloads.len(), 845);
    let job = |(seed, from, steps): &(u64, Mode, [Step; 2])| bounded(*seed, *from, steps);
    let states = run_all("modes, bounded exhaustive", &workloads, job);
    assert!(alone() || states >= 10_000, "{states} states are too few");
}

/// Long runs over many changes of mode.
fn long(seed: u64) -> u64 {
    let mut rig = Rig::new(setup(seed));
    for _ in 0..12 {
        let mode = MODES[rig.random.usize(0..MODES.len())];
        rig.set_mode(mode);
        for _ in 0..rig.random.u32(1..16) {
            let (start, count) = (rig.random.u64(0..200), rig.random.u64(1..24));
            let (what, by) = (rig.random.u32(0..10), rig.random.u64(1..1200));
            if what >= 8 {
                rig.pass_time(Duration::from_millis(by));
            }
            match what {
                0 => rig.zero(RequestKind::Discard, &[(start, count), (start + 30, 3)]),
                1 => rig.flush(),
                2 | 3 => rig.read(start, count),
                _ => rig.write(start, count),
            }
            rig.finish();
        }
    }
    let explorer =
        Explorer { samples: 3, exhaustive_max: 1, points_max: 100, ..Explorer::new(seed) };
    explore(&rig, &explorer, |case, world| judge(&rig, case, &world))
}

#[test]
fn every_crash_state_of_long_runs_over_all_modes_keeps_what_was_durable() {
    let seeds: Vec<u64> = (0..12 * scale()).collect();
    let states = run_all("modes, long random runs", &seeds, |seed| long(*seed));
    assert!(alone() || states >= 2_000 * scale(), "{states} states are too few");
}

/// A few requests, perhaps between two turns. They touch different places, since those under way
/// together have no order.
fn burst(rig: &mut Rig) {
    for lane in 0..rig.random.u64(1..8) {
        let (start, count) = (lane * 24 + rig.random.u64(0..12), rig.random.u64(1..12));
        match rig.random.u32(0..10) {
            0 => rig.zero(RequestKind::Discard, &[(start, count)]),
            1 => rig.flush(),
            2 | 3 => rig.read(start, count),
            _ => rig.write(start, count),
        }
        if rig.random.bool() {
            rig.turn(false);
        }
    }
}

/// Requests come, wait and end while modes change.
fn busy(seed: u64) -> u64 {
    let mut rig = Rig::new(setup(seed));
    let (mut changes, mut met) = (0, 0);
    while changes < 16 {
        if !rig.is_changing() {
            let mode = MODES[rig.random.usize(0..MODES.len())];
            rig.begin_change(Some(mode));
            changes += 1;
        }
        burst(&mut rig);
        met += u64::from(rig.meets_a_change());
        rig.finish();
        if let Some(changed) = rig.changed() {
            changed.expect("switched");
        }
    }
    rig.await_change_if_any().expect("switched");
    assert!(met >= 8, "seed {seed}: {met} changes met requests");
    assert_eq!(rig.failed, 0, "seed {seed}: a guest sees no error");
    let explorer =
        Explorer { samples: 3, exhaustive_max: 1, points_max: 100, ..Explorer::new(seed) };
    explore(&rig, &explorer, |case, world| rig.judge_versions(case, &world))
}

#[test]
fn every_crash_state_of_changes_of_mode_that_meet_requests_keeps_what_was_durable() {
    let seeds: Vec<u64> = (0..12 * scale()).collect();
    let states = run_all("modes, requests in changes", &seeds, |seed| busy(*seed));
    assert!(alone() || states >= 2_000 * scale(), "{states} states are too few");
}

/// Where a disk goes from and to; `None`: its detach.
type Change = (Mode, Option<Mode>);

/// One operation of one disk fails, the one after so many others, while a change is under way and
/// requests come. True if it came so far.
fn one_fails((from, to): Change, disk: usize, after: u64) -> bool {
    let seed = 1 + after % 4 + 4 * disk as u64;
    let mut rig = Rig::new(setup(seed));
    rig.set_mode(from);
    (0..6).for_each(|index| rig.write(30 * index, 3 + index));
    rig.zero(RequestKind::Discard, &[(36, 9)]);
    rig.finish();
    let fail = Some(Failure { after, forever: false, errno: Errno::EIO, torn: true });
    rig.world.0[disk].set_faults(Faults { fail, reorder: true, ..Faults::default() });
    rig.begin_change(to);
    // Who detaches a disk has no guest.
    if to.is_some() {
        burst(&mut rig);
    }
    let first = rig.await_change();
    let recording = &rig.world.recordings()[disk];
    let failed = recording.log.iter().find(|operation| operation.failed).map(|one| one.kind);
    rig.world.set_faults(&Faults { reorder: true, ..Faults::default() });
    // It is done, or is as it was and can be asked for again.
    if let Err(error) = first {
        assert!(failed.is_some(), "nothing has failed: {error}");
        rig.begin_change(to);
        rig.await_change().expect("done, the second time");
    }
    assert!(!matches!(rig.state(), CacheState::Fenced(_)), "{:?}", rig.state());
    let head = rig.model.head();
    if to.is_none() {
        let found = rig.model.check_point(head, &mut rig.world.reader());
        assert!(found.is_ok(), "{found:?}");
        let standing = inspect(&mut rig.world.blocking(2), RecoverOptions::default());
        let stamp = standing.expect("readable").expect("stamped").stamp;
        assert!(stamp.is_clean(), "{:?}", rig.setup);
        return failed.is_some();
    }
    rig.finish();
    rig.check_guest(head).unwrap_or_else(|text| panic!("{text}"));
    rig.write(31, 4);
    rig.finish();
    rig.check_guest(rig.model.head()).expect("it goes on");
    rig.flush();
    rig.finish();
    // A guest is told of a flush that failed, and sees no other error.
    assert_eq!(rig.failed, rig.told(), "only FLUSHes fail");
    let may = disk == 1 && failed == Some(OperationKind::Flush);
    assert!(may || rig.failed == 0, "{failed:?} failed, and a FLUSH");
    if disk == 1 {
        let only = None;
        let explorer =
            Explorer { samples: 2, exhaustive_max: 0, points_max: 4, only, ..Explorer::new(seed) };
        explore(&rig, &explorer, |case, world| rig.judge_versions(case, &world));
    }
    failed.is_some()
}

#[test]
fn an_error_in_any_step_of_a_change_of_mode_or_a_detach_costs_time_alone() {
    let mut changes: Vec<Change> = MODES.iter().map(|from| (*from, None)).collect();
    for from in MODES {
        changes.extend(MODES.iter().filter(|to| **to != from).map(|to| (from, Some(*to))));
    }
    let jobs: Vec<(Change, usize)> =
        changes.into_iter().flat_map(|change| [0, 1, 2].map(|disk| (change, disk))).collect();
    let states = run_all("modes, errors in changes", &jobs, |(change, disk)| {
        let one = |after: &u64| {
            let (from, to) = (change.0.name(), change.1.map_or("detach", Mode::name));
            let name = format!("{from}:{to}:{disk}:{after}");
            named(&name, || one_fails(*change, *disk, *after)).unwrap_or(true)
        };
        (0..200).take_while(one).count() as u64
    });
    assert!(alone() || states >= 80, "{states} states are too few");
}
