//! Every power cut that could hit the pool's operations leaves a sound pool: what had returned is
//! there, what had not is there or not as a whole, and no extent changes hands with data in it.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use vflash::base::units::{EXTENT_BYTES, KIB, MIB};
use vflash::base::{ErrorKind, Result};
use vflash::flash::{
    Allocation, AllocationId, Class, ExtentRange, FormatOptions, NewAllocation, Pool, ThinKind,
    ThinRequest,
};
use vflash::io::blocking::Blocking;
use vflash::io::crash::{CrashCase, Explorer};
use vflash::io::disk::Disk;
use vflash::io::sim::{Faults, SimDisk};

const DEVICE_BYTES: u64 = 40 * MIB;

/// One operation of a workload; what it acts on is found by its random number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    CreateThick,
    CreateThin,
    Grow,
    Shrink,
    Remove,
    Map,
    Unmap,
    Attributes,
    Scrub,
    Checkpoint,
    GrowDevice,
    GrowDeviceMuch,
}

const STEPS: [Step; 12] = [
    Step::CreateThick,
    Step::CreateThin,
    Step::Grow,
    Step::Shrink,
    Step::Remove,
    Step::Map,
    Step::Unmap,
    Step::Attributes,
    Step::Scrub,
    Step::Checkpoint,
    Step::GrowDevice,
    Step::GrowDeviceMuch,
];

/// A pool under a recorded workload, and what it held after each step.
struct Run {
    disk: SimDisk,
    pool: Pool,
    random: fastrand::Rng,
    /// Event time at which a step had returned, and the allocations then.
    history: Vec<(u64, Vec<Allocation>)>,
    /// Event time at which a guest's flush had returned, the extent it wrote before, and what.
    flushed: Vec<(u64, u64, Vec<u8>)>,
}

impl Run {
    fn new(seed: u64) -> Self {
        let disk = SimDisk::new(DEVICE_BYTES);
        let options = FormatOptions {
            name: "crash".to_owned(),
            zeroed: true,
            uuid: Some([7; 16]),
            log_bytes: Some(20 * KIB),
            ..Default::default()
        };
        let pool = Pool::format_with(Box::new(disk.clone()), options).expect("format");
        disk.set_faults(Faults { reorder: true, ..Default::default() });
        disk.record();
        let random = fastrand::Rng::with_seed(seed);
        let mut run = Self { disk, pool, random, history: Vec::new(), flushed: Vec::new() };
        run.note();
        run
    }

    fn note(&mut self) {
        let allocations = self.pool.allocations().cloned().collect();
        self.history.push((self.disk.position(), allocations));
    }

    fn step(&mut self, step: Step) {
        let done = self.carry_out(step);
        if let Err(error) = done {
            assert!(matches!(error.kind(), ErrorKind::Full | ErrorKind::Invalid), "{error}");
        }
        self.note();
        self.write_data();
    }

    fn choose(&mut self, thin: Option<bool>) -> Option<(AllocationId, u64)> {
        let fits = |allocation: &&Allocation| thin.is_none_or(|thin| allocation.thin == thin);
        let fitting: Vec<&Allocation> = self.pool.allocations().filter(fits).collect();
        self.random.choice(fitting).map(|allocation| (allocation.id, allocation.size_bytes))
    }

    fn carry_out(&mut self, step: Step) -> Result<()> {
        match step {
            Step::CreateThick | Step::CreateThin => {
                let blocks = self.random.u64(1..4 * EXTENT_BYTES / 4096);
                let new = NewAllocation {
                    name: format!("vm/{}", self.disk.position()),
                    size_bytes: blocks * 4096,
                    thin: step == Step::CreateThin,
                    class: self.random.choice([Class::Volatile, Class::Nonvolatile]).expect("two"),
                    attributes: vec![b'{'; self.random.usize(0..4096)],
                };
                return self.pool.create(new).map(|_| ());
            }
            Step::Scrub => return self.pool.scrub_step(2 * MIB).map(|_| ()),
            Step::Checkpoint => return self.pool.checkpoint(),
            Step::GrowDevice | Step::GrowDeviceMuch => {
                let more = if step == Step::GrowDevice { MIB } else { 400 * MIB };
                let size_bytes = self.disk.geometry().size_bytes;
                if size_bytes < 1024 * MIB {
                    self.disk.set_size(size_bytes + more);
                }
                return self.pool.grow();
            }
            _ => {}
        }
        let thin = matches!(step, Step::Map | Step::Unmap).then_some(true);
        let Some((id, size_bytes)) = self.choose(thin) else { return Ok(()) };
        match step {
            Step::Grow => self.pool.resize(id, size_bytes + self.random.u64(1..600) * 4096),
            Step::Shrink => self.pool.resize(id, self.random.u64(1..=size_bytes / 4096) * 4096),
            Step::Remove => self.pool.remove(id),
            Step::Attributes => {
                let length = self.random.usize(0..4096);
                self.pool.set_attributes(id, vec![b'a'; length])
            }
            _ => self.thin(id, size_bytes.div_ceil(EXTENT_BYTES), step == Step::Map),
        }
    }

    fn thin(&mut self, id: AllocationId, extents: u64, map: bool) -> Result<()> {
        let start = self.random.u64(0..extents);
        let count = self.random.u64(1..=extents - start);
        let kind = if map {
            ThinKind::Map((start..start + count).collect())
        } else {
            ThinKind::Unmap(vec![ExtentRange { start, count }])
        };
        let replies = self.pool.thin_batch(&[ThinRequest { id, kind }]);
        replies.into_iter().next().expect("one reply").map(|_| ())
    }

    /// A guest writes to one of its extents, and perhaps flushes.
    fn write_data(&mut self) {
        let Some((id, _)) = self.choose(None) else { return };
        let allocation = self.pool.allocation(id).expect("chosen");
        let Some(run) = self.random.choice(allocation.runs().collect::<Vec<_>>()) else { return };
        let extent = run.physical + self.random.u64(0..run.count);
        let stamp = stamp(id, run.generation);
        let mut blocking = Blocking::new(Box::new(self.disk.clone()));
        blocking.write_copies(&[extent * EXTENT_BYTES], &stamp).expect("written");
        if self.random.bool() {
            blocking.flush().expect("flushed");
            self.flushed.push((self.disk.position(), extent, stamp));
        }
    }

    /// Visits every crash state of the run; returns how many there were, nested ones included.
    fn explore(&self, seed: u64) -> u64 {
        let mut states = 0;
        Explorer::new(seed).explore(&self.disk.recording(), |case, disk| {
            states += self.verify(case, disk);
        });
        states
    }

    /// Looks at the state; at some also at every crash of the recovery from it.
    fn verify(&self, case: CrashCase, disk: SimDisk) -> u64 {
        disk.record();
        self.verify_once(case, disk.clone());
        if case.index % 16 != 1 {
            return 1;
        }
        let explorer = Explorer { only: None, ..Explorer::new(case.seed) };
        let point = case.point;
        1 + explorer.explore(&disk.recording(), |case, disk| {
            self.verify_once(CrashCase { point, ..case }, disk);
        })
    }

    fn verify_once(&self, case: CrashCase, disk: SimDisk) {
        let mut pool = Pool::open(Box::new(disk.clone())).expect("a crash leaves a pool");
        let report = pool.check();
        assert!(report.is_clean(), "{:?}", report.findings);
        let found: Vec<Allocation> = pool.allocations().cloned().collect();
        let returned = self.history.iter().rposition(|(at, _)| *at <= case.point).expect("start");
        let matches =
            |index: usize| self.history.get(index).is_some_and(|(_, held)| *held == found);
        assert!(
            matches(returned) || matches(returned + 1),
            "neither the state before nor after step {}: {found:#?}",
            returned + 1
        );
        let content = disk.content();
        for range in pool.clean() {
            assert!(content.is_zero(range.offset(), range.bytes()), "clean {range:?} holds data");
        }
        let flushed = self.flushed.iter().take_while(|(at, _, _)| *at <= case.point);
        let flushed: BTreeSet<(u64, &[u8])> =
            flushed.map(|(_, extent, stamp)| (*extent, &stamp[..])).collect();
        for allocation in &found {
            for run in allocation.runs() {
                for extent in run.physical..run.physical + run.count {
                    let head = disk.peek(extent * EXTENT_BYTES, 512);
                    let stamp = stamp(allocation.id, run.generation);
                    let own = head == stamp;
                    let owed = flushed.contains(&(extent, &stamp[..]));
                    assert!(own || !owed, "extent {extent} lost what its owner had flushed");
                    let zero = head.iter().all(|byte| *byte == 0);
                    assert!(own || zero, "extent {extent} shows another owner's data");
                }
            }
        }
    }
}

/// What only this owner, since this mapping, writes.
fn stamp(id: AllocationId, generation: u64) -> Vec<u8> {
    let words = [0x5eed_0000_0000_0001, id.0, generation, !generation];
    words.iter().flat_map(|word: &u64| word.to_le_bytes()).cycle().take(512).collect()
}

/// Runs the workloads on all cores; the total number of crash states.
fn explore_all(workloads: Vec<(u64, Vec<Step>)>) -> u64 {
    let (next, states) = (AtomicU64::new(0), AtomicU64::new(0));
    let worker = || {
        while let Some((seed, steps)) = workloads.get(next.fetch_add(1, Ordering::Relaxed) as usize)
        {
            let mut run = Run::new(*seed);
            steps.iter().for_each(|step| run.step(*step));
            states.fetch_add(run.explore(*seed), Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(worker);
        }
    });
    states.load(Ordering::Relaxed)
}

#[test]
fn every_crash_state_of_random_workloads_is_sound() {
    // VFLASH_CRASH_RUNS: more of them.
    let runs = std::env::var("VFLASH_CRASH_RUNS").ok().and_then(|text| text.parse().ok());
    let workloads = (0..runs.unwrap_or(40)).map(|seed| {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut steps = vec![Step::CreateThick, Step::CreateThin, Step::Map];
        steps.extend((0..22).map(|_| STEPS[random.usize(..STEPS.len())]));
        (seed, steps)
    });
    let states = explore_all(workloads.collect());
    println!("random workloads: {states} crash states, 0 failures");
    let alone = std::env::var_os("VFLASH_CRASH_CASE").is_some();
    assert!(alone || states >= 20_000, "{states} crash states are too few");
}

#[test]
fn every_crash_state_of_all_pairs_of_operations_is_sound() {
    let mut workloads = Vec::new();
    for (index, first) in STEPS.iter().enumerate() {
        for (other, second) in STEPS.iter().enumerate() {
            let prepared = [Step::CreateThick, Step::CreateThin, Step::Map, Step::Shrink];
            let mut steps = prepared.to_vec();
            steps.extend([*first, *second]);
            workloads.push(((index * STEPS.len() + other) as u64, steps));
        }
    }
    let states = explore_all(workloads);
    println!("pairs of operations: {states} crash states, 0 failures");
    let alone = std::env::var_os("VFLASH_CRASH_CASE").is_some();
    assert!(alone || states >= 20_000, "{states} crash states are too few");
}

/// The explorer itself: without the flush that the rule asks for, states must be lost.
#[test]
fn a_workload_without_flushes_is_caught() {
    let disk = SimDisk::new(MIB);
    disk.record();
    let mut blocking = Blocking::new(Box::new(disk.clone()));
    blocking.write_copies(&[0], &[1; 512]).expect("written");
    let returned = disk.position();
    blocking.flush().expect("flushed");
    let durable = disk.position();
    let (mut lost, mut kept) = (0, 0);
    Explorer::new(1).explore(&disk.recording(), |case, state| {
        let there = state.peek(0, 512) == [1; 512];
        assert!(there || case.point < durable, "a flushed write is never lost");
        if case.point >= returned || there {
            kept += u64::from(there);
        } else {
            lost += 1;
        }
    });
    assert!(lost > 0 && kept > 0, "un-flushed writes are lost in some states and not in others");
}
