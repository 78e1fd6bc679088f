//! A device as the host declares it, and the config space that its guest reads (5.2.4).

use crate::base::codec::Writer;
use crate::base::limits;
use crate::base::units::SECTOR_BYTES;

/// Bytes of `struct virtio_blk_config` up to and including `write_zeroes_may_unmap`. Front ends
/// ask for anything from 57 to 256 bytes: the rest reads as zeros.
pub const CONFIG_BYTES: usize = 60;

/// Config space that a front end may address. Dragonball counts from 0x100.
pub const CONFIG_SPACE_BYTES: usize = 4096;

/// Where `writeback` stands, the only byte that a driver may write.
pub const WRITEBACK_OFFSET: u32 = 32;

/// Bytes of the answer to `VIRTIO_BLK_T_GET_ID` (5.2.6).
pub const ID_BYTES: usize = 20;

/// What a guest sees of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Size in 512-byte sectors; changes on resize.
    pub capacity_sectors: u64,
    /// Logical block size in bytes: requests are multiples of it.
    pub block_bytes: u32,
    /// Preferred write granularity in bytes, a power-of-two multiple of `block_bytes`.
    pub optimal_bytes: u32,
    pub read_only: bool,
    /// Guest discards are worth sending.
    pub discard: bool,
    /// Serial number, at most 20 bytes of ASCII.
    pub serial: String,
    /// Queues offered; a guest uses as many as it has CPUs.
    pub queues: u16,
}

impl Device {
    /// The answer to GET_ID: the serial, padded with zeros.
    pub fn id(&self) -> [u8; ID_BYTES] {
        let mut id = [0; ID_BYTES];
        for (target, source) in id.iter_mut().zip(self.serial.bytes()) {
            *target = source;
        }
        id
    }

    /// The config space. `write_cache` is the current state of the `writeback` byte.
    pub fn config_space(&self, write_cache: bool) -> Vec<u8> {
        let ratio = self.optimal_bytes.checked_div(self.block_bytes).unwrap_or(1).max(1);
        let ranges = limits::RANGES_MAX as u32;
        let alignment = u64::from(self.optimal_bytes.max(self.block_bytes)) / SECTOR_BYTES;
        let mut space = Writer::new();
        space
            .u64(self.capacity_sectors)
            .u32(limits::SEGMENT_BYTES_MAX)
            .u32(limits::SEGMENTS_MAX as u32)
            .pad_to(20) // geometry: not offered
            .u32(self.block_bytes)
            .u8(ratio.ilog2() as u8) // physical_block_exp
            .u8(0) // alignment_offset
            .u16(ratio as u16) // min_io_size, in blocks
            .u32(0) // opt_io_size: no preference
            .u8(u8::from(write_cache))
            .u8(0) // unused0
            .u16(self.queues)
            .u32(limits::RANGE_SECTORS_MAX) // max_discard_sectors
            .u32(ranges) // max_discard_seg
            .u32(alignment as u32) // discard_sector_alignment
            .u32(limits::RANGE_SECTORS_MAX) // max_write_zeroes_sectors
            .u32(ranges) // max_write_zeroes_seg
            .u8(1) // write_zeroes_may_unmap
            .pad_to(CONFIG_SPACE_BYTES);
        space.into_bytes()
    }

    /// A plain device for tests.
    #[cfg(test)]
    pub(crate) fn for_test(capacity_sectors: u64) -> Self {
        Self {
            capacity_sectors,
            block_bytes: 512,
            optimal_bytes: 4096,
            read_only: false,
            discard: true,
            serial: "vflash-nv-test".into(),
            queues: 4,
        }
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::unwrap_used, clippy::arithmetic_side_effects)]
mod tests {
    use super::*;
    use std::mem::offset_of;
    use virtio_bindings::virtio_blk::virtio_blk_config;

    fn u32_at(space: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(space[offset..offset + 4].try_into().unwrap())
    }

    #[test]
    fn fields_stand_where_the_kernel_header_has_them() {
        let device = Device { queues: 7, ..Device::for_test(0x1_2345_6789) };
        let space = device.config_space(true);
        assert_eq!(space.len(), CONFIG_SPACE_BYTES);
        assert_eq!(u64::from_le_bytes(space[..8].try_into().unwrap()), 0x1_2345_6789);
        assert_eq!(
            u32_at(&space, offset_of!(virtio_blk_config, seg_max)),
            limits::SEGMENTS_MAX as u32
        );
        assert_eq!(u32_at(&space, offset_of!(virtio_blk_config, blk_size)), 512);
        assert_eq!(space[offset_of!(virtio_blk_config, physical_block_exp)], 3);
        assert_eq!(offset_of!(virtio_blk_config, wce), WRITEBACK_OFFSET as usize);
        assert_eq!(space[WRITEBACK_OFFSET as usize], 1);
        assert_eq!(space[offset_of!(virtio_blk_config, num_queues)], 7);
        let discard = offset_of!(virtio_blk_config, max_discard_sectors);
        assert_eq!(u32_at(&space, discard), limits::RANGE_SECTORS_MAX);
        assert_eq!(u32_at(&space, discard + 8), 8, "discard alignment is the optimal write");
        let may_unmap = offset_of!(virtio_blk_config, write_zeroes_may_unmap);
        assert_eq!(space[may_unmap], 1);
        assert!(may_unmap < CONFIG_BYTES && space[CONFIG_BYTES..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_long_serial_is_cut_at_twenty_bytes() {
        let device = Device { serial: "x".repeat(30), ..Device::for_test(8) };
        assert_eq!(device.id(), [b'x'; ID_BYTES]);
    }
}
