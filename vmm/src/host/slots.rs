//! The memory slots of one VM: which host memory the guest sees at which address. Dropping a [`Slot`] removes
//! it from KVM.

#![allow(unsafe_code)]

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use devices::ports::{Access, PortError};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use crate::host::mapping::{Mapping, PeerMapping};

/// The memory behind a slot.
#[derive(Debug)]
pub enum Backing {
    /// Memory of this process.
    Own(Mapping),
    /// A piece of a peer's file.
    Peer(Arc<PeerMapping>),
}

impl From<Mapping> for Backing {
    fn from(mapping: Mapping) -> Self {
        Backing::Own(mapping)
    }
}

impl From<Arc<PeerMapping>> for Backing {
    fn from(mapping: Arc<PeerMapping>) -> Self {
        Backing::Peer(mapping)
    }
}

impl Backing {
    /// The address in this process, and the length in bytes.
    fn place(&self) -> (usize, usize) {
        match self {
            Backing::Own(mapping) => (mapping.region().as_ptr().addr(), mapping.region().size()),
            Backing::Peer(mapping) => mapping.place(),
        }
    }
}

/// The numbers of slots. A number below `next` is in use, unless it is in `free`.
#[derive(Debug, Default)]
struct Numbers {
    next: u32,
    free: Vec<u32>,
}

/// The memory slots of one VM.
#[derive(Debug)]
pub struct Slots {
    vm: Arc<VmFd>,
    limit: u32,
    numbers: Mutex<Numbers>,
}

impl Slots {
    /// The slots of `vm`, all unused. KVM allows `limit` slots.
    pub fn new(vm: Arc<VmFd>, limit: u32) -> Arc<Self> {
        Arc::new(Slots { vm, limit, numbers: Mutex::default() })
    }

    /// Shows the guest `backing` at the guest address `guest` until the returned slot is dropped.
    ///
    /// # Errors
    /// When no slot is left, or KVM refuses the address: it overlaps another slot, or is not aligned.
    pub fn add(
        self: &Arc<Self>,
        guest: u64,
        backing: impl Into<Backing>,
        access: Access,
    ) -> Result<Slot, PortError> {
        let backing = backing.into();
        let number = self.take_number()?;
        let size = backing.place().1;
        let mut slot = Slot { slots: Arc::clone(self), number, guest, backing, is_set: false };
        slot.set(size, access).map_err(|error| {
            PortError::new(format!("put {size:#x} bytes at guest address {guest:#x}"), error.into())
        })?;
        slot.is_set = true;
        Ok(slot)
    }

    fn take_number(&self) -> Result<u32, PortError> {
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = numbers.free.pop() {
            return Ok(number);
        }
        if numbers.next >= self.limit {
            let all = io::Error::other(format!("all {} memory slots are in use", self.limit));
            return Err(PortError::new("show the guest more memory", all));
        }
        numbers.next += 1;
        Ok(numbers.next - 1)
    }
}

/// One memory slot. Dropping it removes the slot from KVM.
#[derive(Debug)]
#[must_use = "the slot is removed when this is dropped"]
pub struct Slot {
    slots: Arc<Slots>,
    number: u32,
    guest: u64,
    backing: Backing,
    /// Whether KVM has the slot.
    is_set: bool,
}

impl Slot {
    /// Gives KVM the slot with this size; size 0 removes the slot.
    fn set(&self, size: usize, access: Access) -> Result<(), kvm_ioctls::Error> {
        let number = |value: usize| u64::try_from(value).unwrap_or(u64::MAX);
        let region = kvm_userspace_memory_region {
            slot: self.number,
            flags: if access == Access::ReadOnly { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: self.guest,
            memory_size: number(size),
            userspace_addr: number(self.backing.place().0),
        };
        // SAFETY: the region is a live mapping of exactly `size` bytes, or `size` is 0. This slot keeps the
        // mapping until KVM has removed the slot, and nothing in this process holds a Rust reference into it.
        unsafe { self.slots.vm.set_user_memory_region(region) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.is_set
            && let Err(error) = self.set(0, Access::ReadWrite)
        {
            return log::warn!("cannot remove the memory slot at {:#x}: {error}", self.guest);
        }
        self.slots.numbers.lock().unwrap_or_else(PoisonError::into_inner).free.push(self.number);
    }
}
