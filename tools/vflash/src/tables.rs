//! Answers of the API for people.

use crate::output::{Table, duration, size, time};
use std::time::Duration;
use vflash::control::api::{
    Action, Attachment, Check, Limits, Plan, Pool, Pools, Space, Status, Volume, Volumes,
};
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
        table.pair("Promised", size(space.provisioned_bytes));
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
            size(volume.size_bytes),
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
    table.pair("Size", size(volume.size_bytes));
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
    table.pair("Bounced pieces", volume.bounced_pieces);
    table.pair("Write cache", if volume.write_cache { "on" } else { "off" });
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

fn limits(limits: &Limits) -> String {
    let Limits { iops, bandwidth_bytes, burst_ms } = limits;
    let parts: Vec<String> = [
        iops.map(|iops| format!("{iops} requests/s")),
        bandwidth_bytes.map(|bytes| format!("{}/s", size(bytes))),
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
    table.pair("Volumes", format!("{}, {} attached", status.volumes, status.attached));
    let mut text = table.render();
    for problem in &status.problems {
        text.push_str(&format!("Problem: {problem}\n"));
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

fn yes_no(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}
