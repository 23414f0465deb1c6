//! The connection's part that reads while nobody waits for a reply: the server's own commands, late replies, the
//! hang-up. Never blocks.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll::{self, CreateFlags};

use super::link::Watch;
use super::link::lock;
use super::shared::Shared;
use crate::peer::{Cause, Error, Step};

/// What one call of [`Receiver::serve`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// So many messages.
    Messages(usize),
    /// The connection has ended, and somebody else was told why: stop polling it.
    HungUp,
}

/// The receiving half, for a thread that polls many connections. One a connection; while it exists, posted writes
/// need not wait for room in the socket.
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

    /// Reads what there is, a batch at most, without ever blocking: replies go to who waits for them, the server's
    /// commands are answered. Call it whenever the descriptor is readable.
    ///
    /// # Errors
    /// When the connection ends: the server went, or sent what it must not.
    pub fn serve(&mut self) -> Result<Served, Error> {
        if self.shared.is_lost() {
            return Ok(Served::HungUp);
        }
        self.shared.serve().map(Served::Messages)
    }
}

impl AsFd for Receiver {
    /// Readable when [`Receiver::serve`] has something to do. Not the socket itself: while a thread waits for a
    /// reply it reads on its own, and this one stays quiet.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        *lock(&self.shared.watch) = None;
    }
}
