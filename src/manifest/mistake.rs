//! Where something stands in a manifest, and what is wrong there.

use std::fmt;
use std::sync::Arc;

/// Mistakes told at once: a file that is not a manifest at all needs no more.
const MISTAKES_MAX: usize = 1000;

/// A place in a source; line and column count from 1, the column in characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The name of the source.
    pub file: Arc<str>,
    pub line: u32,
    pub column: u32,
}

/// `file:line:column`
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}

/// A value and where it stands; a value that was left out stands where it could have been given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located<T> {
    pub value: T,
    pub place: Place,
}

/// Something that must be changed in a manifest before it can be applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    pub place: Place,
    /// What is wrong, and what to write instead.
    pub message: String,
}

impl Mistake {
    pub fn new(place: &Place, message: impl Into<String>) -> Self {
        Self { place: place.clone(), message: message.into() }
    }
}

/// As compilers write it: `file:line:column: message`.
impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)
    }
}

impl std::error::Error for Mistake {}

/// A line and a column, both from 1, of the source that is being read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    pub(super) line: u32,
    pub(super) column: u32,
}

impl Position {
    pub(super) const START: Self = Self { line: 1, column: 1 };
}

/// The mistakes of one source, as they are found.
pub(super) struct Mistakes {
    file: Arc<str>,
    found: Vec<(Position, String)>,
}

impl Mistakes {
    pub(super) fn new(file: Arc<str>) -> Self {
        Self { file, found: Vec::new() }
    }

    pub(super) fn add(&mut self, at: Position, message: impl Into<String>) {
        if !self.full() {
            self.found.push((at, message.into()));
        }
    }

    /// No further mistake is kept: reading on has no use.
    pub(super) fn full(&self) -> bool {
        self.found.len() >= MISTAKES_MAX
    }

    pub(super) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    pub(super) fn place(&self, at: Position) -> Place {
        Place { file: Arc::clone(&self.file), line: at.line, column: at.column }
    }

    /// All of them, in the order of the text.
    pub(super) fn into_sorted(mut self) -> Vec<Mistake> {
        if self.full() {
            let last = self.found.iter().map(|(at, _)| *at).max().unwrap_or(Position::START);
            let text = format!("more than {MISTAKES_MAX} mistakes: the rest is not told");
            self.found.push((last, text));
        }
        self.found.sort_by_key(|(at, _)| *at);
        let found = std::mem::take(&mut self.found);
        let located = |(at, message)| Mistake { place: self.place(at), message };
        found.into_iter().map(located).collect()
    }
}
