//! A door: one virtual machine's way to an export, with its queues, its limits and its counters.
//!
//! An export has one door for each machine that shares its volume. What a machine does wrong, or
//! does not do, stays behind its own door.

use super::queue::Queue;
use crate::base::clock::Nanos;
use crate::base::limits::DOORS_MAX;
use crate::metrics::VolumeMetrics;
use crate::qos::{Limiter, Limits};
use crate::virtio::Device;
use std::sync::Arc;

/// Names a queue of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueId {
    /// The door's number.
    pub door: u16,
    /// Its number on the device behind that door.
    pub queue: u16,
}

/// What a reactor needs to open a door.
pub struct AddDoor {
    /// Below [`DOORS_MAX`]; not taken. It is part of the names of requests in a journal, so a
    /// machine keeps its number from daemon to daemon.
    pub number: u16,
    /// `vm/volume`, for messages.
    pub name: String,
    pub device: Device,
    pub limits: Limits,
    pub metrics: Arc<VolumeMetrics>,
}

/// See the head of the file.
pub struct Door {
    pub name: String,
    pub device: Device,
    pub queues: Vec<Option<Queue>>,
    pub limiter: Limiter,
    pub metrics: Arc<VolumeMetrics>,
    /// No request is taken before: the limit is used up.
    pub throttled_until: Option<Nanos>,
    /// As the guest behind it last set it.
    pub write_cache: bool,
    /// Requests under way that the volume has.
    pub in_flight: u32,
    /// The socket thread knows that its front end cut guest memory short.
    pub fault_reported: bool,
}

impl Door {
    pub fn new(door: AddDoor, now: Nanos) -> Self {
        let AddDoor { number, name, device, limits, metrics } = door;
        assert!(usize::from(number) < DOORS_MAX, "control counts doors");
        Self {
            name,
            queues: (0..device.queues).map(|_| None).collect(),
            device,
            limiter: Limiter::new(limits, now),
            metrics,
            throttled_until: None,
            write_cache: true,
            in_flight: 0,
            fault_reported: false,
        }
    }
}

/// Who may have how many of an export's requests under way: each door a share that nobody else
/// takes, half of all of them together; the rest belongs to who comes first.
#[derive(Default)]
pub struct Shares {
    each: u32,
    /// Requests that doors below their share may still begin.
    owed: u32,
}

impl Shares {
    /// Counts anew, for other doors; `most` requests in all.
    pub fn divide<'a>(&mut self, most: u32, doors: impl Iterator<Item = &'a Door> + Clone) {
        let count = doors.clone().count().max(1) as u32;
        self.each = most / 2 / count;
        self.owed = doors.map(|door| self.each.saturating_sub(door.in_flight)).sum();
    }

    /// Whether a door with `in_flight` requests may begin one more while `free` are left.
    pub fn allow(&self, in_flight: u32, free: usize) -> bool {
        match in_flight < self.each {
            true => free > 0,
            false => free > self.owed as usize,
        }
    }

    /// A door that had `in_flight` requests begins one more.
    pub fn begin(&mut self, in_flight: u32) {
        self.owed -= u32::from(in_flight < self.each).min(self.owed);
    }

    /// One of a door's requests has ended; `in_flight` are left.
    pub fn end(&mut self, in_flight: u32) {
        self.owed += u32::from(in_flight < self.each);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Of a device of eight sectors with one queue.
    pub(in crate::vhost) fn add_door(number: u16, name: &str) -> AddDoor {
        let device = Device {
            capacity_sectors: 8,
            block_bytes: 512,
            optimal_bytes: 4096,
            read_only: false,
            discard: true,
            serial: "s".into(),
            queues: 1,
        };
        let (limits, metrics) = (Limits::default(), Arc::default());
        AddDoor { number, name: name.into(), device, limits, metrics }
    }

    fn door(number: u16, in_flight: u32) -> Door {
        Door { in_flight, ..Door::new(add_door(number, "vm/disk"), Nanos::default()) }
    }

    /// Takes all that `doors[greedy]` may have.
    fn grab(shares: &mut Shares, doors: &mut [Door], greedy: usize, free: &mut usize) {
        while shares.allow(doors[greedy].in_flight, *free) {
            shares.begin(doors[greedy].in_flight);
            doors[greedy].in_flight += 1;
            *free -= 1;
        }
    }

    #[test]
    fn a_lone_door_has_all_requests() {
        let (mut shares, mut doors, mut free) = (Shares::default(), [door(0, 0)], 64);
        shares.divide(64, doors.iter());
        grab(&mut shares, &mut doors, 0, &mut free);
        assert_eq!((doors[0].in_flight, free), (64, 0));
    }

    #[test]
    fn no_door_takes_what_another_is_owed() {
        let (mut shares, mut free) = (Shares::default(), 64);
        let mut doors = [door(0, 0), door(1, 0), door(2, 0), door(3, 0)];
        shares.divide(64, doors.iter());
        grab(&mut shares, &mut doors, 2, &mut free);
        assert_eq!(doors[2].in_flight, 40, "its own 8 and the half that is anybody's");
        for other in [0, 1, 3] {
            grab(&mut shares, &mut doors, other, &mut free);
            assert_eq!(doors[other].in_flight, 8);
        }
        assert_eq!(free, 0);
        // What the greedy one gives back is anybody's; what another does is that one's.
        doors[2].in_flight -= 1;
        shares.end(doors[2].in_flight);
        doors[0].in_flight -= 1;
        shares.end(doors[0].in_flight);
        free += 2;
        assert!(shares.allow(doors[3].in_flight, free));
        shares.begin(doors[3].in_flight);
        free -= 1;
        assert!(!shares.allow(doors[3].in_flight + 1, free), "the last one is owed to another");
        assert!(shares.allow(doors[0].in_flight, free));
    }

    #[test]
    fn a_new_door_is_owed_its_share_of_what_comes_free() {
        let (mut shares, mut doors, mut free) = (Shares::default(), vec![door(0, 0)], 64);
        shares.divide(64, doors.iter());
        grab(&mut shares, &mut doors, 0, &mut free);
        doors.push(door(1, 0));
        shares.divide(64, doors.iter());
        for _ in 0..16 {
            doors[0].in_flight -= 1;
            shares.end(doors[0].in_flight);
            free += 1;
            assert!(!shares.allow(doors[0].in_flight, free));
            assert!(shares.allow(doors[1].in_flight, free));
        }
        grab(&mut shares, &mut doors, 1, &mut free);
        assert_eq!(doors[1].in_flight, 16);
    }
}
