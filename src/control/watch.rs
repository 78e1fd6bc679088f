//! What changes about pools and volumes by itself: how full they are, how far scrubbing got, what
//! failed.

use super::api::EventKind;
use super::engine::{Engine, Everything};
use super::events::EventLog;
use super::pool::{OpenPool, api_watermark};
use super::served;
use crate::base::units::Bytes;
use crate::flash::Watermark;
use std::time::Duration;

/// A look at a pool.
#[derive(Clone, Debug)]
pub struct Watched {
    watermark: Watermark,
    scrub_bytes: u64,
    /// The most that was to be scrubbed since nothing was.
    scrub_bytes_peak: u64,
    failure: Option<String>,
}

impl Default for Watched {
    fn default() -> Self {
        Self { watermark: Watermark::Normal, scrub_bytes: 0, scrub_bytes_peak: 0, failure: None }
    }
}

impl Watched {
    pub fn look(pool: &OpenPool) -> Self {
        let space = pool.facts().space;
        Self {
            watermark: space.watermark,
            scrub_bytes: space.scrub_bytes,
            scrub_bytes_peak: 0,
            failure: pool.keeper_failure().or(pool.scrub().failure),
        }
    }

    /// Tells what differs in `now`; returns what the next look is to be compared with.
    pub fn tell(&self, mut now: Self, pool: &str, events: &EventLog) -> Self {
        let object = format!("pool {pool}");
        if now.watermark != self.watermark {
            let text = format!("space is {}", api_watermark(now.watermark));
            events.add(EventKind::Watermark, &object, text);
        }
        if let Some(failure) = now.failure.as_ref().filter(|_| now.failure != self.failure) {
            events.add(EventKind::Error, &object, failure);
        }
        if now.scrub_bytes > 0 {
            now.scrub_bytes_peak = self.scrub_bytes_peak.max(now.scrub_bytes);
        }
        if now.tenths_left() != self.tenths_left() {
            let text = match now.scrub_bytes {
                0 => "all freed space is scrubbed".to_owned(),
                left => format!("{} left to scrub", Bytes(left)),
            };
            events.add(EventKind::ScrubProgress, &object, text);
        }
        now
    }

    fn tenths_left(&self) -> u64 {
        let tenths = u128::from(self.scrub_bytes) * 10;
        tenths.div_ceil(u128::from(self.scrub_bytes_peak.max(1))) as u64
    }
}

/// Errors of a drive are told again after this long, if there are more.
const DRIVE_ERRORS_EVERY: Duration = Duration::from_secs(60);

impl Engine {
    /// Tells which volumes have requests that their drive failed.
    pub fn look_after_drives(&self) {
        let mut told = Vec::new();
        {
            let mut state = self.state();
            let Everything { volumes, drive_errors, .. } = &mut *state;
            for served in volumes.values() {
                let Some(errors) = served.counters.drive_errors() else { continue };
                let last = drive_errors.get(&served.name);
                if last.is_none_or(|last| errors.at.since(*last) >= DRIVE_ERRORS_EVERY) {
                    drive_errors.insert(served.name.clone(), errors.at);
                    told.push((served.object(), served::drive_errors(&errors)));
                }
            }
        }
        for (object, text) in told {
            self.events().add(EventKind::Error, object, text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(looks: impl IntoIterator<Item = Watched>) -> Vec<(EventKind, String)> {
        let events = EventLog::new("i".into());
        let mut before = Watched::default();
        for look in looks {
            before = before.tell(look, "p", &events);
        }
        events.since(0).events.into_iter().map(|event| (event.kind, event.message)).collect()
    }

    #[test]
    fn scrubbing_is_told_in_tenths_and_at_its_end() {
        let mib = 1 << 20;
        let looks = [0, 100, 99, 91, 90, 50, 0, 0]
            .map(|left| Watched { scrub_bytes: left * mib, ..Watched::default() });
        let left = |mib: u64| format!("{mib}MiB left to scrub");
        let texts = [left(100), left(90), left(50), "all freed space is scrubbed".to_owned()];
        assert_eq!(told(looks), texts.map(|text| (EventKind::ScrubProgress, text)));
    }

    #[test]
    fn watermarks_and_failures_are_told_once() {
        let full = Watched {
            watermark: Watermark::Full,
            failure: Some("broken".to_owned()),
            ..Watched::default()
        };
        let told = told([full.clone(), full, Watched::default()]);
        let kinds: Vec<_> = told.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [EventKind::Watermark, EventKind::Error, EventKind::Watermark]);
        assert_eq!(told[0].1, "space is full");
        assert_eq!(told[2].1, "space is normal");
    }
}
