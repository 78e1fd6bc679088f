//! A door: one virtual machine's way to an export, with its queues, its limits and its counters.
//!
//! An export has one door for each machine that shares its volume. What a machine does wrong, or
//! does not do, stays behind its own door.

use super::memory::{MemoryTable, Region};
use super::queue::Queue;
use crate::base::Result;
use crate::base::clock::Nanos;
use crate::base::limits::DOORS_MAX;
use crate::io::uring::Ring;
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
    pub queues: Queues,
    pub limiter: Limiter,
    pub metrics: Arc<VolumeMetrics>,
    /// No request is taken before: the limit is used up.
    pub throttled_until: Option<Nanos>,
    /// As the guest behind it last set it.
    pub write_cache: bool,
    /// Requests under way that the volume has.
    pub in_flight: u32,
    /// The memory of its front end, where that is to be pinned.
    memory: MemoryTable,
    /// The socket thread knows that its front end cut guest memory short.
    pub fault_reported: bool,
}

/// The queues of a device, of which mostly few run: what is done in each turn is done with those.
pub struct Queues {
    /// By number.
    places: Vec<Option<Queue>>,
    /// The numbers of those that run.
    running: Vec<u16>,
}

impl Queues {
    fn new(count: u16) -> Self {
        let places = (0..count).map(|_| None).collect();
        Self { places, running: Vec::with_capacity(usize::from(count)) }
    }

    /// The number of the one at `position` among those that run.
    pub fn number(&self, position: usize) -> Option<u16> {
        self.running.get(position).copied()
    }

    pub fn get_mut(&mut self, number: u16) -> Option<&mut Queue> {
        self.places.get_mut(usize::from(number))?.as_mut()
    }

    /// Of those that run.
    pub fn iter(&self) -> impl Iterator<Item = &Queue> {
        self.running.iter().filter_map(|number| self.places[usize::from(*number)].as_ref())
    }

    /// Calls `call` with each that runs.
    pub fn for_each(&mut self, mut call: impl FnMut(&mut Queue)) {
        for number in &self.running {
            self.places[usize::from(*number)].as_mut().into_iter().for_each(&mut call);
        }
    }

    /// `number` is one of the device's, which stands still.
    pub fn start(&mut self, number: u16, queue: Queue) {
        let before = self.places[usize::from(number)].replace(queue);
        assert!(before.is_none(), "a queue is stopped before it starts again");
        self.running.push(number);
    }

    pub fn remove(&mut self, number: u16) {
        if self.places.get_mut(usize::from(number)).and_then(Option::take).is_some() {
            self.running.retain(|running| *running != number);
        }
    }
}

impl Door {
    pub fn new(door: AddDoor, now: Nanos) -> Self {
        let AddDoor { number, name, device, limits, metrics } = door;
        assert!(usize::from(number) < DOORS_MAX, "control counts doors");
        Self {
            name,
            queues: Queues::new(device.queues),
            device,
            limiter: Limiter::new(limits, now),
            metrics,
            throttled_until: None,
            write_cache: true,
            in_flight: 0,
            memory: MemoryTable::default(),
            fault_reported: false,
        }
    }

    /// The memory of its front end from now on: what is not in it any more, the ring forgets. All
    /// queues stand still.
    pub fn set_memory(&mut self, memory: &MemoryTable, ring: &mut Ring) {
        let before = std::mem::replace(&mut self.memory, memory.clone());
        for region in before.regions().iter().filter(|region| !memory.has(region)) {
            region.set_registered(false);
            region.pinned().into_iter().for_each(|pinned| ring.forget(pinned));
        }
    }

    /// A region has been pinned, which may not be the front end's any more.
    pub fn learn(&self, region: &Arc<Region>, ring: &mut Ring) -> Result<()> {
        if let Some(pinned) = region.pinned().filter(|_| self.memory.has(region)) {
            ring.learn(pinned).map_err(|error| error.context(&self.name))?;
            region.set_registered(true);
        }
        Ok(())
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

    /// Eight sectors and one queue.
    pub(in crate::vhost) fn small_device() -> Device {
        Device {
            capacity_sectors: 8,
            block_bytes: 512,
            optimal_bytes: 4096,
            read_only: false,
            discard: true,
            serial: "s".into(),
            queues: 1,
        }
    }

    pub(in crate::vhost) fn add_door(number: u16, name: &str) -> AddDoor {
        let (limits, metrics) = (Limits::default(), Arc::default());
        AddDoor { number, name: name.into(), device: small_device(), limits, metrics }
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
