//! A device's queues start, stop, and fail: the transitions of [`Phase`]. Called with the device's lock
//! held. Must never leave a backend on rings that the guest was told are its own again.

use transport::memory::MemoryMap;
use transport::vhost_user::Refused;
use transport::vhost_user::vring::Ring;

use crate::chain;
use crate::ports::Guard;
use crate::virtio::backend::{BackendError, MemoryChange, Start, Stop};
use crate::virtio::core::device::{Device, Plugged};
use crate::virtio::core::queues::{ConnectError, OwnedRing, RingsError, space};
use crate::virtio::core::state::{Begin, Phase, Waiting};
use crate::virtio::ring::address::Space;
use crate::virtio::ring::split::Notes;

/// Why the queues did not start.
enum StartError {
    /// The driver's mistake.
    Driver(String),
    /// The machine's failure.
    Lasting(String),
    /// The backend's failure.
    Lost(BackendError),
}

impl From<ConnectError> for StartError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Queue(_) => Self::Driver(chain(&error)),
            ConnectError::Port(_) => Self::Lasting(chain(&error)),
        }
    }
}

impl From<RingsError> for StartError {
    fn from(error: RingsError) -> Self {
        Self::Lasting(chain(&error))
    }
}

impl Device {
    fn space(&self) -> Space<'_> {
        space(&self.registers, &self.memory, self.backend.as_ref())
    }

    /// The driver is ready: connects the queues and starts the backend, now or when there is one.
    pub(crate) fn activate(&mut self) {
        if self.phase.is_broken() {
            // The driver went on with a device that broke under its hands: now it may be told.
            return self.interrupt_config();
        }
        // A driver that writes registers sees them through a transport.
        let Some(Plugged { transport, .. }) = &self.plugged else { return };
        if let (Some(service), Some(features)) = (&self.service, self.registers.accepted()) {
            self.wiring.set_ours(service.queue(features));
        }
        let connected = self.wiring.connect(&self.registers, transport.as_ref(), self.space());
        match connected.map_err(StartError::from).and_then(|guards| self.start(guards)) {
            Ok(()) => {}
            Err(StartError::Driver(why)) => self.need_reset(why),
            Err(StartError::Lasting(why)) => self.break_down(why),
            Err(StartError::Lost(lost)) => self.lose_by(&lost),
        }
    }

    /// Has the connected queues served. The connections are undone again when this fails.
    fn start(&mut self, guards: Vec<Guard>) -> Result<(), StartError> {
        if let Phase::Vacant(vacancy) = &mut self.phase {
            vacancy.queues = Some(Waiting { guards, begin: Begin::Fresh });
            self.reset_service();
            return Ok(());
        }
        match self.start_at(&Begin::Fresh) {
            Ok(()) => {
                self.activations += 1;
                self.phase = Phase::Running(guards);
                self.reset_service();
                self.begin_service();
                Ok(())
            }
            Err(lost @ StartError::Lost(_)) => {
                // It may have served some of them before it failed.
                self.phase = Phase::Running(guards);
                Err(lost)
            }
            Err(other) => Err(other),
        }
    }

    /// The backend starts the queues where `begin` says.
    fn start_at(&mut self, begin: &Begin) -> Result<(), StartError> {
        let Self { registers, wiring, memory, backend, inflight, .. } = self;
        let Some(features) = registers.accepted() else {
            return Err(StartError::Driver(
                "the driver was ready before the features were agreed".to_owned(),
            ));
        };
        if *begin == Begin::Fresh {
            *inflight = None;
        }
        let space = space(registers, memory, backend.as_ref());
        let rings = wiring.rings(registers, begin, space, Notes::Rings)?;
        let rings: Vec<Ring<'_>> = rings.iter().map(OwnedRing::as_ring).collect();
        let start = Start { features, memory, rings: &rings, inflight: inflight.clone() };
        match backend.start(&start) {
            Ok(area) => {
                *inflight = area;
                Ok(())
            }
            Err(BackendError::Refused(cause)) => Err(StartError::Driver(chain(cause.as_ref()))),
            Err(lost @ BackendError::Lost(_)) => Err(StartError::Lost(lost)),
        }
    }

    /// The machine pauses: running queues stand, with what is in flight kept for later where the backend can. A device
    /// without a backend is as it was.
    pub(crate) fn suspend(&mut self) {
        if !matches!(self.phase, Phase::Running(_)) {
            return;
        }
        match self.backend.stop(Stop::Suspend) {
            Ok(bases) => {
                if let Phase::Running(guards) = std::mem::replace(&mut self.phase, Phase::Idle) {
                    self.phase = Phase::Suspended(Waiting { guards, begin: Begin::Stood(bases) });
                }
            }
            Err(lost) => self.lose_by(&lost),
        }
    }

    /// The machine goes on: suspended queues start where they stood. Kicks and calls that either side suppressed
    /// meanwhile are made up for.
    pub(crate) fn resume(&mut self) {
        match std::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Suspended(Waiting { guards, begin }) => {
                self.phase = Phase::Running(guards);
                self.restart(&begin);
            }
            other => self.phase = other,
        }
    }

    /// Queues that ran, and stand, start again.
    fn restart(&mut self, begin: &Begin) {
        match self.start_at(begin) {
            Ok(()) => {
                self.begin_service();
                if let Err(error) = self.wiring.kick_all(&self.registers) {
                    log::warn!("{}: cannot kick: {error}", self.name);
                }
                self.call_all();
            }
            Err(StartError::Lost(lost)) => self.lose_by(&lost),
            // They did run, and now they do not.
            Err(StartError::Driver(why) | StartError::Lasting(why)) => self.lose(why, false),
        }
    }

    /// Makes `memory` the guest's memory as far as this device goes. Its queues go on: without a stop where the backend
    /// has memory slots. Waits for the backend, within its deadline. Memory that grows is told to devices before the
    /// guest, memory that shrinks after it.
    ///
    /// # Errors
    /// When the backend cannot hold it; then everything is as it was.
    pub fn change_memory(&mut self, memory: &MemoryMap) -> Result<(), Refused> {
        let changed = match self.phase {
            Phase::Running(_) => self.backend.change_memory(memory),
            // Told at the next start.
            _ => Ok(MemoryChange::Done),
        };
        if let Err(BackendError::Refused(error)) = &changed {
            log::warn!("{}: its backend keeps the memory that it has: {error}", self.name);
            return Err(Refused);
        }
        self.memory = memory.clone();
        match changed {
            Ok(MemoryChange::Done) => {}
            Ok(MemoryChange::NeedsRestart) => match self.backend.stop(Stop::Drain) {
                Ok(bases) => {
                    // What had been in flight is done.
                    self.inflight = None;
                    self.restart(&Begin::Stood(bases));
                }
                Err(lost) => self.lose_by(&lost),
            },
            Err(lost) => self.lose_by(&lost),
        }
        Ok(())
    }

    /// Stops what runs; the registers are reset already.
    pub(crate) fn quiesce(&mut self) {
        match std::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Idle | Phase::NeedsReset(_) => {}
            Phase::Vacant(mut vacancy) => {
                // The kicks and interrupts end here.
                self.resets += u64::from(vacancy.queues.take().is_some());
                self.phase = Phase::Vacant(vacancy);
                self.drain();
            }
            Phase::Running(guards) | Phase::Suspended(Waiting { guards, .. }) => {
                self.resets += 1;
                // No new kick, no further interrupt, then the backend.
                drop(guards);
                self.end_service();
                self.stop();
                self.drain();
            }
        }
    }

    /// Stops the queues for a reset. Says whether the backend lets it be said that they stopped.
    pub(crate) fn stop(&mut self) -> bool {
        match self.backend.stop(Stop::Reset) {
            Ok(_) => {
                // It finished what it had in flight.
                self.inflight = None;
                true
            }
            Err(lost) => {
                self.lose_by(&lost);
                false
            }
        }
    }

    /// Takes what is left in the queues' eventfds.
    pub(crate) fn drain(&self) {
        if let Err(error) = self.wiring.drain() {
            log::warn!("{}: cannot drain an eventfd: {error}", self.name);
        }
    }

    /// Interrupts the guest for every queue, as nobody knows whether it was told of the last used buffers.
    pub(crate) fn call_all(&self) {
        if let Err(error) = self.wiring.call_all(&self.registers) {
            log::warn!("{}: cannot interrupt: {error}", self.name);
        }
    }

    /// The driver cannot go on; after its reset it, or another one, may try again.
    pub(crate) fn need_reset(&mut self, why: String) {
        if self.noted.insert("reset") {
            log::warn!("device {} needs a reset: {why} (logged once)", self.name);
        }
        self.registers.need_reset();
        match &mut self.phase {
            // The driver's state comes back with the backend.
            Phase::Vacant(vacancy) => vacancy.queues = None,
            phase => *phase = Phase::NeedsReset(why),
        }
        self.interrupt_config();
    }
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
