//! Sequential streams: which block follows on one that was read just before.

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
}

impl Streams {
    /// Notes a read; how many blocks of its stream came before, 0 if it follows on none.
    pub(super) fn follow(&mut self, block: u64) -> u32 {
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
                assert_eq!(streams.follow(stream * 1_000_000 + step), step as u32);
                assert_eq!(streams.follow(stream * 1_000_000 + step), step as u32, "again");
            }
        }
        let mut random = fastrand::Rng::with_seed(2);
        let runs = (0..10_000).filter(|_| streams.follow(random.u64(..1 << 40)) > 0).count();
        assert_eq!(runs, 0);
    }
}
