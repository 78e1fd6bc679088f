//! Where on the drive the file volume lies: all peers use the same bytes of the same file.
//!
//! A virtual machine's drive is faster in some places than in others, up to twice; two files are
//! two places.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vflash::base::units::EXTENT_BYTES;
use vflash::flash::Pool;
use vflash::io::file::FileDisk;

/// A range of a file.
pub(crate) struct Place {
    pub(crate) file: PathBuf,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

impl Place {
    /// Of the allocation `name` of a pool that no daemon holds.
    pub(crate) fn of(pool: &Path, name: &str) -> Result<Self> {
        let disk = FileDisk::open(pool, Duration::from_secs(10))?;
        let opened = Pool::open(Box::new(disk))?;
        let allocation = opened.find(name).with_context(|| format!("the pool has no {name}"))?;
        let runs: Vec<_> = allocation.runs().collect();
        let [run] = runs[..] else {
            anyhow::bail!("{name} lies in {} pieces of the pool, not in one", runs.len());
        };
        let bytes = run.count * EXTENT_BYTES;
        ensure!(bytes == allocation.size_bytes, "{name} is not mapped whole");
        Ok(Self { file: pool.to_owned(), offset: run.physical * EXTENT_BYTES, bytes })
    }

    /// The options of fio for it.
    pub(crate) fn fio_options(&self) -> [String; 3] {
        [
            format!("--filename={}", self.file.display()),
            format!("--offset={}", self.offset),
            format!("--size={}", self.bytes),
        ]
    }
}
