//! The ghost list: which blocks were dropped lately, in 2 bytes each and without their data.
//!
//! A table of sets of 16 entries. An entry is the age at which it came (4 bits) and a fingerprint
//! (12 bits, 0: free). It lives for [`WINDOW_AGES`] ages, an eighth of the window each, so for 1 to
//! 1.125 windows of insertions. Ages come round after 16: every insertion also clears one set of
//! what is over age, in turn, so that no entry is old enough to seem young again.
//!
//! What it may get wrong: of 1000 blocks that were never here it takes 4 for known, and up to
//! 3 in 100 are forgotten early, because their set was full. Both cost a miss or a write, nothing
//! else.

use super::mix;

const WAYS: usize = 16;

/// Ages that make a window.
const WINDOW_AGES: u16 = 8;

const AGES: u16 = 16;

const FINGERPRINT_BITS: u32 = 12;

/// Entries that the table has for 100 of the window: some sets are fuller than others.
const SLACK_PERCENT: u64 = 135;

/// A table of less than a third of what it was made for is made anew, smaller.
const SHRINK_FACTOR: usize = 3;

/// See the module.
#[derive(Default)]
pub(super) struct Ghost {
    sets: Vec<[u16; WAYS]>,
    /// Insertions that an entry outlives.
    window: u64,
    age: u16,
    /// Insertions left of this age.
    left: u64,
    sweep: usize,
}

impl Ghost {
    /// From now on an entry outlives `window` insertions. A table that is too small or far too
    /// large is made anew and has forgotten all.
    pub(super) fn resize(&mut self, window: u64) {
        let sets = ((window * SLACK_PERCENT / 100) as usize).div_ceil(WAYS).max(1);
        if sets > self.sets.len() || sets * SHRINK_FACTOR < self.sets.len() {
            self.sets = vec![[0; WAYS]; sets];
            self.sweep = 0;
        }
        self.window = window;
        self.left = self.left.min(self.age_length()).max(1);
    }

    fn age_length(&self) -> u64 {
        self.window.div_ceil(u64::from(WINDOW_AGES)).max(1)
    }

    /// Set and fingerprint.
    fn place(&self, block: u64) -> (usize, u16) {
        let hash = mix(block);
        let set = ((hash >> 32) * self.sets.len() as u64) >> 32;
        let fingerprint = (hash as u16 & ((1 << FINGERPRINT_BITS) - 1)).max(1);
        (set as usize, fingerprint)
    }

    /// Ages since the entry came; `None`: the entry is free.
    fn age_of(&self, entry: u16) -> Option<u16> {
        (entry != 0).then(|| (self.age + AGES - (entry >> FINGERPRINT_BITS)) % AGES)
    }

    fn find(&self, block: u64) -> Option<(usize, usize)> {
        let (set, fingerprint) = self.place(block);
        let known = |entry: &u16| {
            entry & ((1 << FINGERPRINT_BITS) - 1) == fingerprint
                && self.age_of(*entry).is_some_and(|age| age <= WINDOW_AGES)
        };
        self.sets[set].iter().position(known).map(|way| (set, way))
    }

    pub(super) fn contains(&self, block: u64) -> bool {
        self.find(block).is_some()
    }

    /// Forgets a block; whether it was known.
    pub(super) fn take(&mut self, block: u64) -> bool {
        let found = self.find(block);
        if let Some((set, way)) = found {
            self.sets[set][way] = 0;
        }
        found.is_some()
    }

    pub(super) fn insert(&mut self, block: u64) {
        self.left -= 1;
        if self.left == 0 {
            self.age = (self.age + 1) % AGES;
            self.left = self.age_length();
        }
        let sets = self.sets.len();
        // At least twice round the table in the ages between "over age" and "young again".
        for _ in 0..1 + sets as u64 / self.window.max(1) {
            self.clear_old(self.sweep);
            self.sweep = (self.sweep + 1) % sets;
        }
        let (set, fingerprint) = self.place(block);
        let oldest = |way: &usize| self.age_of(self.sets[set][*way]).map_or(AGES, |age| age);
        let way = (0..WAYS).max_by_key(oldest).expect("a set has ways");
        self.sets[set][way] = self.age << FINGERPRINT_BITS | fingerprint;
    }

    fn clear_old(&mut self, set: usize) {
        for way in 0..WAYS {
            if self.age_of(self.sets[set][way]).is_some_and(|age| age > WINDOW_AGES) {
                self.sets[set][way] = 0;
            }
        }
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.sets.capacity() * size_of::<[u16; WAYS]>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_known_for_a_window_and_then_forgotten() {
        for window in [64, 1000, 50_000_u64] {
            let mut ghost = Ghost::default();
            ghost.resize(window);
            let (mut early, mut late, mut asked) = (0, 0, 0);
            for block in 0..window * 6 {
                ghost.insert(block * 7);
                if let Some(young) = block.checked_sub(window * 3 / 4) {
                    early += u64::from(!ghost.contains(young * 7));
                    asked += 1;
                }
                // After a window, and after all ages have come round.
                for past in [window * 5 / 4 + 2, window * 17 / 8 + 2] {
                    let old = block.checked_sub(past);
                    late += u64::from(old.is_some_and(|old| ghost.contains(old * 7)));
                }
            }
            assert!(early * 33 <= asked, "window {window}: {early} of {asked} forgotten early");
            assert!(late * 50 <= asked, "window {window}: {late} of {asked} known for too long");
        }
    }

    #[test]
    fn what_never_came_is_hardly_ever_known_and_what_is_taken_is_gone() {
        let mut ghost = Ghost::default();
        ghost.resize(10_000);
        (0..30_000).for_each(|block| ghost.insert(block));
        let wrong = (100_000..200_000).filter(|block| ghost.contains(*block)).count();
        assert!(wrong < 600, "{wrong} of 100000");
        assert!(ghost.take(29_999));
        assert!(!ghost.take(29_999) || wrong > 0);
        assert!(ghost.memory_bytes() <= 10_000 * 3, "{}", ghost.memory_bytes());
    }
}
