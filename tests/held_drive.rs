//! A drive that does not answer keeps its own volume from being taken down, and that is shown.
//!
//! The only test of its file: it changes the mounts of the thread that runs it.

mod drive;
mod vflashd;

use drive::Drive;
use serde_json::json;
use vflash_bench::device::Device;
use vflash_bench::queue::Kind;
use vflashd::{Vflashd, attach, change, eventually, left_out, machine_manifest};

/// What the write that the drive keeps is filled with; nothing else on it begins so.
const KEPT: u8 = 0xa5;

/// A front end of `vm/a` with a write that the drive keeps.
fn held_write(daemon: &Vflashd, drive: &Drive) -> Device {
    let mut device = attach(daemon, "vm/a");
    drive.hold(KEPT);
    let slot = device.queues[0].take_slot().unwrap();
    device.memory.write(device.queues[0].data(slot), &[KEPT; 4096]);
    device.queues[0].submit(&device.memory, slot, Kind::Write, 0, 4096);
    device.queues[0].publish(&device.memory);
    drive.wait_held();
    device
}

#[test]
fn a_volume_that_a_drive_holds_up_is_shown_as_being_taken_down_until_it_is() {
    let mut daemon = Vflashd::start();
    let path = daemon.path("drive");
    daemon.stop();
    let Some(drive) = Drive::mount(&path, 24 << 20) else {
        return left_out("fuse", "/dev/fuse and the right to mount");
    };
    daemon.run(&[]);
    daemon.post("/v1/pools", &json!({"name": "p0", "device": path.display().to_string()}));
    let wanted = machine_manifest("vm", &[("a", "size: 1MiB")]);
    daemon.apply(&wanted);
    eventually("all is scrubbed", || daemon.get("/v1/pools/p0")["space"]["scrubBytes"] == 0);
    let socket = daemon.run_dir().join("vm/a.sock");
    let _device = held_write(&daemon, &drive);

    // A change of settings that cannot be carried out changes nothing, and who asks again has it.
    let pinned = wanted.clone() + "    pinMemory: true\n";
    let (status, failure) = daemon.ask("POST", "/v1/apply", &change(&pinned));
    assert_eq!(status, 409, "{failure}");
    assert!(failure["message"].as_str().unwrap().contains("volume vm/a"), "{failure}");
    let volume = daemon.get("/v1/volumes/vm/a");
    assert_eq!((&volume["pinMemory"], &volume["state"]), (&json!(false), &json!("failed")));
    let (status, failure) = daemon.ask("POST", "/v1/apply", &change(&wanted));
    assert_eq!(status, 409, "it cannot be served again yet: {failure}");
    drive.release();
    eventually("the write has ended and its socket goes", || !socket.exists());
    let plan = daemon.apply(&wanted);
    assert_eq!(plan["steps"].as_array().unwrap().len(), 1, "{plan}");
    assert_eq!(plan["steps"][0]["detail"], "serve it again", "{plan}");
    assert_eq!(daemon.get("/v1/volumes/vm/a")["state"], "served");
    assert_eq!(daemon.apply(&wanted)["steps"], json!([]));
    daemon.apply(&pinned);
    assert_eq!(daemon.get("/v1/volumes/vm/a")["pinMemory"], true);

    let _device = held_write(&daemon, &drive);
    let forced = json!({"force": true});
    let failure = daemon.refused("/v1/pools/p0/close", &forced, 409);
    assert!(failure["message"].as_str().unwrap().contains("volume vm/a"), "{failure}");
    let volume = daemon.get("/v1/volumes/vm/a");
    assert_eq!(volume["state"], "failed", "{volume}");
    assert!(volume["message"].as_str().unwrap().contains("being taken down"), "{volume}");
    let health = daemon.get("/healthz");
    assert!(health["problems"][0].as_str().unwrap().contains("volume vm/a"), "{health}");
    let metrics = daemon.get("/metrics");
    let line = "vflash_volume_served{pool=\"p0\",vm=\"vm\",volume=\"a\"} 0";
    assert!(metrics.as_str().unwrap().contains(line), "{metrics}");

    drive.release();
    eventually("the write has ended and its socket goes", || !socket.exists());
    assert_eq!(daemon.post("/v1/pools/p0/close", &forced)["pools"], json!([]));
    daemon.stop();
}
