//! The one door to guest memory for everything but the guest and the peers that map it: rings, DMA by message.
//!
//! A region is reached through its file unless the machine gives another way ([`super::SharedRegion::with_access`]). Memory
//! that is gone, as somebody cut its file or punched a hole into it, is an error and never a signal.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// How the bytes of one region are read and written. Offsets count from the start of the region; whoever calls has found
/// that the range lies inside it. Called on any thread, a vCPU's included; must not wait for a peer.
///
/// An implementation may note which pages are written.
pub trait MemoryAccess: fmt::Debug + Send + Sync {
    /// Fills `data` from `offset`.
    ///
    /// # Errors
    /// When the memory is not there.
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Stores `data` at `offset`.
    ///
    /// # Errors
    /// When the memory is not there.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Advances the ring index at `offset` (little-endian) to `index`. A driver that polls the index meanwhile sees no
    /// value that is not between the old and the new one.
    ///
    /// # Errors
    /// When the memory is not there.
    fn store_index(&self, offset: u64, index: u16) -> io::Result<()>;
}

/// A region through its file. The kernel may copy two bytes one after the other, so a driver on another processor can see
/// a ring index half written: a machine that runs guests gives its regions a better way.
#[derive(Debug)]
pub(super) struct FileAccess {
    pub(super) fd: Arc<OwnedFd>,
    /// Where the region begins in the file.
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
