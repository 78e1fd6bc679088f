//! `vflash-replay`: block traces through the policy, through curves, or through a daemon.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;
use vflash::base::units::Bytes;
use vflash::cache::curve::{SAMPLES_MAX, advise, blocks_of, draw};
use vflash::cache::policy::BLOCK_BYTES;
use vflash_replay::simulate::{self, Writes};
use vflash_replay::summary::{COLUMNS, Reference, Summary, grid, row};
use vflash_replay::trace::{Trace, Unit};
use vflash_replay::{curves, drive, through};

type Outcome = Result<bool, Box<dyn std::error::Error + Send + Sync>>;

/// Replay block traces: hit ratios, flash writes, latency
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run traces through the cache's policy alone, beside LRU
    Simulate(SimulateArguments),
    /// Run traces through a whole cached disk in memory, beside the policy alone
    Disk(DiskArguments),
    /// Draw the miss-ratio curve of a trace, sampled and exact
    Curve(CurveArguments),
    /// Send a trace to a vhost-user socket and measure
    Drive(DriveArguments),
}

#[derive(Args)]
struct TraceArguments {
    /// What the numbers of a .lis file count [default: pages if its name begins with OLTP, else
    /// sectors]
    #[arg(long, value_enum)]
    unit: Option<UnitArgument>,
}

#[derive(Clone, Copy, ValueEnum)]
enum UnitArgument {
    Sector,
    Page,
}

impl TraceArguments {
    fn open(&self, path: &std::path::Path) -> vflash::base::Result<Trace> {
        let unit = self.unit.map(|unit| match unit {
            UnitArgument::Sector => Unit::Sector,
            UnitArgument::Page => Unit::Page,
        });
        Trace::open(path, unit)
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum WritesArgument {
    /// As reads: misses that are kept
    AsReads,
    /// As drained journal data: clean cache in place; only reads count
    Kept,
    /// Dropped once drained; only reads count
    Dropped,
    /// Left out
    Ignored,
}

#[derive(Args)]
struct SimulateArguments {
    /// Trace files
    #[arg(required = true)]
    traces: Vec<PathBuf>,
    /// What is done with writes
    #[arg(long, value_enum, default_value = "as-reads")]
    writes: WritesArgument,
    /// A table in the columns of the output, to compare with
    #[arg(long, value_name = "FILE")]
    reference: Option<PathBuf>,
    /// The policy of that table to compare with
    #[arg(long, default_value = "S3-FIFO(t=2)")]
    policy: String,
    /// Belady's optimum as well; takes memory and time
    #[arg(long)]
    belady: bool,
    /// Blocks in probation, in thousandths of the cache
    #[arg(long, default_value_t = simulate::Options::default().probation_permille)]
    probation: u32,
    /// Blocks in probation at least, up to a tenth of the cache
    #[arg(long, default_value_t = simulate::Options::default().probation_blocks_min)]
    probation_min: u64,
    /// Blocks after which a sequential stream bypasses the cache
    #[arg(long, default_value_t = simulate::Options::default().stream_blocks)]
    stream: u32,
    /// Fail unless all goals are met
    #[arg(long, requires = "reference")]
    check: bool,
    #[command(flatten)]
    trace: TraceArguments,
}

#[derive(Args)]
struct DiskArguments {
    /// Trace files
    #[arg(required = true)]
    traces: Vec<PathBuf>,
    /// Size of the cache, as a share of the footprint
    #[arg(long, default_value_t = 0.25)]
    share: f64,
    #[command(flatten)]
    trace: TraceArguments,
}

#[derive(Args)]
struct CurveArguments {
    /// The trace file
    path: PathBuf,
    /// Write the curve there as SVG
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// The size that the cache has [default: a tenth of the footprint]
    #[arg(long, value_parser = Bytes::parse)]
    cache: Option<Bytes>,
    /// Blocks in the sample
    #[arg(long, default_value_t = SAMPLES_MAX)]
    samples: usize,
    #[command(flatten)]
    trace: TraceArguments,
}

#[derive(Args)]
struct DriveArguments {
    /// The trace file
    path: PathBuf,
    /// The volume's socket
    #[arg(long)]
    socket: PathBuf,
    /// Requests under way at most
    #[arg(long, default_value_t = 32)]
    depth: u16,
    /// Times as fast as the trace was taken [default: as fast as it goes]
    #[arg(long, value_parser = positive)]
    speed: Option<f64>,
    /// Requests at most
    #[arg(long)]
    requests: Option<usize>,
    /// The daemon's run directory, for the cache's counters
    #[arg(long, requires = "volume")]
    run_dir: Option<PathBuf>,
    /// The volume whose counters are wanted, as VM/VOLUME
    #[arg(long, requires = "run_dir")]
    volume: Option<String>,
    #[command(flatten)]
    trace: TraceArguments,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if (1e-6..1e9).contains(&number) => Ok(number),
        _ => Err("must be a positive number".into()),
    }
}

fn simulate(arguments: &SimulateArguments) -> Outcome {
    let options = simulate::Options {
        writes: match arguments.writes {
            WritesArgument::AsReads => Writes::AsReads,
            WritesArgument::Kept => Writes::Kept,
            WritesArgument::Dropped => Writes::Dropped,
            WritesArgument::Ignored => Writes::Ignored,
        },
        probation_permille: arguments.probation,
        probation_blocks_min: arguments.probation_min,
        stream_blocks: arguments.stream,
        belady: arguments.belady,
    };
    let reference = match &arguments.reference {
        Some(path) => Some(Reference::parse(&std::fs::read_to_string(path)?, &arguments.policy)?),
        None => None,
    };
    println!("{COLUMNS}");
    let mut points = Vec::new();
    for path in &arguments.traces {
        let found = simulate::run(&arguments.trace.open(path)?, &options);
        found.iter().for_each(|point| println!("{}", row(point)));
        points.extend(found);
    }
    let summary = Summary::new(&points, reference.as_ref());
    eprint!("\n{}\n{}", grid(&points), summary.text(reference.as_ref()));
    Ok(!arguments.check || summary.passed())
}

fn disk(arguments: &DiskArguments) -> Outcome {
    for path in &arguments.traces {
        let report = through::run(&arguments.trace.open(path)?, arguments.share)?;
        println!("{}", serde_json::to_string_pretty(&report)?);
    }
    Ok(true)
}

fn curve(arguments: &CurveArguments) -> Outcome {
    let trace = arguments.trace.open(&arguments.path)?;
    let curves = curves::run(&trace, arguments.samples);
    let tenth = curves.footprint_blocks / 10 * BLOCK_BYTES;
    let now = arguments.cache.map_or(tenth, |size| size.0);
    print!("{}", draw::table(&curves.sampled, now));
    let step = blocks_of(1 << 30);
    for advice in advise(&curves.sampled, blocks_of(now), step) {
        let size = draw::size(advice.blocks * BLOCK_BYTES);
        let (hits, change) = (advice.hit_ratio * 100.0, advice.change * 100.0);
        println!("{size}: {hits:.1} % hits ({change:+.1})");
    }
    eprintln!(
        "mean error against exact {:.4}; {} bytes of memory",
        curves.error, curves.sampler_bytes
    );
    if let Some(path) = &arguments.svg {
        std::fs::write(path, draw::svg(&curves.sampled, now, &trace.name))?;
    }
    Ok(true)
}

fn drive(arguments: &DriveArguments) -> Outcome {
    let trace = arguments.trace.open(&arguments.path)?;
    let run_dir = arguments.run_dir.as_deref();
    let api = run_dir.map(vflash::control::api::socket_path);
    let report = drive::run(
        &trace,
        &drive::Options {
            socket: arguments.socket.clone(),
            depth: arguments.depth,
            speed: arguments.speed,
            requests_max: arguments.requests,
            metrics: api.zip(arguments.volume.clone()),
        },
    )?;
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(report.errors == 0)
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Simulate(arguments) => simulate(&arguments),
        Command::Disk(arguments) => disk(&arguments),
        Command::Curve(arguments) => curve(&arguments),
        Command::Drive(arguments) => drive(&arguments),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("vflash-replay: {error}");
            ExitCode::FAILURE
        }
    }
}
