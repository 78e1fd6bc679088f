//! Looking at a cache that nobody serves: is it whole, and what is in it. Changes nothing.

use super::layout::BLOCK_BYTES;
use super::medium::Medium;
use super::record::{Batch, Kind, RecordOrigin, piece_checksum};
use super::scan::{Scan, ScannedSegment, Verdict, last_won, scan};
use crate::base::Result;
use crate::base::units::SECTOR_BYTES;

/// What a finding means for the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Costs time at the next opening, or a copy that is there twice.
    Harmless,
    /// Data that the backing has too.
    Drained,
    /// Acknowledged data that is nowhere else.
    Lost,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub severity: Severity,
    /// Byte of the allocation.
    pub offset: u64,
    /// What it is, and what to do.
    pub text: String,
}

/// What a check found.
#[derive(Clone, Debug)]
pub struct CacheReport {
    pub findings: Vec<Finding>,
    pub verdict: Verdict,
    pub segments: u64,
    pub batches: u64,
    pub records: u64,
    /// The newest point, and the one that the backing has.
    pub last_won: u64,
    pub drained_through: u64,
    /// Bytes of log that are not drained.
    pub dirty_bytes: u64,
    /// Detached cleanly.
    pub clean: bool,
}

impl CacheReport {
    /// The worst that was found.
    pub fn worst(&self) -> Option<Severity> {
        self.findings.iter().map(|finding| finding.severity).max()
    }
}

/// One record of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DumpedRecord {
    /// For a mark: the point that it names.
    pub won: u64,
    pub epoch: u64,
    /// A guest FLUSH lies before it.
    pub edge: bool,
    pub kind: Kind,
    /// Sectors of the disk.
    pub start: u64,
    pub count: u64,
    pub origin: RecordOrigin,
    /// Sequence of its segment and batch.
    pub segment: u64,
    pub batch: u64,
    /// Byte of the allocation where its data begins, or its batch if it has none.
    pub position: u64,
    /// Its data matches its checksums.
    pub right: bool,
    pub drained: bool,
    /// Of a mark.
    pub name: Option<String>,
}

/// Checks everything that the cache holds, every byte of data included.
///
/// # Errors
/// As [`super::scan::scan`]: there is no cache that could be checked.
pub fn check(medium: &mut Medium) -> Result<CacheReport> {
    let scan = scan(medium, usize::MAX)?;
    let mut report = CacheReport {
        findings: Vec::new(),
        verdict: scan.verdict,
        segments: scan.segments.len() as u64,
        batches: 0,
        records: 0,
        last_won: scan.last_won.max(scan.drained_through),
        drained_through: scan.drained_through,
        dirty_bytes: 0,
        clean: scan.root.clean,
    };
    for (offset, what) in &scan.damaged_roots {
        let text =
            format!("a copy of the root is damaged ({what}); the next opening writes it again");
        report.find(Severity::Harmless, *offset, text);
    }
    if let Verdict::Corrupt { last_good } = scan.verdict {
        let offset = scan.segments.last().map_or(0, |segment| {
            let end = segment.batches.last().map_or(BLOCK_BYTES, |batch| {
                u64::from(batch.position) + u64::from(batch.header.batch_bytes)
            });
            scan.root.shape.segment_offset(segment.index) + end
        });
        let text = format!(
            "acknowledged writes behind point {last_good} are missing: drain to it, or detach the \
             disk as lost"
        );
        report.find(Severity::Lost, offset, text);
    }
    let newest = scan.segments.len().saturating_sub(1);
    for (number, segment) in scan.segments.iter().enumerate() {
        let offset = scan.root.shape.segment_offset(segment.index);
        if segment.unreadable {
            let text = "sectors of the segment cannot be read".to_owned();
            report.find(Severity::Harmless, offset, text);
        }
        if !segment.summarised && number < newest {
            let text = "the segment has no summary; opening reads all of it".to_owned();
            report.find(Severity::Harmless, offset, text);
        }
        visit(medium, &scan, segment, |record| {
            report.records += 1;
            if !record.right {
                report.wrong(&record);
            }
        });
        report.batches += segment.batches.len() as u64;
        let dirty = segment
            .batches
            .iter()
            .filter(|batch| last_won(&batch.header) > scan.drained_through)
            .map(|batch| u64::from(batch.header.batch_bytes));
        report.dirty_bytes += dirty.sum::<u64>();
    }
    Ok(report)
}

impl CacheReport {
    fn find(&mut self, severity: Severity, offset: u64, text: String) {
        self.findings.push(Finding { severity, offset, text });
    }

    fn wrong(&mut self, record: &DumpedRecord) {
        let (severity, advice) = match record.drained {
            true => (Severity::Drained, "the backing has it; a read drops the copy"),
            false => (Severity::Lost, "drain to the point before it, or detach the disk as lost"),
        };
        let text = format!(
            "the data of write {} (sectors {} to {}) does not match its checksum: {advice}",
            record.won,
            record.start,
            (record.start + record.count).saturating_sub(1)
        );
        self.find(severity, record.position, text);
    }
}

/// Every record that counts, in the log's order.
///
/// # Errors
/// As [`super::scan::scan`].
pub fn dump(medium: &mut Medium, mut each: impl FnMut(DumpedRecord)) -> Result<()> {
    let scan = scan(medium, usize::MAX)?;
    for segment in &scan.segments {
        visit(medium, &scan, segment, &mut each);
    }
    Ok(())
}

/// The segment's records, their data read and checked.
fn visit(
    medium: &mut Medium,
    scan: &Scan,
    segment: &ScannedSegment,
    mut each: impl FnMut(DumpedRecord),
) {
    let start = scan.root.shape.segment_offset(segment.index);
    for batch in &segment.batches {
        let base = start + u64::from(batch.position);
        let Ok(decoded) = Batch::decode(&batch.bytes, segment.header.salt) else { continue };
        let data = medium.read(base, batch.header.batch_bytes as usize).unwrap_or_default();
        for entry in decoded.entries() {
            let right = entry.pieces().all(|piece| {
                let from = piece.data as usize;
                let length = usize::from(piece.count) * SECTOR_BYTES as usize;
                data.get(from..from + length).map(piece_checksum) == Some(piece.checksum)
            });
            let name = String::from_utf8_lossy(entry.name).into_owned();
            let record = DumpedRecord {
                won: entry.won,
                epoch: entry.epoch,
                edge: entry.edge,
                kind: entry.kind,
                start: entry.start,
                count: entry.count,
                origin: entry.origin,
                segment: segment.header.sequence,
                batch: batch.header.sequence,
                position: base + u64::from(entry.data.unwrap_or(0)),
                right,
                drained: entry.won <= scan.drained_through,
                name: (entry.kind == Kind::Mark).then_some(name),
            };
            each(record);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::units::KIB;
    use crate::cache::disk::tests::{Rig, again, medium, options, shape};
    use crate::io::volume::{Outcome, RequestKind};

    fn used() -> Rig {
        let mut rig = Rig::new(shape(6, 64 * KIB), options());
        rig.write(63, 9);
        rig.drain();
        assert_eq!(rig.reactor.flush(), Outcome::Done);
        rig.write(7, 2);
        rig.zero(RequestKind::Discard, &[(100, 50), (300, 8)]);
        rig
    }

    #[test]
    fn a_dump_shows_every_record_and_where_it_is() {
        let rig = used();
        let mut records = Vec::new();
        dump(&mut medium(&rig.flash), |record| records.push(record)).expect("a log");
        let seen: Vec<_> = records
            .iter()
            .map(|record| (record.won, record.kind, record.start, record.count, record.drained))
            .collect();
        let expected = [
            (1, Kind::Write, 63, 9, true),
            (2, Kind::Write, 7, 2, false),
            (3, Kind::Discard, 100, 50, false),
            (3, Kind::Discard, 300, 8, false),
        ];
        assert_eq!(seen, expected);
        assert!(records.iter().all(|record| record.right));
        assert_eq!(records[1].epoch, records[0].epoch + 1, "a FLUSH lies between");
        assert!(records[1].edge);
        let data = rig.flash.peek(records[0].position, 9 * 512);
        assert_eq!(data, rig.truth[63 * 512..72 * 512]);
    }

    #[test]
    fn a_check_tells_harmless_damage_from_loss() {
        let rig = used();
        let report = check(&mut medium(&rig.flash)).expect("a log");
        assert_eq!((report.worst(), report.records), (None, 4));
        assert_eq!((report.last_won, report.drained_through), (3, 1));
        assert!(report.dirty_bytes > 0 && !report.clean);
        let mut records = Vec::new();
        dump(&mut medium(&rig.flash), |record| records.push(record)).expect("a log");
        let mut found = Vec::new();
        for offset in [64 * KIB + 20, records[0].position, records[1].position] {
            let flash = again(&rig.flash);
            flash.poke(offset, &[0xee; 8]);
            let report = check(&mut medium(&flash)).expect("a log");
            found.push(report.worst());
            assert_eq!(report.findings.len(), 1, "{:?}", report.findings);
        }
        let expected = [Severity::Harmless, Severity::Drained, Severity::Lost];
        assert_eq!(found, expected.map(Some));
    }
}
