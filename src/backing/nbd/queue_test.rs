//! The queue against a model of a server that carries out late, and restarts with amnesia.

use super::*;
use crate::backing::nbd::protocol::Negotiation;
use crate::io::buffer::PinnedBuffer;
use std::sync::Mutex;

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 16;
const SETTLE: Duration = Duration::from_secs(10);
const REQUEST: Duration = Duration::from_secs(30);
const TIMES: Times = Times { request: REQUEST, settle: SETTLE };

#[derive(Default)]
struct Ended(Mutex<Vec<Completion>>);

impl Port for Ended {
    fn complete(&self, completion: Completion) {
        self.0.lock().expect("no panic").push(completion);
    }
}

/// An export of 64 KiB with these flags, as a handshake would bring it.
fn export(flags: u16, payload: u32) -> Export {
    let mut negotiation = Negotiation::default();
    let head = |kind: u32, length: u32| {
        let mut bytes = [0; 20];
        bytes[..8].copy_from_slice(&0x0003_e889_0455_65a9_u64.to_be_bytes());
        bytes[8..12].copy_from_slice(&7u32.to_be_bytes());
        bytes[12..16].copy_from_slice(&kind.to_be_bytes());
        bytes[16..].copy_from_slice(&length.to_be_bytes());
        crate::backing::nbd::protocol::option_reply(&bytes).expect("a head")
    };
    let mut data = vec![0, 0];
    data.extend_from_slice(&(BLOCK * BLOCKS).to_be_bytes());
    data.extend_from_slice(&flags.to_be_bytes());
    assert_eq!(negotiation.reply(head(3, 12), &data), Ok(None));
    let mut data = vec![0, 3];
    for size in [512, 4096, payload] {
        data.extend_from_slice(&u32::to_be_bytes(size));
    }
    assert_eq!(negotiation.reply(head(3, 14), &data), Ok(None));
    negotiation.reply(head(1, 0), &[]).expect("whole").expect("an export")
}

const FLUSH: u16 = 1 << 2;
const FUA: u16 = 1 << 3;
const ZEROES: u16 = 1 << 6;

/// What a server reads off the wire.
fn parse(wire: &[u8]) -> (u16, u64, u64, u64) {
    let number = |from: usize, to: usize| {
        wire[from..to].iter().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte))
    };
    (number(6, 8) as u16, number(8, 16), number(16, 24), number(24, 28))
}

struct Fixture {
    queue: Queue,
    ended: Arc<Ended>,
    now: Instant,
    buffer: PinnedBuffer,
}

impl Fixture {
    fn new(flags: u16, payload: u32) -> Self {
        Self {
            queue: Queue::new(export(flags, payload), TIMES),
            ended: Arc::default(),
            now: Instant::now(),
            buffer: PinnedBuffer::new((BLOCK * BLOCKS) as usize),
        }
    }

    fn submit(&mut self, kind: OperationKind, block: u64, blocks: u64, token: u64) {
        let whole = [self.buffer.segment().part(0, (blocks * BLOCK) as usize)];
        let segments = if kind.transfers() { &whole[..] } else { &[] };
        let operation = Operation { kind, offset: block * BLOCK, length: blocks * BLOCK, segments };
        self.queue.submit(self.ended.clone(), operation, token, self.now);
    }

    fn sent(&mut self) -> Option<Arc<[u8]>> {
        match self.queue.next(self.now) {
            Next::Send(wire) => Some(wire),
            Next::Wait(_) => None,
        }
    }

    fn answer(&mut self, wire: &[u8], error: u32) {
        let answered = self.queue.answer(parse(wire).1, error).expect("under way");
        self.queue.settle_answer(answered, self.now);
    }

    fn ended(&mut self) -> Vec<(u64, Result<(), Errno>)> {
        for (port, completion) in self.queue.ended() {
            port.complete(completion);
        }
        let mut ended = self.ended.0.lock().expect("no panic");
        ended.drain(..).map(|completion| (completion.token, completion.result)).collect()
    }

    fn reconnect(&mut self) {
        self.queue.disconnected();
        self.queue.connected(self.now);
    }
}

#[test]
fn overlapping_changes_go_one_after_the_other_and_others_pass_them() {
    let mut all = Fixture::new(FLUSH | ZEROES, 1 << 20);
    all.submit(OperationKind::Write, 0, 2, 1);
    all.submit(OperationKind::Zero, 1, 2, 2);
    all.submit(OperationKind::Write, 2, 1, 3);
    all.submit(OperationKind::Write, 5, 1, 4);
    all.submit(OperationKind::Read, 1, 1, 5);
    let first: Vec<_> = std::iter::from_fn(|| all.sent()).collect();
    let offsets: Vec<_> = first.iter().map(|wire| (parse(wire).0, parse(wire).2 / BLOCK)).collect();
    assert_eq!(offsets, [(1, 0), (1, 5), (0, 1)], "2 waits for 1, and 3 for 2");
    all.answer(&first[0], 0);
    let second = all.sent().expect("2 may go");
    assert_eq!((parse(&second).0, all.sent()), (6, None));
    all.answer(&second, 28);
    assert_eq!(all.ended(), [(1, Ok(())), (2, Err(Errno(libc::ENOSPC)))]);
    assert!(all.sent().is_some(), "3 may go");
}

#[test]
fn large_operations_go_in_parts_and_end_once() {
    let mut all = Fixture::new(0, 8192);
    all.submit(OperationKind::Write, 0, 5, 9);
    let parts: Vec<_> = std::iter::from_fn(|| all.sent()).collect();
    let spans: Vec<_> = parts.iter().map(|wire| (parse(wire).2, parse(wire).3)).collect();
    assert_eq!(spans, [(0, 8192), (8192, 8192), (16384, 4096)]);
    all.answer(&parts[1], 5);
    all.answer(&parts[0], 0);
    assert_eq!(all.ended(), []);
    all.answer(&parts[2], 0);
    assert_eq!(all.ended(), [(9, Err(Errno::EIO))]);
    all.submit(OperationKind::Zero, 0, 1, 10);
    all.submit(OperationKind::Flush, 0, 0, 11);
    let cannot = Err(Errno(libc::EOPNOTSUPP));
    assert_eq!(all.ended(), [(10, cannot), (11, cannot)]);
}

#[test]
fn a_durable_write_is_flushed_where_the_server_cannot_do_both() {
    let mut all = Fixture::new(FLUSH, 1 << 20);
    all.submit(OperationKind::WriteDurable, 0, 1, 1);
    let write = all.sent().expect("the write");
    all.answer(&write, 0);
    let flush = all.sent().expect("the flush");
    assert_eq!((parse(&flush).0, all.ended()), (3, vec![]));
    all.answer(&flush, 0);
    assert_eq!(all.ended(), [(1, Ok(()))]);
    let mut all = Fixture::new(FLUSH | FUA, 1 << 20);
    all.submit(OperationKind::WriteDurable, 0, 1, 1);
    let write = all.sent().expect("the write");
    assert_eq!(write[5], 1, "FUA");
    all.answer(&write, 0);
    assert_eq!(all.ended(), [(1, Ok(()))]);
}

#[test]
fn what_was_under_way_is_sent_again_as_it_was_and_newer_data_waits() {
    let mut all = Fixture::new(FLUSH, 1 << 20);
    all.buffer.segment().copy_from(&[1; 4096]);
    all.submit(OperationKind::Write, 3, 1, 1);
    let first = all.sent().expect("sent");
    // The guest scribbles over its page meanwhile.
    all.buffer.segment().copy_from(&[2; 4096]);
    all.submit(OperationKind::Write, 3, 1, 2);
    all.submit(OperationKind::Write, 4, 1, 3);
    all.reconnect();
    let again = all.sent().expect("sent again");
    assert_eq!(again, first, "the very same bytes");
    let elsewhere = all.sent().expect("what was not in doubt");
    assert_eq!((parse(&elsewhere).2, all.sent()), (4 * BLOCK, None));
    all.answer(&again, 0);
    assert_eq!(all.sent(), None, "the old connection's server may still write version 1");
    let Next::Wait(Some(until)) = all.queue.next(all.now) else { panic!("a time") };
    assert_eq!(until, all.now + SETTLE);
    all.now = until;
    let newer = all.sent().expect("it has settled");
    assert_eq!(newer[REQUEST_HEAD..REQUEST_HEAD + 4], [2; 4]);
}

const REQUEST_HEAD: usize = crate::backing::nbd::protocol::REQUEST_BYTES;

#[test]
fn after_an_unclean_end_all_changes_wait_and_reads_do_not() {
    let mut all = Fixture::new(FLUSH, 1 << 20);
    all.queue.hold(all.now);
    all.submit(OperationKind::Write, 0, 1, 1);
    all.submit(OperationKind::Read, 0, 1, 2);
    let read = all.sent().expect("a read");
    assert_eq!((parse(&read).0, all.sent()), (0, None));
    all.now += SETTLE;
    assert!(all.sent().is_some());
}

#[test]
fn a_flush_that_would_prove_nothing_fails() {
    let mut all = Fixture::new(FLUSH, 1 << 20);
    all.submit(OperationKind::Write, 0, 1, 1);
    let write = all.sent().expect("sent");
    all.answer(&write, 0);
    // The server answered, and was restarted before it was asked to flush.
    all.reconnect();
    all.submit(OperationKind::Flush, 0, 0, 2);
    assert_eq!(all.sent(), None);
    assert_eq!(all.ended(), [(1, Ok(())), (2, Err(Errno::EIO))]);
    // Who submitted it writes again; then a flush is worth something.
    all.submit(OperationKind::Write, 0, 1, 3);
    let write = all.sent().expect("sent");
    all.answer(&write, 0);
    all.submit(OperationKind::Flush, 0, 0, 4);
    let flush = all.sent().expect("sent");
    all.answer(&flush, 0);
    assert_eq!(all.ended(), [(3, Ok(())), (4, Ok(()))]);
    // Nothing was written since: a flush that was under way is only asked again.
    all.submit(OperationKind::Flush, 0, 0, 5);
    all.sent().expect("sent");
    all.reconnect();
    let flush = all.sent().expect("sent again");
    all.answer(&flush, 0);
    assert_eq!(all.ended(), [(5, Ok(()))]);
}

/// A drain's group: written and flushed again until the flush has succeeded, on a server that takes
/// `takes` for a flush, begins it anew on each connection, and is given up when it is late.
fn drained_after(takes: Duration) -> u32 {
    let mut all = Fixture::new(FLUSH, 1 << 20);
    for tries in 1..=20 {
        all.submit(OperationKind::Write, 0, 1, 1);
        all.now += SETTLE;
        let write = all.sent().expect("a write");
        all.answer(&write, 0);
        all.submit(OperationKind::Flush, 0, 0, 2);
        let flush = all.sent().expect("a flush");
        all.submit(OperationKind::Read, 0, 1, 3);
        let read = all.sent().expect("a read, which waits for the flush");
        let late = all.queue.late_at().expect("something is under way");
        let ends = all.now + takes;
        if ends < late {
            all.now = ends;
            assert_eq!(all.queue.is_late(all.now), None);
            all.answer(&flush, 0);
            assert_eq!(all.queue.is_late(all.now), None, "the read's answer comes now");
            all.answer(&read, 0);
            assert_eq!(all.ended(), [(1, Ok(())), (2, Ok(())), (3, Ok(()))]);
            all.submit(OperationKind::Read, 0, 1, 4);
            all.sent().expect("a read");
            assert_eq!(all.queue.late_at(), Some(all.now + REQUEST), "as ever");
            return tries;
        }
        all.now = late;
        assert!(all.queue.is_late(all.now).is_some());
        all.reconnect();
        let read = all.sent().expect("the read, and the flush ends here");
        all.answer(&read, 0);
        assert_eq!(all.ended(), [(1, Ok(())), (2, Err(Errno::EIO)), (3, Ok(()))]);
    }
    panic!("a flush of {takes:?} never ends");
}

#[test]
fn a_flush_that_takes_longer_than_a_request_may_ends_all_the_same() {
    assert_eq!(drained_after(REQUEST / 2), 1);
    assert_eq!(drained_after(REQUEST * 3), 3);
    assert_eq!(drained_after(REQUEST * 100), 8);
}

#[test]
fn a_write_that_completes_under_a_flush_is_not_covered_by_it() {
    let mut all = Fixture::new(FLUSH, 1 << 20);
    all.submit(OperationKind::Flush, 0, 0, 1);
    all.submit(OperationKind::Write, 0, 1, 2);
    let (flush, write) = (all.sent().expect("sent"), all.sent().expect("sent"));
    all.answer(&write, 0);
    all.answer(&flush, 0);
    all.reconnect();
    all.submit(OperationKind::Flush, 0, 0, 3);
    assert_eq!(all.sent(), None);
    let ended = all.ended();
    assert_eq!(ended.last(), Some(&(3, Err(Errno::EIO))));
}

#[test]
fn without_a_connection_old_operations_can_be_given_up() {
    let mut all = Fixture::new(FLUSH, 1 << 20);
    all.submit(OperationKind::Write, 0, 1, 1);
    all.sent().expect("sent");
    let before = all.now;
    all.now += Duration::from_secs(1);
    all.submit(OperationKind::Read, 0, 1, 2);
    all.queue.disconnected();
    all.queue.give_up(Some(before), all.now);
    assert_eq!(all.ended(), [(1, Err(Errno(libc::ETIMEDOUT)))]);
    all.queue.connected(all.now);
    all.submit(OperationKind::Write, 0, 1, 3);
    assert_eq!(parse(&all.sent().expect("the read")).0, 0);
    assert_eq!(all.sent(), None, "what was given up is still in doubt");
}

/// Connection, request, when it must be carried out at the latest.
type Reading = (u64, Arc<[u8]>, Option<Instant>);

/// A server that carries out what it has read whenever it likes, but at most half a settling time
/// after the connection was lost.
struct Server {
    content: Vec<u8>,
    reading: Vec<Reading>,
}

impl Server {
    fn carry_out(&mut self, index: usize) -> (u64, Arc<[u8]>) {
        let (connection, wire, _) = self.reading.remove(index);
        let (command, _, offset, length) = parse(&wire);
        let range = offset as usize..(offset + length) as usize;
        match command {
            1 => self.content[range].copy_from_slice(&wire[REQUEST_HEAD..]),
            6 => self.content[range].fill(0),
            _ => {}
        }
        (connection, wire)
    }
}

/// A queue, a server and what the export must hold in the end.
struct Late {
    all: Fixture,
    server: Server,
    model: Vec<u8>,
    random: fastrand::Rng,
    connection: u64,
    under_way: usize,
    token: u64,
}

impl Late {
    fn new(seed: u64) -> Self {
        let content = vec![0; (BLOCK * BLOCKS) as usize];
        Self {
            all: Fixture::new(FLUSH | ZEROES, 8192),
            model: content.clone(),
            server: Server { content, reading: Vec::new() },
            random: fastrand::Rng::with_seed(seed),
            connection: 1,
            under_way: 0,
            token: 0,
        }
    }

    fn submit(&mut self) {
        let (block, blocks) = (self.random.u64(0..BLOCKS - 3), self.random.u64(1..4));
        let range = (block * BLOCK) as usize..((block + blocks) * BLOCK) as usize;
        self.token += 1;
        self.under_way += 1;
        let value = if self.random.u8(0..4) == 0 { 0 } else { self.random.u8(1..) };
        self.model[range.clone()].fill(value);
        self.all.buffer.segment().copy_from(&self.model[range]);
        let kind = if value == 0 { OperationKind::Zero } else { OperationKind::Write };
        self.all.submit(kind, block, blocks, self.token);
    }

    fn reconnect(&mut self) {
        self.all.reconnect();
        self.connection += 1;
        let late = self.all.now + SETTLE / 2;
        for (_, _, until) in &mut self.server.reading {
            until.get_or_insert(late);
        }
    }

    fn send(&mut self) {
        if let Some(wire) = self.all.sent() {
            self.server.reading.push((self.connection, wire, None));
        }
    }

    fn carry_out(&mut self, index: usize) {
        let (connection, wire) = self.server.carry_out(index);
        if connection == self.connection {
            self.all.answer(&wire, 0);
        }
    }

    fn step(&mut self) {
        self.all.now += Duration::from_millis(self.random.u64(0..800));
        match self.random.u8(0..10) {
            0..=3 if self.under_way < 6 => self.submit(),
            4 if self.random.u8(0..4) == 0 => self.reconnect(),
            _ => self.send(),
        }
        let now = self.all.now;
        let due = |entry: &Reading| entry.2.is_some_and(|late| late <= now);
        while let Some(index) = self.server.reading.iter().position(due) {
            self.carry_out(index);
        }
        if !self.server.reading.is_empty() && self.random.bool() {
            let index = self.random.usize(..self.server.reading.len());
            self.carry_out(index);
        }
        self.under_way -= self.all.ended().len();
    }

    fn finish(&mut self) {
        while self.under_way > 0 || !self.server.reading.is_empty() {
            self.all.now += Duration::from_secs(1);
            self.send();
            while !self.server.reading.is_empty() {
                self.carry_out(0);
            }
            self.under_way -= self.all.ended().len();
        }
    }
}

#[test]
fn whatever_a_server_does_late_the_newest_version_stays() {
    for seed in 0..400 {
        let mut late = Late::new(seed);
        for _ in 0..400 {
            late.step();
        }
        late.finish();
        assert!(late.server.content == late.model, "seed {seed}: an old version came back");
        assert!(late.connection > 1, "seed {seed}: connections are lost");
    }
}
