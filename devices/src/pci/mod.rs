//! PCI (PCI Local Bus 3.0, PCIe Base 5.0 §7): one root bus, functions on it, and the parts that functions are made of.
//!
//! | module | what it holds |
//! |--|--|
//! | [`host_bridge`] | the root: configuration by ECAM and 0xCF8, the windows, what lies where in them |
//! | [`config_space`] | a type-0 configuration space with capabilities |
//! | [`bar`] | base address registers: sized, placed, decoded |
//! | [`fixtures`] | what a function registers with the machine inside its BARs, moved along with them |
//! | [`msix`] | MSI-X: table, pending bits, routes |
//! | [`msi`] | MSI: registers, routes |
//! | [`lines`] | level-triggered lines, shared |
//! | [`hotplug`] | which functions are there, and how a guest lets go of one |
//! | [`vfio_user`] | what a vfio-user server's function is |
//!
//! # How a function is made
//! 1. Describe its BARs, [`bar::Bars::new`], and have the bridge place them: [`host_bridge::HostBridge::assign`].
//! 2. Put them into a [`config_space::ConfigSpace`], or keep them beside a proxied one.
//! 3. Implement [`Function`], with a lock of its own; [`host_bridge::HostBridge::insert`] puts it on the bus.
//!
//! On each configuration write the bridge calls [`Function::config_write`] and then asks [`Function::decoded`]
//! where the BARs are now; so a BAR moves, appears or vanishes while vCPUs run. The function itself moves its
//! [`fixtures::Fixtures`] (memory slots, doorbells) inside `config_write`. What is not memory of a slot and not a
//! doorbell comes as [`Function::bar_read`] and [`Function::bar_write`].
//!
//! An interrupt is a `Call` eventfd for its whole life; [`msix::Msix::connect`] puts it behind a vector, and masks,
//! unmasks and retargets only attach and detach its route.

pub mod bar;
pub mod config_space;
pub mod fixtures;
pub mod host_bridge;
pub mod hotplug;
pub mod lines;
pub mod msi;
pub mod msix;
mod vectors;
pub mod vfio_user;

pub use bar::{BarIndex, BarKind, BarSpec, Bars, Decoded, Space, Window, Windows};
pub use config_space::{Change, ConfigSpace, Identity};
pub use fixtures::{Fixture, FixtureId, Fixtures};
pub use host_bridge::{HostBridge, Intx};
pub use hotplug::Hotplug;
pub use lines::IntxLines;
pub use msi::{Msi, MsiSpec};
pub use msix::Msix;
pub use vectors::ConnectionId;

use std::fmt;

/// A device's number on the root bus: 1 to 31; 0 is the bridge's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceNumber(u8);

impl DeviceNumber {
    /// The numbers that functions may have.
    pub const ALL: std::ops::RangeInclusive<u8> = 1..=31;

    /// `None` unless 1 to 31.
    #[must_use]
    pub fn new(number: u8) -> Option<Self> {
        Self::ALL.contains(&number).then_some(Self(number))
    }

    /// As a number.
    #[must_use]
    pub fn get(self) -> u8 {
        self.0
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.0", self.0)
    }
}

/// The single function of a device on the root bus.
///
/// Called on vCPU threads, several at once: it brings its own lock, and no lock of the bridge but the one that
/// orders this function's configuration accesses is held meanwhile. May wait for a peer, up to the deadline.
pub trait Function: Send + Sync {
    /// Fills `data`, 1 to 4 bytes inside one aligned dword, from `offset` of the configuration space (below 4096).
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Takes `data`, 1 to 4 bytes inside one aligned dword, at `offset` of the configuration space (below 4096).
    fn config_write(&self, offset: u16, data: &[u8]);

    /// The BARs that the function decodes now, none of them outside the bridge's windows. Asked after every
    /// configuration write.
    fn decoded(&self) -> Vec<Decoded>;

    /// Fills all of `data`, little-endian, from `offset` in `bar`; never beyond the end of the BAR.
    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]);

    /// Takes `data`, little-endian, at `offset` in `bar`; never beyond the end of the BAR.
    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]);
}
