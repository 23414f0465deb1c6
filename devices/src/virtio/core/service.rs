//! The queue that the VMM serves in place of the backend, and the kicks that the VMM passes on to the backend
//! by message. Called on the attendant's thread. The device's lock is held for one request, so for at most
//! one deadline of the backend. Must never be called on a vCPU.

use std::io;

use transport::vhost_user::vring::Kick;

use crate::virtio::backend::{BackendError, failed};
use crate::virtio::core::device::Device;
use crate::virtio::core::handle::DeviceHandle;
use crate::virtio::core::state::Phase;

impl DeviceHandle {
    /// The queues whose kicks need [`DeviceHandle::serve_kick`], with their kick eventfds. Empty when the
    /// backend serves all queues by eventfd. The queues stay the same for the device's whole life.
    ///
    /// # Errors
    /// When no descriptor can be duplicated.
    pub fn kicks_to_serve(&self) -> io::Result<Vec<(u16, Kick)>> {
        self.with(|device| {
            let ours = device.service.is_some();
            let all = device.backend.notifies_in_band();
            let last = device.wiring.last();
            device.wiring.clone_kicks(|queue| all || ours && queue == last)
        })
    }

    /// Serves a kick that the VMM serves or passes on. May wait for the backend, within its deadline.
    pub fn serve_kick(&self, queue: u16) {
        self.with(|device| {
            if device.service.is_some() && queue == device.wiring.last() {
                device.serve_ours();
            } else {
                device.forward_kick(queue);
            }
        });
    }
}

impl Device {
    pub(crate) fn reset_service(&mut self) {
        self.service.iter_mut().for_each(|service| service.reset());
    }

    /// A backend has started the queues: tells the service, and serves the requests that waited.
    pub(crate) fn begin_service(&mut self) {
        if let Some(service) = &mut self.service {
            service.started();
            self.continue_service();
        }
    }

    /// Kicks the served queue, as requests may be waiting there.
    fn continue_service(&self) {
        if let Err(error) = self.wiring.kick_ours() {
            log::warn!("{}: cannot kick its control queue: {error}", self.name);
        }
    }

    pub(crate) fn end_service(&mut self) {
        let Self { service: Some(service), backend, .. } = self else { return };
        service.end(backend.as_mut());
    }

    /// Another backend took over. It may lack state on which the driver relies; then the driver has to reset
    /// the device.
    pub(crate) fn service_replaced(&mut self) {
        if let Some(why) = self.service.as_mut().and_then(|service| service.replaced()) {
            self.stop_and_need_reset(why.to_owned());
        }
    }

    /// Whether kicks of this queue are served although the device is broken, so that its requests are
    /// refused.
    pub(crate) fn refuses(&self, queue: u16) -> bool {
        let alone = self.service.as_ref().is_some_and(|service| service.answers_alone());
        self.phase.is_broken() && alone && self.wiring.ours() == Some(queue)
    }

    fn serve_ours(&mut self) {
        let Some(queue) = self.wiring.ours() else { return };
        if let Err(error) = self.wiring.take_kick(queue) {
            log::warn!("{}: cannot read its control queue's eventfd: {error}", self.name);
        }
        let serves = match &self.phase {
            Phase::Running(_) => true,
            Phase::Vacant(vacancy) => {
                let alone = self.service.as_ref().is_some_and(|service| service.answers_alone());
                alone && (vacancy.told || vacancy.queues.is_some())
            }
            Phase::Idle | Phase::Suspended(_) | Phase::NeedsReset(_) => false,
        };
        let Some(mut service) = self.service.take_if(|_| serves) else { return };
        let served = service.serve(self, queue);
        self.service = Some(service);
        match served {
            Ok(false) => {}
            Ok(true) => self.continue_service(),
            Err(error) if self.phase.is_broken() => log::debug!("{}: {error}", self.name),
            Err(error) => self.stop_and_need_reset(format!("queue {queue} cannot be served: {error}")),
        }
        self.show_registers();
    }

    fn forward_kick(&mut self, queue: u16) {
        if let Err(error) = self.wiring.take_kick(queue) {
            log::warn!("{}: cannot read the eventfd of queue {queue}: {error}", self.name);
        }
        if !matches!(self.phase, Phase::Running(_)) {
            return;
        }
        match self.backend.live().and_then(|live| live.kick_in_band(queue).map_err(failed)) {
            Ok(()) => {}
            Err(lost @ BackendError::Lost(_)) => self.lose_by(&lost),
            Err(BackendError::Refused(_)) => self.note("the backend refused a kick"),
        }
        self.show_registers();
    }

    /// Stops the queues and asks the driver for a reset, because the driver or the backend left the queues in
    /// a state that only a reset mends.
    pub(crate) fn stop_and_need_reset(&mut self, why: String) {
        if self.stop() {
            self.need_reset(why);
        }
        self.show_registers();
    }
}
