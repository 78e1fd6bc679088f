//! What is measured: cells, peers and samples.

use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Medium {
    /// A file of 4 GiB, fully written, with O_DIRECT.
    File,
    /// No medium at all: the cost of our path alone.
    Null,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Peer {
    /// fio with io_uring on the file itself.
    Raw,
    /// qemu-storage-daemon's vhost-user-blk export.
    Qsd,
    Vflash,
    /// vflash with the guest's memory pinned.
    Pinned,
}

impl Peer {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw file (fio)",
            Self::Qsd => "qemu-storage-daemon",
            Self::Vflash => "vflash",
            Self::Pinned => "vflash, pinMemory",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Cell {
    pub(crate) medium: Medium,
    /// As fio and vflash-bench call it.
    pub(crate) pattern: &'static str,
    pub(crate) block_kib: u32,
    /// Per queue.
    pub(crate) depth: u32,
    pub(crate) queues: u32,
    /// The client polls instead of sleeping on eventfds.
    pub(crate) poll: bool,
}

impl Cell {
    pub(crate) fn name(&self) -> String {
        let medium = if self.medium == Medium::Null { "null-" } else { "" };
        let poll = if self.poll { "-poll" } else { "" };
        let Self { pattern, block_kib, depth, queues, .. } = self;
        format!("{medium}{pattern}-{block_kib}k-qd{depth}-{queues}q{poll}")
    }

    pub(crate) fn is_write(&self) -> bool {
        self.pattern.contains("write")
    }

    /// Who takes part, in the order of this round. Nothing is pinned for no medium.
    pub(crate) fn peers(&self, round: u32, pinned: bool) -> Vec<Peer> {
        let mut peers = match self.medium {
            Medium::File => vec![Peer::Raw, Peer::Qsd, Peer::Vflash],
            Medium::Null => vec![Peer::Qsd, Peer::Vflash],
        };
        if pinned && self.medium == Medium::File {
            peers.push(Peer::Pinned);
        }
        let by = round as usize % peers.len();
        peers.rotate_left(by);
        peers
    }
}

/// Every cell, in the order of the tables.
pub(crate) fn all() -> Vec<Cell> {
    let mut cells = Vec::new();
    let file = |pattern, block_kib, depth, queues| Cell {
        medium: Medium::File,
        pattern,
        block_kib,
        depth,
        queues,
        poll: false,
    };
    for queues in [1, 2] {
        for pattern in ["randread", "randwrite"] {
            for depth in [1, 32, 128] {
                cells.push(file(pattern, 4, depth, queues));
            }
        }
        cells.push(file("read", 128, 32, queues));
        cells.push(file("write", 128, 32, queues));
    }
    for poll in [true, false] {
        for depth in [1, 32, 128] {
            cells.push(Cell { medium: Medium::Null, poll, ..file("randread", 4, depth, 1) });
        }
        cells.push(Cell { medium: Medium::Null, poll, ..file("randwrite", 4, 32, 1) });
    }
    cells
}

/// One measurement. Latencies and CPU time per operation in µs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sample {
    pub(crate) iops: f64,
    pub(crate) megabytes_per_second: f64,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) cpu: f64,
    /// At least once nothing completed for 2 s.
    pub(crate) hung: bool,
}

/// All measurements, by cell and peer, in the order of the rounds.
#[derive(Default)]
pub(crate) struct Samples {
    by_place: BTreeMap<(Cell, Peer), Vec<Sample>>,
}

impl Samples {
    pub(crate) fn add(&mut self, cell: &Cell, peer: Peer, sample: Sample) {
        self.by_place.entry((*cell, peer)).or_default().push(sample);
    }

    fn of(&self, cell: &Cell, peer: Peer) -> &[Sample] {
        self.by_place.get(&(*cell, peer)).map_or(&[], Vec::as_slice)
    }

    /// Whether there is any.
    pub(crate) fn has(&self, cell: &Cell, peer: Peer) -> bool {
        !self.of(cell, peer).is_empty()
    }

    /// Measurements that hung.
    pub(crate) fn hung(&self) -> usize {
        self.by_place.values().flatten().filter(|sample| sample.hung).count()
    }

    /// The least and the most over the rounds.
    pub(crate) fn range(&self, cell: &Cell, peer: Peer, value: fn(&Sample) -> f64) -> (f64, f64) {
        let values = self.of(cell, peer).iter().map(value);
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), value| {
            (least.min(value), most.max(value))
        })
    }

    /// The median over the rounds.
    pub(crate) fn median(&self, cell: &Cell, peer: Peer, value: fn(&Sample) -> f64) -> Option<f64> {
        median(self.of(cell, peer).iter().map(value).collect())
    }

    /// The median over the rounds of vflash's value to the other's in the same round.
    pub(crate) fn ratio(&self, cell: &Cell, other: Peer, value: fn(&Sample) -> f64) -> Option<f64> {
        self.ratio_of(cell, (Peer::Vflash, other), value)
    }

    /// The median over the rounds of the one's value to the other's in the same round.
    pub(crate) fn ratio_of(
        &self,
        cell: &Cell,
        (one, other): (Peer, Peer),
        value: fn(&Sample) -> f64,
    ) -> Option<f64> {
        let (ones, others) = (self.of(cell, one).iter(), self.of(cell, other).iter());
        median(ones.zip(others).map(|(one, other)| value(one) / value(other)).collect())
    }

    /// The median over the rounds of vflash's value less the other's in the same round.
    pub(crate) fn difference(
        &self,
        cell: &Cell,
        other: Peer,
        value: fn(&Sample) -> f64,
    ) -> Option<f64> {
        let ours = self.of(cell, Peer::Vflash).iter();
        let theirs = self.of(cell, other).iter();
        median(ours.zip(theirs).map(|(ours, theirs)| value(ours) - value(theirs)).collect())
    }
}

/// Of an even number the middle of the two in the middle; `None` of none.
pub(super) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_ratios_compare_rounds_with_themselves() {
        let cell = all()[0];
        let mut samples = Samples::default();
        for (raw, ours) in [(100.0, 90.0), (10.0, 20.0), (50.0, 50.0)] {
            samples.add(&cell, Peer::Raw, Sample { iops: raw, ..Sample::default() });
            samples.add(&cell, Peer::Vflash, Sample { iops: ours, ..Sample::default() });
        }
        assert_eq!(samples.ratio(&cell, Peer::Raw, |sample| sample.iops), Some(1.0));
        assert_eq!(samples.median(&cell, Peer::Raw, |sample| sample.iops), Some(50.0));
        assert_eq!(samples.difference(&cell, Peer::Raw, |sample| sample.iops), Some(0.0));
        assert_eq!(samples.ratio(&cell, Peer::Qsd, |sample| sample.iops), None);
    }

    #[test]
    fn names_are_unique_and_every_peer_leads_once() {
        let cells = all();
        let mut names: Vec<String> = cells.iter().map(Cell::name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), cells.len());
        let leaders: Vec<Peer> = (0..4).map(|round| cells[0].peers(round, true)[0]).collect();
        assert_eq!(leaders, [Peer::Raw, Peer::Qsd, Peer::Vflash, Peer::Pinned]);
    }
}
