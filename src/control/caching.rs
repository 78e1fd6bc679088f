//! What can be asked of a cached disk while it is served; [`super::detaching`] has the ways out.

use super::alone::{Alone, Stand};
use super::api::{self, ErrorCode, EventKind, Failure};
use super::api_cached::{
    Cache, CacheCounter, CacheMode, CacheState, CachedDisk, Drain, DrainKind, Draining, Durability,
    Mark, Point, PointKind, Points, SetMode, Share,
};
use super::cached::{Cached, cache_mode, drain_mode};
use super::engine::Engine;
use super::pool::AllocationFacts;
use super::served::Served;
use crate::backing::spec::Spec;
use crate::backing::stamp::DrainMode;
use crate::base::{Error, ErrorKind};
use crate::cache::drain::DrainError;
use crate::cache::message::Reply;
use crate::cache::order;
use crate::cache::scan::read_root;
use crate::cache::status::{CacheCounters, CacheGauges};
use crate::cache::{self, CacheMessage, Mode};
use crate::manifest::{Attributes, CacheSettings, VolumeSettings};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, Failure>;

/// How long a disk may take to come to rest before it is taken down.
pub const REST_WAIT: Duration = Duration::from_secs(10);

/// As [`REST_WAIT`], when the daemon ends: what is under way then is done again by the next.
const STOP_WAIT: Duration = Duration::from_secs(3);

/// How long a disk may take to answer at all.
pub(super) const ANSWER_WAIT: Duration = Duration::from_secs(10);

/// As [`ANSWER_WAIT`], of somebody who only looks.
const LOOK_WAIT: Duration = Duration::from_millis(200);

/// Retiring the last group and stamping.
pub(super) const CLOSE_WAIT: Duration = Duration::from_secs(60);

/// How long one call waits for another mode to be in force.
const MODE_WAIT: Duration = Duration::from_secs(2);

pub(super) type CounterField = (&'static str, &'static str, fn(&CacheCounters) -> &AtomicU64);

/// What a cached disk counts, by its name in Prometheus; the API has what differs in it.
pub(super) const CACHE_COUNTERS: [CounterField; 27] = [
    ("vflash_cache_hits_total", "Blocks of reads found on the flash, or parts of one.", |c| {
        &c.hits
    }),
    ("vflash_cache_misses_total", "Blocks of reads brought from the backing.", |c| &c.misses),
    ("vflash_cache_batches_total", "Appends to the log.", |c| &c.batches),
    ("vflash_cache_records_total", "Records appended to the log.", |c| &c.records),
    ("vflash_cache_appended_bytes_total", "Bytes appended to the log.", |c| &c.appended_bytes),
    (
        "vflash_cache_append_failures_total",
        "Appends that failed and were done again elsewhere.",
        |c| &c.append_failures,
    ),
    (
        "vflash_cache_flush_failures_total",
        "Flushes of the flash that failed; what they covered was written again.",
        |c| &c.flush_failures,
    ),
    (
        "vflash_cache_mismatches_total",
        "Pieces whose checksum did not match where they were read first.",
        |c| &c.mismatches,
    ),
    ("vflash_cache_dropped_total", "Damaged copies of drained data that were dropped.", |c| {
        &c.dropped
    }),
    ("vflash_cache_replayed_total", "Replayed requests that the log had already.", |c| &c.replayed),
    ("vflash_cache_probation_hits_total", "Blocks read from probation in memory.", |c| {
        &c.probation_hits
    }),
    ("vflash_cache_joined_total", "Blocks that came with a fetch of another read.", |c| &c.joined),
    ("vflash_cache_fills_total", "Blocks written to flash because they were read.", |c| &c.fills),
    (
        "vflash_cache_fills_dropped_total",
        "Blocks that were to be written to flash and were not, for lack of space or time.",
        |c| &c.fills_dropped,
    ),
    (
        "vflash_cache_fills_refused_total",
        "Blocks that were worth being kept and were not, for lack of write budget.",
        |c| &c.fills_refused,
    ),
    (
        "vflash_cache_kept_bytes_total",
        "Bytes written to flash to keep what was read or drained.",
        |c| &c.kept_bytes,
    ),
    ("vflash_cache_backing_read_bytes_total", "Bytes read from the backing for guests.", |c| {
        &c.backing_read_bytes
    }),
    ("vflash_cache_moves_total", "Blocks moved so that the log has space.", |c| &c.moves),
    ("vflash_cache_squeezed_total", "Blocks dropped so that the log has space.", |c| &c.squeezed),
    ("vflash_cache_evicted_total", "Blocks that made place for others.", |c| &c.evicted),
    ("vflash_cache_bypassed_total", "Blocks of long streams, read past the cache.", |c| {
        &c.bypassed
    }),
    ("vflash_cache_retired_total", "Clean segments given up for new ones.", |c| &c.retired),
    ("vflash_cache_swept_total", "Entries of the index looked at to forget segments.", |c| {
        &c.swept
    }),
    ("vflash_cache_stalls_total", "Times that writes waited for a free segment.", |c| &c.stalls),
    ("vflash_cache_drain_bytes_total", "Bytes written to the backing by the drain.", |c| {
        &c.drain_bytes
    }),
    ("vflash_cache_drain_groups_total", "Groups drained.", |c| &c.drain_groups),
    (
        "vflash_cache_drain_retries_total",
        "Attempts of the drain that failed and were made again.",
        |c| &c.drain_retries,
    ),
];

/// Asking the disk.
impl Served {
    /// Sends what `message` makes of a reply; the answer comes through the receiver.
    pub(super) fn asked<R: Send + 'static>(
        &self,
        message: impl FnOnce(Reply<R>) -> CacheMessage,
    ) -> Receiver<R> {
        let (answer, answered) = channel();
        // Who asked may have stopped waiting.
        let reply: Reply<R> = Box::new(move |value| drop(answer.send(value)));
        self.link.send(Box::new(message(reply)));
        answered
    }

    pub(super) fn ask<R: Send + 'static>(
        &self,
        wait: Duration,
        message: impl FnOnce(Reply<R>) -> CacheMessage,
    ) -> crate::base::Result<R> {
        self.asked(message).recv_timeout(wait).map_err(|error| self.silent(error, wait))
    }

    fn silent(&self, error: RecvTimeoutError, wait: Duration) -> Error {
        match error {
            RecvTimeoutError::Timeout => {
                let text = format!("cached disk {} has not answered for {wait:?}", self.name);
                Error::new(ErrorKind::Busy, text)
            }
            RecvTimeoutError::Disconnected => {
                let text = format!("cached disk {} is being taken down", self.name);
                Error::new(ErrorKind::Gone, text)
            }
        }
    }

    /// Gauges as of now.
    pub(super) fn gauges(&self, cached: &Cached) -> crate::base::Result<CacheGauges> {
        self.ask(ANSWER_WAIT, |reply| CacheMessage::Status { reply })?;
        Ok(cached.status.gauges())
    }

    /// Brings the gauges up to date; a reactor that is busy tells what was true a moment ago.
    pub(super) fn look(&self) {
        if let Err(error) = self.ask(LOOK_WAIT, |reply| CacheMessage::Status { reply }) {
            log::debug!("{error}");
        }
    }

    /// Bytes of log that only the flash holds; 0 if that is not known.
    pub(super) fn dirty_bytes(&self) -> crate::base::Result<u64> {
        match &self.cached {
            Some(cached) => Ok(self.gauges(cached)?.dirty_bytes),
            None => Ok(0),
        }
    }

    /// Ends draining where it is, so that nothing of a cached disk is under way soon. What is
    /// dirty stays on the flash.
    pub(super) fn rest(&self, wait: Duration) -> crate::base::Result<()> {
        let Some(cached) = &self.cached else { return Ok(()) };
        let mut to = cached.status.gauges().drained_won;
        for _ in 0..8 {
            let drain = |reply| CacheMessage::Drain { to: Some(to), hold: true, reply };
            match self.ask(wait, drain) {
                Ok(Err(DrainError::Refused(refusal))) => {
                    let past = refusal.nearest.iter().find(|point| **point > refusal.asked);
                    to = past.copied().unwrap_or(to);
                }
                Ok(_) => {
                    // What is kept and is not saved now is fetched again: nothing else is lost.
                    if !matches!(cached.status.gauges().state, cache::CacheState::Fenced(_)) {
                        drop(self.ask(wait, |reply| CacheMessage::Checkpoint { reply }));
                    }
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Gone => return Ok(()),
                Err(_) => break,
            }
        }
        self.link.send(Box::new(CacheMessage::LetGo));
        let text = format!(
            "cached disk {}: its backing does not take what is being drained; what it lacks is \
             safe on the flash; try again when the backing answers, or restart vflashd",
            self.name
        );
        Err(Error::new(ErrorKind::Busy, text))
    }

    /// A change of mode that an earlier daemon began goes on.
    pub(super) fn resume_mode(&self, host: &super::served::Host) {
        let (Some(cached), Some(cache)) = (&self.cached, &self.settings.cache) else { return };
        let mode = cache_mode(cache.mode);
        if cached.mode != mode {
            drop(self.begin_mode(host, mode));
        }
    }

    /// Begins another mode; an event tells when it is in force.
    fn begin_mode(
        &self,
        host: &super::served::Host,
        mode: Mode,
    ) -> Receiver<crate::base::Result<()>> {
        let (done, waited) = channel();
        let (events, object) = (host.events.clone(), self.object());
        let reply: Reply<crate::base::Result<()>> = Box::new(move |result| {
            match &result {
                Ok(()) => {
                    let text = format!("the mode is {} now", mode.name());
                    events.add(EventKind::Updated, object, text);
                }
                Err(error) => events.add(EventKind::Error, object, error.to_string()),
            }
            // Who asked may have stopped waiting.
            drop(done.send(result));
        });
        self.link.send(Box::new(CacheMessage::SetMode { mode, reply }));
        waited
    }

    /// Why it does not serve as it should, though it serves.
    pub(super) fn cache_problem(&self) -> Option<String> {
        let cached = self.cached.as_ref()?;
        let gauges = cached.status.gauges();
        match gauges.state {
            cache::CacheState::Fenced(why) => Some(why),
            cache::CacheState::WaitingForBacking => {
                let fails = backing_fails(gauges.mode);
                let alone = cached.looks_for_backing().map(Alone::stand);
                match alone {
                    Some(Stand::Away(why)) => Some(format!("{fails}: {why}")),
                    _ => Some(fails.to_owned()),
                }
            }
            _ if gauges.flash_failing => Some(FLASH_FAILS.to_owned()),
            _ => {
                self.settings.cache.as_ref()?.consistency_group.as_ref()?;
                super::together::group_problem(cached)
            }
        }
    }

    pub(super) fn cached_disk(&self) -> Option<CachedDisk> {
        let cache = self.cache_report(&self.facts().ok()?)?;
        Some(CachedDisk { name: self.name.clone(), cache })
    }

    pub(super) fn cache_report(&self, facts: &AllocationFacts) -> Option<Cache> {
        let settings = self.settings.cache.as_ref()?;
        let gauges = self.cached.as_ref().map(|cached| {
            self.look();
            cached.status.gauges()
        });
        let (state, message) = match (&self.failure, &gauges) {
            (Some(why), _) => (CacheState::Failed, Some(why.clone())),
            (None, None) => (CacheState::Opening, None),
            (None, Some(gauges)) => (state(&gauges.state), self.cache_problem()),
        };
        let sidecar = sidecar(settings);
        let mode = gauges.as_ref().map_or(settings.mode, |gauges| mode(gauges.mode));
        let held = self.cached.as_ref().map_or(0, |cached| cached.held.load(Ordering::Relaxed));
        let goal = self.cached.as_ref().map(|cached| cached.goal_bytes.load(Ordering::Relaxed));
        let opened = gauges.is_some();
        let gauges = gauges.unwrap_or_default();
        let counters = match self.cached.as_ref().filter(|_| opened) {
            Some(cached) => counters(&cached.status.counters),
            None => Vec::new(),
        };
        Some(Cache {
            backing: settings.backing.clone(),
            doors: doors(self.disk_name(), facts),
            drain: match drain_mode(settings.drain, sidecar.is_some()) {
                DrainMode::Grouped => DrainKind::Grouped,
                DrainMode::Ordered => DrainKind::Ordered,
            },
            sidecar,
            size_bytes: facts.size_bytes,
            resizing_to_bytes: gauges.resizing_to,
            share: settings.share.map(|share| Share {
                minimum_bytes: share.minimum_bytes,
                maximum_bytes: share.maximum_bytes,
                weight: share.weight,
                goal_bytes: goal.filter(|goal| *goal > 0),
            }),
            leaving_bytes: gauges.segments.leaving * gauges.segment_bytes,
            mode,
            mode_wanted: settings.mode,
            staleness_ms: settings.staleness_ms(),
            durability: settings.durability,
            backing_timeout_ms: settings.backing_timeout_ms(),
            write_budget_bytes: settings.write_budget_bytes,
            consistency_group: settings.consistency_group.clone(),
            state,
            message,
            dirty_bytes: gauges.dirty_bytes,
            oldest_dirty_ms: gauges.oldest_dirty.as_millis() as u64,
            log_fill_permille: gauges.log_fill_permille(),
            head_won: gauges.head_won,
            drained_won: gauges.drained_won,
            epoch: gauges.epoch,
            held_at: held.checked_sub(1),
            drain_rate_bytes: gauges.drain_rate,
            drain_eta_ms: gauges.drain_eta.map(|eta| eta.as_millis() as u64),
            waiting_requests: gauges.parked,
            index_bytes: gauges.index_bytes,
            index_pieces: gauges.index_pieces,
            clean_bytes: gauges.clean_bytes,
            probation_bytes: gauges.probation_bytes,
            backing_faster: gauges.backing_faster,
            policy_bytes: gauges.policy_bytes,
            budget_used_up: gauges.budget_used_up,
            counters,
        })
    }
}

/// What a flash that fails means while the log can still be written or nothing is in it.
const FLASH_FAILS: &str = "its flash fails to be written: nothing more is kept there for a while, \
     then it is tried again; guests are served; look at the drive";

/// What a backing that fails means for a guest.
pub(super) fn backing_fails(mode: Mode) -> &'static str {
    match mode {
        Mode::WriteBack => "its backing fails; writes go on to the flash until the log is full",
        _ => "its backing fails; requests that need it are tried again until `backingTimeout`",
    }
}

/// Every volume that has the disk.
fn doors(home: &str, facts: &AllocationFacts) -> Vec<String> {
    let attributes = Attributes::decode(&facts.attributes).unwrap_or_default();
    let own = (!attributes.sharing.left).then(|| home.to_owned());
    own.into_iter().chain(attributes.sharing.doors.into_iter().map(|door| door.name)).collect()
}

fn counters(counters: &CacheCounters) -> Vec<CacheCounter> {
    let short = |name: &str| {
        let inner = name.strip_prefix("vflash_cache_").and_then(|name| name.strip_suffix("_total"));
        inner.unwrap_or(name).to_owned()
    };
    let counter = |(name, _, field): &CounterField| CacheCounter {
        name: short(name),
        value: field(counters).load(Ordering::Relaxed),
    };
    CACHE_COUNTERS.iter().map(counter).collect()
}

pub(super) fn sidecar(settings: &CacheSettings) -> Option<String> {
    settings.sidecar.clone().or_else(|| {
        let spec = Spec::parse(&settings.backing).ok()?;
        Some(spec.default_sidecar()?.display().to_string())
    })
}

pub(super) fn state(state: &cache::CacheState) -> CacheState {
    match state {
        cache::CacheState::Serving => CacheState::Serving,
        cache::CacheState::Draining => CacheState::Draining,
        cache::CacheState::WaitingForBacking => CacheState::WaitingForBacking,
        cache::CacheState::Closed => CacheState::Closed,
        cache::CacheState::Fenced(_) => CacheState::Fenced,
    }
}

fn mode(mode: Mode) -> CacheMode {
    match mode {
        Mode::WriteBack => CacheMode::WriteBack,
        Mode::WriteThrough => CacheMode::WriteThrough,
        Mode::WriteAround => CacheMode::WriteAround,
        Mode::ReadOnly => CacheMode::ReadOnly,
        Mode::Bypass => CacheMode::Bypass,
    }
}

/// A drain that cannot be.
pub(super) fn undrainable(name: &str, error: DrainError) -> Failure {
    let (code, text) = match error {
        DrainError::Refused(refusal) => (ErrorCode::Invalid, refusal.to_string()),
        DrainError::Corrupt { last_good } => (
            ErrorCode::Corrupt,
            format!(
                "the log is damaged behind point {last_good}, the last good one: `vflash drain \
                 {name} --to {last_good}` saves what lies before it"
            ),
        ),
    };
    Failure::new(code, format!("cached disk {name}: {text}"))
}

/// The verbs.
impl Engine {
    /// The disk, if it is a cached one that is served.
    pub(super) fn cached(&self, name: &str) -> Result<(Served, std::sync::Arc<Cached>)> {
        let served = self.served(name)?;
        if !served.is_cached() {
            let text = format!("{name} is a flash volume: only cached disks have a backing");
            return Err(Failure::new(ErrorCode::Invalid, text));
        }
        if served.is_opening() {
            let text = format!("cached disk {name} is being opened: try again");
            return Err(Failure::new(ErrorCode::Busy, text));
        }
        served.export_id()?;
        let cached = served.cached.clone().ok_or_else(|| {
            Failure::new(ErrorCode::Busy, format!("cached disk {name} is not served"))
        })?;
        Ok((served, cached))
    }

    pub fn drain(&self, name: &str, request: &Drain) -> Result<Draining> {
        let (served, cached) = self.cached(name)?;
        let to = self.drain_target(&served, request)?;
        served.link.send(Box::new(CacheMessage::LetGo));
        cached.held.store(0, Ordering::Relaxed);
        let hold = request.hold;
        let drained = served.asked(|reply| CacheMessage::Drain { to, hold, reply });
        // Messages are answered in order: a refusal is here by now.
        let gauges = served.gauges(&cached)?;
        let target_won = to.unwrap_or(gauges.head_won);
        match drained.try_recv() {
            Ok(Err(error)) => return Err(undrainable(name, error)),
            Ok(Ok(won)) => self.note_drained(&served, won),
            Err(_) => self.tell_when_drained(&served, drained),
        }
        if hold {
            cached.held.store(target_won + 1, Ordering::Relaxed);
        }
        let drained_won = gauges.drained_won;
        Ok(Draining { target_won, drained_won, done: drained_won >= target_won })
    }

    fn drain_target(&self, served: &Served, request: &Drain) -> Result<Option<u64>> {
        match (&request.to, &request.point) {
            (Some(_), Some(_)) => {
                let text = "write either a number (`to`) or a name (`point`), not both";
                Err(Failure::new(ErrorCode::Invalid, text))
            }
            (Some(won), None) => Ok(Some(*won)),
            (None, Some(point)) => {
                let points = served.ask(ANSWER_WAIT, |reply| CacheMessage::Points { reply })?;
                let wanted = order::PointKind::Mark(point.clone());
                let named = |at: &&order::Point| at.kind == wanted;
                let found = points.iter().find(named).ok_or_else(|| {
                    let name = &served.name;
                    let text = format!(
                        "cached disk {name} has no point `{point}` that can still be reached: \
                         `vflash points {name}` lists them"
                    );
                    Failure::new(ErrorCode::NotFound, text)
                })?;
                Ok(Some(found.won))
            }
            (None, None) => Ok(None),
        }
    }

    fn note_drained(&self, served: &Served, won: u64) {
        let text = format!("drained to point {won}");
        self.events().add(EventKind::Drained, served.object(), text);
    }

    /// A thread waits for the end of a drain that somebody asked for.
    fn tell_when_drained(
        &self,
        served: &Served,
        drained: Receiver<std::result::Result<u64, DrainError>>,
    ) {
        let (events, object) = (self.host.events.clone(), served.object());
        let spawned = std::thread::Builder::new().name("drained".into()).spawn(move || {
            // Dropped unanswered when the disk is taken down.
            match drained.recv() {
                Ok(Ok(won)) => {
                    events.add(EventKind::Drained, object, format!("drained to point {won}"));
                }
                Ok(Err(DrainError::Corrupt { last_good })) => {
                    let text = format!("draining ended at {last_good}: the log is damaged there");
                    events.add(EventKind::Error, object, text);
                }
                Ok(Err(DrainError::Refused(_))) | Err(_) => {}
            }
        });
        if let Err(error) = spawned {
            log::warn!("starting a thread that waits for a drain: {error}");
        }
    }

    pub fn points(&self, name: &str) -> Result<Points> {
        let (served, _) = self.cached(name)?;
        let points = served.ask(ANSWER_WAIT, |reply| CacheMessage::Points { reply })?;
        let point = |order::Point { won, kind }| {
            let (kind, name, epoch) = match kind {
                order::PointKind::Drained => (PointKind::Drained, None, None),
                order::PointKind::Flush { epoch } => (PointKind::Flush, None, Some(epoch)),
                order::PointKind::Mark(name) => (PointKind::Mark, Some(name), None),
                order::PointKind::Head => (PointKind::Head, None, None),
            };
            Point { won, kind, name, epoch }
        };
        Ok(Points { points: points.into_iter().map(point).collect() })
    }

    pub fn mark(&self, name: &str, request: &Mark) -> Result<Point> {
        let (served, _) = self.cached(name)?;
        let mark = request.name.clone();
        let won = served.ask(ANSWER_WAIT, |reply| CacheMessage::Mark { name: mark, reply })??;
        let name = Some(request.name.clone());
        Ok(Point { won, kind: PointKind::Mark, name, epoch: None })
    }

    pub fn checkpoint(&self, name: &str) -> Result<api::Volume> {
        let (served, _) = self.cached(name)?;
        served.ask(CLOSE_WAIT, |reply| CacheMessage::Checkpoint { reply })??;
        self.volume(name)
    }

    /// Begins another mode, and waits a moment for it to be in force.
    pub fn set_mode(&self, name: &str, request: &SetMode) -> Result<api::Volume> {
        let _changes = self.changes.begin(&format!("the change of {name}'s mode"))?;
        let home = self.home_of(name)?.name;
        let (served, _) = self.cached(&home)?;
        let mut settings = served.settings.clone();
        if let Some(cache) = &mut settings.cache {
            cache.mode = request.mode;
        }
        self.set_settings(&home, &settings)?;
        self.volume(name)
    }

    /// Other settings of a cached disk. Those of the cache and limits take effect in place.
    pub(super) fn set_cached_settings(
        &self,
        served: &Served,
        settings: &VolumeSettings,
    ) -> Result<()> {
        let Some(cache) = &settings.cache else {
            let text = format!("{} stays a cached disk", served.name);
            return Err(Failure::new(ErrorCode::Invalid, text));
        };
        self.refuse_mode(served, cache)?;
        if let Some(text) = cache.refuse_writers().filter(|_| self.is_written_by_several(served)) {
            let text = format!("cached disk {}: several machines write it: {text}", served.name);
            return Err(Failure::new(ErrorCode::Invalid, text));
        }
        if let Some((_, text)) = cache.refuse_in_group() {
            let text = format!("cached disk {}: {text}", served.name);
            return Err(Failure::new(ErrorCode::Invalid, text));
        }
        let group = |settings: &VolumeSettings| settings.cache.as_ref()?.consistency_group.clone();
        let (was_in, will_be_in) = (group(&served.settings), group(settings));
        if was_in != will_be_in && was_in.is_some() {
            self.leave_group(served)?;
        }
        let same = VolumeSettings {
            limits: settings.limits,
            cache: settings.cache.clone(),
            ..served.settings.clone()
        };
        let after = Served { settings: settings.clone(), ..served.clone() };
        let note = |home: &Served| self.note_settings(home, &home.settings);
        let joins = will_be_in.is_some() && was_in != will_be_in;
        let reopened = !served.left && (same != *settings || served.is_down());
        if served.cached.is_some() && (reopened || joins) {
            if self.exchange(served, &after, &note, joins)? {
                return Ok(());
            }
            // By the way that leads there now.
            let Served { link, .. } = self.served(&served.name)?;
            return self.tell_cache(&Served { link, ..served.clone() }, cache);
        }
        self.without(served, || note(&after))?;
        self.list(&after);
        if served.cached.is_none() {
            // It is opened with these, sooner or later.
            return Ok(());
        }
        if !served.left {
            let limits = super::served::limits(settings.limits);
            self.host.server.set_limits(served.export_id()?, limits)?;
        }
        self.tell_cache(served, cache)
    }

    fn note_settings(&self, served: &Served, settings: &VolumeSettings) -> Result<()> {
        let mut attributes = Attributes::decode(&served.facts()?.attributes)?;
        attributes.settings = settings.clone();
        let cache = settings.cache.as_ref();
        let drain = cache.map(|cache| drain_mode(cache.drain, sidecar(cache).is_some()));
        if let Some(log) = &mut attributes.log {
            log.grouped &= drain == Some(DrainMode::Grouped);
        }
        let (id, attributes) = (served.id, attributes.encode());
        Ok(served.pool.change(move |pool| pool.set_attributes(id, attributes))?)
    }

    fn is_written_by_several(&self, home: &Served) -> bool {
        self.writers(home).len() > 1
    }

    /// The volumes through which a disk is written.
    fn writers(&self, home: &Served) -> Vec<String> {
        let own = (!home.left && !home.settings.read_only).then(|| home.name.clone());
        let doors = self.state().doors_of(&home.name);
        let writing = doors.into_iter().filter(|door| !door.settings.read_only);
        own.into_iter().chain(writing.map(|door| door.name)).collect()
    }

    /// `name` is to write the disk of `home`: if another does, a mode that keeps a log must be in
    /// force first, and not just wanted, and what that other had under way before must be done.
    /// Waits a moment for that.
    pub(super) fn await_log(&self, home: &Served, name: &str) -> Result<()> {
        if self.writers(home).iter().all(|writer| writer == name) {
            return Ok(());
        }
        let deadline = Instant::now() + MODE_WAIT;
        while !self.mode_in_force(home)?.journals() {
            if Instant::now() >= deadline {
                let text = format!(
                    "cached disk {} still writes past its log, and another machine may write it \
                     only when it does not: its mode changes when its backing has taken what is \
                     under way; try again then",
                    home.name
                );
                return Err(Failure::new(ErrorCode::Busy, text));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let others = self.writers(home).into_iter().filter(|writer| writer != name);
        for other in others.filter(|other| self.host.run_dir.past_log(other)) {
            while !self.is_back(&other)? {
                if Instant::now() >= deadline {
                    let text = format!(
                        "{other} was served past the log of its disk before vflashd was started \
                         again, and its virtual machine has not come back since: what it had \
                         under way would be done again over what another machine writes; start \
                         it, or let it reconnect, and try again, or take its disk away with \
                         `vflash detach {other}`"
                    );
                    return Err(Failure::new(ErrorCode::Busy, text));
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            self.host.run_dir.set_past_log(&other, false)?;
        }
        Ok(())
    }

    /// Its machine's queues run: they began with what was under way before.
    fn is_back(&self, name: &str) -> Result<bool> {
        let export = self.served(name)?.link.export();
        let status = export.and_then(|export| self.host.server.status(export).ok());
        Ok(status.is_some_and(|status| status.queues_running > 0))
    }

    /// The mode that a disk is in; of one that is not served, the one that its log was left in.
    fn mode_in_force(&self, home: &Served) -> Result<Mode> {
        if let Some(cached) = &home.cached {
            return Ok(home.gauges(cached)?.mode);
        }
        let place = super::cached::place(&home.pool, home.id)?;
        let mut medium = super::cached::medium(&home.pool.target, place)?;
        let wanted = home.settings.cache.as_ref().map_or(Mode::WriteBack, |c| cache_mode(c.mode));
        // One that was never opened begins with what is wanted.
        Ok(read_root(&mut medium).map_or(wanted, |(root, _)| root.mode))
    }

    fn refuse_mode(&self, served: &Served, cache: &CacheSettings) -> Result<()> {
        if served.settings.read_only
            && !matches!(cache.mode, CacheMode::ReadOnly | CacheMode::Bypass)
        {
            let text = format!(
                "cached disk {} is read-only for all that have it: its mode is read-only or bypass",
                served.name
            );
            return Err(Failure::new(ErrorCode::Invalid, text));
        }
        let reason = served.cached.as_ref().and_then(|cached| cached.no_log);
        match reason.filter(|_| cache_mode(cache.mode).journals()) {
            None => Ok(()),
            Some(reason) => {
                let text = format!(
                    "cached disk {}: no cache that keeps a log (write-back, write-through) can \
                     stand on {}: {reason}",
                    served.name, cache.backing
                );
                Err(Failure::new(ErrorCode::Unsupported, text))
            }
        }
    }

    /// Brings other settings to a disk that is served.
    pub(super) fn tell_cache(&self, served: &Served, cache: &CacheSettings) -> Result<()> {
        let before = served.settings.cache.clone();
        let changed = |field: fn(&CacheSettings, &CacheSettings) -> bool| {
            before.as_ref().is_none_or(|before| field(before, cache))
        };
        if changed(|a, b| a.drain != b.drain) && !served.settings.read_only {
            let mode = drain_mode(cache.drain, sidecar(cache).is_some());
            served.link.send(Box::new(CacheMessage::SetDrainMode { mode }));
        }
        if changed(|a, b| a.durability != b.durability) {
            let strong = cache.durability == Durability::Strong;
            served.link.send(Box::new(CacheMessage::SetDurability { strong }));
        }
        if changed(|a, b| a.staleness_ms() != b.staleness_ms()) {
            let staleness_max = Duration::from_millis(cache.staleness_ms());
            served.link.send(Box::new(CacheMessage::SetStaleness { staleness_max }));
        }
        if changed(|a, b| a.backing_timeout_ms() != b.backing_timeout_ms()) {
            let limit = Duration::from_millis(cache.backing_timeout_ms());
            served.link.send(Box::new(CacheMessage::SetBackingTimeout { limit }));
        }
        if changed(|a, b| a.write_budget_bytes != b.write_budget_bytes) {
            let bytes_per_day = cache.write_budget_bytes;
            served.link.send(Box::new(CacheMessage::SetWriteBudget { bytes_per_day }));
        }
        if changed(|a, b| a.mode != b.mode) {
            self.change_mode(served, cache_mode(cache.mode))?;
        }
        Ok(())
    }

    /// Begins another mode. Leaving write-back drains first, which may take long: the pool
    /// remembers what is wanted, and an event tells when it is so.
    fn change_mode(&self, served: &Served, mode: Mode) -> Result<()> {
        match served.begin_mode(&self.host, mode).recv_timeout(MODE_WAIT) {
            Ok(result) => Ok(result?),
            // It is under way.
            Err(_) => Ok(()),
        }
    }
}

/// The end of the daemon.
impl Engine {
    /// Ends all draining; how many disks do not come to rest.
    pub(super) fn rest_caches(&self) -> usize {
        let served: Vec<Served> = self.state().volumes.values().cloned().collect();
        let rest = |served: &&Served| served.cached.is_some() && served.home.is_none();
        let threads: Vec<_> = served
            .iter()
            .filter(rest)
            .cloned()
            .map(|served| std::thread::spawn(move || served.rest(STOP_WAIT).is_err()))
            .collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).filter(|rests| *rests).count()
    }

    /// Requests of cached disks that wait for space in their logs.
    pub(super) fn parked_requests(&self) -> usize {
        let state = self.state();
        let parked = state
            .volumes
            .values()
            .filter(|served| served.home.is_none())
            .filter_map(|served| Some(served.cached.as_ref()?.status.gauges().parked as usize));
        parked.sum()
    }

    /// Requests of cached disks under way: for space in a log or for a backing they may wait long.
    pub(super) fn held_up_requests(&self) -> usize {
        let state = self.state();
        let cached = state.volumes.values().filter(|served| served.cached.is_some());
        cached.map(|served| served.metrics.snapshot().in_flight as usize).sum()
    }
}
