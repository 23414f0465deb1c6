//! vfio-user DMA_MAP and DMA_UNMAP: the parts of guest memory that the server may access, and by which means.

use std::os::fd::BorrowedFd;

use zerocopy::IntoBytes;

use super::client::Client;
use super::connection::{DmaRights, Expected, Window};
use super::message::{Command, DmaMap, DmaUnmap, Fault, length, parse};
use crate::memory::{GuestAddr, MemoryMap, SharedRegion};
use crate::peer::{Cause, Error};

/// How a server accesses a part of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// The server gets the file and maps it.
    Descriptor,
    /// The server sends a message for each access.
    Messages,
}

impl Client {
    /// Gives the server access to `region`. Blocks until the server has replied.
    ///
    /// # Errors
    /// When the server refuses or fails. Nothing is mapped then.
    pub fn dma_map(&self, region: &SharedRegion, rights: DmaRights, sharing: Sharing) -> Result<(), Error> {
        self.dma_map_many(std::slice::from_ref(region), rights, sharing)
    }

    /// Gives the server read and write access to all of `memory`. When one region is refused, no region stays
    /// mapped.
    ///
    /// # Errors
    /// When the server refuses or fails, or its limits do not allow that many maps or pages that small.
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

    /// Checks that these regions overlap no mapped region, and that the server's limits allow them.
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
        // Noted before the command is sent, as the server may access the memory before its reply arrives.
        self.shared.dma.add(Window { region: region.clone(), rights });
        let mapped = self.ask(Command::DMA_MAP, &[map.as_bytes()], fds, Expected::bytes(0));
        if mapped.as_ref().is_err_and(|error| !error.is_silence()) {
            self.shared.dma.remove(region.guest(), region.size());
        }
        mapped.map(drop)
    }

    /// Ends the server's access to a mapped region. Blocks until the server has replied.
    ///
    /// # Errors
    /// When the server refuses or fails. The server may still access the memory then, so the device must be
    /// given up before the memory is used for anything else.
    pub fn dma_unmap(&self, at: GuestAddr, size: u64) -> Result<(), Error> {
        let due = length(size_of::<DmaUnmap>());
        let unmap = DmaUnmap { argsz: due, flags: 0, address: at.raw(), size };
        let command = Command::DMA_UNMAP;
        let reply = self.ask(command, &[unmap.as_bytes()], &[], Expected::bytes(due))?;
        self.shared.dma.remove(at, size);
        // Some servers reply without a payload.
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

    /// Ends the server's access to all mapped regions.
    ///
    /// # Errors
    /// As [`Client::dma_unmap`]. After an error the other regions are still tried, unless the connection has
    /// ended.
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
