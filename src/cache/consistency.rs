//! A consistency group: disks that take their write-order numbers from one counter and move to
//! their backings together, so that no backing is ever ahead of another in the guests' order.
//!
//! ```text
//! Rest → Gather → Prepare → Commit → Apply → Rest
//!          │         │  every member has its redo group in its sidecar, durable
//!          │         └─ nobody's counts yet
//!          └─ how far each can come; the least of that is the step's point
//! ```
//!
//! A member is on a reactor of its own; it learns by a message ([`Waker`]) that it should look here
//! again. Only drainers come here, a few times a step; the data path takes numbers, which is one
//! atomic addition a batch.
//!
//! Invariants:
//! - C1 a redo group of a step counts when the leader's stamp says that the step is committed, and
//!   that is written only after every member's group is durable in its sidecar.
//! - C2 nothing of a step is applied before the step is committed, and no step begins before every
//!   member has applied the one before: a committed step proves that all before it are in place.
//! - C3 what is acknowledged on one member has a smaller number than what comes to any other later.
//! - C4 a step's number names that step alone: one given up has its groups retired in each member's
//!   stamp, and the leader's next one has another number.
//! - C5 no step begins while a disk of the group is not here, or its stamp names other disks.

use crate::backing::recover::Word;
use crate::backing::redo::{GroupId, StepId};
use crate::backing::roster::{Peer, Roster};
use crate::base::planted::{Bug, planted};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Has a member look at its group again, in its own time.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// See the module.
pub struct Consistency {
    /// The last number that was given.
    last: AtomicU64,
    shared: Mutex<Shared>,
}

#[derive(Default)]
struct Shared {
    roster: Roster,
    /// Of the roster.
    generation: u64,
    /// The members that are here, by volume.
    seats: BTreeMap<String, Seat>,
    /// UUIDs of all disks that have been here, by volume.
    disks: BTreeMap<String, [u8; 16]>,
    /// The last step that each disk has committed as the leader, by the disk's UUID.
    words: BTreeMap<[u8; 16], u64>,
    step: Step,
    /// Counts steps that were begun or given up.
    serial: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Step {
    #[default]
    Rest,
    Gather {
        limit: u64,
    },
    Prepare {
        to: u64,
        id: StepId,
    },
    Commit {
        id: StepId,
    },
    Apply,
}

struct Seat {
    waker: Waker,
    disk: [u8; 16],
    offer: Offer,
    /// The number for which it was last woken.
    asked: u64,
    /// The roster that its stamp has.
    stamped: u64,
    /// In the present state of the step: it is done with its part.
    arrived: bool,
    /// How far it has gathered, and its next redo group.
    gathered: Option<(u64, GroupId)>,
}

/// How far a member can be drained, and whether it should.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// Its numbers up to here are durable in its log, and nothing keeps it from going there.
    pub most: u64,
    /// It wants to come this far.
    pub wish: Option<u64>,
    pub drained: u64,
    /// A part of a request is in the backing, which is no point.
    pub part: bool,
}

/// What a member that has prepared its group does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    Wait,
    /// It leads: it writes the commit.
    Commit,
    Apply,
}

/// Who joins.
pub struct Joining {
    pub peer: Peer,
    pub disk: [u8; 16],
    /// As its stamp has it.
    pub committed_step: u64,
    /// Of the roster in its stamp.
    pub generation: u64,
    /// Above all numbers in its log.
    pub next_won: u64,
    pub waker: Waker,
}

/// A disk's place in its group; given up when it is dropped.
pub struct Member {
    group: Arc<Consistency>,
    volume: String,
    /// Of the step that it takes part in.
    serial: Option<u64>,
}

impl Consistency {
    /// Numbers above `last` are given; `roster` has all disks that belong to the group.
    pub fn new(last: u64, roster: Roster) -> Arc<Self> {
        let shared = Shared { roster, generation: 1, ..Shared::default() };
        Arc::new(Self { last: AtomicU64::new(last), shared: Mutex::new(shared) })
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives `count` numbers: the first of them (C3).
    pub fn take(&self, count: u64) -> u64 {
        self.last.fetch_add(count, Ordering::AcqRel) + 1
    }

    /// The last number that was given.
    pub fn last(&self) -> u64 {
        self.last.load(Ordering::Acquire)
    }

    /// The disks of the group, and what tells this state of the list from others.
    pub fn roster(&self) -> (u64, Roster) {
        let shared = self.lock();
        (shared.generation, shared.roster.clone())
    }

    /// A disk belongs to the group from now on, whether it is here or not.
    pub fn admit(&self, peer: Peer) {
        let mut wake = Vec::new();
        self.lock().admit(peer, &mut wake);
        wake.iter().for_each(|waker| waker());
    }

    /// A disk that is not here belongs to the group no more. `word`: what its stamp said last;
    /// `None`: nobody can tell any more.
    pub fn expel(&self, volume: &str, word: Option<Word>) {
        let mut wake = Vec::new();
        {
            let mut shared = self.lock();
            match word {
                Some(word) => shared.hear(word, &mut wake),
                None => shared.lose_leader(volume, &mut wake),
            }
            if !planted(Bug::NotExpelled) {
                shared.remove(volume, &mut wake);
            }
        }
        wake.iter().for_each(|waker| waker());
    }

    /// Disks of the group that are not here.
    pub fn absent(&self) -> Vec<Peer> {
        let shared = self.lock();
        let absent = |peer: &&Peer| !shared.seats.contains_key(&peer.volume);
        shared.roster.members.iter().filter(absent).cloned().collect()
    }

    /// What a disk says as the leader; `None`: it has not been here, or is about to say it.
    pub fn word(&self, disk: &[u8; 16]) -> Option<Word> {
        let shared = self.lock();
        if matches!(shared.step, Step::Commit { id } if id.leader == *disk) {
            return None;
        }
        let committed_step = *shared.words.get(disk)?;
        Some(Word { leader: *disk, committed_step })
    }

    /// A disk that was opened takes its place.
    pub fn join(self: &Arc<Self>, joining: Joining) -> Member {
        let Joining { peer, disk, committed_step, generation, next_won, waker } = joining;
        self.last.fetch_max(next_won.saturating_sub(1), Ordering::AcqRel);
        let volume = peer.volume.clone();
        let mut wake = Vec::new();
        {
            let mut shared = self.lock();
            shared.admit(peer, &mut wake);
            let stamped = if shared.generation == generation { generation } else { 0 };
            let seat = Seat {
                waker,
                disk,
                offer: Offer::default(),
                asked: 0,
                stamped,
                // Whatever step was under way, its opening has finished its part.
                arrived: true,
                gathered: None,
            };
            shared.seats.insert(volume.clone(), seat);
            shared.disks.insert(volume.clone(), disk);
            shared.hear(Word { leader: disk, committed_step }, &mut wake);
        }
        wake.iter().for_each(|waker| waker());
        Member { group: self.clone(), volume, serial: None }
    }
}

impl Shared {
    fn admit(&mut self, peer: Peer, wake: &mut Vec<Waker>) {
        if self.roster.members.contains(&peer) {
            return;
        }
        self.roster.members.retain(|other| other.volume != peer.volume);
        self.roster.members.push(peer);
        self.roster.members.sort();
        self.generation += 1;
        self.give_up(wake);
        self.wake_all(wake);
    }

    fn remove(&mut self, volume: &str, wake: &mut Vec<Waker>) {
        let before = self.roster.members.len();
        self.roster.members.retain(|peer| peer.volume != volume);
        if self.roster.members.len() < before {
            self.generation += 1;
            self.give_up(wake);
        }
        self.wake_all(wake);
    }

    fn wake_all(&self, wake: &mut Vec<Waker>) {
        wake.extend(self.seats.values().map(|seat| seat.waker.clone()));
    }

    fn in_roster(&self, volume: &str) -> bool {
        self.roster.members.iter().any(|peer| peer.volume == volume)
    }

    /// Every disk of the group is here, and its stamp names all of them (C5).
    fn is_complete(&self) -> bool {
        self.roster.members.iter().all(|peer| {
            self.seats.get(&peer.volume).is_some_and(|seat| seat.stamped == self.generation)
        })
    }

    fn enter(&mut self, step: Step, wake: &mut Vec<Waker>) {
        self.step = step;
        self.seats.values_mut().for_each(|seat| seat.arrived = false);
        self.wake_all(wake);
    }

    /// A step that is not about to be committed is given up: each member begins anew.
    fn give_up(&mut self, wake: &mut Vec<Waker>) {
        if matches!(self.step, Step::Gather { .. } | Step::Prepare { .. }) {
            self.serial += 1;
            self.enter(Step::Rest, wake);
        }
    }

    /// Nobody will say whether the step is committed that this disk leads. No other disk has
    /// applied it, so they drop it.
    fn lose_leader(&mut self, volume: &str, wake: &mut Vec<Waker>) {
        let Step::Commit { id } = self.step else { return };
        if self.disks.get(volume) == Some(&id.leader) {
            self.serial += 1;
            self.enter(Step::Rest, wake);
        }
    }

    /// A disk that may lead the step under way says what it has committed.
    fn hear(&mut self, word: Word, wake: &mut Vec<Waker>) {
        self.words.insert(word.leader, word.committed_step);
        let Step::Commit { id } = self.step else { return };
        if id.leader != word.leader {
            return;
        }
        if id.number == word.committed_step {
            let here: Vec<bool> = self.seats.values().map(|seat| seat.gathered.is_some()).collect();
            self.enter(Step::Apply, wake);
            // Who came since has applied it when it was opened.
            for (seat, takes_part) in self.seats.values_mut().zip(here) {
                seat.arrived = !takes_part;
            }
            self.all_applied(wake);
        } else {
            self.serial += 1;
            self.enter(Step::Rest, wake);
        }
    }

    /// Begins a step if somebody wants one and all can go some way; how far.
    fn begin(&mut self, volume: &str, wake: &mut Vec<Waker>) -> Option<u64> {
        if !self.is_complete() {
            return None;
        }
        let seats = || self.roster.members.iter().filter_map(|peer| self.seats.get(&peer.volume));
        let wish = seats().filter_map(|seat| seat.offer.wish).max()?;
        let most = seats().map(|seat| seat.offer.most);
        let limit = if planted(Bug::HoldOfOne) { most.max()? } else { most.min()? };
        let base = seats().map(|seat| seat.offer.drained).max()?;
        let gains = |offer: &Offer| offer.wish.is_some() && (limit > offer.drained || offer.part);
        if limit >= base && seats().any(|seat| gains(&seat.offer)) {
            self.serial += 1;
            self.seats.values_mut().for_each(|seat| seat.gathered = None);
            self.enter(Step::Gather { limit }, wake);
            return Some(limit);
        }
        // Who has been idle does not know how far the numbers have come.
        for (name, seat) in &mut self.seats {
            if name != volume && seat.offer.most < wish && seat.asked < wish {
                seat.asked = wish;
                wake.push(seat.waker.clone());
            }
        }
        None
    }

    /// The first of the roster leads.
    fn leader(&self) -> Option<&Seat> {
        self.seats.get(&self.roster.members.first()?.volume)
    }

    fn all_gathered(&mut self, wake: &mut Vec<Waker>) {
        let seats: Vec<&Seat> =
            self.roster.members.iter().filter_map(|peer| self.seats.get(&peer.volume)).collect();
        let reached: Option<Vec<u64>> =
            seats.iter().map(|seat| seat.gathered.map(|(to, _)| to)).collect();
        let least = reached.and_then(|reached| reached.into_iter().min());
        let group = self.leader().and_then(|leader| leader.gathered);
        if let (Some(to), Some((_, group))) = (least, group) {
            self.enter(Step::Prepare { to, id: StepId::of_leader(group) }, wake);
        }
    }

    fn all_applied(&mut self, wake: &mut Vec<Waker>) {
        if self.step == Step::Apply && self.seats.values().all(|seat| seat.arrived) {
            self.enter(Step::Rest, wake);
        }
    }
}

impl Member {
    /// Where the group's numbers come from.
    pub fn numbers(&self) -> Arc<Consistency> {
        self.group.clone()
    }

    /// Calls `change` on what is shared and on this member's seat there; then wakes.
    fn with<R>(&self, change: impl FnOnce(&mut Shared, &mut Vec<Waker>) -> R) -> R {
        let mut wake = Vec::new();
        let result = change(&mut self.group.lock(), &mut wake);
        wake.iter().for_each(|waker| waker());
        result
    }

    fn seat<'a>(&self, shared: &'a mut Shared) -> &'a mut Seat {
        shared.seats.get_mut(&self.volume).expect("a member has a seat until it is dropped")
    }

    /// Its stamp does not name the disks of the group as they are now.
    pub fn must_stamp(&self) -> bool {
        self.with(|shared, _| {
            let generation = shared.generation;
            shared.in_roster(&self.volume) && self.seat(shared).stamped != generation
        })
    }

    /// A stamp with the roster of this generation is durable, and no redo group counts any more.
    pub fn stamped(&self, generation: u64) {
        self.with(|shared, wake| {
            self.seat(shared).stamped = generation;
            shared.wake_all(wake);
        });
    }

    /// Tells how far it can go; the limit of a step that it takes part in from now on.
    pub fn offer(&mut self, offer: Offer) -> Option<u64> {
        let (limit, serial) = self.with(|shared, wake| {
            self.seat(shared).offer = offer;
            if matches!(shared.step, Step::Gather { limit } if limit > offer.most) {
                // It is to stop earlier by now.
                shared.give_up(wake);
            }
            let limit = match shared.step {
                Step::Rest => shared.begin(&self.volume, wake),
                Step::Gather { limit } if shared.in_roster(&self.volume) => Some(limit),
                _ => None,
            };
            (limit, shared.serial)
        });
        self.serial = limit.map(|_| serial);
        limit
    }

    /// The step that it takes part in was given up.
    pub fn is_void(&self) -> bool {
        self.serial.is_some_and(|serial| self.group.lock().serial != serial)
    }

    /// It is done with a step that was given up.
    pub fn let_go(&mut self) {
        self.serial = None;
    }

    /// It cannot do its part: the step is given up.
    pub fn fail(&mut self) {
        self.withdraw();
        self.serial = None;
    }

    /// Gives up the step that it takes part in, unless that may count already: whether it did.
    pub fn withdraw(&self) -> bool {
        if self.serial.is_some() && !self.is_void() {
            self.with(|shared, wake| shared.give_up(wake));
        }
        self.is_void()
    }

    /// All its numbers up to `to` are gathered, in what may become redo group `id`.
    pub fn gathered(&self, to: u64, id: GroupId) {
        self.with(|shared, wake| {
            self.seat(shared).gathered = Some((to, id));
            shared.all_gathered(wake);
        });
    }

    /// The point that all have agreed on, and the step's name.
    pub fn agreed(&self) -> Option<(u64, StepId)> {
        match self.group.lock().step {
            Step::Prepare { to, id } => Some((to, id)),
            _ => None,
        }
    }

    /// Its redo group is durable in its sidecar.
    pub fn prepared(&self) {
        self.with(|shared, wake| {
            self.seat(shared).arrived = true;
            let Step::Prepare { id, .. } = shared.step else { return };
            let leads = self.seat(shared).disk == id.leader;
            let all = shared
                .roster
                .members
                .iter()
                .all(|peer| shared.seats.get(&peer.volume).is_some_and(|seat| seat.arrived));
            if all || (leads && planted(Bug::CommittedUnprepared)) {
                shared.enter(Step::Commit { id }, wake);
            }
        });
    }

    /// What follows [`Self::prepared`].
    pub fn turn(&self) -> Turn {
        self.with(|shared, _| {
            let (step, disk) = (shared.step, self.seat(shared).disk);
            match step {
                Step::Commit { id } if disk == id.leader => Turn::Commit,
                Step::Apply => Turn::Apply,
                Step::Prepare { id, .. }
                    if planted(Bug::AppliedUncommitted) && disk != id.leader =>
                {
                    Turn::Apply
                }
                _ => Turn::Wait,
            }
        })
    }

    /// Its stamp, which commits the step, is durable.
    pub fn committed(&self, id: StepId) {
        let word = Word { leader: id.leader, committed_step: id.number };
        self.with(|shared, wake| shared.hear(word, wake));
    }

    /// The step is in its backing, durably.
    pub fn applied(&mut self) {
        self.serial = None;
        self.with(|shared, wake| {
            let seat = self.seat(shared);
            seat.arrived = true;
            seat.gathered = None;
            shared.all_applied(wake);
        });
    }

    /// Leaves the group for good.
    pub fn leave(&mut self) {
        self.serial = None;
        self.with(|shared, wake| shared.remove(&self.volume, wake));
    }

    /// The others' stamps do not name this disk any more, and need no word of it.
    pub fn may_go(&self) -> bool {
        self.with(|shared, _| {
            let said = shared.is_complete() || planted(Bug::LeftUnsaid);
            !shared.in_roster(&self.volume) && said
        })
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.with(|shared, wake| {
            shared.seats.remove(&self.volume);
            // Of a step about to be committed, or committed, its next opening does its part.
            if shared.in_roster(&self.volume) {
                shared.give_up(wake);
            }
            shared.all_applied(wake);
        });
    }
}
