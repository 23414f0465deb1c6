//! The end of a connection, told by one descriptor whoever the peer is at the moment.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};

/// One descriptor for a device's whole life that is readable when the connection to its present peer is gone.
#[derive(Debug)]
pub struct HangUp(OwnedFd);

impl HangUp {
    /// No connection yet.
    ///
    /// # Errors
    /// When no descriptor is to be had.
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Watches another connection. The kernel forgets one that is closed.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn watch(&self, connection: impl AsFd) -> io::Result<()> {
        let once = epoll::EventFlags::RDHUP | epoll::EventFlags::ONESHOT;
        Ok(epoll::add(&self.0, connection, epoll::EventData::new_u64(0), once)?)
    }

    /// Takes the news that a connection is gone.
    pub fn take(&self) {
        let mut events = Vec::with_capacity(4);
        let now = Timespec::default();
        if let Err(error) = epoll::wait(&self.0, spare_capacity(&mut events), Some(&now)) {
            log::debug!("cannot ask which connection is gone: {error}");
        }
    }
}

impl AsFd for HangUp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
