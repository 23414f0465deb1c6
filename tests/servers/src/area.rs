//! Memory in a BAR that the client may map: one memfd for the whole region, of which sparse areas are
//! offered.

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// A region's memory, shared with the client.
#[derive(Debug)]
pub struct Area {
    file: File,
    memory: MmapRegion,
}

impl Area {
    /// Zeroes, `size` bytes of them.
    ///
    /// # Errors
    /// When the host has none.
    pub fn new(name: &str, size: usize) -> Result<Self> {
        let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC)?);
        ftruncate(&file, u64::try_from(size).map_err(Error::other)?)?;
        let memory =
            MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), size).map_err(Error::other)?;
        Ok(Self { file, memory })
    }

    /// The descriptor that region information carries.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.memory.size()
    }

    /// A register that the guest writes while we look.
    #[must_use]
    pub fn load(&self, offset: usize) -> u32 {
        self.memory.as_volatile_slice().load(offset, Ordering::Acquire).unwrap_or(0)
    }

    /// Writes a register.
    pub fn store(&self, offset: usize, value: u32) {
        if let Err(error) = self.memory.as_volatile_slice().store(value, offset, Ordering::Release) {
            log::error!("no register at {offset:#x}: {error}");
        }
    }

    /// Reads bytes.
    ///
    /// # Errors
    /// Past the end.
    pub fn read(&self, offset: usize, data: &mut [u8]) -> Result<()> {
        self.memory.as_volatile_slice().read_slice(data, offset).map_err(Error::other)
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// Past the end.
    pub fn write(&self, offset: usize, data: &[u8]) -> Result<()> {
        self.memory.as_volatile_slice().write_slice(data, offset).map_err(Error::other)
    }

    /// Zeroes all of it.
    pub fn clear(&self) {
        const PIECE: [u8; 4096] = [0; 4096];
        for start in (0..self.size()).step_by(PIECE.len()) {
            let length = PIECE.len().min(self.size() - start);
            self.write(start, PIECE.get(..length).unwrap_or_default()).unwrap_or_default();
        }
    }
}
