//! Cached disks on the real daemon when what they stand on fails: storage that hangs, fails or
//! comes back as another one, logs that are full, blocks larger than what a guest writes.

#[path = "backing_nbd/fake.rs"]
#[allow(dead_code, reason = "most manners are for other tests")]
mod fake;

mod cached_disk;
mod vflashd;

use cached_disk::{
    DISK_BYTES, Loop, Nbd, cache, connect, contents, finish, image, load, manifest, operate,
    outrun, read, same, started, verify, write,
};
use fake::{FLAGS, Fake};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Instant;
use vflash::control::pool::OpenPool;
use vflash::manifest::Attributes;
use vflash_bench::device::Device;
use vflash_bench::queue::Kind;
use vflashd::{SOON, Vflashd, change, eventually};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

const DISK: &str = "vm/disk";

/// A daemon with `vm/disk` on an NBD export of `disk.raw`, and what serves that.
fn over_nbd(words: &str, serve: impl FnOnce(&Path, &Path) -> Nbd) -> (Vflashd, Nbd, PathBuf) {
    let daemon = Vflashd::start();
    let (file, socket) = (daemon.path("disk.raw"), daemon.path("nbd"));
    image(&file);
    let server = serve(&socket, &file);
    let words = format!("{words}, sidecar: {}", daemon.path("redo").display());
    let backing = format!("nbd+unix:///?socket={}", socket.display());
    daemon.apply(&manifest(&daemon, &[("disk", &words, &backing)]));
    (daemon, server, file)
}

/// Submits a request and leaves it under way.
fn begin(device: &mut Device, kind: Kind, sector: u64) {
    let slot = device.queues[0].take_slot().unwrap();
    let data = device.queues[0].data(slot);
    device.memory.write(data, &[0x77; 4096]);
    device.queues[0].submit(&device.memory, slot, kind, sector, 4096);
    device.queues[0].publish(&device.memory);
}

fn state(daemon: &Vflashd) -> Value {
    cache(daemon, DISK)["state"].clone()
}

#[test]
fn a_clean_stop_ends_though_the_backing_hangs_and_nothing_is_lost() {
    let (mut daemon, server, file) = over_nbd("", Nbd::freezable);
    let mut runner = load(&daemon, DISK, 21);
    operate(&mut runner, 300);
    server.freeze();
    // The drain hangs in the server, and so do reads; the daemon ends all the same.
    runner.fill(Instant::now());
    daemon.stop();
    server.thaw();
    daemon.run(&[]);
    runner.device.reconnect().unwrap();
    finish(runner, &daemon, DISK, &file);
    daemon.stop();
}

#[test]
fn a_log_that_is_full_is_told_and_its_writes_wait_and_go_on() {
    let (daemon, _) = started(", maxStaleness: 1h");
    daemon.post("/v1/volumes/vm/disk/drain", &json!({"to": 0, "hold": true}));
    let mut runner = load(&daemon, DISK, 22);
    let deadline = Instant::now() + SOON;
    while daemon.events("logFull").is_empty() {
        runner.fill(Instant::now());
        runner.reap().unwrap();
        assert!(Instant::now() < deadline, "the log is never full: {}", cache(&daemon, DISK));
    }
    let told = daemon.events("logFull").remove(0);
    assert!(told.contains("the log is full: "), "{told}");
    assert!(cache(&daemon, DISK)["waitingRequests"].as_u64() > Some(0));
    daemon.post("/v1/volumes/vm/disk/drain", &json!({}));
    operate(&mut runner, 500);
    verify(&mut runner);
}

#[test]
fn an_nbd_export_over_tcp_is_a_backing() {
    let mut daemon = Vflashd::start();
    let file = daemon.path("disk.raw");
    image(&file);
    let (_server, port) = Nbd::tcp(&file);
    let words = format!(", sidecar: {}", daemon.path("redo").display());
    let backing = format!("nbd://127.0.0.1:{port}/");
    daemon.apply(&manifest(&daemon, &[("disk", &words, &backing)]));
    let mut runner = load(&daemon, DISK, 23);
    operate(&mut runner, 300);
    daemon.kill();
    daemon.run(&[]);
    runner.device.reconnect().unwrap();
    operate(&mut runner, 300);
    finish(runner, &daemon, DISK, &file);
}

#[test]
fn a_change_of_mode_goes_on_after_a_kill_in_the_middle_of_it() {
    let (mut daemon, server, file) = over_nbd(", maxStaleness: 1h", Nbd::freezable);
    let mut device = connect(&daemon, DISK, 1, 8);
    for (round, mode) in (1_u8..).zip(["write-around", "write-back", "bypass", "write-through"]) {
        write(&mut device, 8, round);
        server.freeze();
        let before = cache(&daemon, DISK)["mode"].clone();
        let answer = daemon.post("/v1/volumes/vm/disk/mode", &json!({"mode": mode}));
        assert_eq!(answer["cache"]["mode"], before, "the backing hangs");
        assert_eq!(answer["cache"]["modeWanted"], mode);
        daemon.kill();
        server.thaw();
        daemon.run(&[]);
        device.reconnect().unwrap();
        eventually(&format!("{mode} is in force"), || cache(&daemon, DISK)["mode"] == mode);
        assert_eq!(read(&mut device, 8), round);
        if mode != "write-back" {
            assert_eq!(std::fs::read(&file).unwrap()[4096], round, "{mode}: it is drained");
        }
    }
}

/// Partitions that begin at sector 63, on storage of 4 KiB blocks.
#[test]
fn a_guest_may_write_less_than_a_block_of_its_backing_in_every_mode() {
    let daemon = Vflashd::start();
    let file = daemon.path("disk.raw");
    image(&file);
    let device = Loop::new(&file, 4096);
    let words = format!(", sidecar: {}", daemon.path("redo").display());
    daemon.apply(&manifest(&daemon, &[("disk", &words, device.path())]));
    let mut runner = load(&daemon, DISK, 24);
    for mode in ["write-back", "write-through", "write-around", "read-only", "bypass"] {
        daemon.post("/v1/volumes/vm/disk/mode", &json!({"mode": mode}));
        eventually(&format!("{mode} is in force"), || cache(&daemon, DISK)["mode"] == mode);
        operate(&mut runner, 400);
        runner.drain().unwrap();
        assert_eq!(runner.errors, 0, "{mode}");
        // One sector in the middle of a block, and back.
        let mut before = [0; 512];
        assert_eq!(cached_disk::ask(&mut runner.device, Kind::Read, 63, &mut before), 0, "{mode}");
        let mut sector = [0x3c; 512];
        assert_eq!(cached_disk::ask(&mut runner.device, Kind::Write, 63, &mut sector), 0, "{mode}");
        let mut around = [0; 1536];
        assert_eq!(cached_disk::ask(&mut runner.device, Kind::Read, 62, &mut around), 0, "{mode}");
        assert_eq!(around[512..1024], sector, "{mode}");
        assert_eq!(cached_disk::ask(&mut runner.device, Kind::Write, 63, &mut before), 0, "{mode}");
    }
    let seen = contents(&mut runner.device);
    runner.device.stop().unwrap();
    drop(runner);
    eventually("it is let go", || daemon.get("/v1/volumes/vm/disk")["attached"] == false);
    daemon.post("/v1/volumes/vm/disk/detach", &json!({}));
    drop(device);
    same(&std::fs::read(&file).unwrap(), &seen);
}

/// While the file is there, the server answers everything with an error.
fn failing(path: &Path) -> [String; 3] {
    ["error=EIO".into(), "error-rate=100%".into(), format!("error-file={}", path.display())]
}

#[test]
fn a_backing_that_fails_costs_time_alone_and_its_own_disk_alone() {
    let folder = tempfile::tempdir().unwrap();
    let trouble = folder.path().join("trouble");
    let failing = failing(&trouble);
    let filters: Vec<&str> =
        ["--filter=error"].into_iter().chain(failing.iter().map(String::as_str)).collect();
    let (daemon, _server, _) = over_nbd("", |socket, file| Nbd::unix(socket, file, &filters));
    let other = daemon.path("other.raw");
    image(&other);
    let text = manifest(&daemon, &[("other", "", other.to_str().unwrap())]);
    daemon.apply(&text.replace("name: vm}", "name: vm2}"));
    let mut device = connect(&daemon, DISK, 1, 8);
    for mode in ["write-back", "write-around"] {
        daemon.post("/v1/volumes/vm/disk/mode", &json!({"mode": mode}));
        eventually(&format!("{mode} is in force"), || cache(&daemon, DISK)["mode"] == mode);
        write(&mut device, 800, 5);
        let away = daemon.events("backingAway").len();
        std::fs::write(&trouble, "").unwrap();
        begin(&mut device, Kind::Read, 1600);
        begin(&mut device, Kind::Write, 2400);
        eventually("it is told", || daemon.events("backingAway").len() > away);
        assert_eq!(state(&daemon), "waitingForBacking");
        // Another disk of the same daemon notices nothing.
        let mut neighbour = connect(&daemon, "vm2/other", 1, 8);
        write(&mut neighbour, 0, 9);
        assert_eq!(read(&mut neighbour, 0), 9);
        std::fs::remove_file(&trouble).unwrap();
        assert_eq!(device.await_ended(2, SOON).unwrap(), [0, 0], "{mode}");
        assert_eq!(read(&mut device, 800), 5);
        eventually("it is back", || !daemon.events("backingBack").is_empty());
    }
}

#[test]
fn a_backing_that_stays_away_fails_what_needs_it_and_nothing_else() {
    let (daemon, server, _) = over_nbd(", maxStaleness: 1h, backingTimeout: 0s", Nbd::freezable);
    assert_eq!(cache(&daemon, DISK)["backingTimeoutMs"], 0);
    let mut device = connect(&daemon, DISK, 1, 8);
    write(&mut device, 800, 5);
    drop(server);
    assert_eq!(cached_disk::ask(&mut device, Kind::Read, 1600, &mut [0; 4096]), 1);
    assert_eq!(read(&mut device, 800), 5, "the flash has it");
    write(&mut device, 800, 6);
    assert_eq!(read(&mut device, 800), 6);
}

/// What a log holds would be drained over what another host has written, or waits for ever for the
/// flush that says that it is drained.
#[test]
fn an_export_without_a_stamp_or_a_flush_is_written_past_the_log_alone() {
    let redo = |daemon: &Vflashd| format!(", sidecar: {}", daemon.path("redo").display());
    for (flags, stamped, reason) in [
        (FLAGS, false, "it has no place for an owner stamp"),
        (FLAGS & !(1 << 2), true, "its server cannot flush"),
    ] {
        let mut daemon = Vflashd::start();
        let server = Fake::start(vec![0; DISK_BYTES as usize], &[], flags);
        let wanted = |mode: &str| {
            let words = if stamped { redo(&daemon) } else { String::new() };
            let words = format!(", mode: {mode}{words}");
            manifest(&daemon, &[("disk", &words, &server.url())])
        };
        for mode in ["write-back", "write-through"] {
            let (status, failure) = daemon.ask("POST", "/v1/apply", &change(&wanted(mode)));
            let told = if stamped { reason } else { "needs a place for its stamp" };
            assert_ne!(status, 200, "{mode}: {failure}");
            assert!(failure.to_string().contains(told), "{mode}: {failure}");
        }
        daemon.apply(&wanted("write-around"));
        for mode in ["write-back", "write-through"] {
            let body = json!({"mode": mode});
            let (status, failure) = daemon.ask("POST", "/v1/volumes/vm/disk/mode", &body);
            assert_ne!(status, 200, "{mode}: {failure}");
            assert!(failure.to_string().contains(reason), "{mode}: {failure}");
        }
        assert_eq!(cache(&daemon, DISK)["mode"], "write-around");
        let told = daemon.events("updated").concat();
        assert!(told.contains("guests' writes wait until 10s after the opening"), "{told}");
        let mut device = connect(&daemon, DISK, 1, 8);
        write(&mut device, 0, 5);
        assert!(server.content.lock().unwrap()[..4096] == [5; 4096], "it is in the backing");
        let flushed = cached_disk::ask(&mut device, Kind::Flush, 0, &mut []);
        assert_eq!(flushed, u8::from(stamped), "{reason}");
        let told = daemon.events("error").concat();
        assert_eq!(told.contains("cannot flush: FLUSHes of guests fail"), stamped, "{told}");
        daemon.kill();
        daemon.run(&[]);
        device.reconnect().unwrap();
        assert_eq!(read(&mut device, 0), 5, "served again");
    }
}

/// Nobody can tell what other hosts have written since.
#[test]
fn a_log_that_has_lost_its_stamp_is_left_as_it_is_and_the_way_out_is_told() {
    let mut daemon = Vflashd::start();
    let server = Fake::start(vec![0; DISK_BYTES as usize], &[], FLAGS);
    let words = format!(", mode: write-through, sidecar: {}", daemon.path("redo").display());
    daemon.apply(&manifest(&daemon, &[("disk", &words, &server.url())]));
    write(&mut connect(&daemon, DISK, 1, 8), 0, 5);
    daemon.kill();
    let device = daemon.path("pool").display().to_string();
    let pool = OpenPool::open(&device, None, SOON).unwrap();
    let facts = pool.allocation(DISK).unwrap();
    let mut attributes = Attributes::decode(&facts.attributes).unwrap();
    attributes.settings.cache.as_mut().unwrap().sidecar = None;
    pool.change(move |pool| pool.set_attributes(facts.id, attributes.encode())).unwrap();
    drop(pool);
    let before = server.content.lock().unwrap().clone();
    daemon.run(&[]);
    let text = refusal(&daemon);
    assert!(text.contains("it has no place for an owner stamp"), "{text}");
    assert!(
        text.contains("holds nothing that was acknowledged and is not in the backing"),
        "{text}"
    );
    assert!(text.contains("`vflash detach vm/disk --lost`"), "{text}");
    daemon.post("/v1/volumes/vm/disk/detach", &json!({"lost": true, "confirm": [DISK]}));
    assert_eq!(daemon.volumes(), Vec::<String>::new());
    same(&server.content.lock().unwrap(), &before);
}

#[test]
fn the_guests_write_cache_is_switched_on_a_cached_disk_and_remembered() {
    const WRITEBACK: u32 = 32;
    let (mut daemon, _) = started(", durability: flush, maxStaleness: 1h");
    let mut device = connect(&daemon, DISK, 1, 8);
    let mut byte = 0;
    let mut epochs = |daemon: &Vflashd, device: &mut Device| {
        let epoch = || cache(daemon, DISK)["epoch"].as_u64().unwrap();
        let before = epoch();
        for _ in 0..5 {
            byte += 1;
            write(device, 0, byte);
        }
        epoch() - before
    };
    assert!(epochs(&daemon, &mut device) <= 1, "no FLUSH, no epoch");
    let flags = VhostUserConfigFlags::WRITABLE;
    device.frontend().unwrap().set_config(WRITEBACK, flags, &[0]).unwrap();
    assert!(epochs(&daemon, &mut device) >= 5, "each write is one");
    assert_eq!(daemon.get("/v1/volumes/vm/disk")["writeCache"], false);
    daemon.kill();
    daemon.run(&[]);
    device.reconnect().unwrap();
    assert!(epochs(&daemon, &mut device) >= 5, "also after a restart");
    device.frontend().unwrap().set_config(WRITEBACK, flags, &[1]).unwrap();
    assert!(epochs(&daemon, &mut device) <= 1, "and no longer");
    assert_eq!(read(&mut device, 0), byte);
}

/// What the disk says while it is not served.
fn refusal(daemon: &Vflashd) -> String {
    let volume = daemon.get("/v1/volumes/vm/disk");
    assert_eq!(volume["state"], "failed", "{volume}");
    volume["message"].as_str().unwrap().replace(daemon.folder.path().to_str().unwrap(), "DIR")
}

/// Something happens to the storage while no daemon runs: refused and named while writes wait for
/// it, untouched, and served again once it is as it was.
#[test]
fn a_backing_that_came_back_changed_is_refused_until_it_is_itself_again() {
    let (mut daemon, _) = started(", maxStaleness: 1h");
    let (file, sidecar) = (daemon.path("disk.raw"), daemon.path("disk.raw.vflash"));
    let mut device = connect(&daemon, DISK, 1, 8);
    write(&mut device, 63, 7);
    daemon.kill();
    let away = daemon.path("away");
    let (grown, shrunk) = (DISK_BYTES + (1 << 20), DISK_BYTES - (1 << 20));
    let size =
        |bytes: u64| std::fs::File::options().write(true).open(&file).unwrap().set_len(bytes);
    let whole = std::fs::read(&file).unwrap();
    type Case<'a> = (&'a str, &'a dyn Fn(), &'a dyn Fn());
    let cases: [Case<'_>; 4] = [
        ("its size was 24MiB and is 25MiB", &|| size(grown).unwrap(), &|| {
            size(DISK_BYTES).unwrap()
        }),
        ("its size was 24MiB and is 23MiB", &|| size(shrunk).unwrap(), &|| {
            size(DISK_BYTES).unwrap();
            let file = std::fs::File::options().write(true).open(&file).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &whole, 0).unwrap();
        }),
        ("its sidecar is missing", &|| std::fs::rename(&sidecar, &away).unwrap(), &|| {
            std::fs::rename(&away, &sidecar).unwrap();
        }),
        (
            "it is another file",
            &|| {
                std::fs::rename(&file, &away).unwrap();
                std::fs::copy(&away, &file).unwrap();
            },
            &|| std::fs::rename(&away, &file).unwrap(),
        ),
    ];
    for (says, change, undo) in cases {
        change();
        daemon.run(&[]);
        let text = refusal(&daemon);
        assert!(text.contains(says), "{text}");
        daemon.kill();
        undo();
        daemon.run(&[]);
        eventually(says, || daemon.get("/v1/volumes/vm/disk")["state"] == "served");
        device.reconnect().unwrap();
        assert_eq!(read(&mut device, 63), 7, "after: {says}");
        daemon.kill();
    }
}

/// The flash as it was before: it lacks acknowledged writes, and the backing proves it.
#[test]
fn a_flash_that_is_older_than_its_backing_is_refused() {
    let (mut daemon, _) = started(", maxStaleness: 1h");
    let mut device = connect(&daemon, DISK, 1, 8);
    let (pool, old) = outrun(&mut daemon, &mut device);
    write(&mut device, 8, 6);
    daemon.kill();
    let new = std::fs::read(&pool).unwrap();
    std::fs::copy(&old, &pool).unwrap();
    let files = [daemon.path("disk.raw"), daemon.path("disk.raw.vflash")];
    let read_all = || files.clone().map(|path| std::fs::read(path).unwrap());
    let before = read_all();
    daemon.run(&[]);
    let text = refusal(&daemon);
    assert!(text.contains("the flash is older than its backing"), "{text}");
    assert!(read_all() == before, "backing and sidecar are untouched");
    assert!(text.contains("`vflash detach vm/disk --lost`"), "{text}");
    daemon.kill();
    std::fs::write(&pool, new).unwrap();
    daemon.run(&[]);
    eventually("it is served", || daemon.get("/v1/volumes/vm/disk")["state"] == "served");
    device.reconnect().unwrap();
    assert_eq!((read(&mut device, 0), read(&mut device, 8)), (5, 6));
}
