//! Which request goes out when, and what the loss of a connection means for those under way. No
//! thread, no socket, no clock: the client brings them.
//!
//! - N1 Two requests that change overlapping bytes are never under way together, and go out in the
//!   order in which they were submitted.
//! - N2 What was under way when a connection was lost is sent again, the same bytes, before
//!   anything that overlaps it.
//! - N3 A server may still be carrying out what it read from a lost connection. So nothing newer
//!   goes to bytes in doubt until [`Queue::settle`] after the next connection; and nothing new at
//!   all for as long after an opening: the last owner may have been killed.
//! - N4 A flush answers for writes that completed on its own connection only. If an earlier one was
//!   completed on a connection that was lost, the server may have lost it: the flush fails, and who
//!   submitted it writes again.
//! - N5 Every operation is completed exactly once.
//! - N6 A server that is merely slow is not given up for ever: what a flush or a write of zeros may
//!   take doubles each time that it was not enough. A flush that is cut off fails by N4, and what
//!   it was to cover is written again: with one limit that would never end.

use super::protocol::{Command, Export, errno, request};
use crate::io::buffer::{Segment, gather, scatter};
use crate::io::disk::{Completion, Errno, Operation, OperationKind};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Requests under way on the wire.
const WINDOW: usize = 64;

/// Bytes of one request to zero: what a slow server does in a few seconds.
const ZERO_BYTES_MAX: u64 = 64 << 20;

/// What a slow request is given at most, however often less was not enough (N6).
const SLOW_MAX: Duration = Duration::from_secs(3600);

/// Where completions go: one per handle on the disk.
pub(super) trait Port: Send + Sync {
    fn complete(&self, completion: Completion);
}

/// An operation, of one or more requests.
struct Under {
    port: Arc<dyn Port>,
    token: u64,
    left: usize,
    result: Result<(), Errno>,
    /// Must be flushed when it is done: it was to be durable, and the server cannot.
    then_flush: bool,
}

struct Request {
    cookie: u64,
    operation: u64,
    command: Command,
    offset: u64,
    end: u64,
    /// Head and data.
    wire: Arc<[u8]>,
    /// Where the data of a read goes.
    segments: Vec<Segment>,
    /// It was under way on a connection that was lost.
    again: bool,
    submitted: Instant,
}

impl Request {
    fn changes(&self) -> bool {
        !matches!(self.command, Command::Read | Command::Flush)
    }

    /// It takes a server as long as there is to be done, which its bytes do not tell.
    fn is_slow(&self) -> bool {
        matches!(self.command, Command::Flush | Command::WriteZeroes | Command::Punch)
    }

    fn overlaps(&self, offset: u64, end: u64) -> bool {
        self.offset < end && offset < self.end
    }
}

/// Bytes that a lost connection's server may still change.
struct Doubt {
    offset: u64,
    end: u64,
    /// `None` while there is no connection.
    until: Option<Instant>,
}

/// What to do next.
pub(super) enum Next {
    Send(Arc<[u8]>),
    /// Nothing before this time, unless something is submitted or answered.
    Wait(Option<Instant>),
}

/// A reply's request, as its receiver must deal with it.
pub(super) struct Answered {
    request: Request,
    result: Result<(), Errno>,
}

/// How long things may take.
#[derive(Clone, Copy)]
pub(super) struct Times {
    /// A request's answer.
    pub(super) request: Duration,
    /// For a server to carry out what it read from a lost connection.
    pub(super) settle: Duration,
}

pub(super) struct Queue {
    export: Export,
    times: Times,
    /// What a slow request may take now (N6).
    slow_limit: Duration,
    /// When the last slow request was answered.
    slow_ended: Option<Instant>,
    waiting: VecDeque<Request>,
    sent: BTreeMap<u64, (Request, Instant)>,
    operations: BTreeMap<u64, Under>,
    next_cookie: u64,
    next_operation: u64,
    /// Of connections.
    generation: u64,
    /// The oldest connection on which a write completed that no flush has covered since.
    unflushed: Option<u64>,
    /// Writes completed so far, and how many there were when a flush went out.
    writes: u64,
    writes_at_flush: BTreeMap<u64, u64>,
    doubts: Vec<Doubt>,
    held_until: Option<Instant>,
    /// To be delivered when the lock is off.
    ended: Vec<(Arc<dyn Port>, Completion)>,
}

impl Queue {
    pub(super) fn new(export: Export, times: Times) -> Self {
        Self {
            export,
            times,
            slow_limit: times.request,
            slow_ended: None,
            waiting: VecDeque::new(),
            sent: BTreeMap::new(),
            operations: BTreeMap::new(),
            next_cookie: 1,
            next_operation: 1,
            generation: 1,
            unflushed: None,
            writes: 0,
            writes_at_flush: BTreeMap::new(),
            doubts: Vec::new(),
            held_until: None,
            ended: Vec::new(),
        }
    }

    /// Completions to be delivered, since the last call.
    pub(super) fn ended(&mut self) -> Vec<(Arc<dyn Port>, Completion)> {
        std::mem::take(&mut self.ended)
    }

    /// Takes an operation on. The data of a write is copied, so that the very same bytes can be
    /// sent again (N2).
    pub(super) fn submit(
        &mut self,
        port: Arc<dyn Port>,
        operation: Operation<'_>,
        token: u64,
        now: Instant,
    ) {
        let Operation { kind, offset, length, segments } = operation;
        let durable = self.export.can_write_durably();
        let command = match kind {
            OperationKind::Read => Command::Read,
            OperationKind::WriteDurable if durable => Command::WriteDurable,
            OperationKind::Write | OperationKind::WriteDurable => Command::Write,
            OperationKind::Flush => Command::Flush,
            OperationKind::Zero => Command::WriteZeroes,
            OperationKind::Discard => Command::Punch,
        };
        let then_flush = kind == OperationKind::WriteDurable && !durable;
        let able = match command {
            Command::WriteZeroes | Command::Punch => self.export.can_zero(),
            Command::Flush => self.export.can_flush(),
            _ => true,
        };
        if !able || (then_flush && !self.export.can_flush()) {
            let result = Err(Errno(libc::EOPNOTSUPP));
            self.ended.push((port, Completion { token, result }));
            return;
        }
        let number = self.next_operation;
        self.next_operation += 1;
        let part_bytes = match kind.transfers() {
            true => u64::from(self.export.payload_bytes_max),
            false => ZERO_BYTES_MAX,
        };
        let left = length.div_ceil(part_bytes).max(1) as usize;
        let under = Under { port, token, left, result: Ok(()), then_flush };
        self.operations.insert(number, under);
        for part in 0..left as u64 {
            let skip = part * part_bytes;
            let span = (offset + skip, (length - skip).min(part_bytes));
            self.push(number, command, span, &slice(segments, skip, span.1), now);
        }
    }

    fn push(
        &mut self,
        operation: u64,
        command: Command,
        (offset, length): (u64, u64),
        segments: &[Segment],
        submitted: Instant,
    ) {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let head = request(command, cookie, offset, length as u32);
        let writes = matches!(command, Command::Write | Command::WriteDurable);
        let bytes = head.len() + if writes { length as usize } else { 0 };
        let mut wire: Arc<[u8]> = std::iter::repeat_n(0, bytes).collect();
        let (front, data) = Arc::get_mut(&mut wire).expect("just made").split_at_mut(head.len());
        front.copy_from_slice(&head);
        gather(if writes { segments } else { &[] }, data);
        let segments = if writes { Vec::new() } else { segments.to_vec() };
        self.waiting.push_back(Request {
            cookie,
            operation,
            command,
            offset,
            end: offset + length,
            wire,
            segments,
            again: false,
            submitted,
        });
    }

    /// From now on until the settling time is over, nothing changes (N3).
    pub(super) fn hold(&mut self, now: Instant) {
        self.held_until = Some(now + self.times.settle);
    }

    /// The next request to be sent, which then is under way.
    pub(super) fn next(&mut self, now: Instant) -> Next {
        self.held_until = self.held_until.filter(|until| *until > now);
        self.doubts.retain(|doubt| doubt.until.is_none_or(|until| until > now));
        if self.sent.len() >= WINDOW {
            return Next::Wait(None);
        }
        let mut wake: Option<Instant> = None;
        for index in 0..self.waiting.len() {
            match self.obstacle(index) {
                Obstacle::Time(until) => wake = Some(wake.map_or(until, |at| at.min(until))),
                Obstacle::Request => {}
                Obstacle::None => {
                    let request = self.waiting.remove(index).expect("an index within");
                    if let Some(wire) = self.send(request, now) {
                        return Next::Send(wire);
                    }
                    return self.next(now);
                }
            }
        }
        Next::Wait(wake)
    }

    fn obstacle(&self, index: usize) -> Obstacle {
        let Some(request) = self.waiting.get(index) else { return Obstacle::Request };
        if !request.changes() {
            return Obstacle::None;
        }
        let (offset, end) = (request.offset, request.end);
        let blocks = |other: &Request| other.changes() && other.overlaps(offset, end);
        let under_way = self.sent.values().any(|(other, _)| blocks(other));
        if under_way || self.waiting.iter().take(index).any(blocks) {
            return Obstacle::Request;
        }
        if request.again {
            return Obstacle::None;
        }
        let doubts = self.doubts.iter().filter(|doubt| doubt.offset < end && offset < doubt.end);
        let until = doubts.filter_map(|doubt| doubt.until).chain(self.held_until).max();
        until.map_or(Obstacle::None, Obstacle::Time)
    }

    /// Notes the request as under way; a flush that would prove nothing ends here (N4).
    fn send(&mut self, request: Request, now: Instant) -> Option<Arc<[u8]>> {
        if request.command == Command::Flush {
            if self.unflushed.is_some_and(|generation| generation < self.generation) {
                self.unflushed = None;
                self.end(&request, Err(Errno::EIO), now);
                return None;
            }
            self.writes_at_flush.insert(request.cookie, self.writes);
        }
        let wire = request.wire.clone();
        self.sent.insert(request.cookie, (request, now));
        Some(wire)
    }

    /// Bytes of data that follow a reply; `None`: nothing like it is under way.
    pub(super) fn data_bytes(&self, cookie: u64, error: u32) -> Option<usize> {
        let (request, _) = self.sent.get(&cookie)?;
        let reads = request.command == Command::Read && error == 0;
        Some(if reads { (request.end - request.offset) as usize } else { 0 })
    }

    /// Takes a request that was answered off the wire. Whoever receives scatters its data, without
    /// the lock, and then calls [`Queue::settle_answer`].
    pub(super) fn answer(&mut self, cookie: u64, error: u32) -> Option<Answered> {
        let (request, _) = self.sent.remove(&cookie)?;
        let result = if error == 0 { Ok(()) } else { Err(errno(error)) };
        Some(Answered { request, result })
    }

    pub(super) fn settle_answer(&mut self, answered: Answered, now: Instant) {
        let Answered { request, result } = answered;
        if request.is_slow() {
            self.slow_ended = Some(now);
        }
        match request.command {
            Command::Flush => {
                let before = self.writes_at_flush.remove(&request.cookie);
                if result.is_ok() && before == Some(self.writes) {
                    self.unflushed = None;
                }
            }
            Command::Write | Command::WriteZeroes | Command::Punch => {
                self.writes += 1;
                let generation = self.generation;
                self.unflushed = Some(self.unflushed.map_or(generation, |at| at.min(generation)));
            }
            Command::Read | Command::WriteDurable | Command::Disconnect => {}
        }
        self.end(&request, result, now);
    }

    /// One request of an operation has ended.
    fn end(&mut self, request: &Request, result: Result<(), Errno>, now: Instant) {
        let number = request.operation;
        let Some(under) = self.operations.get_mut(&number) else { return };
        under.left -= 1;
        under.result = under.result.and(result);
        if under.left > 0 {
            return;
        }
        if under.result.is_ok() && std::mem::take(&mut under.then_flush) {
            under.left = 1;
            self.push(number, Command::Flush, (0, 0), &[], now);
            return;
        }
        if let Some(Under { port, token, result, .. }) = self.operations.remove(&number) {
            self.ended.push((port, Completion { token, result }));
        }
    }

    /// The connection is gone.
    pub(super) fn disconnected(&mut self) {
        self.generation += 1;
        self.writes_at_flush.clear();
        for (_, (mut request, _)) in std::mem::take(&mut self.sent).into_iter().rev() {
            if request.changes() {
                let (offset, end) = (request.offset, request.end);
                self.doubts.push(Doubt { offset, end, until: None });
            }
            request.again = true;
            self.waiting.push_front(request);
        }
    }

    /// There is a new one.
    pub(super) fn connected(&mut self, now: Instant) {
        for doubt in &mut self.doubts {
            doubt.until = Some(doubt.until.unwrap_or(now + self.times.settle));
        }
    }

    /// What an answer to a request that was sent at `at` may take. A server may do one thing after
    /// the other: all that is sent before a slow request has ended may wait for that.
    fn limit(&self, at: Instant) -> (bool, Duration) {
        let under_way = self.sent.values().any(|(request, _)| request.is_slow());
        let slow = under_way || self.slow_ended.is_some_and(|ended| ended > at);
        (slow, if slow { self.slow_limit } else { self.times.request })
    }

    /// When the connection is to be given up, if nothing is answered until then.
    pub(super) fn late_at(&self) -> Option<Instant> {
        self.sent.values().map(|(_, at)| *at + self.limit(*at).1).min()
    }

    /// After how long an answer is late, if one is: then the connection is to be given up. The next
    /// one is given more time if a slow request took too long (N6).
    pub(super) fn is_late(&mut self, now: Instant) -> Option<Duration> {
        let limits = self.sent.values().map(|(_, at)| (*at, self.limit(*at)));
        let (_, (slow, limit)) = limits.into_iter().find(|(at, (_, limit))| *at + *limit <= now)?;
        if slow {
            self.slow_limit = (limit * 2).min(SLOW_MAX.max(limit));
        }
        Some(limit)
    }

    /// Without a connection: fails what was submitted at `before` or earlier. What may have been
    /// carried out stays in doubt.
    pub(super) fn give_up(&mut self, before: Option<Instant>, now: Instant) {
        self.give_up_where(before, now, |_| true);
    }

    /// As [`Self::give_up`], of reads, which leave nothing in doubt.
    pub(super) fn give_up_reads(&mut self, before: Option<Instant>, now: Instant) {
        self.give_up_where(before, now, |request| request.command == Command::Read);
    }

    fn give_up_where(
        &mut self,
        before: Option<Instant>,
        now: Instant,
        which: impl Fn(&Request) -> bool,
    ) {
        let Some(before) = before else { return };
        let (old, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|request| request.submitted <= before && which(request));
        self.waiting = rest.into();
        for request in old {
            self.end(&request, Err(Errno(libc::ETIMEDOUT)), now);
        }
    }
}

enum Obstacle {
    None,
    /// An overlapping request goes first.
    Request,
    Time(Instant),
}

impl Answered {
    /// Puts a read's data in its place.
    pub(super) fn scatter(&self, data: &[u8]) {
        scatter(data, &self.request.segments);
    }
}

/// The part of `segments` that begins `skip` bytes in and is `length` bytes long.
fn slice(segments: &[Segment], skip: u64, length: u64) -> Vec<Segment> {
    let (mut skip, mut left) = (skip as usize, length as usize);
    let mut parts = Vec::new();
    for segment in segments {
        let part = segment.part(skip, left);
        skip = skip.saturating_sub(segment.length());
        if part.length() > 0 {
            left -= part.length();
            parts.push(part);
        }
    }
    parts
}

#[cfg(test)]
#[path = "queue_test.rs"]
mod tests;
