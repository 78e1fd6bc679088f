//! Sequential reads: a block that follows on the one read last, and how long a stream it goes on
//! with, which may be one of several at a time.

/// Streams that are followed at a time; guests read with a few threads.
const STREAMS: usize = 16;

#[derive(Clone, Copy, Default)]
struct Stream {
    /// The block that goes on with it.
    next: u64,
    /// Blocks read so far.
    length: u32,
    used: u64,
}

/// See the module.
#[derive(Default)]
pub(super) struct Streams {
    streams: [Stream; STREAMS],
    clock: u64,
    last: u64,
}

/// How a read stands to those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Followed {
    /// The block before it is the last one that was read.
    pub adjacent: bool,
    /// Blocks of its stream that came before; 0 if it goes on with none.
    pub before: u32,
}

impl Streams {
    /// Notes a read.
    pub(super) fn follow(&mut self, block: u64) -> Followed {
        let adjacent = block == self.last.wrapping_add(1);
        self.last = block;
        Followed { adjacent, before: self.goes_on(block) }
    }

    fn goes_on(&mut self, block: u64) -> u32 {
        self.clock += 1;
        let goes_on = |stream: &&mut Stream| stream.length > 0 && stream.next == block;
        if let Some(stream) = self.streams.iter_mut().find(goes_on) {
            let before = stream.length;
            stream.next = block + 1;
            stream.length = before.saturating_add(1);
            stream.used = self.clock;
            return before;
        }
        // The same block again is part of the same request.
        let repeats = |stream: &&mut Stream| stream.length > 0 && stream.next == block + 1;
        if let Some(stream) = self.streams.iter_mut().find(repeats) {
            stream.used = self.clock;
            return stream.length - 1;
        }
        let oldest = self.streams.iter_mut().min_by_key(|stream| stream.used);
        *oldest.expect("there are streams") =
            Stream { next: block + 1, length: 1, used: self.clock };
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_streams_are_told_apart_and_random_reads_are_none() {
        let mut streams = Streams::default();
        for step in 0..100 {
            for stream in 0..8_u64 {
                assert_eq!(streams.follow(stream * 1_000_000 + step).before, step as u32);
                assert_eq!(streams.follow(stream * 1_000_000 + step).before, step as u32);
            }
        }
        let mut random = fastrand::Rng::with_seed(2);
        let runs = (0..10_000).filter(|_| streams.follow(random.u64(..1 << 40)).before > 0).count();
        assert_eq!(runs, 0);
        let reads = [7, 8, 8, 10, 11].map(|block| streams.follow(block).adjacent);
        assert_eq!(reads, [false, true, false, false, true]);
    }
}
