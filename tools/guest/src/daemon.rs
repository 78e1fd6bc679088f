//! `vflashd` under test, and `vflash` against it, both as this workspace built them.

use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process::{Process, output, program_dir, until};

/// How long the daemon may take until it says that it serves.
const START_LIMIT: Duration = Duration::from_secs(30);

/// How long a clean stop may take.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// A running daemon. It is killed when this is dropped.
pub struct Daemon {
    process: Process,
    run_dir: PathBuf,
}

impl Daemon {
    /// Starts `vflashd` on `run_dir` and waits until it serves what it served there before.
    pub fn start(run_dir: &Path) -> Result<Self> {
        let process = spawn(run_dir)?;
        Ok(Self { process, run_dir: run_dir.to_owned() })
    }

    /// Ends it by SIGKILL, in the middle of whatever it does, and starts it again.
    pub fn crash_and_restart(&mut self) -> Result<()> {
        self.crash_and(|| Ok(()))
    }

    /// As [`Daemon::crash_and_restart`], with something done while no daemon runs.
    pub fn crash_and(&mut self, between: impl FnOnce() -> Result<()>) -> Result<()> {
        self.process.kill()?;
        between()?;
        self.process = spawn(&self.run_dir)?;
        Ok(())
    }

    /// Ends it the way that systemd does.
    pub fn stop(mut self) -> Result<()> {
        let status = self.process.terminate(STOP_LIMIT)?;
        anyhow::ensure!(
            status.success(),
            "vflashd stops with {status}\n{}",
            self.process.log_tail()
        );
        Ok(())
    }

    /// Runs `vflash` with `arguments` and gives what it prints.
    pub fn vflash(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(self.vflash_program()?);
        let printed = output(command.arg("--run-dir").arg(&self.run_dir).args(arguments));
        printed.with_context(|| self.process.log_tail())
    }

    /// The command line's program.
    pub fn vflash_program(&self) -> Result<PathBuf> {
        Ok(program_dir()?.join("vflash"))
    }

    /// As [`Daemon::vflash`], with the answer as JSON.
    pub fn query(&self, arguments: &[&str]) -> Result<Value> {
        let printed = self.vflash(&[arguments, &["--output", "json"]].concat())?;
        serde_json::from_str(&printed).with_context(|| format!("vflash prints {printed}"))
    }

    /// Where a VMM attaches the volume `name`, which is `VM/VOLUME`.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.run_dir.join(format!("{name}.sock"))
    }
}

/// The command line of a daemon on `run_dir`.
pub fn command_line(run_dir: &Path) -> Result<Vec<String>> {
    let program = program_dir()?.join("vflashd");
    Ok(vec![program.display().to_string(), "--run-dir".to_owned(), run_dir.display().to_string()])
}

fn spawn(run_dir: &Path) -> Result<Process> {
    std::fs::create_dir_all(run_dir).with_context(|| format!("create {}", run_dir.display()))?;
    // The daemon tells by systemd's protocol when its sockets are up.
    let notify = run_dir.join("notify.sock");
    drop(std::fs::remove_file(&notify));
    let told = UnixDatagram::bind(&notify).context("listen for the daemon's readiness")?;
    told.set_nonblocking(true).context("make a socket non-blocking")?;
    let line = command_line(run_dir)?;
    let mut command = Command::new(&line[0]);
    command.args(&line[1..]).env("NOTIFY_SOCKET", &notify);
    let mut process = Process::spawn("vflashd", &mut command, &run_dir.join("vflashd.log"))?;
    let ready = until(START_LIMIT, || {
        let mut message = [0; 1024];
        match told.recv(&mut message) {
            Ok(length) => {
                let text = String::from_utf8_lossy(&message[..length]);
                Ok(text.lines().any(|line| line == "READY=1").then_some(()))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                process.check_running().map(|()| None)
            }
            Err(error) => Err(error).context("listen for the daemon's readiness"),
        }
    });
    ready.with_context(|| format!("vflashd does not start\n{}", process.log_tail()))?;
    Ok(process)
}
