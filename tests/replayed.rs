//! A block trace through the real daemon, and what is told of it.

mod cached_disk;
mod vflashd;

use cached_disk::{Nbd, image, manifest};
use vflash_replay::drive::{Options, run};
use vflash_replay::trace::{BLOCK_SECTORS, Request, Trace};
use vflashd::Vflashd;

/// One request for each of these blocks.
fn requests(write: bool, blocks: std::ops::Range<u64>) -> impl Iterator<Item = Request> {
    let (sectors, micros) = (BLOCK_SECTORS as u32, 0);
    blocks.map(move |block| Request { sector: block * BLOCK_SECTORS, sectors, write, micros })
}

#[test]
fn a_trace_is_told_with_what_the_cache_and_its_backing_did_for_it() {
    let mut daemon = Vflashd::start();
    let (disk, socket) = (daemon.path("disk.raw"), daemon.path("nbd"));
    image(&disk);
    // A backing that is faster than the flash would be passed to.
    let _server = Nbd::unix(&socket, &disk, &["--filter=delay", "delay-read=2ms"]);
    let url = format!("nbd+unix:///?socket={}", socket.display());
    let words = format!(", maxStaleness: 1h, sidecar: {}", daemon.path("sidecar").display());
    daemon.apply(&manifest(&daemon, &[("disk", &words, &url)]));
    let mut all: Vec<Request> = requests(true, 0..64).collect();
    all.extend(requests(false, 0..64));
    // Twice: probation in memory has them the second time.
    all.extend(requests(false, 1000..1032));
    all.extend(requests(false, 1000..1032));
    let trace = Trace { name: "made".into(), requests: all };
    let options = Options {
        socket: daemon.run_dir().join("vm/disk.sock"),
        // One at a time: what is read again was there before.
        depth: 1,
        speed: None,
        requests_max: None,
        metrics: Some((daemon.run_dir().join("api.sock"), "vm/disk".into())),
    };
    let report = run(&trace, &options).unwrap();
    assert_eq!((report.requests, report.errors), (192, 0));
    assert_eq!((report.read_bytes, report.written_bytes), (128 << 12, 64 << 12));
    let grew = |name: &str| report.counters.get(&format!("vflash_cache_{name}_total")).copied();
    let found = grew("hits").unwrap_or(0.0) + grew("probation_hits").unwrap_or(0.0);
    assert_eq!((found, grew("misses")), (96.0, Some(32.0)), "{report:?}");
    assert_eq!(report.hit_ratio, Some(0.75));
    assert_eq!(grew("backing_read_bytes"), Some(f64::from(32 << 12)), "{report:?}");
    assert!(grew("appended_bytes") >= Some(f64::from(64 << 12)), "{report:?}");
    assert!(report.read_p50_us > 0.0 && report.read_p99_us >= report.read_p50_us, "{report:?}");

    let metrics = Some((daemon.run_dir().join("api.sock"), "vm/x".into()));
    let wrong = Options { metrics, ..options };
    let error = run(&trace, &wrong).unwrap_err().to_string();
    assert!(error.contains("the daemon has no counters of vm/x"), "{error}");
    daemon.stop();
}
