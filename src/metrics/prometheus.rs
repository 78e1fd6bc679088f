//! The Prometheus text format, version 0.0.4.
//!
//! Families are opened one after the other, each once: `# HELP`, `# TYPE`, then its samples. Who
//! writes a wrong name has made a mistake of ours, found by an assertion; label values and help
//! come from anywhere and are escaped.

use super::histogram::HistogramSnapshot;
use super::volume::{ClassSnapshot, OperationClass, VolumeSnapshot};
use std::collections::HashSet;
use std::fmt::{Display, Write as _};

/// Upper bounds of the exported latency buckets as powers of two of nanoseconds, 8 µs to 4.3 s:
/// bounds of our own buckets, so that the counts are exact.
const BOUNDS_LOG2_NS: [u32; 15] = [13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 24, 26, 28, 30, 32];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Only grows; the name ends in `_total`.
    Counter,
    Gauge,
    /// Seconds; the name ends in `_seconds`.
    Histogram,
}

impl MetricKind {
    fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// A page of metrics being written.
#[derive(Default)]
pub struct Exposition {
    text: String,
    families: HashSet<&'static str>,
}

impl Exposition {
    /// The `Content-Type` to send it with.
    pub const CONTENT_TYPE: &'static str = "text/plain; version=0.0.4; charset=utf-8";

    pub fn new() -> Self {
        Self::default()
    }

    /// Opens a family; its samples follow at once. Names are ours: a bad or repeated one panics.
    pub fn family(&mut self, name: &'static str, kind: MetricKind, help: &str) -> Family<'_> {
        assert!(is_name(name), "{name} is not a metric name");
        assert!(self.families.insert(name), "{name} is written once, with all its samples");
        match kind {
            MetricKind::Counter => assert!(name.ends_with("_total"), "{name} counts"),
            MetricKind::Histogram => assert!(name.ends_with("_seconds"), "{name} is in seconds"),
            MetricKind::Gauge => assert!(!name.ends_with("_total"), "{name} is a gauge"),
        }
        self.text.push_str("# HELP ");
        self.text.push_str(name);
        self.text.push(' ');
        escape(&mut self.text, help, false);
        self.text.push_str("\n# TYPE ");
        self.text.push_str(name);
        self.text.push(' ');
        self.text.push_str(kind.name());
        self.text.push('\n');
        Family { text: &mut self.text, name, kind }
    }

    pub fn into_text(self) -> String {
        self.text
    }
}

/// A family whose samples are being written.
pub struct Family<'a> {
    text: &'a mut String,
    name: &'static str,
    kind: MetricKind,
}

impl Family<'_> {
    /// One sample of a counter or a gauge.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) -> &mut Self {
        assert!(self.kind != MetricKind::Histogram, "{} takes histograms", self.name);
        self.line("", labels, None, value);
        self
    }

    /// The buckets, sum and count of one histogram of latencies.
    pub fn histogram(&mut self, labels: &[(&str, &str)], latency: &HistogramSnapshot) -> &mut Self {
        assert!(self.kind == MetricKind::Histogram, "{} takes single samples", self.name);
        // Most kinds of operations of most volumes never come.
        let bounds = BOUNDS_LOG2_NS.into_iter().filter(|_| latency.count() > 0);
        for log2 in bounds {
            let bound_ns = 1u64 << log2;
            let bound = Seconds(bound_ns).to_string();
            self.line("_bucket", labels, Some(&bound), latency.count_up_to(bound_ns));
        }
        self.line("_bucket", labels, Some("+Inf"), latency.count());
        self.line("_sum", labels, None, Seconds(latency.sum_ns));
        self.line("_count", labels, None, latency.count());
        self
    }

    fn line(
        &mut self,
        suffix: &str,
        labels: &[(&str, &str)],
        bound: Option<&str>,
        value: impl Display,
    ) {
        self.text.push_str(self.name);
        self.text.push_str(suffix);
        let bound = bound.map(|bound| ("le", bound));
        let mut separator = '{';
        for (label, value) in labels.iter().copied().chain(bound) {
            assert!(is_name(label) && !label.contains(':'), "{label} is not a label name");
            self.text.push(separator);
            self.text.push_str(label);
            self.text.push_str("=\"");
            escape(self.text, value, true);
            self.text.push('"');
            separator = ',';
        }
        if separator == ',' {
            self.text.push('}');
        }
        writeln!(self.text, " {value}").expect("writing to a string does not fail");
    }
}

/// Nanoseconds, written as seconds without rounding.
struct Seconds(u64);

impl Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (whole, fraction) = (self.0 / 1_000_000_000, self.0 % 1_000_000_000);
        let fraction = format!("{fraction:09}");
        match fraction.trim_end_matches('0') {
            "" => write!(f, "{whole}"),
            fraction => write!(f, "{whole}.{fraction}"),
        }
    }
}

fn is_name(name: &str) -> bool {
    let first = |c: char| c.is_ascii_alphabetic() || c == '_';
    name.starts_with(first) && name.chars().all(|c| first(c) || c.is_ascii_digit() || c == ':')
}

fn escape(text: &mut String, value: &str, quoted: bool) {
    for c in value.chars() {
        match c {
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '"' if quoted => text.push_str("\\\""),
            c => text.push(c),
        }
    }
}

/// One volume on the page.
pub struct VolumeSeries<'a> {
    /// What tells it from the others: `vm`, `volume`, …
    pub labels: &'a [(&'a str, &'a str)],
    pub snapshot: &'a VolumeSnapshot,
}

/// The families of all volumes.
pub fn write_volumes(page: &mut Exposition, volumes: &[VolumeSeries<'_>]) {
    write_classes(page, volumes);
    type Value = fn(&VolumeSnapshot) -> u64;
    let plain: [(&'static str, MetricKind, &str, Value); 4] = [
        (
            "vflash_volume_in_flight_requests",
            MetricKind::Gauge,
            "Requests taken from the guest and not yet ended.",
            |volume| volume.in_flight,
        ),
        (
            "vflash_volume_throttled_requests_total",
            MetricKind::Counter,
            "Times a request had to wait for the limits of the volume.",
            |volume| volume.throttled,
        ),
        (
            "vflash_volume_malformed_requests_total",
            MetricKind::Counter,
            "What the guest sent that is not a request.",
            |volume| volume.malformed,
        ),
        (
            "vflash_volume_reconnects_total",
            MetricKind::Counter,
            "Connections of a VMM after the first.",
            |volume| volume.reconnects,
        ),
    ];
    for (name, kind, help, value) in plain {
        let mut family = page.family(name, kind, help);
        for volume in volumes {
            family.sample(volume.labels, value(volume.snapshot));
        }
    }
}

fn write_classes(page: &mut Exposition, volumes: &[VolumeSeries<'_>]) {
    type Value = fn(&ClassSnapshot) -> u64;
    let counters: [(&'static str, &str, Value); 3] = [
        (
            "vflash_volume_operations_total",
            "Requests ended, failed ones included.",
            ClassSnapshot::operations,
        ),
        ("vflash_volume_bytes_total", "Bytes of requests that succeeded.", |class| class.bytes),
        ("vflash_volume_errors_total", "Requests that failed.", |class| class.errors),
    ];
    let series = || {
        volumes.iter().flat_map(|volume| {
            OperationClass::ALL.map(|class| {
                let labels = [volume.labels, &[("operation", class.name())][..]].concat();
                (labels, volume.snapshot.class(class))
            })
        })
    };
    for (name, help, value) in counters {
        let mut family = page.family(name, MetricKind::Counter, help);
        for (labels, class) in series() {
            family.sample(&labels, value(class));
        }
    }
    let help = "Time from taking a request to its end.";
    let mut family = page.family("vflash_volume_latency_seconds", MetricKind::Histogram, help);
    for (labels, class) in series() {
        family.histogram(&labels, &class.latency);
    }
}

#[cfg(test)]
#[path = "prometheus_test.rs"]
mod tests;
