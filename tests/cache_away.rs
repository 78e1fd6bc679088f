//! A disk that goes on from its flash alone while the shared storage is away: whatever ends it, and
//! however often, nothing acknowledged is lost, the shared storage is not touched before it is
//! claimed, and never goes back.

#[path = "cache/rig.rs"]
mod rig;

use rig::{Rig, Setup, World, alone, explore, run_all, scale};
use vflash::cache::CacheState;
use vflash::io::crash::Explorer;

/// A log that has room for a while without a drain.
fn setup(seed: u64) -> Setup {
    Setup { segments: 16, ..Setup::of(seed) }
}

/// All bytes of the shared storage.
fn shared(world: &World) -> [Vec<u8>; 2] {
    [1, 2].map(|disk: usize| {
        let disk = &world.0[disk];
        let bytes = vflash::io::disk::Disk::geometry(disk).size_bytes;
        disk.peek(0, bytes as usize)
    })
}

/// A run with a drain in it that ends anywhere, and goes on alone, once or more.
fn gone_on_alone(seed: u64) -> Rig {
    let mut rig = Rig::new(setup(seed));
    let steps = rig.random.u32(20..80);
    (0..steps).for_each(|_| rig.step());
    let times = rig.random.u32(1..3);
    for _ in 0..times {
        rig = rig.next(true);
        assert_eq!(rig.state(), CacheState::WaitingForBacking, "seed {seed}");
        let before = shared(&rig.world);
        let steps = rig.random.u32(0..30);
        (0..steps).for_each(|_| rig.write_alone());
        if rig.random.bool() {
            rig.finish();
        }
        assert_eq!(rig.failed, 0, "seed {seed}: the flash takes all writes");
        assert!(shared(&rig.world) == before, "seed {seed}: the shared storage was touched");
    }
    rig
}

/// Crash after crash, with the storage and without it.
fn generations(seed: u64) -> u64 {
    let mut states = 0;
    let mut rig = gone_on_alone(seed);
    for _ in 0..6 {
        if rig.alone.is_some() {
            // Another host may have finished the group meanwhile.
            if rig.random.bool() {
                rig.world.recover().expect("recovered");
            }
            // What misses has waited, and is answered.
            (0..4).for_each(|_| rig.read_somewhere());
            rig.come_back();
            rig.finish();
            assert_eq!(rig.failed, 0, "seed {seed}");
            let head = rig.model.head();
            rig.check_guest(head).unwrap_or_else(|text| panic!("seed {seed}: {text}"));
        }
        (0..rig.random.u32(0..40)).for_each(|_| rig.step());
        let alone = rig.random.bool();
        rig = rig.next(alone);
        states += 1;
    }
    if rig.alone.is_some() {
        rig.come_back();
    }
    rig.drain(None);
    rig.check_backing(rig.model.head());
    states
}

#[test]
fn crash_after_crash_with_the_storage_and_without_it_nothing_is_lost() {
    let seeds: Vec<u64> = (0..120 * scale()).collect();
    let states = run_all("generations alone", &seeds, |seed| generations(*seed));
    assert!(alone() || states >= 600, "{states} states are too few");
}

/// Every end of a run that goes on alone, is claimed, and drains.
fn claimed(seed: u64) -> u64 {
    let mut rig = gone_on_alone(seed);
    if seed.is_multiple_of(3) {
        rig.world.recover().expect("recovered");
    }
    rig.come_back();
    (0..8).for_each(|_| rig.step());
    rig.drain(None);
    let explorer =
        Explorer { samples: 6, exhaustive_max: 2, points_max: 150, ..Explorer::new(seed) };
    let states = explore(&rig, &explorer, |case, world| rig.judge(case, &world, 0));
    states
        + explore(&rig, &explorer, |case, world| {
            rig.judge_without_flash(case, &world);
            1
        })
}

#[test]
fn every_crash_state_of_a_disk_that_goes_on_alone_and_is_claimed_is_a_point() {
    let seeds: Vec<u64> = (0..16 * scale()).collect();
    let states = run_all("alone and claimed", &seeds, |seed| claimed(*seed));
    assert!(alone() || states >= 5_000 * scale(), "{states} states are too few");
}

/// The flash was put back to what it was before: what it appends alone does not hide that.
#[test]
fn what_is_appended_alone_does_not_make_an_old_flash_look_newer() {
    for seed in 0..16 {
        let mut rig = Rig::new(setup(seed));
        (0..30).for_each(|_| rig.step());
        rig.drain(None);
        let old = rig.world.killed(seed);
        (0..10).for_each(|_| rig.write_somewhere());
        rig.drain(None);
        let new = rig.world.killed(seed);
        let world = World([&old.0[0], &new.0[1], &new.0[2]].map(Clone::clone));
        let point = world.recover().expect("recovered").point.won;
        for _ in 0..2 {
            let (disk, ..) = world.open_alone(&rig.setup).expect("opened");
            let mut alone = Rig::on(rig.setup, world.clone(), disk, rig.model.clone());
            alone.put_away();
            (0..60).for_each(|_| alone.write_alone());
            alone.finish();
            assert!(alone.head() > point, "seed {seed}: it appends more than it lacks");
        }
        let (_, _, known) = world.open_alone(&rig.setup).expect("opened");
        let text = world.claim(known).expect_err("it is older").to_string();
        assert!(text.contains("the flash is older than its backing"), "seed {seed}: {text}");
        let refused = world.open(&rig.setup).map(drop).expect_err("it is older").to_string();
        assert_eq!(refused, text, "seed {seed}: word for word what an opening says");
    }
}
