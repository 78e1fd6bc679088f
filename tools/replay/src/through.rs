//! A trace through a whole cached disk on simulated disks: log, drain, slabs, fills and all. Beside
//! it the policy alone, which it should come close to.

use crate::simulate::{self, Options, Writes};
use crate::trace::{Request, Trace};
use serde::Serialize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vflash::base::Result;
use vflash::base::clock::Nanos;
use vflash::base::units::MIB;
use vflash::cache::policy::BLOCK_BYTES;
use vflash::cache::recover::{format, open};
use vflash::cache::root::BackingIdentity;
use vflash::cache::{
    CacheMessage, CacheOptions, CachedDisk, FormatOptions, Medium, Mode, OpenOptions, Opened,
    Place, Shape,
};
use vflash::io::disk::{Completion, Disk, DiskGeometry, Operation, OperationKind};
use vflash::io::sim::SimDisk;
use vflash::io::sim_reactor::{SimReactor, inbox};
use vflash::io::volume::Outcome;

/// From one request to the next of a trace that tells no times.
const UNTIMED_NANOS: u64 = 200_000;

/// What came of it. Counts are of 4 KiB blocks.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub trace: String,
    pub cache_bytes: u64,
    pub reads: u64,
    pub misses: u64,
    /// Of reads.
    pub miss_ratio: f64,
    /// Of the policy alone with as many blocks.
    pub policy_miss_ratio: f64,
    /// Blocks written to flash because they were read, and moved for the log's sake.
    pub fills: u64,
    pub moves: u64,
    pub squeezed: u64,
    /// Blocks that were to be written and were not, for lack of a slot or of time.
    pub fills_dropped: u64,
    /// Bytes of log.
    pub appended_bytes: u64,
}

/// A disk that counts what is read from it.
struct Counted {
    disk: SimDisk,
    read_bytes: Arc<AtomicU64>,
}

impl Disk for Counted {
    fn geometry(&self) -> DiskGeometry {
        self.disk.geometry()
    }

    fn submit(&mut self, operation: Operation<'_>, token: u64) {
        if operation.kind == OperationKind::Read {
            self.read_bytes.fetch_add(operation.length, Ordering::Relaxed);
        }
        self.disk.submit(operation, token);
    }

    fn poll(&mut self, completions: &mut Vec<Completion>, wait: bool) {
        self.disk.poll(completions, wait);
    }
}

/// Replays `trace` over a cache of `share` of its footprint: one request after the other, at the
/// trace's own times if it tells them, over disks that take no time.
///
/// # Errors
/// As of formatting and opening a cache: a share that is too small.
///
/// # Panics
/// If a request fails: the disks are without fault.
pub fn run(trace: &Trace, share: f64) -> Result<Report> {
    let footprint = simulate::footprint(trace, Writes::Kept);
    let cache_bytes = (footprint as f64 * share) as u64 * BLOCK_BYTES + MIB;
    let blocks = trace.accesses().map(|(block, _)| block + 1).max().unwrap_or(1);
    let size_bytes = blocks * BLOCK_BYTES;
    let (flash, backing) = (SimDisk::new(cache_bytes), SimDisk::new(size_bytes));
    let read_bytes = Arc::<AtomicU64>::default();
    let opened = new_cache(&flash, size_bytes)?;
    let disk = CachedDisk::new(opened, options(), backing.geometry(), None);
    let status = disk.status();
    let counted = Counted { disk: backing, read_bytes: read_bytes.clone() };
    let (send, receiver) = inbox();
    let mut reactor = SimReactor::new(disk, vec![Box::new(flash), Box::new(counted)], receiver, 64);
    let mut reads = 0;
    let mut bytes = Vec::new();
    for (due, request) in times(trace).zip(&trace.requests) {
        reactor.rest(due.since(reactor.now()));
        let mut at = request.blocks();
        let Some(first) = at.next() else { continue };
        let count = 1 + at.count() as u64;
        bytes.resize((count * BLOCK_BYTES) as usize, 0);
        let outcome = match request.write {
            true => reactor.write(first * 8, &bytes),
            false => {
                reads += count;
                reactor.read(first * 8, &mut bytes)
            }
        };
        assert_eq!(outcome, Outcome::Done, "disks without fault fail nothing");
    }
    send(Box::new(CacheMessage::Status { reply: Box::new(|()| ()) }));
    reactor.turn(false);
    let misses = read_bytes.load(Ordering::Relaxed) / BLOCK_BYTES;
    let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let counters = &status.counters;
    Ok(Report {
        trace: trace.name.clone(),
        cache_bytes,
        reads,
        misses,
        miss_ratio: misses as f64 / reads.max(1) as f64,
        policy_miss_ratio: policy(trace, share),
        fills: value(&counters.fills),
        moves: value(&counters.moves),
        squeezed: value(&counters.squeezed),
        fills_dropped: value(&counters.fills_dropped),
        appended_bytes: value(&counters.appended_bytes),
    })
}

/// When the requests come.
fn times(trace: &Trace) -> impl Iterator<Item = Nanos> {
    let micros = |request: Option<&Request>| request.map_or(0, |request| request.micros);
    let (first, last) = (micros(trace.requests.first()), micros(trace.requests.last()));
    (0..).zip(&trace.requests).map(move |(number, request)| match last > first {
        true => Nanos(request.micros.saturating_sub(first) * 1000),
        false => Nanos(number * UNTIMED_NANOS),
    })
}

fn options() -> CacheOptions {
    CacheOptions { wall_ms: || 0, now: || Nanos(0), ..CacheOptions::new("trace") }
}

fn new_cache(flash: &SimDisk, backing_bytes: u64) -> Result<Opened> {
    let bytes = flash.geometry().size_bytes;
    let backing =
        BackingIdentity { size_bytes: backing_bytes, block_bytes: 512, ..Default::default() };
    let mut medium = Medium::new(Box::new(flash.clone()), Place::whole(bytes));
    let options = FormatOptions {
        shape: Shape::of(bytes)?,
        log_uuid: [1; 16],
        disk_uuid: [2; 16],
        secret: 0x5eed,
        mode: Mode::WriteBack,
        backing,
        overwrite: false,
    };
    format(&mut medium, &options)?;
    open(&mut medium, &OpenOptions::new(backing, bytes))
}

fn policy(trace: &Trace, share: f64) -> f64 {
    let options = Options { writes: Writes::Kept, ..Options::default() };
    let points = simulate::run(trace, &options);
    let point = points.iter().find(|point| point.policy == "vflash" && point.share == share);
    point.map_or(f64::NAN, simulate::Point::miss_ratio)
}
