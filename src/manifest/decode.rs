//! Typed reading of the tree: what a mapping may hold, and complaints with their places.

use super::mistake::{Located, Mistakes, Position};
use super::tree::{Key, Node, Value, shown};
use super::value::{self, Read};
use std::path::Path;

/// One source while it is read.
pub(super) struct Decoder<'s> {
    pub(super) mistakes: &'s mut Mistakes,
    /// Where relative paths start.
    pub(super) directory: Option<&'s Path>,
}

/// A mapping whose keys were all checked to be known.
pub(super) struct Fields<'n> {
    entries: &'n [(Key, Node)],
    /// The mapping as its reader knows it.
    what: &'static str,
    /// Known keys that unknown ones were taken for: they are not missed as well.
    misspelt: Vec<&'static str>,
    pub(super) at: Position,
}

impl<'n> Fields<'n> {
    pub(super) fn get(&self, name: &str) -> Option<&'n Node> {
        self.entries.iter().find(|(key, _)| key.text == name).map(|(_, node)| node)
    }

    /// Neither the key nor a misspelling of it is there.
    pub(super) fn lacks(&self, name: &str) -> bool {
        self.get(name).is_none() && !self.misspelt.contains(&name)
    }

    /// Where the key stands; the mapping itself without it.
    pub(super) fn key_at(&self, name: &str) -> Position {
        let key = self.entries.iter().find(|(key, _)| key.text == name);
        key.map_or(self.at, |(key, _)| key.at)
    }
}

impl Decoder<'_> {
    pub(super) fn mistake(&mut self, at: Position, message: impl Into<String>) {
        self.mistakes.add(at, message);
    }

    pub(super) fn located<T>(&self, at: Position, value: T) -> Located<T> {
        Located { value, place: self.mistakes.place(at) }
    }

    /// The keys of a mapping; complains about each that is not in `known`. `at` is where to
    /// complain about the whole.
    pub(super) fn fields<'n>(
        &mut self,
        node: &'n Node,
        at: Position,
        what: &'static str,
        known: &[&'static str],
    ) -> Option<Fields<'n>> {
        let Value::Mapping(entries) = &node.value else {
            if !matches!(node.value, Value::Refused) {
                let keys = known.join("`, `");
                self.mistake(at, format!("{what} is a mapping: give it keys of `{keys}`"));
            }
            return None;
        };
        let mut misspelt = Vec::new();
        for (key, _) in entries.iter().filter(|(key, _)| !known.contains(&key.text.as_str())) {
            if self.mistakes.full() {
                return None;
            }
            let shown = shown(&key.text);
            match nearest(&key.text, known) {
                Some(near) => {
                    misspelt.push(near);
                    self.mistake(key.at, format!("{what} has no key `{shown}`: write `{near}`"));
                }
                None => {
                    let keys = known.join("`, `");
                    let text = format!("{what} has no key `{shown}`: its keys are `{keys}`");
                    self.mistake(key.at, text);
                }
            }
        }
        Some(Fields { entries, what, misspelt, at })
    }

    /// A value that must be there. `example` is `key: value` as it could be written.
    pub(super) fn required<'n>(
        &mut self,
        fields: &Fields<'n>,
        name: &str,
        example: &str,
    ) -> Option<&'n Node> {
        match fields.get(name) {
            None if !fields.lacks(name) => None,
            None => {
                let what = fields.what;
                self.mistake(fields.at, format!("{what} lacks `{name}`: add `{example}`"));
                None
            }
            Some(node) if node.is_null() => {
                let at = fields.key_at(name);
                self.mistake(at, format!("`{name}` has no value: write `{example}`"));
                None
            }
            Some(node) => Some(node),
        }
    }

    /// A value that may be left out, but not be empty. Outer `None`: there was a mistake.
    pub(super) fn optional<T>(
        &mut self,
        fields: &Fields<'_>,
        name: &str,
        read: impl FnOnce(&mut Self, &Node) -> Option<T>,
    ) -> Option<Option<T>> {
        match fields.get(name) {
            None => Some(None),
            Some(node) if node.is_null() => {
                let at = fields.key_at(name);
                self.mistake(at, format!("`{name}` has no value: give it one, or leave it out"));
                None
            }
            Some(node) => read(self, node).map(Some),
        }
    }

    /// A scalar, read by `read` from its text and from whether it stands without quotes.
    pub(super) fn scalar<T>(
        &mut self,
        node: &Node,
        read: impl FnOnce(&str, bool) -> Read<T>,
    ) -> Option<T> {
        let kind = match &node.value {
            Value::Scalar { text, plain } => {
                return read(text, *plain).map_err(|text| self.mistake(node.at, text)).ok();
            }
            Value::List(_) => "a list",
            Value::Mapping(_) => "a mapping",
            Value::Refused => return None,
        };
        self.mistake(node.at, format!("a single value is wanted here, not {kind}"));
        None
    }

    pub(super) fn located_scalar<T>(
        &mut self,
        node: &Node,
        read: impl FnOnce(&str, bool) -> Read<T>,
    ) -> Option<Located<T>> {
        let value = self.scalar(node, read)?;
        Some(self.located(node.at, value))
    }

    /// One of a few words.
    pub(super) fn choice<T: Copy>(&mut self, node: &Node, words: &[(&str, T)]) -> Option<T> {
        self.scalar(node, |text, _| {
            let found = words.iter().find(|(word, _)| *word == text);
            found.map(|(_, value)| *value).ok_or_else(|| {
                let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
                match nearest(text, &known) {
                    Some(near) => format!("`{}`: write `{near}`", shown(text)),
                    None => format!("`{}`: write one of `{}`", shown(text), known.join("`, `")),
                }
            })
        })
    }

    pub(super) fn truth(&mut self, node: &Node) -> Option<bool> {
        self.scalar(node, value::truth)
    }
}

/// The known word that was most likely meant: the same but for case, hyphens and a slip or two.
pub(super) fn nearest<'k>(text: &str, known: &[&'k str]) -> Option<&'k str> {
    const LENGTH_MAX: usize = 64;
    if text.len() > LENGTH_MAX {
        return None;
    }
    let bare = |text: &str| text.to_ascii_lowercase().replace(['-', '_'], "");
    let wanted = bare(text);
    let distance = |word: &str| strsim::damerau_levenshtein(&wanted, &bare(word));
    let (slips, word) = known.iter().map(|word| (distance(word), *word)).min()?;
    (slips <= word.len().div_ceil(3).min(3)).then_some(word)
}
