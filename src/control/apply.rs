//! Manifests: from what is wanted to what is, all or nothing.
//!
//! Everything that can be checked is checked before the first step. Steps run in the plan's order:
//! those that can be undone first, then those that destroy. If one fails, what can be undone is
//! undone, in reverse order, and the answer says so; but nothing is once something was destroyed:
//! what was made before may be to take its place. Then the answer says what is done and what is
//! left. Guests are told of larger volumes at the very end, so that growth can be undone too.
//!
//! Each step is durable by itself. A daemon killed between two leaves what the finished ones made;
//! planning again gives the rest.

use super::api::{self, Change, ErrorCode, EventKind, Failure};
use super::changes::NewVolume;
use super::engine::Engine;
use super::inspect;
use super::pool::NewPool;
use super::served::socket_access;
use super::sharing;
use crate::base::Error;
use crate::io::file::Preallocation;
use crate::manifest::{
    self, Action, Actual, ActualPool, ActualVolume, Attributes, Device, DeviceState, Mistake, Plan,
    Role, Step, VolumeName, VolumeSettings, Wanted,
};
use std::path::{Path, PathBuf};

type Result<T> = std::result::Result<T, Failure>;

/// How to take a step back.
enum Undo {
    ClosePool { name: String, made_file: Option<PathBuf> },
    DestroyVolume(String),
    ShrinkVolume { name: String, size_bytes: u64 },
    ResizeCache { name: String, size_bytes: u64 },
    SetBack { name: String, settings: VolumeSettings },
    Leave(String),
    ShareAsBefore { name: String, of: String, granted: bool, settings: VolumeSettings },
}

/// A step that was carried out, and how to undo it, if it can be.
type Done<'a> = (&'a Action, Option<Undo>);

impl Engine {
    pub fn apply(&self, change: &Change) -> Result<api::Plan> {
        let _changes = self.changes.begin("apply")?;
        let wanted = read(change)?;
        let plan = self.plan(&wanted)?;
        self.carry_out(&plan, &change.confirm)
    }

    pub fn diff(&self, change: &Change) -> Result<api::Plan> {
        let _changes = self.changes.begin("diff")?;
        let wanted = read(change)?;
        Ok(described(&self.plan(&wanted)?, false))
    }

    pub fn delete(&self, change: &Change) -> Result<api::Plan> {
        let _changes = self.changes.begin("delete")?;
        let wanted = read(change)?;
        let actual = self.actual(&Wanted::default())?;
        let plan = manifest::plan_deletion(&wanted, &actual, change.force).map_err(mistaken)?;
        self.carry_out(&plan, &change.confirm)
    }

    /// What there is, as the manifest that wants it.
    pub fn manifest(&self) -> Result<api::Manifest> {
        let _changes = self.changes.begin("export")?;
        let actual = self.actual(&Wanted::default())?;
        if let Some((name, reason)) = actual.unreadable.first_key_value() {
            // A manifest without it would not make the same again.
            let text = format!("the settings of {name} cannot be read: {reason}");
            return Err(Failure::new(ErrorCode::Unsupported, text));
        }
        Ok(api::Manifest { text: manifest::export::to_yaml(&actual) })
    }

    /// Applies manifests without anybody to ask: nothing is destroyed.
    pub fn apply_files(&self, files: &[PathBuf]) {
        let applied = manifest::load(files).map_err(mistaken).and_then(|sources| {
            let _changes = self.changes.begin_in_time("applying the manifests of -f");
            let wanted = manifest::parse(&sources).map_err(mistaken)?;
            self.carry_out(&self.plan(&wanted)?, &[])
        });
        let mut failure = applied.err();
        if let Some(failure) = failure.as_mut().filter(|one| one.code == ErrorCode::Unconfirmed) {
            failure.message.push_str("; nothing was done");
        }
        let failure = failure.map(|failure| failure.to_string());
        if let Some(text) = &failure {
            self.events().add(EventKind::Error, "vflashd", text);
        }
        self.state().manifest_failure = failure;
    }

    fn plan(&self, wanted: &Wanted) -> Result<Plan> {
        let mut mistakes = manifest::plan::check_sockets(wanted, self.run_dir());
        for (_, volume) in wanted.volumes() {
            if let Err(error) = socket_access(&volume.settings.access) {
                mistakes.push(Mistake::new(&volume.name.place, error.to_string()));
            }
        }
        if !mistakes.is_empty() {
            return Err(mistaken(mistakes));
        }
        manifest::plan(wanted, &self.actual(wanted)?).map_err(mistaken)
    }

    /// What there is, with what lies on the devices of wanted pools.
    fn actual(&self, wanted: &Wanted) -> Result<Actual> {
        let mut actual = Actual::default();
        for pool in self.open_pools() {
            pool.refresh()?;
            let facts = pool.facts();
            let device = wanted_as(wanted, &pool.device);
            if let Device::Path(path) = &device {
                let state = DeviceState::Pool { name: pool.name.clone() };
                actual.devices.insert(path.clone(), state);
            }
            self.add_pool(&mut actual, &pool.name, device, &facts);
        }
        for path in wanted.devices() {
            if actual.devices.contains_key(path) {
                continue;
            }
            let looked = inspect::look(path);
            let found = looked.map_err(|error| not_a_pool(wanted, path, &error))?;
            if let (DeviceState::Pool { name }, Some(facts)) = (&found.state, &found.pool) {
                self.add_pool(&mut actual, name, Device::Path(path.clone()), facts);
            }
            actual.devices.insert(path.clone(), found.state);
        }
        let state = self.state();
        let down = state.volumes.values().filter(|served| served.is_down());
        actual.down = down.filter_map(|served| VolumeName::parse(&served.name)).collect();
        drop(state);
        actual.backings = sharing::identify(manifest::plan::backings(wanted, &actual));
        Ok(actual)
    }

    fn add_pool(
        &self,
        actual: &mut Actual,
        name: &str,
        device: Device,
        facts: &super::pool::PoolFacts,
    ) {
        let state = self.state();
        actual.pools.push(ActualPool {
            name: name.to_owned(),
            device,
            size_bytes: facts.space.total_bytes,
            free_bytes: facts.space.free_bytes + facts.space.scrub_bytes,
            open: state.pools.contains_key(name),
        });
        for (volume, allocation) in &facts.allocations {
            // A name of another making is not ours to plan for.
            let Some(parsed) = VolumeName::parse(volume) else { continue };
            let served = |name: &str| {
                state.volumes.get(name).is_some_and(|served| served.link.is_attached())
            };
            let decoded = Attributes::decode(&allocation.attributes);
            let Attributes { settings, sharing, .. } = match decoded {
                Ok(attributes) => attributes,
                Err(error) => {
                    actual.unreadable.insert(parsed, error.to_string());
                    continue;
                }
            };
            let home = ActualVolume {
                name: parsed,
                pool: name.to_owned(),
                size_bytes: allocation.size_bytes,
                class: manifest_class(allocation.class),
                thin: allocation.thin,
                settings,
                attached: !sharing.left && served(volume),
                role: if sharing.left { Role::Left } else { Role::Own },
            };
            for door in sharing.doors {
                let Some(parsed) = VolumeName::parse(&door.name) else { continue };
                actual.volumes.push(ActualVolume {
                    name: parsed,
                    settings: door.settings,
                    attached: served(&door.name),
                    role: Role::Door { of: home.name.clone(), granted: door.granted },
                    ..home.clone()
                });
            }
            actual.volumes.push(home);
        }
    }

    fn carry_out(&self, plan: &Plan, confirm: &[String]) -> Result<api::Plan> {
        let unconfirmed = plan.unconfirmed(confirm);
        if !unconfirmed.is_empty() {
            let names = plan.destroys().filter(|name| !confirm.contains(name)).collect();
            let text = "data would be destroyed";
            return Err(Failure {
                mistakes: unconfirmed.iter().map(api_mistake).collect(),
                unconfirmed: names,
                ..Failure::new(ErrorCode::Unconfirmed, text)
            });
        }
        let mut done: Vec<Done<'_>> = Vec::new();
        for (at, step) in plan.steps.iter().enumerate() {
            match self.step(&step.action) {
                Ok(undo) => done.push((&step.action, undo)),
                Err(failure) => return Err(self.end_early(&plan.steps[at..], step, failure, done)),
            }
        }
        for step in &plan.steps {
            self.tell_guest(&step.action);
        }
        Ok(described(plan, true))
    }

    /// Carries one step out; returns how to undo it, if it can be.
    fn step(&self, action: &Action) -> Result<Option<Undo>> {
        match action {
            Action::CreatePool { name, device, file_bytes, overwrites } => {
                self.create_pool_on(name, device, *file_bytes, overwrites.is_some())
            }
            Action::OpenPool { name, device } => {
                self.open_pool(&device.display().to_string(), Some(name))?;
                Ok(Some(Undo::ClosePool { name: name.clone(), made_file: None }))
            }
            Action::GrowPool { name, to_bytes, .. } => {
                self.lengthen_pool(name, *to_bytes)?;
                Ok(None)
            }
            Action::CreateVolume(new) => {
                let name = new.name.to_string();
                let (pool, _) = self.make_volume(&NewVolume {
                    name: name.clone(),
                    pool: new.pool.clone(),
                    size_bytes: new.size_bytes,
                    thin: new.thin,
                    class: flash_class(new.class),
                    settings: new.settings.clone(),
                })?;
                let undo = Undo::DestroyVolume(name.clone());
                match self.serve(&pool, &name) {
                    Ok(()) => Ok(Some(undo)),
                    Err(failure) => Err(self.undo_one(undo).err().unwrap_or(failure)),
                }
            }
            Action::GrowVolume { name, from_bytes, to_bytes, .. } => {
                let name = name.to_string();
                self.grow(&name, *to_bytes)?;
                Ok(Some(Undo::ShrinkVolume { name, size_bytes: *from_bytes }))
            }
            Action::ResizeCache { name, from_bytes, to_bytes, .. } => {
                let name = name.to_string();
                self.resize_cache(&name, *to_bytes)?;
                Ok(Some(Undo::ResizeCache { name, size_bytes: *from_bytes }))
            }
            Action::UpdateVolume { name, from, to, .. } => {
                let name = name.to_string();
                self.set_settings(&name, to)?;
                Ok(Some(Undo::SetBack { name, settings: from.clone() }))
            }
            Action::ServeVolume { name } => self.serve_again(&name.to_string()).map(|()| None),
            Action::ShareDisk { name, of, granted, from, to } => {
                let (name, of) = (name.to_string(), of.to_string());
                let before = self.served(&name).is_ok_and(|served| served.granted);
                self.share(&name, &of, *granted, to)?;
                Ok(Some(match from.clone() {
                    None => Undo::Leave(name),
                    Some(settings) => Undo::ShareAsBefore { name, of, granted: before, settings },
                }))
            }
            Action::LeaveDisk { name, .. } => self.leave(&name.to_string()).map(|()| None),
            Action::ShrinkVolume { name, to_bytes, .. } => {
                self.shrink(&name.to_string(), *to_bytes).map(|()| None)
            }
            Action::DeleteVolume { name, .. } => self.destroy(&name.to_string()).map(|()| None),
        }
    }

    /// A file or device that was there is not made what it was: then there is no way back.
    fn create_pool_on(
        &self,
        name: &str,
        device: &Device,
        file_bytes: Option<u64>,
        overwrite: bool,
    ) -> Result<Option<Undo>> {
        let new = NewPool {
            name: name.to_owned(),
            device: device.to_string(),
            size_bytes: file_bytes,
            preallocation: Preallocation::Reserved,
            overwrite,
        };
        let was_there = matches!(device, Device::Path(path) if path.exists());
        self.make_pool(&new)?;
        let made_file = matches!(device, Device::Path(_)).then(|| PathBuf::from(&new.device));
        Ok((!was_there).then(|| Undo::ClosePool { name: name.to_owned(), made_file }))
    }

    fn undo_one(&self, undo: Undo) -> Result<()> {
        match undo {
            Undo::ClosePool { name, made_file } => {
                self.close_pool(&name)?;
                if let Some(path) = made_file {
                    std::fs::remove_file(&path).map_err(|error| {
                        let text = format!("removing {}: {error}", path.display());
                        Failure::new(ErrorCode::Io, text)
                    })?;
                }
                Ok(())
            }
            Undo::DestroyVolume(name) => self.destroy(&name),
            Undo::ShrinkVolume { name, size_bytes } => self.shrink(&name, size_bytes),
            Undo::ResizeCache { name, size_bytes } => self.resize_cache(&name, size_bytes),
            Undo::SetBack { name, settings } => self.set_settings(&name, &settings),
            Undo::Leave(name) => self.leave(&name),
            Undo::ShareAsBefore { name, of, granted, settings } => {
                self.share(&name, &of, granted, &settings)
            }
        }
    }

    /// What becomes of a plan whose step `failed`, the first of those that are `left`, and the
    /// failure with that.
    fn end_early(
        &self,
        left: &[Step],
        failed: &Step,
        failure: Failure,
        done: Vec<Done<'_>>,
    ) -> Failure {
        let Failure { code, message, .. } = failure;
        let object = failed.action.object();
        let mut text = format!("{}: {object}: {message}", failed.place);
        let destroyed = done.iter().any(|(action, _)| action.destroys().is_some());
        let kept: Vec<&Action> = match destroyed {
            true => done.into_iter().map(|(action, _)| action).collect(),
            false => self.take_back(done, &mut text),
        };
        if !kept.is_empty() {
            text.push_str(&format!("; done before and not undone: {}", listed(&kept)));
        }
        if destroyed {
            let left: Vec<&Action> = left.iter().map(|step| &step.action).collect();
            text.push_str(&format!("; left to be done, by applying again: {}", listed(&left)));
        }
        // Guests and followers of events hear of it as if nothing had failed.
        kept.iter().for_each(|step| self.tell_guest(step));
        self.events().add(EventKind::Error, object, &text);
        Failure::new(code, text)
    }

    /// Undoes what can be, latest first, and adds to the text what became of it; gives what cannot
    /// be undone.
    fn take_back<'a>(&self, done: Vec<Done<'a>>, text: &mut String) -> Vec<&'a Action> {
        let (mut kept, mut undone, mut failures) = (Vec::new(), false, Vec::new());
        for (action, undo) in done.into_iter().rev() {
            match undo.map(|undo| self.undo_one(undo)) {
                None => kept.push(action),
                Some(Ok(())) => undone = true,
                Some(Err(failure)) => failures.push(failure.message),
            }
        }
        if !failures.is_empty() {
            let failures = failures.join("; ");
            text.push_str(&format!("; undoing what it had made before failed: {failures}"));
        } else if undone {
            text.push_str("; what this apply had made before was undone");
        }
        kept.reverse();
        kept
    }

    /// After everything has succeeded.
    fn tell_guest(&self, action: &Action) {
        let (events, object) = (self.events(), action.object());
        let announced = match action {
            Action::GrowVolume { name, from_bytes, to_bytes, .. } => {
                self.note_resize(&name.to_string(), *from_bytes, *to_bytes);
                self.announce(&name.to_string())
            }
            Action::ShrinkVolume { name, from_bytes, to_bytes, .. } => {
                self.note_resize(&name.to_string(), *from_bytes, *to_bytes);
                Ok(())
            }
            Action::CreateVolume(_) | Action::ShareDisk { from: None, .. } => {
                events.add(EventKind::Created, &object, action.detail());
                Ok(())
            }
            Action::UpdateVolume { .. } | Action::ServeVolume { .. } | Action::ShareDisk { .. } => {
                events.add(EventKind::Updated, &object, action.detail());
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(failure) = announced {
            events.add(EventKind::Error, object, failure.message);
        }
    }
}

fn listed(actions: &[&Action]) -> String {
    let text = |action: &&Action| format!("{}: {}", action.object(), action.detail());
    actions.iter().map(text).collect::<Vec<_>>().join("; ")
}

fn read(change: &Change) -> Result<Wanted> {
    let source = |source: &api::Source| manifest::Source {
        name: source.name.clone(),
        directory: source.directory.as_ref().map(PathBuf::from),
        text: source.text.clone(),
    };
    let sources: Vec<_> = change.sources.iter().map(source).collect();
    manifest::parse(&sources).map_err(mistaken)
}

/// A device that a manifest names cannot be looked at.
fn not_a_pool(wanted: &Wanted, path: &Path, error: &Error) -> Failure {
    let device = Device::Path(path.to_owned());
    match wanted.pools.iter().find(|pool| pool.device.value == device) {
        Some(pool) => mistaken(vec![Mistake::new(&pool.device.place, error.to_string())]),
        None => Failure::new(ErrorCode::Io, error.to_string()),
    }
}

fn mistaken(mistakes: Vec<Mistake>) -> Failure {
    let count = mistakes.len();
    let text = match count {
        1 => "the manifest has a mistake; nothing was done".to_owned(),
        _ => format!("the manifests have {count} mistakes; nothing was done"),
    };
    let mistakes = mistakes.iter().map(api_mistake).collect();
    Failure { mistakes, ..Failure::new(ErrorCode::Invalid, text) }
}

fn api_mistake(mistake: &Mistake) -> api::Mistake {
    api::Mistake {
        file: mistake.place.file.to_string(),
        line: mistake.place.line,
        column: mistake.place.column,
        message: mistake.message.clone(),
    }
}

fn described(plan: &Plan, done: bool) -> api::Plan {
    let step = |step: &Step| api::Step {
        action: match step.action {
            Action::CreatePool { .. }
            | Action::CreateVolume(_)
            | Action::ShareDisk { from: None, .. } => api::Action::Create,
            Action::OpenPool { .. } => api::Action::Open,
            Action::UpdateVolume { .. } | Action::ServeVolume { .. } | Action::ShareDisk { .. } => {
                api::Action::Update
            }
            Action::GrowPool { .. }
            | Action::GrowVolume { .. }
            | Action::ResizeCache { .. }
            | Action::ShrinkVolume { .. } => api::Action::Resize,
            Action::DeleteVolume { .. } | Action::LeaveDisk { .. } => api::Action::Delete,
        },
        object: step.action.object(),
        detail: step.action.detail(),
        destroys: step.action.destroys().is_some(),
    };
    api::Plan {
        steps: plan.steps.iter().map(step).collect(),
        destroys: plan.destroys().collect(),
        done,
    }
}

/// The device of an open pool in the words of the manifest, if both mean the same file: a path may
/// lead through links.
fn wanted_as(wanted: &Wanted, device: &str) -> Device {
    if let Some(size) = device.strip_prefix("null:")
        && let Ok(size) = crate::base::units::Bytes::parse(size)
    {
        return Device::Null { size_bytes: size.0 };
    }
    let path = Path::new(device);
    let real = path.canonicalize();
    let same = |wanted: &&PathBuf| match (&real, wanted.canonicalize()) {
        (Ok(real), Ok(wanted)) => *real == wanted,
        _ => wanted.as_path() == path,
    };
    Device::Path(wanted.devices().find(same).cloned().unwrap_or_else(|| path.to_owned()))
}

fn manifest_class(class: crate::flash::Class) -> manifest::Class {
    match class {
        crate::flash::Class::Volatile => manifest::Class::Volatile,
        crate::flash::Class::Nonvolatile => manifest::Class::Nonvolatile,
    }
}

fn flash_class(class: manifest::Class) -> crate::flash::Class {
    match class {
        manifest::Class::Volatile => crate::flash::Class::Volatile,
        manifest::Class::Nonvolatile => crate::flash::Class::Nonvolatile,
    }
}
