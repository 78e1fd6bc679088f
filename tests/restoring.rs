//! What a daemon makes of the pools that it finds at its start, and of drives that fail it.

mod vflashd;

use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;
use vflash::flash::{Class, NewAllocation, Pool};
use vflash::io::file::FileDisk;
use vflash_bench::queue::Kind;
use vflashd::{SOON, Vflashd, attach, change, eventually, machine_manifest, pool_manifest};

#[test]
fn with_a_state_directory_pools_are_served_after_a_restart_of_the_host() {
    let mut daemon = Vflashd::start();
    daemon.stop();
    let state_dir = daemon.path("state").display().to_string();
    let arguments = ["--state-dir", state_dir.as_str()];
    daemon.run(&arguments);
    let machine = machine_manifest("vm", &[("a", "size: 8MiB")]);
    daemon.apply(&(pool_manifest(daemon.folder.path()) + &machine));
    daemon.kill();
    std::fs::remove_dir_all(daemon.run_dir()).unwrap();
    daemon.run(&arguments);
    assert_eq!(daemon.volumes(), ["vm/a"]);
    // What was closed meanwhile stays closed, whatever the run directory says.
    let old = std::fs::read(daemon.run_dir().join("pools.json")).unwrap();
    daemon.post("/v1/pools/p0/close", &json!({}));
    daemon.stop();
    std::fs::write(daemon.run_dir().join("pools.json"), old).unwrap();
    daemon.run(&arguments);
    assert!(daemon.volumes().is_empty());
}

#[test]
fn a_pool_that_is_held_holds_up_no_other_and_is_served_when_it_is_free() {
    let mut daemon = Vflashd::start();
    let path = |pool: &str| daemon.path(pool);
    for (pool, machine) in [("a", "vm1"), ("b", "vm2")] {
        let manifest = pool_manifest(daemon.folder.path())
            .replace("p0", pool)
            .replace(&path("pool").display().to_string(), &path(pool).display().to_string());
        let machine = machine_manifest(machine, &[("data", "size: 8MiB")]).replace("p0", pool);
        daemon.apply(&(manifest + &machine));
    }
    daemon.stop();
    let held = FileDisk::open(&daemon.path("a"), Duration::ZERO).unwrap();
    daemon.run(&[]);
    let events = daemon.get("/v1/events");
    let events: Vec<String> = events["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| format!("{} {}", event["kind"], event["object"]).replace('"', ""))
        .collect();
    let at = |wanted: &str| events.iter().position(|event| event == wanted);
    assert!(at("poolOpened pool b").unwrap() < at("poolFailed pool a").unwrap(), "{events:?}");
    drop(held);
    eventually("it is opened without being asked for", || daemon.volumes().len() == 2);
    assert_eq!(daemon.get("/healthz")["state"], "ok");
}

#[test]
fn a_device_that_was_given_by_mistake_is_not_remembered() {
    let mut daemon = Vflashd::start();
    daemon.stop();
    std::fs::write(daemon.path("text"), vec![b'x'; 8 << 20]).unwrap();
    let text = daemon.path("text").display().to_string();
    daemon.run(&["--pool", &text]);
    assert!(daemon.get("/healthz")["problems"].to_string().contains(&text));
    daemon.stop();
    daemon.run(&[]);
    assert_eq!(daemon.get("/healthz")["state"], "ok");
}

/// Changes a pool as no daemon does.
fn changed(path: &Path, change: impl FnOnce(&mut Pool)) {
    let disk = FileDisk::open(path, SOON).unwrap();
    let mut pool = Pool::open(Box::new(disk)).unwrap();
    change(&mut pool);
}

#[test]
fn settings_that_cannot_be_read_are_left_as_they_are() {
    let mut daemon = Vflashd::start();
    let manifest = pool_manifest(daemon.folder.path());
    let machine = machine_manifest("vm", &[("a", "size: 8MiB")]);
    daemon.apply(&(manifest + &machine));
    daemon.stop();
    let newer = br#"{"version":99}"#;
    let attributes = |pool: &Pool| pool.find("vm/a").unwrap().attributes.clone();
    changed(&daemon.path("pool"), |pool| {
        let id = pool.find("vm/a").unwrap().id;
        pool.set_attributes(id, newer.to_vec()).unwrap();
    });
    daemon.run(&[]);
    let mistakes = daemon.refused("/v1/apply", &change(&machine), 400).to_string();
    assert!(mistakes.contains("the settings of vm/a cannot be read"), "{mistakes}");
    assert_eq!(daemon.ask("GET", "/v1/manifest", &Value::Null).0, 501);
    let reclaim = |force: bool| json!({"confirm": ["vm/a"], "force": force});
    let refused = daemon.refused("/v1/volumes/vm/a/reclaim", &reclaim(false), 501).to_string();
    assert!(refused.contains("--force"), "{refused}");
    daemon.stop();
    changed(&daemon.path("pool"), |pool| assert_eq!(attributes(pool), newer));
    daemon.run(&[]);
    daemon.post("/v1/volumes/vm/a/reclaim", &reclaim(true));
    assert!(daemon.volumes().is_empty());
}

#[test]
fn a_pool_with_names_of_another_making_is_refused() {
    let mut daemon = Vflashd::start();
    daemon.apply(&pool_manifest(daemon.folder.path()));
    daemon.stop();
    changed(&daemon.path("pool"), |pool| {
        let (thin, class) = (true, Class::Volatile);
        let (name, attributes) = ("../../etc/x".to_owned(), Vec::new());
        pool.create(NewAllocation { name, size_bytes: 1 << 20, thin, class, attributes }).unwrap();
    });
    daemon.run(&[]);
    let problems = daemon.get("/healthz")["problems"].to_string();
    assert!(problems.contains("../../etc/x") && problems.contains("never gives"), "{problems}");
}

#[test]
fn errors_of_the_drive_are_told_and_shown() {
    let daemon = Vflashd::start();
    let manifest = pool_manifest(daemon.folder.path());
    daemon.apply(&(manifest + &machine_manifest("vm", &[("a", "size: 8MiB")])));
    let mut device = attach(&daemon, "vm/a");
    let file = std::fs::File::options().write(true).open(daemon.path("pool")).unwrap();
    file.set_len(4096).unwrap();
    let slot = device.queues[0].take_slot().unwrap();
    device.queues[0].submit(&device.memory, slot, Kind::Read, 16, 4096);
    device.queues[0].publish(&device.memory);
    assert_eq!(device.await_ended(1, SOON).unwrap(), [1]);
    let text = "the drive failed 1 operations, the last at byte 8192 of the volume";
    eventually("it is told", || daemon.events("error").iter().any(|told| told.contains(text)));
    assert!(daemon.get("/healthz")["problems"].to_string().contains(text));
}
