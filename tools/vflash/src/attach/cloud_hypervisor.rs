//! Hot-plugs into a cloud-hypervisor that runs, over its HTTP API.

use super::{Result, device_id, queues_for};
use crate::http::{Failed, Patience, request};
use hyper::Method;
use serde_json::{Value, json};
use std::path::Path;
use vflash::control::api::{Attachment, ErrorCode, Failure};

pub(super) fn attach(socket: &Path, attachment: &Attachment, queues: Option<u16>) -> Result<()> {
    let info = call(socket, Method::GET, "/api/v1/vm.info", None)?;
    let config = &info["config"];
    if config["memory"]["shared"] == json!(false) && config["memory"]["hugepages"] != json!(true) {
        let text = "the VM's memory is not shared: start it with --memory size=…,shared=on";
        return Err(Failure::new(ErrorCode::Unsupported, text));
    }
    let cpus = config["cpus"]["boot_vcpus"].as_u64().unwrap_or(1) as usize;
    let disk = json!({
        "id": device_id(&attachment.name)?,
        "vhost_user": true,
        "vhost_socket": attachment.socket,
        "num_queues": queues_for(cpus, queues, attachment),
        "queue_size": attachment.queue_size,
    });
    call(socket, Method::PUT, "/api/v1/vm.add-disk", Some(&disk)).map(drop)
}

pub(super) fn detach(socket: &Path, id: &str) -> Result<()> {
    let device = json!({"id": id});
    call(socket, Method::PUT, "/api/v1/vm.remove-device", Some(&device)).map(drop)
}

fn call(socket: &Path, method: Method, path: &str, body: Option<&Value>) -> Result<Value> {
    let place = format!("cloud-hypervisor on {}", socket.display());
    let body = body.map(|body| body.to_string().into_bytes());
    let answer = request(socket, method, path, body, Patience::Work).map_err(|failed| {
        let text = match failed {
            Failed::Unreachable(cause) => format!(
                "cannot reach {place}: {}: name the socket that it was given as --api-socket",
                cause.0
            ),
            Failed::Silent(_) => format!("{place} does not answer"),
            Failed::Broken(text) => format!("{place}: {text}"),
        };
        Failure::new(ErrorCode::Io, text)
    })?;
    if !answer.status.is_success() {
        let text = String::from_utf8_lossy(&answer.body);
        let text = format!("{place} refused {path}: {}: {}", answer.status, text.trim());
        return Err(Failure::new(ErrorCode::Io, text));
    }
    if answer.body.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&answer.body).map_err(|error| {
        Failure::new(ErrorCode::Io, format!("{place}: the answer to {path} is no JSON: {error}"))
    })
}

#[cfg(test)]
#[path = "cloud_hypervisor_test.rs"]
mod tests;
