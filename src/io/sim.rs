//! The simulated disk: what a drive may do, in memory, with every fault on request.
//!
//! A disk is a handle: clones see the same content, so a test keeps one and gives one away; what is
//! submitted through a handle completes at that handle. With
//! [`SimDisk::record`] it also keeps the log from which [`super::crash`] rebuilds what a power cut
//! could have left. README.md has the fault model.

use super::buffer::{self, Segment};
use super::disk::{Completion, Disk, DiskGeometry, Errno, Operation, OperationKind};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const PAGE_BYTES: u64 = 4096;
pub(super) const SECTOR_BYTES: u64 = crate::base::units::SECTOR_BYTES;

/// Sparse content: what was never written reads as zeros. Cloning shares the pages.
#[derive(Clone, Default)]
pub struct Content {
    pages: BTreeMap<u64, Arc<[u8; PAGE_BYTES as usize]>>,
}

impl Content {
    pub fn read(&self, offset: u64, target: &mut [u8]) {
        target.fill(0);
        let end = offset + target.len() as u64;
        for (page, bytes) in self.pages.range(offset / PAGE_BYTES..end.div_ceil(PAGE_BYTES)) {
            let from = (page * PAGE_BYTES).max(offset);
            let to = ((page + 1) * PAGE_BYTES).min(end);
            let source = &bytes[(from - page * PAGE_BYTES) as usize..][..(to - from) as usize];
            target[(from - offset) as usize..(to - offset) as usize].copy_from_slice(source);
        }
    }

    /// Whether the range, in whole pages, reads as zeros: fast where nothing was written.
    pub fn is_zero(&self, offset: u64, length: u64) -> bool {
        let pages = offset / PAGE_BYTES..(offset + length).div_ceil(PAGE_BYTES);
        self.pages.range(pages).all(|(_, bytes)| bytes.iter().all(|byte| *byte == 0))
    }

    pub fn write(&mut self, offset: u64, source: &[u8]) {
        let mut done = 0;
        while done < source.len() {
            let at = offset + done as u64;
            let inside = (at % PAGE_BYTES) as usize;
            let part = (PAGE_BYTES as usize - inside).min(source.len() - done);
            let page = self.pages.entry(at / PAGE_BYTES).or_insert_with(|| Arc::new([0; 4096]));
            Arc::make_mut(page)[inside..inside + part].copy_from_slice(&source[done..done + part]);
            done += part;
        }
    }

    pub fn zero(&mut self, offset: u64, length: u64) {
        let end = offset + length;
        let keys: Vec<u64> = self
            .pages
            .range(offset / PAGE_BYTES..end.div_ceil(PAGE_BYTES))
            .map(|(page, _)| *page)
            .collect();
        for page in keys {
            let from = (page * PAGE_BYTES).max(offset);
            let to = ((page + 1) * PAGE_BYTES).min(end);
            if to - from == PAGE_BYTES {
                self.pages.remove(&page);
            } else {
                self.write(from, &vec![0; (to - from) as usize]);
            }
        }
    }
}

/// One operation of the log. Times are events: every submission and completion is one.
#[derive(Clone)]
pub struct Logged {
    pub kind: OperationKind,
    pub offset: u64,
    pub length: u64,
    /// What was written; empty for the other kinds.
    pub data: Arc<[u8]>,
    pub submitted: u64,
    /// `None`: was still under way at the end of the log.
    pub completed: Option<u64>,
    pub failed: bool,
}

/// The log of a run and the content before it.
#[derive(Clone)]
pub struct Recording {
    pub base: Content,
    pub log: Vec<Logged>,
    /// At the end of the run.
    pub geometry: DiskGeometry,
}

/// What goes wrong from now on. Default: nothing.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Completions come in a random order, a few at a time.
    pub reorder: bool,
    /// Every operation stays under way for this many polls more.
    pub slow_polls: u32,
    /// Writes and zeros fail with `ENOSPC`.
    pub full: bool,
    pub fail: Option<Failure>,
    /// So many flushes fail from now on; other operations do not.
    pub flush_failures: u32,
}

/// Fails an operation that would have succeeded.
#[derive(Clone, Copy, Debug)]
pub struct Failure {
    /// Operations that still succeed before the first failure.
    pub after: u64,
    /// Every later operation fails too, else only this one.
    pub forever: bool,
    pub errno: Errno,
    /// A failed write reaches the medium all the same, up to a random sector.
    pub torn: bool,
}

/// A place of the medium that is not what it should be, until it is written over.
#[derive(Clone, Copy, Debug)]
pub struct Spoilt {
    pub offset: u64,
    pub length: u64,
    pub how: Spoiling,
}

#[derive(Clone, Copy, Debug)]
pub enum Spoiling {
    /// So many reads that touch it fail.
    Unreadable { reads: u32 },
    /// Reads that touch it stay under way for this many polls more.
    Slow { polls: u32 },
}

struct Pending {
    handle: u64,
    token: u64,
    kind: OperationKind,
    offset: u64,
    length: u64,
    data: Arc<[u8]>,
    segments: Vec<Segment>,
    polls_left: u32,
    /// In the log, if it is kept.
    logged: Option<usize>,
    failure: Option<Failure>,
}

struct State {
    geometry: DiskGeometry,
    content: Content,
    pending: Vec<Pending>,
    recording: Option<(Content, Vec<Logged>)>,
    /// The time of the last event; shared by disks that are recorded together.
    events: Arc<AtomicU64>,
    submitted: u64,
    handles: u64,
    faults: Faults,
    spoilt: Vec<Spoilt>,
    random: fastrand::Rng,
}

/// A handle on a simulated disk.
pub struct SimDisk {
    state: Arc<Mutex<State>>,
    /// Tells the operations of this handle from those of others.
    handle: u64,
}

impl Clone for SimDisk {
    fn clone(&self) -> Self {
        let mut state = self.state();
        state.handles += 1;
        Self { state: self.state.clone(), handle: state.handles }
    }
}

impl SimDisk {
    /// An empty disk with 512-byte blocks that can zero and discard.
    pub fn new(size_bytes: u64) -> Self {
        Self::with(Content::default(), sim_geometry(size_bytes), 0)
    }

    /// A disk that holds `content`. `seed` decides everything random about it.
    pub fn with(content: Content, geometry: DiskGeometry, seed: u64) -> Self {
        let state = State {
            geometry,
            content,
            pending: Vec::new(),
            recording: None,
            events: Arc::default(),
            submitted: 0,
            handles: 0,
            faults: Faults::default(),
            spoilt: Vec::new(),
            random: fastrand::Rng::with_seed(seed),
        };
        Self { state: Arc::new(Mutex::new(state)), handle: 0 }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the log afresh: all that the disk holds now counts as durable, and time is 0.
    pub fn record(&self) {
        Self::record_together(&[self]);
    }

    /// As [`Self::record`], with one time for several disks, so that a power cut can hit all of
    /// them at one instant.
    pub fn record_together(disks: &[&Self]) {
        let events: Arc<AtomicU64> = Arc::default();
        for disk in disks {
            let mut state = disk.state();
            assert!(state.pending.is_empty(), "recording starts on a quiet disk");
            state.recording = Some((state.content.clone(), Vec::new()));
            state.events = events.clone();
        }
    }

    /// The log since [`Self::record`].
    pub fn recording(&self) -> Recording {
        let state = self.state();
        let (base, log) = state.recording.clone().expect("record() was called");
        Recording { base, log, geometry: state.geometry }
    }

    /// The time of the last event, to tell what a crash point comes before or after.
    pub fn position(&self) -> u64 {
        self.state().events.load(Ordering::Relaxed)
    }

    /// Operations submitted so far, for fail-the-Nth loops.
    pub fn operations(&self) -> u64 {
        self.state().submitted
    }

    pub fn set_faults(&self, faults: Faults) {
        self.state().faults = faults;
    }

    /// A part of the medium goes bad by itself.
    pub fn spoil(&self, spoilt: Spoilt) {
        self.state().spoilt.push(spoilt);
    }

    /// The device became larger or smaller.
    pub fn set_size(&self, size_bytes: u64) {
        self.state().geometry.size_bytes = size_bytes;
    }

    /// What the medium holds, past all faults; for tests that look or do damage.
    pub fn peek(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.state().content.read(offset, &mut bytes);
        bytes
    }

    /// Rot: the medium changes by itself.
    pub fn poke(&self, offset: u64, bytes: &[u8]) {
        self.state().content.write(offset, bytes);
    }

    /// A copy of everything as it is visible now, as if nothing were volatile: what a killed
    /// daemon leaves behind.
    pub fn content(&self) -> Content {
        self.state().content.clone()
    }
}

/// The usual geometry of a simulated disk.
pub fn sim_geometry(size_bytes: u64) -> DiskGeometry {
    DiskGeometry {
        size_bytes,
        block_bytes: SECTOR_BYTES as u32,
        optimal_bytes: PAGE_BYTES as u32,
        memory_alignment: SECTOR_BYTES as u32,
        zero: true,
        discard: true,
    }
}

impl Disk for SimDisk {
    fn geometry(&self) -> DiskGeometry {
        self.state().geometry
    }

    fn submit(&mut self, operation: Operation<'_>, token: u64) {
        self.state().submit(self.handle, operation, token);
    }

    fn poll(&mut self, completions: &mut Vec<Completion>, wait: bool) {
        self.state().poll(self.handle, completions, wait);
    }
}

impl State {
    fn submit(&mut self, handle: u64, operation: Operation<'_>, token: u64) {
        self.check(&operation);
        let mut data = Vec::new();
        if operation.kind.writes() {
            data.resize(operation.length as usize, 0);
            buffer::gather(operation.segments, &mut data);
        }
        let data: Arc<[u8]> = data.into();
        let now = self.tick();
        let logged = self.recording.as_mut().filter(|_| operation.kind != OperationKind::Read).map(
            |(_, log)| {
                log.push(Logged {
                    kind: operation.kind,
                    offset: operation.offset,
                    length: operation.length,
                    data: data.clone(),
                    submitted: now,
                    completed: None,
                    failed: false,
                });
                log.len() - 1
            },
        );
        let (unreadable, slow_polls) = self.spoils(&operation);
        let failure = unreadable.or_else(|| self.failure(operation.kind));
        self.submitted += 1;
        self.pending.push(Pending {
            handle,
            token,
            kind: operation.kind,
            offset: operation.offset,
            length: operation.length,
            data,
            segments: operation.segments.to_vec(),
            polls_left: self.faults.slow_polls + slow_polls,
            logged,
            failure,
        });
    }

    /// The time of a new event.
    fn tick(&self) -> u64 {
        self.events.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// A real disk would answer `EINVAL`; here our own mistake is to be seen at once.
    fn check(&self, operation: &Operation<'_>) {
        let DiskGeometry { size_bytes, block_bytes, memory_alignment, .. } = self.geometry;
        let Operation { kind, offset, length, segments } = *operation;
        assert!(offset.is_multiple_of(block_bytes.into()), "{kind:?} at {offset} is aligned");
        assert!(length.is_multiple_of(block_bytes.into()), "{kind:?} of {length} is aligned");
        assert!(offset + length <= size_bytes, "{kind:?} {offset}+{length} is inside the disk");
        assert_eq!(length == 0, kind == OperationKind::Flush, "only a flush has no length");
        if kind.transfers() {
            assert_eq!(buffer::total_bytes(segments) as u64, length, "segments fit the length");
        }
        for segment in segments {
            assert!(segment.length().is_multiple_of(block_bytes as usize), "aligned length");
            assert!(segment.address().addr().is_multiple_of(memory_alignment as usize));
        }
    }

    /// What spoilt places make of an operation: its failure, and the polls that it takes more.
    fn spoils(&mut self, operation: &Operation<'_>) -> (Option<Failure>, u32) {
        let (from, to) = (operation.offset, operation.offset + operation.length);
        let touches = |spoilt: &Spoilt| spoilt.offset < to && from < spoilt.offset + spoilt.length;
        if operation.kind != OperationKind::Read {
            self.spoilt.retain(|spoilt| !touches(spoilt));
            return (None, 0);
        }
        let (mut failure, mut slow_polls) = (None, 0);
        for spoilt in self.spoilt.iter_mut().filter(|spoilt| touches(spoilt)) {
            match &mut spoilt.how {
                Spoiling::Slow { polls } => slow_polls += *polls,
                Spoiling::Unreadable { reads: 0 } => {}
                Spoiling::Unreadable { reads } => {
                    *reads -= 1;
                    let errno = Errno::EIO;
                    failure = Some(Failure { after: 0, forever: true, errno, torn: false });
                }
            }
        }
        (failure, slow_polls)
    }

    fn failure(&mut self, kind: OperationKind) -> Option<Failure> {
        let unsupported = match kind {
            OperationKind::Zero => !self.geometry.zero,
            OperationKind::Discard => !self.geometry.discard,
            _ => false,
        };
        let always = |errno| Failure { after: 0, forever: true, errno, torn: false };
        if unsupported {
            return Some(always(Errno(libc::EOPNOTSUPP)));
        }
        if self.faults.full && (kind.writes() || kind == OperationKind::Zero) {
            return Some(always(Errno(libc::ENOSPC)));
        }
        if kind == OperationKind::Flush && self.faults.flush_failures > 0 {
            self.faults.flush_failures -= 1;
            return Some(always(Errno::EIO));
        }
        let failure = self.faults.fail.as_mut()?;
        if failure.after > 0 {
            failure.after -= 1;
            return None;
        }
        let failure = *failure;
        if !failure.forever {
            self.faults.fail = None;
        }
        Some(failure)
    }

    fn poll(&mut self, handle: u64, completions: &mut Vec<Completion>, wait: bool) {
        let before = completions.len();
        loop {
            let mine = |pending: &&mut Pending| pending.handle == handle;
            for pending in self.pending.iter_mut().filter(mine) {
                pending.polls_left = pending.polls_left.saturating_sub(1);
            }
            while let Some(index) = self.choose(handle, completions.len() - before) {
                let pending = self.pending.remove(index);
                let result = self.execute(&pending);
                let now = self.tick();
                if let (Some(index), Some((_, log))) = (pending.logged, &mut self.recording) {
                    log[index].completed = Some(now);
                    log[index].failed = result.is_err();
                }
                completions.push(Completion { token: pending.token, result });
            }
            let idle = !self.pending.iter().any(|pending| pending.handle == handle);
            if completions.len() > before || !wait || idle {
                return;
            }
        }
    }

    /// Which operation of the handle completes next in this poll, after `done` others.
    fn choose(&mut self, handle: u64, done: usize) -> Option<usize> {
        let ready = |pending: &Pending| pending.handle == handle && pending.polls_left == 0;
        let ready: Vec<usize> =
            (0..self.pending.len()).filter(|index| ready(&self.pending[*index])).collect();
        if !self.faults.reorder {
            return ready.first().copied();
        }
        if done > 0 && self.random.bool() {
            return None;
        }
        self.random.choice(ready)
    }

    fn execute(&mut self, pending: &Pending) -> Result<(), Errno> {
        if let Some(failure) = pending.failure {
            if failure.torn && pending.kind.writes() {
                let sectors = self.random.u64(0..=pending.length / SECTOR_BYTES);
                let bytes = &pending.data[..(sectors * SECTOR_BYTES) as usize];
                self.content.write(pending.offset, bytes);
            }
            return Err(failure.errno);
        }
        match pending.kind {
            OperationKind::Read => {
                let mut bytes = vec![0; pending.length as usize];
                self.content.read(pending.offset, &mut bytes);
                buffer::scatter(&bytes, &pending.segments);
            }
            OperationKind::Write | OperationKind::WriteDurable => {
                self.content.write(pending.offset, &pending.data);
            }
            OperationKind::Zero | OperationKind::Discard => {
                self.content.zero(pending.offset, pending.length);
            }
            OperationKind::Flush => {}
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "sim_test.rs"]
mod tests;
