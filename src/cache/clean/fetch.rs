//! Misses: blocks fetched from the backing once for all who want them, and kept if the policy says
//! so.

use super::held::Block;
use super::{Core, blocks};
use crate::base::clock::Nanos;
use crate::base::units::SECTOR_BYTES;
use crate::cache::cursor::Cursor;
use crate::cache::index::{BLOCK_SECTORS, Found};
use crate::cache::policy::{BLOCK_BYTES, Leaves, Place, Verdict};
use crate::cache::root::Mode;
use crate::cache::status::count;
use crate::io::buffer::Segment;
use crate::io::volume::{Io, SectorRange};

/// Blocks of one fetch at most: one bit each.
const FETCH_BLOCKS_MAX: u64 = 64;

/// What a read of the backing brings beside what its own request wants.
#[derive(Default)]
pub(in crate::cache) struct Fetch {
    /// The first block; the operation reads whole ones from there.
    first: u64,
    blocks: u64,
    /// Bits by block: it goes to flash at once; it was written meanwhile.
    admitted: u64,
    stale: u64,
    joined: Vec<Joined>,
}

/// A read that waits for a fetch of another one.
#[derive(Clone, Copy)]
pub(in crate::cache) struct Joined {
    pub slot: u32,
    /// Sectors.
    pub start: u64,
    pub count: u64,
    pub begun: Nanos,
}

impl Fetch {
    fn new(first: u64, blocks: u64, admitted: u64) -> Self {
        Self { first, blocks, admitted, stale: 0, joined: Vec::new() }
    }

    pub(in crate::cache) fn stale(&mut self, block: u64) {
        self.stale |= 1 << (block - self.first);
    }

    /// Parts of a request that joined.
    pub(in crate::cache) fn joins(&self, id: u32) -> usize {
        self.joined.iter().filter(|joined| joined.slot == id).count()
    }

    pub(in crate::cache) fn leave(&mut self, id: u32) {
        self.joined.retain(|joined| joined.slot != id);
    }

    pub(in crate::cache) fn pop(&mut self) -> Option<Joined> {
        self.joined.pop()
    }

    /// In bytes of the backing.
    pub(in crate::cache) fn range(&self) -> (u64, u64) {
        (self.first * BLOCK_BYTES, self.blocks * BLOCK_BYTES)
    }
}

/// How a block that is not in the index is read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// From the backing, and nothing is kept.
    Past,
    Fetch {
        admit: bool,
    },
    /// From this slot of probation.
    Held(u32),
    /// With this read, which is under way.
    Join(u32),
}

impl Core {
    /// Reads sectors that the index has nothing of.
    pub(in crate::cache) fn read_absent(
        &mut self,
        id: u32,
        (start, sectors): (u64, u64),
        io: &mut dyn Io,
    ) {
        if self.mode == Mode::Bypass || self.clean.is_past() {
            let blocks = blocks(start, sectors);
            count(&self.status.counters.misses, blocks.end - blocks.start);
            return self.read_backing(id, start, sectors, io);
        }
        let end = start + sectors;
        let mut run = Run { id, start, end: start, fetch: false, admitted: 0 };
        for block in blocks(start, sectors) {
            let from = start.max(block * BLOCK_SECTORS);
            let to = end.min((block + 1) * BLOCK_SECTORS);
            let way = self.way(block, io);
            let fetch = matches!(way, Way::Fetch { .. });
            let ends = match way {
                Way::Past => run.fetch,
                Way::Fetch { .. } => !run.fetch || run.blocks() == FETCH_BLOCKS_MAX,
                Way::Held(_) | Way::Join(_) => true,
            };
            if ends {
                self.read_run(run, io);
                run = Run { id, start: from, end: from, fetch, admitted: 0 };
            }
            if let Way::Fetch { admit: true } = way {
                run.admitted |= 1 << (block - run.start / BLOCK_SECTORS);
            }
            run.end = to;
            match way {
                Way::Past | Way::Fetch { .. } => {
                    count(&self.status.counters.misses, 1);
                    continue;
                }
                Way::Held(slot) => self.read_held(id, (from, to - from), slot),
                Way::Join(number) => {
                    let begun = io.now();
                    let joined = Joined { slot: id, start: from, count: to - from, begun };
                    self.reads.fetch(number).joined.push(joined);
                    self.slots[id as usize].under_way += 1;
                    count(&self.status.counters.joined, 1);
                }
            }
            run = Run { id, start: to, end: to, fetch: false, admitted: 0 };
        }
        self.read_run(run, io);
    }

    /// A guest reads pieces that lie one behind the other.
    pub(in crate::cache) fn touch(&mut self, found: &[Found]) {
        let mut last = None;
        for one in found {
            let Found::Piece(piece, mark) = one else { continue };
            let block = piece.start / BLOCK_SECTORS;
            if last != Some(block) {
                let used = self.clean.policy.hit(block, *mark);
                if used != *mark {
                    self.index.set_mark(block, used);
                }
            }
            last = Some(block);
        }
    }

    fn way(&mut self, block: u64, io: &mut dyn Io) -> Way {
        if let Some(number) = self.clean.fetching.get(&block) {
            return Way::Join(*number);
        }
        let full = self.is_full();
        let (policy, mut marks) = self.policy();
        policy.set_full(full);
        let verdict = policy.read(block, &mut marks);
        let admit = match verdict {
            Verdict::Probed { slot } if self.clean.held.get(slot).is_some() => {
                count(&self.status.counters.probation_hits, 1);
                return Way::Held(slot);
            }
            Verdict::Hit | Verdict::Bypass | Verdict::Probed { .. } => return Way::Past,
            Verdict::Admit => true,
            Verdict::Probation { slot, leaves } => {
                leaves.into_iter().for_each(|leaves| self.leave_probation(slot, leaves, io));
                self.clean.held.clear(slot);
                false
            }
        };
        match self.is_fetchable(block) {
            true => Way::Fetch { admit },
            false => Way::Past,
        }
    }

    /// Whether what the backing has of the block now may be kept (C1, C2).
    fn is_fetchable(&self, block: u64) -> bool {
        let (start, end) = (block * BLOCK_SECTORS, (block + 1) * BLOCK_SECTORS);
        let overlaps = |range: &SectorRange| range.start < end && start < range.start + range.count;
        end * SECTOR_BYTES <= self.backing.size_bytes
            && u64::from(self.backing.block_bytes) <= BLOCK_BYTES
            && self.index.is_absent(block)
            && !self.clean.changing.iter().any(|(_, range)| overlaps(range))
    }

    /// A block makes place for another one: to flash, if it was used.
    fn leave_probation(&mut self, slot: u32, leaves: Leaves, io: &mut dyn Io) {
        let Some(place) = leaves.to else { return };
        if let Some(data) = self.clean.held.get(slot).copied() {
            self.begin_fill(leaves.block, place, &data, io);
        }
    }

    fn read_held(&mut self, id: u32, (start, sectors): (u64, u64), held: u32) {
        let slot = &self.slots[id as usize];
        let skip = (start - slot.range().start) * SECTOR_BYTES;
        let from = (start % BLOCK_SECTORS * SECTOR_BYTES) as usize;
        let data = self.clean.held.get(held).expect("it was just seen");
        let part = &data[from..from + (sectors * SECTOR_BYTES) as usize];
        Cursor::new(&slot.segments, skip as usize).copy_from(part);
    }

    fn read_run(&mut self, run: Run, io: &mut dyn Io) {
        let Run { id, start, end, admitted, .. } = run;
        if start == end {
            return;
        }
        if !run.fetch {
            return self.read_backing(id, start, end - start, io);
        }
        let blocks = blocks(start, end - start);
        let fetch = Fetch::new(blocks.start, blocks.end - blocks.start, admitted);
        let number = self.read_fetch(id, (start, end - start), fetch, io);
        blocks.for_each(|block| _ = self.clean.fetching.insert(block, number));
    }

    /// Nobody may join the fetch any more.
    pub(in crate::cache) fn forget_fetch(&mut self, number: u32, fetch: &Fetch) {
        for block in fetch.first..fetch.first + fetch.blocks {
            if self.clean.fetching.get(&block) == Some(&number) {
                self.clean.fetching.remove(&block);
            }
        }
    }

    /// A fetch has brought its blocks into `read`; who waits for it has them now.
    pub(in crate::cache) fn fetched(
        &mut self,
        number: u32,
        fetch: Fetch,
        memory: Option<Segment>,
        io: &mut dyn Io,
    ) {
        self.forget_fetch(number, &fetch);
        let Some(memory) = memory else {
            // Each has patience of its own.
            for Joined { slot, start, count, begun } in fetch.joined {
                self.read_backing_since(begun, (slot, start, count), io);
                self.read_ended(slot, io);
            }
            return;
        };
        let mut data: Block = [0; BLOCK_BYTES as usize];
        for joined in &fetch.joined {
            self.deliver_joined(*joined, &fetch, memory, &mut data);
        }
        for at in 0..fetch.blocks {
            if fetch.stale >> at & 1 == 1 {
                continue;
            }
            let block = fetch.first + at;
            memory.part((at * BLOCK_BYTES) as usize, data.len()).copy_to(&mut data);
            if fetch.admitted >> at & 1 == 1 {
                self.begin_fill(block, Place::Main, &data, io);
            } else if let Some(slot) = self.clean.policy.probation_slot(block) {
                self.clean.held.put(slot, &data);
            }
        }
        for joined in fetch.joined {
            self.read_ended(joined.slot, io);
        }
    }

    fn deliver_joined(&self, joined: Joined, fetch: &Fetch, memory: Segment, data: &mut Block) {
        let slot = &self.slots[joined.slot as usize];
        let skip = ((joined.start - slot.range().start) * SECTOR_BYTES) as usize;
        let mut guest = Cursor::new(&slot.segments, skip);
        let from = ((joined.start - fetch.first * BLOCK_SECTORS) * SECTOR_BYTES) as usize;
        let length = (joined.count * SECTOR_BYTES) as usize;
        memory.part(from, length).copy_to(&mut data[..length]);
        guest.copy_from(&data[..length]);
    }
}

/// Blocks that are read one way.
#[derive(Clone, Copy)]
struct Run {
    id: u32,
    /// Sectors.
    start: u64,
    end: u64,
    fetch: bool,
    admitted: u64,
}

impl Run {
    fn blocks(&self) -> u64 {
        let blocks = blocks(self.start, self.end - self.start);
        blocks.end - blocks.start
    }
}
