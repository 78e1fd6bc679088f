//! The drainer: moves committed records from the log to the backing, in the background.
//!
//! It reads the log in order, merges records into a group (`merge.rs`), and brings the group to the
//! backing. One group at a time, one state at a time:
//!
//! ```text
//! Idle → Gather → Fill → Sum → Redo → RedoFlush → Apply → ApplyFlush → Root → Idle
//!                        └──── grouped only ────┘    Stamp → StampFlush: retires groups
//! ```
//!
//! Whatever fails is done again from the beginning of its state, after a pause that doubles: a
//! failed flush may have dropped what was written before it, so all of it is written again.
//!
//! Invariants:
//! - D1 records are applied in order of their WONs; of overlapping ones the last wins (J5).
//! - D2 the drain position moves only when the backing's flush has returned (J6), and is durable on
//!   flash before anything newer goes to the backing: no recovery drains old over new.
//! - D3 grouped: nothing is written to the backing before its group is durable in the sidecar, and
//!   no group goes to the sidecar before the one before it is durable in the backing.
//! - D4 ordered: no group holds records of two epochs, but for one that the sidecar has.
//! - D5 nothing is written that was not verified, and nothing behind a record that failed to be.

mod claim;
mod gather;
mod host;
mod policy;
mod read;
mod status;
mod sum;
mod together;
mod write;

use super::memory::DrainMemory;
use super::merge::Merged;
use super::order::{Points, Refusal};
use crate::backing::redo::Layout;
use crate::backing::stamp::{DrainMode, Point, Stamp};
use crate::base::clock::Nanos;
use crate::base::planted::{Bug, planted};
use crate::io::buffer::{PinnedBuffer, Segment};
use crate::io::disk::{DiskGeometry, Errno, Operation, OperationKind};
use crate::io::volume::DiskIndex;
use claim::{limits, own};
pub use host::{DrainHost, LogCursor, LogStretch};
use policy::{Dirty, Pace};
use read::{LogReader, READS_MAX};
pub use status::{DrainError, DrainReply, DrainState, DrainStatus};
use std::sync::Arc;
use std::time::Duration;
use sum::Summing;
use together::Together;

const BACKING: DiskIndex = DiskIndex(1);
const SIDECAR: DiskIndex = DiskIndex(2);

/// Tokens below are reads of the log, this is the root, those above are a state's operations.
const TOKEN_ROOT: u32 = READS_MAX as u32;
const TOKEN_FIRST: u32 = TOKEN_ROOT + 1;

/// Tokens of a drainer are below this.
pub const DRAIN_TOKENS: u32 = 1 << 24;

/// The pause after the first failure; it doubles up to the last.
const PAUSE_FIRST: Duration = Duration::from_millis(50);
const PAUSE_LAST: Duration = Duration::from_secs(30);

/// In ordered mode the sidecar's stamp tells the point at most this old.
const STAMP_INTERVAL: Duration = Duration::from_secs(1);

/// The sidecar, as it was opened. From then on only the drainer writes it.
#[derive(Clone, Debug)]
pub struct SidecarState {
    pub layout: Layout,
    /// The newest stamp, durable.
    pub stamp: Stamp,
    /// The highest group number that the slots have seen.
    pub last_group: u64,
    /// That group counts and is not retired, and leads to this point: the backing may have a part
    /// of it, so it is finished first, from the log.
    pub live: Option<Point>,
}

#[derive(Clone, Debug)]
pub struct DrainOptions {
    pub mode: DrainMode,
    /// While the backing answers, no write is older than this before it is drained.
    pub staleness_max: Duration,
    pub backing: DiskGeometry,
    pub sidecar: Option<SidecarState>,
    /// The log from here on is to be drained.
    pub drained: u64,
    pub drained_epoch: u64,
    /// The newest committed write, and the bytes of log between.
    pub head: u64,
    pub dirty_bytes: u64,
    /// The backing is to be claimed: nothing is drained before ([`Drainer::claimed`]).
    pub away: bool,
    /// Where groups get their memory.
    pub memory: Arc<DrainMemory>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    Gather,
    /// Reads blocks of the backing that the group writes in part.
    Fill,
    /// Checksums the group, a part in each turn (`sum.rs`).
    Sum,
    Redo,
    RedoFlush,
    /// `together.rs` has these four: how far all members come, and whether the step counts.
    Agree,
    Prepared,
    Commit,
    CommitFlush,
    Apply,
    ApplyFlush,
    Root,
    /// The root says that the backing was claimed, and where it is.
    Claim,
    /// Writes a stamp: it retires the last group, tells the point, or both.
    Stamp,
    StampFlush,
}

/// One operation of a state.
struct Planned {
    disk: DiskIndex,
    kind: OperationKind,
    offset: u64,
    length: u64,
    segments: Vec<Segment>,
    submitted: Nanos,
}

/// The group being drained.
#[derive(Clone, Copy, Default)]
struct Group {
    from: u64,
    /// The last request that is in it as a whole.
    to: u64,
    /// The backing is at this point afterwards: no other number up to it is this disk's.
    point: u64,
    epoch: u64,
    /// Nothing beyond.
    limit: u64,
    /// The request after `to` is in it as far as there was room.
    part: bool,
    /// That request's number.
    part_won: u64,
    /// It ends before its limit.
    full: bool,
    /// Where it began, to gather it again: the cursor and records taken of that batch.
    start: (LogCursor, u16),
    /// Records taken of the batch at the reader's cursor.
    taken: u16,
    /// Bytes of log that it took.
    log_bytes: u64,
    /// Sectors of zeros.
    zeros: u64,
    begun: Nanos,
    /// Bytes of log that had been committed by then, ever.
    committed: u64,
}

struct Waiter {
    to: u64,
    reply: DrainReply,
}

/// See the module.
pub struct Drainer {
    options: DrainOptions,
    state: State,
    points: Points,
    dirty: Dirty,
    pace: Pace,
    reader: LogReader,
    /// The reader stands behind the last group.
    positioned: bool,
    merged: Merged,
    group: Group,
    plan: Vec<Planned>,
    next: usize,
    under_way: u32,
    /// Of this attempt at the state.
    failure: Option<Errno>,
    /// In [`State::Sum`] and [`State::Redo`]: the redo group as far as it is put together.
    summing: Option<Summing>,
    /// This is a turn of its own: a part of what takes long may be done.
    turn: bool,
    /// The state is to be begun again.
    again: bool,
    /// The backing refused a kind of operation and is given another.
    refused: bool,
    /// The last failure, until something succeeded.
    trouble: Option<Errno>,
    /// After a failure: nothing before this time.
    pause: Option<Nanos>,
    /// Nothing by itself before this time: the guest goes first.
    rest: Nanos,
    /// The last number of this disk that is drained.
    own: u64,
    pause_next: Duration,
    attempts: u32,
    last_good: Option<u64>,
    waiters: Vec<Waiter>,
    retire: Vec<DrainReply>,
    retire_clean: bool,
    /// Of a disk in a consistency group.
    together: Option<Together>,
    /// The group being made is to end earlier.
    shortened: bool,
    /// Draining stops here until it is let go.
    hold: Option<u64>,
    /// A group in the sidecar may still be applied by a recovery.
    live_group: bool,
    /// Up to here the sidecar has what goes to the backing already: D3 is met.
    redone_to: u64,
    last_group: u64,
    /// Being written.
    stamp: Option<Stamp>,
    stamped: Nanos,
    zero_refused: bool,
    discard_refused: bool,
    /// Zeros for a backing that cannot zero; and what a state's operations read or write.
    zeros: Option<PinnedBuffer>,
    scratch: Vec<PinnedBuffer>,
    /// What is read to fill blocks: start, count, and the chunk of `scratch` and byte where the
    /// first of these sectors will be.
    fills: Vec<(u64, u64, usize, usize)>,
    groups: u64,
    retries: u64,
    drained_bytes: u64,
}

impl Drainer {
    pub fn new(options: DrainOptions, now: Nanos) -> Self {
        let (drained, head) = (options.drained, options.head);
        let sidecar = options.sidecar.as_ref();
        let ordered = options.mode == DrainMode::Ordered;
        assert!(ordered || options.away || sidecar.is_some(), "groups need a sidecar");
        let live_to = sidecar.and_then(|sidecar| sidecar.live).map(|point| point.won);
        let mut points = Points::new(drained, head);
        if let Some(to) = live_to.filter(|to| *to > drained) {
            points.group_committed(to);
        }
        Self {
            state: State::Idle,
            points,
            dirty: Dirty::new((drained, head), options.dirty_bytes, now),
            pace: Pace::new(),
            reader: LogReader::default(),
            positioned: false,
            merged: Merged::new(limits(&options), options.memory.clone()),
            group: Group { to: drained, epoch: options.drained_epoch, ..Group::default() },
            plan: Vec::new(),
            next: 0,
            under_way: 0,
            failure: None,
            summing: None,
            turn: false,
            again: false,
            refused: false,
            trouble: None,
            pause: None,
            rest: now,
            own: own(&options, drained),
            pause_next: PAUSE_FIRST,
            attempts: 0,
            last_good: None,
            waiters: Vec::new(),
            retire: Vec::new(),
            retire_clean: false,
            together: None,
            shortened: false,
            hold: None,
            live_group: live_to.is_some(),
            redone_to: live_to.unwrap_or(drained),
            last_group: sidecar.map_or(0, |sidecar| sidecar.last_group),
            stamp: None,
            stamped: now,
            zero_refused: !options.backing.zero,
            discard_refused: !options.backing.discard,
            zeros: None,
            scratch: Vec::new(),
            fills: Vec::new(),
            groups: 0,
            retries: 0,
            drained_bytes: 0,
            options,
        }
    }

    /// The points of the disk; the owner adds edges and marks as they are committed.
    pub fn points(&self) -> &Points {
        &self.points
    }

    pub fn points_mut(&mut self) -> &mut Points {
        &mut self.points
    }

    /// Durable in the backing (grouped: with its sidecar), and on the flash as the drain position.
    pub fn drained(&self) -> u64 {
        self.points.drained()
    }

    /// Epoch of the drain position.
    pub fn drained_epoch(&self) -> u64 {
        self.group.epoch
    }

    /// The newest committed write of this disk; its points may go on behind it.
    pub fn newest(&self) -> u64 {
        self.dirty.head()
    }

    /// Records up to `won` are committed, with `bytes` of log since the last call.
    pub fn committed(&mut self, won: u64, bytes: u64, host: &mut dyn DrainHost) {
        self.points.committed(won.max(self.points.head()));
        self.dirty.committed(won, bytes, host.now());
        self.run(host);
    }

    /// Space in the log runs short: full speed, at once.
    pub fn set_urgent(&mut self, urgent: bool, host: &mut dyn DrainHost) {
        self.pace.urgent = urgent;
        self.run(host);
    }

    /// Thousandths of the log that are dirty, for the pace.
    pub fn set_fill(&mut self, permille: u64) {
        self.pace.fill = permille;
    }

    pub fn set_staleness(&mut self, staleness_max: Duration, host: &mut dyn DrainHost) {
        self.options.staleness_max = staleness_max;
        self.run(host);
    }

    /// Holds from the next group on.
    pub fn set_mode(&mut self, mode: DrainMode) {
        let options = &self.options;
        let can = mode == DrainMode::Ordered || options.away || options.sidecar.is_some();
        assert!(can, "no sidecar");
        self.options.mode = mode;
    }

    pub fn mode(&self) -> DrainMode {
        self.options.mode
    }

    /// Drains up to exactly `to`, or to all that is committed now; `hold`: and stays there until
    /// [`Self::let_go`]. The backing is at that point when `reply` is called.
    pub fn drain(
        &mut self,
        to: Option<u64>,
        hold: bool,
        reply: DrainReply,
        host: &mut dyn DrainHost,
    ) {
        if let Some(to) = to {
            self.stop_at(to);
        }
        let to = to.unwrap_or(self.points.head());
        let lost = self.last_good.filter(|last_good| to > *last_good);
        if let Some(last_good) = lost {
            return reply(Err(DrainError::Corrupt { last_good }));
        }
        if let Err(refusal) = self.reach(to) {
            return reply(Err(DrainError::Refused(refusal)));
        }
        self.hold = if hold { Some(to) } else { self.hold };
        self.waiters.push(Waiter { to, reply });
        self.answer();
        self.run(host);
    }

    /// Whether draining can still stop at `to`: a group that is being brought to the backing goes
    /// there as a whole.
    pub fn reach(&self, to: u64) -> Result<(), Refusal> {
        self.points.reach(to)
    }

    /// The point that draining stays at.
    pub fn held(&self) -> Option<u64> {
        self.hold
    }

    /// Ends a hold.
    pub fn let_go(&mut self, host: &mut dyn DrainHost) {
        self.hold = None;
        self.run(host);
    }

    /// Retires the last group durably: before anybody else writes to the backing. `clean`: all is
    /// drained and the backing alone is the disk from then on.
    pub fn retire(&mut self, clean: bool, reply: DrainReply, host: &mut dyn DrainHost) {
        self.retire_clean |= clean;
        self.retire.push(reply);
        self.run(host);
    }

    /// The time that was asked for by [`DrainHost::wake_at`] may have come.
    pub fn timer(&mut self, host: &mut dyn DrainHost) {
        self.turn = true;
        self.run(host);
        self.turn = false;
    }

    /// An operation of the drainer has ended.
    pub fn completed(&mut self, token: u32, result: Result<(), Errno>, host: &mut dyn DrainHost) {
        if token < TOKEN_ROOT {
            self.reader.completed(token, result);
        } else {
            assert!(self.under_way > 0, "a completion belongs to an operation under way");
            self.under_way -= 1;
            self.ended(token, result, host.now());
        }
        self.run(host);
    }

    fn ended(&mut self, token: u32, result: Result<(), Errno>, now: Nanos) {
        let planned = token.checked_sub(TOKEN_FIRST).map(|index| &self.plan[index as usize]);
        if let (Some(planned), Ok(())) = (planned, result) {
            if planned.disk == BACKING && planned.kind != OperationKind::Flush {
                self.pace.ended(now - planned.submitted);
            }
            if self.state == State::Apply {
                self.drained_bytes += planned.length;
            }
        }
        let Err(errno) = result else { return };
        // A backing that refuses zeros is given them as data from now on, without a pause.
        match planned.map(|planned| planned.kind).filter(|_| errno.is_unsupported()) {
            Some(OperationKind::Zero) => (self.zero_refused, self.refused) = (true, true),
            Some(OperationKind::Discard) => (self.discard_refused, self.refused) = (true, true),
            _ => {}
        }
        self.failure = Some(errno);
    }

    pub fn status(&self, now: Nanos) -> DrainStatus {
        let dirty_bytes = self.dirty.bytes();
        let state = match (self.state, self.last_good, self.trouble) {
            (_, Some(last_good), _) => DrainState::Corrupt { last_good },
            (_, _, Some(errno)) => DrainState::Retrying(errno),
            (State::Idle, ..) => DrainState::Idle,
            _ => DrainState::Draining,
        };
        let eta = dirty_bytes.checked_div(self.pace.rate).map(Duration::from_secs);
        DrainStatus {
            state,
            drained: self.drained(),
            head: self.points.head(),
            goal: self.waiters.iter().map(|waiter| waiter.to).max(),
            dirty_bytes,
            oldest: self.dirty.oldest().map_or(Duration::ZERO, |oldest| now - oldest),
            rate: self.pace.rate,
            eta,
            groups: self.groups,
            retries: self.retries,
            drained_bytes: self.drained_bytes,
        }
    }

    /// Goes on until there is something to wait for.
    fn run(&mut self, host: &mut dyn DrainHost) {
        loop {
            if self.give_up_step() || self.shorten() {
                return;
            }
            let moved = match self.state {
                State::Idle => self.begin(host),
                State::Gather => self.gather(host),
                State::Sum => self.sum(host),
                State::Agree | State::Prepared => self.wait_together(host),
                _ => self.work(host),
            };
            if !moved {
                return;
            }
        }
    }

    /// Looks for something to do.
    fn begin(&mut self, host: &mut dyn DrainHost) -> bool {
        if self.options.away || self.reader.is_busy() || self.is_pausing(host) {
            return false;
        }
        if self.is_finishing() && self.last_good.is_none() {
            self.begin_group(self.redone_to, host);
            return true;
        }
        if self.together.is_some() {
            return self.begin_together(host);
        }
        let clean = self.dirty.is_empty() || self.last_good.is_some();
        if !self.retire.is_empty() && (!self.retire_clean || clean) {
            self.enter(State::Stamp, host);
            return true;
        }
        let Some(limit) = self.limit(host) else {
            self.release_if_clean();
            return false;
        };
        if self.options.mode == DrainMode::Ordered && self.live_group {
            self.enter(State::Stamp, host);
            return true;
        }
        self.begin_group(limit, host);
        true
    }

    fn release_if_clean(&mut self) {
        if self.dirty.is_empty() {
            self.merged.release();
            self.reader.release();
        }
    }

    /// What an earlier process put into the sidecar is brought to the backing.
    fn is_finishing(&self) -> bool {
        self.drained() < self.redone_to
    }

    /// How far the next group may go, if there should be one now.
    fn limit(&self, host: &mut dyn DrainHost) -> Option<u64> {
        let drained = self.drained();
        let waited = self.waiters.iter().map(|waiter| waiter.to).filter(|to| *to > drained).min();
        let closing = self.retire_clean && !self.retire.is_empty();
        let hold = self.hold.filter(|_| !closing).unwrap_or(u64::MAX).max(drained);
        let most = self.points.head().min(hold).min(waited.unwrap_or(u64::MAX));
        if most == drained {
            return None;
        }
        // Damage: only what was asked for, which lies before it.
        if self.last_good.is_some() {
            return waited;
        }
        // What was begun is finished: a part of a request is no point.
        if waited.is_some() || self.pace.urgent || closing || self.group.part {
            return Some(most);
        }
        if self.rest > host.now() {
            host.wake_at(self.rest);
            return None;
        }
        match self.dirty.due(self.options.staleness_max, host.now()) {
            // A point that the guest knows, if there is one.
            Ok(()) => Some(self.points.newest_edge(most).unwrap_or(most)),
            Err(at) => {
                at.into_iter().for_each(|at| host.wake_at(at));
                None
            }
        }
    }

    fn is_pausing(&mut self, host: &mut dyn DrainHost) -> bool {
        match self.pause.filter(|until| *until > host.now()) {
            Some(until) => {
                host.wake_at(until);
                true
            }
            None => {
                self.pause = None;
                false
            }
        }
    }

    /// Something failed: what was being done is done again after a pause.
    fn pause(&mut self, host: &mut dyn DrainHost) {
        let until = host.now() + self.pause_next;
        self.pause_next = (self.pause_next * 2).min(PAUSE_LAST);
        self.pause = Some(until);
    }

    /// Begins a state: plans its operations.
    fn enter(&mut self, state: State, host: &mut dyn DrainHost) {
        self.state = state;
        self.again = false;
        self.next = 0;
        self.plan.clear();
        match state {
            State::Idle | State::Gather | State::Agree | State::Prepared => {}
            State::Sum => self.begin_sum(),
            State::Commit => self.plan_commit(host),
            State::Fill => self.plan_fill(),
            State::Redo => self.plan_redo(host),
            State::RedoFlush | State::CommitFlush | State::StampFlush => {
                self.plan_flush(SIDECAR);
            }
            State::Apply => self.plan_apply(),
            State::ApplyFlush => self.plan_flush(BACKING),
            State::Stamp => self.plan_stamp(host),
            State::Root | State::Claim => {
                self.under_way = 1;
                host.write_root(self.group.to, self.group.epoch, TOKEN_ROOT);
            }
        }
    }

    /// Goes on with the state's operations; true when it has moved to another state.
    fn work(&mut self, host: &mut dyn DrainHost) -> bool {
        if self.is_pausing(host) {
            return false;
        }
        if self.again {
            self.enter(self.state, host);
        }
        if self.failure.is_none() {
            self.issue(host);
        }
        let done = self.next == self.plan.len() || self.failure.is_some();
        if self.under_way > 0 || !done {
            return false;
        }
        match self.failure.take() {
            Some(errno) => self.failed(errno, host),
            None => self.succeeded(host),
        }
        true
    }

    fn issue(&mut self, host: &mut dyn DrainHost) {
        while self.next < self.plan.len() && (self.under_way as usize) < self.pace.depth() {
            let planned = &mut self.plan[self.next];
            planned.submitted = host.now();
            let Planned { disk, kind, offset, length, segments, .. } = planned;
            let operation = Operation { kind: *kind, offset: *offset, length: *length, segments };
            host.submit(*disk, operation, TOKEN_FIRST + self.next as u32);
            self.next += 1;
            self.under_way += 1;
        }
    }

    /// All operations under way have ended, and one failed: the state is begun again. A flush that
    /// failed may have dropped what it should have covered, so that is written again too.
    fn failed(&mut self, errno: Errno, host: &mut dyn DrainHost) {
        self.retries += 1;
        self.again = true;
        let refused = errno.is_unsupported() && std::mem::take(&mut self.refused);
        if !refused {
            self.trouble = Some(errno);
            self.pause(host);
        }
        self.state = match self.state {
            State::Redo | State::RedoFlush => State::Sum,
            State::CommitFlush => State::Commit,
            State::ApplyFlush if !planted(Bug::FailedFlushRetried) => State::Apply,
            State::StampFlush => State::Stamp,
            state => state,
        };
    }

    fn succeeded(&mut self, host: &mut dyn DrainHost) {
        let grouped = self.options.mode == DrainMode::Grouped;
        let finishing = self.is_finishing();
        let next = match self.state {
            State::Idle | State::Gather | State::Sum | State::Agree | State::Prepared => {
                unreachable!("these have no operations of their own")
            }
            State::Fill => {
                self.take_fill();
                self.merged.pack();
                if grouped && !finishing { State::Sum } else { State::Apply }
            }
            State::Redo => State::RedoFlush,
            State::RedoFlush => {
                self.last_group += 1;
                match &self.together {
                    Some(together) => {
                        together.member.prepared();
                        State::Prepared
                    }
                    None => {
                        self.group_counts();
                        State::Apply
                    }
                }
            }
            State::Commit => State::CommitFlush,
            State::CommitFlush => {
                self.finish_commit();
                State::Prepared
            }
            State::Apply if planted(Bug::TailBeforeBackingFlush) => State::Root,
            State::Apply => State::ApplyFlush,
            // Nothing of this disk's own log: no position on flash has changed.
            State::ApplyFlush if self.group.to == self.group.from => {
                self.finish_group(host.now());
                State::Idle
            }
            State::ApplyFlush => State::Root,
            State::Root => {
                self.finish_group(host.now());
                let due = host.now() - self.stamped >= STAMP_INTERVAL || self.dirty.is_empty();
                let stamp = !grouped && due && self.options.sidecar.is_some();
                let stamp = stamp && !self.is_finishing();
                if stamp { State::Stamp } else { State::Idle }
            }
            State::Claim => {
                self.finish_claim();
                State::Idle
            }
            State::Stamp => State::StampFlush,
            State::StampFlush => {
                self.finish_stamp(host.now());
                State::Idle
            }
        };
        let flushed = [State::RedoFlush, State::CommitFlush, State::Root, State::StampFlush];
        if flushed.contains(&self.state) {
            self.trouble = None;
            self.pause_next = PAUSE_FIRST;
        }
        self.enter(next, host);
    }

    /// The group in the sidecar counts: the backing can only go to its end.
    fn group_counts(&mut self) {
        let Group { point, part, part_won, .. } = self.group;
        self.live_group = true;
        self.points.group_committed(if part { part_won } else { point });
    }

    /// The last number of this disk that is drained with the group.
    fn own_after(&self) -> u64 {
        let Group { from, to, .. } = self.group;
        if to > from { to } else { self.own }
    }

    fn finish_group(&mut self, now: Nanos) {
        let Group { point, log_bytes, begun, committed, .. } = self.group;
        self.own = self.own_after();
        self.points.set_drained(point);
        self.dirty.drained(point, log_bytes);
        self.pace.group_ended(log_bytes, now - begun);
        let written = self.dirty.committed_bytes() - committed;
        let staleness = self.options.staleness_max;
        let aged = self.dirty.oldest().is_some_and(|oldest| now - oldest > staleness / 2);
        let rest = self.pace.rest(now - begun, log_bytes, written).min(staleness / 8);
        self.rest = if aged { now } else { now + rest };
        self.groups += 1;
        self.answer();
        self.step_ended();
    }

    /// Answers those whose point has come.
    fn answer(&mut self) {
        let drained = self.drained();
        let there = |waiter: &mut Waiter| waiter.to <= drained;
        for waiter in self.waiters.extract_if(.., there) {
            (waiter.reply)(Ok(drained));
        }
    }

    /// The log is damaged behind the last record that was gathered.
    fn corrupt(&mut self) {
        let last_good = self.group.to;
        self.last_good = Some(last_good);
        self.positioned = false;
        self.state = State::Idle;
        self.group.to = self.group.from;
        self.group.part = false;
        self.merged.clear();
        let lost = |waiter: &mut Waiter| waiter.to > last_good;
        for waiter in self.waiters.extract_if(.., lost) {
            (waiter.reply)(Err(DrainError::Corrupt { last_good }));
        }
        self.abandon_step();
    }
}

#[cfg(test)]
#[path = "drain_test.rs"]
mod tests;
