//! Sets of extents: runs that never overlap and never touch (touching ones are merged).

use crate::base::units::EXTENT_BYTES;
use std::collections::BTreeMap;

/// Extents `start` to `start + count`, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExtentRange {
    pub start: u64,
    pub count: u64,
}

impl ExtentRange {
    /// The first extent after the range; saturates, so that a range read from flash may be asked.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.count)
    }

    /// Bytes from the start of the device (or volume, for logical extents).
    pub fn offset(&self) -> u64 {
        self.start * EXTENT_BYTES
    }

    pub fn bytes(&self) -> u64 {
        self.count * EXTENT_BYTES
    }

    pub fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

/// A set of extents as runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtentSet {
    runs: BTreeMap<u64, u64>,
    total: u64,
}

impl ExtentSet {
    /// Adds the range; false, and nothing is changed, if any of it is already in the set.
    #[must_use]
    pub fn insert(&mut self, range: ExtentRange) -> bool {
        if range.count == 0 {
            return true;
        }
        let before =
            self.runs.range(..range.end()).next_back().map(|(start, count)| (*start, *count));
        if before.is_some_and(|(start, count)| start + count > range.start) {
            return false;
        }
        self.total += range.count;
        let mut merged = range;
        if let Some((start, count)) = before.filter(|(start, count)| start + count == range.start) {
            merged = ExtentRange { start, count: count + range.count };
        }
        if let Some(count) = self.runs.remove(&range.end()) {
            merged.count += count;
        }
        self.runs.insert(merged.start, merged.count);
        true
    }

    /// Takes the range out; false, and nothing is changed, unless all of it is in the set.
    #[must_use]
    pub fn remove(&mut self, range: ExtentRange) -> bool {
        if range.count == 0 {
            return true;
        }
        let Some(run) = self.run_of(range.start).filter(|run| run.end() >= range.end()) else {
            return false;
        };
        self.runs.remove(&run.start);
        if run.start < range.start {
            self.runs.insert(run.start, range.start - run.start);
        }
        if range.end() < run.end() {
            self.runs.insert(range.end(), run.end() - range.end());
        }
        self.total -= range.count;
        true
    }

    fn run_of(&self, extent: u64) -> Option<ExtentRange> {
        let (start, count) = self.runs.range(..=extent).next_back()?;
        Some(ExtentRange { start: *start, count: *count }).filter(|run| extent < run.end())
    }

    pub fn contains(&self, range: ExtentRange) -> bool {
        self.run_of(range.start).is_some_and(|run| run.end() >= range.end())
    }

    pub fn iter(&self) -> impl Iterator<Item = ExtentRange> + '_ {
        self.runs.iter().map(|(start, count)| ExtentRange { start: *start, count: *count })
    }

    /// Extents in the set.
    pub fn total(&self) -> u64 {
        self.total
    }

    pub fn runs(&self) -> usize {
        self.runs.len()
    }

    /// The first run that ends after `extent`, without what lies before it.
    pub fn first_from(&self, extent: u64) -> Option<ExtentRange> {
        if let Some(run) = self.run_of(extent) {
            return Some(ExtentRange { start: extent, count: run.end() - extent });
        }
        let (start, count) = self.runs.range(extent..).next()?;
        Some(ExtentRange { start: *start, count: *count })
    }

    /// `count` extents of the set in as few pieces as may be, `None` if there are not so many:
    /// those right at `near` if all fit there, else the first run that is large enough, else the
    /// largest runs. Takes nothing out.
    pub fn choose(&self, count: u64, near: Option<u64>) -> Option<Vec<ExtentRange>> {
        if count > self.total {
            return None;
        }
        if count == 0 {
            return Some(Vec::new());
        }
        if let Some(start) = near {
            let range = ExtentRange { start, count };
            if self.contains(range) {
                return Some(vec![range]);
            }
        }
        if let Some(run) = self.iter().find(|run| run.count >= count) {
            return Some(vec![ExtentRange { start: run.start, count }]);
        }
        let mut runs: Vec<ExtentRange> = self.iter().collect();
        runs.sort_by_key(|run| (std::cmp::Reverse(run.count), run.start));
        let mut left = count;
        let mut chosen = Vec::new();
        for run in runs {
            let part = run.count.min(left);
            chosen.push(ExtentRange { start: run.start, count: part });
            left -= part;
            if left == 0 {
                break;
            }
        }
        Some(chosen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn range(start: u64, count: u64) -> ExtentRange {
        ExtentRange { start, count }
    }

    #[test]
    fn random_operations_agree_with_a_set_of_numbers() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut set = ExtentSet::default();
        let mut model = BTreeSet::new();
        for _ in 0..20_000 {
            let range = range(random.u64(0..64), random.u64(0..6));
            let numbers: Vec<u64> = (range.start..range.end()).collect();
            if random.bool() {
                let fits = numbers.iter().all(|number| !model.contains(number));
                assert_eq!(set.insert(range), fits);
                if fits {
                    model.extend(numbers);
                }
            } else {
                let fits = numbers.iter().all(|number| model.contains(number));
                assert_eq!(set.remove(range), fits);
                if fits {
                    numbers.iter().for_each(|number| _ = model.remove(number));
                }
            }
            let flat: Vec<u64> = set.iter().flat_map(|run| run.start..run.end()).collect();
            assert_eq!(flat, model.iter().copied().collect::<Vec<_>>());
            assert_eq!(set.total(), model.len() as u64);
            let merged = set.iter().zip(set.iter().skip(1)).all(|(a, b)| a.end() < b.start);
            assert!(merged, "touching runs are merged");
            let from = random.u64(0..70);
            assert_eq!(
                set.first_from(from).map(|run| run.start),
                model.range(from..).next().copied()
            );
        }
    }

    #[test]
    fn choice_prefers_the_neighbour_then_one_run_then_few_pieces() {
        let mut set = ExtentSet::default();
        for run in [range(0, 2), range(10, 5), range(20, 3)] {
            assert!(set.insert(run));
        }
        assert_eq!(set.choose(2, Some(21)), Some(vec![range(21, 2)]));
        assert_eq!(set.choose(3, Some(21)), Some(vec![range(10, 3)]));
        assert_eq!(set.choose(7, None), Some(vec![range(10, 5), range(20, 2)]));
        assert_eq!(set.choose(11, None), None);
        assert_eq!(set.choose(0, None), Some(vec![]));
    }
}
