//! What people and scripts read: aligned tables, JSON, YAML. No colour, so that a pipe gets what a
//! terminal gets.

use crate::arguments::Format;
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::time::Duration;
use vflash::base::units::{Bytes, GIB, KIB, MIB, TIB};
use vflash::control::api::{ErrorCode, Failure};

/// Rows under a heading, columns two spaces apart.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(heading: &[&str]) -> Self {
        Self { rows: vec![heading.iter().map(|cell| (*cell).to_owned()).collect()] }
    }

    /// Without a heading: names and their values.
    pub(crate) fn plain() -> Self {
        Self { rows: Vec::new() }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub(crate) fn pair(&mut self, name: &str, value: impl ToString) {
        self.row([format!("{name}:"), value.to_string()]);
    }

    pub(crate) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell: &String| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:<width$}  "));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Prints `value` as asked for; `table` makes the form for people.
pub(crate) fn print<T: Serialize>(
    format: Format,
    value: &T,
    table: impl FnOnce(&T) -> String,
) -> Result<(), Failure> {
    let wrong = |text: String| Failure::new(ErrorCode::Internal, text);
    let text = match format {
        Format::Table => table(value),
        Format::Json => {
            let mut text =
                serde_json::to_string_pretty(value).map_err(|error| wrong(error.to_string()))?;
            text.push('\n');
            text
        }
        Format::Yaml => serde_yaml::to_string(value).map_err(|error| wrong(error.to_string()))?,
    };
    write(&text)
}

/// Writes to standard output. A reader who has gone is no failure.
pub(crate) fn write(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => result.map_err(|error| {
            Failure::new(ErrorCode::Io, format!("writing to standard output: {error}"))
        }),
    }
}

/// A size for people: exact if short, else with one decimal.
pub(crate) fn size(bytes: u64) -> String {
    let exact = Bytes(bytes).to_string();
    if exact.trim_end_matches(char::is_alphabetic).len() <= 4 {
        return exact;
    }
    let units = [("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)];
    let (name, unit) = units.into_iter().find(|(_, unit)| bytes >= *unit).unwrap_or(("B", 1));
    let tenths = u128::from(bytes) * 10 / u128::from(unit);
    format!("{}.{}{name}", tenths / 10, tenths % 10)
}

/// A duration for people.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{:02}h", seconds / 86400, seconds % 86400 / 3600),
    }
}

/// UTC as `2026-01-31T23:59:59.123Z`.
pub(crate) fn time(milliseconds: u64) -> String {
    let days = milliseconds / 86_400_000;
    let of_day = milliseconds % 86_400_000;
    let (year, month, day) = vflash::base::clock::date(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        of_day / 3_600_000,
        of_day / 60_000 % 60,
        of_day / 1000 % 60,
        of_day % 1000
    )
}

/// A line on a terminal that is written over while long work goes on; nothing elsewhere.
pub(crate) struct Progress {
    terminal: bool,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal() }
    }

    /// Somebody sees it.
    pub(crate) fn is_shown(&self) -> bool {
        self.terminal
    }

    pub(crate) fn show(&self, text: &str) {
        if self.terminal {
            eprint!("\r\x1b[K{text}");
        }
    }

    /// The last line, which stays.
    pub(crate) fn end(self, text: &str) {
        self.show(text);
        if self.terminal {
            eprintln!();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.show("");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_without_spaces() {
        let mut table = Table::new(&["NAME", "SIZE"]);
        table.row(["a/long-name".into(), "1GiB".into()]);
        table.row(["ö".into(), String::new()]);
        assert_eq!(table.render(), "NAME         SIZE\na/long-name  1GiB\nö\n");
    }

    #[test]
    fn sizes_are_short() {
        for (bytes, text) in [
            (0, "0"),
            (64 * GIB, "64GiB"),
            (1536 * MIB, "1536MiB"),
            (GIB + 4096, "1.0GiB"),
            (123_456_789, "117.7MiB"),
            (u64::MAX, "16777215.9TiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn times_are_dates() {
        for (milliseconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
            (1_767_225_599_001, "2025-12-31T23:59:59.001Z"),
        ] {
            assert_eq!(time(milliseconds), text);
        }
        assert_eq!(duration(Duration::from_secs(59)), "59s");
        assert_eq!(duration(Duration::from_secs(3599)), "59m59s");
        assert_eq!(duration(Duration::from_secs(90_000)), "1d01h");
    }
}
