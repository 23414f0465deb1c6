//! Eventfds that a peer has, too: taking and raising their counts without ever waiting.
//!
//! Whether a descriptor blocks (O_NONBLOCK) belongs to the open file, which the peer shares and can change at any moment,
//! between our look and our call included. A read can be told not to wait, whatever the file says. A write cannot: a peer
//! that fills the count and clears the flag in the same instant would hold us. The kernel's own code signals eventfds
//! without such a wait; a machine lends it to us by [`signal_by`].

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use super::deadline::never_block;

/// Raises the count of an eventfd by one, or leaves it full, without waiting.
pub type Signal = fn(BorrowedFd<'_>) -> io::Result<()>;

static SIGNAL: OnceLock<Signal> = OnceLock::new();

/// Signals eventfds by `signal` from now on, in this whole process. The first call counts.
pub fn signal_by(signal: Signal) {
    SIGNAL.get_or_init(|| signal);
}

/// Signals the eventfd. A full count is a signal too.
pub(crate) fn signal(fd: BorrowedFd<'_>) -> io::Result<()> {
    if SIGNAL.get().is_some_and(|signal| signal(fd).is_ok()) {
        return Ok(());
    }
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
    if poll(&mut fds, Some(&now))? == 0 {
        return Ok(());
    }
    never_block(fd)?;
    match rustix::io::write(fd, &1u64.to_ne_bytes()) {
        Ok(_) | Err(Errno::AGAIN) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Takes the count of the eventfd: 0 when nothing was signalled since the last time.
pub(crate) fn take(fd: impl AsFd) -> io::Result<u64> {
    let mut count = [0; 8];
    // No offset: an eventfd has no position.
    match preadv2(fd, &mut [IoSliceMut::new(&mut count)], u64::MAX, ReadWriteFlags::NOWAIT) {
        Ok(_) => Ok(u64::from_ne_bytes(count)),
        Err(Errno::AGAIN) => Ok(0),
        Err(errno) => Err(errno.into()),
    }
}
