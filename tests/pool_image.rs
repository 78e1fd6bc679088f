//! Pools that earlier versions made are opened by this one and every later one.
//!
//! `tests/images/pool-v1.bin` is a pool as format version 1 first wrote it, without its zeros: runs
//! of offset (u64), length (u32) and bytes, little-endian. It stays as it is for as long as version
//! 1 is read; a build that cannot open it has changed the format without saying so.

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;
use vflash::base::ErrorKind;
use vflash::base::checksum::crc32c;
use vflash::base::units::{EXTENT_BYTES, KIB, MIB};
use vflash::flash::{
    Allocation, CheckProgress, Class, ExtentRange, FormatOptions, NewAllocation, Pool, Run,
    ThinKind, ThinRequest,
};
use vflash::io::file::FileDisk;
use vflash::io::sim::SimDisk;

const DEVICE_BYTES: u64 = 24 * MIB;

/// The places of roots, which no version moves.
const ROOTS: [u64; 4] = [64 * KIB, 320 * KIB, 576 * KIB, 832 * KIB];

const UUID: [u8; 16] = *b"vflash format 1!";

/// Zeros between two runs that are not worth a run of their own.
const GAP_BYTES: usize = 16;

/// What is written into each extent that has an owner.
fn mark(text: &str) -> Vec<u8> {
    let mut block = vec![0; 4096];
    block[..text.len()].copy_from_slice(text.as_bytes());
    block
}

/// The pool of the image, made anew on `disk`: allocations made, grown, shrunk and removed, in a
/// table and in the log behind it, with freed extents that are scrubbed and others that are not.
fn make(disk: &SimDisk) -> Pool {
    let options = FormatOptions {
        name: "golden".into(),
        zeroed: true,
        uuid: Some(UUID),
        log_bytes: Some(64 * KIB),
        ..FormatOptions::default()
    };
    let new = |name: &str, size_bytes, thin, class, attributes: &[u8]| NewAllocation {
        name: name.into(),
        size_bytes,
        thin,
        class,
        attributes: attributes.to_vec(),
    };
    let mut pool = Pool::format_with(Box::new(disk.clone()), options).unwrap();
    let gone = pool.create(new("vm/gone", 2 * MIB, false, Class::Volatile, b"")).unwrap();
    let root = new("vm/root", 3 * MIB + 8192, false, Class::Nonvolatile, br#"{"readOnly":true}"#);
    let root = pool.create(root).unwrap();
    pool.remove(gone).unwrap();
    pool.scrub_step(MIB).unwrap();
    pool.checkpoint().unwrap();
    let thin = pool.create(new("vm/thin", 64 * MIB, true, Class::Volatile, b"{}")).unwrap();
    for kind in [ThinKind::Map(vec![5, 6, 40]), ThinKind::Unmap(vec![range(6, 1)])] {
        pool.thin_batch(&[ThinRequest { id: thin, kind }]).remove(0).unwrap();
    }
    pool.resize(root, 2 * MIB + 4096).unwrap();
    pool.set_attributes(root, br#"{"queues":4}"#.to_vec()).unwrap();
    pool
}

fn range(start: u64, count: u64) -> ExtentRange {
    ExtentRange { start, count }
}

/// Content as an image keeps it.
fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut image = Vec::new();
    let mut at = 0;
    while let Some(skip) = bytes[at..].iter().position(|byte| *byte != 0) {
        let start = at + skip;
        let (mut end, mut zeros) = (start, 0);
        while end + zeros < bytes.len() && zeros < GAP_BYTES {
            if bytes[end + zeros] == 0 {
                zeros += 1;
            } else {
                (end, zeros) = (end + zeros + 1, 0);
            }
        }
        image.extend((start as u64).to_le_bytes());
        image.extend(((end - start) as u32).to_le_bytes());
        image.extend(&bytes[start..end]);
        at = end;
    }
    image
}

fn unpacked(mut image: &[u8]) -> SimDisk {
    let disk = SimDisk::new(DEVICE_BYTES);
    while !image.is_empty() {
        let (mut offset, mut length) = ([0; 8], [0; 4]);
        image.read_exact(&mut offset).unwrap();
        image.read_exact(&mut length).unwrap();
        let mut bytes = vec![0; u32::from_le_bytes(length) as usize];
        image.read_exact(&mut bytes).unwrap();
        disk.poke(u64::from_le_bytes(offset), &bytes);
    }
    disk
}

fn path() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "images", "pool-v1.bin"].iter().collect()
}

fn golden() -> SimDisk {
    unpacked(&std::fs::read(path()).expect("the image is part of the source"))
}

/// Runs as logical extent, place and count.
fn runs(allocation: &Allocation) -> Vec<(u64, u64, u64)> {
    allocation.runs().map(|run| (run.logical, run.physical, run.count)).collect()
}

/// The device's first bytes behind every extent of an allocation.
fn marks(disk: &SimDisk, allocation: &Allocation) -> Vec<String> {
    let extents = allocation.runs().flat_map(|run| run.physical..run.physical + run.count);
    let text = |extent: u64| {
        let bytes = disk.peek(extent * EXTENT_BYTES, 16);
        String::from_utf8(bytes).unwrap().trim_end_matches('\0').to_owned()
    };
    extents.map(text).collect()
}

/// Says `golden()` once more in words; `disk` is what the pool lies on.
fn assert_is_the_golden_pool(pool: &mut Pool, disk: &SimDisk) {
    assert_eq!((pool.name(), pool.uuid()), ("golden", UUID));
    let root = pool.find("vm/root").expect("it was made").clone();
    assert_eq!((root.id.0, root.size_bytes, root.thin), (2, 2 * MIB + 4096, false));
    assert_eq!((root.class, &root.attributes[..]), (Class::Nonvolatile, &br#"{"queues":4}"#[..]));
    assert_eq!(runs(&root), [(0, 7, 3)]);
    assert_eq!(marks(disk, &root), ["root 0", "root 1", "root 2"]);
    let thin = pool.find("vm/thin").expect("it was made").clone();
    assert_eq!((thin.id.0, thin.size_bytes, thin.thin), (3, 64 * MIB, true));
    assert_eq!((thin.class, &thin.attributes[..]), (Class::Volatile, &b"{}"[..]));
    assert_eq!(marks(disk, &thin), ["thin 5", "thin 40"]);
    assert_eq!(pool.allocations().count(), 2);
    let space = pool.space();
    let mib = [space.allocated_bytes, space.free_bytes, space.scrub_bytes, space.metadata_bytes];
    assert_eq!(mib.map(|bytes| bytes / MIB), [5, 11, 3, 5]);
    let report = pool.check();
    assert!(report.is_clean(), "{:?}", report.findings);
    let next = pool.create(NewAllocation {
        name: "vm/next".into(),
        size_bytes: MIB,
        thin: false,
        class: Class::Volatile,
        attributes: Vec::new(),
    });
    assert_eq!(next.expect("it can be used").0, 4, "ids of what is gone are not used again");
}

#[test]
fn a_pool_of_version_1_opens_with_all_that_it_held() {
    let disk = golden();
    let mut pool = Pool::open(Box::new(disk.clone())).expect("version 1 is read for ever");
    assert_is_the_golden_pool(&mut pool, &disk);
    drop(pool);
    let again = Pool::open(Box::new(disk)).expect("and after it was changed");
    assert!(again.find("vm/next").is_some() && again.find("vm/root").is_some());
}

#[test]
fn what_this_build_makes_of_the_same_is_the_same_pool() {
    let disk = SimDisk::new(DEVICE_BYTES);
    let pool = make(&disk);
    for (name, extents) in [("vm/root", &[0, 1, 2][..]), ("vm/thin", &[5, 40])] {
        let allocation = pool.find(name).unwrap();
        for logical in extents {
            let of = |run: &Run| (run.logical..run.logical + run.count).contains(logical);
            let run = allocation.runs().find(of).unwrap();
            let extent = run.physical + logical - run.logical;
            let text = format!("{} {logical}", name.trim_start_matches("vm/"));
            disk.poke(extent * EXTENT_BYTES, &mark(&text));
        }
    }
    drop(pool);
    if std::env::var_os("VFLASH_NEW_IMAGE").is_some() && !path().exists() {
        std::fs::write(path(), packed(&disk.peek(0, DEVICE_BYTES as usize))).unwrap();
    }
    let unpacked = unpacked(&packed(&disk.peek(0, DEVICE_BYTES as usize)));
    assert!(unpacked.peek(0, DEVICE_BYTES as usize) == disk.peek(0, DEVICE_BYTES as usize));
    let mut pool = Pool::open(Box::new(disk.clone())).unwrap();
    assert_is_the_golden_pool(&mut pool, &disk);
}

/// The image with every root made one of the next version, whole in every other way.
fn newer() -> SimDisk {
    let disk = golden();
    for offset in ROOTS {
        let mut block = disk.peek(offset, 4096);
        assert_eq!(block[8..12], 1u32.to_le_bytes(), "the image is of version 1");
        block[8..12].copy_from_slice(&2u32.to_le_bytes());
        let checksum = crc32c(0, &block[..4092]);
        block[4092..].copy_from_slice(&checksum.to_le_bytes());
        disk.poke(offset, &block);
    }
    disk
}

#[test]
fn an_image_of_a_newer_version_is_refused_and_keeps_every_byte() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pool");
    let before = newer().peek(0, DEVICE_BYTES as usize);
    std::fs::write(&path, &before).unwrap();
    let open = || Box::new(FileDisk::open(&path, Duration::ZERO).unwrap());
    let error = Pool::open(open()).err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("version 2"), "{error}");
    let error = Pool::check_offline(open(), &CheckProgress::default()).expect_err("no damage");
    assert!(error.to_string().contains("newer vflash"), "{error}");
    assert!(Pool::format(open(), "other").is_err(), "nor is it taken for an empty device");
    let mut after = vec![0; before.len()];
    std::fs::File::open(&path).unwrap().read_exact_at(&mut after, 0).unwrap();
    assert!(before == after, "not a byte was touched");
}
