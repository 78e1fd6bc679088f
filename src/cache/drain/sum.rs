//! Putting a redo group together: its table, with a checksum of each run of data, and its data as
//! the sidecar takes it. All of the group passes through the processor, tens of megabytes, and
//! guests wait for the reactor meanwhile: so a part of it in each turn.

use super::{DrainHost, Drainer, State};
use crate::backing::group::GroupWriter;
use crate::backing::redo::BLOCK_BYTES;
use crate::cache::memory::CHUNK_BYTES;
use crate::cache::merge::{Content, Span};
use crate::io::buffer::{Segment, gather};
use std::collections::VecDeque;

/// Bytes that are checksummed or copied in a turn; a run, at most a chunk, is the least.
pub(super) const TURN_BYTES: u64 = 256 << 10;

/// See the module.
pub(super) struct Summing {
    pub(super) writer: GroupWriter,
    /// Runs of the group that are in the table.
    pub(super) runs: usize,
    /// What is still to be made fit for the sidecar: its byte among all data, and where it lies.
    stretches: VecDeque<(u64, Vec<Segment>)>,
    pub(super) staged: Vec<(u64, Vec<Segment>)>,
    /// A run's data.
    bytes: Vec<u8>,
}

impl Drainer {
    pub(super) fn begin_sum(&mut self) {
        self.scratch.clear();
        let sidecar = self.options.sidecar.as_ref().expect("groups need a sidecar");
        let id = self.next_group_id().expect("groups need a sidecar");
        let mut writer = GroupWriter::new(sidecar.layout, id);
        if let Some((_, step)) = self.together.as_ref().and_then(|together| together.agreed) {
            writer.set_step(step);
        }
        self.summing = Some(Summing {
            writer,
            runs: 0,
            stretches: self.merged.stretches().into(),
            staged: Vec::new(),
            bytes: vec![0; CHUNK_BYTES as usize],
        });
    }

    /// Goes on; true when the group is put together.
    pub(super) fn sum(&mut self, host: &mut dyn DrainHost) -> bool {
        if self.is_pausing(host) {
            return false;
        }
        if std::mem::take(&mut self.again) {
            self.begin_sum();
        }
        let mut summing = self.summing.take().expect("the state has begun");
        let done = std::mem::take(&mut self.turn) && self.sum_part(&mut summing);
        self.summing = Some(summing);
        match done {
            true => self.enter(State::Redo, host),
            false => host.wake_at(host.now()),
        }
        done
    }

    /// A turn's part; true when it was the last.
    fn sum_part(&mut self, summing: &mut Summing) -> bool {
        let mut taken = 0;
        while taken < TURN_BYTES {
            if let Some(run) = self.merged.runs().get(summing.runs) {
                let Span { start, count, content } = run.span;
                match content {
                    Content::Data(_) => {
                        let length = gather(&self.merged.memory(run), &mut summing.bytes);
                        summing.writer.data(start, &summing.bytes[..length]);
                        taken += length as u64;
                    }
                    Content::Zero => summing.writer.zero(start, count),
                    Content::Discard => summing.writer.discard(start, count),
                }
                summing.runs += 1;
                continue;
            }
            let Some((at, mut segments)) = summing.stretches.pop_front() else { return true };
            let block = |segment: &Segment| segment.length().is_multiple_of(BLOCK_BYTES as usize);
            if !segments.iter().all(block) {
                // No device takes less than whole blocks of memory for sure.
                let length = gather(&segments, &mut summing.bytes);
                let whole = length.next_multiple_of(BLOCK_BYTES as usize);
                summing.bytes[length..whole].fill(0);
                segments = vec![self.stage(&summing.bytes[..whole])];
                taken += whole as u64;
            }
            summing.staged.push((at, segments));
        }
        false
    }
}
