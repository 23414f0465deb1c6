//! The state of a virtio-pci function beside its device: configuration space, vectors, and everything
//! registered inside its BARs. Called under its own lock, with or without the device's lock. Never waits, and
//! must never call the device.

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
/// The offset of the notifications in the BAR.
pub(crate) const NOTIFY: u64 = 0x1_0000;
/// VIRTIO_MSI_NO_VECTOR (§4.1.5.1.2): the source has no vector.
pub(crate) const NO_VECTOR: u16 = 0xffff;

/// The offset of a queue's notifications in the BAR.
pub(crate) fn notify_offset(queue: u16) -> u64 {
    NOTIFY + u64::from(queue) * PAGE
}

/// An interrupt source: the vector that the driver wrote, and the call while the source is connected.
pub(crate) struct Source {
    pub(crate) vector: u16,
    pub(crate) call: Option<(ConnectionId, Arc<Call>)>,
    /// The connection to the line, while the function interrupts by its pin.
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
    /// Whether the driver is ready. Before that, nothing interrupts.
    pub(crate) live: bool,
    /// The interrupt lines, and the GSI of this function's line.
    pub(crate) pin: Option<(Arc<IntxLines>, u32)>,
    pub(crate) fixtures: Fixtures,
    /// The backend's maps in the BAR of its shared memory regions, if it has any.
    pub(crate) windows: Option<Fixtures>,
    /// The sources of the queues, and last the source of the configuration.
    pub(crate) sources: Vec<Source>,
    /// The offset of the MSI-X capability.
    pub(crate) msix_at: u16,
    /// The offset of the window into the BAR (§4.1.4.9).
    pub(crate) window_at: u16,
    /// Whether a refusal by the machine was logged.
    pub(crate) refusal_logged: AtomicBool,
}

impl State {
    /// Logs that the machine refused a route or a place: interrupts stay pending then, or accesses come to
    /// us. Logged once, as a guest can cause it as often as it likes.
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

    /// The driver sets a source's vector. A vector that does not exist counts as none.
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

    /// The guest wrote the configuration space: moves the contents of the BARs to their present addresses.
    pub(crate) fn place(&mut self) {
        let decoded = self.config.decoded();
        let placed = self.fixtures.place(&decoded);
        self.check(placed);
        if let Some(windows) = &mut self.windows {
            let placed = windows.place(&decoded);
            self.check(placed);
        }
    }

    /// The guest wrote the configuration space: turns interrupts on or off, and switches between MSI-X and
    /// the pin.
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

    /// Follows the device's status. Interrupts before the driver is ready stay in the eventfds. So the lines,
    /// and the thread that watches them, exist only for drivers without MSI-X.
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

    /// Without MSI-X, connects every source of a device with a ready driver to the function's line.
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
