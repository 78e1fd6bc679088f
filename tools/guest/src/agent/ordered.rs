//! Writes in an order that can be told from the disk (`vflash_guest::ordered`).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use vflash_guest::ordered::{BLOCK_BYTES, Ordered};
use vflash_guest::reply::Reply;
use vflash_guest::stamp;

use super::disk::{Buffer, open_direct};
use super::options::Options;

/// A writer that goes on until it is stopped.
pub(crate) struct Writer {
    shared: Arc<Shared>,
    thread: JoinHandle<Result<()>>,
}

struct Shared {
    file: File,
    ordered: Ordered,
    stop: AtomicBool,
    /// The last write that has ended.
    written: AtomicU64,
    /// The last one that a flush has covered.
    flushed: AtomicU64,
}

impl Writer {
    /// Starts on a disk: `bytes=`, `run=`, `flush=`.
    pub(crate) fn start(options: &Options) -> Result<Self> {
        let ordered = Ordered {
            bytes: options.number("bytes")?,
            run: options.number("run")?,
            flush: options.number("flush")?,
        };
        let shared = Arc::new(Shared {
            file: open_direct(&options.path()?, false)?,
            ordered,
            stop: AtomicBool::new(false),
            written: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
        });
        let writer = Arc::clone(&shared);
        Ok(Self { shared, thread: std::thread::spawn(move || writer.run()) })
    }

    pub(crate) fn status(&self) -> Reply {
        Reply::new()
            .with("written", self.shared.written.load(Relaxed))
            .with("flushed", self.shared.flushed.load(Relaxed))
    }

    /// Ends the writer; an error if any write or flush failed.
    pub(crate) fn stop(self) -> Result<Reply> {
        self.shared.stop.store(true, Relaxed);
        self.thread.join().ok().context("the writer panicked; see the console")??;
        Ok(Reply::new()
            .with("written", self.shared.written.load(Relaxed))
            .with("flushed", self.shared.flushed.load(Relaxed)))
    }
}

impl Shared {
    fn run(&self) -> Result<()> {
        let mut buffer = Buffer::new();
        for number in 1.. {
            if self.stop.load(Relaxed) {
                break;
            }
            let stamp = self.ordered.stamp(number);
            let block = buffer.first(BLOCK_BYTES);
            stamp::write_block(block, stamp);
            self.file.write_all_at(block, stamp.address).context("an ordered write")?;
            self.written.store(number, Relaxed);
            if number.is_multiple_of(self.ordered.flush) {
                self.file.sync_data().context("an ordered flush")?;
                self.flushed.store(number, Relaxed);
            }
        }
        self.file.sync_data().context("the last flush")
    }
}
