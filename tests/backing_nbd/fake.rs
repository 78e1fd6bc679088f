//! An NBD server in this process that misbehaves as told.

use std::collections::VecDeque;
use std::io::{Read, Result, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How a connection is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    Good,
    /// Answers come in the wrong order, a few at a time.
    Reorder,
    /// After so many answers half of one, and the end.
    HalfReply(usize),
    /// After so many answers the end, in the middle of whatever is under way.
    Drop(usize),
    /// Reads requests and answers none.
    Hang,
    /// After so many answers one to a request that nobody made.
    Stranger(usize),
    /// Every request fails with this error.
    Error(u32),
    /// The export has another size.
    Shrunk,
    /// The greeting ends in its middle.
    HalfGreeting,
    /// Bytes mutated by this seed, in both phases.
    Garbled(u64),
    /// Writes are read and not answered. They are carried out when their connection is gone: just
    /// after another one's, if that comes within [`LATENESS`], and before any that comes later.
    Late,
}

/// How long after the end of a connection its writes may be carried out.
pub(crate) const LATENESS: Duration = Duration::from_millis(500);

/// A write that was read: when its connection ended, where, what.
type LateWrite = (Instant, usize, Vec<u8>);

pub(crate) struct Fake {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) content: Arc<Mutex<Vec<u8>>>,
    manners: Arc<Mutex<VecDeque<Manner>>>,
    pub(crate) connections: Arc<AtomicUsize>,
    late: Arc<Mutex<Vec<LateWrite>>>,
    /// Writes that were read by connections which are late.
    pub(crate) kept: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

pub(crate) const FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 6;

struct Connection {
    stream: UnixStream,
    content: Arc<Mutex<Vec<u8>>>,
    manner: Manner,
    random: fastrand::Rng,
    answers: usize,
    waiting: Vec<Vec<u8>>,
    late: Arc<Mutex<Vec<LateWrite>>>,
    kept: Arc<AtomicUsize>,
    /// Read, and to be carried out late.
    unanswered: Vec<(usize, Vec<u8>)>,
}

impl Fake {
    /// Serves `content`; successive connections are served in these manners, later ones well.
    pub(crate) fn start(content: Vec<u8>, manners: &[Manner], flags: u16) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("nbd")).unwrap();
        let mut fake = Self {
            folder,
            content: Arc::new(Mutex::new(content)),
            manners: Arc::new(Mutex::new(manners.iter().copied().collect())),
            connections: Arc::default(),
            late: Arc::default(),
            kept: Arc::default(),
            stop: Arc::default(),
            thread: None,
        };
        let (content, manners) = (fake.content.clone(), fake.manners.clone());
        let (connections, stop) = (fake.connections.clone(), fake.stop.clone());
        let (late, kept) = (fake.late.clone(), fake.kept.clone());
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                connections.fetch_add(1, Ordering::SeqCst);
                let manner = manners.lock().unwrap().pop_front().unwrap_or(Manner::Good);
                let seed = if let Manner::Garbled(seed) = manner { seed } else { 3 };
                let connection = Connection {
                    stream: stream.unwrap(),
                    content: content.clone(),
                    manner,
                    random: fastrand::Rng::with_seed(seed),
                    answers: 0,
                    waiting: Vec::new(),
                    late: late.clone(),
                    kept: kept.clone(),
                    unanswered: Vec::new(),
                };
                // Served beside the next one, as a server does. It ends as it likes.
                std::thread::spawn(move || connection.serve(flags));
            }
        });
        fake.thread = Some(thread);
        fake
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("nbd")
    }

    /// Writes of connections that have ended which are still to be carried out.
    pub(crate) fn late_writes(&self) -> usize {
        self.late.lock().unwrap().len()
    }

    pub(crate) fn url(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.path().display())
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = UnixStream::connect(self.path());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Connection {
    fn send(&mut self, mut bytes: Vec<u8>) -> Result<()> {
        if let Manner::Garbled(_) = self.manner
            && self.random.u8(0..6) == 0
        {
            for _ in 0..self.random.usize(1..4) {
                let at = self.random.usize(..bytes.len());
                match self.random.u8(0..3) {
                    0 => bytes[at] ^= 1 << self.random.u8(0..8),
                    1 => bytes[at] = self.random.choice([0, 1, 0x7f, 0xff]).unwrap(),
                    _ => bytes.truncate(at.max(1)),
                }
            }
        }
        self.stream.write_all(&bytes)
    }

    fn serve(mut self, flags: u16) -> Result<()> {
        let mut greeting = b"NBDMAGICIHAVEOPT".to_vec();
        greeting.extend_from_slice(&3u16.to_be_bytes());
        if self.manner == Manner::HalfGreeting {
            return self.stream.write_all(&greeting[..9]);
        }
        self.send(greeting)?;
        let mut answer = [0; 4];
        self.stream.read_exact(&mut answer)?;
        let mut option = [0; 16];
        self.stream.read_exact(&mut option)?;
        let length = u32::from_be_bytes(option[12..].try_into().unwrap()) as usize;
        self.stream.read_exact(&mut vec![0; length])?;
        let mut size = self.content.lock().unwrap().len() as u64;
        if self.manner == Manner::Shrunk {
            size /= 2;
        }
        let mut info = vec![0, 0];
        info.extend_from_slice(&size.to_be_bytes());
        info.extend_from_slice(&flags.to_be_bytes());
        self.option_reply(3, &info)?;
        let mut blocks = vec![0, 3];
        for bytes in [512u32, 4096, 64 << 10] {
            blocks.extend_from_slice(&bytes.to_be_bytes());
        }
        self.option_reply(3, &blocks)?;
        self.option_reply(1, &[])?;
        let served = self.requests();
        let ended = Instant::now();
        let unanswered = std::mem::take(&mut self.unanswered).into_iter();
        let late = unanswered.map(|(offset, data)| (ended, offset, data));
        self.late.lock().unwrap().extend(late);
        served
    }

    fn requests(&mut self) -> Result<()> {
        while self.request()? {}
        Ok(())
    }

    /// Carries a write out; those of connections that are gone come before it or after it.
    fn write(&self, offset: usize, data: &[u8]) {
        let late = std::mem::take(&mut *self.late.lock().unwrap());
        let (after, before): (Vec<_>, Vec<_>) =
            late.into_iter().partition(|(ended, ..)| ended.elapsed() < LATENESS);
        let mut content = self.content.lock().unwrap();
        let mut put = |offset: usize, data: &[u8]| {
            content[offset..offset + data.len()].copy_from_slice(data);
        };
        before.iter().for_each(|(_, offset, data)| put(*offset, data));
        put(offset, data);
        after.iter().for_each(|(_, offset, data)| put(*offset, data));
    }

    fn option_reply(&mut self, kind: u32, data: &[u8]) -> Result<()> {
        let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
        for word in [7, kind, data.len() as u32] {
            bytes.extend_from_slice(&word.to_be_bytes());
        }
        bytes.extend_from_slice(data);
        self.send(bytes)
    }

    /// Reads and carries out a request; false at the end.
    fn request(&mut self) -> Result<bool> {
        let mut head = [0; 28];
        self.stream.read_exact(&mut head)?;
        assert_eq!(head[..4], 0x2560_9513_u32.to_be_bytes(), "a request");
        let number = |from: usize, to: usize| {
            head[from..to].iter().fold(0usize, |sum, byte| sum << 8 | usize::from(*byte))
        };
        let (command, offset, length) = (number(6, 8), number(16, 24), number(24, 28));
        let mut data = vec![0; if command == 1 { length } else { 0 }];
        self.stream.read_exact(&mut data)?;
        if command == 1 && self.manner == Manner::Late {
            self.unanswered.push((offset, data));
            self.kept.fetch_add(1, Ordering::SeqCst);
            return Ok(true);
        }
        let error = if let Manner::Error(error) = self.manner { error } else { 0 };
        let mut reply = 0x6744_6698_u32.to_be_bytes().to_vec();
        reply.extend_from_slice(&error.to_be_bytes());
        reply.extend_from_slice(&head[8..16]);
        if error == 0 && command == 1 {
            self.write(offset, &data);
        } else if error == 0 {
            let mut content = self.content.lock().unwrap();
            match command {
                0 => reply.extend_from_slice(&content[offset..offset + length]),
                6 => content[offset..offset + length].fill(0),
                2 => return Ok(false),
                _ => {}
            }
        }
        self.reply(reply)
    }

    fn reply(&mut self, reply: Vec<u8>) -> Result<bool> {
        self.answers += 1;
        match self.manner {
            Manner::Hang => return Ok(true),
            Manner::Drop(after) if self.answers > after => return Ok(false),
            Manner::HalfReply(after) if self.answers > after => {
                self.stream.write_all(&reply[..reply.len() / 2])?;
                return Ok(false);
            }
            Manner::Stranger(after) if self.answers > after => {
                let mut stranger = reply;
                stranger[8] = 0x77;
                self.stream.write_all(&stranger)?;
                return Ok(true);
            }
            Manner::Reorder => {
                self.waiting.push(reply);
                self.stream.set_nonblocking(true)?;
                let more = nix_peek(&self.stream);
                self.stream.set_nonblocking(false)?;
                if more && self.waiting.len() < 5 {
                    return Ok(true);
                }
                let mut waiting = std::mem::take(&mut self.waiting);
                self.random.shuffle(&mut waiting);
                for reply in waiting {
                    self.send(reply)?;
                }
            }
            _ => self.send(reply)?,
        }
        Ok(true)
    }
}

/// Whether another request is there already.
fn nix_peek(stream: &UnixStream) -> bool {
    use nix::sys::socket::{MsgFlags, recv};
    use std::os::fd::AsRawFd;
    recv(stream.as_raw_fd(), &mut [0; 1], MsgFlags::MSG_PEEK).is_ok_and(|bytes| bytes == 1)
}

/// Whether a socket is there.
pub(crate) fn listens(path: &Path) -> bool {
    UnixStream::connect(path).is_ok()
}
