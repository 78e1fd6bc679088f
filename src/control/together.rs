//! The consistency groups of this daemon. Which disks belong to one is in the settings that the
//! pool keeps of each; all of a group are in one pool.

use super::api::Failure;
use super::cached::Cached;
use super::caching::CLOSE_WAIT;
use super::engine::Engine;
use super::pool::OpenPool;
use super::served::Served;
use crate::backing::open::Backing;
use crate::backing::recover::{Damage, RecoverOptions, Word};
use crate::backing::roster::{Peer, Roster};
use crate::backing::spec::Spec;
use crate::backing::together::{ask_leader, settle_without_leader};
use crate::base::clock::unix_ms;
use crate::base::{ErrorKind, Result};
use crate::cache::CacheMessage;
use crate::cache::consistency::Consistency;
use crate::cache::scan::scan;
use crate::flash::AllocationId;
use crate::manifest::{Attributes, CacheSettings};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long the leader of a disk in doubt may take to be opened.
const WORD_WAIT: Duration = Duration::from_secs(10);

/// How long its sidecar is waited for before it is looked whether it has been opened here.
const LOOK_WAIT: Duration = Duration::from_millis(200);

/// How long the storage of a disk may take that waits for the word of one which is given up.
const SETTLE_PATIENCE: Duration = Duration::from_secs(20);

/// By pool and name.
type Known = BTreeMap<([u8; 16], String), Arc<Consistency>>;

/// See the module. Clones are the same.
#[derive(Clone, Default)]
pub struct Groups {
    known: Arc<Mutex<Known>>,
}

/// How a disk is named in its group's roster.
pub(super) fn peer(volume: &str, cache: &CacheSettings) -> Result<Peer> {
    let beside = || Spec::parse(&cache.backing).map(|spec| spec.default_sidecar());
    let sidecar = match &cache.sidecar {
        Some(path) => path.clone(),
        None => beside()?.unwrap_or_default().display().to_string(),
    };
    Ok(Peer { volume: volume.to_owned(), backing: cache.backing.clone(), sidecar })
}

impl Groups {
    /// The group that disk `volume` is in, by its settings; from now on the disk belongs to it.
    ///
    /// # Errors
    /// A log of the group cannot be read, so that nobody knows which numbers are free.
    pub fn of(
        &self,
        pool: &OpenPool,
        volume: &str,
        cache: &CacheSettings,
    ) -> Result<Option<Arc<Consistency>>> {
        let Some(name) = &cache.consistency_group else { return Ok(None) };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (pool.uuid, name.clone());
        let group = match known.get(&key) {
            Some(group) => group.clone(),
            None => {
                let group = found(pool, name)?;
                known.insert(key, group.clone());
                group
            }
        };
        group.admit(peer(volume, cache)?);
        group.roster().1.check()?;
        Ok(Some(group))
    }

    fn all(&self) -> Vec<Arc<Consistency>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// A backing whose last group is in doubt learns from its leader, open here or not.
    pub fn tell(&self, backing: &mut Backing) -> Result<()> {
        let deadline = Instant::now() + WORD_WAIT;
        loop {
            let standing = backing.standing(Damage::Skip)?;
            let Some(standing) = standing.filter(|standing| standing.doubt.is_some()) else {
                return Ok(());
            };
            let leader = standing.doubt.map(|step| step.leader).unwrap_or_default();
            let word = self.all().iter().find_map(|group| group.word(&leader));
            let word = match word {
                Some(word) => Some(word),
                None => match ask_leader(&standing, LOOK_WAIT) {
                    // It is being opened here, or about to say.
                    Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < deadline => {
                        continue;
                    }
                    asked => asked?,
                },
            };
            if let Some(word) = word {
                backing.believe(word);
                return Ok(());
            }
        }
    }

    /// A disk that is gone from the pool is in no group; `word`: what its stamp said last.
    pub fn expel(&self, volume: &str, word: Option<Word>) {
        self.all().iter().for_each(|group| group.expel(volume, word));
    }
}

/// Puts a group together from what the pool says: its disks, and the numbers in their logs.
fn found(pool: &OpenPool, name: &str) -> Result<Arc<Consistency>> {
    let mut members = Vec::new();
    let mut last = 0;
    for (volume, facts) in pool.facts().allocations {
        let attributes = Attributes::decode(&facts.attributes)?;
        let cache = attributes.settings.cache;
        let of_group = |cache: &CacheSettings| cache.consistency_group.as_deref() == Some(name);
        let Some(cache) = cache.filter(of_group) else { continue };
        members.push(peer(&volume, &cache)?);
        if attributes.log.is_some_and(|log| log.formatted) {
            last = last.max(last_number(pool, facts.id).map_err(|error| {
                error.context(format!("consistency group {name}: the log of {volume}"))
            })?);
        }
    }
    members.sort();
    Ok(Consistency::new(last, Roster { name: name.to_owned(), members }))
}

/// No number above this is in the log.
fn last_number(pool: &OpenPool, id: AllocationId) -> Result<u64> {
    let mut medium = super::cached::medium(&pool.target, super::cached::place(pool, id)?)?;
    let scan = scan(&mut medium, 0)?;
    // What is drained was given, whether the log still shows it or not.
    Ok(scan.next_won.saturating_sub(1).max(scan.root.drained_through).max(scan.drained_through))
}

impl Engine {
    /// Takes a disk out of its consistency group, if it is in one: drained with the others, and
    /// going on by itself.
    pub(super) fn leave_group(&self, served: &Served) -> std::result::Result<(), Failure> {
        let (served, cached) = self.cached(&served.name)?;
        if cached.group.is_none() {
            return Ok(());
        }
        self.drain_for_good(&served, &cached)?;
        Ok(served.ask(CLOSE_WAIT, |reply| CacheMessage::Leave { reply })??)
    }
}

impl Engine {
    /// The other disks of a group that wait for the word of one which is given up with its sidecar
    /// go on without.
    pub(super) fn settle_others(
        &self,
        lost: &Served,
        cache: &CacheSettings,
    ) -> std::result::Result<(), Failure> {
        let Some(group) = &cache.consistency_group else { return Ok(()) };
        let of_group = |served: &&Served| {
            let cache = served.settings.cache.as_ref();
            let same = cache.is_some_and(|cache| cache.consistency_group.as_ref() == Some(group));
            same && served.home.is_none() && served.name != lost.name
        };
        let others: Vec<Served> = self.state().volumes.values().filter(of_group).cloned().collect();
        let (mut points, mut backings) = (Vec::new(), Vec::new());
        for other in others.iter().filter(|other| Arc::ptr_eq(&other.pool, &lost.pool)) {
            match (&other.cached, &other.settings.cache) {
                (Some(cached), _) => points.push(other.gauges(cached)?.drained_won),
                (None, Some(cache)) => {
                    let backing = super::cached::open_backing(cache, Some(SETTLE_PATIENCE));
                    backings.push(backing.map_err(|error| {
                        let text = format!(
                            "{} is in consistency group `{group}` with {}, and is to be looked at \
                             before that is given up: bring it back, or give it up first; nothing \
                             was done",
                            other.name, lost.name
                        );
                        error.context(text)
                    })?);
                }
                (None, None) => {}
            }
        }
        let options = RecoverOptions { now_ms: unix_ms(), ..Default::default() };
        Ok(settle_without_leader(&mut backings, &points, options)?)
    }
}

/// Why the group of a disk does not move, if it does not.
pub(super) fn group_problem(cached: &Cached) -> Option<String> {
    let group = cached.group.as_ref()?;
    let absent: Vec<String> = group.absent().into_iter().map(|peer| peer.volume).collect();
    if absent.is_empty() {
        return None;
    }
    Some(format!(
        "nothing is drained while {} of its consistency group `{}` is not open; writes go on until \
         the log is full",
        absent.join(" and "),
        group.roster().1.name
    ))
}
