//! vfio-user DEVICE_GET_REGION_IO_FDS: eventfds that the kernel signals for guest writes, without an exit to
//! this process.
//!
//! An entry has 40 bytes in the specification and 48 in libvfio-user, which adds a shadow. Therefore the size
//! of an entry is computed from the size of the reply. An entry outside its region, or with an fd that did
//! not come, is a fault. An entry of an unknown kind is ignored.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::client::Client;
use super::message::{Command, Fault, IoFdEntry, IoFdsHead, length, parse_front};
use super::region::RegionInfo;
use crate::peer::Error;

/// The most entries that are accepted. Each may have fds of its own.
const ENTRIES_MOST: u32 = 512;

/// The largest entry size that is accepted.
const ENTRY_MOST: usize = 256;

/// The largest reply that is accepted.
const REPLY_MOST: u32 = 32 << 10;

const DATAMATCH: u32 = 1;

/// What the kernel does at a write to a sub-region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoFdKind {
    /// Signals the eventfd. The value written is lost.
    Ioeventfd,
    /// Passes each access on as a message.
    Ioregionfd,
    /// Signals the eventfd, and stores the value written in a file.
    Shadow {
        /// The file's index among the reply's fds.
        fd: usize,
        /// First byte in the file.
        offset: u64,
    },
}

/// One sub-region of a reply, decoded. Fds are still indexes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoFdPlace {
    /// First byte in the region.
    pub offset: u64,
    /// Bytes of an access: 1, 2, 4 or 8; 0 for any.
    pub size: u64,
    /// The index among the reply's fds.
    pub fd: usize,
    /// What the kernel does at a write.
    pub kind: IoFdKind,
    /// KVM's flags: bit 0 datamatch, bit 1 port I/O.
    pub flags: u32,
    /// The only value that has an effect, when bit 0 of the flags is set.
    pub datamatch: u64,
}

impl IoFdPlace {
    /// The value that a write must have; `None` when any value has an effect.
    pub fn value(&self) -> Option<u64> {
        (self.flags & DATAMATCH != 0).then_some(self.datamatch)
    }
}

/// One sub-region with its fd.
#[derive(Clone, Debug)]
pub struct IoFd {
    /// The sub-region, decoded.
    pub place: IoFdPlace,
    /// The eventfd. Several sub-regions may share it.
    pub fd: Arc<OwnedFd>,
    /// The file of a shadow, and the first byte in it.
    pub shadow: Option<(Arc<OwnedFd>, u64)>,
}

/// Reads the payload of a DEVICE_GET_REGION_IO_FDS reply that came with `fds` fds, for region `index` of
/// `size` bytes. Drops an entry for writes that an earlier entry matches already. Pure, so that it can be
/// fuzzed.
///
/// # Errors
/// When the reply is about another region, or an entry leaves the region, the payload or the fds.
pub fn parse_io_fds(payload: &[u8], index: u32, size: u64, fds: usize) -> Result<Vec<IoFdPlace>, Fault> {
    let (head, entries) = parse_front::<IoFdsHead>(payload)?;
    if head.index != index {
        return Err(Fault::Value { field: "region", value: u64::from(head.index) });
    }
    if head.count == 0 {
        return Ok(Vec::new());
    }
    let bad_count = Fault::Value { field: "entry count", value: u64::from(head.count) };
    if head.count > ENTRIES_MOST {
        return Err(bad_count);
    }
    let listed = head.argsz.saturating_sub(length(size_of::<IoFdsHead>()));
    let entry = usize::try_from(listed.checked_div(head.count).unwrap_or(0)).unwrap_or(usize::MAX);
    if entry < size_of::<IoFdEntry>() + 8 || entry > ENTRY_MOST {
        return Err(Fault::Value { field: "entry size", value: u64::from(listed) });
    }
    let count = usize::try_from(head.count).unwrap_or(usize::MAX);
    let bytes = count.checked_mul(entry).and_then(|bytes| entries.get(..bytes)).ok_or(bad_count)?;
    let mut places: Vec<IoFdPlace> = Vec::new();
    for bytes in bytes.chunks_exact(entry) {
        let Some(place) = parse_entry(bytes, size, fds)? else { continue };
        let same = |other: &IoFdPlace| {
            (other.offset, other.size, other.value()) == (place.offset, place.size, place.value())
        };
        if !places.iter().any(same) {
            places.push(place);
        }
    }
    Ok(places)
}

fn parse_entry(bytes: &[u8], size: u64, fds: usize) -> Result<Option<IoFdPlace>, Fault> {
    let (entry, rest) = parse_front::<IoFdEntry>(bytes)?;
    let (first, rest) = parse_front::<u64>(rest)?;
    let second = parse_front::<u64>(rest).map(|(second, _)| second).ok();
    let index = |number: u32| {
        let fault = Fault::Value { field: "fd index", value: u64::from(number) };
        usize::try_from(number).ok().filter(|index| *index < fds).ok_or(fault)
    };
    let (kind, datamatch) = match (entry.kind, second) {
        (0, datamatch) => (IoFdKind::Ioeventfd, datamatch.unwrap_or(first)),
        (1, _) => (IoFdKind::Ioregionfd, first),
        (2, Some(datamatch)) => {
            (IoFdKind::Shadow { fd: index(entry.shadow_fd_index)?, offset: first }, datamatch)
        }
        _ => return Ok(None),
    };
    let fault = Fault::Value { field: "sub-region offset", value: entry.offset };
    let end = entry.offset.checked_add(entry.size).ok_or(fault)?;
    if end > size || entry.offset >= size {
        return Err(fault);
    }
    let is_access = matches!(entry.size, 0 | 1 | 2 | 4 | 8) || kind == IoFdKind::Ioregionfd;
    if !is_access {
        return Err(Fault::Value { field: "sub-region size", value: entry.size });
    }
    let fd = index(entry.fd_index)?;
    Ok(Some(IoFdPlace { offset: entry.offset, size: entry.size, fd, kind, flags: entry.flags, datamatch }))
}

impl Client {
    /// Reads the sub-regions of `region` whose writes the kernel can pass on; empty when there are none. A
    /// server that does not know the command refuses it. A server that an unknown command puts out of
    /// step is not asked.
    ///
    /// # Errors
    /// When the server refuses or fails, or its reply is impossible.
    pub fn region_io_fds(&self, region: &RegionInfo) -> Result<Vec<IoFd>, Error> {
        let command = Command::DEVICE_GET_REGION_IO_FDS;
        self.needs_extended(command)?;
        let index = region.index.0;
        let payload = |argsz| IoFdsHead { argsz, flags: 0, index, count: 0 };
        let needed = |payload: &[u8]| parse_front::<IoFdsHead>(payload).map(|(head, _)| head.argsz);
        let reply = self.ask_growing(command, (4096, REPLY_MOST), payload, needed)?;
        let places = parse_io_fds(&reply.payload, index, region.size, reply.fds.len());
        places.and_then(|places| attach(&places, reply.fds)).map_err(|fault| self.malformed(command, fault))
    }
}

fn attach(places: &[IoFdPlace], fds: Vec<OwnedFd>) -> Result<Vec<IoFd>, Fault> {
    let fds: Vec<Arc<OwnedFd>> = fds.into_iter().map(Arc::new).collect();
    let at = |index: usize| fds.get(index).cloned().ok_or(Fault::Text("an fd that is missing"));
    places
        .iter()
        .map(|place| {
            let shadow = match place.kind {
                IoFdKind::Shadow { fd, offset } => Some((at(fd)?, offset)),
                IoFdKind::Ioeventfd | IoFdKind::Ioregionfd => None,
            };
            Ok(IoFd { place: *place, fd: at(place.fd)?, shadow })
        })
        .collect()
}
