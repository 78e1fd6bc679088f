//! `vflash backing`: without a daemon and without the flash, on any host that reaches the storage.

use crate::arguments::{BackingArguments, DetachArguments, Format, RecoverArguments};
use crate::consent;
use crate::output::{Progress, Table, print, size, time};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Duration;
use vflash::backing::nbd::NbdOptions;
use vflash::backing::open::{Backing, OpenOptions};
use vflash::backing::recover::{self, Damage, RecoverOptions, Recovery, Standing};
use vflash::backing::spec::Spec;
use vflash::backing::stamp::DrainMode;
use vflash::backing::together;
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
    /// Empty: it is in none.
    consistency_group: String,
    /// Whether its last group counts, another disk of the group knows.
    in_doubt: bool,
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
            consistency_group: stamp.roster.name.clone(),
            in_doubt: standing.doubt.is_some(),
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
    let standing = recover::inspect(&mut disk, how(Damage::Skip))
        .map_err(|error| error.context(format_args!("sidecar {}", sidecar.display())))?;
    let standing = standing.ok_or_else(|| no_stamp(&sidecar))?;
    print(format, &Shown::new(&spec, &sidecar, &standing), table)
}

fn how(damage: Damage) -> RecoverOptions {
    RecoverOptions { damage, now_ms: unix_ms(), word: None }
}

/// A backing that is worked on, and how it was named.
struct Named {
    spec: Spec,
    sidecar: PathBuf,
}

fn open(named: &Named) -> Result<Backing> {
    if !named.sidecar.exists() {
        return Err(no_stamp(&named.sidecar));
    }
    Ok(Backing::open(&OpenOptions {
        spec: named.spec.clone(),
        sidecar: Some(named.sidecar.clone()),
        reading: false,
        wait: LOCK_WAIT,
        nbd: NbdOptions { patience: Some(PATIENCE), ..NbdOptions::default() },
    })?)
}

pub(crate) fn recover(format: Format, arguments: &RecoverArguments) -> Result<()> {
    let mut named = Vec::new();
    for backing in &arguments.backings {
        if arguments.sidecar.is_some() && arguments.backings.len() > 1 {
            let text = "--sidecar is for one backing: recover the others by their own paths, which \
                        their stamps name too";
            return Err(Failure::new(ErrorCode::Invalid, text));
        }
        let one = BackingArguments { backing: backing.clone(), sidecar: arguments.sidecar.clone() };
        let (spec, sidecar) = places(&one)?;
        named.push(Named { spec, sidecar });
    }
    let mut backings = named.iter().map(open).collect::<Result<Vec<Backing>>>()?;
    let damage = if arguments.skip_damaged { Damage::Skip } else { Damage::Refuse };
    add_others(&mut named, &mut backings, damage)?;
    let progress = Progress::new();
    if let Some(held) = backings.iter().find_map(Backing::held) {
        let seconds = held.as_secs();
        progress.show(&format!("waiting up to {seconds}s for what a killed owner left under way"));
    }
    let how = (how(damage), arguments.adopt);
    let recovered =
        together::recover_all(&mut backings, &arguments.without, how, &mut |progressed| {
            let (done, total) = (progressed.done_bytes, progressed.total_bytes);
            progress.show(&format!("applying the group: {} of {}", size(done), size(total)));
        })?;
    drop(progress);
    let mut shown = Vec::new();
    for (named, recovery) in named.iter().zip(recovered) {
        let mut one = recovered_as(named, recovery.ok_or_else(|| no_stamp(&named.sidecar))?);
        let note = |name: &String| format!("{name} of its consistency group was given up");
        one.findings.extend(arguments.without.iter().map(note));
        shown.push(one);
    }
    match &shown[..] {
        [one] => print(format, one, table),
        _ => print(format, &shown, |all| all.iter().map(table).collect::<Vec<_>>().join("\n")),
    }
}

/// The other disks of a consistency group, where its stamps say that they are.
fn add_others(named: &mut Vec<Named>, backings: &mut Vec<Backing>, damage: Damage) -> Result<()> {
    let mut there = Vec::new();
    let mut wanted = Vec::new();
    for backing in backings.iter_mut() {
        let Some(standing) = backing.standing(damage)? else { continue };
        there.push(standing.stamp.owner.volume.clone());
        wanted.extend(together::others(&standing));
    }
    wanted.sort();
    wanted.dedup();
    for peer in wanted {
        if there.contains(&peer.volume) {
            continue;
        }
        let other = Named { spec: Spec::parse(&peer.backing)?, sidecar: peer.sidecar.into() };
        // One that is not where it was has to be named: `recover_all` says so.
        if !other.sidecar.exists() {
            continue;
        }
        there.push(peer.volume);
        backings.push(open(&other)?);
        named.push(other);
    }
    Ok(())
}

fn recovered_as(named: &Named, recovery: Recovery) -> Shown {
    let mut shown = Shown::new(&named.spec, &named.sidecar, &recovery.standing);
    shown.finished_group = recovery.applied.map(|applied| Group {
        number: applied.header.id.number,
        from: applied.header.span.from,
        to: applied.header.span.to,
        bytes: applied.bytes,
    });
    shown
}

/// Gives up what only a flash that is gone held; says first what that is.
pub(crate) fn give_up(format: Format, arguments: &DetachArguments) -> Result<()> {
    let named = BackingArguments {
        backing: arguments.backing.clone().unwrap_or_default(),
        sidecar: arguments.sidecar.clone(),
    };
    let (spec, sidecar) = places(&named)?;
    let named = Named { spec: spec.clone(), sidecar: sidecar.clone() };
    let standing = consent::obtain_named(&arguments.confirm, |confirm| {
        let mut backing = open(&named)?;
        together::resolve(&mut backing, Damage::Refuse, LOCK_WAIT)?;
        let Some(lost) = backing.lost(Damage::Refuse)? else {
            let text = format!("{spec} is clean: there is nothing to give up");
            return Err(Failure::new(ErrorCode::Invalid, text));
        };
        if !confirm.contains(&lost.volume) {
            let unconfirmed = vec![lost.volume];
            let failure = Failure::new(ErrorCode::Unconfirmed, lost.text);
            return Err(Failure { unconfirmed, ..failure });
        }
        let how = how(Damage::Refuse);
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
    if !shown.consistency_group.is_empty() {
        let doubt = ", whose leader knows whether the last group counts: `vflash backing recover`";
        let doubt = if shown.in_doubt { doubt } else { "" };
        table.pair("Consistency group", format!("{}{doubt}", shown.consistency_group));
    }
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
