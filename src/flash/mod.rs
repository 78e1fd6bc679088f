//! L2: the pool, which carves one drive into allocations, and the volumes that serve them.
//!
//! Reading order: FORMAT.md, [`extents`], `layout`, `root`, `record`, `table`, `store`, [`pool`],
//! [`check`], then [`volume`] and [`keeper`].

pub mod change;
pub mod check;
pub mod extents;
pub mod keeper;
mod layout;
pub mod pool;
mod record;
mod root;
mod store;
pub mod table;
mod task;
pub mod volume;

pub use change::{AllocationId, Class};
pub use check::{CheckProgress, CheckReport};
pub use extents::ExtentRange;
pub use keeper::{Keeper, KeeperOptions, Notify, ScrubStatus, VolumeOptions};
pub use layout::{ATTRIBUTES_BYTES_MAX, NAME_BYTES_MAX, POOL_BYTES_MIN, POOL_NAME_BYTES_MAX};
pub use pool::{
    FormatOptions, NewAllocation, Pool, ScrubProgress, Space, ThinKind, ThinReply, ThinRequest,
    Watermark,
};
pub use store::Finding;
pub use table::{Allocation, Run};
pub use volume::{FlashVolume, FullPolicy, VolumeCounters, VolumeMessage};
