//! The pool: allocations are made, resized, removed; freed extents are scrubbed. Single-threaded
//! and blocking; what a call returns as done is durable.

use super::change::{self, AllocationId, Change, Class};
use super::check::{CheckProgress, CheckReport, check};
use super::extents::{ExtentRange, ExtentSet};
use super::format::check_device;
use super::layout::{ATTRIBUTES_BYTES_MAX, NAME_BYTES_MAX};
use super::store::Store;
use super::table::{Allocation, Table, entry_bytes, is_size};
use crate::base::units::{Bytes, EXTENT_BYTES, MIB};
use crate::base::{Error, ErrorKind, Result};
use crate::io::blocking::Blocking;
use crate::io::disk::{Disk, DiskGeometry};

/// Bytes scrubbed at a time when a caller waits for clean extents.
const DEMAND_SCRUB_BYTES: u64 = 256 * MIB;

/// Scrubs that may fail one after the other before a caller who waits is told.
const SCRUB_FAILURES_MAX: u32 = 8;

/// An allocation to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewAllocation {
    /// Unique in the pool, 1 to [`NAME_BYTES_MAX`] bytes: "vm/volume".
    pub name: String,
    /// A multiple of 4 KiB.
    pub size_bytes: u64,
    /// Extents are mapped on first write.
    pub thin: bool,
    pub class: Class,
    /// Up to [`ATTRIBUTES_BYTES_MAX`] bytes that the pool keeps for its owner.
    pub attributes: Vec<u8>,
}

/// How full a pool is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Watermark {
    Normal,
    /// At least 80 % of the data space is allocated.
    High,
    /// At least 95 %.
    Critical,
    /// No extent is left, not even one to be scrubbed.
    Full,
}

/// Where the bytes of a pool are. The first four add up to the total.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    pub total_bytes: u64,
    pub allocated_bytes: u64,
    /// Clean: can be given out at once.
    pub free_bytes: u64,
    /// Freed but not yet zeroed: will be free.
    pub scrub_bytes: u64,
    /// Roots, tables, logs, and what is left over at the end of the device.
    pub metadata_bytes: u64,
    /// Sizes of all allocations; more than the device if thin ones promise more.
    pub provisioned_bytes: u64,
    pub watermark: Watermark,
}

/// What scrubbing did and what is left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubProgress {
    pub scrubbed_bytes: u64,
    pub left_bytes: u64,
}

/// A pool on a disk.
pub struct Pool {
    pub(super) store: Store,
    pub(super) table: Table,
    /// Where scrubbing goes on: past an extent that would not be zeroed, so that one bad place
    /// does not keep all others dirty.
    pub(super) scrub_cursor: u64,
}

/// A pool that is only looked at: nobody gets it to change it.
pub struct PoolView(Pool);

impl std::ops::Deref for PoolView {
    type Target = Pool;

    fn deref(&self) -> &Pool {
        &self.0
    }
}

impl Pool {
    /// Opens the pool on `disk`: single damaged copies are repaired, anything more is refused.
    ///
    /// # Errors
    /// [`ErrorKind::Gone`]: no pool there. [`ErrorKind::Unsupported`]: a newer version, nothing
    /// was changed. [`ErrorKind::Corrupt`]: damage, named.
    pub fn open(disk: Box<dyn Disk + Send>) -> Result<Self> {
        let blocking = Blocking::new(disk);
        let (store, table) = Store::open(blocking)?;
        check_device(&store.blocking.geometry())?;
        Ok(Self { store, table, scrub_cursor: 0 })
    }

    /// Reads the pool on `disk` to be looked at; changes nothing, not even damaged copies.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn view(disk: Box<dyn Disk + Send>) -> Result<PoolView> {
        let (store, table, _) = Store::read(Blocking::new(disk))?;
        check_device(&store.blocking.geometry())?;
        Ok(PoolView(Self { store, table, scrub_cursor: 0 }))
    }

    /// Checks the pool on `disk` without opening it; changes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Gone`]: no pool there. [`ErrorKind::Unsupported`]: a newer version. Damage is
    /// in the report.
    pub fn check_offline(
        disk: Box<dyn Disk + Send>,
        progress: &CheckProgress,
    ) -> Result<CheckReport> {
        check(&mut Blocking::new(disk), None, progress)
    }

    /// Checks what is on flash against every invariant and against memory.
    pub fn check(&mut self) -> CheckReport {
        self.check_with(&CheckProgress::default())
    }

    /// As [`Self::check`], for somebody to watch.
    pub fn check_with(&mut self, progress: &CheckProgress) -> CheckReport {
        let report = check(&mut self.store.blocking, Some(&self.table), progress);
        report.expect("what is wrong with an open pool is in the report")
    }

    pub fn name(&self) -> &str {
        &self.store.root.name
    }

    pub fn uuid(&self) -> [u8; 16] {
        self.store.root.uuid
    }

    /// A commit failed and its outcome is open; every change is refused until it is settled.
    pub fn is_fenced(&self) -> bool {
        self.store.is_unsettled()
    }

    pub fn space(&self) -> Space {
        let bytes = |set: &ExtentSet| set.total() * EXTENT_BYTES;
        // A file that was cut short under us is still as large as the pool takes it to be.
        let known_bytes = self.table.extents * EXTENT_BYTES;
        let total_bytes = self.store.blocking.geometry().size_bytes.max(known_bytes);
        let free_bytes = bytes(&self.table.clean);
        let scrub_bytes = bytes(&self.table.unscrubbed);
        let metadata = bytes(&self.table.metadata);
        let data_bytes = self.table.extents * EXTENT_BYTES - metadata;
        let allocated_bytes = data_bytes - free_bytes - scrub_bytes;
        let provisioned = self.table.allocations.values().map(|allocation| allocation.size_bytes);
        Space {
            total_bytes,
            allocated_bytes,
            free_bytes,
            scrub_bytes,
            metadata_bytes: total_bytes - data_bytes,
            provisioned_bytes: provisioned.sum(),
            watermark: watermark(allocated_bytes, data_bytes),
        }
    }

    /// Extents that can be given out at once: they read as zeros.
    pub fn clean(&self) -> impl Iterator<Item = ExtentRange> + '_ {
        self.table.clean.iter()
    }

    pub fn allocations(&self) -> impl Iterator<Item = &Allocation> + '_ {
        self.table.allocations.values()
    }

    pub fn allocation(&self, id: AllocationId) -> Option<&Allocation> {
        self.table.allocations.get(&id)
    }

    pub fn find(&self, name: &str) -> Option<&Allocation> {
        self.table.find(name)
    }

    /// Makes an allocation; a thick one holds all its extents from now on. Waits for scrubbing if
    /// too few extents are clean.
    pub fn create(&mut self, new: NewAllocation) -> Result<AllocationId> {
        self.store.settle(&self.table)?;
        check_new(&new)?;
        if self.find(&new.name).is_some() {
            let text = format!("pool {} already has `{}`", self.name(), new.name);
            return Err(Error::new(ErrorKind::Busy, text));
        }
        self.reserve_entry(entry_bytes(&new.name, &new.attributes), &new.name)?;
        let id = AllocationId(self.table.next_id);
        let extents = if new.thin { 0 } else { new.size_bytes.div_ceil(EXTENT_BYTES) };
        let pieces = self.take(extents, None, &new.name)?;
        let NewAllocation { name, size_bytes, thin, class, attributes } = new;
        let mut changes = vec![Change::Create { id, name, class, thin, size_bytes, attributes }];
        changes.extend(maps(id, 0, &pieces));
        self.commit(&changes)?;
        Ok(id)
    }

    /// Grows or shrinks. What is added reads as zeros; what is cut off is gone. An attached
    /// volume must have stopped using the tail before (see `VolumeMessage::Shrink`).
    pub fn resize(&mut self, id: AllocationId, size_bytes: u64) -> Result<()> {
        self.store.settle(&self.table)?;
        let Some(allocation) = self.allocation(id) else { return Err(gone(id)) };
        if !is_size(size_bytes) {
            return Err(invalid_size(&allocation.name, size_bytes));
        }
        let (old, new) = (allocation.extents(), size_bytes.div_ceil(EXTENT_BYTES));
        let resize = Change::Resize { id, size_bytes };
        if size_bytes <= allocation.size_bytes {
            let tail = ExtentRange { start: new, count: old - new };
            return match tail.count {
                0 => self.commit(&[resize]),
                _ => self.commit(&[Change::Unmap { id, logical: tail }, resize]),
            };
        }
        let mut changes = vec![resize];
        if !allocation.thin {
            let name = allocation.name.clone();
            let last = allocation.run_of(old - 1).map(|run| run.physical().end());
            let pieces = self.take(new - old, last, &name)?;
            changes.extend(maps(id, old, &pieces));
        }
        self.zero_last_extent(id)?;
        self.commit(&changes)
    }

    /// An earlier shrink may have left data behind the end, in the last extent.
    fn zero_last_extent(&mut self, id: AllocationId) -> Result<()> {
        let Some(allocation) = self.allocation(id) else { return Err(gone(id)) };
        let used = allocation.size_bytes % EXTENT_BYTES;
        let last = allocation.run_of(allocation.size_bytes / EXTENT_BYTES);
        let Some(run) = last.filter(|_| used > 0) else { return Ok(()) };
        let extent = run.physical + (allocation.size_bytes / EXTENT_BYTES - run.logical);
        let offset = extent * EXTENT_BYTES + used;
        let blocking = &mut self.store.blocking;
        blocking.zero(offset, EXTENT_BYTES - used).and_then(|()| blocking.flush()).map_err(
            |errno| {
                let text = format!("zeroing the rest of the last extent at byte {offset}");
                Error::io(text, errno.into())
            },
        )
    }

    /// Removes an allocation. Its extents are given to nobody before they are scrubbed. An
    /// attached volume must have been taken down before.
    pub fn remove(&mut self, id: AllocationId) -> Result<()> {
        self.store.settle(&self.table)?;
        if self.allocation(id).is_none() {
            return Err(gone(id));
        }
        self.commit(&[Change::Remove { id }])
    }

    pub fn set_attributes(&mut self, id: AllocationId, attributes: Vec<u8>) -> Result<()> {
        self.store.settle(&self.table)?;
        let Some(allocation) = self.allocation(id) else { return Err(gone(id)) };
        check_attributes(&allocation.name, &attributes)?;
        let more = attributes.len().saturating_sub(allocation.attributes.len()) as u64;
        let name = allocation.name.clone();
        self.reserve_entry(more, &name)?;
        self.commit(&[Change::Attributes { id, attributes }])
    }

    /// Zeroes up to `bytes_max` of freed extents (at least one) and makes them available.
    ///
    /// # Errors
    /// The extents stay unscrubbed; the next step goes on behind them.
    pub fn scrub_step(&mut self, bytes_max: u64) -> Result<ScrubProgress> {
        self.store.settle(&self.table)?;
        let unscrubbed = &self.table.unscrubbed;
        let next = unscrubbed.first_from(self.scrub_cursor).or_else(|| unscrubbed.first_from(0));
        let Some(mut physical) = next else { return Ok(ScrubProgress::default()) };
        physical.count = physical.count.min((bytes_max / EXTENT_BYTES).max(1));
        self.scrub_cursor = physical.end();
        let blocking = &mut self.store.blocking;
        let zeroed = blocking.zero(physical.offset(), physical.bytes());
        zeroed.and_then(|()| blocking.flush()).map_err(|errno| {
            let text = format!(
                "pool {}: scrubbing {} at byte {}; it stays out of use",
                self.store.root.name,
                Bytes(physical.bytes()),
                physical.offset()
            );
            Error::io(text, errno.into())
        })?;
        self.commit(&[Change::Clean { physical }])?;
        let left_bytes = self.table.unscrubbed.total() * EXTENT_BYTES;
        Ok(ScrubProgress { scrubbed_bytes: physical.bytes(), left_bytes })
    }

    /// Writes the whole table and starts a new log. Never needed; makes the next opening faster.
    pub fn checkpoint(&mut self) -> Result<()> {
        self.store.checkpoint(&self.table).map_err(|error| self.named(error))
    }

    /// The disk underneath, for its geometry.
    pub fn geometry(&self) -> DiskGeometry {
        self.store.blocking.geometry()
    }

    /// `count` clean extents for `name`, scrubbing for them if need be. Not yet taken.
    fn take(&mut self, count: u64, near: Option<u64>, name: &str) -> Result<Vec<ExtentRange>> {
        if count > self.table.clean.total() + self.table.unscrubbed.total() {
            return Err(self.full(count, name));
        }
        self.scrub_until(count)?;
        Ok(self.table.clean.choose(count, near).expect("as many are clean"))
    }

    /// Scrubs until `count` extents are clean or none is left to scrub. Extents that cannot be
    /// zeroed are passed over, unless it is one after the other.
    pub(super) fn scrub_until(&mut self, count: u64) -> Result<()> {
        let mut failures = 0;
        while self.table.clean.total() < count && self.table.unscrubbed.total() > 0 {
            let missing = (count - self.table.clean.total()) * EXTENT_BYTES;
            match self.scrub_step(missing.min(DEMAND_SCRUB_BYTES)) {
                Ok(_) => failures = 0,
                Err(error) if failures == SCRUB_FAILURES_MAX || self.is_fenced() => {
                    return Err(error);
                }
                Err(_) => failures += 1,
            }
        }
        Ok(())
    }

    pub(super) fn full(&self, count: u64, name: &str) -> Error {
        let space = self.space();
        let text = format!(
            "pool {} is full: `{name}` needs {}, free are {} and {} being scrubbed; reclaim or \
             shrink other volumes, or grow the pool",
            self.name(),
            Bytes(count * EXTENT_BYTES),
            Bytes(space.free_bytes),
            Bytes(space.scrub_bytes)
        );
        Error::new(ErrorKind::Full, text)
    }

    fn reserve_entry(&self, more: u64, name: &str) -> Result<()> {
        if self.table.entry_bytes + more <= self.store.root.plan.entry_bytes_max() {
            return Ok(());
        }
        let text = format!(
            "pool {} has no room in its table for `{name}`: names and attributes of all \
             allocations take at most {} bytes",
            self.name(),
            self.store.root.plan.entry_bytes_max()
        );
        Err(Error::new(ErrorKind::Full, text))
    }

    pub(super) fn apply(&mut self, change: &Change, generation: u64) {
        let applied = self.table.apply(change, generation);
        assert!(applied.is_ok(), "a change that was checked applies: {applied:?}");
    }

    fn commit(&mut self, changes: &[Change]) -> Result<()> {
        let generation = self.store.sequence();
        changes.iter().for_each(|change| self.apply(change, generation));
        self.write(changes)
    }

    /// Makes changes durable that are in the table already.
    pub(super) fn write(&mut self, changes: &[Change]) -> Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        self.store.commit(changes, &self.table).map_err(|error| self.named(error))
    }

    fn named(&self, error: Error) -> Error {
        error.context(format!("pool {}", self.name()))
    }
}

pub(super) fn maps(id: AllocationId, logical: u64, pieces: &[ExtentRange]) -> Vec<Change> {
    let mut next = logical;
    let map = |physical: &ExtentRange| {
        let logical = next;
        next += physical.count;
        Change::Map { id, logical, physical: *physical }
    };
    pieces.iter().map(map).collect()
}

fn watermark(allocated_bytes: u64, data_bytes: u64) -> Watermark {
    let share = u128::from(allocated_bytes) * 100;
    let data = u128::from(data_bytes);
    match share {
        share if share >= data * 100 => Watermark::Full,
        share if share >= data * 95 => Watermark::Critical,
        share if share >= data * 80 => Watermark::High,
        _ => Watermark::Normal,
    }
}

fn check_new(new: &NewAllocation) -> Result<()> {
    if change::name(new.name.as_bytes()).is_none() {
        let text = format!("`{}` is no name: 1 to {NAME_BYTES_MAX} printable bytes", new.name);
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    if !is_size(new.size_bytes) {
        return Err(invalid_size(&new.name, new.size_bytes));
    }
    check_attributes(&new.name, &new.attributes)
}

fn check_attributes(name: &str, attributes: &[u8]) -> Result<()> {
    if attributes.len() <= ATTRIBUTES_BYTES_MAX {
        return Ok(());
    }
    let text = format!(
        "the settings of `{name}` take {} bytes; at most {ATTRIBUTES_BYTES_MAX} fit",
        attributes.len()
    );
    Err(Error::new(ErrorKind::Invalid, text))
}

fn invalid_size(name: &str, size_bytes: u64) -> Error {
    let size = Bytes(size_bytes);
    let text = format!("`{name}` cannot have {size}: write a multiple of 4KiB");
    Error::new(ErrorKind::Invalid, text)
}

pub(super) fn gone(id: AllocationId) -> Error {
    Error::new(ErrorKind::Gone, format!("there is no allocation {}", id.0))
}

#[cfg(test)]
#[path = "pool_test.rs"]
pub(in crate::flash) mod tests;
