//! A slow policy that is plainly right: lists that are searched from end to end. It shares only the
//! ghost list, the streams and the accounts with the real one; those have tests of their own.

use super::budget::{Thrift, WearBudget};
use super::ghost::Ghost;
use super::stream::Streams;
use super::*;
use std::collections::HashMap;

#[derive(Clone, Copy)]
struct Waiting {
    block: u64,
    used: bool,
    sequential: bool,
}

pub(super) struct Model {
    settings: Settings,
    /// By slot, and the slots from the oldest.
    slots: Vec<Option<Waiting>>,
    next: usize,
    pub ghost: Ghost,
    pub trial: Vec<u64>,
    pub main: Vec<u64>,
    /// Came last, and enters its queue when the next one comes.
    newest: Option<(u64, Place)>,
    /// Uses of every block on flash, and where it is.
    pub marks: HashMap<u64, (u8, Option<Place>)>,
    streams: Streams,
    pub wear: WearBudget,
    thrift: Thrift,
}

impl Model {
    pub(super) fn new(settings: Settings) -> Self {
        let mut model = Self {
            settings,
            slots: Vec::new(),
            next: 0,
            ghost: Ghost::default(),
            trial: Vec::new(),
            main: Vec::new(),
            newest: None,
            marks: HashMap::new(),
            streams: Streams::default(),
            wear: WearBudget::default(),
            thrift: Thrift::default(),
        };
        model.set_capacity(settings.capacity_blocks);
        model
    }

    pub(super) fn set_capacity(&mut self, blocks: u64) {
        self.settings.capacity_blocks = blocks;
        self.thrift.resize(blocks);
        self.ghost.resize(blocks * 9 / 10);
        let share = blocks * u64::from(self.settings.probation_permille) / 1000;
        let slots = share.max(self.settings.probation_blocks_min.min(blocks / 10)).max(1) as usize;
        for waiting in self.slots.iter().skip(slots).flatten() {
            self.ghost.insert(waiting.block);
        }
        self.slots.resize(slots, None);
        self.next %= slots;
    }

    fn len(&self) -> u64 {
        (self.trial.len() + self.main.len() + self.newest.iter().count()) as u64
    }

    pub(super) fn read(&mut self, block: u64) -> Verdict {
        self.thrift.read();
        let followed = self.streams.follow(block);
        if let Some((uses, _)) = self.marks.get_mut(&block) {
            *uses = (*uses + 1).min(3);
            return Verdict::Hit;
        }
        let count = self.slots.len();
        for (slot, waiting) in self.slots.iter_mut().enumerate() {
            if let Some(waiting) = waiting.as_mut().filter(|waiting| waiting.block == block) {
                // Blocks that came since: walk back from the newest slot.
                let newest = (self.next + count - 1) % count;
                let walk = std::iter::successors(Some(newest), |at| Some((at + count - 1) % count));
                let since = walk.take_while(|at| *at != slot).count();
                waiting.used |= since >= count / 2;
                return Verdict::Probed { slot: slot as u32 };
            }
        }
        self.thrift.miss();
        let affordable = self.wear.allows(BLOCK_BYTES);
        if affordable && self.ghost.take(block) {
            self.fill(true);
            return Verdict::Admit { free: false };
        }
        let room = self.len() < self.settings.capacity_blocks;
        if affordable && room && self.slots[self.next].is_some() {
            self.fill(false);
            return Verdict::Admit { free: true };
        }
        if followed.before >= self.settings.stream_blocks {
            self.ghost.insert(block);
            return Verdict::Bypass;
        }
        let waiting = Waiting { block, used: false, sequential: followed.adjacent };
        let slot = self.next;
        let old = self.slots[slot].replace(waiting);
        self.next = (slot + 1) % count;
        Verdict::Probation { slot: slot as u32, leaves: old.map(|old| self.leave(old)) }
    }

    fn fill(&mut self, thrifty: bool) {
        self.wear.charge(BLOCK_BYTES);
        if thrifty {
            self.thrift.fill();
        }
    }

    pub(super) fn dropped(&mut self, block: u64, free: bool) {
        self.wear.refund(BLOCK_BYTES);
        if !free {
            self.thrift.refund();
        }
        self.ghost.insert(block);
    }

    fn leave(&mut self, old: Waiting) -> Leaves {
        let block = old.block;
        if self.wear.allows(BLOCK_BYTES) {
            if old.used {
                self.fill(true);
                return Leaves { block, to: Some(Place::Main) };
            }
            if !old.sequential && self.thrift.allows() {
                self.fill(true);
                return Leaves { block, to: Some(Place::Trial) };
            }
        }
        self.ghost.insert(block);
        Leaves { block, to: None }
    }

    pub(super) fn enter(&mut self, block: u64, to: Place) {
        let mark = self.marks.get_mut(&block).expect("on flash");
        if mark.1.is_none() {
            *mark = (0, Some(to));
            if let Some(newest) = self.newest.replace((block, to)) {
                self.push(newest);
            }
        }
    }

    fn push(&mut self, (block, to): (u64, Place)) {
        if to == Place::Trial { self.trial.push(block) } else { self.main.push(block) }
    }

    pub(super) fn written(&mut self, block: u64) {
        for waiting in &mut self.slots {
            if waiting.is_some_and(|waiting| waiting.block == block) {
                *waiting = None;
                self.ghost.insert(block);
            }
        }
        self.marks.entry(block).or_default();
    }

    pub(super) fn drained(&mut self, block: u64) {
        let (uses, place) = self.marks[&block];
        let kept = if place.is_some() { (uses + 1).min(3) } else { uses };
        if place.is_none() {
            self.ghost.take(block);
            self.enter(block, Place::Main);
        }
        self.marks.get_mut(&block).expect("on flash").0 = kept;
    }

    pub(super) fn forget(&mut self, block: u64) {
        self.marks.remove(&block);
        for waiting in &mut self.slots {
            waiting.take_if(|waiting| waiting.block == block);
        }
    }

    pub(super) fn evict(&mut self, pinned: impl Fn(u64) -> bool) -> Option<u64> {
        while self.len() > self.settings.capacity_blocks {
            if self.trial.is_empty() && self.main.is_empty() {
                let newest = self.newest.take().expect("something is there");
                self.push(newest);
            }
            let trial_most = self.settings.capacity_blocks * 8 / 100;
            let trial = self.trial.len() as u64 > trial_most || self.main.is_empty();
            let (queue, place) = match trial {
                true => (&mut self.trial, Place::Trial),
                false => (&mut self.main, Place::Main),
            };
            let block = queue.remove(0);
            let Some(mark) = self.marks.get_mut(&block).filter(|mark| mark.1 == Some(place)) else {
                continue;
            };
            if pinned(block) {
                *mark = ((mark.0 + 1).min(3), None);
            } else if mark.0 > 0 {
                *mark = (if trial { 0 } else { mark.0 - 1 }, Some(Place::Main));
                self.main.push(block);
            } else {
                if trial {
                    self.ghost.insert(block);
                }
                self.marks.remove(&block);
                return Some(block);
            }
        }
        None
    }
}
