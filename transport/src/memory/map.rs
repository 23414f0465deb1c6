//! Guest memory as peers are told of it: ranges of guest-physical addresses backed by fds.
//!
//! A user address is `guest address + a fixed bias`, never a pointer. So no address of this process is
//! disclosed, and a missing translation fails visibly. A region always has an fd. Must never map memory.
//! Rings and DMA by message access guest memory only with [`MemoryMap::read`], [`MemoryMap::write`] and
//! [`MemoryMap::store_index`].

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::access::{FileAccess, MemoryAccess};

/// The page size. Regions are whole pages.
pub const PAGE: u64 = 4096;

/// User address minus guest address, for all user addresses that vhost-user peers see.
pub const USER_BIAS: u64 = 0x1000_0000_0000;

/// A guest-physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestAddr(pub u64);

impl GuestAddr {
    /// The address as a number.
    pub fn raw(self) -> u64 {
        self.0
    }

    /// The address plus `bytes`; `None` past the end of the address space.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }

    fn user(self) -> Option<UserAddr> {
        self.0.checked_add(USER_BIAS).map(UserAddr)
    }
}

impl fmt::Display for GuestAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A user address in vhost-user messages: guest address + [`USER_BIAS`], never a pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UserAddr(u64);

impl UserAddr {
    /// The address as a message holds it.
    pub fn raw(self) -> u64 {
        self.0
    }

    /// The guest address for the user address `raw` of a peer; `None` below the bias.
    pub fn guest_of(raw: u64) -> Option<GuestAddr> {
        raw.checked_sub(USER_BIAS).map(GuestAddr)
    }
}

/// An I/O virtual address, as a device behind an IOMMU or a vfio-user server uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Iova(pub u64);

/// A range of guest memory and the file that holds it.
#[derive(Clone, Debug)]
pub struct SharedRegion {
    guest: GuestAddr,
    size: u64,
    fd: Arc<OwnedFd>,
    offset: u64,
    access: Arc<dyn MemoryAccess>,
}

impl SharedRegion {
    /// `size` bytes at guest address `guest`, held by `fd` from byte `offset` on.
    pub fn new(guest: GuestAddr, size: u64, fd: Arc<OwnedFd>, offset: u64) -> Self {
        let access = Arc::new(FileAccess { fd: Arc::clone(&fd), start: offset });
        Self { guest, size, fd, offset, access }
    }

    /// The same region, read and written through `access` instead of its file.
    #[must_use]
    pub fn with_access(self, access: Arc<dyn MemoryAccess>) -> Self {
        Self { access, ..self }
    }

    /// The first guest address.
    pub fn guest(&self) -> GuestAddr {
        self.guest
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// First byte in the region's file.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The region's file, as a shared handle.
    pub fn shared_fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// The user address of the first byte. A region of a [`MemoryMap`] always has one.
    pub fn user(&self) -> Option<UserAddr> {
        self.guest.user()
    }

    /// The guest address after the last byte; `None` past the end of the address space.
    pub fn end(&self) -> Option<GuestAddr> {
        self.guest.checked_add(self.size)
    }

    /// True when `other` is the same range of guest addresses at the same place of the same file.
    pub fn is_same(&self, other: &Self) -> bool {
        let place = |region: &Self| (region.guest, region.size, region.offset);
        place(self) == place(other) && Arc::ptr_eq(&self.fd, &other.fd)
    }

    /// Fills `data` from guest address `at`; see [`MemoryAccess`].
    ///
    /// # Errors
    /// When the range leaves the region, or the memory is gone.
    pub fn read(&self, at: GuestAddr, data: &mut [u8]) -> io::Result<()> {
        self.access.read(self.inside(at, data.len())?, data)
    }

    /// Stores `data` at guest address `at`; see [`MemoryAccess`].
    ///
    /// # Errors
    /// When the range leaves the region, or the memory is gone.
    pub fn write(&self, at: GuestAddr, data: &[u8]) -> io::Result<()> {
        self.access.write(self.inside(at, data.len())?, data)
    }

    /// Advances the ring index at guest address `at`; see [`MemoryAccess`].
    ///
    /// # Errors
    /// When the index lies outside the region, or the memory is gone.
    pub fn store_index(&self, at: GuestAddr, index: u16) -> io::Result<()> {
        self.access.store_index(self.inside(at, 2)?, index)
    }

    /// The offset of `at` in the region, when all of `len` bytes lie inside the region.
    fn inside(&self, at: GuestAddr, len: usize) -> io::Result<u64> {
        let len = u64::try_from(len).unwrap_or(u64::MAX);
        let offset = at.0.checked_sub(self.guest.0).filter(|_| self.holds(at, len));
        offset.ok_or_else(outside)
    }

    pub(crate) fn holds(&self, at: GuestAddr, len: u64) -> bool {
        match (at.checked_add(len), self.end()) {
            (Some(last), Some(end)) => at >= self.guest && last <= end,
            _ => false,
        }
    }
}

fn outside() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "the range lies outside guest memory")
}

/// Why a list of regions is no memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The list is empty.
    #[error("the memory map has no region")]
    Empty,
    /// A region is empty, or not made of whole pages.
    #[error("the memory region at {0} is empty or not made of whole 4 KiB pages")]
    Unaligned(GuestAddr),
    /// A region extends past the end of an address space.
    #[error("the memory region at {0} is too large")]
    TooLarge(GuestAddr),
    /// Two regions share addresses.
    #[error("the memory regions at {0} and {1} overlap")]
    Overlap(GuestAddr, GuestAddr),
}

/// All of guest memory: sorted regions without overlaps. Immutable and cheap to clone.
#[derive(Clone, Debug)]
pub struct MemoryMap(Arc<[SharedRegion]>);

impl MemoryMap {
    /// Checks and sorts `regions`.
    pub fn new(mut regions: Vec<SharedRegion>) -> Result<Self, MapError> {
        if regions.is_empty() {
            return Err(MapError::Empty);
        }
        regions.sort_by_key(|region| region.guest);
        for region in &regions {
            let at = region.guest;
            if region.size == 0 || [at.0, region.size, region.offset].iter().any(|n| n % PAGE != 0) {
                return Err(MapError::Unaligned(at));
            }
            region.end().and_then(GuestAddr::user).ok_or(MapError::TooLarge(at))?;
            region.offset.checked_add(region.size).ok_or(MapError::TooLarge(at))?;
        }
        for (low, high) in regions.iter().zip(regions.iter().skip(1)) {
            if low.end().is_none_or(|end| end > high.guest) {
                return Err(MapError::Overlap(low.guest, high.guest));
            }
        }
        Ok(Self(regions.into()))
    }

    /// The regions, lowest guest address first.
    pub fn regions(&self) -> &[SharedRegion] {
        &self.0
    }

    /// The region that holds all of `len` bytes at `at`.
    pub fn region_of(&self, at: GuestAddr, len: u64) -> Option<&SharedRegion> {
        self.0.iter().find(|region| region.holds(at, len))
    }

    /// The user address of `at`, when all of `len` bytes lie inside one region.
    pub fn user_addr(&self, at: GuestAddr, len: u64) -> Option<UserAddr> {
        self.region_of(at, len)?;
        at.user()
    }

    /// Fills `data` from guest address `at`. The range must lie in one region.
    ///
    /// # Errors
    /// See [`SharedRegion::read`].
    pub fn read(&self, at: GuestAddr, data: &mut [u8]) -> io::Result<()> {
        self.region_holding(at, data.len())?.read(at, data)
    }

    /// Stores `data` at guest address `at`. The range must lie in one region.
    ///
    /// # Errors
    /// See [`SharedRegion::write`].
    pub fn write(&self, at: GuestAddr, data: &[u8]) -> io::Result<()> {
        self.region_holding(at, data.len())?.write(at, data)
    }

    /// Advances the ring index at guest address `at`.
    ///
    /// # Errors
    /// See [`SharedRegion::store_index`].
    pub fn store_index(&self, at: GuestAddr, index: u16) -> io::Result<()> {
        self.region_holding(at, 2)?.store_index(at, index)
    }

    fn region_holding(&self, at: GuestAddr, len: usize) -> io::Result<&SharedRegion> {
        self.region_of(at, u64::try_from(len).unwrap_or(u64::MAX)).ok_or_else(outside)
    }

    /// The guest address after the highest region.
    pub fn end(&self) -> GuestAddr {
        self.0.last().and_then(SharedRegion::end).unwrap_or(GuestAddr(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(guest: u64, size: u64) -> SharedRegion {
        let fd: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
        SharedRegion::new(GuestAddr(guest), size, Arc::new(fd), 0)
    }

    fn map(parts: &[(u64, u64)]) -> Result<MemoryMap, MapError> {
        MemoryMap::new(parts.iter().map(|&(guest, size)| region(guest, size)).collect())
    }

    #[test]
    fn regions_are_sorted_and_looked_up_by_address() {
        let map = map(&[(0x1_0000_0000, 0x2000), (0, 0x1000)]).unwrap();
        assert_eq!(map.regions()[0].guest(), GuestAddr(0));
        assert_eq!(map.end(), GuestAddr(0x1_0000_2000));
        assert_eq!(map.user_addr(GuestAddr(0), 0x1000).unwrap().raw(), USER_BIAS);
        assert_eq!(map.user_addr(GuestAddr(0x1_0000_1fff), 1).unwrap().raw(), USER_BIAS + 0x1_0000_1fff);
    }

    #[test]
    fn a_range_across_or_outside_regions_has_no_user_address() {
        let map = map(&[(0, 0x1000), (0x1000, 0x1000), (0x4000, 0x1000)]).unwrap();
        assert_eq!(map.user_addr(GuestAddr(0xfff), 2), None);
        assert_eq!(map.user_addr(GuestAddr(0x2000), 1), None);
        assert_eq!(map.user_addr(GuestAddr(0x4fff), u64::MAX), None);
        assert_eq!(map.user_addr(GuestAddr(u64::MAX), 1), None);
    }

    #[test]
    fn bad_regions_are_named() {
        assert_eq!(map(&[]).unwrap_err(), MapError::Empty);
        assert_eq!(map(&[(0, 0)]).unwrap_err(), MapError::Unaligned(GuestAddr(0)));
        assert_eq!(map(&[(0x10, 0x1000)]).unwrap_err(), MapError::Unaligned(GuestAddr(0x10)));
        assert_eq!(
            map(&[(0, 0x2000), (0x1000, 0x1000)]).unwrap_err(),
            MapError::Overlap(GuestAddr(0), GuestAddr(0x1000))
        );
        let top = u64::MAX - 0xfff;
        assert_eq!(map(&[(top, 0x1000)]).unwrap_err(), MapError::TooLarge(GuestAddr(top)));
        let above_bias = u64::MAX - USER_BIAS - 0xfff;
        assert_eq!(map(&[(above_bias, 0x2000)]).unwrap_err(), MapError::TooLarge(GuestAddr(above_bias)));
    }

    #[test]
    fn bytes_go_to_their_region_and_never_beyond_it() {
        let file: OwnedFd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 0x3000).unwrap();
        let fd = Arc::new(file);
        let region = |at, size, offset| SharedRegion::new(GuestAddr(at), size, Arc::clone(&fd), offset);
        let memory = MemoryMap::new(vec![region(0, 0x1000, 0), region(1 << 32, 0x2000, 0x1000)]).unwrap();
        memory.write(GuestAddr((1 << 32) + 0xffe), b"word").unwrap();
        memory.store_index(GuestAddr(2), 0x0102).unwrap();
        let mut data = [0; 4];
        memory.read(GuestAddr((1 << 32) + 0xffe), &mut data).unwrap();
        assert_eq!(&data, b"word");
        rustix::io::pread(&fd, &mut data, 0x1ffe).unwrap();
        assert_eq!(&data, b"word");
        memory.read(GuestAddr(0), &mut data).unwrap();
        assert_eq!(data, [0, 0, 2, 1]);
        for at in [0xffe, 0x1000, 1 << 32 | 0x1ffe, 1 << 33, u64::MAX] {
            assert!(memory.read(GuestAddr(at), &mut data).is_err(), "{at:#x}");
            assert!(memory.write(GuestAddr(at), &data).is_err(), "{at:#x}");
        }
        rustix::fs::ftruncate(&fd, 0x1000).unwrap();
        assert_eq!(
            memory.read(GuestAddr(1 << 32), &mut data).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn user_addresses_go_back_to_guest_addresses() {
        assert_eq!(UserAddr::guest_of(USER_BIAS + 5), Some(GuestAddr(5)));
        assert_eq!(UserAddr::guest_of(5), None);
    }
}
