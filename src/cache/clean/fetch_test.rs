//! What many reads at once fetch, and what becomes of it.

use crate::base::units::{KIB, SECTOR_BYTES};
use crate::cache::CacheMessage;
use crate::cache::disk::tests::{DISK_BYTES, Rig, options, shape};
use crate::cache::policy::{BLOCK_BYTES, Settings};
use crate::io::buffer::PinnedBuffer;
use crate::io::volume::{Outcome, RequestKind, SectorRange};
use std::sync::atomic::Ordering;

const BLOCKS: u64 = DISK_BYTES / BLOCK_BYTES;

/// A cache that has room for all of the disk.
fn roomy() -> Rig {
    Rig::new(shape(32, 256 * KIB), options())
}

/// A read of all of the disk begins more fills than there may be; what is dropped does not count
/// as written, and is written when there is time.
#[test]
fn what_is_dropped_for_lack_of_time_is_kept_at_the_next_read() {
    let mut rig = roomy();
    let may = BLOCKS / 2;
    let bytes_per_day = Some(24 * may * BLOCK_BYTES);
    rig.tell(CacheMessage::SetWriteBudget { bytes_per_day });
    // It is in force before anything is read.
    rig.ask(|reply| CacheMessage::Status { reply });
    rig.check();
    let counter = |rig: &Rig| {
        let counters = &rig.status.counters;
        [&counters.fills, &counters.fills_dropped].map(|counter| counter.load(Ordering::Relaxed))
    };
    rig.ask(|reply| CacheMessage::Status { reply });
    let [filled, dropped] = counter(&rig);
    assert!(filled < may && dropped > 0, "{filled} written, {dropped} dropped");
    for _ in 0..8 {
        rig.check();
        rig.ask(|reply| CacheMessage::Status { reply });
    }
    let [filled, _] = counter(&rig);
    // Slot tables are written, too.
    assert!(filled > may * 3 / 4 && filled <= may, "{filled} of {may} that may be written");
}

/// Machines that stream one image: it is read once, though nothing of it is kept.
#[test]
fn a_stream_past_the_cache_is_fetched_once_for_all_who_read_it() {
    let mut rig = roomy();
    let core = &mut rig.reactor.volume.core;
    // There is no space that nobody uses, and the stream is long.
    core.clean.policy.set(Settings { stream_blocks: 8, ..Settings::new(10) });
    for block in 0..64 {
        rig.check_range(block * 8, 8);
    }
    let read = |rig: &Rig| rig.status.counters.backing_read_bytes.load(Ordering::Relaxed);
    let before = read(&rig);
    for block in 64..128 {
        let range = SectorRange { start: block * 8, count: 8 };
        let buffers: Vec<PinnedBuffer> =
            (0..8).map(|_| PinnedBuffer::new(BLOCK_BYTES as usize)).collect();
        for buffer in &buffers {
            let begun = rig.reactor.submit(RequestKind::Read, &[range], &[buffer.segment()]);
            assert!(begun.is_some());
        }
        let mut ended = 0;
        while ended < buffers.len() {
            rig.reactor.turn(true);
            let done = rig.reactor.ended();
            assert!(done.iter().all(|(_, outcome)| *outcome == Outcome::Done));
            ended += done.len();
        }
        let from = (range.start * SECTOR_BYTES) as usize;
        let wanted = &rig.truth[from..from + BLOCK_BYTES as usize];
        for buffer in buffers {
            let mut seen = vec![0; BLOCK_BYTES as usize];
            buffer.segment().copy_to(&mut seen);
            assert!(seen == wanted, "block {block}");
        }
    }
    assert_eq!(read(&rig) - before, 64 * BLOCK_BYTES);
    rig.ask(|reply| CacheMessage::Status { reply });
    assert!(rig.status.counters.bypassed.load(Ordering::Relaxed) >= 64, "they went past");
}
