//! Replays block traces: through the cache's policy alone ([`simulate`]), through a cached disk on
//! simulated disks ([`through`]), through miss-ratio curves ([`curves`]), or against a running
//! daemon ([`drive`]).

pub mod curves;
pub mod drive;
pub mod format;
pub mod reference;
pub mod simulate;
pub mod summary;
pub mod through;
pub mod trace;
