//! What another process has used.

use crate::Result;
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use std::time::Duration;

/// Time that all threads of `pid` spent on a CPU, those that have ended and the kernel's workers of
/// its rings included.
pub fn on_cpu(pid: u32) -> Result<Duration> {
    let clock: ClockId = clock_getcpuclockid(Pid::from_raw(pid.cast_signed()))
        .map_err(|error| format!("the CPU time of process {pid}: {error}"))?;
    Ok(Duration::from(clock_gettime(clock)?))
}

/// Resident memory of `pid`, in bytes.
pub fn resident_bytes(pid: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find(|line| line.starts_with("VmRSS:")).ok_or("no VmRSS line")?;
    let kib: u64 = line.split_whitespace().nth(1).ok_or("no VmRSS figure")?.parse()?;
    Ok(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_have_ended_count() {
        let me = std::process::id();
        let before = on_cpu(me).unwrap();
        let spin = Duration::from_millis(30);
        std::thread::spawn(move || {
            let begun = on_cpu_of_thread();
            while on_cpu_of_thread() - begun < spin {
                std::hint::spin_loop();
            }
        })
        .join()
        .unwrap();
        assert!(on_cpu(me).unwrap() - before >= spin);
        assert!(resident_bytes(me).unwrap() > 0);
    }

    fn on_cpu_of_thread() -> Duration {
        Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap())
    }
}
