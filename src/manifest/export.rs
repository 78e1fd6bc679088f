//! What exists, as the manifest that wants it: to start one from, or to make it all anew elsewhere.

use super::plan::{Actual, ActualPool, ActualVolume, Role};
use super::schema::{API_VERSION, Device, POOL_BYTES_MIN};
use super::settings::{Access, CacheSettings, CacheShare, Limits, Principal, VolumeSettings};
use crate::base::units::{Bytes, EXTENT_BYTES};
use serde_yaml::{Mapping, Value};
use std::collections::BTreeMap;

/// A manifest of all pools and machines, in the order of names; planning it against `actual` gives
/// no step, and on an empty host makes the same.
pub fn to_yaml(actual: &Actual) -> String {
    let mut machines: BTreeMap<&str, Vec<&ActualVolume>> = BTreeMap::new();
    for volume in actual.volumes.iter().filter(|volume| is_declared(volume)) {
        machines.entry(volume.name.machine.as_str()).or_default().push(volume);
    }
    let mut pools: Vec<&ActualPool> = actual.pools.iter().collect();
    pools.sort_by(|a, b| a.name.cmp(&b.name));
    let pools = pools.into_iter().map(|pool| document("Pool", &pool.name, self::pool(pool)));
    let machines = machines.into_iter().map(|(name, mut volumes)| {
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        document("VirtualMachine", name, machine(&volumes, actual))
    });
    let texts: Vec<String> = pools.chain(machines).map(|document| text(&document)).collect();
    texts.join("---\n")
}

#[allow(clippy::expect_used)]
fn text(document: &Mapping) -> String {
    serde_yaml::to_string(document).expect("mappings of strings and numbers can be written")
}

fn mapping<const N: usize>(entries: [(&str, Value); N]) -> Mapping {
    entries.into_iter().map(|(key, value)| (key.into(), value)).collect()
}

fn document(kind: &str, name: &str, spec: Mapping) -> Mapping {
    mapping([
        ("apiVersion", API_VERSION.into()),
        ("kind", kind.into()),
        ("metadata", mapping([("name", name.into())]).into()),
        ("spec", spec.into()),
    ])
}

fn pool(pool: &ActualPool) -> Mapping {
    let mut spec = mapping([("device", pool.device.to_string().into())]);
    // A file that is missing is made with its size; one that a manifest cannot make has no size.
    let made = pool.size_bytes >= POOL_BYTES_MIN && pool.size_bytes.is_multiple_of(EXTENT_BYTES);
    if let Device::Path(path) = &pool.device
        && !path.starts_with("/dev")
        && made
    {
        spec.insert("size".into(), Bytes(pool.size_bytes).to_string().into());
    }
    spec
}

/// It stands among its machine's volumes, not in another's `sharedWith`.
fn is_declared(volume: &ActualVolume) -> bool {
    !matches!(volume.role, Role::Left | Role::Door { granted: true, .. })
}

/// The volume that brings the disk's cache: another one's, where its own machine has left it.
fn home<'a>(volume: &'a ActualVolume, actual: &'a Actual) -> Option<&'a ActualVolume> {
    let Role::Door { of, .. } = &volume.role else { return Some(volume) };
    let home = actual.volumes.iter().find(|home| home.name == *of)?;
    let first = actual
        .volumes
        .iter()
        .filter(|door| is_declared(door))
        .find(|door| matches!(&door.role, Role::Door { of: other, .. } if other == of))?;
    (home.role == Role::Left && first.name == volume.name).then_some(home)
}

fn machine(volumes: &[&ActualVolume], actual: &Actual) -> Mapping {
    let mut spec = Mapping::new();
    // The manifest gives access by machine; volumes differ only if someone changed one by hand.
    if let Some(access) = volumes.first().map(|volume| access(&volume.settings.access))
        && !access.is_empty()
    {
        spec.insert("access".into(), access.into());
    }
    let volumes: Vec<Value> = volumes.iter().map(|one| volume(one, actual).into()).collect();
    spec.insert("volumes".into(), volumes.into());
    spec
}

fn volume(actual: &ActualVolume, all: &Actual) -> Mapping {
    let VolumeSettings { limits, queues, read_only, pin_memory, when_full, access: _, cache: _ } =
        &actual.settings;
    let home = home(actual, all);
    let of = match &actual.role {
        Role::Door { of, .. } => all.volumes.iter().find(|home| home.name == *of),
        Role::Own | Role::Left => Some(actual),
    };
    let mut flash = mapping([
        ("pool", actual.pool.as_str().into()),
        ("size", Bytes(actual.size_bytes).to_string().into()),
        ("class", actual.class.name().into()),
    ]);
    if actual.thin {
        flash.insert("thin".into(), true.into());
        flash.insert("whenFull".into(), when_full.name().into());
    }
    let mut volume = mapping([("name", actual.name.volume.as_str().into())]);
    match of.and_then(|of| of.settings.cache.as_ref()) {
        None => drop(volume.insert("flash".into(), flash.into())),
        Some(cache) => {
            if let Some(home) = home {
                volume.insert("cache".into(), self::cache(home, cache).into());
            }
            volume.insert("backing".into(), cache.backing.as_str().into());
        }
    }
    let granted = Role::Door { of: actual.name.clone(), granted: true };
    let granted = all.volumes.iter().filter(|door| door.role == granted);
    let granted: Vec<Value> = granted.map(|door| door.name.machine.as_str().into()).collect();
    if !granted.is_empty() {
        volume.insert("sharedWith".into(), granted.into());
    }
    let limits = self::limits(limits);
    if !limits.is_empty() {
        volume.insert("limits".into(), limits.into());
    }
    if let Some(queues) = queues {
        volume.insert("queues".into(), (*queues).into());
    }
    if *read_only {
        volume.insert("readOnly".into(), true.into());
    }
    if *pin_memory {
        volume.insert("pinMemory".into(), true.into());
    }
    volume
}

fn cache(actual: &ActualVolume, cache: &CacheSettings) -> Mapping {
    let CacheSettings {
        mode,
        drain,
        staleness_ms,
        durability,
        backing_timeout_ms,
        write_budget_bytes,
        backing: _,
        sidecar,
        consistency_group,
        share,
    } = cache;
    let mut mapping = mapping([
        ("pool", actual.pool.as_str().into()),
        ("size", Bytes(actual.size_bytes).to_string().into()),
        ("mode", mode.name().into()),
    ]);
    if let Some(drain) = drain {
        mapping.insert("drain".into(), drain.name().into());
    }
    if let Some(staleness_ms) = staleness_ms {
        mapping.insert("maxStaleness".into(), format!("{staleness_ms}ms").into());
    }
    mapping.insert("durability".into(), durability.name().into());
    if let Some(timeout_ms) = backing_timeout_ms {
        mapping.insert("backingTimeout".into(), format!("{timeout_ms}ms").into());
    }
    if let Some(group) = consistency_group {
        mapping.insert("consistencyGroup".into(), group.as_str().into());
    }
    if let Some(bytes) = write_budget_bytes {
        mapping.insert("flashWriteBudget".into(), Bytes(*bytes).to_string().into());
    }
    if let Some(sidecar) = sidecar {
        mapping.insert("sidecar".into(), sidecar.as_str().into());
    }
    if let Some(CacheShare { minimum_bytes, maximum_bytes, weight }) = share {
        mapping.insert("minimum".into(), Bytes(*minimum_bytes).to_string().into());
        mapping.insert("maximum".into(), Bytes(*maximum_bytes).to_string().into());
        mapping.insert("weight".into(), (*weight).into());
    }
    mapping
}

/// Empty if nothing is limited.
fn limits(limits: &Limits) -> Mapping {
    let Limits { iops, bandwidth, burst_ms } = limits;
    let mut mapping = Mapping::new();
    if let Some(iops) = iops {
        mapping.insert("iops".into(), (*iops).into());
    }
    if let Some(bandwidth) = bandwidth {
        mapping.insert("bandwidth".into(), format!("{}/s", Bytes(*bandwidth)).into());
    }
    if !mapping.is_empty() {
        mapping.insert("burst".into(), format!("{burst_ms}ms").into());
    }
    mapping
}

/// Empty if it is the default.
fn access(access: &Access) -> Mapping {
    let Access { owner, group, mode } = access;
    let mut mapping = Mapping::new();
    if *access == Access::default() {
        return mapping;
    }
    let who = |who: &Principal| match who {
        Principal::Id(id) => Value::from(*id),
        Principal::Name(name) => name.as_str().into(),
    };
    if let Some(owner) = owner {
        mapping.insert("owner".into(), who(owner));
    }
    if let Some(group) = group {
        mapping.insert("group".into(), who(group));
    }
    mapping.insert("mode".into(), format!("{mode:04o}").into());
    mapping
}
