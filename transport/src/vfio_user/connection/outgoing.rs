//! Messages that leave on one socket: each complete message with one `sendmsg` while the socket has room,
//! else queued.
//!
//! Must never block. Must never grow without a limit: the sender checks [`Outgoing::unsent`] first. Messages
//! are sent in the order of the calls.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use zerocopy::IntoBytes;

use crate::peer::fds;
use crate::vfio_user::message::{Command, Header, MultiWrite, RegionAccess, length};

/// The most writes in one REGION_WRITE_MULTI, as many as QEMU's client sends.
pub(crate) const MULTI_MOST: usize = 200;

/// The messages that wait for room in the socket.
#[derive(Default)]
pub(crate) struct Outgoing {
    queue: VecDeque<Unsent>,
    bytes: usize,
    /// The number of messages that were pushed, and (`sent`) how many of those were sent completely.
    pushed: u64,
    sent: u64,
}

struct Unsent {
    content: Content,
    /// Sent with the first byte.
    fds: Vec<OwnedFd>,
}

enum Content {
    /// A message, and how many of its bytes were sent.
    Message(Vec<u8>, usize),
    /// Posted writes of which no byte was sent, with the id of their message. More writes can be added.
    Burst(u16, Vec<MultiWrite>),
}

impl Outgoing {
    /// Bytes that wait for room.
    pub(crate) fn unsent(&self) -> usize {
        self.bytes
    }

    /// True when message number `number` was sent completely.
    pub(crate) fn is_sent(&self, number: u64) -> bool {
        self.sent >= number
    }

    /// Sends the queued messages and then this one, as far as the socket takes them. Returns the message's
    /// number.
    pub(crate) fn push(
        &mut self,
        socket: &UnixStream,
        message: Vec<u8>,
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<u64> {
        self.flush(socket)?;
        self.pushed = self.pushed.wrapping_add(1);
        let mut at = 0;
        if self.queue.is_empty() {
            match fds::send(socket.as_fd(), &message, fds) {
                Ok(count) => at = count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        if at == message.len() {
            self.sent = self.sent.wrapping_add(1);
            return Ok(self.pushed);
        }
        let fds = if at == 0 {
            fds.iter().map(BorrowedFd::try_clone_to_owned).collect::<io::Result<_>>()?
        } else {
            Vec::new()
        };
        self.bytes = self.bytes.saturating_add(message.len().saturating_sub(at));
        self.queue.push_back(Unsent { content: Content::Message(message, at), fds });
        Ok(self.pushed)
    }

    /// Sends a write that asks for no reply. While the socket is full, such writes are joined into one
    /// message if `join` says that the server takes REGION_WRITE_MULTI.
    pub(crate) fn push_write(
        &mut self,
        socket: &UnixStream,
        id: u16,
        write: MultiWrite,
        join: Join,
    ) -> io::Result<u64> {
        self.flush(socket)?;
        if join == Join::Never || self.queue.is_empty() {
            return self.push(socket, burst_message(id, &[write]), &[]);
        }
        match self.queue.back_mut() {
            Some(Unsent { content: Content::Burst(_, writes), .. }) if writes.len() < MULTI_MOST => {
                writes.push(write);
            }
            _ => {
                self.pushed = self.pushed.wrapping_add(1);
                let content = Content::Burst(id, vec![write]);
                self.queue.push_back(Unsent { content, fds: Vec::new() });
            }
        }
        self.bytes = self.bytes.saturating_add(size_of::<MultiWrite>());
        Ok(self.pushed)
    }

    /// Sends as many queued bytes as the socket takes.
    pub(crate) fn flush(&mut self, socket: &UnixStream) -> io::Result<()> {
        while let Some(first) = self.queue.front_mut() {
            if let Content::Burst(id, writes) = &first.content {
                let message = burst_message(*id, writes);
                self.bytes = self.bytes.saturating_sub(writes.len().saturating_mul(size_of::<MultiWrite>()));
                self.bytes = self.bytes.saturating_add(message.len());
                first.content = Content::Message(message, 0);
            }
            let Content::Message(message, at) = &mut first.content else { break };
            let rest = message.get(*at..).unwrap_or_default();
            let fds: Vec<BorrowedFd<'_>> = first.fds.iter().map(AsFd::as_fd).collect();
            match fds::send(socket.as_fd(), rest, &fds) {
                Ok(count) => {
                    *at = at.saturating_add(count);
                    self.bytes = self.bytes.saturating_sub(count);
                    let whole = count == rest.len();
                    first.fds.clear();
                    if whole {
                        self.queue.pop_front();
                        self.sent = self.sent.wrapping_add(1);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Forgets all queued messages: nothing will be sent any more.
    pub(crate) fn clear(&mut self) {
        self.queue.clear();
        self.bytes = 0;
    }
}

/// Whether posted writes may be joined into one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Join {
    /// Yes, when several of them wait.
    WhenWaiting,
    /// No, the server does not take REGION_WRITE_MULTI.
    Never,
}

/// The message for posted writes: REGION_WRITE for one, REGION_WRITE_MULTI for several.
fn burst_message(id: u16, writes: &[MultiWrite]) -> Vec<u8> {
    if let [write] = writes {
        let access = RegionAccess { offset: write.offset, region: write.region, count: write.count };
        let count = usize::try_from(write.count).unwrap_or(usize::MAX);
        let data = write.data.get(..count).unwrap_or(&write.data);
        let payload = [access.as_bytes(), data].concat();
        let header = Header::posted(id, Command::REGION_WRITE, length(payload.len()));
        return [header.as_bytes(), &payload].concat();
    }
    let count = u64::try_from(writes.len()).unwrap_or(u64::MAX);
    let payload = [count.as_bytes(), writes.as_bytes()].concat();
    let header = Header::posted(id, Command::REGION_WRITE_MULTI, length(payload.len()));
    [header.as_bytes(), &payload].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn write(offset: u64) -> MultiWrite {
        MultiWrite { offset, region: 0, count: 4, data: [1, 2, 3, 4, 0, 0, 0, 0] }
    }

    fn pair() -> (UnixStream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        (ours, theirs)
    }

    fn drain(from: &mut UnixStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut buffer = [0; 65536];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            bytes.extend_from_slice(&buffer[..count]);
        }
        bytes
    }

    #[test]
    fn order_is_kept_across_a_full_socket_and_bursts_are_joined() {
        let (ours, mut theirs) = pair();
        let mut out = Outgoing::default();
        let mut pushed = 0;
        while out.unsent() == 0 {
            pushed = out.push(&ours, vec![7; 4096], &[]).unwrap();
        }
        assert!(!out.is_sent(pushed));
        let full = usize::try_from(pushed).unwrap() * 4096;
        for offset in 0..3 {
            out.push_write(&ours, 5, write(offset), Join::WhenWaiting).unwrap();
        }
        let last = out.push(&ours, vec![9; 10], &[]).unwrap();
        let mut bytes = Vec::new();
        while out.unsent() > 0 {
            bytes.extend(drain(&mut theirs));
            out.flush(&ours).unwrap();
        }
        bytes.extend(drain(&mut theirs));
        assert!(out.is_sent(last));
        assert_eq!(bytes.len(), full + 16 + 8 + 3 * 24 + 10);
        let header: Header = crate::vfio_user::message::parse(&bytes[full..full + 16]).unwrap();
        assert_eq!((header.id, Command(header.command), header.size), (5, Command::REGION_WRITE_MULTI, 96));
        assert_eq!(bytes[full + 16..full + 24], 3u64.to_ne_bytes());
        assert_eq!(bytes[bytes.len() - 10..], [9; 10]);
    }

    #[test]
    fn a_write_alone_goes_out_at_once_as_it_is() {
        let (ours, mut theirs) = pair();
        let mut out = Outgoing::default();
        out.push_write(&ours, 5, write(8), Join::WhenWaiting).unwrap();
        let bytes = drain(&mut theirs);
        assert_eq!(bytes.len(), 16 + 16 + 4);
        assert_eq!(out.unsent(), 0);
    }
}
