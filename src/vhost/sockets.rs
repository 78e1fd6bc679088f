//! The socket thread: every listener and every connection of the daemon.
//!
//! A connection moves through these states; a message is handled only in *open*, with all its bytes
//! there and the rings it touches at rest, so that no guest waits for another's front end or disk:
//!
//! ```text
//! listening -- accept --> open -- message touches running rings --> parked (rings being stopped)
//!     ^                    | ^                                        |
//!     |                    | +-------- last ring stopped, handled <---+
//!     |                    v
//!     +-- all at rest -- closing <-- peer gone, protocol broken, memory cut short, removal
//! ```
//!
//! A door that is removed is gone at once. Its export, if it was the last one, *leaves* until its
//! reactor says that nothing of it is under way; whoever asked is answered then.

use super::door::AddDoor;
use super::mailbox::{Inbox, Mailbox};
use super::peek::{Peeked, Touches, peek, peek_descriptor, peek_unwelcome, request};
use super::pinner::Job;
use super::reactor::{AddExport, Event, ExportId, Message, SLOTS_MAX};
use super::server::{Export, ExportEvent, ExportEvents, ExportStatus, NewDoor, SocketAccess};
use super::session::Session;
use crate::base::limits::{DOORS_MAX, EXPORTS_MAX};
use crate::base::{Error, ErrorKind, Result};
use crate::virtio::Device;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, getsockopt, listen, socket, sockopt,
};
use nix::sys::stat::Mode;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use vhost::vhost_user::BackendReqHandler;

/// To the thread that pins memory.
type PinJobs = Sender<Job>;

const TOKEN_COMMANDS: u64 = u64::MAX;
const UNWELCOME: &str = "carries a file of a network or FUSE file system, for which everybody may \
                         have to wait: share memory of this host (memfd, hugetlbfs, tmpfs)";

const TOKEN_EVENTS: u64 = u64::MAX - 1;

/// Above a place: its listener, while a front end is there.
const TOKEN_TAKEN: u64 = 1 << 48;

/// What the handle asks of this thread.
pub enum Command {
    Add {
        number: u16,
        export: Box<Export>,
        reply: Sender<Result<ExportId>>,
    },
    Join {
        id: ExportId,
        number: u16,
        door: Box<NewDoor>,
        reply: Sender<Result<ExportId>>,
    },
    Remove {
        id: ExportId,
        reply: Sender<Result<()>>,
    },
    SetCapacity {
        id: ExportId,
        sectors: u64,
        reply: Sender<Result<()>>,
    },
    Status {
        id: ExportId,
        reply: Sender<Result<ExportStatus>>,
    },
    /// Answers, to show that the thread goes on.
    Ping {
        reply: Sender<()>,
    },
    Stop {
        reply: Sender<()>,
    },
}

/// A front end's connection.
struct Connection {
    handler: BackendReqHandler<Mutex<Session>>,
    session: Arc<Mutex<Session>>,
    stream: UnixStream,
    /// Where CONFIG_CHANGE goes, once the front end has given it.
    channel: Option<OwnedFd>,
    /// Rings being stopped; while there are any, no message is handled.
    stopping: Vec<u16>,
    closing: bool,
    peer_pid: Option<i32>,
    /// As its owner was told.
    misses_memory: bool,
    /// Its owner was told that another front end waits.
    taken: bool,
    /// Its owner was told that its memory is not pinned.
    not_pinned: bool,
}

impl Connection {
    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().expect("this thread alone locks it, and aborts when it panics")
    }
}

/// Where a door is, to find its socket by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    reactor: u16,
    slot: u16,
    door: u16,
}

/// One door as this thread sees it.
struct Socket {
    id: ExportId,
    name: String,
    path: PathBuf,
    listener: UnixListener,
    device: Device,
    write_cache: bool,
    /// Where its front end's memory is to be pinned.
    pinner: Option<PinJobs>,
    events: ExportEvents,
    connection: Option<Connection>,
    removing: Option<Sender<Result<()>>>,
}

/// An export without doors that has something under way still: its slot is not free yet.
struct Leaving {
    id: ExportId,
    /// Its last socket, if that is to be removed.
    path: Option<PathBuf>,
    waiting: Vec<Sender<Result<()>>>,
}

struct Sockets {
    epoll: Epoll,
    commands: Inbox<Command>,
    events: Inbox<Event>,
    reactors: Vec<Mailbox<Message>>,
    sockets: BTreeMap<Place, Socket>,
    leaving: Vec<Leaving>,
    generation: u32,
    stopping: Option<Sender<()>>,
    /// To a thread that closes what may take long to close, and may wait for it for ever.
    closer: Sender<Vec<OwnedFd>>,
    /// To the thread that pins memory.
    pinner: PinJobs,
}

/// Starts the thread.
pub fn start(
    commands: Inbox<Command>,
    events: Inbox<Event>,
    reactors: Vec<Mailbox<Message>>,
    pinner: PinJobs,
) -> Result<JoinHandle<()>> {
    let os = |error: nix::Error| Error::io("cannot start the socket thread", error.into());
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(os)?;
    let readable = |token| EpollEvent::new(EpollFlags::EPOLLIN, token);
    epoll.add(commands.event(), readable(TOKEN_COMMANDS)).map_err(os)?;
    epoll.add(events.event(), readable(TOKEN_EVENTS)).map_err(os)?;
    let sockets = BTreeMap::new();
    let (closer, to_close) = channel();
    std::thread::Builder::new()
        .name("closer".into())
        .spawn(move || to_close.into_iter().for_each(drop::<Vec<OwnedFd>>))
        .map_err(|error| Error::io("cannot start a thread that closes files", error))?;
    let (generation, stopping) = (0, None);
    let mut thread = Sockets {
        epoll,
        commands,
        events,
        reactors,
        sockets,
        leaving: Vec::new(),
        generation,
        stopping,
        closer,
        pinner,
    };
    std::thread::Builder::new()
        .name("vhost-user".into())
        .spawn(move || {
            let run = std::panic::AssertUnwindSafe(|| thread.run());
            if std::panic::catch_unwind(run).is_err() {
                log::error!("the socket thread failed (see the panic above): vflashd ends");
                std::process::abort();
            }
        })
        .map_err(|error| Error::io("cannot start the socket thread", error))
}

impl From<ExportId> for Place {
    fn from(ExportId { reactor, slot, door, .. }: ExportId) -> Self {
        Self { reactor, slot, door }
    }
}

impl Place {
    fn token(self) -> u64 {
        u64::from(self.reactor) << 32 | u64::from(self.slot) << 16 | u64::from(self.door)
    }

    fn of_token(token: u64) -> Self {
        Self { reactor: (token >> 32) as u16, slot: (token >> 16) as u16, door: token as u16 }
    }
}

impl Sockets {
    fn run(&mut self) {
        let mut ready = [EpollEvent::empty(); 64];
        loop {
            let count = match self.epoll.wait(&mut ready, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(nix::Error::EINTR) => continue,
                Err(error) => panic!("epoll_wait failed: {error}"),
            };
            for event in &ready[..count] {
                match event.data() {
                    TOKEN_COMMANDS => self.commands(),
                    TOKEN_EVENTS => self.reactor_events(),
                    token if token & TOKEN_TAKEN != 0 => {
                        let socket = self.sockets.get_mut(&Place::of_token(token));
                        socket.into_iter().for_each(Socket::note_taken);
                    }
                    token => self.readable(Place::of_token(token)),
                }
            }
            if self.stopping.is_some() && self.sockets.is_empty() && self.leaving.is_empty() {
                return self.finish_stop();
            }
        }
    }

    fn finish_stop(&mut self) {
        for reactor in &self.reactors {
            reactor.send(Message::Stop);
        }
        if let Some(reply) = self.stopping.take() {
            let _ = reply.send(());
        }
    }

    fn commands(&mut self) {
        self.commands.acknowledge();
        while let Some(command) = self.commands.take() {
            match command {
                Command::Add { number, export, reply } => {
                    let _ = reply.send(self.add(number, *export));
                }
                Command::Join { id, number, door, reply } => {
                    let _ = reply.send(self.join(id, number, *door));
                }
                Command::Remove { id, reply } => self.remove(id, reply),
                Command::SetCapacity { id, sectors, reply } => {
                    let _ = reply.send(self.set_capacity(id, sectors));
                }
                Command::Status { id, reply } => {
                    let _ = reply.send(self.find(id).map(|socket| socket.status()));
                }
                Command::Ping { reply } => {
                    let _ = reply.send(());
                }
                Command::Stop { reply } => {
                    self.stopping = Some(reply);
                    let places: Vec<Place> = self.sockets.keys().copied().collect();
                    for place in places {
                        self.close(place, "vflashd stops");
                    }
                }
            }
        }
    }

    fn find(&mut self, id: ExportId) -> Result<&mut Socket> {
        self.sockets
            .get_mut(&id.into())
            .filter(|socket| socket.id == id)
            .ok_or_else(|| Error::new(ErrorKind::Gone, "no such export"))
    }

    fn remove(&mut self, id: ExportId, reply: Sender<Result<()>>) {
        if let Some(leaving) = self.leaving.iter_mut().find(|leaving| leaving.is_of(id)) {
            leaving.waiting.push(reply);
            return;
        }
        match self.find(id) {
            Ok(socket) => {
                socket.removing = Some(reply);
                self.close(id.into(), "the volume is being removed");
            }
            Err(error) => {
                let _ = reply.send(Err(error));
            }
        }
    }

    /// Refuses one socket more than there may be.
    fn check_room(&self, name: &str) -> Result<()> {
        let text = if self.stopping.is_some() {
            return Err(Error::new(ErrorKind::Gone, "vflashd is stopping"));
        } else if self.sockets.len() >= EXPORTS_MAX {
            format!("{name}: this daemon serves {EXPORTS_MAX} volumes at most")
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorKind::Full, text))
    }

    /// A free slot of the reactor that has the fewest exports.
    fn free_slot(&self) -> Option<(u16, u16)> {
        let taken = |reactor| {
            let served = self.sockets.keys().map(|place| (place.reactor, place.slot));
            let leaving = self.leaving.iter().map(|leaving| (leaving.id.reactor, leaving.id.slot));
            let places = served.chain(leaving).filter(move |(on, _)| *on == reactor);
            places.map(|(_, slot)| slot).collect::<std::collections::BTreeSet<u16>>()
        };
        let reactors = 0..self.reactors.len() as u16;
        let (reactor, taken) = reactors
            .map(|reactor| (reactor, taken(reactor)))
            .min_by_key(|(_, taken)| taken.len())?;
        let free = (0..SLOTS_MAX as u16).find(|slot| !taken.contains(slot))?;
        Some((reactor, free))
    }

    fn add(&mut self, number: u16, export: Export) -> Result<ExportId> {
        let Export { door, volume, disks } = export;
        self.check_room(&door.name)?;
        let (reactor, slot) = self.free_slot().ok_or_else(|| {
            Error::new(ErrorKind::Full, format!("{}: every reactor is full", door.name))
        })?;
        self.generation = self.generation.wrapping_add(1);
        let generation = self.generation;
        let id = ExportId { reactor, slot, generation, door: number };
        let (socket, door) = Socket::bind(id, door, &self.pinner)?;
        let (reply, added) = channel();
        let export = Box::new(AddExport { name: door.name.clone(), volume, disks, door });
        let add = Message::Add { slot, generation, export, reply };
        self.reactors[usize::from(reactor)].send(add);
        added.recv().map_err(|_| Error::new(ErrorKind::Gone, "a reactor has ended"))??;
        socket.listen(&self.epoll)?;
        self.sockets.insert(id.into(), socket);
        Ok(id)
    }

    fn join(&mut self, id: ExportId, number: u16, door: NewDoor) -> Result<ExportId> {
        self.check_room(&door.name)?;
        let _there = self.find(id)?;
        let id = ExportId { door: number, ..id };
        if usize::from(number) >= DOORS_MAX || self.sockets.contains_key(&id.into()) {
            let text = format!("{}: there is no door {number} to be had", door.name);
            return Err(Error::new(ErrorKind::Busy, text));
        }
        let (socket, door) = Socket::bind(id, door, &self.pinner)?;
        let add = Message::AddDoor { slot: id.slot, door: Box::new(door) };
        self.reactors[usize::from(id.reactor)].send(add);
        socket.listen(&self.epoll)?;
        self.sockets.insert(id.into(), socket);
        Ok(id)
    }

    /// All doors of the export behind `id`.
    fn doors_mut(&mut self, id: ExportId) -> impl Iterator<Item = &mut Socket> {
        let of_export = move |socket: &&mut Socket| {
            (socket.id.reactor, socket.id.slot) == (id.reactor, id.slot)
        };
        self.sockets.values_mut().filter(of_export)
    }

    fn set_capacity(&mut self, id: ExportId, sectors: u64) -> Result<()> {
        let _there = self.find(id)?;
        self.reactors[usize::from(id.reactor)]
            .send(Message::SetCapacity { slot: id.slot, sectors });
        for socket in self.doors_mut(id) {
            socket.device.capacity_sectors = sectors;
            if let Some(connection) = &socket.connection {
                connection.session().device.capacity_sectors = sectors;
                connection.announce_config_change(&socket.name);
            }
        }
        Ok(())
    }

    fn reactor_events(&mut self) {
        self.events.acknowledge();
        while let Some(event) = self.events.take() {
            match event {
                Event::QueueStopped { reactor, slot, queue, base } => {
                    let place = Place { reactor, slot, door: queue.door };
                    if let Some(socket) = self.sockets.get_mut(&place)
                        && let Some(connection) = &mut socket.connection
                    {
                        connection.session().stopped(queue.queue, base);
                        connection.stopping.retain(|stopping| *stopping != queue.queue);
                    }
                    self.progress(place);
                }
                Event::Removed { reactor, slot } => self.removed(reactor, slot),
                // By now the slot may be another's. A fence is told to all that share the volume.
                Event::Fenced { export, reason } => {
                    for socket in self.sockets.values() {
                        if (ExportId { door: export.door, ..socket.id }) == export {
                            (socket.events)(ExportEvent::Fenced { reason: reason.clone() });
                        }
                    }
                }
                Event::NotPinned { export, reason } => {
                    let socket = self.sockets.get_mut(&export.into());
                    if let Some(socket) = socket.filter(|socket| socket.id == export) {
                        socket.note_not_pinned(reason);
                    }
                }
                Event::Faulted { export } => {
                    let ExportId { reactor, slot, door, .. } = export;
                    let place = Place { reactor, slot, door };
                    if self.sockets.get(&place).is_some_and(|socket| socket.id == export) {
                        self.close(place, "the front end cut guest memory short");
                    }
                }
            }
        }
    }

    fn readable(&mut self, place: Place) {
        let Some(socket) = self.sockets.get_mut(&place) else { return };
        if socket.connection.is_none()
            && let Err(error) = socket.accept(&self.epoll, &self.reactors)
        {
            log::warn!("{}: a front end could not connect: {error}", socket.name);
            return;
        }
        self.progress(place);
    }

    /// Handles the messages that can be handled now.
    fn progress(&mut self, place: Place) {
        loop {
            let Some(socket) = self.sockets.get_mut(&place) else { return };
            let Some(connection) = &mut socket.connection else { return };
            if !connection.stopping.is_empty() {
                return;
            }
            if connection.closing {
                return self.closed(place);
            }
            let (request, touches) = match peek(&connection.stream) {
                Peeked::Partial => return,
                Peeked::Closed => return self.close(place, ""),
                Peeked::Message { request, touches } => (request, touches),
            };
            let unwelcome = peek_unwelcome(&connection.stream);

            if !unwelcome.is_empty() {
                // One that has ended closes nothing: they stay open then.
                let _ = self.closer.send(unwelcome);
                let reason = format!("message {request} {UNWELCOME}");
                return self.close(place, &reason);
            }
            if connection.stop_touched(touches, request) {
                return;
            }
            if request == request::SET_BACKEND_REQ_FD {
                connection.channel = peek_descriptor(&connection.stream);
            }
            let handled = connection.handler.handle_request();
            let started = connection.session().start_ready();
            if let Err(error) = handled {
                return self.close(place, &format!("message {request}: {error}"));
            }
            if let Err(error) = started {
                return self.close(place, &error.to_string());
            }
            socket.note_write_cache();
            socket.note_memory();
        }
    }

    /// Ends a connection once its rings are at rest. `reason` is empty if the peer simply left.
    fn close(&mut self, place: Place, reason: &str) {
        let Some(socket) = self.sockets.get_mut(&place) else { return };
        if let Some(connection) = &mut socket.connection
            && !std::mem::replace(&mut connection.closing, true)
        {
            if !reason.is_empty() {
                log::warn!("{}: the front end is disconnected: {reason}", socket.name);
                (socket.events)(ExportEvent::Refused { reason: reason.into() });
            }
            connection.stop_touched(Touches::All, 0);
            connection.let_go();
        }
        if socket.connection.as_ref().is_none_or(|connection| connection.stopping.is_empty()) {
            self.closed(place);
        }
    }

    /// Nothing of the connection is under way any more.
    fn closed(&mut self, place: Place) {
        let stopping = self.stopping.is_some();
        let Some(socket) = self.sockets.get_mut(&place) else { return };
        if let Some(connection) = socket.connection.take() {
            connection.session().end();
            let _ = self.epoll.delete(&connection.stream);
            drop(connection);
            (socket.events)(ExportEvent::Detached);
        }
        if stopping || socket.removing.is_some() {
            let _ = self.epoll.delete(&socket.listener);
            self.dispose(place);
        } else if let Err(error) = socket.listen_again(&self.epoll) {
            log::error!("{}: cannot listen again: {error}", socket.name);
        }
    }

    /// Closes a door at rest; with the last one the export goes.
    fn dispose(&mut self, place: Place) {
        let Some(socket) = self.sockets.remove(&place) else { return };
        let mailbox = self.reactors[usize::from(place.reactor)].clone();
        let Socket { id, path, removing, .. } = socket;
        let path = removing.is_some().then_some(path);
        let leaving = Leaving { id, path, waiting: removing.into_iter().collect() };
        let Place { slot, door, .. } = place;
        if self.doors_mut(id).next().is_some() {
            mailbox.send(Message::RemoveDoor { slot, door });
            leaving.end();
        } else {
            // Housekeeping of the volume may be under way, on a drive that does not answer:
            // nobody else waits for that.
            mailbox.send(Message::Remove { slot });
            self.leaving.push(leaving);
        }
    }

    /// An export has gone from its slot.
    fn removed(&mut self, reactor: u16, slot: u16) {
        let gone = |leaving: &mut Leaving| (leaving.id.reactor, leaving.id.slot) == (reactor, slot);
        self.leaving.extract_if(.., gone).for_each(Leaving::end);
    }
}

impl Leaving {
    /// Whether it is the export behind that door.
    fn is_of(&self, id: ExportId) -> bool {
        ExportId { door: id.door, ..self.id } == id
    }

    fn end(self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
        for reply in self.waiting {
            let _ = reply.send(Ok(()));
        }
    }
}

impl Socket {
    /// Makes the listening socket of a door; the rest is for the reactor.
    fn bind(id: ExportId, door: NewDoor, pinner: &PinJobs) -> Result<(Self, AddDoor)> {
        let NewDoor { name, socket: path, access, device, write_cache, events, .. } = door;
        let pinner = door.pin_memory.then(|| pinner.clone());
        let listener = bind_socket(&path, access).map_err(|error| error.context(&name))?;
        let (limits, metrics) = (door.limits, door.metrics);
        let add = AddDoor {
            number: id.door,
            name: name.clone(),
            device: device.clone(),
            limits,
            metrics,
        };
        let (connection, removing) = (None, None);
        let socket = Self {
            id,
            name,
            path,
            listener,
            device,
            write_cache,
            pinner,
            events,
            connection,
            removing,
        };
        Ok((socket, add))
    }

    fn status(&self) -> ExportStatus {
        match &self.connection {
            None => ExportStatus::default(),
            Some(connection) => {
                let session = connection.session();
                let (memory_bytes, pinned_bytes) = session.memory_bytes();
                ExportStatus {
                    connected: true,
                    peer_pid: connection.peer_pid,
                    queues_running: session.queues_running(),
                    memory_bytes,
                    pinned_bytes,
                }
            }
        }
    }

    /// Tells the owner, once for each connection.
    fn note_not_pinned(&mut self, reason: String) {
        let Some(connection) = &mut self.connection else { return };
        if !std::mem::replace(&mut connection.not_pinned, true) {
            log::warn!("{}: {reason}", self.name);
            (self.events)(ExportEvent::NotPinned { reason });
        }
    }

    fn listen(&self, epoll: &Epoll) -> Result<()> {
        let added = epoll.add(&self.listener, self.watched(false));
        added.map_err(|error| Error::io("cannot watch a socket", error.into()))
    }

    /// The last front end has gone: the next one is taken.
    fn listen_again(&self, epoll: &Epoll) -> Result<()> {
        let changed = epoll.modify(&self.listener, &mut self.watched(false));
        changed.map_err(|error| Error::io("cannot watch a socket", error.into()))
    }

    /// How the listener is watched. While a front end is there, each other one that comes is told
    /// of once, since nobody takes it.
    fn watched(&self, taken: bool) -> EpollEvent {
        let token = Place::from(self.id).token();
        match taken {
            true => EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, token | TOKEN_TAKEN),
            false => EpollEvent::new(EpollFlags::EPOLLIN, token),
        }
    }

    /// Somebody has come to a socket that another has.
    fn note_taken(&mut self) {
        let Some(connection) = &mut self.connection else { return };
        if !std::mem::replace(&mut connection.taken, true) {
            (self.events)(ExportEvent::Taken { peer_pid: connection.peer_pid });
        }
    }

    fn accept(&mut self, epoll: &Epoll, reactors: &[Mailbox<Message>]) -> Result<()> {
        let os = |error| Error::io("accepting", error);
        let Some(stream) = accept(&self.listener).map_err(os)? else { return Ok(()) };
        let credentials = getsockopt(&stream, sockopt::PeerCredentials).ok();
        let session = Session::new(
            (self.name.clone(), self.events.clone()),
            self.device.clone(),
            self.write_cache,
            (self.id, reactors[usize::from(self.id.reactor)].clone()),
            self.pinner.clone(),
        );
        let session = Arc::new(Mutex::new(session));
        let handler =
            BackendReqHandler::from_stream(stream.try_clone().map_err(os)?, session.clone());
        // Edge-triggered: a partial message must not keep this thread awake.
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        epoll
            .add(&stream, EpollEvent::new(flags, Place::from(self.id).token()))
            .and_then(|()| epoll.modify(&self.listener, &mut self.watched(true)))
            .map_err(|error| os(error.into()))?;
        let peer_pid = credentials.map(|credentials| credentials.pid());
        self.connection = Some(Connection {
            handler,
            session,
            stream,
            channel: None,
            stopping: Vec::new(),
            closing: false,
            peer_pid,
            misses_memory: false,
            taken: false,
            not_pinned: false,
        });
        (self.events)(ExportEvent::Attached { peer_pid });
        Ok(())
    }

    /// Keeps for the next connection whether the guest's write cache is on.
    fn note_write_cache(&mut self) {
        let Some(connection) = &self.connection else { return };
        self.write_cache = connection.session().write_cache;
    }

    /// Tells control when a guest waits for ever, for want of shared memory.
    fn note_memory(&mut self) {
        let Some(connection) = &mut self.connection else { return };
        let missing = connection.session().misses_memory();
        if std::mem::replace(&mut connection.misses_memory, missing) != missing {
            (self.events)(ExportEvent::MissesMemory { missing });
        }
    }
}

impl Connection {
    /// Has the running rings among those that message `request` touches stopped; true if there are
    /// any to wait for.
    fn stop_touched(&mut self, touches: Touches, request: u32) -> bool {
        let session = self.session.lock().expect("see Connection::session");
        let running: Vec<u16> = session
            .running()
            .filter(|index| match touches {
                Touches::None => false,
                Touches::One(one) => one == *index,
                Touches::All => true,
            })
            .filter(|index| !self.stopping.contains(index))
            .collect();
        for queue in running {
            session.stop(queue, request);
            self.stopping.push(queue);
        }
        !self.stopping.is_empty()
    }

    /// The front end is gone: nobody waits for requests that wait for something themselves.
    fn let_go(&self) {
        let session = self.session();
        self.stopping.iter().for_each(|queue| session.let_go(*queue));
    }

    /// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: the front end reads the config space again.
    fn announce_config_change(&self, name: &str) {
        let Some(channel) = &self.channel else {
            log::info!("{name}: the front end has no back-end channel; it sees the size later");
            return;
        };
        let message: Vec<u8> = [2u32, 1, 0].into_iter().flat_map(u32::to_le_bytes).collect();
        let flags =
            nix::sys::socket::MsgFlags::MSG_DONTWAIT | nix::sys::socket::MsgFlags::MSG_NOSIGNAL;
        if let Err(error) = nix::sys::socket::send(channel.as_raw_fd(), &message, flags) {
            log::warn!("{name}: the front end could not be told the new size: {error}");
        }
    }
}

/// The next one who waits at a socket; `None`: nobody does. An event of a connection that has ended
/// since may be taken for one of its listener.
fn accept(listener: &UnixListener) -> std::io::Result<Option<UnixStream>> {
    match listener.accept() {
        Ok((stream, _)) => Ok(Some(stream)),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes the listening socket; a stale one of that name is replaced. Its mode is never wider than
/// asked for, not even for a moment.
fn bind_socket(path: &Path, access: SocketAccess) -> Result<UnixListener> {
    let place = |error: std::io::Error| Error::io(format!("socket {}", path.display()), error);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(place)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(place(error)),
        _ => {}
    }
    let os = |error: nix::Error| place(error.into());
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(os)?;
    nix::sys::stat::fchmod(fd.as_fd(), Mode::from_bits_truncate(0o600)).map_err(os)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path).map_err(os)?).map_err(os)?;
    std::os::unix::fs::chown(path, access.uid, access.gid).map_err(place)?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(access.mode);
    std::fs::set_permissions(path, mode).map_err(place)?;
    listen(&fd, Backlog::new(64).expect("64 is a legal backlog")).map_err(os)?;
    Ok(UnixListener::from(fd))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_at_which_nobody_waits_is_no_failure() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm/disk.sock");
        let listener = bind_socket(&path, SocketAccess::default()).unwrap();
        assert!(accept(&listener).unwrap().is_none());
        let _peer = UnixStream::connect(&path).unwrap();
        assert!(accept(&listener).unwrap().is_some());
        assert!(accept(&listener).unwrap().is_none());
    }
}
