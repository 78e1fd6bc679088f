//! A trace through a socket.

use std::time::Duration;
use vflash_replay::drive::{Options, run};
use vflash_replay::trace::{Request, Trace};

const BENCH: &str = "vflash_replay_no_server";

/// A file behind a vhost-user socket, in a thread of this process.
fn serve(folder: &std::path::Path, sectors: u64) -> std::path::PathBuf {
    let (socket, file) = (folder.join("socket"), folder.join("file"));
    let at = socket.clone();
    std::thread::Builder::new()
        .name(BENCH.into())
        .spawn(move || vflash_bench::serve::serve(&at, &file, sectors * 512, None))
        .expect("a thread starts");
    socket
}

#[test]
fn every_request_of_a_trace_is_sent_and_measured() {
    let folder = tempfile::tempdir().unwrap();
    let socket = serve(folder.path(), 65_536);
    let mut random = fastrand::Rng::with_seed(1);
    let requests: Vec<Request> = (0..3000_u64)
        .map(|at| Request {
            // Far beyond the disk, so that it must be made to fit.
            sector: (1 << 30) + random.u64(..60_000),
            sectors: if at == 7 { 5000 } else { random.u32(1..100) },
            write: random.bool(),
            micros: at * 100,
        })
        .collect();
    let sectors = |write: bool| -> u64 {
        let one = requests.iter().filter(|request| request.write == write);
        one.map(|request| u64::from(request.sectors)).sum()
    };
    let (read, written) = (sectors(false) * 512, sectors(true) * 512);
    let trace = Trace { name: "made".into(), requests };
    let mut options = Options { socket, depth: 16, speed: None, requests_max: None, metrics: None };
    let report = run(&trace, &options).unwrap();
    assert_eq!((report.requests, report.errors), (3000, 0));
    assert_eq!((report.read_bytes, report.written_bytes), (read, written));
    assert!(report.read_p50_us > 0.0 && report.write_p99_us >= report.write_p50_us);
    assert_eq!(report.hit_ratio, None);

    // At its own pace: 500 requests in 50 ms.
    options.requests_max = Some(500);
    options.speed = Some(1.0);
    let report = run(&trace, &options).unwrap();
    assert_eq!(report.requests, 500);
    assert!(report.seconds >= 0.0499, "{} s", report.seconds);

    // Metrics of a daemon that is not there.
    options.metrics = Some((folder.path().join("no.sock"), "a/b".into()));
    let error = run(&trace, &options).unwrap_err().to_string();
    assert!(error.contains("is vflashd running there?"), "{error}");
    assert!(Duration::from_secs_f64(report.seconds) < Duration::from_secs(20));
}
