//! What a back end owes to a guest that slept when the one before it died.

use std::process::{Child, Command, Stdio};
use std::time::Duration;
use vflash_bench::device::{Device, DeviceOptions};
use vflash_bench::queue::{Kind, sleep};

/// A child that is killed when the test ends.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_completion_whose_interrupt_was_lost_in_a_crash_still_wakes_the_guest() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let socket = folder.path().join("s.sock");
    let server = Command::new(env!("CARGO_BIN_EXE_vflash-bench"))
        .args(["serve", "--size", "1MiB", "--socket"])
        .arg(&socket)
        .arg("--file")
        .arg(folder.path().join("disk"))
        .stdin(Stdio::null())
        .spawn();
    let _server = Server(server.unwrap());
    for event_index in [true, false] {
        let options = DeviceOptions {
            event_index,
            connect_timeout: Duration::from_secs(20),
            ..DeviceOptions::new(&socket)
        };
        let mut device = Device::open(options).unwrap();
        let slot = device.queues[0].take_slot().unwrap();
        device.queues[0].submit(&device.memory, slot, Kind::Read, 0, 4096);
        assert!(!device.queues[0].arm(&device.memory));
        device.queues[0].publish(&device.memory);
        while !device.queues[0].is_pending(&device.memory) {
            assert!(sleep(&device.queues, Duration::from_secs(20)).unwrap(), "it was served");
        }
        // Stopped, the back end sends no more interrupts; those that it sent go unseen.
        device.stop().unwrap();
        while device.queues[0].call.read().is_ok() {}

        // Had the back end died between the used entry and the interrupt, the guest would be here:
        // asleep, with a completion in the ring and nothing in flight that could wake it.
        device.reconnect().unwrap();
        let woken = sleep(&device.queues, Duration::from_secs(2)).unwrap();
        assert!(woken, "event index {event_index}: still asleep after 2 s");
        let mut completed = Vec::new();
        device.queues[0].completed(&device.memory, &mut completed).unwrap();
        assert_eq!(completed.iter().map(|one| one.status).collect::<Vec<_>>(), [0]);
        device.stop().unwrap();
    }
}
