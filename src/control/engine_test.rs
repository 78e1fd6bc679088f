//! What the daemon shows of parts that have failed by a defect.

use super::*;
use crate::control::api::{CreatePool, PoolState, Preallocation, VolumeState};
use crate::control::changes::NewVolume;
use crate::control::rundir::RunDir;
use crate::flash::{Class, VolumeMessage};

/// A daemon with the pool `p0`, which has no drive, and the volume `vm/a` on it.
fn started(folder: &std::path::Path) -> Engine {
    let run_dir = RunDir::open(&folder.join("run")).unwrap();
    let options = ServerOptions { reactors: 1, cpus: Vec::new() };
    let engine = Engine::start(run_dir, &options).unwrap();
    engine.set_restored();
    let request = CreatePool {
        name: "p0".into(),
        device: "null:64MiB".into(),
        size_bytes: None,
        preallocation: Preallocation::Reserved,
        confirm: Vec::new(),
    };
    engine.create_pool(&request).unwrap();
    let new = NewVolume {
        name: "vm/a".into(),
        pool: "p0".into(),
        size_bytes: 1 << 20,
        thin: false,
        class: Class::Volatile,
        settings: Default::default(),
    };
    let (pool, _) = engine.make_volume(&new).unwrap();
    engine.serve(&pool, "vm/a").unwrap();
    assert_eq!(engine.health().state, State::Ok);
    engine
}

fn told(engine: &Engine, kind: EventKind) -> Vec<String> {
    let events = engine.events().since(0).events;
    events.into_iter().filter(|event| event.kind == kind).map(|event| event.message).collect()
}

#[test]
fn a_fenced_volume_is_shown_with_the_reason_and_what_helps() {
    let folder = tempfile::tempdir().unwrap();
    let engine = started(folder.path());
    let done = Box::new(|| panic!("planted"));
    let defect = VolumeMessage::Shrink { size_bytes: u64::MAX, done };
    engine.served("vm/a").unwrap().link.send(Box::new(defect));
    let deadline = Instant::now() + Duration::from_secs(30);
    while told(&engine, EventKind::Fenced).is_empty() {
        assert!(Instant::now() < deadline, "it is told");
        std::thread::yield_now();
    }
    let volume = engine.volume("vm/a").unwrap();
    assert_eq!(volume.state, VolumeState::Fenced);
    let message = volume.message.unwrap();
    assert!(message.contains("planted") && message.contains("until vflashd is restarted"));
    let Health { state, problems } = engine.health();
    assert_eq!(state, State::Degraded);
    assert_eq!(problems, [format!("volume vm/a: {message}")]);
    assert_eq!(engine.status().problems, problems);
    assert_eq!(told(&engine, EventKind::Fenced), [message]);
    let line = "vflash_volume_fenced{pool=\"p0\",vm=\"vm\",volume=\"a\"} 1";
    assert!(engine.prometheus().lines().any(|found| found == line));
    engine.stop().unwrap();
}

#[test]
fn a_keeper_that_has_failed_is_shown_with_the_reason_and_what_helps() {
    let folder = tempfile::tempdir().unwrap();
    let engine = started(folder.path());
    let pool = engine.open_pool_named("p0").unwrap();
    let failed = pool.change(|_| -> Result<()> { panic!("planted") });
    assert_eq!(failed.unwrap_err().kind(), ErrorKind::Fenced);
    let shown = engine.pool("p0").unwrap();
    assert_eq!(shown.state, PoolState::Failed);
    let message = shown.message.unwrap();
    assert!(message.contains("planted") && message.contains("until vflashd is restarted"));
    assert!(shown.space.is_some() && shown.volumes == 1, "what was known of it is shown on");
    assert_eq!(engine.health().problems, [format!("pool p0: {message}")]);
    engine.watch(&pool);
    engine.watch(&pool);
    assert_eq!(told(&engine, EventKind::Error), std::slice::from_ref(&message), "once");
    let line = "vflash_pool_keeper_failed{pool=\"p0\"} 1";
    assert!(engine.prometheus().lines().any(|found| found == line));
    let resize = crate::control::api::Resize { size_bytes: 2 << 20, confirm: Vec::new() };
    let failure = engine.resize("vm/a", &resize).unwrap_err();
    assert_eq!((failure.code, failure.message), (ErrorCode::Fenced, message));
    assert_eq!(engine.volume("vm/a").unwrap().state, VolumeState::Served);
    engine.stop().unwrap();
}
