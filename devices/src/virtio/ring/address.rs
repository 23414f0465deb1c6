//! Virtio 1.2 §6.1, VIRTIO_F_ACCESS_PLATFORM: a device whose addresses are I/O virtual addresses, and the
//! translations that its backend is told. Translates the driver's addresses to guest addresses; must never
//! return an address outside guest memory.

use std::str::FromStr;

use transport::memory::{GuestAddr, Iova, MemoryMap};
use transport::vhost_user::IovaMap;
use transport::vhost_user::iotlb::{Access, IovaRange};

/// How the I/O virtual addresses of a device relate to guest addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Iommu {
    /// They are the guest addresses. Stock drivers use these on a machine whose description has no IOMMU.
    Identity,
    /// They are guest addresses with the pieces of each memory region in reverse order. This tests backends,
    /// and needs a driver that knows of the order.
    Shuffled,
}

/// The word names no [`Iommu`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an IOMMU is `identity` or `shuffled`, not `{0}`")]
pub struct NoIommu(String);

impl FromStr for Iommu {
    type Err = NoIommu;

    fn from_str(text: &str) -> Result<Self, NoIommu> {
        match text {
            "identity" => Ok(Self::Identity),
            "shuffled" => Ok(Self::Shuffled),
            _ => Err(NoIommu(text.to_owned())),
        }
    }
}

/// The least size of a shuffled piece.
const PIECE: u64 = 2 << 20;
/// The most pieces: each is a message when the device starts.
const PIECES: u64 = 256;

impl Iommu {
    /// The translations for all of `memory`.
    #[must_use]
    pub fn map(self, memory: &MemoryMap) -> IovaMap {
        let identity = IovaMap::identity(memory);
        match self {
            Self::Identity => identity,
            Self::Shuffled => IovaMap::new(shuffle(memory), memory).unwrap_or(identity),
        }
    }
}

/// Bytes of each piece of `memory`.
#[must_use]
pub fn piece(memory: &MemoryMap) -> u64 {
    let total: u64 = memory.regions().iter().fold(0, |sum, region| sum.saturating_add(region.size()));
    total.div_ceil(PIECES).checked_next_power_of_two().map_or(u64::MAX, |piece| piece.max(PIECE))
}

fn shuffle(memory: &MemoryMap) -> Vec<IovaRange> {
    let piece = piece(memory);
    let mut ranges = Vec::new();
    for region in memory.regions() {
        let count = region.size().checked_div(piece).unwrap_or(0);
        let range = |from: u64, to: u64, size| IovaRange {
            iova: Iova(region.guest().0.saturating_add(from)),
            guest: GuestAddr(region.guest().0.saturating_add(to)),
            size,
            access: Access::ReadWrite,
        };
        let place = |number: u64| number.saturating_mul(piece);
        ranges.extend((0..count).map(|n| range(place(n), place(count.saturating_sub(n + 1)), piece)));
        // The rest behind the last whole piece has no counterpart, and keeps its addresses.
        let rest = region.size().saturating_sub(place(count));
        ranges.extend((rest > 0).then(|| range(place(count), place(count), rest)));
    }
    ranges
}

/// Where the addresses that a driver writes into registers lead.
#[derive(Debug, Clone, Copy)]
pub struct Space<'a> {
    /// Guest memory.
    pub memory: &'a MemoryMap,
    /// The translations from the driver's addresses to guest addresses; `None` when both are the same.
    pub translations: Option<&'a IovaMap>,
}

impl<'a> From<&'a MemoryMap> for Space<'a> {
    fn from(memory: &'a MemoryMap) -> Self {
        Self { memory, translations: None }
    }
}

impl Space<'_> {
    /// The guest address that the driver's address `at` means; `None` unless all of `length` bytes lie in one
    /// piece of guest memory.
    #[must_use]
    pub fn guest(&self, at: GuestAddr, length: u64) -> Option<GuestAddr> {
        let at = match self.translations {
            None => at,
            Some(map) => map.translate(Iova(at.0), length)?,
        };
        self.memory.region_of(at, length).map(|_| at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use transport::memory::SharedRegion;

    const MIB: u64 = 1 << 20;

    fn memory(parts: &[(u64, u64)]) -> MemoryMap {
        let fd = Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        let region = |&(at, size)| SharedRegion::new(GuestAddr(at), size, Arc::clone(&fd), 0);
        MemoryMap::new(parts.iter().map(region).collect()).unwrap()
    }

    #[test]
    fn shuffled_addresses_are_the_pieces_in_reverse_and_shuffling_twice_is_no_change() {
        let memory = memory(&[(0, 8 * MIB), (4096 * MIB, 6 * MIB)]);
        assert_eq!(piece(&memory), 2 * MIB);
        let map = Iommu::Shuffled.map(&memory);
        let to = |at: u64| map.translate(Iova(at), 1).map(|at| at.0);
        assert_eq!((to(0), to(2 * MIB + 5), to(7 * MIB)), (Some(6 * MIB), Some(4 * MIB + 5), Some(MIB)));
        assert_eq!(to(4096 * MIB), Some(4100 * MIB));
        assert_eq!(to(8 * MIB), None);
        for at in (0..8 * MIB).step_by(0x1000) {
            assert_eq!(to(to(at).unwrap()), Some(at));
        }
    }

    #[test]
    fn large_memory_has_large_pieces_and_what_is_left_over_stays() {
        let memory = memory(&[(0, 3072 * MIB), (4096 * MIB, 6 * MIB)]);
        assert_eq!(piece(&memory), 16 * MIB);
        let map = Iommu::Shuffled.map(&memory);
        assert_eq!(map.translate(Iova(0), 16 * MIB), Some(GuestAddr(3056 * MIB)));
        assert_eq!(map.translate(Iova(4098 * MIB), 4 * MIB), Some(GuestAddr(4098 * MIB)));
    }

    #[test]
    fn space_leads_into_memory_or_nowhere() {
        let memory = memory(&[(0, 8 * MIB)]);
        let plain = Space::from(&memory);
        assert_eq!(plain.guest(GuestAddr(5), 10), Some(GuestAddr(5)));
        assert_eq!(plain.guest(GuestAddr(8 * MIB - 1), 2), None);
        let map = Iommu::Shuffled.map(&memory);
        let space = Space { translations: Some(&map), ..plain };
        assert_eq!(space.guest(GuestAddr(5), 10), Some(GuestAddr(6 * MIB + 5)));
        assert_eq!(space.guest(GuestAddr(2 * MIB - 1), 2), None, "two pieces");
        assert_eq!("both".parse::<Iommu>(), Err(NoIommu("both".into())));
    }
}
