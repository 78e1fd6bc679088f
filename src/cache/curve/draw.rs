//! A curve for people: as a table, and as a picture.

use super::{MissCurve, blocks_of};
use crate::base::units::{GIB, KIB, MIB, TIB};
use crate::cache::policy::BLOCK_BYTES;
use std::fmt::Write;

/// Rows of a table, and points of a picture.
const ROWS: u64 = 16;
const POINTS: u64 = 200;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 360.0;
const MARGIN: f64 = 48.0;

/// A size with three digits, as it is read and not as it is parsed.
pub fn size(bytes: u64) -> String {
    let units = [("TiB", TIB), ("GiB", GIB), ("MiB", MIB)];
    let unit = units.iter().find(|(_, unit)| bytes >= *unit).unwrap_or(&("KiB", KIB));
    let number = bytes as f64 / unit.1 as f64;
    let digits = if number < 9.995 { 2 } else { usize::from(number < 99.95) };
    format!("{number:.digits$} {}", unit.0)
}

/// Sizes in equal steps up to where more brings nothing, and the present size among them.
fn sizes(curve: &MissCurve, now_blocks: u64, count: u64) -> Vec<u64> {
    let most = u128::from(curve.blocks_max().max(now_blocks).max(1));
    let step = |index: u64| (most * u128::from(index) / u128::from(count)) as u64;
    let mut sizes: Vec<u64> = (1..=count).map(step).collect();
    sizes.push(now_blocks);
    sizes.sort_unstable();
    sizes.dedup();
    sizes.retain(|blocks| *blocks > 0);
    sizes
}

/// Cache size and hit ratio; the line of the present size, `now_bytes`, has an arrow.
pub fn table(curve: &MissCurve, now_bytes: u64) -> String {
    let now = blocks_of(now_bytes);
    let mut text = String::from("     CACHE   HITS\n");
    for blocks in sizes(curve, now, ROWS) {
        let hits = (1.0 - curve.miss_ratio(blocks)) * 100.0;
        let arrow = if blocks == now { "  <- now" } else { "" };
        let size = size(blocks * BLOCK_BYTES);
        let _ = writeln!(text, "{size:>10}  {hits:4.1} %{arrow}");
    }
    text
}

/// The curve as an SVG document with a line at the present size.
pub fn svg(curve: &MissCurve, now_bytes: u64, title: &str) -> String {
    let now = blocks_of(now_bytes);
    let most = curve.blocks_max().max(now).max(1);
    let across = |blocks: u64| MARGIN + (WIDTH - 2.0 * MARGIN) * blocks as f64 / most as f64;
    let down = |ratio: f64| MARGIN + (HEIGHT - 2.0 * MARGIN) * (1.0 - ratio);
    let mut line = format!("M{:.1} {:.1}", across(0), down(1.0));
    for blocks in sizes(curve, now, POINTS) {
        let _ = write!(line, "L{:.1} {:.1}", across(blocks), down(curve.miss_ratio(blocks)));
    }
    let (left, right) = (across(0), across(most));
    let (bottom, now_x) = (down(0.0), across(now));
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<title>{0}</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{left}\" y=\"24\" font-size=\"15\">{0}</text>\n",
        escaped(title)
    );
    for percent in [0, 25, 50, 75, 100] {
        let y = down(f64::from(percent) / 100.0);
        let _ = writeln!(
            text,
            "<path d=\"M{left} {y:.1}H{right}\" stroke=\"#ddd\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{percent} %</text>",
            left - 6.0,
            y + 4.0
        );
    }
    for quarter in 0..=4 {
        let blocks = (u128::from(most) * quarter / 4) as u64;
        let (x, y) = (across(blocks), bottom + 18.0);
        let label = size(blocks * BLOCK_BYTES);
        let _ =
            writeln!(text, "<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{label}</text>");
    }
    let _ = writeln!(
        text,
        "<path d=\"M{now_x:.1} {MARGIN}V{bottom}\" stroke=\"#c33\" stroke-dasharray=\"4\"/>\n\
         <path d=\"{line}\" fill=\"none\" stroke=\"#36c\" stroke-width=\"2\"/>\n\
         <text x=\"{left}\" y=\"{:.1}\">misses by cache size; dashed: now, {}</text>\n</svg>",
        HEIGHT - 10.0,
        size(now_bytes)
    );
    text
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
