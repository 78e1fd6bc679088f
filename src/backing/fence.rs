//! Whether a backing may be opened for writing: compares what its stamp says, what it is, and what
//! the flash remembers. Pure.

use super::identity::Identity;
use super::recover::Standing;
use super::roster::Roster;
use super::stamp::{DrainMode, Owner, Point, Stamp, State};
use crate::base::clock::utc;
use crate::base::planted::{Bug, planted};
use crate::base::units::Bytes;
use crate::base::{Error, ErrorKind, Result};
use uuid::Uuid;

/// What an allocation's flash knows of its backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remembered {
    /// UUID of the disk.
    pub disk: [u8; 16],
    /// The last epoch that it had the backing in.
    pub owner_epoch: u64,
    /// The last point that it knows to be durable in stamp or group.
    pub point: u64,
    /// The flash holds writes that the backing may lack.
    pub dirty: bool,
}

/// Who wants the backing, and what for.
#[derive(Clone, Debug)]
pub struct Claim {
    pub owner: Owner,
    /// `None`: a new allocation.
    pub remembered: Option<Remembered>,
    /// [`State::Dirty`] for a cache that keeps a log, or may at any time.
    pub state: State,
    pub drain: DrainMode,
    /// A stamp may be made where there is none.
    pub create: bool,
    /// Somebody says that this is the disk, though it looks like another: it was copied or moved.
    pub adopt: bool,
    /// Of a new sidecar; by the disk's size if `None`.
    pub group_bytes_max: Option<u64>,
    /// UUID of the disk, if a stamp is made.
    pub new_disk: [u8; 16],
    /// The consistency group that it is in from now on.
    pub roster: Roster,
    /// Milliseconds of the Unix epoch.
    pub now_ms: u64,
}

/// A claim that may go ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The backing may have been written without this flash: what it holds as clean is out of date.
    pub cold: bool,
}

/// `named` is the backing, and its sidecar if it must be named, as they follow a command.
///
/// # Errors
/// [`ErrorKind::Fenced`], [`ErrorKind::Gone`]: with what an operator can do.
pub fn judge(
    claim: &Claim,
    found: &Identity,
    standing: Option<&Standing>,
    named: &str,
) -> Result<Verdict> {
    let Some(standing) = standing else { return judge_empty(claim) };
    let stamp = &standing.stamp;
    let remembered = claim.remembered;
    let flash_dirty = remembered.is_some_and(|flash| flash.dirty);
    if let Some(flash) = remembered
        && flash.disk != stamp.disk
    {
        return fenced(format!(
            "it is disk {}, and the flash holds disk {}: name the right backing and sidecar",
            Uuid::from_bytes(stamp.disk),
            Uuid::from_bytes(flash.disk)
        ));
    }
    let mine = stamp.owner.allocation == claim.owner.allocation;
    if !stamp.is_clean() && !mine && !planted(Bug::StampUnchecked) {
        return fenced(belongs_elsewhere(standing, named));
    }
    let mut cold = false;
    if let Some(difference) = stamp.identity.difference(found) {
        let may = if difference.adoptable { claim.adopt } else { false };
        if (!stamp.is_clean() || flash_dirty) && !may {
            let named = difference.adoptable.then_some(named);
            return fenced(not_the_stamped_one(&difference.text, named));
        }
        cold = !may;
    }
    if let Some(flash) = remembered {
        cold |= judge_memory(&flash, mine, standing, &claim.owner.volume)?;
    }
    Ok(Verdict { cold })
}

/// There is no stamp.
fn judge_empty(claim: &Claim) -> Result<Verdict> {
    if claim.remembered.is_some_and(|flash| flash.dirty) {
        let text = format!(
            "its sidecar is missing or empty, and the flash holds writes that only this backing \
             may get: restore the sidecar that belongs to it, or give up what the flash holds: \
             `vflash detach {} --lost`",
            claim.owner.volume
        );
        return fenced(text);
    }
    if !claim.create {
        let text = "it has no owner stamp yet, and leave to make one was not given";
        return Err(Error::new(ErrorKind::Gone, text));
    }
    Ok(Verdict { cold: claim.remembered.is_some() })
}

/// Compares the stamp with what the flash remembers; true if the flash is out of date and clean.
/// `volume` is the claimer's.
fn judge_memory(flash: &Remembered, mine: bool, standing: &Standing, volume: &str) -> Result<bool> {
    let stamp = &standing.stamp;
    let since = utc(stamp.stamped_ms);
    let older = if stamp.owner_epoch < flash.owner_epoch {
        Some(format!(
            "its stamp of {since} has owner epoch {}, and the flash has seen {}",
            stamp.owner_epoch, flash.owner_epoch
        ))
    } else if stamp.owner_epoch == flash.owner_epoch && standing.point.won < flash.point {
        Some(format!(
            "it is at point {}, and the flash has seen it at {}",
            standing.point.won, flash.point
        ))
    } else {
        None
    };
    let nothing_waits = stamp.is_clean() && !flash.dirty;
    if let Some(older) = older {
        // A disk that was put back as a whole, with nothing to be written: only the cache is old.
        return if nothing_waits { Ok(true) } else { fenced(rolled_back(&older, volume)) };
    }
    let continued = mine && stamp.first_epoch <= flash.owner_epoch;
    if !continued && flash.dirty {
        return fenced(format!(
            "it was opened elsewhere (last by {} on host {}, {since}) after this flash had it: \
             what the flash holds does not fit it any more and must be given up: `vflash detach \
             {volume} --lost`",
            or_unknown(&stamp.owner.volume),
            or_unknown(&stamp.owner.host_name)
        ));
    }
    Ok(!continued)
}

fn rolled_back(older: &str, volume: &str) -> String {
    format!(
        "it was rolled back: {older}; put back what was there last, or give up what the flash \
         holds: `vflash detach {volume} --lost`"
    )
}

fn belongs_elsewhere(standing: &Standing, named: &str) -> String {
    let stamp = &standing.stamp;
    let volume = or_unknown(&stamp.owner.volume);
    format!(
        "it belongs to {volume} on host {} since {}: {}. Attach it there, or detach it there \
         first. If that host or its flash is gone for good, `vflash detach --lost --backing \
         {named} --confirm {volume}` gives these writes up: the disk is then {}",
        or_unknown(&stamp.owner.host_name),
        utc(stamp.owned_ms),
        dirty_words(standing),
        point_words(standing)
    )
}

/// What only the flash holds.
pub(super) fn dirty_words(standing: &Standing) -> String {
    let stamp = &standing.stamp;
    let (bytes, at) = (Bytes(standing.dirty_bytes), utc(stamp.stamped_ms));
    match (standing.dirty_bytes, stamp.oldest_dirty_ms) {
        (0, _) => format!("its flash may hold writes that the backing lacks (none at {at})"),
        (_, 0) => format!("at {at} its flash held {bytes} that the backing lacks"),
        (_, oldest) => {
            let oldest = utc(oldest);
            format!("at {at} its flash held {bytes} that the backing lacks, the oldest of {oldest}")
        }
    }
}

/// Where the backing is without the flash.
pub(super) fn point_words(standing: &Standing) -> String {
    let at = match (standing.point.won, standing.point.time_ms) {
        (0, _) => "before the first write of this cache".to_owned(),
        (won, 0) => format!("at point {won}"),
        (won, time_ms) => format!("at point {won} of {}", utc(time_ms)),
    };
    match (standing.stamp.drain, standing.part) {
        _ if standing.stamp.is_clean() => at,
        (DrainMode::Grouped, false) => at,
        (DrainMode::Grouped, true) => format!("{at}, with a part of the write after it"),
        (DrainMode::Ordered, _) => {
            format!("{at} or later, as a disk that lost its power between two flushes")
        }
    }
}

/// `named`: if it may be the same all the same.
pub(super) fn not_the_stamped_one(difference: &str, named: Option<&str>) -> String {
    let way_out = named.map_or(String::new(), |named| {
        format!(
            "; or if it was moved or copied, say that it is the same disk: `vflash backing recover \
             {named} --adopt`"
        )
    });
    format!(
        "it is not the backing that its owner stamp knows: {difference}. The flash holds writes \
         for the other one: put that back{way_out}"
    )
}

fn or_unknown(name: &str) -> &str {
    if name.is_empty() { "(unknown)" } else { name }
}

fn fenced<T>(text: String) -> Result<T> {
    Err(Error::new(ErrorKind::Fenced, text))
}

/// The stamp of a claim that was judged and whose backing was recovered.
pub(super) fn claimed(
    claim: &Claim,
    verdict: Verdict,
    found: Identity,
    standing: Option<&Standing>,
) -> Stamp {
    let before = standing.map_or_else(
        || unclaimed(claim, found),
        |standing| Stamp {
            point: standing.point,
            dirty_bytes: standing.dirty_bytes,
            retired_group: standing.next_group.saturating_sub(1),
            ..standing.stamp.clone()
        },
    );
    let mine = before.owner.allocation == claim.owner.allocation;
    let remembered_epoch = claim.remembered.map_or(0, |flash| flash.owner_epoch);
    let owner_epoch = before.owner_epoch.max(remembered_epoch) + 1;
    let flash_dirty = claim.remembered.is_some_and(|flash| flash.dirty);
    let continued = mine && !verdict.cold;
    Stamp {
        owner: claim.owner.clone(),
        owner_epoch,
        first_epoch: if continued { before.first_epoch } else { owner_epoch },
        owned_ms: claim.now_ms,
        identity: found,
        state: if flash_dirty { State::Dirty } else { claim.state },
        drain: claim.drain,
        roster: claim.roster.clone(),
        dirty_bytes: if mine { before.dirty_bytes } else { 0 },
        oldest_dirty_ms: if mine { before.oldest_dirty_ms } else { 0 },
        ..before.next(claim.now_ms)
    }
}

/// A stamp of nobody's, before the first.
fn unclaimed(claim: &Claim, found: Identity) -> Stamp {
    let group_bytes = || super::redo::Layout::group_bytes_for(found.size_bytes);
    Stamp {
        disk: claim.remembered.map_or(claim.new_disk, |flash| flash.disk),
        sequence: 0,
        owner: Owner::default(),
        owner_epoch: 0,
        first_epoch: 0,
        owned_ms: claim.now_ms,
        stamped_ms: claim.now_ms,
        identity: found,
        state: State::Clean,
        drain: claim.drain,
        point: Point::default(),
        dirty_bytes: 0,
        oldest_dirty_ms: 0,
        retired_group: 0,
        group_bytes_max: claim.group_bytes_max.unwrap_or_else(group_bytes),
        committed_step: 0,
        roster: Roster::default(),
    }
}

#[cfg(test)]
#[path = "fence_test.rs"]
mod tests;
