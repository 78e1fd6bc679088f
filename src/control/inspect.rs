//! What is on a device before it becomes a pool, so that nobody's data is overwritten unnamed.

use super::pool::PoolFacts;
use crate::base::units::EXTENT_BYTES;
use crate::base::{Error, ErrorKind, Result};
use crate::flash::Pool;
use crate::io::disk::Disk;
use crate::io::file::FileDisk;
use crate::manifest::DeviceState;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

/// Beginnings that people know the name of: offset, bytes, name.
const SIGNATURES: [(usize, &[u8], &str); 9] = [
    (0, b"XFSB", "an XFS file system"),
    (0, b"LUKS\xba\xbe", "a LUKS volume"),
    (0, b"QFI\xfb", "a qcow2 image"),
    (512, b"EFI PART", "a GPT partition table"),
    (512, b"LABELONE", "an LVM physical volume"),
    (1080, b"\x53\xef", "an ext2, ext3 or ext4 file system"),
    (4086, b"SWAPSPACE2", "swap space"),
    (65_600, b"_BHRfS_M", "a Btrfs file system"),
    (510, b"\x55\xaa", "a boot sector or partition table"),
];

/// Blocks that are looked at besides the head, spread evenly, the last one among them.
const SAMPLES: u64 = 256;
const SAMPLE_BYTES: u64 = 4096;

/// Whoever only looks at a device for a moment is waited for.
const HELD_WAIT: Duration = Duration::from_secs(1);

/// What was found, and the pool's facts if it is one.
pub struct Found {
    pub state: DeviceState,
    pub pool: Option<PoolFacts>,
}

/// Looks at a path that no pool of ours is open on, and writes nothing there.
///
/// # Errors
/// It cannot be read, or somebody else holds it.
pub fn look(path: &Path) -> Result<Found> {
    let missing = path.try_exists().is_ok_and(|exists| !exists);
    if missing {
        return Ok(Found { state: DeviceState::Missing, pool: None });
    }
    let disk = FileDisk::open(path, HELD_WAIT)?;
    let size_bytes = disk.geometry().size_bytes;
    let head = read_head(&disk, size_bytes)
        .map_err(|error| Error::io(format!("reading {}", path.display()), error))?;
    let empty = samples_are_zeros(&disk, size_bytes)
        .map_err(|error| Error::io(format!("reading {}", path.display()), error))?;
    if empty && head.iter().all(|byte| *byte == 0) {
        return Ok(Found { state: DeviceState::Blank { size_bytes }, pool: None });
    }
    let content = match Pool::view(Box::new(disk)) {
        Ok(pool) => {
            let state = DeviceState::Pool { name: pool.name().to_owned() };
            return Ok(Found { state, pool: Some(PoolFacts::of(&pool)) });
        }
        Err(error) if error.kind() == ErrorKind::Gone => known(&head).to_owned(),
        Err(error) if error.kind() == ErrorKind::Io => return Err(error),
        Err(error) => format!("a pool that cannot be opened ({error})"),
    };
    Ok(Found { state: DeviceState::Foreign { size_bytes, content }, pool: None })
}

/// A direct read through memory that any drive takes.
fn read_head(disk: &FileDisk, size_bytes: u64) -> std::io::Result<Vec<u8>> {
    let length = size_bytes.min(EXTENT_BYTES) as usize;
    if length == 0 {
        return Ok(Vec::new());
    }
    let mut buffer = crate::io::buffer::AlignedBuffer::new(length);
    disk.file().read_exact_at(&mut buffer, 0)?;
    Ok(buffer.to_vec())
}

/// Whether the last block, where software RAID keeps its superblock, and blocks all over the device
/// are zeros: data may begin behind the first mebibyte.
fn samples_are_zeros(disk: &FileDisk, size_bytes: u64) -> std::io::Result<bool> {
    let blocks = size_bytes / SAMPLE_BYTES;
    let mut buffer = crate::io::buffer::AlignedBuffer::new(SAMPLE_BYTES as usize);
    for sample in 1..=SAMPLES.min(blocks) {
        let block = u128::from(blocks) * u128::from(sample) / u128::from(SAMPLES.min(blocks)) - 1;
        disk.file().read_exact_at(&mut buffer, block as u64 * SAMPLE_BYTES)?;
        if buffer.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn known(head: &[u8]) -> &'static str {
    let holds = |(offset, bytes, _): &&(usize, &[u8], &str)| {
        head.get(*offset..).is_some_and(|rest| rest.starts_with(bytes))
    };
    SIGNATURES.iter().find(holds).map_or("data that is no pool", |(_, _, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_beginnings_are_named() {
        for (offset, bytes, name) in SIGNATURES {
            let mut head = vec![0; 1 << 17];
            head[offset..offset + bytes.len()].copy_from_slice(bytes);
            assert_eq!(known(&head), name);
        }
        assert_eq!(known(b"short"), "data that is no pool");
    }

    #[test]
    fn a_file_is_missing_blank_foreign_or_a_pool() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("device");
        assert_eq!(look(&path).unwrap().state, DeviceState::Missing);
        std::fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
        assert_eq!(look(&path).unwrap().state, DeviceState::Blank { size_bytes: 64 << 20 });
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        let content = "data that is no pool".to_owned();
        let unknown = DeviceState::Foreign { size_bytes: 64 << 20, content };
        for (offset, length) in [(1 << 20, 1 << 20), ((64 << 20) - 4096, 1)] {
            file.write_all_at(&vec![7; length], offset).unwrap();
            assert_eq!(look(&path).unwrap().state, unknown, "behind the head, at {offset}");
            file.write_all_at(&vec![0; length], offset).unwrap();
        }
        file.write_all_at(b"XFSB", 0).unwrap();
        let content = "an XFS file system".to_owned();
        let foreign = DeviceState::Foreign { size_bytes: 64 << 20, content };
        assert_eq!(look(&path).unwrap().state, foreign);
        file.write_all_at(&[0; 4], 0).unwrap();
        drop(file);
        let disk = FileDisk::open(&path, Duration::ZERO).unwrap();
        drop(Pool::format(Box::new(disk), "flash").unwrap());
        let found = look(&path).unwrap();
        assert_eq!(found.state, DeviceState::Pool { name: "flash".into() });
        assert!(found.pool.unwrap().allocations.is_empty());
    }

    #[test]
    fn a_damaged_copy_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("device");
        std::fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
        let disk = FileDisk::open(&path, Duration::ZERO).unwrap();
        drop(Pool::format(Box::new(disk), "flash").unwrap());
        let whole = std::fs::read(&path).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        // What comes first is a copy of the root.
        let first = whole.iter().position(|byte| *byte != 0).unwrap();
        file.write_all_at(&[0x55; 64], first as u64).unwrap();
        let damaged = std::fs::read(&path).unwrap();
        assert_eq!(look(&path).unwrap().state, DeviceState::Pool { name: "flash".into() });
        assert!(std::fs::read(&path).unwrap() == damaged, "looking has written");
        // Opening repairs it, so there was something to repair.
        let disk = FileDisk::open(&path, Duration::ZERO).unwrap();
        drop(Pool::open(Box::new(disk)).unwrap());
        assert!(std::fs::read(&path).unwrap() == whole);
    }
}
