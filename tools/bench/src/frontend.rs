//! One connection to a back end: what a VMM says to it, in the order that QEMU says it.

use crate::Result;
use crate::memory::GuestMemory;
use crate::queue::Queue;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend as Messages, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

pub const FLUSH: u64 = 1 << 9;
pub const CONFIG_WCE: u64 = 1 << 11;
pub const MULTI_QUEUE: u64 = 1 << 12;
pub const DISCARD: u64 = 1 << 13;
pub const WRITE_ZEROES: u64 = 1 << 14;
pub const INDIRECT: u64 = 1 << 28;
pub const EVENT_INDEX: u64 = 1 << 29;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;

/// What the driver can do; less is negotiated if the back end offers less.
pub const DRIVER_FEATURES: u64 = EVENT_INDEX
    | PROTOCOL_FEATURES
    | VERSION_1
    | FLUSH
    | CONFIG_WCE
    | MULTI_QUEUE
    | DISCARD
    | WRITE_ZEROES
    | INDIRECT;

const DRIVER_PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::LOG_SHMFD);

/// Bytes of the config space that are asked for.
const CONFIG_BYTES: u32 = 60;

/// The header of a message on the back-end channel: request, flags, size.
const CHANNEL_HEADER_BYTES: usize = 12;
const CHANNEL_CONFIG_CHANGE: u32 = 2;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

pub struct Frontend {
    /// For messages that this type does not send.
    pub messages: Messages,
    pub features: u64,
    pub protocol: VhostUserProtocolFeatures,
    channel: Option<UnixStream>,
}

impl Frontend {
    /// Connects, trying for `timeout`, and negotiates of `wanted` what is offered.
    pub fn open(socket: &Path, queues: u16, wanted: u64, timeout: Duration) -> Result<Self> {
        let stream = connect(socket, timeout)?;
        let mut messages = Messages::from_stream(stream, u64::from(queues));
        messages.set_owner()?;
        let features = messages.get_features()? & wanted;
        let protocol = messages.get_protocol_features()? & DRIVER_PROTOCOL;
        messages.set_protocol_features(protocol)?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            messages.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let mut frontend = Self { messages, features, protocol, channel: None };
        frontend.messages.set_features(features)?;
        if protocol.contains(VhostUserProtocolFeatures::MQ) {
            let offered = frontend.messages.get_queue_num()?;
            if offered < u64::from(queues) {
                return Err(format!("the back end offers only {offered} queues").into());
            }
        }
        if protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            let (ours, theirs) = UnixStream::pair()?;
            frontend.messages.set_backend_request_fd(&theirs.as_raw_fd())?;
            ours.set_nonblocking(true)?;
            frontend.channel = Some(ours);
        }
        Ok(frontend)
    }

    /// The capacity in sectors, as the config space says now.
    pub fn capacity_sectors(&mut self) -> Result<u64> {
        let flags = VhostUserConfigFlags::WRITABLE;
        let zeros = [0; CONFIG_BYTES as usize];
        let (_, config) = self.messages.get_config(0, CONFIG_BYTES, flags, &zeros)?;
        Ok(u64::from_le_bytes(*config.first_chunk().ok_or("a config space of under 8 bytes")?))
    }

    /// A new in-flight area, or `None` if the back end has none.
    pub fn new_inflight(
        &mut self,
        queues: u16,
        size: u16,
    ) -> Result<Option<(VhostUserInflight, File)>> {
        if !self.protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            return Ok(None);
        }
        let wanted = VhostUserInflight {
            mmap_size: 0,
            mmap_offset: 0,
            num_queues: queues,
            queue_size: size,
        };
        Ok(Some(self.messages.get_inflight_fd(&wanted)?))
    }

    pub fn set_inflight(&mut self, (area, file): &(VhostUserInflight, File)) -> Result<()> {
        Ok(self.messages.set_inflight_fd(area, file.as_raw_fd())?)
    }

    /// Shares the memory: as one table, or, with `split`, as two slots that meet there.
    pub fn set_memory(&mut self, memory: &GuestMemory, split: Option<usize>) -> Result<()> {
        let region = |start: usize, end: usize| VhostUserMemoryRegionInfo {
            guest_phys_addr: start as u64,
            memory_size: (end - start) as u64,
            userspace_addr: memory.user_address() + start as u64,
            mmap_offset: start as u64,
            mmap_handle: memory.raw_file(),
        };
        let Some(split) = split else {
            self.messages.set_mem_table(&[region(0, memory.length())])?;
            return Ok(());
        };
        if !self.protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            return Err("the back end has no memory slots (CONFIGURE_MEM_SLOTS)".into());
        }
        let slots = self.messages.get_max_mem_slots()?;
        if slots < 2 {
            return Err(format!("the back end has {slots} memory slots and 2 are needed").into());
        }
        for region in [region(0, split), region(split, memory.length())] {
            self.messages.add_mem_region(&region)?;
        }
        Ok(())
    }

    /// Starts a queue at `first`, an index of its available ring, and kicks it.
    pub fn start_queue(
        &self,
        index: usize,
        queue: &Queue,
        memory: &GuestMemory,
        first: u16,
    ) -> Result<()> {
        let base = memory.user_address();
        self.messages.set_vring_num(index, queue.size)?;
        self.messages.set_vring_addr(
            index,
            &VringConfigData {
                queue_max_size: queue.size,
                queue_size: queue.size,
                flags: 0,
                desc_table_addr: base + queue.layout.descriptors as u64,
                used_ring_addr: base + queue.layout.used as u64,
                avail_ring_addr: base + queue.layout.available as u64,
                log_addr: None,
            },
        )?;
        self.messages.set_vring_base(index, first)?;
        self.messages.set_vring_call(index, &event(&queue.call)?)?;
        self.messages.set_vring_kick(index, &event(&queue.kick)?)?;
        if self.features & PROTOCOL_FEATURES != 0 {
            let mut messages = self.messages.clone();
            messages.set_vring_enable(index, true)?;
        }
        queue.kick();
        Ok(())
    }

    /// Takes what has come on the back-end channel; true if the config space changed.
    pub fn config_changed(&mut self) -> Result<bool> {
        let Some(channel) = &mut self.channel else { return Ok(false) };
        let mut changed = false;
        loop {
            let mut header = [0; CHANNEL_HEADER_BYTES];
            match channel.read(&mut header) {
                Ok(CHANNEL_HEADER_BYTES) => {}
                Ok(0) => return Ok(changed),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(changed),
                Ok(short) => return Err(format!("{short} bytes on the back-end channel").into()),
                Err(error) => return Err(error.into()),
            }
            let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
            let (request, flags, size) = (word(0), word(4), word(8));
            if (request, size) != (CHANNEL_CONFIG_CHANGE, 0) {
                let text = format!("message {request} of {size} bytes on the back-end channel");
                return Err(text.into());
            }
            changed = true;
            if flags & FLAG_NEED_REPLY != 0 {
                let reply = [request, 1 | FLAG_REPLY, 8, 0, 0].map(u32::to_le_bytes).concat();
                channel.write_all(&reply)?;
            }
        }
    }
}

/// Crate `vhost` wants its own kind of eventfd.
fn event(event: &nix::sys::eventfd::EventFd) -> Result<vmm_sys_util::eventfd::EventFd> {
    use std::os::fd::{AsFd, FromRawFd, IntoRawFd};
    let fd = event.as_fd().try_clone_to_owned()?.into_raw_fd();
    // SAFETY: a descriptor of our own that nobody else holds, and an eventfd.
    Ok(unsafe { vmm_sys_util::eventfd::EventFd::from_raw_fd(fd) })
}

fn connect(socket: &Path, timeout: Duration) -> Result<UnixStream> {
    let deadline = Instant::now() + timeout;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > deadline => {
                let text = format!("{}: {error} (tried for {timeout:?})", socket.display());
                return Err(text.into());
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}
