//! From running to the end: who may ask for it, and how vCPU threads stop.
//!
//! A vCPU, the console or a signal *requests*; the control loop *decides*. The first request closes the
//! gate, so no vCPU enters the guest again, and wakes the control loop.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why the machine should not go on as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// The guest entered S5.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest or its KVM cannot go on; the text says why, with the registers.
    Crash(String),
    /// The guest's kernel says that it has panicked.
    Panicked,
    /// The user asked for the end (Ctrl-A x, or the library's caller).
    Quit,
    /// A signal asked for the end.
    Signal(i32),
}

/// What a vCPU thread finds at the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passage {
    /// Enter the guest.
    Open,
    /// End the thread.
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gate {
    Open,
    Closed,
    Ended,
}

#[derive(Debug)]
struct State {
    gate: Gate,
    first: Option<Request>,
    /// vCPU threads that have started and not ended.
    threads: usize,
}

/// Shared by the control loop and every vCPU thread of one boot.
///
/// Its lock is held for a few instructions only, and no other lock is taken under it.
#[derive(Debug)]
pub struct Lifecycle {
    state: Mutex<State>,
    changed: Condvar,
    /// Mirrors "the gate is not open", so that a vCPU looks at one word on its way.
    stop: AtomicBool,
    wake: EventFd,
}

impl Lifecycle {
    /// A closed gate: vCPU threads wait until [`Lifecycle::open`].
    ///
    /// # Errors
    /// When no eventfd can be had.
    pub fn new() -> io::Result<Self> {
        Ok(Lifecycle {
            state: Mutex::new(State { gate: Gate::Closed, first: None, threads: 0 }),
            changed: Condvar::new(),
            stop: AtomicBool::new(true),
            wake: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })
    }

    /// Readable when there is a request.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Asks for the end or a reset, on any thread. Only the first request counts, but a reset gives way to a user
    /// or a signal that asks for the end: nobody would repeat it.
    pub fn request(&self, request: Request) {
        let mut state = self.lock();
        let counts = match state.first {
            None => true,
            Some(Request::Reset) => matches!(request, Request::Quit | Request::Signal(_)),
            Some(_) => false,
        };
        if counts && state.gate != Gate::Ended {
            state.first = Some(request);
            state.gate = Gate::Closed;
            self.stop.store(true, Ordering::Release);
            if let Err(error) = self.wake.write(1) {
                log::error!("cannot wake the control loop: {error}");
            }
        }
    }

    /// The request that counts. Called by the control loop.
    pub fn take_request(&self) -> Option<Request> {
        // An eventfd that is empty already only says that the request was taken before.
        if let Err(error) = self.wake.read()
            && error.kind() != io::ErrorKind::WouldBlock
        {
            log::error!("cannot read the wake-up: {error}");
        }
        self.lock().first.clone()
    }

    /// Lets the vCPUs run. Called by the control loop.
    pub fn open(&self) {
        let mut state = self.lock();
        if state.first.is_none() {
            state.gate = Gate::Open;
            self.stop.store(false, Ordering::Release);
            self.changed.notify_all();
        }
    }

    /// Ends every vCPU thread, calling `kick` until the last has left the guest.
    ///
    /// A kick is lost when it arrives between the thread's look at the gate and its entry into the
    /// guest, hence again and again; a thread in a bounded wait on a peer is waited for.
    pub fn end(&self, mut kick: impl FnMut()) {
        let mut state = self.lock();
        state.gate = Gate::Ended;
        self.stop.store(true, Ordering::Release);
        self.changed.notify_all();
        while state.threads > 0 {
            drop(state);
            kick();
            state = self.lock();
            if state.threads > 0 {
                let wait = self.changed.wait_timeout(state, Duration::from_millis(2));
                state = wait.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    /// Whether the guest goes on. Never waits.
    pub fn is_open(&self) -> bool {
        !self.stop.load(Ordering::Acquire)
    }

    /// Called by a vCPU thread before each entry into the guest; waits while the gate is closed.
    pub fn pass(&self) -> Passage {
        if self.is_open() {
            return Passage::Open;
        }
        let mut state = self.lock();
        loop {
            match state.gate {
                Gate::Open => return Passage::Open,
                Gate::Ended => return Passage::Ended,
                Gate::Closed => {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Counts a vCPU thread in. Called before the thread is spawned; the guard goes into the thread.
    #[must_use = "the thread counts as ended when this is dropped"]
    pub fn thread_started(self: &std::sync::Arc<Self>) -> ThreadGuard {
        self.lock().threads += 1;
        ThreadGuard(std::sync::Arc::clone(self))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A vCPU thread that has not ended.
#[derive(Debug)]
pub struct ThreadGuard(std::sync::Arc<Lifecycle>);

impl Drop for ThreadGuard {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.threads = state.threads.saturating_sub(1);
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn only_the_first_request_counts_and_closes_the_gate() {
        let lifecycle = Lifecycle::new().unwrap();
        lifecycle.open();
        assert_eq!(lifecycle.pass(), Passage::Open);
        lifecycle.request(Request::Reset);
        lifecycle.request(Request::PowerOff);
        assert_eq!(lifecycle.take_request(), Some(Request::Reset));
        lifecycle.open();
        assert!(lifecycle.stop.load(Ordering::Acquire), "a gate with a request stays closed");
    }

    #[test]
    fn a_reset_gives_way_to_a_signal_and_nothing_else_does() {
        let lifecycle = Lifecycle::new().unwrap();
        lifecycle.request(Request::Reset);
        lifecycle.request(Request::Crash(String::new()));
        assert_eq!(lifecycle.take_request(), Some(Request::Reset));
        lifecycle.request(Request::Signal(15));
        lifecycle.request(Request::Quit);
        assert_eq!(lifecycle.take_request(), Some(Request::Signal(15)));
    }

    #[test]
    fn end_releases_threads_that_wait_at_the_gate() {
        let lifecycle = Arc::new(Lifecycle::new().unwrap());
        let guard = lifecycle.thread_started();
        let waiting = Arc::clone(&lifecycle);
        let thread = std::thread::spawn(move || {
            let _counted = guard;
            waiting.pass()
        });
        lifecycle.end(|| {});
        assert_eq!(thread.join().unwrap(), Passage::Ended);
    }
}
