//! The counters of one volume.

use super::histogram::{Histogram, HistogramSnapshot, add};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// What a request asked for, as counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperationClass {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

impl OperationClass {
    pub const COUNT: usize = 5;

    pub const ALL: [Self; Self::COUNT] =
        [Self::Read, Self::Write, Self::Flush, Self::Discard, Self::WriteZeroes];

    /// The name in labels and in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write_zeroes",
        }
    }
}

#[derive(Default)]
struct ClassMetrics {
    bytes: AtomicU64,
    errors: AtomicU64,
    latency: Histogram,
}

/// The counters of one volume: written by its reactor, read by anyone, without locks.
///
/// Each counter has one writer (M1 of the histogram): the reactor that serves the volume, except
/// `reconnected`, which belongs to whoever accepts the volume's connections.
#[derive(Default)]
pub struct VolumeMetrics {
    classes: [ClassMetrics; OperationClass::COUNT],
    in_flight: AtomicU64,
    throttled: AtomicU64,
    malformed: AtomicU64,
    reconnects: AtomicU64,
}

impl VolumeMetrics {
    pub fn new() -> Self {
        Self::default()
    }

    /// A request has ended. `bytes` is what it moved or covered; a failed one (`ok` false) counts
    /// as an operation and in the latencies, and its bytes do not count.
    #[inline]
    pub fn completed(&self, class: OperationClass, bytes: u64, latency: Duration, ok: bool) {
        let counters = &self.classes[class as usize];
        counters.latency.record(latency);
        if ok {
            add(&counters.bytes, bytes);
        } else {
            add(&counters.errors, 1);
        }
    }

    /// Requests taken from the guest and not yet ended.
    #[inline]
    pub fn set_in_flight(&self, requests: u64) {
        self.in_flight.store(requests, Relaxed);
    }

    /// A request had to wait for the volume's limits.
    #[inline]
    pub fn throttled(&self) {
        add(&self.throttled, 1);
    }

    /// The guest sent something that is not a request.
    #[inline]
    pub fn malformed(&self) {
        add(&self.malformed, 1);
    }

    /// A VMM connected again after an earlier connection had ended.
    pub fn reconnected(&self) {
        add(&self.reconnects, 1);
    }

    /// The counters now: each one whole, all of them of about the same instant.
    pub fn snapshot(&self) -> VolumeSnapshot {
        VolumeSnapshot {
            classes: self.classes.each_ref().map(|class| ClassSnapshot {
                bytes: class.bytes.load(Relaxed),
                errors: class.errors.load(Relaxed),
                latency: class.latency.snapshot(),
            }),
            in_flight: self.in_flight.load(Relaxed),
            throttled: self.throttled.load(Relaxed),
            malformed: self.malformed.load(Relaxed),
            reconnects: self.reconnects.load(Relaxed),
        }
    }
}

/// One class of operations of a volume, as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassSnapshot {
    /// Bytes of operations that succeeded.
    pub bytes: u64,
    pub errors: u64,
    pub latency: HistogramSnapshot,
}

impl ClassSnapshot {
    /// Operations ended, failed ones included.
    pub fn operations(&self) -> u64 {
        self.latency.count()
    }
}

/// A volume's counters, as they were read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeSnapshot {
    classes: [ClassSnapshot; OperationClass::COUNT],
    pub in_flight: u64,
    pub throttled: u64,
    pub malformed: u64,
    pub reconnects: u64,
}

impl VolumeSnapshot {
    pub fn class(&self, class: OperationClass) -> &ClassSnapshot {
        &self.classes[class as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn operations_bytes_errors_and_latency_go_to_their_class() {
        let metrics = VolumeMetrics::new();
        for (index, class) in OperationClass::ALL.into_iter().enumerate() {
            let count = index as u64 + 1;
            for _ in 0..count {
                metrics.completed(class, 512 * count, Duration::from_micros(count), true);
            }
            metrics.completed(class, 1 << 30, Duration::from_secs(count), false);
        }
        let snapshot = metrics.snapshot();
        for (index, class) in OperationClass::ALL.into_iter().enumerate() {
            let (count, read) = (index as u64 + 1, snapshot.class(class));
            assert_eq!(read.operations(), count + 1, "{class:?}");
            assert_eq!(read.bytes, 512 * count * count, "a failed operation moved nothing");
            assert_eq!(read.errors, 1);
            assert_eq!(read.latency.sum_ns, count * count * 1000 + count * 1_000_000_000);
        }
    }

    #[test]
    fn the_other_counters_count() {
        let metrics = VolumeMetrics::new();
        (0..2).for_each(|_| metrics.throttled());
        (0..3).for_each(|_| metrics.malformed());
        (0..4).for_each(|_| metrics.reconnected());
        metrics.set_in_flight(9);
        metrics.set_in_flight(5);
        let read = metrics.snapshot();
        let counts = (read.throttled, read.malformed, read.reconnects, read.in_flight);
        assert_eq!(counts, (2, 3, 4, 5));
    }

    #[test]
    fn a_reader_beside_the_writer_sees_counters_grow_to_the_exact_total() {
        let metrics = Arc::new(VolumeMetrics::new());
        let total = 200_000;
        let writer = std::thread::spawn({
            let metrics = Arc::clone(&metrics);
            move || {
                for index in 0..total {
                    let latency = Duration::from_nanos(index);
                    metrics.completed(OperationClass::Read, 1 << 33, latency, true);
                }
            }
        });
        let mut earlier = (0, 0);
        while !writer.is_finished() {
            let read = metrics.snapshot();
            let read = read.class(OperationClass::Read);
            let now = (read.operations(), read.bytes);
            assert!(now.0 >= earlier.0 && now.1 >= earlier.1, "{now:?} after {earlier:?}");
            assert!(now.1.is_multiple_of(1 << 33), "a torn value: {}", now.1);
            earlier = now;
        }
        writer.join().expect("the writer does not panic");
        let read = metrics.snapshot();
        assert_eq!(read.class(OperationClass::Read).operations(), total);
        assert_eq!(read.class(OperationClass::Read).bytes, total << 33);
    }
}
