//! INTx for eventfds (PCI 3.0 §2.2.6): level-triggered lines that several functions share, raised by signals that say
//! "something happened" and never "it is over".
//!
//! ```text
//!            signal: raise                     lowered
//!    low ───────────────────▶ high ──────────────────────────────▶ low, or high again
//!                             │ signal: remember ▲                  if a signal came meanwhile, or
//!                             └──────────────────┘                  the guest has read no status
//! ```
//! KVM lowers a line at the guest's end of interrupt, whoever signalled meanwhile; without the memory such a signal
//! would be lost. It also lowers one that was raised while its pin was masked, when the pin is unmasked, for whoever
//! still has a reason to raise it again: the guest, which moves interrupts from CPU to CPU like that, has not seen it.
//! A guest that uses message interrupts never comes here: the thread that watches begins with the first driver that is
//! ready without them, and ends with the lines.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, Weak};

use rustix::event::{PollFd, PollFlags, poll};
use transport::vhost_user::vring::{Call, Kick};

use crate::lock;
use crate::ports::{Guard, Interrupts, PortError};

/// One level-triggered line.
struct Line {
    /// Signalled by us: raises it.
    raise: Call,
    /// Signalled by the machine: the guest has ended the interrupt.
    ended: Arc<Kick>,
    _route: Guard,
    is_high: bool,
    again: bool,
    /// Raised, and no function's status has been read since.
    unread: bool,
    sources: BTreeMap<u64, Arc<Call>>,
}

impl Line {
    fn new(gsi: u32, interrupts: &dyn Interrupts) -> Result<Self, PortError> {
        let cannot = |error| PortError::new("make an eventfd", error);
        let (raise, ended) = (Call::new().map_err(cannot)?, Kick::new().map_err(cannot)?);
        let route = interrupts.attach_level(raise.as_fd(), gsi, ended.as_fd())?;
        let (ended, sources) = (Arc::new(ended), BTreeMap::new());
        Ok(Self { raise, ended, _route: route, is_high: false, again: false, unread: false, sources })
    }

    fn lift(&mut self) -> io::Result<()> {
        (self.is_high, self.unread) = (true, true);
        self.raise.ring()
    }

    /// Takes what was signalled, and raises the line if need be.
    fn serve(&mut self) -> io::Result<()> {
        // The end first: what is signalled now belongs to the next time.
        if self.ended.take()? > 0 {
            self.is_high = false;
            if std::mem::take(&mut self.again) || self.unread && !self.sources.is_empty() {
                self.lift()?;
            }
        }
        let mut signalled = false;
        for source in self.sources.values() {
            signalled |= source.take()? > 0;
        }
        match (signalled, self.is_high) {
            (true, true) => self.again = true,
            (true, false) => self.lift()?,
            (false, _) => {}
        }
        Ok(())
    }
}

#[derive(Default)]
struct State {
    /// By GSI.
    lines: BTreeMap<u32, Line>,
    next: u64,
    watched: bool,
}

/// All level-triggered lines of a machine. Its lock is held for a few system calls only, never while a function is
/// called.
pub struct IntxLines {
    interrupts: Arc<dyn Interrupts>,
    state: Mutex<State>,
    /// Wakes the thread that watches.
    changed: Kick,
}

impl IntxLines {
    /// All low, and nothing connected.
    ///
    /// # Errors
    /// When no eventfd can be had.
    pub fn new(interrupts: Arc<dyn Interrupts>) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self { interrupts, state: Mutex::default(), changed: Kick::new()? }))
    }

    /// Has `call` raise the line with this GSI until the guard is dropped. A count already in it counts.
    ///
    /// # Errors
    /// When the machine refuses the line, or there is no thread to watch it.
    pub fn connect(self: &Arc<Self>, gsi: u32, call: Arc<Call>) -> Result<Guard, PortError> {
        let mut state = lock(&self.state);
        if !state.watched {
            let (lines, changed) = (Arc::downgrade(self), self.changed.try_clone());
            let changed = changed.map_err(|error| PortError::new("duplicate an eventfd", error))?;
            let thread = std::thread::Builder::new().name("intx".to_owned()).stack_size(64 << 10);
            thread
                .spawn(move || watch(&lines, &changed))
                .map_err(|error| PortError::new("start a thread for shared interrupts", error))?;
            state.watched = true;
        }
        let id = state.next;
        state.next += 1;
        let line = match state.lines.entry(gsi) {
            Entry::Occupied(line) => line.into_mut(),
            Entry::Vacant(place) => place.insert(Line::new(gsi, self.interrupts.as_ref())?),
        };
        line.sources.insert(id, call);
        drop(state);
        self.wake();
        let lines = Arc::clone(self);
        Ok(Guard::on_drop(move || {
            let mut state = lock(&lines.state);
            if let Some(line) = state.lines.get_mut(&gsi) {
                line.sources.remove(&id);
            }
            drop(state);
            lines.wake();
        }))
    }

    /// The guest reads why one of the functions on this line interrupts: it has noticed. Called on a vCPU thread; does not
    /// wait.
    pub fn status_read(&self, gsi: u32) {
        if let Some(line) = lock(&self.state).lines.get_mut(&gsi) {
            line.unread = false;
        }
    }

    fn wake(&self) {
        if let Err(error) = self.changed.ring() {
            log::error!("cannot wake the thread of shared interrupts: {error}");
        }
    }

    /// What the thread waits for. No descriptor is duplicated for it: there may be none left, which is no reason for the
    /// lines to stop.
    fn watched(&self) -> (Vec<Arc<Call>>, Vec<Arc<Kick>>) {
        let state = lock(&self.state);
        let lines = state.lines.values();
        (
            lines.clone().flat_map(|line| line.sources.values().cloned()).collect(),
            lines.map(|line| Arc::clone(&line.ended)).collect(),
        )
    }

    fn serve(&self) -> io::Result<()> {
        lock(&self.state).lines.values_mut().try_for_each(Line::serve)
    }
}

impl Drop for IntxLines {
    fn drop(&mut self) {
        // The thread finds that there is nothing left.
        self.wake();
    }
}

/// The thread `intx`: serves the lines until they are gone.
fn watch(lines: &Weak<IntxLines>, changed: &Kick) {
    while let Some(now) = lines.upgrade() {
        let (calls, ends) = now.watched();
        drop(now);
        let calls = calls.iter().map(|call| call.as_fd());
        let done = wait(calls.chain(ends.iter().map(|ended| ended.as_fd())), changed);
        let Some(now) = lines.upgrade() else { return };
        if let Err(error) = done.and_then(|()| changed.take().map(drop)).and_then(|()| now.serve()) {
            log::error!("shared interrupts stop: {error}");
            return;
        }
    }
}

fn wait<'a>(fds: impl Iterator<Item = BorrowedFd<'a>>, changed: &'a Kick) -> io::Result<()> {
    let all = std::iter::once(changed.as_fd()).chain(fds);
    let mut fds: Vec<_> = all.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
    match poll(&mut fds, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
#[path = "lines_tests.rs"]
mod tests;
