//! Memory that may not be pinned.
//!
//! The only test of its file: it takes a right and a limit from its process.

mod common;

use common::{Daemon, Served, connect, operate, workload};
use nix::sys::resource::{Resource, setrlimit};
use std::time::{Duration, Instant};
use vflash::base::units::MIB;
use vflash::vhost::ExportEvent;
use vflash_bench::runner::Runner;

/// Takes CAP_IPC_LOCK from this thread and those that it starts.
fn give_up_locking() {
    const VERSION: u32 = 0x2008_0522;
    const IPC_LOCK: u32 = 1 << 14;
    let header = [VERSION, 0];
    // Effective, permitted, inheritable; the first 32 and the others.
    let mut sets = [[0u32; 3]; 2];
    // SAFETY: the kernel reads two words and writes six.
    let got = unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()) };
    sets[0][0] &= !IPC_LOCK;
    // SAFETY: the kernel reads two words and six.
    let set = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
    assert_eq!((got, set), (0, 0));
}

/// Loads the disk until its owner is told why memory is not pinned.
fn operate_until_told(served: &Served, runner: &mut Runner) -> String {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        operate(runner, 100);
        if let Some(reason) = reasons(served).next() {
            return reason;
        }
        assert!(Instant::now() < deadline, "nobody was told");
    }
}

fn reasons(served: &Served) -> impl Iterator<Item = String> {
    served.events.try_iter().filter_map(|event| match event {
        ExportEvent::NotPinned { reason } => Some(reason),
        _ => None,
    })
}

#[test]
fn memory_that_may_not_be_pinned_is_used_as_ever_and_its_owner_is_told_once() {
    give_up_locking();
    // Enough for rings, and for no guest.
    setrlimit(Resource::RLIMIT_MEMLOCK, MIB, MIB).unwrap();
    let daemon = Daemon::start(1);
    let served = daemon.serve_pinning("disk", 16 * MIB);
    let mut runner = Runner::new(connect(&served.socket, 2, 32), workload(34));
    let reason = operate_until_told(&served, &mut runner);
    assert!(reason.contains("cannot pin") && reason.contains("LimitMEMLOCK"), "{reason}");
    // The same table again is tried again, before the next guest's.
    runner.device.replace_memory().unwrap();
    let other = daemon.serve_pinning("other", 16 * MIB);
    let mut neighbour = Runner::new(connect(&other.socket, 1, 16), workload(35));
    operate_until_told(&other, &mut neighbour);
    assert_eq!(reasons(&served).count(), 0, "its owner was told, once for each connection");
    operate(&mut runner, 2000);
    let status = daemon.server.status(served.id).unwrap();
    assert!(status.memory_bytes > 0 && status.pinned_bytes == 0, "{status:?}");
    for mut runner in [runner, neighbour] {
        runner.read_back().unwrap();
        runner.device.stop().unwrap();
        assert_eq!(runner.errors, 0);
    }
    daemon.server.stop().unwrap();
}
