//! vhost-user "IOMMU support": the I/O virtual addresses of a backend whose driver accepted ACCESS_PLATFORM.
//!
//! The ranges of an [`IovaMap`] are announced when the device starts, and misses are answered from it. Must
//! never answer an access outside the map, or one that the map does not allow.

use zerocopy::IntoBytes;

use super::backend_requests::Refused;
use super::channel::Channel;
use super::describe::{self, Fields};
use super::message::{Header, Iotlb, length};
use super::request::Request;
use crate::memory::{GuestAddr, Iova, MemoryMap, SharedRegion, UserAddr};
use crate::peer::Error;
use crate::peer::deadline::Deadline;
use crate::peer::fds;
use crate::peer::{Direction, Peer, Trace};

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

const MISS: u8 = 1;
pub(super) const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;

/// The most ranges of a map. Each one costs an exchange when the device starts.
const RANGES_MAX: usize = 1024;

/// The access that a device has to a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Access {
    /// Reads only.
    Read = 1,
    /// Writes only.
    Write = 2,
    /// Both.
    ReadWrite = 3,
}

impl Access {
    fn bits(self) -> u8 {
        match self {
            Self::Read => 1,
            Self::Write => 2,
            Self::ReadWrite => 3,
        }
    }
}

/// A range of I/O virtual addresses and the guest memory behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IovaRange {
    /// The first I/O virtual address.
    pub iova: Iova,
    /// Bytes.
    pub size: u64,
    /// The guest address of the first I/O virtual address.
    pub guest: GuestAddr,
    /// The access that the device has.
    pub access: Access,
}

/// Why ranges do not form a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IovaFault {
    /// There are more ranges than can be announced before the deadline.
    #[error("there are more than 1024 ranges of I/O virtual addresses")]
    TooMany,
    /// A range is empty, wraps, or leaves guest memory.
    #[error("the range of I/O virtual addresses at {0:#x} is empty or leaves guest memory")]
    Outside(u64),
    /// Two ranges share addresses.
    #[error("two ranges of I/O virtual addresses overlap at {0:#x}")]
    Overlap(u64),
}

/// All translations of a device, shared by the threads that need them. The map changes when guest memory is
/// added or removed.
///
/// Its lock is held briefly, and no other component is called while it is held.
#[derive(Debug)]
pub struct IovaMap(RwLock<Translations>);

#[derive(Debug)]
struct Translations {
    /// Sorted by address.
    ranges: Vec<IovaRange>,
    /// The regions of memory that the ranges refer to, by first guest address and size.
    known: Vec<(GuestAddr, u64)>,
}

fn extent(region: &SharedRegion) -> (GuestAddr, u64) {
    (region.guest(), region.size())
}

fn identity(region: &SharedRegion) -> IovaRange {
    let (guest, size) = extent(region);
    IovaRange { iova: Iova(guest.raw()), size, guest, access: Access::ReadWrite }
}

impl IovaMap {
    /// A map in which each guest address is its own I/O virtual address.
    pub fn identity(memory: &MemoryMap) -> Self {
        Self::of(memory.regions().iter().map(identity).collect(), memory)
    }

    fn of(ranges: Vec<IovaRange>, memory: &MemoryMap) -> Self {
        let known = memory.regions().iter().map(extent).collect();
        Self(RwLock::new(Translations { ranges, known }))
    }

    /// Checks and sorts `ranges`. All of them must lie inside `memory`.
    pub fn new(mut ranges: Vec<IovaRange>, memory: &MemoryMap) -> Result<Self, IovaFault> {
        if ranges.len() > RANGES_MAX {
            return Err(IovaFault::TooMany);
        }
        ranges.sort_by_key(|range| range.iova);
        for range in &ranges {
            let inside = memory.user_addr(range.guest, range.size).is_some();
            if range.size == 0 || range.iova.0.checked_add(range.size).is_none() || !inside {
                return Err(IovaFault::Outside(range.iova.0));
            }
        }
        check_overlap(&ranges)?;
        Ok(Self::of(ranges, memory))
    }

    /// All ranges, sorted by address.
    pub fn ranges(&self) -> Vec<IovaRange> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).ranges.clone()
    }

    /// Adds an identity range for a region of memory that was added. Returns the range, which the caller must
    /// announce to the backend; `None` when the region was known before.
    ///
    /// # Errors
    /// When the addresses of the region are in use, or there are too many ranges.
    pub fn add(&self, region: &SharedRegion) -> Result<Option<IovaRange>, IovaFault> {
        let mut now = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if now.known.contains(&extent(region)) {
            return Ok(None);
        }
        if now.ranges.len() >= RANGES_MAX {
            return Err(IovaFault::TooMany);
        }
        let range = identity(region);
        let mut ranges = now.ranges.clone();
        ranges.push(range);
        ranges.sort_by_key(|range| range.iova);
        check_overlap(&ranges)?;
        now.ranges = ranges;
        now.known.push(extent(region));
        Ok(Some(range))
    }

    /// Removes the ranges of all regions that are not in `memory`, and returns those ranges.
    pub fn keep(&self, memory: &MemoryMap) -> Vec<IovaRange> {
        let mut now = self.0.write().unwrap_or_else(PoisonError::into_inner);
        now.known.retain(|known| memory.regions().iter().any(|region| extent(region) == *known));
        let (stay, gone) = std::mem::take(&mut now.ranges)
            .into_iter()
            .partition(|range| memory.user_addr(range.guest, range.size).is_some());
        now.ranges = stay;
        gone
    }

    /// Makes the map match `memory` without telling a backend.
    ///
    /// # Errors
    /// As [`IovaMap::add`].
    pub fn follow(&self, memory: &MemoryMap) -> Result<(), IovaFault> {
        drop(self.keep(memory));
        memory.regions().iter().try_for_each(|region| self.add(region).map(drop))
    }

    /// The guest address for `at`, when all of `bytes` lie inside one range.
    pub fn translate(&self, at: Iova, bytes: u64) -> Option<GuestAddr> {
        let range = self.range(at)?;
        let inside = at.0.checked_sub(range.iova.0)?;
        if inside.checked_add(bytes)? > range.size {
            return None;
        }
        range.guest.checked_add(inside)
    }

    /// The ranges, with ranges that touch joined into one.
    fn spans(&self) -> Vec<(Iova, u64)> {
        let mut spans: Vec<(Iova, u64)> = Vec::new();
        for range in self.ranges() {
            match spans.last_mut() {
                Some((at, size)) if at.0.checked_add(*size) == Some(range.iova.0) => {
                    *size = size.saturating_add(range.size);
                }
                _ => spans.push((range.iova, range.size)),
            }
        }
        spans
    }

    fn range(&self, at: Iova) -> Option<IovaRange> {
        let now = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let holds =
            |range: &&IovaRange| at.0.checked_sub(range.iova.0).is_some_and(|inside| inside < range.size);
        now.ranges.iter().find(holds).copied()
    }

    /// The update that answers a miss; `None` when the access is not allowed, or the message is not a miss.
    pub fn answer(&self, miss: &Iotlb) -> Option<Iotlb> {
        let range = self.range(Iova(miss.iova))?;
        let wanted = miss.permission & 3;
        if miss.kind != MISS || wanted & !range.access.bits() != 0 {
            return None;
        }
        update(&range)
    }
}

fn check_overlap(sorted: &[IovaRange]) -> Result<(), IovaFault> {
    for (low, high) in sorted.iter().zip(sorted.iter().skip(1)) {
        if low.iova.0.saturating_add(low.size) > high.iova.0 {
            return Err(IovaFault::Overlap(high.iova.0));
        }
    }
    Ok(())
}

pub(super) fn update(range: &IovaRange) -> Option<Iotlb> {
    let user = range.guest.raw().checked_add(crate::memory::USER_BIAS)?;
    debug_assert!(UserAddr::guest_of(user) == Some(range.guest));
    Some(Iotlb {
        iova: range.iova.0,
        size: range.size,
        user,
        permission: range.access.bits(),
        kind: UPDATE,
        padding: [0; 6],
    })
}

/// Announces every range to the backend.
pub(super) fn announce(channel: &mut Channel, map: &IovaMap, deadline: &Deadline) -> Result<(), Error> {
    for message in map.ranges().iter().filter_map(update) {
        channel.exchange(Request::IOTLB_MSG, message.as_bytes(), &[], deadline)?;
    }
    Ok(())
}

/// Invalidates every translation. A backend that dropped its translations already may refuse.
pub(super) fn revoke(channel: &mut Channel, map: &IovaMap, deadline: &Deadline) -> Result<(), Error> {
    for (at, size) in map.spans() {
        let message = invalidation(at, size);
        match channel.exchange(Request::IOTLB_MSG, message.as_bytes(), &[], deadline) {
            Err(error) if error.is_fatal() => return Err(error),
            Ok(_) | Err(_) => {}
        }
    }
    Ok(())
}

pub(super) fn invalidation(at: Iova, size: u64) -> Iotlb {
    Iotlb { iova: at.0, size, user: 0, permission: 0, kind: INVALIDATE, padding: [0; 6] }
}

/// Answers IOTLB misses on the main connection while another thread may wait there. Never waits itself.
///
/// An answer is one small message, sent with one `sendmsg`, without need_reply. Therefore it neither splits a
/// message of the other thread nor adds an answer to those that thread receives.
pub struct MissAnswers {
    pub(super) socket: UnixStream,
    pub(super) peer: Peer,
    pub(super) trace: Option<Arc<dyn Trace>>,
    pub(super) map: Arc<IovaMap>,
    pub(super) translating: Arc<AtomicBool>,
}

impl MissAnswers {
    /// Answers `message` on the main connection, if it is a miss and may be answered now.
    pub fn answer(&self, message: &Iotlb) -> Result<(), Refused> {
        let update = self.map.answer(message).filter(|_| self.translating.load(Ordering::Acquire));
        let Some(update) = update else {
            let Iotlb { iova, permission, kind, .. } = *message;
            let peer = &self.peer;
            log::debug!("{peer}: no translation of {iova:#x} (access {permission}, kind {kind})");
            return Err(Refused);
        };
        let header = Header::request(Request::IOTLB_MSG.0, length(size_of::<Iotlb>()));
        let bytes = [header.as_bytes(), update.as_bytes()].concat();
        let fields = Fields { direction: Direction::Request, header, payload: update.as_bytes() };
        describe::show(self.trace.as_ref(), &self.peer, &fields, 0, Duration::ZERO);
        match fds::send(self.socket.as_fd(), &bytes, &[]) {
            Ok(sent) if sent == bytes.len() => Ok(()),
            // The backend does not read the answer to its own miss. It will report the miss again.
            Ok(_) | Err(_) => Err(Refused),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::USER_BIAS;

    fn memory() -> MemoryMap {
        let fd = Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        MemoryMap::new(vec![SharedRegion::new(GuestAddr(0), 0x10_0000, fd, 0)]).unwrap()
    }

    fn range(iova: u64, size: u64, guest: u64, access: Access) -> IovaRange {
        IovaRange { iova: Iova(iova), size, guest: GuestAddr(guest), access }
    }

    fn miss(iova: u64, permission: u8) -> Iotlb {
        Iotlb { iova, size: 0, user: 0, permission, kind: MISS, padding: [0; 6] }
    }

    #[test]
    fn a_shuffled_map_translates_inside_its_ranges_only() {
        let ranges =
            vec![range(0x8000, 0x1000, 0, Access::Read), range(0x4000, 0x2000, 0x5000, Access::ReadWrite)];
        let map = IovaMap::new(ranges, &memory()).unwrap();
        assert_eq!(map.translate(Iova(0x4010), 0x10), Some(GuestAddr(0x5010)));
        assert_eq!(map.translate(Iova(0x5fff), 2), None);
        assert_eq!(map.translate(Iova(0x3fff), 1), None);
        assert_eq!(map.translate(Iova(0x4000), u64::MAX), None);
        let update = map.answer(&miss(0x8123, 1)).unwrap();
        assert_eq!((update.iova, update.size, update.user), (0x8000, 0x1000, USER_BIAS));
        assert_eq!((update.permission, update.kind), (1, UPDATE));
        assert_eq!(map.answer(&miss(0x8123, 2)), None, "a write where only reads are allowed");
        assert_eq!(map.answer(&miss(0x9000, 1)), None);
        assert_eq!(map.answer(&Iotlb { kind: 4, ..miss(0x8123, 1) }), None);
    }

    #[test]
    fn a_map_follows_memory_that_comes_and_goes_and_keeps_what_it_was_made_of() {
        let fd: Arc<std::os::fd::OwnedFd> = Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        let region = |at: u64| SharedRegion::new(GuestAddr(at), 0x10_0000, Arc::clone(&fd), 0);
        let memory = |at: &[u64]| MemoryMap::new(at.iter().map(|at| region(*at)).collect()).unwrap();
        // The second region has no range, on purpose.
        let two = memory(&[0, 0x10_0000]);
        let map = IovaMap::new(vec![range(0x8000, 0x1000, 0, Access::Read)], &two).unwrap();
        map.follow(&two).unwrap();
        assert_eq!(map.ranges(), [range(0x8000, 0x1000, 0, Access::Read)]);
        let came = map.add(&region(1 << 32)).unwrap();
        assert_eq!(came, Some(range(1 << 32, 0x10_0000, 1 << 32, Access::ReadWrite)));
        assert_eq!(map.add(&region(1 << 32)), Ok(None), "it is there");
        assert_eq!(map.translate(Iova(1 << 32), 0x10_0000), Some(GuestAddr(1 << 32)));
        assert_eq!(map.keep(&two), Vec::from_iter(came));
        assert_eq!(map.translate(Iova(1 << 32), 1), None);
        map.follow(&memory(&[0x20_0000])).unwrap();
        assert_eq!(map.ranges(), [range(0x20_0000, 0x10_0000, 0x20_0000, Access::ReadWrite)]);
        let taken = IovaMap::new(vec![range(1 << 32, 0x1000, 0, Access::Read)], &two).unwrap();
        assert_eq!(taken.add(&region(1 << 32)), Err(IovaFault::Overlap(1 << 32)));
        assert_eq!(taken.ranges().len(), 1);
    }

    #[test]
    fn bad_ranges_are_refused() {
        let make = |ranges| IovaMap::new(ranges, &memory()).map(|_| ());
        let rw = Access::ReadWrite;
        assert_eq!(make(vec![range(0, 0, 0, rw)]), Err(IovaFault::Outside(0)));
        assert_eq!(make(vec![range(u64::MAX, 2, 0, rw)]), Err(IovaFault::Outside(u64::MAX)));
        assert_eq!(make(vec![range(0, 0x1000, 0xf_f001, rw)]), Err(IovaFault::Outside(0)));
        let twice = vec![range(0, 0x1000, 0, rw), range(0xfff, 0x1000, 0, rw)];
        assert_eq!(make(twice), Err(IovaFault::Overlap(0xfff)));
        assert_eq!(make(vec![range(0, 1, 0, rw); 1025]), Err(IovaFault::TooMany));
    }
}
