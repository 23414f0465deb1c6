//! What a device does for the requests that its backend makes on its own channel. Called on the thread
//! that serves all such channels: must never wait, nor take a device's lock.

use std::os::fd::OwnedFd;

use transport::vhost_user::message::{Iotlb, ShmemArea};
use transport::vhost_user::{BackendChannel, MissAnswers, Refused};

use super::shared_memory::Tenancy;

/// A backend's own channel, and what is answered on it: to be served from now on.
pub struct OwnChannel {
    /// Where it asks.
    pub channel: BackendChannel,
    /// What it is told.
    pub answers: Answers,
}

/// What a device does for its backend. A backend that asks for anything else is refused.
#[derive(Default)]
pub struct Answers {
    pub(super) misses: Option<MissAnswers>,
    pub(super) shared: Option<Tenancy>,
}

impl Answers {
    /// The backend misses a translation, or was refused an access.
    ///
    /// # Errors
    /// When there is none.
    pub fn iotlb(&self, message: &Iotlb) -> Result<(), Refused> {
        self.misses.as_ref().ok_or(Refused)?.answer(message)
    }

    /// The backend shows the guest a piece of a file.
    ///
    /// # Errors
    /// See [`Tenancy::map`].
    pub fn shmem_map(&self, area: &ShmemArea, fd: OwnedFd) -> Result<(), Refused> {
        self.shared.as_ref().ok_or(Refused)?.map(area, fd)
    }

    /// The backend takes it back.
    ///
    /// # Errors
    /// See [`Tenancy::unmap`].
    pub fn shmem_unmap(&self, area: &ShmemArea) -> Result<(), Refused> {
        self.shared.as_ref().ok_or(Refused)?.unmap(area)
    }
}

#[cfg(test)]
#[path = "answers_tests.rs"]
mod tests;
