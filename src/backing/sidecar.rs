//! The sidecar on the shared storage: stamps and group headers, read and written one operation
//! after the other.

use super::redo::{BLOCK_BYTES, GroupHeader, HeaderBlock, Layout};
use super::stamp::{STAMP_BYTES, STAMP_OFFSETS, Stamp, StampBlock};
use crate::base::{Error, ErrorKind, Result};
use crate::io::blocking::Blocking;
use crate::io::disk::Errno;

/// What a sidecar's stamps say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamps {
    /// The newest; `None` if there was never one.
    pub newest: Option<Stamp>,
    /// Byte offsets of copies of the newest that are damaged or missing.
    pub repairs: Vec<u64>,
    /// Damage, in words.
    pub findings: Vec<String>,
}

/// Reads the stamps; changes nothing.
///
/// # Errors
/// [`ErrorKind::Unsupported`]: a newer vflash wrote them. [`ErrorKind::Corrupt`]: none is whole,
/// and they are not just empty.
pub fn read_stamps(sidecar: &mut Blocking) -> Result<Stamps> {
    let mut blocks = Vec::new();
    for offset in STAMP_OFFSETS.as_flattened() {
        // An unreadable copy is a damaged one.
        let block = match sidecar.read(*offset, STAMP_BYTES) {
            Ok(bytes) => Stamp::decode(&bytes),
            Err(Errno::EIO) => StampBlock::Damaged("cannot be read"),
            Err(errno) => return Err(failed("reading a stamp", *offset, errno)),
        };
        blocks.push((*offset, block));
    }
    let mut stamps = Stamps { newest: None, repairs: Vec::new(), findings: Vec::new() };
    for (offset, block) in &blocks {
        match block {
            StampBlock::Newer { version, features } => {
                let text = format!(
                    "a newer vflash wrote this sidecar (version {version}, features {features:#x} \
                     at byte {offset}): use that version; nothing was changed"
                );
                return Err(Error::new(ErrorKind::Unsupported, text));
            }
            StampBlock::Valid(stamp) => {
                let newer = |newest: &Stamp| stamp.sequence > newest.sequence;
                if stamps.newest.as_ref().is_none_or(newer) {
                    stamps.newest = Some((**stamp).clone());
                }
            }
            StampBlock::Damaged(why) => {
                stamps.findings.push(format!("stamp at byte {offset}: {why}"));
            }
            StampBlock::Foreign => {
                stamps.findings.push(format!("stamp at byte {offset}: not a stamp"));
            }
            StampBlock::Empty => {}
        }
    }
    let Some(newest) = &stamps.newest else {
        return if stamps.findings.is_empty() { Ok(stamps) } else { Err(no_stamp(&blocks)) };
    };
    let is_newest =
        |block: &StampBlock| matches!(block, StampBlock::Valid(one) if **one == *newest);
    let copies = newest.offsets();
    let lacking = blocks.iter().filter(|(at, block)| copies.contains(at) && !is_newest(block));
    stamps.repairs = lacking.map(|(at, _)| *at).collect();
    Ok(stamps)
}

fn no_stamp(blocks: &[(u64, StampBlock)]) -> Error {
    let known = |(_, block): &(u64, StampBlock)| matches!(block, StampBlock::Damaged(_));
    let text = match blocks.iter().any(known) {
        true => {
            "every copy of the owner stamp is damaged, so nobody knows whose writes the backing \
             lacks: attach the disk on the host that had it last, or restore the sidecar"
        }
        false => {
            "this is not a sidecar, other data lies in it: name another place (`sidecar:`), or \
             remove the file, or zero the first 64 KiB of the device, if it is not needed"
        }
    };
    Error::new(ErrorKind::Corrupt, text)
}

/// Writes a stamp in both copies and makes it durable.
///
/// # Errors
/// The outcome is open. Nothing may be done that supposes either; a stamp with the same sequence
/// may be written again.
pub fn write_stamp(sidecar: &mut Blocking, stamp: &Stamp) -> Result<()> {
    let [offset, _] = stamp.offsets();
    sidecar
        .write_copies(&stamp.offsets(), &stamp.encode())
        .and_then(|()| sidecar.flush())
        .map_err(|errno| failed("writing the owner stamp", offset, errno))
}

/// Completes the newest stamp and makes durable what was read: a killed daemon's writes may be
/// visible and still in the storage's cache.
pub(super) fn settle(sidecar: &mut Blocking, stamps: &Stamps) -> Result<()> {
    if let Some(newest) = &stamps.newest
        && !stamps.repairs.is_empty()
    {
        return write_stamp(sidecar, newest);
    }
    sidecar.flush().map_err(|errno| failed("flushing", 0, errno))
}

/// Reads both slots' headers.
pub fn read_headers(sidecar: &mut Blocking, layout: &Layout) -> Result<[HeaderBlock; 2]> {
    let mut headers = [HeaderBlock::Empty; 2];
    for (slot, header) in (0..).zip(&mut headers) {
        let offset = layout.header_offset(slot);
        *header = match sidecar.read(offset, BLOCK_BYTES as usize) {
            Ok(bytes) => GroupHeader::decode(&bytes, layout),
            Err(Errno::EIO) => HeaderBlock::Damaged("cannot be read"),
            Err(errno) => return Err(failed("reading a redo group's header", offset, errno)),
        };
    }
    Ok(headers)
}

/// Makes both slots empty and durably so, for a sidecar that is new.
pub(super) fn clear_headers(sidecar: &mut Blocking, layout: &Layout) -> Result<()> {
    let zeros = vec![0; BLOCK_BYTES as usize];
    let offsets = [0, 1].map(|slot| layout.header_offset(slot));
    sidecar
        .write_copies(&offsets, &zeros)
        .and_then(|()| sidecar.flush())
        .map_err(|errno| failed("preparing the sidecar", offsets[0], errno))
}

pub(super) fn failed(what: &str, offset: u64, errno: Errno) -> Error {
    Error::io(format!("{what} (byte {offset} of the sidecar)"), errno.into())
}
