//! Runs the cases of a suite on all cores, and says how fast; explores what a run may leave.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vflash::io::crash::{CrashCase, Explorer, Loss};

use super::{Rig, SECTORS, World};

/// How many times as much as in CI: `VFLASH_CRASH_SCALE`.
pub(crate) fn scale() -> u64 {
    let text = std::env::var("VFLASH_CRASH_SCALE").ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// The first failure ends a suite.
struct StopOnPanic<'a>(&'a AtomicBool);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// Runs jobs on all cores and says what came of it; the number of states.
pub(crate) fn run_all<T: Sync>(name: &str, jobs: &[T], job: impl Fn(&T) -> u64 + Sync) -> u64 {
    let (next, states) = (AtomicU64::new(0), AtomicU64::new(0));
    let begun = Instant::now();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                let _stop = StopOnPanic(&stop);
                while let Some(one) = jobs.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    states.fetch_add(job(one), Ordering::Relaxed);
                }
            });
        }
    });
    let states = states.load(Ordering::Relaxed);
    let seconds = begun.elapsed().max(Duration::from_millis(1)).as_secs_f64();
    let speed = states as f64 / seconds;
    println!("crash suite: {name}: {states} states, {speed:.0} states/s, 0 failures");
    states
}

/// One state is being repeated, so counts mean nothing.
pub(crate) fn alone() -> bool {
    std::env::var_os(CASE).is_some()
}

const CASE: &str = "VFLASH_CRASH_CASE";

/// Prints the line that repeats a case, if it fails.
struct Announce<'a>(&'a str);

impl Drop for Announce<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("case failed; repeat it with {CASE}={}", self.0);
        }
    }
}

/// Runs a case that is no crash state, unless another one is being repeated.
pub(crate) fn named<T>(name: &str, case: impl FnOnce() -> T) -> Option<T> {
    let other = std::env::var(CASE).is_ok_and(|only| only != name);
    let _announce = Announce(name);
    (!other).then(case)
}

/// What the three disks lose: all lose power at once, or the shared storage lives on.
pub(crate) const LOSSES: [[Loss; 3]; 2] =
    [[Loss::Unflushed; 3], [Loss::Unflushed, Loss::UnderWay, Loss::UnderWay]];

/// Explores both kinds of losses of a recorded run.
pub(crate) fn explore(
    rig: &Rig,
    explorer: &Explorer,
    mut visit: impl FnMut(CrashCase, World) -> u64,
) -> u64 {
    let recordings = rig.world.recordings();
    let mut states = 0;
    for losses in LOSSES {
        explorer.explore_together(&recordings, &losses, |case, disks| {
            states += visit(case, World(disks.try_into().unwrap_or_else(|_| panic!("three"))));
        });
    }
    states
}

pub(crate) fn clip((start, count): (u64, u64)) -> (u64, u64) {
    let start = start.min(SECTORS - 8);
    (start, count.min(SECTORS - start))
}
