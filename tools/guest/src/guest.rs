//! One virtual machine: QEMU, the agent inside, and the monitor.

use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::initramfs;
use crate::lines::Lines;
use crate::parts::{Parts, work_dir};
use crate::process::{Process, output, program_dir, tail, until};
use crate::qmp::Monitor;
use crate::reply::{READY, Reply};
use crate::scratch::ScratchDir;

/// How long a guest may take from power-on to its agent's first word, in software emulation on a
/// busy machine.
pub const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// How long QEMU may take to open its sockets.
const START_LIMIT: Duration = Duration::from_secs(30);

/// How long a migration may take.
const MIGRATION_LIMIT: Duration = Duration::from_secs(120);

/// How long hardware virtualization gets to show that it works at all.
const PROBE_LIMIT: Duration = Duration::from_secs(15);

/// How QEMU runs the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    Kvm,
    /// Software emulation.
    Tcg,
}

/// What the guest is made of.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    pub vcpus: u32,
    pub memory_mib: u32,
    /// The vhost-user sockets of its disks: the first is `vda`, the next `vdb`, and so on.
    pub disks: Vec<PathBuf>,
    /// Empty slots for disks that are plugged in later, as PCIe ports `port0`, `port1`, ….
    pub spare_ports: u32,
    /// Wait for the state of a guest that migrates here instead of booting.
    pub incoming: bool,
}

impl Default for GuestConfig {
    fn default() -> Self {
        Self { vcpus: 2, memory_mib: 256, disks: vec![], spare_ports: 0, incoming: false }
    }
}

/// A running guest. It ends when this is dropped.
pub struct Guest {
    qemu: Process,
    monitor: Monitor,
    agent: Lines,
    console: PathBuf,
    directory: ScratchDir,
}

impl Guest {
    /// Starts QEMU and waits until the agent inside is ready (or until QEMU listens for a
    /// migration, if it is to wait for one).
    pub fn boot(config: &GuestConfig) -> Result<Self> {
        let mut guest = Self::start(config, accelerator()?)?;
        if !config.incoming {
            guest.wait_ready(BOOT_LIMIT)?;
        }
        Ok(guest)
    }

    /// Sends one command to the agent and gives its answer.
    pub fn command(&mut self, command: &str, limit: Duration) -> Result<Reply> {
        self.agent.send(command)?;
        let answer = self.agent_line(limit).with_context(|| format!("guest: {command}"))?;
        Reply::parse(&answer).with_context(|| format!("guest: {command}"))
    }

    /// Waits for the agent of a guest that boots (again).
    pub fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        let word = self.agent_line(limit).context("the guest does not boot")?;
        if word != READY {
            bail!("the guest's agent says {word:?} instead of {READY:?}");
        }
        Ok(())
    }

    pub fn monitor(&mut self) -> &mut Monitor {
        &mut self.monitor
    }

    /// A second monitor, free for somebody else to connect to.
    pub fn free_monitor(&self) -> PathBuf {
        self.directory.path().join("free.sock")
    }

    /// Resets the machine, as its reset button would, and waits until the guest is up again.
    pub fn reset(&mut self) -> Result<()> {
        // Until now a reset would have meant a panic in the guest, and ended QEMU.
        self.monitor.execute("set-action", json!({ "reboot": "reset" }))?;
        self.monitor.execute("system_reset", json!({}))?;
        self.wait_ready(BOOT_LIMIT)
    }

    /// Moves the running guest to `target`, which was started to wait for it, and stops here.
    pub fn migrate_to(&mut self, target: &Self) -> Result<()> {
        // In one go, with the guest at rest: under emulation QEMU loses memory that is written
        // while it is being carried over, also with its own virtio-blk device.
        let speed = json!({ "max-bandwidth": 2_u64 << 30, "downtime-limit": 2000 });
        self.monitor.execute("migrate-set-parameters", speed)?;
        let socket = format!("unix:{}", migration_socket(target.directory.path()).display());
        self.monitor.execute("migrate", json!({ "uri": socket }))?;
        until(MIGRATION_LIMIT, || {
            let state = self.monitor.execute("query-migrate", json!({}))?;
            match state["status"].as_str() {
                Some("completed") => Ok(Some(())),
                Some("failed" | "cancelled") => bail!("the migration failed: {state}"),
                _ => Ok(None),
            }
        })
        .context("migrate the guest")
    }

    fn agent_line(&mut self, limit: Duration) -> Result<String> {
        let line = self.agent.next(Instant::now() + limit);
        let line = line
            .and_then(|line| line.with_context(|| format!("no answer in {} s", limit.as_secs())));
        line.with_context(|| format!("{}\n{}", self.qemu.log_tail(), tail(&self.console)))
    }

    fn start(config: &GuestConfig, accelerator: Accelerator) -> Result<Self> {
        let image = image()?;
        let directory = ScratchDir::for_sockets()?;
        let path = directory.path();
        let initrd = path.join("initramfs");
        fs::write(&initrd, &image.archive).context("write the initramfs")?;
        let listen = |name: &str| {
            UnixListener::bind(path.join(name)).with_context(|| format!("listen on {name}"))
        };
        let (agent, monitor) = (listen("agent.sock")?, listen("monitor.sock")?);
        let mut command = Command::new("qemu-system-x86_64");
        command.args(machine(config, accelerator)).args(channels(path));
        command.arg("-kernel").arg(&image.kernel).arg("-initrd").arg(&initrd);
        command.args(["-append", "quiet panic=-1 mitigations=off console=ttyS0", "-no-reboot"]);
        command.args(devices(config, &image.reconnect));
        if config.incoming {
            command.arg("-incoming");
            command.arg(format!("unix:{}", migration_socket(path).display()));
        }
        let mut qemu = Process::spawn("QEMU", &mut command, &path.join("qemu.log"))?;
        let mut accept =
            |peer, listener| Lines::accept(peer, listener, START_LIMIT, || qemu.check_running());
        let agent = accept("the guest's agent", &agent)?;
        let monitor = Monitor::new(accept("QEMU's monitor", &monitor)?)?;
        Ok(Self { qemu, monitor, agent, console: path.join("console.log"), directory })
    }
}

/// What every guest of this process boots from, found out once.
struct Image {
    archive: Vec<u8>,
    kernel: PathBuf,
    /// The option by which this QEMU reconnects to a back-end.
    reconnect: String,
}

fn image() -> Result<&'static Image> {
    static IMAGE: OnceLock<std::result::Result<Image, String>> = OnceLock::new();
    let build = || -> Result<Image> {
        let parts = Parts::gather(&|note| eprintln!("{note}"))?;
        let agent = program_dir()?.join("vflash-guest");
        let archive = initramfs::build(&parts, &agent).context("build the guest's initramfs")?;
        let version = output(Command::new("qemu-system-x86_64").arg("--version"))?;
        let reconnect = reconnect_option(&version)?.to_owned();
        Ok(Image { archive, kernel: parts.kernel.image, reconnect })
    };
    let image = IMAGE.get_or_init(|| build().map_err(|error| format!("{error:#}")));
    image.as_ref().map_err(|error| anyhow::anyhow!("{error}"))
}

fn machine(config: &GuestConfig, accelerator: Accelerator) -> Vec<String> {
    let (accel, cpu) = match accelerator {
        Accelerator::Kvm => ("kvm", "host"),
        Accelerator::Tcg => ("tcg", "max"),
    };
    let memory = config.memory_mib;
    [
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-machine",
        &format!("q35,accel={accel},memory-backend=memory"),
        "-cpu",
        cpu,
        "-smp",
        &config.vcpus.to_string(),
        "-m",
        &format!("{memory}M"),
        // A back-end can only serve memory that it can share.
        "-object",
        &format!("memory-backend-memfd,id=memory,size={memory}M,share=on"),
    ]
    .map(str::to_owned)
    .to_vec()
}

/// The console's log, the agent's serial port and the two monitors.
fn channels(directory: &Path) -> Vec<String> {
    let socket = |id: &str, options: &str| {
        let path = directory.join(format!("{id}.sock"));
        ["-chardev".to_owned(), format!("socket,id={id},path={}{options}", path.display())]
    };
    let monitor = |id: &str| ["-mon".to_owned(), format!("chardev={id},mode=control")];
    let serial = |backend: String| ["-serial".to_owned(), backend];
    [
        serial(format!("file:{}", directory.join("console.log").display())),
        socket("agent", ""),
        serial("chardev:agent".to_owned()),
        socket("free", ",server=on,wait=off"),
        monitor("free"),
        socket("monitor", ""),
        monitor("monitor"),
    ]
    .concat()
}

fn devices(config: &GuestConfig, reconnect: &str) -> Vec<String> {
    let mut arguments = Vec::new();
    for (index, disk) in config.disks.iter().enumerate() {
        let socket = disk.display();
        arguments.extend([
            "-chardev".to_owned(),
            format!("socket,id=disk{index},path={socket},{reconnect}"),
            "-device".to_owned(),
            format!("vhost-user-blk-pci,id=blk{index},chardev=disk{index}"),
        ]);
    }
    for port in 0..config.spare_ports {
        arguments.push("-device".to_owned());
        arguments.push(format!("pcie-root-port,id=port{port},chassis={0},slot={0}", port + 1));
    }
    arguments
}

fn migration_socket(directory: &Path) -> PathBuf {
    directory.join("migration.sock")
}

/// QEMU counts the pause before it reconnects in whole seconds until 9.1, in milliseconds since.
fn reconnect_option(version: &str) -> Result<&'static str> {
    let number = version.split_whitespace().nth(3).unwrap_or_default();
    let mut parts = number.split('.').map(str::parse::<u32>);
    match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (9, 2) => Ok("reconnect-ms=100"),
        (Some(Ok(_)), Some(Ok(_))) => Ok("reconnect=1"),
        _ => bail!("cannot tell QEMU's version from {version:?}"),
    }
}

/// KVM if a guest boots with it here, else emulation; the answer is kept until the host reboots.
pub fn accelerator() -> Result<Accelerator> {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("read boot_id")?;
    let kept = work_dir()?.join("accelerator");
    let answers = [("kvm", Accelerator::Kvm), ("tcg", Accelerator::Tcg)];
    let line = |name: &str| format!("{name} {boot_id}");
    let known = fs::read_to_string(&kept).unwrap_or_default();
    if let Some((_, answer)) = answers.iter().find(|(name, _)| line(name) == known) {
        return Ok(*answer);
    }
    let device = File::options().read(true).write(true).open("/dev/kvm");
    let works = device.is_ok()
        && Guest::start(&GuestConfig::default(), Accelerator::Kvm)
            .and_then(|mut guest| guest.wait_ready(PROBE_LIMIT))
            .is_ok();
    let (name, answer) = answers[usize::from(!works)];
    fs::write(&kept, line(name)).with_context(|| format!("write {}", kept.display()))?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reconnect_option_follows_the_version() {
        let option = |number: &str| reconnect_option(&format!("QEMU emulator version {number}"));
        assert_eq!(option("7.2.22 (Debian 1:7.2)").unwrap(), "reconnect=1");
        assert_eq!(option("9.1.0").unwrap(), "reconnect=1");
        assert_eq!(option("9.2.0").unwrap(), "reconnect-ms=100");
        assert_eq!(option("10.0.2 (Debian 1:10.0.2)").unwrap(), "reconnect-ms=100");
        assert!(option("unknown").is_err());
    }
}
