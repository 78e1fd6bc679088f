//! Whatever a manifest file holds, reading it ends soon, with mistakes or with a manifest.
//!
//! A seeded mutation loop over the manifests of `manifests/` and `tests/bad_manifests`. Runs for
//! VFLASH_FUZZ_SECONDS (default 2); a failure names its seed.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vflash::manifest::export::to_yaml;
use vflash::manifest::{Action, Actual, SOURCE_BYTES_MAX, Source, parse, plan, plan_deletion};

/// Reading a file of the largest size takes no longer; test builds are hardly optimised.
const LIMIT: Duration = Duration::from_millis(if cfg!(debug_assertions) { 200 } else { 100 });

/// Pieces of YAML that change how the rest is read.
const PIECES: [&str; 32] = [
    "{",
    "}",
    "[",
    "]",
    ":",
    ": ",
    "- ",
    "? ",
    "&a ",
    "*a",
    "!!str ",
    "|\n",
    ">-\n",
    "\"",
    "'",
    "#",
    "---\n",
    "...\n",
    "%YAML 1.2\n",
    "<<: ",
    "\t",
    "\n",
    "\r\n",
    "\u{feff}",
    "\0",
    "é",
    "~",
    "  ",
    ",",
    "\\x",
    "null:",
    "99999999999999999999",
];

fn corpus() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut texts = Vec::new();
    for directory in ["manifests", "tests/bad_manifests"] {
        for entry in std::fs::read_dir(root.join(directory)).expect("the directory is there") {
            let path = entry.expect("an entry").path();
            texts.push(std::fs::read_to_string(path).expect("text"));
        }
    }
    texts.sort();
    texts
}

fn source(text: String) -> Source {
    Source { name: "fuzz".to_owned(), directory: Some(PathBuf::from("/etc")), text }
}

/// What this thread has used, so that other work on the machine is not measured.
fn cpu_time() -> Duration {
    let clock = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID;
    Duration::from(nix::time::clock_gettime(clock).expect("every Linux has it"))
}

/// A place in the text where it can be cut.
fn cut(text: &str, random: &mut fastrand::Rng) -> usize {
    let at = random.usize(..=text.len());
    (at..=text.len()).find(|at| text.is_char_boundary(*at)).expect("the end is a boundary")
}

fn mutate(text: &mut String, corpus: &[String], random: &mut fastrand::Rng) {
    let (first, second) = (cut(text, random), cut(text, random));
    let (start, end) = (first.min(second), first.max(second));
    match random.u8(0..7) {
        0 => text.insert_str(start, PIECES[random.usize(..PIECES.len())]),
        1 => text.replace_range(start..end, ""),
        2 => {
            let part = text[start..end].to_owned();
            text.insert_str(end, &part);
        }
        3 => {
            let other = &corpus[random.usize(..corpus.len())];
            let (from, to) = (cut(other, random), cut(other, random));
            text.insert_str(start, &other[from.min(to)..from.max(to)]);
        }
        4 => text.truncate(end),
        5 => text.insert(start, random.char('\0'..='\u{2ff}')),
        _ => {
            let piece = PIECES[random.usize(..PIECES.len())].repeat(random.usize(1..40));
            text.insert_str(start, &piece);
        }
    }
}

/// Reads, and holds what every reading promises; returns whether it was a manifest.
fn check(text: String, seed: u64) -> bool {
    let sources = [source(text)];
    let start = cpu_time();
    let read = parse(&sources);
    let took = cpu_time() - start;
    assert!(took <= LIMIT, "seed {seed}: {took:?}");
    let text = &sources[0].text;
    let wanted = match read {
        Ok(wanted) => wanted,
        Err(mistakes) => {
            assert!(!mistakes.is_empty(), "seed {seed}");
            let lines = text.lines().count() as u32 + 1;
            for mistake in &mistakes {
                let place = &mistake.place;
                let inside = (1..=lines).contains(&place.line) && place.column >= 1;
                assert!(inside, "seed {seed}: {mistake} in {text:?}");
                assert!(!mistake.message.contains(['\n', '\0']), "seed {seed}: {mistake}");
            }
            assert!(mistakes.is_sorted_by_key(|m| (m.place.line, m.place.column)), "seed {seed}");
            return false;
        }
    };
    let host = Actual::default();
    if let Ok(plan) = plan(&wanted, &host) {
        assert!(plan.steps.iter().all(|step| !matches!(step.action, Action::GrowPool { .. })));
    }
    assert!(plan_deletion(&wanted, &host, true).is_ok_and(|plan| plan.is_empty()));
    true
}

#[test]
fn mutated_manifests_are_read_or_refused() {
    let seconds = std::env::var("VFLASH_FUZZ_SECONDS");
    let seconds: u64 = seconds.map_or(2, |text| text.parse().expect("whole seconds"));
    let (corpus, start) = (corpus(), Instant::now());
    let (mut runs, mut taken) = (0_u64, 0_u64);
    while start.elapsed() < Duration::from_secs(seconds) {
        let mut random = fastrand::Rng::with_seed(runs);
        let mut text = corpus[random.usize(..corpus.len())].clone();
        for _ in 0..random.usize(0..6) {
            mutate(&mut text, &corpus, &mut random);
        }
        taken += u64::from(check(text, runs));
        runs += 1;
    }
    println!("{runs} texts, {taken} of them manifests");
    assert!(runs > 100 && taken > runs / 100, "{taken} of {runs}: the mutations are too wild");
    assert!(to_yaml(&Actual::default()).is_empty());
}

/// Files of the largest size, made to be slow to read.
#[test]
fn the_largest_files_are_read_in_time() {
    let fill = |piece: &str| piece.repeat(SOURCE_BYTES_MAX / piece.len());
    let numbered = |key: &dyn Fn(usize) -> String| {
        let mut text = String::new();
        let mut number = 0;
        while text.len() + 256 < SOURCE_BYTES_MAX {
            text.push_str(&key(number));
            number += 1;
        }
        text
    };
    let document = "apiVersion: vflash/v1\nkind: VirtualMachine\nmetadata: {name: m";
    let machine = |n: usize| {
        format!(
            "---\n{document}{n}}}\nspec: {{volumes: [{{name: v, flash: {{pool: p, size: \
             1GiB}}}}]}}\n"
        )
    };
    let volume = |n: usize| format!("  - {{name: v{n}, flash: {{pool: p, size: 1GiB}}}}\n");
    let many_volumes = format!("{document}}}\nspec:\n  volumes:\n{}", numbered(&volume));
    let texts = [
        numbered(&machine),
        many_volumes,
        numbered(&|n| format!("key{n}: value\n")),
        numbered(&|n| format!("apiVersio{n}: [\"{n}\", '{n}', &a{n} {n}]\n")),
        format!("{{{}}}", numbered(&|n| format!("k{n}: v,"))),
        format!("a: {}", fill("x")),
        format!("a: \"{}\"", fill("\\x41")),
        format!("a: |\n{}", fill("  line\n")),
        format!("[{}]", fill("a,")),
        fill("- - - "),
        fill("- "),
        fill("- a\n"),
        fill("["),
        fill("{a: "),
        fill("? "),
        fill("a: b\n"),
        fill("---\n"),
        fill("# comment\n"),
        fill(" "),
        fill("\n"),
        fill("\t"),
        fill("&a "),
        fill("!t "),
        fill("\"a\" "),
        fill("'"),
        fill("%a\n"),
        fill("é: è\n"),
        fill("\0"),
        fill("a:\n "),
    ];
    for text in texts.iter().flat_map(|text| [text.clone(), wrapped(text)]) {
        let start = text.get(..30).unwrap_or_default().to_owned();
        let sources = [source(text)];
        let before = cpu_time();
        let read = parse(&sources);
        let took = cpu_time() - before;
        println!(
            "{took:?} {:?} {start:?}",
            read.map(|_| ()).map_err(|m| (m.len(), m[0].to_string()))
        );
        assert!(took <= LIMIT, "{took:?} for {start:?}…");
    }
}

/// The text in lines that are short enough to be read.
fn wrapped(text: &str) -> String {
    let characters: Vec<char> = text.chars().take(SOURCE_BYTES_MAX).collect();
    let lines = characters.chunks(3000).map(|line| line.iter().collect::<String>());
    let mut text = lines.collect::<Vec<_>>().join("\n  ");
    text.truncate((0..=SOURCE_BYTES_MAX).rfind(|at| text.is_char_boundary(*at)).unwrap_or(0));
    text
}
