//! The daemon's engine and API in this process, and the command line as a process.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use vflash::control::api::socket_path;
use vflash::control::engine::Engine;
use vflash::control::http::{Access, bind, serve};
use vflash::control::rundir::RunDir;
use vflash::vhost::ServerOptions;

pub(crate) struct Daemon {
    pub(crate) folder: tempfile::TempDir,
    engine: Arc<Engine>,
}

impl Daemon {
    pub(crate) fn start(access: Access) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = folder.path().join("run");
        let options = ServerOptions { reactors: 1, cpus: Vec::new() };
        let engine = Engine::start(RunDir::open(&run_dir).unwrap(), &options).unwrap();
        let engine = Arc::new(engine);
        let served = engine.clone();
        let (ready, bound) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = bind(&socket_path(&run_dir), access).unwrap();
                ready.send(()).unwrap();
                serve(listener, served, access).await;
            });
        });
        bound.recv().unwrap();
        engine.set_restored();
        Self { folder, engine }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Pool `p0` of 256 MiB in a file, machine `web-1` with two volumes.
    pub(crate) fn manifest(&self) -> PathBuf {
        let text = format!(
            "apiVersion: vflash/v1\nkind: Pool\nmetadata: {{name: p0}}\n\
             spec: {{device: {}, size: 256MiB}}\n---\n\
             apiVersion: vflash/v1\nkind: VirtualMachine\nmetadata: {{name: web-1}}\n\
             spec:\n  volumes:\n  - name: scratch\n    \
             flash: {{pool: p0, size: 64MiB, class: volatile}}\n    \
             limits: {{iops: 20000, bandwidth: 400MiB/s}}\n  - name: root\n    \
             flash: {{pool: p0, size: 1GiB, thin: true}}\n",
            self.path("pool").display()
        );
        let path = self.path("web.yaml");
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Pool `p0`, machine `db-1` with a cached disk on an image of 64 MiB, and a flash volume.
    pub(crate) fn cached_manifest(&self) -> PathBuf {
        let image = self.path("data.raw");
        std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let text = format!(
            "apiVersion: vflash/v1\nkind: Pool\nmetadata: {{name: p0}}\n\
             spec: {{device: {}, size: 256MiB}}\n---\n\
             apiVersion: vflash/v1\nkind: VirtualMachine\nmetadata: {{name: db-1}}\n\
             spec:\n  volumes:\n  - name: data\n    \
             cache: {{pool: p0, size: 32MiB, maxStaleness: 5s}}\n    backing: {}\n  \
             - name: scratch\n    flash: {{pool: p0, size: 64MiB}}\n",
            self.path("pool").display(),
            image.display()
        );
        let path = self.path("cached.yaml");
        std::fs::write(&path, text).unwrap();
        path
    }

    /// What the daemon does every few seconds: tries again what could not be opened.
    pub(crate) fn look_after_caches(&self) {
        self.engine.look_after_caches();
    }

    /// What the daemon does at its start: opens pools, or notes why it cannot.
    pub(crate) fn open_pools(&self, devices: &[String]) {
        self.engine.restore(devices);
    }

    pub(crate) fn vflash(&self) -> Command {
        let mut command = vflash();
        command.arg("--run-dir").arg(self.path("run"));
        command
    }

    /// Standard output of a command that must succeed, this folder's path left out.
    pub(crate) fn says(&self, arguments: &[&str]) -> String {
        let output = self.vflash().args(arguments).output().unwrap();
        let text = self.anonymous(&output.stdout);
        assert!(output.status.success(), "{arguments:?}: {}", self.anonymous(&output.stderr));
        text
    }

    /// Exit status and standard error of a command that must fail.
    pub(crate) fn fails(&self, arguments: &[&str]) -> (i32, String) {
        let output: Output = self.vflash().args(arguments).output().unwrap();
        assert!(!output.status.success(), "{arguments:?}: {}", self.anonymous(&output.stdout));
        (output.status.code().unwrap(), self.anonymous(&output.stderr))
    }

    pub(crate) fn anonymous(&self, bytes: &[u8]) -> String {
        let folder = self.folder.path().canonicalize().unwrap();
        String::from_utf8_lossy(bytes).replace(folder.to_str().unwrap(), "DIR")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.engine.stop().unwrap();
    }
}

/// As a script calls it: no terminal, no environment that would change what it says.
pub(crate) fn vflash() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vflash"));
    command.env_remove("VFLASH_RUN_DIR").env("COLUMNS", "100");
    command.stdin(std::process::Stdio::null());
    command
}
