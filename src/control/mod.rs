//! L4: control. Composes pools and the vhost-user server, and lets people speak with both.
//!
//! Reading order: [`api`] and [`api_cached`] (what is said), [`engine`] (the composition),
//! [`served`] (a volume behind a socket), [`pool`], [`restoring`], then cached disks: [`cached`]
//! (one opened), [`alone`] (without its backing for a while), [`opening`] (all of them, again and
//! again), [`sharing`] (several machines on one), [`caching`] (what they are asked), [`resizing`],
//! [`advising`], [`balance`] (which sizes are best), [`detaching`] (the ways out),
//! [`watch_cache`]; then [`turns`], [`changes`] (single changes), [`apply`] (many, all or nothing,
//! with [`inspect`]), [`routes`] and [`http`] (how it is said), [`events`], [`watch`], [`rundir`],
//! [`openapi`], and [`daemon`], which runs it all. Threads and decisions are in README.md.

#![forbid(unsafe_code)]

pub mod advising;
pub mod alone;
pub mod api;
pub mod api_cached;
pub mod apply;
pub mod balance;
pub mod cached;
pub mod caching;
pub mod changes;
pub mod daemon;
pub mod detaching;
pub mod engine;
pub mod events;
pub mod exposition;
mod holding;
pub mod http;
pub mod inspect;
pub mod openapi;
pub mod opening;
pub mod pool;
pub mod resizing;
pub mod restoring;
pub mod routes;
pub mod rundir;
pub mod served;
pub mod sharing;
mod together;
pub mod turns;
pub mod watch;
pub mod watch_cache;
