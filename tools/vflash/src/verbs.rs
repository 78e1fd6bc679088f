//! Manifests, volumes, status.

use crate::arguments::{
    ChangeArguments, Consent, DeleteArguments, FileArguments, Format, GetArguments, Kind,
    ReclaimArguments, ResizeArguments,
};
use crate::caches;
use crate::client::{Client, pool_path, volume_path};
use crate::output::{print, write};
use crate::tables;
use std::io::Read;
use std::path::PathBuf;
use vflash::control::api::{
    BODY_BYTES_MAX, Change, ErrorCode, Failure, Manifest, Mistake, Plan, Pool, Pools, Reclaim,
    Resize, Source, Status, Volume, Volumes,
};
use vflash::manifest;

type Result<T> = std::result::Result<T, Failure>;

pub(crate) fn apply(client: &Client, format: Format, arguments: &ChangeArguments) -> Result<()> {
    let plan = change(client, "/v1/apply", &arguments.files, false, &arguments.consent)?;
    print(format, &plan, tables::plan)
}

pub(crate) fn diff(client: &Client, format: Format, arguments: &FileArguments) -> Result<()> {
    let sources = read_sources(&arguments.files)?;
    let change = Change { sources, force: false, confirm: Vec::new() };
    let plan: Plan = client.ask("/v1/diff", Some(&change))?;
    print(format, &plan, tables::plan)
}

pub(crate) fn delete(client: &Client, format: Format, arguments: &DeleteArguments) -> Result<()> {
    let DeleteArguments { files, force, consent } = arguments;
    let plan = change(client, "/v1/delete", files, *force, consent)?;
    print(format, &plan, tables::plan)
}

fn change(
    client: &Client,
    path: &str,
    files: &FileArguments,
    force: bool,
    consent: &Consent,
) -> Result<Plan> {
    let sources = read_sources(&files.files)?;
    consent.obtain(|confirm| {
        let change = Change { sources: sources.clone(), force, confirm };
        client.post(path, Some(&change))
    })
}

/// Manifests from files, directories and standard input, in the order named.
fn read_sources(paths: &[PathBuf]) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for path in paths {
        if path.as_os_str() == "-" {
            sources.push(read_standard_input()?);
            continue;
        }
        let loaded = manifest::load(std::slice::from_ref(path)).map_err(unreadable)?;
        sources.extend(loaded.into_iter().map(|source| Source {
            name: source.name,
            directory: source.directory.map(|directory| directory.display().to_string()),
            text: source.text,
        }));
    }
    Ok(sources)
}

/// Relative paths in it start in the current directory, as in a shell.
fn read_standard_input() -> Result<Source> {
    let mut text = String::new();
    let mut input = std::io::stdin().lock().take(BODY_BYTES_MAX as u64);
    input
        .read_to_string(&mut text)
        .map_err(|error| Failure::new(ErrorCode::Io, format!("reading standard input: {error}")))?;
    let directory = std::env::current_dir().ok().map(|path| path.display().to_string());
    Ok(Source { name: "-".to_owned(), directory, text })
}

fn unreadable(mistakes: Vec<manifest::Mistake>) -> Failure {
    let mistakes = mistakes.iter().map(|mistake| Mistake {
        file: mistake.place.file.to_string(),
        line: mistake.place.line,
        column: mistake.place.column,
        message: mistake.message.clone(),
    });
    Failure {
        mistakes: mistakes.collect(),
        ..Failure::new(ErrorCode::Invalid, "a manifest cannot be read; nothing was done")
    }
}

pub(crate) fn get(client: &Client, format: Format, arguments: &GetArguments) -> Result<()> {
    let names = &arguments.names;
    match arguments.kind {
        Kind::Pools => {
            let Pools { mut pools } = client.get("/v1/pools")?;
            pools.retain(|pool| names.is_empty() || names.contains(&pool.name));
            all_found(names, |name| pools.iter().any(|pool| pool.name == name))?;
            print(format, &Pools { pools }, tables::pools)
        }
        Kind::Volumes => {
            let Volumes { mut volumes } = client.get("/v1/volumes")?;
            let is = |volume: &Volume, name: &str| {
                let vm = volume.name.split('/').next();
                volume.name == name || vm == Some(name)
            };
            volumes.retain(|volume| names.is_empty() || names.iter().any(|name| is(volume, name)));
            all_found(names, |name| volumes.iter().any(|volume| is(volume, name)))?;
            print(format, &Volumes { volumes }, tables::volumes)
        }
    }
}

fn all_found(names: &[String], found: impl Fn(&str) -> bool) -> Result<()> {
    match names.iter().find(|name| !found(name)) {
        None => Ok(()),
        Some(name) => Err(Failure::new(ErrorCode::NotFound, format!("there is no `{name}`"))),
    }
}

pub(crate) fn describe(client: &Client, format: Format, object: &str) -> Result<()> {
    if object.contains('/') {
        let volume: Volume = client.get(&volume_path(object)?)?;
        print(format, &volume, tables::volume)
    } else {
        let pool: Result<Pool> = client.get(&pool_path(object)?);
        let pool = pool.map_err(|failure| match failure.code {
            ErrorCode::NotFound => {
                let text = format!(
                    "{}; a volume is named VM/VOLUME, and `vflash get volumes {object}` lists \
                     those of a VM",
                    failure.message
                );
                Failure { message: text, ..failure }
            }
            _ => failure,
        })?;
        print(format, &pool, tables::pool)
    }
}

/// The manifest itself, unless it is asked for as a value of the API.
pub(crate) fn export(client: &Client, format: Format) -> Result<()> {
    let manifest: Manifest = client.get("/v1/manifest")?;
    match format {
        Format::Json => print(format, &manifest, |_| String::new()),
        Format::Table | Format::Yaml => write(&manifest.text),
    }
}

pub(crate) fn status(client: &Client, format: Format) -> Result<()> {
    let status: Status = client.get("/v1/status")?;
    print(format, &status, tables::status)
}

pub(crate) fn resize(client: &Client, format: Format, arguments: &ResizeArguments) -> Result<()> {
    let path = format!("{}/resize", volume_path(&arguments.volume)?);
    let volume: Volume = arguments.consent.obtain(|confirm| {
        client.post(&path, Some(&Resize { size_bytes: arguments.size.0, confirm }))
    })?;
    if volume.cache.is_some() {
        return caches::resized(client, format, volume, arguments.size.0);
    }
    print(format, &volume, |volume| {
        format!("{} has {}\n", volume.name, crate::output::size(volume.size_bytes))
    })
}

pub(crate) fn reclaim(client: &Client, format: Format, arguments: &ReclaimArguments) -> Result<()> {
    let path = format!("{}/reclaim", volume_path(&arguments.volume)?);
    let plan: Plan = arguments
        .consent
        .obtain(|confirm| client.post(&path, Some(&Reclaim { force: arguments.force, confirm })))?;
    print(format, &plan, tables::plan)
}
