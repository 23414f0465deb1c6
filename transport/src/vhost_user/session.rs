//! The typestate of a back-end: `Connection → Session → LiveSession`, each step consuming the last.
//!
//! Order of messages, as every known back-end takes it: GET_FEATURES, GET/SET_PROTOCOL_FEATURES, SET_OWNER,
//! \[GET_QUEUE_NUM\], \[SET_BACKEND_REQ_FD\], then to go live \[SET_STATUS\], SET_FEATURES, SET_MEM_TABLE, for each
//! ring NUM, ADDR, BASE, \[ERR\], CALL, KICK, ENABLE, \[SET_STATUS 0xf\], one round trip, and one kick a ring.
//!
//! Must never send what was not negotiated, nor GET_VRING_BASE to a ring that was not started.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::backend_req::BackendChannel;
use super::channel::{Channel, Limits, Stats};
use super::config::{self, WriteKind};
use super::error::{Cause, Error, Step};
use super::features::{DeviceFeatures, DriverFeatures, ProtocolFeatures, Wanted, bit};
use super::message::{Fault, MemRegion, MemTableHead, VringAddr, VringState};
use super::request::Request;
use super::vring::{Ring, RingBase, parse_base};
use crate::deadline::Deadline;
use crate::memory_map::{MemoryMap, UserAddr};
use crate::socket;

/// Regions that every back-end takes.
const REGIONS_MAX: usize = 8;

/// Virtio device status bits (virtio 1.2 §2.1) as SET_STATUS carries them.
mod status {
    pub(super) const ACKNOWLEDGE_AND_DRIVER: u64 = 0x3;
    pub(super) const FEATURES_OK: u64 = 0xb;
    pub(super) const DRIVER_OK: u64 = 0xf;
}

/// A connected back-end that nothing is known of yet.
pub struct Connection {
    channel: Channel,
}

impl Connection {
    /// Connects to the back-end that listens on `path` (`@name` for an abstract socket).
    ///
    /// Blocks for the deadline of `limits` at most.
    pub fn connect(path: &Path, limits: &Limits) -> Result<Self, Error> {
        let peer = path.to_string_lossy().into_owned();
        let deadline = Deadline::after(limits.deadline());
        match socket::connect(path, &deadline) {
            Ok(stream) => Self::from_stream(stream, peer, limits),
            Err(source) => Err(Error::new(&Arc::from(peer), Step::Connect, Cause::Unreachable(source))),
        }
    }

    /// Speaks over `stream`; `peer` is what error messages call the other side.
    pub fn from_stream(
        stream: UnixStream,
        peer: impl Into<Arc<str>>,
        limits: &Limits,
    ) -> Result<Self, Error> {
        Channel::new(stream, peer.into(), limits).map(|channel| Self { channel })
    }

    /// Learns what the back-end offers and agrees on protocol features.
    ///
    /// Blocks for one deadline at most. Sends nothing that is not negotiated.
    pub fn negotiate(mut self, wanted: &Wanted) -> Result<Session, Error> {
        let channel = &mut self.channel;
        let deadline = channel.deadline();
        let offered = channel.ask_u64(Request::GET_FEATURES, &deadline)?;
        let mut protocol_offered = ProtocolFeatures::NONE;
        if DeviceFeatures::from_bits(offered).has(bit::PROTOCOL_FEATURES) && wanted.speaks_protocol_features()
        {
            channel.set_protocol_offered();
            let bits = channel.ask_u64(Request::GET_PROTOCOL_FEATURES, &deadline)?;
            protocol_offered = ProtocolFeatures::from_bits(bits);
            let agreed = ProtocolFeatures::negotiate(wanted.protocol(), protocol_offered);
            // REPLY_ACK begins with the next message.
            channel.exchange(Request::SET_PROTOCOL_FEATURES, &agreed.bits().to_ne_bytes(), &[], &deadline)?;
            channel.set_negotiated(agreed);
        }
        channel.exchange(Request::SET_OWNER, &[], &[], &deadline)?;
        let queue_num = match channel.negotiated().contains(ProtocolFeatures::MQ) {
            true => Some(queue_num(channel, &deadline)?),
            false => None,
        };
        let backend = match channel.negotiated().contains(ProtocolFeatures::BACKEND_REQ) {
            true => Some(open_backend_channel(channel, &deadline)?),
            false => None,
        };
        Ok(Session { channel: self.channel, wanted: *wanted, offered, protocol_offered, queue_num, backend })
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

fn queue_num(channel: &mut Channel, deadline: &Deadline) -> Result<u16, Error> {
    let value = channel.ask_u64(Request::GET_QUEUE_NUM, deadline)?;
    match u16::try_from(value) {
        Ok(count) if count > 0 => Ok(count),
        _ => Err(channel.malformed(Request::GET_QUEUE_NUM, Fault::Value { field: "queue count", value })),
    }
}

fn open_backend_channel(channel: &mut Channel, deadline: &Deadline) -> Result<BackendChannel, Error> {
    const REQUEST: Request = Request::SET_BACKEND_REQ_FD;
    let local = |source| Cause::Io(source);
    let (ours, theirs) = UnixStream::pair().map_err(|source| channel.error(REQUEST, local(source)))?;
    let (peer, trace) = (Arc::clone(channel.peer()), channel.limits().trace());
    let backend = BackendChannel::new(ours, peer, channel.negotiated(), trace)
        .map_err(|source| channel.error(REQUEST, local(source)))?;
    channel.exchange(REQUEST, &[], &[theirs.as_fd()], deadline)?;
    Ok(backend)
}

/// A back-end whose offer is known and that has no rings.
pub struct Session {
    channel: Channel,
    wanted: Wanted,
    offered: u64,
    protocol_offered: ProtocolFeatures,
    queue_num: Option<u16>,
    backend: Option<BackendChannel>,
}

impl Session {
    /// Device features that the guest may see: what the back-end offers, less what is masked.
    pub fn offered(&self) -> DeviceFeatures {
        self.wanted.visible(self.offered)
    }

    /// Everything that the back-end offered, unmasked.
    pub fn offered_raw(&self) -> (DeviceFeatures, ProtocolFeatures) {
        (DeviceFeatures::from_bits(self.offered), self.protocol_offered)
    }

    /// Protocol features that were negotiated.
    pub fn protocol(&self) -> ProtocolFeatures {
        self.channel.negotiated()
    }

    /// Queues (for net: pairs, with some back-ends) that the back-end serves; `u16::MAX` when it does not say.
    pub fn queue_num(&self) -> u16 {
        self.queue_num.unwrap_or(u16::MAX)
    }

    /// The peer's name.
    pub fn peer(&self) -> &str {
        self.channel.peer()
    }

    /// Counters of this connection.
    pub fn stats(&self) -> Stats {
        self.channel.stats()
    }

    /// The back-end's own channel, once; it wants to be served from now on. `None` when it was not negotiated.
    pub fn take_backend_channel(&mut self) -> Option<BackendChannel> {
        self.backend.take()
    }

    /// Reads the configuration space, `size` bytes (1 to 256) or the most below that which the back-end gives.
    pub fn read_config(&mut self, size: usize) -> Result<Vec<u8>, Error> {
        let deadline = self.channel.deadline();
        config::read(&mut self.channel, size, &deadline)
    }

    /// Writes to the configuration space as the driver does.
    pub fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), Error> {
        let deadline = self.channel.deadline();
        config::write(&mut self.channel, offset, bytes, WriteKind::Driver, &deadline)
    }

    /// Resets the device in the back-end. Needs RESET_DEVICE; features are sent again by [`Session::go_live`].
    pub fn reset_device(&mut self) -> Result<(), Error> {
        let deadline = self.channel.deadline();
        self.channel.exchange(Request::RESET_DEVICE, &[], &[], &deadline).map(|_| ())
    }

    /// Gives the back-end memory and rings and starts them.
    ///
    /// Blocks for one deadline at most, all messages together. The rings' eventfds are lent for the call; the
    /// back-end keeps its own descriptors of them until the rings stop. A ring that is laid out wrongly gives the
    /// session back inside [`Lost`].
    pub fn go_live(
        mut self,
        features: DriverFeatures,
        memory: &MemoryMap,
        rings: &[Ring<'_>],
    ) -> Result<LiveSession, Lost> {
        let plan = match self.plan(features, memory, rings) {
            Ok(plan) => plan,
            Err(error) => return Err(Lost { error, session: Some(Box::new(self)) }),
        };
        match self.start(features, memory, rings, &plan) {
            Ok(()) => {
                let started = rings.iter().map(|ring| ring.index).collect();
                Ok(LiveSession { session: self, features, started })
            }
            Err(error) => Err(Lost { error, session: None }),
        }
    }

    /// Everything that can be judged before the first message.
    fn plan(
        &self,
        features: DriverFeatures,
        memory: &MemoryMap,
        rings: &[Ring<'_>],
    ) -> Result<Vec<VringAddr>, Error> {
        if self.channel.is_lost() {
            return Err(self.channel.error(Request::SET_FEATURES, Cause::AlreadyLost));
        }
        if features.bits() & !self.offered().bits() != 0 {
            return Err(self.channel.invalid(Request::SET_FEATURES, "a feature was not offered"));
        }
        if memory.regions().len() > REGIONS_MAX {
            return Err(self.channel.invalid(Request::SET_MEM_TABLE, "there are more than 8 memory regions"));
        }
        let mut plan = Vec::with_capacity(rings.len());
        for ring in rings {
            if rings.iter().filter(|other| other.index == ring.index).count() > 1 {
                return Err(self.channel.invalid(Request::SET_VRING_NUM, "a ring is named twice"));
            }
            let address = ring.address(features, memory);
            plan.push(address.map_err(|fault| self.channel.invalid(Request::SET_VRING_ADDR, fault.text()))?);
        }
        Ok(plan)
    }

    fn start(
        &mut self,
        features: DriverFeatures,
        memory: &MemoryMap,
        rings: &[Ring<'_>],
        plan: &[VringAddr],
    ) -> Result<(), Error> {
        let channel = &mut self.channel;
        let deadline = channel.deadline();
        let has_status = channel.negotiated().contains(ProtocolFeatures::STATUS);
        if has_status {
            set_status(channel, status::ACKNOWLEDGE_AND_DRIVER, &deadline)?;
        }
        let mut bits = features.bits();
        if channel.protocol_offered() {
            bits |= 1 << bit::PROTOCOL_FEATURES;
        }
        channel.exchange(Request::SET_FEATURES, &bits.to_ne_bytes(), &[], &deadline)?;
        if has_status {
            set_status(channel, status::FEATURES_OK, &deadline)?;
        }
        set_mem_table(channel, memory, &deadline)?;
        for (ring, address) in rings.iter().zip(plan) {
            start_ring(channel, ring, address, &deadline)?;
        }
        if has_status {
            set_status(channel, status::DRIVER_OK, &deadline)?;
        }
        // Some back-ends register a ring's kick only after they took ENABLE off the socket: a kick before that is
        // lost, and so would be what the guest put into the ring meanwhile.
        channel.ask_u64(Request::GET_FEATURES, &deadline)?;
        for ring in rings {
            ring.kick.ring().map_err(|source| channel.error(Request::SET_VRING_KICK, Cause::Io(source)))?;
        }
        Ok(())
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

fn set_status(channel: &mut Channel, status: u64, deadline: &Deadline) -> Result<(), Error> {
    channel.exchange(Request::SET_STATUS, &status.to_ne_bytes(), &[], deadline).map(|_| ())
}

fn set_mem_table(channel: &mut Channel, memory: &MemoryMap, deadline: &Deadline) -> Result<(), Error> {
    let regions = memory.regions();
    let count = super::message::length(regions.len());
    let mut payload = MemTableHead { count, padding: 0 }.as_bytes().to_vec();
    let mut fds = Vec::with_capacity(regions.len());
    for region in regions {
        let entry = MemRegion {
            guest: region.guest().raw(),
            size: region.size(),
            user: region.user().map_or(0, UserAddr::raw),
            offset: region.offset(),
        };
        payload.extend_from_slice(entry.as_bytes());
        fds.push(region.fd());
    }
    channel.exchange(Request::SET_MEM_TABLE, &payload, &fds, deadline).map(|_| ())
}

fn start_ring(
    channel: &mut Channel,
    ring: &Ring<'_>,
    address: &VringAddr,
    deadline: &Deadline,
) -> Result<(), Error> {
    let index = u32::from(ring.index);
    let with_fd = u64::from(ring.index).to_ne_bytes();
    let state = |num: u32| VringState { index, num };
    let size = state(ring.size.into());
    channel.exchange(Request::SET_VRING_NUM, size.as_bytes(), &[], deadline)?;
    channel.exchange(Request::SET_VRING_ADDR, address.as_bytes(), &[], deadline)?;
    channel.exchange(Request::SET_VRING_BASE, state(ring.base.0).as_bytes(), &[], deadline)?;
    if let Some(error) = ring.error {
        channel.exchange(Request::SET_VRING_ERR, &with_fd, &[error.as_fd()], deadline)?;
    }
    channel.exchange(Request::SET_VRING_CALL, &with_fd, &[ring.call.as_fd()], deadline)?;
    channel.exchange(Request::SET_VRING_KICK, &with_fd, &[ring.kick.as_fd()], deadline)?;
    if channel.protocol_offered() {
        channel.exchange(Request::SET_VRING_ENABLE, state(1).as_bytes(), &[], deadline)?;
    }
    Ok(())
}

/// A back-end that processes rings.
pub struct LiveSession {
    session: Session,
    features: DriverFeatures,
    started: Vec<u16>,
}

impl LiveSession {
    /// What is known of the back-end.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The features that the driver accepted.
    pub fn features(&self) -> DriverFeatures {
        self.features
    }

    /// Counters of this connection.
    pub fn stats(&self) -> Stats {
        self.session.stats()
    }

    /// The back-end's own channel, once, as [`Session::take_backend_channel`].
    pub fn take_backend_channel(&mut self) -> Option<BackendChannel> {
        self.session.take_backend_channel()
    }

    /// Reads the configuration space, as [`Session::read_config`].
    pub fn read_config(&mut self, size: usize) -> Result<Vec<u8>, Error> {
        self.session.read_config(size)
    }

    /// Writes to the configuration space, as [`Session::write_config`].
    pub fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), Error> {
        self.session.write_config(offset, bytes)
    }

    /// Stops every ring and says where each one got to, in the order in which they were started.
    ///
    /// Blocks for one deadline at most. Afterwards the back-end touches neither guest memory nor the eventfds.
    pub fn stop(mut self) -> Result<(Session, Vec<RingBase>), Lost> {
        let deadline = self.session.channel.deadline();
        match self.stop_rings(&deadline) {
            Ok(bases) => Ok((self.session, bases)),
            Err(error) => Err(Lost { error, session: None }),
        }
    }

    fn stop_rings(&mut self, deadline: &Deadline) -> Result<Vec<RingBase>, Error> {
        const REQUEST: Request = Request::GET_VRING_BASE;
        let channel = &mut self.session.channel;
        let mut bases = Vec::with_capacity(self.started.len());
        for index in self.started.drain(..) {
            let state = VringState { index: index.into(), num: 0 };
            let answered = channel.exchange(REQUEST, state.as_bytes(), &[], deadline)?;
            let base = parse_base(&answered.payload, index, self.features);
            bases.push(base.map_err(|fault| channel.malformed(REQUEST, fault))?);
        }
        if channel.negotiated().contains(ProtocolFeatures::STATUS) {
            set_status(channel, 0, deadline)?;
        }
        Ok(bases)
    }
}

impl AsFd for LiveSession {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.session.as_fd()
    }
}

/// A step that failed, and with it the connection, unless the mistake was on our side.
pub struct Lost {
    error: Error,
    session: Option<Box<Session>>,
}

impl Lost {
    /// What went wrong.
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// The error, and the session when nothing had been sent and it can still be used.
    pub fn into_parts(self) -> (Error, Option<Session>) {
        (self.error, self.session.map(|session| *session))
    }
}

impl From<Lost> for Error {
    fn from(lost: Lost) -> Self {
        lost.error
    }
}

impl fmt::Debug for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let session = if self.session.is_some() { "usable" } else { "lost" };
        f.debug_struct("Lost").field("error", &self.error).field("session", &session).finish()
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Lost {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&self.error)
    }
}
