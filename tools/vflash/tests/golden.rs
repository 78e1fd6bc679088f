//! What the command line says, word for word, in `golden/`. `BLESS=1 cargo test` writes it anew.

mod daemon;

use daemon::{Daemon, vflash};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use vflash::control::http::Access;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.txt"))
}

fn same_as_golden(name: &str, text: &str) {
    let path = golden(name);
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let wanted = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, wanted, "{} differs", path.display());
}

/// Every verb, as help lists them.
const VERBS: [&[&str]; 34] = [
    &[],
    &["apply"],
    &["diff"],
    &["delete"],
    &["get"],
    &["describe"],
    &["export"],
    &["status"],
    &["resize"],
    &["reclaim"],
    &["attach"],
    &["detach"],
    &["drain"],
    &["points"],
    &["mark"],
    &["checkpoint"],
    &["mode"],
    &["mrc"],
    &["advise"],
    &["check"],
    &["dump"],
    &["dump", "journal"],
    &["events"],
    &["pool"],
    &["pool", "create"],
    &["pool", "show"],
    &["pool", "check"],
    &["pool", "grow"],
    &["completion"],
    &["man"],
    &["pool", "close"],
    &["backing"],
    &["backing", "show"],
    &["backing", "recover"],
];

/// Standard output of a call that needs no daemon.
fn says(arguments: &[&str]) -> String {
    let output = vflash().args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn help_is_as_written() {
    for verb in VERBS {
        let name = if verb.is_empty() { "vflash".to_owned() } else { verb.join("-") };
        let text = says(&[verb, &["--help"][..]].concat());
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{name}");
        same_as_golden(&format!("help-{name}"), &text);
    }
}

/// Serial numbers and UUIDs are new each time.
fn steady(text: &str) -> String {
    let mut lines = String::new();
    for line in text.lines() {
        let line = match ["vflash-v", "vflash-n", "vflash-c"]
            .iter()
            .find_map(|part| line.split_once(part))
        {
            Some((before, _)) if line.trim_start().to_lowercase().starts_with("serial") => {
                format!("{before}SERIAL")
            }
            _ if line.starts_with("UUID:") => "UUID: NEW".to_owned(),
            _ => line.to_owned(),
        };
        lines.push_str(&line);
        lines.push('\n');
    }
    lines
}

#[test]
fn tables_are_as_written() {
    let daemon = Daemon::start(Access { group: None });
    same_as_golden("get-pools-none", &daemon.says(&["get", "pools"]));
    same_as_golden("get-volumes-none", &daemon.says(&["get", "volumes"]));
    let manifest = daemon.manifest().display().to_string();
    same_as_golden("diff", &daemon.says(&["diff", "-f", &manifest]));
    same_as_golden("apply", &daemon.says(&["apply", "-f", &manifest]));
    same_as_golden("apply-again", &daemon.says(&["apply", "-f", &manifest]));
    same_as_golden("get-pools", &daemon.says(&["get", "pools"]));
    same_as_golden("get-volumes", &daemon.says(&["get", "volumes"]));
    same_as_golden("describe-pool", &steady(&daemon.says(&["describe", "p0"])));
    same_as_golden("describe-volume", &steady(&daemon.says(&["describe", "web-1/scratch"])));
    same_as_golden("volume-yaml", &steady(&daemon.says(&["describe", "web-1/root", "-o", "yaml"])));
    same_as_golden("pool-check", &daemon.says(&["pool", "check", "p0"]));
    let exported = daemon.says(&["export"]);
    same_as_golden("export", &exported);
    let again = daemon.path("exported.yaml");
    let folder = daemon.folder.path().canonicalize().unwrap();
    std::fs::write(&again, exported.replace("DIR", folder.to_str().unwrap())).unwrap();
    let diff = daemon.says(&["diff", "-f", again.to_str().unwrap()]);
    assert_eq!(diff, "Nothing to do: what is wanted is there.\n");
    same_as_golden("resize", &daemon.says(&["resize", "web-1/root", "2GiB"]));
    for hypervisor in ["qemu", "cloud-hypervisor", "libvirt"] {
        let text = daemon.says(&["attach", "web-1/root", "--print", hypervisor]);
        same_as_golden(&format!("attach-{hypervisor}"), &text);
    }
    same_as_golden("reclaim", &daemon.says(&["reclaim", "web-1/root", "--yes"]));
    same_as_golden(
        "delete",
        &daemon.says(&["delete", "-f", &manifest, "--confirm", "web-1/scratch"]),
    );
    let volumes = daemon.says(&["get", "volumes", "-o", "json"]);
    assert_eq!(volumes, "{\n  \"volumes\": []\n}\n");
}

#[test]
fn cached_disks_are_told_as_written() {
    let daemon = Daemon::start(Access { group: None });
    let manifest = daemon.cached_manifest().display().to_string();
    let golden = |name: &str, arguments: &[&str]| {
        same_as_golden(&format!("cached-{name}"), &steady(&daemon.says(arguments)));
    };
    golden("diff", &["diff", "-f", &manifest]);
    golden("apply", &["apply", "-f", &manifest]);
    golden("get-volumes", &["get", "volumes"]);
    golden("describe", &["describe", "db-1/data"]);
    golden("yaml", &["describe", "db-1/data", "-o", "yaml"]);
    golden("export", &["export"]);
    golden("mark", &["mark", "db-1/data", "empty"]);
    golden("points", &["points", "db-1/data"]);
    golden("points-json", &["points", "db-1/data", "-o", "json"]);
    golden("drain", &["drain", "db-1/data", "--point", "empty", "--wait"]);
    golden("checkpoint", &["checkpoint", "db-1/data"]);
    golden("mode", &["mode", "db-1/data", "write-through"]);
    golden("mrc", &["mrc", "db-1/data"]);
    golden("mrc-json", &["mrc", "db-1/data", "-o", "json"]);
    golden("advise", &["advise", "--step", "16MiB"]);
    golden("advise-yaml", &["advise", "--step", "16MiB", "-o", "yaml"]);
    let errors: [(&str, i32, &[&str]); 9] = [
        ("detach-lost", 1, &["detach", "db-1/data", "--lost"]),
        ("detach-nothing", 2, &["detach"]),
        ("drain-ahead", 1, &["drain", "db-1/data", "--to", "99"]),
        ("drain-no-point", 1, &["drain", "db-1/data", "--point", "none"]),
        ("drain-flash", 1, &["drain", "db-1/scratch"]),
        ("resize", 1, &["resize", "db-1/data", "1GiB"]),
        ("reclaim", 1, &["reclaim", "db-1/data"]),
        ("check-held", 8, &["check", "p0"]),
        ("check-unknown", 8, &["check", "p9"]),
    ];
    for (name, status, arguments) in errors {
        let (got, text) = daemon.fails(arguments);
        assert_eq!(got, status, "{arguments:?}: {text}");
        same_as_golden(&format!("error-cached-{name}"), &text);
    }
    golden("resize", &["resize", "db-1/data", "48MiB"]);
    golden("resize-back", &["resize", "db-1/data", "32MiB"]);
    golden("detach", &["detach", "db-1/data"]);
    golden("get-volumes-after", &["get", "volumes"]);
    golden("apply-anew", &["apply", "-f", &manifest]);
    golden("close", &["pool", "close", "p0"]);
    let pool = daemon.path("pool").display().to_string();
    golden("check", &["check", &pool]);
    golden("dump", &["dump", "journal", &pool, "db-1/data"]);
}

#[test]
fn errors_are_as_written() {
    let daemon = Daemon::start(Access { group: None });
    let manifest = daemon.manifest().display().to_string();
    daemon.says(&["apply", "-f", &manifest]);
    let wrong = daemon.path("wrong.yaml");
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&wrong, text.replace("64MiB", "64MB").replace("limits", "limit")).unwrap();
    let wrong = wrong.display().to_string();
    let smaller = daemon.path("smaller.yaml");
    std::fs::write(&smaller, text.replace("64MiB", "32MiB")).unwrap();
    let smaller = smaller.display().to_string();
    let missing = daemon.path("missing.yaml").display().to_string();
    let cases: [(&str, i32, &[&str]); 14] = [
        ("unknown-verb", 2, &["destroy"]),
        ("bad-size", 2, &["resize", "web-1/root", "64GB"]),
        ("no-target", 2, &["attach", "web-1/root"]),
        ("no-volume", 1, &["describe", "web-1/none"]),
        ("no-pool", 1, &["describe", "none"]),
        ("no-name", 1, &["resize", "web-1", "1GiB"]),
        ("mistakes", 1, &["apply", "-f", &wrong]),
        ("missing-file", 1, &["apply", "-f", &missing]),
        ("unconfirmed-apply", 1, &["apply", "-f", &smaller]),
        ("unconfirmed-reclaim", 1, &["reclaim", "web-1/root"]),
        ("unconfirmed-resize", 1, &["resize", "web-1/scratch", "16MiB"]),
        ("too-large", 1, &["resize", "web-1/scratch", "1GiB"]),
        ("check-impossible", 8, &["pool", "check", "none"]),
        ("too-many-queues", 1, &["attach", "web-1/root", "--print", "qemu", "--queues", "1000"]),
    ];
    for (name, status, arguments) in cases {
        let (got, text) = daemon.fails(arguments);
        assert_eq!(got, status, "{arguments:?}: {text}");
        same_as_golden(&format!("error-{name}"), &text);
    }
}

#[test]
fn no_daemon_is_told_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let output = vflash().arg("--run-dir").arg(folder.path()).arg("status").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("is vflashd running?"), "{text}");
}

#[test]
fn manual_pages_and_completions_cover_every_verb() {
    let folder = tempfile::tempdir().unwrap();
    let pages = || -> BTreeSet<(String, String)> {
        says(&["man", "--dir", folder.path().to_str().unwrap()]);
        std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                (name, std::fs::read_to_string(path).unwrap())
            })
            .collect()
    };
    let first = pages();
    assert_eq!(first, pages(), "the same each time");
    let names: BTreeSet<&str> = first.iter().map(|(name, _)| name.as_str()).collect();
    assert!(names.contains("vflashd.8"));
    for verb in VERBS {
        let name = [&["vflash"], verb].concat().join("-") + ".1";
        assert!(names.contains(name.as_str()), "{name} is missing in {names:?}");
    }
    assert!(first.iter().all(|(_, page)| page.contains(".SH DESCRIPTION")));
    for shell in ["bash", "zsh", "fish"] {
        let script = says(&["completion", shell]);
        assert_eq!(script, says(&["completion", shell]));
        for verb in ["apply", "reclaim", "attach", "grow"] {
            assert!(script.contains(verb), "{shell}: {verb}");
        }
    }
}
