//! The index against a plain array of sectors.

use super::*;

const SECTORS: u64 = 32_768;

/// The newest version of one sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cell {
    Absent,
    /// Where the sector itself lies, and its piece's checksum.
    Stored(u64, u32),
    Zero(u64),
}

struct Pair {
    index: Index,
    model: Vec<Cell>,
    random: fastrand::Rng,
    next: u64,
}

impl Pair {
    fn new(seed: u64) -> Self {
        let random = fastrand::Rng::with_seed(seed);
        let model = vec![Cell::Absent; SECTORS as usize];
        Self { index: Index::new(1 << 20), model, random, next: 1 }
    }

    fn piece(&mut self) -> Piece {
        let start = self.random.u64(0..SECTORS);
        let count = self.random.u64(1..=BLOCK_SECTORS - start % BLOCK_SECTORS) as u8;
        let skip = self.random.u8(0..=8 - count);
        let stored = self.random.u8(skip + count..=8);
        self.next += 8;
        Piece { start, count, skip, stored, position: self.next, checksum: self.next as u32 }
    }

    fn range(&mut self, count_max: u64) -> (u64, u64) {
        let start = self.random.u64(0..SECTORS);
        (start, self.random.u64(0..=count_max.min(SECTORS - start)))
    }

    fn set(&mut self, start: u64, count: u64, only_absent: bool, cell: impl Fn(u64) -> Cell) {
        for sector in start..start + count {
            let place = &mut self.model[sector as usize];
            if !only_absent || *place == Cell::Absent {
                *place = cell(sector);
            }
        }
    }

    fn step(&mut self) {
        let kind = self.random.u32(0..100);
        match kind {
            0..88 => {
                let piece = self.piece();
                let older = kind >= 75;
                let first = piece.position + u64::from(piece.skip);
                let cell = |at| Cell::Stored(first + at - piece.start, piece.checksum);
                self.set(piece.start, piece.count.into(), older, cell);
                match older {
                    true => self.index.insert_if_absent(piece),
                    false => self.index.insert(piece),
                }
            }
            88..96 => {
                let (start, count) = self.range(64);
                self.next += 8;
                let (older, position) = (kind >= 92, self.next);
                self.set(start, count, older, |_| Cell::Zero(position));
                match older {
                    true => self.index.insert_zero_if_absent(start, count, position),
                    false => self.index.insert_zero(start, count, position),
                }
            }
            96..99 => {
                let most = if self.random.u8(0..8) > 0 { 64 } else { 4000 };
                let (start, count) = self.range(most);
                self.set(start, count, false, |_| Cell::Absent);
                self.index.remove(start, count);
            }
            _ if self.random.u8(0..8) == 0 => self.sweep(),
            _ => {}
        }
    }

    /// Drops what lies in a stretch of the log, as when a segment is given back.
    fn sweep(&mut self) {
        let gone = self.random.u64(0..self.next);
        let gone = gone..gone + self.next / 4;
        let (mut cursor, mut calls) = (0, 0);
        while !self.index.sweep(&mut cursor, 100, |swept| !gone.contains(&swept.position)) {
            calls += 1;
            assert!(calls < 10_000, "a sweep comes to its end");
        }
        for place in &mut self.model {
            // A sector's piece is named by the checksum, which is its position.
            let position = match *place {
                Cell::Absent => continue,
                Cell::Stored(_, checksum) => u64::from(checksum),
                Cell::Zero(position) => position,
            };
            if gone.contains(&position) {
                *place = Cell::Absent;
            }
        }
    }

    fn compare(&self, start: u64, count: u64) {
        let mut found = Vec::new();
        self.index.lookup(start, count, &mut found);
        let mut at = start;
        let mut absent_before = false;
        for one in found {
            let (from, length, absent) = match one {
                Found::Piece(piece, _) => (piece.start, u64::from(piece.count), false),
                Found::Zero { start, count } => (start, count, false),
                Found::Absent { start, count } => (start, count, true),
            };
            assert!(from == at && length > 0, "in order and without gaps: {one:?} at {at}");
            assert!(!(absent && absent_before), "absent ranges are whole");
            absent_before = absent;
            for sector in from..from + length {
                let model = self.model[sector as usize];
                match (one, model) {
                    (Found::Piece(piece, _), Cell::Stored(position, checksum)) => {
                        let here = piece.position + u64::from(piece.skip) + sector - piece.start;
                        assert_eq!((here, piece.checksum), (position, checksum), "at {sector}");
                    }
                    (Found::Zero { .. }, Cell::Zero(_)) | (Found::Absent { .. }, Cell::Absent) => {}
                    _ => panic!("sector {sector}: {one:?}, and the array says {model:?}"),
                }
            }
            at = from + length;
        }
        assert_eq!(at, start + count, "the whole range is covered");
    }

    /// The counters tell the truth about the leaves.
    fn audit(&self) {
        let leaves = self.index.leaves.values();
        assert_eq!(self.index.pieces, leaves.clone().map(Vec::len).sum::<usize>());
        assert_eq!(self.index.capacity, leaves.clone().map(Vec::capacity).sum::<usize>());
        assert!(leaves.clone().all(|leaf| leaf.len() <= LEAF_PIECES_MAX));
        let bounds = self.index.leaves.keys().skip(1).copied().chain([u64::MAX]);
        for ((key, leaf), next) in self.index.leaves.iter().zip(bounds) {
            assert!(leaf.iter().all(|piece| (*key..next).contains(&piece.block())), "I2, I3");
            assert!(leaf.is_sorted(), "sorted");
        }
    }
}

#[test]
fn the_index_agrees_with_an_array_of_sectors() {
    for seed in 0..4 {
        let mut pair = Pair::new(seed);
        let mut leaves = 0;
        for step in 0..40_000 {
            pair.step();
            leaves = leaves.max(pair.index.leaves.len());
            let (start, count) = pair.range(40);
            pair.compare(start, count);
            if step % 500 == 0 {
                pair.compare(0, SECTORS);
                pair.audit();
            }
        }
        assert!(leaves > 8, "leaves were split: {leaves}");
    }
}

#[test]
fn a_piece_is_packed_and_unpacked() {
    let piece = Piece {
        start: SECTORS_MAX - 3,
        count: 3,
        skip: 5,
        stored: 8,
        position: SECTORS_MAX - 1,
        checksum: u32::MAX,
    };
    assert_eq!(Packed::new(piece).piece(), piece);
    let least = Piece { start: 0, count: 1, skip: 0, stored: 1, position: 0, checksum: 0 };
    assert_eq!(Packed::new(least).piece(), least);
}

#[test]
fn an_index_that_was_emptied_gives_its_memory_back() {
    let mut index = Index::new(1 << 20);
    let empty = index.memory_bytes();
    for block in 0..20_000 {
        let start = block * BLOCK_SECTORS;
        index.insert(Piece { start, count: 8, skip: 0, stored: 8, position: start, checksum: 0 });
    }
    assert!(!index.is_full(), "{} bytes", index.memory_bytes());
    let mut cursor = 0;
    // Every 50th stays: small leaves join.
    while !index.sweep(&mut cursor, 1000, |swept| swept.position % 400 == 0) {}
    assert_eq!(index.len(), 400);
    assert!(index.memory_bytes() < 400 * 24, "{} bytes", index.memory_bytes());
    index.remove(0, SECTORS_MAX);
    assert!(index.is_empty());
    assert!(index.memory_bytes() <= empty + 16 * PIECE_BYTES, "{} bytes", index.memory_bytes());
}

#[test]
fn a_mark_stays_with_its_block_until_its_last_piece_goes() {
    const BLOCKS: u64 = 600;
    let mut index = Index::new(1 << 20);
    index.watch();
    let mut marks = vec![None; BLOCKS as usize];
    let mut random = fastrand::Rng::with_seed(3);
    for step in 0..60_000 {
        let block = random.u64(0..BLOCKS);
        let start = block * BLOCK_SECTORS + random.u64(0..BLOCK_SECTORS);
        let count = random.u64(1..=(block + 1) * BLOCK_SECTORS - start);
        match random.u8(0..8) {
            0 => index.remove(start, count),
            1 => index.drop_block(block),
            2 => index.insert_zero(start, count, step),
            3 => {
                let mark = Mark::from_bits(random.u8(..));
                index.set_mark(block, mark);
                marks[block as usize] = marks[block as usize].map(|_| mark);
            }
            _ => {
                let (count, position) = (count as u8, step * 8);
                let piece = Piece { start, count, skip: 0, stored: count, position, checksum: 0 };
                index.insert(piece);
                marks[block as usize].get_or_insert(Mark::default());
                assert!(index.pieces_of(block).any(|other| other == piece));
            }
        }
        if index.pieces_of(block).next().is_none() {
            marks[block as usize] = None;
        }
        let other = random.u64(0..BLOCKS);
        assert_eq!(index.mark(other), marks[other as usize], "step {step}, block {other}");
        let whole = index.pieces_of(other).next().filter(|piece| piece.count == 8);
        assert_eq!(index.whole(other), whole);
        let mut found = Vec::new();
        index.lookup(other * BLOCK_SECTORS, BLOCK_SECTORS, &mut found);
        for one in found {
            let Found::Piece(_, mark) = one else { continue };
            assert_eq!(Some(mark), marks[other as usize], "step {step}, block {other}");
        }
    }
    let mut displaced = Vec::new();
    index.displaced(&mut displaced);
    assert!(displaced.len() > 10_000, "{}", displaced.len());
}
