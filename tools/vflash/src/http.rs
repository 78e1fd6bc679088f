//! HTTP/1.1 over a unix socket, one request at a time.

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use std::path::Path;
use std::time::Duration;
use tokio::net::UnixStream;

/// For the connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Whoever waits longer for an answer is told what for.
const NOTICE_AFTER: Duration = Duration::from_secs(10);

/// How long an answer is waited for.
#[derive(Clone, Copy)]
pub(crate) enum Patience {
    /// As long as the work takes: it may take hours.
    Work,
    /// What is known is answered at once, or not at all.
    Within(Duration),
}

/// What a person is told when the other side cannot be reached.
#[derive(Debug)]
pub(crate) struct Unreachable(pub std::io::Error);

pub(crate) enum Failed {
    Unreachable(Unreachable),
    /// No answer came in time from this process.
    Silent(Option<i32>),
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
    patience: Patience,
) -> Result<Answer, Failed> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failed::Broken(error.to_string()))?;
    runtime.block_on(async {
        let stream = connect(socket).await?;
        let process = stream.peer_cred().ok().and_then(|peer| peer.pid());
        let exchange = exchange(stream, method, path, body);
        let notice = || {
            let by = process.map_or(String::new(), |process| format!(" of process {process}"));
            eprintln!("vflash: still waiting for an answer{by} on {}", socket.display());
        };
        let answer = patiently(exchange, patience, NOTICE_AFTER, notice).await;
        answer.unwrap_or(Err(Failed::Silent(process)))
    })
}

async fn connect(socket: &Path) -> Result<UnixStream, Failed> {
    tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(socket))
        .await
        .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
        .map_err(|error| Failed::Unreachable(Unreachable(error)))
}

/// What the work comes to; `None`: nothing in time. After `notice_after`, `notice` is called.
async fn patiently<T>(
    work: impl Future<Output = T>,
    patience: Patience,
    notice_after: Duration,
    notice: impl FnOnce(),
) -> Option<T> {
    let mut work = std::pin::pin!(work);
    let told = async {
        if let Ok(done) = tokio::time::timeout(notice_after, &mut work).await {
            return done;
        }
        notice();
        work.await
    };
    match patience {
        Patience::Work => Some(told.await),
        Patience::Within(limit) => tokio::time::timeout(limit, told).await.ok(),
    }
}

async fn exchange(
    stream: UnixStream,
    method: Method,
    path: &str,
    body: Option<Vec<u8>>,
) -> Result<Answer, Failed> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::future::pending;
    use std::time::Instant;

    fn run<T>(work: impl Future<Output = T>) -> T {
        let builder = &mut tokio::runtime::Builder::new_current_thread();
        builder.enable_all().build().unwrap().block_on(work)
    }

    const MOMENT: Duration = Duration::from_millis(1);
    const LONG: Duration = Duration::from_secs(3600);

    #[test]
    fn whoever_waits_is_told_once_and_only_questions_are_given_up() {
        let told = Cell::new(0);
        let tell = || told.set(told.get() + 1);
        run(async {
            let limit = Patience::Within(50 * MOMENT);
            assert_eq!(patiently(pending::<()>(), limit, MOMENT, tell).await, None);
            assert_eq!(told.take(), 1);
            // Work that takes longer than anybody may wait for an answer to a question.
            let begun = Instant::now();
            let work = async {
                while begun.elapsed() < 100 * MOMENT {
                    tokio::task::yield_now().await;
                }
                7
            };
            assert_eq!(patiently(work, Patience::Work, MOMENT, tell).await, Some(7));
            assert_eq!(told.take(), 1);
            let limit = Patience::Within(LONG);
            assert_eq!(patiently(async { 7 }, limit, LONG, tell).await, Some(7));
            assert_eq!(told.take(), 0);
        });
    }
}
