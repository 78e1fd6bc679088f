//! Points: the write-order numbers at which draining may stop, and the names they have.
//!
//! Every WON between the drain position and the head is a point, because the log keeps every
//! version until it is drained. What is remembered here is which of them have a meaning: the
//! guest's FLUSH boundaries (the edges of epochs), thinned with age, and marks set by people.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

/// Edges remembered at most.
const EDGES_MAX: usize = 4096;

/// Newest edges that are all kept.
const EDGES_EXACT: usize = 1024;

/// Marks of one disk at most.
pub const MARKS_MAX: usize = 1024;

/// Why a point has a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PointKind {
    /// The backing is here.
    Drained,
    /// A guest's FLUSH lies behind this write; the epoch that it ended.
    Flush {
        epoch: u64,
    },
    Mark(String),
    /// The newest committed write.
    Head,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Point {
    pub won: u64,
    pub kind: PointKind,
}

/// Why a point cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The backing is past it.
    Passed,
    /// It is not committed yet.
    Ahead,
    /// It lies inside a redo group that is committed: the backing goes to the group's end.
    InsideGroup,
}

/// A point that was asked for and cannot be, and the nearest ones that can.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub asked: u64,
    pub reason: Reason,
    /// In order; at least one.
    pub nearest: Vec<u64>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = match self.reason {
            Reason::Passed => "is behind what has been drained",
            Reason::Ahead => "has not been written yet",
            Reason::InsideGroup => "lies inside a group that is being applied as a whole",
        };
        let nearest: Vec<String> = self.nearest.iter().map(u64::to_string).collect();
        write!(f, "point {} {reason}; the nearest are {}", self.asked, nearest.join(", "))
    }
}

#[derive(Clone, Copy)]
struct Edge {
    won: u64,
    epoch: u64,
}

/// The points of one disk.
#[derive(Default)]
pub struct Points {
    drained: u64,
    head: u64,
    /// The end of the redo group that is committed to the sidecar and not yet applied.
    group_to: Option<u64>,
    edges: VecDeque<Edge>,
    marks: BTreeMap<String, u64>,
}

impl Points {
    /// The backing is at `drained`, the log ends at `head`.
    pub fn new(drained: u64, head: u64) -> Self {
        Self { drained, head, ..Self::default() }
    }

    pub fn drained(&self) -> u64 {
        self.drained
    }

    pub fn head(&self) -> u64 {
        self.head
    }

    /// Writes up to `won` are committed.
    pub fn committed(&mut self, won: u64) {
        assert!(won >= self.head, "the head moves forwards: {} to {won}", self.head);
        self.head = won;
    }

    /// A FLUSH of the guest lies behind `won` and ends `epoch`.
    pub fn edge(&mut self, won: u64, epoch: u64) {
        match self.edges.back_mut() {
            // FLUSHes without a write between are one point.
            Some(last) if last.won == won => last.epoch = epoch,
            Some(last) => {
                assert!(last.won < won, "edges come in order");
                self.edges.push_back(Edge { won, epoch });
            }
            None => self.edges.push_back(Edge { won, epoch }),
        }
        if self.edges.len() > EDGES_MAX {
            self.thin();
        }
    }

    /// Of the older edges every second goes; the oldest and all of the newest stay.
    fn thin(&mut self) {
        let older = self.edges.len() - EDGES_EXACT;
        let mut index = 0;
        self.edges.retain(|_| {
            index += 1;
            index > older || index % 2 == 1
        });
    }

    /// Names a point. False: there are [`MARKS_MAX`] already. A name that exists moves.
    pub fn mark(&mut self, name: &str, won: u64) -> bool {
        if self.marks.len() >= MARKS_MAX && !self.marks.contains_key(name) {
            return false;
        }
        self.marks.insert(name.to_owned(), won);
        true
    }

    /// The point that a name stands for.
    pub fn named(&self, name: &str) -> Option<u64> {
        self.marks.get(name).copied()
    }

    /// The redo group that ends at `to` is committed: the backing can only go there.
    pub fn group_committed(&mut self, to: u64) {
        assert!(to >= self.drained, "a group leads forwards");
        self.group_to = self.group_to.max(Some(to));
        self.head = self.head.max(to);
    }

    /// The backing is at `won`, durably: no point before it exists any more.
    pub fn set_drained(&mut self, won: u64) {
        assert!(won >= self.drained, "draining goes forwards: {} to {won}", self.drained);
        self.drained = won;
        self.head = self.head.max(won);
        self.group_to = self.group_to.filter(|to| *to > won);
        while self.edges.front().is_some_and(|edge| edge.won < won) {
            self.edges.pop_front();
        }
        self.marks.retain(|_, marked| *marked >= won);
    }

    /// The first point that the backing can still stop at.
    fn least(&self) -> u64 {
        self.group_to.unwrap_or(self.drained)
    }

    /// Whether draining can stop at exactly `won`.
    ///
    /// # Errors
    /// Why not, and where instead.
    pub fn reach(&self, won: u64) -> Result<(), Refusal> {
        let least = self.least();
        let reason = if won < self.drained {
            Reason::Passed
        } else if won < least {
            Reason::InsideGroup
        } else if won > self.head {
            Reason::Ahead
        } else {
            return Ok(());
        };
        let asked = won;
        let mut nearest = vec![asked.clamp(least, self.head)];
        // A named one beside it, on the side where points are.
        let mut edges = self.edges.iter().map(|edge| edge.won).filter(|edge| *edge > least);
        let named = match reason {
            Reason::Ahead => edges.rfind(|edge| *edge < self.head),
            _ => edges.min(),
        };
        nearest.extend(named);
        nearest.sort_unstable();
        nearest.dedup();
        Err(Refusal { asked, reason, nearest })
    }

    /// The epoch of a write that is not drained; `None`: the one that has not ended.
    pub fn epoch_of(&self, won: u64) -> Option<u64> {
        self.edges.iter().find(|edge| edge.won >= won).map(|edge| edge.epoch)
    }

    /// The newest edge after the drain position, up to `won`.
    pub fn newest_edge(&self, won: u64) -> Option<u64> {
        let edges = self.edges.iter().rev().map(|edge| edge.won);
        edges.skip_while(|edge| *edge > won).take_while(|edge| *edge > self.drained).next()
    }

    /// All points with a name, in order.
    pub fn list(&self) -> Vec<Point> {
        let edges =
            self.edges.iter().map(|edge| (edge.won, PointKind::Flush { epoch: edge.epoch }));
        let marks = self.marks.iter().map(|(name, won)| (*won, PointKind::Mark(name.clone())));
        let ends = [(self.drained, PointKind::Drained), (self.head, PointKind::Head)];
        let all = ends.into_iter().chain(edges).chain(marks);
        let mut points: Vec<Point> = all.map(|(won, kind)| Point { won, kind }).collect();
        points.sort();
        points
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The flushable points of a few writes, by brute force: all in drained..=head, less the
    /// inside of a committed group.
    #[test]
    fn what_can_be_reached_is_what_the_log_still_holds() {
        let mut points = Points::new(10, 20);
        points.edge(12, 1);
        points.edge(15, 2);
        let reachable = |points: &Points| -> Vec<u64> {
            (0..30).filter(|won| points.reach(*won).is_ok()).collect()
        };
        assert_eq!(reachable(&points), (10..=20).collect::<Vec<_>>());
        points.group_committed(14);
        assert_eq!(reachable(&points), (14..=20).collect::<Vec<_>>());
        let inside = points.reach(11).unwrap_err();
        assert_eq!((inside.reason, &inside.nearest[..]), (Reason::InsideGroup, &[14, 15][..]));
        points.set_drained(14);
        assert_eq!(reachable(&points), (14..=20).collect::<Vec<_>>());
        let text = points.reach(3).unwrap_err().to_string();
        assert_eq!(text, "point 3 is behind what has been drained; the nearest are 14, 15");
        let ahead = points.reach(21).unwrap_err();
        assert_eq!((ahead.reason, &ahead.nearest[..]), (Reason::Ahead, &[15, 20][..]));
    }

    #[test]
    fn names_go_when_the_backing_is_past_them() {
        let mut points = Points::new(0, 0);
        points.committed(5);
        points.edge(5, 1);
        points.edge(5, 2);
        points.committed(9);
        assert!(points.mark("before upgrade", 7));
        assert_eq!(points.named("before upgrade"), Some(7));
        let kinds: Vec<u64> = points.list().iter().map(|point| point.won).collect();
        assert_eq!(kinds, [0, 5, 7, 9], "two FLUSHes without a write are one point");
        assert_eq!(points.newest_edge(9), Some(5));
        assert_eq!(points.newest_edge(4), None);
        points.set_drained(7);
        assert_eq!(points.newest_edge(9), None);
        assert_eq!(points.named("before upgrade"), Some(7), "the backing is just there");
        points.set_drained(8);
        assert_eq!(points.named("before upgrade"), None);
    }

    #[test]
    fn edges_are_thinned_with_age_and_the_ends_stay() {
        let mut points = Points::new(0, 0);
        for won in 1..=100_000 {
            points.committed(won);
            points.edge(won, won);
            assert!(points.edges.len() <= EDGES_MAX);
        }
        assert_eq!(points.edges.front().map(|edge| edge.won), Some(1));
        let newest: Vec<u64> =
            points.edges.iter().rev().take(EDGES_EXACT).map(|edge| edge.won).collect();
        assert!(newest.iter().zip((1..=100_000).rev()).all(|(edge, won)| *edge == won));
        for mark in 0..MARKS_MAX {
            assert!(points.mark(&mark.to_string(), 100_000));
        }
        assert!(!points.mark("one more", 100_000) && points.mark("7", 100_000));
    }
}
