//! A stock Debian guest for tests: builds its initramfs, boots it in QEMU and drives it.
//!
//! In reading order:
//! - [`parts`] where the guest's kernel and tools come from, without installing them on the host.
//! - [`initramfs`] the archive the guest boots from; [`cpio`] its format.
//! - [`guest`] one QEMU with its agent; [`qmp`] its monitor; [`process`] children that die with us,
//!   [`scratch`] directories that do.
//! - [`daemon`] `vflashd` and `vflash` as a guest's host runs them; [`storage_daemon`] QEMU's own
//!   back-end, against which the harness itself is tested.
//! - [`ordered`] writes whose order can be told from a disk alone.
//! - [`stamp`] and [`reply`] what host and agent (`src/main.rs`, runs inside the guest) share.

pub mod cpio;
pub mod daemon;
pub mod guest;
pub mod initramfs;
mod lines;
pub mod ordered;
pub mod parts;
pub mod process;
pub mod qmp;
pub mod reply;
pub mod scratch;
pub mod stamp;
pub mod storage_daemon;
