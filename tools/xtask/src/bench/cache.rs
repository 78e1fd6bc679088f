//! `cargo xtask bench cache`: what a write costs through the cache, beside the flash itself and
//! beside nbdkit's cache filter over the same slow backing.
//!
//! The backing is an NBD export whose every read and write takes 5 ms longer. Before each
//! measurement of ours the cache is drained, so that each begins alike; it drains while it is
//! measured, on the server's core and drive, and once more with a backing that hangs, so that what
//! draining takes of both is seen.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::cells::median;
use super::pages::{HugePages, Pages};
use super::place::Place;
use super::servers::{
    Server, client, create_written_pool, fio, spawn, start_storage_daemon, start_vflashd, text,
    vflash, volume_socket, wait_for,
};
use crate::scratch::Scratch;

const VOLUME: &str = "bench/disk";
/// A flash volume beside it, whose place in the pool fio uses: another file may lie where the drive
/// is twice as fast or half.
const RAW: &str = "bench/raw";
const DISK_BYTES: u64 = 2 << 30;
const DELAY: &str = "5ms";

/// `durability:` of the cache.
const DURABLE: &str = "strong";
const VOLATILE: &str = "flush";

/// Requests that the delayed exports serve at a time: what a shared storage of such latency does.
/// With nbdkit's own 16 these would be the bound of every drain: 16 in 5 ms.
const THREADS: &str = "64";

/// Bytes that one measurement writes at most: the log holds them, whatever the backing does.
const LOAD_BYTES_MAX: u64 = 2 << 30;

/// Random blocks of 4 KiB that make a gigabyte of dirty data.
const DIRTY_BLOCKS: u64 = (1 << 30) / 4096;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Peer {
    /// fio on the same drive, each write durable when it ends (`O_DSYNC`).
    RawDurable,
    /// fio on the same drive, with its volatile cache.
    Raw,
    Vflash,
    /// The same while nothing can be drained.
    Undrained,
    /// `durability: flush`: a write is durable when the guest has flushed, as one of [`Peer::Raw`].
    Volatile,
    /// nbdkit's cache filter (`cache=writeback`) behind qemu-storage-daemon's vhost-user-blk.
    Filter,
}

impl Peer {
    const ALL: [Self; 6] =
        [Self::RawDurable, Self::Raw, Self::Vflash, Self::Undrained, Self::Volatile, Self::Filter];

    fn name(self) -> &'static str {
        match self {
            Self::RawDurable => "raw flash, durable writes (fio)",
            Self::Raw => "raw flash, volatile writes (fio)",
            Self::Vflash => "vflash cache",
            Self::Undrained => "vflash cache, its backing hanging",
            Self::Volatile => "vflash cache, durability: flush",
            Self::Filter => "nbdkit cache filter",
        }
    }
}

struct Cell {
    name: &'static str,
    pattern: &'static str,
    block_kib: u32,
    depth: u32,
    /// Writes of a commit, a flush after each.
    commit: Option<u32>,
}

const CELLS: [Cell; 4] = [
    Cell { name: "randwrite-4k-qd1", pattern: "randwrite", block_kib: 4, depth: 1, commit: None },
    Cell { name: "randwrite-4k-qd32", pattern: "randwrite", block_kib: 4, depth: 32, commit: None },
    Cell { name: "write-128k-qd32", pattern: "write", block_kib: 128, depth: 32, commit: None },
    Cell { name: "commit-3x4k", pattern: "randwrite", block_kib: 4, depth: 3, commit: Some(3) },
];

/// One measurement; latencies in µs.
#[derive(Clone, Copy, Default)]
struct Sample {
    /// Writes per second, or commits.
    rate: f64,
    p50: f64,
    p99: f64,
}

/// The servers, and where they are.
struct Rig {
    scratch: Scratch,
    pages: Pages,
    /// Of the pool's file, beside the cache: what fio uses.
    flash: Place,
    run: PathBuf,
    manifest: PathBuf,
    backing_socket: PathBuf,
    plain_socket: PathBuf,
    /// Serves our backing.
    backing: Server,
    vflashd: Option<Server>,
    _others: Vec<Server>,
}

/// Measures and prints markdown.
pub(super) fn run(rounds: u32, seconds: f64) -> Result<String> {
    let huge = HugePages::reserve();
    let mut rig = Rig::start(huge.pages)?;
    let mut samples = vec![Vec::new(); CELLS.len() * Peer::ALL.len()];
    for round in 0..rounds as usize {
        for (at, cell) in CELLS.iter().enumerate() {
            for turn in 0..Peer::ALL.len() {
                let peer = (turn + round) % Peer::ALL.len();
                let sample = rig.measure(cell, Peer::ALL[peer], seconds)?;
                eprintln!("{}: {}: {:.1}k", cell.name, Peer::ALL[peer].name(), sample.rate / 1e3);
                samples[at * Peer::ALL.len() + peer].push(sample);
            }
        }
    }
    let mut markdown = table(&samples);
    markdown += &rig.time_to_clean()?;
    markdown += &rig.recovery()?;
    Ok(markdown)
}

impl Rig {
    fn start(pages: Pages) -> Result<Self> {
        crate::packages::need(crate::packages::PEERS)?;
        crate::packages::need(crate::packages::NBD)?;
        eprintln!("building");
        crate::cargo::build_release()?;
        let scratch = Scratch::new()?;
        let (data, run) = (scratch.data.path().to_owned(), scratch.run.path().to_owned());
        let (backing, backing_socket) = export(&scratch, "backing", &["delay"], &[])?;
        let (delayed, plain) = export(&scratch, "plain", &["delay"], &[])?;
        let (plain_server, plain_socket) = served(&scratch, "plain-qsd", &plain)?;
        let manifest = data.join("bench.yaml");
        std::fs::write(&manifest, manifest_for(&data, &backing_socket, DURABLE))?;
        let pool = data.join("pool.img");
        eprintln!("writing the pool");
        create_written_pool(&run, &pool, "6400MiB")?;
        // It makes the volumes.
        start_vflashd(&run, &manifest, &[VOLUME])?.stop()?;
        let flash = Place::of(&pool, RAW)?;
        Ok(Self {
            scratch,
            pages,
            flash,
            vflashd: Some(start_vflashd(&run, &manifest, &[VOLUME])?),
            run,
            manifest,
            backing_socket,
            plain_socket,
            backing,
            _others: vec![delayed, plain_server],
        })
    }

    fn socket(&self) -> PathBuf {
        volume_socket(&self.run, VOLUME)
    }

    fn measure(&self, cell: &Cell, peer: Peer, seconds: f64) -> Result<Sample> {
        match peer {
            Peer::RawDurable => self.measure_raw(cell, seconds, true),
            Peer::Raw => self.measure_raw(cell, seconds, false),
            // A fresh one each time: its flush writes block by block all that it holds.
            Peer::Filter => {
                let filters = ["cache", "delay"];
                let (_nbdkit, nbd) =
                    export(&self.scratch, "filter", &filters, &["cache=writeback"])?;
                let (_daemon, socket) = served(&self.scratch, "filter-qsd", &nbd)?;
                self.load(&socket, cell, seconds)
            }
            Peer::Vflash | Peer::Undrained => {
                self.drain()?;
                self.pause_backing(peer == Peer::Undrained)?;
                let sample = self.load(&self.socket(), cell, seconds);
                self.pause_backing(false)?;
                sample
            }
            Peer::Volatile => {
                self.drain()?;
                self.apply(VOLATILE)?;
                let sample = self.load(&self.socket(), cell, seconds);
                self.apply(DURABLE)?;
                sample
            }
        }
    }

    fn load(&self, socket: &Path, cell: &Cell, seconds: f64) -> Result<Sample> {
        let (depth, block) = (cell.depth.to_string(), format!("{}KiB", cell.block_kib));
        let (socket, seconds) = (text(socket), seconds.to_string());
        let operations = (LOAD_BYTES_MAX / (u64::from(cell.block_kib) << 10)).to_string();
        let commit = cell.commit.map(|writes| writes.to_string());
        let mut arguments = vec!["load", "--socket", &socket, "--rw", cell.pattern];
        arguments.extend(["--ramp", "0.2", "--ops", &operations]);
        arguments.extend(["--depth", &depth, "--block-size", &block, "--runtime", &seconds]);
        if let Some(writes) = &commit {
            arguments.extend(["--commit", writes]);
        }
        if self.pages == Pages::Huge {
            arguments.push("--hugetlb");
        }
        let report = client(&arguments)?;
        ensure!(report["errors"] == 0, "{}: {report}", cell.name);
        let number = |name: &str| report[name].as_f64().unwrap_or(f64::NAN);
        Ok(Sample {
            rate: number("iops") / cell.commit.map_or(1.0, |writes| f64::from(writes + 1)),
            p50: number("latency_p50_us"),
            p99: number("latency_p99_us"),
        })
    }

    fn measure_raw(&self, cell: &Cell, seconds: f64, durable: bool) -> Result<Sample> {
        let (block, depth) =
            (format!("--bs={}k", cell.block_kib), format!("--iodepth={}", cell.depth));
        let runtime = format!("--runtime={:.0}ms", seconds * 1e3);
        let mut options = vec!["--lat_percentiles=1", "--clat_percentiles=0", "--randrepeat=0"];
        options.extend([
            "--norandommap",
            "--time_based",
            "--ramp_time=500ms",
            &block,
            &depth,
            &runtime,
        ]);
        let sync = match cell.commit {
            Some(writes) => format!("--fdatasync={writes}"),
            None if durable => "--sync=dsync".to_owned(),
            None => "--sync=none".to_owned(),
        };
        options.push(&sync);
        let report = fio(&self.flash, cell.pattern, self.pages, &options)?;
        let side = &report["jobs"][0]["write"];
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        Ok(Sample {
            rate: number(&side["iops"]) / cell.commit.map_or(1.0, f64::from),
            p50: number(&side["lat_ns"]["percentile"]["50.000000"]) / 1e3,
            p99: number(&side["lat_ns"]["percentile"]["99.000000"]) / 1e3,
        })
    }

    /// Changes the disk's durability.
    fn apply(&self, durability: &str) -> Result<()> {
        std::fs::write(
            &self.manifest,
            manifest_for(self.scratch.data.path(), &self.backing_socket, durability),
        )?;
        vflash(&self.run, &["apply", "-f", &text(&self.manifest)]).map(|_| ())
    }

    fn drain(&self) -> Result<()> {
        vflash(&self.run, &["drain", VOLUME, "--all", "--wait"]).map(|_| ())
    }

    /// Writes a gigabyte of random blocks, as fast as it goes.
    fn dirty_a_gigabyte(&self) -> Result<()> {
        let (socket, blocks) = (text(&self.socket()), DIRTY_BLOCKS.to_string());
        let report = client(&[
            "load",
            "--socket",
            &socket,
            "--rw",
            "randwrite",
            "--depth",
            "32",
            "--ramp",
            "0",
            "--runtime",
            "300",
            "--ops",
            &blocks,
        ])?;
        ensure!(report["errors"] == 0, "{report}");
        Ok(())
    }

    /// From the first write of a gigabyte until the backing has it all, and what block by block
    /// would take.
    fn time_to_clean(&mut self) -> Result<String> {
        self.drain()?;
        self.pause_backing(true)?;
        self.dirty_a_gigabyte()?;
        self.pause_backing(false)?;
        let begun = Instant::now();
        self.drain()?;
        let ours = begun.elapsed().as_secs_f64();
        let cell = Cell { name: "block by block", ..CELLS[0] };
        let one = self.load(&self.plain_socket, &cell, 5.0)?;
        let in_order = DIRTY_BLOCKS as f64 / one.rate;
        Ok(format!(
            "\nTime to clean 1 GiB of random 4 KiB blocks: {ours:.1} s. Block by block in order it \
             would take {in_order:.0} s ({:.0} a second): {:.0} × as long (goal: 5 ×).\n",
            one.rate,
            in_order / ours
        ))
    }

    /// Kills the daemon with a gigabyte dirty: how long until it serves again.
    fn recovery(&mut self) -> Result<String> {
        self.drain()?;
        self.pause_backing(true)?;
        self.dirty_a_gigabyte()?;
        let dirty = self.dirty_bytes()?;
        self.pause_backing(false)?;
        // Dropping kills it.
        self.vflashd = None;
        let begun = Instant::now();
        self.vflashd = Some(start_vflashd(&self.run, &self.manifest, &[VOLUME])?);
        let socket = text(&self.socket());
        client(&["load", "--socket", &socket, "--ramp", "0", "--ops", "1", "--depth", "1"])?;
        let serving = begun.elapsed();
        self.drain()?;
        Ok(format!(
            "\nKilled with {:.2} GiB dirty: {:.0} ms from the start of the new process to the end \
             of the first read (goal: 1 s).\n",
            dirty / f64::from(1 << 30),
            serving.as_secs_f64() * 1e3
        ))
    }

    fn dirty_bytes(&self) -> Result<f64> {
        let status = vflash(&self.run, &["status", "-o", "json"])?;
        let status: Value = serde_json::from_str(&status).context("read the status")?;
        find(&status, "dirtyBytes").context("the status has no dirty bytes")
    }

    /// A stopped server is a backing that hangs: nothing drains.
    fn pause_backing(&self, pause: bool) -> Result<()> {
        let signal = if pause { Signal::SIGSTOP } else { Signal::SIGCONT };
        let process = Pid::from_raw(self.backing.0.id() as i32);
        kill(process, signal).context("stop or continue the backing's server")
    }
}

/// nbdkit with an image of its own behind these filters: the server and its socket.
fn export(
    scratch: &Scratch,
    name: &str,
    filters: &[&str],
    more: &[&str],
) -> Result<(Server, PathBuf)> {
    let (image, socket) =
        (scratch.data.path().join(format!("{name}.raw")), scratch.run.path().join(name));
    std::fs::File::create(&image)?.set_len(DISK_BYTES)?;
    // Left by one of the same name that was killed.
    std::fs::remove_file(&socket).ok();
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--threads", THREADS, "--unix"]).arg(&socket);
    command.args(filters.iter().map(|filter| format!("--filter={filter}")));
    command.arg("file").arg(&image).args(more);
    command.args([format!("rdelay={DELAY}"), format!("wdelay={DELAY}")]);
    let mut server = spawn(&mut command)?;
    wait_for(&socket, &mut server)?;
    Ok((server, socket))
}

/// qemu-storage-daemon in front of an NBD export: the server and its vhost-user socket.
fn served(scratch: &Scratch, name: &str, nbd: &Path) -> Result<(Server, PathBuf)> {
    let disk = format!("driver=nbd,server.type=unix,server.path={}", text(nbd));
    let socket = scratch.run.path().join(name);
    std::fs::remove_file(&socket).ok();
    let server = start_storage_daemon(&socket, &disk)?;
    Ok((server, socket))
}

/// The first number that is called so.
fn find(value: &Value, name: &str) -> Option<f64> {
    match value {
        Value::Object(fields) => fields
            .get(name)
            .and_then(Value::as_f64)
            .or_else(|| fields.values().find_map(|value| find(value, name))),
        Value::Array(values) => values.iter().find_map(|value| find(value, name)),
        _ => None,
    }
}

fn manifest_for(data: &Path, backing: &Path, durability: &str) -> String {
    let (pool, sidecar) = (text(&data.join("pool.img")), text(&data.join("backing.vflash")));
    let (machine, name) = VOLUME.split_once('/').expect("a machine and a volume");
    let (_, raw) = RAW.split_once('/').expect("a machine and a volume");
    format!(
        "apiVersion: vflash/v1\nkind: Pool\nmetadata: {{name: drive}}\nspec: {{device: {pool}}}\n\
         ---\napiVersion: vflash/v1\nkind: VirtualMachine\nmetadata: {{name: {machine}}}\nspec:\n  \
         volumes:\n  - name: {name}\n    \
         cache: {{pool: drive, size: 4GiB, sidecar: {sidecar}, durability: {durability}}}\n    \
         backing: nbd+unix:///?socket={}\n  - name: {raw}\n    \
         flash: {{pool: drive, size: 2GiB}}\n",
        text(backing)
    )
}

fn table(samples: &[Vec<Sample>]) -> String {
    let mut text =
        "| cell | peer | rate | p50 µs | p99 µs | vflash ÷ peer |\n|---|---|--:|--:|--:|--:|\n"
            .to_owned();
    for (at, cell) in CELLS.iter().enumerate() {
        let of = |peer: usize| &samples[at * Peer::ALL.len() + peer];
        let ours = of(Peer::ALL.iter().position(|peer| *peer == Peer::Vflash).unwrap_or(0));
        for (index, peer) in Peer::ALL.iter().enumerate() {
            let theirs = of(index);
            let value = |value: fn(&Sample) -> f64| {
                median(theirs.iter().map(value).collect()).unwrap_or(f64::NAN)
            };
            let ratio = ours.iter().zip(theirs).map(|(ours, theirs)| match cell.depth {
                1 => ours.p50 / theirs.p50,
                _ => ours.rate / theirs.rate,
            });
            let ratio = match peer {
                Peer::Vflash => String::new(),
                _ => format!("{:.2}", median(ratio.collect()).unwrap_or(f64::NAN)),
            };
            let unit = match cell.block_kib {
                4 => format!("{:.1}k/s", value(|sample| sample.rate) / 1e3),
                kib => {
                    format!("{:.0} MB/s", value(|sample| sample.rate) * f64::from(kib) * 1.024e-3)
                }
            };
            text += &format!(
                "| {} | {} | {unit} | {:.0} | {:.0} | {ratio} |\n",
                cell.name,
                peer.name(),
                value(|sample| sample.p50),
                value(|sample| sample.p99)
            );
        }
    }
    text + &like_with_like(samples) + GOALS
}

/// What the log makes of volatile writes: both acknowledge what a power cut may take.
fn like_with_like(samples: &[Vec<Sample>]) -> String {
    let at = |peer| Peer::ALL.iter().position(|other| *other == peer).unwrap_or(0);
    let ratios = CELLS.iter().zip(samples.chunks(Peer::ALL.len())).map(|(cell, samples)| {
        let pairs = samples[at(Peer::Volatile)].iter().zip(&samples[at(Peer::Raw)]);
        let ratio = median(pairs.map(|(ours, raw)| ours.rate / raw.rate).collect());
        format!("{} {:.2}", cell.name, ratio.unwrap_or(f64::NAN))
    });
    let ratios = ratios.collect::<Vec<_>>().join(", ");
    format!("\n`durability: flush` ÷ volatile writes of the raw flash: {ratios}.\n")
}

const GOALS: &str = "
Ratios are medians of the rounds' ratios: of rates, and at depth 1 of median latencies. Goals:
depth 32, random: 2 × durable writes of the flash and 1.5 × volatile ones; depth 1: latency at most
1.3 × a durable write's; commits: 3 × the cache filter's.
";
