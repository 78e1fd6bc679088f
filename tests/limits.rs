//! Limits, end to end: a front end that asks for as much as it can get.
//!
//! That a volume gets *no less* than its limit is a matter of the machine's mood, so it is measured
//! (`vflash-bench limits`) and not tested. That it gets no more is exact.

mod common;

use common::{Daemon, Served};
use std::time::{Duration, Instant};
use vflash::base::units::MIB;
use vflash::metrics::OperationClass;
use vflash::qos::Limits;
use vflash_bench::device::DeviceOptions;
use vflash_bench::runner::{Mix, Runner, Workload};

const BLOCK_BYTES: u32 = 16 << 10;
const DEPTH: u16 = 32;

/// A load without flushes, which no limit counts.
const TRANSFERS: Mix = Mix { read: 50, write: 50, ..Mix::READ };

fn load(served: &Served, mix: Mix) -> Runner {
    let device = vflash_bench::device::Device::open(DeviceOptions {
        depth: DEPTH,
        data_bytes: BLOCK_BYTES as usize,
        connect_timeout: Duration::from_secs(10),
        ..DeviceOptions::new(&served.socket)
    });
    let workload = Workload {
        mix,
        block_bytes: BLOCK_BYTES,
        ragged: false,
        span_sectors: u64::MAX,
        verify: false,
        seed: 5,
    };
    Runner::new(device.unwrap(), workload)
}

/// The least time in which `count` requests get through, by what the limiter promises: it admits
/// at most `limit × time + limit × burst` and one request more.
fn least_time(limits: Limits, count: u64) -> Duration {
    let share = |rate: Option<u64>, units: u64| {
        rate.map_or(0.0, |rate| units as f64 / rate as f64 - limits.burst.as_secs_f64())
    };
    let more = count - 1;
    let requests = share(limits.iops, more);
    let bytes = share(limits.bandwidth, more * u64::from(BLOCK_BYTES));
    Duration::from_secs_f64(requests.max(bytes).max(0.0))
}

#[test]
fn no_more_gets_through_than_the_limit_and_its_burst() {
    let burst = Duration::from_millis(20);
    let bandwidth = Some(1000 * u64::from(BLOCK_BYTES));
    let cases = [
        Limits { iops: Some(1000), bandwidth: None, burst },
        Limits { iops: None, bandwidth, burst },
        Limits { iops: Some(4000), bandwidth, burst },
        Limits { iops: Some(1000), bandwidth: None, burst: Duration::ZERO },
    ];
    let daemon = Daemon::start(1);
    for (index, limits) in cases.into_iter().enumerate() {
        let count = 400;
        // Before the volume exists, so that no time is counted that the limiter has not seen.
        let begun = Instant::now();
        let served = daemon.serve_limited(&format!("disk{index}"), 8 * MIB, false, limits);
        let mut runner = load(&served, TRANSFERS);
        common::operate(&mut runner, count);
        let (elapsed, through) = (begun.elapsed(), runner.operations);
        let least = least_time(limits, through);
        assert!(least > Duration::from_millis(300), "the limit is felt: {least:?}");
        assert!(elapsed >= least, "{limits:?}: {through} requests within {elapsed:?}");
        let seen = served.metrics.snapshot();
        assert!(seen.throttled > 0, "{DEPTH} at once are more than a burst");
        runner.drain().unwrap();
        assert_eq!(runner.errors, 0);
        runner.device.stop().unwrap();
    }
    daemon.server.stop().unwrap();
}

#[test]
fn limits_that_change_under_a_load_hold_from_then_on() {
    let limits = Limits { iops: Some(1000), bandwidth: None, burst: Duration::from_millis(20) };
    let daemon = Daemon::start(1);
    let served = daemon.serve_limited("disk", 8 * MIB, false, Limits::NONE);
    let mut runner = load(&served, TRANSFERS);
    common::operate(&mut runner, 2000);
    assert_eq!(served.metrics.snapshot().throttled, 0, "nothing is limited yet");
    daemon.server.set_limits(served.id, limits).unwrap();
    // What was admitted before the change is among the first `DEPTH`, and anything is served only
    // after it was taken in: the change comes before what is asked for from here on.
    runner.drain().unwrap();
    let begun = Instant::now();
    let before = runner.operations;
    common::operate(&mut runner, 400);
    let (elapsed, through) = (begun.elapsed(), runner.operations - before);
    let least = least_time(limits, through - u64::from(DEPTH));
    assert!(elapsed >= least, "{through} requests within {elapsed:?}, not {least:?}");
    assert!(served.metrics.snapshot().throttled > 0);
    runner.drain().unwrap();
    daemon.server.set_limits(served.id, Limits::NONE).unwrap();
    common::operate(&mut runner, 2000);
    assert_eq!(runner.errors, 0);
    daemon.server.stop().unwrap();
}

#[test]
fn zeros_take_bandwidth_as_writes_do_and_discards_only_requests() {
    const ZEROS: Mix = Mix { read: 0, write_zeroes: 100, ..Mix::READ };
    let burst = Duration::from_millis(20);
    let bandwidth = Limits { iops: None, bandwidth: Some(1000 * u64::from(BLOCK_BYTES)), burst };
    let iops = Limits { iops: Some(1000), bandwidth: None, burst };
    let daemon = Daemon::start(1);
    for (name, mix, limits) in [("zeros", ZEROS, bandwidth), ("discards", Mix::DISCARD, iops)] {
        let begun = Instant::now();
        let served = daemon.serve_limited(name, 8 * MIB, false, limits);
        let mut runner = load(&served, mix);
        common::operate(&mut runner, 400);
        let (elapsed, least) = (begun.elapsed(), least_time(limits, runner.operations));
        assert!(elapsed >= least, "{name}: {} within {elapsed:?}", runner.operations);
        assert!(served.metrics.snapshot().throttled > 0, "{name}");
        runner.drain().unwrap();
        runner.device.stop().unwrap();
    }
    // As many discards as this cover far more than the burst has, and carry nothing.
    let served = daemon.serve_limited("free", 8 * MIB, false, bandwidth);
    let mut runner = load(&served, Mix::DISCARD);
    common::operate(&mut runner, 400);
    runner.drain().unwrap();
    let seen = served.metrics.snapshot();
    let discards = seen.class(OperationClass::Discard);
    assert!(discards.bytes >= 400 * u64::from(BLOCK_BYTES), "what they cover is counted");
    assert_eq!((seen.throttled, runner.errors), (0, 0));
    runner.device.stop().unwrap();
    daemon.server.stop().unwrap();
}
