//! The disks of a consistency group, met on the shared storage: what their leader says, and all of
//! them finished together.

use super::open::Backing;
use super::recover::{Damage, Progress, RecoverOptions, Recovery, Standing, Word};
use super::roster::Peer;
use super::sidecar::{read_stamps, settle};
use crate::base::{Error, ErrorKind, Result};
use crate::io::blocking::Blocking;
use crate::io::file::FileDisk;
use std::path::Path;
use std::time::Duration;

/// What a disk says as a leader. Made durable first: what is done on this word supposes that it
/// stays. `None`: there is no stamp.
pub fn word_of(sidecar: &mut Blocking) -> Result<Option<Word>> {
    let stamps = read_stamps(sidecar)?;
    settle(sidecar, &stamps)?;
    let word = |stamp| {
        let super::stamp::Stamp { disk, committed_step, .. } = stamp;
        Word { leader: disk, committed_step }
    };
    Ok(stamps.newest.map(word))
}

/// Looks for the leader of a disk in doubt among the sidecars that its stamp names, and asks it.
/// `wait`: for the lock of each.
///
/// # Errors
/// [`ErrorKind::Busy`]: somebody has the leader open. Else why none of them is the leader's.
pub fn ask_leader(standing: &Standing, wait: Duration) -> Result<Option<Word>> {
    let Some(step) = standing.doubt else { return Ok(None) };
    let stamp = &standing.stamp;
    let of_roster = |volume: &str| stamp.roster.members.iter().find(|peer| peer.volume == volume);
    let here = of_roster(&stamp.owner.volume);
    let others: Vec<&str> =
        stamp.roster.others(&stamp.owner.volume).map(|peer| peer.volume.as_str()).collect();
    let mut why = Vec::new();
    for peer in stamp.roster.others(&stamp.owner.volume) {
        match ask(peer, wait) {
            Ok(Some(word)) if word.leader == step.leader => return Ok(Some(word)),
            Ok(_) => why.push(format!("{} is another disk's", peer.sidecar)),
            Err(error) if error.kind() == ErrorKind::Busy => {
                return Err(error.context(format!("asking {} of its group", peer.volume)));
            }
            Err(error) => why.push(format!("{}: {error}", peer.sidecar)),
        }
    }
    let text = format!(
        "its last redo group counts only if all of consistency group `{}` has it, and the disk \
         that knows cannot be asked ({}): bring its sidecar back, or, if that is gone for good, \
         give that disk up by its name, {}: where it was served with `vflash detach NAME --lost`, \
         else with `vflash backing recover {} --without NAME`; nothing was changed",
        stamp.roster.name,
        why.join("; "),
        others.join(" or "),
        here.map_or("BACKING", |peer| peer.backing.as_str())
    );
    Err(Error::new(ErrorKind::Gone, text))
}

fn ask(peer: &Peer, wait: Duration) -> Result<Option<Word>> {
    let disk = FileDisk::open(Path::new(&peer.sidecar), wait)?;
    word_of(&mut Blocking::new(Box::new(disk)))
}

/// Finishes the disks of a consistency group, all or none: each is looked at before any is changed.
/// `None` for one without a stamp. `without`: disks of the group that are given up with their
/// sidecars, by `VM/VOLUME`; if one of them led the last step, the others settle it as
/// [`settle_without_leader`] does.
///
/// # Errors
/// [`ErrorKind::Invalid`]: a disk of the group is not among them, or one that is given up is not
/// missing from it; the text names it.
pub fn recover_all(
    backings: &mut [Backing],
    without: &[String],
    (options, adopt): (RecoverOptions, bool),
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<Option<Recovery>>> {
    let mut words = Vec::new();
    let mut standings = Vec::new();
    for backing in backings.iter_mut() {
        words.extend(backing.word()?);
        standings.push(backing.standing(options.damage)?);
    }
    missing(standings.iter().flatten(), without)?;
    for (backing, standing) in backings.iter_mut().zip(&standings) {
        let Some(step) = standing.as_ref().and_then(|standing| standing.doubt) else { continue };
        if let Some(word) = words.iter().find(|word| word.leader == step.leader) {
            backing.believe(*word);
            // Half a step is found before anything is changed.
            backing.standing(options.damage)?;
        }
    }
    if !without.is_empty() {
        believe_what_is_left(backings, &[], options.damage)?;
    }
    backings.iter_mut().map(|backing| backing.recover(options, adopt, progress)).collect()
}

/// Settles disks in doubt whose leader is given up, with the sidecar in which it has said whether
/// their last step counts. `backings`: all other disks of the group but those that are served;
/// `served`: the points which those are at.
///
/// The step counts if each of them has its group, or is at the step's point: so it was when it was
/// committed, and if it was not, all that are left move together all the same.
///
/// # Errors
/// Nothing is settled by halves: what was settled before an error is found so the next time.
pub fn settle_without_leader(
    backings: &mut [Backing],
    served: &[u64],
    options: RecoverOptions,
) -> Result<()> {
    if believe_what_is_left(backings, served, options.damage)? {
        for backing in backings {
            backing.recover(options, false, &mut |_| {})?;
        }
    }
    Ok(())
}

/// Has all disks in doubt believe what their leader can have said, by what the others show; false
/// if none is in doubt. Changes nothing on the storage.
fn believe_what_is_left(backings: &mut [Backing], served: &[u64], damage: Damage) -> Result<bool> {
    let mut doubtful = None;
    let mut points = served.to_vec();
    for backing in backings.iter_mut() {
        let Some(standing) = backing.standing(damage)? else { continue };
        match standing.doubt {
            None => points.push(standing.point.won),
            Some(step) => {
                backing.believe(Word { leader: step.leader, committed_step: step.number });
                let to = backing.standing(damage)?.map(|whole| whole.point.won);
                doubtful = to.map(|to| (step, to)).or(doubtful);
            }
        }
    }
    let Some((step, to)) = doubtful else { return Ok(false) };
    let committed = points.iter().all(|point| *point >= to);
    let committed_step = step.number - u64::from(!committed);
    let word = Word { leader: step.leader, committed_step };
    backings.iter_mut().for_each(|backing| backing.believe(word));
    Ok(true)
}

/// Refuses half a group: one whose disks are neither all there nor given up.
fn missing<'a>(
    standings: impl Iterator<Item = &'a Standing> + Clone,
    without: &[String],
) -> Result<()> {
    let invalid = |text: String| Err(Error::new(ErrorKind::Invalid, text));
    let there: Vec<&str> = standings.clone().map(|one| one.stamp.owner.volume.as_str()).collect();
    let lacks = |peer: &&Peer| !there.contains(&peer.volume.as_str());
    let rosters = standings.clone().flat_map(|standing| &standing.stamp.roster.members);
    let absent: Vec<&str> = rosters.filter(lacks).map(|peer| peer.volume.as_str()).collect();
    if let Some(name) = without.iter().find(|name| !absent.contains(&name.as_str())) {
        return invalid(format!(
            "{name} is not missing from a consistency group of these disks: leave `--without \
             {name}` out; nothing was changed"
        ));
    }
    for standing in standings {
        let roster = &standing.stamp.roster;
        let lacking = roster.members.iter().filter(lacks);
        let lacking: Vec<&Peer> = lacking.filter(|peer| !without.contains(&peer.volume)).collect();
        if !lacking.is_empty() {
            let join = |word: fn(&Peer) -> String, between: &str| {
                lacking.iter().map(|peer| word(peer)).collect::<Vec<_>>().join(between)
            };
            return invalid(format!(
                "{} is in consistency group `{}`, whose disks are only together at one point: \
                 name all of them, {} too; nothing was changed. What is gone for good, with its \
                 sidecar, is given up by {}: all that it held is lost, and the others go to the \
                 last point that they have together",
                standing.stamp.owner.volume,
                roster.name,
                join(|peer| format!("{} of {}", peer.backing, peer.volume), " and "),
                join(|peer| format!("`--without {}`", peer.volume), " ")
            ));
        }
    }
    Ok(())
}

/// Where the other disks of a standing's group are to be found.
pub fn others(standing: &Standing) -> Vec<Peer> {
    let stamp = &standing.stamp;
    stamp.roster.others(&stamp.owner.volume).cloned().collect()
}

/// As [`Backing::standing`], after the leader was asked if it must be.
pub fn resolve(backing: &mut Backing, damage: Damage, wait: Duration) -> Result<Option<Standing>> {
    let standing = backing.standing(damage)?;
    let Some(doubtful) = standing.as_ref().filter(|standing| standing.doubt.is_some()) else {
        return Ok(standing);
    };
    if let Some(word) = ask_leader(doubtful, wait)? {
        backing.believe(word);
    }
    backing.standing(damage)
}
