//! What a backing is known by, so that another one in its place is found out.

use super::spec::NbdUrl;
use super::stamp::Stamp;
use crate::base::units::Bytes;
use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::UNIX_EPOCH;

/// What a backing is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    File,
    Device,
    Nbd,
}

impl Kind {
    pub(super) fn code(self) -> u8 {
        match self {
            Self::File => 1,
            Self::Device => 2,
            Self::Nbd => 3,
        }
    }

    pub(super) fn from_code(code: u8) -> Option<Self> {
        [Self::File, Self::Device, Self::Nbd].into_iter().find(|kind| kind.code() == code)
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Device => "block device",
            Self::Nbd => "NBD export",
        }
    }
}

/// What a backing is known by. It survives a reboot and is the same on every host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub kind: Kind,
    pub size_bytes: u64,
    /// The logical block size.
    pub block_bytes: u32,
    /// A file's inode number and time of birth; a hash of a device's world-wide name or of an
    /// export's name. A half that is 0 is not known, and equals any.
    pub fingerprint: [u64; 2],
}

/// How a backing differs from what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// In words.
    pub text: String,
    /// It may be the same disk at a new place, if somebody says so: size and blocks are the same.
    pub adoptable: bool,
}

impl Identity {
    /// What differs from what was expected; `None` if it is the same backing.
    pub fn difference(&self, found: &Self) -> Option<Difference> {
        let fatal = |text| Some(Difference { text, adoptable: false });
        if self.size_bytes != found.size_bytes {
            let (was, is) = (Bytes(self.size_bytes), Bytes(found.size_bytes));
            return fatal(format!("its size was {was} and is {is}"));
        }
        if found.block_bytes > self.block_bytes {
            let (was, is) = (self.block_bytes, found.block_bytes);
            return fatal(format!("its blocks had {was} bytes and have {is}"));
        }
        let text = if self.kind != found.kind {
            format!("it was a {} and is a {}", self.kind.name(), found.kind.name())
        } else if self.has_other_fingerprint(found) {
            let text = match self.kind {
                Kind::File => "it is another file (inode number or time of birth)",
                Kind::Device => "it is another device (world-wide name)",
                Kind::Nbd => "it is another export (name)",
            };
            text.to_owned()
        } else {
            return None;
        };
        Some(Difference { text, adoptable: true })
    }

    fn has_other_fingerprint(&self, found: &Self) -> bool {
        let mut halves = self.fingerprint.iter().zip(&found.fingerprint);
        halves.any(|(was, is)| *was != 0 && *is != 0 && was != is)
    }

    pub(super) fn of_nbd(url: &NbdUrl, size_bytes: u64, block_bytes: u32) -> Self {
        let fingerprint = hash(url.export.as_bytes());
        Self { kind: Kind::Nbd, size_bytes, block_bytes, fingerprint }
    }

    pub(super) fn of_file(file: &File, size_bytes: u64, block_bytes: u32) -> std::io::Result<Self> {
        let metadata = file.metadata()?;
        if metadata.file_type().is_block_device() {
            let fingerprint = world_wide_name(metadata.rdev()).map_or([0; 2], |name| hash(&name));
            return Ok(Self { kind: Kind::Device, size_bytes, block_bytes, fingerprint });
        }
        // Not every file system knows when a file was born.
        let born = metadata.created().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        let born = born.map_or(0, |since| since.as_nanos() as u64);
        let fingerprint = [metadata.ino(), born];
        Ok(Self { kind: Kind::File, size_bytes, block_bytes, fingerprint })
    }
}

/// What a file's content is known by for as long as nobody meddles with its times: another one
/// after every write to it.
pub(super) fn generation_of_file(file: &File) -> std::io::Result<Option<[u64; 2]>> {
    let metadata = file.metadata()?;
    if metadata.file_type().is_block_device() {
        return Ok(None);
    }
    let born = metadata.created().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    let born = born.map_or(0, |since| since.as_nanos() as u64);
    let (seconds, nanoseconds) = (metadata.mtime() as u64, metadata.mtime_nsec() as u64);
    let words = [metadata.ino(), born, metadata.size(), seconds, nanoseconds];
    let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    Ok(Some(hash(&bytes)))
}

/// As [`generation_of_file`], by an owner stamp, which every owner since has written.
pub(super) fn generation_of_stamp(stamp: &Stamp, identity: &Identity) -> [u64; 2] {
    let [first, second] = identity.fingerprint;
    let words = [first, second, stamp.owner_epoch, stamp.point.won, stamp.sequence];
    let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    hash(&bytes)
}

/// What the kernel knows a block device by across reboots and hosts, if it does.
fn world_wide_name(device: u64) -> Option<Vec<u8>> {
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let folder = format!("/sys/dev/block/{major}:{minor}");
    let names = ["wwid", "device/wwid", "dm/uuid", "md/uuid", "../wwid", "../device/wwid"];
    let mut name = names
        .iter()
        .filter_map(|name| std::fs::read(Path::new(&folder).join(name)).ok())
        .find(|bytes| !bytes.trim_ascii().is_empty())?;
    // A partition shares its drive's name.
    let start = std::fs::read(Path::new(&folder).join("start")).unwrap_or_default();
    name.extend_from_slice(&start);
    Some(name)
}

/// FNV-1a, 128 bits: names are few, and nobody is to be kept from making two alike.
fn hash(bytes: &[u8]) -> [u64; 2] {
    let mut hash: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    for byte in bytes {
        hash ^= u128::from(*byte);
        hash = hash.wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
    }
    [hash as u64, (hash >> 64) as u64]
}
