//! The servers that are compared, and one measurement of one of them.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use serde_json::Value;

use super::cells::{Cell, Medium, Peer, Sample};
use super::goals::Idle;
use super::pages::Pages;
use super::place::Place;
use super::servers::{
    Server, client, fio, start_storage_daemon, start_vflashd, text, vflash, volume_socket,
};
use crate::scratch::Scratch;

const FILE_BYTES: u64 = 4 << 30;
const IDLE_DEVICES: usize = 100;

/// All servers of a benchmark; while one is measured the others are idle.
pub(crate) struct Peers {
    /// What of the pool's file is the volume's; fio and qemu-storage-daemon use the same.
    place: Place,
    data: PathBuf,
    run: PathBuf,
    pages: Pages,
    /// The manifest says that guest memory is pinned.
    pinned: std::cell::Cell<bool>,
    file: Server,
    null: Server,
    vflashd: Server,
}

impl Peers {
    /// Makes the files, starts the servers, and writes every block once.
    pub(crate) fn start(scratch: &Scratch, pages: Pages) -> Result<Self> {
        crate::packages::need(crate::packages::PEERS)?;
        let cores = std::thread::available_parallelism()?.get();
        ensure!(cores >= 2, "this takes two cores, one for the server and one for the client");
        eprintln!("building");
        crate::cargo::build_release()?;
        eprintln!("writing a file of 4 GiB");
        let (data, run) = (scratch.data.path().to_owned(), scratch.run.path().to_owned());
        let vflashd = start(&data, &run)?;
        client(&["fill", "--socket", &text(&volume_socket(&run, "bench/file"))])?;
        vflashd.stop()?;
        let pool = data.join("pool.img");
        let place = Place::of(&pool, "bench/file")?;
        let vflashd = start(&data, &run)?;
        // vflashd holds the lock. Both read and write the volume's bytes alone.
        let file = format!(
            "driver=file,filename={},locking=off,aio=io_uring,cache.direct=on",
            text(&pool)
        );
        let null = format!("driver=null-co,size={FILE_BYTES},read-zeroes=off");
        let file = start_storage_daemon(&run.join("qsd-file.sock"), &file)?;
        let null = start_storage_daemon(&run.join("qsd-null.sock"), &null)?;
        let pinned = false.into();
        Ok(Self { place, data, run, pages, pinned, file, null, vflashd })
    }

    fn socket(&self, peer: Peer, medium: Medium) -> PathBuf {
        let name = if medium == Medium::Null { "null" } else { "file" };
        match peer {
            Peer::Vflash | Peer::Pinned => volume_socket(&self.run, &format!("bench/{name}")),
            _ => self.run.join(format!("qsd-{name}.sock")),
        }
    }

    fn pid(&self, peer: Peer, medium: Medium) -> u32 {
        match (peer, medium) {
            (Peer::Vflash | Peer::Pinned, _) => self.vflashd.0.id(),
            (_, Medium::File) => self.file.0.id(),
            (_, Medium::Null) => self.null.0.id(),
        }
    }

    /// The processes of all servers.
    pub(crate) fn servers(&self) -> [u32; 3] {
        [&self.file, &self.null, &self.vflashd].map(|server| server.0.id())
    }

    pub(crate) fn measure(&self, cell: &Cell, peer: Peer, seconds: f64) -> Result<Sample> {
        if peer == Peer::Raw {
            return self.measure_raw(cell, seconds);
        }
        if peer != Peer::Qsd {
            self.pin(peer == Peer::Pinned)?;
        }
        let socket = text(&self.socket(peer, cell.medium));
        let pid = self.pid(peer, cell.medium).to_string();
        let (queues, depth) = (cell.queues.to_string(), cell.depth.to_string());
        let (block, runtime) = (format!("{}KiB", cell.block_kib), seconds.to_string());
        let mut arguments = vec!["load", "--socket", &socket, "--server-pid", &pid];
        arguments.extend(["--rw", cell.pattern, "--queues", &queues, "--depth", &depth]);
        arguments.extend(["--block-size", &block, "--runtime", &runtime]);
        let (start, span) = (self.place.offset.to_string(), self.place.bytes.to_string());
        if peer == Peer::Qsd && cell.medium == Medium::File {
            arguments.extend(["--start", &start, "--span", &span]);
        }
        if cell.poll {
            arguments.push("--poll");
        }
        if self.pages == Pages::Huge {
            arguments.push("--hugetlb");
        }
        let report = client(&arguments)?;
        let number = |name: &str| report[name].as_f64().unwrap_or(f64::NAN);
        let errors = number("errors");
        ensure!(errors == 0.0, "{}, {}: {errors} errors", cell.name(), peer.name());
        Ok(Sample {
            iops: number("iops"),
            megabytes_per_second: number("megabytes_per_second"),
            p50: number("latency_p50_us"),
            p99: number("latency_p99_us"),
            cpu: number("server_cpu_us"),
            hung: number("guards") != 0.0,
        })
    }

    /// Has guests' memory pinned from now on, or not.
    fn pin(&self, pinned: bool) -> Result<()> {
        if self.pinned.replace(pinned) != pinned {
            let manifest = write_manifest(&self.data, pinned)?;
            vflash(&self.run, &["apply", "-f", &text(&manifest)])?;
        }
        Ok(())
    }

    fn measure_raw(&self, cell: &Cell, seconds: f64) -> Result<Sample> {
        // The latency counts from submission, as the client's does.
        let report = fio(
            &self.place,
            cell.pattern,
            self.pages,
            &[
                "--lat_percentiles=1",
                "--clat_percentiles=0",
                "--randrepeat=0",
                "--norandommap",
                &format!("--bs={}k", cell.block_kib),
                &format!("--iodepth={}", cell.depth),
                &format!("--numjobs={}", cell.queues),
                "--group_reporting",
                "--time_based",
                "--ramp_time=500ms",
                // fio takes whole numbers only.
                &format!("--runtime={:.0}ms", seconds * 1e3),
            ],
        )?;
        let job = &report["jobs"][0];
        let side = &job[if cell.is_write() { "write" } else { "read" }];
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        let percentile = |share: &str| number(&side["lat_ns"]["percentile"][share]) / 1e3;
        let iops = number(&side["iops"]);
        // With group reporting fio gives the mean share of a core per job.
        let share = (number(&job["usr_cpu"]) + number(&job["sys_cpu"])) / 100.0;
        Ok(Sample {
            iops,
            megabytes_per_second: number(&side["bw_bytes"]) / 1e6,
            p50: percentile("50.000000"),
            p99: percentile("99.000000"),
            cpu: share * f64::from(cell.queues) * 1e6 / iops,
            hung: false,
        })
    }

    /// vflashd while 100 front ends are connected and do nothing.
    pub(crate) fn idle(&self, seconds: f64) -> Result<Idle> {
        let pid = self.vflashd.0.id().to_string();
        let runtime = seconds.to_string();
        let sockets: Vec<String> = (0..IDLE_DEVICES)
            .map(|index| text(&volume_socket(&self.run, &format!("idle/v{index}"))))
            .collect();
        let mut arguments = vec!["idle", "--server-pid", &pid, "--runtime", &runtime];
        arguments.extend(sockets.iter().map(String::as_str));
        let report = client(&arguments)?;
        let number = |name: &str| report[name].as_f64().unwrap_or(f64::NAN);
        ensure!(number("devices") == IDLE_DEVICES as f64, "not all front ends connected");
        Ok(Idle {
            cpu_share: number("server_cpu_share"),
            resident_bytes: number("server_resident_bytes"),
        })
    }
}

/// With the volumes of [`manifest_for`].
fn start(data: &Path, run: &Path) -> Result<Server> {
    let manifest = write_manifest(data, false)?;
    let last = format!("idle/v{}", IDLE_DEVICES - 1);
    start_vflashd(run, &manifest, &["bench/file", "bench/null", &last])
}

fn write_manifest(data: &Path, pinned: bool) -> Result<PathBuf> {
    let manifest = data.join("bench.yaml");
    std::fs::write(&manifest, manifest_for(&data.join("pool.img"), pinned))?;
    Ok(manifest)
}

/// One volume on a file, one on nothing, and a hundred that stay idle.
fn manifest_for(pool: &Path, pinned: bool) -> String {
    let mut yaml = format!(
        "apiVersion: vflash/v1\nkind: Pool\nmetadata: {{name: drive}}\n\
         spec: {{device: {}, size: 4352MiB}}\n---\n\
         apiVersion: vflash/v1\nkind: Pool\nmetadata: {{name: none}}\n\
         spec: {{device: \"null:8GiB\"}}\n---\n\
         apiVersion: vflash/v1\nkind: VirtualMachine\nmetadata: {{name: bench}}\n\
         spec:\n  volumes:\n  - name: file\n    flash: {{pool: drive, size: 4GiB}}\n    \
         pinMemory: {pinned}\n  - name: \"null\"\n    flash: {{pool: none, size: 4GiB}}\n---\n\
         apiVersion: vflash/v1\nkind: VirtualMachine\nmetadata: {{name: idle}}\n\
         spec:\n  volumes:\n",
        text(pool)
    );
    for index in 0..IDLE_DEVICES {
        yaml += &format!("  - name: v{index}\n    flash: {{pool: none, size: 8MiB}}\n");
    }
    yaml
}
