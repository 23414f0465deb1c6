//! The typestate of a backend: `Connection → Session → LiveSession`, each step consuming the last.
//!
//! Order of messages, as every known backend takes it: GET_FEATURES, GET/SET_PROTOCOL_FEATURES, SET_OWNER,
//! \[GET_QUEUE_NUM\], \[GET_MAX_MEM_SLOTS\], \[SET_BACKEND_REQ_FD\]; [`super::live`] goes on from there.
//!
//! Must never send what was not negotiated.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::backend_requests::BackendChannel;
use super::channel::Channel;
use super::config::{self, WriteKind};
use super::features::{DeviceFeatures, ProtocolFeatures, Wanted, bit};
use super::inflight::InflightArea;
use super::iotlb::{IovaMap, MissAnswers};
use super::mem_table;
use super::message::Fault;
use super::request::Request;
use crate::memory::{DirtyLog, MemoryMap};
use crate::peer::deadline::Deadline;
use crate::peer::socket::{self, Attempts, Listener};
use crate::peer::{Cause, Error, Limits, Peer, Protocol, Stats, Step};

/// A connected backend that nothing is known of yet.
pub struct Connection {
    channel: Channel,
}

impl Connection {
    /// Connects to the backend that listens on `path` (`@name` for an abstract socket).
    ///
    /// Blocks for the deadline of `limits` at most.
    pub fn connect(path: &Path, limits: &Limits) -> Result<Self, Error> {
        Self::connect_before(path, limits, &Deadline::after(limits.deadline()))
    }

    /// As [`Connection::connect`], but waits for a place in the listener's queue for as long as `deadline` says.
    pub fn connect_before(path: &Path, limits: &Limits, deadline: &Deadline) -> Result<Self, Error> {
        let peer = Peer::new(Protocol::VhostUser, path.to_string_lossy());
        let stream = socket::connect(path, deadline, limits.admission())
            .map_err(|source| Error::new(&peer, Step::Connect, Cause::Unreachable(source)))?;
        Channel::new(stream, peer, limits).map(|channel| Self { channel })
    }

    /// As [`Connection::connect`], again and again while nobody listens there, as often as `attempts` says.
    pub fn connect_patiently(path: &Path, limits: &Limits, attempts: &mut Attempts) -> Result<Self, Error> {
        loop {
            match Self::connect(path, limits) {
                Err(error) if error.is_absent() => match attempts.next_pause() {
                    Some(pause) => std::thread::sleep(pause),
                    None => return Err(error),
                },
                outcome => return outcome,
            }
        }
    }

    /// Waits for the backend to connect to `listener`, for the deadline of `limits` at most.
    pub fn accept(listener: &Listener, limits: &Limits) -> Result<Self, Error> {
        Self::accept_before(listener, limits, &Deadline::after(limits.deadline()))
    }

    /// As [`Connection::accept`], for as long as `deadline` says.
    pub fn accept_before(listener: &Listener, limits: &Limits, deadline: &Deadline) -> Result<Self, Error> {
        let peer = Peer::new(Protocol::VhostUser, listener.path().to_string_lossy());
        let stream = listener.accept(deadline).map_err(|source| {
            let cause = match source.kind() {
                io::ErrorKind::TimedOut => Cause::Silent(deadline.limit()),
                _ => Cause::Unreachable(source),
            };
            Error::new(&peer, Step::Accept, cause)
        })?;
        Channel::new(stream, peer, limits).map(|channel| Self { channel })
    }

    /// Speaks over `stream`; `peer` is what error messages call the other side.
    pub fn from_stream(stream: UnixStream, peer: impl Into<String>, limits: &Limits) -> Result<Self, Error> {
        let peer = Peer::new(Protocol::VhostUser, peer);
        Channel::new(stream, peer, limits).map(|channel| Self { channel })
    }

    /// Learns what the backend offers and agrees on protocol features.
    ///
    /// Each request has a deadline of its own. Sends nothing that is not negotiated.
    pub fn negotiate(mut self, wanted: &Wanted) -> Result<Session, Error> {
        let channel = &mut self.channel;
        let offered = channel.ask_u64(Request::GET_FEATURES, &channel.deadline())?;
        let mut protocol_offered = ProtocolFeatures::NONE;
        if DeviceFeatures::from_bits(offered).has(bit::PROTOCOL_FEATURES) && wanted.speaks_protocol_features()
        {
            channel.set_protocol_offered();
            let bits = channel.ask_u64(Request::GET_PROTOCOL_FEATURES, &channel.deadline())?;
            protocol_offered = ProtocolFeatures::from_bits(bits);
            let agreed = ProtocolFeatures::negotiate(wanted.protocol(), protocol_offered);
            // REPLY_ACK begins with the next message.
            channel.exchange(
                Request::SET_PROTOCOL_FEATURES,
                &agreed.bits().to_ne_bytes(),
                &[],
                &channel.deadline(),
            )?;
            channel.set_negotiated(agreed);
        }
        channel.exchange(Request::SET_OWNER, &[], &[], &channel.deadline())?;
        let queue_num = match channel.negotiated().contains(ProtocolFeatures::MQ) {
            true => Some(queue_num(channel)?),
            false => None,
        };
        let mem_slots = match channel.negotiated().contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            true => mem_table::slots(channel)?,
            false => 0,
        };
        let backend = match channel.negotiated().contains(ProtocolFeatures::BACKEND_REQ) {
            true => Some(open_backend_channel(channel)?),
            false => None,
        };
        Ok(Session {
            channel: self.channel,
            wanted: *wanted,
            offered,
            protocol_offered,
            queue_num,
            mem_slots,
            backend,
            inflight: None,
            log: None,
            iova_map: None,
            translating: Arc::default(),
        })
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

fn queue_num(channel: &mut Channel) -> Result<u16, Error> {
    let value = channel.ask_u64(Request::GET_QUEUE_NUM, &channel.deadline())?;
    match u16::try_from(value) {
        Ok(count) if count > 0 => Ok(count),
        _ => Err(channel.malformed(Request::GET_QUEUE_NUM, Fault::Value { field: "queue count", value })),
    }
}

fn open_backend_channel(channel: &mut Channel) -> Result<BackendChannel, Error> {
    const REQUEST: Request = Request::SET_BACKEND_REQ_FD;
    let local = |source| Cause::Io(source);
    let (ours, theirs) = UnixStream::pair().map_err(|source| channel.error(REQUEST, local(source)))?;
    let (peer, trace) = (channel.peer().clone(), channel.limits().trace().cloned());
    let backend = BackendChannel::new(ours, peer, channel.negotiated(), trace)
        .map_err(|source| channel.error(REQUEST, local(source)))?;
    channel.owns(&backend);
    channel.exchange(REQUEST, &[], &[theirs.as_fd()], &channel.deadline())?;
    Ok(backend)
}

/// A backend whose offer is known and that has no rings.
pub struct Session {
    pub(super) channel: Channel,
    wanted: Wanted,
    offered: u64,
    protocol_offered: ProtocolFeatures,
    queue_num: Option<u16>,
    pub(super) mem_slots: usize,
    backend: Option<BackendChannel>,
    /// To be given to the backend at the next start; a fresh one is asked for when there is none.
    pub(super) inflight: Option<Arc<InflightArea>>,
    /// Writes are logged from the next start on.
    pub(super) log: Option<Arc<DirtyLog>>,
    /// What IOVAs mean, for a driver that takes ACCESS_PLATFORM; every address itself when there is none.
    pub(super) iova_map: Option<Arc<IovaMap>>,
    /// The translations are in force: misses may be answered.
    pub(super) translating: Arc<AtomicBool>,
}

impl Session {
    /// Device features that the guest may see: what the backend offers, less what is masked.
    pub fn offered(&self) -> DeviceFeatures {
        self.wanted.visible(self.offered)
    }

    /// Everything that the backend offered, unmasked.
    pub fn offered_raw(&self) -> (DeviceFeatures, ProtocolFeatures) {
        (DeviceFeatures::from_bits(self.offered), self.protocol_offered)
    }

    /// Protocol features that were negotiated.
    pub fn protocol(&self) -> ProtocolFeatures {
        self.channel.negotiated()
    }

    /// Queues (for net: pairs, with some backends) that the backend serves; `u16::MAX` when it does not say.
    pub fn queue_num(&self) -> u16 {
        self.queue_num.unwrap_or(u16::MAX)
    }

    /// The peer's name.
    pub fn peer(&self) -> &str {
        self.channel.peer().name()
    }

    /// Judges whether the backend can be told of `memory`.
    pub fn holds(&self, memory: &MemoryMap) -> Result<(), Error> {
        mem_table::fits(&self.channel, memory, self.mem_slots)
    }

    /// How long any operation may take.
    pub fn deadline(&self) -> Duration {
        self.channel.limits().deadline()
    }

    /// Counters of this connection.
    pub fn stats(&self) -> Stats {
        self.channel.stats()
    }

    /// The backend's own channel, once; it wants to be served from now on. `None` when it was not negotiated.
    pub fn take_backend_channel(&mut self) -> Option<BackendChannel> {
        self.backend.take()
    }

    /// Reads the configuration space, `size` bytes (1 to 256) or the most below that which the backend gives.
    pub fn read_config(&mut self, size: usize) -> Result<Vec<u8>, Error> {
        let deadline = self.channel.deadline();
        config::read(&mut self.channel, size, &deadline)
    }

    /// Writes to the configuration space as the driver does.
    pub fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), Error> {
        let deadline = self.channel.deadline();
        config::write(&mut self.channel, offset, bytes, WriteKind::Driver, &deadline)
    }

    /// Writes to the configuration space as the driver does, and reads it again as [`Session::read_config`]: what a
    /// device makes of a write is its own.
    pub fn change_config(&mut self, offset: u32, bytes: &[u8], size: usize) -> Result<Vec<u8>, Error> {
        let deadline = self.channel.deadline();
        config::write(&mut self.channel, offset, bytes, WriteKind::Driver, &deadline)?;
        config::read(&mut self.channel, size, &deadline)
    }

    /// Restores the configuration space at the end of a migration: read-only fields are written, too.
    pub fn restore_config(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let deadline = self.channel.deadline();
        config::write(&mut self.channel, 0, bytes, WriteKind::Migration, &deadline)
    }

    /// The device status as the backend holds it. Needs STATUS.
    pub fn status(&mut self) -> Result<u64, Error> {
        let deadline = self.channel.deadline();
        self.channel.ask_u64(Request::GET_STATUS, &deadline)
    }

    /// Resets the device in the backend. Needs RESET_DEVICE; features are sent again by [`Session::go_live`].
    pub fn reset_device(&mut self) -> Result<(), Error> {
        self.channel.order(Request::RESET_DEVICE, &[], &[])
    }

    /// Goes on, at the next [`Session::go_live`], with what `area` says was in flight. Needs INFLIGHT_SHMFD.
    ///
    /// Without it a fresh area is asked for, as a guest that reset its device wants it.
    #[must_use]
    pub fn with_inflight(mut self, area: Arc<InflightArea>) -> Self {
        self.inflight = Some(area);
        self
    }

    /// What answers the misses of a driver that takes ACCESS_PLATFORM; `None` without
    /// [`Session::with_iova_map`].
    pub fn miss_answers(&self) -> io::Result<Option<MissAnswers>> {
        let Some(map) = self.iova_map.clone() else { return Ok(None) };
        Ok(Some(MissAnswers {
            socket: self.channel.as_fd().try_clone_to_owned()?.into(),
            peer: self.channel.peer().clone(),
            trace: self.channel.limits().trace().cloned(),
            map,
            translating: Arc::clone(&self.translating),
        }))
    }

    /// Uses `map`, at the next [`Session::go_live`] of a driver that takes ACCESS_PLATFORM.
    #[must_use]
    pub fn with_iova_map(mut self, map: Arc<IovaMap>) -> Self {
        self.iova_map = Some(map);
        self
    }

    /// True when the backend can log its writes.
    pub fn can_log(&self) -> bool {
        self.log_permitted().is_ok()
    }

    /// Logs from the next [`Session::go_live`] on.
    #[must_use]
    pub fn with_log(mut self, log: Arc<DirtyLog>) -> Self {
        self.log = Some(log);
        self
    }

    /// The backend offered to log.
    pub(super) fn log_permitted(&self) -> Result<(), Error> {
        let offered = self.offered_raw().0.has(bit::LOG_ALL);
        if !offered || !self.protocol().contains(ProtocolFeatures::LOG_SHMFD) {
            return Err(self.channel.error(Request::SET_LOG_BASE, Cause::NotNegotiated));
        }
        Ok(())
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
