//! A timed load on one socket.

use crate::device::{Device, DeviceOptions};
use crate::runner::{GUARD, Mix, Runner, Workload};
use crate::{Result, cpu};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::{Duration, Instant};

#[derive(Clone, Debug)]
pub struct LoadOptions {
    pub device: DeviceOptions,
    pub workload: Workload,
    /// Not counted.
    pub ramp: Duration,
    pub runtime: Duration,
    /// Ends the run early, once so many have been counted.
    pub operations_max: Option<u64>,
    /// Requests per second; as fast as it goes if not given.
    pub rate: Option<f64>,
    /// Flush after so many writes that were submitted together.
    pub commit_writes: Option<u16>,
    /// The used part of the device begins here.
    pub first_sector: u64,
    /// Whose CPU time is reported.
    pub server_pid: Option<u32>,
}

/// What was measured. Latencies in µs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LoadReport {
    pub operations: u64,
    pub seconds: f64,
    pub iops: f64,
    pub megabytes_per_second: f64,
    pub latency_p50_us: f64,
    pub latency_p99_us: f64,
    pub latency_p999_us: f64,
    /// CPU time of the server per operation, in µs.
    pub server_cpu_us: Option<f64>,
    /// CPU time of the server in shares of a core.
    pub server_cpu_share: Option<f64>,
    /// CPU time of this client per operation, in µs: when it polls, what limits it.
    pub client_cpu_us: f64,
    pub kicks_per_operation: f64,
    pub interrupts_per_operation: f64,
    /// Requests that ended with an error status.
    pub errors: u64,
    /// Times that nothing completed for 2 s though requests were in flight.
    pub guards: u32,
    /// Sectors whose content was checked at the end.
    pub verified_sectors: usize,
}

impl LoadReport {
    /// Nothing failed and nothing hung.
    pub fn passed(&self) -> bool {
        self.errors == 0 && self.guards == 0
    }
}

/// Loads the device for `ramp` and `runtime`, and with verification reads everything back.
pub fn run(options: &LoadOptions) -> Result<LoadReport> {
    let mut runner = Runner::new(Device::open(options.device.clone())?, options.workload.clone());
    if let Some(rate) = options.rate {
        runner.set_rate(rate);
    }
    if let Some(writes) = options.commit_writes {
        runner.set_commits(writes);
    }
    if options.first_sector > 0 {
        runner.set_first_sector(options.first_sector);
    }
    let ramp_end = Instant::now() + options.ramp;
    drive(&mut runner, ramp_end, u64::MAX)?;
    runner.reset_counters();
    let used = || -> Result<_> {
        Ok((cpu::on_cpu(std::process::id())?, options.server_pid.map(cpu::on_cpu).transpose()?))
    };
    let (begun, before) = (Instant::now(), used()?);
    drive(&mut runner, begun + options.runtime, options.operations_max.unwrap_or(u64::MAX))?;
    let (elapsed, after) = (begun.elapsed(), used()?);
    let server = after.1.zip(before.1).map(|(after, before)| after - before);
    let mut report = summary(&runner, elapsed, after.0 - before.0, server);
    runner.drain()?;
    if options.workload.verify {
        runner.read_back()?;
    }
    runner.device.stop()?;
    (report.guards, report.errors) = (runner.guards, runner.errors);
    report.verified_sectors = runner.into_oracle().map_or(0, |oracle| oracle.known());
    Ok(report)
}

/// Keeps the queues full until `end`, or until `operations` have been counted.
fn drive(runner: &mut Runner, end: Instant, operations: u64) -> Result<()> {
    let mut now = Instant::now();
    while now < end && runner.operations < operations {
        runner.fill(now);
        if runner.reap()? == 0 {
            let due = runner.until_due(now).filter(|due| !due.is_zero()).unwrap_or(GUARD);
            runner.wait(GUARD.min(due).min(end - now))?;
        }
        now = Instant::now();
    }
    Ok(())
}

fn summary(
    runner: &Runner,
    elapsed: Duration,
    client: Duration,
    server: Option<Duration>,
) -> LoadReport {
    let seconds = elapsed.as_secs_f64();
    let latency = runner.latency.snapshot();
    let quantile = |share| latency.quantile(share).map_or(0.0, |value| value.as_secs_f64() * 1e6);
    let operations = runner.operations as f64;
    let (mut kicks, mut interrupts) = (0, 0);
    for queue in &runner.device.queues {
        kicks += queue.kicks;
        interrupts += queue.interrupts.get();
    }
    LoadReport {
        operations: runner.operations,
        seconds,
        iops: operations / seconds,
        megabytes_per_second: runner.bytes as f64 / seconds / 1e6,
        latency_p50_us: quantile(0.5),
        latency_p99_us: quantile(0.99),
        latency_p999_us: quantile(0.999),
        server_cpu_us: server.map(|cpu| cpu.as_secs_f64() * 1e6 / operations),
        server_cpu_share: server.map(|cpu| cpu.as_secs_f64() / seconds),
        client_cpu_us: client.as_secs_f64() * 1e6 / operations,
        kicks_per_operation: kicks as f64 / operations,
        interrupts_per_operation: interrupts as f64 / operations,
        errors: runner.errors,
        guards: runner.guards,
        verified_sectors: 0,
    }
}

/// Writes the whole device once, so that every block of the file beneath has been written.
pub fn fill(device: DeviceOptions) -> Result<u64> {
    let workload = Workload {
        mix: Mix { sequential: true, ..Mix::WRITE },
        block_bytes: device.data_bytes as u32,
        ragged: false,
        span_sectors: u64::MAX,
        verify: false,
        seed: 1,
    };
    let mut runner = Runner::new(Device::open(device)?, workload);
    let total = runner.device.capacity_sectors * 512;
    while runner.bytes < total {
        runner.fill(Instant::now());
        runner.reap_some()?;
    }
    runner.drain()?;
    runner.device.stop()?;
    match runner.errors {
        0 => Ok(total),
        errors => Err(format!("{errors} writes failed").into()),
    }
}

/// What a server uses while its front ends do nothing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct IdleReport {
    pub devices: usize,
    /// In shares of a core.
    pub server_cpu_share: f64,
    pub server_resident_bytes: u64,
}

/// Connects to every socket with one queue, sends one read on each, then stays idle for `runtime`.
pub fn idle(sockets: &[PathBuf], pid: u32, runtime: Duration) -> Result<IdleReport> {
    let mut devices = Vec::new();
    for socket in sockets {
        let options = DeviceOptions { depth: 8, ..DeviceOptions::new(socket) };
        let workload = Workload {
            mix: Mix::READ,
            block_bytes: options.data_bytes as u32,
            ragged: false,
            span_sectors: u64::MAX,
            verify: false,
            seed: 1,
        };
        let mut runner = Runner::new(Device::open(options)?, workload);
        runner.fill(Instant::now());
        runner.drain()?;
        // A driver that has nothing to do waits for interrupts.
        runner.settle()?;
        devices.push(runner);
    }
    // What the last requests caused ends before the measurement begins.
    std::thread::sleep(Duration::from_millis(500));
    let (begun, before) = (Instant::now(), cpu::on_cpu(pid)?);
    std::thread::sleep(runtime);
    let used = cpu::on_cpu(pid)? - before;
    Ok(IdleReport {
        devices: devices.len(),
        server_cpu_share: used.as_secs_f64() / begun.elapsed().as_secs_f64(),
        server_resident_bytes: cpu::resident_bytes(pid)?,
    })
}
