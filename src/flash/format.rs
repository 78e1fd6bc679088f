//! The shape of a pool: making one, and taking up what its device became larger by.

use super::change;
use super::check::CheckProgress;
use super::extents::ExtentRange;
use super::layout::{
    LOG_BYTES_MIN, POOL_BYTES_MAX, POOL_BYTES_MIN, POOL_NAME_BYTES_MAX, Plan, area_sizes,
};
use super::pool::Pool;
use super::root::Root;
use super::store::{Store, inspect};
use super::table::Table;
use crate::base::units::{Bytes, EXTENT_BYTES, KIB};
use crate::base::{Error, ErrorKind, Result};
use crate::io::blocking::Blocking;
use crate::io::disk::{Disk, DiskGeometry};

/// How to make a pool.
#[derive(Clone, Debug, Default)]
pub struct FormatOptions {
    /// 1 to [`POOL_NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// Destroys whatever the device holds.
    pub overwrite: bool,
    /// The device is known to read as zeros throughout (a file just made), so nothing needs to be
    /// scrubbed before its first use.
    pub zeroed: bool,
    /// Decides the pool's identity; random if none. For tests that must repeat.
    pub uuid: Option<[u8; 16]>,
    /// Bytes of the metadata log, if not as the size suggests. For tests of checkpoints.
    pub log_bytes: Option<u64>,
}

impl Pool {
    /// Makes a pool on a device whose content is unknown; refuses one that is not empty.
    pub fn format(disk: Box<dyn Disk + Send>, name: &str) -> Result<Self> {
        Self::format_with(disk, FormatOptions { name: name.to_owned(), ..Default::default() })
    }

    pub fn format_with(disk: Box<dyn Disk + Send>, options: FormatOptions) -> Result<Self> {
        let mut blocking = Blocking::new(disk);
        let geometry = blocking.geometry();
        check_device(&geometry)?;
        if change::name(options.name.as_bytes()).is_none()
            || options.name.len() > POOL_NAME_BYTES_MAX
        {
            let text = format!("`{}` cannot name a pool: 1 to 63 printable bytes", options.name);
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        if !options.overwrite {
            refuse_used(&mut blocking)?;
        }
        let device_bytes = geometry.size_bytes - geometry.size_bytes % EXTENT_BYTES;
        let (table_capacity, log_bytes) = area_sizes(device_bytes);
        let log_bytes = options.log_bytes.map_or(log_bytes, |bytes| bytes.max(LOG_BYTES_MIN));
        let mut plan = Plan { device_bytes, table_capacity, log_bytes, areas: [[0; 2]; 2] };
        for (index, offset) in plan.areas.as_flattened_mut().iter_mut().enumerate() {
            *offset = (1 + index as u64 * area_extents(table_capacity, log_bytes)) * EXTENT_BYTES;
        }
        let metadata = plan.metadata()?;
        let table = Table::empty(plan.extents(), metadata, options.zeroed);
        let first = Root {
            uuid: options.uuid.unwrap_or_else(|| *uuid::Uuid::new_v4().as_bytes()),
            sequence: 0,
            plan,
            active: 1,
            table_bytes: 0,
            table_checksum: 0,
            record_sequence: 1,
            salt: 0,
            name: options.name,
        };
        Ok(Self { store: Store::format(blocking, first, &table)?, table, scrub_cursor: 0 })
    }

    /// The device became larger: its new space becomes the pool's, to be scrubbed first. The
    /// metadata areas move if they are too small for the new size.
    pub fn grow(&mut self) -> Result<()> {
        self.store.settle(&self.table)?;
        let geometry = self.store.blocking.geometry();
        check_device(&geometry)?;
        let old = self.store.plan;
        let device_bytes = geometry.size_bytes - geometry.size_bytes % EXTENT_BYTES;
        if device_bytes <= old.device_bytes {
            let text = format!(
                "pool {}: the device has {}, not more than before; enlarge it first",
                self.name(),
                Bytes(device_bytes)
            );
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let added = ExtentRange {
            start: old.extents(),
            count: device_bytes / EXTENT_BYTES - old.extents(),
        };
        let mut table = self.table.clone();
        table.extents = added.end();
        assert!(table.unscrubbed.insert(added), "space beyond the old end belonged to nobody");
        let (table_capacity, log_bytes) = area_sizes(device_bytes);
        let mut plan = Plan { device_bytes, ..old };
        if table_capacity > old.table_capacity {
            plan = Plan { table_capacity, log_bytes, ..plan };
            move_areas(&mut table, &mut plan, &old)
                .map_err(|error| error.context(format!("pool {}", self.store.root.name)))?;
        }
        self.table = table;
        self.store.plan = plan;
        let moved = plan.areas != old.areas;
        self.checkpoint()?;
        // The older root still names the old areas, which are free now: replace it too.
        if moved { self.checkpoint() } else { Ok(()) }
    }
}

fn area_extents(table_capacity: u64, log_bytes: u64) -> u64 {
    (table_capacity + log_bytes).div_ceil(EXTENT_BYTES)
}

/// Finds room for larger areas among the free extents; the old areas become free.
fn move_areas(table: &mut Table, plan: &mut Plan, old: &Plan) -> Result<()> {
    let extents = area_extents(plan.table_capacity, plan.log_bytes);
    for offset in plan.areas.as_flattened_mut() {
        let fits = |range: &ExtentRange| range.count >= extents;
        let run = table.unscrubbed.iter().find(fits).or_else(|| table.clean.iter().find(fits));
        let Some(run) = run else {
            let text = "no room for the larger metadata: enlarge the device further";
            return Err(Error::new(ErrorKind::Full, text));
        };
        let area = ExtentRange { start: run.start, count: extents };
        assert!(table.unscrubbed.remove(area) || table.clean.remove(area), "it was free");
        *offset = area.offset();
    }
    for offset in old.areas.into_iter().flatten() {
        let area = ExtentRange { start: offset / EXTENT_BYTES, count: old.area_extents() };
        assert!(table.unscrubbed.insert(area), "metadata was nobody's data");
    }
    table.metadata = plan.metadata()?;
    Ok(())
}

pub(super) fn check_device(geometry: &DiskGeometry) -> Result<()> {
    let text = if geometry.size_bytes < POOL_BYTES_MIN {
        format!(
            "the device has {}, a pool needs {}",
            Bytes(geometry.size_bytes),
            Bytes(POOL_BYTES_MIN)
        )
    } else if geometry.size_bytes > POOL_BYTES_MAX {
        format!("the device is larger than a pool can be ({})", Bytes(POOL_BYTES_MAX))
    } else if geometry.block_bytes > 4096 || !geometry.block_bytes.is_power_of_two() {
        format!("the device has blocks of {} bytes; at most 4096 work", geometry.block_bytes)
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Unsupported, text))
}

/// Refuses a device that holds a pool, whole or damaged, or anything else at its beginning.
fn refuse_used(blocking: &mut Blocking) -> Result<()> {
    match inspect(blocking, &CheckProgress::default()) {
        Ok(inspection) => {
            let text = format!(
                "the device already holds pool {}; its data would be lost: ask for overwriting",
                inspection.root.name
            );
            return Err(Error::new(ErrorKind::Busy, text));
        }
        Err(error) if error.kind() == ErrorKind::Gone => {}
        Err(error) => {
            return Err(error.context("the device seems to hold a pool: ask for overwriting"));
        }
    }
    let head = blocking
        .read(0, (EXTENT_BYTES) as usize)
        .map_err(|errno| Error::io("reading the beginning of the device", errno.into()))?;
    if head.iter().any(|byte| *byte != 0) {
        let text = format!(
            "the first {}KiB of the device are not empty: it may hold a file system or a \
             partition table, which would be lost: ask for overwriting",
            EXTENT_BYTES / KIB
        );
        return Err(Error::new(ErrorKind::Busy, text));
    }
    Ok(())
}
