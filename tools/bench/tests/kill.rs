//! The kill test passes with an honest back end and fails with each that is not.

use std::path::Path;
use vflash_bench::kill::{KillOptions, KillReport, run};

fn kill(cycles: u32, lie: Option<&str>, inflight: bool) -> KillReport {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let text = |path: &Path| path.display().to_string();
    let socket = folder.path().join("s.sock");
    let program = env!("CARGO_BIN_EXE_vflash-bench");
    let mut server: Vec<String> =
        [program, "serve", "--socket", &text(&socket), "--file"].map(String::from).to_vec();
    server.push(text(&folder.path().join("disk")));
    server.extend(lie.map(|lie| format!("--lie={lie}")));
    let options = KillOptions {
        cycles,
        socket,
        server,
        seed: 1,
        span_bytes: 16 << 20,
        cycles_per_boot: 10,
        inflight,
    };
    run(&options, |_| {}).unwrap()
}

#[test]
fn an_honest_back_end_loses_and_doubles_nothing() {
    let report = kill(60, None, true);
    assert!(report.passed(), "{report:?}");
    assert!(report.cycles >= 60 && report.boots >= 5, "{report:?}");
    assert!(report.survivors > 0, "something was in flight at a kill: {report:?}");
    assert!(report.verified_sectors > 1000 && report.stall_max_ms > 0.0, "{report:?}");
}

#[test]
fn without_the_inflight_area_requests_are_lost_or_doubled() {
    let report = kill(60, None, false);
    assert!(report.violations.total() > 0 && !report.passed(), "{report:?}");
}

#[test]
fn a_back_end_that_loses_writes_is_found() {
    let report = kill(20, Some("lose-writes"), true);
    assert!(report.violations.wrong > 0 && !report.passed(), "{report:?}");
}

#[test]
fn a_back_end_that_does_writes_twice_is_found() {
    let report = kill(60, Some("repeat-writes"), true);
    assert!(report.violations.wrong > 0 && !report.passed(), "{report:?}");
}
