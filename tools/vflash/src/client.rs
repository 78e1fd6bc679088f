//! The daemon's API as functions.

use crate::http::{Failed, Patience, request};
use hyper::Method;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vflash::control::api::{ErrorCode, Failure, socket_path};
use vflash::manifest::schema::is_name;

/// What a daemon knows it answers at once; one that is starting, once it serves what it served.
const QUESTION_PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Client {
    socket: PathBuf,
    patience: Duration,
}

impl Client {
    pub(crate) fn new(run_dir: &Path) -> Self {
        Self { socket: socket_path(run_dir), patience: QUESTION_PATIENCE }
    }

    /// Whether a daemon answers.
    pub(crate) fn daemon_runs(&self) -> bool {
        std::os::unix::net::UnixStream::connect(&self.socket).is_ok()
    }

    pub(crate) fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.get_later(path, Duration::ZERO)
    }

    /// As [`Self::get`], of what is answered after `wait` at the latest.
    pub(crate) fn get_later<T: DeserializeOwned>(
        &self,
        path: &str,
        wait: Duration,
    ) -> Result<T, Failure> {
        let patience = Patience::Within(self.patience + wait);
        self.call((Method::GET, path), None, patience, "")
    }

    /// Asks for a change.
    pub(crate) fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Failure> {
        let left = ": a part of the change may be done: `vflash diff` with the manifests, or \
                    `vflash get`, shows what is";
        self.send(path, body, left)
    }

    /// Asks something that takes a body, and changes nothing.
    pub(crate) fn ask<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Failure> {
        self.send(path, body, "")
    }

    fn send<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Option<&impl Serialize>,
        left: &str,
    ) -> Result<T, Failure> {
        let body = body.map(serde_json::to_vec).transpose();
        let body = body.map_err(|error| internal(error.to_string()))?;
        self.call((Method::POST, path), body, Patience::Work, left)
    }

    /// `left`: what may be left if no answer comes.
    fn call<T: DeserializeOwned>(
        &self,
        (method, path): (Method, &str),
        body: Option<Vec<u8>>,
        patience: Patience,
        left: &str,
    ) -> Result<T, Failure> {
        let answer = request(&self.socket, method, path, body, patience);
        let answer = answer.map_err(|failed| match failed {
            Failed::Unreachable(cause) => self.unreachable(&cause.0),
            Failed::Silent(process) => silent(process),
            Failed::Broken(text) => {
                let text = format!(
                    "vflashd ended the connection before it answered ({text}){left}; the log of \
                     vflashd says why"
                );
                Failure::new(ErrorCode::Io, text)
            }
        })?;
        if answer.status.is_success() {
            return serde_json::from_slice(&answer.body).map_err(|error| {
                internal(format!("the answer to {path} is not understood: {error}"))
            });
        }
        Err(serde_json::from_slice(&answer.body)
            .unwrap_or_else(|_| internal(format!("{path}: {}", answer.status))))
    }

    fn unreachable(&self, cause: &std::io::Error) -> Failure {
        let socket = self.socket.display();
        let advice = match cause.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                "is vflashd running? Start it, or name its run directory by --run-dir or \
                 VFLASH_RUN_DIR"
            }
            ErrorKind::PermissionDenied => {
                "call as root, or as a member of the group that vflashd was given as --api-group"
            }
            ErrorKind::InvalidInput => {
                "a socket's path has at most 107 bytes: take a shorter run directory"
            }
            _ => "see the log of vflashd",
        };
        Failure::new(ErrorCode::Io, format!("cannot reach {socket}: {cause}: {advice}"))
    }
}

fn silent(process: Option<i32>) -> Failure {
    let process = process.map_or(String::new(), |process| format!(" (process {process})"));
    let text = format!(
        "vflashd{process} does not answer: it hangs, or was killed and cannot end while a drive \
         does not answer it (state D of `ps`); its log and the kernel's (`dmesg`) say more"
    );
    Failure::new(ErrorCode::Timeout, text)
}

fn internal(message: String) -> Failure {
    Failure::new(ErrorCode::Internal, message)
}

/// `/v1/volumes/VM/VOLUME`
pub(crate) fn volume_path(name: &str) -> Result<String, Failure> {
    match name.split_once('/') {
        Some((vm, volume)) => Ok(format!("/v1/volumes/{}/{}", part(vm)?, part(volume)?)),
        None => {
            let text = format!("`{name}` names no volume: write VM/VOLUME");
            Err(Failure::new(ErrorCode::Invalid, text))
        }
    }
}

/// `/v1/pools/POOL`
pub(crate) fn pool_path(name: &str) -> Result<String, Failure> {
    Ok(format!("/v1/pools/{}", part(name)?))
}

/// `/v1/pools/DEVICE`, escaped: that of a pool which is known by its device alone.
pub(crate) fn device_path(device: &str) -> String {
    format!("/v1/pools/{}", utf8_percent_encode(device, NON_ALPHANUMERIC))
}

/// Names are plain by the manifest's rules, so nothing needs escaping in a path.
fn part(name: &str) -> Result<&str, Failure> {
    if is_name(name) {
        return Ok(name);
    }
    let text = format!("`{name}` is no name: small letters, digits and inner hyphens make one");
    Err(Failure::new(ErrorCode::Invalid, text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    /// What is told when the daemon dies while it works on a request.
    fn told(request: impl FnOnce(&Client) -> Result<(), Failure>) -> String {
        let run_dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(socket_path(run_dir.path())).unwrap();
        let daemon = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut head = BufReader::new(stream).lines();
            assert!(head.any(|line| line.unwrap().is_empty()), "a whole request");
        });
        let failure = request(&Client::new(run_dir.path())).unwrap_err();
        daemon.join().unwrap();
        failure.message
    }

    #[test]
    fn a_daemon_that_does_not_answer_is_named() {
        let run_dir = tempfile::tempdir().unwrap();
        let _listener = UnixListener::bind(socket_path(run_dir.path())).unwrap();
        let patience = Duration::from_millis(10);
        let client = Client { patience, ..Client::new(run_dir.path()) };
        let failure = client.get::<()>("/v1/status").unwrap_err();
        assert_eq!(failure.code, ErrorCode::Timeout);
        let process = format!("(process {})", std::process::id());
        assert!(failure.message.contains(&process), "{failure}");
    }

    #[test]
    fn a_change_without_an_answer_may_be_done_in_part() {
        let text = told(|client| client.post("/v1/apply", None::<&()>));
        assert!(text.contains("a part of the change may be done: `vflash diff`"), "{text}");
        let status = told(|client| client.get("/v1/status"));
        let diff = told(|client| client.ask("/v1/diff", None::<&()>));
        for text in [status, diff] {
            assert!(text.contains("the log of vflashd") && !text.contains("may be done"), "{text}");
        }
    }
}
