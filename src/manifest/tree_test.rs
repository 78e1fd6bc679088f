//! The tree against an independent YAML reader: what both take, both take for the same.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use super::mistake::Mistakes;
use super::tree::{Node, Value, documents};
use super::value::yaml_type;
use serde::Deserialize;
use serde_yaml::Value as Other;
use std::path::Path;
use std::time::{Duration, Instant};

/// Whether the other reader made the same of it. Ours leaves the types of scalars open.
fn same(ours: &Node, other: &Other) -> bool {
    match (&ours.value, other) {
        (Value::Mapping(entries), Other::Mapping(others)) => {
            entries.len() == others.len()
                && entries.iter().zip(others).all(|((key, value), (other_key, other))| {
                    scalar(&key.text, other_key) && same(value, other)
                })
        }
        (Value::List(items), Other::Sequence(others)) => {
            items.len() == others.len() && items.iter().zip(others).all(|(a, b)| same(a, b))
        }
        (Value::Scalar { text, plain: false }, other) => other.as_str() == Some(text),
        (Value::Scalar { text, plain: true }, other) => scalar(text, other),
        _ => false,
    }
}

/// Text that is text to us must be text to the other; the rest is refused where text is wanted.
fn scalar(text: &str, other: &Other) -> bool {
    match other {
        Other::String(other) => other == text,
        Other::Number(_) => yaml_type(text) == Some("a number"),
        Other::Bool(_) => yaml_type(text) == Some("a truth value"),
        Other::Null => yaml_type(text) == Some("nothing"),
        _ => false,
    }
}

/// `None`: one of the two refuses it.
fn compare(text: &str) -> Option<bool> {
    let mut mistakes = Mistakes::new("test".into());
    let ours = documents(text, &mut mistakes);
    if !mistakes.is_empty() {
        return None;
    }
    let others: Result<Vec<Other>, _> =
        serde_yaml::Deserializer::from_str(text).map(Other::deserialize).collect();
    let others: Vec<Other> = others.ok()?.into_iter().filter(|other| !other.is_null()).collect();
    let all = ours.len() == others.len() && ours.iter().zip(&others).all(|(a, b)| same(a, b));
    Some(all)
}

fn corpus() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut texts = Vec::new();
    for directory in ["manifests", "tests/bad_manifests"] {
        for entry in std::fs::read_dir(root.join(directory)).expect("the directory is there") {
            texts.push(std::fs::read_to_string(entry.expect("an entry").path()).expect("text"));
        }
    }
    texts.sort();
    texts
}

#[test]
fn every_example_reads_the_same() {
    let read = corpus().iter().map(|text| compare(text)).collect::<Vec<_>>();
    assert!(!read.contains(&Some(false)));
    assert!(read.iter().flatten().count() > 150, "most of the corpus is YAML to both");
}

/// Scalars that some reader of YAML takes for a number, a date, or nothing.
const LOOKS: [&str; 57] = [
    "0",
    "-1",
    "+1",
    "007",
    "0x1F",
    "0o17",
    "0b1",
    "1_000",
    "1e3",
    "1E-3",
    ".5",
    "5.",
    "-.5",
    ".inf",
    "-.Inf",
    ".nan",
    "1:30",
    "2026-01-01",
    "12e",
    "0xg",
    "1.2.3",
    "--1",
    "+",
    "-a",
    "true",
    "True",
    "TRUE",
    "tRue",
    "yes",
    "No",
    "on",
    "off",
    "y",
    "n",
    "null",
    "Null",
    "~",
    "nULL",
    "\"\"",
    "''",
    "'it''s'",
    "\"a\\tb\"",
    "a b",
    "a  b",
    "a#b",
    "a:b",
    "=",
    "<",
    "@a",
    "`a`",
    "%a",
    "?a",
    "0xFFFFFFFFFFFFFFFFFFFF",
    "99999999999999999999",
    "1e999",
    "\u{a0}",
    "é",
];

#[test]
fn scalars_of_every_look_read_the_same() {
    for look in LOOKS {
        for text in [
            format!("a: {look}\n"),
            format!("a: [{look}, {look}]\n"),
            format!("a: {{{look} b: c}}\n"),
            format!("- {look}"),
        ] {
            assert_ne!(compare(&text), Some(false), "{text}");
        }
    }
}

#[test]
fn fuzz_what_both_readers_take_they_take_for_the_same() {
    let seconds = std::env::var("VFLASH_FUZZ_SECONDS");
    let seconds: u64 = seconds.map_or(2, |text| text.parse().expect("whole seconds"));
    let pieces = [
        "{",
        "}",
        "[",
        "]",
        ": ",
        ":",
        "- ",
        "? ",
        "\n",
        "\n  ",
        "\n\n",
        "#",
        " #",
        "\"",
        "'",
        "|",
        ">",
        "|-\n",
        ">+2\n",
        "---\n",
        "...\n",
        "\\",
        "a",
        " ",
        ",",
        "\r\n",
        "\u{a0}",
        "\u{feff}",
        "~",
        "0",
        "e",
        "é",
        "%TAG ! a\n",
        "\t",
    ];
    let (corpus, start) = (corpus(), Instant::now());
    let (mut seed, mut both) = (0, 0);
    while start.elapsed() < Duration::from_secs(seconds) {
        seed += 1;
        let mut random = fastrand::Rng::with_seed(seed);
        let mut text = corpus[random.usize(..corpus.len())].clone();
        for _ in 0..random.usize(1..5) {
            let at = random.usize(..=text.len());
            let at = (at..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap();
            let length = random.usize(0..4);
            let end = (at + length..=text.len()).find(|at| text.is_char_boundary(*at));
            let piece = pieces[random.usize(..pieces.len())];
            text.replace_range(at..end.unwrap_or(at), piece);
        }
        let same = compare(&text);
        assert_ne!(same, Some(false), "seed {seed}: {text:?}");
        both += u64::from(same.is_some());
    }
    println!("{seed} texts, {both} of them read by both");
    assert!(both > seed / 10, "{both} of {seed}: the mutations are too wild");
}
