//! The cached disk: journal, reads, drainer and roots put together as one volume.
//!
//! Every call ends in `settle`, which lets each part take up what the others have done: what has
//! come to count is told to the drainer, what is drained makes segments clean, clean ones make
//! room, and room lets parked writes go on.

use super::around::Arounds;
use super::change::{Changing, Goal};
use super::clean::Clean;
use super::consistency::Member;
use super::core::{Core, FencePolicy, Token};
use super::curve::{Sampler, blocks_of};
use super::drain::{
    DrainHost, DrainOptions, DrainReply, DrainState, Drainer, LogCursor, LogStretch, SidecarState,
};
use super::journal::{Journal, Pending};
use super::memory::DrainMemory;
use super::message::{CacheMessage, Reply};
use super::patience::Patience;
use super::read::Reads;
use super::recover::Opened;
use super::resize::Resizing;
use super::rewrite::REWRITE;
use super::root::Mode;
use super::roots::{RootWish, Roots};
use super::status::{CacheGauges, CacheState, CacheStatus, count};
use crate::backing::stamp::DrainMode;
use crate::base::clock::{Nanos, unix_ms};
use crate::base::planted::{Bug, planted};
use crate::base::{Error, ErrorKind, Result};
use crate::io::disk::{DiskGeometry, Errno, Operation};
use crate::io::volume::{DiskIndex, Io, Outcome, Request, RequestId, RequestKind, Volume};
use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How a cached disk is to behave; all of it can be changed while it runs.
#[derive(Clone, Debug)]
pub struct CacheOptions {
    /// Names the disk in messages.
    pub name: String,
    /// A write is durable when it is acknowledged; else when the guest has flushed.
    pub strong: bool,
    pub drain: DrainMode,
    /// While the backing answers, no write is older than this before it is drained.
    pub staleness_max: Duration,
    /// How long a request that needs the backing is tried there before it fails.
    pub backing_timeout: Duration,
    /// Bytes a day that may be written to the flash before what is read is not kept any more.
    /// `None`: no limit.
    pub write_budget: Option<u64>,
    pub fence: FencePolicy,
    /// All that have the disk read it, and so does everybody else who opens the backing: what is
    /// kept of it outlives the daemon in [`Mode::ReadOnly`] too.
    pub golden: bool,
    /// What all cached disks of a daemon share while they drain.
    pub memory: Arc<DrainMemory>,
    /// Milliseconds of the Unix epoch.
    pub wall_ms: fn() -> u64,
    /// The clock that the disk's reactor goes by, at the moment of opening.
    pub now: fn() -> Nanos,
}

impl CacheOptions {
    /// Strong, ordered, ten seconds.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            strong: true,
            drain: DrainMode::Ordered,
            staleness_max: Duration::from_secs(10),
            backing_timeout: Duration::from_secs(60),
            write_budget: None,
            fence: FencePolicy::Fail,
            golden: false,
            memory: DrainMemory::of_daemon(),
            wall_ms: unix_ms,
            now: Nanos::now,
        }
    }
}

/// How often gauges are brought up to date, at most.
const GAUGES_EVERY: Duration = Duration::from_millis(5);

/// Of batches: what is drained stays where it is, in slots of a block each.
fn alignment(flash: DiskGeometry) -> u32 {
    flash.block_bytes.max(super::layout::BLOCK_BYTES as u32)
}

/// How often the gauges read the curve anew.
const CURVE_EVERY: Duration = Duration::from_secs(1);

/// After so long what the curve has seen counts half, so that it follows the guest.
const CURVE_HALVES: Duration = Duration::from_secs(1800);

/// See the module.
pub struct CachedDisk {
    pub(super) core: Core,
    drainer: Drainer,
    options: CacheOptions,
    /// A mode change or detach under way.
    changing: Option<Changing>,
    /// Another size is on its way.
    pub(super) resizing: Option<Resizing>,
    /// Wait until their mark is durable.
    marks: Vec<(String, u64, Reply<Result<u64>>)>,
    named: Vec<(String, Reply<Result<u64>>)>,
    checkpoints: Vec<Reply<Result<()>>>,
    /// Exactly where to, or all; wait until the log is durable that far.
    drains: Vec<(Option<u64>, u64, bool, DrainReply)>,
    urgent: bool,
    closed: bool,
    gauges_at: Option<Nanos>,
    curve: CurveGauge,
}

/// What the gauges say of the curve.
struct CurveGauge {
    /// When it was read, and when it was halved.
    at: Nanos,
    halved: Nanos,
    hits: [u64; 2],
}

/// The disk as its drainer sees it.
pub(super) struct Host<'a> {
    core: &'a mut Core,
    io: &'a mut dyn Io,
    wall_ms: fn() -> u64,
}

impl DrainHost for Host<'_> {
    fn now(&self) -> Nanos {
        self.io.now()
    }

    fn wall_ms(&self) -> u64 {
        (self.wall_ms)()
    }

    fn seek(&self, won: u64) -> LogCursor {
        self.core.segments.seek(won)
    }

    fn log(&self, cursor: LogCursor) -> LogStretch {
        self.core.segments.stretch(cursor)
    }

    fn frontier(&self) -> u64 {
        self.core.journal.frontier()
    }

    fn place(&self, offset: u64, length: u64) -> (u64, u64) {
        let part = self.core.place.parts(offset, length).next().expect("a range has a part");
        (part.offset, part.length)
    }

    fn submit(&mut self, disk: DiskIndex, operation: Operation<'_>, token: u32) {
        self.io.submit(disk, operation, Token::Drain.pack(token));
    }

    fn write_root(&mut self, won: u64, epoch: u64, token: u32) {
        let root = &mut self.core.roots.root;
        (root.drained_through, root.drained_epoch) = (won, epoch);
        self.core.write_root(RootWish::Drain { token }, self.io);
    }

    fn wake_at(&mut self, at: Nanos) {
        self.core.wake_at(at, self.io);
    }
}

impl CachedDisk {
    /// A disk that goes on where `opened` was. `backing` is the geometry of disk 1; `sidecar`, if
    /// there is one, is disk 2. If it was opened alone, both are to come.
    pub fn new(
        opened: Opened,
        options: CacheOptions,
        backing: DiskGeometry,
        sidecar: Option<SidecarState>,
    ) -> Self {
        let Opened { root, place, flash, segments, index, head, .. } = opened;
        let (now, has_sidecar) = ((options.now)(), sidecar.is_some());
        let drain = DrainOptions {
            mode: options.drain,
            staleness_max: options.staleness_max,
            backing,
            sidecar,
            drained: opened.drained,
            drained_epoch: opened.drained_epoch,
            head: head.durable_through,
            dirty_bytes: opened.dirty_bytes,
            away: root.alone_since.is_some(),
            memory: options.memory.clone(),
        };
        let mut drainer = Drainer::new(drain, now);
        opened.edges.iter().for_each(|(won, epoch)| drainer.points_mut().edge(*won, *epoch));
        opened.marks.iter().for_each(|(name, won)| _ = drainer.points_mut().mark(name, *won));
        let mut core = Core {
            name: options.name.clone(),
            shape: root.shape,
            place,
            flash,
            backing,
            sidecar: has_sidecar,
            index,
            segments,
            slots: Vec::new(),
            journal: Journal::new(head, options.strong, alignment(flash)),
            reads: Reads::default(),
            mode: root.mode,
            arounds: Arounds::new(root.mode),
            golden: options.golden,
            clean: Clean::new(root.shape, root.incarnation, options.write_budget),
            roots: Roots::new(root),
            status: Arc::new(CacheStatus::default()),
            switching: false,
            settling: false,
            frozen: false,
            policy: options.fence,
            fenced: opened.fence,
            held: Vec::new(),
            patience: Patience::new(options.backing_timeout),
            origins: opened.origins,
            wake: None,
            drained: opened.drained,
            sampler: Sampler::default(),
        };
        core.adopt_slabs(opened.slabs);
        Self {
            core,
            drainer,
            options,
            changing: None,
            resizing: None,
            marks: Vec::new(),
            named: Vec::new(),
            checkpoints: Vec::new(),
            drains: Vec::new(),
            urgent: false,
            closed: false,
            gauges_at: None,
            curve: CurveGauge { at: now, halved: now, hits: [0; 2] },
        }
    }

    /// The disk is a member of a consistency group from now on; it is not served yet.
    pub fn join(&mut self, member: Member) {
        self.core.journal.numbers = Some(member.numbers());
        if !planted(Bug::GoneAlone) {
            self.drainer.join(member);
        }
    }

    pub fn status(&self) -> Arc<CacheStatus> {
        self.core.status.clone()
    }

    /// The drainer and the rest of the disk, for a call of the one with the other.
    fn split<'a>(&'a mut self, io: &'a mut dyn Io) -> (&'a mut Drainer, Host<'a>) {
        let wall_ms = self.options.wall_ms;
        (&mut self.drainer, Host { core: &mut self.core, io, wall_ms })
    }

    /// Lets every part take up what the others have done.
    fn settle(&mut self, io: &mut dyn Io) {
        self.tell_drainer(io);
        let drained = self.drainer.drained();
        if drained > self.core.drained {
            self.core.drained = drained;
            self.core.segments.drained(drained);
            self.core.answer(io);
        }
        self.change(io);
        self.resize(io);
        if self.core.is_fenced() {
            self.let_down();
        }
        self.core.make_room(io);
        self.resize(io);
        self.core.pump(io);
        self.tell_drainer(io);
        self.drainer.set_fill(self.core.segments.counts().dirty_permille());
        let urgent = self.core.is_short() || self.core.mode == Mode::WriteThrough;
        if urgent != self.urgent {
            self.urgent = urgent;
            let (drainer, mut host) = self.split(io);
            drainer.set_urgent(urgent, &mut host);
        }
        self.look_for_damage(io);
        self.gauge_soon(io);
    }

    /// The disk is fenced: who waits for the log to go on is told.
    fn let_down(&mut self) {
        let text = format!("{}: the disk is fenced", self.core.name);
        let error = || Error::new(ErrorKind::Fenced, text.clone());
        self.named.drain(..).for_each(|(_, reply)| reply(Err(error())));
        self.checkpoints.drain(..).for_each(|reply| reply(Err(error())));
        self.marks.drain(..).for_each(|(_, _, reply)| reply(Err(error())));
    }

    /// What has come to count, and what of it is durable.
    fn tell_drainer(&mut self, io: &mut dyn Io) {
        let news = &mut self.core.journal.news;
        for (won, epoch) in news.edges.drain(..) {
            self.drainer.points_mut().edge(won, epoch);
        }
        for (name, won) in news.marks.drain(..) {
            let at = self.named.iter().position(|(other, _)| *other == name);
            if let Some(at) = at {
                let (name, reply) = self.named.swap_remove(at);
                self.marks.push((name, won, reply));
            }
        }
        if !std::mem::take(&mut news.durable) {
            return;
        }
        let bytes = std::mem::take(&mut news.bytes);
        let won = self.core.journal.durable_through;
        if won > self.drainer.newest() {
            let (drainer, mut host) = self.split(io);
            drainer.committed(won, bytes, &mut host);
        }
        self.begin_drains(io);
        self.answer_marks();
    }

    fn answer_marks(&mut self) {
        for (name, won, reply) in std::mem::take(&mut self.marks) {
            if !self.core.journal.is_durable() && won >= self.core.journal.durable_through {
                self.marks.push((name, won, reply));
            } else if self.drainer.points_mut().mark(&name, won) {
                reply(Ok(won));
            } else {
                let text = format!("{}: there are too many marks", self.core.name);
                reply(Err(Error::new(ErrorKind::Full, text)));
            }
        }
    }

    /// The drainer verifies all that it reads: what it finds damaged fences the disk.
    fn look_for_damage(&mut self, io: &mut dyn Io) {
        if self.core.is_fenced() {
            return;
        }
        if let DrainState::Corrupt { last_good } = self.drainer.status(io.now()).state {
            let text = format!(
                "the log is damaged behind point {last_good}, the last good one: drain to it, or \
                 detach the disk as lost"
            );
            self.core.fence(text, io);
        }
    }

    /// Brings the gauges up to date: now, or in a moment if they were a moment ago. What comes
    /// last before a rest is told too.
    fn gauge_soon(&mut self, io: &mut dyn Io) {
        let now = io.now();
        match self.gauges_at.map(|at| at + GAUGES_EVERY).filter(|&due| now < due) {
            Some(due) => self.core.wake_at(due, io),
            None => self.gauge(now),
        }
    }

    fn gauge(&mut self, now: Nanos) {
        self.gauges_at = Some(now);
        self.gauge_curve(now);
        let core = &self.core;
        let drain = self.drainer.status(now);
        let state = match (&core.fenced, drain.state, self.closed) {
            (_, _, true) => CacheState::Closed,
            (Some(why), ..) => CacheState::Fenced(why.clone()),
            (_, DrainState::Retrying(_), _) => CacheState::WaitingForBacking,
            _ if core.is_alone() => CacheState::WaitingForBacking,
            _ if core.patience.is_failing() => CacheState::WaitingForBacking,
            (_, DrainState::Draining, _) => CacheState::Draining,
            _ => CacheState::Serving,
        };
        let counters = &core.status.counters;
        counters.drain_bytes.store(drain.drained_bytes, Ordering::Relaxed);
        counters.drain_groups.store(drain.groups, Ordering::Relaxed);
        counters.drain_retries.store(drain.retries, Ordering::Relaxed);
        let policy = core.clean.policy.counters();
        counters.evicted.store(policy.evicted, Ordering::Relaxed);
        counters.bypassed.store(policy.bypassed, Ordering::Relaxed);
        counters.fills_refused.store(policy.refused, Ordering::Relaxed);
        core.status.set(CacheGauges {
            state,
            dirty_bytes: drain.dirty_bytes,
            oldest_dirty: drain.oldest,
            segments: core.segments.counts(),
            segment_bytes: core.shape.segment_bytes,
            head_won: core.journal.durable_through,
            drained_won: drain.drained,
            epoch: core.journal.epoch,
            drain_rate: drain.rate,
            drain_eta: drain.eta,
            index_bytes: core.index.memory_bytes() as u64,
            index_pieces: core.index.len() as u64,
            clean_bytes: core.clean.slabs.live() * super::layout::BLOCK_BYTES,
            probation_bytes: core.clean.held_bytes() as u64,
            backing_faster: core.clean.is_past(),
            policy_bytes: core.clean.memory_bytes() as u64,
            budget_used_up: core.clean.policy.is_over_budget(),
            flash_failing: core.clean.is_flash_failing(),
            parked: core.parked(),
            waiting_for_backing: core.patience.waiting() as u64,
            mode: core.mode,
            size_bytes: core.roots.root.shape.allocation_bytes,
            curve_hits: self.curve.hits,
            resizing_to: self.resizing.as_ref().map(Resizing::to_bytes),
        });
    }

    fn gauge_curve(&mut self, now: Nanos) {
        if now.since(self.curve.halved) >= CURVE_HALVES {
            self.curve.halved = now;
            self.core.sampler.age();
        }
        if now.since(self.curve.at) < CURVE_EVERY {
            return;
        }
        self.curve.at = now;
        let curve = self.core.sampler.curve();
        let blocks = blocks_of(self.core.roots.root.shape.allocation_bytes);
        let hits = |blocks| ((1.0 - curve.miss_ratio(blocks)) * 1e6) as u64;
        self.curve.hits = [blocks, blocks * 2].map(hits);
    }

    fn write(&mut self, id: u32, replayed: bool, io: &mut dyn Io) {
        let core = &mut self.core;
        let slot = &core.slots[id as usize];
        if slot.ranges.is_empty() {
            return core.end(id, Outcome::Done, io);
        }
        let known = replayed && core.is_in_log(slot.origin);
        if known && !planted(Bug::ReplayedTwice) {
            count(&core.status.counters.replayed, 1);
            return core.answer_replayed(id, io);
        }
        if core.mode.journals() || core.switching {
            core.journal.pending.push_back(Pending::Request(id));
        } else {
            core.around(id, io);
        }
    }

    /// Does what it is told.
    pub(super) fn order(&mut self, message: CacheMessage, io: &mut dyn Io) {
        match message {
            CacheMessage::Drain { to, hold, reply } => {
                // Only what is durable in the log can be drained.
                let journal = &mut self.core.journal;
                let covers = to.unwrap_or(journal.counted_won);
                let ahead = covers > journal.durable_through && covers <= journal.counted_won;
                journal.flush_wanted |= ahead;
                self.drains.push((to, covers, hold, reply));
                self.begin_drains(io);
            }
            CacheMessage::LetGo => {
                let (drainer, mut host) = self.split(io);
                drainer.let_go(&mut host);
            }
            CacheMessage::Points { reply } => reply(self.drainer.points().list()),
            CacheMessage::Mark { name, reply } => self.mark(name, reply),
            CacheMessage::Checkpoint { reply } => {
                self.checkpoints.push(reply);
                if !self.core.ask_save() {
                    self.core.write_root(RootWish::Checkpoint, io);
                }
            }
            CacheMessage::SetMode { mode, reply } => self.begin_change(Goal::Mode(mode), reply),
            CacheMessage::SetDrainMode { mode } => self.drainer.set_mode(mode),
            CacheMessage::SetDurability { strong } => {
                self.options.strong = strong;
                self.core.journal.strong = strong || self.core.journal.strict;
                self.core.journal.flush_wanted = true;
            }
            CacheMessage::SetStaleness { staleness_max } => {
                let (drainer, mut host) = self.split(io);
                drainer.set_staleness(staleness_max, &mut host);
            }
            CacheMessage::Grow { place, reply } => self.begin_grow(place, reply),
            CacheMessage::Shrink { size_bytes, reply } => self.begin_shrink(size_bytes, reply),
            CacheMessage::Shrunk => self.resizing = None,
            CacheMessage::SetBackingTimeout { limit } => self.core.patience.limit = limit,
            CacheMessage::SetWriteBudget { bytes_per_day } => {
                self.options.write_budget = bytes_per_day;
                self.core.clean.policy.set_write_budget(bytes_per_day);
            }
            CacheMessage::Close { reply } => self.begin_change(Goal::Close, reply),
            CacheMessage::Leave { reply } => self.begin_change(Goal::Leave, reply),
            CacheMessage::Wake => {
                let (drainer, mut host) = self.split(io);
                drainer.timer(&mut host);
            }
            CacheMessage::Claimed { backing } => self.claimed(*backing, io),
            CacheMessage::Refused { why } => self.core.fence(why, io),
            CacheMessage::Curve { reply } => reply(self.core.sampler.curve()),
            CacheMessage::Status { reply } => {
                self.gauge(io.now());
                reply(());
            }
        }
    }

    /// Gives the drainer what it can do now.
    fn begin_drains(&mut self, io: &mut dyn Io) {
        for (to, covers, hold, reply) in std::mem::take(&mut self.drains) {
            let journal = &self.core.journal;
            if covers > journal.durable_through && covers <= journal.counted_won {
                self.drains.push((to, covers, hold, reply));
                continue;
            }
            let (drainer, mut host) = self.split(io);
            drainer.drain(to, hold, reply, &mut host);
        }
    }

    fn mark(&mut self, name: String, reply: Reply<Result<u64>>) {
        let text = if name.is_empty() || name.len() > super::layout::NAME_BYTES_MAX {
            format!("`{name}` is no name for a point: 1 to 255 bytes")
        } else if !self.core.mode.journals() || self.core.switching || self.core.is_fenced() {
            format!("{}: no points are kept now", self.core.name)
        } else {
            self.core.journal.pending.push_back(Pending::Mark(name.clone()));
            self.named.push((name, reply));
            return;
        };
        reply(Err(Error::new(ErrorKind::Invalid, text)));
    }

    /// A root is durable.
    fn rooted(&mut self, wish: RootWish, io: &mut dyn Io) {
        match wish {
            RootWish::Drain { token } => {
                let (drainer, mut host) = self.split(io);
                drainer.completed(token, Ok(()), &mut host);
            }
            RootWish::Change => self.change_rooted(io),
            RootWish::Tables => self.core.saved(io),
            RootWish::Cold => {}
            RootWish::Resize => self.resize_rooted(io),
            RootWish::Checkpoint => {
                self.checkpoints.drain(..).for_each(|reply| reply(Ok(())));
            }
        }
    }
}

/// Where the flash only holds copies.
impl CachedDisk {
    /// A root cannot be written.
    fn refused(&mut self, wish: RootWish, io: &mut dyn Io) {
        match wish {
            RootWish::Drain { .. } => unreachable!("what is drained was only on the flash"),
            RootWish::Change => self.change_refused(io),
            RootWish::Resize => self.resize_refused(),
            // The tables are as they were said to be before.
            RootWish::Tables => self.core.end_save(io),
            RootWish::Cold => {}
            RootWish::Checkpoint => {
                let error = || self.core.refused_by_flash("there is no checkpoint");
                self.checkpoints.drain(..).for_each(|reply| reply(Err(error())));
            }
        }
    }
}

impl Volume for CachedDisk {
    fn attach(&mut self, requests_max: u32) {
        self.core.attach(requests_max);
        self.gauge(self.curve.at);
    }

    fn submit(&mut self, request: Request<'_>, io: &mut dyn Io) {
        let id = self.core.take(&request);
        if self.core.is_fenced() || self.closed {
            return self.core.refuse(id, io);
        }
        self.core.watch(id);
        match request.kind {
            RequestKind::Read if request.ranges.iter().all(|range| range.count == 0) => {
                self.core.end(id, Outcome::Done, io);
            }
            RequestKind::Read => self.core.read(id, io),
            RequestKind::Flush => self.core.flush(id, io),
            _ => self.write(id, request.origin.replayed, io),
        }
    }

    fn gathered(&mut self, io: &mut dyn Io) {
        self.settle(io);
    }

    fn completed(&mut self, token: u64, result: std::result::Result<(), Errno>, io: &mut dyn Io) {
        let (kind, number) = Token::unpack(token);
        match kind {
            Token::Append => self.core.append_completed(number, result, io),
            Token::Read => {
                let hit = self.core.read_completed(number, result, io);
                // Nobody waits for that, but a segment that is to be emptied.
                let awaited = self.core.is_emptying() || self.is_changing();
                if hit && !awaited && self.resizing.is_none() {
                    return;
                }
            }
            Token::Root => match self.core.root_completed(result, io) {
                Ok(wishes) => wishes.into_iter().for_each(|wish| self.rooted(wish, io)),
                Err(wishes) => wishes.into_iter().for_each(|wish| self.refused(wish, io)),
            },
            Token::Flush if number == REWRITE => self.core.rewrite_completed(result, io),
            Token::Flush => self.core.flush_completed(result, io),
            Token::Summary => self.core.summary_completed(number),
            Token::Around => self.core.around_completed(number, result, io),
            Token::Change => self.change_flushed(result, io),
            Token::Fill => self.core.fill_completed(number, result, io),
            Token::Table => self.core.table_completed(number, result, io),
            Token::Drain => {
                let (drainer, mut host) = self.split(io);
                drainer.completed(number, result, &mut host);
            }
        }
        self.settle(io);
    }

    fn timer(&mut self, io: &mut dyn Io) {
        self.core.wake = None;
        self.core.flush_if_due(io);
        self.core.try_backing(io);
        let (drainer, mut host) = self.split(io);
        drainer.timer(&mut host);
        if let Some(due) = self.core.journal.flush_due {
            self.core.wake_at(due, io);
        }
        self.settle(io);
    }

    fn let_go(&mut self, request: RequestId, io: &mut dyn Io) -> bool {
        let forgotten = self.core.forget(request.0, io);
        if forgotten {
            self.settle(io);
        }
        forgotten
    }

    fn message(&mut self, message: Box<dyn Any + Send>, io: &mut dyn Io) {
        match message.downcast::<CacheMessage>() {
            Ok(message) => self.order(*message, io),
            Err(_) => log::error!("{}: a message for another kind of disk", self.core.name),
        }
        self.settle(io);
    }

    fn set_write_cache(&mut self, enabled: bool) {
        let journal = &mut self.core.journal;
        journal.strict = !enabled;
        journal.strong = self.options.strong || !enabled;
        journal.flush_wanted = true;
    }
}

/// How changes of the whole disk (`change.rs`) reach its parts.
impl CachedDisk {
    pub(super) fn parts(&mut self) -> (&mut Core, &mut Option<Changing>, &mut bool) {
        (&mut self.core, &mut self.changing, &mut self.closed)
    }

    pub(super) fn member(&self) -> Option<&Member> {
        self.drainer.member()
    }

    /// The point that draining is held at.
    pub(super) fn held(&self) -> Option<u64> {
        self.drainer.held()
    }

    /// A mode change or the detach is under way, or was carried out.
    pub(super) fn is_changing(&self) -> bool {
        self.changing.is_some() || self.closed
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// A mark was dropped, since the disk keeps no points any more.
    pub(super) fn unmark(&mut self, name: &str) {
        let text = format!("{}: no points are kept now", self.core.name);
        let at = self.named.iter().position(|(other, _)| other == name);
        if let Some(at) = at {
            let (_, reply) = self.named.swap_remove(at);
            reply(Err(Error::new(ErrorKind::Invalid, text)));
        }
    }

    pub(super) fn drainer<'a>(&'a mut self, io: &'a mut dyn Io) -> (&'a mut Drainer, Host<'a>) {
        self.split(io)
    }
}

#[cfg(test)]
#[path = "disk_test.rs"]
pub(in crate::cache) mod tests;

#[cfg(test)]
#[path = "disk_room_test.rs"]
mod room_tests;

#[cfg(test)]
#[path = "disk_many_test.rs"]
mod many_tests;

#[cfg(test)]
#[path = "disk_fault_test.rs"]
mod fault_tests;

#[cfg(test)]
#[path = "disk_kill_test.rs"]
mod kill_tests;
