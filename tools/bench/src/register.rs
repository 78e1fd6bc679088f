//! Whether a history of reads and writes of registers can have happened one at a time.
//!
//! Every write has a value of its own, so that a read names the write that it saw. All operations
//! that name one value are a *cluster*, whose *zone* lies between the earliest end and the latest
//! begin of any of them. Where something ended before another began, the zone is *forward*: the
//! register held the value all that while. Else it is *backward*: all of them overlap, and one
//! instant in the zone is enough. The history is linearizable if and only if no read ended before
//! its write began, no two forward zones overlap, and no backward zone lies within a forward one
//! (Gibbons and Korach, "Testing shared memories"). That takes no longer than sorting.

use std::collections::HashMap;

/// What a register holds before the first write.
pub const INITIAL: u64 = 0;

/// An operation on one register, in nanoseconds of one clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    pub register: u32,
    pub write: bool,
    /// Written, or seen.
    pub value: u64,
    pub begun: u64,
    /// `u64::MAX`: nobody knows whether it was done.
    pub ended: u64,
}

/// All operations that name one value.
#[derive(Clone, Copy, Debug)]
struct Cluster {
    value: u64,
    written: Option<u64>,
    first_ended: u64,
    last_begun: u64,
    /// A read of it, to be told about.
    read_ended: u64,
}

impl Cluster {
    fn new(value: u64) -> Self {
        let written = (value == INITIAL).then_some(0);
        let first_ended = if value == INITIAL { 0 } else { u64::MAX };
        Self { value, written, first_ended, last_begun: 0, read_ended: u64::MAX }
    }

    fn add(&mut self, operation: &Operation) {
        self.first_ended = self.first_ended.min(operation.ended);
        self.last_begun = self.last_begun.max(operation.begun);
        match operation.write {
            true => self.written = Some(operation.begun),
            false => self.read_ended = self.read_ended.min(operation.ended),
        }
    }

    fn is_forward(&self) -> bool {
        self.first_ended < self.last_begun
    }
}

/// Where the history of one register cannot have happened; at most a few of all such places.
pub fn check(operations: &mut [Operation], told_max: usize) -> Vec<String> {
    operations.sort_unstable_by_key(|operation| (operation.register, operation.begun));
    let registers = operations.chunk_by(|one, other| one.register == other.register);
    registers.flat_map(check_one).take(told_max).collect()
}

fn check_one(operations: &[Operation]) -> Vec<String> {
    let register = operations.first().map_or(0, |operation| operation.register);
    let mut clusters: HashMap<u64, Cluster> = HashMap::new();
    for operation in operations {
        let cluster = clusters.entry(operation.value);
        cluster.or_insert_with(|| Cluster::new(operation.value)).add(operation);
    }
    let mut wrong = Vec::new();
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    for cluster in clusters.into_values() {
        let Cluster { value, written, read_ended, .. } = cluster;
        match written {
            None => wrong.push(format!("block {register}: value {value:#x} was never written")),
            Some(begun) if read_ended < begun => {
                wrong.push(format!("block {register}: value {value:#x} was read before its write"));
            }
            Some(_) if cluster.is_forward() => forward.push(cluster),
            Some(_) => backward.push(cluster),
        }
    }
    forward.sort_unstable_by_key(|zone| zone.first_ended);
    for pair in forward.windows(2) {
        if pair[1].first_ended < pair[0].last_begun {
            wrong.push(overlap(register, &pair[0], &pair[1]));
        }
    }
    for zone in backward {
        let before = forward.partition_point(|other| other.first_ended < zone.last_begun);
        if let Some(around) = before.checked_sub(1).map(|at| forward[at])
            && zone.first_ended < around.last_begun
        {
            wrong.push(overlap(register, &around, &zone));
        }
    }
    wrong
}

fn overlap(register: u32, one: &Cluster, other: &Cluster) -> String {
    format!(
        "block {register}: value {:#x} was there at {} and at {} ns, and {:#x} at {} and {} ns: \
         one of them was read when it had been overwritten",
        one.value,
        one.first_ended,
        one.last_begun,
        other.value,
        other.first_ended,
        other.last_begun
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(value: u64, begun: u64, ended: u64) -> Operation {
        Operation { register: 0, write: true, value, begun, ended }
    }

    fn read(value: u64, begun: u64, ended: u64) -> Operation {
        Operation { write: false, ..write(value, begun, ended) }
    }

    fn is_right(operations: &[Operation]) -> bool {
        check(&mut operations.to_vec(), 10).is_empty()
    }

    #[test]
    fn what_overlaps_may_have_happened_in_either_order() {
        assert!(is_right(&[write(1, 0, 10), read(0, 1, 2), read(1, 3, 4), read(1, 20, 21)]));
        assert!(is_right(&[write(1, 1, 10), write(2, 2, 9), read(2, 11, 12), read(2, 13, 14)]));
        assert!(is_right(&[write(1, 1, 10), write(2, 2, 9), read(1, 11, 12)]));
        assert!(is_right(&[write(1, 5, u64::MAX), read(1, 7, 8)]), "nobody was told, yet it is");
    }

    #[test]
    fn what_was_overwritten_is_not_read_again() {
        let stale = [write(1, 1, 2), write(2, 3, 4), read(1, 5, 6)];
        assert!(!is_right(&stale));
        assert!(!is_right(&[write(1, 1, 2), read(0, 3, 4)]), "the initial value is overwritten");
        let inversion = [write(1, 1, 10), read(1, 2, 3), read(0, 4, 5)];
        assert!(!is_right(&inversion), "who reads after a reader of the new sees no older");
        let between = [write(1, 1, 2), read(1, 9, 10), write(2, 4, 5)];
        assert!(!is_right(&between), "a write within the life of another value");
    }

    #[test]
    fn what_was_never_written_or_not_yet_is_not_read() {
        assert!(!is_right(&[read(9, 1, 2)]));
        assert!(!is_right(&[read(1, 1, 2), write(1, 3, 4)]));
    }

    /// Tries every order.
    fn can_happen(left: &mut Vec<Operation>, value: u64) -> bool {
        if left.is_empty() {
            return true;
        }
        let first_ended = left.iter().map(|operation| operation.ended).min().unwrap();
        for at in 0..left.len() {
            let operation = left[at];
            if operation.begun > first_ended || (!operation.write && operation.value != value) {
                continue;
            }
            left.remove(at);
            let next = if operation.write { operation.value } else { value };
            let can = can_happen(left, next);
            left.insert(at, operation);
            if can {
                return true;
            }
        }
        false
    }

    #[test]
    fn the_verdict_is_that_of_trying_every_order() {
        let mut random = fastrand::Rng::with_seed(71);
        let (mut right, mut wrong) = (0, 0);
        for _ in 0..20_000 {
            // Distinct times: what ends at the instant another begins may be either.
            let mut times: Vec<u64> = (1..=14).collect();
            random.shuffle(&mut times);
            let mut next = 0;
            let count = random.usize(1..=7);
            let mut operations: Vec<Operation> = Vec::new();
            for pair in times.chunks(2).take(count) {
                let (begun, ended) = (pair[0].min(pair[1]), pair[0].max(pair[1]));
                operations.push(match random.bool() {
                    true => {
                        next += 1;
                        write(next, begun, ended)
                    }
                    false => read(random.u64(0..=3), begun, ended),
                });
            }
            let expected = can_happen(&mut operations.clone(), INITIAL);
            assert_eq!(is_right(&operations), expected, "{operations:?}");
            if expected { right += 1 } else { wrong += 1 }
        }
        assert!(right > 2_000 && wrong > 2_000, "{right} right, {wrong} wrong");
    }
}
