//! L1: rate limits of a volume: requests per second, bytes per second, and how much may be saved.
//!
//! Pure: time is an argument. Invariants, for every limit and every stretch of time:
//! - Q1: what is admitted is at most `limit × time + limit × burst + one request`. The one request
//!   is the debt: a request is taken while the account is not overdrawn and may overdraw it, so
//!   a request larger than the whole bucket passes, and is paid off before the next one.
//! - Q2: while demand exceeds the limit, nothing is lost: the account is exact (no rounding at
//!   all), and overflow needs a caller that asks again later than `burst` after it was told to.
//! - Q3: a change of limits hands out no new burst and forgives no debt.

use crate::base::clock::Nanos;
use std::time::Duration;

/// The limits of a volume. The default is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests per second.
    pub iops: Option<u64>,
    /// Bytes per second.
    pub bandwidth: Option<u64>,
    /// How long unused allowance is saved up.
    pub burst: Duration,
}

impl Limits {
    /// A tenth of a second: enough to ride over a late timer, too little to be noticed as a rate.
    pub const BURST_DEFAULT: Duration = Duration::from_millis(100);

    pub const NONE: Self = Self { iops: None, bandwidth: None, burst: Self::BURST_DEFAULT };
}

impl Default for Limits {
    fn default() -> Self {
        Self::NONE
    }
}

/// Holds one volume to its [`Limits`]. One caller; no clock of its own.
#[derive(Debug)]
pub struct Limiter {
    requests: Option<Account>,
    bytes: Option<Account>,
}

impl Limiter {
    /// Starts with the whole burst saved up.
    pub fn new(limits: Limits, now: Nanos) -> Self {
        let account = |rate: Option<u64>| rate.map(|rate| Account::new(rate, limits.burst, now));
        Self { requests: account(limits.iops), bytes: account(limits.bandwidth) }
    }

    /// Changes the limits from `now` on. What was earned until now is earned at the old rate; what
    /// is saved is cut to the new burst; debt stays, and is paid off at the new rate.
    pub fn set(&mut self, limits: Limits, now: Nanos) {
        let change = |account: &mut Option<Account>, rate: Option<u64>| {
            *account = rate.map(|rate| match account.take() {
                Some(old) => old.changed(rate, limits.burst, now),
                None => Account::new(rate, limits.burst, now),
            });
        };
        change(&mut self.requests, limits.iops);
        change(&mut self.bytes, limits.bandwidth);
    }

    /// Takes one request of `bytes` from both limits, or from neither; `Err` is when to ask again.
    #[inline]
    pub fn admit(&mut self, bytes: u64, now: Nanos) -> Result<(), Nanos> {
        if self.unlimited() {
            return Ok(());
        }
        self.admit_limited(bytes, now)
    }

    fn admit_limited(&mut self, bytes: u64, now: Nanos) -> Result<(), Nanos> {
        let mut accounts = [(self.requests.as_mut(), 1), (self.bytes.as_mut(), bytes)];
        let mut wait = None;
        for (account, _) in &mut accounts {
            if let Some(account) = account {
                account.earn(now);
                wait = wait.max(account.paid_off_at());
            }
        }
        if let Some(until) = wait {
            return Err(until);
        }
        for (account, cost) in accounts {
            if let Some(account) = account {
                account.spend(cost);
            }
        }
        Ok(())
    }

    /// No limit is set: every request is admitted.
    #[inline]
    pub fn unlimited(&self) -> bool {
        self.requests.is_none() && self.bytes.is_none()
    }
}

/// Units (requests or bytes) are kept as billionths: earning `rate` units a second is then
/// `rate` billionths a nanosecond, a product of integers, so the balance is exact and a long run
/// drifts by nothing (Q2). Only the answer "when" is divided, and rounded up, so that it is never
/// too early; the balance does not see it.
const BILLIONTHS: i128 = 1_000_000_000;

#[derive(Debug)]
struct Account {
    /// Units per second; at least 1, so that every debt ends.
    rate: u64,
    /// Billionths of a unit; the balance never exceeds it.
    balance_max: i128,
    /// Billionths of a unit; negative is debt, of less than one request.
    balance: i128,
    /// Up to when allowance has been earned.
    earned_until: Nanos,
}

impl Account {
    fn new(rate: u64, burst: Duration, now: Nanos) -> Self {
        let rate = rate.max(1);
        let burst_ns = u64::try_from(burst.as_nanos()).unwrap_or(u64::MAX);
        let balance_max = earnings(rate, burst_ns);
        Self { rate, balance_max, balance: balance_max, earned_until: now }
    }

    fn changed(mut self, rate: u64, burst: Duration, now: Nanos) -> Self {
        self.earn(now);
        let new = Self::new(rate, burst, now);
        Self { balance: self.balance.min(new.balance_max), ..new }
    }

    /// A clock that steps back earns nothing until it has caught up.
    fn earn(&mut self, now: Nanos) {
        let elapsed_ns = now.0.saturating_sub(self.earned_until.0);
        self.earned_until = self.earned_until.max(now);
        let balance = self.balance.saturating_add(earnings(self.rate, elapsed_ns));
        self.balance = balance.min(self.balance_max);
    }

    /// When nothing will be owed any more, if nothing is spent; `None` if nothing is owed.
    fn paid_off_at(&self) -> Option<Nanos> {
        if self.balance >= 0 {
            return None;
        }
        // `balance` is above -2^94 (see `spend`), so the sum cannot overflow. Rounded up: at the
        // answer the debt is paid, one nanosecond earlier it is not.
        let rate = i128::from(self.rate);
        let wait_ns = (rate - 1 - self.balance) / rate;
        let wait_ns = u64::try_from(wait_ns).unwrap_or(u64::MAX);
        Some(Nanos(self.earned_until.0.saturating_add(wait_ns)))
    }

    /// Only called while the balance is not negative; so it stays above -(2^64 × 2^30).
    fn spend(&mut self, units: u64) {
        assert!(self.balance >= 0, "a request is taken while nothing is owed");
        self.balance -= i128::from(units) * BILLIONTHS;
    }
}

/// Billionths of a unit earned in `elapsed_ns`; saturates, which only an idle time of centuries
/// reaches, and there the burst caps it anyway.
fn earnings(rate: u64, elapsed_ns: u64) -> i128 {
    i128::from(rate).saturating_mul(i128::from(elapsed_ns))
}

#[cfg(test)]
#[path = "limiter_test.rs"]
mod tests;
