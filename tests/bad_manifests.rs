//! Every mistake in a manifest is answered with its place, what is wrong and what to write.
//!
//! Each file of `tests/bad_manifests` holds what it must be answered with, as comments of the form
//! `# LINE:COLUMN: message`, all of them, in order. What is no mistake of the text alone is planned
//! against the host below.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use vflash::base::units::{GIB, MIB, TIB};
use vflash::manifest::{
    Actual, ActualPool, ActualVolume, Class, Device, DeviceState, Role, Source, VolumeName,
    VolumeSettings, parse, plan,
};

/// Two pools, some volumes of the machine `db`, and some devices.
fn host() -> Actual {
    let pool = |name: &str, path: &str, size_bytes, free_bytes| ActualPool {
        name: name.to_owned(),
        device: Device::Path(PathBuf::from(path)),
        size_bytes,
        free_bytes,
        open: true,
    };
    let volume = |name: &str, class, thin, attached| ActualVolume {
        name: VolumeName::new("db", name),
        pool: "nvme0".to_owned(),
        size_bytes: 64 * GIB,
        class,
        thin,
        settings: VolumeSettings::default(),
        attached,
        role: Role::Own,
    };
    let holds = |name: &str| DeviceState::Pool { name: name.to_owned() };
    let ext4 = DeviceState::Foreign { size_bytes: TIB, content: "an ext4 file system".to_owned() };
    let xfs = DeviceState::Foreign { size_bytes: TIB, content: "an xfs file system".to_owned() };
    let devices = [
        ("/dev/nvme0n1", holds("nvme0")),
        ("/dev/nvme1n1", ext4),
        ("/srv/old.img", xfs),
        ("/srv/slow.pool", holds("slow")),
        ("/srv/small.img", DeviceState::Blank { size_bytes: 8 * MIB }),
        ("/srv/blank.img", DeviceState::Blank { size_bytes: 8 * GIB }),
    ];
    Actual {
        pools: vec![
            pool("nvme0", "/dev/nvme0n1", TIB, 512 * GIB),
            pool("slow", "/srv/slow.pool", 100 * GIB, 100 * GIB),
        ],
        volumes: vec![
            volume("data", Class::Nonvolatile, false, true),
            volume("scratch", Class::Volatile, true, false),
        ],
        devices: devices.into_iter().map(|(path, state)| (PathBuf::from(path), state)).collect(),
        ..Actual::default()
    }
}

/// All that is wrong with the manifest, as `LINE:COLUMN: message`.
fn answers(name: &str, text: &str) -> Vec<String> {
    let source = Source {
        name: name.to_owned(),
        directory: Some(PathBuf::from("/etc/vflash")),
        text: text.to_owned(),
    };
    let planned = parse(&[source]).and_then(|wanted| plan(&wanted, &host()));
    let mistakes = match planned {
        Err(mistakes) => mistakes,
        Ok(plan) => plan.unconfirmed(&[]),
    };
    let strip = |text: String| {
        let rest = text.strip_prefix(&format!("{name}:")).expect("a mistake names its file");
        rest.to_owned()
    };
    mistakes.iter().map(|mistake| strip(mistake.to_string())).collect()
}

/// The comments of the form `# LINE:COLUMN: message`.
fn expected(text: &str) -> Vec<String> {
    let is_place = |text: &str| {
        let mut parts = text.splitn(3, ':');
        let number = |part: Option<&str>| part.is_some_and(|part| part.parse::<u32>().is_ok());
        number(parts.next()) && number(parts.next())
    };
    let comments = text.lines().filter_map(|line| line.strip_prefix("# "));
    comments.filter(|comment| is_place(comment)).map(str::to_owned).collect()
}

fn files() -> BTreeMap<String, String> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bad_manifests");
    let entries = std::fs::read_dir(directory).expect("the directory is there");
    let file = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        (name, std::fs::read_to_string(path).expect("text"))
    };
    entries.map(file).collect()
}

#[test]
fn every_bad_manifest_is_answered_exactly() {
    let files = files();
    assert!(files.len() >= 120, "only {} bad manifests", files.len());
    let mut wrong = Vec::new();
    for (name, text) in &files {
        let (answers, expected) = (answers(name, text), expected(text));
        assert!(!expected.is_empty(), "{name} says not what is wrong with it");
        if answers != expected {
            let answers: Vec<String> = answers.iter().map(|text| format!("# {text}")).collect();
            wrong.push(format!("{name} is answered with\n{}", answers.join("\n")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
