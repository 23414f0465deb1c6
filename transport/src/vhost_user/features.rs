//! Feature bits: the offered, the accepted and the negotiated ones, and their names.
//!
//! No function of this crate takes features as a bare `u64` where one of these types fits.

use std::fmt;

/// Device feature bits as the guest may see them (virtio 1.2 §6, plus the device type's own).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceFeatures(u64);

/// Bit numbers of device features that are independent of the device type.
pub mod bit {
    /// VHOST_F_LOG_ALL: the backend logs its writes to guest memory.
    pub const LOG_ALL: u32 = 26;
    /// VHOST_USER_F_PROTOCOL_FEATURES.
    pub const PROTOCOL_FEATURES: u32 = 30;
    /// VIRTIO_F_VERSION_1.
    pub const VERSION_1: u32 = 32;
    /// VIRTIO_F_ACCESS_PLATFORM: addresses are IOVAs.
    pub const ACCESS_PLATFORM: u32 = 33;
    /// VIRTIO_F_RING_PACKED.
    pub const RING_PACKED: u32 = 34;
    /// VIRTIO_F_SR_IOV.
    pub const SR_IOV: u32 = 37;
    /// VIRTIO_F_NOTIFICATION_DATA: a kick carries data, which an eventfd cannot.
    pub const NOTIFICATION_DATA: u32 = 38;
    /// VIRTIO_F_NOTIF_CONFIG_DATA.
    pub const NOTIF_CONFIG_DATA: u32 = 39;
    /// VIRTIO_F_RING_RESET: single queues are reset.
    pub const RING_RESET: u32 = 40;
}

const DEVICE_NAMES: &[(&str, u32)] = &[
    ("notify_on_empty", 24),
    ("log_all", bit::LOG_ALL),
    ("any_layout", 27),
    ("indirect_desc", 28),
    ("event_idx", 29),
    ("protocol_features", bit::PROTOCOL_FEATURES),
    ("version_1", bit::VERSION_1),
    ("access_platform", bit::ACCESS_PLATFORM),
    ("ring_packed", bit::RING_PACKED),
    ("in_order", 35),
    ("order_platform", 36),
    ("sr_iov", bit::SR_IOV),
    ("notification_data", bit::NOTIFICATION_DATA),
    ("notif_config_data", bit::NOTIF_CONFIG_DATA),
    ("ring_reset", bit::RING_RESET),
    ("admin_vq", 41),
];

/// Device features that are hidden from guests unless asked for: those of the front end itself, and those
/// that need a part of the machine besides the transport.
pub const WITHHELD: &[u32] = &[
    bit::LOG_ALL,
    bit::PROTOCOL_FEATURES,
    bit::ACCESS_PLATFORM,
    bit::SR_IOV,
    bit::NOTIFICATION_DATA,
    bit::NOTIF_CONFIG_DATA,
    bit::RING_RESET,
    41,
];

impl DeviceFeatures {
    /// The features of `bits`.
    pub fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The bits.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// True when bit `number` is set.
    pub fn has(self, number: u32) -> bool {
        self.0 & mask(number) != 0
    }

    /// The driver's features, if all of them were offered.
    pub fn accept(self, driver: u64) -> Result<DriverFeatures, NotOffered> {
        match driver & !self.0 {
            0 => Ok(DriverFeatures(driver)),
            extra => Err(NotOffered(extra)),
        }
    }

    /// The driver's features that are among these. The other ones concern the front end only.
    pub fn known(self, driver: DriverFeatures) -> DriverFeatures {
        DriverFeatures(driver.0 & self.0)
    }
}

impl fmt::Display for DeviceFeatures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_names(f, self.0, DEVICE_NAMES, "bit")
    }
}

/// Device features that the driver accepted, all of them offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriverFeatures(u64);

impl DriverFeatures {
    /// The bits.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// True when bit `number` was accepted.
    pub fn has(self, number: u32) -> bool {
        self.0 & mask(number) != 0
    }
}

/// The driver accepted bits that the device does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("features {0:#x} were accepted but not offered")]
pub struct NotOffered(pub u64);

/// vhost-user protocol features, offered or negotiated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProtocolFeatures(u64);

macro_rules! protocol_features {
    ($($bit:literal $name:ident $lower:literal,)*) => {
        impl ProtocolFeatures {
            $(#[doc = concat!("VHOST_USER_PROTOCOL_F_", stringify!($name), ".")]
              pub const $name: Self = Self(1 << $bit);)*
        }
        const PROTOCOL_NAMES: &[(&str, u32)] = &[$(($lower, $bit),)*];
    };
}

protocol_features! {
    0 MQ "mq",
    1 LOG_SHMFD "log_shmfd",
    2 RARP "rarp",
    3 REPLY_ACK "reply_ack",
    4 MTU "mtu",
    5 BACKEND_REQ "backend_req",
    6 CROSS_ENDIAN "cross_endian",
    7 CRYPTO_SESSION "crypto_session",
    8 PAGEFAULT "pagefault",
    9 CONFIG "config",
    10 BACKEND_SEND_FD "backend_send_fd",
    11 HOST_NOTIFIER "host_notifier",
    12 INFLIGHT_SHMFD "inflight_shmfd",
    13 RESET_DEVICE "reset_device",
    14 INBAND_NOTIFICATIONS "inband_notifications",
    15 CONFIGURE_MEM_SLOTS "configure_mem_slots",
    16 STATUS "status",
    17 XEN_MMAP "xen_mmap",
    18 SHARED_OBJECT "shared_object",
    19 DEVICE_STATE "device_state",
    20 GET_VRING_BASE_INFLIGHT "get_vring_base_inflight",
    21 GPA_ADDRESSES "gpa_addresses",
    22 SHMEM "shmem",
    23 GET_VRING_BASE_SKIP_DRAIN "get_vring_base_skip_drain",
}

/// The features that each feature needs. A feature is not negotiated when one that it needs was not offered.
const DEPENDENCIES: &[(ProtocolFeatures, ProtocolFeatures)] = &[
    (ProtocolFeatures::BACKEND_SEND_FD, ProtocolFeatures::BACKEND_REQ),
    (ProtocolFeatures::HOST_NOTIFIER, ProtocolFeatures::BACKEND_REQ.with(ProtocolFeatures::BACKEND_SEND_FD)),
    (ProtocolFeatures::INBAND_NOTIFICATIONS, ProtocolFeatures::BACKEND_REQ.with(ProtocolFeatures::REPLY_ACK)),
    (ProtocolFeatures::SHARED_OBJECT, ProtocolFeatures::BACKEND_REQ.with(ProtocolFeatures::BACKEND_SEND_FD)),
    (ProtocolFeatures::SHMEM, ProtocolFeatures::BACKEND_REQ.with(ProtocolFeatures::BACKEND_SEND_FD)),
    (ProtocolFeatures::GET_VRING_BASE_INFLIGHT, ProtocolFeatures::INFLIGHT_SHMFD),
    (
        ProtocolFeatures::GET_VRING_BASE_SKIP_DRAIN,
        ProtocolFeatures::INFLIGHT_SHMFD.with(ProtocolFeatures::GET_VRING_BASE_INFLIGHT),
    ),
];

impl ProtocolFeatures {
    /// No features.
    pub const NONE: Self = Self(0);

    /// The features of `bits`.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The bits.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// These features and `others`.
    #[must_use]
    pub const fn with(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    /// These features without `others`.
    #[must_use]
    pub const fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }

    /// True when all of `others` are among these.
    pub const fn contains(self, others: Self) -> bool {
        self.0 & others.0 == others.0
    }

    /// The protocol features to negotiate: those both `wanted` and `offered`, without those whose needs are
    /// not met.
    #[must_use]
    pub fn negotiate(wanted: Self, offered: Self) -> Self {
        let mut common = Self(wanted.0 & offered.0);
        // Removing a feature may remove those that need it. As many rounds as there are rows always reach the
        // fixed point.
        for _ in DEPENDENCIES {
            for (feature, needs) in DEPENDENCIES {
                if common.contains(*feature) && !common.contains(*needs) {
                    common = common.without(*feature);
                }
            }
        }
        common
    }
}

impl fmt::Display for ProtocolFeatures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_names(f, self.0, PROTOCOL_NAMES, "pbit")
    }
}

/// The features that a front end wants: the device features that the guest may see, and the protocol features
/// to negotiate if the backend offers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    device: u64,
    protocol: ProtocolFeatures,
}

impl Default for Wanted {
    /// All features that need no other part of the machine.
    fn default() -> Self {
        let withheld = WITHHELD.iter().fold(0, |bits, number| bits | mask(*number));
        let protocol = ProtocolFeatures::MQ
            .with(ProtocolFeatures::LOG_SHMFD)
            .with(ProtocolFeatures::REPLY_ACK)
            .with(ProtocolFeatures::BACKEND_REQ)
            .with(ProtocolFeatures::CONFIG)
            .with(ProtocolFeatures::RESET_DEVICE)
            .with(ProtocolFeatures::STATUS);
        Self { device: !withheld, protocol }
    }
}

impl Wanted {
    /// The device features that the guest may see.
    pub fn device(&self) -> DeviceFeatures {
        DeviceFeatures(self.device)
    }

    /// The protocol features to negotiate if they are offered.
    pub fn protocol(&self) -> ProtocolFeatures {
        self.protocol
    }

    /// Adds protocol features.
    #[must_use]
    pub fn and(mut self, protocol: ProtocolFeatures) -> Self {
        self.protocol = self.protocol.with(protocol);
        self
    }

    /// Removes protocol features.
    #[must_use]
    pub fn and_not(mut self, protocol: ProtocolFeatures) -> Self {
        self.protocol = self.protocol.without(protocol);
        self
    }

    /// Applies changes by name, in the form of the command line: `-mq+access_platform-bit5+pbit20`.
    ///
    /// Names are those of the specifications in lower case. `bitN` is a device feature, `pbitN` a protocol
    /// feature.
    pub fn adjust(mut self, changes: &str) -> Result<Self, UnknownFeature> {
        let mut rest = changes;
        while !rest.is_empty() {
            let unknown = || UnknownFeature(rest.to_owned());
            let sign = rest.chars().next().filter(|c| matches!(c, '+' | '-')).ok_or_else(unknown)?;
            let body = rest.get(1..).unwrap_or_default();
            let end = body.find(['+', '-']).unwrap_or(body.len());
            let (name, next) = body.split_at(end);
            let (bits, is_protocol) = named(name).ok_or_else(|| UnknownFeature(name.to_owned()))?;
            if bits == mask(bit::PROTOCOL_FEATURES) && !is_protocol {
                // The front end's own bit. Without it there are no protocol features, as with old front ends.
                self.protocol = if sign == '+' { Self::default().protocol } else { ProtocolFeatures::NONE };
                rest = next;
                continue;
            }
            let target = if is_protocol { &mut self.protocol.0 } else { &mut self.device };
            if sign == '+' {
                *target |= bits;
            } else {
                *target &= !bits;
            }
            rest = next;
        }
        Ok(self)
    }

    /// The `offered` features that the guest may see. The front end's own bits are never among them.
    pub(crate) fn visible(&self, offered: u64) -> DeviceFeatures {
        DeviceFeatures(offered & self.device & !(mask(bit::PROTOCOL_FEATURES) | mask(bit::LOG_ALL)))
    }

    /// True when bit 30 may be used. `features=-protocol_features` makes us behave like an old front end.
    pub(crate) fn speaks_protocol_features(&self) -> bool {
        self.protocol != ProtocolFeatures::NONE
    }
}

/// The name in `features=` is not the name of a feature.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no feature called `{0}`")]
pub struct UnknownFeature(pub String);

fn named(name: &str) -> Option<(u64, bool)> {
    let name = name.to_ascii_lowercase().replace('.', "_");
    let find =
        |table: &[(&str, u32)]| table.iter().find(|(n, _)| *n == name).map(|(_, number)| mask(*number));
    let numeric = |prefix: &str| {
        let number: u32 = name.strip_prefix(prefix)?.parse().ok()?;
        (number < 64).then(|| mask(number))
    };
    find(DEVICE_NAMES)
        .or_else(|| numeric("bit"))
        .map(|bits| (bits, false))
        .or_else(|| find(PROTOCOL_NAMES).or_else(|| numeric("pbit")).map(|bits| (bits, true)))
}

fn mask(number: u32) -> u64 {
    1u64.checked_shl(number).unwrap_or(0)
}

fn write_names(f: &mut fmt::Formatter<'_>, bits: u64, table: &[(&str, u32)], prefix: &str) -> fmt::Result {
    let mut first = true;
    for number in (0..64).filter(|number| bits & mask(*number) != 0) {
        if !first {
            f.write_str(" ")?;
        }
        first = false;
        match table.iter().find(|(_, n)| *n == number) {
            Some((name, _)) => f.write_str(name)?,
            None => write!(f, "{prefix}{number}")?,
        }
    }
    if first { f.write_str("none") } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_may_take_what_is_offered_and_nothing_else() {
        let offered = DeviceFeatures::from_bits(0b110);
        assert_eq!(offered.accept(0b010).unwrap().bits(), 0b010);
        assert_eq!(offered.accept(0b011), Err(NotOffered(1)));
        let taken = offered.accept(0b110).unwrap();
        assert_eq!(DeviceFeatures::from_bits(0b1010).known(taken).bits(), 0b010);
    }

    #[test]
    fn features_change_by_name_and_by_number() {
        let wanted = Wanted::default().adjust("-mq+access_platform-bit5+pbit20-EVENT_IDX").unwrap();
        assert!(!wanted.protocol().contains(ProtocolFeatures::MQ));
        assert!(wanted.protocol().contains(ProtocolFeatures::GET_VRING_BASE_INFLIGHT));
        assert!(wanted.device().has(bit::ACCESS_PLATFORM));
        assert!(!wanted.device().has(5));
        assert!(!wanted.device().has(29));
        assert_eq!(Wanted::default().adjust("").unwrap(), Wanted::default());
    }

    #[test]
    fn unknown_names_are_refused_by_name() {
        for (text, name) in
            [("-nonsense", "nonsense"), ("mq", "mq"), ("+bit64", "bit64"), ("+", ""), ("+pbit-1", "pbit")]
        {
            assert_eq!(Wanted::default().adjust(text), Err(UnknownFeature(name.into())), "{text}");
        }
    }

    #[test]
    fn what_the_machine_must_promise_is_withheld_by_default() {
        let wanted = Wanted::default().device();
        assert!(!wanted.has(bit::PROTOCOL_FEATURES) && !wanted.has(bit::LOG_ALL));
        assert!(!wanted.has(bit::NOTIFICATION_DATA) && !wanted.has(bit::ACCESS_PLATFORM));
        assert!(wanted.has(bit::VERSION_1) && wanted.has(bit::RING_PACKED) && wanted.has(0));
    }

    #[test]
    fn contradictory_protocol_features_lose_what_depends_on_the_missing_one() {
        type P = ProtocolFeatures;
        let all = P::from_bits(u64::MAX);
        let offered = P::MQ.with(P::INBAND_NOTIFICATIONS).with(P::BACKEND_REQ);
        assert_eq!(P::negotiate(all, offered), P::MQ.with(P::BACKEND_REQ));
        let offered = P::HOST_NOTIFIER.with(P::BACKEND_SEND_FD).with(P::SHMEM);
        assert_eq!(P::negotiate(all, offered), P::NONE);
    }

    #[test]
    fn features_print_by_name() {
        assert_eq!(DeviceFeatures::from_bits(1 << 32 | 1 << 5).to_string(), "bit5 version_1");
        assert_eq!(ProtocolFeatures::from_bits(1 | 1 << 40).to_string(), "mq pbit40");
        assert_eq!(ProtocolFeatures::NONE.to_string(), "none");
    }
}
