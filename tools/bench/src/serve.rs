//! A back end to try the client on: a file on the daemon's own data path, and lies that a volume
//! can tell.

use crate::Result;
use clap::ValueEnum;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use vflash::io::buffer::{AlignedBuffer, Segment, gather, total_bytes};
use vflash::io::disk::{DiskTarget, Errno, Operation, OperationKind};
use vflash::io::file::{FileDisk, Preallocation};
use vflash::io::volume::{DiskIndex, Io, Outcome, Request, RequestId, RequestKind, Volume};
use vflash::vhost::{Export, NewDoor, Server, ServerOptions, SocketAccess};
use vflash::virtio;

/// Of so many writes, one is lied about.
const LIE_ONE_IN: u64 = 100;

/// A write that is done again is so this many writes later.
const LATE_BY: u64 = 50;

/// What [`serve`] does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Lie {
    /// Acknowledges some writes without doing them.
    LoseWrites,
    /// Does some writes again, much later.
    RepeatWrites,
}

/// One request is one operation per range on one file.
struct FileVolume {
    lie: Option<Lie>,
    writes: u64,
    /// Operations that a request waits for.
    outstanding: HashMap<u32, u32>,
    /// A write that was kept: when it is due, where it goes, and its bytes.
    kept: Option<(u64, u64, AlignedBuffer)>,
    /// Bytes under way for a write that is done again.
    repeated: Option<AlignedBuffer>,
}

/// The token of a write that no guest waits for.
const REPEATED: u64 = 1 << 20;

impl FileVolume {
    /// Whether this write is to be done at all.
    fn lie_about(&mut self, offset: u64, segments: &[Segment], io: &mut dyn Io) -> bool {
        self.writes += 1;
        match self.lie {
            None => true,
            Some(Lie::LoseWrites) => !self.writes.is_multiple_of(LIE_ONE_IN),
            Some(Lie::RepeatWrites) => {
                self.repeat(io);
                if self.kept.is_none() && self.repeated.is_none() {
                    let mut bytes = AlignedBuffer::new(total_bytes(segments));
                    gather(segments, &mut bytes);
                    self.kept = Some((self.writes + LATE_BY, offset, bytes));
                }
                true
            }
        }
    }

    fn repeat(&mut self, io: &mut dyn Io) {
        let Some((_, offset, bytes)) = self.kept.take_if(|(due, ..)| *due <= self.writes) else {
            return;
        };
        // SAFETY: the buffer stays in `repeated` until the operation has completed.
        let segments = [unsafe { bytes.segment() }];
        let length = bytes.len() as u64;
        let kind = OperationKind::Write;
        let operation = Operation { kind, offset, length, segments: &segments };
        io.submit(DiskIndex(0), operation, REPEATED);
        self.repeated = Some(bytes);
    }
}

impl Volume for FileVolume {
    fn attach(&mut self, _requests_max: u32) {}

    fn submit(&mut self, request: Request<'_>, io: &mut dyn Io) {
        let token = u64::from(request.id.0);
        let kind = match request.kind {
            RequestKind::Read => OperationKind::Read,
            RequestKind::Write => OperationKind::Write,
            RequestKind::Discard => OperationKind::Discard,
            RequestKind::WriteZeroes { .. } => OperationKind::Zero,
            RequestKind::Flush => {
                self.outstanding.insert(request.id.0, 1);
                let kind = OperationKind::Flush;
                let operation = Operation { kind, offset: 0, length: 0, segments: &[] };
                return io.submit(DiskIndex(0), operation, token);
            }
        };
        if kind == OperationKind::Write
            && let Some(range) = request.ranges.first()
            && !self.lie_about(range.start * 512, request.segments, io)
        {
            return io.complete(request.id, Outcome::Done);
        }
        self.outstanding.insert(request.id.0, request.ranges.len() as u32);
        for range in request.ranges {
            let (offset, length) = (range.start * 512, range.count * 512);
            let operation = Operation { kind, offset, length, segments: request.segments };
            io.submit(DiskIndex(0), operation, token);
        }
    }

    fn completed(&mut self, token: u64, result: std::result::Result<(), Errno>, io: &mut dyn Io) {
        if token == REPEATED {
            self.repeated = None;
            return;
        }
        let id = token as u32;
        let left = self.outstanding.get_mut(&id).expect("a request that is under way");
        *left -= 1;
        if *left == 0 {
            self.outstanding.remove(&id);
            let outcome = if result.is_ok() { Outcome::Done } else { Outcome::Failed };
            io.complete(RequestId(id), outcome);
        }
    }
}

/// A disk as a volume that does what it is asked, but for lies.
pub fn file_volume(lie: Option<Lie>) -> Box<dyn Volume> {
    let outstanding = HashMap::new();
    Box::new(FileVolume { lie, writes: 0, outstanding, kept: None, repeated: None })
}

/// An export of a volume on `target`, with nothing special about it.
pub fn export(socket: &Path, target: DiskTarget, volume: Box<dyn Volume>) -> Export {
    let geometry = target.geometry();
    let door = NewDoor {
        name: "bench/file".into(),
        socket: socket.into(),
        access: SocketAccess::default(),
        device: virtio::Device {
            capacity_sectors: geometry.size_bytes / 512,
            block_bytes: geometry.block_bytes,
            optimal_bytes: geometry.optimal_bytes,
            read_only: false,
            discard: true,
            serial: "vflash-bench".into(),
            queues: 4,
        },
        write_cache: true,
        pin_memory: false,
        limits: Default::default(),
        metrics: Arc::default(),
        events: Arc::new(|_| {}),
    };
    Export { door, volume, disks: vec![target] }
}

/// Serves `file`, made with `size_bytes` if it is not there, on `socket` until the process is
/// killed.
pub fn serve(socket: &Path, file: &Path, size_bytes: u64, lie: Option<Lie>) -> Result<()> {
    let disk = match file.exists() {
        true => FileDisk::open(file, Duration::from_secs(10))?,
        false => FileDisk::create(file, size_bytes, Preallocation::Reserved)?,
    };
    let server = Server::start(&ServerOptions { reactors: 1, cpus: vec![] })?;
    server.add(export(socket, disk.target(), file_volume(lie)))?;
    loop {
        std::thread::park();
    }
}
