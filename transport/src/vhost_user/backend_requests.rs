//! vhost-user "Backend message types": requests of the backend on the channel given by SET_BACKEND_REQ_FD.
//!
//! Served by whoever polls the channel, never blocking on it: a message that is not whole yet is kept for the
//! next time. Must be served while a request on the main connection waits (libvhost-user waits for our answer in
//! the middle of its own), so it shares nothing with the main connection.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::describe::{self, Fields};
use super::features::ProtocolFeatures;
use super::message::{Fault, HEADER_SIZE, Header, Iotlb, ShmemArea, Uuid, VringArea, VringState, parse};
use super::request::BackendRequest;
use crate::memory::PAGE;
use crate::peer::fds::file_size;
use crate::peer::fds::{self, Received, Room};
use crate::peer::{Cause, Error, Step};
use crate::peer::{Direction, Peer, Trace};

/// The largest payload that is read; the largest that any request has is 40.
const PAYLOAD_MOST: u32 = 1024;

/// Requests served in one go, so that a flood on one channel does not starve the others.
const BATCH: usize = 64;

/// A well-formed request, decoded. What its numbers mean for the machine is judged by who handles it.
#[derive(Debug)]
pub enum BackendMessage {
    /// An IOTLB miss, or an access that failed.
    Iotlb(Iotlb),
    /// The configuration space changed.
    ConfigChanged,
    /// A page to place over a ring's notify address; `None` takes it away.
    HostNotifier(u8, Option<NotifierArea>),
    /// The backend used buffers of this ring (in-band call).
    VringCall(u32),
    /// The backend found this ring in error.
    VringError(u32),
    /// An object is offered to other devices.
    SharedObjectAdd(Uuid),
    /// It is withdrawn.
    SharedObjectRemove(Uuid),
    /// The fd of another device's object is wanted.
    SharedObjectLookup(Uuid),
    /// A file is to be mapped into a shared memory region.
    ShmemMap(ShmemArea, OwnedFd),
    /// A part of a shared memory region is to be unmapped.
    ShmemUnmap(ShmemArea),
}

/// Where a host notifier lies in its file.
#[derive(Debug)]
pub struct NotifierArea {
    /// The file.
    pub fd: OwnedFd,
    /// Bytes.
    pub size: u64,
    /// First byte in the file.
    pub offset: u64,
}

impl NotifierArea {
    /// Judges the area: one whole page, on a page, and inside its file where that has an end.
    pub fn check(&self) -> Result<(), Refused> {
        let end = self.offset.checked_add(self.size).ok_or(Refused)?;
        let held = file_size(&self.fd);
        // A device file, which this usually is, has no size.
        let inside = held == 0 || end <= held;
        if self.size == PAGE && self.offset.is_multiple_of(PAGE) && inside { Ok(()) } else { Err(Refused) }
    }
}

/// Decodes a request. Pure: for fuzzing and for tracing, too.
pub fn parse_request(
    request: BackendRequest,
    payload: &[u8],
    fds: Vec<OwnedFd>,
) -> Result<BackendMessage, Fault> {
    let count = fds.len();
    let mut fds = fds.into_iter();
    let wrong = |least, most| Fault::Fds { got: count, least, most };
    let message = match request {
        BackendRequest::IOTLB_MSG => BackendMessage::Iotlb(parse(payload)?),
        BackendRequest::CONFIG_CHANGE_MSG => {
            parse::<[u8; 0]>(payload)?;
            BackendMessage::ConfigChanged
        }
        BackendRequest::VRING_HOST_NOTIFIER_MSG => {
            let area: VringArea = parse(payload)?;
            let queue = u8::try_from(area.index & 0xff).unwrap_or_default();
            if area.index & !0x1ff != 0 {
                return Err(Fault::Value { field: "ring", value: area.index });
            }
            let place = if area.index & 0x100 == 0 {
                let fd = fds.next().ok_or(wrong(1, 1))?;
                Some(NotifierArea { fd, size: area.size, offset: area.offset })
            } else {
                None
            };
            BackendMessage::HostNotifier(queue, place)
        }
        BackendRequest::VRING_CALL => BackendMessage::VringCall(parse::<VringState>(payload)?.index),
        BackendRequest::VRING_ERR => BackendMessage::VringError(parse::<VringState>(payload)?.index),
        BackendRequest::SHARED_OBJECT_ADD => BackendMessage::SharedObjectAdd(parse(payload)?),
        BackendRequest::SHARED_OBJECT_REMOVE => BackendMessage::SharedObjectRemove(parse(payload)?),
        BackendRequest::SHARED_OBJECT_LOOKUP => BackendMessage::SharedObjectLookup(parse(payload)?),
        BackendRequest::SHMEM_MAP => {
            let area = parse(payload)?;
            BackendMessage::ShmemMap(area, fds.next().ok_or(wrong(1, 1))?)
        }
        BackendRequest::SHMEM_UNMAP => BackendMessage::ShmemUnmap(parse(payload)?),
        BackendRequest(unknown) => return Err(Fault::Request(unknown)),
    };
    if fds.next().is_some() {
        return Err(wrong(0, 1));
    }
    Ok(message)
}

/// The handler does not do what the backend asked; the backend is told so and goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request was refused")]
pub struct Refused;

/// What a machine does for a backend. Called on the thread that serves the channel; must not block, and must not
/// take a lock that is held across an exchange with a peer.
///
/// Everything but a configuration change is refused unless a device implements it.
pub trait BackendRequests {
    /// The configuration space changed: it should be read anew, later, on another thread.
    fn config_changed(&self);

    /// Places (or removes) a host notifier page of a ring.
    fn host_notifier(&self, _ring: u8, _area: Option<NotifierArea>) -> Result<(), Refused> {
        Err(Refused)
    }

    /// The backend misses a translation, or failed to access one.
    fn iotlb(&self, _message: Iotlb) -> Result<(), Refused> {
        Err(Refused)
    }

    /// In-band call of a ring.
    fn vring_call(&self, _ring: u32) -> Result<(), Refused> {
        Err(Refused)
    }

    /// A ring is in error.
    fn vring_error(&self, _ring: u32) -> Result<(), Refused> {
        Err(Refused)
    }

    /// An object is offered to other devices.
    fn shared_object_add(&self, _uuid: Uuid) -> Result<(), Refused> {
        Err(Refused)
    }

    /// An object is withdrawn.
    fn shared_object_remove(&self, _uuid: Uuid) -> Result<(), Refused> {
        Err(Refused)
    }

    /// The fd of an object of another device.
    fn shared_object_lookup(&self, _uuid: Uuid) -> Result<OwnedFd, Refused> {
        Err(Refused)
    }

    /// Whether the fd of an object is only to be had later: then the channel waits, served no further, for
    /// [`BackendChannel::answer_lookup`], and [`BackendRequests::shared_object_lookup`] is not called.
    fn defers_lookup(&self, _uuid: Uuid) -> bool {
        false
    }

    /// Maps a file into a shared memory region of the device.
    fn shmem_map(&self, _area: ShmemArea, _fd: OwnedFd) -> Result<(), Refused> {
        Err(Refused)
    }

    /// Unmaps a part of a shared memory region.
    fn shmem_unmap(&self, _area: ShmemArea) -> Result<(), Refused> {
        Err(Refused)
    }
}

/// What one call of [`BackendChannel::serve`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// So many requests; more may be waiting when it is a whole batch.
    Requests(usize),
    /// The backend waits for the fd of an object: poll the channel again after
    /// [`BackendChannel::answer_lookup`].
    Deferred,
    /// The backend closed the channel: stop polling it.
    HungUp,
}

/// The socket of a backend's own channel, shared with the main connection, which ends it.
pub(super) struct ChannelSocket {
    socket: UnixStream,
    /// Held while a request is acted upon: when [`ChannelSocket::end`] returns, the backend acts no more.
    has_ended: Mutex<bool>,
}

impl ChannelSocket {
    /// Takes all power from the backend that has the other end: requests that wait in the socket are not served either.
    /// Whoever polls the channel sees only what the backend does with its end; see [`BackendChannel::has_ended`].
    pub(super) fn end(&self) {
        *self.ended() = true;
        if let Err(source) = self.socket.shutdown(Shutdown::Write) {
            log::debug!("shutting a backend's channel down: {source}");
        }
    }

    fn ended(&self) -> MutexGuard<'_, bool> {
        self.has_ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Our end of the backend's own channel. It ends with the main connection, whoever ends that.
pub struct BackendChannel {
    shared: Arc<ChannelSocket>,
    peer: Peer,
    negotiated: ProtocolFeatures,
    trace: Option<Arc<dyn Trace>>,
    partial: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// The message came with descriptors that it does not have.
    strays: Option<Fault>,
    /// The log knows that its requests are malformed.
    fault_logged: bool,
}

impl BackendChannel {
    pub(crate) fn new(
        socket: UnixStream,
        peer: Peer,
        negotiated: ProtocolFeatures,
        trace: Option<Arc<dyn Trace>>,
    ) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let (partial, fds) = (Vec::new(), Vec::new());
        let shared = Arc::new(ChannelSocket { socket, has_ended: Mutex::new(false) });
        Ok(Self { shared, peer, negotiated, trace, partial, fds, strays: None, fault_logged: false })
    }

    pub(super) fn shared(&self) -> &Arc<ChannelSocket> {
        &self.shared
    }

    /// True when the main connection has ended: the channel is not served any more and can be closed.
    pub fn has_ended(&self) -> bool {
        *self.shared.ended()
    }

    /// The peer's name.
    pub fn peer(&self) -> &str {
        self.peer.name()
    }

    /// Handles what can be read now, a batch at most, without ever blocking.
    ///
    /// A request that is unknown, not negotiated or malformed inside is refused and the channel goes on; a broken
    /// frame, or a backend that does not take our answers, ends it with an error.
    pub fn serve(&mut self, handler: &dyn BackendRequests) -> Result<Served, Error> {
        if self.has_ended() {
            return Ok(Served::HungUp);
        }
        for served in 0..BATCH {
            match self.read_message() {
                Ok(Read::Message(header, payload)) => {
                    let request = BackendRequest(header.request);
                    let shared = Arc::clone(&self.shared);
                    let ended = shared.ended();
                    if *ended {
                        return Ok(Served::HungUp);
                    }
                    let handled = self.handle(request, &header, &payload, handler);
                    drop(ended);
                    match handled {
                        Ok(Handled::Answered) => {}
                        Ok(Handled::Deferred) => return Ok(Served::Deferred),
                        Err(cause) => return Err(self.lose(request, cause)),
                    }
                }
                Ok(Read::Nothing) => return Ok(Served::Requests(served)),
                Ok(Read::HungUp) => return Ok(Served::HungUp),
                Err((request, cause)) => return Err(self.lose(request, cause)),
            }
        }
        Ok(Served::Requests(BATCH))
    }

    /// Answers the lookup that was [deferred](Served::Deferred).
    pub fn answer_lookup(&mut self, found: Result<OwnedFd, Refused>) -> Result<(), Error> {
        let request = BackendRequest::SHARED_OBJECT_LOOKUP;
        self.answer(request, found.map(Some)).map_err(|cause| self.lose(request, cause))
    }

    fn read_message(&mut self) -> Result<Read, (BackendRequest, Cause)> {
        loop {
            let request = self.named();
            let due = match Header::read_from_prefix(&self.partial) {
                Err(_) => HEADER_SIZE,
                Ok((header, payload)) => {
                    header.judge_request(PAYLOAD_MOST).map_err(|fault| (request, Cause::Malformed(fault)))?;
                    let size = usize::try_from(header.size).unwrap_or(usize::MAX);
                    if payload.len() == size {
                        let payload = payload.to_vec();
                        self.partial.clear();
                        return Ok(Read::Message(header, payload));
                    }
                    HEADER_SIZE.saturating_add(size)
                }
            };
            let room = if self.partial.is_empty() { self.room() } else { Room::None };
            // Never reads into the next message: its fds would be taken for this one's.
            let have = self.partial.len();
            self.partial.resize(due, 0);
            let rest = self.partial.get_mut(have..).unwrap_or_default();
            let outcome = fds::receive(self.shared.socket.as_fd(), rest, room, &mut self.fds);
            let got = outcome.as_ref().map_or(0, |received| received.bytes);
            self.partial.truncate(have.saturating_add(got));
            let request = self.named();
            match outcome {
                Ok(Received { fault: Some(fault @ (Fault::StrayFds | Fault::Fds { .. })), .. }) => {
                    self.strays = Some(fault);
                }
                Ok(Received { fault: Some(fault), .. }) => return Err((request, Cause::Malformed(fault))),
                Ok(received) if received.bytes == 0 && have == 0 => return Ok(Read::HungUp),
                Ok(received) if received.bytes == 0 => return Err((request, Cause::ClosedMidMessage)),
                Ok(_) => {}
                Err(source) if source.kind() == io::ErrorKind::WouldBlock => return Ok(Read::Nothing),
                Err(source) if source.kind() == io::ErrorKind::ConnectionReset => return Ok(Read::HungUp),
                Err(source) => return Err((request, Cause::Io(source))),
            }
        }
    }

    /// Room for the descriptor of the request that comes next, if that is one that has a descriptor. Descriptors travel with
    /// the first byte, so the header is looked at before it is read.
    fn room(&self) -> Room {
        let carry = [ProtocolFeatures::HOST_NOTIFIER, ProtocolFeatures::SHMEM];
        if !carry.into_iter().any(|feature| self.negotiated.contains(feature)) {
            return Room::None;
        }
        let mut header = Header::new_zeroed();
        match fds::peek(self.shared.socket.as_fd(), header.as_mut_bytes()) {
            Ok(HEADER_SIZE) if !BackendRequest(header.request).carries_fd() => Room::None,
            // A header that comes in pieces: it may be one of them.
            _ => Room::One,
        }
    }

    /// The request that is being read, as far as it says so yet.
    fn named(&self) -> BackendRequest {
        BackendRequest(self.partial.first_chunk::<4>().map_or(0, |bytes| u32::from_ne_bytes(*bytes)))
    }

    fn handle(
        &mut self,
        request: BackendRequest,
        header: &Header,
        payload: &[u8],
        handler: &dyn BackendRequests,
    ) -> Result<Handled, Cause> {
        let fds = std::mem::take(&mut self.fds);
        self.trace(Direction::PeerRequest, header, payload, fds.len());
        let negotiated = request.needs().is_some_and(|needs| self.negotiated.contains(needs));
        let strays = self.strays.take();
        let outcome = if negotiated {
            match strays.map_or_else(|| parse_request(request, payload, fds), Err) {
                Ok(BackendMessage::SharedObjectLookup(uuid)) if handler.defers_lookup(uuid) => {
                    return Ok(Handled::Deferred);
                }
                Ok(message) => dispatch(message, handler),
                Err(fault) => {
                    // As many as it likes.
                    if !std::mem::replace(&mut self.fault_logged, true) {
                        log::warn!("{} sent {request} {fault} (logged once)", self.peer);
                    }
                    Err(Refused)
                }
            }
        } else {
            log::debug!("{} sent {request}, which was not negotiated", self.peer);
            Err(Refused)
        };
        if header.wants_reply() || request == BackendRequest::SHARED_OBJECT_LOOKUP {
            self.answer(request, outcome)?;
        }
        Ok(Handled::Answered)
    }

    fn answer(
        &mut self,
        request: BackendRequest,
        outcome: Result<Option<OwnedFd>, Refused>,
    ) -> Result<(), Cause> {
        let code = u64::from(outcome.is_err());
        let fd = outcome.ok().flatten();
        let fds: Vec<BorrowedFd<'_>> = fd.iter().map(AsFd::as_fd).collect();
        let header = Header::reply(request.0, 8);
        let payload = code.to_ne_bytes();
        let message = [header.as_bytes(), &payload].concat();
        self.trace(Direction::OurAnswer, &header, &payload, fds.len());
        match fds::send(self.shared.socket.as_fd(), &message, &fds) {
            Ok(sent) if sent == message.len() => Ok(()),
            // Its socket buffer is full of answers that it never read.
            Ok(_) => Err(Cause::NotReading(Duration::ZERO)),
            Err(source) if source.kind() == io::ErrorKind::WouldBlock => {
                Err(Cause::NotReading(Duration::ZERO))
            }
            Err(source) if source.kind() == io::ErrorKind::BrokenPipe => Err(Cause::Closed),
            Err(source) => Err(Cause::Io(source)),
        }
    }

    fn lose(&mut self, request: BackendRequest, cause: Cause) -> Error {
        self.fds.clear();
        self.partial.clear();
        self.shared.end();
        Error::new(&self.peer, Step::PeerRequest(request.into()), cause)
    }

    fn trace(&self, direction: Direction, header: &Header, payload: &[u8], fds: usize) {
        let fields = Fields { direction, header: *header, payload };
        describe::show(self.trace.as_ref(), &self.peer, &fields, fds, Duration::ZERO);
    }
}

impl AsFd for BackendChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.socket.as_fd()
    }
}

enum Handled {
    Answered,
    Deferred,
}

enum Read {
    Message(Header, Vec<u8>),
    Nothing,
    HungUp,
}

fn dispatch(message: BackendMessage, handler: &dyn BackendRequests) -> Result<Option<OwnedFd>, Refused> {
    match message {
        BackendMessage::ConfigChanged => {
            handler.config_changed();
            Ok(())
        }
        BackendMessage::Iotlb(iotlb) => handler.iotlb(iotlb),
        BackendMessage::HostNotifier(ring, area) => handler.host_notifier(ring, area),
        BackendMessage::VringCall(ring) => handler.vring_call(ring),
        BackendMessage::VringError(ring) => handler.vring_error(ring),
        BackendMessage::SharedObjectAdd(uuid) => handler.shared_object_add(uuid),
        BackendMessage::SharedObjectRemove(uuid) => handler.shared_object_remove(uuid),
        BackendMessage::SharedObjectLookup(uuid) => return handler.shared_object_lookup(uuid).map(Some),
        BackendMessage::ShmemMap(area, fd) => handler.shmem_map(area, fd),
        BackendMessage::ShmemUnmap(area) => handler.shmem_unmap(area),
    }
    .map(|()| None)
}
