//! What to add to a VM's command line or definition.

use super::{QUEUES_USEFUL_MAX, device_id};
use crate::arguments::Recipe;
use vflash::control::api::Attachment;

pub(super) fn instructions(
    hypervisor: Recipe,
    attachment: &Attachment,
    queues: Option<u16>,
) -> String {
    match hypervisor {
        Recipe::Qemu => qemu(attachment, queues),
        Recipe::CloudHypervisor => cloud_hypervisor(attachment, queues),
        Recipe::Libvirt => libvirt(attachment, queues),
    }
}

/// The device's name; a name that cannot be one is the volume's own, which exists.
fn id(attachment: &Attachment) -> String {
    device_id(&attachment.name).unwrap_or_else(|_| attachment.name.clone())
}

/// QEMU takes a queue for each CPU unless told otherwise, and refuses a device that has fewer.
fn qemu(attachment: &Attachment, queues: Option<u16>) -> String {
    let Attachment { name, socket, queue_size, queues_max, .. } = attachment;
    let id = id(attachment);
    let limited = (*queues_max < QUEUES_USEFUL_MAX).then_some(*queues_max);
    let hint = match (queues, limited) {
        (Some(_), _) => String::new(),
        (None, Some(most)) => format!(" num-queues: at most {most}."),
        (None, None) => format!(
            " A queue per CPU is the default;\n\
             # for more than {queues_max} CPUs, add num-queues={queues_max} to the last line."
        ),
    };
    let queues = queues.or(limited).map_or(String::new(), |count| format!(",num-queues={count}"));
    format!(
        "\
# {name} for QEMU 7.2 and later. SIZE is that of -m. Guest memory must be shared (share=on).
# From QEMU 9.2 on, write reconnect-ms=200 for reconnect=1.{hint}
-object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem \\
-chardev socket,id={id}.chardev,path={socket},reconnect=1 \\
-device vhost-user-blk-pci,id={id},chardev={id}.chardev,queue-size={queue_size}{queues}
"
    )
}

/// The number of queues, or `CPUS` and what to write for it: `unit` says whose number that is.
fn queues_or_cpus(attachment: &Attachment, queues: Option<u16>, unit: &str) -> (String, String) {
    let most = attachment.queues_max;
    match queues.or((most == 1).then_some(1)) {
        Some(queues) => (queues.to_string(), String::new()),
        None => ("CPUS".to_owned(), format!(" CPUS is {unit}, at most {most}.")),
    }
}

fn cloud_hypervisor(attachment: &Attachment, queues: Option<u16>) -> String {
    let Attachment { name, socket, queue_size, .. } = attachment;
    let id = id(attachment);
    let (queues, hint) = queues_or_cpus(attachment, queues, "that of --cpus");
    format!(
        "\
# {name} for cloud-hypervisor. SIZE is that of the VM.{hint} Guest memory must be shared.
--memory size=SIZE,shared=on \\
--disk vhost_user=on,id={id},socket={socket},num_queues={queues},queue_size={queue_size}
"
    )
}

fn libvirt(attachment: &Attachment, queues: Option<u16>) -> String {
    let Attachment { name, socket, queue_size, .. } = attachment;
    let (queues, hint) = queues_or_cpus(attachment, queues, "the number of vcpu");
    format!(
        "\
<!-- {name} for libvirt: the first element belongs into <domain>, once; the second into <devices>.
     vdb is any free name.{hint} -->
<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>

<disk type='vhostuser' device='disk'>
  <driver name='qemu' type='raw' queues='{queues}' queue_size='{queue_size}'/>
  <source type='unix' path='{socket}'>
    <reconnect enabled='yes' timeout='1'/>
  </source>
  <target dev='vdb' bus='virtio'/>
</disk>
"
    )
}

#[cfg(test)]
mod tests {
    use super::super::tests::attachment;
    use super::*;

    #[test]
    fn each_hypervisor_gets_socket_queues_and_shared_memory() {
        for (hypervisor, queues, shared) in [
            (Recipe::Qemu, "num-queues=3", "share=on"),
            (Recipe::CloudHypervisor, "num_queues=3", "shared=on"),
            (Recipe::Libvirt, "queues='3'", "mode='shared'"),
        ] {
            let text = instructions(hypervisor, &attachment(), Some(3));
            for part in ["/run/vflash/web-1/root.sock", queues, shared, "256"] {
                assert!(text.contains(part), "{hypervisor:?}: {part} is missing in {text}");
            }
        }
    }

    /// QEMU refuses a disk with fewer queues than it has CPUs, unless it is told to use fewer.
    #[test]
    fn a_volume_of_few_queues_is_never_asked_for_more() {
        let narrow = |queues_max| Attachment { queues_max, ..attachment() };
        for (hypervisor, one, some, all) in [
            (
                Recipe::Qemu,
                ",num-queues=1\n",
                ",num-queues=8\n",
                "more than 64 CPUs, add num-queues=64",
            ),
            (
                Recipe::CloudHypervisor,
                ",num_queues=1,",
                "--cpus, at most 8.",
                "--cpus, at most 64.",
            ),
            (Recipe::Libvirt, "queues='1'", "vcpu, at most 8.", "vcpu, at most 64."),
        ] {
            for (queues_max, part) in [(1, one), (8, some), (64, all)] {
                let text = instructions(hypervisor, &narrow(queues_max), None);
                assert!(text.contains(part), "{hypervisor:?}: {part} is missing in {text}");
            }
        }
    }
}
