//! The queues that the VMM serves in place of the backend: the control queue of a crypto device, and the
//! control queue of a network card with several pairs of queues. Must never run on a vCPU.

pub(crate) mod crypto;
pub(crate) mod pairs;
pub(crate) mod queue;

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use transport::vhost_user::RingSwitch;
use transport::vhost_user::features::DriverFeatures;

use crate::virtio::backend::{Backend, BackendError, failed};
use crate::virtio::core::device::Device;
use crate::virtio::core::device::Service;
use crate::virtio::core::queues::space;
use crate::virtio::core::state::Phase;
use crate::virtio::served::crypto::{Asked, Done, Sessions, parse};
use crate::virtio::served::pairs::Pairs;
use crate::virtio::served::queue::{Chain, ControlQueue, Rings};
use crate::virtio::types::model::Model;
use crate::virtio::types::table::{CTRL_VQ, MQ, Served};

/// VIRTIO_F_EVENT_IDX.
const EVENT_IDX: u32 = 29;

/// The longest time spent on closing the sessions of a driver that resets, one by one. The remaining sessions
/// end with the connection.
const CLOSING: Duration = Duration::from_millis(200);

/// The number of the control queue for a network driver that takes VIRTIO_NET_F_CTRL_VQ without
/// VIRTIO_NET_F_MQ: the queue behind the first pair (§5.1.2).
const BEHIND_ONE_PAIR: u16 = 2;

/// The control queue of one device.
#[derive(Debug)]
struct Control {
    /// The number of the device's last queue.
    queue: u16,
    ring: ControlQueue,
    requests: Requests,
}

/// The state that the requests change.
#[derive(Debug)]
enum Requests {
    Sessions(Sessions),
    Pairs(Pairs),
}

/// Makes the server for the last queue of such a device; `None` when the backend serves all queues.
#[must_use]
pub fn service_of(model: &Model) -> Option<Box<dyn Service>> {
    let requests = match model.device_type.served() {
        Served::Nothing => return None,
        Served::Sessions => Requests::Sessions(Sessions::default()),
        Served::Pairs => Requests::Pairs(Pairs::of(model.queues)),
    };
    let queue = model.queues.checked_sub(1)?;
    Some(Box::new(Control { queue, ring: ControlQueue::default(), requests }))
}

impl Service for Control {
    fn queue(&self, features: DriverFeatures) -> u16 {
        let pairs = matches!(self.requests, Requests::Pairs(_));
        if pairs && features.has(CTRL_VQ) && !features.has(MQ) { BEHIND_ONE_PAIR } else { self.queue }
    }

    fn reset(&mut self) {
        self.ring.reset();
        match &mut self.requests {
            Requests::Sessions(sessions) => *sessions = Sessions::default(),
            Requests::Pairs(pairs) => pairs.reset(),
        }
    }

    /// The pairs that the driver does not use are switched off before its first request is served. The
    /// attendant does this, as the vCPU that started the queues has waited for one deadline already.
    fn started(&mut self) {
        if let Requests::Pairs(pairs) = &mut self.requests {
            pairs.started();
        }
    }

    /// Closes the driver's sessions.
    fn end(&mut self, backend: &mut dyn Backend) {
        let Requests::Sessions(sessions) = &mut self.requests else { return };
        let begun = Instant::now();
        for session in sessions.take() {
            let closed = backend.live().and_then(|live| live.close_crypto_session(session).map_err(failed));
            if matches!(closed, Err(BackendError::Lost(_))) || begun.elapsed() > CLOSING {
                return;
            }
        }
    }

    fn replaced(&mut self) -> Option<&'static str> {
        match &mut self.requests {
            Requests::Sessions(sessions) if !sessions.is_empty() => {
                *sessions = Sessions::default();
                Some("the sessions that the driver holds were lost with the backend")
            }
            _ => None,
        }
    }

    /// The number of pairs in use can be recorded without a backend.
    fn answers_alone(&self) -> bool {
        matches!(self.requests, Requests::Pairs(_))
    }

    fn serve(&mut self, device: &mut Device, queue: u16) -> io::Result<bool> {
        if self.leave_idle_pairs(device) {
            return Ok(true);
        }
        let state = device.registers.queues().get(usize::from(queue)).copied();
        let Some(state) = state.filter(|state| state.ready) else { return Ok(false) };
        let tells_events = device.registers.accepted().is_some_and(|features| features.has(EVENT_IDX));
        // The rings are borrowed twice, because the backend is asked in between.
        let Device { registers, memory, backend, .. } = &*device;
        let rings = Rings { state: &state, space: space(registers, memory, backend.as_ref()), tells_events };
        let Some(chain) = self.ring.take(rings)? else { return self.ring.has_more(rings) };
        let (answer, lost) = match self.carry_out(device, &chain) {
            Ok(answer) => (answer, None),
            Err(lost) => (self.refusal(chain.room()), Some(lost)),
        };
        let Device { registers, memory, backend, .. } = &*device;
        let rings = Rings { state: &state, space: space(registers, memory, backend.as_ref()), tells_events };
        self.ring.answer(rings, &chain, &answer)?;
        let more = self.ring.has_more(rings)?;
        device.wiring.call(queue)?;
        if let Some(lost) = lost {
            device.lose_by(&lost);
            return Ok(false);
        }
        Ok(more)
    }
}

impl Control {
    /// Switches off the rings of unused pairs, because the backend has started all of them. Returns whether
    /// the backend was asked to switch any off.
    fn leave_idle_pairs(&mut self, device: &mut Device) -> bool {
        let Requests::Pairs(pairs) = &mut self.requests else { return false };
        if !matches!(device.phase, Phase::Running(_)) {
            return false;
        }
        let Some(idle) = pairs.take_idle() else { return false };
        if !takes_pairs(device) {
            return false;
        }
        match switch_rings(device, idle, RingSwitch::Disabled) {
            Ok(()) => {}
            Err(lost @ BackendError::Lost(_)) => device.lose_by(&lost),
            Err(BackendError::Refused(_)) => device.note("the backend does not switch queues off"),
        }
        true
    }

    /// The answer to a failed request, for a driver that left `room` bytes.
    fn refusal(&self, room: u64) -> Vec<u8> {
        match &self.requests {
            Requests::Sessions(_) => Done::REFUSED.encode(room),
            Requests::Pairs(_) => vec![pairs::ERROR],
        }
    }

    /// The answer to a request.
    fn carry_out(&mut self, device: &mut Device, chain: &Chain) -> Result<Vec<u8>, BackendError> {
        let sessions = match &mut self.requests {
            Requests::Sessions(sessions) => sessions,
            Requests::Pairs(pairs) => return use_pairs(pairs, device, &chain.request),
        };
        let live = device.backend.live();
        let done = match parse(&chain.request) {
            Asked::Nothing(status) => Ok(Done::Failed(status)),
            Asked::Create(_) if !sessions.have_room() => Ok(Done::REFUSED),
            Asked::Create(session) => {
                let created = live.and_then(|live| live.create_crypto_session(&session).map_err(failed));
                created.map(|id| {
                    sessions.add(id);
                    Done::Created(id)
                })
            }
            Asked::Close(id) if !sessions.remove(id) => Ok(Done::UNKNOWN),
            Asked::Close(id) => {
                let closed = live.and_then(|live| live.close_crypto_session(id).map_err(failed));
                closed.map(|()| Done::Closed)
            }
        };
        let done = match done {
            Err(BackendError::Refused(error)) => {
                log::debug!("{}: {error}", device.name);
                Done::REFUSED
            }
            other => other?,
        };
        Ok(done.encode(chain.room()))
    }
}

/// Whether the driver took VIRTIO_NET_F_MQ, and so sets the number of pairs.
fn takes_pairs(device: &Device) -> bool {
    device.registers.accepted().is_some_and(|features| features.has(MQ))
}

/// Switches the queues in `queues` that the driver enabled.
fn switch_rings(device: &mut Device, queues: Range<u16>, switch: RingSwitch) -> Result<(), BackendError> {
    let states = device.registers.queues();
    let ready = |queue: &u16| states.get(usize::from(*queue)).is_some_and(|state| state.ready);
    let ready: Vec<u16> = queues.filter(ready).collect();
    device.backend.live()?.switch_rings(&ready, switch).map_err(failed)
}

/// Carries out the request to use a number of pairs. Returns the answer.
fn use_pairs(pairs: &mut Pairs, device: &mut Device, request: &[u8]) -> Result<Vec<u8>, BackendError> {
    let Some(wanted) = pairs.asked(request).filter(|_| takes_pairs(device)) else {
        return Ok(vec![pairs::ERROR]);
    };
    let (rings, switch) = pairs.step(wanted);
    let outcome = match &device.phase {
        Phase::Running(_) => switch_rings(device, rings, switch),
        phase if phase.is_broken() => return Ok(vec![pairs::ERROR]),
        // Without a running backend, the next backend is told.
        _ => Ok(()),
    };
    match outcome {
        Ok(()) => {}
        Err(BackendError::Refused(_)) => return Ok(vec![pairs::ERROR]),
        Err(lost) => return Err(lost),
    }
    pairs.use_pairs(wanted);
    Ok(vec![pairs::OK])
}
