//! vhost-user "Communication": one exchange with the backend at a time, with a limit on every wait.
//!
//! Applies the rules of the request table. Must never use a connection on after a failure that leaves it out
//! of step: the socket is shut down at once. So a late answer cannot be taken for the next one, and a thread
//! that polls the socket sees the hang-up.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use zerocopy::{FromZeros, IntoBytes};

use super::backend_requests::{BackendChannel, ChannelSocket};
use super::describe::{self, Fields};
use super::features::ProtocolFeatures;
use super::message::{Fault, HEADER_SIZE, Header, length, parse};
use super::request::{Answer, Needs, Request, Row, UNJUDGED_MOST};
use crate::peer::deadline::{Deadline, Waited, wait_readable, wait_writable};
use crate::peer::fds::{self, Received, Room};
use crate::peer::{Cause, Error, Step};
use crate::peer::{Direction, Limits, Peer, Stats};

/// The `fds` of an answer whose descriptors mean nothing: any number may come, and they are dropped.
const STRAYS: (u8, u8) = (0, u8::MAX);

/// An answer: its payload and fds, of sizes that the request's row allows.
#[derive(Debug, Default)]
pub(crate) struct Answered {
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// Whether the connection can still be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    InStep,
    Lost,
}

/// The main connection to a backend. Not shared between threads: `&mut` allows one exchange at a time.
pub(crate) struct Channel {
    socket: UnixStream,
    peer: Peer,
    limits: Limits,
    link: Link,
    stats: Stats,
    protocol_offered: bool,
    negotiated: ProtocolFeatures,
    /// The backend's own channel, which ends with this connection.
    backend: Option<Arc<ChannelSocket>>,
}

impl Channel {
    pub(crate) fn new(socket: UnixStream, peer: Peer, limits: &Limits) -> Result<Self, Error> {
        let unusable = |source| Error::new(&peer, Step::Connect, Cause::Io(source));
        socket.set_nonblocking(true).map_err(unusable)?;
        Ok(Self {
            socket,
            limits: limits.clone(),
            link: Link::InStep,
            stats: Stats::default(),
            protocol_offered: false,
            negotiated: ProtocolFeatures::NONE,
            backend: None,
            peer,
        })
    }

    pub(crate) fn peer(&self) -> &Peer {
        &self.peer
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(crate) fn stats(&self) -> Stats {
        self.stats
    }

    /// The deadline of an operation that begins now.
    pub(crate) fn deadline(&self) -> Deadline {
        Deadline::after(self.limits.deadline())
    }

    /// The deadline of an operation that gives the backend `bytes` of memory. Some backends populate all
    /// memory before they answer again, which takes 0.6 to 1.3 seconds per GiB on a quiet host. 4 seconds per
    /// GiB are granted.
    pub(crate) fn deadline_of_memory(&self, bytes: u64) -> Deadline {
        let populated = Duration::from_millis(4 * (bytes >> 20));
        Deadline::after(self.limits.deadline().saturating_add(populated))
    }

    /// Notes that device feature bit 30 was offered and may be used.
    pub(crate) fn set_protocol_offered(&mut self) {
        self.protocol_offered = true;
    }

    pub(crate) fn protocol_offered(&self) -> bool {
        self.protocol_offered
    }

    pub(crate) fn set_negotiated(&mut self, features: ProtocolFeatures) {
        self.negotiated = features;
    }

    pub(crate) fn negotiated(&self) -> ProtocolFeatures {
        self.negotiated
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.link == Link::Lost
    }

    /// Ends the connection after an answer with a value that is not allowed: no later message can be trusted.
    pub(crate) fn malformed(&mut self, request: Request, fault: Fault) -> Error {
        self.lose(request, Cause::Malformed(fault))
    }

    /// An error for a `request` that was not sent because of a mistake on our side.
    pub(crate) fn invalid(&self, request: Request, what: &'static str) -> Error {
        Error::new(&self.peer, Step::Request(request.into()), Cause::Invalid(what))
    }

    pub(crate) fn error(&self, request: Request, cause: Cause) -> Error {
        Error::new(&self.peer, Step::Request(request.into()), cause)
    }

    /// Sends `request`, and waits for its answer if its row and the negotiated features call for one.
    ///
    /// Blocks until `deadline` at most. A non-zero acknowledgement is [`Cause::Refused`].
    pub(crate) fn exchange(
        &mut self,
        request: Request,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: &Deadline,
    ) -> Result<Answered, Error> {
        let row = self.permit(request, fds.len())?;
        let begin = Instant::now();
        let outcome = self.perform(row, payload, fds, deadline);
        self.stats.waited(begin.elapsed());
        outcome.map_err(|cause| {
            if matches!(cause, Cause::Refused(_)) {
                return self.error(request, cause);
            }
            self.stats.failures = self.stats.failures.saturating_add(1);
            self.lose(request, cause)
        })
    }

    /// Does one exchange with a deadline of its own.
    pub(crate) fn ask(
        &mut self,
        request: Request,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Answered, Error> {
        let deadline = self.deadline();
        self.exchange(request, payload, fds, &deadline)
    }

    /// Does one exchange whose answer is a mere acknowledgement, with a deadline of its own.
    pub(crate) fn order(
        &mut self,
        request: Request,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        self.ask(request, payload, fds).map(drop)
    }

    /// Sends `payload` as a message of `request` without an answer: the acknowledgement of a postcopy memory
    /// table.
    pub(crate) fn tell(
        &mut self,
        request: Request,
        payload: &[u8],
        deadline: &Deadline,
    ) -> Result<(), Error> {
        if self.is_lost() {
            return Err(self.error(request, Cause::AlreadyLost));
        }
        let header = Header::request(request.0, length(payload.len()));
        self.send(&header, payload, &[], deadline).map_err(|cause| self.lose(request, cause))
    }

    /// Sends a request without need_reply, and waits for an answer of the sizes given here instead of those
    /// in its row.
    pub(crate) fn exchange_sized(
        &mut self,
        request: Request,
        message: (&[u8], &[BorrowedFd<'_>]),
        sizes: (u32, u32),
        deadline: &Deadline,
    ) -> Result<Answered, Error> {
        let (payload, fds) = message;
        let row = self.permit(request, fds.len())?;
        let header = Header::request(request.0, length(payload.len()));
        self.send(&header, payload, fds, deadline)
            .and_then(|()| self.receive(row, sizes, (0, 0), deadline))
            .map_err(|cause| self.lose(request, cause))
    }

    /// Sends a request whose answer is a plain u64.
    pub(crate) fn ask_u64(&mut self, request: Request, deadline: &Deadline) -> Result<u64, Error> {
        let answered = self.exchange(request, &[], &[], deadline)?;
        parse(&answered.payload).map_err(|fault| self.malformed(request, fault))
    }

    fn lose(&mut self, request: Request, cause: Cause) -> Error {
        self.abandon();
        self.error(request, cause)
    }

    /// Notes the backend's own channel, so that it ends with this connection.
    pub(crate) fn owns(&mut self, backend: &BackendChannel) {
        self.backend = Some(Arc::clone(backend.shared()));
    }

    /// Ends the connection and the backend's own channel. Threads that poll the sockets, and the backend, see
    /// the hang-up.
    pub(crate) fn abandon(&mut self) {
        self.link = Link::Lost;
        if let Some(backend) = self.backend.take() {
            backend.end();
        }
        // The peer may be gone already, so a failure does not matter: neither side can use the socket
        // afterwards.
        if let Err(source) = self.socket.shutdown(Shutdown::Both) {
            log::debug!("{}: shutting down: {source}", self.peer);
        }
    }

    fn permit(&self, request: Request, fds: usize) -> Result<&'static Row, Error> {
        if self.is_lost() {
            return Err(self.error(request, Cause::AlreadyLost));
        }
        let row = request.row().ok_or_else(|| self.invalid(request, "it is not in the request table"))?;
        let allowed = match row.needs {
            Needs::Nothing => true,
            Needs::ProtocolOffered => self.protocol_offered,
            Needs::Features(features) => self.negotiated.contains(features),
        };
        if !allowed {
            return Err(self.error(request, Cause::NotNegotiated));
        }
        if fds < usize::from(row.fds.0) || fds > usize::from(row.fds.1) {
            return Err(self.invalid(request, "it carries another number of file descriptors"));
        }
        Ok(row)
    }

    fn perform(
        &mut self,
        row: &'static Row,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: &Deadline,
    ) -> Result<Answered, Cause> {
        let acks = self.negotiated.contains(ProtocolFeatures::REPLY_ACK);
        let code = row.request.0;
        let header = match row.answer {
            Answer::Ack | Answer::AlwaysAsked if acks => Header::asking(code, length(payload.len())),
            _ => Header::request(code, length(payload.len())),
        };
        self.send(&header, payload, fds, deadline)?;
        match row.answer {
            Answer::Ack if !acks => Ok(Answered::default()),
            Answer::Ack => {
                let answered = self.receive(row, (8, 8), (0, 0), deadline)?;
                match parse::<u64>(&answered.payload).map_err(Cause::Malformed)? {
                    0 => Ok(answered),
                    code => Err(Cause::Refused(code)),
                }
            }
            Answer::AlwaysAsked => self.receive(row, (8, 8), (0, 0), deadline),
            Answer::Always { least, most, fds } => self.receive(row, (least, most), fds, deadline),
            Answer::Unjudged => self.receive(row, (0, UNJUDGED_MOST), STRAYS, deadline),
        }
    }

    /// Sends a message with one `sendmsg`: backends that read the header with one call would lose a split
    /// one.
    fn send(
        &mut self,
        header: &Header,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: &Deadline,
    ) -> Result<(), Cause> {
        let mut message = Vec::with_capacity(HEADER_SIZE.saturating_add(payload.len()));
        message.extend_from_slice(header.as_bytes());
        message.extend_from_slice(payload);
        self.trace(Direction::Request, header, payload, fds.len(), Duration::ZERO);
        let mut rest = message.as_slice();
        let mut fds = fds;
        while !rest.is_empty() {
            match fds::send(self.socket.as_fd(), rest, fds) {
                Ok(sent) => {
                    rest = rest.get(sent..).unwrap_or_default();
                    fds = &[];
                }
                Err(source) if source.kind() == io::ErrorKind::WouldBlock => {
                    match wait_writable(self.socket.as_fd(), deadline).map_err(Cause::Io)? {
                        Waited::Ready => {}
                        Waited::TimedOut => return Err(Cause::NotReading(deadline.limit())),
                    }
                }
                Err(source) => return Err(ended(source, Position::Boundary)),
            }
        }
        self.stats.sent = self.stats.sent.saturating_add(1);
        Ok(())
    }

    fn receive(
        &mut self,
        row: &'static Row,
        sizes: (u32, u32),
        due: (u8, u8),
        deadline: &Deadline,
    ) -> Result<Answered, Cause> {
        let begin = Instant::now();
        let mut fds = Vec::new();
        let mut header = Header::new_zeroed();
        // Descriptors travel with the first byte.
        let room = match due {
            STRAYS => Room::Ignored,
            (_, 0) => Room::None,
            _ => Room::One,
        };
        self.fill(header.as_mut_bytes(), room, &mut fds, Position::Boundary, deadline)?;
        // The size is judged before anything is allocated for it.
        header.judge_reply(row.request.0, sizes.1).map_err(Cause::Malformed)?;
        let size = usize::try_from(header.size).unwrap_or(usize::MAX);
        let mut payload = vec![0; size];
        let room = if due == STRAYS { Room::Ignored } else { Room::None };
        self.fill(&mut payload, room, &mut fds, Position::Inside, deadline)?;
        self.trace(Direction::Answer, &header, &payload, fds.len(), begin.elapsed());
        if header.size < sizes.0 {
            let fault = Fault::Size { got: header.size, least: sizes.0, most: sizes.1 };
            return Err(Cause::Malformed(fault));
        }
        if !(usize::from(due.0)..=usize::from(due.1)).contains(&fds.len()) {
            return Err(Cause::Malformed(Fault::Fds { got: fds.len(), least: due.0, most: due.1 }));
        }
        self.stats.answers = self.stats.answers.saturating_add(1);
        Ok(Answered { payload, fds })
    }

    fn fill(
        &mut self,
        bytes: &mut [u8],
        room: Room,
        fds: &mut Vec<OwnedFd>,
        mut position: Position,
        deadline: &Deadline,
    ) -> Result<(), Cause> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match fds::receive(self.socket.as_fd(), rest, room, fds) {
                Ok(Received { fault: Some(fault), .. }) => return Err(Cause::Malformed(fault)),
                Ok(received) if received.bytes == 0 => return Err(position.closed()),
                Ok(received) => {
                    rest = rest.get_mut(received.bytes..).unwrap_or_default();
                    position = Position::Inside;
                    // Without this check, a message that arrives byte by byte could pass its deadline, as no
                    // read has to wait.
                    if !rest.is_empty() && deadline.remaining().is_none() {
                        return Err(Cause::Silent(deadline.limit()));
                    }
                }
                Err(source) if source.kind() == io::ErrorKind::WouldBlock => {
                    match wait_readable(self.socket.as_fd(), deadline).map_err(Cause::Io)? {
                        Waited::Ready => {}
                        Waited::TimedOut => return Err(Cause::Silent(deadline.limit())),
                    }
                }
                Err(source) => return Err(ended(source, position)),
            }
        }
        Ok(())
    }

    fn trace(&self, direction: Direction, header: &Header, payload: &[u8], fds: usize, took: Duration) {
        let fields = Fields { direction, header: *header, payload };
        describe::show(self.limits.trace(), &self.peer, &fields, fds, took);
    }
}

impl Drop for Channel {
    /// Shuts the socket down: closing is not enough while another thread polls a duplicate of the socket.
    fn drop(&mut self) {
        if !self.is_lost() {
            self.abandon();
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The position in the stream of messages at which the peer closed it.
#[derive(Clone, Copy)]
enum Position {
    Boundary,
    Inside,
}

impl Position {
    fn closed(self) -> Cause {
        match self {
            Self::Boundary => Cause::Closed,
            Self::Inside => Cause::ClosedMidMessage,
        }
    }
}

fn ended(source: io::Error, position: Position) -> Cause {
    match source.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => position.closed(),
        _ => Cause::Io(source),
    }
}
