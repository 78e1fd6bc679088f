//! The readers of traces: what good files say, and that bad ones are named errors.

use vflash::base::ErrorKind;
use vflash_replay::trace::{Format, Request, Trace, Unit};

const FORMATS: [Format; 4] =
    [Format::Vscsi, Format::Lis(Unit::Sector), Format::Lis(Unit::Page), Format::Ids];

fn vscsi(records: &[(u32, u16, u64, u64)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (serial, (length, command, sector, micros)) in records.iter().enumerate() {
        bytes.extend((serial as u32).to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(1_u32.to_le_bytes());
        bytes.extend(command.to_le_bytes());
        bytes.extend(0x0100_u16.to_le_bytes());
        bytes.extend(sector.to_le_bytes());
        bytes.extend(micros.to_le_bytes());
    }
    bytes
}

fn sample(format: Format) -> Vec<u8> {
    match format {
        Format::Vscsi => vscsi(&[(4096, 0x28, 63, 10), (512, 0x2a, 1 << 30, 20), (0, 0x35, 0, 25)]),
        Format::Lis(_) => b"230027 8 0 0\n1842745 64 0 1\r\n\n216082 8 0 2\n".to_vec(),
        Format::Ids => [7_u32, 8, 9, u32::MAX].iter().flat_map(|id| id.to_le_bytes()).collect(),
    }
}

#[test]
fn each_format_says_what_was_put_in() {
    let read = |format: Format| format.requests(&sample(format)).unwrap();
    let request = |sector, sectors, write, micros| Request { sector, sectors, write, micros };
    // The flush between is no transfer.
    let expected = [request(63, 8, false, 10), request(1 << 30, 1, true, 20)];
    assert_eq!(read(Format::Vscsi), expected);
    let sectors = read(Format::Lis(Unit::Sector));
    assert_eq!(sectors[1], request(1_842_745, 64, false, 0));
    assert_eq!(sectors.len(), 3);
    assert_eq!(read(Format::Lis(Unit::Page))[0], request(230_027 * 8, 64, false, 0));
    assert_eq!(read(Format::Ids)[3], request(u64::from(u32::MAX) * 8, 8, false, 0));
}

#[test]
fn a_request_touches_every_block_that_it_overlaps() {
    let blocks = |sector, sectors| {
        let request = Request { sector, sectors, write: false, micros: 0 };
        request.blocks().collect::<Vec<_>>()
    };
    assert_eq!(blocks(63, 8), [7, 8]);
    assert_eq!(blocks(8, 8), [1]);
    assert_eq!(blocks(15, 1), [1]);
    assert_eq!(blocks(0, 17), [0, 1, 2]);
}

#[test]
fn damage_is_named_with_its_place() {
    let errors = |format: Format, bytes: &[u8]| {
        let error = format.requests(bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        error.to_string()
    };
    let whole = sample(Format::Vscsi);
    assert_eq!(errors(Format::Vscsi, &whole[..70]), "byte 64: the last record is cut short");
    let mut bytes = whole.clone();
    bytes[32 + 15] = 9;
    assert_eq!(errors(Format::Vscsi, &bytes), "byte 32: version 0x0900, not 0x0100");
    let bytes = vscsi(&[(1000, 0x28, 0, 0)]);
    assert_eq!(errors(Format::Vscsi, &bytes), "byte 0: 1000 bytes are no whole sectors");
    let bytes = vscsi(&[(1 << 31, 0x28, 0, 0)]);
    assert_eq!(errors(Format::Vscsi, &bytes), "byte 0: a request of 4194304 sectors");
    let bytes = vscsi(&[(512, 0x28, u64::MAX, 0)]);
    assert!(errors(Format::Vscsi, &bytes).contains("is beyond any disk"));
    let lis = Format::Lis(Unit::Sector);
    assert_eq!(errors(lis, b"1 1 0 0\n1 x 0 1\n"), "line 2: `1 x 0 1` is not four numbers");
    assert_eq!(errors(lis, b"1 2 3\n"), "line 1: `1 2 3` is not four numbers");
    assert_eq!(errors(lis, b"1 2 3 4 5\n"), "line 1: `1 2 3 4 5` is not four numbers");
    assert_eq!(errors(lis, b"1 0 0 0\n"), "line 1: a request of 0 sectors");
    assert_eq!(errors(lis, b"\xff\xfe\n"), "line 1: not text");
    assert_eq!(errors(Format::Ids, &[1, 2, 3, 4, 5]), "byte 4: the last block number is cut short");
}

#[test]
fn mutated_traces_are_read_or_refused_and_never_panic() {
    for (which, format) in FORMATS.into_iter().enumerate() {
        let mut random = fastrand::Rng::with_seed(which as u64);
        let mut refused = 0;
        for _ in 0..20_000 {
            let mut bytes = sample(format);
            for _ in 0..random.usize(1..5) {
                match random.u8(..4) {
                    0 => bytes.truncate(random.usize(..=bytes.len())),
                    1 => bytes.insert(random.usize(..=bytes.len()), random.u8(..)),
                    _ if !bytes.is_empty() => {
                        let at = random.usize(..bytes.len());
                        bytes[at] ^= 1 << random.u8(..8);
                    }
                    _ => {}
                }
            }
            match format.requests(&bytes) {
                Ok(requests) => {
                    let blocks = requests.iter().map(|request| request.blocks().count());
                    assert!(blocks.sum::<usize>() <= requests.len() * (1 << 15));
                    assert!(requests.iter().all(|request| request.sectors > 0));
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Corrupt);
                    refused += 1;
                }
            }
        }
        assert!(refused > 1000, "{format:?}: {refused} refused");
    }
}

#[test]
fn files_are_told_by_their_names_and_unpacked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("OLTP.part.lis");
    std::fs::write(&path, "3 1 0 0\n").unwrap();
    let trace = Trace::open(&path, None).unwrap();
    assert_eq!((trace.name.as_str(), trace.requests[0].sector), ("OLTP", 24), "pages by its name");
    let trace = Trace::open(&path, Some(Unit::Sector)).unwrap();
    assert_eq!(trace.requests[0].sector, 3);

    let path = folder.path().join("a.csv");
    std::fs::write(&path, "").unwrap();
    assert_eq!(Trace::open(&path, None).unwrap_err().kind(), ErrorKind::Unsupported);
    let error = Trace::open(&folder.path().join("none.lis"), None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone);
    assert!(error.to_string().contains("none.lis"), "{error}");
    let path = folder.path().join("bad.trace.xz");
    std::fs::write(&path, "not packed at all").unwrap();
    let error = Trace::open(&path, None).unwrap_err().to_string();
    assert!(error.contains("xz") && error.contains("bad.trace.xz"), "{error}");
}
