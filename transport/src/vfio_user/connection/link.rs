//! One socket of a connection, the messages that wait to leave on it, and the events that its descriptor is
//! polled for.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::epoll::{self, EventData, EventFlags};

use super::outgoing::Outgoing;

/// Locks `mutex`. The values in these locks are valid even when a thread panicked with the lock held.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which socket of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// The socket that we connected.
    Main,
    /// The socket for the server's commands ("twin socket").
    Twin,
}

/// One socket, and the messages that wait to leave on it.
pub(crate) struct Link {
    pub(crate) socket: UnixStream,
    pub(crate) outgoing: Mutex<Outgoing>,
    /// Messages that arrived are not processed until the server has read some of our replies.
    held: AtomicBool,
}

/// The events that a link waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Interest {
    /// Waits for messages. When false, waits for room to answer the messages that are held back.
    pub(crate) read: bool,
    /// Waits for room to send queued messages.
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

    /// Holds arrived messages back, or processes them again. True when that is a change. Held messages may be
    /// in our memory already, where no poll sees them; room to write is the event that resumes them.
    pub(crate) fn hold(&self, held: bool) -> bool {
        self.held.swap(held, Ordering::AcqRel) != held
    }

    /// The events that this link waits for.
    pub(crate) fn interest(&self) -> Interest {
        Interest { read: !self.held.load(Ordering::Acquire), send: self.unsent() > 0 }
    }
}

/// The epoll descriptor of the receiver, and the events that it is registered for.
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

    /// Stops watching for messages: a waiting thread reads.
    pub(crate) fn mute(&mut self, main: &Link, twin: Option<&Link>) {
        self.muted = true;
        self.update(main, twin);
    }

    /// Watches for messages again: no waiting thread reads.
    pub(crate) fn unmute(&mut self, main: &Link, twin: Option<&Link>) {
        self.muted = false;
        self.update(main, twin);
    }

    /// Registers the events that the links wait for now.
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
