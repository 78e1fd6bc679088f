//! The archive the guest boots from: the agent as `/init`, stock Debian programs with their
//! libraries, the kernel modules of a virtio disk, and the udev rule we ship.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::parts::{Parts, workspace_root};

/// Modules in the order they must be loaded; one that a kernel has built in has no file.
const MODULES: &[&str] = &[
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
];

const DIRECTORIES: &[&str] = &[
    "/bin",
    "/lib",
    "/lib64",
    "/proc",
    "/sys",
    "/dev",
    "/run",
    "/tmp",
    "/mnt",
    "/etc",
    "/etc/udev",
    "/etc/udev/rules.d",
    "/modules",
];

const LINKS: &[(&str, &str)] = &[("/bin/systemd-udevd", "udevadm"), ("/bin/insmod", "kmod")];

const RULE: &str = "60-vflash.rules";

/// Builds the archive around `agent`, the `vflash-guest` program.
pub fn build(parts: &Parts, agent: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    DIRECTORIES.iter().for_each(|path| archive.directory(path));
    let mut libraries = parts.libraries(agent)?;
    add(&mut archive, "/init", agent)?;
    for (name, program) in &parts.programs {
        add(&mut archive, &format!("/bin/{name}"), program)?;
        libraries.extend(parts.libraries(program)?);
    }
    LINKS.iter().for_each(|(path, target)| archive.link(path, target));
    add_libraries(&mut archive, &libraries)?;
    for (position, file) in modules(&parts.kernel.modules).iter().enumerate() {
        let name = file.file_name().context("a module has a name")?.to_string_lossy();
        add(&mut archive, &format!("/modules/{position}-{name}"), file)?;
    }
    let rule = workspace_root().join("tools/guest").join(RULE);
    add(&mut archive, &format!("/etc/udev/rules.d/{RULE}"), &rule)?;
    Ok(archive.finish())
}

fn modules(directory: &Path) -> Vec<PathBuf> {
    let named = |name: &&str| {
        ["ko", "ko.xz", "ko.zst"]
            .map(|suffix| directory.join(format!("{name}.{suffix}")))
            .into_iter()
            .find(|path| path.is_file())
    };
    MODULES.iter().filter_map(named).collect()
}

fn add_libraries(archive: &mut Archive, libraries: &BTreeSet<PathBuf>) -> Result<()> {
    let mut names = BTreeSet::new();
    for library in libraries {
        let name = library.file_name().context("a library has a name")?.to_string_lossy();
        // The loader's path is fixed in every program; the rest is looked for in /lib.
        let directory = if name.starts_with("ld-linux") { "/lib64" } else { "/lib" };
        if names.insert(name.to_string()) {
            add(archive, &format!("{directory}/{name}"), library)?;
        }
    }
    Ok(())
}

fn add(archive: &mut Archive, path: &str, source: &Path) -> Result<()> {
    let content = fs::read(source).with_context(|| format!("read {}", source.display()))?;
    archive.file(path, &content);
    Ok(())
}
