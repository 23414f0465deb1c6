//! Virtio 1.2 §2.7: where a split ring goes on after its backend was cut off. Reads guest memory
//! through its file; must never trust what stands there, nor map it.

use std::io;

use transport::memory_map::{GuestAddr, MemoryMap};
use transport::vhost_user::vring::RingBase;

use super::queue::{QueueState, RingLayout};

/// Why nobody can go on with a ring.
#[derive(Debug, thiserror::Error)]
pub(super) enum ResumeError {
    /// How far the device got is not written down anywhere.
    #[error("queue {0} is a packed ring, which only a reset can start again")]
    Packed(u16),
    /// Lost requests cannot be told from finished ones.
    #[error("the indexes of queue {queue} contradict each other: {available} available, {used} used")]
    Indexes {
        /// The queue.
        queue: u16,
        /// `avail.idx`
        available: u16,
        /// `used.idx`
        used: u16,
    },
    /// The ring is not in memory any more.
    #[error("cannot read queue {queue} in guest memory")]
    Memory {
        /// The queue.
        queue: u16,
        /// Why not.
        source: io::Error,
    },
}

/// Fills `bytes` from guest memory.
fn load(memory: &MemoryMap, at: GuestAddr, bytes: &mut [u8]) -> io::Result<()> {
    let outside = || io::Error::from(io::ErrorKind::InvalidInput);
    let length = u64::try_from(bytes.len()).map_err(|_| outside())?;
    let end = at.checked_add(length).ok_or_else(outside)?;
    let holds =
        |start: GuestAddr, last: Option<GuestAddr>| start <= at && last.is_some_and(|last| end <= last);
    let region = memory.regions().iter().find(|region| holds(region.guest(), region.end()));
    let region = region.ok_or_else(outside)?;
    let within = at.0.saturating_sub(region.guest().0);
    let offset = region.offset().checked_add(within).ok_or_else(outside)?;
    match rustix::io::pread(region.fd(), &mut *bytes, offset)? {
        read if read == bytes.len() => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn load_u16(memory: &MemoryMap, at: Option<GuestAddr>) -> io::Result<u16> {
    let at = at.ok_or(io::ErrorKind::InvalidInput)?;
    let mut bytes = [0; 2];
    load(memory, at, &mut bytes)?;
    Ok(u16::from_le_bytes(bytes))
}

/// Where the next backend begins: behind what is used. What was available and not used then is done,
/// or done again; the available index would leave it out.
pub(super) fn base(
    queue: u16,
    state: &QueueState,
    layout: RingLayout,
    memory: &MemoryMap,
) -> Result<RingBase, ResumeError> {
    if layout == RingLayout::Packed {
        return Err(ResumeError::Packed(queue));
    }
    let failed = |source| ResumeError::Memory { queue, source };
    let used = load_u16(memory, state.device.checked_add(2)).map_err(failed)?;
    let available = load_u16(memory, state.driver.checked_add(2)).map_err(failed)?;
    if available.wrapping_sub(used) > state.size {
        return Err(ResumeError::Indexes { queue, available, used });
    }
    Ok(RingBase(used.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{RAM, memory};

    fn queue() -> QueueState {
        QueueState {
            size: 16,
            ready: true,
            driver: GuestAddr(0x2000),
            device: GuestAddr(0x3000),
            ..QueueState::new(16)
        }
    }

    fn with_indexes(available: u16, used: u16) -> MemoryMap {
        let memory = memory();
        let fd = memory.regions()[0].fd();
        rustix::io::pwrite(fd, &available.to_le_bytes(), 0x2002).unwrap();
        rustix::io::pwrite(fd, &used.to_le_bytes(), 0x3002).unwrap();
        memory
    }

    #[test]
    fn ring_goes_on_behind_what_is_used_also_across_the_wrap() {
        for (available, used) in [(0, 0), (16, 0), (7, 5), (5, 65530), (65535, 65535)] {
            let base = base(0, &queue(), RingLayout::Split, &with_indexes(available, used)).unwrap();
            assert_eq!(base, RingBase(used.into()), "{available} {used}");
        }
    }

    #[test]
    fn indexes_that_cannot_be_are_refused() {
        for (available, used) in [(17, 0), (0, 1), (0, 17), (5, 65500)] {
            let result = base(3, &queue(), RingLayout::Split, &with_indexes(available, used));
            assert!(matches!(result, Err(ResumeError::Indexes { queue: 3, .. })), "{available} {used}");
        }
    }

    #[test]
    fn packed_rings_and_rings_outside_memory_are_refused() {
        let packed = base(1, &queue(), RingLayout::Packed, &memory());
        assert!(matches!(packed, Err(ResumeError::Packed(1))));
        for device in [RAM - 2, RAM - 3, RAM, u64::MAX - 1, u64::MAX - 2] {
            let queue = QueueState { device: GuestAddr(device), ..queue() };
            let result = base(0, &queue, RingLayout::Split, &memory());
            assert!(matches!(result, Err(ResumeError::Memory { .. })), "{device:#x}");
        }
    }
}
