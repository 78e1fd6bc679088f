//! A chain's segments as a checked virtio-blk request (5.2.6).
//!
//! What holds for every [`Request`] that is parsed: ranges lie within the capacity and none is
//! empty, data is a whole number of sectors that one operation can carry, and the status byte is
//! the last byte that the guest lets us write.

use super::chain::Chain;
use super::config::Device;
use crate::base::codec::Reader;
use crate::base::limits;
use crate::base::units::SECTOR_BYTES;
use crate::io::buffer::{Segment, gather, total_bytes};
use crate::io::volume::{Outcome, RequestKind, SectorRange};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;
const FLAG_UNMAP: u32 = 1;

/// The status byte of a request's end.
pub fn status_byte(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::Done => VIRTIO_BLK_S_OK as u8,
        Outcome::Failed => VIRTIO_BLK_S_IOERR as u8,
        Outcome::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
    }
}

/// What is to be done with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Goes to the volume, with the request's `ranges` and `data`.
    Volume(RequestKind),
    /// The device answers by itself: the id goes into `data`.
    GetId,
    /// Wrong or unknown: ends at once with this outcome.
    Refuse(Outcome),
}

/// The parsed form of one chain; its memory is reused from request to request.
#[derive(Default)]
pub struct Request {
    pub ranges: Vec<SectorRange>,
    pub data: Vec<Segment>,
    /// Bytes of `data`.
    pub bytes: u64,
    /// Where the status byte goes.
    pub status: Option<Segment>,
}

impl Request {
    pub fn new() -> Self {
        Self {
            ranges: Vec::with_capacity(limits::RANGES_MAX),
            data: Vec::with_capacity(super::chain::SEGMENTS_PER_CHAIN_MAX),
            bytes: 0,
            status: None,
        }
    }

    /// Reads a request out of `chain`. `None`: there is no header or no status byte, so nothing can
    /// be told to the guest.
    pub fn parse(&mut self, chain: &Chain, device: &Device) -> Option<Action> {
        self.ranges.clear();
        self.data.clear();
        self.bytes = 0;
        self.status = None;

        let header = header(chain.readable())?;
        let mut reader = Reader::new(&header);
        let kind = reader.u32()?;
        let _priority = reader.u32()?;
        let sector = reader.u64()?;

        let last = chain.writable().last()?;
        self.status = Some(last.part(last.length().checked_sub(1)?, 1));
        Some(match kind {
            VIRTIO_BLK_T_IN => {
                self.take_writable(chain);
                self.transfer(RequestKind::Read, sector, device)
            }
            VIRTIO_BLK_T_OUT if device.read_only => Action::Refuse(Outcome::Failed),
            VIRTIO_BLK_T_OUT => {
                self.take_readable(chain);
                self.transfer(RequestKind::Write, sector, device)
            }
            VIRTIO_BLK_T_FLUSH => Action::Volume(RequestKind::Flush),
            VIRTIO_BLK_T_GET_ID => {
                self.take_writable(chain);
                Action::GetId
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if device.read_only => {
                Action::Refuse(Outcome::Failed)
            }
            VIRTIO_BLK_T_DISCARD if !device.discard => Action::Refuse(Outcome::Unsupported),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                self.take_readable(chain);
                self.ranges(kind == VIRTIO_BLK_T_DISCARD, device)
            }
            _ => Action::Refuse(Outcome::Unsupported),
        })
    }

    /// Data of a read: everything writable but the status byte.
    fn take_writable(&mut self, chain: &Chain) {
        self.data.extend_from_slice(chain.writable());
        if let Some(last) = self.data.pop() {
            let length = last.length().saturating_sub(1);
            if length > 0 {
                self.data.push(last.part(0, length));
            }
        }
        self.bytes = total_bytes(&self.data) as u64;
    }

    /// Data of a write: everything readable but the header, which may be split anywhere.
    fn take_readable(&mut self, chain: &Chain) {
        let mut skip = HEADER_BYTES;
        for segment in chain.readable() {
            let skipped = skip.min(segment.length());
            skip = skip.saturating_sub(skipped);
            if skipped < segment.length() {
                self.data.push(segment.part(skipped, segment.length()));
            }
        }
        self.bytes = total_bytes(&self.data) as u64;
    }

    fn transfer(&mut self, kind: RequestKind, start: u64, device: &Device) -> Action {
        let range = SectorRange { start, count: self.bytes / SECTOR_BYTES };
        let sized = (1..=limits::TRANSFER_BYTES_MAX).contains(&self.bytes)
            && self.bytes.is_multiple_of(SECTOR_BYTES);
        if !sized || !within(range, device) {
            return Action::Refuse(Outcome::Failed);
        }
        self.ranges.push(range);
        Action::Volume(kind)
    }

    fn ranges(&mut self, discard: bool, device: &Device) -> Action {
        let mut bytes = [0; RANGE_BYTES * limits::RANGES_MAX];
        let length = gather(&self.data, &mut bytes);
        if length as u64 != self.bytes || length == 0 || !length.is_multiple_of(RANGE_BYTES) {
            return Action::Refuse(Outcome::Failed);
        }
        let mut unmap = FLAG_UNMAP;
        let mut reader = Reader::new(bytes.get(..length).unwrap_or_default());
        while let (Some(start), Some(count), Some(flags)) =
            (reader.u64(), reader.u32(), reader.u32())
        {
            // 5.2.6.2: unknown flags, and UNMAP on a discard, are answered UNSUPP.
            if flags & !FLAG_UNMAP != 0 || (discard && flags != 0) {
                return Action::Refuse(Outcome::Unsupported);
            }
            let range = SectorRange { start, count: u64::from(count) };
            if count == 0 || count > limits::RANGE_SECTORS_MAX || !within(range, device) {
                return Action::Refuse(Outcome::Failed);
            }
            unmap &= flags;
            self.ranges.push(range);
        }
        self.data.clear();
        self.bytes = 0;
        Action::Volume(match discard {
            true => RequestKind::Discard,
            false => RequestKind::WriteZeroes { unmap: unmap != 0 },
        })
    }
}

/// The range lies inside the device.
fn within(range: SectorRange, device: &Device) -> bool {
    range.start.checked_add(range.count).is_some_and(|end| end <= device.capacity_sectors)
}

/// The header, which may be split anywhere.
fn header(readable: &[Segment]) -> Option<[u8; HEADER_BYTES]> {
    readable.first()?.read().or_else(|| {
        let mut header = [0; HEADER_BYTES];
        (gather(readable, &mut header) == HEADER_BYTES).then_some(header)
    })
}

#[cfg(test)]
#[path = "request_test.rs"]
mod tests;
