//! The slot tables at opening: which slabs there are, and whether they may be trusted.

#![deny(clippy::unwrap_used, clippy::indexing_slicing)]

use super::slabs::table_pages;
use super::table::{self, TableEntry};
use crate::base::planted::{Bug, planted};
use crate::cache::layout::{BLOCK_BYTES, Shape};
use crate::cache::medium::Medium;
use crate::cache::scan::{Scan, Verdict};
use crate::io::disk::Errno;
use std::collections::BTreeSet;

/// Segments whose tables are read at a time.
const GROUP: usize = 64;

/// Ends the tables of segments that the log took just before the power went: they would count again
/// when the log is past them.
pub(in crate::cache) fn end_others(medium: &mut Medium, scan: &Scan) -> Result<(), Errno> {
    let root = &scan.root;
    let log: Vec<u32> = scan.segments.iter().map(|segment| segment.index).collect();
    for group in log.chunks(GROUP) {
        let ranges = page_ranges(root.shape, group, 0);
        for (segment, bytes) in group.iter().zip(medium.read_many(&ranges)) {
            let Ok(bytes) = bytes else { continue };
            if table::decode(&bytes, (Some(root.slab_epoch), *segment, 0), root.secret).is_some() {
                medium.wipe(root.shape.table_offset(*segment, 0))?;
            }
        }
    }
    Ok(())
}

fn page_ranges(shape: Shape, segments: &[u32], page: u32) -> Vec<(u64, usize)> {
    let range = |segment: &u32| (shape.table_offset(*segment, page), BLOCK_BYTES as usize);
    segments.iter().map(range).collect()
}

/// A slab as its table says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadedSlab {
    pub segment: u32,
    pub life: u64,
    /// By slot.
    pub entries: Vec<TableEntry>,
}

/// The slabs that may be trusted; if none may, no table counts any more from the next root on.
/// `trusted`: the backing is as the log has it. `golden`: nobody writes it.
pub(in crate::cache) fn trusted(
    medium: &mut Medium,
    scan: &mut Scan,
    (trusted, golden): (bool, bool),
) -> Vec<LoadedSlab> {
    if trusted && scan.root.mode.tells_all(golden) && is_covered(scan) {
        return load(medium, scan);
    }
    scan.root.slab_epoch += 1;
    Vec::new()
}

/// Whether the log that was found tells everything that the tables do not know.
fn is_covered(scan: &Scan) -> bool {
    let first = scan.segments.first().map(|segment| segment.header.first_won);
    let first = first.unwrap_or(scan.last_won.saturating_add(1));
    first <= scan.root.slabs_through.saturating_add(1) && scan.verdict == Verdict::Ends
}

/// Reads the tables of all segments that are not the log's.
fn load(medium: &mut Medium, scan: &Scan) -> Vec<LoadedSlab> {
    let root = &scan.root;
    let shape = root.shape;
    let epoch = if planted(Bug::OtherEpoch) { None } else { Some(root.slab_epoch) };
    let log: BTreeSet<u32> = scan.segments.iter().map(|segment| segment.index).collect();
    let others: Vec<u32> =
        (0..shape.segments() as u32).filter(|index| !log.contains(index)).collect();
    let mut slabs: Vec<LoadedSlab> = Vec::new();
    let blocks = root.backing.size_bytes / BLOCK_BYTES;
    for page in 0..table_pages(shape) {
        // The first page says what is a slab.
        let wanted: Vec<u32> = match page {
            0 => others.clone(),
            _ => slabs.iter().map(|slab| slab.segment).collect(),
        };
        for group in wanted.chunks(GROUP) {
            let ranges = page_ranges(shape, group, page);
            for (segment, bytes) in group.iter().zip(medium.read_many(&ranges)) {
                let Ok(bytes) = bytes else { continue };
                let found = table::decode(&bytes, (epoch, *segment, page), root.secret);
                let Some((life, mut entries)) = found.filter(|(life, _)| *life > 0) else {
                    continue;
                };
                entries.retain(|entry| entry.block < blocks);
                if page == 0 {
                    slabs.push(LoadedSlab { segment: *segment, life, entries });
                } else if let Ok(at) = slabs.binary_search_by_key(segment, |slab| slab.segment)
                    && let Some(slab) = slabs.get_mut(at)
                    && slab.life == life
                {
                    slab.entries.append(&mut entries);
                }
            }
        }
    }
    slabs
}
