//! PCI (PCI Local Bus 3.0, PCIe Base 5.0 §7): one root bus, the functions on it, and the parts that functions
//! are made of.
//!
//! | module | what it holds |
//! |--|--|
//! | [`host_bridge`] | the root: configuration accesses by ECAM and 0xCF8, the windows, and which BAR is where in them |
//! | [`config_space`] | a type-0 configuration space with capabilities |
//! | [`bar`] | base address registers: their sizes, addresses and decoding |
//! | [`fixtures`] | what a function registers with the machine inside its BARs; it moves with the BARs |
//! | [`msix`] | MSI-X: table, pending bits, routes |
//! | [`msi`] | MSI: registers, routes |
//! | [`lines`] | level-triggered interrupt lines, which functions share |
//! | [`hotplug`] | which devices are present, and how a guest ejects one |
//! | [`vfio_user`] | functions that vfio-user servers serve |
//!
//! # How a function is made
//! 1. Describe its BARs ([`bar::Bars::new`]) and have the bridge assign their addresses
//!    ([`host_bridge::HostBridge::assign`]).
//! 2. Put the BARs into a [`config_space::ConfigSpace`], or keep them beside a proxied configuration space.
//! 3. Implement [`Function`], with a lock of its own, and put the function on the bus
//!    ([`host_bridge::HostBridge::insert`]).
//!
//! On each configuration write, the bridge calls [`Function::config_write`] and then asks
//! [`Function::decoded`] where the BARs are now. So a BAR can move, appear or vanish while vCPUs run. Inside
//! `config_write`, the function itself moves its [`fixtures::Fixtures`] (memory slots, doorbells). All other
//! accesses to BARs come as [`Function::bar_read`] and [`Function::bar_write`].
//!
//! An interrupt is one `Call` eventfd for its whole life. [`msix::Msix::connect`] connects the eventfd to a
//! vector. Masking, unmasking and retargeting the vector only attach and detach the eventfd's route.

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

/// A device's number on the root bus: 1 to 31. Number 0 is the bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceNumber(u8);

impl DeviceNumber {
    /// The numbers that functions may have.
    pub const ALL: std::ops::RangeInclusive<u8> = 1..=31;

    /// The device with this number; `None` unless it is 1 to 31.
    #[must_use]
    pub fn new(number: u8) -> Option<Self> {
        Self::ALL.contains(&number).then_some(Self(number))
    }

    /// The number.
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
/// Called on vCPU threads, several at once: the function brings its own lock. During a call the bridge holds
/// at most the lock that orders this function's configuration writes; [`HostBridge::insert`] calls
/// [`Function::decoded`] with the list of functions locked. May wait for a peer, up to the deadline.
pub trait Function: Send + Sync {
    /// Fills `data`, 1 to 4 bytes inside one aligned dword, from `offset` of the configuration space (below
    /// 4096).
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Takes `data`, 1 to 4 bytes inside one aligned dword, at `offset` of the configuration space (below
    /// 4096).
    fn config_write(&self, offset: u16, data: &[u8]);

    /// The BARs that the function decodes now, all inside the bridge's windows. Asked for after every
    /// configuration write.
    fn decoded(&self) -> Vec<Decoded>;

    /// Fills all of `data`, little-endian, from `offset` in `bar`. The access never reaches beyond the end of
    /// the BAR.
    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]);

    /// Takes `data`, little-endian, at `offset` in `bar`. The access never reaches beyond the end of the BAR.
    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]);
}
