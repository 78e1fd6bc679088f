//! One change at a time, so that changes do not mix. A drive that hangs keeps its change from
//! ending: others are told what they wait for, and do not wait for ever.

use super::api::{ErrorCode, Failure};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a change that somebody asks for waits for its turn.
const PATIENCE: Duration = Duration::from_secs(10);

/// A change that takes longer is something to look after.
const SLOW: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Default)]
pub(super) struct Turns {
    /// What is being done, and since when.
    under_way: Mutex<Option<(String, Instant)>>,
    ended: Condvar,
}

/// The right to change something; ends when dropped.
pub(super) struct Turn<'a>(&'a Turns);

impl Turns {
    fn under_way(&self) -> MutexGuard<'_, Option<(String, Instant)>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for its turn for `patience` at most.
    pub(super) fn begin_within(&self, what: &str, patience: Duration) -> Result<Turn<'_>, Failure> {
        let under_way = self.under_way();
        let (mut under_way, _) = self
            .ended
            .wait_timeout_while(under_way, patience, |under_way| under_way.is_some())
            .unwrap_or_else(PoisonError::into_inner);
        match &*under_way {
            None => {
                *under_way = Some((what.to_owned(), Instant::now()));
                Ok(Turn(self))
            }
            Some((other, since)) => {
                let text = format!(
                    "{what} must wait: {other} has been under way for {}s, and changes are made \
                     one after the other; nothing was done, try again",
                    since.elapsed().as_secs()
                );
                Err(Failure::new(ErrorCode::Busy, text))
            }
        }
    }

    /// A turn for a change that somebody asks for.
    pub(super) fn begin(&self, what: &str) -> Result<Turn<'_>, Failure> {
        self.begin_within(what, PATIENCE)
    }

    /// A turn for what has to be done, however long that takes to come.
    pub(super) fn begin_in_time(&self, what: &str) -> Turn<'_> {
        loop {
            if let Ok(turn) = self.begin_within(what, PATIENCE) {
                return turn;
            }
        }
    }

    /// A change that takes suspiciously long.
    pub(super) fn problem(&self) -> Option<String> {
        let under_way = self.under_way();
        let (what, since) = under_way.as_ref().filter(|(_, since)| since.elapsed() >= SLOW)?;
        Some(format!(
            "{what} has been under way for {}s, and no other change can be made: does its drive \
             answer?",
            since.elapsed().as_secs()
        ))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.under_way() = None;
        self.0.ended.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_cannot_wait_is_told_what_for_and_the_next_goes_on() {
        let turns = Turns::default();
        let turn = turns.begin("resize of hang/x").unwrap_or_else(|_| panic!("its turn"));
        let refused = turns.begin_within("resize of good/x", Duration::ZERO).err();
        let refused = refused.expect("it is not its turn");
        assert_eq!(refused.code, ErrorCode::Busy);
        assert!(refused.message.contains("resize of hang/x has been under way"), "{refused}");
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| drop(turns.begin_in_time("apply")));
            drop(turn);
            waits.join().expect("it came to its turn");
        });
        assert!(turns.under_way().is_none());
    }
}
