//! The README promises nothing without a test, and names no test that does not exist.

use std::path::Path;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The rows of the table of promises.
fn promises() -> Vec<String> {
    let readme = read("README.md");
    let section = readme.split("## What is promised").nth(1).expect("the section of promises");
    let section = section.split("\n## ").next().expect("its end");
    section.lines().filter(|line| line.starts_with('|')).skip(2).map(str::to_owned).collect()
}

/// `file::test` in backticks.
fn tests_of(row: &str) -> Vec<(&str, &str)> {
    let quoted = row.split('`').skip(1).step_by(2);
    quoted.filter_map(|text| text.split_once("::")).collect()
}

fn assert_exists((file, test): (&str, &str)) {
    let wanted = format!("#[test]\nfn {test}()");
    let text: String = read(file).lines().map(|line| format!("{}\n", line.trim())).collect();
    assert!(text.contains(&wanted), "{file} has no test {test}");
}

#[test]
fn every_promise_names_a_test_that_exists() {
    let rows = promises();
    assert!(rows.len() >= 10, "the table was found: {} rows", rows.len());
    for row in rows {
        let tests = tests_of(&row);
        assert!(!tests.is_empty(), "a promise without a test: {row}");
        tests.into_iter().for_each(assert_exists);
    }
}

#[test]
fn every_fault_of_a_cached_disk_names_a_test_that_exists() {
    let text = read("src/cache/README.md");
    let section = text.split("### Each event").nth(1).expect("the table of events");
    let section = section.split("\n## ").next().expect("the first part");
    let rows: Vec<&str> = section.lines().filter(|line| line.starts_with('|')).skip(2).collect();
    assert!(rows.len() >= 15, "{} rows", rows.len());
    for row in rows {
        let cell = row.split('|').nth_back(1).expect("the last column");
        assert!(cell.contains('`'), "an event without a test: {row}");
        for name in cell.split('`').skip(1).step_by(2).filter(|name| name.contains(".rs")) {
            match name.split_once("::") {
                Some(named) => assert_exists(named),
                None => assert!(read(name).contains("#[test]"), "{name} has no test"),
            }
        }
    }
}
