//! What a function registers with the machine inside one of its BARs: memory of a peer, and doorbells. The
//! registrations move with the BAR. Called under the function's lock, on vCPU threads; must never wait.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use transport::memory::GuestAddr;

use super::bar::{BarIndex, Decoded, Space};
use crate::ports::{
    Access, FileRange, Guard, OnVanished, PortError, Ports, WriteAddress, WriteMatch, WriteWidth,
};

/// A registration inside a BAR.
pub enum Fixture {
    /// A piece of a peer's file.
    Memory {
        /// The piece.
        piece: FileRange,
        /// What the guest may do to it.
        access: Access,
        /// See [`crate::ports::DeviceMemory::map`].
        vanished: OnVanished,
    },
    /// Guest writes that signal an eventfd.
    Doorbell {
        /// The eventfd.
        fd: OwnedFd,
        /// The width of the writes.
        width: WriteWidth,
        /// The value that is written; `None` matches every value.
        value: Option<u64>,
    },
}

/// Identifies a fixture, for removing it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FixtureId(u64);

struct Fixed {
    offset: u64,
    what: Fixture,
    guard: Option<Guard>,
}

/// The fixtures of one BAR.
pub struct Fixtures {
    bar: BarIndex,
    ports: Ports,
    place: Option<(Space, u64)>,
    next: u64,
    fixed: BTreeMap<FixtureId, Fixed>,
}

impl Fixtures {
    /// No fixtures yet, and the BAR is not decoded.
    #[must_use]
    pub fn new(bar: BarIndex, ports: Ports) -> Self {
        Self { bar, ports, place: None, next: 0, fixed: BTreeMap::new() }
    }

    /// Registers `what` at `offset` in the BAR: at the BAR's present address, and at each later one.
    ///
    /// # Errors
    /// When the machine refuses the fixture at the present address. The fixture is not added then.
    pub fn add(&mut self, offset: u64, what: Fixture) -> Result<FixtureId, PortError> {
        let mut fixed = Fixed { offset, what, guard: None };
        fixed.register(self.place, &self.ports)?;
        let id = FixtureId(self.next);
        self.next += 1;
        self.fixed.insert(id, fixed);
        Ok(id)
    }

    /// Removes a fixture.
    pub fn remove(&mut self, id: FixtureId) {
        self.fixed.remove(&id);
    }

    /// Removes all fixtures.
    pub fn clear(&mut self) {
        self.fixed.clear();
    }

    /// Moves the fixtures to where `decoded` has the BAR, or unregisters them if `decoded` does not have the
    /// BAR. If the BAR has not moved, only fixtures that were refused before are tried again.
    ///
    /// # Errors
    /// The first refusal of the machine, for instance when the guest puts two BARs at the same addresses. All
    /// other fixtures are in place then, and accesses to the refused one come to the bus.
    pub fn place(&mut self, decoded: &[Decoded]) -> Result<(), PortError> {
        let mine = decoded.iter().find(|decoded| decoded.bar == self.bar);
        let place = mine.map(|decoded| (decoded.space, decoded.base));
        if place != self.place {
            self.place = place;
            // All fixtures are removed from the old address before one is registered at the new address,
            // because the two ranges may overlap.
            for fixed in self.fixed.values_mut() {
                fixed.guard = None;
            }
        }
        let mut result = Ok(());
        for fixed in self.fixed.values_mut().filter(|fixed| fixed.guard.is_none()) {
            result = result.and(fixed.register(place, &self.ports));
        }
        result
    }
}

impl Fixed {
    fn register(&mut self, place: Option<(Space, u64)>, ports: &Ports) -> Result<(), PortError> {
        let Some((space, base)) = place else { return Ok(()) };
        // A BAR does not wrap, and the machine refuses what lies beyond the end of the address space.
        let at = base.saturating_add(self.offset);
        let guard = match (&self.what, space) {
            (Fixture::Memory { piece, access, vanished }, Space::Memory) => {
                ports.memory.map(piece, GuestAddr(at), *access, vanished.clone())?
            }
            (Fixture::Doorbell { fd, width, value }, _) => {
                let address = match space {
                    Space::Memory => WriteAddress::Memory(GuestAddr(at)),
                    Space::Io => match u16::try_from(at) {
                        Ok(port) => WriteAddress::Port(port),
                        Err(_) => return Ok(()),
                    },
                };
                let when = WriteMatch { address, width: *width, value: *value };
                ports.doorbells.bind(fd.as_fd(), when)?
            }
            // I/O ports have no memory behind them.
            (Fixture::Memory { .. }, Space::Io) => return Ok(()),
        };
        self.guard = Some(guard);
        Ok(())
    }
}

#[cfg(test)]
#[path = "fixtures_tests.rs"]
mod tests;
