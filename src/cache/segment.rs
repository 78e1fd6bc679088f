//! The segments of the allocation: which is where in the chain, and what becomes of it.
//!
//! ```text
//! Free → Open → Closed → Clean → Sorting → Slab → Leaving → Free
//!  │ └ given up before a batch counted ┘    ↑
//!  └────────────────────────────────────────┘
//! ```
//!
//! *Open*: appended to. *Closed*: full, or given up after a failed append; some of its records are
//! not drained. *Clean*: all are; reads still use it. *Sorting*: the index is being asked what of
//! it is left. *Slab*: slots with clean blocks, those that were there or others. *Emptying*: its
//! blocks are moved or dropped; free when none is left and the last read has ended.
//!
//! When the allocation shrinks, segments behind the new end *leave* ([`Segments::limit`]): a free
//! one is not given out any more, a slab is emptied, a dirty one drained first.

use super::drain::{LogCursor, LogStretch};
use super::layout::{BLOCK_BYTES, Shape};
use std::collections::VecDeque;

/// What a segment is used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SegmentState {
    #[default]
    Free,
    Open,
    Closed,
    Clean,
    Sorting,
    Slab,
    Emptying,
}

/// One segment in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    pub state: SegmentState,
    pub sequence: u64,
    pub salt: u64,
    /// WON of its first record.
    pub first_won: u64,
    /// WON of its last record that counts.
    pub last_won: u64,
    /// Bytes of batches that count, header included.
    pub end: u32,
    /// As `end`, durable: the drainer reads up to here.
    pub durable_end: u32,
    /// Reads under way, and the write of its summary.
    pub pins: u32,
    /// Appends that have been given a place in it and do not count yet.
    pub appending: u32,
}

/// See the module.
pub struct Segments {
    shape: Shape,
    list: Vec<Segment>,
    /// Closed ones and the open one, by sequence.
    chain: VecDeque<u32>,
    clean: VecDeque<u32>,
    sorting: Vec<u32>,
    slabs: u64,
    emptying: Vec<u32>,
    free: VecDeque<u32>,
    next_sequence: u64,
    /// The newest that left the chain because it was drained.
    drained_sequence: u64,
    /// Segments from this one on leave.
    limit: u32,
    /// Those of them that are still in use.
    leaving: u64,
}

/// A part of a segment that is not known to be durable, in bytes of the segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doubtful {
    pub segment: u32,
    pub from: u64,
    pub to: u64,
}

/// How many segments are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentCounts {
    pub free: u64,
    pub dirty: u64,
    /// Slabs among them.
    pub clean: u64,
    /// About to be free.
    pub retiring: u64,
    /// Of all these but the free ones: behind the end that the allocation is to have.
    pub leaving: u64,
}

impl SegmentCounts {
    /// Thousandths that hold records which are not drained.
    pub fn dirty_permille(&self) -> u64 {
        let Self { free, dirty, clean, retiring, leaving: _ } = *self;
        (dirty * 1000).checked_div(free + dirty + clean + retiring).unwrap_or(0)
    }
}

impl Segments {
    /// All are free.
    pub fn new(shape: Shape, next_sequence: u64) -> Self {
        let count = shape.segments() as u32;
        Self {
            shape,
            list: vec![Segment::default(); count as usize],
            chain: VecDeque::with_capacity(count as usize),
            clean: VecDeque::with_capacity(count as usize),
            sorting: Vec::with_capacity(count as usize),
            slabs: 0,
            emptying: Vec::with_capacity(count as usize),
            free: (0..count).collect(),
            next_sequence,
            drained_sequence: 0,
            limit: count,
            leaving: 0,
        }
    }

    /// Takes over a segment that recovery found: closed, or clean. In order of sequence.
    pub fn adopt(&mut self, index: u32, segment: Segment) {
        self.free.retain(|free| *free != index);
        match segment.state {
            SegmentState::Clean => {
                self.drained_sequence = segment.sequence;
                self.clean.push_back(index);
            }
            SegmentState::Closed => self.chain.push_back(index),
            state => panic!("{state:?} is not what recovery finds"),
        }
        self.next_sequence = self.next_sequence.max(segment.sequence + 1);
        self.list[index as usize] = segment;
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }

    pub fn get(&self, index: u32) -> &Segment {
        &self.list[index as usize]
    }

    pub fn counts(&self) -> SegmentCounts {
        SegmentCounts {
            free: self.free.len() as u64,
            dirty: self.chain.len() as u64,
            clean: self.clean.len() as u64 + self.sorting.len() as u64 + self.slabs,
            retiring: self.emptying.len() as u64,
            leaving: self.leaving,
        }
    }

    /// Only the first `count` segments are given out from now on; the others leave. Called again
    /// with more, those go on as before.
    pub fn limit(&mut self, count: u32) {
        assert!(count as usize <= self.list.len(), "an allocation ends where it ends");
        let before = std::mem::replace(&mut self.limit, count);
        let list = &self.list;
        let is_free = |index: &u32| list[*index as usize].state == SegmentState::Free;
        self.free.extend((before..count).filter(is_free));
        self.free.retain(|index| *index < count);
        let in_use = |segment: &&Segment| segment.state != SegmentState::Free;
        self.leaving = list[count as usize..].iter().filter(in_use).count() as u64;
    }

    /// Segments that leave and are still in use.
    pub fn leaving(&self) -> u64 {
        self.leaving
    }

    /// Some that leave hold records that are not drained, or may come to.
    pub fn is_leaving_dirty(&self) -> bool {
        self.leaving > 0 && self.chain.iter().any(|index| *index >= self.limit)
    }

    /// Some of the chain has a durable batch, and so a header that says how far the numbers have
    /// come.
    pub fn is_told(&self) -> bool {
        self.chain.iter().any(|index| self.get(*index).durable_end > 0)
    }

    /// Whether the segment is one of those that leave.
    pub fn leaves(&self, index: u32) -> bool {
        index >= self.limit
    }

    /// The allocation has more segments, or fewer: those that go have left.
    pub fn reshape(&mut self, shape: Shape) {
        assert_eq!(shape.segment_bytes, self.shape.segment_bytes, "segments keep their size");
        let count = shape.segments() as usize;
        let gone = self.list.get(count..).unwrap_or_default();
        let has_left = |segment: &Segment| segment.state == SegmentState::Free;
        assert!(gone.iter().all(has_left), "what goes has left");
        self.free.retain(|index| (*index as usize) < count);
        self.limit = self.limit.min(count as u32);
        self.list.resize(count, Segment::default());
        self.shape = shape;
        self.limit(count as u32);
    }

    /// The sequence that the next segment will have.
    pub fn next_sequence(&self) -> u64 {
        self.next_sequence
    }

    /// Of all segments that hold records above `drained`, the oldest; else the one to come.
    pub fn oldest_needed(&self, drained: u64) -> u64 {
        let needed = self.chain.iter().map(|index| self.get(*index));
        let mut needed = needed.filter(|segment| segment.last_won > drained || segment.grows());
        needed.next().map_or(self.next_sequence, |segment| segment.sequence)
    }

    /// The newest segment of the chain that has batches, if any.
    pub fn newest(&self) -> Option<&Segment> {
        self.chain.iter().rev().map(|index| self.get(*index)).find(|segment| segment.end > 0)
    }

    /// Sequence of the segment that comes before `index` in the log; 0: none.
    pub fn before(&self, index: u32) -> u64 {
        let at = self.chain.iter().position(|other| *other == index);
        let before = at.and_then(|at| at.checked_sub(1)).map(|at| self.chain[at]);
        before.map_or(self.drained_sequence, |before| self.get(before).sequence)
    }

    /// Takes a free segment to append to. The salt is set by the caller.
    pub fn open(&mut self, first_won: u64) -> Option<u32> {
        let index = self.free.pop_front()?;
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let state = SegmentState::Open;
        self.list[index as usize] = Segment { state, sequence, first_won, ..Segment::default() };
        self.chain.push_back(index);
        Some(index)
    }

    pub fn set_salt(&mut self, index: u32, salt: u64) {
        self.list[index as usize].salt = salt;
    }

    /// A batch that ends at byte `end` of the open segment counts from now on.
    pub fn grew(&mut self, index: u32, end: u32, last_won: u64) {
        let segment = &mut self.list[index as usize];
        assert!(end > segment.end && last_won >= segment.last_won, "a log only grows");
        (segment.end, segment.last_won) = (end, last_won);
        segment.appending -= 1;
    }

    /// The segment `sequence` is durable up to byte `end`, and so is all of those before it.
    pub fn durable(&mut self, sequence: u64, end: u32) {
        for index in self.chain.iter().rev() {
            let segment = &mut self.list[*index as usize];
            if segment.sequence > sequence {
                continue;
            }
            let end = if segment.sequence == sequence { end } else { segment.end };
            if segment.sequence < sequence && segment.durable_end == end {
                break;
            }
            segment.durable_end = segment.durable_end.max(end);
        }
    }

    /// What counts and is not durable, up to byte `end` of segment `sequence`, in the log's order.
    pub fn doubtful(&self, (sequence, end): (u64, u32)) -> Vec<Doubtful> {
        let part = |index: &u32| {
            let segment = self.get(*index);
            let to = if segment.sequence == sequence { end } else { segment.end };
            let (from, to) = (segment.durable_end.into(), to.into());
            let doubtful = segment.sequence <= sequence && from < to;
            doubtful.then_some(Doubtful { segment: *index, from, to })
        };
        self.chain.iter().filter_map(part).collect()
    }

    /// No new append is given a place in it.
    pub fn close(&mut self, index: u32) {
        let segment = &mut self.list[index as usize];
        assert!(segment.is_open(), "only an open segment is closed");
        segment.state = SegmentState::Closed;
    }

    /// Appends to it have failed: what counts stays, and if that is nothing it is free. It goes to
    /// the end of the queue, since its place may be bad. True if it is free.
    pub fn give_up(&mut self, index: u32) -> bool {
        let segment = &mut self.list[index as usize];
        segment.appending = 0;
        segment.state = SegmentState::Closed;
        if segment.end > 0 {
            return false;
        }
        self.chain.retain(|other| *other != index);
        self.release(index);
        true
    }

    /// Nothing in the segment is needed any more.
    fn release(&mut self, index: u32) {
        self.list[index as usize] = Segment::default();
        match self.leaves(index) {
            true => self.leaving -= 1,
            false => self.free.push_back(index),
        }
    }

    /// An append has been given a place.
    pub fn appending(&mut self, index: u32) {
        self.list[index as usize].appending += 1;
    }

    /// Closed segments without records above `won` become clean.
    pub fn drained(&mut self, won: u64) {
        while let Some(index) = self.chain.front().copied() {
            let segment = &mut self.list[index as usize];
            if segment.grows() || segment.last_won > won {
                return;
            }
            self.drained_sequence = segment.sequence;
            self.chain.pop_front();
            segment.state = SegmentState::Clean;
            self.clean.push_back(index);
        }
    }

    /// The oldest segment of the log that is no slab, by its sequence; else the one to come.
    pub fn log_from(&self) -> u64 {
        let oldest = self.sorting.first().or(self.clean.front()).or(self.chain.front());
        oldest.map_or(self.next_sequence, |index| self.get(*index).sequence)
    }

    /// Takes over a segment that was a slab when the daemon began.
    pub fn adopt_slab(&mut self, index: u32) {
        self.free.retain(|free| *free != index);
        self.list[index as usize] = Segment { state: SegmentState::Slab, ..Segment::default() };
        self.slabs += 1;
    }

    /// Drained segments that are not sorted yet.
    pub fn unsorted(&self) -> u64 {
        self.clean.len() as u64
    }

    /// Drained segments are to be sorted, the oldest first, up to one that may not. False: none.
    pub fn begin_sorting(&mut self, may: impl Fn(u32) -> bool) -> bool {
        assert!(self.sorting.is_empty(), "one sorting at a time");
        while let Some(index) = self.clean.front().copied().filter(|index| may(*index)) {
            self.clean.pop_front();
            self.sorting.push(index);
        }
        for index in &self.sorting {
            self.list[*index as usize].state = SegmentState::Sorting;
        }
        !self.sorting.is_empty()
    }

    pub fn is_sorting(&self) -> bool {
        !self.sorting.is_empty()
    }

    /// Those that are being sorted, in order of their sequence.
    pub fn sorting(&self) -> &[u32] {
        &self.sorting
    }

    /// Those that were being sorted are slabs from now on.
    pub fn end_sorting(&mut self) {
        for index in self.sorting.drain(..) {
            self.list[index as usize].state = SegmentState::Slab;
            self.slabs += 1;
        }
    }

    /// A free segment becomes a slab.
    pub fn take_slab(&mut self) -> Option<u32> {
        let index = self.free.pop_front()?;
        self.list[index as usize] = Segment { state: SegmentState::Slab, ..Segment::default() };
        self.slabs += 1;
        Some(index)
    }

    /// A slab is given up.
    pub fn empty(&mut self, index: u32) {
        let segment = &mut self.list[index as usize];
        assert_eq!(segment.state, SegmentState::Slab, "a slab is emptied");
        segment.state = SegmentState::Emptying;
        self.slabs -= 1;
        self.emptying.push(index);
    }

    /// Reads, or the write of its summary, are under way there.
    pub fn is_pinned(&self, index: u32) -> bool {
        self.get(index).pins > 0
    }

    /// The index names nothing in a segment that was emptied, and nobody reads there: it is free.
    pub fn emptied(&mut self, index: u32) {
        let segment = self.get(index);
        assert!(segment.state == SegmentState::Emptying && segment.pins == 0, "it is empty");
        self.emptying.retain(|other| *other != index);
        self.release(index);
    }

    /// Segments that are free, or will be when slabs have been emptied: not those that leave.
    pub fn coming(&self) -> u64 {
        let emptying = self.emptying.iter().filter(|index| !self.leaves(**index));
        (self.free.len() + emptying.count()) as u64
    }

    /// Segments without records that are not drained: not those that leave.
    pub fn drained_or_free(&self) -> u64 {
        let drained = self.clean.len() + self.sorting.len() + self.emptying.len();
        let all = (self.free.len() + drained) as u64 + self.slabs;
        let dirty = self.chain.iter().filter(|index| self.leaves(**index));
        if self.leaving == 0 { all } else { all + dirty.count() as u64 - self.leaving }
    }

    /// Some drained segment leaves and has not been sorted.
    pub fn is_leaving_unsorted(&self) -> bool {
        self.leaving > 0 && self.clean.iter().any(|index| self.leaves(*index))
    }

    /// The segment that holds sector `position` of the allocation.
    pub fn of_position(&self, position: u64) -> Option<u32> {
        self.shape.segment_of(position * crate::base::units::SECTOR_BYTES)
    }

    /// Whether what lies at sector `position` of the allocation is not drained.
    pub fn is_dirty(&self, position: u64) -> bool {
        self.of_position(position).is_some_and(|index| {
            matches!(self.get(index).state, SegmentState::Open | SegmentState::Closed)
        })
    }

    pub fn pin(&mut self, index: u32) {
        self.list[index as usize].pins += 1;
    }

    pub fn unpin(&mut self, index: u32) {
        self.list[index as usize].pins -= 1;
    }

    /// Where reading begins to find the record after `won`.
    pub fn seek(&self, won: u64) -> LogCursor {
        let segments = self.chain.iter().map(|index| self.get(*index));
        let mut holding = segments.filter(|segment| segment.last_won > won || segment.grows());
        let sequence = holding.next().map_or(self.next_sequence, |segment| segment.sequence);
        LogCursor { segment: sequence, offset: BLOCK_BYTES }
    }

    /// What is committed from `cursor` on.
    pub fn stretch(&self, cursor: LogCursor) -> LogStretch {
        let at = self.chain.partition_point(|index| self.get(*index).sequence < cursor.segment);
        let Some(index) = self.chain.get(at).copied() else { return LogStretch::End };
        let segment = self.get(index);
        if segment.sequence != cursor.segment {
            // The cursor's segment is gone or was given up: the log goes on behind it.
            let next = LogCursor { segment: segment.sequence, offset: BLOCK_BYTES };
            return LogStretch::Next(next);
        }
        if cursor.offset < u64::from(segment.durable_end) {
            let offset = self.shape.segment_offset(index) + cursor.offset;
            let length = u64::from(segment.durable_end) - cursor.offset;
            return LogStretch::Batches { offset, length, salt: segment.salt };
        }
        let Some(next) = self.chain.get(at + 1).map(|index| self.get(*index)) else {
            return LogStretch::End;
        };
        // All of a closed segment is durable before anything behind it is.
        let done = segment.durable_end == segment.end && !segment.grows();
        if !done || next.durable_end == 0 {
            return LogStretch::End;
        }
        LogStretch::Next(LogCursor { segment: next.sequence, offset: BLOCK_BYTES })
    }
}

impl Segment {
    pub fn is_open(&self) -> bool {
        self.state == SegmentState::Open
    }

    /// All it holds is in the backing.
    pub fn is_clean(&self) -> bool {
        use SegmentState::{Clean, Emptying, Slab, Sorting};
        matches!(self.state, Clean | Sorting | Slab | Emptying)
    }

    /// More batches may come to count in it.
    pub fn grows(&self) -> bool {
        self.is_open() || self.appending > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::units::{KIB, MIB};

    fn four() -> Segments {
        Segments::new(Shape::with(MIB + 256 * KIB, 64 * KIB).expect("a shape"), 1)
    }

    #[test]
    fn a_segment_goes_round() {
        let mut segments = four();
        let first = segments.open(1).expect("free");
        segments.appending(first);
        segments.grew(first, 8192, 5);
        segments.close(first);
        let second = segments.open(6).expect("free");
        segments.drained(4);
        assert_eq!(segments.get(first).state, SegmentState::Closed, "5 is not drained");
        assert_eq!(segments.oldest_needed(4), 1);
        segments.drained(5);
        assert_eq!(segments.get(first).state, SegmentState::Clean);
        assert_eq!(segments.oldest_needed(5), 2, "the open one");
        let position = segments.shape().segment_offset(first) / 512;
        assert!(!segments.is_dirty(position));
        segments.pin(first);
        assert!(segments.begin_sorting(|_| true) && segments.is_sorting());
        segments.end_sorting();
        segments.empty(first);
        assert!(segments.is_pinned(first), "a read is under way there");
        assert_eq!(segments.counts().retiring, 1);
        segments.unpin(first);
        segments.emptied(first);
        assert_eq!(segments.counts().free, 3);
        assert!(segments.give_up(second));
        let counts = SegmentCounts { free: 4, ..SegmentCounts::default() };
        assert_eq!(segments.counts(), counts, "given up empty");
    }

    /// Opens a segment, fills it with one batch of record `won`, closes it.
    fn filled(segments: &mut Segments, won: u64) -> u32 {
        let index = segments.open(won).expect("free");
        segments.appending(index);
        segments.grew(index, 8192, won);
        assert!(!segments.is_told(), "not durable");
        segments.close(index);
        index
    }

    #[test]
    fn segments_behind_the_limit_leave_each_in_its_own_way() {
        let shape = Shape::with(MIB + 512 * KIB, 64 * KIB).expect("a shape");
        let mut segments = Segments::new(shape, 1);
        let all: Vec<u32> = (1..=7).map(|won| filled(&mut segments, won)).collect();
        assert_eq!(all, [0, 1, 2, 3, 4, 5, 6]);
        segments.drained(5);
        // Clean 0 to 4, dirty 5 and 6, free 7.
        segments.limit(4);
        let counts = segments.counts();
        assert_eq!((counts.free, counts.clean, counts.dirty), (0, 5, 2));
        assert_eq!((counts.leaving, segments.coming(), segments.drained_or_free()), (3, 0, 4));
        assert!(segments.is_leaving_dirty() && segments.is_leaving_unsorted());
        assert!(segments.open(8).is_none() && segments.take_slab().is_none(), "none is given out");
        segments.drained(7);
        assert!(!segments.is_leaving_dirty());
        assert!(segments.begin_sorting(|_| true) && !segments.is_leaving_unsorted());
        segments.end_sorting();
        for left in (0..3).rev() {
            let index = 4 + left as u32;
            segments.empty(index);
            assert_eq!((segments.leaving(), segments.coming()), (left + 1, 0), "not for the log");
            segments.emptied(index);
            assert_eq!((segments.leaving(), segments.drained_or_free()), (left, 4));
        }
        segments.reshape(Shape::with(MIB + 256 * KIB, 64 * KIB).expect("a shape"));
        assert_eq!(segments.counts(), SegmentCounts { clean: 4, ..SegmentCounts::default() });
        segments.reshape(shape);
        assert_eq!(segments.counts().free, 4, "usable at once");
        assert_eq!(segments.open(8), Some(4));
    }

    #[test]
    fn a_limit_that_is_taken_back_leaves_nothing_behind() {
        let shape = Shape::with(MIB + 512 * KIB, 64 * KIB).expect("a shape");
        let mut segments = Segments::new(shape, 1);
        (1..=6).for_each(|won| _ = filled(&mut segments, won));
        segments.drained(5);
        assert!(segments.begin_sorting(|_| true));
        segments.end_sorting();
        segments.limit(4);
        segments.empty(4);
        segments.limit(8);
        let counts = segments.counts();
        assert_eq!((counts.free, counts.dirty, counts.clean, counts.retiring), (2, 1, 4, 1));
        assert_eq!((counts.leaving, segments.coming(), segments.drained_or_free()), (0, 3, 7));
        segments.emptied(4);
        assert_eq!((segments.counts().free, segments.coming()), (3, 3));
    }

    #[test]
    fn the_drainer_sees_what_is_durable_and_in_order() {
        let mut segments = four();
        let first = segments.open(1).expect("free");
        segments.set_salt(first, 9);
        let at = |offset| LogCursor { segment: 1, offset };
        assert_eq!(segments.stretch(segments.seek(0)), LogStretch::End);
        segments.appending(first);
        segments.grew(first, 12288, 1);
        assert_eq!(segments.stretch(at(4096)), LogStretch::End, "not durable");
        segments.durable(1, 12288);
        let offset = segments.shape().segment_offset(first) + 4096;
        let batches = LogStretch::Batches { offset, length: 8192, salt: 9 };
        assert_eq!(segments.stretch(at(4096)), batches);
        assert_eq!(segments.stretch(at(12288)), LogStretch::End);
        segments.close(first);
        let given_up = segments.open(2).expect("free");
        segments.give_up(given_up);
        let third = segments.open(2).expect("free");
        assert_eq!(segments.stretch(at(12288)), LogStretch::End);
        segments.appending(third);
        segments.grew(third, 8192, 2);
        segments.durable(3, 8192);
        let next = LogCursor { segment: 3, offset: 4096 };
        assert_eq!(segments.stretch(at(12288)), LogStretch::Next(next));
        segments.drained(1);
        assert_eq!(segments.stretch(at(12288)), LogStretch::Next(next), "it is clean now");
        assert_eq!(segments.seek(1), next);
    }
}
