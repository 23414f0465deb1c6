//! vhost-user "Backend message types": requests of the backend on the channel given by SET_BACKEND_REQ_FD.
//!
//! The thread that polls the channel serves it and never blocks on it: an incomplete message is kept for the
//! next call. The channel must be served even while a request on the main connection waits, as libvhost-user
//! waits for our answer before it answers that request. Therefore the channel shares nothing with exchanges
//! on the main connection.

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

/// The largest payload that is read. The largest payload of any request has 40 bytes.
const PAYLOAD_MOST: u32 = 1024;

/// The most requests served in one call, so that a flood on one channel does not starve the others.
const BATCH: usize = 64;

/// A well-formed request, decoded. Its handler judges what the numbers mean for the machine.
#[derive(Debug)]
pub enum BackendMessage {
    /// An IOTLB miss, or a failed access.
    Iotlb(Iotlb),
    /// The configuration space changed.
    ConfigChanged,
    /// A page to place over a ring's notify address; `None` removes it.
    HostNotifier(u8, Option<NotifierArea>),
    /// The backend used buffers of this ring (in-band call).
    VringCall(u32),
    /// The backend found an error in this ring.
    VringError(u32),
    /// An object is offered to other devices.
    SharedObjectAdd(Uuid),
    /// The object is withdrawn.
    SharedObjectRemove(Uuid),
    /// The backend asks for the fd of another device's object.
    SharedObjectLookup(Uuid),
    /// The backend asks to map a file into a shared memory region.
    ShmemMap(ShmemArea, OwnedFd),
    /// The backend asks to unmap a part of a shared memory region.
    ShmemUnmap(ShmemArea),
}

/// The place of a host notifier page in its file.
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
    /// Checks that the area is one whole, aligned page, and that it lies inside its file if the file has a
    /// size.
    pub fn check(&self) -> Result<(), Refused> {
        let end = self.offset.checked_add(self.size).ok_or(Refused)?;
        let held = file_size(&self.fd);
        // A device file has no size. Host notifiers usually are device files.
        let inside = held == 0 || end <= held;
        if self.size == PAGE && self.offset.is_multiple_of(PAGE) && inside { Ok(()) } else { Err(Refused) }
    }
}

/// Decodes a request. Pure, so that it can be fuzzed and traced.
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

/// The handler does not do what the backend asked. The backend gets a refusal, and the channel goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request was refused")]
pub struct Refused;

/// The handler of a backend's requests. Called on the thread that serves the channel. Must not block, and
/// must not take a lock that is held across an exchange with a peer.
///
/// By default every request but a configuration change is refused.
pub trait BackendRequests {
    /// The configuration space changed. The handler should have it read again later, on another thread.
    fn config_changed(&self);

    /// Places (or, without an area, removes) a host notifier page of a ring.
    fn host_notifier(&self, _ring: u8, _area: Option<NotifierArea>) -> Result<(), Refused> {
        Err(Refused)
    }

    /// The backend misses a translation, or failed to access an address.
    fn iotlb(&self, _message: Iotlb) -> Result<(), Refused> {
        Err(Refused)
    }

    /// The backend used buffers of a ring (in-band call).
    fn vring_call(&self, _ring: u32) -> Result<(), Refused> {
        Err(Refused)
    }

    /// The backend found an error in a ring.
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

    /// Returns the fd of another device's object.
    fn shared_object_lookup(&self, _uuid: Uuid) -> Result<OwnedFd, Refused> {
        Err(Refused)
    }

    /// True when the fd of an object is only available later. The channel is then not served until
    /// [`BackendChannel::answer_lookup`] is called, and [`BackendRequests::shared_object_lookup`] is not
    /// called.
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

/// The outcome of one call of [`BackendChannel::serve`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// The number of requests served. More may wait when the number is a whole batch.
    Requests(usize),
    /// The backend waits for the fd of an object: poll the channel again after
    /// [`BackendChannel::answer_lookup`].
    Deferred,
    /// The backend closed the channel: stop polling it.
    HungUp,
}

/// The socket of a backend's own channel. The main connection shares it, and ends it when it ends itself.
pub(super) struct ChannelSocket {
    socket: UnixStream,
    /// Locked while a request is served, so no request is served any more once [`ChannelSocket::end`] has
    /// returned.
    has_ended: Mutex<bool>,
}

impl ChannelSocket {
    /// Ends the channel: no further request is served, not even one that has arrived already. A thread that
    /// polls the channel sees no event from this, only what the backend does with its end; see
    /// [`BackendChannel::has_ended`].
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

/// Our end of the backend's own channel. It ends with the main connection, whichever side ends that.
pub struct BackendChannel {
    shared: Arc<ChannelSocket>,
    peer: Peer,
    negotiated: ProtocolFeatures,
    trace: Option<Arc<dyn Trace>>,
    partial: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// The fault of a message that came with descriptors it must not have.
    strays: Option<Fault>,
    /// Malformed requests of this backend were logged already.
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

    /// True when the main connection has ended. The channel is not served any more and can be closed.
    pub fn has_ended(&self) -> bool {
        *self.shared.ended()
    }

    /// The peer's name.
    pub fn peer(&self) -> &str {
        self.peer.name()
    }

    /// Serves the requests that have arrived, one batch at most, without ever blocking.
    ///
    /// A request that is unknown, not negotiated or malformed is refused, and the channel goes on. A broken
    /// frame, or a backend that does not read our answers, ends the channel with an error.
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
            // Never reads into the next message, as that message's fds would be assigned to this one.
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

    /// The room for descriptors of the next request: one if that request carries one. Descriptors travel with
    /// the first byte, so the header is peeked at before it is read.
    fn room(&self) -> Room {
        let carry = [ProtocolFeatures::HOST_NOTIFIER, ProtocolFeatures::SHMEM];
        if !carry.into_iter().any(|feature| self.negotiated.contains(feature)) {
            return Room::None;
        }
        let mut header = Header::new_zeroed();
        match fds::peek(self.shared.socket.as_fd(), header.as_mut_bytes()) {
            Ok(HEADER_SIZE) if !BackendRequest(header.request).carries_fd() => Room::None,
            // The header arrived in pieces, so it may be that of a request with a descriptor.
            _ => Room::One,
        }
    }

    /// The code of the request that is being read, as far as it has arrived.
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
                    // Logged once only: the backend can send any number of malformed requests.
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
            // The backend's socket buffer is full of answers that the backend never read.
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
