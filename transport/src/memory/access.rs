//! Access to guest memory for rings and for DMA by message. The guest itself, and peers that map the memory,
//! do not come through here.
//!
//! A region is accessed through its file unless the machine provides another way
//! ([`super::SharedRegion::with_access`]). Memory that is gone, because its file was truncated or a hole was
//! punched into it, is an error and never a signal.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// How the bytes of one region are read and written. Offsets count from the start of the region; the caller
/// has checked that the range lies inside it. Called on any thread, also on a vCPU thread. Must not wait for
/// a peer.
///
/// An implementation may note which pages are written.
pub trait MemoryAccess: fmt::Debug + Send + Sync {
    /// Fills `data` from `offset`.
    ///
    /// # Errors
    /// When the memory is gone.
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Stores `data` at `offset`.
    ///
    /// # Errors
    /// When the memory is gone.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Advances the ring index at `offset` (little-endian) to `index`. A driver that polls the index
    /// meanwhile sees only values from the old index to the new one.
    ///
    /// # Errors
    /// When the memory is gone.
    fn store_index(&self, offset: u64, index: u16) -> io::Result<()>;
}

/// A region that is accessed through its file. The kernel may copy two bytes one after the other, so a driver
/// on another processor can see a half-written ring index. Therefore a machine that runs guests provides
/// another [`MemoryAccess`].
#[derive(Debug)]
pub(super) struct FileAccess {
    pub(super) fd: Arc<OwnedFd>,
    /// First byte in the file.
    pub(super) start: u64,
}

impl FileAccess {
    fn place(&self, offset: u64) -> io::Result<u64> {
        self.start.checked_add(offset).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl MemoryAccess for FileAccess {
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let mut at = self.place(offset)?;
        let mut rest = data;
        while !rest.is_empty() {
            let count = rustix::io::pread(&self.fd, &mut *rest, at)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            rest = rest.get_mut(count..).unwrap_or_default();
            at = at.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut at = self.place(offset)?;
        let mut rest = data;
        while !rest.is_empty() {
            let count = rustix::io::pwrite(&self.fd, rest, at)?;
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            rest = rest.get(count..).unwrap_or_default();
            at = at.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
        }
        Ok(())
    }

    fn store_index(&self, offset: u64, index: u16) -> io::Result<()> {
        self.write(offset, &index.to_le_bytes())
    }
}
