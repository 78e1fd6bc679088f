//! Backing files: claimed, locked, swapped, resized, given up.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::Duration;
use vflash::backing::fence::{Claim, Remembered};
use vflash::backing::group::GroupWriter;
use vflash::backing::open::{Backing, Claimed, OpenOptions};
use vflash::backing::recover::{Damage, RecoverOptions};
use vflash::backing::redo::{GroupId, Layout, Span};
use vflash::backing::sidecar::write_stamp;
use vflash::backing::spec::Spec;
use vflash::backing::stamp::{DrainMode, Owner, Point, Stamp, State};
use vflash::base::units::MIB;
use vflash::base::{ErrorKind, Result};
use vflash::io::buffer::PinnedBuffer;
use vflash::io::disk::{DiskTarget, Operation, OperationKind};
use vflash::io::uring::Ring;

const LONG: Duration = Duration::from_secs(60);

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new(size_bytes: u64) -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        place.make(&place.disk(), size_bytes);
        place
    }

    fn make(&self, path: &Path, size_bytes: u64) {
        std::fs::File::create(path).unwrap().set_len(size_bytes).unwrap();
    }

    fn disk(&self) -> PathBuf {
        self.folder.path().join("disk.raw")
    }

    fn sidecar(&self) -> PathBuf {
        self.folder.path().join("disk.raw.vflash")
    }

    fn open(&self) -> Result<Backing> {
        Backing::open(&OpenOptions {
            spec: Spec::Path(self.disk()),
            sidecar: None,
            reading: false,
            wait: Duration::ZERO,
            nbd: Default::default(),
        })
    }

    fn claim(&self, claim: &Claim) -> Result<(Backing, Claimed)> {
        let mut backing = self.open()?;
        let claimed = backing.claim(claim, &mut |_| {})?;
        Ok((backing, claimed))
    }

    /// Why a claim is refused.
    fn refusal(&self, claim: &Claim) -> String {
        let before = std::fs::read(self.sidecar()).unwrap_or_default();
        let error = self.claim(claim).err().expect("refused");
        assert!(matches!(error.kind(), ErrorKind::Fenced | ErrorKind::Gone), "{error:?}");
        assert!(std::fs::read(self.sidecar()).unwrap_or_default() == before, "nothing was changed");
        let text = error.to_string();
        let named =
            format!("backing {} (sidecar {}): ", self.disk().display(), self.sidecar().display());
        text.strip_prefix(&named).unwrap_or_else(|| panic!("{text}")).to_owned()
    }
}

fn claim(allocation: u8) -> Claim {
    Claim {
        owner: Owner {
            host: [1; 16],
            instance: [2; 16],
            allocation: [allocation; 16],
            host_name: format!("host-{allocation}"),
            volume: "vm/root".into(),
        },
        remembered: None,
        state: State::Dirty,
        drain: DrainMode::Grouped,
        create: true,
        adopt: false,
        group_bytes_max: Some(MIB),
        new_disk: [7; 16],
        roster: Default::default(),
        now_ms: 1_000_000,
    }
}

fn remembering(allocation: u8, stamp: &Stamp, dirty: bool) -> Claim {
    let flash = Remembered {
        disk: stamp.disk,
        owner_epoch: stamp.owner_epoch,
        point: stamp.point.won,
        dirty,
    };
    Claim { remembered: Some(flash), create: false, ..claim(allocation) }
}

/// Commits a group that writes `byte` to the first sectors, and applies nothing.
fn commit_group(backing: &mut Backing, stamp: &Stamp, number: u64, byte: u8) {
    let layout = Layout::new(stamp.group_bytes_max);
    let id = GroupId { disk: stamp.disk, owner_epoch: stamp.owner_epoch, number };
    let mut group = GroupWriter::new(layout, id);
    let data = vec![byte; 4096];
    let at = group.data(0, &data);
    let to = 10 * number;
    let finished = group.finish(Span {
        from: to - 10,
        to,
        point_ms: 5000,
        dirty_bytes: 4096,
        ..Span::default()
    });
    let (_, sidecar) = backing.disks();
    let sidecar = sidecar.expect("a sidecar");
    sidecar.write_copies(&[at], &data).unwrap();
    sidecar.write_copies(&[finished.table_offset], &finished.table).unwrap();
    sidecar.write_copies(&[finished.header_offset], &finished.header_block).unwrap();
    sidecar.flush().unwrap();
}

fn detach(backing: &mut Backing, stamp: &Stamp) {
    let clean = Stamp { state: State::Clean, dirty_bytes: 0, ..stamp.next(2_000_000) };
    write_stamp(backing.disks().1.expect("a sidecar"), &clean).unwrap();
}

#[test]
fn a_claim_makes_the_sidecar_and_another_flash_is_refused_until_it_is_clean() {
    let place = Place::new(8 * MIB);
    let without_leave = Claim { create: false, ..claim(1) };
    assert!(place.refusal(&without_leave).contains("leave to make one was not given"));
    assert!(!place.sidecar().exists());
    let (mut backing, claimed) = place.claim(&claim(1)).unwrap();
    let stamp = claimed.stamp.expect("a stamp");
    assert_eq!((stamp.owner_epoch, claimed.next_group, claimed.cold), (1, 1, false));
    let length = std::fs::metadata(place.sidecar()).unwrap().len();
    assert_eq!(length, Layout::new(MIB).sidecar_bytes());
    // In use: the lock says so, whoever asks.
    let busy = place.open().err().expect("busy");
    assert_eq!(busy.kind(), ErrorKind::Busy);
    drop(backing);
    assert!(place.refusal(&claim(2)).starts_with("it belongs to vm/root on host host-1 since"));
    // The owner itself goes on, in the next epoch.
    let again = place.claim(&remembering(1, &stamp, true)).unwrap();
    backing = again.0;
    let stamp = again.1.stamp.expect("a stamp");
    assert_eq!((stamp.owner_epoch, stamp.first_epoch), (2, 1));
    detach(&mut backing, &stamp);
    drop(backing);
    let (_, taken) = place.claim(&claim(2)).unwrap();
    assert_eq!(taken.stamp.expect("a stamp").owner_epoch, 3);
    let back = remembering(1, &stamp, true);
    assert!(place.refusal(&back).starts_with("it belongs to vm/root on host host-2"));
}

#[test]
fn a_committed_group_is_finished_by_the_next_opening() {
    let place = Place::new(8 * MIB);
    let (mut backing, claimed) = place.claim(&claim(1)).unwrap();
    let stamp = claimed.stamp.expect("a stamp");
    commit_group(&mut backing, &stamp, 1, 0x11);
    drop(backing);
    assert_eq!(std::fs::read(place.disk()).unwrap()[..4096], [0; 4096]);
    let (_, claimed) = place.claim(&remembering(1, &stamp, true)).unwrap();
    let applied = claimed.recovery.expect("recovered").applied.expect("a group");
    assert_eq!((applied.header.id.number, applied.bytes), (1, 4096));
    assert_eq!(std::fs::read(place.disk()).unwrap()[..4097], [&[0x11; 4096][..], &[0]].concat());
    assert_eq!(claimed.next_group, 2);
    assert_eq!(claimed.stamp.expect("a stamp").point, Point { won: 10, time_ms: 5000, others: 0 });
}

#[test]
fn a_swapped_or_resized_backing_is_refused_and_a_moved_one_adopted_when_told() {
    let place = Place::new(8 * MIB);
    let (mut backing, claimed) = place.claim(&claim(1)).unwrap();
    let stamp = claimed.stamp.expect("a stamp");
    commit_group(&mut backing, &stamp, 1, 0x22);
    drop(backing);
    let mine = remembering(1, &stamp, true);
    let original = place.folder.path().join("original");
    std::fs::rename(place.disk(), &original).unwrap();
    place.make(&place.disk(), 8 * MIB);
    let text = place.refusal(&mine);
    assert!(text.contains("it is another file (inode number or time of birth)"), "{text}");
    let mut opened = place.open().unwrap();
    let options = RecoverOptions::default();
    let error = opened.recover(options, false, &mut |_| {}).expect_err("refused");
    assert!(error.to_string().contains("it is another file"), "{error}");
    drop(opened);
    assert!(std::fs::read(place.disk()).unwrap().iter().all(|byte| *byte == 0), "untouched");
    place.make(&place.disk(), 4 * MIB);
    assert!(place.refusal(&mine).contains("its size was 8MiB and is 4MiB"));
    let adopt = Claim { adopt: true, ..mine.clone() };
    assert!(place.refusal(&adopt).contains("its size was 8MiB and is 4MiB"));
    // A copy of the right one.
    std::fs::copy(&original, place.disk()).unwrap();
    let (_, claimed) = place.claim(&adopt).unwrap();
    assert!(claimed.recovery.expect("recovered").applied.is_some());
    assert_eq!(std::fs::read(place.disk()).unwrap()[0], 0x22);
    // From now on that is the one.
    let stamp = claimed.stamp.expect("a stamp");
    assert!(place.claim(&remembering(1, &stamp, true)).is_ok());
}

#[test]
fn a_rolled_back_pair_and_a_missing_sidecar_are_refused() {
    let place = Place::new(8 * MIB);
    let (backing, claimed) = place.claim(&claim(1)).unwrap();
    let first = claimed.stamp.expect("a stamp");
    drop(backing);
    let snapshot = std::fs::read(place.sidecar()).unwrap();
    let (backing, claimed) = place.claim(&remembering(1, &first, true)).unwrap();
    let second = claimed.stamp.expect("a stamp");
    drop(backing);
    std::fs::write(place.sidecar(), &snapshot).unwrap();
    let text = place.refusal(&remembering(1, &second, true));
    assert!(text.contains("has owner epoch 1, and the flash has seen 2"), "{text}");
    std::fs::remove_file(place.sidecar()).unwrap();
    let text = place.refusal(&remembering(1, &second, true));
    assert!(text.starts_with("its sidecar is missing or empty"), "{text}");
    std::fs::write(place.sidecar(), vec![0x33; 1 << 20]).unwrap();
    let error = place.claim(&claim(1)).err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("this is not a sidecar, other data lies in it"), "{error}");
    assert_eq!(std::fs::read(place.sidecar()).unwrap(), vec![0x33; 1 << 20], "untouched");
}

#[test]
fn giving_up_a_lost_flash_says_what_is_lost_and_fences_it_for_good() {
    let place = Place::new(8 * MIB);
    let (mut backing, claimed) = place.claim(&claim(1)).unwrap();
    let stamp = claimed.stamp.expect("a stamp");
    commit_group(&mut backing, &stamp, 1, 0x44);
    drop(backing);
    let mut backing = place.open().unwrap();
    let lost = backing.lost(Damage::Refuse).unwrap().expect("something");
    assert_eq!(lost.volume, "vm/root");
    assert_eq!((lost.standing.point.won, lost.standing.dirty_bytes), (10, 4096));
    assert_eq!(
        lost.text,
        format!(
            "{}: at 1970-01-01 00:16:40 UTC its flash held 4KiB that the backing lacks; these \
             writes are lost, the disk is at point 10 of 1970-01-01 00:00:05 UTC",
            place.disk().display()
        )
    );
    let options = RecoverOptions { now_ms: 3_000_000, ..Default::default() };
    let error = backing.take_over_lost("vm/other", options, &mut |_| {}).expect_err("refused");
    assert!(
        error.to_string().ends_with("nothing was done: confirm with `vm/root`, not `vm/other`")
    );
    let taken = backing.take_over_lost("vm/root", options, &mut |_| {}).unwrap().expect("lost");
    assert!(taken.standing.stamp.is_clean());
    assert_eq!(taken.standing.point.won, 10);
    assert_eq!(backing.lost(Damage::Refuse).unwrap(), None, "nothing is left to lose");
    drop(backing);
    assert_eq!(std::fs::read(place.disk()).unwrap()[0], 0x44, "the group was finished");
    let text = place.refusal(&remembering(1, &stamp, true));
    assert!(text.starts_with("it was opened elsewhere (last by vm/root"), "{text}");
    let (_, other) = place.claim(&claim(2)).unwrap();
    assert_eq!(other.stamp.expect("a stamp").owner_epoch, 3);
}

#[test]
fn every_sector_of_a_file_can_be_reached_and_a_cut_one_is_refused() {
    // No whole number of any drive's blocks.
    let place = Place::new(3 * 4096 + 512);
    let mut backing = place.open().unwrap();
    assert_eq!(backing.description().geometry.size_bytes, 3 * 4096 + 512);
    assert_eq!(backing.description().geometry.block_bytes, 512);
    let (disk, _) = backing.disks();
    disk.write_copies(&[3 * 4096], &[5; 512]).unwrap();
    disk.write_copies(&[512], &[6; 512]).unwrap();
    disk.flush().unwrap();
    assert_eq!(disk.read(3 * 4096 - 512, 1024).unwrap(), [[0; 512], [5; 512]].concat());
    drop(backing);
    let bytes = std::fs::read(place.disk()).unwrap();
    assert_eq!((bytes.len(), bytes[512], bytes[1024], bytes[3 * 4096]), (12_800, 6, 0, 5));
    place.make(&place.disk(), 1000);
    let error = place.open().err().expect("refused");
    assert!(error.to_string().contains("1000 bytes, is no multiple of 512"), "{error}");
}

/// A killed daemon's write that the kernel carries out late: the ring's file is the description
/// that has the lock, so the next owner gets it only afterwards, and its newer data stays.
#[test]
fn a_late_write_of_a_dead_owner_cannot_land_on_the_next_ones() {
    let place = Place::new(8 * MIB);
    let (backing, claimed) = place.claim(&claim(1)).unwrap();
    let stamp = claimed.stamp.expect("a stamp");
    let (target, _) = backing.targets();
    let (registered, wait_registered) = channel();
    let (go, may_go) = channel::<()>();
    let ring = std::thread::spawn(move || {
        let mut ring = Ring::new().unwrap();
        let DiskTarget::File { file, .. } = target else { panic!("a file") };
        let index = ring.register(file.as_fd()).unwrap();
        // All that is left of the owner is what its ring holds.
        drop(file);
        registered.send(()).unwrap();
        may_go.recv().unwrap();
        let buffer = PinnedBuffer::new(4096);
        buffer.segment().copy_from(&[0x0d; 4096]);
        let segments = [buffer.segment()];
        let kind = OperationKind::Write;
        ring.operate(index, &Operation { kind, offset: 0, length: 4096, segments: &segments }, 1);
        ring.wait(Some(LONG));
        let ended = ring.ended().expect("the late write");
        assert_eq!(ended.result, Ok(4096));
    });
    wait_registered.recv().unwrap();
    drop(backing);
    let busy = place.open().err().expect("the ring still holds the lock");
    assert_eq!(busy.kind(), ErrorKind::Busy);
    let (started, wait_started) = channel();
    let (path, mine) = (place.disk(), remembering(1, &stamp, true));
    let successor = std::thread::spawn(move || {
        started.send(()).unwrap();
        let spec = Spec::Path(path);
        let options = OpenOptions {
            spec,
            sidecar: None,
            reading: false,
            wait: LONG,
            nbd: Default::default(),
        };
        let mut backing = Backing::open(&options).unwrap();
        backing.claim(&mine, &mut |_| {}).unwrap();
        let (disk, _) = backing.disks();
        disk.write_copies(&[0], &[0xee; 4096]).unwrap();
        disk.flush().unwrap();
    });
    wait_started.recv().unwrap();
    go.send(()).unwrap();
    ring.join().unwrap();
    successor.join().unwrap();
    let mut bytes = [0; 4096];
    std::fs::File::open(place.disk()).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [0xee; 4096], "the newer version");
}
