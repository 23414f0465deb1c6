//! The survey of a vhost-user backend: its features, sizes and configuration, and the device that can be made
//! of them. Must never start the backend's queues.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use transport::memory::GuestAddr;
use transport::peer::Error;
use transport::vhost_user::features::{ProtocolFeatures, bit};
use transport::vhost_user::{Connection, IovaMap, Session};

use crate::virtio::backend::spec::Order;
use crate::virtio::types::model::SharedMemory;
use crate::virtio::types::model::{Model, ModelError, Offer};

/// The most bytes of shared memory of a device: no guest could map more.
const SHARED_MEMORY_MAX: u64 = 1 << 40;

/// Why the backend at the other end makes no device.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The backend failed.
    #[error(transparent)]
    Peer(#[from] Error),
    /// The backend works, but does not match the order.
    #[error("{peer} does not fit")]
    Unfit {
        /// The backend's name.
        peer: String,
        /// Why not.
        source: ModelError,
    },
    /// The socket of the GPU's display does not connect.
    #[error("cannot connect to the display's socket {name}")]
    Display {
        /// The address of the socket.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// No descriptor can be made.
    #[error("cannot duplicate a socket")]
    Fd(#[source] io::Error),
}

impl OpenError {
    /// A remedy that the user may try.
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

/// The result of a survey.
pub(crate) struct Survey {
    pub(crate) session: Session,
    pub(crate) model: Model,
    /// The size in bytes of the configuration that the backend returned.
    pub(crate) config_size: usize,
    /// The sizes of its shared memory regions, by id.
    pub(crate) shared: Vec<u64>,
}

impl Survey {
    /// Whether kicks and calls are messages.
    pub(crate) fn notifies_in_band(&self) -> bool {
        self.session.protocol().contains(ProtocolFeatures::INBAND_NOTIFICATIONS)
    }

    pub(crate) fn of(connection: Connection, order: &Order) -> Result<Self, OpenError> {
        let mut session = connection.negotiate(&order.wanted)?;
        if let Some(map) = &order.translations {
            session = behind(session, map)?;
        }
        let most = usize::from(order.device_type.config_size());
        let has_config = session.protocol().contains(ProtocolFeatures::CONFIG) && most > 0;
        let config = match has_config.then(|| session.read_config(most)).transpose() {
            Ok(config) => config,
            // The backend announced a configuration and does not return it. Where the device can do without,
            // this counts as no configuration.
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

/// Regions of these sizes, without places yet.
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
