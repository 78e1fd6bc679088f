//! L0: what every other module stands on.

pub mod checksum;
pub mod clock;
pub mod codec;
pub mod error;
pub mod limits;
pub mod planted;
pub mod units;

pub use error::{Error, ErrorKind, Result};
