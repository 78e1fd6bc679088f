//! Each file of `manifests/` is read, planned, carried out on a model of a host, and found done.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use vflash::base::units::TIB;
use vflash::manifest::export::to_yaml;
use vflash::manifest::plan::check_sockets;
use vflash::manifest::schema;
use vflash::manifest::{
    Action, Actual, ActualPool, ActualVolume, Device, DeviceState, Limits, Role, Source, Wanted,
    load, parse, plan, plan_deletion,
};

/// What `vflash diff` prints for each file on a host that has an empty drive and no pool.
const DIFFS: [(&str, &str); 10] = [
    (
        "demo.yaml",
        "+ pool demo: create on MANIFESTS/demo.pool, a file of 2GiB\n\
         + volume demo/data: 512MiB on demo, nonvolatile\n\
         + volume demo/scratch: 1GiB on demo, volatile, thin, iops 20000, bandwidth 400MiB/s\n\
         3 to create, 0 to change, 0 to delete.\n",
    ),
    (
        "two-machines.yaml",
        "+ pool nvme0: create on /dev/disk/by-id/nvme-EXAMPLE_SERIAL\n\
         + volume web-1/scratch: 64GiB on nvme0, nonvolatile, iops 20000, bandwidth 400MiB/s, \
         owner libvirt-qemu, group kvm, mode 0660\n\
         + volume db-1/wal: 16GiB on nvme0, nonvolatile, iops 50000, burst 1s, \
         owner libvirt-qemu, group kvm, mode 0660\n\
         + volume db-1/data: 256GiB on nvme0, nonvolatile, bandwidth 1GiB/s, queues 8, \
         owner libvirt-qemu, group kvm, mode 0660\n\
         4 to create, 0 to change, 0 to delete.\n",
    ),
    (
        "thin.yaml",
        "+ pool nvme0: create on /dev/disk/by-id/nvme-EXAMPLE_SERIAL\n\
         + volume build-1/cache: 2TiB on nvme0, nonvolatile, thin\n\
         + volume build-1/spill: 2TiB on nvme0, nonvolatile, thin, whenFull enospc\n\
         3 to create, 0 to change, 0 to delete.\n",
    ),
    (
        "classes.yaml",
        "+ pool nvme0: create on /dev/disk/by-id/nvme-EXAMPLE_SERIAL\n\
         + volume web-1/data: 64GiB on nvme0, nonvolatile\n\
         + volume web-1/swap: 16GiB on nvme0, volatile\n\
         + volume web-1/reference: 8GiB on nvme0, nonvolatile, readOnly true\n\
         4 to create, 0 to change, 0 to delete.\n",
    ),
    (
        "cached.yaml",
        "+ pool nvme0: create on /dev/disk/by-id/nvme-EXAMPLE_SERIAL\n\
         + volume web-1/root: /mnt/nfs/web-1.raw cached in 16GiB on nvme0\n\
         + volume web-1/data: nbd://storage.example/web-1-data cached in 64GiB on nvme0, sidecar \
         /mnt/nfs/web-1-data.redo, drain grouped, maxStaleness 5s, backingTimeout 300s, \
         flashWriteBudget 200GiB\n\
         + volume web-1/logs: /mnt/nfs/web-1-logs.raw cached in 8GiB on nvme0, cache mode \
         write-through, drain ordered, durability flush\n\
         4 to create, 0 to change, 0 to delete.\n",
    ),
    (
        "cached-demo.yaml",
        "+ pool cached-demo: create on MANIFESTS/cached-demo.pool, a file of 1GiB\n\
         + volume db/shared: MANIFESTS/shared.raw cached in 512MiB on cached-demo\n\
         2 to create, 0 to change, 0 to delete.\n",
    ),
    (
        "consistency-group.yaml",
        "+ pool nvme0: create on /dev/disk/by-id/nvme-EXAMPLE_SERIAL\n\
         + volume db-1/log: /mnt/nfs/db-1-log.raw cached in 16GiB on nvme0, consistencyGroup db-1\n\
         + volume db-1/tables: /mnt/nfs/db-1-tables.raw cached in 64GiB on nvme0, consistencyGroup \
         db-1\n\
         3 to create, 0 to change, 0 to delete.\n",
    ),
    (
        "shared.yaml",
        "+ pool nvme0: create on /dev/disk/by-id/nvme-EXAMPLE_SERIAL\n\
         + volume db-1/data: /mnt/nfs/db.raw cached in 64GiB on nvme0\n\
         + volume db-2/data: the disk of db-1/data\n\
         + volume witness/data: the disk of db-1/data\n\
         + volume backup/db: the disk of db-1/data, bandwidth 100MiB/s, readOnly true\n\
         5 to create, 0 to change, 0 to delete.\n",
    ),
    (
        "golden.yaml",
        "+ pool nvme0: create on /dev/disk/by-id/nvme-EXAMPLE_SERIAL\n\
         + volume web-1/base: /mnt/nfs/debian-12.raw cached in 16GiB on nvme0, readOnly true, \
         cache mode read-only\n\
         + volume web-1/changes: 16GiB on nvme0, volatile, thin\n\
         + volume web-2/base: the disk of web-1/base, readOnly true\n\
         + volume web-3/base: the disk of web-1/base, readOnly true\n\
         + volume web-4/base: the disk of web-1/base, readOnly true\n\
         6 to create, 0 to change, 0 to delete.\n",
    ),
    (
        "null-pool.yaml",
        "+ pool none: create on null:8GiB\n\
         + volume bench/one-queue: 4GiB on none, nonvolatile, queues 1\n\
         + volume bench/all-queues: 4GiB on none, nonvolatile\n\
         3 to create, 0 to change, 0 to delete.\n",
    ),
];

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests")
}

/// A host with an empty drive where a manifest wants a device, and nothing where it wants a file.
fn empty_host(wanted: &Wanted) -> Actual {
    let drive = |path: &PathBuf| {
        let blank = path.starts_with("/dev").then_some(DeviceState::Blank { size_bytes: TIB });
        (path.clone(), blank.unwrap_or(DeviceState::Missing))
    };
    Actual { devices: wanted.devices().map(drive).collect(), ..Actual::default() }
}

/// What the host looks like after the plan was carried out; it only creates.
fn created(plan: &vflash::manifest::Plan) -> Actual {
    let mut actual = Actual::default();
    for step in &plan.steps {
        match step.action.clone() {
            Action::CreatePool { name, device, file_bytes, overwrites: None } => {
                if let Device::Path(path) = &device {
                    let holds = DeviceState::Pool { name: name.clone() };
                    actual.devices.insert(path.clone(), holds);
                }
                let size_bytes = file_bytes.unwrap_or(TIB);
                let free_bytes = size_bytes;
                actual.pools.push(ActualPool { name, device, size_bytes, free_bytes, open: true });
            }
            Action::CreateVolume(new) => actual.volumes.push(ActualVolume {
                name: new.name,
                pool: new.pool,
                size_bytes: new.size_bytes,
                class: new.class,
                thin: new.thin,
                settings: new.settings,
                attached: false,
                role: Role::Own,
            }),
            Action::ShareDisk { name, of, granted, from: None, to } => {
                let home = actual.volumes.iter().find(|volume| volume.name == of);
                let home = home.expect("what is shared was made before").clone();
                let role = Role::Door { of, granted };
                actual.volumes.push(ActualVolume { name, settings: to, role, ..home });
            }
            action => panic!("an example only creates: {action:?}"),
        }
    }
    actual
}

fn parsed(sources: &[Source]) -> Wanted {
    parse(sources).unwrap_or_else(|mistakes| panic!("{}", mistakes[0]))
}

/// The lines of a plan; an export has its own order.
fn sorted(plan: &vflash::manifest::Plan) -> Vec<String> {
    let mut lines: Vec<String> = plan.to_string().lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

#[test]
fn every_example_is_planned_as_told_and_then_done() {
    let sources = load(&[directory()]).expect("the directory is readable");
    let mut diffs = BTreeMap::from(DIFFS);
    for source in sources {
        let name = Path::new(&source.name).file_name().and_then(|name| name.to_str());
        let diff = diffs.remove(name.expect("a name")).expect("each example is in the table");
        let wanted = parsed(&[source]);
        let first = plan(&wanted, &empty_host(&wanted)).expect("an empty host can take it");
        let text = first.to_string().replace(&directory().display().to_string(), "MANIFESTS");
        assert_eq!(text, diff);
        assert!(first.unconfirmed(&[]).is_empty(), "nothing is destroyed on an empty host");
        assert!(check_sockets(&wanted, Path::new("/run/vflash")).is_empty());

        let done = created(&first);
        assert_eq!(plan(&wanted, &done).expect("planned again").to_string(), "No changes.\n");
        let gone = plan_deletion(&wanted, &done, false).expect("all can be deleted");
        assert_eq!(gone.steps.len(), done.volumes.len());
        let disks = done.volumes.iter().filter(|volume| volume.role == Role::Own).count();
        assert_eq!(gone.destroys().count(), disks);

        let source = Source { name: "export".to_owned(), directory: None, text: to_yaml(&done) };
        let exported = parsed(&[source]);
        let again = plan(&exported, &done).expect("the export is a manifest");
        assert!(again.is_empty(), "{again}\n{}", to_yaml(&done));
        let anew = plan(&exported, &empty_host(&exported)).expect("an empty host can take it");
        assert_eq!(sorted(&anew), sorted(&first), "elsewhere it makes the same");
    }
    assert!(diffs.is_empty(), "no such example: {diffs:?}");
}

/// The examples name the same pool; as one manifest they contradict each other.
#[test]
fn files_of_one_directory_are_one_manifest() {
    let sources = load(&[directory()]).expect("the directory is readable");
    let mistakes = parse(&sources).expect_err("nvme0 and web-1 are declared more than once");
    let text = mistakes.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    assert!(text.contains("pool `nvme0` was given at"), "{text}");
    assert!(text.contains("virtual machine `web-1` was given at"), "{text}");
    assert!(text.contains("two-machines.yaml:14:18"), "{text}");
}

/// Layers of one level do not know each other, so that these are told twice.
#[test]
fn defaults_and_bounds_agree_with_the_parts_that_hold_them() {
    let burst_ms = u128::from(Limits::default().burst_ms);
    assert_eq!(burst_ms, vflash::qos::Limits::BURST_DEFAULT.as_millis());
    assert_eq!(schema::POOL_BYTES_MIN, vflash::flash::POOL_BYTES_MIN);
    const { assert!(schema::NAME_LENGTH_MAX <= vflash::flash::POOL_NAME_BYTES_MAX) };
    const { assert!(2 * schema::NAME_LENGTH_MAX < vflash::flash::NAME_BYTES_MAX) };
}
