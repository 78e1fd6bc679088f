//! L2: the shared disk below a cache: a file, a block device or an NBD export, with an owner stamp
//! and a redo sidecar on the shared storage. README.md has the decisions, FORMAT.md the bytes.
//!
//! Reading order: [`spec`] (what a manifest names), [`identity`], [`stamp`] and [`redo`] (what the
//! sidecar holds), [`roster`], [`group`], [`sidecar`], [`recover`], [`fence`] (who may), [`open`],
//! [`together`] (the disks of a consistency group), [`nbd`].

pub mod fence;
pub mod group;
pub mod identity;
pub mod nbd;
pub mod open;
pub mod recover;
pub mod redo;
pub mod roster;
pub mod sidecar;
pub mod spec;
pub mod stamp;
pub mod together;

#[cfg(test)]
mod format_test;
