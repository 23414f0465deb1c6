//! vfio-user DMA_READ and DMA_WRITE: the guest memory that a server may reach by message.
//!
//! DMA addresses are guest-physical. Must never touch a range that is not wholly mapped, or not mapped for
//! that direction. Must never take a lock that is held across an exchange with a peer.

use std::fmt;
use std::sync::{PoisonError, RwLock};

use zerocopy::IntoBytes;

use crate::memory::{GuestAddr, SharedRegion};
use crate::vfio_user::message::{Command, DmaAccess, parse_front};

/// The access that a server has to a part of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaRights {
    /// Reading.
    Read,
    /// Reading and writing.
    ReadWrite,
}

#[derive(Clone)]
pub(crate) struct Window {
    pub(crate) region: SharedRegion,
    pub(crate) rights: DmaRights,
}

/// The parts of guest memory that are mapped for the server.
#[derive(Default)]
pub(crate) struct Dma(RwLock<Vec<Window>>);

/// A command of the server that succeeded, as its reply's payload.
#[derive(Debug)]
pub(crate) enum DmaServed {
    Read(Vec<u8>),
    Written([u8; 16], usize),
}

impl DmaServed {
    pub(crate) fn reply(&self) -> &[u8] {
        match self {
            Self::Read(reply) => reply,
            Self::Written(reply, _) => reply,
        }
    }
}

/// Why a command of the server was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DmaRefusal {
    /// There is no such command.
    Unknown,
    /// The sizes contradict each other, or exceed the limit.
    Malformed,
    /// The memory is not mapped, not mapped for that direction, or not accessible.
    Unmapped,
}

impl DmaRefusal {
    pub(crate) fn errno(self) -> u32 {
        let errno = match self {
            Self::Unknown => rustix::io::Errno::NOSYS,
            Self::Malformed => rustix::io::Errno::INVAL,
            Self::Unmapped => rustix::io::Errno::FAULT,
        };
        u32::try_from(errno.raw_os_error()).unwrap_or_default()
    }
}

impl fmt::Display for DmaRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "there is no such command for a client",
            Self::Malformed => "its sizes are wrong",
            Self::Unmapped => "that memory is not mapped for it",
        })
    }
}

impl Dma {
    pub(crate) fn add(&self, window: Window) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).push(window);
    }

    pub(crate) fn remove(&self, at: GuestAddr, size: u64) {
        let mut windows = self.0.write().unwrap_or_else(PoisonError::into_inner);
        windows.retain(|window| window.region.guest() != at || window.region.size() != size);
    }

    pub(crate) fn mapped(&self) -> Vec<Window> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The window that holds all of `len` bytes at `at`.
    fn window(&self, at: GuestAddr, len: u64) -> Option<Window> {
        let windows = self.0.read().unwrap_or_else(PoisonError::into_inner);
        windows.iter().find(|window| window.region.holds(at, len)).cloned()
    }

    /// Executes a command of the server, or returns why it is refused. `limit` is the largest transfer in
    /// bytes.
    pub(crate) fn serve(
        &self,
        command: Command,
        payload: &[u8],
        limit: u64,
    ) -> Result<DmaServed, DmaRefusal> {
        if !matches!(command, Command::DMA_READ | Command::DMA_WRITE) {
            return Err(DmaRefusal::Unknown);
        }
        let (access, data) = parse_front::<DmaAccess>(payload).map_err(|_| DmaRefusal::Malformed)?;
        let count = usize::try_from(access.count).map_err(|_| DmaRefusal::Malformed)?;
        if count == 0 || access.count > limit {
            return Err(DmaRefusal::Malformed);
        }
        let at = GuestAddr(access.address);
        let window = self.window(at, access.count).ok_or(DmaRefusal::Unmapped)?;
        if command == Command::DMA_READ {
            if !data.is_empty() {
                return Err(DmaRefusal::Malformed);
            }
            let mut reply = access.as_bytes().to_vec();
            let head = reply.len();
            reply.resize(head.saturating_add(count), 0);
            let data = reply.get_mut(head..).unwrap_or_default();
            let read = window.region.read(at, data);
            return read.map(|()| DmaServed::Read(reply)).map_err(|_| DmaRefusal::Unmapped);
        }
        // libvfio-user splits a large access into several messages, and makes the last as long as the first.
        let data = data.get(..count).ok_or(DmaRefusal::Malformed)?;
        if window.rights != DmaRights::ReadWrite {
            return Err(DmaRefusal::Unmapped);
        }
        window.region.write(at, data).map_err(|_| DmaRefusal::Unmapped)?;
        let mut reply = [0; 16];
        reply.copy_from_slice(access.as_bytes());
        Ok(DmaServed::Written(reply, count))
    }
}
