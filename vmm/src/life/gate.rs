//! From running to the end: who may ask for it, and how vCPU threads stop.
//!
//! A vCPU, the console or a signal *requests*; the control loop *decides*. The first request closes the
//! gate, so no vCPU enters the guest again, and wakes the control loop.
//!
//! The gate is open while the board is complete, nobody has the vCPUs parked, and nobody has asked for the end.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
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

#[derive(Debug, Default)]
struct State {
    /// The board is complete.
    opened: bool,
    ended: bool,
    /// How many want the vCPUs parked.
    parks: usize,
    first: Option<Request>,
    /// vCPU threads that have started and not ended.
    threads: usize,
    /// Those of them that stand at the gate.
    standing: usize,
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
            state: Mutex::default(),
            changed: Condvar::new(),
            stop: AtomicBool::new(true),
            wake: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })
    }

    /// Readable when there is a request.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Changes the state, and opens or closes the gate accordingly.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        let open = state.opened && !state.ended && state.parks == 0 && state.first.is_none();
        self.stop.store(!open, Ordering::Release);
        self.changed.notify_all();
    }

    /// Asks for the end or a reset, on any thread. Only the first request counts, but a reset gives way to a user
    /// or a signal that asks for the end: nobody would repeat it.
    pub fn request(&self, request: Request) {
        self.change(|state| {
            let counts = match state.first {
                None => true,
                Some(Request::Reset) => matches!(request, Request::Quit | Request::Signal(_)),
                Some(_) => false,
            };
            if counts && !state.ended {
                state.first = Some(request);
            }
        });
        if let Err(error) = self.wake.write(1) {
            log::error!("cannot wake the control loop: {error}");
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

    /// Lets the vCPUs run, unless somebody has asked for the end or has them parked. Called by the control loop.
    pub fn open(&self) {
        self.change(|state| state.opened = true);
    }

    /// Waits until every vCPU stands outside the guest, its pending accesses completed, and keeps them there.
    ///
    /// A vCPU thread in a bounded wait on a peer is waited for. Calls `meanwhile` again and again until the last vCPU has
    /// come out: it interrupts the vCPUs, as an interruption is lost that arrives between a thread's look at the gate and
    /// its entry into the guest.
    pub fn park(self: &Arc<Self>, mut meanwhile: impl FnMut()) -> Parked {
        self.change(|state| state.parks += 1);
        let parked = Parked(Arc::clone(self));
        while !self.all_stand() {
            meanwhile();
            let running = |state: &mut State| state.standing < state.threads;
            let waited = self.changed.wait_timeout_while(self.lock(), PAUSE, running);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
        parked
    }

    fn all_stand(&self) -> bool {
        let state = self.lock();
        state.standing == state.threads
    }

    /// Ends every vCPU thread that stands at the gate, and every other one when it comes there.
    pub fn end(&self) {
        self.change(|state| state.ended = true);
    }

    /// Whether the guest goes on. Never waits.
    pub fn is_open(&self) -> bool {
        !self.stop.load(Ordering::Acquire)
    }

    /// Whether the guest will not go on. Never waits.
    pub fn is_ending(&self) -> bool {
        let state = self.lock();
        state.ended || state.first.is_some()
    }

    /// Called by a vCPU thread before it enters the guest; waits while the gate is closed.
    pub fn pass(&self) -> Passage {
        if self.is_open() {
            return Passage::Open;
        }
        let mut state = self.lock();
        state.standing += 1;
        self.changed.notify_all();
        while !state.ended && !self.is_open() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.standing -= 1;
        if state.ended { Passage::Ended } else { Passage::Open }
    }

    /// Counts a vCPU thread in. Called before the thread is spawned; the guard goes into the thread.
    #[must_use = "the thread counts as ended when this is dropped"]
    pub fn thread_started(self: &Arc<Self>) -> ThreadGuard {
        self.lock().threads += 1;
        ThreadGuard(Arc::clone(self))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long to wait for a vCPU that was interrupted before it is interrupted again.
const PAUSE: Duration = Duration::from_millis(2);

/// Every vCPU stands outside the guest while this lives.
#[derive(Debug)]
#[must_use = "the vCPUs go on when this is dropped"]
pub struct Parked(Arc<Lifecycle>);

impl Drop for Parked {
    fn drop(&mut self) {
        self.0.change(|state| state.parks = state.parks.saturating_sub(1));
    }
}

/// A vCPU thread that has not ended.
#[derive(Debug)]
pub struct ThreadGuard(Arc<Lifecycle>);

impl Drop for ThreadGuard {
    fn drop(&mut self) {
        self.0.change(|state| state.threads = state.threads.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
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
        let parked = lifecycle.park(|| {});
        lifecycle.end();
        assert_eq!(thread.join().unwrap(), Passage::Ended);
        drop(parked);
        assert!(!lifecycle.is_open());
    }

    #[test]
    fn a_gate_opens_when_the_last_who_parked_has_let_go() {
        let lifecycle = Arc::new(Lifecycle::new().unwrap());
        let parked = [lifecycle.park(|| {}), lifecycle.park(|| {})];
        lifecycle.open();
        for one in parked {
            assert!(!lifecycle.is_open());
            drop(one);
        }
        assert!(lifecycle.is_open());
        let parked = lifecycle.park(|| {});
        lifecycle.request(Request::Reset);
        drop(parked);
        assert!(!lifecycle.is_open(), "a gate with a request stays closed");
    }
}
