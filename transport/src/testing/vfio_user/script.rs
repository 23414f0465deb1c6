//! What a scripted server offers, and where it goes astray.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::super::script::FdKind;
use crate::vfio_user::message::Command;

/// What a scripted server says of itself.
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
    /// Interrupts of each index.
    pub irqs: Vec<u32>,
    /// The state that is saved.
    pub state: Vec<u8>,
    /// Every page of this size is reported as written.
    pub logging_page: u64,
}

impl Default for Offer {
    /// A PCI device with a mappable BAR that has doorbells, a BAR that has not, six MSI-X vectors, migration, and
    /// every capability but the twin socket.
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

/// One region.
#[derive(Clone, Debug)]
pub struct RegionOffer {
    /// Bit 0 read, 1 write, 2 mmap.
    pub flags: u32,
    /// What it claims to have.
    pub size: u64,
    /// Where it begins in its file.
    pub offset: u64,
    /// What REGION_READ and REGION_WRITE reach; the file is another matter.
    pub memory: Vec<u8>,
    /// Areas of a sparse mmap capability.
    pub areas: Option<Vec<(u64, u64)>>,
    /// Its file, or whatever is sent in its place.
    pub file: Option<Arc<OwnedFd>>,
    /// What is sent after the file: libvfio-user sends one for each area.
    pub more_files: Vec<Arc<OwnedFd>>,
    /// What DEVICE_GET_REGION_IO_FDS tells.
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
    /// Where in the region.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// The value that rings it.
    pub value: Option<u64>,
}

/// A command of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Which.
    pub command: Command,
    /// Its payload.
    pub payload: Vec<u8>,
    /// Its flags: 0, or no_reply.
    pub flags: u32,
    /// Stray fds.
    pub fds: usize,
}

impl Ask {
    /// DMA_READ.
    pub fn read(address: u64, count: u64) -> Self {
        Self::of(Command::DMA_READ, [address.to_ne_bytes(), count.to_ne_bytes()].concat())
    }

    /// DMA_WRITE.
    pub fn write(address: u64, data: &[u8]) -> Self {
        let count = u64::try_from(data.len()).unwrap_or(u64::MAX);
        let payload = [&address.to_ne_bytes(), &count.to_ne_bytes(), data].concat();
        Self::of(Command::DMA_WRITE, payload)
    }

    /// Any command that wants a reply.
    pub fn of(command: Command, payload: Vec<u8>) -> Self {
        Self { command, payload, flags: 0, fds: 0 }
    }
}

/// One misdeed, done instead of or upon the normal reply to a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// Never answers, goes on reading.
    Silent,
    /// Never reads again.
    StopReading,
    /// Closes instead of answering.
    Close,
    /// Closes the twin socket instead of answering, and goes on.
    CloseTwin,
    /// Closes after this many bytes of the reply.
    CloseAfter(usize),
    /// Sends this many bytes of the reply and then nothing.
    StallAfter(usize),
    /// Sends one byte at a time with this pause.
    Drip(Duration),
    /// Answers after this long.
    Delay(Duration),
    /// Answers with an id that differs in these bits.
    Id(u16),
    /// Answers as another command.
    As(Command),
    /// Answers with these flags.
    Flags(u32),
    /// Says no, with this errno.
    Refuse(u32),
    /// Says no, with the error flag alone.
    RefuseWithoutReplyFlag(u32),
    /// Puts this into the size field; the payload stays.
    ClaimSize(u32),
    /// Answers with this payload, of consistent size.
    Payload(Vec<u8>),
    /// Answers with these bytes at this place of the payload.
    Patch(usize, Vec<u8>),
    /// This many more fds with the reply.
    Fds(usize),
    /// No fds with the reply.
    NoFds,
    /// One fd of this kind with the reply, in place of all others.
    FdOf(FdKind),
    /// This many fds with the payload's first byte, sent apart from the header.
    FdsWithBody(usize),
    /// Answers twice.
    Twice,
    /// Answers although no reply is wanted.
    Unasked,
    /// Sends this many replies before closing.
    Flood(usize),
    /// Asks something and waits for the reply before answering.
    Asks(Vec<Ask>),
    /// Asks on the main socket although there is a twin.
    AsksOnMain(Vec<Ask>),
    /// Asks this so many times, takes no reply, and answers then.
    FloodOfAsks(Ask, usize),
    /// Sends these bytes before the reply.
    Before(Vec<u8>),
}

/// Where to do what.
#[derive(Clone, Debug, Default)]
pub struct Script {
    rules: Vec<(Command, Option<usize>, Act)>,
}

impl Script {
    /// The normal role.
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
