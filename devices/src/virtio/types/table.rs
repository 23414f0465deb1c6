//! Virtio 1.4 §5: the device types, one row each. All types share one device model; a row only says
//! what the guest's driver expects to find. Holds no code for a single type.

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
/// The type that has an MTU (§5.1.4), the feature that says so and the place in its configuration; and the feature
/// that says that it has an address.
pub(super) const NET: u32 = 1;
pub(super) const NET_F_MTU: u32 = 3;
pub(super) const MTU_PLACE: std::ops::Range<usize> = 10..12;
pub(super) const NET_F_MAC: u32 = 5;
/// The type that has a tag.
const FILE_SYSTEM: u32 = 26;
/// Entries of a queue unless the type or the user says otherwise.
pub const DEFAULT_QUEUE_SIZE: u16 = 256;

/// VIRTIO_NET_F_CTRL_VQ and VIRTIO_NET_F_MQ.
pub(crate) const CTRL_VQ: u32 = 17;
pub(crate) const MQ: u32 = 22;

/// What the last queue of a device is for, where the VMM serves it in the place of the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Served {
    /// The backend serves it.
    Nothing,
    /// A crypto device's sessions are opened and closed.
    Sessions,
    /// A network card's driver says how many pairs of queues it uses.
    Pairs,
}

/// Whether a feature that the backend offers reaches the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Passage {
    /// When the configuration that we have holds the fields that it speaks of.
    Open,
    /// Only when the user asks for it: backends offer it and expect the front end to do the work, or do not survive it.
    OnRequest,
}

/// One feature bit of a device type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Feature {
    pub(super) name: &'static str,
    pub(super) bit: u32,
    /// Bytes of configuration space without which it means nothing to the driver.
    pub(super) config_end: u16,
    passage: Passage,
}

const fn feature(name: &'static str, bit: u32, config_end: u16) -> Feature {
    Feature { name, bit, config_end, passage: Passage::Open }
}

const fn on_request(name: &'static str, bit: u32) -> Feature {
    Feature { name, bit, config_end: 0, passage: Passage::OnRequest }
}

/// A configuration field that says how many queues there are, which only we know for certain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueueCountField {
    pub(super) offset: usize,
    pub(super) width: usize,
    /// Queues that it does not count.
    pub(super) others: u16,
    /// Queues that count as one.
    pub(super) group: u16,
    /// The feature without which it is not there.
    pub(super) feature: Option<u32>,
}

/// A configuration field that says how many ports there are, each with two queues, beside the two of the
/// control channel (§5.3.2): a driver that takes the feature wants them all.
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

/// What a driver may write. Several backends exit when they are told of a write anywhere else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writable {
    /// We do not know, and pass everything on.
    Anything,
    /// These fields.
    Fields(&'static [WritableField]),
    /// These fields, and the backend need not hear of a value that it has already: drivers write the defaults
    /// there, the reference front end keeps them to itself, and so a backend may die of the first such message.
    Settings(&'static [WritableField]),
    /// These fields, and the backend is told the whole configuration with the change in it, as by the reference front end:
    /// backends look for a field at its own place, whatever offset the message names, and die of a message that ends
    /// before it. What the driver wrote there stays, whatever the backend shows.
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

/// What the configuration is when the backend has none to read (no protocol feature CONFIG).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoConfig {
    /// The device is useless then.
    Unusable,
    /// These bytes, and zeroes after them.
    Instead(&'static [u8]),
}

/// What a device type is to the guest's driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceType {
    pub(super) name: &'static str,
    pub(super) id: u32,
    pub(super) queues: u16,
    /// The feature without which the last of them is not there.
    pub(super) last_queue: Option<u32>,
    pub(super) queue_size: u16,
    pub(super) config_size: u16,
    pub(super) no_config: NoConfig,
    /// What one unit of GET_QUEUE_NUM stands for.
    pub(super) queue_unit: u16,
    pub(super) queue_count: Option<QueueCountField>,
    pub(super) ports: Option<PortsField>,
    writable: Writable,
    pub(super) features: &'static [Feature],
    /// What the last queue is for, when it is ours to serve.
    pub(super) served: Served,
    /// Where the number of screens is: one, when a backend leaves it to the front end as QEMU's does (§5.7.4).
    pub(super) screens: Option<usize>,
    /// The MTU that a network card shows, in place of the backend's.
    pub(super) mtu: Option<u16>,
    /// The address that a network card shows, in place of the backend's.
    pub(super) mac: Option<[u8; 6]>,
    /// What a file system is mounted by, in place of the backend's own word for it.
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

// The control queue of vhost-user network devices is the front end's work in every VMM, and so backends offer it without
// serving it. Ours takes the number of pairs and nothing else: we have no data plane to filter with.
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

/// A sound card's driver fills the event queue before DRIVER_OK and says so to nobody (§5.14). Every queue is kicked at the
/// start all the same, as a lost kick is a hang; `vhost-device-sound` takes nothing from this one, and with event index turns in
/// circles then until somebody does. No sound is so fast that it needs event index.
const SOUND_FEATURES: &[Feature] = &[on_request("event_idx", 29)];

/// The alarm queue of a clock, the event queues of an SCMI device and of lines.
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

/// num_queues 1, seg_max 126, max_sectors 65535, cmd_per_lun 128, event_info_size 16, sense_size 96,
/// cdb_size 32, max_channel 0, max_target 255, max_lun 16383: what drivers find elsewhere (§5.6.4).
const SCSI_CONFIG: &[u8] = &[
    1, 0, 0, 0, 126, 0, 0, 0, 0xff, 0xff, 0, 0, 128, 0, 0, 0, 16, 0, 0, 0, 96, 0, 0, 0, 32, 0, 0, 0, 0, 0,
    255, 0, 0xff, 0x3f, 0, 0,
];

/// Ready, the service cipher with AES-CBC, keys of 64 and 512 bytes, requests of any size: what the reference front
/// end shows, as backends leave it to the front end (§5.9.5).
const CRYPTO_CONFIG: &[u8] = &[
    1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 64, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
];

/// The rows. Sizes are those that real backends answer to: several refuse one byte more.
const TYPES: &[DeviceType] = &[
    DeviceType {
        no_config: NoConfig::Instead(&[]),
        // The reference front end takes GET_QUEUE_NUM for pairs, and so do its backends.
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
        // Up to write zeroes: qemu-storage-daemon and others know no more.
        ..row("blk", 2, 1, 60)
    },
    DeviceType {
        // As for scsi.
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
        // That of the reference front end; a backend of today takes no more, and says so to nobody.
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
    // Their backends of today refuse larger queues; the reference front end has those.
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

/// Why a name or a size makes no device type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TypeError {
    /// No row has this name.
    #[error("there is no device type called `{0}`")]
    Unknown(String),
    /// What follows `generic:` is no device id.
    #[error("`{0}` is not a virtio device id between 1 and 65535")]
    Id(String),
    /// The configuration size is out of range.
    #[error("the configuration size {0} is above {MAX_CONFIG_SIZE}")]
    ConfigSize(u16),
    /// Only network cards have one.
    #[error("a {0} device has no MTU, only net has")]
    NoMtu(&'static str),
    /// IPv4 asks for more.
    #[error("the MTU {0} is below 68")]
    Mtu(u16),
    /// Only network cards have one.
    #[error("a {0} device has no address, only net has")]
    NoMac(&'static str),
    /// No single station can have it.
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

    /// A type that we know only the number of: one queue and no configuration, unless told otherwise.
    #[must_use]
    pub fn generic(id: u16) -> Self {
        DeviceType { writable: Writable::Anything, ..row("generic", id.into(), 1, 0) }
    }

    /// The same type with another size of the configuration space.
    ///
    /// # Errors
    /// When a message cannot carry so much.
    pub fn with_config_size(self, config_size: u16) -> Result<Self, TypeError> {
        if config_size > MAX_CONFIG_SIZE {
            return Err(TypeError::ConfigSize(config_size));
        }
        Ok(Self { config_size, ..self })
    }

    /// The same type with a tag of the user's, which also stands in for a configuration: some file system
    /// backends have none, and leave the tag to the front end.
    ///
    /// # Errors
    /// When it is no file system, or the tag does not fit.
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

    /// The same type with an MTU of the user's, which the guest is told.
    ///
    /// # Errors
    /// When it is no network card, or the MTU is below 68.
    pub fn with_mtu(self, mtu: u16) -> Result<Self, TypeError> {
        match (self.id, mtu) {
            (NET, 68..) => Ok(Self { mtu: Some(mtu), ..self }),
            (NET, _) => Err(TypeError::Mtu(mtu)),
            _ => Err(TypeError::NoMtu(self.name)),
        }
    }

    /// The MTU of the user's.
    #[must_use]
    pub fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    /// The same type with an address of the user's, which the guest is told. The backend learns it from the guest's frames.
    ///
    /// # Errors
    /// When it is no network card, or the address is zero or that of a group.
    pub fn with_mac(self, mac: [u8; 6]) -> Result<Self, TypeError> {
        match (self.id, mac) {
            (NET, [0, 0, 0, 0, 0, 0]) => Err(TypeError::Mac),
            (NET, [first, ..]) if first & 1 != 0 => Err(TypeError::Mac),
            (NET, _) => Ok(Self { mac: Some(mac), ..self }),
            _ => Err(TypeError::NoMac(self.name)),
        }
    }

    /// The address of a network card that the guest knows, for a driver that took `features`.
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

    /// Whether a driver that was offered `features` may write `length` bytes of configuration at
    /// `offset`: all of them within one field that is there.
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

    /// What the last queue is for, when it is ours to serve.
    pub(crate) fn served(&self) -> Served {
        self.served
    }

    /// Whether writing `data` at `offset` of `config` says nothing new.
    #[must_use]
    pub fn is_settled(&self, config: &[u8], offset: usize, data: &[u8]) -> bool {
        matches!(self.writable, Writable::Settings(_))
            && config.get(offset..).is_some_and(|rest| rest.starts_with(data))
    }

    /// The whole of `config` with `data` at `offset`, when that is what the backend is to be told of such a write.
    #[must_use]
    pub fn whole_after(&self, config: &[u8], offset: usize, data: &[u8]) -> Option<Vec<u8>> {
        let Writable::Window(_) = self.writable else { return None };
        let mut config = config.to_vec();
        let place = config.get_mut(offset..offset.checked_add(data.len())?)?;
        place.copy_from_slice(data);
        Some(config)
    }

    /// Puts what the driver wrote into a window's fields, which `old` has, into the `config` that the backend shows.
    pub fn keep_written(&self, old: &[u8], config: &mut [u8]) {
        let Writable::Window(fields) = self.writable else { return };
        for field in fields {
            let place = field.offset..field.offset.saturating_add(field.width);
            if let (Some(kept), Some(place)) = (old.get(place.clone()), config.get_mut(place)) {
                place.copy_from_slice(kept);
            }
        }
    }

    /// What to negotiate with a backend of this type: the defaults, less what is only had on request,
    /// changed as the user says (`-name+name`). Names of this type's features are those of the
    /// specification in lower case, where `mq` is the protocol feature and the device features are
    /// `blk_mq` and `net_mq`; all other names are the transport's.
    ///
    /// # Errors
    /// When a name is not known.
    pub fn wanted(&self, changes: &str) -> Result<Wanted, UnknownFeature> {
        self.wanted_of(Self::defaults(), changes)
    }

    /// What is negotiated with any backend that offers it: what the transport needs no help for, and what
    /// every device does for its backend.
    pub(crate) fn defaults() -> Wanted {
        Wanted::default().and(
            ProtocolFeatures::BACKEND_SEND_FD
                .with(ProtocolFeatures::SHMEM)
                .with(ProtocolFeatures::SHARED_OBJECT),
        )
    }

    /// The same, from other defaults.
    pub(crate) fn wanted_of(&self, defaults: Wanted, changes: &str) -> Result<Wanted, UnknownFeature> {
        let mut text = String::new();
        for feature in self.features.iter().filter(|f| f.passage == Passage::OnRequest) {
            text.push_str(&format!("-bit{}", feature.bit));
        }
        if self.served == Served::Pairs {
            text.push_str(&format!("+bit{}+bit{}", CTRL_VQ, MQ));
        }
        if self.served == Served::Sessions {
            // Its configuration is the front end's: the reference front end never asks, and DPDK, which offers CONFIG with
            // any type, hangs up when it is asked.
            text.push_str("-config");
        }
        // Split so that each piece keeps its sign.
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
