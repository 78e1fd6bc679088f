//! Against a QMP server of our own that takes exactly the commands written down here, and against
//! the real QEMU (`tests/qemu.rs`).

use super::super::tests::attachment;
use super::*;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread::JoinHandle;

/// A command and what QEMU says to it, line by line.
type Exchange = (Value, Vec<Value>);

struct FakeQemu {
    socket: PathBuf,
    thread: JoinHandle<()>,
    _directory: tempfile::TempDir,
}

impl FakeQemu {
    fn start(exchanges: Vec<Exchange>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("qmp.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut writer = stream.try_clone().unwrap();
            let mut lines = BufReader::new(stream).lines();
            writeln!(writer, "{}", json!({"QMP": {"version": {}, "capabilities": []}})).unwrap();
            for (expected, answers) in exchanges {
                let line = lines.next().expect("one more command").unwrap();
                assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), expected);
                answers.iter().for_each(|answer| writeln!(writer, "{answer}").unwrap());
            }
            assert!(lines.next().is_none(), "no further command");
        });
        Self { socket, thread, _directory: directory }
    }

    /// All commands came, and no other.
    fn finish(self) {
        self.thread.join().unwrap();
    }
}

fn ok(command: &str, arguments: Value, value: Value) -> Exchange {
    let request = match arguments.as_object().is_some_and(serde_json::Map::is_empty) {
        true => json!({"execute": command}),
        false => json!({"execute": command, "arguments": arguments}),
    };
    (request, vec![json!({"return": value})])
}

fn refuse(command: &str, arguments: Value, why: &str) -> Exchange {
    let (request, _) = ok(command, arguments, Value::Null);
    (request, vec![json!({"error": {"class": "GenericError", "desc": why}})])
}

fn opening(major: u64, minor: u64) -> Vec<Exchange> {
    let memory = json!([{"id": "spare", "share": false}, {"id": "mem", "share": true}]);
    opening_with(major, minor, memory)
}

fn opening_with(major: u64, minor: u64, memory: Value) -> Vec<Exchange> {
    vec![
        ok("qmp_capabilities", json!({}), json!({})),
        ok("query-version", json!({}), json!({"qemu": {"major": major, "minor": minor}})),
        ok("query-cpus-fast", json!({}), json!([{"cpu-index": 0}, {"cpu-index": 1}])),
        ok("query-memdev", json!({}), memory),
    ]
}

fn chardev(reconnect: (&str, u64)) -> Value {
    let mut data = json!({
        "addr": {"type": "unix", "data": {"path": "/run/vflash/web-1/root.sock"}},
        "server": false,
    });
    data[reconnect.0] = json!(reconnect.1);
    json!({"id": "vflash-web-1.root.chardev", "backend": {"type": "socket", "data": data}})
}

fn device(bus: Option<&str>, queues: u16) -> Value {
    let mut device = json!({
        "driver": "vhost-user-blk-pci",
        "id": "vflash-web-1.root",
        "chardev": "vflash-web-1.root.chardev",
        "num-queues": queues,
        "queue-size": 256,
    });
    if let Some(bus) = bus {
        device["bus"] = json!(bus);
    }
    device
}

/// Three root ports, of which `rp1` has a device.
fn ports() -> Vec<Exchange> {
    let get = |name: &str| json!({"path": name, "property": "parent_bus"});
    let peripherals = json!([
        {"name": "type", "type": "string"},
        {"name": "net0", "type": "child<virtio-net-pci>"},
        {"name": "rp1", "type": "child<pcie-root-port>"},
        {"name": "rp2", "type": "child<pcie-root-port>"},
        {"name": "rp3", "type": "child<pcie-root-port>"},
    ]);
    let root = json!("/machine/q35/pcie.0");
    vec![
        ok("qom-list", json!({"path": "/machine/peripheral"}), peripherals),
        ok("qom-get", get("/machine/peripheral/net0"), json!("/machine/peripheral/rp1/rp1")),
        ok("qom-get", get("/machine/peripheral/rp1"), root.clone()),
        ok("qom-get", get("/machine/peripheral/rp2"), root.clone()),
        ok("qom-get", get("/machine/peripheral/rp3"), root),
        ok("qom-list", json!({"path": "/machine/peripheral-anon"}), json!([])),
    ]
}

#[test]
fn a_free_port_and_the_spelling_of_the_version_are_found() {
    let mut exchanges = opening(7, 2);
    exchanges.extend(ports());
    exchanges.push(ok("chardev-add", chardev(("reconnect", 1)), json!({})));
    exchanges.push(ok("device_add", device(Some("rp2"), 2), json!({})));
    let qemu = FakeQemu::start(exchanges);
    attach(&qemu.socket, &attachment(), None, None).unwrap();
    qemu.finish();
}

#[test]
fn a_named_bus_and_a_queue_count_are_taken_as_they_are() {
    let mut exchanges = opening(9, 2);
    exchanges.push(ok("chardev-add", chardev(("reconnect-ms", 200)), json!({})));
    exchanges.push(ok("device_add", device(Some("mine"), 7), json!({})));
    let qemu = FakeQemu::start(exchanges);
    attach(&qemu.socket, &attachment(), Some(7), Some("mine")).unwrap();
    qemu.finish();
}

#[test]
fn a_port_that_turns_out_taken_is_passed_over() {
    let mut exchanges = opening(10, 0);
    exchanges.extend(ports());
    exchanges.push(ok("chardev-add", chardev(("reconnect-ms", 200)), json!({})));
    let taken = "PCI: slot 0 function 0 not available for vhost-user-blk-pci, in use by x";
    exchanges.push(refuse("device_add", device(Some("rp2"), 2), taken));
    exchanges.push(ok("device_add", device(Some("rp3"), 2), json!({})));
    let qemu = FakeQemu::start(exchanges);
    attach(&qemu.socket, &attachment(), None, None).unwrap();
    qemu.finish();
}

#[test]
fn a_refused_device_leaves_no_chardev_and_says_what_to_do() {
    let mut exchanges = opening(7, 2);
    let list = |path: &str| ok("qom-list", json!({"path": path}), json!([]));
    exchanges.extend(PERIPHERALS.map(list));
    exchanges.push(ok("chardev-add", chardev(("reconnect", 1)), json!({})));
    let why = "Bus 'pcie.0' does not support hotplugging";
    exchanges.push(refuse("device_add", device(None, 2), why));
    let remove = json!({"id": "vflash-web-1.root.chardev"});
    exchanges.push(ok("chardev-remove", remove, json!({})));
    let qemu = FakeQemu::start(exchanges);
    let failure = attach(&qemu.socket, &attachment(), None, None).unwrap_err();
    qemu.finish();
    assert!(failure.message.contains(why), "{failure}");
    assert!(failure.message.contains("pcie-root-port"), "{failure}");
}

#[test]
fn memory_that_is_not_shared_is_found_before_anything_is_changed() {
    for memory in [json!([]), json!([{"id": "pc.ram", "share": false}])] {
        let qemu = FakeQemu::start(opening_with(7, 2, memory));
        let failure = attach(&qemu.socket, &attachment(), None, None).unwrap_err();
        qemu.finish();
        assert_eq!(failure.code, ErrorCode::Unsupported);
        assert!(failure.message.contains("memory-backend-memfd"), "{failure}");
    }
}

fn deletion(events: Vec<Value>) -> Vec<Exchange> {
    let delete = ok("device_del", json!({"id": "vflash-web-1.root"}), json!({}));
    let (request, mut lines) = delete;
    lines.extend(events);
    vec![ok("qmp_capabilities", json!({}), json!({})), (request, lines)]
}

fn event(name: &str, device: &str) -> Value {
    json!({"event": name, "data": {"device": device, "path": "/machine/x"}, "timestamp": {}})
}

const TIMEOUT: Duration = Duration::from_secs(30);

#[test]
fn a_device_is_gone_before_its_chardev_goes() {
    let mut exchanges = deletion(vec![
        event("DEVICE_DELETED", "another"),
        json!({"event": "RESUME", "timestamp": {}}),
        event("DEVICE_DELETED", "vflash-web-1.root"),
    ]);
    let remove = json!({"id": "vflash-web-1.root.chardev"});
    exchanges.push(refuse("chardev-remove", remove.clone(), "Chardev 'x' is busy"));
    exchanges.push(ok("chardev-remove", remove, json!({})));
    let qemu = FakeQemu::start(exchanges);
    detach(&qemu.socket, "vflash-web-1.root", TIMEOUT).unwrap();
    qemu.finish();
}

#[test]
fn a_guest_that_does_not_let_go_is_told_apart_from_one_that_refuses() {
    let qemu = FakeQemu::start(deletion(vec![]));
    let failure = detach(&qemu.socket, "vflash-web-1.root", Duration::from_millis(50)).unwrap_err();
    assert_eq!(failure.code, ErrorCode::Timeout);
    qemu.finish();
    let refusal = event("DEVICE_UNPLUG_GUEST_ERROR", "vflash-web-1.root");
    let qemu = FakeQemu::start(deletion(vec![refusal]));
    let failure = detach(&qemu.socket, "vflash-web-1.root", TIMEOUT).unwrap_err();
    assert_eq!(failure.code, ErrorCode::Busy);
    qemu.finish();
}

#[test]
fn a_socket_that_is_not_qemus_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("qmp.sock");
    let failure = detach(&socket, "x", TIMEOUT).unwrap_err();
    assert!(failure.message.contains("-qmp unix:"), "{failure}");
    let listener = UnixListener::bind(&socket).unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
    });
    let failure = detach(&socket, "x", TIMEOUT).unwrap_err();
    assert!(failure.message.contains("no JSON"), "{failure}");
    thread.join().unwrap();
}
