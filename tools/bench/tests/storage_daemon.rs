//! The client with a back end that has been in use for years: qemu-storage-daemon.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use vflash_bench::device::DeviceOptions;
use vflash_bench::load::{LoadOptions, run};
use vflash_bench::queue::Waiting;
use vflash_bench::runner::{Mix, Workload};

struct StorageDaemon(Child);

impl StorageDaemon {
    fn start(folder: &Path) -> Self {
        let file = std::fs::File::create(folder.join("disk")).unwrap();
        file.set_len(16 << 20).unwrap();
        let child = Command::new("qemu-storage-daemon")
            .current_dir(folder)
            .args(["--blockdev", "driver=file,node-name=disk,filename=disk,discard=unmap"])
            .args([
                "--export",
                "type=vhost-user-blk,id=e,node-name=disk,writable=on,num-queues=2,\
                                addr.type=unix,addr.path=q.sock",
            ])
            .stdin(Stdio::null())
            .spawn();
        Self(child.expect("qemu-storage-daemon (Debian package qemu-system-common) starts"))
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn all_that_a_driver_may_choose_works_with_qemu_storage_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = StorageDaemon::start(folder.path());
    let base = DeviceOptions {
        queues: 2,
        data_bytes: 16 << 10,
        ..DeviceOptions::new(&folder.path().join("q.sock"))
    };
    for device in [
        base.clone(),
        DeviceOptions { indirect: true, memory_slots: true, depth: 128, ..base.clone() },
        DeviceOptions { event_index: false, ..base.clone() },
        DeviceOptions { waiting: Waiting::Poll, indirect: true, ..base },
    ] {
        let report = run(&LoadOptions {
            device: device.clone(),
            workload: Workload {
                mix: Mix::ALL,
                block_bytes: 16 << 10,
                ragged: true,
                span_sectors: u64::MAX,
                verify: true,
                seed: 3,
            },
            ramp: Duration::ZERO,
            runtime: Duration::from_secs(60),
            operations_max: Some(3000),
            rate: None,
            commit_writes: None,
            first_sector: 0,
            server_pid: Some(daemon.0.id()),
        });
        let report = report.unwrap_or_else(|error| panic!("{device:?}: {error}"));
        assert_eq!(report.errors, 0, "{device:?}");
        assert!(report.operations >= 3000 && report.verified_sectors > 10_000, "{report:?}");
    }
}
