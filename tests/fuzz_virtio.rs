//! Whatever a guest writes into its descriptors, a request stays inside its memory and its device.
//!
//! A seeded mutation loop: valid chains are made, then bent. Runs for VFLASH_FUZZ_SECONDS (default
//! 2); a failure names its seed.

use std::time::{Duration, Instant};
use vflash::base::limits::{RANGE_SECTORS_MAX, RANGES_MAX};
use vflash::io::buffer::{AlignedBuffer, Segment, total_bytes};
use vflash::io::volume::RequestKind;
use vflash::virtio::Device;
use vflash::virtio::chain::{Chain, Memory, SEGMENTS_PER_CHAIN_MAX};
use vflash::virtio::request::{Action, Request};

const REGION_BYTES: u64 = 64 << 10;
const BASES: [u64; 3] = [0, REGION_BYTES, 1 << 40];
const RING: u64 = 64;
const TABLE: u64 = 0x8000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

struct GuestMemory {
    regions: Vec<AlignedBuffer>,
}

impl GuestMemory {
    fn new() -> Self {
        Self { regions: BASES.iter().map(|_| AlignedBuffer::new(REGION_BYTES as usize)).collect() }
    }

    fn segment(&self, region: usize) -> Segment {
        // SAFETY: the buffers live as long as the memory, and no reference into them is held while
        // segments are used.
        unsafe { self.regions[region].segment() }
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        if let Some(segment) = self.translate(address, bytes.len() as u64) {
            segment.copy_from(bytes);
        }
    }

    fn contains(&self, segment: &Segment) -> bool {
        (0..BASES.len()).any(|region| {
            let whole = self.segment(region);
            let offset = (segment.address() as usize).wrapping_sub(whole.address() as usize);
            offset.checked_add(segment.length()).is_some_and(|end| end <= whole.length())
        })
    }
}

impl Memory for GuestMemory {
    fn translate(&self, address: u64, length: u64) -> Option<Segment> {
        let (region, base) = BASES
            .iter()
            .enumerate()
            .find(|(_, base)| address.checked_sub(**base).is_some_and(|at| at < REGION_BYTES))?;
        let part = self.segment(region).part((address - base) as usize, length as usize);
        (part.length() > 0).then_some(part)
    }
}

fn address(random: &mut fastrand::Rng) -> u64 {
    let base = BASES[random.usize(..BASES.len())];
    match random.u8(..10) {
        0 => random.u64(..),
        1 => u64::MAX - random.u64(..4096),
        2 => base + REGION_BYTES - random.u64(..600),
        _ => base + random.u64(..REGION_BYTES),
    }
}

fn length(random: &mut fastrand::Rng) -> u32 {
    const COMMON: [u32; 9] = [0, 1, 16, 512, 4096, 8192, 20, u32::MAX, 1 << 31];
    match random.u8(..4) {
        0 => random.u32(..),
        1 => random.u32(..10_000),
        _ => COMMON[random.usize(..COMMON.len())],
    }
}

fn descriptor(random: &mut fastrand::Rng, memory: &GuestMemory, at: u64, entries: u16) {
    let mut bytes = Vec::from(address(random).to_le_bytes());
    bytes.extend(length(random).to_le_bytes());
    let flags = match random.u8(..8) {
        0 => random.u16(..),
        1 => INDIRECT,
        2 | 3 => WRITE,
        4 => 0,
        _ => NEXT | if random.bool() { WRITE } else { 0 },
    };
    bytes.extend(flags.to_le_bytes());
    let next = if random.u8(..10) == 0 { random.u16(..) } else { random.u16(..entries) };
    bytes.extend(next.to_le_bytes());
    memory.write(at, &bytes);
}

/// A well-formed request: header, data, status, perhaps through an indirect table.
fn valid(random: &mut fastrand::Rng, memory: &GuestMemory, device: &Device) {
    const KINDS: [u32; 8] = [0, 1, 4, 8, 11, 13, 10, 99];
    let kind = KINDS[random.usize(..KINDS.len())];
    let mut header = Vec::from(kind.to_le_bytes());
    header.extend([0; 4]);
    header.extend(random.u64(..device.capacity_sectors + 8).to_le_bytes());
    memory.write(0x4000, &header);
    for range in 0..3 {
        let mut bytes = Vec::from(random.u64(..device.capacity_sectors).to_le_bytes());
        bytes.extend(random.u32(..4096).to_le_bytes());
        bytes.extend(u32::from(random.u8(..3)).to_le_bytes());
        memory.write(0x5000 + range * 16, &bytes);
    }
    let indirect = random.bool();
    let table = if indirect { TABLE } else { 0 };
    let data_flags = NEXT | if kind == 0 || kind == 8 { WRITE } else { 0 };
    let data_length = [512, 1024, 4096, 16, 32, 48, 20][random.usize(..7)];
    let entries: [(u64, u32, u16, u16); 3] =
        [(0x4000, 16, NEXT, 1), (0x5000, data_length, data_flags, 2), (0x7000, 1, WRITE, 0)];
    for (at, (address, length, flags, next)) in (0u64..).zip(entries) {
        let mut bytes = Vec::from(address.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        memory.write(table + at * 16, &bytes);
    }
    if indirect {
        let mut bytes = Vec::from(TABLE.to_le_bytes());
        bytes.extend(48u32.to_le_bytes());
        bytes.extend(INDIRECT.to_le_bytes());
        bytes.extend([0; 2]);
        memory.write(0, &bytes);
    }
}

fn check(memory: &GuestMemory, chain: &Chain, request: &Request, action: Action, device: &Device) {
    let all = chain.readable().iter().chain(chain.writable());
    assert!(all.clone().count() <= SEGMENTS_PER_CHAIN_MAX);
    assert!(all.chain(&request.data).all(|segment| memory.contains(segment)));
    let status = request.status.expect("a parsed request has a status byte");
    assert!(status.length() == 1 && memory.contains(&status));
    let within = request.ranges.iter().all(|range| {
        range.start.checked_add(range.count).is_some_and(|end| end <= device.capacity_sectors)
    });
    match action {
        Action::Volume(RequestKind::Read | RequestKind::Write) => {
            let [range] = request.ranges[..] else { panic!("a transfer has one range") };
            assert!(within && total_bytes(&request.data) as u64 == range.count * 512);
            assert_eq!(request.bytes, range.count * 512);
        }
        Action::Volume(RequestKind::Discard | RequestKind::WriteZeroes { .. }) => {
            assert!(within && (1..=RANGES_MAX).contains(&request.ranges.len()));
            let small = |count| (1..=u64::from(RANGE_SECTORS_MAX)).contains(&count);
            assert!(request.ranges.iter().all(|range| small(range.count)));
        }
        Action::Volume(RequestKind::Flush) | Action::GetId | Action::Refuse(_) => {}
    }
    if device.read_only {
        let reads = matches!(
            action,
            Action::Volume(RequestKind::Read | RequestKind::Flush)
                | Action::GetId
                | Action::Refuse(_)
        );
        assert!(reads, "{action:?} on a read-only device");
    }
}

#[test]
fn no_chain_leads_outside_memory_or_device() {
    let seconds = std::env::var("VFLASH_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    let end = Instant::now() + Duration::from_secs(seconds.unwrap_or(2));
    let memory = GuestMemory::new();
    let mut device = Device {
        capacity_sectors: 1 << 12,
        block_bytes: 512,
        optimal_bytes: 4096,
        read_only: false,
        discard: true,
        serial: "vflash-nv-fuzz".into(),
        queues: 1,
    };
    let (mut chain, mut request) = (Chain::new(), Request::new());
    // Each way a chain can go must have been taken, or the loop does not reach what it claims to.
    let (mut runs, mut malformed, mut unparsed, mut actions) = (0u64, 0u64, 0u64, [0u64; 7]);
    for seed in 0.. {
        let mut random = fastrand::Rng::with_seed(seed);
        device.read_only = random.u8(..8) == 0;
        valid(&mut random, &memory, &device);
        for _ in 0..random.usize(..4) {
            let at = if random.bool() { 0 } else { TABLE };
            let entry = random.u64(..RING);
            descriptor(&mut random, &memory, at + entry * 16, RING as u16);
        }
        let run = std::panic::AssertUnwindSafe(|| {
            let table = memory.translate(0, RING * 16).expect("the ring is mapped");
            let head = if random.u8(..4) == 0 { random.u16(..RING as u16 + 2) } else { 0 };
            match chain.read(&memory, &table, head) {
                Err(_) => malformed += 1,
                Ok(()) => match request.parse(&chain, &device) {
                    None => unparsed += 1,
                    Some(action) => {
                        check(&memory, &chain, &request, action, &device);
                        actions[match action {
                            Action::Volume(RequestKind::Read) => 0,
                            Action::Volume(RequestKind::Write) => 1,
                            Action::Volume(RequestKind::Flush) => 2,
                            Action::Volume(RequestKind::Discard) => 3,
                            Action::Volume(RequestKind::WriteZeroes { .. }) => 4,
                            Action::GetId => 5,
                            Action::Refuse(_) => 6,
                        }] += 1;
                    }
                },
            }
        });
        if let Err(panic) = std::panic::catch_unwind(run) {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
        runs += 1;
        if seed % 256 == 0 && Instant::now() > end {
            break;
        }
    }
    println!("{runs} chains: {malformed} malformed, {unparsed} unparsed, actions {actions:?}");
    assert!(runs > 10_000 && malformed > 0 && unparsed > 0);
    assert!(actions.iter().all(|count| *count > 0), "{actions:?}");
}
