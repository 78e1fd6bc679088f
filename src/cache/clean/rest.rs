//! A flash that fails to be written is left in peace: what is kept is worth no more errors. After a
//! pause it is tried again, each time a longer one.

use crate::base::clock::Nanos;
use std::time::Duration;

/// So many writes that failed one after the other, and nothing is kept for a while.
const FAILURES_MAX: u32 = 8;

/// How long; it doubles up to the last.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_LAST: Duration = Duration::from_secs(3600);

/// See the module.
pub(super) struct Rest {
    failures: u32,
    /// Nothing is written before; none: the last write was good, or few have failed.
    until: Option<Nanos>,
    pause: Duration,
}

impl Default for Rest {
    fn default() -> Self {
        Self { failures: 0, until: None, pause: PAUSE_FIRST }
    }
}

impl Rest {
    /// A write has failed. True: the first pause begins.
    pub(super) fn failed(&mut self, now: Nanos) -> bool {
        self.failures = self.failures.saturating_add(1);
        // Those that were under way when a pause began do not make it longer.
        if self.failures < FAILURES_MAX || self.rests(now) {
            return false;
        }
        let first = self.until.is_none();
        self.until = Some(now + self.pause);
        self.pause = (self.pause * 2).min(PAUSE_LAST);
        first
    }

    /// A write was good. True: the first after a pause.
    pub(super) fn succeeded(&mut self) -> bool {
        std::mem::take(self).until.is_some()
    }

    /// Nothing is to be written now.
    pub(super) fn rests(&self, now: Nanos) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// The last writes failed.
    pub(super) fn is_failing(&self) -> bool {
        self.until.is_some()
    }

    /// When something may be written.
    pub(super) fn until(&self) -> Nanos {
        self.until.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_and_end_with_a_good_write() {
        let mut rest = Rest::default();
        let at = |seconds| Nanos(0) + Duration::from_secs(seconds);
        (1..FAILURES_MAX).for_each(|_| assert!(!rest.failed(at(0))));
        assert!(!rest.is_failing() && rest.failed(at(0)), "the first pause");
        // Those that were under way.
        (0..100).for_each(|_| assert!(!rest.failed(at(0))));
        assert!(rest.rests(at(0)) && !rest.rests(at(1)), "it is tried again");
        assert!(!rest.failed(at(1)) && rest.rests(at(2)) && !rest.rests(at(3)));
        (0..40).for_each(|_| _ = rest.failed(rest.until()));
        let last = rest.until();
        _ = rest.failed(last);
        assert_eq!(rest.until(), last + PAUSE_LAST);
        assert!(rest.succeeded() && !rest.is_failing() && !rest.succeeded());
        assert!(!rest.failed(last), "few have failed since");
    }
}
