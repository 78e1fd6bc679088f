//! A drive that keeps a write under way for as long as a test wants, whatever becomes of the
//! process that sent it: a file behind FUSE, served by a thread of the test.
//!
//! The kernel does not give up a request that a FUSE server has taken, as it cannot take back one
//! that a drive has. The file is the root of its file system and is mounted over an ordinary file,
//! in a mount namespace of the calling thread: nothing of it outlives the test.

#![allow(dead_code, reason = "each test file uses a part of it")]

use nix::sched::{CloneFlags, unshare};
use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

/// Requests of linux/fuse.h.
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const READ: u32 = 15;
const WRITE: u32 = 16;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;

const HEADER_BYTES: usize = 40;

/// Before a write's data, and all of a read.
const TRANSFER_BYTES: usize = 40;

const WRITE_BYTES_MAX: u32 = 128 << 10;

/// Direct I/O may be under way while its sender does something else.
const ASYNC_DIRECT_IO: u32 = 1 << 15;
const BIG_WRITES: u32 = 1 << 5;

/// What the server and the test share.
#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    /// Writes whose data begins with this are kept under way.
    held_mark: Option<u8>,
    held: Vec<Held>,
    /// Whoever closes the file waits.
    holds_closers: bool,
    closers: Vec<u64>,
    /// Reads, writes and flushes taken.
    transfers: u64,
}

/// A write that was taken and not answered.
struct Held {
    unique: u64,
    offset: usize,
    data: Vec<u8>,
}

pub(crate) struct Drive {
    path: PathBuf,
    connection: File,
    state: Arc<Mutex<State>>,
    held: Receiver<()>,
}

impl Drive {
    /// A drive of `size_bytes` at `path`, for this thread and what it starts; `None` where this
    /// process may not mount.
    pub(crate) fn mount(path: &Path, size_bytes: usize) -> Option<Self> {
        let connection = File::options().read(true).write(true).open("/dev/fuse").ok()?;
        unshare(CloneFlags::CLONE_NEWNS).ok()?;
        mount("none", Path::new("/"), None, libc::MS_REC | libc::MS_PRIVATE)?;
        File::create(path).unwrap();
        let options = format!(
            "fd={},rootmode=100600,user_id={},group_id={}",
            connection.as_raw_fd(),
            nix::unistd::getuid(),
            nix::unistd::getgid()
        );
        mount("drive", path, Some(&options), libc::MS_NOSUID | libc::MS_NODEV)?;
        let state = State { bytes: vec![0; size_bytes], ..State::default() };
        let state = Arc::new(Mutex::new(state));
        let (sender, held) = channel();
        let server = connection.try_clone().unwrap();
        let served = state.clone();
        std::thread::spawn(move || serve(server, &served, &sender));
        Some(Self { path: path.to_owned(), connection, state, held })
    }

    /// From now on, writes whose data begins with `mark` stay under way.
    pub(crate) fn hold(&self, mark: u8) {
        self.state.lock().unwrap().held_mark = Some(mark);
    }

    /// From now on, whoever closes the file waits.
    pub(crate) fn hold_closers(&self) {
        self.state.lock().unwrap().holds_closers = true;
    }

    /// Waits until a write is kept, or somebody closes the file.
    pub(crate) fn wait_held(&self) {
        self.held.recv_timeout(std::time::Duration::from_secs(30)).expect("it has come");
    }

    /// Requests taken so far that read, write or flush.
    pub(crate) fn transfers(&self) -> u64 {
        self.state.lock().unwrap().transfers
    }

    /// Does what was kept, and lets everything else pass.
    pub(crate) fn release(&self) {
        let mut state = self.state.lock().unwrap();
        state.held_mark = None;
        state.holds_closers = false;
        for unique in std::mem::take(&mut state.closers) {
            answer(&self.connection, unique, Ok(&[]));
        }
        for Held { unique, offset, data } in std::mem::take(&mut state.held) {
            state.bytes[offset..offset + data.len()].copy_from_slice(&data);
            answer(&self.connection, unique, Ok(&written(data.len())));
        }
    }

    pub(crate) fn bytes(&self, offset: usize, length: usize) -> Vec<u8> {
        self.state.lock().unwrap().bytes[offset..offset + length].to_vec()
    }
}

impl Drop for Drive {
    fn drop(&mut self) {
        self.release();
        let path = CString::new(self.path.as_os_str().as_bytes()).unwrap();
        // SAFETY: the path is a C string that lives for the call.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    }
}

fn mount(source: &str, target: &Path, options: Option<&str>, flags: u64) -> Option<()> {
    let text = |text: &[u8]| CString::new(text).unwrap();
    let (source, target) = (text(source.as_bytes()), text(target.as_os_str().as_bytes()));
    let options = options.map(|options| text(options.as_bytes()));
    let data = options.as_ref().map_or(std::ptr::null(), |options| options.as_ptr());
    // SAFETY: all pointers are C strings that live for the call, or null where that is allowed.
    let result = unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), c"fuse".as_ptr(), flags, data.cast())
    };
    (result == 0).then_some(())
}

/// Answers until the file system is gone.
fn serve(mut connection: File, state: &Mutex<State>, held: &Sender<()>) {
    let mut buffer = vec![0; WRITE_BYTES_MAX as usize + 4096];
    loop {
        match connection.read(&mut buffer) {
            Ok(length) => handle(&connection, &buffer[..length], state, held),
            // A request that was given up before it was read.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(_) => return,
        }
    }
}

fn handle(connection: &File, request: &[u8], state: &Mutex<State>, held: &Sender<()>) {
    let (opcode, unique) = (u32_at(request, 4), u64_at(request, 8));
    let body = &request[HEADER_BYTES..];
    let mut state = state.lock().unwrap();
    let place = || (u64_at(body, 8) as usize, u32_at(body, 16) as usize);
    match opcode {
        INIT => answer(connection, unique, Ok(&welcome(u32_at(body, 8)))),
        GETATTR | SETATTR => answer(connection, unique, Ok(&attributes(state.bytes.len()))),
        READ => {
            state.transfers += 1;
            let (offset, length) = place();
            let end = (offset + length).min(state.bytes.len());
            answer(connection, unique, Ok(&state.bytes[offset.min(end)..end]));
        }
        WRITE => {
            state.transfers += 1;
            let (offset, length) = place();
            let data = &body[TRANSFER_BYTES..TRANSFER_BYTES + length];
            if state.held_mark.is_some_and(|mark| data.first() == Some(&mark)) {
                state.held.push(Held { unique, offset, data: data.to_vec() });
                return held.send(()).unwrap();
            }
            state.bytes[offset..offset + length].copy_from_slice(data);
            answer(connection, unique, Ok(&written(length)));
        }
        FALLOCATE => {
            let (offset, length) = (u64_at(body, 8) as usize, u64_at(body, 16) as usize);
            state.bytes[offset..offset + length].fill(0);
            answer(connection, unique, Ok(&[]));
        }
        FSYNC => {
            state.transfers += 1;
            answer(connection, unique, Ok(&[]));
        }
        FLUSH if state.holds_closers => {
            state.closers.push(unique);
            held.send(()).unwrap();
        }
        FORGET | BATCH_FORGET | INTERRUPT => {}
        _ => answer(connection, unique, Err(libc::ENOSYS)),
    }
}

fn answer(mut connection: &File, unique: u64, result: Result<&[u8], i32>) {
    let (error, body) = match result {
        Ok(body) => (0, body),
        Err(errno) => (-errno, &[][..]),
    };
    let mut message = Vec::with_capacity(16 + body.len());
    message.extend((16 + body.len() as u32).to_le_bytes());
    message.extend(error.to_le_bytes());
    message.extend(unique.to_le_bytes());
    message.extend(body);
    // Nobody is there any more once the file system is gone.
    let _ = connection.write(&message);
}

/// `fuse_init_out`
fn welcome(readahead: u32) -> Vec<u8> {
    let words = [7, 31, readahead, ASYNC_DIRECT_IO | BIG_WRITES, 0, WRITE_BYTES_MAX, 1];
    let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    bytes.resize(64, 0);
    bytes
}

/// `fuse_attr_out` of the only file
fn attributes(size_bytes: usize) -> Vec<u8> {
    let mut bytes = vec![0; 104];
    let mut put = |at: usize, word: &[u8]| bytes[at..at + word.len()].copy_from_slice(word);
    put(16, &1u64.to_le_bytes());
    put(24, &(size_bytes as u64).to_le_bytes());
    put(32, &(size_bytes as u64 / 512).to_le_bytes());
    put(76, &(libc::S_IFREG | 0o600).to_le_bytes());
    put(80, &1u32.to_le_bytes());
    put(96, &4096u32.to_le_bytes());
    bytes
}

/// `fuse_write_out`
fn written(length: usize) -> Vec<u8> {
    [length as u32, 0].into_iter().flat_map(u32::to_le_bytes).collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
