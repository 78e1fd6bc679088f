//! Pools and the logs of their cached disks, looked at without a daemon: `vflash check` and `vflash
//! dump journal`.

use crate::arguments::{CheckArguments, DumpArguments, Format};
use crate::client::Client;
use crate::output::{Progress, print, write};
use crate::tables;
use serde::Serialize;
use std::path::Path;
use std::time::Duration;
use vflash::base::{Error, ErrorKind};
use vflash::cache::inspect::{self, DumpedRecord, Severity};
use vflash::cache::record::Kind;
use vflash::cache::{Medium, Place};
use vflash::control::api::{Check, ErrorCode, Failure};
use vflash::control::cached::medium;
use vflash::control::rundir::remembered_in;
use vflash::flash::{Allocation, CheckProgress, Pool};
use vflash::io::disk::DiskTarget;
use vflash::io::file::Device;
use vflash::manifest::Attributes;

type Result<T> = std::result::Result<T, Failure>;

/// As fsck answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Clean,
    Repaired,
    Damaged,
}

/// For a lock that late I/O of a killed daemon holds.
const LOCK_WAIT: Duration = Duration::from_secs(2);

/// A pool, its metadata and every log in it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Checked {
    pool: Check,
    repaired: bool,
    journals: Vec<Journal>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Journal {
    volume: String,
    clean: bool,
    /// Why it could not be read at all.
    failure: Option<String>,
    segments: u64,
    records: u64,
    last_won: u64,
    drained_won: u64,
    dirty_bytes: u64,
    findings: Vec<JournalFinding>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JournalFinding {
    severity: &'static str,
    offset_bytes: u64,
    text: String,
}

/// A pool that nobody serves.
struct Offline {
    target: DiskTarget,
    device: String,
}

impl Offline {
    fn open(client: &Client, run_dir: &Path, pool: &str) -> Result<(Self, Device)> {
        let device = match pool.contains('/') {
            true => pool.to_owned(),
            false => device_of(run_dir, pool)?,
        };
        let opened = Device::open(&device, LOCK_WAIT).map_err(|error| {
            held(client, name_of(run_dir, &device).as_deref().unwrap_or(pool), error)
        })?;
        Ok((Self { target: opened.target.clone(), device }, opened))
    }

    fn pool(&self) -> Result<Pool> {
        Ok(Pool::open(Box::new(vflash::io::file::FileDisk::shared(&self.target).ok_or_else(
            || Failure::new(ErrorCode::Invalid, format!("{} keeps nothing", self.device)),
        )?))?)
    }

    fn medium(&self, allocation: &Allocation) -> vflash::base::Result<Medium> {
        medium(&self.target, Place::new(allocation.size_bytes, allocation.runs()))
    }
}

/// The device of a pool, as the last daemon of this run directory knew it.
fn device_of(run_dir: &Path, pool: &str) -> Result<String> {
    let pools = remembered_in(run_dir)?;
    let found = pools.into_iter().find(|known| known.name == pool);
    found.map(|known| known.device).ok_or_else(|| {
        let text = format!(
            "no vflashd on {} knew a pool `{pool}`: name its device or file",
            run_dir.display()
        );
        Failure::new(ErrorCode::NotFound, text)
    })
}

/// The pool on a device or file, as the last daemon of this run directory knew it.
fn name_of(run_dir: &Path, device: &str) -> Option<String> {
    let device = std::path::absolute(device).ok()?.display().to_string();
    let pools = remembered_in(run_dir).ok()?;
    pools.into_iter().find(|known| known.device == device).map(|known| known.name)
}

fn held(client: &Client, pool: &str, error: Error) -> Failure {
    let failure = Failure::from(error);
    if failure.code != ErrorCode::Busy || !client.daemon_runs() {
        return failure;
    }
    let text = format!(
        "{}; vflashd serves it: stop vflashd, or close the pool (`vflash pool close`); `vflash \
         pool check {pool}` checks what can be checked meanwhile",
        failure.message
    );
    Failure { message: text, ..failure }
}

fn cached(allocation: &Allocation) -> bool {
    Attributes::decode(&allocation.attributes)
        .is_ok_and(|attributes| attributes.settings.cache.is_some())
}

pub(crate) fn check(
    client: &Client,
    run_dir: &Path,
    format: Format,
    arguments: &CheckArguments,
) -> Result<Verdict> {
    let CheckArguments { pool: name, repair } = arguments;
    let (offline, device) = Offline::open(client, run_dir, name)?;
    let progress = Progress::new();
    progress.show(&format!("checking {name}"));
    let read = CheckProgress::default();
    let report = Pool::check_offline(device.disk, &read);
    let mut pool = Check::from_report(name, report.map_err(|error| error.context(name))?);
    let repairable = !pool.clean && pool.findings.iter().all(|finding| finding.repairable);
    let mut repaired = false;
    if *repair && repairable {
        // Opening writes damaged copies anew from their twins.
        drop(offline.pool()?);
        let disk = vflash::io::file::FileDisk::shared(&offline.target);
        let disk = disk.ok_or_else(|| Error::new(ErrorKind::Invalid, "the pool keeps nothing"))?;
        pool = Check::from_report(name, Pool::check_offline(Box::new(disk), &read)?);
        repaired = pool.clean;
    }
    let mut journals = Vec::new();
    if pool.clean {
        let opened = offline.pool()?;
        for allocation in opened.allocations().filter(|allocation| cached(allocation)) {
            progress.show(&format!("checking the log of {}", allocation.name));
            journals.push(journal(&offline, allocation));
        }
    }
    drop(progress);
    let checked = Checked { pool, repaired, journals };
    print(format, &checked, table)?;
    let sound = checked.pool.clean && checked.journals.iter().all(|journal| journal.clean);
    Ok(match (sound, checked.repaired) {
        (false, _) => Verdict::Damaged,
        (true, true) => Verdict::Repaired,
        (true, false) => Verdict::Clean,
    })
}

fn journal(offline: &Offline, allocation: &Allocation) -> Journal {
    let mut journal = Journal {
        volume: allocation.name.clone(),
        clean: true,
        failure: None,
        segments: 0,
        records: 0,
        last_won: 0,
        drained_won: 0,
        dirty_bytes: 0,
        findings: Vec::new(),
    };
    let log = Attributes::decode(&allocation.attributes).ok().and_then(|found| found.log);
    if log.is_some_and(|log| !log.formatted) {
        // It was never opened: nothing can be wrong with it.
        return journal;
    }
    let report = match offline.medium(allocation).and_then(|mut medium| inspect::check(&mut medium))
    {
        Ok(report) => report,
        Err(error) => {
            (journal.clean, journal.failure) = (false, Some(error.to_string()));
            return journal;
        }
    };
    journal.clean = report.worst().is_none_or(|worst| worst < Severity::Lost);
    journal.segments = report.segments;
    journal.records = report.records;
    journal.last_won = report.last_won;
    journal.drained_won = report.drained_through;
    journal.dirty_bytes = report.dirty_bytes;
    let finding = |finding: inspect::Finding| JournalFinding {
        severity: match finding.severity {
            Severity::Harmless => "harmless",
            Severity::Drained => "drained",
            Severity::Lost => "lost",
        },
        offset_bytes: finding.offset,
        text: finding.text,
    };
    journal.findings = report.findings.into_iter().map(finding).collect();
    journal
}

fn table(checked: &Checked) -> String {
    let mut text = tables::check(&checked.pool);
    if checked.repaired {
        text.push_str("damaged copies were written anew from their twins\n");
    }
    if !checked.pool.clean {
        text.push_str("the logs of cached disks were not looked at\n");
    }
    for journal in &checked.journals {
        for finding in &journal.findings {
            let (severity, offset) = (finding.severity, finding.offset_bytes);
            let line = format!("{severity}: at byte {offset} of {}", journal.volume);
            text.push_str(&format!("{line}: {}\n", finding.text));
        }
        let verdict = if journal.clean { "sound" } else { "NOT sound" };
        text.push_str(&format!("{}: {verdict}", journal.volume));
        match &journal.failure {
            Some(failure) => text.push_str(&format!("; {failure}\n")),
            None => text.push_str(&format!(
                "; {} segments, {} records, points {} to {}, {} dirty\n",
                journal.segments,
                journal.records,
                journal.drained_won,
                journal.last_won,
                crate::output::size(journal.dirty_bytes)
            )),
        }
    }
    text
}

/// A record as it is printed.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    won: u64,
    epoch: u64,
    /// A FLUSH of the guest lies before it.
    edge: bool,
    kind: &'static str,
    start_sector: u64,
    sectors: u64,
    door: u16,
    queue: u16,
    counter: u64,
    segment: u64,
    batch: u64,
    position_bytes: u64,
    right: bool,
    drained: bool,
    name: Option<String>,
}

impl From<DumpedRecord> for Record {
    fn from(record: DumpedRecord) -> Self {
        Self {
            won: record.won,
            epoch: record.epoch,
            edge: record.edge,
            kind: match record.kind {
                Kind::Write => "write",
                Kind::Discard => "discard",
                Kind::Zeroes => "zeroes",
                Kind::Mark => "mark",
            },
            start_sector: record.start,
            sectors: record.count,
            door: record.origin.door,
            queue: record.origin.queue,
            counter: record.origin.counter,
            segment: record.segment,
            batch: record.batch,
            position_bytes: record.position,
            right: record.right,
            drained: record.drained,
            name: record.name,
        }
    }
}

/// Every record of a cached disk's log, oldest first; a line or a document each.
pub(crate) fn dump(
    client: &Client,
    run_dir: &Path,
    format: Format,
    arguments: &DumpArguments,
) -> Result<()> {
    let DumpArguments { pool: name, volume } = arguments;
    let (offline, device) = Offline::open(client, run_dir, name)?;
    drop(device);
    let pool = offline.pool()?;
    let allocation = pool.find(volume).ok_or_else(|| {
        let text = format!("pool {name} has no volume `{volume}`");
        Failure::new(ErrorCode::NotFound, text)
    })?;
    if !cached(allocation) {
        let text = format!("{volume} is a flash volume: it has no journal");
        return Err(Failure::new(ErrorCode::Invalid, text));
    }
    let mut medium = offline.medium(allocation)?;
    let mut written = Ok(());
    inspect::dump(&mut medium, |record| {
        if written.is_ok() {
            written = line(format, record.into()).and_then(|line| write(&line));
        }
    })?;
    written
}

fn line(format: Format, record: Record) -> Result<String> {
    let wrong = |text: String| Failure::new(ErrorCode::Internal, text);
    match format {
        Format::Table => {
            let end = record.start_sector + record.sectors;
            let what = match &record.name {
                Some(name) => format!("`{name}`"),
                None => format!("sectors {}..{end}", record.start_sector),
            };
            let edge = if record.edge { " after FLUSH" } else { "" };
            let state = if record.drained { "drained" } else { "dirty" };
            let door = match record.door {
                0 => String::new(),
                door => format!("door {door} "),
            };
            let right = if record.right { "" } else { " DAMAGED" };
            Ok(format!(
                "{:>10}  epoch {:<6} {:<8} {what}, {door}queue {} request {}, segment {} batch {} \
                 byte {}, {state}{right}{edge}\n",
                record.won,
                record.epoch,
                record.kind,
                record.queue,
                record.counter,
                record.segment,
                record.batch,
                record.position_bytes
            ))
        }
        Format::Json => serde_json::to_string(&record)
            .map(|text| text + "\n")
            .map_err(|error| wrong(error.to_string())),
        Format::Yaml => serde_yaml::to_string(&record)
            .map(|text| format!("---\n{text}"))
            .map_err(|error| wrong(error.to_string())),
    }
}
