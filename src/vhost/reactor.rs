//! A reactor: one thread, one io_uring, and every queue of the exports it serves.
//!
//! A turn takes requests from the rings of *hot* exports, hands operations to the kernel in one
//! system call, and shows guests what has ended. With nothing to do it spins for a while, guests'
//! kicks suppressed, then asks for kicks and sleeps in the ring.
//!
//! How long it spins adapts as halt polling does: doubled when something came soon after falling
//! asleep, halved when nothing did. With many operations under way it does not spin: completions
//! and requests pile up while it sleeps, and one waking takes care of them all.

use super::bell::Bell;
use super::door::{AddDoor, QueueId};
use super::fault;
use super::mailbox::{Inbox, Mailbox, mailbox};
use super::memory::{MemoryTable, Region};
use super::queue::{Queue, QueueSetup};
use super::served::{Disks, Lent, Served};
use crate::base::clock::Nanos;
use crate::base::planted::{Bug, planted};
use crate::base::{Error, ErrorKind, Result};
use crate::io::disk::{Completion, DiskTarget, Waker};
use crate::io::uring::{Ended, Ring};
use crate::io::volume::TOKEN_BITS;
use crate::qos::Limits;
use std::any::Any;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, sync_channel};
use std::time::Duration;

/// Exports of one reactor.
pub const SLOTS_MAX: usize = 1024;

const SLOT_SHIFT: u32 = TOKEN_BITS;
const SLOT_BITS: u32 = SLOTS_MAX.ilog2();
const KIND_SHIFT: u32 = SLOT_SHIFT + SLOT_BITS;

/// Completions taken before guests are shown them: one after a sleep, so that the guest wakes while
/// we go on, then twice as many each time up to this.
const PUBLISH_MAX: usize = 8;

const KIND_OPERATION: u64 = 0;
const KIND_KICK: u64 = 1;
const KIND_INBOX: u64 = 2;
const KIND_IGNORED: u64 = 3;

/// Operations under way from which on spinning does not pay.
const DEPTH_HEAVY: u32 = 6;

/// How long the reactor may spin, at most.
const SPIN_MAX: Duration = Duration::from_micros(100);
const SPIN_FIRST: Duration = Duration::from_micros(8);

/// Names a door of an export: its reactor, its slot there, which export of that slot it is, and the
/// door's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExportId {
    pub(super) reactor: u16,
    pub(super) slot: u16,
    pub(super) generation: u32,
    pub(super) door: u16,
}

/// What control and the socket thread ask of a reactor. Messages arrive in order.
pub enum Message {
    /// Serve an export in a free slot.
    Add {
        slot: u16,
        generation: u32,
        export: Box<AddExport>,
        reply: Sender<Result<()>>,
    },
    /// One more door to an export.
    AddDoor {
        slot: u16,
        door: Box<AddDoor>,
    },
    /// Its queues must have been stopped.
    RemoveDoor {
        slot: u16,
        door: u16,
    },
    /// Stop serving; the slot's queues must have been stopped. Answered by [`Event::Removed`] once
    /// nothing is under way.
    Remove {
        slot: u16,
    },
    StartQueue {
        slot: u16,
        setup: Box<QueueSetup>,
        reply: Sender<Result<()>>,
    },
    /// Answered by [`Event::QueueStopped`] once its requests have ended; with `leave`, those that
    /// only wait are left to the in-flight area.
    StopQueue {
        slot: u16,
        queue: QueueId,
        leave: bool,
    },
    /// The front end of a queue that is being stopped has gone: what only waits is left.
    LetGo {
        slot: u16,
        queue: QueueId,
    },
    SetCall {
        slot: u16,
        queue: QueueId,
        call: Option<File>,
    },
    SetError {
        slot: u16,
        queue: QueueId,
        error: Option<File>,
    },
    /// For all doors.
    SetCapacity {
        slot: u16,
        sectors: u64,
    },
    SetWriteCache {
        slot: u16,
        door: u16,
        enabled: bool,
    },
    /// The memory of a door's front end from now on; its queues stand still. Only where memory is
    /// to be pinned.
    SetMemory {
        slot: u16,
        door: u16,
        memory: MemoryTable,
    },
    /// A region of it has been pinned. It may be another door's by now, or nobody's.
    Pinned {
        slot: u16,
        generation: u32,
        door: u16,
        region: Arc<Region>,
    },
    /// From control, which may not know yet that the export is gone: the slot may be another's by
    /// now, whose `generation` is not this one.
    SetLimits {
        slot: u16,
        generation: u32,
        door: u16,
        limits: Limits,
    },
    /// As `SetLimits`: takes the places of the disks that are away, in order.
    GiveDisks {
        slot: u16,
        generation: u32,
        disks: Vec<DiskTarget>,
        reply: Sender<Result<()>>,
    },
    /// As `SetLimits`.
    Volume {
        slot: u16,
        generation: u32,
        message: Box<dyn Any + Send>,
    },
    /// A disk with threads of its own has completed something for an export of this slot.
    Poll {
        slot: u16,
    },
    /// Answers, to show that the thread goes on.
    Ping {
        reply: Sender<()>,
    },
    /// Ends the thread; all exports must have been removed.
    Stop,
}

pub struct AddExport {
    pub name: String,
    pub volume: Box<dyn crate::io::volume::Volume>,
    pub disks: Vec<DiskTarget>,
    /// The first.
    pub door: AddDoor,
}

/// What a reactor tells the socket thread.
pub enum Event {
    /// A queue has no request under way any more; it goes on at `base`.
    QueueStopped { reactor: u16, slot: u16, queue: QueueId, base: u16 },
    /// Nothing of an export that was to be removed is left: its slot is free.
    Removed { reactor: u16, slot: u16 },
    /// The volume has failed by a defect and is not called any more.
    Fenced { export: ExportId, reason: String },
    /// The front end behind that door cut guest memory short; its connection must go.
    Faulted { export: ExportId },
    /// Memory of the front end behind that door is not pinned, though it should be.
    NotPinned { export: ExportId, reason: String },
}

/// What a slot holds besides the export.
struct Slot {
    served: Served,
    /// Of [`ExportId`].
    generation: u32,
    /// Rings are looked at in every turn.
    hot: bool,
    last_request: Nanos,
    stopping: Vec<QueueId>,
    removing: bool,
    /// Tells the polls of successive queues apart.
    kick_generation: u32,
    /// Tokens of the polls of running queues.
    kicks: Vec<(QueueId, u64)>,
    /// A [`Message::Poll`] is on its way.
    poll_sent: Arc<AtomicBool>,
}

impl Slot {
    /// By its first door.
    fn id(&self, reactor: u16, slot: u16) -> ExportId {
        ExportId { reactor, slot, door: 0, generation: self.generation }
    }
}

pub struct Reactor {
    index: u16,
    ring: Ring,
    bell: Rc<Bell>,
    inbox: Inbox<Message>,
    /// Into this inbox.
    own: Mailbox<Message>,
    events: Mailbox<Event>,
    slots: Vec<Option<Slot>>,
    hot: Vec<u16>,
    ready: Vec<(u16, Completion)>,
    now: Nanos,
    last_work: Nanos,
    spin: Duration,
    /// Completions that are taken next before guests are shown them.
    publish: usize,
    /// The most operations under way of late; fades with each sleep.
    depth: u32,
    /// Of [`fault::count`] when queues were last looked at; `None`: they must be.
    faults: Option<usize>,
    stop: bool,
}

/// Starts a reactor thread, on `cpu` if one is given.
pub fn start(
    index: u16,
    cpu: Option<usize>,
    events: Mailbox<Event>,
) -> Result<(Mailbox<Message>, std::thread::JoinHandle<()>)> {
    let (sender, inbox) = mailbox()?;
    let (started, result) = sync_channel(1);
    let own = sender.clone();
    let thread = std::thread::Builder::new()
        .name(format!("reactor-{index}"))
        .spawn(move || match Reactor::new(index, cpu, (inbox, own), events) {
            Ok(mut reactor) => {
                let _ = started.send(Ok(()));
                if catch_unwind(AssertUnwindSafe(|| reactor.run())).is_err() {
                    // Rings would stand still for ever; a restart replays what is under way.
                    log::error!("reactor {index} failed (see the panic above): vflashd ends");
                    std::process::abort();
                }
            }
            Err(error) => {
                let _ = started.send(Err(error));
            }
        })
        .map_err(|error| Error::io("cannot start a reactor thread", error))?;
    let gone = |_| Error::new(ErrorKind::Gone, "a reactor thread ended while starting");
    result.recv().map_err(gone)??;
    Ok((sender, thread))
}

impl Reactor {
    fn new(
        index: u16,
        cpu: Option<usize>,
        (inbox, own): (Inbox<Message>, Mailbox<Message>),
        events: Mailbox<Event>,
    ) -> Result<Self> {
        if let Some(cpu) = cpu {
            pin(cpu)?;
        }
        let mut ring = Ring::new()?;
        ring.poll(inbox.event(), KIND_INBOX << KIND_SHIFT);
        Ok(Self {
            index,
            ring,
            bell: Rc::new(Bell::new()?),
            inbox,
            own,
            events,
            slots: (0..SLOTS_MAX).map(|_| None).collect(),
            hot: Vec::with_capacity(SLOTS_MAX),
            ready: Vec::new(),
            now: Nanos::now(),
            last_work: Nanos::default(),
            spin: Duration::ZERO,
            publish: 1,
            depth: 0,
            faults: None,
            stop: false,
        })
    }

    fn run(&mut self) {
        while !self.stop {
            self.turn();
        }
    }

    fn turn(&mut self) {
        self.now = Nanos::now();
        let mut work = self.serve();
        if self.ring.queued() > 0 || self.ring.ready() {
            self.ring.submit();
        }
        work += self.reap();
        if work == 0 {
            if self.now - self.last_work < self.spin_budget() {
                std::hint::spin_loop();
                return;
            }
            self.sleep();
            self.publish = 1;
            work += self.reap();
        }
        self.settle();
        if work > 0 {
            self.last_work = self.now;
        }
    }

    /// Takes requests from the rings of hot exports.
    fn serve(&mut self) -> usize {
        let mut taken = 0;
        for at in 0..self.hot.len() {
            let index = self.hot[at];
            taken += self.with(index, |slot, lent| {
                let taken = slot.served.serve(lent);
                if taken > 0 {
                    slot.last_request = lent.now;
                }
                taken
            });
        }
        taken
    }

    /// Runs `call` on a slot's export with what the reactor lends it.
    fn with<R: Default>(
        &mut self,
        index: u16,
        call: impl FnOnce(&mut Slot, &mut Lent<'_>) -> R,
    ) -> R {
        let Some(slot) = self.slots.get_mut(usize::from(index)).and_then(Option::as_mut) else {
            return R::default();
        };
        let mut lent = Lent {
            ring: &mut self.ring,
            ready: &mut self.ready,
            now: self.now,
            prefix: KIND_OPERATION << KIND_SHIFT | u64::from(index) << SLOT_SHIFT,
            slot: index,
        };
        call(slot, &mut lent)
    }

    /// Delivers every completion that is there.
    fn reap(&mut self) -> usize {
        let mut count = 0;
        loop {
            let mut idle = true;
            while let Some(ended) = self.ring.ended() {
                self.dispatch(ended);
                count += 1;
                idle = false;
                if count == self.publish {
                    self.publish = (2 * count).min(PUBLISH_MAX);
                    return count;
                }
            }
            for at in 0.. {
                let Some((slot, completion)) = self.ready.get(at).copied() else { break };
                self.with(slot, |slot, lent| {
                    slot.served.completed(completion.token, completion.result, lent);
                });
                count += 1;
                idle = false;
            }
            self.ready.clear();
            if idle {
                return count;
            }
        }
    }

    fn dispatch(&mut self, ended: Ended) {
        let index = (ended.token >> SLOT_SHIFT) as u16 & (SLOTS_MAX as u16 - 1);
        match ended.token >> KIND_SHIFT {
            KIND_OPERATION => {
                let token = ended.token & ((1 << TOKEN_BITS) - 1);
                let result = ended.result.map(|_| ());
                let cold = self.with(index, |slot, lent| {
                    slot.served.completed(token, result, lent);
                    !slot.hot
                });
                if cold {
                    // Work of the volume's own; it may have asked for a timer.
                    self.heat(index);
                }
            }
            KIND_KICK => self.kicked(index, ended),
            KIND_INBOX => {
                if !ended.more {
                    self.ring.poll(self.inbox.event(), KIND_INBOX << KIND_SHIFT);
                }
                while let Some(message) = self.inbox.take() {
                    self.message(message);
                }
            }
            _ => {}
        }
    }

    fn kicked(&mut self, index: u16, ended: Ended) {
        let Some(slot) = self.slots[usize::from(index)].as_mut() else { return };
        if !ended.more {
            // The kernel ended the poll (its completion queue overflowed): ask again, if the queue
            // is still the one that asked.
            let asked = slot.kicks.iter().find(|(_, token)| *token == ended.token);
            let queue = asked.and_then(|(queue, _)| slot.served.queue_mut(*queue));
            let kick = queue.as_ref().and_then(|queue| queue.kick());
            if let Some(kick) = kick {
                self.ring.poll(kick, ended.token);
            }
        }
        self.heat(index);
    }

    /// Looks at the export's rings from the next turn on.
    fn heat(&mut self, index: u16) {
        if let Some(slot) = self.slots[usize::from(index)].as_mut() {
            slot.last_request = self.now;
            if !std::mem::replace(&mut slot.hot, true) {
                self.hot.push(index);
            }
        }
    }

    fn operations(&self) -> u32 {
        let slots = self.hot.iter().filter_map(|index| self.slots[usize::from(*index)].as_ref());
        slots.map(|slot| slot.served.operations()).sum()
    }

    /// How long to look for work before falling asleep.
    fn spin_budget(&mut self) -> Duration {
        self.depth = self.depth.max(self.operations());
        if self.depth < DEPTH_HEAVY { self.spin } else { Duration::ZERO }
    }

    fn sleep(&mut self) {
        let heavy = self.depth >= DEPTH_HEAVY;
        self.depth -= self.depth / 4;
        // What has gone wrong in this turn is told before a rest.
        if self.enable_kicks() || self.faults != Some(fault::count()) {
            return;
        }
        self.ring.wait(self.slots_timer().map(|at| at - self.now));
        let woken = Nanos::now();
        if !heavy {
            self.adapt(woken - self.now);
        }
        self.now = woken;
    }

    /// Halt polling: something came soon after falling asleep, so it pays to spin longer.
    fn adapt(&mut self, slept: Duration) {
        self.spin = match slept {
            slept if slept > SPIN_MAX => self.spin / 2,
            _ => (self.spin * 2).clamp(SPIN_FIRST, SPIN_MAX),
        };
    }

    /// Asks all hot exports' guests to kick, and forgets the exports that have nothing under way.
    /// True if requests came meanwhile.
    fn enable_kicks(&mut self) -> bool {
        let slots = &mut self.slots;
        let mut waiting = false;
        self.hot.retain(|index| {
            let Some(slot) = slots[usize::from(*index)].as_mut() else { return false };
            let more = slot.served.enable_kicks();
            waiting |= more;
            let leaving = slot.removing;
            slot.hot = more
                || leaving
                || slot.served.in_flight() > 0
                || slot.served.next_timer().is_some();
            slot.hot
        });
        waiting
    }

    fn slots_timer(&self) -> Option<Nanos> {
        let slots = self.hot.iter().filter_map(|index| self.slots[usize::from(*index)].as_ref());
        slots.filter_map(|slot| slot.served.next_timer()).min()
    }

    /// Shows guests what has ended, and finishes what was waiting for that.
    fn settle(&mut self) {
        self.tell_faults();
        let mut at = 0;
        while let Some(index) = self.hot.get(at).copied() {
            self.with(index, |slot, lent| {
                slot.served.timers(lent);
                if !slot.stopping.is_empty() {
                    slot.served.let_go(lent);
                }
                slot.served.publish();
            });
            self.settle_slot(index);
            // One that was removed has given its place to the next.
            at += usize::from(self.hot.get(at) == Some(&index));
        }
    }

    fn settle_slot(&mut self, index: u16) {
        let Some(slot) = self.slots[usize::from(index)].as_mut() else { return };
        if let Some(reason) = slot.served.fence_news() {
            let export = slot.id(self.index, index);
            self.events.send(Event::Fenced { export, reason });
        }
        if !slot.stopping.is_empty() {
            self.finish_stops(index);
        } else if slot.removing {
            self.finish_removal(index);
        }
    }

    /// Tells of front ends that cut guest memory short, if there are any new ones.
    fn tell_faults(&mut self) {
        let faults = fault::count();
        if self.faults.replace(faults) == Some(faults) || planted(Bug::FaultUntold) {
            return;
        }
        for (index, slot) in (0u16..).zip(&mut self.slots) {
            let Some(slot) = slot else { continue };
            let export = slot.id(self.index, index);
            for door in slot.served.faults() {
                self.events.send(Event::Faulted { export: ExportId { door, ..export } });
            }
        }
    }

    fn finish_stops(&mut self, index: u16) {
        let Some(slot) = self.slots[usize::from(index)].as_mut() else { return };
        let (served, kicks, ring) = (&mut slot.served, &mut slot.kicks, &mut self.ring);
        slot.stopping.retain(|at| {
            let base = match served.queue_mut(*at) {
                Some(queue) if !queue.is_quiet() => return true,
                Some(queue) => queue.base(),
                None => 0,
            };
            if let Some(polled) = kicks.iter().position(|(queue, _)| queue == at) {
                let (_, token) = kicks.swap_remove(polled);
                ring.cancel_poll(token, KIND_IGNORED << KIND_SHIFT);
                // The kernel lets go of the descriptor before the queue closes it.
                ring.submit();
            }
            if let Some(door) = served.door_mut(at.door) {
                door.queues.remove(at.queue);
            }
            let (reactor, slot, queue) = (self.index, index, *at);
            self.events.send(Event::QueueStopped { reactor, slot, queue, base });
            false
        });
    }

    fn finish_removal(&mut self, index: u16) {
        let Some(slot) = self.slots[usize::from(index)].as_mut() else { return };
        if slot.served.operations() > 0 || slot.served.in_flight() > 0 {
            return;
        }
        if let Some(slot) = self.slots[usize::from(index)].take() {
            slot.served.disks().close(&mut self.ring);
        }
        self.hot.retain(|hot| *hot != index);
        self.events.send(Event::Removed { reactor: self.index, slot: index });
    }

    fn message(&mut self, message: Message) {
        match message {
            Message::Add { slot, generation, export, reply } => {
                let _ = reply.send(self.add(slot, generation, *export));
            }
            Message::Remove { slot } => {
                self.heat(slot);
                match self.slots[usize::from(slot)].as_mut() {
                    Some(entry) => entry.removing = true,
                    None => {
                        self.events.send(Event::Removed { reactor: self.index, slot });
                    }
                }
            }
            Message::Ping { reply } => {
                let _ = reply.send(());
            }
            Message::StartQueue { slot, setup, reply } => {
                let _ = reply.send(self.start_queue(slot, *setup));
            }
            Message::StopQueue { slot, queue, leave } => {
                self.with_queue(slot, queue, if leave { Queue::leave } else { Queue::pause });
                self.heat(slot);
                if let Some(entry) = self.slots[usize::from(slot)].as_mut() {
                    entry.stopping.push(queue);
                }
            }
            Message::LetGo { slot, queue } => {
                self.with_queue(slot, queue, Queue::leave);
                self.heat(slot);
            }
            Message::Poll { slot } => {
                self.with(slot, |slot, lent| {
                    // Before looking: what completes from now on sends again.
                    slot.poll_sent.store(false, Ordering::SeqCst);
                    slot.served.poll(lent);
                });
                self.heat(slot);
            }
            Message::Stop => self.stop = true,
            message => self.configure(message),
        }
    }

    /// Messages that change an export while it runs.
    fn configure(&mut self, message: Message) {
        let now = self.now;
        match message {
            Message::SetCall { slot, queue, call } => self.with_queue(slot, queue, |queue| {
                queue.set_call(call);
            }),
            Message::SetError { slot, queue, error } => self.with_queue(slot, queue, |queue| {
                queue.set_error(error);
            }),
            Message::AddDoor { slot, door } => {
                self.with(slot, |slot, lent| slot.served.open_door(*door, lent));
            }
            Message::RemoveDoor { slot, door } => {
                self.with(slot, |slot, lent| slot.served.close_door(door, lent));
                self.heat(slot);
            }
            Message::SetCapacity { slot, sectors } => {
                self.with(slot, |slot, _| slot.served.set_capacity(sectors));
            }
            Message::SetWriteCache { slot, door, enabled } => {
                self.with(slot, |slot, lent| slot.served.set_write_cache(door, enabled, lent));
                self.heat(slot);
            }
            Message::SetLimits { slot, generation, door, limits }
                if self.serves(slot, generation) =>
            {
                self.with(slot, |slot, _| slot.served.set_limits(door, limits, now));
                self.heat(slot);
            }
            Message::GiveDisks { slot, generation, disks, reply }
                if self.serves(slot, generation) =>
            {
                let _ = reply.send(self.give_disks(slot, &disks));
            }
            Message::Volume { slot, generation, message } if self.serves(slot, generation) => {
                self.with(slot, |slot, lent| slot.served.message(message, lent));
                self.heat(slot);
            }
            Message::SetMemory { slot, door, memory } => {
                self.with(slot, |slot, lent| slot.served.set_memory(door, &memory, lent));
            }
            Message::Pinned { slot, generation, door, region } if self.serves(slot, generation) => {
                self.pinned(slot, door, &region);
            }
            Message::SetLimits { .. }
            | Message::Volume { .. }
            | Message::Pinned { .. }
            | Message::GiveDisks { .. } => {
                log::debug!("a message to an export that is gone");
            }
            _ => unreachable!("handled by `message`"),
        }
    }

    fn pinned(&mut self, index: u16, door: u16, region: &Arc<Region>) {
        let learnt = self.with(index, |slot, lent| Some(slot.served.learn(door, region, lent)));
        if let (Some(Err(error)), Some(slot)) = (learnt, &self.slots[usize::from(index)]) {
            let export = ExportId { door, ..slot.id(self.index, index) };
            self.events.send(Event::NotPinned { export, reason: error.to_string() });
        }
    }

    fn serves(&self, slot: u16, generation: u32) -> bool {
        let slot = self.slots.get(usize::from(slot)).and_then(Option::as_ref);
        slot.is_some_and(|slot| slot.generation == generation)
    }

    fn with_queue(&mut self, slot: u16, queue: QueueId, call: impl FnOnce(&mut Queue)) {
        self.with(slot, |slot, _| {
            if let Some(queue) = slot.served.queue_mut(queue) {
                call(queue);
            }
        });
    }

    fn add(&mut self, index: u16, generation: u32, export: AddExport) -> Result<()> {
        let poll_sent = Arc::new(AtomicBool::new(false));
        let waker = self.waker(index, poll_sent.clone());
        let opened = Disks::open(&export.disks, &mut self.ring, &waker);
        let disks = opened.map_err(|error| error.context(&export.name))?;
        self.slots[usize::from(index)] = Some(Slot {
            served: Served::new(export.name, export.volume, disks),
            generation,
            hot: false,
            last_request: self.now,
            stopping: Vec::new(),
            removing: false,
            kick_generation: 0,
            kicks: Vec::new(),
            poll_sent,
        });
        self.with(index, |slot, lent| slot.served.open_door(export.door, lent));
        Ok(())
    }

    fn give_disks(&mut self, index: u16, targets: &[DiskTarget]) -> Result<()> {
        let Some(slot) = self.slots[usize::from(index)].as_ref() else { return Ok(()) };
        let waker = self.waker(index, slot.poll_sent.clone());
        let disks = Disks::open(targets, &mut self.ring, &waker)?;
        self.with(index, |slot, _| slot.served.give(disks));
        Ok(())
    }

    /// How a disk's own threads have the reactor poll it: one message for many completions.
    fn waker(&self, slot: u16, sent: Arc<AtomicBool>) -> Waker {
        let own = self.own.clone();
        Arc::new(move || {
            if !sent.swap(true, Ordering::SeqCst) {
                own.send(Message::Poll { slot });
            }
        })
    }

    fn start_queue(&mut self, index: u16, setup: QueueSetup) -> Result<()> {
        let at = QueueId { door: setup.door, queue: setup.index };
        let number = setup.index;
        let Some(slot) = self.slots[usize::from(index)].as_mut() else {
            return Err(Error::new(ErrorKind::Gone, "the export is gone"));
        };
        let Some(door) = slot.served.door_mut(at.door) else {
            return Err(Error::new(ErrorKind::Gone, "the door is gone"));
        };
        let queue = Queue::new(setup, self.bell.clone())
            .map_err(|error| error.context(format_args!("{}: queue {number}", door.name)))?;
        if queue.survivors() > 0 {
            let (name, count) = (&door.name, queue.survivors());
            log::info!("{name}: queue {number}: {count} requests under way are done again");
        }
        slot.kick_generation = (slot.kick_generation + 1) & ((1 << TOKEN_BITS) - 1);
        if let Some(kick) = queue.kick() {
            let token = KIND_KICK << KIND_SHIFT
                | u64::from(index) << SLOT_SHIFT
                | u64::from(slot.kick_generation);
            self.ring.poll(kick, token);
            slot.kicks.push((at, token));
        }
        door.fault_reported = false;
        self.faults = None;
        door.queues.start(number, queue);
        self.heat(index);
        Ok(())
    }
}

fn pin(cpu: usize) -> Result<()> {
    let mut set = nix::sched::CpuSet::new();
    set.set(cpu)
        .and_then(|()| nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set))
        .map_err(|error| Error::io(format!("cannot run a reactor on CPU {cpu}"), error.into()))
}

#[cfg(test)]
#[path = "reactor_test.rs"]
mod tests;
