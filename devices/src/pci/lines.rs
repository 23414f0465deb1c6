//! INTx for eventfds (PCI 3.0 §2.2.6): level-triggered lines that several functions share. A source signals
//! "something happened" and never "it is over".
//!
//! ```text
//!            signal: raise                     lowered
//!    low ───────────────────▶ high ──────────────────────────────▶ low, or high again
//!                             │ signal: remember ▲                  if a signal came meanwhile, or
//!                             └──────────────────┘                  the guest has read no status
//! ```
//! KVM lowers a line in two cases, and in both the line may have to be raised again:
//! - At the guest's end of interrupt, whether or not another source has signalled meanwhile. That signal
//!   would be lost, so it is remembered.
//! - When the guest unmasks a pin whose line was raised while the pin was masked. The guest has not seen that
//!   interrupt. Guests do this when they move interrupts from CPU to CPU. KVM leaves it to the sources to
//!   raise the line again, so the line is raised again until the guest has read a status.
//!
//! The control loop calls [`IntxLines::serve`] when [`IntxLines::as_fd`] is readable. A guest that uses
//! message interrupts never causes that.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::event::epoll;
use transport::vhost_user::vring::{Call, Kick};

use crate::lock;
use crate::ports::{Guard, Interrupts, PortError};

/// One level-triggered line.
struct Line {
    /// We signal it to raise the line.
    raise: Call,
    /// The machine signals it when the guest has ended the interrupt.
    ended: Kick,
    _route: Guard,
    is_high: bool,
    again: bool,
    /// The line was raised, and no function's status has been read since.
    unread: bool,
    sources: BTreeMap<u64, Arc<Call>>,
}

impl Line {
    fn new(gsi: u32, interrupts: &dyn Interrupts) -> Result<Self, PortError> {
        let cannot = |error| PortError::new("make an eventfd", error);
        let (raise, ended) = (Call::new().map_err(cannot)?, Kick::new().map_err(cannot)?);
        let route = interrupts.attach_level(raise.as_fd(), gsi, ended.as_fd())?;
        let sources = BTreeMap::new();
        Ok(Self { raise, ended, _route: route, is_high: false, again: false, unread: false, sources })
    }

    fn lift(&mut self) -> io::Result<()> {
        (self.is_high, self.unread) = (true, true);
        self.raise.ring()
    }

    /// Takes the signals, and raises the line if necessary.
    fn serve(&mut self) -> io::Result<()> {
        // The end is taken first: a signal that comes after the end belongs to the next interrupt.
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
struct AllLines {
    /// The lines by GSI.
    lines: BTreeMap<u32, Line>,
    next: u64,
}

/// All level-triggered lines of a machine. The lock is held for a few system calls only, and must never be
/// held while a function is called.
pub struct IntxLines {
    interrupts: Arc<dyn Interrupts>,
    state: Mutex<AllLines>,
    /// Readable while a source or an end of interrupt is signalled.
    signalled: OwnedFd,
}

impl IntxLines {
    /// All lines low, and no source connected.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(interrupts: Arc<dyn Interrupts>) -> io::Result<Arc<Self>> {
        let signalled = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Arc::new(Self { interrupts, state: Mutex::default(), signalled }))
    }

    /// Connects `call` as a source: it raises the line with this GSI until the guard is dropped. A signal
    /// that is already in `call` raises the line, too.
    ///
    /// # Errors
    /// When the machine refuses the line, or `call` cannot be watched.
    pub fn connect(self: &Arc<Self>, gsi: u32, call: Arc<Call>) -> Result<Guard, PortError> {
        let mut state = lock(&self.state);
        let id = state.next;
        state.next += 1;
        let line = match state.lines.entry(gsi) {
            Entry::Occupied(line) => line.into_mut(),
            Entry::Vacant(place) => {
                let line = Line::new(gsi, self.interrupts.as_ref())?;
                self.watch(line.ended.as_fd())?;
                place.insert(line)
            }
        };
        self.watch(call.as_fd())?;
        line.sources.insert(id, call);
        let lines = Arc::clone(self);
        Ok(Guard::on_drop(move || {
            let source = lock(&lines.state).lines.get_mut(&gsi).and_then(|line| line.sources.remove(&id));
            // The peer holds the eventfd, too, so closing ours does not remove it from the epoll instance.
            if let Some(Err(error)) = source.map(|call| epoll::delete(&lines.signalled, &*call)) {
                log::debug!("a source of a shared interrupt was not watched: {error}");
            }
        }))
    }

    fn watch(&self, fd: BorrowedFd<'_>) -> Result<(), PortError> {
        epoll::add(&self.signalled, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)
            .map_err(|error| PortError::new("watch a shared interrupt", error.into()))
    }

    /// The guest reads the status of a function on this line, so it has seen the interrupt. Called on a vCPU
    /// thread; does not wait.
    pub fn status_read(&self, gsi: u32) {
        if let Some(line) = lock(&self.state).lines.get_mut(&gsi) {
            line.unread = false;
        }
    }

    /// Readable when [`IntxLines::serve`] has something to do.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.signalled.as_fd()
    }

    /// Raises the lines that were signalled, and raises those again that were lowered before the guest had
    /// seen the interrupt. Does not wait.
    pub fn serve(&self) {
        for (gsi, line) in &mut lock(&self.state).lines {
            if let Err(error) = line.serve() {
                log::error!("shared interrupts of GSI {gsi} are lost: {error}");
            }
        }
    }
}

#[cfg(test)]
#[path = "lines_tests.rs"]
mod tests;
