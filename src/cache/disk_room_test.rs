//! Room for new writes: what is drained must never make them wait, and to forget it must be cheap.

use super::tests::*;
use super::*;
use crate::base::units::{KIB, SECTOR_BYTES};
use crate::io::buffer::PinnedBuffer;
use crate::io::volume::SectorRange;
use std::collections::BTreeMap;

const SEGMENTS: u64 = 64;
const SEGMENT_BYTES: u64 = 256 * KIB;
const TOTAL: u64 = DISK_BYTES / SECTOR_BYTES;

/// Writes of a size, under way together.
struct Writer {
    rig: Rig,
    under_way: BTreeMap<u32, PinnedBuffer>,
    sector: u64,
    /// The most requests that were said to wait for space.
    parked: u64,
}

impl Writer {
    fn new(rig: Rig) -> Self {
        Self { rig, under_way: BTreeMap::new(), sector: 0, parked: 0 }
    }

    /// Writes `bytes` in all, in order, so many at a time.
    fn sequential(&mut self, bytes: u64, block_bytes: u64, depth: usize) {
        let count = block_bytes / SECTOR_BYTES;
        let mut left = bytes / block_bytes;
        while left > 0 || !self.under_way.is_empty() {
            while left > 0 && self.under_way.len() < depth {
                let range = SectorRange { start: self.sector, count };
                let buffer = PinnedBuffer::new(block_bytes as usize);
                let memory = [buffer.segment()];
                let id = self.rig.reactor.submit(RequestKind::Write, &[range], &memory);
                self.under_way.insert(id.expect("fewer than may be").0, buffer);
                self.sector = (self.sector + count) % TOTAL;
                left -= 1;
            }
            self.rig.tell(CacheMessage::Status { reply: Box::new(|()| ()) });
            self.rig.reactor.turn(true);
            self.parked = self.parked.max(self.rig.status.gauges().parked);
            for (id, outcome) in self.rig.reactor.ended() {
                assert_eq!(outcome, Outcome::Done);
                self.under_way.remove(&id.0).expect("it was submitted");
            }
        }
    }

    fn drain(&mut self) {
        let reached = self.rig.ask(|reply| CacheMessage::Drain { to: None, hold: false, reply });
        reached.expect("drained");
    }

    fn counters(&self) -> [u64; 4] {
        let counters = &self.rig.status.counters;
        [&counters.stalls, &counters.swept, &counters.appended_bytes, &counters.retired]
            .map(|counter| counter.load(Ordering::Relaxed))
    }
}

#[test]
fn a_burst_into_a_drained_log_never_waits_and_forgetting_is_cheap() {
    let log_bytes = SEGMENTS * SEGMENT_BYTES;
    let mut writer = Writer::new(Rig::new(shape(SEGMENTS, SEGMENT_BYTES), options()));
    for _ in 0..3 {
        writer.sequential(log_bytes / 2, 64 * KIB, 16);
        writer.drain();
    }
    let [stalls, swept, appended, retired] = writer.counters();
    assert_eq!(stalls, 0, "half of a log that is drained is room enough");
    assert_eq!(writer.parked, 0, "to wait for one's turn is not to wait for space");
    assert!(retired > SEGMENTS / 4, "the log went round: {retired}");
    let pieces = appended / 4096;
    assert!(swept <= 4 * pieces, "{swept} entries looked at for {pieces} pieces");
}

#[test]
fn a_full_log_waits_for_the_drain_and_for_nothing_else() {
    let log_bytes = SEGMENTS * SEGMENT_BYTES;
    let mut writer = Writer::new(Rig::new(shape(SEGMENTS, SEGMENT_BYTES), options()));
    writer.sequential(4 * log_bytes, 64 * KIB, 32);
    writer.drain();
    writer.rig.ask(|reply| CacheMessage::Status { reply });
    let gauges = writer.rig.status.gauges();
    assert_eq!((gauges.parked, gauges.dirty_bytes), (0, 0));
}
