//! Child processes that never outlive us, with what they said kept for the error message.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Lines of a log that an error message repeats.
const TAIL_LINES: usize = 40;

/// How often a condition is looked at that nothing announces.
pub const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A running child. It is killed when this is dropped, and by the kernel when its parent thread
/// ends in any other way.
pub struct Process {
    name: String,
    child: std::process::Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its output going to (the end of) the file `log`.
    pub fn spawn(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("open {}", log.display()))?;
        let errors = file.try_clone().with_context(|| format!("open {}", log.display()))?;
        die_with_parent(command.stdin(Stdio::null()).stdout(file).stderr(errors));
        let child = command.spawn().with_context(|| format!("start {command:?}"))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a process id fits an i32"))
    }

    /// Ends it at once, as a crash would, and waits until it is gone.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("kill {}", self.name))?;
        self.child.wait().with_context(|| format!("wait for {}", self.name))?;
        Ok(())
    }

    /// Asks it to end (SIGTERM) and waits for at most `limit`.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        kill(self.pid(), Signal::SIGTERM).with_context(|| format!("stop {}", self.name))?;
        self.wait(limit)
    }

    /// Waits until it has ended by itself.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let ended = until(limit, || {
            self.child.try_wait().with_context(|| format!("wait for {}", self.name))
        });
        ended.with_context(|| format!("{} does not end\n{}", self.name, self.log_tail()))
    }

    /// An error with the log if it has ended.
    pub fn check_running(&mut self) -> Result<()> {
        match self.child.try_wait().with_context(|| format!("wait for {}", self.name))? {
            Some(status) => bail!("{} ended with {status}\n{}", self.name, self.log_tail()),
            None => Ok(()),
        }
    }

    /// The last lines it said.
    pub fn log_tail(&self) -> String {
        tail(&self.log)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing to do.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Runs `command` to its end and gives its standard output; an error carries all that it said.
pub fn output(command: &mut Command) -> Result<String> {
    let result = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {}", Path::new(command.get_program()).display()))?;
    let said = String::from_utf8_lossy(&result.stdout).into_owned();
    if !result.status.success() {
        let errors = String::from_utf8_lossy(&result.stderr);
        bail!("{command:?} ended with {}\n{said}{errors}", result.status);
    }
    Ok(said)
}

/// The directory that cargo puts this workspace's programs into.
pub fn program_dir() -> Result<PathBuf> {
    let own = std::env::current_exe().context("find this program's own file")?;
    let directory = own.parent().context("a program lies in a directory")?;
    // Tests lie one folder deeper than programs.
    let programs = if directory.ends_with("deps") { directory.parent() } else { Some(directory) };
    Ok(programs.context("cargo's target has a directory above deps")?.to_owned())
}

/// Looks again and again until `look` gives something; an error after `limit`.
pub fn until<T>(limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if start.elapsed() > limit {
            bail!("still not so after {} s", limit.as_secs());
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// The last lines of a log file, under its name.
pub fn tail(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(TAIL_LINES)..];
    format!("--- end of {}\n{}\n---", log.display(), last.join("\n"))
}

/// Has the kernel kill the child when the thread that starts it ends.
pub fn die_with_parent(command: &mut Command) -> &mut Command {
    let parent = nix::unistd::getpid();
    let prepare = move || {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // The parent may have died before the line above took effect.
        if nix::unistd::getppid() != parent {
            return Err(std::io::Error::other("the parent is gone"));
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing on
    // its way to success.
    unsafe { command.pre_exec(prepare) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_tells_what_it_said() {
        let error = output(Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"]));
        let text = error.unwrap_err().to_string();
        assert!(text.contains("out\nerr") && text.contains('3'), "{text}");
    }

    #[test]
    fn a_dropped_process_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let process = Process::spawn("sleep", Command::new("sleep").arg("60"), &log).unwrap();
        let pid = process.pid();
        assert!(kill(pid, None).is_ok());
        drop(process);
        assert_eq!(kill(pid, None), Err(nix::errno::Errno::ESRCH));
    }

    #[test]
    fn an_ended_process_is_an_error_with_its_log() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let mut command = Command::new("sh");
        let mut process =
            Process::spawn("shell", command.args(["-c", "echo no such pool; exit 1"]), &log)
                .unwrap();
        process.wait(Duration::from_secs(10)).unwrap();
        let error = process.check_running().unwrap_err().to_string();
        assert!(error.contains("no such pool"), "{error}");
    }
}
