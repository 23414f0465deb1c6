//! The queue of a device that its backend does not serve, and we do: the control queue of a crypto device, and of a network card
//! with several pairs of queues. Called by the control loop when its kick rings, with the device's lock held for one request
//! and so for one deadline of the backend at most. Must never be called on a vCPU.

pub(crate) mod crypto;
pub(crate) mod pairs;
pub(crate) mod queue;

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use transport::vhost_user::RingSwitch;
use transport::vhost_user::features::{DriverFeatures, bit};
use transport::vhost_user::vring::Kick;

use crate::virtio::backend::{BackendError, failed};
use crate::virtio::core::device::Device;
use crate::virtio::core::handle::DeviceHandle;
use crate::virtio::core::start::space;
use crate::virtio::core::state::Phase;
use crate::virtio::served::crypto::{Asked, Done, Sessions, parse};
use crate::virtio::served::pairs::Pairs;
use crate::virtio::served::queue::{Chain, ControlQueue, Rings};

/// VIRTIO_F_EVENT_IDX.
const EVENT_IDX: u32 = 29;

/// How long the sessions of a driver that resets are closed one by one; the others go with the connection.
const CLOSING: Duration = Duration::from_millis(200);

/// What a queue of ours is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Service {
    /// There is none.
    Nothing,
    /// A crypto device's sessions are opened and closed.
    Sessions,
    /// A network card's driver says how many pairs of queues it uses.
    Pairs,
}

/// What we hold of that queue.
#[derive(Debug)]
pub(crate) struct Control {
    queue: u16,
    ring: ControlQueue,
    state: State,
}

/// What its requests are about.
#[derive(Debug)]
enum State {
    Sessions(Sessions),
    Pairs(Pairs),
}

impl State {
    /// The answer to a request that came to nothing, for a driver that left so much room.
    fn refusal(&self, room: u64) -> Vec<u8> {
        match self {
            Self::Sessions(_) => Done::REFUSED.encode(room),
            Self::Pairs(_) => vec![pairs::ERROR],
        }
    }
}

impl Control {
    /// That of a device with so many queues; `None` where its backend serves all.
    pub(crate) fn of(service: Service, queues: u16) -> Option<Self> {
        let state = match service {
            Service::Nothing => return None,
            Service::Sessions => State::Sessions(Sessions::default()),
            Service::Pairs => State::Pairs(Pairs::of(queues)),
        };
        Some(Self { queue: queues.checked_sub(1)?, ring: ControlQueue::default(), state })
    }

    /// Whether a driver that took these features looks for it in another place: behind one pair, not behind all of them
    /// (§5.1.2).
    pub(crate) fn is_elsewhere(&self, features: DriverFeatures) -> bool {
        matches!(self.state, State::Pairs(_)) && features.has(pairs::CTRL_VQ) && !features.has(pairs::MQ)
    }

    /// Its number.
    pub(crate) fn queue(&self) -> u16 {
        self.queue
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
    /// The driver has set the queues up anew.
    pub(crate) fn reset_control(&mut self) {
        if let Some(control) = &mut self.control {
            control.ring.reset();
            match &mut control.state {
                State::Sessions(sessions) => *sessions = Sessions::default(),
                State::Pairs(pairs) => pairs.reset(),
            }
        }
    }

    /// A backend runs the queues: what was asked meanwhile is done, after those of a card that its driver does not use are
    /// switched off. By whoever serves the control queue, as the vCPU that started them has waited for one deadline already.
    pub(crate) fn begin_control(&mut self) {
        if let Some(Control { state: State::Pairs(pairs), .. }) = &mut self.control {
            pairs.started();
        }
        self.continue_control();
    }

    /// The backend has started all queues, of which the driver may use fewer. Says whether it was asked to switch some off.
    fn leave_idle_pairs(&mut self) -> bool {
        let Some(Control { state: State::Pairs(pairs), .. }) = &mut self.control else { return false };
        if !matches!(self.phase, Phase::Running(_)) {
            return false;
        }
        let Some(idle) = pairs.take_idle() else { return false };
        if !self.registers.accepted().is_some_and(|features| features.has(pairs::MQ)) {
            return false;
        }
        match self.switch_rings(idle, RingSwitch::Disabled) {
            Ok(()) => {}
            Err(lost @ BackendError::Lost(_)) => self.lose_by(&lost),
            Err(BackendError::Refused(_)) => self.note("the backend does not switch queues off"),
        }
        true
    }

    /// Switches those of `queues` that the driver enabled.
    fn switch_rings(&mut self, queues: Range<u16>, switch: RingSwitch) -> Result<(), BackendError> {
        let states = self.registers.queues();
        let ready = |queue: &u16| states.get(usize::from(*queue)).is_some_and(|state| state.ready);
        let ready: Vec<u16> = queues.filter(ready).collect();
        self.backend.live()?.switch_rings(&ready, switch).map_err(failed)
    }

    /// The queues run (again): what came before that waits.
    pub(crate) fn continue_control(&self) {
        if let Some(control) = &self.control
            && let Err(error) = self.wiring.kick(control.queue)
        {
            log::warn!("{}: cannot kick its control queue: {error}", self.name);
        }
    }

    /// The driver resets a device that runs: its sessions go.
    pub(crate) fn end_control(&mut self) {
        let Self { control: Some(control), backend, .. } = self else { return };
        let State::Sessions(sessions) = &mut control.state else { return };
        let begun = Instant::now();
        for session in sessions.take() {
            let closed = backend.live().and_then(|live| live.close_crypto_session(session).map_err(failed));
            if matches!(closed, Err(BackendError::Lost(_))) || begun.elapsed() > CLOSING {
                return;
            }
        }
    }

    /// Another backend took over, which does not know of the sessions that the driver holds.
    pub(crate) fn forget_sessions(&mut self) {
        if let Some(Control { state: State::Sessions(sessions), .. }) = &mut self.control
            && !sessions.is_empty()
        {
            *sessions = Sessions::default();
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
        match self.backend.live().and_then(|live| live.kick_in_band(queue).map_err(failed)) {
            Ok(()) => {}
            Err(lost @ BackendError::Lost(_)) => self.lose_by(&lost),
            Err(BackendError::Refused(_)) => self.note("the backend refused a kick"),
        }
        self.show_registers();
    }

    /// Whether requests of this queue are refused though the device is broken: Linux waits for the answer to how many pairs it may use,
    /// turning, and all that would change the guest's network waits behind it.
    pub(crate) fn refuses(&self, queue: u16) -> bool {
        let pairs = self.control.as_ref().filter(|control| matches!(control.state, State::Pairs(_)));
        self.phase.is_broken() && pairs.is_some_and(|control| control.queue == queue)
    }

    /// How many pairs a driver uses can be noted without a backend; it waits for the answer, and nothing else meanwhile.
    fn serves_control(&self, queue: u16) -> bool {
        match (&self.phase, &self.control) {
            (Phase::Running(_), _) => true,
            (Phase::Vacant(vacancy), Some(Control { state: State::Pairs(_), .. })) => {
                vacancy.queues.is_some() || self.refuses(queue)
            }
            _ => false,
        }
    }

    fn serve_control(&mut self) {
        let Some(Control { queue, .. }) = self.control else { return };
        if let Err(error) = self.wiring.take_kick(queue) {
            log::warn!("{}: cannot read its control queue's eventfd: {error}", self.name);
        }
        if !self.serves_control(queue) {
            return;
        }
        let served = if self.leave_idle_pairs() { Ok(true) } else { self.serve_one(queue) };
        match served {
            Ok(false) => {}
            Ok(true) => self.continue_control(),
            Err(error) if self.refuses(queue) => log::debug!("{}: {error}", self.name),
            Err(error) => {
                self.stop_and_need_reset(format!("queue {queue} cannot be served: {error}"));
            }
        }
        self.show_registers();
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
        let (answer, lost) = match done {
            Ok(answer) => (answer, None),
            Err(lost) => (control.state.refusal(chain.room()), Some(lost)),
        };
        let rings = Rings { state: &state, space: space(registers, memory, backend.as_ref()), tells_events };
        control.ring.answer(rings, &chain, &answer)?;
        let more = control.ring.has_more(rings)?;
        self.wiring.call(queue)?;
        if let Some(lost) = lost {
            self.lose_by(&lost);
            return Ok(false);
        }
        Ok(more)
    }

    /// The answer to a request.
    fn carry_out(&mut self, chain: &Chain) -> Result<Vec<u8>, BackendError> {
        let Self { control: Some(control), backend, .. } = self else { return Ok(Vec::new()) };
        let sessions = match &mut control.state {
            State::Sessions(sessions) => sessions,
            State::Pairs(pairs) => {
                let Some(wanted) = pairs.asked(&chain.request) else { return Ok(vec![pairs::ERROR]) };
                let (rings, switch) = pairs.step(wanted);
                return self.use_pairs(wanted, rings, switch);
            }
        };
        let done = match parse(&chain.request) {
            Asked::Nothing(status) => Ok(Done::Failed(status)),
            Asked::Create(_) if !sessions.have_room() => Ok(Done::REFUSED),
            Asked::Create(session) => {
                let created =
                    backend.live().and_then(|live| live.create_crypto_session(&session).map_err(failed));
                created.map(|id| {
                    sessions.add(id);
                    Done::Created(id)
                })
            }
            Asked::Close(id) if !sessions.remove(id) => Ok(Done::UNKNOWN),
            Asked::Close(id) => backend
                .live()
                .and_then(|live| live.close_crypto_session(id).map_err(failed))
                .map(|()| Done::Closed),
        };
        let done = match done {
            Err(BackendError::Refused(error)) => {
                log::debug!("{}: {error}", self.name);
                Done::REFUSED
            }
            other => other?,
        };
        Ok(done.encode(chain.room()))
    }

    /// The driver wants to use so many pairs: the answer.
    fn use_pairs(
        &mut self,
        wanted: u16,
        rings: Range<u16>,
        switch: RingSwitch,
    ) -> Result<Vec<u8>, BackendError> {
        let outcome = match &self.phase {
            Phase::Running(_) => self.switch_rings(rings, switch),
            phase if phase.is_broken() => return Ok(vec![pairs::ERROR]),
            // The next backend is told.
            _ => Ok(()),
        };
        match outcome {
            Ok(()) => {}
            Err(BackendError::Refused(_)) => return Ok(vec![pairs::ERROR]),
            Err(lost) => return Err(lost),
        }
        if let Some(Control { state: State::Pairs(pairs), .. }) = &mut self.control {
            pairs.use_pairs(wanted);
        }
        Ok(vec![pairs::OK])
    }

    /// The driver, or the backend, left the queues in a state from which only a reset leads on.
    pub(crate) fn stop_and_need_reset(&mut self, why: String) {
        if self.stop() {
            self.need_reset(why);
        }
        self.show_registers();
    }

    /// What a device of this type cannot take from a backend: queues of ours are split ones.
    pub(crate) const UNSERVED: u64 = 1 << bit::RING_PACKED;
}
