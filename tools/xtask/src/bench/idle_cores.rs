//! What it costs to wake a thread that sleeps on the other core.
//!
//! An idle core of a virtual machine halts, and waking it takes its hypervisor tens of
//! microseconds; on a hypervisor host, which vflash is made for, it takes about two. Where Linux
//! lets us, idle cores look for work for up to 1 ms before they halt while a benchmark runs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::eventfd::EventFd;
use nix::unistd::Pid;

const POLL: &str = "/sys/module/haltpoll/parameters/guest_halt_poll_ns";
const POLL_NS: u64 = 1_000_000;

/// Round trips that are measured.
const ROUNDS: usize = 2000;

/// Idle cores poll for as long as this lives, if they can.
pub(crate) struct IdleCores {
    before: Option<u64>,
}

impl IdleCores {
    /// `halt`: leave them as they are.
    pub(crate) fn prepare(halt: bool) -> Self {
        let now = std::fs::read_to_string(POLL).ok().and_then(|text| text.trim().parse().ok());
        let before = now.filter(|now: &u64| !halt && *now < POLL_NS);
        // Only root may.
        let before = before.filter(|_| std::fs::write(POLL, POLL_NS.to_string()).is_ok());
        Self { before }
    }

    /// For the head of a report.
    pub(crate) fn describe(&self) -> Result<String> {
        let micros = round_trip()?.as_secs_f64() * 1e6;
        let how = match self.before {
            Some(_) => "Idle cores poll for up to 1 ms before they halt",
            None => "Idle cores as the machine has them",
        };
        Ok(format!("{how}: waking the other core and being woken takes {micros:.0} µs"))
    }
}

impl Drop for IdleCores {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            // Nothing more can be done about it here.
            let _ = std::fs::write(POLL, before.to_string());
        }
    }
}

fn pin(core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// Median time of waking a thread on core 1 from core 0 and being woken by it.
fn round_trip() -> Result<Duration> {
    let pair = Arc::new((EventFd::new()?, EventFd::new()?));
    let theirs = pair.clone();
    // Threads of their own: the caller keeps its cores.
    let echo = std::thread::spawn(move || -> Result<()> {
        pin(1)?;
        for _ in 0..ROUNDS {
            theirs.0.read()?;
            theirs.1.write(1)?;
        }
        Ok(())
    });
    let caller = std::thread::spawn(move || -> Result<Vec<Duration>> {
        pin(0)?;
        let mut times = Vec::with_capacity(ROUNDS);
        for _ in 0..ROUNDS {
            let begun = Instant::now();
            pair.0.write(1)?;
            pair.1.read()?;
            times.push(begun.elapsed());
        }
        Ok(times)
    });
    let joined = |_| anyhow::anyhow!("a thread that measures wake-ups panicked");
    let mut times = caller.join().map_err(joined)??;
    echo.join().map_err(joined)??;
    times.sort_unstable();
    Ok(times[times.len() / 2])
}
