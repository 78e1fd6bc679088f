//! Pools without a daemon.

mod daemon;

use daemon::vflash;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Output;

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
