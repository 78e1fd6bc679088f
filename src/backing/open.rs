//! Opening a backing: backing and sidecar found, locked, compared with the stamp, recovered and
//! stamped anew.
//!
//! The locks are on the very descriptions that the data path writes through (`io/file.rs`): they
//! are free only when the last write of a killed daemon has ended. An NBD export has no lock: there
//! the sidecar's keeps others out, and [`nbd`](super::nbd) holds back what a late write of a dead
//! connection could undo: after each opening, since no stamp tells of an owner who made none.

use super::fence::{self, Claim, Verdict, dirty_words, point_words};
use super::identity::{Identity, Kind, generation_of_file, generation_of_stamp};
use super::nbd::{NbdClient, NbdOptions};
use super::recover::{self, Damage, Progress, RecoverOptions, Recovery, Standing, Word};
use super::redo::{GROUP_BYTES_MAX, Layout, Span};
use super::roster::Roster;
use super::sidecar::{clear_headers, write_stamp};
use super::spec::Spec;
use super::stamp::{Owner, Stamp, State};
use super::together;
use crate::base::planted::{Bug, planted};
use crate::base::{Error, ErrorKind, Result};
use crate::io::blocking::Blocking;
use crate::io::disk::{Disk, DiskGeometry, DiskTarget, Errno, OpenDisk};
use crate::io::file::{FileDisk, Preallocation};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Which backing, and how to get at it.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    pub spec: Spec,
    /// `None`: beside a backing file, and nowhere for anything else.
    pub sidecar: Option<PathBuf>,
    /// Others may read it meanwhile, and nobody writes it. Its owner stamp is looked at, not made.
    pub reading: bool,
    /// For locks that others hold, each.
    pub wait: Duration,
    pub nbd: NbdOptions,
}

/// What an opened backing is and may be used for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    pub identity: Identity,
    pub geometry: DiskGeometry,
    pub read_only: bool,
    /// What completed there can be made durable.
    pub flush: bool,
    /// Why no cache that keeps a log (write-back, write-through) can stand on it, in words.
    pub no_log: Option<&'static str>,
}

/// A backing, opened and locked.
pub struct Backing {
    spec: Spec,
    description: Description,
    blocking: Blocking,
    target: DiskTarget,
    nbd: Option<Arc<NbdClient>>,
    sidecar_path: Option<PathBuf>,
    sidecar: Option<Sidecar>,
    /// Of the leader of its consistency group.
    word: Option<Word>,
    /// Opened for reading alone.
    reading: bool,
    /// Of a file that was opened for reading.
    generation: Option<[u64; 2]>,
}

/// The sidecar, opened and locked.
struct Sidecar {
    blocking: Blocking,
    target: DiskTarget,
}

/// What a claim came to.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// Durable in the sidecar, if there is one.
    pub stamp: Option<Stamp>,
    /// The group that was finished, and where the backing stood before the claim.
    pub recovery: Option<Recovery>,
    /// What the flash holds as clean is out of date.
    pub cold: bool,
    /// Number of the next redo group.
    pub next_group: u64,
    /// A group of this owner that is whole in the sidecar and was left for its log to finish.
    pub live: Option<Span>,
}

/// What is given up with an owner's flash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// `VM/VOLUME` of the owner: what must be confirmed.
    pub volume: String,
    /// Where the backing is without the flash.
    pub standing: Standing,
    /// All of it in a sentence.
    pub text: String,
}

impl Sidecar {
    fn new(disk: FileDisk) -> Self {
        let target = disk.target();
        Self { blocking: Blocking::new(Box::new(disk)), target }
    }
}

impl Backing {
    /// Opens and locks the backing and, if there is one, its sidecar. Changes nothing.
    pub fn open(options: &OpenOptions) -> Result<Self> {
        let OpenOptions { spec, wait, reading, .. } = options;
        let mut generation = None;
        let (mut description, blocking, target, nbd) = match spec {
            Spec::Path(path) => {
                let disk = match reading {
                    false => FileDisk::open_whole(path, *wait)?,
                    true => FileDisk::open_reading(path, *wait)?,
                };
                if *reading {
                    let examined =
                        |error| Error::io(format!("examining {}", path.display()), error);
                    generation = generation_of_file(&disk.file()).map_err(examined)?;
                }
                let target = disk.target();
                (describe_file(&disk)?, Blocking::new(Box::new(disk)), target, None)
            }
            Spec::Nbd(url) => {
                let client = NbdClient::connect(url.clone(), options.nbd.clone())?;
                let description = describe_nbd(&client);
                let blocking = Blocking::new(client.open(Arc::new(|| {}))?);
                let target = DiskTarget::Threaded(client.clone());
                (description, blocking, target, Some(client))
            }
        };
        let sidecar_path = options.sidecar.clone().or_else(|| spec.default_sidecar());
        let sidecar = match &sidecar_path {
            Some(path) if path.exists() => Some(Sidecar::new(match reading {
                false => FileDisk::open(path, *wait)?,
                true => FileDisk::open_unlocked(path)?,
            })),
            _ => None,
        };
        if *reading {
            description.read_only = true;
            description.no_log = Some("it was opened for reading alone");
        }
        let (spec, reading) = (spec.clone(), *reading);
        let mut backing = Self {
            spec,
            description,
            blocking,
            target,
            nbd,
            sidecar_path,
            sidecar,
            reading,
            generation,
            word: None,
        };
        if backing.sidecar_path.is_none() {
            backing.description.no_log.get_or_insert(
                "it has no place for an owner stamp: name one (`sidecar:`) on storage that every \
                 host reaches",
            );
        }
        // Now that the locks are had: whoever had them is dead, and its writes are with the server.
        let late = backing.nbd.as_ref().filter(|_| !reading && !planted(Bug::HoldLeftOut));
        if let Some(nbd) = late {
            nbd.hold_writes();
        }
        Ok(backing)
    }

    /// For how long after its opening nothing that is written to it goes out, since a server may
    /// still carry out what a killed owner had left with it. Reads go on.
    pub fn held(&self) -> Option<Duration> {
        self.nbd.as_ref().filter(|_| !self.reading).map(|nbd| nbd.settle())
    }

    pub fn description(&self) -> &Description {
        &self.description
    }

    pub fn sidecar_path(&self) -> Option<&Path> {
        self.sidecar_path.as_deref()
    }

    /// For a reactor: the backing, and the sidecar if there is one.
    pub fn targets(&self) -> (DiskTarget, Option<DiskTarget>) {
        let sidecar = self.sidecar.as_ref().filter(|_| !self.reading);
        (self.target.clone(), sidecar.map(|sidecar| sidecar.target.clone()))
    }

    /// For a disk that has a sidecar: finds that missing, where its storage may be away.
    ///
    /// # Errors
    /// [`ErrorKind::Gone`]: it lies elsewhere than beside the backing, and is not there. One that
    /// is missing beside its backing is lost: that is for a claim to say.
    pub fn find_sidecar(&self) -> Result<()> {
        let missing = self.sidecar_path.as_ref().filter(|_| self.sidecar.is_none());
        match missing.filter(|path| self.spec.default_sidecar().as_ref() != Some(*path)) {
            None => Ok(()),
            Some(path) => {
                let text = format!(
                    "backing {}: its sidecar {} is not there: mount the storage that it lies on, \
                     or restore it",
                    self.spec,
                    path.display()
                );
                Err(Error::new(ErrorKind::Gone, text))
            }
        }
    }

    /// What the content of a backing that was opened for reading is known by: if it is another one
    /// than before, the content may be another. `None`: nothing tells whether it is the same.
    ///
    /// # Errors
    /// [`ErrorKind::Fenced`]: a flash holds what this backing lacks.
    pub fn generation(&mut self) -> Result<Option<[u64; 2]>> {
        assert!(self.reading, "an owner stamps its backing");
        let standing = self.standing(Damage::Refuse)?;
        let stamp = standing.map(|standing| standing.stamp);
        if let Some(stamp) = stamp.as_ref().filter(|stamp| !stamp.is_clean()) {
            let text = format!(
                "{}: {} on host {} holds writes that it lacks: detach that first, then it can be \
                 read here",
                self.named(),
                stamp.owner.volume,
                stamp.owner.host_name
            );
            return Err(Error::new(ErrorKind::Fenced, text));
        }
        let identity = &self.description.identity;
        let of_stamp = stamp.map(|stamp| generation_of_stamp(&stamp, identity));
        Ok(self.generation.or(of_stamp))
    }

    /// Backing and sidecar for straight-line code, before a reactor has them.
    pub fn disks(&mut self) -> (&mut Blocking, Option<&mut Blocking>) {
        (&mut self.blocking, self.sidecar.as_mut().map(|sidecar| &mut sidecar.blocking))
    }

    /// Reads the first block of the backing and of its sidecar: storage that opens may still not
    /// answer.
    pub fn probe(&mut self) -> Result<()> {
        let named = self.named();
        let (backing, sidecar) = self.disks();
        // An empty one says nothing, and is refused as such.
        let disks = [Some(backing), sidecar].into_iter().flatten();
        for disk in disks.filter(|disk| disk.geometry().size_bytes > 0) {
            let block = disk.geometry().block_bytes as usize;
            let failed = |errno: Errno| Error::io(format!("reading {named}"), errno.into());
            disk.read(0, block).map_err(failed)?;
        }
        Ok(())
    }

    /// The leader of its consistency group has said this; from now on all that is done here goes
    /// by it.
    pub fn believe(&mut self, word: Word) {
        self.word = Some(word);
    }

    /// What this disk says as a leader of others, made durable. `None`: it has no stamp.
    pub fn word(&mut self) -> Result<Option<Word>> {
        let Some(sidecar) = &mut self.sidecar else { return Ok(None) };
        let word = together::word_of(&mut sidecar.blocking);
        word.map_err(|error| error.context(self.named()))
    }

    /// Where the backing is; changes nothing. `None`: it has no stamp.
    pub fn standing(&mut self, damage: Damage) -> Result<Option<Standing>> {
        let Some(sidecar) = &mut self.sidecar else { return Ok(None) };
        let options = RecoverOptions { damage, now_ms: 0, word: self.word };
        let standing = recover::inspect(&mut sidecar.blocking, options);
        standing.map_err(|error| error.context(self.named()))
    }

    /// Names backing and sidecar in messages.
    fn named(&self) -> String {
        match &self.sidecar_path {
            Some(path) => format!("backing {} (sidecar {})", self.spec, path.display()),
            None => format!("backing {}", self.spec),
        }
    }

    /// Backing and sidecar as they follow a command.
    fn words(&self) -> String {
        let spec = quoted(&self.spec.to_string());
        match &self.sidecar_path {
            Some(path) if self.spec.default_sidecar().as_ref() != Some(path) => {
                format!("{spec} --sidecar {}", quoted(&path.display().to_string()))
            }
            _ => spec,
        }
    }

    /// Finishes a committed group, whoever owns the backing; it stays theirs. With `adopt`, a
    /// backing at another place than the stamp knows is taken for the same, for good.
    pub fn recover(
        &mut self,
        options: RecoverOptions,
        adopt: bool,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Option<Recovery>> {
        let named = self.named();
        let Some(standing) = self.standing(options.damage)? else { return Ok(None) };
        let found = self.description.identity;
        let difference = standing.stamp.identity.difference(&found);
        if let Some(difference) = &difference
            && !(adopt && difference.adoptable)
            && !standing.stamp.is_clean()
        {
            let words = self.words();
            let words = difference.adoptable.then_some(words.as_str());
            let text = fence::not_the_stamped_one(&difference.text, words);
            return Err(Error::new(ErrorKind::Fenced, format!("{named}: {text}")));
        }
        let Some(sidecar) = &mut self.sidecar else { return Ok(None) };
        let options = RecoverOptions { word: self.word.or(options.word), ..options };
        let mut recovery =
            recover::recover(&mut self.blocking, &mut sidecar.blocking, options, progress)
                .map_err(|error| error.context(&named))?;
        if let (true, true, Some(recovery)) = (adopt, difference.is_some(), &mut recovery) {
            let stamp = &mut recovery.standing.stamp;
            *stamp = stamp.next(options.now_ms);
            stamp.identity = found;
            write_stamp(&mut sidecar.blocking, stamp).map_err(|error| error.context(named))?;
        }
        Ok(recovery)
    }

    /// Whether the claim would be let in, and where the backing is then; changes nothing.
    ///
    /// # Errors
    /// As [`Self::claim`] of one that is refused.
    pub fn judge(&mut self, claim: &Claim) -> Result<(Option<Standing>, Verdict)> {
        if let (State::Dirty, Some(reason)) = (claim.state, self.description.no_log) {
            let text = format!(
                "{}: no cache that keeps a log (write-back, write-through) can stand on it: \
                 {reason}",
                self.named()
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        if self.sidecar_path.is_none() {
            return Ok((None, Verdict { cold: claim.remembered.is_some() }));
        }
        let standing = self.standing(damage_for(claim))?;
        let found = self.description.identity;
        let verdict = fence::judge(claim, &found, standing.as_ref(), &self.words())
            .map_err(|error| error.context(self.named()))?;
        Ok((standing, verdict))
    }

    /// Makes the backing the claimer's, or refuses and changes nothing: finishes a committed group,
    /// then makes the claimer's stamp durable. Without a sidecar's place there is no stamp, and the
    /// claim must not be for a cache that keeps a log: what that has not drained would be drained
    /// over what another host has written since.
    pub fn claim(&mut self, claim: &Claim, progress: &mut dyn FnMut(Progress)) -> Result<Claimed> {
        let named = self.named();
        let (_, verdict) = self.judge(claim)?;
        let cold = verdict.cold;
        if self.sidecar_path.is_none() {
            return Ok(Claimed { stamp: None, recovery: None, cold, next_group: 1, live: None });
        }
        let found = self.description.identity;
        let options =
            RecoverOptions { damage: damage_for(claim), now_ms: claim.now_ms, word: self.word };
        let recovery = self.recover(options, claim.adopt, progress)?;
        let standing = recovery.as_ref().map(|recovery| &recovery.standing);
        let stamp = fence::claimed(claim, verdict, found, standing);
        let sidecar = self.sidecar_for(&stamp, standing.is_none())?;
        write_stamp(sidecar, &stamp).map_err(|error| error.context(&named))?;
        let next_group = stamp.retired_group + 1;
        Ok(Claimed { stamp: Some(stamp), recovery, cold, next_group, live: None })
    }

    /// For an owner that comes back: takes up a live group of its own, whose records its log still
    /// has, as it stands, instead of finishing it first, which takes as long as the backing takes
    /// for all of it. Changes nothing. `None`: there is no such group, or not all is as this owner
    /// left it; claim then.
    ///
    /// The epoch stays what it is: a new one would void the group (FORMAT.md).
    pub fn take_up(&mut self, claim: &Claim) -> Result<Option<Claimed>> {
        let (named, words) = (self.named(), self.words());
        let dirty = claim.remembered.is_some_and(|flash| flash.dirty);
        let Some(sidecar) = self.sidecar.as_mut().filter(|_| dirty) else { return Ok(None) };
        if self.description.no_log.is_some() {
            return Ok(None);
        }
        let options = RecoverOptions { damage: Damage::Skip, now_ms: 0, word: self.word };
        let standing = recover::take_up(&mut sidecar.blocking, options)
            .map_err(|error| error.context(&named))?;
        let Some(standing) = standing else { return Ok(None) };
        let found = &self.description.identity;
        let verdict = fence::judge(claim, found, Some(&standing), &words)
            .map_err(|error| error.context(&named))?;
        let stamp = standing.stamp;
        let mine = stamp.owner.allocation == claim.owner.allocation && !verdict.cold;
        let same = mine && stamp.identity.difference(found).is_none();
        let Some(live) = standing.live.filter(|_| same) else { return Ok(None) };
        Ok(Some(Claimed {
            stamp: Some(stamp),
            recovery: None,
            cold: false,
            next_group: standing.next_group,
            live: Some(live.span),
        }))
    }

    /// The sidecar, made if it is missing, with both slots emptied if it is new.
    fn sidecar_for(&mut self, stamp: &Stamp, new: bool) -> Result<&mut Blocking> {
        let named = self.named();
        let layout = Layout::new(stamp.group_bytes_max.min(GROUP_BYTES_MAX));
        if self.sidecar.is_none() {
            let path = self.sidecar_path.as_ref().expect("the caller looked");
            let disk = FileDisk::create(path, layout.sidecar_bytes(), Preallocation::Reserved)?;
            make_entry_durable(path)?;
            self.sidecar = Some(Sidecar::new(disk));
        }
        let sidecar = &mut self.sidecar.as_mut().expect("just made").blocking;
        let geometry = sidecar.geometry();
        if geometry.size_bytes < layout.sidecar_bytes() {
            let text = format!(
                "{named}: the sidecar has {} bytes and needs {}: remove the empty file, or name a \
                 larger device",
                geometry.size_bytes,
                layout.sidecar_bytes()
            );
            return Err(Error::new(ErrorKind::Full, text));
        }
        if new {
            clear_headers(sidecar, &layout).map_err(|error| error.context(named))?;
        }
        Ok(sidecar)
    }

    /// What giving up the owner's flash would lose; changes nothing. `None`: nothing, the disk is
    /// clean or has no stamp.
    pub fn lost(&mut self, damage: Damage) -> Result<Option<Lost>> {
        let standing = self.standing(damage)?;
        let Some(standing) = standing.filter(|standing| !standing.stamp.is_clean()) else {
            return Ok(None);
        };
        let volume = standing.stamp.owner.volume.clone();
        let (dirty, point) = (dirty_words(&standing), point_words(&standing));
        let text = format!("{}: {dirty}; these writes are lost, the disk is {point}", self.spec);
        Ok(Some(Lost { volume, standing, text }))
    }

    /// Gives up what only the owner's flash holds: finishes a committed group and stamps the
    /// backing clean and nobody's. `confirm` is the owner's `VM/VOLUME`. The old owner's flash is
    /// fenced from then on, by the epoch.
    pub fn take_over_lost(
        &mut self,
        confirm: &str,
        options: RecoverOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Option<Lost>> {
        let Some(lost) = self.lost(options.damage)? else { return Ok(None) };
        if confirm != lost.volume {
            let text = format!(
                "{}; nothing was done: confirm with `{}`, not `{confirm}`",
                lost.text, lost.volume
            );
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let recovery = self.recover(options, true, progress)?;
        let standing = recovery.map_or(lost.standing, |recovery| recovery.standing);
        let mut stamp = standing.stamp.next(options.now_ms);
        stamp.owner = Owner { volume: lost.volume.clone(), ..Owner::default() };
        stamp.owner_epoch += 1;
        stamp.first_epoch = stamp.owner_epoch;
        stamp.owned_ms = options.now_ms;
        stamp.identity = self.description.identity;
        stamp.state = State::Clean;
        stamp.point = standing.point;
        (stamp.dirty_bytes, stamp.oldest_dirty_ms) = (0, 0);
        stamp.roster = Roster::default();
        stamp.retired_group = standing.next_group - 1;
        let named = self.named();
        let sidecar = self.sidecar.as_mut().expect("it holds the stamp");
        write_stamp(&mut sidecar.blocking, &stamp).map_err(|error| error.context(named))?;
        let standing = Standing { stamp, live: None, dirty_bytes: 0, ..standing };
        Ok(Some(Lost { standing, ..lost }))
    }
}

/// A damaged group of ours is on our flash too, and will be drained anew.
fn damage_for(claim: &Claim) -> Damage {
    match claim.remembered.is_some_and(|flash| flash.dirty) {
        true => Damage::Skip,
        false => Damage::Refuse,
    }
}

/// For a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:=@%,".contains(c);
    match word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

/// A file that was just made survives a power cut only when its folder knows it.
fn make_entry_durable(path: &Path) -> Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|error| Error::io(format!("flushing the folder of {}", path.display()), error))
}

fn describe_file(disk: &FileDisk) -> Result<Description> {
    let geometry = disk.geometry();
    let identity = Identity::of_file(&disk.file(), geometry.size_bytes, geometry.block_bytes)
        .map_err(|error| Error::io(format!("examining {}", disk.path().display()), error))?;
    let known = matches!(identity.kind, Kind::File | Kind::Device);
    assert!(known, "a path leads to a file or a device");
    Ok(Description { identity, geometry, read_only: false, flush: true, no_log: None })
}

fn describe_nbd(client: &NbdClient) -> Description {
    let (geometry, export) = (client.geometry(), client.export());
    let identity = Identity::of_nbd(client.url(), geometry.size_bytes, geometry.block_bytes);
    let no_log = if export.read_only() {
        Some("the export is read-only")
    } else if !export.can_flush() {
        Some("its server cannot flush, so nobody knows what is durable there")
    } else {
        None
    };
    let (read_only, flush) = (export.read_only(), export.can_flush());
    Description { identity, geometry, read_only, flush, no_log }
}
