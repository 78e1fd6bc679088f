//! The reference model of a cached disk: what its guest and its backing may show, and when.
//!
//! The model knows every write in the order of its number (WON) and nothing of logs, caches or
//! drains. All suites judge by it. Each sector that a write puts on the disk tells the write and
//! the sector that it is of, so that every wrong sector can be named.
//!
//! - A *point* is the state after the writes 1..=N. What a guest sees after a crash, and what a
//!   grouped drain leaves, is exactly a point.
//! - An ordered drain leaves all epochs up to one, and any part of the next.
//! - A read sees, in each sector, a version no older than the last write that had been
//!   acknowledged when it was submitted, and no newer than what had been submitted when it ended.

use crate::base::units::SECTOR_BYTES;
use std::fmt;

const SECTOR: usize = SECTOR_BYTES as usize;

/// Marks a sector as one of ours.
const MAGIC: u64 = 0x7661_6C65_7374_6D70;

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    Zeros,
    /// Written by this write.
    Write(u64),
    /// Of another sector or write, or of nobody.
    Foreign,
}

/// A sector changed at `won`.
#[derive(Clone, Copy)]
struct Version {
    won: u64,
    zero: bool,
}

/// A sector that is not what it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    pub sector: u64,
    pub seen: Seen,
    /// The newest version that it may be.
    pub expected: Seen,
    /// Its write; also if that only zeroed the sector.
    pub expected_won: u64,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sector, seen, expected, expected_won } = self;
        write!(
            f,
            "sector {sector} holds {seen:?} instead of {expected:?} (of write {expected_won})"
        )
    }
}

/// See the module.
#[derive(Clone, Default)]
pub struct Model {
    /// Of each sector, ascending.
    versions: Vec<Vec<Version>>,
    /// Of each write, by WON - 1.
    epochs: Vec<u64>,
    epoch: u64,
    /// Sectors that were ever written or zeroed.
    touched: Vec<u64>,
}

/// The sector at `sector` as write `won` leaves it: it names both, and all of it depends on both.
pub fn sector(won: u64, sector: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    let mut mixed = won.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ sector.rotate_left(32) ^ MAGIC;
    let head = [MAGIC, won, sector];
    for (index, place) in bytes.chunks_exact_mut(8).enumerate() {
        mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9).wrapping_add(MAGIC);
        place.copy_from_slice(&head.get(index).unwrap_or(&mixed).to_le_bytes());
    }
    bytes
}

/// What write `won` puts into `count` sectors from `start`.
pub fn data(won: u64, start: u64, count: u64) -> Vec<u8> {
    (start..start + count).flat_map(|at| sector(won, at)).collect()
}

/// What the bytes of a sector say of themselves.
pub fn identify(at: u64, bytes: &[u8]) -> Seen {
    if bytes.iter().all(|byte| *byte == 0) {
        return Seen::Zeros;
    }
    let won =
        bytes.get(8..16).and_then(|word| word.first_chunk()).map(|word| u64::from_le_bytes(*word));
    match won.filter(|won| bytes == sector(*won, at)) {
        Some(won) => Seen::Write(won),
        None => Seen::Foreign,
    }
}

impl Model {
    /// A disk of zeros.
    pub fn new(sectors: u64) -> Self {
        Self { versions: vec![Vec::new(); sectors as usize], ..Self::default() }
    }

    pub fn sectors(&self) -> u64 {
        self.versions.len() as u64
    }

    /// The newest write's number; 0 before the first.
    pub fn head(&self) -> u64 {
        self.epochs.len() as u64
    }

    /// A write; its number. Its data are [`data`].
    pub fn write(&mut self, start: u64, count: u64) -> u64 {
        self.change(&[(start, count)], false)
    }

    /// A discard or write-zeroes of these ranges; its number.
    pub fn zero(&mut self, ranges: &[(u64, u64)]) -> u64 {
        self.change(ranges, true)
    }

    fn change(&mut self, ranges: &[(u64, u64)], zero: bool) -> u64 {
        self.epochs.push(self.epoch);
        let won = self.head();
        for at in ranges.iter().flat_map(|(start, count)| *start..start + count) {
            let versions = &mut self.versions[at as usize];
            if versions.is_empty() {
                self.touched.push(at);
            }
            versions.push(Version { won, zero });
        }
        won
    }

    /// A FLUSH of the guest lies behind all writes so far.
    pub fn flush(&mut self) {
        self.epoch += 1;
    }

    /// A crash undid the writes after `point`; the next one will be `next`, which is greater than
    /// the number of any write that a disk has seen.
    pub fn cut(&mut self, point: u64, next: u64) {
        self.epochs.truncate(next.saturating_sub(1) as usize);
        self.skip_to(next);
        for versions in &mut self.versions {
            versions.retain(|version| version.won <= point);
        }
    }

    /// Goes on with numbers from `won` on.
    pub fn skip_to(&mut self, won: u64) {
        while self.head() + 1 < won {
            self.epochs.push(self.epoch);
        }
    }

    /// Sectors that were ever changed, as few ranges, in order.
    pub fn touched(&self) -> Vec<(u64, u64)> {
        let mut sorted = self.touched.clone();
        sorted.sort_unstable();
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for at in sorted {
            match ranges.last_mut() {
                Some((start, count)) if *start + *count == at => *count += 1,
                _ => ranges.push((at, 1)),
            }
        }
        ranges
    }

    /// The version of a sector at a point.
    fn at(&self, sector: u64, point: u64) -> Version {
        let versions = &self.versions[sector as usize];
        let later = versions.partition_point(|version| version.won <= point);
        let last = later.checked_sub(1).map(|index| versions[index]);
        last.unwrap_or(Version { won: 0, zero: true })
    }

    fn seen(version: Version) -> Seen {
        if version.zero { Seen::Zeros } else { Seen::Write(version.won) }
    }

    /// What a sector may be when it is at `oldest` or any version up to `newest`.
    fn judge(&self, at: u64, seen: Seen, (oldest, newest): (u64, u64)) -> Result<(), Difference> {
        let first = self.at(at, oldest);
        if seen == Self::seen(first) {
            return Ok(());
        }
        let versions = &self.versions[at as usize];
        let later = versions.iter().skip_while(|version| version.won <= oldest);
        let mut later = later.take_while(|version| version.won <= newest);
        if later.any(|version| seen == Self::seen(*version)) {
            return Ok(());
        }
        let newest = self.at(at, newest);
        let expected = Self::seen(newest);
        Err(Difference { sector: at, seen, expected, expected_won: newest.won })
    }

    /// Whether the disk that `read` shows (sectors from, bytes into) is exactly the state at
    /// `point`. Only sectors that were ever changed are looked at.
    ///
    /// # Errors
    /// The first sector that is not.
    pub fn check_point(
        &self,
        point: u64,
        read: &mut dyn FnMut(u64, &mut [u8]),
    ) -> Result<(), Difference> {
        self.check(read, |at, seen| self.judge(at, seen, (point, point)))
    }

    /// Whether the disk is at `drained` with any part of the epoch that follows.
    ///
    /// # Errors
    /// The first sector that is not.
    pub fn check_epoch(
        &self,
        drained: u64,
        read: &mut dyn FnMut(u64, &mut [u8]),
    ) -> Result<(), Difference> {
        let newest = self.epoch_end(drained + 1);
        self.check(read, |at, seen| self.judge(at, seen, (drained, newest)))
    }

    /// The last write of the epoch of `won`.
    pub fn epoch_end(&self, won: u64) -> u64 {
        let epoch = self.epochs.get(won.saturating_sub(1) as usize);
        epoch
            .map_or(self.head(), |epoch| self.epochs.partition_point(|other| other <= epoch) as u64)
    }

    /// The first write of the epoch of `won`.
    pub fn epoch_start(&self, won: u64) -> u64 {
        let epoch = self.epochs.get(won.saturating_sub(1) as usize);
        epoch.map_or(self.head() + 1, |epoch| {
            self.epochs.partition_point(|other| other < epoch) as u64 + 1
        })
    }

    fn check(
        &self,
        read: &mut dyn FnMut(u64, &mut [u8]),
        judge: impl Fn(u64, Seen) -> Result<(), Difference>,
    ) -> Result<(), Difference> {
        for (start, count) in self.touched() {
            let mut bytes = vec![0; (count * SECTOR_BYTES) as usize];
            read(start, &mut bytes);
            for (at, bytes) in (start..).zip(bytes.chunks_exact(SECTOR)) {
                judge(at, identify(at, bytes))?;
            }
        }
        Ok(())
    }

    /// Whether a read of `bytes` from `start` on may have returned them: writes up to `oldest` had
    /// been acknowledged when it was submitted, up to `newest` submitted when it ended.
    ///
    /// # Errors
    /// The first sector that it may not.
    pub fn check_read(
        &self,
        start: u64,
        bytes: &[u8],
        (oldest, newest): (u64, u64),
    ) -> Result<(), Difference> {
        for (at, bytes) in (start..).zip(bytes.chunks_exact(SECTOR)) {
            self.judge(at, identify(at, bytes), (oldest, newest))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk that shows these versions, sector by sector; 0 is zeros.
    fn disk(wons: &[u64]) -> impl FnMut(u64, &mut [u8]) + '_ {
        |start, bytes: &mut [u8]| {
            for (at, bytes) in (start..).zip(bytes.chunks_exact_mut(SECTOR)) {
                match wons[at as usize] {
                    0 => bytes.fill(0),
                    won => bytes.copy_from_slice(&sector(won, at)),
                }
            }
        }
    }

    /// Writes A(0..2), B(1..3), FLUSH, zeroes 2, C(0..1).
    fn four_writes() -> Model {
        let mut model = Model::new(4);
        assert_eq!((model.write(0, 2), model.write(1, 2)), (1, 2));
        model.flush();
        assert_eq!((model.zero(&[(2, 1)]), model.write(0, 1)), (3, 4));
        model
    }

    #[test]
    fn a_point_is_the_state_after_its_writes_and_no_other() {
        let model = four_writes();
        let states = [[0, 0, 0], [1, 1, 0], [1, 2, 2], [1, 2, 0], [4, 2, 0]];
        for (point, state) in states.iter().enumerate() {
            for (asked, other) in states.iter().enumerate() {
                let same = other == state;
                let found = model.check_point(asked as u64, &mut disk(state));
                assert_eq!(found.is_ok(), same, "point {point} taken for {asked}: {found:?}");
            }
        }
        let mixed = model.check_point(4, &mut disk(&[4, 1, 0])).unwrap_err();
        assert_eq!(mixed.to_string(), "sector 1 holds Write(1) instead of Write(2) (of write 2)");
    }

    #[test]
    fn an_ordered_drain_may_show_any_part_of_one_epoch() {
        let model = four_writes();
        for (state, legal) in [
            ([0, 0, 0], true),
            ([0, 2, 2], true),
            ([1, 1, 2], true),
            ([4, 1, 0], false),
            ([0, 2, 0], true),
        ] {
            assert_eq!(model.check_epoch(0, &mut disk(&state)).is_ok(), legal, "{state:?}");
        }
        for (state, legal) in [([1, 2, 0], true), ([4, 2, 2], true), ([4, 1, 0], false)] {
            assert_eq!(model.check_epoch(2, &mut disk(&state)).is_ok(), legal, "{state:?}");
        }
        assert_eq!((model.epoch_start(2), model.epoch_end(1)), (1, 2));
        assert_eq!((model.epoch_start(4), model.epoch_end(3)), (3, 4));
    }

    #[test]
    fn a_sector_of_another_place_or_of_nobody_is_foreign() {
        let mut bytes = sector(7, 3);
        assert_eq!(identify(3, &bytes), Seen::Write(7));
        assert_eq!(identify(4, &bytes), Seen::Foreign);
        bytes[100] ^= 1;
        assert_eq!(identify(3, &bytes), Seen::Foreign);
        let model = four_writes();
        assert!(model.check_read(0, &data(1, 0, 2), (0, 1)).is_ok());
        assert!(model.check_read(0, &data(1, 0, 2), (2, 4)).is_err(), "1 was overwritten by 2");
    }
}
