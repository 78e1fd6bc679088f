//! Where one run keeps its files; gone when it ends, by a signal too.

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vflash_guest::scratch::{ScratchDir, remove_all};

pub(crate) struct Scratch {
    /// For pools.
    pub(crate) data: ScratchDir,
    /// For sockets.
    pub(crate) run: ScratchDir,
}

impl Scratch {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { data: ScratchDir::for_data()?, run: ScratchDir::for_sockets()? })
    }
}

/// Children end with us; our directories are removed here.
pub(crate) fn clean_up_on_signals() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("listen for signals")?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            remove_all();
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}
