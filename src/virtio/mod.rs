//! L1: virtio-blk, pure: a descriptor chain becomes a checked request or a status byte.
//!
//! Everything here reads bytes that a guest wrote and may still be changing, so each is copied once
//! and checked on the copy. References are to the Virtual I/O Device specification, version 1.2.
//!
//! - [`features`] what is offered and why the rest is not.
//! - [`config`] the device as the host declares it, and its config space.
//! - [`chain`] descriptors to segments.
//! - [`request`] segments to a [`crate::io::volume::Request`].

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

pub mod chain;
pub mod config;
pub mod features;
pub mod request;

pub use config::Device;
