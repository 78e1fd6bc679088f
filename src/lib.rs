//! vflash: host-local NVMe flash for virtual machines.
//!
//! The map of the house, in reading order; imports point only downwards (held by `tests/tidy.rs`):
//!
//! - [`base`] (L0) units, codec, checksum, errors, clock, limits.
//! - [`io`] (L1) the `Disk` and `Volume` traits, buffers, io_uring, the simulated disk and the
//!   crash-state explorer.
//! - [`virtio`] (L2) descriptor chain to checked request, config space, features. Pure.
//! - [`manifest`] (L1) the YAML schema, its parser and the plan from wanted to actual. Pure.
//! - [`metrics`] (L1) counters, histograms, Prometheus text.
//! - [`qos`] (L1) rate limits. Pure.
//! - [`flash`] (L2) the pool: superblock, extent table, allocator, volumes, scrub, check.
//! - [`cache`] (L3) the cached disk: journal, index, drain, recovery.
//! - [`vhost`] (L3) vhost-user connections, rings, reactors; serves any `Volume`.
//! - [`control`] (L4) the API, apply, lifecycle; composes everything above.

pub mod base;
pub mod cache;
pub mod control;
pub mod flash;
pub mod io;
pub mod manifest;
pub mod metrics;
pub mod qos;
pub mod vhost;
pub mod virtio;
