//! Against the real QEMU, stopped before its first instruction: versions, root ports, chardev and
//! device are QEMU's own.

mod daemon;

use daemon::Daemon;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vflash::control::http::Access;

const SOON: Duration = Duration::from_secs(60);

struct Qemu {
    child: Child,
    qmp: PathBuf,
}

impl Qemu {
    /// One with shared memory and root ports.
    fn start(folder: &Path, ports: &[&str]) -> Self {
        let mut arguments = vec!["-machine".to_owned(), "memory-backend=mem".to_owned()];
        arguments
            .extend(["-object", "memory-backend-memfd,id=mem,size=64M,share=on"].map(Into::into));
        for (index, port) in ports.iter().enumerate() {
            let chassis = index + 1;
            arguments.push("-device".to_owned());
            arguments.push(format!("pcie-root-port,id={port},chassis={chassis}"));
        }
        Self::start_with(folder, arguments.iter().map(String::as_str).chain(["-S"]))
    }

    /// One that has come as far as to answer.
    fn start_with<'a>(folder: &Path, arguments: impl IntoIterator<Item = &'a str>) -> Self {
        let qmp = folder.join("qmp.sock");
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-machine", "q35,accel=tcg", "-display", "none", "-nodefaults"]);
        command.args(["-smp", "2", "-m", "64M"]).args(arguments);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", qmp.display()));
        let child = command.stdin(Stdio::null()).spawn().expect("qemu-system-x86_64 is installed");
        let qemu = Self { child, qmp };
        let deadline = Instant::now() + SOON;
        while !qemu.qmp.exists() {
            assert!(Instant::now() < deadline, "QEMU opens its QMP socket");
            std::thread::sleep(Duration::from_millis(10));
        }
        // It greets before it has its devices, and obeys when it has them.
        let mut stream = UnixStream::connect(&qemu.qmp).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(b"{\"execute\": \"qmp_capabilities\"}\n").unwrap();
        let mut answers = BufReader::new(stream).lines().map_while(|line| line.ok());
        assert!(answers.any(|line| line.contains("return")), "QEMU takes all its devices");
        qemu
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

#[test]
fn a_machine_whose_memory_is_not_shared_is_left_as_it_was() {
    let daemon = Daemon::start(Access { group: None });
    let manifest = daemon.manifest().display().to_string();
    daemon.says(&["apply", "-f", &manifest]);
    let qemu = Qemu::start_with(daemon.folder.path(), ["-S"]);
    let (status, text) = daemon.fails(&["attach", "web-1/root", "--qmp", qemu.qmp()]);
    assert!(status == 1 && text.contains("memory is not shared"), "{text}");
    assert!(text.contains("memory-backend-memfd"), "{text}");
    let shown = daemon.says(&["describe", "web-1/root"]);
    assert!(!shown.contains("yes, process"), "{shown}");
}

/// A VM with more CPUs than the volume has queues is started by the printed lines as well.
#[test]
fn printed_lines_start_a_machine_of_more_cpus_than_queues() {
    let daemon = Daemon::start(Access { group: None });
    let manifest = daemon.manifest();
    let mut text = std::fs::read_to_string(&manifest).unwrap();
    text.push_str("    queues: 1\n");
    std::fs::write(&manifest, text).unwrap();
    daemon.says(&["apply", "-f", &manifest.display().to_string()]);
    let printed = daemon.says(&["attach", "web-1/root", "--print", "qemu"]);
    let folder = daemon.folder.path().canonicalize().unwrap();
    let printed = printed.replace("DIR", folder.to_str().unwrap()).replace("SIZE", "64M");
    let lines = printed.lines().filter(|line| !line.starts_with('#'));
    let words = lines.flat_map(|line| line.trim_end_matches('\\').split_whitespace());
    let qemu = Qemu::start_with(daemon.folder.path(), words.chain(["-smp", "4", "-S"]));
    let shown = daemon.says(&["describe", "web-1/root"]);
    assert!(shown.contains(&format!("yes, process {}", qemu.child.id())), "{shown}");
}

/// Its firmware reads from the disk, and would wait for ever without a word.
#[test]
fn a_machine_whose_memory_is_not_shared_is_told_of() {
    let daemon = Daemon::start(Access { group: None });
    let manifest = daemon.manifest().display().to_string();
    daemon.says(&["apply", "-f", &manifest]);
    let socket = daemon.path("run/web-1/root.sock");
    let _qemu = Qemu::start_with(
        daemon.folder.path(),
        [
            "-object",
            "memory-backend-ram,id=mem,size=64M,share=off",
            "-machine",
            "memory-backend=mem",
            "-chardev",
            &format!("socket,id=c,path={},reconnect=1", socket.display()),
            "-device",
            "vhost-user-blk-pci,chardev=c,bootindex=1",
        ],
    );
    let deadline = Instant::now() + SOON;
    while !daemon.says(&["status"]).contains("volume web-1/root: its virtual machine shares no") {
        assert!(Instant::now() < deadline, "{}", daemon.says(&["describe", "web-1/root"]));
        std::thread::sleep(Duration::from_millis(50));
    }
    let shown = daemon.says(&["describe", "web-1/root"]);
    assert!(shown.contains("vflash attach web-1/root --print"), "{shown}");
}
