//! L3: the cached disk: a journal on the flash in front of a slower backing.
//!
//! Reading order: README.md, FORMAT.md, [`place`], [`root`], [`record`], [`header`], [`summary`],
//! [`segment`], [`index`], then opening: [`medium`], [`scan`], [`recover`],
//! [`inspect`], then the disk while it runs: `core`, `journal`, `journal_tail`, `rewrite`, `read`,
//! `around`, `patience`, `clean`, `roots`, [`drain`], [`consistency`], `numbers`, `change`,
//! `resize`, [`alone`], [`disk`]. Beside them [`policy`], what is worth keeping on flash, and
//! [`curve`], what more or less of it would bring: pure.

pub mod alone;
mod around;
mod change;
mod clean;
pub mod consistency;
mod core;
mod cursor;
pub mod curve;
pub mod disk;
pub mod drain;
pub mod header;
pub mod index;
pub mod inspect;
mod journal;
mod journal_tail;
pub mod layout;
pub mod medium;
pub mod memory;
mod merge;
pub mod message;
pub mod model;
mod numbers;
pub mod order;
mod patience;
pub mod place;
pub mod policy;
mod read;
pub mod record;
pub mod recover;
mod resize;
mod rewrite;
pub mod root;
mod roots;
pub mod scan;
pub mod segment;
pub mod status;
pub mod summary;

pub use self::core::FencePolicy;
pub use alone::{ClaimedBacking, Known};
pub use disk::{CacheOptions, CachedDisk};
pub use layout::Shape;
pub use medium::Medium;
pub use message::CacheMessage;
pub use place::Place;
pub use recover::{FormatOptions, OpenOptions, Opened};
pub use root::Mode;
pub use status::{CacheGauges, CacheState, CacheStatus};
