//! Whatever a front end sends, the daemon lives, nobody else waits, and its own next connection
//! works.
//!
//! A seeded loop: a plausible session with wrong sizes, orders, descriptors and ring addresses.
//! Runs for VFLASH_FUZZ_SECONDS (default 2); a failure names its seed.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vflash::io::disk::{Errno, Operation, OperationKind};
use vflash::io::volume::{DiskIndex, Io, Outcome, Request, RequestId, Volume};
use vflash::vhost::{DiskTarget, Export, Server, ServerOptions};
use vflash::virtio::Device;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const MEMORY_BYTES: u64 = 1 << 20;

/// Sends one operation to a null disk for every request.
struct NullVolume;

impl Volume for NullVolume {
    fn attach(&mut self, _requests_max: u32) {}

    fn submit(&mut self, request: Request<'_>, io: &mut dyn Io) {
        let flush = Operation { kind: OperationKind::Flush, offset: 0, length: 0, segments: &[] };
        io.submit(DiskIndex(0), flush, u64::from(request.id.0));
    }

    fn completed(&mut self, token: u64, _result: Result<(), Errno>, io: &mut dyn Io) {
        io.complete(RequestId(token as u32), Outcome::Done);
    }
}

fn export(name: &str, socket: PathBuf) -> Export {
    Export {
        name: name.into(),
        socket,
        access: Default::default(),
        device: Device {
            capacity_sectors: 1 << 16,
            block_bytes: 512,
            optimal_bytes: 4096,
            read_only: false,
            discard: true,
            serial: "vflash-nv-fuzz".into(),
            queues: 4,
        },
        write_cache: true,
        pin_memory: true,
        volume: Box::new(NullVolume),
        disks: vec![DiskTarget::Null { size_bytes: 32 << 20 }],
        limits: Default::default(),
        metrics: Default::default(),
        events: Arc::new(|_| {}),
    }
}

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
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
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
        4 => {
            let region = [1, 0, MEMORY_BYTES, 0, 0].map(u64::from);
            (5, words(&region), 1)
        }
        5 => (37, words(&[0, number(random), number(random), 0, number(random)]), 1),
        6 => (38, words(&[0, 0, MEMORY_BYTES, 0, 0]), 0),
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

/// Brings ring 0 up as a front end does.
fn start_ring(stream: &mut UnixStream, memory: RawFd, event: RawFd) {
    let steps = [
        (5, words(&[1, 0, MEMORY_BYTES, 0, 0]), Some(memory)),
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

/// One front end's life; `look` is called before it leaves.
fn session(random: &mut fastrand::Rng, path: &Path, memory: &File, look: impl FnOnce()) {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
    let opening = [(3, vec![]), (2, words(&[0x1_7000_0000])), (16, words(&[0xb22b]))];
    for (request, body) in opening {
        let _ = stream.write_all(&message(request, 1, &body));
    }
    let event = nix::sys::eventfd::EventFd::new().unwrap();
    if random.u8(..4) > 0 {
        start_ring(&mut stream, memory.as_raw_fd(), event.as_raw_fd());
    }
    for _ in 0..random.usize(1..40) {
        let (request, body, descriptors) = plausible(random);
        let mut bytes = message(request, 1 | if random.bool() { 8 } else { 0 }, &body);
        let mut send = descriptors;
        match random.u8(..24) {
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
            return;
        }
        let _ = event.write(1);
    }
    if random.u8(..6) == 0 {
        // Guest memory cut short while rings may run.
        let _ = memory.set_len(0);
        let _ = event.write(1);
    }
    look();
}

#[test]
fn no_front_end_harms_the_daemon_or_its_neighbours() {
    let seconds = std::env::var("VFLASH_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    let end = Instant::now() + Duration::from_secs(seconds.unwrap_or(2));
    let folder = tempfile::tempdir().unwrap();
    let (bad, good) = (folder.path().join("bad.sock"), folder.path().join("good.sock"));
    let server = Server::start(&ServerOptions { reactors: 1, cpus: vec![] }).unwrap();
    let id = server.add(export("bad/vm", bad.clone())).unwrap();
    server.add(export("good/vm", good.clone())).unwrap();
    let features = answers(&good);
    let mut started = 0u64;
    let mut sessions = 0u64;
    for seed in 0.. {
        let mut random = fastrand::Rng::with_seed(seed);
        let memory = memfd(MEMORY_BYTES);
        // Rings with something in them: an available index, heads, descriptors.
        let mut content = vec![0; MEMORY_BYTES as usize];
        for byte in &mut content[..0x4000] {
            *byte = if random.u8(..4) == 0 { random.u8(..) } else { random.u8(..3) };
        }
        (&memory).write_all(&content).unwrap();
        session(&mut random, &bad, &memory, || {
            started += u64::from(server.status(id).unwrap().queues_running);
        });
        sessions += 1;
        if seed % 8 == 0 {
            assert_eq!(answers(&good), features, "seed {seed}: the neighbour is served");
            assert_eq!(answers(&bad), features, "seed {seed}: and so is the next connection");
            if Instant::now() > end {
                break;
            }
        }
    }
    println!("{sessions} sessions, {started} rings seen running");
    assert!(sessions > 100 && started > 0, "{sessions} sessions, {started} rings");
    server.stop().unwrap();
}
