//! The pool against a model that knows nothing of extents' places.

use super::*;
use crate::base::units::KIB;
use crate::flash::{FormatOptions, ThinKind, ThinRequest};
use crate::io::disk::Errno;
use crate::io::file::{FileDisk, Preallocation};
use crate::io::sim::{Content, Failure, Faults, SimDisk, sim_geometry};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Debug, PartialEq, Eq)]
struct Modelled {
    size_bytes: u64,
    thin: bool,
    class: Class,
    attributes: Vec<u8>,
    mapped: BTreeSet<u64>,
}

type Model = BTreeMap<String, Modelled>;

fn seen(pool: &Pool) -> Model {
    let one = |allocation: &Allocation| Modelled {
        size_bytes: allocation.size_bytes,
        thin: allocation.thin,
        class: allocation.class,
        attributes: allocation.attributes.clone(),
        mapped: allocation.runs().flat_map(|run| run.logical..run.logical().end()).collect(),
    };
    pool.allocations().map(|allocation| (allocation.name.clone(), one(allocation))).collect()
}

pub(in crate::flash) fn make(disk: &SimDisk, log_bytes: Option<u64>) -> Pool {
    let options = FormatOptions {
        name: "test".into(),
        zeroed: true,
        uuid: Some([9; 16]),
        log_bytes,
        ..Default::default()
    };
    Pool::format_with(Box::new(disk.clone()), options).expect("format")
}

pub(in crate::flash) fn thick(name: &str, size_bytes: u64) -> NewAllocation {
    let attributes = b"{}".to_vec();
    NewAllocation { name: name.into(), size_bytes, thin: false, class: Class::Volatile, attributes }
}

pub(in crate::flash) fn thin(name: &str, size_bytes: u64) -> NewAllocation {
    NewAllocation { thin: true, ..thick(name, size_bytes) }
}

/// One random operation on pool and model; both must agree whether it works.
fn step(pool: &mut Pool, model: &mut Model, random: &mut fastrand::Rng) {
    let space = pool.space();
    let available = (space.free_bytes + space.scrub_bytes) / EXTENT_BYTES;
    let size_bytes = random.u64(1..6 * EXTENT_BYTES / 4096) * 4096;
    let extents = size_bytes.div_ceil(EXTENT_BYTES);
    let name = format!("vm/{}", random.u8(0..6));
    let found = pool.find(&name).map(|allocation| allocation.id);
    let Some(id) = found else {
        let thin = random.bool();
        let new = NewAllocation { thin, ..thick(&name, size_bytes) };
        let fits = thin || extents <= available;
        assert_eq!(pool.create(new.clone()).is_ok(), fits);
        if fits {
            let mapped = if thin { BTreeSet::new() } else { (0..extents).collect() };
            let NewAllocation { class, attributes, .. } = new;
            model.insert(name, Modelled { size_bytes, thin, class, attributes, mapped });
        }
        return;
    };
    let held = model.get_mut(&name).expect("both have it");
    match random.u8(0..6) {
        0 => {
            pool.remove(id).expect("removed");
            assert_eq!(pool.remove(id).map_err(|error| error.kind()), Err(ErrorKind::Gone));
            model.remove(&name);
        }
        1 => {
            let attributes = vec![b'x'; random.usize(0..=ATTRIBUTES_BYTES_MAX)];
            pool.set_attributes(id, attributes.clone()).expect("set");
            held.attributes = attributes;
        }
        2 | 3 => {
            let more = extents.saturating_sub(held.size_bytes.div_ceil(EXTENT_BYTES));
            let fits = held.thin || more <= available;
            assert_eq!(pool.resize(id, size_bytes).is_ok(), fits, "{more} of {available}");
            if fits {
                let old = held.size_bytes.div_ceil(EXTENT_BYTES);
                held.size_bytes = size_bytes;
                held.mapped.retain(|extent| *extent < extents);
                if !held.thin {
                    held.mapped.extend(old..extents);
                }
            }
        }
        kind => {
            let start = random.u64(0..held.size_bytes.div_ceil(EXTENT_BYTES));
            let range = start..held.size_bytes.div_ceil(EXTENT_BYTES).min(start + random.u64(1..4));
            let missing = range.clone().filter(|extent| !held.mapped.contains(extent)).count();
            let asked = if kind == 4 {
                ThinKind::Map(range.clone().collect())
            } else {
                ThinKind::Unmap(vec![ExtentRange { start, count: range.end - start }])
            };
            let works = held.thin && (kind == 5 || missing as u64 <= available);
            let reply = pool.thin_batch(&[ThinRequest { id, kind: asked }]).remove(0);
            assert_eq!(reply.is_ok(), works, "{reply:?}");
            match reply {
                Ok(runs) if kind == 4 => {
                    assert!(runs.iter().map(|run| run.logical).eq(range.clone()));
                    held.mapped.extend(range);
                }
                Ok(_) => held.mapped.retain(|extent| !range.contains(extent)),
                Err(_) => {}
            }
        }
    }
}

#[test]
fn random_operations_agree_with_a_model_and_survive_reopening() {
    for seed in 0..6 {
        let mut random = fastrand::Rng::with_seed(seed);
        let disk = SimDisk::new(24 * MIB);
        let mut pool = make(&disk, Some(20 * KIB));
        let mut model = Model::new();
        for round in 0..600 {
            step(&mut pool, &mut model, &mut random);
            if random.u8(0..8) == 0 {
                pool.scrub_step(random.u64(0..4 * MIB)).expect("scrubbed");
            }
            assert_eq!(seen(&pool), model);
            let space = pool.space();
            let sum = space.allocated_bytes + space.free_bytes + space.scrub_bytes;
            assert_eq!(sum + space.metadata_bytes, space.total_bytes);
            let mapped: usize = model.values().map(|held| held.mapped.len()).sum();
            assert_eq!(space.allocated_bytes, mapped as u64 * EXTENT_BYTES);
            if round % 50 == 0 {
                let report = pool.check();
                assert!(report.is_clean(), "{:?}", report.findings);
                let table = pool.table.clone();
                pool = Pool::open(Box::new(disk.clone())).expect("reopened");
                assert_eq!(pool.table, table);
            }
        }
    }
}

#[test]
fn wrong_requests_are_refused_with_what_to_do_and_change_nothing() {
    let disk = SimDisk::new(24 * MIB);
    let mut pool = make(&disk, None);
    let id = pool.create(thick("vm/a", 4 * MIB)).expect("created");
    let before = pool.table.clone();
    let kind = |result: Result<AllocationId>| result.expect_err("refused").kind();
    assert_eq!(kind(pool.create(thick("vm/a", MIB))), ErrorKind::Busy);
    for name in ["", "a\nb", &"x".repeat(256)] {
        assert_eq!(kind(pool.create(thick(name, MIB))), ErrorKind::Invalid);
    }
    for size in [0, 1, 4097, u64::MAX, u64::MAX - 4095] {
        assert_eq!(kind(pool.create(thick("vm/b", size))), ErrorKind::Invalid);
        assert_eq!(kind(pool.resize(id, size).map(|()| id)), ErrorKind::Invalid);
    }
    let long = NewAllocation { attributes: vec![0; 4097], ..thick("vm/b", MIB) };
    assert_eq!(kind(pool.create(long)), ErrorKind::Invalid);
    let error = pool.create(thick("vm/b", 64 * MIB)).expect_err("too large");
    assert_eq!(error.kind(), ErrorKind::Full);
    assert!(error.to_string().contains("grow the pool"), "{error}");
    assert_eq!(kind(pool.grow().map(|()| id)), ErrorKind::Invalid);
    assert_eq!(pool.table, before);
}

#[test]
fn entries_fill_the_table_only_as_far_as_the_worst_case_leaves_room() {
    let disk = SimDisk::new(24 * MIB);
    let mut pool = make(&disk, None);
    let mut count = 0;
    let error = loop {
        let new = NewAllocation { attributes: vec![1; 4096], ..thin(&format!("vm/{count}"), MIB) };
        match pool.create(new) {
            Ok(_) => count += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::Full);
    assert!(error.to_string().contains("no room in its table"), "{error}");
    assert!(count > 50, "{count}");
    // Now every free extent as a run of its own: T5 is asserted by the checkpoint.
    let extents = pool.space().free_bytes / EXTENT_BYTES;
    for extent in 0..extents {
        let id = AllocationId(1 + extent % count);
        let kind = ThinKind::Map(vec![0]);
        assert!(pool.thin_batch(&[ThinRequest { id, kind }])[0].is_ok());
    }
    pool.checkpoint().expect("fits");
    assert!(pool.check().is_clean());
}

#[test]
fn a_used_device_is_not_formatted_unless_told_to() {
    let disk = SimDisk::new(24 * MIB);
    make(&disk, None);
    let format = |overwrite| {
        let options = FormatOptions { name: "new".into(), overwrite, ..Default::default() };
        Pool::format_with(Box::new(disk.clone()), options).map(|pool| pool.name().to_owned())
    };
    assert_eq!(format(false).expect_err("refused").kind(), ErrorKind::Busy);
    assert_eq!(format(true).expect("told to"), "new");
    let disk = SimDisk::new(24 * MIB);
    disk.poke(1024, b"an ext4 superblock");
    let error = Pool::format(Box::new(disk.clone()), "p").err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert_eq!(disk.peek(1024, 18), b"an ext4 superblock");
    let error = Pool::open(Box::new(disk)).err().expect("no pool");
    assert_eq!(error.kind(), ErrorKind::Gone);
    for (bytes, block_bytes) in [(MIB, 512), (24 * MIB, 8192)] {
        let geometry = crate::io::disk::DiskGeometry { block_bytes, ..sim_geometry(bytes) };
        let disk = SimDisk::with(Content::default(), geometry, 0);
        let error = Pool::format(Box::new(disk), "p").err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
}

#[test]
fn what_a_dirty_device_held_is_scrubbed_before_anybody_gets_it() {
    let disk = SimDisk::new(24 * MIB);
    for extent in 1..24 {
        disk.poke(extent * EXTENT_BYTES + 4096, b"an earlier life");
    }
    let mut pool = Pool::format(Box::new(disk.clone()), "dirty").expect("format");
    assert_eq!(pool.space().free_bytes, 0);
    let id = pool.create(thick("vm/a", 8 * MIB)).expect("scrubs on demand");
    for run in pool.allocation(id).expect("there").runs() {
        let physical = run.physical();
        assert!(disk.content().is_zero(physical.offset(), physical.bytes()));
    }
}

#[test]
fn an_extent_that_cannot_be_zeroed_is_passed_over() {
    let disk = SimDisk::new(24 * MIB);
    let mut pool = Pool::format(Box::new(disk.clone()), "bad").expect("format");
    let dirty = pool.space().scrub_bytes;
    let fail = Failure { after: 0, forever: false, errno: Errno::EIO, torn: false };
    disk.set_faults(Faults { fail: Some(fail), ..Default::default() });
    let error = pool.scrub_step(MIB).expect_err("fails");
    assert!(error.to_string().contains("stays out of use"), "{error}");
    assert_eq!(pool.space().scrub_bytes, dirty, "nothing was declared clean");
    assert!(!pool.is_fenced());
    let progress = pool.scrub_step(MIB).expect("goes on behind it");
    assert_eq!(progress.left_bytes, dirty - MIB);
    while pool.scrub_step(4 * MIB).expect("goes on").left_bytes > 0 {}
    assert_eq!(pool.space().scrub_bytes, 0, "and comes back to it");
}

#[test]
fn watermarks_rise_with_what_is_allocated() {
    let disk = SimDisk::new(128 * MIB);
    let mut pool = make(&disk, None);
    let total = pool.space().free_bytes;
    let id = pool.create(thick("vm/a", MIB)).expect("created");
    for (percent, mark) in [
        (50, Watermark::Normal),
        (79, Watermark::Normal),
        (81, Watermark::High),
        (96, Watermark::Critical),
        (100, Watermark::Full),
    ] {
        let extents = total / EXTENT_BYTES * percent / 100;
        pool.resize(id, extents * EXTENT_BYTES).expect("resized");
        assert_eq!(pool.space().watermark, mark, "{percent} %");
    }
}

#[test]
fn a_null_pool_is_made_used_and_forgotten() {
    let device = crate::io::file::Device::open("null:1GiB", std::time::Duration::ZERO);
    let device = device.expect("opened");
    let options = FormatOptions { name: "null".into(), zeroed: true, ..Default::default() };
    let mut pool = Pool::format_with(device.disk, options).expect("format");
    pool.create(thick("vm/a", 512 * MIB)).expect("created");
    assert!(pool.check().is_clean());
    assert!(pool.geometry().size_bytes <= device.target.geometry().size_bytes, "volumes fit");
}

type Operation = (&'static str, fn(&mut Pool) -> Result<()>);

const OPERATIONS: [Operation; 10] = [
    ("create", |pool| pool.create(thick("vm/new", 3 * MIB)).map(|_| ())),
    ("create thin", |pool| pool.create(thin("vm/new", 3 * MIB)).map(|_| ())),
    ("grow", |pool| pool.resize(AllocationId(1), 5 * MIB)),
    ("shrink", |pool| pool.resize(AllocationId(1), 4096)),
    ("remove", |pool| pool.remove(AllocationId(1))),
    ("attributes", |pool| pool.set_attributes(AllocationId(1), vec![5; 4000])),
    ("map", |pool| {
        let request = ThinRequest { id: AllocationId(2), kind: ThinKind::Map(vec![0, 3, 4]) };
        pool.thin_batch(&[request]).remove(0).map(|_| ())
    }),
    ("unmap", |pool| {
        let kind = ThinKind::Unmap(vec![ExtentRange { start: 0, count: 3 }]);
        pool.thin_batch(&[ThinRequest { id: AllocationId(2), kind }]).remove(0).map(|_| ())
    }),
    ("grow device", Pool::grow),
    ("checkpoint", Pool::checkpoint),
];

/// A pool on which each of the operations works, with a log that is nearly full or not.
fn prepared(records: u64) -> (SimDisk, Pool) {
    let disk = SimDisk::new(24 * MIB);
    let mut pool = make(&disk, Some(32 * KIB));
    pool.create(thick("vm/thick", 2 * MIB + 8192)).expect("created");
    let id = pool.create(thin("vm/thin", 8 * MIB)).expect("created");
    pool.thin_batch(&[ThinRequest { id, kind: ThinKind::Map(vec![1, 2, 6]) }])
        .remove(0)
        .expect("ok");
    for index in 0..records {
        pool.set_attributes(id, vec![index as u8]).expect("set");
    }
    disk.set_size(600 * MIB);
    (disk, pool)
}

#[test]
fn each_operation_survives_the_failure_of_each_of_its_operations() {
    let mut cases = 0;
    for (name, operate) in OPERATIONS {
        for (records, forever) in [(0, false), (0, true), (5, false), (5, true)] {
            for after in 0.. {
                let (disk, mut pool) = prepared(records);
                let before = pool.table.clone();
                let fail = Failure { after, forever, errno: Errno::EIO, torn: after % 2 == 0 };
                disk.set_faults(Faults { fail: Some(fail), ..Default::default() });
                let begun = disk.operations();
                let done = operate(&mut pool);
                let reached = disk.operations() - begun > after;
                let fenced = pool.is_fenced();
                assert!(done.is_err() || !fenced, "{name}: done is settled");
                if forever && reached {
                    assert!(done.is_err(), "{name}: a dead disk is noticed");
                    let error = pool.set_attributes(AllocationId(2), Vec::new());
                    assert!(error.is_err(), "{name}: and nothing goes on");
                }
                disk.set_faults(Faults::default());
                // What a killed daemon would leave is the state before or after, never another.
                let copy = SimDisk::with(disk.content(), sim_geometry(600 * MIB), 1);
                let reopened = Pool::open(Box::new(copy)).expect("opens");
                assert!(
                    same(&reopened.table, &before) || same(&reopened.table, &pool.table),
                    "{name} {after}"
                );
                // And this one heals: what was open is settled by the next operation.
                pool.checkpoint().expect("settled");
                assert!(!pool.is_fenced());
                let report = pool.check();
                assert!(report.is_clean(), "{name} {after}: {:?}", report.findings);
                let fresh = Pool::open(Box::new(disk.clone())).expect("opens");
                assert_eq!(fresh.table, pool.table, "{name} {after}");
                cases += 1;
                if !reached {
                    break;
                }
            }
        }
    }
    println!("fail the Nth operation: {cases} cases, 0 failures");
    assert!(cases > 200, "{cases}");
}

/// Equal but for scrubbing, which may commit on its own.
fn same(one: &Table, other: &Table) -> bool {
    one.allocations == other.allocations && one.next_id == other.next_id
}

#[test]
fn formatting_and_opening_survive_the_failure_of_each_of_their_operations() {
    for forever in [false, true] {
        for after in 0.. {
            let (disk, old) = prepared(2);
            let fail = Failure { after, forever, errno: Errno::EIO, torn: true };
            disk.set_faults(Faults { fail: Some(fail), ..Default::default() });
            let begun = disk.operations();
            let opened = Pool::open(Box::new(disk.clone()));
            let reached = disk.operations() - begun > after;
            if let Ok(pool) = opened {
                assert_eq!(pool.table, old.table, "one unreadable copy is no loss");
            }
            disk.set_faults(Faults::default());
            let pool = Pool::open(Box::new(disk.clone())).expect("the disk is well again");
            assert_eq!(pool.table, old.table);
            disk.set_faults(Faults { fail: Some(fail), ..Default::default() });
            let options =
                FormatOptions { name: "new".into(), overwrite: true, ..Default::default() };
            let formatted = Pool::format_with(Box::new(disk.clone()), options);
            disk.set_faults(Faults::default());
            match Pool::open(Box::new(disk)) {
                Ok(found) if formatted.is_ok() => assert_eq!(found.name(), "new"),
                Ok(found) => assert!(found.table == old.table || found.name() == "new"),
                Err(error) => assert!(formatted.is_err(), "{error}"),
            }
            if !reached {
                break;
            }
        }
    }
}

#[test]
fn the_space_of_a_pool_whose_file_was_cut_short_still_adds_up() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("pool");
    let disk = FileDisk::create(&path, 64 * MIB, Preallocation::Reserved).expect("created");
    let pool = Pool::format(Box::new(disk), "cut").expect("format");
    let before = pool.space();
    let file = std::fs::File::options().write(true).open(&path).expect("opened");
    file.set_len(8 * MIB).expect("cut short");
    assert_eq!(pool.space(), before);
}
