//! The NBD client: one thread that connects, sends and watches the clock, one that receives.

use super::connection::{Stream, connect};
use super::protocol::{Command, ERROR_SHUTDOWN, Export, Fault, REPLY_BYTES, reply, request};
use super::queue::{Next, Port, Queue, Times};
use crate::backing::spec::NbdUrl;
use crate::base::{Error, Result};
use crate::io::disk::{Completion, Disk, DiskGeometry, OpenDisk, Operation, Waker};
use std::fmt;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between two attempts to connect, at first and at most.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// How long things may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdOptions {
    /// Each step of connecting.
    pub connect: Duration,
    /// A request's answer: after this the connection is given up for a new one. A flush and zeros
    /// get twice as much each time that it was not enough.
    pub request: Duration,
    /// For a server to carry out what it read from a lost connection.
    pub settle: Duration,
    /// A read without a connection: whoever wants it asks again, or does without.
    pub read: Duration,
    /// Any operation without a connection; `None`: for ever, as is right under a cache.
    pub patience: Option<Duration>,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            request: Duration::from_secs(30),
            settle: Duration::from_secs(10),
            read: Duration::from_secs(5),
            patience: None,
        }
    }
}

/// How a client is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NbdStatus {
    pub connected: bool,
    /// Connections after the first.
    pub reconnects: u64,
    /// Why the last connection, or attempt at one, ended.
    pub last_error: Option<String>,
}

/// A connection to an export that comes back by itself. Opened as a disk by any number of handles,
/// of which one writes: what a lost connection may have undone is told to one flush.
pub struct NbdClient {
    threads: Arc<Threads>,
}

/// Lives as long as the client or a handle; then the threads end.
struct Threads {
    shared: Arc<Shared>,
    sender: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    url: NbdUrl,
    options: NbdOptions,
    export: Export,
    state: Mutex<State>,
    /// Something for the sender.
    changed: Condvar,
}

struct State {
    queue: Queue,
    status: NbdStatus,
    /// The receiver has ended.
    broken: Option<String>,
    /// The queue has changed since the sender looked.
    news: bool,
    stop: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the sender look again.
    fn notify(&self, state: &mut State) {
        state.news = true;
        self.changed.notify_all();
    }

    /// Lets go of the lock and delivers what has ended.
    fn deliver(&self, mut state: MutexGuard<'_, State>) {
        let ended = state.queue.ended();
        drop(state);
        for (port, completion) in ended {
            port.complete(completion);
        }
    }
}

impl NbdClient {
    /// Connects; fails if the server cannot be reached now.
    pub fn connect(url: NbdUrl, options: NbdOptions) -> Result<Arc<Self>> {
        let (stream, export) = connect(&url, options.connect)?;
        let times = Times { request: options.request, settle: options.settle };
        let queue = Queue::new(export, times);
        let status = NbdStatus { connected: true, ..Default::default() };
        let state = State { queue, status, broken: None, news: false, stop: false };
        let shared = Arc::new(Shared {
            url,
            options,
            export,
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let sender = std::thread::Builder::new()
            .name("nbd-send".to_owned())
            .spawn({
                let shared = shared.clone();
                move || Sender { shared: &shared }.run(stream)
            })
            .map_err(|error| Error::io("cannot start an NBD thread", error))?;
        let threads = Threads { shared, sender: Mutex::new(Some(sender)) };
        Ok(Arc::new(Self { threads: Arc::new(threads) }))
    }

    pub fn url(&self) -> &NbdUrl {
        &self.threads.shared.url
    }

    pub fn export(&self) -> Export {
        self.threads.shared.export
    }

    pub fn status(&self) -> NbdStatus {
        self.threads.shared.state().status.clone()
    }

    /// How long the server may take to carry out what it read from a connection that is gone.
    pub fn settle(&self) -> Duration {
        self.threads.shared.options.settle
    }

    /// Who had the export before may have been killed and have left writes with the server: nothing
    /// is changed until they have had time to end ([`Self::settle`] from now on).
    pub fn hold_writes(&self) {
        let shared = &self.threads.shared;
        let mut state = shared.state();
        state.queue.hold(Instant::now());
        shared.notify(&mut state);
    }
}

impl fmt::Debug for NbdClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NbdClient({})", self.url())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.state().stop = true;
        self.shared.changed.notify_all();
        let sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(sender) = sender {
            // A panic in it was reported when it happened.
            let _ = sender.join();
        }
    }
}

impl OpenDisk for NbdClient {
    fn geometry(&self) -> DiskGeometry {
        self.export().geometry()
    }

    fn open(&self, waker: Waker) -> Result<Box<dyn Disk + Send>> {
        let handle = Handle {
            done: Mutex::new(Vec::new()),
            under_way: AtomicU64::new(0),
            arrived: Condvar::new(),
            waker,
        };
        Ok(Box::new(NbdDisk { threads: self.threads.clone(), handle: Arc::new(handle) }))
    }
}

/// One handle's completions.
struct Handle {
    done: Mutex<Vec<Completion>>,
    under_way: AtomicU64,
    arrived: Condvar,
    waker: Waker,
}

impl Handle {
    fn done(&self) -> MutexGuard<'_, Vec<Completion>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Port for Handle {
    fn complete(&self, completion: Completion) {
        self.done().push(completion);
        self.arrived.notify_all();
        (self.waker)();
    }
}

/// A handle on an export.
struct NbdDisk {
    threads: Arc<Threads>,
    handle: Arc<Handle>,
}

impl Disk for NbdDisk {
    fn geometry(&self) -> DiskGeometry {
        self.threads.shared.export.geometry()
    }

    fn submit(&mut self, operation: Operation<'_>, token: u64) {
        self.handle.under_way.fetch_add(1, Ordering::Relaxed);
        let shared = &self.threads.shared;
        let mut state = shared.state();
        state.queue.submit(self.handle.clone(), operation, token, Instant::now());
        shared.notify(&mut state);
        shared.deliver(state);
    }

    fn poll(&mut self, completions: &mut Vec<Completion>, wait: bool) {
        let mut done = self.handle.done();
        while wait && done.is_empty() && self.handle.under_way.load(Ordering::Relaxed) > 0 {
            done = self.handle.arrived.wait(done).unwrap_or_else(PoisonError::into_inner);
        }
        self.handle.under_way.fetch_sub(done.len() as u64, Ordering::Relaxed);
        completions.append(&mut done);
    }
}

/// The thread that connects and sends.
struct Sender<'a> {
    shared: &'a Arc<Shared>,
}

/// Why a connection is no longer used.
enum Left {
    Stopped,
    Broken(String),
}

impl Sender<'_> {
    fn run(&self, first: Stream) {
        let mut stream = first;
        loop {
            match self.serve(stream) {
                Left::Stopped => return,
                Left::Broken(why) => {
                    log::warn!("{}: connection lost: {why}; reconnecting", self.shared.url);
                }
            }
            match self.reconnect() {
                Some(next) => stream = next,
                None => return,
            }
        }
    }

    /// Uses a connection until it breaks or the client is dropped.
    fn serve(&self, mut stream: Stream) -> Left {
        let receiving = stream.try_clone().and_then(|stream| {
            let shared = self.shared.clone();
            let builder = std::thread::Builder::new().name("nbd-receive".to_owned());
            builder.spawn(move || receive(&shared, stream))
        });
        let left = match &receiving {
            Ok(_) => self.send(&mut stream),
            Err(error) => Left::Broken(error.to_string()),
        };
        if matches!(left, Left::Stopped) {
            // Nobody is left to be told if this fails.
            let _ = stream.write_all(&request(Command::Disconnect, 0, 0, 0));
        }
        stream.shut_down();
        if let Ok(receiver) = receiving {
            // A panic in it was reported when it happened.
            let _ = receiver.join();
        }
        let mut state = self.shared.state();
        state.queue.disconnected();
        state.broken = None;
        state.status.connected = false;
        if let Left::Broken(why) = &left {
            state.status.last_error = Some(why.clone());
        }
        left
    }

    fn send(&self, stream: &mut Stream) -> Left {
        loop {
            match self.next() {
                Ok(wire) => {
                    if let Err(error) = stream.write_all(&wire) {
                        return Left::Broken(error.to_string());
                    }
                }
                Err(left) => return left,
            }
        }
    }

    /// Waits for the next request.
    fn next(&self) -> std::result::Result<Arc<[u8]>, Left> {
        let mut state = self.shared.state();
        loop {
            let now = Instant::now();
            if let Some(why) = state.broken.take() {
                return Err(Left::Broken(why));
            }
            if state.stop {
                return Err(Left::Stopped);
            }
            state.news = false;
            if let Some(waited) = state.queue.is_late(now) {
                let seconds = waited.as_secs();
                return Err(Left::Broken(format!("a request got no answer in {seconds}s")));
            }
            let wake = match state.queue.next(now) {
                Next::Send(wire) => return Ok(wire),
                Next::Wait(wake) => wake.into_iter().chain(state.queue.late_at()).min(),
            };
            // A flush may have ended without being sent.
            self.shared.deliver(state);
            state = self.wait(wake);
        }
    }

    /// Until something changes, or `wake`.
    fn wait(&self, wake: Option<Instant>) -> MutexGuard<'_, State> {
        let state = self.shared.state();
        let idle = |state: &mut State| !state.stop && state.broken.is_none() && !state.news;
        let changed = &self.shared.changed;
        let Some(wake) = wake else {
            return changed.wait_while(state, idle).unwrap_or_else(PoisonError::into_inner);
        };
        let left = wake.saturating_duration_since(Instant::now());
        let waited = changed.wait_timeout_while(state, left, idle);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Tries until there is a connection to the same export; `None` if the client was dropped.
    fn reconnect(&self) -> Option<Stream> {
        let mut backoff = BACKOFF_MIN;
        loop {
            let why = match connect(&self.shared.url, self.shared.options.connect) {
                Ok((stream, export)) => match self.shared.export.difference(&export) {
                    None => {
                        let mut state = self.shared.state();
                        // A server that takes connections and answers nothing.
                        let options = &self.shared.options;
                        let now = Instant::now();
                        state
                            .queue
                            .give_up_reads(now.checked_sub(options.request.max(options.read)), now);
                        state.queue.connected(now);
                        state.status.connected = true;
                        state.status.reconnects += 1;
                        log::info!("{}: connected again", self.shared.url);
                        return Some(stream);
                    }
                    Some(difference) => {
                        stream.shut_down();
                        format!("not the same as before: {difference}")
                    }
                },
                Err(error) => error.to_string(),
            };
            let mut state = self.shared.state();
            if state.status.last_error.as_ref() != Some(&why) {
                log::warn!("{}: {why}; trying again", self.shared.url);
                state.status.last_error = Some(why);
            }
            let now = Instant::now();
            let NbdOptions { read, patience, .. } = self.shared.options;
            state.queue.give_up_reads(now.checked_sub(read), now);
            state.queue.give_up(patience.and_then(|patience| now.checked_sub(patience)), now);
            self.shared.deliver(state);
            if !self.pause(backoff) {
                return None;
            }
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// Waits between two attempts; false if the client was dropped.
    fn pause(&self, backoff: Duration) -> bool {
        let state = self.shared.state();
        let waited = self.shared.changed.wait_timeout_while(state, backoff, |state| !state.stop);
        !waited.unwrap_or_else(PoisonError::into_inner).0.stop
    }
}

/// The thread that receives: until the connection ends, by whichever side.
fn receive(shared: &Shared, mut stream: Stream) {
    let mut data = Vec::new();
    let why = loop {
        if let Err(why) = receive_one(shared, &mut stream, &mut data) {
            break why;
        }
    };
    shared.state().broken = Some(why);
    shared.changed.notify_all();
}

/// Receives one reply and completes its request.
fn receive_one(
    shared: &Shared,
    stream: &mut impl Read,
    data: &mut Vec<u8>,
) -> std::result::Result<(), String> {
    let failed = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => "the server ended it".to_owned(),
        _ => error.to_string(),
    };
    let mut head = [0; REPLY_BYTES];
    stream.read_exact(&mut head).map_err(failed)?;
    let reply = reply(&head).map_err(|Fault(text)| text)?;
    if reply.error == ERROR_SHUTDOWN {
        return Err("the server is shutting down".to_owned());
    }
    let stranger = || "an answer to no request".to_owned();
    let length = shared.state().queue.data_bytes(reply.cookie, reply.error).ok_or_else(stranger)?;
    data.resize(length, 0);
    stream.read_exact(data).map_err(failed)?;
    // Taken off the wire first: nobody else ends it while its memory is written to.
    let answered = shared.state().queue.answer(reply.cookie, reply.error);
    let answered = answered.ok_or_else(stranger)?;
    answered.scatter(data);
    let mut state = shared.state();
    state.queue.settle_answer(answered, Instant::now());
    shared.notify(&mut state);
    shared.deliver(state);
    Ok(())
}
