//! Disks on real files.

use super::*;
use crate::base::units::MIB;
use crate::io::blocking::Blocking;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

#[test]
fn what_is_written_is_read_back_and_zeroed_ranges_are_zero() {
    for preallocation in [Preallocation::Reserved, Preallocation::Written] {
        let folder = folder();
        let path = folder.path().join("pool");
        let disk = FileDisk::create(&path, 4 * MIB, preallocation).expect("create");
        let geometry = disk.geometry();
        assert_eq!(geometry.size_bytes, 4 * MIB);
        assert!(geometry.block_bytes.is_power_of_two() && geometry.block_bytes <= 4096);
        assert!(geometry.memory_alignment.is_power_of_two());
        let mut blocking = Blocking::new(Box::new(disk));
        blocking.write_copies(&[0, 2 * MIB], &[7; 8192]).expect("write");
        blocking.flush().expect("flush");
        assert_eq!(blocking.read(2 * MIB, 8192).expect("read"), [7; 8192]);
        blocking.zero(0, 4096).expect("zero");
        let bytes = blocking.read(0, 8192).expect("read");
        assert_eq!(bytes[..4096], [0; 4096]);
        assert_eq!(bytes[4096..], [7; 4096]);
    }
}

#[test]
fn discarded_ranges_read_as_zeros() {
    let folder = folder();
    let mut disk =
        FileDisk::create(&folder.path().join("pool"), MIB, Preallocation::Reserved).expect("made");
    let buffer = PinnedBuffer::new(4096);
    buffer.segment().copy_from(&[9; 4096]);
    let segments = [buffer.segment()];
    let operation = |kind, segments| Operation { kind, offset: 0, length: 4096, segments };
    disk.submit(operation(OperationKind::Write, &segments), 1);
    disk.submit(operation(OperationKind::Discard, &[]), 2);
    disk.submit(operation(OperationKind::Read, &segments), 3);
    let mut completions = Vec::new();
    disk.poll(&mut completions, true);
    let expected: Vec<_> = (1..4).map(|token| Completion { token, result: Ok(()) }).collect();
    assert_eq!(completions, expected);
    let mut bytes = [1; 4096];
    buffer.segment().copy_to(&mut bytes);
    assert_eq!(bytes, [0; 4096]);
}

#[test]
fn a_second_opener_is_refused_and_told_what_to_do() {
    let folder = folder();
    let path = folder.path().join("pool");
    let first = FileDisk::create(&path, MIB, Preallocation::Reserved).expect("create");
    let error = FileDisk::open(&path, Duration::ZERO).err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("fuser"), "{error}");
    // The lock is the description's: it outlives the disk while the data path holds the file.
    let data_path = first.file();
    drop(first);
    assert!(FileDisk::open(&path, Duration::ZERO).is_err());
    drop(data_path);
    FileDisk::open(&path, Duration::ZERO).expect("free again");
}

#[test]
fn an_opener_waits_for_the_last_holder() {
    let folder = folder();
    let path = folder.path().join("pool");
    let holder = FileDisk::create(&path, MIB, Preallocation::Reserved).expect("create");
    let (started, wait) = std::sync::mpsc::channel();
    let opener = std::thread::spawn({
        let path = path.clone();
        move || {
            assert!(FileDisk::open(&path, Duration::ZERO).is_err(), "held at first");
            started.send(()).expect("the test waits");
            FileDisk::open(&path, Duration::from_secs(60)).map(|_| ())
        }
    });
    wait.recv().expect("the opener runs");
    drop(holder);
    opener.join().expect("no panic").expect("opened after the holder let go");
}

#[test]
fn a_write_past_the_end_or_to_a_read_only_place_is_an_error_and_not_a_short_success() {
    let folder = folder();
    let path = folder.path().join("pool");
    let mut disk = FileDisk::create(&path, MIB, Preallocation::Reserved).expect("create");
    disk.file.set_len(4096).expect("truncated under us");
    let buffer = PinnedBuffer::new(8192);
    let segments = [buffer.segment()];
    let read =
        Operation { kind: OperationKind::Read, offset: 0, length: 8192, segments: &segments };
    disk.submit(read, 5);
    let mut completions = Vec::new();
    disk.poll(&mut completions, true);
    assert_eq!(completions, [Completion { token: 5, result: Err(Errno::EIO) }]);
}

#[test]
fn sizes_that_are_no_blocks_and_existing_files_are_refused() {
    let folder = folder();
    let path = folder.path().join("pool");
    for size in [0, 1, 4095, 4097] {
        let error = FileDisk::create(&path, size, Preallocation::Reserved).err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(!path.exists());
    }
    std::fs::write(&path, "precious").expect("a file");
    assert!(FileDisk::create(&path, MIB, Preallocation::Reserved).is_err());
    assert_eq!(std::fs::read(&path).expect("still there"), b"precious");
}

#[test]
fn a_null_device_holds_metadata_in_memory_and_no_data() {
    let device = Device::open("null:8GiB", Duration::ZERO).expect("opened");
    assert!(device.null);
    assert_eq!(device.disk.geometry().size_bytes, 8 << 30);
    assert!(matches!(device.target, DiskTarget::Null { size_bytes } if size_bytes == 8 << 30));
    let error = Device::open("null:8GB", Duration::ZERO).err().expect("refused");
    assert!(error.to_string().contains("write `8GiB`"), "{error}");
    let error = Device::open("/dev/null", Duration::ZERO).err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Invalid);
}
