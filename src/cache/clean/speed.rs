//! Whether keeping anything pays: what flash and backing take for a read, as measured. Pure.

use std::time::Duration;

/// Larger reads tell bandwidth, not latency.
pub(super) const BYTES_MAX: u64 = 64 << 10;

/// Reads that are measured before anything follows from them.
const SAMPLES_MIN: u32 = 64;

/// A read's part in the mean: one in so many.
const MEMORY: u64 = 32;

/// The backing is faster if it takes less than so much of what the flash takes, and slower again
/// from the second on: in between it stays as it was. In hundredths.
const FASTER: u64 = 70;
const SLOWER: u64 = 100;

#[derive(Clone, Copy, Default)]
struct Mean {
    /// Nanoseconds, times [`MEMORY`].
    sum: u64,
    samples: u32,
}

impl Mean {
    fn add(&mut self, took: Duration) {
        let took = took.as_nanos().min(1 << 40) as u64;
        self.sum = match self.samples {
            0 => took * MEMORY,
            _ => self.sum - self.sum / MEMORY + took,
        };
        self.samples = self.samples.saturating_add(1);
    }

    fn known(&self) -> Option<u64> {
        (self.samples >= SAMPLES_MIN).then_some(self.sum / MEMORY)
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Speed {
    flash: Mean,
    backing: Mean,
    backing_faster: bool,
}

impl Speed {
    pub(super) fn flash_read(&mut self, took: Duration) {
        self.flash.add(took);
        self.judge();
    }

    pub(super) fn backing_read(&mut self, took: Duration) {
        self.backing.add(took);
        self.judge();
    }

    fn judge(&mut self) {
        let (Some(flash), Some(backing)) = (self.flash.known(), self.backing.known()) else {
            return;
        };
        let limit = if self.backing_faster { SLOWER } else { FASTER };
        self.backing_faster = backing * 100 < flash * limit;
    }

    /// The backing reads faster than the flash: nothing is worth keeping.
    pub(super) fn backing_faster(&self) -> bool {
        self.backing_faster
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(speed: &mut Speed, flash: u64, backing: u64, count: u32) -> bool {
        for _ in 0..count {
            speed.flash_read(Duration::from_micros(flash));
            speed.backing_read(Duration::from_micros(backing));
        }
        speed.backing_faster()
    }

    #[test]
    fn a_backing_is_passed_to_only_while_it_is_clearly_faster() {
        let mut speed = Speed::default();
        assert!(!feed(&mut speed, 100, 10, SAMPLES_MIN - 1), "too few");
        assert!(feed(&mut speed, 100, 10, 1));
        assert!(feed(&mut speed, 100, 90, 500), "it stays, a little faster");
        assert!(!feed(&mut speed, 100, 110, 500));
        assert!(!feed(&mut speed, 100, 90, 500), "and stays the other way");
        assert!(feed(&mut speed, 100, 60, 500));
        assert!(!feed(&mut Speed::default(), 0, 0, 500), "a clock that stands still says nothing");
    }

    #[test]
    fn one_slow_read_changes_nothing() {
        let mut speed = Speed::default();
        feed(&mut speed, 100, 200, 500);
        speed.flash_read(Duration::from_millis(2));
        assert!(!speed.backing_faster());
    }
}
