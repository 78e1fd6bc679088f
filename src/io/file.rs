//! A file or block device as a [`Disk`], one blocking system call per operation: for metadata, the
//! command line and tools. The data path opens nothing of its own: it shares this description
//! ([`FileDisk::file`]), and with it the exclusive lock.
//!
//! Ownership. The lock is an open-file-description lock (`F_OFD_SETLK`) on the description that
//! all I/O goes through, and for a device also `O_EXCL`. Requests that a killed daemon left in the
//! kernel hold a reference on that description, so the lock is free only when the last of them has
//! ended: whoever gets it cannot be overtaken by a late write. Hence the bounded wait in
//! [`FileDisk::open`].

use super::buffer::{PinnedBuffer, Segment};
use super::disk::{Completion, Disk, DiskGeometry, DiskTarget, Errno, Operation, OperationKind};
use super::sim::SimDisk;
use crate::base::units::{Bytes, SECTOR_BYTES};
use crate::base::{Error, ErrorKind, Result};
use std::fs::{File, OpenOptions};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// `fallocate` mode of [`OperationKind::Zero`]: the range reads as zeros and a file keeps its
/// space.
pub const ZERO_MODE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// `fallocate` mode of [`OperationKind::Discard`]. On a file: a hole. On a device: zeros by the
/// drive itself, which may unmap the range, or an error; unlike `BLKDISCARD` it is never a hint.
pub const DISCARD_MODE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// How often a busy lock is tried again.
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// A child that another thread is starting holds a copy of our description until it runs its
/// program, and with it the lock.
const REOPEN_WAIT: Duration = Duration::from_secs(1);

/// What a new file's blocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preallocation {
    /// Space is reserved by `fallocate`: instant, but the file system notes each block's first
    /// write in its own journal ("unwritten extents"), which costs that write and the next flush.
    Reserved,
    /// Zeros are written over the whole file once, so that later writes are plain overwrites. For
    /// benchmarks and for pools that must be at full speed from the first write on.
    Written,
}

/// What a disk is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// Nobody else has it meanwhile.
    Write,
    /// Others may read it meanwhile, and nobody writes it.
    Read,
}

/// A file or block device, opened exclusively, or for reading beside others that read.
pub struct FileDisk {
    file: Arc<File>,
    path: PathBuf,
    device: bool,
    geometry: DiskGeometry,
    completions: Vec<Completion>,
}

impl FileDisk {
    /// Creates the file, which must not exist. `size_bytes` is a multiple of 4 KiB. The content is
    /// zeros and durable. On failure no file stays behind.
    pub fn create(path: &Path, size_bytes: u64, preallocation: Preallocation) -> Result<Self> {
        if size_bytes == 0 || !size_bytes.is_multiple_of(4096) {
            let text = format!("{}: the size must be a multiple of 4KiB", path.display());
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        // Guests' data: nobody else's business.
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|error| Error::io(format!("creating {}", path.display()), error))?;
        let made = Self::open(path, REOPEN_WAIT).and_then(|disk| {
            disk.allocate(size_bytes, preallocation)?;
            drop(disk);
            // Opened again: the geometry is of the file as it is now.
            Self::open(path, REOPEN_WAIT)
        });
        if made.is_err() {
            // The cause is already on its way to the caller.
            let _ = std::fs::remove_file(path);
        }
        made
    }

    fn allocate(&self, size_bytes: u64, preallocation: Preallocation) -> Result<()> {
        let error = |error| Error::io(format!("allocating {}", self.path.display()), error);
        let reserved = fallocate(&self.file, 0, 0, size_bytes);
        // A file system that reserves nothing (NFS before 4.2) has its space taken by writing.
        let refused = reserved.as_ref().is_err_and(|error| {
            matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
        });
        if !refused {
            reserved.map_err(error)?;
        }
        if refused || preallocation == Preallocation::Written {
            let buffer = PinnedBuffer::new(1 << 20);
            let mut done = 0;
            while done < size_bytes {
                let length = (size_bytes - done).min(1 << 20);
                let part = [buffer.segment().part(0, length as usize)];
                transfer(&self.file, OperationKind::Write, done, &part)
                    .map_err(|errno| error(errno.into()))?;
                done += length;
            }
        }
        self.file.sync_all().map_err(error)
    }

    /// Opens for reading and writing. Waits up to `wait` for another holder, or for what a dead
    /// one left under way, to end; then fails with [`ErrorKind::Busy`].
    pub fn open(path: &Path, wait: Duration) -> Result<Self> {
        Self::open_blocks(path, wait, Access::Write)
    }

    /// As [`FileDisk::open`], for looking alone: others may look meanwhile, and nobody writes.
    /// Writes fail.
    pub fn open_looking(path: &Path, wait: Duration) -> Result<Self> {
        Self::open_blocks(path, wait, Access::Read)
    }

    fn open_blocks(path: &Path, wait: Duration, access: Access) -> Result<Self> {
        let mut disk = Self::open_as_it_is(path, wait, access)?;
        let block_bytes = u64::from(disk.geometry.block_bytes);
        disk.geometry.size_bytes -= disk.geometry.size_bytes % block_bytes;
        Ok(disk)
    }

    /// As [`FileDisk::open`], for a file that other software made: all of it can be reached, in
    /// sectors of 512 bytes, where direct I/O would take larger blocks only: then through the
    /// cache of the kernel. A block device's blocks stay what they are.
    pub fn open_whole(path: &Path, wait: Duration) -> Result<Self> {
        Self::open_image(path, wait, Access::Write)
    }

    /// As [`FileDisk::open_whole`], for reading alone: the lock is shared with others that read,
    /// here and, where the file system carries locks, on other hosts. Writes fail.
    pub fn open_reading(path: &Path, wait: Duration) -> Result<Self> {
        Self::open_image(path, wait, Access::Read)
    }

    fn open_image(path: &Path, wait: Duration, access: Access) -> Result<Self> {
        let mut disk = Self::open_as_it_is(path, wait, access)?;
        let size_bytes = disk.geometry.size_bytes;
        if !size_bytes.is_multiple_of(SECTOR_BYTES) {
            let text = format!(
                "{}: its size, {size_bytes} bytes, is no multiple of 512: it is no disk image, or \
                 was cut; `truncate -s %512` makes it one",
                path.display()
            );
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        if !disk.device && disk.geometry.block_bytes > SECTOR_BYTES as u32 {
            let refused = |error| Error::io(format!("opening {}", path.display()), error);
            disk.stop_direct().map_err(refused)?;
            disk.geometry.block_bytes = SECTOR_BYTES as u32;
            disk.geometry.memory_alignment = 1;
        }
        Ok(disk)
    }

    /// Opens for looking only, without a lock, while another may hold it.
    pub fn open_unlocked(path: &Path) -> Result<Self> {
        let error = |error| Error::io(format!("opening {}", path.display()), error);
        let file = OpenOptions::new().read(true).open(path).map_err(error)?;
        let device = file.metadata().map_err(error)?.file_type().is_block_device();
        let geometry = measure(&file, device, false).map_err(error)?;
        let path = path.to_owned();
        Ok(Self { file: Arc::new(file), path, device, geometry, completions: Vec::new() })
    }

    /// From now on through the cache of the kernel. The description, and the lock, stay.
    fn stop_direct(&self) -> std::io::Result<()> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let flags = OFlag::from_bits_retain(fcntl(&self.file, FcntlArg::F_GETFL)?);
        fcntl(&self.file, FcntlArg::F_SETFL(flags - OFlag::O_DIRECT))?;
        Ok(())
    }

    fn open_as_it_is(path: &Path, wait: Duration, access: Access) -> Result<Self> {
        let deadline = Instant::now() + wait;
        let metadata = std::fs::metadata(path)
            .map_err(|error| Error::io(format!("opening {}", path.display()), error))?;
        let device = metadata.file_type().is_block_device();
        if !device && !metadata.is_file() {
            let text = format!("{} is neither a file nor a block device", path.display());
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let busy = || {
            let text = format!(
                "{} is in use: by another vflashd, or mounted, or still busy with I/O of a killed \
                 one; stop the holder (`fuser -v {0}`) and try again",
                path.display()
            );
            Error::new(ErrorKind::Busy, text)
        };
        let (file, direct) = loop {
            match open_once(path, device, access) {
                Ok(opened) => break opened,
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    pause(deadline, busy)?;
                }
                Err(error) => return Err(Error::io(format!("opening {}", path.display()), error)),
            }
        };
        while !lock(&file, access)
            .map_err(|error| Error::io(format!("locking {}", path.display()), error))?
        {
            pause(deadline, busy)?;
        }
        let geometry = measure(&file, device, direct)
            .map_err(|error| Error::io(format!("measuring {}", path.display()), error))?;
        let path = path.to_owned();
        Ok(Self { file: Arc::new(file), path, device, geometry, completions: Vec::new() })
    }

    /// The description that carries the lock. The lock lasts until its last holder drops it and
    /// its last request ends.
    pub fn file(&self) -> Arc<File> {
        self.file.clone()
    }

    /// Another user of a description that is open already, lock and all: for what reads and writes
    /// a part of it before a reactor does. `None`: the disk is no file or device.
    pub fn shared(target: &DiskTarget) -> Option<Self> {
        let DiskTarget::File { file, geometry } = target else { return None };
        let device = file.metadata().is_ok_and(|found| found.file_type().is_block_device());
        let (file, geometry) = (file.clone(), *geometry);
        Some(Self { file, path: PathBuf::new(), device, geometry, completions: Vec::new() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// For a reactor that does the data path's I/O.
    pub fn target(&self) -> DiskTarget {
        DiskTarget::File { file: self.file(), geometry: self.geometry() }
    }

    fn execute(&self, operation: &Operation<'_>) -> std::result::Result<(), Errno> {
        let Operation { kind, offset, length, segments } = *operation;
        let done = match kind {
            OperationKind::Read | OperationKind::Write => {
                return transfer(&self.file, kind, offset, segments);
            }
            OperationKind::WriteDurable => {
                transfer(&self.file, kind, offset, segments)?;
                self.file.sync_data()
            }
            OperationKind::Flush => self.file.sync_data(),
            // A device knows no allocation: let it unmap if it can, which wears it least.
            OperationKind::Zero if self.device => {
                fallocate(&self.file, DISCARD_MODE, offset, length)
                    .or_else(|_| fallocate(&self.file, ZERO_MODE, offset, length))
            }
            OperationKind::Zero => fallocate(&self.file, ZERO_MODE, offset, length),
            OperationKind::Discard => fallocate(&self.file, DISCARD_MODE, offset, length),
        };
        done.map_err(|error| Errno(error.raw_os_error().unwrap_or(libc::EIO)))
    }
}

impl Disk for FileDisk {
    /// The size is measured anew: a device may have grown.
    fn geometry(&self) -> DiskGeometry {
        let size_bytes = size(&self.file, self.device).unwrap_or(self.geometry.size_bytes);
        let size_bytes = size_bytes - size_bytes % u64::from(self.geometry.block_bytes);
        DiskGeometry { size_bytes, ..self.geometry }
    }

    /// Carries the operation out: blocks for as long as it takes.
    fn submit(&mut self, operation: Operation<'_>, token: u64) {
        let result = self.execute(&operation);
        self.completions.push(Completion { token, result });
    }

    fn poll(&mut self, completions: &mut Vec<Completion>, _wait: bool) {
        completions.append(&mut self.completions);
    }
}

/// What `spec.device` of a pool names: `null:SIZE`, a block device or a file.
pub struct Device {
    /// Where the pool keeps its metadata.
    pub disk: Box<dyn Disk + Send>,
    /// Where its volumes' data goes.
    pub target: DiskTarget,
    /// A null pool: it forgets everything, so it must be formatted at each start.
    pub null: bool,
}

impl Device {
    /// Opens `device`, waiting as [`FileDisk::open`] does.
    pub fn open(device: &str, wait: Duration) -> Result<Self> {
        let Some(size) = device.strip_prefix("null:") else {
            let disk = FileDisk::open(Path::new(device), wait)?;
            let target = disk.target();
            return Ok(Self { disk: Box::new(disk), target, null: false });
        };
        let Bytes(size_bytes) = Bytes::parse(size)
            .map_err(|text| Error::new(ErrorKind::Invalid, format!("device {device}: {text}")))?;
        let disk = SimDisk::new(size_bytes - size_bytes % 4096);
        Ok(Self { disk: Box::new(disk), target: DiskTarget::Null { size_bytes }, null: true })
    }
}

/// Sleeps a little, or fails if the time is over.
fn pause(deadline: Instant, busy: impl Fn() -> Error) -> Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(busy());
    }
    std::thread::sleep(LOCK_RETRY.min(left));
    Ok(())
}

/// The file and whether it takes direct I/O; a file system without it is used through its cache.
fn open_once(path: &Path, device: bool, access: Access) -> std::io::Result<(File, bool)> {
    let write = access == Access::Write;
    let exclusive = if device && write { libc::O_EXCL } else { 0 };
    let open = |flags| OpenOptions::new().read(true).write(write).custom_flags(flags).open(path);
    match open(exclusive | libc::O_DIRECT) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok((open(exclusive)?, false)),
        file => Ok((file?, true)),
    }
}

/// False: somebody else has it.
fn lock(file: &File, access: Access) -> std::io::Result<bool> {
    let kind = match access {
        Access::Write => libc::F_WRLCK,
        Access::Read => libc::F_RDLCK,
    };
    let range = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_OFD_SETLK(&range)) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn size(file: &File, device: bool) -> std::io::Result<u64> {
    if !device {
        return Ok(file.metadata()?.len());
    }
    let mut bytes: u64 = 0;
    // SAFETY: the kernel writes one u64 behind the pointer, which lives for the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) };
    nix::errno::Errno::result(result)?;
    Ok(bytes)
}

/// `_IOR(0x12, 114, size_t)` of linux/fs.h, which crate libc lacks.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;

fn measure(file: &File, device: bool, direct: bool) -> std::io::Result<DiskGeometry> {
    let mut geometry = DiskGeometry {
        size_bytes: size(file, device)?,
        block_bytes: 512,
        optimal_bytes: 4096,
        memory_alignment: 1,
        // A file system or drive that refuses is found out at the first use.
        zero: true,
        discard: true,
    };
    if device {
        geometry.block_bytes = query(file, libc::BLKSSZGET)?.max(512);
        geometry.optimal_bytes = query(file, libc::BLKPBSZGET)?.max(geometry.block_bytes);
        geometry.memory_alignment = 512;
    }
    if direct {
        let (memory, offset) = direct_alignment(file)?;
        geometry.memory_alignment = memory.unwrap_or(geometry.block_bytes);
        geometry.block_bytes = geometry.block_bytes.max(offset.unwrap_or(512));
    }
    geometry.optimal_bytes = geometry.optimal_bytes.max(geometry.block_bytes);
    Ok(geometry)
}

fn query(file: &File, request: libc::Ioctl) -> std::io::Result<u32> {
    let mut value: libc::c_int = 0;
    // SAFETY: both requests write one int behind the pointer, which lives for the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut value) };
    nix::errno::Errno::result(result)?;
    Ok(value.unsigned_abs())
}

/// The alignments that direct I/O needs, memory and offset, where the kernel tells (6.1 on).
fn direct_alignment(file: &File) -> std::io::Result<(Option<u32>, Option<u32>)> {
    let mut status = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string (AT_EMPTY_PATH: the file itself), and the kernel
    // writes one struct statx behind the pointer.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            status.as_mut_ptr(),
        )
    };
    nix::errno::Errno::result(result)?;
    // SAFETY: all-zero bytes are a valid statx, whatever the kernel filled in.
    let status = unsafe { status.assume_init() };
    if status.stx_mask & libc::STATX_DIOALIGN == 0 || status.stx_dio_mem_align == 0 {
        return Ok((None, None));
    }
    Ok((Some(status.stx_dio_mem_align), Some(status.stx_dio_offset_align)))
}

fn fallocate(file: &File, mode: i32, offset: u64, length: u64) -> std::io::Result<()> {
    // SAFETY: no memory is passed.
    let result = unsafe {
        libc::fallocate(file.as_raw_fd(), mode, offset as libc::off_t, length as libc::off_t)
    };
    nix::errno::Errno::result(result)?;
    Ok(())
}

/// Moves all bytes of `segments` or says why not.
fn transfer(
    file: &File,
    kind: OperationKind,
    offset: u64,
    segments: &[Segment],
) -> std::result::Result<(), Errno> {
    let mut at = offset;
    for segment in segments {
        let mut done = 0;
        while done < segment.length() {
            let rest = segment.part(done, segment.length());
            let moved = transfer_once(file, kind, at, rest)?;
            if moved == 0 {
                return Err(Errno::EIO);
            }
            done += moved;
            at += moved as u64;
        }
    }
    Ok(())
}

fn transfer_once(
    file: &File,
    kind: OperationKind,
    offset: u64,
    segment: Segment,
) -> std::result::Result<usize, Errno> {
    let (descriptor, address, length) = (file.as_raw_fd(), segment.address(), segment.length());
    let offset = offset as libc::off_t;
    loop {
        // SAFETY: `length` bytes at `address` are mapped and writable (Segment::new).
        let moved = unsafe {
            match kind {
                OperationKind::Read => libc::pread(descriptor, address.cast(), length, offset),
                _ => libc::pwrite(descriptor, address.cast(), length, offset),
            }
        };
        match nix::errno::Errno::result(moved) {
            Ok(moved) => return Ok(moved as usize),
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(Errno(errno as i32)),
        }
    }
}

#[cfg(test)]
#[path = "file_test.rs"]
mod tests;
