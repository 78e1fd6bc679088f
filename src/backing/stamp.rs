//! The owner stamp: who may write the backing, and how far it is. Pure.
//!
//! It lies in the sidecar, in two places used in turn, each written twice; FORMAT.md has the bytes.
//! `sidecar.rs` reads and writes it.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use super::identity::{Identity, Kind};
use super::roster::Roster;
#[cfg(test)]
use crate::base::byte_table::Field;
use crate::base::codec::{Reader, Writer};
use crate::base::seal::{Seal, SealedBlock, seal};

/// Bytes of a stamp.
pub const STAMP_BYTES: usize = 4096;

/// Byte offsets of the two copies of a stamp with an even and with an odd sequence.
pub const STAMP_OFFSETS: [[u64; 2]; 2] = [[0, 32 << 10], [16 << 10, 48 << 10]];

/// The version that this build writes, and the newest that it reads.
pub const STAMP_VERSION: u32 = 1;

/// Its disk is in a consistency group, or was the leader of one, or is at a point of one: a build
/// that does not know must not finish its redo groups by themselves.
const FEATURE_CONSISTENCY: u32 = 1;

pub(super) const STAMP_MAGIC: &[u8; 8] = b"VFLASHST";

/// Bytes of a host's name and of a volume's name; longer ones are cut.
const HOST_NAME_BYTES_MAX: usize = 63;
const VOLUME_BYTES_MAX: usize = 127;

/// Sequences, epochs, groups and points count from 1 and never get near this; more is damage.
pub(super) const NUMBER_MAX: u64 = 1 << 62;

#[cfg(test)]
pub(super) const STAMP_LAYOUT: &[Field] = &[
    (0, 8, "magic"),
    (8, 4, "version"),
    (12, 4, "features"),
    (16, 16, "disk"),
    (32, 8, "sequence"),
    (40, 8, "owner epoch"),
    (48, 8, "owned since"),
    (56, 8, "stamped at"),
    (64, 16, "host"),
    (80, 16, "instance"),
    (96, 16, "allocation"),
    (112, 8, "size bytes"),
    (120, 4, "block bytes"),
    (124, 1, "kind"),
    (125, 1, "state"),
    (126, 1, "drain"),
    (127, 1, "reserved"),
    (128, 16, "fingerprint"),
    (144, 8, "point"),
    (152, 8, "point time"),
    (160, 8, "dirty bytes"),
    (168, 8, "oldest dirty"),
    (176, 8, "retired group"),
    (184, 8, "group bytes"),
    (192, 8, "first epoch"),
    (200, 1, "host name bytes"),
    (201, 63, "host name"),
    (264, 1, "volume bytes"),
    (265, 127, "volume"),
    (392, 8, "committed step"),
    (400, 1, "consistency group bytes"),
    (401, 63, "consistency group"),
    (464, 1, "members"),
    (465, 3619, "roster"),
    (4084, 8, "others"),
    (4092, 4, "checksum"),
];

/// Who holds a backing. An owner is told from another by its allocation: the flash that holds what
/// is not in the backing yet, wherever that flash is plugged in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// `/etc/machine-id` or the like.
    pub host: [u8; 16],
    /// New with each start of a daemon.
    pub instance: [u8; 16],
    /// UUID of the log on flash; all zeros if nobody owns the backing.
    pub allocation: [u8; 16],
    /// For people.
    pub host_name: String,
    /// `VM/VOLUME`, for people.
    pub volume: String,
}

/// Whether writes may lie on the owner's flash that the backing lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The backing alone is the disk. Redo groups mean nothing.
    Clean,
    /// Set durably before the first write is acknowledged that only the flash holds.
    Dirty,
}

/// How writes move to the backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainMode {
    /// Epoch by epoch: the backing is at its last point or between that and the next.
    Ordered,
    /// By redo groups: the backing with its sidecar is at exactly one point.
    Grouped,
}

/// A state that the disk once had: after all writes up to and including `won`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Point {
    /// Write-order number; 0 before the first write.
    pub won: u64,
    /// When that write was acknowledged, in milliseconds of the Unix epoch.
    pub time_ms: u64,
    /// The last so many numbers up to `won` are of other disks of its consistency group.
    pub others: u64,
}

impl Point {
    /// The last number up to the point that is the disk's own: its log must know that one.
    pub fn own(&self) -> u64 {
        self.won.saturating_sub(self.others)
    }
}

/// A stamp, decoded. Times are milliseconds of the Unix epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// UUID of the disk; the log on flash knows it too.
    pub disk: [u8; 16],
    /// Of stamps, from 1: the highest valid one counts.
    pub sequence: u64,
    pub owner: Owner,
    /// The fencing token: one more with each claim.
    pub owner_epoch: u64,
    /// The first of the epochs, up to this one, that were all of this owner's allocation: what an
    /// allocation remembers of an earlier epoch is out of date.
    pub first_epoch: u64,
    /// When this epoch began.
    pub owned_ms: u64,
    /// When this stamp was written.
    pub stamped_ms: u64,
    pub identity: Identity,
    pub state: State,
    pub drain: DrainMode,
    /// The backing is at least here. A live redo group knows better.
    pub point: Point,
    /// What the flash held at `stamped_ms` and the backing lacked.
    pub dirty_bytes: u64,
    /// When the oldest of that was acknowledged; 0 if there was none.
    pub oldest_dirty_ms: u64,
    /// Redo groups up to this number are not to be applied any more.
    pub retired_group: u64,
    /// From which the places of the redo groups follow ([`super::redo::Layout`]).
    pub group_bytes_max: u64,
    /// The last step of a consistency group that this disk led and that is committed (C1).
    pub committed_step: u64,
    /// The consistency group that the disk is in; empty: none.
    pub roster: Roster,
}

/// What a stamp's block turned out to be.
pub type StampBlock = SealedBlock<Box<Stamp>>;

const SEAL: Seal =
    Seal { magic: STAMP_MAGIC, version: STAMP_VERSION, features: FEATURE_CONSISTENCY };

impl Stamp {
    /// Where both copies of this stamp go.
    pub fn offsets(&self) -> [u64; 2] {
        let [even, odd] = STAMP_OFFSETS;
        if self.sequence.is_multiple_of(2) { even } else { odd }
    }

    /// As this one, to be changed and written after it.
    #[must_use]
    pub fn next(&self, now_ms: u64) -> Self {
        let sequence = self.sequence.saturating_add(1);
        Self { sequence, stamped_ms: now_ms, ..self.clone() }
    }

    /// Nobody's flash holds anything that the backing lacks.
    pub fn is_clean(&self) -> bool {
        self.state == State::Clean
    }

    /// [`STAMP_BYTES`] bytes.
    pub fn encode(&self) -> Vec<u8> {
        let plain = self.committed_step == 0 && self.roster.is_empty() && self.point.others == 0;
        let mut writer = SEAL.begin_with(if plain { 0 } else { FEATURE_CONSISTENCY });
        writer.bytes(&self.disk);
        writer.u64(self.sequence).u64(self.owner_epoch).u64(self.owned_ms).u64(self.stamped_ms);
        writer.bytes(&self.owner.host).bytes(&self.owner.instance).bytes(&self.owner.allocation);
        writer.u64(self.identity.size_bytes).u32(self.identity.block_bytes);
        writer.u8(self.identity.kind.code());
        writer.u8(match self.state {
            State::Clean => 0,
            State::Dirty => 1,
        });
        writer.u8(match self.drain {
            DrainMode::Ordered => 1,
            DrainMode::Grouped => 2,
        });
        writer.u8(0);
        for half in self.identity.fingerprint {
            writer.u64(half);
        }
        writer.u64(self.point.won).u64(self.point.time_ms);
        writer.u64(self.dirty_bytes).u64(self.oldest_dirty_ms);
        writer.u64(self.retired_group).u64(self.group_bytes_max).u64(self.first_epoch);
        text(&mut writer, &self.owner.host_name, HOST_NAME_BYTES_MAX);
        text(&mut writer, &self.owner.volume, VOLUME_BYTES_MAX);
        writer.u64(self.committed_step);
        self.roster.encode(&mut writer);
        writer.u64(self.point.others);
        seal(writer, STAMP_BYTES, 0)
    }

    /// Never fails on any bytes.
    pub fn decode(block: &[u8]) -> StampBlock {
        SEAL.open(block, |reader| Self::fields(reader).map(Box::new))
    }

    fn fields(reader: &mut Reader<'_>) -> Option<Self> {
        let disk = reader.array()?;
        let sequence = reader.u64()?;
        let owner_epoch = reader.u64()?;
        let owned_ms = reader.u64()?;
        let stamped_ms = reader.u64()?;
        let (host, instance, allocation) = (reader.array()?, reader.array()?, reader.array()?);
        let size_bytes = reader.u64()?;
        let block_bytes = reader.u32()?;
        let kind = Kind::from_code(reader.u8()?)?;
        let state = match reader.u8()? {
            0 => State::Clean,
            1 => State::Dirty,
            _ => return None,
        };
        let drain = match reader.u8()? {
            1 => DrainMode::Ordered,
            2 => DrainMode::Grouped,
            _ => return None,
        };
        let _reserved = reader.u8()?;
        let fingerprint = [reader.u64()?, reader.u64()?];
        let (won, time_ms) = (reader.u64()?, reader.u64()?);
        let (dirty_bytes, oldest_dirty_ms) = (reader.u64()?, reader.u64()?);
        let (retired_group, group_bytes_max) = (reader.u64()?, reader.u64()?);
        let first_epoch = reader.u64()?;
        let host_name = read_text(reader, HOST_NAME_BYTES_MAX)?;
        let volume = read_text(reader, VOLUME_BYTES_MAX)?;
        let committed_step = reader.u64()?;
        let roster = Roster::decode(reader)?;
        let point = Point { won, time_ms, others: reader.u64()? };
        let numbers = [sequence, owner_epoch, point.won, retired_group, committed_step];
        if numbers.iter().any(|number| *number > NUMBER_MAX)
            || first_epoch > owner_epoch
            || point.others > point.won
            || !block_bytes.is_power_of_two()
            || !super::redo::Layout::is_possible(group_bytes_max)
        {
            return None;
        }
        Some(Self {
            disk,
            sequence,
            owner: Owner { host, instance, allocation, host_name, volume },
            owner_epoch,
            first_epoch,
            owned_ms,
            stamped_ms,
            identity: Identity { kind, size_bytes, block_bytes, fingerprint },
            state,
            drain,
            point,
            dirty_bytes,
            oldest_dirty_ms,
            retired_group,
            group_bytes_max,
            committed_step,
            roster,
        })
    }
}

/// A length byte and `room` bytes; a longer text is cut between two characters.
pub(super) fn text(writer: &mut Writer, text: &str, room: usize) {
    let (kept, _) = text.split_at(text.floor_char_boundary(room));
    writer.u8(kept.len() as u8).bytes(kept.as_bytes());
    let end = writer.len().saturating_add(room.saturating_sub(kept.len()));
    writer.pad_to(end);
}

pub(super) fn read_text(reader: &mut Reader<'_>, room: usize) -> Option<String> {
    let length = usize::from(reader.u8()?);
    String::from_utf8(reader.bytes(room)?.get(..length)?.to_vec()).ok()
}
