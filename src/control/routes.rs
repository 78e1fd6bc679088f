//! Every route of the API, as a table: the router is built from it, the test of openapi.yaml walks
//! it.

use super::api::{Change, ClosePool, CreatePool, ErrorCode, Events, Failure, Reclaim, Resize};
use super::api_cached::{Detach, Drain, Mark, SetMode};
use super::engine::Engine;
use axum::body::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

pub type Answer = std::result::Result<Reply, Failure>;

/// A request whose head and body have arrived.
pub struct Call {
    /// Values of the `{…}` of the path, in order.
    pub path: Vec<String>,
    pub query: HashMap<String, String>,
    pub body: Bytes,
}

pub struct Reply {
    pub content_type: &'static str,
    pub body: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Get,
    Post,
}

pub struct Route {
    pub method: Method,
    pub path: &'static str,
    /// Its `operationId`.
    pub operation: &'static str,
    /// Runs on a thread that may block.
    pub handler: fn(&Engine, &Call) -> Answer,
}

impl Route {
    /// What it says is right also before everything that was served before is served again.
    pub fn answers_at_once(&self) -> bool {
        matches!(self.operation, "health" | "metrics" | "openapi" | "status" | "events")
    }
}

const fn get(
    path: &'static str,
    operation: &'static str,
    handler: fn(&Engine, &Call) -> Answer,
) -> Route {
    Route { method: Method::Get, path, operation, handler }
}

const fn post(
    path: &'static str,
    operation: &'static str,
    handler: fn(&Engine, &Call) -> Answer,
) -> Route {
    Route { method: Method::Post, path, operation, handler }
}

/// `GET /v1/events` waits, so it is served beside the table's handlers: see [`events`].
pub const EVENTS: &str = "/v1/events";

pub const ROUTES: &[Route] = &[
    get("/healthz", "health", |engine, _| json(&engine.health())),
    get("/metrics", "metrics", |engine, _| Ok(text(engine.prometheus()))),
    get("/v1/openapi.json", "openapi", |_, _| json(&super::openapi::document()?)),
    get("/v1/status", "status", |engine, _| json(&engine.status())),
    get(EVENTS, "events", |engine, call| json(&engine.events().since(after(call)?))),
    get("/v1/pools", "listPools", |engine, _| json(&engine.pools())),
    post("/v1/pools", "createPool", |engine, call| {
        json(&engine.create_pool(&body::<CreatePool>(call)?)?)
    }),
    get("/v1/pools/{pool}", "showPool", |engine, call| json(&engine.pool(part(call, 0)?)?)),
    post("/v1/pools/{pool}/check", "checkPool", |engine, call| {
        json(&engine.check_pool(part(call, 0)?)?)
    }),
    post("/v1/pools/{pool}/grow", "growPool", |engine, call| {
        json(&engine.grow_pool(part(call, 0)?)?)
    }),
    post("/v1/pools/{pool}/close", "closePool", |engine, call| {
        json(&engine.close(part(call, 0)?, &body::<ClosePool>(call)?)?)
    }),
    get("/v1/volumes", "listVolumes", |engine, _| json(&engine.volumes())),
    get("/v1/volumes/{vm}/{volume}", "showVolume", |engine, call| {
        json(&engine.volume(&volume_name(call)?)?)
    }),
    get("/v1/volumes/{vm}/{volume}/attachment", "attachment", |engine, call| {
        json(&engine.attachment(&volume_name(call)?)?)
    }),
    post("/v1/volumes/{vm}/{volume}/resize", "resizeVolume", |engine, call| {
        json(&engine.resize(&volume_name(call)?, &body::<Resize>(call)?)?)
    }),
    post("/v1/volumes/{vm}/{volume}/reclaim", "reclaimVolume", |engine, call| {
        json(&engine.reclaim(&volume_name(call)?, &body::<Reclaim>(call)?)?)
    }),
    post("/v1/volumes/{vm}/{volume}/drain", "drain", |engine, call| {
        json(&engine.drain(&volume_name(call)?, &body::<Drain>(call)?)?)
    }),
    get("/v1/volumes/{vm}/{volume}/points", "points", |engine, call| {
        json(&engine.points(&volume_name(call)?)?)
    }),
    get("/v1/volumes/{vm}/{volume}/curve", "curve", |engine, call| {
        json(&engine.curve(&volume_name(call)?)?)
    }),
    get("/v1/advice", "advice", |engine, call| json(&engine.advice(number(call, "stepBytes")?)?)),
    post("/v1/volumes/{vm}/{volume}/mark", "mark", |engine, call| {
        json(&engine.mark(&volume_name(call)?, &body::<Mark>(call)?)?)
    }),
    post("/v1/volumes/{vm}/{volume}/checkpoint", "checkpoint", |engine, call| {
        json(&engine.checkpoint(&volume_name(call)?)?)
    }),
    post("/v1/volumes/{vm}/{volume}/mode", "setMode", |engine, call| {
        json(&engine.set_mode(&volume_name(call)?, &body::<SetMode>(call)?)?)
    }),
    post("/v1/volumes/{vm}/{volume}/detach", "detach", |engine, call| {
        json(&engine.detach(&volume_name(call)?, &body::<Detach>(call)?)?)
    }),
    get("/v1/manifest", "manifest", |engine, _| json(&engine.manifest()?)),
    post("/v1/apply", "apply", |engine, call| json(&engine.apply(&body::<Change>(call)?)?)),
    post("/v1/diff", "diff", |engine, call| json(&engine.diff(&body::<Change>(call)?)?)),
    post("/v1/delete", "delete", |engine, call| json(&engine.delete(&body::<Change>(call)?)?)),
];

/// The longest that a follower of events may ask to wait.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// Events after the asked-for number; waits for one if there is none and `waitSeconds` is given.
pub async fn events(engine: Arc<Engine>, call: Call) -> Answer {
    let after = after(&call)?;
    let wait = Duration::from_secs(number(&call, "waitSeconds")?.unwrap_or(0)).min(WAIT_MAX);
    let mut newest = engine.events().follow();
    let answer: Events = engine.events().since(after);
    if answer.events.is_empty() && !wait.is_zero() {
        // Either outcome is answered with what there is by then.
        let _ = tokio::time::timeout(wait, newest.wait_for(|number| *number > answer.last)).await;
    }
    json(&engine.events().since(after))
}

fn after(call: &Call) -> Result<u64, Failure> {
    Ok(number(call, "after")?.unwrap_or(0))
}

fn number(call: &Call, name: &str) -> Result<Option<u64>, Failure> {
    let Some(text) = call.query.get(name) else { return Ok(None) };
    let failure = |_| invalid(format!("`{name}={text}`: write a number"));
    text.parse().map(Some).map_err(failure)
}

fn part(call: &Call, index: usize) -> Result<&str, Failure> {
    let missing = || Failure::new(ErrorCode::Internal, "the route lacks a part of its path");
    call.path.get(index).map(String::as_str).ok_or_else(missing)
}

fn volume_name(call: &Call) -> Result<String, Failure> {
    Ok(format!("{}/{}", part(call, 0)?, part(call, 1)?))
}

fn body<T: DeserializeOwned>(call: &Call) -> Result<T, Failure> {
    serde_json::from_slice(&call.body).map_err(|error| {
        invalid(format!("the request body is not what openapi.json asks: {error}"))
    })
}

fn invalid(message: String) -> Failure {
    Failure::new(ErrorCode::Invalid, message)
}

fn text(body: String) -> Reply {
    Reply { content_type: "text/plain; version=0.0.4", body: body.into_bytes() }
}

pub fn json<T: Serialize>(value: &T) -> Answer {
    let mut body = serde_json::to_vec(value)
        .map_err(|error| Failure::new(ErrorCode::Internal, error.to_string()))?;
    body.push(b'\n');
    Ok(Reply { content_type: "application/json", body })
}
