//! The backend of a device over vhost-user: a `Session` while the queues stand, a `LiveSession` while
//! they run. Must never send a message of its own making: that is the transport's.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use transport::vhost_user::features::{ProtocolFeatures, UnknownFeature, Wanted};
use transport::vhost_user::{BackendChannel, Connection, Error, LiveSession, Session, Stats};

use super::backend::{Backend, BackendError, BackendStats, Start};
use super::device_type::{DeviceType, Model, ModelError, Offer, Wishes};

/// What a user wants of a vhost-user device.
#[derive(Debug, Clone)]
pub struct Order {
    /// Its type.
    pub device_type: DeviceType,
    /// Queues and sizes.
    pub wishes: Wishes,
    /// What to negotiate: see [`DeviceType::wanted`].
    pub wanted: Wanted,
}

impl Order {
    /// An order of `device_type`, with the features changed as the user says (`-name+name`).
    ///
    /// # Errors
    /// When a feature name is not known.
    pub fn new(device_type: DeviceType, wishes: Wishes, features: &str) -> Result<Self, UnknownFeature> {
        Ok(Self { device_type, wishes, wanted: device_type.wanted(features)? })
    }
}

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
            Self::Unfit { .. } => None,
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
    pub channel: Option<BackendChannel>,
    /// Readable or hung up as soon as the connection is gone, whoever ended it. Nothing is to be read
    /// from it.
    pub hang_up: OwnedFd,
}

/// Asks the backend what it offers and makes a device of that. Waits for two deadlines at most.
///
/// # Errors
/// When the backend fails, or does not fit the order.
pub fn open(connection: Connection, order: &Order) -> Result<Opened, OpenError> {
    let mut session = connection.negotiate(&order.wanted)?;
    let config_size = usize::from(order.device_type.config_size());
    let has_config = session.protocol().contains(ProtocolFeatures::CONFIG) && config_size > 0;
    let config = match has_config.then(|| session.read_config(config_size)).transpose() {
        Ok(config) => config,
        // Promised, but not given: as good as none, where the device can do without.
        Err(error) if !error.is_fatal() && !order.device_type.needs_config() => {
            log::warn!("{error}");
            None
        }
        Err(error) => return Err(error.into()),
    };
    let has_count = session.protocol().contains(ProtocolFeatures::MQ);
    let queue_num = has_count.then(|| session.queue_num());
    let offer = Offer { features: session.offered(), queue_num, config };
    let model = order.device_type.model(offer, &order.wishes).map_err(|source| OpenError::Unfit {
        peer: format!("vhost-user backend {}", session.peer()),
        source,
    })?;
    let hang_up = session.as_fd().try_clone_to_owned().map_err(OpenError::Fd)?;
    let channel = session.take_backend_channel();
    let backend = VhostUser { link: Link::Standing(session), config_size, past: Stats::default() };
    Ok(Opened { model, backend, channel, hang_up })
}

/// The connection, by what it can do.
enum Link {
    Standing(Session),
    Live(LiveSession),
    Gone,
}

/// A vhost-user backend.
pub struct VhostUser {
    link: Link,
    config_size: usize,
    /// Counters of the connection when it ended.
    past: Stats,
}

fn failed(error: Error) -> BackendError {
    if error.is_fatal() { BackendError::Lost(error.into()) } else { BackendError::Refused(error.into()) }
}

impl VhostUser {
    fn stats_now(&self) -> Stats {
        match &self.link {
            Link::Standing(session) => session.stats(),
            Link::Live(live) => live.stats(),
            Link::Gone => self.past,
        }
    }

    /// Takes the link out, remembering its counters in case it does not come back.
    fn take(&mut self) -> Link {
        self.past = self.stats_now();
        std::mem::replace(&mut self.link, Link::Gone)
    }
}

impl Backend for VhostUser {
    fn start(&mut self, start: &Start<'_>) -> Result<(), BackendError> {
        match self.take() {
            Link::Standing(session) => match session.go_live(start.features, start.memory, start.rings) {
                Ok(live) => {
                    self.link = Link::Live(live);
                    Ok(())
                }
                Err(lost) => {
                    // Only what was never sent leaves the session as it was; a backend that refuses in the
                    // middle is half started.
                    let (error, session) = lost.into_parts();
                    match session {
                        Some(session) => {
                            self.link = Link::Standing(session);
                            Err(failed(error))
                        }
                        None => Err(BackendError::Lost(error.into())),
                    }
                }
            },
            // The device starts what stands and nothing else.
            Link::Live(_) | Link::Gone => Err(BackendError::gone()),
        }
    }

    fn stop(&mut self) -> Result<(), BackendError> {
        match self.take() {
            Link::Live(live) => {
                let (session, _bases) = live.stop().map_err(|lost| BackendError::Lost(lost.into()))?;
                self.link = Link::Standing(session);
                Ok(())
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

    fn disconnect(&mut self) {
        drop(self.take());
    }

    fn stats(&self) -> BackendStats {
        let Stats { sent, answers, failures, worst_wait, .. } = self.stats_now();
        BackendStats { messages: sent, waits: answers, failures, worst_wait }
    }
}

#[cfg(test)]
#[path = "vhost_user_faults.rs"]
mod faults;
#[cfg(test)]
#[path = "vhost_user_tests.rs"]
mod tests;
