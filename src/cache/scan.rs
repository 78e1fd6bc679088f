//! Reads a whole log and judges it: which batches count, where it ends, and whether it ends there
//! or is damaged. Changes nothing; never fails on any bytes.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use super::header::SegmentHeader;
use super::layout::{BATCH_MAGIC, BLOCK_BYTES, ROOT_OFFSETS, VERSION};
use super::medium::Medium;
use super::record::{Batch, BatchHeader};
use super::root::{Root, RootBlock, salt};
use super::summary::{self, SummaryFoot};
use crate::base::planted::{Bug, planted};
use crate::base::units::SECTOR_BYTES;
use crate::base::{Error, ErrorKind, Result};
use std::collections::{BTreeMap, BTreeSet};

/// Bytes at the end of a segment that are read to find its summary.
const FOOT_BYTES: u64 = 64 << 10;

/// Segments read at a time.
const GROUP: usize = 8;

/// A batch that was found in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScannedBatch {
    /// Byte in the segment.
    pub position: u32,
    /// Fixed part and entries.
    pub bytes: Vec<u8>,
    pub header: BatchHeader,
    /// Byte in the segment of the first piece that does not match its checksum. Not looked for
    /// where a summary says that all was durable.
    pub damaged: Option<u32>,
}

/// A segment that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScannedSegment {
    pub index: u32,
    pub header: SegmentHeader,
    /// In order, each where the one before ends.
    pub batches: Vec<ScannedBatch>,
    /// From its summary; else batch by batch.
    pub summarised: bool,
    /// It could not be read.
    pub unreadable: bool,
    /// The greatest `durable through`, and WON, of batches behind the first that is bad.
    behind: (u64, u64),
}

/// Why the log goes no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It ends; what was being appended when it stopped may have left traces.
    Ends,
    /// Acknowledged records behind this point are damaged.
    Corrupt { last_good: u64 },
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Scan {
    pub root: Root,
    /// Copies of roots that are not what they should be: byte offset and what is wrong.
    pub damaged_roots: Vec<(u64, &'static str)>,
    /// In the log's order, oldest first, only batches that count.
    pub segments: Vec<ScannedSegment>,
    pub verdict: Verdict,
    /// The next batch's sequence, and the checksum of the one before.
    pub next_batch: u64,
    pub checksum: u32,
    /// The last WON that counts.
    pub last_won: u64,
    pub last_epoch: u64,
    /// Of what counts and of roots.
    pub drained_through: u64,
    /// Everything seen is below these, counted or not.
    pub next_won: u64,
    pub next_epoch: u64,
    pub next_sequence: u64,
    /// The first batch with damaged data among those that count and are not drained: the WON
    /// before it, and the byte of the allocation.
    pub damaged: Option<(u64, u64)>,
}

/// Finds the newest root.
///
/// # Errors
/// `Gone`: there is no cache. `Unsupported`: a newer version's. `Corrupt`: no copy is whole.
pub fn read_root(medium: &mut Medium) -> Result<(Root, Vec<(u64, &'static str)>)> {
    let mut best: Option<Root> = None;
    let mut damaged = Vec::new();
    let mut empty: u32 = 0;
    for offset in ROOT_OFFSETS.into_iter().flatten() {
        let block = medium.read(offset, BLOCK_BYTES as usize);
        match block.map(|block| Root::decode(&block)) {
            Err(_) => damaged.push((offset, "it cannot be read")),
            Ok(RootBlock::Empty) => empty = empty.saturating_add(1),
            Ok(RootBlock::Foreign) => damaged.push((offset, "it is something else's")),
            Ok(RootBlock::Damaged(what)) => damaged.push((offset, what)),
            Ok(RootBlock::Newer { version, features }) => {
                let text = format!(
                    "the cache has format version {version} with features {features:#x}; this \
                     build reads versions up to {VERSION} without: use a newer vflash"
                );
                return Err(Error::new(ErrorKind::Unsupported, text));
            }
            Ok(RootBlock::Valid(root)) => {
                if best.as_ref().is_none_or(|best| best.sequence < root.sequence) {
                    best = Some(*root);
                }
            }
        }
    }
    match best {
        Some(root) if root.shape.allocation_bytes <= medium.place().size_bytes() => {
            Ok((root, damaged))
        }
        Some(root) => {
            let text = format!(
                "the cache was made for {} bytes, its allocation has {}",
                root.shape.allocation_bytes,
                medium.place().size_bytes()
            );
            Err(Error::new(ErrorKind::Corrupt, text))
        }
        None if empty == 4 => {
            Err(Error::new(ErrorKind::Gone, "the allocation holds no cache: format it"))
        }
        None => {
            let text = "no copy of the cache's root is whole, at bytes 65536, 589824, 327680 and \
                        851968: what it held and had not drained is lost";
            Err(Error::new(ErrorKind::Corrupt, text))
        }
    }
}

/// Reads and judges the log. `clean_max`: drained segments that are looked at, at most.
///
/// # Errors
/// As [`read_root`], and `Corrupt` if the log is of a later opening than the root.
pub fn scan(medium: &mut Medium, clean_max: usize) -> Result<Scan> {
    let (root, damaged_roots) = read_root(medium)?;
    let (headers, headless) = read_headers(medium, &root);
    let later = headers.values().any(|(_, header)| header.incarnation > root.incarnation);
    if later {
        let text = "the newest root is damaged in both copies: the log is of a later opening";
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    let next_sequence = headers.keys().next_back().copied().unwrap_or(0).max(root.end.segment);
    let (chain, hole) = chain(&root, &headers, clean_max);
    let mut segments = Vec::new();
    for group in chain.chunks(GROUP) {
        segments.extend(read_segments(medium, &root, group));
    }
    let mut seen = Seen::default();
    for (_, header) in headers.values() {
        seen.durable = seen.durable.max(header.durable_through);
        seen.won = seen.won.max(header.first_won);
        seen.epoch = seen.epoch.max(header.epoch);
    }
    for (index, salt) in headless {
        seen.headless(medium, &root, (index, salt));
    }
    let mut judge = Judge::new(&root, &segments, seen);
    let (verdict, kept) = judge.judge(hole);
    let mut scan = Scan {
        verdict,
        next_batch: judge.next_batch,
        checksum: judge.checksum,
        last_won: judge.last_won,
        last_epoch: judge.last_epoch,
        drained_through: judge.drained.max(root.drained_through),
        next_won: judge.seen.won.saturating_add(1).max(root.next_won),
        next_epoch: judge.seen.epoch.saturating_add(1).max(root.next_epoch),
        next_sequence: next_sequence.saturating_add(1),
        damaged: None,
        damaged_roots,
        segments: Vec::new(),
        root,
    };
    for (segment, kept) in segments.iter_mut().zip(kept) {
        segment.batches.truncate(kept);
    }
    segments.retain(|segment| !segment.batches.is_empty());
    scan.segments = segments;
    scan.damaged = scan.first_damage();
    Ok(scan)
}

impl Scan {
    fn first_damage(&self) -> Option<(u64, u64)> {
        let batches = self
            .segments
            .iter()
            .flat_map(|segment| segment.batches.iter().map(move |batch| (segment.index, batch)));
        let mut dirty = batches.filter(|(_, batch)| last_won(&batch.header) > self.drained_through);
        dirty.find_map(|(index, batch)| {
            let at = u64::from(batch.damaged?);
            let offset = self.root.shape.segment_offset(index).saturating_add(at);
            let last_good = batch.header.first_won.saturating_sub(1).max(self.drained_through);
            Some((last_good, offset))
        })
    }
}

/// The WON of a batch's last record, whether its request ends in it or not.
pub(super) fn last_won(header: &BatchHeader) -> u64 {
    let before = u64::from(!header.continued);
    header.next_won.saturating_sub(before)
}

type Headers = BTreeMap<u64, (u32, SegmentHeader)>;

/// Segments that the newest one may have been followed by, in sequence: appends under way and
/// given up.
const SUCCESSORS: u64 = 64;

/// The headers of all segments that hold one of this log, by sequence; and segments that have none
/// but whose first batch has the salt of one that would follow, with that salt.
fn read_headers(medium: &mut Medium, root: &Root) -> (Headers, Vec<(u32, u64)>) {
    let count = root.shape.segments() as u32;
    let length = BLOCK_BYTES.saturating_mul(2) as usize;
    let ranges: Vec<(u64, usize)> =
        (0..count).map(|index| (root.shape.segment_offset(index), length)).collect();
    let mut headers = Headers::new();
    let mut salts = Vec::new();
    for (index, bytes) in (0..count).zip(medium.read_many(&ranges)) {
        let Ok(bytes) = bytes else { continue };
        let (block, batch) = bytes.split_at(bytes.len().min(BLOCK_BYTES as usize));
        if let Some(header) = SegmentHeader::decode(block, root) {
            headers.insert(header.sequence, (index, header));
        } else if batch.starts_with(BATCH_MAGIC)
            && let Some(salt) = batch.get(32..40).and_then(|bytes| bytes.first_chunk())
        {
            salts.push((index, u64::from_le_bytes(*salt)));
        }
    }
    let newest = headers.keys().next_back().copied().unwrap_or(0);
    let follows: BTreeSet<u64> = (1..=SUCCESSORS)
        .map(|more| salt(root.secret, root.incarnation, newest.saturating_add(more)))
        .collect();
    salts.retain(|(_, salt)| follows.contains(salt));
    (headers, salts)
}

/// The segments that may count, oldest first: from the newest along the links. And whether the
/// oldest names one before it that is needed and is not there.
fn chain(root: &Root, headers: &Headers, clean_max: usize) -> (Vec<(u32, SegmentHeader)>, bool) {
    let counts = |header: &SegmentHeader| {
        header.incarnation == root.incarnation || header.sequence <= root.end.segment
    };
    let mut chain = Vec::new();
    let mut clean: usize = 0;
    let mut wanted = u64::MAX;
    loop {
        // A link into nothing: the newest before it decides whether that is damage (L4).
        let needed = wanted >= root.oldest_segment;
        let found = match headers.get(&wanted) {
            None if needed => headers
                .range(..wanted)
                .rev()
                .map(|(_, found)| found)
                .find(|(_, header)| counts(header) && header.sequence >= root.oldest_segment),
            found => found.filter(|(_, header)| counts(header)),
        };
        let Some((index, header)) = found else {
            chain.reverse();
            return (chain, needed && wanted != u64::MAX);
        };
        if header.sequence < root.oldest_segment {
            clean = clean.saturating_add(1);
            if clean > clean_max || header.sequence < root.clean_from {
                break;
            }
        }
        chain.push((*index, *header));
        if header.previous == 0 {
            break;
        }
        wanted = header.previous;
    }
    chain.reverse();
    (chain, false)
}

/// Reads segments: their summaries where they have one, all of them else.
fn read_segments(
    medium: &mut Medium,
    root: &Root,
    group: &[(u32, SegmentHeader)],
) -> Vec<ScannedSegment> {
    let shape = root.shape;
    let foot_bytes = FOOT_BYTES.min(shape.segment_bytes);
    let feet: Vec<(u64, usize)> = group
        .iter()
        .map(|(index, _)| {
            let end = shape.segment_offset(*index).saturating_add(shape.segment_bytes);
            (end.saturating_sub(foot_bytes), foot_bytes as usize)
        })
        .collect();
    let feet = medium.read_many(&feet);
    let mut segments = Vec::new();
    for ((index, header), foot) in group.iter().zip(feet) {
        let mut segment = ScannedSegment {
            index: *index,
            header: *header,
            batches: Vec::new(),
            summarised: false,
            unreadable: false,
            behind: (0, 0),
        };
        let start = shape.segment_offset(*index);
        let summary = foot.ok().and_then(|bytes| {
            let foot = SummaryFoot::decode(&bytes, header.salt, shape.segment_bytes)?;
            let length = u64::from(foot.summary_bytes);
            let end = start.saturating_add(shape.segment_bytes);
            let bytes = match bytes.len().checked_sub(length as usize) {
                Some(from) => bytes.get(from..)?.to_vec(),
                None => medium.read(end.saturating_sub(length), length as usize).ok()?,
            };
            summarised(&bytes, &foot, header.salt)
        });
        if let Some(batches) = summary {
            segment.batches = batches;
            segment.summarised = true;
        } else {
            match medium.read(start, shape.segment_bytes as usize) {
                Ok(bytes) => walk(&bytes, &mut segment),
                Err(_) => read_in_parts(medium, start, &mut segment, shape.segment_bytes),
            }
        }
        segments.push(segment);
    }
    segments
}

fn summarised(bytes: &[u8], foot: &SummaryFoot, salt: u64) -> Option<Vec<ScannedBatch>> {
    let items = summary::decode(bytes, foot)?;
    let batch = |(position, header): (u32, &[u8])| {
        let batch = Batch::decode(header, salt).ok()?;
        Some(ScannedBatch { position, bytes: header.to_vec(), header: batch.header, damaged: None })
    };
    items.into_iter().map(batch).collect()
}

/// A segment with sectors that cannot be read: what can is taken, zeros stand for the rest.
fn read_in_parts(
    medium: &mut Medium,
    start: u64,
    segment: &mut ScannedSegment,
    segment_bytes: u64,
) {
    segment.unreadable = true;
    let block = u64::from(medium.geometry().block_bytes).max(SECTOR_BYTES);
    let mut bytes = vec![0; segment_bytes as usize];
    // Halves of halves, so that a few bad sectors cost few reads.
    let mut open = vec![(0, segment_bytes)];
    while let Some((from, length)) = open.pop() {
        let offset = start.saturating_add(from);
        match medium.read(offset, length as usize) {
            Ok(part) => {
                let to = from.saturating_add(length) as usize;
                if let Some(target) = bytes.get_mut(from as usize..to) {
                    target.copy_from_slice(&part);
                }
            }
            Err(_) if length > block => {
                let half = length / 2;
                open.push((from, half));
                open.push((from.saturating_add(half), length.saturating_sub(half)));
            }
            Err(_) => {}
        }
    }
    walk(&bytes, segment);
}

/// Goes from batch to batch, and looks for traces of batches behind the first that is none.
fn walk(bytes: &[u8], segment: &mut ScannedSegment) {
    let salt = segment.header.salt;
    let mut position = BLOCK_BYTES as usize;
    while let Some(rest) = bytes.get(position..) {
        let Ok(batch) = Batch::decode(rest, salt) else { break };
        let header = batch.header;
        let Some(whole) = rest.get(..header.batch_bytes as usize) else { break };
        let damaged = batch.verify(whole).err().filter(|_| !planted(Bug::ChecksumOfHeaderOnly));
        let at = |data: u32| (position as u32).saturating_add(data);
        segment.batches.push(ScannedBatch {
            position: position as u32,
            bytes: rest.get(..header.header_bytes as usize).unwrap_or_default().to_vec(),
            header,
            damaged: damaged.map(|piece| at(piece.data)),
        });
        position = position.saturating_add(header.batch_bytes as usize);
    }
    segment.behind = traces(bytes, position, salt);
}

/// The greatest `durable through` and WON of batches anywhere from `position` on.
fn traces(bytes: &[u8], mut position: usize, salt: u64) -> (u64, u64) {
    let mut found = (0, 0);
    while let Some(rest) = bytes.get(position..).filter(|rest| !rest.is_empty()) {
        if rest.starts_with(BATCH_MAGIC)
            && let Ok(batch) = Batch::decode(rest, salt)
        {
            let (durable, won) = found;
            found = (durable.max(batch.header.durable_through), won.max(last_won(&batch.header)));
        }
        position = position.saturating_add(SECTOR_BYTES as usize);
    }
    found
}

/// The greatest numbers seen anywhere.
#[derive(Clone, Copy, Default)]
struct Seen {
    durable: u64,
    won: u64,
    epoch: u64,
}

impl Seen {
    /// Takes note of a segment without a header: what it says was durable must be there.
    fn headless(&mut self, medium: &mut Medium, root: &Root, (index, salt): (u32, u64)) {
        let start = root.shape.segment_offset(index);
        let Ok(bytes) = medium.read(start, root.shape.segment_bytes as usize) else { return };
        let (durable, won) = traces(&bytes, BLOCK_BYTES as usize, salt);
        self.durable = self.durable.max(durable);
        self.won = self.won.max(won);
    }
}

/// Goes along the chain and decides what counts.
struct Judge<'a> {
    root: &'a Root,
    segments: &'a [ScannedSegment],
    seen: Seen,
    next_batch: u64,
    checksum: u32,
    last_won: u64,
    last_epoch: u64,
    drained: u64,
}

impl<'a> Judge<'a> {
    fn new(root: &'a Root, segments: &'a [ScannedSegment], mut seen: Seen) -> Self {
        for segment in segments {
            for batch in &segment.batches {
                let header = &batch.header;
                seen.durable = seen.durable.max(header.durable_through);
                seen.won = seen.won.max(last_won(header));
                seen.epoch = seen.epoch.max(header.last_epoch);
                if segment.summarised && header.next_won > header.first_won {
                    seen.durable = seen.durable.max(header.next_won.saturating_sub(1));
                }
            }
            seen.durable = seen.durable.max(segment.behind.0);
            seen.won = seen.won.max(segment.behind.1);
        }
        let first = segments.first().map(|segment| segment.header);
        Self {
            root,
            segments,
            seen,
            next_batch: first.map_or(root.end.batch.max(1), |first| first.first_batch),
            checksum: first.map_or(root.end.checksum, |first| first.previous_checksum),
            last_won: first.map_or(root.drained_through, |first| first.first_won.saturating_sub(1)),
            last_epoch: first.map_or(root.drained_epoch, |first| first.epoch),
            drained: 0,
        }
    }

    /// The log begins with this segment.
    fn begin(&mut self, header: &SegmentHeader) {
        self.next_batch = header.first_batch;
        self.checksum = header.previous_checksum;
        self.last_won = header.first_won.saturating_sub(1);
        self.last_epoch = header.epoch;
    }

    /// The verdict, and how many batches of each segment count.
    fn judge(&mut self, hole: bool) -> (Verdict, Vec<usize>) {
        let mut kept = vec![0; self.segments.len()];
        let mut last: Option<&ScannedBatch> = None;
        let mut ended = hole;
        if hole {
            self.last_won = self.root.drained_through;
        }
        for (number, segment) in self.segments.iter().enumerate() {
            let header = &segment.header;
            // The log goes on here only from the batch that this segment says (L1, L2).
            ended |=
                header.first_batch != self.next_batch || header.previous_checksum != self.checksum;
            ended &= !planted(Bug::PreviousLapAccepted);
            // What was drained may have been given to a segment whose header did not arrive. A
            // miss does no harm, an older version would: all before it goes too.
            let before = number.checked_sub(1).and_then(|before| self.segments.get(before));
            let drained =
                before.is_some_and(|before| before.header.sequence < self.root.oldest_segment);
            if ended && !hole && drained {
                ended = false;
                last = None;
                kept.iter_mut().for_each(|kept| *kept = 0);
                self.begin(header);
            }
            if ended {
                break;
            }
            let end = self.void_from(number);
            for (at, batch) in segment.batches.iter().enumerate() {
                if batch.header.sequence >= end {
                    break;
                }
                let links = batch.header.sequence == self.next_batch
                    && batch.header.previous_checksum == self.checksum
                    && batch.header.incarnation == header.incarnation
                    && position_follows(segment, at);
                // Data of what is known to have been durable was whole once.
                let torn = batch.damaged.is_some() && last_won(&batch.header) > self.seen.durable;
                let links = links || planted(Bug::PreviousLapAccepted);
                if !links || torn {
                    ended = true;
                    break;
                }
                self.take(&batch.header);
                last = Some(batch);
                if let Some(kept) = kept.get_mut(number) {
                    *kept = at.saturating_add(1);
                }
            }
        }
        if last.is_some_and(|last| last.header.continued) {
            self.drop_part(&mut kept);
        }
        if kept.iter().all(|kept| *kept == 0) {
            // Numbers before a first record that did not arrive are no writes.
            self.last_won = self.root.drained_through;
            self.last_epoch = self.root.drained_epoch;
        }
        let torn = ended && planted(Bug::TornTailIsCorruption);
        let damaged = self.seen.durable > self.last_won && !planted(Bug::CorruptionIsTail);
        let drained = self.drained.max(self.root.drained_through);
        let verdict = match torn || (damaged && self.seen.durable > drained) {
            true => Verdict::Corrupt { last_good: self.last_won.max(drained) },
            false => Verdict::Ends,
        };
        (verdict, kept)
    }

    /// The first batch that does not count in segment `number`, whatever it looks like.
    fn void_from(&self, number: usize) -> u64 {
        let next = number.checked_add(1).and_then(|next| self.segments.get(next));
        let next = next.map_or(u64::MAX, |next| next.header.first_batch);
        let own = self.segments.get(number).map_or(0, |segment| segment.header.incarnation);
        if own < self.root.incarnation { next.min(self.root.end.batch) } else { next }
    }

    fn take(&mut self, header: &BatchHeader) {
        self.next_batch = header.sequence.saturating_add(1);
        self.checksum = header.checksum;
        self.last_won = header.next_won.saturating_sub(1);
        self.last_epoch = header.last_epoch;
        self.drained = self.drained.max(header.drained_through);
    }

    /// A request whose last record is missing never was (L5): the log ends before the batch that
    /// it begins.
    fn drop_part(&mut self, kept: &mut [usize]) {
        let part = self.last_won.saturating_add(1);
        for (segment, kept) in self.segments.iter().zip(kept).rev() {
            while let Some(batch) = kept.checked_sub(1).and_then(|at| segment.batches.get(at)) {
                if batch.header.first_won < part {
                    // The batch before what was dropped.
                    self.take(&batch.header);
                    return;
                }
                *kept = kept.saturating_sub(1);
                (self.next_batch, self.checksum) =
                    (batch.header.sequence, batch.header.previous_checksum);
            }
        }
    }
}

/// Whether the batch lies where the one before it ends.
fn position_follows(segment: &ScannedSegment, at: usize) -> bool {
    let Some(batch) = segment.batches.get(at) else { return false };
    let before = at.checked_sub(1).and_then(|before| segment.batches.get(before));
    let expected = before.map_or(BLOCK_BYTES as u32, |before| {
        before.position.saturating_add(before.header.batch_bytes)
    });
    batch.position == expected
}
