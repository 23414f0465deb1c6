//! The interface between the device core and the backend that serves the queues. Knows no protocol.

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
    /// The features that the driver took.
    pub features: DriverFeatures,
    /// Guest memory.
    pub memory: &'a MemoryMap,
    /// The queues that the driver enabled, checked, and where each begins.
    pub rings: &'a [Ring<'a>],
    /// The inflight area of an earlier backend; `None` when nothing was in flight, or there is no area.
    pub inflight: Option<Arc<InflightArea>>,
}

/// How the queues stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The backend finishes every request first; the queues go on later.
    Drain,
    /// Where the backend can, nothing is waited for: the inflight area holds the requests in flight.
    /// Elsewhere this is like [`Stop::Drain`].
    Suspend,
    /// The backend finishes every request first, and its device is reset.
    Reset,
}

/// Whether running queues use a changed memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryChange {
    /// They use it.
    Done,
    /// They have to stop and start again before they use it.
    NeedsRestart,
}

/// Why a backend did not do what it was asked.
#[derive(Debug)]
pub enum BackendError {
    /// The backend refused this request; later requests are possible.
    Refused(Box<dyn Error + Send + Sync>),
    /// The backend is lost.
    Lost(Box<dyn Error + Send + Sync>),
}

impl BackendError {
    /// The error for a backend that was given up earlier.
    #[must_use]
    pub fn gone() -> Self {
        Self::Lost("the backend is gone".into())
    }

    /// Whether the cause is a peer that did not answer in time.
    #[must_use]
    pub fn is_silence(&self) -> bool {
        is_silence(self.cause())
    }

    /// The cause.
    #[must_use]
    pub fn cause(&self) -> &(dyn Error + Send + Sync + 'static) {
        match self {
            Self::Refused(cause) | Self::Lost(cause) => cause.as_ref(),
        }
    }
}

/// Whether the cause of `error` is a peer that did not answer in time. A driver does not wait for the next
/// backend then.
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

/// The backend that serves a device's queues. Called with the device's lock held, on vCPU threads and on the
/// attendant's thread. One exception: a start in place of a lost backend is called without the lock. Every
/// call ends within the peer's deadline.
pub trait Backend: Send {
    /// Starts the queues. Returns the inflight area that the backend uses, if it uses one.
    ///
    /// # Errors
    /// When the queues do not run.
    fn start(&mut self, start: &Start<'_>) -> Result<Option<Arc<InflightArea>>, BackendError>;

    /// Stops the queues. Afterwards the backend touches neither memory nor eventfds. Returns the position of
    /// each queue, in the order in which they were started; nothing when the queues were stopped already, or
    /// were reset.
    ///
    /// # Errors
    /// When the stop is not confirmed. The backend is lost then.
    fn stop(&mut self, how: Stop) -> Result<Vec<RingBase>, BackendError>;

    /// Passes on a write of the driver to the configuration space, if there is one. Returns the configuration
    /// after it.
    ///
    /// # Errors
    /// When the backend refuses the write, or does not return its configuration.
    fn config(&mut self, written: Option<(u32, &[u8])>) -> Result<Vec<u8>, BackendError>;

    /// Makes `memory` the guest's memory, for queues that run.
    ///
    /// # Errors
    /// When the backend cannot hold that memory and keeps the old one, or when the backend is lost.
    fn change_memory(&mut self, memory: &MemoryMap) -> Result<MemoryChange, BackendError>;

    /// The session, for the messages that few device types use, while the queues run.
    ///
    /// # Errors
    /// When the queues do not run.
    fn live(&mut self) -> Result<&mut LiveSession, BackendError>;

    /// The session while the queues are stopped.
    ///
    /// # Errors
    /// When the queues run.
    fn standing(&mut self) -> Result<&mut Session, BackendError>;

    /// The translations from the driver's addresses to guest memory, for a driver that takes ACCESS_PLATFORM.
    /// Callable as long as the backend value lives, connected or not.
    fn translations(&self) -> Option<&IovaMap>;

    /// Whether kicks and calls are messages (in-band notifications).
    fn notifies_in_band(&self) -> bool;

    /// Whether the backend can continue from the inflight area of an earlier one.
    fn takes_inflight(&self) -> bool;

    /// Whether the backend has ended the connection.
    fn has_hung_up(&self) -> bool;

    /// Gives the backend up: ends the connection and sends no further request.
    fn disconnect(&mut self);

    /// Traffic so far.
    fn stats(&self) -> BackendStats;
}

/// The meaning of a failed message for the device core.
pub(crate) fn failed(error: transport::peer::Error) -> BackendError {
    if error.is_fatal() { BackendError::Lost(error.into()) } else { BackendError::Refused(error.into()) }
}
