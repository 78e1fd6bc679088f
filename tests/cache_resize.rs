//! Resizes of a cached disk's allocation, and a power cut at each of their steps: the old size or
//! the new one, and every acknowledged write.

#[path = "cache/rig.rs"]
mod rig;

use rig::{Rig, SEGMENTS_MAX, Setup, alone, explore, run_all, scale};
use std::time::Duration;
use vflash::io::crash::Explorer;
use vflash::io::volume::RequestKind;

#[derive(Clone, Copy, Debug)]
enum Step {
    Grow,
    Shrink,
    ShrinkToLeast,
    Write,
    Large,
    Discard,
    Flush,
    Drain,
    /// As much time as a drain by policy waits for, which is under way then.
    Time,
}

const STEPS: [Step; 9] = [
    Step::Grow,
    Step::Shrink,
    Step::ShrinkToLeast,
    Step::Write,
    Step::Large,
    Step::Discard,
    Step::Flush,
    Step::Drain,
    Step::Time,
];

const RESIZES: [Step; 3] = [Step::Grow, Step::Shrink, Step::ShrinkToLeast];

fn carry_out(rig: &mut Rig, step: Step) {
    let segments = rig.setup.segments;
    match step {
        Step::Grow => rig.resize((segments + 3).min(SEGMENTS_MAX)),
        Step::Shrink => rig.resize((segments - 2).max(4)),
        Step::ShrinkToLeast => rig.resize(4),
        Step::Write => {
            rig.write(60, 8);
            rig.write(63, 9);
        }
        Step::Large => rig.write(40, 300),
        Step::Discard => rig.zero(RequestKind::Discard, &[(62, 5), (70, 30)]),
        Step::Flush => rig.flush(),
        Step::Drain => rig.drain(None),
        Step::Time => {
            rig.pass_time(Duration::from_secs(1));
            (0..4).for_each(|_| rig.turn(false));
        }
    }
}

/// A log of seven segments, five of them in use, then the steps.
fn bounded(seed: u64, steps: &[Step]) -> u64 {
    let mut rig = Rig::new(Setup { segments: 7, ..Setup::of(seed) }.resizable());
    for at in 0..4 {
        rig.write(100 * at, 100);
        rig.finish();
    }
    if seed.is_multiple_of(3) {
        rig.drain(None);
    }
    rig.flush();
    rig.write(63, 60);
    rig.finish();
    steps.iter().for_each(|step| carry_out(&mut rig, *step));
    rig.finish();
    let explorer =
        Explorer { samples: 8, exhaustive_max: 2, points_max: 120, ..Explorer::new(seed) };
    explore(&rig, &explorer, |case, world| {
        rig.judge(case, &world, u32::from(case.index == 1 && case.point % 16 == 0))
    })
}

#[test]
fn every_crash_state_of_a_resize_is_the_old_size_or_the_new_one_with_all_writes() {
    let mut workloads: Vec<(u64, Vec<Step>)> = Vec::new();
    for (index, resize) in RESIZES.iter().enumerate() {
        for (other, second) in STEPS.iter().enumerate() {
            let seed = (index * STEPS.len() + other) as u64;
            workloads.push((seed, vec![*resize, *second]));
            workloads.push((seed + 1, vec![*resize, Step::Write, *second]));
        }
    }
    let states = run_all("resizes", &workloads, |(seed, steps)| bounded(*seed, steps));
    assert!(alone() || states >= 5_000, "{states} states are too few");
}

/// Crash after crash between resizes at random.
fn generations(seed: u64) -> u64 {
    let mut rig = Rig::new(Setup::of(seed).resizable());
    for _ in 0..10 {
        for _ in 0..rig.random.u32(1..4) {
            let steps = rig.random.u32(1..30);
            (0..steps).for_each(|_| rig.step());
            if rig.random.u8(0..3) == 0 {
                // A shrink then may leave no header that says how far the numbers have come.
                rig.drain(None);
            }
            let segments = rig.random.u64(4..=SEGMENTS_MAX);
            rig.resize(segments);
        }
        rig = rig.next_generation();
    }
    rig.drain(None);
    rig.check_backing(rig.model.head());
    10
}

#[test]
fn crash_after_crash_between_resizes_nothing_is_lost() {
    let seeds: Vec<u64> = (0..60 * scale()).collect();
    let states = run_all("resized generations", &seeds, |seed| generations(*seed));
    assert!(alone() || states >= 600, "{states} states are too few");
}
