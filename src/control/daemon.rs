//! vflashd: arguments in, parts composed, run until told to stop.

use super::api;
use super::engine::Engine;
use super::http::{self, Access};
use super::rundir::RunDir;
use crate::base::{Error, ErrorKind, Result};
use crate::vhost::ServerOptions;
use clap::{Parser, ValueHint};
use sd_notify::NotifyState;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::MissedTickBehavior;

/// How often pools are looked at and systemd is told that all is well.
const TICK: Duration = Duration::from_secs(1);

/// Serves local flash to virtual machines over vhost-user-blk.
///
/// Pools hold everything that must outlive the daemon: started again with the same run directory,
/// it opens the same pools and serves the same volumes on the same sockets. Virtual machines that
/// were attached wait meanwhile and go on.
#[derive(Parser, Clone, Debug)]
#[command(name = "vflashd", version)]
pub struct Arguments {
    /// Where sockets are; one daemon per directory
    #[arg(long, env = api::RUN_DIR_VARIABLE, default_value = api::RUN_DIR)]
    #[arg(value_hint = ValueHint::DirPath, value_name = "DIR", hide_env_values = true)]
    pub run_dir: PathBuf,

    /// Keep the list of pools here, too, so that they are opened again after a restart of the host
    #[arg(long, value_hint = ValueHint::DirPath, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,

    /// Apply these manifests at the start and at SIGHUP: a file, or a directory
    #[arg(short, long = "file", value_name = "FILE|DIR", value_hint = ValueHint::AnyPath)]
    pub files: Vec<PathBuf>,

    /// Open the pool on this device or file, besides those that were open before
    #[arg(long = "pool", value_name = "DEVICE", value_hint = ValueHint::AnyPath)]
    pub pools: Vec<String>,

    /// Threads that move data; one per four CPUs, at most 4, unless told otherwise
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub reactors: Option<u16>,

    /// Pin the reactors to these CPUs, for example 2-5,8
    #[arg(long, value_name = "LIST", value_parser = parse_cpus)]
    pub cpus: Option<CpuList>,

    /// Let members of this group use the API, by name or number: whoever may is as good as root
    #[arg(long, value_name = "GROUP", value_parser = parse_group)]
    pub api_group: Option<u32>,

    /// Seconds between two looks at which cache with a minimum and maximum gets more of its pool
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub balance_every: u64,

    /// How much to log
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    #[arg(value_parser = ["error", "warn", "info", "debug", "trace"])]
    pub log_level: String,

    /// Print what this vhost-user back-end can do, as JSON, and exit
    #[arg(long)]
    pub print_capabilities: bool,
}

/// CPUs by number, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList(pub Vec<usize>);

fn parse_cpus(text: &str) -> std::result::Result<CpuList, String> {
    let wrong = || format!("`{text}` is no list of CPUs: write for example 2-5,8");
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: usize = first.trim().parse().map_err(|_| wrong())?;
        let last: usize = last.trim().parse().map_err(|_| wrong())?;
        if first > last || last >= libc::CPU_SETSIZE as usize {
            return Err(wrong());
        }
        cpus.extend(first..=last);
    }
    Ok(CpuList(cpus))
}

fn parse_group(text: &str) -> std::result::Result<u32, String> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    match nix::unistd::Group::from_name(text) {
        Ok(Some(group)) => Ok(group.gid.as_raw()),
        _ => Err(format!("there is no group `{text}` on this host")),
    }
}

impl Arguments {
    fn server_options(&self) -> ServerOptions {
        let cpus = self.cpus.clone().map(|list| list.0).unwrap_or_default();
        let available = std::thread::available_parallelism().map_or(1, usize::from);
        let usual = if cpus.is_empty() { (available / 4).clamp(1, 4) } else { cpus.len() };
        ServerOptions { reactors: self.reactors.map_or(usual, usize::from), cpus }
    }
}

/// Runs until SIGTERM or SIGINT.
pub fn run(arguments: &Arguments) -> Result<()> {
    if arguments.print_capabilities {
        // Many devices, so none of the conventional options for a single one.
        println!(r#"{{"type": "block", "features": []}}"#);
        return Ok(());
    }
    start_log(&arguments.log_level);
    raise_descriptor_limit();
    let run_dir = RunDir::open(&arguments.run_dir)?;
    let run_dir = match &arguments.state_dir {
        Some(state_dir) => run_dir.with_state(state_dir)?,
        None => run_dir,
    };
    let engine = Arc::new(Engine::start(run_dir, &arguments.server_options())?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_name("api")
        .build()
        .map_err(|error| Error::io("starting the API's runtime", error))?;
    let result = runtime.block_on(serve(&engine, arguments));
    // Calls that wait for a drive that hangs must not keep the daemon from ending.
    runtime.shutdown_background();
    result
}

fn start_log(level: &str) {
    let mut builder = env_logger::Builder::new();
    builder.parse_filters(level).parse_default_env();
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        // The journal notes the time itself.
        builder.format_timestamp(None);
    } else {
        builder.format_timestamp_millis();
    }
    builder.init();
}

/// Each volume takes several descriptors, and each guest's memory and queues more.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(errno) = raised {
        log::warn!("raising the limit of open files: {errno}");
    }
}

async fn serve(engine: &Arc<Engine>, arguments: &Arguments) -> Result<()> {
    let signals = |error| Error::io("listening to signals", error);
    let mut terminate = signal(SignalKind::terminate()).map_err(signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(signals)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(signals)?;
    let access = Access { group: arguments.api_group };
    let listener = http::bind(&api::socket_path(engine.run_dir()), access)?;
    let server = tokio::spawn(http::serve(listener, engine.clone(), access));

    let devices = arguments.pools.clone();
    blocking(engine, move |engine| engine.restore(&devices)).await?;
    apply_files(engine, &arguments.files).await?;
    engine.set_restored();
    tell_systemd(&[NotifyState::Ready, NotifyState::Status(&summary(engine))]);

    let period = Duration::from_secs(arguments.balance_every);
    let mut balance = tokio::time::interval_at(tokio::time::Instant::now() + period, period);
    balance.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => {
                log::info!("SIGHUP: applying the manifests again");
                apply_files(engine, &arguments.files).await?;
            }
            _ = tick.tick() => look_after(engine),
            _ = balance.tick() => {
                let engine = engine.clone();
                tokio::task::spawn_blocking(move || engine.balance());
            }
        }
    }
    log::info!("stopping");
    tell_systemd(&[NotifyState::Stopping]);
    server.abort();
    let stopped = blocking(engine, Engine::stop).await?;
    log::info!("stopped: guests wait for the next daemon");
    stopped
}

/// Runs `work` where it may block.
async fn blocking<R: Send + 'static>(
    engine: &Arc<Engine>,
    work: impl FnOnce(&Engine) -> R + Send + 'static,
) -> Result<R> {
    let engine = engine.clone();
    tokio::task::spawn_blocking(move || work(&engine)).await.map_err(|error| {
        Error::new(ErrorKind::Gone, format!("a part of the daemon failed by a defect: {error}"))
    })
}

/// A mistake in a manifest stops nobody from being served what is in the pools.
async fn apply_files(engine: &Arc<Engine>, files: &[PathBuf]) -> Result<()> {
    if files.is_empty() {
        return Ok(());
    }
    let files = files.to_owned();
    blocking(engine, move |engine| engine.apply_files(&files)).await
}

/// Looks at the pools, each on a thread of its own since its drive may hang, and tells systemd that
/// the data path answers.
fn look_after(engine: &Arc<Engine>) {
    for pool in engine.open_pools() {
        let engine = engine.clone();
        tokio::task::spawn_blocking(move || engine.watch(&pool));
    }
    let pools = engine.clone();
    tokio::task::spawn_blocking(move || pools.retry_pools());
    engine.look_after_drives();
    let caches = engine.clone();
    tokio::task::spawn_blocking(move || caches.look_after_caches());
    let engine = engine.clone();
    tokio::task::spawn_blocking(move || {
        if engine.answers() {
            let status = summary(&engine);
            tell_systemd(&[NotifyState::Watchdog, NotifyState::Status(&status)]);
        }
    });
}

fn summary(engine: &Engine) -> String {
    let status = engine.summary();
    format!(
        "{} pools, {} volumes, {} attached, {} problems",
        status.pools,
        status.volumes,
        status.attached,
        status.problems.len()
    )
}

/// Nothing if systemd did not start us.
fn tell_systemd(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        log::debug!("telling systemd: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_read() {
        assert_eq!(parse_cpus("3"), Ok(CpuList(vec![3])));
        assert_eq!(parse_cpus("2-4,8"), Ok(CpuList(vec![2, 3, 4, 8])));
        for wrong in ["", "a", "4-2", "1-", "1,,2", "5000"] {
            assert!(parse_cpus(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_arguments_hold_together() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
        let arguments = Arguments::parse_from(["vflashd", "--cpus", "1,2"]);
        assert_eq!(arguments.server_options().reactors, 2);
        let arguments = Arguments::parse_from(["vflashd", "--reactors", "3", "--cpus", "1"]);
        assert_eq!(arguments.server_options().reactors, 3);
    }
}
