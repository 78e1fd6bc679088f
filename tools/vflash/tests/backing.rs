//! Backings without a daemon and without their flash.

mod daemon;

use daemon::vflash;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;
use vflash::backing::fence::Claim;
use vflash::backing::group::GroupWriter;
use vflash::backing::open::{Backing, OpenOptions};
use vflash::backing::recover::{Damage, RecoverOptions};
use vflash::backing::redo::{GroupId, Layout, Span, StepId};
use vflash::backing::roster::{Peer, Roster};
use vflash::backing::sidecar::write_stamp;
use vflash::backing::spec::Spec;
use vflash::backing::stamp::{DrainMode, Owner, Stamp, State};
use vflash::backing::together::settle_without_leader;
use vflash::base::units::MIB;

/// The begin of 2026.
const NOW_MS: u64 = 1_767_225_600_000;

struct Place(tempfile::TempDir);

impl Place {
    fn run(&self, arguments: &[&str]) -> Output {
        vflash().current_dir(self.0.path()).arg("backing").args(arguments).output().unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

fn open(path: &Path) -> Backing {
    Backing::open(&OpenOptions {
        spec: Spec::Path(path.to_owned()),
        sidecar: None,
        reading: false,
        wait: Duration::ZERO,
        nbd: Default::default(),
    })
    .unwrap()
}

/// The first claim of a disk in write-back.
fn claim(owner: Owner, disk: [u8; 16], roster: Roster) -> Claim {
    Claim {
        owner,
        remembered: None,
        state: State::Dirty,
        drain: DrainMode::Grouped,
        create: true,
        adopt: false,
        group_bytes_max: Some(MIB),
        new_disk: disk,
        roster,
        now_ms: NOW_MS,
    }
}

/// Puts a group beside the disk that writes one block to its sector 8, and applies nothing.
fn commit(backing: &mut Backing, mut group: GroupWriter, span: Span) {
    let at = group.data(8, &[0x77; 4096]);
    let group = group.finish(span);
    let sidecar = backing.disks().1.unwrap();
    sidecar.write_copies(&[at], &[0x77; 4096]).unwrap();
    sidecar.write_copies(&[group.table_offset], &group.table).unwrap();
    sidecar.write_copies(&[group.header_offset], &group.header_block).unwrap();
    sidecar.flush().unwrap();
}

/// A disk whose owner died between committing a group and applying it.
fn orphan() -> (Place, Backing, Stamp) {
    let place = Place(tempfile::tempdir().unwrap());
    let disk = place.path("disk.raw");
    std::fs::File::create(&disk).unwrap().set_len(8 * MIB).unwrap();
    let mut backing = open(&disk);
    let owner = Owner {
        allocation: [1; 16],
        host_name: "alpha".into(),
        volume: "web-1/root".into(),
        ..Default::default()
    };
    let claim = claim(owner, [7; 16], Roster::default());
    let stamp = backing.claim(&claim, &mut |_| {}).unwrap().stamp.unwrap();
    let id = GroupId { disk: stamp.disk, owner_epoch: 1, number: 1 };
    let span =
        Span { from: 0, to: 42, point_ms: NOW_MS + 1000, dirty_bytes: 12288, ..Span::default() };
    commit(&mut backing, GroupWriter::new(Layout::new(MIB), id), span);
    (place, backing, stamp)
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn complained(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn a_group_is_shown_and_finished_by_any_host() {
    let (place, backing, _) = orphan();
    // To look takes no lock.
    let shown = place.run(&["show", "disk.raw"]);
    assert_eq!(shown.status.code(), Some(0), "{shown:?}");
    let expected = "\
Backing:            disk.raw
Sidecar:            disk.raw.vflash
Disk:               07070707-0707-0707-0707-070707070707
State:              dirty
Owner:              web-1/root
Host:               alpha
Epoch:              1 since 2026-01-01T00:00:00.000Z
Drain:              grouped
Point:              42 of 2026-01-01T00:00:01.000Z
Group:              1 (0 to 42): committed, to be finished by `vflash backing recover`
Only on the flash:  12KiB at 2026-01-01T00:00:00.000Z
";
    assert_eq!(said(&shown), expected);
    let busy = place.run(&["recover", "disk.raw"]);
    assert_eq!(busy.status.code(), Some(8), "{busy:?}");
    assert!(complained(&busy).contains("in use"), "{busy:?}");
    drop(backing);
    let finished = place.run(&["recover", "disk.raw"]);
    assert_eq!(finished.status.code(), Some(0), "{finished:?}");
    let line = "Group:              1 (0 to 42): finished, 4KiB written\n";
    assert!(said(&finished).contains(line), "{}", said(&finished));
    let disk = std::fs::read(place.path("disk.raw")).unwrap();
    assert_eq!((&disk[4096..8192], disk[8192]), (&[0x77; 4096][..], 0));
    let again = place.run(&["recover", "disk.raw", "-o", "json"]);
    assert_eq!(again.status.code(), Some(0), "{again:?}");
    let json: serde_json::Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!(json["finishedGroup"], serde_json::Value::Null);
    assert_eq!((&json["point"], &json["dirtyBytes"]), (&42.into(), &12288.into()));
}

#[test]
fn what_cannot_be_recovered_is_named_and_left_alone() {
    let (place, backing, _) = orphan();
    drop(backing);
    let nothing = place.run(&["show", "other.raw"]);
    assert_eq!(nothing.status.code(), Some(8), "{nothing:?}");
    let export = place.run(&["recover", "nbd://storage/disk"]);
    assert_eq!(export.status.code(), Some(8));
    assert!(complained(&export).contains("name it with --sidecar"), "{export:?}");
    let empty = place.run(&["recover", "disk.raw", "--sidecar", "none"]);
    assert_eq!(empty.status.code(), Some(8));
    assert!(complained(&empty).contains("there is no owner stamp at none"), "{empty:?}");
    // A damaged header: refused, and passed over only when told.
    let sidecar = place.path("disk.raw.vflash");
    let mut bytes = std::fs::read(&sidecar).unwrap();
    let header = Layout::new(MIB).header_offset(1) as usize;
    bytes[header + 50] ^= 1;
    std::fs::write(&sidecar, &bytes).unwrap();
    let damaged = place.run(&["recover", "disk.raw"]);
    assert_eq!(damaged.status.code(), Some(4), "{damaged:?}");
    assert!(complained(&damaged).contains("redo slot 1 is damaged"), "{damaged:?}");
    assert_eq!(std::fs::read(&sidecar).unwrap(), bytes, "untouched");
    let skipped = place.run(&["recover", "disk.raw", "--skip-damaged"]);
    assert_eq!(skipped.status.code(), Some(0), "{skipped:?}");
    assert!(said(&skipped).contains("redo slot 1 is damaged"), "{skipped:?}");
    // A copy elsewhere is another file, unless somebody says that it is the disk.
    bytes[header + 50] ^= 1;
    std::fs::write(place.path("copy.vflash"), &bytes).unwrap();
    std::fs::copy(place.path("disk.raw"), place.path("copy")).unwrap();
    let copy = place.run(&["recover", "copy"]);
    assert_eq!(copy.status.code(), Some(8), "{copy:?}");
    assert!(complained(&copy).contains("it is another file"), "{copy:?}");
    let adopted = place.run(&["recover", "copy", "--adopt"]);
    assert!(said(&adopted).contains("finished"), "{adopted:?}");
}

/// A disk of a consistency group whose owner died when a step was in both sidecars.
fn member(place: &Place, name: &str, disk: [u8; 16], step: StepId) -> Backing {
    let path = place.path(name);
    std::fs::File::create(&path).unwrap().set_len(8 * MIB).unwrap();
    let mut backing = open(&path);
    let peer = |name: &str| Peer {
        volume: format!("db/{name}"),
        backing: place.path(name).display().to_string(),
        sidecar: place.path(&format!("{name}.vflash")).display().to_string(),
    };
    let volume = format!("db/{name}");
    let owner = Owner { allocation: disk, volume, ..Default::default() };
    let roster = Roster { name: "db".into(), members: vec![peer("data"), peer("log")] };
    let claim = claim(owner, disk, roster);
    backing.claim(&claim, &mut |_| {}).unwrap();
    let id = GroupId { disk, owner_epoch: 1, number: 1 };
    let mut group = GroupWriter::new(Layout::new(MIB), id);
    group.set_step(step);
    commit(&mut backing, group, Span { from: 0, to: 42, ..Span::default() });
    backing
}

#[test]
fn the_disks_of_a_consistency_group_are_recovered_together() {
    for committed in [false, true] {
        let place = Place(tempfile::tempdir().unwrap());
        let leader = GroupId { disk: [1; 16], owner_epoch: 1, number: 1 };
        let step = StepId::of_leader(leader);
        let mut data = member(&place, "data", leader.disk, step);
        drop(member(&place, "log", [2; 16], step));
        if committed {
            let stamp = data.standing(Damage::Refuse).unwrap().unwrap().stamp;
            let stamp = Stamp { committed_step: step.number, ..stamp.next(2) };
            write_stamp(data.disks().1.unwrap(), &stamp).unwrap();
        }
        drop(data);
        let shown = said(&place.run(&["show", "log"]));
        assert!(shown.contains("Consistency group:  db, whose leader knows"), "{shown}");
        // The other one was moved: it is named, and nothing is done by halves.
        let moved = [("data", "moved"), ("data.vflash", "moved.vflash")];
        let rename = |from: &str, to: &str| {
            std::fs::rename(place.path(from), place.path(to)).unwrap();
        };
        moved.iter().for_each(|(from, to)| rename(from, to));
        let half = place.run(&["recover", "log"]);
        assert_eq!(half.status.code(), Some(8), "{half:?}");
        let text = complained(&half);
        assert!(text.contains("name all of them,") && text.contains("data of db/data"), "{text}");
        let both = place.run(&["recover", "log", "moved"]);
        assert_eq!(both.status.code(), Some(0), "{both:?}");
        let point = if committed { "42" } else { "0" };
        let line = format!("Point:              {point}\n");
        assert_eq!(said(&both).matches(&line).count(), 2, "{}", said(&both));
        let byte = if committed { 0x77 } else { 0 };
        for name in ["log", "moved"] {
            assert_eq!(std::fs::read(place.path(name)).unwrap()[4096], byte, "{name}");
        }
        // Back in its place it is found.
        moved.iter().for_each(|(from, to)| rename(to, from));
        let again = place.run(&["recover", "log", "-o", "json"]);
        assert_eq!(again.status.code(), Some(0), "{again:?}");
        let json: serde_json::Value = serde_json::from_slice(&again.stdout).unwrap();
        assert_eq!(json.as_array().unwrap().len(), 2, "{json}");
    }
}

#[test]
fn disks_go_on_without_a_leader_that_was_given_up() {
    // The points of a third disk, which is served: after the step, or before it.
    for (served, byte) in [(vec![], 0x77), (vec![42], 0x77), (vec![41], 0)] {
        let place = Place(tempfile::tempdir().unwrap());
        let step = StepId::of_leader(GroupId { disk: [1; 16], owner_epoch: 1, number: 1 });
        let mut backings = [member(&place, "log", [2; 16], step)];
        settle_without_leader(&mut backings, &served, RecoverOptions::default()).unwrap();
        // Once is for all: a second time there is nothing to settle.
        settle_without_leader(&mut backings, &[0], RecoverOptions::default()).unwrap();
        drop(backings);
        assert_eq!(std::fs::read(place.path("log")).unwrap()[4096], byte, "{served:?}");
        let shown = said(&place.run(&["show", "log"]));
        assert!(!shown.contains("whose leader knows"), "{shown}");
    }
}

/// A disk in doubt whose leader is gone for good: who says so by its name has the others recovered
/// without it, and can then give up their flash too.
#[test]
fn a_disk_whose_leader_is_gone_with_its_sidecar_is_recovered_without_it() {
    let place = Place(tempfile::tempdir().unwrap());
    let step = StepId::of_leader(GroupId { disk: [1; 16], owner_epoch: 1, number: 1 });
    drop(member(&place, "data", [1; 16], step));
    drop(member(&place, "log", [2; 16], step));
    let there = place.run(&["recover", "log", "--without", "db/data"]);
    assert_eq!(there.status.code(), Some(8), "{there:?}");
    let text = complained(&there);
    assert!(text.contains("db/data is not missing"), "{text}");
    for name in ["data", "data.vflash"] {
        std::fs::remove_file(place.path(name)).unwrap();
    }
    let before = std::fs::read(place.path("log.vflash")).unwrap();
    let detach = |confirm: &[&str]| {
        let mut command = vflash();
        command.current_dir(place.0.path()).args(["detach", "--lost", "--backing", "log"]);
        command.args(confirm).output().unwrap()
    };
    let doubt = detach(&["--confirm", "db/log"]);
    let text = complained(&doubt);
    assert!(text.contains("give that disk up by its name, db/data: "), "{text}");
    assert!(text.contains("log --without NAME`; nothing was changed"), "{text}");
    let half = complained(&place.run(&["recover", "log"]));
    assert!(
        half.contains("is given up by `--without db/data`: all that it held is lost"),
        "{half}"
    );
    let wrong = place.run(&["recover", "log", "--without", "db/other"]);
    assert!(complained(&wrong).contains("db/other is not missing"), "{wrong:?}");
    assert_eq!(std::fs::read(place.path("log.vflash")).unwrap(), before, "untouched");
    let done = place.run(&["recover", "log", "--without", "db/data"]);
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    let text = said(&done);
    assert!(text.contains("Point:              42\n"), "it has all of the step: {text}");
    assert!(text.contains("db/data of its consistency group was given up"), "{text}");
    assert_eq!(std::fs::read(place.path("log")).unwrap()[4096], 0x77);
    let given_up = detach(&["--confirm", "db/log"]);
    assert_eq!(given_up.status.code(), Some(0), "{given_up:?}");
    assert!(said(&given_up).contains("State:    clean"), "{given_up:?}");
}
