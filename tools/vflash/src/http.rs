//! HTTP/1.1 over a unix socket, one request at a time.

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use std::path::Path;
use std::time::Duration;
use tokio::net::UnixStream;

/// For the connection; answers take as long as the work does.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What a person is told when the other side cannot be reached.
#[derive(Debug)]
pub(crate) struct Unreachable(pub std::io::Error);

pub(crate) enum Failed {
    Unreachable(Unreachable),
    /// The connection broke, or what came is not HTTP.
    Broken(String),
}

pub(crate) struct Answer {
    pub status: StatusCode,
    pub body: Bytes,
}

/// Sends one request and waits for its answer.
pub(crate) fn request(
    socket: &Path,
    method: Method,
    path: &str,
    body: Option<Vec<u8>>,
) -> Result<Answer, Failed> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failed::Broken(error.to_string()))?;
    runtime.block_on(exchange(socket, method, path, body))
}

async fn exchange(
    socket: &Path,
    method: Method,
    path: &str,
    body: Option<Vec<u8>>,
) -> Result<Answer, Failed> {
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(socket))
        .await
        .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
        .map_err(|error| Failed::Unreachable(Unreachable(error)))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    // The connection ends when the answer was read; what went wrong is told by the sender.
    tokio::spawn(connection);
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header(hyper::header::HOST, "localhost")
        .header(hyper::header::ACCEPT, "application/json");
    if body.is_some() {
        request = request.header(hyper::header::CONTENT_TYPE, "application/json");
    }
    let request = request
        .body(Full::new(Bytes::from(body.unwrap_or_default())))
        .map_err(|error| Failed::Broken(error.to_string()))?;
    let answer = sender.send_request(request).await.map_err(broken)?;
    let status = answer.status();
    let body = answer.into_body().collect().await.map_err(broken)?.to_bytes();
    Ok(Answer { status, body })
}

#[allow(clippy::needless_pass_by_value)]
fn broken(error: hyper::Error) -> Failed {
    Failed::Broken(error.to_string())
}
