//! The formats of traces. Every byte may be wrong: what cannot be is a named error with its place.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use crate::trace::{BLOCK_SECTORS, Request, Unit};
use vflash::base::{Error, ErrorKind, Result};

/// Bytes of a record of vscsiStats, version 1.
const VSCSI_BYTES: usize = 32;
const VSCSI_VERSION: u16 = 0x0100;
const READ_10: u16 = 0x28;
const WRITE_10: u16 = 0x2a;

/// Sectors of one request at most, 64 MiB: above that the length is damaged.
const SECTORS_MAX: u64 = 1 << 17;

/// Sectors of a disk at most, 512 TiB.
const DISK_SECTORS_MAX: u64 = 1 << 40;

fn corrupt(place: impl std::fmt::Display, text: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Corrupt, format!("{place}: {text}"))
}

/// A request that can be, or what is wrong with it.
fn request(
    sector: u64,
    sectors: u64,
    write: bool,
    micros: u64,
) -> std::result::Result<Request, String> {
    if sectors == 0 || sectors > SECTORS_MAX {
        return Err(format!("a request of {sectors} sectors"));
    }
    if sector.checked_add(sectors).is_none_or(|end| end > DISK_SECTORS_MAX) {
        return Err(format!("sector {sector} is beyond any disk"));
    }
    Ok(Request { sector, sectors: sectors as u32, write, micros })
}

/// Little-endian records of 32 bytes: serial u32, bytes u32, scatter-gather entries u32, command
/// u16, version u16, sector u64, microseconds u64. Other commands than READ(10) and WRITE(10) are
/// left out.
pub(crate) fn vscsi(bytes: &[u8]) -> Result<Vec<Request>> {
    let records = bytes.chunks_exact(VSCSI_BYTES);
    if !records.remainder().is_empty() {
        let whole = bytes.len().saturating_sub(records.remainder().len());
        return Err(corrupt(format!("byte {whole}"), "the last record is cut short"));
    }
    let mut requests = Vec::with_capacity(records.len());
    for (index, record) in records.enumerate() {
        let place = || format!("byte {}", index.saturating_mul(VSCSI_BYTES));
        let (length, command) = (field(record, 4, 4), field(record, 12, 2) as u16);
        let version = field(record, 14, 2) as u16;
        if version != VSCSI_VERSION {
            return Err(corrupt(place(), format!("version {version:#06x}, not 0x0100")));
        }
        if !matches!(command, READ_10 | WRITE_10) {
            continue;
        }
        if !length.is_multiple_of(512) {
            return Err(corrupt(place(), format!("{length} bytes are no whole sectors")));
        }
        let (sector, micros) = (field(record, 16, 8), field(record, 24, 8));
        let read = request(sector, length / 512, command == WRITE_10, micros);
        requests.push(read.map_err(|text| corrupt(place(), text))?);
    }
    Ok(requests)
}

/// A little-endian number of `size` bytes.
fn field(record: &[u8], at: usize, size: usize) -> u64 {
    let bytes = record.iter().skip(at).take(size).rev();
    bytes.fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Lines of four numbers: first block, blocks, something to ignore, number of the request. Reads.
pub(crate) fn lis(bytes: &[u8], unit: Unit) -> Result<Vec<Request>> {
    let mut requests = Vec::new();
    for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        let place = || format!("line {}", index.saturating_add(1));
        let text = std::str::from_utf8(line).map_err(|_| corrupt(place(), "not text"))?.trim();
        if text.is_empty() {
            continue;
        }
        let wrong = || corrupt(place(), format!("`{}` is not four numbers", text.escape_debug()));
        let mut numbers = [0_u64; 4];
        let mut words = text.split_ascii_whitespace();
        for number in &mut numbers {
            *number = words.next().and_then(|word| word.parse().ok()).ok_or_else(wrong)?;
        }
        if words.next().is_some() {
            return Err(wrong());
        }
        let [first, count, _, _] = numbers;
        let scale = if unit == Unit::Page { BLOCK_SECTORS } else { 1 };
        let sector = first.saturating_mul(scale);
        let read = request(sector, count.saturating_mul(scale), false, 0);
        requests.push(read.map_err(|text| corrupt(place(), text))?);
    }
    Ok(requests)
}

/// Block numbers of 4 bytes, little-endian; whether they read or write is not told.
pub(crate) fn ids(bytes: &[u8]) -> Result<Vec<Request>> {
    let words = bytes.chunks_exact(4);
    if !words.remainder().is_empty() {
        let whole = bytes.len().saturating_sub(words.remainder().len());
        return Err(corrupt(format!("byte {whole}"), "the last block number is cut short"));
    }
    let read = |word: &[u8]| {
        let sector = field(word, 0, 4).saturating_mul(BLOCK_SECTORS);
        Request { sector, sectors: BLOCK_SECTORS as u32, write: false, micros: 0 }
    };
    Ok(words.map(read).collect())
}
