//! `cargo xtask bench`: vflash beside the raw file and qemu-storage-daemon, on this machine, now.
//!
//! Rounds are interleaved: in each cell the peers take turns, in another order each round, and what
//! is compared is the median of the rounds' ratios. So a machine that is busy or slow for a while
//! is so for all.

mod cache;
mod cells;
mod disturbance;
mod goals;
mod hits;
mod idle_cores;
mod pages;
mod peers;
mod place;
mod profile;
mod servers;
mod table;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::scratch::Scratch;
use cells::{Cell, Samples};
use disturbance::Usage;
use idle_cores::IdleCores;
use pages::HugePages;
use peers::Peers;
use table::Setting;

/// Compare vflash with the raw file and with qemu-storage-daemon
///
/// Measures IOPS, bandwidth, latency and the server's CPU time in each cell (pattern, depth, number
/// of queues), with the server pinned to core 1 and the client to core 0, and says which goals are
/// met. Missed goals are shown, not failed. Takes about ten minutes and 5 GiB of disk. All use the
/// same bytes of the same file. Guest memory and fio's buffers lie on huge pages of 2 MiB: 64 are
/// reserved for the time (as root), or used if they are free (vm.nr_hugepages).
#[derive(clap::Args)]
pub(crate) struct BenchArguments {
    /// What to compare
    #[arg(value_enum, default_value = "flash")]
    part: Part,
    /// Rounds over all cells
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds that one measurement counts, after half a second that does not
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// One round of short measurements: shows that everything runs, says little about speed
    #[arg(long, conflicts_with_all = ["rounds", "seconds"])]
    quick: bool,
    /// In a virtual machine, let idle cores halt at once, as they do without us
    #[arg(long)]
    halt: bool,
    /// Measure a flash volume with `pinMemory` as well
    #[arg(long)]
    pinned: bool,
    /// Only cells whose name contains this, for example `qd32` or `null-randread-4k-qd1-1q-poll`
    #[arg(long, value_name = "PART")]
    only: Option<String>,
    /// Print the names of the cells and do nothing
    #[arg(long)]
    list: bool,
    /// Write what is printed at the end, which is markdown, to this file too
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Only tell with perf what an operation of these cells costs each peer, and where time goes
    #[arg(long, value_name = "CELL")]
    profile: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// A flash volume with the raw file and qemu-storage-daemon
    Flash,
    /// A cached disk on a slow backing with the flash itself and with nbdkit's cache filter
    Cache,
    /// Reads that the cache has with a flash volume's and with the flash itself
    Hits,
}

/// Runs the benchmark and prints its tables.
pub(crate) fn run(arguments: &BenchArguments) -> Result<()> {
    let cells = wanted(arguments)?;
    if arguments.list {
        cells.iter().for_each(|cell| println!("{}", cell.name()));
        return Ok(());
    }
    if arguments.part == Part::Cache {
        let _idle_cores = IdleCores::prepare(arguments.halt);
        let text = cache::run(arguments.rounds, arguments.seconds)?;
        return finish(arguments, &text);
    }
    if arguments.part == Part::Hits {
        let _idle_cores = IdleCores::prepare(arguments.halt);
        let text = hits::run(arguments.rounds, arguments.seconds)?;
        return finish(arguments, &text);
    }
    let scratch = Scratch::new()?;
    let idle_cores = IdleCores::prepare(arguments.halt);
    let huge = HugePages::reserve();
    let pages = huge.pages;
    let peers = Peers::start(&scratch, pages)?;
    if !arguments.profile.is_empty() {
        let text = profile::run(&peers, &cells, arguments.seconds, scratch.data.path())?;
        return finish(arguments, &text);
    }
    let (rounds, seconds) =
        if arguments.quick { (1, 0.5) } else { (arguments.rounds, arguments.seconds) };
    let before = Usage::now(&peers.servers())?;
    let pinned = arguments.pinned;
    let samples = measure(&peers, &cells, (rounds, pinned), seconds)?;
    let others = Usage::now(&peers.servers())?.others_since(&before);
    let idle = match arguments.only {
        None => Some(peers.idle(seconds.max(2.0))?),
        Some(_) => None,
    };
    let setting = Setting { pages, others, wake_ups: idle_cores.describe()? };
    let text = table::render(&cells, &samples, idle.as_ref(), setting);
    finish(arguments, &text)
}

fn finish(arguments: &BenchArguments, text: &str) -> Result<()> {
    println!("{text}");
    if let Some(path) = &arguments.markdown {
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// The cells that are asked for.
fn wanted(arguments: &BenchArguments) -> Result<Vec<Cell>> {
    let mut cells = cells::all();
    if let Some(part) = &arguments.only {
        cells.retain(|cell| cell.name().contains(part.as_str()));
    }
    if !arguments.profile.is_empty() {
        cells.retain(|cell| arguments.profile.contains(&cell.name()));
    }
    ensure!(!cells.is_empty(), "no cell is called so; `cargo xtask bench --list` shows them");
    Ok(cells)
}

fn measure(
    peers: &Peers,
    cells: &[Cell],
    (rounds, pinned): (u32, bool),
    seconds: f64,
) -> Result<Samples> {
    let mut samples = Samples::default();
    let begun = Instant::now();
    let total = cells.len() * rounds as usize;
    for round in 0..rounds {
        for (at, cell) in cells.iter().enumerate() {
            let mut found = Vec::new();
            for peer in cell.peers(round, pinned) {
                let sample = peers.measure(cell, peer, seconds)?;
                found.push(format!("{} {:.1}k", peer.name(), sample.iops / 1e3));
                samples.add(cell, peer, sample);
            }
            let done = round as usize * cells.len() + at + 1;
            let (elapsed, found) = (begun.elapsed().as_secs(), found.join(", "));
            eprintln!("[{done:3}/{total}] {elapsed:4} s  {}: {found}", cell.name());
        }
    }
    Ok(samples)
}
