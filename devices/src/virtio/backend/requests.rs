//! What a device does for the requests that its backend makes on its own channel. Called on the thread
//! that serves all such channels: must never wait, nor take a device's lock.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use transport::vhost_user::message::{Iotlb, ShmemArea};
use transport::vhost_user::vring::Call;
use transport::vhost_user::{BackendChannel, MissAnswers, NotifierArea, Refused};

use crate::lock;
use crate::ports::FileRange;
use crate::virtio::backend::shared_memory::Tenancy;
use crate::virtio::transport::pci::Notifiers;

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
    pub(crate) misses: Option<MissAnswers>,
    pub(crate) shared: Option<Tenancy>,
    pub(crate) calls: Calls,
    pub(crate) notifiers: NotifierPlace,
}

/// The calls of a device's queues on the board that it is on. Clones are the same.
#[derive(Clone, Default)]
pub struct Calls(Arc<Mutex<Vec<Call>>>);

impl Calls {
    /// From now on it is these, by queue.
    pub fn put(&self, calls: Vec<Call>) {
        *lock(&self.0) = calls;
    }

    fn ring(&self, queue: u32) -> Result<(), Refused> {
        let calls = lock(&self.0);
        let call = usize::try_from(queue).ok().and_then(|queue| calls.get(queue)).ok_or(Refused)?;
        call.ring().map_err(|_| Refused)
    }
}

/// Where backends may put notifiers of their own, on the board that the device is on: on virtio-pci. Clones are the
/// same.
#[derive(Clone, Default)]
pub struct NotifierPlace(Arc<Mutex<Option<Notifiers>>>);

impl NotifierPlace {
    /// From now on it is there, or nowhere.
    pub fn put(&self, notifiers: Option<Notifiers>) {
        *lock(&self.0) = notifiers;
    }

    /// Takes back what the backends so far have put there.
    pub fn clear(&self) {
        let notifiers = lock(&self.0).clone();
        if let Some(notifiers) = notifiers {
            notifiers.take_back_all();
        }
    }
}

impl Answers {
    /// The backend places its own page over a queue's notifications, or takes it back. It rings by itself what is
    /// written there; the kick eventfd stays its own for all else.
    ///
    /// # Errors
    /// When there is no place for it: the backend goes on with kicks.
    pub fn host_notifier(&self, queue: u8, area: Option<NotifierArea>) -> Result<(), Refused> {
        let notifiers = lock(&self.notifiers.0).clone().ok_or(Refused)?;
        let Some(NotifierArea { fd, size, offset }) = area else {
            notifiers.take_back(queue.into());
            return Ok(());
        };
        let page = FileRange { fd: Arc::new(fd), offset, size };
        notifiers.show(queue.into(), page).map_err(|error| {
            log::debug!("a backend's notifier of queue {queue} is refused: {error}");
            Refused
        })
    }

    /// The backend misses a translation, or was refused an access.
    ///
    /// # Errors
    /// When there is none.
    pub fn iotlb(&self, message: &Iotlb) -> Result<(), Refused> {
        self.misses.as_ref().ok_or(Refused)?.answer(message)
    }

    /// The backend used buffers of a queue, and says so by message: interrupts the guest.
    ///
    /// # Errors
    /// When there is no such queue.
    pub fn vring_call(&self, queue: u32) -> Result<(), Refused> {
        self.calls.ring(queue)
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
#[path = "requests_tests.rs"]
mod tests;
