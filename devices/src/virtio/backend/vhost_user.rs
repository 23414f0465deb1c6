//! The vhost-user backend of a device: a `Session` while the queues are stopped, a `LiveSession` while they
//! run. Must never build a message itself: that is the task of `transport`.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use transport::memory::{MemoryMap, SharedRegion};
use transport::peer::{Error, Stats};
use transport::vhost_user::features::ProtocolFeatures;
use transport::vhost_user::vring::RingBase;
use transport::vhost_user::{InflightArea, IovaMap, LiveSession, Lost, Session};

use crate::lock;
use crate::virtio::backend::outlets::Tenancy;
pub use crate::virtio::backend::spec::Order;
pub use crate::virtio::backend::survey::OpenError;
use crate::virtio::backend::{Backend, BackendError, BackendStats, MemoryChange, Start, Stop, failed};

/// The connection, in the state that decides which messages are possible.
enum Link {
    Standing(Session),
    Live(LiveSession),
    Gone,
}

/// A vhost-user backend.
pub struct VhostUser {
    link: Link,
    config_size: usize,
    translations: Option<Arc<IovaMap>>,
    /// What the backend may reach in the guest by requests of its own.
    tenancy: Tenancy,
    /// Whether kicks and calls are messages.
    in_band: bool,
    /// The memory that the backend was told of, while the queues run.
    memory: Option<MemoryMap>,
    /// Counters of the connections that ended.
    past: Arc<Mutex<Stats>>,
}

/// Tells the backend of added and removed memory regions, and of their translations. When the backend
/// refuses, it keeps the memory that it had.
fn slots(
    live: &mut LiveSession,
    old: &MemoryMap,
    new: &MemoryMap,
    map: Option<&IovaMap>,
) -> Result<(), BackendError> {
    let lacks =
        |memory: &MemoryMap, one: &SharedRegion| !memory.regions().iter().any(|other| other.is_same(one));
    let mut added: Vec<&SharedRegion> = Vec::new();
    for region in new.regions().iter().filter(|region| lacks(old, region)) {
        let outcome = live.add_region(region).map_err(failed);
        if outcome.is_ok() {
            added.push(region);
        }
        let told = outcome.and_then(|()| translate(live, region, map));
        if let Err(error) = told {
            if let BackendError::Refused(_) = error {
                forget(live, old, map)?;
                added.iter().try_for_each(|region| live.remove_region(region)).map_err(failed)?;
            }
            return Err(error);
        }
    }
    // No translation may point to memory that is removed.
    forget(live, new, map)?;
    let gone = old.regions().iter().filter(|region| lacks(new, region));
    gone.map(|region| live.remove_region(region)).try_for_each(|removed| removed.map_err(failed))
}

/// Added memory has identical I/O virtual addresses.
fn translate(
    live: &mut LiveSession,
    region: &SharedRegion,
    map: Option<&IovaMap>,
) -> Result<(), BackendError> {
    let Some(map) = map else { return Ok(()) };
    match map.add(region).map_err(|fault| BackendError::Refused(fault.into()))? {
        Some(range) => live.announce(&range).map_err(failed),
        None => Ok(()),
    }
}

/// Removes the translations of all memory but `memory`. A backend that has no such translation may refuse.
fn forget(live: &mut LiveSession, memory: &MemoryMap, map: Option<&IovaMap>) -> Result<(), BackendError> {
    for range in map.map(|map| map.keep(memory)).unwrap_or_default() {
        match live.revoke(&range) {
            Err(error) if error.is_fatal() => return Err(failed(error)),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// Adds the counters of two connections.
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
    pub(crate) fn new(session: Session, order: &Order, past: Arc<Mutex<Stats>>, tenancy: Tenancy) -> Self {
        let config_size = usize::from(order.device_type.config_size());
        let translations = order.translations.clone();
        let in_band = session.protocol().contains(ProtocolFeatures::INBAND_NOTIFICATIONS);
        let link = Link::Standing(session);
        Self { link, config_size, translations, tenancy, in_band, memory: None, past }
    }

    /// Takes the link out and leaves `Gone`.
    fn take(&mut self) -> Link {
        std::mem::replace(&mut self.link, Link::Gone)
    }

    /// Stops the queues, if they run. Returns their positions, in the order in which they were started.
    fn halt(
        &mut self,
        how: impl FnOnce(LiveSession) -> Result<(Session, Vec<RingBase>), Lost>,
    ) -> Result<Vec<RingBase>, BackendError> {
        match self.take() {
            Link::Live(live) => {
                let (begun, before) = (Instant::now(), live.stats());
                match how(live) {
                    Ok((session, bases)) => {
                        self.link = Link::Standing(session);
                        Ok(bases)
                    }
                    Err(lost) => {
                        self.failed_since(begun, before);
                        Err(BackendError::Lost(Error::from(lost).into()))
                    }
                }
            }
            standing @ Link::Standing(_) => {
                self.link = standing;
                Ok(Vec::new())
            }
            Link::Gone => Err(BackendError::gone()),
        }
    }

    /// A connection has ended: keeps its counters.
    fn ended(&self, stats: Stats) {
        let mut past = lock(&self.past);
        *past = sum(*past, stats);
    }

    /// Keeps the counters of a connection that ended in an operation begun at `begun`, and counts the failed
    /// wait.
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
    fn start(&mut self, start: &Start<'_>) -> Result<Option<Arc<InflightArea>>, BackendError> {
        let mut session = match self.take() {
            Link::Standing(session) => session,
            // The device core starts only stopped queues.
            link @ (Link::Live(_) | Link::Gone) => {
                self.ended(link.stats());
                return Err(BackendError::gone());
            }
        };
        if let Some(Err(fault)) = self.translations.as_ref().map(|map| map.follow(start.memory)) {
            log::warn!("a device behind an IOMMU does not reach all memory: {fault}");
        }
        if let Some(area) = &start.inflight {
            session = session.with_inflight(Arc::clone(area));
        }
        let (begun, before) = (Instant::now(), session.stats());
        self.tenancy.begin();
        let features = session.offered().known(start.features);
        match session.go_live(features, start.memory, start.rings) {
            Ok(live) => {
                let inflight = live.inflight().cloned();
                self.memory = Some(start.memory.clone());
                self.link = Link::Live(live);
                Ok(inflight)
            }
            Err(lost) => {
                // The session is unchanged only if nothing was sent. A backend that refuses in the middle of
                // a start is half started.
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

    fn stop(&mut self, how: Stop) -> Result<Vec<RingBase>, BackendError> {
        let bases = self.halt(|live| match how {
            Stop::Drain => live.stop(),
            Stop::Suspend => live.suspend(),
            Stop::Reset => live.reset().map(|session| (session, Vec::new())),
        });
        self.tenancy.end();
        bases
    }

    fn config(&mut self, written: Option<(u32, &[u8])>) -> Result<Vec<u8>, BackendError> {
        let size = self.config_size;
        let config = match (&mut self.link, written) {
            (Link::Standing(session), None) => session.read_config(size),
            (Link::Standing(session), Some((at, bytes))) => session.change_config(at, bytes, size),
            (Link::Live(live), None) => live.read_config(size),
            (Link::Live(live), Some((at, bytes))) => live.change_config(at, bytes, size),
            (Link::Gone, _) => return Err(BackendError::gone()),
        };
        config.map_err(failed)
    }

    /// Where the backend has memory slots, changes them one by one.
    fn change_memory(&mut self, memory: &MemoryMap) -> Result<MemoryChange, BackendError> {
        let Link::Live(live) = &mut self.link else {
            // The backend is told at its next start.
            return Ok(MemoryChange::Done);
        };
        live.session().holds(memory).map_err(failed)?;
        if !live.has_mem_slots() {
            return Ok(MemoryChange::NeedsRestart);
        }
        // The queues run, so the backend was told of some memory.
        let old = self.memory.as_ref().ok_or_else(BackendError::gone)?;
        slots(live, old, memory, self.translations.as_deref())?;
        self.memory = Some(memory.clone());
        Ok(MemoryChange::Done)
    }

    fn live(&mut self) -> Result<&mut LiveSession, BackendError> {
        match &mut self.link {
            Link::Live(live) => Ok(live),
            Link::Standing(_) => Err(BackendError::Refused("the queues do not run".into())),
            Link::Gone => Err(BackendError::gone()),
        }
    }

    fn standing(&mut self) -> Result<&mut Session, BackendError> {
        match &mut self.link {
            Link::Standing(session) => Ok(session),
            Link::Live(_) => Err(BackendError::Refused("the queues run".into())),
            Link::Gone => Err(BackendError::gone()),
        }
    }

    fn translations(&self) -> Option<&IovaMap> {
        self.translations.as_deref()
    }

    fn notifies_in_band(&self) -> bool {
        self.in_band
    }

    fn takes_inflight(&self) -> bool {
        let Link::Standing(session) = &self.link else { return false };
        session.protocol().contains(ProtocolFeatures::INFLIGHT_SHMFD)
    }

    fn has_hung_up(&self) -> bool {
        let socket = match &self.link {
            Link::Standing(session) => session.as_fd(),
            Link::Live(session) => session.as_fd(),
            Link::Gone => return true,
        };
        let mut ended = [PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)];
        // An interrupted poll is not a hang-up.
        poll(&mut ended, Some(&Timespec::default())).is_ok_and(|count| count > 0)
    }

    fn disconnect(&mut self) {
        self.tenancy.end();
        let link = self.take();
        self.ended(link.stats());
    }

    fn stats(&self) -> BackendStats {
        let Stats { sent, answers, failures, worst_wait, .. } = sum(*lock(&self.past), self.link.stats());
        BackendStats { messages: sent, waits: answers, failures, worst_wait }
    }
}

#[cfg(test)]
#[path = "vhost_user_faults.rs"]
mod faults;
#[cfg(test)]
#[path = "vhost_user_tests.rs"]
pub(crate) mod tests;
