//! Drains that are asked for, and those for which it is time, which passes when a test says so; and
//! what had been submitted when.

use super::Rig;
use std::time::Duration;
use vflash::cache::CacheMessage;
use vflash::cache::drain::DrainError;
use vflash::cache::order::{Reason, Refusal};

impl Rig {
    /// Drains up to a point or all, once that is durable. A point may be one that the drain has
    /// come past by itself.
    pub(crate) fn drain(&mut self, to: Option<u64>) {
        self.finish();
        self.flush();
        self.finish();
        let reached = self.ask(|reply| CacheMessage::Drain { to, hold: false, reply });
        match reached {
            Ok(point) => self.now.drained = self.now.drained.max(point),
            Err(DrainError::Refused(Refusal { reason, .. })) if to.is_some() => {
                assert_ne!(reason, Reason::Ahead, "seed {}: {to:?}", self.setup.seed);
            }
            Err(error) => panic!("seed {}: {error:?}", self.setup.seed),
        }
        self.note();
    }

    /// Time passes; what is due by then is begun, and goes on with the turns that follow.
    pub(crate) fn pass_time(&mut self, by: Duration) {
        self.reactor.advance(by);
        self.turn(false);
    }

    /// As much time passes as a drain waits for: all is drained though nobody has asked. With plain
    /// writes that time begins when the flash has been flushed.
    pub(crate) fn wait_for_the_drain(&mut self) {
        self.finish();
        for _ in 0..2 {
            self.pass_time(Duration::from_secs(1));
            if (0..500).any(|_| self.head() <= self.now.drained) {
                return;
            }
        }
        panic!("seed {}: {:?}", self.setup.seed, self.status.gauges());
    }

    /// A write past the log is under way before its moment is noted.
    pub(crate) fn submitted_by(&self, point: u64) -> u64 {
        let later = self.moments.partition_point(|moment| moment.at <= point);
        self.moments.get(later).map_or(self.model.head(), |next| next.submitted)
    }
}
