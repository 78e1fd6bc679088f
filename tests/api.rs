//! What the API promises, on the real daemon.

mod vflashd;

use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vflash::io::file::FileDisk;
use vflashd::{
    SOON, Vflashd, attach, change, confirmed, eventually, machine_manifest, parse, pool_manifest,
};

/// A pool and the machine `vm` with a thick volume `a` of 16 MiB and a thin one `b` of 1 GiB.
fn wanted(daemon: &Vflashd) -> String {
    let volumes = [("a", "size: 16MiB, class: volatile"), ("b", "size: 1GiB, thin: true")];
    pool_manifest(daemon.folder.path()) + &machine_manifest("vm", &volumes)
}

fn started() -> (Vflashd, String) {
    let daemon = Vflashd::start();
    let manifest = wanted(&daemon);
    let plan = daemon.apply(&manifest);
    assert_eq!(plan["done"], true);
    assert_eq!(plan["steps"].as_array().unwrap().len(), 3);
    (daemon, manifest)
}

#[test]
fn apply_makes_what_is_wanted_and_again_changes_nothing() {
    let (daemon, manifest) = started();
    let socket = daemon.run_dir().join("vm/a.sock");
    assert!(std::fs::metadata(&socket).unwrap().file_type().is_socket());
    let mode = |path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&socket), 0o600);
    assert_eq!(mode(&daemon.path("pool")), 0o600, "guests' data");
    assert_eq!(daemon.volumes(), ["vm/a", "vm/b"]);
    let last = daemon.get("/v1/status")["lastEvent"].clone();
    let again = daemon.apply(&manifest);
    assert_eq!(again, json!({"steps": [], "destroys": [], "done": true}));
    assert_eq!(daemon.get("/v1/status")["lastEvent"], last, "nothing happened");
    let volume = daemon.get("/v1/volumes/vm/a");
    assert!(volume["serial"].as_str().unwrap().starts_with("vflash-vo-"), "{volume}");
    assert_eq!(volume["sizeBytes"], 16 << 20);
    assert_eq!(volume["mappedBytes"], 16 << 20);
    assert_eq!(daemon.get("/v1/volumes/vm/b")["mappedBytes"], 0);
}

#[test]
fn diff_shows_what_apply_does_and_changes_nothing() {
    let daemon = Vflashd::start();
    let manifest = wanted(&daemon);
    let shown = daemon.post("/v1/diff", &change(&manifest));
    assert_eq!(shown["done"], false);
    assert!(!daemon.path("pool").exists());
    assert!(daemon.volumes().is_empty());
    assert_eq!(daemon.apply(&manifest)["steps"], shown["steps"]);
    let larger = manifest.replace("16MiB", "32MiB");
    let shown = daemon.post("/v1/diff", &change(&larger));
    assert_eq!(shown["steps"][0]["action"], "resize");
    assert_eq!(daemon.get("/v1/volumes/vm/a")["sizeBytes"], 16 << 20);
}

#[test]
fn mistakes_are_told_with_their_places_and_nothing_is_done() {
    let (daemon, manifest) = started();
    let wrong = manifest.replace("16MiB", "16MB").replace("thin: true", "thin: maybe");
    let failure = daemon.refused("/v1/apply", &change(&wrong), 400);
    assert_eq!(failure["code"], "invalid");
    let mistakes = failure["mistakes"].as_array().unwrap();
    assert_eq!(mistakes.len(), 2, "{failure}");
    assert_eq!(mistakes[0]["file"], "m.yaml");
    assert_eq!(mistakes[0]["line"], 12);
    assert!(mistakes[0]["message"].as_str().unwrap().contains("16MiB"), "{failure}");
    assert_eq!(daemon.volumes(), ["vm/a", "vm/b"]);
}

#[test]
fn a_resize_reaches_an_attached_guest_and_a_shrink_is_named() {
    let (daemon, _) = started();
    let mut device = attach(&daemon, "vm/a");
    let larger = daemon.post("/v1/volumes/vm/a/resize", &json!({"sizeBytes": 32 << 20}));
    assert_eq!(larger["sizeBytes"], 32 << 20);
    eventually("the guest sees the size", || device.read_capacity().unwrap() == (32 << 20) / 512);
    let smaller = json!({"sizeBytes": 8 << 20});
    let failure = daemon.refused("/v1/volumes/vm/a/resize", &smaller, 409);
    assert_eq!(failure["unconfirmed"], json!(["vm/a"]));
    let smaller = json!({"sizeBytes": 8 << 20, "confirm": ["vm/a"]});
    daemon.post("/v1/volumes/vm/a/resize", &smaller);
    eventually("the guest sees the size", || device.read_capacity().unwrap() == (8 << 20) / 512);
    // What a manifest cannot say would make an export that cannot be applied.
    let odd = json!({"sizeBytes": (8 << 20) + 4096});
    let huge = json!({"sizeBytes": 1_u64 << 40});
    for (wrong, status, code) in [
        (odd, 400, "invalid"),
        (json!({"sizeBytes": 1000}), 400, "invalid"),
        (json!({}), 400, "invalid"),
        (huge, 507, "full"),
    ] {
        let failure = daemon.refused("/v1/volumes/vm/a/resize", &wrong, status);
        assert_eq!(failure["code"], code, "{wrong}");
    }
    assert_eq!(daemon.get("/v1/volumes/vm/a")["sizeBytes"], 8 << 20);
    assert_eq!(daemon.events("resized").len(), 2);
}

#[test]
fn destruction_is_named_and_refused_while_a_guest_is_attached() {
    let (daemon, manifest) = started();
    let reclaim = "/v1/volumes/vm/a/reclaim";
    let failure = daemon.refused(reclaim, &json!({}), 409);
    assert_eq!(failure["code"], "unconfirmed");
    assert_eq!(failure["message"], "vm/a: all that it holds (16MiB) would be destroyed");
    let named = json!({"confirm": ["vm/a"]});
    let device = attach(&daemon, "vm/a");
    eventually("the front end is seen", || daemon.get("/v1/volumes/vm/a")["attached"] == true);
    assert_eq!(daemon.refused(reclaim, &named, 409)["code"], "busy");
    let delete = confirmed(&manifest, &["vm/a", "vm/b"]);
    daemon.refused("/v1/delete", &delete, 400);
    assert_eq!(daemon.volumes(), ["vm/a", "vm/b"]);
    daemon.post(reclaim, &json!({"confirm": ["vm/a"], "force": true}));
    assert_eq!(daemon.volumes(), ["vm/b"]);
    assert!(!daemon.run_dir().join("vm/a.sock").exists());
    drop(device);
    let failure = daemon.refused("/v1/delete", &change(&manifest), 409);
    assert_eq!(failure["unconfirmed"], json!(["vm/b"]));
    daemon.post("/v1/delete", &delete);
    assert!(daemon.volumes().is_empty());
    assert!(!daemon.run_dir().join("vm").exists());
    let space = daemon.get("/v1/pools/p0")["space"].clone();
    assert_eq!(space["allocatedBytes"], 0, "{space}");
}

#[test]
fn a_volume_missing_from_its_machine_goes_only_if_it_is_named() {
    let (daemon, _) = started();
    let less = pool_manifest(daemon.folder.path())
        + &machine_manifest("vm", &[("a", "size: 16MiB, class: volatile")]);
    let failure = daemon.refused("/v1/apply", &change(&less), 409);
    assert_eq!(failure["unconfirmed"], json!(["vm/b"]));
    assert_eq!(daemon.volumes(), ["vm/a", "vm/b"]);
    daemon.post("/v1/apply", &confirmed(&less, &["vm/b"]));
    assert_eq!(daemon.volumes(), ["vm/a"]);
}

/// What must be the same after a restart.
fn lasting(daemon: &Vflashd) -> Value {
    let mut volumes = daemon.get("/v1/volumes");
    for volume in volumes["volumes"].as_array_mut().unwrap() {
        volume.as_object_mut().unwrap().remove("operations");
    }
    volumes
}

#[test]
fn a_restart_without_manifests_serves_every_volume_as_before() {
    let mut daemon = Vflashd::start();
    let limits = "    limits: {iops: 1000, bandwidth: 10MiB/s, burst: 2s}\n";
    daemon.apply(&(wanted(&daemon) + limits));
    let before = lasting(&daemon);
    assert_eq!(before["volumes"][1]["limits"]["iops"], 1000);
    daemon.kill();
    daemon.run(&[]);
    assert_eq!(lasting(&daemon), before);
    daemon.stop();
    daemon.run(&[]);
    assert_eq!(lasting(&daemon), before);
    drop(attach(&daemon, "vm/b"));
}

#[test]
fn an_apply_that_fails_in_the_middle_is_undone() {
    let (daemon, manifest) = started();
    // Where a socket is to be made stands a directory that is not empty.
    std::fs::create_dir_all(daemon.run_dir().join("vm/z.sock/x")).unwrap();
    let before = lasting(&daemon);
    let more = [
        ("a", "size: 32MiB, class: volatile"),
        ("b", "size: 1GiB, thin: true"),
        ("c", "size: 8MiB"),
        ("z", "size: 8MiB"),
    ];
    let more = pool_manifest(daemon.folder.path()) + &machine_manifest("vm", &more);
    let (status, failure) = daemon.ask("POST", "/v1/apply", &change(&more));
    assert!(status >= 500, "{failure}");
    let message = failure["message"].as_str().unwrap();
    assert!(message.contains("vm/z") && message.contains("undone"), "{message}");
    assert_eq!(lasting(&daemon), before);
    assert_eq!(daemon.apply(&manifest)["steps"], json!([]));
    std::fs::remove_dir_all(daemon.run_dir().join("vm/z.sock")).unwrap();
    daemon.apply(&more);
    assert_eq!(daemon.volumes(), ["vm/a", "vm/b", "vm/c", "vm/z"]);
}

/// A pool whose drive can be made to refuse writes from outside: a memory file with a seal.
fn sealable_pool(daemon: &Vflashd) -> std::fs::File {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let drive = memfd_create(c"drive", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC);
    let drive = std::fs::File::from(drive.unwrap());
    drive.set_len(64 << 20).unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), drive.as_raw_fd());
    daemon.post("/v1/pools", &json!({"name": "p1", "device": path}));
    drive
}

#[test]
fn an_apply_that_fails_names_what_it_had_destroyed_before() {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    let (daemon, _) = started();
    let drive = sealable_pool(&daemon);
    let zed = machine_manifest("zed", &[("z", "size: 2MiB")]).replace("p0", "p1");
    daemon.apply(&zed);
    eventually("all is scrubbed", || daemon.get("/v1/pools/p1")["space"]["scrubBytes"] == 0);
    fcntl(&drive, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
    // Two volumes are to go, and one is to be made; the drive of the second does not go along.
    let less = machine_manifest("vm", &[("b", "size: 1GiB, thin: true"), ("c", "size: 1MiB")])
        + &zed.replace("2MiB", "1MiB");
    let (status, failure) = daemon.ask("POST", "/v1/apply", &confirmed(&less, &["vm/a", "zed/z"]));
    assert!(status >= 500, "{failure}");
    let message = failure["message"].as_str().unwrap();
    let (failed, became) = message.split_once("; done before and not undone: ").expect(message);
    assert!(failed.contains("volume zed/z") && !failed.contains("undone"), "{message}");
    let (kept, left) = became.split_once("; left to be done, by applying again: ").expect(message);
    let deleted = "volume vm/a: delete 16MiB on p0, destroying its content";
    assert_eq!(kept, format!("volume vm/c: 1MiB on p0, nonvolatile; {deleted}"));
    assert_eq!(left, "volume zed/z: size 2MiB -> 1MiB, destroying what lies behind 1MiB");
    assert_eq!(daemon.volumes(), ["vm/b", "vm/c", "zed/z"], "what was to take its place stays");
    assert!(daemon.events("error").iter().any(|event| event.contains(kept)), "and who follows");
}

#[test]
fn a_pool_on_a_file_that_was_there_stays_when_an_apply_fails_and_is_named() {
    let daemon = Vflashd::start();
    let file = std::fs::File::create(daemon.path("pool")).unwrap();
    file.set_len(256 << 20).unwrap();
    std::fs::create_dir_all(daemon.run_dir().join("vm/z.sock/x")).unwrap();
    let wanted = pool_manifest(daemon.folder.path())
        + &machine_manifest("vm", &[("a", "size: 8MiB"), ("z", "size: 8MiB")]);
    let (status, failure) = daemon.ask("POST", "/v1/apply", &change(&wanted));
    assert!(status >= 500, "{failure}");
    let message = failure["message"].as_str().unwrap();
    let (undone, kept) = message.split_once("; done before and not undone: ").expect(message);
    assert!(undone.ends_with("; what this apply had made before was undone"), "{message}");
    assert!(kept.starts_with("pool p0: create on "), "{message}");
    assert_eq!(daemon.get("/v1/pools/p0")["volumes"], 0);
    std::fs::remove_dir_all(daemon.run_dir().join("vm/z.sock")).unwrap();
    assert_eq!(daemon.apply(&wanted)["steps"].as_array().unwrap().len(), 2, "the rest");
    assert_eq!(daemon.volumes(), ["vm/a", "vm/z"]);
}

#[test]
fn what_is_exported_makes_all_of_it_anew() {
    let (daemon, manifest) = started();
    let limited = manifest + "    limits: {iops: 1000, bandwidth: 10MiB/s, burst: 2s}\n";
    daemon.apply(&limited);
    let exported = daemon.get("/v1/manifest")["text"].as_str().unwrap().to_owned();
    assert_eq!(daemon.apply(&exported)["steps"], json!([]), "{exported}");
    let serials = |daemon: &Vflashd| {
        let mut volumes = lasting(daemon);
        volumes["volumes"].as_array_mut().unwrap().iter_mut().for_each(|volume| {
            assert!(volume.as_object_mut().unwrap().remove("serial").is_some());
        });
        volumes
    };
    let before = serials(&daemon);
    daemon.post("/v1/delete", &confirmed(&exported, &["vm/a", "vm/b"]));
    daemon.post("/v1/pools/p0/close", &json!({}));
    std::fs::remove_file(daemon.path("pool")).unwrap();
    assert_eq!(daemon.get("/v1/manifest")["text"], "", "nothing is left");
    daemon.apply(&exported);
    assert_eq!(serials(&daemon), before);
    assert_eq!(daemon.get("/v1/manifest")["text"], exported);
}

/// The daemon is killed as soon as the first volumes exist, a little later each time.
#[test]
fn an_apply_cut_short_by_a_kill_converges_when_applied_again() {
    let mut cut_in_the_middle = 0;
    for round in 0..6 {
        let mut daemon = Vflashd::start();
        let names: Vec<String> = (0..120).map(|index| format!("v{index}")).collect();
        let volumes: Vec<(&str, &str)> =
            names.iter().map(|name| (name.as_str(), "size: 1MiB")).collect();
        let manifest = pool_manifest(daemon.folder.path()) + &machine_manifest("vm", &volumes);
        let body = change(&manifest).to_string();
        let mut stream = daemon.connect();
        let length = body.len();
        write!(
            stream,
            "POST /v1/apply HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let last = daemon.run_dir().join(format!("vm/v{}.sock", 1 + round * 15));
        eventually("volumes are being made", || last.exists());
        daemon.kill();
        daemon.run(&[]);
        let made = daemon.volumes().len();
        cut_in_the_middle += usize::from(made < volumes.len());
        let plan = daemon.apply(&manifest);
        assert_eq!(plan["steps"].as_array().unwrap().len(), volumes.len() - made);
        assert_eq!(daemon.apply(&manifest)["steps"], json!([]));
        assert_eq!(daemon.volumes().len(), volumes.len());
        assert_eq!(daemon.post("/v1/pools/p0/check", &Value::Null)["clean"], true);
    }
    assert!(cut_in_the_middle > 0, "no kill came in time");
}

#[test]
fn pools_are_made_shown_grown_and_checked() {
    let daemon = Vflashd::start();
    let device = daemon.path("pool").display().to_string();
    let strange = json!({"name": "p/0", "device": device, "sizeBytes": 128 << 20});
    assert_eq!(daemon.refused("/v1/pools", &strange, 400)["code"], "invalid");
    let relative = json!({"name": "p0", "device": "pool", "sizeBytes": 128 << 20});
    let failure = daemon.refused("/v1/pools", &relative, 400);
    assert!(failure["message"].as_str().unwrap().contains("write an absolute one"), "{failure}");
    assert!(!daemon.path("pool").exists());
    let request = json!({"name": "p0", "device": device, "sizeBytes": 128 << 20});
    let pool = daemon.post("/v1/pools", &request);
    assert_eq!(pool["state"], "ok");
    assert_eq!(daemon.refused("/v1/pools", &request, 409)["code"], "busy");
    let file = std::fs::File::options().write(true).open(&device).unwrap();
    daemon.refused("/v1/pools/p0/grow", &Value::Null, 400);
    file.set_len(256 << 20).unwrap();
    let grown = daemon.post("/v1/pools/p0/grow", &Value::Null);
    assert_eq!(grown["space"]["totalBytes"], 256 << 20);
    let check = daemon.post("/v1/pools/p0/check", &Value::Null);
    assert_eq!((&check["clean"], &check["findings"]), (&json!(true), &json!([])));
    assert_eq!(daemon.get("/v1/pools")["pools"].as_array().unwrap().len(), 1);
    let foreign = daemon.path("foreign");
    std::fs::write(&foreign, [b"XFSB".to_vec(), vec![1; 128 << 20]].concat()).unwrap();
    let request = json!({"name": "p1", "device": foreign.display().to_string()});
    let failure = daemon.refused("/v1/pools", &request, 409);
    assert_eq!(failure["unconfirmed"], json!([foreign.display().to_string()]));
    assert!(failure["message"].as_str().unwrap().contains("XFS"), "{failure}");
}

#[test]
fn null_pools_of_one_size_are_several_and_are_back_after_a_restart() {
    let mut daemon = Vflashd::start();
    for name in ["n0", "n1"] {
        daemon.post("/v1/pools", &json!({"name": name, "device": "null:64MiB"}));
    }
    let more = "apiVersion: vflash/v1\nkind: Pool\nmetadata: {name: n2}\n\
                spec: {device: \"null:64MiB\"}\n";
    daemon.apply(more);
    let names = |daemon: &Vflashd| {
        let pools = daemon.get("/v1/pools");
        let pools = pools["pools"].as_array().unwrap().clone();
        pools.iter().map(|pool| pool["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names(&daemon), ["n0", "n1", "n2"]);
    daemon.stop();
    daemon.run(&["--pool", "null:64MiB"]);
    assert_eq!(names(&daemon), ["n0", "n1", "n2"], "the one that is given is one of these");
    assert_eq!(daemon.get("/healthz")["state"], "ok");
}

#[test]
fn others_make_their_changes_while_a_pool_is_made() {
    let (daemon, manifest) = started();
    let path = daemon.path("late");
    std::fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
    // Somebody holds it, which the daemon waits for: as long as a large file takes to be written.
    let held = FileDisk::open(&path, Duration::ZERO).unwrap();
    let device = path.display().to_string();
    let request = json!({"name": "late", "device": device, "confirm": [device]});
    let body = request.to_string();
    let mut stream = daemon.connect();
    let head = "POST /v1/pools HTTP/1.1\r\nhost: x\r\nconnection: close";
    write!(stream, "{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
    let state = || daemon.ask("GET", "/v1/pools/late", &Value::Null).1["state"].clone();
    eventually("it is being made", || state() == "making");
    assert_eq!(daemon.refused("/v1/pools", &request, 409)["code"], "busy");
    daemon.apply(&manifest.replace("16MiB", "32MiB"));
    assert_eq!(state(), "making", "the change was made meanwhile");
    drop(held);
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(parse(&answer).unwrap().0, 200, "{answer}");
    assert_eq!(state(), "ok");
}

#[test]
fn a_pool_that_cannot_be_opened_is_shown_and_stops_nobody_else() {
    let (mut daemon, _) = started();
    let other = daemon.path("other").display().to_string();
    daemon.post("/v1/pools", &json!({"name": "p1", "device": other, "sizeBytes": 64 << 20}));
    daemon.stop();
    std::fs::write(&other, vec![0; 64 << 20]).unwrap();
    daemon.run(&[]);
    assert_eq!(daemon.volumes(), ["vm/a", "vm/b"]);
    let health = daemon.get("/healthz");
    assert_eq!(health["state"], "degraded");
    assert!(health["problems"][0].as_str().unwrap().contains("p1"), "{health}");
    let pools = daemon.get("/v1/pools");
    let failed = pools["pools"].as_array().unwrap().iter().find(|pool| pool["name"] == "p1");
    assert_eq!(failed.unwrap()["state"], "failed");
    assert_eq!(daemon.events("poolFailed").len(), 1);
    // Until it is closed, it is tried at each start.
    daemon.kill();
    daemon.run(&[]);
    assert_eq!(daemon.get("/healthz")["state"], "degraded");
    daemon.post("/v1/pools/p1/close", &json!({}));
    daemon.kill();
    daemon.run(&[]);
    assert_eq!(daemon.get("/healthz")["state"], "ok");
}

#[test]
fn a_pool_is_closed_unless_a_guest_uses_it_and_can_be_opened_again() {
    let (mut daemon, manifest) = started();
    let before = lasting(&daemon);
    let device = attach(&daemon, "vm/a");
    eventually("the front end is seen", || daemon.get("/v1/volumes/vm/a")["attached"] == true);
    assert_eq!(daemon.refused("/v1/pools/p0/close", &json!({}), 409)["code"], "busy");
    drop(device);
    eventually("it is gone", || daemon.get("/v1/volumes/vm/a")["attached"] == false);
    daemon.post("/v1/pools/p0/close", &json!({}));
    assert!(daemon.volumes().is_empty());
    let plan = daemon.apply(&manifest);
    assert_eq!(plan["steps"][0]["action"], "open");
    assert_eq!(plan["steps"].as_array().unwrap().len(), 1);
    assert_eq!(lasting(&daemon), before);
    daemon.stop();
    daemon.run(&["--pool", &daemon.path("pool").display().to_string()]);
    assert_eq!(lasting(&daemon), before);
}

#[test]
fn events_are_numbered_and_can_be_waited_for() {
    let (daemon, _) = started();
    let seen = daemon.get("/v1/events");
    let last = seen["last"].as_u64().unwrap();
    let numbers: Vec<u64> = seen["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| event["sequence"].as_u64().unwrap())
        .collect();
    assert_eq!(numbers, (1..=last).collect::<Vec<_>>());
    let path = format!("/v1/events?after={last}&waitSeconds=30");
    let next = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| daemon.get(&path));
        daemon.post("/v1/volumes/vm/a/resize", &json!({"sizeBytes": 20 << 20}));
        waiting.join().unwrap()
    });
    assert_eq!(next["events"][0]["kind"], "resized");
    assert_eq!(next["events"][0]["sequence"], last + 1);
    let device = attach(&daemon, "vm/a");
    eventually("attachment is told", || daemon.events("attached").len() == 1);
    drop(device);
    eventually("detachment is told", || daemon.events("detached").len() == 1);
    assert_eq!(daemon.ask("GET", "/v1/events?after=x", &Value::Null).0, 400);
}

#[test]
fn metrics_show_every_pool_and_volume() {
    let (daemon, _) = started();
    let page = daemon.get("/metrics");
    let page = page.as_str().unwrap();
    for line in [
        "vflash_pool_space_bytes{pool=\"p0\",use=\"allocated\"} 16777216",
        "vflash_volume_size_bytes{pool=\"p0\",vm=\"vm\",volume=\"b\"} 1073741824",
        "vflash_volume_attached{pool=\"p0\",vm=\"vm\",volume=\"a\"} 0",
        "vflash_volume_bounced_pieces_total{pool=\"p0\",vm=\"vm\",volume=\"a\"} 0",
        "vflash_pool_waiting_requests{pool=\"p0\"} 0",
        "vflash_problems 0",
    ] {
        assert!(page.lines().any(|found| found == line), "{line} is missing in\n{page}");
    }
    assert_eq!(page.matches("TYPE vflash_volume_bounced").count(), 1, "counted in one place");
    assert_eq!(daemon.get("/v1/volumes/vm/a")["bouncedPieces"], 0);
    let named = |name: &str| page.contains(&format!("# TYPE {name} "));
    assert!(named("vflash_volume_latency_seconds") && named("vflash_volume_in_flight_requests"));
}

/// Sends bytes as they are and reads what comes back until the daemon closes.
fn raw(daemon: &Vflashd, bytes: &[u8]) -> String {
    let mut stream = daemon.connect();
    // The daemon may have answered and closed before all was sent.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn garbage_is_answered_with_what_is_wrong() {
    let (daemon, _) = started();
    for (bytes, status) in [
        (&b"\x00\xff\x16\x03\x01 garbage\r\n\r\n"[..], "400"),
        (b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "404"),
        (b"DELETE /v1/pools HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "405"),
        (b"GET /v1/volumes/../../etc HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "404"),
        (b"GET /v1/volumes/%2e%2e/a HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "404"),
        (b"GET /v1/pools/%ff HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "400"),
        (b"GET /v1/events?after=%ff HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "400"),
        (b"POST /v1/apply HTTP/1.1\r\nhost: x\r\ncontent-length: 9999999999\r\n\r\n", "413"),
        (b"POST /v1/apply HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\nconnection: close\r\n\r\n[]",
            "400"),
    ] {
        let answer = raw(&daemon, bytes);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{status}: {answer}");
        if bytes.starts_with(b"GET") || bytes.starts_with(b"POST") {
            let (_, body) = parse(&answer).unwrap();
            let failure: Value = serde_json::from_str(&body).unwrap();
            assert!(failure["code"].is_string() && failure["message"].is_string(), "{answer}");
        }
    }
    let long = format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "x".repeat(1 << 20));
    let answer = raw(&daemon, long.as_bytes());
    assert!(!answer.starts_with("HTTP/1.1 2"), "{answer}");
    for body in [json!([]), json!({"sources": 1}), json!({"sources": [], "unknown": 1})] {
        assert_eq!(daemon.refused("/v1/apply", &body, 400)["code"], "invalid");
    }
    assert_eq!(daemon.get("/healthz")["state"], "ok");
}

#[test]
fn a_body_that_is_too_large_or_too_slow_is_given_up() {
    let daemon = Vflashd::start();
    let mut stream = daemon.connect();
    write!(stream, "POST /v1/apply HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        .unwrap();
    let chunk = [format!("{:x}\r\n", 1 << 20).into_bytes(), vec![b' '; 1 << 20], b"\r\n".to_vec()];
    let chunk = chunk.concat();
    // Nine are more than the daemon takes; it may stop reading earlier.
    let _ = (0..9).try_for_each(|_| stream.write_all(&chunk));
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");

    let begun = Instant::now();
    let mut slow = daemon.connect();
    write!(slow, "POST /v1/apply HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{").unwrap();
    let mut idle = daemon.connect();
    let mut silent = daemon.connect();
    write!(silent, "GET /v1/sta").unwrap();
    let answer = {
        let mut answer = [0; 12];
        slow.read_exact(&mut answer).unwrap();
        answer
    };
    assert_eq!(&answer, b"HTTP/1.1 408");
    let mut rest = Vec::new();
    silent.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 408"), "{rest:?}");
    rest.clear();
    idle.read_to_end(&mut rest).unwrap();
    assert!(begun.elapsed() < SOON);
    assert_eq!(daemon.get("/healthz")["state"], "ok");
}

#[test]
fn a_thousand_connections_leave_room_for_the_next_caller() {
    let (daemon, _) = started();
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    let before = descriptors();
    let idle: Vec<UnixStream> = (0..1000).map(|_| daemon.connect()).collect();
    let mut turned_away = 0;
    for mut stream in idle.iter().rev().take(100) {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (status, body) = parse(&answer).unwrap();
        let failure: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &failure["code"]), (503, &json!("overloaded")));
        turned_away += 1;
    }
    assert_eq!(turned_away, 100);
    // The data path does not notice.
    drop(attach(&daemon, "vm/a"));
    drop(idle);
    eventually("connections are given back", || descriptors() <= before + 4);
    assert_eq!(daemon.get("/healthz")["state"], "ok");
}

#[test]
fn a_second_daemon_on_a_run_directory_is_refused() {
    let (daemon, _) = started();
    let second = daemon.command().output().unwrap();
    assert!(!second.status.success());
    let text = String::from_utf8(second.stderr).unwrap();
    assert!(text.contains("another vflashd serves"), "{text}");
    assert_eq!(daemon.volumes(), ["vm/a", "vm/b"]);
}
