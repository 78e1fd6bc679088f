//! Write-order numbers of a disk in a consistency group: from where all its disks have theirs.

use super::journal::{Journal, Pick};
use crate::base::planted::{Bug, planted};

impl Journal {
    /// Numbers of the batch that `picks` make: those of a consistency group have gaps, but none
    /// within a batch.
    pub(super) fn number(&mut self, picks: &[Pick]) {
        let Some(numbers) = &self.numbers else { return };
        let goes_on = picks.last().is_some_and(|last| last.continued);
        if !self.reserved {
            let whole = picks.iter().filter(|pick| !pick.continued).count() as u64;
            self.next_won = numbers.take(whole + u64::from(goes_on));
        }
        self.reserved = goes_on;
    }

    /// In a consistency group: all numbers up to here that are this disk's are durable in the log.
    pub(super) fn frontier(&self) -> u64 {
        let Some(numbers) = &self.numbers else { return u64::MAX };
        // Before anything else: numbers given from now on are above it.
        let last = numbers.last();
        let first = self.order.front().map(|index| {
            let append = &self.appends[*index];
            append.encoder.batch().header.first_won
        });
        let first = first.or(self.reserved.then_some(self.next_won));
        let first = first.filter(|_| !planted(Bug::FrontierAhead));
        let counts = first.map_or(last, |first| last.min(first - 1));
        if self.is_durable() || planted(Bug::FrontierAhead) {
            counts
        } else {
            counts.min(self.durable_through)
        }
    }

    /// The disk leaves its consistency group: it goes on with numbers of its own.
    pub(super) fn leave_numbers(&mut self) {
        if let Some(numbers) = self.numbers.take() {
            assert!(!self.reserved, "a disk leaves when nothing is being appended");
            self.next_won = self.next_won.max(numbers.last() + 1);
        }
    }
}
