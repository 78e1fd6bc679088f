//! What a front end and its guest rely on.

mod common;

use common::{Daemon, connect, export, operate, workload};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use vflash::base::units::MIB;
use vflash::io::disk::{Errno, Operation, OperationKind};
use vflash::io::volume::{DiskIndex, Io, Outcome, Request, RequestKind, Volume};
use vflash::metrics::OperationClass;
use vflash::vhost::{Export, ExportEvent, Server, ServerOptions};
use vflash_bench::device::{Device, DeviceOptions};
use vflash_bench::frontend::{DRIVER_FEATURES, Frontend};
use vflash_bench::memory::GuestMemory;
use vflash_bench::queue::{Kind, Layout, Queue, Shape, Waiting};
use vflash_bench::runner::Runner;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::eventfd::EventFd;

/// Sends one request on queue 0 and waits for its status.
fn ask(device: &mut Device, kind: Kind, sector: u64, length: u32) -> u8 {
    let slot = device.queues[0].take_slot().unwrap();
    device.queues[0].submit(&device.memory, slot, kind, sector, length);
    device.queues[0].publish(&device.memory);
    device.await_ended(1, Duration::from_secs(30)).unwrap()[0]
}

#[test]
fn every_kind_of_request_is_right_on_thick_and_thin_volumes() {
    let daemon = Daemon::start(2);
    for (name, thin, queues, depth) in [("thick", false, 1, 1), ("thin", true, 4, 64)] {
        let served = daemon.serve(name, 16 * MIB, thin);
        let mut runner = Runner::new(connect(&served.socket, queues, depth), workload(7));
        operate(&mut runner, 4000);
        runner.read_back().unwrap();
        runner.device.stop().unwrap();
        assert_eq!(runner.errors, 0);
        let seen = served.metrics.snapshot();
        for class in [OperationClass::Read, OperationClass::Write, OperationClass::Discard] {
            assert!(seen.class(class).operations() > 0, "{class:?} is counted");
        }
    }
    daemon.server.stop().unwrap();
}

#[test]
fn a_queue_goes_on_after_each_reconnect_and_reset() {
    let daemon = Daemon::start(1);
    let served = daemon.serve("disk", 16 * MIB, false);
    let mut runner = Runner::new(connect(&served.socket, 2, 32), workload(8));
    for _ in 0..20 {
        operate(&mut runner, 100);
        // Requests are in flight: the front end goes away without a word and comes back.
        runner.device.reconnect().unwrap();
    }
    runner.read_back().unwrap();
    let oracle = {
        runner.device.stop().unwrap();
        runner.into_oracle()
    };
    let mut runner = Runner::with_oracle(connect(&served.socket, 2, 8), workload(9), oracle);
    operate(&mut runner, 100);
    runner.read_back().unwrap();
    let (mut device, oracle) = runner.into_parts();
    let running = || daemon.server.status(served.id).unwrap().queues_running;
    assert_eq!(running(), 2);
    let messages = device.frontend().unwrap();
    messages.reset_device().unwrap();
    for ring in [0, 1] {
        messages.set_vring_enable(ring, true).unwrap();
        assert_eq!(running(), 0, "kick, size and addresses of a ring are forgotten");
        assert_eq!(messages.get_vring_base(ring).unwrap(), 0, "it begins anew");
    }
    // With larger rings, which an in-flight area of before would not cover.
    let device = device.set_up_anew(32).unwrap();
    let mut runner = Runner::with_oracle(device, workload(9), oracle);
    runner.read_back().unwrap();
    operate(&mut runner, 400);
    runner.read_back().unwrap();
    runner.device.stop().unwrap();
    daemon.server.stop().unwrap();
}

#[test]
fn what_a_guest_asks_for_while_nobody_serves_it_is_done_whatever_base_is_told() {
    let daemon = Daemon::start(1);
    for base_is_available in [false, true] {
        let served = daemon.serve(&format!("disk-{base_is_available}"), 16 * MIB, false);
        let mut device =
            Device::open(DeviceOptions { base_is_available, ..DeviceOptions::new(&served.socket) })
                .unwrap();
        for round in 0..3 {
            assert_eq!(ask(&mut device, Kind::Write, round, 512), 0);
            // A stop with nothing in flight; the guest goes on without knowing.
            device.pause().unwrap();
            let slots: Vec<_> = (0..5).map(|_| device.queues[0].take_slot().unwrap()).collect();
            for slot in slots {
                device.queues[0].submit(&device.memory, slot, Kind::Read, 0, 4096);
            }
            device.queues[0].publish(&device.memory);
            device.reconnect().unwrap();
            let ended = device.await_ended(5, Duration::from_secs(30)).unwrap();
            assert_eq!(ended, [0; 5], "round {round}");
        }
        device.stop().unwrap();
    }
    daemon.server.stop().unwrap();
}

#[test]
fn a_resize_reaches_the_front_end() {
    let daemon = Daemon::start(1);
    let served = daemon.serve("disk", 16 * MIB, false);
    let mut device = connect(&served.socket, 1, 8);
    let (near, mut far) = UnixStream::pair().unwrap();
    device.frontend().unwrap().set_backend_request_fd(&near.as_raw_fd()).unwrap();
    assert_eq!(ask(&mut device, Kind::Read, 16 * MIB / 512, 512), 1, "past the end: IOERR");

    let larger = 24 * MIB;
    daemon.keeper.resize(served.allocation, larger, Duration::from_secs(10)).unwrap();
    daemon.server.set_capacity(served.id, larger / 512).unwrap();
    let mut message = [0; 12];
    far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    far.read_exact(&mut message).unwrap();
    let words = message.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap()));
    assert_eq!(words.collect::<Vec<_>>(), [2, 1, 0], "BACKEND_CONFIG_CHANGE_MSG, no reply wanted");
    assert_eq!(device.read_capacity().unwrap(), larger / 512);
    assert_eq!(ask(&mut device, Kind::Write, larger / 512 - 1, 512), 0);
    daemon.server.stop().unwrap();
}

#[test]
fn every_page_that_a_request_writes_is_in_the_dirty_log() {
    const LOG_ALL: u64 = 1 << 26;
    let daemon = Daemon::start(1);
    let served = daemon.serve("disk", 16 * MIB, false);
    let mut device = connect(&served.socket, 1, 8);
    let bytes = (device.memory.length() / 4096).div_ceil(8) as u64;
    let log = tempfile::tempfile().unwrap();
    log.set_len(bytes).unwrap();
    let region = vhost::VhostUserDirtyLogRegion {
        mmap_size: bytes,
        mmap_offset: 0,
        mmap_handle: log.as_raw_fd(),
    };
    device.frontend().unwrap().set_log_base(0, Some(region)).unwrap();
    let dirty = || {
        let mut map = vec![0; bytes as usize];
        log.read_exact_at(&mut map, 0).unwrap();
        let pages = 0..map.len() * 8;
        pages.filter(|page| map[page / 8] & 1 << (page % 8) != 0).collect::<Vec<_>>()
    };
    assert_eq!(ask(&mut device, Kind::Read, 0, 8192), 0);
    assert_eq!(dirty().len(), 0, "not while it is not negotiated");

    device.set_features(LOG_ALL, 0).unwrap();
    assert_eq!(ask(&mut device, Kind::Write, 0, 8192), 0);
    let layout = device.queues[0].layout;
    let data: Vec<usize> = (0..8).map(|slot| device.queues[0].data(slot) / 4096).collect();
    let after_write = dirty();
    assert!(after_write.contains(&(layout.used / 4096)), "the used ring");
    assert!(after_write.iter().all(|page| !data.contains(page)), "a write reads guest memory");
    assert_eq!(ask(&mut device, Kind::Read, 0, 8192), 0);
    let read: Vec<usize> =
        dirty().into_iter().filter(|page| (data[0]..data[7] + 8).contains(page)).collect();
    assert_eq!(read.len(), 2, "the two pages of 8 KiB: {read:?}");

    device.set_features(0, LOG_ALL).unwrap();
    log.set_len(0).unwrap();
    log.set_len(bytes).unwrap();
    assert_eq!(ask(&mut device, Kind::Read, 0, 8192), 0);
    assert_eq!(dirty().len(), 0, "not after it was switched off");
    daemon.server.stop().unwrap();
}

#[test]
fn the_write_cache_is_the_guests_to_switch_and_is_remembered() {
    const WRITEBACK: u32 = 32;
    let daemon = Daemon::start(1);
    let served = daemon.serve("disk", 16 * MIB, false);
    let mut device = connect(&served.socket, 1, 8);
    let flags = VhostUserConfigFlags::WRITABLE;
    device.frontend().unwrap().set_config(WRITEBACK, flags, &[0]).unwrap();
    let switched = ExportEvent::WriteCache { enabled: false };
    let told = || served.events.try_recv().expect("it is told before the front end is answered");
    assert!(matches!(told(), ExportEvent::Attached { .. }));
    assert_eq!(told(), switched);
    let (_, byte) = device.frontend().unwrap().get_config(WRITEBACK, 1, flags, &[0]).unwrap();
    assert_eq!(byte, [0]);
    assert_eq!(ask(&mut device, Kind::Write, 0, 4096), 0);
    // The guest goes on with another front end process; nobody tells us again.
    drop(device);
    let mut device = connect(&served.socket, 1, 8);
    let (_, byte) = device.frontend().unwrap().get_config(WRITEBACK, 1, flags, &[0]).unwrap();
    assert_eq!(byte, [0], "still off after a reconnect");
    device.frontend().unwrap().reset_device().unwrap();
    let (_, byte) = device.frontend().unwrap().get_config(WRITEBACK, 1, flags, &[0]).unwrap();
    assert_eq!(byte, [1], "a reset turns it on");
    daemon.server.stop().unwrap();
}

/// Hands the ring an operation that the ring refuses to take, by its assertion.
struct Oversteps;

impl Volume for Oversteps {
    fn attach(&mut self, _requests_max: u32) {}

    fn submit(&mut self, _request: Request<'_>, io: &mut dyn Io) {
        let kind = OperationKind::Read;
        let read = Operation { kind, offset: 0, length: 0, segments: &[] };
        io.submit(DiskIndex(0), read, 0);
    }

    fn completed(&mut self, _token: u64, _result: Result<(), Errno>, _io: &mut dyn Io) {}
}

#[test]
fn a_panic_while_an_operation_is_submitted_leaves_nothing_to_wait_for() {
    let daemon = Daemon::start(1);
    let socket = daemon.socket("bad");
    let disks = vec![daemon.target.clone()];
    let bad = export(&socket, 1 << 16, Box::new(Oversteps));
    let id = daemon.server.add(Export { disks, ..bad }).unwrap();
    let mut device = connect(&socket, 1, 8);
    assert_eq!(ask(&mut device, Kind::Write, 0, 512), 1, "the request that panicked fails");
    device.stop().unwrap();
    daemon.server.remove(id).unwrap();
    daemon.server.stop().unwrap();
}

#[test]
fn an_interrupt_that_nobody_takes_holds_nobody_up() {
    let daemon = Daemon::start(1);
    let neighbour = daemon.serve("neighbour", 16 * MIB, false);
    let mut runner = Runner::new(connect(&neighbour.socket, 1, 16), workload(11));
    let hostile = daemon.serve("hostile", 16 * MIB, false);
    let mut device = connect(&hostile.socket, 1, 8);
    let full = EventFd::new(0).unwrap();
    full.write(u64::MAX - 1).unwrap();
    device.frontend().unwrap().set_vring_call(0, &full).unwrap();
    device.frontend().unwrap().set_vring_err(0, &full).unwrap();
    // Its flags are those of the daemon's descriptor, too: whoever writes to it now waits.
    // SAFETY: the descriptor is open for the call.
    let shared = unsafe { BorrowedFd::borrow_raw(full.as_raw_fd()) };
    fcntl(shared, FcntlArg::F_SETFL(OFlag::O_RDWR)).unwrap();
    let slot = device.queues[0].take_slot().unwrap();
    device.queues[0].submit(&device.memory, slot, Kind::Write, 0, 512);
    device.queues[0].publish(&device.memory);
    operate(&mut runner, 500);
    // A ring that is broken is told by the error descriptor.
    let available = device.queues[0].layout.available;
    device.memory.write(available + 2, &0x4000_u16.to_le_bytes());
    device.queues[0].kick();
    while hostile.metrics.snapshot().malformed == 0 {
        operate(&mut runner, 50);
    }
    runner.read_back().unwrap();
    drop(device);
    daemon.server.stop().unwrap();
}

#[test]
fn a_front_end_that_cuts_its_memory_short_is_cut_off_and_nobody_else_notices() {
    let daemon = Daemon::start(1);
    let neighbour = daemon.serve("neighbour", 16 * MIB, false);
    let mut runner = Runner::new(connect(&neighbour.socket, 1, 16), workload(12));
    operate(&mut runner, 100);
    let hostile = daemon.serve("hostile", 16 * MIB, false);
    let device = connect(&hostile.socket, 1, 8);
    nix::unistd::ftruncate(device.memory.file(), 0).unwrap();
    device.queues[0].kick();
    let mut events =
        std::iter::from_fn(|| hostile.events.recv_timeout(Duration::from_secs(30)).ok());
    let refused = events.find_map(|event| match event {
        ExportEvent::Refused { reason } => Some(reason),
        _ => None,
    });
    assert_eq!(refused.as_deref(), Some("the front end cut guest memory short"));
    operate(&mut runner, 500);
    runner.read_back().unwrap();
    drop(device);
    daemon.server.stop().unwrap();
}

#[test]
fn only_eventfds_are_kicked_and_called() {
    let daemon = Daemon::start(1);
    let served = daemon.serve("disk", 16 * MIB, false);
    let mut device = connect(&served.socket, 1, 8);
    let (pipe, _end) = std::io::pipe().unwrap();
    // SAFETY: a descriptor of our own that nobody else holds.
    let pipe = unsafe { EventFd::from_raw_fd(pipe.into_raw_fd()) };
    assert!(device.frontend().unwrap().set_vring_call(0, &pipe).is_err());
    daemon.server.stop().unwrap();
}

#[test]
fn a_front_end_that_comes_to_a_taken_socket_is_told_of_and_is_the_next() {
    let daemon = Daemon::start(1);
    let served = daemon.serve("disk", 16 * MIB, false);
    let wait = || served.events.recv_timeout(Duration::from_secs(30)).unwrap();
    let process = Some(std::process::id() as i32);
    let first = connect(&served.socket, 1, 8);
    assert_eq!(wait(), ExportEvent::Attached { peer_pid: process });
    let mut others = [(); 2].map(|()| UnixStream::connect(&served.socket).unwrap());
    assert_eq!(wait(), ExportEvent::Taken { peer_pid: process });
    drop(first);
    assert_eq!(wait(), ExportEvent::Detached, "told once");
    assert_eq!(wait(), ExportEvent::Attached { peer_pid: process });
    assert_eq!(wait(), ExportEvent::Taken { peer_pid: process }, "there is one more");
    // GET_FEATURES, and the answer to it.
    others[0].set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    others[0].write_all(&[1u32, 1, 0].map(u32::to_le_bytes).concat()).unwrap();
    others[0].read_exact(&mut [0; 20]).unwrap();
    daemon.server.stop().unwrap();
}

#[test]
fn rings_without_memory_are_told_of_once_and_start_when_it_comes() {
    let daemon = Daemon::start(1);
    let served = daemon.serve("disk", 16 * MIB, false);
    let wait = || served.events.recv_timeout(Duration::from_secs(30)).unwrap();
    let patience = Duration::from_secs(10);
    let mut frontend = Frontend::open(&served.socket, 1, DRIVER_FEATURES, patience).unwrap();
    assert!(matches!(wait(), ExportEvent::Attached { .. }));
    let shape = Shape { depth: 8, data_bytes: 4096, indirect: false };
    let layout = Layout::new(0, shape).unwrap();
    let memory = GuestMemory::new(layout.end, false).unwrap();
    let queue = Queue::new(&memory, layout, true, Waiting::Sleep).unwrap();
    // As firmware, loader and kernel do one after the other.
    for _ in 0..3 {
        frontend.start_queue(0, &queue, &memory, 0).unwrap();
        frontend.messages.get_vring_base(0).unwrap();
    }
    frontend.start_queue(0, &queue, &memory, 0).unwrap();
    assert_eq!(daemon.server.status(served.id).unwrap().queues_running, 0);
    frontend.set_memory(&memory, None).unwrap();
    assert_eq!(wait(), ExportEvent::MissesMemory { missing: true });
    assert_eq!(wait(), ExportEvent::MissesMemory { missing: false }, "told once");
    assert_eq!(daemon.server.status(served.id).unwrap().queues_running, 1);
    // Memory that is exchanged piece by piece is gone for a moment.
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: memory.length() as u64,
        userspace_addr: memory.user_address(),
        mmap_offset: 0,
        mmap_handle: memory.raw_file(),
    };
    frontend.messages.remove_mem_region(&region).unwrap();
    assert_eq!(daemon.server.status(served.id).unwrap().queues_running, 0);
    frontend.messages.add_mem_region(&region).unwrap();
    assert_eq!(daemon.server.status(served.id).unwrap().queues_running, 1);
    drop(frontend);
    assert_eq!(wait(), ExportEvent::Detached, "nothing was missed");
    daemon.server.stop().unwrap();
}

/// Works for writes, and panics when it is read.
struct Panics;

impl Volume for Panics {
    fn attach(&mut self, _requests_max: u32) {}

    fn submit(&mut self, request: Request<'_>, io: &mut dyn Io) {
        assert!(request.kind != RequestKind::Read, "planted: this volume cannot be read");
        io.complete(request.id, Outcome::Done);
    }

    fn completed(&mut self, _token: u64, _result: Result<(), Errno>, _io: &mut dyn Io) {}
}

#[test]
fn a_panic_fences_its_volume_and_no_other() {
    let daemon = Daemon::start(1);
    let neighbour = daemon.serve("neighbour", 16 * MIB, false);
    let mut runner = Runner::new(connect(&neighbour.socket, 1, 16), workload(10));
    let bad = daemon.socket("bad");
    let (sender, events) = std::sync::mpsc::channel();
    let told = Arc::new(move |event| _ = sender.send(event));
    let mut volume = export(&bad, 1 << 16, Box::new(Panics));
    volume.door.events = told;
    daemon.server.add(volume).unwrap();
    let mut device = connect(&bad, 1, 8);
    assert_eq!(ask(&mut device, Kind::Write, 0, 512), 0);
    operate(&mut runner, 500);
    assert_eq!(ask(&mut device, Kind::Read, 0, 512), 1, "the request that panicked fails");
    let next = || events.recv_timeout(Duration::from_secs(30)).unwrap();
    assert!(matches!(next(), ExportEvent::Attached { .. }));
    let ExportEvent::Fenced { reason } = next() else { panic!("the owner is told") };
    assert!(reason.contains("planted: this volume cannot be read"), "{reason}");
    assert!(reason.contains("until vflashd is restarted"), "{reason}");
    assert_eq!(ask(&mut device, Kind::Write, 0, 512), 1, "and so does every later one");
    operate(&mut runner, 500);
    runner.read_back().unwrap();
    device.stop().unwrap();
    daemon.server.stop().unwrap();
}

/// Notes the messages that reach it.
struct Listens(std::sync::mpsc::Sender<&'static str>);

impl Volume for Listens {
    fn attach(&mut self, _requests_max: u32) {}

    fn submit(&mut self, request: Request<'_>, io: &mut dyn Io) {
        io.complete(request.id, Outcome::Done);
    }

    fn completed(&mut self, _token: u64, _result: Result<(), Errno>, _io: &mut dyn Io) {}

    fn message(&mut self, message: Box<dyn std::any::Any + Send>, _io: &mut dyn Io) {
        self.0.send(*message.downcast().unwrap()).unwrap();
    }
}

#[test]
fn a_message_to_a_volume_that_is_gone_never_reaches_its_slots_next_owner() {
    let daemon = Daemon::start(1);
    let (sender, heard) = std::sync::mpsc::channel();
    let add = |name: &str| {
        let volume = Box::new(Listens(sender.clone()));
        daemon.server.add(export(&daemon.socket(name), 1 << 16, volume)).unwrap()
    };
    let former = add("former");
    daemon.server.remove(former).unwrap();
    let owner = add("owner");
    daemon.server.message(former, Box::new("where the former's extents are")).unwrap();
    daemon.server.message(owner, Box::new("where the owner's extents are")).unwrap();
    let first = heard.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(first, "where the owner's extents are");
    daemon.server.stop().unwrap();
}

#[test]
fn hundreds_of_devices_are_served_by_few_threads() {
    const DEVICES: usize = 300;
    let folder = tempfile::tempdir().unwrap();
    let limit = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, hard) = nix::sys::resource::getrlimit(limit).unwrap();
    nix::sys::resource::setrlimit(limit, hard, hard).unwrap();
    let server = Server::start(&ServerOptions { reactors: 2, cpus: vec![] }).unwrap();
    let mut ids = Vec::new();
    let mut devices = Vec::new();
    for index in 0..DEVICES {
        let socket = folder.path().join(format!("{index}.sock"));
        ids.push(server.add(export(&socket, 1 << 16, Box::new(Panics))).unwrap());
        devices.push(connect(&socket, 2, 4));
    }
    for device in &mut devices {
        assert_eq!(ask(device, Kind::Write, 0, 512), 0);
    }
    let threads = std::fs::read_dir("/proc/self/task").unwrap().count();
    assert!(threads < 40, "{threads} threads");
    for id in ids.drain(..DEVICES / 2) {
        server.remove(id).unwrap();
    }
    for device in &mut devices[DEVICES / 2..] {
        assert_eq!(ask(device, Kind::Write, 0, 512), 0);
    }
    assert!(!folder.path().join("0.sock").exists(), "a removed socket is gone");
    server.stop().unwrap();
}
