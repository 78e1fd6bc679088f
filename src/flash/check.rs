//! The check: every invariant anew, from the runs alone, trusting none of the derived sets.

use super::extents::{ExtentRange, ExtentSet};
use super::store::{Finding, inspect};
use super::table::Table;
use crate::base::units::EXTENT_BYTES;
use crate::base::{ErrorKind, Result};
use crate::io::blocking::Blocking;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Empty: the pool is sound.
    pub findings: Vec<Finding>,
    pub allocations: usize,
    pub extents_mapped: u64,
    pub extents_unscrubbed: u64,
    pub extents_clean: u64,
    pub extents_metadata: u64,
}

/// How far a check has come: written by who checks, read by anyone. The work is reading metadata;
/// comparing it takes no time beside that.
#[derive(Debug, Default)]
pub struct CheckProgress {
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
}

impl CheckProgress {
    /// Bytes read, and to be read in all; none while nothing is checked.
    pub fn bytes(&self) -> Option<(u64, u64)> {
        let total = self.total_bytes.load(Ordering::Relaxed);
        (total > 0).then(|| (self.done_bytes.load(Ordering::Relaxed).min(total), total))
    }

    pub(super) fn begin(&self, total_bytes: u64) {
        self.done_bytes.store(0, Ordering::Relaxed);
        self.total_bytes.store(total_bytes, Ordering::Relaxed);
    }

    pub(super) fn add(&self, bytes: u64) {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn end(&self) {
        self.begin(0);
    }
}

impl CheckReport {
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }

    fn finding(&mut self, offset: u64, text: String) {
        self.findings.push(Finding { offset, text, repairable: false });
    }
}

/// Checks what is on flash; `memory` is what it must be if the pool is open.
///
/// # Errors
/// There is nothing to check: no pool, or one of a newer version, where none is known to be.
pub(super) fn check(
    blocking: &mut Blocking,
    memory: Option<&Table>,
    progress: &CheckProgress,
) -> Result<CheckReport> {
    let report = compare(blocking, memory, progress);
    progress.end();
    report
}

fn compare(
    blocking: &mut Blocking,
    memory: Option<&Table>,
    progress: &CheckProgress,
) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let inspection = match inspect(blocking, progress) {
        Ok(inspection) => inspection,
        // An open pool that is none any more is damaged.
        Err(error) if error.kind() == ErrorKind::Corrupt || memory.is_some() => {
            report.finding(0, error.to_string());
            return Ok(report);
        }
        Err(error) => return Err(error),
    };
    report.findings = inspection.findings;
    let table = &inspection.table;
    if memory.is_some_and(|memory| memory != table) {
        report.finding(0, "the table in memory and the one on flash differ".to_owned());
    }
    verify(table, &mut report);
    let entry_bytes_max = inspection.root.plan.entry_bytes_max();
    if table.entry_bytes > entry_bytes_max {
        let text = format!("entries take {} bytes of {entry_bytes_max} (T5)", table.entry_bytes);
        report.finding(inspection.root.table_offsets()[0], text);
    }
    Ok(report)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    Nobody,
    Metadata,
    Allocation(u64),
    Unscrubbed,
    Clean,
}

/// T1 by marking every extent with its owner, T3 and T4 by walking the allocations.
fn verify(table: &Table, report: &mut CheckReport) {
    let mut owners = vec![Owner::Nobody; table.extents as usize];
    let mut claim = |range: ExtentRange, owner: Owner, report: &mut CheckReport| {
        for extent in range.start..range.end() {
            match owners.get_mut(extent as usize) {
                None => {
                    let text = format!("extent {extent} lies beyond the device (T1)");
                    report.finding(extent * EXTENT_BYTES, text);
                }
                Some(Owner::Nobody) => owners[extent as usize] = owner,
                Some(_) => {
                    let text = format!("extent {extent} has two owners (T1)");
                    report.finding(extent * EXTENT_BYTES, text);
                }
            }
        }
    };
    let sets: [(&ExtentSet, Owner); 3] = [
        (&table.metadata, Owner::Metadata),
        (&table.unscrubbed, Owner::Unscrubbed),
        (&table.clean, Owner::Clean),
    ];
    for (set, owner) in sets {
        set.iter().for_each(|range| claim(range, owner, report));
    }
    let mut names = BTreeSet::new();
    for allocation in table.allocations.values() {
        let id = allocation.id.0;
        if !names.insert(&allocation.name) || id >= table.next_id {
            report.finding(0, format!("name or id of allocation {id} is not its own (T3)"));
        }
        let mut end = 0;
        let mut mapped = 0;
        for run in allocation.runs() {
            if run.logical < end || run.logical().end() > allocation.extents() {
                let text = format!("allocation {id} maps extent {} wrongly (T4)", run.logical);
                report.finding(run.physical * EXTENT_BYTES, text);
            }
            end = run.logical().end();
            mapped += run.count;
            claim(run.physical(), Owner::Allocation(id), report);
        }
        let thick_hole = !allocation.thin && mapped != allocation.extents();
        if thick_hole || mapped * EXTENT_BYTES != allocation.mapped_bytes() {
            let text = format!("allocation {id} maps {mapped} extents, not what it says (T4)");
            report.finding(0, text);
        }
        report.extents_mapped += mapped;
    }
    for (extent, owner) in owners.iter().enumerate() {
        if *owner == Owner::Nobody {
            let text = format!("extent {extent} belongs to nobody (T1)");
            report.finding(extent as u64 * EXTENT_BYTES, text);
        }
    }
    report.allocations = table.allocations.len();
    report.extents_unscrubbed = table.unscrubbed.total();
    report.extents_clean = table.clean.total();
    report.extents_metadata = table.metadata.total();
}
