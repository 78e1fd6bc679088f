//! Caches that grow and shrink under a guest, on the real daemon.

mod cached_disk;
mod vflashd;

use cached_disk::{
    DISK_BYTES, MIB, Nbd, cache, connect, counter, finish, image, load, manifest, operate, read,
    started, verify, write,
};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, Ordering};
use vflash_bench::runner::{Mix, Runner, Workload};
use vflashd::{SOON, Vflashd, change, eventually};

const DISK: &str = "/v1/volumes/vm/disk";

fn resize(daemon: &Vflashd, mebibytes: u64) {
    daemon.post(&format!("{DISK}/resize"), &json!({"sizeBytes": mebibytes * MIB}));
    has(daemon, mebibytes);
}

fn has(daemon: &Vflashd, mebibytes: u64) {
    eventually("it has the size", || {
        let cache = cache(daemon, "vm/disk");
        cache["sizeBytes"] == mebibytes * MIB && cache["resizingToBytes"] == Value::Null
    });
}

#[test]
fn twenty_growths_and_shrinks_under_a_verified_load_lose_nothing() {
    for words in [", maxStaleness: 1h", ", durability: flush"] {
        let (mut daemon, _) = started(words);
        let mut runner = load(&daemon, "vm/disk", 21);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let resizes = scope.spawn(|| {
                for round in 0..20_u64 {
                    resize(&daemon, 24 + 8 * (round % 3));
                    resize(&daemon, 6 + 3 * (round % 3));
                }
                done.store(true, Ordering::Release);
            });
            while !done.load(Ordering::Acquire) && !resizes.is_finished() {
                operate(&mut runner, 50);
            }
        });
        assert!(done.load(Ordering::Acquire));
        verify(&mut runner);
        assert_eq!(daemon.events("resized").len(), 40);
        daemon.kill();
        daemon.run(&[]);
        runner.device.reconnect().unwrap();
        finish(runner, &daemon, "vm/disk", &daemon.path("disk.raw"));
        let check = daemon.post("/v1/pools/p0/check", &json!({}));
        assert_eq!(check["clean"], true, "{check}");
        daemon.stop();
    }
}

/// What a guest works on, and cache sizes with and without room for it.
const WORKING_SET: u64 = 12 * MIB;
const ROOM: u64 = 40;
const NO_ROOM: u64 = 8;

/// Reads and verifies the working set; how much of a million reads hit.
fn hits(daemon: &Vflashd, runner: &mut Runner) -> u64 {
    let all = || ["hits", "probation_hits", "misses"].map(|name| counter(daemon, "vm/disk", name));
    let before = all();
    verify(runner);
    let after = all();
    let [hits, held, misses] = std::array::from_fn(|index| after[index] - before[index]);
    (hits + held) * 1_000_000 / (hits + held + misses)
}

/// As [`hits`], when what was read is kept: it has room, and a fill that was dropped comes again.
fn warm(daemon: &Vflashd, runner: &mut Runner) -> u64 {
    (0..8).map(|_| hits(daemon, runner)).max().unwrap()
}

#[test]
fn twenty_times_smaller_and_larger_a_cache_hits_as_before() {
    let mut daemon = Vflashd::start();
    let (backing, socket) = (daemon.path("disk.raw"), daemon.path("nbd"));
    image(&backing);
    // A backing that is faster than the flash would be passed to.
    let _server = Nbd::unix(&socket, &backing, &["--filter=delay", "delay-read=12ms"]);
    let url = format!("nbd+unix:///?socket={}", socket.display());
    let words = format!(", sidecar: {}", daemon.path("redo").display());
    daemon.apply(&manifest(&daemon, &[("disk", &words, &url)]));
    resize(&daemon, ROOM);
    let workload = Workload {
        mix: Mix::BOTH,
        block_bytes: 32 << 10,
        ragged: false,
        span_sectors: WORKING_SET / 512,
        verify: true,
        seed: 5,
    };
    let mut runner = Runner::new(connect(&daemon, "vm/disk", 2, 32), workload).guarded(SOON);
    let mut before = warm(&daemon, &mut runner);
    for round in 0..20 {
        std::thread::scope(|scope| {
            let shrinks = scope.spawn(|| resize(&daemon, NO_ROOM));
            while !shrinks.is_finished() {
                operate(&mut runner, 20);
            }
        });
        let small = hits(&daemon, &mut runner);
        assert!(small < before, "round {round}: {small} of {before} without room");
        std::thread::scope(|scope| {
            let grows = scope.spawn(|| resize(&daemon, ROOM));
            while !grows.is_finished() {
                operate(&mut runner, 20);
            }
        });
        let after = warm(&daemon, &mut runner);
        assert!(after >= before, "round {round}: {after} hits of a million, {before} before");
        before = after;
    }
    daemon.stop();
}

#[test]
fn a_kill_in_the_middle_of_a_resize_leaves_one_size_or_the_other() {
    let (mut daemon, _) = started(", maxStaleness: 1h");
    let mut runner = load(&daemon, "vm/disk", 22);
    for round in 0..6 {
        operate(&mut runner, 200);
        let wanted = if round % 2 == 0 { 32 } else { 8 };
        let body = json!({"sizeBytes": wanted * MIB});
        std::thread::scope(|scope| {
            let daemon = &daemon;
            let asked =
                scope.spawn(move || daemon.try_ask("POST", &format!("{DISK}/resize"), &body));
            operate(&mut runner, 5 * round);
            if round % 3 == 0 {
                asked.join().unwrap();
            }
            daemon.kill_now();
        });
        daemon.kill();
        daemon.run(&[]);
        runner.device.reconnect().unwrap();
        let size = cache(&daemon, "vm/disk")["sizeBytes"].as_u64().unwrap();
        assert!([8, 16, 32].contains(&(size / MIB)), "{size}");
        resize(&daemon, wanted);
    }
    operate(&mut runner, 100);
    verify(&mut runner);
}

#[test]
fn sizes_come_from_manifests_and_what_cannot_be_is_refused() {
    let (daemon, manifest) = started(", maxStaleness: 1h");
    let mut device = connect(&daemon, "vm/disk", 1, 8);
    write(&mut device, 8, 5);
    for (size, mebibytes) in [("40MiB", 40), ("7MiB", 7)] {
        let plan = daemon.apply(&manifest.replace("size: 16MiB", &format!("size: {size}")));
        assert_eq!(plan["steps"][0]["action"], "resize", "{plan}");
        assert_eq!(plan["destroys"], json!([]));
        has(&daemon, mebibytes);
        assert_eq!(read(&mut device, 8), 5, "the guest has not noticed");
        assert_eq!(daemon.get(DISK)["sizeBytes"], DISK_BYTES, "its disk is as large as ever");
    }
    let refused = |mebibytes: u64, status: u16| {
        let body = json!({"sizeBytes": mebibytes * MIB});
        let failure = daemon.refused(&format!("{DISK}/resize"), &body, status);
        failure["message"].as_str().unwrap().to_owned()
    };
    let text = refused(4, 400);
    assert!(text.contains("the least that it works with is 5MiB"), "{text}");
    let text = refused(1024, 507);
    assert!(text.contains("pool p0 is full"), "{text}");
    daemon.post(&format!("{DISK}/drain"), &json!({"to": 0, "hold": true}));
    let text = refused(5, 409);
    assert!(text.contains("`vflash drain vm/disk` lets it go"), "{text}");
    let larger = manifest.replace("size: 16MiB", "size: 1GiB");
    let (status, body) = daemon.ask("POST", "/v1/apply", &change(&larger));
    assert_ne!(status, 200, "{body}");
    has(&daemon, 7);
}
