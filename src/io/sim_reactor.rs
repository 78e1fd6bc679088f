//! A reactor for tests: drives one [`Volume`] over any [`Disk`], in the caller's thread.

use super::buffer::{PinnedBuffer, Segment};
use super::disk::{Completion, Disk, Operation};
use super::volume::{
    DiskIndex, Io, Origin, Outcome, Request, RequestId, RequestKind, SectorRange, Volume,
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
}

struct SimIo {
    disk: Box<dyn Disk + Send>,
    under_way: usize,
    ended: BTreeMap<u32, Outcome>,
    now: Nanos,
}

impl Io for SimIo {
    fn now(&self) -> Nanos {
        self.now
    }

    fn submit(&mut self, disk: DiskIndex, operation: Operation<'_>, token: u64) {
        assert_eq!(disk, DiskIndex(0), "one disk");
        self.under_way += 1;
        self.disk.submit(operation, token);
    }

    fn complete(&mut self, request: RequestId, outcome: Outcome) {
        let before = self.ended.insert(request.0, outcome);
        assert_eq!(before, None, "request {} is completed once", request.0);
    }

    fn wake_at(&mut self, _at: Nanos) {}
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
    pub fn new(
        mut volume: V,
        disk: Box<dyn Disk + Send>,
        inbox: Receiver<Box<dyn Any + Send>>,
        requests_max: u32,
    ) -> Self {
        volume.attach(requests_max);
        let io = SimIo { disk, under_way: 0, ended: BTreeMap::new(), now: Nanos(0) };
        Self { volume, io, inbox, free: (0..requests_max).rev().collect() }
    }

    /// Submits a request; `None` if as many as may be are under way.
    pub fn submit(
        &mut self,
        kind: RequestKind,
        ranges: &[SectorRange],
        segments: &[Segment],
    ) -> Option<RequestId> {
        let id = RequestId(self.free.pop()?);
        let origin = Origin { queue: 0, counter: 0, replayed: false };
        self.volume.submit(Request { id, kind, ranges, segments, origin }, &mut self.io);
        Some(id)
    }

    /// One turn: what the disk has completed and what others have sent. With `wait`, blocks until
    /// there is something.
    pub fn turn(&mut self, wait: bool) {
        let mut completions = Vec::new();
        self.io.disk.poll(&mut completions, wait && self.io.under_way > 0);
        let mut moved = !completions.is_empty();
        for Completion { token, result } in completions {
            self.io.under_way -= 1;
            self.volume.completed(token, result, &mut self.io);
        }
        while let Ok(message) = self.inbox.try_recv() {
            moved = true;
            self.volume.message(message, &mut self.io);
        }
        if wait && !moved && self.io.under_way == 0 && self.io.ended.is_empty() {
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
