//! The harness against an independent back-end, QEMU's own: it sees what it must see, and its
//! checks fail when the data is wrong.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use vflash_guest::guest::{Guest, GuestConfig};
use vflash_guest::process::until;
use vflash_guest::storage_daemon::StorageDaemon;

const LIMIT: Duration = Duration::from_secs(60);
const DISK_BYTES: u64 = 64 << 20;

/// A guest on a disk of qemu-storage-daemon.
struct Rig {
    guest: Guest,
    file: File,
    _daemon: StorageDaemon,
    _directory: tempfile::TempDir,
}

impl Rig {
    fn boot() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let file = File::create(&path).unwrap();
        file.set_len(DISK_BYTES).unwrap();
        let daemon = StorageDaemon::start(directory.path(), &path).unwrap();
        let config = GuestConfig { disks: vec![daemon.socket()], ..GuestConfig::default() };
        let guest = Guest::boot(&config).unwrap();
        Self { guest, file, _daemon: daemon, _directory: directory }
    }
}

#[test]
fn the_agent_finds_good_data_good_and_bad_data_bad() {
    let mut rig = Rig::boot();
    let Rig { guest, file, .. } = &mut rig;
    let mut ask = |command: &str| guest.command(command, LIMIT).unwrap();

    assert_eq!(ask("info vda").number("size").unwrap(), DISK_BYTES);
    ask("fill vda offset=0 bytes=1048576 run=1");
    let mut wrong = |run: u64| {
        let check = format!("check vda offset=0 bytes=1048576 run={run}");
        ask(&check).number("wrong").unwrap()
    };
    assert_eq!(wrong(1), 0);
    assert_eq!(wrong(2), 16, "every request of another run is wrong");
    file.write_all_at(b"rot", 300_000).unwrap();
    assert_eq!(wrong(1), 1, "rot in one request");
}

#[test]
fn a_load_counts_what_the_disk_lost() {
    let mut rig = Rig::boot();
    let Rig { guest, file, .. } = &mut rig;
    let bytes = 4 << 20;
    let start = format!("load-start vda bytes={bytes} depth=16 block=4096 run=5");
    guest.command(&start, LIMIT).unwrap();
    until(LIMIT, || {
        let status = guest.command("load-status", LIMIT)?;
        Ok((status.number("writes")? > 2_000).then_some(()))
    })
    .unwrap();
    // Behind the disk's back every block becomes zeros.
    file.write_all_at(&vec![0; bytes], 0).unwrap();
    let end = guest.command("load-stop", LIMIT).unwrap();
    eprintln!("{}", end.line());
    assert_eq!(end.number("errors").unwrap(), 0);
    assert!(end.number("lost").unwrap() > 100, "{}", end.line());
    assert!(end.text("first").unwrap().contains("zeros"), "{}", end.line());
}
