//! How much other work ran on the two cores while something was measured.

use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// The unit of /proc/stat: 100 per second on every Linux that vflash runs on (`USER_HZ`).
const TICK: Duration = Duration::from_millis(10);

/// CPU time used on cores 0 and 1 at one moment, by all and by us.
pub(crate) struct Usage {
    all: Duration,
    ours: Duration,
    idle: Duration,
}

impl Usage {
    /// Now. Ours is what `servers` and all children that have ended used.
    pub(crate) fn now(servers: &[u32]) -> Result<Self> {
        let stat = std::fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        let (all, idle) = cores(&stat).context("/proc/stat has no lines of cores 0 and 1")?;
        let children = getrusage(UsageWho::RUSAGE_CHILDREN)?;
        let mut ours = Duration::ZERO;
        for time in [children.user_time(), children.system_time()] {
            ours += Duration::from_micros(time.tv_sec() as u64 * 1_000_000 + time.tv_usec() as u64);
        }
        for pid in servers {
            let clock = clock_getcpuclockid(Pid::from_raw(pid.cast_signed()))?;
            ours += Duration::from(clock_gettime(clock)?);
        }
        Ok(Self { all, ours, idle })
    }

    /// The share of both cores since `before` that was neither idle nor ours: other processes,
    /// interrupts, and what the hypervisor took.
    pub(crate) fn others_since(&self, before: &Self) -> f64 {
        let all = self.all - before.all;
        let idle = self.idle - before.idle;
        let ours = self.ours - before.ours;
        all.saturating_sub(idle + ours).as_secs_f64() / all.as_secs_f64().max(0.01)
    }
}

/// All time, and idle time, of cores 0 and 1.
fn cores(stat: &str) -> Option<(Duration, Duration)> {
    let (mut all, mut idle) = (Duration::ZERO, Duration::ZERO);
    for name in ["cpu0 ", "cpu1 "] {
        let line = stat.lines().find_map(|line| line.strip_prefix(name))?;
        // user nice system idle iowait irq softirq steal; what follows is part of user.
        let ticks: Vec<u32> =
            line.split_whitespace().take(8).map(str::parse).collect::<Result<_, _>>().ok()?;
        all += TICK * ticks.iter().sum();
        idle += TICK * (ticks.get(3)? + ticks.get(4)?);
    }
    Some((all, idle))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_neither_idle_nor_ours_is_others() {
        let stat = "cpu  9 9 9 9\ncpu0 10 0 20 30 5 0 5 30 7 7\ncpu1 50 0 0 40 0 0 0 10 0 0\n";
        assert_eq!(cores(stat), Some((TICK * 200, TICK * 75)));
        assert_eq!(cores("cpu0 1 2 3 4 5 6 7 8\n"), None);
        let second = Duration::from_secs;
        let before = Usage { all: second(10), ours: second(1), idle: second(5) };
        let after = Usage { all: second(20), ours: second(5), idle: second(8) };
        assert!((after.others_since(&before) - 0.3).abs() < 1e-9);
    }

    #[test]
    fn our_own_work_is_not_others() {
        let before = Usage::now(&[std::process::id()]).unwrap();
        while Usage::now(&[std::process::id()]).unwrap().ours - before.ours < second_tenth() {}
        let after = Usage::now(&[std::process::id()]).unwrap();
        assert!(after.ours - before.ours >= second_tenth());
        assert!((0.0..=1.0).contains(&after.others_since(&before)));
    }

    fn second_tenth() -> Duration {
        Duration::from_millis(100)
    }
}
