//! The members of a consistency group, as each one's stamp names them: so that whoever finds one of
//! their backings finds the others. Pure.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use super::stamp::{read_text, text};
use crate::base::codec::{Reader, Writer};
use crate::base::limits::CONSISTENCY_GROUP_MAX;
use crate::base::{Error, ErrorKind, Result};

/// Bytes of the name of a consistency group.
const NAME_BYTES_MAX: usize = 63;

/// Bytes of all members together, in a stamp.
const MEMBERS_BYTES: usize = 3619;

/// A disk of a consistency group.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Peer {
    /// `VM/VOLUME`: tells the members apart, as the owner in a stamp does.
    pub volume: String,
    /// As a manifest writes it, for people and for `vflash backing recover`.
    pub backing: String,
    /// Path of its sidecar.
    pub sidecar: String,
}

/// A consistency group. The default is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roster {
    pub name: String,
    /// All of them, by volume. The first leads.
    pub members: Vec<Peer>,
}

impl Roster {
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The members but one.
    pub fn others<'a>(&'a self, volume: &'a str) -> impl Iterator<Item = &'a Peer> {
        self.members.iter().filter(move |peer| peer.volume != volume)
    }

    /// # Errors
    /// [`ErrorKind::Invalid`]: a stamp has no room for so many members or such long paths.
    pub fn check(&self) -> Result<()> {
        let lengths = self.members.iter().map(|peer| {
            let texts = [&peer.volume, &peer.backing, &peer.sidecar];
            texts.iter().fold(0_usize, |sum, text| sum.saturating_add(text.len()).saturating_add(2))
        });
        let bytes = lengths.fold(0_usize, usize::saturating_add);
        if self.members.len() <= CONSISTENCY_GROUP_MAX && bytes <= MEMBERS_BYTES {
            return Ok(());
        }
        let text = format!(
            "consistency group `{}` has {} disks whose paths take {bytes} bytes, and an owner \
             stamp has room for {CONSISTENCY_GROUP_MAX} and {MEMBERS_BYTES}: take fewer disks or \
             shorter paths",
            self.name,
            self.members.len()
        );
        Err(Error::new(ErrorKind::Invalid, text))
    }

    /// To the end of a stamp's body. What does not fit was refused before ([`Roster::check`]).
    pub(super) fn encode(&self, writer: &mut Writer) {
        text(writer, &self.name, NAME_BYTES_MAX);
        let end = writer.len().saturating_add(1).saturating_add(MEMBERS_BYTES);
        writer.u8(self.members.len() as u8);
        for part in self.members.iter().flat_map(|it| [&it.volume, &it.backing, &it.sidecar]) {
            writer.u16(part.len() as u16).bytes(part.as_bytes());
        }
        writer.pad_to(end);
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Option<Self> {
        let name = read_text(reader, NAME_BYTES_MAX)?;
        let count = usize::from(reader.u8()?);
        let mut rest = Reader::new(reader.bytes(MEMBERS_BYTES)?);
        let mut part = || {
            let length = usize::from(rest.u16()?);
            String::from_utf8(rest.bytes(length)?.to_vec()).ok()
        };
        let mut members = Vec::new();
        for _ in 0..count.min(CONSISTENCY_GROUP_MAX) {
            members.push(Peer { volume: part()?, backing: part()?, sidecar: part()? });
        }
        (count <= CONSISTENCY_GROUP_MAX).then_some(Self { name, members })
    }
}
