//! First-in first-out queues of block numbers, 5 bytes each, in chunks of one pool: what one queue
//! gives up another takes, and nothing is allocated while they run.

use std::collections::VecDeque;

/// Entries of a chunk.
const CHUNK_ENTRIES: usize = 1024;

const ENTRY_BYTES: usize = 5;

/// Blocks of a disk that can be named: 4 EiB of 4 KiB blocks.
pub const BLOCKS_MAX: u64 = 1 << (8 * ENTRY_BYTES);

/// Chunks that are partly used at the ends of the queues of one pool, beside the full ones.
const CHUNKS_SPARE: usize = 4;

type Chunk = Box<[[u8; ENTRY_BYTES]; CHUNK_ENTRIES]>;

/// The chunks of two queues that together hold at most so many entries.
#[derive(Default)]
pub(super) struct Pool {
    chunks: Vec<Option<Chunk>>,
    free: Vec<u32>,
    /// Numbers of chunks whose memory was given back.
    holes: Vec<u32>,
    wanted: usize,
}

impl Pool {
    /// Takes memory for `entries`, or gives back what is not in use any more.
    pub(super) fn resize(&mut self, entries: u64) {
        self.wanted = (entries as usize).div_ceil(CHUNK_ENTRIES) + CHUNKS_SPARE;
        while self.chunks.len() - self.holes.len() < self.wanted {
            let number = self.holes.pop().unwrap_or_else(|| {
                self.chunks.push(None);
                (self.chunks.len() - 1) as u32
            });
            self.chunks[number as usize] = Some(Box::new([[0; ENTRY_BYTES]; CHUNK_ENTRIES]));
            self.free.push(number);
        }
        self.holes.reserve(self.chunks.len());
        self.free.reserve(self.chunks.len());
        self.shed();
    }

    /// Gives back free chunks above what is wanted.
    fn shed(&mut self) {
        while self.chunks.len() - self.holes.len() > self.wanted
            && let Some(number) = self.free.pop()
        {
            self.chunks[number as usize] = None;
            self.holes.push(number);
        }
    }

    fn chunk(&mut self, number: u32) -> &mut Chunk {
        self.chunks[number as usize].as_mut().expect("a queue's chunk has its memory")
    }

    pub(super) fn memory_bytes(&self) -> usize {
        (self.chunks.len() - self.holes.len()) * CHUNK_ENTRIES * ENTRY_BYTES
            + self.chunks.capacity() * size_of::<Option<Chunk>>()
            + (self.free.capacity() + self.holes.capacity()) * size_of::<u32>()
    }
}

/// A queue whose entries lie in a [`Pool`].
#[derive(Default)]
pub(super) struct Fifo {
    chunks: VecDeque<u32>,
    /// Entries of the first chunk that were taken.
    head: usize,
    len: usize,
}

impl Fifo {
    pub(super) fn len(&self) -> u64 {
        self.len as u64
    }

    /// Takes memory for a queue that may fill the pool.
    pub(super) fn resize(&mut self, pool: &Pool) {
        self.chunks.reserve(pool.chunks.len() - self.chunks.len());
    }

    pub(super) fn push(&mut self, block: u64, pool: &mut Pool) {
        assert!(block < BLOCKS_MAX, "block {block} can be named in 5 bytes");
        let at = (self.head + self.len) % CHUNK_ENTRIES;
        if self.head + self.len == self.chunks.len() * CHUNK_ENTRIES {
            self.chunks.push_back(pool.free.pop().expect("the pool holds what the cache may"));
        }
        let last = *self.chunks.back().expect("there is room in the last chunk");
        pool.chunk(last)[at].copy_from_slice(&block.to_le_bytes()[..ENTRY_BYTES]);
        self.len += 1;
    }

    pub(super) fn pop(&mut self, pool: &mut Pool) -> Option<u64> {
        if self.len == 0 {
            return None;
        }
        let first = *self.chunks.front().expect("a queue that is not empty has a chunk");
        let mut bytes = [0; 8];
        bytes[..ENTRY_BYTES].copy_from_slice(&pool.chunk(first)[self.head]);
        self.head += 1;
        self.len -= 1;
        if self.head == CHUNK_ENTRIES || self.len == 0 {
            self.chunks.pop_front();
            self.head = 0;
            pool.free.push(first);
            pool.shed();
        }
        Some(u64::from_le_bytes(bytes))
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.chunks.capacity() * size_of::<u32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_keep_their_order_and_pass_chunks_to_each_other() {
        let mut pool = Pool::default();
        pool.resize(10_000);
        let mut queues = [Fifo::default(), Fifo::default()];
        let mut models = [VecDeque::new(), VecDeque::new()];
        let mut random = fastrand::Rng::with_seed(1);
        let before = pool.memory_bytes();
        for turn in 0..200_000_u64 {
            let which = usize::from(random.bool());
            let grow = if turn % 40_000 < 20_000 { 70 } else { 35 };
            let room = models[0].len() + models[1].len() < 10_000;
            if random.u8(..100) < grow && room {
                let block = random.u64(..BLOCKS_MAX);
                queues[which].push(block, &mut pool);
                models[which].push_back(block);
            } else {
                assert_eq!(queues[which].pop(&mut pool), models[which].pop_front());
            }
            assert_eq!(queues[which].len(), models[which].len() as u64);
        }
        assert_eq!(pool.memory_bytes(), before, "no chunk was lost or made");
    }

    #[test]
    fn a_smaller_pool_gives_memory_back_as_its_queues_empty() {
        let mut pool = Pool::default();
        pool.resize(100_000);
        let mut queue = Fifo::default();
        (0..100_000).for_each(|block| queue.push(block, &mut pool));
        let before = pool.memory_bytes();
        pool.resize(1000);
        assert!(pool.memory_bytes() > 100_000 * ENTRY_BYTES, "nearly all of it is in use");
        (0..99_000).for_each(|block| assert_eq!(queue.pop(&mut pool), Some(block)));
        assert!(pool.memory_bytes() < before / 8, "{} of {before}", pool.memory_bytes());
        pool.resize(100_000);
        (0..99_000).for_each(|block| queue.push(block, &mut pool));
        assert_eq!(queue.pop(&mut pool), Some(99_000));
        while queue.pop(&mut pool).is_some() {}
        assert!(queue.chunks.is_empty(), "an empty queue holds nothing");
    }
}
