//! Virtio 1.4 §5: the device types, one row each. All types share one device model; a row only says what the
//! guest's driver expects to find. Must never hold code for a single type.

use std::str::FromStr;

use transport::vhost_user::features::{
    DeviceFeatures, DriverFeatures, ProtocolFeatures, UnknownFeature, Wanted,
};

/// The most queues that a vhost-user message can name.
pub const MAX_QUEUES: u16 = 256;
/// The largest configuration space that a vhost-user message can carry.
pub const MAX_CONFIG_SIZE: u16 = 256;
/// Bytes of a file system's tag (§5.11.4), the first field of its configuration.
pub(super) const TAG_SIZE: usize = 36;
/// The type that has an MTU and an address (§5.1.4): the type's id, the feature of the MTU, the place of the
/// MTU in the configuration, and the feature of the address.
pub(super) const NET: u32 = 1;
pub(super) const NET_F_MTU: u32 = 3;
pub(super) const MTU_PLACE: std::ops::Range<usize> = 10..12;
pub(super) const NET_F_MAC: u32 = 5;
/// The type that has a tag.
const FILE_SYSTEM: u32 = 26;
/// Entries of a queue, unless the type or the user chooses another size.
pub const DEFAULT_QUEUE_SIZE: u16 = 256;

/// VIRTIO_NET_F_CTRL_VQ and VIRTIO_NET_F_MQ.
pub(crate) const CTRL_VQ: u32 = 17;
pub(crate) const MQ: u32 = 22;

/// The purpose of a device's last queue, when the VMM serves it in place of the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Served {
    /// None: the backend serves the last queue.
    Nothing,
    /// The driver of a crypto device opens and closes sessions.
    Sessions,
    /// The driver of a network card sets the number of queue pairs that it uses.
    Pairs,
}

/// Whether a feature that the backend offers reaches the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Passage {
    /// It does if the configuration is long enough to hold the feature's fields.
    Open,
    /// It does only if the user asks for it. Backends offer it but expect the front end to do the work, or do
    /// not survive its use.
    OnRequest,
}

/// One feature bit of a device type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Feature {
    pub(super) name: &'static str,
    pub(super) bit: u32,
    /// The number of configuration bytes that a driver needs to use the feature.
    pub(super) config_end: u16,
    passage: Passage,
}

const fn feature(name: &'static str, bit: u32, config_end: u16) -> Feature {
    Feature { name, bit, config_end, passage: Passage::Open }
}

const fn on_request(name: &'static str, bit: u32) -> Feature {
    Feature { name, bit, config_end: 0, passage: Passage::OnRequest }
}

/// A configuration field with the number of queues, which only the front end knows for certain, and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueueCountField {
    pub(super) offset: usize,
    pub(super) width: usize,
    /// The number of queues that the field does not count.
    pub(super) others: u16,
    /// The number of queues that the field counts as one.
    pub(super) group: u16,
    /// The feature without which it is not there.
    pub(super) feature: Option<u32>,
}

/// A configuration field with the number of ports (§5.3.2). Each port has two queues, and the control channel
/// has two more. A driver that takes the feature needs all of these queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PortsField {
    pub(super) offset: usize,
    pub(super) feature: u32,
}

/// A field of the configuration space that the driver may write (§5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct WritableField {
    offset: usize,
    width: usize,
    /// The feature without which it is not there.
    feature: Option<u32>,
}

/// The configuration fields that a driver may write. Several backends exit at a write anywhere else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writable {
    /// Unknown: every write is passed on.
    Anything,
    /// These fields.
    Fields(&'static [WritableField]),
    /// These fields. A write of the present value is not passed on: drivers write the defaults, the reference
    /// front end keeps such writes to itself, and a backend may exit at the first such message.
    Settings(&'static [WritableField]),
    /// These fields. After a write, the backend is told the whole configuration with the change in it, as the
    /// reference front end does. Backends look for a field at its own place, whatever offset the message
    /// names, and exit at a message that ends before the field. The driver's value stays in the field,
    /// whatever the backend shows.
    Window(&'static [WritableField]),
}

impl Writable {
    fn fields(self) -> Option<&'static [WritableField]> {
        match self {
            Self::Anything => None,
            Self::Fields(fields) | Self::Settings(fields) | Self::Window(fields) => Some(fields),
        }
    }
}

const fn writable(offset: usize, width: usize) -> WritableField {
    WritableField { offset, width, feature: None }
}

const fn writable_with(feature: u32, offset: usize, width: usize) -> WritableField {
    WritableField { offset, width, feature: Some(feature) }
}

/// The configuration of a device whose backend has none (no protocol feature CONFIG).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoConfig {
    /// The device is unusable.
    Unusable,
    /// These bytes, followed by zeroes.
    Instead(&'static [u8]),
}

/// The properties of a device type that the guest's driver sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceType {
    pub(super) name: &'static str,
    pub(super) id: u32,
    pub(super) queues: u16,
    /// The feature without which the last of these queues does not exist.
    pub(super) last_queue: Option<u32>,
    pub(super) queue_size: u16,
    pub(super) config_size: u16,
    pub(super) no_config: NoConfig,
    /// The number of queues for which one unit of GET_QUEUE_NUM stands.
    pub(super) queue_unit: u16,
    pub(super) queue_count: Option<QueueCountField>,
    pub(super) ports: Option<PortsField>,
    writable: Writable,
    pub(super) features: &'static [Feature],
    /// The purpose of the last queue, when the VMM serves it.
    pub(super) served: Served,
    /// The offset of the number of screens: one, when a backend leaves it to the front end as QEMU's does (§5.7.4).
    pub(super) screens: Option<usize>,
    /// The MTU that a network card shows in place of the backend's MTU.
    pub(super) mtu: Option<u16>,
    /// The address that a network card shows in place of the backend's address.
    pub(super) mac: Option<[u8; 6]>,
    /// The tag by which a file system is mounted, in place of the backend's tag.
    pub(super) tag: Option<[u8; TAG_SIZE]>,
}

const fn row(name: &'static str, id: u32, queues: u16, config_size: u16) -> DeviceType {
    DeviceType {
        name,
        id,
        queues,
        last_queue: None,
        queue_size: DEFAULT_QUEUE_SIZE,
        config_size,
        no_config: if config_size == 0 { NoConfig::Instead(&[]) } else { NoConfig::Unusable },
        queue_unit: 1,
        queue_count: None,
        ports: None,
        writable: Writable::Fields(&[]),
        features: &[],
        served: Served::Nothing,
        screens: None,
        mtu: None,
        mac: None,
        tag: None,
    }
}

const BLK_FEATURES: &[Feature] = &[
    feature("size_max", 1, 12),
    feature("seg_max", 2, 16),
    feature("geometry", 4, 20),
    feature("ro", 5, 0),
    feature("blk_size", 6, 24),
    feature("flush", 9, 0),
    feature("topology", 10, 32),
    feature("config_wce", 11, 33),
    feature("blk_mq", 12, 36),
    feature("discard", 13, 48),
    feature("write_zeroes", 14, 57),
    feature("lifetime", 15, 0),
    feature("secure_erase", 16, 72),
    feature("zoned", 17, 93),
];

// In every VMM the front end serves the control queue of vhost-user network devices. So backends offer the
// queue's features without serving it. Our control queue takes only the number of pairs: we have no data
// plane for filters.
const NET_FEATURES: &[Feature] = &[
    feature("csum", 0, 0),
    feature("guest_csum", 1, 0),
    on_request("ctrl_guest_offloads", 2),
    feature("mtu", 3, 12),
    feature("mac", 5, 6),
    feature("mrg_rxbuf", 15, 0),
    feature("status", 16, 8),
    on_request("ctrl_vq", 17),
    on_request("ctrl_rx", 18),
    on_request("ctrl_vlan", 19),
    on_request("ctrl_rx_extra", 20),
    on_request("guest_announce", 21),
    on_request("net_mq", 22),
    on_request("ctrl_mac_addr", 23),
    on_request("vq_notf_coal", 52),
    on_request("notf_coal", 53),
    on_request("hash_report", 57),
    on_request("rss", 60),
    on_request("standby", 62),
    feature("speed_duplex", 63, 17),
];

/// The driver of a sound card fills the event queue before DRIVER_OK, without a kick (§5.14), and the front end
/// kicks every queue at the start, as a lost kick is a hang. `vhost-device-sound` takes nothing from that queue,
/// and with event index it loops until the buffers are taken. No sound is so fast that it needs event index.
const SOUND_FEATURES: &[Feature] = &[on_request("event_idx", 29)];

/// The features of the last queue: alarms of a clock, events of an SCMI device, events of GPIO lines.
const RTC_F_ALARM: u32 = 0;
const SCMI_F_P2A_CHANNELS: u32 = 0;
const GPIO_F_IRQ: u32 = 0;
const RTC_FEATURES: &[Feature] = &[feature("alarm", RTC_F_ALARM, 0)];
const SCMI_FEATURES: &[Feature] =
    &[feature("p2a_channels", SCMI_F_P2A_CHANNELS, 0), feature("shared_memory", 1, 0)];
const GPIO_FEATURES: &[Feature] = &[feature("irq", GPIO_F_IRQ, 0)];
const I2C_FEATURES: &[Feature] = &[feature("zero_length_request", 0, 0)];

const CONSOLE_FEATURES: &[Feature] =
    &[feature("size", 0, 4), feature("multiport", 1, 8), feature("emerg_write", 2, 12)];

/// num_queues 1, seg_max 126, max_sectors 65535, cmd_per_lun 128, event_info_size 16, sense_size 96, cdb_size
/// 32, max_channel 0, max_target 255, max_lun 16383: the values that drivers find in other VMMs (§5.6.4).
const SCSI_CONFIG: &[u8] = &[
    1, 0, 0, 0, 126, 0, 0, 0, 0xff, 0xff, 0, 0, 128, 0, 0, 0, 16, 0, 0, 0, 96, 0, 0, 0, 32, 0, 0, 0, 0, 0,
    255, 0, 0xff, 0x3f, 0, 0,
];

/// Status ready, the service cipher with AES-CBC, keys of 64 and 512 bytes, requests of any size (§5.9.5).
/// These are the values of the reference front end, as backends leave the configuration to the front end.
const CRYPTO_CONFIG: &[u8] = &[
    1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 64, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
];

/// The rows. The configuration sizes are accepted by real backends: several refuse one byte more.
const TYPES: &[DeviceType] = &[
    DeviceType {
        no_config: NoConfig::Instead(&[]),
        // The reference front end and its backends take GET_QUEUE_NUM as a number of pairs.
        queue_unit: 2,
        queue_count: Some(QueueCountField { offset: 8, width: 2, others: 0, group: 2, feature: Some(22) }),
        features: NET_FEATURES,
        ..row("net", 1, 2, 24)
    },
    DeviceType {
        queue_count: Some(QueueCountField { offset: 34, width: 2, others: 0, group: 1, feature: Some(12) }),
        // writeback
        writable: Writable::Fields(&[writable_with(11, 32, 1)]),
        features: BLK_FEATURES,
        // The configuration up to write zeroes: qemu-storage-daemon and others know no more.
        ..row("blk", 2, 1, 60)
    },
    DeviceType {
        // For the same reason as for scsi.
        queue_size: 128,
        no_config: NoConfig::Instead(&[]),
        // max_nr_ports
        ports: Some(PortsField { offset: 4, feature: 1 }),
        // emerg_wr
        writable: Writable::Fields(&[writable_with(2, 8, 4)]),
        features: CONSOLE_FEATURES,
        ..row("console", 3, 2, 12)
    },
    row("rng", 4, 1, 0),
    DeviceType {
        // The size of the reference front end. A current backend handles no larger queue, and does not report
        // an error.
        queue_size: 128,
        no_config: NoConfig::Instead(SCSI_CONFIG),
        queue_count: Some(QueueCountField { offset: 0, width: 4, others: 2, group: 1, feature: None }),
        // sense_size, cdb_size
        writable: Writable::Settings(&[writable(20, 4), writable(24, 4)]),
        ..row("scsi", 8, 3, 36)
    },
    // events_clear
    DeviceType { screens: Some(8), writable: Writable::Window(&[writable(4, 4)]), ..row("gpu", 16, 2, 16) },
    DeviceType { last_queue: Some(RTC_F_ALARM), features: RTC_FEATURES, ..row("rtc", 17, 2, 0) },
    // select, subsel
    DeviceType { writable: Writable::Window(&[writable(0, 1), writable(1, 1)]), ..row("input", 18, 2, 136) },
    row("vsock", 19, 3, 8),
    DeviceType {
        served: Served::Sessions,
        no_config: NoConfig::Instead(CRYPTO_CONFIG),
        queue_count: Some(QueueCountField { offset: 4, width: 4, others: 1, group: 1, feature: None }),
        ..row("crypto", 20, 2, 56)
    },
    // Current backends refuse larger queues. The reference front end uses this size.
    DeviceType { queue_size: 64, features: SOUND_FEATURES, ..row("sound", 25, 4, 12) },
    DeviceType {
        queue_count: Some(QueueCountField { offset: 36, width: 4, others: 1, group: 1, feature: None }),
        ..row("fs", FILE_SYSTEM, 2, 40)
    },
    DeviceType { last_queue: Some(SCMI_F_P2A_CHANNELS), features: SCMI_FEATURES, ..row("scmi", 32, 2, 0) },
    DeviceType { features: I2C_FEATURES, ..row("i2c", 34, 1, 0) },
    DeviceType { queue_size: 64, no_config: NoConfig::Instead(&[]), ..row("can", 36, 3, 2) },
    DeviceType { last_queue: Some(GPIO_F_IRQ), features: GPIO_FEATURES, ..row("gpio", 41, 2, 8) },
    row("spi", 45, 1, 32),
    row("media", 48, 2, 40),
];

/// Why a name or a value makes no device type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TypeError {
    /// No row has this name.
    #[error("there is no device type called `{0}`")]
    Unknown(String),
    /// The text after `generic:` is no device id.
    #[error("`{0}` is not a virtio device id between 1 and 65535")]
    Id(String),
    /// The configuration size is out of range.
    #[error("the configuration size {0} is above {MAX_CONFIG_SIZE}")]
    ConfigSize(u16),
    /// Only network cards have one.
    #[error("a {0} device has no MTU, only net has")]
    NoMtu(&'static str),
    /// The MTU is below the minimum of IPv4.
    #[error("the MTU {0} is below 68")]
    Mtu(u16),
    /// Only network cards have one.
    #[error("a {0} device has no address, only net has")]
    NoMac(&'static str),
    /// The address is zero or a group address.
    #[error("that is the address of no single station")]
    Mac,
    /// Only file systems have a tag.
    #[error("a {0} device has no tag, only fs has")]
    NoTag(&'static str),
    /// The tag is empty or longer than its field.
    #[error("the tag `{0}` is not 1 to {TAG_SIZE} bytes long")]
    Tag(String),
}

impl FromStr for DeviceType {
    type Err = TypeError;

    /// A name of the table, or `generic:ID`.
    fn from_str(text: &str) -> Result<Self, TypeError> {
        match text.strip_prefix("generic:") {
            Some(id) => match id.parse() {
                Ok(number) if number != 0 => Ok(Self::generic(number)),
                _ => Err(TypeError::Id(id.to_owned())),
            },
            None => Self::named(text).ok_or_else(|| TypeError::Unknown(text.to_owned())),
        }
    }
}

impl DeviceType {
    /// The type called `name` on the command line.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        TYPES.iter().find(|row| row.name == name).copied()
    }

    /// All names, in the order of their ids.
    #[must_use]
    pub fn names() -> Vec<&'static str> {
        TYPES.iter().map(|row| row.name).collect()
    }

    /// A type of which only the id is known: by default one queue and no configuration.
    #[must_use]
    pub fn generic(id: u16) -> Self {
        DeviceType { writable: Writable::Anything, ..row("generic", id.into(), 1, 0) }
    }

    /// The same type with another size of the configuration space.
    ///
    /// # Errors
    /// When a message cannot carry so many bytes.
    pub fn with_config_size(self, config_size: u16) -> Result<Self, TypeError> {
        if config_size > MAX_CONFIG_SIZE {
            return Err(TypeError::ConfigSize(config_size));
        }
        Ok(Self { config_size, ..self })
    }

    /// The same type with the user's tag. The tag also takes the place of a missing configuration: some file
    /// system backends have none, and leave the tag to the front end.
    ///
    /// # Errors
    /// When the type is no file system, or the tag does not fit.
    pub fn with_tag(self, tag: &str) -> Result<Self, TypeError> {
        if self.id != FILE_SYSTEM {
            return Err(TypeError::NoTag(self.name));
        }
        let mut field = [0; TAG_SIZE];
        match field.get_mut(..tag.len()) {
            Some(place) if !tag.is_empty() => place.copy_from_slice(tag.as_bytes()),
            _ => return Err(TypeError::Tag(tag.to_owned())),
        }
        Ok(Self { tag: Some(field), no_config: NoConfig::Instead(&[]), ..self })
    }

    /// The same type with the user's MTU, which the guest is told.
    ///
    /// # Errors
    /// When the type is no network card, or the MTU is below 68.
    pub fn with_mtu(self, mtu: u16) -> Result<Self, TypeError> {
        match (self.id, mtu) {
            (NET, 68..) => Ok(Self { mtu: Some(mtu), ..self }),
            (NET, _) => Err(TypeError::Mtu(mtu)),
            _ => Err(TypeError::NoMtu(self.name)),
        }
    }

    /// The user's MTU.
    #[must_use]
    pub fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    /// The same type with the user's address, which the guest is told. The backend learns the address from
    /// the guest's frames.
    ///
    /// # Errors
    /// When the type is no network card, or the address is zero or a group address.
    pub fn with_mac(self, mac: [u8; 6]) -> Result<Self, TypeError> {
        match (self.id, mac) {
            (NET, [0, 0, 0, 0, 0, 0]) => Err(TypeError::Mac),
            (NET, [first, ..]) if first & 1 != 0 => Err(TypeError::Mac),
            (NET, _) => Ok(Self { mac: Some(mac), ..self }),
            _ => Err(TypeError::NoMac(self.name)),
        }
    }

    /// The address that a network card's guest knows, for a driver that took `features`.
    #[must_use]
    pub fn mac(&self, features: DriverFeatures, config: &[u8]) -> Option<[u8; 6]> {
        let known = self.id == NET && features.has(NET_F_MAC);
        config.first_chunk().copied().filter(|_| known)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its virtio device id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Bytes of configuration to ask the backend for.
    #[must_use]
    pub fn config_size(&self) -> u16 {
        self.config_size
    }

    /// Whether a device of this type is of no use without a configuration.
    #[must_use]
    pub fn needs_config(&self) -> bool {
        self.no_config == NoConfig::Unusable
    }

    /// Whether a driver that was offered `features` may write `length` bytes of configuration at `offset`.
    /// All bytes have to lie within one field that exists.
    #[must_use]
    pub fn driver_may_write(&self, features: DeviceFeatures, offset: usize, length: usize) -> bool {
        let Some(fields) = self.writable.fields() else { return true };
        let within = |field: &WritableField| {
            let start = offset.checked_sub(field.offset);
            start.and_then(|start| start.checked_add(length)).is_some_and(|end| end <= field.width)
        };
        let there = |field: &WritableField| field.feature.is_none_or(|bit| features.has(bit));
        fields.iter().any(|field| there(field) && within(field))
    }

    /// The purpose of the last queue, when the VMM serves it.
    pub(crate) fn served(&self) -> Served {
        self.served
    }

    /// Whether the backend need not be told of a write of `data` at `offset` of `config`, because a setting
    /// has this value already.
    #[must_use]
    pub fn is_settled(&self, config: &[u8], offset: usize, data: &[u8]) -> bool {
        matches!(self.writable, Writable::Settings(_))
            && config.get(offset..).is_some_and(|rest| rest.starts_with(data))
    }

    /// The whole of `config` with `data` at `offset`, if the backend is to be told of such a write by the
    /// whole configuration.
    #[must_use]
    pub fn whole_after(&self, config: &[u8], offset: usize, data: &[u8]) -> Option<Vec<u8>> {
        let Writable::Window(_) = self.writable else { return None };
        let mut config = config.to_vec();
        let place = config.get_mut(offset..offset.checked_add(data.len())?)?;
        place.copy_from_slice(data);
        Some(config)
    }

    /// Copies the fields of a window, which the driver wrote, from `old` into the `config` that the backend
    /// shows.
    pub fn keep_written(&self, old: &[u8], config: &mut [u8]) {
        let Writable::Window(fields) = self.writable else { return };
        for field in fields {
            let place = field.offset..field.offset.saturating_add(field.width);
            if let (Some(kept), Some(place)) = (old.get(place.clone()), config.get_mut(place)) {
                place.copy_from_slice(kept);
            }
        }
    }

    /// The features to negotiate with a backend of this type: the defaults, without features that need a
    /// request, changed as the user says (`-name+name`). The names of this type's features are those of the
    /// specification in lower case. One exception: `mq` is the protocol feature, and the device features are
    /// `blk_mq` and `net_mq`. All other names are those of `transport`.
    ///
    /// # Errors
    /// When a name is not known.
    pub fn wanted(&self, changes: &str) -> Result<Wanted, UnknownFeature> {
        self.wanted_of(Self::defaults(), changes)
    }

    /// The features that are negotiated with every backend that offers them: features that `transport`
    /// handles alone, and features that every device implements for its backend.
    pub(crate) fn defaults() -> Wanted {
        Wanted::default().and(
            ProtocolFeatures::BACKEND_SEND_FD
                .with(ProtocolFeatures::SHMEM)
                .with(ProtocolFeatures::SHARED_OBJECT),
        )
    }

    /// Like [`DeviceType::wanted`], from other defaults.
    pub(crate) fn wanted_of(&self, defaults: Wanted, changes: &str) -> Result<Wanted, UnknownFeature> {
        let mut text = String::new();
        for feature in self.features.iter().filter(|f| f.passage == Passage::OnRequest) {
            text.push_str(&format!("-bit{}", feature.bit));
        }
        if self.served == Served::Pairs {
            text.push_str(&format!("+bit{}+bit{}", CTRL_VQ, MQ));
        }
        if self.served == Served::Sessions {
            // The configuration comes from the front end: the reference front end never asks the backend.
            // DPDK offers CONFIG with any type, and hangs up when it is asked.
            text.push_str("-config");
        }
        // The text is split so that each piece keeps its sign.
        for piece in changes.split_inclusive(['+', '-']) {
            let (name, sign) = match piece.char_indices().next_back() {
                Some((at, sign @ ('+' | '-'))) => (piece.get(..at).unwrap_or_default(), Some(sign)),
                _ => (piece, None),
            };
            let known = self.features.iter().find(|f| f.name.eq_ignore_ascii_case(name));
            match known {
                Some(feature) => text.push_str(&format!("bit{}", feature.bit)),
                None => text.push_str(name),
            }
            text.extend(sign);
        }
        let own = match self.id {
            _ if self.served == Served::Sessions => ProtocolFeatures::CRYPTO_SESSION,
            NET => ProtocolFeatures::MTU.with(ProtocolFeatures::RARP),
            _ => ProtocolFeatures::NONE,
        };
        defaults.and(own).adjust(&text)
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
