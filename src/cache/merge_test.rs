//! Merging and packing against a plain array of sectors.

use super::*;

const SECTORS: u64 = 20_000;

fn limits(data_bytes: u64, block_sectors: u64) -> Limits {
    Limits { data_bytes, spans: 4096, block_sectors }
}

/// What the group says of each sector: nothing, zeros, or the first byte of its data.
fn look(packed: &Packed) -> Vec<Option<u8>> {
    let mut seen = vec![None; SECTORS as usize];
    let (mut end, mut place) = (0, 0);
    for run in packed.runs() {
        assert!(run.start >= end && run.count > 0, "in order and disjoint");
        end = run.end();
        let mut bytes = vec![0; run.count as usize];
        if let Content::Data(at) = run.content {
            assert!(at == place && run.count <= CHUNK_SECTORS, "data in order, one chunk a run");
            place += run.count;
            let data = packed.bytes(at, run.count);
            bytes = data.chunks(SECTOR_BYTES as usize).map(|sector| sector[0]).collect();
        }
        for (sector, byte) in (run.start..end).zip(bytes) {
            seen[sector as usize] = Some(byte);
        }
    }
    assert_eq!(packed.data_bytes(), place * SECTOR_BYTES);
    let written: u64 = packed.chunks(4096).map(|(_, segment)| segment.length() as u64).sum();
    assert_eq!(written, packed.data_bytes().next_multiple_of(4096));
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
        let mut merged = Merged::new(limits(8 << 20, block));
        let mut packed = Packed::default();
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
                merged.pack(&mut packed);
                assert!(look(&packed) == model, "seed {seed}, step {step}");
            }
            if step % 200 == 199 {
                if block > 1 {
                    fill_blocks(&mut merged, &mut model);
                }
                merged.pack(&mut packed);
                assert!(look(&packed) == model, "seed {seed}, step {step}, filled");
                let whole =
                    |run: &Span| run.start.is_multiple_of(block) && run.count.is_multiple_of(block);
                assert!(packed.runs().iter().all(whole), "whole blocks");
                let limits = merged.limits;
                assert!(packed.data_bytes() <= limits.data_bytes, "{}", packed.data_bytes());
                assert!(packed.runs().len() <= limits.spans);
                merged.clear();
                model.fill(None);
            }
        }
    }
}

#[test]
fn a_hot_block_takes_its_room_once() {
    let mut merged = Merged::new(limits(64 << 10, 1));
    for byte in 0..=255 {
        assert!(merged.has_room(8));
        merged.write(63, &[byte; 4096]);
    }
    let mut packed = Packed::default();
    merged.pack(&mut packed);
    assert_eq!((packed.data_bytes(), packed.runs().len()), (4096, 1));
}
