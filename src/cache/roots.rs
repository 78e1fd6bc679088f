//! Roots while the disk runs: one is written at a time, always the newest there is to say.
//!
//! A flash that takes no root fences the disk, but where it only holds copies: in the modes past
//! the log, once all is drained. There a root that cannot be written is *refused*: who wished for
//! it is told, and nothing else has changed. What was tried may be on the flash all the same, so
//! either root may be the one that the next opening finds (FORMAT.md, "If power fails here").

use super::core::{Core, FLASH, Token};
use super::layout::{BLOCK_BYTES, root_offsets};
use super::root::Root;
use crate::base::{Error, ErrorKind};
use crate::io::buffer::PinnedBuffer;
use crate::io::disk::{Errno, Operation, OperationKind};
use crate::io::volume::Io;

/// Times that a root is written before the flash counts as failing.
const ATTEMPTS_MAX: u32 = 5;

/// Who waits for a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RootWish {
    /// The drainer, for its position.
    Drain {
        token: u32,
    },
    /// The mode change or detach in progress.
    Change,
    /// The resize in progress.
    Resize,
    /// An operator's wish.
    Checkpoint,
    /// The slot tables, which are up to date; and that none of them counts.
    Tables,
    Cold,
}

/// See the module.
pub(super) struct Roots {
    /// What the next root says.
    pub root: Root,
    buffer: PinnedBuffer,
    under_way: u32,
    failures: u32,
    attempts: u32,
    /// Wait for the root that is being written.
    current: Vec<RootWish>,
    /// Wait for the next one.
    waiting: Vec<RootWish>,
}

impl Roots {
    /// `root` is durable.
    pub(super) fn new(root: Root) -> Self {
        Self {
            root,
            buffer: PinnedBuffer::new(BLOCK_BYTES as usize),
            under_way: 0,
            failures: 0,
            attempts: 0,
            current: Vec::new(),
            waiting: Vec::new(),
        }
    }

    pub(super) fn is_busy(&self) -> bool {
        self.under_way > 0
    }
}

impl Core {
    /// Makes what `roots.root` says durable.
    pub(super) fn write_root(&mut self, wish: RootWish, io: &mut dyn Io) {
        self.roots.waiting.push(wish);
        if !self.roots.is_busy() {
            self.next_root(io);
        }
    }

    fn next_root(&mut self, io: &mut dyn Io) {
        if self.roots.waiting.is_empty() {
            return;
        }
        let oldest = self.segments.oldest_needed(self.roots.root.drained_through);
        let roots = &mut self.roots;
        roots.root.oldest_segment = oldest;
        roots.root.sequence += 1;
        roots.attempts = 0;
        std::mem::swap(&mut roots.current, &mut roots.waiting);
        roots.buffer.segment().copy_from(&roots.root.encode());
        self.submit_root(io);
    }

    fn submit_root(&mut self, io: &mut dyn Io) {
        let segments = [self.roots.buffer.segment()];
        for offset in root_offsets(self.roots.root.sequence) {
            let part =
                self.place.parts(offset, BLOCK_BYTES).next().expect("a root is one extent's");
            let kind = OperationKind::WriteDurable;
            let length = BLOCK_BYTES;
            let write = Operation { kind, offset: part.offset, length, segments: &segments };
            io.submit(FLASH, write, Token::Root.pack(0));
            self.roots.under_way += 1;
        }
    }

    /// A copy has been written; who waited for the root, once it is durable (`Ok`) or refused.
    pub(super) fn root_completed(
        &mut self,
        result: Result<(), Errno>,
        io: &mut dyn Io,
    ) -> Result<Vec<RootWish>, Vec<RootWish>> {
        let roots = &mut self.roots;
        roots.under_way -= 1;
        roots.failures += u32::from(result.is_err());
        if roots.under_way > 0 {
            return Ok(Vec::new());
        }
        let failures = std::mem::take(&mut roots.failures);
        if failures > 0 {
            roots.attempts += 1;
            if roots.attempts < ATTEMPTS_MAX {
                self.submit_root(io);
                return Ok(Vec::new());
            }
            if failures > 1 {
                return Err(self.root_refused(io));
            }
            log::warn!("one copy of the cache's root cannot be written; the other one is whole");
        }
        let done = std::mem::take(&mut self.roots.current);
        self.next_root(io);
        Ok(done)
    }

    /// The flash takes no root: fences the disk, or says whose wishes come to nothing.
    fn root_refused(&mut self, io: &mut dyn Io) -> Vec<RootWish> {
        let mut wishes = std::mem::take(&mut self.roots.current);
        wishes.append(&mut self.roots.waiting);
        let drains = wishes.iter().any(|wish| matches!(wish, RootWish::Drain { .. }));
        let copies = !self.mode.journals() && self.drained >= self.journal.counted_won;
        if drains || !copies {
            self.fence("the flash refuses to write the cache's root".to_owned(), io);
            return Vec::new();
        }
        log::error!(
            "{}: the flash refuses to write the cache's root; guests are served from the backing",
            self.name
        );
        let root = &mut self.roots.root;
        (root.mode, root.clean, root.shape) = (self.mode, false, self.segments.shape());
        // The next one goes where this one failed: the other place has the last that is whole.
        root.sequence += 1;
        wishes
    }

    /// Why a wish came to nothing, and what follows.
    pub(super) fn refused_by_flash(&self, what: &str) -> Error {
        let text = format!(
            "{}: {what}, since the flash refuses to write the cache's root: nothing is lost, and \
             guests are served from the backing; replace the drive and attach the disk anew",
            self.name
        );
        Error::new(ErrorKind::Io, text)
    }
}
