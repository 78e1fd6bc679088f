//! What the drainer's states write: the group to the sidecar, the group to the backing, the stamp.

use super::{BACKING, DrainError, DrainHost, Drainer, Planned, SIDECAR, Summing};
use crate::backing::redo::Span as GroupSpan;
use crate::backing::stamp::{Point, Stamp, State as StampState};
use crate::base::clock::Nanos;
use crate::base::planted::{Bug, planted};
use crate::base::units::SECTOR_BYTES;
use crate::cache::memory::CHUNK_BYTES;
use crate::cache::merge::{Content, Span};
use crate::io::buffer::{PinnedBuffer, Segment};
use crate::io::disk::OperationKind;
use crate::io::volume::DiskIndex;

/// A range of zeros is given to the backing in parts of this many sectors: 1 GiB.
const ZERO_SECTORS_MAX: u64 = 1 << 21;

impl Drainer {
    fn push(&mut self, disk: DiskIndex, kind: OperationKind, offset: u64, segments: Vec<Segment>) {
        let length = segments.iter().map(|segment| segment.length() as u64).sum();
        let submitted = Nanos(0);
        self.plan.push(Planned { disk, kind, offset, length, segments, submitted });
    }

    fn push_range(&mut self, kind: OperationKind, start: u64, count: u64) {
        let (offset, length) = (start * SECTOR_BYTES, count * SECTOR_BYTES);
        let planned = Planned {
            disk: BACKING,
            kind,
            offset,
            length,
            segments: Vec::new(),
            submitted: Nanos(0),
        };
        self.plan.push(planned);
    }

    pub(super) fn plan_flush(&mut self, disk: DiskIndex) {
        if disk == SIDECAR && planted(Bug::GroupNotCommitted) {
            return;
        }
        self.push(disk, OperationKind::Flush, 0, Vec::new());
    }

    /// Pinned memory with `bytes` in it, until the next plan that asks for some.
    pub(super) fn stage(&mut self, bytes: &[u8]) -> Segment {
        let buffer = PinnedBuffer::new(bytes.len().next_power_of_two());
        let segment = buffer.segment().part(0, bytes.len());
        segment.copy_from(bytes);
        self.scratch.push(buffer);
        segment
    }

    /// Reads of what the group lacks of the blocks that it writes in part.
    pub(super) fn plan_fill(&mut self) {
        self.scratch.clear();
        self.fills.clear();
        let block = u64::from(self.options.backing.block_bytes) / SECTOR_BYTES;
        if block == 1 {
            return;
        }
        self.merged.align_zeros();
        let per_chunk = CHUNK_BYTES / (block * SECTOR_BYTES);
        for (index, (start, count)) in self.merged.missing().into_iter().enumerate() {
            let inside = index as u64 % per_chunk * block * SECTOR_BYTES;
            if inside == 0 {
                self.scratch.push(PinnedBuffer::new(CHUNK_BYTES as usize));
            }
            let chunk = self.scratch.len() - 1;
            let first = start / block * block;
            let byte = inside + (start - first) * SECTOR_BYTES;
            self.fills.push((start, count, chunk, byte as usize));
            let length = (block * SECTOR_BYTES) as usize;
            let segment = self.scratch[chunk].segment().part(inside as usize, length);
            self.push(BACKING, OperationKind::Read, first * SECTOR_BYTES, vec![segment]);
        }
    }

    pub(super) fn take_fill(&mut self) {
        for (start, count, chunk, byte) in self.fills.drain(..) {
            let mut bytes = vec![0; (count * SECTOR_BYTES) as usize];
            self.scratch[chunk].segment().part(byte, bytes.len()).copy_to(&mut bytes);
            self.merged.write(start, &bytes);
        }
        self.scratch.clear();
    }

    /// The group as a whole to its slot of the sidecar, as it was put together.
    pub(super) fn plan_redo(&mut self, host: &mut dyn DrainHost) {
        let Summing { writer, staged, .. } = self.summing.take().expect("it was put together");
        for (at, segments) in staged {
            let offset = writer.data_offset() + at;
            self.push(SIDECAR, OperationKind::Write, offset, segments);
        }
        let span = GroupSpan {
            from: self.group.from,
            to: self.group.point,
            point_ms: self.time_of(self.group.point, host),
            dirty_bytes: self.dirty.bytes().saturating_sub(self.group.log_bytes),
            part: self.group.part,
            others: self.group.point - self.own_after(),
        };
        let finished = writer.finish(span);
        if !finished.table.is_empty() {
            let table = self.stage(&finished.table);
            self.push(SIDECAR, OperationKind::Write, finished.table_offset, vec![table]);
        }
        let header = self.stage(&finished.header_block);
        self.push(SIDECAR, OperationKind::Write, finished.header_offset, vec![header]);
    }

    /// The wall-clock time of a committed write, in milliseconds; 0 if that is not known.
    fn time_of(&self, won: u64, host: &mut dyn DrainHost) -> u64 {
        let age = self.dirty.time_of(won).map(|at| host.now() - at);
        age.map_or(0, |age| host.wall_ms().saturating_sub(age.as_millis() as u64))
    }

    /// The group in place.
    pub(super) fn plan_apply(&mut self) {
        self.scratch.clear();
        for run in self.merged.runs().to_vec() {
            let Content::Data(_) = run.span.content else {
                self.plan_zeros(run.span);
                continue;
            };
            let segments = self.merged.memory(&run);
            self.push(BACKING, OperationKind::Write, run.span.start * SECTOR_BYTES, segments);
        }
    }

    fn plan_zeros(&mut self, run: Span) {
        let kind = match run.content {
            Content::Discard if !self.discard_refused => Some(OperationKind::Discard),
            _ if !self.zero_refused => Some(OperationKind::Zero),
            _ => None,
        };
        let most = if kind.is_some() { ZERO_SECTORS_MAX } else { CHUNK_BYTES / SECTOR_BYTES };
        let mut at = run.start;
        while at < run.end() {
            let count = most.min(run.end() - at);
            match kind {
                Some(kind) => self.push_range(kind, at, count),
                None => {
                    let chunk = CHUNK_BYTES as usize;
                    let zeros = self.zeros.get_or_insert_with(|| PinnedBuffer::new(chunk));
                    let part = zeros.segment().part(0, (count * SECTOR_BYTES) as usize);
                    self.push(BACKING, OperationKind::Write, at * SECTOR_BYTES, vec![part]);
                }
            }
            at += count;
        }
    }

    /// The next stamp: both its copies. It tells the point and retires every group so far.
    pub(super) fn plan_stamp(&mut self, host: &mut dyn DrainHost) {
        self.scratch.clear();
        let roster = self.roster_to_stamp();
        let Some(sidecar) = self.options.sidecar.as_ref() else {
            return;
        };
        let wall_ms = host.wall_ms();
        let dirty = !self.dirty.is_empty();
        let clean = self.retire_clean && !dirty;
        let point_ms = match dirty {
            true => self.time_of(self.drained(), host),
            false => wall_ms,
        };
        let mut stamp = sidecar.stamp.next(wall_ms);
        stamp.state = if clean { StampState::Clean } else { StampState::Dirty };
        stamp.drain = self.options.mode;
        let others = self.drained() - self.own;
        stamp.point = Point { won: self.drained(), time_ms: point_ms, others };
        stamp.dirty_bytes = self.dirty.bytes();
        let oldest = self.dirty.oldest().map(|at| (host.now() - at).as_millis() as u64);
        stamp.oldest_dirty_ms = oldest.map_or(0, |age| wall_ms.saturating_sub(age));
        if !self.is_finishing() {
            stamp.retired_group = self.last_group;
        }
        if let Some(roster) = roster {
            // Who has left leads nobody: the others have retired what it led.
            stamp.committed_step *= u64::from(!roster.is_empty());
            stamp.roster = roster;
        }
        self.push_stamp(stamp);
    }

    /// A stamp is durable: who waits for one like it is answered.
    pub(super) fn finish_stamp(&mut self, now: Nanos) {
        let stamp = self.stamp.take().expect("it was planned");
        let sidecar = self.options.sidecar.as_mut().expect("it has a stamp");
        if stamp.retired_group >= self.last_group {
            self.live_group = false;
        }
        let clean = stamp.is_clean() && self.dirty.is_empty();
        sidecar.stamp = stamp;
        self.stamped = now;
        if !self.stamped_together() {
            return;
        }
        // It may have been begun before a clean one was asked for.
        if self.retire_clean && !clean && self.last_good.is_none() {
            return;
        }
        self.retire_clean = false;
        let drained = self.drained();
        let result = match self.last_good.filter(|_| !self.dirty.is_empty()) {
            Some(last_good) => Err(DrainError::Corrupt { last_good }),
            None => Ok(drained),
        };
        self.retire.drain(..).for_each(|reply| reply(result.clone()));
    }

    pub(super) fn push_stamp(&mut self, stamp: Stamp) {
        let block = self.stage(&stamp.encode());
        for offset in stamp.offsets() {
            self.push(SIDECAR, OperationKind::Write, offset, vec![block]);
        }
        self.stamp = Some(stamp);
    }
}
