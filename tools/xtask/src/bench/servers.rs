//! Servers under measurement, and fio.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use vflash_guest::process::{die_with_parent, output};

use super::pages::Pages;
use super::place::Place;

const SERVER_CPU: &str = "1";
const CLIENT_CPU: &str = "0";

/// A server, killed when dropped.
pub(super) struct Server(pub(super) Child);

impl Server {
    /// Asks it to end, and waits until it has.
    pub(super) fn stop(mut self) -> Result<()> {
        let process = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGTERM)?;
        let status = self.0.wait()?;
        ensure!(status.success(), "the server ended with {status}");
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(super) fn text(path: &Path) -> String {
    path.display().to_string()
}

pub(super) fn spawn(command: &mut Command) -> Result<Server> {
    let mut pinned = Command::new("taskset");
    pinned.args(["-c", SERVER_CPU]).arg(command.get_program()).args(command.get_args());
    let child = die_with_parent(&mut pinned).stdin(Stdio::null()).spawn();
    Ok(Server(child.with_context(|| format!("start {command:?}"))?))
}

pub(super) fn start_storage_daemon(socket: &Path, disk: &str) -> Result<Server> {
    let export = format!(
        "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},\
         writable=on,num-queues=2",
        text(socket)
    );
    let mut command = Command::new("qemu-storage-daemon");
    command.args(["--blockdev", &format!("{disk},node-name=disk"), "--export", &export]);
    let mut server = spawn(&mut command)?;
    wait_for(socket, &mut server)?;
    Ok(server)
}

/// The vhost-user socket of a volume of [`start_vflashd`]'s daemon.
pub(super) fn volume_socket(run: &Path, volume: &str) -> PathBuf {
    run.join("vflash").join(format!("{volume}.sock"))
}

/// vflashd with one reactor, once it serves these volumes of the manifest.
pub(super) fn start_vflashd(run: &Path, manifest: &Path, volumes: &[&str]) -> Result<Server> {
    for volume in volumes {
        // Left by the one before.
        std::fs::remove_file(volume_socket(run, volume)).ok();
    }
    let mut command = Command::new(crate::cargo::release_binary("vflashd"));
    command.arg("--run-dir").arg(run.join("vflash")).arg("--file").arg(manifest);
    command.args(["--reactors", "1", "--log-level", "warn"]);
    let mut server = spawn(&mut command)?;
    for volume in volumes {
        wait_for(&volume_socket(run, volume), &mut server)?;
    }
    Ok(server)
}

/// What the command line prints when asked about that daemon.
pub(super) fn vflash(run: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(crate::cargo::release_binary("vflash"));
    output(command.arg("--run-dir").arg(run.join("vflash")).args(arguments))
}

/// A pool in a file of which every byte has been written.
pub(super) fn create_written_pool(run: &Path, pool: &Path, size: &str) -> Result<()> {
    let pool = text(pool);
    let command = ["pool", "create", "drive", &pool, "--size", size, "--preallocate", "written"];
    vflash(run, &command).map(|_| ())
}

pub(super) fn wait_for(socket: &Path, server: &mut Server) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !socket.exists() {
        if let Some(status) = server.0.try_wait()? {
            bail!("the server of {} ended with {status}", socket.display());
        }
        ensure!(Instant::now() < deadline, "no {} within a minute", socket.display());
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

pub(super) fn fio(place: &Place, pattern: &str, pages: Pages, options: &[&str]) -> Result<Value> {
    let mut command = Command::new("fio");
    command.args(["--name=raw", "--ioengine=io_uring", "--direct=1", "--output-format=json"]);
    // One job runs on the client's core, two on both.
    command.args(["--cpus_allowed_policy=split", "--cpus_allowed=0,1"]);
    if pages == Pages::Huge {
        command.arg("--iomem=shmhuge");
    }
    command.args(place.fio_options()).arg(format!("--rw={pattern}"));
    command.args(options).stderr(Stdio::inherit());
    let output = die_with_parent(&mut command).output().context("start fio")?;
    ensure!(output.status.success(), "fio --rw={pattern} ended with {}", output.status);
    serde_json::from_slice(&output.stdout).context("read what fio printed")
}

/// Runs the load client and gives what it printed, also if it was not content.
pub(super) fn client(arguments: &[&str]) -> Result<Value> {
    let mut command = Command::new("taskset");
    command.args(["-c", CLIENT_CPU]).arg(crate::cargo::release_binary("vflash-bench"));
    command.args(arguments).stderr(Stdio::inherit());
    let output = die_with_parent(&mut command).output()?;
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("vflash-bench {}: {}", arguments.join(" "), output.status))
}
