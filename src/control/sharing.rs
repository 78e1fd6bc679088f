//! Disks that several machines have: one volume is the disk's *home*, the others are doors to it.
//!
//! All of them are volumes with a socket each, and one cached disk is behind them. What the pool
//! keeps of doors stands in the home's attributes; it is changed while nobody opens the disk.

use super::api::{self, ErrorCode, EventKind, Failure};
use super::changes::require;
use super::engine::{Engine, Everything};
use super::served::{Host, Served};
use crate::base::limits::DOORS_MAX;
use crate::base::{Error, ErrorKind};
use crate::manifest::{Attributes, Door, VolumeName, VolumeSettings};
use crate::vhost::ExportId;
use std::collections::BTreeMap;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, Failure>;

/// How long storage may take to tell which disks are the same.
const IDENTIFY_WAIT: Duration = Duration::from_secs(2);

impl Everything {
    /// The doors to the disk of `home`, that volume's own left out.
    pub(super) fn doors_of(&self, home: &str) -> Vec<Served> {
        let of_home = |volume: &&Served| volume.home.as_deref() == Some(home);
        self.volumes.values().filter(of_home).cloned().collect()
    }

    /// What each door of a disk shows follows its home.
    pub(super) fn for_doors(&mut self, home: &str, mut change: impl FnMut(&mut Served)) {
        let of_home = |volume: &&mut Served| volume.home.as_deref() == Some(home);
        self.volumes.values_mut().filter(of_home).for_each(&mut change);
    }
}

/// Ends serving a disk behind all of its doors: nothing is under way when this returns.
pub(super) fn stop_disk(host: &Host, home: &Served, doors: &[Served]) -> crate::base::Result<()> {
    if home.link.export().is_some() {
        home.rest(super::caching::REST_WAIT)?;
    }
    for door in doors {
        door.close_socket(host)?;
    }
    home.stop(host)
}

impl Engine {
    /// The volume that a disk is named after.
    pub(super) fn home_of(&self, name: &str) -> Result<Served> {
        let served = self.served(name)?;
        match &served.home {
            Some(home) => self.served(home),
            None => Ok(served),
        }
    }

    /// Every volume that has the disk of `home`.
    pub(super) fn holders(&self, home: &Served) -> Vec<String> {
        let own = (!home.left).then(|| home.name.clone());
        let doors = self.state().doors_of(&home.name);
        own.into_iter().chain(doors.into_iter().map(|door| door.name)).collect()
    }

    /// Takes a disk out of service, whoever has it.
    pub(super) fn stop_disk(&self, home: &Served) -> Result<()> {
        let doors = self.state().doors_of(&home.name);
        Ok(stop_disk(&self.host, home, &doors)?)
    }

    /// An open door of the disk other than `name`'s, by which its export is named.
    fn other_export(&self, home: &str, name: &str) -> Option<ExportId> {
        let state = self.state();
        let own = state.volumes.get(home).filter(|home| !home.left);
        let doors = state.volumes.values().filter(|door| door.home.as_deref() == Some(home));
        let others = own.into_iter().chain(doors).filter(|door| door.name != name);
        others.into_iter().find_map(|door| door.export_id().ok())
    }

    /// Makes `name` a door to the disk of `of`, or changes the settings of one; `of` itself gets
    /// its own door back.
    pub(super) fn share(
        &self,
        name: &str,
        of: &str,
        granted: bool,
        settings: &VolumeSettings,
    ) -> Result<()> {
        let home = self.served(of)?;
        self.host.run_dir.socket(name)?;
        let known = self.state().volumes.get(name).cloned();
        if known.as_ref().is_some_and(|known| known.home.as_deref() != Some(of) && name != of) {
            let text = format!("there is another volume {name}: take that away first");
            return Err(Failure::new(ErrorCode::Busy, text));
        }
        if !settings.read_only {
            self.await_log(&home, name)?;
        }
        if let Some(known) = known.filter(|known| !known.left) {
            return self.change_door(&home, &known, granted, settings);
        }
        self.without(&home, || {
            self.note_sharing(&home, |attributes| {
                note_door(attributes, (name, of), granted, settings)
            })?;
            self.new_door(&home, name)
        })
    }

    /// Changes what the pool keeps of a disk's doors.
    fn note_sharing(
        &self,
        home: &Served,
        change: impl FnOnce(&mut Attributes) -> Result<()>,
    ) -> Result<()> {
        let mut attributes = Attributes::decode(&home.facts()?.attributes)?;
        change(&mut attributes)?;
        let (id, bytes) = (home.id, attributes.encode());
        Ok(home.pool.change(move |pool| pool.set_attributes(id, bytes))?)
    }

    /// A door that stands in the pool, and nowhere else yet.
    fn new_door(&self, home: &Served, name: &str) -> Result<()> {
        let sharing = Attributes::decode(&home.facts()?.attributes)?.sharing;
        let mut door = match sharing.doors.iter().find(|door| door.name == name) {
            Some(door) => home.door(&self.host, door),
            None => Served { left: false, ..home.clone() },
        };
        let opened = self.open_door(home, &mut door);
        if let Err(error) = &opened {
            // It is gone again: whoever asked for it is told why.
            door.fail(&self.host, error);
            self.note_sharing(home, |attributes| forget_door(attributes, (name, &home.name)))?;
        } else {
            self.state().volumes.insert(name.to_owned(), door);
        }
        Ok(opened?)
    }

    /// Opens the socket of a door, if its disk is served: else it is opened with that.
    fn open_door(&self, home: &Served, door: &mut Served) -> crate::base::Result<()> {
        let Some(side) = self.state().volumes.get(&home.name).and_then(|home| home.cached.clone())
        else {
            return Ok(());
        };
        let Some(export) = self.other_export(&home.name, &door.name) else { return Ok(()) };
        door.renew_link(&self.host);
        door.join(&self.host, export, &side)
    }

    fn change_door(
        &self,
        home: &Served,
        door: &Served,
        granted: bool,
        settings: &VolumeSettings,
    ) -> Result<()> {
        let settings = VolumeSettings { cache: home.settings.cache.clone(), ..settings.clone() };
        let same = VolumeSettings { limits: settings.limits, ..door.settings.clone() } == settings;
        let after = Served { settings, granted, ..door.clone() };
        let note = |door: &Served| {
            self.note_sharing(home, |attributes| {
                note_door(attributes, (&door.name, &home.name), door.granted, &door.settings)
            })
        };
        if home.cached.is_some() && (!same || door.is_down()) {
            return self.exchange(home, &after, &note, false).map(drop);
        }
        self.without(home, || note(&after))?;
        self.list(&after);
        if let Some(export) = door.link.export() {
            self.host.server.set_limits(export, super::served::limits(after.settings.limits))?;
        }
        Ok(())
    }

    /// Closes a door of a disk, has `note` make durable what is to be of it, and opens it as
    /// `after` has it: its guest reconnects. `whole`: all doors, and the disk with them. So it is
    /// if no other is open, since the last one takes the disk along: that comes to rest first. True
    /// if the disk was opened anew, with all settings that it has now.
    ///
    /// # Errors
    /// All is as before. [`ErrorCode::Busy`]: the door is being taken down, and to be served again
    /// when its requests have ended ([`Engine::serve_again`]).
    pub(super) fn exchange(
        &self,
        home: &Served,
        after: &Served,
        note: &dyn Fn(&Served) -> Result<()>,
        whole: bool,
    ) -> Result<bool> {
        let before = self.served(&after.name)?;
        if !whole && self.other_export(&home.name, &after.name).is_some() {
            return self.without(home, || {
                before.close_socket(&self.host)?;
                self.put((&before, after), note, &|door| self.open_listed(home, door))?;
                Ok(false)
            });
        }
        self.take_down(home)?;
        let note = |door: &Served| self.without(home, || note(door));
        self.put((&before, after), &note, &|_| self.open_cache(&home.name))?;
        Ok(true)
    }

    /// Has a closed door noted, listed and opened; if that fails, as it was before.
    fn put(
        &self,
        (before, after): (&Served, &Served),
        note: &dyn Fn(&Served) -> Result<()>,
        open: &dyn Fn(&Served) -> Result<()>,
    ) -> Result<()> {
        let noted = note(after);
        let put = noted.and_then(|()| {
            self.list(after);
            open(after)
        });
        put.inspect_err(|_| {
            let noted = note(before);
            self.list(before);
            if let Err(failure) = open(before).and(noted) {
                log::error!("volume {}: serving it as before: {failure}", before.name);
            }
        })
    }

    /// Shows other settings of a volume; those of the cache at all doors of a disk.
    pub(super) fn list(&self, changed: &Served) {
        let Served { name, settings, granted, home, .. } = changed;
        let mut state = self.state();
        if let Some(there) = state.volumes.get_mut(name) {
            (there.settings, there.granted) = (settings.clone(), *granted);
        }
        if home.is_none() {
            state.for_doors(name, |door| door.settings.cache = settings.cache.clone());
        }
    }

    fn open_listed(&self, home: &Served, door: &Served) -> Result<()> {
        let mut door = door.clone();
        let opened = self.open_door(home, &mut door);
        if let Err(error) = &opened {
            door.fail(&self.host, error);
        }
        self.state().volumes.insert(door.name.clone(), door);
        Ok(opened?)
    }

    /// Closes one of several doors of a disk, which stays for the others.
    pub(super) fn leave(&self, name: &str) -> Result<()> {
        let (leaving, home) = (self.served(name)?, self.home_of(name)?);
        if self.holders(&home) == [name] {
            // It keeps the disk open to be drained, and goes with it.
            return Ok(());
        }
        let leave = || {
            leaving.close_socket(&self.host)?;
            self.note_sharing(&home, |attributes| forget_door(attributes, (name, &home.name)))?;
            self.host.run_dir.forget(name);
            let export = self.other_export(&home.name, name);
            let mut state = self.state();
            if leaving.home.is_some() {
                state.volumes.remove(name);
            } else {
                state.for_doors(name, |door| door.granted = false);
                if let Some(there) = state.volumes.get_mut(name) {
                    there.left = true;
                    there.renew_link(&self.host);
                    export.into_iter().for_each(|export| there.link.open(export));
                }
            }
            drop(state);
            let text = format!("it left the disk of {}, which stays for the others", home.name);
            self.events().add(EventKind::Deleted, leaving.object(), text);
            Ok(())
        };
        if home.cached.is_none() || self.other_export(&home.name, name).is_some() {
            return self.without(&home, leave);
        }
        // Those who stay could not be opened: without this door the disk is closed, and tried anew.
        self.take_down(&home)?;
        self.without(&home, leave)?;
        if let Err(failure) = self.open_cache(&home.name) {
            log::warn!("{name} has left the disk of {}: {failure}", home.name);
        }
        Ok(())
    }

    /// Detaches one of several machines from their disk: nothing is drained or given up.
    pub(super) fn detach_door(&self, name: &str, lost: bool) -> Result<api::Plan> {
        let (served, home) = (self.served(name)?, self.home_of(name)?);
        if lost {
            let text = format!(
                "{name} shares a disk with {}: detach those first, the last one can be given up",
                others(&self.holders(&home), name)
            );
            return Err(Failure::new(ErrorCode::Invalid, text));
        }
        self.refuse_attached(&[name.to_owned()], false)?;
        let others = others(&self.holders(&home), name);
        self.leave(name)?;
        let detail = format!("it has left the disk, which stays for {others}");
        let step = api::Step {
            action: api::Action::Delete,
            object: served.object(),
            detail,
            destroys: false,
        };
        Ok(api::Plan { steps: vec![step], destroys: Vec::new(), done: true })
    }

    /// As [`Engine::detach_door`], for whoever reclaims by name.
    pub(super) fn reclaim_door(&self, name: &str, request: &api::Reclaim) -> Result<api::Plan> {
        self.refuse_attached(&[name.to_owned()], request.force)?;
        require(name, &request.confirm, "it would leave its disk to the others")?;
        if request.force {
            self.leave(name)?;
            let served = VolumeName::parse(name).map(|name| format!("volume {name}"));
            let step = api::Step {
                action: api::Action::Delete,
                object: served.unwrap_or_default(),
                detail: "it has left the disk, which stays for the others".to_owned(),
                destroys: false,
            };
            return Ok(api::Plan { steps: vec![step], destroys: Vec::new(), done: true });
        }
        self.detach_door(name, false)
    }

    /// Doors whose home is a disk of an open pool.
    pub(super) fn list_doors(&self, home: &Served) {
        let Ok(facts) = home.facts() else { return };
        let Ok(attributes) = Attributes::decode(&facts.attributes) else { return };
        let mut state = self.state();
        for door in &attributes.sharing.doors {
            if state.volumes.contains_key(&door.name) {
                let text = format!("{} has a door of this name, too: it stays shut", home.name);
                let object = format!("volume {}", door.name);
                self.events().add(EventKind::Error, object, text);
                continue;
            }
            state.volumes.insert(door.name.clone(), home.door(&self.host, door));
        }
    }
}

fn others(holders: &[String], name: &str) -> String {
    let others: Vec<&str> =
        holders.iter().map(String::as_str).filter(|other| *other != name).collect();
    others.join(", ")
}

fn note_door(
    attributes: &mut Attributes,
    (name, of): (&str, &str),
    granted: bool,
    settings: &VolumeSettings,
) -> Result<()> {
    let sharing = &mut attributes.sharing;
    if name == of {
        sharing.left = false;
        return Ok(());
    }
    let settings = VolumeSettings { cache: None, ..settings.clone() };
    if let Some(door) = sharing.doors.iter_mut().find(|door| door.name == name) {
        (door.granted, door.settings) = (granted, settings);
        return Ok(());
    }
    let taken = |number: &u16| sharing.doors.iter().any(|door| door.number == *number);
    let number = (1..DOORS_MAX as u16).find(|number| !taken(number)).ok_or_else(|| {
        let text = format!("{of}: a disk is shared by at most {DOORS_MAX} machines");
        Failure::new(ErrorCode::Full, text)
    })?;
    sharing.doors.push(Door { name: name.to_owned(), number, granted, settings });
    Ok(())
}

fn forget_door(attributes: &mut Attributes, (name, of): (&str, &str)) -> Result<()> {
    let sharing = &mut attributes.sharing;
    if name == of {
        sharing.left = true;
        // Nobody is left who grants.
        sharing.doors.iter_mut().for_each(|door| door.granted = false);
    } else {
        sharing.doors.retain(|door| door.name != name);
    }
    Ok(())
}

/// What disks are known by, by how manifests write them: a file by its device and inode, whatever
/// path leads there; a device by its number; an export by its URL. Storage that does not answer
/// in time leaves its disks known by their names.
pub(super) fn identify(backings: Vec<String>) -> BTreeMap<String, String> {
    let (sender, found) = channel();
    let spawned = std::thread::Builder::new().name("identify".into()).spawn(move || {
        for backing in backings {
            let identity = identity(&backing);
            // Nobody may be waiting any more.
            if sender.send((backing, identity)).is_err() {
                return;
            }
        }
    });
    if let Err(error) = spawned {
        log::warn!("starting a thread that looks at backings: {error}");
    }
    let deadline = Instant::now() + IDENTIFY_WAIT;
    let mut identities = BTreeMap::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match found.recv_timeout(left) {
            Ok((backing, Some(identity))) => drop(identities.insert(backing, identity)),
            Ok((_, None)) => {}
            Err(RecvTimeoutError::Timeout) => {
                log::warn!("storage does not answer: disks there are known by their names alone");
                return identities;
            }
            Err(RecvTimeoutError::Disconnected) => return identities,
        }
    }
}

fn identity(backing: &str) -> Option<String> {
    use crate::backing::spec::Spec;
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    match Spec::parse(backing).ok()? {
        Spec::Nbd(url) => Some(url.to_string()),
        Spec::Path(path) => {
            let found = std::fs::metadata(path).ok()?;
            Some(match found.file_type().is_block_device() {
                true => format!("device {:x}", found.rdev()),
                false => format!("file {:x}:{:x}", found.dev(), found.ino()),
            })
        }
    }
}

/// A disk whose machines have all left it is nobody's: only a crash in the middle of the last one's
/// leaving makes one.
pub(super) fn nobody(home: &str) -> Error {
    let text = format!(
        "no machine has this disk any more: `vflash detach {home}` drains it and gives its space \
         back"
    );
    Error::new(ErrorKind::Invalid, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_disk_has_one_identity_whatever_leads_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        std::fs::write(path("a"), "one").unwrap();
        std::fs::write(path("b"), "one").unwrap();
        std::fs::hard_link(path("a"), path("hard")).unwrap();
        std::os::unix::fs::symlink(path("a"), path("soft")).unwrap();
        let nbd = "nbd://host:10809/disk".to_owned();
        let names = ["a", "b", "hard", "soft", "missing"].map(path);
        let all = names.iter().cloned().chain([nbd.clone(), "nbd://host/disk".into()]);
        let found = identify(all.collect());
        let of = |name: &str| found.get(&path(name));
        assert!(of("a").is_some());
        assert_eq!((of("hard"), of("soft")), (of("a"), of("a")));
        assert_ne!(of("b"), of("a"));
        assert_eq!(of("missing"), None);
        assert_eq!(found.get("nbd://host/disk"), found.get(&nbd), "the port is the usual one");
    }

    #[test]
    fn a_door_has_a_number_that_is_free_and_keeps_it() {
        let mut attributes = Attributes::default();
        let settings = VolumeSettings::default();
        let mut note = |name: &str| note_door(&mut attributes, (name, "a/d"), false, &settings);
        ["b/d", "c/d", "e/d", "c/d"].into_iter().for_each(|name| note(name).unwrap());
        forget_door(&mut attributes, ("c/d", "a/d")).unwrap();
        note_door(&mut attributes, ("f/d", "a/d"), true, &settings).unwrap();
        let numbers: Vec<_> =
            attributes.sharing.doors.iter().map(|door| (door.name.as_str(), door.number)).collect();
        assert_eq!(numbers, [("b/d", 1), ("e/d", 3), ("f/d", 2)]);
        forget_door(&mut attributes, ("a/d", "a/d")).unwrap();
        assert!(attributes.sharing.left && !attributes.sharing.doors[2].granted);
        for number in 4..DOORS_MAX {
            let name = format!("vm-{number}/d");
            note_door(&mut attributes, (&name, "a/d"), false, &settings).unwrap();
        }
        let failure = note_door(&mut attributes, ("z/d", "a/d"), false, &settings).unwrap_err();
        assert_eq!(failure.code, ErrorCode::Full);
    }
}
