//! The typestate of a backend: `Connection → Session → LiveSession`. Each step consumes the state before it.
//!
//! Order of messages, which every known backend accepts: GET_FEATURES, GET/SET_PROTOCOL_FEATURES, SET_OWNER,
//! \[GET_QUEUE_NUM\], \[GET_MAX_MEM_SLOTS\], \[SET_BACKEND_REQ_FD\]. The messages after these are in
//! [`super::live`].
//!
//! Must never send a request that was not negotiated.

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

/// A connected backend before the first message.
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

    /// As [`Connection::connect`], but waits until `deadline` for room in the listener's backlog.
    pub fn connect_before(path: &Path, limits: &Limits, deadline: &Deadline) -> Result<Self, Error> {
        let peer = Peer::new(Protocol::VhostUser, path.to_string_lossy());
        let stream = socket::connect(path, deadline, limits.admission())
            .map_err(|source| Error::new(&peer, Step::Connect, Cause::Unreachable(source)))?;
        Channel::new(stream, peer, limits).map(|channel| Self { channel })
    }

    /// As [`Connection::connect`], but tries again while nobody listens on `path`, for as long as `attempts`
    /// allows.
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

    /// As [`Connection::accept`], but waits until `deadline`.
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

    /// Uses a connected `stream`; `peer` names the backend in errors.
    pub fn from_stream(stream: UnixStream, peer: impl Into<String>, limits: &Limits) -> Result<Self, Error> {
        let peer = Peer::new(Protocol::VhostUser, peer);
        Channel::new(stream, peer, limits).map(|channel| Self { channel })
    }

    /// Reads what the backend offers, and negotiates protocol features.
    ///
    /// Each request has a deadline of its own.
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
            // REPLY_ACK is in force from the next message on.
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

/// A backend whose features are negotiated and that has no started ring.
pub struct Session {
    pub(super) channel: Channel,
    wanted: Wanted,
    offered: u64,
    protocol_offered: ProtocolFeatures,
    queue_num: Option<u16>,
    pub(super) mem_slots: usize,
    backend: Option<BackendChannel>,
    /// The inflight area for the next start. Without one, the backend is asked for a new area.
    pub(super) inflight: Option<Arc<InflightArea>>,
    /// The dirty log that is in use from the next start on.
    pub(super) log: Option<Arc<DirtyLog>>,
    /// The translations for a driver that accepts ACCESS_PLATFORM. Without a map, each IOVA is the
    /// guest address with the same number.
    pub(super) iova_map: Option<Arc<IovaMap>>,
    /// True while the translations are in force, so that misses may be answered.
    pub(super) translating: Arc<AtomicBool>,
}

impl Session {
    /// The device features that the guest may see: those that the backend offers, without the masked ones.
    pub fn offered(&self) -> DeviceFeatures {
        self.wanted.visible(self.offered)
    }

    /// All features that the backend offers, without any masking.
    pub fn offered_raw(&self) -> (DeviceFeatures, ProtocolFeatures) {
        (DeviceFeatures::from_bits(self.offered), self.protocol_offered)
    }

    /// Protocol features that were negotiated.
    pub fn protocol(&self) -> ProtocolFeatures {
        self.channel.negotiated()
    }

    /// The number of queues that the backend serves (some net backends count queue pairs); `u16::MAX` when
    /// unknown.
    pub fn queue_num(&self) -> u16 {
        self.queue_num.unwrap_or(u16::MAX)
    }

    /// The peer's name.
    pub fn peer(&self) -> &str {
        self.channel.peer().name()
    }

    /// Checks that the backend can be given `memory`.
    pub fn holds(&self, memory: &MemoryMap) -> Result<(), Error> {
        mem_table::fits(&self.channel, memory, self.mem_slots)
    }

    /// The limit of each operation.
    pub fn deadline(&self) -> Duration {
        self.channel.limits().deadline()
    }

    /// Counters of this connection.
    pub fn stats(&self) -> Stats {
        self.channel.stats()
    }

    /// The backend's own channel, at the first call only. The caller must serve it from then on. `None` when
    /// no channel was negotiated.
    pub fn take_backend_channel(&mut self) -> Option<BackendChannel> {
        self.backend.take()
    }

    /// Reads the configuration space from offset 0: `size` bytes (1 to 256), or as many below that as the
    /// backend returns.
    pub fn read_config(&mut self, size: usize) -> Result<Vec<u8>, Error> {
        let deadline = self.channel.deadline();
        config::read(&mut self.channel, size, &deadline)
    }

    /// Writes to the configuration space on behalf of the driver.
    pub fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), Error> {
        let deadline = self.channel.deadline();
        config::write(&mut self.channel, offset, bytes, WriteKind::Driver, &deadline)
    }

    /// Writes to the configuration space on behalf of the driver, and reads it again as
    /// [`Session::read_config`] does: the device decides which value a write leaves.
    pub fn change_config(&mut self, offset: u32, bytes: &[u8], size: usize) -> Result<Vec<u8>, Error> {
        let deadline = self.channel.deadline();
        config::write(&mut self.channel, offset, bytes, WriteKind::Driver, &deadline)?;
        config::read(&mut self.channel, size, &deadline)
    }

    /// Restores the configuration space at the end of a migration. Read-only fields are written, too.
    pub fn restore_config(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let deadline = self.channel.deadline();
        config::write(&mut self.channel, 0, bytes, WriteKind::Migration, &deadline)
    }

    /// Reads the device status from the backend. Needs STATUS.
    pub fn status(&mut self) -> Result<u64, Error> {
        let deadline = self.channel.deadline();
        self.channel.ask_u64(Request::GET_STATUS, &deadline)
    }

    /// Resets the device in the backend. Needs RESET_DEVICE. [`Session::go_live`] sends the features again.
    pub fn reset_device(&mut self) -> Result<(), Error> {
        self.channel.order(Request::RESET_DEVICE, &[], &[])
    }

    /// Makes the next [`Session::go_live`] hand over `area`, so that the backend finishes the requests noted
    /// in it. Needs INFLIGHT_SHMFD.
    ///
    /// Without this call, the backend is asked for a new area, which is right after a reset by the guest.
    #[must_use]
    pub fn with_inflight(mut self, area: Arc<InflightArea>) -> Self {
        self.inflight = Some(area);
        self
    }

    /// The part that answers IOTLB misses of a driver that accepts ACCESS_PLATFORM; `None` without
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

    /// Uses `map` from the next [`Session::go_live`] on, if the driver accepts ACCESS_PLATFORM.
    #[must_use]
    pub fn with_iova_map(mut self, map: Arc<IovaMap>) -> Self {
        self.iova_map = Some(map);
        self
    }

    /// True when the backend can log its writes to guest memory.
    pub fn can_log(&self) -> bool {
        self.log_permitted().is_ok()
    }

    /// Logs the backend's writes to `log` from the next [`Session::go_live`] on.
    #[must_use]
    pub fn with_log(mut self, log: Arc<DirtyLog>) -> Self {
        self.log = Some(log);
        self
    }

    /// Fails when the backend did not offer to log.
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
