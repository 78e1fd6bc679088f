//! Cached disks on the real daemon whose storage is away when it starts: they are served from their
//! flash alone, and claimed as at any opening when the storage is back.

mod cached_disk;
mod vflashd;

use cached_disk::{
    Nbd, ask, cache, connect, contents, drain, image, load, manifest, operate, outrun, read, same,
    started, write,
};
use std::path::{Path, PathBuf};
use vflash_bench::device::Device;
use vflash_bench::queue::Kind;
use vflashd::{SOON, Vflashd, eventually};

const DISK: &str = "vm/disk";

/// A daemon with `vm/disk` on an NBD export of `disk.raw`, and what serves that.
fn over_nbd(words: &str) -> (Vflashd, Nbd, PathBuf) {
    let daemon = Vflashd::start();
    let file = daemon.path("disk.raw");
    image(&file);
    let server = serve(&daemon, &file);
    let words = format!("{words}, sidecar: {}", daemon.path("redo").display());
    let backing = format!("nbd+unix:///?socket={}", daemon.path("nbd").display());
    daemon.apply(&manifest(&daemon, &[("disk", &words, &backing)]));
    (daemon, server, file)
}

fn serve(daemon: &Vflashd, file: &Path) -> Nbd {
    let socket = daemon.path("nbd");
    // A server that was killed leaves its socket.
    let _ = std::fs::remove_file(&socket);
    Nbd::freezable(&socket, file)
}

/// Submits a read and leaves it under way.
fn begin_read(device: &mut Device, sector: u64) {
    let slot = device.queues[0].take_slot().unwrap();
    device.queues[0].submit(&device.memory, slot, Kind::Read, sector, 4096);
    device.queues[0].publish(&device.memory);
}

/// It is served, though its backing is away.
fn is_alone(daemon: &Vflashd) {
    let volume = daemon.get("/v1/volumes/vm/disk");
    assert_eq!(volume["state"], "served", "{volume}");
    assert_eq!(volume["cache"]["state"], "waitingForBacking", "{volume}");
    let text = volume["cache"]["message"].as_str().unwrap();
    assert!(text.contains("its backing fails; writes go on to the flash"), "{text}");
    assert_eq!(daemon.get("/healthz")["state"], "degraded");
}

/// Waits until it is fenced: what it says of that.
fn await_fence(daemon: &Vflashd) -> String {
    eventually("it is fenced", || cache(daemon, DISK)["state"] == "fenced");
    cache(daemon, DISK)["message"].as_str().unwrap().to_owned()
}

/// Waits until a fenced disk is served again.
fn await_service(daemon: &Vflashd) {
    eventually("it is served", || {
        let volume = daemon.get("/v1/volumes/vm/disk");
        volume["state"] == "served" && volume["cache"]["state"] != "fenced"
    });
}

fn await_backing(daemon: &Vflashd) {
    eventually("it has its backing again", || cache(daemon, DISK)["state"] != "waitingForBacking");
    eventually("that is told", || !daemon.events("backingBack").is_empty());
}

#[test]
fn what_the_flash_has_is_served_while_the_backing_is_away_and_all_is_drained_when_it_is_back() {
    let (mut daemon, server, file) = over_nbd(", maxStaleness: 1h");
    let mut runner = load(&daemon, DISK, 31);
    operate(&mut runner, 300);
    runner.drain().unwrap();
    write(&mut runner.device, 800, 5);
    daemon.kill();
    drop(server);
    daemon.run(&[]);
    is_alone(&daemon);
    eventually("it is told", || !daemon.events("backingAway").is_empty());
    let told = daemon.events("error").concat();
    assert!(told.contains("it is served from its flash alone until that is back"), "{told}");
    runner.device.reconnect().unwrap();
    let device = &mut runner.device;
    assert_eq!(read(device, 800), 5);
    write(device, 800, 6);
    assert_eq!(read(device, 800), 6);
    assert_eq!(ask(device, Kind::Flush, 0, &mut []), 0);
    let image_alone = std::fs::read(&file).unwrap();
    // Restarted again, in both ways, still without it; what a guest waits for is asked again.
    daemon.stop();
    daemon.run(&[]);
    is_alone(&daemon);
    device.reconnect().unwrap();
    write(device, 808, 7);
    daemon.kill();
    daemon.run(&[]);
    is_alone(&daemon);
    device.reconnect().unwrap();
    assert_eq!((read(device, 800), read(device, 808)), (6, 7));
    same(&std::fs::read(&file).unwrap(), &image_alone);
    let server = serve(&daemon, &file);
    await_backing(&daemon);
    let seen = contents(&mut runner.device);
    runner.device.stop().unwrap();
    drain(&daemon, DISK);
    same(&std::fs::read(&file).unwrap(), &seen);
    assert_eq!(runner.errors, 0);
    daemon.stop();
    drop(server);
}

#[test]
fn reads_that_miss_wait_for_a_backing_that_is_away_and_are_answered_when_it_is_back() {
    let (mut daemon, server, file) = over_nbd("");
    let mut device = connect(&daemon, DISK, 1, 8);
    write(&mut device, 800, 5);
    drain(&daemon, DISK);
    daemon.kill();
    drop(server);
    daemon.run(&[]);
    is_alone(&daemon);
    device.reconnect().unwrap();
    begin_read(&mut device, 1600);
    assert_eq!(device.await_ended(1, cached_disk::A_WHILE).unwrap_or_default(), [0_u8; 0]);
    let server = serve(&daemon, &file);
    assert_eq!(device.await_ended(1, SOON).unwrap(), [0]);
    await_backing(&daemon);
    drop(server);
}

#[test]
fn reads_that_miss_fail_when_the_backing_stays_away_for_longer_than_a_guest_is_to_wait() {
    let (mut daemon, server, _) = over_nbd(", maxStaleness: 1h, backingTimeout: 0s");
    let mut device = connect(&daemon, DISK, 1, 8);
    write(&mut device, 800, 5);
    daemon.kill();
    drop(server);
    daemon.run(&[]);
    is_alone(&daemon);
    device.reconnect().unwrap();
    assert_eq!(ask(&mut device, Kind::Read, 1600, &mut [0; 4096]), 1);
    assert_eq!(read(&mut device, 800), 5, "the flash has it");
}

#[test]
fn a_backing_that_hangs_at_the_start_is_away() {
    let (mut daemon, server, file) = over_nbd(", maxStaleness: 1h");
    let mut device = connect(&daemon, DISK, 1, 8);
    write(&mut device, 800, 5);
    daemon.kill();
    server.freeze();
    daemon.run(&[]);
    eventually("it is served", || daemon.get("/v1/volumes/vm/disk")["state"] == "served");
    is_alone(&daemon);
    device.reconnect().unwrap();
    assert_eq!(read(&mut device, 800), 5);
    write(&mut device, 800, 6);
    server.thaw();
    await_backing(&daemon);
    drain(&daemon, DISK);
    assert_eq!(std::fs::read(&file).unwrap()[800 * 512], 6);
}

/// Something else is there when the storage is back: fenced, untouched, and served again once it is
/// the right one.
#[test]
fn another_backing_that_comes_back_fences_the_disk_until_it_is_the_right_one() {
    let (mut daemon, _) = started(", maxStaleness: 1h");
    let (file, away) = (daemon.path("disk.raw"), daemon.path("away"));
    let mut device = connect(&daemon, DISK, 1, 8);
    write(&mut device, 63, 7);
    daemon.kill();
    std::fs::rename(&file, &away).unwrap();
    daemon.run(&[]);
    is_alone(&daemon);
    device.reconnect().unwrap();
    write(&mut device, 71, 8);
    let before = std::fs::read(&away).unwrap();
    std::fs::copy(&away, &file).unwrap();
    let text = await_fence(&daemon);
    assert!(text.contains("it is another file"), "{text}");
    assert!(text.contains("`vflash backing recover"), "{text}");
    eventually("it is told", || daemon.events("fenced").concat().contains(&text));
    assert_eq!(ask(&mut device, Kind::Write, 63, &mut [9; 4096]), 1);
    same(&std::fs::read(&file).unwrap(), &before);
    std::fs::rename(&away, &file).unwrap();
    await_service(&daemon);
    device.reconnect().unwrap();
    assert_eq!((read(&mut device, 63), read(&mut device, 71)), (7, 8));
    drain(&daemon, DISK);
    assert_eq!(std::fs::read(&file).unwrap()[71 * 512], 8);
}

/// The storage is back without the sidecar that lay beside the image: nothing will bring that by
/// itself. One elsewhere may be on storage that is still away, at the start as well.
#[test]
fn a_sidecar_that_is_missing_is_lost_beside_its_backing_and_away_elsewhere() {
    let (mut daemon, _) = started(", maxStaleness: 1h");
    let (file, away) = (daemon.path("disk.raw"), daemon.path("away"));
    let (sidecar, lost) = (daemon.path("disk.raw.vflash"), daemon.path("lost"));
    let mut device = connect(&daemon, DISK, 1, 8);
    write(&mut device, 63, 7);
    daemon.kill();
    std::fs::rename(&file, &away).unwrap();
    std::fs::rename(&sidecar, &lost).unwrap();
    daemon.run(&[]);
    is_alone(&daemon);
    std::fs::rename(&away, &file).unwrap();
    let text = await_fence(&daemon);
    assert!(text.contains("its sidecar is missing or empty"), "{text}");
    assert!(text.contains("`vflash detach vm/disk --lost`"), "{text}");
    std::fs::rename(&lost, &sidecar).unwrap();
    await_service(&daemon);
    device.reconnect().unwrap();
    assert_eq!(read(&mut device, 63), 7);
    drop(daemon);

    let (mut daemon, server, file) = over_nbd(", maxStaleness: 1h");
    let (sidecar, away) = (daemon.path("redo"), daemon.path("away"));
    let mut device = connect(&daemon, DISK, 1, 8);
    write(&mut device, 800, 5);
    daemon.kill();
    std::fs::rename(&sidecar, &away).unwrap();
    daemon.run(&[]);
    is_alone(&daemon);
    let told = daemon.events("error").concat();
    assert!(told.contains("mount the storage that it lies on, or restore it"), "{told}");
    device.reconnect().unwrap();
    write(&mut device, 800, 6);
    std::fs::rename(&away, &sidecar).unwrap();
    await_backing(&daemon);
    drain(&daemon, DISK);
    assert_eq!(std::fs::read(&file).unwrap()[800 * 512], 6);
    drop(server);
}

/// What was appended without the backing does not make an old flash look newer than it.
#[test]
fn a_flash_that_is_older_than_its_backing_is_found_out_though_it_went_on_alone() {
    let (mut daemon, _) = started(", maxStaleness: 1h");
    let (file, away) = (daemon.path("disk.raw"), daemon.path("away"));
    let mut device = connect(&daemon, DISK, 1, 8);
    let (pool, old) = outrun(&mut daemon, &mut device);
    daemon.kill();
    std::fs::copy(&old, &pool).unwrap();
    std::fs::rename(&file, &away).unwrap();
    for round in 0..2 {
        daemon.run(&[]);
        is_alone(&daemon);
        device.reconnect().unwrap();
        for byte in 0..6 {
            write(&mut device, 8, 10 * round + byte);
        }
        daemon.kill();
    }
    daemon.run(&[]);
    let sidecar = daemon.path("disk.raw.vflash");
    let before = (std::fs::read(&away).unwrap(), std::fs::read(&sidecar).unwrap());
    std::fs::rename(&away, &file).unwrap();
    let text = await_fence(&daemon);
    assert!(text.contains("the flash is older than its backing"), "{text}");
    assert!(text.contains("`vflash detach vm/disk --lost`"), "{text}");
    same(&std::fs::read(&file).unwrap(), &before.0);
    same(&std::fs::read(&sidecar).unwrap(), &before.1);
}
