//! L0: what every other module stands on.

#[cfg(test)]
pub mod byte_table;
pub mod checksum;
pub mod clock;
pub mod codec;
pub mod error;
pub mod limits;
pub mod planted;
pub mod seal;
pub mod units;

pub use error::{Error, ErrorKind, Result};
