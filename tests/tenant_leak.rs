//! No byte of a former owner: tenants fill their volumes with canaries and are freed, shrunk,
//! trimmed or cut off by a crash at any moment; whoever comes next reads everything it was given.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use vflash::base::units::{EXTENT_BYTES, MIB, SECTOR_BYTES};
use vflash::flash::{
    AllocationId, Class, FlashVolume, FormatOptions, FullPolicy, Keeper, KeeperOptions,
    NewAllocation, Pool, VolumeCounters, VolumeOptions,
};
use vflash::io::crash::Explorer;
use vflash::io::disk::{Disk, DiskGeometry};
use vflash::io::sim::{Content, SimDisk, sim_geometry};
use vflash::io::sim_reactor::{SimReactor, inbox};
use vflash::io::volume::{Outcome, RequestKind, SectorRange};

const CYCLES: u64 = 2000;
const DEVICE_BYTES: u64 = 24 * MIB;

/// What a tenant fills its volume with, 16 bytes over and over. Never zero.
fn canary(tenant: u64) -> [u8; 16] {
    let mut canary = *b"tenant\0\0--------";
    canary[8..].copy_from_slice(&tenant.to_le_bytes());
    canary
}

struct Tenant {
    number: u64,
    size_bytes: u64,
    volume: SimReactor<FlashVolume>,
}

struct World {
    disk: SimDisk,
    keeper: Keeper,
    tenants: BTreeMap<AllocationId, Tenant>,
    random: fastrand::Rng,
    next: u64,
    bytes_read: u64,
    crashes: u64,
}

impl World {
    fn new(geometry: DiskGeometry, seed: u64) -> Self {
        let disk = SimDisk::with(Content::default(), geometry, seed);
        // The device itself had an owner before.
        for block in 0..DEVICE_BYTES / 65_536 {
            disk.poke(block * 65_536, &canary(u64::MAX).repeat(256));
        }
        let name = "leak".to_owned();
        let options = FormatOptions { name, overwrite: true, ..Default::default() };
        let pool = Pool::format_with(Box::new(disk.clone()), options).expect("format");
        disk.record();
        let keeper = Keeper::start(pool, keeper_options()).expect("keeper");
        let random = fastrand::Rng::with_seed(seed);
        let tenants = BTreeMap::new();
        Self { disk, keeper, tenants, random, next: 1, bytes_read: 0, crashes: 0 }
    }

    /// A new tenant comes, reads all it got, and fills some or all of it.
    fn arrive(&mut self) {
        let number = self.next;
        self.next += 1;
        let size_bytes = self.random.u64(1..4 * EXTENT_BYTES / 4096) * 4096;
        let new = NewAllocation {
            name: format!("tenant/{number}"),
            size_bytes,
            thin: self.random.bool(),
            class: Class::Nonvolatile,
            attributes: number.to_le_bytes().to_vec(),
        };
        let made = self.keeper.call(move |pool| pool.create(new)).expect("runs");
        let Ok(id) = made else { return self.leave() };
        let volume = self.serve(id);
        self.tenants.insert(id, Tenant { number, size_bytes, volume });
        self.read_all(id, 0, true);
        self.fill(id);
    }

    fn serve(&mut self, id: AllocationId) -> SimReactor<FlashVolume> {
        let (notify, messages) = inbox();
        let options = VolumeOptions {
            notify,
            full: FullPolicy::Fail,
            geometry: self.disk.geometry(),
            counters: Arc::new(VolumeCounters::default()),
        };
        let volume = self.keeper.volume(id, options).expect("volume");
        SimReactor::new(volume, vec![Box::new(self.disk.clone())], messages, 4)
    }

    fn fill(&mut self, id: AllocationId) {
        let tenant = self.tenants.get_mut(&id).expect("there");
        let bytes = canary(tenant.number).repeat((tenant.size_bytes / 16) as usize);
        let skip = if self.random.bool() { 0 } else { self.random.usize(0..bytes.len() / 512) };
        for (index, part) in bytes.chunks(MIB as usize).enumerate().skip(skip / 2048) {
            // A thin tenant of a full pool is told so; what it has stays its own.
            let _ = tenant.volume.write(index as u64 * 2048, part);
        }
        if self.random.bool() {
            assert_eq!(tenant.volume.flush(), Outcome::Done);
        }
    }

    /// Everything from `from` on must be zeros, or (unless `fresh`) the tenant's own.
    fn read_all(&mut self, id: AllocationId, from: u64, fresh: bool) {
        let tenant = self.tenants.get_mut(&id).expect("there");
        let own = canary(tenant.number);
        let mut at = from;
        while at < tenant.size_bytes {
            let mut bytes = vec![0xff; (tenant.size_bytes - at).min(MIB) as usize];
            assert_eq!(tenant.volume.read(at / SECTOR_BYTES, &mut bytes), Outcome::Done);
            for (index, piece) in bytes.chunks(16).enumerate() {
                let zero = piece == [0; 16];
                let place = at + index as u64 * 16;
                assert!(
                    zero || (!fresh && piece == own),
                    "tenant {} reads {piece:?} at byte {place}",
                    tenant.number
                );
            }
            at += bytes.len() as u64;
            self.bytes_read += bytes.len() as u64;
        }
    }

    fn choose(&mut self) -> Option<AllocationId> {
        self.random.choice(self.tenants.keys().copied().collect::<Vec<_>>())
    }

    fn leave(&mut self) {
        let Some(id) = self.choose() else { return };
        self.tenants.remove(&id);
        self.keeper.detached(id);
        self.keeper.call(move |pool| pool.remove(id)).expect("runs").expect("removed");
    }

    /// Shrinks and grows again: what comes back is empty.
    fn shrink_and_grow(&mut self) {
        let Some(id) = self.choose() else { return };
        let old = self.tenants[&id].size_bytes;
        let small = self.random.u64(1..=old / 4096) * 4096;
        self.resize(id, small);
        if self.random.bool() && self.resize(id, old) {
            self.read_all(id, small, true);
        }
        self.read_all(id, 0, false);
    }

    fn resize(&mut self, id: AllocationId, size_bytes: u64) -> bool {
        let keeper = self.keeper.clone();
        let resize =
            std::thread::spawn(move || keeper.resize(id, size_bytes, Duration::from_secs(30)));
        let tenant = self.tenants.get_mut(&id).expect("there");
        while !resize.is_finished() {
            tenant.volume.turn(false);
            std::thread::yield_now();
        }
        tenant.volume.turn(false);
        let done = resize.join().expect("no panic").is_ok();
        if done {
            tenant.size_bytes = size_bytes;
        }
        done
    }

    fn trim(&mut self) {
        let Some(id) = self.choose() else { return };
        let tenant = self.tenants.get_mut(&id).expect("there");
        let sectors = tenant.size_bytes / SECTOR_BYTES;
        let start = self.random.u64(0..sectors / 2048 + 1) * 2048 % sectors;
        let range = SectorRange { start, count: self.random.u64(1..=sectors - start) };
        let done = tenant.volume.run(RequestKind::Discard, &[range], &[]);
        assert_eq!(done, Outcome::Done);
        let mut bytes = vec![0xff; (range.count * SECTOR_BYTES) as usize];
        assert_eq!(tenant.volume.read(start, &mut bytes), Outcome::Done);
        assert!(bytes.iter().all(|byte| *byte == 0), "what was discarded reads as zeros");
        if self.random.bool() {
            self.fill(id);
        }
    }

    /// The power goes at some moment since the last crash, or the daemon is killed now.
    fn crash(&mut self) {
        self.crashes += 1;
        self.tenants.clear();
        let keeper = self.keeper.clone();
        let geometry = self.disk.geometry();
        keeper.stop();
        self.disk = if self.random.u8(0..4) == 0 {
            SimDisk::with(self.disk.content(), geometry, self.random.u64(..))
        } else {
            let explorer = Explorer { only: None, ..Explorer::new(self.random.u64(..)) };
            let back = self.random.u64(0..=self.disk.position().min(60));
            let point = self.disk.position() - back;
            explorer.cut(&self.disk.recording(), point, self.random.u64(0..1000))
        };
        self.disk.record();
        let mut pool = Pool::open(Box::new(self.disk.clone())).expect("opens");
        let report = pool.check();
        assert!(report.is_clean(), "{:?}", report.findings);
        let found: Vec<(AllocationId, u64, u64)> = pool
            .allocations()
            .map(|allocation| {
                let number = allocation.attributes[..].try_into().expect("eight bytes");
                (allocation.id, u64::from_le_bytes(number), allocation.size_bytes)
            })
            .collect();
        self.keeper = Keeper::start(pool, keeper_options()).expect("keeper");
        for (id, number, size_bytes) in found {
            let volume = self.serve(id);
            self.tenants.insert(id, Tenant { number, size_bytes, volume });
            self.read_all(id, 0, false);
        }
    }

    fn cycle(&mut self) {
        self.arrive();
        match self.random.u8(0..4) {
            0 => self.leave(),
            1 => self.shrink_and_grow(),
            2 => self.trim(),
            _ => {
                while self.tenants.len() > 1 {
                    self.leave();
                }
            }
        }
        if self.random.u8(0..3) == 0 {
            self.crash();
        }
    }
}

fn keeper_options() -> KeeperOptions {
    KeeperOptions { scrub_bytes: 2 * MIB, ..Default::default() }
}

#[test]
fn nothing_of_a_former_tenant_is_ever_read() {
    let shapes = [(true, true), (true, false), (false, false), (false, true)];
    let worker = |index: usize, zero: bool, discard: bool| {
        let geometry = DiskGeometry { zero, discard, ..sim_geometry(DEVICE_BYTES) };
        let mut world = World::new(geometry, index as u64);
        for _ in 0..CYCLES / shapes.len() as u64 {
            world.cycle();
        }
        let World { keeper, bytes_read, crashes, .. } = world;
        keeper.stop();
        (bytes_read, crashes)
    };
    let totals = std::thread::scope(|scope| {
        let run = |(index, (zero, discard)): (usize, (bool, bool))| {
            scope.spawn(move || worker(index, zero, discard))
        };
        let workers: Vec<_> = shapes.into_iter().enumerate().map(run).collect();
        let join =
            |worker: std::thread::ScopedJoinHandle<'_, (u64, u64)>| worker.join().expect("no leak");
        workers.into_iter().map(join).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    });
    let (bytes_read, crashes) = totals;
    println!(
        "tenant leak: {CYCLES} cycles, {crashes} crashes, {} MiB read, 0 bytes of a former owner",
        bytes_read / MIB
    );
    assert!(crashes > CYCLES / 5 && bytes_read > 2 * CYCLES * MIB);
}
