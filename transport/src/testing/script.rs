//! The offer of a scripted backend, and the script of its misbehaviour.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::vhost_user::ProtocolFeatures;
use crate::vhost_user::features::bit;
use crate::vhost_user::request::Request;

/// The answers of a scripted backend's normal role.
#[derive(Clone, Debug)]
pub struct Offer {
    /// The answer to GET_FEATURES.
    pub features: u64,
    /// The answer to GET_PROTOCOL_FEATURES.
    pub protocol: ProtocolFeatures,
    /// The answer to GET_QUEUE_NUM.
    pub queue_num: u64,
    /// The configuration space. A request for more bytes is refused.
    pub config: Vec<u8>,
    /// The answer to GET_MAX_MEM_SLOTS.
    pub mem_slots: u64,
    /// The answer to GET_SHMEM_CONFIG: the size of each shared memory region.
    pub shmem: Vec<u64>,
    /// The answer to GET_INFLIGHT_FD: bytes of the inflight area.
    pub inflight_size: u64,
    /// The state that is written after SET_DEVICE_STATE_FD.
    pub state: Vec<u8>,
    /// The pause before the state is moved.
    pub state_pause: Duration,
    /// The answer to CHECK_DEVICE_STATE.
    pub state_check: u64,
}

impl Default for Offer {
    /// A modern device with two queues, 60 bytes of configuration, and every feature that needs no other
    /// setting.
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

/// One misbehaviour, in place of the normal answer to a request or in addition to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// Never answers, but reads on.
    Silent,
    /// Never reads again.
    StopReading,
    /// Closes the connection instead of answering.
    Close,
    /// Closes the connection after this many bytes of the answer.
    CloseAfter(usize),
    /// Sends this many bytes of the answer and no more.
    StallAfter(usize),
    /// Sends one byte at a time, each after this pause.
    Drip(Duration),
    /// Answers after this pause.
    Delay(Duration),
    /// Answers with the code of another request.
    As(Request),
    /// Answers with these flags.
    Flags(u32),
    /// Puts this number into the size field. The payload stays.
    ClaimSize(u32),
    /// Answers with this payload and its correct size.
    Payload(Vec<u8>),
    /// Sends this many fds with the header.
    Fds(usize),
    /// Sends one fd of this kind with the header.
    FdOf(FdKind),
    /// Sends this many fds with the first byte of the payload, which is sent apart from the header.
    FdsWithBody(usize),
    /// Answers with this code, if an answer is due.
    Refuse(u64),
    /// Answers twice.
    Twice,
    /// Answers even when no answer is due.
    Unasked,
    /// Sends this many answers and then closes the connection.
    Flood(usize),
}

/// A kind of fd to send in place of the right one.
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
    /// `/dev/null`, opened with O_PATH.
    Path,
    /// A memfd of this many bytes.
    Memfd(u64),
    /// A memfd of this many bytes, opened for reading only.
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

/// The requests at which a scripted backend misbehaves, and how.
#[derive(Clone, Debug, Default)]
pub struct Script {
    rules: Vec<(Request, Option<usize>, Act)>,
}

impl Script {
    /// A script without misbehaviour.
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
