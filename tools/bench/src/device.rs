//! A virtual disk as its VMM and its guest hold it: memory and queues, which stay, and the
//! connection, which may be lost and made again.

use crate::Result;
use crate::frontend::{DRIVER_FEATURES, EVENT_INDEX, Frontend, INDIRECT};
use crate::memory::GuestMemory;
use crate::queue::{Layout, Queue, Shape, Waiting, sleep};
use crate::report::{ViolationKind, violation};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserInflight;

/// What a device is opened with.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    pub socket: PathBuf,
    pub queues: u16,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Bytes of data per request at most.
    pub data_bytes: usize,
    pub waiting: Waiting,
    /// How long a connection is tried for.
    pub connect_timeout: Duration,
    /// Use the event index if it is offered.
    pub event_index: bool,
    /// Use indirect descriptors if they are offered.
    pub indirect: bool,
    /// Use the in-flight area if it is offered. Without it a killed back end loses requests.
    pub inflight: bool,
    /// Tell a back end the available index as a ring's base, as cloud-hypervisor does, and not the
    /// used one, as QEMU does: only an in-flight area knows then what was taken.
    pub base_is_available: bool,
    /// Share memory by ADD_MEM_REG, in two slots, instead of SET_MEM_TABLE.
    pub memory_slots: bool,
    /// Make the memory of reserved 2 MiB pages.
    pub hugetlb: bool,
}

impl DeviceOptions {
    /// One queue of depth 32 and blocks of 4 KiB, sleeping, with all that is offered.
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.into(),
            queues: 1,
            depth: 32,
            data_bytes: 4096,
            waiting: Waiting::Sleep,
            connect_timeout: Duration::from_secs(5),
            event_index: true,
            indirect: false,
            inflight: true,
            base_is_available: false,
            memory_slots: false,
            hugetlb: false,
        }
    }

    fn features(&self) -> u64 {
        let mut features = DRIVER_FEATURES;
        for (wanted, bit) in [(self.event_index, EVENT_INDEX), (self.indirect, INDIRECT)] {
            if !wanted {
                features &= !bit;
            }
        }
        features
    }
}

pub struct Device {
    options: DeviceOptions,
    pub memory: GuestMemory,
    pub queues: Vec<Queue>,
    pub capacity_sectors: u64,
    /// As negotiated with the first back end; the next ones must offer the same.
    features: u64,
    /// Where the memory's second slot begins.
    split: Option<usize>,
    connection: Option<Frontend>,
    inflight: Option<(VhostUserInflight, File)>,
}

impl Device {
    /// Connects and starts all queues.
    pub fn open(options: DeviceOptions) -> Result<Self> {
        let connection = connect(&options, options.features())?;
        Self::on(options, connection)
    }

    /// After RESET_DEVICE: sets everything up anew on the same connection, as for a guest that
    /// boots again: rings of another depth in other memory, and no in-flight area.
    pub fn set_up_anew(self, depth: u16) -> Result<Self> {
        let connection = self.connection.ok_or("not connected")?;
        Self::on(DeviceOptions { depth, inflight: false, ..self.options }, connection)
    }

    fn on(options: DeviceOptions, connection: Frontend) -> Result<Self> {
        let features = connection.features;
        let shape = Shape {
            depth: options.depth,
            data_bytes: options.data_bytes,
            indirect: features & INDIRECT != 0,
        };
        let mut layouts: Vec<Layout> = Vec::new();
        for _ in 0..options.queues {
            let start = layouts.last().map_or(0, |layout| layout.end);
            layouts.push(Layout::new(start, shape)?);
        }
        let (Some(first), Some(last)) = (layouts.first(), layouts.last()) else {
            return Err("a device needs at least one queue".into());
        };
        let split = options.memory_slots.then_some(first.data);
        let memory = GuestMemory::new(last.end, options.hugetlb)?;
        let event_index = features & EVENT_INDEX != 0;
        let queues = layouts
            .into_iter()
            .map(|layout| Queue::new(&memory, layout, event_index, options.waiting))
            .collect::<Result<Vec<_>>>()?;
        let mut device = Self {
            options,
            memory,
            queues,
            capacity_sectors: 0,
            features,
            split,
            connection: None,
            inflight: None,
        };
        device.start(connection)?;
        Ok(device)
    }

    /// The negotiated virtio features.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// How completions are waited for.
    pub fn waits(&self) -> Waiting {
        self.options.waiting
    }

    /// The back end keeps track of what is in flight, so it may be killed.
    pub fn tracks_inflight(&self) -> bool {
        self.inflight.is_some()
    }

    /// Tells a back end everything, as QEMU does after each connect.
    fn start(&mut self, mut connection: Frontend) -> Result<()> {
        self.capacity_sectors = connection.capacity_sectors()?;
        if self.inflight.is_none() && self.options.inflight {
            let size = self.queues.iter().map(|queue| queue.size).max().unwrap_or(0);
            self.inflight = connection.new_inflight(self.options.queues, size)?;
        }
        if let Some(inflight) = &self.inflight {
            connection.set_inflight(inflight)?;
        }
        connection.set_memory(&self.memory, self.split)?;
        self.connection = Some(connection);
        self.start_queues()
    }

    fn start_queues(&self) -> Result<()> {
        let connection = self.connection.as_ref().ok_or("not connected")?;
        for (index, queue) in self.queues.iter().enumerate() {
            let first = match self.options.base_is_available {
                true => queue.available_index(),
                false => queue.used_index(&self.memory),
            };
            connection.start_queue(index, queue, &self.memory, first)?;
        }
        Ok(())
    }

    /// The back end died: waits for the next one and goes on where it stopped.
    pub fn reconnect(&mut self) -> Result<()> {
        self.connection = None;
        let connection = connect(&self.options, self.features)?;
        if connection.features != self.features {
            let (before, now) = (self.features, connection.features);
            return Err(format!("features {before:#x} before, {now:#x} now").into());
        }
        self.start(connection)
    }

    /// Stops all queues with GET_VRING_BASE and checks that everything was taken and completed
    /// once. Nothing may be in flight.
    pub fn stop(&mut self) -> Result<()> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        for (index, queue) in self.queues.iter().enumerate() {
            let base = connection.messages.get_vring_base(index)?;
            let expected = queue.available_index();
            if base != u32::from(expected) {
                return Err(format!("queue {index} stopped at {base}, not at {expected}").into());
            }
            let used = queue.used_index(&self.memory);
            if used != expected {
                let text = format!("queue {index} used {used} of {expected} entries: doubled");
                return violation(ViolationKind::Doubled, text);
            }
        }
        self.connection = None;
        Ok(())
    }

    /// Stops all queues, as a VMM does that pauses its machine: requests may be left in flight.
    pub fn pause(&mut self) -> Result<()> {
        for index in 0..self.queues.len() {
            self.connected()?.messages.get_vring_base(index)?;
        }
        Ok(())
    }

    /// Starts them again where they stopped.
    pub fn resume(&mut self) -> Result<()> {
        self.start_queues()
    }

    /// Moves the guest to other memory with the same content, and has the back end use that.
    pub fn replace_memory(&mut self) -> Result<()> {
        self.pause()?;
        let memory = GuestMemory::new(self.memory.length(), self.options.hugetlb)?;
        let mut bytes = vec![0; self.memory.length()];
        self.memory.read(0, &mut bytes);
        memory.write(0, &bytes);
        self.memory = memory;
        let connection = self.connection.as_mut().ok_or("not connected")?;
        connection.set_memory(&self.memory, self.split)?;
        self.resume()
    }

    /// Waits until `count` requests of the first queue have ended, at most `patience` for each one
    /// after the other; their status bytes, as they came.
    pub fn await_ended(&mut self, count: usize, patience: Duration) -> Result<Vec<u8>> {
        let mut completed = Vec::new();
        while completed.len() < count {
            if !self.queues[0].arm(&self.memory) && !sleep(&self.queues, patience)? {
                let ended = completed.len();
                return Err(format!(
                    "{ended} of {count} requests ended, then {patience:?} no other"
                )
                .into());
            }
            self.queues[0].completed(&self.memory, &mut completed)?;
        }
        Ok(completed.iter().map(|one| one.status).collect())
    }

    /// The front end's end of the connection, for messages that this type does not send.
    pub fn frontend(&mut self) -> Result<&mut vhost::vhost_user::Frontend> {
        Ok(&mut self.connected()?.messages)
    }

    fn connected(&mut self) -> Result<&mut Frontend> {
        Ok(self.connection.as_mut().ok_or("not connected")?)
    }

    /// Negotiates the features again, with `more` of those offered and without `less`.
    pub fn set_features(&mut self, more: u64, less: u64) -> Result<()> {
        self.features = (self.features | more) & !less;
        let features = self.features;
        let connection = self.connected()?;
        connection.features = features;
        Ok(connection.messages.set_features(features)?)
    }

    /// The capacity as the config space says now.
    pub fn read_capacity(&mut self) -> Result<u64> {
        self.connected()?.capacity_sectors()
    }

    /// Whether the back end has announced a change of the config space since the last call.
    pub fn config_changed(&mut self) -> Result<bool> {
        self.connected()?.config_changed()
    }
}

fn connect(options: &DeviceOptions, wanted: u64) -> Result<Frontend> {
    Frontend::open(&options.socket, options.queues, wanted, options.connect_timeout)
}
