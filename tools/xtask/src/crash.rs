//! `cargo xtask crash`: every end of the host that a disk may meet, in the simulator; and the test
//! of those tests, the planted bugs.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use vflash::base::planted::Bug;

use crate::cargo::{Count, cargo, parse_result, run_tests};
use crate::steps::Steps;

/// Tells the search for crash states of the pool how many random runs to make.
const POOL_RUNS: &str = "VFLASH_CRASH_RUNS";

/// Tells the suites of the cached disk how much more to do than in CI.
const SCALE: &str = "VFLASH_CRASH_SCALE";

/// Chooses a planted bug.
const PLANTED: &str = "VFLASH_PLANTED";

/// What each suite prints: `crash suite: NAME: N states, …`.
const SUITE: &str = "crash suite: ";

/// The suites of the cached disk.
const PROGRAMS: [&str; 7] = [
    "cache_crash",
    "cache_drain",
    "cache_media",
    "cache_modes",
    "cache_resize",
    "cache_consistency",
    "cache_clean",
];

/// States that the suites of the cached disk visit in CI at least.
const STATES_MIN: u64 = 100_000;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Random runs of operations of the pool, each cut at every write; 0 for none
    #[arg(long, default_value_t = 1_000)]
    runs: u32,
    /// How much more than in CI the suites of the cached disk do
    #[arg(long, default_value_t = 1)]
    scale: u64,
    /// Plant each bug in turn instead: its suite must find it
    #[arg(long)]
    planted: bool,
}

pub(crate) fn run(options: &Options) -> Result<bool> {
    let mut steps = Steps::new();
    if options.planted {
        steps.run("planted bugs", planted);
    } else {
        if options.runs > 0 {
            steps.run("crash states of the pool", || pool(options.runs));
        }
        steps.run("crash states of the cached disk", || cache(options.scale));
    }
    steps.print_table();
    Ok(steps.failed() == 0)
}

fn pool(runs: u32) -> Result<((), String)> {
    let mut tests = cargo(&["test", "--release", "--test", "pool_crash"]);
    let count = run_tests(tests.env(POOL_RUNS, runs.to_string()))?;
    ensure!(count.failed == 0 && count.passed > 0, "{} tests failed", count.failed);
    Ok(((), format!("{} tests", count.passed)))
}

/// Runs the suites of the cached disk; says how many states they visited, and how fast.
pub(crate) fn cache(scale: u64) -> Result<((), String)> {
    let mut states = 0;
    let begun = Instant::now();
    for program in PROGRAMS {
        let mut tests = cargo(&["test", "--package", "vflash", "--test", program]);
        tests.args(["--", "--nocapture"]).env(SCALE, scale.to_string());
        let (passed, said) = said(&mut tests)?;
        print!("{}", suites(&said));
        ensure!(passed, "{program}: {}", failure(&said));
        states += said.lines().filter_map(parse_states).sum::<u64>();
    }
    let seconds = begun.elapsed().as_secs_f64();
    let least = STATES_MIN * scale;
    ensure!(states >= least, "{states} states are fewer than {least}");
    Ok(((), format!("{states} states, 0 failures, {:.0} states/s", states as f64 / seconds)))
}

/// The test that must find a bug.
fn finder(bug: Bug) -> (&'static str, &'static str) {
    const BOUNDED: &str = "every_crash_state_of_one_and_two_operations_is_a_point";
    const FLUSHES: &str = "what_a_failed_flush_of_the_flash_should_have_covered_is_not_lost";
    const MODES: &str = "every_crash_state_of_long_runs_over_all_modes_keeps_what_was_durable";
    const LONG: &str = "every_crash_state_of_long_random_runs_is_a_point";
    const REPLAYED: &str = "what_is_in_the_log_is_not_appended_again_when_it_is_replayed";
    const GENERATIONS: &str = "crash_after_crash_nothing_is_lost";
    const FLASH_LOST: &str = "flash_lost_at_any_write_of_a_drain_leaves_a_past_point";
    const OUTAGES: &str = "an_outage_of_the_shared_storage_costs_time_and_nothing_else";
    const DAMAGE: &str = "damage_is_found_or_harmless_and_never_served";
    const TOGETHER: &str = "without_the_flash_no_disk_is_ahead_of_another";
    const POINT: &str = "a_number_of_either_disk_is_a_point_of_both";
    const FLUSH_LATE: &str = "a_flush_that_ends_late_holds_no_other_disk_up";
    const LEAVES: &str = "a_disk_leaves_when_the_others_need_no_word_of_it";
    const LOST: &str = "a_leader_that_is_lost_for_good_at_any_step_holds_nobody_up";
    const OLDER: &str =
        "a_flash_that_is_older_than_its_backing_is_told_by_the_numbers_of_its_own_disk";
    const DOWN: &str = "while_one_backing_is_down_no_disk_advances_and_writes_go_on";
    const ORDER: &str = "all_that_several_machines_see_can_have_happened_in_one_order";
    const MODEL: &str = "every_request_agrees_with_the_model";
    const COLD: &str = "a_restart_after_writes_past_the_log_is_cold";
    const RESIZED: &str = "crash_after_crash_between_resizes_nothing_is_lost";
    const BUDGET: &str = "a_write_budget_stops_fills_and_nothing_else";
    const STALE: &str = "no_read_is_stale_among_fills_evictions_and_drains";
    const FRONT_ENDS: &str = "no_front_end_harms_the_daemon_or_its_neighbours";
    const RESET: &str = "a_queue_goes_on_after_each_reconnect_and_reset";
    const ANOTHERS: &str =
        "a_claim_makes_the_sidecar_and_another_flash_is_refused_until_it_is_clean";
    const LATE: &str = "a_late_write_of_a_dead_owner_lands_on_nothing_newer";
    match bug {
        Bug::AckBeforeFlush
        | Bug::FlushSkipsWrites
        | Bug::ChecksumOfHeaderOnly
        | Bug::TornTailIsCorruption
        | Bug::DiscardForgotten
        | Bug::TailBeforeBackingFlush => ("cache_crash", BOUNDED),
        Bug::FlashFlushTrusted => ("cache_crash", FLUSHES),
        Bug::StaleAfterMode | Bug::ThroughUndrained => ("cache_modes", MODES),
        Bug::PreviousLapAccepted => ("cache_crash", LONG),
        Bug::SaltIgnored => ("cache_media", "forged_records_are_never_accepted"),
        Bug::ReplayedTwice | Bug::DoorsAlike => ("cache_crash", REPLAYED),
        Bug::NumberReused => ("cache_crash", GENERATIONS),
        Bug::OverlapSwapped | Bug::GroupNotCommitted | Bug::RecoveryNotRestartable => {
            ("cache_drain", FLASH_LOST)
        }
        Bug::FailedFlushRetried => ("cache_drain", OUTAGES),
        Bug::CorruptionIsTail => ("cache_media", DAMAGE),
        Bug::WrongHalf => ("cache_media", MODEL),
        Bug::StaleClean | Bug::DirtyEvicted => ("cache_clean", STALE),
        Bug::OtherEpoch => ("cache_clean", COLD),
        Bug::CommittedUnprepared
        | Bug::AppliedUncommitted
        | Bug::BeyondAgreed
        | Bug::RequestTorn
        | Bug::FrontierAhead => ("cache_consistency", TOGETHER),
        Bug::HoldOfOne => ("cache_consistency", POINT),
        Bug::FlushTakesBack => ("cache_consistency", FLUSH_LATE),
        Bug::LeftUnsaid => ("cache_consistency", LEAVES),
        Bug::NotExpelled => ("cache_consistency", LOST),
        Bug::OldFlashTrusted => ("cache_consistency", OLDER),
        Bug::GoneAlone => ("cache_consistency", DOWN),
        Bug::StaleRead => ("shared", ORDER),
        Bug::FaultUntold | Bug::RegionsOverlap => ("fuzz_vhost", FRONT_ENDS),
        Bug::ResetForgotten => ("vhost", RESET),
        Bug::StampUnchecked => ("backing_open", ANOTHERS),
        Bug::HoldLeftOut => ("backing_nbd", LATE),
        Bug::ShrinkForgetsNumbers => ("cache_resize", RESIZED),
        Bug::BudgetIgnored => ("cache_clean", BUDGET),
    }
}

/// Each bug must be found by its suite: the test that is to find it fails. Without one every such
/// suite passes in the same build, so no test fails for another reason.
pub(crate) fn planted() -> Result<((), String)> {
    let mut missed = Vec::new();
    for bug in Bug::ALL {
        let (program, test) = finder(bug);
        let begun = Instant::now();
        let (passed, said) = said(&mut with_planted(program, test, &format!("{bug:?}")))?;
        let Count { failed, .. } = said.lines().find_map(parse_result).unwrap_or_default();
        let its_own = failed == 1 || said.contains(&format!("thread '{test}' "));
        ensure!(passed || its_own, "{bug:?}: {program}::{test} did not run:\n{said}");
        let seconds = begun.elapsed().as_secs_f64();
        let word = if passed { "MISSED" } else { "found" };
        println!("  {bug:?}: {word} by {program}::{test} ({seconds:.1} s)");
        if passed {
            missed.push(format!("{bug:?}"));
        }
    }
    ensure!(missed.is_empty(), "not found: {}", missed.join(", "));
    let programs: BTreeSet<&str> = Bug::ALL.into_iter().map(|bug| finder(bug).0).collect();
    for program in programs {
        let (passed, said) = said(&mut with_planted(program, "", ""))?;
        ensure!(passed, "{program} fails without a planted bug: {}", failure(&said));
    }
    Ok(((), format!("{} of {} found", Bug::ALL.len(), Bug::ALL.len())))
}

fn with_planted(program: &str, test: &str, bug: &str) -> Command {
    let mut command =
        cargo(&["test", "--package", "vflash", "--features", "planted", "--test", program, "--"]);
    command.args(["--nocapture"]).env(PLANTED, bug);
    if !test.is_empty() {
        command.args(["--exact", test]);
    }
    command
}

/// Runs it to its end: whether it passed, and all that it said.
fn said(command: &mut Command) -> Result<(bool, String)> {
    let output = command
        .stdin(Stdio::null())
        .env("RUST_BACKTRACE", "0")
        .output()
        .with_context(|| format!("start {command:?}"))?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
}

fn suites(said: &str) -> String {
    let lines = said.lines().filter_map(|line| line.find(SUITE).map(|at| &line[at..]));
    lines.map(|line| format!("  {line}\n")).collect()
}

/// The line that says what was wrong, and the one that repeats it.
fn failure(said: &str) -> String {
    let telling = |line: &&str| {
        line.contains("VFLASH_CRASH_CASE=") || line.contains("seed ") || line.contains("error")
    };
    let mut lines: Vec<&str> = said.lines().filter(telling).take(4).collect();
    if lines.is_empty() {
        lines = said.lines().rev().take(20).collect();
    }
    lines.join("; ")
}

fn parse_states(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once(SUITE)?;
    let before = rest.split(" states").next()?;
    before.rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_counted_and_other_lines_are_not() {
        let line = "crash suite: long random runs: 37421 states, 869 states/s, 0 failures";
        assert_eq!(parse_states(line), Some(37_421));
        assert_eq!(parse_states("test a ... crash suite: b: 7 states, 0 failures"), Some(7));
        assert_eq!(parse_states("37421 states"), None);
        assert_eq!(suites("x crash suite: b: 7 states\ny\n"), "  crash suite: b: 7 states\n");
    }
}
