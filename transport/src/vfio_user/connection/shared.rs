//! vfio-user "Command Concurrency": one connection, used by several threads at once.
//!
//! This file sends messages and ends the connection. One of the threads that wait for a reply
//! ([`super::waiting`]) reads the socket for all of them, and answers the server's own commands
//! ([`super::reading`]). While no thread waits, the [`super::receiver::Receiver`] reads. Must never use a
//! connection on after the stream of messages was lost: the sockets are shut down at once, so a thread that
//! polls them sees the hang-up.
//!
//! Lock order: `streams`, then `watch`, then one of `table` and a link's `outgoing`.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, OnceLock};
use std::time::Duration;

use zerocopy::IntoBytes;

use super::incoming::Incoming;
use super::link::{Link, Side, Watch, lock};
use super::outgoing::Join;
use super::table::{Expected, Table, Then};
use super::windows::Dma;
use crate::peer::deadline::Deadline;
use crate::peer::{Cause, Direction, Error, Limits, Peer, Stats, Step};
use crate::vfio_user::describe::{self, Fields};
use crate::vfio_user::message::{Command, Fault, Header, MultiWrite, RegionAccess, length};
use crate::vfio_user::version::Version;

/// The partly received messages of each socket.
#[derive(Default)]
pub(crate) struct Streams {
    pub(crate) main: Incoming,
    pub(crate) twin: Incoming,
}

/// Counters of one connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientStats {
    /// Commands that ask for a reply.
    pub exchanges: Stats,
    /// Messages sent that ask for no reply (posted writes).
    pub posted: u64,
    /// Error replies.
    pub refusals: u64,
    /// Replies that came after the deadline of their command.
    pub late: u64,
    /// DMA reads that the server asked for by message.
    pub dma_reads: u64,
    /// DMA writes that the server asked for by message.
    pub dma_writes: u64,
    /// Bytes moved by DMA reads and DMA writes together.
    pub dma_bytes: u64,
    /// Commands of the server that we refused.
    pub server_refusals: u64,
}

/// One connection with everything that its threads share.
pub(crate) struct Shared {
    pub(crate) peer: Peer,
    pub(crate) limits: Limits,
    pub(crate) main: Link,
    pub(crate) twin: OnceLock<Link>,
    pub(crate) version: OnceLock<Version>,
    pub(crate) dma: Dma,
    pub(crate) watch: Mutex<Option<Watch>>,
    pub(crate) streams: Mutex<Streams>,
    pub(crate) table: Mutex<Table>,
    pub(crate) answered: Condvar,
    stats: Mutex<ClientStats>,
}

impl Shared {
    pub(crate) fn new(socket: UnixStream, peer: Peer, limits: &Limits) -> Result<Self, Error> {
        let unusable = |source| Error::new(&peer, Step::Connect, Cause::Io(source));
        let main = Link::new(socket).map_err(unusable)?;
        Ok(Self {
            limits: limits.clone(),
            main,
            twin: OnceLock::new(),
            version: OnceLock::new(),
            dma: Dma::default(),
            watch: Mutex::new(None),
            streams: Mutex::default(),
            table: Mutex::new(Table::new()),
            answered: Condvar::new(),
            stats: Mutex::default(),
            peer,
        })
    }

    pub(crate) fn error(&self, command: Command, cause: Cause) -> Error {
        Error::new(&self.peer, Step::Request(command.into()), cause)
    }

    pub(crate) fn is_lost(&self) -> bool {
        lock(&self.table).loss().is_some()
    }

    pub(crate) fn stats(&self) -> ClientStats {
        *lock(&self.stats)
    }

    pub(crate) fn count(&self, change: impl FnOnce(&mut ClientStats)) {
        change(&mut lock(&self.stats));
    }

    /// Sends a command that will be answered; [`Shared::wait`] waits for the reply.
    pub(crate) fn submit(
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

    /// As [`Shared::submit`], without waiting for room in the socket. When `then` is given, no thread may
    /// wait for the reply.
    pub(crate) fn submit_now(
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
        self.trace(Direction::Request, &header, &payload, fds.len(), Duration::ZERO);
        let message = [header.as_bytes(), &payload].concat();
        let pushed = lock(&self.main.outgoing).push(&self.main.socket, message, fds);
        match pushed {
            Ok(number) => {
                self.count(|stats| stats.exchanges.sent = stats.exchanges.sent.saturating_add(1));
                self.update_watch();
                Ok(Submitted { id, number, command })
            }
            Err(source) => {
                lock(&self.table).withdraw(id);
                Err(self.lost_on_the_way(command, source))
            }
        }
    }

    /// Sends a write that asks for no reply.
    pub(crate) fn post(&self, write: MultiWrite, join: Join, deadline: &Deadline) -> Result<(), Error> {
        let command = Command::REGION_WRITE;
        self.make_room(command, deadline)?;
        let id = self.unused_id(command)?;
        if self.limits.trace().is_some() {
            let header = Header::posted(id, command, 16_u32.saturating_add(write.count));
            let access = RegionAccess { offset: write.offset, region: write.region, count: write.count };
            let count = usize::try_from(write.count).unwrap_or(usize::MAX);
            let data = write.data.get(..count).unwrap_or_default();
            let payload = [access.as_bytes(), data].concat();
            self.trace(Direction::Request, &header, &payload, 0, Duration::ZERO);
        }
        let pushed = lock(&self.main.outgoing).push_write(&self.main.socket, id, write, join);
        self.posted(command, pushed, deadline)
    }

    /// Sends a message that asks for no reply.
    pub(crate) fn post_message(
        &self,
        command: Command,
        payload: &[&[u8]],
        deadline: &Deadline,
    ) -> Result<(), Error> {
        self.make_room(command, deadline)?;
        let id = self.unused_id(command)?;
        let payload = payload.concat();
        let header = Header::posted(id, command, length(payload.len()));
        self.trace(Direction::Request, &header, &payload, 0, Duration::ZERO);
        let message = [header.as_bytes(), &payload].concat();
        let pushed = lock(&self.main.outgoing).push(&self.main.socket, message, &[]);
        self.posted(command, pushed, deadline)
    }

    fn unused_id(&self, command: Command) -> Result<u16, Error> {
        let mut table = lock(&self.table);
        table.refuse(&self.peer, command)?;
        Ok(table.unused())
    }

    /// Ends the connection because sending failed.
    fn lost_on_the_way(&self, command: Command, source: io::Error) -> Error {
        let error = self.lose(self.error(command, ended(source)));
        lock(&self.table).told();
        error
    }

    /// Finishes a posted message. Without a [`super::receiver::Receiver`], no other thread would send its
    /// unsent rest, so this thread does.
    fn posted(&self, command: Command, pushed: io::Result<u64>, deadline: &Deadline) -> Result<(), Error> {
        let number = pushed.map_err(|source| self.lost_on_the_way(command, source))?;
        self.count(|stats| stats.posted = stats.posted.saturating_add(1));
        if self.update_watch() {
            return Ok(());
        }
        self.wait_sent(command, number, deadline)
    }

    /// Marks command `id` as one whose reply no thread waits for any more.
    pub(crate) fn abandon(&self, id: u16) {
        lock(&self.table).abandon(id);
    }

    /// Makes an error that no message explains. Its step is the command that has waited longest.
    pub(crate) fn at_the_oldest(&self, cause: Cause) -> Error {
        let step = lock(&self.table).oldest().map_or(Step::Idle, |command| Step::Request(command.into()));
        Error::new(&self.peer, step, cause)
    }

    pub(crate) fn link(&self, side: Side) -> Option<&Link> {
        match side {
            Side::Main => Some(&self.main),
            Side::Twin => self.twin.get(),
        }
    }

    pub(crate) fn flush(&self, side: Side) -> Result<(), Error> {
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

    /// Updates the events that a [`super::receiver::Receiver`] polls for. True when there is a receiver.
    pub(crate) fn update_watch(&self) -> bool {
        match lock(&self.watch).as_mut() {
            Some(watch) => {
                watch.update(&self.main, self.twin.get());
                true
            }
            None => false,
        }
    }

    /// Ends the connection. Waiting threads get an error; threads that poll the sockets, and the server, see
    /// the hang-up.
    ///
    /// Returns the reason why the connection ended: the first one, when it had ended before.
    pub(crate) fn lose(&self, error: Error) -> Error {
        let first = lock(&self.table).lose(&self.peer, &error);
        for link in std::iter::once(&self.main).chain(self.twin.get()) {
            // The peer may be gone already, so a failure does not matter: neither side can use the socket
            // afterwards.
            if let Err(source) = link.socket.shutdown(Shutdown::Both) {
                log::debug!("{}: shutting down: {source}", self.peer);
            }
            lock(&link.outgoing).clear();
        }
        self.answered.notify_all();
        first
    }

    /// Ends the connection because we do not need it any more.
    pub(crate) fn end(&self) {
        self.lose(Error::new(&self.peer, Step::Idle, Cause::AlreadyLost));
        lock(&self.table).told();
    }

    /// Ends the connection because a reply held a value that is not allowed.
    pub(crate) fn malformed(&self, command: Command, fault: Fault) -> Error {
        let error = self.lose(self.error(command, Cause::Malformed(fault)));
        lock(&self.table).told();
        error
    }

    pub(crate) fn trace(
        &self,
        direction: Direction,
        header: &Header,
        payload: &[u8],
        fds: usize,
        took: Duration,
    ) {
        let fields = Fields { header: *header, payload };
        describe::show(self.limits.trace(), &self.peer, direction, &fields, (fds, took));
    }
}

impl Drop for Shared {
    /// Shuts the sockets down: closing is not enough while another thread polls a duplicate of the socket.
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

/// A command that was sent, by message id and by its place in the order of messages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Submitted {
    pub(crate) id: u16,
    pub(crate) number: u64,
    pub(crate) command: Command,
}

pub(crate) fn ended(source: io::Error) -> Cause {
    match source.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Cause::Closed,
        _ => Cause::Io(source),
    }
}
