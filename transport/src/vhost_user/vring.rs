//! Rings (the specification's vrings): their eventfds, the addresses that the backend is told of each, and
//! the base at which each stopped.
//!
//! A ring is *started* by SET_VRING_KICK and *stopped* by GET_VRING_BASE. Independently of that,
//! SET_VRING_ENABLE *enables* or *disables* it. A ring that the guest laid out wrongly is refused here,
//! before any message is sent.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::{EventfdFlags, eventfd as new_eventfd};

use super::features::{DriverFeatures, bit};
use super::iotlb::IovaMap;
use super::message::{Fault, VringAddr, VringState, parse};
use crate::memory::{GuestAddr, Iova, MemoryMap, UserAddr};
use crate::peer::eventfd;

/// The largest queue size (virtio 1.2 §2.7 and §2.8).
pub const QUEUE_SIZE_MAX: u16 = 32768;

/// The most rings that the 8-bit index of SET_VRING_KICK can name.
pub const RINGS_MAX: u16 = 256;

macro_rules! eventfd {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name(OwnedFd);

        impl $name {
            /// A new eventfd: non-blocking, close-on-exec, count 0.
            pub fn new() -> io::Result<Self> {
                Ok(Self(new_eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?))
            }

            /// Duplicates the descriptor. Both refer to the same eventfd.
            pub fn try_clone(&self) -> io::Result<Self> {
                self.0.try_clone().map(Self)
            }

            /// Signals the eventfd. A count at its maximum counts as signalled. Never waits.
            pub fn ring(&self) -> io::Result<()> {
                eventfd::signal(self.0.as_fd())
            }

            /// Takes the count: 0 when the eventfd was not signalled since the last time. Never waits.
            pub fn take(&self) -> io::Result<u64> {
                eventfd::take(&self.0)
            }
        }

        impl AsFd for $name {
            fn as_fd(&self) -> BorrowedFd<'_> {
                self.0.as_fd()
            }
        }

        impl AsRawFd for $name {
            fn as_raw_fd(&self) -> RawFd {
                self.0.as_raw_fd()
            }
        }

        impl From<$name> for OwnedFd {
            fn from(eventfd: $name) -> Self {
                eventfd.0
            }
        }
    };
}

eventfd! {
    /// Signals the backend: the guest has put buffers into the ring.
    Kick
}
eventfd! {
    /// Signals the guest: the backend has used buffers.
    Call
}
eventfd! {
    /// Signals us: the backend found an error in the ring.
    RingError
}

/// Where a ring continues: the next available index of a split ring; the indexes and wrap counters of a
/// packed ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingBase(pub u32);

/// One ring as the driver laid it out.
#[derive(Clone, Copy, Debug)]
pub struct Ring<'a> {
    /// The ring's index in the device.
    pub index: u16,
    /// The number of descriptors, as the driver chose it.
    pub size: u16,
    /// The descriptor table, or the packed ring.
    pub descriptor: GuestAddr,
    /// The available ring, or the driver event suppression area.
    pub available: GuestAddr,
    /// The used ring, or the device event suppression area.
    pub used: GuestAddr,
    /// The base from which the backend continues.
    pub base: RingBase,
    /// Signalled by the guest.
    pub kick: &'a Kick,
    /// Signalled by the backend.
    pub call: &'a Call,
    /// Signalled by the backend when it finds an error in the ring; optional.
    pub error: Option<&'a RingError>,
}

/// How a ring was laid out wrongly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingFault {
    /// The index does not fit a vhost-user message.
    #[error("the ring's index is above 255")]
    Index,
    /// The size is zero, above 32768, or (for a split ring) not a power of two.
    #[error("the ring's size is not possible")]
    Size,
    /// A part is not aligned as virtio 1.2 §2.7 and §2.8 require.
    #[error("a part of the ring is not aligned")]
    Alignment,
    /// A part lies outside guest memory.
    #[error("a part of the ring lies outside guest memory")]
    OutsideMemory,
}

impl RingFault {
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Index => "the ring's index is above 255",
            Self::Size => "the ring's size is not possible",
            Self::Alignment => "a part of the ring is not aligned",
            Self::OutsideMemory => "a part of the ring lies outside guest memory",
        }
    }
}

/// The address space of a ring's addresses.
#[derive(Clone, Copy, Debug)]
pub enum RingSpace<'a> {
    /// Guest addresses. The backend is told user addresses.
    User(&'a MemoryMap),
    /// I/O virtual addresses. The backend is told these addresses unchanged.
    Iova(&'a IovaMap),
}

impl RingSpace<'_> {
    fn tell(self, at: GuestAddr, bytes: u64) -> Option<u64> {
        match self {
            Self::User(memory) => memory.user_addr(at, bytes).map(UserAddr::raw),
            Self::Iova(map) => map.translate(Iova(at.raw()), bytes).map(|_| at.raw()),
        }
    }
}

impl Ring<'_> {
    /// Checks the layout of this ring, and returns its SET_VRING_ADDR payload, without logging.
    pub fn address(&self, features: DriverFeatures, space: RingSpace<'_>) -> Result<VringAddr, RingFault> {
        if self.index >= RINGS_MAX {
            return Err(RingFault::Index);
        }
        let packed = features.has(bit::RING_PACKED);
        let possible = (1..=QUEUE_SIZE_MAX).contains(&self.size) && (packed || self.size.is_power_of_two());
        if !possible {
            return Err(RingFault::Size);
        }
        let count = u64::from(self.size);
        // Address, bytes and alignment of the descriptor, available and used part.
        let parts = if packed {
            [(self.descriptor, 16 * count, 16), (self.available, 4, 4), (self.used, 4, 4)]
        } else {
            [
                (self.descriptor, 16 * count, 16),
                (self.available, 6 + 2 * count, 2),
                (self.used, 6 + 8 * count, 4),
            ]
        };
        let mut told = [0; 3];
        for ((at, bytes, alignment), tell) in parts.into_iter().zip(&mut told) {
            if at.raw() % alignment != 0 {
                return Err(RingFault::Alignment);
            }
            *tell = space.tell(at, bytes).ok_or(RingFault::OutsideMemory)?;
        }
        let [descriptor, available, used] = told;
        Ok(VringAddr {
            index: u32::from(self.index),
            flags: 0,
            descriptor,
            used,
            available,
            log: self.used.raw(),
        })
    }
}

/// Reads the answer to GET_VRING_BASE for ring `index`.
pub fn parse_base(payload: &[u8], index: u32, features: DriverFeatures) -> Result<RingBase, Fault> {
    let state: VringState = parse(payload)?;
    if state.index != index {
        return Err(Fault::Value { field: "ring", value: state.index.into() });
    }
    if !features.has(bit::RING_PACKED) && state.num > u32::from(u16::MAX) {
        return Err(Fault::Value { field: "ring base", value: state.num.into() });
    }
    Ok(RingBase(state.num))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{SharedRegion, USER_BIAS};
    use crate::vhost_user::features::DeviceFeatures;
    use std::sync::Arc;

    fn memory() -> MemoryMap {
        let fd = Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        MemoryMap::new(vec![SharedRegion::new(GuestAddr(0), 0x10_0000, fd, 0)]).unwrap()
    }

    fn features(bits: u64) -> DriverFeatures {
        DeviceFeatures::from_bits(u64::MAX).accept(bits).unwrap()
    }

    fn judge(change: impl FnOnce(&mut Ring<'_>), bits: u64) -> Result<VringAddr, RingFault> {
        let (kick, call) = (Kick::new().unwrap(), Call::new().unwrap());
        let mut ring = Ring {
            index: 1,
            size: 256,
            descriptor: GuestAddr(0x1000),
            available: GuestAddr(0x3000),
            used: GuestAddr(0x4000),
            base: RingBase(0),
            kick: &kick,
            call: &call,
            error: None,
        };
        change(&mut ring);
        ring.address(features(bits), RingSpace::User(&memory()))
    }

    #[test]
    fn a_good_ring_has_user_addresses() {
        let addr = judge(|_| {}, 0).unwrap();
        assert_eq!((addr.index, addr.flags), (1, 0));
        assert_eq!(addr.descriptor, USER_BIAS + 0x1000);
        assert_eq!(addr.available, USER_BIAS + 0x3000);
        assert_eq!(addr.used, USER_BIAS + 0x4000);
    }

    #[test]
    fn a_guest_cannot_lay_a_ring_out_wrongly() {
        assert_eq!(judge(|r| r.index = 256, 0), Err(RingFault::Index));
        for size in [0, 3, 32769, u16::MAX] {
            assert_eq!(judge(|r| r.size = size, 0), Err(RingFault::Size), "{size}");
        }
        assert_eq!(judge(|r| r.descriptor = GuestAddr(8), 0), Err(RingFault::Alignment));
        assert_eq!(judge(|r| r.available = GuestAddr(1), 0), Err(RingFault::Alignment));
        assert_eq!(judge(|r| r.used = GuestAddr(2), 0), Err(RingFault::Alignment));
        assert_eq!(judge(|r| r.used = GuestAddr(0xf_fffc), 0), Err(RingFault::OutsideMemory));
        assert_eq!(judge(|r| r.used = GuestAddr(u64::MAX - 3), 0), Err(RingFault::OutsideMemory));
    }

    #[test]
    fn a_packed_ring_may_have_any_size_and_small_event_areas() {
        let packed = 1 << bit::RING_PACKED;
        assert!(judge(|r| (r.size, r.used) = (3, GuestAddr(0xf_fffc)), packed).is_ok());
    }

    #[test]
    fn a_base_of_another_ring_or_beyond_16_bits_is_refused() {
        let state = |index: u32, num: u32| [index.to_ne_bytes(), num.to_ne_bytes()].concat();
        assert_eq!(parse_base(&state(1, 7), 1, features(0)), Ok(RingBase(7)));
        assert!(parse_base(&state(2, 7), 1, features(0)).is_err());
        assert!(parse_base(&state(1, 65536), 1, features(0)).is_err());
        assert!(parse_base(&state(1, 65536), 1, features(1 << bit::RING_PACKED)).is_ok());
        assert!(parse_base(&[0; 7], 0, features(0)).is_err());
    }

    #[test]
    fn an_eventfd_counts_until_taken() {
        let kick = Kick::new().unwrap();
        assert_eq!(kick.take().unwrap(), 0);
        kick.ring().unwrap();
        kick.try_clone().unwrap().ring().unwrap();
        assert_eq!(kick.take().unwrap(), 2);
    }

    #[test]
    fn an_eventfd_that_a_peer_made_blocking_holds_nobody_up() {
        use rustix::fs::{OFlags, fcntl_setfl};
        let ours = Call::new().unwrap();
        let peer = ours.try_clone().unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let order = std::sync::atomic::Ordering::Relaxed;
        std::thread::scope(|scope| {
            // A peer that clears the flag all the time.
            scope.spawn(|| {
                while !stop.load(order) {
                    fcntl_setfl(&peer, OFlags::RDWR).unwrap();
                }
            });
            for _ in 0..10_000 {
                assert_eq!(ours.take().unwrap(), 0, "nothing to take");
            }
            stop.store(true, order);
        });
        for flags in [OFlags::RDWR, OFlags::RDWR | OFlags::NONBLOCK] {
            fcntl_setfl(&peer, flags).unwrap();
            assert_eq!(ours.take().unwrap(), 0, "nothing to take");
            rustix::io::write(&peer, &(u64::MAX - 1).to_ne_bytes()).unwrap();
            fcntl_setfl(&peer, flags).unwrap();
            ours.ring().unwrap();
            assert_eq!(peer.take().unwrap(), u64::MAX - 1, "saturated");
        }
    }
}
