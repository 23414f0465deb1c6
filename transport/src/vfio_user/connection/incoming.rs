//! Messages that arrive on one socket, however they are split or joined. Frames messages and checks their
//! sizes only.
//!
//! Must never block. Must never allocate for the size in a header before that size was judged. Must never
//! give the fds of one message to another.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::peer::Cause;
use crate::peer::fds::{self, Received, Room};
use crate::vfio_user::message::{Fault, HEADER_SIZE, Header};

/// Bytes of one read while messages are small.
const READ_AT_ONCE: usize = 4096;

/// The most bytes of one read: memory grows with the bytes that came, not with the bytes that a header
/// announces.
const READ_MOST: usize = 256 << 10;

/// How much may be read past the end of the current message.
#[derive(Clone, Copy)]
pub(crate) enum Ahead<'a> {
    /// Nothing, as the next message may bring fds. The function tells by a header whether its message does.
    Never(&'a dyn Fn(&Header) -> bool),
    /// Everything that has arrived, for fewer system calls. No fds are due.
    Freely,
}

/// A whole message.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// The outcome of one read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Read {
    /// Some bytes.
    Some,
    /// Nothing is there now.
    Nothing,
    /// The peer closed its end, between messages.
    HungUp,
}

/// The bytes that were read and not yet taken as a message.
#[derive(Default)]
pub(crate) struct Incoming {
    buffer: Vec<u8>,
    start: usize,
    /// The fds of the message that is being received.
    fds: Vec<OwnedFd>,
}

impl Incoming {
    fn unread(&self) -> &[u8] {
        self.buffer.get(self.start..).unwrap_or_default()
    }

    /// Takes the next complete message, if there is one. `judge` returns the size of the payload behind a
    /// header, or the header's fault.
    pub(crate) fn take(
        &mut self,
        judge: impl FnOnce(&Header) -> Result<u32, Fault>,
    ) -> Result<Option<Message>, (Header, Fault)> {
        let Ok((header, rest)) = Header::read_from_prefix(self.unread()) else { return Ok(None) };
        let size = judge(&header).map_err(|fault| (header, fault))?;
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let Some(payload) = rest.get(..size) else { return Ok(None) };
        let payload = payload.to_vec();
        self.start = self.start.saturating_add(HEADER_SIZE).saturating_add(size);
        let fds = std::mem::take(&mut self.fds);
        if self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
        }
        Ok(Some(Message { header, payload, fds }))
    }

    /// Bytes that the current message still needs, as far as its header has arrived.
    fn needed(&self) -> usize {
        let unread = self.unread();
        let whole = match Header::read_from_prefix(unread) {
            // The size was judged already: `take` comes before every read.
            Ok((header, _)) => usize::try_from(header.size).unwrap_or(usize::MAX),
            Err(_) => HEADER_SIZE,
        };
        whole.saturating_sub(unread.len())
    }

    /// Reads once what has arrived. Call it only after `take` returned no message.
    pub(crate) fn read(&mut self, socket: &UnixStream, ahead: Ahead<'_>) -> Result<Read, Cause> {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        let have = self.buffer.len();
        let needed = self.needed().min(READ_MOST);
        let room = if matches!(ahead, Ahead::Freely) { needed.max(READ_AT_ONCE) } else { needed };
        self.buffer.resize(have.saturating_add(room), 0);
        let rest = self.buffer.get_mut(have..).unwrap_or_default();
        // Descriptors travel with the first byte, so the header is peeked at before it is read.
        let room_for_fds = match ahead {
            Ahead::Never(brings_fds) if have == 0 => {
                let mut header = Header::new_zeroed();
                match fds::peek(socket.as_fd(), header.as_mut_bytes()) {
                    Ok(HEADER_SIZE) if !brings_fds(&header) => Room::None,
                    // The header arrived in pieces, so it may be that of a message with fds.
                    _ => Room::Many,
                }
            }
            _ => Room::None,
        };
        let outcome = fds::receive(socket.as_fd(), rest, room_for_fds, &mut self.fds);
        let got = outcome.as_ref().map_or(0, |received| received.bytes);
        self.buffer.truncate(have.saturating_add(got));
        match outcome {
            // A region whose file is refused is a region without a file: messages can still read and write
            // it. A command that needs the descriptor reports its absence itself.
            Ok(Received { fault: Some(fault), .. }) if !matches!(fault, Fault::Descriptor) => {
                Err(Cause::Malformed(fault))
            }
            Ok(received) if received.bytes == 0 && have == 0 => Ok(Read::HungUp),
            Ok(received) if received.bytes == 0 => Err(Cause::ClosedMidMessage),
            Ok(_) => Ok(Read::Some),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Read::Nothing),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Read::HungUp),
            Err(error) => Err(Cause::Io(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vfio_user::message::Command;
    use std::io::Write;

    fn message(id: u16, payload: &[u8]) -> Vec<u8> {
        let size = u32::try_from(payload.len()).unwrap();
        [Header::command(id, Command::DMA_READ, size).as_bytes(), payload].concat()
    }

    fn any(header: &Header) -> Result<u32, Fault> {
        header.judge_size(1 << 20)
    }

    fn next(incoming: &mut Incoming, socket: &UnixStream, ahead: Ahead<'_>) -> Option<Message> {
        loop {
            if let Some(message) = incoming.take(any).unwrap() {
                return Some(message);
            }
            match incoming.read(socket, ahead).unwrap() {
                Read::Some => {}
                Read::Nothing | Read::HungUp => return None,
            }
        }
    }

    #[test]
    fn messages_arrive_whole_however_they_are_cut_or_joined() {
        for ahead in [Ahead::Never(&|_| true), Ahead::Freely] {
            for piece in 1..90 {
                let (ours, mut theirs) = UnixStream::pair().unwrap();
                let bytes = [message(1, &[]), message(2, &[5; 30]), message(3, &[6; 3])].concat();
                let mut incoming = Incoming::default();
                let mut seen = Vec::new();
                for part in bytes.chunks(piece) {
                    theirs.write_all(part).unwrap();
                    while let Some(message) = next(&mut incoming, &ours, ahead) {
                        seen.push((message.header.id, message.payload.len()));
                    }
                }
                assert_eq!(seen, [(1, 0), (2, 30), (3, 3)], "{piece}");
            }
        }
    }

    #[test]
    fn fds_stay_with_their_message_and_are_not_taken_where_none_are_due() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&message(1, &[1; 8])).unwrap();
        fds::send(theirs.as_fd(), &message(2, &[2; 8]), &[file.as_fd(), file.as_fd()]).unwrap();
        theirs.write_all(&message(3, &[3; 8])).unwrap();
        let mut incoming = Incoming::default();
        let mut seen = Vec::new();
        while let Some(message) = next(&mut incoming, &ours, Ahead::Never(&|header| header.id == 2)) {
            seen.push((message.header.id, message.fds.len()));
        }
        assert_eq!(seen, [(1, 0), (2, 2), (3, 0)]);
        for ahead in [Ahead::Never(&|_| false), Ahead::Freely] {
            fds::send(theirs.as_fd(), &message(4, &[]), &[file.as_fd()]).unwrap();
            assert!(matches!(incoming.read(&ours, ahead), Err(Cause::Malformed(Fault::StrayFds))));
        }
    }

    #[test]
    fn a_huge_promise_takes_no_memory_before_its_bytes_come() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&Header::command(1, Command::DMA_WRITE, 1 << 20).as_bytes()[..16]).unwrap();
        let mut incoming = Incoming::default();
        assert!(next(&mut incoming, &ours, Ahead::Freely).is_none());
        assert!(incoming.buffer.capacity() <= 2 * READ_MOST);
    }

    #[test]
    fn an_end_in_a_message_and_an_end_between_messages_differ() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&message(1, &[])[..7]).unwrap();
        drop(theirs);
        let mut incoming = Incoming::default();
        assert_eq!(incoming.read(&ours, Ahead::Never(&|_| true)).unwrap(), Read::Some);
        assert!(incoming.take(any).unwrap().is_none());
        assert!(matches!(incoming.read(&ours, Ahead::Never(&|_| true)), Err(Cause::ClosedMidMessage)));
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(Incoming::default().read(&ours, Ahead::Freely).unwrap(), Read::HungUp);
    }
}
