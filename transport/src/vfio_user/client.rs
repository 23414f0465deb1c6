//! The vfio-user client: a handle on the connection that any thread may use. Holds the commands that have no
//! file of their own (DEVICE_GET_INFO, DEVICE_RESET).

use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use zerocopy::{Immutable, IntoBytes};

use super::connection::{ClientStats, Expected, Link, Receiver, Reply, Shared, Submitted, Then};
use super::message::{Command, DeviceInfoPayload, Fault, length, parse_front};
use super::version::{self, Version};
use crate::peer::deadline::Deadline;
use crate::peer::socket;
use crate::peer::{Cause, Error, Limits, Peer, Protocol, Step, close_elsewhere};

/// The most regions, and the most interrupt indexes, that a device may claim.
const COUNT_MOST: u32 = 1024;

/// How many times a command is sent whose reply turns out larger than the room that was offered.
const TRIES: usize = 3;

/// The client's side of one vfio-user connection. Clones share the connection, which ends with the last
/// clone.
///
/// Called on any thread. Each method blocks for the deadline of its [`Limits`] at most, for all its messages
/// together, unless its documentation says otherwise. Several threads may wait at once. One of the waiting
/// threads reads the socket for all of them, and serves the server's own commands meanwhile. While no thread
/// waits, the [`Receiver`] reads. Without a receiver, the socket is read only while a command waits for its
/// reply.
#[derive(Clone)]
pub struct Client {
    pub(super) shared: Arc<Shared>,
    _open: Arc<Open>,
    version: Version,
    deadline: Duration,
    until: Option<Deadline>,
}

/// Ends the connection with the last [`Client`]: receivers and pending replies also hold [`Shared`].
struct Open(Arc<Shared>);

impl Drop for Open {
    fn drop(&mut self) {
        if !self.0.is_lost() {
            self.0.end();
        }
    }
}

impl Client {
    /// Connects to the server at `path` (`@name` for an abstract socket) and negotiates version and
    /// capabilities.
    ///
    /// # Errors
    /// When the server cannot be reached, does not answer, or is not compatible.
    pub fn connect(path: &Path, limits: &Limits) -> Result<Self, Error> {
        let peer = Peer::new(Protocol::VfioUser, path.to_string_lossy());
        let deadline = Deadline::after(limits.deadline());
        let stream = socket::connect(path, &deadline, limits.admission())
            .map_err(|source| Error::new(&peer, Step::Connect, Cause::Unreachable(source)))?;
        Self::agree(stream, peer, limits)
    }

    /// As [`Client::connect`], on a socket that is already connected; `peer` names the server in errors.
    ///
    /// # Errors
    /// When the server does not answer, or is not compatible.
    pub fn from_stream(stream: UnixStream, peer: &str, limits: &Limits) -> Result<Self, Error> {
        Self::agree(stream, Peer::new(Protocol::VfioUser, peer), limits)
    }

    fn agree(stream: UnixStream, peer: Peer, limits: &Limits) -> Result<Self, Error> {
        let shared = Shared::new(stream, peer, limits)?;
        let command = Command::VERSION;
        let deadline = Deadline::after(limits.deadline());
        let expected = Expected { most: version::REPLY_MOST, fds: version::REPLY_FDS };
        let submitted = shared.submit(command, &[&version::proposal()], &[], expected, &deadline)?;
        let Reply { payload, fds } = shared.wait(&submitted, &deadline)?;
        let lost = |cause| shared.lose(shared.error(command, cause));
        let (version, twin) = version::parse_reply(&payload).map_err(lost)?;
        let twin = twin_socket(twin, fds).map_err(|fault| lost(Cause::Malformed(fault)))?;
        if let Some(twin) = twin {
            let link = Link::new(twin).map_err(|source| lost(Cause::Local(source)))?;
            // `set` cannot fail: no other thread knows this connection yet.
            let _first = shared.twin.set(link);
        }
        let _first = shared.version.set(version);
        let shared = Arc::new(shared);
        let open = Arc::new(Open(Arc::clone(&shared)));
        Ok(Self { shared, _open: open, version, deadline: limits.deadline(), until: None })
    }

    /// The same connection with one deadline for all its commands together, for operations that belong
    /// together.
    #[must_use]
    pub fn until(&self, deadline: &Deadline) -> Self {
        Self { until: Some(deadline.clone()), ..self.clone() }
    }

    /// The longest time that a method blocks.
    pub fn limit(&self) -> Duration {
        self.deadline
    }

    /// The peer's name: usually the path of its socket.
    pub fn peer(&self) -> &str {
        self.shared.peer.name()
    }

    /// The negotiated version and capabilities.
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// The counters of the connection.
    pub fn stats(&self) -> ClientStats {
        self.shared.stats()
    }

    /// True when the connection has ended: nothing will be sent any more.
    pub fn is_lost(&self) -> bool {
        self.shared.is_lost()
    }

    /// The receiving half, which reads while no thread waits, for a thread that polls. Only one may exist at
    /// a time.
    ///
    /// # Errors
    /// When a receiver exists already, or no descriptor is available.
    pub fn receiver(&self) -> Result<Receiver, Error> {
        Receiver::new(&self.shared)
    }

    /// A descriptor that reports a hang-up when either side ends the connection. Poll it for hang-ups only:
    /// it is readable whenever a message arrives.
    ///
    /// # Errors
    /// When no descriptor is available.
    pub fn hang_up(&self) -> Result<OwnedFd, Error> {
        let socket = self.shared.main.socket.try_clone();
        socket
            .map(OwnedFd::from)
            .map_err(|source| Error::new(&self.shared.peer, Step::Idle, Cause::Local(source)))
    }

    /// Ends the connection for all clones. Waiting threads get an error at once.
    pub fn shut_down(&self) {
        self.shared.end();
    }

    /// Reads the description of the device.
    ///
    /// # Errors
    /// When the server refuses, fails, or claims more than 1024 regions or interrupt indexes.
    pub fn device_info(&self) -> Result<DeviceInfo, Error> {
        let command = Command::DEVICE_GET_INFO;
        let due = length(size_of::<DeviceInfoPayload>());
        let payload = DeviceInfoPayload { argsz: due, flags: 0, regions: 0, irqs: 0 };
        let reply = self.ask(command, &[payload.as_bytes()], &[], Expected::bytes(4096))?;
        parse_device_info(&reply.payload).map_err(|fault| self.malformed(command, fault))
    }

    /// Resets the device. DMA maps and interrupts stay.
    ///
    /// # Errors
    /// When the server refuses or fails.
    pub fn reset(&self) -> Result<(), Error> {
        self.ask(Command::DEVICE_RESET, &[], &[], Expected::bytes(0)).map(drop)
    }

    pub(super) fn deadline(&self) -> Deadline {
        self.until.clone().unwrap_or_else(|| Deadline::after(self.deadline))
    }

    pub(super) fn error(&self, command: Command, cause: Cause) -> Error {
        self.shared.error(command, cause)
    }

    pub(super) fn malformed(&self, command: Command, fault: Fault) -> Error {
        self.shared.malformed(command, fault)
    }

    /// Fails with [`Cause::NotNegotiated`] when [`Version::is_extended`] is false: an unknown command would
    /// put such a server out of step.
    pub(super) fn needs_extended(&self, command: Command) -> Result<(), Error> {
        if self.version.is_extended() { Ok(()) } else { Err(self.error(command, Cause::NotNegotiated)) }
    }

    /// Sends a command and waits for its reply.
    pub(super) fn ask(
        &self,
        command: Command,
        payload: &[&[u8]],
        fds: &[BorrowedFd<'_>],
        expected: Expected,
    ) -> Result<Reply, Error> {
        self.ask_until(command, payload, fds, expected, &self.deadline())
    }

    /// As [`Client::ask`], with a deadline that several commands share.
    pub(super) fn ask_until(
        &self,
        command: Command,
        payload: &[&[u8]],
        fds: &[BorrowedFd<'_>],
        expected: Expected,
        deadline: &Deadline,
    ) -> Result<Reply, Error> {
        let submitted = self.shared.submit(command, payload, fds, expected, deadline)?;
        self.shared.wait(&submitted, deadline)
    }

    /// Sends the command with room for `first` bytes of reply, and again with more room, up to `most` bytes,
    /// while `needed` finds that the reply needs more.
    pub(super) fn ask_growing<T: IntoBytes + Immutable>(
        &self,
        command: Command,
        (first, most): (u32, u32),
        payload: impl Fn(u32) -> T,
        needed: impl Fn(&[u8]) -> Result<u32, Fault>,
    ) -> Result<Reply, Error> {
        let deadline = self.deadline();
        let mut argsz = first;
        for _ in 0..TRIES {
            let expected = Expected { most, fds: self.version().ours.fds() };
            let reply = self.ask_until(command, &[payload(argsz).as_bytes()], &[], expected, &deadline)?;
            let needed = needed(&reply.payload).map_err(|fault| self.malformed(command, fault))?;
            if needed <= argsz || needed <= length(reply.payload.len()) {
                return Ok(reply);
            }
            if needed > most {
                return Err(
                    self.malformed(command, Fault::Value { field: "argsz", value: u64::from(needed) })
                );
            }
            argsz = needed;
        }
        Err(self.malformed(command, Fault::Text("a size that grows with each answer")))
    }

    /// Sends a command whose reply is passed to `then`, even when the socket has no room. A caller that may
    /// not wait for room must keep only one such command in flight.
    pub(super) fn begin_then(
        &self,
        command: Command,
        payload: &[&[u8]],
        expected: Expected,
        then: Then,
    ) -> Result<(), Error> {
        self.shared.submit_now(command, payload, &[], expected, Some(then)).map(drop)
    }

    /// Sends a command whose reply [`Ticket::wait`] waits for.
    pub(super) fn begin(
        &self,
        command: Command,
        payload: &[&[u8]],
        fds: &[BorrowedFd<'_>],
        expected: Expected,
        deadline: Deadline,
    ) -> Result<Ticket, Error> {
        let submitted = self.shared.submit(command, payload, fds, expected, &deadline)?;
        Ok(Ticket { shared: Arc::clone(&self.shared), submitted: Some(submitted), deadline })
    }
}

/// Finds the twin socket among the fds of a VERSION reply. An fd that was not announced, or an announcement
/// without an fd, is a fault: the server's commands would never be read.
fn twin_socket(index: Option<usize>, mut fds: Vec<OwnedFd>) -> Result<Option<UnixStream>, Fault> {
    let got = fds.len();
    let Some(index) = index else {
        return if got == 0 { Ok(None) } else { Err(Fault::Fds { got, least: 0, most: 0 }) };
    };
    if index >= got {
        let value = u64::try_from(index).unwrap_or(u64::MAX);
        return Err(Fault::Value { field: "twin_socket fd_index", value });
    }
    let socket = fds.swap_remove(index);
    let is_stream = rustix::net::sockopt::socket_type(&socket) == Ok(rustix::net::SocketType::STREAM);
    let is_unix = rustix::net::sockopt::socket_domain(&socket) == Ok(rustix::net::AddressFamily::UNIX);
    if is_stream && is_unix {
        Ok(Some(UnixStream::from(socket)))
    } else {
        // Closing a socket of another address family may block (SO_LINGER), so another thread closes it.
        if rustix::net::sockopt::socket_type(&socket).is_ok() {
            close_elsewhere(socket);
        }
        Err(Fault::Text("a twin socket that is none"))
    }
}

/// The device's description from DEVICE_GET_INFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Bit 0: the device can be reset; bit 1: it is a PCI device.
    pub flags: u32,
    /// The number of regions.
    pub regions: u32,
    /// The number of interrupt indexes.
    pub irqs: u32,
}

impl DeviceInfo {
    /// True when DEVICE_RESET may be sent.
    pub fn can_reset(&self) -> bool {
        self.flags & 1 != 0
    }

    /// True for a PCI device.
    pub fn is_pci(&self) -> bool {
        self.flags & 2 != 0
    }
}

/// Reads the payload of a DEVICE_GET_INFO reply. Pure, so that it can be fuzzed.
pub fn parse_device_info(payload: &[u8]) -> Result<DeviceInfo, Fault> {
    let (info, _) = parse_front::<DeviceInfoPayload>(payload)?;
    for (field, value) in [("region count", info.regions), ("interrupt index count", info.irqs)] {
        if value > COUNT_MOST {
            return Err(Fault::Value { field, value: u64::from(value) });
        }
    }
    Ok(DeviceInfo { flags: info.flags, regions: info.regions, irqs: info.irqs })
}

/// A command that was sent and not yet answered. When it is dropped, its reply is discarded on arrival.
#[must_use]
pub(super) struct Ticket {
    shared: Arc<Shared>,
    submitted: Option<Submitted>,
    deadline: Deadline,
}

impl Ticket {
    /// Waits for the reply, until the deadline that began when the command was sent.
    pub(super) fn wait(mut self) -> Result<Reply, Error> {
        match self.submitted.take() {
            Some(submitted) => self.shared.wait(&submitted, &self.deadline),
            None => {
                Err(Error::new(&self.shared.peer, Step::Idle, Cause::Invalid("it was waited for already")))
            }
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(submitted) = &self.submitted {
            self.shared.abandon(submitted.id);
        }
    }
}
