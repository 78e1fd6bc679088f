//! The NBD protocol as bytes: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>.
//! Big-endian. Pure; what a server sends is never trusted.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use crate::base::codec::Reader;
use crate::io::disk::{DiskGeometry, Errno};

/// Bytes of the server's greeting.
pub const GREETING_BYTES: usize = 18;
/// Bytes before the data of an option's reply.
pub const OPTION_REPLY_BYTES: usize = 20;
/// Bytes of a request before its data.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply before its data.
pub const REPLY_BYTES: usize = 16;

/// Bytes of an option reply's data at most: ours are small, and errors bring a sentence.
pub const OPTION_DATA_BYTES_MAX: u32 = 64 << 10;

const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

const FLAG_FIXED_NEWSTYLE: u16 = 1;
const FLAG_NO_ZEROES: u16 = 2;

const OPTION_GO: u32 = 7;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERROR: u32 = 1 << 31;

const EXPORT_READ_ONLY: u16 = 1 << 1;
const EXPORT_FLUSH: u16 = 1 << 2;
const EXPORT_FUA: u16 = 1 << 3;
const EXPORT_WRITE_ZEROES: u16 = 1 << 6;

/// Bytes of one request's data if the server does not say.
const PAYLOAD_BYTES_DEFAULT: u32 = 32 << 20;

/// What a server said that it may not, or that we cannot use, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault(pub String);

impl Fault {
    fn new<T>(text: impl Into<String>) -> Result<T, Self> {
        Err(Self(text.into()))
    }
}

/// A request's kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Read,
    Write,
    /// Durable when it is answered.
    WriteDurable,
    /// Says goodbye; there is no answer.
    Disconnect,
    Flush,
    /// Zeros afterwards, and keeps its space.
    WriteZeroes,
    /// Zeros afterwards, and may lose its space.
    Punch,
}

impl Command {
    fn code(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write | Self::WriteDurable => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::WriteZeroes | Self::Punch => 6,
        }
    }

    fn flags(self) -> u16 {
        match self {
            Self::WriteDurable => 1,
            Self::WriteZeroes => 2,
            _ => 0,
        }
    }
}

/// What a server told of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    pub size_bytes: u64,
    flags: u16,
    block_bytes_min: u32,
    block_bytes_preferred: u32,
    /// Of one read or write.
    pub payload_bytes_max: u32,
}

impl Export {
    pub fn read_only(&self) -> bool {
        self.flags & EXPORT_READ_ONLY != 0
    }

    pub fn can_flush(&self) -> bool {
        self.flags & EXPORT_FLUSH != 0
    }

    /// Writes can be made durable one by one.
    pub fn can_write_durably(&self) -> bool {
        self.flags & EXPORT_FUA != 0
    }

    /// Ranges can be zeroed, with and without losing their space. Trimming by itself is a hint
    /// that leaves the content open, so it is not used.
    pub fn can_zero(&self) -> bool {
        self.flags & EXPORT_WRITE_ZEROES != 0
    }

    pub fn geometry(&self) -> DiskGeometry {
        let block_bytes = self.block_bytes_min.max(512);
        DiskGeometry {
            size_bytes: self.size_bytes,
            block_bytes,
            optimal_bytes: self.block_bytes_preferred.clamp(4096, 1 << 20).max(block_bytes),
            memory_alignment: 1,
            zero: self.can_zero(),
            discard: self.can_zero(),
        }
    }

    /// Whether it is the same export as before a reconnect, as far as we depend on it.
    pub fn difference(&self, now: &Self) -> Option<String> {
        if self.size_bytes != now.size_bytes {
            let (was, is) = (self.size_bytes, now.size_bytes);
            return Some(format!("the export had {was} bytes and has {is}"));
        }
        let lost = self.flags & !now.flags & (EXPORT_FLUSH | EXPORT_FUA | EXPORT_WRITE_ZEROES);
        let gained = now.flags & !self.flags & EXPORT_READ_ONLY;
        let coarser = now.block_bytes_min > self.block_bytes_min.max(512)
            || now.payload_bytes_max < self.payload_bytes_max;
        (lost | gained != 0 || coarser).then(|| "the export can do less than before".to_owned())
    }
}

/// Checks the greeting and returns our answer to it.
pub fn answer_greeting(greeting: &[u8; GREETING_BYTES]) -> Result<[u8; 4], Fault> {
    let mut reader = Reader::new(greeting);
    let (magic, style, flags) = (be64(&mut reader), be64(&mut reader), be16(&mut reader));
    if magic != Some(GREETING_MAGIC) {
        return Fault::new("this is no NBD server");
    }
    if style != Some(OPTION_MAGIC) || flags.is_none_or(|flags| flags & FLAG_FIXED_NEWSTYLE == 0) {
        return Fault::new("the server is too old: it lacks fixed newstyle negotiation");
    }
    let both = flags.unwrap_or(0) & FLAG_NO_ZEROES | FLAG_FIXED_NEWSTYLE;
    Ok(u32::from(both).to_be_bytes())
}

/// Asks for an export, with its block sizes.
pub fn go(export: &str) -> Vec<u8> {
    let name = export.as_bytes();
    let mut data = Vec::new();
    data.extend_from_slice(&(name.len() as u32).to_be_bytes());
    data.extend_from_slice(name);
    data.extend_from_slice(&1u16.to_be_bytes());
    data.extend_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&OPTION_GO.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(&data);
    bytes
}

/// The head of a reply to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReply {
    kind: u32,
    /// Of the data that follows.
    pub length: u32,
}

pub fn option_reply(bytes: &[u8; OPTION_REPLY_BYTES]) -> Result<OptionReply, Fault> {
    let mut reader = Reader::new(bytes);
    let (magic, option) = (be64(&mut reader), be32(&mut reader));
    let (Some(kind), Some(length)) = (be32(&mut reader), be32(&mut reader)) else {
        return Fault::new("a short reply");
    };
    if magic != Some(OPTION_REPLY_MAGIC) || option != Some(OPTION_GO) {
        return Fault::new("a reply to an option that was not asked");
    }
    if length > OPTION_DATA_BYTES_MAX {
        return Fault::new(format!("a reply of {length} bytes to an option"));
    }
    Ok(OptionReply { kind, length })
}

/// What the replies to [`go`] add up to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Negotiation {
    size_and_flags: Option<(u64, u16)>,
    blocks: Option<(u32, u32, u32)>,
}

impl Negotiation {
    /// Takes one reply in; the export once it is complete.
    pub fn reply(&mut self, head: OptionReply, data: &[u8]) -> Result<Option<Export>, Fault> {
        match head.kind {
            REPLY_ACK => self.finish().map(Some),
            REPLY_INFO => self.info(data).map(|()| None),
            kind if kind & REPLY_ERROR != 0 => Fault::new(refusal(kind, data)),
            kind => Fault::new(format!("an option reply of unknown kind {kind}")),
        }
    }

    fn info(&mut self, data: &[u8]) -> Result<(), Fault> {
        let mut reader = Reader::new(data);
        let short = || Fault("an information that is too short".to_owned());
        match be16(&mut reader).ok_or_else(short)? {
            INFO_EXPORT => {
                let both = be64(&mut reader).zip(be16(&mut reader));
                self.size_and_flags = Some(both.ok_or_else(short)?);
            }
            INFO_BLOCK_SIZE => {
                let sizes = [be32(&mut reader), be32(&mut reader), be32(&mut reader)];
                let [Some(least), Some(preferred), Some(most)] = sizes else {
                    return Err(short());
                };
                self.blocks = Some((least, preferred, most));
            }
            // Others may come unasked.
            _ => {}
        }
        Ok(())
    }

    fn finish(&self) -> Result<Export, Fault> {
        let Some((size_bytes, flags)) = self.size_and_flags else {
            return Fault::new("the server does not tell the size of the export");
        };
        let (least, preferred, most) = self.blocks.unwrap_or((1, 4096, PAYLOAD_BYTES_DEFAULT));
        let sound = least.is_power_of_two() && preferred.is_power_of_two() && most >= least;
        if !sound || least > 4096 {
            return Fault::new(format!(
                "block sizes that cannot be served: {least}, {preferred}, {most}"
            ));
        }
        if size_bytes == 0 || !size_bytes.is_multiple_of(u64::from(least.max(512))) {
            return Fault::new(format!(
                "the export's size, {size_bytes} bytes, is no multiple of its blocks"
            ));
        }
        if size_bytes > i64::MAX as u64 {
            return Fault::new(format!("an export of {size_bytes} bytes"));
        }
        // Whole blocks, and never more than what every server takes.
        let payload = most.min(PAYLOAD_BYTES_DEFAULT) & !4095;
        if payload == 0 {
            return Fault::new(format!("a server that takes {most} bytes a request"));
        }
        Ok(Export {
            size_bytes,
            flags,
            block_bytes_min: least,
            block_bytes_preferred: preferred,
            payload_bytes_max: payload,
        })
    }
}

fn refusal(kind: u32, data: &[u8]) -> String {
    let what = match kind & !REPLY_ERROR {
        1 => "it is too old: it lacks NBD_OPT_GO",
        2 => "its policy forbids it",
        4 => "it cannot on its platform",
        5 => "it wants TLS, which is not supported",
        6 => "it has no such export",
        7 => "it is shutting down",
        8 => "it insists on block sizes",
        _ => "it gives no known reason",
    };
    // The server's own words, without what could confuse a terminal.
    let words: String = String::from_utf8_lossy(data.get(..200).unwrap_or(data))
        .chars()
        .filter(|c| !c.is_control())
        .collect();
    match words.is_empty() {
        true => format!("the server refuses the export: {what}"),
        false => format!("the server refuses the export: {what} ({words})"),
    }
}

/// A request's head.
pub fn request(command: Command, cookie: u64, offset: u64, length: u32) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    let fields: [&[u8]; 6] = [
        &REQUEST_MAGIC.to_be_bytes(),
        &command.flags().to_be_bytes(),
        &command.code().to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ];
    for (place, byte) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
        *place = *byte;
    }
    bytes
}

/// A reply's head: which request, and how it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    pub cookie: u64,
    /// 0: done.
    pub error: u32,
}

/// The server is going away; the request may be sent again elsewhere.
pub const ERROR_SHUTDOWN: u32 = 108;

pub fn reply(bytes: &[u8; REPLY_BYTES]) -> Result<Reply, Fault> {
    let mut reader = Reader::new(bytes);
    let magic = be32(&mut reader);
    let (Some(error), Some(cookie)) = (be32(&mut reader), be64(&mut reader)) else {
        return Fault::new("a short reply");
    };
    if magic != Some(REPLY_MAGIC) {
        return Fault::new("what should be a reply is none");
    }
    Ok(Reply { cookie, error })
}

/// NBD's error numbers are Linux's, those that it knows.
pub fn errno(error: u32) -> Errno {
    match error {
        1 => Errno(libc::EPERM),
        12 => Errno(libc::ENOMEM),
        28 => Errno(libc::ENOSPC),
        95 => Errno(libc::EOPNOTSUPP),
        // Not EINVAL: our callers take that for "cannot", and go another way.
        _ => Errno::EIO,
    }
}

fn be16(reader: &mut Reader<'_>) -> Option<u16> {
    reader.array().map(u16::from_be_bytes)
}

fn be32(reader: &mut Reader<'_>) -> Option<u32> {
    reader.array().map(u32::from_be_bytes)
}

fn be64(reader: &mut Reader<'_>) -> Option<u64> {
    reader.array().map(u64::from_be_bytes)
}
