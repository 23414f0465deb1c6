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
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use transport::peer::Error as PeerError;
use transport::vhost_user::Connection;

use crate::virtio::backend::BackendError;
use crate::virtio::backend::requests::{Answers, Calls, NotifierPlace, OwnChannel};
use crate::virtio::backend::shared_memory::SharedRegions;
use crate::virtio::backend::spec::Order;
use crate::virtio::backend::survey::{Attended, OpenError, Survey};
use crate::virtio::backend::vhost_user::{Kept, VhostUser};
use crate::virtio::core::handle::DeviceHandle;
use crate::virtio::recovery::revival::Trial;
use crate::virtio::recovery::take_over::{Candidate, Misfit, TakeOverError};

/// Why a backend that was connected to does not serve the device.
#[derive(Debug, thiserror::Error)]
pub enum ReconnectError {
    /// It failed, or is no such device.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is a device, but another one, or it failed while it started.
    #[error("{peer} cannot take over")]
    TakeOver {
        /// The backend's name.
        peer: String,
        /// Why not.
        source: TakeOverError,
    },
}

impl ReconnectError {
    /// Whether there is no point in another try: the device is broken, or waits for no backend.
    #[must_use]
    pub fn is_final(&self) -> bool {
        match self {
            Self::Open(error) => matches!(error, OpenError::Unfit { .. }),
            Self::TakeOver { source, .. } => !matches!(source, TakeOverError::Failed(_)),
        }
    }
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
    shared: SharedRegions,
    calls: Calls,
    notifiers: NotifierPlace,
    kept: Arc<Mutex<Kept>>,
}

impl Reconnect {
    pub(crate) fn new(order: &Order, first: &Survey, shared: SharedRegions) -> Self {
        let in_band = first.notifies_in_band();
        let (order, config_size) = (order.clone(), first.config_size);
        let (calls, notifiers) = (Calls::default(), NotifierPlace::default());
        Self { order, config_size, in_band, shared, calls, notifiers, kept: Arc::default() }
    }

    /// Where calls lead that a backend makes by message.
    pub(crate) fn calls(&self) -> Calls {
        self.calls.clone()
    }

    /// Where notifiers of its own go.
    pub(crate) fn notifiers(&self) -> NotifierPlace {
        self.notifiers.clone()
    }

    /// Takes a backend as it was surveyed, with what is kept for it, and has its channel answered.
    pub(crate) fn attend(&self, survey: Survey) -> Result<(Attended, Option<OwnChannel>), OpenError> {
        let Survey { mut session, model, shared, .. } = survey;
        let hang_up = session.as_fd().try_clone_to_owned().map_err(OpenError::Fd)?;
        let misses = session.miss_answers().map_err(OpenError::Fd)?;
        let tenancy = (!shared.is_empty()).then(|| self.shared.tenancy());
        let answers =
            Answers { misses, shared: tenancy.clone(), calls: self.calls(), notifiers: self.notifiers() };
        let channel = session.take_backend_channel().map(|channel| OwnChannel { channel, answers });
        let backend = VhostUser::new(session, &self.order, Arc::clone(&self.kept), tenancy);
        Ok((Attended { model, backend, hang_up }, channel))
    }

    /// Lets the backend at the other end of `connection` serve `device`, which waits for one. Whoever
    /// answers the backends' own requests gets its channel before its rings start, by `serve`. The
    /// result is what [`Opened::hang_up`](crate::virtio::backend::vhost_user::Opened) was for the first one.
    ///
    /// Waits as [`open`](crate::virtio::backend::survey::open) does, and for the start, without the device's lock: for a thread of its own.
    ///
    /// # Errors
    /// When the backend fails: the device goes on waiting, try again later. Or when it does not fit, or
    /// is not waited for: see [`ReconnectError::is_final`].
    pub fn attempt(
        &self,
        device: &DeviceHandle,
        connection: Connection,
        serve: impl FnOnce(OwnChannel),
    ) -> Result<OwnedFd, ReconnectError> {
        let unfit =
            |why: &dyn Error| device.give_up(&format!("another backend came that does not fit: {why}"));
        let survey = Survey::of(connection, &self.order).inspect_err(|error| {
            if let OpenError::Unfit { source, .. } = error {
                unfit(source);
            }
        })?;
        let peer = format!("vhost-user backend {}", survey.session.peer());
        let refused = |source: TakeOverError| ReconnectError::TakeOver { peer, source };
        let (candidate, hang_up) = match self.candidate(survey, serve) {
            Ok(found) => found,
            Err(CandidateError::Misfit(misfit)) => {
                unfit(&misfit);
                return Err(refused(misfit.into()));
            }
            Err(CandidateError::Open(error)) => return Err(error.into()),
        };
        device.take_over(candidate).map_err(refused)?;
        Ok(hang_up)
    }

    /// Lets the backend at the other end of `connection` serve a broken device, on whose behalf `trial` was
    /// begun. The trial is over when this returns. As [`Reconnect::attempt`] otherwise; nothing is started.
    ///
    /// # Errors
    /// When there is no backend, it fails, it does not fit, or it is not wanted any more.
    pub fn revive(
        &self,
        device: &DeviceHandle,
        trial: Trial,
        connection: Result<Connection, PeerError>,
        serve: impl FnOnce(OwnChannel),
    ) -> Result<OwnedFd, TakeOverError> {
        let surveyed = connection.map_err(OpenError::from).and_then(|c| Survey::of(c, &self.order));
        let found = surveyed.map_err(lost).and_then(|survey| {
            self.candidate(survey, serve).map_err(|error| match error {
                CandidateError::Misfit(misfit) => BackendError::Lost(misfit.into()),
                CandidateError::Open(error) => lost(error),
            })
        });
        let (found, hang_up) = match found {
            Ok((candidate, hang_up)) => (Ok(candidate), Some(hang_up)),
            Err(error) => (Err(error), None),
        };
        device.revive(trial, found)?;
        hang_up.ok_or(TakeOverError::NotWanted)
    }

    /// A candidate of what was surveyed, if it has what drivers know of.
    fn candidate(
        &self,
        survey: Survey,
        serve: impl FnOnce(OwnChannel),
    ) -> Result<(Candidate, OwnedFd), CandidateError> {
        if survey.config_size < self.config_size {
            return Err(Misfit::Config { has: survey.config_size, needs: self.config_size }.into());
        }
        if survey.notifies_in_band() != self.in_band {
            return Err(Misfit::Notifications.into());
        }
        if survey.shared != self.shared.sizes() {
            return Err(Misfit::SharedMemory.into());
        }
        let (Attended { model, backend, hang_up }, channel) = self.attend(survey)?;
        if let Some(channel) = channel {
            serve(channel);
        }
        Ok((Candidate { model, backend: Box::new(backend) }, hang_up))
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

fn lost(error: OpenError) -> BackendError {
    match error {
        OpenError::Peer(error) => BackendError::Lost(error.into()),
        other => BackendError::Lost(other.into()),
    }
}

#[cfg(test)]
#[path = "recovery_tests.rs"]
mod recovery;
#[cfg(test)]
#[path = "candidate_tests.rs"]
mod tests;
