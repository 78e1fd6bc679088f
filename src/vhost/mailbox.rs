//! Messages between threads that sleep in the kernel: a channel with an eventfd beside it.

use crate::base::{Error, Result};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// The sending side; clones send to the same receiver.
pub struct Mailbox<T> {
    sender: Sender<T>,
    event: Arc<EventFd>,
}

impl<T> Clone for Mailbox<T> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), event: self.event.clone() }
    }
}

/// The receiving side.
pub struct Inbox<T> {
    receiver: Receiver<T>,
    event: Arc<EventFd>,
}

/// Makes a pair.
pub fn mailbox<T>() -> Result<(Mailbox<T>, Inbox<T>)> {
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
        .map_err(|error| Error::io("cannot make an eventfd", error.into()))?;
    let (sender, receiver) = channel();
    let event = Arc::new(event);
    Ok((Mailbox { sender, event: event.clone() }, Inbox { receiver, event }))
}

impl<T> Mailbox<T> {
    /// Sends in order; false if the receiver is gone.
    pub fn send(&self, message: T) -> bool {
        let sent = self.sender.send(message).is_ok();
        // A full counter has woken the receiver already.
        let _ = self.event.write(1);
        sent
    }
}

impl<T> Inbox<T> {
    /// Becomes readable with each message.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Empties the eventfd, for a level-triggered poller.
    pub fn acknowledge(&self) {
        let _ = self.event.read();
    }

    /// The next message, if there is one.
    pub fn take(&self) -> Option<T> {
        self.receiver.try_recv().ok()
    }
}
