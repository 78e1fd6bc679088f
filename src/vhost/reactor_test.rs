//! A reactor that is turned by hand.

use super::*;
use crate::io::volume::{Io, Request, Volume};
use crate::vhost::door::tests::add_door;
use crate::vhost::mailbox::mailbox;

/// Does nothing: no request ever comes.
struct Idle;

impl Volume for Idle {
    fn attach(&mut self, _requests_max: u32) {}

    fn submit(&mut self, _request: Request<'_>, _io: &mut dyn Io) {
        unreachable!("no request comes");
    }

    fn completed(
        &mut self,
        _token: u64,
        _result: std::result::Result<(), crate::io::disk::Errno>,
        _io: &mut dyn Io,
    ) {
    }
}

fn export(name: &str) -> AddExport {
    let door = add_door(0, name);
    AddExport { name: name.to_owned(), volume: Box::new(Idle), disks: Vec::new(), door }
}

/// What comes in one look at the inbox is finished before the reactor may sleep.
#[test]
fn slots_that_go_together_are_all_gone_before_it_sleeps() {
    let (messages, inbox) = mailbox().unwrap();
    let (events, told) = mailbox().unwrap();
    let mut reactor = Reactor::new(0, None, (inbox, messages), events).unwrap();
    for slot in 0..5 {
        reactor.add(slot, 1, export(&format!("vm/disk{slot}"))).unwrap();
        reactor.message(Message::Remove { slot });
    }
    reactor.settle();
    let mut gone: Vec<u16> = std::iter::from_fn(|| told.take())
        .filter_map(|event| match event {
            Event::Removed { slot, .. } => Some(slot),
            _ => None,
        })
        .collect();
    gone.sort_unstable();
    assert_eq!(gone, [0, 1, 2, 3, 4], "each is told of once");
    assert!(reactor.hot.is_empty(), "nothing is looked after any more");
}
