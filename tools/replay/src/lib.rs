//! Replays block traces: through the cache's policy alone ([`simulate`]), through miss-ratio curves
//! ([`curves`]), or against a running daemon ([`drive`]).

pub mod curves;
pub mod drive;
pub mod format;
pub mod reference;
pub mod simulate;
pub mod summary;
pub mod trace;
