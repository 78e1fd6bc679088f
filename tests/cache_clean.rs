//! The clean cache: whatever is kept, evicted, moved and fetched, no read is stale, nothing that is
//! not drained is lost, and the backing is read once for all who want a block.

#[path = "cache/rig.rs"]
mod rig;

use rig::{
    Rig, SECTORS, SEGMENTS_MAX, Setup, World, allocation_bytes, alone, explore, run_all, scale,
};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use vflash::cache::recover::{OpenOptions, open};
use vflash::cache::status::CacheCounters;
use vflash::cache::{CacheMessage, CacheState, Mode};
use vflash::io::crash::Explorer;
use vflash::io::disk::Errno;
use vflash::io::sim::{Failure, Faults};
use vflash::io::volume::RequestKind;

fn value(rig: &Rig, counter: fn(&CacheCounters) -> &AtomicU64) -> u64 {
    counter(&rig.status.counters).load(Ordering::Relaxed)
}

/// Reads and writes that want far more than the cache holds, some of it again and again.
fn step(rig: &mut Rig) {
    let hot = rig.random.u8(0..4) > 0;
    let start = if hot { rig.random.u64(0..400) } else { rig.random.u64(0..SECTORS - 64) };
    let count = match rig.random.u8(0..4) {
        0 => rig.random.u64(1..64),
        1 => rig.random.u64(1..8),
        _ => 8,
    };
    let start = if count == 8 { start / 8 * 8 } else { start };
    match rig.random.u8(0..32) {
        0..20 => rig.read(start, count),
        20 => rig.zero(RequestKind::Discard, &[(start, count)]),
        21 => rig.zero(RequestKind::WriteZeroes { unmap: false }, &[(start, count)]),
        _ => rig.write(start, count),
    }
    if rig.random.u8(0..3) == 0 {
        rig.turn(false);
    }
    if rig.random.u8(0..16) == 0 {
        let by = Duration::from_millis(rig.random.u64(1..800));
        rig.pass_time(by);
    }
}

fn steps_one_by_one(rig: &mut Rig, count: usize) {
    for _ in 0..count {
        step(rig);
        rig.finish();
    }
}

fn reads_among_writes(seed: u64) -> u64 {
    let mut rig = Rig::new(Setup { segments: 4 + seed % 12, ..Setup::of(seed) });
    let slow_polls = (seed % 4) as u32 * 3;
    for round in 0..6 {
        let faults = Faults { reorder: true, slow_polls, ..Faults::default() };
        rig.world.set_faults(&faults);
        for _ in 0..400 {
            step(&mut rig);
        }
        if round % 2 == 1 {
            rig.drain(None);
        }
    }
    rig.finish();
    assert_eq!(rig.failed, 0, "seed {seed}");
    rig.drain(None);
    rig.check_backing(rig.model.head());
    rig.ask(|reply| CacheMessage::Status { reply });
    assert!(value(&rig, |c| &c.fills) > 0, "seed {seed}: nothing that was read was kept");
    value(&rig, |c| &c.evicted) + value(&rig, |c| &c.moves)
}

#[test]
fn no_read_is_stale_among_fills_evictions_and_drains() {
    let seeds: Vec<u64> = (0..24 * scale()).collect();
    let gone = run_all("reads among writes", &seeds, |seed| reads_among_writes(*seed));
    assert!(gone > 500, "{gone} evicted or moved");
}

/// Every mode, one request at a time: those that write past the log have no order of their own.
fn all_modes(seed: u64) -> u64 {
    let mut rig = Rig::new(Setup { segments: 6, ..Setup::of(seed) });
    let modes = [
        Mode::WriteAround,
        Mode::WriteBack,
        Mode::ReadOnly,
        Mode::WriteThrough,
        Mode::Bypass,
        Mode::WriteBack,
    ];
    for mode in modes {
        steps_one_by_one(&mut rig, 120);
        rig.ask(|reply| CacheMessage::SetMode { mode, reply }).expect("switched");
    }
    rig.finish();
    assert_eq!(rig.failed, 0, "seed {seed}");
    rig.drain(None);
    rig.check_backing(rig.model.head());
    1
}

#[test]
fn no_read_is_stale_in_any_mode() {
    let seeds: Vec<u64> = (0..12 * scale()).collect();
    run_all("reads in all modes", &seeds, |seed| all_modes(*seed));
}

/// What is read twice comes from the backing once; and who reads it while it comes waits for it.
#[test]
fn a_block_that_many_want_is_fetched_once() {
    let mut rig = Rig::new(Setup { segments: 8, reorder: false, ..Setup::of(0) });
    for _ in 0..8 {
        rig.read(64, 8);
        rig.read(66, 2);
    }
    rig.finish();
    assert_eq!((value(&rig, |c| &c.misses), value(&rig, |c| &c.joined)), (1, 15));
    rig.read(64, 8);
    rig.finish();
    let found = [value(&rig, |c| &c.misses), value(&rig, |c| &c.probation_hits)];
    assert_eq!(found, [1, 1], "memory had it, and the backing was not asked");
}

/// The daemon ends, or the power goes, without a word: another one goes on.
fn restarted(rig: Rig) -> Rig {
    let world: World = rig.world.killed(7);
    let (disk, next_won) = world.open(&rig.setup).expect("it opens");
    let mut model = rig.model.clone();
    let head = model.head();
    std::sync::Arc::make_mut(&mut model).cut(head, next_won.max(head + 1));
    Rig::on(rig.setup, world, disk, model)
}

/// Blocks that reads did not find on the flash.
fn lacked(rig: &Rig) -> u64 {
    value(rig, |c| &c.misses) + value(rig, |c| &c.probation_hits)
}

/// Reads `blocks` blocks one after the other; how many of them the flash lacked.
fn read_all(rig: &mut Rig, blocks: u64) -> u64 {
    let before = lacked(rig);
    for block in 0..blocks {
        rig.read(block * 8, 8);
        rig.finish();
    }
    lacked(rig) - before
}

#[test]
fn what_was_read_and_what_was_drained_is_there_after_a_restart() {
    let mut rig = Rig::new(Setup { segments: 16, reorder: false, ..Setup::of(0) });
    for block in 0..20 {
        rig.write(1024 + block * 8, 8);
    }
    rig.drain(None);
    for _ in 0..3 {
        read_all(&mut rig, 100);
    }
    let left = read_all(&mut rig, 100);
    rig.ask(|reply| CacheMessage::Checkpoint { reply }).expect("saved");
    let mut rig = restarted(rig);
    let misses = read_all(&mut rig, 100);
    assert!(misses <= left + 16, "{misses} misses, {left} before the restart");
    let before = lacked(&rig);
    (0..20).for_each(|block| rig.read(1024 + block * 8, 8));
    rig.finish();
    assert_eq!(lacked(&rig), before, "what was drained is kept");
    // Writes after the save, and a crash: the log lies over the tables.
    for block in 0..30 {
        rig.write(block * 16, 3);
    }
    rig.finish();
    rig.drain(None);
    let mut rig = restarted(rig);
    let misses = read_all(&mut rig, 100);
    assert!(misses < 60, "{misses} misses after a crash");
    assert_eq!(rig.failed, 0);
}

/// Past the log nothing tells what a table does not know: what it says does not count any more,
/// though the mode keeps a log again.
#[test]
fn a_restart_after_writes_past_the_log_is_cold() {
    let mut rig = Rig::new(Setup { segments: 16, reorder: false, ..Setup::of(0) });
    (0..3).for_each(|_| _ = read_all(&mut rig, 100));
    assert!(value(&rig, |c| &c.fills) > 50);
    rig.ask(|reply| CacheMessage::Checkpoint { reply }).expect("saved");
    rig.set_mode(Mode::WriteAround);
    for block in 0..100 {
        rig.write(block * 8, 8);
        rig.finish();
    }
    let mut rig = restarted(rig);
    rig.set_mode(Mode::WriteBack);
    let mut rig = restarted(rig);
    assert_eq!(read_all(&mut rig, 100), 100, "nothing is trusted");
    assert_eq!(rig.failed, 0);
}

/// Once the backing may be another one than the slots were filled from, they never count again.
#[test]
fn another_generation_of_the_backing_is_cold_at_this_opening_and_at_the_next() {
    let mut rig = Rig::new(Setup { segments: 16, reorder: false, ..Setup::of(0) });
    (0..3).for_each(|_| _ = read_all(&mut rig, 100));
    rig.ask(|reply| CacheMessage::Checkpoint { reply }).expect("saved");
    let world = rig.world.killed(7);
    let mut how = OpenOptions::new(rig::identity(), 1 << 20);
    for (cold, counts) in [(false, true), (true, false), (false, false)] {
        how.cold = cold;
        let opened = open(&mut world.medium(), &how).expect("it opens");
        let held: usize = opened.slabs.iter().map(|slab| slab.entries.len()).sum();
        assert_eq!(held > 50, counts, "{held} blocks, cold: {cold}");
    }
}

/// H14: the flash only holds copies; that it fails is nobody's trouble.
#[test]
fn a_flash_that_fails_costs_no_guest_an_error_while_nothing_on_it_is_dirty() {
    for mode in [Mode::WriteAround, Mode::ReadOnly] {
        let mut rig = Rig::new(Setup { segments: 16, ..Setup::of(0) });
        rig.ask(|reply| CacheMessage::SetMode { mode, reply }).expect("switched");
        (0..3).for_each(|_| _ = read_all(&mut rig, 100));
        assert!(value(&rig, |c| &c.fills) > 50);
        let fail = Failure { after: 0, forever: true, errno: Errno::EIO, torn: true };
        rig.world.0[0].set_faults(Faults { fail: Some(fail), ..Faults::default() });
        steps_one_by_one(&mut rig, 400);
        read_all(&mut rig, 100);
        rig.world.0[0].set_faults(Faults::default());
        steps_one_by_one(&mut rig, 200);
        read_all(&mut rig, 100);
        assert_eq!(rig.failed, 0, "{mode:?}");
    }
}

/// What is wished for meanwhile comes to nothing and says so; it comes true when the flash is back.
#[test]
fn what_a_flash_that_fails_cannot_note_is_refused_and_costs_no_guest_an_error() {
    for mode in [Mode::WriteAround, Mode::ReadOnly, Mode::Bypass] {
        let mut rig = Rig::new(Setup { segments: 8, ..Setup::of(1) }.resizable());
        rig.set_mode(mode);
        read_all(&mut rig, 100);
        let fail = Failure { after: 0, forever: true, errno: Errno::EIO, torn: true };
        rig.world.0[0].set_faults(Faults { fail: Some(fail), ..Faults::default() });
        let other = if mode == Mode::Bypass { Mode::WriteAround } else { Mode::Bypass };
        for to in [other, Mode::WriteBack, Mode::WriteThrough] {
            rig.write(64, 8);
            let refused = rig.ask(|reply| CacheMessage::SetMode { mode: to, reply });
            let text = refused.expect_err("the flash fails").to_string();
            assert!(text.contains("its mode stays") && text.contains("replace"), "{text}");
            rig.write(64, 8);
        }
        let size_bytes = allocation_bytes(4);
        let refused = rig.ask(|reply| CacheMessage::Shrink { size_bytes, reply });
        assert!(refused.expect_err("the flash fails").to_string().contains("keeps its size"));
        let refused = rig.ask(|reply| CacheMessage::Checkpoint { reply });
        assert!(refused.expect_err("the flash fails").to_string().contains("no checkpoint"));
        rig.resize(SEGMENTS_MAX);
        steps_one_by_one(&mut rig, 100);
        assert_eq!((rig.failed, rig.status.gauges().mode), (0, mode));

        rig.world.0[0].set_faults(Faults::default());
        rig.resize(4);
        rig.set_mode(Mode::WriteBack);
        (0..200).for_each(|_| step(&mut rig));
        rig.drain(None);
        rig.check_backing(rig.model.head());
        let mut rig = restarted(rig);
        read_all(&mut rig, SECTORS / 8);
        assert_eq!(rig.failed, 0, "{mode:?}");
    }
}

/// Nothing is dirty: the backing and its stamp are all that the next owner needs.
#[test]
fn a_disk_that_only_has_copies_on_a_flash_that_fails_is_detached() {
    let mut rig = Rig::new(Setup { segments: 8, ..Setup::of(1) });
    rig.set_mode(Mode::WriteAround);
    rig.write(64, 8);
    rig.finish();
    let fail = Failure { after: 0, forever: true, errno: Errno::EIO, torn: true };
    rig.world.0[0].set_faults(Faults { fail: Some(fail), ..Faults::default() });
    rig.close();
    rig.ask(|reply| CacheMessage::Status { reply });
    assert_eq!(rig.state(), CacheState::Closed);
    assert!(rig.world.recover().expect("a stamp").stamp.is_clean());
    rig.check_backing(rig.model.head());
}

/// Whatever of the roots that the flash refused has come to be there after all, and whatever has
/// not: nothing that was written past the log since is undone by what the flash kept.
#[test]
fn every_crash_state_after_refused_roots_has_what_was_written_since() {
    let seeds: Vec<u64> = (0..8 * scale()).collect();
    let states = run_all("crash states after refused roots", &seeds, |seed| {
        let setup = Setup { segments: 6 + seed % 4, ..Setup::of(*seed) };
        let mut rig = Rig::new(setup);
        (0..100).for_each(|_| step(&mut rig));
        rig.drain(None);
        rig.ask(|reply| CacheMessage::Checkpoint { reply }).expect("saved");
        rig.set_mode(Mode::WriteAround);
        for to in [Mode::Bypass, Mode::WriteBack, Mode::ReadOnly, Mode::WriteThrough] {
            one_by_one(&mut rig, 12);
            let fail = Failure { after: 0, forever: true, errno: Errno::EIO, torn: true };
            rig.world.0[0].set_faults(Faults { fail: Some(fail), ..Faults::default() });
            rig.ask(|reply| CacheMessage::SetMode { mode: to, reply }).expect_err("refused");
            one_by_one(&mut rig, 12);
            rig.world.0[0].set_faults(Faults::default());
        }
        rig.set_mode(Mode::WriteBack);
        one_by_one(&mut rig, 20);
        assert_eq!(rig.failed, 0, "seed {seed}");
        let explorer =
            Explorer { samples: 3, exhaustive_max: 2, points_max: 150, ..Explorer::new(*seed) };
        explore(&rig, &explorer, |case, world| rig.judge_versions(case, &world))
    });
    assert!(alone() || states >= 1_000, "{states} states are too few");
}

/// A change of mode that comes to nothing leaves nothing in the log that a write past it would be
/// undone by.
#[test]
fn a_write_that_waited_for_a_change_of_mode_that_fails_goes_past_the_log() {
    let mut rig = Rig::new(Setup { segments: 8, reorder: false, ..Setup::of(0) });
    rig.set_mode(Mode::WriteAround);
    rig.world.0[1].set_faults(Faults { flush_failures: 1, slow_polls: 20, ..Faults::default() });
    let (done, answer) = std::sync::mpsc::channel();
    let reply = Box::new(move |result: vflash::base::Result<()>| done.send(result).expect("kept"));
    rig.tell(CacheMessage::SetMode { mode: Mode::WriteBack, reply });
    rig.turn(false);
    rig.write(64, 8);
    assert!(answer.try_recv().is_err(), "the backing is being flushed");
    rig.finish();
    answer.try_recv().expect("answered").expect_err("the backing failed");
    rig.check_backing(rig.model.head());
    assert_eq!(rig.failed, 0);
}

/// A flash that failed for a while is tried again, and not before.
#[test]
fn what_is_read_is_kept_again_when_the_flash_can_be_written_again() {
    let mut rig = Rig::new(Setup { segments: 16, reorder: false, ..Setup::of(0) });
    rig.set_mode(Mode::WriteAround);
    let fail = Failure { after: 0, forever: true, errno: Errno::EIO, torn: true };
    rig.world.0[0].set_faults(Faults { fail: Some(fail), ..Faults::default() });
    let read_thrice = |rig: &mut Rig| {
        let before = value(rig, |c| &c.fills);
        (0..3).for_each(|_| _ = read_all(rig, 200));
        rig.ask(|reply| CacheMessage::Status { reply });
        (value(rig, |c| &c.fills) - before > 0, rig.status.gauges().flash_failing)
    };
    assert_eq!(read_thrice(&mut rig), (false, true));
    rig.world.0[0].set_faults(Faults::default());
    assert_eq!(read_thrice(&mut rig), (false, true), "it is left in peace");
    rig.reactor.advance(Duration::from_secs(2));
    assert_eq!(read_thrice(&mut rig), (true, false));
    assert_eq!(rig.failed, 0);
}

/// A disk with a content, in read-only mode, whose next daemon may write it or not.
fn read_only(seed: u64) -> Rig {
    let mut rig = Rig::new(Setup { segments: 16, reorder: false, ..Setup::of(seed) });
    (0..200).for_each(|block| rig.write(block * 8, 8));
    rig.drain(None);
    rig.set_mode(Mode::ReadOnly);
    rig.setup.golden = true;
    restarted(rig)
}

/// Nothing passes the log by, so what was saved counts.
#[test]
fn a_golden_image_is_warm_after_every_restart_and_cold_once_it_may_have_been_written() {
    let mut rig = read_only(0);
    (0..3).for_each(|_| _ = read_all(&mut rig, 100));
    let left = read_all(&mut rig, 100);
    // It is saved by itself.
    rig.pass_time(Duration::from_secs(6));
    for _ in 0..3 {
        rig = restarted(rig);
        let misses = read_all(&mut rig, 100);
        assert!(misses <= left + 16, "{misses} misses, {left} before the restart");
    }
    for golden in [false, true] {
        rig.setup.golden = golden;
        rig = restarted(rig);
        assert_eq!(read_all(&mut rig, 100), 100, "nothing is trusted");
    }
    assert_eq!(rig.failed, 0);
}

#[test]
fn every_crash_state_of_a_golden_image_shows_it() {
    let seeds: Vec<u64> = (0..4 * scale()).collect();
    let states = run_all("crash states of a golden image", &seeds, |seed| {
        let mut rig = read_only(*seed);
        rig.world.record();
        for _ in 0..4 {
            read_all(&mut rig, 150);
            rig.pass_time(Duration::from_secs(6));
        }
        assert!(value(&rig, |c| &c.fills) > 50);
        let explorer =
            Explorer { samples: 2, exhaustive_max: 1, points_max: 60, ..Explorer::new(*seed) };
        explore(&rig, &explorer, |case, world| rig.judge(case, &world, 0))
    });
    assert!(alone() || states >= 200, "{states} states are too few");
}

/// Writes, each followed by a FLUSH; past the log they have no other order.
fn one_by_one(rig: &mut Rig, count: usize) {
    for _ in 0..count {
        rig.write_somewhere();
        rig.finish();
        rig.flush();
        rig.finish();
    }
}

/// A copy that rots is fetched again; nobody sees it.
#[test]
fn a_slot_that_rots_is_dropped_and_fetched_again() {
    let mut rig = Rig::new(Setup { segments: 16, reorder: false, ..Setup::of(0) });
    for block in 0..100 {
        rig.write(block * 8, 8);
    }
    rig.drain(None);
    (0..3).for_each(|_| _ = read_all(&mut rig, 100));
    rig.ask(|reply| CacheMessage::Checkpoint { reply }).expect("saved");
    let flash = &rig.world.0[0];
    let size = vflash::io::disk::Disk::geometry(flash).size_bytes;
    for at in (1 << 20..size).step_by(1024) {
        let byte = flash.peek(at, 1)[0];
        flash.poke(at, &[byte ^ 0x10]);
    }
    read_all(&mut rig, 100);
    assert!(value(&rig, |c| &c.dropped) > 20, "{}", value(&rig, |c| &c.dropped));
    assert_eq!(rig.failed, 0);
}

/// A segment that was open when writes passed the log by goes on afterwards: what it has taken
/// since the save and has been drained is not trusted, and the tables do not know it; whether all
/// of the segment is drained or not.
#[test]
fn what_the_tables_do_not_know_is_not_served_after_changes_of_mode() {
    for dirty in [false, true] {
        let mut rig = Rig::new(Setup { segments: 16, reorder: false, ..Setup::of(0) });
        rig.write(2000, 8);
        rig.drain(None);
        rig.set_mode(Mode::WriteAround);
        rig.set_mode(Mode::WriteBack);
        (0..3).for_each(|_| _ = read_all(&mut rig, 200));
        let kept: Vec<u64> = (0..200).filter(|block| is_kept(&mut rig, *block)).collect();
        assert!(kept.len() > 50);
        rig.ask(|reply| CacheMessage::Checkpoint { reply }).expect("saved");
        // So few that they fit into the segment, and before the next save.
        kept.iter().step_by(10).take(4).for_each(|block| rig.write(block * 8, 8));
        rig.drain(None);
        if dirty {
            rig.write(2000, 8);
            rig.finish();
        }
        let mut rig = restarted(rig);
        let misses = read_all(&mut rig, 200);
        assert!((1..200).contains(&misses), "{misses} misses: the tables count");
        assert_eq!(rig.failed, 0);
    }
}

/// Whether a block is on the flash.
fn is_kept(rig: &mut Rig, block: u64) -> bool {
    let before = lacked(rig);
    rig.read(block * 8, 8);
    rig.finish();
    lacked(rig) == before
}

/// Fills stop when the write budget is used up, and go on when it has grown again.
#[test]
fn a_write_budget_stops_fills_and_nothing_else() {
    let mut rig = Rig::new(Setup { segments: 16, reorder: false, ..Setup::of(0) });
    // What an hour has, and so what is saved at most.
    let blocks = 40;
    let bytes_per_day = Some(24 * blocks * 4096);
    rig.tell(CacheMessage::SetWriteBudget { bytes_per_day });
    let read_thrice = |rig: &mut Rig| {
        let before = value(rig, |c| &c.fills);
        (0..3).for_each(|_| _ = read_all(rig, 200));
        rig.ask(|reply| CacheMessage::Status { reply });
        value(rig, |c| &c.fills) - before
    };
    let filled = read_thrice(&mut rig);
    assert!((1..=blocks).contains(&filled), "{filled} fills");
    assert!(value(&rig, |c| &c.fills_refused) > 0 && rig.status.gauges().budget_used_up);
    // The log has its way.
    (0..100).for_each(|block| rig.write(1024 + block * 8, 8));
    rig.drain(None);
    assert_eq!((rig.failed, read_thrice(&mut rig)), (0, 0));
    rig.reactor.advance(Duration::from_secs(3 * 3600));
    let filled = read_thrice(&mut rig);
    assert!((1..=blocks).contains(&filled), "{filled} fills after three hours");
    rig.tell(CacheMessage::SetWriteBudget { bytes_per_day: None });
    rig.ask(|reply| CacheMessage::Status { reply });
    assert!(!rig.status.gauges().budget_used_up, "there is none");
}

/// Slots behind the new end leave, and those that stay go on.
fn resized(seed: u64) -> u64 {
    let mut rig = Rig::new(Setup::of(seed).resizable());
    for _ in 0..6 {
        for _ in 0..rig.random.u32(20..200) {
            step(&mut rig);
        }
        if rig.random.bool() {
            rig.ask(|reply| CacheMessage::Checkpoint { reply }).expect("saved");
        }
        let segments = rig.random.u64(4..=SEGMENTS_MAX);
        rig.resize(segments);
        for _ in 0..rig.random.u32(0..60) {
            step(&mut rig);
        }
        rig = rig.next_generation();
    }
    rig.drain(None);
    rig.check_backing(rig.model.head());
    6
}

#[test]
fn crash_after_crash_between_resizes_nothing_that_is_kept_is_stale() {
    let seeds: Vec<u64> = (0..30 * scale()).collect();
    run_all("resizes of the clean cache", &seeds, |seed| resized(*seed));
}

fn generations(seed: u64) -> u64 {
    let mut rig = Rig::new(Setup { segments: 4 + seed % 9, ..Setup::of(seed) });
    for _ in 0..10 {
        for _ in 0..rig.random.u32(20..200) {
            step(&mut rig);
            if rig.random.u8(0..60) == 0 {
                rig.ask(|reply| CacheMessage::Checkpoint { reply }).expect("saved");
            }
        }
        if rig.random.bool() {
            rig.drain(None);
        }
        rig = rig.next_generation();
    }
    rig.drain(None);
    rig.check_backing(rig.model.head());
    10
}

#[test]
fn crash_after_crash_nothing_that_is_kept_is_stale() {
    let seeds: Vec<u64> = (0..40 * scale()).collect();
    run_all("generations of the clean cache", &seeds, |seed| generations(*seed));
}

fn every_crash(seed: u64) -> u64 {
    let mut rig = Rig::new(Setup { segments: 5 + seed % 4, ..Setup::of(seed) });
    for round in 0..5 {
        (0..60).for_each(|_| step(&mut rig));
        rig.drain(None);
        if round % 2 == 0 {
            rig.ask(|reply| CacheMessage::Checkpoint { reply }).expect("saved");
        }
    }
    rig.finish();
    let explorer =
        Explorer { samples: 3, exhaustive_max: 1, points_max: 120, ..Explorer::new(seed) };
    explore(&rig, &explorer, |case, world| rig.judge(case, &world, 0))
}

#[test]
fn every_crash_state_of_a_disk_that_is_read_is_a_point() {
    let seeds: Vec<u64> = (0..8 * scale()).collect();
    let states = run_all("crash states of the clean cache", &seeds, |seed| every_crash(*seed));
    assert!(alone() || states >= 2_500, "{states} states are too few");
}
