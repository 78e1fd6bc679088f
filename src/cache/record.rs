//! Batches and records: what one append writes, as bytes. Pure.
//!
//! A batch is a header with one entry a record, padded to the drive's block, then the data of all
//! records, exact sectors. The header's checksum is seeded with its segment's salt and covers the
//! entries; the data is covered by one checksum a *piece*, the part of a write inside one 4 KiB
//! block of the disk.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use super::layout::{
    BATCH_BYTES_MAX, BATCH_CHECKSUM, BATCH_HEADER_BYTES, BATCH_MAGIC, ENTRY_BYTES, NAME_BYTES_MAX,
    NUMBER_MAX, SECTORS_MAX,
};
use super::root::seed;
use crate::base::checksum::{content, crc32c};
use crate::base::codec::Reader;
use crate::base::limits::{DOORS_MAX, QUEUES_MAX};
use crate::base::planted::{Bug, planted};
use crate::base::units::SECTOR_BYTES;

/// Sectors of a block of the disk: no piece reaches over its edge.
pub const BLOCK_SECTORS: u64 = 8;

/// What a record does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Write,
    /// Reads as zeros afterwards; the backing may give the space back.
    Discard,
    /// Reads as zeros afterwards.
    Zeroes,
    /// Names a point; changes nothing.
    Mark,
}

impl Kind {
    pub(super) fn code(self) -> u8 {
        match self {
            Self::Write => 1,
            Self::Discard => 2,
            Self::Zeroes => 3,
            Self::Mark => 4,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::Write,
            2 => Self::Discard,
            3 => Self::Zeroes,
            4 => Self::Mark,
            _ => return None,
        })
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Discard => "discard",
            Self::Zeroes => "write-zeroes",
            Self::Mark => "mark",
        }
    }
}

/// A guest FLUSH lies between the record before and this one.
pub(super) const FLAG_EPOCH: u8 = 1;
/// The next record belongs to the same request.
pub(super) const FLAG_CONTINUED: u8 = 2;

/// The request that a record came from: it names the same request again after a restart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct RecordOrigin {
    /// Of the virtual machine, among those that share the disk.
    pub door: u16,
    pub queue: u16,
    pub counter: u64,
}

/// Bits of a record's queue field that hold the queue's number; the door's is above.
const QUEUE_BITS: u32 = QUEUES_MAX.trailing_zeros();

const _: () = assert!(QUEUES_MAX.is_power_of_two() && DOORS_MAX < (1 << 16 >> QUEUE_BITS));

impl RecordOrigin {
    /// Of a record that is no whole request: no door has that number.
    pub const NONE: Self =
        Self { door: u16::MAX >> QUEUE_BITS, queue: QUEUES_MAX as u16 - 1, counter: u64::MAX };

    /// The field as it stands in a record.
    fn field(self) -> u16 {
        let fits = usize::from(self.queue) < QUEUES_MAX && self.door <= Self::NONE.door;
        assert!(fits, "doors and queues are counted where they are made");
        self.door << QUEUE_BITS | self.queue
    }

    fn of_field(field: u16, counter: u64) -> Self {
        let (door, queue) = (field >> QUEUE_BITS, field & (QUEUES_MAX as u16).saturating_sub(1));
        Self { door, queue, counter }
    }
}

/// Why bytes are no batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// Not even the magic: nothing was ever written here, or something else.
    Nothing,
    /// A header of this many bytes begins here; fewer were given.
    Short(u32),
    /// The header's checksum is wrong, or it is of another use of the segment.
    Checksum,
    /// The checksum is right and yet a field has an impossible value.
    Shape,
}

/// A batch's header, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// Fixed part and entries.
    pub header_bytes: u32,
    /// Where the data begins.
    pub data_start: u32,
    /// All of it: the next batch begins there.
    pub batch_bytes: u32,
    pub entries: u16,
    pub previous_checksum: u32,
    pub checksum: u32,
    pub salt: u64,
    pub incarnation: u64,
    pub sequence: u64,
    pub first_won: u64,
    /// Of the first record.
    pub epoch: u64,
    /// Every write up to this WON was durable in the log when the batch was made.
    pub durable_through: u64,
    /// And in the backing.
    pub drained_through: u64,
    /// The first WON that does not end in it or before.
    pub next_won: u64,
    /// Of the last record.
    pub last_epoch: u64,
    /// Its last record's request goes on in the next batch.
    pub continued: bool,
    /// Sectors of data.
    pub data_sectors: u64,
}

/// A whole header: what it says and its entries.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    pub header: BatchHeader,
    entries: &'a [u8],
}

/// One record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    pub kind: Kind,
    /// For a mark: the point that it names, the last write before it.
    pub won: u64,
    pub epoch: u64,
    /// A guest FLUSH lies between the record before and this one.
    pub edge: bool,
    /// The next record has the same WON.
    pub continued: bool,
    pub origin: RecordOrigin,
    /// Sectors of the disk.
    pub start: u64,
    pub count: u64,
    /// Byte in the batch where the data begins; writes only.
    pub data: Option<u32>,
    /// Of a mark.
    pub name: &'a [u8],
    checksums: &'a [u8],
}

/// A part of a write inside one 4 KiB block of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordPiece {
    pub start: u64,
    /// Sectors, 1 to 8.
    pub count: u8,
    /// Byte in the batch.
    pub data: u32,
    pub checksum: u32,
}

/// The checksum of a piece's sectors.
pub fn piece_checksum(bytes: &[u8]) -> u32 {
    content(0, bytes)
}

/// Pieces of `count` sectors at `start`.
pub fn pieces(start: u64, count: u64) -> u64 {
    let inside = start.checked_rem(BLOCK_SECTORS).unwrap_or(0);
    inside.saturating_add(count).div_ceil(BLOCK_SECTORS)
}

/// Sectors of the piece that begins at `start`, of a range that ends at `end`.
fn piece_sectors(start: u64, end: u64) -> u64 {
    let block = start
        .checked_rem(BLOCK_SECTORS)
        .map_or(BLOCK_SECTORS, |inside| BLOCK_SECTORS.saturating_sub(inside));
    block.min(end.saturating_sub(start))
}

impl<'a> Batch<'a> {
    /// Decodes the batch whose header begins `bytes`, in a segment with `salt`. Its data may be
    /// missing. Never fails on any bytes; whether it continues the log is for the caller.
    pub fn decode(bytes: &'a [u8], salt: u64) -> Result<Self, Bad> {
        let mut reader = Reader::new(bytes);
        if reader.array::<4>() != Some(*BATCH_MAGIC) {
            return Err(Bad::Nothing);
        }
        let header_bytes = reader.u32().ok_or(Bad::Short(BATCH_HEADER_BYTES))?;
        if header_bytes < BATCH_HEADER_BYTES || u64::from(header_bytes) > BATCH_BYTES_MAX {
            return Err(Bad::Checksum);
        }
        let whole = bytes.get(..header_bytes as usize).ok_or(Bad::Short(header_bytes))?;
        let salt = match planted(Bug::SaltIgnored) {
            true => fixed(whole).map_or(salt, |header| header.salt),
            false => salt,
        };
        let stored = whole.get(BATCH_CHECKSUM).and_then(|bytes| bytes.first_chunk::<4>());
        if stored.map(|bytes| u32::from_le_bytes(*bytes)) != Some(header_checksum(whole, salt)) {
            return Err(Bad::Checksum);
        }
        let header = fixed(whole).ok_or(Bad::Shape)?;
        if header.salt != salt {
            return Err(Bad::Checksum);
        }
        let entries = whole.get(BATCH_HEADER_BYTES as usize..).ok_or(Bad::Shape)?;
        let mut batch = Self { header, entries };
        batch.walk().ok_or(Bad::Shape)?;
        Ok(batch)
    }

    /// Goes through all entries once, so that they need no more checks.
    fn walk(&mut self) -> Option<()> {
        let mut entries = self.entries();
        let (mut last_epoch, mut continued) = (self.header.epoch, false);
        for _ in 0..self.header.entries {
            let entry = entries.next()?;
            let odd = continued && entry.kind == Kind::Mark;
            if odd || (entry.continued && entry.kind == Kind::Mark) {
                return None;
            }
            (last_epoch, continued) = (entry.epoch, entry.continued);
        }
        let end = u64::from(entries.data);
        if entries.reader.remaining() > 0 || end > u64::from(self.header.batch_bytes) {
            return None;
        }
        self.header.next_won = entries.won;
        self.header.last_epoch = last_epoch;
        self.header.continued = continued;
        let bytes = end.checked_sub(self.header.data_start.into())?;
        self.header.data_sectors = bytes.checked_div(SECTOR_BYTES)?;
        Some(())
    }

    /// The records in order.
    pub fn entries(&self) -> Entries<'a> {
        Entries {
            reader: Reader::new(self.entries),
            left: self.header.entries,
            won: self.header.first_won,
            epoch: self.header.epoch,
            first: true,
            data: self.header.data_start,
        }
    }

    /// Whether `bytes`, the whole batch, hold the data that the entries' checksums are of. The
    /// first piece that is damaged, if one is.
    pub fn verify(&self, bytes: &[u8]) -> Result<(), RecordPiece> {
        for entry in self.entries() {
            for piece in entry.pieces() {
                let from = piece.data as usize;
                let length = usize::from(piece.count).saturating_mul(SECTOR_BYTES as usize);
                let data = bytes.get(from..from.saturating_add(length));
                if data.map(piece_checksum) != Some(piece.checksum) {
                    return Err(piece);
                }
            }
        }
        Ok(())
    }
}

fn fixed(bytes: &[u8]) -> Option<BatchHeader> {
    let mut reader = Reader::new(bytes);
    let _magic = reader.u32()?;
    let (header_bytes, data_start, batch_bytes) = (reader.u32()?, reader.u32()?, reader.u32()?);
    let (entries, flags) = (reader.u16()?, reader.u16()?);
    let (previous_checksum, checksum, _reserved) = (reader.u32()?, reader.u32()?, reader.u32()?);
    let salt = reader.u64()?;
    let mut number = || reader.u64().filter(|value| *value <= NUMBER_MAX);
    let header = BatchHeader {
        header_bytes,
        data_start,
        batch_bytes,
        entries,
        previous_checksum,
        checksum,
        salt,
        incarnation: number()?,
        sequence: number()?,
        first_won: number()?,
        epoch: number()?,
        durable_through: number()?,
        drained_through: number()?,
        next_won: 0,
        last_epoch: 0,
        continued: false,
        data_sectors: 0,
    };
    let sector = SECTOR_BYTES as u32;
    let whole = data_start.is_multiple_of(sector) && batch_bytes.is_multiple_of(sector);
    let ordered = header_bytes <= data_start && data_start <= batch_bytes;
    let bounded = u64::from(batch_bytes) <= BATCH_BYTES_MAX;
    (flags == 0 && whole && ordered && bounded && entries > 0).then_some(header)
}

/// CRC32C of a header and its entries, its own field taken as zero.
fn header_checksum(header: &[u8], salt: u64) -> u32 {
    let (before, rest) = header.split_at(BATCH_CHECKSUM.start.min(header.len()));
    let (_, after) = rest.split_at(rest.len().min(4));
    crc32c(crc32c(crc32c(seed(salt), before), &[0; 4]), after)
}

/// Iterates over a batch's records.
#[derive(Clone)]
pub struct Entries<'a> {
    reader: Reader<'a>,
    left: u16,
    /// WON of the next request.
    won: u64,
    epoch: u64,
    first: bool,
    /// Byte in the batch of the next data.
    data: u32,
}

impl<'a> Iterator for Entries<'a> {
    type Item = Entry<'a>;

    fn next(&mut self) -> Option<Entry<'a>> {
        self.left = self.left.checked_sub(1)?;
        let reader = &mut self.reader;
        let kind = Kind::from_code(reader.u8()?)?;
        let flags = reader.u8()?;
        let queue = reader.u16()?;
        let name_bytes = usize::from(reader.u16()?);
        let _reserved = reader.u16()?;
        let (counter, start, count) = (reader.u64()?, reader.u64()?, reader.u64()?);
        let end = start.checked_add(count)?;
        if flags & !(FLAG_EPOCH | FLAG_CONTINUED) != 0 || end > SECTORS_MAX {
            return None;
        }
        let (mut data, mut checksums, mut name) = (None, &[][..], &[][..]);
        match kind {
            Kind::Write => {
                let sums = pieces(start, count).checked_mul(4)?;
                checksums = reader.bytes(usize::try_from(sums).ok()?)?;
                data = Some(self.data);
                let bytes = u32::try_from(count.checked_mul(SECTOR_BYTES)?).ok()?;
                self.data = self.data.checked_add(bytes)?;
            }
            Kind::Mark => {
                let padded = reader.bytes(name_bytes.checked_next_multiple_of(4)?)?;
                name = padded.get(..name_bytes)?;
            }
            Kind::Discard | Kind::Zeroes => {}
        }
        if (kind == Kind::Mark) != (count == 0) || (kind != Kind::Mark && name_bytes > 0) {
            return None;
        }
        let edge = flags & FLAG_EPOCH != 0;
        if edge && !self.first {
            self.epoch = self.epoch.checked_add(1)?;
        }
        self.first = false;
        let continued = flags & FLAG_CONTINUED != 0;
        let won = if kind == Kind::Mark { self.won.checked_sub(1)? } else { self.won };
        if !continued && kind != Kind::Mark {
            self.won = self.won.checked_add(1)?;
        }
        let origin = RecordOrigin::of_field(queue, counter);
        let epoch = self.epoch;
        Some(Entry {
            kind,
            won,
            epoch,
            edge,
            continued,
            origin,
            start,
            count,
            data,
            name,
            checksums,
        })
    }
}

impl Entry<'_> {
    /// Where the record ends on the disk, in sectors.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.count)
    }

    /// The pieces of a write in order; nothing for other kinds.
    pub fn pieces(&self) -> impl Iterator<Item = RecordPiece> + '_ {
        let mut at = self.start;
        let mut data = self.data.unwrap_or(0);
        let end = self.end();
        self.checksums.chunks_exact(4).map_while(move |sum| {
            let count = piece_sectors(at, end);
            let checksum = u32::from_le_bytes(*sum.first_chunk()?);
            let piece = RecordPiece { start: at, count: count as u8, data, checksum };
            at = at.saturating_add(count);
            data = data.saturating_add((count as u32).saturating_mul(SECTOR_BYTES as u32));
            Some(piece)
        })
    }
}

/// How long a batch will be, before it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    pub header_bytes: u32,
    pub data_bytes: u32,
    pub entries: u16,
}

impl Default for Plan {
    fn default() -> Self {
        Self { header_bytes: BATCH_HEADER_BYTES, data_bytes: 0, entries: 0 }
    }
}

impl Plan {
    /// With one write more.
    #[must_use]
    pub fn write(self, start: u64, count: u64) -> Self {
        let sums = pieces(start, count).saturating_mul(4);
        let data = count.saturating_mul(SECTOR_BYTES);
        self.entry(u32::try_from(sums).unwrap_or(u32::MAX), u32::try_from(data).unwrap_or(u32::MAX))
    }

    /// With one discard or write-zeroes more.
    #[must_use]
    pub fn range(self) -> Self {
        self.entry(0, 0)
    }

    /// With one mark more.
    #[must_use]
    pub fn mark(self, name: &[u8]) -> Self {
        self.entry(name.len().next_multiple_of(4) as u32, 0)
    }

    fn entry(self, more: u32, data: u32) -> Self {
        Self {
            header_bytes: self.header_bytes.saturating_add(ENTRY_BYTES).saturating_add(more),
            data_bytes: self.data_bytes.saturating_add(data),
            entries: self.entries.saturating_add(1),
        }
    }

    /// Where the data begins. `align`: bytes, the drive's block.
    pub fn data_start(self, align: u32) -> u32 {
        round_up(self.header_bytes, align)
    }

    /// Bytes of the whole batch.
    pub fn batch_bytes(self, align: u32) -> u32 {
        round_up(self.data_start(align).saturating_add(self.data_bytes), align)
    }
}

fn round_up(bytes: u32, align: u32) -> u32 {
    bytes.checked_next_multiple_of(align).unwrap_or(u32::MAX)
}

/// What a record says, apart from its data.
#[derive(Clone, Copy, Debug)]
pub struct EntryHead {
    pub kind: Kind,
    pub edge: bool,
    pub continued: bool,
    pub origin: RecordOrigin,
    pub start: u64,
    pub count: u64,
}

/// What makes a batch part of the log at one place: all of it changes if it is appended again
/// elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchLink {
    pub salt: u64,
    pub incarnation: u64,
    pub sequence: u64,
    pub previous_checksum: u32,
    pub durable_through: u64,
    pub drained_through: u64,
}

/// Encodes a batch's header, entry by entry. Data is the caller's: it goes behind `data_start`, in
/// the order of the entries.
#[derive(Default)]
pub struct BatchEncoder {
    bytes: Vec<u8>,
}

impl BatchEncoder {
    /// Begins a batch that will be as `plan` says. Memory is kept from batch to batch.
    pub fn begin(&mut self, plan: Plan, align: u32, (first_won, epoch): (u64, u64)) {
        self.bytes.clear();
        self.bytes.extend_from_slice(BATCH_MAGIC);
        for word in [plan.header_bytes, plan.data_start(align), plan.batch_bytes(align)] {
            self.bytes.extend_from_slice(&word.to_le_bytes());
        }
        self.bytes.extend_from_slice(&plan.entries.to_le_bytes());
        self.bytes.resize(56, 0);
        self.bytes.extend_from_slice(&first_won.to_le_bytes());
        self.bytes.extend_from_slice(&epoch.to_le_bytes());
        self.bytes.resize(BATCH_HEADER_BYTES as usize, 0);
    }

    /// Adds a record. A write's checksums follow with [`BatchEncoder::checksum`], one a piece.
    pub fn entry(&mut self, head: EntryHead) {
        self.head(head, 0);
    }

    fn head(&mut self, head: EntryHead, name_bytes: u16) {
        let mut flags = 0;
        flags |= if head.edge { FLAG_EPOCH } else { 0 };
        flags |= if head.continued { FLAG_CONTINUED } else { 0 };
        let bytes = &mut self.bytes;
        bytes.extend_from_slice(&[head.kind.code(), flags]);
        bytes.extend_from_slice(&head.origin.field().to_le_bytes());
        bytes.extend_from_slice(&name_bytes.to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
        for word in [head.origin.counter, head.start, head.count] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }

    /// The checksum of the next piece of the write added last.
    pub fn checksum(&mut self, checksum: u32) {
        self.bytes.extend_from_slice(&checksum.to_le_bytes());
    }

    /// Adds a mark. `edge` as in [`EntryHead`].
    pub fn mark(&mut self, name: &[u8], edge: bool) {
        assert!(name.len() <= NAME_BYTES_MAX, "a mark's name is checked when it is given");
        let origin = RecordOrigin::default();
        let head =
            EntryHead { kind: Kind::Mark, edge, continued: false, origin, start: 0, count: 0 };
        self.head(head, name.len() as u16);
        self.bytes.extend_from_slice(name);
        let padded = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(padded, 0);
    }

    /// Puts the batch at its place in the log; may be done again for another place. The header's
    /// bytes and its checksum.
    pub fn seal(&mut self, link: BatchLink) -> (&[u8], u32) {
        let mut put = |at: usize, value: &[u8]| {
            let field = self.bytes.get_mut(at..at.saturating_add(value.len()));
            field.expect("the fixed part is there").copy_from_slice(value);
        };
        put(20, &link.previous_checksum.to_le_bytes());
        put(32, &link.salt.to_le_bytes());
        put(40, &link.incarnation.to_le_bytes());
        put(48, &link.sequence.to_le_bytes());
        put(72, &link.durable_through.to_le_bytes());
        put(80, &link.drained_through.to_le_bytes());
        let checksum = header_checksum(&self.bytes, link.salt);
        let field = self.bytes.get_mut(BATCH_CHECKSUM);
        field.expect("the fixed part is there").copy_from_slice(&checksum.to_le_bytes());
        (&self.bytes, checksum)
    }

    /// The header as it was sealed last.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The batch as its readers will find it.
    pub fn batch(&self) -> Batch<'_> {
        let header = fixed(&self.bytes).expect("a batch of our own has the right shape");
        let entries = self.bytes.get(BATCH_HEADER_BYTES as usize..).unwrap_or_default();
        let mut batch = Batch { header, entries };
        batch.walk().expect("a batch of our own has the right shape");
        batch
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#[path = "record_test.rs"]
mod tests;
