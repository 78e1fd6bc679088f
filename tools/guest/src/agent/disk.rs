//! One disk: what the guest sees of it, and single requests to it.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::fcntl::OFlag;
use vflash_guest::process::output;
use vflash_guest::reply::Reply;
use vflash_guest::stamp::{self, SECTOR_BYTES, Stamp};

use super::options::Options;

/// Bytes of one request of [`fill`], [`check`] and [`zeros`].
const REQUEST_BYTES: usize = 64 << 10;

/// Largest request that [`Buffer`] holds.
pub(crate) const BUFFER_BYTES: usize = REQUEST_BYTES;

/// Memory that satisfies any disk's alignment.
#[repr(C, align(4096))]
pub(crate) struct Buffer([u8; BUFFER_BYTES]);

impl Buffer {
    pub(crate) fn new() -> Box<Self> {
        Box::new(Self([0; BUFFER_BYTES]))
    }

    pub(crate) fn first(&mut self, bytes: usize) -> &mut [u8] {
        &mut self.0[..bytes]
    }
}

/// Opens past the guest's page cache, so that each read and write reaches the disk.
pub(crate) fn open_direct(path: &Path, create: bool) -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create(create)
        .custom_flags(OFlag::O_DIRECT.bits())
        .open(path)
        .with_context(|| format!("open {}", path.display()))
}

/// What Linux says of the disk.
pub(crate) fn info(disk: &str) -> Result<Reply> {
    let directory = Path::new("/sys/block").join(disk);
    let read = |name: &str| -> Result<String> {
        let path = directory.join(name);
        let text = fs::read_to_string(&path);
        Ok(text.with_context(|| format!("read {}", path.display()))?.trim().to_owned())
    };
    let sectors: u64 = read("size")?.parse().context("the size is a number")?;
    let queues = fs::read_dir(directory.join("mq")).context("list the queues")?.count();
    Ok(Reply::new()
        .with("size", sectors * SECTOR_BYTES as u64)
        .with("serial", read("serial")?)
        .with("rotational", read("queue/rotational")?)
        .with("read_only", read("ro")?)
        .with("queues", queues)
        .with("cache", read("cache_type")?)
        .with("logical_block", read("queue/logical_block_size")?)
        .with("physical_block", read("queue/physical_block_size")?)
        .with("discard_max", read("queue/discard_max_bytes")?)
        .with("write_zeroes_max", read("queue/write_zeroes_max_bytes")?))
}

/// Stamps a range of a disk, or of a file that is made if it is missing, with `run=`; the same
/// range and run can be checked at any later time.
pub(crate) fn fill(options: &Options) -> Result<Reply> {
    let path = options.path()?;
    let file = open_direct(&path, !path.starts_with("/dev"))?;
    let run = options.number("run")?;
    for_each_request(options, |buffer, offset| {
        stamp::write_block(buffer, Stamp { run, address: offset, sequence: 1 });
        file.write_all_at(buffer, offset).with_context(|| format!("write at {offset}"))
    })?;
    file.sync_data().context("flush")?;
    Ok(Reply::new())
}

/// Compares a range with what [`fill`] put there: `wrong` requests, and the first of them.
pub(crate) fn check(options: &Options) -> Result<Reply> {
    let file = open_direct(&options.path()?, false)?;
    let run = options.number("run")?;
    let (mut wrong, mut first) = (0, String::new());
    for_each_request(options, |buffer, offset| {
        file.read_exact_at(buffer, offset).with_context(|| format!("read at {offset}"))?;
        if let Some(what) =
            stamp::first_mismatch(buffer, Stamp { run, address: offset, sequence: 1 })
        {
            wrong += 1;
            if first.is_empty() {
                first = what;
            }
        }
        Ok(())
    })?;
    Ok(Reply::new().with("wrong", wrong).with("first", first))
}

/// The length and the checksum (CRC32C) of a file or disk.
pub(crate) fn checksum(options: &Options) -> Result<Reply> {
    let mut file = open_direct(&options.path()?, false)?;
    let (mut buffer, mut bytes, mut sum) = (Buffer::new(), 0, 0);
    loop {
        let part = buffer.first(REQUEST_BYTES);
        let length = file.read(part).with_context(|| format!("read at {bytes}"))?;
        if length == 0 {
            return Ok(Reply::new().with("bytes", bytes).with("sum", format!("{sum:08x}")));
        }
        sum = crc32c::crc32c_append(sum, &part[..length]);
        bytes += length;
    }
}

/// Counts the bytes of a range that are not zero.
pub(crate) fn zeros(options: &Options) -> Result<Reply> {
    let file = open_direct(&options.path()?, false)?;
    let mut others = 0;
    for_each_request(options, |buffer, offset| {
        file.read_exact_at(buffer, offset).with_context(|| format!("read at {offset}"))?;
        others += buffer.iter().filter(|byte| **byte != 0).count();
        Ok(())
    })?;
    Ok(Reply::new().with("nonzero", others))
}

/// Has Linux discard a range, or write zeroes to it, by one call.
pub(crate) fn discard(options: &Options, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("blkdiscard");
    command.args(["--force", "--offset", options.text("offset")?]);
    command.args(["--length", options.text("bytes")?]).args(arguments).arg(options.path()?);
    output(&mut command).map(|_| ())
}

/// Turns the disk's volatile write cache on or off.
pub(crate) fn set_write_cache(options: &Options) -> Result<()> {
    let mode = match options.text("mode")? {
        "on" => "write back",
        "off" => "write through",
        other => bail!("mode={other} is neither on nor off"),
    };
    let path = Path::new("/sys/block").join(options.disk()?).join("cache_type");
    fs::write(&path, mode).with_context(|| format!("write {}", path.display()))
}

fn for_each_request(
    options: &Options,
    mut request: impl FnMut(&mut [u8], u64) -> Result<()>,
) -> Result<()> {
    let (mut offset, bytes) = (options.number("offset")?, options.number("bytes")?);
    let mut buffer = Buffer::new();
    let end = offset + bytes;
    while offset < end {
        let length = (end - offset).min(REQUEST_BYTES as u64) as usize;
        request(buffer.first(length), offset)?;
        offset += length as u64;
    }
    Ok(())
}
