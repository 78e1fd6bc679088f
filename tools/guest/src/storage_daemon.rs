//! QEMU's own vhost-user-blk back-end, serving one file: the peer that the harness is tested with.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process::{Process, until};

const START_LIMIT: Duration = Duration::from_secs(20);

/// A running `qemu-storage-daemon`.
pub struct StorageDaemon {
    process: Process,
    directory: PathBuf,
    file: PathBuf,
}

impl StorageDaemon {
    /// Serves `file`, with its socket and log in `directory`.
    pub fn start(directory: &Path, file: &Path) -> Result<Self> {
        let process = spawn(directory, file)?;
        Ok(Self { process, directory: directory.to_owned(), file: file.to_owned() })
    }

    pub fn socket(&self) -> PathBuf {
        socket(&self.directory)
    }

    /// Ends it as a crash would and starts it again.
    pub fn crash_and_restart(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process = spawn(&self.directory, &self.file)?;
        Ok(())
    }
}

fn socket(directory: &Path) -> PathBuf {
    directory.join("storage-daemon.sock")
}

fn spawn(directory: &Path, file: &Path) -> Result<Process> {
    let (socket, file) = (socket(directory), file.display());
    let mut command = Command::new("qemu-storage-daemon");
    command.args(["--blockdev", &format!("file,node-name=disk,filename={file},discard=unmap")]);
    let export = format!(
        "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,\
         addr.type=unix,addr.path={}",
        socket.display()
    );
    command.args(["--export", &export]);
    drop(std::fs::remove_file(&socket));
    let mut process =
        Process::spawn("qemu-storage-daemon", &mut command, &directory.join("storage-daemon.log"))?;
    let listening = until(START_LIMIT, || {
        process.check_running()?;
        Ok(socket.exists().then_some(()))
    });
    listening.context("qemu-storage-daemon does not listen")?;
    Ok(process)
}
