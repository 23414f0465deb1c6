//! What a scripted backend offers, and where it goes astray.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::vhost_user::ProtocolFeatures;
use crate::vhost_user::features::bit;
use crate::vhost_user::request::Request;

/// What a scripted backend says of itself.
#[derive(Clone, Debug)]
pub struct Offer {
    /// GET_FEATURES.
    pub features: u64,
    /// GET_PROTOCOL_FEATURES.
    pub protocol: ProtocolFeatures,
    /// GET_QUEUE_NUM.
    pub queue_num: u64,
    /// The configuration space; requests for more are refused.
    pub config: Vec<u8>,
    /// GET_MAX_MEM_SLOTS.
    pub mem_slots: u64,
    /// GET_SHMEM_CONFIG: the size of each shared memory region.
    pub shmem: Vec<u64>,
    /// GET_INFLIGHT_FD: bytes of the area.
    pub inflight_size: u64,
    /// SET_DEVICE_STATE_FD: what is written when the state is saved.
    pub state: Vec<u8>,
    /// How long the state is held back.
    pub state_pause: Duration,
    /// CHECK_DEVICE_STATE.
    pub state_check: u64,
}

impl Default for Offer {
    /// A modern device with two queues, 60 bytes of configuration and every feature that asks for nothing more.
    fn default() -> Self {
        let features = [28, 29, bit::PROTOCOL_FEATURES, bit::VERSION_1, bit::LOG_ALL];
        Self {
            features: features.iter().fold(0, |bits, number| bits | 1 << number),
            protocol: ProtocolFeatures::MQ
                .with(ProtocolFeatures::LOG_SHMFD)
                .with(ProtocolFeatures::REPLY_ACK)
                .with(ProtocolFeatures::BACKEND_REQ)
                .with(ProtocolFeatures::BACKEND_SEND_FD)
                .with(ProtocolFeatures::CONFIG)
                .with(ProtocolFeatures::RESET_DEVICE),
            queue_num: 2,
            config: (0..60).collect(),
            mem_slots: 8,
            shmem: Vec::new(),
            inflight_size: 8192,
            state: b"state".to_vec(),
            state_pause: Duration::ZERO,
            state_check: 0,
        }
    }
}

/// One misdeed, done instead of or upon the normal answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// Never answers, goes on reading.
    Silent,
    /// Never reads again.
    StopReading,
    /// Closes instead of answering.
    Close,
    /// Closes after this many bytes of the answer.
    CloseAfter(usize),
    /// Sends this many bytes of the answer and then nothing.
    StallAfter(usize),
    /// Sends one byte at a time with this pause.
    Drip(Duration),
    /// Answers after this long.
    Delay(Duration),
    /// Answers as another request.
    As(Request),
    /// Answers with these flags.
    Flags(u32),
    /// Puts this into the size field; the payload stays.
    ClaimSize(u32),
    /// Answers with this payload, of consistent size.
    Payload(Vec<u8>),
    /// This many fds with the header.
    Fds(usize),
    /// One fd of this kind with the header.
    FdOf(FdKind),
    /// This many fds with the payload's first byte, sent apart from the header.
    FdsWithBody(usize),
    /// Answers, if at all, with this code.
    Refuse(u64),
    /// Answers twice.
    Twice,
    /// Answers although no answer is due.
    Unasked,
    /// Sends this many answers of the same kind before closing.
    Flood(usize),
}

/// What an fd may be instead of what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FdKind {
    /// An eventfd.
    Eventfd,
    /// The reading end of a pipe.
    Pipe,
    /// A unix socket.
    Socket,
    /// A directory.
    Directory,
    /// `/dev/null`, opened for its path only.
    Path,
    /// A memfd of so many bytes.
    Memfd(u64),
    /// The same, but opened for reading only.
    ReadOnly(u64),
}

impl FdKind {
    /// An fd of this kind.
    pub fn make(self) -> io::Result<OwnedFd> {
        use rustix::fs::{MemfdFlags, Mode, OFlags, ftruncate, memfd_create, open};
        let opened = |path: &str, flags| open(path, flags | OFlags::CLOEXEC, Mode::empty());
        Ok(match self {
            Self::Eventfd => rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?,
            Self::Pipe => std::io::pipe()?.0.into(),
            Self::Socket => UnixStream::pair()?.0.into(),
            Self::Directory => opened("/", OFlags::DIRECTORY | OFlags::RDONLY)?,
            Self::Path => opened("/dev/null", OFlags::PATH)?,
            Self::Memfd(size) => {
                let file = memfd_create("of a test", MemfdFlags::CLOEXEC)?;
                ftruncate(&file, size)?;
                file
            }
            Self::ReadOnly(size) => {
                let file = Self::Memfd(size).make()?;
                opened(&format!("/proc/self/fd/{}", file.as_raw_fd()), OFlags::RDONLY)?
            }
        })
    }
}

/// Where to do what.
#[derive(Clone, Debug, Default)]
pub struct Script {
    rules: Vec<(Request, Option<usize>, Act)>,
}

impl Script {
    /// The normal role.
    pub fn normal() -> Self {
        Self::default()
    }

    /// Does `act` at each `request`.
    #[must_use]
    pub fn on(mut self, request: Request, act: Act) -> Self {
        self.rules.push((request, None, act));
        self
    }

    /// Does `act` at the `nth` (from 0) `request` of a connection.
    #[must_use]
    pub fn on_nth(mut self, request: Request, nth: usize, act: Act) -> Self {
        self.rules.push((request, Some(nth), act));
        self
    }

    /// The first act that the script has for the `nth` `request`.
    pub(crate) fn act(&self, request: Request, nth: usize) -> Option<&Act> {
        let rule =
            self.rules.iter().find(|(at, when, _)| *at == request && when.is_none_or(|when| when == nth));
        rule.map(|(_, _, act)| act)
    }
}
