//! The start, stop and failure of a device's queues: the transitions of [`Phase`]. Called with the device's
//! lock held. Must never leave a backend on rings after the guest was told that the rings are its own again.

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
    /// The driver made a mistake; a reset helps.
    Driver(String),
    /// The machine failed, or the rings cannot be resumed; the driver made no mistake.
    Lasting(String),
    /// The backend failed and is lost.
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

    /// The driver is ready: connects the queues and starts the backend. Without a backend, the next backend
    /// starts the queues.
    pub(crate) fn activate(&mut self) {
        if self.phase.is_broken() {
            // The device broke between FEATURES_OK and DRIVER_OK. The driver must not be interrupted before
            // DRIVER_OK, so it is told now.
            return self.interrupt_config();
        }
        // A driver reaches the registers only through a transport, so there is one.
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

    /// Has the backend serve the connected queues. When the start fails, the connections are undone again.
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
                // The backend may have served some of the queues before it failed.
                self.phase = Phase::Running(guards);
                Err(lost)
            }
            Err(other) => Err(other),
        }
    }

    /// Has the backend start the queues at `begin`.
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

    /// The machine pauses: running queues stop. Where the backend can, requests in flight stay in the
    /// inflight area for later. A device without a backend stays as it is.
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

    /// The machine goes on: suspended queues start where they stopped. Every queue gets a kick and a call, as
    /// either side may have suppressed its own meanwhile.
    pub(crate) fn resume(&mut self) {
        match std::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Suspended(Waiting { guards, begin }) => {
                self.phase = Phase::Running(guards);
                self.restart(&begin);
            }
            other => self.phase = other,
        }
    }

    /// Starts queues again that ran and were stopped.
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
            // These queues ran before, so the driver made no mistake.
            Err(StartError::Driver(why) | StartError::Lasting(why)) => self.lose(why, false),
        }
    }

    /// Makes `memory` the guest's memory for this device. The queues go on, without a stop where the backend
    /// has memory slots. Waits for the backend, within its deadline. When memory grows, devices must be told
    /// before the guest. When memory shrinks, devices must be told after the guest.
    ///
    /// # Errors
    /// When the backend cannot hold that memory. Nothing has changed then.
    pub fn change_memory(&mut self, memory: &MemoryMap) -> Result<(), Refused> {
        let changed = match self.phase {
            Phase::Running(_) => self.backend.change_memory(memory),
            // The backend is told at its next start.
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
                    // The backend finished everything in flight before it stopped.
                    self.inflight = None;
                    self.restart(&Begin::Stood(bases));
                }
                Err(lost) => self.lose_by(&lost),
            },
            Err(lost) => self.lose_by(&lost),
        }
        Ok(())
    }

    /// Stops the queues for a reset. The registers are reset already.
    pub(crate) fn quiesce(&mut self) {
        match std::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Idle | Phase::NeedsReset(_) => {}
            Phase::Vacant(mut vacancy) => {
                // This drops the queues' connections: kicks and interrupts end here.
                self.resets += u64::from(vacancy.queues.take().is_some());
                self.phase = Phase::Vacant(vacancy);
                self.drain();
            }
            Phase::Running(guards) | Phase::Suspended(Waiting { guards, .. }) => {
                self.resets += 1;
                // In this order: kicks end, interrupts end, the backend stops.
                drop(guards);
                self.end_service();
                self.stop();
                self.drain();
            }
        }
    }

    /// Stops the queues for a reset. Returns whether the backend confirmed the stop.
    pub(crate) fn stop(&mut self) -> bool {
        match self.backend.stop(Stop::Reset) {
            Ok(_) => {
                // The backend finished everything in flight before it stopped.
                self.inflight = None;
                true
            }
            Err(lost) => {
                self.lose_by(&lost);
                false
            }
        }
    }

    /// Clears the queues' eventfds.
    pub(crate) fn drain(&self) {
        if let Err(error) = self.wiring.drain() {
            log::warn!("{}: cannot drain an eventfd: {error}", self.name);
        }
    }

    /// Interrupts the guest for every queue, as the guest may not have been told of the last used buffers.
    pub(crate) fn call_all(&self) {
        if let Err(error) = self.wiring.call_all(&self.registers) {
            log::warn!("{}: cannot interrupt: {error}", self.name);
        }
    }

    /// The present driver cannot go on. After a reset, a driver may try again.
    pub(crate) fn need_reset(&mut self, why: String) {
        if self.noted.insert("reset") {
            log::warn!("device {} needs a reset: {why} (logged once)", self.name);
        }
        self.registers.need_reset();
        match &mut self.phase {
            // The next backend would start these queues; the driver has to set them up anew.
            Phase::Vacant(vacancy) => vacancy.queues = None,
            phase => *phase = Phase::NeedsReset(why),
        }
        self.interrupt_config();
    }
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
