//! The driver against the rings themselves: the back end's side is done by hand.

use super::*;
use crate::report::Violation;

struct Rig {
    memory: GuestMemory,
    queue: Queue,
    /// What the back end has taken and given back.
    taken: u16,
    used: u16,
}

impl Rig {
    fn new(depth: u16, indirect: bool, event_index: bool) -> Self {
        let shape = Shape { depth, data_bytes: 512, indirect };
        let layout = Layout::new(0, shape).unwrap();
        let memory = GuestMemory::new(layout.end, false).unwrap();
        let queue = Queue::new(&memory, layout, event_index, Waiting::Sleep).unwrap();
        Self { memory, queue, taken: 0, used: 0 }
    }

    fn submit(&mut self, kind: Kind, sector: u64, length: u32) -> u16 {
        let slot = self.queue.take_slot().unwrap();
        self.queue.submit(&self.memory, slot, kind, sector, length);
        slot
    }

    /// The head that the back end finds next, if the available index says that there is one.
    fn take(&mut self) -> Option<u16> {
        let layout = &self.queue.layout;
        if self.memory.load_u16(layout.available + 2) == self.taken {
            return None;
        }
        let entry = usize::from(self.taken % self.queue.size);
        self.taken = self.taken.wrapping_add(1);
        Some(self.memory.load_u16(layout.available + 4 + entry * 2))
    }

    fn descriptor(&self, table: usize, index: u16) -> (u64, u32, u16, u16) {
        let mut bytes = [0; 16];
        self.memory.read(table + usize::from(index) * 16, &mut bytes);
        let word = u64::from_le_bytes(bytes[8..].try_into().unwrap());
        let address = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        (address, word as u32, (word >> 32) as u16, (word >> 48) as u16)
    }

    /// The chain that begins at `head`: address, length and flags of each descriptor.
    fn chain(&self, head: u16) -> Vec<(u64, u32, u16)> {
        let (mut table, mut index) = (self.queue.layout.descriptors, head);
        let (address, length, flags, _) = self.descriptor(table, index);
        if flags & INDIRECT != 0 {
            assert_eq!(length, 48);
            (table, index) = (address as usize, 0);
        }
        let mut chain = Vec::new();
        loop {
            let (address, length, flags, next) = self.descriptor(table, index);
            chain.push((address, length, flags));
            if flags & NEXT == 0 {
                return chain;
            }
            index = next;
        }
    }

    fn complete(&mut self, head: u16, status: u8) {
        let (address, ..) = *self.chain(head).last().unwrap();
        self.memory.write(address as usize, &[status]);
        self.complete_bare(u32::from(head));
    }

    fn complete_bare(&mut self, head: u32) {
        let entry = usize::from(self.used % self.queue.size);
        let place = self.queue.layout.used + 4 + entry * 8;
        self.memory.write(place, &[head.to_le_bytes(), 1_u32.to_le_bytes()].concat());
        self.used = self.used.wrapping_add(1);
        self.memory.store_u16(self.queue.layout.used + 2, self.used);
    }

    fn completed(&mut self) -> Result<Vec<Completed>> {
        let mut completed = Vec::new();
        self.queue.completed(&self.memory, &mut completed)?;
        Ok(completed)
    }

    /// Whether the driver has kicked since the last call.
    fn kicked(&self) -> bool {
        self.queue.kick.read().is_ok()
    }

    /// Where the back end wants to be kicked next.
    fn set_kick_event(&self, index: u16) {
        let place = self.queue.layout.used + 4 + usize::from(self.queue.size) * 8;
        self.memory.store_u16(place, index);
    }

    fn interrupt_event(&self) -> u16 {
        let place = self.queue.layout.available + 4 + usize::from(self.queue.size) * 2;
        self.memory.load_u16(place)
    }
}

#[test]
fn chains_are_laid_out_as_the_specification_says() {
    for indirect in [false, true] {
        let mut rig = Rig::new(4, indirect, true);
        for (kind, code, length, data) in [
            (Kind::Read, 0, 512, Some((512, NEXT | WRITE))),
            (Kind::Write, 1, 512, Some((512, NEXT))),
            (Kind::Flush, 4, 0, None),
            (Kind::Discard, 11, 16, Some((16, NEXT))),
        ] {
            let slot = rig.submit(kind, 77, length);
            assert_eq!(rig.take(), None, "before it is published");
            rig.queue.publish(&rig.memory);
            let head = rig.take().unwrap();
            let chain = rig.chain(head);
            let (header, header_length, header_flags) = chain[0];
            assert_eq!((header_length, header_flags), (16, NEXT));
            let mut bytes = [0; 16];
            rig.memory.read(header as usize, &mut bytes);
            assert_eq!(bytes[..8], [[code, 0, 0, 0], [0; 4]].concat());
            assert_eq!(bytes[8..], 77_u64.to_le_bytes());
            let (_, status_length, status_flags) = *chain.last().unwrap();
            assert_eq!((status_length, status_flags), (1, WRITE));
            let middle = &chain[1..chain.len() - 1];
            match data {
                Some((length, flags)) => {
                    assert_eq!(middle, [(rig.queue.data(slot) as u64, length, flags)]);
                }
                None => assert!(middle.is_empty()),
            }
        }
    }
}

#[test]
fn indices_wrap_and_every_completion_is_told_once() {
    for indirect in [false, true] {
        let mut rig = Rig::new(3, indirect, true);
        let mut random = fastrand::Rng::with_seed(5);
        let (mut heads, mut done) = (Vec::new(), 0_u32);
        while done < 70_000 {
            while rig.queue.in_flight() < 3 {
                rig.submit(Kind::Read, 1, 512);
            }
            rig.queue.publish(&rig.memory);
            while let Some(head) = rig.take() {
                heads.push(head);
            }
            // Out of order, and not all.
            random.shuffle(&mut heads);
            for _ in 0..random.usize(1..=heads.len()) {
                let head = heads.pop().unwrap();
                rig.complete(head, 0);
            }
            let completed = rig.completed().unwrap();
            assert!(completed.iter().all(|one| (one.status, one.written) == (0, 1)));
            done += completed.len() as u32;
            assert_eq!(rig.queue.in_flight(), heads.len());
        }
        assert_eq!(rig.queue.used_index(&rig.memory), done as u16);
    }
}

#[test]
fn a_back_end_that_polls_is_not_kicked() {
    let mut rig = Rig::new(8, false, true);
    rig.submit(Kind::Read, 0, 512);
    rig.queue.publish(&rig.memory);
    assert!(rig.kicked(), "it waits for the first entry");
    rig.submit(Kind::Read, 0, 512);
    rig.queue.publish(&rig.memory);
    assert!(!rig.kicked(), "its event index is behind");
    rig.set_kick_event(3);
    rig.submit(Kind::Read, 0, 512);
    rig.queue.publish(&rig.memory);
    assert!(!rig.kicked(), "it asked for the fourth entry");
    rig.submit(Kind::Read, 0, 512);
    rig.submit(Kind::Read, 0, 512);
    rig.queue.publish(&rig.memory);
    assert!(rig.kicked(), "the fourth entry was among them");
    assert_eq!(rig.queue.kicks, 2);

    let mut rig = Rig::new(8, false, false);
    for flag in [1, 0] {
        rig.memory.store_u16(rig.queue.layout.used, flag);
        rig.submit(Kind::Read, 0, 512);
        rig.queue.publish(&rig.memory);
        assert_eq!(rig.kicked(), flag == 0, "without the event index the flag decides");
    }
}

#[test]
fn an_interrupt_is_asked_for_at_the_next_completion() {
    let mut rig = Rig::new(8, false, true);
    let head = {
        rig.submit(Kind::Read, 0, 512);
        rig.queue.publish(&rig.memory);
        rig.take().unwrap()
    };
    assert!(!rig.queue.arm(&rig.memory) && rig.queue.is_asleep());
    assert_eq!(rig.interrupt_event(), 0);
    rig.complete(head, 0);
    assert!(rig.queue.is_asleep(), "only an interrupt wakes it");
    rig.queue.call.write(1).unwrap();
    assert!(sleep(std::slice::from_ref(&rig.queue), Duration::from_secs(5)).unwrap());
    assert!(!rig.queue.is_asleep());
    assert_eq!(rig.queue.interrupts.get(), 1);
    assert_eq!(rig.completed().unwrap().len(), 1);
    assert!(!rig.queue.arm(&rig.memory));
    assert_eq!(rig.interrupt_event(), 1);

    rig.submit(Kind::Read, 0, 512);
    rig.queue.publish(&rig.memory);
    let head = rig.take().unwrap();
    rig.complete(head, 0);
    assert!(rig.queue.arm(&rig.memory), "a completion that came before is not slept over");
    assert!(!rig.queue.is_asleep());
}

#[test]
fn used_entries_that_lie_are_refused() {
    use crate::report::ViolationKind::{Doubled, Wrong};
    type LieOf = fn(&mut Rig, u16);
    let lies: [(&str, crate::report::ViolationKind, LieOf); 5] = [
        ("not in flight", Doubled, |rig, head| {
            rig.complete(head, 0);
            rig.complete(head, 0);
        }),
        ("without a status", Doubled, |rig, head| rig.complete_bare(u32::from(head))),
        ("no request's", Wrong, |rig, head| rig.complete_bare(u32::from(head) + 1)),
        ("no request's", Wrong, |rig, _| rig.complete_bare(3 * 4)),
        ("completions for", Doubled, |rig, _| {
            rig.memory.store_u16(rig.queue.layout.used + 2, u16::MAX);
        }),
    ];
    for (words, kind, lie) in lies {
        let mut rig = Rig::new(4, false, true);
        let first = rig.submit(Kind::Read, 0, 512);
        rig.submit(Kind::Read, 0, 512);
        rig.queue.publish(&rig.memory);
        lie(&mut rig, first * DESCRIPTORS_PER_REQUEST);
        let error = rig.completed().unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(error.downcast_ref::<Violation>().unwrap().kind, kind, "{error}");
    }
}

#[test]
fn depths_that_no_ring_holds_are_refused() {
    let layout = |depth, indirect| Layout::new(0, Shape { depth, data_bytes: 512, indirect });
    assert!(layout(0, false).is_err());
    assert!(layout(342, false).is_err());
    assert_eq!(layout(341, false).unwrap().size, 1024);
    assert_eq!(layout(1024, true).unwrap().size, 1024);
    assert!(layout(1025, true).is_err());
}
