//! Cached disks as a guest and an operator meet them, on the real daemon.

mod cached_disk;
mod vflashd;

use cached_disk::{cache, contents, drain, load, operate, same, started};
use serde_json::json;

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
        runner.drain().unwrap();
        runner.read_back().unwrap();
        assert_eq!(runner.errors, 0);
        let seen = contents(&mut runner.device);
        runner.device.stop().unwrap();
        drain(&daemon, "vm/disk");
        assert_eq!(cache(&daemon, "vm/disk")["dirtyBytes"], 0);
        same(&std::fs::read(daemon.path("disk.raw")).unwrap(), &seen);
        daemon.stop();
    }
}

#[test]
fn a_clean_stop_is_quick_leaves_dirty_data_and_a_start_without_manifests_serves_it() {
    let (mut daemon, _) = started(", maxStaleness: 1h");
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
    assert_eq!(after["cache"]["stalenessMs"], 3_600_000);
    runner.read_back().unwrap();
    runner.device.stop().unwrap();
    let plan = daemon.post("/v1/volumes/vm/disk/detach", &json!({}));
    assert_eq!(plan["done"], true, "{plan}");
    assert!(daemon.volumes().is_empty());
    same(&std::fs::read(daemon.path("disk.raw")).unwrap(), &seen);
    daemon.stop();
}
