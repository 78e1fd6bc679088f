//! Requests as a guest writes them, good and wrong.
#![allow(clippy::indexing_slicing, clippy::unwrap_used, clippy::arithmetic_side_effects)]

use super::super::chain::tests::{BASE, TestMemory};
use super::*;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const HEADER: u64 = BASE + 4096;
const DATA: u64 = BASE + 8192;
const STATUS: u64 = BASE + 12288;

struct Rig {
    memory: TestMemory,
    device: Device,
    request: Request,
}

impl Rig {
    fn new(device: Device) -> Self {
        Self { memory: TestMemory::new(), device, request: Request::new() }
    }

    /// Header, one data buffer of `length` bytes, status.
    fn send(&mut self, kind: u32, sector: u64, length: u32, writable: bool) -> Option<Action> {
        self.header(kind, sector);
        let flags = if writable { NEXT | WRITE } else { NEXT };
        self.memory.descriptor(BASE, 0, (HEADER, 16, NEXT, 1));
        self.memory.descriptor(BASE, 1, (DATA, length, flags, 2));
        self.memory.descriptor(BASE, 2, (STATUS, 1, WRITE, 0));
        self.parse()
    }

    fn header(&self, kind: u32, sector: u64) {
        let mut header = Vec::from(kind.to_le_bytes());
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.memory.write(HEADER, &header);
    }

    fn parse(&mut self) -> Option<Action> {
        let mut chain = Chain::new();
        chain.read(&self.memory, &self.memory.table(8), 0).unwrap();
        self.request.parse(&chain, &self.device)
    }

    /// One discard or write-zeroes request of these (sector, count, flags).
    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> Option<Action> {
        let mut bytes = Vec::new();
        for (sector, count, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(count.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.memory.write(DATA, &bytes);
        self.send(kind, 0, bytes.len() as u32, false)
    }
}

const FAILED: Option<Action> = Some(Action::Refuse(Outcome::Failed));
const UNSUPPORTED: Option<Action> = Some(Action::Refuse(Outcome::Unsupported));

#[test]
fn reads_and_writes_stay_within_the_capacity() {
    let mut rig = Rig::new(Device::for_test(100));
    for (kind, writable, expected) in
        [(VIRTIO_BLK_T_IN, true, RequestKind::Read), (VIRTIO_BLK_T_OUT, false, RequestKind::Write)]
    {
        assert_eq!(rig.send(kind, 92, 4096, writable), Some(Action::Volume(expected)));
        assert_eq!(rig.request.ranges, [SectorRange { start: 92, count: 8 }]);
        assert_eq!(rig.request.bytes, 4096);
        assert_eq!(rig.send(kind, 93, 4096, writable), FAILED);
        assert_eq!(rig.send(kind, u64::MAX, 512, writable), FAILED);
        assert_eq!(rig.send(kind, u64::MAX / 512 + 1, 512, writable), FAILED);
        assert_eq!(rig.send(kind, 0, 511, writable), FAILED, "not whole sectors");
        assert_eq!(rig.send(kind, 0, 0, writable), FAILED, "nothing to transfer");
    }
}

#[test]
fn no_transfer_is_larger_than_the_config_space_allows() {
    let mut rig = Rig::new(Device::for_test(1 << 40));
    let most = limits::SEGMENTS_MAX as u64 * u64::from(limits::SEGMENT_BYTES_MAX);
    for (bytes, expected) in
        [(most, Some(Action::Volume(RequestKind::Read))), (most + SECTOR_BYTES, FAILED)]
    {
        rig.request.bytes = bytes;
        assert_eq!(Some(rig.request.transfer(RequestKind::Read, 0, &rig.device)), expected);
    }
}

#[test]
fn the_header_may_be_split_and_share_a_buffer_with_data() {
    let mut rig = Rig::new(Device::for_test(100));
    rig.header(VIRTIO_BLK_T_OUT, 4);
    rig.memory.descriptor(BASE, 0, (HEADER, 5, NEXT, 1));
    rig.memory.descriptor(BASE, 1, (HEADER + 5, 11 + 500, NEXT, 2));
    rig.memory.descriptor(BASE, 2, (DATA, 12, NEXT, 3));
    rig.memory.descriptor(BASE, 3, (STATUS, 1, WRITE, 0));
    assert_eq!(rig.parse(), Some(Action::Volume(RequestKind::Write)));
    assert_eq!(rig.request.data.iter().map(Segment::length).collect::<Vec<_>>(), [500, 12]);
}

#[test]
fn the_status_byte_is_the_last_writable_one() {
    let mut rig = Rig::new(Device::for_test(100));
    rig.header(VIRTIO_BLK_T_IN, 0);
    rig.memory.descriptor(BASE, 0, (HEADER, 16, NEXT, 1));
    rig.memory.descriptor(BASE, 1, (DATA, 513, WRITE, 0));
    assert_eq!(rig.parse(), Some(Action::Volume(RequestKind::Read)));
    rig.request.status.unwrap().copy_from(&[0xaa]);
    assert_eq!(rig.memory.low[8192 + 512], 0xaa);
}

#[test]
fn without_header_or_status_there_is_no_request() {
    let mut rig = Rig::new(Device::for_test(100));
    rig.memory.descriptor(BASE, 0, (HEADER, 15, NEXT, 1));
    rig.memory.descriptor(BASE, 1, (STATUS, 1, WRITE, 0));
    assert_eq!(rig.parse(), None);
    rig.header(VIRTIO_BLK_T_FLUSH, 0);
    rig.memory.descriptor(BASE, 0, (HEADER, 16, 0, 0));
    assert_eq!(rig.parse(), None);
}

#[test]
fn a_read_only_device_refuses_every_change() {
    let mut rig = Rig::new(Device { read_only: true, ..Device::for_test(100) });
    assert_eq!(rig.send(VIRTIO_BLK_T_OUT, 0, 512, false), FAILED);
    assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 0)]), FAILED);
    assert_eq!(rig.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 0)]), FAILED);
    assert_eq!(rig.send(VIRTIO_BLK_T_IN, 0, 512, true), Some(Action::Volume(RequestKind::Read)));
}

#[test]
fn discard_and_write_zeroes_check_ranges_and_flags() {
    let mut rig = Rig::new(Device::for_test(1 << 40));
    let most = limits::RANGE_SECTORS_MAX;
    let discard = Some(Action::Volume(RequestKind::Discard));
    assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[(8, 8, 0), (0, most, 0)]), discard);
    assert_eq!(rig.request.ranges.len(), 2);
    assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[(8, 8, 1)]), UNSUPPORTED);
    assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[(8, most + 1, 0)]), FAILED);
    assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[(8, 0, 0)]), FAILED);
    assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[(u64::MAX, 8, 0)]), FAILED);
    assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 0); limits::RANGES_MAX + 1]), FAILED);
    assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[]), FAILED);
    let zeroes = |unmap| Some(Action::Volume(RequestKind::WriteZeroes { unmap }));
    assert_eq!(rig.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(8, 8, 1)]), zeroes(true));
    assert_eq!(
        rig.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(8, 8, 1), (0, 1, 0)]),
        zeroes(false),
        "one range that must stay allocated keeps all"
    );
    assert_eq!(rig.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(8, 8, 2)]), UNSUPPORTED);
    rig.device.discard = false;
    assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[(8, 8, 0)]), UNSUPPORTED);
}

#[test]
fn other_requests_are_answered_without_the_volume() {
    let mut rig = Rig::new(Device::for_test(100));
    assert_eq!(rig.send(VIRTIO_BLK_T_GET_ID, 0, 20, true), Some(Action::GetId));
    assert_eq!(rig.request.bytes, 20);
    assert_eq!(rig.send(10, 0, 512, true), UNSUPPORTED, "GET_LIFETIME is not offered");
    assert_eq!(
        rig.send(VIRTIO_BLK_T_FLUSH, 99, 0, true),
        Some(Action::Volume(RequestKind::Flush)),
        "the sector of a flush is ignored"
    );
}
