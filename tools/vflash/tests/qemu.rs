//! Against the real QEMU, stopped before its first instruction: versions, root ports, chardev and
//! device are QEMU's own.

mod daemon;

use daemon::Daemon;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vflash::control::http::Access;

struct Qemu {
    child: Child,
    qmp: PathBuf,
}

impl Qemu {
    fn start(folder: &Path, ports: &[&str]) -> Self {
        let qmp = folder.join("qmp.sock");
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-S", "-display", "none", "-nodefaults", "-smp", "2", "-m", "64M"]);
        command.args(["-machine", "q35,accel=tcg,memory-backend=mem"]);
        command.args(["-object", "memory-backend-memfd,id=mem,size=64M,share=on"]);
        for (index, port) in ports.iter().enumerate() {
            let chassis = index + 1;
            command.arg("-device").arg(format!("pcie-root-port,id={port},chassis={chassis}"));
        }
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", qmp.display()));
        let child = command.stdin(Stdio::null()).spawn().expect("qemu-system-x86_64 is installed");
        let deadline = Instant::now() + Duration::from_secs(60);
        while !qmp.exists() {
            assert!(Instant::now() < deadline, "QEMU opens its QMP socket");
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { child, qmp }
    }

    fn qmp(&self) -> &str {
        self.qmp.to_str().unwrap()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
fn volumes_are_plugged_into_free_root_ports() {
    let daemon = Daemon::start(Access { group: None });
    let manifest = daemon.manifest().display().to_string();
    daemon.says(&["apply", "-f", &manifest]);
    let qemu = Qemu::start(daemon.folder.path(), &["rp1", "rp2"]);
    for volume in ["web-1/scratch", "web-1/root"] {
        daemon.says(&["attach", volume, "--qmp", qemu.qmp()]);
        let shown = daemon.says(&["describe", volume]);
        let process = format!("yes, process {}", qemu.child.id());
        assert!(shown.contains(&process), "{shown}");
    }
    let (_, text) = daemon.fails(&["attach", "web-1/root", "--qmp", qemu.qmp()]);
    assert!(text.contains("attached already"), "{text}");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let more = format!("{text}  - name: third\n    flash: {{pool: p0, size: 8MiB}}\n");
    std::fs::write(&manifest, more).unwrap();
    daemon.says(&["apply", "-f", &manifest]);
    let (_, text) = daemon.fails(&["attach", "web-1/third", "--qmp", qemu.qmp()]);
    assert!(text.contains("pcie-root-port"), "{text}");
    let (_, text) =
        daemon.fails(&["attach", "web-1/third", "--qmp", qemu.qmp(), "--bus", "nowhere"]);
    assert!(text.contains("nowhere"), "{text}");
    // The guest does not run, so it cannot let go.
    let (_, text) =
        daemon.fails(&["detach", "web-1/scratch", "--qmp", qemu.qmp(), "--timeout", "1"]);
    assert!(text.contains("did not let"), "{text}");
}
