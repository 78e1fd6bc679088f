//! Against an HTTP server of our own that takes exactly the requests written down here.

use super::super::tests::attachment;
use super::*;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread::JoinHandle;

/// Request line, body, status line, answer.
type Exchange = (&'static str, Value, &'static str, &'static str);

struct FakeHypervisor {
    socket: PathBuf,
    thread: JoinHandle<()>,
    _directory: tempfile::TempDir,
}

impl FakeHypervisor {
    fn start(exchanges: Vec<Exchange>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("api.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = std::thread::spawn(move || {
            for (line, body, status, answer) in exchanges {
                let (stream, _) = listener.accept().unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let (head, sent) = read_request(&mut reader);
                assert_eq!(head, format!("{line} HTTP/1.1"));
                assert_eq!(sent, body);
                let length = answer.len();
                let answer =
                    format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{answer}");
                (&stream).write_all(answer.as_bytes()).unwrap();
            }
        });
        Self { socket, thread, _directory: directory }
    }

    fn finish(self) {
        self.thread.join().unwrap();
    }
}

fn read_request(reader: &mut impl BufRead) -> (String, Value) {
    let mut lines = reader.by_ref().lines().map(|line| line.unwrap());
    let first = lines.next().unwrap();
    let mut length = 0;
    for header in lines.by_ref().take_while(|line| !line.is_empty()) {
        if let Some(value) = header.to_ascii_lowercase().strip_prefix("content-length: ") {
            length = value.parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    (first, if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() })
}

const INFO: &str = "GET /api/v1/vm.info";
const SHARED: &str = r#"{"config":{"cpus":{"boot_vcpus":4},"memory":{"shared":true}}}"#;

#[test]
fn a_disk_is_added_with_a_queue_for_each_cpu() {
    let disk = json!({
        "id": "vflash-web-1.root",
        "vhost_user": true,
        "vhost_socket": "/run/vflash/web-1/root.sock",
        "num_queues": 4,
        "queue_size": 256,
    });
    let added = r#"{"id":"vflash-web-1.root","bdf":"0000:00:03.0"}"#;
    let hypervisor = FakeHypervisor::start(vec![
        (INFO, Value::Null, "200 OK", SHARED),
        ("PUT /api/v1/vm.add-disk", disk, "200 OK", added),
    ]);
    attach(&hypervisor.socket, &attachment(), None).unwrap();
    hypervisor.finish();
}

#[test]
fn a_disk_is_removed_by_its_name() {
    let id = json!({"id": "vflash-web-1.root"});
    let hypervisor =
        FakeHypervisor::start(vec![("PUT /api/v1/vm.remove-device", id, "204 No Content", "")]);
    detach(&hypervisor.socket, "vflash-web-1.root").unwrap();
    hypervisor.finish();
}

#[test]
fn memory_that_is_not_shared_is_found_before_anything_is_changed() {
    let private = r#"{"config":{"cpus":{"boot_vcpus":4},"memory":{"shared":false}}}"#;
    let hypervisor = FakeHypervisor::start(vec![(INFO, Value::Null, "200 OK", private)]);
    let failure = attach(&hypervisor.socket, &attachment(), None).unwrap_err();
    assert_eq!(failure.code, ErrorCode::Unsupported);
    hypervisor.finish();
}

#[test]
fn a_refusal_is_passed_on() {
    let hypervisor =
        FakeHypervisor::start(vec![(INFO, Value::Null, "500 Internal Server Error", "no VM")]);
    let failure = attach(&hypervisor.socket, &attachment(), None).unwrap_err();
    assert!(failure.message.contains("500") && failure.message.contains("no VM"), "{failure}");
    hypervisor.finish();
}
