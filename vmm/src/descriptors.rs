//! Raw descriptors become owned ones, here and nowhere else: those that whoever started us left open
//! (`socket=fd=N`), and eventfds in the type that `kvm-ioctls` wants.

#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::sockopt::socket_type;
use vmm_sys_util::eventfd::EventFd;

static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Takes over a connected unix stream socket, once. Call it before this process opens descriptors of its own,
/// that is while the command line is read.
///
/// # Errors
/// When the number is not that of an open, connected stream socket, or was taken before.
pub(crate) fn inherited_stream(number: RawFd) -> io::Result<UnixStream> {
    if !std::path::Path::new(&format!("/proc/self/fd/{number}")).exists() {
        return Err(io::Error::from_raw_os_error(EBADF));
    }
    if !TAKEN.lock().unwrap_or_else(PoisonError::into_inner).insert(number) {
        return Err(io::Error::other("this descriptor is used already"));
    }
    // SAFETY: the descriptor is open, numbers up to 2 are refused by the caller, this process has opened none of
    // its own yet, and the set above sees to it that nobody else takes it.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    if socket_type(&fd)? != rustix::net::SocketType::STREAM {
        return Err(io::Error::other("it is not a stream socket"));
    }
    fcntl_setfd(fd.as_fd(), FdFlags::CLOEXEC)?;
    let stream = UnixStream::from(fd);
    stream.peer_addr()?;
    Ok(stream)
}

/// A second descriptor of the same eventfd.
///
/// # Errors
/// When the process has no descriptor left.
pub(crate) fn eventfd(fd: BorrowedFd<'_>) -> io::Result<EventFd> {
    let owned = fd.try_clone_to_owned()?;
    // SAFETY: the descriptor was just made by dup, and ownership moves to the `EventFd`.
    Ok(unsafe { EventFd::from_raw_fd(owned.into_raw_fd()) })
}

const EBADF: i32 = 9;
