//! The keeper: one thread per pool that owns it. Control calls it, thin volumes ask it, and between
//! messages it scrubs freed extents.
//!
//! A commit takes a flush of the drive, so all requests of thin volumes that are waiting when one
//! ends share the next.

use super::change::AllocationId;
use super::pool::Pool;
use super::thin::{ThinKind, ThinReply, ThinRequest};
use super::volume::{FlashVolume, FullPolicy, VolumeCounters, VolumeMessage};
use crate::base::error::panic_text;
use crate::base::{Error, ErrorKind, Result};
use crate::io::disk::DiskGeometry;
use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Brings a message to the volume's reactor (`Server::message` of the volume's export). Called on
/// the keeper's thread and on that of [`Keeper::resize`]; must not call the keeper, nor block for
/// longer than it takes the caller of [`Keeper::volume`] to hand the volume to its reactor.
pub type Notify = Arc<dyn Fn(Box<dyn Any + Send>) + Send + Sync>;

/// How a keeper works.
#[derive(Clone, Copy, Debug)]
pub struct KeeperOptions {
    /// Bytes scrubbed between two looks at the messages. Scrubbing takes at most half the time.
    pub scrub_bytes: u64,
    /// How long scrubbing rests after a failure.
    pub scrub_retry: Duration,
}

impl Default for KeeperOptions {
    fn default() -> Self {
        Self { scrub_bytes: 16 << 20, scrub_retry: Duration::from_secs(10) }
    }
}

/// How a volume is served.
pub struct VolumeOptions {
    pub notify: Notify,
    /// For thin volumes.
    pub full: FullPolicy,
    /// Of the disk that the volume's operations go to.
    pub geometry: DiskGeometry,
    pub counters: Arc<VolumeCounters>,
}

/// Scrubbing since the keeper started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubStatus {
    pub scrubbed_bytes: u64,
    pub left_bytes: u64,
    /// The last failure, until a step succeeds.
    pub failure: Option<String>,
}

type Call = Box<dyn FnOnce(&mut Pool) + Send>;

enum Message {
    Call(Call),
    /// To be called when so many bytes are clean, or nothing is left to scrub.
    AfterScrub(u64, Call),
    Thin(Thin),
    /// Nobody waits for space for this allocation any more.
    Withdraw(AllocationId),
    Stop,
}

struct Thin {
    request: ThinRequest,
    full: FullPolicy,
    notify: Notify,
}

/// A volume's way to the keeper.
#[derive(Clone)]
pub(super) struct ThinSender {
    id: AllocationId,
    full: FullPolicy,
    notify: Notify,
    messages: Sender<Message>,
}

impl ThinSender {
    /// Asks the pool. A keeper that has stopped answers nobody: the daemon is ending, and what
    /// waits for the answer stays in the in-flight area for the next one, which does it.
    pub(super) fn send(&self, kind: ThinKind) {
        let request = ThinRequest { id: self.id, kind };
        let thin = Thin { request, full: self.full, notify: self.notify.clone() };
        let _ = self.messages.send(Message::Thin(thin));
    }

    /// What was asked for and waits for space is not wanted any more; it may be answered all the
    /// same.
    pub(super) fn withdraw(&self) {
        let _ = self.messages.send(Message::Withdraw(self.id));
    }
}

/// A handle on a pool's keeper; clones share it.
#[derive(Clone)]
pub struct Keeper {
    messages: Sender<Message>,
    attached: Arc<Mutex<BTreeMap<AllocationId, Notify>>>,
    scrub: Arc<Mutex<ScrubStatus>>,
    waiting: Arc<AtomicUsize>,
    failure: Arc<OnceLock<String>>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl Keeper {
    /// Moves the pool to a thread of its own.
    pub fn start(pool: Pool, options: KeeperOptions) -> Result<Self> {
        let (messages, receiver) = channel();
        let scrub = Arc::new(Mutex::new(ScrubStatus::default()));
        let waiting = Arc::new(AtomicUsize::new(0));
        let failure = Arc::new(OnceLock::new());
        let mut worker = Worker {
            pool,
            options,
            messages: receiver,
            later: Vec::new(),
            waiting: Vec::new(),
            rest_until: None,
            scrub: scrub.clone(),
            waiting_count: waiting.clone(),
        };
        let failed = failure.clone();
        let thread = std::thread::Builder::new()
            .name("keeper".to_owned())
            .spawn(move || {
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| worker.run())) {
                    let why = panic_text(&*panic);
                    let name = worker.pool.name();
                    log::error!("pool {name}: its keeper has ended by a defect: {why}");
                    // Before the worker goes, and with it what is asked of it.
                    let _ = failed.set(why.to_owned());
                }
            })
            .map_err(|error| Error::io("starting the keeper of a pool", error))?;
        let thread = Arc::new(Mutex::new(Some(thread)));
        Ok(Self { messages, attached: Arc::default(), scrub, waiting, failure, thread })
    }

    /// Runs `call` on the pool and returns what it returns. Must not be called by `call` itself.
    /// If it panics the keeper ends: what the pool has in memory is not to be trusted any more.
    ///
    /// # Errors
    /// [`ErrorKind::Fenced`]: the keeper has ended by a defect. [`ErrorKind::Gone`]: it was
    /// stopped.
    pub fn call<R: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Pool) -> R + Send + 'static,
    ) -> Result<R> {
        self.run(Message::Call, call)
    }

    /// As [`Self::call`], but not before `bytes` are clean or nothing is left to scrub: so that a
    /// large volume made on a dirty pool does not keep the pool from serving others meanwhile.
    pub fn call_after_scrub<R: Send + 'static>(
        &self,
        bytes: u64,
        call: impl FnOnce(&mut Pool) -> R + Send + 'static,
    ) -> Result<R> {
        self.run(|call| Message::AfterScrub(bytes, call), call)
    }

    fn run<R: Send + 'static>(
        &self,
        message: impl FnOnce(Call) -> Message,
        call: impl FnOnce(&mut Pool) -> R + Send + 'static,
    ) -> Result<R> {
        let (answer, answered) = channel();
        let failed = self.failure.clone();
        let call: Call =
            Box::new(move |pool| match catch_unwind(AssertUnwindSafe(|| call(pool))) {
                // A caller that is gone has no use for the result.
                Ok(result) => _ = answer.send(result),
                Err(panic) => {
                    // Before the answer goes, whose receiver asks why.
                    let _ = failed.set(panic_text(&*panic).to_owned());
                    resume_unwind(panic);
                }
            });
        // One that has ended drops the call, and with it the answer.
        let _ = self.messages.send(message(call));
        answered.recv().map_err(|_| match self.failure() {
            Some(text) => Error::new(ErrorKind::Fenced, text),
            None => Error::new(ErrorKind::Gone, "the pool was closed meanwhile"),
        })
    }

    /// Why the keeper has ended by itself, and what helps.
    pub fn failure(&self) -> Option<String> {
        self.failure.get().map(|why| {
            format!(
                "its keeper has ended by a defect of vflashd ({why}): volumes are served on, but \
                 nothing is mapped, given back or changed until vflashd is restarted"
            )
        })
    }

    /// The volume of an allocation, to be served. From now on [`Self::resize`] tells it of its
    /// size, until [`Self::detached`].
    pub fn volume(&self, id: AllocationId, options: VolumeOptions) -> Result<FlashVolume> {
        let VolumeOptions { notify, full, geometry, counters } = options;
        let keeper =
            ThinSender { id, full, notify: notify.clone(), messages: self.messages.clone() };
        let volume = self.call(move |pool| {
            let allocation = pool.allocation(id).ok_or_else(|| {
                Error::new(ErrorKind::Gone, format!("there is no allocation {}", id.0))
            })?;
            Ok::<_, Error>(FlashVolume::new(allocation, geometry, keeper, counters))
        })??;
        self.attached.lock().unwrap_or_else(PoisonError::into_inner).insert(id, notify);
        Ok(volume)
    }

    /// The volume is no longer served.
    pub fn detached(&self, id: AllocationId) {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    /// Resizes an allocation, and its volume if one is attached. A volume that shrinks stops using
    /// its tail first; if that takes longer than `wait`, it goes on using it, nothing is cut off
    /// and the error is [`ErrorKind::Busy`].
    pub fn resize(&self, id: AllocationId, size_bytes: u64, wait: Duration) -> Result<()> {
        let attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        let notify = attached.get(&id).cloned();
        drop(attached);
        let old = self.call(move |pool| pool.allocation(id).map(|found| found.size_bytes))?;
        let Some(notify) = notify.filter(|_| old.is_some()) else {
            return self.call(move |pool| pool.resize(id, size_bytes))?;
        };
        if old.is_some_and(|old| size_bytes < old) {
            let (done, quiet) = channel();
            // The receiver is gone if the wait was over before.
            let done = Box::new(move || _ = done.send(()));
            notify(Box::new(VolumeMessage::Shrink { size_bytes, done }));
            let is_quiet = quiet.recv_timeout(wait).is_ok();
            return self.call(move |pool| {
                let text =
                    format!("allocation {}: its volume is still busy behind the new end", id.0);
                let busy = || Error::new(ErrorKind::Busy, text + "; try again");
                let cut = if is_quiet { pool.resize(id, size_bytes) } else { Err(busy()) };
                if cut.is_err() {
                    tell_size(pool, id, &notify);
                }
                cut
            })?;
        }
        self.call(move |pool| {
            pool.resize(id, size_bytes)?;
            tell_size(pool, id, &notify);
            Ok(())
        })?
    }

    pub fn scrub_status(&self) -> ScrubStatus {
        self.scrub.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Thin volumes' requests that wait until the pool has space.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Ends the thread after what was sent before, and with it the pool's hold on its disk.
    /// Requests of thin volumes that still wait for space are not answered: their guests wait for
    /// the next daemon.
    pub fn stop(self) {
        // A keeper that has ended already is what is wanted.
        let _ = self.messages.send(Message::Stop);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            thread.join().expect("its panics are caught");
        }
    }
}

/// Tells a volume its size and all its extents. In the keeper's thread, as its answers: news that
/// were older than what the volume has learnt since would give it back extents which by then are
/// another's.
fn tell_size(pool: &Pool, id: AllocationId, notify: &Notify) {
    let Some(allocation) = pool.allocation(id) else { return };
    let (size_bytes, runs) = (allocation.size_bytes, allocation.runs().collect());
    notify(Box::new(VolumeMessage::Sized { size_bytes, runs }));
}

struct Worker {
    pool: Pool,
    options: KeeperOptions,
    messages: Receiver<Message>,
    /// Calls that wait for scrubbing.
    later: Vec<(u64, Call)>,
    /// Requests that wait for space.
    waiting: Vec<Thin>,
    /// Scrubbing rests until then.
    rest_until: Option<Instant>,
    scrub: Arc<Mutex<ScrubStatus>>,
    /// Of `waiting`, for others to look at.
    waiting_count: Arc<AtomicUsize>,
}

impl Worker {
    fn run(&mut self) {
        loop {
            let first = match self.wait() {
                Ok(message) => Some(message),
                Err(RecvTimeoutError::Timeout) => None,
                // Every handle is gone: nobody can ask for anything any more.
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let scrubs = first.is_none();
            let mut batch = Vec::new();
            let mut stop = false;
            let mut next = first;
            while let Some(message) = next {
                match message {
                    Message::Thin(thin) => batch.push(thin),
                    other => {
                        // Order is kept: what came before a call is done before it.
                        self.answer(&mut batch);
                        stop |= self.carry_out(other);
                    }
                }
                next = self.messages.try_recv().ok();
            }
            self.answer(&mut batch);
            if stop {
                return;
            }
            if scrubs {
                self.scrub_step();
            }
            self.run_later();
        }
    }

    /// The next message; times out when it is time to scrub.
    fn wait(&self) -> std::result::Result<Message, RecvTimeoutError> {
        if self.pool.space().scrub_bytes == 0 {
            return self.messages.recv().map_err(|_| RecvTimeoutError::Disconnected);
        }
        let rest = self.rest_until.map(|until| until.saturating_duration_since(Instant::now()));
        self.messages.recv_timeout(rest.unwrap_or_default())
    }

    /// True if it was the order to stop.
    fn carry_out(&mut self, message: Message) -> bool {
        match message {
            Message::Call(call) => call(&mut self.pool),
            Message::AfterScrub(bytes, call) => self.later.push((bytes, call)),
            Message::Thin(_) => unreachable!("batched by the caller"),
            Message::Withdraw(id) => {
                self.waiting.retain(|thin| thin.request.id != id);
                self.waiting_count.store(self.waiting.len(), Ordering::Relaxed);
            }
            Message::Stop => return true,
        }
        self.retry_waiting();
        false
    }

    /// Answers the batch with one commit.
    fn answer(&mut self, batch: &mut Vec<Thin>) {
        if batch.is_empty() {
            return;
        }
        let batch = std::mem::take(batch);
        let frees = batch.iter().any(|thin| matches!(thin.request.kind, ThinKind::Unmap(_)));
        self.answer_once(batch);
        if frees {
            self.retry_waiting();
        }
    }

    fn answer_once(&mut self, batch: Vec<Thin>) {
        let requests: Vec<ThinRequest> = batch.iter().map(|thin| thin.request.clone()).collect();
        let replies = self.pool.thin_batch(&requests);
        for (thin, reply) in batch.into_iter().zip(replies) {
            let full = reply.as_ref().is_err_and(|error| error.kind() == ErrorKind::Full);
            if full && thin.full == FullPolicy::Wait {
                self.waiting.push(thin);
            } else {
                tell(thin, reply);
            }
        }
        self.waiting_count.store(self.waiting.len(), Ordering::Relaxed);
    }

    fn retry_waiting(&mut self) {
        let space = self.pool.space();
        if !self.waiting.is_empty() && space.free_bytes + space.scrub_bytes > 0 {
            let waiting = std::mem::take(&mut self.waiting);
            self.answer_once(waiting);
        }
    }

    fn scrub_step(&mut self) {
        let begun = Instant::now();
        let step = self.pool.scrub_step(self.options.scrub_bytes);
        let mut status = self.scrub.lock().unwrap_or_else(PoisonError::into_inner);
        let rest = match &step {
            Ok(progress) => {
                status.scrubbed_bytes += progress.scrubbed_bytes;
                status.left_bytes = progress.left_bytes;
                status.failure = None;
                begun.elapsed()
            }
            Err(error) => {
                log::error!("{error}");
                status.failure = Some(error.to_string());
                self.options.scrub_retry
            }
        };
        drop(status);
        self.rest_until = Some(Instant::now() + rest);
        self.retry_waiting();
    }

    fn run_later(&mut self) {
        let space = self.pool.space();
        let resting = self.scrub_failed();
        let ready = |bytes: u64| space.free_bytes >= bytes || space.scrub_bytes == 0 || resting;
        let (now, later) =
            std::mem::take(&mut self.later).into_iter().partition(|(b, _)| ready(*b));
        self.later = later;
        let now: Vec<(u64, Call)> = now;
        for (_, call) in now {
            call(&mut self.pool);
        }
    }

    fn scrub_failed(&self) -> bool {
        self.scrub.lock().unwrap_or_else(PoisonError::into_inner).failure.is_some()
    }
}

fn tell(thin: Thin, reply: ThinReply) {
    let message = VolumeMessage::Thin { kind: thin.request.kind, reply };
    (thin.notify)(Box::new(message));
}

#[cfg(test)]
#[path = "keeper_test.rs"]
mod tests;
