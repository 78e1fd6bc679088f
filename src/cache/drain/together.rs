//! A drainer whose disk is in a consistency group: it goes step by step with the others
//! (`consistency.rs`), and its own states are the same but for these:
//!
//! ```text
//! Gather → Agree → Fill → Sum → Redo → RedoFlush → Prepared ──→ Apply → …
//!   ↑        │                                  │  ↑ committed
//!   └────────┘ less was agreed on               └→ Commit → CommitFlush (the leader)
//! ```

use super::{DrainHost, Drainer, Group, State};
use crate::backing::redo::{GroupId, StepId};
use crate::backing::roster::Roster;
use crate::backing::stamp::DrainMode;
use crate::base::planted::{Bug, planted};
use crate::cache::consistency::{Member, Offer, Turn};

/// What a drainer knows of its consistency group.
pub(super) struct Together {
    pub(super) member: Member,
    /// What the step under way is called, and its point, once that is agreed on.
    pub(super) agreed: Option<(u64, StepId)>,
    /// A step was given up: what was prepared for it is to be retired.
    must_stamp: bool,
    /// Generation of the roster in the stamp that is being written.
    generation: u64,
    leaving: bool,
    /// The stamp that is being written is the last one as a member.
    going: bool,
}

impl Drainer {
    /// The disk goes with its consistency group from now on.
    ///
    /// # Panics
    /// If it is not drained in groups.
    pub fn join(&mut self, member: Member) {
        assert!(self.options.mode == DrainMode::Grouped, "steps are made of redo groups");
        assert!(self.state == State::Idle, "a disk joins before it is served");
        self.together = Some(Together {
            member,
            agreed: None,
            must_stamp: false,
            generation: 0,
            leaving: false,
            going: false,
        });
    }

    /// The disk is in a consistency group.
    pub fn member(&self) -> Option<&Member> {
        self.together.as_ref().map(|together| &together.member)
    }

    pub(super) fn begin_together(&mut self, host: &mut dyn DrainHost) -> bool {
        if self.is_finishing() {
            // Damaged: without its part of the last step no other step begins (C2).
            return false;
        }
        let drained_all = self.dirty.is_empty() || self.last_good.is_some();
        let leaves = !self.retire.is_empty() && (!self.retire_clean || drained_all);
        let Some(together) = &mut self.together else { return false };
        if together.must_stamp || together.member.must_stamp() {
            self.enter(State::Stamp, host);
            return true;
        }
        if leaves {
            if !std::mem::replace(&mut together.leaving, true) {
                together.member.leave();
            }
            together.going = together.member.may_go();
            if together.going {
                self.enter(State::Stamp, host);
            }
            return self.state != State::Idle;
        }
        let offer = self.what_to_offer(host);
        let limit = self.together.as_mut().and_then(|together| together.member.offer(offer));
        match limit {
            Some(limit) => self.begin_group(limit, host),
            None => self.release_if_clean(),
        }
        limit.is_some()
    }

    fn what_to_offer(&mut self, host: &mut dyn DrainHost) -> Offer {
        let (drained, own) = (self.drained(), self.dirty.head());
        let waited = self.waiters.iter().map(|waiter| waiter.to).filter(|to| *to > drained).min();
        let closing = self.retire_clean && !self.retire.is_empty();
        let hold = self.hold.filter(|_| !closing);
        let bounds = [hold, waited, self.last_good];
        let most = bounds.into_iter().flatten().fold(host.frontier(), u64::min);
        let hurries = self.pace.urgent || closing || self.group.part;
        let wish = match waited {
            Some(to) => Some(to),
            None if self.last_good.is_some() || own <= drained => None,
            None if hurries => Some(own),
            None if self.rest > host.now() => {
                host.wake_at(self.rest);
                None
            }
            None => match self.dirty.due(self.options.staleness_max, host.now()) {
                Ok(()) => Some(own),
                Err(at) => {
                    at.into_iter().for_each(|at| host.wake_at(at));
                    None
                }
            },
        };
        // Who is held wants nothing.
        let wish = wish.filter(|_| hold.is_none_or(|hold| hold > drained));
        Offer { most, wish, drained, part: self.group.part }
    }

    /// A group has been gathered; alone, it is what goes to the backing.
    pub(super) fn gathered(&mut self, host: &mut dyn DrainHost) {
        let group = &mut self.group;
        group.point = match (group.part, group.full) {
            (true, _) => group.part_won - 1,
            (false, true) => group.to,
            // Nothing more up to the limit is this disk's.
            (false, false) => group.limit.max(group.from),
        };
        let point = group.point;
        let next = self.next_group_id();
        match self.together.as_ref().filter(|_| !self.is_finishing()) {
            Some(Together { member, agreed: None, .. }) => {
                member.gathered(point, next.expect("a member has a sidecar"));
                self.enter(State::Agree, host);
            }
            Some(Together { agreed: Some((to, _)), .. }) => {
                assert_eq!(point, *to, "what was gathered once is gathered again");
                self.enter(State::Fill, host);
            }
            None => self.enter(State::Fill, host),
        }
    }

    /// Which redo group comes next.
    pub(super) fn next_group_id(&self) -> Option<GroupId> {
        let stamp = &self.options.sidecar.as_ref()?.stamp;
        let (disk, owner_epoch) = (stamp.disk, stamp.owner_epoch);
        Some(GroupId { disk, owner_epoch, number: self.last_group + 1 })
    }

    /// The states that wait for the other members; true when it has moved on.
    pub(super) fn wait_together(&mut self, host: &mut dyn DrainHost) -> bool {
        let Some(together) = &mut self.together else { return false };
        if self.state == State::Agree {
            let Some((to, id)) = together.member.agreed() else { return false };
            if self.reader.is_busy() {
                return false;
            }
            together.agreed = Some((to, id));
            if to == self.group.point || planted(Bug::BeyondAgreed) {
                self.enter(State::Fill, host);
            } else {
                assert!(to < self.group.point, "the least is agreed on");
                self.group.limit = to;
                self.gather_again();
                self.enter(State::Gather, host);
            }
            return true;
        }
        match together.member.turn() {
            Turn::Wait => return false,
            Turn::Commit => self.enter(State::Commit, host),
            Turn::Apply => {
                self.group_counts();
                self.enter(State::Apply, host);
            }
        }
        true
    }

    /// The commit is durable in the stamp.
    pub(super) fn finish_commit(&mut self) {
        let stamp = self.stamp.take().expect("it was planned");
        let sidecar = self.options.sidecar.as_mut().expect("it has a stamp");
        sidecar.stamp = stamp;
        if let Some(Together { member, agreed: Some((_, id)), .. }) = &self.together {
            member.committed(*id);
        }
    }

    /// The stamp that commits the step; nothing else of it changes.
    pub(super) fn plan_commit(&mut self, host: &mut dyn DrainHost) {
        self.scratch.clear();
        let agreed = self.together.as_ref().and_then(|together| together.agreed);
        let (Some((_, id)), Some(sidecar)) = (agreed, &self.options.sidecar) else { return };
        let mut stamp = sidecar.stamp.next(host.wall_ms());
        stamp.committed_step = id.number;
        self.push_stamp(stamp);
    }

    /// The group of the step is in place.
    pub(super) fn step_ended(&mut self) {
        if let Some(together) = &mut self.together {
            together.agreed = None;
            together.member.applied();
        }
    }

    /// Draining is to stop at `to`. A group that goes beyond and cannot count yet is made anew; of
    /// one that may, the point inside is refused.
    pub(super) fn stop_at(&mut self, to: u64) {
        // Other members' numbers are points of this disk too.
        if self.member().is_some_and(|member| to <= member.numbers().last()) {
            self.points.committed(to.max(self.points.head()));
        }
        let Group { part, part_won, point, limit, .. } = self.group;
        let gathers = matches!(self.state, State::Gather | State::Agree);
        let end = match (part, gathers) {
            (true, _) => part_won,
            (false, true) => limit,
            (false, false) => point,
        };
        if to >= end || self.is_finishing() {
            return;
        }
        match (self.state, &self.together) {
            (State::Idle | State::Stamp | State::StampFlush, _) => {}
            (State::Gather | State::Fill | State::Sum, None) => self.shortened = true,
            (State::Apply | State::ApplyFlush | State::Root, _) | (_, None) => {
                self.points.group_committed(end);
            }
            (_, Some(together)) => {
                if !together.member.withdraw() {
                    self.points.group_committed(point);
                }
            }
        }
    }

    /// Of a disk by itself: begins the group anew that is to end earlier. True: not yet.
    pub(super) fn shorten(&mut self) -> bool {
        let may = matches!(self.state, State::Gather | State::Fill | State::Sum);
        if !self.shortened || !may {
            self.shortened = false;
            return false;
        }
        if self.under_way > 0 || self.reader.is_busy() {
            return true;
        }
        self.forget_group();
        false
    }

    /// If the step under way was given up: true until it is begun anew.
    pub(super) fn give_up_step(&mut self) -> bool {
        let void = self.together.as_ref().is_some_and(|together| together.member.is_void());
        if !void {
            return false;
        }
        if self.under_way > 0 || self.reader.is_busy() {
            return true;
        }
        self.abandon_step();
        false
    }

    /// Forgets the step that it took part in. Its number is not used again (C4).
    pub(super) fn abandon_step(&mut self) {
        let Some(together) = &mut self.together else { return };
        together.member.fail();
        together.agreed = None;
        together.must_stamp = true;
        self.last_group += u64::from(self.state != State::Prepared);
        self.forget_group();
    }

    /// What was gathered and is in no sidecar is gathered again, as far as it then should be.
    fn forget_group(&mut self) {
        (self.again, self.failure, self.positioned) = (false, None, false);
        self.shortened = false;
        self.plan.clear();
        self.next = 0;
        self.merged.clear();
        self.group.to = self.group.from;
        self.group.part = false;
        self.state = State::Idle;
    }

    /// What a stamp says of the group.
    pub(super) fn roster_to_stamp(&mut self) -> Option<Roster> {
        let together = self.together.as_mut()?;
        if together.going {
            return Some(Roster::default());
        }
        let (generation, roster) = together.member.numbers().roster();
        together.generation = generation;
        Some(roster)
    }

    /// A stamp is durable; false: it is not the one that those who retire wait for.
    pub(super) fn stamped_together(&mut self) -> bool {
        let Some(together) = &mut self.together else { return true };
        together.must_stamp = false;
        if together.going {
            self.together = None;
            return true;
        }
        together.member.stamped(together.generation);
        false
    }
}
