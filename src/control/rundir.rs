//! The run directory: who serves it, which pools were open, where sockets are.
//!
//! It outlives a daemon and is gone after a restart of the host, as are the guests that it speaks
//! of. What must outlive the host stands in the pools; which pools there are, in a *state
//! directory*, if the daemon is given one.

use crate::base::{Error, ErrorKind, Result};
use crate::manifest::VolumeName;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::fs::{File, Permissions};
use std::io::{ErrorKind as IoKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// `sockaddr_un.sun_path` less its terminating zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// No name of a virtual machine has a dot, so none of these can be one's directory.
const LOCK: &str = "vflashd.lock";
const POOLS: &str = "pools.json";

/// Of files beside a volume's socket: its guest has turned its write cache off.
const WRITE_THROUGH: &str = "write-through";

/// As above: see [`RunDir::past_log`].
const PAST_LOG: &str = "past-log";

/// How long a daemon that ends is waited for.
const HELD_WAIT: Duration = Duration::from_secs(3);

/// A pool to be opened again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remembered {
    pub name: String,
    pub device: String,
}

pub struct RunDir {
    path: PathBuf,
    /// Where the list of pools is kept, too.
    state_dir: Option<PathBuf>,
    /// Held for as long as this daemon serves the directory.
    _lock: Flock<File>,
}

impl RunDir {
    /// Makes the directory if it is missing, and takes it.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`]: another daemon serves it.
    pub fn open(path: &Path) -> Result<Self> {
        let failed =
            |error| Error::io(format!("opening the run directory {}", path.display()), error);
        make_directory(path).map_err(failed)?;
        // Sockets must be reachable from anywhere.
        let path = path.canonicalize().map_err(failed)?;
        let api = super::api::socket_path(&path);
        if api.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            let text = format!(
                "the path of the API's socket, {}, has {} bytes, and Linux takes \
                 {SOCKET_PATH_BYTES_MAX}: give vflashd a shorter --run-dir",
                api.display(),
                api.as_os_str().len()
            );
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path.join(LOCK))
            .map_err(failed)?;
        let lock = lock(file).map_err(|errno| {
            if errno == nix::errno::Errno::EWOULDBLOCK {
                let text = format!(
                    "another vflashd serves {}: stop it, or give this one another --run-dir",
                    path.display()
                );
                return Error::new(ErrorKind::Busy, text);
            }
            failed(errno.into())
        })?;
        Ok(Self { path, state_dir: None, _lock: lock })
    }

    /// Keeps the list of pools in `state_dir`, too, where it outlives the host's restart. What is
    /// there already goes before what the run directory has.
    pub fn with_state(mut self, state_dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(state_dir).map_err(|error| {
            Error::io(format!("making the state directory {}", state_dir.display()), error)
        })?;
        self.state_dir = Some(state_dir.to_owned());
        Ok(self)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `DIR/VM/VOLUME.sock`
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`]: no name of a volume, or longer than the address of a socket can be.
    pub fn socket(&self, volume: &str) -> Result<PathBuf> {
        let socket = self.file(volume, "sock")?;
        if socket.as_os_str().len() <= SOCKET_PATH_BYTES_MAX {
            return Ok(socket);
        }
        let text = format!(
            "volume {volume}: the path of its socket, {}, has more than {SOCKET_PATH_BYTES_MAX} \
             bytes: give it a shorter name, or vflashd a shorter --run-dir",
            socket.display()
        );
        Err(Error::new(ErrorKind::Invalid, text))
    }

    /// Makes the directory of the volume's socket.
    pub fn prepare(&self, volume: &str) -> Result<PathBuf> {
        let socket = self.socket(volume)?;
        if let Some(parent) = socket.parent() {
            make_directory(parent)
                .map_err(|error| Error::io(format!("making {}", parent.display()), error))?;
        }
        Ok(socket)
    }

    /// Removes what was kept of a volume that is no more.
    pub fn forget(&self, volume: &str) {
        let files = ["sock", WRITE_THROUGH, PAST_LOG].map(|end| self.file(volume, end));
        let [Ok(socket), Ok(write_through), Ok(past_log)] = files else { return };
        for result in [
            std::fs::remove_file(&socket),
            std::fs::remove_file(&write_through),
            std::fs::remove_file(&past_log),
            socket.parent().map_or(Ok(()), std::fs::remove_dir),
        ] {
            match result.map_err(|error| error.kind()) {
                // Its directory stays for other volumes.
                Ok(()) | Err(IoKind::NotFound | IoKind::DirectoryNotEmpty) => {}
                Err(kind) => log::warn!("volume {volume}: cleaning the run directory: {kind}"),
            }
        }
    }

    pub fn remembered(&self) -> Result<Vec<Remembered>> {
        let kept = |directory: &&PathBuf| directory.join(POOLS).exists();
        remembered_in(self.state_dir.as_ref().filter(kept).unwrap_or(&self.path))
    }

    /// Replaces the list.
    pub fn remember(&self, pools: &[Remembered]) -> Result<()> {
        let mut directories = self.state_dir.iter().chain([&self.path]);
        directories.try_for_each(|directory| self::remember(&directory.join(POOLS), pools))
    }

    /// Whether the guest's write cache is on. A guest says so once, and not again to the daemon
    /// that follows this one.
    pub fn write_cache(&self, volume: &str) -> bool {
        !self.is_marked(volume, WRITE_THROUGH)
    }

    pub fn set_write_cache(&self, volume: &str, enabled: bool) -> Result<()> {
        self.mark(volume, WRITE_THROUGH, !enabled)
    }

    /// Whether the guest may have requests under way that an earlier daemon did past the log: they
    /// are done again when it is back.
    pub fn past_log(&self, volume: &str) -> bool {
        self.is_marked(volume, PAST_LOG)
    }

    pub fn set_past_log(&self, volume: &str, past_log: bool) -> Result<()> {
        self.mark(volume, PAST_LOG, past_log)
    }

    fn is_marked(&self, volume: &str, end: &str) -> bool {
        self.file(volume, end).is_ok_and(|marker| marker.exists())
    }

    fn mark(&self, volume: &str, end: &str, stands: bool) -> Result<()> {
        let marker = self.file(volume, end)?;
        let result = match stands {
            false => std::fs::remove_file(&marker),
            true => File::create(&marker).map(drop),
        };
        match result {
            Err(error) if error.kind() != IoKind::NotFound || stands => {
                Err(Error::io(format!("noting {} of its guest", marker.display()), error))
            }
            _ => Ok(()),
        }
    }

    /// Names come from pools, and a pool may come from anywhere: none may lead out of here.
    fn file(&self, volume: &str, end: &str) -> Result<PathBuf> {
        match VolumeName::parse(volume) {
            Some(name) => Ok(self.path.join(name.machine).join(format!("{}.{end}", name.volume))),
            None => {
                let text = format!("`{volume}` is no name of a volume, which is VM/VOLUME");
                Err(Error::new(ErrorKind::Invalid, text))
            }
        }
    }
}

/// Takes the lock; one that a killed daemon still holds, because the kernel has not ended it yet,
/// is waited for.
fn lock(mut file: File) -> nix::Result<Flock<File>> {
    let deadline = Instant::now() + HELD_WAIT;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Err((held, nix::errno::Errno::EWOULDBLOCK)) if Instant::now() < deadline => file = held,
            lock => return lock.map_err(|(_, errno)| errno),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Replaces the list, whole or not at all, also when the power goes.
fn remember(path: &Path, pools: &[Remembered]) -> Result<()> {
    let text = serde_json::to_vec_pretty(pools)
        .map_err(|error| Error::with(ErrorKind::Io, "writing the list of pools", error))?;
    let new = path.with_extension("new");
    let written = || {
        let mut file = File::create(&new)?;
        file.write_all(&text)?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
    };
    written().map_err(|error| Error::io(format!("writing {}", path.display()), error))
}

/// The pools that the last daemon of a run directory had open.
pub fn remembered_in(run_dir: &Path) -> Result<Vec<Remembered>> {
    let path = run_dir.join(POOLS);
    let text = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == IoKind::NotFound => return Ok(Vec::new()),
        text => text.map_err(|error| Error::io(format!("reading {}", path.display()), error))?,
    };
    serde_json::from_str(&text).map_err(|error| {
        let text = format!("{} is damaged: name pools by --pool", path.display());
        Error::with(ErrorKind::Corrupt, text, error)
    })
}

/// Whoever has a socket in it must be able to reach it, whatever the daemon's umask.
fn make_directory(path: &Path) -> std::io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o755))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let first = RunDir::open(dir.path()).unwrap();
        let second = RunDir::open(dir.path()).err().unwrap();
        assert_eq!(second.kind(), ErrorKind::Busy);
        drop(first);
        RunDir::open(dir.path()).unwrap();
    }

    #[test]
    fn pools_are_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = RunDir::open(dir.path()).unwrap();
        assert_eq!(run_dir.remembered().unwrap(), []);
        let pools = [Remembered { name: "a".into(), device: "/dev/a".into() }];
        run_dir.remember(&pools).unwrap();
        assert_eq!(run_dir.remembered().unwrap(), pools);
        std::fs::write(dir.path().join(POOLS), "[{").unwrap();
        assert_eq!(run_dir.remembered().unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn the_write_cache_is_remembered_until_the_volume_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = RunDir::open(dir.path()).unwrap();
        run_dir.prepare("vm/a").unwrap();
        assert!(run_dir.write_cache("vm/a"));
        for enabled in [true, false, false, true, true, false] {
            run_dir.set_write_cache("vm/a", enabled).unwrap();
            assert_eq!(run_dir.write_cache("vm/a"), enabled);
            assert!(!run_dir.past_log("vm/a"));
        }
        run_dir.set_past_log("vm/a", true).unwrap();
        assert!(run_dir.past_log("vm/a"));
        run_dir.forget("vm/a");
        assert!(run_dir.write_cache("vm/a") && !run_dir.past_log("vm/a"));
        assert!(!dir.path().join("vm").exists());
        run_dir.forget("vm/a");
    }

    #[test]
    fn no_name_leads_out_of_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = RunDir::open(&dir.path().join("run")).unwrap();
        for name in ["../x", "a/../x", "/x", "a", "a/b/c", "", "/", "a/", "A/b", ".", "a/.."] {
            assert_eq!(run_dir.prepare(name).unwrap_err().kind(), ErrorKind::Invalid, "{name}");
            assert!(run_dir.set_write_cache(name, false).is_err(), "{name}");
            assert!(run_dir.write_cache(name));
            run_dir.forget(name);
        }
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(left.len(), 1);
    }

    #[test]
    fn a_directory_whose_sockets_cannot_be_bound_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let room = SOCKET_PATH_BYTES_MAX - dir.path().as_os_str().len() - "//api.sock".len();
        let longest = dir.path().join("d".repeat(room));
        let run_dir = RunDir::open(&longest).unwrap();
        let socket = super::super::api::socket_path(run_dir.path());
        std::os::unix::net::UnixListener::bind(socket).unwrap();
        let error = RunDir::open(&dir.path().join("d".repeat(room + 1))).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let text = error.to_string();
        assert!(text.contains("has 108 bytes, and Linux takes 107") && text.contains("--run-dir"));
    }

    #[test]
    fn a_socket_path_that_cannot_be_bound_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = RunDir::open(dir.path()).unwrap();
        let room = SOCKET_PATH_BYTES_MAX - run_dir.path().as_os_str().len() - "//.sock".len();
        let longest = format!("{}/{}", "m".repeat(room / 2), "v".repeat(room - room / 2));
        std::os::unix::net::UnixListener::bind(run_dir.prepare(&longest).unwrap()).unwrap();
        let error = run_dir.socket(&format!("{longest}v")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
}
