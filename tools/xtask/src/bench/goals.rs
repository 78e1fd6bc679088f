//! What vflash is to reach in each cell, and whether it did.

use super::cells::{Cell, Medium, Peer, Sample, Samples};

pub(crate) type Value = fn(&Sample) -> f64;

pub(crate) const IOPS: Value = |sample| sample.iops;
pub(crate) const RATE: Value = |sample| sample.megabytes_per_second;
pub(crate) const P50: Value = |sample| sample.p50;
pub(crate) const P99: Value = |sample| sample.p99;
pub(crate) const CPU: Value = |sample| sample.cpu;

const MIB: f64 = (1 << 20) as f64;

/// vflashd with 100 front ends that do nothing.
pub(crate) struct Idle {
    /// Of one core.
    pub(crate) cpu_share: f64,
    pub(crate) resident_bytes: f64,
}

/// A bound, and what was reached.
pub(crate) struct Goal {
    /// The quantity and its bound.
    what: String,
    reached: f64,
    bound: f64,
    pub(crate) met: bool,
}

impl Goal {
    fn at_least(what: &str, reached: Option<f64>, bound: f64) -> Option<Self> {
        let reached = reached?;
        Some(Self { what: format!("{what} ≥ {bound}"), reached, bound, met: reached >= bound })
    }

    fn at_most(what: &str, reached: Option<f64>, bound: f64) -> Option<Self> {
        let reached = reached?;
        Some(Self { what: format!("{what} ≤ {bound}"), reached, bound, met: reached <= bound })
    }

    /// The bound and what was reached; a miss in bold type, with by how much.
    pub(crate) fn verdict(&self) -> String {
        let reached = format!("{:.*}", if self.reached < 100.0 { 2 } else { 0 }, self.reached);
        if self.met {
            return format!("{}: {reached}", self.what);
        }
        let percent = (self.reached / self.bound - 1.0).abs() * 100.0;
        format!("**{}: {reached}, missed by {percent:.0} %**", self.what)
    }
}

/// The goals of a cell. A ratio of two peers is the median of the rounds' ratios.
pub(crate) fn of_cell(cell: &Cell, samples: &Samples) -> Vec<Goal> {
    let ratio = |other, value| samples.ratio(cell, other, value);
    let ours = |value| samples.median(cell, Peer::Vflash, value);
    let mut goals = Vec::new();
    if cell.block_kib == 4 {
        goals.push(Goal::at_least("IOPS/qsd", ratio(Peer::Qsd, IOPS), 1.0));
    } else {
        let bound = if cell.is_write() { 1.35 } else { 1.15 };
        goals.push(Goal::at_least("MB/s / qsd", ratio(Peer::Qsd, RATE), bound));
    }
    match (cell.medium, cell.block_kib, cell.depth) {
        (Medium::Null, _, 1) if cell.poll => {
            goals.push(Goal::at_most("p50 µs", ours(P50), 3.0));
        }
        (Medium::Null, _, 32) if cell.poll => {
            goals.push(Goal::at_most("CPU µs", ours(CPU), 0.40));
            goals.push(Goal::at_least("M IOPS", ours(|sample| sample.iops / 1e6), 2.0));
        }
        (Medium::File, 4, 1) => {
            let more = samples.difference(cell, Peer::Raw, P50);
            goals.push(Goal::at_most("p50 − raw µs", more, 3.0));
        }
        (Medium::File, 4, depth) => {
            goals.push(Goal::at_least("IOPS/raw", ratio(Peer::Raw, IOPS), 0.98));
            if depth == 32 {
                goals.push(Goal::at_most("CPU/qsd", ratio(Peer::Qsd, CPU), 0.75));
                goals.push(Goal::at_most("CPU/raw", ratio(Peer::Raw, CPU), 1.0));
            }
        }
        _ => {}
    }
    goals.into_iter().flatten().collect()
}

/// The goals of an idle daemon.
pub(crate) fn of_idle(idle: &Idle) -> Vec<Goal> {
    let share = Goal::at_most("% of a core", Some(idle.cpu_share * 100.0), 0.5);
    let resident = Goal::at_most("MiB resident", Some(idle.resident_bytes / MIB), 64.0);
    [share, resident].into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::cells;

    fn verdicts(name: &str, samples: &[(Peer, Sample)]) -> Vec<String> {
        let cell = cells::all().into_iter().find(|cell| cell.name() == name);
        let cell = cell.expect("the cell exists");
        let mut all = Samples::default();
        for (peer, sample) in samples {
            all.add(&cell, *peer, *sample);
        }
        of_cell(&cell, &all).iter().map(Goal::verdict).collect()
    }

    #[test]
    fn a_missed_goal_says_by_how_much() {
        let sample = |iops, cpu| Sample { iops, cpu, ..Sample::default() };
        let samples = [
            (Peer::Raw, sample(100.0, 4.0)),
            (Peer::Qsd, sample(80.0, 8.0)),
            (Peer::Vflash, sample(90.0, 5.0)),
        ];
        let expected = [
            "IOPS/qsd ≥ 1: 1.12",
            "**IOPS/raw ≥ 0.98: 0.90, missed by 8 %**",
            "CPU/qsd ≤ 0.75: 0.62",
            "**CPU/raw ≤ 1: 1.25, missed by 25 %**",
        ];
        assert_eq!(verdicts("randread-4k-qd32-1q", &samples), expected);
    }

    #[test]
    fn latency_bandwidth_null_and_idle_have_goals_of_their_own() {
        let latency = |p50| Sample { p50, iops: 1.0, ..Sample::default() };
        let three = |raw, qsd, ours| [(Peer::Raw, raw), (Peer::Qsd, qsd), (Peer::Vflash, ours)];
        let found =
            verdicts("randread-4k-qd1-1q", &three(latency(50.0), latency(90.0), latency(54.0)));
        assert_eq!(found, ["IOPS/qsd ≥ 1: 1.00", "**p50 − raw µs ≤ 3: 4.00, missed by 33 %**"]);

        let rate = |megabytes_per_second| Sample { megabytes_per_second, ..Sample::default() };
        let rates = three(rate(0.0), rate(1000.0), rate(1200.0));
        assert_eq!(verdicts("read-128k-qd32-1q", &rates), ["MB/s / qsd ≥ 1.15: 1.20"]);
        let found = verdicts("write-128k-qd32-2q", &rates);
        assert_eq!(found, ["**MB/s / qsd ≥ 1.35: 1.20, missed by 11 %**"]);

        let null = |iops, cpu| Sample { iops, cpu, ..Sample::default() };
        let found = verdicts(
            "null-randread-4k-qd32-1q-poll",
            &[(Peer::Qsd, null(1e6, 0.5)), (Peer::Vflash, null(2.5e6, 0.5))],
        );
        let expected =
            ["IOPS/qsd ≥ 1: 2.50", "**CPU µs ≤ 0.4: 0.50, missed by 25 %**", "M IOPS ≥ 2: 2.50"];
        assert_eq!(found, expected);

        let goals = of_idle(&Idle { cpu_share: 0.01, resident_bytes: 32.0 * MIB });
        assert_eq!(goals.iter().map(|goal| goal.met).collect::<Vec<_>>(), [false, true]);
        assert_eq!(goals[0].verdict(), "**% of a core ≤ 0.5: 1.00, missed by 100 %**");
    }
}
