//! Block traces: files in, requests out.

use crate::format;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use vflash::base::{Error, ErrorKind, Result};

/// Sectors of a 4 KiB block.
pub const BLOCK_SECTORS: u64 = 8;

/// A trace file, unpacked, is at most so large: it is held in memory.
const BYTES_MAX: u64 = 4 << 30;

/// One request of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// 512-byte sectors.
    pub sector: u64,
    /// At least 1.
    pub sectors: u32,
    pub write: bool,
    /// Since the trace's own beginning of time; 0 if it tells none.
    pub micros: u64,
}

impl Request {
    /// The 4 KiB blocks that it touches.
    pub fn blocks(&self) -> impl Iterator<Item = u64> + use<> {
        let last = self.sector.saturating_add(u64::from(self.sectors).saturating_sub(1));
        self.sector / BLOCK_SECTORS..=last / BLOCK_SECTORS
    }
}

/// What a `.lis` file counts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// 512 bytes.
    Sector,
    /// 4 KiB.
    Page,
}

/// A trace in memory.
#[derive(Clone, Debug)]
pub struct Trace {
    /// The file's name up to its first dot.
    pub name: String,
    pub requests: Vec<Request>,
}

impl Trace {
    /// Reads a trace: `.vscsi`, `.lis` or `.trace`, as it is or packed (`.zst`, `.xz`; the programs
    /// of these names must be installed).
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`]: no such format. [`ErrorKind::Corrupt`]: the file is damaged; the
    /// message says where.
    pub fn open(path: &Path, unit: Option<Unit>) -> Result<Self> {
        let file = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let name = file.split('.').next().unwrap_or_default().to_owned();
        // The ARC paper's database trace counts pages, its disk traces sectors.
        let guess = if name.starts_with("OLTP") { Unit::Page } else { Unit::Sector };
        let context = |error: Error| error.context(format!("trace {}", path.display()));
        let (plain, packer) = match file.rsplit_once('.') {
            Some((plain, "zst")) => (plain, Some("zstd")),
            Some((plain, "xz")) => (plain, Some("xz")),
            _ => (file, None),
        };
        let parse = match plain.rsplit_once('.').map(|(_, ending)| ending) {
            Some("vscsi") => Format::Vscsi,
            Some("lis") => Format::Lis(unit.unwrap_or(guess)),
            Some("trace") => Format::Ids,
            _ => {
                let text = "the name ends in none of .vscsi, .lis, .trace, nor these with .zst or \
                            .xz behind";
                return Err(context(Error::new(ErrorKind::Unsupported, text)));
            }
        };
        let bytes = read(path, packer).map_err(context)?;
        let requests = parse.requests(&bytes).map_err(context)?;
        Ok(Self { name, requests })
    }

    /// Every access to a 4 KiB block and whether it is a write, in order.
    pub fn accesses(&self) -> impl Iterator<Item = (u64, bool)> {
        let blocks = |request: &Request| {
            let write = request.write;
            request.blocks().map(move |block| (block, write))
        };
        self.requests.iter().flat_map(blocks)
    }
}

/// How the bytes of a trace are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// VMware's vscsiStats, version 1.
    Vscsi,
    /// Lines of the ARC paper's traces.
    Lis(Unit),
    /// 4-byte little-endian block numbers.
    Ids,
}

impl Format {
    /// Reads the bytes of a whole trace.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], with the byte or line.
    pub fn requests(self, bytes: &[u8]) -> Result<Vec<Request>> {
        match self {
            Self::Vscsi => format::vscsi(bytes),
            Self::Lis(unit) => format::lis(bytes, unit),
            Self::Ids => format::ids(bytes),
        }
    }
}

fn read(path: &Path, packer: Option<&str>) -> Result<Vec<u8>> {
    let Some(packer) = packer else {
        let size = std::fs::metadata(path).map_err(|error| Error::io("opening", error))?.len();
        if size > BYTES_MAX {
            return Err(too_large());
        }
        return std::fs::read(path).map_err(|error| Error::io("reading", error));
    };
    let file = std::fs::File::open(path).map_err(|error| Error::io("opening", error))?;
    let mut child = Command::new(packer)
        .arg("-dcq")
        .stdin(file)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| Error::io(format!("starting {packer}; is it installed?"), error))?;
    let mut bytes = Vec::new();
    let pipe = child.stdout.take().expect("its output was asked for");
    let outcome = pipe.take(BYTES_MAX + 1).read_to_end(&mut bytes);
    if bytes.len() as u64 > BYTES_MAX {
        // It would wait for ever for somebody to read on.
        let _ = child.kill();
        let _ = child.wait();
        return Err(too_large());
    }
    let ended = child.wait_with_output().map_err(|error| Error::io("unpacking", error))?;
    outcome.map_err(|error| Error::io("unpacking", error))?;
    if !ended.status.success() {
        let said = String::from_utf8_lossy(&ended.stderr);
        let text = format!("{packer} cannot unpack it: {}", said.trim());
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    Ok(bytes)
}

fn too_large() -> Error {
    Error::new(ErrorKind::Unsupported, "it has more than 4 GiB; cut it in parts")
}
