//! The answers of a device to the requests that its backend makes on its own channel. Called on the thread
//! that serves all such channels: must never wait, nor take a device's lock.

use std::os::fd::OwnedFd;

use transport::vhost_user::message::{Iotlb, ShmemArea};
use transport::vhost_user::{BackendChannel, MissAnswers, NotifierArea, Refused};

use crate::virtio::backend::outlets::Tenancy;

/// A backend's own channel and the answers to it. It has to be served from now on.
pub struct OwnChannel {
    /// The channel on which the backend asks.
    pub channel: BackendChannel,
    /// The answers that the backend gets.
    pub answers: Answers,
}

/// The answers of a device to its backend. Every other request is refused.
pub struct Answers {
    pub(crate) misses: Option<MissAnswers>,
    pub(crate) tenancy: Tenancy,
}

impl Answers {
    /// See [`Tenancy::notifier`].
    ///
    /// # Errors
    /// See there.
    pub fn host_notifier(&self, queue: u8, area: Option<NotifierArea>) -> Result<(), Refused> {
        self.tenancy.notifier(queue, area)
    }

    /// The backend lacks a translation, or was refused an access.
    ///
    /// # Errors
    /// When there is no translation.
    pub fn iotlb(&self, message: &Iotlb) -> Result<(), Refused> {
        self.misses.as_ref().ok_or(Refused)?.answer(message)
    }

    /// The backend reports by message that it has used buffers of a queue: interrupts the guest.
    ///
    /// # Errors
    /// When there is no such queue.
    pub fn vring_call(&self, queue: u32) -> Result<(), Refused> {
        self.tenancy.call(queue)
    }

    /// The backend maps a piece of a file into a shared memory region.
    ///
    /// # Errors
    /// See [`Tenancy::map`].
    pub fn shmem_map(&self, area: &ShmemArea, fd: OwnedFd) -> Result<(), Refused> {
        self.tenancy.map(area, fd)
    }

    /// The backend removes a map.
    ///
    /// # Errors
    /// See [`Tenancy::unmap`].
    pub fn shmem_unmap(&self, area: &ShmemArea) -> Result<(), Refused> {
        self.tenancy.unmap(area)
    }
}

#[cfg(test)]
#[path = "requests_tests.rs"]
mod tests;
