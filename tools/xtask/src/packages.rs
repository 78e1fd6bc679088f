//! What the host must have besides the Rust toolchain: installed when we are root, else named.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use vflash_guest::process::output;

/// Debian packages, and the program by which each is found to be there.
const PACKAGES: &[(&str, &str)] = &[
    ("fio", "fio"),
    ("linux-perf", "perf"),
    ("nbdkit", "nbdkit"),
    ("qemu-system-common", "qemu-storage-daemon"),
    ("qemu-system-x86", "qemu-system-x86_64"),
    ("qemu-utils", "qemu-nbd"),
];

/// What it takes to boot a guest.
pub(crate) const GUEST: &[&str] = &["qemu-system-x86"];

/// What it takes to compare with others.
pub(crate) const PEERS: &[&str] = &["fio", "qemu-system-common"];

/// What tells where time goes.
pub(crate) const PROFILE: &[&str] = &["linux-perf"];

/// What exports disks over NBD.
pub(crate) const NBD: &[&str] = &["nbdkit", "qemu-utils"];

/// Parts of the toolchain that a minimal one lacks.
const COMPONENTS: &[(&str, &str)] = &[("fmt", "rustfmt"), ("clippy", "clippy")];

/// Makes sure that these packages are there; says what it did.
pub(crate) fn need(packages: &[&str]) -> Result<String> {
    let missing: Vec<&str> = packages.iter().copied().filter(|name| !is_there(name)).collect();
    if missing.is_empty() {
        return Ok("all there".to_owned());
    }
    let words = missing.join(" ");
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "packages are missing; run: sudo apt-get update && \
             sudo apt-get install --no-install-recommends {words}"
        );
    }
    apt_get(&["update"])?;
    apt_get(&[&["install", "--yes", "--no-install-recommends"], &missing[..]].concat())?;
    let absent = missing.iter().find(|name| !is_there(name));
    ensure!(absent.is_none(), "apt-get installed {absent:?}, yet its program is not on the PATH");
    Ok(format!("installed {words}"))
}

/// Makes sure that cargo can format and lint.
pub(crate) fn provide_components() -> Result<()> {
    for (subcommand, component) in COMPONENTS {
        if output(Command::new("cargo").args([subcommand, "--version"])).is_err() {
            output(Command::new("rustup").args(["component", "add", component]))
                .with_context(|| format!("cargo has no {subcommand}; add rustup's {component}"))?;
        }
    }
    Ok(())
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.args(["--quiet=2"]).args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    let status = command.status().context("start apt-get; this needs Debian")?;
    ensure!(status.success(), "apt-get {} failed", arguments.join(" "));
    Ok(())
}

fn is_there(package: &str) -> bool {
    let (_, program) = PACKAGES
        .iter()
        .find(|(name, _)| *name == package)
        .unwrap_or_else(|| panic!("PACKAGES must say which program shows that {package} is there"));
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':').any(|directory| Path::new(directory).join(program).is_file())
}
