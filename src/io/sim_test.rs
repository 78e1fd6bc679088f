//! The simulated disk keeps the rules of the fault model, and breaks them only where it may.

use super::*;
use crate::io::blocking::Blocking;
use crate::io::crash::Explorer;
use std::collections::BTreeSet;

fn write(disk: &mut SimDisk, offset: u64, byte: u8, token: u64) -> buffer::PinnedBuffer {
    let memory = buffer::PinnedBuffer::new(1024);
    memory.segment().copy_from(&[byte; 1024]);
    let segments = [memory.segment()];
    let kind = OperationKind::Write;
    disk.submit(Operation { kind, offset, length: 1024, segments: &segments }, token);
    memory
}

fn flush(disk: &mut SimDisk, token: u64) {
    let kind = OperationKind::Flush;
    disk.submit(Operation { kind, offset: 0, length: 0, segments: &[] }, token);
}

fn drain(disk: &mut SimDisk) -> Vec<Completion> {
    let mut all = Vec::new();
    loop {
        let before = all.len();
        disk.poll(&mut all, true);
        if all.len() == before {
            return all;
        }
    }
}

#[test]
fn content_agrees_with_an_array() {
    let mut random = fastrand::Rng::with_seed(1);
    let (mut content, mut model) = (Content::default(), vec![0u8; 65_536]);
    for _ in 0..3000 {
        let start = random.usize(0..120) * 512;
        let length = random.usize(1..=(65_536 - start) / 512) * 512;
        if random.bool() {
            let byte = random.u8(..);
            content.write(start as u64, &vec![byte; length]);
            model[start..start + length].fill(byte);
        } else {
            content.zero(start as u64, length as u64);
            model[start..start + length].fill(0);
        }
        let mut seen = vec![1; 65_536];
        content.read(0, &mut seen);
        assert!(seen == model);
        let pages = model[8192..24_576].iter().all(|byte| *byte == 0);
        assert_eq!(content.is_zero(8192, 16_384), pages);
    }
}

#[test]
fn completions_come_at_the_handle_that_submitted_and_in_any_order_if_told_so() {
    let mut disk = SimDisk::new(65_536);
    let mut other = disk.clone();
    disk.set_faults(Faults { reorder: true, slow_polls: 2, ..Default::default() });
    let mut orders = BTreeSet::new();
    for _ in 0..20 {
        let memory: Vec<_> = (0..4).map(|token| write(&mut disk, token * 1024, 1, token)).collect();
        let mine = write(&mut other, 8192, 2, 9);
        let mut none = Vec::new();
        disk.poll(&mut none, false);
        assert_eq!(none, [], "slow");
        orders.insert(drain(&mut disk).iter().map(|done| done.token).collect::<Vec<_>>());
        assert_eq!(drain(&mut other), [Completion { token: 9, result: Ok(()) }]);
        drop((memory, mine));
    }
    assert!(orders.len() > 5, "{orders:?}");
}

#[test]
fn faults_strike_the_operation_they_name() {
    let disk = SimDisk::new(65_536);
    let mut blocking = Blocking::new(Box::new(disk.clone()));
    let fail = Failure { after: 2, forever: false, errno: Errno::EIO, torn: false };
    disk.set_faults(Faults { fail: Some(fail), ..Default::default() });
    let mut write = |byte| blocking.write_copies(&[0], &[byte; 512]);
    let results = [write(1), write(2), write(3), write(4)];
    assert_eq!(results, [Ok(()), Ok(()), Err(Errno::EIO), Ok(())]);
    disk.set_faults(Faults { full: true, ..Default::default() });
    assert_eq!(write(5), Err(Errno(libc::ENOSPC)));
    assert_eq!(disk.peek(0, 512), [4; 512], "what failed did not happen");
    let fail = Failure { after: 0, forever: true, ..fail };
    disk.set_faults(Faults { fail: Some(fail), ..Default::default() });
    assert_eq!((write(6), write(7)), (Err(Errno::EIO), Err(Errno::EIO)));
}

/// What two writes of two sectors each may look like after a power cut.
fn states(disk: &SimDisk) -> BTreeSet<Vec<u8>> {
    let mut seen = BTreeSet::new();
    for seed in 0..8 {
        Explorer::new(seed).explore(&disk.recording(), |_, disk| {
            let sectors = (0..4).map(|sector| disk.peek(sector * 512, 1)[0]).collect();
            seen.insert(sectors);
        });
    }
    seen
}

#[test]
fn a_write_under_way_when_the_flush_was_submitted_is_not_durable() {
    for ordered in [false, true] {
        let mut disk = SimDisk::new(65_536);
        disk.record();
        let first = write(&mut disk, 0, 1, 1);
        if ordered {
            drain(&mut disk);
        }
        flush(&mut disk, 2);
        drain(&mut disk);
        let second = write(&mut disk, 1024, 2, 3);
        drain(&mut disk);
        // With the second write in part or whole, the first is there only if the flush covered it.
        let lost = |state: &Vec<u8>| state[..2] != [1, 1] && state[2..] != [0, 0];
        assert_eq!(states(&disk).iter().any(lost), !ordered);
        let torn = |state: &Vec<u8>| state[2] != state[3];
        assert!(states(&disk).iter().any(torn), "sectors are kept one by one");
        drop((first, second));
    }
}

#[test]
fn what_a_failed_flush_should_have_covered_may_be_lost_though_a_later_one_succeeds() {
    let mut disk = SimDisk::new(65_536);
    disk.record();
    let first = write(&mut disk, 0, 1, 1);
    drain(&mut disk);
    let fail = Failure { after: 0, forever: false, errno: Errno::EIO, torn: false };
    disk.set_faults(Faults { fail: Some(fail), ..Default::default() });
    flush(&mut disk, 2);
    assert_eq!(drain(&mut disk)[0].result, Err(Errno::EIO));
    let second = write(&mut disk, 1024, 2, 3);
    drain(&mut disk);
    flush(&mut disk, 4);
    drain(&mut disk);
    let worst = Explorer::new(1).cut(&disk.recording(), u64::MAX, 0);
    assert_eq!((worst.peek(0, 1), worst.peek(1024, 1)), (vec![0], vec![2]));
    drop((first, second));
}

fn write_durable(disk: &mut SimDisk, offset: u64, byte: u8, token: u64) -> buffer::PinnedBuffer {
    let memory = buffer::PinnedBuffer::new(1024);
    memory.segment().copy_from(&[byte; 1024]);
    let segments = [memory.segment()];
    let kind = OperationKind::WriteDurable;
    disk.submit(Operation { kind, offset, length: 1024, segments: &segments }, token);
    memory
}

#[test]
fn a_durable_write_is_durable_when_it_completes_and_speaks_for_no_other() {
    let mut disk = SimDisk::new(65_536);
    disk.record();
    let plain = write(&mut disk, 0, 1, 1);
    drain(&mut disk);
    let durable = write_durable(&mut disk, 1024, 2, 2);
    let submitted = disk.position();
    drain(&mut disk);
    let completed = disk.position();
    let (mut lost_plain, mut in_doubt) = (0, BTreeSet::new());
    for seed in 0..8 {
        Explorer::new(seed).explore(&disk.recording(), |case, state| {
            let sectors = [2, 3].map(|sector| state.peek(sector * 512, 1)[0]);
            if case.point >= completed {
                assert_eq!(sectors, [2, 2], "it had completed");
                lost_plain += u64::from(state.peek(0, 1) != [1]);
            } else if case.point >= submitted {
                in_doubt.insert(sectors);
            }
        });
    }
    assert!(lost_plain > 0, "it is no flush");
    assert_eq!(in_doubt.len(), 4, "under way it is in doubt, sector by sector: {in_doubt:?}");
    drop((plain, durable));
}

#[test]
fn a_durable_write_that_failed_is_in_doubt() {
    let mut disk = SimDisk::new(65_536);
    disk.record();
    let fail = Failure { after: 0, forever: false, errno: Errno::EIO, torn: true };
    disk.set_faults(Faults { fail: Some(fail), ..Default::default() });
    let memory = write_durable(&mut disk, 0, 1, 1);
    assert_eq!(drain(&mut disk)[0].result, Err(Errno::EIO));
    let states = states(&disk);
    assert!(states.contains(&vec![0; 4]) && states.contains(&vec![1, 1, 0, 0]), "{states:?}");
    drop(memory);
}

/// Two disks, each written and not flushed: what each may have lost at the end.
#[test]
fn disks_recorded_together_end_at_one_instant_each_with_its_own_loss() {
    use crate::io::crash::Loss;
    let (mut flash, mut backing) = (SimDisk::new(65_536), SimDisk::new(65_536));
    SimDisk::record_together(&[&flash, &backing]);
    let first = write_durable(&mut flash, 0, 1, 1);
    drain(&mut flash);
    let second = write(&mut backing, 0, 2, 2);
    drain(&mut backing);
    let third = write_durable(&mut flash, 1024, 3, 3);
    drain(&mut flash);
    let end = flash.position();
    assert_eq!(end, backing.position(), "one time for both");
    for (loss, may_lose) in [(Loss::Unflushed, true), (Loss::UnderWay, false)] {
        let mut lost = 0;
        let recordings = [flash.recording(), backing.recording()];
        let losses = [Loss::Unflushed, loss];
        let states = Explorer::new(1).explore_together(&recordings, &losses, |case, disks| {
            let byte = |disk: usize, offset| disks[disk].peek(offset, 1)[0];
            assert!(byte(1, 0) == 0 || byte(0, 0) == 1, "the second came after the first");
            assert!(byte(0, 1024) == 0 || case.point >= end - 1, "the third is the last");
            if case.point == end {
                lost += u64::from(byte(1, 0) == 0);
            }
        });
        assert!(states > 5, "{states}");
        assert_eq!(lost > 0, may_lose, "{loss:?}");
    }
    drop((first, second, third));
}

#[test]
fn crash_points_can_be_sampled() {
    let mut disk = SimDisk::new(65_536);
    disk.record();
    let memory: Vec<_> = (0..40).map(|token| write_durable(&mut disk, 0, 1, token)).collect();
    drain(&mut disk);
    let explorer = Explorer { points_max: 7, samples: 1, ..Explorer::new(3) };
    let mut points = BTreeSet::new();
    explorer.explore(&disk.recording(), |case, _| _ = points.insert(case.point));
    assert_eq!(points.len(), 7);
    drop(memory);
}
