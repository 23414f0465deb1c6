//! Why an exchange with a peer failed, whatever the protocol.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::time::Duration;

use rustix::io::Errno;

use crate::wire::Fault;

/// Why a step failed.
#[derive(Debug)]
pub enum Cause {
    /// The socket cannot be reached.
    Unreachable(io::Error),
    /// No answer, or not all of it, before the deadline.
    Silent(Duration),
    /// The peer did not read our request before the deadline.
    NotReading(Duration),
    /// The peer closed the connection.
    Closed,
    /// The peer closed the connection in the middle of a message.
    ClosedMidMessage,
    /// The socket failed.
    Io(io::Error),
    /// The answer is not one to this request.
    Malformed(Fault),
    /// The peer said no, with this code.
    Refused(u64),
    /// The feature was not negotiated, so nothing was sent.
    NotNegotiated,
    /// An earlier failure ended the connection; nothing was sent.
    AlreadyLost,
    /// What we were asked to send makes no sense; nothing was sent.
    Invalid(&'static str),
    /// Our own side of a transfer failed; the peer did nothing wrong.
    Local(io::Error),
    /// The peer's offer does not fit; the text says how.
    Incompatible(String),
}

/// What the user may try when the socket of `peer` cannot be reached.
pub(crate) fn unreachable_hint(source: &io::Error, peer: &str) -> Option<&'static str> {
    if source.raw_os_error() == Some(Errno::PROTOTYPE.raw_os_error()) {
        return Some("it is a socket of another kind: those of backends and servers are stream sockets");
    }
    match source.kind() {
        io::ErrorKind::NotFound => Some("start the backend first, or give reconnect=SECONDS to wait for it"),
        io::ErrorKind::ConnectionRefused => Some(refused_hint(peer)),
        io::ErrorKind::NotADirectory => Some("a part of the path is no directory: is it right?"),
        io::ErrorKind::PermissionDenied => {
            Some("you may not write to this socket: check its owner, its mode and those of its directory")
        }
        io::ErrorKind::TimedOut => Some("the backend does not accept connections: is it busy or stopped?"),
        io::ErrorKind::AddrInUse => {
            Some("another program listens on this path; remove the file if it is stale")
        }
        io::ErrorKind::InvalidInput | io::ErrorKind::InvalidFilename => {
            Some("a socket path has at most 107 bytes: use a shorter one")
        }
        _ => None,
    }
}

/// What is there, where nobody answers: the kernel says the same of everything on which nobody listens.
fn refused_hint(peer: &str) -> &'static str {
    if peer.starts_with('@') {
        return "nobody listens on this abstract name: start its owner first, in the same network namespace";
    }
    match std::fs::metadata(peer).map(|found| found.file_type()) {
        Ok(found) if found.is_dir() => "it is a directory: give the path of the socket in it",
        Ok(found) if !found.is_socket() => "it is no socket: is the path right?",
        _ => "the socket file is stale: nobody listens on it; start its owner again",
    }
}
