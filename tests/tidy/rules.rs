//! The rules of the house. Each returns what breaks it, as `file:line: what`.

use crate::source::{Source, words};
use std::collections::BTreeMap;
use std::path::Path;

const FUNCTION_LINES_MAX: usize = 70;
const FILE_LINES_MAX: usize = 800;
const LINE_LENGTH_MAX: usize = 100;
const PARAMETERS_MAX: usize = 5;

/// The modules of the library and their layers: imports point only downwards.
pub(crate) const LAYERS: [(&str, u32); 11] = [
    ("base", 0),
    ("io", 1),
    ("virtio", 2),
    ("manifest", 1),
    ("metrics", 1),
    ("qos", 1),
    ("flash", 2),
    ("backing", 2),
    ("cache", 3),
    ("vhost", 3),
    ("control", 4),
];

/// Where `unsafe` may stand, besides tests.
pub(crate) const UNSAFE_FILES: [&str; 9] = [
    "src/io/uring.rs",
    "src/io/buffer.rs",
    "src/io/pinned.rs",
    "src/io/file.rs",
    "src/vhost/bell.rs",
    "src/vhost/memory.rs",
    "src/vhost/ring.rs",
    "src/vhost/fault.rs",
    "src/vhost/peek.rs",
];

/// Modules that read bytes of guests, files and drives: slips in them are denied by lint.
pub(crate) const CHECKED: [&str; 16] = [
    "src/base/seal.rs",
    "src/virtio/mod.rs",
    "src/manifest/mod.rs",
    "src/flash/change.rs",
    "src/flash/record.rs",
    "src/flash/root.rs",
    "src/cache/layout.rs",
    "src/cache/root.rs",
    "src/cache/header.rs",
    "src/cache/record.rs",
    "src/cache/summary.rs",
    "src/cache/scan.rs",
    "src/backing/nbd/protocol.rs",
    "src/backing/redo.rs",
    "src/backing/spec.rs",
    "src/backing/stamp.rs",
];

const CHECKED_LINTS: [&str; 3] = ["unwrap_used", "indexing_slicing", "arithmetic_side_effects"];

type Breaks = Vec<String>;

fn broken(source: &Source, line: usize, what: impl AsRef<str>) -> String {
    format!("{}:{line}: {}", source.path.display(), what.as_ref())
}

pub(crate) fn sizes(source: &Source) -> Breaks {
    let mut breaks = Breaks::new();
    let count = source.text.lines().count();
    if count > FILE_LINES_MAX {
        breaks.push(broken(source, count, format!("more than {FILE_LINES_MAX} lines")));
    }
    for (index, line) in source.text.lines().enumerate() {
        if line.chars().count() > LINE_LENGTH_MAX {
            breaks.push(broken(source, index + 1, "a line of more than 100 characters"));
        }
    }
    for function in source.functions() {
        let (name, length) = (&function.name, function.last + 1 - function.first);
        if length > FUNCTION_LINES_MAX {
            let what = format!("fn {name} has {length} lines, more than {FUNCTION_LINES_MAX}");
            breaks.push(broken(source, function.first, what));
        }
        // The signatures of methods of traits are the trait's.
        if function.parameters > PARAMETERS_MAX && !function.of_trait {
            let count = function.parameters;
            let what = format!("fn {name} has {count} parameters, more than {PARAMETERS_MAX}");
            breaks.push(broken(source, function.first, what));
        }
    }
    breaks
}

pub(crate) fn head(source: &Source) -> Breaks {
    match source.text.starts_with("//! ") {
        true => Breaks::new(),
        false => vec![broken(source, 1, "no `//!` that says what the file is for")],
    }
}

/// The module of the library that a file belongs to; `None` outside and for main.rs and lib.rs.
fn module(path: &Path) -> Option<&str> {
    let mut parts = path.iter().map(|part| part.to_str().unwrap_or_default());
    (parts.next() == Some("src")).then_some(())?;
    parts.next().filter(|name| !name.ends_with(".rs"))
}

/// Names directly behind `crate::`, in braces or not, with the bytes where they stand.
fn imports(code: &str) -> Vec<(usize, String)> {
    let word = |text: &str| -> String {
        text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    let mut found = Vec::new();
    for at in words(code, "crate") {
        let Some(rest) = code[at + "crate".len()..].strip_prefix("::") else { continue };
        if !rest.starts_with('{') {
            found.push((at, word(rest)));
            continue;
        }
        let (mut depth, mut start) = (0, 1);
        for (offset, c) in rest.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 || (c == ',' && depth == 1) {
                found.push((at, word(&rest[start..offset])));
                start = offset + 1;
            }
            if depth == 0 {
                break;
            }
        }
    }
    found.retain(|(_, name)| !name.is_empty());
    found
}

pub(crate) fn layers(source: &Source) -> Breaks {
    let layers = BTreeMap::from(LAYERS);
    let Some(own) = module(&source.path) else { return Breaks::new() };
    let Some(layer) = layers.get(own) else {
        return vec![broken(
            source,
            1,
            format!("module {own} has no layer in tests/tidy/rules.rs"),
        )];
    };
    let mut breaks = Breaks::new();
    for (at, name) in imports(&source.code) {
        let upward = layers.get(name.as_str()).is_some_and(|other| other >= layer);
        if name != own && upward {
            let line = crate::source::line_of(&source.code, at);
            let what = format!("{own} (L{layer}) imports {name} (L{})", layers[name.as_str()]);
            breaks.push(broken(source, line, what));
        }
    }
    breaks
}

/// `src/lib.rs` tells the same modules and layers, and declares them.
pub(crate) fn map(lib: &str) -> Breaks {
    let mut told: Vec<(String, u32)> = Vec::new();
    let mut declared: Vec<String> = Vec::new();
    for line in lib.lines() {
        if let Some(rest) = line.strip_prefix("//! - [`")
            && let Some((name, rest)) = rest.split_once("`] (L")
            && let Some(layer) = rest.split(')').next().and_then(|layer| layer.parse().ok())
        {
            told.push((name.to_owned(), layer));
        }
        if let Some(name) = line.strip_prefix("pub mod ").and_then(|rest| rest.strip_suffix(';')) {
            declared.push(name.to_owned());
        }
    }
    let mut breaks = Breaks::new();
    let table: Vec<(String, u32)> =
        LAYERS.iter().map(|(name, layer)| ((*name).to_owned(), *layer)).collect();
    if told != table {
        breaks.push(format!("src/lib.rs tells {told:?}, tests/tidy/rules.rs {table:?}"));
    }
    let mut names: Vec<String> = table.into_iter().map(|(name, _)| name).collect();
    names.sort();
    declared.sort();
    if declared != names {
        breaks.push(format!("src/lib.rs declares {declared:?}, and tells of {names:?}"));
    }
    breaks
}

pub(crate) fn unsafe_code(source: &Source) -> Breaks {
    let mut breaks = Breaks::new();
    let path = source.path.to_str().unwrap_or_default();
    let allowed = UNSAFE_FILES.contains(&path) || path.starts_with("tools/");
    let lines: Vec<&str> = source.text.lines().collect();
    for at in words(&source.code, "unsafe") {
        let line = crate::source::line_of(&source.code, at);
        let rest = source.code[at + "unsafe".len()..].trim_start();
        if !allowed && !source.test_lines[line - 1] {
            breaks.push(broken(source, line, "`unsafe` outside of the files that may have it"));
        }
        let wanted = match rest.starts_with("fn") || rest.starts_with("trait") {
            true => "# Safety",
            false => "SAFETY:",
        };
        // The type of a pointer to an unsafe function is no unsafe code.
        let pointer_type = rest.starts_with("fn(") || rest.starts_with("extern");
        if !pointer_type && !explained(&lines, line - 1, wanted) {
            breaks.push(broken(source, line, format!("`unsafe` without its `{wanted}` comment")));
        }
    }
    breaks
}

/// Whether the comment on the line or above the statement that the line belongs to has `wanted`.
fn explained(lines: &[&str], index: usize, wanted: &str) -> bool {
    if lines[index].contains(wanted) {
        return true;
    }
    let mut comment = false;
    for line in lines[..index].iter().rev().map(|line| line.trim()) {
        if line.starts_with("//") {
            comment = true;
            if line.contains(wanted) {
                return true;
            }
        } else if comment || (line.ends_with([';', '{', '}', ',']) && !line.starts_with("#[")) {
            return false;
        }
    }
    false
}

/// What is never left in the code, and what a test must not lean on.
pub(crate) fn words_not_here(source: &Source) -> Breaks {
    let mut breaks = Breaks::new();
    // A loop that asks for a condition until a deadline may pause between two questions.
    let mut recent = [""; 2];
    for (line, code, test) in source.lines() {
        for word in ["todo!", "unimplemented!", "dbg!"] {
            if code.contains(word) {
                breaks.push(broken(source, line, format!("`{word}`")));
            }
        }
        if code.contains("#[ignore") {
            breaks.push(broken(source, line, "an ignored test"));
        }
        let sleeps = code.contains("thread::sleep") || code.contains("time::sleep");
        let asks = recent.iter().any(|line: &&str| line.contains("deadline"));
        if test && sleeps && !asks {
            breaks.push(broken(source, line, "a test that sleeps: wait for what it waits for"));
        }
        recent = [recent[1], code];
    }
    for (index, line) in source.text.lines().enumerate() {
        let comment = line.trim_start().starts_with("//");
        if comment && ["TODO", "FIXME", "XXX"].iter().any(|word| line.contains(word)) {
            breaks.push(broken(source, index + 1, "unfinished work in a comment"));
        }
    }
    breaks
}

/// The parsing modules deny by lint what would panic on foreign bytes.
pub(crate) fn checked(source: &Source) -> Breaks {
    let path = source.path.to_str().unwrap_or_default();
    if !CHECKED.contains(&path) {
        return Breaks::new();
    }
    let denied: String = source
        .code
        .match_indices("#![deny(")
        .filter_map(|(at, _)| source.code[at..].split(']').next())
        .collect();
    let lacks = CHECKED_LINTS.iter().filter(|lint| !denied.contains(&format!("clippy::{lint}")));
    lacks.map(|lint| broken(source, 1, format!("`#![deny(clippy::{lint})]` is missing"))).collect()
}
