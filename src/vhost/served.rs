//! One export on its reactor: a volume, its disks, and the doors through which it is fed.
//!
//! Everything of one volume is here and nothing of another, so a panic in it is caught at this
//! border: the volume is fenced, its requests fail, and nobody else notices.

use super::door::{AddDoor, Door, QueueId, Shares};
use super::memory::{MemoryTable, Region};
use super::queue::{Candidate, Queue};
use crate::base::Error;
use crate::base::clock::Nanos;
use crate::base::error::panic_text;
use crate::base::units::SECTOR_BYTES;
use crate::io::buffer::{Segment, scatter};
use crate::io::disk::{Completion, Disk, DiskTarget, Errno, Operation, Waker};
use crate::io::uring::{FileIndex, Ring};
use crate::io::volume::{DiskIndex, Io, Outcome, Request, RequestId, RequestKind, Volume};
use crate::metrics::OperationClass;
use crate::qos::Limits;
use crate::virtio::chain::Chain;
use crate::virtio::request::{Action, Request as Parsed, status_byte};
use std::any::Any;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Requests of one export under way at a time; more wait in their rings.
pub const REQUESTS_MAX: u32 = 1024;

/// Requests taken from one queue in one turn, so that no queue starves the others.
const BATCH_MAX: usize = 128;

/// Operations handed to the kernel together: the first alone, so that the drive begins with it
/// while the rest are still being read from the ring, then twice as many each time up to this.
const SUBMIT_MAX: usize = 8;

/// Where an operation goes.
#[derive(Clone, Copy)]
pub enum DiskPort {
    File(FileIndex),
    /// One of the volume's disks with threads of their own, by position among these.
    Threaded(u8),
    /// Completes at once, moving no data.
    Null,
    /// Fails at once, until another takes its place.
    Away,
}

/// A request between its start and its end.
struct Pending {
    queue: QueueId,
    head: u16,
    status: Segment,
    written: u32,
    class: OperationClass,
    bytes: u64,
    started: Nanos,
}

/// What a reactor lends to an export for a call.
pub struct Lent<'a> {
    pub ring: &'a mut Ring,
    /// Completions of operations that need no ring.
    pub ready: &'a mut Vec<(u16, Completion)>,
    pub now: Nanos,
    /// Put above each token, to find the way back.
    pub prefix: u64,
    pub slot: u16,
}

struct Context<'a, 'b> {
    lent: &'a mut Lent<'b>,
    disks: &'a [DiskPort],
    threaded: &'a mut [Box<dyn Disk + Send>],
    done: &'a mut Vec<(RequestId, Outcome)>,
    wake: &'a mut Option<Nanos>,
    operations: &'a mut u32,
}

impl Io for Context<'_, '_> {
    fn now(&self) -> Nanos {
        self.lent.now
    }

    fn submit(&mut self, disk: DiskIndex, operation: Operation<'_>, token: u64) {
        match self.disks[usize::from(disk.0)] {
            DiskPort::File(file) => {
                assert!(token >> TOKEN_BITS == 0, "a volume's token keeps to its bits");
                self.lent.ring.operate(file, &operation, self.lent.prefix | token);
            }
            DiskPort::Threaded(index) => {
                self.threaded[usize::from(index)].submit(operation, token);
            }
            DiskPort::Null => {
                self.lent.ready.push((self.lent.slot, Completion { token, result: Ok(()) }));
            }
            DiskPort::Away => {
                let result = Err(Errno::AWAY);
                self.lent.ready.push((self.lent.slot, Completion { token, result }));
            }
        }
        // Not before: an operation that a failed assertion kept back never completes.
        *self.operations += 1;
    }

    fn complete(&mut self, request: RequestId, outcome: Outcome) {
        self.done.push((request, outcome));
    }

    fn wake_at(&mut self, at: Nanos) {
        *self.wake = Some(at);
    }
}

/// Bits of a volume's tokens.
pub const TOKEN_BITS: u32 = crate::io::volume::TOKEN_BITS;

/// A volume's disks.
#[derive(Default)]
pub struct Disks {
    pub ports: Vec<DiskPort>,
    pub threaded: Vec<Box<dyn Disk + Send>>,
}

impl Disks {
    /// Opens targets for a reactor; `waker` has it poll those with threads of their own.
    pub fn open(targets: &[DiskTarget], ring: &mut Ring, waker: &Waker) -> Result<Self, Error> {
        let mut disks = Self::default();
        for target in targets {
            if let Err(error) = disks.add(target, ring, waker) {
                disks.close(ring);
                return Err(error);
            }
        }
        Ok(disks)
    }

    fn add(&mut self, target: &DiskTarget, ring: &mut Ring, waker: &Waker) -> Result<(), Error> {
        let port = match target {
            DiskTarget::File { file, .. } => DiskPort::File(ring.register(file.as_fd())?),
            DiskTarget::Threaded(disk) => {
                self.threaded.push(disk.open(waker.clone())?);
                DiskPort::Threaded(self.threaded.len() as u8 - 1)
            }
            DiskTarget::Null { .. } => DiskPort::Null,
            DiskTarget::Away { .. } => DiskPort::Away,
        };
        self.ports.push(port);
        Ok(())
    }

    /// Nothing is under way on them any more.
    pub fn close(&self, ring: &mut Ring) {
        for port in &self.ports {
            if let DiskPort::File(file) = port {
                ring.unregister(*file);
            }
        }
    }
}

pub struct Served {
    pub name: String,
    /// By number.
    doors: Vec<Option<Door>>,
    shares: Shares,
    /// The door that is looked at first: each turn another, so that none is always last.
    first: usize,
    volume: Box<dyn Volume>,
    disks: Disks,
    /// Taken from disks with threads of their own; empty between calls.
    polled: Vec<Completion>,
    pending: Vec<Option<Pending>>,
    free: Vec<u32>,
    done: Vec<(RequestId, Outcome)>,
    /// Operations submitted and not completed.
    operations: u32,
    /// When the volume wants [`Volume::timer`].
    wake: Option<Nanos>,
    /// Why the volume is no longer called.
    fenced: Option<String>,
    fence_told: bool,
    chain: Chain,
    parsed: Parsed,
}

impl Served {
    /// Serves nobody before a door is opened.
    pub fn new(name: String, mut volume: Box<dyn Volume>, disks: Disks) -> Self {
        volume.attach(REQUESTS_MAX);
        Self {
            name,
            doors: Vec::new(),
            shares: Shares::default(),
            first: 0,
            volume,
            disks,
            polled: Vec::new(),
            pending: (0..REQUESTS_MAX).map(|_| None).collect(),
            free: (0..REQUESTS_MAX).rev().collect(),
            done: Vec::with_capacity(REQUESTS_MAX as usize),
            operations: 0,
            wake: None,
            fenced: None,
            fence_told: false,
            chain: Chain::new(),
            parsed: Parsed::new(),
        }
    }

    pub fn open_door(&mut self, door: AddDoor, lent: &mut Lent<'_>) {
        let number = usize::from(door.number);
        if self.doors.len() <= number {
            self.doors.resize_with(number + 1, || None);
        }
        assert!(self.doors[number].is_none(), "{}: a door's number is its own", self.name);
        self.doors[number] = Some(Door::new(door, lent.now));
        self.doors_changed(lent);
    }

    /// The door's queues must have been stopped.
    pub fn close_door(&mut self, number: u16, lent: &mut Lent<'_>) {
        let door = self.doors.get_mut(usize::from(number)).and_then(Option::take);
        let running = door.iter().flat_map(|door| door.queues.iter()).count();
        assert_eq!(running, 0, "{}: queues are stopped before their door is closed", self.name);
        self.doors_changed(lent);
    }

    fn doors_changed(&mut self, lent: &mut Lent<'_>) {
        self.shares.divide(REQUESTS_MAX, self.doors.iter().flatten());
        self.tell_write_cache(lent);
    }

    /// The strictest guest counts: a log has one order for all of them.
    fn tell_write_cache(&mut self, lent: &mut Lent<'_>) {
        let enabled = self.doors.iter().flatten().all(|door| door.write_cache);
        self.call(lent, |volume, _| volume.set_write_cache(enabled));
    }

    pub fn door_mut(&mut self, number: u16) -> Option<&mut Door> {
        self.doors.get_mut(usize::from(number))?.as_mut()
    }

    pub fn queue_mut(&mut self, at: QueueId) -> Option<&mut Queue> {
        queue_of(&mut self.doors, at)
    }

    pub fn disks(&self) -> &Disks {
        &self.disks
    }

    /// These take the places of the disks that are away, in order.
    pub fn give(&mut self, given: Disks) {
        let threaded = self.disks.threaded.len() as u8;
        let away = self.disks.ports.iter_mut().filter(|port| matches!(port, DiskPort::Away));
        for (place, port) in away.zip(given.ports) {
            *place = match port {
                DiskPort::Threaded(index) => DiskPort::Threaded(threaded + index),
                port => port,
            };
        }
        self.disks.threaded.extend(given.threaded);
    }

    /// Operations under way below, whether or not for a request.
    pub fn operations(&self) -> u32 {
        self.operations
    }

    /// Requests under way.
    pub fn in_flight(&self) -> u32 {
        REQUESTS_MAX - self.free.len() as u32
    }

    /// Why the volume is fenced, once.
    pub fn fence_news(&mut self) -> Option<String> {
        if self.fence_told {
            return None;
        }
        self.fence_told = self.fenced.is_some();
        self.fenced.clone()
    }

    /// The next moment at which [`Served::timers`] has work.
    pub fn next_timer(&self) -> Option<Nanos> {
        let throttled = self.doors.iter().flatten().filter_map(|door| door.throttled_until);
        throttled.chain(self.wake).min()
    }

    /// Calls the volume; a panic in it fences it.
    fn call(&mut self, lent: &mut Lent<'_>, call: impl FnOnce(&mut dyn Volume, &mut dyn Io)) {
        let volume = self.volume.as_mut();
        let mut context = Context {
            lent,
            disks: &self.disks.ports,
            threaded: &mut self.disks.threaded,
            done: &mut self.done,
            wake: &mut self.wake,
            operations: &mut self.operations,
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| call(volume, &mut context))) {
            self.fence(panic_text(&*panic));
        }
    }

    fn fence(&mut self, why: &str) {
        if self.fenced.is_none() {
            let text = format!(
                "fenced after an internal error ({why}): its requests fail until vflashd is \
                 restarted; other volumes go on"
            );
            log::error!("{}: {text}", self.name);
            self.fenced = Some(text);
            self.wake = None;
        }
    }

    /// Takes what the guests have queued; returns the requests taken.
    pub fn serve(&mut self, lent: &mut Lent<'_>) -> usize {
        let mut taken = 0;
        let count = self.doors.len();
        for at in 0..count {
            taken += self.serve_door((self.first + at) % count, lent);
        }
        self.first = (self.first + 1) % count.max(1);
        if taken > 0 && self.fenced.is_none() {
            self.call(lent, |volume, io| volume.gathered(io));
        }
        taken
    }

    fn serve_door(&mut self, number: usize, lent: &mut Lent<'_>) -> usize {
        let Some(door) = &mut self.doors[number] else { return 0 };
        if door.throttled_until.is_some_and(|until| until > lent.now) {
            return 0;
        }
        door.throttled_until = None;
        let (mut taken, mut position) = (0, 0);
        while let Some(at) = self.running(number as u16, position) {
            taken += self.serve_queue(at, lent);
            position += 1;
        }
        taken
    }

    /// The queue at `position` among those of a door that run.
    fn running(&self, door: u16, position: usize) -> Option<QueueId> {
        let queue = self.doors.get(usize::from(door))?.as_ref()?.queues.number(position)?;
        Some(QueueId { door, queue })
    }

    fn serve_queue(&mut self, at: QueueId, lent: &mut Lent<'_>) -> usize {
        let Some(queue) = self.queue_mut(at) else { return 0 };
        queue.suppress_kicks();
        let pending = match queue.pending() {
            Ok(0) => return 0,
            Ok(pending) => pending.min(BATCH_MAX),
            Err(_) => {
                self.broken(at, "its available index is impossible");
                return 0;
            }
        };
        let (mut taken, mut together) = (0, 1);
        while taken < pending && self.has_room(at.door) {
            if !self.serve_one(at, lent) {
                break;
            }
            taken += 1;
            if lent.ring.queued() >= together {
                lent.ring.submit();
                together = (2 * together).min(SUBMIT_MAX);
            }
        }
        taken
    }

    /// Whether one more request may come through a door.
    fn has_room(&self, door: u16) -> bool {
        let door = self.doors.get(usize::from(door)).and_then(Option::as_ref);
        door.is_some_and(|door| self.shares.allow(door.in_flight, self.free.len()))
    }

    fn broken(&mut self, at: QueueId, why: &str) {
        let Some(door) = self.door_mut(at.door) else { return };
        if let Some(queue) = door.queues.get_mut(at.queue) {
            log::warn!("{}: queue {} is stopped: {why}", door.name, at.queue);
            queue.mark_broken();
            door.metrics.malformed();
        }
    }

    /// Takes one request; false if none can be taken now.
    fn serve_one(&mut self, at: QueueId, lent: &mut Lent<'_>) -> bool {
        let Some(Some(door)) = self.doors.get_mut(usize::from(at.door)) else { return false };
        let Some(queue) = door.queues.get_mut(at.queue) else { return false };
        let Ok(candidate) = queue.peek() else {
            self.broken(at, "an available entry names no descriptor");
            return false;
        };
        let action = match queue.read(candidate.head, &mut self.chain) {
            Ok(()) => self.parsed.parse(&self.chain, &door.device),
            Err(malformed) => {
                log::debug!("{}: queue {}: {malformed:?}", door.name, at.queue);
                None
            }
        };
        match action {
            None => {
                // Nobody to tell: the head goes back with nothing written.
                door.metrics.malformed();
                queue.start(candidate);
                queue.finish(candidate.head, 0);
            }
            Some(Action::GetId) => {
                queue.start(candidate);
                let written = scatter(&door.device.id(), &self.parsed.data) as u32;
                self.answer(at, candidate.head, Outcome::Done, written);
            }
            Some(Action::Refuse(outcome)) => {
                door.metrics.malformed();
                queue.start(candidate);
                self.answer(at, candidate.head, outcome, 0);
            }
            Some(Action::Volume(_)) if self.fenced.is_some() => {
                queue.start(candidate);
                self.answer(at, candidate.head, Outcome::Failed, 0);
            }
            Some(Action::Volume(kind)) => return self.submit(at, candidate, kind, lent),
        }
        true
    }

    /// Ends a request that the volume never saw. `data` bytes were written before the status.
    fn answer(&mut self, at: QueueId, head: u16, outcome: Outcome, data: u32) {
        let (Some(queue), Some(status)) = (queue_of(&mut self.doors, at), self.parsed.status)
        else {
            return;
        };
        status.write([status_byte(outcome)]);
        queue.finish(head, data + 1);
    }

    fn submit(
        &mut self,
        at: QueueId,
        candidate: Candidate,
        kind: RequestKind,
        lent: &mut Lent<'_>,
    ) -> bool {
        let class = class_of(kind);
        let bytes = match kind {
            RequestKind::Read | RequestKind::Write => self.parsed.bytes,
            _ => self.parsed.ranges.iter().map(|range| range.count * SECTOR_BYTES).sum(),
        };
        let Some(Some(door)) = self.doors.get_mut(usize::from(at.door)) else { return false };
        if kind != RequestKind::Flush
            && let Err(until) = door.limiter.admit(cost(kind, bytes), lent.now)
        {
            door.throttled_until = Some(until);
            door.metrics.throttled();
            return false;
        }
        let (Some(queue), Some(status)) = (door.queues.get_mut(at.queue), self.parsed.status)
        else {
            return false;
        };
        let id = self.free.pop().expect("the caller looked");
        self.shares.begin(door.in_flight);
        door.in_flight += 1;
        queue.start(candidate);
        let written = 1 + if kind == RequestKind::Read { bytes as u32 } else { 0 };
        self.pending[id as usize] = Some(Pending {
            queue: at,
            head: candidate.head,
            status,
            written,
            class,
            bytes,
            started: lent.now,
        });
        let parsed = std::mem::take(&mut self.parsed);
        let request = Request {
            id: RequestId(id),
            kind,
            ranges: &parsed.ranges,
            segments: &parsed.data,
            origin: candidate.origin,
        };
        self.call(lent, |volume, io| volume.submit(request, io));
        self.parsed = parsed;
        self.settle(lent);
        true
    }

    /// An operation of this export has completed.
    pub fn completed(&mut self, token: u64, result: Result<(), Errno>, lent: &mut Lent<'_>) {
        assert!(self.operations > 0, "an operation completes once");
        self.operations -= 1;
        if self.fenced.is_none() {
            self.call(lent, |volume, io| volume.completed(token, result, io));
        }
        self.settle(lent);
    }

    /// Takes what disks with threads of their own have completed.
    pub fn poll(&mut self, lent: &mut Lent<'_>) {
        let mut polled = std::mem::take(&mut self.polled);
        for disk in &mut self.disks.threaded {
            disk.poll(&mut polled, false);
        }
        for Completion { token, result } in polled.drain(..) {
            self.completed(token, result, lent);
        }
        self.polled = polled;
    }

    /// Runs the timers that are due.
    pub fn timers(&mut self, lent: &mut Lent<'_>) {
        if self.wake.is_some_and(|at| at <= lent.now) && self.fenced.is_none() {
            self.wake = None;
            self.call(lent, |volume, io| volume.timer(io));
            self.settle(lent);
        }
    }

    pub fn message(&mut self, message: Box<dyn Any + Send>, lent: &mut Lent<'_>) {
        if self.fenced.is_none() {
            self.call(lent, |volume, io| volume.message(message, io));
            self.settle(lent);
        }
    }

    pub fn set_write_cache(&mut self, door: u16, enabled: bool, lent: &mut Lent<'_>) {
        if let Some(door) = self.door_mut(door) {
            door.write_cache = enabled;
            self.tell_write_cache(lent);
        }
    }

    /// See [`Door::set_memory`].
    pub fn set_memory(&mut self, door: u16, memory: &MemoryTable, lent: &mut Lent<'_>) {
        if let Some(door) = self.door_mut(door) {
            door.set_memory(memory, lent.ring);
        }
    }

    /// See [`Door::learn`].
    pub fn learn(
        &mut self,
        door: u16,
        region: &Arc<Region>,
        lent: &mut Lent<'_>,
    ) -> crate::base::Result<()> {
        self.door_mut(door).map_or(Ok(()), |door| door.learn(region, lent.ring))
    }

    pub fn set_limits(&mut self, door: u16, limits: Limits, now: Nanos) {
        if let Some(door) = self.door_mut(door) {
            door.limiter.set(limits, now);
            door.throttled_until = None;
        }
    }

    /// Every guest sees the volume's new size.
    pub fn set_capacity(&mut self, sectors: u64) {
        let doors = self.doors.iter_mut().flatten();
        doors.for_each(|door| door.device.capacity_sectors = sectors);
    }

    /// Forgets the requests of queues that leave what only waits.
    pub fn let_go(&mut self, lent: &mut Lent<'_>) {
        for id in 0..REQUESTS_MAX {
            let Some(pending) = &self.pending[id as usize] else { continue };
            let at = pending.queue;
            let leaving = self.queue_mut(at).is_some_and(|queue| queue.is_leaving());
            if self.fenced.is_some() || !leaving {
                continue;
            }
            let mut forgotten = false;
            self.call(lent, |volume, io| forgotten = volume.let_go(RequestId(id), io));
            if let (true, Some(door)) = (forgotten, &mut self.doors[usize::from(at.door)])
                && let Some(queue) = door.queues.get_mut(at.queue)
            {
                queue.abandon();
                door.in_flight -= 1;
                self.shares.end(door.in_flight);
                self.pending[id as usize] = None;
                self.free.push(id);
            }
        }
        self.settle(lent);
    }

    /// Ends the requests that the volume has completed; all of them once a fenced volume has no
    /// operation left that could still touch guest memory.
    fn settle(&mut self, lent: &Lent<'_>) {
        while let Some((id, outcome)) = self.done.pop() {
            self.end(id, outcome, lent.now);
        }
        if self.fenced.is_some() && self.operations == 0 {
            for id in 0..REQUESTS_MAX {
                if self.pending[id as usize].is_some() {
                    self.end(RequestId(id), Outcome::Failed, lent.now);
                }
            }
        }
    }

    fn end(&mut self, id: RequestId, outcome: Outcome, now: Nanos) {
        let Some(pending) = self.pending.get_mut(id.0 as usize).and_then(Option::take) else {
            return self.fence(&format!("request {} was ended twice", id.0));
        };
        self.free.push(id.0);
        pending.status.write([status_byte(outcome)]);
        let ok = outcome == Outcome::Done;
        let door = self.doors[usize::from(pending.queue.door)].as_mut();
        let door = door.expect("a door outlives its requests");
        door.in_flight -= 1;
        self.shares.end(door.in_flight);
        door.metrics.completed(pending.class, pending.bytes, now - pending.started, ok);
        let queue = door.queues.get_mut(pending.queue.queue);
        queue.expect("a queue outlives its requests").finish(pending.head, pending.written);
    }

    /// Shows guests what has ended.
    pub fn publish(&mut self) {
        for door in self.doors.iter_mut().flatten() {
            door.queues.for_each(Queue::publish);
            door.metrics.set_in_flight(u64::from(door.in_flight));
        }
    }

    /// Before sleeping: guests must kick. True if requests are waiting already.
    pub fn enable_kicks(&mut self) -> bool {
        let mut any = false;
        for number in 0..self.doors.len() as u16 {
            let (mut waiting, mut position) = (false, 0);
            while let Some(at) = self.running(number, position) {
                position += 1;
                match self.queue_mut(at).map(Queue::enable_kicks) {
                    None | Some(Ok(false)) => {}
                    Some(Ok(true)) => waiting = true,
                    Some(Err(_)) => self.broken(at, "its available index is impossible"),
                }
            }
            let throttled =
                self.door_mut(number).is_some_and(|door| door.throttled_until.is_some());
            any |= waiting && !throttled && self.has_room(number);
        }
        any
    }

    /// Doors whose front end cut guest memory short, each told once for each time that its queues
    /// are set up.
    pub fn faults(&mut self) -> impl Iterator<Item = u16> + '_ {
        (0u16..).zip(&mut self.doors).filter_map(|(number, door)| {
            let door = door.as_mut().filter(|door| !door.fault_reported)?;
            door.fault_reported = door.queues.iter().any(Queue::faulted);
            door.fault_reported.then_some(number)
        })
    }
}

fn queue_of(doors: &mut [Option<Door>], at: QueueId) -> Option<&mut Queue> {
    let door = doors.get_mut(usize::from(at.door))?.as_mut()?;
    door.queues.get_mut(at.queue)
}

/// Bytes that a request takes of its volume's bandwidth, as the kernel's own limits (blk-throttle)
/// count them: zeros in full, since a drive may have to write them; of a discard a sector, since it
/// carries no data, and else a file system of which much is discarded would be cut off for minutes.
fn cost(kind: RequestKind, bytes: u64) -> u64 {
    match kind {
        RequestKind::Discard => SECTOR_BYTES,
        _ => bytes,
    }
}

fn class_of(kind: RequestKind) -> OperationClass {
    match kind {
        RequestKind::Read => OperationClass::Read,
        RequestKind::Write => OperationClass::Write,
        RequestKind::Flush => OperationClass::Flush,
        RequestKind::Discard => OperationClass::Discard,
        RequestKind::WriteZeroes { .. } => OperationClass::WriteZeroes,
    }
}
