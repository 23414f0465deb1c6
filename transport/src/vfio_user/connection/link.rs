//! One socket of a connection, what waits to go out on it, and for what its descriptors are polled.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::epoll::{self, EventData, EventFlags};

use super::outgoing::Outgoing;

/// A thread that panicked leaves these locks' values whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// The one that was connected.
    Main,
    /// The one for the server's commands ("twin socket").
    Twin,
}

/// One socket and what waits to go out on it.
pub(crate) struct Link {
    pub(crate) socket: UnixStream,
    pub(crate) outgoing: Mutex<Outgoing>,
    /// Messages that came are left where they are, until the server has taken some of our replies.
    held: AtomicBool,
}

/// What is to be done on a link as soon as it can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Interest {
    /// Reading what comes; otherwise going on with what is held, when there is room to answer it.
    pub(crate) read: bool,
    /// Sending what waits for room.
    pub(crate) send: bool,
}

impl Link {
    pub(crate) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, outgoing: Mutex::default(), held: AtomicBool::new(false) })
    }

    /// Bytes that wait for room.
    pub(crate) fn unsent(&self) -> usize {
        lock(&self.outgoing).unsent()
    }

    /// Holds messages back, or no longer. True when that is new. What is held may be in our memory already, where no
    /// poll sees it: room to write is what wakes us up for it.
    pub(crate) fn hold(&self, held: bool) -> bool {
        self.held.swap(held, Ordering::AcqRel) != held
    }

    /// What there is to do.
    pub(crate) fn interest(&self) -> Interest {
        Interest { read: !self.held.load(Ordering::Acquire), send: self.unsent() > 0 }
    }
}

/// For what the receiver's descriptor is readable.
pub(crate) struct Watch {
    epoll: OwnedFd,
    muted: bool,
    main: EventFlags,
    twin: EventFlags,
}

impl Watch {
    pub(crate) fn new(epoll: OwnedFd, main: &Link, twin: Option<&Link>) -> io::Result<Self> {
        let watch = Self { epoll, muted: false, main: EventFlags::IN, twin: EventFlags::IN };
        for link in std::iter::once(main).chain(twin) {
            epoll::add(&watch.epoll, &link.socket, EventData::new_u64(0), EventFlags::IN)?;
        }
        Ok(watch)
    }

    /// Somebody else reads.
    pub(crate) fn mute(&mut self, main: &Link, twin: Option<&Link>) {
        self.muted = true;
        self.update(main, twin);
    }

    /// Nobody else reads.
    pub(crate) fn unmute(&mut self, main: &Link, twin: Option<&Link>) {
        self.muted = false;
        self.update(main, twin);
    }

    /// Looks what is to be read and sent.
    pub(crate) fn update(&mut self, main: &Link, twin: Option<&Link>) {
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
