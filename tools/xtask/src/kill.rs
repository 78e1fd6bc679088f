//! SIGKILL to the daemon while verified requests are under way: nothing may be lost, and the
//! virtual machine may notice no more than a pause.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vflash_guest::daemon::{Daemon, command_line};
use vflash_guest::guest::{Guest, GuestConfig};
use vflash_guest::process::{output, program_dir, until};
use vflash_guest::reply::Reply;

use crate::scratch::Scratch;

/// Requests that the guest keeps under way.
pub(crate) const DEPTH: u64 = 16;

/// Requests verified in all for each kill, at the least.
const REQUESTS_PER_KILL: u64 = 2_500;

/// QEMU looks for a lost back-end once a second.
const STALL_MS_MAX: u64 = 2_000;

/// How long the guest may take for the requests between two kills.
pub(crate) const CYCLE_LIMIT: Duration = Duration::from_secs(60);

/// How long one command of the guest's agent may take; the last one reads everything back.
pub(crate) const COMMAND_LIMIT: Duration = Duration::from_secs(180);

const MANIFEST: &str = "\
apiVersion: vflash/v1
kind: Pool
metadata: {name: kill}
spec: {device: kill.pool, size: 1GiB}
---
apiVersion: vflash/v1
kind: VirtualMachine
metadata: {name: victim}
spec:
  volumes:
  - name: disk
    flash: {pool: kill, size: 256MiB}
";

/// Kills the daemon `cycles` times under a QEMU guest; says what the guest saw.
pub(crate) fn under_a_guest(cycles: u32) -> Result<String> {
    let scratch = Scratch::new()?;
    let mut daemon = daemon_with_pool(&scratch)?;
    let disks = vec![daemon.socket("victim/disk")];
    let mut guest = Guest::boot(&GuestConfig { disks, ..GuestConfig::default() })?;
    let load = format!("load-start vda bytes={} depth={DEPTH} block=4096 run=1", 64 << 20);
    guest.command(&load, COMMAND_LIMIT)?;
    let (requests, stall_ms) = kill_under_load(&mut daemon, &mut guest, cycles)?;
    daemon.stop()?;
    Ok(format!(
        "{cycles} kills at depth {DEPTH}: {requests} requests, 0 errors, 0 lost, longest stall \
         {stall_ms} ms"
    ))
}

/// Kills the daemon `cycles` times while the guest's load runs, and ends the load: how many
/// requests it verified, and the longest stall in ms. Anything lost, failed or too slow is an
/// error.
pub(crate) fn kill_under_load(
    daemon: &mut Daemon,
    guest: &mut Guest,
    cycles: u32,
) -> Result<(u64, u64)> {
    for cycle in 1..=cycles {
        wait_for(guest, u64::from(cycle) * REQUESTS_PER_KILL)?;
        daemon.crash_and_restart().with_context(|| format!("kill {cycle}"))?;
        if cycle % 10 == 0 {
            println!("  {cycle} kills: {}", status(guest)?.line());
        }
    }
    wait_for(guest, u64::from(cycles + 1) * REQUESTS_PER_KILL)?;
    let end = guest.command("load-stop", COMMAND_LIMIT)?;
    let kernel = guest.command("errors", COMMAND_LIMIT)?;
    ensure!(kernel.number("count")? == 0, "the guest's kernel complains: {}", kernel.line());
    for key in ["errors", "lost"] {
        ensure!(end.number(key)? == 0, "{key} in the guest: {}", end.line());
    }
    let stall_ms = end.number("stall_ms")?;
    ensure!(stall_ms <= STALL_MS_MAX, "a request took {stall_ms} ms, more than {STALL_MS_MAX}");
    Ok((end.number("requests")?, stall_ms))
}

/// Kills the daemon `cycles` times under the load client, at many depths and numbers of queues.
pub(crate) fn under_the_client(cycles: u32) -> Result<String> {
    let scratch = Scratch::new()?;
    kill_the_server_of(daemon_with_pool(&scratch)?, &scratch, cycles)
}

/// Leaves the daemon to the client, which kills and restarts it.
pub(crate) fn kill_the_server_of(daemon: Daemon, scratch: &Scratch, cycles: u32) -> Result<String> {
    let socket = daemon.socket("victim/disk");
    // From here on the client starts and kills it.
    daemon.stop()?;
    let mut command = std::process::Command::new(program_dir()?.join("vflash-bench"));
    command.args(["kill", "--cycles", &cycles.to_string(), "--socket"]).arg(socket);
    command.arg("--").args(command_line(scratch.run.path())?);
    let printed = output(&mut command)?;
    Ok(printed.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn daemon_with_pool(scratch: &Scratch) -> Result<Daemon> {
    let manifest = scratch.data.path().join("kill.yaml");
    std::fs::write(&manifest, MANIFEST).context("write a manifest")?;
    let daemon = Daemon::start(scratch.run.path())?;
    apply(&daemon, &manifest)?;
    Ok(daemon)
}

pub(crate) fn apply(daemon: &Daemon, manifest: &Path) -> Result<()> {
    let path = manifest.to_str().context("a path in UTF-8")?;
    daemon.vflash(&["apply", "-f", path, "--yes"]).map(|_| ())
}

pub(crate) fn status(guest: &mut Guest) -> Result<Reply> {
    guest.command("load-status", COMMAND_LIMIT)
}

/// Waits until the guest has verified `requests` since the load began.
pub(crate) fn wait_for(guest: &mut Guest, requests: u64) -> Result<()> {
    let reached =
        until(CYCLE_LIMIT, || Ok((status(guest)?.number("requests")? >= requests).then_some(())));
    reached.with_context(|| format!("the guest does not get to {requests} requests"))
}
