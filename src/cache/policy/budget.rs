//! What fills may write: the operator's budget of flash wear, and the policy's own thrift.

use crate::base::clock::Nanos;
use crate::base::planted::{Bug, planted};

const DAY_NANOS: u128 = 86_400 * 1_000_000_000;

/// Budget that is saved at most: an hour's. A burst after a quiet night costs no more.
const SAVED_NANOS: u128 = DAY_NANOS / 24;

/// `flashWriteBudget`: bytes a day, as a token bucket. Journal writes draw on it too and may
/// overdraw it, by an hour's worth at most: they are never slowed, and admission stops meanwhile.
#[derive(Default)]
pub(super) struct WearBudget {
    bytes_per_day: Option<u64>,
    /// Bytes times nanoseconds of a day, so that nothing is lost to rounding.
    tokens: i128,
    last: Option<Nanos>,
}

impl WearBudget {
    /// `None`: without limit. A new budget begins full.
    pub(super) fn set(&mut self, bytes_per_day: Option<u64>) {
        self.bytes_per_day = bytes_per_day;
        self.tokens = self.most();
    }

    fn most(&self) -> i128 {
        (u128::from(self.bytes_per_day.unwrap_or(0)) * SAVED_NANOS) as i128
    }

    pub(super) fn tick(&mut self, now: Nanos) {
        let passed = self.last.map_or(0, |last| now.since(last).as_nanos());
        self.last = Some(now);
        let earned = u128::from(self.bytes_per_day.unwrap_or(0)) * passed.min(2 * SAVED_NANOS);
        self.tokens = (self.tokens + earned as i128).min(self.most());
    }

    pub(super) fn allows(&self, bytes: u64) -> bool {
        let any = self.bytes_per_day.is_none() || planted(Bug::BudgetIgnored);
        any || self.tokens >= (u128::from(bytes) * DAY_NANOS) as i128
    }

    pub(super) fn charge(&mut self, bytes: u64) {
        if self.bytes_per_day.is_some() {
            let cost = (u128::from(bytes) * DAY_NANOS) as i128;
            self.tokens = (self.tokens - cost).max(-self.most());
        }
    }

    /// What was charged was not written.
    pub(super) fn refund(&mut self, bytes: u64) {
        let cost = (u128::from(bytes) * DAY_NANOS) as i128;
        self.tokens = (self.tokens + cost).min(self.most());
    }
}

/// Thousandths of a fill that a miss earns, and that any read earns: trial blocks may be written as
/// long as all fills stay below 45 % of the misses, or below 14.5 % of the reads. So fills write
/// less than half of what inserting every miss would, unless so few reads miss that it is little.
const MISS_EARNS: i64 = 430;
const READ_EARNS: i64 = 145;
const FILL_COSTS: i64 = 1000;

/// Fills that may be saved up in an account, beside a tenth of the cache.
const SAVED_FILLS: i64 = 16;

/// The account that fills of blocks without a second use are drawn on.
#[derive(Default)]
pub(super) struct Thrift {
    by_misses: i64,
    by_reads: i64,
    most: i64,
}

impl Thrift {
    pub(super) fn resize(&mut self, capacity_blocks: u64) {
        self.most = (capacity_blocks as i64 / 10 + SAVED_FILLS) * FILL_COSTS;
    }

    pub(super) fn read(&mut self) {
        self.by_reads = (self.by_reads + READ_EARNS).min(self.most);
    }

    pub(super) fn miss(&mut self) {
        self.by_misses = (self.by_misses + MISS_EARNS).min(self.most);
    }

    pub(super) fn allows(&self) -> bool {
        self.by_misses.max(self.by_reads) >= FILL_COSTS
    }

    /// Overdrafts are bounded as savings are.
    pub(super) fn fill(&mut self) {
        self.by_misses = (self.by_misses - FILL_COSTS).max(-self.most);
        self.by_reads = (self.by_reads - FILL_COSTS).max(-self.most);
    }

    pub(super) fn refund(&mut self) {
        self.by_misses = (self.by_misses + FILL_COSTS).min(self.most);
        self.by_reads = (self.by_reads + FILL_COSTS).min(self.most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_of_writes_stays_within_the_budget_whatever_its_pattern() {
        for step_ms in [1_u64, 997, 60_000, 7_200_000] {
            let mut budget = WearBudget::default();
            budget.set(Some(1 << 30));
            let mut written = 0_u64;
            for step in 0..=86_400_000 / step_ms {
                budget.tick(Nanos(step * step_ms * 1_000_000));
                let mut burst = 0;
                while burst < 3 && budget.allows(4096) {
                    budget.charge(4096);
                    written += 4096;
                    burst += 1;
                }
                if step > 2_000_000 {
                    break;
                }
            }
            let most = (1_u64 << 30) + (1 << 30) / 24 + 4096;
            assert!(written <= most, "{step_ms} ms: {written} bytes of {most}");
            assert!(written > 0);
        }
    }

    #[test]
    fn journal_writes_overdraw_by_an_hour_and_admission_waits_for_as_long() {
        let mut budget = WearBudget::default();
        budget.set(Some(24 << 20));
        budget.tick(Nanos(0));
        budget.charge(1 << 40);
        assert!(!budget.allows(1));
        budget.tick(Nanos(3_590_000_000_000));
        assert!(!budget.allows(4096));
        budget.tick(Nanos(3_700_000_000_000));
        assert!(budget.allows(4096));
        // After a quiet day, as much as an hour has.
        budget.tick(Nanos(90_000_000_000_000));
        assert!(budget.allows(1 << 20) && !budget.allows((1 << 20) + 1));
        budget.set(None);
        assert!(budget.allows(u64::MAX));
    }
}
