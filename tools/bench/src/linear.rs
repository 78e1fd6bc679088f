//! Several guests of one disk, each on a socket of its own, and whether all that they see could
//! have happened one request at a time ([`crate::register`]).
//!
//! Each write of a block fills it with a value that no other write has; each read says which value
//! it saw. A request's begin is taken before the ring shows it, its end after its completion was
//! seen: the true instant lies between.

use crate::Result;
use crate::device::{Device, DeviceOptions};
use crate::queue::{Kind, sleep};
use crate::register::{self, INITIAL, Operation};
use crate::report::ViolationKind::{Lost, Wrong};
use crate::report::violation;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes of a register.
pub const BLOCK_BYTES: usize = 4096;

/// Blocks that one request covers at most.
const BLOCKS_MAX: u32 = 4;

/// How long nothing may complete, restarts of the server included.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often a guest looks whether its server was started anew.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Places that are told when a history is wrong.
const TOLD_MAX: usize = 8;

#[derive(Clone, Debug)]
pub struct LinearOptions {
    /// One for each guest.
    pub sockets: Vec<PathBuf>,
    pub queues: u16,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Few, so that guests meet on them. They must read as zeros at first.
    pub blocks: u32,
    /// Of all guests together.
    pub operations: u64,
    pub seed: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LinearReport {
    pub clients: usize,
    pub operations: u64,
    /// Reads and writes of single blocks: the history that was checked.
    pub checked: usize,
    /// Reads that saw parts of several writes in one block.
    pub torn: u64,
    pub restarts: u64,
    pub seconds: f64,
    /// What cannot have happened.
    pub violations: Vec<String>,
}

impl LinearReport {
    pub fn passed(&self) -> bool {
        self.violations.is_empty()
    }
}

/// How whoever runs the guests reaches them.
#[derive(Default)]
pub struct Meanwhile {
    restarts: AtomicU64,
    done: AtomicU64,
    finished: AtomicU32,
    failed: AtomicBool,
    clients: u32,
}

impl Meanwhile {
    /// The server was killed and started again: guests reconnect.
    pub fn restarted(&self) {
        self.restarts.fetch_add(1, Ordering::SeqCst);
    }

    /// Requests that have ended.
    pub fn operations(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// All guests have done what they were to do, or one has failed.
    pub fn is_over(&self) -> bool {
        self.failed.load(Ordering::SeqCst) || self.finished.load(Ordering::SeqCst) == self.clients
    }
}

/// A request under way.
#[derive(Clone, Copy)]
struct Pending {
    kind: Kind,
    block: u32,
    count: u32,
    /// Of its first block; the others' follow.
    value: u64,
    begun: u64,
}

struct Client<'a> {
    number: u64,
    options: &'a LinearOptions,
    meanwhile: &'a Meanwhile,
    device: Device,
    random: fastrand::Rng,
    clock: Instant,
    writes: u64,
    restarts: u64,
    /// By queue, then slot.
    pending: Vec<Vec<Option<Pending>>>,
    history: Vec<Operation>,
    torn: u64,
    buffer: Vec<u8>,
}

/// Runs the guests until they have done `options.operations`; `work` runs beside them, until
/// [`Meanwhile::is_over`].
pub fn run(
    options: &LinearOptions,
    work: impl FnOnce(&Meanwhile) -> Result<()>,
) -> Result<LinearReport> {
    let (clock, clients) = (Instant::now(), options.sockets.len() as u32);
    let meanwhile = &Meanwhile { clients, ..Meanwhile::default() };
    let clients: Vec<Client<'_>> = (0..options.sockets.len())
        .map(|number| Client::new(number, options, meanwhile, clock))
        .collect::<Result<_>>()?;
    let (worked, ended) = std::thread::scope(|scope| {
        let threads: Vec<_> =
            clients.into_iter().map(|client| scope.spawn(move || client.run())).collect();
        let worked = work(meanwhile);
        let ended: Vec<_> = threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        (worked, ended)
    });
    let mut report = LinearReport { clients: ended.len(), ..LinearReport::default() };
    let mut history = Vec::new();
    for client in ended {
        let (mut operations, torn) = client.map_err(|_| "a guest's thread panicked")??;
        history.append(&mut operations);
        report.torn += torn;
    }
    worked?;
    report.operations = meanwhile.operations();
    report.restarts = meanwhile.restarts.load(Ordering::SeqCst);
    report.seconds = clock.elapsed().as_secs_f64();
    report.checked = history.len();
    report.violations = register::check(&mut history, TOLD_MAX);
    Ok(report)
}

impl<'a> Client<'a> {
    fn new(
        number: usize,
        options: &'a LinearOptions,
        meanwhile: &'a Meanwhile,
        clock: Instant,
    ) -> Result<Self> {
        let device = Device::open(DeviceOptions {
            queues: options.queues,
            depth: options.depth,
            data_bytes: BLOCKS_MAX as usize * BLOCK_BYTES,
            connect_timeout: PATIENCE,
            ..DeviceOptions::new(&options.sockets[number])
        })?;
        if device.capacity_sectors < u64::from(options.blocks) * (BLOCK_BYTES as u64 / 512) {
            return Err(format!("the disk has less than {} blocks", options.blocks).into());
        }
        let queue = || vec![None; usize::from(options.depth)];
        Ok(Self {
            number: number as u64,
            options,
            meanwhile,
            device,
            random: fastrand::Rng::with_seed(options.seed ^ ((number as u64 + 1) << 32)),
            clock,
            writes: 0,
            restarts: 0,
            pending: (0..options.queues).map(|_| queue()).collect(),
            history: Vec::new(),
            torn: 0,
            buffer: vec![0; BLOCKS_MAX as usize * BLOCK_BYTES],
        })
    }

    fn run(mut self) -> Result<(Vec<Operation>, u64)> {
        let result = self.guest();
        match &result {
            Ok(()) => drop(self.meanwhile.finished.fetch_add(1, Ordering::SeqCst)),
            Err(_) => self.meanwhile.failed.store(true, Ordering::SeqCst),
        }
        result.map(|()| (self.history, self.torn))
    }

    fn guest(&mut self) -> Result<()> {
        let mut progress = Instant::now();
        loop {
            self.reconnect_if_restarted()?;
            let over = self.meanwhile.operations() >= self.options.operations
                || self.meanwhile.failed.load(Ordering::SeqCst);
            if !over {
                self.fill();
            }
            let in_flight: usize = self.device.queues.iter().map(|queue| queue.in_flight()).sum();
            if in_flight == 0 {
                return Ok(());
            }
            if self.reap()? > 0 {
                progress = Instant::now();
            } else if progress.elapsed() > PATIENCE {
                let text = format!("guest {}: {in_flight} requests never ended", self.number);
                return violation(Lost, text);
            } else if !self.device.queues.iter().any(|queue| queue.arm(&self.device.memory)) {
                sleep(&self.device.queues, LOOK_EVERY)?;
            }
        }
    }

    fn reconnect_if_restarted(&mut self) -> Result<()> {
        let restarts = self.meanwhile.restarts.load(Ordering::SeqCst);
        if self.restarts != restarts {
            self.restarts = restarts;
            self.device.reconnect()?;
        }
        Ok(())
    }

    fn now(&self) -> u64 {
        // From 1: the initial values were there at 0.
        self.clock.elapsed().as_nanos() as u64 + 1
    }

    /// Keeps every queue full.
    fn fill(&mut self) {
        for index in 0..self.device.queues.len() {
            let mut submitted = false;
            while let Some(slot) = self.device.queues[index].take_slot() {
                let request = self.draw();
                self.submit(index, slot, request);
                submitted = true;
            }
            if submitted {
                self.device.queues[index].publish(&self.device.memory);
            }
        }
    }

    /// What to ask next.
    fn draw(&mut self) -> Pending {
        let kind = match self.random.u8(..100) {
            0..47 => Kind::Read,
            47..97 => Kind::Write,
            _ => Kind::Flush,
        };
        let block = self.random.u32(..self.options.blocks);
        let most = BLOCKS_MAX.min(self.options.blocks - block);
        let count = if self.random.u8(..4) == 0 { self.random.u32(1..=most) } else { 1 };
        let value = self.next_value();
        Pending { kind, block, count, value, begun: self.now() }
    }

    /// Of the first block of a write: client, write, and room for the number of a block.
    fn next_value(&mut self) -> u64 {
        self.writes += 1;
        (self.number + 1) << 56 | self.writes << 4
    }

    fn submit(&mut self, index: usize, slot: u16, request: Pending) {
        let Pending { kind, block, count, value, .. } = request;
        let length = if kind == Kind::Flush { 0 } else { count as usize * BLOCK_BYTES };
        let queue = &mut self.device.queues[index];
        if kind == Kind::Write {
            for (number, block) in self.buffer[..length].chunks_mut(BLOCK_BYTES).enumerate() {
                let word = (value + number as u64).to_le_bytes();
                block.chunks_mut(8).for_each(|place| place.copy_from_slice(&word));
            }
            self.device.memory.write(queue.data(slot), &self.buffer[..length]);
        }
        let sector = u64::from(block) * (BLOCK_BYTES as u64 / 512);
        queue.submit(&self.device.memory, slot, kind, sector, length as u32);
        self.pending[index][usize::from(slot)] = Some(request);
    }

    /// Takes what has ended; how much that is.
    fn reap(&mut self) -> Result<usize> {
        let mut count = 0;
        for index in 0..self.device.queues.len() {
            let mut completed = Vec::new();
            self.device.queues[index].completed(&self.device.memory, &mut completed)?;
            let ended = self.now();
            for completion in &completed {
                let slot = usize::from(completion.slot);
                let request = self.pending[index][slot].take().ok_or("an unknown request ended")?;
                if completion.status != 0 {
                    let Pending { kind, block, .. } = request;
                    let text = format!(
                        "guest {}: {kind:?} of block {block} ended with status {}",
                        self.number, completion.status
                    );
                    return violation(Wrong, text);
                }
                self.note(index, completion.slot, request, ended);
            }
            count += completed.len();
        }
        self.meanwhile.done.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }

    fn note(&mut self, index: usize, slot: u16, request: Pending, ended: u64) {
        let Pending { kind, block, count, value, begun } = request;
        let of =
            |at: u32, write, value| Operation { register: block + at, write, value, begun, ended };
        match kind {
            Kind::Write => {
                let written = (0..count).map(|at| of(at, true, value + u64::from(at)));
                self.history.extend(written);
            }
            Kind::Read => {
                let length = count as usize * BLOCK_BYTES;
                let data = self.device.queues[index].data(slot);
                self.device.memory.read(data, &mut self.buffer[..length]);
                for (at, bytes) in (0..).zip(self.buffer[..length].chunks(BLOCK_BYTES)) {
                    let seen = values(bytes);
                    self.torn += u64::from(seen.len() > 1);
                    // A block of several values was read at several instants.
                    self.history.extend(seen.into_iter().map(|value| of(at, false, value)));
                }
            }
            _ => {}
        }
    }
}

/// The values that a block holds: one, if it was never seen half written.
fn values(block: &[u8]) -> Vec<u64> {
    let word = |bytes: &[u8]| bytes.try_into().map_or(INITIAL, u64::from_le_bytes);
    let mut values: Vec<u64> = block.chunks(8).map(word).collect();
    values.dedup();
    values.sort_unstable();
    values.dedup();
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_tells_every_value_in_it() {
        let mut block = [0; BLOCK_BYTES];
        assert_eq!(values(&block), [INITIAL]);
        block[512..520].copy_from_slice(&7u64.to_le_bytes());
        assert_eq!(values(&block), [INITIAL, 7]);
    }
}
