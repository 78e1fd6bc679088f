//! Extents on demand: what thin volumes ask of their pool.

use super::change::{AllocationId, Change};
use super::extents::ExtentRange;
use super::pool::{Pool, gone, maps};
use super::table::{Allocation, Run};
use crate::base::{Error, ErrorKind, Result};

/// What a thin volume asks for. Several are answered by one commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThinRequest {
    pub id: AllocationId,
    pub kind: ThinKind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ThinKind {
    /// Back these logical extents; ones that are mapped already stay as they are.
    Map(Vec<u64>),
    /// Give back what is mapped of these. Nothing may be under way on them.
    Unmap(Vec<ExtentRange>),
}

/// The runs that back the extents asked for; none for an unmap.
pub type ThinReply = Result<Vec<Run>>;

impl Pool {
    /// Answers the requests of thin volumes, all in one commit. If that fails, every request that
    /// it was to answer fails, and the pool is fenced.
    pub fn thin_batch(&mut self, requests: &[ThinRequest]) -> Vec<ThinReply> {
        let mut changes = Vec::new();
        let mut replies = Vec::new();
        let maps = requests.iter().map(|request| match &request.kind {
            ThinKind::Map(extents) => extents.len() as u64,
            ThinKind::Unmap(_) => 0,
        });
        let wanted: u64 = maps.sum();
        if let Err(error) = self.scrub_until(wanted) {
            log::error!("{error}");
        }
        let settled = self.store.settle(&self.table);
        for request in requests {
            let reply = match &settled {
                Ok(()) => self.thin_changes(request, &mut changes),
                Err(error) => Err(Error::new(ErrorKind::Fenced, error.to_string())),
            };
            replies.push(reply);
        }
        if let Err(error) = self.write(&changes) {
            let text = error.to_string();
            for reply in replies.iter_mut().filter(|reply| reply.is_ok()) {
                *reply = Err(Error::new(error.kind(), text.clone()));
            }
            return replies;
        }
        for (request, reply) in requests.iter().zip(&mut replies) {
            if let (ThinKind::Map(extents), Ok(runs), Some(allocation)) =
                (&request.kind, reply, self.table.allocations.get(&request.id))
            {
                runs.extend(extents.iter().filter_map(|extent| one(allocation, *extent)));
            }
        }
        replies
    }

    /// Applies what the request asks for to the table and notes it for the record.
    fn thin_changes(&mut self, request: &ThinRequest, changes: &mut Vec<Change>) -> ThinReply {
        let id = request.id;
        let generation = self.store.sequence();
        let Some(allocation) = self.allocation(id) else { return Err(gone(id)) };
        if !allocation.thin {
            let text = format!("`{}` is not thin", allocation.name);
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let extents = match &request.kind {
            ThinKind::Map(extents) => extents,
            ThinKind::Unmap(ranges) => {
                for logical in ranges {
                    let unmap = Change::Unmap { id, logical: *logical };
                    self.apply(&unmap, generation);
                    changes.push(unmap);
                }
                return Ok(Vec::new());
            }
        };
        let mut wanted: Vec<u64> = extents.clone();
        wanted.retain(|extent| allocation.run_of(*extent).is_none());
        wanted.sort_unstable();
        wanted.dedup();
        if wanted.last().is_some_and(|last| *last >= allocation.extents()) {
            let text = format!("`{}` has no extent {:?}", allocation.name, wanted.last());
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        if (wanted.len() as u64) > self.table.clean.total() {
            return Err(self.full(wanted.len() as u64, &allocation.name));
        }
        for logical in wanted {
            let allocation = self.allocation(id).expect("found above");
            let before = logical.checked_sub(1).and_then(|before| one(allocation, before));
            let near = before.map(|run| run.physical().end());
            let pieces = self.table.clean.choose(1, near).expect("counted above");
            for map in maps(id, logical, &pieces) {
                self.apply(&map, generation);
                changes.push(map);
            }
        }
        Ok(Vec::new())
    }
}

/// The single extent of an allocation as a run.
fn one(allocation: &Allocation, logical: u64) -> Option<Run> {
    let run = allocation.run_of(logical)?;
    Some(Run { logical, physical: run.physical + (logical - run.logical), count: 1, ..run })
}
