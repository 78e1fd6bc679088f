//! `vflash pool`: with a daemon, or without one on a device that nobody holds.

use crate::arguments::{CreateArguments, Format};
use crate::client::{Client, pool_path};
use crate::output::{Progress, duration, print, size};
use crate::tables;
use std::path::Path;
use std::time::{Duration, Instant};
use vflash::control::api::{Check, ClosePool, CreatePool, ErrorCode, Failure, Pool, Pools};
use vflash::control::pool::{NewPool, OpenPool};
use vflash::flash;
use vflash::io::file::Device;

type Result<T> = std::result::Result<T, Failure>;

/// How often the daemon is asked how far scrubbing is.
const SCRUB_POLL: Duration = Duration::from_millis(500);

pub(crate) fn create(client: &Client, format: Format, arguments: &CreateArguments) -> Result<()> {
    let device = absolute(&arguments.device)?;
    let size_bytes = arguments.size.map(|size| size.0);
    let pool: Pool = arguments.consent.obtain(|confirm| {
        let request = CreatePool {
            name: arguments.name.clone(),
            device: device.clone(),
            size_bytes,
            confirm,
        };
        if !arguments.offline && client.daemon_runs() {
            client.post("/v1/pools", Some(&request))
        } else {
            create_offline(&request)
        }
    })?;
    print(format, &pool, tables::pool)
}

/// Devices are named to a daemon that works in another directory.
fn absolute(device: &Path) -> Result<String> {
    let path = std::path::absolute(device).map_err(|error| {
        Failure::new(ErrorCode::Invalid, format!("{}: {error}", device.display()))
    })?;
    Ok(path.display().to_string())
}

fn create_offline(request: &CreatePool) -> Result<Pool> {
    let new = NewPool::from(request);
    new.examine()?;
    let pool = OpenPool::create(&new)?;
    let report = pool.report();
    pool.stop();
    Ok(report)
}

pub(crate) fn show(client: &Client, format: Format, name: &str, wait: bool) -> Result<()> {
    let path = pool_path(name)?;
    let mut pool: Pool = client.get(&path)?;
    if wait {
        let begun = Instant::now();
        let first = left_to_scrub(&pool);
        let progress = Progress::new();
        while left_to_scrub(&pool) > 0 {
            if let Some(message) = &pool.message {
                return Err(Failure::new(ErrorCode::Io, format!("pool {name}: {message}")));
            }
            progress.show(&scrub_line(first, left_to_scrub(&pool), begun.elapsed()));
            std::thread::sleep(SCRUB_POLL);
            pool = client.get(&path)?;
        }
    }
    print(format, &pool, tables::pool)
}

fn left_to_scrub(pool: &Pool) -> u64 {
    pool.space.as_ref().map_or(0, |space| space.scrub_bytes)
}

fn scrub_line(first: u64, left: u64, elapsed: Duration) -> String {
    let done = first.saturating_sub(left);
    let percent = u128::from(done) * 100 / u128::from(first.max(1));
    let mut line = format!("scrubbing: {percent}%, {} left", size(left));
    if done > 0 {
        let remaining = elapsed.as_secs_f64() * left as f64 / done as f64;
        line.push_str(&format!(", {}", duration(Duration::from_secs_f64(remaining.min(1e9)))));
    }
    line
}

/// True if nothing was found.
pub(crate) fn check(client: &Client, format: Format, pool: &str) -> Result<bool> {
    let progress = Progress::new();
    progress.show(&format!("checking {pool}"));
    // A path is a device; a pool's name has no slash.
    let check: Check = if pool.contains('/') {
        let device = Device::open(pool, Duration::ZERO)?;
        Check::from_report(pool, flash::Pool::check_offline(device.disk))
    } else {
        client.post(&format!("{}/check", pool_path(pool)?), None::<&()>)?
    };
    drop(progress);
    print(format, &check, tables::check)?;
    Ok(check.clean)
}

pub(crate) fn grow(client: &Client, format: Format, name: &str) -> Result<()> {
    let pool: Pool = client.post(&format!("{}/grow", pool_path(name)?), None::<&()>)?;
    print(format, &pool, tables::pool)
}

pub(crate) fn close(client: &Client, format: Format, name: &str, force: bool) -> Result<()> {
    let path = format!("{}/close", pool_path(name)?);
    let pools: Pools = client.post(&path, Some(&ClosePool { force }))?;
    print(format, &pools, tables::pools)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scrubbing_shows_share_rest_and_time() {
        let line = scrub_line(100 << 30, 75 << 30, Duration::from_secs(60));
        assert_eq!(line, "scrubbing: 25%, 75GiB left, 3m00s");
        assert_eq!(scrub_line(1 << 30, 1 << 30, Duration::ZERO), "scrubbing: 0%, 1GiB left");
        assert!(scrub_line(0, 1 << 30, Duration::MAX).starts_with("scrubbing: 0%"));
    }
}
