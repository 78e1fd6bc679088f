//! Changes of the whole disk, step by step while it serves: another mode, and the clean detach.
//!
//! ```text
//! Settle → Drain → Retire → Root        away from journalling, and the detach
//! Settle → Flush → Root                 back to journalling: the backing is flushed
//! Drain → Root, or Root                 between modes that both journal, or both do not
//! Settle → Drain → Retire               out of a consistency group
//! ```
//!
//! Each step is durable before the next begins, so a crash leaves the old mode or the new one
//! (FORMAT.md, "If power fails here").

use super::core::{BACKING, Token};
use super::disk::CachedDisk;
use super::journal::Pending;
use super::message::Reply;
use super::root::Mode;
use super::roots::RootWish;
use crate::base::{Error, ErrorKind, Result};
use crate::io::disk::{Errno, Operation, OperationKind};
use crate::io::volume::Io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// What a drainer's reply said.
const WAITING: u8 = 0;
const REACHED: u8 = 1;
const REFUSED: u8 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// What has been begun comes to its end; nothing that writes is begun.
    Settle,
    Drain,
    Retire,
    Flush,
    Root,
}

/// What is to become of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Goal {
    Mode(Mode),
    /// The clean detach.
    Close,
    /// Out of its consistency group.
    Leave,
}

impl Goal {
    /// The mode afterwards, if it is another.
    fn mode(self) -> Option<Mode> {
        match self {
            Self::Mode(mode) => Some(mode),
            Self::Close | Self::Leave => None,
        }
    }
}

/// A change under way.
pub(super) struct Changing {
    goal: Goal,
    step: Step,
    begun: bool,
    signal: Arc<AtomicU8>,
    reply: Reply<Result<()>>,
}

impl Changing {
    fn goes(&mut self, step: Step) {
        (self.step, self.begun) = (step, false);
        self.signal = Arc::new(AtomicU8::new(WAITING));
    }
}

impl CachedDisk {
    pub(super) fn begin_change(&mut self, goal: Goal, reply: Reply<Result<()>>) {
        if let Some(error) = self.refuse_change(goal) {
            return reply(Err(error));
        }
        let (core, changing, _) = self.parts();
        let stays = goal.mode().is_some_and(|to| to.journals() == core.mode.journals());
        let step = match (stays, core.mode) {
            (true, Mode::WriteBack) => Step::Drain,
            (true, _) => Step::Root,
            (false, _) => Step::Settle,
        };
        core.switching = !stays;
        let signal = Arc::new(AtomicU8::new(WAITING));
        *changing = Some(Changing { goal, step, begun: false, signal, reply });
    }

    /// Why a change cannot be begun.
    fn refuse_change(&mut self, goal: Goal) -> Option<Error> {
        let (core, changing, _) = self.parts();
        let (name, busy) = (core.name.clone(), changing.is_some() || core.is_fenced());
        if busy {
            let text = format!("{name}: another change is under way, or it is fenced");
            return Some(Error::new(ErrorKind::Busy, text));
        }
        let member = self.member();
        if goal == Goal::Leave && member.is_none() {
            let text = format!("{name} is in no consistency group");
            return Some(Error::new(ErrorKind::Invalid, text));
        }
        let member = member?;
        if goal.mode().is_some_and(|mode| !mode.journals()) {
            let text = format!(
                "{name} is in a consistency group, which keeps the order of what goes through the \
                 log: write-back and write-through do; take it out of the group first"
            );
            return Some(Error::new(ErrorKind::Invalid, text));
        }
        let absent = member.numbers().absent();
        let other = absent.first().filter(|_| goal.mode().is_none())?;
        let text = format!(
            "{name} cannot leave its consistency group while {} is not open: bring back its \
             backing {}, or give that disk up first (`vflash detach {} --lost`)",
            other.volume, other.backing, other.volume
        );
        Some(Error::new(ErrorKind::Busy, text))
    }

    /// Goes on with the change under way, as far as it can.
    pub(super) fn change(&mut self, io: &mut dyn Io) {
        let (core, changing, _) = self.parts();
        if core.is_fenced() {
            if let Some(change) = changing.take() {
                let text = format!("{}: fenced meanwhile", core.name);
                (change.reply)(Err(Error::new(ErrorKind::Fenced, text)));
            }
            return;
        }
        let Some(change) = changing else { return };
        let journals = core.mode.journals();
        match change.step {
            Step::Settle if journals => {
                let begun = core.journal.pending.front().is_some_and(|pending| match pending {
                    Pending::Request(id) => core.slots[*id as usize].done > 0,
                    Pending::Mark(_) => false,
                });
                core.journal.flush_wanted |= !core.journal.is_durable();
                if !begun && core.journal.is_settled() {
                    change.goes(Step::Drain);
                    self.change(io);
                }
            }
            Step::Settle if core.arounds.is_idle() => {
                change.goes(Step::Flush);
                self.change(io);
            }
            Step::Settle => {}
            Step::Drain | Step::Retire => self.change_drains(io),
            Step::Flush if !change.begun => {
                change.begun = true;
                let kind = OperationKind::Flush;
                let flush = Operation { kind, offset: 0, length: 0, segments: &[] };
                io.submit(BACKING, flush, Token::Change.pack(0));
            }
            Step::Root if !change.begun => {
                change.begun = true;
                let root = &mut core.roots.root;
                match change.goal.mode() {
                    Some(mode) => {
                        root.mode = mode;
                        if !mode.journals() {
                            root.clean_from = core.segments.next_sequence();
                            root.slab_epoch += 1;
                            core.clean.forget_tables();
                        }
                    }
                    None => root.clean = true,
                }
                core.write_root(RootWish::Change, io);
            }
            Step::Flush | Step::Root => {}
        }
    }

    /// The drainer's part.
    fn change_drains(&mut self, io: &mut dyn Io) {
        let (_, changing, _) = self.parts();
        let Some(change) = changing else { return };
        if !std::mem::replace(&mut change.begun, true) {
            let (step, close, signal) =
                (change.step, change.goal == Goal::Close, change.signal.clone());
            let reply = Box::new(move |result: std::result::Result<u64, _>| {
                let reached = if result.is_ok() { REACHED } else { REFUSED };
                signal.store(reached, Ordering::Release);
            });
            let (drainer, mut host) = self.drainer(io);
            match step {
                Step::Drain => drainer.drain(None, false, reply, &mut host),
                _ => drainer.retire(close, reply, &mut host),
            }
        }
        let (core, changing, _) = self.parts();
        let Some(change) = changing else { return };
        match change.signal.load(Ordering::Acquire) {
            WAITING => {}
            REACHED => {
                let journals = change.goal.mode().is_some_and(Mode::journals);
                let next = match change.step {
                    Step::Drain if !journals && core.sidecar => Step::Retire,
                    _ if change.goal == Goal::Leave => return self.left(),
                    _ => Step::Root,
                };
                change.goes(next);
                self.change(io);
            }
            _ => {
                let text = format!("{}: it cannot be drained", core.name);
                self.end_change(Error::new(ErrorKind::Io, text), io);
            }
        }
    }

    /// The backing has been flushed, or not.
    pub(super) fn change_flushed(
        &mut self,
        result: std::result::Result<(), Errno>,
        io: &mut dyn Io,
    ) {
        let (core, changing, _) = self.parts();
        let Some(change) = changing else { return };
        match result {
            Ok(()) if change.goal == Goal::Close && core.sidecar => change.goes(Step::Retire),
            Ok(()) => change.goes(Step::Root),
            Err(errno) => {
                let text = format!("{}: the backing failed to flush", core.name);
                self.end_change(Error::io(text, errno.into()), io);
            }
        }
    }

    /// The flash refuses the root that would complete the change: the mode stays. A detach goes
    /// on, since backing and stamp say all that anybody has to know.
    pub(super) fn change_refused(&mut self, io: &mut dyn Io) {
        let (core, changing, _) = self.parts();
        let Some(change) = changing else { return };
        if change.goal == Goal::Close {
            return self.change_rooted(io);
        }
        let error = core.refused_by_flash(&format!("its mode stays {}", core.mode.name()));
        self.end_change(error, io);
    }

    /// The change comes to nothing: what waited for it goes on as ever.
    fn end_change(&mut self, error: Error, io: &mut dyn Io) {
        let (core, changing, _) = self.parts();
        core.switching = false;
        let change = changing.take();
        if !core.mode.journals() {
            self.pass_by(io);
        }
        if let Some(change) = change {
            (change.reply)(Err(error));
        }
    }

    /// What waited for a place in the log goes past it, or nowhere if the disk is closed.
    fn pass_by(&mut self, io: &mut dyn Io) {
        let (core, _, closed) = self.parts();
        let mut dropped = Vec::new();
        for pending in std::mem::take(&mut core.journal.pending) {
            match pending {
                Pending::Request(id) if *closed => core.refuse(id, io),
                Pending::Request(id) => core.around(id, io),
                Pending::Mark(name) => dropped.push(name),
            }
        }
        core.answer(io);
        dropped.iter().for_each(|name| self.unmark(name));
    }

    /// The disk is in no consistency group any more.
    fn left(&mut self) {
        let (core, changing, _) = self.parts();
        core.switching = false;
        core.journal.leave_numbers();
        if let Some(change) = changing.take() {
            (change.reply)(Ok(()));
        }
    }

    /// The root that completes the change is durable.
    pub(super) fn change_rooted(&mut self, io: &mut dyn Io) {
        let (core, changing, closed) = self.parts();
        let Some(change) = changing.take() else { return };
        core.switching = false;
        match change.goal.mode() {
            Some(mode) => core.mode = mode,
            None => *closed = true,
        }
        match *closed || !core.mode.journals() {
            true => self.pass_by(io),
            false => core.answer(io),
        }
        (change.reply)(Ok(()));
    }
}
