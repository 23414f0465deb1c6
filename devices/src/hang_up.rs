//! One descriptor that reports the end of a device's connection, whichever peer the device has at the moment.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::net::{Shutdown, shutdown};

use crate::lock;

/// A descriptor for a device's whole life. It is readable when the connection to the device's present peer
/// has ended.
#[derive(Debug)]
pub struct HangUp {
    epoll: OwnedFd,
    /// Locked for a few system calls only, none of which waits.
    present: Mutex<Present>,
}

#[derive(Debug, Default)]
struct Present {
    connection: Option<OwnedFd>,
    cut: bool,
}

impl HangUp {
    /// Watches no connection yet.
    ///
    /// # Errors
    /// When no descriptor is to be had.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self { epoll, present: Mutex::default() })
    }

    /// Watches another connection. Its owner shuts it down when it ends. The kernel stops watching a
    /// connection that is closed.
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

    /// Ends the present connection at once, and each connection that is watched later. A thread that waits
    /// for the peer returns. Never waits.
    pub fn cut(&self) {
        let mut present = lock(&self.present);
        present.cut = true;
        present.shut_down();
    }

    /// Makes the descriptor unreadable until another connection ends.
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
