//! A group being drained: the newest version of every sector that its records write.
//!
//! [`Merged`] takes the records in order of their WONs; a sector that is written again is
//! overwritten in place, so a hot block takes its room once. [`Packed`] is the finished group,
//! sorted and in pinned memory: it goes to the sidecar and to the backing from there, and stays
//! until it is durable in the backing, so that whatever fails is written again.

use crate::base::planted::{Bug, planted};
use crate::base::units::SECTOR_BYTES;
use crate::io::buffer::{PinnedBuffer, Segment};
use std::collections::BTreeMap;

/// Bytes of a chunk of pinned memory, and of one transfer at most.
pub(super) const CHUNK_BYTES: u64 = 1 << 20;

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

/// The records of a group so far.
pub(super) struct Merged {
    /// By start; disjoint.
    spans: BTreeMap<u64, Span>,
    data: Vec<u8>,
    limits: Limits,
}

impl Merged {
    pub(super) fn new(limits: Limits) -> Self {
        Self { spans: BTreeMap::new(), data: Vec::new(), limits }
    }

    fn used_sectors(&self) -> u64 {
        self.data.len() as u64 / SECTOR_BYTES
    }

    /// Begins a new group.
    pub(super) fn clear(&mut self) {
        self.spans.clear();
        self.data.clear();
    }

    /// Gives memory back while there is nothing to do.
    pub(super) fn release(&mut self) {
        self.clear();
        self.data = Vec::new();
    }

    /// More than half of the room for data is taken.
    pub(super) fn is_half_full(&self) -> bool {
        self.data.len() as u64 > self.limits.data_bytes / 2
    }

    /// Whether a write of `count` sectors, or a range of zeros if that is 0, surely fits.
    pub(super) fn has_room(&self, count: u64) -> bool {
        // A write in the middle of a range makes three spans of it; long runs are cut by chunks.
        let spans = self.spans.len() + 3 + (count / CHUNK_SECTORS) as usize;
        let chunks = (self.used_sectors() + count) / CHUNK_SECTORS;
        let filled = 2 * spans as u64 * (self.limits.block_sectors - 1);
        let sectors = self.used_sectors() + count + filled;
        spans + chunks as usize <= self.limits.spans
            && sectors * SECTOR_BYTES <= self.limits.data_bytes
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
                let place = (place * SECTOR_BYTES) as usize;
                let new = part(span.start, span.end());
                if !planted(Bug::OverlapSwapped) {
                    self.data[place..place + new.len()].copy_from_slice(new);
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
        let content = Content::Data(self.used_sectors());
        let count = data.len() as u64 / SECTOR_BYTES;
        self.data.extend_from_slice(data);
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

    /// The finished group: neighbours joined, data in ascending order.
    pub(super) fn pack(&self, packed: &mut Packed) {
        packed.clear();
        for span in self.spans.values() {
            match span.content {
                Content::Data(place) => {
                    let place = (place * SECTOR_BYTES) as usize;
                    let length = (span.count * SECTOR_BYTES) as usize;
                    packed.push_data(span.start, &self.data[place..place + length]);
                }
                content => packed.push_zero(Span { content, ..*span }),
            }
        }
    }
}

/// A finished group.
#[derive(Default)]
pub(super) struct Packed {
    /// Ascending; data at most a chunk long each, and in ascending order of its place too.
    runs: Vec<Span>,
    chunks: Vec<PinnedBuffer>,
    sectors: u64,
}

impl Packed {
    fn clear(&mut self) {
        self.runs.clear();
        self.sectors = 0;
    }

    /// Gives memory back while there is nothing to do.
    pub(super) fn release(&mut self) {
        *self = Self::default();
    }

    pub(super) fn runs(&self) -> &[Span] {
        &self.runs
    }

    pub(super) fn data_bytes(&self) -> u64 {
        self.sectors * SECTOR_BYTES
    }

    fn push_zero(&mut self, span: Span) {
        match self.runs.last_mut() {
            Some(last) if last.content == span.content && last.end() == span.start => {
                last.count += span.count;
            }
            _ => self.runs.push(span),
        }
    }

    fn push_data(&mut self, mut start: u64, mut data: &[u8]) {
        while !data.is_empty() {
            let room = match self.runs.last() {
                Some(Span { content: Content::Data(_), count, .. })
                    if self.runs.last().is_some_and(|last| last.end() == start) =>
                {
                    CHUNK_SECTORS - count
                }
                _ => 0,
            };
            if room == 0 {
                self.runs.push(Span { start, count: 0, content: Content::Data(self.sectors) });
            }
            let room = if room == 0 { CHUNK_SECTORS } else { room };
            let inside = self.sectors % CHUNK_SECTORS;
            let count = room.min(CHUNK_SECTORS - inside).min(data.len() as u64 / SECTOR_BYTES);
            if inside == 0 && self.sectors / CHUNK_SECTORS == self.chunks.len() as u64 {
                self.chunks.push(PinnedBuffer::new(CHUNK_BYTES as usize));
            }
            let (head, rest) = data.split_at((count * SECTOR_BYTES) as usize);
            let chunk = &self.chunks[(self.sectors / CHUNK_SECTORS) as usize];
            chunk.segment().part((inside * SECTOR_BYTES) as usize, head.len()).copy_from(head);
            self.runs.last_mut().expect("just pushed").count += count;
            self.sectors += count;
            start += count;
            data = rest;
        }
    }

    /// The memory of `count` sectors of data from `place` on.
    pub(super) fn segments(&self, place: u64, count: u64) -> Vec<Segment> {
        let mut segments = Vec::with_capacity(2);
        let (mut at, end) = (place, place + count);
        while at < end {
            let inside = at % CHUNK_SECTORS;
            let length = (CHUNK_SECTORS - inside).min(end - at);
            let chunk = &self.chunks[(at / CHUNK_SECTORS) as usize];
            let skip = (inside * SECTOR_BYTES) as usize;
            segments.push(chunk.segment().part(skip, (length * SECTOR_BYTES) as usize));
            at += length;
        }
        segments
    }

    /// A copy of a run's data.
    pub(super) fn bytes(&self, place: u64, count: u64) -> Vec<u8> {
        let mut bytes = vec![0; (count * SECTOR_BYTES) as usize];
        crate::io::buffer::gather(&self.segments(place, count), &mut bytes);
        bytes
    }

    /// The data as it goes to the sidecar: chunk by chunk, the last one up to a whole block of
    /// `block` bytes.
    pub(super) fn chunks(&self, block: u64) -> impl Iterator<Item = (u64, Segment)> {
        let total = self.data_bytes().next_multiple_of(block);
        self.chunks.iter().enumerate().map_while(move |(index, chunk)| {
            let at = index as u64 * CHUNK_BYTES;
            let length = CHUNK_BYTES.min(total.checked_sub(at)?);
            (length > 0).then(|| (at, chunk.segment().part(0, length as usize)))
        })
    }
}

#[cfg(test)]
#[path = "merge_test.rs"]
mod tests;
