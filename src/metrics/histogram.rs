//! A latency histogram of fixed size: log-linear, exact to 1/16 (and to 64 ns below 1 µs).
//!
//! Invariants:
//! - M1: one thread records; any thread reads. Recording is a relaxed load and store, never a
//!   locked instruction; a reader sees each counter whole, though not all of one instant.
//! - M2: bucket bounds are inclusive above, as Prometheus' `le` is, and every power of two from
//!   1024 ns up is a bound: cumulative counts at such a bound are exact.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Buckets per doubling, as a power of two.
const STEP_BITS: u32 = 4;
const STEPS: usize = 1 << STEP_BITS;
/// Nanoseconds of the smallest bucket, as a power of two.
const UNIT_BITS: u32 = 6;
/// Doublings above the linear part: the last finite bound is 2^36 ns, 68 s.
const DOUBLINGS: usize = 26;
/// The linear part, the doublings, and one for everything above.
const BUCKETS: usize = STEPS + DOUBLINGS * STEPS + 1;

/// Adds without a locked instruction; correct because one thread writes (M1).
#[inline]
pub(super) fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(amount), Relaxed);
}

/// The bucket that `latency_ns` falls into.
#[inline]
fn bucket_of(latency_ns: u64) -> usize {
    // One less, so that a bound belongs to the bucket below it (M2).
    let units = latency_ns.saturating_sub(1) >> UNIT_BITS;
    let doubling = (units >> STEP_BITS).checked_ilog2().map_or(0, |log| log + 1);
    let step = (units >> doubling.saturating_sub(1)) as usize & (STEPS - 1);
    let index = doubling as usize * STEPS + step;
    index.min(BUCKETS - 1)
}

/// The inclusive upper bound of a bucket in nanoseconds; `None` for the last.
fn bound_ns(index: usize) -> Option<u64> {
    if index >= BUCKETS - 1 {
        return None;
    }
    let (doubling, step) = (index / STEPS, (index % STEPS) as u64 + 1);
    let units = match doubling {
        0 => step,
        _ => (STEPS as u64 + step) << (doubling - 1),
    };
    Some(units << UNIT_BITS)
}

/// Recorded by one thread, read by any.
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: std::array::from_fn(|_| AtomicU64::new(0)), sum_ns: AtomicU64::new(0) }
    }
}

impl Histogram {
    /// Counts one latency. One thread only (M1).
    #[inline]
    pub fn record(&self, latency: Duration) {
        let latency_ns =
            latency.as_secs().wrapping_mul(1_000_000_000) + u64::from(latency.subsec_nanos());
        add(&self.buckets[bucket_of(latency_ns)], 1);
        add(&self.sum_ns, latency_ns);
    }

    /// The counters now. The sum may include or lack the few records made meanwhile.
    pub fn snapshot(&self) -> HistogramSnapshot {
        HistogramSnapshot {
            sum_ns: self.sum_ns.load(Relaxed),
            buckets: self.buckets.iter().map(|bucket| bucket.load(Relaxed)).collect(),
        }
    }
}

/// A histogram as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistogramSnapshot {
    buckets: Box<[u64]>,
    /// Nanoseconds.
    pub sum_ns: u64,
}

impl HistogramSnapshot {
    /// How many latencies were recorded.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// How many were at most `limit_ns`; exact where that is a bucket bound (M2), else without the
    /// bucket that it cuts.
    pub fn count_up_to(&self, limit_ns: u64) -> u64 {
        let within = |index: &usize| bound_ns(*index).is_some_and(|bound| bound <= limit_ns);
        let last = (0..self.buckets.len()).take_while(within).count();
        self.buckets.iter().take(last).sum()
    }

    /// The latency that the share `quantile` (0 to 1) did not exceed: the upper bound of its
    /// bucket, at most 1/16 (or 64 ns) above the truth. `None` if nothing was recorded. Beyond 68 s
    /// the answer is [`Duration::MAX`].
    pub fn quantile(&self, quantile: f64) -> Option<Duration> {
        let count = self.count();
        let rank = (quantile.clamp(0.0, 1.0) * count as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (index, bucket) in self.buckets.iter().enumerate() {
            seen += bucket;
            if seen >= rank {
                return Some(bound_ns(index).map_or(Duration::MAX, Duration::from_nanos));
            }
        }
        None
    }

    /// The mean; `None` if nothing was recorded.
    pub fn mean(&self) -> Option<Duration> {
        self.sum_ns.checked_div(self.count()).map(Duration::from_nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(latencies_ns: impl IntoIterator<Item = u64>) -> HistogramSnapshot {
        let histogram = Histogram::default();
        latencies_ns.into_iter().for_each(|ns| histogram.record(Duration::from_nanos(ns)));
        histogram.snapshot()
    }

    #[test]
    fn buckets_tile_the_line_with_inclusive_upper_bounds() {
        let mut lower = 0;
        for index in 0..BUCKETS - 1 {
            let upper = bound_ns(index).expect("finite");
            assert!(upper > lower, "bucket {index}");
            assert_eq!(bucket_of(lower + 1), index);
            assert_eq!(bucket_of(upper), index);
            assert_eq!(bucket_of(upper + 1), index + 1);
            assert!(upper - lower <= (upper / STEPS as u64).max(64), "bucket {index} is too wide");
            lower = upper;
        }
        assert_eq!(lower, 1 << 36);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert_eq!(bucket_of(0), 0);
    }

    #[test]
    fn powers_of_two_are_exact_bounds() {
        for power in 10..=36 {
            let limit = 1u64 << power;
            let snapshot = of([limit - 1, limit, limit + 1]);
            assert_eq!(snapshot.count_up_to(limit), 2, "2^{power}");
            assert_eq!(snapshot.sum_ns, 3 * limit);
        }
    }

    #[test]
    fn quantiles_are_within_a_sixteenth_of_the_sorted_truth() {
        for seed in 0..50 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut latency = || {
                let power = random.u32(1..36);
                random.u64(1..1 << power)
            };
            let mut latencies: Vec<u64> = (0..1 + seed * 37).map(|_| latency()).collect();
            let snapshot = of(latencies.iter().copied());
            latencies.sort_unstable();
            for quantile in [0.0, 0.01, 0.5, 0.9, 0.99, 0.999, 1.0] {
                let rank = (quantile * latencies.len() as f64).ceil().max(1.0) as usize;
                let truth = latencies[rank - 1];
                let told = snapshot.quantile(quantile).expect("not empty").as_nanos() as u64;
                assert!(told >= truth, "seed {seed}, {quantile}: {told} < {truth}");
                let error_max = (truth / 15).max(64);
                assert!(told - truth <= error_max, "seed {seed}, {quantile}: {told}, not {truth}");
            }
        }
    }

    #[test]
    fn an_empty_histogram_has_no_quantile_and_no_mean() {
        let empty = of([]);
        assert_eq!((empty.count(), empty.quantile(0.5), empty.mean()), (0, None, None));
        let far = of([u64::MAX]);
        assert_eq!(far.quantile(0.5), Some(Duration::MAX));
        assert_eq!(of([10, 30]).mean(), Some(Duration::from_nanos(20)));
    }
}
