//! From sources to what they want: the documents, kind by kind.

use super::decode::{Decoder, Fields};
use super::machine::machine;
use super::mistake::{Located, Mistake, Mistakes, Place, Position};
use super::schema::{API_VERSION, Device, Pool, Wanted};
use super::tree::{self, Node, shown};
use super::value;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

/// Bytes of one source.
pub const SOURCE_BYTES_MAX: usize = 1 << 20;

/// A file of manifests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Stands before line and column in messages.
    pub name: String,
    /// Where relative paths start; absolute. `None` (standard input): relative paths are refused.
    pub directory: Option<PathBuf>,
    pub text: String,
}

/// Reads all sources as one manifest, or tells every mistake, in the order of sources and lines.
pub fn parse(sources: &[Source]) -> Result<Wanted, Vec<Mistake>> {
    let mut reader = Reader::default();
    let mut all = Vec::new();
    for source in sources {
        let mut mistakes = Mistakes::new(Arc::from(source.name.as_str()));
        reader.source(source, &mut mistakes);
        all.append(&mut mistakes.into_sorted());
    }
    if all.is_empty() { Ok(reader.wanted) } else { Err(all) }
}

pub(super) fn too_large() -> String {
    format!("the file has more than {SOURCE_BYTES_MAX} bytes: split it into several")
}

#[derive(Clone, Copy)]
enum Kind {
    Pool,
    VirtualMachine,
}

#[derive(Default)]
struct Reader {
    wanted: Wanted,
    pools: HashMap<String, Place>,
    machines: HashMap<String, Place>,
    devices: HashMap<PathBuf, Place>,
}

impl Reader {
    fn source(&mut self, source: &Source, mistakes: &mut Mistakes) {
        if source.text.len() > SOURCE_BYTES_MAX {
            return mistakes.add(Position::START, too_large());
        }
        let documents = tree::documents(&source.text, mistakes);
        let mut decoder = Decoder { mistakes, directory: source.directory.as_deref() };
        for document in &documents {
            self.document(document, &mut decoder);
        }
        if documents.is_empty() && decoder.mistakes.is_empty() {
            let text = "there is no document here: begin with `apiVersion: vflash/v1`";
            decoder.mistake(Position::START, text);
        }
    }

    fn document(&mut self, node: &Node, decoder: &mut Decoder<'_>) -> Option<()> {
        if decoder.mistakes.full() {
            return None;
        }
        let keys = ["apiVersion", "kind", "metadata", "spec"];
        let fields = decoder.fields(node, node.at, "a document", &keys)?;
        if let Some(node) = decoder.required(&fields, "apiVersion", "apiVersion: vflash/v1") {
            decoder.scalar(node, |text, _| match text {
                API_VERSION => Ok(()),
                _ => Err(format!("`{}`: write `{API_VERSION}`", shown(text))),
            });
        }
        let kind = decoder.required(&fields, "kind", "kind: VirtualMachine").and_then(|node| {
            let kinds = [("Pool", Kind::Pool), ("VirtualMachine", Kind::VirtualMachine)];
            decoder.choice(node, &kinds)
        });
        let name = document_name(&fields, decoder);
        let spec = decoder.required(&fields, "spec", "spec: {…}");
        match kind? {
            Kind::Pool => {
                let new = claim(&mut self.pools, name.as_ref(), "pool", decoder);
                let name = name.filter(|_| new);
                let pool = self.pool(spec?, fields.key_at("spec"), name, decoder)?;
                self.wanted.pools.push(pool);
            }
            Kind::VirtualMachine => {
                let new = claim(&mut self.machines, name.as_ref(), "virtual machine", decoder);
                let name = name.filter(|_| new);
                let machine = machine(spec?, fields.key_at("spec"), name, decoder)?;
                self.wanted.machines.push(machine);
            }
        }
        Some(())
    }

    fn pool(
        &mut self,
        spec: &Node,
        at: Position,
        name: Option<Located<String>>,
        decoder: &mut Decoder<'_>,
    ) -> Option<Pool> {
        let fields = decoder.fields(spec, at, "the spec of a Pool", &["device", "size"])?;
        let directory = decoder.directory;
        let device = decoder.required(&fields, "device", "device: /dev/nvme0n1").and_then(|node| {
            decoder.located_scalar(node, |text, plain| value::device(text, plain, directory))
        });
        let size = decoder.optional(&fields, "size", |decoder, node| {
            decoder.located_scalar(node, |text, _| value::pool_size(text))
        });
        let (device, size) = (device?, size?);
        if size.is_some() {
            let at = fields.key_at("size");
            match &device.value {
                Device::Null { .. } => {
                    decoder.mistake(at, "a null pool has its size in `device`: leave `size` out");
                }
                Device::Path(path) if path.starts_with("/dev") => decoder.mistake(
                    at,
                    "`size` is for a file to be created, and nothing is created under /dev: leave \
                     it out",
                ),
                Device::Path(_) => {}
            }
        }
        let name = name?;
        if let Device::Path(path) = &device.value
            && let Some(other) = self.devices.insert(path.clone(), device.place.clone())
        {
            let at = fields.get("device").map_or(fields.at, |node| node.at);
            let device = &device.value;
            let text = format!("{device} is the device of the pool at {other}: name another");
            decoder.mistake(at, text);
        }
        Some(Pool { name, device, size })
    }
}

/// `metadata: {name: …}`
fn document_name(fields: &Fields<'_>, decoder: &mut Decoder<'_>) -> Option<Located<String>> {
    let metadata = decoder.required(fields, "metadata", "metadata: {name: web-1}")?;
    let fields = decoder.fields(metadata, fields.key_at("metadata"), "`metadata`", &["name"])?;
    let node = decoder.required(&fields, "name", "name: web-1")?;
    decoder.located_scalar(node, value::name)
}

/// Notes a name; false, after a complaint, if it was given before.
pub(super) fn claim(
    names: &mut HashMap<String, Place>,
    name: Option<&Located<String>>,
    what: &str,
    decoder: &mut Decoder<'_>,
) -> bool {
    let Some(Located { value, place }) = name else { return false };
    if let Some(first) = names.get(value) {
        let at = Position { line: place.line, column: place.column };
        decoder.mistake(at, format!("{what} `{value}` was given at {first} already: rename one"));
        return false;
    }
    names.insert(value.clone(), place.clone());
    true
}
