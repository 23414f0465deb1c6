//! The connection's part that reads while nobody waits for a reply: the server's own commands, late replies, the
//! hang-up. Never blocks.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use super::connection::{Interest, Link, Shared, lock};
use super::error::{Cause, Error, Step};

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
    pub(super) fn new(shared: &Arc<Shared>) -> Result<Self, Error> {
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
        &self.shared.peer
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

/// For what the receiver's descriptor is readable.
pub(super) struct Watch {
    epoll: OwnedFd,
    muted: bool,
    main: EventFlags,
    twin: EventFlags,
}

impl Watch {
    fn new(epoll: OwnedFd, main: &Link, twin: Option<&Link>) -> io::Result<Self> {
        let watch = Self { epoll, muted: false, main: EventFlags::IN, twin: EventFlags::IN };
        for link in std::iter::once(main).chain(twin) {
            epoll::add(&watch.epoll, &link.socket, EventData::new_u64(0), EventFlags::IN)?;
        }
        Ok(watch)
    }

    /// Somebody else reads.
    pub(super) fn mute(&mut self, main: &Link, twin: Option<&Link>) {
        self.muted = true;
        self.update(main, twin);
    }

    /// Nobody else reads.
    pub(super) fn unmute(&mut self, main: &Link, twin: Option<&Link>) {
        self.muted = false;
        self.update(main, twin);
    }

    /// Looks what is to be read and sent.
    pub(super) fn update(&mut self, main: &Link, twin: Option<&Link>) {
        let muted = self.muted;
        let wanted = |link: &Link| {
            let Interest { read, send } = link.interest();
            let reading = match (muted, read) {
                (true, _) => EventFlags::empty(),
                (false, true) => EventFlags::IN,
                (false, false) => EventFlags::OUT,
            };
            if send { reading | EventFlags::OUT } else { reading }
        };
        let change = |socket: &UnixStream, old: &mut EventFlags, new: EventFlags| {
            if *old == new {
                return;
            }
            match epoll::modify(&self.epoll, socket, EventData::new_u64(0), new) {
                Ok(()) => *old = new,
                Err(errno) => log::error!("cannot watch a vfio-user socket: {errno}"),
            }
        };
        change(&main.socket, &mut self.main, wanted(main));
        if let Some(twin) = twin {
            change(&twin.socket, &mut self.twin, wanted(twin));
        }
    }
}
