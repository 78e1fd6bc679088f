//! Holds openapi.yaml to the routes and to the types, both ways: what the file describes exists,
//! and what exists is described.

use super::super::api::*;
use super::super::api_cached as cached;
use super::super::engine::Engine;
use super::super::routes::{Call, Method, ROUTES};
use super::super::rundir::RunDir;
use super::document;
use crate::vhost::ServerOptions;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// A small JSON schema checker: `$ref`, `allOf`, `nullable`, objects, arrays, strings with `enum`,
/// integers, booleans. Stricter than the standard in one way: what is not described is a mistake.
struct Checker {
    document: Value,
    /// `Schema.property` of everything that a sample had.
    seen: BTreeSet<String>,
    mistakes: Vec<String>,
}

impl Checker {
    fn new() -> Self {
        Self { document: document().unwrap(), seen: BTreeSet::new(), mistakes: Vec::new() }
    }

    fn check_named(&mut self, name: &str, value: &Value) {
        let schema = self.document["components"]["schemas"][name].clone();
        if schema.is_null() {
            self.mistakes.push(format!("no schema {name}"));
        }
        self.check(name, &schema, value);
    }

    fn check(&mut self, place: &str, schema: &Value, value: &Value) {
        if value.is_null() && schema["nullable"] == json!(true) {
            return;
        }
        if let Some(reference) = schema["$ref"].as_str() {
            let name = reference.strip_prefix("#/components/schemas/").unwrap();
            return self.check_named(name, value);
        }
        if let Some(all) = schema["allOf"].as_array() {
            return all.iter().for_each(|schema| self.check(place, schema, value));
        }
        let fits = match schema["type"].as_str() {
            Some("object") => return self.check_object(place, schema, value),
            Some("array") => {
                let items = value.as_array();
                items.into_iter().flatten().for_each(|item| {
                    self.check(place, &schema["items"], item);
                });
                items.is_some()
            }
            Some("string") => {
                let allowed = schema["enum"].as_array();
                value.is_string() && allowed.is_none_or(|allowed| allowed.contains(value))
            }
            Some("integer") => value.is_i64() || value.is_u64(),
            Some("boolean") => value.is_boolean(),
            _ => false,
        };
        if !fits {
            self.mistakes.push(format!("{place}: {value} does not fit {schema}"));
        }
    }

    fn check_object(&mut self, place: &str, schema: &Value, value: &Value) {
        let (Some(object), Some(properties)) =
            (value.as_object(), schema["properties"].as_object())
        else {
            return self.mistakes.push(format!("{place}: {value} is no described object"));
        };
        for name in schema["required"].as_array().into_iter().flatten() {
            if !object.contains_key(name.as_str().unwrap()) {
                self.mistakes.push(format!("{place}: {name} is missing"));
            }
        }
        for (name, value) in object {
            match properties.get(name) {
                None => self.mistakes.push(format!("{place}: {name} is not described")),
                Some(property) => {
                    self.seen.insert(format!("{place}.{name}"));
                    self.check(&format!("{place}.{name}"), property, value);
                }
            }
        }
    }
}

/// A value of each type that goes over the wire, every optional part present. The literals name
/// every field, so a new field has to be added here, and then fails until it is described.
fn samples() -> Vec<(&'static str, Value)> {
    let text = String::from;
    let space = Space {
        total_bytes: 1,
        allocated_bytes: 2,
        free_bytes: 3,
        scrub_bytes: 4,
        metadata_bytes: 5,
        provisioned_bytes: 6,
        watermark: Watermark::Normal,
    };
    let pool = Pool {
        name: text("p"),
        uuid: text("u"),
        device: text("/d"),
        state: PoolState::Fenced,
        message: Some(text("m")),
        space: Some(space),
        scrubbed_bytes: 1,
        waiting_requests: 1,
        check: Some(CheckProgress { done_bytes: 1, total_bytes: 2 }),
        volumes: 1,
    };
    let finding = Finding { offset_bytes: 1, text: text("t"), repairable: true };
    let check = Check {
        pool: text("p"),
        clean: false,
        findings: vec![finding],
        volumes: 1,
        mapped_bytes: 1,
        scrub_bytes: 1,
        free_bytes: 1,
        metadata_bytes: 1,
    };
    let status = Status {
        version: text("0"),
        pid: 1,
        instance: text("i"),
        run_dir: text("/r"),
        started_ms: 1,
        reactors: 1,
        state: State::Ok,
        problems: vec![text("p")],
        pools: 1,
        space: vec![PoolSpace { pool: text("p"), watermark: Watermark::High, free_bytes: 1 }],
        volumes: 1,
        attached: 1,
        last_event: 1,
        waiting: Some(Waiting { requests: 1, oldest_ms: 2 }),
        caches: vec![cached::CachedDisk { name: text("a/b"), cache: sample_cache() }],
    };
    let mut samples = vec![
        sample("Health", &Health { state: State::Ok, problems: vec![text("p")] }),
        sample("Status", &status),
        sample("Pools", &Pools { pools: vec![pool] }),
        sample("Check", &check),
        sample("Volumes", &Volumes { volumes: vec![sample_volume()] }),
    ];
    samples.extend(more_samples());
    samples.extend(cached_samples());
    samples
}

fn sample_volume() -> Volume {
    let text = String::from;
    Volume {
        name: text("a/b"),
        pool: text("p"),
        disk_of: Some(text("c/b")),
        size_bytes: 1,
        mapped_bytes: 1,
        thin: true,
        class: Class::Volatile,
        read_only: false,
        limits: Limits { iops: Some(1), bandwidth_bytes: Some(1), burst_ms: 100 },
        serial: text("s"),
        socket: text("/s"),
        state: VolumeState::Failed,
        message: Some(text("m")),
        attached: true,
        peer_pid: Some(1),
        queues_running: 1,
        pin_memory: true,
        memory_bytes: 1,
        pinned_bytes: 1,
        write_cache: true,
        bounced_pieces: 1,
        waiting: Some(Waiting { requests: 1, oldest_ms: 2 }),
        operations: vec![Operations { kind: text("read"), operations: 1, bytes: 1, errors: 1 }],
        cache: Some(sample_cache()),
    }
}

fn sample_cache() -> cached::Cache {
    let text = String::from;
    cached::Cache {
        backing: text("/b"),
        doors: vec![text("a/b")],
        sidecar: Some(text("/b.vflash")),
        size_bytes: 1,
        resizing_to_bytes: Some(1),
        leaving_bytes: 1,
        share: Some(cached::Share {
            minimum_bytes: 1,
            maximum_bytes: 1,
            weight: 1,
            goal_bytes: Some(1),
        }),
        mode: cached::CacheMode::WriteBack,
        mode_wanted: cached::CacheMode::ReadOnly,
        drain: cached::DrainKind::Grouped,
        staleness_ms: 1,
        durability: cached::Durability::Strong,
        backing_timeout_ms: 1,
        write_budget_bytes: Some(1),
        consistency_group: Some(text("g")),
        state: cached::CacheState::WaitingForBacking,
        message: Some(text("m")),
        dirty_bytes: 1,
        oldest_dirty_ms: 1,
        log_fill_permille: 1,
        head_won: 1,
        drained_won: 1,
        epoch: 1,
        held_at: Some(1),
        drain_rate_bytes: 1,
        drain_eta_ms: Some(1),
        waiting_requests: 1,
        index_bytes: 1,
        index_pieces: 1,
        clean_bytes: 1,
        probation_bytes: 1,
        backing_faster: false,
        policy_bytes: 1,
        budget_used_up: false,
        counters: vec![cached::CacheCounter { name: text("hits"), value: 1 }],
    }
}

fn cached_samples() -> Vec<(&'static str, Value)> {
    let text = String::from;
    let point = cached::Point {
        won: 1,
        kind: cached::PointKind::Mark,
        name: Some(text("m")),
        epoch: Some(1),
    };
    let points = vec![cached::CurvePoint { size_bytes: 1, hits_per_million: 1 }];
    let curve = cached::Curve { name: text("a/b"), size_bytes: 1, reads: 1, points };
    let disk = cached::DiskAdvice {
        name: text("a/b"),
        pool: text("p"),
        size_bytes: 1,
        reads: 1,
        less_hits_per_million: 1,
        hits_per_million: 1,
        more_hits_per_million: 1,
    };
    let best = cached::AdviceMove {
        from: Some(text("a/c")),
        to: text("a/b"),
        bytes: 1,
        gain_per_million: 1,
    };
    let advice = cached::Advice { step_bytes: 1, disks: vec![disk], best: Some(best) };
    let drain = cached::Drain { to: Some(1), point: Some(text("p")), hold: true };
    vec![
        sample("Drain", &drain),
        sample("Curve", &curve),
        sample("Advice", &advice),
        sample("Draining", &cached::Draining { target_won: 1, drained_won: 1, done: true }),
        sample("Points", &cached::Points { points: vec![point] }),
        sample("Mark", &cached::Mark { name: text("m") }),
        sample("SetMode", &cached::SetMode { mode: cached::CacheMode::Bypass }),
        sample("Detach", &cached::Detach { lost: true, confirm: vec![text("a/b")] }),
    ]
}

fn more_samples() -> Vec<(&'static str, Value)> {
    let text = String::from;
    let attachment = Attachment {
        name: text("a/b"),
        socket: text("/s"),
        serial: text("s"),
        size_bytes: 1,
        read_only: false,
        queues_max: 1,
        queue_size: 1,
        attached: false,
    };
    let step =
        Step { action: Action::Create, object: text("pool p"), detail: text("d"), destroys: true };
    let event = Event {
        sequence: 1,
        time_ms: 1,
        kind: EventKind::Created,
        object: text("o"),
        message: text("m"),
    };
    let events = Events { instance: text("i"), events: vec![event], lost: 0, last: 1 };
    let mistake = Mistake { file: text("f"), line: 1, column: 1, message: text("m") };
    let failure = Failure {
        code: ErrorCode::Invalid,
        message: text("m"),
        mistakes: vec![mistake],
        unconfirmed: vec![text("a/b")],
    };
    let change = Change {
        sources: vec![Source { name: text("f"), directory: Some(text("/d")), text: text("t") }],
        force: true,
        confirm: vec![text("a/b")],
    };
    let create_pool = CreatePool {
        name: text("p"),
        device: text("/d"),
        size_bytes: Some(1),
        preallocation: Preallocation::Written,
        confirm: vec![text("/d")],
    };
    vec![
        sample("Attachment", &attachment),
        sample("Manifest", &Manifest { text: text("t") }),
        sample("Plan", &Plan { steps: vec![step], destroys: vec![text("a/b")], done: true }),
        sample("Events", &events),
        sample("Failure", &failure),
        sample("CreatePool", &create_pool),
        sample("Change", &change),
        sample("ClosePool", &ClosePool { force: true }),
        sample("Resize", &Resize { size_bytes: 1, confirm: vec![text("a/b")] }),
        sample("Reclaim", &Reclaim { force: true, confirm: vec![text("a/b")] }),
    ]
}

/// What is sent is read back as the same.
fn sample<T>(name: &'static str, value: &T) -> (&'static str, Value)
where
    T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let sent = serde_json::to_value(value).unwrap();
    assert_eq!(&serde_json::from_value::<T>(sent.clone()).unwrap(), value);
    (name, sent)
}

#[test]
fn every_type_is_described_and_every_description_has_its_type() {
    let mut checker = Checker::new();
    for (name, value) in samples() {
        checker.check_named(name, &value);
    }
    assert_eq!(checker.mistakes, Vec::<String>::new());
    let mut described = BTreeSet::new();
    for (name, schema) in checker.document["components"]["schemas"].as_object().unwrap() {
        let properties = schema["properties"].as_object().cloned().unwrap_or_default();
        described.extend(properties.keys().map(|property| format!("{name}.{property}")));
    }
    assert_eq!(described, checker.seen);
}

/// serde names all variants when it meets one that it does not know.
fn variants<T: DeserializeOwned>() -> BTreeSet<String> {
    let error = serde_json::from_str::<T>("\"?\"").err().unwrap().to_string();
    let expected = error.split_once("expected").unwrap().1;
    expected.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn every_enum_has_the_described_values() {
    let document = document().unwrap();
    let checks = [
        ("State", variants::<State>()),
        ("Watermark", variants::<Watermark>()),
        ("PoolState", variants::<PoolState>()),
        ("Preallocation", variants::<Preallocation>()),
        ("Class", variants::<Class>()),
        ("VolumeState", variants::<VolumeState>()),
        ("Action", variants::<Action>()),
        ("EventKind", variants::<EventKind>()),
        ("ErrorCode", variants::<ErrorCode>()),
        ("CacheMode", variants::<cached::CacheMode>()),
        ("CacheState", variants::<cached::CacheState>()),
        ("DrainKind", variants::<cached::DrainKind>()),
        ("Durability", variants::<cached::Durability>()),
        ("PointKind", variants::<cached::PointKind>()),
    ];
    let schemas = document["components"]["schemas"].as_object().unwrap();
    let enums = schemas.iter().filter(|(_, schema)| schema["enum"].is_array()).count();
    assert_eq!(enums, checks.len());
    for (name, values) in checks {
        let described = schemas[name]["enum"].as_array().unwrap();
        let described = described.iter().map(|value| value.as_str().unwrap().to_owned());
        assert_eq!(described.collect::<BTreeSet<_>>(), values, "{name}");
    }
}

fn described_routes(document: &Value) -> BTreeSet<(String, String, String)> {
    let mut routes = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in
            item.as_object().unwrap().iter().filter(|(k, _)| *k != "parameters")
        {
            let id = operation["operationId"].as_str().unwrap();
            routes.insert((method.clone(), path.clone(), id.to_owned()));
            let wanted: Vec<_> =
                path.split('{').skip(1).map(|p| p.split('}').next().unwrap()).collect();
            let named = item["parameters"].as_array().cloned().unwrap_or_default();
            let named: Vec<_> = named
                .iter()
                .map(|p| p["$ref"].as_str().unwrap().rsplit('/').next().unwrap())
                .collect();
            assert_eq!(wanted, named, "{path}");
            assert!(operation["responses"]["default"].is_object(), "{path}");
            let alone = ["check", "checkpoint", "grow"].iter().any(|end| path.ends_with(end));
            assert_eq!(method == "post" && !alone, operation["requestBody"].is_object(), "{path}");
        }
    }
    routes
}

#[test]
fn every_route_is_described_and_every_description_has_its_route() {
    let routes: BTreeSet<_> = ROUTES
        .iter()
        .map(|route| {
            let method = match route.method {
                Method::Get => "get",
                Method::Post => "post",
            };
            (method.to_owned(), route.path.to_owned(), route.operation.to_owned())
        })
        .collect();
    assert_eq!(routes.len(), ROUTES.len(), "no route stands twice");
    assert_eq!(described_routes(&document().unwrap()), routes);
}

fn references(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            if let Some(Value::String(reference)) = object.get("$ref") {
                found.insert(reference.clone());
            }
            object.values().for_each(|value| references(value, found));
        }
        Value::Array(array) => array.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

#[test]
fn every_reference_leads_somewhere_and_every_component_is_used() {
    let document = document().unwrap();
    let mut used = BTreeSet::new();
    references(&document, &mut used);
    let components = document["components"].as_object().unwrap();
    let defined: BTreeSet<String> = components
        .iter()
        .flat_map(|(kind, items)| {
            let names = items.as_object().unwrap().keys();
            names.map(move |name| format!("#/components/{kind}/{name}"))
        })
        .collect();
    assert_eq!(used, defined);
}

/// The schema of a route's answer, if it is described as JSON with one.
fn answer_schema(document: &Value, path: &str, method: &str) -> Option<Value> {
    let operation = &document["paths"][path][method]["responses"]["200"];
    let name = operation["$ref"].as_str()?.rsplit('/').next()?;
    let content = &document["components"]["responses"][name]["content"];
    Some(content["application/json"]["schema"].clone())
}

/// Calls of every route, in an order in which each succeeds: operation, path, body.
fn calls(pool: &str) -> Vec<(&'static str, Vec<&'static str>, Value)> {
    let manifest = format!(
        "apiVersion: vflash/v1\nkind: VirtualMachine\nmetadata: {{name: vm}}\n\
         spec:\n  volumes:\n  - {{name: a, flash: {{pool: p, size: 1MiB}}}}\n  \
         - {{name: c, cache: {{pool: p, size: 8MiB}}, backing: {pool}.raw}}\n"
    );
    let change = json!({"sources": [{"name": "m", "text": manifest}], "confirm": ["vm/a"]});
    let create = json!({"name": "p", "device": pool, "sizeBytes": 32 << 20});
    let volume = || vec!["vm", "a"];
    let disk = || vec!["vm", "c"];
    vec![
        ("createPool", vec![], create),
        ("diff", vec![], change.clone()),
        ("apply", vec![], change.clone()),
        ("listPools", vec![], Value::Null),
        ("showPool", vec!["p"], Value::Null),
        ("checkPool", vec!["p"], Value::Null),
        ("growPool", vec!["p"], Value::Null),
        ("listVolumes", vec![], Value::Null),
        ("showVolume", volume(), Value::Null),
        ("attachment", volume(), Value::Null),
        ("manifest", vec![], Value::Null),
        ("resizeVolume", volume(), json!({"sizeBytes": 2 << 20})),
        ("reclaimVolume", volume(), json!({"confirm": ["vm/a"]})),
        ("mark", disk(), json!({"name": "m"})),
        ("points", disk(), Value::Null),
        ("drain", disk(), json!({"point": "m"})),
        ("curve", disk(), Value::Null),
        ("advice", vec![], Value::Null),
        ("checkpoint", disk(), Value::Null),
        ("setMode", disk(), json!({"mode": "write-through"})),
        ("resizeVolume", disk(), json!({"sizeBytes": 6 << 20})),
        ("listVolumes", vec![], Value::Null),
        ("detach", disk(), json!({})),
        ("delete", vec![], change),
        ("closePool", vec!["p"], json!({})),
        ("events", vec![], Value::Null),
        ("status", vec![], Value::Null),
        ("health", vec![], Value::Null),
        ("metrics", vec![], Value::Null),
        ("openapi", vec![], Value::Null),
    ]
}

#[test]
fn every_route_answers_as_described() {
    let folder = tempfile::tempdir().unwrap();
    let run_dir = RunDir::open(&folder.path().join("run")).unwrap();
    let options = ServerOptions { reactors: 1, cpus: Vec::new() };
    let engine = Engine::start(run_dir, &options).unwrap();
    let pool = folder.path().join("pool");
    std::fs::File::create(folder.path().join("pool.raw")).unwrap().set_len(4 << 20).unwrap();
    let document = document().unwrap();
    let mut called = BTreeSet::new();
    for (operation, path, body) in calls(pool.to_str().unwrap()) {
        let route = ROUTES.iter().find(|route| route.operation == operation).unwrap();
        if operation == "growPool" {
            let file = std::fs::File::options().write(true).open(&pool).unwrap();
            file.set_len(64 << 20).unwrap();
        }
        let call = Call {
            path: path.into_iter().map(str::to_owned).collect(),
            query: Default::default(),
            body: serde_json::to_vec(&body).unwrap().into(),
        };
        let reply = (route.handler)(&engine, &call).unwrap_or_else(|e| panic!("{operation}: {e}"));
        let method = if route.method == Method::Get { "get" } else { "post" };
        if let Some(schema) = answer_schema(&document, route.path, method) {
            let mut checker = Checker::new();
            checker.check(operation, &schema, &serde_json::from_slice(&reply.body).unwrap());
            assert_eq!(checker.mistakes, Vec::<String>::new(), "{operation}");
        }
        called.insert(operation);
    }
    assert_eq!(called.len(), ROUTES.len(), "every route is called");
    engine.stop().unwrap();
}

#[test]
fn the_checker_sees_what_is_missing_undescribed_or_of_another_type() {
    let (name, good) = sample("Resize", &Resize { size_bytes: 1, confirm: vec!["a/b".into()] });
    let spoil = |change: fn(&mut Map<String, Value>)| {
        let mut value = good.clone();
        change(value.as_object_mut().unwrap());
        let mut checker = Checker::new();
        checker.check_named(name, &value);
        checker.mistakes.len()
    };
    assert_eq!(spoil(|_| ()), 0);
    assert_eq!(spoil(|object| drop(object.remove("sizeBytes"))), 1);
    assert_eq!(spoil(|object| drop(object.insert("new".into(), json!(1)))), 1);
    assert_eq!(spoil(|object| drop(object.insert("sizeBytes".into(), json!("1")))), 1);
    assert_eq!(spoil(|object| drop(object.insert("confirm".into(), json!([1])))), 1);
}
