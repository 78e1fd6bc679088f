//! `cargo xtask test`: every check there is, cheapest first. A failed stage does not keep the
//! later ones from running; the exit status tells of any failure.

use std::collections::VecDeque;
use std::process::Command;
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use vflash_guest::process::output;

use crate::cargo::{Count, TestProgram, cargo, run as run_command, run_tests, test_programs};
use crate::steps::Steps;
use crate::{cached, crash, demo, kill, linear, packages};

/// Programs of fuzz loops are named so, and so are the loops among other tests.
const FUZZ: &str = "fuzz";

/// Names the tests that are left out because the host lacks what they need.
const LEAVE_OUT: &str = "VFLASH_LEAVE_OUT";

/// What some tests need besides packages, and the file that must open for it.
const NEEDS: [(&str, &str); 2] = [("loop", "/dev/loop-control"), ("fuse", "/dev/fuse")];

/// Tells fuzz loops how long to run.
const FUZZ_SECONDS: &str = "VFLASH_FUZZ_SECONDS";

/// Fuzz loops that run at the same time.
const FUZZ_JOBS: usize = 2;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Seconds for each fuzz loop
    #[arg(long, default_value_t = 60)]
    fuzz_seconds: u32,
    /// Kills of the daemon under a QEMU guest
    #[arg(long, default_value_t = 40)]
    kill_cycles: u32,
    /// Losses of the flash under a QEMU guest on cached disks
    #[arg(long, default_value_t = 20)]
    cuts: u32,
    /// Kills of the daemon under the load client
    #[arg(long, default_value_t = 1_000)]
    client_kills: u32,
}

/// Runs all stages; whether all passed.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let mut steps = Steps::new();
    let mut tests = Count::default();
    let all_packages = [packages::GUEST, packages::NBD, packages::PEERS].concat();
    steps.run("packages", || Ok(((), packages::need(&all_packages)?)));
    steps.run("format", || {
        packages::provide_components()?;
        plain(&mut cargo(&["fmt", "--all", "--check"]))
    });
    let clippy = ["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"];
    steps.run("clippy", || plain(&mut cargo(&clippy)));
    steps.run("build", || plain(&mut cargo(&["build", "--workspace", "--all-targets"])));
    steps.run("tests", || {
        let missing = missing_needs();
        let mut command = cargo(&["test", "--workspace", "--no-fail-fast"]);
        let count = run_tests(command.env(LEAVE_OUT, missing.join(",")))?;
        tests = count;
        judge(count, &missing)
    });
    steps.run("documentation", || {
        let mut doc = cargo(&["doc", "--workspace", "--no-deps"]);
        plain(doc.env("RUSTDOCFLAGS", "--deny warnings"))
    });
    steps.run("crash states of the cached disk", || crash::cache(1));
    steps.run("planted bugs", crash::planted);
    steps.run("one order of what several machines see", || linear::one_order(4, 300_000, false));
    let fuzz_name = format!("fuzz, {} s each", options.fuzz_seconds);
    steps.run(&fuzz_name, || fuzz_loops(options.fuzz_seconds));
    let (guest, client) = (options.kill_cycles, options.client_kills);
    let kills = Kills {
        guest_kills: guest,
        client_kills: client,
        cached_guest_kills: guest,
        cached_client_kills: client / 4,
        cuts: options.cuts,
    };
    kill_stages(&mut steps, &kills);
    steps.run("demo", || {
        ensure!(demo::run()?, "see above");
        Ok(((), "passed".into()))
    });
    steps.print_table();
    // The stage of tests is counted by its tests, unless none came to a result.
    let (mut passed, mut failed) = (tests.passed + steps.passed(), tests.failed + steps.failed());
    match tests {
        Count { failed: 1.., .. } => failed -= 1,
        Count { passed: 1.., .. } => passed -= 1,
        Count { .. } => {}
    }
    println!("\n{passed} passed, {failed} failed");
    Ok(failed == 0)
}

/// `cargo xtask fuzz`
pub(crate) fn fuzz(seconds: u32) -> Result<bool> {
    report(|steps| {
        steps.run(&format!("fuzz, {seconds} s each"), || fuzz_loops(seconds));
    })
}

/// How often; 0 leaves a stage out.
#[derive(clap::Args)]
pub(crate) struct Kills {
    /// Kills under a QEMU guest on a flash volume
    #[arg(long, default_value_t = 1_000)]
    guest_kills: u32,
    /// Kills under the load client on a flash volume
    #[arg(long, default_value_t = 20_000)]
    client_kills: u32,
    /// Kills under a QEMU guest on a cached disk
    #[arg(long, default_value_t = 1_000)]
    cached_guest_kills: u32,
    /// Kills under the load client on a cached disk
    #[arg(long, default_value_t = 20_000)]
    cached_client_kills: u32,
    /// Losses of the flash under a QEMU guest on cached disks
    #[arg(long, default_value_t = 500)]
    cuts: u32,
}

/// `cargo xtask soak`
pub(crate) fn soak(kills: &Kills) -> Result<bool> {
    report(|steps| {
        steps.run("packages", || Ok(((), packages::need(packages::GUEST)?)));
        steps.run("build", || plain(&mut cargo(&["build", "--workspace"])));
        kill_stages(steps, kills);
    })
}

fn kill_stages(steps: &mut Steps, kills: &Kills) {
    let mut stage = |name: &str, count: u32, run: fn(u32) -> Result<String>| {
        if count > 0 {
            steps.run(name, || Ok(((), run(count)?)));
        }
    };
    stage("kill -9 under a guest", kills.guest_kills, kill::under_a_guest);
    stage("kill -9 under the client", kills.client_kills, kill::under_the_client);
    stage("… on a cached disk", kills.cached_client_kills, cached::killed_under_the_client);
    stage(
        "kill -9 under a guest on a cached disk",
        kills.cached_guest_kills,
        cached::killed_under_a_guest,
    );
    stage("flash lost under a guest", kills.cuts, cached::cut_under_a_guest);
}

fn report(run: impl FnOnce(&mut Steps)) -> Result<bool> {
    let mut steps = Steps::new();
    run(&mut steps);
    steps.print_table();
    Ok(steps.failed() == 0)
}

fn plain(command: &mut Command) -> Result<((), String)> {
    run_command(command)?;
    Ok(((), "clean".into()))
}

/// What the host lacks: only root makes loop devices and mounts, and not in every container.
fn missing_needs() -> Vec<&'static str> {
    let opens = |file: &str| std::fs::File::options().read(true).write(true).open(file).is_ok();
    let root = nix::unistd::geteuid().is_root();
    NEEDS.iter().filter(|(_, file)| !root || !opens(file)).map(|(name, _)| *name).collect()
}

fn judge(count: Count, missing: &[&str]) -> Result<((), String)> {
    ensure!(count.failed == 0, "{} of {} tests failed", count.failed, count.failed + count.passed);
    ensure!(count.passed > 0, "no test ran");
    let mut text = format!("{} tests", count.passed);
    if !missing.is_empty() {
        text.push_str(&format!(", without those that need {} and root", missing.join(", ")));
    }
    Ok(((), text))
}

/// One fuzz loop: a test of a test program.
struct Loop<'a> {
    program: &'a TestProgram,
    test: String,
}

impl Loop<'_> {
    fn run(&self, seconds: u32) -> Result<()> {
        let mut command = Command::new(&self.program.file);
        command.args([&self.test, "--exact", "--nocapture"]);
        command.current_dir(&self.program.package_dir).env(FUZZ_SECONDS, seconds.to_string());
        let said = output(&mut command)?;
        ensure!(said.contains("test result: ok. 1 passed"), "it did not run:\n{said}");
        Ok(())
    }
}

fn fuzz_loops(seconds: u32) -> Result<((), String)> {
    let programs = test_programs()?;
    let mut loops = VecDeque::new();
    for program in &programs {
        let listing = output(Command::new(&program.file).args(["--list"]))
            .with_context(|| format!("list the tests of {}", program.name))?;
        let tests = listing.lines().filter_map(|line| line.strip_suffix(": test"));
        let is_fuzz = |test: &&str| program.name.starts_with(FUZZ) || test.contains(FUZZ);
        loops.extend(tests.filter(is_fuzz).map(|test| Loop { program, test: test.to_owned() }));
    }
    ensure!(!loops.is_empty(), "there is no fuzz loop");
    let count = loops.len();
    let (waiting, failures) = (Mutex::new(loops), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..FUZZ_JOBS {
            scope.spawn(|| {
                while let Some(job) = take(&waiting) {
                    let name = format!("{} {}", job.program.name, job.test);
                    println!("  {name} …");
                    if let Err(error) = job.run(seconds) {
                        println!("  {name} FAILED: {error:#}");
                        failures.lock().expect("no holder panics").push(name);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no holder panicked");
    ensure!(failures.is_empty(), "failed: {}", failures.join(", "));
    Ok(((), format!("{count} loops")))
}

fn take<'a>(waiting: &Mutex<VecDeque<Loop<'a>>>) -> Option<Loop<'a>> {
    waiting.lock().expect("no holder panics").pop_front()
}
