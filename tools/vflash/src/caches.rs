//! Cached disks: draining, points, modes, and the ways out.

use crate::arguments::{DetachArguments, DrainArguments, Format, ModeArguments};
use crate::client::{Client, volume_path};
use crate::consent;
use crate::output::{Progress, Table, duration, print, size};
use crate::tables;
use std::time::{Duration, Instant};
use vflash::control::api::{ErrorCode, Failure, Plan, Volume};
use vflash::control::api_cached::{
    Cache, CacheState, Detach, Drain, Draining, Mark, Point, PointKind, Points, SetMode,
};

type Result<T> = std::result::Result<T, Failure>;

/// How often the daemon is asked how far it is.
const POLL: Duration = Duration::from_millis(200);

pub(crate) fn drain(client: &Client, format: Format, arguments: &DrainArguments) -> Result<()> {
    let path = volume_path(&arguments.volume)?;
    let DrainArguments { to, point, hold, wait, .. } = arguments;
    let request = Drain { to: *to, point: point.clone(), hold: *hold };
    let mut draining: Draining = client.post(&format!("{path}/drain"), Some(&request))?;
    if *wait {
        draining = wait_for(client, &arguments.volume, draining)?;
    }
    print(format, &draining, |draining| {
        let Draining { target_won, drained_won, done } = draining;
        match done {
            true => format!("{} is drained to point {drained_won}\n", arguments.volume),
            false => format!(
                "{} is being drained to point {target_won}; it is at {drained_won}\n",
                arguments.volume
            ),
        }
    })
}

/// Waits until the backing is at the target.
fn wait_for(client: &Client, name: &str, mut draining: Draining) -> Result<Draining> {
    let progress = Progress::new();
    loop {
        let cache = cache_of(client, name)?;
        draining.drained_won = cache.drained_won;
        draining.done = cache.drained_won >= draining.target_won;
        if draining.done {
            return Ok(draining);
        }
        if let (CacheState::Fenced | CacheState::Failed, message) = (cache.state, &cache.message) {
            let text = format!("{name}: {}", message.as_deref().unwrap_or("it is not served"));
            return Err(Failure::new(ErrorCode::Fenced, text));
        }
        progress.show(&drain_line(&cache));
        std::thread::sleep(POLL);
    }
}

fn drain_line(cache: &Cache) -> String {
    let mut line = format!("draining: {} left", size(cache.dirty_bytes));
    if cache.drain_rate_bytes > 0 {
        line.push_str(&format!(", {}/s", size(cache.drain_rate_bytes)));
    }
    if let Some(eta_ms) = cache.drain_eta_ms {
        line.push_str(&format!(", {}", duration(Duration::from_millis(eta_ms))));
    }
    if cache.state == CacheState::WaitingForBacking {
        line.push_str("; the backing fails and is tried again");
    }
    line
}

fn cache_of(client: &Client, name: &str) -> Result<Cache> {
    let volume: Volume = client.get(&volume_path(name)?)?;
    volume.cache.ok_or_else(|| {
        Failure::new(ErrorCode::Invalid, format!("{name} is a flash volume: it has no backing"))
    })
}

pub(crate) fn points(client: &Client, format: Format, name: &str) -> Result<()> {
    let points: Points = client.get(&format!("{}/points", volume_path(name)?))?;
    print(format, &points, points_table)
}

fn points_table(Points { points }: &Points) -> String {
    let mut table = Table::new(&["POINT", "WHAT"]);
    for point in points {
        let what = match (point.kind, &point.name, point.epoch) {
            (PointKind::Drained, ..) => "the backing is here".to_owned(),
            (PointKind::Head, ..) => "the newest committed write".to_owned(),
            (PointKind::Flush, _, epoch) => {
                format!("FLUSH of the guest, end of epoch {}", epoch.unwrap_or(0))
            }
            (PointKind::Mark, name, _) => format!("`{}`", name.as_deref().unwrap_or("")),
        };
        table.row([point.won.to_string(), what]);
    }
    table.render()
}

pub(crate) fn mark(client: &Client, format: Format, name: &str, mark: &str) -> Result<()> {
    let request = Mark { name: mark.to_owned() };
    let point: Point = client.post(&format!("{}/mark", volume_path(name)?), Some(&request))?;
    print(format, &point, |point| format!("point {} of {name} is `{mark}`\n", point.won))
}

pub(crate) fn checkpoint(client: &Client, format: Format, name: &str) -> Result<()> {
    let path = format!("{}/checkpoint", volume_path(name)?);
    let volume: Volume = client.post(&path, None::<&()>)?;
    print(format, &volume, |volume| format!("{} is checkpointed\n", volume.name))
}

pub(crate) fn mode(client: &Client, format: Format, arguments: &ModeArguments) -> Result<()> {
    let name = &arguments.volume;
    let mode = arguments.mode.into();
    let path = format!("{}/mode", volume_path(name)?);
    let mut volume: Volume = client.post(&path, Some(&SetMode { mode }))?;
    let progress = Progress::new();
    // Leaving write-back drains first.
    while let Some(cache) = volume.cache.as_ref().filter(|cache| cache.mode != mode) {
        if matches!(cache.state, CacheState::Fenced | CacheState::Failed) {
            let why = cache.message.clone().unwrap_or_default();
            let text = format!("{name} stays in mode {}: {why}", cache.mode.name());
            return Err(Failure::new(ErrorCode::Fenced, text));
        }
        progress.show(&drain_line(cache));
        std::thread::sleep(POLL);
        volume = client.get(&volume_path(name)?)?;
    }
    drop(progress);
    print(format, &volume, |volume| format!("{} is in mode {}\n", volume.name, mode.name()))
}

/// Waits until the cache has the size that was asked for.
pub(crate) fn resized(
    client: &Client,
    format: Format,
    mut volume: Volume,
    size_bytes: u64,
) -> Result<()> {
    let progress = Progress::new();
    while let Some(cache) = volume.cache.as_ref().filter(|cache| cache.size_bytes != size_bytes) {
        if cache.resizing_to_bytes != Some(size_bytes) && cache.leaving_bytes == 0 {
            let (name, has) = (&volume.name, size(cache.size_bytes));
            let text = format!("{name} keeps its cache of {has}: `vflash events` tells why");
            return Err(Failure::new(ErrorCode::Busy, text));
        }
        let left = size(cache.leaving_bytes);
        progress.show(&format!("shrinking: {left} in use; {}", drain_line(cache)));
        std::thread::sleep(POLL);
        volume = client.get(&volume_path(&volume.name)?)?;
    }
    drop(progress);
    print(format, &volume, |volume| format!("{} is cached in {}\n", volume.name, size(size_bytes)))
}

/// Drains a cached disk and takes it off its backing.
pub(crate) fn detach(
    client: &Client,
    format: Format,
    name: &str,
    arguments: &DetachArguments,
) -> Result<()> {
    let path = format!("{}/detach", volume_path(name)?);
    let plan: Plan = if arguments.lost {
        consent::obtain_named(&arguments.confirm, |confirm| {
            client.post(&path, Some(&Detach { lost: true, confirm }))
        })?
    } else {
        detach_clean(client, name, &path)?
    };
    print(format, &plan, tables::plan)
}

/// The daemon drains for a while in each call; meanwhile it says how much is left.
fn detach_clean(client: &Client, name: &str, path: &str) -> Result<Plan> {
    let progress = Progress::new();
    let mut seen: Option<(u64, Instant)> = None;
    loop {
        let failure = match client.post(path, Some(&Detach::default())) {
            Err(failure) if failure.code == ErrorCode::Busy => failure,
            result => return result,
        };
        let cache = cache_of(client, name)?;
        if matches!(cache.state, CacheState::Failed | CacheState::Opening) {
            return Err(failure);
        }
        progress.show(&drain_line(&cache));
        let moved = seen.is_none_or(|(drained, _)| cache.drained_won > drained);
        match &seen {
            Some((_, since)) if !moved && since.elapsed() > STUCK => return Err(failure),
            Some(_) if !moved => {}
            _ => seen = Some((cache.drained_won, Instant::now())),
        }
        std::thread::sleep(POLL);
    }
}

/// A drain that does not move for so long waits for something that a person must do.
const STUCK: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_told_in_words() {
        let point = |won, kind| Point { won, kind, name: None, epoch: None };
        let points = vec![
            point(3, PointKind::Drained),
            Point { epoch: Some(2), ..point(5, PointKind::Flush) },
            Point { name: Some("before upgrade".into()), ..point(9, PointKind::Mark) },
            point(12, PointKind::Head),
        ];
        let text = "POINT  WHAT\n3      the backing is here\n5      FLUSH of the guest, end of \
                    epoch 2\n9      `before upgrade`\n12     the newest committed write\n";
        assert_eq!(points_table(&Points { points }), text);
    }
}
