//! The command line, from which help, man pages and completions are made.

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use std::path::PathBuf;
use std::time::Duration;
use vflash::base::units::Bytes;
use vflash::control::api;

const AFTER_HELP: &str = "\
Exit status: 0 done; 1 failed; 2 wrong usage.
`vflash check` and `vflash pool check` answer like fsck: 0 sound; 1 damage repaired; 4 damage
found; 8 could not check.
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
    /// Grow or shrink a volume, or the cache of a cached disk, attached or not
    Resize(ResizeArguments),
    /// Destroy a volume and give its space back to the pool
    Reclaim(ReclaimArguments),
    /// Attach a volume to a VM, or print how to
    Attach(AttachArguments),
    /// Take a volume away from a running VM, or a cached disk off its backing
    Detach(DetachArguments),
    /// Move what a cached disk has to its backing
    Drain(DrainArguments),
    /// List the points that a cached disk can be drained to
    Points {
        /// VM/VOLUME
        volume: String,
    },
    /// Name the point that a cached disk has come to
    Mark {
        /// VM/VOLUME
        volume: String,
        /// 1 to 255 bytes
        name: String,
    },
    /// Make the next opening of a cached disk fast; drains nothing
    Checkpoint {
        /// VM/VOLUME
        volume: String,
    },
    /// Change the mode of a cached disk while it is served
    Mode(ModeArguments),
    /// Show what share of a cached disk's reads hits at any size of its cache
    Mrc(CurveArguments),
    /// Tell what more or less cache would bring each cached disk, and the best move
    Advise(AdviseArguments),
    /// Check a pool and the logs of its cached disks, which no daemon holds
    Check(CheckArguments),
    /// Print what is on flash, of a pool that no daemon holds
    #[command(subcommand)]
    Dump(DumpVerb),
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
pub(crate) struct CurveArguments {
    /// VM/VOLUME
    pub volume: String,
    /// Write the curve there as a picture
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub svg: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct AdviseArguments {
    /// How much more, and less
    #[arg(long, value_name = "SIZE", value_parser = Bytes::parse, default_value = "1GiB")]
    pub step: Bytes,
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

/// From a VM with --qmp or --ch-api. Without: a cached disk is drained and taken off its backing,
/// which is clean afterwards, and its flash is free.
#[derive(Args, Debug)]
pub(crate) struct DetachArguments {
    /// VM/VOLUME
    #[arg(required_unless_present = "backing")]
    pub volume: Option<String>,
    /// The QMP socket of a running QEMU
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::AnyPath)]
    #[arg(conflicts_with_all = ["ch_api", "lost"])]
    pub qmp: Option<PathBuf>,
    /// The API socket of a running cloud-hypervisor
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::AnyPath, conflicts_with = "lost")]
    pub ch_api: Option<PathBuf>,
    /// QEMU: seconds to wait for the guest to let go
    #[arg(long, default_value = "30", value_parser = seconds, value_name = "SECONDS")]
    pub timeout: Duration,
    /// Give up what only the flash holds; says first what that is
    #[arg(long)]
    pub lost: bool,
    /// Agree to that loss: VM/VOLUME
    #[arg(long, value_name = "NAME", requires = "lost")]
    pub confirm: Vec<String>,
    /// With --lost, without a daemon: the backing whose host or flash is gone for good
    #[arg(long, requires = "lost", conflicts_with = "volume", value_hint = ValueHint::AnyPath)]
    pub backing: Option<String>,
    /// Its sidecar; beside a file as FILE.vflash unless told otherwise
    #[arg(long, value_name = "PATH", requires = "backing", value_hint = ValueHint::AnyPath)]
    pub sidecar: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct DrainArguments {
    /// VM/VOLUME
    pub volume: String,
    /// Up to exactly this write-order number
    #[arg(long, value_name = "NUMBER", group = "goal")]
    pub to: Option<u64>,
    /// Up to the point of this name
    #[arg(long, value_name = "NAME", group = "goal")]
    pub point: Option<String>,
    /// All that is committed, which is what happens anyway; ends --hold
    #[arg(long, group = "goal")]
    pub all: bool,
    /// Stay at that point until the next `vflash drain` without this
    #[arg(long)]
    pub hold: bool,
    /// Wait until the backing is there
    #[arg(long)]
    pub wait: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    WriteBack,
    WriteThrough,
    WriteAround,
    ReadOnly,
    Bypass,
}

impl From<Mode> for vflash::manifest::CacheMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::WriteBack => Self::WriteBack,
            Mode::WriteThrough => Self::WriteThrough,
            Mode::WriteAround => Self::WriteAround,
            Mode::ReadOnly => Self::ReadOnly,
            Mode::Bypass => Self::Bypass,
        }
    }
}

#[derive(Args, Debug)]
pub(crate) struct ModeArguments {
    /// VM/VOLUME
    pub volume: String,
    #[arg(value_enum)]
    pub mode: Mode,
}

#[derive(Args, Debug)]
pub(crate) struct CheckArguments {
    /// The device or file of a pool, or the name that the last daemon knew it by
    pub pool: String,
    /// Write damaged copies of metadata anew from their twins
    #[arg(long)]
    pub repair: bool,
}

#[derive(Subcommand, Debug)]
pub(crate) enum DumpVerb {
    /// Print every record of a cached disk's log, oldest first
    Journal(DumpArguments),
}

#[derive(Args, Debug)]
pub(crate) struct DumpArguments {
    /// The device or file of a pool, or the name that the last daemon knew it by
    pub pool: String,
    /// VM/VOLUME
    pub volume: String,
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
        /// A pool's name, or its device
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
        /// A pool's name, or its device
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
    /// Bring a backing to its last point: finish the redo group beside it, if there is one. Of a
    /// consistency group all backings: those that are not where their stamps say, are to be named
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
    /// Files, block devices, nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH
    #[arg(required = true, value_hint = ValueHint::AnyPath)]
    pub backings: Vec<String>,
    /// Where the sidecar of a single backing lies; beside a file as FILE.vflash unless told
    /// otherwise
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    pub sidecar: Option<PathBuf>,
    /// It is the right disk, though it was moved or copied since the cache had it
    #[arg(long)]
    pub adopt: bool,
    /// Go on although a group is damaged; the disk may then be at no point
    #[arg(long)]
    pub skip_damaged: bool,
    /// Give up a disk of the consistency group that is gone for good with its sidecar: the others
    /// go to the last point that they have together
    #[arg(long, value_name = "NAME")]
    pub without: Vec<String>,
}
