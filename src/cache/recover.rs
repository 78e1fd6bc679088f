//! Opening and formatting: from bytes on the flash to a disk that can serve, in straight lines.

use super::alone::Known;
use super::clean::load::{self, LoadedSlab};
use super::cursor::Cursor;
use super::index::{BLOCK_SECTORS, Index, Piece};
use super::journal::LogHead;
use super::layout::{BLOCK_BYTES, Shape};
use super::medium::Medium;
use super::place::Place;
use super::record::{Batch, Kind, RecordOrigin};
use super::root::{BackingIdentity, LogEnd, Mode, Root};
use super::scan::{Scan, ScannedSegment, Verdict, last_won, read_root, scan};
use super::segment::{Segment, SegmentState, Segments};
use crate::backing::redo::Span;
use crate::backing::stamp::Point;
use crate::base::planted::{Bug, planted};
use crate::base::units::{Bytes, SECTOR_BYTES};
use crate::base::{Error, ErrorKind, Result};
use crate::io::buffer::PinnedBuffer;
use crate::io::disk::DiskGeometry;

/// Origins that are remembered: those of the newest writes. More cannot have been under way.
const ORIGINS_MAX: usize = 65_536;

/// A new cache.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    pub shape: Shape,
    pub log_uuid: [u8; 16],
    /// Of the virtual disk.
    pub disk_uuid: [u8; 16],
    /// Random.
    pub secret: u64,
    pub mode: Mode,
    pub backing: BackingIdentity,
    /// A cache that is there already is lost.
    pub overwrite: bool,
}

/// Writes the roots of a new, empty cache.
///
/// # Errors
/// `Busy`: there is one already, and `overwrite` is not set.
pub fn format(medium: &mut Medium, options: &FormatOptions) -> Result<()> {
    let io = |errno: crate::io::disk::Errno| Error::io("formatting the cache", errno.into());
    match read_root(medium) {
        Err(error) if error.kind() == ErrorKind::Gone => {}
        _ if options.overwrite => {}
        Ok(_) => {
            let text =
                "the allocation holds a cache already: what it has not drained would be lost";
            return Err(Error::new(ErrorKind::Busy, text));
        }
        Err(error) => return Err(error.context("formatting the cache")),
    }
    medium.wipe_roots().map_err(io)?;
    let root = Root {
        log_uuid: options.log_uuid,
        disk_uuid: options.disk_uuid,
        sequence: 1,
        shape: options.shape,
        incarnation: 0,
        secret: options.secret,
        oldest_segment: 1,
        drained_through: 0,
        drained_epoch: 0,
        next_won: 1,
        next_epoch: 1,
        end: LogEnd { segment: 0, batch: 1, checksum: 0 },
        mode: options.mode,
        clean_from: 0,
        slab_epoch: 1,
        slabs_through: 0,
        clean: true,
        backing: options.backing,
        alone_since: None,
        optimal_bytes: 0,
    };
    medium.write_root(&root).map_err(io)
}

/// How to open.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// What the backing is now; another one than before is refused.
    pub backing: BackingIdentity,
    /// The point that backing and sidecar hold, if they know of a later one than the flash.
    pub drained_through: u64,
    /// The last so many numbers up to there are of other disks of its consistency group.
    pub drained_others: u64,
    /// Bytes of memory that the index may take.
    pub index_bytes: usize,
    /// Drained segments that are loaded, at most: each takes some milliseconds.
    pub clean_segments_max: usize,
    /// The backing may have been written without this log: what is drained is not to be trusted.
    pub cold: bool,
    /// Nobody writes the disk, and the backing's fingerprint is another one when somebody else has.
    pub golden: bool,
    /// The backing is away: the log goes on without it (`alone.rs`).
    pub alone: bool,
    /// Of the backing's geometry; 0: not known.
    pub optimal_bytes: u32,
    /// The disk is in a consistency group: other disks have numbers between its own, and the point
    /// that the backing holds may be one of those.
    pub shared: bool,
}

impl OpenOptions {
    /// Memory of the index as the promises have it: 0.6 % of the cache, 1 MiB at least.
    pub fn new(backing: BackingIdentity, cache_bytes: u64) -> Self {
        let index_bytes = index_bytes(cache_bytes);
        Self {
            backing,
            drained_through: 0,
            index_bytes,
            clean_segments_max: 256,
            cold: false,
            golden: false,
            alone: false,
            optimal_bytes: 0,
            drained_others: 0,
            shared: false,
        }
    }
}

/// Bytes of memory that the index of a cache of this size may take.
pub(super) fn index_bytes(cache_bytes: u64) -> usize {
    (cache_bytes / 1000 * 6).max(1 << 20) as usize
}

/// A log that is ready to go on: what [`super::disk::CachedDisk`] is made of.
pub struct Opened {
    /// Durable, of a new incarnation; unless the disk is fenced.
    pub root: Root,
    pub place: Place,
    pub flash: DiskGeometry,
    pub segments: Segments,
    pub index: Index,
    pub slabs: Vec<LoadedSlab>,
    pub(super) head: LogHead,
    /// What a claim of the backing is compared with.
    pub known: Known,
    pub drained: u64,
    pub drained_epoch: u64,
    /// Bytes of log that are not drained.
    pub dirty_bytes: u64,
    /// FLUSH boundaries that are not drained: the last WON and the epoch that ended.
    pub edges: Vec<(u64, u64)>,
    pub marks: Vec<(String, u64)>,
    /// Sorted.
    pub origins: Vec<RecordOrigin>,
    /// Acknowledged data is damaged: what, where, and what to do.
    pub fence: Option<String>,
    /// What is not as it should be and does no harm.
    pub findings: Vec<String>,
}

impl Opened {
    /// All numbers from here on are free: they are in no record, counted or not.
    pub fn next_won(&self) -> u64 {
        self.head.next_won
    }

    /// Whether this log has all that a group does which is live in the sidecar.
    pub fn can_finish(&self, group: &Span) -> bool {
        self.fence.is_none() && self.known.can_finish(group)
    }
}

/// Opens a cache for serving. Nothing else may use the allocation, and no operation of an earlier
/// process may be under way on it.
///
/// # Errors
/// As [`super::scan::scan`]; `Fenced` if the backing is another one; `Io` if the flash fails.
pub fn open(medium: &mut Medium, options: &OpenOptions) -> Result<Opened> {
    let scan = scan(medium, options.clean_segments_max)?;
    open_scanned(medium, scan, options)
}

/// As [`open`], of a log that was looked at and that nothing has changed since.
///
/// # Errors
/// As [`open`].
pub fn open_scanned(medium: &mut Medium, mut scan: Scan, options: &OpenOptions) -> Result<Opened> {
    if options.cold {
        scan.root.clean_from = scan.next_sequence;
    }
    check_backing(&scan.root, &options.backing)?;
    let drained = scan.drained_through.max(options.drained_through);
    let known = known(&scan, options)?;
    let fence = fence(&scan);
    let shape = match fence {
        None => whole(scan.root.shape, medium.place().size_bytes())?,
        Some(_) => scan.root.shape,
    };
    let mut loaded = Loaded {
        segments: Segments::new(shape, scan.next_sequence),
        index: Index::new(options.index_bytes),
        drained,
        drained_epoch: scan.root.drained_epoch,
        dirty_bytes: 0,
        edges: Vec::new(),
        marks: Vec::new(),
        origins: Vec::new(),
    };
    // If the newest of what was drained is missing, what is there may be older than the backing.
    let newest_drained = if options.shared { scan.drained_through } else { drained };
    let is_newest = scan.last_won >= newest_drained;
    let trusted = is_newest && !options.cold;
    let slabs = load::trusted(medium, &mut scan, (trusted, options.golden));
    slabs.iter().for_each(|slab| loaded.slab(slab));
    if is_newest {
        scan.segments.iter().for_each(|segment| loaded.segment(&scan, segment));
    }
    loaded.origins.sort_unstable();
    let last_won = match scan.verdict {
        Verdict::Ends => scan.last_won.max(drained),
        Verdict::Corrupt { last_good } => last_good.max(drained),
    };
    let mut root = Root { shape, ..opened_root(&scan, options, &known) };
    root.drained_epoch = loaded.drained_epoch;
    if fence.is_none() {
        renew(medium, &mut root, &scan, &loaded.segments)?;
    }
    let head = LogHead {
        incarnation: root.incarnation,
        next_won: root.next_won.max(last_won.saturating_add(1)),
        epoch: root.next_epoch.saturating_sub(1),
        next_batch: scan.next_batch,
        checksum: scan.checksum,
        durable_through: last_won,
    };
    Ok(Opened {
        place: medium.place().clone(),
        flash: medium.geometry(),
        segments: loaded.segments,
        index: loaded.index,
        slabs,
        head,
        known,
        drained,
        drained_epoch: loaded.drained_epoch,
        dirty_bytes: loaded.dirty_bytes,
        edges: loaded.edges,
        marks: loaded.marks,
        origins: loaded.origins,
        fence,
        findings: findings(&scan),
        root,
    })
}

/// What the log knew when it last had its backing, which must not be ahead of it.
fn known(scan: &Scan, options: &OpenOptions) -> Result<Known> {
    let OpenOptions { drained_through, drained_others, .. } = *options;
    if !options.cold {
        let point = Point { won: drained_through, others: drained_others, ..Point::default() };
        check_age(scan, &point, options.shared)?;
    }
    Ok(Known { drained: scan.drained_through.max(drained_through), newest: newest(scan) })
}

/// The newest number that the log had when it last had its backing.
fn newest(scan: &Scan) -> u64 {
    scan.root.alone_since.unwrap_or(scan.last_won.max(scan.drained_through))
}

/// Whether the log has come as far as its backing, which is at `point`: for who wants to know
/// before the backing is claimed. `shared`: as [`OpenOptions`] has it.
///
/// # Errors
/// `Fenced`: the backing has seen a later flash.
pub fn check_age(scan: &Scan, point: &Point, shared: bool) -> Result<()> {
    let trusted = shared && planted(Bug::OldFlashTrusted);
    if scan.root.incarnation == 0 || scan.verdict != Verdict::Ends || trusted {
        return Ok(());
    }
    Known { drained: scan.drained_through, newest: newest(scan) }.check_age(point)
}

/// What the root says from now on.
fn opened_root(scan: &Scan, options: &OpenOptions, known: &Known) -> Root {
    let root = &scan.root;
    Root {
        drained_through: drained_in_log(scan, options, known.drained),
        clean: false,
        alone_since: options.alone.then_some(known.newest),
        optimal_bytes: match options.optimal_bytes {
            0 => root.optimal_bytes,
            told => told,
        },
        ..root.clone()
    }
}

fn findings(scan: &Scan) -> Vec<String> {
    let roots = scan.damaged_roots.iter();
    let text = |(offset, what): &(u64, &str)| {
        format!("a copy of the cache's root at byte {offset} is damaged ({what})")
    };
    roots.map(text).collect()
}

/// What the root says of `drained`: in a consistency group a number of the disk's own, so that the
/// next opening can tell whether the newest of what was drained is there.
fn drained_in_log(scan: &Scan, options: &OpenOptions, drained: u64) -> u64 {
    match options.shared {
        true => drained.min(scan.last_won).max(scan.root.drained_through),
        false => drained,
    }
}

/// A resize that was cut off leaves an allocation that is larger than its root says: before the
/// root was written when it grew, after that when it shrank. Either way all of it is the cache's.
fn whole(shape: Shape, allocation_bytes: u64) -> Result<Shape> {
    Shape::with(allocation_bytes.max(shape.allocation_bytes), shape.segment_bytes)
}

/// What counts is made durable, then the new incarnation, which says for good where the log of the
/// earlier ones ends. Only then may anything be appended.
fn renew(medium: &mut Medium, root: &mut Root, scan: &Scan, segments: &Segments) -> Result<()> {
    let newest = scan.segments.last().map_or(0, |segment| segment.header.sequence);
    root.incarnation += 1;
    root.next_won = match planted(Bug::NumberReused) {
        true => scan.last_won.max(scan.drained_through) + 1,
        // What is drained was given, whether the log still shows it or not.
        false => scan.next_won.max(root.drained_through.saturating_add(1)),
    };
    root.next_epoch = scan.next_epoch;
    root.oldest_segment = segments.oldest_needed(root.drained_through);
    root.end = LogEnd { segment: newest, batch: scan.next_batch, checksum: scan.checksum };
    let io = |errno: crate::io::disk::Errno| Error::io("opening the cache", errno.into());
    load::end_others(medium, scan).map_err(io)?;
    medium.flush().map_err(io)?;
    // Both places, so that no older root can come up again.
    for _ in 0..2 {
        root.sequence += 1;
        medium.write_root(root).map_err(io)?;
    }
    Ok(())
}

/// The backing must be the one that the log was made for.
///
/// # Errors
/// `Fenced`: it is another one.
pub fn check_backing(root: &Root, backing: &BackingIdentity) -> Result<()> {
    let known = &root.backing;
    if known == backing {
        return Ok(());
    }
    let what = if known.size_bytes != backing.size_bytes {
        format!("it had {} and has {}", Bytes(known.size_bytes), Bytes(backing.size_bytes))
    } else {
        "it is another file or device".to_owned()
    };
    let text = format!(
        "the backing is not the one that the cache was made for ({what}): bring that one back, or \
         give up what the flash holds"
    );
    Err(Error::new(ErrorKind::Fenced, text))
}

fn fence(scan: &Scan) -> Option<String> {
    let advice = "drain to it, or detach the disk as lost";
    if let Verdict::Corrupt { last_good } = scan.verdict {
        return Some(format!(
            "the log is damaged behind point {last_good}, the last good one, and acknowledged \
             writes are missing: {advice}"
        ));
    }
    let (last_good, offset) = scan.damaged?;
    Some(format!(
        "acknowledged data is damaged at byte {offset} of the cache; the last good point is \
         {last_good}: {advice}"
    ))
}

struct Loaded {
    segments: Segments,
    index: Index,
    drained: u64,
    drained_epoch: u64,
    dirty_bytes: u64,
    edges: Vec<(u64, u64)>,
    marks: Vec<(String, u64)>,
    origins: Vec<RecordOrigin>,
}

impl Loaded {
    /// Takes over a slab; the log comes later and knows better.
    fn slab(&mut self, slab: &LoadedSlab) {
        self.segments.adopt_slab(slab.segment);
        let first = self.segments.shape().segment_offset(slab.segment);
        for entry in &slab.entries {
            let position = (first + u64::from(entry.slot) * BLOCK_BYTES) / SECTOR_BYTES;
            let start = entry.block * BLOCK_SECTORS;
            let checksum = entry.checksum;
            let piece = Piece { start, count: 8, skip: 0, stored: 8, position, checksum };
            self.index.insert(piece);
        }
    }

    /// Takes over a segment, newer than all before.
    fn segment(&mut self, scan: &Scan, scanned: &ScannedSegment) {
        let last = scanned.batches.last().expect("segments without batches are left out");
        let end = last.position.saturating_add(last.header.batch_bytes);
        let last_won = last_won(&last.header);
        let dirty = last_won > self.drained;
        let segment = Segment {
            state: if dirty { SegmentState::Closed } else { SegmentState::Clean },
            sequence: scanned.header.sequence,
            salt: scanned.header.salt,
            first_won: scanned.header.first_won,
            last_won,
            end,
            durable_end: end,
            pins: 0,
            appending: 0,
        };
        // A segment that was open when writes began to pass the log by goes on afterwards: what it
        // held before is as old as what lies in the segments before it.
        let trusted = scanned.header.sequence >= scan.root.clean_from;
        if !dirty && !trusted {
            return self.overwritten(scan, scanned);
        }
        self.segments.adopt(scanned.index, segment);
        let base = scan.root.shape.segment_offset(scanned.index);
        for batch in &scanned.batches {
            let decoded = Batch::decode(&batch.bytes, scanned.header.salt);
            let decoded = decoded.expect("it was decoded before");
            if batch.header.next_won > self.drained.saturating_add(1) {
                self.dirty_bytes += u64::from(batch.header.batch_bytes);
            }
            self.batch(&decoded, base + u64::from(batch.position), trusted);
        }
    }

    /// What a segment that is not trusted has overwritten since the slot tables were written: they
    /// do not know it.
    fn overwritten(&mut self, scan: &Scan, scanned: &ScannedSegment) {
        for batch in &scanned.batches {
            let decoded = Batch::decode(&batch.bytes, scanned.header.salt);
            let decoded = decoded.expect("it was decoded before");
            let later = decoded.entries().filter(|entry| entry.won > scan.root.slabs_through);
            later.for_each(|entry| self.index.remove(entry.start, entry.count));
        }
    }

    /// `trusted`: what is drained of it is what the backing holds.
    fn batch(&mut self, batch: &Batch<'_>, base: u64, trusted: bool) {
        for entry in batch.entries() {
            if entry.edge && entry.won.saturating_sub(1) > self.drained {
                self.edges.push((entry.won - 1, entry.epoch - 1));
            }
            if entry.won <= self.drained {
                self.drained_epoch = entry.epoch;
            }
            let stale = !trusted && entry.won <= self.drained && !planted(Bug::StaleAfterMode);
            match entry.kind {
                Kind::Write | Kind::Discard | Kind::Zeroes if stale => {
                    // The slot tables may not know it.
                    self.index.remove(entry.start, entry.count);
                }
                Kind::Write => {
                    for piece in entry.pieces() {
                        self.index.insert(Piece {
                            start: piece.start,
                            count: piece.count,
                            skip: 0,
                            stored: piece.count,
                            position: (base + u64::from(piece.data)) / SECTOR_BYTES,
                            checksum: piece.checksum,
                        });
                    }
                }
                Kind::Discard | Kind::Zeroes if planted(Bug::DiscardForgotten) => {}
                Kind::Discard | Kind::Zeroes => {
                    self.index.insert_zero(entry.start, entry.count, base / SECTOR_BYTES);
                }
                Kind::Mark => {
                    let name = String::from_utf8_lossy(entry.name).into_owned();
                    self.marks.push((name, entry.won));
                }
            }
            if entry.kind != Kind::Mark && !entry.continued {
                if self.origins.len() == 2 * ORIGINS_MAX {
                    self.origins.drain(..ORIGINS_MAX);
                }
                self.origins.push(entry.origin);
            }
        }
    }
}

/// Reads sectors of the disk as the opened log has them: for tests and for those who look at a
/// disk that nobody serves. What is not in the log stays as it is in `target`.
pub fn read_opened(
    medium: &mut Medium,
    opened: &Opened,
    start: u64,
    target: &mut [u8],
) -> Result<()> {
    let mut found = Vec::new();
    opened.index.lookup(start, target.len() as u64 / SECTOR_BYTES, &mut found);
    let buffer = PinnedBuffer::new(target.len().next_power_of_two());
    buffer.segment().copy_from(target);
    for part in found {
        let (first, count, bytes) = match part {
            super::index::Found::Piece(piece, _) => {
                let offset = piece.position * SECTOR_BYTES;
                let length = usize::from(piece.stored) * SECTOR_BYTES as usize;
                let bytes = medium
                    .read(offset, length)
                    .map_err(|errno| Error::io("reading the cache", errno.into()))?;
                let right = super::record::piece_checksum(&bytes) == piece.checksum;
                let segment = opened.segments.of_position(piece.position);
                let state = segment.map(|segment| opened.segments.get(segment).state);
                if !right && matches!(state, Some(SegmentState::Clean | SegmentState::Slab)) {
                    // Its segment was being used again; the backing has it.
                    continue;
                }
                if !right {
                    let text = format!("sector {} is damaged at byte {offset}", piece.start);
                    return Err(Error::new(ErrorKind::Corrupt, text));
                }
                let skip = usize::from(piece.skip) * SECTOR_BYTES as usize;
                (piece.start, u64::from(piece.count), bytes[skip..].to_vec())
            }
            super::index::Found::Zero { start, count } => {
                (start, count, vec![0; (count * SECTOR_BYTES) as usize])
            }
            super::index::Found::Absent { .. } => continue,
        };
        let length = (count * SECTOR_BYTES) as usize;
        let skip = ((first - start) * SECTOR_BYTES) as usize;
        Cursor::new(&[buffer.segment()], skip).copy_from(&bytes[..length]);
    }
    Cursor::new(&[buffer.segment()], 0).copy_to(target);
    Ok(())
}
