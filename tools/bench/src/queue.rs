//! The driver's side of one split virtqueue, with a fixed place for each request.
//!
//! A request in *slot* s has its header, status and indirect table in the slot's own place; its
//! descriptors are 3s (header), 3s+1 (data) and 3s+2 (status), or descriptor s alone, which points
//! to its indirect table. What always holds: a slot's head is in the ring at most once, so a used
//! entry for a slot that is not in flight is a completion that was doubled.

use crate::Result;
use crate::memory::GuestMemory;
use crate::report::ViolationKind::{Doubled, Wrong};
use crate::report::violation;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::cell::Cell;
use std::os::fd::AsFd;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// In the slot's place: header at 0, then these.
const STATUS_OFFSET: usize = 32;
const TABLE_OFFSET: usize = 64;
const PLACE_BYTES: usize = 128;
const DESCRIPTOR_BYTES: usize = 16;
const DESCRIPTORS_PER_REQUEST: u16 = 3;

/// Queues of more entries are not offered by any VMM.
const ENTRIES_MAX: usize = 1024;

/// No status byte that the specification has: the back end must overwrite it.
const STATUS_UNSET: u8 = 0xee;

/// Virtio-blk request types, with the direction of their data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

impl Kind {
    fn code(self) -> u32 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Flush => 4,
            Self::Discard => 11,
            Self::WriteZeroes => 13,
        }
    }
}

/// How the driver learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// Sleeps on the call eventfd.
    Sleep,
    /// Looks at the used ring all the time and asks for no interrupts.
    Poll,
}

/// A completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completed {
    pub slot: u16,
    pub status: u8,
    /// Bytes that the back end says it wrote, the status byte included.
    pub written: u32,
}

/// What a queue is made for.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Requests in flight at most.
    pub depth: u16,
    /// Bytes of data per request at most.
    pub data_bytes: usize,
    /// One descriptor per request in the ring, which points to a table of the others.
    pub indirect: bool,
}

/// Where a queue's parts lie in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub descriptors: usize,
    pub available: usize,
    pub used: usize,
    places: usize,
    pub data: usize,
    pub end: usize,
    /// Entries of the rings.
    size: u16,
    shape: Shape,
}

impl Layout {
    /// A queue of that shape, from `start` on.
    pub fn new(start: usize, shape: Shape) -> Result<Self> {
        let depth = usize::from(shape.depth);
        let per_request = if shape.indirect { 1 } else { usize::from(DESCRIPTORS_PER_REQUEST) };
        let entries = (depth * per_request).next_power_of_two();
        if depth == 0 || entries > ENTRIES_MAX {
            let most = ENTRIES_MAX / per_request;
            return Err(format!("a depth of {depth}; possible are 1 to {most} per queue").into());
        }
        let descriptors = start.next_multiple_of(4096);
        let available = (descriptors + entries * DESCRIPTOR_BYTES).next_multiple_of(4096);
        let used = (available + 6 + entries * 2).next_multiple_of(4096);
        let places = (used + 6 + entries * 8).next_multiple_of(4096);
        let data = (places + depth * PLACE_BYTES).next_multiple_of(4096);
        let end = data + depth * shape.data_bytes;
        let size = entries as u16;
        Ok(Self { descriptors, available, used, places, data, end, size, shape })
    }
}

/// One queue as its driver sees it.
pub struct Queue {
    pub layout: Layout,
    pub size: u16,
    pub kick: EventFd,
    pub call: EventFd,
    /// Kicks sent and interrupts taken since the start.
    pub kicks: u64,
    pub interrupts: Cell<u64>,
    event_index: bool,
    waiting: Waiting,
    available: u16,
    /// The available index at the last kick decision.
    kicked: u16,
    used: u16,
    in_flight: Vec<bool>,
    free: Vec<u16>,
    /// The driver has asked for an interrupt, and until then it must not look at the ring.
    armed: Cell<bool>,
}

impl Queue {
    pub fn new(
        memory: &GuestMemory,
        layout: Layout,
        event_index: bool,
        waiting: Waiting,
    ) -> Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        memory.fill(layout.descriptors, layout.data - layout.descriptors, 0);
        let depth = layout.shape.depth;
        let queue = Self {
            layout,
            size: layout.size,
            kick: EventFd::from_flags(flags)?,
            call: EventFd::from_flags(flags)?,
            kicks: 0,
            interrupts: Cell::new(0),
            event_index,
            waiting,
            available: 0,
            kicked: 0,
            used: 0,
            in_flight: vec![false; usize::from(depth)],
            free: (0..depth).rev().collect(),
            armed: Cell::new(false),
        };
        queue.want_interrupts(memory, waiting == Waiting::Sleep);
        Ok(queue)
    }

    pub fn depth(&self) -> u16 {
        self.layout.shape.depth
    }

    /// The available index, which GET_VRING_BASE must answer once nothing is in flight.
    pub fn available_index(&self) -> u16 {
        self.available
    }

    /// The used index in memory: what a front end tells a new back end as its base.
    pub fn used_index(&self, memory: &GuestMemory) -> u16 {
        memory.load_u16(self.layout.used + 2)
    }

    pub fn in_flight(&self) -> usize {
        usize::from(self.depth()) - self.free.len()
    }

    /// A slot that is not in flight.
    pub fn take_slot(&mut self) -> Option<u16> {
        self.free.pop()
    }

    /// Gives back a slot that was not submitted.
    pub fn return_slot(&mut self, slot: u16) {
        self.free.push(slot);
    }

    /// Where the data of `slot` lies.
    pub fn data(&self, slot: u16) -> usize {
        self.layout.data + usize::from(slot) * self.layout.shape.data_bytes
    }

    fn place(&self, slot: u16) -> usize {
        self.layout.places + usize::from(slot) * PLACE_BYTES
    }

    /// Puts a request into the ring; the back end sees it after [`Queue::publish`]. `length` is in
    /// bytes of data.
    pub fn submit(
        &mut self,
        memory: &GuestMemory,
        slot: u16,
        kind: Kind,
        sector: u64,
        length: u32,
    ) {
        assert!(!std::mem::replace(&mut self.in_flight[usize::from(slot)], true));
        let place = self.place(slot);
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.code().to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        memory.write(place, &header);
        memory.write(place + STATUS_OFFSET, &[STATUS_UNSET]);

        let ring = self.layout.descriptors;
        let (table, first, head) = if self.layout.shape.indirect {
            let entry = ring + usize::from(slot) * DESCRIPTOR_BYTES;
            let bytes = u32::from(DESCRIPTORS_PER_REQUEST) * DESCRIPTOR_BYTES as u32;
            descriptor(memory, entry, (place + TABLE_OFFSET, bytes, INDIRECT, 0));
            (place + TABLE_OFFSET, 0, slot)
        } else {
            (ring, slot * DESCRIPTORS_PER_REQUEST, slot * DESCRIPTORS_PER_REQUEST)
        };
        let entry = |index: u16| table + usize::from(index) * DESCRIPTOR_BYTES;
        let data_flags = if kind == Kind::Read { NEXT | WRITE } else { NEXT };
        let after_header = if length == 0 { first + 2 } else { first + 1 };
        descriptor(memory, entry(first), (place, 16, NEXT, after_header));
        descriptor(memory, entry(first + 1), (self.data(slot), length, data_flags, first + 2));
        descriptor(memory, entry(first + 2), (place + STATUS_OFFSET, 1, WRITE, 0));

        let entry = usize::from(self.available & (self.size - 1));
        memory.store_u16(self.layout.available + 4 + entry * 2, head);
        self.available = self.available.wrapping_add(1);
    }

    /// Shows the back end what was submitted, and kicks it if it asked for that.
    pub fn publish(&mut self, memory: &GuestMemory) {
        memory.store_u16(self.layout.available + 2, self.available);
        fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            let event = memory.load_u16(self.layout.used + 4 + usize::from(self.size) * 8);
            let passed = self.available.wrapping_sub(event).wrapping_sub(1);
            passed < self.available.wrapping_sub(self.kicked)
        } else {
            memory.load_u16(self.layout.used) & 1 == 0
        };
        self.kicked = self.available;
        if wanted {
            self.kicks += 1;
            self.kick();
        }
    }

    /// Kicks whatever the back end asked for, as a front end does after a reconnect.
    pub fn kick(&self) {
        // A full eventfd has been signalled already.
        let _ = self.kick.write(1);
    }

    fn want_interrupts(&self, memory: &GuestMemory, wanted: bool) {
        let event = if wanted { self.used } else { self.used.wrapping_sub(1) };
        let flags = u16::from(!wanted);
        memory.store_u16(self.layout.available, if self.event_index { 0 } else { flags });
        memory.store_u16(self.layout.available + 4 + usize::from(self.size) * 2, event);
    }

    /// Appends what has completed. A used entry that names no request in flight is an error.
    pub fn completed(
        &mut self,
        memory: &GuestMemory,
        completed: &mut Vec<Completed>,
    ) -> Result<()> {
        let used = memory.load_u16(self.layout.used + 2);
        if used == self.used {
            return Ok(());
        }
        let count = usize::from(used.wrapping_sub(self.used));
        if count > self.in_flight() {
            let in_flight = self.in_flight();
            let text = format!("{count} completions for {in_flight} requests: doubled");
            return violation(Doubled, text);
        }
        while self.used != used {
            completed.push(self.complete_one(memory)?);
        }
        if self.waiting == Waiting::Poll {
            self.want_interrupts(memory, false);
        }
        Ok(())
    }

    fn complete_one(&mut self, memory: &GuestMemory) -> Result<Completed> {
        let entry = usize::from(self.used & (self.size - 1));
        let mut bytes = [0; 8];
        memory.read(self.layout.used + 4 + entry * 8, &mut bytes);
        let word = u64::from_le_bytes(bytes);
        let (head, written) = (word as u32, (word >> 32) as u32);
        let Some(slot) = self.slot_of(head) else {
            return violation(Wrong, format!("head {head} completed, which is no request's"));
        };
        if !std::mem::replace(&mut self.in_flight[usize::from(slot)], false) {
            let text = format!("head {head} completed but not in flight: doubled");
            return violation(Doubled, text);
        }
        let status = memory.load_u8(self.place(slot) + STATUS_OFFSET);
        if status == STATUS_UNSET {
            // The request is too young: this is a second completion of the one before it.
            let text = format!("head {head} completed without a status: doubled");
            return violation(Doubled, text);
        }
        self.free.push(slot);
        self.used = self.used.wrapping_add(1);
        Ok(Completed { slot, status, written })
    }

    fn slot_of(&self, head: u32) -> Option<u16> {
        let per_request =
            if self.layout.shape.indirect { 1 } else { u32::from(DESCRIPTORS_PER_REQUEST) };
        let slot = head / per_request;
        let valid = head.is_multiple_of(per_request) && slot < u32::from(self.depth());
        valid.then_some(slot as u16)
    }

    /// Whether something has completed; if not, the back end is asked to interrupt.
    pub fn arm(&self, memory: &GuestMemory) -> bool {
        if self.waiting == Waiting::Sleep {
            self.want_interrupts(memory, true);
            fence(Ordering::SeqCst);
        }
        let pending = self.is_pending(memory);
        self.armed.set(self.waiting == Waiting::Sleep && !pending);
        pending
    }

    /// Something has completed that was not taken yet, whether or not an interrupt told so.
    pub fn is_pending(&self, memory: &GuestMemory) -> bool {
        memory.load_u16(self.layout.used + 2) != self.used
    }

    /// An interrupt was asked for and has not come: a guest does not look at the ring now.
    pub fn is_asleep(&self) -> bool {
        self.armed.get()
    }

    fn take_interrupt(&self) {
        if self.call.read().is_ok() {
            self.interrupts.set(self.interrupts.get() + 1);
            self.armed.set(false);
        }
    }
}

fn descriptor(memory: &GuestMemory, place: usize, entry: (usize, u32, u16, u16)) {
    let (address, length, flags, next) = entry;
    let mut bytes = [0; DESCRIPTOR_BYTES];
    bytes[..8].copy_from_slice(&(address as u64).to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    memory.write(place, &bytes);
}

/// Waits until one of the queues has been interrupted; false at the time-out.
pub fn sleep(queues: &[Queue], timeout: Duration) -> Result<bool> {
    use nix::poll::{PollFd, PollFlags, ppoll};
    let mut fds: Vec<_> =
        queues.iter().map(|queue| PollFd::new(queue.call.as_fd(), PollFlags::POLLIN)).collect();
    let timeout = nix::sys::time::TimeSpec::from_duration(timeout);
    let ready = ppoll(&mut fds, Some(timeout), None)? > 0;
    for (queue, fd) in queues.iter().zip(&fds) {
        if fd.any() == Some(true) {
            queue.take_interrupt();
        }
    }
    Ok(ready)
}

#[cfg(test)]
#[path = "queue_test.rs"]
mod tests;
