//! Cached disks for tests of the daemon: manifests, backings, a guest that reads and writes.

#![allow(dead_code, reason = "each test file uses a part of it")]

use crate::vflashd::{SOON, Vflashd, eventually};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use vflash_bench::device::{Device, DeviceOptions};
use vflash_bench::queue::Kind;
use vflash_bench::runner::{Mix, Runner, Workload};

pub(crate) const MIB: u64 = 1 << 20;

/// Bytes of the disks' backings.
pub(crate) const DISK_BYTES: u64 = 24 * MIB;

/// Pool `p0` and machine `vm` with cached disks: name, further words of `cache`, backing.
pub(crate) fn manifest(daemon: &Vflashd, disks: &[(&str, &str, &str)]) -> String {
    let volumes: Vec<String> = disks
        .iter()
        .map(|(name, words, backing)| {
            format!(
                "  - name: {name}\n    cache: {{pool: p0, size: 16MiB{words}}}\n    \
                 backing: {backing}\n"
            )
        })
        .collect();
    format!(
        "apiVersion: vflash/v1\nkind: Pool\nmetadata: {{name: p0}}\n\
         spec: {{device: {}, size: 256MiB}}\n---\napiVersion: vflash/v1\n\
         kind: VirtualMachine\nmetadata: {{name: vm}}\nspec:\n  volumes:\n{}",
        daemon.path("pool").display(),
        volumes.concat()
    )
}

/// An image full of a pattern, so that nothing reads as zeros by chance.
pub(crate) fn image(path: &Path) {
    let bytes: Vec<u8> =
        (0..DISK_BYTES / 8).flat_map(|word| (word ^ 0x5a5a).to_le_bytes()).collect();
    std::fs::write(path, bytes).unwrap();
}

/// A daemon with the disk `vm/disk` on the image `disk.raw`.
pub(crate) fn started(words: &str) -> (Vflashd, String) {
    let daemon = Vflashd::start();
    let backing = daemon.path("disk.raw");
    image(&backing);
    let manifest = manifest(&daemon, &[("disk", words, backing.to_str().unwrap())]);
    daemon.apply(&manifest);
    (daemon, manifest)
}

pub(crate) fn cache(daemon: &Vflashd, volume: &str) -> Value {
    daemon.get(&format!("/v1/volumes/{volume}"))["cache"].clone()
}

/// One of its counters, since the daemon has opened it.
pub(crate) fn counter(daemon: &Vflashd, volume: &str, name: &str) -> u64 {
    let cache = cache(daemon, volume);
    let counters = cache["counters"].as_array().unwrap();
    let counter = counters.iter().find(|counter| counter["name"] == name);
    counter.expect("there is one of that name")["value"].as_u64().unwrap()
}

pub(crate) fn connect(daemon: &Vflashd, volume: &str, queues: u16, depth: u16) -> Device {
    let socket = daemon.run_dir().join(format!("{volume}.sock"));
    Device::open(DeviceOptions {
        queues,
        depth,
        data_bytes: 32 << 10,
        connect_timeout: SOON,
        ..DeviceOptions::new(&socket)
    })
    .unwrap()
}

/// A verified load of everything that a guest can ask for, on all of the disk.
pub(crate) fn load(daemon: &Vflashd, volume: &str, seed: u64) -> Runner {
    let workload = Workload {
        mix: Mix::ALL,
        block_bytes: 32 << 10,
        ragged: true,
        span_sectors: u64::MAX,
        verify: true,
        seed,
    };
    Runner::new(connect(daemon, volume, 2, 32), workload).guarded(SOON)
}

pub(crate) fn operate(runner: &mut Runner, count: u64) {
    let end = runner.operations + count;
    while runner.operations < end {
        runner.fill(Instant::now());
        if runner.reap().unwrap() == 0 {
            assert!(runner.wait(SOON).unwrap(), "no completion for {SOON:?}");
        }
    }
}

pub(crate) fn ask(device: &mut Device, kind: Kind, sector: u64, bytes: &mut [u8]) -> u8 {
    let slot = device.queues[0].take_slot().unwrap();
    let data = device.queues[0].data(slot);
    device.memory.write(data, bytes);
    device.queues[0].submit(&device.memory, slot, kind, sector, bytes.len() as u32);
    device.queues[0].publish(&device.memory);
    let status = device.await_ended(1, SOON).unwrap()[0];
    if kind == Kind::Read {
        device.memory.read(data, bytes);
    }
    status
}

pub(crate) fn write(device: &mut Device, sector: u64, byte: u8) {
    assert_eq!(ask(device, Kind::Write, sector, &mut [byte; 4096]), 0);
}

pub(crate) fn read(device: &mut Device, sector: u64) -> u8 {
    let mut bytes = [0; 4096];
    assert_eq!(ask(device, Kind::Read, sector, &mut bytes), 0);
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "one write, whole");
    bytes[0]
}

/// All that the guest sees.
pub(crate) fn contents(device: &mut Device) -> Vec<u8> {
    let mut all = vec![0; DISK_BYTES as usize];
    for (index, chunk) in all.chunks_mut(32 << 10).enumerate() {
        assert_eq!(ask(device, Kind::Read, index as u64 * 64, chunk), 0);
    }
    all
}

/// Lets the backing of `vm/disk`, whose first block is 5 in the end, come further than a copy of
/// the flash knows: the pool, and that copy.
pub(crate) fn outrun(daemon: &mut Vflashd, device: &mut Device) -> (PathBuf, PathBuf) {
    write(device, 0, 1);
    daemon.kill();
    let (pool, old) = (daemon.path("pool"), daemon.path("old"));
    std::fs::copy(&pool, &old).unwrap();
    daemon.run(&[]);
    device.reconnect().unwrap();
    for byte in 2..6 {
        write(device, 0, byte);
    }
    drain(daemon, "vm/disk");
    (pool, old)
}

/// Drains all and waits for it.
pub(crate) fn drain(daemon: &Vflashd, volume: &str) {
    let path = format!("/v1/volumes/{volume}/drain");
    let target = daemon.post(&path, &json!({}))["targetWon"].as_u64().unwrap();
    eventually("it is drained", || cache(daemon, volume)["drainedWon"].as_u64() >= Some(target));
}

pub(crate) fn same(seen: &[u8], wanted: &[u8]) {
    assert_eq!(seen.len(), wanted.len());
    let differs = seen.iter().zip(wanted).position(|(seen, wanted)| seen != wanted);
    assert_eq!(differs, None, "the first byte that differs");
}

/// All that a load asked for has ended well, and reads back as it was written.
pub(crate) fn verify(runner: &mut Runner) {
    runner.drain().unwrap();
    runner.read_back().unwrap();
    assert_eq!(runner.errors, 0);
}

/// Ends a load: what its guest sees of `volume` is in the backing `image`, byte for byte, once it
/// was drained.
pub(crate) fn finish(mut runner: Runner, daemon: &Vflashd, volume: &str, image: &Path) {
    verify(&mut runner);
    let seen = contents(&mut runner.device);
    runner.device.stop().unwrap();
    drain(daemon, volume);
    same(&std::fs::read(image).unwrap(), &seen);
}

/// How long nothing may happen where nothing must.
pub(crate) const A_WHILE: Duration = Duration::from_millis(300);

/// An NBD server, for as long as this lives.
pub(crate) struct Nbd(Child);

impl Nbd {
    /// Exports `file` at a Unix socket. `filters`: further words, filters before parameters.
    pub(crate) fn unix(socket: &Path, file: &Path, filters: &[&str]) -> Self {
        let (options, parameters): (Vec<&str>, Vec<&str>) =
            filters.iter().partition(|word| word.starts_with("--"));
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--unix"]).arg(socket).args(options);
        command.arg("file").arg(file).args(parameters);
        let server = Self(command.spawn().expect("nbdkit is installed"));
        eventually("the server listens", || {
            std::os::unix::net::UnixStream::connect(socket).is_ok()
        });
        server
    }

    /// As [`Self::unix`], by qemu-nbd: nbdkit fails an assertion now and then when a client is
    /// killed, or leaves while it is frozen.
    pub(crate) fn freezable(socket: &Path, file: &Path) -> Self {
        let mut command = Command::new("qemu-nbd");
        command.args(["--format", "raw", "--persistent", "--shared", "0", "--socket"]);
        let server = Self(command.arg(socket).arg(file).spawn().expect("qemu-nbd is installed"));
        eventually("the server listens", || {
            std::os::unix::net::UnixStream::connect(socket).is_ok()
        });
        server
    }

    /// Exports `file` at a port of this host.
    pub(crate) fn tcp(file: &Path) -> (Self, u16) {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--ipaddr", "127.0.0.1", "--port", &port.to_string()]);
        let server = Self(command.arg("file").arg(file).spawn().expect("nbdkit is installed"));
        let listens = || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
        eventually("the server listens", listens);
        (server, port)
    }

    /// It answers nothing, and keeps its connections.
    pub(crate) fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    pub(crate) fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = nix::unistd::Pid::from_raw(self.0.id() as i32);
        nix::sys::signal::kill(pid, signal).unwrap();
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A block device over a file.
pub(crate) struct Loop(String);

impl Loop {
    pub(crate) fn new(file: &Path, block_bytes: u32) -> Self {
        let mut command = Command::new("losetup");
        command.args(["--find", "--show", "--sector-size", &block_bytes.to_string()]).arg(file);
        let made = command.output().expect("losetup is installed");
        assert!(made.status.success(), "{made:?}");
        Self(String::from_utf8(made.stdout).unwrap().trim().to_owned())
    }

    pub(crate) fn path(&self) -> &str {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}
