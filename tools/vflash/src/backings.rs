//! `vflash backing`: without a daemon and without the flash, on any host that reaches the storage.

use crate::arguments::{BackingArguments, DetachArguments, Format, RecoverArguments};
use crate::consent;
use crate::output::{Progress, Table, print, size, time};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Duration;
use vflash::backing::nbd::NbdOptions;
use vflash::backing::open::{Backing, OpenOptions};
use vflash::backing::recover::{self, Damage, RecoverOptions, Standing};
use vflash::backing::spec::Spec;
use vflash::backing::stamp::DrainMode;
use vflash::base::clock::unix_ms;
use vflash::control::api::{ErrorCode, Failure};
use vflash::io::blocking::Blocking;
use vflash::io::file::FileDisk;

type Result<T> = std::result::Result<T, Failure>;

/// For a lock that another holds, or that late I/O of a killed daemon still holds.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// For an NBD server that does not answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where a backing is. Times are milliseconds of the Unix epoch.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown {
    backing: String,
    sidecar: String,
    disk: String,
    /// Nobody's flash holds anything that the backing lacks.
    clean: bool,
    volume: String,
    host: String,
    owner_epoch: u64,
    owned_ms: u64,
    stamped_ms: u64,
    drain: &'static str,
    /// Of the backing, once its group is finished.
    point: u64,
    point_ms: u64,
    /// It also holds a part of the write after that.
    part: bool,
    dirty_bytes: u64,
    oldest_dirty_ms: u64,
    /// A redo group that is committed and not finished.
    waiting_group: Option<Group>,
    /// A group that was finished just now.
    finished_group: Option<Group>,
    findings: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Group {
    number: u64,
    from: u64,
    to: u64,
    bytes: u64,
}

impl Shown {
    fn new(backing: &Spec, sidecar: &std::path::Path, standing: &Standing) -> Self {
        let stamp = &standing.stamp;
        let waiting_group = standing.live.map(|header| Group {
            number: header.id.number,
            from: header.span.from,
            to: header.span.to,
            bytes: header.data_bytes,
        });
        Self {
            backing: backing.to_string(),
            sidecar: sidecar.display().to_string(),
            disk: uuid(&stamp.disk),
            clean: stamp.is_clean(),
            volume: stamp.owner.volume.clone(),
            host: stamp.owner.host_name.clone(),
            owner_epoch: stamp.owner_epoch,
            owned_ms: stamp.owned_ms,
            stamped_ms: stamp.stamped_ms,
            drain: match stamp.drain {
                DrainMode::Ordered => "ordered",
                DrainMode::Grouped => "grouped",
            },
            point: standing.point.won,
            point_ms: standing.point.time_ms,
            part: standing.part,
            dirty_bytes: standing.dirty_bytes,
            oldest_dirty_ms: if standing.dirty_bytes > 0 { stamp.oldest_dirty_ms } else { 0 },
            waiting_group,
            finished_group: None,
            findings: standing.findings.clone(),
        }
    }
}

fn uuid(bytes: &[u8; 16]) -> String {
    let mut text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    for at in [20, 16, 12, 8] {
        text.insert(at, '-');
    }
    text
}

pub(crate) fn show(format: Format, arguments: &BackingArguments) -> Result<()> {
    let (spec, sidecar) = places(arguments)?;
    let mut disk = Blocking::new(Box::new(FileDisk::open_unlocked(&sidecar)?));
    let standing = recover::inspect(&mut disk, Damage::Skip)
        .map_err(|error| error.context(format_args!("sidecar {}", sidecar.display())))?;
    let standing = standing.ok_or_else(|| no_stamp(&sidecar))?;
    print(format, &Shown::new(&spec, &sidecar, &standing), table)
}

pub(crate) fn recover(format: Format, arguments: &RecoverArguments) -> Result<()> {
    let (spec, sidecar) = places(&arguments.backing)?;
    if !sidecar.exists() {
        return Err(no_stamp(&sidecar));
    }
    let mut backing = Backing::open(&OpenOptions {
        spec: spec.clone(),
        sidecar: Some(sidecar.clone()),
        reading: false,
        wait: LOCK_WAIT,
        nbd: NbdOptions { patience: Some(PATIENCE), ..NbdOptions::default() },
    })?;
    let damage = if arguments.skip_damaged { Damage::Skip } else { Damage::Refuse };
    let options = RecoverOptions { damage, now_ms: unix_ms() };
    let progress = Progress::new();
    let recovery = backing.recover(options, arguments.adopt, &mut |progressed| {
        let (done, total) = (progressed.done_bytes, progressed.total_bytes);
        progress.show(&format!("applying the group: {} of {}", size(done), size(total)));
    })?;
    drop(progress);
    let recovery = recovery.ok_or_else(|| no_stamp(&sidecar))?;
    let mut shown = Shown::new(&spec, &sidecar, &recovery.standing);
    shown.finished_group = recovery.applied.map(|applied| Group {
        number: applied.header.id.number,
        from: applied.header.span.from,
        to: applied.header.span.to,
        bytes: applied.bytes,
    });
    print(format, &shown, table)
}

/// Gives up what only a flash that is gone held; says first what that is.
pub(crate) fn give_up(format: Format, arguments: &DetachArguments) -> Result<()> {
    let named = BackingArguments {
        backing: arguments.backing.clone().unwrap_or_default(),
        sidecar: arguments.sidecar.clone(),
    };
    let (spec, sidecar) = places(&named)?;
    if !sidecar.exists() {
        return Err(no_stamp(&sidecar));
    }
    let options = OpenOptions {
        spec: spec.clone(),
        sidecar: Some(sidecar.clone()),
        reading: false,
        wait: LOCK_WAIT,
        nbd: NbdOptions { patience: Some(PATIENCE), ..NbdOptions::default() },
    };
    let standing = consent::obtain_named(&arguments.confirm, |confirm| {
        let mut backing = Backing::open(&options)?;
        let Some(lost) = backing.lost(Damage::Refuse)? else {
            let text = format!("{spec} is clean: there is nothing to give up");
            return Err(Failure::new(ErrorCode::Invalid, text));
        };
        if !confirm.contains(&lost.volume) {
            let unconfirmed = vec![lost.volume];
            let failure = Failure::new(ErrorCode::Unconfirmed, lost.text);
            return Err(Failure { unconfirmed, ..failure });
        }
        let how = RecoverOptions { damage: Damage::Refuse, now_ms: unix_ms() };
        let lost = backing.take_over_lost(&lost.volume, how, &mut |_| {})?;
        lost.map(|lost| lost.standing).ok_or_else(|| no_stamp(&sidecar))
    })?;
    print(format, &Shown::new(&spec, &sidecar, &standing), table)
}

fn places(arguments: &BackingArguments) -> Result<(Spec, PathBuf)> {
    let spec = Spec::parse(&arguments.backing)?;
    let sidecar = arguments.sidecar.clone().or_else(|| spec.default_sidecar());
    let sidecar = sidecar.ok_or_else(|| {
        let text = format!("{spec} has no sidecar beside it: name it with --sidecar");
        Failure::new(ErrorCode::Invalid, text)
    })?;
    Ok((spec, sidecar))
}

fn no_stamp(sidecar: &std::path::Path) -> Failure {
    let text = format!(
        "there is no owner stamp at {}: no cache ever stood on this backing, or its sidecar lies \
         elsewhere (--sidecar)",
        sidecar.display()
    );
    Failure::new(ErrorCode::NotFound, text)
}

fn table(shown: &Shown) -> String {
    let mut table = Table::plain();
    let or_none = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    table.pair("Backing", &shown.backing);
    table.pair("Sidecar", &shown.sidecar);
    table.pair("Disk", &shown.disk);
    table.pair("State", if shown.clean { "clean" } else { "dirty" });
    table.pair("Owner", or_none(&shown.volume));
    table.pair("Host", or_none(&shown.host));
    table.pair("Epoch", format!("{} since {}", shown.owner_epoch, time(shown.owned_ms)));
    table.pair("Drain", shown.drain);
    let mut point = shown.point.to_string();
    if shown.point_ms > 0 {
        point.push_str(&format!(" of {}", time(shown.point_ms)));
    }
    if shown.part {
        point.push_str(", and a part of the write after it");
    }
    if !shown.clean && shown.drain == "ordered" {
        point.push_str(" or later");
    }
    table.pair("Point", point);
    if let Some(group) = &shown.waiting_group {
        let text = "committed, to be finished by `vflash backing recover`";
        table.pair("Group", format!("{} ({} to {}): {text}", group.number, group.from, group.to));
    }
    if let Some(group) = &shown.finished_group {
        let (number, bytes) = (group.number, size(group.bytes));
        let text = format!("{number} ({} to {}): finished, {bytes} written", group.from, group.to);
        table.pair("Group", text);
    }
    if !shown.clean {
        let mut text = format!("{} at {}", size(shown.dirty_bytes), time(shown.stamped_ms));
        if shown.oldest_dirty_ms > 0 {
            text.push_str(&format!(", the oldest of {}", time(shown.oldest_dirty_ms)));
        }
        table.pair("Only on the flash", text);
    }
    for finding in &shown.findings {
        table.pair("Note", finding);
    }
    table.render()
}
