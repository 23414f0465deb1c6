//! The guest's ends of the pin's interrupt, and the look at the pin that each asks for (PCI 3.0 §2.2.6, §6.2.3).
//!
//! The server signals a level once, and KVM lowers the line at the guest's end of interrupt. Where the pin is still
//! asserted then, the line must be raised again, or the guest waits for ever. The answer to a look is old when it comes:
//!
//! ```text
//!   guest   end 1 ┐              interrupt 2, serves it, end 2 ┐
//!   server        └▶ look: asserted, and has signalled that  ──┼─▶ the answer: of what end 2 ended
//! ```
//! An answer that the next end has overtaken counts for nothing: that end has a look of its own, so no level is lost by
//! it. What is left is inherent: whether the server signals what a look has found as well, nobody says, and KVM raises a
//! line some time after its eventfd was signalled, which may be after the guest's next end. Then the guest is
//! interrupted once more than needed, finds nothing to do, and goes on; a level that is lost hangs it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use transport::vhost_user::vring::Call;

use crate::lock;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Asked {
    #[default]
    No,
    Once,
    /// The interrupt was ended again before the answer.
    Again,
}

/// The guest's ends of the pin's interrupt.
#[derive(Debug)]
pub struct Ends {
    /// Signalled by KVM at each, and by us when one is to be looked after that came too early.
    fd: OwnedFd,
    /// One at a time: a server that does not answer is not told more and more.
    asked: Mutex<Asked>,
}

impl Ends {
    /// None yet.
    ///
    /// # Errors
    /// When no eventfd can be had.
    pub fn new() -> io::Result<Arc<Self>> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self { fd, asked: Mutex::default() }))
    }

    /// True when there were some since the last time; does not wait.
    #[must_use]
    pub fn take(&self) -> bool {
        rustix::io::read(&self.fd, &mut [0; 8]).is_ok()
    }

    /// A look at the pin whose line `call` raises; `None` while one is on its way, after which there will be another.
    #[must_use]
    pub fn look(self: &Arc<Self>, call: Arc<Call>) -> Option<Look> {
        let mut asked = lock(&self.asked);
        if *asked != Asked::No {
            *asked = Asked::Again;
            return None;
        }
        *asked = Asked::Once;
        Some(Look { ends: Arc::clone(self), call })
    }

    fn has_more(&self) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        let waiting = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0);
        waiting || *lock(&self.asked) == Asked::Again
    }
}

impl AsFd for Ends {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A look at the pin that is on its way; over when it is dropped, answered or not.
#[must_use]
#[derive(Debug)]
pub struct Look {
    ends: Arc<Ends>,
    call: Arc<Call>,
}

impl Look {
    /// The pin was asserted: raises its line, unless the guest has ended an interrupt since. Any thread; does not wait.
    pub fn asserted(self) {
        if !self.ends.has_more()
            && let Err(error) = self.call.ring()
        {
            log::debug!("the pin is not raised again: {error}");
        }
    }
}

impl Drop for Look {
    fn drop(&mut self) {
        let asked = std::mem::take(&mut *lock(&self.ends.asked));
        if asked == Asked::Again
            && let Err(error) = rustix::io::write(&self.ends.fd, &1_u64.to_ne_bytes())
        {
            // It is full then, which says the same.
            log::debug!("the pin's end of interrupt is not noted: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn pin() -> (Arc<Ends>, Arc<Call>) {
        (Ends::new().unwrap(), Arc::new(Call::new().unwrap()))
    }

    /// As KVM does.
    fn end(ends: &Ends) {
        rustix::io::write(ends, &1_u64.to_ne_bytes()).unwrap();
    }

    #[test]
    fn a_pin_that_is_still_asserted_is_raised_again() {
        let (ends, call) = pin();
        end(&ends);
        assert!(ends.take());
        ends.look(Arc::clone(&call)).unwrap().asserted();
        assert_eq!(call.take().unwrap(), 1);
        assert!(!ends.take(), "there is nothing more to look after");
    }

    #[test]
    fn an_answer_that_the_next_end_has_overtaken_raises_nothing_and_the_next_look_does() {
        let (ends, call) = pin();
        // Nobody has heard of that end yet; then somebody has.
        for heard in [false, true] {
            let look = ends.look(Arc::clone(&call)).unwrap();
            end(&ends);
            if heard {
                assert!(ends.take());
                assert!(ends.look(Arc::clone(&call)).is_none(), "one at a time");
            }
            look.asserted();
            assert_eq!(call.take().unwrap(), 0, "heard: {heard}");
            assert!(ends.take(), "it is looked after, heard: {heard}");
            ends.look(Arc::clone(&call)).unwrap().asserted();
            assert_eq!(call.take().unwrap(), 1, "no level is lost, heard: {heard}");
        }
    }

    #[test]
    fn a_look_that_is_never_answered_does_not_keep_the_next_from_its_turn() {
        let (ends, call) = pin();
        let look = ends.look(Arc::clone(&call)).unwrap();
        assert!(ends.look(Arc::clone(&call)).is_none());
        drop(look);
        assert!(ends.take(), "the end in between is looked after");
        assert!(ends.look(call).is_some());
    }
}
