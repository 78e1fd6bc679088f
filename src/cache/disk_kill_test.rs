//! Kills, restarts, damage and mode changes: what was acknowledged is there, or it is said that it
//! is not.

use super::tests::*;
use super::*;
use crate::base::units::{KIB, SECTOR_BYTES};
use crate::cache::layout::Shape;
use crate::cache::recover::{OpenOptions, open};
use crate::cache::segment::SegmentState;
use crate::io::buffer::PinnedBuffer;
use crate::io::sim::{Faults, SimDisk};
use crate::io::volume::{Origin, SectorRange};

const TOTAL: u64 = DISK_BYTES / SECTOR_BYTES;

fn random_writes(rig: &mut Rig, random: &mut fastrand::Rng, count: usize) {
    for _ in 0..count {
        let sectors = random.u64(1..40);
        let start = random.u64(0..TOTAL - sectors);
        match random.u8(0..8) {
            0 => rig.zero(RequestKind::Discard, &[(start, sectors)]),
            1 => assert_eq!(rig.reactor.flush(), Outcome::Done),
            _ => rig.write(start, sectors),
        }
    }
}

#[test]
fn kills_at_any_moment_lose_nothing_over_many_laps() {
    for seed in 0..4 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut rig = Rig::new(shape(5, 64 * KIB), options());
        for _ in 0..25 {
            let count = random.usize(0..40);
            random_writes(&mut rig, &mut random, count);
            // Some of the drain is under way when it dies.
            for _ in 0..random.usize(0..6) {
                rig.reactor.advance(Duration::from_millis(700));
                rig.reactor.turn(false);
            }
            rig = rig.killed(options());
            rig.check();
        }
        rig.drain();
        assert!(rig.status.gauges().head_won > 300);
    }
}

#[test]
fn wons_and_sequences_grow_over_restarts_and_a_restart_without_writes_changes_nothing() {
    let mut rig = Rig::new(shape(5, 64 * KIB), options());
    rig.write(1, 5);
    let mut last = 0;
    for round in 0..6 {
        let how = OpenOptions::new(identity(), 1 << 20);
        let opened = open(&mut medium(&again(&rig.flash)), &how).expect("opened");
        assert!(opened.head.next_won > last, "round {round}");
        last = opened.head.next_won - 1;
        rig = rig.killed(options());
        rig.check();
        if round % 2 == 0 {
            rig.write(round, 3);
        }
    }
}

#[test]
fn a_torn_last_batch_ends_the_log_and_a_damaged_middle_fences_it() {
    let mut rig = Rig::new(shape(5, 64 * KIB), options());
    for at in 0..6 {
        rig.write(at * 8, 8);
    }
    let how = OpenOptions::new(identity(), 1 << 20);
    let scan = crate::cache::scan::scan(&mut medium(&rig.flash), 0).expect("a log");
    let segment = &scan.segments[0];
    let place = |number: usize| {
        let batch = &segment.batches[number];
        let start = scan.root.shape.segment_offset(segment.index) + u64::from(batch.position);
        (start, start + u64::from(batch.header.data_start))
    };
    let ruined = |offset: u64| {
        let flash = again(&rig.flash);
        flash.poke(offset, &[0xaa; 512]);
        open(&mut medium(&flash), &how).expect("opened")
    };
    for offset in [place(5).0, place(5).1] {
        let opened = ruined(offset);
        assert_eq!(
            (opened.fence, opened.head.durable_through),
            (None, 5),
            "nobody says that 6 was"
        );
    }
    let opened = ruined(place(2).0);
    assert_eq!(opened.head.durable_through, 2, "the last good point");
    let why = opened.fence.expect("fenced");
    assert!(why.contains("damaged behind point 2"), "{why}");
    let opened = ruined(place(2).1 + 1024);
    let why = opened.fence.expect("fenced");
    assert!(why.contains("last good point is 2"), "{why}");
}

/// The header of a segment that is needed is gone: its records must not be passed over.
#[test]
fn a_missing_segment_is_damage_and_not_the_beginning_of_the_log() {
    let mut rig = Rig::new(shape(8, 64 * KIB), options());
    for at in 0..20 {
        rig.write(at * 16, 16);
    }
    let scan = crate::cache::scan::scan(&mut medium(&rig.flash), 0).expect("a log");
    assert!(scan.segments.len() >= 3);
    let how = OpenOptions::new(identity(), 1 << 20);
    for (number, segment) in scan.segments.iter().enumerate() {
        let flash = again(&rig.flash);
        flash.poke(scan.root.shape.segment_offset(segment.index), &[0; 4096]);
        let opened = open(&mut medium(&flash), &how).expect("opened");
        assert!(opened.fence.is_some(), "segment {number} of {}", scan.segments.len());
        let last_good = segment.header.first_won - 1;
        assert_eq!(opened.head.durable_through, last_good, "segment {number}");
    }
}

#[test]
fn no_bytes_on_the_flash_make_an_opening_panic() {
    let mut rig = Rig::new(shape(5, 64 * KIB), options());
    let mut random = fastrand::Rng::with_seed(5);
    random_writes(&mut rig, &mut random, 60);
    let how = OpenOptions::new(identity(), 1 << 20);
    let content = rig.flash.content();
    let size = rig.flash.peek(0, 0).len() as u64 + 1024 * KIB + 320 * KIB;
    let (mut refused, mut fenced) = (0, 0);
    for _ in 0..400 {
        let flash = SimDisk::with(content.clone(), crate::io::sim::sim_geometry(size), 1);
        for _ in 0..random.usize(1..6) {
            let offset = match random.u8(0..4) {
                0 => *random.choice(&[65536, 589_824, 327_680, 851_968]).expect("one"),
                _ => 1024 * KIB + random.u64(0..320 * KIB),
            };
            let mut bytes = [0; 1];
            random.fill(&mut bytes);
            let offset = (offset + random.u64(0..200)).min(size - 1);
            flash.poke(offset, &bytes);
        }
        match open(&mut medium(&flash), &how) {
            Ok(opened) => fenced += u32::from(opened.fence.is_some()),
            Err(_) => refused += 1,
        }
    }
    assert!(fenced > 10, "damage was found: {fenced}, refused {refused}");
}

#[test]
fn a_piece_that_rots_is_found_and_never_served() {
    let mut rig = Rig::new(shape(5, 64 * KIB), options());
    rig.write(80, 8);
    rig.write(96, 16);
    let where_is = |rig: &Rig, sector: u64| {
        let how = OpenOptions::new(identity(), 1 << 20);
        let opened = open(&mut medium(&again(&rig.flash)), &how).expect("opened");
        let mut found = Vec::new();
        opened.index.lookup(sector, 1, &mut found);
        match found[0] {
            crate::cache::index::Found::Piece(piece, _) => piece.position * 512,
            other => panic!("{other:?}"),
        }
    };
    // Drained: the backing has it.
    let at = where_is(&rig, 80);
    rig.drain();
    rig.flash.poke(at + 512, &[0x55; 512]);
    rig.check();
    assert_eq!(rig.status.counters.dropped.load(Ordering::Relaxed), 1);
    rig.check();
    assert_eq!(rig.status.counters.dropped.load(Ordering::Relaxed), 1, "dropped once");
    // Not drained: fenced.
    rig.write(200, 8);
    let at = where_is(&rig, 200);
    rig.flash.poke(at, &[0x55; 512]);
    let mut bytes = [7; 512];
    assert_eq!(rig.reactor.read(200, &mut bytes), Outcome::Failed);
    assert_eq!(rig.reactor.write(200, &bytes), Outcome::Failed);
    rig.ask(|reply| CacheMessage::Status { reply });
    let CacheState::Fenced(why) = rig.status.gauges().state else { panic!("fenced") };
    assert!(why.contains("sectors 200 to 200 are damaged"), "{why}");
}

/// The buffer must stay until the request has ended: a dropped one is somebody else's at once.
#[must_use]
fn submit_from(rig: &mut Rig, origin: Origin, start: u64, value: u8) -> PinnedBuffer {
    let buffer = PinnedBuffer::new(4096);
    buffer.segment().copy_from(&[value; 4096]);
    let range = SectorRange { start, count: 8 };
    let segments = [buffer.segment()];
    rig.reactor.submit_from(origin, RequestKind::Write, &[range], &segments).expect("room");
    buffer
}

/// Correction 9: the first write is in the log and was not answered; meanwhile a second one over
/// it was. Doing the first again would undo the second.
#[test]
fn a_replayed_request_that_the_log_has_is_not_done_again() {
    let mut rig = Rig::new(shape(5, 64 * KIB), options());
    let origin = |counter, replayed| Origin { door: 0, queue: 3, counter, replayed };
    for (counter, value) in [(1000, 1), (1001, 2)] {
        let _data = submit_from(&mut rig, origin(counter, false), 8, value);
        while rig.reactor.ended().is_empty() {
            rig.reactor.turn(true);
        }
    }
    rig.truth[8 * 512..16 * 512].fill(2);
    let mut rig = rig.killed(options());
    let _first = submit_from(&mut rig, origin(1000, true), 8, 1);
    rig.reactor.turn(false);
    assert_eq!(rig.reactor.ended().len(), 1, "answered at once");
    rig.check();
    let _third = submit_from(&mut rig, origin(1002, true), 8, 3);
    while rig.reactor.ended().is_empty() {
        rig.reactor.turn(true);
    }
    rig.truth[8 * 512..16 * 512].fill(3);
    rig.check();
    assert_eq!(rig.status.counters.replayed.load(Ordering::Relaxed), 1);
}

#[test]
fn modes_change_while_the_disk_serves() {
    let modes = [
        Mode::WriteThrough,
        Mode::WriteAround,
        Mode::WriteBack,
        Mode::Bypass,
        Mode::WriteThrough,
        Mode::ReadOnly,
        Mode::WriteAround,
        Mode::WriteBack,
    ];
    let mut rig = Rig::new(shape(6, 64 * KIB), options());
    let mut random = fastrand::Rng::with_seed(9);
    for mode in modes {
        random_writes(&mut rig, &mut random, 20);
        rig.ask(|reply| CacheMessage::SetMode { mode, reply }).expect("changed");
        random_writes(&mut rig, &mut random, 20);
        rig.check();
        if mode != Mode::WriteBack {
            let backing = rig.backing.peek(0, DISK_BYTES as usize);
            assert!(backing == rig.truth, "{mode:?}: an answered write is in the backing");
        }
        rig = rig.killed(options());
        rig.check();
        rig.ask(|reply| CacheMessage::Status { reply });
        assert_eq!(rig.status.gauges().mode, mode, "the mode is durable");
    }
    rig.drain();
}

#[test]
fn a_clean_detach_leaves_all_in_the_backing_and_serves_no_more() {
    let mut rig = Rig::new(shape(6, 64 * KIB), options());
    let mut random = fastrand::Rng::with_seed(3);
    random_writes(&mut rig, &mut random, 50);
    rig.ask(|reply| CacheMessage::Close { reply }).expect("closed");
    assert!(rig.backing.peek(0, DISK_BYTES as usize) == rig.truth);
    assert_eq!(rig.reactor.write(0, &[1; 512]), Outcome::Failed);
    let (root, _) = crate::cache::scan::read_root(&mut medium(&rig.flash)).expect("a root");
    assert!(root.clean && root.drained_through > 0);
    let mut again = rig.killed(options());
    again.check();
    again.write(0, 8);
    again.check();
}

#[test]
fn a_swapped_or_resized_backing_is_refused() {
    let flash = formatted(shape(6, 64 * KIB));
    for (identity, says) in [
        (crate::cache::root::BackingIdentity { size_bytes: 8 << 20, ..identity() }, "8MiB"),
        (crate::cache::root::BackingIdentity { kind: 7, ..identity() }, "another file"),
    ] {
        let Err(error) = open(&mut medium(&flash), &OpenOptions::new(identity, 1 << 20)) else {
            panic!("refused")
        };
        assert_eq!(error.kind(), ErrorKind::Fenced);
        assert!(error.to_string().contains(says), "{error}");
    }
}

/// With the write cache on and plain writes, a FLUSH is a flush of the flash; off, every write is
/// durable when it is answered and is its own epoch.
#[test]
fn the_guest_decides_with_its_write_cache() {
    let weak = CacheOptions { strong: false, ..options() };
    let mut rig = Rig::new(shape(6, 64 * KIB), weak.clone());
    rig.flash.record();
    rig.write(0, 8);
    let durable = |rig: &mut Rig, want: bool, what: &str| {
        let worst = crate::io::crash::Explorer::new(1);
        let cut = worst.cut(&rig.flash.recording(), rig.flash.position(), 0);
        let mut after = Rig::on(cut, again(&rig.backing), weak.clone());
        after.truth = rig.truth.clone();
        let mut bytes = vec![0; 4096];
        assert_eq!(after.reactor.read(0, &mut bytes), Outcome::Done);
        assert_eq!(bytes == rig.truth[..4096], want, "{what}");
    };
    durable(&mut rig, false, "a plain write is not durable");
    assert_eq!(rig.reactor.flush(), Outcome::Done);
    durable(&mut rig, true, "a FLUSH makes it durable");
    rig.write(0, 8);
    rig.reactor.volume.set_write_cache(false);
    rig.write(64, 8);
    durable(&mut rig, true, "the write cache is off: all of it is durable");
    rig.write(0, 8);
    durable(&mut rig, true, "durable when it is answered");
    let epoch = rig.status.gauges().epoch;
    rig.write(0, 8);
    rig.write(0, 8);
    rig.ask(|reply| CacheMessage::Status { reply });
    assert!(rig.status.gauges().epoch >= epoch + 2, "each write is an epoch");
}

#[test]
fn marks_and_flushes_are_points_and_survive_a_restart() {
    let mut rig = Rig::new(shape(8, 128 * KIB), options());
    rig.tell(CacheMessage::SetStaleness { staleness_max: Duration::from_secs(3600) });
    rig.write(0, 8);
    rig.write(8, 8);
    assert_eq!(rig.reactor.flush(), Outcome::Done);
    rig.write(0, 8);
    let name = "before upgrade".to_owned();
    let won = rig.ask(|reply| CacheMessage::Mark { name: name.clone(), reply }).expect("marked");
    assert_eq!(won, 3);
    let truth = rig.truth.clone();
    rig.write(0, 8);
    let points = rig.ask(|reply| CacheMessage::Points { reply });
    let text = format!("{points:?}");
    assert!(text.contains("before upgrade") && text.contains("Flush"), "{text}");
    let mut rig = rig.killed(options());
    let points = rig.ask(|reply| CacheMessage::Points { reply });
    assert!(format!("{points:?}").contains("won: 3, kind: Mark"), "{points:?}");
    let reached =
        rig.ask(|reply| CacheMessage::Drain { to: Some(3), hold: true, reply }).expect("drained");
    assert_eq!(reached, 3);
    assert!(rig.backing.peek(0, DISK_BYTES as usize) == truth, "exactly the point");
    rig.check();
    rig.tell(CacheMessage::LetGo);
    rig.drain();
}

#[test]
fn the_index_keeps_to_its_memory_by_draining() {
    let mut how = OpenOptions::new(identity(), 1 << 20);
    how.index_bytes = 16 << 10;
    let flash = formatted(shape(16, 128 * KIB));
    let mut rig = Rig::with(flash, SimDisk::new(DISK_BYTES), options(), &how);
    for at in 0..3000 {
        rig.write(at * 2 % TOTAL, 1);
    }
    rig.ask(|reply| CacheMessage::Status { reply });
    assert!(rig.status.gauges().index_bytes < 32 << 10, "{:?}", rig.status.gauges());
    rig.check();
    rig.drain();
}

#[test]
fn drained_segments_serve_reads_after_a_restart() {
    let mut rig = Rig::new(shape(8, 64 * KIB), options());
    for at in 0..12 {
        rig.write(at * 16, 16);
    }
    rig.drain();
    let mut rig = rig.killed(options());
    // The backing is not asked for what the log still has.
    rig.backing.set_faults(Faults { slow_polls: 1_000_000, ..Faults::default() });
    rig.check_range(0, 12 * 16);
    assert_eq!(rig.status.counters.misses.load(Ordering::Relaxed), 0);
    let clean = rig.status.gauges().segments.clean;
    assert!(clean >= 2, "{clean} in state {:?}", SegmentState::Clean);
}

/// The sectors of a disk whose power went at one of many moments, and what it had answered.
#[test]
fn what_was_acknowledged_survives_a_power_cut_at_every_write_of_the_flash() {
    for seed in 0..3 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut rig = Rig::new(shape(12, 64 * KIB), options());
        random_writes(&mut rig, &mut random, 100);
        // The backing stays as it is, so that it fits to the flash of every moment.
        let reached = rig.ask(|reply| CacheMessage::Drain { to: None, hold: true, reply });
        reached.expect("drained");
        while rig.reactor.operations() > 0 {
            rig.reactor.turn(true);
        }
        rig.flash.record();
        let mut answered = vec![(0, rig.truth.clone())];
        for _ in 0..24 {
            random_writes(&mut rig, &mut random, 1);
            answered.push((rig.flash.position(), rig.truth.clone()));
        }
        let mut explorer = crate::io::crash::Explorer::new(seed);
        (explorer.exhaustive_max, explorer.samples) = (3, 12);
        let backing = again(&rig.backing);
        let states = explorer.explore(&rig.flash.recording(), |case, flash| {
            let last = answered.iter().rposition(|(at, _)| *at <= case.point).expect("the first");
            let how = OpenOptions::new(identity(), 1 << 20);
            let opened = open(&mut medium(&flash), &how).expect("opened");
            assert_eq!(opened.fence, None, "a power cut is no damage");
            let mut seen = backing.peek(0, DISK_BYTES as usize);
            crate::cache::recover::read_opened(&mut medium(&flash), &opened, 0, &mut seen)
                .expect("read");
            let before = &answered[last].1;
            let next = &answered.get(last + 1).unwrap_or(&answered[last]).1;
            assert!(seen == *before || seen == *next, "the state before or after one request");
        });
        assert!(states > 100, "{states}");
    }
}

#[test]
fn a_damaged_disk_drains_to_its_last_good_point_when_told() {
    let mut rig = Rig::new(shape(5, 64 * KIB), options());
    rig.tell(CacheMessage::SetStaleness { staleness_max: Duration::from_secs(3600) });
    rig.write(0, 8);
    rig.write(8, 8);
    let truth = rig.truth.clone();
    rig.write(0, 8);
    rig.write(16, 8);
    rig.write(24, 8);
    let scan = crate::cache::scan::scan(&mut medium(&rig.flash), 0).expect("a log");
    let segment = &scan.segments[0];
    let start = scan.root.shape.segment_offset(segment.index);
    let batch = &segment.batches[2];
    for inside in [0, batch.header.data_start] {
        let flash = again(&rig.flash);
        flash.poke(start + u64::from(batch.position + inside), &[0x77; 64]);
        let mut rig = Rig::on(flash, SimDisk::new(DISK_BYTES), options());
        assert_eq!(rig.reactor.write(0, &[0; 512]), Outcome::Failed);
        let reply = |reply| CacheMessage::Drain { to: Some(2), hold: false, reply };
        assert_eq!(rig.ask(reply), Ok(2), "{inside}");
        assert!(rig.backing.peek(0, DISK_BYTES as usize) == truth, "exactly that point");
    }
}

#[test]
fn a_large_log_is_opened_in_little_time() {
    let shape = Shape::with((1 << 20) + (96 << 20), 8 << 20).expect("a shape");
    let mut rig = Rig::new(shape, options());
    rig.tell(CacheMessage::Drain { to: Some(0), hold: true, reply: Box::new(|_| {}) });
    let mut random = fastrand::Rng::with_seed(1);
    let ranges: Vec<SectorRange> = (0..16_000)
        .map(|_| SectorRange { start: random.u64(0..TOTAL / 8) * 8, count: 8 })
        .collect();
    let buffer = PinnedBuffer::new(4096);
    for group in ranges.chunks(32) {
        for range in group {
            rig.reactor.submit(RequestKind::Write, &[*range], &[buffer.segment()]).expect("room");
        }
        let mut ended = 0;
        while ended < group.len() {
            rig.reactor.turn(false);
            ended += rig.reactor.ended().len();
        }
    }
    let flash = again(&rig.flash);
    let begun = std::time::Instant::now();
    let opened = open(&mut medium(&flash), &OpenOptions::new(identity(), 1 << 20)).expect("opened");
    println!("{} MiB of dirty log opened in {:?}", opened.dirty_bytes >> 20, begun.elapsed());
    assert!(opened.dirty_bytes > 60 << 20, "{}", opened.dirty_bytes);
    assert_eq!(opened.head.durable_through, 16_000);
}

/// All is drained, and the newest drained segment was being used again when the power went: the
/// older ones hold older versions than the backing, and none may be served.
#[test]
fn older_drained_versions_do_not_come_back_when_newer_ones_are_lost() {
    let mut rig = Rig::new(shape(8, 64 * KIB), options());
    for at in 0..10 {
        rig.write(at % 5 * 16, 16);
    }
    rig.drain();
    let scan = crate::cache::scan::scan(&mut medium(&rig.flash), 99).expect("a log");
    let newest = scan.segments.last().expect("segments");
    let batch = newest.batches.last().expect("batches");
    let start = scan.root.shape.segment_offset(newest.index);
    let flash = again(&rig.flash);
    flash.poke(start + u64::from(batch.position), &[0x33; 4096]);
    let mut after = Rig::on(flash, again(&rig.backing), options());
    after.truth = rig.truth.clone();
    after.check();
    after.write(3, 7);
    after.drain();
    after.check();
}
