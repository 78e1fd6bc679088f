//! The backing of a drainer: there from the beginning, or claimed later, when it is no longer away.

use super::{DrainHost, DrainOptions, Drainer, Group, SidecarState, State};
use crate::backing::redo::ENTRY_BYTES;
use crate::base::units::SECTOR_BYTES;
use crate::cache::alone::ClaimedBacking;
use crate::cache::merge::{Limits, Merged};

/// Data of a group without a sidecar.
const GROUP_BYTES: u64 = 32 << 20;

/// Spans of a group without a sidecar.
const GROUP_SPANS: usize = 1 << 14;

/// Of a group, by its backing and its sidecar.
pub(super) fn limits(options: &DrainOptions) -> Limits {
    let layout = options.sidecar.as_ref().map(|sidecar| sidecar.layout);
    Limits {
        data_bytes: layout.map_or(GROUP_BYTES, |layout| layout.data_bytes_max),
        spans: layout.map_or(GROUP_SPANS, |layout| (layout.table_bytes_max / ENTRY_BYTES) as usize),
        block_sectors: u64::from(options.backing.block_bytes) / SECTOR_BYTES,
    }
}

/// The last number up to `drained` that is the disk's own.
pub(super) fn own(options: &DrainOptions, drained: u64) -> u64 {
    let sidecar = options.sidecar.as_ref();
    let stamped = sidecar.map(|sidecar| sidecar.stamp.point);
    // Of a group that is to be finished: what it has of the disk's own counts when it has been.
    let live = sidecar.and_then(|sidecar| sidecar.live);
    let point = stamped.filter(|point| point.won == drained).or(live);
    point.map_or(drained, |point| point.own().min(drained))
}

impl Drainer {
    /// The backing is there and this disk's own. What it holds, and that it was claimed, is durable
    /// on the flash before anything goes there (D2). `newest_epoch`: of the log's end.
    pub fn claimed(
        &mut self,
        claimed: ClaimedBacking,
        newest_epoch: u64,
        host: &mut dyn DrainHost,
    ) {
        assert!(self.options.away && self.state == State::Idle, "a backing is claimed once");
        let ClaimedBacking { geometry, drained_through, sidecar } = claimed;
        let SidecarState { last_group, live, .. } = sidecar;
        let live_to = live.map(|point| point.won);
        (self.zero_refused, self.discard_refused) = (!geometry.zero, !geometry.discard);
        (self.last_group, self.live_group) = (last_group, live_to.is_some());
        self.options.away = false;
        self.options.backing = geometry;
        self.options.sidecar = Some(sidecar);
        self.merged = Merged::new(limits(&self.options), self.options.memory.clone());
        let from = self.drained();
        let to = drained_through.max(from);
        self.own = own(&self.options, to);
        self.redone_to = live_to.unwrap_or(to).max(to);
        if self.redone_to > to {
            self.points.group_committed(self.redone_to);
        }
        let epoch = match to > from {
            true => self.points.epoch_of(to).unwrap_or(newest_epoch),
            false => self.group.epoch,
        };
        let (begun, committed) = (host.now(), self.dirty.committed_bytes());
        self.group = Group { from, to, point: to, epoch, begun, committed, ..Group::default() };
        self.enter(State::Claim, host);
    }

    /// The root says so.
    pub(super) fn finish_claim(&mut self) {
        let to = self.group.to;
        self.points.set_drained(to);
        self.dirty.drained(to, 0);
        self.answer();
    }
}
