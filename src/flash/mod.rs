//! L2: the pool, which carves one drive into allocations, and the volumes that serve them.
//!
//! Reading order: FORMAT.md, [`extents`], `layout`, `root`, `record`, `table`, `store`, [`pool`],
//! `format`, `thin`, [`check`], then [`volume`], `places`, `holds`, `task` and [`keeper`].

pub mod change;
pub mod check;
pub mod extents;
mod format;
mod holds;
pub mod keeper;
mod layout;
mod places;
pub mod pool;
mod record;
mod root;
mod store;
pub mod table;
mod task;
mod thin;
pub mod volume;

pub use change::{AllocationId, Class};
pub use check::{CheckProgress, CheckReport};
pub use extents::ExtentRange;
pub use format::FormatOptions;
pub use keeper::{Keeper, KeeperOptions, Notify, ScrubStatus, VolumeOptions};
pub use layout::{ATTRIBUTES_BYTES_MAX, NAME_BYTES_MAX, POOL_BYTES_MIN, POOL_NAME_BYTES_MAX};
pub use pool::{NewAllocation, Pool, PoolView, ScrubProgress, Space, Watermark};
pub use store::Finding;
pub use table::{Allocation, Run};
pub use thin::{ThinKind, ThinReply, ThinRequest};
pub use volume::{DriveErrors, FlashVolume, FullPolicy, VolumeCounters, VolumeMessage};
