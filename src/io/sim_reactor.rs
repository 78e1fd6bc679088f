//! A reactor for tests: drives one [`Volume`] over its [`Disk`]s, in the caller's thread.
//!
//! Time stands still unless the test moves it ([`SimReactor::advance`]), or nothing but a timer is
//! left to wait for: then it jumps there.

use super::buffer::{PinnedBuffer, Segment};
use super::disk::{Completion, Disk, Operation};
use super::volume::{
    DiskIndex, Io, Origin, Outcome, Request, RequestId, RequestKind, SectorRange, TOKEN_BITS,
    Volume,
};
use crate::base::clock::Nanos;
use crate::base::units::SECTOR_BYTES;
use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// A message that no thread sends within this time will not come: the test has hung.
const MESSAGE_WAIT: Duration = Duration::from_secs(30);

/// See the module.
pub struct SimReactor<V> {
    pub volume: V,
    io: SimIo,
    inbox: Receiver<Box<dyn Any + Send>>,
    free: Vec<u32>,
    /// Requests that [`Self::submit`] was asked for.
    requests: u64,
    /// Requests were submitted since the volume was told that all are.
    submitted: bool,
}

struct SimIo {
    disks: Vec<SimPort>,
    ended: BTreeMap<u32, Outcome>,
    now: Nanos,
    wake: Option<Nanos>,
}

struct SimPort {
    disk: Box<dyn Disk + Send>,
    under_way: usize,
}

impl Io for SimIo {
    fn now(&self) -> Nanos {
        self.now
    }

    fn submit(&mut self, disk: DiskIndex, operation: Operation<'_>, token: u64) {
        assert!(token >> TOKEN_BITS == 0, "a volume's token keeps to its bits");
        let port = self.disks.get_mut(usize::from(disk.0)).expect("a disk of this volume");
        port.under_way += 1;
        port.disk.submit(operation, token);
    }

    fn complete(&mut self, request: RequestId, outcome: Outcome) {
        let before = self.ended.insert(request.0, outcome);
        assert_eq!(before, None, "request {} is completed once", request.0);
    }

    fn wake_at(&mut self, at: Nanos) {
        self.wake = Some(at);
    }
}

/// Messages for a volume from other threads: what a server's `message` would carry.
pub type Inbox = (Arc<dyn Fn(Box<dyn Any + Send>) + Send + Sync>, Receiver<Box<dyn Any + Send>>);

/// The way into a reactor that is yet to be made.
pub fn inbox() -> Inbox {
    let (sender, receiver): (Sender<Box<dyn Any + Send>>, _) = channel();
    // A test that has let its reactor go misses nothing.
    (Arc::new(move |message| _ = sender.send(message)), receiver)
}

impl<V: Volume> SimReactor<V> {
    /// `disks` by [`DiskIndex`].
    pub fn new(
        mut volume: V,
        disks: Vec<Box<dyn Disk + Send>>,
        inbox: Receiver<Box<dyn Any + Send>>,
        requests_max: u32,
    ) -> Self {
        volume.attach(requests_max);
        let disks = disks.into_iter().map(|disk| SimPort { disk, under_way: 0 }).collect();
        let io = SimIo { disks, ended: BTreeMap::new(), now: Nanos(0), wake: None };
        Self {
            volume,
            io,
            inbox,
            free: (0..requests_max).rev().collect(),
            requests: 0,
            submitted: false,
        }
    }

    pub fn now(&self) -> Nanos {
        self.io.now
    }

    /// Time passes; the volume's timer is called if its time has come.
    pub fn advance(&mut self, by: Duration) {
        self.io.now = self.io.now + by;
        self.timer();
    }

    /// No request comes for `by`: time passes, and all that comes due meanwhile is done.
    pub fn rest(&mut self, by: Duration) {
        let until = self.io.now + by;
        loop {
            self.turn(false);
            if self.operations() > 0 {
                continue;
            }
            match self.io.wake.filter(|at| *at < until) {
                Some(at) => self.io.now = self.io.now.max(at),
                None => break,
            }
        }
        self.io.now = self.io.now.max(until);
        self.timer();
    }

    fn timer(&mut self) -> bool {
        let due = self.io.wake.is_some_and(|at| at <= self.io.now);
        if due {
            self.io.wake = None;
            self.volume.timer(&mut self.io);
        }
        due
    }

    /// The front end of a request has gone: true if the volume forgets it.
    pub fn let_go(&mut self, request: RequestId) -> bool {
        let forgotten = self.volume.let_go(request, &mut self.io);
        if forgotten {
            self.free.push(request.0);
        }
        forgotten
    }

    /// Operations under way below, on all disks.
    pub fn operations(&self) -> usize {
        self.io.disks.iter().map(|port| port.under_way).sum()
    }

    /// Submits a request of one of two machines, in turns; `None` if as many as may be are under
    /// way.
    pub fn submit(
        &mut self,
        kind: RequestKind,
        ranges: &[SectorRange],
        segments: &[Segment],
    ) -> Option<RequestId> {
        self.requests += 1;
        let (door, counter) = ((self.requests % 2) as u16, self.requests / 2);
        let origin = Origin { door, queue: 0, counter, replayed: false };
        self.submit_from(origin, kind, ranges, segments)
    }

    /// As [`SimReactor::submit`], from a named place in a queue.
    pub fn submit_from(
        &mut self,
        origin: Origin,
        kind: RequestKind,
        ranges: &[SectorRange],
        segments: &[Segment],
    ) -> Option<RequestId> {
        let id = RequestId(self.free.pop()?);
        self.volume.submit(Request { id, kind, ranges, segments, origin }, &mut self.io);
        self.submitted = true;
        Some(id)
    }

    /// One turn: what the disks have completed, what others have sent, and the timer if its time
    /// has come. With `wait`, blocks until there is something, and time jumps if nothing but the
    /// timer is left.
    pub fn turn(&mut self, wait: bool) {
        if std::mem::take(&mut self.submitted) {
            self.volume.gathered(&mut self.io);
        }
        let mut completions = Vec::new();
        let mut moved = false;
        let busy = self.io.disks.iter().filter(|port| port.under_way > 0).count();
        for index in 0..self.io.disks.len() {
            let port = &mut self.io.disks[index];
            port.disk.poll(&mut completions, wait && busy == 1 && port.under_way > 0);
            port.under_way -= completions.len();
            for Completion { token, result } in completions.drain(..) {
                moved = true;
                self.volume.completed(token, result, &mut self.io);
            }
        }
        while let Ok(message) = self.inbox.try_recv() {
            moved = true;
            self.volume.message(message, &mut self.io);
        }
        moved |= self.timer();
        if !wait || moved || self.operations() > 0 || !self.io.ended.is_empty() {
            return;
        }
        if let Some(at) = self.io.wake {
            self.io.now = self.io.now.max(at);
            self.timer();
        } else {
            let message = self.inbox.recv_timeout(MESSAGE_WAIT).expect("something moves");
            self.volume.message(message, &mut self.io);
        }
    }

    /// Requests that have ended since the last call.
    pub fn ended(&mut self) -> Vec<(RequestId, Outcome)> {
        let ended = std::mem::take(&mut self.io.ended);
        self.free.extend(ended.keys());
        ended.into_iter().map(|(id, outcome)| (RequestId(id), outcome)).collect()
    }

    /// Submits and waits; no other request may be under way.
    pub fn run(
        &mut self,
        kind: RequestKind,
        ranges: &[SectorRange],
        segments: &[Segment],
    ) -> Outcome {
        let id = self.submit(kind, ranges, segments).expect("nothing else is under way");
        loop {
            if let Some((ended, outcome)) = self.ended().pop() {
                assert_eq!(ended, id, "nothing else is under way");
                return outcome;
            }
            self.turn(true);
        }
    }

    pub fn read(&mut self, start: u64, bytes: &mut [u8]) -> Outcome {
        let buffer = PinnedBuffer::new(bytes.len());
        let range = SectorRange { start, count: bytes.len() as u64 / SECTOR_BYTES };
        let outcome = self.run(RequestKind::Read, &[range], &[buffer.segment()]);
        buffer.segment().copy_to(bytes);
        outcome
    }

    pub fn write(&mut self, start: u64, bytes: &[u8]) -> Outcome {
        let buffer = PinnedBuffer::new(bytes.len());
        buffer.segment().copy_from(bytes);
        let range = SectorRange { start, count: bytes.len() as u64 / SECTOR_BYTES };
        self.run(RequestKind::Write, &[range], &[buffer.segment()])
    }

    pub fn flush(&mut self) -> Outcome {
        self.run(RequestKind::Flush, &[], &[])
    }
}
