//! Manifests from files and directories: the one place here that touches the file system.

use super::document::{SOURCE_BYTES_MAX, Source, too_large};
use super::mistake::{Mistake, Mistakes, Position};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Reads every file named, and of a directory its `*.yaml` and `*.yml` in the order of their names
/// (not those of directories within). What cannot be read is a mistake at the start of the file.
pub fn load(paths: &[PathBuf]) -> Result<Vec<Source>, Vec<Mistake>> {
    let (mut sources, mut mistakes) = (Vec::new(), Vec::new());
    for path in paths {
        let files = match path.is_dir() {
            true => files_of(path),
            false => Ok(vec![path.clone()]),
        };
        match files {
            Ok(files) => files.iter().for_each(|file| match file_source(file) {
                Ok(source) => sources.push(source),
                Err(mistake) => mistakes.push(mistake),
            }),
            Err(mistake) => mistakes.push(mistake),
        }
    }
    if mistakes.is_empty() { Ok(sources) } else { Err(mistakes) }
}

fn files_of(directory: &Path) -> Result<Vec<PathBuf>, Mistake> {
    let unreadable = |error| wrong(directory, Position::START, format!("cannot be read: {error}"));
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let yaml = path.extension().is_some_and(|end| end == "yaml" || end == "yml");
        if yaml && !path.is_dir() {
            files.push(path);
        }
    }
    if files.is_empty() {
        let text = "the directory holds no *.yaml and no *.yml: name the file";
        return Err(wrong(directory, Position::START, text));
    }
    files.sort();
    Ok(files)
}

fn file_source(path: &Path) -> Result<Source, Mistake> {
    let unreadable = |error| wrong(path, Position::START, format!("cannot be read: {error}"));
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let (mut bytes, too_many) = (Vec::new(), SOURCE_BYTES_MAX.saturating_add(1));
    file.take(too_many as u64).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() > SOURCE_BYTES_MAX {
        return Err(wrong(path, Position::START, too_large()));
    }
    let directory = std::path::absolute(path).map_err(unreadable)?.parent().map(Path::to_owned);
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Source { name: path.display().to_string(), directory, text }),
        Err(error) => {
            let good = error.utf8_error().valid_up_to();
            let text = String::from_utf8_lossy(error.as_bytes().get(..good).unwrap_or_default());
            let last = text.rsplit('\n').next().unwrap_or_default();
            let at = Position {
                line: u32::try_from(text.matches('\n').count())
                    .map_or(u32::MAX, |count| count.saturating_add(1)),
                column: u32::try_from(last.chars().count())
                    .map_or(u32::MAX, |count| count.saturating_add(1)),
            };
            Err(wrong(path, at, "this byte is not UTF-8: save the file as UTF-8"))
        }
    }
}

fn wrong(path: &Path, at: Position, message: impl Into<String>) -> Mistake {
    let file = Arc::from(path.display().to_string().as_str());
    Mistake { place: Mistakes::new(file).place(at), message: message.into() }
}
