//! `devices::ports` on a VM of KVM: a doorbell is an ioeventfd, an interrupt route is an irqfd, and device
//! memory is a memory slot.
//!
//! Each registration returns a guard, and dropping the guard undoes the registration. A device that drops its
//! guards leaves nothing registered with KVM.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use arch::irq::{Gsi, MsiMessage, RoutingTable, Table};
use devices::ports::{
    Access, DeviceMemory, Doorbells, FileRange, Guard, Interrupts, OnVanished, PortError, Ports,
    RegisterPage, Route, WriteMatch,
};
use kvm_ioctls::VmFd;
use transport::memory::GuestAddr;
use vm_memory::{Bytes, VolatileMemory, VolatileSlice};

use crate::host::descriptors::{Ioeventfd, eventfd, ioeventfd};
use crate::host::mapping::Mapping;
use crate::host::mapping::PAGE;
use crate::host::peer_memory::PeerMemory;
use crate::host::slots::{Slot, Slots};

/// The ports of one VM.
#[derive(Debug)]
pub struct KvmPorts {
    vm: Arc<VmFd>,
    slots: Arc<Slots>,
    /// The routes that KVM was given last. The lock is held while KVM is given new routes, so that KVM always
    /// has the newest.
    routes: Arc<Mutex<RoutingTable>>,
    peer_memory: Arc<PeerMemory>,
}

impl KvmPorts {
    /// The ports of `vm`, with its `slots` and the `routes` that KVM has; also the peers' memory, for vCPUs
    /// that fault on it.
    ///
    /// # Errors
    /// When no timer can be had.
    pub fn ports(
        vm: Arc<VmFd>,
        slots: Arc<Slots>,
        routes: RoutingTable,
    ) -> Result<(Ports, Arc<PeerMemory>), PortError> {
        let peer_memory = PeerMemory::new(Arc::clone(&slots))?;
        let routes = Arc::new(Mutex::new(routes));
        let kvm = Arc::new(KvmPorts { vm, slots, routes, peer_memory: Arc::clone(&peer_memory) });
        Ok((Ports { doorbells: kvm.clone(), interrupts: kvm.clone(), memory: kvm }, peer_memory))
    }

    /// A GSI that is routed to this message. Dropping the guard frees the GSI.
    fn message_gsi(&self, message: MsiMessage) -> Result<(Gsi, Guard), PortError> {
        let cannot = |error| PortError::new("route a message interrupt", io::Error::other(error));
        let mut table = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let (gsi, change) = table.allocate(message).map_err(cannot)?;
        if change == Table::Changed
            && let Err(error) = table.apply(&self.vm)
        {
            // KVM applied nothing. The message is removed from the table, or the next change would fail as
            // well.
            table.forget(gsi);
            return Err(cannot(error));
        }
        let routes = Arc::clone(&self.routes);
        let free = move || {
            routes.lock().unwrap_or_else(PoisonError::into_inner).free(gsi);
        };
        Ok((gsi, Guard::on_drop(free)))
    }

    fn detach(&self, fd: vmm_sys_util::eventfd::EventFd, gsi: u32) -> Guard {
        let vm = Arc::clone(&self.vm);
        Guard::on_drop(move || {
            if let Err(error) = vm.unregister_irqfd(&fd, gsi) {
                log::warn!("cannot remove the irqfd of GSI {gsi}: {error}");
            }
        })
    }
}

impl Doorbells for KvmPorts {
    fn bind(&self, fd: BorrowedFd<'_>, when: WriteMatch) -> Result<Guard, PortError> {
        let fd = duplicate(fd)?;
        ioeventfd(&self.vm, &fd, when, Ioeventfd::Assign)
            .map_err(|error| PortError::new(format!("bind a doorbell at {}", when.address), error))?;
        let vm = Arc::clone(&self.vm);
        Ok(Guard::on_drop(move || {
            if let Err(error) = ioeventfd(&vm, &fd, when, Ioeventfd::Deassign) {
                log::warn!("cannot remove the ioeventfd at {}: {error}", when.address);
            }
        }))
    }
}

impl Interrupts for KvmPorts {
    fn attach(&self, call: BorrowedFd<'_>, route: Route) -> Result<Guard, PortError> {
        let (gsi, held) = match route {
            Route::Pin(gsi) => (gsi, None),
            Route::Message { address, data } => {
                let (gsi, held) = self.message_gsi(MsiMessage { address, data })?;
                (gsi.0, Some(held))
            }
        };
        let fd = duplicate(call)?;
        self.vm.register_irqfd(&fd, gsi).map_err(|error| cannot_route(gsi, error))?;
        // The fields are dropped in this order: the irqfd must be detached before the GSI is freed for
        // another message.
        Ok(Guard::new((self.detach(fd, gsi), held)))
    }

    fn attach_level(
        &self,
        call: BorrowedFd<'_>,
        gsi: u32,
        resample: BorrowedFd<'_>,
    ) -> Result<Guard, PortError> {
        let (fd, resample) = (duplicate(call)?, duplicate(resample)?);
        self.vm
            .register_irqfd_with_resample(&fd, &resample, gsi)
            .map_err(|error| cannot_route(gsi, error))?;
        Ok(self.detach(fd, gsi))
    }
}

fn duplicate(fd: BorrowedFd<'_>) -> Result<vmm_sys_util::eventfd::EventFd, PortError> {
    eventfd(fd).map_err(|error| PortError::new("duplicate an eventfd", error))
}

fn cannot_route(gsi: u32, error: kvm_ioctls::Error) -> PortError {
    PortError::new(format!("route an interrupt to GSI {gsi}"), error.into())
}

impl DeviceMemory for KvmPorts {
    fn register_page(&self, at: GuestAddr) -> Result<Arc<dyn RegisterPage>, PortError> {
        let mapping = Mapping::anonymous(PAGE)?;
        let slot = self.slots.add(at.0, mapping.clone(), Access::ReadOnly)?;
        Ok(Arc::new(Page { mapping, _slot: slot }))
    }

    fn map(
        &self,
        piece: &FileRange,
        at: GuestAddr,
        access: Access,
        vanished: OnVanished,
    ) -> Result<Guard, PortError> {
        self.peer_memory.show(piece, at, access, vanished)
    }
}

/// One page that the guest reads without an exit.
struct Page {
    mapping: Mapping,
    _slot: Slot,
}

impl Page {
    fn slice(&self) -> VolatileSlice<'_> {
        self.mapping.region().as_volatile_slice()
    }
}

impl RegisterPage for Page {
    fn store(&self, offset: u16, value: u32) {
        // The whole register is stored at once, because another vCPU may be reading it.
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
