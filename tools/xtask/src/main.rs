//! `cargo xtask`: what is done with this repository, each by one command.

mod bench;
mod cached;
mod cargo;
mod crash;
mod demo;
mod kill;
mod linear;
mod packages;
mod scratch;
mod steps;
mod test;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Show what vflash does: a pool, a virtual machine, a live resize, a crash of the daemon
    Demo,
    /// Run all checks: what CI runs
    Test(test::Options),
    Bench(bench::BenchArguments),
    /// Search for ends of the host that break a pool or a cached disk
    Crash(crash::Options),
    /// Check that several machines see one order of all that happens to their disk
    Linear(linear::Options),
    /// Run every fuzz loop
    Fuzz {
        /// Seconds for each of them
        #[arg(long, default_value_t = 600)]
        seconds: u32,
    },
    /// Kill the daemon under load, many more times than the tests do
    Soak(test::Kills),
}

fn main() -> ExitCode {
    match run(Arguments::parse().task) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything passed.
fn run(task: Task) -> Result<bool> {
    scratch::clean_up_on_signals()?;
    match task {
        Task::Demo => demo::run(),
        Task::Test(options) => test::run(&options),
        Task::Bench(arguments) => bench::run(&arguments).map(|()| true),
        Task::Crash(options) => crash::run(&options),
        Task::Linear(options) => linear::run(&options),
        Task::Fuzz { seconds } => test::fuzz(seconds),
        Task::Soak(kills) => test::soak(&kills),
    }
}
