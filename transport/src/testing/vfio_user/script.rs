//! The offer of a scripted server, and the script of its misbehaviour.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::super::script::FdKind;
use crate::vfio_user::message::Command;

/// The replies of a scripted server's normal role.
#[derive(Clone, Debug)]
pub struct Offer {
    /// Major and minor version.
    pub version: (u16, u16),
    /// The capabilities object's contents, without braces.
    pub capabilities: String,
    /// The server's commands have a socket of their own.
    pub twin: bool,
    /// Bit 0 reset, bit 1 PCI.
    pub flags: u32,
    /// The regions.
    pub regions: Vec<RegionOffer>,
    /// The number of interrupts of each index.
    pub irqs: Vec<u32>,
    /// The state that MIG_DATA_READ returns.
    pub state: Vec<u8>,
    /// The page size of DMA logging. Every page is reported as written.
    pub logging_page: u64,
}

impl Default for Offer {
    /// A PCI device with one mappable BAR that has doorbells, one BAR that cannot be mapped and has none,
    /// six MSI-X vectors, migration, and every capability but the twin socket.
    fn default() -> Self {
        let mut regions = vec![RegionOffer::absent(); 9];
        let plain = |size: u16| RegionOffer {
            flags: 3,
            size: u64::from(size),
            memory: vec![0; usize::from(size)],
            ..RegionOffer::absent()
        };
        let numbered = [(0, plain(0x4000)), (2, plain(0x1000)), (7, plain(0x100))];
        for (index, region) in numbered {
            if let Some(place) = regions.get_mut(index) {
                *place = region;
            }
        }
        if let Some(bar) = regions.first_mut() {
            bar.flags = 7;
            bar.file = memory_file(0x4000);
            bar.areas = Some(vec![(0x1000, 0x2000)]);
            bar.doorbells = vec![Doorbell { offset: 8, size: 4, value: None }];
        }
        Self {
            version: (0, 1),
            capabilities: "\"max_msg_fds\":4,\"max_data_xfer_size\":65536,\"write_multiple\":true".to_owned(),
            twin: false,
            flags: 3,
            regions,
            irqs: vec![1, 0, 6, 0, 0],
            state: b"the state of a scripted device".to_vec(),
            logging_page: 4096,
        }
    }
}

fn memory_file(size: u64) -> Option<Arc<OwnedFd>> {
    let fd = rustix::fs::memfd_create("region", rustix::fs::MemfdFlags::CLOEXEC).ok()?;
    rustix::fs::ftruncate(&fd, size).ok()?;
    Some(Arc::new(fd))
}

/// The offer of one region.
#[derive(Clone, Debug)]
pub struct RegionOffer {
    /// Bit 0 read, 1 write, 2 mmap.
    pub flags: u32,
    /// The size that the server claims.
    pub size: u64,
    /// First byte in the region's file.
    pub offset: u64,
    /// The bytes that REGION_READ and REGION_WRITE access. They are independent of the file.
    pub memory: Vec<u8>,
    /// Areas of a sparse mmap capability.
    pub areas: Option<Vec<(u64, u64)>>,
    /// The region's file, or another descriptor to send in its place.
    pub file: Option<Arc<OwnedFd>>,
    /// The descriptors to send after the file: libvfio-user sends one for each area.
    pub more_files: Vec<Arc<OwnedFd>>,
    /// The entries that DEVICE_GET_REGION_IO_FDS returns.
    pub doorbells: Vec<Doorbell>,
}

impl RegionOffer {
    /// A region that the device does not have.
    pub fn absent() -> Self {
        Self {
            flags: 0,
            size: 0,
            offset: 0,
            memory: Vec::new(),
            areas: None,
            file: None,
            more_files: Vec::new(),
            doorbells: Vec::new(),
        }
    }
}

/// One entry of DEVICE_GET_REGION_IO_FDS.
#[derive(Clone, Copy, Debug)]
pub struct Doorbell {
    /// First byte in the region.
    pub offset: u64,
    /// Bytes of an access.
    pub size: u64,
    /// The only value that has an effect; `None` for any.
    pub value: Option<u64>,
}

/// A command that the server sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// The command code.
    pub command: Command,
    /// Its payload.
    pub payload: Vec<u8>,
    /// Its flags: 0 or no_reply.
    pub flags: u32,
    /// The number of fds that it must not have.
    pub fds: usize,
}

impl Ask {
    /// A DMA_READ.
    pub fn read(address: u64, count: u64) -> Self {
        Self::of(Command::DMA_READ, [address.to_ne_bytes(), count.to_ne_bytes()].concat())
    }

    /// A DMA_WRITE.
    pub fn write(address: u64, data: &[u8]) -> Self {
        let count = u64::try_from(data.len()).unwrap_or(u64::MAX);
        let payload = [&address.to_ne_bytes(), &count.to_ne_bytes(), data].concat();
        Self::of(Command::DMA_WRITE, payload)
    }

    /// Any command that asks for a reply.
    pub fn of(command: Command, payload: Vec<u8>) -> Self {
        Self { command, payload, flags: 0, fds: 0 }
    }
}

/// One misbehaviour, in place of the normal reply to a command or in addition to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// Never replies, but reads on.
    Silent,
    /// Never reads again.
    StopReading,
    /// Closes the connection instead of replying.
    Close,
    /// Closes the twin socket instead of replying, and goes on.
    CloseTwin,
    /// Closes the connection after this many bytes of the reply.
    CloseAfter(usize),
    /// Sends this many bytes of the reply and no more.
    StallAfter(usize),
    /// Sends one byte at a time, each after this pause.
    Drip(Duration),
    /// Replies after this pause.
    Delay(Duration),
    /// Replies with an id in which these bits are flipped.
    Id(u16),
    /// Replies with the code of another command.
    As(Command),
    /// Replies with these flags.
    Flags(u32),
    /// Refuses with this errno.
    Refuse(u32),
    /// Refuses with this errno, and with the error flag alone.
    RefuseWithoutReplyFlag(u32),
    /// Puts this number into the size field. The payload stays.
    ClaimSize(u32),
    /// Replies with this payload and its correct size.
    Payload(Vec<u8>),
    /// Replaces the payload's bytes from this offset on.
    Patch(usize, Vec<u8>),
    /// Sends this many more fds with the reply.
    Fds(usize),
    /// Sends no fds with the reply.
    NoFds,
    /// Sends one fd of this kind with the reply, in place of all others.
    FdOf(FdKind),
    /// Sends this many fds with the first byte of the payload, which is sent apart from the header.
    FdsWithBody(usize),
    /// Replies twice.
    Twice,
    /// Replies even when no reply is asked for.
    Unasked,
    /// Sends this many replies and then closes the connection.
    Flood(usize),
    /// Sends commands, and waits for their replies before it replies.
    Asks(Vec<Ask>),
    /// Sends commands on the main socket although there is a twin socket.
    AsksOnMain(Vec<Ask>),
    /// Sends this command so many times, reads no reply, and then replies.
    FloodOfAsks(Ask, usize),
    /// Sends these bytes before the reply.
    Before(Vec<u8>),
}

/// The commands at which a scripted server misbehaves, and how.
#[derive(Clone, Debug, Default)]
pub struct Script {
    rules: Vec<(Command, Option<usize>, Act)>,
}

impl Script {
    /// A script without misbehaviour.
    pub fn normal() -> Self {
        Self::default()
    }

    /// Does `act` at each `command`.
    #[must_use]
    pub fn on(mut self, command: Command, act: Act) -> Self {
        self.rules.push((command, None, act));
        self
    }

    /// Does `act` at the `nth` (from 0) `command` of a connection.
    #[must_use]
    pub fn on_nth(mut self, command: Command, nth: usize, act: Act) -> Self {
        self.rules.push((command, Some(nth), act));
        self
    }

    /// The first act that the script has for the `nth` `command`.
    pub(super) fn act(&self, command: Command, nth: usize) -> Option<&Act> {
        let rule =
            self.rules.iter().find(|(at, when, _)| *at == command && when.is_none_or(|when| when == nth));
        rule.map(|(_, _, act)| act)
    }
}
