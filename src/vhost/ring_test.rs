//! Our ring against crate `virtio-queue` on the same traffic.

use super::*;
use crate::vhost::memory::{Region, RegionInfo};
use crate::virtio::chain::Memory;
use std::fs::File;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

const SIZE: u16 = 16;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const BYTES: usize = 0x10000;

struct Rig {
    ours: MemoryTable,
    theirs: GuestMemoryMmap,
}

impl Rig {
    fn new() -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(BYTES as u64).unwrap();
        Self { ours: table(file.try_clone().unwrap()), theirs: guest(file) }
    }

    fn ring(&self, event_index: bool) -> Ring {
        let addresses =
            RingAddresses { descriptors: DESCRIPTORS, available: AVAILABLE, used: USED };
        Ring::new(&self.ours, addresses, SIZE, 0, event_index).unwrap()
    }

    fn u16(&self, address: u64) -> u16 {
        let mut bytes = [0; 2];
        self.ours.translate(address, 2).unwrap().copy_to(&mut bytes);
        u16::from_le_bytes(bytes)
    }

    fn set_u16(&self, address: u64, value: u16) {
        self.ours.translate(address, 2).unwrap().copy_from(&value.to_le_bytes());
    }
}

fn table(file: File) -> MemoryTable {
    let info = RegionInfo { guest_address: 0, size: BYTES as u64, user_address: 0, file_offset: 0 };
    let mut table = MemoryTable::default();
    table.add(Region::map(info, file).unwrap()).unwrap();
    table
}

fn guest(file: File) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges_with_files([(
        GuestAddress(0),
        BYTES,
        Some(FileOffset::new(file, 0)),
    )])
    .unwrap()
}

fn reference(event_index: bool) -> Queue {
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_desc_table_address(Some(DESCRIPTORS as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
    queue.set_used_ring_address(Some(USED as u32), Some(0));
    queue.set_event_idx(event_index);
    queue.set_ready(true);
    queue
}

/// The same random traffic through our ring and through `virtio-queue`: the same heads come out,
/// and used ring, flags and event indices are the same bytes after each step.
#[test]
fn behaves_as_the_reference_on_random_traffic() {
    for seed in 0..200 {
        let mut random = fastrand::Rng::with_seed(seed);
        let event_index = random.bool();
        let (left, right) = (Rig::new(), Rig::new());
        let mut ours = left.ring(event_index);
        let mut theirs = reference(event_index);
        let (mut available, mut taken) = (0u16, Vec::new());
        let mut first = event_index;
        for step in 0..300 {
            let place = format!("seed {seed} step {step}");
            match random.u8(0..6) {
                0 | 1 if available.wrapping_sub(ours.used_index()) < SIZE => {
                    let head = random.u16(0..SIZE);
                    for rig in [&left, &right] {
                        let slot = u64::from(available % SIZE);
                        rig.set_u16(AVAILABLE + 4 + slot * 2, head);
                        rig.set_u16(AVAILABLE + 2, available.wrapping_add(1));
                    }
                    available = available.wrapping_add(1);
                }
                2 => {
                    let theirs = theirs.iter(&right.theirs).unwrap().next().map(|c| c.head_index());
                    let mine = (ours.pending() != Ok(0)).then(|| {
                        let head = ours.peek().unwrap();
                        ours.take();
                        head
                    });
                    assert_eq!(mine, theirs, "{place}");
                    taken.extend(mine);
                }
                3 if !taken.is_empty() => {
                    let head = taken.swap_remove(random.usize(..taken.len()));
                    let written = random.u32(..);
                    ours.push_used(head, written);
                    assert!(ours.publish() && !ours.publish());
                    theirs.add_used(&right.theirs, head, written).unwrap();
                    let wish = random.u16(..4).wrapping_add(ours.used_index()).wrapping_sub(2);
                    for rig in [&left, &right] {
                        rig.set_u16(AVAILABLE + 4 + u64::from(SIZE) * 2, wish);
                    }
                    let needed = theirs.needs_notification(&right.theirs).unwrap();
                    // The reference does not read NO_INTERRUPT (here the guest never sets it), and
                    // does not know that a daemon which died may have left an interrupt unsent.
                    let first = std::mem::replace(&mut first, false);
                    assert_eq!(ours.wants_interrupt(), needed || first, "{place}");
                }
                4 => {
                    let more = theirs.enable_notification(&right.theirs).unwrap();
                    assert_eq!(ours.enable_kicks(), Ok(more), "{place}");
                }
                _ => {
                    ours.suppress_kicks();
                    theirs.disable_notification(&right.theirs).unwrap();
                }
            }
            for offset in (0..6 + u64::from(SIZE) * 8).step_by(2) {
                let (mine, expected) = (left.u16(USED + offset), right.u16(USED + offset));
                assert_eq!(mine, expected, "{place} used ring at {offset}");
            }
        }
    }
}

#[test]
fn a_guest_that_asks_for_no_interrupt_gets_none() {
    let rig = Rig::new();
    let mut ring = rig.ring(false);
    ring.push_used(1, 0);
    ring.publish();
    assert!(ring.wants_interrupt());
    rig.set_u16(AVAILABLE, AVAIL_NO_INTERRUPT);
    assert!(!ring.wants_interrupt());
}

#[test]
fn a_ring_with_impossible_indices_is_broken_not_followed() {
    let rig = Rig::new();
    let ring = rig.ring(true);
    rig.set_u16(AVAILABLE + 2, SIZE + 1);
    assert_eq!(ring.pending(), Err(Broken));
    rig.set_u16(AVAILABLE + 2, 1);
    rig.set_u16(AVAILABLE + 4, SIZE);
    assert_eq!(ring.peek(), Err(Broken));
}

#[test]
fn rings_outside_memory_or_of_odd_sizes_are_refused() {
    let rig = Rig::new();
    let good = RingAddresses { descriptors: DESCRIPTORS, available: AVAILABLE, used: USED };
    let bad = [
        (RingAddresses { descriptors: DESCRIPTORS + 8, ..good }, SIZE),
        (RingAddresses { available: AVAILABLE + 1, ..good }, SIZE),
        (RingAddresses { used: BYTES as u64 - 64, ..good }, SIZE),
        (RingAddresses { descriptors: u64::MAX - 15, ..good }, SIZE),
        (good, 0),
        (good, 12),
        (good, 2048),
    ];
    for (addresses, size) in bad {
        assert!(Ring::new(&rig.ours, addresses, size, 0, true).is_err(), "{addresses:?} {size}");
    }
    assert!(Ring::new(&rig.ours, good, SIZE, 0, true).is_ok());
}
