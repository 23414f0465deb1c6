//! What a virtio-pci function holds beside its device: configuration space, vectors, and what is registered inside its
//! BAR. Called under its own lock, with or without the device's; never waits, and never calls the device.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use transport::vhost_user::vring::Call;

use crate::chain;
use crate::pci::bar::Command;
use crate::pci::{ConfigSpace, ConnectionId, FixtureId, Fixtures, IntxLines, Msix, msix};
use crate::ports::{Guard, PortError};
use crate::virtio::core::status::Status;

/// A page.
pub(crate) const PAGE: u64 = 0x1000;
/// Where in the BAR the notifications begin.
pub(crate) const NOTIFY: u64 = 0x1_0000;
/// "Behind no vector" (§4.1.5.1.2).
pub(crate) const NO_VECTOR: u16 = 0xffff;

/// Where in the BAR those of a queue are.
pub(crate) fn notify_offset(queue: u16) -> u64 {
    NOTIFY + u64::from(queue) * PAGE
}

/// An interrupt source: its vector as the driver wrote it, and its call while it is connected.
pub(crate) struct Source {
    pub(crate) vector: u16,
    pub(crate) call: Option<(ConnectionId, Arc<Call>)>,
    /// While the function interrupts by its pin.
    pub(crate) line: Option<Guard>,
    /// The backend's own page, over the queue's notifications.
    pub(crate) notifier: Option<FixtureId>,
}

impl Source {
    pub(crate) fn unused() -> Self {
        Self { vector: NO_VECTOR, call: None, line: None, notifier: None }
    }
}

pub(crate) struct State {
    pub(crate) name: String,
    pub(crate) config: ConfigSpace,
    pub(crate) msix: Msix,
    /// The driver is ready: before, nothing interrupts.
    pub(crate) live: bool,
    /// The lines, and the GSI of the function's.
    pub(crate) pin: Option<(Arc<IntxLines>, u32)>,
    pub(crate) fixtures: Fixtures,
    /// What the backend shows in the BAR of its shared memory regions, if it has any.
    pub(crate) windows: Option<Fixtures>,
    /// The queues', and last the configuration's.
    pub(crate) sources: Vec<Source>,
    /// Where the MSI-X capability is.
    pub(crate) msix_at: u16,
    /// Where the window into the BAR is (§4.1.4.9).
    pub(crate) window_at: u16,
    /// The log knows that the machine refused something.
    pub(crate) refusal_logged: AtomicBool,
}

impl State {
    /// A route or a place was refused: interrupts stay pending, or accesses come to us, which the log should say: once, as
    /// a guest can bring it about as often as it likes.
    pub(crate) fn check(&self, done: Result<(), PortError>) {
        if let Err(error) = done
            && !self.refusal_logged.swap(true, Ordering::Relaxed)
        {
            log::error!("{}: {} (logged once)", self.name, chain(&error));
        }
    }

    pub(crate) fn vector(&self, source: usize) -> u16 {
        self.sources.get(source).map_or(NO_VECTOR, |source| source.vector)
    }

    /// The driver puts a source behind a vector; one that is not there is as none.
    pub(crate) fn set_vector(&mut self, source: usize, vector: u16) {
        let known = vector < self.msix.count();
        let Some(source) = self.sources.get_mut(source) else { return };
        source.vector = if known { vector } else { NO_VECTOR };
        if let Some((id, _)) = source.call {
            let done = self.msix.retarget(id, known.then_some(vector));
            self.check(done);
        }
    }

    pub(crate) fn connect(&mut self, source: usize, call: &Call) -> Result<(), PortError> {
        let call = call.try_clone().map_err(|error| PortError::new("duplicate an eventfd", error))?;
        let vector = Some(self.vector(source)).filter(|vector| *vector != NO_VECTOR);
        let call = Arc::new(call);
        let id = self.msix.connect(vector, Arc::clone(&call))?;
        if let Some(source) = self.sources.get_mut(source) {
            source.call = Some((id, call));
        }
        self.pull_lines()
    }

    pub(crate) fn disconnect(&mut self, source: usize) {
        let Some(source) = self.sources.get_mut(source) else { return };
        source.line = None;
        if let Some(id) = source.notifier.take() {
            self.fixtures.remove(id);
        }
        if let Some((id, _)) = source.call.take() {
            self.msix.disconnect(id);
        }
    }

    /// The guest wrote the configuration space: what is in the BARs goes where they are now.
    pub(crate) fn place(&mut self) {
        let decoded = self.config.decoded();
        let placed = self.fixtures.place(&decoded);
        self.check(placed);
        if let Some(windows) = &mut self.windows {
            let placed = windows.place(&decoded);
            self.check(placed);
        }
    }

    /// The guest wrote the configuration space: what there turns interrupts on, off, and from one kind to the other.
    pub(crate) fn switch_interrupts(&mut self) -> Result<(), PortError> {
        let control = self.config.word(self.msix_at.saturating_add(2));
        let by_pin = !msix::enables(control) && !self.config.command().has(Command::INTX_DISABLE);
        // An eventfd has one route at a time.
        if !by_pin {
            self.sources.iter_mut().for_each(|source| source.line = None);
        }
        let routed = self.msix.set_control(control);
        routed.and(self.pull_lines())
    }

    /// The device's status is this now: what it says of itself before the driver is ready waits in its eventfds. So
    /// the lines, and the thread that watches them, are there only for drivers that do without MSI-X.
    pub(crate) fn follow(&mut self, status: Status) {
        let live = status.has(Status::DRIVER_OK);
        if std::mem::replace(&mut self.live, live) == live {
            return;
        }
        if live {
            let done = self.pull_lines();
            self.check(done);
        } else {
            self.sources.iter_mut().for_each(|source| source.line = None);
        }
    }

    /// The driver reads the ISR status.
    pub(crate) fn isr_read(&self) {
        if let Some((lines, gsi)) = self.pin.as_ref().filter(|_| self.live && !self.msix.is_enabled()) {
            lines.status_read(*gsi);
        }
    }

    /// Without MSI-X, every source of a ready driver's device raises the function's line.
    fn pull_lines(&mut self) -> Result<(), PortError> {
        let Some((lines, gsi)) = self.pin.as_ref().filter(|_| self.live) else { return Ok(()) };
        if self.msix.is_enabled() || self.config.command().has(Command::INTX_DISABLE) {
            return Ok(());
        }
        let mut result = Ok(());
        for source in self.sources.iter_mut().filter(|source| source.line.is_none()) {
            let Some((_, call)) = &source.call else { continue };
            match lines.connect(*gsi, Arc::clone(call)) {
                Ok(line) => source.line = Some(line),
                Err(error) => result = result.and(Err(error)),
            }
        }
        result
    }
}
