//! What changes about a cached disk by itself: its backing goes away and comes back, its log is
//! full, it is fenced; and when one that could not be opened is tried again.

use super::api::EventKind;
use super::caching::backing_fails;
use super::engine::Engine;
use super::events::EventLog;
use super::served::Served;
use crate::base::ErrorKind;
use crate::cache::status::CacheGauges;
use crate::cache::{CacheMessage, CacheState};
use std::time::{Duration, Instant};

/// The longest pause between two attempts to open a disk.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// As [`PAUSE_MAX`], of attempts to find the backing of a disk that is served without it.
const PAUSE_ALONE_MAX: Duration = Duration::from_secs(4);

/// When a disk is tried again.
#[derive(Clone, Copy, Debug)]
pub struct Retry {
    pub at: Instant,
    pub pause: Duration,
}

impl Retry {
    /// After a failure; `None` if only a person can mend it.
    pub fn next(self, kind: ErrorKind) -> Option<Self> {
        let hopeless =
            matches!(kind, ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::Invalid);
        let pause = (self.pause * 2).min(PAUSE_MAX);
        (!hopeless).then(|| Self { at: Instant::now() + self.pause, pause })
    }

    /// For a disk that is served alone: its guests wait for the backing.
    pub fn soon(self) -> Self {
        let pause = self.pause.min(PAUSE_ALONE_MAX);
        Self { at: Instant::now() + pause, pause: pause * 2 }
    }

    /// True once; then not before the next failure, or a long time.
    pub fn is_due(&mut self, now: Instant) -> bool {
        let due = now >= self.at;
        if due {
            self.at = now + PAUSE_MAX;
        }
        due
    }
}

/// A look at a cached disk.
#[derive(Clone, Debug)]
pub struct WatchedCache {
    pub retry: Option<Retry>,
    away: bool,
    full: bool,
    fenced: bool,
}

impl Default for WatchedCache {
    fn default() -> Self {
        Self { retry: Some(Retry::default()), away: false, full: false, fenced: false }
    }
}

impl WatchedCache {
    /// Tells what differs now.
    pub fn tell(&mut self, now: &CacheGauges, object: &str, events: &EventLog) {
        let away = now.state == CacheState::WaitingForBacking;
        if away != self.away {
            let (kind, text) = match away {
                true => (EventKind::BackingAway, backing_fails(now.mode)),
                false => (EventKind::BackingBack, "the backing answers again"),
            };
            events.add(kind, object, text);
        }
        let full = now.parked > 0;
        if full && !self.full {
            let text = format!("the log is full: {} requests wait for the drain", now.parked);
            events.add(EventKind::LogFull, object, text);
        }
        if let (CacheState::Fenced(why), false) = (&now.state, self.fenced) {
            events.add(EventKind::Fenced, object, why);
        }
        self.fenced = matches!(now.state, CacheState::Fenced(_));
        (self.away, self.full) = (away, full);
    }
}

impl Engine {
    /// Looks at every cached disk, and tries those again that could not be opened.
    pub fn look_after_caches(&self) {
        self.retry_caches();
        let served: Vec<Served> = self.state().volumes.values().cloned().collect();
        for served in served.into_iter().filter(|served| served.home.is_none()) {
            let Some(cached) = &served.cached else { continue };
            let gauges = cached.status.gauges();
            if gauges.dirty_bytes > 0 {
                // An idle disk is left asleep: only ages change.
                served.link.send(Box::new(CacheMessage::Status { reply: Box::new(|()| ()) }));
            }
            let mut watched = self.state().caches.get(&served.name).cloned().unwrap_or_default();
            watched.tell(&gauges, &served.object(), self.events());
            let mut state = self.state();
            // Others set the time of the next attempt meanwhile.
            let there = state.caches.entry(served.name.clone()).or_default();
            *there = WatchedCache { retry: there.retry, ..watched };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_change_of_a_cached_disk_is_told_once() {
        let events = EventLog::new("i".into());
        let mut watched = WatchedCache::default();
        let gauges = |state, parked| CacheGauges { state, parked, ..CacheGauges::default() };
        let fenced = || CacheState::Fenced("damage".into());
        for now in [
            gauges(CacheState::Serving, 0),
            gauges(CacheState::WaitingForBacking, 0),
            gauges(CacheState::WaitingForBacking, 3),
            gauges(CacheState::WaitingForBacking, 5),
            gauges(CacheState::Draining, 0),
            gauges(fenced(), 0),
            gauges(fenced(), 0),
        ] {
            watched.tell(&now, "volume a/b", &events);
        }
        let told = events.since(0).events;
        let kinds: Vec<_> = told.iter().map(|event| event.kind).collect();
        use EventKind::{BackingAway, BackingBack, Fenced, LogFull};
        assert_eq!(kinds, [BackingAway, LogFull, BackingBack, Fenced]);
        assert_eq!(told[1].message, "the log is full: 3 requests wait for the drain");
        assert_eq!(told[3].message, "damage");
    }

    #[test]
    fn opening_is_tried_again_later_and_later_unless_only_a_person_can_help() {
        let mut retry = Retry::default();
        let mut pauses = Vec::new();
        for _ in 0..7 {
            let before = Instant::now();
            retry = retry.next(ErrorKind::Io).expect("storage may come back");
            pauses.push((retry.at - before).as_secs());
            assert!(!retry.is_due(before));
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
        assert!(retry.is_due(retry.at));
        for hopeless in [ErrorKind::Corrupt, ErrorKind::Unsupported, ErrorKind::Invalid] {
            assert!(retry.next(hopeless).is_none());
        }
    }
}
