//! Memory mapped into this process: guest RAM, register pages, and pieces of peers' files.
//!
//! Guest RAM is a memfd (see `arch::ram`). It is mapped because KVM wants a user address. The VMM must never
//! touch guest RAM through this mapping, because a peer may take pages away (see `guest_memory`). A peer's
//! file is a [`PeerMapping`], which has no way to touch the memory: the peer may make the file shorter at any
//! moment.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::ptr::null_mut;
use std::sync::Arc;

use devices::ports::{Access, FileRange, PortError};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

/// Memory of our own, mapped for as long as a clone lives.
#[derive(Clone, Debug)]
pub struct Mapping(Arc<MmapRegion>);

impl Mapping {
    /// Maps `size` bytes of `fd` from `offset`, shared.
    ///
    /// # Errors
    /// When the descriptor cannot be duplicated or the host refuses the mapping.
    pub fn shared(fd: &OwnedFd, offset: u64, size: u64) -> Result<Self, PortError> {
        let file = fd.try_clone().map_err(|error| cannot_map(size, error))?;
        let file = FileOffset::new(File::from(file), offset);
        let region = MmapRegion::from_file(file, length(size)?);
        region.map(|region| Mapping(Arc::new(region))).map_err(|error| cannot_map(size, error))
    }

    /// Maps `size` bytes of zeroed private memory.
    ///
    /// # Errors
    /// When the host refuses the mapping.
    pub fn anonymous(size: u64) -> Result<Self, PortError> {
        // Readable and writable, private and anonymous. Without MAP_NORESERVE, which is the builder's
        // default.
        let region = MmapRegionBuilder::new(length(size)?).with_mmap_prot(0x3).with_mmap_flags(0x22).build();
        region.map(|region| Mapping(Arc::new(region))).map_err(|error| cannot_map(size, error))
    }

    /// Leaves this memory out of core dumps of the process.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn leave_out_of_cores(&self) -> io::Result<()> {
        let (begin, length) = (self.0.as_ptr().cast(), self.0.size());
        // SAFETY: the range is this mapping. The advice changes only what a core dump holds.
        Ok(unsafe { madvise(begin, length, Advice::LinuxDontDump) }?)
    }

    /// The mapped region, for volatile access.
    pub fn region(&self) -> &MmapRegion {
        &self.0
    }
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
    pub fn new(piece: &FileRange, access: Access) -> Result<Self, PortError> {
        let FileRange { fd, offset, size } = piece;
        let length = length(*size)?;
        let protection = match access {
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
            Access::ReadOnly => ProtFlags::READ,
        };
        // SAFETY: the kernel chooses the address, so the call cannot replace an existing mapping.
        let mapped = unsafe { mmap(null_mut(), length, protection, MapFlags::SHARED, &**fd, *offset) };
        let address = mapped.map_err(|error| cannot_map(*size, io::Error::from(error)))?;
        Ok(PeerMapping { address: address.expose_provenance(), length, _file: Arc::clone(fd) })
    }

    /// The address in this process, and the length in bytes.
    pub fn place(&self) -> (usize, usize) {
        (self.address, self.length)
    }

    /// Makes the kernel fetch every page of the `length` bytes from `offset`, as an access by the guest
    /// would. Pages that the file lacks are created where possible. This process does not touch the pages.
    ///
    /// # Errors
    /// When the kernel cannot provide a page.
    pub fn populate(&self, offset: usize, length: usize) -> io::Result<()> {
        let length = length.min(self.length.saturating_sub(offset));
        let begin = std::ptr::with_exposed_provenance_mut(self.address.saturating_add(offset));
        // SAFETY: the range is inside what `new` mapped, and this advice changes no contents.
        Ok(unsafe { madvise(begin, length, Advice::LinuxPopulateRead) }?)
    }
}

impl Drop for PeerMapping {
    fn drop(&mut self) {
        // SAFETY: this is what `new` mapped. Nothing has a pointer to it, and its slot is gone.
        let done = unsafe { munmap(std::ptr::with_exposed_provenance_mut(self.address), self.length) };
        if let Err(error) = done {
            log::warn!("cannot unmap a peer's file: {error}");
        }
    }
}

/// Releases the resident pages of this program's text and constants. Most of them were needed only for the
/// start: command line, images, the first messages with peers. Pages that are needed again come back from the
/// page cache. Only for a process that runs nothing but the machine; a process that uses this crate as a
/// library does not call it.
pub(crate) fn release_text() {
    // SAFETY: the linker gives these names to the first byte of the program and to the end of its text.
    // Nothing is read through them.
    unsafe extern "C" {
        static __executable_start: u8;
        static etext: u8;
    }
    let start = (&raw const __executable_start).addr();
    let end = (&raw const etext).addr();
    let pages = end.saturating_sub(start) / PAGE_BYTES;
    let begin = (&raw const __executable_start).cast_mut().cast();
    // SAFETY: between the program's first page and the last whole page of its text, there are only file
    // mappings that nothing writes to. Each page is read from the file again when it is touched.
    if let Err(error) = unsafe { madvise(begin, pages.saturating_mul(PAGE_BYTES), Advice::LinuxDontNeed) } {
        log::debug!("the pages of the start stay resident: {error}");
    }
}

/// The size in bytes of a page, of the guest and of the host.
pub(crate) const PAGE: u64 = 4096;

const PAGE_BYTES: usize = 4096;

fn length(size: u64) -> Result<usize, PortError> {
    usize::try_from(size).map_err(|error| cannot_map(size, io::Error::other(error)))
}

fn cannot_map(size: u64, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> PortError {
    PortError::new(format!("map {size:#x} bytes"), io::Error::other(error))
}
