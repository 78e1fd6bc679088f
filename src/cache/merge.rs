//! A group being drained: the newest version of every sector that its records write.
//!
//! [`Merged`] takes the records in order of their WONs; a sector that is written again is
//! overwritten in place, so a hot block takes its room once. Data is copied once, into pinned
//! memory: when the group is finished ([`Merged::pack`]), runs of it are put in order where they
//! lie, and go to the sidecar and to the backing from there. They stay until they are durable in
//! the backing, so that whatever fails is written again.

use super::memory::{CHUNK_BYTES, DrainMemory};
use super::record::BLOCK_SECTORS;
use crate::base::planted::{Bug, planted};
use crate::base::units::SECTOR_BYTES;
use crate::io::buffer::{PinnedBuffer, Segment, gather};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

const CHUNK_SECTORS: u64 = CHUNK_BYTES / SECTOR_BYTES;

/// What becomes of sectors of the backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// They are written. Where their data lies: in sectors of the group's data.
    Data(u64),
    /// They are zeroed.
    Zero,
    /// They are zeroed and may lose their space.
    Discard,
}

/// Sectors of the backing with one fate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub start: u64,
    pub count: u64,
    pub content: Content,
}

impl Span {
    pub(super) fn end(&self) -> u64 {
        self.start + self.count
    }

    fn clip(&self, first: u64, end: u64) -> Option<Self> {
        let start = self.start.max(first);
        let end = self.end().min(end);
        let content = match self.content {
            Content::Data(at) => Content::Data(at + start.saturating_sub(self.start)),
            other => other,
        };
        (start < end).then(|| Self { start, count: end - start, content })
    }
}

/// What a group may hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub data_bytes: u64,
    pub spans: usize,
    /// Sectors of a block of the backing: blocks written in part will be filled up.
    pub block_sectors: u64,
}

/// Sectors in pinned memory, one behind the other: a *place* counts them.
struct Pile {
    chunks: Vec<PinnedBuffer>,
    sectors: u64,
    memory: Arc<DrainMemory>,
}

/// Chunks that a disk may always have: a group of one record fits.
const CHUNKS_OWN: usize = 4;

impl Pile {
    /// Whether there is memory for `sectors` in all.
    fn reserve(&mut self, sectors: u64) -> bool {
        while (self.chunks.len() as u64) * CHUNK_SECTORS < sectors {
            if self.chunks.len() >= CHUNKS_OWN && !self.memory.take() {
                return false;
            }
            self.chunks.push(PinnedBuffer::new(CHUNK_BYTES as usize));
        }
        true
    }

    /// Copies `data` behind what is there, to a multiple of `align` sectors; its place.
    fn push(&mut self, data: &[u8], align: u64) -> u64 {
        let place = self.sectors.next_multiple_of(align);
        self.sectors = place + data.len() as u64 / SECTOR_BYTES;
        while !self.reserve(self.sectors) {
            // Little, and needed to finish what was begun.
            self.memory.overdraw();
            self.chunks.push(PinnedBuffer::new(CHUNK_BYTES as usize));
        }
        self.write(place, data);
        place
    }

    fn write(&self, place: u64, mut data: &[u8]) {
        for part in self.parts(place, data.len() as u64 / SECTOR_BYTES) {
            let copied = part.copy_from(data);
            data = &data[copied..];
        }
    }

    /// The memory of `count` sectors from `place` on.
    fn parts(&self, place: u64, count: u64) -> impl Iterator<Item = Segment> + '_ {
        let (mut at, end) = (place, place + count);
        std::iter::from_fn(move || {
            let inside = at % CHUNK_SECTORS;
            let length = (CHUNK_SECTORS - inside).min(end - at);
            let chunk = self.chunks.get((at / CHUNK_SECTORS) as usize).filter(|_| length > 0)?;
            at += length;
            let skip = (inside * SECTOR_BYTES) as usize;
            Some(chunk.segment().part(skip, (length * SECTOR_BYTES) as usize))
        })
    }

    /// Forgets all, and gives memory back but for `keep` chunks.
    fn clear(&mut self, keep: usize) {
        self.sectors = 0;
        let shared = |chunks: usize| chunks.saturating_sub(CHUNKS_OWN);
        let before = shared(self.chunks.len());
        self.chunks.truncate(keep);
        self.memory.give(before - shared(self.chunks.len()));
    }
}

impl Drop for Pile {
    fn drop(&mut self) {
        self.clear(0);
    }
}

/// Sectors of the backing with one fate, of a finished group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub span: Span,
    /// Of [`Merged::pieces`]: where its data lies.
    pieces: Range<usize>,
}

/// The records of a group so far; when it is finished, the group.
pub(super) struct Merged {
    /// By start; disjoint.
    spans: BTreeMap<u64, Span>,
    pile: Pile,
    /// Sectors of data that were added.
    sectors: u64,
    limits: Limits,
    /// Of the finished group: ascending; data at most a chunk long each, told by its place among
    /// all data of the group.
    runs: Vec<Run>,
    /// Places and sectors of the runs' data, in order.
    pieces: Vec<(u64, u64)>,
    /// Of all runs.
    run_sectors: u64,
}

impl Merged {
    pub(super) fn new(limits: Limits, memory: Arc<DrainMemory>) -> Self {
        Self {
            spans: BTreeMap::new(),
            pile: Pile { chunks: Vec::new(), sectors: 0, memory },
            sectors: 0,
            limits,
            runs: Vec::new(),
            pieces: Vec::new(),
            run_sectors: 0,
        }
    }

    /// Begins a new group; gives memory back that others wait for.
    pub(super) fn clear(&mut self) {
        let short = self.pile.memory.is_short();
        self.empty(if short { CHUNKS_OWN } else { usize::MAX });
    }

    /// Begins the same group again: what had room has room.
    pub(super) fn clear_again(&mut self) {
        self.empty(usize::MAX);
    }

    /// Gives memory back while there is nothing to do.
    pub(super) fn release(&mut self) {
        self.empty(0);
        (self.runs, self.pieces) = (Vec::new(), Vec::new());
    }

    /// Gives memory back but for `keep` chunks.
    fn empty(&mut self, keep: usize) {
        self.spans.clear();
        self.pile.clear(keep);
        self.runs.clear();
        self.pieces.clear();
        (self.sectors, self.run_sectors) = (0, 0);
    }

    /// More than half of the room for data is taken.
    pub(super) fn is_half_full(&self) -> bool {
        self.sectors * SECTOR_BYTES > self.limits.data_bytes / 2
    }

    /// Whether a write of `count` sectors, or a range of zeros if that is 0, surely fits.
    pub(super) fn has_room(&mut self, count: u64) -> bool {
        // A write in the middle of a range makes three spans of it; long runs are cut by chunks.
        let spans = self.spans.len() + 3 + (count / CHUNK_SECTORS) as usize;
        let chunks = (self.sectors + count) / CHUNK_SECTORS;
        let filled = 2 * spans as u64 * (self.limits.block_sectors - 1);
        let sectors = self.sectors + count + filled;
        spans + chunks as usize <= self.limits.spans
            && sectors * SECTOR_BYTES <= self.limits.data_bytes
            && self.pile.reserve(self.pile.sectors + count)
    }

    /// A write: `data` is exactly its sectors.
    pub(super) fn write(&mut self, start: u64, data: &[u8]) {
        let end = start + data.len() as u64 / SECTOR_BYTES;
        let part = |from: u64, to: u64| {
            let bytes = |sector: u64| ((sector - start) * SECTOR_BYTES) as usize;
            &data[bytes(from)..bytes(to)]
        };
        let old: Vec<Span> = self.within(start, end).collect();
        let mut at = start;
        for span in old {
            if let Content::Data(place) = span.content {
                self.append(at, part(at, span.start));
                if !planted(Bug::OverlapSwapped) {
                    self.pile.write(place, part(span.start, span.end()));
                }
                at = span.end();
            } else {
                self.cut(span.start, span.end());
            }
        }
        self.append(at, part(at, end));
    }

    /// `count` sectors from `start` become zeros.
    pub(super) fn zero(&mut self, start: u64, count: u64, discard: bool) {
        if count > 0 {
            self.cut(start, start + count);
            let content = if discard { Content::Discard } else { Content::Zero };
            self.spans.insert(start, Span { start, count, content });
        }
    }

    /// Adds data where nothing is.
    fn append(&mut self, start: u64, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        // Whole blocks lie so that they need not be copied again.
        let align = if start.is_multiple_of(BLOCK_SECTORS) { BLOCK_SECTORS } else { 1 };
        let content = Content::Data(self.pile.push(data, align));
        let count = data.len() as u64 / SECTOR_BYTES;
        self.sectors += count;
        self.spans.insert(start, Span { start, count, content });
    }

    /// The parts of spans inside `start..end`.
    fn within(&self, start: u64, end: u64) -> impl Iterator<Item = Span> {
        let before = self.spans.range(..start).next_back();
        let inside = self.spans.range(start..end);
        before.into_iter().chain(inside).filter_map(move |(_, span)| span.clip(start, end))
    }

    fn cut(&mut self, start: u64, end: u64) {
        let inside: Vec<Span> = self.within(start, end).collect();
        for part in inside {
            let key = *self.spans.range(..=part.start).next_back().expect("it was just seen").0;
            let span = self.spans.remove(&key).expect("it was just seen");
            for rest in [span.clip(0, start), span.clip(end, u64::MAX)].into_iter().flatten() {
                self.spans.insert(rest.start, rest);
            }
        }
    }

    /// What is missing of blocks that the group covers in part: start and count, in sectors.
    pub(super) fn missing(&self) -> Vec<(u64, u64)> {
        let block = self.limits.block_sectors;
        let mut missing = Vec::new();
        let edges = self.spans.values().flat_map(|span| [span.start, span.end()]);
        let mut done = None;
        for edge in edges.filter(|edge| !edge.is_multiple_of(block)) {
            let first = edge / block * block;
            if done.replace(first) == Some(first) {
                continue;
            }
            let mut at = first;
            for span in self.within(first, first + block) {
                if span.start > at {
                    missing.push((at, span.start - at));
                }
                at = span.end();
            }
            if at < first + block {
                missing.push((at, first + block - at));
            }
        }
        missing
    }

    /// Zeros that are no whole blocks become data, so that every span is whole blocks once what
    /// is [`Self::missing`] has been written.
    pub(super) fn align_zeros(&mut self) {
        let block = self.limits.block_sectors;
        let odd = |span: &&Span| {
            let aligned = span.start.is_multiple_of(block) && span.end().is_multiple_of(block);
            !matches!(span.content, Content::Data(_)) && !aligned
        };
        let odd: Vec<Span> = self.spans.values().filter(odd).copied().collect();
        for span in odd {
            let (first, last) = (span.start.next_multiple_of(block), span.end() / block * block);
            let ends = match first < last {
                true => vec![(span.start, first), (last, span.end())],
                false => vec![(span.start, span.end())],
            };
            for (start, end) in ends.into_iter().filter(|(start, end)| start < end) {
                self.write(start, &vec![0; ((end - start) * SECTOR_BYTES) as usize]);
            }
        }
    }

    /// Finishes the group: neighbours joined, data in ascending order. What is no whole blocks is
    /// copied together, so that a device gets whole blocks of memory too.
    pub(super) fn pack(&mut self) {
        self.runs.clear();
        self.pieces.clear();
        self.run_sectors = 0;
        let spans = std::mem::take(&mut self.spans);
        for span in spans.values() {
            let Content::Data(place) = span.content else {
                self.push_zero(*span);
                continue;
            };
            let whole = |sectors: u64| sectors.is_multiple_of(BLOCK_SECTORS);
            if whole(span.start) && whole(span.count) && whole(place) {
                self.push_data(span.start, (place, span.count));
            } else {
                let mut bytes = vec![0; (span.count * SECTOR_BYTES) as usize];
                gather(&self.pile.parts(place, span.count).collect::<Vec<_>>(), &mut bytes);
                let align = if whole(span.start) { BLOCK_SECTORS } else { 1 };
                let place = self.pile.push(&bytes, align);
                self.push_data(span.start, (place, span.count));
            }
        }
        self.spans = spans;
    }

    fn push_zero(&mut self, span: Span) {
        match self.runs.last_mut() {
            Some(Run { span: last, .. })
                if last.content == span.content && last.end() == span.start =>
            {
                last.count += span.count;
            }
            _ => self.runs.push(Run { span, pieces: 0..0 }),
        }
    }

    fn push_data(&mut self, mut start: u64, (mut place, mut count): (u64, u64)) {
        while count > 0 {
            let last = self.runs.last().map(|run| run.span);
            let room = match last {
                Some(last @ Span { content: Content::Data(_), .. }) if last.end() == start => {
                    CHUNK_SECTORS - last.count
                }
                _ => 0,
            };
            if room == 0 {
                let content = Content::Data(self.run_sectors);
                let pieces = self.pieces.len()..self.pieces.len();
                self.runs.push(Run { span: Span { start, count: 0, content }, pieces });
            }
            let part = count.min(if room == 0 { CHUNK_SECTORS } else { room });
            let run = self.runs.last_mut().expect("there is one now");
            match self.pieces[run.pieces.clone()].last_mut() {
                Some((before, sectors)) if *before + *sectors == place => *sectors += part,
                _ => {
                    self.pieces.push((place, part));
                    run.pieces.end += 1;
                }
            }
            run.span.count += part;
            self.run_sectors += part;
            (start, place, count) = (start + part, place + part, count - part);
        }
    }

    /// Of the finished group.
    pub(super) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The memory of a run's data, in order.
    pub(super) fn memory(&self, run: &Run) -> Vec<Segment> {
        let pieces = self.pieces[run.pieces.clone()].iter();
        pieces.flat_map(|(place, count)| self.pile.parts(*place, *count)).collect()
    }

    /// The data as it goes to the sidecar: about a chunk at a time, each with its byte among all
    /// data. The last one ends where the data ends.
    pub(super) fn stretches(&self) -> Vec<(u64, Vec<Segment>)> {
        let mut stretches: Vec<(u64, Vec<Segment>)> = Vec::new();
        let (mut at, mut length) = (0, CHUNK_BYTES);
        for (place, count) in &self.pieces {
            for mut part in self.pile.parts(*place, *count) {
                while part.length() > 0 {
                    if length == CHUNK_BYTES {
                        stretches.push((at, Vec::new()));
                        length = 0;
                    }
                    let head = part.part(0, (CHUNK_BYTES - length) as usize);
                    part = part.part(head.length(), part.length());
                    (at, length) = (at + head.length() as u64, length + head.length() as u64);
                    stretches.last_mut().expect("just pushed").1.push(head);
                }
            }
        }
        stretches
    }
}

#[cfg(test)]
#[path = "merge_test.rs"]
mod tests;
