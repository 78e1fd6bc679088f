//! The cached disk on simulated disks, against a plain array.

use super::*;
use crate::base::units::{KIB, MIB, SECTOR_BYTES};
use crate::cache::layout::Shape;
use crate::cache::medium::Medium;
use crate::cache::place::Place;
use crate::cache::recover::{FormatOptions, OpenOptions, format, open};
use crate::cache::root::BackingIdentity;
use crate::io::disk::Disk;
use crate::io::sim::SimDisk;
use crate::io::sim_reactor::{SimReactor, inbox};
use crate::io::volume::SectorRange;
use std::sync::Mutex;

pub(in crate::cache) const DISK_BYTES: u64 = 4 * MIB;

/// Three disks and what the guest should see.
pub(in crate::cache) struct Rig {
    pub flash: SimDisk,
    pub backing: SimDisk,
    pub reactor: SimReactor<CachedDisk>,
    pub status: Arc<CacheStatus>,
    send: Arc<dyn Fn(Box<dyn Any + Send>) + Send + Sync>,
    pub truth: Vec<u8>,
    seed: u8,
}

pub(in crate::cache) fn identity() -> BackingIdentity {
    BackingIdentity { size_bytes: DISK_BYTES, block_bytes: 512, kind: 0, fingerprint: [0; 16] }
}

pub(in crate::cache) fn medium(flash: &SimDisk) -> Medium {
    Medium::new(Box::new(flash.clone()), Place::whole(flash.geometry().size_bytes))
}

pub(in crate::cache) fn shape(segments: u64, segment_bytes: u64) -> Shape {
    Shape::with(MIB + segments * segment_bytes, segment_bytes).expect("a shape")
}

pub(in crate::cache) fn formatted(shape: Shape) -> SimDisk {
    let flash = SimDisk::new(shape.allocation_bytes);
    let options = FormatOptions {
        shape,
        log_uuid: [1; 16],
        disk_uuid: [2; 16],
        secret: 0x5eed,
        mode: Mode::WriteBack,
        backing: identity(),
        overwrite: false,
    };
    format(&mut medium(&flash), &options).expect("formatted");
    flash
}

pub(in crate::cache) fn options() -> CacheOptions {
    CacheOptions { wall_ms: || 0, now: || Nanos(0), ..CacheOptions::new("vm/disk") }
}

impl Rig {
    pub(in crate::cache) fn new(shape: Shape, options: CacheOptions) -> Self {
        Self::on(formatted(shape), SimDisk::new(DISK_BYTES), options)
    }

    /// Opens what is on the disks; the guest's view is taken from them.
    pub(in crate::cache) fn on(flash: SimDisk, backing: SimDisk, options: CacheOptions) -> Self {
        Self::with(flash, backing, options, &OpenOptions::new(identity(), 64 * MIB))
    }

    pub(in crate::cache) fn with(
        flash: SimDisk,
        backing: SimDisk,
        options: CacheOptions,
        how: &OpenOptions,
    ) -> Self {
        let opened = open(&mut medium(&flash), how).expect("opened");
        let disk = CachedDisk::new(opened, options, backing.geometry(), None);
        let status = disk.status();
        let (send, receiver) = inbox();
        let disks: Vec<Box<dyn crate::io::disk::Disk + Send>> =
            vec![Box::new(flash.clone()), Box::new(backing.clone())];
        let reactor = SimReactor::new(disk, disks, receiver, 64);
        let truth = vec![0; DISK_BYTES as usize];
        Self { flash, backing, reactor, status, send, truth, seed: 0 }
    }

    pub(in crate::cache) fn tell(&self, message: CacheMessage) {
        (self.send)(Box::new(message));
    }

    /// Sends a message and waits for its answer.
    pub(in crate::cache) fn ask<T: Send + 'static>(
        &mut self,
        message: impl FnOnce(Reply<T>) -> CacheMessage,
    ) -> T {
        let answer = Arc::new(Mutex::new(None));
        let slot = answer.clone();
        self.tell(message(Box::new(move |value| {
            *slot.lock().expect("one thread") = Some(value);
        })));
        loop {
            self.reactor.turn(false);
            if let Some(answer) = answer.lock().expect("one thread").take() {
                return answer;
            }
            self.reactor.turn(true);
        }
    }

    pub(in crate::cache) fn write(&mut self, start: u64, count: u64) {
        self.seed = self.seed.wrapping_add(1) | 1;
        let bytes: Vec<u8> =
            (0..count * SECTOR_BYTES).map(|at| (at as u8).wrapping_mul(31) ^ self.seed).collect();
        assert_eq!(self.reactor.write(start, &bytes), Outcome::Done);
        let from = (start * SECTOR_BYTES) as usize;
        self.truth[from..from + bytes.len()].copy_from_slice(&bytes);
    }

    pub(in crate::cache) fn zero(&mut self, kind: RequestKind, ranges: &[(u64, u64)]) {
        let sectors: Vec<SectorRange> = ranges
            .iter()
            .map(|(start, count)| SectorRange { start: *start, count: *count })
            .collect();
        assert_eq!(self.reactor.run(kind, &sectors, &[]), Outcome::Done);
        for (start, count) in ranges {
            let from = (start * SECTOR_BYTES) as usize;
            self.truth[from..from + (count * SECTOR_BYTES) as usize].fill(0);
        }
    }

    /// Everything that the guest reads is what it wrote last.
    pub(in crate::cache) fn check(&mut self) {
        self.check_range(0, DISK_BYTES / SECTOR_BYTES);
    }

    pub(in crate::cache) fn check_range(&mut self, start: u64, count: u64) {
        let mut bytes = vec![0xee; (count * SECTOR_BYTES) as usize];
        assert_eq!(self.reactor.read(start, &mut bytes), Outcome::Done);
        let from = (start * SECTOR_BYTES) as usize;
        let wrong = bytes.iter().zip(&self.truth[from..]).position(|(seen, truth)| seen != truth);
        assert_eq!(wrong.map(|at| start + at as u64 / 512), None, "first wrong sector");
    }

    /// All is drained; the backing alone is the disk.
    pub(in crate::cache) fn drain(&mut self) {
        let reached = self.ask(|reply| CacheMessage::Drain { to: None, hold: false, reply });
        reached.expect("drained");
        let backing = self.backing.peek(0, DISK_BYTES as usize);
        let wrong = backing.iter().zip(&self.truth).position(|(seen, truth)| seen != truth);
        assert_eq!(wrong.map(|at| at / 512), None, "first wrong sector of the backing");
    }

    /// The daemon is killed; another one opens what it left.
    pub(in crate::cache) fn killed(self, options: CacheOptions) -> Self {
        let flash = again(&self.flash);
        let backing = again(&self.backing);
        let truth = self.truth;
        Self { truth, seed: self.seed, ..Self::on(flash, backing, options) }
    }

    pub(in crate::cache) fn random_step(&mut self, random: &mut fastrand::Rng, sectors_max: u64) {
        let total = DISK_BYTES / SECTOR_BYTES;
        let count = random.u64(1..=sectors_max);
        let start = random.u64(0..total - count);
        match random.u8(0..20) {
            0 => self.zero(RequestKind::Discard, &[(start, count), (total / 2, 9)]),
            1 => self.zero(RequestKind::WriteZeroes { unmap: false }, &[(start, count)]),
            2 | 3 => assert_eq!(self.reactor.flush(), Outcome::Done),
            4..=7 => self.check_range(start, count),
            _ => self.write(start, count),
        }
    }
}

/// What a killed process leaves: everything completed, visible again.
pub(in crate::cache) fn again(disk: &SimDisk) -> SimDisk {
    SimDisk::with(disk.content(), disk.geometry(), 7)
}

#[test]
fn a_write_is_read_back_and_drained() {
    let mut rig = Rig::new(shape(8, 128 * KIB), options());
    rig.write(63, 9);
    rig.check();
    assert_eq!(rig.backing.peek(63 * 512, 16), [0; 16], "not drained yet");
    rig.drain();
    rig.check();
}

#[test]
fn random_requests_are_what_a_plain_array_would_hold() {
    for seed in 0..6 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut rig = Rig::new(shape(4 + seed % 3, 64 * KIB), options());
        for _ in 0..400 {
            rig.random_step(&mut random, 64);
        }
        rig.check();
        rig.drain();
        rig.check();
        let laps = rig.status.counters.appended_bytes.load(Ordering::Relaxed) / (256 * KIB);
        assert!(laps >= 3, "the log went round: {laps}");
    }
}
