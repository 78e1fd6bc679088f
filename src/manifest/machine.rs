//! `kind: VirtualMachine`: its volumes, flash or cached, and who may connect to them.

use super::decode::{Decoder, Fields};
use super::document::claim;
use super::mistake::{Located, Place, Position};
use super::schema::{
    Backing, CacheMode, Cached, Class, Drain, Durability, Flash, Storage, VirtualMachine, Volume,
};
use super::settings::{Access, CacheShare, Limits, VolumeSettings, WhenFull};
use super::tree::{Node, Value};
use super::value;
use crate::base::limits::QUEUES_MAX;
use crate::base::units::Bytes;
use std::collections::HashMap;

use std::time::Duration;

/// Requests per second; no drive does more.
const IOPS_MAX: u64 = 1_000_000_000;

/// A hit of one disk counts as much as so many of another, at most.
const WEIGHT_MAX: u32 = 1000;

const BURST_MAX: Duration = Duration::from_secs(60);
const STALENESS_MAX: Duration = Duration::from_secs(24 * 60 * 60);
const BACKING_TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

pub(super) fn machine(
    spec: &Node,
    at: Position,
    name: Option<Located<String>>,
    decoder: &mut Decoder<'_>,
) -> Option<VirtualMachine> {
    let keys = ["volumes", "access"];
    let fields = decoder.fields(spec, at, "the spec of a VirtualMachine", &keys)?;
    let access = decoder.optional(&fields, "access", |decoder, node| {
        access(node, fields.key_at("access"), decoder)
    });
    let example = "volumes: [{name: scratch, flash: {pool: nvme0, size: 64GiB}}]";
    let list = decoder.required(&fields, "volumes", example)?;
    let Value::List(items) = &list.value else {
        decoder.mistake(list.at, format!("`volumes` is a list: write `{example}`"));
        return None;
    };
    let mut names = HashMap::new();
    let mut volumes = Vec::new();
    for item in items {
        if decoder.mistakes.full() {
            return None;
        }
        volumes.push(volume(item, &mut names, decoder));
    }
    let access = access?.unwrap_or_default();
    let mut volumes = volumes.into_iter().collect::<Option<Vec<Volume>>>()?;
    volumes.iter_mut().for_each(|volume| volume.settings.access = access.clone());
    Some(VirtualMachine { name: name?, volumes })
}

/// A volume, all but its access.
fn volume(
    item: &Node,
    names: &mut HashMap<String, Place>,
    decoder: &mut Decoder<'_>,
) -> Option<Volume> {
    let keys = [
        "name",
        "flash",
        "cache",
        "backing",
        "sharedWith",
        "readOnly",
        "queues",
        "limits",
        "pinMemory",
    ];
    let fields = decoder.fields(item, item.at, "a volume", &keys)?;
    let name = decoder
        .required(&fields, "name", "name: scratch")
        .and_then(|node| decoder.located_scalar(node, value::name));
    let new = claim(names, name.as_ref(), "volume", decoder);
    let read_only = decoder.optional(&fields, "readOnly", Decoder::truth);
    let pin_memory = decoder.optional(&fields, "pinMemory", Decoder::truth);
    let storage = storage(&fields, read_only == Some(Some(true)), decoder);
    let shared_with = decoder
        .optional(&fields, "sharedWith", |decoder, node| shared_with(node, &fields, decoder));
    let queues = decoder.optional(&fields, "queues", |decoder, node| {
        let max = QUEUES_MAX as u64;
        let count = decoder.scalar(node, |text, plain| value::whole(text, plain, 1, max))?;
        u16::try_from(count).ok()
    });
    let limits = decoder.optional(&fields, "limits", |decoder, node| {
        limits(node, fields.key_at("limits"), decoder)
    });
    let (storage, when_full) = storage?;
    let cache = match &storage {
        Storage::Flash(_) | Storage::Shared(_) => None,
        Storage::Cached(cached) => Some(cached.settings()),
    };
    let settings = VolumeSettings {
        limits: limits?.unwrap_or_default(),
        queues: queues?,
        read_only: read_only?.unwrap_or_default(),
        pin_memory: pin_memory?.unwrap_or_default(),
        when_full,
        access: Access::default(),
        cache,
    };
    let shared_with = shared_with?.unwrap_or_default();
    new.then_some(Volume { name: name?, storage, shared_with, settings })
}

/// Names of other machines, each once.
fn shared_with(
    node: &Node,
    volume: &Fields<'_>,
    decoder: &mut Decoder<'_>,
) -> Option<Vec<Located<String>>> {
    if volume.get("cache").is_none() {
        let text = "`sharedWith` is for a cached disk, and stands where its `cache` is";
        decoder.mistake(volume.key_at("sharedWith"), text);
        return None;
    }
    let Value::List(items) = &node.value else {
        let text = "`sharedWith` is a list of machines: write `sharedWith: [web-2, web-3]`";
        decoder.mistake(node.at, text);
        return None;
    };
    let mut names = HashMap::new();
    let mut machines = Vec::new();
    for item in items {
        let name = decoder.located_scalar(item, value::name);
        let new = claim(&mut names, name.as_ref(), "machine", decoder);
        machines.push(name.filter(|_| new));
    }
    machines.into_iter().collect()
}

fn storage(
    fields: &Fields<'_>,
    read_only: bool,
    decoder: &mut Decoder<'_>,
) -> Option<(Storage, WhenFull)> {
    if fields.get("cache").is_some() {
        if fields.get("flash").is_some() {
            let text = "a volume has either `flash` or `cache` with `backing`: remove one";
            decoder.mistake(fields.key_at("flash"), text);
            return None;
        }
        let cached = cached(fields, read_only, decoder)?;
        return Some((Storage::Cached(Box::new(cached)), WhenFull::default()));
    }
    if let Some(node) = fields.get("backing") {
        if fields.get("flash").is_none() {
            let shared = Storage::Shared(backing(node, decoder)?);
            return Some((shared, WhenFull::default()));
        }
        let text = "`backing` is for a cached disk: add `cache: {pool: nvme0, size: 16GiB}`, or \
                    leave it out";
        decoder.mistake(fields.key_at("backing"), text);
    }
    let node = decoder.required(fields, "flash", "flash: {pool: nvme0, size: 64GiB}")?;
    let (flash, when_full) = flash(node, fields.key_at("flash"), decoder)?;
    Some((Storage::Flash(flash), when_full))
}

fn flash(node: &Node, at: Position, decoder: &mut Decoder<'_>) -> Option<(Flash, WhenFull)> {
    let keys = ["pool", "size", "class", "thin", "whenFull"];
    let fields = decoder.fields(node, at, "`flash`", &keys)?;
    let (pool, size) = pool_and_size(&fields, decoder);
    let class = decoder.optional(&fields, "class", |decoder, node| {
        let words = [("volatile", Class::Volatile), ("nonvolatile", Class::Nonvolatile)];
        let class = decoder.choice(node, &words)?;
        Some(decoder.located(node.at, class))
    });
    let thin = decoder.optional(&fields, "thin", |decoder, node| {
        let thin = decoder.truth(node)?;
        Some(decoder.located(node.at, thin))
    });
    let when_full = decoder.optional(&fields, "whenFull", |decoder, node| {
        decoder.choice(node, &[("wait", WhenFull::Wait), ("enospc", WhenFull::Enospc)])
    });
    if fields.get("whenFull").is_some()
        && let Some(thin) = &thin
        && !thin.as_ref().is_some_and(|thin| thin.value)
    {
        let text =
            "only a thin volume meets a full pool: add `thin: true`, or leave `whenFull` out";
        decoder.mistake(fields.key_at("whenFull"), text);
        return None;
    }
    let class = class?.unwrap_or_else(|| decoder.located(at, Class::default()));
    let thin = thin?.unwrap_or_else(|| decoder.located(at, false));
    Some((Flash { pool: pool?, size: size?, class, thin }, when_full?.unwrap_or_default()))
}

type PoolAndSize = (Option<Located<String>>, Option<Located<u64>>);

/// What `flash` and `cache` have in common.
fn pool_and_size(fields: &Fields<'_>, decoder: &mut Decoder<'_>) -> PoolAndSize {
    let pool = decoder
        .required(fields, "pool", "pool: nvme0")
        .and_then(|node| decoder.located_scalar(node, value::name));
    let size = decoder
        .required(fields, "size", "size: 64GiB")
        .and_then(|node| decoder.located_scalar(node, |text, _| value::size(text)));
    (pool, size)
}

fn limits(node: &Node, at: Position, decoder: &mut Decoder<'_>) -> Option<Limits> {
    let fields = decoder.fields(node, at, "`limits`", &["iops", "bandwidth", "burst"])?;
    let iops = decoder.optional(&fields, "iops", |decoder, node| {
        decoder.scalar(node, |text, plain| value::whole(text, plain, 1, IOPS_MAX))
    });
    let bandwidth = decoder.optional(&fields, "bandwidth", |decoder, node| {
        decoder.scalar(node, |text, _| value::bandwidth(text))
    });
    let burst = decoder.optional(&fields, "burst", |decoder, node| {
        decoder.scalar(node, |text, _| value::duration(text, BURST_MAX))
    });
    if fields.lacks("iops") && fields.lacks("bandwidth") {
        let at = if fields.lacks("burst") { at } else { fields.key_at("burst") };
        let text = "this limits nothing: give `limits` its `iops` or `bandwidth`, or leave it out";
        decoder.mistake(at, text);
        return None;
    }
    let default = Limits::default();
    let burst_ms = burst?.and_then(|burst| u64::try_from(burst.as_millis()).ok());
    let burst_ms = burst_ms.unwrap_or(default.burst_ms);
    Some(Limits { iops: iops?, bandwidth: bandwidth?, burst_ms })
}

fn access(node: &Node, at: Position, decoder: &mut Decoder<'_>) -> Option<Access> {
    let fields = decoder.fields(node, at, "`access`", &["owner", "group", "mode"])?;
    let owner =
        decoder.optional(&fields, "owner", |decoder, node| decoder.scalar(node, value::principal));
    let group =
        decoder.optional(&fields, "group", |decoder, node| decoder.scalar(node, value::principal));
    let mode = decoder.optional(&fields, "mode", |decoder, node| decoder.scalar(node, value::mode));
    let default = Access::default();
    Some(Access { owner: owner?, group: group?, mode: mode?.unwrap_or(default.mode) })
}

fn backing(node: &Node, decoder: &mut Decoder<'_>) -> Option<Located<Backing>> {
    let directory = decoder.directory;
    decoder.located_scalar(node, |text, plain| value::backing(text, plain, directory))
}

const CACHE_KEYS: [&str; 13] = [
    "pool",
    "size",
    "mode",
    "drain",
    "maxStaleness",
    "consistencyGroup",
    "durability",
    "backingTimeout",
    "flashWriteBudget",
    "sidecar",
    "minimum",
    "maximum",
    "weight",
];

/// `cache:` and `backing:` of a volume.
fn cached(volume: &Fields<'_>, read_only: bool, decoder: &mut Decoder<'_>) -> Option<Cached> {
    let directory = decoder.directory;
    let example = "backing: /mnt/nfs/web-1.raw";
    let backing =
        decoder.required(volume, "backing", example).and_then(|node| backing(node, decoder));
    let example = "cache: {pool: nvme0, size: 16GiB}";
    let node = decoder.required(volume, "cache", example)?;
    let at = volume.key_at("cache");
    let fields = decoder.fields(node, at, "`cache`", &CACHE_KEYS)?;
    let (pool, size) = pool_and_size(&fields, decoder);
    let share = share(&fields, size.as_ref(), decoder);
    let mode = decoder.optional(&fields, "mode", cache_mode);
    let drain = decoder.optional(&fields, "drain", |decoder, node| {
        decoder.choice(node, &[("grouped", Drain::Grouped), ("ordered", Drain::Ordered)])
    });
    let staleness_max = duration(&fields, "maxStaleness", STALENESS_MAX, decoder);
    let consistency_group = decoder.optional(&fields, "consistencyGroup", |decoder, node| {
        decoder.located_scalar(node, value::name)
    });
    let durability = decoder.optional(&fields, "durability", |decoder, node| {
        decoder.choice(node, &[("strong", Durability::Strong), ("flush", Durability::Flush)])
    });
    let backing_timeout = duration(&fields, "backingTimeout", BACKING_TIMEOUT_MAX, decoder);
    let write_budget = decoder.optional(&fields, "flashWriteBudget", |decoder, node| {
        decoder.scalar(node, |text, _| value::size(text))
    });
    let sidecar = decoder.optional(&fields, "sidecar", |decoder, node| {
        decoder.located_scalar(node, |text, plain| value::path(text, plain, directory))
    });
    let (mode, sidecar, backing) = (mode?, sidecar?, backing?);
    if read_only && !matches!(mode, None | Some(CacheMode::ReadOnly | CacheMode::Bypass)) {
        let text = "a read-only disk is cached for reading alone: leave `mode` out, or write \
                    `mode: read-only`";
        decoder.mistake(fields.key_at("mode"), text);
        return None;
    }
    let default = if read_only { CacheMode::ReadOnly } else { CacheMode::default() };
    let (mode, drain) = (mode.unwrap_or(default), drain?);
    let consistency_group = consistency_group?;
    if sidecar.is_none()
        && has_no_neighbour(&backing.value)
        && let Some((key, text)) =
            lacks_sidecar((mode, drain, consistency_group.is_some()), &backing.value)
    {
        let at = if key == "cache" { at } else { fields.key_at(key) };
        decoder.mistake(at, text);
        return None;
    }
    let given = CACHE_KEYS.into_iter().filter_map(|key| {
        let value = fields.get(key)?;
        Some((key, decoder.mistakes.place(value.at)))
    });
    let cached = Cached {
        place: decoder.mistakes.place(at),
        given: given.collect(),
        pool: pool?,
        size: size?,
        mode,
        drain,
        staleness_max: staleness_max?,
        consistency_group,
        durability: durability?.unwrap_or_default(),
        backing_timeout: backing_timeout?,
        write_budget: write_budget?,
        sidecar,
        share: share?,
        backing,
    };
    may_be_in_group(cached, &fields, at, decoder)
}

/// The disk, unless it is in a consistency group and other settings keep it out.
fn may_be_in_group(
    cached: Cached,
    fields: &Fields<'_>,
    at: Position,
    decoder: &mut Decoder<'_>,
) -> Option<Cached> {
    let Some((key, text)) = cached.settings().refuse_in_group() else { return Some(cached) };
    let at = if fields.lacks(key) { at } else { fields.key_at(key) };
    decoder.mistake(at, text);
    None
}

fn duration(
    fields: &Fields<'_>,
    key: &'static str,
    most: Duration,
    decoder: &mut Decoder<'_>,
) -> Option<Option<Duration>> {
    decoder.optional(fields, key, |decoder, node| {
        decoder.scalar(node, |text, _| value::duration(text, most))
    })
}

/// `minimum`, `maximum` and `weight`: what the first two leave out is the size.
fn share(
    fields: &Fields<'_>,
    size: Option<&Located<u64>>,
    decoder: &mut Decoder<'_>,
) -> Option<Option<CacheShare>> {
    let bytes =
        |decoder: &mut Decoder<'_>, node: &Node| decoder.scalar(node, |text, _| value::size(text));
    let minimum = decoder.optional(fields, "minimum", bytes);
    let maximum = decoder.optional(fields, "maximum", bytes);
    let weight = decoder.optional(fields, "weight", |decoder, node| {
        let max = u64::from(WEIGHT_MAX);
        let weight = decoder.scalar(node, |text, plain| value::whole(text, plain, 1, max))?;
        u32::try_from(weight).ok()
    });
    let (minimum, maximum, weight, size) = (minimum?, maximum?, weight?, size?.value);
    if minimum.is_none() && maximum.is_none() {
        if weight.is_some() {
            let text = "`weight` counts when caches share a pool: add `minimum` and `maximum`, \
                        between which its size follows its use, or leave it out";
            decoder.mistake(fields.key_at("weight"), text);
            return None;
        }
        return Some(None);
    }
    if let Some(minimum) = minimum.filter(|minimum| *minimum > size) {
        let (minimum, size) = (Bytes(minimum), Bytes(size));
        let text = format!("a `minimum` of {minimum} is above `size`, {size}: write at most that");
        decoder.mistake(fields.key_at("minimum"), text);
        return None;
    }
    if let Some(maximum) = maximum.filter(|maximum| *maximum < size) {
        let (maximum, size) = (Bytes(maximum), Bytes(size));
        let text = format!("a `maximum` of {maximum} is below `size`, {size}: write at least that");
        decoder.mistake(fields.key_at("maximum"), text);
        return None;
    }
    Some(Some(CacheShare {
        minimum_bytes: minimum.unwrap_or(size),
        maximum_bytes: maximum.unwrap_or(size),
        weight: weight.unwrap_or(1),
    }))
}

/// Which key wants a sidecar that cannot be beside the backing, and what to write.
fn lacks_sidecar(
    (mode, drain, grouped): (CacheMode, Option<Drain>, bool),
    backing: &Backing,
) -> Option<(&'static str, String)> {
    if grouped {
        let text = format!(
            "disks of a consistency group move by redo groups, and beside {backing} is no place \
             for them: add `sidecar: PATH` on the shared storage"
        );
        return Some(("consistencyGroup", text));
    }
    if matches!(mode, CacheMode::WriteBack | CacheMode::WriteThrough) {
        let text = format!(
            "{} needs a place for its stamp, and beside {backing} is none: add `sidecar: PATH` on \
             the shared storage, or `mode: write-around`",
            mode.name()
        );
        return Some(("cache", text));
    }
    (drain == Some(Drain::Grouped)).then(|| {
        let text = format!(
            "a grouped drain needs a place for its groups, and beside {backing} is none: add \
             `sidecar: PATH` on the shared storage, or `drain: ordered`"
        );
        ("drain", text)
    })
}

fn cache_mode(decoder: &mut Decoder<'_>, node: &Node) -> Option<CacheMode> {
    let words = [
        ("write-back", CacheMode::WriteBack),
        ("write-through", CacheMode::WriteThrough),
        ("write-around", CacheMode::WriteAround),
        ("read-only", CacheMode::ReadOnly),
        ("bypass", CacheMode::Bypass),
    ];
    decoder.choice(node, &words)
}

/// No file can be made beside it.
fn has_no_neighbour(backing: &Backing) -> bool {
    match backing {
        Backing::Nbd(_) => true,
        Backing::Path(path) => path.starts_with("/dev"),
    }
}
