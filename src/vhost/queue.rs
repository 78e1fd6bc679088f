//! One virtqueue while it runs: what is popped, marked in flight, completed and published.
//!
//! What always holds: a head that was started is finished exactly once; the in-flight area knows it
//! from before its request starts until after the guest can see its end.

use super::bell::Bell;
use super::dirty::DirtyLog;
use super::inflight::{InflightQueue, Survivor};
use super::memory::MemoryTable;
use super::ring::{Broken, Ring, RingAddresses};
use crate::base::Result;
use crate::io::volume::Origin;
use crate::virtio::chain::{Chain, Malformed};
use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;

/// Everything a queue is started with.
pub struct QueueSetup {
    pub door: u16,
    pub index: u16,
    pub size: u16,
    pub addresses: RingAddresses,
    /// The first available entry to take. An in-flight area knows better: what is used and what it
    /// has in flight was taken, and nothing else, whatever a front end says (to cloud-hypervisor a
    /// base is the available index, also of what nobody has taken yet). One that nobody has kept so
    /// far has nothing in flight: a daemon that died before it came to that took nothing.
    pub base: u16,
    pub event_index: bool,
    pub memory: MemoryTable,
    pub inflight: Option<InflightQueue>,
    pub log: Option<DirtyLog>,
    /// Signalled by the guest when it made entries available; none: it must be polled.
    pub kick: Option<File>,
    /// Signals the guest; none: it polls.
    pub call: Option<File>,
    /// Signals the front end that the ring is broken.
    pub error: Option<File>,
}

/// A request that may be started: its head and where it came from.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    pub head: u16,
    pub origin: Origin,
}

pub struct Queue {
    door: u16,
    index: u16,
    ring: Ring,
    memory: MemoryTable,
    inflight: Option<InflightQueue>,
    log: Option<DirtyLog>,
    kick: Option<File>,
    call: Option<File>,
    error: Option<File>,
    /// Rings the two above.
    bell: Rc<Bell>,
    /// Requests of an earlier daemon, to be done before new ones.
    survivors: VecDeque<Survivor>,
    /// The number of the next request, for the in-flight area.
    counter: u64,
    started: u32,
    broken: bool,
    /// Takes no new request: it is about to be stopped.
    paused: bool,
    /// What only waits is not waited for.
    leaving: bool,
    kicks_enabled: bool,
    /// Reads the chain again at completion, for the dirty log.
    logged: Chain,
}

/// Where a queue's counter begins: no other request of this queue has such numbers, in whatever
/// in-flight area and under whatever daemon, so that a journal can tell a replayed request. The
/// clock goes on faster than requests come; a survivor from the future (the clock was set back)
/// is still passed.
fn counter_base(greatest_survivor: Option<u64>) -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.map_or(0, |now| now.as_nanos() as u64);
    now.max(greatest_survivor.map_or(0, |last| last.saturating_add(1)))
}

impl Queue {
    pub fn new(setup: QueueSetup, bell: Rc<Bell>) -> Result<Self> {
        let QueueSetup { door, index, size, addresses, base, memory, mut inflight, .. } = setup;
        let mut ring = Ring::new(&memory, addresses, size, base, setup.event_index)?;
        let mut survivors = VecDeque::new();
        if let Some(area) = &mut inflight {
            survivors = area.recover(ring.used_index()).into();
            ring.set_next_available(ring.used_index().wrapping_add(survivors.len() as u16));
        }
        let counter = counter_base(survivors.back().map(|last| last.counter));
        ring.suppress_kicks();
        let queue = Self {
            door,
            index,
            ring,
            memory,
            inflight,
            log: setup.log,
            kick: setup.kick,
            call: setup.call,
            error: setup.error,
            bell,
            survivors,
            counter,
            started: 0,
            broken: false,
            paused: false,
            leaving: false,
            kicks_enabled: false,
            logged: Chain::default(),
        };
        // A daemon that died after its last used entry may not have told the guest of it.
        queue.interrupt();
        Ok(queue)
    }

    pub fn index(&self) -> u16 {
        self.index
    }

    pub fn kick(&self) -> Option<BorrowedFd<'_>> {
        self.kick.as_ref().map(AsFd::as_fd)
    }

    pub fn set_call(&mut self, call: Option<File>) {
        self.call = call;
        // What was published while there was no descriptor must not be lost.
        self.interrupt();
    }

    pub fn set_error(&mut self, error: Option<File>) {
        self.error = error;
    }

    /// Takes no new request from now on; those of an earlier daemon are still done.
    pub fn pause(&mut self) {
        self.paused = true;
    }

    /// Takes no request from now on, and what only waits is left: to the in-flight area, whoever
    /// comes back with it.
    pub fn leave(&mut self) {
        self.paused = true;
        self.leaving = true;
    }

    pub fn is_leaving(&self) -> bool {
        self.leaving
    }

    /// No request is under way or owed: the queue can be stopped.
    pub fn is_quiet(&self) -> bool {
        self.started == 0 && (self.survivors.is_empty() || self.broken || self.leaving)
    }

    /// Requests that an earlier daemon left and that were not started yet.
    pub fn survivors(&self) -> usize {
        self.survivors.len()
    }

    /// The available entry to go on with after a restart.
    pub fn base(&self) -> u16 {
        self.ring.next_available()
    }

    /// A file that the front end shares was cut short.
    pub fn faulted(&self) -> bool {
        self.memory.faulted()
            || self.inflight.as_ref().is_some_and(InflightQueue::faulted)
            || self.log.as_ref().is_some_and(DirtyLog::faulted)
    }

    /// Nothing more is taken from this ring until the front end sets it up again.
    pub fn mark_broken(&mut self) {
        self.broken = true;
        if let Some(error) = &self.error {
            self.bell.ring(error.as_fd());
        }
    }

    /// Requests that can be started now.
    pub fn pending(&self) -> std::result::Result<usize, Broken> {
        match (self.broken || self.leaving, self.paused) {
            (true, _) => Ok(0),
            (_, true) => Ok(self.survivors.len()),
            _ => Ok(self.survivors.len() + usize::from(self.ring.pending()?)),
        }
    }

    /// The next request, which stays until [`Queue::start`].
    pub fn peek(&self) -> std::result::Result<Candidate, Broken> {
        let (head, counter, replayed) = match self.survivors.front() {
            Some(survivor) => (survivor.head, survivor.counter, true),
            None => (self.ring.peek()?, self.counter, false),
        };
        let origin = Origin { door: self.door, queue: self.index, counter, replayed };
        Ok(Candidate { head, origin })
    }

    /// Reads the chain of `head`.
    pub fn read(&self, head: u16, chain: &mut Chain) -> std::result::Result<(), Malformed> {
        chain.read(&self.memory, self.ring.descriptors(), head)
    }

    /// Takes the candidate: from now on it is in flight.
    pub fn start(&mut self, candidate: Candidate) {
        let Candidate { head, origin } = candidate;
        if let Some(area) = &mut self.inflight {
            area.start(head, origin.counter);
        }
        if origin.replayed {
            self.survivors.pop_front();
        } else {
            self.counter = self.counter.wrapping_add(1);
            self.ring.take();
        }
        self.started += 1;
    }

    /// Ends the request of `head`, of which `written` bytes are the guest's to read. The guest sees
    /// it after [`Queue::publish`].
    pub fn finish(&mut self, head: u16, written: u32) {
        assert!(self.started > 0, "a request is finished once");
        self.started -= 1;
        if self.log.is_some() {
            self.log_written(head);
        }
        if let Some(area) = &mut self.inflight {
            area.complete(head);
        }
        self.ring.push_used(head, written);
    }

    /// Forgets a request that was started: it is not answered, and stays marked in the in-flight
    /// area, so that it is done when a front end brings that area again.
    pub fn abandon(&mut self) {
        assert!(self.started > 0 && self.leaving, "a request that is left is left once");
        self.started -= 1;
    }

    /// Shows the guest what was finished, and interrupts it if it wants that.
    pub fn publish(&mut self) {
        if !self.ring.publish() {
            return;
        }
        if let Some(area) = &mut self.inflight {
            area.published(self.ring.used_index());
        }
        if let (Some(log), used) = (&self.log, self.ring.used_segment())
            && let Some(address) = self.memory.guest_address_of(used.address())
        {
            log.mark(address, used.length() as u64);
        }
        if self.ring.wants_interrupt() {
            self.interrupt();
        }
    }

    fn interrupt(&self) {
        if let Some(call) = &self.call {
            self.bell.ring(call.as_fd());
        }
    }

    /// Marks what a request wrote. The chain is read again: it is the guest's to keep while the
    /// request is in flight, and a guest that changes it spoils its own migration only.
    fn log_written(&mut self, head: u16) {
        let mut chain = std::mem::take(&mut self.logged);
        if self.read(head, &mut chain).is_ok()
            && let Some(log) = &self.log
        {
            for segment in chain.writable() {
                if let Some(address) = self.memory.guest_address_of(segment.address()) {
                    log.mark(address, segment.length() as u64);
                }
            }
        }
        self.logged = chain;
    }

    /// We look by ourselves: the guest need not kick.
    pub fn suppress_kicks(&mut self) {
        if std::mem::replace(&mut self.kicks_enabled, false) {
            self.ring.suppress_kicks();
        }
    }

    /// We are about to sleep: the guest must kick. True if requests came meanwhile.
    pub fn enable_kicks(&mut self) -> std::result::Result<bool, Broken> {
        if self.broken || self.paused {
            return Ok(!self.broken && !self.leaving && !self.survivors.is_empty());
        }
        self.kicks_enabled = true;
        Ok(self.ring.enable_kicks()? || !self.survivors.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_grow_over_areas_and_restarts() {
        let first = counter_base(None);
        assert!(first > 1_600_000_000_000_000_000, "nanoseconds of the clock");
        assert!(counter_base(Some(3)) >= first, "an older survivor changes nothing");
        let ahead = first + 3_600_000_000_000;
        assert_eq!(counter_base(Some(ahead)), ahead + 1, "the clock was set back");
        assert_eq!(counter_base(Some(u64::MAX)), u64::MAX, "a scribbled area is survived");
    }
}
