//! A trace through a daemon: a vhost-user front end sends its requests, and the daemon's metrics
//! tell what became of them.

use crate::trace::{BLOCK_SECTORS, Request, Trace};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use vflash::metrics::Histogram;
use vflash_bench::Result;
use vflash_bench::device::{Device, DeviceOptions};
use vflash_bench::queue::{Completed, Kind, sleep};

/// Bytes of one request at most; longer ones are sent in parts.
const REQUEST_BYTES_MAX: u32 = 1 << 20;
const SECTOR_BYTES: u32 = 512;

/// How long nothing may complete before it is an error.
const PATIENCE: Duration = Duration::from_secs(30);

/// How the daemon may answer a question for its metrics.
const METRICS_TIMEOUT: Duration = Duration::from_secs(10);
const METRICS_BYTES_MAX: u64 = 16 << 20;

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The volume's socket.
    pub socket: PathBuf,
    /// Requests under way at most.
    pub depth: u16,
    /// Times as fast as the trace was taken; as fast as it goes if not given.
    pub speed: Option<f64>,
    /// Requests at most.
    pub requests_max: Option<usize>,
    /// The daemon's API socket, and the volume as VM/VOLUME: for its counters.
    pub metrics: Option<(PathBuf, String)>,
}

/// What was measured. Latencies in µs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    pub requests: u64,
    pub seconds: f64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub errors: u64,
    pub read_p50_us: f64,
    pub read_p99_us: f64,
    pub read_mean_us: f64,
    pub write_p50_us: f64,
    pub write_p99_us: f64,
    pub write_mean_us: f64,
    /// Of the cache's counters, if it has them: the share of blocks that the flash or probation
    /// had.
    pub hit_ratio: Option<f64>,
    /// What the volume's counters grew by, if they did: what the backing was asked for is among
    /// them.
    pub counters: BTreeMap<String, f64>,
}

/// Makes requests fit a disk: if its sectors are too few, the blocks that the trace touches are put
/// side by side in their order, which keeps each request in one piece.
///
/// # Errors
/// The trace touches more than the disk has.
pub fn fit(trace: &Trace, capacity_sectors: u64) -> Result<Vec<Request>> {
    let end = |request: &Request| request.sector + u64::from(request.sectors);
    if trace.requests.iter().all(|request| end(request) <= capacity_sectors) {
        return Ok(trace.requests.clone());
    }
    let mut blocks: Vec<u64> = trace.accesses().map(|(block, _)| block).collect();
    blocks.sort_unstable();
    blocks.dedup();
    let needed = blocks.len() as u64 * BLOCK_SECTORS;
    if needed > capacity_sectors {
        let text = format!(
            "the trace touches {needed} sectors and the disk has {capacity_sectors}: use a larger \
             disk"
        );
        return Err(text.into());
    }
    let dense = |request: &Request| {
        let first = request.sector / BLOCK_SECTORS;
        let block = blocks.partition_point(|block| *block < first) as u64;
        Request { sector: block * BLOCK_SECTORS + request.sector % BLOCK_SECTORS, ..*request }
    };
    Ok(trace.requests.iter().map(dense).collect())
}

struct Pending {
    started: Instant,
    write: bool,
    bytes: u32,
}

struct Driver {
    device: Device,
    pending: Vec<Option<Pending>>,
    completed: Vec<Completed>,
    reads: Histogram,
    writes: Histogram,
    report: Report,
}

/// Replays a trace and measures.
pub fn run(trace: &Trace, options: &Options) -> Result<Report> {
    let device = Device::open(DeviceOptions {
        depth: options.depth,
        data_bytes: REQUEST_BYTES_MAX as usize,
        ..DeviceOptions::new(&options.socket)
    })?;
    let mut requests = fit(trace, device.capacity_sectors)?;
    requests.truncate(options.requests_max.unwrap_or(usize::MAX));
    let before = counters(options)?;
    let mut driver = Driver::new(device);
    let begun = Instant::now();
    let first = requests.first().map_or(0, |request| request.micros);
    for request in &requests {
        let due = options.speed.map_or(begun, |speed| {
            let micros = request.micros.saturating_sub(first) as f64 / speed;
            begun + Duration::from_secs_f64(micros / 1e6)
        });
        driver.send(*request, due)?;
    }
    while driver.device.queues[0].in_flight() > 0 {
        driver.reap(PATIENCE)?;
    }
    let mut report = driver.finish(begun.elapsed())?;
    report.requests = requests.len() as u64;
    report.take_counters(&before, &counters(options)?);
    Ok(report)
}

impl Driver {
    fn new(device: Device) -> Self {
        let pending = (0..device.queues[0].depth()).map(|_| None).collect();
        // What is written is no zeros, which back ends may treat apart.
        for slot in 0..device.queues[0].depth() {
            let at = device.queues[0].data(slot);
            device.memory.fill(at, REQUEST_BYTES_MAX as usize, 0xa5);
        }
        Self {
            device,
            pending,
            completed: Vec::new(),
            reads: Histogram::default(),
            writes: Histogram::default(),
            report: Report::default(),
        }
    }

    /// Sends a request at `due` or when there is room. Its latency counts from when it was due, if
    /// that is later than the last completion made room: a slow back end is not let off.
    fn send(&mut self, request: Request, due: Instant) -> Result<()> {
        let most = REQUEST_BYTES_MAX / SECTOR_BYTES;
        let mut at = 0;
        while at < request.sectors {
            let sectors = (request.sectors - at).min(most);
            let slot = self.slot(due)?;
            let bytes = sectors * SECTOR_BYTES;
            let kind = if request.write { Kind::Write } else { Kind::Read };
            let (memory, queue) = (&self.device.memory, &mut self.device.queues[0]);
            queue.submit(memory, slot, kind, request.sector + u64::from(at), bytes);
            queue.publish(memory);
            let started = Instant::now();
            self.pending[usize::from(slot)] =
                Some(Pending { started, write: request.write, bytes });
            at += sectors;
        }
        Ok(())
    }

    /// Waits until `due`, and for a free slot.
    fn slot(&mut self, due: Instant) -> Result<u16> {
        while let Some(left) = due.checked_duration_since(Instant::now()).filter(|d| !d.is_zero()) {
            self.reap_within(left)?;
        }
        loop {
            if let Some(slot) = self.device.queues[0].take_slot() {
                return Ok(slot);
            }
            self.reap(PATIENCE)?;
        }
    }

    /// Takes at least one completion.
    fn reap(&mut self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        while !self.reap_within(deadline.saturating_duration_since(Instant::now()))? {
            if Instant::now() >= deadline {
                let count = self.device.queues[0].in_flight();
                return Err(format!("{count} requests: none completed for {patience:?}").into());
            }
        }
        Ok(())
    }

    /// Takes what completes within `timeout`; whether anything did.
    fn reap_within(&mut self, timeout: Duration) -> Result<bool> {
        let queue = &mut self.device.queues[0];
        if !queue.arm(&self.device.memory) {
            sleep(std::slice::from_ref(queue), timeout)?;
        }
        self.completed.clear();
        queue.completed(&self.device.memory, &mut self.completed)?;
        let now = Instant::now();
        for one in &self.completed {
            let pending = self.pending[usize::from(one.slot)].take();
            let Pending { started, write, bytes } = pending.ok_or("a completion of nothing")?;
            let (histogram, total) = match write {
                true => (&self.writes, &mut self.report.written_bytes),
                false => (&self.reads, &mut self.report.read_bytes),
            };
            histogram.record(now - started);
            *total += u64::from(bytes);
            self.report.errors += u64::from(one.status != 0);
        }
        Ok(!self.completed.is_empty())
    }

    fn finish(mut self, elapsed: Duration) -> Result<Report> {
        self.device.stop()?;
        let (reads, writes) = (self.reads.snapshot(), self.writes.snapshot());
        let micros =
            |latency: Option<Duration>| latency.map_or(0.0, |time| time.as_secs_f64() * 1e6);
        let mut report = self.report;
        report.seconds = elapsed.as_secs_f64();
        report.read_p50_us = micros(reads.quantile(0.5));
        report.read_p99_us = micros(reads.quantile(0.99));
        report.read_mean_us = micros(reads.mean());
        report.write_p50_us = micros(writes.quantile(0.5));
        report.write_p99_us = micros(writes.quantile(0.99));
        report.write_mean_us = micros(writes.mean());
        Ok(report)
    }
}

impl Report {
    fn take_counters(&mut self, before: &BTreeMap<String, f64>, after: &BTreeMap<String, f64>) {
        let grown = |(name, value): (&String, &f64)| {
            (name.clone(), value - before.get(name).copied().unwrap_or(0.0))
        };
        self.counters = after.iter().map(grown).collect();
        let counter = |name: &str| {
            self.counters.get(&format!("vflash_cache_{name}_total")).copied().unwrap_or(0.0)
        };
        let found = counter("hits") + counter("probation_hits");
        let reads = found + counter("joined") + counter("misses");
        self.hit_ratio = (reads > 0.0).then(|| found / reads);
        self.counters.retain(|_, growth| *growth != 0.0);
    }
}

fn counters(options: &Options) -> Result<BTreeMap<String, f64>> {
    let Some((socket, volume)) = &options.metrics else { return Ok(BTreeMap::new()) };
    let text = fetch(socket).map_err(|error| {
        format!("the metrics of {}: {error}; is vflashd running there?", socket.display())
    })?;
    let counters = parse_counters(&text, volume);
    if counters.is_empty() {
        return Err(format!("the daemon has no counters of {volume}; is the name right?").into());
    }
    Ok(counters)
}

/// GET /metrics over the API's socket.
fn fetch(socket: &std::path::Path) -> Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(METRICS_TIMEOUT))?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(METRICS_BYTES_MAX).read_to_end(&mut answer)?;
    let answer = String::from_utf8(answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("no HTTP answer")?;
    let status = head.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        return Err(format!("the answer was `{status}`").into());
    }
    Ok(body.to_owned())
}

/// Counters (`…_total`) of one volume from Prometheus text, by name and what other labels they
/// have (the pool's name aside).
pub fn parse_counters(text: &str, volume: &str) -> BTreeMap<String, f64> {
    let Some((machine, volume)) = volume.split_once('/') else { return BTreeMap::new() };
    let wanted = [("vm", machine), ("volume", volume)];
    let mut counters = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((name, rest)) = line.split_once('{') else { continue };
        let Some((labels, value)) = rest.rsplit_once("} ") else { continue };
        let labels: Vec<(&str, &str)> = labels
            .split(',')
            .filter_map(|label| label.split_once('='))
            .map(|(name, value)| (name, value.trim_matches('"')))
            .collect();
        let ours = wanted.iter().all(|label| labels.contains(label));
        let Some(value) = value.parse::<f64>().ok().filter(|_| ours && name.ends_with("_total"))
        else {
            continue;
        };
        let others = labels.iter().filter(|label| label.0 != "pool" && !wanted.contains(label));
        let others: Vec<&str> = others.map(|(_, value)| *value).collect();
        let key =
            if others.is_empty() { name.into() } else { format!("{name}:{}", others.join(",")) };
        *counters.entry(key).or_insert(0.0) += value;
    }
    counters
}
