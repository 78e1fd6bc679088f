//! Signalling a front end's eventfd without ever waiting for it.
//!
//! An eventfd is shared with whoever handed it over, flags and all: a hostile front end may turn
//! waiting on again (`F_SETFL`), fill the counter, and so hold up whoever writes to it for as long
//! as it likes, and with a reactor all the guests that it serves. No flag of a write helps:
//! eventfds refuse `RWF_NOWAIT`, and io_uring looks at the file's flags, which change behind its
//! back, before it makes the same call.
//!
//! The kernel's own signals do not wait: a counter that is full stays full, which its reader cannot
//! tell from one signal more. Asynchronous I/O (`io_submit`) gives such a signal when an operation
//! that names an eventfd ends. So a bell submits a read of nothing, which ends within the call.

use crate::base::{Error, Result};
use std::cell::Cell;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Completions that the kernel keeps before they must be taken. Nobody wants them.
const COMPLETIONS_MAX: usize = 128;

const COMMAND_READ: u16 = 0;
const FLAG_EVENTFD: u32 = 1;

/// `struct iocb` of linux/aio_abi.h.
#[repr(C)]
#[derive(Default)]
struct Operation {
    data: u64,
    key_and_write_flags: u64,
    command: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    length: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    eventfd: u32,
}

/// `struct io_event` of linux/aio_abi.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct Completion {
    _words: [u64; 4],
}

/// Signals eventfds, one system call each. Belongs to one thread.
pub struct Bell {
    context: libc::c_ulong,
    /// What is read: it has nothing to give and says so at once.
    nothing: File,
    /// Completions that were not taken yet.
    completions: Cell<usize>,
}

impl Bell {
    /// # Errors
    /// The host has no room for another context of asynchronous I/O.
    pub fn new() -> Result<Self> {
        let failed = |error| {
            let text = "cannot set up signals to guests by asynchronous I/O (raise sysctl \
                        fs.aio-max-nr; io_setup and io_submit must be allowed)";
            Error::io(text, error)
        };
        let nothing = File::open("/dev/null").map_err(failed)?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: the kernel writes one word, the context, to the address given.
        let made = unsafe { libc::syscall(libc::SYS_io_setup, COMPLETIONS_MAX, &raw mut context) };
        if made != 0 {
            return Err(failed(std::io::Error::last_os_error()));
        }
        Ok(Self { context, nothing, completions: Cell::new(0) })
    }

    /// Adds one to an eventfd's counter; a full one stays full. Never waits, whatever the front end
    /// does to the descriptor meanwhile.
    pub fn ring(&self, event: BorrowedFd<'_>) {
        if self.completions.get() == COMPLETIONS_MAX {
            self.forget_completions();
        }
        let mut operation = Operation {
            command: COMMAND_READ,
            file: self.nothing.as_raw_fd() as u32,
            flags: FLAG_EVENTFD,
            eventfd: event.as_raw_fd() as u32,
            ..Operation::default()
        };
        let mut list = [&raw mut operation];
        // SAFETY: the kernel reads one pointer and the operation behind it, both of which live for
        // the call; the operation moves no bytes, and has ended when the call returns.
        let submitted =
            unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1, list.as_mut_ptr()) };
        // A guest that is not told of its completions waits for ever: better the next daemon.
        let error = std::io::Error::last_os_error;
        assert!(submitted == 1, "a guest cannot be signalled: {}", error());
        self.completions.set(self.completions.get() + 1);
    }

    fn forget_completions(&self) {
        let mut taken = [Completion { _words: [0; 4] }; COMPLETIONS_MAX];
        let at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the kernel writes at most as many completions as `taken` holds, and reads the
        // time; both live for the call.
        let count = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                0,
                COMPLETIONS_MAX,
                taken.as_mut_ptr(),
                &raw const at_once,
            )
        };
        assert!(count == COMPLETIONS_MAX as i64, "every operation has ended: {count} have");
        self.completions.set(0);
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        // SAFETY: the context is ours, and nothing of it is under way.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use std::os::fd::AsFd;
    use std::sync::Arc;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    #[test]
    fn every_ring_is_counted() {
        let bell = Bell::new().unwrap();
        let (one, other) = (EventFd::new().unwrap(), EventFd::new().unwrap());
        for _ in 0..5 * COMPLETIONS_MAX {
            bell.ring(one.as_fd());
        }
        bell.ring(other.as_fd());
        assert_eq!(one.read().unwrap(), 5 * COMPLETIONS_MAX as u64);
        assert_eq!(other.read().unwrap(), 1);
    }

    /// A write to it would wait for a reader, for ever.
    #[test]
    fn a_full_eventfd_that_waits_is_rung_without_waiting() {
        let full = Arc::new(EventFd::from_flags(EfdFlags::empty()).unwrap());
        full.write(u64::MAX - 1).unwrap();
        let (done, rung) = channel();
        let rings = full.clone();
        std::thread::spawn(move || {
            let bell = Bell::new().unwrap();
            (0..3).for_each(|_| bell.ring(rings.as_fd()));
            done.send(()).unwrap();
        });
        rung.recv_timeout(Duration::from_secs(30)).expect("nobody reads it, and it is rung");
        assert_eq!(full.read().unwrap(), u64::MAX);
        Bell::new().unwrap().ring(full.as_fd());
        assert_eq!(full.read().unwrap(), 1, "and it works again once it was read");
    }
}
