//! Whatever an NBD server sends, the client lives, and with the next server it goes on.
//!
//! A seeded loop: servers whose bytes are mutated, in the negotiation and after it. Runs for
//! VFLASH_FUZZ_SECONDS (default 2); a failure names its seed.

#[path = "backing_nbd/fake.rs"]
#[allow(dead_code, reason = "each program has its own manners")]
mod fake;

use fake::{FLAGS, Fake, Manner, listens};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vflash::backing::nbd::protocol::{Negotiation, answer_greeting, option_reply, reply};
use vflash::backing::nbd::{NbdClient, NbdOptions};
use vflash::backing::spec::Spec;
use vflash::io::blocking::Blocking;
use vflash::io::disk::OpenDisk;

fn fuzz_duration() -> Duration {
    let seconds = std::env::var("VFLASH_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(2))
}

struct Announce(u64);

impl Drop for Announce {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("fuzz round failed; its seed is {}", self.0);
        }
    }
}

fn options() -> NbdOptions {
    NbdOptions {
        connect: Duration::from_millis(100),
        request: Duration::from_millis(100),
        settle: Duration::ZERO,
        read: Duration::from_secs(2),
        patience: Some(Duration::from_secs(2)),
    }
}

#[test]
fn no_server_harms_the_client() {
    let mut random = fastrand::Rng::with_seed(31);
    let (mut rounds, mut refused) = (0, 0);
    let begun = Instant::now();
    while begun.elapsed() < fuzz_duration() {
        let seed = random.u64(..);
        let announce = Announce(seed);
        let fake = Fake::start(vec![7; 1 << 20], &[Manner::Garbled(seed)], FLAGS);
        assert!(!fake.path().as_os_str().is_empty());
        let Spec::Nbd(url) = Spec::parse(&fake.url()).expect("a URL") else { panic!("NBD") };
        match NbdClient::connect(url, options()) {
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
            Ok(client) => {
                let mut disk = Blocking::new(client.open(Arc::new(|| {})).expect("opens"));
                for _ in 0..6 {
                    // It may be answered wrongly: any end but a panic or a hang.
                    let _ = disk.read(0, 8192);
                    let _ = disk.write_copies(&[4096], &[1; 4096]);
                    let _ = disk.flush();
                }
            }
        }
        rounds += 1;
        assert!(fake.connections.load(Ordering::SeqCst) > 0);
        assert!(listens(&fake.path()), "the server lives");
        drop(announce);
    }
    println!("fuzz of NBD servers: {rounds} rounds, {refused} refused, 0 failures");
    assert!(rounds > refused && refused > 0, "both outcomes are reached");
}

#[test]
fn no_bytes_make_the_parsers_panic() {
    let mut random = fastrand::Rng::with_seed(37);
    let begun = Instant::now();
    let (mut rounds, mut sound) = (0_u64, 0_u64);
    let heads = [0x0003_e889_0455_65a9_u64, 0x4e42_444d_4147_4943, 0x6744_6698_0000_0000];
    while begun.elapsed() < fuzz_duration() {
        let mut bytes = [0; 64];
        random.fill(&mut bytes);
        bytes[..8].copy_from_slice(&random.choice(heads).expect("three").to_be_bytes());
        if random.bool() {
            bytes[8..12].copy_from_slice(&7u32.to_be_bytes());
            bytes[12..16].copy_from_slice(&random.u32(0..4).to_be_bytes());
            bytes[16..20].copy_from_slice(&random.u32(0..40).to_be_bytes());
        }
        let _ = answer_greeting(bytes.first_chunk().expect("long enough"));
        let _ = reply(bytes.first_chunk().expect("long enough"));
        let mut negotiation = Negotiation::default();
        for _ in 0..4 {
            let Ok(head) = option_reply(bytes.first_chunk().expect("long enough")) else { break };
            bytes[15] = random.choice([1, 3]).expect("two");
            let length = random.usize(..40);
            bytes[20..24].copy_from_slice(&random.u32(0..4 << 16).to_be_bytes());
            if let Ok(Some(export)) = negotiation.reply(head, &bytes[20..20 + length]) {
                let geometry = export.geometry();
                assert!(geometry.size_bytes.is_multiple_of(geometry.block_bytes.into()));
                assert!(geometry.block_bytes <= 4096 && export.payload_bytes_max >= 4096);
                sound += 1;
            }
        }
        rounds += 1;
    }
    println!("fuzz of NBD parsers: {rounds} rounds, {sound} exports, 0 failures");
    assert!(rounds > 1000);
}
