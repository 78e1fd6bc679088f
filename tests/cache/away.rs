//! Disks that are opened from their flash alone, and whose backing comes back.

use super::{GROUP_MAX, Rig, SECTORS, Setup, World, identity};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vflash::backing::recover::{Damage, RecoverOptions, Standing, take_up};
use vflash::backing::redo::Layout;
use vflash::base::units::{MIB, SECTOR_BYTES};
use vflash::cache::drain::SidecarState;
use vflash::cache::recover::{OpenOptions, open};
use vflash::cache::{CacheMessage, CachedDisk, ClaimedBacking, Known};
use vflash::io::disk::{Completion, Disk, DiskGeometry, Errno, Operation};
use vflash::io::sim::SimDisk;

/// A disk that may be away.
pub(crate) struct Port {
    disk: SimDisk,
    away: Arc<AtomicBool>,
    failed: Vec<Completion>,
}

impl Port {
    pub(crate) fn new(disk: SimDisk, away: Arc<AtomicBool>) -> Self {
        Self { disk, away, failed: Vec::new() }
    }
}

impl Disk for Port {
    fn geometry(&self) -> DiskGeometry {
        self.disk.geometry()
    }

    fn submit(&mut self, operation: Operation<'_>, token: u64) {
        match self.away.load(Ordering::Relaxed) {
            true => self.failed.push(Completion { token, result: Err(Errno::AWAY) }),
            false => self.disk.submit(operation, token),
        }
    }

    fn poll(&mut self, completions: &mut Vec<Completion>, wait: bool) {
        let wait = wait && self.failed.is_empty();
        completions.append(&mut self.failed);
        self.disk.poll(completions, wait);
    }
}

impl World {
    /// Reads the backing itself.
    pub(crate) fn reader(&self) -> impl FnMut(u64, &mut [u8]) + '_ {
        |start, bytes: &mut [u8]| {
            bytes.copy_from_slice(&self.0[1].peek(start * SECTOR_BYTES, bytes.len()));
        }
    }

    /// Opens the disk as a daemon that starts while the shared storage is away; also the next WON.
    pub(crate) fn open_alone(
        &self,
        setup: &Setup,
    ) -> vflash::base::Result<(CachedDisk, u64, Known)> {
        let mut how = OpenOptions::new(identity(), 64 * MIB);
        how.alone = true;
        let opened = open(&mut self.medium_for(setup), &how)?;
        let (next_won, known, geometry) =
            (opened.root.next_won, opened.known, opened.root.geometry());
        Ok((CachedDisk::new(opened, setup.options(), geometry, None), next_won, known))
    }

    /// What a claim of the backing comes to for a disk that knows so much.
    pub(crate) fn claim(&self, known: Known) -> vflash::base::Result<ClaimedBacking> {
        let how = RecoverOptions { damage: Damage::Skip, ..RecoverOptions::default() };
        let standing = take_up(&mut self.blocking(2), how)?.expect("there is a stamp");
        let live = standing.live.map(|live| live.span);
        let live = live.filter(|live| known.can_finish(live));
        let (standing, drained_through): (Standing, u64) = match live {
            Some(_) => (standing, known.drained),
            None => {
                let standing = self.recover()?;
                known.check_age(&standing.point)?;
                let point = standing.point.won;
                (standing, point)
            }
        };
        let sidecar = SidecarState {
            layout: Layout::new(GROUP_MAX),
            stamp: standing.stamp,
            last_group: standing.next_group - 1,
            live: live.map(|live| live.point()),
        };
        Ok(ClaimedBacking { geometry: self.0[1].geometry(), drained_through, sidecar })
    }
}

impl Rig {
    /// The shared storage is away from now on.
    pub(crate) fn put_away(&self) {
        self.away.store(true, Ordering::Relaxed);
    }

    /// As [`Self::write_somewhere`], while the log has room: without a drain it gets no more,
    /// however much time passes.
    pub(crate) fn write_alone(&mut self) {
        let by = Duration::from_millis(self.random.u64(1..400));
        self.pass_time(by);
        self.head();
        if self.status.gauges().log_fill_permille() < 700 {
            self.write_somewhere();
        }
    }

    /// A read that may need the shared storage, and a look at what becomes of it.
    pub(crate) fn read_somewhere(&mut self) {
        let start = self.random.u64(0..SECTORS - 40);
        let count = self.random.u64(1..40);
        self.read(start, count);
        self.turn(false);
    }

    /// The shared storage is back, and still this disk's.
    pub(crate) fn come_back(&mut self) {
        let known = self.alone.take().expect("it was opened alone");
        let backing = self.world.claim(known).expect("claimed");
        self.away.store(false, Ordering::Relaxed);
        self.tell(CacheMessage::Claimed { backing: Box::new(backing) });
        self.turn(false);
    }
}
