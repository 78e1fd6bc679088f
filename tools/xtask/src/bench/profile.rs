//! `cargo xtask bench --profile CELL`: what limits a cell. For each peer what one operation costs
//! the machine, core by core, and where the cores spend their time.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vflash_guest::process::die_with_parent;

use super::cells::{Cell, Peer};
use super::peers::Peers;

/// What is counted, as perf names it and as the table does.
const EVENTS: [(&str, &str); 8] = [
    ("raw_syscalls:sys_enter", "system calls"),
    ("syscalls:sys_enter_io_uring_enter", "io_uring_enter"),
    ("context-switches", "switches"),
    ("sched:sched_wakeup", "wake-ups"),
    ("irq_vectors:reschedule_entry", "reschedule IPIs"),
    ("irq_vectors:call_function_single_entry", "call IPIs"),
    ("irq:irq_handler_entry", "interrupts"),
    ("block:block_rq_issue", "drive requests"),
];

/// The client's and the server's; fio has both to itself.
const CORES: [(&str, &str); 2] = [("cpu0", "client"), ("cpu1", "server")];

/// After the start of a client: the time that does not count, and some for its first steps.
const RAMP: Duration = Duration::from_millis(700);

/// Lines of a profile.
const LINES: usize = 14;

/// Needs a second of load at the least.
const SECONDS_MIN: f64 = 1.5;

/// Time of one core in ticks: user and nice, system, interrupts and steal, idle.
type Ticks = [u64; 4];

/// Measures each cell twice for each peer, once to count and once to sample.
pub(crate) fn run(peers: &Peers, cells: &[Cell], seconds: f64, data: &Path) -> Result<String> {
    crate::packages::need(crate::packages::PROFILE)?;
    let file = data.join("perf.data");
    let texts = cells.iter().map(|cell| of_cell(peers, cell, seconds.max(SECONDS_MIN), &file));
    Ok(texts.collect::<Result<Vec<_>>>()?.join("\n"))
}

fn of_cell(peers: &Peers, cell: &Cell, seconds: f64, file: &Path) -> Result<String> {
    let window = (Duration::from_secs_f64(seconds) - RAMP / 2).as_secs_f64().to_string();
    let mut table = String::from("| peer | rate | core | user | system | irq | idle |");
    EVENTS.iter().for_each(|(_, name)| table += &format!(" {name} |"));
    table += "\n|---|--:|---|--:|--:|--:|--:|";
    EVENTS.iter().for_each(|_| table += "--:|");
    table.push('\n');
    let mut profiles = String::new();
    for peer in cell.peers(0, false) {
        let look = || count(&window).context("perf stat");
        let (iops, (counts, ticks)) = beside(peers, cell, (peer, seconds), look)?;
        for (core, (_, role)) in CORES.iter().enumerate() {
            table += &row((peer, iops, role), &ticks[core], &counts[core]);
        }
        let look = || record(&window, file).context("perf record");
        let (_, report) = beside(peers, cell, (peer, seconds), look)?;
        profiles += &format!("\n{}, {}:\n{report}", cell.name(), peer.name());
    }
    let name = cell.name();
    Ok(format!("{name}: shares of each core, and events for each operation\n\n{table}{profiles}"))
}

/// Runs `look` while the cell is measured, once it is at speed. Also the operations a second.
fn beside<T: Send>(
    peers: &Peers,
    cell: &Cell,
    (peer, seconds): (Peer, f64),
    look: impl FnOnce() -> Result<T> + Send,
) -> Result<(f64, T)> {
    std::thread::scope(|scope| {
        let looking = scope.spawn(|| {
            std::thread::sleep(RAMP);
            look()
        });
        let sample = peers.measure(cell, peer, seconds + RAMP.as_secs_f64());
        let seen = looking.join().map_err(|_| anyhow::anyhow!("who looked on panicked"))?;
        Ok((sample?.iops, seen?))
    })
}

/// Events a second of each core, in the order of [`EVENTS`], and shares of its time.
fn count(window: &str) -> Result<([Vec<f64>; 2], [Ticks; 2])> {
    let names: Vec<&str> = EVENTS.iter().map(|(event, _)| *event).collect();
    let mut perf = Command::new("perf");
    perf.args(["stat", "-a", "-A", "-x,", "-e", &names.join(","), "--", "sleep", window]);
    let before = ticks()?;
    let output = die_with_parent(&mut perf).stdout(Stdio::null()).output()?;
    let after = ticks()?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{text}");
    let mut counts = [Vec::new(), Vec::new()];
    for (core, counts) in counts.iter_mut().enumerate() {
        let own = text.lines().filter(|line| line.starts_with(&format!("CPU{core},")));
        *counts = own.filter_map(rate).collect();
        ensure!(counts.len() == EVENTS.len(), "perf counted otherwise than was asked for: {text}");
    }
    let less = |core: usize| std::array::from_fn(|at| after[core][at] - before[core][at]);
    Ok((counts, [less(0), less(1)]))
}

/// `CPU0,COUNT,,EVENT,NANOSECONDS,…`: events a second.
fn rate(line: &str) -> Option<f64> {
    let mut fields = line.split(',').skip(1);
    let count: f64 = fields.next()?.parse().ok()?;
    let nanos: f64 = fields.nth(2)?.parse().ok()?;
    Some(count * 1e9 / nanos)
}

fn ticks() -> Result<[Ticks; 2]> {
    let stat = std::fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let core = |name: &str| core_ticks(&stat, name).with_context(|| format!("no {name}: {stat}"));
    Ok([core(CORES[0].0)?, core(CORES[1].0)?])
}

fn core_ticks(stat: &str, name: &str) -> Option<Ticks> {
    let line = stat.lines().find(|line| line.split(' ').next() == Some(name))?;
    // user nice system idle iowait irq softirq steal
    let fields: Vec<u64> =
        line.split_whitespace().skip(1).take(8).map(str::parse).collect::<Result<_, _>>().ok()?;
    let [user, nice, system, idle, iowait, irq, softirq, steal] = fields.try_into().ok()?;
    Some([user + nice, system, irq + softirq + steal, idle + iowait])
}

fn row((peer, iops, role): (Peer, f64, &str), ticks: &Ticks, counts: &[f64]) -> String {
    let all = ticks.iter().sum::<u64>().max(1);
    let mut text = format!("| {} | {:.1}k | {role} |", peer.name(), iops / 1e3);
    for part in ticks {
        text += &format!(" {} % |", part * 100 / all);
    }
    for count in counts {
        text += &format!(" {:.3} |", count / iops);
    }
    text.push('\n');
    text
}

/// The functions that the cores spend most time in, by process.
fn record(window: &str, file: &Path) -> Result<String> {
    let mut perf = Command::new("perf");
    // The CPU clock is there also where a virtual machine has no hardware counters.
    perf.args(["record", "-q", "-a", "-e", "cpu-clock", "-F", "1999", "-o"]).arg(file);
    let output = die_with_parent(perf.args(["--", "sleep", window])).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut report = Command::new("perf");
    report.args(["report", "--stdio", "--sort", "cpu,comm,symbol", "-i"]).arg(file);
    let output = report.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    Ok(lines.take(2 * LINES).map(|line| format!("{}\n", line.trim_end())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_perf_and_the_kernel_print_is_read() {
        let line = "CPU1,4000,,irq:irq_handler_entry,2000000000,100.00,,";
        assert_eq!(rate(line), Some(2000.0));
        assert_eq!(rate("CPU1,<not counted>,,block:block_rq_issue,0,0.00,,"), None);
        let stat = "cpu 9 9 9 9 9 9 9 9\ncpu1 1 2 3 40 5 6 7 8 9 9\ncpu10 1 1 1 1 1 1 1 1\n";
        assert_eq!(core_ticks(stat, "cpu1"), Some([3, 3, 21, 45]));
        assert_eq!(core_ticks(stat, "cpu0"), None);
        let text = row((Peer::Qsd, 1000.0, "server"), &[1, 1, 0, 2], &[500.0, 2000.0]);
        assert_eq!(
            text,
            "| qemu-storage-daemon | 1.0k | server | 25 % | 25 % | 0 % | 50 % | 0.500 | 2.000 |\n"
        );
    }
}
