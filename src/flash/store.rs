//! The store: brings the table to flash and back. It knows roots, areas and the log; what a table
//! means is not its business.
//!
//! A commit is one record, appended to both copies of the log and flushed. When the log is full,
//! or an append failed, the whole table is written to the inactive area instead (a *checkpoint*)
//! and the next root makes that the pool. See FORMAT.md, "If power fails here".

use super::change::Change;
use super::check::CheckProgress;
use super::layout::{BLOCK_BYTES, Plan, ROOT_OFFSETS, root_offset};
use super::record::{self, Link, Log};
use super::root::{Root, RootBlock, salt};
use super::table::Table;
use crate::base::checksum::crc32c;
use crate::base::codec::Reader;
use crate::base::units::MIB;
use crate::base::{Error, ErrorKind, Result};
use crate::io::blocking::Blocking;
use crate::io::disk::Errno;

/// Bytes of metadata read between two steps of the progress.
const READ_BYTES: u64 = 4 * MIB;

/// Something wrong on the device, as `check` reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Byte offset on the device.
    pub offset: u64,
    pub text: String,
    /// The other copy is whole: the next opening repairs it, nothing is lost.
    pub repairable: bool,
}

pub(super) struct Store {
    pub blocking: Blocking,
    /// The newest root that is known to be durable.
    pub root: Root,
    /// Where metadata is to lie; differs from the root's only while the pool grows.
    pub plan: Plan,
    /// What the next record must say.
    link: Link,
    log_end: u64,
    /// A commit failed half way: what is on flash is the table in memory or the one before, and
    /// nothing else may happen until [`Store::settle`] has made it the former.
    unsettled: bool,
}

/// What [`inspect`] read.
pub(super) struct Inspection {
    pub root: Root,
    pub table: Table,
    pub findings: Vec<Finding>,
    link: Link,
    log_end: u64,
    repairs: Repairs,
}

/// Byte offset and bytes of every damaged copy.
type Repairs = Vec<(u64, Vec<u8>)>;

impl Store {
    /// Writes a new pool. The device's old roots are wiped durably first, so that no mixture of
    /// two pools can be opened.
    pub(super) fn format(mut blocking: Blocking, first: Root, table: &Table) -> Result<Self> {
        let zeros = vec![0; BLOCK_BYTES as usize];
        let wiped = blocking.write_copies(ROOT_OFFSETS.as_flattened(), &zeros);
        wiped.and_then(|()| blocking.flush()).map_err(|errno| failed("wiping roots", 0, errno))?;
        let link = Link { salt: 0, sequence: 1, previous: 0 };
        let plan = first.plan;
        let mut store = Self { blocking, root: first, plan, link, log_end: 0, unsettled: false };
        store.checkpoint(table)?;
        Ok(store)
    }

    /// Opens a pool: reads it, repairs single damaged copies, and makes durable what was read.
    pub(super) fn open(blocking: Blocking) -> Result<(Self, Table)> {
        let (mut store, table, repairs) = Self::read(blocking)?;
        let (blocking, name) = (&mut store.blocking, &store.root.name);
        for (offset, bytes) in repairs {
            if let Err(errno) = blocking.write_copies(&[offset], &bytes) {
                let error = failed("repairing a damaged copy", offset, errno);
                log::error!("pool {name}: {error}; its other copy is in use");
            }
        }
        // What a killed daemon wrote can be read but may still be in the drive's cache.
        blocking.flush().map_err(|errno| failed("flushing", 0, errno))?;
        Ok((store, table))
    }

    /// Reads a pool and writes nothing. Also what is to be repaired: offset and bytes of each
    /// damaged copy.
    pub(super) fn read(mut blocking: Blocking) -> Result<(Self, Table, Repairs)> {
        let inspection = inspect(&mut blocking, &CheckProgress::default())?;
        let Inspection { root, table, findings, link, log_end, repairs } = inspection;
        for finding in &findings {
            log::warn!("pool {}: byte {}: {}", root.name, finding.offset, finding.text);
        }
        let plan = root.plan;
        Ok((Self { blocking, root, plan, link, log_end, unsettled: false }, table, repairs))
    }

    /// The sequence that the next commit will have.
    pub(super) fn sequence(&self) -> u64 {
        self.link.sequence
    }

    pub(super) fn is_unsettled(&self) -> bool {
        self.unsettled
    }

    /// Makes `changes`, which `table` already has in it, durable.
    ///
    /// # Errors
    /// The outcome is open: after a crash the changes are there or not. The next call of
    /// [`Store::settle`] makes them durable or fails again.
    pub(super) fn commit(&mut self, changes: &[Change], table: &Table) -> Result<()> {
        assert!(!self.unsettled, "a commit follows a settled one");
        let (bytes, checksum) = record::encode(changes, self.link);
        let fits = self.log_end + bytes.len() as u64 <= self.root.plan.log_bytes;
        let at = self.log_end;
        let link = self.link;
        self.link = link.next(checksum);
        if fits {
            let offsets = self.root.log_offsets().map(|offset| offset + at);
            match self.blocking.write_copies(&offsets, &bytes).and_then(|()| self.blocking.flush())
            {
                Ok(()) => {
                    self.log_end += bytes.len() as u64;
                    return Ok(());
                }
                Err(errno) => {
                    let error = failed("appending to the log", offsets[0], errno);
                    log::warn!("pool {}: {error}; writing the whole table", self.root.name);
                }
            }
        }
        self.checkpoint(table)
    }

    /// Finishes a commit whose outcome is open.
    pub(super) fn settle(&mut self, table: &Table) -> Result<()> {
        if !self.unsettled {
            return Ok(());
        }
        self.checkpoint(table).map_err(|error| {
            let text = "an earlier commit failed and cannot be finished; check the device, then \
                        try again or restart";
            Error::with(ErrorKind::Fenced, text, error)
        })
    }

    /// Writes the whole table to the area that the root does not use, then the next root.
    pub(super) fn checkpoint(&mut self, table: &Table) -> Result<()> {
        self.unsettled = true;
        let moved = self.plan.areas != self.root.plan.areas;
        let sequence = self.root.sequence + 1;
        let bytes = table.encode(&self.root.uuid, sequence);
        let fits = bytes.len() as u64 <= self.plan.table_capacity;
        assert!(fits, "the table fits its area (T5)");
        let mut root = Root {
            sequence,
            plan: self.plan,
            active: if moved { 0 } else { 1 - self.root.active },
            table_bytes: bytes.len() as u64,
            table_checksum: crc32c(0, &bytes),
            record_sequence: self.link.sequence,
            salt: salt(&self.root.uuid, sequence),
            ..self.root.clone()
        };
        let mut padded = bytes;
        padded.resize(padded.len().next_multiple_of(BLOCK_BYTES as usize), 0);
        let tables = root.table_offsets();
        let written = self.blocking.write_copies(&tables, &padded);
        written
            .and_then(|()| self.blocking.flush())
            .map_err(|errno| failed("writing the table", tables[0], errno))?;
        let roots = [0, 1].map(|copy| root_offset(sequence, copy));
        let written = self.blocking.write_copies(&roots, &root.encode());
        written
            .and_then(|()| self.blocking.flush())
            .map_err(|errno| failed("writing the root", roots[0], errno))?;
        std::mem::swap(&mut self.root, &mut root);
        self.link = first_link(&self.root);
        self.log_end = 0;
        self.unsettled = false;
        Ok(())
    }
}

fn first_link(root: &Root) -> Link {
    Link { salt: root.salt, sequence: root.record_sequence, previous: root.table_checksum }
}

fn failed(what: &str, offset: u64, errno: Errno) -> Error {
    Error::io(format!("{what} at byte {offset}"), errno.into())
}

/// Reads the pool and changes nothing.
///
/// # Errors
/// [`ErrorKind::Gone`]: there is no pool. [`ErrorKind::Unsupported`]: a newer version.
/// [`ErrorKind::Corrupt`]: damage that the second copies do not make good; the message names it.
pub(super) fn inspect(blocking: &mut Blocking, progress: &CheckProgress) -> Result<Inspection> {
    let mut findings = Vec::new();
    let mut repairs = Vec::new();
    let root = read_roots(blocking, &mut findings, &mut repairs)?;
    let name = root.name.clone();
    let context = move |error: Error| error.context(format!("pool {name}"));
    let size_bytes = blocking.geometry().size_bytes;
    if root.plan.device_bytes > size_bytes {
        let text = format!(
            "the device has {size_bytes} bytes but the pool was made for {}: it was cut short or \
             is another device",
            root.plan.device_bytes
        );
        return Err(context(Error::new(ErrorKind::Corrupt, text)));
    }
    let mut reader = Twins { blocking, progress, findings, repairs };
    let table = reader.table(&root).map_err(&context)?;
    let (table, log) = reader.log(&root, table).map_err(&context)?;
    table.check_whole(root.plan.entry_bytes_max()).map_err(&context)?;
    reader.later_log(&root).map_err(&context)?;
    let Twins { findings, repairs, .. } = reader;
    let link = log.next.expect("a scanned log has an end");
    Ok(Inspection { root, table, findings, link, log_end: log.end, repairs })
}

/// The newest valid root of the four blocks.
fn read_roots(
    blocking: &mut Blocking,
    findings: &mut Vec<Finding>,
    repairs: &mut Repairs,
) -> Result<Root> {
    let size_bytes = blocking.geometry().size_bytes;
    let mut blocks = Vec::new();
    for (slot, offsets) in ROOT_OFFSETS.iter().enumerate() {
        for offset in offsets.iter().filter(|offset| *offset + BLOCK_BYTES <= size_bytes) {
            let block = match blocking.read(*offset, BLOCK_BYTES as usize) {
                Ok(bytes) => Root::decode(&bytes),
                Err(_) => RootBlock::Damaged("cannot be read"),
            };
            if let RootBlock::Newer { version, features } = block {
                let text = format!(
                    "the pool has format version {version} (features {features:#x}), which this \
                     vflash does not know; nothing was changed: use a newer vflash"
                );
                return Err(Error::new(ErrorKind::Unsupported, text));
            }
            blocks.push((slot as u64, *offset, block));
        }
    }
    let valid = blocks.iter().filter_map(|(slot, offset, block)| match block {
        RootBlock::Valid(root) if root.sequence % 2 == *slot => Some((*offset, root)),
        _ => None,
    });
    let Some((_, newest)) = valid.max_by_key(|(_, root)| root.sequence) else {
        let damage = |(_, offset, block): &(u64, u64, RootBlock)| match block {
            RootBlock::Damaged(text) => Some(format!("byte {offset}: {text}")),
            _ => None,
        };
        let damages: Vec<String> = blocks.iter().filter_map(damage).collect();
        if damages.is_empty() {
            return Err(Error::new(ErrorKind::Gone, "there is no pool on the device"));
        }
        let text = format!("every root of the pool is damaged: {}", damages.join("; "));
        return Err(Error::new(ErrorKind::Corrupt, text));
    };
    let newest = (**newest).clone();
    for (slot, offset, block) in &blocks {
        let same = matches!(block, RootBlock::Valid(root) if **root == newest);
        if *slot == newest.sequence % 2 && !same {
            let text = format!("a copy of root {} is damaged or old", newest.sequence);
            findings.push(Finding { offset: *offset, text, repairable: true });
            repairs.push((*offset, newest.encode()));
        }
    }
    Ok(newest)
}

/// Bytes of one copy of the table, in whole blocks.
fn table_read_bytes(root: &Root) -> u64 {
    root.table_bytes.next_multiple_of(BLOCK_BYTES)
}

/// Reads what exists twice.
struct Twins<'a> {
    blocking: &'a mut Blocking,
    progress: &'a CheckProgress,
    findings: Vec<Finding>,
    repairs: Repairs,
}

impl Twins<'_> {
    /// `None`: it cannot be read.
    fn read(&mut self, offset: u64, length: u64) -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(length as usize);
        while (bytes.len() as u64) < length {
            let part = (length - bytes.len() as u64).min(READ_BYTES);
            let at = offset + bytes.len() as u64;
            bytes.extend(self.blocking.read(at, part as usize).ok()?);
            self.progress.add(part);
        }
        Some(bytes)
    }

    fn damaged(&mut self, offset: u64, text: String, good: Vec<u8>) {
        self.findings.push(Finding { offset, text, repairable: true });
        self.repairs.push((offset, good));
    }

    fn table(&mut self, root: &Root) -> Result<Table> {
        let metadata = root.plan.metadata()?;
        self.progress.begin(2 * (table_read_bytes(root) + root.plan.log_bytes));
        let offsets = root.table_offsets();
        let copies = offsets.map(|offset| {
            let bytes = self.read(offset, table_read_bytes(root))?;
            let checksum = crc32c(0, bytes.get(..root.table_bytes as usize)?);
            (checksum == root.table_checksum).then_some(bytes)
        });
        let good = match &copies {
            [Some(good), None] => {
                self.damaged(offsets[1], "a copy of the table is damaged".into(), good.clone());
                good
            }
            [None, Some(good)] => {
                self.damaged(offsets[0], "a copy of the table is damaged".into(), good.clone());
                good
            }
            [Some(good), Some(_)] => good,
            [None, None] => {
                let text = format!(
                    "the table is damaged in both copies, at bytes {} and {}; restore the device \
                     or format it anew",
                    offsets[0], offsets[1]
                );
                return Err(Error::new(ErrorKind::Corrupt, text));
            }
        };
        let bytes = good.get(..root.table_bytes as usize).unwrap_or_default();
        let shape = (root.plan.extents(), metadata);
        Table::decode(bytes, &root.uuid, root.sequence, shape)
            .map_err(|error| error.context(format!("the table at byte {}", offsets[0])))
    }

    fn log(&mut self, root: &Root, mut table: Table) -> Result<(Table, Log)> {
        let offsets = root.log_offsets();
        let copies = offsets.map(|offset| self.read(offset, root.plan.log_bytes));
        let mut log = record::scan(&copies, first_link(root))
            .map_err(|error| error.context(format!("the log at byte {}", offsets[0])))?;
        for (sequence, changes) in log.records.drain(..) {
            for change in &changes {
                table.apply(change, sequence).map_err(|error| {
                    error.context(format!("record {sequence} of the log at byte {}", offsets[0]))
                })?;
            }
        }
        for (copy, range) in log.damaged.drain(..) {
            let good = copies.get(1 - copy).and_then(Option::as_ref);
            let good = good.and_then(|bytes| bytes.get(range.clone())).unwrap_or_default();
            let offset = offsets[copy] + range.start as u64;
            self.damaged(offset, "a copy of a record is damaged".into(), good.to_vec());
        }
        Ok((table, log))
    }

    /// If the log of the next root holds a record, that root was durable and is lost: what was
    /// read is the past.
    fn later_log(&mut self, root: &Root) -> Result<()> {
        let later = Root { active: 1 - root.active, ..root.clone() };
        let salt = salt(&root.uuid, root.sequence + 1);
        for offset in later.log_offsets() {
            let Ok(block) = self.blocking.read(offset, BLOCK_BYTES as usize) else { continue };
            let mut reader = Reader::new(&block);
            if reader.array() == Some(*super::layout::RECORD_MAGIC) && reader.u64() == Some(salt) {
                let text = format!(
                    "root {} is damaged in both copies: its log at byte {offset} has records",
                    root.sequence + 1
                );
                return Err(Error::new(ErrorKind::Corrupt, text));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "media_test.rs"]
mod tests;
