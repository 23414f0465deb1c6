//! vfio-user "Command Concurrency": one connection, used by several threads at once.
//!
//! Who waits for a reply reads the socket on behalf of everybody, also the server's own commands; where nobody
//! waits, the [`super::Receiver`] does. Must never wait without a limit, and never go on after the stream of
//! messages was lost: then it is shut down on the spot, and whoever polls the socket sees the hang-up.
//!
//! Locks, in this order: streams, watch, then one of table or a link's outgoing messages.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use zerocopy::IntoBytes;

use super::dma::Dma;
use super::error::{Cause, Error, Step};
use super::incoming::{Ahead, Incoming, Message, Read};
use super::limits::{Limits, Stats};
use super::message::{Command, Fault, Header, Kind, MultiWrite, RegionAccess, length};
use super::outgoing::{Join, Outgoing};
use super::receiver::Watch;
use super::table::{Delivered, Expected, Reply, Table};
use super::trace::{Direction, TraceEvent};
use super::version::Version;
use crate::deadline::Deadline;

/// Bytes of commands that may wait for room in the socket; beyond that, the caller waits.
const COMMANDS_MOST: usize = 256 << 10;

/// Bytes of our replies that may wait for the server to read them; beyond that, the server is broken.
const REPLIES_MOST: usize = 4 << 20;

/// Reads of one socket in one go, so that a flood on one does not starve the others.
const BATCH: usize = 32;

/// How often a thread that waits for room looks whether it should read instead.
const ROOM_STEP: Duration = Duration::from_millis(5);

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
    outgoing: Mutex<Outgoing>,
}

impl Link {
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, outgoing: Mutex::default() })
    }

    /// True when messages wait for room.
    pub(super) fn has_unsent(&self) -> bool {
        lock(&self.outgoing).unsent() > 0
    }
}

/// What is being received.
#[derive(Default)]
struct Streams {
    main: Incoming,
    twin: Incoming,
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
    streams: Mutex<Streams>,
    table: Mutex<Table>,
    answered: Condvar,
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
        let id = {
            let mut table = lock(&self.table);
            table.refuse(&self.peer, command)?;
            table.open(command, expected).map_err(|cause| self.error(command, cause))?
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

    /// Waits until `submitted` is answered; after the deadline its reply is discarded when it comes.
    pub(super) fn wait(&self, submitted: &Submitted, deadline: &Deadline) -> Result<Reply, Error> {
        let begin = Instant::now();
        let outcome = match self.wait_sent(submitted.command, submitted.number, deadline) {
            Ok(()) => self.wait_answered(submitted, deadline),
            Err(error) => {
                self.abandon(submitted.id);
                Err(error)
            }
        };
        let took = begin.elapsed();
        self.count(|stats| {
            stats.worst_wait = stats.worst_wait.max(took);
            stats.total_wait = stats.total_wait.saturating_add(took);
            match &outcome {
                Ok(_) => stats.answers = stats.answers.saturating_add(1),
                Err(error) if matches!(error.cause(), Cause::Refused(_)) => {
                    stats.answers = stats.answers.saturating_add(1);
                    stats.refusals = stats.refusals.saturating_add(1);
                }
                Err(_) => stats.failures = stats.failures.saturating_add(1),
            }
        });
        outcome
    }

    /// Nobody waits for `id` any more.
    pub(super) fn abandon(&self, id: u16) {
        lock(&self.table).abandon(id);
    }

    fn wait_answered(&self, submitted: &Submitted, deadline: &Deadline) -> Result<Reply, Error> {
        let Submitted { id, command, .. } = *submitted;
        let mut table = lock(&self.table);
        loop {
            if let Some(outcome) = table.take(id) {
                return outcome;
            }
            let Some(left) = deadline.remaining() else {
                table.abandon(id);
                return Err(self.error(command, Cause::Silent(deadline.limit())));
            };
            if table.led {
                table.followers = table.followers.saturating_add(1);
                let waited = self.answered.wait_timeout(table, left);
                table = waited.unwrap_or_else(PoisonError::into_inner).0;
                table.followers = table.followers.saturating_sub(1);
                continue;
            }
            table.led = true;
            drop(table);
            let lead = Lead::begin(self);
            self.lead(deadline, &mut || lock(&self.table).is_answered(id));
            drop(lead);
            table = lock(&self.table);
        }
    }

    /// Waits until message `number` went out whole.
    fn wait_sent(&self, command: Command, number: u64, deadline: &Deadline) -> Result<(), Error> {
        let sent = || lock(&self.main.outgoing).is_sent(number);
        self.wait_out(command, &sent, deadline)
    }

    /// Waits until there is room for another command.
    fn make_room(&self, command: Command, deadline: &Deadline) -> Result<(), Error> {
        let room = || lock(&self.main.outgoing).unsent() <= COMMANDS_MOST;
        self.wait_out(command, &room, deadline)
    }

    /// Sends, and reads meanwhile when nobody else does: a server that waits for us to read does not read.
    fn wait_out(
        &self,
        command: Command,
        enough: &dyn Fn() -> bool,
        deadline: &Deadline,
    ) -> Result<(), Error> {
        loop {
            if enough() {
                return Ok(());
            }
            {
                let mut table = lock(&self.table);
                if let Some(loss) = table.loss() {
                    let loss = loss.clone();
                    table.told();
                    return Err(loss);
                }
                if deadline.remaining().is_none() {
                    return Err(self.error(command, Cause::NotReading(deadline.limit())));
                }
                if !table.led {
                    table.led = true;
                    drop(table);
                    let lead = Lead::begin(self);
                    self.lead(deadline, &mut || enough() || self.is_lost());
                    drop(lead);
                    continue;
                }
            }
            let step = deadline.remaining().map_or(ROOM_STEP, |left| left.min(ROOM_STEP));
            let wait = Timespec::try_from(step).ok();
            let mut fds = [PollFd::new(&self.main.socket, PollFlags::OUT)];
            // However it ends, the loop looks again.
            if poll(&mut fds, wait.as_ref()).is_ok() {
                self.flush(Side::Main)?;
            }
        }
    }

    /// Reads and sends until `done`, or the deadline, or the end of the connection.
    fn lead(&self, deadline: &Deadline, done: &mut dyn FnMut() -> bool) {
        while !done() {
            let Some(left) = deadline.remaining() else { return };
            let Ok(timeout) = Timespec::try_from(left) else { return };
            let interest = |link: &Link| {
                if link.has_unsent() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN }
            };
            let mut fds = Vec::with_capacity(2);
            fds.push(PollFd::new(&self.main.socket, interest(&self.main)));
            if let Some(twin) = self.twin.get() {
                fds.push(PollFd::new(&twin.socket, interest(twin)));
            }
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                Ok(_) => {}
                Err(errno) => {
                    self.lose(Error::new(&self.peer, Step::Idle, Cause::Io(errno.into())));
                    return;
                }
            }
            let writable = fds.iter().map(|fd| fd.revents().contains(PollFlags::OUT));
            let writable: Vec<bool> = writable.collect();
            let flushed = [Side::Main, Side::Twin]
                .into_iter()
                .zip(writable)
                .filter(|(_, writable)| *writable)
                .try_for_each(|(side, _)| self.flush(side));
            if flushed.is_err() {
                return;
            }
            let mut streams = lock(&self.streams);
            let mut enough = || done() || deadline.remaining().is_none();
            if self.pump(&mut streams, &mut enough).is_err() {
                return;
            }
        }
    }

    /// What the [`super::Receiver`] does: nothing while somebody who waits reads.
    pub(super) fn serve(&self) -> Result<usize, Error> {
        let mut streams = lock(&self.streams);
        if lock(&self.table).led {
            return Ok(0);
        }
        let flushed = self.flush(Side::Main).and_then(|()| self.flush(Side::Twin));
        let served = flushed.and_then(|()| self.pump(&mut streams, &mut || false));
        served.inspect_err(|_| lock(&self.table).told())
    }

    /// Reads what is there, a batch of each socket, and deals with it. Ends the connection when it must.
    fn pump(&self, streams: &mut Streams, enough: &mut dyn FnMut() -> bool) -> Result<usize, Error> {
        let mut count = 0;
        for side in [Side::Main, Side::Twin] {
            let Some(link) = self.link(side) else { continue };
            let incoming = match side {
                Side::Main => &mut streams.main,
                Side::Twin => &mut streams.twin,
            };
            for _ in 0..BATCH {
                while let Some(message) = self.next(side, incoming)? {
                    count = usize::saturating_add(count, 1);
                    self.handle(side, message)?;
                }
                if enough() {
                    return Ok(count);
                }
                let due = side == Side::Main && lock(&self.table).fds_are_due();
                let ahead = if due { Ahead::Never } else { Ahead::Freely };
                match incoming.read(&link.socket, ahead) {
                    Ok(Read::Some) => {}
                    Ok(Read::Nothing) => break,
                    Ok(Read::HungUp) => return Err(self.lose(self.at_the_oldest(Cause::Closed))),
                    Err(cause) => return Err(self.lose(self.at_the_oldest(cause))),
                }
            }
        }
        Ok(count)
    }

    /// An error that no message explains belongs to the command that has waited longest.
    fn at_the_oldest(&self, cause: Cause) -> Error {
        let step = lock(&self.table).oldest().map_or(Step::Idle, Step::Command);
        Error::new(&self.peer, step, cause)
    }

    fn next(&self, side: Side, incoming: &mut Incoming) -> Result<Option<Message>, Error> {
        incoming.take(|header| self.judge(side, header)).map_err(|(header, fault)| {
            let command = Command(header.command);
            let step = match header.kind() {
                Ok(Kind::Command | Kind::Posted) => Step::ServerCommand(command),
                _ => Step::Command(command),
            };
            self.lose(Error::new(&self.peer, step, Cause::Malformed(fault)))
        })
    }

    /// How large the payload behind `header` is, if such a message may come at all.
    fn judge(&self, side: Side, header: &Header) -> Result<u32, Fault> {
        match header.kind()? {
            Kind::Reply | Kind::ErrorReply if side == Side::Main => lock(&self.table).judge(header),
            Kind::Command | Kind::Posted if side == self.command_side() => match self.version.get() {
                Some(version) => header.judge_size(version.largest_server_payload()),
                // Before the version is agreed on, nothing may be asked.
                None => Err(Fault::Request(u32::from(header.command))),
            },
            _ => Err(Fault::Flags(header.flags)),
        }
    }

    /// Where the server's commands come.
    fn command_side(&self) -> Side {
        if self.twin.get().is_some() { Side::Twin } else { Side::Main }
    }

    fn handle(&self, side: Side, message: Message) -> Result<(), Error> {
        let Message { header, payload, fds } = message;
        let command = Command(header.command);
        let (step, fault) = match header.kind() {
            Ok(kind @ (Kind::Reply | Kind::ErrorReply)) => {
                if self.limits.is_traced() {
                    let sent = lock(&self.table).sent_at(header.id);
                    let took = sent.map_or(Duration::ZERO, |sent| sent.elapsed());
                    self.trace(Direction::FromServer, &header, &payload, fds.len(), took);
                }
                let mut table = lock(&self.table);
                match table.deliver(&self.peer, &header, kind, Reply { payload, fds }) {
                    Ok(delivered) => {
                        let wake = table.followers > 0;
                        drop(table);
                        if wake {
                            self.answered.notify_all();
                        }
                        if delivered == Delivered::Late {
                            log::debug!("vfio-user server {}: a late reply to {command}", self.peer);
                            self.count(|stats| stats.late = stats.late.saturating_add(1));
                        }
                        return Ok(());
                    }
                    Err(fault) => (Step::Command(command), fault),
                }
            }
            Ok(kind @ (Kind::Command | Kind::Posted)) => {
                self.trace(Direction::ServerCommand, &header, &payload, fds.len(), Duration::ZERO);
                if fds.is_empty() {
                    return self.serve_command(side, &header, kind, &payload);
                }
                let fault = Fault::Fds { got: fds.len(), least: 0, most: 0 };
                (Step::ServerCommand(command), fault)
            }
            Err(fault) => (Step::ServerCommand(command), fault),
        };
        Err(self.lose(Error::new(&self.peer, step, Cause::Malformed(fault))))
    }

    fn serve_command(&self, side: Side, header: &Header, kind: Kind, payload: &[u8]) -> Result<(), Error> {
        let limit = self.version.get().map_or(0, |version| version.ours.max_data_xfer_size);
        let outcome = self.dma.serve(Command(header.command), payload, limit);
        self.count(|stats| stats.count_dma(&outcome));
        if let Err(refusal) = outcome {
            log::debug!("vfio-user server {}: {} is refused: {refusal}", self.peer, Command(header.command));
        }
        if kind == Kind::Posted {
            return Ok(());
        }
        let (answer, data) = match &outcome {
            Ok(served) => (Header::reply(header, length(served.reply().len())), served.reply()),
            Err(refusal) => (Header::error_reply(header, refusal.errno()), &[][..]),
        };
        self.trace(Direction::OurReply, &answer, data, 0, Duration::ZERO);
        let Some(link) = self.link(side) else { return Ok(()) };
        let message = [answer.as_bytes(), data].concat();
        let mut outgoing = lock(&link.outgoing);
        let pushed = outgoing.push(&link.socket, message, &[]);
        let unsent = outgoing.unsent();
        drop(outgoing);
        let step = Step::ServerCommand(Command(header.command));
        match pushed {
            Ok(_) if unsent > REPLIES_MOST => {
                Err(self.lose(Error::new(&self.peer, step, Cause::NotReading(Duration::ZERO))))
            }
            Ok(_) => {
                if unsent > 0 {
                    self.update_watch();
                }
                Ok(())
            }
            Err(source) => Err(self.lose(Error::new(&self.peer, step, ended(source)))),
        }
    }

    fn link(&self, side: Side) -> Option<&Link> {
        match side {
            Side::Main => Some(&self.main),
            Side::Twin => self.twin.get(),
        }
    }

    fn flush(&self, side: Side) -> Result<(), Error> {
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

/// Reading on behalf of everybody who waits; while it lives, the receiver does not.
struct Lead<'a>(&'a Shared);

impl<'a> Lead<'a> {
    /// `Table::led` was set by the caller.
    fn begin(shared: &'a Shared) -> Self {
        // Once this lock was held, a receiver that was reading has finished, and sees that it should not.
        let streams = lock(&shared.streams);
        if let Some(watch) = lock(&shared.watch).as_mut() {
            watch.mute(&shared.main, shared.twin.get());
        }
        drop(streams);
        Self(shared)
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        let streams = lock(&self.0.streams);
        let mut table = lock(&self.0.table);
        table.led = false;
        let wake = table.followers > 0;
        drop(table);
        if let Some(watch) = lock(&self.0.watch).as_mut() {
            watch.unmute(&self.0.main, self.0.twin.get());
        }
        drop(streams);
        if wake {
            self.0.answered.notify_all();
        }
    }
}

fn ended(source: io::Error) -> Cause {
    match source.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Cause::Closed,
        _ => Cause::Io(source),
    }
}
