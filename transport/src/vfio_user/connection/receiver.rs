//! The half of a connection that reads while no thread waits for a reply: the server's own commands, late
//! replies, the hang-up. Must never block.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll::{self, CreateFlags};

use super::link::Watch;
use super::link::lock;
use super::shared::Shared;
use crate::peer::{Cause, Error, Step};

/// The outcome of one call of [`Receiver::serve`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// The number of messages that were read.
    Messages(usize),
    /// The connection has ended, and another thread was given the reason: stop polling.
    HungUp,
}

/// The receiving half, for a thread that polls many connections. A connection has one at most. While it
/// exists, posted writes need not wait for room in the socket.
pub struct Receiver {
    shared: Arc<Shared>,
    epoll: OwnedFd,
}

impl Receiver {
    pub(crate) fn new(shared: &Arc<Shared>) -> Result<Self, Error> {
        let local = |source: io::Error| Error::new(&shared.peer, Step::Idle, Cause::Local(source));
        let mut watch = lock(&shared.watch);
        if watch.is_some() {
            return Err(Error::new(&shared.peer, Step::Idle, Cause::Invalid("it has a receiver already")));
        }
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(|errno| local(errno.into()))?;
        let ours = epoll.try_clone().map_err(local)?;
        let new = Watch::new(epoll, &shared.main, shared.twin.get()).map_err(local)?;
        *watch = Some(new);
        drop(watch);
        Ok(Self { shared: Arc::clone(shared), epoll: ours })
    }

    /// The peer's name.
    pub fn peer(&self) -> &str {
        self.shared.peer.name()
    }

    /// Reads what has arrived, one batch at most, without blocking. Replies are handed to the threads that
    /// wait for them; the server's commands are answered. Call it whenever the descriptor is readable.
    ///
    /// # Errors
    /// When the connection ends: the server closed it, or sent an invalid message.
    pub fn serve(&mut self) -> Result<Served, Error> {
        if self.shared.is_lost() {
            return Ok(Served::HungUp);
        }
        self.shared.serve().map(Served::Messages)
    }
}

impl AsFd for Receiver {
    /// Readable when [`Receiver::serve`] has something to do. The descriptor is not the socket: a thread that
    /// waits for a reply reads the socket itself, and this descriptor is not readable then.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        *lock(&self.shared.watch) = None;
    }
}
