//! An NBD export as a disk: newstyle negotiation, reconnects, no request lost or overtaken.
//!
//! Reading order: [`protocol`] (bytes), `connection` (a socket and its handshake), `queue` (which
//! request goes out when, and what a lost connection means), [`client`] (the threads, the disk).

pub mod client;
mod connection;
pub mod protocol;
mod queue;

pub use client::{NbdClient, NbdOptions, NbdStatus};
pub use protocol::Export;
