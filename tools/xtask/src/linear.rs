//! `cargo xtask linear`: all that several machines see of one disk can have happened in one order,
//! while it is drained, resized, switched and killed.

use anyhow::{Result, ensure};

use crate::cargo::{cargo, run_tests};
use crate::steps::Steps;

/// The test that does it.
const TEST: &str = "all_that_several_machines_see_can_have_happened_in_one_order";

/// Tell it how much to do; by itself it makes do with seconds.
const OPERATIONS: &str = "VFLASH_LINEAR_OPERATIONS";
const MACHINES: &str = "VFLASH_LINEAR_MACHINES";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Requests of all machines together, in each run
    #[arg(long, default_value_t = 1_000_000)]
    operations: u64,
    /// Machines that share the disk, a run for each number
    #[arg(long, value_delimiter = ',', default_values_t = [2, 4, 8],
          value_parser = clap::value_parser!(u32).range(2..=8))]
    machines: Vec<u32>,
    /// Without optimisation, as CI runs it: with assertions of overflow, and many times slower
    #[arg(long)]
    debug: bool,
}

pub(crate) fn run(options: &Options) -> Result<bool> {
    let mut steps = Steps::new();
    for machines in &options.machines {
        let name = format!("one order of what {machines} machines see");
        steps.run(&name, || one_order(*machines, options.operations, !options.debug));
    }
    steps.print_table();
    Ok(steps.failed() == 0)
}

/// One run of it.
pub(crate) fn one_order(machines: u32, operations: u64, release: bool) -> Result<((), String)> {
    let mut test = cargo(&["test", "--package", "vflash", "--test", "shared"]);
    if release {
        test.arg("--release");
    }
    test.args([TEST, "--", "--exact", "--nocapture"]);
    test.env(OPERATIONS, operations.to_string()).env(MACHINES, machines.to_string());
    let count = run_tests(&mut test)?;
    ensure!(count.failed == 0 && count.passed == 1, "what they saw had no order");
    Ok(((), format!("{operations} requests of {machines} machines, 0 violations")))
}
