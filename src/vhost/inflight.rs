//! The in-flight area (vhost-user, "Inflight I/O tracking"): which requests are under way, in
//! memory that the front end keeps when we die.
//!
//! Layout of one queue (split ring), as the specification has it:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | features |
//! | 8 | 2 | version, 0 while fresh |
//! | 10 | 2 | desc_num |
//! | 12 | 2 | last_batch_head |
//! | 14 | 2 | used_idx |
//! | 16 | 16 each | per descriptor: inflight (1), padding (5), next (2), counter (8) |
//!
//! A head is marked before its request starts and cleared after it stands in the used ring. The
//! batch list (`last_batch_head`, `next`) tells a successor which heads were published by the last
//! `used_idx` store, so that none is answered twice.

use super::fault::SharedMapping;
use crate::base::{Error, Result};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering, compiler_fence};
use vm_memory::VolatileMemory;

const HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 16;
const ALIGNMENT: usize = 64;
const VERSION: u16 = 1;

const VERSION_OFFSET: usize = 8;
const COUNT_OFFSET: usize = 10;
const BATCH_OFFSET: usize = 12;
const USED_OFFSET: usize = 14;
const NEXT_OFFSET: usize = 6;
const COUNTER_OFFSET: usize = 8;

/// Bytes that one queue of `size` entries takes.
pub fn queue_bytes(size: u16) -> usize {
    (HEADER_BYTES + ENTRY_BYTES * usize::from(size)).next_multiple_of(ALIGNMENT)
}

/// The shared area of all queues of a connection.
pub struct InflightArea {
    mapping: Arc<SharedMapping>,
    queues: u16,
    queue_size: u16,
}

impl InflightArea {
    /// Makes a fresh area and the file to hand to the front end.
    pub fn create(queues: u16, queue_size: u16) -> Result<(Self, File)> {
        let name = c"vflash-inflight";
        let fd: OwnedFd =
            nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
                .map_err(|error| Error::io("cannot make the in-flight area", error.into()))?;
        let file = File::from(fd);
        let bytes = queue_bytes(queue_size) * usize::from(queues);
        file.set_len(bytes as u64)
            .map_err(|error| Error::io("cannot size the in-flight area", error))?;
        let clone =
            file.try_clone().map_err(|error| Error::io("cannot keep the in-flight area", error))?;
        Ok((Self::map(clone, 0, queues, queue_size)?, file))
    }

    /// Maps the area that the front end kept.
    pub fn map(file: File, offset: u64, queues: u16, queue_size: u16) -> Result<Self> {
        let bytes = queue_bytes(queue_size) * usize::from(queues);
        let mapping = SharedMapping::map(file, offset, bytes as u64)
            .map_err(|error| error.context("the in-flight area"))?;
        Ok(Self { mapping: Arc::new(mapping), queues, queue_size })
    }

    /// Bytes of the whole area.
    pub fn bytes(&self) -> u64 {
        self.mapping.size() as u64
    }

    /// The part of queue `index`, if the area has it and its entries cover `size`.
    pub fn queue(&self, index: u16, size: u16) -> Option<InflightQueue> {
        if index >= self.queues || size > self.queue_size {
            return None;
        }
        let base = queue_bytes(self.queue_size) * usize::from(index);
        let completed = Vec::with_capacity(usize::from(size));
        Some(InflightQueue { mapping: self.mapping.clone(), base, size, completed })
    }
}

/// One queue's part of the area. Its bytes are shared with the front end, so every value that is
/// read back is checked.
pub struct InflightQueue {
    mapping: Arc<SharedMapping>,
    base: usize,
    size: u16,
    /// Heads completed since the last publication.
    completed: Vec<u16>,
}

/// A request that was under way when an earlier daemon died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Survivor {
    pub head: u16,
    pub counter: u64,
}

impl InflightQueue {
    /// The area's file was cut short.
    pub fn faulted(&self) -> bool {
        self.mapping.faulted()
    }

    fn u8_at(&self, offset: usize) -> &AtomicU8 {
        self.mapping.get_atomic_ref(self.base + offset).expect("within the queue's own part")
    }

    fn u16_at(&self, offset: usize) -> &AtomicU16 {
        self.mapping.get_atomic_ref(self.base + offset).expect("aligned, within the queue's part")
    }

    fn u64_at(&self, offset: usize) -> &AtomicU64 {
        self.mapping.get_atomic_ref(self.base + offset).expect("aligned, within the queue's part")
    }

    fn entry(&self, head: u16) -> usize {
        assert!(head < self.size, "heads are checked when they are popped");
        HEADER_BYTES + ENTRY_BYTES * usize::from(head)
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        self.u16_at(self.entry(head) + NEXT_OFFSET)
    }

    /// Brings the area to a consistent state with the used ring's index and returns the requests
    /// that must be done again, oldest first.
    pub fn recover(&mut self, used: u16) -> Vec<Survivor> {
        let version = self.u16_at(VERSION_OFFSET);
        if version.load(Ordering::Relaxed) == 0 {
            for head in 0..self.size {
                self.u8_at(self.entry(head)).store(0, Ordering::Relaxed);
            }
            self.u16_at(COUNT_OFFSET).store(self.size, Ordering::Relaxed);
            self.u16_at(USED_OFFSET).store(used, Ordering::Relaxed);
            version.store(VERSION, Ordering::Release);
            return Vec::new();
        }
        self.finish_last_batch(used);
        let mut survivors: Vec<_> = (0..self.size)
            .filter(|head| self.u8_at(self.entry(*head)).load(Ordering::Relaxed) != 0)
            .map(|head| Survivor {
                head,
                counter: self.u64_at(self.entry(head) + COUNTER_OFFSET).load(Ordering::Relaxed),
            })
            .collect();
        survivors.sort_by_key(|survivor| survivor.counter);
        survivors
    }

    /// Heads of the last batch stand in the used ring, though their marks may not be cleared yet.
    fn finish_last_batch(&mut self, used: u16) {
        let recorded = self.u16_at(USED_OFFSET).load(Ordering::Relaxed);
        let mut head = self.u16_at(BATCH_OFFSET).load(Ordering::Relaxed);
        for _ in 0..used.wrapping_sub(recorded).min(self.size) {
            if head >= self.size {
                break;
            }
            self.u8_at(self.entry(head)).store(0, Ordering::Relaxed);
            head = self.next(head).load(Ordering::Relaxed);
        }
        self.u16_at(USED_OFFSET).store(used, Ordering::Release);
    }

    /// Before the request of `head` starts.
    pub fn start(&mut self, head: u16, counter: u64) {
        let entry = self.entry(head);
        self.u64_at(entry + COUNTER_OFFSET).store(counter, Ordering::Relaxed);
        self.u8_at(entry).store(1, Ordering::Release);
    }

    /// Before `head` is written into the used ring.
    pub fn complete(&mut self, head: u16) {
        let last = self.u16_at(BATCH_OFFSET).load(Ordering::Relaxed);
        self.next(head).store(last, Ordering::Relaxed);
        self.u16_at(BATCH_OFFSET).store(head, Ordering::Release);
        self.completed.push(head);
    }

    /// After the used ring's index became `used`: the heads completed since the last call are done.
    pub fn published(&mut self, used: u16) {
        compiler_fence(Ordering::SeqCst);
        for at in 0..self.completed.len() {
            self.u8_at(self.entry(self.completed[at])).store(0, Ordering::Relaxed);
        }
        self.completed.clear();
        self.u16_at(USED_OFFSET).store(used, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(file: &File) -> InflightQueue {
        let area = InflightArea::map(file.try_clone().unwrap(), 0, 2, 8).unwrap();
        area.queue(1, 8).unwrap()
    }

    fn heads(survivors: &[Survivor]) -> Vec<u16> {
        survivors.iter().map(|survivor| survivor.head).collect()
    }

    #[test]
    fn a_fresh_area_takes_the_used_index_of_its_ring() {
        let (_, file) = InflightArea::create(2, 8).unwrap();
        assert!(queue(&file).recover(7).is_empty());
        let mut first = queue(&file);
        first.start(3, 1);
        assert_eq!(heads(&queue(&file).recover(7)), [3], "request 0 of a used ring is kept");
    }

    #[test]
    fn survivors_come_in_the_order_they_were_started() {
        let (_, file) = InflightArea::create(2, 8).unwrap();
        let mut dead = queue(&file);
        dead.recover(0);
        for (counter, head) in [5, 1, 7, 0].into_iter().enumerate() {
            dead.start(head, counter as u64);
        }
        dead.complete(7);
        dead.published(1);
        assert_eq!(heads(&queue(&file).recover(1)), [5, 1, 0]);
    }

    #[test]
    fn death_between_publishing_and_clearing_answers_nothing_twice() {
        let (_, file) = InflightArea::create(2, 8).unwrap();
        let mut dead = queue(&file);
        dead.recover(0xfffe);
        for head in 0..5 {
            dead.start(head, u64::from(head));
        }
        dead.complete(4);
        dead.published(0xffff);
        for head in [3, 0, 2] {
            dead.complete(head);
        }
        // The used index went on by three, over the wrap; `published` was not reached.
        let mut heir = queue(&file);
        assert_eq!(heads(&heir.recover(2)), [1]);
        assert_eq!(heads(&queue(&file).recover(2)), [1], "recovery can be cut short and repeated");
        // Nothing was published: all three are to be done again.
        let (_, file) = InflightArea::create(2, 8).unwrap();
        let mut dead = queue(&file);
        dead.recover(0);
        dead.start(6, 1);
        dead.complete(6);
        assert_eq!(heads(&queue(&file).recover(0)), [6]);
        // A request done twice in one list must not loop.
        let mut heir = queue(&file);
        heir.recover(0);
        heir.start(2, 2);
        heir.complete(6);
        heir.complete(2);
        assert!(queue(&file).recover(2).is_empty());
    }

    #[test]
    fn a_scribbled_area_is_survived() {
        use std::os::unix::fs::FileExt;
        let (area, file) = InflightArea::create(2, 8).unwrap();
        file.write_all_at(&vec![0xff; area.bytes() as usize], 0).unwrap();
        let mut queue = queue(&file);
        let survivors = queue.recover(3);
        assert!(survivors.len() <= 8 && survivors.iter().all(|survivor| survivor.head < 8));
        queue.start(1, 1);
        queue.complete(1);
        queue.published(4);
    }

    #[test]
    fn an_area_that_does_not_fit_its_file_is_refused() {
        let (area, file) = InflightArea::create(2, 8).unwrap();
        assert!(InflightArea::map(file.try_clone().unwrap(), 0, 3, 8).is_err());
        assert!(InflightArea::map(file.try_clone().unwrap(), 1, 2, 8).is_err());
        assert!(InflightArea::map(file, u64::MAX, 2, 8).is_err());
        assert!(area.queue(2, 8).is_none() && area.queue(0, 9).is_none());
    }
}
