//! The limiter on a simulated clock.

use super::*;

const SECOND: u64 = 1_000_000_000;

fn limits(iops: Option<u64>, bandwidth: Option<u64>, burst: Duration) -> Limits {
    Limits { iops, bandwidth, burst }
}

/// Runs a caller that always has a next request and asks again `late_ns` after it was told to;
/// returns requests and bytes admitted in `run_ns`.
fn saturate(
    limiter: &mut Limiter,
    run_ns: u64,
    mut size: impl FnMut() -> u64,
    late_ns: u64,
) -> (u64, u64) {
    let (mut now, mut requests, mut bytes) = (Nanos(0), 0, 0);
    let mut next = size();
    while now.0 < run_ns {
        match limiter.admit(next, now) {
            Ok(()) => {
                requests += 1;
                bytes += next;
                next = size();
            }
            Err(until) => {
                assert!(until > now, "told to come back in the past");
                now = Nanos(until.0 + late_ns);
            }
        }
    }
    (requests, bytes)
}

fn within_a_thousandth(admitted: u64, expected: u64, slack: u64, what: &str) {
    let error = admitted.abs_diff(expected);
    assert!(error <= expected / 1000 + slack, "{what}: {admitted}, not {expected}");
}

#[test]
fn no_limits_admit_everything() {
    let mut limiter = Limiter::new(Limits::default(), Nanos(5));
    assert!(limiter.unlimited());
    assert!((0..1000).all(|_| limiter.admit(u64::MAX, Nanos(0)).is_ok()));
}

#[test]
fn the_rate_is_held_to_a_thousandth_whatever_the_sizes() {
    let run_seconds = 1000;
    for (bandwidth, seed) in [(1, 1), (7_777_777, 2), (100 << 20, 3), ((3 << 30) + 1, 4)] {
        for burst_ms in [1, 100, 1000] {
            let burst = Duration::from_millis(burst_ms);
            let mut random = fastrand::Rng::with_seed(seed);
            let mut limiter = Limiter::new(limits(None, Some(bandwidth), burst), Nanos(0));
            // From far below the bucket to thirty times above it.
            let size_max = (bandwidth / 50).clamp(1, 64 << 20) * 3;
            let size = || random.u64(1..=size_max);
            let (_, bytes) = saturate(&mut limiter, run_seconds * SECOND, size, 100_000);
            let slack = size_max + bandwidth * burst_ms / 1000;
            within_a_thousandth(bytes, bandwidth * run_seconds, slack, "bytes");
        }
    }
}

#[test]
fn odd_rates_do_not_drift() {
    // 3 and 7 do not divide a second: rounding each wait would show here.
    for iops in [3, 7, 999_983] {
        let seconds = if iops > 1000 { 30 } else { 100_000 };
        let burst = Duration::from_millis(100);
        let mut limiter = Limiter::new(limits(Some(iops), None, burst), Nanos(0));
        let (requests, _) = saturate(&mut limiter, seconds * SECOND, || 4096, 0);
        let allowance = iops * seconds + iops / 10 + 1;
        assert!(requests <= allowance && requests + 1 >= allowance, "{iops}: {requests}");
    }
}

#[test]
fn a_late_caller_loses_nothing_within_the_burst() {
    let burst = Duration::from_millis(100);
    let mut limiter = Limiter::new(limits(Some(1000), None, burst), Nanos(0));
    let (requests, _) = saturate(&mut limiter, 100 * SECOND, || 1, 90_000_000);
    within_a_thousandth(requests, 100_000, 101, "requests");
}

#[test]
fn a_request_larger_than_the_bucket_passes_and_is_paid_off() {
    let burst = Duration::from_millis(10);
    let mut limiter = Limiter::new(limits(None, Some(1000), burst), Nanos(0));
    assert_eq!(limiter.admit(1_000_010, Nanos(0)), Ok(()));
    assert_eq!(limiter.admit(1, Nanos(1)), Err(Nanos(1000 * SECOND)), "10 bytes were saved up");
    assert!(limiter.admit(1, Nanos(1000 * SECOND - 1)).is_err());
    assert_eq!(limiter.admit(1, Nanos(1000 * SECOND)), Ok(()));
}

#[test]
fn both_limits_hold_at_once_and_a_refusal_takes_from_neither() {
    let burst = Duration::from_millis(100);
    for (size, expect_requests) in [(1000, 1000), (100_000, 100)] {
        let mut limiter = Limiter::new(limits(Some(1000), Some(10_000_000), burst), Nanos(0));
        let (requests, bytes) = saturate(&mut limiter, 100 * SECOND, || size, 0);
        within_a_thousandth(requests, 100 * expect_requests, expect_requests / 10 + 1, "both");
        assert!(bytes <= 1_001_000_000 + size);
    }
    // Refused by bytes a thousand times: not one of the 100 saved requests is gone.
    let mut limiter = Limiter::new(limits(Some(1000), Some(1), burst), Nanos(0));
    assert!(limiter.admit(1_000_000, Nanos(0)).is_ok());
    assert!((0..1000).all(|_| limiter.admit(1, Nanos(0)).is_err()));
    limiter.set(limits(Some(1000), None, burst), Nanos(0));
    let left = (0..1000).filter(|_| limiter.admit(1, Nanos(0)).is_ok()).count();
    assert_eq!(left, 100, "99 saved, and the one that overdraws");
}

#[test]
fn a_change_hands_out_no_burst_and_forgives_no_debt() {
    let burst = Duration::from_secs(1);
    let mut limiter = Limiter::new(limits(None, Some(1000), burst), Nanos(0));
    assert!(limiter.admit(3000, Nanos(0)).is_ok());
    for _ in 0..100 {
        limiter.set(limits(None, Some(1000), burst), Nanos(0));
    }
    assert_eq!(limiter.admit(1, Nanos(0)), Err(Nanos(2 * SECOND)));
    limiter.set(limits(None, Some(4000), burst), Nanos(0));
    assert_eq!(limiter.admit(1, Nanos(0)), Err(Nanos(SECOND / 2)), "the debt, at the new rate");
    limiter.set(limits(None, Some(500), burst), Nanos(SECOND / 4));
    assert_eq!(limiter.admit(1, Nanos(SECOND / 4)), Err(Nanos(SECOND / 4 + 2 * SECOND)));
    limiter.set(limits(None, None, burst), Nanos(SECOND));
    assert!(limiter.unlimited());
}

/// Q1, for every stretch of time between two admissions of random runs.
#[test]
fn never_more_than_limit_times_time_plus_burst_plus_one_request() {
    for seed in 0..200 {
        let mut random = fastrand::Rng::with_seed(seed);
        let rates = [1, 50, 12_345, 1 << 20, 10 << 30];
        let iops = (random.bool()).then(|| rates[random.usize(..rates.len())]);
        let bandwidth = (random.bool()).then(|| rates[random.usize(..rates.len())]);
        let burst_ns = random.u64(0..2 * SECOND);
        let burst = Duration::from_nanos(burst_ns);
        let mut limiter = Limiter::new(limits(iops, bandwidth, burst), Nanos(0));
        let (mut now, mut admitted) = (0, Vec::new());
        while admitted.len() < 150 {
            let bytes = 1 << random.u32(0..23);
            match limiter.admit(bytes, Nanos(now)) {
                Ok(()) => admitted.push((now, bytes)),
                Err(until) if random.bool() => now = until.0,
                Err(until) => now = random.u64(now..=until.0),
            }
            now += if random.u8(0..8) == 0 { random.u64(0..SECOND) } else { random.u64(0..2000) };
        }
        for first in 0..admitted.len() {
            let (mut requests, mut bytes) = (0u128, 0u128);
            for &(at, size) in &admitted[first..] {
                let earned = |rate: Option<u64>| {
                    u128::from(rate.unwrap_or(0)) * u128::from(at - admitted[first].0 + burst_ns)
                };
                // Before the last request: what was spent is covered, to the billionth.
                let second = u128::from(SECOND);
                assert!(iops.is_none() || requests * second <= earned(iops), "seed {seed}");
                assert!(bandwidth.is_none() || bytes * second <= earned(bandwidth), "seed {seed}");
                requests += 1;
                bytes += u128::from(size);
            }
        }
    }
}

#[test]
fn extreme_values_neither_overflow_nor_hang() {
    for rate in [0, 1, u64::MAX] {
        for burst in [Duration::ZERO, Duration::MAX] {
            let mut limiter = Limiter::new(limits(Some(rate), Some(rate), burst), Nanos(u64::MAX));
            for now in [0, u64::MAX, 1] {
                let _ = limiter.admit(u64::MAX, Nanos(now));
                limiter.set(limits(Some(u64::MAX), Some(rate), burst), Nanos(now));
            }
        }
    }
    let mut limiter = Limiter::new(limits(Some(0), None, Duration::ZERO), Nanos(0));
    assert_eq!(limiter.admit(1, Nanos(0)), Ok(()));
    assert_eq!(limiter.admit(1, Nanos(0)), Err(Nanos(SECOND)), "zero is the slowest there is");
}

#[test]
fn a_clock_that_steps_back_earns_nothing_twice() {
    let mut limiter = Limiter::new(limits(Some(1), None, Duration::ZERO), Nanos(10 * SECOND));
    assert!(limiter.admit(1, Nanos(10 * SECOND)).is_ok());
    assert_eq!(limiter.admit(1, Nanos(0)), Err(Nanos(11 * SECOND)));
    assert!(limiter.admit(1, Nanos(11 * SECOND)).is_ok());
    assert_eq!(limiter.admit(1, Nanos(11 * SECOND)), Err(Nanos(12 * SECOND)));
}
