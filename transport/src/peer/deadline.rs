//! Bounded waits: a point in time, and `poll` that never goes past it.
//!
//! Must never wait without a limit, whatever the peer does: the deadline belongs to the whole exchange, so a
//! peer that drips one byte at a time gains nothing.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// The longest limit that is honoured; longer ones are cut to it, so that arithmetic on time cannot overflow.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// The end of one exchange with a peer.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    started: Instant,
    limit: Duration,
}

impl Deadline {
    /// A deadline `limit` from now (at most a day).
    pub fn after(limit: Duration) -> Self {
        Self { started: Instant::now(), limit: limit.min(LONGEST) }
    }

    /// The whole time that was granted.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// What is left; `None` once the deadline has passed.
    pub fn remaining(&self) -> Option<Duration> {
        self.limit.checked_sub(self.started.elapsed()).filter(|left| !left.is_zero())
    }
}

/// Sees to it that the next read or write of `fd` returns: for what a peer has a descriptor of, too, and may have made
/// blocking. A peer that changes it back in the instant before the call makes us wait; see [`super::eventfd`].
pub(crate) fn never_block(fd: impl AsFd) -> io::Result<()> {
    let flags = fcntl_getfl(&fd)?;
    if !flags.contains(OFlags::NONBLOCK) {
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
    }
    Ok(())
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// The fd is ready, or its peer hung up: the next call on it does not block.
    Ready,
    /// The deadline passed first.
    TimedOut,
}

/// Waits until `fd` is readable, hung up, or `deadline` has passed.
pub fn wait_readable(fd: BorrowedFd<'_>, deadline: &Deadline) -> io::Result<Waited> {
    wait(fd, PollFlags::IN, deadline)
}

/// Waits until `fd` is writable, hung up, or `deadline` has passed.
pub fn wait_writable(fd: BorrowedFd<'_>, deadline: &Deadline) -> io::Result<Waited> {
    wait(fd, PollFlags::OUT, deadline)
}

fn wait(fd: BorrowedFd<'_>, events: PollFlags, deadline: &Deadline) -> io::Result<Waited> {
    loop {
        let Some(left) = deadline.remaining() else { return Ok(Waited::TimedOut) };
        let timeout = Timespec::try_from(left).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut fds = [PollFd::from_borrowed_fd(fd, events)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(Waited::Ready),
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_silent_peer_ends_in_a_timeout_not_early_and_not_late() {
        let (a, _b) = UnixStream::pair().unwrap();
        let begin = Instant::now();
        let waited = wait_readable(a.as_fd(), &Deadline::after(Duration::from_millis(50))).unwrap();
        assert_eq!(waited, Waited::TimedOut);
        assert!(begin.elapsed() >= Duration::from_millis(50));
        assert!(begin.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn data_and_hang_up_both_end_the_wait_at_once() {
        let (a, mut b) = UnixStream::pair().unwrap();
        b.write_all(b"x").unwrap();
        let deadline = Deadline::after(Duration::from_secs(5));
        assert_eq!(wait_readable(a.as_fd(), &deadline).unwrap(), Waited::Ready);
        let (c, d) = UnixStream::pair().unwrap();
        drop(d);
        assert_eq!(wait_readable(c.as_fd(), &deadline).unwrap(), Waited::Ready);
        assert!(deadline.remaining().is_some());
    }

    #[test]
    fn an_absurd_limit_is_cut_not_overflown() {
        assert_eq!(Deadline::after(Duration::MAX).limit(), LONGEST);
    }
}
