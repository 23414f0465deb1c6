//! Bounded waits: a deadline, and `poll` that never waits past it.
//!
//! Must never wait without a limit, whatever the peer does. One deadline covers a whole exchange, so a peer
//! that sends one byte at a time gains no time.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// The longest limit. Longer ones are shortened to it, so that arithmetic on time cannot overflow.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// The longest single `poll`: the clock is read again after it.
const GLANCE: Duration = Duration::from_millis(100);

/// When a `poll` returns this much later than its timeout, this process was stopped or had no processor
/// meanwhile.
const ABSENCE: Duration = Duration::from_millis(250);

/// How many times a ready socket still counts as ready after the deadline. It is enough for an answer that
/// arrived in parts, and ends the wait for a peer that never stops sending.
const LATE_LOOKS: u8 = 16;

/// The end of one exchange with a peer. Time in which this process did not run is not counted, as the peer
/// did not cause it.
#[derive(Clone, Debug)]
pub struct Deadline {
    started: Instant,
    limit: Duration,
    late: Arc<Late>,
}

#[derive(Debug, Default)]
struct Late {
    /// Microseconds in which this process did not run.
    absent: AtomicU64,
    /// How many times a socket was found ready after the deadline.
    looks: AtomicU8,
}

impl Deadline {
    /// A deadline `limit` from now (at most a day).
    pub fn after(limit: Duration) -> Self {
        Self { started: Instant::now(), limit: limit.min(LONGEST), late: Arc::default() }
    }

    /// The limit from the start of the exchange.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// The time that is left; `None` once the deadline has passed.
    pub fn remaining(&self) -> Option<Duration> {
        let absent = Duration::from_micros(self.late.absent.load(Ordering::Relaxed));
        let present = self.started.elapsed().saturating_sub(absent);
        self.limit.checked_sub(present).filter(|left| !left.is_zero())
    }

    /// Measures a wait that began at `begun` and was to last `pause`, and notes the excess as absence of this
    /// process.
    fn look(&self, begun: Instant, pause: Duration) {
        let late = begun.elapsed().saturating_sub(pause);
        if late > ABSENCE {
            let late = u64::try_from(late.as_micros()).unwrap_or(u64::MAX);
            self.late.absent.fetch_add(late, Ordering::Relaxed);
        }
    }
}

/// Makes the next read or write of `fd` return at once, also when a peer shares the open file and has made it
/// blocking. The peer can still make it blocking again right before the call, and the call waits then; see
/// [`super::eventfd`].
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
        // Bytes that have arrived count, even when the deadline has passed before this `poll`.
        let left = deadline.remaining();
        let (begun, pause) = (Instant::now(), left.unwrap_or_default().min(GLANCE));
        let timeout = Timespec::try_from(pause).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut fds = [PollFd::from_borrowed_fd(fd, events)];
        let polled = poll(&mut fds, Some(&timeout));
        deadline.look(begun, pause);
        match polled {
            Ok(0) if left.is_none() => return Ok(Waited::TimedOut),
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) if left.is_none() && deadline.late.looks.fetch_add(1, Ordering::Relaxed) >= LATE_LOOKS => {
                return Ok(Waited::TimedOut);
            }
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
    fn what_arrived_before_the_deadline_was_looked_at_counts() {
        let (a, mut b) = UnixStream::pair().unwrap();
        let deadline = Deadline::after(Duration::from_millis(100));
        b.write_all(b"x").unwrap();
        std::thread::sleep(Duration::from_millis(150));
        assert_eq!(wait_readable(a.as_fd(), &deadline).unwrap(), Waited::Ready);
    }

    #[test]
    fn a_peer_that_never_stops_sending_gains_nothing_once_the_deadline_has_passed() {
        let (a, mut b) = UnixStream::pair().unwrap();
        b.write_all(b"x").unwrap();
        let deadline = Deadline::after(Duration::from_millis(20));
        std::thread::sleep(Duration::from_millis(30));
        let ready =
            (0..100).filter(|_| wait_readable(a.as_fd(), &deadline).unwrap() == Waited::Ready).count();
        assert_eq!(ready, usize::from(LATE_LOOKS));
    }

    #[test]
    fn an_absurd_limit_is_cut_not_overflown() {
        assert_eq!(Deadline::after(Duration::MAX).limit(), LONGEST);
    }
}
