//! One cached disk that several machines have, on the real daemon.

mod cached_disk;
mod vflashd;

use cached_disk::{
    Nbd, ask, cache, connect, contents, counter, drain, image, load, operate, read, same, verify,
    write,
};
use serde_json::json;
use std::path::{Path, PathBuf};
use vflash_bench::device::Device;
use vflash_bench::linear::{self, LinearOptions, Meanwhile};
use vflash_bench::queue::Kind;
use vflashd::{Vflashd, change, confirmed, eventually, pool_manifest};

/// A machine's document with its volumes as YAML, a line each.
fn machine(name: &str, volumes: &[&str]) -> String {
    let volumes: String = volumes.iter().map(|volume| format!("  - {volume}\n")).collect();
    format!(
        "---\napiVersion: vflash/v1\nkind: VirtualMachine\nmetadata: {{name: {name}}}\n\
         spec:\n  volumes:\n{volumes}"
    )
}

/// The volume that brings the cache.
fn home(backing: &Path, words: &str) -> String {
    let backing = backing.display();
    format!("{{name: disk, cache: {{pool: p0, size: 16MiB}}, backing: {backing}{words}}}")
}

fn door(backing: &Path, words: &str) -> String {
    format!("{{name: disk, backing: {}{words}}}", backing.display())
}

/// A daemon with an image.
fn with_image() -> (Vflashd, PathBuf) {
    let daemon = Vflashd::start();
    let backing = daemon.path("disk.raw");
    image(&backing);
    (daemon, backing)
}

fn lines(plan: &serde_json::Value) -> Vec<String> {
    let steps = plan["steps"].as_array().unwrap().iter();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    steps.map(|step| format!("{}: {}", text(&step["object"]), text(&step["detail"]))).collect()
}

fn detached(daemon: &Vflashd, volume: &str) {
    let path = format!("/v1/volumes/{volume}");
    eventually("it is let go", || daemon.get(&path)["attached"] == false);
}

/// The message with which an apply is refused.
fn refusal(daemon: &Vflashd, manifest: &str) -> String {
    let (status, body) = daemon.ask("POST", "/v1/apply", &change(manifest));
    assert_ne!(status, 200, "{body}");
    body.to_string().replace(daemon.folder.path().to_str().unwrap(), "DIR")
}

#[test]
fn machines_that_share_a_disk_see_each_others_writes_at_once_and_after_a_kill() {
    let (mut daemon, backing) = with_image();
    let manifest = pool_manifest(daemon.folder.path())
        + &machine("one", &[&home(&backing, ", sharedWith: [two, three]")]);
    let plan = daemon.apply(&manifest);
    assert_eq!(
        lines(&plan)[2..],
        ["volume two/disk: the disk of one/disk", "volume three/disk: the disk of one/disk"]
    );
    assert_eq!(daemon.volumes(), ["one/disk", "three/disk", "two/disk"]);
    let pools = daemon.get("/v1/pools");
    assert_eq!(pools["pools"][0]["volumes"], 1, "one copy on the flash");
    let (mut one, mut two) =
        (connect(&daemon, "one/disk", 2, 8), connect(&daemon, "two/disk", 2, 8));
    for round in 1..20 {
        write(&mut one, 63, round);
        assert_eq!(read(&mut two, 63), round);
        write(&mut two, 63, 100 + round);
        assert_eq!(read(&mut one, 63), 100 + round);
    }
    assert_eq!(ask(&mut two, Kind::Flush, 0, &mut []), 0, "covers what the other wrote, too");
    let serial = |name: &str| daemon.get(&format!("/v1/volumes/{name}"))["serial"].clone();
    assert_eq!(serial("one/disk"), serial("two/disk"));
    let described = daemon.get("/v1/volumes/two/disk");
    assert_eq!(described["diskOf"], "one/disk");
    assert_eq!(described["cache"]["doors"], json!(["one/disk", "two/disk", "three/disk"]));
    assert_eq!(daemon.get("/v1/status")["caches"].as_array().unwrap().len(), 1);
    daemon.kill();
    daemon.run(&[]);
    one.reconnect().unwrap();
    two.reconnect().unwrap();
    let mut three = connect(&daemon, "three/disk", 1, 8);
    assert_eq!((read(&mut one, 63), read(&mut two, 63), read(&mut three, 63)), (119, 119, 119));
    assert_eq!(daemon.apply(&manifest)["steps"], json!([]), "a plan made again gives nothing");
    let plan =
        daemon.post("/v1/diff", &change(daemon.get("/v1/manifest")["text"].as_str().unwrap()));
    assert_eq!(plan["steps"], json!([]), "what there is, as a manifest");
    daemon.stop();
}

#[test]
fn loads_of_two_machines_on_halves_of_one_disk_outlive_kills_and_each_other() {
    let (mut daemon, backing) = with_image();
    daemon.apply(
        &(pool_manifest(daemon.folder.path())
            + &machine("one", &[&home(&backing, "")])
            + &machine("two", &[&door(&backing, "")])),
    );
    let mut quiet = connect(&daemon, "two/disk", 1, 8);
    write(&mut quiet, 40_000, 9);
    let mut runner = load(&daemon, "one/disk", 21);
    operate(&mut runner, 500);
    // The other machine dies with requests under way, and comes back as another.
    for sector in 0..4 {
        let slot = quiet.queues[0].take_slot().unwrap();
        quiet.queues[0].submit(&quiet.memory, slot, Kind::Read, sector * 8, 4096);
    }
    quiet.queues[0].publish(&quiet.memory);
    drop(quiet);
    operate(&mut runner, 500);
    let mut quiet = connect(&daemon, "two/disk", 1, 8);
    daemon.kill();
    daemon.run(&[]);
    runner.device.reconnect().unwrap();
    operate(&mut runner, 500);
    verify(&mut runner);
    quiet.reconnect().unwrap();
    let seen = contents(&mut runner.device);
    same(&contents(&mut quiet), &seen);
    runner.device.stop().unwrap();
    drain(&daemon, "two/disk");
    same(&std::fs::read(&backing).unwrap(), &seen);
    daemon.stop();
}

#[test]
fn a_disk_is_one_under_whatever_name_and_its_cache_is_said_once() {
    let (daemon, backing) = with_image();
    let (hard, soft) = (daemon.path("hard.raw"), daemon.path("soft.raw"));
    std::fs::hard_link(&backing, &hard).unwrap();
    std::os::unix::fs::symlink(&backing, &soft).unwrap();
    let pool = pool_manifest(daemon.folder.path());
    let text = refusal(&daemon, &(pool.clone() + &machine("two", &[&door(&hard, "")])));
    assert!(text.contains("no volume of this host caches DIR/hard.raw"), "{text}");
    let one = machine("one", &[&home(&backing, "")]);
    daemon.apply(&(pool.clone() + &one));
    daemon.apply(&machine("two", &[&door(&hard, ", limits: {iops: 100}")]));
    daemon.apply(&machine("three", &[&home(&soft, ", readOnly: true")]));
    let volume = daemon.get("/v1/volumes/two/disk");
    assert_eq!((&volume["limits"]["iops"], &volume["diskOf"]), (&json!(100), &json!("one/disk")));
    assert_eq!(daemon.get("/v1/volumes/one/disk")["limits"]["iops"], json!(null));
    let mut one_device = connect(&daemon, "one/disk", 1, 8);
    let mut three = connect(&daemon, "three/disk", 1, 8);
    write(&mut one_device, 8, 77);
    assert_eq!(read(&mut three, 8), 77);
    assert_eq!(ask(&mut three, Kind::Write, 8, &mut [1; 4096]), 1, "read-only for this machine");

    let other = "{name: disk, cache: {pool: p0, size: 32MiB, mode: write-through}, backing: FILE}";
    let other = other.replace("FILE", soft.to_str().unwrap());
    let text = refusal(&daemon, &machine("four", &[&other]));
    for part in [
        "one/disk brings the cache of this disk, with `size: 16MiB`: write that, or leave `size`",
        "with `mode: write-back`",
    ] {
        assert!(text.contains(part), "{text}");
    }
    let twice = [home(&backing, "").as_str(), &door(&soft, "").replace("disk,", "again,")]
        .map(str::to_owned);
    let text = refusal(&daemon, &machine("one", &[&twice[0], &twice[1]]));
    assert!(
        text.contains("one/disk is this disk already, and a machine has a disk once"),
        "{text}"
    );
    let flash = "{name: disk, flash: {pool: p0, size: 1MiB}}";
    let text = refusal(&daemon, &machine("two", &[flash]));
    assert!(text.contains("two/disk shares the disk of one/disk"), "{text}");
}

#[test]
fn a_machine_leaves_its_disk_to_the_others_and_the_last_one_drains_it() {
    let (mut daemon, backing) = with_image();
    let pool = pool_manifest(daemon.folder.path());
    let one = machine("one", &[&home(&backing, "").replace("16MiB", "16MiB, maxStaleness: 1h")]);
    daemon.apply(&(pool.clone() + &one));
    daemon.apply(&machine("two", &[&door(&backing, "")]));
    daemon.apply(&machine("three", &[&door(&backing, "")]));
    let mut device = connect(&daemon, "one/disk", 1, 8);
    write(&mut device, 0, 5);
    daemon.refused("/v1/volumes/one/disk/detach", &json!({}), 409);
    device.stop().unwrap();
    drop(device);
    detached(&daemon, "one/disk");
    let mut two = connect(&daemon, "two/disk", 1, 8);
    let left = daemon.post("/v1/volumes/one/disk/detach", &json!({}));
    assert_eq!(left["destroys"], json!([]));
    assert!(lines(&left)[0].contains("which stays for"), "{left}");
    assert_eq!(daemon.get("/v1/volumes/one/disk")["state"], "left");
    assert_eq!(read(&mut two, 0), 5, "nobody else has noticed");
    write(&mut two, 8, 6);
    daemon.kill();
    daemon.run(&[]);
    two.reconnect().unwrap();
    assert_eq!((read(&mut two, 0), read(&mut two, 8)), (5, 6));
    assert_eq!(daemon.get("/v1/volumes/one/disk")["state"], "left");

    let back = daemon.apply(&one);
    assert_eq!(lines(&back), ["volume one/disk: its disk again"]);
    let mut device = connect(&daemon, "one/disk", 1, 8);
    assert_eq!(read(&mut device, 8), 6);
    device.stop().unwrap();
    drop(device);
    detached(&daemon, "one/disk");
    // By manifests, in the order in which they come.
    let plan = daemon.post("/v1/delete", &change(&one));
    assert_eq!(lines(&plan), ["volume one/disk: leave its disk to those who share it"]);
    let plan = daemon.post("/v1/delete", &change(&machine("three", &[&door(&backing, "")])));
    assert_eq!(lines(&plan), ["volume three/disk: leave the disk of one/disk"]);
    assert_eq!(read(&mut two, 8), 6);
    two.stop().unwrap();
    drop(two);
    detached(&daemon, "two/disk");
    assert_ne!(std::fs::read(&backing).unwrap()[4096], 6, "it is on the flash alone");
    let last = confirmed(&machine("two", &[&door(&backing, "")]), &["one/disk"]);
    let plan = daemon.post("/v1/delete", &last);
    assert!(lines(&plan).last().unwrap().contains("drain to"), "{plan}");
    assert!(daemon.volumes().is_empty());
    let image = std::fs::read(&backing).unwrap();
    assert_eq!((image[0], image[4096]), (5, 6));
    daemon.stop();
}

#[test]
fn the_last_door_of_a_disk_whose_home_has_left_is_opened_anew_with_other_settings() {
    let (mut daemon, backing) = with_image();
    let pool = pool_manifest(daemon.folder.path());
    let one = home(&backing, "").replace("16MiB", "16MiB, maxStaleness: 1h");
    daemon.apply(&(pool + &machine("one", &[&one]) + &machine("two", &[&door(&backing, "")])));
    daemon.post("/v1/volumes/one/disk/detach", &json!({}));
    let mut two = connect(&daemon, "two/disk", 1, 8);
    write(&mut two, 8, 6);
    two.stop().unwrap();
    drop(two);
    detached(&daemon, "two/disk");
    daemon.apply(&machine("two", &[&door(&backing, ", queues: 2")]));
    let volume = daemon.get("/v1/volumes/two/disk");
    assert_eq!(
        (&volume["state"], &volume["cache"]["state"]),
        (&json!("served"), &json!("serving"))
    );
    let mut two = connect(&daemon, "two/disk", 2, 8);
    assert_eq!(read(&mut two, 8), 6);
    assert_ne!(std::fs::read(&backing).unwrap()[4096], 6, "it is on the flash alone");
    drain(&daemon, "two/disk");
    assert_eq!(std::fs::read(&backing).unwrap()[4096], 6);
    daemon.stop();
}

#[test]
fn a_grant_ends_with_the_list_that_it_stands_in() {
    let (daemon, backing) = with_image();
    let pool = pool_manifest(daemon.folder.path());
    let granting = |list: &str| machine("one", &[&home(&backing, list)]);
    daemon.apply(&(pool.clone() + &granting(", sharedWith: [two, three]")));
    let empty = "---\napiVersion: vflash/v1\nkind: VirtualMachine\nmetadata: {name: two}\n\
                 spec: {volumes: []}\n";
    assert_eq!(daemon.apply(empty)["steps"], json!([]), "its own list does not end a grant");
    let plan = daemon.apply(&granting(", sharedWith: [three]"));
    assert_eq!(lines(&plan), ["volume two/disk: leave the disk of one/disk"]);
    assert_eq!(daemon.volumes(), ["one/disk", "three/disk"]);
    let device = connect(&daemon, "three/disk", 1, 8);
    let text = refusal(&daemon, &granting(""));
    assert!(text.contains("three/disk is to be deleted, and is attached"), "{text}");
    drop(device);
    let text = refusal(&daemon, &granting(", sharedWith: [one]"));
    assert!(text.contains("a machine has its own disk"), "{text}");
}

fn sockets(daemon: &Vflashd, machines: &[&str]) -> Vec<PathBuf> {
    machines.iter().map(|name| daemon.run_dir().join(name).join("disk.sock")).collect()
}

/// What happens to a disk while its guests are at work.
const DISTURBANCES: &[&str] = &[
    "drain",
    "grow",
    "kill",
    "write-through",
    "shrink",
    "kill",
    "drain",
    "write-back",
    "grow",
    "kill",
];

/// The same without kills, after which counters begin anew, and with less cache.
const GENTLE: &[&str] = &["drain", "least", "write-through", "shrink", "drain", "write-back"];

fn disturb(daemon: &mut Vflashd, meanwhile: &Meanwhile, every: u64, how: &[&str]) {
    let mut next = every;
    for what in how.iter().cycle() {
        while meanwhile.operations() < next && !meanwhile.is_over() {
            std::thread::yield_now();
        }
        if meanwhile.is_over() {
            return;
        }
        next += every;
        match *what {
            "kill" => {
                daemon.kill();
                daemon.run(&[]);
                meanwhile.restarted();
            }
            "grow" => resize(daemon, 32),
            "shrink" => resize(daemon, 12),
            "least" => resize(daemon, 6),
            "drain" => drop(daemon.post("/v1/volumes/two/disk/drain", &json!({}))),
            mode => {
                daemon.post("/v1/volumes/two/disk/mode", &json!({"mode": mode}));
                eventually(mode, || cache(daemon, "one/disk")["mode"] == mode);
            }
        }
    }
}

fn resize(daemon: &Vflashd, mebibytes: u64) {
    let bytes = mebibytes << 20;
    daemon.post("/v1/volumes/one/disk/resize", &json!({"sizeBytes": bytes}));
    eventually("it has the size", || {
        let cache = cache(daemon, "one/disk");
        cache["sizeBytes"] == bytes && cache["resizingToBytes"] == serde_json::Value::Null
    });
}

/// A number that `cargo xtask test`, or a person, sets higher.
fn asked(name: &str, default: u64) -> u64 {
    let asked = std::env::var(name).ok();
    asked.map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn all_that_several_machines_see_can_have_happened_in_one_order() {
    let (mut daemon, backing) = with_image();
    std::fs::write(&backing, vec![0; 24 << 20]).unwrap();
    let machines = ["one", "two", "three", "four", "five", "six", "seven", "eight"];
    let machines = &machines[..asked("VFLASH_LINEAR_MACHINES", 4) as usize];
    let home = home(&backing, &format!(", sharedWith: [{}]", machines[1..].join(", ")));
    daemon.apply(&(pool_manifest(daemon.folder.path()) + &machine("one", &[&home])));
    let operations = asked("VFLASH_LINEAR_OPERATIONS", 40_000);
    let options = LinearOptions {
        sockets: sockets(&daemon, machines),
        queues: 4,
        depth: 2,
        blocks: 16,
        operations,
        seed: 5,
    };
    let report = linear::run(&options, |meanwhile| {
        disturb(&mut daemon, meanwhile, (operations / 28).min(12_000), DISTURBANCES);
        Ok(())
    });
    let report = report.unwrap();
    println!("{report:?}");
    assert_eq!(report.violations, [""; 0], "{report:?}");
    assert!(report.restarts >= 3 && report.operations >= options.operations, "{report:?}");
    assert_eq!(report.torn, 0, "a block is never seen half written");
    daemon.stop();
}

/// Few blocks stay in the log or what was drained of it: here more are read than the cache has
/// room for, so that they come from the backing, are kept, moved and dropped.
#[test]
fn what_several_machines_see_has_one_order_on_a_disk_that_is_larger_than_its_cache() {
    let (mut daemon, backing) = with_image();
    std::fs::write(&backing, vec![0; 24 << 20]).unwrap();
    let socket = daemon.path("nbd");
    // A backing that is faster than the flash would be passed to.
    let _server = Nbd::unix(&socket, &backing, &["--filter=delay", "delay-read=12ms"]);
    let url = PathBuf::from(format!("nbd+unix:///?socket={}", socket.display()));
    let machines = ["one", "two", "three", "four"];
    let words = format!(", sharedWith: [{}]", machines[1..].join(", "));
    let sidecar = format!("16MiB, sidecar: {}", daemon.path("redo").display());
    let home = home(&url, &words).replace("16MiB", &sidecar);
    daemon.apply(&(pool_manifest(daemon.folder.path()) + &machine("one", &[&home])));
    let options = LinearOptions {
        sockets: sockets(&daemon, &machines),
        queues: 4,
        depth: 2,
        blocks: (16 << 20) / 4096,
        operations: 20_000,
        seed: 6,
    };
    let report = linear::run(&options, |meanwhile| {
        disturb(&mut daemon, meanwhile, options.operations / 14, GENTLE);
        Ok(())
    });
    let report = report.unwrap();
    assert_eq!((report.violations.as_slice(), report.torn), (&[][..], 0), "{report:?}");
    for name in ["hits", "misses", "fills", "retired"] {
        let count = counter(&daemon, "one/disk", name);
        assert!(count > 100 || (name == "retired" && count > 0), "{name}: {count}");
    }
    let gone = ["moves", "squeezed", "evicted"].map(|name| counter(&daemon, "one/disk", name));
    assert!(gone.iter().sum::<u64>() > 100, "moved, squeezed, evicted: {gone:?}");
    daemon.stop();
}

/// A write past the log that a kill cuts off is done again: over what another has written since.
#[test]
fn a_disk_that_several_machines_write_keeps_its_log() {
    let (daemon, backing) = with_image();
    let pool = pool_manifest(daemon.folder.path());
    let at_home = |words: &str, mode: &str| {
        machine("one", &[&home(&backing, words).replace("16MiB", &format!("16MiB, mode: {mode}"))])
    };
    let another = |words: &str| machine("two", &[&door(&backing, words)]);
    for mode in ["write-around", "read-only", "bypass"] {
        let text = refusal(&daemon, &(pool.clone() + &at_home(", sharedWith: [two]", mode)));
        assert!(text.contains("two/disk writes the disk of one/disk: "), "{text}");
        assert!(text.contains(&format!("`mode: {mode}` writes past the log")), "{text}");
    }
    // One who reads does no harm; one who writes too is refused, from either side.
    daemon.apply(&(pool.clone() + &at_home("", "bypass") + &another(", readOnly: true")));
    let text = refusal(&daemon, &another(""));
    assert!(text.contains("two/disk writes the disk of one/disk: "), "{text}");
    daemon.apply(&(at_home("", "write-back") + &another("")));
    let text = refusal(&daemon, &at_home("", "bypass"));
    assert!(text.contains("two/disk writes the disk of one/disk: "), "{text}");
    for name in ["one", "two"] {
        let path = format!("/v1/volumes/{name}/disk/mode");
        let failure = daemon.refused(&path, &json!({"mode": "write-around"}), 400);
        let text = failure["message"].as_str().unwrap();
        assert!(text.contains("several machines write it"), "{text}");
        assert!(text.contains("write `mode: write-back` or `mode: write-through`"), "{text}");
    }
    daemon.post("/v1/volumes/two/disk/mode", &json!({"mode": "write-through"}));
    daemon.apply(&(at_home("", "bypass") + &another(", readOnly: true")));
    eventually("it is in force", || cache(&daemon, "one/disk")["mode"] == "bypass");
}

/// A mode that is wanted is not yet one that is in force.
#[test]
fn another_writer_is_let_in_when_the_log_is_kept_and_not_before() {
    let (daemon, backing) = with_image();
    let socket = daemon.path("nbd");
    let server = Nbd::freezable(&socket, &backing);
    let export = PathBuf::from(format!("nbd+unix:///?socket={}", socket.display()));
    let pool = pool_manifest(daemon.folder.path());
    let wanted = |mode: &str, words: &str| {
        let cache = format!("16MiB, mode: {mode}, sidecar: {}", daemon.path("redo").display());
        pool.clone() + &machine("one", &[&home(&export, words).replace("16MiB", &cache)])
    };
    daemon.apply(&wanted("bypass", ""));
    let mut one = connect(&daemon, "one/disk", 1, 8);
    write(&mut one, 0, 1);
    server.freeze();
    let text = refusal(&daemon, &wanted("write-back", ", sharedWith: [two]"));
    assert!(text.contains("one/disk still writes past its log"), "{text}");
    assert_eq!(daemon.volumes(), ["one/disk"]);
    server.thaw();
    eventually("that is over", || cache(&daemon, "one/disk")["mode"] == "write-back");
    let plan = daemon.apply(&wanted("write-through", ", sharedWith: [two]"));
    let last = lines(&plan).pop().unwrap();
    assert_eq!(last, "volume two/disk: the disk of one/disk");
    let mut two = connect(&daemon, "two/disk", 1, 8);
    assert_eq!(read(&mut two, 0), 1);
    write(&mut two, 0, 2);
    assert_eq!(read(&mut one, 0), 2);
    drop(server);
}

/// What a machine had under way past the log when the daemon died is done again when it is back.
#[test]
fn another_writer_is_let_in_when_the_first_is_back_after_a_kill_past_the_log() {
    let (mut daemon, backing) = with_image();
    let pool = pool_manifest(daemon.folder.path());
    let wanted = |mode: &str, words: &str| {
        let home = home(&backing, words).replace("16MiB", &format!("16MiB, mode: {mode}"));
        pool.clone() + &machine("one", &[&home])
    };
    daemon.apply(&wanted("bypass", ""));
    let mut one = connect(&daemon, "one/disk", 1, 8);
    write(&mut one, 0, 1);
    daemon.kill();
    daemon.run(&[]);
    let shared = wanted("write-back", ", sharedWith: [two]");
    let text = refusal(&daemon, &shared);
    assert!(text.contains("one/disk was served past the log of its disk"), "{text}");
    // A mode that keeps the log changes nothing, nor does another daemon.
    daemon.apply(&wanted("write-back", ""));
    eventually("it is in force", || cache(&daemon, "one/disk")["mode"] == "write-back");
    daemon.kill();
    daemon.run(&[]);
    let text = refusal(&daemon, &shared);
    assert!(text.contains("start it, or let it reconnect"), "{text}");
    assert_eq!(daemon.volumes(), ["one/disk"]);
    one.reconnect().unwrap();
    assert_eq!(read(&mut one, 0), 1);
    daemon.apply(&shared);
    let mut two = connect(&daemon, "two/disk", 1, 8);
    write(&mut two, 0, 2);
    assert_eq!(read(&mut one, 0), 2);
    daemon.stop();
}

#[test]
fn one_image_is_read_by_many_machines_and_daemons_and_belongs_to_none() {
    let (mut daemon, backing) = with_image();
    let bytes = std::fs::read(&backing).unwrap();
    let golden = home(&backing, ", readOnly: true, sharedWith: [two, three]");
    daemon.apply(&(pool_manifest(daemon.folder.path()) + &machine("one", &[&golden])));
    let other = Vflashd::start();
    other.apply(&(pool_manifest(other.folder.path()) + &machine("far", &[&golden])));
    for (daemon, name) in [(&daemon, "one"), (&daemon, "three"), (&other, "far"), (&other, "two")] {
        let mut device = connect(daemon, &format!("{name}/disk"), 1, 8);
        same(&contents(&mut device), &bytes);
        assert_eq!(ask(&mut device, Kind::Write, 0, &mut [1; 4096]), 1, "{name} cannot write");
    }
    assert_eq!(cache(&daemon, "two/disk")["mode"], "read-only");
    assert!(!daemon.path("disk.raw.vflash").exists(), "no owner stamp");
    let failure = daemon.refused("/v1/volumes/one/disk/mode", &json!({"mode": "write-back"}), 400);
    assert!(failure["message"].as_str().unwrap().contains("read-only for all"), "{failure}");
    let writer = Vflashd::start();
    let wanted = pool_manifest(writer.folder.path()) + &machine("w", &[&home(&backing, "")]);
    let text = refusal(&writer, &wanted);
    assert!(text.contains("in use"), "nobody writes what others read: {text}");

    // Nobody's any more: it may be written, and then it is another image.
    drop(other);
    daemon.stop();
    writer.apply(&wanted);
    let mut device = connect(&writer, "w/disk", 1, 8);
    write(&mut device, 0, 200);
    device.stop().unwrap();
    daemon.begin(&[]);
    daemon.await_service();
    assert_eq!(daemon.get("/v1/volumes/one/disk")["state"], "failed", "it is being written");
    drop(device);
    detached(&writer, "w/disk");
    writer.post("/v1/volumes/w/disk/detach", &json!({}));
    for name in ["one/disk", "three/disk"] {
        let path = format!("/v1/volumes/{name}");
        eventually("it is served again", || daemon.get(&path)["state"] == "served");
        let mut device = connect(&daemon, name, 1, 8);
        assert_eq!(read(&mut device, 0), 200, "the image as it is now");
    }
    assert_eq!(std::fs::read(&backing).unwrap()[0], 200);
    daemon.stop();
}

#[test]
fn an_image_whose_last_writes_are_on_a_flash_is_not_read_without_them() {
    let (mut daemon, backing) = with_image();
    let words = home(&backing, "").replace("16MiB", "16MiB, maxStaleness: 1h");
    daemon.apply(&(pool_manifest(daemon.folder.path()) + &machine("one", &[&words])));
    let mut device = connect(&daemon, "one/disk", 1, 8);
    write(&mut device, 0, 7);
    drop(device);
    daemon.kill();
    let reader = Vflashd::start();
    let golden = home(&backing, ", readOnly: true");
    let wanted = pool_manifest(reader.folder.path()) + &machine("two", &[&golden]);
    let text = refusal(&reader, &wanted);
    assert!(
        text.contains("one/disk on host") && text.contains("holds writes that it lacks"),
        "{text}"
    );
    assert!(reader.volumes().is_empty(), "what was made was undone");
}

/// Bytes that an NBD server was asked for, by its log.
fn asked_for(log: &Path) -> u64 {
    let text = std::fs::read_to_string(log).unwrap();
    let bytes = |line: &str| {
        let count = line.split_once(" Read id=")?.1.split_once("count=0x")?.1;
        u64::from_str_radix(count.split(' ').next()?, 16).ok()
    };
    text.lines().filter_map(bytes).sum()
}

/// Reads a golden image as fast as its cache keeps it.
fn read_and_keep(daemon: &Vflashd, volume: &str, bytes: &[u8]) -> Device {
    let mut device = connect(daemon, volume, 1, 8);
    let mut seen = vec![0; bytes.len()];
    for (at, chunk) in (0..).zip(seen.chunks_mut(32 << 10)) {
        assert_eq!(ask(&mut device, Kind::Read, at * 64, chunk), 0);
        if at % 8 < 7 {
            continue;
        }
        // A guest that is faster than the flash has some of it fetched twice.
        eventually("what was read is kept", || {
            let cache = cache(daemon, volume);
            let kept = |name: &str| cache[name].as_u64().unwrap();
            kept("cleanBytes") + kept("probationBytes") >= (at + 1) * (32 << 10)
        });
    }
    same(&seen, bytes);
    device
}

/// An image behind a slow NBD server, its address there, and the log of what is asked for. A
/// backing that is faster than the flash would be passed to, and other tests slow the flash.
fn golden(daemon: &Vflashd) -> (PathBuf, PathBuf, PathBuf, Nbd) {
    let (golden, socket, log) =
        (daemon.path("golden.raw"), daemon.path("nbd"), daemon.path("asked"));
    image(&golden);
    let logs = format!("logfile={}", log.display());
    let filters = ["--filter=log", "--filter=delay", "delay-read=12ms", &logs];
    let server = Nbd::unix(&socket, &golden, &filters);
    let url = PathBuf::from(format!("nbd+unix:///?socket={}", socket.display()));
    (golden, url, log, server)
}

/// The stamp beside it tells whether it is the same; its cache is saved while it serves, and when
/// the daemon is told to.
#[test]
fn a_golden_image_is_warm_after_a_restart_until_it_is_another_one() {
    let mut daemon = Vflashd::start();
    let (golden, url, log, _server) = golden(&daemon);
    let sidecar = format!("48MiB, sidecar: {}", daemon.path("golden.vflash").display());
    let volume = |words: &str| home(&url, words).replace("16MiB", &sidecar);
    let change_it = |byte: u8| {
        let writer = Vflashd::start();
        writer.apply(&(pool_manifest(writer.folder.path()) + &machine("w", &[&volume("")])));
        let mut device = connect(&writer, "w/disk", 1, 8);
        write(&mut device, 0, byte);
        drop(device);
        detached(&writer, "w/disk");
        // Nothing is written to an NBD export in its first seconds; a detach waits no longer.
        drain(&writer, "w/disk");
        writer.post("/v1/volumes/w/disk/detach", &json!({}));
    };
    change_it(1);
    let manifest = machine("one", &[&volume(", readOnly: true")]);
    daemon.apply(&(pool_manifest(daemon.folder.path()) + &manifest));
    let bytes = std::fs::read(&golden).unwrap();
    drop(read_and_keep(&daemon, "one/disk", &bytes));
    daemon.post("/v1/volumes/one/disk/checkpoint", &json!({}));
    let missed = |daemon: &Vflashd| {
        let before = asked_for(&log);
        let seen = contents(&mut connect(daemon, "one/disk", 1, 8));
        same(&seen, &std::fs::read(&golden).unwrap());
        (asked_for(&log) - before) * 100 / seen.len() as u64
    };
    daemon.kill();
    for clean in [false, true] {
        daemon.begin(&[]);
        daemon.await_service();
        let percent = missed(&daemon);
        assert!(percent < 25, "{percent} % of the image were read again; clean: {clean}");
        daemon.stop();
    }
    change_it(2);
    daemon.begin(&[]);
    daemon.await_service();
    assert!(missed(&daemon) > 90, "it is another image");
    daemon.stop();
}

#[test]
fn eight_machines_read_a_golden_image_from_one_copy() {
    let mut daemon = Vflashd::start();
    let (golden, url, log, _server) = golden(&daemon);
    let names: Vec<String> = (1..=8).map(|number| format!("vm-{number}")).collect();
    let words = format!(", readOnly: true, sharedWith: [{}]", names[1..].join(", "));
    let home = home(&url, &words).replace("16MiB", "48MiB");
    daemon.apply(&(pool_manifest(daemon.folder.path()) + &machine(&names[0], &[&home])));
    let (bytes, volume) = (std::fs::read(&golden).unwrap(), format!("{}/disk", names[0]));
    let first = read_and_keep(&daemon, &volume, &bytes);
    let mut before = asked_for(&log);
    for name in &names[1..] {
        same(&contents(&mut connect(&daemon, &format!("{name}/disk"), 1, 8)), &bytes);
        let missed = asked_for(&log) - before;
        assert!(missed * 100 <= bytes.len() as u64 * 2, "{name} had {missed} bytes fetched");
        before += missed;
    }
    assert!(before * 100 <= bytes.len() as u64 * 102, "{before} bytes of the backing were read");
    drop(first);
    daemon.stop();
}
