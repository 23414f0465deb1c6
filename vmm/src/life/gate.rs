//! The gate: the point in each vCPU thread's loop where the thread waits while the guest must not run.
//!
//! A vCPU thread, the console or a signal makes a [`Request`] (power-off, reset, crash and so on). The
//! control loop decides what follows from the request. The first request closes the gate, so that no vCPU
//! enters the guest again, and wakes the control loop.
//!
//! The gate is open while three conditions hold:
//! 1. The board is complete: [`Lifecycle::open`] was called.
//! 2. No [`Parked`] guard is alive.
//! 3. There is no request, and [`Lifecycle::end`] was not called.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The reason why the guest must stop running.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// The guest entered S5.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest or its KVM cannot go on. The text gives the reason and the registers.
    Crash(String),
    /// The guest's kernel reports that it has panicked.
    Panicked,
    /// The user asked for the end of the machine (Ctrl-A x, or the library's caller).
    Quit,
    /// A signal with this number asked for the end of the machine.
    Signal(i32),
}

/// The answer of the gate to a vCPU thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passage {
    /// Enter the guest.
    Open,
    /// End the thread.
    Ended,
}

#[derive(Debug, Default)]
struct State {
    /// [`Lifecycle::open`] was called: the board is complete.
    opened: bool,
    ended: bool,
    /// The number of [`Parked`] guards that are alive.
    parks: usize,
    first: Option<Request>,
    /// The number of vCPU threads that have started and not ended.
    threads: usize,
    /// The number of those threads that wait at the gate.
    standing: usize,
}

/// The gate, shared by the control loop and every vCPU thread of one boot.
///
/// Its lock is held for a few instructions only. No other lock is taken while it is held.
#[derive(Debug)]
pub struct Lifecycle {
    state: Mutex<State>,
    changed: Condvar,
    /// Mirrors "the gate is not open", so that a vCPU thread reads one word before each entry into the guest.
    stop: AtomicBool,
    wake: EventFd,
}

impl Lifecycle {
    /// Makes a closed gate: vCPU threads wait at it until [`Lifecycle::open`].
    ///
    /// # Errors
    /// When the host refuses an eventfd.
    pub fn new() -> io::Result<Self> {
        Ok(Lifecycle {
            state: Mutex::default(),
            changed: Condvar::new(),
            stop: AtomicBool::new(true),
            wake: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })
    }

    /// An eventfd that is readable when there is a request.
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

    /// Asks for the end of the machine or for a reset. May be called on any thread.
    ///
    /// Only the first request counts, with one exception: a request by the user or by a signal replaces a
    /// reset, because neither would be repeated.
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

    /// The request that counts, if there is one. Called by the control loop.
    pub fn take_request(&self) -> Option<Request> {
        // The eventfd is empty when the request was taken before.
        if let Err(error) = self.wake.read()
            && error.kind() != io::ErrorKind::WouldBlock
        {
            log::error!("cannot read the wake-up: {error}");
        }
        self.lock().first.clone()
    }

    /// Opens the gate, unless there is a request, the end, or a [`Parked`] guard. Called by the control loop.
    pub fn open(&self) {
        self.change(|state| state.opened = true);
    }

    /// Waits until every vCPU thread waits at the gate, and keeps the threads there until the returned guard
    /// is dropped. The pending accesses of a vCPU are completed before its thread comes to the gate.
    ///
    /// A vCPU thread may be in a bounded wait on a peer; this call waits until that wait is over.
    ///
    /// `meanwhile` is called again and again until the last vCPU thread has come to the gate. It must
    /// interrupt the vCPUs. One interruption is not enough: it is lost if it arrives after a thread has
    /// looked at the gate and before that thread enters the guest.
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

    /// Ends every vCPU thread: at once if the thread waits at the gate, otherwise when it comes to the gate.
    pub fn end(&self) {
        self.change(|state| state.ended = true);
    }

    /// Whether the gate is open, so that vCPUs may enter the guest. Never waits.
    pub fn is_open(&self) -> bool {
        !self.stop.load(Ordering::Acquire)
    }

    /// Whether there is a request or [`Lifecycle::end`] was called, so that the guest will not run again.
    /// Never waits.
    pub fn is_ending(&self) -> bool {
        let state = self.lock();
        state.ended || state.first.is_some()
    }

    /// Called by a vCPU thread before it enters the guest. Waits while the gate is closed.
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

    /// Counts a vCPU thread. Called before the thread is spawned; the thread keeps the guard until it ends.
    #[must_use = "the thread counts as ended when this is dropped"]
    pub fn thread_started(self: &Arc<Self>) -> ThreadGuard {
        self.lock().threads += 1;
        ThreadGuard(Arc::clone(self))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pause between two interruptions of a vCPU that has not yet come to the gate.
const PAUSE: Duration = Duration::from_millis(2);

/// While this guard lives, every vCPU is outside the guest and every vCPU thread waits at the gate.
#[derive(Debug)]
#[must_use = "the vCPUs go on when this is dropped"]
pub struct Parked(Arc<Lifecycle>);

impl Drop for Parked {
    fn drop(&mut self) {
        self.0.change(|state| state.parks = state.parks.saturating_sub(1));
    }
}

/// Counts one vCPU thread that has not ended.
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
