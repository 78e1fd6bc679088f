//! Hot-plugs into a QEMU that runs: a socket chardev that reconnects, and a vhost-user-blk device.

use super::qmp::Qmp;
use super::{Result, device_id, queues_for};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};
use vflash::control::api::{Attachment, ErrorCode, Failure};

/// From this version on QEMU counts milliseconds; until then seconds.
const RECONNECT_MS_SINCE: (u64, u64) = (9, 2);

/// After DEVICE_DELETED a chardev stays in use for as long as QEMU takes to let the device go.
const CHARDEV_RETRY: Duration = Duration::from_millis(20);

/// Where devices with and without a name stand in QEMU's object tree.
const PERIPHERALS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

pub(super) fn attach(
    socket: &Path,
    attachment: &Attachment,
    queues: Option<u16>,
    bus: Option<&str>,
) -> Result<()> {
    let mut qmp = Qmp::connect(socket)?;
    let id = device_id(&attachment.name)?;
    let chardev = chardev_id(&id);
    let version = qmp.execute("query-version", json!({}))?;
    let cpus = qmp.execute("query-cpus-fast", json!({}))?;
    let queues = queues_for(cpus.as_array().map_or(1, Vec::len), queues, attachment);
    refuse_private_memory(&mut qmp)?;
    let buses = match bus {
        Some(bus) => vec![Some(bus.to_owned())],
        None => free_ports(&mut qmp)?,
    };
    qmp.execute("chardev-add", chardev_add(&chardev, &attachment.socket, &version["qemu"]))?;
    let added = add_device(&mut qmp, buses, |bus| {
        let mut device = json!({
            "driver": "vhost-user-blk-pci",
            "id": id,
            "chardev": chardev,
            "num-queues": queues,
            "queue-size": attachment.queue_size,
        });
        if let Some(bus) = bus {
            device["bus"] = json!(bus);
        }
        device
    });
    if added.is_err() {
        // The device's failure is the one to tell; the chardev must not stay for the next attempt.
        let _ = qmp.attempt("chardev-remove", json!({"id": chardev}));
    }
    added
}

/// QEMU plugs the device in all the same, and the guest then waits for its first read for ever.
fn refuse_private_memory(qmp: &mut Qmp) -> Result<()> {
    let memory = qmp.execute("query-memdev", json!({}))?;
    let shared = |backend: &Value| backend["share"] == json!(true);
    if memory.as_array().into_iter().flatten().any(shared) {
        return Ok(());
    }
    let text = "the VM's memory is not shared: start it with -object \
                memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem, SIZE \
                as that of -m";
    Err(Failure::new(ErrorCode::Unsupported, text))
}

fn chardev_id(device: &str) -> String {
    format!("{device}.chardev")
}

fn chardev_add(id: &str, socket: &str, version: &Value) -> Value {
    let version = (version["major"].as_u64().unwrap_or(0), version["minor"].as_u64().unwrap_or(0));
    let mut data = json!({
        "addr": {"type": "unix", "data": {"path": socket}},
        "server": false,
    });
    if version >= RECONNECT_MS_SINCE {
        data["reconnect-ms"] = json!(200);
    } else {
        data["reconnect"] = json!(1);
    }
    json!({"id": id, "backend": {"type": "socket", "data": data}})
}

/// Tries the buses in turn: one that looks free may be taken by a device we do not see.
fn add_device(
    qmp: &mut Qmp,
    buses: Vec<Option<String>>,
    device: impl Fn(Option<&str>) -> Value,
) -> Result<()> {
    let mut last = None;
    for bus in &buses {
        match qmp.attempt("device_add", device(bus.as_deref()))? {
            Ok(_) => return Ok(()),
            Err(refused) => {
                let taken = refused.description.contains("not available");
                last = Some(refused);
                if !taken {
                    break;
                }
            }
        }
    }
    let refused = last.map_or("no PCIe root port is free".to_owned(), |last| last.description);
    let advice = if refused.contains("hotplug") || refused.contains("free") {
        ": start the VM with `-device pcie-root-port,id=rp1,chassis=1` to spare, or name a bus by \
         --bus"
    } else {
        ""
    };
    Err(Failure::new(ErrorCode::Io, format!("QEMU did not take the device: {refused}{advice}")))
}

/// Root ports without a device behind them. A machine without root ports gets one entry, None:
/// its default bus takes devices, or QEMU says why not.
fn free_ports(qmp: &mut Qmp) -> Result<Vec<Option<String>>> {
    let (mut ports, mut taken) = (BTreeSet::new(), BTreeSet::new());
    for container in PERIPHERALS {
        let objects = qmp.execute("qom-list", json!({"path": container}))?;
        for object in objects.as_array().into_iter().flatten() {
            let (Some(name), Some(kind)) = (object["name"].as_str(), object["type"].as_str())
            else {
                continue;
            };
            let Some(kind) = kind.strip_prefix("child<") else { continue };
            if kind == "pcie-root-port>" && container == PERIPHERALS[0] {
                ports.insert(name.to_owned());
            }
            let path = format!("{container}/{name}");
            let bus = qmp.attempt("qom-get", json!({"path": path, "property": "parent_bus"}))?;
            if let Some(bus) = bus.ok().as_ref().and_then(Value::as_str) {
                // `/machine/peripheral/rp1/rp1`: a port's bus has its name.
                taken.extend(bus.rsplit('/').next().map(str::to_owned));
            }
        }
    }
    if ports.is_empty() {
        return Ok(vec![None]);
    }
    Ok(ports.difference(&taken).cloned().map(Some).collect())
}

pub(super) fn detach(socket: &Path, id: &str, timeout: Duration) -> Result<()> {
    let mut qmp = Qmp::connect(socket)?;
    let deadline = Instant::now() + timeout;
    qmp.execute("device_del", json!({"id": id}))?;
    wait_deleted(&mut qmp, id, deadline, timeout)?;
    loop {
        match qmp.attempt("chardev-remove", json!({"id": chardev_id(id)}))? {
            Ok(_) => return Ok(()),
            Err(refused) if refused.description.contains("busy") && Instant::now() < deadline => {
                std::thread::sleep(CHARDEV_RETRY);
            }
            // Attached by other hands, with a chardev named otherwise: the device is gone.
            Err(refused) if refused.description.contains("not found") => return Ok(()),
            Err(refused) => return Err(refused.into()),
        }
    }
}

/// The guest is asked to let go, and may refuse or be too busy.
fn wait_deleted(qmp: &mut Qmp, id: &str, deadline: Instant, timeout: Duration) -> Result<()> {
    while let Some(event) = qmp.event(deadline)? {
        if event["data"]["device"] != json!(id) {
            continue;
        }
        match event["event"].as_str() {
            Some("DEVICE_DELETED") => return Ok(()),
            Some("DEVICE_UNPLUG_GUEST_ERROR") => {
                let text = format!("the guest refuses to let {id} go: unmount it there first");
                return Err(Failure::new(ErrorCode::Busy, text));
            }
            _ => {}
        }
    }
    let text = format!(
        "the guest did not let {id} go within {}s: it may be in use there, or the guest is not \
         running; try again, or with a longer --timeout",
        timeout.as_secs()
    );
    Err(Failure::new(ErrorCode::Timeout, text))
}

#[cfg(test)]
#[path = "qemu_test.rs"]
mod tests;
