//! HTTP on the API's unix socket.
//!
//! Callers are few and local, but none is trusted to be quick or small: connections, heads, bodies
//! and the time to send them are bounded, and peers are told apart by their credentials. The data
//! path does not pass here and no request here can stall it.

use super::api::{BODY_BYTES_MAX, ErrorCode, Failure};
use super::engine::Engine;
use super::routes::{self, Answer, Call, EVENTS, Method, ROUTES, Reply, Route, json};
use crate::base::{Error, Result};
use axum::Router;
use axum::body::HttpBody;
use axum::extract::rejection::{QueryRejection, RawPathParamsRejection};
use axum::extract::{Query, RawPathParams, Request};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use axum::routing::{MethodFilter, MethodRouter, on};
use http_body_util::{BodyExt, Limited};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

/// Connections at a time; one more is answered 503.
pub const CONNECTIONS_MAX: usize = 256;

/// For the head of a request, also of the next one on a connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// For the body of a request.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a call waits for a daemon that starts to serve everything that it served before.
const START_PATIENCE: Duration = Duration::from_secs(15);

/// Bytes of a request's head, and of what is buffered of it.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// Who may use the API besides root and the daemon's own user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub group: Option<u32>,
}

/// Binds the socket, replacing one that a dead daemon left. The caller holds the run directory's
/// lock, so no living daemon loses its socket here.
pub fn bind(path: &Path, access: Access) -> Result<UnixListener> {
    let failed = |error| Error::io(format!("opening the API socket {}", path.display()), error);
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let mode = if access.group.is_some() { 0o660 } else { 0o600 };
    std::os::unix::fs::chown(path, None, access.group).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed)?;
    Ok(listener)
}

/// Serves until dropped.
pub async fn serve(listener: UnixListener, engine: Arc<Engine>, access: Access) {
    let router = router(&engine);
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: others need time to close theirs.
                log::warn!("API socket: accepting a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            tokio::spawn(turn_away(stream));
            continue;
        };
        let router = match permitted(&stream, access) {
            Ok(()) => router.clone(),
            Err(failure) => refusing(failure),
        };
        tokio::spawn(async move {
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_buf_size(HEAD_BYTES_MAX)
                .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
                .await;
            if let Err(error) = served {
                log::debug!("API connection: {error}");
            }
            drop(slot);
        });
    }
}

/// Root, our own user, or a member of the group.
fn permitted(stream: &UnixStream, access: Access) -> std::result::Result<(), Failure> {
    let peer = stream.peer_cred().map_err(|error| {
        Failure::new(ErrorCode::Forbidden, format!("who is calling cannot be told: {error}"))
    })?;
    judge((peer.uid(), peer.gid()), nix::unistd::geteuid().as_raw(), access)
}

fn judge((uid, gid): (u32, u32), own: u32, access: Access) -> std::result::Result<(), Failure> {
    let member = |group| gid == group || is_member(uid, group);
    if uid == 0 || uid == own || access.group.is_some_and(member) {
        return Ok(());
    }
    let remedy = match access.group {
        Some(group) => format!("or be a member of group {group}"),
        None => "or start vflashd with --api-group".to_owned(),
    };
    let message = format!(
        "user {uid} may not use the API of vflashd: call it as root or as user {own}, {remedy}"
    );
    Err(Failure::new(ErrorCode::Forbidden, message))
}

/// Whether the user database lists the user in the group.
fn is_member(uid: u32, group: u32) -> bool {
    use nix::unistd::{Gid, Uid, User, getgrouplist};
    let Ok(Some(user)) = User::from_uid(Uid::from_raw(uid)) else { return false };
    let Ok(name) = std::ffi::CString::new(user.name) else { return false };
    getgrouplist(&name, user.gid).is_ok_and(|groups| groups.contains(&Gid::from_raw(group)))
}

/// Answers without reading, so that it costs no more than the accept did.
async fn turn_away(mut stream: UnixStream) {
    let text = format!("{CONNECTIONS_MAX} connections are open: close some, or wait");
    let failure = Failure::new(ErrorCode::Overloaded, text);
    let body = serde_json::to_string(&failure).unwrap_or_default();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    let written = tokio::time::timeout(HEAD_TIMEOUT, stream.write_all(answer.as_bytes())).await;
    log::debug!("API connection turned away: {written:?}");
}

fn refusing(failure: Failure) -> Router {
    Router::new().fallback(move || async move { failed(&failure) })
}

fn router(engine: &Arc<Engine>) -> Router {
    let mut methods: HashMap<&str, MethodRouter> = HashMap::new();
    for route in ROUTES {
        let filter = match route.method {
            Method::Get => MethodFilter::GET,
            Method::Post => MethodFilter::POST,
        };
        let engine = engine.clone();
        let handler = on(filter, move |path: PathParts, query: QueryParts, request| {
            respond(route, engine, path, query, request)
        });
        let known = methods.remove(route.path).unwrap_or_default();
        methods.insert(route.path, known.merge(handler));
    }
    methods
        .into_iter()
        .fold(Router::new(), |router, (path, methods)| router.route(path, methods))
        .method_not_allowed_fallback(|request: Request| async move {
            let text = format!("{} takes no {}", request.uri().path(), request.method());
            failed(&Failure::new(ErrorCode::NotAllowed, text))
        })
        .fallback(|request: Request| async move {
            let text = format!("{} is no route; see /v1/openapi.json", request.uri().path());
            failed(&Failure::new(ErrorCode::NotFound, text))
        })
}

/// What a path and a query say, or why they say nothing.
type PathParts = std::result::Result<RawPathParams, RawPathParamsRejection>;
type QueryParts = std::result::Result<Query<HashMap<String, String>>, QueryRejection>;

async fn respond(
    route: &'static Route,
    engine: Arc<Engine>,
    path: PathParts,
    query: QueryParts,
    request: Request,
) -> Response {
    let answer = match read_call(path, query, request).await {
        Ok(call) => {
            if !route.answers_at_once() {
                // Or what is not open yet would seem to be no more.
                let mut restored = engine.follow_restored();
                let restored = restored.wait_for(|restored| *restored);
                let _ = tokio::time::timeout(START_PATIENCE, restored).await;
            }
            answer(route, engine, call).await
        }
        Err(failure) => Err(failure),
    };
    match answer {
        Ok(reply) => response(StatusCode::OK, reply),
        Err(failure) => failed(&failure),
    }
}

async fn read_call(
    path: PathParts,
    query: QueryParts,
    request: Request,
) -> std::result::Result<Call, Failure> {
    let invalid = |text: String| Failure::new(ErrorCode::Invalid, text);
    let path = path.map_err(|rejection| invalid(format!("the path: {rejection}")))?;
    let Query(query) = query.map_err(|rejection| invalid(format!("the query: {rejection}")))?;
    let path = path.iter().map(|(_, value)| value.to_owned()).collect();
    Ok(Call { path, query, body: read_body(request).await? })
}

async fn read_body(request: Request) -> std::result::Result<axum::body::Bytes, Failure> {
    let too_large = || {
        let text = format!("the request body is larger than {BODY_BYTES_MAX} bytes");
        Failure::new(ErrorCode::TooLarge, text)
    };
    let body = request.into_body();
    if body.size_hint().lower() > BODY_BYTES_MAX as u64 {
        return Err(too_large());
    }
    let body = Limited::new(body, BODY_BYTES_MAX).collect();
    match tokio::time::timeout(BODY_TIMEOUT, body).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => {
            Err(Failure::new(ErrorCode::Invalid, format!("reading the request body: {error}")))
        }
        Err(_) => {
            let text = format!("the request body did not arrive within {BODY_TIMEOUT:?}");
            Err(Failure::new(ErrorCode::Timeout, text))
        }
    }
}

async fn answer(route: &'static Route, engine: Arc<Engine>, call: Call) -> Answer {
    if route.path == EVENTS {
        return routes::events(engine, call).await;
    }
    let work = tokio::task::spawn_blocking(move || (route.handler)(&engine, &call));
    work.await.unwrap_or_else(|error| {
        log::error!("API: {} panicked: {error}", route.operation);
        let text = format!("{} failed by a defect of vflashd; see its log", route.operation);
        Err(Failure::new(ErrorCode::Internal, text))
    })
}

fn failed(failure: &Failure) -> Response {
    let status =
        StatusCode::from_u16(failure.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    match json(failure) {
        Ok(reply) => response(status, reply),
        Err(_) => response(status, Reply { content_type: "text/plain", body: Vec::new() }),
    }
}

fn response(status: StatusCode, reply: Reply) -> Response {
    let mut response = Response::new(reply.body.into());
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(reply.content_type));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_the_own_user_and_the_group_are_let_in() {
        let nobody = Access { group: None };
        let group = Access { group: Some(77) };
        let judged = |uid, gid, access| judge((uid, gid), 1000, access).is_ok();
        assert!(judged(0, 0, nobody));
        assert!(judged(1000, 5, nobody));
        assert!(!judged(4_000_001, 5, nobody));
        assert!(!judged(4_000_001, 0, nobody), "root's group is not root");
        assert!(judged(4_000_001, 77, group));
        assert!(!judged(4_000_001, 78, group));
    }

    #[test]
    fn membership_is_that_of_the_user_database() {
        assert!(is_member(0, 0));
        assert!(!is_member(0, 4_000_001));
        assert!(!is_member(4_000_001, 0));
    }
}
