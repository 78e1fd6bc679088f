//! One front end's session: what it negotiated, and the rings it set up.
//!
//! The session is the handler of crate `vhost`'s messages and runs on the socket thread. It never
//! waits: a message that changes a running ring is only handled after the socket thread had that
//! ring stopped (`sockets.rs`), so here every ring that is touched stands still.

use super::dirty::DirtyLog;
use super::door::QueueId;
use super::inflight::{InflightArea, queue_bytes};
use super::mailbox::Mailbox;
use super::memory::{MemoryTable, Region, RegionInfo};
use super::peek::request;
use super::pinner::Job;
use super::queue::QueueSetup;
use super::reactor::{ExportId, Message};
use super::ring::RingAddresses;
use super::server::{ExportEvent, ExportEvents};
use crate::base::limits::{MEMORY_REGIONS_MAX, QUEUE_SIZE_MAX};
use crate::base::planted::{Bug, planted};
use crate::base::{Error, ErrorKind, Result};
use crate::virtio::config::{CONFIG_SPACE_BYTES, Device, WRITEBACK_OFFSET};
use crate::virtio::features;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error as Refusal, GpuBackend, Result as Reply};

/// Dragonball counts the offset of the config space from here.
const CONFIG_OFFSET_OTHER: u32 = 0x100;

/// The protocol features that are offered, besides REPLY_ACK, which crate `vhost` adds.
pub const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::LOG_SHMFD)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// A ring as the front end describes it.
#[derive(Default)]
pub struct Vring {
    size: u16,
    addresses: Option<RingAddresses>,
    base: u16,
    kick: Option<File>,
    call: Option<File>,
    error: Option<File>,
    enabled: bool,
    /// The reactor has it.
    pub running: bool,
}

/// What a front end has done about its guest's memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sharing {
    NotYet,
    /// It set a ring up without any: all memory comes before that.
    Missing,
    Done,
}

/// See the head of the file.
pub struct Session {
    name: String,
    pub device: Device,
    /// The `writeback` byte of the config space.
    pub write_cache: bool,
    /// Its door, and the reactor that it is on.
    export: ExportId,
    reactor: Mailbox<Message>,
    /// Pins guest memory, if it is to be pinned.
    pinner: Option<Sender<Job>>,
    events: ExportEvents,
    features: u64,
    protocol_features: u64,
    memory: MemoryTable,
    sharing: Sharing,
    pub vrings: Vec<Vring>,
    inflight: Option<InflightArea>,
    log: Option<DirtyLog>,
}

/// Turns our error into a refusal that crate `vhost` reports to the front end.
fn refuse(error: Error) -> Refusal {
    log::warn!("vhost-user: {error}");
    Refusal::ReqHandlerError(std::io::Error::other(error))
}

/// The front end may hand over anything: only an eventfd can be rung and polled.
fn eventfd(file: File) -> Reply<File> {
    let name = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    if name.map_err(Refusal::ReqHandlerError)?.as_os_str() != "anon_inode:[eventfd]" {
        return Err(Refusal::InvalidParam);
    }
    Ok(file)
}

impl Session {
    /// Through the door `export`, which is on `reactor`. Guest memory is pinned if there is a
    /// `pinner`.
    pub fn new(
        (name, events): (String, ExportEvents),
        device: Device,
        write_cache: bool,
        (export, reactor): (ExportId, Mailbox<Message>),
        pinner: Option<Sender<Job>>,
    ) -> Self {
        let vrings = (0..device.queues).map(|_| Vring::default()).collect();
        Self {
            name,
            device,
            write_cache,
            export,
            reactor,
            pinner,
            events,
            features: 0,
            protocol_features: 0,
            memory: MemoryTable::default(),
            sharing: Sharing::NotYet,
            vrings,
            inflight: None,
            log: None,
        }
    }

    fn vring(&mut self, index: usize) -> Reply<&mut Vring> {
        self.vrings.get_mut(index).ok_or(Refusal::InvalidParam)
    }

    /// Asks the reactor to stop ring `index` for message `request`.
    pub fn stop(&self, index: u16, request: u32) {
        let (queue, leave) = (self.queue(index), self.may_leave(request));
        self.reactor.send(Message::StopQueue { slot: self.export.slot, queue, leave });
    }

    /// Whether requests that only wait may be left when a ring is stopped: if the in-flight area
    /// that knows them comes back with the ring. To another host, where a migration takes the ring,
    /// it comes with a front end that said so; and not if it is about to be replaced.
    fn may_leave(&self, request: u32) -> bool {
        let taken_along = VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT.bits();
        let stays = !self.is_logging() || self.protocol_features & taken_along != 0;
        let replaced = matches!(request, request::GET_INFLIGHT_FD | request::SET_INFLIGHT_FD);
        self.inflight.is_some() && stays && !replaced
    }

    fn is_logging(&self) -> bool {
        self.log.is_some() && self.features & features::LOG_ALL != 0
    }

    /// Tells the reactor that the front end of ring `index`, which is being stopped, has gone.
    pub fn let_go(&self, index: u16) {
        let queue = self.queue(index);
        self.reactor.send(Message::LetGo { slot: self.export.slot, queue });
    }

    fn queue(&self, index: u16) -> QueueId {
        QueueId { door: self.export.door, queue: index }
    }

    /// The rings that the reactor has, by number.
    pub fn running(&self) -> impl Iterator<Item = u16> + '_ {
        (0u16..).zip(&self.vrings).filter(|(_, vring)| vring.running).map(|(index, _)| index)
    }

    /// The reactor has stopped ring `index`; it would go on at `base`.
    pub fn stopped(&mut self, index: u16, base: u16) {
        if let Some(vring) = self.vrings.get_mut(usize::from(index)) {
            vring.running = false;
            vring.base = base;
        }
    }

    /// Starts every ring that is ready and stands still.
    pub fn start_ready(&mut self) -> Result<()> {
        for index in 0..self.vrings.len() {
            let vring = &self.vrings[index];
            let ready = vring.kick.is_some() && vring.size > 0 && self.is_enabled(vring);
            let Some(addresses) = vring.addresses.filter(|_| ready && !vring.running) else {
                continue;
            };
            match (self.memory.is_empty(), self.sharing) {
                (false, _) => self.start(index, addresses)?,
                (true, Sharing::NotYet) => self.sharing = Sharing::Missing,
                // Memory that is exchanged may be gone for a moment.
                (true, _) => {}
            }
        }
        Ok(())
    }

    /// The front end has set a ring up and shared no memory: its guest waits for ever.
    pub fn misses_memory(&self) -> bool {
        self.sharing == Sharing::Missing
    }

    /// Without protocol features there is no enable message: rings are born enabled.
    fn is_enabled(&self, vring: &Vring) -> bool {
        vring.enabled || self.features & features::PROTOCOL_FEATURES == 0
    }

    fn start(&mut self, index: usize, addresses: RingAddresses) -> Result<()> {
        let number = index as u16;
        let vring = &self.vrings[index];
        let clone = |file: &Option<File>| {
            file.as_ref()
                .map(File::try_clone)
                .transpose()
                .map_err(|error| Error::io("cannot keep an eventfd", error))
        };
        let inflight = match &self.inflight {
            Some(area) => Some(area.queue(number, vring.size).ok_or_else(|| {
                let text = format!("queue {index}: the in-flight area does not cover it");
                Error::new(ErrorKind::Invalid, text)
            })?),
            None => None,
        };
        let setup = QueueSetup {
            door: self.export.door,
            index: number,
            size: vring.size,
            addresses,
            base: vring.base,
            event_index: self.features & features::EVENT_IDX != 0,
            memory: self.memory.clone(),
            inflight,
            log: self.log.clone().filter(|_| self.is_logging()),
            kick: clone(&vring.kick)?,
            call: clone(&vring.call)?,
            error: clone(&vring.error)?,
        };
        let (reply, result) = channel();
        let setup = Box::new(setup);
        self.reactor.send(Message::StartQueue { slot: self.export.slot, setup, reply });
        result.recv().map_err(|_| Error::new(ErrorKind::Gone, "the reactor has ended"))??;
        self.vrings[index].running = true;
        Ok(())
    }

    fn region(&mut self, info: RegionInfo, file: File) -> Reply<()> {
        let region = Region::map(info, file);
        region.and_then(|region| self.memory.add(region)).map_err(refuse)?;
        self.sharing = Sharing::Done;
        Ok(())
    }

    /// Where memory is to be pinned: has the new regions pinned, and those forgotten that are not
    /// in the table any more.
    fn pin_memory(&self) {
        let Some(pinner) = &self.pinner else { return };
        let ExportId { slot, door, .. } = self.export;
        self.reactor.send(Message::SetMemory { slot, door, memory: self.memory.clone() });
        for region in self.memory.regions().iter().filter(|region| region.ask_to_pin()) {
            let (region, reactor) = (Arc::downgrade(region), self.reactor.clone());
            // A thread that has ended leaves memory as it is, and status says so.
            let _ = pinner.send(Job { region, export: self.export, reactor });
        }
    }

    /// All rings stand still, for ever: nothing of the guest's memory is used any more.
    pub fn end(&mut self) {
        self.memory = MemoryTable::default();
        self.pin_memory();
    }

    /// Bytes of guest memory, and how many of them are pinned and used so.
    pub fn memory_bytes(&self) -> (u64, u64) {
        let bytes = |region: &Arc<Region>| region.info().size;
        let (all, registered) = (self.memory.regions().iter(), self.memory.regions().iter());
        let registered = registered.filter(|region| region.is_registered());
        (all.map(bytes).sum(), registered.map(bytes).sum())
    }

    fn forget_rings(&mut self) {
        for vring in &mut self.vrings {
            *vring = Vring::default();
        }
        self.inflight = None;
    }

    /// Before the front end is answered: from then on the guest relies on it, whoever serves it.
    fn set_write_cache(&mut self, enabled: bool) {
        if std::mem::replace(&mut self.write_cache, enabled) != enabled {
            let state = if enabled { "on" } else { "off" };
            log::info!("{}: the guest turned its write cache {state}", self.name);
            (self.events)(ExportEvent::WriteCache { enabled });
        }
        self.apply_write_cache();
    }

    /// A driver that cannot flush (5.2.5.2: it took neither FLUSH nor CONFIG_WCE) must find every
    /// write durable, whatever the `writeback` byte says.
    fn apply_write_cache(&self) {
        let can_flush = self.features & (features::FLUSH | features::CONFIG_WCE) != 0;
        let enabled = self.write_cache && can_flush;
        let (slot, door) = (self.export.slot, self.export.door);
        self.reactor.send(Message::SetWriteCache { slot, door, enabled });
    }

    /// The queues in use, as status shows them.
    pub fn queues_running(&self) -> u16 {
        self.running().count() as u16
    }
}

impl vhost::vhost_user::VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Reply<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Reply<()> {
        self.forget_rings();
        self.features = 0;
        self.protocol_features = 0;
        self.memory = MemoryTable::default();
        self.pin_memory();
        Ok(())
    }

    fn reset_device(&mut self) -> Reply<()> {
        if !planted(Bug::ResetForgotten) {
            self.forget_rings();
        }
        self.set_write_cache(true);
        Ok(())
    }

    fn get_features(&mut self) -> Reply<u64> {
        Ok(features::offered(&self.device))
    }

    fn set_features(&mut self, features: u64) -> Reply<()> {
        let unknown = features & !features::offered(&self.device);
        if unknown != 0 {
            let text = format!("{}: features {unknown:#x} were not offered", self.name);
            return Err(refuse(Error::new(ErrorKind::Invalid, text)));
        }
        self.features = features;
        self.apply_write_cache();
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Reply<Option<Vec<u64>>> {
        self.memory = MemoryTable::default();
        for (region, file) in regions.iter().zip(files) {
            let info = RegionInfo {
                guest_address: region.guest_phys_addr,
                size: region.memory_size,
                user_address: region.user_addr,
                file_offset: region.mmap_offset,
            };
            self.region(info, file)?;
        }
        self.pin_memory();
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Reply<()> {
        let size = u16::try_from(num).ok().filter(|size| (1..=QUEUE_SIZE_MAX).contains(size));
        let size = size.filter(|size| size.is_power_of_two()).ok_or(Refusal::InvalidParam)?;
        self.vring(index as usize)?.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Reply<()> {
        let addresses = RingAddresses { descriptors, available, used };
        self.vring(index as usize)?.addresses = Some(addresses);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Reply<()> {
        let base = u16::try_from(base).map_err(|_| Refusal::InvalidParam)?;
        self.vring(index as usize)?.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Reply<VhostUserVringState> {
        let vring = self.vring(index as usize)?;
        // The ring is stopped until a new kick descriptor starts it.
        vring.kick = None;
        vring.call = None;
        Ok(VhostUserVringState::new(index, u32::from(vring.base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Reply<()> {
        if fd.is_none() {
            let text = format!("{}: queue {index}: a front end must kick", self.name);
            return Err(refuse(Error::new(ErrorKind::Unsupported, text)));
        }
        self.vring(usize::from(index))?.kick = fd.map(eventfd).transpose()?;
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Reply<()> {
        let (slot, queue) = (self.export.slot, self.queue(u16::from(index)));
        let fd = fd.map(eventfd).transpose()?;
        let vring = self.vring(usize::from(index))?;
        let call =
            fd.as_ref().map(File::try_clone).transpose().map_err(Refusal::ReqHandlerError)?;
        vring.call = fd;
        if vring.running {
            self.reactor.send(Message::SetCall { slot, queue, call });
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Reply<()> {
        let (slot, queue) = (self.export.slot, self.queue(u16::from(index)));
        let fd = fd.map(eventfd).transpose()?;
        let vring = self.vring(usize::from(index))?;
        let error =
            fd.as_ref().map(File::try_clone).transpose().map_err(Refusal::ReqHandlerError)?;
        vring.error = fd;
        if vring.running {
            self.reactor.send(Message::SetError { slot, queue, error });
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Reply<VhostUserProtocolFeatures> {
        Ok(PROTOCOL_FEATURES)
    }

    fn set_protocol_features(&mut self, features: u64) -> Reply<()> {
        self.protocol_features = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Reply<u64> {
        Ok(u64::from(self.device.queues))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Reply<()> {
        self.vring(index as usize)?.enabled = enable;
        Ok(())
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Reply<Vec<u8>> {
        let space = self.device.config_space(self.write_cache);
        let offset = match offset {
            CONFIG_OFFSET_OTHER.. => offset - CONFIG_OFFSET_OTHER,
            offset => offset,
        } as usize;
        let end = offset.checked_add(size as usize).filter(|end| *end <= CONFIG_SPACE_BYTES);
        let end = end.ok_or(Refusal::InvalidParam)?;
        Ok(space[offset..end].to_vec())
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Reply<()> {
        // A front end may write the whole space back: only `writeback` can change.
        let at = WRITEBACK_OFFSET.checked_sub(offset).map(|at| at as usize);
        match at.and_then(|at| bytes.get(at)) {
            Some(byte @ (0 | 1)) => {
                self.set_write_cache(*byte == 1);
                Ok(())
            }
            Some(_) => Err(Refusal::InvalidParam),
            None => Ok(()),
        }
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Reply<()> {
        Err(Refusal::InvalidMessage)
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Reply<File> {
        Err(Refusal::InvalidMessage)
    }

    fn get_inflight_fd(
        &mut self,
        inflight: &VhostUserInflight,
    ) -> Reply<(VhostUserInflight, File)> {
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        if queues == 0 || queues > self.device.queues || size == 0 || size > QUEUE_SIZE_MAX {
            return Err(Refusal::InvalidParam);
        }
        let (area, file) = InflightArea::create(queues, size).map_err(refuse)?;
        let reply = VhostUserInflight {
            mmap_size: area.bytes(),
            mmap_offset: 0,
            num_queues: queues,
            queue_size: size,
        };
        self.inflight = Some(area);
        Ok((reply, file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Reply<()> {
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        let expected = queue_bytes(size) * usize::from(queues);
        if queues > self.device.queues
            || size > QUEUE_SIZE_MAX
            || inflight.mmap_size < expected as u64
        {
            return Err(Refusal::InvalidParam);
        }
        let area = InflightArea::map(file, inflight.mmap_offset, queues, size);
        self.inflight = Some(area.map_err(refuse)?);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Reply<u64> {
        Ok(MEMORY_REGIONS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy: Option<bool>,
    ) -> Reply<Option<u64>> {
        self.region(info_of(region), fd)?;
        self.pin_memory();
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Reply<()> {
        self.memory.remove(info_of(region)).map_err(refuse)?;
        self.pin_memory();
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Reply<Option<File>> {
        Err(Refusal::InvalidMessage)
    }

    fn check_device_state(&mut self) -> Reply<()> {
        Err(Refusal::InvalidMessage)
    }

    fn get_shmem_config(&mut self) -> Reply<VhostUserShMemConfig> {
        Err(Refusal::InvalidMessage)
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Reply<()> {
        let log = DirtyLog::map(file, log.mmap_offset, log.mmap_size).map_err(refuse)?;
        self.log = Some(log);
        Ok(())
    }
}

fn info_of(region: &VhostUserSingleMemoryRegion) -> RegionInfo {
    RegionInfo {
        guest_address: region.guest_phys_addr,
        size: region.memory_size,
        user_address: region.user_addr,
        file_offset: region.mmap_offset,
    }
}
