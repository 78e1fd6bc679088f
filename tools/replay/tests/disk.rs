//! A whole cached disk keeps about what its policy alone would have kept, though the log goes round
//! through the same flash.

use vflash_replay::through;
use vflash_replay::trace::{Request, Trace};

/// Blocks of the made trace's disk; the cache is a quarter of it.
const BLOCKS: u64 = 80_000;

/// More writes than reads, in runs of a few blocks, few of them far more often than the others:
/// the log goes round many times.
fn busy() -> Trace {
    let mut random = fastrand::Rng::with_seed(7);
    let requests = (0..60_000).map(|number| {
        let block = (random.f64().powi(3) * (BLOCKS - 8) as f64) as u64;
        // What is near in rank is not near on the disk.
        let block = (block / 8 * 7919) % (BLOCKS / 8) * 8;
        let sectors = 8 * random.u32(1..=8);
        let write = random.u8(..5) < 3;
        Request { sector: block * 8, sectors, write, micros: number * 5_000 }
    });
    Trace { name: "made".into(), requests: requests.collect() }
}

#[test]
fn a_disk_that_is_written_all_the_time_keeps_what_its_policy_would() {
    let report = through::run(&busy(), 0.25).expect("a quarter is enough of a cache");
    println!("{report:?}");
    let lost = report.miss_ratio - report.policy_miss_ratio;
    assert!(lost < 0.02, "{lost}: {report:?}");
    assert!(report.appended_bytes > 4 * report.cache_bytes, "{report:?}");
}
