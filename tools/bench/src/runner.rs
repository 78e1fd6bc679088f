//! Keeps a device's queues full and checks what comes back.

use crate::Result;
use crate::device::Device;
use crate::frontend::{DISCARD, FLUSH, WRITE_ZEROES};
use crate::memory::GuestMemory;
use crate::oracle::{Oracle, Range, SECTOR_BYTES};
use crate::queue::{Completed, Kind, Queue, Waiting, sleep};
use crate::report::ViolationKind::{Lost, Silent, Wrong};
use crate::report::violation;
use std::cmp::Ordering;
use std::time::{Duration, Instant};
use vflash::metrics::Histogram;

/// How long nothing may complete before it is counted.
pub const GUARD: Duration = Duration::from_secs(2);

/// The patience that runners begin with.
const LOST_AFTER: Duration = Duration::from_secs(30);

/// How long after its used entry a completion's interrupt may come.
const INTERRUPT_GRACE: Duration = Duration::from_millis(500);

/// Of ragged transfers, 6 in 10 fall on the first 64th of the disk.
const SKEW: i32 = 8;

/// Tries to find a block on which nothing is under way.
const PICK_TRIES: usize = 64;

/// What is asked of the back end, in shares of 100.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    pub read: u8,
    pub write: u8,
    pub discard: u8,
    pub write_zeroes: u8,
    pub flush: u8,
    /// Addresses go up one after the other instead of at random.
    pub sequential: bool,
}

impl Mix {
    pub const READ: Self =
        Self { read: 100, write: 0, discard: 0, write_zeroes: 0, flush: 0, sequential: false };
    pub const WRITE: Self = Self { read: 0, write: 100, ..Self::READ };
    pub const DISCARD: Self = Self { read: 0, discard: 100, ..Self::READ };
    pub const BOTH: Self = Self { read: 48, write: 50, flush: 2, ..Self::READ };
    pub const ALL: Self =
        Self { read: 40, write: 45, discard: 6, write_zeroes: 6, flush: 3, sequential: false };

    /// Without what the device does not offer: a guest would not ask for it. It reads instead.
    fn on(mut self, features: u64) -> Self {
        for (share, feature) in [
            (&mut self.discard, DISCARD),
            (&mut self.write_zeroes, WRITE_ZEROES),
            (&mut self.flush, FLUSH),
        ] {
            if features & feature == 0 {
                self.read += std::mem::take(share);
            }
        }
        self
    }
}

/// A load: what, where, how large.
#[derive(Clone, Debug)]
pub struct Workload {
    pub mix: Mix,
    /// Bytes of a transfer.
    pub block_bytes: u32,
    /// Transfers are of random sizes up to `block_bytes` and start on any sector; most are near
    /// the start of the disk, so that what one wrote is soon overwritten by another.
    pub ragged: bool,
    /// Sectors of the device that are used, from its start.
    pub span_sectors: u64,
    /// Check every byte.
    pub verify: bool,
    pub seed: u64,
}

struct Pending {
    kind: Kind,
    range: Range,
    sequence: u32,
    started: Instant,
    /// It was in flight when the back end died.
    survivor: bool,
}

/// When requests are due, if they come at a fixed rate.
struct Pace {
    interval: Duration,
    due: Instant,
}

/// A guest that commits: so many writes together, and when all have ended a flush alone.
struct Commits {
    writes: u16,
    /// Of the commit under way, its flush included.
    submitted: u16,
}

/// Runs a workload on a device.
pub struct Runner {
    pub device: Device,
    pub latency: Histogram,
    pub operations: u64,
    pub bytes: u64,
    /// Requests that ended with an error status.
    pub errors: u64,
    /// Times that nothing completed for [`GUARD`].
    pub guards: u32,
    /// How long nothing may complete before requests are said to be lost.
    patience: Duration,
    workload: Workload,
    oracle: Option<Oracle>,
    pace: Option<Pace>,
    commits: Option<Commits>,
    /// Sector that the used part of the device begins at.
    first_sector: u64,
    random: fastrand::Rng,
    next_block: u64,
    pending: Vec<Vec<Option<Pending>>>,
    survivors: usize,
    completed: Vec<Completed>,
    buffer: Vec<u8>,
    /// When something last completed, or was submitted after nothing was in flight.
    progress: Instant,
    /// Guards since then.
    guards_in_a_row: u32,
}

impl Runner {
    pub fn new(device: Device, workload: Workload) -> Self {
        let span = workload.span_sectors.min(device.capacity_sectors);
        let oracle = workload.verify.then(|| Oracle::new(workload.seed, 0, span));
        Self::with_oracle(device, workload, oracle)
    }

    /// Goes on with what an earlier runner knew of the disk.
    pub fn with_oracle(device: Device, workload: Workload, oracle: Option<Oracle>) -> Self {
        let span_sectors = workload.span_sectors.min(device.capacity_sectors);
        let mix = workload.mix.on(device.features());
        let workload = Workload { span_sectors, mix, ..workload };
        let pending =
            device.queues.iter().map(|queue| (0..queue.depth()).map(|_| None).collect()).collect();
        let mut runner = Self {
            latency: Histogram::default(),
            operations: 0,
            bytes: 0,
            errors: 0,
            guards: 0,
            patience: LOST_AFTER,
            oracle,
            pace: None,
            commits: None,
            first_sector: 0,
            random: fastrand::Rng::with_seed(workload.seed),
            next_block: 0,
            pending,
            survivors: 0,
            completed: Vec::new(),
            buffer: vec![0; workload.block_bytes as usize],
            progress: Instant::now(),
            guards_in_a_row: 0,
            workload,
            device,
        };
        runner.fill_buffers();
        runner
    }

    /// Takes requests for lost after `patience` instead of 30 s.
    #[must_use]
    pub fn guarded(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// What is written without verification must not be zeros, which back ends may treat apart.
    fn fill_buffers(&mut self) {
        for queue in &self.device.queues {
            for slot in 0..queue.depth() {
                self.random.fill(&mut self.buffer);
                self.device.memory.write(queue.data(slot), &self.buffer);
            }
        }
    }

    /// Requests are due at this rate per second from now on, however slow the back end is; their
    /// latency counts from when they were due.
    pub fn set_rate(&mut self, per_second: f64) {
        let interval = Duration::from_secs_f64(1.0 / per_second);
        self.pace = Some(Pace { interval, due: Instant::now() });
    }

    /// Uses the device from this sector on, and not beyond its end. Nothing is verified then.
    pub fn set_first_sector(&mut self, sector: u64) {
        assert!(self.oracle.is_none() && !self.workload.ragged, "the oracle knows the whole disk");
        let left = self.device.capacity_sectors.saturating_sub(sector);
        self.workload.span_sectors = self.workload.span_sectors.min(left);
        self.first_sector = sector;
    }

    /// Commits after every so many writes, from now on: they are submitted together, and the flush
    /// when all have ended.
    pub fn set_commits(&mut self, writes: u16) {
        self.commits = Some(Commits { writes, submitted: 0 });
    }

    /// What comes next; `None`: what is under way must end first.
    fn next_kind(&mut self) -> Option<Kind> {
        let quiet = self.pending.iter().flatten().all(Option::is_none);
        let Some(commits) = &mut self.commits else { return Some(self.pick_kind()) };
        if commits.submitted > commits.writes && quiet {
            commits.submitted = 0;
        }
        let kind = match commits.submitted.cmp(&commits.writes) {
            Ordering::Less => Kind::Write,
            Ordering::Equal if quiet => Kind::Flush,
            _ => return None,
        };
        commits.submitted += 1;
        Some(kind)
    }

    /// How long until the next request is due.
    pub fn until_due(&self, now: Instant) -> Option<Duration> {
        self.pace.as_ref().map(|pace| pace.due.saturating_duration_since(now))
    }

    pub fn into_oracle(self) -> Option<Oracle> {
        self.into_parts().1
    }

    /// For another load of the same disk. What is in flight is forgotten.
    pub fn into_parts(self) -> (Device, Option<Oracle>) {
        (self.device, self.oracle)
    }

    /// Forgets what was counted, at the end of a ramp.
    pub fn reset_counters(&mut self) {
        self.latency = Histogram::default();
        (self.operations, self.bytes, self.errors) = (0, 0, 0);
        for queue in &mut self.device.queues {
            queue.kicks = 0;
            queue.interrupts.set(0);
        }
    }

    fn pick_kind(&mut self) -> Kind {
        let mix = self.workload.mix;
        let mut left = self.random.u8(..100);
        for (kind, share) in [
            (Kind::Read, mix.read),
            (Kind::Write, mix.write),
            (Kind::Discard, mix.discard),
            (Kind::WriteZeroes, mix.write_zeroes),
        ] {
            if left < share {
                return kind;
            }
            left -= share;
        }
        Kind::Flush
    }

    fn pick_range(&mut self) -> Range {
        let block = u64::from(self.workload.block_bytes) / SECTOR_BYTES as u64;
        let blocks = self.workload.span_sectors / block;
        if self.workload.mix.sequential {
            let start = self.first_sector + self.next_block * block;
            self.next_block = (self.next_block + 1) % blocks;
            return Range { start, count: block as u32 };
        }
        if !self.workload.ragged {
            let start = self.first_sector + self.random.u64(..blocks) * block;
            return Range { start, count: block as u32 };
        }
        let count = self.random.u64(1..=block);
        let place = self.random.f64().powi(SKEW);
        let start = ((self.workload.span_sectors - count) as f64 * place) as u64;
        Range { start, count: count as u32 }
    }

    /// A range on which no request is under way.
    fn pick_free_range(&mut self) -> Option<Range> {
        for _ in 0..PICK_TRIES {
            let range = self.pick_range();
            if self.oracle.as_mut().is_none_or(|oracle| oracle.reserve(range)) {
                return Some(range);
            }
        }
        None
    }

    /// Submits what is due to every queue that has room. Each queue is told at once of all of it.
    pub fn fill(&mut self, now: Instant) {
        self.note_start(now);
        for index in 0..self.device.queues.len() {
            let mut submitted = false;
            while let Some(slot) = self.device.queues[index].take_slot() {
                let due = self.pace.as_ref().map_or(now, |pace| pace.due);
                if due > now || !self.submit(index, slot, due) {
                    self.device.queues[index].return_slot(slot);
                    break;
                }
                if let Some(pace) = &mut self.pace {
                    pace.due += pace.interval;
                }
                submitted = true;
            }
            if submitted {
                self.device.queues[index].publish(&self.device.memory);
            }
        }
    }

    fn submit(&mut self, index: usize, slot: u16, started: Instant) -> bool {
        let Some(kind) = self.next_kind() else { return false };
        let mut pending = Pending {
            kind,
            range: Range { start: 0, count: 0 },
            sequence: 0,
            started,
            survivor: false,
        };
        if kind != Kind::Flush {
            let Some(range) = self.pick_free_range() else { return false };
            pending.range = range;
            if let (Kind::Write, Some(oracle)) = (kind, &mut self.oracle) {
                let bytes = &mut self.buffer[..range.count as usize * SECTOR_BYTES];
                pending.sequence = oracle.stamp(range, bytes);
                self.device.memory.write(self.device.queues[index].data(slot), bytes);
            }
        }
        self.start(index, slot, pending);
        true
    }

    fn start(&mut self, index: usize, slot: u16, pending: Pending) {
        let Pending { kind, range, .. } = pending;
        let (memory, queue) = (&self.device.memory, &mut self.device.queues[index]);
        let length = match kind {
            Kind::Read | Kind::Write => range.count * SECTOR_BYTES as u32,
            Kind::Flush => 0,
            Kind::Discard | Kind::WriteZeroes => {
                let mut bytes = [0; 16];
                bytes[..8].copy_from_slice(&range.start.to_le_bytes());
                bytes[8..12].copy_from_slice(&range.count.to_le_bytes());
                memory.write(queue.data(slot), &bytes);
                16
            }
        };
        // The sector of a request that moves no data must be 0.
        let sector = if length > 16 { range.start } else { 0 };
        queue.submit(memory, slot, kind, sector, length);
        self.pending[index][usize::from(slot)] = Some(pending);
    }

    /// Takes what has completed and checks it; returns how many. A queue whose interrupt was asked
    /// for and has not come is left alone, as by a guest.
    pub fn reap(&mut self) -> Result<usize> {
        let mut count = 0;
        for index in 0..self.device.queues.len() {
            if self.device.queues[index].is_asleep() {
                continue;
            }
            let mut completed = std::mem::take(&mut self.completed);
            completed.clear();
            self.device.queues[index].completed(&self.device.memory, &mut completed)?;
            if !completed.is_empty() {
                let now = Instant::now();
                (self.progress, self.guards_in_a_row) = (now, 0);
                count += completed.len();
                for one in &completed {
                    self.finish(index, *one, now)?;
                }
            }
            self.completed = completed;
        }
        Ok(count)
    }

    fn finish(&mut self, index: usize, completed: Completed, now: Instant) -> Result<()> {
        let slot = usize::from(completed.slot);
        let pending = self.pending[index][slot].take().ok_or("a completion without a request")?;
        self.operations += 1;
        self.bytes += u64::from(pending.range.count) * SECTOR_BYTES as u64;
        self.latency.record(now - pending.started);
        self.survivors -= usize::from(pending.survivor);
        if completed.status != 0 {
            self.errors += 1;
        }
        let Some(oracle) = &mut self.oracle else { return Ok(()) };
        let Pending { kind, range, sequence, .. } = pending;
        if kind != Kind::Flush {
            oracle.release(range);
        }
        let status = completed.status;
        if status != 0 {
            return violation(Wrong, format!("{kind:?} {range:?} ended with status {status}"));
        }
        let data_bytes = range.count as usize * SECTOR_BYTES;
        let written = 1 + if kind == Kind::Read { data_bytes as u32 } else { 0 };
        if completed.written != written {
            let text = format!("{kind:?} wrote {} bytes, not {written}", completed.written);
            return violation(Wrong, text);
        }
        match kind {
            Kind::Write => oracle.written(range, sequence),
            Kind::Discard | Kind::WriteZeroes => oracle.zeroed(range),
            Kind::Read => {
                let bytes = &mut self.buffer[..data_bytes];
                let data = self.device.queues[index].data(completed.slot);
                self.device.memory.read(data, bytes);
                oracle.check(range, bytes)?;
            }
            Kind::Flush => {}
        }
        Ok(())
    }

    pub fn in_flight(&self) -> usize {
        self.device.queues.iter().map(Queue::in_flight).sum()
    }

    /// All that is in flight now counts as a survivor until it completes; returns how many.
    pub fn mark_survivors(&mut self) -> usize {
        self.pending.iter_mut().flatten().flatten().for_each(|pending| pending.survivor = true);
        self.survivors = self.in_flight();
        self.survivors
    }

    /// Survivors that have not completed.
    pub fn survivors(&self) -> usize {
        self.survivors
    }

    fn note_start(&mut self, now: Instant) {
        if self.in_flight() == 0 {
            (self.progress, self.guards_in_a_row) = (now, 0);
        }
    }

    /// Takes completions until every queue sleeps, as a guest's queues do sooner or later.
    pub fn settle(&mut self) -> Result<()> {
        while self.device.queues.iter().any(|queue| queue.arm(&self.device.memory)) {
            self.reap()?;
        }
        Ok(())
    }

    /// Waits for a completion as the device's queues are set to; false after `timeout`. It is an
    /// error if one came without its interrupt, or none for
    /// the runner's patience.
    pub fn wait(&mut self, timeout: Duration) -> Result<bool> {
        let (queues, memory) = (&self.device.queues, &self.device.memory);
        let mut pending = false;
        for queue in queues.iter().filter(|queue| !queue.is_asleep()) {
            pending |= queue.arm(memory);
        }
        if pending {
            return Ok(true);
        }
        let ready = match self.device.waits() {
            Waiting::Sleep => sleep(queues, timeout)?,
            Waiting::Poll => spin(queues, memory, timeout),
        };
        if ready {
            return Ok(true);
        }
        let silent = |queue: &Queue| queue.is_asleep() && queue.is_pending(memory);
        if !queues.iter().any(silent) {
            self.note_no_progress()?;
            return Ok(false);
        }
        let noticed = Instant::now();
        while let Some(left) = INTERRUPT_GRACE.checked_sub(noticed.elapsed()) {
            sleep(queues, left)?;
            if !queues.iter().any(silent) {
                return Ok(true);
            }
        }
        violation(Silent, "a completion came without its interrupt".into())
    }

    fn note_no_progress(&mut self) -> Result<()> {
        let in_flight = self.in_flight();
        if in_flight == 0 {
            return Ok(());
        }
        let since = self.progress.elapsed();
        if since >= self.patience {
            let text = format!("{in_flight} requests in flight, none completed for {since:.0?}");
            return violation(Lost, text);
        }
        if since >= GUARD * (self.guards_in_a_row + 1) {
            self.guards_in_a_row += 1;
            self.guards += 1;
        }
        Ok(())
    }

    /// Takes at least one completion if anything is in flight.
    pub fn reap_some(&mut self) -> Result<()> {
        while self.in_flight() > 0 && self.reap()? == 0 {
            self.wait(GUARD)?;
        }
        Ok(())
    }

    /// Waits until nothing is in flight; requests that do not come back are an error.
    pub fn drain(&mut self) -> Result<()> {
        while self.in_flight() > 0 {
            self.reap_some()?;
        }
        Ok(())
    }

    /// Reads the whole span and checks it.
    pub fn read_back(&mut self) -> Result<()> {
        self.drain()?;
        let block = self.workload.block_bytes / SECTOR_BYTES as u32;
        let mut next = 0;
        while next < self.workload.span_sectors || self.in_flight() > 0 {
            let started = Instant::now();
            self.note_start(started);
            for index in 0..self.device.queues.len() {
                while next < self.workload.span_sectors
                    && let Some(slot) = self.device.queues[index].take_slot()
                {
                    let left = (self.workload.span_sectors - next).min(u64::from(block));
                    let range = Range { start: next, count: left as u32 };
                    next += left;
                    let kind = Kind::Read;
                    let pending = Pending { kind, range, sequence: 0, started, survivor: false };
                    self.start(index, slot, pending);
                }
                self.device.queues[index].publish(&self.device.memory);
            }
            self.reap_some()?;
        }
        Ok(())
    }
}

/// Looks at the rings until something has completed; false after `timeout`.
fn spin(queues: &[Queue], memory: &GuestMemory, timeout: Duration) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < timeout {
        if queues.iter().any(|queue| queue.is_pending(memory)) {
            return true;
        }
        std::hint::spin_loop();
    }
    false
}
