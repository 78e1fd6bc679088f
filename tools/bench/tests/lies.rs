//! Every lie that a back end can tell is found out, and an honest one is not accused.
//!
//! The back end here is built on the `vhost-user-backend` framework, so neither side of these tests
//! shares code with the data path that the client is for.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, RwLock};
use std::time::Duration;
use vflash_bench::device::{Device, DeviceOptions};
use vflash_bench::load::{LoadOptions, run};
use vflash_bench::queue::Waiting;
use vflash_bench::report::{Violation, ViolationKind};
use vflash_bench::runner::{Mix, Runner, Workload};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VHOST_USER_CONFIG_OFFSET, VhostUserProtocolFeatures};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueOwnedT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

const DISK_BYTES: usize = 4 << 20;
const SECTOR: usize = 512;

/// From this request on, and for every so many after it, the lie is told.
const LIE_ONE_IN: u64 = 40;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    None,
    /// A write is acknowledged and not done.
    LoseWrite,
    /// A write is done again, after later ones.
    RepeatWrite,
    /// A read returns a flipped bit.
    FlipBit,
    /// A read returns what was there before the last write.
    StaleRead,
    /// Half of a write is done.
    TearWrite,
    /// A write goes eight sectors further.
    MisplaceWrite,
    /// A discard is acknowledged and not done.
    LoseDiscard,
    /// A request completes twice in a row.
    DoubleCompletion,
    /// A request completes once more, when its slot may have been used again.
    LateDoubleCompletion,
    /// A request completes as one that the driver never made.
    UnknownHead,
    /// A request never completes.
    LoseRequest,
    /// A completion without the interrupt that the driver asked for.
    NoInterrupt,
    /// The used length of a read leaves out the status byte.
    ShortLength,
    /// A request ends with the status IOERR.
    FailRequest,
}

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

struct Liar {
    lie: Lie,
    memory: Memory,
    disk: Vec<u8>,
    /// What a sector held before its last write.
    former: HashMap<usize, Vec<u8>>,
    requests: u64,
    /// Of those that the lie is about.
    candidates: u64,
    late_double: Option<(u16, u64)>,
    /// An old write, and where it went.
    old: Option<(usize, Vec<u8>)>,
    exit: (EventConsumer, EventNotifier),
}

/// What becomes of one request.
struct Answer {
    completions: Vec<(u16, u32)>,
    interrupt: bool,
}

impl Liar {
    fn new(lie: Lie, memory: Memory) -> Self {
        let exit = new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap();
        Self {
            lie,
            memory,
            disk: vec![0; DISK_BYTES],
            former: HashMap::new(),
            requests: 0,
            candidates: 0,
            late_double: None,
            old: None,
            exit,
        }
    }

    /// Whether this is a request to lie about.
    fn lies(&mut self, lie: Lie) -> bool {
        if self.lie != lie {
            return false;
        }
        self.candidates += 1;
        self.candidates.is_multiple_of(LIE_ONE_IN)
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        for (index, sector) in bytes.chunks(SECTOR).enumerate() {
            let at = offset + index * SECTOR;
            self.former.insert(at, self.disk[at..at + SECTOR].to_vec());
            self.disk[at..at + SECTOR].copy_from_slice(sector);
        }
    }

    fn read(&mut self, offset: usize, length: usize) -> Vec<u8> {
        let mut bytes = self.disk[offset..offset + length].to_vec();
        if self.lies(Lie::StaleRead) {
            for (index, sector) in bytes.chunks_mut(SECTOR).enumerate() {
                if let Some(former) = self.former.get(&(offset + index * SECTOR)) {
                    sector.copy_from_slice(former);
                }
            }
        }
        if self.lies(Lie::FlipBit) {
            bytes[17] ^= 4;
        }
        bytes
    }

    fn take(&mut self, mut bytes: Vec<u8>, offset: usize) {
        if self.lies(Lie::LoseWrite) {
            return;
        }
        if self.lies(Lie::TearWrite) {
            bytes.truncate(bytes.len() / 2);
        }
        let further = 8 * SECTOR;
        let fits = offset + further + bytes.len() <= DISK_BYTES;
        let misplaced = fits && self.lies(Lie::MisplaceWrite);
        self.write(if misplaced { offset + further } else { offset }, &bytes);
        if self.lies(Lie::RepeatWrite)
            && let Some((offset, old)) = self.old.replace((offset, bytes))
        {
            self.write(offset, &old);
        }
    }

    /// Carries out a request; the bytes it wrote, with the status byte.
    fn execute(&mut self, chain: &[Descriptor]) -> u32 {
        let memory = self.memory.memory();
        let (header, status) = (&chain[0], chain.last().unwrap());
        let mut words = [0; 16];
        memory.read_slice(&mut words, header.addr()).unwrap();
        let kind = u32::from_le_bytes(words[..4].try_into().unwrap());
        let offset = u64::from_le_bytes(words[8..].try_into().unwrap()) as usize * SECTOR;
        let data = &chain[1..chain.len() - 1];
        let mut written = 1;
        let mut result = 0_u8;
        if self.lies(Lie::FailRequest) {
            result = 1;
        } else if let [data] = data {
            let mut bytes = vec![0; data.len() as usize];
            if kind == 0 {
                bytes = self.read(offset, bytes.len());
                memory.write_slice(&bytes, data.addr()).unwrap();
                written += bytes.len() as u32 - u32::from(self.lies(Lie::ShortLength));
            } else {
                memory.read_slice(&mut bytes, data.addr()).unwrap();
                match kind {
                    1 => self.take(bytes, offset),
                    11 | 13 => self.clear(&bytes),
                    _ => result = 2,
                }
            }
        } else {
            assert_eq!((kind, offset), (4, 0), "a request without data is a flush");
        }
        memory.write_slice(&[result], status.addr()).unwrap();
        written
    }

    fn clear(&mut self, range: &[u8]) {
        let start = u64::from_le_bytes(range[..8].try_into().unwrap()) as usize * SECTOR;
        let count = u32::from_le_bytes(range[8..12].try_into().unwrap()) as usize;
        if !self.lies(Lie::LoseDiscard) {
            self.write(start, &vec![0; count * SECTOR]);
        }
    }

    fn answer(&mut self, head: u16, chain: &[Descriptor]) -> Answer {
        self.requests += 1;
        let written = self.execute(chain);
        let mut completions = vec![(head, written)];
        if self.lies(Lie::DoubleCompletion) {
            completions.push((head, written));
        }
        if self.lies(Lie::UnknownHead) {
            completions = vec![(head + 1, written)];
        }
        if self.lies(Lie::LoseRequest) {
            completions.clear();
        }
        if self.lies(Lie::LateDoubleCompletion) {
            self.late_double = Some((head, self.requests + 8));
        } else if let Some((late, _)) = self.late_double.take_if(|(_, due)| *due == self.requests) {
            completions.push((late, 1));
        }
        Answer { completions, interrupt: !self.lies(Lie::NoInterrupt) }
    }
}

impl VhostUserBackendMut for Liar {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        // FLUSH, MQ, DISCARD, WRITE_ZEROES, INDIRECT, EVENT_IDX, PROTOCOL_FEATURES, VERSION_1.
        [9, 12, 13, 14, 28, 29, 30, 32].iter().map(|bit| 1 << bit).sum()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let skip = offset - offset.min(VHOST_USER_CONFIG_OFFSET);
        let mut config = ((DISK_BYTES / SECTOR) as u64).to_le_bytes().to_vec();
        config.resize(4096, 0);
        config[skip as usize..][..size as usize].to_vec()
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        Some((self.exit.0.try_clone().unwrap(), self.exit.1.try_clone().unwrap()))
    }

    fn handle_event(
        &mut self,
        event: u16,
        _set: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        let vring = &vrings[usize::from(event)];
        loop {
            vring.disable_notification().unwrap();
            let memory = self.memory.memory();
            let chains: Vec<_> = vring.get_mut().get_queue_mut().iter(memory).unwrap().collect();
            for chain in chains {
                let head = chain.head_index();
                let answer = self.answer(head, &chain.collect::<Vec<_>>());
                for (head, written) in answer.completions {
                    vring.add_used(head, written).unwrap();
                }
                if vring.needs_notification().unwrap() && answer.interrupt {
                    vring.signal_used_queue().unwrap();
                }
            }
            if !vring.enable_notification().unwrap() {
                return Ok(());
            }
        }
    }
}

/// Runs `check` with a device whose back end tells `lie`.
fn against<T>(lie: Lie, check: impl FnOnce(&Path) -> T) -> T {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("liar.sock");
    let mut listener = Listener::new(&socket, false).unwrap();
    let memory = Memory::new(GuestMemoryMmap::new());
    let liar = Arc::new(RwLock::new(Liar::new(lie, memory.clone())));
    let mut daemon = VhostUserDaemon::new("liar".into(), liar, memory).unwrap();
    let server = std::thread::spawn(move || {
        daemon.start(&mut listener).unwrap();
        // The front end hangs up at the end of each test.
        let _ = daemon.wait();
    });
    let result = check(&socket);
    server.join().unwrap();
    result
}

fn load(waiting: Waiting, indirect: bool, memory_slots: bool, socket: &Path) -> LoadOptions {
    LoadOptions {
        device: DeviceOptions {
            queues: 2,
            depth: 8,
            waiting,
            indirect,
            memory_slots,
            ..DeviceOptions::new(socket)
        },
        workload: Workload {
            mix: Mix::ALL,
            block_bytes: 4096,
            ragged: false,
            span_sectors: u64::MAX,
            verify: true,
            seed: 1,
        },
        ramp: Duration::ZERO,
        runtime: Duration::from_secs(60),
        operations_max: Some(20_000),
        rate: None,
        commit_writes: None,
        first_sector: 0,
        server_pid: Some(std::process::id()),
    }
}

#[test]
fn a_commit_is_its_writes_and_then_a_flush() {
    let report = against(Lie::None, |socket| {
        let options = load(Waiting::Sleep, false, false, socket);
        let workload = Workload { mix: Mix::WRITE, verify: false, ..options.workload };
        run(&LoadOptions { workload, commit_writes: Some(3), ..options })
    });
    let report = report.unwrap();
    assert!(report.passed(), "{report:?}");
    let writes = (report.megabytes_per_second * 1e6 * report.seconds / 4096.0).round();
    let flushes = report.operations as f64 - writes;
    assert!((writes / 3.0 - flushes).abs() <= 1.0, "{writes} writes, {flushes} flushes");
}

#[test]
fn an_honest_back_end_passes_in_every_way_of_driving_it() {
    for (waiting, indirect, memory_slots) in [
        (Waiting::Sleep, false, false),
        (Waiting::Sleep, true, true),
        (Waiting::Poll, true, false),
        (Waiting::Poll, false, true),
    ] {
        let report =
            against(Lie::None, |socket| run(&load(waiting, indirect, memory_slots, socket)));
        let report = report.unwrap();
        assert!(report.passed(), "{report:?}");
        assert!(report.operations >= 20_000 && report.verified_sectors > 1000, "{report:?}");
        assert!(report.server_cpu_us.unwrap() > 0.0, "{report:?}");
        assert_eq!(report.interrupts_per_operation == 0.0, waiting == Waiting::Poll);
        assert!(report.kicks_per_operation > 0.0);
    }
}

#[test]
fn every_lie_is_found_and_called_by_its_name() {
    let lies = [
        (Lie::LoseWrite, ViolationKind::Wrong, "is lost or the earlier"),
        (Lie::RepeatWrite, ViolationKind::Wrong, "is lost or the earlier"),
        (Lie::FlipBit, ViolationKind::Wrong, "torn or corrupt"),
        (Lie::StaleRead, ViolationKind::Wrong, "is lost or the earlier"),
        (Lie::TearWrite, ViolationKind::Wrong, "is lost or the earlier"),
        (Lie::MisplaceWrite, ViolationKind::Wrong, "holds"),
        (Lie::LoseDiscard, ViolationKind::Wrong, "is lost or the earlier"),
        (Lie::DoubleCompletion, ViolationKind::Doubled, "doubled"),
        (Lie::LateDoubleCompletion, ViolationKind::Doubled, "doubled"),
        (Lie::UnknownHead, ViolationKind::Wrong, "no request's"),
        (Lie::ShortLength, ViolationKind::Wrong, "wrote 4096 bytes, not 4097"),
        (Lie::FailRequest, ViolationKind::Wrong, "ended with status 1"),
    ];
    for (lie, kind, words) in lies {
        let error = against(lie, |socket| run(&load(Waiting::Sleep, false, false, socket)));
        let error = error.expect_err(&format!("{lie:?} was not found"));
        let found = error.downcast_ref::<Violation>();
        let found = found.unwrap_or_else(|| panic!("{lie:?}: {error}"));
        assert_eq!(found.kind, kind, "{lie:?}: {error}");
        assert!(found.text.contains(words), "{lie:?}: {error}");
    }
}

#[test]
fn failed_requests_are_counted_without_verification_too() {
    let report = against(Lie::FailRequest, |socket| {
        let mut options = load(Waiting::Sleep, false, false, socket);
        options.workload.verify = false;
        run(&options)
    });
    let report = report.unwrap();
    assert!(report.errors > 100 && !report.passed(), "{report:?}");
}

/// Drives one queue until it fails or has done 2000 requests.
fn drive(lie: Lie, depth: u16) -> vflash_bench::Result<u32> {
    against(lie, |socket| {
        let device = Device::open(DeviceOptions { depth, ..DeviceOptions::new(socket) })?;
        let workload = load(Waiting::Sleep, false, false, socket).workload;
        let mut runner = Runner::new(device, workload).guarded(Duration::from_secs(4));
        while runner.operations < 2000 {
            runner.fill(std::time::Instant::now());
            runner.reap_some()?;
        }
        Ok(runner.guards)
    })
}

#[test]
fn a_lost_request_and_a_lost_interrupt_are_told_apart() {
    assert_eq!(drive(Lie::None, 1).unwrap(), 0);
    for (lie, kind) in
        [(Lie::LoseRequest, ViolationKind::Lost), (Lie::NoInterrupt, ViolationKind::Silent)]
    {
        let error = drive(lie, 1).expect_err(&format!("{lie:?} was not found"));
        let found = error.downcast_ref::<Violation>().map(|violation| violation.kind);
        assert_eq!(found, Some(kind), "{lie:?}: {error}");
    }
}

#[test]
fn a_rate_is_held_and_latency_counts_from_when_a_request_was_due() {
    let at_rate = |rate| {
        let report = against(Lie::None, |socket| {
            let mut options = load(Waiting::Sleep, false, false, socket);
            options.runtime = Duration::from_millis(500);
            options.operations_max = None;
            options.rate = Some(rate);
            run(&options)
        });
        report.unwrap()
    };
    let report = at_rate(2000.0);
    // Never faster; on a busy machine the last requests may not be done when time is up.
    assert!((0.7..1.02).contains(&(report.iops / 2000.0)), "{report:?}");

    // Far more is asked for than can be done: the requests wait their turn.
    let report = at_rate(1e8);
    assert!(report.latency_p99_us > 100_000.0, "{report:?}");
}
