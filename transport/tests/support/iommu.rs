//! Guest memory of 2 MiB far away, the rings in the lower half and the buffers in the upper one; and the misses of a backend.
//!
//! Only the buffers are taken back: DPDK counts a ring whose translation is gone as one that is not ready, tells its program so,
//! and whether that still looks at the ring, and so misses the translation, is a matter of luck.

use std::cell::Cell;
use std::sync::Arc;

use transport::memory::{GuestAddr, Iova};
use transport::vhost_user::iotlb::{Access, IovaRange, MissAnswers};
use transport::vhost_user::message::Iotlb;
use transport::vhost_user::{BackendRequests, IovaMap, Refused, Session};

use super::GuestMemory;

/// Where the memory begins for the driver.
pub const FAR: u64 = 0x40_0000_0000;
/// Where its buffers begin for us.
pub const BUFFERS_AT: u64 = 1 << 20;

/// Where the buffers are.
pub fn buffers() -> IovaRange {
    let (iova, guest) = (Iova(FAR + BUFFERS_AT), GuestAddr(BUFFERS_AT));
    IovaRange { iova, size: 1 << 20, guest, access: Access::ReadWrite }
}

/// All translations.
pub fn far(memory: &GuestMemory) -> Arc<IovaMap> {
    let rings = IovaRange { iova: Iova(FAR), guest: GuestAddr(0), ..buffers() };
    Arc::new(IovaMap::new(vec![rings, buffers()], &memory.map).unwrap())
}

/// Answers misses, and counts them.
pub struct Iommu {
    answers: MissAnswers,
    pub misses: Cell<usize>,
}

impl Iommu {
    /// Of a session that was given translations.
    pub fn of(session: &Session) -> Self {
        Self { answers: session.miss_answers().unwrap().unwrap(), misses: Cell::new(0) }
    }
}

impl BackendRequests for Iommu {
    fn config_changed(&self) {}

    fn iotlb(&self, message: Iotlb) -> Result<(), Refused> {
        self.misses.set(self.misses.get() + 1);
        self.answers.answer(&message)
    }
}
