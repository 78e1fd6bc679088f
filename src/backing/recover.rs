//! Finishing a redo group: brings a backing to its last point, with the sidecar and without the
//! flash, on any host.
//!
//! Straight-line, restartable at every write: until the group is retired it is applied again, and
//! to apply it twice is to apply it once. The order of things is what makes it so:
//! 1. what was read from the sidecar is made durable there,
//! 2. the group is applied, the backing flushed,
//! 3. the stamp that retires the group is made durable.

use super::redo::{
    BLOCK_BYTES, Content, Entry, GroupHeader, HeaderBlock, Layout, StepId, TableFault, decode_table,
};
use super::sidecar::{Stamps, failed, read_headers, read_stamps, settle, write_stamp};
use super::stamp::{Point, Stamp};
use crate::base::checksum::content;
use crate::base::planted::{Bug, planted};
use crate::base::units::{GIB, MIB, SECTOR_BYTES};
use crate::base::{Error, ErrorKind, Result};
use crate::io::blocking::Blocking;
use crate::io::disk::Errno;

/// How often a group is applied if the backing fails to flush: over NBD a flush that takes long is
/// given more time with each (`nbd/queue.rs`, N6).
const APPLY_TRIES: u32 = 8;

/// What is done about a slot whose header is damaged: its group may be the one that counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Damage {
    /// Nothing is touched.
    #[default]
    Refuse,
    /// The slot is passed over. For an owner whose flash still holds all that the group had.
    Skip,
}

/// How to recover.
#[derive(Clone, Copy, Debug, Default)]
pub struct RecoverOptions {
    pub damage: Damage,
    /// For the stamp, in milliseconds of the Unix epoch.
    pub now_ms: u64,
    /// For a disk of a consistency group whose last redo group is in doubt.
    pub word: Option<Word>,
}

/// What the leader of a consistency group says, durable in its stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word {
    /// UUID of the leader.
    pub leader: [u8; 16],
    /// The last step that it has committed.
    pub committed_step: u64,
}

/// How far applying a group is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub done_bytes: u64,
    pub total_bytes: u64,
}

/// A group that was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    pub header: GroupHeader,
    /// Of the backing: data, zeros and discards.
    pub bytes: u64,
}

/// Where a backing is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The stamp as it is now.
    pub stamp: Stamp,
    /// The backing, with a live group if there is one, is at this point: exactly if drained in
    /// groups, at least if in order.
    pub point: Point,
    /// It also holds a part of the request after the point.
    pub part: bool,
    /// Bytes of later writes that only the owner's flash holds, as far as the sidecar knows: what
    /// is lost with that flash. 0 if the disk is clean.
    pub dirty_bytes: u64,
    /// Above the number of every group that was ever begun.
    pub next_group: u64,
    /// A whole group that is not retired, in its slot.
    pub live: Option<GroupHeader>,
    /// A group was written for this step of a consistency group; whether it counts is for another
    /// disk to say ([`RecoverOptions::word`]). Until then the point is the one before it.
    pub doubt: Option<StepId>,
    /// A group was written for a step that its leader has not committed: it does not count.
    pub dropped: bool,
    /// Damage and leftovers, in words.
    pub findings: Vec<String>,
}

/// What recovery has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovery {
    pub standing: Standing,
    /// `None`: there was nothing to do.
    pub applied: Option<Applied>,
}

/// What the slots and the stamp say together, before table and data were looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Judgement {
    candidate: Option<GroupHeader>,
    /// The header before it, if it is still there: it knows when its point was.
    before: Option<GroupHeader>,
    next_group: u64,
    findings: Vec<String>,
}

/// Tells where a backing is; changes nothing. `None`: the sidecar is empty.
pub fn inspect(sidecar: &mut Blocking, options: RecoverOptions) -> Result<Option<Standing>> {
    let stamps = read_stamps(sidecar)?;
    let Some(stamp) = stamps.newest.clone() else { return Ok(None) };
    let (standing, _) = examine(sidecar, stamp, options)?;
    Ok(Some(with_findings(standing, &stamps)))
}

/// As [`inspect`], for an owner whose log will finish a live group: makes durable what was read, as
/// must be before the group is applied.
pub fn take_up(sidecar: &mut Blocking, options: RecoverOptions) -> Result<Option<Standing>> {
    let standing = inspect(sidecar, options)?;
    let stamps = read_stamps(sidecar)?;
    settle(sidecar, &stamps)?;
    Ok(standing)
}

/// Finishes the group that is committed and not retired, if there is one. Both disks must be locked
/// by the caller and `backing` be the one that the stamp knows. `None`: the sidecar is empty.
///
/// # Errors
/// [`ErrorKind::Busy`]: the group is in doubt, and its leader's word was not given.
pub fn recover(
    backing: &mut Blocking,
    sidecar: &mut Blocking,
    options: RecoverOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Option<Recovery>> {
    let stamps = read_stamps(sidecar)?;
    let Some(stamp) = stamps.newest.clone() else { return Ok(None) };
    let (standing, live) = examine(sidecar, stamp, options)?;
    let mut standing = with_findings(standing, &stamps);
    if standing.doubt.is_some() {
        return Err(in_doubt(&standing.stamp));
    }
    settle(sidecar, &stamps)?;
    let (Some(header), Some(entries)) = (standing.live, live) else {
        if standing.dropped {
            // For good: whoever asks later may find no leader who says so.
            let mut stamp = standing.stamp.next(options.now_ms);
            (stamp.retired_group, stamp.point) = (standing.next_group - 1, standing.point);
            write_stamp(sidecar, &stamp)?;
            standing.stamp = stamp;
        }
        return Ok(Some(Recovery { standing, applied: None }));
    };
    let layout = Layout::new(standing.stamp.group_bytes_max);
    let data_offset = layout.data_offset(Layout::slot_of(header.id.number));
    if planted(Bug::RecoveryNotRestartable) {
        let mut stamp = standing.stamp.next(options.now_ms);
        stamp.retired_group = header.id.number;
        write_stamp(sidecar, &stamp)?;
    }
    let group = (&header, &entries[..]);
    let bytes = bring(backing, (&mut *sidecar, data_offset), group, progress)?;
    let mut stamp = standing.stamp.next(options.now_ms);
    stamp.retired_group = header.id.number;
    stamp.point = standing.point;
    stamp.dirty_bytes = header.span.dirty_bytes;
    write_stamp(sidecar, &stamp)?;
    standing.stamp = stamp;
    standing.live = None;
    Ok(Some(Recovery { standing, applied: Some(Applied { header, bytes }) }))
}

fn with_findings(mut standing: Standing, stamps: &Stamps) -> Standing {
    standing.findings.extend(stamps.findings.iter().cloned());
    standing
}

/// Reads the slots and makes up where the backing is; the live group's entries if there is one.
fn examine(
    sidecar: &mut Blocking,
    stamp: Stamp,
    options: RecoverOptions,
) -> Result<(Standing, Option<Vec<Entry>>)> {
    let layout = Layout::new(stamp.group_bytes_max);
    let size_bytes = sidecar.geometry().size_bytes;
    if size_bytes < layout.sidecar_bytes() {
        let text = format!(
            "the sidecar was cut short: {size_bytes} bytes of {}; restore it",
            layout.sidecar_bytes()
        );
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    let headers = read_headers(sidecar, &layout)?;
    let Judgement { candidate, before, next_group, mut findings } =
        judge(&stamp, &headers, options.damage)?;
    let mut standing = Standing {
        point: stamp.point,
        part: false,
        dirty_bytes: if stamp.is_clean() { 0 } else { stamp.dirty_bytes },
        next_group,
        live: None,
        doubt: None,
        dropped: false,
        findings: Vec::new(),
        stamp,
    };
    let mut live = None;
    if let Some(header) = candidate {
        let sectors = standing.stamp.identity.size_bytes / SECTOR_BYTES;
        let said = said(&header, &standing.stamp, options.word)?;
        standing.dropped = said == Said::Dropped;
        if said != Said::Dropped {
            live = read_group(sidecar, &layout, &header, sectors)?;
        }
        if said == Said::Committed && live.is_none() && options.damage == Damage::Refuse {
            return Err(half_a_step(&header, &standing.stamp));
        }
        if said == Said::Unknown && live.take().is_some() {
            standing.doubt = header.step;
        }
        if live.is_some() {
            standing.point = header.span.point();
            standing.part = header.span.part;
            standing.dirty_bytes = header.span.dirty_bytes;
            standing.live = Some(header);
        } else {
            // It was being written when its writer died; the group before it is in place (G2).
            let number = header.id.number;
            findings.push(match (said, standing.doubt) {
                (Said::Dropped, _) => format!("group {number} was not committed by its leader"),
                (_, Some(_)) => format!("group {number} is in doubt: its leader knows"),
                _ => format!("group {number} was not written whole"),
            });
            standing.point = at_least(standing.point, &header);
            if let Some(before) = before {
                standing.point = before.span.point();
                standing.part = before.span.part;
                standing.dirty_bytes = before.span.dirty_bytes;
            }
        }
    }
    standing.findings = findings;
    Ok((standing, live))
}

/// The point where the backing is before `group`. Which of its numbers are the disk's own is not
/// known then, if others have some: the last that is known stays.
fn at_least(point: Point, group: &GroupHeader) -> Point {
    let won = point.won.max(group.span.from);
    let together = group.step.is_some() || point.others > 0;
    let others = if together { won.saturating_sub(point.own()) } else { 0 };
    Point { won, others, ..point }
}

/// Whether a group's step is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    /// It belongs to no step.
    Alone,
    Committed,
    Dropped,
    Unknown,
}

/// What the leader says of a group's step: C1.
fn said(header: &GroupHeader, stamp: &Stamp, word: Option<Word>) -> Result<Said> {
    let Some(step) = header.step else { return Ok(Said::Alone) };
    let committed_step = match word.filter(|word| word.leader == step.leader) {
        _ if step.leader == stamp.disk => stamp.committed_step,
        Some(word) => word.committed_step,
        None => return Ok(Said::Unknown),
    };
    match committed_step.cmp(&step.number) {
        std::cmp::Ordering::Less => Ok(Said::Dropped),
        std::cmp::Ordering::Equal => Ok(Said::Committed),
        std::cmp::Ordering::Greater => {
            let text = format!(
                "redo group {} is of step {} of consistency group `{}`, and the leader has \
                 committed step {committed_step}: one of the sidecars was rolled back; restore \
                 all backings and sidecars of the group from the same moment",
                header.id.number, step.number, stamp.roster.name
            );
            Err(Error::new(ErrorKind::Fenced, text))
        }
    }
}

fn in_doubt(stamp: &Stamp) -> Error {
    let others: Vec<String> = stamp
        .roster
        .others(&stamp.owner.volume)
        .map(|peer| format!("{} (sidecar {})", peer.backing, peer.sidecar))
        .collect();
    let text = format!(
        "its last redo group counts only if all of consistency group `{}` has it, which another \
         disk of it knows: name them together, {}; nothing was changed",
        stamp.roster.name,
        others.join(", ")
    );
    Error::new(ErrorKind::Busy, text)
}

fn half_a_step(header: &GroupHeader, stamp: &Stamp) -> Error {
    let text = format!(
        "redo group {} is committed with consistency group `{}` and is damaged; attach the disk on \
         host {}, whose flash has what it held, or go on without it (`--skip-damaged`), which may \
         leave a disk that is no point",
        header.id.number, stamp.roster.name, stamp.owner.host_name
    );
    Error::new(ErrorKind::Corrupt, text)
}

/// Which group counts: the one with the highest number, if it is of this owner and not retired.
fn judge(stamp: &Stamp, headers: &[HeaderBlock; 2], damage: Damage) -> Result<Judgement> {
    let mut findings = Vec::new();
    let mut valid: Vec<GroupHeader> = Vec::new();
    for (slot, block) in (0..).zip(headers) {
        let why = match block {
            HeaderBlock::Empty => continue,
            HeaderBlock::Newer { version, features } => {
                let text = format!(
                    "a newer vflash wrote the redo group in slot {slot} (version {version}, \
                     features {features:#x}): use that version; nothing was changed"
                );
                return Err(Error::new(ErrorKind::Unsupported, text));
            }
            HeaderBlock::Valid(header) if header.id.disk != stamp.disk => "of another disk",
            HeaderBlock::Valid(header) if Layout::slot_of(header.id.number) != slot => "misplaced",
            HeaderBlock::Valid(header) => {
                valid.push(*header);
                continue;
            }
            HeaderBlock::Foreign => "not a header",
            HeaderBlock::Damaged(why) => why,
        };
        let text = format!("the header of redo slot {slot} is damaged: {why}");
        if !stamp.is_clean() && damage == Damage::Refuse {
            let text = format!(
                "{text}; attach the disk on host {}, whose flash has what it held, or go on \
                 without it (`--skip-damaged`), which may leave a disk that is no point",
                stamp.owner.host_name
            );
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        findings.push(text);
    }
    valid.sort_by_key(|header| header.id.number);
    let highest = valid.last().map_or(0, |header| header.id.number).max(stamp.retired_group);
    let mut judgement =
        Judgement { candidate: None, before: None, next_group: highest + 1, findings };
    let Some(newest) = valid.pop().filter(|newest| newest.id.number > stamp.retired_group) else {
        return Ok(judgement);
    };
    if newest.id.owner_epoch > stamp.owner_epoch {
        let text = format!(
            "the owner stamp is older than redo group {} (owner epoch {}, the group's {}): the \
             sidecar was rolled back; restore backing and sidecar from the same moment",
            newest.id.number, stamp.owner_epoch, newest.id.owner_epoch
        );
        return Err(Error::new(ErrorKind::Fenced, text));
    }
    if stamp.is_clean() || newest.id.owner_epoch < stamp.owner_epoch {
        let number = newest.id.number;
        let text = format!("group {number} was written by an owner that was fenced; ignored");
        judgement.findings.push(text);
        return Ok(judgement);
    }
    let comes_before = |one: &GroupHeader| {
        one.id.number + 1 == newest.id.number && one.span.to == newest.span.from
    };
    judgement.before = valid.pop().filter(comes_before);
    judgement.candidate = Some(newest);
    Ok(judgement)
}

/// The entries of a group whose every byte validates (G1); `None` for one that was cut short.
fn read_group(
    sidecar: &mut Blocking,
    layout: &Layout,
    header: &GroupHeader,
    sectors: u64,
) -> Result<Option<Vec<Entry>>> {
    let slot = Layout::slot_of(header.id.number);
    let offset = layout.table_offset(slot);
    let length = header.table_bytes().next_multiple_of(BLOCK_BYTES) as usize;
    let table = sidecar
        .read(offset, length)
        .map_err(|errno| failed("reading a redo group's table", offset, errno))?;
    let entries = match decode_table(&table, header, sectors) {
        Ok(entries) => entries,
        Err(TableFault::Checksum) => return Ok(None),
        Err(TableFault::Impossible) => {
            let text = format!(
                "redo group {} holds what does not fit a disk of {sectors} sectors; nothing was \
                 changed",
                header.id.number
            );
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
    };
    let mut data = GroupData::new(sidecar, layout.data_offset(slot), *header);
    for entry in &entries {
        if data.of(entry)?.is_none() {
            return Ok(None);
        }
    }
    Ok(Some(entries))
}

/// Bytes of a group's data that are read at a time.
const READ_BYTES: u64 = 4 * MIB;

/// The data of a group, entry by entry in order, read a good part at a time.
struct GroupData<'a> {
    sidecar: &'a mut Blocking,
    /// Of the data area, in bytes of the sidecar.
    offset: u64,
    header: GroupHeader,
    /// What was read last, and its first byte in the data area.
    window: Vec<u8>,
    from: u64,
}

impl<'a> GroupData<'a> {
    fn new(sidecar: &'a mut Blocking, offset: u64, header: GroupHeader) -> Self {
        Self { sidecar, offset, header, window: Vec::new(), from: 0 }
    }

    /// An entry's data, empty if it has none; `None` if it does not match its checksum.
    fn of(&mut self, entry: &Entry) -> Result<Option<&[u8]>> {
        let Content::Data { position, checksum } = entry.content else { return Ok(Some(&[])) };
        let end = position + entry.length();
        if position < self.from || end > self.from + self.window.len() as u64 {
            self.from = position - position % BLOCK_BYTES;
            let most = self.header.data_bytes.min(self.from + READ_BYTES).max(end);
            let length = most.next_multiple_of(BLOCK_BYTES) - self.from;
            let offset = self.offset + self.from;
            self.window = self
                .sidecar
                .read(offset, length as usize)
                .map_err(|errno| failed("reading a redo group's data", offset, errno))?;
        }
        let range = (position - self.from) as usize..(end - self.from) as usize;
        let salt = self.header.id.salt().into();
        Ok(self.window.get(range).filter(|bytes| content(salt, bytes) == checksum))
    }
}

/// Writes to the backing under way together, and bytes of them, at most.
const WRITES_MAX: usize = 64;
const WRITE_BYTES_MAX: usize = 8 << 20;

/// Puts a group in place, durably: its bytes.
fn bring(
    backing: &mut Blocking,
    (sidecar, data_offset): (&mut Blocking, u64),
    group: (&GroupHeader, &[Entry]),
    progress: &mut dyn FnMut(Progress),
) -> Result<u64> {
    let mut tries = 1;
    loop {
        let bytes = apply(backing, (&mut *sidecar, data_offset), group, progress)?;
        match backing.flush() {
            Ok(()) => return Ok(bytes),
            // What it was to cover may be lost: all is written again, never only flushed.
            Err(_) if tries < APPLY_TRIES => tries += 1,
            Err(errno) => return Err(on_backing("flushing", 0, errno)),
        }
    }
}

/// Puts every entry in its place, many at a time; returns the bytes of the backing that were
/// written.
fn apply(
    backing: &mut Blocking,
    (sidecar, data_offset): (&mut Blocking, u64),
    (header, entries): (&GroupHeader, &[Entry]),
    progress: &mut dyn FnMut(Progress),
) -> Result<u64> {
    let block_bytes = u64::from(backing.geometry().block_bytes);
    let total_bytes = entries.iter().map(Entry::length).sum();
    let mut done_bytes = 0;
    let mut data = GroupData::new(sidecar, data_offset, *header);
    let mut writes: Vec<(u64, Vec<u8>)> = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let (offset, length) = (entry.offset(), entry.length());
        if !(offset | length).is_multiple_of(block_bytes) {
            let text = format!(
                "redo group {} writes {length} bytes at {offset}, and the backing takes only \
                 blocks of {block_bytes}: it is not the one that the group was made for",
                header.id.number
            );
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let Some(bytes) = data.of(entry)? else {
            let text = format!(
                "redo group {} changed while it was read: is the sidecar in use elsewhere?",
                header.id.number
            );
            return Err(Error::new(ErrorKind::Corrupt, text));
        };
        let applying = |errno| on_backing("applying a redo group", offset, errno);
        match entry.content {
            Content::Data { .. } => {
                writes.push((offset, bytes.to_vec()));
                Ok(())
            }
            Content::Zero => in_parts(offset, length, |at, part| backing.zero(at, part)),
            Content::Discard => in_parts(offset, length, |at, part| backing.discard(at, part)),
        }
        .map_err(applying)?;
        done_bytes += length;
        let bytes: usize = writes.iter().map(|(_, bytes)| bytes.len()).sum();
        let last = index + 1 == entries.len();
        if last || writes.len() == WRITES_MAX || bytes >= WRITE_BYTES_MAX {
            backing.write_many(&writes).map_err(applying)?;
            writes.clear();
            progress(Progress { done_bytes, total_bytes });
        }
    }
    Ok(done_bytes)
}

/// At most a gigabyte at a time, so that no single operation takes for ever.
fn in_parts(
    offset: u64,
    length: u64,
    mut part: impl FnMut(u64, u64) -> std::result::Result<(), Errno>,
) -> std::result::Result<(), Errno> {
    let mut done = 0;
    while done < length {
        let next = (length - done).min(GIB);
        part(offset + done, next)?;
        done += next;
    }
    Ok(())
}

fn on_backing(what: &str, offset: u64, errno: Errno) -> Error {
    Error::io(format!("{what} (byte {offset} of the backing)"), errno.into())
}

#[cfg(test)]
#[path = "recover_test.rs"]
mod tests;
