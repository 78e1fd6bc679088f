//! How vflashd behaves as a service.

mod vflashd;

use serde_json::{Value, json};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use vflash_bench::device::{Device, DeviceOptions};
use vflash_bench::queue::Kind;
use vflashd::{SOON, Vflashd, attach, eventually, machine_manifest, pool_manifest};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};

/// How long nothing may happen where nothing must.
const A_WHILE: Duration = Duration::from_millis(300);

/// What systemd would be told, until `wanted` came.
fn told_until(socket: &UnixDatagram, wanted: &str) -> Vec<String> {
    let deadline = Instant::now() + SOON;
    let mut told = Vec::new();
    let mut buffer = [0; 4096];
    while !told.iter().any(|line| line == wanted) {
        let length = socket.recv(&mut buffer).unwrap();
        let message = String::from_utf8(buffer[..length].to_vec()).unwrap();
        told.extend(message.lines().map(str::to_owned));
        assert!(Instant::now() < deadline, "{wanted}: {told:?}");
    }
    told
}

#[test]
fn systemd_is_told_of_start_health_and_stop() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_vflashd"))
        .arg("--run-dir")
        .arg(folder.path().join("run"))
        .env("NOTIFY_SOCKET", &path)
        .env("WATCHDOG_USEC", "30000000")
        .spawn()
        .unwrap();
    let told = told_until(&socket, "READY=1");
    assert!(!told.iter().any(|line| line == "WATCHDOG=1"), "ready first: {told:?}");
    let told = told_until(&socket, "WATCHDOG=1");
    let status = told.iter().any(|line| line.starts_with("STATUS=0 pools, 0 volumes"));
    assert!(status, "{told:?}");
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM).unwrap();
    told_until(&socket, "STOPPING=1");
    assert!(child.wait().unwrap().success());
}

#[test]
fn manifests_are_applied_at_the_start_and_at_sighup() {
    let mut daemon = Vflashd::start();
    daemon.stop();
    let manifest = daemon.path("manifest.yaml");
    let write = |size: &str| {
        let text = pool_manifest(daemon.folder.path()) + &machine_manifest("vm", &[("a", size)]);
        std::fs::write(&manifest, text).unwrap();
    };
    write("size: 16MiB");
    let file = manifest.display().to_string();
    daemon.run(&["-f", &file]);
    let size = |daemon: &Vflashd| daemon.get("/v1/volumes/vm/a")["sizeBytes"].as_u64().unwrap();
    assert_eq!(size(&daemon), 16 << 20);
    let hangup = |daemon: &Vflashd| {
        let pid = nix::unistd::Pid::from_raw(daemon.pid() as i32);
        let last = daemon.get("/v1/status")["lastEvent"].as_u64().unwrap();
        nix::sys::signal::kill(pid, nix::sys::signal::SIGHUP).unwrap();
        daemon.get(&format!("/v1/events?after={last}&waitSeconds=30"))
    };
    let text = pool_manifest(daemon.folder.path());
    std::fs::write(&manifest, text + &machine_manifest("vm", &[("a", "size: 32MiB")])).unwrap();
    assert_eq!(hangup(&daemon)["events"][0]["kind"], "resized");
    assert_eq!(size(&daemon), 32 << 20);
    // Nobody is there to be asked: what would destroy data is a problem, and is not done.
    let text = pool_manifest(daemon.folder.path());
    std::fs::write(&manifest, text + &machine_manifest("vm", &[("a", "size: 8MiB")])).unwrap();
    assert_eq!(hangup(&daemon)["events"][0]["kind"], "error");
    assert_eq!(size(&daemon), 32 << 20);
    assert_eq!(daemon.get("/healthz")["state"], "degraded");
    // A manifest that is wrong keeps nobody from being served.
    std::fs::write(&manifest, "kind: Nonsense\n").unwrap();
    daemon.kill();
    daemon.run(&["-f", &file]);
    assert_eq!(size(&daemon), 32 << 20);
    let problems = daemon.get("/healthz")["problems"].to_string();
    assert!(problems.contains("manifest.yaml:1:"), "{problems}");
}

#[test]
fn writes_that_wait_for_space_when_the_daemon_stops_are_done_by_the_next() {
    let mut daemon = Vflashd::start();
    let volumes = [("thin", "size: 64MiB, thin: true"), ("filler", "size: 8MiB")];
    daemon.apply(&(pool_manifest(daemon.folder.path()) + &machine_manifest("vm", &volumes)));
    let free = daemon.get("/v1/pools/p0")["space"]["freeBytes"].as_u64().unwrap();
    let all = json!({"sizeBytes": (8 << 20) + free});
    daemon.post("/v1/volumes/vm/filler/resize", &all);
    assert_eq!(daemon.get("/v1/pools/p0")["space"]["watermark"], "full");

    let mut device = attach(&daemon, "vm/thin");
    let extents = [0u64, 5, 6];
    for extent in extents {
        let slot = device.queues[0].take_slot().unwrap();
        let data = device.queues[0].data(slot);
        device.memory.write(data, &[extent as u8 + 1; 4096]);
        device.queues[0].submit(&device.memory, slot, Kind::Write, extent * 2048, 4096);
    }
    device.queues[0].publish(&device.memory);
    let waiting = |daemon: &Vflashd| daemon.get("/v1/pools/p0")["waitingRequests"].clone();
    eventually("they wait for space", || waiting(&daemon) == extents.len());
    daemon.stop();
    assert!(!device.queues[0].is_pending(&device.memory), "no request was given a status");
    assert!(daemon.log().contains("the next daemon does them"), "{}", daemon.log());

    let file = std::fs::File::options().write(true).open(daemon.path("pool")).unwrap();
    file.set_len(320 << 20).unwrap();
    daemon.run(&[]);
    device.reconnect().unwrap();
    eventually("they wait again", || waiting(&daemon) == extents.len());
    daemon.post("/v1/pools/p0/grow", &Value::Null);
    assert_eq!(
        device.await_ended(extents.len(), SOON).unwrap(),
        [0; 3],
        "all are done, none failed"
    );
    for extent in extents {
        let slot = device.queues[0].take_slot().unwrap();
        device.queues[0].submit(&device.memory, slot, Kind::Read, extent * 2048, 4096);
        device.queues[0].publish(&device.memory);
        assert_eq!(device.await_ended(1, SOON).unwrap(), [0]);
        let mut seen = [0; 4096];
        device.memory.read(device.queues[0].data(slot), &mut seen);
        assert_eq!(seen, [extent as u8 + 1; 4096]);
    }
    device.stop().unwrap();
    daemon.stop();
}

/// A pool that is full, and a thin volume of it of which a write waits for space.
fn waiting_for_space(daemon: &Vflashd) -> Device {
    full_pool(daemon);
    let mut device = attach(daemon, "vm/thin");
    write_that_waits(daemon, &mut device);
    device
}

/// A pool that is full, with a thin volume of which nothing was written.
fn full_pool(daemon: &Vflashd) {
    let volumes = [("thin", "size: 64MiB, thin: true"), ("filler", "size: 8MiB")];
    daemon.apply(&(pool_manifest(daemon.folder.path()) + &machine_manifest("vm", &volumes)));
    let free = daemon.get("/v1/pools/p0")["space"]["freeBytes"].as_u64().unwrap();
    let all = json!({"sizeBytes": (8 << 20) + free});
    daemon.post("/v1/volumes/vm/filler/resize", &all);
}

fn write_that_waits(daemon: &Vflashd, device: &mut Device) {
    let slot = device.queues[0].take_slot().unwrap();
    device.memory.fill(device.queues[0].data(slot), 4096, 7);
    device.queues[0].submit(&device.memory, slot, Kind::Write, 0, 4096);
    device.queues[0].publish(&device.memory);
    eventually("it waits for space", || waiting(daemon) == 1);
}

fn waiting(daemon: &Vflashd) -> Value {
    daemon.get("/v1/pools/p0")["waitingRequests"].clone()
}

/// The first byte of the first sector, as the guest reads it.
fn first_byte(device: &mut Device) -> u8 {
    let slot = device.queues[0].take_slot().unwrap();
    device.queues[0].submit(&device.memory, slot, Kind::Read, 0, 4096);
    device.queues[0].publish(&device.memory);
    assert_eq!(device.await_ended(1, SOON).unwrap(), [0]);
    device.memory.load_u8(device.queues[0].data(slot))
}

/// The machine is paused, in another thread: who has stopped its rings gives them back.
fn pause(mut device: Device) -> Receiver<Device> {
    let (sender, paused) = channel();
    std::thread::spawn(move || {
        device.pause().unwrap();
        sender.send(device).unwrap();
    });
    paused
}

#[test]
fn a_machine_is_paused_though_its_write_waits_for_space_and_has_it_done_when_it_goes_on() {
    let mut daemon = Vflashd::start();
    let device = waiting_for_space(&daemon);
    let mut device = pause(device).recv_timeout(SOON).expect("its rings stop");
    eventually("nobody waits for space", || waiting(&daemon) == 0);
    assert!(!device.queues[0].is_pending(&device.memory), "the write was given no status");
    device.resume().unwrap();
    eventually("it waits again", || waiting(&daemon) == 1);
    // So does any change of a ring, such as more memory.
    device.set_features(0, 0).unwrap();
    eventually("and again", || waiting(&daemon) == 1);
    make_space(&daemon);
    assert_eq!(device.await_ended(1, SOON).unwrap(), [0]);
    assert_eq!(first_byte(&mut device), 7, "what was written");
    device.stop().unwrap();
    daemon.stop();
}

/// Who has no in-flight area, or none on the host that it goes to, would never get an answer.
#[test]
fn a_ring_whose_requests_nobody_would_remember_stops_when_they_are_done() {
    const LOG_ALL: u64 = 1 << 26;
    for migrated in [false, true] {
        let mut daemon = Vflashd::start();
        full_pool(&daemon);
        let mut device = Device::open(DeviceOptions {
            inflight: migrated,
            connect_timeout: SOON,
            ..DeviceOptions::new(&daemon.run_dir().join("vm/thin.sock"))
        })
        .unwrap();
        if migrated {
            let log = tempfile::tempfile().unwrap();
            let bytes = (device.memory.length() / 4096).div_ceil(8) as u64;
            log.set_len(bytes).unwrap();
            let (mmap_size, mmap_offset, mmap_handle) = (bytes, 0, log.as_raw_fd());
            let region = VhostUserDirtyLogRegion { mmap_size, mmap_offset, mmap_handle };
            device.frontend().unwrap().set_log_base(0, Some(region)).unwrap();
            device.set_features(LOG_ALL, 0).unwrap();
        }
        write_that_waits(&daemon, &mut device);
        let paused = pause(device);
        assert!(paused.recv_timeout(A_WHILE).is_err(), "a write is under way");
        make_space(&daemon);
        let mut device = paused.recv_timeout(SOON).expect("its rings stop");
        assert_eq!(device.await_ended(1, SOON).unwrap(), [0], "it was done before");
        device.resume().unwrap();
        assert_eq!(first_byte(&mut device), 7);
        device.stop().unwrap();
        daemon.stop();
    }
}

#[test]
fn a_volume_whose_writes_wait_for_space_can_be_reclaimed() {
    let mut daemon = Vflashd::start();
    let device = waiting_for_space(&daemon);
    let forced = json!({"force": true, "confirm": ["vm/thin"]});
    daemon.post("/v1/volumes/vm/thin/reclaim", &forced);
    assert_eq!(daemon.volumes(), ["vm/filler"]);
    drop(device);
    daemon.stop();
}

/// Grows the pool of [`waiting_for_space`] by 64 MiB.
fn make_space(daemon: &Vflashd) {
    let file = std::fs::File::options().write(true).open(daemon.path("pool")).unwrap();
    file.set_len(320 << 20).unwrap();
    daemon.post("/v1/pools/p0/grow", &Value::Null);
}

#[test]
fn a_pool_whose_writes_wait_for_space_is_closed_and_does_them_when_it_is_back() {
    let mut daemon = Vflashd::start();
    let mut device = waiting_for_space(&daemon);
    assert_eq!(daemon.refused("/v1/pools/p0/close", &json!({}), 409)["code"], "busy");
    assert_eq!(daemon.post("/v1/pools/p0/close", &json!({"force": true}))["pools"], json!([]));
    assert!(!daemon.run_dir().join("vm/thin.sock").exists());
    assert!(!device.queues[0].is_pending(&device.memory), "the write was given no status");
    daemon.apply(&pool_manifest(daemon.folder.path()));
    device.reconnect().unwrap();
    eventually("it waits again", || daemon.get("/v1/pools/p0")["waitingRequests"] == 1);
    make_space(&daemon);
    assert_eq!(device.await_ended(1, SOON).unwrap(), [0]);
    device.stop().unwrap();
    daemon.stop();
}

#[test]
fn a_front_end_that_goes_while_its_write_waits_leaves_its_socket_to_the_next() {
    let mut daemon = Vflashd::start();
    drop(waiting_for_space(&daemon));
    eventually("nobody waits", || daemon.get("/v1/pools/p0")["waitingRequests"] == 0);
    let mut device = attach(&daemon, "vm/thin");
    let slot = device.queues[0].take_slot().unwrap();
    device.queues[0].submit(&device.memory, slot, Kind::Read, 0, 4096);
    device.queues[0].publish(&device.memory);
    assert_eq!(device.await_ended(1, SOON).unwrap(), [0], "the pool is full, and it is served");
    assert_eq!(daemon.get("/v1/volumes/vm/thin")["waiting"], Value::Null);
    make_space(&daemon);
    assert_eq!(daemon.get("/v1/volumes/vm/thin")["mappedBytes"], 0, "nobody wants it any more");
    device.stop().unwrap();
    daemon.stop();
}

#[test]
fn writes_that_wait_for_space_are_shown_with_their_age_and_what_helps() {
    let mut daemon = Vflashd::start();
    assert_eq!(daemon.get("/v1/status")["waiting"], Value::Null);
    let mut device = waiting_for_space(&daemon);
    let waiting = |place: &str| daemon.get(place)["waiting"].clone();
    let first = waiting("/v1/volumes/vm/thin");
    assert_eq!(first["requests"], 1);
    let older = || waiting("/v1/status")["oldestMs"].as_u64() > first["oldestMs"].as_u64();
    eventually("it grows older", older);
    let problems = daemon.get("/healthz")["problems"].to_string();
    assert!(
        problems.contains("volume vm/thin: writes wait for space in pool p0 (1,"),
        "{problems}"
    );
    assert!(problems.contains("grow the pool"), "{problems}");
    let page = daemon.get("/metrics");
    let line = "vflash_volume_waiting_requests{pool=\"p0\",vm=\"vm\",volume=\"thin\"} 1";
    assert!(page.as_str().unwrap().contains(line), "{page}");
    make_space(&daemon);
    assert_eq!(device.await_ended(1, SOON).unwrap(), [0]);
    eventually("all is well", || daemon.get("/healthz")["state"] == "ok");
    assert_eq!(waiting("/v1/status"), Value::Null);
    device.stop().unwrap();
    daemon.stop();
}

#[test]
fn a_copy_of_a_pool_does_not_take_its_place_unasked() {
    let mut daemon = Vflashd::start();
    let manifest = pool_manifest(daemon.folder.path());
    daemon.apply(&(manifest + &machine_manifest("vm", &[("a", "size: 8MiB")])));
    daemon.stop();
    let (pool, copy) = (daemon.path("pool"), daemon.path("copy"));
    std::fs::copy(&pool, &copy).unwrap();
    std::fs::File::options().write(true).open(&pool).unwrap().set_len(1 << 20).unwrap();
    daemon.run(&["--pool", copy.to_str().unwrap()]);
    assert!(daemon.volumes().is_empty(), "no guest finds an earlier state of its disk");
    let problems = daemon.get("/healthz")["problems"].to_string();
    assert!(problems.contains("vflash pool close p0"), "{problems}");
    daemon.post("/v1/pools/p0/close", &json!({}));
    daemon.stop();
    daemon.run(&["--pool", copy.to_str().unwrap()]);
    assert_eq!(daemon.volumes(), ["vm/a"]);
    daemon.stop();
}

#[test]
fn capabilities_are_printed_without_a_run_directory() {
    let output = Command::new(env!("CARGO_BIN_EXE_vflashd"))
        .args(["--run-dir", "/nonexistent/x", "--print-capabilities"])
        .output()
        .unwrap();
    assert!(output.status.success());
    let capabilities: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(capabilities["type"], "block");
}

#[test]
fn what_ships_for_systemd_and_libvirt_fits_the_daemon() {
    let shipped = |name: &str| {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tools/systemd/");
        std::fs::read_to_string(format!("{folder}{name}")).unwrap()
    };
    let unit = shipped("vflashd.service");
    let value = |key: &str| {
        let line = unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.unwrap_or_else(|| panic!("{key} is missing")).to_owned()
    };
    assert_eq!((value("Type"), value("Restart")), ("notify".into(), "always".into()));
    assert_eq!(value("RuntimeDirectoryPreserve"), "yes");
    let run_dir = format!("/run/{}", value("RuntimeDirectory"));
    assert_eq!(run_dir, vflash::control::api::RUN_DIR);
    let state_dir = format!("--state-dir /var/lib/{}", value("StateDirectory"));
    assert!(value("ExecStart").contains(&state_dir));
    assert!(value("RestrictAddressFamilies").contains("AF_INET AF_INET6"), "for NBD over TCP");
    assert!(!unit.contains("PrivateNetwork=yes"), "for NBD over TCP");
    let descriptor: Value = serde_json::from_str(&shipped("50-vflash.json")).unwrap();
    assert_eq!(descriptor["type"], "block");
    assert!(value("ExecStart").starts_with(descriptor["binary"].as_str().unwrap()));
}

#[test]
fn guest_memory_is_pinned_while_the_manifest_says_so() {
    let mut daemon = Vflashd::start();
    let manifest = |words: &str| {
        let size = format!("size: 16MiB{words}");
        pool_manifest(daemon.folder.path()) + &machine_manifest("vm", &[("a", &size)])
    };
    let pinned = manifest("}\n    pinMemory: true\n    limits: {iops: 1000000");
    daemon.apply(&pinned);
    let mut device = attach(&daemon, "vm/a");
    let bytes = device.memory.length() as u64;
    let volume = |name: &str| daemon.get("/v1/volumes/vm/a")[name].clone();
    eventually("it is pinned", || volume("pinnedBytes") == bytes);
    assert_eq!((volume("pinMemory"), volume("memoryBytes")), (true.into(), bytes.into()));
    daemon.apply(&manifest("}\n    limits: {iops: 1000000"));
    device.reconnect().unwrap();
    eventually("it is attached", || volume("memoryBytes") == bytes);
    assert_eq!((volume("pinMemory"), volume("pinnedBytes")), (false.into(), 0.into()));
    device.stop().unwrap();
    drop(device);
    // The pool remembers it.
    daemon.apply(&pinned);
    daemon.stop();
    daemon.run(&[]);
    assert_eq!(daemon.get("/v1/volumes/vm/a")["pinMemory"], true);
    daemon.stop();
}
