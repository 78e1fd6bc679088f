//! `cargo xtask demo`: the whole of vflash in one run, each step checked.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vflash_guest::daemon::Daemon;
use vflash_guest::guest::{Accelerator, Guest, GuestConfig, accelerator};
use vflash_guest::parts::workspace_root;
use vflash_guest::process::until;

use crate::cargo::{cargo, run as run_command};
use crate::kill::apply;
use crate::packages;
use crate::scratch::Scratch;
use crate::steps::Steps;

/// How long the guest may take for one command, in software emulation on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// Requests that the guest verifies between two events.
const REQUESTS: u64 = 2_000;

/// One of the volumes that `manifests/demo.yaml` makes.
const VOLUME: &str = "demo/data";

const LOAD_BYTES: u64 = 32 << 20;
const DEPTH: u64 = 16;

/// A request waits for QEMU to look for the daemon, which it does once a second.
const STALL_MS_MAX: u64 = 2_000;

/// Runs the demonstration; whether every step passed.
pub(crate) fn run() -> Result<bool> {
    let mut steps = Steps::new();
    // Each step needs all steps before it: the first failure ends the run.
    let finished = all_steps(&mut steps).is_some();
    steps.print_table();
    println!("\n{}", if finished { "The demo passed." } else { "The demo FAILED." });
    Ok(finished)
}

fn all_steps(steps: &mut Steps) -> Option<()> {
    steps.run("packages", || Ok(((), packages::need(packages::GUEST)?)))?;
    steps.run("build", || {
        Ok((run_command(&mut cargo(&["build", "--workspace"]))?, "built".into()))
    })?;
    let mut stage = steps.run("pool and volume", Stage::set)?;
    steps.run("boot a guest", || stage.boot())?;
    steps.run("virtual flash", || stage.look())?;
    steps.run("mkfs.ext4, mount", || stage.make_file_system())?;
    steps.run("verified I/O", || stage.start_load())?;
    steps.run("live resize", || stage.resize())?;
    steps.run("kill -9 vflashd", || stage.kill())?;
    steps.run("verify all data", || stage.verify())?;
    steps.run("fsck", || stage.check_file_system())?;
    steps.run("use the new space", || stage.use_new_space())?;
    steps.run("clean stop", || stage.stop())
}

/// Daemon, volume and guest of the demonstration. Fields end in this order.
struct Stage {
    guest: Option<Guest>,
    daemon: Option<Daemon>,
    size_bytes: u64,
    _scratch: Scratch,
}

type Outcome = Result<((), String)>;

impl Stage {
    fn set() -> Result<(Self, String)> {
        let scratch = Scratch::new()?;
        // The manifest names the pool's file relative to itself: a copy keeps runs apart.
        let manifest = scratch.data.path().join("manifests/demo.yaml");
        for directory in ["manifests", "target"] {
            std::fs::create_dir(scratch.data.path().join(directory)).context("create a folder")?;
        }
        std::fs::copy(workspace_root().join("manifests/demo.yaml"), &manifest)
            .context("copy manifests/demo.yaml")?;
        let daemon = Daemon::start(scratch.run.path())?;
        apply(&daemon, &manifest)?;
        let volume = daemon.query(&["describe", VOLUME])?;
        let size_bytes = volume["sizeBytes"].as_u64().context("a volume has a size")?;
        let result = format!("{VOLUME}, {} MiB", size_bytes >> 20);
        Ok((Self { guest: None, daemon: Some(daemon), size_bytes, _scratch: scratch }, result))
    }

    fn daemon(&mut self) -> &mut Daemon {
        self.daemon.as_mut().expect("it runs until the last step")
    }

    fn ask(&mut self, command: &str) -> Result<vflash_guest::reply::Reply> {
        self.guest.as_mut().expect("it was booted").command(command, LIMIT)
    }

    fn boot(&mut self) -> Outcome {
        let disks = vec![self.daemon().socket(VOLUME)];
        self.guest = Some(Guest::boot(&GuestConfig { disks, ..GuestConfig::default() })?);
        let how = match accelerator()? {
            Accelerator::Kvm => "with KVM",
            Accelerator::Tcg => "in software emulation, since KVM does not work here",
        };
        Ok(((), format!("Debian, {how}")))
    }

    fn look(&mut self) -> Outcome {
        self.ask("udev")?;
        let info = self.ask("info vda")?;
        let serial = info.text("serial")?;
        ensure!(info.number("size")? == self.size_bytes, "wrong size: {}", info.line());
        ensure!(serial.starts_with("vflash-"), "wrong serial: {}", info.line());
        ensure!(info.text("rotational")? == "0", "not taken for flash: {}", info.line());
        Ok(((), format!("/dev/vda, serial {serial}, not rotational, discard and flush")))
    }

    fn make_file_system(&mut self) -> Outcome {
        self.ask("mkfs vda")?;
        self.ask("mount vda")?;
        Ok(((), "ext4".into()))
    }

    fn start_load(&mut self) -> Outcome {
        self.ask(&format!(
            "load-start /mnt/data bytes={LOAD_BYTES} depth={DEPTH} block=4096 run=1"
        ))?;
        let requests = self.progress()?;
        Ok(((), format!("{requests} requests at depth {DEPTH}, and going on")))
    }

    fn resize(&mut self) -> Outcome {
        let size_bytes = self.size_bytes + (256 << 20);
        let size = format!("{}MiB", size_bytes >> 20);
        self.daemon().vflash(&["resize", VOLUME, &size])?;
        let seen = until(Duration::from_secs(10), || {
            let seen = self.ask("info vda")?.number("size")?;
            Ok((seen == size_bytes).then_some(()))
        });
        seen.with_context(|| format!("the guest does not see {size}"))?;
        self.size_bytes = size_bytes;
        self.progress()?;
        Ok(((), format!("the guest sees {size}")))
    }

    fn kill(&mut self) -> Outcome {
        self.daemon().crash_and_restart()?;
        self.progress()?;
        let stall_ms = self.ask("load-status")?.number("stall_ms")?;
        Ok(((), format!("restarted; the guest waited {stall_ms} ms and went on")))
    }

    fn verify(&mut self) -> Outcome {
        let end = self.ask("load-stop")?;
        let kernel = self.ask("errors")?;
        ensure!(end.number("errors")? == 0, "the guest saw errors: {}", end.line());
        ensure!(end.number("lost")? == 0, "data was lost: {}", end.line());
        ensure!(end.number("stall_ms")? <= STALL_MS_MAX, "the guest waited long: {}", end.line());
        ensure!(kernel.number("count")? == 0, "the guest's kernel complains: {}", kernel.line());
        let (requests, blocks) = (end.number("requests")?, end.number("verified")?);
        Ok(((), format!("{requests} requests, {blocks} blocks read back, 0 errors, 0 lost")))
    }

    fn check_file_system(&mut self) -> Outcome {
        self.ask("umount /mnt")?;
        self.ask("fsck vda")?;
        Ok(((), "clean".into()))
    }

    fn use_new_space(&mut self) -> Outcome {
        let bytes = 4 << 20;
        let range = format!("vda offset={} bytes={bytes} run=2", self.size_bytes - bytes);
        self.ask(&format!("fill {range}"))?;
        let wrong = self.ask(&format!("check {range}"))?;
        ensure!(wrong.number("wrong")? == 0, "the new end reads wrong: {}", wrong.line());
        Ok(((), "written and read back at the new end".into()))
    }

    fn stop(&mut self) -> Outcome {
        self.guest = None;
        self.daemon.take().expect("it ran until now").stop()?;
        Ok(((), "vflashd ended by SIGTERM".into()))
    }

    /// Waits until the guest has verified [`REQUESTS`] more.
    fn progress(&mut self) -> Result<u64> {
        let before = self.ask("load-status")?.number("requests")?;
        until(LIMIT, || {
            let now = self.ask("load-status")?.number("requests")?;
            Ok((now >= before + REQUESTS).then_some(now))
        })
        .context("the guest's load stands still")
    }
}
