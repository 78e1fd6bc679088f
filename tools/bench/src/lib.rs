//! A vhost-user-blk front end of our own: what a VMM and its guest's driver do, without a VM.
//!
//! It loads a back end ([`load`]), checks every byte that it gets back ([`oracle`]), kills and
//! restarts it under load ([`kill`]), measures how well limits are held ([`limits`]), and has
//! several guests of one disk checked for one order of all that they see ([`linear`]). It shares no
//! code with the data path that it tests; only [`serve`], a back end to try it on, is made of that.

pub mod cpu;
pub mod device;
pub mod frontend;
pub mod kill;
pub mod limits;
pub mod linear;
pub mod load;
pub mod memory;
pub mod oracle;
pub mod queue;
pub mod register;
pub mod report;
pub mod runner;
pub mod serve;

/// What went wrong, in words.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;
