//! Every bound of the daemon, by name. A queue without an entry here has no bound.

/// Queues offered per device. QEMU refuses a back-end with fewer than its vCPUs.
pub const QUEUES_MAX: usize = 64;

/// Ring entries per queue. Virtio allows 32768; QEMU's front end takes at most 1024.
pub const QUEUE_SIZE_MAX: u16 = 1024;

/// Guest memory regions of one connection. QEMU's memory slots reach 509.
pub const MEMORY_REGIONS_MAX: usize = 509;

/// Data segments of one request, as `seg_max` tells the guest: a ring of 128 entries less header
/// and status. An indirect table may carry as many.
pub const SEGMENTS_MAX: usize = 126;

/// Bytes of one data segment, as `size_max` tells the guest.
pub const SEGMENT_BYTES_MAX: u32 = 4 << 20;

/// Bytes of one read or write, as the two above together say.
pub const TRANSFER_BYTES_MAX: u64 = SEGMENTS_MAX as u64 * SEGMENT_BYTES_MAX as u64;

/// Ranges of one discard or write-zeroes request.
pub const RANGES_MAX: usize = 16;

/// Sectors of one range of a discard or write-zeroes request: 1 GiB, so that one operation cannot
/// hold a drive for long. The ranges of a request are done one after the other.
pub const RANGE_SECTORS_MAX: u32 = 1 << 21;

/// Doors of one volume: virtual machines that share it. A journal's records have room for more.
pub const DOORS_MAX: usize = 64;

/// Bytes that groups being drained take, of all cached disks together, beside 4 MiB of each.
pub const DRAIN_BYTES_SHARED: u64 = 256 << 20;

/// Devices (sockets) of one daemon.
pub const EXPORTS_MAX: usize = 1024;

/// Bytes of blocks that were read once and wait in memory for a second time, of all cached disks.
pub const PROBATION_BYTES_MAX: u64 = 256 << 20;

/// Disks of one consistency group, as many as an owner stamp can name.
pub const CONSISTENCY_GROUP_MAX: usize = 16;
