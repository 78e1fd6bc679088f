//! A consistency group on the real daemon: a log on one disk, data that refers to it on another.

mod cached_disk;
mod vflashd;

use cached_disk::{DISK_BYTES, ask, cache, connect, contents, drain, image, manifest, same};
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;
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
        let (log, data) = (connect(daemon, "vm/log", 1, 8), connect(daemon, "vm/data", 1, 8));
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

/// Images and sidecars as they are now, recovered as another host would.
fn recovered(daemon: &Vflashd, round: u32) -> u64 {
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
    let half = recover_all(&mut [open(&copies[1])], how, &mut |_| {}).expect_err("half a group");
    assert!(half.to_string().contains("log.raw of vm/log too; nothing was changed"), "{half}");
    let mut backings: Vec<Backing> = copies.iter().map(open).collect();
    let done = recover_all(&mut backings, how, &mut |_| {}).unwrap();
    let points: Vec<u64> = done.into_iter().map(|done| done.unwrap().standing.point.won).collect();
    assert_eq!(points[0], points[1], "both are at one point");
    drop(backings);
    let found = records(&std::fs::read(&copies[0]).unwrap(), &std::fs::read(&copies[1]).unwrap());
    copies.iter().for_each(|copy| std::fs::remove_file(copy).unwrap());
    found
}

#[test]
fn whenever_the_daemon_dies_the_images_are_in_order() {
    let mut daemon = started(TOGETHER);
    let mut client = Client::new(&daemon);
    let mut before = 0;
    for round in 0..12 {
        client.write(40 + u64::from(round) * 37 % 97);
        daemon.kill();
        let found = recovered(&daemon, round);
        assert!((before..=client.record).contains(&found), "{found} after {before}");
        before = found;
        daemon.run(&[]);
        client.reconnect();
    }
    assert!(before > 0, "something was drained");
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
    daemon.stop();
    let (here, away) = (daemon.path("log.raw"), daemon.path("log.raw.away"));
    std::fs::rename(&here, &away).unwrap();
    daemon.run(&[]);
    client.data.reconnect().unwrap();
    let before = cache(&daemon, "vm/data")["drainedWon"].clone();
    assert_eq!(ask(&mut client.data, Kind::Write, 5000 * 8, &mut block(1)), 0);
    eventually("it is told", || {
        let message = cache(&daemon, "vm/data")["message"].clone();
        message.as_str().is_some_and(|text| text.contains("while vm/log of its consistency group"))
    });
    assert_eq!(cache(&daemon, "vm/data")["drainedWon"], before);
    let failure = daemon.ask("POST", "/v1/apply", &change(&disks(&daemon, [TOGETHER, ""])));
    assert_ne!(failure.0, 200, "a disk cannot leave now: {}", failure.1);
    std::fs::rename(&away, &here).unwrap();
    client.log.reconnect().unwrap();
    client.write(5);
    drain(&daemon, "vm/data");
    drain(&daemon, "vm/log");
    assert_eq!(std::fs::metadata(&here).unwrap().len(), DISK_BYTES);
    client.stop(&daemon);
    daemon.stop();
}
