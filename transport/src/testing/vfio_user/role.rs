//! The normal role of a vfio-user server: how it executes each command, as the specification says.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use zerocopy::{FromBytes, IntoBytes};

use super::script::Offer;
use crate::vfio_user::message::{
    CapabilityHead, Command, DeviceInfoPayload, DmaMap, DmaUnmap, FeatureHead, Header, IoFdEntry, IoFdsHead,
    IrqInfoPayload, LoggingReport, LoggingStart, MigrationData, MigrationStatePayload, MultiWrite,
    RegionAccess, RegionInfoPayload, SetIrqs, SparseArea, SparseHead, length, parse, parse_front,
};

const EINVAL: u32 = 22;
const ENOENT: u32 = 2;
const EEXIST: u32 = 17;
const ENOTSUP: u32 = 95;

/// A message.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) header: Header,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// A reply before it is sent.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) due: bool,
    pub(super) header: Header,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<Arc<OwnedFd>>,
}

impl Reply {
    pub(super) fn bytes(&self) -> Vec<u8> {
        [self.header.as_bytes(), &self.payload].concat()
    }

    pub(super) fn borrowed(&self) -> Vec<BorrowedFd<'_>> {
        self.fds.iter().map(|fd| fd.as_fd()).collect()
    }
}

/// A command as the server saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The command.
    pub command: Command,
    /// Its flags.
    pub flags: u32,
    /// Its payload.
    pub payload: Vec<u8>,
    /// How many fds came with it.
    pub fds: usize,
}

/// The state of a scripted server.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) offer: Offer,
    pub(super) seen: Vec<Seen>,
    pub(super) breaches: Vec<String>,
    pub(super) maps: Vec<(u64, u64, Option<OwnedFd>)>,
    /// Index, number, eventfd.
    pub(super) vectors: Vec<(u32, u32, OwnedFd)>,
    pub(super) resets: u32,
    pub(super) migration: u32,
    pub(super) saved: usize,
    pub(super) loaded: Vec<u8>,
    pub(super) sockets: Vec<UnixStream>,
    pub(super) twin: Option<UnixStream>,
    pub(super) stopping: bool,
}

type Answered = Result<(Vec<u8>, Vec<Arc<OwnedFd>>), u32>;

fn bytes(payload: impl IntoBytes + zerocopy::Immutable) -> Answered {
    Ok((payload.as_bytes().to_vec(), Vec::new()))
}

fn nothing() -> Answered {
    Ok((Vec::new(), Vec::new()))
}

fn read<T: FromBytes>(payload: &[u8]) -> Result<T, u32> {
    parse(payload).map_err(|_| EINVAL)
}

fn read_front<T: FromBytes>(payload: &[u8]) -> Result<(T, &[u8]), u32> {
    parse_front(payload).map_err(|_| EINVAL)
}

impl State {
    /// Records the command in `frame`, executes it unless it is to be refused, and makes the reply.
    pub(super) fn take(&mut self, frame: Frame, refusal: Option<u32>) -> Reply {
        let Frame { header, payload, fds } = frame;
        let command = Command(header.command);
        if self.seen.is_empty() && command != Command::VERSION {
            self.breaches.push(format!("{command} before VERSION"));
        }
        let seen = Seen { command, flags: header.flags, payload: payload.clone(), fds: fds.len() };
        self.seen.push(seen);
        let due = header.flags & 0x10 == 0;
        match refusal.map_or_else(|| self.perform(command, &payload, fds), Err) {
            Ok((payload, fds)) => {
                Reply { due, header: Header::reply(&header, length(payload.len())), payload, fds }
            }
            Err(errno) => {
                let header = Header::error_reply(&header, errno);
                Reply { due, header, payload: Vec::new(), fds: Vec::new() }
            }
        }
    }

    fn perform(&mut self, command: Command, payload: &[u8], fds: Vec<OwnedFd>) -> Answered {
        if !fds.is_empty() && !matches!(command, Command::DMA_MAP | Command::DEVICE_SET_IRQS) {
            self.breaches.push(format!("{command} with {} fds", fds.len()));
        }
        match command {
            Command::VERSION => Ok(self.version()),
            Command::DMA_MAP => self.dma_map(payload, fds),
            Command::DMA_UNMAP => {
                let unmap: DmaUnmap = read(payload)?;
                let held = |map: &(u64, u64, Option<OwnedFd>)| (map.0, map.1) == (unmap.address, unmap.size);
                let at = self.maps.iter().position(held).ok_or(ENOENT)?;
                self.maps.remove(at);
                bytes(unmap)
            }
            Command::DEVICE_GET_INFO => bytes(DeviceInfoPayload {
                argsz: 16,
                flags: self.offer.flags,
                regions: length(self.offer.regions.len()),
                irqs: length(self.offer.irqs.len()),
            }),
            Command::DEVICE_GET_REGION_INFO => self.region_info(payload),
            Command::DEVICE_GET_REGION_IO_FDS => self.io_fds(payload),
            Command::DEVICE_GET_IRQ_INFO => {
                let ask: IrqInfoPayload = read(payload)?;
                let index = usize::try_from(ask.index).unwrap_or(usize::MAX);
                let count = *self.offer.irqs.get(index).ok_or(EINVAL)?;
                bytes(IrqInfoPayload { flags: 1, count, ..ask })
            }
            Command::DEVICE_SET_IRQS => self.set_irqs(payload, fds),
            Command::REGION_READ => {
                let access: RegionAccess = read(payload)?;
                let data = self.memory(&access)?.to_vec();
                Ok(([access.as_bytes(), &data].concat(), Vec::new()))
            }
            Command::REGION_WRITE => {
                let (access, data) = read_front::<RegionAccess>(payload)?;
                let place = self.memory(&access)?;
                if place.len() != data.len() {
                    return Err(EINVAL);
                }
                place.copy_from_slice(data);
                bytes(access)
            }
            Command::REGION_WRITE_MULTI => self.write_multi(payload),
            Command::DEVICE_RESET => {
                self.resets = self.resets.saturating_add(1);
                nothing()
            }
            Command::DEVICE_FEATURE => self.feature(payload),
            Command::MIG_DATA_READ => {
                let ask: MigrationData = read(payload)?;
                let most = usize::try_from(ask.size).unwrap_or(usize::MAX);
                let rest = self.offer.state.get(self.saved..).unwrap_or_default();
                let data = rest.get(..most).unwrap_or(rest);
                self.saved = self.saved.saturating_add(data.len());
                let head =
                    MigrationData { argsz: length(data.len()).saturating_add(8), size: length(data.len()) };
                // Padded, as in replies of libvfio-user.
                Ok(([head.as_bytes(), data, &[0; 8]].concat(), Vec::new()))
            }
            Command::MIG_DATA_WRITE => {
                let (_, data) = read_front::<MigrationData>(payload)?;
                self.loaded.extend_from_slice(data);
                nothing()
            }
            _ => Err(ENOTSUP),
        }
    }

    fn version(&mut self) -> (Vec<u8>, Vec<Arc<OwnedFd>>) {
        let mut capabilities = self.offer.capabilities.clone();
        let mut fds = Vec::new();
        if self.offer.twin
            && let Ok((ours, theirs)) = UnixStream::pair()
        {
            let comma = if capabilities.is_empty() { "" } else { "," };
            capabilities += &format!("{comma}\"twin_socket\":{{\"supported\":true,\"fd_index\":0}}");
            if let Ok(clone) = ours.try_clone() {
                self.sockets.push(clone);
            }
            self.twin = Some(ours);
            fds.push(Arc::new(OwnedFd::from(theirs)));
        }
        let text = format!("{{\"capabilities\":{{{capabilities}}}}}\0");
        let (major, minor) = self.offer.version;
        ([&major.to_ne_bytes(), &minor.to_ne_bytes(), text.as_bytes()].concat(), fds)
    }

    fn dma_map(&mut self, payload: &[u8], mut fds: Vec<OwnedFd>) -> Answered {
        let map: DmaMap = read(payload)?;
        let end = map.address.checked_add(map.size).ok_or(EINVAL)?;
        if map.flags & !3 != 0 || map.size == 0 || (map.address | map.size | map.offset) & 0xfff != 0 {
            self.breaches.push(format!("{map:?}"));
        }
        if self.maps.iter().any(|(at, size, _)| map.address < at.saturating_add(*size) && *at < end) {
            return Err(EEXIST);
        }
        self.maps.push((map.address, map.size, fds.pop()));
        if !fds.is_empty() {
            self.breaches.push("DMA_MAP with more than one fd".to_owned());
        }
        nothing()
    }

    fn region_info(&self, payload: &[u8]) -> Answered {
        let ask: RegionInfoPayload = read(payload)?;
        let index = usize::try_from(ask.index).unwrap_or(usize::MAX);
        let region = self.offer.regions.get(index).ok_or(EINVAL)?;
        let mut info = RegionInfoPayload {
            argsz: 32,
            flags: region.flags,
            size: region.size,
            offset: region.offset,
            ..ask
        };
        let mut capability = Vec::new();
        if let Some(areas) = &region.areas {
            info.flags |= 8;
            info.cap_offset = 32;
            let count = length(areas.len());
            capability.extend_from_slice(CapabilityHead { id: 1, version: 1, next: 0 }.as_bytes());
            capability.extend_from_slice(SparseHead { count, reserved: 0 }.as_bytes());
            for (offset, size) in areas {
                capability.extend_from_slice(SparseArea { offset: *offset, size: *size }.as_bytes());
            }
        }
        info.argsz = info.argsz.saturating_add(length(capability.len()));
        if info.argsz > ask.argsz {
            info.cap_offset = 0;
            return bytes(info);
        }
        Ok((
            [info.as_bytes(), &capability].concat(),
            region.file.iter().chain(&region.more_files).cloned().collect(),
        ))
    }

    fn io_fds(&self, payload: &[u8]) -> Answered {
        let ask: IoFdsHead = read(payload)?;
        let index = usize::try_from(ask.index).unwrap_or(usize::MAX);
        let doorbells = &self.offer.regions.get(index).ok_or(EINVAL)?.doorbells;
        let count = length(doorbells.len());
        let argsz = count.saturating_mul(40).saturating_add(16);
        let mut payload = IoFdsHead { argsz, flags: 0, index: ask.index, count }.as_bytes().to_vec();
        let mut fds = Vec::new();
        for (fd_index, bell) in (0..).zip(doorbells) {
            let flags = u32::from(bell.value.is_some());
            let entry = IoFdEntry {
                offset: bell.offset,
                size: bell.size,
                fd_index,
                kind: 0,
                flags,
                shadow_fd_index: 0,
            };
            payload.extend_from_slice(entry.as_bytes());
            payload.extend_from_slice(&bell.value.unwrap_or(0).to_ne_bytes());
            fds.push(Arc::new(eventfd(0, EventfdFlags::CLOEXEC).map_err(|_| EINVAL)?));
        }
        Ok((payload, fds))
    }

    fn set_irqs(&mut self, payload: &[u8], fds: Vec<OwnedFd>) -> Answered {
        let (set, _) = read_front::<SetIrqs>(payload)?;
        let index = usize::try_from(set.index).unwrap_or(usize::MAX);
        let known = *self.offer.irqs.get(index).ok_or(EINVAL)?;
        if set.start.saturating_add(set.count) > known {
            return Err(EINVAL);
        }
        match set.flags {
            33 if set.count == 0 => self.vectors.retain(|vector| vector.0 != set.index),
            36 | 20 => {
                if length(fds.len()) != set.count {
                    return Err(EINVAL);
                }
                let numbered = (set.start..).zip(fds);
                self.vectors.extend(numbered.map(|(number, fd)| (set.index, number, fd)));
            }
            9 | 17 | 33 => {}
            _ => return Err(EINVAL),
        }
        nothing()
    }

    fn memory(&mut self, access: &RegionAccess) -> Result<&mut [u8], u32> {
        let index = usize::try_from(access.region).unwrap_or(usize::MAX);
        let at = usize::try_from(access.offset).unwrap_or(usize::MAX);
        let count = usize::try_from(access.count).unwrap_or(usize::MAX);
        let end = at.checked_add(count).ok_or(EINVAL)?;
        let region = self.offer.regions.get_mut(index).ok_or(EINVAL)?;
        region.memory.get_mut(at..end).ok_or(EINVAL)
    }

    fn write_multi(&mut self, payload: &[u8]) -> Answered {
        let (count, writes) = read_front::<u64>(payload)?;
        for write in writes.chunks(size_of::<MultiWrite>()) {
            let write: MultiWrite = read(write)?;
            let access = RegionAccess { offset: write.offset, region: write.region, count: write.count };
            let count = usize::try_from(write.count).unwrap_or(usize::MAX);
            let data = write.data.get(..count).ok_or(EINVAL)?;
            self.memory(&access)?.copy_from_slice(data);
        }
        bytes(count)
    }

    fn feature(&mut self, payload: &[u8]) -> Answered {
        let (head, data) = read_front::<FeatureHead>(payload)?;
        let known = matches!(head.flags & 0xffff, 1 | 2 | 6 | 7 | 8);
        if !known {
            return Err(EINVAL);
        }
        // Bits: 16 get, 17 set, 18 probe.
        let answer = match (head.flags & 0xffff, head.flags >> 16) {
            (_, 4..) => Vec::new(),
            (1, 1) => 5_u64.to_ne_bytes().to_vec(),
            (2, 1) => MigrationStatePayload { state: self.migration, data_fd: 0 }.as_bytes().to_vec(),
            (2, 2) => {
                let set: MigrationStatePayload = read(data)?;
                self.migration = set.state;
                self.saved = 0;
                data.to_vec()
            }
            (6, 2) => {
                let (start, ranges) = read_front::<LoggingStart>(data)?;
                let start = LoggingStart { page_size: self.offer.logging_page, ..start };
                [start.as_bytes(), ranges].concat()
            }
            (7, 2) => Vec::new(),
            (8, 1) => {
                let report: LoggingReport = read(data)?;
                let pages = report.length.checked_div(report.page_size).ok_or(EINVAL)?;
                let words = usize::try_from(pages.div_ceil(64)).unwrap_or(0).min(1 << 20);
                [report.as_bytes(), vec![u64::MAX; words].as_bytes()].concat()
            }
            _ => return Err(EINVAL),
        };
        let argsz = length(answer.len()).saturating_add(8);
        Ok(([FeatureHead { argsz, flags: head.flags }.as_bytes(), &answer].concat(), Vec::new()))
    }
}
