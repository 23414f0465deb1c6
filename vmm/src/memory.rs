//! Mapped memory and KVM memory slots: the one file of this crate that hands addresses to the kernel.
//!
//! Guest RAM is a memfd (see `arch::ram`); here it is only mapped, because KVM wants a user address.
//! Nothing in the VMM reads or writes guest memory through the mapping.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, MmapRegion};

/// Why memory could not be mapped or given to KVM.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused the mapping.
    #[error("cannot map {size:#x} bytes")]
    Map {
        /// Bytes asked for.
        size: u64,
        /// What the mapping call said.
        #[source]
        source: MmapRegionError,
    },
    /// The descriptor of the memory could not be duplicated.
    #[error("cannot duplicate the descriptor of guest memory")]
    Duplicate(#[source] std::io::Error),
    /// KVM refused the slot.
    #[error("KVM refused a memory slot of {size:#x} bytes at guest address {guest:#x}")]
    Slot {
        /// Guest physical address.
        guest: u64,
        /// Bytes.
        size: u64,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The size does not fit this host's address space.
    #[error("{0:#x} bytes are more than this host can address")]
    TooLarge(u64),
}

/// Whether the guest may write to a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Guest writes go to memory.
    ReadWrite,
    /// Guest reads come from memory, writes leave the guest as MMIO (`KVM_MEM_READONLY`).
    ReadOnly,
}

/// A piece of host memory mapped for as long as it lives.
#[derive(Clone, Debug)]
pub struct Mapping(Arc<MmapRegion>);

impl Mapping {
    /// Maps `size` bytes of `fd` from `offset`, shared.
    ///
    /// # Errors
    /// When the descriptor cannot be duplicated or the host refuses the mapping.
    pub fn shared(fd: &OwnedFd, offset: u64, size: u64) -> Result<Self, MemoryError> {
        let file = File::from(fd.try_clone().map_err(MemoryError::Duplicate)?);
        let length = usize::try_from(size).map_err(|_| MemoryError::TooLarge(size))?;
        let region = MmapRegion::from_file(FileOffset::new(file, offset), length)
            .map_err(|source| MemoryError::Map { size, source })?;
        Ok(Mapping(Arc::new(region)))
    }

    /// Maps `size` bytes of zeroed private memory.
    ///
    /// # Errors
    /// When the host refuses the mapping.
    pub fn anonymous(size: u64) -> Result<Self, MemoryError> {
        let length = usize::try_from(size).map_err(|_| MemoryError::TooLarge(size))?;
        // Private without MAP_NORESERVE's surprises; protection is read and write.
        let region = MmapRegionBuilder::new(length)
            .with_mmap_prot(0x3)
            .with_mmap_flags(0x22)
            .build()
            .map_err(|source| MemoryError::Map { size, source })?;
        Ok(Mapping(Arc::new(region)))
    }

    /// The mapped region, for volatile access.
    pub fn region(&self) -> &MmapRegion {
        &self.0
    }

    fn size(&self) -> u64 {
        u64::try_from(self.0.size()).unwrap_or(u64::MAX)
    }
}

/// The memory slots of one VM: hands out numbers, gives them back.
#[derive(Debug)]
pub struct Slots {
    vm: Arc<VmFd>,
    next: AtomicU32,
    free: Mutex<Vec<u32>>,
}

impl Slots {
    /// The slots of `vm`, none of them in use yet.
    pub fn new(vm: Arc<VmFd>) -> Arc<Self> {
        Arc::new(Slots { vm, next: AtomicU32::new(0), free: Mutex::new(Vec::new()) })
    }

    /// Lets the guest see `mapping` at `guest` until the returned slot is dropped.
    ///
    /// # Errors
    /// When KVM refuses: overlap, alignment, or too many slots.
    pub fn add(self: &Arc<Self>, guest: u64, mapping: Mapping, access: Access) -> Result<Slot, MemoryError> {
        let number = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            free.pop().unwrap_or_else(|| self.next.fetch_add(1, Ordering::Relaxed))
        };
        let size = mapping.size();
        self.set(number, guest, &mapping, size, access).map_err(|source| MemoryError::Slot {
            guest,
            size,
            source,
        })?;
        Ok(Slot { slots: Arc::clone(self), number, guest, mapping })
    }

    fn set(
        &self,
        slot: u32,
        guest: u64,
        mapping: &Mapping,
        size: u64,
        access: Access,
    ) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: if access == Access::ReadOnly { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: guest,
            memory_size: size,
            userspace_addr: u64::try_from(mapping.region().as_ptr().addr()).unwrap_or(0),
        };
        // SAFETY: the region is a live mapping of exactly `size` bytes that its `Slot` keeps until the
        // slot has been removed (size 0), and nobody in this process holds a Rust reference into it.
        unsafe { self.vm.set_user_memory_region(region) }
    }
}

/// One memory slot; removed when dropped.
#[derive(Debug)]
#[must_use = "the slot is removed when this is dropped"]
pub struct Slot {
    slots: Arc<Slots>,
    number: u32,
    guest: u64,
    mapping: Mapping,
}

impl Drop for Slot {
    fn drop(&mut self) {
        match self.slots.set(self.number, self.guest, &self.mapping, 0, Access::ReadWrite) {
            Ok(()) => self.slots.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.number),
            Err(error) => log::warn!("cannot remove the memory slot at {:#x}: {error}", self.guest),
        }
    }
}
