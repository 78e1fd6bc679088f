//! Completion scripts and manual pages, made from the command line's own definition.

use crate::arguments::Arguments;
use crate::output::write;
use clap::{Command, CommandFactory};
use std::path::Path;
use vflash::control::api::{ErrorCode, Failure};
use vflash::control::daemon;

pub(crate) fn completion(shell: clap_complete::Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "vflash", &mut script);
    write(&String::from_utf8_lossy(&script))
}

/// Prints the page of `vflash`, or writes into `directory` the pages of every verb and of vflashd.
pub(crate) fn man(directory: Option<&Path>) -> Result<(), Failure> {
    let Some(directory) = directory else {
        let page = render(Arguments::command(), "1")
            .map_err(|error| failed(Path::new("standard output"), &error))?;
        return write(&String::from_utf8_lossy(&page));
    };
    let daemon = directory.join("vflashd.8");
    std::fs::create_dir_all(directory)
        .and_then(|()| clap_mangen::generate_to(Arguments::command(), directory))
        .and_then(|()| render(daemon::Arguments::command(), "8"))
        .and_then(|page| std::fs::write(&daemon, page))
        .map_err(|error| failed(directory, &error))
}

fn render(command: Command, section: &str) -> std::io::Result<Vec<u8>> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command).section(section).manual("vflash").render(&mut page)?;
    Ok(page)
}

fn failed(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(ErrorCode::Io, format!("writing {}: {error}", path.display()))
}
