//! The agent inside the guest: its first process, which loads the disk drivers and then carries
//! out one command per line from the second serial port. See `agent/` for the commands; each
//! answers with one line (`vflash_guest::reply`).

mod agent {
    pub(crate) mod disk;
    pub(crate) mod hold;
    pub(crate) mod load;
    pub(crate) mod options;
    pub(crate) mod ordered;
    pub(crate) mod system;
}

use std::fs::File;
use std::io::{BufRead, BufReader, Write};

use agent::hold::Hold;
use agent::load::Load;
use agent::options::Options;
use agent::ordered::Writer;
use agent::{disk, system};
use anyhow::{Context, Result, bail, ensure};
use vflash_guest::reply::{READY, Reply};

/// The serial port that QEMU connects to the host's side of the harness.
const PORT: &str = "/dev/ttyS1";

const NO_LOAD: &str = "no load runs";
const NO_HOLD: &str = "no readers run";
const NO_WRITER: &str = "no ordered writer runs";

fn main() -> Result<()> {
    if std::process::id() != 1 {
        bail!("this program is the first process of a test guest; `cargo xtask demo` boots one");
    }
    system::start(PORT).context("start the guest")?;
    let port = File::options().read(true).write(true).open(PORT).context("open the port")?;
    let mut answers = port.try_clone().context("duplicate the port")?;
    let mut agent = Agent { load: None, hold: None, writer: None };
    writeln!(answers, "{READY}").context("write to the port")?;
    for line in BufReader::new(port).lines() {
        let line = line.context("read from the port")?;
        let answer = match agent.run(&line) {
            Ok(reply) => reply.line(),
            Err(error) => format!("error {}", format!("{error:#}").replace('\n', " | ")),
        };
        writeln!(answers, "{answer}").context("write to the port")?;
    }
    bail!("the port was closed")
}

struct Agent {
    load: Option<Load>,
    hold: Option<Hold>,
    writer: Option<Writer>,
}

impl Agent {
    fn run(&mut self, line: &str) -> Result<Reply> {
        let mut words = line.split_whitespace();
        let name = words.next().context("an empty command")?;
        let options = Options::parse(words)?;
        let done = |()| Reply::new();
        match name {
            "info" => disk::info(&options.disk()?),
            "fill" => disk::fill(&options),
            "check" => disk::check(&options),
            "sum" => disk::checksum(&options),
            "zeros" => disk::zeros(&options),
            "discard" => disk::discard(&options, &[]).map(done),
            "write-zeroes" => disk::discard(&options, &["--zeroout"]).map(done),
            "write-cache" => disk::set_write_cache(&options).map(done),
            "mkfs" => system::make_file_system(&options).map(done),
            "fsck" => system::check_file_system(&options).map(done),
            "mount" => system::mount(&options).map(done),
            "umount" => system::unmount(&options).map(done),
            "remove" => system::remove(&options).map(done),
            "trim" => system::trim(&options).map(done),
            "swap" => system::swap(&options),
            "udev" => system::start_udev().map(done),
            "errors" => system::kernel_errors(),
            "load-start" => self.start_load(&options).map(done),
            "load-status" => Ok(self.load.as_ref().context(NO_LOAD)?.status()),
            "load-stop" => self.load.take().context(NO_LOAD)?.stop(),
            "hold-start" => self.start_hold(&options).map(done),
            "hold-status" => Ok(self.hold.as_ref().context(NO_HOLD)?.status()),
            "hold-stop" => self.hold.take().context(NO_HOLD)?.stop(),
            "ordered-start" => self.start_writer(&options).map(done),
            "ordered-status" => Ok(self.writer.as_ref().context(NO_WRITER)?.status()),
            "ordered-stop" => self.writer.take().context(NO_WRITER)?.stop(),
            _ => bail!("the agent knows no command {name}"),
        }
    }

    fn start_load(&mut self, options: &Options) -> Result<()> {
        ensure!(self.load.is_none(), "a load runs already");
        self.load = Some(Load::start(options)?);
        Ok(())
    }

    fn start_writer(&mut self, options: &Options) -> Result<()> {
        ensure!(self.writer.is_none(), "an ordered writer runs already");
        self.writer = Some(Writer::start(options)?);
        Ok(())
    }

    fn start_hold(&mut self, options: &Options) -> Result<()> {
        ensure!(self.hold.is_none(), "readers run already");
        self.hold = Some(Hold::start(options)?);
        Ok(())
    }
}
