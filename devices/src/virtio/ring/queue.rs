//! Virtio 1.2 §2.6 to §2.8: the registers of one queue as the driver set them, and the checks before a
//! backend is told of the queue. Must never read or write the rings: they belong to the backend.

use transport::memory::GuestAddr;
use transport::vhost_user::vring::RingBase;

use crate::virtio::ring::address::Space;

/// The largest queue that virtio allows.
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// How the rings of a queue are laid out, by the features that the driver took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingLayout {
    /// Descriptor table, available ring, used ring (§2.7).
    Split,
    /// Descriptor ring and two event suppression structures (§2.8).
    Packed,
}

impl RingLayout {
    /// Where a fresh queue begins: entry 0, and in the packed layout both wrap counters at 1 (§2.8.1),
    /// which the vhost-user message carries in bits 15 and 31.
    #[must_use]
    pub fn first_base(self) -> RingBase {
        match self {
            Self::Split => RingBase(0),
            Self::Packed => RingBase(1 << 15 | 1 << 31),
        }
    }
}

/// The registers of one queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueState {
    /// The largest size that the device accepts.
    pub max_size: u16,
    /// The size that the driver chose, unchecked.
    pub size: u16,
    /// Whether the driver enabled it.
    pub ready: bool,
    /// Descriptor area.
    pub desc: GuestAddr,
    /// Driver area: available ring, or driver event suppression.
    pub driver: GuestAddr,
    /// Device area: used ring, or device event suppression.
    pub device: GuestAddr,
}

/// Why a queue cannot run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// Zero, above the maximum, or not a power of two where that is needed.
    #[error("the driver gave queue {queue} the size {size}, not a valid one of at most {max}")]
    Size {
        /// The queue.
        queue: u16,
        /// Its size.
        size: u16,
        /// The largest allowed.
        max: u16,
    },
    /// An area is not aligned as the layout asks.
    #[error("the driver put the {area} area of queue {queue} at {at:#x}, which is not aligned to {align}")]
    Unaligned {
        /// The queue.
        queue: u16,
        /// Which area.
        area: &'static str,
        /// Where it is.
        at: u64,
        /// The required alignment.
        align: u64,
    },
    /// An area is not within one region of guest memory.
    #[error("the driver put the {area} area of queue {queue} at {at:#x}, not all of it in memory")]
    OutsideMemory {
        /// The queue.
        queue: u16,
        /// Which area.
        area: &'static str,
        /// Where it is.
        at: u64,
    },
}

impl QueueState {
    /// A queue at reset that takes up to `max_size` entries.
    #[must_use]
    pub fn new(max_size: u16) -> Self {
        let nowhere = GuestAddr(0);
        Self { max_size, size: max_size, ready: false, desc: nowhere, driver: nowhere, device: nowhere }
    }

    /// Checks the queue before a backend is told of it.
    ///
    /// # Errors
    /// When size, alignment or place of an area is not what the layout asks for.
    pub fn validate(&self, queue: u16, layout: RingLayout, space: Space<'_>) -> Result<(), QueueError> {
        let size = self.size;
        let fits = match layout {
            RingLayout::Split => size.is_power_of_two(),
            RingLayout::Packed => size != 0,
        };
        if !fits || size > self.max_size {
            return Err(QueueError::Size { queue, size, max: self.max_size });
        }
        let n = u64::from(size);
        // Name, address, alignment, length (§2.7 and §2.8.10.1; the rings with their event fields).
        let areas = match layout {
            RingLayout::Split => [
                ("descriptor", self.desc, 16, 16 * n),
                ("driver", self.driver, 2, 6 + 2 * n),
                ("device", self.device, 4, 6 + 8 * n),
            ],
            RingLayout::Packed => [
                ("descriptor", self.desc, 16, 16 * n),
                ("driver", self.driver, 4, 4),
                ("device", self.device, 4, 4),
            ],
        };
        for (area, GuestAddr(at), align, length) in areas {
            if at % align != 0 {
                return Err(QueueError::Unaligned { queue, area, at, align });
            }
            if space.guest(GuestAddr(at), length).is_none() {
                return Err(QueueError::OutsideMemory { queue, area, at });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;
    use std::sync::Arc;
    use transport::memory::{MemoryMap, SharedRegion};

    const RAM: u64 = 0x10_0000;

    fn memory() -> MemoryMap {
        let fd: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
        MemoryMap::new(vec![SharedRegion::new(GuestAddr(0), RAM, Arc::new(fd), 0)]).unwrap()
    }

    fn queue() -> QueueState {
        QueueState {
            ready: true,
            desc: GuestAddr(0x1000),
            driver: GuestAddr(0x2000),
            device: GuestAddr(0x3000),
            ..QueueState::new(256)
        }
    }

    fn check(queue: QueueState, layout: RingLayout) -> Result<(), QueueError> {
        queue.validate(0, layout, Space::from(&memory()))
    }

    #[test]
    fn queue_inside_memory_is_accepted_in_both_layouts() {
        for layout in [RingLayout::Split, RingLayout::Packed] {
            assert_eq!(check(queue(), layout), Ok(()));
        }
    }

    #[test]
    fn size_zero_too_large_or_odd_is_refused() {
        for (size, split, packed) in
            [(0, false, false), (3, false, true), (512, false, false), (1, true, true), (256, true, true)]
        {
            let queue = QueueState { size, ..queue() };
            assert_eq!(check(queue, RingLayout::Split).is_ok(), split, "split {size}");
            assert_eq!(check(queue, RingLayout::Packed).is_ok(), packed, "packed {size}");
        }
    }

    #[test]
    fn unaligned_area_is_refused_by_name() {
        let at = |offset: u64| GuestAddr(0x1000 + offset);
        let cases = [
            (QueueState { desc: at(8), ..queue() }, "descriptor"),
            (QueueState { driver: at(1), ..queue() }, "driver"),
            (QueueState { device: at(2), ..queue() }, "device"),
        ];
        for (queue, name) in cases {
            let result = check(queue, RingLayout::Split);
            assert!(matches!(result, Err(QueueError::Unaligned { area, .. }) if area == name), "{name}");
        }
        let two = QueueState { driver: at(2), ..queue() };
        assert_eq!(check(two, RingLayout::Split), Ok(()));
        assert!(check(two, RingLayout::Packed).is_err());
    }

    #[test]
    fn area_that_leaves_memory_is_refused() {
        let last = RAM - 16 * 256;
        assert_eq!(check(QueueState { desc: GuestAddr(last), ..queue() }, RingLayout::Split), Ok(()));
        for at in [last + 16, RAM, 0xffff_ffff_ffff_fff0] {
            let result = check(QueueState { desc: GuestAddr(at), ..queue() }, RingLayout::Split);
            assert!(matches!(result, Err(QueueError::OutsideMemory { area: "descriptor", .. })), "{at:#x}");
        }
        let used = QueueState { device: GuestAddr(RAM - 8 * 256), ..queue() };
        assert!(matches!(check(used, RingLayout::Split), Err(QueueError::OutsideMemory { .. })));
    }
}
