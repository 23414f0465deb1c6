//! A broken device gets another chance when its driver, or the machine, resets it: its backend is opened
//! again, once, on a thread of its own. Must never make a vCPU wait for a peer that is known to be silent,
//! nor for any longer than one deadline.
//!
//! ```text
//!   vCPU (device lock)                     control loop            helper thread
//!   reset of a broken device: asks         starts the thread
//!                                                                  connect, negotiate: a candidate
//!   FEATURES_OK: takes the candidate,                              or takes it itself: the device is idle
//!   waiting for it where the lost backend
//!   closed its connection; a silent one
//!   is not waited for, and FEATURES_OK is refused
//! ```

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::virtio::backend::BackendError;
use crate::virtio::core::device::{Device, chain};
use crate::virtio::core::handle::DeviceHandle;
use crate::virtio::core::state::{Absence, Phase};
use crate::virtio::core::status::Status;
use crate::virtio::recovery::take_over::{Candidate, Starting, TakeOverError};

/// How a broken device asks for its backend to be looked for.
pub struct Seeker {
    /// How long a driver's FEATURES_OK may wait for what a search brings.
    pub limit: Duration,
    /// Has somebody call [`DeviceHandle::revive`] soon, on a thread that may wait. Called with the
    /// device's lock held; must not wait. Nor need whoever is asked take that lock before the outcome is
    /// there: a driver that waits for it holds the lock.
    pub ask: Box<dyn Fn(Trial) + Send>,
}

/// What a broken device knows of its second chance.
#[derive(Default)]
pub(crate) struct Revival {
    seeker: Option<Seeker>,
    trial: Option<Arc<Starting>>,
    /// The last that was seen of the peer is that it did not answer in time.
    silent: bool,
}

/// A search that somebody promised to carry out; it counts as failed when this is dropped.
#[must_use = "a driver may wait for the outcome"]
pub struct Trial(Arc<Starting>);

impl fmt::Debug for Trial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trial").field("busy", &self.0.is_busy()).finish()
    }
}

impl Trial {
    fn complete(&self, result: Result<Candidate, BackendError>) {
        self.0.complete(result);
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        self.0.complete(Err(BackendError::gone()));
    }
}

impl DeviceHandle {
    /// Lets a broken device ask for another backend at each reset by its driver.
    pub fn seek_with(&self, seeker: Seeker) {
        self.with(|device| device.revival.seeker = Some(seeker));
    }

    /// Begins a search on behalf of the device, as a reset by its driver does but without asking anybody:
    /// for a machine that restarts. `None` when the device is not broken.
    #[must_use]
    pub fn begin_revival(&self) -> Option<Trial> {
        self.with(Device::begin_trial).map(Trial)
    }

    /// Ends a search: `found` becomes the backend of the broken device, or the device stays broken.
    /// Called on the thread that searched.
    ///
    /// # Errors
    /// When there is none, it does not fit, or nobody waits for it any more.
    pub fn revive(&self, trial: Trial, found: Result<Candidate, BackendError>) -> Result<(), TakeOverError> {
        let failed = found.as_ref().err().map(|error| (error.is_silence(), chain(error.cause())));
        trial.complete(found);
        self.with(|device| device.finish_trial(&trial, failed))
    }
}

impl Device {
    /// The driver has reset the device: a broken one asks for another backend, unless it is looked for
    /// already.
    pub(crate) fn seek(&mut self) {
        if self.revival.seeker.is_some()
            && let Some(trial) = self.begin_trial()
            && let Some(seeker) = &self.revival.seeker
        {
            (seeker.ask)(Trial(trial));
        }
    }

    fn begin_trial(&mut self) -> Option<Arc<Starting>> {
        let busy = self.revival.trial.as_ref().is_some_and(|trial| trial.is_busy());
        if !self.is_broken() || self.retired || busy {
            return None;
        }
        let trial = Starting::new();
        self.revival.trial = Some(Arc::clone(&trial));
        Some(trial)
    }

    /// The driver writes `status`: when a broken device is to agree on features, the outcome of a search
    /// is due. Waits for it where that makes sense.
    pub(crate) fn await_trial(&mut self, status: u32) {
        let agrees = status & u32::from(Status::FEATURES_OK) != 0;
        let Some(trial) = self.revival.trial.clone().filter(|_| agrees && self.is_broken()) else { return };
        let limit = match &self.revival.seeker {
            Some(seeker) if !self.revival.silent => seeker.limit,
            _ => Duration::ZERO,
        };
        match trial.claim_within(limit) {
            Some(found) => {
                let failed = found.as_ref().err().map(|error| (error.is_silence(), chain(error.cause())));
                if let Err(error) = self.adopt(found, failed) {
                    log::debug!("device {}: no other backend: {}", self.name, chain(&error));
                }
            }
            // Once is enough.
            None => self.revival.silent |= trial.is_busy(),
        }
    }

    fn finish_trial(&mut self, trial: &Trial, failed: Option<(bool, String)>) -> Result<(), TakeOverError> {
        match trial.0.claim() {
            Some(found) => self.adopt(found, failed),
            // The driver took it.
            None if self.phase.has_backend() => Ok(()),
            None => Err(TakeOverError::NotWanted),
        }
    }

    fn adopt(
        &mut self,
        found: Result<Candidate, BackendError>,
        failed: Option<(bool, String)>,
    ) -> Result<(), TakeOverError> {
        self.revival.trial = None;
        let Phase::Broken(why) = &self.phase else { return Err(TakeOverError::NotWanted) };
        if self.retired {
            return Err(TakeOverError::NotWanted);
        }
        let why = why.clone();
        match found {
            Ok(candidate) => {
                self.fits(&candidate.model)?;
                self.revival.silent = false;
                self.registers.mend();
                self.phase = Phase::Recovering(Absence::new(why, None));
                self.install(candidate);
                Ok(())
            }
            Err(BackendError::Refused(cause) | BackendError::Lost(cause)) => {
                if let Some((silent, reason)) = failed {
                    self.revival.silent = silent;
                    log::warn!("device {} stays broken: {reason}", self.name);
                }
                Err(TakeOverError::Failed(cause))
            }
        }
    }

    /// Notes whether the peer that was lost fell silent: such a one is not waited for.
    pub(crate) fn note_silence(&mut self, error: &BackendError) {
        self.revival.silent = error.is_silence();
    }
}

#[cfg(test)]
#[path = "revival_tests.rs"]
mod tests;
