//! Plans against a model of a host that carries their steps out.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use super::document::{Source, parse};
use super::export::to_yaml;
use super::plan::{Actual, ActualPool, ActualVolume, DeviceState, Role, check_sockets};
use super::schema::{CacheMode, Class, Device, Drain, Durability, Wanted};
use super::settings::{
    Access, Attributes, CacheSettings, Door, Limits, LogIdentity, Principal, Sharing,
    VolumeSettings, WhenFull,
};
use super::step::{Action, Step};
use super::{VolumeName, plan, plan_deletion};
use crate::base::units::{GIB, MIB};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Carries a step out, as a host would; a repeated step changes nothing more.
fn carry_out(actual: &mut Actual, step: &Step) {
    match step.action.clone() {
        Action::CreatePool { name, device, file_bytes, .. } => {
            let found = match &device {
                Device::Null { size_bytes } => *size_bytes,
                Device::Path(path) => match actual.devices.get(path) {
                    Some(DeviceState::Blank { size_bytes }) => *size_bytes,
                    Some(DeviceState::Foreign { size_bytes, .. }) => *size_bytes,
                    _ => 0,
                },
            };
            let size_bytes = file_bytes.unwrap_or(found);
            assert!(size_bytes >= 16 * MIB, "a pool without space");
            if let Device::Path(path) = &device {
                let holds = DeviceState::Pool { name: name.clone() };
                actual.devices.insert(path.clone(), holds);
            }
            actual.pools.retain(|pool| pool.name != name);
            let free_bytes = size_bytes;
            actual.pools.push(ActualPool { name, device, size_bytes, free_bytes, open: true });
        }
        Action::OpenPool { name, .. } => pool_of(actual, &name).open = true,
        Action::GrowPool { name, to_bytes, .. } => {
            let pool = pool_of(actual, &name);
            pool.free_bytes += to_bytes - pool.size_bytes;
            pool.size_bytes = to_bytes;
        }
        Action::CreateVolume(new) => {
            assert!(pool_of(actual, &new.pool).open, "a volume on a closed pool");
            if !new.thin {
                take(actual, &new.pool, new.size_bytes);
            }
            actual.volumes.push(ActualVolume {
                name: new.name,
                pool: new.pool,
                size_bytes: new.size_bytes,
                class: new.class,
                thin: new.thin,
                settings: new.settings,
                attached: false,
                role: Role::Own,
            });
        }
        Action::GrowVolume { name, pool, from_bytes, to_bytes } => {
            let thin = volume_of(actual, &name).thin;
            if !thin {
                take(actual, &pool, to_bytes - from_bytes);
            }
            volume_of(actual, &name).size_bytes = to_bytes;
        }
        Action::ShrinkVolume { name, pool, from_bytes, to_bytes }
        | Action::ResizeCache { name, pool, from_bytes, to_bytes } => {
            pool_of(actual, &pool).free_bytes += from_bytes;
            take(actual, &pool, to_bytes);
            volume_of(actual, &name).size_bytes = to_bytes;
        }
        Action::UpdateVolume { name, from, to, .. } => {
            let volume = volume_of(actual, &name);
            assert_eq!(volume.settings, from, "the step tells what is");
            volume.settings = to;
        }
        Action::ServeVolume { name } => assert!(actual.down.remove(&name), "it is down"),
        action @ (Action::ShareDisk { .. } | Action::LeaveDisk { .. }) => share(actual, action),
        Action::DeleteVolume { name, pool, size_bytes, .. } => {
            pool_of(actual, &pool).free_bytes += size_bytes;
            actual.volumes.retain(|volume| volume.name != name);
        }
    }
}

/// As [`carry_out`], of doors.
fn share(actual: &mut Actual, action: Action) {
    match action {
        Action::ShareDisk { name, of, granted, from, to } if name != of => {
            let home = volume_of(actual, &of).clone();
            let there = actual.volumes.iter().find(|volume| volume.name == name);
            assert_eq!(there.map(|there| there.settings.clone()), from, "the step tells what is");
            actual.volumes.retain(|volume| volume.name != name);
            let role = Role::Door { of, granted };
            actual.volumes.push(ActualVolume { name, settings: to, role, ..home });
        }
        Action::ShareDisk { name, .. } => volume_of(actual, &name).role = Role::Own,
        Action::LeaveDisk { name, of } if name == of => volume_of(actual, &name).role = Role::Left,
        Action::LeaveDisk { name, .. } => actual.volumes.retain(|volume| volume.name != name),
        action => panic!("not of doors: {action:?}"),
    }
}

fn pool_of<'a>(actual: &'a mut Actual, name: &str) -> &'a mut ActualPool {
    actual.pools.iter_mut().find(|pool| pool.name == name).expect("the pool of a step exists")
}

fn volume_of<'a>(actual: &'a mut Actual, name: &VolumeName) -> &'a mut ActualVolume {
    actual.volumes.iter_mut().find(|volume| volume.name == *name).expect("the volume exists")
}

fn take(actual: &mut Actual, pool: &str, bytes: u64) {
    let free = &mut pool_of(actual, pool).free_bytes;
    *free = free.checked_sub(bytes).expect("a plan fits into the pool");
}

fn source(text: String) -> Source {
    Source { name: "wanted.yaml".to_owned(), directory: Some(PathBuf::from("/etc")), text }
}

fn wanted(text: &str) -> Wanted {
    let read = parse(&[source(text.to_owned())]);
    read.unwrap_or_else(|mistakes| panic!("{}\n{text}", mistakes[0]))
}

/// A random manifest over few names, so that two of them meet often. What is fixed about a volume
/// mostly follows from its name; pools grow from round to round.
fn random_manifest(round: u64, random: &mut fastrand::Rng) -> String {
    let mut text = String::new();
    for pool in ["p0", "p1"] {
        let size = 32 + 8 * round - random.u64(0..2);
        text.push_str(&format!(
            "apiVersion: vflash/v1\nkind: Pool\nmetadata: {{name: {pool}}}\n\
             spec: {{device: /srv/{pool}, size: {size}GiB}}\n---\n"
        ));
    }
    for machine in ["m0", "m1"] {
        text.push_str(&format!(
            "apiVersion: vflash/v1\nkind: VirtualMachine\nmetadata: {{name: {machine}}}\nspec:\n"
        ));
        if random.bool() {
            text.push_str("  access: {owner: 107, group: kvm, mode: \"0660\"}\n");
        }
        text.push_str("  volumes:\n  - {name: always, flash: {pool: p0, size: 1GiB}}\n");
        for volume in ["v0", "v1", "v2"] {
            if random.bool() {
                text.push_str(&random_volume(volume, random));
            }
        }
        text.push_str("---\n");
    }
    text
}

fn random_volume(name: &str, random: &mut fastrand::Rng) -> String {
    let other = random.u8(0..50) == 0;
    let pool = u8::from((name == "v1") != other);
    let class = if (name == "v1") != other { ", class: volatile" } else { "" };
    let thin = match ((name == "v2") != other, random.bool()) {
        (false, _) => "",
        (true, false) => ", thin: true",
        (true, true) => ", thin: true, whenFull: enospc",
    };
    let gib = random.u8(1..24);
    let mut text =
        format!("  - name: {name}\n    flash: {{pool: p{pool}, size: {gib}GiB{class}{thin}}}\n");
    let extras = [
        "    limits: {iops: 100}\n",
        "    limits: {bandwidth: 1.5GiB/s, burst: 2s}\n",
        "    queues: 4\n",
        "    readOnly: true\n",
        "",
        "",
    ];
    text.push_str(extras[random.usize(..extras.len())]);
    text
}

/// P1 and P2: a host goes through many manifests. Every plan that is given fits, ends in what is
/// wanted, also when it is cut off anywhere and planned anew; and what is exported wants nothing.
#[test]
fn planning_again_gives_no_step_also_after_a_cut() {
    let (mut planned, mut refused, mut kinds) = (0, 0, BTreeSet::new());
    for seed in 0..300 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut actual = Actual::default();
        for round in 0..8 {
            let text = random_manifest(round, &mut random);
            let wanted = wanted(&text);
            let Ok(first) = plan(&wanted, &actual) else {
                refused += 1;
                continue;
            };
            planned += 1;
            let cut = random.usize(..=first.steps.len());
            first.steps[..cut].iter().for_each(|step| carry_out(&mut actual, step));
            let rest = plan(&wanted, &actual).expect("the rest of a plan can be planned");
            assert_eq!(rest.steps, first.steps[cut..], "seed {seed}, cut at {cut}\n{text}");
            rest.steps.iter().for_each(|step| carry_out(&mut actual, step));
            kinds.extend(first.steps.iter().map(|step| step.action.symbol()));
            let again = plan(&wanted, &actual).expect("what is done can be planned");
            assert!(again.is_empty(), "seed {seed}: {again}\n{text}");
            let exported = self::wanted(&to_yaml(&actual));
            let again = plan(&exported, &actual).expect("the export can be planned");
            assert!(again.is_empty(), "seed {seed}: {again}\n{}", to_yaml(&actual));
            for volume in &mut actual.volumes {
                volume.attached = random.u8(0..12) == 0;
            }
            for pool in &mut actual.pools {
                pool.open = random.bool();
            }
        }
    }
    println!("{planned} planned, {refused} refused");
    assert!(planned > 300 && refused > 300, "{planned} planned, {refused} refused");
    assert_eq!(kinds.into_iter().collect::<String>(), "+-~");
}

fn host() -> (Wanted, Actual) {
    let text = "apiVersion: vflash/v1\nkind: Pool\nmetadata: {name: p}\nspec: {device: /srv/p, \
                size: 64GiB}\n---\napiVersion: vflash/v1\nkind: VirtualMachine\nmetadata: {name: \
                m}\nspec:\n  volumes:\n  - {name: a, flash: {pool: p, size: 8GiB}}\n  - {name: b, \
                flash: {pool: p, size: 8GiB}}\n";
    let (wanted, mut actual) = (wanted(text), Actual::default());
    for step in plan(&wanted, &actual).expect("it fits").steps {
        carry_out(&mut actual, &step);
    }
    (wanted, actual)
}

#[test]
fn a_diff_reads_like_a_list_of_changes() {
    let (_, mut actual) = host();
    let text = "apiVersion: vflash/v1\nkind: Pool\nmetadata: {name: p}\nspec: {device: /srv/p, \
                size: 96GiB}\n---\napiVersion: vflash/v1\nkind: VirtualMachine\nmetadata: {name: \
                m}\nspec:\n  access: {mode: \"0660\"}\n  volumes:\n  - name: a\n    flash: {pool: \
                p, size: 4GiB}\n    limits: {iops: 500, burst: 1s}\n  - {name: c, flash: {pool: p, \
                size: 40GiB}}\n---\napiVersion: vflash/v1\nkind: Pool\nmetadata: {name: q}\n\
                spec: {device: /srv/q}\n";
    let foreign = DeviceState::Foreign { size_bytes: GIB, content: "a swap area".to_owned() };
    actual.devices.insert(PathBuf::from("/srv/q"), foreign);
    let plan = plan(&wanted(text), &actual).expect("it fits");
    let told = "~ pool p: size 64GiB -> 96GiB\n\
                + pool q: create on /srv/q, destroying a swap area\n\
                + volume m/c: 40GiB on p, nonvolatile, mode 0660\n\
                ~ volume m/a: iops none -> 500, burst 100ms -> 1s, mode 0600 -> 0660\n\
                ~ volume m/a: size 8GiB -> 4GiB, destroying what lies behind 4GiB\n\
                - volume m/b: delete 8GiB on p, destroying its content\n\
                2 to create, 3 to change, 1 to delete.\n";
    assert_eq!(plan.to_string(), told);
    assert_eq!(plan.destroys().collect::<Vec<_>>(), ["/srv/q", "m/a", "m/b"]);
    let missing = plan.unconfirmed(&["m/b".to_owned(), "/srv/q".to_owned()]);
    let missing: Vec<String> = missing.iter().map(ToString::to_string).collect();
    assert_eq!(missing.len(), 1, "{missing:?}");
    assert!(missing[0].starts_with("wanted.yaml:13:28: "), "{missing:?}");
    assert!(missing[0].ends_with("confirm by naming `m/a`"), "{missing:?}");
    let all: Vec<String> = plan.destroys().collect();
    assert!(plan.unconfirmed(&all).is_empty());
}

#[test]
fn what_a_manifest_does_not_name_stays() {
    let (_, actual) = host();
    let other = "apiVersion: vflash/v1\nkind: VirtualMachine\nmetadata: {name: other}\nspec: \
                 {volumes: [{name: a, flash: {pool: p, size: 1GiB}}]}\n";
    let plan = plan(&wanted(other), &actual).expect("the pool is open already");
    assert_eq!(plan.steps.len(), 1, "{plan}");
}

#[test]
fn deletion_names_every_volume_and_spares_the_attached() {
    let (wanted, mut actual) = host();
    let plan = plan_deletion(&wanted, &actual, false).expect("none is attached");
    assert_eq!(plan.destroys().collect::<Vec<_>>(), ["m/a", "m/b"]);
    assert_eq!(plan.unconfirmed(&[]).len(), 2);
    actual.volumes[1].attached = true;
    let refused = plan_deletion(&wanted, &actual, false).expect_err("b is attached");
    let text = "m/b is to be deleted, and is attached: detach it first, or force it";
    assert!(refused[0].to_string().ends_with(text), "{}", refused[0]);
    assert_eq!(plan_deletion(&wanted, &actual, true).expect("forced").steps.len(), 2);
    for step in plan.steps {
        carry_out(&mut actual, &step);
    }
    assert!(plan_deletion(&wanted, &actual, false).expect("nothing is left").is_empty());
    assert_eq!(actual.pools.len(), 1, "pools stay");
}

#[test]
fn sockets_with_paths_too_long_for_the_kernel_are_named() {
    let (wanted, _) = host();
    // RUN_DIR/m/a.sock: nine characters behind the directory.
    let fits = format!("/{}", "r".repeat(107 - 9 - 1));
    assert!(check_sockets(&wanted, Path::new(&fits)).is_empty());
    let mistakes = check_sockets(&wanted, Path::new(&format!("{fits}r")));
    assert_eq!(mistakes.len(), 2);
    assert!(mistakes[0].to_string().contains("has 108 characters"), "{}", mistakes[0]);
}

#[test]
fn a_daemon_serves_no_more_volumes_than_it_can() {
    let (_, actual) = host();
    let volumes = |count: usize| {
        let list =
            (0..count).map(|n| format!("  - {{name: v{n}, flash: {{pool: p, size: 1MiB}}}}\n"));
        let head = "apiVersion: vflash/v1\nkind: VirtualMachine\nmetadata: {name: big}\nspec:\n";
        wanted(&format!("{head}  volumes:\n{}", list.collect::<String>()))
    };
    assert!(plan(&volumes(1022), &actual).is_ok());
    let refused = plan(&volumes(1023), &actual).expect_err("two are there already");
    let text = "wanted.yaml:1028:12: one volume too many: a daemon serves at most 1024";
    assert_eq!(refused[0].to_string(), text);
}

fn settings() -> VolumeSettings {
    VolumeSettings {
        limits: Limits { iops: Some(u64::MAX), bandwidth: Some(1), burst_ms: 60_000 },
        queues: Some(64),
        read_only: true,
        pin_memory: true,
        when_full: WhenFull::Enospc,
        access: Access {
            owner: Some(Principal::Id(u32::MAX)),
            group: Some(Principal::Name("g".repeat(32))),
            mode: 0o660,
        },
        cache: None,
    }
}

fn cached() -> Attributes {
    let cache = CacheSettings {
        mode: CacheMode::WriteThrough,
        drain: Some(Drain::Ordered),
        staleness_ms: Some(5000),
        durability: Durability::Flush,
        backing_timeout_ms: None,
        write_budget_bytes: None,
        backing: "/mnt/a.raw".to_owned(),
        sidecar: Some("/mnt/a.redo".to_owned()),
        consistency_group: None,
        share: None,
    };
    let log = LogIdentity {
        uuid: uuid::Uuid::from_u128(7),
        owner_epoch: 3,
        point: 9,
        grouped: true,
        formatted: true,
    };
    Attributes {
        settings: VolumeSettings { cache: Some(cache), ..VolumeSettings::default() },
        log: Some(log),
        sharing: Sharing::default(),
    }
}

#[test]
fn doors_survive_the_pool_in_few_bytes_and_older_builds_refuse_them() {
    let read_only = VolumeSettings { read_only: true, ..VolumeSettings::default() };
    let door = |name: &str, number, settings| Door {
        name: name.to_owned(),
        number,
        granted: number == 1,
        settings,
    };
    let doors = vec![door("b/d", 1, VolumeSettings::default()), door("c/d", 2, read_only)];
    let shared = Attributes { sharing: Sharing { left: true, doors }, ..cached() };
    let bytes = shared.encode();
    assert_eq!(Attributes::decode(&bytes).expect("readable"), shared);
    let told = String::from_utf8(bytes).expect("JSON");
    assert!(told.starts_with("{\"version\":3,"), "{told}");
    let format = "\"sharing\":{\"left\":true,\"doors\":[{\"name\":\"b/d\",\"number\":1,\
                  \"granted\":true},{\"name\":\"c/d\",\"number\":2,\"readOnly\":true}]}}";
    assert!(told.ends_with(format), "the format on flash; a change takes a new version: {told}");
    let older = told.replace("\"version\":3", "\"version\":2");
    assert!(Attributes::decode(older.as_bytes()).is_err(), "no doors in version 2");
}

#[test]
fn a_cached_disk_survives_the_pool_and_older_builds_refuse_it() {
    let bytes = cached().encode();
    assert_eq!(Attributes::decode(&bytes).expect("readable"), cached());
    let told = String::from_utf8(bytes).expect("JSON");
    assert!(told.starts_with("{\"version\":2,"), "{told}");
    let format = "\"cache\":{\"mode\":\"write-through\",\"drain\":\"ordered\",\
                  \"stalenessMs\":5000,\"durability\":\"flush\",\"backing\":\"/mnt/a.raw\",\
                  \"sidecar\":\"/mnt/a.redo\"}},\"log\":{\"uuid\":\
                  \"00000000-0000-0000-0000-000000000007\",\"ownerEpoch\":3,\"point\":9,\
                  \"grouped\":true,\"formatted\":true}}";
    assert!(told.ends_with(format), "the format on flash; a change takes a new version: {told}");
    for (from, to) in [("\"version\":2", "\"version\":1"), ("\"formatted\":true", "\"new\":1")] {
        let error = Attributes::decode(told.replace(from, to).as_bytes()).expect_err(to);
        assert_eq!(error.kind(), crate::base::ErrorKind::Corrupt, "{error}");
    }
}

/// A pool and the machine `vm` with these volumes.
fn with_disks(volumes: &str) -> String {
    format!(
        "apiVersion: vflash/v1\nkind: Pool\nmetadata: {{name: p}}\nspec: {{device: /srv/p, size: \
         1GiB}}\n---\napiVersion: vflash/v1\nkind: VirtualMachine\nmetadata: {{name: vm}}\n\
         spec:\n  volumes:\n{volumes}"
    )
}

#[test]
fn settings_of_a_cache_change_live_and_what_it_was_made_with_stays() {
    let disk = |words: &str, backing: &str| {
        with_disks(&format!(
            "  - name: d\n    cache: {{pool: p, size: 16MiB{words}}}\n    backing: {backing}\n"
        ))
    };
    let mut actual = Actual::default();
    let made = plan(&wanted(&disk("", "/mnt/d.raw")), &actual).expect("planned");
    assert_eq!(
        made.to_string(),
        "+ pool p: create on /srv/p, a file of 1GiB\n+ volume vm/d: /mnt/d.raw cached in 16MiB on \
         p\n2 to create, 0 to change, 0 to delete.\n"
    );
    made.steps.iter().for_each(|step| carry_out(&mut actual, step));
    let words = ", mode: write-through, drain: ordered, maxStaleness: 1m, durability: flush";
    let changed = plan(&wanted(&disk(words, "/mnt/d.raw")), &actual).expect("planned");
    assert_eq!(
        changed.to_string(),
        "~ volume vm/d: cache mode write-back -> write-through, drain by sidecar -> ordered, \
         maxStaleness 10s -> 60s, durability strong -> flush\n0 to create, 1 to change, 0 to \
         delete.\n"
    );
    for (size, step) in [("32MiB", "16MiB -> 32MiB"), ("8MiB", "16MiB -> 8MiB")] {
        let text = disk("", "/mnt/d.raw").replace("16MiB", size);
        let resized = plan(&wanted(&text), &actual).expect("planned");
        let told = format!("~ volume vm/d: cache {step}\n0 to create, 1 to change, 0 to delete.\n");
        assert_eq!(resized.to_string(), told);
        assert_eq!(resized.destroys().count(), 0, "it loses nothing");
    }
    let refused = |text: &str| {
        let mistakes = plan(&wanted(text), &actual).expect_err("fixed");
        mistakes.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    };
    assert_eq!(
        refused(&disk(", sidecar: /mnt/other", "/mnt/e.raw")),
        "wanted.yaml:13:14: vm/d has `backing: /mnt/d.raw`, \
         fixed when it was made: write that, or detach it first with `vflash detach vm/d`\n\
         wanted.yaml:12:44: vm/d has `sidecar: beside it`, fixed when it was made: write that, or \
         detach it first with `vflash detach vm/d`"
    );
    let flash = with_disks("  - {name: d, flash: {pool: p, size: 16MiB}}\n");
    assert_eq!(
        refused(&flash),
        "wanted.yaml:11:29: vm/d is a cached disk of /mnt/d.raw: write its `cache` and `backing`, \
         or detach it first with `vflash detach vm/d`"
    );
    let gone = plan(&wanted(&with_disks("  - {name: x, flash: {pool: p, size: 1MiB}}\n")), &actual)
        .expect("planned");
    assert!(gone.to_string().contains("- volume vm/d: drain to /mnt/d.raw and detach"), "{gone}");
}

/// A disk that several machines write keeps its log: from before the second one comes until after
/// it has gone.
#[test]
fn who_writes_too_comes_when_the_log_is_kept_and_goes_before_that_ends() {
    let disk = |words: &str, shared: &str| {
        with_disks(&format!(
            "  - name: d\n    cache: {{pool: p, size: 16MiB{words}}}\n    backing: /mnt/d.raw\n\
             {shared}"
        ))
    };
    let mut actual = Actual::default();
    let mut steps = |text: &str| {
        let plan = plan(&wanted(text), &actual).expect("planned");
        plan.steps.iter().for_each(|step| carry_out(&mut actual, step));
        let step = |step: &Step| format!("{}: {}", step.action.object(), step.action.detail());
        plan.steps.iter().map(step).collect::<Vec<_>>()
    };
    steps(&disk(", mode: bypass", ""));
    let comes = steps(&disk(", mode: write-back, maxStaleness: 1m", "    sharedWith: [two]\n"));
    assert_eq!(
        comes,
        [
            "volume vm/d: cache mode bypass -> write-back, maxStaleness 10s -> 60s",
            "volume two/d: the disk of vm/d"
        ]
    );
    let goes = steps(&disk(", mode: write-around", ""));
    assert_eq!(
        goes,
        [
            "volume two/d: leave the disk of vm/d",
            "volume vm/d: cache mode write-back -> write-around, maxStaleness 60s -> 10s"
        ]
    );
}

#[test]
fn a_cache_with_minimum_and_maximum_has_the_size_that_it_comes_to() {
    let disk = |words: &str| {
        with_disks(&format!(
            "  - name: d\n    cache: {{pool: p, size: 512MiB{words}}}\n    backing: /mnt/d.raw\n"
        ))
    };
    let words = ", minimum: 256MiB, maximum: 768MiB, weight: 2";
    let mut actual = Actual::default();
    let made = plan(&wanted(&disk(words)), &actual).expect("planned");
    made.steps.iter().for_each(|step| carry_out(&mut actual, step));
    let told = |words: &str, actual: &Actual| {
        let plan = plan(&wanted(&disk(words)), actual).expect("planned");
        let step = |step: &Step| format!("{}: {}", step.action.object(), step.action.detail());
        plan.steps.iter().map(step).collect::<Vec<_>>().join("; ")
    };
    for bytes in [256 * MIB, 400 * MIB, 768 * MIB] {
        actual.volumes[0].size_bytes = bytes;
        assert_eq!(told(words, &actual), "", "{bytes} bytes are between");
    }
    assert_eq!(
        told(", minimum: 256MiB, maximum: 600MiB", &actual),
        "volume vm/d: maximum 768MiB -> 600MiB, weight 2 -> 1; volume vm/d: cache 768MiB -> 600MiB"
    );
    actual.volumes[0].size_bytes = 300 * MIB;
    let raised = told(", minimum: 500MiB", &actual);
    assert!(raised.starts_with("volume vm/d: cache 300MiB -> 500MiB; "), "{raised}");
    let fixed = told("", &actual);
    assert!(fixed.contains("cache 300MiB -> 512MiB") && fixed.contains("-> size"), "{fixed}");

    // A pool with less than the size, more than the minimum.
    actual.volumes.clear();
    actual.pools[0].free_bytes = 300 * MIB + 5000;
    assert!(told(words, &actual).contains("cached in 300MiB on p"), "{}", told(words, &actual));
    actual.pools[0].free_bytes = 200 * MIB;
    let refused = plan(&wanted(&disk(words)), &actual).expect_err("less than the minimum");
    let text = refused[0].to_string();
    assert!(text.contains("has 200MiB left for this, and 256MiB are needed"), "{text}");
    let exported = super::export::to_yaml(&actual);
    assert!(!exported.contains("minimum"), "{exported}");
}

#[test]
fn settings_survive_the_pool() {
    for settings in [VolumeSettings::default(), settings()] {
        let bytes = settings.encode();
        assert!(bytes.len() < 1024, "{}", bytes.len());
        assert_eq!(VolumeSettings::decode(&bytes).expect("readable"), settings);
    }
    let told = String::from_utf8(VolumeSettings::default().encode()).expect("JSON");
    let format = "{\"version\":1,\"settings\":{\"limits\":{\"iops\":null,\"bandwidth\":null,\
                  \"burstMs\":100},\"queues\":null,\"readOnly\":false,\"whenFull\":\"wait\",\
                  \"access\":{\"owner\":null,\"group\":null,\"mode\":384}}}";
    assert_eq!(told, format, "the format on flash; a change takes a new version");
}

#[test]
fn settings_half_understood_are_refused() {
    let good = String::from_utf8(settings().encode()).expect("JSON");
    let bad = [
        ("", "cannot be read"),
        ("{}", "cannot be read"),
        (&good.replace("\"version\":1", "\"version\":4"), "have version 4"),
        (&good.replace("\"version\":1", "\"version\":2"), "contradict each other"),
        (&good.replace("\"version\":1", "\"version\":1,\"more\":1"), "unknown field `more`"),
        (&good.replace("\"queues\"", "\"queue\""), "unknown field `queue`"),
        (&good.replace("\"enospc\"", "\"panic\""), "unknown variant `panic`"),
        (&good.replace("\"readOnly\":true,", ""), "missing field `readOnly`"),
        (&format!("{good} "), ""),
        (&format!("{good}x"), "trailing characters"),
    ];
    for (bytes, told) in bad {
        match VolumeSettings::decode(bytes.as_bytes()) {
            Ok(_) => assert!(told.is_empty(), "{bytes}"),
            Err(error) => assert!(error.to_string().contains(told), "{bytes}: {error}"),
        }
    }
}

#[test]
fn a_volume_name_reads_back() {
    let name = VolumeName::new("web-1", "scratch");
    assert_eq!(VolumeName::parse(&name.to_string()), Some(name));
    for text in ["web-1", "web-1/", "/a", "a/b/c", "A/b", "a/b-", ""] {
        assert_eq!(VolumeName::parse(text), None, "{text}");
    }
    assert_eq!(Class::default().name(), "nonvolatile");
}

#[test]
fn a_relative_path_needs_a_directory() {
    let text = "apiVersion: vflash/v1\nkind: Pool\nmetadata: {name: p}\nspec: {device: ./a.pool}\n";
    let from = |directory: Option<&str>| {
        let directory = directory.map(PathBuf::from);
        parse(&[Source { name: "-".to_owned(), directory, text: text.to_owned() }])
    };
    let wanted = from(Some("/srv/x")).expect("it has a directory");
    assert_eq!(wanted.pools[0].device.value, Device::Path(PathBuf::from("/srv/x/a.pool")));
    let mistakes = from(None).expect_err("it has none");
    assert!(
        mistakes[0].to_string().starts_with("-:4:16: `./a.pool` is relative"),
        "{}",
        mistakes[0]
    );
}
