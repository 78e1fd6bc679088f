//! `vflash pool`: with a daemon, or without one on a device that nobody holds.

use crate::arguments::{CreateArguments, Format};
use crate::client::{Client, device_path, pool_path};
use crate::output::{Progress, duration, print, size};
use crate::tables;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};
use vflash::control::api::{
    Check, ClosePool, CreatePool, ErrorCode, Failure, Pool, Pools, Preallocation,
};
use vflash::control::pool::{NewPool, OpenPool, is_null};
use vflash::flash::{self, CheckProgress};
use vflash::io::file::FileDisk;

type Result<T> = std::result::Result<T, Failure>;

/// How often the daemon is asked how far scrubbing is.
const SCRUB_POLL: Duration = Duration::from_millis(500);

/// Whoever only looks at a device for a moment is waited for, and what a killed daemon left.
pub(crate) const HELD_WAIT: Duration = Duration::from_secs(1);

/// How often a check's progress is shown.
const CHECK_POLL: Duration = Duration::from_millis(200);

pub(crate) fn create(client: &Client, format: Format, arguments: &CreateArguments) -> Result<()> {
    let device = absolute(&arguments.device)?;
    let size_bytes = arguments.size.map(|size| size.0);
    let preallocation = Preallocation::from(arguments.preallocate);
    let progress = Progress::new();
    if let (Preallocation::Written, Some(bytes)) = (preallocation, size_bytes) {
        progress.show(&format!("writing {} of zeros to {device}", size(bytes)));
    }
    let pool: Pool = arguments.consent.obtain(|confirm| {
        let request = CreatePool {
            name: arguments.name.clone(),
            device: device.clone(),
            size_bytes,
            preallocation,
            confirm,
        };
        if !arguments.offline && client.daemon_runs() {
            client.post("/v1/pools", Some(&request))
        } else {
            create_offline(&request)
        }
    })?;
    drop(progress);
    print(format, &pool, tables::pool)
}

/// Devices are named to a daemon that works in another directory.
fn absolute(device: &Path) -> Result<String> {
    let wrong = |why: String| {
        Failure::new(ErrorCode::Invalid, format!("device {}: {why}", device.display()))
    };
    let text = device.to_str().ok_or_else(|| {
        wrong("its path is not UTF-8, which the API cannot carry: link it to a plain name".into())
    })?;
    if is_null(text) {
        return Ok(text.to_owned());
    }
    let path = std::path::absolute(device).map_err(|error| wrong(error.to_string()))?;
    path.into_os_string().into_string().map_err(|_| {
        wrong("the current directory's path is not UTF-8: name the device from the root".into())
    })
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
    let path = listed_path(name)?;
    let mut pool: Pool = client.get(&path)?;
    if wait {
        let begun = Instant::now();
        let first = left_to_scrub(&pool);
        let progress = Progress::new();
        while left_to_scrub(&pool) > 0 {
            if let Some(message) = &pool.message {
                return Err(Failure::new(ErrorCode::Io, format!("pool {name}: {message}")));
            }
            let left = left_to_scrub(&pool);
            progress.show(&progress_line("scrubbing", (first, left), begun.elapsed()));
            std::thread::sleep(SCRUB_POLL);
            pool = client.get(&path)?;
        }
    }
    print(format, &pool, tables::pool)
}

fn left_to_scrub(pool: &Pool) -> u64 {
    pool.space.as_ref().map_or(0, |space| space.scrub_bytes)
}

/// The share done, what is left of the bytes there were at first, and for how long.
fn progress_line(what: &str, (first, left): (u64, u64), elapsed: Duration) -> String {
    let done = first.saturating_sub(left);
    let percent = u128::from(done) * 100 / u128::from(first.max(1));
    let mut line = format!("{what}: {percent}%, {} left", size(left));
    if done > 0 {
        let remaining = elapsed.as_secs_f64() * left as f64 / done as f64;
        line.push_str(&format!(", {}", duration(Duration::from_secs_f64(remaining.min(1e9)))));
    }
    line
}

/// True if nothing was found.
pub(crate) fn check(client: &Client, format: Format, pool: &str) -> Result<bool> {
    let begun = Instant::now();
    let progress = Progress::new();
    progress.show(&format!("checking {pool}"));
    let show = |line: &str| progress.show(line);
    // A path is a device; a pool's name has no slash.
    let check: Check = if pool.contains('/') {
        let disk = FileDisk::open_looking(Path::new(pool), HELD_WAIT)?;
        let read = CheckProgress::default();
        let check = || flash::Pool::check_offline(Box::new(disk), &read);
        let report = watched(check, || read.bytes(), show);
        Check::from_report(pool, report.map_err(|error| error.context(pool))?)
    } else {
        let path = pool_path(pool)?;
        let check = || client.ask(&format!("{path}/check"), None::<&()>);
        let read = || {
            let pool: Option<Pool> = progress.is_shown().then(|| client.get(&path).ok()).flatten();
            pool?.check.map(|check| (check.done_bytes, check.total_bytes))
        };
        watched(check, read, show)?
    };
    progress.end(&format!("checked {pool} in {}", duration(begun.elapsed())));
    print(format, &check, tables::check)?;
    Ok(check.clean)
}

/// Runs `work`. Meanwhile `show` gets a line now and then that says how many bytes of how many are
/// done, by `bytes`.
fn watched<R: Send>(
    work: impl FnOnce() -> R + Send,
    bytes: impl Fn() -> Option<(u64, u64)>,
    show: impl Fn(&str),
) -> R {
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let (done, ended) = channel::<()>();
        let working = scope.spawn(move || {
            // Dropped at the end, also at a panic: that is the message.
            let _done = done;
            work()
        });
        while ended.recv_timeout(CHECK_POLL) == Err(RecvTimeoutError::Timeout) {
            if let Some((done, total)) = bytes() {
                let left = total.saturating_sub(done);
                show(&progress_line("checking", (total, left), begun.elapsed()));
            }
        }
        working.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// Of a pool as it is listed: by the path of its device if it could not be opened and nobody knows
/// its name.
fn listed_path(name: &str) -> Result<String> {
    match name.contains('/') {
        true => Ok(device_path(&absolute(Path::new(name))?)),
        false => pool_path(name),
    }
}

pub(crate) fn grow(client: &Client, format: Format, name: &str) -> Result<()> {
    let pool: Pool = client.post(&format!("{}/grow", pool_path(name)?), None::<&()>)?;
    print(format, &pool, tables::pool)
}

pub(crate) fn close(client: &Client, format: Format, name: &str, force: bool) -> Result<()> {
    let path = format!("{}/close", listed_path(name)?);
    let pools: Pools = client.post(&path, Some(&ClosePool { force }))?;
    print(format, &pools, tables::pools)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn devices_are_named_from_anywhere() {
        use std::os::unix::ffi::OsStrExt;
        assert_eq!(absolute(Path::new("/dev/x")).unwrap(), "/dev/x");
        assert_eq!(absolute(Path::new("null:8GiB")).unwrap(), "null:8GiB");
        let here = std::env::current_dir().unwrap().join("pool.img");
        assert_eq!(Path::new(&absolute(Path::new("pool.img")).unwrap()), here);
        let strange = Path::new(std::ffi::OsStr::from_bytes(b"/dev/\xff"));
        let failure = absolute(strange).unwrap_err();
        assert_eq!(failure.code, ErrorCode::Invalid);
        assert!(failure.message.contains("not UTF-8"), "{failure}");
    }

    #[test]
    fn scrubbing_shows_share_rest_and_time() {
        let line = |first, left, elapsed| progress_line("scrubbing", (first, left), elapsed);
        let quarter = line(100 << 30, 75 << 30, Duration::from_secs(60));
        assert_eq!(quarter, "scrubbing: 25%, 75GiB left, 3m00s");
        assert_eq!(line(1 << 30, 1 << 30, Duration::ZERO), "scrubbing: 0%, 1GiB left");
        assert!(line(0, 1 << 30, Duration::MAX).starts_with("scrubbing: 0%"));
    }

    #[test]
    fn work_that_takes_long_is_shown_until_it_ends() {
        let (asked, answered) = channel();
        let lines = RefCell::new(Vec::new());
        let work = move || (0..3).map(|_| answered.recv().unwrap()).sum::<u64>();
        let bytes = || {
            let done = lines.borrow().len() as u64 * (25 << 20);
            // The work may have ended by now.
            let _ = asked.send(1);
            Some((done, 100 << 20))
        };
        let result = watched(work, bytes, |line| lines.borrow_mut().push(line.to_owned()));
        assert_eq!(result, 3);
        let lines = lines.into_inner();
        assert!(lines.len() >= 3, "{lines:?}");
        for (line, start) in lines.iter().zip(["0%, 100MiB", "25%, 75MiB", "50%, 50MiB"]) {
            assert!(line.starts_with(&format!("checking: {start} left")), "{lines:?}");
        }
    }
}
