//! The rules of the house, held over the whole workspace. See README.md for why they are so.

#[path = "tidy/planted.rs"]
mod planted;
#[path = "tidy/rules.rs"]
mod rules;
#[path = "tidy/source.rs"]
mod source;

use source::Source;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What stands at the top, besides files whose names begin with a dot.
const TOP: [&str; 8] =
    ["Cargo.lock", "Cargo.toml", "LICENSE", "README.md", "manifests", "src", "tests", "tools"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files below `directory` with this ending, by their paths from the root, sorted.
fn files(directory: &str, ending: &str) -> Vec<PathBuf> {
    let (mut found, mut open) = (Vec::new(), vec![root().join(directory)]);
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).expect("the directory is there") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|end| end == ending) {
                found.push(path.strip_prefix(root()).expect("below the root").to_owned());
            }
        }
    }
    found.sort();
    found
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(root().join(path)).expect("text")
}

fn hold(rule: impl Fn(&Source) -> Vec<String>) {
    let directories = ["src", "tests", "tools"];
    let paths: Vec<PathBuf> =
        directories.iter().flat_map(|directory| files(directory, "rs")).collect();
    assert!(paths.len() > 30, "the workspace was not found");
    let breaks: Vec<String> =
        paths.iter().flat_map(|path| rule(&Source::new(path, read(path)))).collect();
    assert!(breaks.is_empty(), "\n{}", breaks.join("\n"));
}

#[test]
fn files_functions_and_lines_are_short() {
    hold(rules::sizes);
}

#[test]
fn every_file_says_what_it_is_for() {
    hold(rules::head);
}

#[test]
fn imports_point_only_downwards() {
    hold(rules::layers);
    let breaks = rules::map(&read(Path::new("src/lib.rs")));
    assert!(breaks.is_empty(), "{}", breaks.join("\n"));
    let folders: BTreeSet<String> = std::fs::read_dir(root().join("src"))
        .expect("src is there")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.is_dir())
        .filter_map(|path| path.file_name()?.to_str().map(str::to_owned))
        .collect();
    let layers = rules::LAYERS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(folders, layers, "every folder has a layer");
}

#[test]
fn unsafe_code_is_explained_and_where_it_belongs() {
    hold(rules::unsafe_code);
    for path in rules::UNSAFE_FILES {
        let text = read(Path::new(path));
        let source = Source::new(Path::new(path), text);
        assert!(
            source.code.contains("unsafe"),
            "{path} has no unsafe code: strike it off the list"
        );
    }
}

#[test]
fn nothing_unfinished_is_left_and_no_test_sleeps() {
    hold(rules::words_not_here);
}

#[test]
fn parsers_of_foreign_bytes_deny_what_panics() {
    hold(rules::checked);
    for path in rules::CHECKED {
        assert!(root().join(path).exists(), "{path} is gone");
    }
}

/// The paths that a Markdown text links to, without what leads out or within.
fn links(text: &str) -> Vec<String> {
    let mut fenced = false;
    let mut links = Vec::new();
    for line in text.lines() {
        fenced ^= line.trim_start().starts_with("```");
        if fenced {
            continue;
        }
        for (at, _) in line.match_indices("](") {
            let target = line[at + 2..].split(')').next().unwrap_or_default();
            let target = target.split('#').next().unwrap_or_default();
            if !target.is_empty() && !target.contains("://") {
                links.push(target.to_owned());
            }
        }
    }
    links
}

#[test]
fn links_in_markdown_resolve() {
    let mut texts = vec![PathBuf::from("README.md")];
    for directory in ["src", "tests", "tools", "manifests"] {
        texts.extend(files(directory, "md"));
    }
    for path in texts.iter().filter(|path| root().join(path).exists()) {
        for link in links(&read(path)) {
            let target = root().join(path.parent().expect("a folder")).join(&link);
            assert!(target.exists(), "{}: {link} leads nowhere", path.display());
        }
    }
    let planted = "[a](b.md) [c](#d) [e](https://f) [g](h.md#i)\n```\n[j](k)\n```\n";
    assert_eq!(links(planted), ["b.md", "h.md"]);
}

#[test]
fn every_manifest_is_named_in_a_test() {
    let tests: String = files("tests", "rs").iter().map(|path| read(path)).collect();
    let manifests = files("manifests", "yaml");
    assert!(manifests.len() >= 4, "the examples were not found");
    for path in manifests {
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name");
        assert!(tests.contains(&format!("\"{name}\"")), "no test names {name}");
    }
}

#[test]
fn the_top_holds_what_it_should() {
    for entry in std::fs::read_dir(root()).expect("the root is there") {
        let name = entry.expect("an entry").file_name().to_string_lossy().into_owned();
        let expected = name.starts_with('.') || name == "target" || TOP.contains(&name.as_str());
        assert!(expected, "{name} does not belong at the top");
    }
}
