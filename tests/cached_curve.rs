//! What more or less cache would bring, told by the real daemon of what a guest has read.

mod cached_disk;
mod vflashd;

use cached_disk::{MIB, ask, cache, connect, image, manifest, started};
use serde_json::{Value, json};
use vflash_bench::device::Device;
use vflash_bench::queue::Kind;
use vflashd::{Vflashd, change, eventually};

/// Reads so many bytes from the beginning, in 32 KiB.
fn pass(device: &mut Device, bytes: u64) {
    let mut chunk = vec![0; 32 << 10];
    for at in (0..bytes).step_by(32 << 10) {
        assert_eq!(ask(device, Kind::Read, at / 512, &mut chunk), 0);
    }
}

/// Of a million reads, the hits in a cache of so many bytes.
fn hits_at(curve: &Value, bytes: u64) -> u64 {
    let points = curve["points"].as_array().unwrap();
    let below = points.iter().rev().find(|point| point["sizeBytes"].as_u64() <= Some(bytes));
    below.unwrap()["hitsPerMillion"].as_u64().unwrap()
}

#[test]
fn a_curve_has_its_step_where_the_guest_begins_again() {
    let (daemon, _) = started("");
    let mut device = connect(&daemon, "vm/disk", 1, 8);
    let curve = || daemon.get("/v1/volumes/vm/disk/curve");
    assert_eq!(curve()["reads"], 0);
    for _ in 0..4 {
        pass(&mut device, 8 * MIB);
    }
    let curve = curve();
    assert_eq!(curve["reads"], 4 * 2048);
    assert_eq!(curve["sizeBytes"], 16 * MIB);
    assert!(hits_at(&curve, 7 * MIB) < 50_000, "{curve}");
    let hits = hits_at(&curve, 9 * MIB);
    assert!((700_000..=800_000).contains(&hits), "three of four passes: {hits}");
    let (_, page) = daemon.ask("GET", "/metrics", &Value::Null);
    let page = page.as_str().unwrap();
    let line = "vflash_cache_size_bytes{pool=\"p0\",vm=\"vm\",volume=\"disk\"} 16777216";
    assert!(page.contains(line), "{page}");
}

/// One guest reads each block once, the other a few of them again and again.
#[test]
fn space_follows_use_between_minimum_and_maximum() {
    let daemon = Vflashd::start_with(&["--balance-every", "1"]);
    let paths = ["a.raw", "b.raw"].map(|name| daemon.path(name));
    paths.iter().for_each(|path| image(path));
    let [first, second] = paths.each_ref().map(|path| path.to_str().unwrap());
    let words = ", minimum: 8MiB, maximum: 24MiB";
    let manifest = manifest(&daemon, &[("scan", words, first), ("zipf", words, second)]);
    let manifest = manifest.replace("size: 256MiB", "size: 40MiB").replace("16MiB", "14MiB");
    daemon.apply(&manifest);
    let mut scanning = connect(&daemon, "vm/scan", 1, 8);
    let mut zipf = connect(&daemon, "vm/zipf", 1, 8);
    let mut random = fastrand::Rng::with_seed(4);
    pass(&mut scanning, 24 * MIB);
    let mut block = [0; 4096];
    for _ in 0..20_000 {
        let at = (random.f64().powi(2) * 6000.0) as u64 * 8;
        assert_eq!(ask(&mut zipf, Kind::Read, at, &mut block), 0);
    }
    let size = |volume: &str| cache(&daemon, volume)["sizeBytes"].as_u64().unwrap() / MIB;
    // The pool had 5 MiB to give at the most: the rest comes from the other.
    eventually("space moves to the one that reads again", || size("vm/zipf") >= 20);
    assert!((8..=13).contains(&size("vm/scan")), "{}", size("vm/scan"));
    let told = daemon.events("balanced");
    assert!(told.iter().any(|text| text.contains("vm/zipf")), "{told:?}");
    let share = cache(&daemon, "vm/zipf")["share"].clone();
    assert_eq!(share["maximumBytes"], 24 * MIB);
    assert!(share["goalBytes"].as_u64() >= Some(18 * MIB), "{share}");
    let again = daemon.apply(&manifest);
    assert_eq!(again["steps"], json!([]), "sizes between are nobody's mistake");
    let large = manifest.replace("size: 14MiB, minimum: 8MiB", "size: 20MiB, minimum: 20MiB");
    let (status, body) = daemon.ask("POST", "/v1/apply", &change(&large));
    assert_ne!(status, 200, "the pool has no 7MiB for the scanner: {body}");
    let minimum = cache(&daemon, "vm/scan")["share"]["minimumBytes"].clone();
    assert_eq!(minimum, 8 * MIB, "nothing was done");
}

#[test]
fn advice_moves_cache_to_the_disk_that_gains() {
    let daemon = Vflashd::start();
    let paths = ["a.raw", "b.raw"].map(|name| daemon.path(name));
    paths.iter().for_each(|path| image(path));
    let [first, second] = paths.each_ref().map(|path| path.to_str().unwrap());
    daemon.apply(&manifest(&daemon, &[("loop", "", first), ("scan", "", second)]));
    let mut looping = connect(&daemon, "vm/loop", 1, 8);
    let mut scanning = connect(&daemon, "vm/scan", 1, 8);
    for _ in 0..3 {
        pass(&mut looping, 20 * MIB);
    }
    pass(&mut scanning, 24 * MIB);
    let advice = daemon.get(&format!("/v1/advice?stepBytes={}", 8 * MIB));
    let disk = |at: usize| advice["disks"][at].clone();
    assert_eq!((&disk(0)["name"], &disk(1)["name"]), (&json!("vm/loop"), &json!("vm/scan")));
    assert!(disk(0)["hitsPerMillion"].as_u64() < Some(50_000), "{advice}");
    assert!(disk(0)["moreHitsPerMillion"].as_u64() > Some(600_000), "{advice}");
    assert_eq!(disk(1)["moreHitsPerMillion"], 0, "what is read once gains nothing");
    assert_eq!(advice["best"]["to"], "vm/loop");
    assert_eq!(advice["best"]["from"], Value::Null, "the pool has space");
    let (status, _) = daemon.ask("GET", "/v1/advice?stepBytes=1", &Value::Null);
    assert_eq!(status, 400);
}
