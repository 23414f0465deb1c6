//! MSI-X (PCI 3.0 §6.8.2): table, pending bits, and the routes of the vectors. Masking, unmasking and
//! retargeting attach and detach routes; the eventfds stay. Called under the function's lock; must never
//! wait.

use std::sync::Arc;

use transport::vhost_user::vring::Call;

use super::bar::BarIndex;
use super::vectors::ConnectionId;
use super::vectors::Vectors;
use crate::ports::{Interrupts, PortError, Route};

/// The capability's id.
pub const CAPABILITY: u8 = 0x11;
/// The most vectors that a table may have.
pub const MAX_VECTORS: u16 = 2048;
/// The length of a table entry in bytes.
pub const ENTRY: u64 = 16;

/// Bits of the message control register, at offset 2 of the capability.
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;
/// The mask bit of an entry's vector control.
const MASKED: u32 = 1;

#[derive(Debug, Clone, Copy)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

impl Entry {
    fn bytes(self) -> [u8; 16] {
        let Self { address, data, control } = self;
        (u128::from(address) | u128::from(data) << 64 | u128::from(control) << 96).to_le_bytes()
    }

    fn from_bytes(bytes: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, ..] = bytes;
        Self {
            address: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            data: u32::from_le_bytes([i, j, k, l]),
            // The other bits of the vector control are reserved.
            control: u32::from(m) & MASKED,
        }
    }
}

/// Whether this message control register turns MSI-X on.
#[must_use]
pub fn enables(control: u16) -> bool {
    control & ENABLE != 0
}

/// The MSI-X of one function. Its table has one entry for each vector.
pub struct Msix {
    entries: Vec<Entry>,
    control: u16,
    vectors: Vectors,
}

impl Msix {
    /// MSI-X off and all vectors masked. `vectors` is clamped to 1..=[`MAX_VECTORS`].
    #[must_use]
    pub fn new(vectors: u16, interrupts: Arc<dyn Interrupts>) -> Self {
        let entry = Entry { address: 0, data: 0, control: MASKED };
        let count = usize::from(vectors.clamp(1, MAX_VECTORS));
        Self { entries: vec![entry; count], control: 0, vectors: Vectors::new(interrupts) }
    }

    /// How many vectors there are.
    #[must_use]
    pub fn count(&self) -> u16 {
        u16::try_from(self.entries.len()).unwrap_or(MAX_VECTORS)
    }

    /// The capability's body from offset 2 on, for [`super::ConfigSpace::add_capability`], and the mask of
    /// its writable bits. `table` and `pba` are the BARs of the table and of the pending bits, with 8-aligned
    /// offsets in them.
    #[must_use]
    pub fn capability(&self, table: (BarIndex, u32), pba: (BarIndex, u32)) -> ([u8; 10], [u8; 2]) {
        let at = |(bar, offset): (BarIndex, u32)| (offset & !7 | u32::from(bar.get())).to_le_bytes();
        let ([t0, t1, t2, t3], [p0, p1, p2, p3]) = (at(table), at(pba));
        let [c0, c1] = self.control().to_le_bytes();
        ([c0, c1, t0, t1, t2, t3, p0, p1, p2, p3], (ENABLE | FUNCTION_MASK).to_le_bytes())
    }

    /// The value that the message control register reads.
    #[must_use]
    pub fn control(&self) -> u16 {
        self.control | (self.count() - 1)
    }

    /// Whether MSI-X is on; the function must not raise INTx then.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        enables(self.control)
    }

    /// The guest writes the message control register.
    ///
    /// # Errors
    /// When the machine refuses a route. Signals of that vector stay pending.
    pub fn set_control(&mut self, value: u16) -> Result<(), PortError> {
        let before = std::mem::replace(&mut self.control, value & (ENABLE | FUNCTION_MASK));
        if before == self.control {
            return Ok(());
        }
        let Self { entries, control, vectors } = self;
        vectors.sync(|vector| route(entries, *control, vector))
    }

    /// Fills `data` from `offset` in the table. Bytes beyond its end read zero.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        for (at, byte) in addresses(offset).zip(data) {
            let entry = usize::try_from(at / ENTRY).ok().and_then(|index| self.entries.get(index));
            let within = usize::try_from(at % ENTRY).unwrap_or(0);
            *byte = entry.and_then(|entry| entry.bytes().get(within).copied()).unwrap_or(0);
        }
    }

    /// Takes `data` at `offset` in the table.
    ///
    /// # Errors
    /// When the machine refuses a route. Signals of that vector stay pending.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) -> Result<(), PortError> {
        let mut result = Ok(());
        let end = offset.saturating_add(u64::try_from(data.len()).unwrap_or(u64::MAX));
        // An access has 8 bytes at most, so it touches one entry or two.
        for index in offset / ENTRY..end.div_ceil(ENTRY) {
            let Ok(vector) = u16::try_from(index) else { break };
            let Some(entry) = self.entries.get_mut(usize::from(vector)) else { break };
            let mut bytes = entry.bytes();
            for (at, new) in addresses(offset).zip(data) {
                let within = at.checked_sub(index * ENTRY).and_then(|at| usize::try_from(at).ok());
                if let Some(byte) = within.and_then(|within| bytes.get_mut(within)) {
                    *byte = *new;
                }
            }
            *entry = Entry::from_bytes(bytes);
            let route = route(&self.entries, self.control, vector);
            result = result.and(self.vectors.sync_one(vector, route));
        }
        result
    }

    /// Fills `data` from `offset` in the pending bits. Bytes beyond their end read zero. A vector is pending
    /// when it has been signalled and has no route.
    pub fn read_pba(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        for (at, byte) in addresses(offset).zip(data) {
            *byte = (0..8_u8).fold(0, |bits, bit| {
                let vector = at.checked_mul(8).and_then(|first| u16::try_from(first + u64::from(bit)).ok());
                let pending = vector.is_some_and(|vector| self.vectors.is_pending(vector));
                bits | u8::from(pending) << bit
            });
        }
    }

    /// Connects `call` to `vector`, or to no vector. Several calls may share a vector.
    ///
    /// # Errors
    /// When the vector is live and the machine refuses the route.
    pub fn connect(&mut self, vector: Option<u16>, call: Arc<Call>) -> Result<ConnectionId, PortError> {
        let route = vector.and_then(|vector| route(&self.entries, self.control, vector));
        self.vectors.connect(vector, call, route)
    }

    /// Connects a call that is connected already to another vector, or to no vector.
    ///
    /// # Errors
    /// When the vector is live and the machine refuses the route.
    pub fn retarget(&mut self, id: ConnectionId, vector: Option<u16>) -> Result<(), PortError> {
        let route = vector.and_then(|vector| route(&self.entries, self.control, vector));
        self.vectors.retarget(id, vector, route)
    }

    /// Disconnects a call.
    pub fn disconnect(&mut self, id: ConnectionId) {
        self.vectors.disconnect(id);
    }
}

/// The addresses from `first` on, up to the largest.
fn addresses(first: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(first), |at| at.checked_add(1))
}

/// The present route of a vector; `None` while the vector is masked.
fn route(entries: &[Entry], control: u16, vector: u16) -> Option<Route> {
    let Entry { address, data, control: mask } = *entries.get(usize::from(vector))?;
    let live = control & (ENABLE | FUNCTION_MASK) == ENABLE && mask & MASKED == 0;
    live.then_some(Route::Message { address, data })
}

#[cfg(test)]
#[path = "msix_tests.rs"]
mod tests;
