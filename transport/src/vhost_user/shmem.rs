//! Virtio shared memory regions: GET_SHMEM_CONFIG, and the judgement of SHMEM_MAP and SHMEM_UNMAP.
//!
//! [`ShmemRegions`] decides whether a request is allowed. Must never map anything itself. An allowed area
//! lies inside its region and inside the pages of its file, begins on a page, and overlaps no other area. Its
//! length need not be whole pages, as with mmap: the rest of the last page is mapped, too, and shows the file
//! or zeroes.

use std::collections::BTreeMap;

use super::message::{Fault, ShmemArea, ShmemHead, parse_front};
use super::request::Request;
use super::session::Session;
use crate::memory::PAGE;
use crate::peer::Error;
use crate::peer::fds::Protection;

/// The most regions of a device: the id has 8 bits.
const REGIONS_MAX: usize = 256;

/// The most maps of a device in all its regions. Each map costs a memory slot of the machine and a
/// descriptor.
const MAPS_MAX: usize = 256;

/// Bit 0 of the flags: writable.
const WRITABLE: u64 = 1;

/// Reads the answer to GET_SHMEM_CONFIG: the size of each region by id, 0 where there is none.
pub fn parse_config(payload: &[u8]) -> Result<Vec<u64>, Fault> {
    let (head, rest): (ShmemHead, _) = parse_front(payload)?;
    let (words, odd) = rest.as_chunks::<8>();
    let mut sizes: Vec<u64> = words.iter().map(|word| u64::from_ne_bytes(*word)).collect();
    let count = sizes.iter().filter(|size| **size != 0).count();
    let told = usize::try_from(head.count).unwrap_or(usize::MAX);
    if !odd.is_empty() || sizes.len() > REGIONS_MAX || told > REGIONS_MAX || count > told {
        return Err(Fault::Value { field: "shared memory region count", value: head.count.into() });
    }
    if let Some(bad) = sizes.iter().find(|size| **size % PAGE != 0) {
        return Err(Fault::Value { field: "shared memory region of size", value: *bad });
    }
    while sizes.last() == Some(&0) {
        sizes.pop();
    }
    Ok(sizes)
}

impl Session {
    /// The sizes of the device's shared memory regions, by id. Needs SHMEM.
    pub fn shmem_config(&mut self) -> Result<Vec<u64>, Error> {
        const REQUEST: Request = Request::GET_SHMEM_CONFIG;
        let answered = self.channel.ask(REQUEST, &[], &[])?;
        parse_config(&answered.payload).map_err(|fault| self.channel.malformed(REQUEST, fault))
    }
}

/// Why a request of the backend is not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShmemFault {
    /// The device has no region with this id.
    #[error("there is no shared memory region {0}")]
    NoRegion(u8),
    /// The area is empty, does not begin on a page, or leaves its region.
    #[error("the area is empty, not page-aligned, or outside its region")]
    Outside,
    /// The area ends beyond its file.
    #[error("the area ends beyond its file")]
    BeyondFile,
    /// The file was not opened for the access that the guest gets.
    #[error("the file was not opened for that")]
    NotOpened,
    /// The area shares pages with another map.
    #[error("the area overlaps another one")]
    Overlap,
    /// The device has more maps than the machine allows.
    #[error("there are too many maps")]
    TooMany,
    /// Nothing is mapped in the area.
    #[error("nothing is mapped there")]
    NotMapped,
    /// Reserved flags are set.
    #[error("the flags {0:#x} have no meaning")]
    Flags(u64),
}

/// Where an allowed map goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The region.
    pub region: u8,
    /// First byte in the region.
    pub at: u64,
    /// Bytes, in whole pages.
    pub size: u64,
    /// First byte in the file.
    pub file_offset: u64,
    /// The access that the guest gets.
    pub protection: Protection,
}

/// The areas that are mapped in a device's shared memory regions.
#[derive(Debug, Default)]
pub struct ShmemRegions {
    sizes: Vec<u64>,
    /// Bytes of each map, by region and first byte.
    maps: BTreeMap<(u8, u64), u64>,
}

impl ShmemRegions {
    /// Regions of these sizes, by id, without any map.
    pub fn new(sizes: Vec<u64>) -> Self {
        Self { sizes, maps: BTreeMap::new() }
    }

    /// Decides whether a map of a file of `file_size` bytes is allowed, and notes it if so.
    pub fn map(&mut self, area: &ShmemArea, file_size: u64) -> Result<Placement, ShmemFault> {
        let end = self.end_inside(area)?;
        if area.flags & !WRITABLE != 0 {
            return Err(ShmemFault::Flags(area.flags));
        }
        let file_end = area.fd_offset.checked_add(area.len).ok_or(ShmemFault::BeyondFile)?;
        if !area.fd_offset.is_multiple_of(PAGE) || file_end > file_size {
            return Err(ShmemFault::BeyondFile);
        }
        let size = end.saturating_sub(area.shm_offset);
        let mut before = self.maps.range((area.shmid, 0)..(area.shmid, end));
        if before.next_back().is_some_and(|((_, at), size)| at.saturating_add(*size) > area.shm_offset) {
            return Err(ShmemFault::Overlap);
        }
        if self.maps.len() >= MAPS_MAX {
            return Err(ShmemFault::TooMany);
        }
        self.maps.insert((area.shmid, area.shm_offset), size);
        let protection =
            if area.flags & WRITABLE == 0 { Protection::ReadOnly } else { Protection::ReadWrite };
        Ok(Placement {
            region: area.shmid,
            at: area.shm_offset,
            size,
            file_offset: area.fd_offset,
            protection,
        })
    }

    /// Decides whether an unmap is allowed. If so, forgets the maps that lie wholly inside the area, and
    /// returns the first byte of each. An unmap that would cut a map in two is refused.
    pub fn unmap(&mut self, area: &ShmemArea) -> Result<Vec<u64>, ShmemFault> {
        let end = self.end_inside(area)?;
        let mut inside = Vec::new();
        for ((_, at), size) in self.maps.range((area.shmid, 0)..(area.shmid, end)) {
            let map_end = at.saturating_add(*size);
            if map_end <= area.shm_offset {
                continue;
            }
            if *at < area.shm_offset || map_end > end {
                return Err(ShmemFault::Overlap);
            }
            inside.push(*at);
        }
        if inside.is_empty() {
            return Err(ShmemFault::NotMapped);
        }
        for at in &inside {
            self.maps.remove(&(area.shmid, *at));
        }
        Ok(inside)
    }

    /// The end of the area's last page, which must lie inside the region, too.
    fn end_inside(&self, area: &ShmemArea) -> Result<u64, ShmemFault> {
        let size = self.sizes.get(usize::from(area.shmid)).filter(|size| **size > 0);
        let size = *size.ok_or(ShmemFault::NoRegion(area.shmid))?;
        let end = area.shm_offset.checked_add(area.len).and_then(|end| end.checked_next_multiple_of(PAGE));
        let end = end.filter(|end| *end <= size).ok_or(ShmemFault::Outside)?;
        if area.len == 0 || !area.shm_offset.is_multiple_of(PAGE) {
            return Err(ShmemFault::Outside);
        }
        Ok(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(shmid: u8, shm_offset: u64, len: u64) -> ShmemArea {
        ShmemArea { shmid, padding: [0; 7], fd_offset: 0, shm_offset, len, flags: 1 }
    }

    #[test]
    fn maps_lie_inside_region_and_file_and_over_nothing() {
        let mut regions = ShmemRegions::new(vec![0, 0x4000]);
        let placement = regions.map(&area(1, 0x1000, 0x2000), 0x2000).unwrap();
        assert_eq!(
            (placement.at, placement.size, placement.protection),
            (0x1000, 0x2000, Protection::ReadWrite)
        );
        let big = u64::MAX;
        for (area, fault) in [
            (area(0, 0, 0x1000), ShmemFault::NoRegion(0)),
            (area(2, 0, 0x1000), ShmemFault::NoRegion(2)),
            (area(1, 0, 0), ShmemFault::Outside),
            (area(1, 0x3000, 0x2000), ShmemFault::Outside),
            (area(1, big - 0xfff, 0x1000), ShmemFault::Outside),
            (area(1, 0x10, 0x1000), ShmemFault::Outside),
            (area(1, 0, 0x2000), ShmemFault::Overlap),
            (area(1, 0x2000, 0x1000), ShmemFault::Overlap),
            (ShmemArea { fd_offset: 0x2000, ..area(1, 0, 0x1000) }, ShmemFault::BeyondFile),
            (ShmemArea { fd_offset: big - 0xfff, ..area(1, 0, 0x1000) }, ShmemFault::BeyondFile),
            (ShmemArea { flags: 2, ..area(1, 0, 0x1000) }, ShmemFault::Flags(2)),
        ] {
            assert_eq!(regions.map(&area, 0x2000), Err(fault), "{area:?}");
        }
        assert_eq!(regions.unmap(&area(1, 0x1000, 0x1000)), Err(ShmemFault::Overlap), "cut in two");
        assert_eq!(regions.unmap(&area(1, 0, 0x4000)), Ok(vec![0x1000]));
        assert_eq!(regions.unmap(&area(1, 0, 0x4000)), Err(ShmemFault::NotMapped));
    }

    #[test]
    fn a_length_ends_where_it_likes_and_takes_its_last_page_along() {
        let mut regions = ShmemRegions::new(vec![0x4000]);
        assert_eq!(regions.map(&area(0, 0, 0x1801), 0x1800), Err(ShmemFault::BeyondFile));
        let placement = regions.map(&area(0, 0, 0x1800), 0x1800).unwrap();
        assert_eq!((placement.at, placement.size), (0, 0x2000));
        assert_eq!(regions.map(&area(0, 0x1000, 0x800), 0x1800), Err(ShmemFault::Overlap), "its last page");
        assert_eq!(regions.map(&area(0, 0x3000, 0x1001), 0x2000), Err(ShmemFault::Outside));
        assert_eq!(regions.map(&area(0, 0x3000, u64::MAX - 0x3000), 0x2000), Err(ShmemFault::Outside));
        regions.map(&area(0, 0x2000, 1), 1).unwrap();
        assert_eq!(regions.unmap(&area(0, 0, 0x800)), Err(ShmemFault::Overlap), "cut in two");
        assert_eq!(regions.unmap(&area(0, 0, 0x1800)), Ok(vec![0]));
        assert_eq!(regions.unmap(&area(0, 0x2000, 0x1000)), Ok(vec![0x2000]));
    }

    #[test]
    fn a_flood_of_maps_ends() {
        let mut regions = ShmemRegions::new(vec![1 << 30; 256]);
        for n in 0..=255 {
            regions.map(&area(n, u64::from(n) * PAGE, PAGE), PAGE).unwrap();
        }
        for n in [0, 255] {
            assert_eq!(regions.map(&area(n, 256 * PAGE, PAGE), PAGE), Err(ShmemFault::TooMany));
        }
    }

    #[test]
    fn configurations_are_judged() {
        let config = |count: u32, sizes: &[u64]| {
            let mut payload = [count, 0].map(u32::to_ne_bytes).concat();
            payload.extend(sizes.iter().flat_map(|size| size.to_ne_bytes()));
            parse_config(&payload)
        };
        assert_eq!(config(1, &[0, 0x1000, 0, 0]), Ok(vec![0, 0x1000]));
        assert_eq!(config(0, &[0; 256]), Ok(vec![]));
        assert!(config(0, &[0x1000]).is_err(), "more regions than it says");
        assert!(config(257, &[0; 256]).is_err());
        assert!(config(300, &[0x1000; 257]).is_err());
        assert!(config(1, &[0x1001]).is_err(), "not whole pages");
        assert!(parse_config(&[0; 7]).is_err());
        assert!(parse_config(&[0; 12]).is_err());
    }
}
