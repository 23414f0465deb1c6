//! The guest's ends of the pin's interrupt (PCI 3.0 §2.2.6, §6.2.3). After each end, the client takes a
//! *look*: it asks the server whether the pin is still asserted.
//!
//! The server signals a level once, and KVM lowers the line at the guest's end of interrupt. If the pin is
//! still asserted then, the line must be raised again, or the guest waits for ever. An answer may be outdated
//! when it arrives:
//!
//! ```text
//!   guest   end 1 ┐              interrupt 2, serves it, end 2 ┐
//!   server        └▶ look: asserted, and has signalled that  ──┼─▶ the answer: about the level before end 2
//! ```
//! An answer that arrives after the next end is ignored. No level is lost by that, because the next end has a
//! look of its own.
//!
//! One spurious interrupt remains possible, for two reasons: the client cannot know whether the server also
//! signals the level that a look has found; and KVM raises a line some time after its eventfd was signalled,
//! which may be after the guest's next end. The guest then finds nothing to do and goes on. A lost level, in
//! contrast, would hang the guest.

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
    /// The guest ended the interrupt again before the answer came.
    Again,
}

/// The guest's ends of the pin's interrupt.
#[derive(Debug)]
pub struct Ends {
    /// Signalled by KVM at each end. Also signalled by a finished look when another end came during that
    /// look.
    fd: OwnedFd,
    /// Allows one look at a time, so that messages do not pile up at a server that does not answer.
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

    /// Takes the ends since the last call: true when there were some. Does not wait.
    #[must_use]
    pub fn take(&self) -> bool {
        rustix::io::read(&self.fd, &mut [0; 8]).is_ok()
    }

    /// Begins a look at the pin whose line is raised by `call`. `None` while another look is under way; a new
    /// look follows that one.
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

/// A look at the pin that is under way. It ends when this is dropped, with or without an answer.
#[must_use]
#[derive(Debug)]
pub struct Look {
    ends: Arc<Ends>,
    call: Arc<Call>,
}

impl Look {
    /// The answer: the pin was asserted. Raises the pin's line, unless the guest has ended an interrupt since
    /// the look began. Called on any thread; does not wait.
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
            // The counter is full then, and a full counter is a signal already.
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

    /// Ends an interrupt, as KVM does.
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
        // The second end comes during the look: first not yet taken by the device, then taken.
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
