//! The table: which extents belong to whom. In memory it is the truth between commits; every
//! change goes through `Table::apply`, at run time as in recovery.
//!
//! Invariants (numbers as in FORMAT.md):
//! - T1 every extent is exactly one of: metadata, mapped by one allocation, unscrubbed, clean.
//! - T2 only clean extents are mapped; only mapped ones become unscrubbed; only unscrubbed ones,
//!   durably zeroed, become clean.
//! - T3 names are unique; ids are never used again.
//! - T4 no run reaches beyond its allocation's size; a thick allocation is mapped throughout.
//! - T5 the encoded table fits its area whatever the fragmentation.

use super::change::{self, AllocationId, Change, Class};
use super::extents::{ExtentRange, ExtentSet};
use super::layout::{
    ALLOCATION_HEADER_BYTES, ATTRIBUTES_BYTES_MAX, BLOCK_BYTES, NAME_BYTES_MAX, SEQUENCE_MAX,
    TABLE_MAGIC,
};
use crate::base::codec::{Reader, Writer};
use crate::base::units::EXTENT_BYTES;
use crate::base::{Error, ErrorKind, Result};
use std::collections::BTreeMap;

/// Extents that lie together in the allocation and on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Extent of the allocation.
    pub logical: u64,
    /// Extent of the device.
    pub physical: u64,
    pub count: u64,
    /// Sequence of the record that mapped it: the same extent given again is told apart.
    pub generation: u64,
}

impl Run {
    pub(super) fn physical(&self) -> ExtentRange {
        ExtentRange { start: self.physical, count: self.count }
    }

    pub(super) fn logical(&self) -> ExtentRange {
        ExtentRange { start: self.logical, count: self.count }
    }
}

/// One owner of extents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocation {
    pub id: AllocationId,
    /// Unique in the pool.
    pub name: String,
    pub class: Class,
    /// Extents are mapped on first write; else all are from the beginning.
    pub thin: bool,
    /// A multiple of 4 KiB.
    pub size_bytes: u64,
    /// The owner's own; the pool only keeps them.
    pub attributes: Vec<u8>,
    pub(super) runs: BTreeMap<u64, Run>,
    mapped_extents: u64,
}

impl Allocation {
    /// Runs in logical order.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.runs.values().copied()
    }

    /// Bytes of the device that it holds.
    pub fn mapped_bytes(&self) -> u64 {
        self.mapped_extents * EXTENT_BYTES
    }

    /// Extents that its size covers, the last perhaps in part.
    pub fn extents(&self) -> u64 {
        self.size_bytes.div_ceil(EXTENT_BYTES)
    }

    /// The run that holds the logical extent.
    pub(super) fn run_of(&self, logical: u64) -> Option<Run> {
        let (_, run) = self.runs.range(..=logical).next_back()?;
        Some(*run).filter(|run| logical < run.logical().end())
    }

    /// What it takes of the table besides its runs.
    fn entry_bytes(&self) -> u64 {
        entry_bytes(&self.name, &self.attributes)
    }

    fn insert(&mut self, run: Run) {
        self.mapped_extents += run.count;
        let mut merged = run;
        if let Some(before) = run.logical.checked_sub(1).and_then(|logical| self.run_of(logical))
            && before.physical().end() == run.physical
            && before.generation == run.generation
        {
            merged = Run { count: before.count + run.count, ..before };
        }
        if let Some(after) = self.runs.get(&run.logical().end()).copied()
            && after.physical == run.physical().end()
            && after.generation == run.generation
        {
            self.runs.remove(&after.logical);
            merged.count += after.count;
        }
        self.runs.insert(merged.logical, merged);
    }

    /// Cuts the logical range out of the runs; what was mapped of it.
    fn cut(&mut self, range: ExtentRange) -> Vec<ExtentRange> {
        let first = self.run_of(range.start).map_or(range.start, |run| run.logical);
        let hit: Vec<Run> = self.runs.range(first..range.end()).map(|(_, run)| *run).collect();
        let mut freed = Vec::new();
        for run in hit {
            self.runs.remove(&run.logical);
            let (from, to) = (run.logical.max(range.start), run.logical().end().min(range.end()));
            let part = |from: u64, to: u64| Run {
                logical: from,
                physical: run.physical + (from - run.logical),
                count: to - from,
                generation: run.generation,
            };
            for rest in [part(run.logical, from), part(to, run.logical().end())] {
                if rest.count > 0 {
                    self.runs.insert(rest.logical, rest);
                }
            }
            freed.push(part(from, to).physical());
            self.mapped_extents -= to - from;
        }
        freed
    }
}

pub(super) fn entry_bytes(name: &str, attributes: &[u8]) -> u64 {
    ALLOCATION_HEADER_BYTES + (name.len() + attributes.len()) as u64
}

/// Sizes an allocation may have.
pub(super) fn is_size(size_bytes: u64) -> bool {
    size_bytes > 0
        && size_bytes.is_multiple_of(BLOCK_BYTES)
        && size_bytes.div_ceil(EXTENT_BYTES) < u64::from(u32::MAX)
}

/// All allocations and the state of every extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub extents: u64,
    pub metadata: ExtentSet,
    pub allocations: BTreeMap<AllocationId, Allocation>,
    pub clean: ExtentSet,
    pub unscrubbed: ExtentSet,
    pub next_id: u64,
    pub entry_bytes: u64,
    names: BTreeMap<String, AllocationId>,
}

impl Table {
    /// A table without allocations; all extents that hold data are clean or all are unscrubbed.
    pub(super) fn empty(extents: u64, metadata: ExtentSet, zeroed: bool) -> Self {
        let mut data = ExtentSet::default();
        assert!(data.insert(ExtentRange { start: 0, count: extents }), "the set was empty");
        for range in metadata.iter() {
            assert!(data.remove(range), "metadata lies inside the device");
        }
        let (clean, unscrubbed) =
            if zeroed { (data, ExtentSet::default()) } else { (ExtentSet::default(), data) };
        Self {
            extents,
            metadata,
            allocations: BTreeMap::new(),
            clean,
            unscrubbed,
            next_id: 1,
            entry_bytes: 0,
            names: BTreeMap::new(),
        }
    }

    /// Carries a change out, or says why it cannot be one of this table: in recovery that is
    /// corruption, at run time our own mistake.
    pub(super) fn apply(&mut self, change: &Change, generation: u64) -> Result<()> {
        match change {
            Change::Create { id, name, class, thin, size_bytes, attributes } => {
                ensure(id.0 >= self.next_id, || format!("id {} is used again", id.0))?;
                self.insert(Allocation {
                    id: *id,
                    name: name.clone(),
                    class: *class,
                    thin: *thin,
                    size_bytes: *size_bytes,
                    attributes: attributes.clone(),
                    runs: BTreeMap::new(),
                    mapped_extents: 0,
                })
            }
            Change::Remove { id } => {
                let Some(allocation) = self.allocations.remove(id) else { return no_such(*id) };
                self.entry_bytes -= allocation.entry_bytes();
                self.names.remove(&allocation.name);
                allocation.runs().try_for_each(|run| self.release(run.physical()))
            }
            Change::Resize { id, size_bytes } => {
                ensure(is_size(*size_bytes), || format!("{size_bytes} bytes is no size"))?;
                let Some(allocation) = self.allocations.get_mut(id) else { return no_such(*id) };
                let end = allocation.runs.values().next_back().map_or(0, |run| run.logical().end());
                let fits = end <= size_bytes.div_ceil(EXTENT_BYTES);
                ensure(fits, || format!("allocation {} shrinks over mapped extents", id.0))?;
                allocation.size_bytes = *size_bytes;
                Ok(())
            }
            Change::Attributes { id, attributes } => {
                let Some(allocation) = self.allocations.get_mut(id) else { return no_such(*id) };
                self.entry_bytes -= allocation.entry_bytes();
                allocation.attributes.clone_from(attributes);
                self.entry_bytes += allocation.entry_bytes();
                Ok(())
            }
            Change::Map { id, logical, physical } => {
                let ExtentRange { start: physical, count } = *physical;
                self.map(*id, Run { logical: *logical, physical, count, generation })
            }
            Change::Unmap { id, logical } => {
                let Some(allocation) = self.allocations.get_mut(id) else { return no_such(*id) };
                let freed = allocation.cut(*logical);
                freed.into_iter().try_for_each(|range| self.release(range))
            }
            Change::Clean { physical } => {
                let known = self.unscrubbed.remove(*physical) && self.clean.insert(*physical);
                ensure(known, || format!("{} is cleaned without having been freed", show(physical)))
            }
        }
    }

    fn insert(&mut self, allocation: Allocation) -> Result<()> {
        let id = allocation.id.0;
        let size = allocation.size_bytes;
        ensure(is_size(size), || {
            format!("allocation {id} has an impossible size of {size} bytes")
        })?;
        ensure(id < SEQUENCE_MAX, || format!("{id} is no id"))?;
        self.entry_bytes += allocation.entry_bytes();
        self.next_id = self.next_id.max(id + 1);
        let before = self.names.insert(allocation.name.clone(), allocation.id);
        ensure(before.is_none(), || format!("two allocations are called `{}`", allocation.name))?;
        let before = self.allocations.insert(allocation.id, allocation);
        ensure(before.is_none(), || format!("id {id} is used twice"))
    }

    /// T2: only clean extents; T1: to one owner.
    fn map(&mut self, id: AllocationId, run: Run) -> Result<()> {
        let Some(allocation) = self.allocations.get_mut(&id) else { return no_such(id) };
        let inside = run.count > 0 && run.logical().end() <= allocation.extents();
        ensure(inside, || format!("allocation {} is mapped beyond its end", id.0))?;
        let first = allocation.runs.range(..run.logical().end()).next_back();
        let free = first.is_none_or(|(_, before)| before.logical().end() <= run.logical);
        ensure(free, || format!("allocation {} is mapped twice at extent {}", id.0, run.logical))?;
        let clean = self.clean.remove(run.physical());
        ensure(clean, || {
            format!("{} is given to allocation {} but not free", show(&run.physical()), id.0)
        })?;
        allocation.insert(run);
        Ok(())
    }

    fn release(&mut self, range: ExtentRange) -> Result<()> {
        ensure(self.unscrubbed.insert(range), || format!("{} is freed twice", show(&range)))
    }

    /// What holds only between records: T4 for thick allocations, and T5.
    pub(super) fn check_whole(&self, entry_bytes_max: u64) -> Result<()> {
        let fits = self.entry_bytes <= entry_bytes_max;
        ensure(fits, || format!("entries take {} bytes of {entry_bytes_max}", self.entry_bytes))?;
        self.allocations.values().try_for_each(|allocation| {
            let whole = allocation.thin || allocation.mapped_extents == allocation.extents();
            ensure(whole, || format!("allocation {} is not mapped throughout", allocation.id.0))
        })
    }

    pub(super) fn find(&self, name: &str) -> Option<&Allocation> {
        self.allocations.get(self.names.get(name)?)
    }

    pub(super) fn encode(&self, uuid: &[u8; 16], root_sequence: u64) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.bytes(TABLE_MAGIC).bytes(uuid).u64(root_sequence).u64(self.next_id);
        writer.u64(self.allocations.len() as u64).u64(self.unscrubbed.runs() as u64);
        writer.u64(self.extents);
        for allocation in self.allocations.values() {
            encode_allocation(&mut writer, allocation);
        }
        for range in self.unscrubbed.iter() {
            writer.u64(range.start).u64(range.count);
        }
        writer.into_bytes()
    }

    /// Decodes what [`Table::encode`] made; `metadata` and `extents` come from the root. Every
    /// invariant is checked on the way.
    pub(super) fn decode(
        bytes: &[u8],
        uuid: &[u8; 16],
        root_sequence: u64,
        (extents, metadata): (u64, ExtentSet),
    ) -> Result<Self> {
        let short = || Error::new(ErrorKind::Corrupt, "the table ends too early");
        let reader = &mut Reader::new(bytes);
        let magic: [u8; 8] = reader.array().ok_or_else(short)?;
        let owner: [u8; 16] = reader.array().ok_or_else(short)?;
        let ours = magic == *TABLE_MAGIC && owner == *uuid;
        ensure(ours, || "it is not a table of this pool".to_owned())?;
        let sequence = reader.u64().ok_or_else(short)?;
        let next_id = reader.u64().ok_or_else(short)?;
        let allocations = reader.u64().ok_or_else(short)?;
        let ranges = reader.u64().ok_or_else(short)?;
        let matches = sequence == root_sequence && reader.u64() == Some(extents);
        ensure(matches, || "it belongs to another root".to_owned())?;
        let mut table = Self::empty(extents, metadata, true);
        for _ in 0..allocations {
            let (allocation, runs) = decode_allocation(reader).ok_or_else(short)?;
            let id = allocation.id;
            table.insert(allocation)?;
            for run in runs {
                table.map(id, run)?;
            }
        }
        for _ in 0..ranges {
            let (Some(start), Some(count)) = (reader.u64(), reader.u64()) else {
                return Err(short());
            };
            let range = ExtentRange { start, count };
            let free = count > 0 && table.clean.remove(range) && table.unscrubbed.insert(range);
            ensure(free, || format!("{} is free and owned", show(&range)))?;
        }
        let next = table.next_id..=SEQUENCE_MAX;
        ensure(next.contains(&next_id), || "an id is beyond the next one".to_owned())?;
        ensure(reader.remaining() == 0, || "the table is longer than it says".to_owned())?;
        table.next_id = next_id;
        Ok(table)
    }
}

fn encode_allocation(writer: &mut Writer, allocation: &Allocation) {
    writer.u64(allocation.id.0).u64(allocation.size_bytes).u16(allocation.name.len() as u16);
    writer.u8(allocation.class.code()).u8(allocation.thin.into());
    writer.u32(allocation.attributes.len() as u32).u64(allocation.runs.len() as u64);
    writer.bytes(allocation.name.as_bytes()).bytes(&allocation.attributes);
    for run in allocation.runs() {
        for number in [run.logical, run.physical, run.count] {
            writer.u32(u32::try_from(number).expect("extent numbers are below POOL_BYTES_MAX"));
        }
        writer.u32(0).u64(run.generation);
    }
}

fn decode_allocation(reader: &mut Reader<'_>) -> Option<(Allocation, Vec<Run>)> {
    let id = AllocationId(reader.u64()?);
    let size_bytes = reader.u64()?;
    let name_bytes = usize::from(reader.u16()?);
    let class = Class::from_code(reader.u8()?)?;
    let flags = reader.u8()?;
    let attribute_bytes = usize::try_from(reader.u32()?).ok()?;
    let run_count = reader.u64()?;
    if flags > 1 || name_bytes > NAME_BYTES_MAX || attribute_bytes > ATTRIBUTES_BYTES_MAX {
        return None;
    }
    let name = change::name(reader.bytes(name_bytes)?)?;
    let attributes = reader.bytes(attribute_bytes)?.to_vec();
    let mut runs = Vec::new();
    for _ in 0..run_count {
        let (logical, physical) = (u64::from(reader.u32()?), u64::from(reader.u32()?));
        let count = u64::from(reader.u32()?);
        let _reserved = reader.u32()?;
        runs.push(Run { logical, physical, count, generation: reader.u64()? });
    }
    let (runs_none, thin) = (BTreeMap::new(), flags == 1);
    let allocation = Allocation {
        id,
        name,
        class,
        thin,
        size_bytes,
        attributes,
        runs: runs_none,
        mapped_extents: 0,
    };
    Some((allocation, runs))
}

fn no_such(id: AllocationId) -> Result<()> {
    Err(Error::new(ErrorKind::Corrupt, format!("there is no allocation {}", id.0)))
}

fn show(range: &ExtentRange) -> String {
    format!("extent {} to {}", range.start, range.end())
}

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::new(ErrorKind::Corrupt, otherwise())) }
}
