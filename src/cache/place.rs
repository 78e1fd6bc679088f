//! Where an allocation's bytes lie on the pool's device.

use crate::base::units::EXTENT_BYTES;
use crate::flash::Run;

/// The map of one allocation, complete from byte 0 to its size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Sorted by logical offset, without gaps, as few as can be.
    runs: Vec<Stretch>,
    size_bytes: u64,
}

/// Bytes that lie together on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stretch {
    logical: u64,
    physical: u64,
    bytes: u64,
}

/// A part of a range of the allocation: its offset in the range and on the device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Bytes from the start of the range.
    pub skip: u64,
    /// Bytes from the start of the device.
    pub offset: u64,
    pub length: u64,
}

impl Place {
    /// `size_bytes` of a thick allocation with these runs, in logical order.
    ///
    /// Panics if they leave a gap: the pool maps a thick allocation throughout.
    pub fn new(size_bytes: u64, runs: impl Iterator<Item = Run>) -> Self {
        let mut place = Self { runs: Vec::new(), size_bytes };
        for run in runs {
            let stretch = Stretch {
                logical: run.logical * EXTENT_BYTES,
                physical: run.physical * EXTENT_BYTES,
                bytes: run.count * EXTENT_BYTES,
            };
            place.push(stretch);
        }
        let end = place.runs.last().map_or(0, |last| last.logical + last.bytes);
        assert!(end >= size_bytes, "a thick allocation is mapped to its end");
        place
    }

    /// The whole of a device that holds nothing else, from its byte 0.
    pub fn whole(size_bytes: u64) -> Self {
        let runs = vec![Stretch { logical: 0, physical: 0, bytes: size_bytes }];
        Self { runs, size_bytes }
    }

    /// The same up to `size_bytes`.
    #[must_use]
    pub fn truncated(&self, size_bytes: u64) -> Self {
        assert!(size_bytes <= self.size_bytes, "what is cut off was there");
        let inside = |run: &&Stretch| run.logical < size_bytes;
        Self { runs: self.runs.iter().filter(inside).copied().collect(), size_bytes }
    }

    fn push(&mut self, stretch: Stretch) {
        let end = self.runs.last().map_or(0, |last| last.logical + last.bytes);
        assert_eq!(stretch.logical, end, "a thick allocation has no gap");
        match self.runs.last_mut() {
            Some(last) if last.physical + last.bytes == stretch.physical => {
                last.bytes += stretch.bytes;
            }
            _ => self.runs.push(stretch),
        }
    }

    /// Bytes of the allocation.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The range of the allocation as parts that lie together on the device, in order.
    pub fn parts(&self, offset: u64, length: u64) -> impl Iterator<Item = Part> + '_ {
        assert!(offset + length <= self.size_bytes, "a range lies within its allocation");
        let first = self.runs.partition_point(|run| run.logical + run.bytes <= offset);
        let (mut at, end) = (offset, offset + length);
        self.runs[first..].iter().map_while(move |run| {
            if at == end {
                return None;
            }
            let inside = at - run.logical;
            let part = (run.bytes - inside).min(end - at);
            let part = Part { skip: at - offset, offset: run.physical + inside, length: part };
            at += part.length;
            Some(part)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::units::MIB;

    fn run(logical: u64, physical: u64, count: u64) -> Run {
        Run { logical, physical, count, generation: 1 }
    }

    #[test]
    fn a_range_is_split_where_the_device_has_it_in_pieces() {
        let runs = [run(0, 7, 2), run(2, 9, 1), run(3, 3, 4)];
        let place = Place::new(6 * MIB + 4096, runs.into_iter());
        let parts = |offset, length| place.parts(offset, length).collect::<Vec<_>>();
        assert_eq!(parts(512, 3 * MIB - 512).len(), 1, "adjacent runs are one");
        let split = parts(3 * MIB - 4096, 8192);
        let expected = [
            Part { skip: 0, offset: 10 * MIB - 4096, length: 4096 },
            Part { skip: 4096, offset: 3 * MIB, length: 4096 },
        ];
        assert_eq!(split, expected);
        assert_eq!(parts(6 * MIB, 4096)[0].offset, 6 * MIB);
        let inside = Part { skip: 0, offset: 7 * MIB, length: 4096 };
        assert_eq!(parts(0, 4096), [inside], "and no further");
        assert_eq!(parts(MIB, 0), []);
        let shorter = place.truncated(4 * MIB);
        assert_eq!(shorter.parts(3 * MIB - 4096, 8192).collect::<Vec<_>>(), expected);
        assert_eq!(shorter.size_bytes(), 4 * MIB);
    }

    #[test]
    #[should_panic(expected = "no gap")]
    fn a_gap_is_our_own_mistake() {
        Place::new(4 * MIB, [run(0, 0, 1), run(2, 2, 2)].into_iter());
    }
}
