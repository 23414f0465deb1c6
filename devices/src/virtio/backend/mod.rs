//! What the device core asks of whoever serves the queues. Knows no protocol.

pub mod requests;
pub mod shared_memory;
pub mod spec;
pub mod survey;
pub mod vhost_user;

use std::error::Error;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use transport::memory::MemoryMap;
use transport::vhost_user::extras::{SessionId, SymmetricSession};
use transport::vhost_user::features::DriverFeatures;
use transport::vhost_user::message::Uuid;
use transport::vhost_user::vring::{Ring, RingBase};
use transport::vhost_user::{IovaMap, RingSwitch};

/// Whether a backend is the first to have the queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// The driver has just set them up.
    Fresh,
    /// Another one had them and was cut off: what it had in flight is to be done.
    Resumed,
}

/// What a backend needs to start the queues.
#[derive(Debug)]
pub struct Start<'a> {
    /// What the driver took of what was offered.
    pub features: DriverFeatures,
    /// Guest memory.
    pub memory: &'a MemoryMap,
    /// The queues that the driver enabled, checked.
    pub rings: &'a [Ring<'a>],
    /// Whether they ran before.
    pub begin: Begin,
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

/// Whoever serves a device's queues. Called with the device's lock held, on vCPU threads and on the
/// control thread, and while a device recovers on a thread of its own; every call ends within the
/// peer's deadline.
pub trait Backend: Send {
    /// Starts the queues.
    ///
    /// # Errors
    /// When they do not run.
    fn start(&mut self, start: &Start<'_>) -> Result<(), BackendError>;

    /// Whether it was handed notes of what the lost backend had in flight, and a resumed start goes by
    /// them.
    fn has_notes(&self) -> bool {
        false
    }

    /// Whether it has ended the connection, so that there is no point in starting it.
    fn has_hung_up(&self) -> bool {
        false
    }

    /// What stands between the driver's addresses and guest memory, for a driver that takes
    /// ACCESS_PLATFORM. It may be asked for as long as the backend lives, connected or not.
    fn translations(&self) -> Option<&IovaMap> {
        None
    }

    /// Whether kicks and calls are messages: somebody has to pass them on then, see [`Backend::kick`].
    fn notifies_in_band(&self) -> bool {
        false
    }

    /// Tells the backend of a kick, where it takes no eventfd.
    ///
    /// # Errors
    /// When it fails.
    fn kick(&mut self, _queue: u16) -> Result<(), BackendError> {
        Ok(())
    }

    /// Stops the queues and resets the device; afterwards the backend touches neither memory nor eventfds. A
    /// backend that has not started has nothing to do.
    ///
    /// # Errors
    /// When it cannot be said that they stopped. The backend is lost then.
    fn stop(&mut self) -> Result<(), BackendError>;

    /// The configuration space as it is now.
    ///
    /// # Errors
    /// When it cannot be had.
    fn read_config(&mut self) -> Result<Vec<u8>, BackendError>;

    /// Passes on what the driver wrote to the configuration space, which is what this gives from then on.
    ///
    /// # Errors
    /// When the backend did not take it, or does not say what came of it.
    fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Result<Vec<u8>, BackendError>;

    /// The fd of an object that the backend offered to other devices.
    ///
    /// # Errors
    /// When there is none.
    fn shared_object(&mut self, _uuid: Uuid) -> Result<OwnedFd, BackendError> {
        Err(BackendError::Refused("the backend shares no objects".into()))
    }

    /// Switches queues that were started on or off: those of a network card that its driver does not use.
    ///
    /// # Errors
    /// When the backend does not.
    fn switch_rings(&mut self, _queues: &[u16], _switch: RingSwitch) -> Result<(), BackendError> {
        Ok(())
    }

    /// Opens a session of a crypto device.
    ///
    /// # Errors
    /// When the backend does not.
    fn create_crypto_session(&mut self, _session: &SymmetricSession) -> Result<SessionId, BackendError> {
        Err(BackendError::Refused("the backend knows no sessions".into()))
    }

    /// Closes one.
    ///
    /// # Errors
    /// When the backend does not.
    fn close_crypto_session(&mut self, _session: SessionId) -> Result<(), BackendError> {
        Err(BackendError::Refused("the backend knows no sessions".into()))
    }

    /// Brings the queues to a stand without waiting for what is in flight, where the backend can: that stays
    /// in its notes for the next, resumed start. Elsewhere as [`Backend::stop`]. Where the queues are, in the
    /// order in which they were started; nothing when they stood.
    ///
    /// # Errors
    /// As for [`Backend::stop`].
    fn suspend(&mut self) -> Result<Vec<RingBase>, BackendError> {
        self.stop().map(|()| Vec::new())
    }

    /// Guest memory is `memory` from now on. Queues that run go on: `rings` are those that were started, in
    /// that order and with any base. When they had to stop for a moment, where they went on.
    ///
    /// # Errors
    /// When the backend cannot hold that memory, and keeps what it had; or is lost.
    fn change_memory(
        &mut self,
        _memory: &MemoryMap,
        _rings: &[Ring<'_>],
    ) -> Result<Vec<RingBase>, BackendError> {
        Err(BackendError::Refused("the backend's memory cannot change".into()))
    }

    /// Copies the backend's internal state, `most` bytes at most, to `sink`: how many there were. The queues
    /// stand. Waits as long as the state keeps coming.
    ///
    /// # Errors
    /// When there is none to be had.
    fn save_state(&mut self, _sink: &mut dyn Write, _most: u64) -> Result<u64, BackendError> {
        Err(BackendError::Refused("the backend has no state to give".into()))
    }

    /// Gives the backend the state that `source` holds.
    ///
    /// # Errors
    /// When it does not take it.
    fn load_state(&mut self, _source: &mut dyn Read) -> Result<u64, BackendError> {
        Err(BackendError::Refused("the backend takes no state".into()))
    }

    /// Has the network learn that `mac` is to be found here, when the backend can.
    ///
    /// # Errors
    /// When the backend fails.
    fn announce(&mut self, _mac: [u8; 6]) -> Result<(), BackendError> {
        Ok(())
    }

    /// Gives the backend up: nothing is asked of it any more.
    fn disconnect(&mut self);

    /// Traffic so far.
    fn stats(&self) -> BackendStats;
}
