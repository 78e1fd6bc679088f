//! Pools without a daemon, and those that a daemon cannot open.

mod daemon;

use daemon::{Daemon, vflash};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Output;
use std::time::Duration;
use vflash::control::http::Access;
use vflash::io::file::FileDisk;

const SOON: Duration = Duration::from_secs(30);

fn run(folder: &Path, arguments: &[&str]) -> Output {
    vflash()
        .current_dir(folder)
        .arg("--run-dir")
        .arg(folder.join("none"))
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn a_pool_is_made_and_checked_without_a_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let create = ["pool", "create", "p0", "pool", "--size", "64MiB"];
    let made = run(folder.path(), &create);
    assert!(made.status.success(), "{made:?}");
    let sound = run(folder.path(), &["pool", "check", "./pool"]);
    assert_eq!(sound.status.code(), Some(0), "{sound:?}");
    // The same again would destroy the pool.
    let again = run(folder.path(), &create);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("pool p0"), "{again:?}");
    let yes = run(folder.path(), &[&create[..], &["--yes"]].concat());
    assert!(yes.status.success(), "{yes:?}");
    let written = ["pool", "create", "p1", "full", "--size", "32MiB", "--preallocate", "written"];
    let made = run(folder.path(), &written);
    assert!(made.status.success(), "{made:?}");
    // What is reserved but was never written counts as a hole.
    let hole = |name: &str| {
        let file = std::fs::File::open(folder.path().join(name)).unwrap();
        nix::unistd::lseek(file, 12 << 20, nix::unistd::Whence::SeekHole).unwrap()
    };
    assert_eq!((hole("pool"), hole("full")), (12 << 20, 32 << 20));
    // One copy of each root is lost: the others hold all, and the next opening repairs it.
    let file = std::fs::File::options().write(true).open(folder.path().join("pool")).unwrap();
    for offset in [64 << 10, 320 << 10] {
        file.write_all_at(&[0xff; 4096], offset).unwrap();
    }
    let damaged = run(folder.path(), &["pool", "check", "./pool"]);
    assert_eq!(damaged.status.code(), Some(4), "{damaged:?}");
    let nothing = run(folder.path(), &["pool", "check", "./nothing"]);
    assert_eq!(nothing.status.code(), Some(8), "{nothing:?}");
}

#[test]
fn what_is_no_pool_cannot_be_checked() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("text"), vec![b'x'; 8 << 20]).unwrap();
    std::fs::write(folder.path().join("zeros"), vec![0; 8 << 20]).unwrap();
    for (verb, file) in [
        (&["pool", "check"][..], "./text"),
        (&["pool", "check"], "./zeros"),
        (&["pool", "check"], "./"),
        (&["check"], "./text"),
    ] {
        let output = run(folder.path(), &[verb, &[file]].concat());
        assert_eq!(output.status.code(), Some(8), "{verb:?} {file}: {output:?}");
        assert!(output.stdout.is_empty(), "{verb:?} {file}: {output:?}");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        let why = if file == "./" { "neither a file nor a block device" } else { "no pool" };
        assert!(told.contains(why) && told.contains(file), "{verb:?} {file}: {told}");
    }
}

#[test]
fn a_check_only_reads() {
    let folder = tempfile::tempdir().unwrap();
    let create = ["pool", "create", "p0", "pool", "--size", "64MiB"];
    assert!(run(folder.path(), &create).status.success());
    let path = folder.path().join("pool");
    let check = || run(folder.path(), &["pool", "check", "./pool"]);
    // A length that is no multiple of any block is no hindrance.
    std::fs::File::options().write(true).open(&path).unwrap().set_len((64 << 20) + 100).unwrap();
    assert_eq!(check().status.code(), Some(0));
    std::fs::File::options().write(true).open(&path).unwrap().set_len(64 << 20).unwrap();
    // Children of other tests hold a copy of a description for a moment.
    let reader = FileDisk::open_reading(&path, SOON).unwrap();
    assert_eq!(check().status.code(), Some(0), "beside another that reads: {:?}", check());
    drop(reader);
    let writer = FileDisk::open(&path, SOON).unwrap();
    let held = check();
    assert_eq!(held.status.code(), Some(8), "{held:?}");
    assert!(String::from_utf8_lossy(&held.stderr).contains("is in use"), "{held:?}");
    drop(writer);
}

#[test]
fn a_pool_that_could_not_be_opened_is_named_once_and_closed_by_its_path() {
    let daemon = Daemon::start(Access { group: None });
    let missing = daemon.path("missing").display().to_string();
    let strange = daemon.path("text of mine, 100%").display().to_string();
    std::fs::write(&strange, vec![b'x'; 8 << 20]).unwrap();
    daemon.open_pools(&[missing.clone(), strange.clone()]);
    let status = daemon.says(&["status"]);
    let problems = status.lines().filter(|line| line.starts_with("Problem: "));
    let problems: Vec<&str> = problems.collect();
    for (problem, file) in problems.iter().zip(["DIR/missing", "DIR/text of mine, 100%"]) {
        assert_eq!(problem.matches(file).count(), 1, "{problem}");
    }
    assert_eq!(problems.len(), 2, "{status}");
    for event in daemon.says(&["events", "-o", "json"]).lines() {
        let places = event.matches("DIR/").count();
        assert!(places <= 2, "an object, and its place once: {event}");
    }
    assert!(daemon.says(&["pool", "show", &strange]).contains("failed"));
    daemon.says(&["pool", "close", &strange]);
    // As it is named from where the caller stands.
    let mut close = daemon.vflash();
    close.current_dir(daemon.folder.path()).args(["pool", "close", "./missing"]);
    let closed = close.output().unwrap();
    assert!(closed.status.success(), "{closed:?}");
    assert_eq!(daemon.says(&["get", "pools"]), "No pools.\n");
    let (_, told) = daemon.fails(&["pool", "close", &missing]);
    assert!(told.contains("there is no pool `DIR/missing`"), "{told}");
    // One that is open, too.
    let manifest = daemon.manifest().display().to_string();
    daemon.says(&["apply", "-f", &manifest]);
    daemon.says(&["pool", "close", &daemon.path("pool").display().to_string()]);
    assert_eq!(daemon.says(&["get", "pools"]), "No pools.\n");
}

/// A manifest takes back each size that was once in one.
#[test]
fn sizes_that_were_asked_for_are_printed_as_asked_for() {
    let daemon = Daemon::start(Access { group: None });
    let manifest = daemon.manifest();
    let text = std::fs::read_to_string(&manifest).unwrap();
    let text = text.replace("1GiB", "12345MiB").replace("400MiB/s", "123456KiB/s");
    std::fs::write(&manifest, text).unwrap();
    daemon.says(&["apply", "-f", manifest.to_str().unwrap()]);
    for verb in [&["get", "volumes"][..], &["describe", "web-1/root"], &["pool", "show", "p0"]] {
        let told = daemon.says(verb);
        assert!(told.contains(" 12345MiB") || told.contains(" 12409MiB"), "{told}");
    }
    let told = daemon.says(&["describe", "web-1/scratch"]);
    assert!(told.contains(" 123456KiB/s"), "{told}");
    let (_, told) = daemon.fails(&["resize", "web-1/root", "65.5MiB"]);
    assert!(told.contains("cannot have 67072KiB: write 65MiB or 66MiB"), "{told}");
    let (_, told) = daemon.fails(&["resize", "web-1/root", "0"]);
    assert!(told.contains("cannot have 0: write 1MiB"), "{told}");
}
