//! The produced page, read back by a strict reader of the text format.

use super::*;
use crate::metrics::VolumeMetrics;
use std::collections::BTreeMap;
use std::time::Duration;

type Labels = BTreeMap<String, String>;

#[derive(Debug, Default)]
struct Page {
    kinds: BTreeMap<String, String>,
    help: BTreeMap<String, String>,
    samples: BTreeMap<(String, Labels), f64>,
}

/// Undoes the escaping of a quoted label value; returns it and what follows the closing quote.
fn quoted(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => return (value, &text[at + 1..]),
            '\\' => match characters.next().expect("something is escaped").1 {
                'n' => value.push('\n'),
                c @ ('"' | '\\') => value.push(c),
                c => panic!("\\{c} is not an escape"),
            },
            c => value.push(c),
        }
    }
    panic!("unclosed label value: {text}");
}

fn read_sample(line: &str) -> (String, Labels, f64) {
    let end = line.find(['{', ' ']).expect("a name ends");
    let (name, mut rest) = line.split_at(end);
    let mut labels = Labels::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        loop {
            let (label, value) = rest.split_once("=\"").expect("a label");
            let (value, after) = quoted(value);
            assert!(labels.insert(label.to_owned(), value).is_none(), "{label} is given twice");
            match after.strip_prefix(',') {
                Some(next) => rest = next,
                None => {
                    rest = after.strip_prefix('}').expect("labels are closed");
                    break;
                }
            }
        }
    }
    let value = rest.strip_prefix(' ').expect("one space").parse().expect("a number");
    (name.to_owned(), labels, value)
}

/// Panics on anything that a strict reader refuses.
fn read(text: &str) -> Page {
    assert!(text.is_empty() || text.ends_with('\n'));
    let mut page = Page::default();
    let mut family = String::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect("help has a text");
            assert!(page.help.insert(name.to_owned(), help.to_owned()).is_none(), "{name} twice");
            family = name.to_owned();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("type has a kind");
            assert_eq!(name, family, "TYPE follows HELP of the same family");
            page.kinds.insert(name.to_owned(), kind.to_owned());
        } else {
            let (name, labels, value) = read_sample(line);
            let base = match page.kinds[&family].as_str() {
                "histogram" => ["_bucket", "_sum", "_count"]
                    .iter()
                    .find_map(|suffix| name.strip_suffix(suffix))
                    .expect("a histogram's suffix"),
                _ => &name,
            };
            assert_eq!(base, family, "samples of a family stand together");
            let sample = (name, labels);
            assert!(!page.samples.contains_key(&sample), "{sample:?} is given twice");
            page.samples.insert(sample, value);
        }
    }
    page
}

impl Page {
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let sample = (name.to_owned(), labels);
        *self.samples.get(&sample).unwrap_or_else(|| panic!("no {sample:?}"))
    }
}

#[test]
fn a_page_of_volumes_reads_back() {
    let (web, database) = (VolumeMetrics::new(), VolumeMetrics::new());
    for microseconds in [5, 50, 500, 5_000, 5_000_000] {
        let latency = Duration::from_micros(microseconds);
        web.completed(OperationClass::Read, 4096, latency, true);
    }
    web.completed(OperationClass::Write, 512, Duration::from_nanos(1 << 13), false);
    web.set_in_flight(3);
    database.reconnected();
    let (web, database) = (web.snapshot(), database.snapshot());
    let volumes = [
        VolumeSeries { labels: &[("vm", "web-1"), ("volume", "scratch")], snapshot: &web },
        VolumeSeries { labels: &[("vm", "db"), ("volume", "a\"b\\c\nd")], snapshot: &database },
    ];
    let mut page = Exposition::new();
    write_volumes(&mut page, &volumes);
    let page = read(&page.into_text());

    let read = [("vm", "web-1"), ("volume", "scratch"), ("operation", "read")];
    assert_eq!(page.value("vflash_volume_operations_total", &read), 5.0);
    assert_eq!(page.value("vflash_volume_bytes_total", &read), 5.0 * 4096.0);
    assert_eq!(page.value("vflash_volume_latency_seconds_count", &read), 5.0);
    let sum = page.value("vflash_volume_latency_seconds_sum", &read);
    assert!((sum - 5.005_555).abs() < 1e-9, "{sum}");
    let below = |bound: &str| {
        let labels = [&read[..], &[("le", bound)]].concat();
        page.value("vflash_volume_latency_seconds_bucket", &labels)
    };
    assert_eq!(below("0.000008192"), 1.0);
    assert_eq!(below("0.000065536"), 2.0);
    assert_eq!(below("0.001048576"), 3.0);
    assert_eq!(below("4.294967296"), 4.0);
    assert_eq!(below("+Inf"), 5.0);
    let write = [("vm", "web-1"), ("volume", "scratch"), ("operation", "write")];
    assert_eq!(page.value("vflash_volume_errors_total", &write), 1.0);
    let labels = [&write[..], &[("le", "0.000008192")]].concat();
    let exact = page.value("vflash_volume_latency_seconds_bucket", &labels);
    assert_eq!(exact, 1.0, "a bound belongs to its bucket");
    assert_eq!(page.value("vflash_volume_in_flight_requests", &read[..2]), 3.0);
    let odd = [("vm", "db"), ("volume", "a\"b\\c\nd")];
    assert_eq!(page.value("vflash_volume_reconnects_total", &odd), 1.0);
    assert_eq!(page.kinds["vflash_volume_latency_seconds"], "histogram");
}

#[test]
fn buckets_are_cumulative_and_end_with_the_count() {
    let mut random = fastrand::Rng::with_seed(7);
    let metrics = VolumeMetrics::new();
    for _ in 0..5000 {
        let power = random.u32(1..40);
        let latency = Duration::from_nanos(random.u64(1..1 << power));
        metrics.completed(OperationClass::Flush, 0, latency, true);
    }
    let mut page = Exposition::new();
    let mut family = page.family("x_seconds", MetricKind::Histogram, "Test.");
    let snapshot = metrics.snapshot();
    family.histogram(&[], &snapshot.class(OperationClass::Flush).latency);
    let text = page.into_text();
    let buckets: Vec<f64> = text
        .lines()
        .filter(|line| line.starts_with("x_seconds_bucket"))
        .map(|line| read_sample(line).2)
        .collect();
    assert_eq!(buckets.len(), BOUNDS_LOG2_NS.len() + 1);
    assert!(buckets.is_sorted() && buckets[0] > 0.0, "{buckets:?}");
    assert_eq!(buckets.last(), Some(&5000.0));
    assert_eq!(read(&text).value("x_seconds_count", &[]), 5000.0);
}

#[test]
fn other_families_join_the_page() {
    let mut page = Exposition::new();
    page.family("vflash_pool_size_bytes", MetricKind::Gauge, "With \\ and\nline.")
        .sample(&[("pool", "nvme0")], 1u64 << 40)
        .sample(&[("pool", "nvme1")], 0);
    page.family("vflash_up_seconds", MetricKind::Gauge, "Alive.").sample(&[], 1.5);
    let page = read(&page.into_text());
    assert_eq!(page.value("vflash_pool_size_bytes", &[("pool", "nvme0")]), (1u64 << 40) as f64);
    assert_eq!(page.value("vflash_up_seconds", &[]), 1.5);
    assert_eq!(page.help["vflash_pool_size_bytes"], "With \\\\ and\\nline.");
}

#[test]
#[should_panic(expected = "written once")]
fn a_family_is_written_once() {
    let mut page = Exposition::new();
    page.family("a_total", MetricKind::Counter, "A.");
    page.family("a_total", MetricKind::Counter, "A.");
}

#[test]
#[should_panic(expected = "counts")]
fn a_counter_is_named_total() {
    Exposition::new().family("requests", MetricKind::Counter, "A.");
}
