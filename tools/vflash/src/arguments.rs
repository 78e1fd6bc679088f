//! The command line, from which help, man pages and completions are made.

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use std::path::PathBuf;
use std::time::Duration;
use vflash::base::units::Bytes;
use vflash::control::api;

const AFTER_HELP: &str = "\
Exit status: 0 done; 1 failed; 2 wrong usage.
`vflash pool check` answers like fsck: 0 sound; 4 damage found; 8 could not check.
`vflash backing` too: 0 done; 4 damage found, nothing changed; 8 could not be done.";

/// Local NVMe flash for virtual machines: pools, volumes, and how they reach a VM.
#[derive(Parser, Debug)]
#[command(name = "vflash", version, after_help = AFTER_HELP, disable_help_subcommand = true)]
pub(crate) struct Arguments {
    /// The run directory of vflashd
    #[arg(long, global = true, env = api::RUN_DIR_VARIABLE, default_value = api::RUN_DIR)]
    #[arg(value_hint = ValueHint::DirPath, value_name = "DIR", hide_env_values = true)]
    pub run_dir: PathBuf,

    /// How answers are printed
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    #[arg(value_name = "FORMAT")]
    pub output: Format,

    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
    Yaml,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Verb {
    /// Bring pools and volumes to what manifests want, all or nothing
    Apply(ChangeArguments),
    /// Show what apply would do
    Diff(FileArguments),
    /// Destroy the volumes that manifests name
    Delete(DeleteArguments),
    /// List pools or volumes
    Get(GetArguments),
    /// Show everything about one pool or volume
    Describe {
        /// A pool's name, or VM/VOLUME
        object: String,
    },
    /// Print a manifest that makes anew what there is
    Export,
    /// Show how the daemon is
    Status,
    /// Grow or shrink a volume, attached or not
    Resize(ResizeArguments),
    /// Destroy a volume and give its space back to the pool
    Reclaim(ReclaimArguments),
    /// Attach a volume to a VM, or print how to
    Attach(AttachArguments),
    /// Take a volume away from a running VM
    Detach(DetachArguments),
    /// Show what happened
    Events(EventsArguments),
    /// Work on pools
    #[command(subcommand)]
    Pool(PoolVerb),
    /// Work on shared disks below caches, without a daemon and without the flash
    #[command(subcommand)]
    Backing(BackingVerb),
    /// Print a completion script
    Completion {
        /// For which shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write one per verb
    Man {
        /// Write the pages into this directory
        #[arg(long, value_hint = ValueHint::DirPath)]
        dir: Option<PathBuf>,
    },
}

#[derive(Args, Debug)]
pub(crate) struct FileArguments {
    /// A manifest, a directory of them (*.yaml, *.yml), or - for standard input
    #[arg(short, long = "file", required = true, value_name = "FILE|DIR")]
    #[arg(value_hint = ValueHint::AnyPath)]
    pub files: Vec<PathBuf>,
}

/// How a person agrees to the loss of data.
#[derive(Args, Debug)]
pub(crate) struct Consent {
    /// Destroy what has to be destroyed without asking
    #[arg(long)]
    pub yes: bool,

    /// Destroy this without asking: VM/VOLUME, or a device that becomes a pool
    #[arg(long, value_name = "NAME")]
    pub confirm: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct ChangeArguments {
    #[command(flatten)]
    pub files: FileArguments,
    #[command(flatten)]
    pub consent: Consent,
}

#[derive(Args, Debug)]
pub(crate) struct DeleteArguments {
    #[command(flatten)]
    pub files: FileArguments,
    /// Also volumes that are attached
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub consent: Consent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    #[value(alias = "pool")]
    Pools,
    #[value(alias = "volume")]
    Volumes,
}

#[derive(Args, Debug)]
pub(crate) struct GetArguments {
    #[arg(value_enum)]
    pub kind: Kind,
    /// Only these; a VM's name stands for all its volumes
    pub names: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct ResizeArguments {
    /// VM/VOLUME
    pub volume: String,
    /// The new size, for example 64GiB
    #[arg(value_parser = Bytes::parse)]
    pub size: Bytes,
    #[command(flatten)]
    pub consent: Consent,
}

#[derive(Args, Debug)]
pub(crate) struct ReclaimArguments {
    /// VM/VOLUME
    pub volume: String,
    /// Also if it is attached
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub consent: Consent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Recipe {
    Qemu,
    CloudHypervisor,
    Libvirt,
}

#[derive(Args, Debug)]
#[group(id = "target", required = true, multiple = false)]
pub(crate) struct Target {
    /// The QMP socket of a running QEMU
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::AnyPath, group = "target")]
    pub qmp: Option<PathBuf>,
    /// The API socket of a running cloud-hypervisor
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::AnyPath, group = "target")]
    pub ch_api: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct AttachArguments {
    /// VM/VOLUME
    pub volume: String,
    /// Print what to add to the VM's command line or definition
    #[arg(long, value_enum, value_name = "HYPERVISOR", group = "target")]
    pub print: Option<Recipe>,
    #[command(flatten)]
    pub target: Target,
    /// Queues to use; one per virtual CPU unless told otherwise
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub queues: Option<u16>,
    /// QEMU: plug into this bus; a free PCIe root port unless told otherwise
    #[arg(long)]
    pub bus: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct DetachArguments {
    /// VM/VOLUME
    pub volume: String,
    #[command(flatten)]
    pub target: Target,
    /// QEMU: seconds to wait for the guest to let go
    #[arg(long, default_value = "30", value_parser = seconds, value_name = "SECONDS")]
    pub timeout: Duration,
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse().map(Duration::from_secs).map_err(|_| "write a number of seconds".to_owned())
}

#[derive(Args, Debug)]
pub(crate) struct EventsArguments {
    /// Go on until interrupted
    #[arg(long)]
    pub follow: bool,
    /// Only events after this number
    #[arg(long, default_value_t = 0, value_name = "NUMBER")]
    pub after: u64,
}

#[derive(Subcommand, Debug)]
pub(crate) enum PoolVerb {
    /// Make a block device or file a pool, with or without a daemon
    Create(CreateArguments),
    /// Show a pool
    Show {
        pool: String,
        /// Wait until all freed space is scrubbed
        #[arg(long)]
        wait: bool,
    },
    /// Check a pool's metadata; changes nothing
    Check {
        /// A pool's name, or the device or file of a pool that no daemon holds
        pool: String,
    },
    /// Take up what a pool's device became larger by
    Grow { pool: String },
    /// Take a pool out of service; what it holds stays
    Close {
        pool: String,
        /// Also if volumes of it are attached
        #[arg(long)]
        force: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Preallocate {
    Reserved,
    Written,
}

impl From<Preallocate> for api::Preallocation {
    fn from(preallocate: Preallocate) -> Self {
        match preallocate {
            Preallocate::Reserved => Self::Reserved,
            Preallocate::Written => Self::Written,
        }
    }
}

#[derive(Args, Debug)]
pub(crate) struct CreateArguments {
    /// The pool's name
    pub name: String,
    /// A block device, or a file
    #[arg(value_hint = ValueHint::AnyPath)]
    pub device: PathBuf,
    /// Create the file with this size
    #[arg(long, value_parser = Bytes::parse)]
    pub size: Option<Bytes>,
    /// Reserve the new file's space, or write zeros over it: slow once, and then no write is slower
    /// for being the first to its block
    #[arg(long, value_enum, value_name = "HOW", default_value_t = Preallocate::Reserved)]
    #[arg(requires = "size")]
    pub preallocate: Preallocate,
    /// Only write the pool; do not ask a daemon to serve it
    #[arg(long)]
    pub offline: bool,
    #[command(flatten)]
    pub consent: Consent,
}

#[derive(Subcommand, Debug)]
pub(crate) enum BackingVerb {
    /// Show whose a backing is and which point it is at; changes nothing
    Show(BackingArguments),
    /// Bring a backing to its last point: finish the redo group beside it, if there is one
    Recover(RecoverArguments),
}

#[derive(Args, Debug)]
pub(crate) struct BackingArguments {
    /// A file, a block device, nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH
    #[arg(value_hint = ValueHint::AnyPath)]
    pub backing: String,
    /// Where its sidecar lies; beside a file as FILE.vflash unless told otherwise
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    pub sidecar: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct RecoverArguments {
    #[command(flatten)]
    pub backing: BackingArguments,
    /// It is the right disk, though it was moved or copied since the cache had it
    #[arg(long)]
    pub adopt: bool,
    /// Go on although a group is damaged; the disk may then be at no point
    #[arg(long)]
    pub skip_damaged: bool,
}
