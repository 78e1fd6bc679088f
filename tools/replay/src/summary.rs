//! Points as a table, and how they stand against the goals.

use crate::simulate::{Point, SHARES};
use std::fmt::Write;
use vflash::base::{Error, ErrorKind, Result};

/// The columns of `miss_ratio.tsv`, and bytes that fills wrote.
pub const COLUMNS: &str = "trace\tpolicy\tcache_frac\tcache_blocks\tmiss_ratio\tfill_bytes";

/// Traces whose blocks come back so soon that LRU writes little; for the others fills are to write
/// half as much.
const FILL_GOALS: [(&str, f64); 1] = [("w106", 1.8)];
const FILL_GOAL: f64 = 2.0;

/// The share of the footprint at which the goal for fills is set.
const FILL_SHARE: f64 = 0.1;

/// One row of [`COLUMNS`].
pub fn row(point: &Point) -> String {
    let Point { trace, policy, share, blocks, fill_bytes, .. } = point;
    let ratio = point.miss_ratio();
    format!("{trace}\t{policy}\t{share}\t{blocks}\t{ratio:.6}\t{fill_bytes}")
}

/// Miss ratios of one policy from a table in the columns of `miss_ratio.tsv`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reference {
    pub policy: String,
    rows: Vec<(String, f64, f64)>,
}

impl Reference {
    /// Reads a table; rows of other policies are left out.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] with the line.
    pub fn parse(text: &str, policy: &str) -> Result<Self> {
        let mut rows = Vec::new();
        for (index, line) in text.lines().enumerate().skip(1) {
            let mut words = line.split('\t');
            let (trace, name) = (words.next(), words.next());
            let mut number = || words.next().and_then(|word| word.parse::<f64>().ok());
            let (share, _, ratio) = (number(), number(), number());
            let (Some(trace), Some(name), Some(share), Some(ratio)) = (trace, name, share, ratio)
            else {
                let text = format!("line {}: not trace, policy, three numbers", index + 1);
                return Err(Error::new(ErrorKind::Corrupt, text));
            };
            if name == policy {
                rows.push((trace.to_owned(), share, ratio));
            }
        }
        Ok(Self { policy: policy.to_owned(), rows })
    }

    fn ratio(&self, trace: &str, share: f64) -> Option<f64> {
        let here = |row: &&(String, f64, f64)| row.0 == trace && (row.1 - share).abs() < 1e-9;
        self.rows.iter().find(here).map(|row| row.2)
    }
}

/// How a set of points stands against LRU on the same traces.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    pub points: usize,
    /// Mean share of LRU's misses that are saved.
    pub saved: f64,
    /// The point at which fewest are saved.
    pub worst: f64,
    pub worst_at: String,
    pub below_lru: usize,
    /// By trace, at a tenth of the footprint: LRU's fills over ours.
    pub fills: Vec<(String, f64)>,
    /// Mean miss ratio, of us and of the reference where it has the point.
    pub mean: f64,
    pub reference: Option<f64>,
}

impl Summary {
    /// Points of other policies than ours and LRU are left out.
    pub fn new(points: &[Point], reference: Option<&Reference>) -> Self {
        let mut summary = Self { worst: f64::INFINITY, ..Self::default() };
        let mut other = Vec::new();
        for ours in points.iter().filter(|point| point.policy == "vflash") {
            let same = |point: &&Point| {
                point.policy == "LRU" && point.trace == ours.trace && point.share == ours.share
            };
            let Some(lru) = points.iter().find(same) else { continue };
            let saved = 1.0 - ours.misses as f64 / lru.misses.max(1) as f64;
            summary.points += 1;
            summary.saved += saved;
            summary.mean += ours.miss_ratio();
            summary.below_lru += usize::from(saved < 0.0);
            if saved < summary.worst {
                summary.worst = saved;
                summary.worst_at = format!("{} at {} %", ours.trace, ours.share * 100.0);
            }
            if ours.share == FILL_SHARE {
                let fewer = lru.fill_bytes as f64 / ours.fill_bytes.max(1) as f64;
                summary.fills.push((ours.trace.clone(), fewer));
            }
            other.extend(reference.and_then(|table| table.ratio(&ours.trace, ours.share)));
        }
        let count = summary.points.max(1) as f64;
        summary.saved /= count;
        summary.mean /= count;
        if !other.is_empty() && other.len() == summary.points {
            summary.reference = Some(other.iter().sum::<f64>() / count);
        }
        summary
    }

    /// All goals are met. Without a reference that has every point, that of the mean is not.
    pub fn passed(&self) -> bool {
        let fills = self.fills.iter().all(|(trace, fewer)| *fewer >= fill_goal(trace));
        let mean = self.reference.is_some_and(|reference| self.mean <= reference);
        fills && mean && self.below_lru == 0
    }

    pub fn text(&self, reference: Option<&Reference>) -> String {
        let mut text = format!(
            "{} points: {:.2} % fewer misses than LRU in the mean; worst {:+.2} % ({}); {} worse \
             than LRU\n",
            self.points,
            self.saved * 100.0,
            self.worst * 100.0,
            self.worst_at,
            self.below_lru
        );
        let _ = write!(text, "mean miss ratio {:.4}", self.mean);
        if let Some(table) = reference {
            let _ = match self.reference {
                Some(mean) => write!(text, ", {} {mean:.4}", table.policy),
                None => write!(text, ", of {} the table lacks points", table.policy),
            };
        }
        text.push_str("\nfills at 10 %, fewer than LRU's:");
        for (trace, fewer) in &self.fills {
            let sign = if *fewer < fill_goal(trace) { "!" } else { "" };
            let _ = write!(text, " {trace} {fewer:.2}x{sign}");
        }
        text.push('\n');
        text
    }
}

/// How many times fewer bytes than LRU's fills are to write of a trace.
pub fn fill_goal(trace: &str) -> f64 {
    FILL_GOALS.iter().find(|(name, _)| *name == trace).map_or(FILL_GOAL, |(_, goal)| *goal)
}

/// Rows of traces, columns of sizes: ours / LRU in percent, and how many fewer bytes fills wrote.
pub fn grid(points: &[Point]) -> String {
    let mut text = format!("{:<16}", "miss % (LRU) fill");
    for share in SHARES {
        let _ = write!(text, "{:>22}", format!("{} %", share * 100.0));
    }
    let mut last = "";
    for ours in points.iter().filter(|point| point.policy == "vflash") {
        let same = |point: &&Point| {
            point.policy == "LRU" && point.trace == ours.trace && point.share == ours.share
        };
        let Some(lru) = points.iter().find(same) else { continue };
        if ours.trace != last {
            let _ = write!(text, "\n{:<16}", ours.trace);
            last = &ours.trace;
        }
        let (miss, other) = (ours.miss_ratio() * 100.0, lru.miss_ratio() * 100.0);
        let fewer = lru.fill_bytes as f64 / ours.fill_bytes.max(1) as f64;
        let _ = write!(text, "{:>22}", format!("{miss:.1} ({other:.1}) {fewer:.1}x"));
    }
    text.push('\n');
    text
}
