//! `vflash check` and `vflash dump journal` on a log that a guest has written.

mod daemon;

use daemon::Daemon;
use std::os::unix::fs::FileExt;
use std::time::Duration;
use vflash::control::http::Access;
use vflash_bench::device::{Device, DeviceOptions};
use vflash_bench::queue::Kind;

const SOON: Duration = Duration::from_secs(30);

/// What each write consists of.
const BYTES: [u8; 3] = [0xc7, 0xd8, 0xe9];

/// Three writes that are on the flash alone, and the pool out of service.
fn closed_with_three_writes(daemon: &Daemon) -> String {
    let manifest = daemon.cached_manifest().display().to_string();
    daemon.says(&["apply", "-f", &manifest]);
    daemon.says(&["drain", "db-1/data", "--to", "0", "--hold"]);
    let socket = daemon.path("run/db-1/data.sock");
    let options = DeviceOptions { connect_timeout: SOON, ..DeviceOptions::new(&socket) };
    let mut device = Device::open(options).unwrap();
    for (sector, byte) in (63..).zip(BYTES) {
        let slot = device.queues[0].take_slot().unwrap();
        let data = device.queues[0].data(slot);
        device.memory.write(data, &[byte; 512]);
        device.queues[0].submit(&device.memory, slot, Kind::Write, sector, 512);
        device.queues[0].publish(&device.memory);
        assert_eq!(device.await_ended(1, SOON).unwrap(), [0]);
    }
    device.stop().unwrap();
    drop(device);
    daemon.says(&["pool", "close", "p0", "--force"]);
    daemon.path("pool").display().to_string()
}

#[test]
fn every_record_is_dumped_and_damage_to_acknowledged_data_is_found() {
    let daemon = Daemon::start(Access { group: None });
    let pool = closed_with_three_writes(&daemon);
    let dump = daemon.says(&["dump", "journal", &pool, "db-1/data", "-o", "json"]);
    let records: Vec<serde_json::Value> =
        dump.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(records.len(), 3, "{dump}");
    for (number, record) in (1_u64..).zip(&records) {
        assert_eq!(record["won"], number);
        assert_eq!(record["kind"], "write");
        assert_eq!(record["startSector"], 62 + number);
        assert_eq!(record["sectors"], 1);
        assert_eq!(
            (record["right"].as_bool(), record["drained"].as_bool()),
            (Some(true), Some(false))
        );
    }
    let sound = daemon.says(&["check", &pool]);
    assert!(sound.contains("db-1/data: sound; 1 segments, 3 records, points 0 to 3"), "{sound}");

    let bytes = std::fs::read(&pool).unwrap();
    let first = bytes.windows(512).position(|part| part == [BYTES[0]; 512]).unwrap();
    let file = std::fs::File::options().write(true).open(&pool).unwrap();
    file.write_all_at(&[0], first as u64 + 100).unwrap();
    let output = daemon.vflash().args(["check", &pool]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains("the data of write 1 (sectors 63 to 63) does not match"), "{text}");
    assert!(text.contains("db-1/data: NOT sound"), "{text}");
    let dump = daemon.says(&["dump", "journal", &pool, "db-1/data"]);
    assert!(dump.lines().next().unwrap().contains("dirty DAMAGED"), "{dump}");
}

/// One copy of the pool's root is damaged: repaired from its twin, with the log in it untouched.
#[test]
fn what_can_be_repaired_is_repaired_and_the_logs_are_as_before() {
    let daemon = Daemon::start(Access { group: None });
    let pool = closed_with_three_writes(&daemon);
    let journals = |text: &str| text[text.find("db-1/data: ").unwrap()..].to_owned();
    let sound = daemon.says(&["check", &pool]);
    let file = std::fs::File::options().write(true).open(&pool).unwrap();
    let bytes = std::fs::read(&pool).unwrap();
    let check = |arguments: &[&str]| {
        let output = daemon.vflash().arg("check").args(arguments).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let mut repaired = 0;
    for offset in [64 << 10, 320 << 10, 576 << 10, 832 << 10] {
        if bytes[offset as usize..][..4096].iter().all(|byte| *byte == 0) {
            continue;
        }
        file.write_all_at(&[0xff; 4096], offset).unwrap();
        let (status, text) = check(&[&pool]);
        assert_eq!(status, 4, "{text}");
        let (status, text) = check(&[&pool, "--repair"]);
        assert_eq!(status, 1, "damage repaired: {text}");
        assert_eq!(journals(&text), journals(&sound));
        assert_eq!(check(&[&pool]).0, 0);
        repaired += 1;
    }
    assert!(repaired > 0);
    // What no twin has is not invented: a damaged log stays as it is, and is named.
    let first = bytes.windows(512).position(|part| part == [BYTES[0]; 512]).unwrap();
    file.write_all_at(&[0], first as u64 + 100).unwrap();
    let before = std::fs::read(&pool).unwrap();
    let (status, text) = check(&[&pool, "--repair"]);
    assert_eq!(status, 4, "{text}");
    assert!(std::fs::read(&pool).unwrap() == before, "untouched");
}
