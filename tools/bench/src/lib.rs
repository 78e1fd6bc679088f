//! A vhost-user-blk front end of our own: what a VMM and its guest's driver do, without a VM.
//!
//! It loads a back end ([`load`]), checks every byte that it gets back ([`oracle`]), and kills and
//! restarts it under load ([`kill`]), and measures how well limits are held ([`limits`]). It shares
//! no code with the data path that it tests; only [`serve`], a back end to try it on, is made of
//! that.

pub mod cpu;
pub mod device;
pub mod frontend;
pub mod kill;
pub mod limits;
pub mod load;
pub mod memory;
pub mod oracle;
pub mod queue;
pub mod report;
pub mod runner;
pub mod serve;

/// What went wrong, in words.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;
