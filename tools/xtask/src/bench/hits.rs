//! `cargo xtask bench hits`: what a read costs that the cache has, beside a flash volume of the
//! same daemon and beside the raw flash.
//!
//! All three lie in one file. The cached disk is written whole and drained before, so every read
//! hits; rounds are interleaved as everywhere.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use serde_json::Value;

use super::cells::median;
use super::pages::{HugePages, Pages};
use super::place::Place;
use super::servers::{
    Server, client, create_written_pool, fio, start_vflashd, text, vflash, volume_socket,
};
use crate::scratch::Scratch;

const FLASH: &str = "bench/flash";
const CACHED: &str = "bench/cached";
const DEPTHS: [u32; 2] = [1, 32];

/// At depth 32: hits by reads of the raw flash.
const RATE_GOAL: f64 = 0.9;

/// CPU of a hit beyond that of a flash volume's read, in µs.
const CPU_GOAL: f64 = 1.5;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Peer {
    /// fio on the volume's bytes of the pool's file.
    Raw,
    Flash,
    Hit,
}

impl Peer {
    const ALL: [Self; 3] = [Self::Raw, Self::Flash, Self::Hit];

    fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw flash (fio)",
            Self::Flash => "flash volume",
            Self::Hit => "cached disk, hits",
        }
    }
}

/// One measurement; times in µs.
#[derive(Clone, Copy, Default)]
struct Sample {
    rate: f64,
    p50: f64,
    p99: f64,
    /// Of the server, for each read.
    cpu: f64,
}

struct Rig {
    _scratch: Scratch,
    pages: Pages,
    place: Place,
    run: PathBuf,
    vflashd: Server,
}

/// Measures and prints markdown.
pub(super) fn run(rounds: u32, seconds: f64) -> Result<String> {
    let huge = HugePages::reserve();
    let rig = Rig::start(huge.pages)?;
    let mut samples = vec![Vec::new(); DEPTHS.len() * Peer::ALL.len()];
    for round in 0..rounds as usize {
        for (at, depth) in DEPTHS.iter().enumerate() {
            for turn in 0..Peer::ALL.len() {
                let peer = (turn + round) % Peer::ALL.len();
                let sample = rig.measure(Peer::ALL[peer], *depth, seconds)?;
                let (name, rate) = (Peer::ALL[peer].name(), sample.rate / 1e3);
                eprintln!("depth {depth}: {name}: {rate:.1}k, {:.2} µs", sample.cpu);
                samples[at * Peer::ALL.len() + peer].push(sample);
            }
        }
    }
    let missed = rig.missed()?;
    Ok(table(&samples) + &missed)
}

impl Rig {
    fn start(pages: Pages) -> Result<Self> {
        crate::packages::need(crate::packages::PEERS)?;
        eprintln!("building");
        crate::cargo::build_release()?;
        let scratch = Scratch::new()?;
        let (data, run) = (scratch.data.path().to_owned(), scratch.run.path().to_owned());
        let image = data.join("backing.raw");
        std::fs::File::create(&image)?.set_len(1 << 30)?;
        let (pool, manifest) = (data.join("pool.img"), data.join("hits.yaml"));
        std::fs::write(&manifest, manifest_for(&pool, &image))?;
        eprintln!("writing the volumes");
        create_written_pool(&run, &pool, "3GiB")?;
        let vflashd = start_vflashd(&run, &manifest, &[FLASH, CACHED])?;
        client(&["fill", "--socket", &text(&volume_socket(&run, FLASH))])?;
        vflashd.stop()?;
        let place = Place::of(&pool, FLASH)?;
        let vflashd = start_vflashd(&run, &manifest, &[FLASH, CACHED])?;
        client(&["fill", "--socket", &text(&volume_socket(&run, CACHED))])?;
        vflash(&run, &["drain", CACHED, "--all", "--wait"])?;
        Ok(Self { _scratch: scratch, pages, place, run, vflashd })
    }

    fn measure(&self, peer: Peer, depth: u32, seconds: f64) -> Result<Sample> {
        let name = match peer {
            Peer::Raw => return self.measure_raw(depth, seconds),
            Peer::Flash => FLASH,
            Peer::Hit => CACHED,
        };
        let (socket, pid) =
            (text(&volume_socket(&self.run, name)), self.vflashd.0.id().to_string());
        let (depth, seconds) = (depth.to_string(), seconds.to_string());
        let mut arguments = vec!["load", "--socket", &socket, "--server-pid", &pid];
        arguments.extend(["--rw", "randread", "--depth", &depth, "--runtime", &seconds]);
        if self.pages == Pages::Huge {
            arguments.push("--hugetlb");
        }
        let report = client(&arguments)?;
        ensure!(report["errors"] == 0, "{name}: {report}");
        let number = |name: &str| report[name].as_f64().unwrap_or(f64::NAN);
        Ok(Sample {
            rate: number("iops"),
            p50: number("latency_p50_us"),
            p99: number("latency_p99_us"),
            cpu: number("server_cpu_us"),
        })
    }

    fn measure_raw(&self, depth: u32, seconds: f64) -> Result<Sample> {
        let (depth, runtime) =
            (format!("--iodepth={depth}"), format!("--runtime={:.0}ms", seconds * 1e3));
        let options = [
            "--lat_percentiles=1",
            "--clat_percentiles=0",
            "--randrepeat=0",
            "--norandommap",
            "--time_based",
            "--ramp_time=500ms",
            "--bs=4k",
            &depth,
            &runtime,
        ];
        let report = fio(&self.place, "randread", self.pages, &options)?;
        let job = &report["jobs"][0];
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        let percentile = |share: &str| number(&job["read"]["lat_ns"]["percentile"][share]) / 1e3;
        let rate = number(&job["read"]["iops"]);
        // Both are percentages of one core.
        let busy = number(&job["usr_cpu"]) + number(&job["sys_cpu"]);
        let cpu = busy / 100.0 * 1e6 / rate;
        Ok(Sample { rate, p50: percentile("50.000000"), p99: percentile("99.000000"), cpu })
    }

    /// Whether every read did hit.
    fn missed(&self) -> Result<String> {
        let told = vflash(&self.run, &["describe", CACHED, "-o", "json"])?;
        let volume: Value = serde_json::from_str(&told)?;
        let counters = volume["cache"]["counters"].as_array().cloned().unwrap_or_default();
        let counter = |name: &str| {
            let found = counters.iter().find(|counter| counter["name"] == name);
            found.and_then(|counter| counter["value"].as_f64()).unwrap_or(0.0)
        };
        let hits = counter("hits");
        let reads = hits + counter("probation_hits") + counter("joined") + counter("misses");
        let share = 100.0 * hits / reads;
        Ok(format!("\n{share:.2} % of {reads:.0} reads of the cached disk hit.\n"))
    }
}

fn manifest_for(pool: &Path, image: &Path) -> String {
    let name = |volume: &'static str| volume.split_once('/').map_or("", |(_, name)| name);
    format!(
        "apiVersion: vflash/v1\nkind: Pool\nmetadata: {{name: drive}}\nspec: {{device: {}}}\n\
         ---\napiVersion: vflash/v1\nkind: VirtualMachine\nmetadata: {{name: bench}}\nspec:\n  \
         volumes:\n  - name: {}\n    flash: {{pool: drive, size: 1GiB}}\n  - name: {}\n    \
         cache: {{pool: drive, size: 1536MiB}}\n    backing: {}\n",
        pool.display(),
        name(FLASH),
        name(CACHED),
        image.display()
    )
}

/// A bound and whether it was kept.
fn verdict(what: &str, reached: f64, met: bool) -> String {
    match met {
        true => format!("{what}: {reached:.2}, met.\n"),
        false => format!("**{what}: {reached:.2}, missed.**\n"),
    }
}

fn table(samples: &[Vec<Sample>]) -> String {
    let mut text = "4 KiB random reads; medians of the rounds, ratios of each round's pair.\n\n\
                    | depth | peer | reads | p50 µs | p99 µs | CPU µs/IO |\n\
                    |--:|---|--:|--:|--:|--:|\n"
        .to_owned();
    let mut goals = "\n".to_owned();
    for (at, depth) in DEPTHS.iter().enumerate() {
        let of = |peer: Peer| {
            let index = Peer::ALL.iter().position(|other| *other == peer).unwrap_or(0);
            &samples[at * Peer::ALL.len() + index]
        };
        for peer in Peer::ALL {
            let value = |value: fn(&Sample) -> f64| {
                median(of(peer).iter().map(value).collect()).unwrap_or(f64::NAN)
            };
            text += &format!(
                "| {depth} | {} | {:.1}k/s | {:.0} | {:.0} | {:.2} |\n",
                peer.name(),
                value(|sample| sample.rate) / 1e3,
                value(|sample| sample.p50),
                value(|sample| sample.p99),
                value(|sample| sample.cpu)
            );
        }
        let pairs = |peer: Peer, pair: fn(&Sample, &Sample) -> f64| {
            let hits = of(Peer::Hit).iter().zip(of(peer));
            median(hits.map(|(hit, other)| pair(hit, other)).collect()).unwrap_or(f64::NAN)
        };
        if *depth == 32 {
            let rate = pairs(Peer::Raw, |hit, raw| hit.rate / raw.rate);
            let what = format!("Hits ÷ raw flash at depth {depth} (goal: {RATE_GOAL})");
            goals += &verdict(&what, rate, rate >= RATE_GOAL);
            let cpu = pairs(Peer::Flash, |hit, flash| hit.cpu - flash.cpu);
            let what = format!("CPU of a hit − of a flash volume's read, µs (goal: {CPU_GOAL})");
            goals += &verdict(&what, cpu, cpu <= CPU_GOAL);
        }
    }
    text + &goals
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_are_told_by_the_pairs_of_each_round() {
        let sample = |rate, cpu| Sample { rate, cpu, p50: 1.0, p99: 2.0 };
        let mut samples = vec![vec![sample(1e3, 1.0)]; 3];
        // The machine is half as fast in the second round, for all.
        samples.push(vec![sample(100e3, 0.0), sample(50e3, 0.0), sample(100e3, 0.0)]);
        samples.push(vec![sample(95e3, 5.0); 3]);
        samples.push(vec![sample(92e3, 6.0), sample(46e3, 7.0), sample(91e3, 6.2)]);
        let text = table(&samples);
        assert!(text.contains("| 32 | raw flash (fio) | 100.0k/s | 1 | 2 | 0.00 |"), "{text}");
        assert!(text.contains("at depth 32 (goal: 0.9): 0.92, met."), "{text}");
        assert!(text.contains("µs (goal: 1.5): 1.20, met."), "{text}");
        samples[5] = vec![sample(80e3, 9.0); 3];
        let text = table(&samples);
        assert!(text.contains("missed.**") && text.contains("4.00, missed.**"), "{text}");
    }
}
