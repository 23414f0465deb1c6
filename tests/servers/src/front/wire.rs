//! vfio-user messages as bytes and descriptors: what the front must know of them to pass them on whole.

use std::io::{ErrorKind, IoSlice, IoSliceMut, Result};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde_json::Value;

use super::{borrowed, cut_off};

/// Bytes of a header.
pub const HEADER: usize = 16;
/// Most bytes of a message.
const MAX_MESSAGE: usize = (1 << 20) + 4096;
const MAX_FDS: usize = 253;

/// Type "reply" of the flags.
pub const REPLY: u32 = 1;
/// No reply is wanted.
pub const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// Command numbers.
pub mod command {
    /// The first of all.
    pub const VERSION: u16 = 1;
    /// Doorbells as eventfds.
    pub const GET_REGION_IO_FDS: u16 = 6;
    /// Writes a region.
    pub const REGION_WRITE: u16 = 10;
    /// The server reads the client's memory.
    pub const DMA_READ: u16 = 11;
    /// The server writes the client's memory.
    pub const DMA_WRITE: u16 = 12;
    /// Several writes at once.
    pub const REGION_WRITE_MULTI: u16 = 15;
    /// What the crate takes as it is.
    pub const IN_CRATE: [u16; 9] = [2, 3, 4, 5, 7, 8, 9, REGION_WRITE, 13];
}

/// A message's first 16 bytes.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// Matches a reply with its request.
    pub id: u16,
    /// What it is about.
    pub command: u16,
    /// Type, and whether a reply is wanted or an error.
    pub flags: u32,
    /// Of an error.
    pub errno: u32,
}

impl Header {
    /// True of a reply.
    #[must_use]
    pub fn is_reply(self) -> bool {
        self.flags & 0xf == REPLY
    }

    /// True of a refusal.
    #[must_use]
    pub fn is_error(self) -> bool {
        self.flags & ERROR != 0
    }

    /// The answer that says no.
    #[must_use]
    pub fn error(self, errno: u32) -> Message {
        Message { header: Self { flags: REPLY | ERROR, errno, ..self }, body: Vec::new(), fds: Vec::new() }
    }
}

/// A whole message.
#[derive(Debug)]
pub struct Message {
    /// The first 16 bytes; the size is that of the body.
    pub header: Header,
    /// All after the header.
    pub body: Vec<u8>,
    /// What came along.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// One without descriptors.
    #[must_use]
    pub fn new(id: u16, command: u16, flags: u32, body: Vec<u8>) -> Self {
        Self { header: Header { id, command, flags, errno: 0 }, body, fds: Vec::new() }
    }

    /// The next one; none at the end of the stream.
    ///
    /// # Errors
    /// What the socket says, and sizes that cannot be.
    pub fn receive(socket: BorrowedFd<'_>) -> Result<Option<Self>> {
        let mut fds = Vec::new();
        let mut head = [0; HEADER];
        if !fill(socket, &mut head, &mut fds)? {
            return Ok(None);
        }
        let word = |at: usize| {
            head.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_ne_bytes)
        };
        let [a, b, c, d] = word(0).to_ne_bytes();
        let size = usize::try_from(word(4)).unwrap_or(usize::MAX);
        let length = size.checked_sub(HEADER).filter(|length| *length <= MAX_MESSAGE);
        let length = length.ok_or_else(|| std::io::Error::other(format!("a message of {size} bytes")))?;
        let mut body = vec![0; length];
        if length > 0 && !fill(socket, &mut body, &mut fds)? {
            return Err(cut_off());
        }
        let header = Header {
            id: u16::from_ne_bytes([a, b]),
            command: u16::from_ne_bytes([c, d]),
            flags: word(8),
            errno: word(12),
        };
        Ok(Some(Self { header, body, fds }))
    }

    /// Sends it with one call, as far as the socket has room.
    ///
    /// # Errors
    /// What the socket says.
    pub fn send(&self, socket: BorrowedFd<'_>) -> Result<()> {
        let Header { id, command, flags, errno } = self.header;
        let size = u32::try_from(HEADER + self.body.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(HEADER + self.body.len());
        bytes.extend(id.to_ne_bytes());
        bytes.extend(command.to_ne_bytes());
        bytes.extend([size, flags, errno].into_iter().flat_map(u32::to_ne_bytes));
        bytes.extend(&self.body);
        let fds = borrowed(&self.fds);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(ErrorKind::InvalidInput.into());
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let sent = rustix::io::retry_on_intr(|| {
                sendmsg(socket, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL)
            })?;
            control = SendAncillaryBuffer::default();
            rest = rest.get(sent..).unwrap_or_default();
        }
        Ok(())
    }
}

/// Fills all of it; false when the stream ended before the first byte.
fn fill(socket: BorrowedFd<'_>, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<bool> {
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(rest)];
        let received =
            rustix::io::retry_on_intr(|| recvmsg(socket, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC))?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(given) = message {
                fds.extend(given);
            }
        }
        match (received.bytes, filled) {
            (0, 0) => return Ok(false),
            (0, _) => return Err(cut_off()),
            (more, _) => filled += more,
        }
    }
    Ok(true)
}

/// The minor version in the body of a VERSION message.
#[must_use]
pub fn minor(body: &[u8]) -> u16 {
    body.get(2..4).and_then(|minor| minor.try_into().ok()).map_or(0, u16::from_ne_bytes)
}

/// The capabilities in the body of a VERSION message; null when there are none to be understood.
#[must_use]
pub fn capabilities(body: &[u8]) -> Value {
    let text = body.get(4..).unwrap_or_default();
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    let all: Value = serde_json::from_slice(text).unwrap_or_default();
    all.get("capabilities").cloned().unwrap_or_default()
}
