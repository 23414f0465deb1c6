//! The end of a connection, told by one descriptor whoever the peer is at the moment.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::net::{Shutdown, shutdown};

use crate::lock;

/// One descriptor for a device's whole life that is readable when the connection to its present peer is gone.
#[derive(Debug)]
pub struct HangUp {
    epoll: OwnedFd,
    /// Locked for a moment.
    present: Mutex<Present>,
}

#[derive(Debug, Default)]
struct Present {
    connection: Option<OwnedFd>,
    cut: bool,
}

impl HangUp {
    /// No connection yet.
    ///
    /// # Errors
    /// When no descriptor is to be had.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self { epoll, present: Mutex::default() })
    }

    /// Watches another connection, which whoever owns it shuts down when it ends. The kernel forgets one that is closed.
    ///
    /// # Errors
    /// When the kernel refuses, or the process has no descriptor left.
    pub fn watch(&self, connection: impl AsFd) -> io::Result<()> {
        let once = epoll::EventFlags::RDHUP | epoll::EventFlags::ONESHOT;
        let mut present = lock(&self.present);
        present.connection = Some(connection.as_fd().try_clone_to_owned()?);
        epoll::add(&self.epoll, connection, epoll::EventData::new_u64(0), once)?;
        if present.cut {
            present.shut_down();
        }
        Ok(())
    }

    /// Ends the present connection, and every one that is watched later, on the spot: whoever waits for the peer comes back.
    /// Never waits.
    pub fn cut(&self) {
        let mut present = lock(&self.present);
        present.cut = true;
        present.shut_down();
    }

    /// Takes the news that a connection is gone.
    pub fn take(&self) {
        let mut events = Vec::with_capacity(4);
        let now = Timespec::default();
        if let Err(error) = epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&now)) {
            log::debug!("cannot ask which connection is gone: {error}");
        }
    }
}

impl Present {
    fn shut_down(&self) {
        if let Some(connection) = &self.connection
            && let Err(error) = shutdown(connection, Shutdown::Both)
        {
            log::debug!("the connection is gone already: {error}");
        }
    }
}

impl AsFd for HangUp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
