//! The handle that control uses. Behind it: the socket thread and the reactors.

use super::mailbox::{Mailbox, mailbox};
use super::pinner;
use super::reactor::{self, ExportId, Message};
use super::sockets::{self, Command};
use crate::base::{Error, ErrorKind, Result};
use crate::io::disk::DiskTarget;
use crate::io::volume::Volume;
use crate::metrics::VolumeMetrics;
use crate::qos::Limits;
use crate::virtio::Device;
use std::any::Any;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an answer of the socket thread may take: it waits for requests under way.
const QUIESCE_WAIT: Duration = Duration::from_secs(10);

/// How long requests may take to end at a stop while others are held up for good.
const HELD_UP_WAIT: Duration = Duration::from_secs(1);

/// How many reactors, and where.
#[derive(Clone, Debug, Default)]
pub struct ServerOptions {
    /// Threads that move data; at least one.
    pub reactors: usize,
    /// CPUs to pin them to, one each, round robin; empty: the scheduler decides.
    pub cpus: Vec<usize>,
}

/// Who may connect to a socket: the VMM runs as a user of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketAccess {
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub mode: u32,
}

impl Default for SocketAccess {
    fn default() -> Self {
        Self { uid: None, gid: None, mode: 0o600 }
    }
}

/// What happens to an export, told from the socket thread: handlers must be quick.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExportEvent {
    /// A front end connected.
    Attached { peer_pid: Option<i32> },
    /// It is gone, and nothing of it is under way any more.
    Detached,
    /// The guest switched its write cache. Must be remembered before the call returns and given
    /// back as [`NewDoor::write_cache`] after a restart: the guest will not say it again.
    WriteCache { enabled: bool },
    /// The volume has failed by a defect: its requests fail from now on. Why, and what helps.
    Fenced { reason: String },
    /// Another front end waits at the socket, until the one that has it goes. Told once for each
    /// connection, with the process that has it.
    Taken { peer_pid: Option<i32> },
    /// The front end has set a ring up without sharing memory, so that its guest waits for ever;
    /// told once for each connection. `false`: it has shared some after all.
    MissesMemory { missing: bool },
    /// Guest memory should be pinned, and is used as ever: why.
    NotPinned { reason: String },
    /// The connection was dropped for breaking the protocol, and why.
    Refused { reason: String },
}

pub type ExportEvents = Arc<dyn Fn(ExportEvent) + Send + Sync>;

/// A volume to be served on a socket: its first door, and what is behind all of them.
pub struct Export {
    pub door: NewDoor,
    pub volume: Box<dyn Volume>,
    /// The volume's disks; `DiskIndex` is the position.
    pub disks: Vec<DiskTarget>,
}

/// A socket for a virtual machine: its way to a volume, which others may share.
pub struct NewDoor {
    /// `vm/volume`, for messages.
    pub name: String,
    pub socket: PathBuf,
    pub access: SocketAccess,
    pub device: Device,
    /// The state of the guest's write cache: true unless a guest turned it off.
    pub write_cache: bool,
    /// Pin the guest's memory, so that the kernel need not look its pages up for each operation.
    /// None of it can be given back to the host then, not by the guest either.
    pub pin_memory: bool,
    pub limits: Limits,
    pub metrics: Arc<VolumeMetrics>,
    pub events: ExportEvents,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExportStatus {
    pub connected: bool,
    pub peer_pid: Option<i32>,
    pub queues_running: u16,
    /// Of the guest.
    pub memory_bytes: u64,
    /// Of these, pinned and used so.
    pub pinned_bytes: u64,
}

struct Shared {
    commands: Mailbox<Command>,
    reactors: Vec<Mailbox<Message>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Serves exports; clones are the same server.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
}

impl Server {
    /// Starts the threads.
    pub fn start(options: &ServerOptions) -> Result<Self> {
        let (events, event_inbox) = mailbox()?;
        let (mut reactors, mut threads) = (Vec::new(), Vec::new());
        for index in 0..options.reactors.max(1) {
            let cpu = options.cpus.get(index % options.cpus.len().max(1)).copied();
            let (mailbox, thread) = reactor::start(index as u16, cpu, events.clone())?;
            reactors.push(mailbox);
            threads.push(thread);
        }
        let (commands, command_inbox) = mailbox()?;
        let pinner = pinner::start(events)?;
        threads.push(sockets::start(command_inbox, event_inbox, reactors.clone(), pinner)?);
        Ok(Self { shared: Arc::new(Shared { commands, reactors, threads: Mutex::new(threads) }) })
    }

    fn ask<R>(&self, command: impl FnOnce(Sender<R>) -> Command) -> Result<R> {
        let (reply, answer) = channel();
        self.shared.commands.send(command(reply));
        await_answer(&answer, QUIESCE_WAIT)
    }

    /// Serves `export` on its socket from now on, replacing a stale socket of that name.
    pub fn add(&self, export: Export) -> Result<ExportId> {
        self.add_with_door(0, export)
    }

    /// As [`Server::add`], with another number for the first door: below
    /// [`DOORS_MAX`](crate::base::limits::DOORS_MAX), and the same for the same machine under every
    /// daemon.
    pub fn add_with_door(&self, number: u16, export: Export) -> Result<ExportId> {
        let export = Box::new(export);
        self.ask(|reply| Command::Add { number, export, reply })?
    }

    /// Opens one more door to the volume behind `id`, with a number that is free.
    pub fn join(&self, id: ExportId, number: u16, door: NewDoor) -> Result<ExportId> {
        let door = Box::new(door);
        self.ask(|reply| Command::Join { id, number, door, reply })?
    }

    /// Disconnects the front end, waits until nothing of it is under way, closes and removes the
    /// socket, and with the last door drops the volume. [`ErrorKind::Busy`]: the drive still works
    /// on requests, and the door goes as soon as they have ended.
    pub fn remove(&self, id: ExportId) -> Result<()> {
        self.ask(|reply| Command::Remove { id, reply })?
    }

    /// Tells all guests of the volume a new capacity, in 512-byte sectors. Before a larger one the
    /// volume must have been told; after a smaller one it may be.
    pub fn set_capacity(&self, id: ExportId, sectors: u64) -> Result<()> {
        self.ask(|reply| Command::SetCapacity { id, sectors, reply })?
    }

    pub fn status(&self, id: ExportId) -> Result<ExportStatus> {
        self.ask(|reply| Command::Status { id, reply })?
    }

    /// Whether the socket thread and all reactors answer within `wait`, in all.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`], with the thread that does not. [`ErrorKind::Gone`]: they have ended.
    pub fn answers(&self, wait: Duration) -> Result<()> {
        let Shared { commands, reactors, .. } = &*self.shared;
        let ping = |thread: String, send: &dyn Fn(Sender<()>) -> bool| {
            let (reply, answer) = channel();
            send(reply);
            (thread, answer)
        };
        let sockets = ping("socket thread".into(), &|reply| commands.send(Command::Ping { reply }));
        let reactors = reactors.iter().enumerate().map(|(index, reactor)| {
            ping(format!("reactor {index}"), &|reply| reactor.send(Message::Ping { reply }))
        });
        let asked: Vec<_> = std::iter::once(sockets).chain(reactors).collect();
        let deadline = Instant::now() + wait;
        for (thread, answer) in asked {
            let left = deadline.saturating_duration_since(Instant::now());
            answer.recv_timeout(left).map_err(|error| match error {
                RecvTimeoutError::Disconnected => {
                    Error::new(ErrorKind::Gone, format!("the {thread} has ended"))
                }
                RecvTimeoutError::Timeout => {
                    let text = format!("the {thread} has not answered for {wait:?}");
                    Error::new(ErrorKind::Busy, text)
                }
            })?;
        }
        Ok(())
    }

    /// Changes the limits of a running export.
    pub fn set_limits(&self, id: ExportId, limits: Limits) -> Result<()> {
        let ExportId { slot, generation, door, .. } = id;
        self.send(id, Message::SetLimits { slot, generation, door, limits })
    }

    /// Puts these in the places of the volume's disks that are away, in order; what is sent to the
    /// volume from then on finds them there.
    pub fn give_disks(&self, id: ExportId, disks: Vec<DiskTarget>) -> Result<()> {
        let ExportId { slot, generation, .. } = id;
        let (reply, answer) = channel();
        self.send(id, Message::GiveDisks { slot, generation, disks, reply })?;
        await_answer(&answer, QUIESCE_WAIT)?
    }

    /// Delivers `message` to the volume, on its reactor; to nobody if the export is gone.
    pub fn message(&self, id: ExportId, message: Box<dyn Any + Send>) -> Result<()> {
        self.send(id, Message::Volume { slot: id.slot, generation: id.generation, message })
    }

    fn send(&self, id: ExportId, message: Message) -> Result<()> {
        let gone = || Error::new(ErrorKind::Gone, "no such export");
        let reactor = self.shared.reactors.get(usize::from(id.reactor)).ok_or_else(gone)?;
        if reactor.send(message) { Ok(()) } else { Err(gone()) }
    }

    /// Ends everything cleanly: no request is under way when this returns. Guests wait and
    /// reconnect to the next daemon. [`ErrorKind::Busy`]: requests are held up (by a drive, or by a
    /// full pool); the process may end all the same, and the next daemon does them again.
    pub fn stop(self) -> Result<()> {
        self.stop_unless(|| false)
    }

    /// As [`Server::stop`], but gives up sooner if requests are `held_up` by something that does
    /// not come while the daemon stops.
    pub fn stop_unless(self, held_up: impl Fn() -> bool) -> Result<()> {
        let (reply, answer) = channel();
        self.shared.commands.send(Command::Stop { reply });
        await_answer(&answer, HELD_UP_WAIT).or_else(|error| match error.kind() {
            ErrorKind::Busy if !held_up() => await_answer(&answer, QUIESCE_WAIT - HELD_UP_WAIT),
            _ => Err(error),
        })?;
        let threads = std::mem::take(&mut *self.shared.threads.lock().expect("never poisoned"));
        for thread in threads {
            thread.join().map_err(|_| Error::new(ErrorKind::Gone, "a data thread had failed"))?;
        }
        Ok(())
    }
}

fn await_answer<R>(answer: &Receiver<R>, wait: Duration) -> Result<R> {
    answer.recv_timeout(wait).map_err(|error| match error {
        RecvTimeoutError::Disconnected => {
            Error::new(ErrorKind::Gone, "the vhost-user server has stopped")
        }
        RecvTimeoutError::Timeout => {
            Error::new(ErrorKind::Busy, format!("requests are still under way after {wait:?}"))
        }
    })
}

#[cfg(test)]
#[path = "server_test.rs"]
mod tests;
