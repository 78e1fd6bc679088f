//! What a record changes. A record's changes are applied all together or not at all.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use super::extents::ExtentRange;
use super::layout::{ATTRIBUTES_BYTES_MAX, NAME_BYTES_MAX};
use crate::base::codec::{Reader, Writer};

/// Names an allocation; never used again after its removal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AllocationId(pub u64);

/// What becomes of the content when the virtual machine stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    Volatile,
    Nonvolatile,
}

impl Class {
    pub(super) fn code(self) -> u8 {
        match self {
            Self::Volatile => 0,
            Self::Nonvolatile => 1,
        }
    }

    pub(super) fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Volatile),
            1 => Some(Self::Nonvolatile),
            _ => None,
        }
    }
}

/// One change of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Create {
        id: AllocationId,
        name: String,
        class: Class,
        thin: bool,
        size_bytes: u64,
        attributes: Vec<u8>,
    },
    /// All its extents become unscrubbed.
    Remove {
        id: AllocationId,
    },
    /// Nothing may be mapped beyond the new end.
    Resize {
        id: AllocationId,
        size_bytes: u64,
    },
    Attributes {
        id: AllocationId,
        attributes: Vec<u8>,
    },
    /// `physical` were clean; they now back the extents of the allocation from `logical` on.
    Map {
        id: AllocationId,
        logical: u64,
        physical: ExtentRange,
    },
    /// What is mapped of the logical range becomes unscrubbed.
    Unmap {
        id: AllocationId,
        logical: ExtentRange,
    },
    /// Unscrubbed extents, durably zeroed, become clean.
    Clean {
        physical: ExtentRange,
    },
}

const CREATE: u8 = 1;
const REMOVE: u8 = 2;
const RESIZE: u8 = 3;
const ATTRIBUTES: u8 = 4;
const MAP: u8 = 5;
const UNMAP: u8 = 6;
const CLEAN: u8 = 7;

impl Change {
    pub(super) fn encode(&self, writer: &mut Writer) {
        match self {
            Self::Create { id, name, class, thin, size_bytes, attributes } => {
                writer.u8(CREATE).u64(id.0).u64(*size_bytes);
                writer.u8(class.code()).u8((*thin).into());
                writer.u16(name.len() as u16).bytes(name.as_bytes());
                writer.u32(attributes.len() as u32).bytes(attributes);
            }
            Self::Remove { id } => _ = writer.u8(REMOVE).u64(id.0),
            Self::Resize { id, size_bytes } => _ = writer.u8(RESIZE).u64(id.0).u64(*size_bytes),
            Self::Attributes { id, attributes } => {
                writer.u8(ATTRIBUTES).u64(id.0);
                writer.u32(attributes.len() as u32).bytes(attributes);
            }
            Self::Map { id, logical, physical } => {
                writer.u8(MAP).u64(id.0).u64(*logical).u64(physical.start).u64(physical.count);
            }
            Self::Unmap { id, logical } => {
                writer.u8(UNMAP).u64(id.0).u64(logical.start).u64(logical.count);
            }
            Self::Clean { physical } => {
                writer.u8(CLEAN).u64(physical.start).u64(physical.count);
            }
        }
    }

    /// `None`: the bytes are no change. Values are checked when it is applied.
    pub(super) fn decode(reader: &mut Reader<'_>) -> Option<Self> {
        let tag = reader.u8()?;
        if tag == CLEAN {
            return Some(Self::Clean { physical: range(reader)? });
        }
        let id = AllocationId(reader.u64()?);
        Some(match tag {
            CREATE => {
                let size_bytes = reader.u64()?;
                let class = Class::from_code(reader.u8()?)?;
                let thin = flag(reader.u8()?)?;
                let length = usize::from(reader.u16()?);
                let name = name(reader.bytes(length)?)?;
                let attributes = attributes(reader)?;
                Self::Create { id, name, class, thin, size_bytes, attributes }
            }
            REMOVE => Self::Remove { id },
            RESIZE => Self::Resize { id, size_bytes: reader.u64()? },
            ATTRIBUTES => Self::Attributes { id, attributes: attributes(reader)? },
            MAP => Self::Map { id, logical: reader.u64()?, physical: range(reader)? },
            UNMAP => Self::Unmap { id, logical: range(reader)? },
            _ => return None,
        })
    }
}

fn range(reader: &mut Reader<'_>) -> Option<ExtentRange> {
    Some(ExtentRange { start: reader.u64()?, count: reader.u64()? })
}

fn flag(byte: u8) -> Option<bool> {
    (byte < 2).then_some(byte == 1)
}

/// An allocation's name, if the bytes can be one.
pub(super) fn name(bytes: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(bytes).ok()?;
    let printable = name.chars().all(|character| !character.is_control());
    let fits = !name.is_empty() && name.len() <= NAME_BYTES_MAX;
    (printable && fits).then(|| name.to_owned())
}

fn attributes(reader: &mut Reader<'_>) -> Option<Vec<u8>> {
    let length = usize::try_from(reader.u32()?).ok()?;
    let bytes = reader.bytes(length)?;
    (length <= ATTRIBUTES_BYTES_MAX).then(|| bytes.to_vec())
}
