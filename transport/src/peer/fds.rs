//! One message with fds over a unix socket: `sendmsg` and `recvmsg` with SCM_RIGHTS.
//!
//! Must never leak an fd. A received fd is close-on-exec and owned before the message is judged, so refusing
//! the message closes the fd. No function here blocks; waiting belongs to [`super::deadline`].

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::admit;
use super::wire::Fault;

/// The most fds that Linux lets one message carry (SCM_MAX_FD).
pub const MAX_FDS: usize = 253;

/// Sends `bytes` and `fds` with one `sendmsg`, without blocking and without SIGPIPE.
///
/// Returns the number of bytes sent. It is smaller than `bytes.len()` when the socket buffer is full; the fds
/// travel with the first byte. `WouldBlock` when no byte was sent.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && (fds.len() > MAX_FDS || !control.push(SendAncillaryMessage::ScmRights(fds))) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many file descriptors for one message"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let sent = rustix::io::retry_on_intr(|| sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags))?;
    Ok(sent)
}

/// How many descriptors may come with the bytes that are read next. When no descriptor is due, no room is
/// offered, and the kernel drops descriptors before this process ever holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// None; a descriptor that comes is a fault.
    None,
    /// None; descriptors that come are dropped without a fault.
    Ignored,
    /// One.
    One,
    /// As many as a message can carry.
    Many,
}

/// The outcome of one `recvmsg`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Bytes stored; 0 when the peer closed its end.
    pub bytes: usize,
    /// What is wrong with the descriptors that came. The message must be refused then.
    pub fault: Option<Fault>,
}

/// Receives up to `bytes.len()` bytes and appends the fds that came with them, without blocking.
///
/// `bytes` must not be empty. A descriptor that could make this process wait for the peer is never appended:
/// another thread closes it, and it is a fault.
pub fn receive(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    room: Room,
    fds: &mut Vec<OwnedFd>,
) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let (most, space) = match room {
        Room::One if !admit::is_overrun() => {
            (1, space.get_mut(..rustix::cmsg_space!(ScmRights(1))).unwrap_or_default())
        }
        Room::Many if !admit::is_overrun() => (MAX_FDS, space.as_mut_slice()),
        _ => (0, &mut [][..]),
    };
    let mut control = RecvAncillaryBuffer::new(space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message =
        rustix::io::retry_on_intr(|| recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, flags))?;
    let mut came = 0_usize;
    let mut fault = None;
    for message in control.drain() {
        let RecvAncillaryMessage::ScmRights(received) = message else { continue };
        for fd in received {
            came = came.saturating_add(1);
            if admit::is_harmless(fd.as_fd()) {
                fds.push(fd);
            } else {
                admit::close_elsewhere(fd);
                fault = Some(Fault::Descriptor);
            }
        }
    }
    let truncated = message.flags.contains(ReturnFlags::CTRUNC);
    if truncated && room != Room::Ignored {
        // Fewer fds came than there was room for, so this process is out of descriptors.
        fault = Some(match most {
            0 => Fault::StrayFds,
            _ if came < most => Fault::FdsTruncated,
            _ => Fault::Fds { got: came.saturating_add(1), least: 0, most: 1 },
        });
    }
    Ok(Received { bytes: message.bytes, fault })
}

/// Copies the bytes that are read next, as many as have arrived, and leaves them and their descriptors in the
/// socket.
pub fn peek(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<usize> {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let (_, count) = rustix::io::retry_on_intr(|| rustix::net::recv(socket, &mut *bytes, flags))?;
    Ok(count)
}

/// The access that a guest has to a mapped file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Reading only.
    ReadOnly,
    /// Reading and writing.
    ReadWrite,
}

impl Protection {
    /// True when `fd` was opened in a mode that allows this mapping.
    pub fn is_open_for(self, fd: impl AsFd) -> bool {
        let Ok(flags) = fcntl_getfl(fd) else { return false };
        let mode = flags & OFlags::RWMODE;
        let enough = mode == OFlags::RDWR || (self == Self::ReadOnly && mode == OFlags::RDONLY);
        enough && !flags.contains(OFlags::PATH)
    }
}

/// The size of a regular file; 0 for any other kind of file, as mapping it would fault or fail.
pub fn file_size(fd: impl AsFd) -> u64 {
    let Ok(stat) = rustix::fs::fstat(fd) else { return 0 };
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::RegularFile {
        return 0;
    }
    u64::try_from(stat.st_size).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn bytes_and_fds_arrive_together_and_close_on_exec() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(send(a.as_fd(), b"hello", &[file.as_fd(), a.as_fd()]).unwrap(), 5);
        let mut bytes = [0; 16];
        let mut fds = Vec::new();
        let received = receive(b.as_fd(), &mut bytes, Room::Many, &mut fds).unwrap();
        assert_eq!(received, Received { bytes: 5, fault: None });
        assert_eq!(&bytes[..5], b"hello");
        assert_eq!(fds.len(), 2);
        for fd in &fds {
            let flags = rustix::io::fcntl_getfd(fd).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        }
    }

    #[test]
    fn the_most_fds_that_linux_allows_arrive_whole() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let many = vec![file.as_fd(); MAX_FDS];
        send(a.as_fd(), b"x", &many).unwrap();
        let mut fds = Vec::new();
        let received = receive(b.as_fd(), &mut [0; 1], Room::Many, &mut fds).unwrap();
        assert_eq!(received.fault, None);
        assert_eq!(fds.len(), MAX_FDS);
    }

    #[test]
    fn where_no_fd_is_due_none_is_taken_and_it_is_a_fault() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let mut fds = Vec::new();
        for (room, got) in [(Room::None, 0), (Room::Ignored, 0), (Room::One, 1)] {
            send(a.as_fd(), b"x", &[file.as_fd()]).unwrap();
            let received = receive(b.as_fd(), &mut [0; 1], room, &mut fds).unwrap();
            let fault = (room == Room::None).then_some(Fault::StrayFds);
            assert_eq!(received, Received { bytes: 1, fault });
            assert_eq!(fds.drain(..).count(), got, "{room:?}");
        }
        let proc = std::fs::File::open("/proc/self/status").unwrap();
        send(a.as_fd(), b"x", &[proc.as_fd()]).unwrap();
        let received = receive(b.as_fd(), &mut [0; 1], Room::One, &mut fds).unwrap();
        assert_eq!((received.fault, fds.len()), (Some(Fault::Descriptor), 0), "it may wait for the peer");
    }

    #[test]
    fn one_fd_more_than_linux_allows_is_refused_before_sending() {
        let (a, _b) = UnixStream::pair().unwrap();
        let many = vec![a.as_fd(); MAX_FDS + 1];
        assert_eq!(send(a.as_fd(), b"x", &many).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn nothing_to_receive_would_block_and_a_closed_peer_reads_zero() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut fds = Vec::new();
        let empty = receive(a.as_fd(), &mut [0; 1], Room::None, &mut fds).unwrap_err();
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
        drop(b);
        assert_eq!(receive(a.as_fd(), &mut [0; 1], Room::None, &mut fds).unwrap().bytes, 0);
        assert_eq!(send(a.as_fd(), b"x", &[]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn files_are_mapped_as_they_were_opened() {
        let path = std::env::temp_dir().join(format!("outboard-shmem-{}", std::process::id()));
        let writable = std::fs::File::options().write(true).create_new(true).open(&path).unwrap();
        let both = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        let read_only = std::fs::File::open(&path).unwrap();
        let named = rustix::fs::open(&path, OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
        std::fs::remove_file(&path).unwrap();
        let opened = |fd: &dyn Fn(Protection) -> bool| (fd(Protection::ReadOnly), fd(Protection::ReadWrite));
        assert_eq!(opened(&|what| what.is_open_for(&both)), (true, true));
        assert_eq!(opened(&|what| what.is_open_for(&read_only)), (true, false));
        assert_eq!(opened(&|what| what.is_open_for(&writable)), (false, false));
        assert_eq!(opened(&|what| what.is_open_for(&named)), (false, false));
    }

    #[test]
    fn only_regular_files_have_a_size() {
        let memfd = rustix::fs::memfd_create("file", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memfd, 8192).unwrap();
        assert_eq!(file_size(&memfd), 8192);
        assert_eq!(file_size(std::fs::File::open("/").unwrap()), 0, "a directory");
        assert_eq!(file_size(std::fs::File::open("/dev/zero").unwrap()), 0, "a device");
        assert_eq!(file_size(std::os::unix::net::UnixStream::pair().unwrap().0), 0, "a socket");
        assert_eq!(
            file_size(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap()),
            0,
            "an eventfd"
        );
    }
}
