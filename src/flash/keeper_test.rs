//! The keeper: calls, thin requests and scrubbing on one thread.

use super::*;
use crate::base::units::{EXTENT_BYTES, MIB};
use crate::flash::pool::tests::{make, thick, thin};
use crate::io::disk::{Disk, Errno};
use crate::io::sim::{Failure, Faults, SimDisk};

fn thin_message(id: AllocationId, extent: u64, notify: &Notify) -> Message {
    let request = ThinRequest { id, kind: ThinKind::Map(vec![extent]) };
    Message::Thin(Thin { request, full: FullPolicy::Fail, notify: notify.clone() })
}

#[test]
fn waiting_requests_share_one_commit() {
    let disk = SimDisk::new(64 * MIB);
    let mut pool = make(&disk, None);
    let id = pool.create(thin("vm/a", 32 * MIB)).expect("created");
    let keeper = Keeper::start(pool, KeeperOptions::default()).expect("started");
    let (answer, answers) = channel();
    let notify: Notify = Arc::new(move |message| answer.send(message).expect("the test listens"));
    // The keeper is busy with a call while twenty requests come in.
    let (release, gate) = channel::<()>();
    let busy = keeper.clone();
    let (entered, inside) = channel();
    let caller = std::thread::spawn(move || {
        busy.call(move |_| {
            entered.send(()).expect("the test listens");
            gate.recv().expect("released");
        })
    });
    inside.recv().expect("the call runs");
    for extent in 0..20 {
        keeper.messages.send(thin_message(id, extent, &notify)).expect("runs");
    }
    let before = disk.operations();
    release.send(()).expect("waits");
    for _ in 0..20 {
        let message = answers.recv().expect("answered").downcast::<VolumeMessage>().expect("ours");
        let VolumeMessage::Thin { reply, .. } = *message else { panic!("an answer") };
        assert_eq!(reply.expect("mapped").len(), 1);
    }
    caller.join().expect("no panic").expect("runs");
    assert_eq!(disk.operations() - before, 3, "two copies of one record and one flush");
    keeper.stop();
}

#[test]
fn scrubbing_goes_on_between_messages_and_rests_after_a_failure() {
    let disk = SimDisk::new(64 * MIB);
    let pool = Pool::format(Box::new(disk.clone()), "dirty").expect("format");
    let dirty = pool.space().scrub_bytes;
    let fail = Failure { after: 0, forever: true, errno: Errno::EIO, torn: false };
    disk.set_faults(Faults { fail: Some(fail), ..Default::default() });
    let scrub_retry = Duration::from_millis(1);
    let options = KeeperOptions { scrub_bytes: 4 * MIB, scrub_retry };
    let keeper = Keeper::start(pool, options).expect("started");
    // After a failure a caller is not kept waiting for what may never become clean.
    keeper.call_after_scrub(64 * MIB, |_| ()).expect("runs");
    assert!(keeper.scrub_status().failure.expect("told").contains("stays out of use"));
    disk.set_faults(Faults::default());
    let deadline = Instant::now() + Duration::from_secs(30);
    while keeper.scrub_status().failure.is_some() {
        assert!(Instant::now() < deadline, "it tries again by itself");
        std::thread::yield_now();
    }
    let free = keeper.call_after_scrub(dirty, |pool| pool.space().free_bytes);
    assert_eq!(free.expect("runs"), dirty);
    let status = keeper.scrub_status();
    assert_eq!((status.scrubbed_bytes, status.left_bytes), (dirty, 0));
    keeper.stop();
}

#[test]
fn a_stopped_keeper_lets_go_of_its_disk() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("pool");
    let preallocation = crate::io::file::Preallocation::Reserved;
    let disk = crate::io::file::FileDisk::create(&path, 24 * MIB, preallocation).expect("made");
    assert_eq!(disk.geometry().size_bytes, 24 * MIB);
    let mut pool = Pool::format(Box::new(disk), "file").expect("format");
    pool.create(thick("vm/a", 2 * EXTENT_BYTES)).expect("created");
    let keeper = Keeper::start(pool, KeeperOptions::default()).expect("started");
    let other = keeper.clone();
    keeper.stop();
    let disk = crate::io::file::FileDisk::open(&path, Duration::ZERO).expect("free at once");
    let mut pool = Pool::open(Box::new(disk)).expect("opens");
    assert!(pool.check().is_clean() && pool.find("vm/a").is_some());
    other.stop();
}

#[test]
fn a_panic_on_the_pool_ends_the_keeper_which_says_so_to_all_who_ask() {
    let mut pool = make(&SimDisk::new(24 * MIB), None);
    let id = pool.create(thin("vm/a", 4 * MIB)).expect("created");
    let keeper = Keeper::start(pool, KeeperOptions::default()).expect("started");
    assert_eq!(keeper.failure(), None);
    let error = keeper.call(|_| panic!("planted")).expect_err("it panicked");
    assert_eq!(error.kind(), ErrorKind::Fenced);
    assert!(error.to_string().contains("(planted)"), "{error}");
    // Half of what the call did may be in memory: nobody builds on that.
    let error = keeper.call(|pool| pool.name().to_owned()).expect_err("nobody works on it");
    assert_eq!(error.kind(), ErrorKind::Fenced);
    let error = keeper.resize(id, 8 * MIB, Duration::ZERO).expect_err("nobody works on it");
    assert!(error.to_string().contains("until vflashd is restarted"), "{error}");
    assert!(keeper.failure().is_some_and(|text| text.contains("planted")));
    keeper.stop();
}

#[test]
fn what_is_asked_of_a_stopped_keeper_is_refused() {
    let keeper =
        Keeper::start(make(&SimDisk::new(24 * MIB), None), KeeperOptions::default()).expect("ok");
    let other = keeper.clone();
    keeper.stop();
    assert_eq!(other.call(|_| ()).expect_err("stopped").kind(), ErrorKind::Gone);
    assert_eq!(other.failure(), None);
}

#[test]
fn a_volume_hears_of_its_extents_in_the_order_in_which_they_change() {
    let mut pool = make(&SimDisk::new(24 * MIB), None);
    let id = pool.create(thin("vm/a", 4 * MIB)).expect("created");
    let keeper = Keeper::start(pool, KeeperOptions::default()).expect("started");
    let (tell, told) = channel();
    let notify: Notify = Arc::new(move |_| _ = tell.send(std::thread::current().id()));
    let geometry = crate::io::sim::sim_geometry(24 * MIB);
    let counters = Arc::new(VolumeCounters::default());
    let options =
        VolumeOptions { notify: notify.clone(), full: FullPolicy::Wait, geometry, counters };
    let _volume = keeper.volume(id, options).expect("volume");
    keeper.messages.send(thin_message(id, 0, &notify)).expect("it runs");
    keeper.resize(id, 8 * MIB, Duration::ZERO).expect("grown");
    let threads: Vec<_> = (0..2).map(|_| told.recv().expect("told")).collect();
    let own = keeper.call(|_| std::thread::current().id()).expect("it runs");
    assert_eq!(threads, [own; 2], "answers and sizes come from one thread");
    keeper.stop();
}

#[test]
fn a_shrink_whose_volume_does_not_answer_is_given_up() {
    let mut pool = make(&SimDisk::new(24 * MIB), None);
    let id = pool.create(thick("vm/a", 4 * MIB)).expect("created");
    let keeper = Keeper::start(pool, KeeperOptions::default()).expect("started");
    let held = Arc::new(Mutex::new(Vec::new()));
    let inbox = held.clone();
    let notify: Notify = Arc::new(move |message| inbox.lock().expect("no panic").push(message));
    let geometry = crate::io::sim::sim_geometry(24 * MIB);
    let counters = Arc::new(VolumeCounters::default());
    let options = VolumeOptions { notify, full: FullPolicy::Wait, geometry, counters };
    let _volume = keeper.volume(id, options).expect("volume");
    let error = keeper.resize(id, MIB, Duration::from_millis(5)).expect_err("given up");
    assert_eq!(error.kind(), ErrorKind::Busy);
    let size = keeper.call(move |pool| pool.allocation(id).map(|found| found.size_bytes));
    assert_eq!(size.expect("runs"), Some(4 * MIB), "nothing was cut off");
    keeper.detached(id);
    keeper.resize(id, MIB, Duration::ZERO).expect("nobody to ask");
    keeper.stop();
}
