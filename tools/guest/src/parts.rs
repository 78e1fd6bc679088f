//! Where the guest's kernel and programs come from.
//!
//! What the host has installed is used as it is. What it lacks is downloaded as a Debian package
//! and unpacked under `target/guest/packages`: the host's own `/boot` and system stay untouched,
//! and no root is needed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::output;

/// The package that always depends on Debian's newest kernel for virtual machines.
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";

/// The kernel's file names end so.
const KERNEL_SUFFIX: &str = "-cloud-amd64";

/// Programs of the guest, each with the packages that bring it and the libraries a host may lack.
const PROGRAMS: &[(&str, &[&str])] = &[
    ("blkdiscard", &["util-linux"]),
    ("e2fsck", &["e2fsprogs", "libext2fs2", "libcom-err2"]),
    ("fstrim", &["util-linux"]),
    ("kmod", &["kmod", "libkmod2"]),
    ("mke2fs", &["e2fsprogs", "libext2fs2", "libcom-err2"]),
    ("mkswap", &["util-linux"]),
    ("mount", &["mount", "libmount1"]),
    ("stty", &["coreutils"]),
    ("swapoff", &["mount"]),
    ("swapon", &["mount", "libsmartcols1"]),
    ("sync", &["coreutils"]),
    ("udevadm", &["udev", "libudev1", "libkmod2"]),
    ("umount", &["mount", "libmount1"]),
];

/// A kernel and the directory of its modules.
pub struct Kernel {
    pub image: PathBuf,
    pub modules: PathBuf,
}

/// All that the guest is made of, found or fetched.
pub struct Parts {
    pub kernel: Kernel,
    /// Name and file of each program.
    pub programs: Vec<(&'static str, PathBuf)>,
    packages: PathBuf,
}

impl Parts {
    /// Finds every part, fetching the missing ones; `note` is told what is being fetched.
    pub fn gather(note: &dyn Fn(&str)) -> Result<Self> {
        let packages = work_dir()?.join("packages");
        fs::create_dir_all(&packages).with_context(|| format!("create {}", packages.display()))?;
        // Two runs at once must not unpack into the same directory.
        let lock_path = packages.join("lock");
        let lock = fs::File::create(&lock_path)
            .with_context(|| format!("create {}", lock_path.display()))?;
        lock.lock().with_context(|| format!("lock {}", lock_path.display()))?;
        let missing = missing_packages(&packages);
        if !missing.is_empty() {
            note(&format!("fetching the guest's parts: {}", words(&missing)));
            fetch(&packages, &missing)?;
        }
        let kernel = find_kernel(&packages).context("no kernel image in its package")?;
        let programs = PROGRAMS
            .iter()
            .map(|(name, _)| {
                let file = find_program(&packages, name);
                Ok((*name, file.with_context(|| format!("no program {name} in its package"))?))
            })
            .collect::<Result<_>>()?;
        Ok(Self { kernel, programs, packages })
    }

    /// The shared libraries that `program` loads, the loader itself included.
    pub fn libraries(&self, program: &Path) -> Result<BTreeSet<PathBuf>> {
        let search: Vec<String> = unpacked(&self.packages)
            .flat_map(|root| ["lib", "usr/lib"].map(|lib| root.join(lib).join("x86_64-linux-gnu")))
            .map(|directory| directory.display().to_string())
            .collect();
        let mut command = Command::new("ldd");
        command.arg(program).env("LD_LIBRARY_PATH", search.join(":"));
        let listing = output(&mut command)?;
        let mut libraries = BTreeSet::new();
        for line in listing.lines().map(str::trim) {
            if line.ends_with("not found") {
                bail!("{} needs a library this machine lacks: {line}", program.display());
            }
            let path = line.split(" => ").last().and_then(|rest| rest.split(" (").next());
            libraries.extend(path.filter(|path| path.starts_with('/')).map(PathBuf::from));
        }
        Ok(libraries)
    }
}

/// `target/guest`, where fetched packages and what was learnt of this host are kept.
pub fn work_dir() -> Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace_root().join("target"), PathBuf::from);
    let directory = target.join("guest");
    fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    directory.canonicalize().with_context(|| format!("resolve {}", directory.display()))
}

/// The directory of the workspace's `Cargo.toml`.
pub fn workspace_root() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
    root.expect("this crate lies two folders below the root").to_owned()
}

fn missing_packages(packages: &Path) -> BTreeSet<&'static str> {
    let mut missing = BTreeSet::new();
    if find_kernel(packages).is_none() {
        missing.insert(KERNEL_PACKAGE);
    }
    for (name, from) in PROGRAMS {
        if find_program(packages, name).is_none() {
            missing.extend(from.iter().copied());
        }
    }
    missing
}

fn find_kernel(packages: &Path) -> Option<Kernel> {
    let roots = std::iter::once(PathBuf::from("/")).chain(unpacked(packages));
    roots.filter_map(|root| newest_kernel(&root)).next()
}

fn newest_kernel(root: &Path) -> Option<Kernel> {
    let versions = fs::read_dir(root.join("lib/modules")).ok()?;
    let mut names: Vec<String> = versions
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.ends_with(KERNEL_SUFFIX))
        .collect();
    names.sort();
    names.iter().rev().find_map(|name| {
        let image = root.join("boot").join(format!("vmlinuz-{name}"));
        let modules = root.join("lib/modules").join(name).join("kernel");
        (fs::File::open(&image).is_ok() && modules.is_dir()).then_some(Kernel { image, modules })
    })
}

fn find_program(packages: &Path, name: &str) -> Option<PathBuf> {
    let roots = std::iter::once(PathBuf::from("/")).chain(unpacked(packages));
    roots
        .flat_map(|root| {
            ["usr/bin", "usr/sbin", "bin", "sbin"].map(|directory| root.join(directory).join(name))
        })
        .find(|path| path.is_file())
}

/// The root directories of the unpacked packages.
fn unpacked(packages: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let mut roots: Vec<PathBuf> = fs::read_dir(packages)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.is_dir() && path.extension().is_none())
        .collect();
    roots.sort();
    roots.into_iter()
}

fn fetch(packages: &Path, names: &BTreeSet<&'static str>) -> Result<()> {
    let fetched = fetch_known(packages, names);
    if fetched.is_ok() || !nix::unistd::geteuid().is_root() {
        return fetched.with_context(|| {
            format!("cannot download {}; is `apt-get update` due?", words(names))
        });
    }
    output(Command::new("apt-get").arg("update"))?;
    fetch_known(packages, names)
}

fn fetch_known(packages: &Path, names: &BTreeSet<&'static str>) -> Result<()> {
    for name in names {
        let full_name = match *name {
            KERNEL_PACKAGE => newest_kernel_package()?,
            other => other.to_owned(),
        };
        // Unpacked aside and renamed, so that an interrupted run leaves nothing half done.
        let partial = packages.join(format!("{name}.partial"));
        if partial.exists() {
            fs::remove_dir_all(&partial).context("remove what an interrupted run left")?;
        }
        fs::create_dir(&partial).with_context(|| format!("create {}", partial.display()))?;
        let mut download = Command::new("apt-get");
        output(download.args(["download", &full_name]).current_dir(&partial))?;
        let archive = fs::read_dir(&partial)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .with_context(|| format!("apt-get downloaded no archive of {full_name}"))?;
        output(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&partial))?;
        fs::remove_file(&archive).context("remove an unpacked archive")?;
        fs::rename(&partial, packages.join(name)).context("keep an unpacked package")?;
    }
    Ok(())
}

fn newest_kernel_package() -> Result<String> {
    let listing = output(Command::new("apt-cache").args(["depends", KERNEL_PACKAGE]))?;
    let package = listing.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    Ok(package.with_context(|| format!("apt knows no {KERNEL_PACKAGE}"))?.to_owned())
}

fn words(names: &BTreeSet<&'static str>) -> String {
    names.iter().copied().collect::<Vec<_>>().join(" ")
}
