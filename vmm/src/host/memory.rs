//! Mapped memory and KVM memory slots: the one file of this crate that hands addresses to the kernel.
//!
//! Guest RAM is a memfd (see `arch::ram`); here it is only mapped, because KVM wants a user address.
//! Guest memory is read and written through [`MemoryAccess`], which never touches the mapping itself. A peer's file is mapped as a
//! [`PeerMapping`], which has no way to touch it: the peer may truncate it at any moment. And what a vCPU shares with
//! KVM is looked at here where the wrapper does not tell it: [`port_accesses`].

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::ptr::null_mut;
use std::slice::ChunksExactMut;
use std::sync::{Arc, Mutex, PoisonError};

pub use devices::ports::Access;
use devices::ports::FileRange;
use kvm_bindings::{KVM_EXIT_IO, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use transport::memory::MemoryAccess;
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
    /// The host refused to map a peer's file.
    #[error("cannot map {size:#x} bytes of a peer's file")]
    MapFile {
        /// Bytes asked for.
        size: u64,
        /// What the mapping call said.
        #[source]
        source: std::io::Error,
    },
    /// Every slot is taken.
    #[error("all {0} memory slots are in use")]
    NoSlot(u32),
    /// The size does not fit this host's address space.
    #[error("{0:#x} bytes are more than this host can address")]
    TooLarge(u64),
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

impl Mapping {
    /// The address of `length` bytes at `offset`, when they are inside.
    fn place(&self, offset: u64, length: usize) -> io::Result<*mut u8> {
        let offset = usize::try_from(offset).ok();
        let end = offset.and_then(|offset| offset.checked_add(length));
        match (offset, end) {
            (Some(offset), Some(end)) if end <= self.0.size() => Ok(self.0.as_ptr().wrapping_add(offset)),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

/// The kernel makes the copies: it answers EFAULT where a page is gone (a peer that has the memory's file may punch a hole
/// into huge pages), while touching the page here would end the process by SIGBUS.
impl MemoryAccess for Mapping {
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let (from, length) = (self.place(offset, data.len())?, data.len());
        copied(from, data.as_mut_ptr(), length, libc::process_vm_readv)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let (to, length) = (self.place(offset, data.len())?, data.len());
        copied(to, data.as_ptr().cast_mut(), length, libc::process_vm_writev)
    }

    fn store_index(&self, offset: u64, index: u16) -> io::Result<()> {
        let mut old = [0; 2];
        self.read(offset, &mut old)?;
        let step = index.wrapping_sub(u16::from_le_bytes(old));
        if offset % 4 != 2 {
            return self.write(offset, &index.to_le_bytes());
        }
        // The used index is the upper half of a word whose lower half, the flags, is ours as well. The lowest bits first:
        // each sum on the way is an index between the old and the new one.
        let word = self.place(offset.saturating_sub(2), 4)?;
        (0..16).filter(|bit| step & (1 << bit) != 0).try_for_each(|bit| add_to_word(word, 16 + bit))
    }
}

type Copy = unsafe extern "C" fn(
    libc::pid_t,
    *const libc::iovec,
    libc::c_ulong,
    *const libc::iovec,
    libc::c_ulong,
    libc::c_ulong,
) -> isize;

/// Has `copy` move `length` bytes between guest memory and our own.
fn copied(guest: *mut u8, ours: *mut u8, length: usize, copy: Copy) -> io::Result<()> {
    let ours = libc::iovec { iov_base: ours.cast(), iov_len: length };
    let guest = libc::iovec { iov_base: guest.cast(), iov_len: length };
    let process = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: `ours` is a slice of `length` bytes that is written only by `process_vm_readv`, whose caller lent it mutably;
    // `guest` is inside a mapping that nothing in this process has a reference to.
    let count = unsafe { copy(process, &raw const ours, 1, &raw const guest, 1, 0) };
    match usize::try_from(count) {
        Ok(count) if count == length => Ok(()),
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Adds `1 << bit` to a word of guest memory, atomically, or fails with EFAULT where its page is gone. Of the calls of the
/// kernel that change memory, FUTEX_WAKE_OP does both; it has nobody to wake here.
fn add_to_word(word: *mut u8, bit: i32) -> io::Result<()> {
    const ADD_SHIFTED: i32 = libc::FUTEX_OP_ADD | libc::FUTEX_OP_OPARG_SHIFT;
    const OPERATION: i32 = libc::FUTEX_WAKE_OP | libc::FUTEX_PRIVATE_FLAG;
    static NOBODY: u32 = 0;
    let change = libc::FUTEX_OP(ADD_SHIFTED, bit, libc::FUTEX_OP_CMP_EQ, 0);
    // SAFETY: the kernel reads neither word but `word`, which is aligned and inside a mapping that nothing in this process
    // has a reference to.
    let done =
        unsafe { libc::syscall(libc::SYS_futex, &raw const NOBODY, OPERATION, 0, 0_usize, word, change) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A piece of a peer's file, mapped for KVM alone for as long as this lives.
#[derive(Debug)]
pub struct PeerMapping {
    address: usize,
    length: usize,
    _file: Arc<OwnedFd>,
}

impl PeerMapping {
    /// Maps `piece`, shared.
    ///
    /// # Errors
    /// When the host refuses, for instance as the file may not be written.
    pub fn new(piece: &FileRange, access: Access) -> Result<Self, MemoryError> {
        let FileRange { fd, offset, size } = piece;
        let length = usize::try_from(*size).map_err(|_| MemoryError::TooLarge(*size))?;
        let protection = match access {
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
            Access::ReadOnly => ProtFlags::READ,
        };
        // SAFETY: the kernel chooses the address, so that nothing that is mapped already can be replaced.
        let mapped = unsafe { mmap(null_mut(), length, protection, MapFlags::SHARED, &**fd, *offset) };
        let address = mapped.map_err(|error| MemoryError::MapFile { size: *size, source: error.into() })?;
        Ok(PeerMapping { address: address.expose_provenance(), length, _file: Arc::clone(fd) })
    }
}

impl Drop for PeerMapping {
    fn drop(&mut self) {
        // SAFETY: this is what `new` mapped; nobody has a pointer to it, and its slot is gone.
        let done = unsafe { munmap(std::ptr::with_exposed_provenance_mut(self.address), self.length) };
        if let Err(error) = done {
            log::warn!("cannot unmap a peer's file: {error}");
        }
    }
}

/// What a slot shows.
#[derive(Debug)]
pub enum Backing {
    /// Memory of our own.
    Own(Mapping),
    /// A peer's.
    Peer(PeerMapping),
}

impl From<Mapping> for Backing {
    fn from(mapping: Mapping) -> Self {
        Backing::Own(mapping)
    }
}

impl From<PeerMapping> for Backing {
    fn from(mapping: PeerMapping) -> Self {
        Backing::Peer(mapping)
    }
}

impl Backing {
    fn size(&self) -> u64 {
        match self {
            Backing::Own(mapping) => mapping.size(),
            Backing::Peer(mapping) => u64::try_from(mapping.length).unwrap_or(u64::MAX),
        }
    }

    fn address(&self) -> u64 {
        let address = match self {
            Backing::Own(mapping) => mapping.region().as_ptr().addr(),
            Backing::Peer(mapping) => mapping.address,
        };
        u64::try_from(address).unwrap_or(0)
    }
}

#[derive(Debug)]
struct Numbers {
    next: u32,
    free: Vec<u32>,
}

/// Lets go of the pages of this program's own text and constants: most of them were for the start alone (command
/// line, images, first words with peers), and what runs from here on comes back by itself, from the page cache. For
/// a process that does nothing else; a library's user is left alone.
pub(crate) fn release_text() {
    // SAFETY: names that the linker gives to the first byte of the program and to the end of its text; nothing is
    // read through them.
    unsafe extern "C" {
        static __executable_start: u8;
        static etext: u8;
    }
    let start = (&raw const __executable_start).addr();
    let end = (&raw const etext).addr();
    let pages = end.saturating_sub(start) / PAGE_BYTES;
    let begin = (&raw const __executable_start).cast_mut().cast();
    // SAFETY: from the program's first page to its text's last whole one there are only file mappings that nobody
    // writes to: each page is read from the file again when it is touched.
    if let Err(error) = unsafe { madvise(begin, pages.saturating_mul(PAGE_BYTES), Advice::LinuxDontNeed) } {
        log::debug!("the pages of the start stay resident: {error}");
    }
}

/// The data of the port accesses at which a vCPU has stopped, one after the other: a string instruction (`rep insw`) makes
/// many of the same port, and KVM tells of them in one exit. Empty when it has stopped for another reason.
pub(crate) fn port_accesses(vcpu: &mut VcpuFd) -> ChunksExactMut<'_, u8> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_IO {
        return <&mut [u8]>::default().chunks_exact_mut(1);
    }
    // SAFETY: KVM says that it is this member, and it is of numbers, which may have any value.
    let io = unsafe { run.__bindgen_anon_1.io };
    let width = usize::from(io.size).max(1);
    let count = usize::try_from(io.count).unwrap_or(0);
    let start = std::ptr::from_mut(run).cast::<u8>();
    let offset = usize::try_from(io.data_offset).unwrap_or(0);
    // SAFETY: for as long as the vCPU does not run, KVM has that many bytes there, in what the vCPU has mapped, behind the
    // structure itself. The wrapper makes its own slice in the same way, of which the width is all that is missing.
    let data = unsafe { std::slice::from_raw_parts_mut(start.wrapping_add(offset), width * count) };
    data.chunks_exact_mut(width)
}

const PAGE_BYTES: usize = 4096;

/// The memory slots of one VM: hands out numbers, gives them back.
#[derive(Debug)]
pub struct Slots {
    vm: Arc<VmFd>,
    limit: u32,
    numbers: Mutex<Numbers>,
}

impl Slots {
    /// The slots of `vm`, none of them in use yet; KVM has `limit` of them.
    pub fn new(vm: Arc<VmFd>, limit: u32) -> Arc<Self> {
        Arc::new(Slots { vm, limit, numbers: Mutex::new(Numbers { next: 0, free: Vec::new() }) })
    }

    /// Lets the guest see `backing` at `guest` until the returned slot is dropped.
    ///
    /// # Errors
    /// When no slot is left, or KVM refuses: overlap or alignment.
    pub fn add(
        self: &Arc<Self>,
        guest: u64,
        backing: impl Into<Backing>,
        access: Access,
    ) -> Result<Slot, MemoryError> {
        let backing = backing.into();
        let number = self.take_number()?;
        let size = backing.size();
        if let Err(source) = self.set(number, guest, &backing, size, access) {
            self.give_back(number);
            return Err(MemoryError::Slot { guest, size, source });
        }
        Ok(Slot { slots: Arc::clone(self), number, guest, backing })
    }

    fn take_number(&self) -> Result<u32, MemoryError> {
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = numbers.free.pop() {
            return Ok(number);
        }
        if numbers.next >= self.limit {
            return Err(MemoryError::NoSlot(self.limit));
        }
        numbers.next += 1;
        Ok(numbers.next - 1)
    }

    fn give_back(&self, number: u32) {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner).free.push(number);
    }

    fn set(
        &self,
        slot: u32,
        guest: u64,
        backing: &Backing,
        size: u64,
        access: Access,
    ) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: if access == Access::ReadOnly { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: guest,
            memory_size: size,
            userspace_addr: backing.address(),
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
    backing: Backing,
}

impl Drop for Slot {
    fn drop(&mut self) {
        match self.slots.set(self.number, self.guest, &self.backing, 0, Access::ReadWrite) {
            Ok(()) => self.slots.give_back(self.number),
            Err(error) => log::warn!("cannot remove the memory slot at {:#x}: {error}", self.guest),
        }
    }
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
