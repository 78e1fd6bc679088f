//! Whatever a front end sends, the daemon lives, nobody else waits or finds another byte than it
//! wrote, and its own next connection works.
//!
//! A seeded loop: a plausible session with wrong sizes, orders, descriptors and ring addresses. The
//! neighbour is a guest on a volume of the same pool and reactor that verifies what it reads; some
//! of its requests are under way at every message of a session, and none may be lost or held up.
//! Another guest sleeps: nothing at all may change in its memory. A front end is told what became
//! of each region that it asks for, and two that it has do not overlap; one that cuts its memory
//! short is cut off.
//!
//! Runs for VFLASH_FUZZ_SECONDS (default 2); a failure names its seed.

mod common;

use common::{Daemon, connect, operate, workload};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use vflash::base::units::MIB;
use vflash_bench::runner::Runner;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const MEMORY_BYTES: u64 = 1 << 20;

/// Whoever waits longer is held up.
const PATIENCE: Duration = Duration::from_secs(10);

/// However short the time.
const SESSIONS_MIN: u64 = 128;

/// Messages that change a front end's memory.
const SET_MEM_TABLE: u32 = 5;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;

/// Flag of a message that asks what became of it.
const NEED_REPLY: u32 = 8;

/// Requests of the neighbour under way.
const NEIGHBOUR_DEPTH: u16 = 16;

fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::from(request.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend((body.len() as u32).to_le_bytes());
    bytes.extend(body);
    bytes
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn memfd(bytes: u64) -> File {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    let fd: OwnedFd = nix::sys::memfd::memfd_create(c"guest", flags).unwrap();
    let file = File::from(fd);
    file.set_len(bytes).unwrap();
    file
}

/// Asks for the features and waits for the answer: the socket thread serves this connection.
fn answers(path: &Path) -> u64 {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(&message(1, 1, &[])).unwrap();
    let mut reply = [0; 20];
    stream.read_exact(&mut reply).expect("an answer within ten seconds");
    u64::from_le_bytes(reply[12..].try_into().unwrap())
}

fn number(random: &mut fastrand::Rng) -> u64 {
    match random.u8(..8) {
        0 => random.u64(..),
        1 => u64::MAX - random.u64(..64),
        2 => MEMORY_BYTES - random.u64(..64),
        3 | 4 => random.u64(..8),
        _ => random.u64(..MEMORY_BYTES) & !0xfff,
    }
}

/// One message that the protocol has, with a body that is right in size and mostly in content.
fn plausible(random: &mut fastrand::Rng) -> (u32, Vec<u8>, usize) {
    let index = if random.u8(..8) == 0 { random.u64(..300) } else { random.u64(..4) };
    let state = |low: u64, high: u64| words(&[low & 0xffff_ffff | high << 32]);
    match random.u8(..20) {
        0 => (1, vec![], 0),
        1 => (2, words(&[0x1_7000_0000 | random.u64(..) & 0x3600_7f7f]), 0),
        2 => (3, vec![], 0),
        3 => (16, words(&[0xb22b]), 0),
        4 => (SET_MEM_TABLE, words(&[1, 0, MEMORY_BYTES, 0, 0]), 1),
        5 => {
            let region = match random.bool() {
                true => [number(random), number(random), 0, number(random)],
                false => [random.u64(..512) << 12, random.u64(1..256) << 12, 0, 0],
            };
            (ADD_MEM_REG, [words(&[0]), words(&region)].concat(), 1)
        }
        6 => (REM_MEM_REG, words(&[0, 0, MEMORY_BYTES, 0, 0]), 0),
        7 | 8 => (8, state(index, [16, 256, 1024, 3, 0][random.usize(..5)]), 0),
        9 | 10 => {
            let rings = [0x1000, 0x2000, 0x3000].map(|ring| match random.u8(..6) {
                0 => number(random),
                _ => ring,
            });
            (9, words(&[index, rings[0], rings[1], rings[2], 0]), 0)
        }
        11 => (10, state(index, random.u64(..70_000)), 0),
        12 => (11, state(index, 0), 0),
        13 | 14 => (12 + u32::from(random.u8(..3)), words(&[index]), 1),
        15 => (18, state(index, random.u64(..3)), 0),
        16 => (24, [words(&[random.u64(..64) | 60 << 32]), vec![0; 64]].concat(), 0),
        17 => (25, [words(&[32 | 1 << 32]), vec![0; 4], vec![random.u8(..3)]].concat(), 0),
        18 => (31 + u32::from(random.u8(..2)), words(&[4096, 0, 2 | 16 << 16]), 1),
        _ => (random.u32(..48), vec![random.u8(..); random.usize(..64)], 0),
    }
}

/// What a front end begins with. From the first on its messages are answered if they ask for that.
fn opening() -> [(u32, Vec<u8>); 4] {
    [(1, vec![]), (3, vec![]), (2, words(&[0x1_7000_0000])), (16, words(&[0xb22b]))]
}

/// Brings ring 0 up as a front end does.
fn start_ring(stream: &mut UnixStream, memory: RawFd, event: RawFd) {
    let steps = [
        (SET_MEM_TABLE, words(&[1, 0, MEMORY_BYTES, 0, 0]), Some(memory)),
        (8, words(&[16 << 32]), None),
        (9, words(&[0, 0x1000, 0x2000, 0x3000, 0]), None),
        (10, words(&[0]), None),
        (13, words(&[0]), Some(event)),
        (12, words(&[0]), Some(event)),
        (18, words(&[1 << 32]), None),
    ];
    for (request, body, descriptor) in steps {
        let fds: Vec<RawFd> = descriptor.into_iter().collect();
        let _ = stream.send_with_fds(&[&message(request, 1, &body)[..]], &fds);
    }
}

/// The daemon's answer to the newest `request`; `None`: it has ended the connection.
fn answer(stream: &mut UnixStream, request: u32) -> Option<Vec<u8>> {
    loop {
        let mut header = [0; 12];
        if !is_there(stream.read_exact(&mut header), request) {
            return None;
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let mut body = vec![0; word(8) as usize];
        if !is_there(stream.read_exact(&mut body), request) {
            return None;
        }
        if word(0) == request {
            return Some(body);
        }
    }
}

/// Whether a message leaves it at that: each one that asks for an answer gets one.
fn keeps_answers(request: u32, body: &[u8]) -> bool {
    let bits = body.first_chunk().map_or(0, |bits| u64::from_le_bytes(*bits));
    match request {
        2 => bits & 1 << 30 != 0,
        4 => false,
        16 => bits == 0xb22b,
        _ => true,
    }
}

/// Names the seed of a run that ends by a panic.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {}", self.0);
        }
    }
}

/// False: the connection has ended. Whoever neither answers nor ends it is a failure.
fn is_there(read: std::io::Result<()>, request: u32) -> bool {
    let Err(error) = read else { return true };
    assert!(
        matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset),
        "a front end is neither answered ({request}) nor cut off: {error}"
    );
    false
}

/// Guest memory as the daemon says that it has it: address and size of each region.
#[derive(Default)]
struct Regions {
    there: Vec<(u64, u64)>,
    /// Ones that overlap another and were refused.
    refused: u64,
}

impl Regions {
    /// Sends a message that changes them, and notes what became of it. False: that was the end.
    fn change(
        &mut self,
        stream: &mut UnixStream,
        request: u32,
        body: &[u8],
        fds: &[RawFd],
    ) -> bool {
        let bytes = message(request, 1 | NEED_REPLY, body);
        let word = |at: usize| u64::from_le_bytes(body[8 * at..8 * at + 8].try_into().unwrap());
        let region = (word(1), word(2));
        let overlaps = request == ADD_MEM_REG
            && self.there.iter().any(|(address, size)| {
                region.0 < address + size && *address < region.0.saturating_add(region.1)
            });
        let sent = stream.send_with_fds(&[&bytes[..]], fds).is_ok();
        let taken =
            sent.then(|| answer(stream, request)).flatten().is_some_and(|ack| ack == [0; 8]);
        assert!(!(taken && overlaps), "{region:x?} overlaps one of {:x?}", self.there);
        self.refused += u64::from(overlaps);
        match request {
            _ if !taken => return false,
            SET_MEM_TABLE => self.there = vec![region],
            ADD_MEM_REG => self.there.push(region),
            _ => self.there.retain(|there| *there != region),
        }
        true
    }
}

/// A front end whose rings are in order, and run, cuts its memory short: it is cut off.
fn cut_short(random: &mut fastrand::Rng, path: &Path, mut meanwhile: impl FnMut()) {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    for (request, body) in opening() {
        stream.write_all(&message(request, 1, &body)).unwrap();
    }
    let (memory, event) = (memfd(MEMORY_BYTES), nix::sys::eventfd::EventFd::new().unwrap());
    start_ring(&mut stream, memory.as_raw_fd(), event.as_raw_fd());
    // What does not touch the ring, on the way.
    for _ in 0..random.usize(..4) {
        meanwhile();
        let (request, body) = [(1, vec![]), (17, vec![]), (36, vec![])][random.usize(..3)].clone();
        stream.write_all(&message(request, 1, &body)).unwrap();
        answer(&mut stream, request).expect("an answer");
    }
    memory.set_len(0).unwrap();
    event.write(1).unwrap();
    assert_eq!(answer(&mut stream, u32::MAX), None, "it is cut off");
}

/// Takes what has completed of the neighbour's requests, and asks for as many more.
fn go_on(neighbour: &mut Runner) -> vflash_bench::Result<()> {
    neighbour.reap()?;
    neighbour.fill(Instant::now());
    Ok(())
}

/// Has every request that is under way now complete, and some more.
fn catch_up(neighbour: &mut Runner) -> vflash_bench::Result<()> {
    let end = neighbour.operations + 2 * u64::from(NEIGHBOUR_DEPTH);
    while neighbour.operations < end {
        go_on(neighbour)?;
        neighbour.wait(PATIENCE)?;
    }
    Ok(())
}

/// A guest's memory, as far as the daemon has nothing to write there while nothing is under way.
fn resting(guest: &Runner) -> Vec<u8> {
    let (memory, layout) = (&guest.device.memory, guest.device.queues[0].layout);
    let mut bytes = vec![0; memory.length()];
    memory.read(0, &mut bytes);
    bytes.drain(layout.used..layout.data);
    bytes
}

/// One front end's life; `meanwhile` is called before each message, `look` before it leaves. How
/// often it was refused memory that overlaps.
fn session(
    random: &mut fastrand::Rng,
    path: &Path,
    memory: &File,
    mut meanwhile: impl FnMut(),
    look: impl FnOnce(),
) -> u64 {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    for (request, body) in opening() {
        let _ = stream.write_all(&message(request, 1, &body));
    }
    let event = nix::sys::eventfd::EventFd::new().unwrap();
    let mut regions = Regions::default();
    if random.u8(..4) > 0 {
        start_ring(&mut stream, memory.as_raw_fd(), event.as_raw_fd());
        regions.there.push((0, MEMORY_BYTES));
    }
    // Until then what it is told can be told apart.
    let mut plain = true;
    for _ in 0..random.usize(1..40) {
        meanwhile();
        let (request, body, descriptors) = plausible(random);
        let mut bytes = message(request, 1 | if random.bool() { NEED_REPLY } else { 0 }, &body);
        let mut send = descriptors;
        let mistake = random.u8(..24);
        let changes = matches!(request, SET_MEM_TABLE | ADD_MEM_REG | REM_MEM_REG);
        plain &= mistake > 3 && (!changes || body.len() >= 24) && keeps_answers(request, &body);
        if plain && changes {
            let fds = vec![memory.as_raw_fd(); send];
            match regions.change(&mut stream, request, &body, &fds) {
                true => continue,
                false => return regions.refused,
            }
        }
        match mistake {
            0 => bytes[8..12].copy_from_slice(&random.u32(..).to_le_bytes()),
            1 => bytes.truncate(random.usize(..=bytes.len())),
            2 => send = random.usize(..4),
            3 => {
                let at = random.usize(..bytes.len());
                bytes[at] ^= 1 << random.u8(..8);
            }
            _ => {}
        }
        let eventfd = (12..=14).contains(&request);
        let fd = if eventfd { event.as_raw_fd() } else { memory.as_raw_fd() };
        let fds: Vec<RawFd> = vec![fd; send];
        if bytes.is_empty() || stream.send_with_fds(&[&bytes[..]], &fds).is_err() {
            return regions.refused;
        }
        let _ = event.write(1);
    }
    if random.u8(..6) == 0 {
        // Guest memory cut short while rings may run.
        let _ = memory.set_len(0);
        let _ = event.write(1);
    }
    look();
    regions.refused
}

#[test]
fn no_front_end_harms_the_daemon_or_its_neighbours() {
    let seconds = std::env::var("VFLASH_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    let end = Instant::now() + Duration::from_secs(seconds.unwrap_or(2));
    let daemon = Daemon::start(1);
    let bad = daemon.serve_pinning("bad", 16 * MIB);
    let good = daemon.serve_pinning("good", 16 * MIB);
    let features = answers(&bad.socket);
    let device = connect(&good.socket, 1, NEIGHBOUR_DEPTH);
    let mut neighbour = Runner::new(device, workload(0)).guarded(PATIENCE);
    let asleep = daemon.serve("asleep", 16 * MIB, false);
    let mut sleeper = Runner::new(connect(&asleep.socket, 1, NEIGHBOUR_DEPTH), workload(1));
    operate(&mut sleeper, 500);
    sleeper.read_back().unwrap();
    let memory_before = resting(&sleeper);
    let (mut started, mut refused) = (0u64, 0u64);
    let mut sessions = 0u64;
    for seed in 0.. {
        let _seed = Seed(seed);
        let mut random = fastrand::Rng::with_seed(seed);
        let memory = memfd(MEMORY_BYTES);
        // Rings with something in them: an available index, heads, descriptors.
        let mut content = vec![0; MEMORY_BYTES as usize];
        for byte in &mut content[..0x4000] {
            *byte = if random.u8(..4) == 0 { random.u8(..) } else { random.u8(..3) };
        }
        (&memory).write_all(&content).unwrap();
        let harmed = |error| panic!("seed {seed}: the neighbour is harmed: {error}");
        let mut meanwhile = || go_on(&mut neighbour).unwrap_or_else(harmed);
        refused += session(&mut random, &bad.socket, &memory, &mut meanwhile, || {
            started += u64::from(daemon.server.status(bad.id).unwrap().queues_running);
        });
        if seed % 8 == 4 {
            cut_short(&mut random, &bad.socket, meanwhile);
        }
        sessions += 1;
        catch_up(&mut neighbour).unwrap_or_else(harmed);
        if seed % 8 == 0 {
            assert_eq!(answers(&bad.socket), features, "seed {seed}: the next one is served");
            neighbour.read_back().unwrap_or_else(harmed);
            let same = resting(&sleeper) == memory_before;
            assert!(same, "seed {seed}: the memory of a guest that sleeps was written");
            if Instant::now() > end && sessions >= SESSIONS_MIN {
                break;
            }
        }
    }
    let (operations, slowest) = (neighbour.operations, neighbour.latency.snapshot().quantile(1.0));
    sleeper.read_back().unwrap();
    sleeper.device.stop().unwrap();
    neighbour.device.stop().unwrap();
    println!("{sessions} sessions, {started} rings seen running, {refused} regions that overlap");
    println!("neighbour: {operations} requests, the slowest took {slowest:?}");
    assert!(started > 0, "no ring ran in {sessions} sessions");
    assert!(refused > 0, "no region overlapped another in {sessions} sessions");
    assert_eq!((neighbour.errors, sleeper.errors), (0, 0));
    daemon.server.stop().unwrap();
}
