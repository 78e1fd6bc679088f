//! The last events, numbered, for those who follow them.
//!
//! Invariant: numbers count up from 1 without gaps, so a follower knows what it missed.

use super::api::{Event, EventKind, Events};
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// Events kept; older ones are forgotten.
const EVENTS_MAX: usize = 4096;

/// Events of one answer.
const ANSWER_EVENTS_MAX: usize = 1000;

pub struct EventLog {
    instance: String,
    kept: Mutex<VecDeque<Event>>,
    newest: watch::Sender<u64>,
}

impl EventLog {
    /// `instance` tells this daemon from its predecessors.
    pub fn new(instance: String) -> Self {
        Self { instance, kept: Mutex::default(), newest: watch::Sender::new(0) }
    }

    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// Notes an event and logs it. Quick, and callable from any thread.
    pub fn add(&self, kind: EventKind, object: impl Into<String>, message: impl Into<String>) {
        let (object, message) = (object.into(), message.into());
        match kind {
            EventKind::Error | EventKind::PoolFailed => log::error!("{object}: {message}"),
            EventKind::Fenced => log::error!("{object}: {message}"),
            EventKind::Watermark | EventKind::LogFull | EventKind::BackingAway => {
                log::warn!("{object}: {message}");
            }
            EventKind::ScrubProgress => log::debug!("{object}: {message}"),
            _ => log::info!("{object}: {message}"),
        }
        let mut kept = self.kept();
        let sequence = *self.newest.borrow() + 1;
        if kept.len() == EVENTS_MAX {
            kept.pop_front();
        }
        kept.push_back(Event { sequence, time_ms: now_ms(), kind, object, message });
        self.newest.send_replace(sequence);
    }

    /// What came after the event numbered `after`, oldest first.
    pub fn since(&self, after: u64) -> Events {
        let kept = self.kept();
        let newest = *self.newest.borrow();
        let after = after.min(newest);
        let oldest = newest + 1 - kept.len() as u64;
        let first = (after + 1).max(oldest);
        let events: Vec<Event> = kept
            .iter()
            .filter(|event| event.sequence >= first)
            .take(ANSWER_EVENTS_MAX)
            .cloned()
            .collect();
        let last = events.last().map_or(after, |event| event.sequence);
        Events { instance: self.instance.clone(), events, lost: first - after - 1, last }
    }

    pub fn last(&self) -> u64 {
        *self.newest.borrow()
    }

    /// Told of every new number.
    pub fn follow(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    /// A panic while the lock was held cannot have left the queue broken: pushing is its last act.
    fn kept(&self) -> MutexGuard<'_, VecDeque<Event>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Milliseconds of the Unix epoch.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(count: usize) -> EventLog {
        let log = EventLog::new("i".into());
        (1..=count).for_each(|n| log.add(EventKind::Created, "volume a/b", n.to_string()));
        log
    }

    #[test]
    fn a_follower_gets_each_event_once_and_in_order() {
        let log = filled(2500);
        let (mut after, mut seen) = (0, 0);
        loop {
            let answer = log.since(after);
            assert_eq!(answer.lost, 0);
            for event in &answer.events {
                seen += 1;
                assert_eq!(event.sequence, seen);
                assert_eq!(event.message, seen.to_string());
            }
            after = answer.last;
            if answer.events.is_empty() {
                break;
            }
        }
        assert_eq!(seen, 2500);
    }

    #[test]
    fn forgotten_events_are_counted() {
        let log = filled(EVENTS_MAX + 10);
        let answer = log.since(4);
        assert_eq!(answer.lost, 6);
        assert_eq!(answer.events[0].sequence, 11);
        assert_eq!(log.since(EVENTS_MAX as u64 + 10).events.len(), 0);
        let ahead = log.since(u64::MAX);
        assert_eq!((ahead.lost, ahead.last), (0, EVENTS_MAX as u64 + 10));
    }

    #[test]
    fn an_empty_log_answers() {
        let answer = EventLog::new("i".into()).since(0);
        assert_eq!((answer.events.len(), answer.lost, answer.last), (0, 0, 0));
    }
}
