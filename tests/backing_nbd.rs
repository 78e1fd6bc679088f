//! An NBD export as a disk: against a server that misbehaves, and against qemu-nbd and nbdkit.

#[path = "backing_nbd/fake.rs"]
#[allow(dead_code, reason = "each program has its own manners")]
mod fake;

use fake::{FLAGS, Fake, LATENESS, Manner, listens};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vflash::backing::fence::Claim;
use vflash::backing::nbd::{NbdClient, NbdOptions};
use vflash::backing::open::{Backing, OpenOptions};
use vflash::backing::recover::RecoverOptions;
use vflash::backing::spec::Spec;
use vflash::backing::stamp::{DrainMode, Owner, State};
use vflash::base::ErrorKind;
use vflash::base::units::MIB;
use vflash::io::blocking::Blocking;
use vflash::io::buffer::PinnedBuffer;
use vflash::io::disk::{Completion, Disk, DiskTarget, Errno, OpenDisk, Operation, OperationKind};

const SIZE_BYTES: u64 = 4 * MIB;
const SLOTS: usize = 8;
const SLOT_BYTES: usize = 192 << 10;

fn options() -> NbdOptions {
    NbdOptions {
        connect: Duration::from_secs(5),
        request: Duration::from_secs(20),
        settle: Duration::from_millis(30),
        read: Duration::from_secs(20),
        patience: None,
    }
}

fn client(url: &str, options: NbdOptions) -> vflash::base::Result<Arc<NbdClient>> {
    let Spec::Nbd(url) = Spec::parse(url)? else { panic!("an NBD URL") };
    NbdClient::connect(url, options)
}

fn open(client: &Arc<NbdClient>) -> Box<dyn Disk + Send> {
    client.open(Arc::new(|| {})).unwrap()
}

/// Random operations on a disk, compared with a model.
struct Load {
    disk: Box<dyn Disk + Send>,
    model: Vec<u8>,
    random: fastrand::Rng,
    slots: Vec<Slot>,
    /// Operations that ended, and how many flushes failed.
    done: u64,
    flushes_failed: u64,
}

struct Slot {
    buffer: PinnedBuffer,
    /// What is under way: kind and bytes.
    under_way: Option<(OperationKind, usize, usize)>,
}

impl Load {
    fn new(disk: Box<dyn Disk + Send>, seed: u64) -> Self {
        let slot = || Slot { buffer: PinnedBuffer::new(SLOT_BYTES), under_way: None };
        Self {
            disk,
            model: vec![0; SIZE_BYTES as usize],
            random: fastrand::Rng::with_seed(seed),
            slots: (0..SLOTS).map(|_| slot()).collect(),
            done: 0,
            flushes_failed: 0,
        }
    }

    fn submit(&mut self, slot: usize) {
        let sectors = self.random.usize(1..SLOT_BYTES / 512);
        let start = self.random.usize(0..=SIZE_BYTES as usize / 512 - sectors) * 512;
        let end = start + sectors * 512;
        let busy =
            |slot: &Slot| slot.under_way.is_some_and(|(_, from, to)| from < end && start < to);
        let kind = match self.random.u8(0..12) {
            0 => OperationKind::Flush,
            1 => OperationKind::Zero,
            2 => OperationKind::Discard,
            3 => OperationKind::WriteDurable,
            4..=7 => OperationKind::Read,
            _ => OperationKind::Write,
        };
        if kind != OperationKind::Flush && self.slots.iter().any(busy) {
            return;
        }
        let (offset, length) =
            if kind == OperationKind::Flush { (0, 0) } else { (start, end - start) };
        let segment = self.slots[slot].buffer.segment();
        // Two segments, cut where a guest might.
        let parts =
            [segment.part(0, length / 1024 * 512), segment.part(length / 1024 * 512, length)];
        let parts = [parts[0], parts[1].part(0, length - parts[0].length())];
        match kind {
            OperationKind::Write | OperationKind::WriteDurable => {
                let target = &mut self.model[start..end];
                self.random.fill(target);
                segment.copy_from(target);
            }
            OperationKind::Zero | OperationKind::Discard => self.model[start..end].fill(0),
            _ => {}
        }
        let segments = if kind.transfers() { &parts[..] } else { &[] };
        let operation = Operation { kind, offset: offset as u64, length: length as u64, segments };
        self.slots[slot].under_way = Some((kind, offset, offset + length));
        self.disk.submit(operation, slot as u64);
    }

    fn reap(&mut self) {
        let mut completions = Vec::new();
        self.disk.poll(&mut completions, true);
        for Completion { token, result } in completions {
            let slot = &mut self.slots[token as usize];
            let (kind, start, end) = slot.under_way.take().expect("completed once");
            self.done += 1;
            match kind {
                OperationKind::Read => {
                    assert_eq!(result, Ok(()));
                    let mut seen = vec![0; end - start];
                    slot.buffer.segment().copy_to(&mut seen);
                    assert!(seen == self.model[start..end], "{start}..{end} reads as written");
                }
                OperationKind::Flush => self.flushes_failed += u64::from(result.is_err()),
                _ => assert_eq!(result, Ok(()), "{kind:?}"),
            }
        }
    }

    fn run(&mut self, operations: u64) {
        let end = self.done + operations;
        while self.done < end {
            for slot in 0..SLOTS {
                if self.slots[slot].under_way.is_none() {
                    self.submit(slot);
                }
            }
            self.reap();
        }
        while self.slots.iter().any(|slot| slot.under_way.is_some()) {
            self.reap();
        }
    }

    /// Compares all of it.
    fn read_back(self) {
        let bytes = Blocking::new(self.disk).read(0, SIZE_BYTES as usize).unwrap();
        assert!(bytes == self.model, "all of it is as written");
    }
}

#[test]
fn no_operation_is_lost_whatever_the_server_does() {
    let bad = [
        Manner::Reorder,
        Manner::Drop(20),
        Manner::HalfReply(13),
        Manner::HalfGreeting,
        Manner::Stranger(7),
        Manner::Drop(0),
        Manner::Shrunk,
        Manner::HalfReply(40),
        Manner::Drop(3),
    ];
    for (first, expected) in [(Manner::Reorder, 1), (Manner::Drop(9), 8)] {
        let manners = match first {
            Manner::Reorder => vec![first],
            first => [&[first], &bad[1..]].concat(),
        };
        let fake = Fake::start(vec![0; SIZE_BYTES as usize], &manners, FLAGS);
        let client = client(&fake.url(), options()).unwrap();
        let mut load = Load::new(open(&client), 5);
        load.run(1500);
        assert!(fake.connections.load(Ordering::SeqCst) >= expected);
        let model = load.model.clone();
        load.read_back();
        assert!(*fake.content.lock().unwrap() == model);
        assert!(client.status().connected);
        assert_eq!(client.status().reconnects > 0, expected > 1);
    }
}

#[test]
fn a_server_that_hangs_is_given_up_for_a_new_connection() {
    let fake = Fake::start(vec![0; SIZE_BYTES as usize], &[Manner::Hang], FLAGS);
    let client =
        client(&fake.url(), NbdOptions { request: Duration::from_millis(200), ..options() })
            .unwrap();
    let mut load = Load::new(open(&client), 6);
    load.run(200);
    load.read_back();
    let status = client.status();
    assert_eq!(status.reconnects, 1);
    let why = status.last_error.expect("a reason");
    assert!(why.contains("got no answer"), "{why}");
}

#[test]
fn errors_of_the_server_are_the_operations_errors() {
    for (error, errno) in [(28, libc::ENOSPC), (5, libc::EIO), (22, libc::EIO), (999, libc::EIO)] {
        let fake = Fake::start(vec![0; 1 << 20], &[Manner::Error(error)], FLAGS);
        let mut disk = Blocking::new(open(&client(&fake.url(), options()).unwrap()));
        assert_eq!(disk.write_copies(&[0], &[1; 512]), Err(Errno(errno)), "{error}");
        assert_eq!(disk.read(0, 512), Err(Errno(errno)));
    }
}

#[test]
fn without_a_server_operations_wait_or_fail_when_patience_ends() {
    let fake = Fake::start(vec![0; 1 << 20], &[Manner::Drop(0)], FLAGS);
    let patience = Some(Duration::from_millis(300));
    let client = client(&fake.url(), NbdOptions { patience, ..options() }).unwrap();
    let socket = fake.path();
    std::fs::rename(&socket, socket.with_extension("away")).unwrap();
    let mut disk = Blocking::new(open(&client));
    assert_eq!(disk.read(0, 512), Err(Errno(libc::ETIMEDOUT)));
    assert!(!client.status().connected);
    std::fs::rename(socket.with_extension("away"), &socket).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while !client.status().connected {
        assert!(Instant::now() < deadline, "it comes back by itself");
        std::thread::yield_now();
    }
    assert_eq!(disk.read(0, 512), Ok(vec![0; 512]));
}

#[test]
fn a_server_that_cannot_be_used_is_told_with_its_own_words() {
    let refused = |url: &str| client(url, options()).expect_err("refused").to_string();
    let fake = Fake::start(vec![0; 1 << 20], &[Manner::HalfGreeting], FLAGS);
    let error = refused(&fake.url());
    assert!(error.contains("the server ended the negotiation"), "{error}");
    let fake = Fake::start(vec![0; 1000], &[], FLAGS);
    let error = refused(&fake.url());
    assert!(error.contains("1000 bytes, is no multiple of its blocks"), "{error}");
    let none = refused("nbd+unix:///x?socket=/nonexistent/socket");
    assert!(none.contains("connecting to nbd+unix:///x?socket=/nonexistent/socket"), "{none}");
}

#[test]
fn an_export_that_cannot_flush_or_be_written_gets_no_log() {
    for (flags, reason) in [
        (FLAGS & !(1 << 2), "its server cannot flush, so nobody knows what is durable there"),
        (FLAGS | 1 << 1, "the export is read-only"),
    ] {
        let fake = Fake::start(vec![0; 1 << 20], &[], flags);
        let sidecar = fake.folder.path().join("sidecar");
        let mut backing = Backing::open(&backing_options(&fake.url(), Some(&sidecar))).unwrap();
        assert_eq!(backing.description().no_log, Some(reason));
        let error = backing.claim(&claim(), &mut |_| {}).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().ends_with(reason), "{error}");
        assert!(!sidecar.exists());
    }
    let fake = Fake::start(vec![0; 1 << 20], &[], FLAGS);
    let mut backing = Backing::open(&backing_options(&fake.url(), None)).unwrap();
    let error = backing.claim(&claim(), &mut |_| {}).expect_err("no place for a stamp");
    assert!(error.to_string().contains("name one (`sidecar:`)"), "{error}");
}

fn backing_options(url: &str, sidecar: Option<&Path>) -> OpenOptions {
    OpenOptions {
        spec: Spec::parse(url).unwrap(),
        sidecar: sidecar.map(Path::to_owned),
        reading: false,
        wait: Duration::ZERO,
        nbd: options(),
    }
}

fn claim() -> Claim {
    Claim {
        owner: Owner { allocation: [3; 16], volume: "vm/disk".into(), ..Default::default() },
        remembered: None,
        state: State::Dirty,
        drain: DrainMode::Grouped,
        create: true,
        adopt: false,
        group_bytes_max: None,
        new_disk: [7; 16],
        roster: Default::default(),
        now_ms: 1,
    }
}

#[test]
fn an_export_is_claimed_with_a_sidecar_elsewhere() {
    let fake = Fake::start(vec![0; 1 << 20], &[], FLAGS);
    let sidecar = fake.folder.path().join("sidecar");
    let options = backing_options(&fake.url(), Some(&sidecar));
    let mut backing = Backing::open(&options).unwrap();
    let claimed = backing.claim(&claim(), &mut |_| {}).unwrap();
    assert_eq!(claimed.stamp.expect("a stamp").owner_epoch, 1);
    let (disk, _) = backing.disks();
    disk.write_copies(&[512], &[9; 1024]).unwrap();
    disk.flush().unwrap();
    // The sidecar's lock keeps others from the export, which has none.
    assert_eq!(Backing::open(&options).err().expect("refused").kind(), ErrorKind::Busy);
    drop(backing);
    let mut other = Backing::open(&options).unwrap();
    let owner = Owner { allocation: [4; 16], ..Default::default() };
    let error = other.claim(&Claim { owner, ..claim() }, &mut |_| {}).expect_err("refused");
    assert!(error.to_string().contains("it belongs to vm/disk"), "{error}");
}

/// Waits for what is about to be so.
fn await_that(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

/// Leaves a write of ones with a server that is late, as the owner by `claim` that was killed.
fn die_writing(fake: &Fake, options: &OpenOptions, claim: &Claim) {
    let mut backing = Backing::open(options).unwrap();
    backing.claim(claim, &mut |_| {}).unwrap();
    let (DiskTarget::Threaded(client), _) = backing.targets() else { panic!("an export") };
    let mut disk = client.open(Arc::new(|| {})).unwrap();
    let buffer = PinnedBuffer::new(4096);
    buffer.segment().copy_from(&[1; 4096]);
    let segments = [buffer.segment()];
    let kind = OperationKind::Write;
    disk.submit(Operation { kind, offset: 0, length: 4096, segments: &segments }, 1);
    await_that("the server has read it", || fake.kept.load(Ordering::SeqCst) == 1);
    drop((disk, client, backing));
    await_that("its connection is gone", || fake.late_writes() == 1);
}

#[test]
fn a_late_write_of_a_dead_owner_lands_on_nothing_newer() {
    let cannot_flush = FLAGS & !(1 << 2);
    for (case, flags, stamped, state) in [
        ("no stamp", FLAGS, false, State::Clean),
        ("a clean stamp", cannot_flush, true, State::Clean),
        ("a dirty stamp", FLAGS, true, State::Dirty),
        ("given up", FLAGS, true, State::Dirty),
    ] {
        let fake = Fake::start(vec![0; 1 << 20], &[Manner::Late], flags);
        let sidecar = fake.folder.path().join("sidecar");
        let mut options = backing_options(&fake.url(), stamped.then_some(sidecar.as_path()));
        options.nbd.settle = LATENESS;
        let mut claim = Claim { state, ..claim() };
        die_writing(&fake, &options, &claim);
        if case == "given up" {
            let how = RecoverOptions::default();
            let mut backing = Backing::open(&options).unwrap();
            let taken = backing.take_over_lost("vm/disk", how, &mut |_| {}).unwrap();
            assert!(taken.expect("something is lost").standing.stamp.is_clean());
            claim.owner.allocation = [4; 16];
        }
        let mut backing = Backing::open(&options).unwrap();
        backing.claim(&claim, &mut |_| {}).unwrap();
        let (disk, _) = backing.disks();
        assert_eq!(disk.read(0, 4096), Ok(vec![0; 4096]), "{case}: reads wait for nothing");
        disk.write_copies(&[0], &[2; 4096]).unwrap();
        assert_eq!(fake.late_writes(), 0, "{case}: it was carried out");
        let content = fake.content.lock().unwrap();
        assert!(content[..4096] == [2; 4096], "{case}: the newer write stays");
    }
}

/// A server of another make.
struct Server {
    child: Child,
}

impl Server {
    fn start(program: &str, package: &str, arguments: &[&str], ready: impl Fn() -> bool) -> Self {
        let child = Command::new(program).args(arguments).stdin(Stdio::null()).spawn();
        let mut server =
            Self { child: child.unwrap_or_else(|e| panic!("{program} (package {package}): {e}")) };
        let deadline = Instant::now() + Duration::from_secs(30);
        while !ready() {
            assert!(Instant::now() < deadline, "{program} listens");
            assert!(server.child.try_wait().unwrap().is_none(), "{program} ended");
            std::thread::yield_now();
        }
        server
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn disk_file(folder: &Path) -> String {
    let path = folder.join("disk");
    std::fs::File::create(&path).unwrap().set_len(SIZE_BYTES).unwrap();
    path.display().to_string()
}

/// Runs a load against a server that is killed in its middle.
fn load_with_kills(url: &str, start: impl Fn() -> Server) {
    let mut server = start();
    let client = client(url, options()).unwrap();
    assert_eq!(client.export().size_bytes, SIZE_BYTES);
    let mut load = Load::new(open(&client), 9);
    load.run(300);
    for _ in 0..3 {
        // Requests are under way when the server goes.
        let killer = std::thread::spawn(move || server.kill());
        for slot in 0..SLOTS {
            load.submit(slot);
        }
        killer.join().unwrap();
        server = start();
        load.run(200);
    }
    load.read_back();
    assert!(client.status().reconnects >= 3, "{:?}", client.status());
}

#[test]
fn qemu_nbd_over_a_unix_socket_serves_a_verified_load_and_survives_kills() {
    let folder = tempfile::tempdir().unwrap();
    let (file, socket) = (disk_file(folder.path()), folder.path().join("q.sock"));
    let socket_text = socket.display().to_string();
    let url = format!("nbd+unix:///disk?socket={socket_text}");
    load_with_kills(&url, || {
        let _ = std::fs::remove_file(&socket);
        let arguments = ["-f", "raw", "-t", "-x", "disk", "-e", "4", "-k", &socket_text, &file];
        Server::start("qemu-nbd", "qemu-utils", &arguments, || listens(&socket))
    });
}

#[test]
fn qemu_nbd_over_tcp_serves_a_verified_load() {
    let folder = tempfile::tempdir().unwrap();
    let file = disk_file(folder.path());
    let port = free_port().to_string();
    let arguments = ["-f", "raw", "-t", "-e", "4", "-b", "127.0.0.1", "-p", &port, &file];
    let address = format!("127.0.0.1:{port}");
    let ready = || TcpStream::connect(&address).is_ok();
    let _server = Server::start("qemu-nbd", "qemu-utils", &arguments, ready);
    let client = client(&format!("nbd://{address}/"), options()).unwrap();
    let mut load = Load::new(open(&client), 10);
    load.run(500);
    assert_eq!(load.flushes_failed, 0);
    load.read_back();
    drop(client);
    let refused = self::client(&format!("nbd://{address}/other"), options()).expect_err("refused");
    assert!(refused.to_string().contains("it has no such export"), "{refused}");
}

#[test]
fn nbdkit_over_both_sockets_serves_a_verified_load_and_survives_kills() {
    let folder = tempfile::tempdir().unwrap();
    let (file, socket) = (disk_file(folder.path()), folder.path().join("k.sock"));
    let socket_text = socket.display().to_string();
    let file_argument = format!("file={file}");
    load_with_kills(&format!("nbd+unix:///?socket={socket_text}"), || {
        let _ = std::fs::remove_file(&socket);
        let arguments = ["-f", "-U", &socket_text, "file", &file_argument];
        Server::start("nbdkit", "nbdkit", &arguments, || listens(&socket))
    });
    std::fs::File::create(&file).unwrap().set_len(SIZE_BYTES).unwrap();
    let port = free_port().to_string();
    let arguments = ["-f", "-i", "127.0.0.1", "-p", &port, "file", &file_argument];
    let address = format!("127.0.0.1:{port}");
    let ready = || TcpStream::connect(&address).is_ok();
    let _server = Server::start("nbdkit", "nbdkit", &arguments, ready);
    let client = client(&format!("nbd://{address}/"), options()).unwrap();
    let mut load = Load::new(open(&client), 11);
    load.run(500);
    load.read_back();
}
