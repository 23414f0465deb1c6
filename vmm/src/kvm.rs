//! The host: `/dev/kvm`, and `devices::ports` implemented on one of its VMs.
//!
//! A doorbell is an ioeventfd, an interrupt route an irqfd, device memory a memory slot. Each returns a
//! guard; dropping it undoes the registration, so a device that leaves its running phase leaves nothing
//! behind in KVM.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use devices::ports::{
    DeviceMemory, Doorbells, Guard, Interrupts, PortError, Ports, RegisterPage, Route, WriteMatch,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use transport::memory_map::GuestAddr;
use vm_memory::{Bytes, VolatileMemory, VolatileSlice};

use crate::descriptors::eventfd;
use crate::error::Error;
use crate::memory::{Access, Mapping, Slots};

/// Where KVM is.
const DEV_KVM: &str = "/dev/kvm";

/// What no machine of ours can do without.
const NEEDED: [(Cap, &str); 7] = [
    (Cap::Irqchip, "an in-kernel interrupt controller"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::Irqfd, "irqfd"),
    (Cap::UserMemory, "memory slots"),
    (Cap::ReadonlyMem, "read-only memory slots"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::MpState, "vCPU run states"),
];

/// Opens `/dev/kvm` and sees that it has what every machine needs.
///
/// # Errors
/// When there is none, it may not be opened, speaks another version, or lacks a capability; the hint
/// says what to do.
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

/// The ports of one VM.
#[derive(Debug)]
pub struct KvmPorts {
    vm: Arc<VmFd>,
    slots: Arc<Slots>,
}

impl KvmPorts {
    /// The three ports, on `vm` and its `slots`.
    pub fn ports(vm: Arc<VmFd>, slots: Arc<Slots>) -> Ports {
        let kvm = Arc::new(KvmPorts { vm, slots });
        Ports { doorbells: kvm.clone(), interrupts: kvm.clone(), memory: kvm }
    }
}

impl Doorbells for KvmPorts {
    fn bind(&self, fd: BorrowedFd<'_>, when: WriteMatch) -> Result<Guard, PortError> {
        let fd = eventfd(fd).map_err(|error| PortError::new("duplicate an eventfd", error))?;
        let address = IoEventAddress::Mmio(when.address.0);
        let done = match when.value {
            Some(value) => self.vm.register_ioevent(&fd, &address, value),
            None => self.vm.register_ioevent(&fd, &address, NoDatamatch),
        };
        done.map_err(|error| {
            PortError::new(format!("bind a doorbell at {:#x}", when.address.0), error.into())
        })?;
        let vm = Arc::clone(&self.vm);
        Ok(Guard::on_drop(move || {
            let address = IoEventAddress::Mmio(when.address.0);
            let done = match when.value {
                Some(value) => vm.unregister_ioevent(&fd, &address, value),
                None => vm.unregister_ioevent(&fd, &address, NoDatamatch),
            };
            if let Err(error) = done {
                log::warn!("cannot remove the ioeventfd at {:#x}: {error}", when.address.0);
            }
        }))
    }
}

impl Interrupts for KvmPorts {
    fn attach(&self, call: BorrowedFd<'_>, route: Route) -> Result<Guard, PortError> {
        let Route::Pin(gsi) = route else {
            return Err(PortError::new("route this kind of interrupt", io::ErrorKind::Unsupported.into()));
        };
        let fd = eventfd(call).map_err(|error| PortError::new("duplicate an eventfd", error))?;
        self.vm
            .register_irqfd(&fd, gsi)
            .map_err(|error| PortError::new(format!("route an interrupt to GSI {gsi}"), error.into()))?;
        let vm = Arc::clone(&self.vm);
        Ok(Guard::on_drop(move || {
            if let Err(error) = vm.unregister_irqfd(&fd, gsi) {
                log::warn!("cannot remove the irqfd of GSI {gsi}: {error}");
            }
        }))
    }
}

impl DeviceMemory for KvmPorts {
    fn register_page(&self, at: GuestAddr) -> Result<Arc<dyn RegisterPage>, PortError> {
        let mapping = Mapping::anonymous(PAGE)
            .map_err(|error| PortError::new("make a register page", io::Error::other(error)))?;
        let slot = self
            .slots
            .add(at.0, mapping.clone(), Access::ReadOnly)
            .map_err(|error| PortError::new("show the guest a register page", io::Error::other(error)))?;
        Ok(Arc::new(Page { mapping, _slot: slot }))
    }
}

const PAGE: u64 = 4096;

/// One page that the guest reads without an exit.
struct Page {
    mapping: Mapping,
    _slot: crate::memory::Slot,
}

impl Page {
    fn slice(&self) -> VolatileSlice<'_> {
        self.mapping.region().as_volatile_slice()
    }
}

impl RegisterPage for Page {
    fn store(&self, offset: u16, value: u32) {
        // A whole register changes at once: the guest may be reading it on another vCPU.
        if let Err(error) = self.slice().store(value.to_le(), usize::from(offset), Ordering::Release) {
            log::error!("register page: no register at offset {offset:#x}: {error}");
        }
    }

    fn store_bytes(&self, offset: u16, bytes: &[u8]) {
        if let Err(error) = self.slice().write_slice(bytes, usize::from(offset)) {
            log::error!("register page: no {} bytes at offset {offset:#x}: {error}", bytes.len());
        }
    }
}
