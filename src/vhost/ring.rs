//! The split virtqueue (2.7), read and written through host pointers translated once.
//!
//! The guest shares every byte: whatever is read is copied once and checked. Only this file touches
//! ring memory; `ring_test.rs` compares it with crate `virtio-queue` on random traffic.

use super::memory::MemoryTable;
use crate::base::limits::QUEUE_SIZE_MAX;
use crate::base::{Error, ErrorKind, Result};
use crate::io::buffer::Segment;
use std::sync::atomic::{AtomicU16, Ordering, fence};

const USED_NO_NOTIFY: u16 = 1;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_ENTRY_BYTES: usize = 8;

/// Where a ring lies, in the front end's addresses (bytes).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

/// The guest broke its ring: no request can be taken from it any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

/// One ring.
pub struct Ring {
    size: u16,
    event_index: bool,
    descriptors: Segment,
    available: Segment,
    used: Segment,
    /// The next available entry to take.
    next_available: u16,
    /// Entries written to the used ring.
    next_used: u16,
    /// The used index that the guest has been shown.
    published: u16,
    /// The used index at the last interrupt decision.
    signalled: u16,
    /// Whether `signalled` means anything yet. The first publication always interrupts: a daemon
    /// that died may have published without it.
    signalled_valid: bool,
}

impl Ring {
    /// Translates a ring of `size` entries. `next_available` is the entry to take first; the used
    /// index is read from the ring.
    pub fn new(
        memory: &MemoryTable,
        addresses: RingAddresses,
        size: u16,
        next_available: u16,
        event_index: bool,
    ) -> Result<Self> {
        let invalid =
            |what: &str| Error::new(ErrorKind::Invalid, format!("ring of {size} entries: {what}"));
        if size == 0 || size > QUEUE_SIZE_MAX || !size.is_power_of_two() {
            return Err(invalid("the size must be a power of two, at most 1024"));
        }
        let entries = u64::from(size);
        let place = |address, length, alignment, what: &str| {
            memory.translate_user(address, length, alignment).ok_or_else(|| invalid(what))
        };
        let descriptors =
            place(addresses.descriptors, entries * 16, 16, "descriptor table outside memory")?;
        let available =
            place(addresses.available, 6 + entries * 2, 2, "available ring outside memory")?;
        let used = place(
            addresses.used,
            6 + entries * USED_ENTRY_BYTES as u64,
            4,
            "used ring outside memory",
        )?;
        let mut ring = Self {
            size,
            event_index,
            descriptors,
            available,
            used,
            next_available,
            next_used: 0,
            published: 0,
            signalled: 0,
            signalled_valid: false,
        };
        ring.next_used = ring.used_u16(2).load(Ordering::Acquire);
        ring.published = ring.next_used;
        Ok(ring)
    }

    fn u16_of(segment: &Segment, offset: usize) -> &AtomicU16 {
        assert!(offset + 2 <= segment.length());
        // SAFETY: the offset lies within the segment, which stays mapped while the queue holds its
        // memory table; ring parts are aligned to at least two bytes and offsets are even. The
        // guest accesses the same bytes, which atomics allow.
        unsafe { AtomicU16::from_ptr(segment.address().add(offset).cast()) }
    }

    fn available_u16(&self, offset: usize) -> &AtomicU16 {
        Self::u16_of(&self.available, offset)
    }

    fn used_u16(&self, offset: usize) -> &AtomicU16 {
        Self::u16_of(&self.used, offset)
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    pub fn descriptors(&self) -> &Segment {
        &self.descriptors
    }

    /// The guest-visible used ring, for the dirty log.
    pub fn used_segment(&self) -> &Segment {
        &self.used
    }

    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    pub fn set_next_available(&mut self, index: u16) {
        self.next_available = index;
    }

    pub fn used_index(&self) -> u16 {
        self.next_used
    }

    /// Entries that the guest has made available and that were not taken yet.
    pub fn pending(&self) -> std::result::Result<u16, Broken> {
        let index = self.available_u16(2).load(Ordering::Acquire);
        let pending = index.wrapping_sub(self.next_available);
        if pending > self.size { Err(Broken) } else { Ok(pending) }
    }

    /// The head of the next entry, which stays until [`Ring::take`].
    pub fn peek(&self) -> std::result::Result<u16, Broken> {
        let slot = usize::from(self.next_available % self.size);
        let head = self.available_u16(4 + slot * 2).load(Ordering::Relaxed);
        if head >= self.size { Err(Broken) } else { Ok(head) }
    }

    /// Takes the entry that was peeked.
    pub fn take(&mut self) {
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Writes a used entry; the guest sees it after [`Ring::publish`].
    pub fn push_used(&mut self, head: u16, written: u32) {
        let slot = usize::from(self.next_used % self.size);
        let mut entry = [0; USED_ENTRY_BYTES];
        entry[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        entry[4..].copy_from_slice(&written.to_le_bytes());
        let written = self.used.part(4 + slot * USED_ENTRY_BYTES, USED_ENTRY_BYTES).write(entry);
        assert!(written, "the whole used ring was translated");
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the guest all used entries; true if there were new ones.
    pub fn publish(&mut self) -> bool {
        if self.published == self.next_used {
            return false;
        }
        self.used_u16(2).store(self.next_used, Ordering::Release);
        self.published = self.next_used;
        true
    }

    /// Whether the guest wants an interrupt for what was published since the last call (2.7.7).
    pub fn wants_interrupt(&mut self) -> bool {
        // The guest must see the used index before we look at what it asked for.
        fence(Ordering::SeqCst);
        if !self.event_index {
            return self.available_u16(0).load(Ordering::Relaxed) & AVAIL_NO_INTERRUPT == 0;
        }
        let event = self.available_u16(4 + usize::from(self.size) * 2).load(Ordering::Relaxed);
        let old = std::mem::replace(&mut self.signalled, self.published);
        if !std::mem::replace(&mut self.signalled_valid, true) {
            return true;
        }
        let passed = self.published.wrapping_sub(event).wrapping_sub(1);
        passed < self.published.wrapping_sub(old)
    }

    /// Asks the guest for no kicks. With event indices the one asked for last stays behind, so at
    /// most one kick in 65536 entries comes.
    pub fn suppress_kicks(&mut self) {
        if !self.event_index {
            self.used_u16(0).store(USED_NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Asks the guest to kick for the next entry; true if one came meanwhile.
    pub fn enable_kicks(&mut self) -> std::result::Result<bool, Broken> {
        if self.event_index {
            let offset = 4 + usize::from(self.size) * USED_ENTRY_BYTES;
            self.used_u16(offset).store(self.next_available, Ordering::Relaxed);
        } else {
            self.used_u16(0).store(0, Ordering::Relaxed);
        }
        // The guest must see the wish before we look for what it missed.
        fence(Ordering::SeqCst);
        Ok(self.pending()? > 0)
    }
}

#[cfg(test)]
#[path = "ring_test.rs"]
mod tests;
