//! Feature bits of virtio-blk over vhost-user: what is offered, and what never is.
//!
//! Never offered, because the front ends pass these bits through to the guest whether or not the
//! back end understands them: packed rings, `RING_RESET`, `IN_ORDER`, `NOTIFICATION_DATA`,
//! `ACCESS_PLATFORM`.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::config::Device;

/// Bit 26 of the vhost-user feature word: the front end wants dirty pages logged.
pub const LOG_ALL: u64 = 1 << 26;

/// Bit 30 of the vhost-user feature word: protocol features may be negotiated.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;

pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
pub const INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
pub const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
pub const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
pub const CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;
pub const DISCARD: u64 = 1 << VIRTIO_BLK_F_DISCARD;
pub const WRITE_ZEROES: u64 = 1 << VIRTIO_BLK_F_WRITE_ZEROES;
pub const READ_ONLY: u64 = 1 << VIRTIO_BLK_F_RO;

/// The feature word offered for `device`, vhost-user's own bits included.
pub fn offered(device: &Device) -> u64 {
    let mut features = VERSION_1
        | EVENT_IDX
        | INDIRECT
        | LOG_ALL
        | PROTOCOL_FEATURES
        | 1 << VIRTIO_BLK_F_SIZE_MAX
        | 1 << VIRTIO_BLK_F_SEG_MAX
        | 1 << VIRTIO_BLK_F_BLK_SIZE
        | 1 << VIRTIO_BLK_F_TOPOLOGY
        | 1 << VIRTIO_BLK_F_MQ
        | FLUSH
        | CONFIG_WCE;
    if device.read_only {
        features |= READ_ONLY;
    } else if device.discard {
        features |= DISCARD | WRITE_ZEROES;
    } else {
        features |= WRITE_ZEROES;
    }
    features
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_that_front_ends_pass_through_unasked_are_never_offered() {
        const NEVER: [u32; 5] = [33, 34, 35, 38, 40];
        for (read_only, discard) in [(false, false), (false, true), (true, true)] {
            let features = offered(&Device { read_only, discard, ..Device::for_test(2048) });
            for bit in NEVER {
                assert_eq!(features & (1 << bit), 0, "bit {bit}");
            }
            assert_eq!(features & READ_ONLY != 0, read_only);
            assert_eq!(features & DISCARD != 0, discard && !read_only);
        }
    }
}
