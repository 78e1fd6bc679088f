//! How a volume reaches a VM: printed for people to paste, or plugged into a VM that runs.

mod cloud_hypervisor;
mod print;
mod qemu;
mod qmp;

use crate::arguments::{AttachArguments, DetachArguments, Format};
use crate::client::{Client, volume_path};
use crate::output::{print as answer, write};
use crate::tables;
use crate::{backings, caches};
use vflash::control::api::{Attachment, ErrorCode, Failure};

type Result<T> = std::result::Result<T, Failure>;

/// Queues beyond this gain nothing and cost the guest memory and interrupts.
const QUEUES_USEFUL_MAX: u16 = 64;

pub(crate) fn attach(client: &Client, format: Format, arguments: &AttachArguments) -> Result<()> {
    let path = format!("{}/attachment", volume_path(&arguments.volume)?);
    let attachment: Attachment = client.get(&path)?;
    if let Some(queues) = arguments.queues.filter(|queues| *queues > attachment.queues_max) {
        let text = format!(
            "{queues} queues are too many: {} has {}",
            attachment.name, attachment.queues_max
        );
        return Err(Failure::new(ErrorCode::Invalid, text));
    }
    if let Some(hypervisor) = arguments.print {
        return write(&print::instructions(hypervisor, &attachment, arguments.queues));
    }
    refuse_attached(&attachment)?;
    if let Some(socket) = &arguments.target.qmp {
        qemu::attach(socket, &attachment, arguments.queues, arguments.bus.as_deref())?;
    } else if let Some(socket) = &arguments.target.ch_api {
        cloud_hypervisor::attach(socket, &attachment, arguments.queues)?;
    }
    answer(format, &Attachment { attached: true, ..attachment }, tables::attachment)
}

/// A socket serves one VM: a second front end would wait for ever.
fn refuse_attached(attachment: &Attachment) -> Result<()> {
    if !attachment.attached {
        return Ok(());
    }
    let name = &attachment.name;
    let text =
        format!("{name} is attached already; `vflash describe {name}` says to which process");
    Err(Failure::new(ErrorCode::Busy, text))
}

pub(crate) fn detach(client: &Client, format: Format, arguments: &DetachArguments) -> Result<()> {
    let Some(volume) = &arguments.volume else {
        return backings::give_up(format, arguments);
    };
    if let Some(socket) = &arguments.qmp {
        qemu::detach(socket, &device_id(volume)?, arguments.timeout)?;
    } else if let Some(socket) = &arguments.ch_api {
        cloud_hypervisor::detach(socket, &device_id(volume)?)?;
    } else {
        return caches::detach(client, format, volume, arguments);
    }
    write(&format!("{volume} is detached\n"))
}

/// The device's name in the VMM, the same at each attachment. Names have no dots, so it is one
/// volume's alone.
fn device_id(volume: &str) -> Result<String> {
    volume_path(volume)?;
    Ok(format!("vflash-{}", volume.replace('/', ".")))
}

/// As many queues as the VM has CPUs, or as asked for.
fn queues_for(cpus: usize, asked: Option<u16>, attachment: &Attachment) -> u16 {
    let cpus = u16::try_from(cpus).unwrap_or(u16::MAX);
    asked.unwrap_or_else(|| cpus.clamp(1, attachment.queues_max.min(QUEUES_USEFUL_MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn attachment() -> Attachment {
        Attachment {
            name: "web-1/root".into(),
            socket: "/run/vflash/web-1/root.sock".into(),
            serial: "vflash-nv-0123456789".into(),
            size_bytes: 1 << 30,
            read_only: false,
            queues_max: 32,
            queue_size: 256,
            attached: false,
        }
    }

    #[test]
    fn queues_follow_the_cpus_within_what_is_offered() {
        assert_eq!(queues_for(0, None, &attachment()), 1);
        assert_eq!(queues_for(4, None, &attachment()), 4);
        assert_eq!(queues_for(100_000, None, &attachment()), 32);
        assert_eq!(queues_for(4, Some(2), &attachment()), 2);
    }

    #[test]
    fn an_attached_volume_is_refused() {
        let attached = Attachment { attached: true, ..attachment() };
        assert_eq!(refuse_attached(&attached).unwrap_err().code, ErrorCode::Busy);
        assert_eq!(refuse_attached(&attachment()), Ok(()));
    }

    #[test]
    fn a_device_is_named_after_its_volume() {
        assert_eq!(device_id("web-1/root").unwrap(), "vflash-web-1.root");
        assert!(device_id("web-1").is_err());
        assert!(device_id("../x").is_err());
    }
}
