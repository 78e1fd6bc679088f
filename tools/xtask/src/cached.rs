//! A QEMU guest on cached disks: the daemon killed under it, its host lost under it, and the
//! backing alone afterwards.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use serde_json::Value;
use vflash_guest::daemon::Daemon;
use vflash_guest::guest::{Guest, GuestConfig};
use vflash_guest::ordered::Ordered;
use vflash_guest::process::{output, until};
use vflash_guest::storage_daemon::StorageDaemon;

use crate::kill::{self, COMMAND_LIMIT, CYCLE_LIMIT, DEPTH};
use crate::scratch::Scratch;

const LOAD_BYTES: u64 = 32 << 20;

/// Files beside the load's, written once.
const FILES: u64 = 4;
const FILE_BYTES: u64 = 4 << 20;

const IMAGE_BYTES: u64 = 128 << 20;

/// What the guest writes in order on its second disk.
const ORDERED: Ordered = Ordered { bytes: 16 << 20, run: 7, flush: 8 };

/// Ordered writes between two cuts, at the least.
const WRITES_PER_CUT: u64 = 200;

/// A daemon whose machine `victim` has these disks, each on an image of its own in `shared/`.
fn daemon_with(scratch: &Scratch, disks: &[&str]) -> Result<Daemon> {
    let data = scratch.data.path();
    let shared = data.join("shared");
    std::fs::create_dir(&shared).context("create a folder")?;
    let mut manifest = "apiVersion: vflash/v1\nkind: Pool\nmetadata: {name: kill}\n\
                        spec: {device: kill.pool, size: 1GiB}\n---\napiVersion: vflash/v1\n\
                        kind: VirtualMachine\nmetadata: {name: victim}\nspec:\n  volumes:\n"
        .to_owned();
    for disk in disks {
        let image = image(scratch, disk);
        File::create(&image)
            .and_then(|file| file.set_len(IMAGE_BYTES))
            .with_context(|| format!("create {}", image.display()))?;
        manifest += &format!(
            "  - name: {disk}\n    cache: {{pool: kill, size: 128MiB, maxStaleness: 1s}}\n    \
             backing: {}\n",
            image.display()
        );
    }
    let path = data.join("kill.yaml");
    std::fs::write(&path, manifest).context("write a manifest")?;
    let daemon = Daemon::start(scratch.run.path())?;
    kill::apply(&daemon, &path)?;
    Ok(daemon)
}

fn image(scratch: &Scratch, disk: &str) -> PathBuf {
    scratch.data.path().join("shared").join(format!("{disk}.raw"))
}

/// Kills the daemon `cycles` times under the load client, at many depths and numbers of queues.
pub(crate) fn killed_under_the_client(cycles: u32) -> Result<String> {
    let scratch = Scratch::new()?;
    kill::kill_the_server_of(daemon_with(&scratch, &["disk"])?, &scratch, cycles)
}

/// Kills the daemon `cycles` times under a guest's file system, drains, and gives the image alone
/// to another guest; says what both saw.
pub(crate) fn killed_under_a_guest(cycles: u32) -> Result<String> {
    let scratch = Scratch::new()?;
    let mut daemon = daemon_with(&scratch, &["disk"])?;
    let disks = vec![daemon.socket("victim/disk")];
    let mut guest = Guest::boot(&GuestConfig { disks, ..GuestConfig::default() })?;
    let mut ask = |command: &str| guest.command(command, COMMAND_LIMIT);
    ask("mkfs vda")?;
    ask("mount vda")?;
    for file in 1..=FILES {
        ask(&format!("fill /mnt/file{file} offset=0 bytes={FILE_BYTES} run={}", 100 + file))?;
    }
    ask(&format!("load-start /mnt/data bytes={LOAD_BYTES} depth={DEPTH} block=4096 run=1"))?;
    let (requests, stall_ms) = kill::kill_under_load(&mut daemon, &mut guest, cycles)?;
    let sums = sums(&mut guest)?;
    guest.command("umount /mnt", COMMAND_LIMIT)?;
    drop(guest);
    daemon.vflash(&["drain", "victim/disk", "--all", "--wait"])?;
    daemon.stop()?;
    look_at_the_image_alone(&scratch, &sums)?;
    Ok(format!(
        "{cycles} kills at depth {DEPTH}: {requests} requests, 0 errors, 0 lost, longest stall \
         {stall_ms} ms; the image alone: e2fsck clean, {} checksums right",
        sums.len()
    ))
}

/// The checksums of all files.
fn sums(guest: &mut Guest) -> Result<Vec<(String, String)>> {
    let files = (1..=FILES).map(|file| format!("/mnt/file{file}"));
    let sum = |file: String| {
        let answer = guest.command(&format!("sum {file}"), COMMAND_LIMIT)?;
        Ok((file, answer.text("sum")?.to_owned()))
    };
    files.chain(["/mnt/data".to_owned()]).map(sum).collect()
}

fn look_at_the_image_alone(scratch: &Scratch, expected: &[(String, String)]) -> Result<()> {
    let server = StorageDaemon::start(scratch.run.path(), &image(scratch, "disk"))?;
    let disks = vec![server.socket()];
    let mut guest = Guest::boot(&GuestConfig { disks, ..GuestConfig::default() })?;
    guest.command("fsck vda", COMMAND_LIMIT).context("the image alone")?;
    guest.command("mount vda", COMMAND_LIMIT)?;
    let found = sums(&mut guest)?;
    ensure!(found == expected, "the image alone holds {found:?} instead of {expected:?}");
    Ok(())
}

/// Loses the flash `cuts` times under a guest: image and sidecar are copied as they are when the
/// daemon dies, and brought to their last point without it.
pub(crate) fn cut_under_a_guest(cuts: u32) -> Result<String> {
    let scratch = Scratch::new()?;
    let mut daemon = daemon_with(&scratch, &CUT_DISKS)?;
    let disks = CUT_DISKS.map(|disk| daemon.socket(&format!("victim/{disk}"))).to_vec();
    let mut guest = Guest::boot(&GuestConfig { disks, ..GuestConfig::default() })?;
    let mut ask = |command: &str| guest.command(command, COMMAND_LIMIT);
    ask("mkfs vda")?;
    ask("mount vda")?;
    ask(&format!("load-start /mnt/data bytes={LOAD_BYTES} depth={DEPTH} block=4096 run=1"))?;
    let Ordered { bytes, run, flush } = ORDERED;
    ask(&format!("ordered-start vdb bytes={bytes} run={run} flush={flush}"))?;
    let (mut point, mut furthest_behind, mut within_drains) = (0, 0, 0);
    for cut in 1..=cuts {
        let written = wait_for_writes(&mut guest, u64::from(cut) * WRITES_PER_CUT)?;
        let copies = scratch.data.path().join("copies");
        let reported = reported(&daemon).with_context(|| format!("cut {cut}"))?;
        let seen = await_drain(&scratch, &daemon)?;
        daemon.crash_and(|| {
            copy(&image(&scratch, "files"), &copies)?;
            copy(&image(&scratch, "ordered"), &copies)
        })?;
        let known = [0, 1].map(|disk: usize| reported[disk].max(seen[disk]));
        let found = check_copies(&copies, daemon.vflash_program()?, known)
            .with_context(|| format!("cut {cut}"))?;
        let after = found.writes;
        ensure!(after >= point, "cut {cut}: the image went back from write {point} to {after}");
        (point, furthest_behind) = (after, furthest_behind.max(written.saturating_sub(after)));
        within_drains += u32::from(found.within_drain);
        std::fs::remove_dir_all(&copies).context("remove the copies")?;
    }
    ensure!(within_drains > 0 || cuts < CUTS_TELLING, "no cut of {cuts} fell within a drain");
    ensure!(point > 0, "nothing was ever drained");
    let end = guest.command("load-stop", COMMAND_LIMIT)?;
    for key in ["errors", "lost"] {
        ensure!(end.number(key)? == 0, "{key} in the guest: {}", end.line());
    }
    let writer = guest.command("ordered-stop", COMMAND_LIMIT)?;
    daemon.stop()?;
    Ok(format!(
        "{cuts} cuts, {within_drains} of them within a drain: every image exactly a past point, \
         none before what the daemon had reported ({point} of {} writes at the last one, at most \
         {furthest_behind} behind), e2fsck clean",
        writer.number("written")?
    ))
}

fn wait_for_writes(guest: &mut Guest, writes: u64) -> Result<u64> {
    let reached = until(CYCLE_LIMIT, || {
        let written = guest.command("ordered-status", COMMAND_LIMIT)?.number("written")?;
        Ok((written >= writes).then_some(written))
    });
    reached.with_context(|| format!("the guest does not get to {writes} ordered writes"))
}

/// Copies an image and its sidecar once nothing is under way on them: a dead daemon's locks stay
/// until its last write has ended.
fn copy(image: &Path, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).context("create a folder")?;
    for file in [image.to_owned(), sidecar(image)] {
        let open = File::options().read(true).write(true).open(&file);
        let open = open.with_context(|| format!("open {}", file.display()))?;
        let whole = nix::libc::flock {
            l_type: nix::libc::F_WRLCK as i16,
            l_whence: nix::libc::SEEK_SET as i16,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        until(Duration::from_secs(30), || match fcntl(&open, FcntlArg::F_OFD_SETLK(&whole)) {
            Ok(_) => Ok(Some(())),
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(None),
            Err(error) => Err(error).context("lock an image"),
        })
        .with_context(|| format!("{} stays locked", file.display()))?;
        output(Command::new("cp").arg("--sparse=always").arg(&file).arg(folder))?;
    }
    Ok(())
}

fn sidecar(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".vflash");
    name.into()
}

/// The disks of the machine that is cut.
const CUT_DISKS: [&str; 2] = ["files", "ordered"];

/// Of so many cuts at least one falls within a drain: they are made when one is seen.
const CUTS_TELLING: u32 = 10;

/// How old what is not drained may be: `maxStaleness` is 1 s, and the machine may be busy.
const BEHIND_MS_MAX: u64 = 30_000;

/// Waits until a redo group of a disk is committed and not applied yet; the points of both then.
/// Looks at the sidecars as they are, beside the daemon.
fn await_drain(scratch: &Scratch, daemon: &Daemon) -> Result<[u64; 2]> {
    let vflash = daemon.vflash_program()?;
    let look = |disk: &str| {
        let mut command = Command::new(&vflash);
        command.args(["backing", "show", "--output", "json"]).arg(image(scratch, disk));
        // What is being written meanwhile may look damaged.
        let shown = output(&mut command).unwrap_or_default();
        serde_json::from_str(&shown).unwrap_or(Value::Null)
    };
    let seen = until(CYCLE_LIMIT, || {
        let shown = CUT_DISKS.map(look);
        let waits = shown.iter().any(|shown| shown["waitingGroup"].is_object());
        Ok(waits.then(|| shown.map(|shown| shown["point"].as_u64().unwrap_or(0))))
    });
    seen.context("nothing is drained")
}

/// Up to which numbers the daemon says that the images are, which are then not far behind.
fn reported(daemon: &Daemon) -> Result<[u64; 2]> {
    let mut points = [0; 2];
    for (point, disk) in points.iter_mut().zip(CUT_DISKS) {
        let volume = daemon.query(&["describe", &format!("victim/{disk}")])?;
        let number = |key: &str| {
            let number = volume["cache"][key].as_u64();
            number.with_context(|| format!("{disk} has no `{key}`: {volume}"))
        };
        let behind_ms = number("oldestDirtyMs")?;
        ensure!(behind_ms <= BEHIND_MS_MAX, "the image of {disk} is {behind_ms} ms behind");
        *point = number("drainedWon")?;
    }
    Ok(points)
}

/// What a cut has left.
struct Found {
    /// Ordered writes in their image.
    writes: u64,
    /// A group was committed and not in place.
    within_drain: bool,
}

/// Brings the copies to their last point, on a host that has nothing else: none is before the one
/// that is `known` of it.
fn check_copies(folder: &Path, vflash: PathBuf, known: [u64; 2]) -> Result<Found> {
    let mut within_drain = false;
    for (disk, known) in CUT_DISKS.into_iter().zip(known) {
        let image = folder.join(format!("{disk}.raw"));
        // It is a copy, and says so.
        let recover = ["backing", "recover", "--adopt", "--output", "json"];
        let printed = output(Command::new(&vflash).args(recover).arg(&image))?;
        let recovered: Value =
            serde_json::from_str(&printed).with_context(|| format!("vflash prints {printed}"))?;
        let point = recovered["point"].as_u64().context("it has no point")?;
        ensure!(point >= known, "{disk} is at point {point}, and had come to {known}");
        within_drain |= !recovered["finishedGroup"].is_null();
    }
    let files = folder.join("files.raw");
    // What a file system's own journal repairs at every mount after a power cut.
    output(Command::new("e2fsck").args(["-y", "-E", "journal_only"]).arg(&files))?;
    output(Command::new("e2fsck").args(["-f", "-n"]).arg(&files)).context("e2fsck of the copy")?;
    let writes = ORDERED.point_of(&folder.join("ordered.raw"))?;
    Ok(Found { writes, within_drain })
}
