//! Each command that a refusal about a cached disk names is one that helps.

mod daemon;

use daemon::Daemon;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vflash::control::http::Access;
use vflash_bench::device::{Device, DeviceOptions};
use vflash_bench::queue::Kind;

const SOON: Duration = Duration::from_secs(30);
const NAME: &str = "db-1/data";

fn ask(daemon: &Daemon, kind: Kind, bytes: &mut [u8; 512]) {
    let socket = daemon.path("run/db-1/data.sock");
    let options = DeviceOptions { connect_timeout: SOON, ..DeviceOptions::new(&socket) };
    let mut device = Device::open(options).unwrap();
    let slot = device.queues[0].take_slot().unwrap();
    let data = device.queues[0].data(slot);
    device.memory.write(data, bytes);
    device.queues[0].submit(&device.memory, slot, kind, 63, 512);
    device.queues[0].publish(&device.memory);
    assert_eq!(device.await_ended(1, SOON).unwrap(), [0]);
    device.memory.read(data, bytes);
    device.stop().unwrap();
}

fn seen(daemon: &Daemon) -> u8 {
    let mut bytes = [0; 512];
    ask(daemon, Kind::Read, &mut bytes);
    bytes[0]
}

/// A cached disk whose flash alone has one write; its manifest.
fn dirty() -> (Daemon, String) {
    let daemon = Daemon::start(Access { group: None });
    let manifest = daemon.cached_manifest().display().to_string();
    daemon.says(&["apply", "-f", &manifest]);
    daemon.says(&["drain", NAME, "--to", "0", "--hold"]);
    ask(&daemon, Kind::Write, &mut [7; 512]);
    (daemon, manifest)
}

/// Ends serving the pool, and with it the cached disk; what is dirty stays dirty.
fn close(daemon: &Daemon) {
    daemon.says(&["pool", "close", "p0", "--force"]);
}

/// Manifest of another daemon with the same backing.
fn same_backing(other: &Daemon, backing: &Path) -> String {
    let manifest = other.cached_manifest();
    let text = std::fs::read_to_string(&manifest).unwrap();
    let own = other.path("data.raw").display().to_string();
    std::fs::write(&manifest, text.replace(&own, backing.to_str().unwrap())).unwrap();
    manifest.display().to_string()
}

/// The commands that a text names, as words after `vflash`.
fn commands(text: &str) -> Vec<Vec<String>> {
    let quoted = text.split('`').skip(1).step_by(2);
    let commands = quoted.filter_map(|quoted| quoted.strip_prefix("vflash "));
    commands.map(|words| words.split_whitespace().map(str::to_owned).collect()).collect()
}

/// Runs the only command that a text names, with further words.
fn obey(daemon: &Daemon, text: &str, more: &[&str]) -> String {
    let named = commands(text);
    let [words] = named.as_slice() else { panic!("one command in: {text}") };
    let words: Vec<String> = words.iter().map(|word| real(daemon, word)).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).chain(more.iter().copied()).collect();
    daemon.says(&words)
}

fn real(daemon: &Daemon, word: &str) -> String {
    word.replace("DIR", daemon.folder.path().canonicalize().unwrap().to_str().unwrap())
}

/// What is wrong with the disk, once that is known.
fn message(daemon: &Daemon) -> String {
    let deadline = Instant::now() + SOON;
    loop {
        let text = daemon.says(&["get", "volumes", "-o", "json"]);
        let volumes: serde_json::Value = serde_json::from_str(&text).unwrap();
        let volumes = volumes["volumes"].as_array().unwrap();
        let disk = volumes.iter().find(|volume| volume["name"] == NAME).unwrap();
        if let Some(message) = disk["message"].as_str() {
            return message.to_owned();
        }
        assert!(Instant::now() < deadline, "{text}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn the_writes_of_a_host_that_is_gone_are_given_up_as_the_refusal_says() {
    let (gone, _) = dirty();
    let backing = gone.path("data.raw");
    close(&gone);
    let here = Daemon::start(Access { group: None });
    let manifest = same_backing(&here, &backing);
    let (_, text) = here.fails(&["apply", "-f", &manifest]);
    assert!(text.contains("it belongs to db-1/data on host"), "{text}");
    let said = obey(&here, &text, &[]);
    let words = said.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words.contains("State: clean"), "{said}");
    here.says(&["apply", "-f", &manifest]);
    assert_eq!(seen(&here), 0, "the backing as it was before that write");
    // The old flash comes back: it is told that its writes were given up, and how to go on.
    here.says(&["detach", NAME]);
    gone.says(&["apply", "-f", &gone.path("cached.yaml").display().to_string()]);
    let text = message(&gone);
    assert!(text.contains("must be given up"), "{text}");
    let said = obey(&gone, &text, &["--confirm", NAME]);
    assert!(said.contains(NAME), "{said}");
}

/// Puts a copy in the place of a file: another file with the same content.
fn moved(path: &Path) {
    let aside: PathBuf = path.with_extension("aside");
    std::fs::rename(path, &aside).unwrap();
    std::fs::copy(&aside, path).unwrap();
}

#[test]
fn a_backing_that_was_moved_is_adopted_as_the_refusal_says() {
    let (daemon, manifest) = dirty();
    close(&daemon);
    moved(&daemon.path("data.raw"));
    daemon.says(&["apply", "-f", &manifest]);
    let text = message(&daemon);
    assert!(text.contains("it is another file"), "{text}");
    obey(&daemon, &text, &[]);
    let deadline = Instant::now() + SOON;
    while daemon.says(&["describe", NAME]).contains("failed") {
        assert!(Instant::now() < deadline, "{}", message(&daemon));
        daemon.look_after_caches();
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(seen(&daemon), 7, "nothing was lost");
    daemon.says(&["detach", NAME]);
    assert_eq!(std::fs::read(daemon.path("data.raw")).unwrap()[63 * 512], 7);
}

#[test]
fn what_does_not_fit_its_backing_any_more_is_given_up_as_the_refusal_says() {
    for rolled_back in [true, false] {
        let daemon = Daemon::start(Access { group: None });
        let manifest = daemon.cached_manifest().display().to_string();
        daemon.says(&["apply", "-f", &manifest]);
        let sidecar = daemon.path("data.raw.vflash");
        daemon.says(&["drain", NAME, "--to", "0", "--hold"]);
        ask(&daemon, Kind::Write, &mut [7; 512]);
        close(&daemon);
        let before = std::fs::read(&sidecar).unwrap();
        daemon.says(&["apply", "-f", &manifest]);
        ask(&daemon, Kind::Write, &mut [8; 512]);
        daemon.says(&["drain", NAME, "--to", "1", "--hold"]);
        close(&daemon);
        match rolled_back {
            true => std::fs::write(&sidecar, before).unwrap(),
            false => std::fs::remove_file(&sidecar).unwrap(),
        }
        daemon.says(&["apply", "-f", &manifest]);
        let text = message(&daemon);
        let why = if rolled_back { "it was rolled back" } else { "its sidecar is missing" };
        assert!(text.contains(why), "{text}");
        let (_, told) = daemon.fails(&["detach", NAME]);
        assert!(commands(&told).iter().any(|words| words.contains(&"--lost".to_owned())), "{told}");
        obey(&daemon, &text, &["--confirm", NAME]);
        // Its name and its backing are free again.
        if rolled_back {
            daemon.says(&["apply", "-f", &manifest]);
        }
    }
}

#[test]
fn a_disk_that_is_being_drained_or_asked_for_too_much_names_what_to_do() {
    let (daemon, _) = dirty();
    let (_, text) = daemon.fails(&["drain", NAME, "--point", "nothing"]);
    assert!(obey(&daemon, &text, &[]).contains("the newest committed write"), "{text}");
    let (_, text) =
        daemon.fails(&["delete", "-f", &daemon.path("cached.yaml").display().to_string()]);
    for words in commands(&text) {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        daemon.says(&[&words[..], &["--help"]].concat());
    }
    let (_, text) = daemon.fails(&["detach", "db-1/scratch"]);
    obey(&daemon, &text, &["--force", "--confirm", "db-1/scratch"]);
    let (_, text) = daemon.fails(&["drain", "db-1/nothing"]);
    assert!(obey(&daemon, &text, &[]).contains(NAME), "{text}");
}
