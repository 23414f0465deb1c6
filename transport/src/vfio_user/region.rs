//! vfio-user DEVICE_GET_REGION_INFO, REGION_READ, REGION_WRITE, REGION_WRITE_MULTI: what a region is, and
//! access to it.
//!
//! This file checks a region's description for consistency with the message and with the region's file. The
//! PCI device checks what the region means. A capability chain is followed forward only, so that every chain
//! ends.

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

/// The largest DEVICE_GET_REGION_INFO reply that is asked for, in bytes.
const INFO_MOST: u32 = 64 << 10;

/// The most capabilities in one chain.
const CHAIN_MOST: usize = 64;

/// The most mappable areas of one region, after areas that touch are joined.
const AREAS_MOST: usize = 256;

const FLAG_READ: u32 = 1;
const FLAG_WRITE: u32 = 2;
const FLAG_MMAP: u32 = 4;
const FLAG_CAPS: u32 = 8;
const CAP_SPARSE_MMAP: u16 = 1;

/// The most messages in flight for one read or write that is split into pieces.
const WINDOW: usize = 8;

/// Bytes of data in one message of a large write. The kernel delivers a message of this size, header
/// included, in one piece. libvfio-user reads the payload behind a header with one call and treats bytes that
/// have not arrived yet as lost.
const WRITE_PIECE: usize = 16 << 10;

/// A region's index, as in kernel VFIO PCI: 0-5 BARs, 6 ROM, 7 configuration space, 8 VGA.
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
    /// First byte in the region.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// First byte in the region's file.
    pub file_offset: u64,
}

/// A region's description, judged, with its file.
#[derive(Debug)]
pub struct RegionInfo {
    /// The region's index.
    pub index: RegionIndex,
    /// The server's flags: bit 0 read, 1 write, 2 mmap, 3 capabilities.
    pub flags: u32,
    /// Bytes; 0 for a region that the device does not have. The number is not bounded, as nothing is
    /// allocated for it.
    pub size: u64,
    /// First byte of the region in its file.
    pub offset: u64,
    /// The parts that may be mapped: whole pages inside the region and its file, sorted, never touching each
    /// other. Empty when the region has no file.
    pub areas: Vec<Area>,
    /// The region's file, if the server sent one.
    pub fd: Option<OwnedFd>,
}

impl RegionInfo {
    /// True when the server lets the region be read.
    pub fn is_readable(&self) -> bool {
        self.flags & FLAG_READ != 0
    }

    /// True when the server lets the region be written.
    pub fn is_writable(&self) -> bool {
        self.flags & FLAG_WRITE != 0
    }
}

/// A DEVICE_GET_REGION_INFO reply, decoded and judged, without the region's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionReply {
    /// Bytes that the server needs for a complete reply.
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

/// Reads the payload of a DEVICE_GET_REGION_INFO reply for region `index`. Pure, so that it can be fuzzed.
///
/// # Errors
/// When the reply is about another region, or its capability chain leaves the payload, turns back, or does
/// not end.
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
    // A payload shorter than `argsz` has no room for the capabilities, so the flag that announces them is
    // ignored.
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
        // Each capability must begin behind the head of the one before, so every chain ends.
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

/// Computes the mappable parts of a region: `areas` (the whole region when the reply has none) clipped to
/// whole pages, to the region and to the `held` bytes of its file. The result is sorted, and areas that touch
/// are joined.
///
/// # Errors
/// When an area's offset in the file wraps, or too many areas are left.
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

/// The number of bytes that a mappable file holds; `None` for a file without an end (a device).
fn file_end(fd: BorrowedFd<'_>) -> Result<Option<u64>, Fault> {
    let stat = rustix::fs::fstat(fd).map_err(|_| Fault::Text("a file that cannot be looked at"))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(Some(u64::try_from(stat.st_size).unwrap_or(0))),
        // Nameless files of the kernel (dma-buf) have no type.
        FileType::CharacterDevice | FileType::Unknown => Ok(None),
        _ => Err(Fault::Text("a file that cannot be mapped")),
    }
}

/// Device and inode: equal for two descriptors of the same file.
fn identity(fd: &OwnedFd) -> Option<(u64, u64)> {
    let stat = rustix::fs::fstat(fd).ok()?;
    Some((stat.st_dev, stat.st_ino))
}

/// A write of at most 8 bytes, several of which fit into one REGION_WRITE_MULTI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SmallWrite {
    region: RegionIndex,
    offset: u64,
    data: [u8; 8],
    count: u32,
}

impl SmallWrite {
    /// A write of `data` at `offset` of `region`; `None` when `data` is empty or longer than 8 bytes.
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

/// A read that was sent and not yet answered. When it is dropped, its reply is discarded on arrival.
#[must_use]
pub struct PendingRead {
    client: Client,
    ticket: Ticket,
    access: RegionAccess,
}

impl PendingRead {
    /// Waits for the reply and stores the bytes in `data`, whose length must be the size that was asked for.
    /// Blocks until the deadline that began with [`Client::begin_read`].
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

/// Checks that a reply is about exactly the access that was asked for.
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
    /// Reads the description of region `index`. Asks once more, with more room, when the server needs it for
    /// capabilities.
    ///
    /// # Errors
    /// When the server refuses or fails, or its description is not possible.
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

    /// Reads `data.len()` bytes from `offset` of `region`, in several messages when they are many. Blocks
    /// until all came.
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

    /// Sends a read of `size` bytes from `offset` of `region`, at most as many as one message transfers. Does
    /// not wait for the reply: [`PendingRead::wait`] does.
    ///
    /// # Errors
    /// When the connection has ended, or too much is in flight.
    pub fn begin_read(&self, region: RegionIndex, offset: u64, size: usize) -> Result<PendingRead, Error> {
        self.begin_read_until(region, offset, size, self.deadline())
    }

    /// Sends a read of `size` bytes from `offset` of `region`, at most as many as one message transfers.
    /// Waits neither for room in the socket nor for the reply.
    ///
    /// `then` is called with the data on the thread that reads the reply. It must not block and must not send
    /// a command to the server. When the server refuses, or the connection ends, `then` is dropped without
    /// being called. The command waits behind all earlier messages when the server does not read, so the
    /// caller must keep only a few of these in flight.
    ///
    /// # Errors
    /// When the connection has ended, or too much is in flight. Nothing was sent then.
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

    /// Writes `data` to `offset` of `region`, in several messages when it is long. Blocks until all are
    /// acknowledged.
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
                // Some servers reply without a payload.
                if !reply.payload.is_empty() {
                    let echo = parse(&reply.payload).and_then(|echo| check_echo(&echo, &access));
                    echo.map_err(|fault| self.malformed(command, fault))?;
                }
            }
        }
        Ok(())
    }

    /// Writes `data`, at most as much as one message transfers, and asks for no reply: a failure of the write
    /// goes unnoticed. Commands of one thread stay in order. The call waits, until the deadline at most, only
    /// while very many bytes wait for room in the socket. Meanwhile small writes are joined into
    /// REGION_WRITE_MULTI where the server takes it.
    ///
    /// # Errors
    /// When the connection has ended, or the server does not read.
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

    /// Writes all of `writes`, at most 200 in one message. Blocks until all messages are acknowledged.
    ///
    /// # Errors
    /// When the server does not take REGION_WRITE_MULTI, refuses it, or fails.
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

    /// As [`Client::write_multi`], but asks for no reply.
    ///
    /// # Errors
    /// When the server does not take REGION_WRITE_MULTI or does not read, or the connection has ended.
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

    /// The most bytes that one message transfers.
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

/// Makes a [`RegionInfo`] of a complete reply and its fds.
///
/// libvfio-user sends the region's file once for each of its areas. An area whose fd belongs to another file
/// than the first fd is not mapped: we do not ask for the extension by which areas have files of their own.
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
