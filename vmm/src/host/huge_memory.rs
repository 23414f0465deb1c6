//! Guest memory made of huge pages, for the DMA that vfio-user servers ask for by message: hugetlbfs cannot be written
//! by system call, so it goes through the mapping. All pages are reserved; none is touched but for a server.

use std::io;
use std::sync::Arc;

use transport::memory_map::{GuestAddr, SharedRegion};
use transport::vfio_user::DmaMemory;
use vm_memory::{Bytes, VolatileMemory};

use crate::host::memory::Mapping;

/// RAM by guest address.
pub(crate) struct HugeMemory(Vec<(u64, Mapping)>);

impl HugeMemory {
    /// RAM that is mapped like this: first guest address and mapping of each region.
    pub(crate) fn new(regions: Vec<(u64, Mapping)>) -> Arc<Self> {
        Arc::new(Self(regions))
    }

    /// The mapping that holds `at`, and where in it.
    fn find(&self, at: GuestAddr) -> io::Result<(&Mapping, usize)> {
        let inside = |(base, mapping): &(u64, Mapping)| {
            let offset = usize::try_from(at.0.checked_sub(*base)?).ok()?;
            (offset < mapping.region().len()).then_some(offset)
        };
        let found = self.0.iter().find_map(|region| Some((&region.1, inside(region)?)));
        found.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl DmaMemory for HugeMemory {
    fn read(&self, _: &SharedRegion, at: GuestAddr, data: &mut [u8]) -> io::Result<()> {
        let (mapping, offset) = self.find(at)?;
        mapping.region().as_volatile_slice().read_slice(data, offset).map_err(io::Error::other)
    }

    fn write(&self, _: &SharedRegion, at: GuestAddr, data: &[u8]) -> io::Result<()> {
        let (mapping, offset) = self.find(at)?;
        mapping.region().as_volatile_slice().write_slice(data, offset).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    #[test]
    fn bytes_go_to_their_region_and_never_beyond_it() {
        let file = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 0x3000).unwrap();
        let map = |offset, size| Mapping::shared(&file, offset, size).unwrap();
        let memory = HugeMemory::new(vec![(0, map(0, 0x1000)), (1 << 32, map(0x1000, 0x2000))]);
        let region = SharedRegion::new(GuestAddr(0), 0x1000, Arc::new(file), 0);
        memory.write(&region, GuestAddr((1 << 32) + 0xffe), b"word").unwrap();
        let mut data = [0; 4];
        memory.read(&region, GuestAddr((1 << 32) + 0xffe), &mut data).unwrap();
        assert_eq!(&data, b"word");
        let mut from_file = [0; 4];
        rustix::io::pread(region.fd(), &mut from_file, 0x1ffe).unwrap();
        assert_eq!(&from_file, b"word");
        for at in [0xffe, 0x1000, 1 << 32 | 0x1ffe, 1 << 33] {
            assert!(memory.read(&region, GuestAddr(at), &mut data).is_err(), "{at:#x}");
            assert!(memory.write(&region, GuestAddr(at), &data).is_err(), "{at:#x}");
        }
    }
}
