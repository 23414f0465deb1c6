//! vfio-user DMA_MAP, DMA_UNMAP, and the server's DMA_READ and DMA_WRITE: what of guest memory a server may reach.
//!
//! DMA addresses are guest-physical ones. Must never touch memory that is not mapped whole, or not in that
//! direction; must never take a lock that is held across an exchange with a peer.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, PoisonError, RwLock};

use zerocopy::IntoBytes;

use super::client::Client;
use super::error::{Cause, Error};
use super::message::{Command, DmaAccess, DmaMap, DmaUnmap, Fault, length, parse, parse_front};
use super::table::Expected;
use crate::memory_map::{GuestAddr, MemoryMap, SharedRegion};

/// How a server reaches a part of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// It is given the file, and maps it.
    Descriptor,
    /// It asks for each access by message.
    Messages,
}

/// What a server may do with a part of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaRights {
    /// Reading.
    Read,
    /// Reading and writing.
    ReadWrite,
}

/// Guest memory, for the accesses that a server asks for by message. Called on whichever thread reads the
/// connection, perhaps on a vCPU's; must not block.
pub trait DmaMemory: Send + Sync {
    /// Fills `data` from guest address `at`, which lies in `region` whole.
    ///
    /// # Errors
    /// When the memory cannot be read: the server is told.
    fn read(&self, region: &SharedRegion, at: GuestAddr, data: &mut [u8]) -> io::Result<()>;

    /// Stores `data` at guest address `at`, which lies in `region` whole; notes the pages as dirty.
    ///
    /// # Errors
    /// When the memory cannot be written: the server is told.
    fn write(&self, region: &SharedRegion, at: GuestAddr, data: &[u8]) -> io::Result<()>;
}

/// Guest memory through its files.
struct Files;

impl Files {
    fn position(region: &SharedRegion, at: GuestAddr) -> io::Result<u64> {
        let inside = at.raw().checked_sub(region.guest().raw());
        let position = inside.and_then(|inside| region.offset().checked_add(inside));
        position.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl DmaMemory for Files {
    fn read(&self, region: &SharedRegion, at: GuestAddr, data: &mut [u8]) -> io::Result<()> {
        let mut position = Self::position(region, at)?;
        let mut rest = data;
        while !rest.is_empty() {
            let count = rustix::io::pread(region.fd(), &mut *rest, position)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            rest = rest.get_mut(count..).unwrap_or_default();
            position = position.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
        }
        Ok(())
    }

    fn write(&self, region: &SharedRegion, at: GuestAddr, data: &[u8]) -> io::Result<()> {
        let mut position = Self::position(region, at)?;
        let mut rest = data;
        while !rest.is_empty() {
            let count = rustix::io::pwrite(region.fd(), rest, position)?;
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            rest = rest.get(count..).unwrap_or_default();
            position = position.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
        }
        Ok(())
    }
}

#[derive(Clone)]
struct Window {
    region: SharedRegion,
    rights: DmaRights,
}

/// What is mapped.
pub(super) struct Dma {
    windows: RwLock<Vec<Window>>,
    memory: Arc<dyn DmaMemory>,
}

/// A command of the server that was done: its reply's payload.
#[derive(Debug)]
pub(super) enum DmaServed {
    Read(Vec<u8>),
    Written([u8; 16], usize),
}

impl DmaServed {
    pub(super) fn reply(&self) -> &[u8] {
        match self {
            Self::Read(reply) => reply,
            Self::Written(reply, _) => reply,
        }
    }
}

/// Why a command of the server was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DmaRefusal {
    /// There is no such command.
    Unknown,
    /// Sizes do not fit each other, or are above the limit.
    Malformed,
    /// The memory is not mapped, or not in that direction, or cannot be reached.
    Unmapped,
}

impl DmaRefusal {
    pub(super) fn errno(self) -> u32 {
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
    pub(super) fn new(memory: Option<Arc<dyn DmaMemory>>) -> Self {
        Self { windows: RwLock::default(), memory: memory.unwrap_or_else(|| Arc::new(Files)) }
    }

    fn add(&self, window: Window) {
        self.windows.write().unwrap_or_else(PoisonError::into_inner).push(window);
    }

    fn remove(&self, at: GuestAddr, size: u64) {
        let mut windows = self.windows.write().unwrap_or_else(PoisonError::into_inner);
        windows.retain(|window| window.region.guest() != at || window.region.size() != size);
    }

    fn mapped(&self) -> Vec<Window> {
        self.windows.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The window that holds all of `len` bytes at `at`.
    fn window(&self, at: GuestAddr, len: u64) -> Option<Window> {
        let windows = self.windows.read().unwrap_or_else(PoisonError::into_inner);
        windows.iter().find(|window| window.region.holds(at, len)).cloned()
    }

    /// Does what the server asks, or says why not. `limit` is the largest transfer.
    pub(super) fn serve(
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
            let read = self.memory.read(&window.region, at, data);
            return read.map(|()| DmaServed::Read(reply)).map_err(|_| DmaRefusal::Unmapped);
        }
        // Of several messages for one piece of memory, libvfio-user makes the last as long as the first.
        let data = data.get(..count).ok_or(DmaRefusal::Malformed)?;
        if window.rights != DmaRights::ReadWrite {
            return Err(DmaRefusal::Unmapped);
        }
        self.memory.write(&window.region, at, data).map_err(|_| DmaRefusal::Unmapped)?;
        let mut reply = [0; 16];
        reply.copy_from_slice(access.as_bytes());
        Ok(DmaServed::Written(reply, count))
    }
}

impl Client {
    /// Lets the server reach `region`. Blocks until it answered.
    ///
    /// # Errors
    /// When the server refuses or fails; nothing is mapped then.
    pub fn dma_map(&self, region: &SharedRegion, rights: DmaRights, sharing: Sharing) -> Result<(), Error> {
        self.dma_map_many(std::slice::from_ref(region), rights, sharing)
    }

    /// Lets the server reach all of `memory`, read and write: all of it, or nothing when one region is refused.
    ///
    /// # Errors
    /// When the server refuses or fails, or takes fewer maps or larger pages than there are.
    pub fn dma_map_all(&self, memory: &MemoryMap, sharing: Sharing) -> Result<(), Error> {
        self.dma_map_many(memory.regions(), DmaRights::ReadWrite, sharing)
    }

    fn dma_map_many(
        &self,
        regions: &[SharedRegion],
        rights: DmaRights,
        sharing: Sharing,
    ) -> Result<(), Error> {
        self.check_fit(regions)?;
        for (index, region) in regions.iter().enumerate() {
            if let Err(error) = self.map_one(region, rights, sharing) {
                if !error.is_fatal() {
                    for mapped in regions.iter().take(index) {
                        self.dma_unmap(mapped.guest(), mapped.size())?;
                    }
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Would the server take these, beside what is mapped?
    fn check_fit(&self, regions: &[SharedRegion]) -> Result<(), Error> {
        let agreed = self.version().agreed;
        let windows = self.shared.dma.mapped();
        let overlaps = |one: &SharedRegion, other: &SharedRegion| {
            let before = |a: &SharedRegion, b: &SharedRegion| a.end().is_some_and(|end| end <= b.guest());
            !before(one, other) && !before(other, one)
        };
        let twice = |region| windows.iter().any(|window| overlaps(&window.region, region));
        if regions.iter().any(twice) {
            return Err(self.error(Command::DMA_MAP, Cause::Invalid("some of that memory is mapped already")));
        }
        let mapped = windows.len().saturating_add(regions.len());
        if u64::try_from(mapped).unwrap_or(u64::MAX) > agreed.max_dma_maps {
            let what = format!("it takes {} DMA maps, and there are {mapped}", agreed.max_dma_maps);
            return Err(self.error(Command::DMA_MAP, Cause::Incompatible(what)));
        }
        let page = agreed.page_size();
        for region in regions {
            let numbers = [region.guest().raw(), region.size(), region.offset()];
            if numbers.iter().any(|number| !number.is_multiple_of(page)) {
                let what =
                    format!("it takes pages of {page:#x} bytes, and memory at {} is not", region.guest());
                return Err(self.error(Command::DMA_MAP, Cause::Incompatible(what)));
            }
        }
        Ok(())
    }

    fn map_one(&self, region: &SharedRegion, rights: DmaRights, sharing: Sharing) -> Result<(), Error> {
        let flags = match rights {
            DmaRights::Read => 1,
            DmaRights::ReadWrite => 3,
        };
        let offset = match sharing {
            Sharing::Descriptor => region.offset(),
            Sharing::Messages => 0,
        };
        let map = DmaMap {
            argsz: length(size_of::<DmaMap>()),
            flags,
            offset,
            address: region.guest().raw(),
            size: region.size(),
        };
        let fd = [region.fd()];
        let fds: &[BorrowedFd<'_>] = match sharing {
            Sharing::Descriptor => &fd,
            Sharing::Messages => &[],
        };
        if fds.len() > self.version().agreed.fds() {
            return Err(self.error(Command::DMA_MAP, Cause::NotNegotiated));
        }
        // The server may use it before we have its reply.
        self.shared.dma.add(Window { region: region.clone(), rights });
        let mapped = self.ask(Command::DMA_MAP, &[map.as_bytes()], fds, Expected::bytes(0));
        if mapped.as_ref().is_err_and(|error| !error.is_hung()) {
            self.shared.dma.remove(region.guest(), region.size());
        }
        mapped.map(drop)
    }

    /// Takes a region back that was mapped. Blocks until the server let go of it.
    ///
    /// # Errors
    /// When the server refuses or fails. Then it may still use the memory: the device is to be given up before the
    /// memory is used for anything else.
    pub fn dma_unmap(&self, at: GuestAddr, size: u64) -> Result<(), Error> {
        let due = length(size_of::<DmaUnmap>());
        let unmap = DmaUnmap { argsz: due, flags: 0, address: at.raw(), size };
        let command = Command::DMA_UNMAP;
        let reply = self.ask(command, &[unmap.as_bytes()], &[], Expected::bytes(due))?;
        self.shared.dma.remove(at, size);
        // Some servers answer without a payload.
        if reply.payload.is_empty() {
            return Ok(());
        }
        let echo: DmaUnmap = parse(&reply.payload).map_err(|fault| self.malformed(command, fault))?;
        if (echo.address, echo.size) == (unmap.address, unmap.size) {
            Ok(())
        } else {
            let fault = Fault::Value { field: "address", value: echo.address };
            Err(self.malformed(command, fault))
        }
    }

    /// Takes everything back that is mapped.
    ///
    /// # Errors
    /// As [`Client::dma_unmap`]; the rest is tried all the same unless the connection ended.
    pub fn dma_unmap_all(&self) -> Result<(), Error> {
        let mut outcome = Ok(());
        for window in self.shared.dma.mapped() {
            if let Err(error) = self.dma_unmap(window.region.guest(), window.region.size()) {
                let over = error.is_fatal();
                outcome = outcome.and(Err(error));
                if over {
                    break;
                }
            }
        }
        outcome
    }
}
