//! Kills a back end under verified load, again and again.
//!
//! The server is ended with SIGKILL after a random number of completions, started again, and the
//! front end reconnects with the in-flight area as QEMU does. Everything that was in flight must
//! complete, once, and nothing acknowledged may be lost. Each *boot* is one front end with its own
//! number of queues and depth, which lives through several kills; what it wrote is known to the
//! next.

use crate::Result;
use crate::device::{Device, DeviceOptions};
use crate::oracle::Oracle;
use crate::report::{Violations, quantile};
use crate::runner::{GUARD, Mix, Runner, Workload};
use fastrand::Rng;
use serde::Serialize;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Blocks are of any size up to this.
const BLOCK_BYTES: usize = 16 << 10;

/// Completions between two kills at most.
const COMPLETIONS_MAX: usize = 600;

/// Of so many kills, one comes while the server is still taking up what the last one left.
const HASTY_ONE_IN: u8 = 8;

/// How long after its start a server may refuse connections.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// Boots that may go wrong before the run ends early.
const FAILED_BOOTS_MAX: usize = 10;

#[derive(Clone, Debug)]
pub struct KillOptions {
    pub cycles: u32,
    pub socket: PathBuf,
    /// The server's command line.
    pub server: Vec<String>,
    pub seed: u64,
    /// Bytes of the device that are used.
    pub span_bytes: u64,
    /// Cycles between two boots, each with another number of queues and another depth.
    pub cycles_per_boot: u32,
    /// Keep the in-flight area. Without it requests do get lost: that shows what the area is for.
    pub inflight: bool,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct KillReport {
    pub cycles: u32,
    pub boots: u32,
    pub operations: u64,
    /// Requests that were in flight when the server died, and completed after.
    pub survivors: u64,
    #[serde(flatten)]
    pub violations: Violations,
    /// From SIGKILL until all that was in flight had completed, in milliseconds.
    pub stall_p50_ms: f64,
    pub stall_p99_ms: f64,
    pub stall_max_ms: f64,
    /// Sectors whose content was known and read back at the end.
    pub verified_sectors: usize,
    /// What went wrong, and how to see it again.
    pub failures: Vec<String>,
}

impl KillReport {
    /// All cycles ran and nothing was lost, doubled, wrong or silent.
    pub fn passed(&self) -> bool {
        self.failures.is_empty() && self.violations.total() == 0
    }
}

/// The server process; killed when dropped.
struct Server {
    command: Vec<String>,
    child: Child,
}

impl Server {
    fn start(command: &[String]) -> Result<Self> {
        let (program, arguments) = command.split_first().ok_or("no server command")?;
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| format!("cannot start {program}: {error}"))?;
        Ok(Self { command: command.to_vec(), child })
    }

    fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Ends it with SIGKILL and starts it again.
    fn crash(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            return Err(format!("the server ended by itself with {status}").into());
        }
        self.kill()?;
        *self = Self::start(&self.command)?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself already.
        let _ = self.kill();
    }
}

struct Run<'a> {
    options: &'a KillOptions,
    random: Rng,
    server: Server,
    stalls: Vec<f64>,
    report: KillReport,
}

/// Runs the cycles; `progress` is called after each boot's share of them. What the server does
/// wrong is counted in the report; an error means that the test could not be done.
pub fn run(options: &KillOptions, mut progress: impl FnMut(&KillReport)) -> Result<KillReport> {
    let mut run = Run {
        options,
        random: Rng::with_seed(options.seed),
        server: Server::start(&options.server)?,
        stalls: Vec::new(),
        report: KillReport::default(),
    };
    let mut oracle = None;
    while run.report.cycles < options.cycles && run.report.failures.len() < FAILED_BOOTS_MAX {
        let place = format!("seed {:#x}, cycle {}", options.seed, run.report.cycles);
        match run.boot(oracle.take()) {
            Ok(known) => oracle = known,
            Err(error) => {
                let text = format!("{place}: {error}");
                run.report.violations.count(error).map_err(|_| text.clone())?;
                run.report.failures.push(text);
                // The next boot starts from a disk of which nothing is known.
                run.server.crash()?;
            }
        }
        run.note_stalls();
        run.report.verified_sectors = oracle.as_ref().map_or(0, Oracle::known);
        progress(&run.report);
    }
    Ok(run.report)
}

impl Run<'_> {
    /// One front end, its share of the cycles, and a look at every byte at the end.
    fn boot(&mut self, oracle: Option<Oracle>) -> Result<Option<Oracle>> {
        let device = Device::open(DeviceOptions {
            queues: self.random.u16(1..=4),
            depth: [1, 2, 8, 32, 64, 128][self.random.usize(..6)],
            data_bytes: BLOCK_BYTES,
            connect_timeout: CONNECT_TIMEOUT,
            indirect: self.random.bool(),
            memory_slots: self.random.bool(),
            base_is_available: self.options.inflight && self.random.bool(),
            inflight: self.options.inflight,
            ..DeviceOptions::new(&self.options.socket)
        })?;
        if self.options.inflight && !device.tracks_inflight() {
            return Err("the server offers no in-flight area: killing it loses requests".into());
        }
        let workload = Workload {
            mix: Mix::ALL,
            block_bytes: BLOCK_BYTES as u32,
            ragged: true,
            span_sectors: self.options.span_bytes / 512,
            verify: true,
            seed: self.random.u64(..),
        };
        let mut runner = match oracle {
            None => Runner::new(device, workload),
            known => Runner::with_oracle(device, workload, known),
        };
        self.report.boots += 1;
        let outcome = self.cycles(&mut runner);
        self.report.operations += runner.operations;
        outcome?;
        Ok(runner.into_oracle())
    }

    fn cycles(&mut self, runner: &mut Runner) -> Result<()> {
        let left = self.options.cycles - self.report.cycles;
        let end = self.report.cycles + self.options.cycles_per_boot.min(left);
        while self.report.cycles < end {
            self.load(runner)?;
            self.kill(runner)?;
        }
        runner.read_back()?;
        runner.device.stop()
    }

    /// Keeps the queues full for a random number of completions.
    fn load(&mut self, runner: &mut Runner) -> Result<()> {
        let mut left = self.random.usize(..COMPLETIONS_MAX);
        while left > 0 {
            runner.fill(Instant::now());
            let count = runner.reap()?;
            if count == 0 {
                runner.wait(GUARD)?;
            }
            left = left.saturating_sub(count);
        }
        Ok(())
    }

    /// Kills and restarts the server, and waits for everything that was in flight.
    fn kill(&mut self, runner: &mut Runner) -> Result<()> {
        runner.fill(Instant::now());
        // The guest sleeps: only an interrupt of the next server may wake it.
        runner.settle()?;
        runner.fill(Instant::now());
        self.pause(Duration::from_micros(200));
        self.report.survivors += runner.mark_survivors() as u64;
        let killed = Instant::now();
        self.server.crash()?;
        runner.device.reconnect()?;
        self.report.cycles += 1;
        if self.random.u8(..HASTY_ONE_IN) == 0 {
            self.pause(Duration::from_millis(2));
            self.server.crash()?;
            runner.device.reconnect()?;
            self.report.cycles += 1;
        }
        while runner.survivors() > 0 {
            if runner.reap()? == 0 {
                runner.wait(GUARD)?;
            }
            runner.fill(Instant::now());
        }
        self.stalls.push(killed.elapsed().as_secs_f64() * 1e3);
        Ok(())
    }

    /// Lets the server work for a random time of at most `most`.
    fn pause(&mut self, most: Duration) {
        let pause = most.mul_f64(self.random.f64());
        let begun = Instant::now();
        while begun.elapsed() < pause {
            std::thread::yield_now();
        }
    }

    fn note_stalls(&mut self) {
        self.stalls.sort_by(f64::total_cmp);
        self.report.stall_p50_ms = quantile(&self.stalls, 0.5);
        self.report.stall_p99_ms = quantile(&self.stalls, 0.99);
        self.report.stall_max_ms = quantile(&self.stalls, 1.0);
    }
}
