//! Answers of the API for people.

use crate::output::{Table, duration, size, time};
use std::time::Duration;
use vflash::base::units::Bytes;
use vflash::control::api::{
    Action, Attachment, Check, Limits, Plan, Pool, Pools, Space, Status, Volume, Volumes, Waiting,
};
use vflash::control::api_cached::{Cache, CachedDisk};
use vflash::control::events::now_ms;

pub(crate) fn pools(Pools { pools }: &Pools) -> String {
    if pools.is_empty() {
        return "No pools.\n".to_owned();
    }
    let mut table = Table::new(&[
        "NAME",
        "DEVICE",
        "SIZE",
        "ALLOCATED",
        "FREE",
        "SCRUB",
        "SPACE",
        "VOLUMES",
        "STATE",
    ]);
    for pool in pools {
        let bytes = |field: fn(&Space) -> u64| {
            pool.space.as_ref().map_or("-".to_owned(), |space| size(field(space)))
        };
        table.row([
            pool.name.clone(),
            pool.device.clone(),
            bytes(|space| space.total_bytes),
            bytes(|space| space.allocated_bytes),
            bytes(|space| space.free_bytes),
            bytes(|space| space.scrub_bytes),
            pool.space.as_ref().map_or("-".to_owned(), |space| space.watermark.to_string()),
            pool.volumes.to_string(),
            pool.state.to_string(),
        ]);
    }
    table.render()
}

pub(crate) fn pool(pool: &Pool) -> String {
    let mut table = Table::plain();
    table.pair("Name", &pool.name);
    table.pair("UUID", if pool.uuid.is_empty() { "-" } else { &pool.uuid });
    table.pair("Device", &pool.device);
    table.pair("State", pool.state);
    if let Some(message) = &pool.message {
        table.pair("Problem", message);
    }
    if let Some(space) = &pool.space {
        table.pair("Size", size(space.total_bytes));
        table.pair("Allocated", size(space.allocated_bytes));
        table.pair("Free", size(space.free_bytes));
        table.pair("To be scrubbed", size(space.scrub_bytes));
        table.pair("Metadata", size(space.metadata_bytes));
        table.pair("Promised", asked(space.provisioned_bytes));
        table.pair("Watermark", space.watermark);
    }
    if pool.waiting_requests > 0 {
        table.pair("Waiting for space", format!("{} requests", pool.waiting_requests));
    }
    table.pair("Scrubbed since start", size(pool.scrubbed_bytes));
    table.pair("Volumes", pool.volumes);
    table.render()
}

pub(crate) fn volumes(Volumes { volumes }: &Volumes) -> String {
    if volumes.is_empty() {
        return "No volumes.\n".to_owned();
    }
    let mut table =
        Table::new(&["NAME", "POOL", "SIZE", "USED", "CLASS", "THIN", "ATTACHED", "STATE"]);
    for volume in volumes {
        table.row([
            volume.name.clone(),
            volume.pool.clone(),
            asked(volume.size_bytes),
            size(volume.mapped_bytes),
            volume.class.to_string(),
            yes_no(volume.thin),
            yes_no(volume.attached),
            volume.state.to_string(),
        ]);
    }
    table.render()
}

pub(crate) fn volume(volume: &Volume) -> String {
    let mut table = Table::plain();
    table.pair("Name", &volume.name);
    table.pair("Pool", &volume.pool);
    if let Some(home) = &volume.disk_of {
        table.pair("Disk of", home);
    }
    table.pair("Size", asked(volume.size_bytes));
    table.pair("Used", size(volume.mapped_bytes));
    table.pair("Class", volume.class);
    table.pair("Thin", yes_no(volume.thin));
    table.pair("Read-only", yes_no(volume.read_only));
    table.pair("Limits", limits(&volume.limits));
    table.pair("Serial", &volume.serial);
    table.pair("Socket", &volume.socket);
    table.pair("State", volume.state);
    if let Some(message) = &volume.message {
        table.pair("Problem", message);
    }
    let by = volume.peer_pid.map_or(String::new(), |pid| format!(", process {pid}"));
    table.pair("Attached", yes_no(volume.attached) + &by);
    table.pair("Queues running", volume.queues_running);
    if volume.pin_memory {
        let (pinned, all) = (size(volume.pinned_bytes), size(volume.memory_bytes));
        table.pair("Pinned memory", format!("{pinned} of {all}"));
    }
    table.pair("Bounced pieces", volume.bounced_pieces);
    if let Some(waiting) = &volume.waiting {
        table.pair("Waiting", self::waiting(*waiting));
    }
    table.pair("Write cache", if volume.write_cache { "on" } else { "off" });
    if let Some(cache) = &volume.cache {
        self::cache(cache, &mut table);
    }
    let mut operations = Table::new(&["  OPERATION", "COUNT", "BYTES", "ERRORS"]);
    for counted in &volume.operations {
        operations.row([
            format!("  {}", counted.kind),
            counted.operations.to_string(),
            size(counted.bytes),
            counted.errors.to_string(),
        ]);
    }
    table.render() + &operations.render()
}

fn waiting(Waiting { requests, oldest_ms }: Waiting) -> String {
    let oldest = duration(Duration::from_millis(oldest_ms));
    format!("{requests} requests, the oldest for {oldest}")
}

fn cache(cache: &Cache, table: &mut Table) {
    table.pair("Backing", &cache.backing);
    if cache.doors.len() > 1 {
        table.pair("Shared by", cache.doors.join(", "));
    }
    table.pair("Sidecar", cache.sidecar.as_deref().unwrap_or("-"));
    let mut cache_size = asked(cache.size_bytes);
    if let Some(to) = cache.resizing_to_bytes {
        let left = size(cache.leaving_bytes);
        cache_size.push_str(&format!(", being brought to {}: {left} in use there", asked(to)));
    }
    table.pair("Cache", cache_size);
    if let Some(share) = &cache.share {
        let (least, most) = (asked(share.minimum_bytes), asked(share.maximum_bytes));
        let goal =
            share.goal_bytes.map_or(String::new(), |goal| format!(", now to {}", asked(goal)));
        table.pair("Follows its use", format!("{least} to {most}, weight {}{goal}", share.weight));
    }
    let mut mode = cache.mode.name().to_owned();
    if cache.mode_wanted != cache.mode {
        mode.push_str(&format!(", {} wanted", cache.mode_wanted.name()));
    }
    table.pair("Mode", mode);
    let staleness = Duration::from_millis(cache.staleness_ms);
    table.pair("Drain", format!("{}, at most {staleness:?} behind", cache.drain.name()));
    table.pair("Durability", cache.durability.name());
    if let Some(group) = &cache.consistency_group {
        table.pair("Consistency group", group);
    }
    table.pair("Cache state", cache.state);
    if let Some(held_at) = cache.held_at {
        table.pair("Held", format!("at point {held_at}, until the next `vflash drain`"));
    }
    let age = Duration::from_millis(cache.oldest_dirty_ms);
    let dirty = match cache.dirty_bytes {
        0 => "nothing".to_owned(),
        bytes => format!("{}, the oldest {} old", size(bytes), duration(age)),
    };
    table.pair("Dirty", dirty);
    table.pair("Log fill", percent(cache.log_fill_permille));
    table.pair("Points", format!("{} to {}", cache.drained_won, cache.head_won));
    let mut rate = format!("{}/s", size(cache.drain_rate_bytes));
    if let Some(eta_ms) = cache.drain_eta_ms {
        let eta = duration(Duration::from_millis(eta_ms));
        rate.push_str(&format!(", done in {eta}"));
    }
    table.pair("Drain rate", rate);
    if cache.waiting_requests > 0 {
        table.pair("Waiting for the log", format!("{} requests", cache.waiting_requests));
    }
    let pieces = cache.index_pieces;
    table.pair("Index", format!("{pieces} pieces in {}", size(cache.index_bytes)));
    let held = size(cache.probation_bytes);
    if cache.backing_faster {
        table.pair("Reads", "past the cache: the backing is faster than the flash");
    }
    if let Some(bytes) = cache.write_budget_bytes {
        let used_up = if cache.budget_used_up { ", used up for now" } else { "" };
        table.pair("Write budget", format!("{} a day{used_up}", asked(bytes)));
    }
    table.pair("Clean blocks", format!("{}, and {held} in memory", size(cache.clean_bytes)));
    table.pair("Read hits", read_hits(cache));
}

/// Blocks that reads found on the flash or in memory, of all that they wanted.
fn read_hits(cache: &Cache) -> String {
    let counter = |name: &str| {
        cache.counters.iter().find(|counter| counter.name == name).map_or(0, |c| c.value)
    };
    let probed = counter("probation_hits");
    let found = counter("hits") + probed;
    let reads = found + counter("joined") + counter("misses");
    let share = (u128::from(found) * 1000).checked_div(u128::from(reads)).unwrap_or(0);
    format!("{found} of {reads} ({}), {probed} of them in memory", percent(share as u64))
}

fn percent(permille: u64) -> String {
    format!("{}.{}%", permille / 10, permille % 10)
}

/// The cached disks of a status.
fn caches(caches: &[CachedDisk]) -> String {
    let mut table =
        Table::new(&["CACHED DISK", "STATE", "MODE", "DIRTY", "OLDEST", "LOG", "DRAIN", "ETA"]);
    for CachedDisk { name, cache } in caches {
        let eta = cache.drain_eta_ms.map(|eta_ms| duration(Duration::from_millis(eta_ms)));
        table.row([
            name.clone(),
            cache.state.to_string(),
            cache.mode.name().to_owned(),
            size(cache.dirty_bytes),
            duration(Duration::from_millis(cache.oldest_dirty_ms)),
            percent(cache.log_fill_permille),
            format!("{}/s", size(cache.drain_rate_bytes)),
            eta.unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    table.render()
}

fn limits(limits: &Limits) -> String {
    let Limits { iops, bandwidth_bytes, burst_ms } = limits;
    let parts: Vec<String> = [
        iops.map(|iops| format!("{iops} requests/s")),
        bandwidth_bytes.map(|bytes| format!("{}/s", asked(bytes))),
    ]
    .into_iter()
    .flatten()
    .collect();
    if parts.is_empty() {
        return "none".to_owned();
    }
    format!("{}, bursts of {burst_ms}ms", parts.join(", "))
}

pub(crate) fn status(status: &Status) -> String {
    let mut table = Table::plain();
    let up = Duration::from_millis(now_ms().saturating_sub(status.started_ms));
    table.pair("State", status.state);
    table.pair("Version", &status.version);
    table.pair("Process", status.pid);
    table.pair("Run directory", &status.run_dir);
    table.pair("Started", format!("{} ({} ago)", time(status.started_ms), duration(up)));
    table.pair("Reactors", status.reactors);
    table.pair("Pools", status.pools);
    for space in &status.space {
        let left = format!("{}, {} free", space.watermark, size(space.free_bytes));
        table.pair(&format!("Pool {}", space.pool), left);
    }
    table.pair("Volumes", format!("{}, {} attached", status.volumes, status.attached));
    if let Some(waiting) = &status.waiting {
        table.pair("Waiting", self::waiting(*waiting));
    }
    let mut text = table.render();
    for problem in &status.problems {
        text.push_str(&format!("Problem: {problem}\n"));
    }
    if !status.caches.is_empty() {
        text.push_str(&caches(&status.caches));
    }
    text
}

/// `+` makes, `~` changes, `-` destroys.
pub(crate) fn plan(plan: &Plan) -> String {
    if plan.steps.is_empty() {
        return "Nothing to do: what is wanted is there.\n".to_owned();
    }
    let mut text = String::new();
    for step in &plan.steps {
        let symbol = match step.action {
            Action::Create | Action::Open => '+',
            Action::Update | Action::Resize => '~',
            Action::Delete => '-',
        };
        text.push_str(&format!("{symbol} {}: {}\n", step.object, step.detail));
    }
    text
}

pub(crate) fn check(check: &Check) -> String {
    let mut text = String::new();
    for finding in &check.findings {
        let weight = if finding.repairable { "repairable" } else { "damage" };
        text.push_str(&format!("{weight}: at byte {}: {}\n", finding.offset_bytes, finding.text));
    }
    let verdict = if check.clean { "sound" } else { "NOT sound" };
    text.push_str(&format!(
        "{}: {verdict}; {} volumes, {} used, {} to be scrubbed, {} free, {} metadata\n",
        check.pool,
        check.volumes,
        size(check.mapped_bytes),
        size(check.scrub_bytes),
        size(check.free_bytes),
        size(check.metadata_bytes)
    ));
    text
}

pub(crate) fn attachment(attachment: &Attachment) -> String {
    format!("{} is attached through {}\n", attachment.name, attachment.socket)
}

/// A size that somebody asked for: exact, as a manifest takes it back. What was measured is for
/// people, with one decimal: [`size`].
fn asked(bytes: u64) -> String {
    Bytes(bytes).to_string()
}

fn yes_no(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}
