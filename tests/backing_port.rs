//! A disk with threads of its own under a reactor: an NBD export served to a guest.

#[path = "backing_nbd/fake.rs"]
#[allow(dead_code, reason = "each program has its own manners")]
mod fake;

mod common;

use common::{connect, export, operate, workload};
use fake::{FLAGS, Fake, Manner};
use std::any::Any;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;
use vflash::backing::nbd::{NbdClient, NbdOptions};
use vflash::backing::spec::Spec;
use vflash::base::units::SECTOR_BYTES;
use vflash::io::disk::{Errno, OpenDisk, Operation, OperationKind};
use vflash::io::file::{FileDisk, Preallocation};
use vflash::io::volume::{DiskIndex, Io, Outcome, Request, RequestId, RequestKind, Volume};
use vflash::vhost::{DiskTarget, Export, Server, ServerOptions};
use vflash_bench::runner::{Mix, Runner, Workload};

const SIZE_BYTES: u64 = 4 << 20;

/// Hands every request to its disk as it is.
#[derive(Default)]
struct Through {
    /// Operations under way, and whether one failed, by request.
    requests: Vec<(usize, bool)>,
}

impl Volume for Through {
    fn attach(&mut self, requests_max: u32) {
        self.requests = vec![(0, false); requests_max as usize];
    }

    fn submit(&mut self, request: Request<'_>, io: &mut dyn Io) {
        let kind = match request.kind {
            RequestKind::Read => OperationKind::Read,
            RequestKind::Write => OperationKind::Write,
            RequestKind::Flush => OperationKind::Flush,
            RequestKind::Discard => OperationKind::Discard,
            RequestKind::WriteZeroes { .. } => OperationKind::Zero,
        };
        let id = request.id.0;
        self.requests[id as usize] = (request.ranges.len().max(1), false);
        if kind == OperationKind::Flush {
            let flush = Operation { kind, offset: 0, length: 0, segments: &[] };
            io.submit(DiskIndex(0), flush, id.into());
        }
        for range in request.ranges {
            let (offset, length) = (range.start * SECTOR_BYTES, range.count * SECTOR_BYTES);
            let segments = if kind.transfers() { request.segments } else { &[] };
            io.submit(DiskIndex(0), Operation { kind, offset, length, segments }, id.into());
        }
    }

    fn completed(&mut self, token: u64, result: Result<(), Errno>, io: &mut dyn Io) {
        let (left, failed) = &mut self.requests[token as usize];
        *left -= 1;
        *failed |= result.is_err();
        if *left == 0 {
            let outcome = if *failed { Outcome::Failed } else { Outcome::Done };
            io.complete(RequestId(token as u32), outcome);
        }
    }
}

#[test]
fn a_guest_reads_what_it_wrote_through_a_disk_with_its_own_threads() {
    let manners = [Manner::Reorder, Manner::Good];
    let fake = Fake::start(vec![0; SIZE_BYTES as usize], &manners, FLAGS);
    let Spec::Nbd(url) = Spec::parse(&fake.url()).unwrap() else { panic!("NBD") };
    let client = NbdClient::connect(url, NbdOptions::default()).unwrap();
    let server = Server::start(&ServerOptions { reactors: 2, cpus: vec![] }).unwrap();
    let socket = fake.folder.path().join("vhost.sock");
    let target = DiskTarget::Threaded(client.clone());
    assert_eq!(target.geometry(), client.geometry());
    let export = Export {
        disks: vec![target],
        ..export(&socket, SIZE_BYTES / SECTOR_BYTES, Box::new(Through::default()))
    };
    let metrics = export.door.metrics.clone();
    let id = server.add(export).unwrap();
    // The export holds what it needs of the client.
    drop(client);
    let mut runner = Runner::new(connect(&socket, 2, 32), workload(21));
    operate(&mut runner, 3000);
    runner.read_back().unwrap();
    assert_eq!(runner.errors, 0);
    runner.device.stop().unwrap();
    assert!(metrics.snapshot().class(vflash::metrics::OperationClass::Write).operations() > 100);
    server.remove(id).unwrap();
    server.stop().unwrap();
}

#[test]
fn an_export_whose_disk_comes_and_goes_shows_its_guest_no_error() {
    let manners = [Manner::Drop(50), Manner::HalfReply(30), Manner::Reorder];
    let fake = Fake::start(vec![0; SIZE_BYTES as usize], &manners, FLAGS);
    let Spec::Nbd(url) = Spec::parse(&fake.url()).unwrap() else { panic!("NBD") };
    let settle = Duration::from_millis(10);
    let client = NbdClient::connect(url, NbdOptions { settle, ..Default::default() }).unwrap();
    let server = Server::start(&ServerOptions { reactors: 1, cpus: vec![] }).unwrap();
    let socket = fake.folder.path().join("vhost.sock");
    let disks = vec![DiskTarget::Threaded(client.clone() as Arc<dyn OpenDisk>)];
    let volume = Box::new(Through::default());
    let id =
        server.add(Export { disks, ..export(&socket, SIZE_BYTES / SECTOR_BYTES, volume) }).unwrap();
    // A flush would be told that the server may have forgotten something.
    let mix = Mix { read: 50, write: 50, ..Mix::READ };
    let mut runner = Runner::new(connect(&socket, 1, 16), Workload { mix, ..workload(22) });
    operate(&mut runner, 1000);
    runner.read_back().unwrap();
    runner.device.stop().unwrap();
    assert!(client.status().reconnects >= 2);
    server.remove(id).unwrap();
    server.stop().unwrap();
}

/// Starts an operation of its own when it gets a message, and asks for a timer when that has ended.
struct Background(Sender<&'static str>);

impl Volume for Background {
    fn attach(&mut self, _requests_max: u32) {}

    fn submit(&mut self, request: Request<'_>, io: &mut dyn Io) {
        io.complete(request.id, Outcome::Done);
    }

    fn message(&mut self, _message: Box<dyn Any + Send>, io: &mut dyn Io) {
        let flush = Operation { kind: OperationKind::Flush, offset: 0, length: 0, segments: &[] };
        io.submit(DiskIndex(0), flush, 7);
    }

    fn completed(&mut self, token: u64, result: Result<(), Errno>, io: &mut dyn Io) {
        assert_eq!((token, result), (7, Ok(())));
        io.wake_at(io.now() + Duration::from_millis(20));
        self.0.send("completed").unwrap();
    }

    fn timer(&mut self, _io: &mut dyn Io) {
        self.0.send("timer").unwrap();
    }
}

#[test]
fn a_volume_without_a_guest_works_on_its_own_and_gets_its_timers() {
    let fake = Fake::start(vec![0; SIZE_BYTES as usize], &[], FLAGS);
    let Spec::Nbd(url) = Spec::parse(&fake.url()).unwrap() else { panic!("NBD") };
    let client = NbdClient::connect(url, NbdOptions::default()).unwrap();
    let file = fake.folder.path().join("file");
    let file = FileDisk::create(&file, 1 << 20, Preallocation::Reserved).unwrap();
    let server = Server::start(&ServerOptions { reactors: 1, cpus: vec![] }).unwrap();
    for (name, target) in [("file", file.target()), ("nbd", DiskTarget::Threaded(client))] {
        let (sender, events) = channel();
        let socket = fake.folder.path().join(format!("{name}.sock"));
        let export = export(&socket, 8, Box::new(Background(sender)));
        let id = server.add(Export { disks: vec![target], ..export }).unwrap();
        for _ in 0..3 {
            server.message(id, Box::new(())).unwrap();
            for expected in ["completed", "timer"] {
                assert_eq!(events.recv_timeout(Duration::from_secs(30)), Ok(expected), "{name}");
            }
        }
        server.message(id, Box::new(())).unwrap();
        // Something may be under way: removal waits for it and does not hang.
        server.remove(id).unwrap();
    }
    server.stop().unwrap();
}
