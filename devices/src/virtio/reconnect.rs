//! A vhost-user backend that comes back: asks whoever is there now what it is, and lets it take the
//! place of the one that was lost. Must never be called on a thread that others wait for.
//!
//! What a machine does with it, for each device with [`OnLoss::Recover`](super::OnLoss):
//! 1. the control loop sees the hang-up, unwatches it, and calls `handle.peer_lost(…)`; whoever else
//!    noticed first, the hang-up comes in any case;
//! 2. a helper thread tries, at every interval: connect; [`Reconnect::attempt`]; until it succeeds or
//!    the error [is final](ReconnectError::is_final), and hands the new hang-up to the control loop;
//! 3. the thread ends before the device leaves its board.

use std::error::Error;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use transport::vhost_user::{Connection, Error as PeerError};

use super::answers::OwnChannel;
use super::backend::BackendError;
use super::handle::DeviceHandle;
use super::revival::Trial;
use super::takeover::{Candidate, Misfit, TakeOverError};
use super::vhost_user::{Kept, OpenError, Order, Survey, VhostUser};

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
#[derive(Debug, Clone)]
pub struct Reconnect {
    order: Order,
    /// Bytes of configuration that the first backend had.
    config_size: usize,
    kept: Arc<Mutex<Kept>>,
}

impl Reconnect {
    pub(super) fn new(order: &Order, config_size: usize, kept: Arc<Mutex<Kept>>) -> Self {
        Self { order: order.clone(), config_size, kept }
    }

    /// Lets the backend at the other end of `connection` serve `device`, which waits for one. Whoever
    /// answers the backends' own requests gets its channel before its rings start, by `serve`. The
    /// result is what [`Opened::hang_up`](super::vhost_user::Opened) was for the first one.
    ///
    /// Waits for three deadlines at most, without the device's lock: for a thread of its own.
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
            Err(misfit) => {
                unfit(&misfit);
                return Err(refused(misfit.into()));
            }
        };
        device.take_over(candidate).map_err(refused)?;
        Ok(hang_up)
    }

    /// Lets the backend at the other end of `connection` serve a broken device, on whose behalf `trial` was
    /// begun. The trial is over when this returns. As [`Reconnect::attempt`] otherwise, and waits for two
    /// deadlines at most.
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
            self.candidate(survey, serve).map_err(|misfit| BackendError::Lost(misfit.into()))
        });
        let (found, hang_up) = match found {
            Ok((candidate, hang_up)) => (Ok(candidate), Some(hang_up)),
            Err(error) => (Err(error), None),
        };
        device.revive(trial, found)?;
        hang_up.ok_or(TakeOverError::NotWanted)
    }

    /// A candidate of what was surveyed, if it has the configuration that drivers know of.
    fn candidate(
        &self,
        survey: Survey,
        serve: impl FnOnce(OwnChannel),
    ) -> Result<(Candidate, OwnedFd), Misfit> {
        let Survey { session, model, config_size, channel, hang_up } = survey;
        if config_size < self.config_size {
            return Err(Misfit::Config { has: config_size, needs: self.config_size });
        }
        if let Some(channel) = channel {
            serve(channel);
        }
        let backend = VhostUser::new(session, &self.order, Arc::clone(&self.kept));
        Ok((Candidate { model, backend: Box::new(backend) }, hang_up))
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
#[path = "reconnect_tests.rs"]
mod tests;
