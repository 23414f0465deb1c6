//! Bytes and fds on a scripted peer's side of a socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::peer::deadline::{Deadline, Waited, wait_readable, wait_writable};
use crate::peer::fds;

/// Longer than any wait of a test.
pub(super) const FOREVER: Duration = Duration::from_secs(120);

/// Fills `bytes`; false when the peer closed its end.
pub(super) fn fill(
    stream: &UnixStream,
    bytes: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    deadline: &Deadline,
) -> io::Result<bool> {
    let mut rest = bytes;
    while !rest.is_empty() {
        match fds::receive(stream.as_fd(), rest, fds::Room::Many, fds) {
            Ok(received) if received.bytes == 0 => return Ok(false),
            Ok(received) => rest = rest.get_mut(received.bytes..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if wait_readable(stream.as_fd(), deadline)? == Waited::TimedOut {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// Sends all of `bytes`, `fds` with the first.
pub(super) fn send_all(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let deadline = Deadline::after(FOREVER);
    let mut rest = bytes;
    let mut fds = fds;
    while !rest.is_empty() {
        match fds::send(stream.as_fd(), rest, fds) {
            Ok(sent) => {
                rest = rest.get(sent..).unwrap_or_default();
                fds = &[];
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wait_writable(stream.as_fd(), &deadline)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads nothing until the peer closes its end.
pub(super) fn park_until_closed(stream: &UnixStream) -> io::Result<()> {
    // Waits for a hang-up only, as no event is asked for.
    let mut fds = [rustix::event::PollFd::new(stream, rustix::event::PollFlags::empty())];
    rustix::event::poll(&mut fds, None)?;
    Err(io::ErrorKind::UnexpectedEof.into())
}

/// Descriptors to send where the kind does not matter.
pub(super) fn spare_fds(count: usize) -> io::Result<Vec<OwnedFd>> {
    (0..count).map(|_| Ok(std::fs::File::open("/dev/null")?.into())).collect()
}
