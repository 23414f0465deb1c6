//! The backend of a device over vhost-user: a `Session` while the queues stand, a `LiveSession` while
//! they run. Must never send a message of its own making: that is the transport's.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use transport::memory_map::GuestAddr;
use transport::vhost_user::crypto::{SessionId, SymmetricSession};
use transport::vhost_user::features::{ProtocolFeatures, bit};
use transport::vhost_user::message::Uuid;
use transport::vhost_user::{Connection, Error, InflightArea, IovaMap, LiveSession, Session, Stats};

use super::answers::OwnChannel;
use super::backend::{Backend, BackendError, BackendStats, Begin, Start};
use super::device_type::{Model, ModelError, Offer};
pub use super::order::Order;
use super::reconnect::Reconnect;
use super::registers::SharedMemory;
use super::shared_memory::{SharedRegions, Tenancy};
use crate::lock;

/// Bytes of shared memory that a device may have: more, no guest could map.
const SHARED_MEMORY_MAX: u64 = 1 << 40;

/// Why there is no device at the other end.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The backend failed.
    #[error(transparent)]
    Peer(#[from] Error),
    /// It works, but is not what was asked for.
    #[error("{peer} does not fit")]
    Unfit {
        /// The backend's name.
        peer: String,
        /// Why not.
        source: ModelError,
    },
    /// The display that a GPU is to draw on.
    #[error("cannot connect to the display's socket {name}")]
    Display {
        /// Where it should be.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// No fd is to be had.
    #[error("cannot duplicate a socket")]
    Fd(#[source] io::Error),
}

impl OpenError {
    /// What the user may try.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Peer(error) => error.hint(),
            Self::Unfit { source: ModelError::NoConfig { kind: "fs" }, .. } => {
                Some("virtiofsd has a configuration only when it is started with --tag NAME")
            }
            Self::Unfit { source: ModelError::NoConfig { .. } | ModelError::TooFewQueues { .. }, .. } => {
                Some("is this a backend for another type of device?")
            }
            Self::Unfit { source: ModelError::NoIommu, .. } => {
                Some("start it with its IOMMU support, or leave iommu= out")
            }
            Self::Unfit { source: ModelError::NoMtu, .. } => {
                Some("leave mtu= out, or start it with support for it")
            }
            Self::Unfit { .. } => None,
            Self::Display { .. } => {
                Some("the display has to listen before the GPU's backend is connected to")
            }
            Self::Fd(_) => Some("raise the limit of open files (ulimit -n)"),
        }
    }
}

/// A backend that was asked what it is, and the device to make of it.
pub struct Opened {
    /// What the guest will see.
    pub model: Model,
    /// Serves the queues.
    pub backend: VhostUser,
    /// The backend's own requests, when it may make any: to be served from now on.
    pub channel: Option<OwnChannel>,
    /// Readable or hung up as soon as the connection is gone, whoever ended it. Nothing is to be read
    /// from it.
    pub hang_up: OwnedFd,
    /// For when it is lost.
    pub reconnect: Reconnect,
    /// What it shows the guest of its own memory, if it may.
    pub shared: SharedRegions,
}

/// Asks the backend what it offers and makes a device of that. Waits for two deadlines at most.
///
/// # Errors
/// When the backend fails, or does not fit the order.
pub fn open(connection: Connection, order: &Order) -> Result<Opened, OpenError> {
    let survey = Survey::of(connection, order)?;
    let shared = SharedRegions::new(survey.shared.clone());
    let reconnect = Reconnect::new(order, &survey, shared.clone());
    let (Attended { model, backend, hang_up }, channel) = reconnect.attend(survey)?;
    Ok(Opened { model, backend, channel, hang_up, reconnect, shared })
}

/// What a backend says of itself.
pub(super) struct Survey {
    pub(super) session: Session,
    pub(super) model: Model,
    /// Bytes of configuration that it gave.
    pub(super) config_size: usize,
    /// The sizes of its shared memory regions, by id.
    pub(super) shared: Vec<u64>,
}

/// A backend that stands ready, and the device that could be made of it.
pub(super) struct Attended {
    pub(super) model: Model,
    pub(super) backend: VhostUser,
    pub(super) hang_up: OwnedFd,
}

impl Survey {
    pub(super) fn of(connection: Connection, order: &Order) -> Result<Self, OpenError> {
        let mut session = connection.negotiate(&order.wanted)?;
        if let Some(map) = &order.translations {
            session = behind(session, map)?;
        }
        let most = usize::from(order.device_type.config_size());
        let has_config = session.protocol().contains(ProtocolFeatures::CONFIG) && most > 0;
        let config = match has_config.then(|| session.read_config(most)).transpose() {
            Ok(config) => config,
            // Promised, but not given: as good as none, where the device can do without.
            Err(error) if !error.is_fatal() && !order.device_type.needs_config() => {
                log::warn!("{error}");
                None
            }
            Err(error) => return Err(error.into()),
        };
        let config_size = config.as_ref().map_or(0, Vec::len);
        let has_count = session.protocol().contains(ProtocolFeatures::MQ);
        let queue_num = has_count.then(|| session.queue_num());
        let offer = Offer { features: session.offered(), queue_num, config };
        let unfit =
            |peer: &str, source| OpenError::Unfit { peer: format!("vhost-user backend {peer}"), source };
        let model = order.device_type.model(offer, &order.wishes);
        let mut model = model.map_err(|source| unfit(session.peer(), source))?;
        let has_shared = session.protocol().contains(ProtocolFeatures::SHMEM);
        let shared = has_shared.then(|| session.shmem_config()).transpose()?.unwrap_or_default();
        model.shared_memory = shared_memory(&shared).map_err(|source| unfit(session.peer(), source))?;
        if let Some(mtu) = order.device_type.mtu()
            && session.protocol().contains(ProtocolFeatures::MTU)
        {
            session.set_mtu(mtu)?;
        }
        if let Some(display) = &order.display {
            let failed = |source| OpenError::Display { name: display.to_string(), source };
            let socket = display.socket(session.deadline()).map_err(failed)?;
            session.set_gpu_socket(socket.as_fd())?;
        }
        Ok(Self { session, model, config_size, shared })
    }
}

/// Regions of these sizes, whose places are yet to be found.
fn shared_memory(sizes: &[u64]) -> Result<Vec<Option<SharedMemory>>, ModelError> {
    let total = sizes.iter().try_fold(0_u64, |sum, size| sum.checked_add(*size));
    if total.is_none_or(|total| total > SHARED_MEMORY_MAX) {
        return Err(ModelError::SharedMemory);
    }
    let region = |size: &u64| (*size > 0).then_some(SharedMemory { base: GuestAddr(0), length: *size });
    Ok(sizes.iter().map(region).collect())
}

/// The session of a device behind an IOMMU.
fn behind(session: Session, map: &Arc<IovaMap>) -> Result<Session, OpenError> {
    let needs = ProtocolFeatures::BACKEND_REQ.with(ProtocolFeatures::REPLY_ACK);
    if !session.offered().has(bit::ACCESS_PLATFORM) || !session.protocol().contains(needs) {
        let peer = format!("vhost-user backend {}", session.peer());
        return Err(OpenError::Unfit { peer, source: ModelError::NoIommu });
    }
    Ok(session.with_iova_map(Arc::clone(map)))
}

/// The connection, by what it can do.
enum Link {
    Standing(Session),
    Live(LiveSession),
    Gone,
}

/// What outlives a connection.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// Where the backend that runs, or was cut off, notes what it has in flight.
    inflight: Option<Arc<InflightArea>>,
    /// Counters of the connections that ended.
    past: Stats,
}

/// A vhost-user backend.
pub struct VhostUser {
    link: Link,
    config_size: usize,
    translations: Option<Arc<IovaMap>>,
    shared: Option<Tenancy>,
    kept: Arc<Mutex<Kept>>,
}

fn failed(error: Error) -> BackendError {
    if error.is_fatal() { BackendError::Lost(error.into()) } else { BackendError::Refused(error.into()) }
}

/// Two connections' counters in one.
fn sum(a: Stats, b: Stats) -> Stats {
    Stats {
        sent: a.sent.saturating_add(b.sent),
        answers: a.answers.saturating_add(b.answers),
        failures: a.failures.saturating_add(b.failures),
        worst_wait: a.worst_wait.max(b.worst_wait),
        total_wait: a.total_wait.saturating_add(b.total_wait),
    }
}

impl Link {
    fn stats(&self) -> Stats {
        match self {
            Self::Standing(session) => session.stats(),
            Self::Live(live) => live.stats(),
            Self::Gone => Stats::default(),
        }
    }
}

impl VhostUser {
    pub(super) fn new(
        session: Session,
        order: &Order,
        kept: Arc<Mutex<Kept>>,
        shared: Option<Tenancy>,
    ) -> Self {
        let config_size = usize::from(order.device_type.config_size());
        let translations = order.translations.clone();
        Self { link: Link::Standing(session), config_size, translations, shared, kept }
    }

    /// Takes the link out.
    fn take(&mut self) -> Link {
        std::mem::replace(&mut self.link, Link::Gone)
    }

    /// The session of queues that run.
    fn live(&mut self) -> Result<&mut LiveSession, BackendError> {
        match &mut self.link {
            Link::Live(live) => Ok(live),
            Link::Standing(_) => Err(BackendError::Refused("the queues do not run".into())),
            Link::Gone => Err(BackendError::gone()),
        }
    }

    /// A connection is over: its counters stay.
    fn ended(&self, stats: Stats) {
        let mut kept = lock(&self.kept);
        kept.past = sum(kept.past, stats);
    }

    /// The same after an operation that began at `begun` and ended it.
    fn failed_since(&self, begun: Instant, before: Stats) {
        let took = begun.elapsed();
        let failure = Stats { failures: 1, worst_wait: took, total_wait: took, ..Stats::default() };
        self.ended(sum(before, failure));
    }
}

impl Drop for VhostUser {
    fn drop(&mut self) {
        self.disconnect();
    }
}

impl Backend for VhostUser {
    fn start(&mut self, start: &Start<'_>) -> Result<(), BackendError> {
        let mut session = match self.take() {
            Link::Standing(session) => session,
            // The device starts what stands and nothing else.
            link @ (Link::Live(_) | Link::Gone) => {
                self.ended(link.stats());
                return Err(BackendError::gone());
            }
        };
        // A driver that starts anew has nothing in flight.
        let inflight = lock(&self.kept).inflight.take().filter(|_| start.begin == Begin::Resumed);
        if let Some(area) = inflight.clone() {
            session = session.with_inflight(area);
        }
        let (begun, before) = (Instant::now(), session.stats());
        self.shared.iter().for_each(Tenancy::begin);
        match session.go_live(start.features, start.memory, start.rings) {
            Ok(live) => {
                lock(&self.kept).inflight = live.inflight().cloned();
                self.link = Link::Live(live);
                Ok(())
            }
            Err(lost) => {
                // For the next one: what was in flight still is.
                lock(&self.kept).inflight = inflight;
                // Only what was never sent leaves the session as it was; a backend that refuses in the
                // middle is half started.
                let (error, session) = lost.into_parts();
                match session {
                    Some(session) => {
                        self.link = Link::Standing(session);
                        Err(failed(error))
                    }
                    None => {
                        self.failed_since(begun, before);
                        Err(BackendError::Lost(error.into()))
                    }
                }
            }
        }
    }

    fn has_notes(&self) -> bool {
        let Link::Standing(session) = &self.link else { return false };
        session.protocol().contains(ProtocolFeatures::INFLIGHT_SHMFD) && lock(&self.kept).inflight.is_some()
    }

    fn translations(&self) -> Option<&IovaMap> {
        self.translations.as_deref()
    }

    fn stop(&mut self) -> Result<(), BackendError> {
        match self.take() {
            Link::Live(live) => {
                let (begun, before) = (Instant::now(), live.stats());
                let stopped = live.stop();
                self.shared.iter().for_each(Tenancy::end);
                match stopped {
                    Ok((session, _bases)) => {
                        // It finished what it had in flight.
                        lock(&self.kept).inflight = None;
                        self.link = Link::Standing(session);
                        Ok(())
                    }
                    Err(lost) => {
                        self.failed_since(begun, before);
                        Err(BackendError::Lost(Error::from(lost).into()))
                    }
                }
            }
            standing @ Link::Standing(_) => {
                self.link = standing;
                Ok(())
            }
            Link::Gone => Err(BackendError::gone()),
        }
    }

    fn read_config(&mut self) -> Result<Vec<u8>, BackendError> {
        let size = self.config_size;
        match &mut self.link {
            Link::Standing(session) => session.read_config(size).map_err(failed),
            Link::Live(live) => live.read_config(size).map_err(failed),
            Link::Gone => Err(BackendError::gone()),
        }
    }

    fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), BackendError> {
        match &mut self.link {
            Link::Standing(session) => session.write_config(offset, bytes).map_err(failed),
            Link::Live(live) => live.write_config(offset, bytes).map_err(failed),
            Link::Gone => Err(BackendError::gone()),
        }
    }

    fn shared_object(&mut self, uuid: Uuid) -> Result<OwnedFd, BackendError> {
        self.live()?.shared_object(uuid).map_err(failed)
    }

    fn announce(&mut self, mac: [u8; 6]) -> Result<(), BackendError> {
        let live = self.live()?;
        let can = live.session().protocol().contains(ProtocolFeatures::RARP);
        if can { live.send_rarp(mac).map_err(failed) } else { Ok(()) }
    }

    fn create_crypto_session(&mut self, session: &SymmetricSession) -> Result<SessionId, BackendError> {
        self.live()?.create_crypto_session(session).map_err(failed)
    }

    fn close_crypto_session(&mut self, session: SessionId) -> Result<(), BackendError> {
        self.live()?.close_crypto_session(session).map_err(failed)
    }

    fn disconnect(&mut self) {
        self.shared.iter().for_each(Tenancy::end);
        let link = self.take();
        self.ended(link.stats());
    }

    fn stats(&self) -> BackendStats {
        let Stats { sent, answers, failures, worst_wait, .. } = sum(lock(&self.kept).past, self.link.stats());
        BackendStats { messages: sent, waits: answers, failures, worst_wait }
    }
}

#[cfg(test)]
#[path = "vhost_user_faults.rs"]
mod faults;
#[cfg(test)]
#[path = "vhost_user_tests.rs"]
pub(super) mod tests;
