//! What a killed daemon left under way in the kernel lands before the next daemon begins.
//!
//! The only test of its file: it changes the mounts of the thread that runs it.

mod drive;
mod vflashd;

use drive::Drive;
use serde_json::json;
use std::time::Duration;
use vflash::base::ErrorKind;
use vflash::io::file::FileDisk;
use vflash_bench::device::Device;
use vflash_bench::queue::Kind;
use vflashd::{SOON, Vflashd, attach, eventually, left_out, machine_manifest};

const POOL_BYTES: usize = 24 << 20;

/// What the late write is filled with; nothing else on the drive begins so.
const LATE: u8 = 0xa5;

/// Puts a write of `fill` at `sector` in the ring.
fn write(device: &mut Device, sector: u64, fill: u8) {
    let slot = device.queues[0].take_slot().unwrap();
    device.memory.write(device.queues[0].data(slot), &[fill; 4096]);
    device.queues[0].submit(&device.memory, slot, Kind::Write, sector, 4096);
    device.queues[0].publish(&device.memory);
}

#[test]
fn the_next_daemon_touches_nothing_before_a_late_write_of_a_killed_one_has_landed() {
    let mut daemon = Vflashd::start();
    let path = daemon.path("drive");
    daemon.stop();
    let Some(drive) = Drive::mount(&path, POOL_BYTES) else {
        return left_out("fuse", "/dev/fuse and the right to mount");
    };
    daemon.run(&[]);
    daemon.post("/v1/pools", &json!({"name": "p0", "device": path.display().to_string()}));
    daemon.apply(&machine_manifest("vm", &[("a", "size: 1MiB")]));
    let mut device = attach(&daemon, "vm/a");
    write(&mut device, 8, 1);
    assert_eq!(device.await_ended(1, SOON).unwrap(), [0]);
    eventually("all is scrubbed", || daemon.get("/v1/pools/p0")["space"]["scrubBytes"] == 0);

    // A write is with the drive when the daemon is killed.
    drive.hold(LATE);
    write(&mut device, 0, LATE);
    drive.wait_held();
    daemon.kill();
    let error = FileDisk::open(&path, Duration::ZERO).err().expect("the dead one holds it");
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    let before = drive.transfers();
    daemon.begin(&[]);
    eventually("the next daemon opens its pools", || daemon.is_starting());
    let error = FileDisk::open(&path, Duration::from_millis(100)).err().expect("nor is it free");
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert_eq!(drive.transfers(), before, "the next daemon has read and written nothing");

    // Only after it has landed does anything else happen: nothing newer can be overtaken.
    drive.release();
    daemon.await_service();
    assert!(drive.transfers() > before, "it has opened the pool");
    device.reconnect().unwrap();
    assert_eq!(
        device.await_ended(1, SOON).unwrap(),
        [0],
        "the request that had no answer is done again"
    );
    write(&mut device, 0, 2);
    assert_eq!(device.await_ended(1, SOON).unwrap(), [0]);
    let places: Vec<usize> = (0..POOL_BYTES >> 20)
        .map(|extent| extent << 20)
        .filter(|at| drive.bytes(at + 4096, 4096) == [1; 4096])
        .collect();
    let [place] = places[..] else { panic!("the volume has one place: {places:?}") };
    assert_eq!(drive.bytes(place, 4096), [2; 4096], "the newer write stays");
    device.stop().unwrap();
    daemon.kill();
}
