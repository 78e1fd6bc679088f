//! Allocations that grow and shrink under the rig's disk.

use super::{Moment, Rig, Setup};
use vflash::base::units::{KIB, MIB};
use vflash::cache::{CacheMessage, Place};

/// Of an allocation with so many segments.
pub(crate) fn allocation_bytes(segments: u64) -> u64 {
    MIB + segments * 64 * KIB
}

/// Segments that a resizable disk has at most.
pub(crate) const SEGMENTS_MAX: u64 = 12;

impl Setup {
    /// The same on a flash with room for more, so that the allocation can be resized.
    pub(crate) fn resizable(self) -> Self {
        Self { allocation_bytes: allocation_bytes(self.segments), ..self }
    }

    /// As an opening finds it: it uses all of the allocation.
    pub(super) fn at(self, moment: Moment) -> Self {
        let segments = match moment.allocation_bytes {
            0 => self.segments,
            bytes => (bytes - MIB) / (64 * KIB),
        };
        Self { segments, allocation_bytes: moment.allocation_bytes, ..self }
    }
}

impl Rig {
    /// Brings the allocation to so many segments, as pool and control do; extents that are given
    /// back are zeroed.
    pub(crate) fn resize(&mut self, segments: u64) {
        let size_bytes = allocation_bytes(segments);
        self.finish();
        let before = std::mem::replace(&mut self.setup.segments, segments);
        if segments > before {
            self.now.allocation_bytes = size_bytes;
            self.note();
            let place = Place::whole(size_bytes);
            self.ask(|reply| CacheMessage::Grow { place, reply }).expect("grown");
        } else {
            self.ask(|reply| CacheMessage::Shrink { size_bytes, reply }).expect("shrunk");
            self.now.allocation_bytes = size_bytes;
            self.note();
            let mut flash = self.world.blocking(0);
            let given_back = allocation_bytes(before) - size_bytes;
            if given_back > 0 {
                flash.zero(size_bytes, given_back).and_then(|()| flash.flush()).expect("zeroed");
            }
            self.tell(CacheMessage::Shrunk);
        }
        self.setup.allocation_bytes = size_bytes;
    }
}
