//! What to add to a VM's command line or definition.

use super::device_id;
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

fn qemu(attachment: &Attachment, queues: Option<u16>) -> String {
    let Attachment { name, socket, queue_size, .. } = attachment;
    let id = id(attachment);
    let queues = queues.map_or(String::new(), |queues| format!(",num-queues={queues}"));
    format!(
        "\
# {name} for QEMU 7.2 and later. SIZE is that of -m. Guest memory must be shared (share=on).
# From QEMU 9.2 on, write reconnect-ms=200 for reconnect=1. One queue per CPU is the default.
-object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem \\
-chardev socket,id={id}.chardev,path={socket},reconnect=1 \\
-device vhost-user-blk-pci,id={id},chardev={id}.chardev,queue-size={queue_size}{queues}
"
    )
}

fn cloud_hypervisor(attachment: &Attachment, queues: Option<u16>) -> String {
    let Attachment { name, socket, queue_size, .. } = attachment;
    let id = id(attachment);
    let queues = queues.map_or("CPUS".to_owned(), |queues| queues.to_string());
    let hint = if queues == "CPUS" { " CPUS is that of --cpus." } else { "" };
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
    let queues = queues.map_or("CPUS".to_owned(), |queues| queues.to_string());
    let hint = if queues == "CPUS" { " CPUS is the number of vcpu." } else { "" };
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
            let text = instructions(hypervisor, &attachment(), None);
            assert!(!text.contains('3'), "{text}");
        }
    }
}
