//! How near a limited volume comes to its limits, from both sides.

use crate::Result;
use crate::device::DeviceOptions;
use crate::load::{LoadOptions, run};
use crate::runner::{Mix, Workload};
use crate::serve;
use serde::Serialize;
use std::path::Path;
use std::time::Duration;
use vflash::base::units::{GIB, KIB, MIB};
use vflash::io::disk::DiskTarget;
use vflash::qos::Limits;
use vflash::vhost::{Server, ServerOptions};

/// How far from its limit a rate may be, in shares of the limit.
pub const ERROR_MAX: f64 = 0.05;

/// Not measured: a volume that was idle first spends what it saved.
const RAMP: Duration = Duration::from_millis(500);

/// Small requests for limits of requests, large ones for limits of bytes.
const SMALL_BYTES: u32 = 4 * KIB as u32;
const LARGE_BYTES: u32 = 64 * KIB as u32;

/// A limit, and a load of more than it.
#[derive(Clone, Copy, Debug)]
pub struct Limited {
    pub iops: Option<u64>,
    pub bandwidth: Option<u64>,
    pub block_bytes: u32,
}

impl Limited {
    /// With blocks of a size that makes the limit felt.
    pub fn new(iops: Option<u64>, bandwidth: Option<u64>) -> Self {
        let block_bytes = if iops.is_some() { SMALL_BYTES } else { LARGE_BYTES };
        Self { iops, bandwidth, block_bytes }
    }

    /// Requests per second that both limits together let through.
    fn rate(&self) -> f64 {
        let by_bytes = self.bandwidth.map(|bytes| bytes as f64 / f64::from(self.block_bytes));
        let by_requests = self.iops.map(|iops| iops as f64);
        by_requests.into_iter().chain(by_bytes).fold(f64::INFINITY, f64::min)
    }
}

/// What got through.
#[derive(Clone, Debug, Serialize)]
pub struct LimitReport {
    pub iops_limit: Option<u64>,
    /// Bytes per second.
    pub bandwidth_limit: Option<u64>,
    pub block_bytes: u32,
    pub iops: f64,
    pub bandwidth: f64,
    /// The rate over what the limits let through, less one: negative is too slow.
    pub error: f64,
    /// Requests that ended with an error status.
    pub errors: u64,
}

impl LimitReport {
    pub fn passed(&self) -> bool {
        self.errors == 0 && self.error.abs() <= ERROR_MAX
    }
}

/// Asks the volume behind `socket`, which has these limits, for as much as it gives.
pub fn measure(socket: &Path, limited: Limited, runtime: Duration) -> Result<LimitReport> {
    let report = run(&LoadOptions {
        device: DeviceOptions {
            data_bytes: limited.block_bytes as usize,
            ..DeviceOptions::new(socket)
        },
        workload: Workload {
            mix: Mix { read: 50, write: 50, ..Mix::READ },
            block_bytes: limited.block_bytes,
            ragged: false,
            span_sectors: u64::MAX,
            verify: false,
            seed: 1,
        },
        ramp: RAMP,
        runtime,
        operations_max: None,
        rate: None,
        commit_writes: None,
        first_sector: 0,
        server_pid: None,
    })?;
    Ok(LimitReport {
        iops_limit: limited.iops,
        bandwidth_limit: limited.bandwidth,
        block_bytes: limited.block_bytes,
        iops: report.iops,
        bandwidth: report.megabytes_per_second * 1e6,
        error: report.iops / limited.rate() - 1.0,
        errors: report.errors,
    })
}

/// Serves a null volume with each of a list of limits and measures it.
pub fn measure_all(runtime: Duration) -> Result<Vec<LimitReport>> {
    let folder = std::env::temp_dir().join(format!("vflash-limits-{}", std::process::id()));
    std::fs::create_dir(&folder)?;
    let reports = serve_each(&folder.join("volume.sock"), runtime);
    // What is left of it holds nothing.
    let _ = std::fs::remove_dir_all(&folder);
    reports
}

fn serve_each(socket: &Path, runtime: Duration) -> Result<Vec<LimitReport>> {
    let cases = [
        Limited::new(Some(100), None),
        Limited::new(Some(5_000), None),
        Limited::new(Some(100_000), None),
        Limited::new(None, Some(10 * MIB)),
        Limited::new(None, Some(400 * MIB)),
        // The requests are felt first, then the bytes.
        Limited::new(Some(2_000), Some(400 * MIB)),
        Limited::new(Some(20_000), Some(10 * MIB)),
    ];
    let server = Server::start(&ServerOptions { reactors: 1, cpus: vec![] })?;
    let mut reports = Vec::new();
    for limited in cases {
        let Limited { iops, bandwidth, .. } = limited;
        let limits = Limits { iops, bandwidth, ..Limits::NONE };
        let target = DiskTarget::Null { size_bytes: GIB };
        let mut export = serve::export(socket, target, serve::file_volume(None));
        export.door.limits = limits;
        let id = server.add(export)?;
        reports.push(measure(socket, limited, runtime)?);
        server.remove(id)?;
    }
    server.stop()?;
    Ok(reports)
}
