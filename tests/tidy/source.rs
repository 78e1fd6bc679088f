//! Rust source as the rules see it: code with strings and comments blanked, and which lines are
//! tests. Knows just enough of the language for that.

use std::ops::Range;
use std::path::{Path, PathBuf};

/// A file of Rust.
pub(crate) struct Source {
    /// From the root of the workspace.
    pub(crate) path: PathBuf,
    pub(crate) text: String,
    /// The text with every character of a string, a character literal or a comment replaced by a
    /// space; lines and columns stay.
    pub(crate) code: String,
    /// By line: within `#[cfg(test)]`, or in a file of tests.
    pub(crate) test_lines: Vec<bool>,
}

/// A function with a body. Lines count from 1.
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) first: usize,
    pub(crate) last: usize,
    /// Without `self`.
    pub(crate) parameters: usize,
    /// In an `impl … for …`.
    pub(crate) of_trait: bool,
}

impl Source {
    pub(crate) fn new(path: &Path, text: String) -> Self {
        let code = blanked(&text);
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let all = name.ends_with("_test.rs")
            || name == "tests.rs"
            || path.components().any(|part| part.as_os_str() == "tests");
        let mut test_lines = vec![all; text.lines().count() + 1];
        for (first, last) in test_modules(&code) {
            test_lines[first..=last].fill(true);
        }
        Self { path: path.to_owned(), text, code, test_lines }
    }

    /// Number (from 1), code and whether it is a test, of every line.
    pub(crate) fn lines(&self) -> impl Iterator<Item = (usize, &str, bool)> {
        let test = |index: usize| self.test_lines.get(index).copied().unwrap_or_default();
        self.code.lines().enumerate().map(move |(index, line)| (index + 1, line, test(index)))
    }

    /// Every function that has a body.
    pub(crate) fn functions(&self) -> Vec<Function> {
        let code = &self.code;
        let (traits, mut functions) = (trait_blocks(code), Vec::new());
        for at in words(code, "fn") {
            let name: String = code[at + 2..]
                .trim_start()
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect();
            let Some(body) = body_of(code, at).filter(|_| !name.is_empty()) else { continue };
            let end = closing(code, body).unwrap_or(code.len());
            let parameters = parameters(&code[at..body]);
            let (first, last) = (line_of(code, at), line_of(code, end));
            let of_trait = traits.iter().any(|block| block.contains(&at));
            functions.push(Function { name, first, last, parameters, of_trait });
        }
        functions
    }
}

/// The line (from 1) of a byte.
pub(crate) fn line_of(code: &str, at: usize) -> usize {
    code[..at].matches('\n').count() + 1
}

/// Where `word` stands as a word of its own.
pub(crate) fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> {
    let inner = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).map(|(at, _)| at).filter(move |at| {
        !code[..*at].ends_with(inner) && !code[at + word.len()..].starts_with(inner)
    })
}

/// The bodies of `impl … for …`.
fn trait_blocks(code: &str) -> Vec<Range<usize>> {
    let block = |at: usize| {
        let open = at + code[at..].find('{')?;
        let end = closing(code, open)?;
        words(&code[at..open], "for").next().map(|_| open..end)
    };
    words(code, "impl").filter_map(block).collect()
}

/// The `{` that opens the body of the function at `at`; `None` if it has none.
fn body_of(code: &str, at: usize) -> Option<usize> {
    let mut depth = 0;
    for (offset, c) in code[at..].char_indices() {
        match c {
            '(' | '[' => depth += 1,
            ')' | ']' => depth -= 1,
            '{' if depth == 0 => return Some(at + offset),
            ';' if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

/// The `}` that belongs to the `{` at `open`.
pub(crate) fn closing(code: &str, open: usize) -> Option<usize> {
    let mut depth = 0_usize;
    for (offset, c) in code[open..].char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(open + offset);
        }
    }
    None
}

/// How many parameters a signature has, `self` not counted.
fn parameters(signature: &str) -> usize {
    // Generic parameters come before: the first parenthesis outside of `<…>`.
    let (mut angle, mut open) = (0_i32, None);
    for (at, c) in signature.char_indices() {
        match c {
            '<' => angle += 1,
            '>' if !signature[..at].ends_with(['-', '=']) => angle -= 1,
            '(' if angle == 0 => {
                open = Some(at);
                break;
            }
            _ => {}
        }
    }
    let Some(open) = open else { return 0 };
    let (mut depth, mut count, mut current) = (0_i32, 0, String::new());
    for (offset, c) in signature[open..].char_indices() {
        let arrow = c == '>' && signature[..open + offset].ends_with(['-', '=']);
        match c {
            '(' | '[' | '{' | '<' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            '>' if !arrow => depth -= 1,
            _ => {}
        }
        if (c == ',' && depth == 1) || depth == 0 {
            let name = current.trim_start_matches('(').trim().to_owned();
            let name = name.split(':').next().unwrap_or_default();
            let is_self = name
                .split_whitespace()
                .last()
                .is_some_and(|word| word.trim_start_matches('&') == "self");
            count += usize::from(!name.trim().is_empty() && !is_self);
            current.clear();
            if depth == 0 {
                break;
            }
        } else {
            current.push(c);
        }
    }
    count
}

/// First and last line index (from 0) of every `#[cfg(test)]` item with a body.
fn test_modules(code: &str) -> Vec<(usize, usize)> {
    let starts = code.match_indices("#[cfg(test)]").map(|(at, _)| at);
    let span = |at: usize| {
        let open = at + code[at..].find(['{', ';'])?;
        let end = match code[open..].starts_with('{') {
            true => closing(code, open)?,
            false => open,
        };
        Some((line_of(code, at) - 1, line_of(code, end) - 1))
    };
    starts.filter_map(span).collect()
}

/// The text with strings, character literals and comments blanked.
pub(crate) fn blanked(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let previous = out.chars().next_back().unwrap_or(' ');
        let length = skipped(rest, previous);
        if length == 0 {
            out.push(c);
            rest = &rest[c.len_utf8()..];
        } else {
            let (skip, after) = rest.split_at(length);
            // As many bytes as before, so that offsets stay.
            let blank = |c: char| if c == '\n' { "\n".into() } else { " ".repeat(c.len_utf8()) };
            out.extend(skip.chars().map(blank));
            rest = after;
        }
    }
    out
}

/// Bytes of the string, character literal or comment that `rest` begins with; 0 if with none.
fn skipped(rest: &str, previous: char) -> usize {
    if rest.starts_with("//") {
        return rest.find('\n').unwrap_or(rest.len());
    }
    if rest.starts_with("/*") {
        return block_comment(rest);
    }
    let in_word = previous.is_alphanumeric() || previous == '_';
    let raw = ["r", "br", "cr"].iter().find_map(|prefix| rest.strip_prefix(prefix));
    if let Some(quoted) = raw.filter(|_| !in_word)
        && let Some(text) = quoted.trim_start_matches('#').strip_prefix('"')
    {
        let start = rest.len() - text.len();
        let end = format!("\"{}", "#".repeat(quoted.len() - text.len() - 1));
        return text.find(&end).map_or(rest.len(), |at| start + at + end.len());
    }
    match rest.as_bytes()[0] {
        b'"' => quoted(rest, '"'),
        b'\'' => character(rest),
        _ => 0,
    }
}

fn block_comment(rest: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        if rest[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += rest[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// A character literal; 0 for a lifetime.
fn character(rest: &str) -> usize {
    let mut after = rest.chars().skip(1);
    match (after.next(), after.next()) {
        (Some('\\'), _) => quoted(rest, '\''),
        (Some(c), Some('\'')) => 2 + c.len_utf8(),
        _ => 0,
    }
}
