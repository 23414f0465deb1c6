//! A vhost-user backend that comes back: asks whoever is there now what it is, and lets it take the
//! place of the one that was lost. Must never be called on a thread that others wait for.
//!
//! What a machine does with it, for each device with [`OnLoss::Recover`](crate::virtio::OnLoss):
//! 1. the control loop sees the hang-up, unwatches it, and calls `handle.peer_lost(…)`; whoever else
//!    noticed first, the hang-up comes in any case;
//! 2. a helper thread tries, at every interval: connect; [`Reconnect::attempt`]; until it succeeds or
//!    the error [is final](ReconnectError::is_final), and hands the new hang-up to the control loop;
//! 3. the thread ends before the device leaves its board.

use std::error::Error;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use transport::peer::Stats;
use transport::vhost_user::Connection;

use crate::hang_up::HangUp;
use crate::virtio::backend::is_silence;
use crate::virtio::backend::outlets::Outlets;
use crate::virtio::backend::requests::{Answers, OwnChannel};
use crate::virtio::backend::spec::Order;
use crate::virtio::backend::survey::{OpenError, Survey};
use crate::virtio::backend::vhost_user::VhostUser;
use crate::virtio::core::handle::DeviceHandle;
use crate::virtio::recovery::vacancy::{Candidate, FillError, Misfit};
use crate::virtio::types::model::Model;

/// Why a backend that was connected to does not serve the device.
#[derive(Debug, thiserror::Error)]
pub enum ReconnectError {
    /// It failed, or is no such device.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is a device, but another one, or it failed while it started.
    #[error("{peer} cannot take over")]
    Fill {
        /// The backend's name.
        peer: String,
        /// Why not.
        source: FillError,
    },
}

impl ReconnectError {
    /// Whether the peer did not answer in time.
    #[must_use]
    pub fn is_silence(&self) -> bool {
        match self {
            Self::Open(OpenError::Peer(error)) => error.is_silence(),
            Self::Fill { source: FillError::Failed(cause), .. } => is_silence(cause.as_ref()),
            Self::Open(_) | Self::Fill { .. } => false,
        }
    }

    /// Whether there is no point in another try: the device is broken, or waits for no backend.
    #[must_use]
    pub fn is_final(&self) -> bool {
        match self {
            Self::Open(error) => matches!(error, OpenError::Unfit { .. }),
            Self::Fill { source, .. } => !matches!(source, FillError::Failed(_)),
        }
    }
}

/// A backend that was asked what it is, and the device to make of it.
pub struct Opened {
    /// What the guest will see.
    pub model: Model,
    /// Serves the queues.
    pub backend: VhostUser,
    /// The backend's own requests, when it may make any: to be served from now on.
    pub channel: Option<OwnChannel>,
    /// Readable as soon as the connection is gone, and again for that of each later backend.
    pub hang_up: Arc<HangUp>,
    /// For when it is lost.
    pub reconnect: Reconnect,
    /// What it reaches by requests of its own.
    pub outlets: Outlets,
}

/// Asks the backend what it offers and makes a device of that. Waits for a deadline at most for each thing that it asks:
/// features, configuration, and what few devices have: shared memory, an MTU, a display.
///
/// # Errors
/// When the backend fails, or does not fit the order.
pub fn open(connection: Connection, order: &Order) -> Result<Opened, OpenError> {
    let survey = Survey::of(connection, order)?;
    let outlets = Outlets::new(survey.shared.clone());
    let reconnect = Reconnect::new(order, &survey, outlets.clone()).map_err(OpenError::Fd)?;
    let hang_up = reconnect.hang_up();
    let (Attended { model, backend }, channel) = reconnect.attend(survey)?;
    Ok(Opened { model, backend, channel, hang_up, reconnect, outlets })
}

/// A backend that stands ready, and the device that could be made of it.
pub(crate) struct Attended {
    pub(crate) model: Model,
    pub(crate) backend: VhostUser,
}

/// What is needed to replace the backend of one device, for the whole life of that device. Shared
/// between threads; one of them at a time does something.
#[derive(Clone)]
pub struct Reconnect {
    order: Order,
    /// Bytes of configuration that the first backend had.
    config_size: usize,
    /// Whether the first one took notifications by messages.
    in_band: bool,
    outlets: Outlets,
    past: Arc<Mutex<Stats>>,
    hang_up: Arc<HangUp>,
}

impl Reconnect {
    pub(crate) fn new(order: &Order, first: &Survey, outlets: Outlets) -> io::Result<Self> {
        let in_band = first.notifies_in_band();
        let (order, config_size) = (order.clone(), first.config_size);
        let hang_up = Arc::new(HangUp::new()?);
        Ok(Self { order, config_size, in_band, outlets, past: Arc::default(), hang_up })
    }

    /// Tells when the present backend's connection is gone.
    pub(crate) fn hang_up(&self) -> Arc<HangUp> {
        Arc::clone(&self.hang_up)
    }

    /// Takes a backend as it was surveyed, with what is kept for it, and has its channel answered.
    pub(crate) fn attend(&self, survey: Survey) -> Result<(Attended, Option<OwnChannel>), OpenError> {
        let Survey { mut session, model, .. } = survey;
        self.hang_up.watch(session.as_fd()).map_err(OpenError::Fd)?;
        let misses = session.miss_answers().map_err(OpenError::Fd)?;
        let tenancy = self.outlets.tenancy();
        let answers = Answers { misses, tenancy: tenancy.clone() };
        let channel = session.take_backend_channel().map(|channel| OwnChannel { channel, answers });
        let backend = VhostUser::new(session, &self.order, Arc::clone(&self.past), tenancy);
        Ok((Attended { model, backend }, channel))
    }

    /// Lets the backend at the other end of `connection` serve `device`, which is recovering or broken. Whoever
    /// answers the backends' own requests gets its channel before its rings start, by `serve`.
    ///
    /// Waits as [`open`] does, and for the start, without the device's lock: for a thread of its own.
    ///
    /// # Errors
    /// When the backend fails: the device goes on waiting, try again later. Or when it does not fit, or
    /// is not waited for: see [`ReconnectError::is_final`].
    pub fn attempt(
        &self,
        device: &DeviceHandle,
        connection: Connection,
        serve: impl FnOnce(OwnChannel),
    ) -> Result<(), ReconnectError> {
        let unfit =
            |why: &dyn Error| device.give_up(&format!("another backend came that does not fit: {why}"));
        let survey = Survey::of(connection, &self.order).inspect_err(|error| {
            if let OpenError::Unfit { source, .. } = error {
                unfit(source);
            }
        })?;
        let peer = format!("vhost-user backend {}", survey.session.peer());
        let refused = |source: FillError| ReconnectError::Fill { peer, source };
        let candidate = match self.candidate(survey, serve) {
            Ok(candidate) => candidate,
            Err(CandidateError::Misfit(misfit)) => {
                unfit(&misfit);
                return Err(refused(misfit.into()));
            }
            Err(CandidateError::Open(error)) => return Err(error.into()),
        };
        device.fill(candidate).map_err(refused)
    }

    /// A candidate of what was surveyed, if it has what drivers know of.
    fn candidate(&self, survey: Survey, serve: impl FnOnce(OwnChannel)) -> Result<Candidate, CandidateError> {
        if survey.config_size < self.config_size {
            return Err(Misfit::Config { has: survey.config_size, needs: self.config_size }.into());
        }
        if survey.notifies_in_band() != self.in_band {
            return Err(Misfit::Notifications.into());
        }
        if survey.shared != self.outlets.sizes() {
            return Err(Misfit::SharedMemory.into());
        }
        let (Attended { model, backend }, channel) = self.attend(survey)?;
        if let Some(channel) = channel {
            serve(channel);
        }
        Ok(Candidate { model, backend: Box::new(backend) })
    }
}

/// Why a surveyed backend makes no candidate.
enum CandidateError {
    Misfit(Misfit),
    Open(OpenError),
}

impl From<Misfit> for CandidateError {
    fn from(misfit: Misfit) -> Self {
        Self::Misfit(misfit)
    }
}

impl From<OpenError> for CandidateError {
    fn from(error: OpenError) -> Self {
        Self::Open(error)
    }
}

#[cfg(test)]
#[path = "recovery_tests.rs"]
mod recovery;
#[cfg(test)]
#[path = "candidate_tests.rs"]
mod tests;
