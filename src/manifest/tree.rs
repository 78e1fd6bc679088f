//! YAML as a tree with positions, of the part of YAML that means the same to every reader: no
//! anchors, aliases, tags, merge keys, duplicate keys, keys that are not plain words, or texts over
//! several lines.

use super::mistake::{Mistakes, Position};
use saphyr_parser::{Event, Marker, Parser, ScalarStyle, ScanError};
use std::collections::HashMap;

/// Levels of lists and mappings; a manifest needs six.
const DEPTH_MAX: usize = 16;

/// Values of one file, keys included: a host full of volumes with every key needs 25,000. Bounds
/// the time and the memory that a file can take.
const NODES_MAX: usize = 1 << 15;

/// Characters of one file that may stand between values. The scanner reads a `[` or `{` to its end
/// before it gives out anything, so the count of nodes alone would come too late.
const INDICATORS_MAX: usize = 2 * NODES_MAX;

/// Bytes of a line; the longest path fits twice.
const LINE_BYTES_MAX: usize = 8192;

/// Documents of one file; as many as a host has machines and pools.
const DOCUMENTS_MAX: usize = 1024;

#[derive(Debug)]
pub(super) struct Node {
    pub(super) at: Position,
    pub(super) value: Value,
}

#[derive(Debug)]
pub(super) enum Value {
    Scalar {
        text: String,
        /// Without quotes: YAML may take it for something else than text.
        plain: bool,
    },
    List(Vec<Node>),
    Mapping(Vec<(Key, Node)>),
    /// Something that was refused already: nothing more is said about it.
    Refused,
}

#[derive(Debug)]
pub(super) struct Key {
    pub(super) at: Position,
    pub(super) text: String,
}

impl Node {
    /// `key:` with nothing behind it, `~` or `null`.
    pub(super) fn is_null(&self) -> bool {
        let null = ["", "~", "null", "Null", "NULL"];
        matches!(&self.value, Value::Scalar { text, plain: true } if null.contains(&text.as_str()))
    }
}

/// The documents of a source up to the first fault of syntax, empty ones left out.
pub(super) fn documents(text: &str, mistakes: &mut Mistakes) -> Vec<Node> {
    // The scanner counts some of these line ends twice.
    let text = text.replace("\r\n", "\n");
    if let Some((at, message)) = unreadable(&text) {
        mistakes.add(at, message);
        return Vec::new();
    }
    let mut parser = Parser::new_from_str(&text);
    let mut builder = Builder::default();
    while !mistakes.full() {
        match parser.next_event() {
            None => break,
            Some(Ok((event, span))) => {
                let at = position(span.start);
                let lines = span.end.line().saturating_sub(span.start.line());
                if is_text_of_lines(&event, lines) {
                    mistakes.add(at, "a text over several lines: write it in one");
                    break;
                }
                if builder.take(event, at, mistakes).is_err() {
                    break;
                }
            }
            Some(Err(error)) => {
                mistakes.add(position(*error.marker()), syntax(&error));
                break;
            }
        }
    }
    builder.documents
}

/// What is wrong with the text before it is read as YAML: a character that YAML forbids or that
/// only some readers take for the end of a line; a tab that only some readers take for indentation;
/// more in one line or in one file than the scanner should hoard.
fn unreadable(text: &str) -> Option<(Position, String)> {
    let good = |c: char| match c {
        '\t' | ' '..='~' => true,
        '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}' => false,
        '\u{a0}'.. => true,
        _ => false,
    };
    let mut indicators = 0_usize;
    let from_one = |count: usize| u32::try_from(count).map_or(u32::MAX, |n| n.saturating_add(1));
    for (index, line) in text.split('\n').enumerate() {
        let at = |column| Position { line: from_one(index), column: from_one(column) };
        if line.len() > LINE_BYTES_MAX {
            return Some((
                at(0),
                format!("the line has more than {LINE_BYTES_MAX} bytes: break it"),
            ));
        }
        indicators = indicators.saturating_add(line.matches([',', ':', '?', '[', '{']).count());
        if indicators > INDICATORS_MAX {
            return Some((at(0), too_many_values()));
        }
        if let Some(column) = line.chars().position(|c| !good(c)) {
            let text = match line.chars().nth(column) {
                Some('\u{feff}') => "a byte order mark: save the file as UTF-8 without one",
                _ => "a character that cannot be printed: remove it",
            };
            return Some((at(column), text.to_owned()));
        }
        let indented = line.find(|c| c != ' ').unwrap_or(0);
        if line.split_at_checked(indented).is_some_and(|(_, rest)| rest.starts_with('\t')) {
            return Some((at(indented), "a tab indents here: YAML takes spaces only".to_owned()));
        }
    }
    None
}

fn too_many_values() -> String {
    format!("more than {NODES_MAX} values: split the file")
}

fn position(marker: Marker) -> Position {
    let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    Position { line: number(marker.line()).max(1), column: number(marker.col()).saturating_add(1) }
}

/// Readers differ about the ends of such texts, and nothing in a manifest needs them.
fn is_text_of_lines(event: &Event<'_>, lines: usize) -> bool {
    match event {
        Event::Scalar(_, ScalarStyle::Literal | ScalarStyle::Folded, ..) => true,
        Event::Scalar(text, ..) => lines > 0 && !text.is_empty(),
        _ => false,
    }
}

/// Reading cannot go on.
struct Stopped;

/// A list or a mapping that is not closed yet.
enum Open {
    List(Vec<Node>),
    Mapping {
        entries: Vec<(Key, Node)>,
        /// Lines of the keys so far.
        lines: HashMap<String, u32>,
        /// The key whose value comes next; inner `None`: refused, its value is dropped.
        key: Option<Option<Key>>,
    },
}

#[derive(Default)]
struct Builder {
    open: Vec<(Position, Open)>,
    documents: Vec<Node>,
    nodes: usize,
}

impl Builder {
    fn take(
        &mut self,
        event: Event<'_>,
        at: Position,
        mistakes: &mut Mistakes,
    ) -> Result<(), Stopped> {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                refuse_extras(anchor, tag.is_some(), at, mistakes);
                let plain = style == ScalarStyle::Plain;
                // Within `{…}` and `[…]` some readers take the mark for that of a key.
                if plain && text.starts_with('?') {
                    mistakes.add(at, "a text that begins with `?`: put it in quotes");
                }
                self.place(Node { at, value: Value::Scalar { text: text.into(), plain } }, mistakes)
            }
            Event::SequenceStart(anchor, tag) => {
                refuse_extras(anchor, tag.is_some(), at, mistakes);
                self.open(at, Open::List(Vec::new()), mistakes)
            }
            Event::MappingStart(anchor, tag) => {
                refuse_extras(anchor, tag.is_some(), at, mistakes);
                let (entries, lines) = (Vec::new(), HashMap::new());
                self.open(at, Open::Mapping { entries, lines, key: None }, mistakes)
            }
            Event::SequenceEnd | Event::MappingEnd => {
                let Some((at, open)) = self.open.pop() else { return Err(Stopped) };
                let value = match open {
                    Open::List(items) => Value::List(items),
                    Open::Mapping { entries, .. } => Value::Mapping(entries),
                };
                self.place(Node { at, value }, mistakes)
            }
            Event::Alias(_) => {
                mistakes.add(at, "YAML aliases are not taken: write the value itself here");
                self.place(Node { at, value: Value::Refused }, mistakes)
            }
            _ => Ok(()),
        }
    }

    fn open(&mut self, at: Position, open: Open, mistakes: &mut Mistakes) -> Result<(), Stopped> {
        if self.open.len() >= DEPTH_MAX {
            let text = format!("more than {DEPTH_MAX} levels deep: no manifest needs that");
            mistakes.add(at, text);
            return Err(Stopped);
        }
        self.open.push((at, open));
        Ok(())
    }

    /// Puts a finished node where it belongs.
    fn place(&mut self, node: Node, mistakes: &mut Mistakes) -> Result<(), Stopped> {
        self.nodes = self.nodes.saturating_add(1);
        if self.nodes > NODES_MAX {
            mistakes.add(node.at, too_many_values());
            return Err(Stopped);
        }
        match self.open.last_mut() {
            Some((_, Open::List(items))) => items.push(node),
            Some((_, Open::Mapping { entries, lines, key })) => match key.take() {
                None => *key = Some(as_key(node, lines, mistakes)),
                Some(None) => {}
                Some(Some(key)) => entries.push((key, node)),
            },
            None if node.is_null() => {}
            None if self.documents.len() >= DOCUMENTS_MAX => {
                let text = format!("more than {DOCUMENTS_MAX} documents: split the file");
                mistakes.add(node.at, text);
                return Err(Stopped);
            }
            None => self.documents.push(node),
        }
        Ok(())
    }
}

/// The key of a mapping's entry, unless it is refused.
fn as_key(node: Node, lines: &mut HashMap<String, u32>, mistakes: &mut Mistakes) -> Option<Key> {
    let Node { at, value: Value::Scalar { text, .. } } = node else {
        mistakes.add(node.at, "a key is one word: write `key: value`");
        return None;
    };
    if text == "<<" {
        mistakes.add(at, "YAML merge keys are not taken: write the keys themselves here");
        return None;
    }
    if let Some(first) = lines.get(&text) {
        let or = match text.as_str() {
            "apiVersion" => ", or begin the next document with `---`",
            _ => "",
        };
        let text = format!("`{}` was given on line {first} already: keep one{or}", shown(&text));
        mistakes.add(at, text);
        return None;
    }
    lines.insert(text.clone(), at.line);
    Some(Key { at, text })
}

fn refuse_extras(anchor: usize, tagged: bool, at: Position, mistakes: &mut Mistakes) {
    if anchor != 0 {
        mistakes.add(at, "YAML anchors (`&name`) are not taken: leave it out");
    }
    if tagged {
        mistakes.add(at, "YAML tags (`!name`) are not taken: leave it out");
    }
}

/// A text for a message: on one line, and short.
pub(super) fn shown(text: &str) -> String {
    const LENGTH_MAX: usize = 40;
    let mut shown: String = text.chars().take(LENGTH_MAX).flat_map(char::escape_debug).collect();
    if text.chars().nth(LENGTH_MAX).is_some() {
        shown.push('…');
    }
    shown.replace("\\'", "'").replace("\\\"", "\"")
}

/// What a scanner's complaint most likely means to the one who wrote the manifest.
fn syntax(error: &ScanError) -> String {
    let hints = [
        ("unknown anchor", "YAML aliases are not taken: write the value itself here"),
        ("tab", "a tab indents here: YAML takes spaces only"),
        ("mapping values are not allowed", "`:` within a value: put the value in quotes"),
        ("recursion limit", "too many levels deep: no manifest needs that"),
        ("simple key expect", "a line without `key: value`: give it a key, or indent it"),
        ("did not find expected ',' or '}'", "a `{` is not closed: write `{key: value, …}`"),
        ("expected ',' or ']'", "a `[` is not closed: write `[value, …]`"),
        ("unexpected end of stream", "a quote is not closed"),
        ("did not find expected key", "the indentation differs from the keys above: align it"),
        ("expected '-' indicator", "the indentation differs from the `-` above: align it"),
        ("unknown escape", "an unknown `\\` escape in double quotes: use single quotes"),
        ("<document start>", "a document begins with `---` here, or leave the directive out"),
        ("illegal placement of ':'", "no `:` can be here: is a `[` or `{` above not closed?"),
        ("indentation in quoted", "a quote is not closed"),
        ("trailing content", "text after the closing quote: put all of it in quotes"),
        ("unexpected character", "a value that begins with this character needs quotes"),
        ("cannot start", "a value that begins with this character needs quotes"),
    ];
    let info = error.info();
    match hints.iter().find(|(part, _)| info.contains(part)) {
        Some((_, hint)) => (*hint).to_owned(),
        None => format!("this is not YAML: {info}"),
    }
}
