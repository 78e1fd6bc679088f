//! `vflash-bench`: load a vhost-user-blk socket, or kill its server under load.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use vflash::base::units::Bytes;
use vflash_bench::device::DeviceOptions;
use vflash_bench::kill::{self, KillOptions, KillReport};
use vflash_bench::limits::{self, Limited};
use vflash_bench::linear::{self, LinearOptions};
use vflash_bench::load::{self, LoadOptions};
use vflash_bench::queue::Waiting;
use vflash_bench::runner::{Mix, Workload};
use vflash_bench::serve::{Lie, serve};

/// A verifying load client for vhost-user-blk back ends: the VMM and the guest in one
///
/// Results are printed as one JSON object. The exit status is 0 only if nothing failed, nothing
/// hung and every byte that was checked was right.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Load a socket and measure
    Load(LoadArguments),
    /// Kill and restart a server under verified load, and count what it loses or does twice
    Kill(KillArguments),
    /// Write a whole device once, so that no block is unwritten when it is measured
    Fill {
        /// The server's socket
        #[arg(long)]
        socket: PathBuf,
    },
    /// Connect to sockets, stay idle for a while, and measure what the server uses
    Idle(IdleArguments),
    /// Ask for more than limits allow, and measure how near to them it comes; fails beyond 5 %
    Limits(LimitsArguments),
    /// Be several guests of one disk, and check that all they see can have happened in one order
    Linear(LinearArguments),
    /// Serve a file to try the client on, honestly or not
    Serve(ServeArguments),
}

#[derive(Clone, Copy, ValueEnum)]
enum Pattern {
    /// Random reads
    Randread,
    /// Random writes
    Randwrite,
    /// Random reads (48 %), writes (50 %) and flushes (2 %)
    Randrw,
    /// Random discards
    Randtrim,
    /// Sequential reads
    Read,
    /// Sequential writes
    Write,
    /// Random reads, writes, discards, write-zeroes and flushes
    All,
}

impl Pattern {
    fn mix(self) -> Mix {
        match self {
            Self::Randread => Mix::READ,
            Self::Randwrite => Mix::WRITE,
            Self::Randrw => Mix::BOTH,
            Self::Randtrim => Mix::DISCARD,
            Self::Read => Mix { sequential: true, ..Mix::READ },
            Self::Write => Mix { sequential: true, ..Mix::WRITE },
            Self::All => Mix::ALL,
        }
    }
}

#[derive(Args)]
struct LoadArguments {
    /// The server's socket
    #[arg(long)]
    socket: PathBuf,
    /// Virtqueues
    #[arg(long, default_value_t = 1)]
    queues: u16,
    /// Requests in flight per queue
    #[arg(long, default_value_t = 32)]
    depth: u16,
    /// What to ask for
    #[arg(long, value_enum, default_value = "randread")]
    rw: Pattern,
    /// Bytes per request
    #[arg(long, default_value = "4KiB", value_parser = block_size)]
    block_size: Bytes,
    /// Bytes of the device to use [default: all]
    #[arg(long, value_parser = Bytes::parse)]
    span: Option<Bytes>,
    /// Byte of the device that the used part begins at [default: 0]
    #[arg(long, value_parser = Bytes::parse, conflicts_with = "verify")]
    start: Option<Bytes>,
    /// Seconds to measure
    #[arg(long, default_value_t = 5.0, value_parser = seconds)]
    runtime: f64,
    /// End once so many requests were measured, if that is sooner
    #[arg(long)]
    ops: Option<u64>,
    /// Seconds to run before measuring
    #[arg(long, default_value_t = 0.5, value_parser = seconds)]
    ramp: f64,
    /// Requests per second in all; latencies then count from when a request was due [default: no
    /// limit]
    #[arg(long, value_parser = rate)]
    rate: Option<f64>,
    /// Commit as a database does: so many writes together and, when all have ended, a flush; over
    /// and over [default: no flushes but those of the pattern]
    #[arg(long, value_name = "WRITES", conflicts_with_all = ["verify", "rate"])]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    commit: Option<u16>,
    /// Watch the rings all the time and ask for no interrupts
    #[arg(long, conflicts_with = "sleep")]
    poll: bool,
    /// Sleep until an interrupt comes (the default)
    #[arg(long)]
    sleep: bool,
    /// Stamp every sector that is written, check all that is read, and read all back at the end
    #[arg(long)]
    verify: bool,
    /// Process whose CPU time is measured
    #[arg(long)]
    server_pid: Option<u32>,
    /// Seed of all that is random
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    driver: DriverArguments,
}

/// How the driver and its VMM go about it.
#[derive(Args)]
struct DriverArguments {
    /// Use indirect descriptors
    #[arg(long, help_heading = "Driver")]
    indirect: bool,
    /// Do without the event index
    #[arg(long, help_heading = "Driver")]
    no_event_index: bool,
    /// Share memory by ADD_MEM_REG, in two slots, instead of SET_MEM_TABLE
    #[arg(long, help_heading = "Driver")]
    memory_slots: bool,
    /// Put guest memory on 2 MiB pages, which must have been reserved (vm.nr_hugepages)
    #[arg(long, help_heading = "Driver", conflicts_with = "memory_slots")]
    hugetlb: bool,
}

#[derive(Args)]
struct KillArguments {
    /// The server's socket
    #[arg(long)]
    socket: PathBuf,
    /// Kills
    #[arg(long, default_value_t = 1000)]
    cycles: u32,
    /// Kills until the next front end, with another depth (1 to 128) and 1 to 4 queues
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    cycles_per_boot: u32,
    /// Bytes of the device to use
    #[arg(long, default_value = "64MiB", value_parser = Bytes::parse)]
    span: Bytes,
    /// Seed of all that is random
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Keep no in-flight area, to see what it is for: requests get lost
    #[arg(long)]
    no_inflight: bool,
    /// The server's command line
    #[arg(last = true, required = true)]
    server: Vec<String>,
}

#[derive(Args)]
struct IdleArguments {
    /// The sockets to connect to
    #[arg(required = true)]
    sockets: Vec<PathBuf>,
    /// The server's process
    #[arg(long)]
    server_pid: u32,
    /// Seconds to stay connected
    #[arg(long, default_value_t = 5.0, value_parser = seconds)]
    runtime: f64,
}

#[derive(Args)]
struct LimitsArguments {
    /// The socket of a volume that has the limits given here [default: a null volume of our own,
    /// served with each of a list of limits]
    #[arg(long)]
    socket: Option<PathBuf>,
    /// Requests per second that the volume is limited to
    #[arg(long, requires = "socket")]
    iops: Option<u64>,
    /// Bytes per second that the volume is limited to
    #[arg(long, requires = "socket", value_parser = Bytes::parse)]
    bandwidth: Option<Bytes>,
    /// Seconds to measure each
    #[arg(long, default_value_t = 3.0, value_parser = seconds)]
    runtime: f64,
}

#[derive(Args)]
struct LinearArguments {
    /// The sockets of one disk, one for each guest; its first blocks must read as zeros
    #[arg(required = true)]
    sockets: Vec<PathBuf>,
    /// Virtqueues of each guest
    #[arg(long, default_value_t = 4)]
    queues: u16,
    /// Requests in flight per queue
    #[arg(long, default_value_t = 2)]
    depth: u16,
    /// Blocks of 4 KiB that the guests meet on
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    blocks: u32,
    /// Requests of all guests together
    #[arg(long, default_value_t = 1_000_000)]
    ops: u64,
    /// Seed of all that is random
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A command to run now and then meanwhile, as `vflash drain VM/VOLUME`; may be given again
    #[arg(long, value_name = "COMMAND")]
    meanwhile: Vec<String>,
    /// Requests from one such command to the next
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..))]
    every: u64,
}

#[derive(Args)]
struct ServeArguments {
    /// Where to listen
    #[arg(long)]
    socket: PathBuf,
    /// The file; made if it is not there
    #[arg(long)]
    file: PathBuf,
    /// Size of a file that is made
    #[arg(long, default_value = "64MiB", value_parser = Bytes::parse)]
    size: Bytes,
    /// What to do wrong
    #[arg(long, value_enum)]
    lie: Option<Lie>,
}

fn block_size(text: &str) -> Result<Bytes, String> {
    let size = Bytes::parse(text)?;
    match size.0 {
        512..=16_777_216 if size.0.is_multiple_of(512) => Ok(size),
        _ => Err("must be a multiple of 512 bytes and at most 16MiB".into()),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if (0.0..1e9).contains(&number) => Ok(number),
        _ => Err("must be a number of seconds".into()),
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if (1e-3..1e9).contains(&number) => Ok(number),
        _ => Err("must be a number of requests per second".into()),
    }
}

/// What is printed, and whether all was well.
type Outcome = vflash_bench::Result<(String, bool)>;

fn load(arguments: &LoadArguments) -> Outcome {
    let driver = &arguments.driver;
    let report = load::run(&LoadOptions {
        device: DeviceOptions {
            queues: arguments.queues,
            depth: arguments.depth,
            data_bytes: arguments.block_size.0 as usize,
            waiting: if arguments.poll { Waiting::Poll } else { Waiting::Sleep },
            event_index: !driver.no_event_index,
            indirect: driver.indirect,
            memory_slots: driver.memory_slots,
            hugetlb: driver.hugetlb,
            ..DeviceOptions::new(&arguments.socket)
        },
        workload: Workload {
            mix: arguments.rw.mix(),
            block_bytes: arguments.block_size.0 as u32,
            ragged: false,
            span_sectors: arguments.span.map_or(u64::MAX, |span| span.0 / 512),
            verify: arguments.verify,
            seed: arguments.seed,
        },
        ramp: Duration::from_secs_f64(arguments.ramp),
        runtime: Duration::from_secs_f64(arguments.runtime),
        operations_max: arguments.ops,
        rate: arguments.rate,
        commit_writes: arguments.commit,
        first_sector: arguments.start.map_or(0, |start| start.0 / 512),
        server_pid: arguments.server_pid,
    })?;
    Ok((serde_json::to_string(&report)?, report.passed()))
}

fn kill(arguments: KillArguments) -> Outcome {
    let options = KillOptions {
        cycles: arguments.cycles,
        socket: arguments.socket,
        server: arguments.server,
        seed: arguments.seed,
        span_bytes: arguments.span.0,
        cycles_per_boot: arguments.cycles_per_boot,
        inflight: !arguments.no_inflight,
    };
    let report = kill::run(&options, |report| {
        let KillReport { cycles, operations, stall_p99_ms, .. } = report;
        eprintln!("{cycles} kills, {operations} operations, stall p99 {stall_p99_ms:.0} ms");
    })?;
    for failure in &report.failures {
        eprintln!("{failure}");
    }
    Ok((serde_json::to_string(&report)?, report.passed()))
}

fn fill(socket: &std::path::Path) -> Outcome {
    let options = DeviceOptions { depth: 8, data_bytes: 1 << 20, ..DeviceOptions::new(socket) };
    let bytes = load::fill(options)?;
    Ok((serde_json::json!({ "bytes": bytes }).to_string(), true))
}

fn idle(arguments: &IdleArguments) -> Outcome {
    let runtime = Duration::from_secs_f64(arguments.runtime);
    let report = load::idle(&arguments.sockets, arguments.server_pid, runtime)?;
    Ok((serde_json::to_string(&report)?, true))
}

/// One line for each limit.
fn measure_limits(arguments: &LimitsArguments) -> Outcome {
    let runtime = Duration::from_secs_f64(arguments.runtime);
    let (iops, bandwidth) = (arguments.iops, arguments.bandwidth.map(|bytes| bytes.0));
    let reports = match &arguments.socket {
        Some(_) if iops.is_none() && bandwidth.is_none() => {
            return Err("say what the volume is limited to: --iops, --bandwidth or both".into());
        }
        Some(socket) => vec![limits::measure(socket, Limited::new(iops, bandwidth), runtime)?],
        None => limits::measure_all(runtime)?,
    };
    let lines: Result<Vec<String>, _> = reports.iter().map(serde_json::to_string).collect();
    Ok((lines?.join("\n"), reports.iter().all(limits::LimitReport::passed)))
}

fn check_order(arguments: LinearArguments) -> Outcome {
    let LinearArguments { sockets, queues, depth, blocks, ops, seed, meanwhile, every } = arguments;
    let options = LinearOptions { sockets, queues, depth, blocks, operations: ops, seed };
    let report = linear::run(&options, |guests| {
        let mut commands = meanwhile.iter().cycle();
        let mut next = every;
        while !guests.is_over() {
            if guests.operations() < next {
                std::thread::yield_now();
                continue;
            }
            next += every;
            let Some(command) = commands.next() else { return Ok(()) };
            let mut words = command.split_whitespace();
            let program = words.next().ok_or("--meanwhile wants a command")?;
            let status = std::process::Command::new(program).args(words).status()?;
            if !status.success() {
                eprintln!("{command}: {status}");
            }
        }
        Ok(())
    })?;
    for text in &report.violations {
        eprintln!("{text}");
    }
    Ok((serde_json::to_string(&report)?, report.passed()))
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Load(arguments) => load(&arguments),
        Command::Kill(arguments) => kill(arguments),
        Command::Fill { socket } => fill(&socket),
        Command::Idle(arguments) => idle(&arguments),
        Command::Limits(arguments) => measure_limits(&arguments),
        Command::Linear(arguments) => check_order(arguments),
        Command::Serve(ServeArguments { socket, file, size, lie }) => {
            serve(&socket, &file, size.0, lie).map(|()| (String::new(), true))
        }
    };
    match outcome {
        Ok((json, passed)) => {
            println!("{json}");
            if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("vflash-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
