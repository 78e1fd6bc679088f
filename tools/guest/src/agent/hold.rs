//! Reads whose data stays in memory: threads read blocks that [`super::disk::fill`] stamped into
//! ever the same places and check, before a place is read into again, that it still holds what the
//! disk put there. So memory that a migration failed to carry over is found.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail};
use fastrand::Rng;
use vflash_guest::reply::Reply;
use vflash_guest::stamp::{self, Stamp};

use super::disk::{BUFFER_BYTES, Buffer, open_direct};
use super::options::Options;

/// Places that each thread reads into.
const PLACES: usize = 32;

/// Readers that go on until they are stopped.
pub(crate) struct Hold {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    file: File,
    run: u64,
    blocks: u64,
    stop: AtomicBool,
    reads: AtomicU64,
    errors: AtomicU64,
    wrong: AtomicU64,
}

/// A place and the address of the block that was read into it.
type Place = (Box<Buffer>, Option<u64>);

impl Hold {
    /// Starts `depth=` readers of the first `bytes=`, which were filled with `run=`.
    pub(crate) fn start(options: &Options) -> Result<Self> {
        let blocks = options.number("bytes")? / BUFFER_BYTES as u64;
        if blocks == 0 {
            bail!("bytes= is less than one block");
        }
        let shared = Arc::new(Shared {
            file: open_direct(&options.path()?, false)?,
            run: options.number("run")?,
            blocks,
            stop: AtomicBool::new(false),
            reads: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            wrong: AtomicU64::new(0),
        });
        let workers = (0..options.number("depth")?)
            .map(|seed| {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || shared.read_until_stopped(Rng::with_seed(seed)))
            })
            .collect();
        Ok(Self { shared, workers })
    }

    pub(crate) fn status(&self) -> Reply {
        Reply::new()
            .with("reads", self.shared.reads.load(Relaxed))
            .with("errors", self.shared.errors.load(Relaxed))
            .with("wrong", self.shared.wrong.load(Relaxed))
    }

    /// Ends the readers and checks all places once more.
    pub(crate) fn stop(mut self) -> Result<Reply> {
        self.shared.stop.store(true, Relaxed);
        for worker in self.workers.drain(..) {
            worker.join().ok().context("a reader panicked; see the console")?;
        }
        Ok(self.status())
    }
}

impl Shared {
    fn read_until_stopped(&self, mut random: Rng) {
        let mut places: Vec<Place> = (0..PLACES).map(|_| (Buffer::new(), None)).collect();
        while !self.stop.load(Relaxed) {
            let place = &mut places[random.usize(..PLACES)];
            self.check(place);
            let address = random.u64(..self.blocks) * BUFFER_BYTES as u64;
            let read = self.file.read_exact_at(place.0.first(BUFFER_BYTES), address);
            self.reads.fetch_add(1, Relaxed);
            place.1 = read.is_ok().then_some(address);
            if read.is_err() {
                self.errors.fetch_add(1, Relaxed);
            }
        }
        places.iter_mut().for_each(|place| self.check(place));
    }

    fn check(&self, (buffer, address): &mut Place) {
        let Some(address) = *address else { return };
        let expected = Stamp { run: self.run, address, sequence: 1 };
        if stamp::first_mismatch(buffer.first(BUFFER_BYTES), expected).is_some() {
            self.wrong.fetch_add(1, Relaxed);
        }
    }
}
