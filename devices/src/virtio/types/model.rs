//! The model of a device, made of its type, of the backend's offer and of the user's wishes. Must never show
//! the driver a feature whose configuration field is missing.

use transport::memory::GuestAddr;
use transport::vhost_user::features::{DeviceFeatures, bit};

use crate::virtio::ring::queue::MAX_QUEUE_SIZE;
use crate::virtio::types::table::{
    CTRL_VQ, DeviceType, MAX_QUEUES, MQ, MTU_PLACE, NET, NET_F_MAC, NET_F_MTU, NoConfig, Served, TAG_SIZE,
};

/// The features that are not taken from a backend when the VMM serves the last queue: the VMM serves only
/// split queues.
const UNSERVED: u64 = 1 << bit::RING_PACKED;

/// A range of guest addresses that device and driver share (§2.10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedMemory {
    /// Where the guest finds it.
    pub base: GuestAddr,
    /// Bytes.
    pub length: u64,
}

/// The result of asking a backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Device features, without the features that the user does not want.
    pub features: DeviceFeatures,
    /// The answer to GET_QUEUE_NUM, if the backend gives one.
    pub queue_num: Option<u16>,
    /// The configuration space, when the backend has one.
    pub config: Option<Vec<u8>>,
}

/// The user's wishes for a device, beyond its type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wishes {
    /// How many queues.
    pub queues: Option<u16>,
    /// The largest size of each; a power of two.
    pub queue_size: Option<u16>,
}

/// A device as the guest will see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// Its type.
    pub device_type: DeviceType,
    /// Features offered to the driver.
    pub features: DeviceFeatures,
    /// How many queues.
    pub queues: u16,
    /// The largest size of each.
    pub queue_size: u16,
    /// The configuration space.
    pub config: Vec<u8>,
    /// Where the configuration comes from.
    pub config_source: ConfigSource,
    /// Shared memory regions by id; the machine chooses their guest addresses.
    pub shared_memory: Vec<Option<SharedMemory>>,
}

/// The source of a device's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfigSource {
    /// The backend. The configuration is read again after a change, and writes go to the backend.
    Backend,
    /// The front end; the configuration never changes.
    Fixed,
}

/// Why no device can be made with a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// The backend speaks only the interface from before virtio 1.0.
    #[error("the backend does not offer VIRTIO_F_VERSION_1 (bit 32), it is a legacy device")]
    Legacy,
    /// The backend has fewer queues than the type's driver needs.
    #[error("the backend serves {has} queues, a {kind} device needs {needs}")]
    TooFewQueues {
        /// The type.
        kind: &'static str,
        /// What the backend serves.
        has: u16,
        /// What the driver needs.
        needs: u16,
    },
    /// The backend has no configuration, and the device needs one.
    #[error("the backend has no configuration space (protocol feature CONFIG), a {kind} device needs one")]
    NoConfig {
        /// The type.
        kind: &'static str,
    },
    /// The backend cannot be told of translations.
    #[error(
        "the backend cannot work behind an IOMMU: it does not offer VIRTIO_F_ACCESS_PLATFORM (bit 33) with the \
         protocol features BACKEND_REQ and REPLY_ACK"
    )]
    NoIommu,
    /// The driver cannot be told of the MTU.
    #[error("the backend does not offer VIRTIO_NET_F_MTU (bit 3), the guest cannot be told of an MTU")]
    NoMtu,
    /// No machine has room for it.
    #[error("the backend wants more than 1 TiB of shared memory")]
    SharedMemory,
    /// The number of queues is out of range.
    #[error("the number of queues {0} is not between 1 and {MAX_QUEUES}")]
    Queues(u16),
    /// The queue size is out of range.
    #[error("the queue size {0} is not a power of two up to {MAX_QUEUE_SIZE}")]
    QueueSize(u16),
}

impl Wishes {
    /// Checks the wishes as far as possible without a backend.
    ///
    /// # Errors
    /// When a value is out of its range.
    pub fn validate(&self) -> Result<(), ModelError> {
        if let Some(queues) = self.queues.filter(|q| !(1..=MAX_QUEUES).contains(q)) {
            return Err(ModelError::Queues(queues));
        }
        if let Some(size) = self.queue_size.filter(|s| !s.is_power_of_two() || *s > MAX_QUEUE_SIZE) {
            return Err(ModelError::QueueSize(size));
        }
        Ok(())
    }
}

impl DeviceType {
    /// The type as the user wishes it. A network card with more than one pair of queues gets a control queue,
    /// on which its driver sets the number of pairs in use.
    pub(crate) fn wished(mut self, wishes: &Wishes) -> Self {
        let several = self.id == NET && wishes.queues.is_some_and(|queues| queues >= 4);
        {
            if several {
                self.served = Served::Pairs;
            }
            self
        }
    }

    /// Makes a device of the backend's offer and the user's wishes.
    ///
    /// # Errors
    /// When the offer and the wishes do not fit together.
    pub fn model(mut self, offer: Offer, wishes: &Wishes) -> Result<Model, ModelError> {
        wishes.validate()?;
        let Offer { mut features, queue_num, config } = offer;
        if !features.has(bit::VERSION_1) {
            return Err(ModelError::Legacy);
        }
        if self.served == Served::Pairs {
            let needs = 1 << CTRL_VQ | 1 << MQ;
            if features.bits() & needs != needs || queue_num.is_none_or(|pairs| pairs < 2) {
                log::warn!("the net backend has no several pairs of queues: drivers use one");
                features = DeviceFeatures::from_bits(features.bits() & !needs);
                self.served = Served::Nothing;
            }
        }
        let ours = u16::from(self.served != Served::Nothing);
        // Whole pairs and one control queue.
        let most = if self.served == Served::Pairs { MAX_QUEUES - 1 } else { MAX_QUEUES };
        let of_backend = |n: u16| n.saturating_mul(self.queue_unit).saturating_add(ours).min(most);
        let served = queue_num.map_or(most, of_backend);
        let ported = self.queues_for_ports(features, config.as_deref().unwrap_or_default());
        let lacking = self.last_queue.is_some_and(|feature| !features.has(feature));
        let needs = self.queues.saturating_sub(u16::from(lacking));
        let wished = wishes.queues.map(|n| if self.served == Served::Pairs { n / 2 * 2 + 1 } else { n });
        let queues = wished.unwrap_or(ported.unwrap_or(needs).min(served.max(needs)));
        if served < queues.min(needs) {
            return Err(ModelError::TooFewQueues { kind: self.name, has: served, needs });
        }
        if served < queues {
            log::warn!("the {} backend serves {served} queues, not {queues}", self.name);
        }
        let config_size = usize::from(self.config_size);
        let config_source = if config.is_some() { ConfigSource::Backend } else { ConfigSource::Fixed };
        let mut config = match (config, self.no_config) {
            (Some(config), _) => config,
            (None, NoConfig::Instead(bytes)) => bytes.to_vec(),
            (None, NoConfig::Unusable) => return Err(ModelError::NoConfig { kind: self.name }),
        };
        if self.mtu.is_some() && !features.has(NET_F_MTU) {
            return Err(ModelError::NoMtu);
        }
        let told = if self.mtu.is_some() { 1 << NET_F_MTU } else { 0 };
        // Only the guest uses the address, so the backend need not offer the feature.
        let ours = if self.mac.is_some() { 1 << NET_F_MAC } else { 0 };
        let shown = self.visible(features, config.len()).bits() | features.bits() & told | ours;
        let mut features = DeviceFeatures::from_bits(shown);
        if let (Some(field), Some(needed)) = (self.ports, ported)
            && needed > queues.min(served)
        {
            log::warn!("a {} device with ports needs {needed} queues: it gets no ports", self.name);
            features = DeviceFeatures::from_bits(features.bits() & !(1 << field.feature));
        }
        config.resize(config_size, 0);
        let queues = queues.min(served);
        self.patch(&mut config, features, queues);
        let queue_size = wishes.queue_size.unwrap_or(self.queue_size);
        let shared_memory = Vec::new();
        Ok(Model { device_type: self, features, queues, queue_size, config, config_source, shared_memory })
    }

    /// The number of queues that the driver expects when there are ports.
    fn queues_for_ports(&self, features: DeviceFeatures, config: &[u8]) -> Option<u16> {
        let field = self.ports.filter(|field| features.has(field.feature))?;
        let ports = config.get(field.offset..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))?;
        let queues = ports.max(1).saturating_add(1).saturating_mul(2);
        Some(u16::try_from(queues).unwrap_or(u16::MAX))
    }

    /// Removes the features whose configuration fields are missing, as a driver would read zeroes.
    fn visible(&self, features: DeviceFeatures, config_size: usize) -> DeviceFeatures {
        let lacking = self.features.iter().filter(|f| usize::from(f.config_end) > config_size);
        let unserved = if self.served == Served::Nothing { 0 } else { UNSERVED };
        DeviceFeatures::from_bits(lacking.fold(features.bits() & !unserved, |bits, f| bits & !(1 << f.bit)))
    }

    /// Writes the fields that the front end decides: the user's tag, address and MTU, one screen if the
    /// backend leaves the number to the front end, and the number of queues. The backend's number of queues
    /// may differ from the number that we show.
    pub fn patch(&self, config: &mut [u8], features: DeviceFeatures, queues: u16) {
        if let (Some(tag), Some(place)) = (self.tag, config.get_mut(..TAG_SIZE)) {
            place.copy_from_slice(&tag);
        }
        if let (Some(mac), Some(place)) = (self.mac, config.first_chunk_mut()) {
            *place = mac;
        }
        if let (Some(mtu), Some(place)) = (self.mtu, config.get_mut(MTU_PLACE)) {
            place.copy_from_slice(&mtu.to_le_bytes());
        }
        let screens = self.screens.and_then(|at| config.get_mut(at..)?.first_chunk_mut::<4>());
        if let Some(none @ [0, 0, 0, 0]) = screens {
            *none = 1_u32.to_le_bytes();
        }
        let Some(field) = self.queue_count else { return };
        if field.feature.is_some_and(|bit| !features.has(bit)) {
            return;
        }
        let count = queues.saturating_sub(field.others).checked_div(field.group).unwrap_or(0);
        let bytes = u32::from(count).to_le_bytes();
        if let Some(place) = config.get_mut(field.offset..).and_then(|rest| rest.get_mut(..field.width)) {
            place.iter_mut().zip(bytes).for_each(|(old, new)| *old = new);
        }
    }
}
