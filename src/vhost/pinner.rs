//! The thread that pins guest memory for those who want that: it may take seconds, and nobody waits
//! for it. Until a region is pinned, and if it cannot be, operations go without.

use super::mailbox::Mailbox;
use super::memory::Region;
use super::reactor::{Event, ExportId, Message};
use crate::base::{Error, ErrorKind, Result};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};

/// A region to be pinned for the door that `export` names.
pub struct Job {
    /// Pinned only while somebody has it.
    pub region: Weak<Region>,
    pub export: ExportId,
    /// The export's, which is told.
    pub reactor: Mailbox<Message>,
}

/// Starts the thread, which ends with the last sender.
pub fn start(events: Mailbox<Event>) -> Result<Sender<Job>> {
    let (sender, jobs) = channel();
    std::thread::Builder::new()
        .name("pin-memory".into())
        .spawn(move || run(&jobs, &events))
        .map_err(|error| Error::io("cannot start a thread that pins memory", error))?;
    Ok(sender)
}

fn run(jobs: &Receiver<Job>, events: &Mailbox<Event>) {
    for Job { region, export, reactor } in jobs {
        let Some(region) = region.upgrade() else { continue };
        match region.pin(|| Arc::strong_count(&region) > 1) {
            Ok(()) => {
                let ExportId { slot, generation, door, .. } = export;
                reactor.send(Message::Pinned { slot, generation, door, region });
            }
            Err(error) if error.kind() == ErrorKind::Gone => {}
            Err(error) => {
                events.send(Event::NotPinned { export, reason: error.to_string() });
            }
        }
    }
}
