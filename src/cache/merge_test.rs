//! Merging and packing against a plain array of sectors.

use super::*;

const SECTORS: u64 = 20_000;

fn limits(data_bytes: u64, block_sectors: u64) -> Limits {
    Limits { data_bytes, spans: 4096, block_sectors }
}

/// What the group says of each sector: nothing, zeros, or the first byte of its data.
fn look(packed: &Merged) -> Vec<Option<u8>> {
    let mut seen = vec![None; SECTORS as usize];
    let (mut end, mut place) = (0, 0);
    for (run, memory) in packed.runs().iter().map(|run| (run.span, packed.memory(run))) {
        assert!(run.start >= end && run.count > 0, "in order and disjoint");
        end = run.end();
        let mut bytes = vec![0; run.count as usize];
        if let Content::Data(at) = run.content {
            assert!(at == place && run.count <= CHUNK_SECTORS, "data in order, one chunk a run");
            place += run.count;
            let mut data = vec![0; (run.count * SECTOR_BYTES) as usize];
            assert_eq!(gather(&memory, &mut data), data.len());
            bytes = data.chunks(SECTOR_BYTES as usize).map(|sector| sector[0]).collect();
        }
        for (sector, byte) in (run.start..end).zip(bytes) {
            seen[sector as usize] = Some(byte);
        }
    }
    assert_eq!(packed.run_sectors * SECTOR_BYTES, place * SECTOR_BYTES);
    let mut written = 0;
    for (at, segments) in packed.stretches() {
        assert_eq!(at, written, "one behind the other");
        written += segments.iter().map(|segment| segment.length() as u64).sum::<u64>();
        let last = written == packed.run_sectors * SECTOR_BYTES;
        assert!(last || written == at + CHUNK_BYTES, "whole chunks but for the last");
    }
    assert_eq!(written, packed.run_sectors * SECTOR_BYTES);
    seen
}

fn fill_blocks(merged: &mut Merged, model: &mut [Option<u8>]) {
    merged.align_zeros();
    for (start, count) in merged.missing() {
        let gap = &mut model[start as usize..(start + count) as usize];
        assert!(gap.iter().all(Option::is_none), "only what is missing");
        gap.fill(Some(77));
        merged.write(start, &vec![77; (count * SECTOR_BYTES) as usize]);
    }
    for block in model.chunks(8) {
        let some = block.iter().filter(|sector| sector.is_some()).count();
        assert!(some == 0 || some == 8, "blocks are whole with what was missing");
    }
}

#[test]
fn a_group_agrees_with_an_array_of_sectors() {
    for seed in 0..6 {
        let mut random = fastrand::Rng::with_seed(seed);
        let block = if seed % 2 == 0 { 1 } else { 8 };
        let mut merged = Merged::new(limits(8 << 20, block), DrainMemory::new(1 << 30));
        let mut model = vec![None; SECTORS as usize];
        for step in 0..2000 {
            let start = random.u64(0..SECTORS - 3000);
            let count = if random.u8(0..20) == 0 { 2500 } else { random.u64(1..40) };
            if !merged.has_room(count) {
                merged.clear();
                model.fill(None);
            }
            let byte = random.u8(1..);
            let zero = random.u8(0..4) == 0;
            match zero {
                true => merged.zero(start, count, random.bool()),
                false => merged.write(start, &vec![byte; (count * SECTOR_BYTES) as usize]),
            }
            let value = if zero { 0 } else { byte };
            model[start as usize..(start + count) as usize].fill(Some(value));
            if step % 50 == 0 {
                merged.pack();
                assert!(look(&merged) == model, "seed {seed}, step {step}");
            }
            if step % 200 == 199 {
                if block > 1 {
                    fill_blocks(&mut merged, &mut model);
                }
                merged.pack();
                assert!(look(&merged) == model, "seed {seed}, step {step}, filled");
                let whole = |run: &Run| {
                    run.span.start.is_multiple_of(block) && run.span.count.is_multiple_of(block)
                };
                assert!(merged.runs().iter().all(whole), "whole blocks");
                let (limits, bytes) = (merged.limits, merged.run_sectors * SECTOR_BYTES);
                assert!(bytes <= limits.data_bytes, "{}", bytes);
                assert!(merged.runs().len() <= limits.spans);
                merged.clear();
                model.fill(None);
            }
        }
    }
}

#[test]
fn a_hot_block_takes_its_room_once() {
    let mut merged = Merged::new(limits(64 << 10, 1), DrainMemory::new(1 << 30));
    for byte in 0..=255 {
        assert!(merged.has_room(8));
        merged.write(63, &[byte; 4096]);
    }
    merged.pack();
    assert_eq!((merged.run_sectors * SECTOR_BYTES, merged.runs().len()), (4096, 1));
}

#[test]
fn disks_share_memory_and_each_has_enough_to_go_on() {
    let memory = DrainMemory::new(8 << 20);
    let mut disks = [0, 1].map(|_| Merged::new(limits(32 << 20, 1), memory.clone()));
    let mut taken = [0; 2];
    for (disk, taken) in disks.iter_mut().zip(&mut taken) {
        while disk.has_room(1024) {
            disk.write(*taken * 1024, &[7; 512 << 10]);
            *taken += 1;
        }
    }
    assert_eq!(taken, [24, 8], "what one has of it the other lacks, beside 4 MiB of its own");
    assert_eq!(memory.left_bytes(), 0);
    disks[0].release();
    assert_eq!(memory.left_bytes(), 8 << 20);
    assert!(disks[1].has_room(1024), "there is some now");
    let [_, other] = disks;
    drop(other);
    assert_eq!(memory.left_bytes(), 8 << 20, "all of it is back");
}

#[test]
fn what_had_room_has_it_again_while_memory_is_short() {
    let memory = DrainMemory::new(8 << 20);
    let mut disks = [0, 1].map(|_| Merged::new(limits(32 << 20, 1), memory.clone()));
    let fill = |disk: &mut Merged| {
        let places = (0..).take_while(|at| {
            let room = disk.has_room(1024);
            if room {
                disk.write(at * 1024, &[7; 512 << 10]);
            }
            room
        });
        places.count()
    };
    let [first, second] = &mut disks;
    let whole = fill(first);
    first.clear_again();
    assert_eq!((fill(second), fill(first)), (8, whole), "the other got nothing of it");
    first.clear();
    assert!(second.has_room(1024), "a new group leaves some to others");
}
