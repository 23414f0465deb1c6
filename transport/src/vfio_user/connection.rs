//! vfio-user "Command Concurrency": one connection, used by several threads at once.
//!
//! Here: sending, and the end. Who waits for a reply ([`super::waiting`]) reads the socket on behalf of everybody,
//! also the server's own commands ([`super::reading`]); where nobody waits, the [`super::Receiver`] does. Must never
//! go on after the stream of messages was lost: then it is shut down on the spot, and whoever polls the socket sees
//! the hang-up.
//!
//! Locks, in this order: streams, watch, then one of table or a link's outgoing messages.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use zerocopy::IntoBytes;

use super::dma::Dma;
use super::error::{Cause, Error, Step};
use super::incoming::Incoming;
use super::limits::{Limits, Stats};
use super::message::{Command, Fault, Header, MultiWrite, RegionAccess, length};
use super::outgoing::{Join, Outgoing};
use super::receiver::Watch;
use super::table::{Expected, Table, Then};
use super::trace::{Direction, TraceEvent};
use super::version::Version;
use crate::deadline::Deadline;

/// Which socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// The one that was connected.
    Main,
    /// The one for the server's commands ("twin socket").
    Twin,
}

/// One socket and what waits to go out on it.
pub(super) struct Link {
    pub(super) socket: UnixStream,
    pub(super) outgoing: Mutex<Outgoing>,
    /// Messages that came are left where they are, until the server has taken some of our replies.
    held: AtomicBool,
}

/// What is to be done on a link as soon as it can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Interest {
    /// Reading what comes; otherwise going on with what is held, when there is room to answer it.
    pub(super) read: bool,
    /// Sending what waits for room.
    pub(super) send: bool,
}

impl Link {
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, outgoing: Mutex::default(), held: AtomicBool::new(false) })
    }

    /// Bytes that wait for room.
    pub(super) fn unsent(&self) -> usize {
        lock(&self.outgoing).unsent()
    }

    /// Holds messages back, or no longer. True when that is new. What is held may be in our memory already, where no
    /// poll sees it: room to write is what wakes us up for it.
    pub(super) fn hold(&self, held: bool) -> bool {
        self.held.swap(held, Ordering::AcqRel) != held
    }

    /// What there is to do.
    pub(super) fn interest(&self) -> Interest {
        Interest { read: !self.held.load(Ordering::Acquire), send: self.unsent() > 0 }
    }
}

/// What is being received.
#[derive(Default)]
pub(super) struct Streams {
    pub(super) main: Incoming,
    pub(super) twin: Incoming,
}

/// The connection.
pub(super) struct Shared {
    pub(super) peer: Arc<str>,
    pub(super) limits: Limits,
    pub(super) main: Link,
    pub(super) twin: OnceLock<Link>,
    pub(super) version: OnceLock<Version>,
    pub(super) dma: Dma,
    pub(super) watch: Mutex<Option<Watch>>,
    pub(super) streams: Mutex<Streams>,
    pub(super) table: Mutex<Table>,
    pub(super) answered: Condvar,
    stats: Mutex<Stats>,
}

/// A thread that panicked leaves these locks' values whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(socket: UnixStream, peer: Arc<str>, limits: &Limits) -> Result<Self, Error> {
        let unusable = |source| Error::new(&peer, Step::Connect, Cause::Io(source));
        let main = Link::new(socket).map_err(unusable)?;
        Ok(Self {
            limits: limits.clone(),
            main,
            twin: OnceLock::new(),
            version: OnceLock::new(),
            dma: Dma::new(limits.memory()),
            watch: Mutex::new(None),
            streams: Mutex::default(),
            table: Mutex::new(Table::new()),
            answered: Condvar::new(),
            stats: Mutex::default(),
            peer,
        })
    }

    pub(super) fn error(&self, command: Command, cause: Cause) -> Error {
        Error::new(&self.peer, Step::Command(command), cause)
    }

    pub(super) fn is_lost(&self) -> bool {
        lock(&self.table).loss().is_some()
    }

    pub(super) fn stats(&self) -> Stats {
        *lock(&self.stats)
    }

    pub(super) fn count(&self, change: impl FnOnce(&mut Stats)) {
        change(&mut lock(&self.stats));
    }

    /// Sends a command that will be answered; [`Shared::wait`] for its id.
    pub(super) fn submit(
        &self,
        command: Command,
        payload: &[&[u8]],
        fds: &[BorrowedFd<'_>],
        expected: Expected,
        deadline: &Deadline,
    ) -> Result<Submitted, Error> {
        self.make_room(command, deadline)?;
        self.submit_now(command, payload, fds, expected, None)
    }

    /// The same without a wait for room. With `then`, nobody is to wait for the reply.
    pub(super) fn submit_now(
        &self,
        command: Command,
        payload: &[&[u8]],
        fds: &[BorrowedFd<'_>],
        expected: Expected,
        then: Option<Then>,
    ) -> Result<Submitted, Error> {
        let id = {
            let mut table = lock(&self.table);
            table.refuse(&self.peer, command)?;
            let opened = table.open(command, expected, self.limits.deadline());
            let id = opened.map_err(|cause| self.error(command, cause))?;
            if let Some(then) = then {
                table.then(id, then);
            }
            id
        };
        let payload = payload.concat();
        let header = Header::command(id, command, length(payload.len()));
        self.trace(Direction::ToServer, &header, &payload, fds.len(), Duration::ZERO);
        let message = [header.as_bytes(), &payload].concat();
        let pushed = lock(&self.main.outgoing).push(&self.main.socket, message, fds);
        match pushed {
            Ok(number) => {
                self.count(|stats| stats.sent = stats.sent.saturating_add(1));
                self.update_watch();
                Ok(Submitted { id, number, command })
            }
            Err(source) => {
                lock(&self.table).withdraw(id);
                Err(self.lost_on_the_way(command, source))
            }
        }
    }

    /// Sends a write that nothing answers.
    pub(super) fn post(&self, write: MultiWrite, join: Join, deadline: &Deadline) -> Result<(), Error> {
        let command = Command::REGION_WRITE;
        self.make_room(command, deadline)?;
        let id = self.unused_id(command)?;
        if self.limits.is_traced() {
            let header = Header::posted(id, command, 16_u32.saturating_add(write.count));
            let access = RegionAccess { offset: write.offset, region: write.region, count: write.count };
            let count = usize::try_from(write.count).unwrap_or(usize::MAX);
            let data = write.data.get(..count).unwrap_or_default();
            let payload = [access.as_bytes(), data].concat();
            self.trace(Direction::ToServer, &header, &payload, 0, Duration::ZERO);
        }
        let pushed = lock(&self.main.outgoing).push_write(&self.main.socket, id, write, join);
        self.posted(command, pushed, deadline)
    }

    /// Sends a message that nothing answers.
    pub(super) fn post_message(
        &self,
        command: Command,
        payload: &[&[u8]],
        deadline: &Deadline,
    ) -> Result<(), Error> {
        self.make_room(command, deadline)?;
        let id = self.unused_id(command)?;
        let payload = payload.concat();
        let header = Header::posted(id, command, length(payload.len()));
        self.trace(Direction::ToServer, &header, &payload, 0, Duration::ZERO);
        let message = [header.as_bytes(), &payload].concat();
        let pushed = lock(&self.main.outgoing).push(&self.main.socket, message, &[]);
        self.posted(command, pushed, deadline)
    }

    fn unused_id(&self, command: Command) -> Result<u16, Error> {
        let mut table = lock(&self.table);
        table.refuse(&self.peer, command)?;
        Ok(table.unused())
    }

    /// The end of the connection, met while sending.
    fn lost_on_the_way(&self, command: Command, source: io::Error) -> Error {
        let error = self.lose(self.error(command, ended(source)));
        lock(&self.table).told();
        error
    }

    /// What a posted message leaves to do: without a [`super::Receiver`] nobody else would send its rest.
    fn posted(&self, command: Command, pushed: io::Result<u64>, deadline: &Deadline) -> Result<(), Error> {
        let number = pushed.map_err(|source| self.lost_on_the_way(command, source))?;
        self.count(|stats| stats.posted = stats.posted.saturating_add(1));
        if self.update_watch() {
            return Ok(());
        }
        self.wait_sent(command, number, deadline)
    }

    /// Nobody waits for `id` any more.
    pub(super) fn abandon(&self, id: u16) {
        lock(&self.table).abandon(id);
    }

    /// An error that no message explains belongs to the command that has waited longest.
    pub(super) fn at_the_oldest(&self, cause: Cause) -> Error {
        let step = lock(&self.table).oldest().map_or(Step::Idle, Step::Command);
        Error::new(&self.peer, step, cause)
    }

    pub(super) fn link(&self, side: Side) -> Option<&Link> {
        match side {
            Side::Main => Some(&self.main),
            Side::Twin => self.twin.get(),
        }
    }

    pub(super) fn flush(&self, side: Side) -> Result<(), Error> {
        let Some(link) = self.link(side) else { return Ok(()) };
        let mut outgoing = lock(&link.outgoing);
        if outgoing.unsent() == 0 {
            return Ok(());
        }
        let flushed = outgoing.flush(&link.socket);
        drop(outgoing);
        self.update_watch();
        flushed.map_err(|source| self.lose(self.at_the_oldest(ended(source))))
    }

    /// Tells a [`super::Receiver`] for what to poll. True when there is one.
    pub(super) fn update_watch(&self) -> bool {
        match lock(&self.watch).as_mut() {
            Some(watch) => {
                watch.update(&self.main, self.twin.get());
                true
            }
            None => false,
        }
    }

    /// Ends the connection. Whoever waits is told, whoever polls sees the hang-up, and the server does, too.
    ///
    /// Returns why it ended: the first reason, when there is one already.
    pub(super) fn lose(&self, error: Error) -> Error {
        let first = lock(&self.table).lose(&self.peer, &error);
        for link in std::iter::once(&self.main).chain(self.twin.get()) {
            // The peer may be gone already; all that matters is that neither side goes on.
            if let Err(source) = link.socket.shutdown(Shutdown::Both) {
                log::debug!("vfio-user server {}: shutting down: {source}", self.peer);
            }
            lock(&link.outgoing).clear();
        }
        self.answered.notify_all();
        first
    }

    /// Ends the connection because we do not want it any more.
    pub(super) fn end(&self) {
        self.lose(Error::new(&self.peer, Step::Idle, Cause::AlreadyLost));
        lock(&self.table).told();
    }

    /// Ends the connection because a reply held what it must not.
    pub(super) fn malformed(&self, command: Command, fault: Fault) -> Error {
        let error = self.lose(self.error(command, Cause::Malformed(fault)));
        lock(&self.table).told();
        error
    }

    pub(super) fn trace(
        &self,
        direction: Direction,
        header: &Header,
        payload: &[u8],
        fds: usize,
        took: Duration,
    ) {
        if let Some(trace) = self.limits.trace() {
            trace.message(&TraceEvent { peer: &self.peer, direction, header: *header, payload, fds, took });
        }
    }
}

impl Drop for Shared {
    /// Closing is not enough where somebody polls a duplicate of the socket.
    fn drop(&mut self) {
        if !self.is_lost() {
            self.end();
        }
    }
}

impl AsFd for Shared {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.main.socket.as_fd()
    }
}

/// A command on its way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Submitted {
    pub(super) id: u16,
    pub(super) number: u64,
    pub(super) command: Command,
}

pub(super) fn ended(source: io::Error) -> Cause {
    match source.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Cause::Closed,
        _ => Cause::Io(source),
    }
}
