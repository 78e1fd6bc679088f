//! Verified load: as many threads as the queue is to be deep, each with blocks of its own, one
//! request at a time. A block's only writer knows which version must be there, so every read is
//! checked against the last acknowledged write.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use fastrand::Rng;
use vflash_guest::reply::Reply;
use vflash_guest::stamp::{self, Stamp};

use super::disk::{BUFFER_BYTES, Buffer, open_direct};
use super::options::Options;

/// A thread flushes once in so many requests.
const REQUESTS_PER_FLUSH: u64 = 64;

/// A load that runs until it is stopped.
pub(crate) struct Load {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    file: File,
    run: u64,
    block_bytes: usize,
    started: Instant,
    stop: AtomicBool,
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    /// Requests that the disk answered with an error.
    errors: AtomicU64,
    /// Reads that gave anything else than the last acknowledged write.
    lost: AtomicU64,
    /// Blocks read back and compared at the end.
    verified: AtomicU64,
    /// The longest time a request took.
    stall_ms: AtomicU64,
    /// For each worker, when its request began in ms since `started`, plus 1; 0: none runs.
    busy_since_ms: Vec<AtomicU64>,
    first_problem: Mutex<String>,
}

impl Load {
    /// Starts on a disk or a new file: `bytes=`, `depth=`, `block=`, `run=`.
    pub(crate) fn start(options: &Options) -> Result<Self> {
        let depth = options.number("depth")?;
        let block_bytes = options.number("block")? as usize;
        let bytes = options.number("bytes")?;
        let blocks = bytes / block_bytes as u64 / depth;
        if blocks == 0 || block_bytes > BUFFER_BYTES {
            bail!("no load of depth {depth} in {bytes} bytes by blocks of {block_bytes}");
        }
        let path = options.path()?;
        let is_file = !path.starts_with("/dev");
        let file = open_direct(&path, is_file)?;
        if is_file {
            file.set_len(bytes).context("make the file as long as the load's range")?;
        }
        let shared = Arc::new(Shared {
            file,
            run: options.number("run")?,
            block_bytes,
            started: Instant::now(),
            stop: AtomicBool::new(false),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            verified: AtomicU64::new(0),
            stall_ms: AtomicU64::new(0),
            busy_since_ms: (0..depth).map(|_| AtomicU64::new(0)).collect(),
            first_problem: Mutex::new(String::new()),
        });
        let workers = (0..depth)
            .map(|index| {
                let mut worker = Worker {
                    shared: Arc::clone(&shared),
                    index,
                    depth,
                    versions: vec![0; blocks as usize],
                    random: Rng::with_seed(shared.run ^ index),
                    buffer: Buffer::new(),
                };
                std::thread::spawn(move || worker.run())
            })
            .collect();
        Ok(Self { shared, workers })
    }

    /// What has been done so far.
    pub(crate) fn status(&self) -> Reply {
        let shared = &self.shared;
        let (reads, writes) = (shared.reads.load(Relaxed), shared.writes.load(Relaxed));
        Reply::new()
            .with("requests", reads + writes)
            .with("reads", reads)
            .with("writes", writes)
            .with("flushes", shared.flushes.load(Relaxed))
            .with("errors", shared.errors.load(Relaxed))
            .with("lost", shared.lost.load(Relaxed))
            .with("verified", shared.verified.load(Relaxed))
            .with("stall_ms", shared.longest_stall_ms())
            .with("first", shared.first_problem.lock().expect("no holder panics"))
    }

    /// Ends the load, reads back every block that was written, and gives the final figures.
    pub(crate) fn stop(mut self) -> Result<Reply> {
        self.shared.stop.store(true, Relaxed);
        for worker in self.workers.drain(..) {
            worker.join().ok().context("a thread of the load panicked; see the console")?;
        }
        Ok(self.status())
    }
}

impl Shared {
    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Includes the requests that have not come back yet.
    fn longest_stall_ms(&self) -> u64 {
        let now = self.now_ms();
        let waiting = self.busy_since_ms.iter().map(|since| match since.load(Relaxed) {
            0 => 0,
            since => (now + 1).saturating_sub(since),
        });
        waiting.fold(self.stall_ms.load(Relaxed), u64::max)
    }

    fn problem(&self, counter: &AtomicU64, what: String) {
        counter.fetch_add(1, Relaxed);
        let mut first = self.first_problem.lock().expect("no holder panics");
        if first.is_empty() {
            *first = what;
        }
    }
}

struct Worker {
    shared: Arc<Shared>,
    index: u64,
    depth: u64,
    /// The last acknowledged version of each own block; 0: none, or not known after an error.
    versions: Vec<u64>,
    random: Rng,
    buffer: Box<Buffer>,
}

impl Worker {
    fn run(&mut self) {
        let shared = Arc::clone(&self.shared);
        let mut sequence = 0;
        while !shared.stop.load(Relaxed) {
            sequence += 1;
            let block = self.random.usize(..self.versions.len());
            if self.versions[block] == 0 || self.random.bool() {
                self.write(block, sequence);
            } else {
                self.read(block);
                shared.reads.fetch_add(1, Relaxed);
            }
            if sequence % REQUESTS_PER_FLUSH == 0 {
                let flushed = self.timed(|shared, _| shared.file.sync_data());
                shared.flushes.fetch_add(1, Relaxed);
                if let Err(error) = flushed {
                    shared.problem(&shared.errors, format!("flush: {error}"));
                }
            }
        }
        for block in 0..self.versions.len() {
            if self.versions[block] != 0 {
                self.read(block);
                shared.verified.fetch_add(1, Relaxed);
            }
        }
    }

    fn write(&mut self, block: usize, sequence: u64) {
        let stamp = self.stamp(block, sequence);
        let shared = Arc::clone(&self.shared);
        stamp::write_block(self.buffer.first(shared.block_bytes), stamp);
        let written = self.timed(|shared, buffer| shared.file.write_all_at(buffer, stamp.address));
        shared.writes.fetch_add(1, Relaxed);
        self.versions[block] = sequence;
        if let Err(error) = written {
            // The disk may hold the old version or the new one.
            self.versions[block] = 0;
            shared.problem(&shared.errors, format!("write at {}: {error}", stamp.address));
        }
    }

    fn read(&mut self, block: usize) {
        let stamp = self.stamp(block, self.versions[block]);
        let shared = Arc::clone(&self.shared);
        let read = self.timed(|shared, buffer| shared.file.read_exact_at(buffer, stamp.address));
        if let Err(error) = read {
            shared.problem(&shared.errors, format!("read at {}: {error}", stamp.address));
            return;
        }
        let found = stamp::first_mismatch(self.buffer.first(shared.block_bytes), stamp);
        if let Some(what) = found {
            shared.problem(&shared.lost, what);
        }
    }

    fn stamp(&self, block: usize, sequence: u64) -> Stamp {
        let position = block as u64 * self.depth + self.index;
        let address = position * self.shared.block_bytes as u64;
        Stamp { run: self.shared.run, address, sequence }
    }

    fn timed(
        &mut self,
        request: impl FnOnce(&Shared, &mut [u8]) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        let shared = &self.shared;
        let since = shared.now_ms();
        let busy = &shared.busy_since_ms[self.index as usize];
        busy.store(since + 1, Relaxed);
        let result = request(shared, self.buffer.first(shared.block_bytes));
        busy.store(0, Relaxed);
        shared.stall_ms.fetch_max(shared.now_ms() - since, Relaxed);
        result
    }
}
