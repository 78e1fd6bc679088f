//! A consistency group on the real daemon: a log on one disk, data that refers to it on another.

mod cached_disk;
mod vflashd;

use cached_disk::{
    A_WHILE, DISK_BYTES, MIB, Nbd, ask, cache, connect, contents, drain, image, manifest, same,
};
use serde_json::json;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use vflash::backing::open::{Backing, OpenOptions};
use vflash::backing::recover::RecoverOptions;
use vflash::backing::spec::Spec;
use vflash::backing::together::recover_all;
use vflash_bench::device::Device;
use vflash_bench::queue::Kind;
use vflashd::{Vflashd, change, eventually};

const BLOCK: usize = 4096;

/// Blocks of the data disk that are written in turn.
const DATA_BLOCKS: u64 = 97;

/// One after the other: a record to the log, then data that refers to it.
struct Client {
    log: Device,
    data: Device,
    record: u64,
}

fn block(record: u64) -> Vec<u8> {
    let words = [0x0072_6563_6f72_6421, record];
    words.iter().cycle().take(BLOCK / 8).flat_map(|word: &u64| word.to_le_bytes()).collect()
}

/// The record of a block; 0: it was never written.
fn record_of(bytes: &[u8]) -> u64 {
    let record = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
    if bytes == block(record) { record } else { 0 }
}

impl Client {
    fn new(daemon: &Vflashd) -> Self {
        Self::of(daemon, "vm/log")
    }

    /// With the log of another machine.
    fn of(daemon: &Vflashd, log: &str) -> Self {
        let (log, data) = (connect(daemon, log, 1, 8), connect(daemon, "vm/data", 1, 8));
        Self { log, data, record: 0 }
    }

    fn write(&mut self, count: u64) {
        for _ in 0..count {
            self.record += 1;
            let (log, data) = ((self.record - 1) * 8, self.record % DATA_BLOCKS * 8);
            assert_eq!(ask(&mut self.log, Kind::Write, log, &mut block(self.record)), 0);
            assert_eq!(ask(&mut self.data, Kind::Write, data, &mut block(self.record)), 0);
        }
    }

    fn reconnect(&mut self) {
        self.log.reconnect().unwrap();
        self.data.reconnect().unwrap();
    }

    fn stop(mut self, daemon: &Vflashd) {
        self.log.stop().unwrap();
        self.data.stop().unwrap();
        drop(self);
        let free = |name: &str| daemon.get(&format!("/v1/volumes/{name}"))["attached"] == false;
        eventually("both are let go", || free("vm/log") && free("vm/data"));
    }
}

/// Both disks with `words` in their `cache`.
fn disks(daemon: &Vflashd, words: [&str; 2]) -> String {
    let path = |name: &str| daemon.path(name).display().to_string();
    manifest(daemon, &[("log", words[0], &path("log.raw")), ("data", words[1], &path("data.raw"))])
}

const TOGETHER: &str = ", maxStaleness: 40ms, consistencyGroup: db";

fn started(words: &str) -> Vflashd {
    let daemon = Vflashd::start();
    image(&daemon.path("log.raw"));
    image(&daemon.path("data.raw"));
    daemon.apply(&disks(&daemon, [words; 2]));
    daemon
}

/// How many records both images have; they must be in order.
fn records(log: &[u8], data: &[u8]) -> u64 {
    let log = log.chunks_exact(BLOCK).map(record_of).take_while(|record| *record > 0);
    let log: Vec<u64> = log.collect();
    assert!((1..).zip(&log).all(|(at, record)| at == *record), "the log has a gap");
    let there = log.len() as u64;
    let blocks: Vec<u64> = data.chunks_exact(BLOCK).map(record_of).collect();
    let newest = blocks.iter().max().copied().unwrap();
    assert!(newest <= there, "data of record {newest}, and the log ends at {there}");
    assert!(there <= newest + 1, "the log has {there}, and data of {newest} is the last");
    for record in (newest + 1).saturating_sub(DATA_BLOCKS).max(1)..=newest {
        assert_eq!(blocks[(record % DATA_BLOCKS) as usize], record, "data of {newest}");
    }
    newest
}

/// Images and sidecars as they are now, recovered as another host would. `together`: the disks are
/// in a group, so that one alone is refused; else they may be.
fn recovered(daemon: &Vflashd, round: u32, together: bool) -> u64 {
    let names = ["log.raw", "data.raw"];
    let copies: Vec<PathBuf> = names.map(|name| daemon.path(&format!("{round}-{name}"))).into();
    for (name, copy) in names.iter().zip(&copies) {
        std::fs::copy(daemon.path(name), copy).unwrap();
        let sidecar = daemon.path(&format!("{name}.vflash"));
        std::fs::copy(sidecar, format!("{}.vflash", copy.display())).unwrap();
    }
    let open = |path: &PathBuf| {
        let spec = Spec::Path(path.clone());
        let options = OpenOptions {
            spec,
            sidecar: None,
            reading: false,
            wait: Duration::ZERO,
            nbd: Default::default(),
        };
        Backing::open(&options).unwrap()
    };
    let how = (RecoverOptions::default(), true);
    if together {
        let half = recover_all(&mut [open(&copies[1])], &[], how, &mut |_| {});
        let half = half.expect_err("half a group").to_string();
        assert!(half.contains("log.raw of vm/log too; nothing was changed"), "{half}");
    }
    let mut backings: Vec<Backing> = copies.iter().map(open).collect();
    let done = recover_all(&mut backings, &[], how, &mut |_| {}).unwrap();
    let points: Vec<u64> = done.into_iter().map(|done| done.unwrap().standing.point.won).collect();
    assert!(!together || points[0] == points[1], "both are at one point: {points:?}");
    drop(backings);
    let found = records(&std::fs::read(&copies[0]).unwrap(), &std::fs::read(&copies[1]).unwrap());
    copies.iter().for_each(|copy| std::fs::remove_file(copy).unwrap());
    found
}

/// Writes `counts` records, with the daemon killed after each: the images are in order each time,
/// and never older than the time before. The last record that they have.
fn die_and_look(daemon: &mut Vflashd, client: &mut Client, counts: &[u64]) -> u64 {
    let mut before = 0;
    for (round, count) in (0..).zip(counts) {
        client.write(*count);
        daemon.kill();
        let found = recovered(daemon, round, true);
        assert!((before..=client.record).contains(&found), "{found} after {before}");
        before = found;
        daemon.run(&[]);
        client.reconnect();
    }
    before
}

#[test]
fn whenever_the_daemon_dies_the_images_are_in_order() {
    let mut daemon = started(TOGETHER);
    let mut client = Client::new(&daemon);
    let counts: Vec<u64> = (0..12).map(|round| 40 + round * 37 % 97).collect();
    let found = die_and_look(&mut daemon, &mut client, &counts);
    assert!(found > 0, "something was drained");
    client.write(10);
    let seen = [contents(&mut client.log), contents(&mut client.data)];
    assert_eq!(records(&seen[0], &seen[1]), client.record);
    client.stop(&daemon);
    drain(&daemon, "vm/log");
    drain(&daemon, "vm/data");
    for (name, seen) in ["log.raw", "data.raw"].iter().zip(&seen) {
        same(&std::fs::read(daemon.path(name)).unwrap(), seen);
    }
    let drained = |name: &str| cache(&daemon, name)["drainedWon"].clone();
    eventually("both are at one point", || drained("vm/log") == drained("vm/data"));
    daemon.stop();
}

#[test]
fn a_disk_joins_and_leaves_under_a_guest_and_is_detached() {
    let daemon = started(", maxStaleness: 1h");
    let mut client = Client::new(&daemon);
    client.write(30);
    let plan = daemon.apply(&disks(&daemon, [", consistencyGroup: db"; 2]));
    assert_eq!(plan["steps"].as_array().unwrap().len(), 2, "{plan}");
    assert_eq!(cache(&daemon, "vm/log")["consistencyGroup"], "db");
    client.reconnect();
    client.write(30);
    let failure = daemon.refused("/v1/volumes/vm/log/mode", &json!({"mode": "bypass"}), 400);
    let text = failure["message"].as_str().unwrap();
    assert!(text.contains("leave `consistencyGroup` out"), "{text}");
    let marked = daemon.post("/v1/volumes/vm/data/mark", &json!({"name": "here"}));
    client.write(5);
    let to = json!({"to": marked["won"], "hold": true});
    daemon.post("/v1/volumes/vm/log/drain", &to);
    let at_the_mark = |name: &str| cache(&daemon, name)["drainedWon"] == marked["won"];
    eventually("both are at the mark", || at_the_mark("vm/log") && at_the_mark("vm/data"));
    let read = |name: &str| std::fs::read(daemon.path(name)).unwrap();
    assert_eq!(records(&read("log.raw"), &read("data.raw")), 60);
    // The leader of the two leaves, the guest goes on.
    daemon.apply(&disks(&daemon, ["", ", consistencyGroup: db"]));
    assert_eq!(cache(&daemon, "vm/log")["consistencyGroup"], json!(null));
    client.write(20);
    let seen = [contents(&mut client.log), contents(&mut client.data)];
    assert_eq!(records(&seen[0], &seen[1]), 85);
    client.stop(&daemon);
    for name in ["vm/data", "vm/log"] {
        eventually("it is detached", || {
            let (status, answer) =
                daemon.ask("POST", &format!("/v1/volumes/{name}/detach"), &json!({}));
            assert!(status == 200 || status == 409 || status == 503, "{answer}");
            status == 200
        });
    }
    same(&read("log.raw"), &seen[0]);
    same(&read("data.raw"), &seen[1]);
    assert!(daemon.volumes().is_empty());
}

#[test]
fn while_one_is_away_the_others_serve_and_nothing_moves() {
    let mut daemon = started(TOGETHER);
    let mut client = Client::new(&daemon);
    client.write(20);
    let head = cache(&daemon, "vm/data")["headWon"].as_u64().unwrap();
    daemon.stop();
    let (here, away) = (daemon.path("log.raw"), daemon.path("log.raw.away"));
    std::fs::rename(&here, &away).unwrap();
    daemon.run(&[]);
    client.data.reconnect().unwrap();
    assert_eq!(ask(&mut client.data, Kind::Write, 5000 * 8, &mut block(1)), 0);
    eventually("it is told", || {
        let message = cache(&daemon, "vm/data")["message"].clone();
        message.as_str().is_some_and(|text| text.contains("while vm/log of its consistency group"))
    });
    let failure = daemon.ask("POST", "/v1/apply", &change(&disks(&daemon, [TOGETHER, ""])));
    assert_ne!(failure.0, 200, "a disk cannot leave now: {}", failure.1);
    // It may come to the end of a step that both had begun before.
    assert!(cache(&daemon, "vm/data")["drainedWon"].as_u64() <= Some(head));
    std::fs::rename(&away, &here).unwrap();
    client.log.reconnect().unwrap();
    client.write(5);
    drain(&daemon, "vm/data");
    drain(&daemon, "vm/log");
    assert_eq!(std::fs::metadata(&here).unwrap().len(), DISK_BYTES);
    client.stop(&daemon);
    daemon.stop();
}

/// The log is a disk of two machines: one writes records, the other has the data.
#[test]
fn a_disk_that_machines_share_is_in_a_group_like_any_other() {
    let mut daemon = Vflashd::start();
    let (log, data) = (daemon.path("log.raw"), daemon.path("data.raw"));
    image(&log);
    image(&data);
    let shared = format!("{}\n    sharedWith: [other]", log.display());
    let data = data.display().to_string();
    daemon.apply(&manifest(&daemon, &[("log", TOGETHER, &shared), ("data", TOGETHER, &data)]));
    assert_eq!(cache(&daemon, "other/log")["consistencyGroup"], "db");
    let mut client = Client::of(&daemon, "other/log");
    die_and_look(&mut daemon, &mut client, &[60; 4]);
    // Two machines write one disk; neither is refused, and both go to one point.
    let mut home = connect(&daemon, "vm/log", 1, 8);
    assert_eq!(ask(&mut home, Kind::Write, 5000 * 8, &mut block(7)), 0);
    client.write(20);
    home.stop().unwrap();
    drain(&daemon, "vm/log");
    drain(&daemon, "vm/data");
    let drained = |name: &str| cache(&daemon, name)["drainedWon"].clone();
    eventually("both are at one point", || drained("vm/log") == drained("vm/data"));
    assert_eq!(drained("other/log"), drained("vm/data"));
}

#[test]
fn one_that_is_given_up_lets_the_others_go_on() {
    // The first leads; with its image there, and gone with its sidecar.
    for (lost, away) in [("data", false), ("data", true), ("log", false), ("log", true)] {
        let mut daemon = started(", maxStaleness: 1h, consistencyGroup: db");
        let mut client = Client::new(&daemon);
        client.write(20);
        drain(&daemon, "vm/log");
        drain(&daemon, "vm/data");
        let name = format!("vm/{lost}");
        let held = json!({"to": cache(&daemon, &name)["drainedWon"], "hold": true});
        daemon.post(&format!("/v1/volumes/{name}/drain"), &held);
        client.write(20);
        let seen = [contents(&mut client.log), contents(&mut client.data)];
        client.stop(&daemon);
        let image = daemon.path(&format!("{lost}.raw"));
        let path = |end: &str| PathBuf::from(format!("{}{end}", image.display()));
        if away {
            daemon.stop();
            std::fs::rename(path(""), path(".away")).unwrap();
            std::fs::rename(path(".vflash"), path(".vflash.away")).unwrap();
            daemon.run(&[]);
        }
        let detach = format!("/v1/volumes/{name}/detach");
        let failure = daemon.refused(&detach, &json!({"lost": true}), 409);
        assert_eq!(failure["code"], "unconfirmed", "{failure}");
        daemon.post(&detach, &json!({"lost": true, "confirm": [&name]}));
        let (other, seen) = match lost {
            "data" => ("log", &seen[0]),
            _ => ("data", &seen[1]),
        };
        let served = || daemon.get(&format!("/v1/volumes/vm/{other}"))["state"] == "served";
        eventually("the other one is served", served);
        drain(&daemon, &format!("vm/{other}"));
        same(&std::fs::read(daemon.path(&format!("{other}.raw"))).unwrap(), seen);
        if !away {
            let left = std::fs::read(path("")).unwrap();
            let newest = left.chunks_exact(BLOCK).map(record_of).max().unwrap();
            assert_eq!(newest, 20, "{lost} is at the last point of both");
        }
        // It is alone, and finds nobody missing, now and after a kill.
        daemon.kill();
        daemon.run(&[]);
        let (status, answer) =
            daemon.ask("POST", &format!("/v1/volumes/vm/{other}/detach"), &json!({}));
        assert_eq!(status, 200, "{answer}");
    }
}

/// A backing that hangs under a running daemon: no disk goes on alone, and then all do.
#[test]
fn while_one_backing_hangs_both_disks_serve_and_neither_advances() {
    let daemon = Vflashd::start();
    let (log, data, socket) = (daemon.path("log.raw"), daemon.path("data.raw"), daemon.path("nbd"));
    image(&log);
    image(&data);
    let server = Nbd::freezable(&socket, &log);
    let words = format!("{TOGETHER}, sidecar: {}", daemon.path("log.raw.vflash").display());
    let export = format!("nbd+unix:///?socket={}", socket.display());
    let data = data.display().to_string();
    daemon.apply(&manifest(&daemon, &[("log", &words, &export), ("data", TOGETHER, &data)]));
    let mut client = Client::new(&daemon);
    client.write(30);
    drain(&daemon, "vm/data");
    drain(&daemon, "vm/log");
    server.freeze();
    let point = |name: &str| cache(&daemon, name)["drainedWon"].as_u64().unwrap();
    let write_for_a_while = |client: &mut Client| {
        let begun = Instant::now();
        while begun.elapsed() < A_WHILE {
            client.write(1);
            assert!(point("vm/log") <= client.record * 2, "and whoever asks is answered");
        }
    };
    // A step that was under way may come to its end on the other.
    write_for_a_while(&mut client);
    let image = std::fs::read(daemon.path("data.raw")).unwrap();
    write_for_a_while(&mut client);
    assert!(image == std::fs::read(daemon.path("data.raw")).unwrap(), "it goes on alone");
    server.thaw();
    drain(&daemon, "vm/data");
    drain(&daemon, "vm/log");
    eventually("both are at one point", || point("vm/log") == point("vm/data"));
    let read = |name: &str| std::fs::read(daemon.path(name)).unwrap();
    assert_eq!(records(&read("log.raw"), &read("data.raw")), client.record);
}

#[test]
fn a_kill_while_disks_join_and_leave_leaves_every_disk_in_order() {
    let mut daemon = started(", maxStaleness: 1h");
    let mut client = Client::new(&daemon);
    let mut random = fastrand::Rng::with_seed(31);
    // In the group: neither, both, only one of them.
    let states = [["", ""], [", consistencyGroup: db"; 2], ["", ", consistencyGroup: db"]];
    let states = states.map(|words| words.map(|words| format!(", maxStaleness: 1h{words}")));
    let manifests = [0, 1, 2].map(|state: usize| {
        let [log, data] = &states[state];
        disks(&daemon, [log, data])
    });
    let mut state = 0;
    for round in 0..24 {
        client.write(10);
        let next = (state + random.usize(1..3)) % 3;
        if state != 1 {
            // Each for itself: that they are in order is nobody's promise.
            drain(&daemon, "vm/data");
            drain(&daemon, "vm/log");
        }
        let asked = random.u32(0..60);
        std::thread::scope(|scope| {
            let (daemon, wanted) = (&daemon, change(&manifests[next]));
            scope.spawn(move || daemon.try_ask("POST", "/v1/apply", &wanted));
            // Somewhere in the middle of it.
            (0..asked).for_each(|_| drop(daemon.get("/healthz")));
            daemon.kill_now();
        });
        daemon.kill();
        let found = recovered(&daemon, round, false);
        assert!(found <= client.record, "{found}");
        assert!(state == 1 || found == client.record, "{found} of {}", client.record);
        daemon.run(&[]);
        client.reconnect();
        let seen = [contents(&mut client.log), contents(&mut client.data)];
        assert_eq!(records(&seen[0], &seen[1]), client.record, "round {round}");
        daemon.apply(&manifests[next]);
        client.reconnect();
        for (name, words) in ["vm/log", "vm/data"].iter().zip(&states[next]) {
            let group = cache(&daemon, name)["consistencyGroup"].clone();
            assert_eq!(group.is_null(), !words.contains("Group"), "{name}: {group}");
        }
        state = next;
    }
    client.write(10);
    client.stop(&daemon);
    drain(&daemon, "vm/data");
    drain(&daemon, "vm/log");
    let read = |name: &str| std::fs::read(daemon.path(name)).unwrap();
    assert_eq!(records(&read("log.raw"), &read("data.raw")), 250);
}

#[test]
fn a_member_changes_its_size_and_its_mode_under_the_guest() {
    let mut daemon = started(", maxStaleness: 1h, consistencyGroup: db");
    let mut client = Client::new(&daemon);
    for (round, (mebibytes, mode)) in
        (0..).zip([(6, "write-through"), (40, "write-back"), (8, "write-through")])
    {
        client.write(150);
        let size = json!({"sizeBytes": mebibytes * MIB});
        daemon.post("/v1/volumes/vm/data/resize", &size);
        daemon.post("/v1/volumes/vm/log/mode", &json!({"mode": mode}));
        client.write(20);
        eventually("both are as wanted", || {
            let (log, data) = (cache(&daemon, "vm/log"), cache(&daemon, "vm/data"));
            let resized = data["sizeBytes"] == mebibytes * MIB && data["resizingToBytes"].is_null();
            resized && log["mode"] == mode
        });
        let logged = client.record;
        client.write(20);
        daemon.kill();
        let found = recovered(&daemon, round, true);
        assert!(found <= client.record, "{found}");
        let through = mode == "write-through";
        assert!(!through || found > logged, "what a write-through disk has acknowledged is there");
        daemon.run(&[]);
        client.reconnect();
    }
    let seen = [contents(&mut client.log), contents(&mut client.data)];
    assert_eq!(records(&seen[0], &seen[1]), client.record);
}
