//! The daemon's API as functions.

use crate::http::{Failed, request};
use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use vflash::control::api::{ErrorCode, Failure, socket_path};
use vflash::manifest::schema::is_name;

pub(crate) struct Client {
    socket: PathBuf,
}

impl Client {
    pub(crate) fn new(run_dir: &Path) -> Self {
        Self { socket: socket_path(run_dir) }
    }

    /// Whether a daemon answers.
    pub(crate) fn daemon_runs(&self) -> bool {
        std::os::unix::net::UnixStream::connect(&self.socket).is_ok()
    }

    pub(crate) fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.call(Method::GET, path, None)
    }

    pub(crate) fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Failure> {
        let body = body.map(serde_json::to_vec).transpose();
        let body = body.map_err(|error| internal(error.to_string()))?;
        self.call(Method::POST, path, body)
    }

    fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<T, Failure> {
        let answer = request(&self.socket, method, path, body).map_err(|failed| match failed {
            Failed::Unreachable(cause) => self.unreachable(&cause.0),
            Failed::Broken(text) => {
                let text = format!("vflashd ended the connection: {text}; see its log");
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

/// Names are plain by the manifest's rules, so nothing needs escaping in a path.
fn part(name: &str) -> Result<&str, Failure> {
    if is_name(name) {
        return Ok(name);
    }
    let text = format!("`{name}` is no name: small letters, digits and inner hyphens make one");
    Err(Failure::new(ErrorCode::Invalid, text))
}
