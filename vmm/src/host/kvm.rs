//! `/dev/kvm`: opens it, reads its limits, and reads the data of a vCPU's port exits, which `kvm-ioctls` does
//! not give in full.

#![allow(unsafe_code)]

use std::io;
use std::slice::ChunksExactMut;

use kvm_bindings::KVM_EXIT_IO;
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use crate::error::Error;

/// The path of KVM's device.
const DEV_KVM: &str = "/dev/kvm";

/// The capabilities that every machine needs, with their names for messages.
const NEEDED: [(Cap, &str); 7] = [
    (Cap::Irqchip, "an in-kernel interrupt controller"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::Irqfd, "irqfd"),
    (Cap::UserMemory, "memory slots"),
    (Cap::ReadonlyMem, "read-only memory slots"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::MpState, "vCPU run states"),
];

/// Opens `/dev/kvm` and checks that it has what every machine needs.
///
/// # Errors
/// When the device is absent, may not be opened, speaks another version, or lacks a capability. The hint says
/// what to do.
pub fn open() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|error| {
        let source = io::Error::from(error);
        let hint = match source.kind() {
            io::ErrorKind::NotFound => {
                "is virtualisation enabled in the firmware, and is the module kvm_amd or kvm_intel loaded?"
            }
            io::ErrorKind::PermissionDenied => {
                "join the group that owns it, for example: sudo usermod -aG kvm $USER"
            }
            _ => "run `outboard check` to see what this host can do",
        };
        Error::host(format!("cannot open {DEV_KVM}")).because(source).hint(hint)
    })?;
    let version = kvm.get_api_version();
    if version != 12 {
        return Err(Error::host(format!("{DEV_KVM} speaks version {version} of the KVM interface, not 12"))
            .hint("is it really KVM's device?"));
    }
    for (capability, name) in NEEDED {
        if !kvm.check_extension(capability) {
            return Err(Error::host(format!("the KVM of this host has no {name}"))
                .hint("run `outboard check` to see what this host can do"));
        }
    }
    Ok(kvm)
}

/// How many memory slots a VM of this host may have.
pub fn slot_limit(kvm: &Kvm) -> u32 {
    // Old versions of KVM do not report the number. All of them have at least 32.
    u32::try_from(kvm.check_extension_int(Cap::NrMemslots)).ok().filter(|limit| *limit > 0).unwrap_or(32)
}

/// How many message interrupts a VM of this host can route at once.
pub fn message_routes(kvm: &Kvm) -> usize {
    let routes = usize::try_from(kvm.check_extension_int(Cap::IrqRouting)).unwrap_or(0);
    // The other routes are pins: 24 of the IOAPIC, and 16 of the 8259s where the guest is told of these.
    routes.saturating_sub(24 + 16)
}

/// The data of the port accesses at which a vCPU has stopped, one chunk for each access, in order. A string
/// instruction (`rep insw`) makes many accesses to the same port, and KVM reports them in one exit. Empty
/// when the vCPU stopped for another reason.
pub(crate) fn port_accesses(vcpu: &mut VcpuFd) -> ChunksExactMut<'_, u8> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_IO {
        return <&mut [u8]>::default().chunks_exact_mut(1);
    }
    // SAFETY: the exit reason says that this member of the union is valid. It holds numbers only, which may
    // have any value.
    let io = unsafe { run.__bindgen_anon_1.io };
    let width = usize::from(io.size).max(1);
    let count = usize::try_from(io.count).unwrap_or(0);
    let start = std::ptr::from_mut(run).cast::<u8>();
    let offset = usize::try_from(io.data_offset).unwrap_or(0);
    // SAFETY: while the vCPU does not run, KVM keeps that many bytes there: in the vCPU's mapping, behind the
    // structure itself. `kvm-ioctls` makes its own slice in the same way, and leaves out only the width.
    let data = unsafe { std::slice::from_raw_parts_mut(start.wrapping_add(offset), width * count) };
    data.chunks_exact_mut(width)
}
