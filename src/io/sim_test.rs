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
