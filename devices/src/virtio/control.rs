//! The queue of a device that its backend does not serve, and we do: the control queue of a crypto device.
//! Called by the control loop when its kick rings, with the device's lock held for one request and so for
//! one exchange with the backend at most. Must never be called on a vCPU.

use std::io;
use std::time::{Duration, Instant};

use transport::vhost_user::features::bit;
use transport::vhost_user::vring::{Call, Kick};

use super::activation::space;
use super::backend::BackendError;
use super::control_queue::{Chain, ControlQueue, Rings};
use super::crypto::{Asked, Done, Sessions, parse};
use super::device::Device;
use super::handle::DeviceHandle;
use super::phase::Phase;

/// VIRTIO_F_EVENT_IDX.
const EVENT_IDX: u32 = 29;

/// How long the sessions of a driver that resets are closed one by one; the others go with the connection.
const CLOSING: Duration = Duration::from_millis(200);

/// What we hold of that queue.
#[derive(Debug)]
pub(super) struct Control {
    queue: u16,
    ring: ControlQueue,
    sessions: Sessions,
}

impl Control {
    pub(super) fn of(queue: u16) -> Self {
        Self { queue, ring: ControlQueue::default(), sessions: Sessions::default() }
    }
}

impl DeviceHandle {
    /// The queues whose kicks want [`DeviceHandle::serve_kick`]: none when the device's backend serves them
    /// all by eventfd. They stay the same for the device's whole life.
    ///
    /// # Errors
    /// When no descriptor is to be had.
    pub fn kicks_to_serve(&self) -> io::Result<Vec<(u16, Kick)>> {
        self.with(|device| {
            let ours = device.control.as_ref().map(|control| control.queue);
            let all = device.backend.notifies_in_band();
            device.wiring.clone_kicks(|queue| all || ours == Some(queue))
        })
    }

    /// The calls of all queues, by number.
    ///
    /// # Errors
    /// When no descriptor is to be had.
    pub fn calls(&self) -> io::Result<Vec<Call>> {
        self.with(|device| device.wiring.clone_calls())
    }

    /// A kick rang that somebody has to pass on: serves a queue of ours, or tells the backend by message.
    /// May wait for the backend, within its deadline.
    pub fn serve_kick(&self, queue: u16) {
        self.with(|device| {
            if device.control.as_ref().is_some_and(|control| control.queue == queue) {
                device.serve_control();
            } else {
                device.forward_kick(queue);
            }
        });
    }
}

impl Device {
    /// The queues have been set up anew.
    pub(super) fn begin_control(&mut self) {
        if let Some(control) = &mut self.control {
            control.ring.reset();
            control.sessions = Sessions::default();
        }
        self.continue_control();
    }

    /// The queues run (again): what came before that waits.
    pub(super) fn continue_control(&self) {
        if let Some(control) = &self.control
            && let Err(error) = self.wiring.kick(control.queue)
        {
            log::warn!("{}: cannot kick its control queue: {error}", self.name);
        }
    }

    /// The driver resets a device that runs: its sessions go.
    pub(super) fn end_control(&mut self) {
        let Self { control: Some(control), backend, .. } = self else { return };
        let begun = Instant::now();
        for session in control.sessions.take() {
            let closed = backend.close_crypto_session(session);
            if matches!(closed, Err(BackendError::Lost(_))) || begun.elapsed() > CLOSING {
                return;
            }
        }
    }

    /// Another backend took over, which does not know of the sessions that the driver holds.
    pub(super) fn forget_sessions(&mut self) {
        if let Some(control) = &mut self.control
            && !control.sessions.is_empty()
        {
            control.sessions = Sessions::default();
            self.stop_and_need_reset(
                "the sessions that the driver holds were lost with the backend".to_owned(),
            );
        }
    }

    fn forward_kick(&mut self, queue: u16) {
        if let Err(error) = self.wiring.take_kick(queue) {
            log::warn!("{}: cannot read the eventfd of queue {queue}: {error}", self.name);
        }
        if !matches!(self.phase, Phase::Running(_)) {
            return;
        }
        match self.backend.kick(queue) {
            Ok(()) => {}
            Err(lost @ BackendError::Lost(_)) => self.lose_by(&lost),
            Err(BackendError::Refused(_)) => self.note("the backend refused a kick"),
        }
        self.face.show_registers(&self.registers);
    }

    fn serve_control(&mut self) {
        let Some(Control { queue, .. }) = self.control else { return };
        if let Err(error) = self.wiring.take_kick(queue) {
            log::warn!("{}: cannot read its control queue's eventfd: {error}", self.name);
        }
        if !matches!(self.phase, Phase::Running(_)) {
            return;
        }
        match self.serve_one(queue) {
            Ok(false) => {}
            Ok(true) => self.continue_control(),
            Err(error) => {
                self.stop_and_need_reset(format!("queue {queue} cannot be served: {error}"));
            }
        }
        self.face.show_registers(&self.registers);
    }

    /// Says whether there is more to do.
    fn serve_one(&mut self, queue: u16) -> io::Result<bool> {
        let Some(state) = self.registers.queues().get(usize::from(queue)).copied().filter(|q| q.ready) else {
            return Ok(false);
        };
        let tells_events = self.registers.accepted().is_some_and(|features| features.has(EVENT_IDX));
        // The lists are apart: the backend is asked in between.
        let Self { registers, memory, backend, control: Some(control), .. } = self else { return Ok(false) };
        let rings = Rings { state: &state, space: space(registers, memory, backend.as_ref()), tells_events };
        let Some(chain) = control.ring.take(rings)? else { return control.ring.has_more(rings) };
        let done = self.carry_out(&chain);
        let Self { registers, memory, backend, control: Some(control), .. } = self else { return Ok(false) };
        let (done, lost) = match done {
            Ok(done) => (done, None),
            Err(lost) => (Done::REFUSED, Some(lost)),
        };
        let rings = Rings { state: &state, space: space(registers, memory, backend.as_ref()), tells_events };
        control.ring.answer(rings, &chain, &done.encode(chain.room()))?;
        let more = control.ring.has_more(rings)?;
        self.wiring.call(queue)?;
        if let Some(lost) = lost {
            self.lose_by(&lost);
            return Ok(false);
        }
        Ok(more)
    }

    fn carry_out(&mut self, chain: &Chain) -> Result<Done, BackendError> {
        let Self { control: Some(control), backend, .. } = self else { return Ok(Done::REFUSED) };
        let done = match parse(&chain.request) {
            Asked::Nothing(status) => return Ok(Done::Failed(status)),
            Asked::Create(_) if !control.sessions.have_room() => return Ok(Done::REFUSED),
            Asked::Create(session) => backend.create_crypto_session(&session).map(|id| {
                control.sessions.add(id);
                Done::Created(id)
            }),
            Asked::Close(id) if !control.sessions.remove(id) => return Ok(Done::UNKNOWN),
            Asked::Close(id) => backend.close_crypto_session(id).map(|()| Done::Closed),
        };
        match done {
            Err(BackendError::Refused(error)) => {
                log::debug!("{}: {error}", self.name);
                Ok(Done::REFUSED)
            }
            other => other,
        }
    }

    /// The driver, or the backend, left the queues in a state from which only a reset leads on.
    pub(super) fn stop_and_need_reset(&mut self, why: String) {
        match self.backend.stop() {
            Ok(()) => self.need_reset(why),
            Err(error) => self.lose_by(&error),
        }
        self.face.show_registers(&self.registers);
    }

    /// What a device of this type cannot take from a backend: queues of ours are split ones.
    pub(super) const UNSERVED: u64 = 1 << bit::RING_PACKED;
}
