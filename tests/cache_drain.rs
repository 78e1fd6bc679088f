//! The backing: whatever happens to flash, backing and sidecar while a drain is under way, the
//! shared storage alone is a legal disk, guests see no error, and nothing is lost.

#[path = "cache/rig.rs"]
mod rig;

use rig::{LOSSES, Rig, Setup, World, alone, run_all, scale};
use std::cell::Cell;
use std::time::Duration;
use vflash::backing::recover::{RecoverOptions, inspect};
use vflash::cache::{CacheMessage, CacheState};
use vflash::io::crash::Explorer;
use vflash::io::disk::Errno;
use vflash::io::sim::{Failure, Faults};

/// The flash is thrown away at every write that a drain makes to the shared storage.
fn flash_lost(seed: u64) -> u64 {
    let mut rig = Rig::new(Setup::of(seed));
    for round in 0..6 {
        (0..25).for_each(|_| rig.step());
        if round % 2 == 0 {
            rig.drain(None);
        }
    }
    rig.finish();
    let recordings = rig.world.recordings();
    let explorer =
        Explorer { samples: 6, exhaustive_max: 2, points_max: 500, ..Explorer::new(seed) };
    let mut states = 0;
    for losses in LOSSES {
        let (recordings, losses) = (&recordings[1..], &losses[1..]);
        explorer.explore_together(recordings, losses, |case, disks| {
            let world = World::without_flash(disks);
            if case.index % 8 == 1 {
                states += rig.judge_recovery(case, &world);
            } else {
                rig.judge_without_flash(case, &world);
                states += 1;
            }
        });
    }
    states
}

#[test]
fn flash_lost_at_any_write_of_a_drain_leaves_a_past_point() {
    let seeds: Vec<u64> = (0..16 * scale()).collect();
    let states = run_all("flash lost in a drain", &seeds, |seed| flash_lost(*seed));
    assert!(alone() || states >= 20_000 * scale(), "{states} states are too few");
}

/// What is wrong with the shared storage for a while.
#[derive(Clone, Copy, Debug)]
enum Outage {
    Error,
    TornError,
    Full,
    Slow,
    Flapping,
    OneFlush,
    SidecarError,
    SidecarSlow,
    TimedOut,
    Both,
}

const OUTAGES: [Outage; 10] = [
    Outage::Error,
    Outage::TornError,
    Outage::Full,
    Outage::Slow,
    Outage::Flapping,
    Outage::OneFlush,
    Outage::SidecarError,
    Outage::SidecarSlow,
    Outage::TimedOut,
    Outage::Both,
];

fn begin(rig: &Rig, outage: Outage, after: u64) {
    let failing = |errno, torn, forever| Faults {
        fail: Some(Failure { after, forever, errno, torn }),
        reorder: true,
        ..Faults::default()
    };
    let slow = Faults { slow_polls: 200, reorder: true, ..Faults::default() };
    let full = Faults { full: true, ..Faults::default() };
    let [_, backing, sidecar] = &rig.world.0;
    let timed_out = Errno(libc::ETIMEDOUT);
    match outage {
        Outage::Error => backing.set_faults(failing(Errno::EIO, false, true)),
        Outage::TornError => backing.set_faults(failing(Errno::EIO, true, true)),
        Outage::Full => backing.set_faults(full),
        Outage::Slow => backing.set_faults(slow),
        Outage::Flapping => backing.set_faults(failing(Errno::EIO, true, false)),
        Outage::OneFlush => {
            backing.set_faults(Faults { flush_failures: 1, reorder: true, ..Faults::default() });
        }
        Outage::SidecarError => sidecar.set_faults(failing(Errno::EIO, true, true)),
        Outage::SidecarSlow => sidecar.set_faults(slow),
        Outage::TimedOut => backing.set_faults(failing(timed_out, false, true)),
        Outage::Both => {
            backing.set_faults(failing(Errno::EIO, true, true));
            sidecar.set_faults(failing(Errno::EIO, true, true));
        }
    }
}

/// Guest I/O goes on through an outage while the log has room, then waits; afterwards all comes to
/// the backing, and a crash in the middle of it loses nothing.
fn outage(seed: u64) -> u64 {
    // Each in both drain modes.
    let outage = OUTAGES[(seed / 2) as usize % OUTAGES.len()];
    let mut rig = Rig::new(Setup { segments: 12, ..Setup::of(seed) });
    // Reads of what only the backing has cannot be served meanwhile; the guest writes and flushes.
    for _ in 0..20 {
        rig.write_somewhere();
    }
    rig.drain(None);
    for round in 0..4 {
        begin(&rig, outage, seed % 7);
        for _ in 0..12 {
            rig.write_somewhere();
        }
        rig.finish();
        rig.reactor.advance(Duration::from_secs(2));
        (0..40).for_each(|_| rig.turn(false));
        let whole = !matches!(outage, Outage::Flapping | Outage::OneFlush) || round < 3;
        if whole {
            heal(&rig);
        }
    }
    assert_eq!(rig.failed, 0, "{outage:?}: guests saw errors");
    begin(&rig, outage, seed % 5);
    (0..6).for_each(|_| rig.write_somewhere());
    rig.finish();
    rig.reactor.advance(Duration::from_secs(2));
    (0..60).for_each(|_| rig.turn(false));
    // What failed is tried again, and may succeed now.
    rig.reactor.advance(Duration::from_secs(2));
    (0..60).for_each(|_| rig.turn(false));
    let explorer =
        Explorer { samples: 3, exhaustive_max: 1, points_max: 40, ..Explorer::new(seed) };
    let states = rig::explore(&rig, &explorer, |case, world| rig.judge(case, &world, 0));
    // The flash gone as well: what had been reported is there.
    let recordings = rig.world.recordings();
    let explorer = Explorer { samples: 2, exhaustive_max: 0, points_max: 150, ..explorer };
    let losses = [vflash::io::crash::Loss::Unflushed; 2];
    let lost = explorer.explore_together(&recordings[1..], &losses, |case, disks| {
        rig.judge_without_flash(case, &World::without_flash(disks));
    });
    heal(&rig);
    rig.drain(None);
    rig.check_backing(rig.model.head());
    assert!(!matches!(rig.state(), CacheState::Fenced(_)), "{outage:?}");
    states + lost + 1
}

fn heal(rig: &Rig) {
    rig.world.set_faults(&Faults { reorder: true, ..Faults::default() });
}

#[test]
fn an_outage_of_the_shared_storage_costs_time_and_nothing_else() {
    let seeds: Vec<u64> = (0..20 * scale()).collect();
    let states = run_all("outages", &seeds, |seed| outage(*seed));
    assert!(alone() || states >= 500, "{states} states are too few");
}

/// Each operation of flash, backing and sidecar fails in turn, once and from then on: no panic, no
/// lie, and what was acknowledged is there when another daemon opens the disk.
fn fail_the_nth(seed: u64) -> u64 {
    let disk = seed as usize % 3;
    let mut cases = 0;
    for after in 0..40 {
        for forever in [false, true] {
            let setup = Setup { segments: 6, reorder: false, ..Setup::of(seed) };
            let mut rig = Rig::new(setup);
            (0..6).for_each(|_| rig.write_somewhere());
            let fail = Failure { after, forever, errno: Errno::EIO, torn: seed.is_multiple_of(2) };
            let faults = Faults { fail: Some(fail), ..Faults::default() };
            rig.world.0[disk].set_faults(faults);
            for _ in 0..4 {
                (0..4).for_each(|_| rig.write_somewhere());
                rig.flush();
                (0..30).for_each(|_| rig.turn(false));
                rig.reactor.advance(Duration::from_secs(2));
                (0..30).for_each(|_| rig.turn(false));
            }
            let kept = rig.moment(u64::MAX).kept;
            let world = rig.world.killed(seed);
            rig.judge_killed(&world, kept);
            cases += 1;
        }
    }
    cases
}

#[test]
fn any_operation_may_fail() {
    let seeds: Vec<u64> = (0..6 * scale()).collect();
    let states = run_all("fail the Nth", &seeds, |seed| fail_the_nth(*seed));
    assert!(alone() || states >= 480, "{states} cases are too few");
}

thread_local! {
    static WALL_MS: Cell<u64> = const { Cell::new(0) };
}

const DAY_MS: u64 = 24 * 60 * 60 * 1000;

/// Drain positions over time, of a disk that is to be at most 4 s behind. `jumps`: meanwhile the
/// clock of the day goes a day forwards and a day back.
fn drained_over_time(seed: u64, jumps: bool) -> Vec<u64> {
    let noon = 1000 * DAY_MS;
    WALL_MS.set(noon);
    let mut rig =
        Rig::new(Setup { wall_ms: Some(|| WALL_MS.get()), reorder: false, ..Setup::of(seed) });
    rig.tell(CacheMessage::SetStaleness { staleness_max: Duration::from_secs(4) });
    let mut positions = Vec::new();
    for step in 0..80_u64 {
        rig.write(step * 7 % 300, 1 + step % 9);
        if step % 5 == 4 {
            rig.flush();
        }
        rig.finish();
        let shift = [0, DAY_MS, 0, 2 * DAY_MS, DAY_MS][(step % 5) as usize];
        WALL_MS.set(if jumps { noon - DAY_MS + shift } else { noon });
        rig.reactor.advance(Duration::from_millis(300));
        (0..200).for_each(|_| rig.turn(false));
        rig.ask(|reply| CacheMessage::Status { reply });
        let gauges = rig.status.gauges();
        assert!(gauges.oldest_dirty <= Duration::from_secs(4), "seed {seed}, {step}: {gauges:?}");
        positions.push(gauges.drained_won);
    }
    rig.close();
    let standing = inspect(&mut rig.world.blocking(2), RecoverOptions::default());
    let stamp = standing.expect("readable").expect("stamped").stamp;
    assert!(stamp.is_clean() && stamp.point.time_ms <= stamp.stamped_ms, "{stamp:?}");
    positions
}

#[test]
fn a_jump_of_the_clock_of_the_day_neither_hastens_nor_holds_up_a_drain() {
    for seed in 0..8 {
        let steady = drained_over_time(seed, false);
        assert!(steady.last().is_some_and(|last| *last > 0), "seed {seed}: nothing was drained");
        assert_eq!(drained_over_time(seed, true), steady, "seed {seed}");
    }
}
