//! Many requests at once, faults below, full logs: every request ends, and rightly.

use super::tests::*;
use super::*;
use crate::base::units::{KIB, SECTOR_BYTES};
use crate::io::buffer::PinnedBuffer;
use crate::io::sim::{Failure, Faults};
use crate::io::volume::{RequestId, SectorRange};
use std::collections::BTreeMap;

const TOTAL: u64 = DISK_BYTES / SECTOR_BYTES;

/// A request under way.
struct Open {
    range: SectorRange,
    kind: RequestKind,
    buffer: PinnedBuffer,
    skip: usize,
}

/// Submits requests that do not overlap each other, as many at once as there may be.
struct Many {
    rig: Rig,
    open: BTreeMap<u32, Open>,
    random: fastrand::Rng,
    failed: u64,
    ended: u64,
}

impl Many {
    fn new(rig: Rig, seed: u64) -> Self {
        let random = fastrand::Rng::with_seed(seed);
        Self { rig, open: BTreeMap::new(), random, failed: 0, ended: 0 }
    }

    fn submit(&mut self, sectors_max: u64) -> bool {
        let count = self.random.u64(1..=sectors_max);
        let start = self.random.u64(0..TOTAL - count);
        let kind = match self.random.u8(0..16) {
            0 => RequestKind::Flush,
            1 => RequestKind::Discard,
            2 => RequestKind::WriteZeroes { unmap: true },
            3..=6 => RequestKind::Read,
            _ => RequestKind::Write,
        };
        let range = SectorRange { start, count };
        let overlaps = |other: &Open| {
            other.kind != RequestKind::Flush
                && other.range.start < start + count
                && start < other.range.start + other.range.count
        };
        if kind != RequestKind::Flush && self.open.values().any(overlaps) {
            return true;
        }
        let bytes = (count * SECTOR_BYTES) as usize;
        let skip = if self.random.bool() { 0 } else { 512 };
        let buffer = PinnedBuffer::new((bytes + 512).next_power_of_two());
        let segment = buffer.segment().part(skip, bytes);
        if kind == RequestKind::Write {
            let data: Vec<u8> = (0..bytes).map(|_| self.random.u8(..)).collect();
            segment.copy_from(&data);
        }
        let half = bytes / 1024 * 512;
        let segments = match kind {
            RequestKind::Read | RequestKind::Write if half > 0 => {
                vec![segment.part(0, half), segment.part(half, bytes - half)]
            }
            RequestKind::Read | RequestKind::Write => vec![segment],
            _ => Vec::new(),
        };
        let ranges = if kind == RequestKind::Flush { vec![] } else { vec![range] };
        let Some(RequestId(id)) = self.rig.reactor.submit(kind, &ranges, &segments) else {
            return false;
        };
        self.open.insert(id, Open { range, kind, buffer, skip });
        true
    }

    fn reap(&mut self) {
        for (RequestId(id), outcome) in self.rig.reactor.ended() {
            let open = self.open.remove(&id).expect("it was submitted");
            self.ended += 1;
            if outcome != Outcome::Done {
                self.failed += 1;
                continue;
            }
            let from = (open.range.start * SECTOR_BYTES) as usize;
            let to = from + (open.range.count * SECTOR_BYTES) as usize;
            let truth = &mut self.rig.truth[from..to];
            let mut bytes = vec![0; truth.len()];
            open.buffer.segment().part(open.skip, bytes.len()).copy_to(&mut bytes);
            match open.kind {
                RequestKind::Read => assert!(bytes == truth, "{:?} reads right", open.range),
                RequestKind::Write => truth.copy_from_slice(&bytes),
                RequestKind::Discard | RequestKind::WriteZeroes { .. } => truth.fill(0),
                RequestKind::Flush => {}
            }
        }
    }

    fn run(&mut self, requests: u64, depth: usize, sectors_max: u64) {
        let goal = self.ended + requests;
        while self.ended < goal {
            while self.open.len() < depth && self.submit(sectors_max) {}
            self.rig.reactor.turn(false);
            self.rig.reactor.turn(true);
            self.reap();
        }
        self.settle();
    }

    fn settle(&mut self) {
        while !self.open.is_empty() {
            self.rig.reactor.turn(true);
            self.reap();
        }
    }
}

#[test]
fn many_requests_at_once_over_slow_and_reordering_disks() {
    for seed in 0..8 {
        let strong = CacheOptions { strong: seed % 2 == 0, ..options() };
        let rig = Rig::new(shape(4 + seed % 5, 64 * KIB), strong);
        let faults = Faults { reorder: true, slow_polls: (seed % 4) as u32, ..Faults::default() };
        rig.flash.set_faults(faults.clone());
        rig.backing.set_faults(Faults { slow_polls: 9, ..faults });
        let mut many = Many::new(rig, seed);
        many.run(1500, 1 + (seed as usize * 9) % 64, 40);
        assert_eq!(many.failed, 0, "seed {seed}");
        many.rig.check();
        many.rig.drain();
        many.rig.check();
        let mut again = many.rig.killed(options());
        again.check();
        again.drain();
    }
}

#[test]
fn requests_larger_than_the_log_end_at_any_depth() {
    let mut many = Many::new(Rig::new(shape(4, 64 * KIB), options()), 1);
    many.run(60, 16, 3000);
    many.rig.write(17, TOTAL - 20);
    many.rig.check();
    many.rig.drain();
    assert_eq!(many.failed, 0);
}

#[test]
fn a_backing_that_is_down_costs_latency_and_no_error() {
    let rig = Rig::new(shape(6, 64 * KIB), options());
    let errno = Errno(libc::EIO);
    let fail = Failure { after: 0, forever: true, errno, torn: true };
    let mut many = Many::new(rig, 2);
    many.rig.write(0, 500);
    many.rig.drain();
    many.rig.backing.set_faults(Faults { fail: Some(fail), ..Faults::default() });
    let mut parked = 0;
    for round in 0..400 {
        if many.open.len() < 63 {
            let start = round * 16;
            let buffer = PinnedBuffer::new(8192);
            buffer.segment().copy_from(&[round as u8 | 1; 8192]);
            let range = SectorRange { start, count: 16 };
            let kind = RequestKind::Write;
            let id = many.rig.reactor.submit(kind, &[range], &[buffer.segment()]);
            let open = Open { range, kind, buffer, skip: 0 };
            many.open.insert(id.expect("fewer than 63").0, open);
        }
        many.rig.reactor.turn(false);
        many.rig.reactor.turn(false);
        many.reap();
        parked = many.open.len();
    }
    assert_eq!(parked, 63, "the log is full and writes wait");
    let flush = many.rig.reactor.submit(RequestKind::Flush, &[], &[]).expect("the 64th");
    many.rig.reactor.turn(false);
    let ended = many.rig.reactor.ended();
    assert_eq!(ended, [(flush, Outcome::Done)], "a FLUSH does not wait for parked writes");
    many.rig.backing.set_faults(Faults::default());
    many.settle();
    assert_eq!(many.failed, 0);
    many.rig.check();
    many.rig.drain();
    assert!(many.rig.status.counters.drain_retries.load(Ordering::Relaxed) > 0);
}

#[test]
fn an_append_that_fails_is_appended_again_elsewhere() {
    for seed in 0..40 {
        let rig = Rig::new(shape(6, 64 * KIB), options());
        let mut many = Many::new(rig, seed);
        many.run(30, 16, 30);
        let torn = seed % 2 == 0;
        let fail = Failure { after: seed % 17, forever: false, errno: Errno::EIO, torn };
        let faults = Faults { reorder: seed % 3 == 0, fail: Some(fail), ..Faults::default() };
        many.rig.flash.set_faults(faults);
        many.run(120, 24, 30);
        assert_eq!(many.failed, 0, "seed {seed}");
        many.rig.check();
        let mut again = many.rig.killed(options());
        again.check();
        again.drain();
    }
}

#[test]
fn a_flash_that_fails_for_good_fences_the_disk_and_keeps_what_was_acknowledged() {
    let mut rig = Rig::new(shape(6, 64 * KIB), options());
    rig.write(5, 9);
    let fail = Failure { after: 0, forever: true, errno: Errno::EIO, torn: true };
    rig.flash.set_faults(Faults { fail: Some(fail), ..Faults::default() });
    assert_eq!(rig.reactor.write(5, &[1; 512]), Outcome::Failed);
    assert_eq!(rig.reactor.write(5, &[1; 512]), Outcome::Failed);
    assert_eq!(rig.reactor.flush(), Outcome::Failed);
    rig.ask(|reply| CacheMessage::Status { reply });
    let CacheState::Fenced(why) = rig.status.gauges().state else { panic!("fenced") };
    assert!(why.contains("everything up to point 1 is safe"), "{why}");
    let mut again = rig.killed(options());
    again.check_range(6, 8);
}

/// Overlapping writes under way together: the guest may see either order, but it is one order, in
/// reads, in the log and on the backing (J5, W8).
#[test]
fn overlapping_writes_have_one_order_everywhere() {
    for seed in 0..20 {
        let mut rig = Rig::new(shape(6, 64 * KIB), options());
        let faults = Faults { reorder: true, slow_polls: 2, ..Faults::default() };
        rig.flash.set_faults(faults.clone());
        rig.backing.set_faults(faults);
        let mut random = fastrand::Rng::with_seed(seed);
        let mut buffers = Vec::new();
        for value in 1..=40u8 {
            let count = random.u64(1..24);
            let buffer = PinnedBuffer::new(16384);
            buffer.segment().copy_from(&[value; 16384]);
            let range = SectorRange { start: random.u64(0..16), count };
            let part = [buffer.segment().part(0, (count * 512) as usize)];
            rig.reactor.submit(RequestKind::Write, &[range], &part).expect("fewer than 64");
            buffers.push(buffer);
            if random.u8(0..4) == 0 {
                rig.reactor.turn(false);
            }
        }
        let mut ended = 0;
        while ended < 40 {
            rig.reactor.turn(true);
            ended += rig.reactor.ended().len();
        }
        let mut bytes = vec![0; 40 * 512];
        assert_eq!(rig.reactor.read(0, &mut bytes), Outcome::Done);
        rig.truth[..bytes.len()].copy_from_slice(&bytes);
        rig.drain();
        rig.killed(options()).check();
    }
}

/// Past the log, on a backing whose blocks are larger than the guest's requests.
#[test]
fn requests_of_any_size_pass_the_log_by_on_a_backing_of_large_blocks() {
    for (seed, mode) in [Mode::WriteAround, Mode::ReadOnly, Mode::Bypass].into_iter().enumerate() {
        for (block_bytes, zero) in [(512, false), (4096, true), (4096, false)] {
            let mut geometry = crate::io::sim::sim_geometry(DISK_BYTES);
            (geometry.block_bytes, geometry.memory_alignment) = (block_bytes, block_bytes);
            (geometry.zero, geometry.discard) = (zero, zero);
            let backing = crate::io::sim::SimDisk::with(Default::default(), geometry, 1);
            let mut rig = Rig::on(formatted(shape(6, 64 * KIB)), backing, options());
            rig.ask(|reply| CacheMessage::SetMode { mode, reply }).expect("switched");
            let faults = Faults { reorder: true, slow_polls: 2, ..Faults::default() };
            rig.backing.set_faults(faults);
            let mut many = Many::new(rig, seed as u64);
            many.run(1200, 1 + seed * 30, 40);
            assert_eq!(many.failed, 0, "{mode:?} {block_bytes} {zero}");
            many.rig.check();
            let mode = Mode::WriteBack;
            many.rig.ask(|reply| CacheMessage::SetMode { mode, reply }).expect("switched");
            many.run(100, 8, 40);
            many.rig.drain();
        }
    }
}
