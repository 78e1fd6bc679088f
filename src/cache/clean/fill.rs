//! Writes to slots, in the background: blocks that were fetched, and blocks that leave a slab for
//! another one.

use super::Core;
use super::held::Block;
use super::slabs::SlotAt;
use crate::base::clock::Nanos;
use crate::base::units::SECTOR_BYTES;
use crate::cache::core::Token;
use crate::cache::index::{BLOCK_SECTORS, Piece};
use crate::cache::policy::{BLOCK_BYTES, Place};
use crate::cache::record::piece_checksum;
use crate::cache::status::count;
use crate::io::buffer::PinnedBuffer;
use crate::io::disk::{Errno, Operation, OperationKind};
use crate::io::volume::Io;

/// Fills and moves under way at most, 1 MiB; what comes beyond is dropped.
const FILLS_MAX: usize = 256;

/// Of them moves: the rest is for fills.
const MOVES_MAX: usize = 32;

/// Blocks that go for one slot at most: the slab of one may be leaving itself.
const VICTIMS_MAX: usize = 4;

/// What is written to a slot.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    /// Fetched; where the policy wants it.
    Fill(Place),
    /// The piece that is moved. `read`: its data has come.
    Move { from: Piece, read: bool },
}

/// A slot being written.
pub(super) struct Fill {
    buffer: PinnedBuffer,
    block: u64,
    what: What,
    at: SlotAt,
    checksum: u32,
    stale: bool,
    failed: bool,
    under_way: u32,
}

impl Fill {
    /// The block is written by a guest.
    pub(super) fn stale(&mut self) {
        self.stale = true;
    }
}

/// What became of the wish to move a block.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Moving {
    Begun,
    /// Enough are under way.
    Later,
    Never,
}

impl Core {
    /// Writes a block to a slot, if there is one.
    pub(super) fn begin_fill(&mut self, block: u64, place: Place, data: &Block, io: &mut dyn Io) {
        let at = match self.may_fill(io.now()) && !self.clean.filling.contains_key(&block) {
            true => self.slot(),
            false => None,
        };
        let Some(at) = at else {
            return count(&self.status.counters.fills_dropped, 1);
        };
        let number = self.fill(block, What::Fill(place), at);
        let fill = &mut self.clean.fills[number as usize];
        fill.buffer.segment().copy_from(data);
        fill.checksum = piece_checksum(data);
        self.submit_fill(number, io);
    }

    fn may_fill(&self, now: Nanos) -> bool {
        let clean = &self.clean;
        let under_way = clean.fills.len() - clean.spare.len();
        under_way < FILLS_MAX && !clean.rest.rests(now) && !self.is_fenced()
    }

    /// A slot to be written: a free one, one of a free segment that the log can spare, or that of a
    /// block which has to go.
    fn slot(&mut self) -> Option<SlotAt> {
        if let Some(at) = self.clean.slabs.take() {
            return Some(at);
        }
        if !self.is_full() {
            let segment = self.segments.take_slab()?;
            self.clean.slabs.begin(segment);
            return self.clean.slabs.take();
        }
        (0..VICTIMS_MAX).find_map(|_| {
            let (policy, mut marks) = self.policy();
            let block = policy.reclaim(&mut marks)?;
            marks.index.drop_block(block);
            self.tidy_slots();
            self.clean.slabs.take()
        })
    }

    fn fill(&mut self, block: u64, what: What, at: SlotAt) -> u32 {
        let clean = &mut self.clean;
        let number = clean.spare.pop().unwrap_or_else(|| {
            let buffer = PinnedBuffer::new(BLOCK_BYTES as usize);
            let (checksum, under_way) = (0, 0);
            let (stale, failed) = (false, false);
            clean.fills.push(Fill { buffer, block, what, at, checksum, stale, failed, under_way });
            (clean.fills.len() - 1) as u32
        });
        let fill = &mut clean.fills[number as usize];
        (fill.block, fill.what, fill.at) = (block, what, at);
        (fill.stale, fill.failed) = (false, false);
        clean.filling.insert(block, number);
        number
    }

    fn submit_fill(&mut self, number: u32, io: &mut dyn Io) {
        let fill = &self.clean.fills[number as usize];
        let (kind, position) = match fill.what {
            What::Move { from, read: false } => (OperationKind::Read, from.position),
            _ => (OperationKind::Write, self.clean.slabs.position(fill.at)),
        };
        if kind == OperationKind::Write {
            count(&self.status.counters.kept_bytes, BLOCK_BYTES);
        }
        if let What::Move { read: true, .. } = fill.what {
            // For a fill the policy has charged itself.
            self.clean.policy.charge(BLOCK_BYTES);
        }
        let fill = &self.clean.fills[number as usize];
        let segments = [fill.buffer.segment()];
        let (offset, length) = (position * SECTOR_BYTES, BLOCK_BYTES);
        let operation = Operation { kind, offset, length, segments: &segments };
        let parts = self.submit_flash(operation, Token::Fill.pack(number), io);
        self.clean.fills[number as usize].under_way = parts;
    }

    /// Begins to move a block to another slab.
    pub(super) fn begin_move(&mut self, block: u64, from: Piece, io: &mut dyn Io) -> Moving {
        let clean = &self.clean;
        if clean.filling.contains_key(&block) || clean.rest.rests(io.now()) {
            return Moving::Never;
        }
        if clean.fills.len() - clean.spare.len() >= MOVES_MAX {
            return Moving::Later;
        }
        let Some(at) = self.slot() else { return Moving::Never };
        if self.index.whole(block) != Some(from) {
            // Its was the least of all.
            self.clean.slabs.free(at);
            return Moving::Never;
        }
        let number = self.fill(block, What::Move { from, read: false }, at);
        self.submit_fill(number, io);
        Moving::Begun
    }

    /// A part of a fill or of a move has been done.
    pub(in crate::cache) fn fill_completed(
        &mut self,
        number: u32,
        result: Result<(), Errno>,
        io: &mut dyn Io,
    ) {
        let fill = &mut self.clean.fills[number as usize];
        fill.under_way -= 1;
        fill.failed |= result.is_err();
        if fill.under_way > 0 {
            return;
        }
        if let What::Move { from, read: false } = fill.what {
            let mut data: Block = [0; BLOCK_BYTES as usize];
            fill.buffer.segment().copy_to(&mut data);
            fill.checksum = from.checksum;
            fill.failed |= piece_checksum(&data) != from.checksum;
            fill.what = What::Move { from, read: true };
            if !fill.failed && !fill.stale {
                return self.submit_fill(number, io);
            }
            // What cannot be read is not kept; it is in the backing.
            let gone = fill.failed && !fill.stale;
            gone.then(|| self.index.forget(from));
        } else {
            let failed = fill.failed;
            self.flash_written(!failed, io.now());
        }
        self.end_fill(number);
    }

    /// A write that the cache keeps something by has ended well, or not.
    pub(in crate::cache) fn flash_written(&mut self, good: bool, now: Nanos) {
        let rest = &mut self.clean.rest;
        match good {
            true if rest.succeeded() => log::info!("{}: the flash can be written", self.name),
            false if rest.failed(now) => {
                log::error!("{}: the flash fails: nothing is kept for a while", self.name);
            }
            _ => {}
        }
    }

    /// The slot has been written, or not.
    fn end_fill(&mut self, number: u32) {
        let fill = &self.clean.fills[number as usize];
        let (block, what, at) = (fill.block, fill.what, fill.at);
        let good = !fill.failed && !fill.stale && !self.is_fenced();
        let checksum = fill.checksum;
        if self.clean.filling.get(&block) == Some(&number) {
            self.clean.filling.remove(&block);
        }
        self.clean.spare.push(number);
        let wanted = match what {
            What::Fill(_) => self.index.is_absent(block),
            What::Move { from, .. } => self.index.whole(block) == Some(from),
        };
        let leaving = !self.clean.slabs.gives(at.segment);
        if !good || !wanted || leaving {
            self.clean.slabs.free(at);
            count(&self.status.counters.fills_dropped, u64::from(matches!(what, What::Fill(_))));
            return;
        }
        self.clean.slabs.written(at, block);
        let position = self.clean.slabs.position(at);
        let start = block * BLOCK_SECTORS;
        self.index.insert(Piece { start, count: 8, skip: 0, stored: 8, position, checksum });
        match what {
            What::Fill(place) => {
                let (policy, mut marks) = self.policy();
                policy.filled(block, place, &mut marks);
                self.evict();
                count(&self.status.counters.fills, 1);
            }
            What::Move { .. } => count(&self.status.counters.moves, 1),
        }
    }

    /// Writes to slots are under way.
    pub(super) fn is_filling(&self) -> bool {
        self.clean.fills.len() > self.clean.spare.len()
    }
}
