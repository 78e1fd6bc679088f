//! The server's threads when a volume holds them up.

use super::*;
use crate::io::buffer::PinnedBuffer;
use crate::io::disk::{Errno, Operation, OperationKind};
use crate::io::volume::{DiskIndex, Io, Request};
use crate::vhost::door::tests::small_device;
use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Enough for threads that are alive.
const LONG: Duration = Duration::from_secs(30);

/// A thread that is held answers at no time.
const SHORT: Duration = Duration::from_millis(20);

/// Reads its disk when told to, and keeps its reactor when told to.
struct Plain {
    buffer: PinnedBuffer,
}

enum Told {
    /// Says that it has begun.
    Read(Sender<()>),
    /// Says so, too, and goes on when the other end is dropped.
    Hold(Sender<()>, Receiver<()>),
}

impl Volume for Plain {
    fn attach(&mut self, _requests_max: u32) {}

    fn submit(&mut self, _request: Request<'_>, _io: &mut dyn Io) {
        unreachable!("no request comes");
    }

    fn completed(&mut self, _: u64, _: std::result::Result<(), Errno>, _io: &mut dyn Io) {}

    fn message(&mut self, message: Box<dyn Any + Send>, io: &mut dyn Io) {
        match *message.downcast().unwrap() {
            Told::Read(begun) => {
                let segments = &[self.buffer.segment()];
                let kind = OperationKind::Read;
                let read = Operation { kind, offset: 0, length: 4096, segments };
                io.submit(DiskIndex(0), read, 1);
                begun.send(()).unwrap();
            }
            Told::Hold(begun, held) => {
                begun.send(()).unwrap();
                assert!(held.recv().is_err(), "nothing is sent");
            }
        }
    }
}

fn export(socket: &Path, disks: Vec<DiskTarget>, events: ExportEvents) -> Export {
    let door = NewDoor {
        name: "vm/disk".into(),
        socket: socket.to_owned(),
        access: SocketAccess::default(),
        device: small_device(),
        write_cache: true,
        pin_memory: false,
        limits: Limits::default(),
        metrics: Arc::default(),
        events,
    };
    Export { door, volume: Box::new(Plain { buffer: PinnedBuffer::new(4096) }), disks }
}

fn started() -> (Server, tempfile::TempDir) {
    let options = ServerOptions { reactors: 2, cpus: Vec::new() };
    (Server::start(&options).unwrap(), tempfile::tempdir().unwrap())
}

/// A disk whose reads take until something is written.
fn hung_disk() -> (DiskTarget, File) {
    let (end, other) = nix::unistd::pipe().unwrap();
    let geometry = DiskTarget::Null { size_bytes: 4096 }.geometry();
    (DiskTarget::File { file: Arc::new(end.into()), geometry }, other.into())
}

#[test]
fn a_thread_that_is_held_up_does_not_answer_and_is_named() {
    let (server, folder) = started();
    let socket = folder.path().join("a.sock");
    let (begun, begins) = channel();
    let (release, held) = channel::<()>();
    let (attached, held) = (Mutex::new(begun.clone()), Mutex::new(held));
    let events: ExportEvents = Arc::new(move |event| {
        if matches!(event, ExportEvent::Attached { .. }) {
            attached.lock().unwrap().send(()).unwrap();
            assert!(held.lock().unwrap().recv().is_err(), "nothing is sent");
        }
    });
    let id = server.add(export(&socket, Vec::new(), events)).unwrap();
    server.answers(LONG).unwrap();

    let (go_on, kept) = channel::<()>();
    server.message(id, Box::new(Told::Hold(begun, kept))).unwrap();
    begins.recv_timeout(LONG).unwrap();
    let error = server.answers(SHORT).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains(&format!("reactor {}", id.reactor)), "{error}");
    drop(go_on);
    server.answers(LONG).unwrap();

    let _front_end = UnixStream::connect(&socket).unwrap();
    begins.recv_timeout(LONG).unwrap();
    let error = server.answers(SHORT).unwrap_err();
    assert!(error.to_string().contains("socket thread"), "{error}");
    drop(release);
    server.answers(LONG).unwrap();
    server.clone().stop().unwrap();
    assert_eq!(server.answers(LONG).unwrap_err().kind(), ErrorKind::Gone);
}

#[test]
fn a_disk_that_hangs_keeps_no_other_from_being_closed() {
    let (server, folder) = started();
    let path = |name: &str| folder.path().join(name);
    let add = |name: &str, disks| server.add(export(&path(name), disks, Arc::new(|_| ()))).unwrap();
    let (disk, mut hand) = hung_disk();
    let hung = add("hung", vec![disk]);
    let others = ["b", "c", "d"].map(|name| add(name, Vec::new()));
    let (begun, begins) = channel();
    server.message(hung, Box::new(Told::Read(begun))).unwrap();
    begins.recv_timeout(LONG).unwrap();
    let remove = |id| {
        let server = server.clone();
        std::thread::spawn(move || server.remove(id))
    };
    let twice = [remove(hung), remove(hung)];
    while UnixStream::connect(path("hung")).is_ok() {
        std::thread::yield_now();
    }
    server.remove(others[0]).unwrap();
    assert!(!path("b").exists());
    let anew = add("b", Vec::new());
    assert_ne!((anew.reactor, anew.slot), (hung.reactor, hung.slot), "that is not free yet");
    let stopped = server.clone().stop_unless(|| true);
    assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Busy);
    for name in ["b", "c", "d"] {
        assert!(UnixStream::connect(path(name)).is_err(), "{name} is closed");
    }
    hand.write_all(&[0; 4096]).unwrap();
    for removed in twice {
        removed.join().unwrap().unwrap();
    }
    assert!(!path("hung").exists());
}
