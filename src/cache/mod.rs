//! L3: the cached disk: a journal on the flash in front of a slower backing.
//!
//! Reading order: README.md, FORMAT.md, [`place`], [`root`], [`record`], `header`, `summary`,
//! `segment`, [`recover`], then the disk while it runs: `staging`, `journal`, `read`, [`disk`].

mod cursor;
pub mod drain;
pub mod header;
pub mod index;
pub mod layout;
mod merge;
pub mod order;
pub mod place;
pub mod record;
pub mod root;
pub mod summary;

pub use place::Place;
pub use root::Mode;
