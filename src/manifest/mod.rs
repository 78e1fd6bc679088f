//! L1: what should exist: the YAML schema, its parser, and the plan from wanted to actual.
//!
//! Pure but for [`mod@load`], which reads files. In reading order: [`schema`] (what a manifest
//! says), [`settings`] (what the pool remembers of a volume), `tree` (YAML with positions),
//! `decode` and `value` (typed reading), `document` and `machine` (the kinds), [`mod@plan`] and
//! [`step`] (wanted against actual), [`export`] (what exists, as a manifest).
//!
//! Invariants:
//! - A manifest is taken whole or not at all: every mistake of every source is reported, each with
//!   its place and what to write instead, and nothing is returned beside mistakes.
//! - What YAML readers read differently is refused, so that a manifest means the same to all that
//!   read it.
//! - A plan of what a plan has made is empty.
#![deny(clippy::unwrap_used, clippy::expect_used)]
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![forbid(unsafe_code)]

mod decode;
mod document;
pub mod export;
pub mod load;
mod machine;
mod mistake;
pub mod plan;
#[cfg(test)]
mod plan_test;
mod planner;
mod planner_cached;
mod planner_shared;
pub mod schema;
pub mod settings;
pub mod step;
mod tree;
#[cfg(test)]
mod tree_test;
mod value;

pub use document::{SOURCE_BYTES_MAX, Source, parse};
pub use load::load;
pub use mistake::{Located, Mistake, Place};
pub use plan::{Actual, ActualPool, ActualVolume, DeviceState, Role, plan, plan_deletion};
pub use schema::{CacheMode, Class, Device, Drain, Durability, VolumeName, Wanted};
pub use settings::{
    Access, Attributes, CacheSettings, CacheShare, Door, Limits, LogIdentity, Principal, Sharing,
    VolumeSettings, WhenFull,
};
pub use step::{Action, Plan, Step};
