//! vfio-user DEVICE_GET_REGION_INFO, REGION_READ, REGION_WRITE, REGION_WRITE_MULTI.
//!
//! What a region claims is judged here as far as the message itself goes; what it means for a PCI device is judged
//! by the device. Capability chains are followed forward only, so that they end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::FileType;
use zerocopy::IntoBytes;

use super::client::{Client, Ticket};
use super::connection::Expected;
use super::connection::{Join, MULTI_MOST};
use super::message::{
    CapabilityHead, Command, Fault, MultiWrite, RegionAccess, RegionInfoPayload, SparseArea, SparseHead,
    length, parse, parse_front,
};
use crate::memory::PAGE;
use crate::peer::deadline::Deadline;
use crate::peer::{Cause, Error};

/// The largest reply to DEVICE_GET_REGION_INFO that is asked for.
const INFO_MOST: u32 = 64 << 10;

/// Capabilities in one chain.
const CHAIN_MOST: usize = 64;

/// Mappable areas of one region, after those that touch are joined.
const AREAS_MOST: usize = 256;

const FLAG_READ: u32 = 1;
const FLAG_WRITE: u32 = 2;
const FLAG_MMAP: u32 = 4;
const FLAG_CAPS: u32 = 8;
const CAP_SPARSE_MMAP: u16 = 1;

/// The largest number of bytes in flight for one read or write that is cut up.
const WINDOW: usize = 8;

/// Bytes of data in one message of a large write: what the kernel keeps in one piece, header included. libvfio-user reads
/// what follows a header with one call, and takes what is not there yet for lost.
const WRITE_PIECE: usize = 16 << 10;

/// Which region: as in kernel VFIO PCI, 0-5 BARs, 6 ROM, 7 configuration space, 8 VGA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionIndex(pub u32);

impl RegionIndex {
    /// The expansion ROM.
    pub const ROM: Self = Self(6);
    /// The configuration space.
    pub const CONFIG: Self = Self(7);
    /// Legacy VGA ranges.
    pub const VGA: Self = Self(8);
}

/// A part of a region that may be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Where it begins in the region.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// Where it begins in the region's file.
    pub file_offset: u64,
}

/// What a region is.
#[derive(Debug)]
pub struct RegionInfo {
    /// Which.
    pub index: RegionIndex,
    /// Bit 0 read, 1 write, 2 mmap, 3 capabilities, as the server says.
    pub flags: u32,
    /// Bytes; 0 for a region that the device does not have. Any number: nothing was allocated for it.
    pub size: u64,
    /// Where the region begins in its file.
    pub offset: u64,
    /// What may be mapped: whole pages inside the region and its file, in order, apart from each other. Empty
    /// without a file.
    pub areas: Vec<Area>,
    /// The file.
    pub fd: Option<OwnedFd>,
}

impl RegionInfo {
    /// It may be read.
    pub fn is_readable(&self) -> bool {
        self.flags & FLAG_READ != 0
    }

    /// It may be written.
    pub fn is_writable(&self) -> bool {
        self.flags & FLAG_WRITE != 0
    }
}

/// A reply to DEVICE_GET_REGION_INFO, decoded and judged, without its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionReply {
    /// Bytes that the server needs for the whole reply.
    pub argsz: u32,
    /// As in [`RegionInfo`].
    pub flags: u32,
    /// As in [`RegionInfo`].
    pub size: u64,
    /// As in [`RegionInfo`].
    pub offset: u64,
    /// The areas of sparse mmap capabilities as the server gave them; `None` without such a capability.
    pub areas: Option<Vec<(u64, u64)>>,
}

/// Reads the payload of a DEVICE_GET_REGION_INFO reply for region `index`. Pure: for fuzzing, too.
///
/// # Errors
/// When it is about another region, or its capability chain leaves the payload, turns back, or does not end.
pub fn parse_region_info(payload: &[u8], index: RegionIndex) -> Result<RegionReply, Fault> {
    let (info, _) = parse_front::<RegionInfoPayload>(payload)?;
    if info.index != index.0 {
        return Err(Fault::Value { field: "region", value: u64::from(info.index) });
    }
    let least = length(size_of::<RegionInfoPayload>());
    if info.argsz < least {
        return Err(Fault::Value { field: "argsz", value: u64::from(info.argsz) });
    }
    let whole = usize::try_from(info.argsz).is_ok_and(|argsz| argsz <= payload.len());
    // Without room for the capabilities there are none, whatever the flag says.
    let areas = if info.flags & FLAG_CAPS != 0 && whole { chain(payload, info.cap_offset)? } else { None };
    Ok(RegionReply { argsz: info.argsz, flags: info.flags, size: info.size, offset: info.offset, areas })
}

fn chain(payload: &[u8], first: u32) -> Result<Option<Vec<(u64, u64)>>, Fault> {
    let outside = |at: u32| Fault::Value { field: "capability offset", value: u64::from(at) };
    let mut areas: Option<Vec<(u64, u64)>> = None;
    let mut after = length(size_of::<RegionInfoPayload>());
    let mut next = first;
    for _ in 0..CHAIN_MOST {
        if next == 0 {
            return Ok(areas);
        }
        // Forward only, and past the head of the one before: such a chain ends.
        if next < after || !next.is_multiple_of(4) {
            return Err(outside(next));
        }
        let from =
            usize::try_from(next).ok().and_then(|at| payload.get(at..)).ok_or_else(|| outside(next))?;
        let (head, rest) = parse_front::<CapabilityHead>(from).map_err(|_| outside(next))?;
        if head.id == CAP_SPARSE_MMAP {
            let (sparse, list) = parse_front::<SparseHead>(rest).map_err(|_| outside(next))?;
            let count = usize::try_from(sparse.count).unwrap_or(usize::MAX);
            let bytes = count.checked_mul(size_of::<SparseArea>()).and_then(|bytes| list.get(..bytes));
            let fault = Fault::Value { field: "area count", value: u64::from(sparse.count) };
            let found = areas.get_or_insert_default();
            for area in bytes.ok_or(fault)?.chunks_exact(size_of::<SparseArea>()) {
                let area: SparseArea = parse(area)?;
                found.push((area.offset, area.size));
            }
        }
        after = next.saturating_add(length(size_of::<CapabilityHead>()));
        next = head.next;
    }
    Err(Fault::Text("a chain of capabilities that does not end"))
}

/// What of a region may be mapped: `areas` (the whole region when there are none) clipped to whole pages, to the
/// region and to `held` bytes of its file; in order and joined where they touch.
///
/// # Errors
/// When an area's place in the file wraps, or too many are left.
pub fn mappable(reply: &RegionReply, held: Option<u64>) -> Result<Vec<Area>, Fault> {
    let down = |number: u64| number & !(PAGE - 1);
    let wrapped = Fault::Value { field: "region offset", value: reply.offset };
    if !reply.offset.is_multiple_of(PAGE) {
        return Ok(Vec::new());
    }
    let whole = [(0, reply.size)];
    let mut parts: Vec<(u64, u64)> = Vec::new();
    for (offset, size) in reply.areas.as_deref().unwrap_or(&whole) {
        let end = offset.checked_add(*size).ok_or(wrapped)?.min(reply.size);
        reply.offset.checked_add(end).ok_or(wrapped)?;
        let end = held.map_or(end, |held| end.min(held.saturating_sub(reply.offset)));
        let begin = offset.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
        if begin < down(end) {
            parts.push((begin, down(end)));
        }
    }
    parts.sort_unstable();
    let mut areas: Vec<Area> = Vec::new();
    for (begin, end) in parts {
        match areas.last_mut() {
            Some(last) if begin <= last.offset.saturating_add(last.size) => {
                last.size = last.size.max(end.saturating_sub(last.offset));
            }
            _ => areas.push(Area {
                offset: begin,
                size: end.saturating_sub(begin),
                file_offset: reply.offset.saturating_add(begin),
            }),
        }
    }
    if areas.len() > AREAS_MOST {
        return Err(Fault::Value { field: "area count", value: areas.len() as u64 });
    }
    Ok(areas)
}

/// How much a file holds, when it is one that can be mapped; `None` for a file without an end (a device).
fn file_end(fd: BorrowedFd<'_>) -> Result<Option<u64>, Fault> {
    let stat = rustix::fs::fstat(fd).map_err(|_| Fault::Text("a file that cannot be looked at"))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(Some(u64::try_from(stat.st_size).unwrap_or(0))),
        // Nameless files of the kernel (dma-buf) have no type.
        FileType::CharacterDevice | FileType::Unknown => Ok(None),
        _ => Err(Fault::Text("a file that cannot be mapped")),
    }
}

/// What tells files apart: device and inode.
fn identity(fd: &OwnedFd) -> Option<(u64, u64)> {
    let stat = rustix::fs::fstat(fd).ok()?;
    Some((stat.st_dev, stat.st_ino))
}

/// A write of 8 bytes at most, one of several in a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SmallWrite {
    region: RegionIndex,
    offset: u64,
    data: [u8; 8],
    count: u32,
}

impl SmallWrite {
    /// `data` at `offset` of `region`; `None` when it is empty or more than 8 bytes.
    pub fn new(region: RegionIndex, offset: u64, data: &[u8]) -> Option<Self> {
        let mut bytes = [0; 8];
        bytes.get_mut(..data.len())?.copy_from_slice(data);
        let count = u32::try_from(data.len()).ok().filter(|count| *count > 0)?;
        Some(Self { region, offset, data: bytes, count })
    }

    fn wire(&self) -> MultiWrite {
        MultiWrite { offset: self.offset, region: self.region.0, count: self.count, data: self.data }
    }
}

/// A read on its way. Dropped, its reply is discarded when it comes.
#[must_use]
pub struct PendingRead {
    client: Client,
    ticket: Ticket,
    access: RegionAccess,
}

impl PendingRead {
    /// Waits for the data and stores it in `data`, which has the size that was asked for. Blocks until the deadline
    /// that began with [`Client::begin_read`].
    ///
    /// # Errors
    /// When the server refuses or fails.
    pub fn wait(self, data: &mut [u8]) -> Result<(), Error> {
        let reply = self.ticket.wait()?;
        let malformed = |fault| self.client.malformed(Command::REGION_READ, fault);
        let (access, bytes) = parse_front::<RegionAccess>(&reply.payload).map_err(malformed)?;
        check_echo(&access, &self.access).map_err(malformed)?;
        if bytes.len() != data.len() {
            let due = length(data.len());
            return Err(malformed(Fault::Size { got: length(bytes.len()), least: due, most: due }));
        }
        data.copy_from_slice(bytes);
        Ok(())
    }
}

/// A reply must be about the access that was asked for, all of it.
fn check_echo(reply: &RegionAccess, asked: &RegionAccess) -> Result<(), Fault> {
    let fields = [
        ("region", u64::from(reply.region), u64::from(asked.region)),
        ("offset", reply.offset, asked.offset),
        ("count", u64::from(reply.count), u64::from(asked.count)),
    ];
    match fields.into_iter().find(|(_, got, due)| got != due) {
        Some((field, value, _)) => Err(Fault::Value { field, value }),
        None => Ok(()),
    }
}

impl Client {
    /// What region `index` is: once more with more room when the server needs it for its capabilities.
    ///
    /// # Errors
    /// When the server refuses, fails, or says what cannot be.
    pub fn region_info(&self, index: RegionIndex) -> Result<RegionInfo, Error> {
        let command = Command::DEVICE_GET_REGION_INFO;
        let payload =
            |argsz| RegionInfoPayload { argsz, flags: 0, index: index.0, cap_offset: 0, size: 0, offset: 0 };
        let sizes = (length(size_of::<RegionInfoPayload>()), INFO_MOST);
        let needed = |payload: &[u8]| parse_region_info(payload, index).map(|info| info.argsz);
        let reply = self.ask_growing(command, sizes, payload, needed)?;
        let info = parse_region_info(&reply.payload, index);
        info.and_then(|info| judge(index, info, reply.fds)).map_err(|fault| self.malformed(command, fault))
    }

    /// Reads `data` from `offset` of `region`, in pieces when it is large. Blocks until it is there.
    ///
    /// # Errors
    /// When the server refuses or fails.
    pub fn read(&self, region: RegionIndex, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        let piece = self.transfer();
        let deadline = self.deadline();
        let mut at = offset;
        for chunk in data.chunks_mut(piece.saturating_mul(WINDOW)) {
            let mut pending = Vec::new();
            for part in chunk.chunks_mut(piece) {
                pending.push((self.begin_read_until(region, at, part.len(), deadline.clone())?, part));
                at = at.wrapping_add(length(piece).into());
            }
            for (read, part) in pending {
                read.wait(part)?;
            }
        }
        Ok(())
    }

    /// Asks for `size` bytes from `offset` of `region`, at most what one message transfers, and goes on.
    ///
    /// # Errors
    /// When the connection ended, or too much is in flight.
    pub fn begin_read(&self, region: RegionIndex, offset: u64, size: usize) -> Result<PendingRead, Error> {
        self.begin_read_until(region, offset, size, self.deadline())
    }

    /// Asks for `size` bytes from `offset` of `region`, at most what one message transfers, and goes on: neither the
    /// room in the socket nor the reply is waited for. `then` gets the data, on whatever thread reads the reply: it must
    /// not block, nor ask the server. A server that refuses or goes leaves it undone, and dropped. A server that does not
    /// read gets it after all else: the caller keeps few of these in flight.
    ///
    /// # Errors
    /// When the connection ended, or too much is in flight: then nothing was sent.
    pub fn read_then(
        &self,
        region: RegionIndex,
        offset: u64,
        size: usize,
        then: impl FnOnce(&[u8]) + Send + 'static,
    ) -> Result<(), Error> {
        let command = Command::REGION_READ;
        let access = self.access(command, region, offset, size)?;
        let most = length(size_of::<RegionAccess>()).saturating_add(access.count);
        let peer = self.peer().to_owned();
        let then = move |payload: &[u8]| match parse_front::<RegionAccess>(payload) {
            Ok((echo, bytes)) if check_echo(&echo, &access).is_ok() && bytes.len() == size => then(bytes),
            _ => log::debug!("{peer}: a reply to another {command}"),
        };
        self.begin_then(command, &[access.as_bytes()], Expected::bytes(most), Box::new(then))
    }

    fn begin_read_until(
        &self,
        region: RegionIndex,
        offset: u64,
        size: usize,
        deadline: Deadline,
    ) -> Result<PendingRead, Error> {
        let command = Command::REGION_READ;
        let access = self.access(command, region, offset, size)?;
        let most = length(size_of::<RegionAccess>()).saturating_add(access.count);
        let ticket = self.begin(command, &[access.as_bytes()], &[], Expected::bytes(most), deadline)?;
        Ok(PendingRead { client: self.clone(), ticket, access })
    }

    /// Writes `data` to `offset` of `region`, in pieces when it is large. Blocks until all is acknowledged.
    ///
    /// # Errors
    /// When the server refuses or fails.
    pub fn write(&self, region: RegionIndex, offset: u64, data: &[u8]) -> Result<(), Error> {
        let command = Command::REGION_WRITE;
        let piece = self.transfer().min(WRITE_PIECE);
        let deadline = self.deadline();
        let mut at = offset;
        for chunk in data.chunks(piece.saturating_mul(WINDOW)) {
            let mut pending = Vec::new();
            for part in chunk.chunks(piece) {
                let access = self.access(command, region, at, part.len())?;
                let expected = Expected::bytes(length(size_of::<RegionAccess>()));
                pending.push((
                    self.begin(command, &[access.as_bytes(), part], &[], expected, deadline.clone())?,
                    access,
                ));
                at = at.wrapping_add(length(piece).into());
            }
            for (ticket, access) in pending {
                let reply = ticket.wait()?;
                // Some servers say nothing more than yes.
                if !reply.payload.is_empty() {
                    let echo = parse(&reply.payload).and_then(|echo| check_echo(&echo, &access));
                    echo.map_err(|fault| self.malformed(command, fault))?;
                }
            }
        }
        Ok(())
    }

    /// Writes `data`, at most what one message transfers, and wants no reply: a failure goes unnoticed. The order
    /// among all commands of one thread is kept. Waits, until the deadline at most, only while very many of them
    /// have not gone out; with REGION_WRITE_MULTI, small ones are joined meanwhile.
    ///
    /// # Errors
    /// When the connection ended, or the server does not read.
    pub fn post_write(&self, region: RegionIndex, offset: u64, data: &[u8]) -> Result<(), Error> {
        let deadline = self.deadline();
        if let Some(write) = SmallWrite::new(region, offset, data) {
            let join = if self.version().agreed.write_multiple { Join::WhenWaiting } else { Join::Never };
            return self.shared.post(write.wire(), join, &deadline);
        }
        let command = Command::REGION_WRITE;
        let access = self.access(command, region, offset, data.len())?;
        self.shared.post_message(command, &[access.as_bytes(), data], &deadline)
    }

    /// Writes all of `writes`, in messages of up to 200. Blocks until all are acknowledged.
    ///
    /// # Errors
    /// When the server does not take REGION_WRITE_MULTI, refuses, or fails.
    pub fn write_multi(&self, writes: &[SmallWrite]) -> Result<(), Error> {
        let command = Command::REGION_WRITE_MULTI;
        let deadline = self.deadline();
        for part in self.bursts(writes)? {
            let (count, bytes) = burst(part);
            let payload = [count.as_bytes(), &bytes];
            let reply = self.ask_until(command, &payload, &[], Expected::bytes(8), &deadline)?;
            let done: u64 = parse(&reply.payload).map_err(|fault| self.malformed(command, fault))?;
            if done != count {
                let fault = Fault::Value { field: "count", value: done };
                return Err(self.malformed(command, fault));
            }
        }
        Ok(())
    }

    /// The same without a reply.
    ///
    /// # Errors
    /// When the server does not take REGION_WRITE_MULTI, or does not read, or the connection ended.
    pub fn post_write_multi(&self, writes: &[SmallWrite]) -> Result<(), Error> {
        let deadline = self.deadline();
        for part in self.bursts(writes)? {
            let (count, bytes) = burst(part);
            let payload = [count.as_bytes(), &bytes];
            self.shared.post_message(Command::REGION_WRITE_MULTI, &payload, &deadline)?;
        }
        Ok(())
    }

    fn bursts<'a>(&self, writes: &'a [SmallWrite]) -> Result<std::slice::Chunks<'a, SmallWrite>, Error> {
        if !self.version().agreed.write_multiple {
            return Err(self.error(Command::REGION_WRITE_MULTI, Cause::NotNegotiated));
        }
        Ok(writes.chunks(MULTI_MOST))
    }

    /// Bytes that one message transfers.
    fn transfer(&self) -> usize {
        usize::try_from(self.version().agreed.max_data_xfer_size).unwrap_or(usize::MAX).max(1)
    }

    fn access(
        &self,
        command: Command,
        region: RegionIndex,
        offset: u64,
        size: usize,
    ) -> Result<RegionAccess, Error> {
        let invalid = |what| Err(self.error(command, Cause::Invalid(what)));
        if size == 0 || size > self.transfer() {
            return invalid("it has no bytes, or more than one message transfers");
        }
        let count = length(size);
        if offset.checked_add(u64::from(count)).is_none() {
            return invalid("it runs past the end of the address space");
        }
        Ok(RegionAccess { offset, region: region.0, count })
    }
}

fn burst(writes: &[SmallWrite]) -> (u64, Vec<u8>) {
    let bytes = writes.iter().flat_map(|write| write.wire().as_bytes().to_vec()).collect();
    (u64::try_from(writes.len()).unwrap_or(u64::MAX), bytes)
}

/// What a whole reply and its fds make of a region.
///
/// libvfio-user sends the region's file once for each of its areas. An area whose fd is of another file than the
/// first one is not mapped: the extension by which areas have files of their own is not asked for.
fn judge(index: RegionIndex, mut reply: RegionReply, fds: Vec<OwnedFd>) -> Result<RegionInfo, Fault> {
    let most = reply.areas.as_ref().map_or(1, |areas| areas.len().max(1));
    if fds.len() > most {
        let most = u8::try_from(most).unwrap_or(u8::MAX);
        return Err(Fault::Fds { got: fds.len(), least: 0, most });
    }
    if let (Some(areas), [first, _, ..]) = (&mut reply.areas, fds.as_slice()) {
        let file = identity(first);
        let mut of_area = fds.iter();
        areas.retain(|_| file.is_some() && of_area.next().is_some_and(|fd| identity(fd) == file));
    }
    let fd = fds.into_iter().next();
    let RegionReply { flags, size, offset, .. } = reply;
    let areas = match &fd {
        Some(fd) if flags & FLAG_MMAP != 0 => mappable(&reply, file_end(fd.as_fd())?)?,
        _ => Vec::new(),
    };
    let fd = fd.filter(|_| !areas.is_empty());
    Ok(RegionInfo { index, flags, size, offset, areas, fd })
}
