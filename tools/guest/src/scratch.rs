//! Directories that are gone when a run ends, however it ends short of SIGKILL.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::parts::work_dir;

/// What to remove when a signal ends us.
static IN_USE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A fresh directory, removed when this is dropped.
pub struct ScratchDir(TempDir);

impl ScratchDir {
    /// With a short path, as sockets need: theirs have at most 107 bytes.
    pub fn for_sockets() -> Result<Self> {
        Self::below(Path::new("/tmp"))
    }

    /// On the file system of the build, which takes direct I/O where `/tmp` may not: for pools.
    pub fn for_data() -> Result<Self> {
        Self::below(&work_dir()?)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    fn below(parent: &Path) -> Result<Self> {
        let made = tempfile::Builder::new().prefix("vflash-").tempdir_in(parent);
        let made = made.with_context(|| format!("create a directory in {}", parent.display()))?;
        in_use().push(made.path().to_owned());
        Ok(Self(made))
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        in_use().retain(|path| path != self.0.path());
    }
}

/// Removes every directory that is still in use, for a process that ends without dropping.
pub fn remove_all() {
    for path in in_use().iter() {
        // A child may still be writing there; what it leaves is in /tmp or the build directory.
        drop(std::fs::remove_dir_all(path));
    }
}

fn in_use() -> MutexGuard<'static, Vec<PathBuf>> {
    IN_USE.lock().expect("no holder panics")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_gone_after_its_owner_and_after_a_signal() {
        let dropped = ScratchDir::for_sockets().unwrap();
        let path = dropped.path().to_owned();
        assert!(path.is_dir());
        drop(dropped);
        assert!(!path.exists());
        let kept = ScratchDir::for_data().unwrap();
        std::fs::write(kept.path().join("pool"), "x").unwrap();
        remove_all();
        assert!(!kept.path().exists());
    }
}
