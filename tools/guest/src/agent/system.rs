//! The guest as a system: start, file systems, swap, udev, the kernel's log. Stock Debian programs
//! do the work, as they would in any guest.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::fcntl::OFlag;
use vflash_guest::process::output;
use vflash_guest::reply::Reply;

use super::options::Options;

/// What the kernel's log says when a disk fails a request.
const KERNEL_ERRORS: &[&str] = &["I/O error", "EXT4-fs error", "timed out", "hung task"];

const PAGE_BYTES: usize = 4096;

/// Mounts what every program expects, loads the drivers and makes `port` carry bytes unchanged.
pub(crate) fn start(port: &str) -> Result<()> {
    // First, and with the console as input: other programs are given /dev/null.
    let devices = Command::new("mount").args(["-t", "devtmpfs", "none", "/dev"]).status();
    if !devices.context("start mount")?.success() {
        bail!("cannot mount /dev");
    }
    for (kind, directory) in [("proc", "/proc"), ("sysfs", "/sys")] {
        run("mount", &["-t", kind, "none", directory])?;
    }
    let entries = fs::read_dir("/modules").context("list the modules")?;
    let mut modules: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    modules.sort();
    for module in modules {
        output(Command::new("insmod").arg(module))?;
    }
    run("stty", &["-F", port, "raw", "-echo"])
}

pub(crate) fn make_file_system(options: &Options) -> Result<()> {
    let mut command = Command::new("mke2fs");
    output(command.args(["-q", "-F", "-t", "ext4"]).arg(options.path()?)).map(|_| ())
}

/// Reports any damage as an error, repairs none.
pub(crate) fn check_file_system(options: &Options) -> Result<()> {
    output(Command::new("e2fsck").args(["-f", "-n"]).arg(options.path()?)).map(|_| ())
}

pub(crate) fn mount(options: &Options) -> Result<()> {
    let mut command = Command::new("mount");
    output(command.args(["-t", "ext4"]).arg(options.path()?).arg("/mnt")).map(|_| ())
}

pub(crate) fn unmount(options: &Options) -> Result<()> {
    output(Command::new("umount").arg(options.path()?)).map(|_| ())
}

/// Deletes a file, and waits until the disk knows.
pub(crate) fn remove(options: &Options) -> Result<()> {
    fs::remove_file(options.path()?).context("delete a file")?;
    run("sync", &[])
}

/// Discards what the mounted file system does not use.
pub(crate) fn trim(options: &Options) -> Result<()> {
    output(Command::new("fstrim").arg(options.path()?)).map(|_| ())
}

/// Swaps to the disk while `bytes=` of memory, more than the guest has, are written and read back.
pub(crate) fn swap(options: &Options) -> Result<Reply> {
    let path = options.path()?;
    output(Command::new("mkswap").arg(&path))?;
    output(Command::new("swapon").arg(&path))?;
    let mut memory = vec![0_u8; options.number("bytes")? as usize];
    let page_mark = |index: usize| (index as u64 + 1).to_le_bytes();
    for (index, page) in memory.chunks_exact_mut(PAGE_BYTES).enumerate() {
        page[..8].copy_from_slice(&page_mark(index));
    }
    let used_kib = swapped_kib()?;
    let pages = memory.chunks_exact(PAGE_BYTES).enumerate();
    let wrong = pages.filter(|(index, page)| page[..8] != page_mark(*index)).count();
    drop(memory);
    output(Command::new("swapoff").arg(&path))?;
    Ok(Reply::new().with("swapped_kib", used_kib).with("wrong", wrong))
}

/// Starts udev with the rule under test and waits until it has seen every device.
pub(crate) fn start_udev() -> Result<()> {
    run("systemd-udevd", &["--daemon", "--resolve-names=never"])?;
    run("udevadm", &["trigger", "--action=add"])?;
    run("udevadm", &["settle"])
}

/// How many lines of the kernel's log tell of failed or stuck requests, and the first.
pub(crate) fn kernel_errors() -> Result<Reply> {
    let mut log = File::options()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open("/dev/kmsg")
        .context("open the kernel's log")?;
    let (mut count, mut first) = (0, String::new());
    // Larger than any record; a smaller buffer would make the read fail.
    let mut record = vec![0; 8192];
    loop {
        let length = match log.read(&mut record) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            // Older records were overwritten while we read; the next read goes on after the gap.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => continue,
            Err(error) => return Err(error).context("read the kernel's log"),
        };
        let text = String::from_utf8_lossy(&record[..length]);
        if KERNEL_ERRORS.iter().any(|error| text.contains(error)) {
            count += 1;
            if first.is_empty() {
                first = text.trim().to_owned();
            }
        }
    }
    Ok(Reply::new().with("count", count).with("first", first))
}

fn swapped_kib() -> Result<u64> {
    let swaps = fs::read_to_string("/proc/swaps").context("read /proc/swaps")?;
    // A heading, then: name, type, size, used, priority.
    let used = swaps.lines().nth(1).and_then(|line| line.split_whitespace().nth(3));
    match used.map(str::parse) {
        Some(Ok(used)) => Ok(used),
        _ => bail!("cannot read {swaps:?}"),
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    output(Command::new(program).args(arguments)).map(|_| ())
}
