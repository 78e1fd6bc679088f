//! vflashd, the daemon. See [`vflash::control::daemon`].

use clap::Parser;
use std::process::ExitCode;
use vflash::control::daemon::{Arguments, run};

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vflashd: {error}");
            ExitCode::FAILURE
        }
    }
}
