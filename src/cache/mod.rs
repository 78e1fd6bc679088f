//! L3: the cached disk.
//!
//! [`policy`] decides what stays on flash, [`curve`] tells what more or less of it would bring.

pub mod curve;
pub mod policy;
