//! What the device core asks of whoever serves the queues. Knows no protocol.

pub mod outlets;
pub mod requests;
pub mod spec;
pub mod survey;
pub mod vhost_user;

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use transport::memory::MemoryMap;
use transport::vhost_user::features::DriverFeatures;
use transport::vhost_user::vring::{Ring, RingBase};
use transport::vhost_user::{InflightArea, IovaMap, LiveSession, Session};

/// What a backend needs to start the queues.
#[derive(Debug)]
pub struct Start<'a> {
    /// What the driver took of what was offered.
    pub features: DriverFeatures,
    /// Guest memory.
    pub memory: &'a MemoryMap,
    /// The queues that the driver enabled, checked, and where each begins.
    pub rings: &'a [Ring<'a>],
    /// Where an earlier backend noted what it had in flight; none when nothing was, or nobody noted it.
    pub inflight: Option<Arc<InflightArea>>,
}

/// How the queues stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Every request is finished first; the queues go on later.
    Drain,
    /// Nothing is waited for, where the backend can: the inflight area has what is in flight. Elsewhere as
    /// [`Stop::Drain`].
    Suspend,
    /// Every request is finished first, and the device is reset.
    Reset,
}

/// Whether running queues have a changed memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryChange {
    /// They have.
    Done,
    /// They have to stop and start again for that.
    NeedsRestart,
}

/// Why a backend did not do what it was asked.
#[derive(Debug)]
pub enum BackendError {
    /// It said no, and can be asked again.
    Refused(Box<dyn Error + Send + Sync>),
    /// It cannot be used any more.
    Lost(Box<dyn Error + Send + Sync>),
}

impl BackendError {
    /// The backend was given up before.
    #[must_use]
    pub fn gone() -> Self {
        Self::Lost("the backend is gone".into())
    }

    /// Whether the peer did not answer in time.
    #[must_use]
    pub fn is_silence(&self) -> bool {
        is_silence(self.cause())
    }

    /// What is behind it.
    #[must_use]
    pub fn cause(&self) -> &(dyn Error + Send + Sync + 'static) {
        match self {
            Self::Refused(cause) | Self::Lost(cause) => cause.as_ref(),
        }
    }
}

/// Whether a peer that did not answer in time is behind `error`: the next one in its place is not worth a wait.
pub(crate) fn is_silence(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<transport::peer::Error>() {
            return error.is_silence();
        }
        next = error.source();
    }
    false
}

/// Traffic with the peer, since the device was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BackendStats {
    /// Messages sent to it.
    pub messages: u64,
    /// Answers that were waited for.
    pub waits: u64,
    /// Waits that ended without an answer.
    pub failures: u64,
    /// The longest wait.
    pub worst_wait: Duration,
}

/// The backend that serves a device's queues. Called with the device's lock held, on vCPU threads and on the attendant's;
/// a start in the place of a lost backend is called without the lock. Every call ends within the peer's deadline.
pub trait Backend: Send {
    /// Starts the queues. Gives the inflight area that the backend notes in, if it notes anything.
    ///
    /// # Errors
    /// When they do not run.
    fn start(&mut self, start: &Start<'_>) -> Result<Option<Arc<InflightArea>>, BackendError>;

    /// Stops the queues; afterwards the backend touches neither memory nor eventfds. Gives where the queues are, in the
    /// order in which they were started: nothing when they stood already, or were reset.
    ///
    /// # Errors
    /// When it cannot be said that they stopped. The backend is lost then.
    fn stop(&mut self, how: Stop) -> Result<Vec<RingBase>, BackendError>;

    /// Passes on what the driver wrote to the configuration space, if anything; gives the configuration as it is then.
    ///
    /// # Errors
    /// When the backend did not take it, or does not say what the configuration is.
    fn config(&mut self, written: Option<(u32, &[u8])>) -> Result<Vec<u8>, BackendError>;

    /// Guest memory is `memory` from now on, for queues that run.
    ///
    /// # Errors
    /// When the backend cannot hold that memory, and keeps what it had; or is lost.
    fn change_memory(&mut self, memory: &MemoryMap) -> Result<MemoryChange, BackendError>;

    /// The session, for the messages that few device types use, while the queues run.
    ///
    /// # Errors
    /// When they do not run.
    fn live(&mut self) -> Result<&mut LiveSession, BackendError>;

    /// The same while the queues stand.
    ///
    /// # Errors
    /// When they run.
    fn standing(&mut self) -> Result<&mut Session, BackendError>;

    /// What stands between the driver's addresses and guest memory, for a driver that takes ACCESS_PLATFORM. It may be
    /// asked for as long as the backend lives, connected or not.
    fn translations(&self) -> Option<&IovaMap>;

    /// Whether kicks and calls are messages.
    fn notifies_in_band(&self) -> bool;

    /// Whether the backend can go on with an inflight area of an earlier one.
    fn takes_inflight(&self) -> bool;

    /// Whether the backend has ended the connection.
    fn has_hung_up(&self) -> bool;

    /// Gives the backend up: nothing is asked of it any more.
    fn disconnect(&mut self);

    /// Traffic so far.
    fn stats(&self) -> BackendStats;
}

/// What the failure of a message means.
pub(crate) fn failed(error: transport::peer::Error) -> BackendError {
    if error.is_fatal() { BackendError::Lost(error.into()) } else { BackendError::Refused(error.into()) }
}
