//! Cargo as a child: its output passed on as it comes, and tests counted.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use vflash_guest::parts::workspace_root;

/// Tests that passed and failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
}

impl Count {
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// `cargo` in the workspace's root, as the one that runs us.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.args(arguments).current_dir(workspace_root()).stdin(Stdio::null());
    command
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace_root().join("target"), PathBuf::from)
}

/// A program that [`build_release`] built.
pub(crate) fn release_binary(name: &str) -> PathBuf {
    target_dir().join("release").join(name)
}

/// Builds everything as it is shipped.
pub(crate) fn build_release() -> Result<()> {
    run(&mut cargo(&["build", "--workspace", "--release"]))
}

/// Runs it to its end, showing all that it says.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {command:?}"))?;
    ensure!(status.success(), "{} ended with {status}", words(command));
    Ok(())
}

/// Runs tests to their end, showing all that they say; whether they passed is in the count.
pub(crate) fn run_tests(command: &mut Command) -> Result<Count> {
    let mut child =
        command.stdout(Stdio::piped()).spawn().with_context(|| format!("start {command:?}"))?;
    let stdout = child.stdout.take().expect("it was asked for");
    let mut count = Count::default();
    for line in BufReader::new(stdout).lines() {
        let line = line.context("read what the tests say")?;
        println!("{line}");
        count.add(parse_result(&line).unwrap_or_default());
    }
    let status = child.wait().context("wait for the tests")?;
    if !status.success() && count.failed == 0 {
        bail!("{} ended with {status}, though no test failed", words(command));
    }
    Ok(count)
}

/// A program of tests that cargo built.
pub(crate) struct TestProgram {
    pub(crate) name: String,
    pub(crate) file: PathBuf,
    pub(crate) package_dir: PathBuf,
}

/// Builds all tests and says where their programs are.
pub(crate) fn test_programs() -> Result<Vec<TestProgram>> {
    let mut command = cargo(&["test", "--workspace", "--no-run", "--message-format=json"]);
    let output = command.stderr(Stdio::inherit()).output().context("start cargo")?;
    ensure!(output.status.success(), "{} failed", words(&command));
    let text = String::from_utf8(output.stdout).context("cargo's messages are UTF-8")?;
    let mut programs = Vec::new();
    for line in text.lines() {
        let message: Value = serde_json::from_str(line).context("read cargo's messages")?;
        let (Some(file), Some(name), Some(manifest)) = (
            message["executable"].as_str(),
            message["target"]["name"].as_str(),
            message["manifest_path"].as_str(),
        ) else {
            continue;
        };
        if message["profile"]["test"] == true {
            let mut package_dir = PathBuf::from(manifest);
            package_dir.pop();
            programs.push(TestProgram { name: name.to_owned(), file: file.into(), package_dir });
        }
    }
    Ok(programs)
}

/// Reads a line such as `test result: ok. 12 passed; 0 failed; 0 ignored; …`.
pub(crate) fn parse_result(line: &str) -> Option<Count> {
    let rest = line.strip_prefix("test result: ")?;
    let number = |label: &str| {
        let before = rest.split(';').find_map(|part| part.trim_end().strip_suffix(label))?;
        before.trim_end().rsplit(' ').next()?.parse().ok()
    };
    Some(Count { passed: number("passed")?, failed: number("failed")? })
}

fn words(command: &Command) -> String {
    let arguments = command.get_args().map(|argument| argument.to_string_lossy().into_owned());
    let program = PathBuf::from(command.get_program());
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    std::iter::once(name).chain(arguments).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted_and_other_lines_are_not() {
        let line =
            "test result: FAILED. 12 passed; 3 failed; 0 ignored; 0 measured; 1 filtered out";
        assert_eq!(parse_result(line), Some(Count { passed: 12, failed: 3 }));
        assert_eq!(parse_result("test a::b ... ok"), None);
        assert_eq!(parse_result("test result: none"), None);
    }

    #[test]
    fn tests_that_die_without_a_result_are_an_error() {
        let mut silent = Command::new("false");
        assert!(run_tests(&mut silent).is_err());
        let mut failed = Command::new("sh");
        failed.args(["-c", "echo 'test result: FAILED. 1 passed; 2 failed; 0 ignored'; exit 101"]);
        assert_eq!(run_tests(&mut failed).unwrap(), Count { passed: 1, failed: 2 });
    }
}
