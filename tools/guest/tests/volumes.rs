//! What a guest sees of its volumes, and does with them, under a stock kernel and QEMU.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;
use vflash_guest::daemon::Daemon;
use vflash_guest::guest::{Guest, GuestConfig};
use vflash_guest::process::{output, until};
use vflash_guest::reply::Reply;

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

/// A daemon with one pool, and what removes their files at the end.
struct Host {
    daemon: Daemon,
    _data: TempDir,
    _run: TempDir,
}

impl Host {
    /// Serves these volumes of the machine `vm`.
    fn with(volumes: &[&str]) -> Self {
        build_programs();
        let data = tempfile::tempdir().unwrap();
        let run = tempfile::tempdir().unwrap();
        let manifest = data.path().join("vm.yaml");
        let head = "apiVersion: vflash/v1\nkind: Pool\nmetadata: {name: pool}\n\
                    spec: {device: vm.pool, size: 1GiB}\n---\n\
                    apiVersion: vflash/v1\nkind: VirtualMachine\nmetadata: {name: vm}\n\
                    spec:\n  volumes:\n";
        let lines: String = volumes.iter().map(|volume| format!("  - {{{volume}}}\n")).collect();
        std::fs::write(&manifest, format!("{head}{lines}")).unwrap();
        let daemon = Daemon::start(run.path()).unwrap();
        daemon.vflash(&["apply", "-f", manifest.to_str().unwrap()]).unwrap();
        Self { daemon, _data: data, _run: run }
    }

    /// Boots a guest with these volumes as its disks.
    fn guest(&self, volumes: &[&str]) -> Guest {
        let disks = volumes.iter().map(|name| self.daemon.socket(&format!("vm/{name}"))).collect();
        Guest::boot(&GuestConfig { disks, spare_ports: 1, ..GuestConfig::default() }).unwrap()
    }
}

/// Programs of other packages are not built by running this package's tests.
fn build_programs() {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--workspace", "--bins"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    output(&mut command).unwrap();
}

fn ask(guest: &mut Guest, command: &str) -> Reply {
    guest.command(command, LIMIT).unwrap()
}

fn number(guest: &mut Guest, command: &str, key: &str) -> u64 {
    ask(guest, command).number(key).unwrap()
}

/// Waits until the load has come to `requests`.
fn wait_for_requests(guest: &mut Guest, requests: u64) {
    until(LIMIT, || {
        Ok((guest.command("load-status", LIMIT)?.number("requests")? >= requests).then_some(()))
    })
    .unwrap();
}

#[test]
fn a_guest_takes_a_volume_for_flash() {
    let host = Host::with(&[
        "name: kept, flash: {pool: pool, size: 64MiB}",
        "name: swap, flash: {pool: pool, size: 32MiB, class: volatile}",
    ]);
    let mut guest = host.guest(&["kept", "swap"]);
    let kept = ask(&mut guest, "info vda");
    assert_eq!(kept.number("size").unwrap(), 64 * MIB);
    assert!(kept.text("serial").unwrap().starts_with("vflash-nv-"), "{}", kept.line());
    assert_eq!(kept.number("queues").unwrap(), 2, "one for each virtual CPU");
    assert_eq!(kept.text("cache").unwrap(), "write_back");
    assert_eq!(kept.text("read_only").unwrap(), "0");
    for key in ["discard_max", "write_zeroes_max"] {
        assert!(kept.number(key).unwrap() >= MIB, "{}", kept.line());
    }
    let swap = ask(&mut guest, "info vdb");
    assert!(swap.text("serial").unwrap().starts_with("vflash-vo-"), "{}", swap.line());

    // Without the rule Linux takes any virtio disk for a rotating one.
    assert_eq!(kept.text("rotational").unwrap(), "1");
    ask(&mut guest, "udev");
    for disk in ["vda", "vdb"] {
        assert_eq!(number(&mut guest, &format!("info {disk}"), "rotational"), 0, "{disk}");
    }
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros_and_nothing_else_does() {
    let host = Host::with(&[
        "name: thick, flash: {pool: pool, size: 32MiB}",
        "name: thin, flash: {pool: pool, size: 32MiB, thin: true}",
    ]);
    let mut guest = host.guest(&["thick", "thin"]);
    for disk in ["vda", "vdb"] {
        ask(&mut guest, &format!("fill {disk} offset=0 bytes={} run=1", 16 * MIB));
        ask(&mut guest, &format!("discard {disk} offset={} bytes={}", 2 * MIB, 4 * MIB));
        ask(&mut guest, &format!("write-zeroes {disk} offset={} bytes={}", 8 * MIB, 65536));
        let zeros = [(2 * MIB, 4 * MIB), (8 * MIB, 65536), (16 * MIB, 16 * MIB)];
        for (offset, bytes) in zeros {
            let range = format!("zeros {disk} offset={offset} bytes={bytes}");
            assert_eq!(number(&mut guest, &range, "nonzero"), 0, "{range}");
        }
        let kept = [(0, 2 * MIB), (6 * MIB, 2 * MIB), (8 * MIB + 65536, 8 * MIB - 65536)];
        for (offset, bytes) in kept {
            let range = format!("check {disk} offset={offset} bytes={bytes} run=1");
            assert_eq!(number(&mut guest, &range, "wrong"), 0, "{range}");
        }
    }
    assert_eq!(number(&mut guest, "errors", "count"), 0);
}

#[test]
fn a_thin_volume_gives_back_what_the_guest_trims() {
    let host = Host::with(&["name: thin, flash: {pool: pool, size: 256MiB, thin: true}"]);
    let mut guest = host.guest(&["thin"]);
    let mapped = || {
        let volume = host.daemon.query(&["describe", "vm/thin"]).unwrap();
        volume["mappedBytes"].as_u64().unwrap_or_else(|| panic!("{volume}"))
    };
    assert_eq!(mapped(), 0);
    ask(&mut guest, "mkfs vda");
    ask(&mut guest, "mount vda");
    ask(&mut guest, &format!("fill /mnt/data offset=0 bytes={} run=1", 32 * MIB));
    // What is told of a pool may lag a little behind what happened in it.
    until(LIMIT, || Ok((mapped() >= 32 * MIB).then_some(()))).unwrap();
    let full = mapped();
    ask(&mut guest, "remove /mnt/data");
    ask(&mut guest, "trim /mnt");
    // `full` may have been told while the file was still growing: half of it is beyond doubt.
    until(LIMIT, || Ok((mapped() <= full - 16 * MIB).then_some(()))).unwrap();
    ask(&mut guest, "umount /mnt");
    ask(&mut guest, "fsck vda");
}

#[test]
fn a_running_guest_sees_its_disk_grow_and_shrink() {
    let host = Host::with(&["name: disk, flash: {pool: pool, size: 64MiB}"]);
    let mut guest = host.guest(&["disk"]);
    ask(&mut guest, &format!("load-start vda bytes={} depth=16 block=4096 run=1", 16 * MIB));
    for (size, arguments) in [
        (160, &["resize", "vm/disk", "160MiB"][..]),
        (32, &["resize", "vm/disk", "32MiB", "--yes"][..]),
    ] {
        host.daemon.vflash(arguments).unwrap();
        until(LIMIT, || {
            let seen = guest.command("info vda", LIMIT)?.number("size")?;
            Ok((seen == size * MIB).then_some(()))
        })
        .unwrap();
        let end = format!("vda offset={} bytes={MIB} run=2", (size - 1) * MIB);
        ask(&mut guest, &format!("fill {end}"));
        assert_eq!(number(&mut guest, &format!("check {end}"), "wrong"), 0);
    }
    let load = ask(&mut guest, "load-stop");
    assert_eq!((load.number("errors").unwrap(), load.number("lost").unwrap()), (0, 0));
}

#[test]
fn a_volume_is_plugged_into_a_running_guest_and_out_again() {
    let host = Host::with(&[
        "name: first, flash: {pool: pool, size: 32MiB}",
        "name: later, flash: {pool: pool, size: 48MiB}",
    ]);
    let mut guest = host.guest(&["first"]);
    let monitor = guest.free_monitor();
    let plug = |verb: &str| {
        let socket: &Path = &monitor;
        host.daemon.vflash(&[verb, "vm/later", "--qmp", socket.to_str().unwrap()]).unwrap();
    };
    for run in 1..=2 {
        plug("attach");
        let seen = until(LIMIT, || Ok(guest.command("info vdb", LIMIT).ok())).unwrap();
        assert_eq!(seen.number("size").unwrap(), 48 * MIB);
        if run == 2 {
            let kept = format!("check vdb offset=0 bytes={MIB} run=1");
            assert_eq!(number(&mut guest, &kept, "wrong"), 0, "the first time's data");
        }
        let range = format!("vdb offset=0 bytes={MIB} run={run}");
        ask(&mut guest, &format!("fill {range}"));
        assert_eq!(number(&mut guest, &format!("check {range}"), "wrong"), 0);
        plug("detach");
        until(LIMIT, || Ok(guest.command("info vdb", LIMIT).is_err().then_some(()))).unwrap();
        let volume = host.daemon.query(&["describe", "vm/later"]).unwrap();
        assert_eq!(volume["attached"], false, "{volume}");
    }
}

#[test]
fn a_reset_under_load_leaves_a_working_disk_with_its_data() {
    let host = Host::with(&["name: disk, flash: {pool: pool, size: 64MiB}"]);
    let mut guest = host.guest(&["disk"]);
    let kept = format!("vda offset={} bytes={} run=1", 32 * MIB, 8 * MIB);
    ask(&mut guest, &format!("fill {kept}"));
    for _ in 0..2 {
        let load = format!("load-start vda bytes={} depth=32 block=4096 run=2", 16 * MIB);
        ask(&mut guest, &load);
        wait_for_requests(&mut guest, 500);
        guest.reset().unwrap();
        assert_eq!(number(&mut guest, &format!("check {kept}"), "wrong"), 0);
    }
    assert_eq!(number(&mut guest, "errors", "count"), 0);
}

#[test]
fn a_read_only_volume_is_read_only() {
    let host = Host::with(&["name: disk, flash: {pool: pool, size: 32MiB}, readOnly: true"]);
    let mut guest = host.guest(&["disk"]);
    assert_eq!(number(&mut guest, "info vda", "read_only"), 1);
    assert_eq!(number(&mut guest, "zeros vda offset=0 bytes=1048576", "nonzero"), 0);
    let refused = guest.command("fill vda offset=0 bytes=65536 run=1", LIMIT);
    assert!(refused.is_err(), "a write went through");
}

#[test]
fn a_guest_swaps_to_a_volatile_volume() {
    let host = Host::with(&["name: swap, flash: {pool: pool, size: 256MiB, class: volatile}"]);
    let mut guest = host.guest(&["swap"]);
    let swap = ask(&mut guest, &format!("swap vda bytes={}", 280 * MIB));
    assert_eq!(swap.number("wrong").unwrap(), 0);
    assert!(swap.number("swapped_kib").unwrap() > 64 << 10, "{}", swap.line());
}

#[test]
fn a_guest_turns_its_write_cache_off_and_the_daemon_remembers() {
    let mut host = Host::with(&["name: disk, flash: {pool: pool, size: 64MiB}"]);
    let mut guest = host.guest(&["disk"]);
    let write_cache = |daemon: &Daemon| {
        let volume = daemon.query(&["describe", "vm/disk"]).unwrap();
        volume["writeCache"].as_bool().unwrap_or_else(|| panic!("{volume}"))
    };
    assert!(write_cache(&host.daemon));
    ask(&mut guest, "write-cache vda mode=off");
    assert_eq!(ask(&mut guest, "info vda").text("cache").unwrap(), "write_through");
    assert!(!write_cache(&host.daemon));
    host.daemon.crash_and_restart().unwrap();
    ask(&mut guest, "fill vda offset=0 bytes=1048576 run=1");
    assert!(!write_cache(&host.daemon));
    assert_eq!(number(&mut guest, "check vda offset=0 bytes=1048576 run=1", "wrong"), 0);
}

#[test]
fn a_guest_migrates_with_requests_under_way() {
    // Two volumes of equal content stand for storage that both hosts reach.
    let host = Host::with(&[
        "name: here, flash: {pool: pool, size: 32MiB}",
        "name: there, flash: {pool: pool, size: 32MiB}",
    ]);
    let range = format!("offset=0 bytes={} run=1", 16 * MIB);
    let mut first = host.guest(&["there"]);
    ask(&mut first, &format!("fill vda {range}"));
    drop(first);
    let mut source = host.guest(&["here"]);
    ask(&mut source, &format!("fill vda {range}"));
    ask(&mut source, &format!("hold-start vda depth=8 bytes={} run=1", 16 * MIB));
    let disks = vec![host.daemon.socket("vm/there")];
    let config = GuestConfig { disks, incoming: true, spare_ports: 1, ..GuestConfig::default() };
    let mut target = Guest::boot(&config).unwrap();
    source.migrate_to(&target).unwrap();
    drop(source);
    let before = number(&mut target, "hold-status", "reads");
    until(LIMIT, || {
        let reads = target.command("hold-status", LIMIT)?.number("reads")?;
        Ok((reads > before + 500).then_some(()))
    })
    .unwrap();
    let end = ask(&mut target, "hold-stop");
    assert_eq!((end.number("wrong").unwrap(), end.number("errors").unwrap()), (0, 0));
    assert_eq!(number(&mut target, "errors", "count"), 0);
}

#[test]
fn a_guest_switches_the_write_cache_of_a_cached_disk_under_load() {
    let backing = tempfile::tempdir().unwrap();
    let image = backing.path().join("disk.raw");
    std::fs::File::create(&image).unwrap().set_len(64 * MIB).unwrap();
    let volume = format!(
        "name: disk, cache: {{pool: pool, size: 32MiB, durability: flush}}, backing: {}",
        image.display()
    );
    let mut host = Host::with(&[&volume]);
    let mut guest = host.guest(&["disk"]);
    let bytes = 4 * MIB;
    for (run, mode) in (1..).zip(["off", "on", "off"]) {
        ask(&mut guest, &format!("write-cache vda mode={mode}"));
        let cache = if mode == "off" { "write_through" } else { "write_back" };
        assert_eq!(ask(&mut guest, "info vda").text("cache").unwrap(), cache);
        ask(&mut guest, &format!("fill vda offset=0 bytes={bytes} run={run}"));
        host.daemon.crash_and_restart().unwrap();
        let check = format!("check vda offset=0 bytes={bytes} run={run}");
        assert_eq!(number(&mut guest, &check, "wrong"), 0, "{mode}");
    }
    drop(guest);
    host.daemon.vflash(&["drain", "vm/disk", "--wait"]).unwrap();
    assert!(std::fs::read(&image).unwrap()[..bytes as usize].iter().any(|byte| *byte != 0));
}
