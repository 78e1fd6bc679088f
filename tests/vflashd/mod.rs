//! The daemon as a process, and its API as plain bytes.

#![allow(dead_code, reason = "each test file uses a part of it")]

use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vflash_bench::device::{Device, DeviceOptions};

/// For anything that takes moments.
pub(crate) const SOON: Duration = Duration::from_secs(30);

pub(crate) struct Vflashd {
    pub(crate) folder: tempfile::TempDir,
    child: Option<Child>,
}

impl Vflashd {
    /// A daemon on a run directory of its own.
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    pub(crate) fn start_with(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut daemon = Self { folder, child: None };
        daemon.run(arguments);
        daemon
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vflashd"));
        command.arg("--run-dir").arg(self.run_dir()).stdin(Stdio::null());
        command
    }

    /// Starts the process and waits until it serves what it served before.
    pub(crate) fn run(&mut self, arguments: &[&str]) {
        self.begin(arguments);
        self.await_service();
    }

    /// Starts the process.
    pub(crate) fn begin(&mut self, arguments: &[&str]) {
        let log = std::fs::File::create(self.path("log")).unwrap();
        let child = self.command().args(arguments).stderr(log).spawn().unwrap();
        self.child = Some(child);
    }

    /// It answers, but does not serve everything yet.
    pub(crate) fn is_starting(&self) -> bool {
        let answer = self.send("GET", "/healthz", "");
        answer.is_ok_and(|(_, body)| body.contains("\"state\":\"starting\""))
    }

    pub(crate) fn await_service(&self) {
        let deadline = Instant::now() + SOON;
        while self.is_starting() || self.send("GET", "/healthz", "").is_err() {
            assert!(Instant::now() < deadline, "no API: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// kill -9
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGTERM; the daemon must end well.
    pub(crate) fn stop(&mut self) {
        let mut child = self.child.take().unwrap();
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM).unwrap();
        let status = child.wait().unwrap();
        assert!(status.success(), "{status}: {}", self.log());
    }

    pub(crate) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.run_dir().join("api.sock")).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream
    }

    fn send(&self, method: &str, path: &str, body: &str) -> std::io::Result<(u16, String)> {
        let mut stream = UnixStream::connect(self.run_dir().join("api.sock"))?;
        stream.set_read_timeout(Some(SOON))?;
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
             content-length: {length}\r\n\r\n{body}"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        parse(&answer).ok_or_else(|| std::io::Error::other(answer))
    }

    /// Status and body.
    pub(crate) fn ask(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let text = if body.is_null() { String::new() } else { body.to_string() };
        let (status, body) = self.send(method, path, &text).unwrap();
        (status, serde_json::from_str(&body).unwrap_or(Value::String(body)))
    }

    /// As [`Self::ask`], of a daemon that may end meanwhile.
    pub(crate) fn try_ask(&self, method: &str, path: &str, body: &Value) -> Option<u16> {
        self.send(method, path, &body.to_string()).ok().map(|(status, _)| status)
    }

    /// kill -9, without waiting for the end: [`Self::kill`] does.
    pub(crate) fn kill_now(&self) {
        let pid = nix::unistd::Pid::from_raw(self.pid() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::SIGKILL).unwrap();
    }

    pub(crate) fn get(&self, path: &str) -> Value {
        let (status, body) = self.ask("GET", path, &Value::Null);
        assert_eq!(status, 200, "{path}: {body}");
        body
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Value {
        let (status, body) = self.ask("POST", path, body);
        assert_eq!(status, 200, "{path}: {body}");
        body
    }

    /// The failure of a request that must fail with `status`.
    pub(crate) fn refused(&self, path: &str, body: &Value, status: u16) -> Value {
        let (got, body) = self.ask("POST", path, body);
        assert_eq!(got, status, "{path}: {body}");
        body
    }

    pub(crate) fn apply(&self, manifest: &str) -> Value {
        self.post("/v1/apply", &change(manifest))
    }

    /// Names of all volumes.
    pub(crate) fn volumes(&self) -> Vec<String> {
        let volumes = self.get("/v1/volumes");
        let volumes = volumes["volumes"].as_array().unwrap();
        volumes.iter().map(|volume| volume["name"].as_str().unwrap().to_owned()).collect()
    }

    /// Messages of all events of a kind.
    pub(crate) fn events(&self, kind: &str) -> Vec<String> {
        let events = self.get("/v1/events");
        let events = events["events"].as_array().unwrap();
        let of_kind = events.iter().filter(|event| event["kind"] == kind);
        of_kind.map(|event| format!("{}: {}", event["object"], event["message"])).collect()
    }
}

impl Drop for Vflashd {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
    }
}

/// Asks until the answer is as it should be.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a test needs of the host is not there: it fails, unless whoever runs the tests says that
/// this is known. `cargo xtask test` says it where it cannot be helped, and shows it.
pub(crate) fn left_out(name: &str, needs: &str) {
    let known = std::env::var("VFLASH_LEAVE_OUT").unwrap_or_default();
    let known = known.split(',').any(|other| other == name);
    assert!(known, "this test needs {needs}; VFLASH_LEAVE_OUT={name} leaves it out");
    eprintln!("left out, as VFLASH_LEAVE_OUT says: it needs {needs}");
}

/// A front end of a volume, with one queue.
pub(crate) fn attach(daemon: &Vflashd, volume: &str) -> Device {
    let socket = daemon.run_dir().join(format!("{volume}.sock"));
    Device::open(DeviceOptions { connect_timeout: SOON, ..DeviceOptions::new(&socket) }).unwrap()
}

/// Status and body of an answer.
pub(crate) fn parse(answer: &str) -> Option<(u16, String)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some((status, body.to_owned()))
}

pub(crate) fn change(manifest: &str) -> Value {
    json!({"sources": [{"name": "m.yaml", "text": manifest}]})
}

pub(crate) fn confirmed(manifest: &str, names: &[&str]) -> Value {
    json!({"sources": [{"name": "m.yaml", "text": manifest}], "confirm": names})
}

/// A pool in a file of 256 MiB.
pub(crate) fn pool_manifest(folder: &Path) -> String {
    format!(
        "apiVersion: vflash/v1\nkind: Pool\nmetadata: {{name: p0}}\n\
         spec: {{device: {}, size: 256MiB}}\n",
        folder.join("pool").display()
    )
}

/// A machine `vm` with volumes as `name: flash` pairs, each given in YAML.
pub(crate) fn machine_manifest(vm: &str, volumes: &[(&str, &str)]) -> String {
    let mut text = format!(
        "---\napiVersion: vflash/v1\nkind: VirtualMachine\nmetadata: {{name: {vm}}}\n\
         spec:\n  volumes:\n"
    );
    for (name, flash) in volumes {
        text += &format!("  - name: {name}\n    flash: {{pool: p0, {flash}}}\n");
    }
    text
}
