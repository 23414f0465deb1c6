//! A device's queues start, stop, and fail: the transitions of [`Phase`]. Called with the device's lock
//! held. Must never leave a backend on rings that the guest was told are its own again.

use transport::memory::MemoryMap;
use transport::vhost_user::features::bit;
use transport::vhost_user::vring::Ring;

use crate::ports::Guard;
use crate::virtio::backend::{Backend, BackendError, Begin, Start};
use crate::virtio::core::device::{Device, Plugged, chain};
use crate::virtio::core::queues::{ConnectError, OwnedRing, RingsError};
use crate::virtio::core::registers::Registers;
use crate::virtio::core::state::{Phase, Waiting};
use crate::virtio::ring::address::Space;
use crate::virtio::ring::resume::Notes;

/// Why the queues did not start.
enum StartError {
    /// The driver's mistake.
    Driver(String),
    /// The peer's failure, or the machine's.
    Lasting(String),
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

/// Where the driver's addresses lead.
pub(crate) fn space<'a>(registers: &Registers, memory: &'a MemoryMap, backend: &'a dyn Backend) -> Space<'a> {
    let translated = registers.accepted().is_some_and(|features| features.has(bit::ACCESS_PLATFORM));
    Space { memory, translations: backend.translations().filter(|_| translated) }
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
        let connected = self.wiring.connect(&self.registers, transport.as_ref(), self.space());
        match connected.map_err(StartError::from).and_then(|guards| self.start(guards)) {
            Ok(()) => {}
            Err(StartError::Driver(why)) => self.need_reset(why),
            Err(StartError::Lasting(why)) => self.break_down(why),
        }
    }

    /// Has the connected queues served. The connections are undone again when this fails.
    fn start(&mut self, guards: Vec<Guard>) -> Result<(), StartError> {
        if let Phase::Vacant(vacancy) = &mut self.phase {
            vacancy.queues = Some(Waiting { guards, begin: Begin::Fresh });
            self.reset_control();
            return Ok(());
        }
        let Self { registers, wiring, memory, backend, control, .. } = self;
        let Some(features) = registers.accepted() else {
            return Err(StartError::Driver(
                "the driver was ready before the features were agreed".to_owned(),
            ));
        };
        if control.as_ref().is_some_and(|control| control.is_elsewhere(features)) {
            return Err(StartError::Driver(
                "the driver takes VIRTIO_NET_F_CTRL_VQ without VIRTIO_NET_F_MQ".to_owned(),
            ));
        }
        let space = space(registers, memory, backend.as_ref());
        let rings = wiring.rings(registers, Begin::Fresh, space, Notes::Rings)?;
        let rings: Vec<Ring<'_>> = rings.iter().map(OwnedRing::as_ring).collect();
        match backend.start(&Start { features, memory, rings: &rings, begin: Begin::Fresh }) {
            Ok(()) => {
                self.activations += 1;
                self.phase = Phase::Running(guards);
                self.reset_control();
                self.begin_control();
                Ok(())
            }
            Err(BackendError::Refused(cause)) => Err(StartError::Driver(chain(cause.as_ref()))),
            Err(lost @ BackendError::Lost(_)) => {
                // It may have served some of them before it failed.
                self.phase = Phase::Running(guards);
                self.lose_by(&lost);
                Ok(())
            }
        }
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
            Phase::Running(guards) => {
                self.resets += 1;
                // No new kick, no further interrupt, then the backend.
                drop(guards);
                self.end_control();
                if let Err(error) = self.backend.stop() {
                    self.lose_by(&error);
                }
                self.drain();
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
