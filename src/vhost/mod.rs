//! L3: vhost-user. Serves any [`crate::io::volume::Volume`] to unmodified front ends.
//!
//! - [`server`] the handle that control uses.
//! - [`sockets`] the one thread for all sockets; [`peek`] what it looks at before it acts.
//! - [`session`] one front end's session: the messages of the protocol.
//! - [`reactor`] the threads that move data; [`served`] one export there: rings on one side, a
//!   volume on the other; [`door`] one machine's rings of it.
//! - [`queue`] one virtqueue: pop, complete, publish, notify; [`bell`] how a guest is notified.
//! - [`ring`], [`inflight`], [`memory`], [`dirty`], [`fault`] what is shared with the guest.
//! - [`pinner`] the thread that pins guest memory where that is wanted.
//! - [`mailbox`] messages between these threads.

pub mod bell;
pub mod dirty;
pub mod door;
pub mod fault;
pub mod inflight;
pub mod mailbox;
pub mod memory;
pub mod peek;
pub mod pinner;
pub mod queue;
pub mod reactor;
pub mod ring;
pub mod served;
pub mod server;
pub mod session;
pub mod sockets;

pub use crate::io::disk::DiskTarget;
pub use reactor::ExportId;
pub use server::{Export, ExportEvent, ExportStatus, NewDoor, Server, ServerOptions, SocketAccess};
