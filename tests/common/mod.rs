//! A daemon in this process: a pool in a file, its volumes served, and front ends for them.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use vflash::base::units::MIB;
use vflash::flash::{
    AllocationId, Class, FormatOptions, FullPolicy, Keeper, NewAllocation, Pool, VolumeOptions,
};
use vflash::io::disk::DiskTarget;
use vflash::io::file::{FileDisk, Preallocation};
use vflash::metrics::VolumeMetrics;
use vflash::qos::Limits;
use vflash::vhost::{Export, ExportEvent, ExportId, NewDoor, Server, ServerOptions};
use vflash_bench::device::{Device, DeviceOptions};
use vflash_bench::runner::{Mix, Runner, Workload};

pub(crate) struct Daemon {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) server: Server,
    pub(crate) keeper: Keeper,
    pub(crate) target: DiskTarget,
}

pub(crate) struct Served {
    pub(crate) id: ExportId,
    pub(crate) allocation: AllocationId,
    pub(crate) socket: PathBuf,
    pub(crate) events: Receiver<ExportEvent>,
    pub(crate) metrics: Arc<VolumeMetrics>,
}

impl Daemon {
    pub(crate) fn start(reactors: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let disk =
            FileDisk::create(&folder.path().join("pool"), 128 * MIB, Preallocation::Reserved)
                .unwrap();
        let target = disk.target();
        let options = FormatOptions {
            name: "test".into(),
            overwrite: false,
            zeroed: true,
            uuid: None,
            log_bytes: None,
        };
        let pool = Pool::format_with(Box::new(disk), options).unwrap();
        let keeper = Keeper::start(pool, Default::default()).unwrap();
        let server = Server::start(&ServerOptions { reactors, cpus: vec![] }).unwrap();
        Self { folder, server, keeper, target }
    }

    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.sock"))
    }

    /// Makes a volume of `size_bytes` and serves it.
    pub(crate) fn serve(&self, name: &str, size_bytes: u64, thin: bool) -> Served {
        self.serve_as(name, size_bytes, thin, |_| ())
    }

    pub(crate) fn serve_limited(
        &self,
        name: &str,
        size_bytes: u64,
        thin: bool,
        limits: Limits,
    ) -> Served {
        self.serve_as(name, size_bytes, thin, |door| door.limits = limits)
    }

    /// A volume whose front ends' memory is pinned.
    pub(crate) fn serve_pinning(&self, name: &str, size_bytes: u64) -> Served {
        self.serve_as(name, size_bytes, false, |door| door.pin_memory = true)
    }

    fn serve_as(
        &self,
        name: &str,
        size_bytes: u64,
        thin: bool,
        change: impl FnOnce(&mut NewDoor),
    ) -> Served {
        let new = NewAllocation {
            name: format!("vm/{name}"),
            size_bytes,
            thin,
            class: Class::Nonvolatile,
            attributes: vec![],
        };
        let allocation = self.keeper.call(move |pool| pool.create(new)).unwrap().unwrap();
        let place: Arc<OnceLock<(Server, ExportId)>> = Arc::default();
        let notified = place.clone();
        let options = VolumeOptions {
            notify: Arc::new(move |message| {
                let (server, id) = notified.get().expect("served before the first request");
                server.message(*id, message).unwrap();
            }),
            full: FullPolicy::Wait,
            geometry: self.target.geometry(),
            counters: Arc::default(),
        };
        let volume = self.keeper.volume(allocation, options).unwrap();
        let (sender, events) = channel();
        let metrics = Arc::new(VolumeMetrics::new());
        let mut export = export(&self.socket(name), size_bytes / 512, Box::new(volume));
        export.disks = vec![self.target.clone()];
        export.door.metrics = metrics.clone();
        export.door.events = Arc::new(move |event| _ = sender.send(event));
        change(&mut export.door);
        let id = self.server.add(export).unwrap();
        let _ = place.set((self.server.clone(), id));
        Served { id, allocation, socket: self.socket(name), events, metrics }
    }
}

/// An export of any volume, with nothing special about it.
pub(crate) fn export(
    socket: &Path,
    capacity_sectors: u64,
    volume: Box<dyn vflash::io::volume::Volume>,
) -> Export {
    let target = DiskTarget::Null { size_bytes: capacity_sectors * 512 };
    vflash_bench::serve::export(socket, target, volume)
}

/// A front end with `queues` queues of `depth`.
pub(crate) fn connect(socket: &Path, queues: u16, depth: u16) -> Device {
    Device::open(DeviceOptions {
        queues,
        depth,
        data_bytes: 32 << 10,
        connect_timeout: Duration::from_secs(10),
        ..DeviceOptions::new(socket)
    })
    .unwrap()
}

/// A verified load of everything a guest can ask for.
pub(crate) fn workload(seed: u64) -> Workload {
    Workload {
        mix: Mix::ALL,
        block_bytes: 32 << 10,
        ragged: true,
        span_sectors: u64::MAX,
        verify: true,
        seed,
    }
}

/// Runs `count` more operations.
pub(crate) fn operate(runner: &mut Runner, count: u64) {
    let end = runner.operations + count;
    while runner.operations < end {
        runner.fill(std::time::Instant::now());
        if runner.reap().unwrap() == 0 {
            assert!(runner.wait(Duration::from_secs(30)).unwrap(), "no completion for 30 s");
        }
    }
}
