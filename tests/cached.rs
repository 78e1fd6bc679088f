//! Cached disks as a guest and an operator meet them, on the real daemon.

mod cached_disk;
mod vflashd;

use cached_disk::{
    DISK_BYTES, Nbd, cache, connect, contents, drain, finish, image, load, manifest, operate, read,
    same, started, write,
};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use vflashd::{Vflashd, change, eventually, left_out};

#[test]
fn what_a_guest_wrote_outlives_kills_and_is_in_the_backing_after_a_drain() {
    for words in ["", ", drain: ordered", ", durability: flush"] {
        let (mut daemon, _) = started(words);
        let mut runner = load(&daemon, "vm/disk", 11);
        for _ in 0..4 {
            operate(&mut runner, 500);
            daemon.kill();
            daemon.run(&[]);
            runner.device.reconnect().unwrap();
        }
        operate(&mut runner, 500);
        finish(runner, &daemon, "vm/disk", &daemon.path("disk.raw"));
        assert_eq!(cache(&daemon, "vm/disk")["dirtyBytes"], 0);
        daemon.stop();
    }
}

#[test]
fn a_clean_stop_leaves_dirty_data_and_a_start_without_manifests_serves_it() {
    let (mut daemon, manifest) = started(", maxStaleness: 1h");
    let mut runner = load(&daemon, "vm/disk", 12);
    operate(&mut runner, 300);
    runner.drain().unwrap();
    let seen = contents(&mut runner.device);
    let before = daemon.get("/v1/volumes/vm/disk");
    daemon.stop();
    daemon.run(&[]);
    runner.device.reconnect().unwrap();
    same(&contents(&mut runner.device), &seen);
    let after = daemon.get("/v1/volumes/vm/disk");
    for field in ["serial", "sizeBytes", "socket", "state"] {
        assert_eq!(before[field], after[field], "{field}");
    }
    assert_eq!(after["sizeBytes"], DISK_BYTES);
    assert_eq!(after["cache"]["stalenessMs"], 3_600_000);
    let again = daemon.apply(&manifest);
    assert_eq!(again, json!({"steps": [], "destroys": [], "done": true}), "nothing to do");
    runner.read_back().unwrap();
    runner.device.stop().unwrap();
    drop(runner);
    eventually("it is let go", || daemon.get("/v1/volumes/vm/disk")["attached"] == false);
    let plan = daemon.post("/v1/volumes/vm/disk/detach", &json!({}));
    assert_eq!(plan["done"], true, "{plan}");
    assert!(daemon.volumes().is_empty());
    same(&std::fs::read(daemon.path("disk.raw")).unwrap(), &seen);
    daemon.stop();
}

#[test]
fn the_backing_stops_at_a_named_point_and_is_held_there() {
    let (daemon, _) = started(", maxStaleness: 1h");
    let mut device = connect(&daemon, "vm/disk", 1, 8);
    let ask = |path: &str, body: Value| daemon.post(&format!("/v1/volumes/vm/disk/{path}"), &body);
    write(&mut device, 63, 1);
    let mark = ask("mark", json!({"name": "before"}));
    write(&mut device, 63, 2);
    let points = daemon.get("/v1/volumes/vm/disk/points");
    let points = points["points"].as_array().unwrap();
    assert!(points.iter().any(|point| point["name"] == "before"), "{points:?}");
    let held = ask("drain", json!({"point": "before", "hold": true}));
    assert_eq!(held["targetWon"], mark["won"]);
    eventually("it is there", || cache(&daemon, "vm/disk")["drainedWon"] == mark["won"]);
    assert_eq!(cache(&daemon, "vm/disk")["heldAt"], mark["won"]);
    let at = |sector: u64| std::fs::read(daemon.path("disk.raw")).unwrap()[sector as usize * 512];
    assert_eq!(at(63), 1, "the older version, though the newer one is acknowledged");
    assert_eq!(read(&mut device, 63), 2);
    let failure = daemon.refused("/v1/volumes/vm/disk/drain", &json!({"to": 1000}), 400);
    let text = failure["message"].as_str().unwrap();
    assert!(text.contains("has not been written yet; the nearest"), "{text}");
    let failure = daemon.refused("/v1/volumes/vm/disk/drain", &json!({"point": "no"}), 404);
    assert!(failure["message"].as_str().unwrap().contains("has no point `no`"), "{failure}");
    drain(&daemon, "vm/disk");
    assert_eq!(at(63), 2);
    assert_eq!(cache(&daemon, "vm/disk")["heldAt"], Value::Null);
    assert!(!daemon.events("drained").is_empty());
}

#[test]
fn modes_and_other_settings_change_under_a_guest() {
    let (daemon, manifest) = started("");
    let mut device = connect(&daemon, "vm/disk", 1, 8);
    let mut byte = 0;
    for mode in ["write-through", "write-around", "read-only", "bypass", "write-back"] {
        byte += 1;
        write(&mut device, 8 * byte, byte as u8);
        daemon.post("/v1/volumes/vm/disk/mode", &json!({"mode": mode}));
        eventually(&format!("{mode} is in force"), || cache(&daemon, "vm/disk")["mode"] == mode);
        assert_eq!(read(&mut device, 8 * byte), byte as u8);
        if mode != "write-back" {
            write(&mut device, 8 * byte, 100 + byte as u8);
            let backing = std::fs::read(daemon.path("disk.raw")).unwrap();
            assert_eq!(backing[4096 * byte as usize], 100 + byte as u8, "{mode} is through");
        }
    }
    let words = "size: 16MiB, drain: ordered, maxStaleness: 5s, durability: flush";
    let other = manifest.replace("size: 16MiB", words);
    let plan = daemon.apply(&other);
    assert_eq!(plan["steps"][0]["action"], "update", "{plan}");
    let cache = cache(&daemon, "vm/disk");
    assert_eq!(cache["drain"], "ordered");
    assert_eq!(cache["stalenessMs"], 5000);
    assert_eq!(cache["durability"], "flush");
    assert_eq!(read(&mut device, 8), 101, "the guest has not noticed");
    assert!(daemon.apply(&other)["steps"].as_array().unwrap().is_empty());
}

/// The message with which an apply is refused.
fn refusal(daemon: &Vflashd, manifest: &str) -> String {
    let (status, body) = daemon.ask("POST", "/v1/apply", &change(manifest));
    assert_ne!(status, 200, "{body}");
    let text = body.to_string();
    text.replace(daemon.folder.path().to_str().unwrap(), "DIR")
}

#[test]
fn a_backing_has_one_daemon_and_one_volume() {
    let (mut daemon, manifest_text) = started(", maxStaleness: 1h");
    let mut device = connect(&daemon, "vm/disk", 1, 8);
    write(&mut device, 0, 7);
    let backing = daemon.path("disk.raw");
    let backing = backing.to_str().unwrap();
    let twice = manifest(&daemon, &[("disk", ", maxStaleness: 1h", backing), ("b", "", backing)]);
    let text = refusal(&daemon, &twice);
    assert!(text.contains("vm/disk is this disk already"), "{text}");

    let other = Vflashd::start();
    let stranger = manifest(&other, &[("disk", "", backing)]);
    let text = refusal(&other, &stranger);
    assert!(text.contains("disk.raw") && text.contains("in use"), "while it is open: {text}");
    assert!(other.volumes().is_empty(), "what was made was undone");
    daemon.kill();
    let text = refusal(&other, &stranger);
    assert!(text.contains("it belongs to vm/disk on host"), "while dirty: {text}");
    let way_out = "`vflash detach --lost --backing DIR/disk.raw --confirm vm/disk`";
    assert!(text.replace(backing, "DIR/disk.raw").contains(way_out), "{text}");
    assert!(other.volumes().is_empty());
    daemon.run(&[]);
    device.reconnect().unwrap();
    assert_eq!(read(&mut device, 0), 7);
    device.stop().unwrap();
    drop(device);
    eventually("it is let go", || daemon.get("/v1/volumes/vm/disk")["attached"] == false);
    daemon.post("/v1/volumes/vm/disk/detach", &json!({}));
    other.apply(&stranger);
    let mut device = connect(&other, "vm/disk", 1, 8);
    assert_eq!(read(&mut device, 0), 7, "the disk has moved");
    assert!(daemon.apply(&pool_only(&manifest_text))["done"] == true);
}

/// The pool of a manifest alone.
fn pool_only(manifest: &str) -> String {
    manifest.split("---\n").next().unwrap().to_owned()
}

#[test]
fn a_backing_that_is_away_stops_nobody_and_is_served_when_it_is_back() {
    let (mut daemon, _) = started(", mode: write-around");
    let mut device = connect(&daemon, "vm/disk", 1, 8);
    write(&mut device, 0, 9);
    daemon.kill();
    std::fs::rename(daemon.path("disk.raw"), daemon.path("away")).unwrap();
    daemon.run(&[]);
    let volume = daemon.get("/v1/volumes/vm/disk");
    assert_eq!(volume["state"], "failed");
    assert_eq!(volume["cache"]["state"], "failed");
    let text = volume["message"].as_str().unwrap();
    assert!(text.contains("cached disk vm/disk") && text.contains("disk.raw"), "{text}");
    assert_eq!(daemon.get("/healthz")["state"], "degraded");
    let failure = daemon.refused("/v1/volumes/vm/disk/detach", &json!({}), 409);
    assert!(failure["message"].as_str().unwrap().contains("--lost"), "{failure}");
    daemon.refused("/v1/volumes/vm/disk/drain", &json!({}), 503);
    std::fs::rename(daemon.path("away"), daemon.path("disk.raw")).unwrap();
    eventually("it is served", || daemon.get("/v1/volumes/vm/disk")["state"] == "served");
    assert_eq!(daemon.events("backingBack").len(), 1);
    device.reconnect().unwrap();
    assert_eq!(read(&mut device, 0), 9);
}

#[test]
fn what_only_the_flash_holds_is_given_up_by_name_alone_after_it_was_told() {
    let (daemon, manifest) = started(", maxStaleness: 1h");
    let mut device = connect(&daemon, "vm/disk", 1, 8);
    write(&mut device, 0, 1);
    drain(&daemon, "vm/disk");
    daemon.post("/v1/volumes/vm/disk/drain", &json!({"to": 1, "hold": true}));
    write(&mut device, 0, 2);
    let lost = |confirm: &[&str]| json!({"lost": true, "confirm": confirm});
    let path = "/v1/volumes/vm/disk/detach";
    daemon.refused(path, &lost(&["vm/disk"]), 409);
    let forced = json!({"force": true, "confirm": ["vm/disk"]});
    let failure = daemon.refused("/v1/volumes/vm/disk/reclaim", &forced, 409);
    assert!(failure["message"].as_str().unwrap().contains("that its backing lacks"), "{failure}");
    device.stop().unwrap();
    drop(device);
    eventually("it is let go", || daemon.get("/v1/volumes/vm/disk")["attached"] == false);
    let failure = daemon.refused(path, &lost(&[]), 409);
    assert_eq!(failure["unconfirmed"], json!(["vm/disk"]));
    let text = failure["message"].as_str().unwrap();
    assert!(text.contains("of acknowledged writes (points 2 to 2), the oldest"), "{text}");
    assert!(text.ends_with("is at point 1"), "{text}");
    assert_eq!(daemon.volumes(), ["vm/disk"]);
    daemon.post(path, &lost(&["vm/disk"]));
    assert!(daemon.volumes().is_empty());
    assert_eq!(std::fs::read(daemon.path("disk.raw")).unwrap()[0], 1);
    daemon.apply(&manifest);
    let mut device = connect(&daemon, "vm/disk", 1, 8);
    assert_eq!(read(&mut device, 0), 1, "a new cache on what is left");
}

#[test]
fn a_deletion_drains_first() {
    let (daemon, manifest) = started(", maxStaleness: 1h");
    let mut device = connect(&daemon, "vm/disk", 1, 8);
    write(&mut device, 0, 3);
    device.stop().unwrap();
    drop(device);
    eventually("it is let go", || daemon.get("/v1/volumes/vm/disk")["attached"] == false);
    let change = vflashd::confirmed(&manifest, &["vm/disk"]);
    let plan = daemon.post("/v1/delete", &change);
    let detail = plan["steps"][0]["detail"].as_str().unwrap();
    assert!(detail.starts_with("drain to "), "{detail}");
    assert!(daemon.volumes().is_empty());
    assert_eq!(std::fs::read(daemon.path("disk.raw")).unwrap()[0], 3);
}

/// Loads the disk on a backing that is no file, drains it, and compares.
fn over(words: &str, backing: &str, image: &Path, daemon: &mut Vflashd) {
    daemon.apply(&manifest(daemon, &[("disk", words, backing)]));
    let mut runner = load(daemon, "vm/disk", 13);
    operate(&mut runner, 300);
    daemon.kill();
    daemon.run(&[]);
    runner.device.reconnect().unwrap();
    operate(&mut runner, 300);
    finish(runner, daemon, "vm/disk", image);
    daemon.stop();
}

#[test]
fn an_nbd_export_is_a_backing() {
    let mut daemon = Vflashd::start();
    let (file, socket) = (daemon.path("disk.raw"), daemon.path("nbd"));
    image(&file);
    let _server = Nbd::freezable(&socket, &file);
    let words = format!(", sidecar: {}", daemon.path("redo").display());
    let backing = format!("nbd+unix:///?socket={}", socket.display());
    over(&words, &backing, &file, &mut daemon);
}

#[test]
fn a_loop_device_is_a_backing() {
    let mut daemon = Vflashd::start();
    let file = daemon.path("disk.raw");
    image(&file);
    let made = Command::new("losetup").args(["--find", "--show"]).arg(&file).output();
    let Some(made) = made.ok().filter(|made| made.status.success()) else {
        return left_out("loop", "the right to make a loop device");
    };
    let device = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    struct Loop(String);
    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Command::new("losetup").args(["--detach", &self.0]).status();
        }
    }
    let _loop = Loop(device.clone());
    let words = format!(", sidecar: {}", daemon.path("redo").display());
    over(&words, &device, &file, &mut daemon);
}

#[test]
fn everything_about_a_cache_is_shown() {
    let (daemon, _) = started(", maxStaleness: 1h");
    let mut device = connect(&daemon, "vm/disk", 1, 8);
    daemon.post("/v1/volumes/vm/disk/drain", &json!({"to": 0, "hold": true}));
    write(&mut device, 0, 3);
    assert_eq!(read(&mut device, 0), 3);
    eventually("it is seen", || cache(&daemon, "vm/disk")["headWon"] == 1);
    let status = daemon.get("/v1/status")["caches"][0].clone();
    assert_eq!(status["name"], "vm/disk");
    assert!(status["cache"]["dirtyBytes"].as_u64() >= Some(4096), "{status}");
    let (_, page) = daemon.ask("GET", "/metrics", &Value::Null);
    let page = page.as_str().unwrap();
    for line in [
        "vflash_cache_head_won{pool=\"p0\",vm=\"vm\",volume=\"disk\"} 1",
        "vflash_cache_drained_won{pool=\"p0\",vm=\"vm\",volume=\"disk\"} 0",
        "vflash_cache_records_total{pool=\"p0\",vm=\"vm\",volume=\"disk\"} 1",
        "vflash_cache_info{pool=\"p0\",vm=\"vm\",volume=\"disk\",mode=\"write-back\",state=\"",
    ] {
        assert!(page.contains(line), "{line} is not in\n{page}");
    }
}
