//! What the client mapped for DMA (vfio-user, DMA_MAP): by address, each on its own file descriptor, or by
//! messages.
//!
//! Must never reach beyond a mapping: an access that is not whole inside one or several adjoining ones fails
//! before a byte moves.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::sync::Arc;

use vfio_user::DmaMapFlags;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Most mappings that a client may have at a time.
const MAX_MAPS: usize = 4096;

/// How DMA goes by messages: DMA_READ and DMA_WRITE to the client.
pub trait Messages: Send + Sync {
    /// Reads the client's memory.
    ///
    /// # Errors
    /// What the client or the socket says.
    fn read(&self, address: u64, data: &mut [u8]) -> Result<()>;

    /// Writes the client's memory.
    ///
    /// # Errors
    /// What the client or the socket says.
    fn write(&self, address: u64, data: &[u8]) -> Result<()>;
}

#[derive(Debug)]
struct Map {
    size: u64,
    flags: DmaMapFlags,
    /// Absent when the client gave no descriptor: then only messages reach it.
    memory: Option<MmapRegion>,
}

/// All mappings of one client.
#[derive(Default)]
pub struct GuestMemory {
    maps: BTreeMap<u64, Map>,
    messages: Option<Arc<dyn Messages>>,
    only_messages: OnlyMessages,
}

/// Whether mapped memory is reached by messages, too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnlyMessages {
    /// Mapped memory is read and written in place.
    #[default]
    WhereUnmapped,
    /// Everything goes by messages.
    Always,
}

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestMemory").field("maps", &self.maps).finish_non_exhaustive()
    }
}

fn invalid(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, what.into())
}

impl GuestMemory {
    /// None mapped yet; without a way to send messages.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on messages go this way.
    pub fn set_messages(&mut self, messages: Option<Arc<dyn Messages>>) {
        self.messages = messages;
    }

    /// Whether mapped memory is reached by messages, too.
    pub fn set_only_messages(&mut self, only: OnlyMessages) {
        self.only_messages = only;
    }

    /// How many mappings there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.maps.len()
    }

    /// True when nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.maps.is_empty()
    }

    /// DMA_MAP.
    ///
    /// # Errors
    /// Overlaps, wraps and what does not lie inside its file.
    pub fn map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> Result<()> {
        let end = address.checked_add(size).filter(|_| size > 0).ok_or_else(|| invalid("an empty range"))?;
        if self.maps.len() >= MAX_MAPS {
            return Err(invalid("too many mappings"));
        }
        if let Some((start, map)) = self.maps.range(..end).next_back()
            && start + map.size > address
        {
            return Err(invalid(format!("{address:#x}+{size:#x} overlaps {start:#x}+{:#x}", map.size)));
        }
        let memory = match fd {
            Some(file) => {
                let length = usize::try_from(size).map_err(|_| invalid("too large"))?;
                let mapped = MmapRegion::from_file(FileOffset::new(file, offset), length);
                Some(mapped.map_err(|error| invalid(error.to_string()))?)
            }
            None => None,
        };
        self.maps.insert(address, Map { size, flags, memory });
        Ok(())
    }

    /// DMA_UNMAP: of exactly one mapping.
    ///
    /// # Errors
    /// When there is no such mapping.
    pub fn unmap(&mut self, address: u64, size: u64) -> Result<()> {
        match self.maps.get(&address) {
            Some(map) if map.size == size => {
                self.maps.remove(&address);
                Ok(())
            }
            _ => Err(Error::new(ErrorKind::NotFound, format!("{address:#x}+{size:#x} is not mapped"))),
        }
    }

    /// Forgets all, as at the end of a connection.
    pub fn clear(&mut self) {
        self.maps.clear();
    }

    /// Reads.
    ///
    /// # Errors
    /// When a byte of it is not mapped for reading.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<()> {
        let pieces = self.pieces(address, data.len(), DmaMapFlags::READ)?;
        let mut rest = data;
        for piece in pieces {
            let (now, later) = rest.split_at_mut(piece.length);
            rest = later;
            match piece.memory {
                Some(memory) => memory
                    .as_volatile_slice()
                    .read_slice(now, piece.offset)
                    .map_err(|error| invalid(error.to_string()))?,
                None => self.by_messages()?.read(piece.address, now)?,
            }
        }
        Ok(())
    }

    /// Writes.
    ///
    /// # Errors
    /// When a byte of it is not mapped for writing.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<()> {
        let pieces = self.pieces(address, data.len(), DmaMapFlags::WRITE)?;
        let mut rest = data;
        for piece in pieces {
            let (now, later) = rest.split_at(piece.length);
            rest = later;
            match piece.memory {
                Some(memory) => memory
                    .as_volatile_slice()
                    .write_slice(now, piece.offset)
                    .map_err(|error| invalid(error.to_string()))?,
                None => self.by_messages()?.write(piece.address, now)?,
            }
        }
        Ok(())
    }

    fn by_messages(&self) -> Result<&Arc<dyn Messages>> {
        self.messages
            .as_ref()
            .ok_or_else(|| invalid("memory without a descriptor, and no way to send messages"))
    }

    fn pieces(&self, address: u64, length: usize, wanted: DmaMapFlags) -> Result<Vec<Piece<'_>>> {
        let mut pieces = Vec::new();
        let (mut at, mut left) = (address, length);
        while left > 0 {
            let unmapped = || invalid(format!("{at:#x} is not mapped for this"));
            let (start, map) = self.maps.range(..=at).next_back().ok_or_else(unmapped)?;
            let offset = at - start;
            if offset >= map.size || !map.flags.contains(wanted) {
                return Err(unmapped());
            }
            let here = usize::try_from(map.size - offset).unwrap_or(usize::MAX).min(left);
            let memory = map.memory.as_ref().filter(|_| self.only_messages != OnlyMessages::Always);
            let offset = usize::try_from(offset).map_err(|_| unmapped())?;
            pieces.push(Piece { memory, offset, address: at, length: here });
            left -= here;
            if left > 0 {
                at = at.checked_add(u64::try_from(here).unwrap_or(u64::MAX)).ok_or_else(unmapped)?;
            }
        }
        Ok(pieces)
    }
}

struct Piece<'a> {
    memory: Option<&'a MmapRegion>,
    offset: usize,
    address: u64,
    length: usize,
}
