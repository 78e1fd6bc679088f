//! L1: disks and volumes, the two sides of the data path.
//!
//! A [`disk::Disk`] is what the daemon stands on (a drive, a file, a simulation); a
//! [`volume::Volume`] is what it serves to a guest. See README.md for what completed, flushed and
//! durable mean.

pub mod blocking;
pub mod buffer;
pub mod crash;
pub mod disk;
pub mod file;
pub mod pinned;
pub mod sim;
pub mod sim_reactor;
pub mod uring;
pub mod volume;
