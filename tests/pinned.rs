//! Guest memory that is pinned: the guest notices nothing, whatever its VMM does with it.

mod common;

use common::{Daemon, Served, connect, operate, workload};
use std::time::{Duration, Instant};
use vflash::base::units::MIB;
use vflash_bench::memory::GuestMemory;
use vflash_bench::runner::Runner;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

/// Bytes of guest memory, and how many of them are pinned.
fn memory(daemon: &Daemon, served: &Served) -> (u64, u64) {
    let status = daemon.server.status(served.id).unwrap();
    (status.memory_bytes, status.pinned_bytes)
}

/// Loads the disk until all of the guest's memory, of which there are `bytes`, is pinned.
fn operate_until_pinned(daemon: &Daemon, served: &Served, runner: &mut Runner, bytes: u64) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while memory(daemon, served) != (bytes, bytes) {
        operate(runner, 10);
        let (bytes, pinned) = memory(daemon, served);
        assert!(Instant::now() < deadline, "{pinned} of {bytes} bytes are pinned");
    }
}

fn finish(mut runner: Runner, daemon: Daemon) {
    runner.read_back().unwrap();
    runner.device.stop().unwrap();
    assert_eq!(runner.errors, 0);
    drop(runner);
    daemon.server.stop().unwrap();
}

#[test]
fn memory_comes_and_goes_under_a_verified_load() {
    let daemon = Daemon::start(2);
    let served = daemon.serve_pinning("disk", 16 * MIB);
    let mut runner = Runner::new(connect(&served.socket, 2, 32), workload(31));
    let bytes = runner.device.memory.length() as u64;
    operate_until_pinned(&daemon, &served, &mut runner, bytes);
    // Another guest's memory in the same rings, which stays.
    let other = daemon.serve_pinning("other", 16 * MIB);
    let mut neighbour = Runner::new(connect(&other.socket, 1, 16), workload(32));
    for round in 0..20 {
        let more = GuestMemory::new((1 + round % 3) << 21, false).unwrap();
        let slot = VhostUserMemoryRegionInfo {
            guest_phys_addr: 1 << 32,
            memory_size: more.length() as u64,
            userspace_addr: more.user_address(),
            mmap_offset: 0,
            mmap_handle: more.raw_file(),
        };
        let frontend = runner.device.frontend().unwrap();
        frontend.add_mem_region(&slot).unwrap();
        operate(&mut neighbour, 20);
        if round % 2 == 0 {
            operate_until_pinned(&daemon, &served, &mut runner, bytes + slot.memory_size);
        }
        operate(&mut runner, 50);
        runner.device.frontend().unwrap().remove_mem_region(&slot).unwrap();
        assert_eq!(memory(&daemon, &served), (bytes, bytes), "what stays is pinned all the time");
        operate(&mut runner, 50);
    }
    neighbour.read_back().unwrap();
    drop(neighbour);
    finish(runner, daemon);
}

/// What a guest's memory was must not be read or written any more once the table has changed.
#[test]
fn a_guest_moves_to_other_memory_under_a_verified_load() {
    let daemon = Daemon::start(1);
    let served = daemon.serve_pinning("disk", 16 * MIB);
    let mut runner = Runner::new(connect(&served.socket, 2, 32), workload(33));
    let bytes = runner.device.memory.length() as u64;
    for round in 0..20 {
        if round % 4 != 0 {
            operate_until_pinned(&daemon, &served, &mut runner, bytes);
        }
        operate(&mut runner, 200);
        match round % 3 {
            0 => runner.device.replace_memory().unwrap(),
            1 => runner.device.reconnect().unwrap(),
            // The same once more: QEMU does so at each change.
            _ => {
                let memory = &runner.device.memory;
                let table = [VhostUserMemoryRegionInfo {
                    guest_phys_addr: 0,
                    memory_size: bytes,
                    userspace_addr: memory.user_address(),
                    mmap_offset: 0,
                    mmap_handle: memory.raw_file(),
                }];
                runner.device.frontend().unwrap().set_mem_table(&table).unwrap();
            }
        }
    }
    finish(runner, daemon);
}
