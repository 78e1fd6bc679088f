//! A reactor that is turned by hand.

use super::*;
use crate::io::volume::{Io, Request, Volume};
use crate::vhost::door::tests::add_door;
use crate::vhost::mailbox::mailbox;
use std::sync::mpsc::Receiver;

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
    let (events, _events) = mailbox().unwrap();
    let mut reactor = Reactor::new(0, None, (inbox, messages), events).unwrap();
    let removals: Vec<Receiver<()>> = (0..5)
        .map(|slot| {
            reactor.add(slot, 1, export(&format!("vm/disk{slot}"))).unwrap();
            let (reply, answer) = std::sync::mpsc::channel();
            reactor.message(Message::Remove { slot, reply });
            answer
        })
        .collect();
    reactor.settle();
    for (slot, answer) in removals.iter().enumerate() {
        assert!(answer.try_recv().is_ok(), "slot {slot} is still there");
    }
    assert!(reactor.hot.is_empty(), "nothing is looked after any more");
}
