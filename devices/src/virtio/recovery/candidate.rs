//! A vhost-user backend that is found again: it is surveyed, and takes the place of the lost one. Must never
//! be called on a thread for which other threads wait.
//!
//! The steps for each device with [`OnLoss::Recover`](crate::virtio::OnLoss):
//! 1. The control loop sees the hang-up and posts it to the device's attendant, which reports the loss to the
//!    device. The hang-up comes in any case, even if a vCPU noticed the loss first.
//! 2. The attendant connects and calls [`Reconnect::attempt`], again after each interval, until it succeeds
//!    or the error [is final](ReconnectError::is_final).
//! 3. The attendant ends before the device does.

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

/// Why a backend does not serve the device although we connected to it.
#[derive(Debug, thiserror::Error)]
pub enum ReconnectError {
    /// The backend failed, or is not a device of this kind.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The backend does not match the lost one, or failed while it started.
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

    /// Whether another attempt is pointless: the device is broken, or waits for no backend.
    #[must_use]
    pub fn is_final(&self) -> bool {
        match self {
            Self::Open(error) => matches!(error, OpenError::Unfit { .. }),
            Self::Fill { source, .. } => !matches!(source, FillError::Failed(_)),
        }
    }
}

/// A backend that was surveyed, and the device that can be made of it.
pub struct Opened {
    /// What the guest will see.
    pub model: Model,
    /// Serves the queues.
    pub backend: VhostUser,
    /// The channel for the backend's own requests, if the backend uses one. It has to be served from now on.
    pub channel: Option<OwnChannel>,
    /// Readable when the connection has ended. It serves the connection of each later backend, too.
    pub hang_up: Arc<HangUp>,
    /// Replaces the backend after a loss.
    pub reconnect: Reconnect,
    /// What the backend may reach in the guest by requests of its own.
    pub outlets: Outlets,
}

/// Surveys the backend and makes a device of it. Waits for at most one deadline for each answer: features,
/// configuration, and, for few devices, shared memory, an MTU or a display.
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

/// A surveyed backend that is ready to start, and the device that can be made of it.
pub(crate) struct Attended {
    pub(crate) model: Model,
    pub(crate) backend: VhostUser,
}

/// Replaces the backend of one device, for the device's whole life. Shared between threads; only one thread
/// makes an attempt at a time.
#[derive(Clone)]
pub struct Reconnect {
    order: Order,
    /// The first backend's configuration size in bytes.
    config_size: usize,
    /// Whether the first backend used in-band notifications.
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

    /// The hang-up that reports the end of the present backend's connection.
    pub(crate) fn hang_up(&self) -> Arc<HangUp> {
        Arc::clone(&self.hang_up)
    }

    /// Prepares a surveyed backend: its counters continue, its hang-up is watched, and its own channel gets
    /// answers.
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

    /// Lets the backend at the other end of `connection` serve `device`, which is recovering or broken. The
    /// backend's own channel is given to `serve` before the rings start.
    ///
    /// Waits as [`open`] does, and for the start, without the device's lock. Call it on a thread of its own.
    ///
    /// # Errors
    /// When the backend fails: the device goes on waiting, and a later attempt may succeed. When the backend
    /// does not fit or the device does not wait for one: see [`ReconnectError::is_final`].
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

    /// Makes a candidate of a surveyed backend, if it has everything on which the driver relies.
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
