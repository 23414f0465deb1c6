//! Eventfds that are shared with a peer: their counts are taken and raised without ever waiting.
//!
//! Whether a descriptor blocks (O_NONBLOCK) is a property of the open file. The peer shares that file and can
//! change the flag at any moment, also between our check and our call. A read can be told not to wait
//! regardless of the flag. A write cannot: a peer that fills the count and clears the flag at the same time
//! would block us. The kernel's own code can signal an eventfd without such a wait; the machine provides a
//! way to it with [`signal_by`].

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use super::deadline::never_block;

/// A function that raises an eventfd's count by one, or leaves it at its maximum, without waiting.
pub type Signal = fn(BorrowedFd<'_>) -> io::Result<()>;

static SIGNAL: OnceLock<Signal> = OnceLock::new();

/// Makes this whole process signal eventfds with `signal`. Calls after the first one have no effect.
pub fn signal_by(signal: Signal) {
    SIGNAL.get_or_init(|| signal);
}

/// Signals the eventfd. An eventfd whose count is at its maximum counts as signalled.
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

/// Takes the count of the eventfd: 0 when it was not signalled since the last time.
pub(crate) fn take(fd: impl AsFd) -> io::Result<u64> {
    let mut count = [0; 8];
    // This offset stands for none: an eventfd has no position.
    match preadv2(fd, &mut [IoSliceMut::new(&mut count)], u64::MAX, ReadWriteFlags::NOWAIT) {
        Ok(_) => Ok(u64::from_ne_bytes(count)),
        Err(Errno::AGAIN) => Ok(0),
        Err(errno) => Err(errno.into()),
    }
}
