//! The user's wishes for a vhost-user device, as data, and the socket of a display. Must never speak to a
//! backend.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use transport::peer::deadline::Deadline;
use transport::peer::socket::{self, Admission};
use transport::vhost_user::IovaMap;
use transport::vhost_user::features::{ProtocolFeatures, UnknownFeature, Wanted, bit};

use crate::virtio::types::model::Wishes;
use crate::virtio::types::table::DeviceType;

/// The user's wishes for a vhost-user device.
#[derive(Debug, Clone)]
pub struct Order {
    /// Its type.
    pub device_type: DeviceType,
    /// Queues and sizes.
    pub wishes: Wishes,
    /// The features to negotiate: see [`DeviceType::wanted`].
    pub wanted: Wanted,
    /// The user's changes to the features to negotiate.
    changes: String,
    /// Protocol features that this device wants beyond the defaults of all devices.
    extra: ProtocolFeatures,
    /// Whether the device is to survive the loss of its backend.
    outlives: bool,
    /// The translations of a device behind an IOMMU.
    pub(crate) translations: Option<Arc<IovaMap>>,
    /// Where a GPU's backend draws.
    pub(crate) display: Option<Display>,
}

impl Order {
    /// An order of `device_type`, with the features changed as the user says (`-name+name`).
    ///
    /// # Errors
    /// When a feature name is not known.
    pub fn new(device_type: DeviceType, wishes: Wishes, features: &str) -> Result<Self, UnknownFeature> {
        let device_type = device_type.wished(&wishes);
        let wanted = device_type.wanted(features)?;
        let (changes, extra) = (features.to_owned(), ProtocolFeatures::NONE);
        let (translations, display) = (None, None);
        Ok(Self { device_type, wishes, wanted, changes, extra, outlives: false, translations, display })
    }

    /// The order for a device that survives the loss of its backend. It wants an inflight area, unless the
    /// user does not. It wants no packed rings, unless the user does, as only the lost backend knows how far
    /// it got in a packed ring.
    #[must_use]
    pub fn recoverable(mut self) -> Self {
        self.outlives = true;
        self.with(ProtocolFeatures::INFLIGHT_SHMFD)
    }

    /// The order for a device with one page for each queue's notifications, over which a backend may put a
    /// page of its own. The user may decline this feature.
    #[must_use]
    pub fn with_notifiers(self) -> Self {
        self.with(ProtocolFeatures::HOST_NOTIFIER)
    }

    fn with(mut self, feature: ProtocolFeatures) -> Self {
        self.extra = self.extra.with(feature);
        let mut defaults = DeviceType::defaults().and(self.extra);
        if self.outlives {
            defaults = defaults.adjust("-ring_packed").unwrap_or(defaults);
        }
        // The names of the changes were checked when the order was made.
        self.wanted = self.device_type.wanted_of(defaults, &self.changes).unwrap_or(self.wanted);
        if self.translations.is_some() {
            self.offer_access_platform();
        }
        self
    }

    /// The order for a device behind an IOMMU with these translations: VIRTIO_F_ACCESS_PLATFORM is offered,
    /// and a backend without it does not fit.
    #[must_use]
    pub fn behind(mut self, translations: Arc<IovaMap>) -> Self {
        self.translations = Some(translations);
        self.offer_access_platform();
        self
    }

    /// The order for a GPU whose backend draws on `display`.
    #[must_use]
    pub fn drawing_on(mut self, display: Display) -> Self {
        self.display = Some(display);
        self
    }

    fn offer_access_platform(&mut self) {
        self.wanted = self.wanted.adjust("+access_platform").unwrap_or(self.wanted);
    }

    /// Whether the driver is to be offered VIRTIO_F_ACCESS_PLATFORM.
    #[must_use]
    pub fn wants_iommu(&self) -> bool {
        self.wanted.device().has(bit::ACCESS_PLATFORM)
    }
}

/// The socket of the display protocol, which each GPU backend receives after it connects (GPU_SET_SOCKET).
/// Only the backend and the display use it.
#[derive(Debug, Clone)]
pub enum Display {
    /// The display listens here; each backend gets a connection of its own.
    Path(PathBuf),
    /// A connection that the parent process left open for us. All backends get the same one.
    Open(Arc<OwnedFd>),
}

impl fmt::Display for Display {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Open(_) => f.write_str("that was inherited"),
        }
    }
}

impl Display {
    /// A descriptor for the next backend. Waits for `limit` at most.
    pub(crate) fn socket(&self, limit: Duration) -> io::Result<OwnedFd> {
        match self {
            Self::Path(path) => {
                let stream = socket::connect(path, &Deadline::after(limit), Admission::default())?;
                // Our sockets are non-blocking, but a backend writes a whole picture at once, which is larger
                // than the socket's buffer.
                stream.set_nonblocking(false)?;
                Ok(stream.into())
            }
            Self::Open(fd) => fd.try_clone(),
        }
    }
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
