//! What was measured, as markdown for the README.

use super::cells::{Cell, Peer, Samples};
use super::goals::{self, CPU, Goal, IOPS, Idle, P50, P99, RATE, Value};
use super::pages::Pages;

const COLUMNS: &str = "\
| cell | peer | rate (least–most) | ÷ raw | ÷ qsd | p50 µs | p99 µs | CPU µs/IO | goals |
|---|---|--:|--:|--:|--:|--:|--:|---|
";

const LEGEND: &str = "\
Cells: pattern, block, queue depth per queue, queues; `null`: no drive at all; `poll`: the client
watches the rings instead of sleeping on eventfds. Server on core 1, client on core 0; `raw` is fio
itself, with one job per queue. Medians over the rounds; ratios are medians of the rounds' ratios.
CPU is the server's, for raw fio's own.
";

/// What was the same for all cells.
pub(crate) struct Setting {
    pub(crate) pages: Pages,
    /// What waking a core takes, in words.
    pub(crate) wake_ups: String,
    /// The share of both cores that other work took.
    pub(crate) others: f64,
}

/// Other work beyond this share makes figures worth little.
const OTHERS_MAX: f64 = 0.1;

/// Everything, and at the end how many goals are met.
pub(crate) fn render(
    cells: &[Cell],
    samples: &Samples,
    idle: Option<&Idle>,
    setting: Setting,
) -> String {
    let (machine, pages, percent) = (machine(), setting.pages.describe(), setting.others * 100.0);
    let wake_ups = &setting.wake_ups;
    let mut text = format!(
        "Machine: {machine}. {pages}. {wake_ups}. Other processes, interrupts and the hypervisor \
         took {percent:.0} % of the two cores{}.\n\n{LEGEND}\n{COLUMNS}",
        if setting.others > OTHERS_MAX { ": **the figures are disturbed**" } else { "" }
    );
    let mut all = Vec::new();
    for cell in cells {
        let goals = goals::of_cell(cell, samples);
        let mut peers = cell.peers(0, samples.has(cell, Peer::Pinned));
        peers.sort();
        for peer in peers {
            text += &row(cell, peer, samples, &goals);
        }
        all.extend(goals);
    }
    if let Some(idle) = idle {
        let goals = goals::of_idle(idle);
        let verdicts = goals.iter().map(Goal::verdict).collect::<Vec<_>>().join("; ");
        text += &format!("\nvflashd with 100 idle front ends: {verdicts}.\n");
        all.extend(goals);
    }
    let hung = samples.hung();
    if hung > 0 {
        text += &format!("\nIn {hung} measurements nothing completed for 2 s at least once.\n");
    }
    let met = all.iter().filter(|goal| goal.met).count();
    text += &format!("\nGoals: {met} met, {} missed.\n", all.len() - met);
    text
}

fn row(cell: &Cell, peer: Peer, samples: &Samples, goals: &[Goal]) -> String {
    let value = |value| samples.median(cell, peer, value).unwrap_or(f64::NAN);
    let (rate_of, unit, digits): (Value, &str, usize) = match cell.block_kib {
        4 => (|sample| sample.iops / 1e3, "k", 1),
        _ => (RATE, " MB/s", 0),
    };
    let (least, most) = samples.range(cell, peer, rate_of);
    let rate = value(rate_of);
    let (mut to_raw, mut to_qsd, mut notes) = (String::new(), String::new(), String::new());
    if matches!(peer, Peer::Vflash | Peer::Pinned) {
        let ratio = |other, value| {
            let ratio = samples.ratio_of(cell, (peer, other), value);
            ratio.map_or(String::new(), |ratio| format!("{ratio:.2}"))
        };
        (to_raw, to_qsd) = (ratio(Peer::Raw, IOPS), ratio(Peer::Qsd, IOPS));
        notes = match peer {
            Peer::Vflash => goals.iter().map(Goal::verdict).collect::<Vec<_>>().join("; "),
            _ => format!(
                "rate {}, CPU {} of vflash's",
                ratio(Peer::Vflash, IOPS),
                ratio(Peer::Vflash, CPU)
            ),
        };
    }
    let (p50, p99, cpu) = (value(P50), value(P99), value(CPU));
    let (name, peer) = (cell.name(), peer.name());
    format!(
        "| {name} | {peer} | {rate:.digits$}{unit} ({least:.digits$}–{most:.digits$}) | {to_raw} \
         | {to_qsd} | {p50:.1} | {p99:.1} | {cpu:.2} | {notes} |\n"
    )
}

/// The machine's class: cores, processor, kernel. Never a name or a path.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let processors = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = processors
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("unknown processor", |rest| rest.trim_start_matches([' ', '\t', ':']));
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let kernel: Vec<&str> = release.trim().split(['.', '-']).take(2).collect();
    let virtual_machine = if processors.contains("hypervisor") { "virtual machine, " } else { "" };
    format!("{virtual_machine}{cores} cores, {model}, Linux {}", kernel.join("."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::cells::{self, Sample};

    #[test]
    fn a_table_has_medians_ranges_ratios_and_counted_goals() {
        let cell = cells::all().into_iter().find(|cell| cell.name() == "randread-4k-qd128-1q");
        let cell = cell.expect("the cell exists");
        let mut samples = Samples::default();
        let sample = |iops| Sample { iops, p50: 7.0, p99: 9.0, cpu: 2.0, ..Sample::default() };
        for (raw, qsd, ours) in [(100e3, 80e3, 90e3), (100e3, 90e3, 99e3), (50e3, 60e3, 45e3)] {
            samples.add(&cell, Peer::Raw, sample(raw));
            samples.add(&cell, Peer::Qsd, sample(qsd));
            samples.add(&cell, Peer::Vflash, sample(ours));
        }
        let idle = Idle { cpu_share: 0.001, resident_bytes: 1e6 };
        let wake_ups = "Waking a core takes 5 µs".to_owned();
        let quiet = Setting { pages: Pages::Small, others: 0.05, wake_ups: wake_ups.clone() };
        let text = render(&[cell], &samples, Some(&idle), quiet);
        assert!(text.contains("took 5 % of the two cores.\n"), "{text}");
        let row = "| randread-4k-qd128-1q | vflash | 90.0k (45.0–99.0) | 0.90 | 1.10 | 7.0 | 9.0 \
                   | 2.00 | IOPS/qsd ≥ 1: 1.10; **IOPS/raw ≥ 0.98: 0.90, missed by 8 %** |";
        assert!(text.contains(row), "{text}");
        assert!(text.contains("| raw file (fio) | 100.0k (50.0–100.0) |  |  | 7.0"), "{text}");
        assert!(text.contains("% of a core ≤ 0.5: 0.10; MiB resident"), "{text}");
        assert!(text.ends_with("Goals: 3 met, 1 missed.\n"), "{text}");
        assert!(!text.contains("nothing completed"), "{text}");

        samples.add(&cell, Peer::Qsd, Sample { hung: true, ..sample(1.0) });
        let busy = Setting { pages: Pages::Huge, others: 0.4, wake_ups };
        let text = render(&[cell], &samples, None, busy);
        assert!(text.contains("40 % of the two cores: **the figures are disturbed**"), "{text}");
        assert!(text.contains("In 1 measurements nothing completed for 2 s"), "{text}");
    }

    #[test]
    fn the_machine_is_described_by_its_class() {
        let text = machine();
        assert!(text.contains(" cores, ") && text.contains(", Linux "), "{text}");
        assert!(!text.contains('/'), "{text}");
    }
}
