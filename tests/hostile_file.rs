//! A file that keeps whoever closes it waiting, handed to the daemon by a front end.
//!
//! The only test of its file: it changes the mounts of the thread that runs it.

mod common;
mod drive;
mod vflashd;

use common::{Daemon, connect, operate, workload};
use drive::Drive;
use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::mpsc::channel;
use vflash::base::units::MIB;
use vflash::vhost::ExportEvent;
use vflash_bench::runner::Runner;
use vflashd::{SOON, left_out};
use vhost::VhostBackend;
use vmm_sys_util::eventfd::EventFd;

#[test]
fn a_file_that_nobody_can_close_in_time_holds_nobody_up() {
    let daemon = Daemon::start(1);
    let path = daemon.folder.path().join("slow");
    // Closed after the drive has let go of closers: this process would wait as well.
    let _held_call;
    let Some(drive) = Drive::mount(&path, 1 << 20) else {
        return left_out("fuse", "/dev/fuse and the right to mount");
    };
    let file = File::options().read(true).write(true).open(&path).unwrap();
    drive.hold_closers();
    let hostile = daemon.serve("hostile", 16 * MIB, false);
    let mut device = connect(&hostile.socket, 1, 8);
    // SAFETY: a descriptor of our own that nobody else holds.
    let call = unsafe { EventFd::from_raw_fd(file.into_raw_fd()) };
    // By another thread: a daemon that closes it where it takes messages never answers.
    let (sender, answer) = channel();
    std::thread::spawn(move || {
        let refused = device.frontend().unwrap().set_vring_call(0, &call).is_err();
        sender.send((refused, call, device)).unwrap();
    });
    let (refused, call, _device) = answer.recv_timeout(SOON).expect("it is answered");
    _held_call = call;
    assert!(refused);
    let mut events = std::iter::from_fn(|| hostile.events.recv_timeout(SOON).ok());
    let refused = events.find_map(|event| match event {
        ExportEvent::Refused { reason } => Some(reason),
        _ => None,
    });
    assert!(refused.is_some_and(|reason| reason.contains("FUSE")), "its owner is told");
    drive.wait_held();
    // Somebody waits by now, and it is nobody who is needed.
    let neighbour = daemon.serve("neighbour", 16 * MIB, false);
    let mut runner = Runner::new(connect(&neighbour.socket, 1, 16), workload(21));
    operate(&mut runner, 500);
    runner.read_back().unwrap();
    runner.device.stop().unwrap();
    daemon.server.stop().unwrap();
}
