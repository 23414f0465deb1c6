//! Hot-unplug by ACPI (ACPI 6.5 §6.3): the registers that the AML methods of a slot read and write. A device
//! that may be unplugged is registered by [`Hotplug::occupy`]; the guest cannot eject any other device.
//!
//! ```text
//!              lost: bit in GONE, event line                   a write to EJECT
//!    present ───────────────────────────────▶ gone, all ones ─────────────────▶ off the bus
//!       └────────────────────────────────────────────────────────────────────────▲
//!                     the guest ejects a working device by itself
//! ```
//! | offset | access | bit n is |
//! |--|--|--|
//! | 0 | read, which clears it | GONE: device n was lost since the last read |
//! | 4 | read | PRESENT: device n is there (`_STA`) |
//! | 8 | write | EJECT: take device n off the bus (`_EJ0`) |
//!
//! The guest gets an *eject request* for a lost device. ACPI's notification for a device that vanished by
//! itself is the *device check*. But Linux's acpiphp handles a device check only by looking for new devices,
//! and keeps a device that no longer answers. After an eject request, Linux unbinds the driver, removes the
//! function, and calls `_EJ0`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::{DeviceNumber, HostBridge};
use crate::bus::BusDevice;
use crate::event_line::EventLine;
use crate::lock;

/// The device in a slot, as hotplug sees it.
pub trait Occupant: Send + Sync {
    /// The function was taken off the bus, and no configuration access to it is under way. The occupant must
    /// remove everything that it has registered with the machine. Called on a vCPU thread; may wait for a
    /// peer, up to the deadline.
    fn unplug(&self);
}

#[derive(Default)]
struct State {
    /// The devices on the bus, lost or not.
    occupants: BTreeMap<DeviceNumber, Arc<dyn Occupant>>,
    present: u32,
    gone: u32,
}

/// The registers. Their lock is held for a few instructions only, and must never be held while an occupant or
/// the bridge is called.
pub struct Hotplug {
    bridge: Arc<HostBridge>,
    line: Arc<EventLine>,
    state: Mutex<State>,
}

impl Hotplug {
    /// Length of the registers.
    pub const LENGTH: u64 = 12;
    /// Offset of GONE.
    pub const GONE: u64 = 0;
    /// Offset of PRESENT.
    pub const PRESENT: u64 = 4;
    /// Offset of EJECT.
    pub const EJECT: u64 = 8;

    /// The registers of `bridge`'s bus, with no slot in use. `line` is the ACPI event line.
    #[must_use]
    pub fn new(bridge: Arc<HostBridge>, line: Arc<EventLine>) -> Arc<Self> {
        Arc::new(Self { bridge, line, state: Mutex::default() })
    }

    /// Registers `occupant`, whose device has this number on the bus, as a device that may be unplugged.
    pub fn occupy(&self, number: DeviceNumber, occupant: Arc<dyn Occupant>) {
        let mut state = lock(&self.state);
        state.occupants.insert(number, occupant);
        state.present |= bit(number);
        state.gone &= !bit(number);
    }

    /// The device was lost: asks the guest to eject it. Does nothing when that was reported before, or when
    /// the guest has ejected the device already. Called on any thread; does not wait.
    pub fn lost(&self, number: DeviceNumber) {
        let mut state = lock(&self.state);
        if state.present & bit(number) == 0 {
            return;
        }
        state.present &= !bit(number);
        state.gone |= bit(number);
        drop(state);
        self.line.raise();
    }

    /// The event line.
    #[must_use]
    pub fn line(&self) -> &EventLine {
        &self.line
    }

    /// The event line was lowered: raises it again while GONE is not 0. Called on any thread; does not wait.
    pub fn line_lowered(&self) {
        self.line.clear_lowered();
        if lock(&self.state).gone != 0 {
            self.line.raise();
        }
    }

    fn eject(&self, number: DeviceNumber) {
        let mut state = lock(&self.state);
        let occupant = state.occupants.remove(&number);
        state.present &= !bit(number);
        state.gone &= !bit(number);
        drop(state);
        if let Some(occupant) = occupant {
            self.bridge.remove(number);
            occupant.unplug();
            log::info!("the guest has let go of PCI device {number}");
        }
    }
}

fn bit(number: DeviceNumber) -> u32 {
    1 << number.get()
}

impl BusDevice for Hotplug {
    /// An access that is not a whole register reads zero: nothing was lost, nothing is there.
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Ok(register) = <&mut [u8; 4]>::try_from(&mut *data) else { return data.fill(0) };
        let mut state = lock(&self.state);
        let value = match offset {
            Self::GONE => std::mem::take(&mut state.gone),
            Self::PRESENT => state.present,
            _ => 0,
        };
        *register = value.to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Self::EJECT, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
            let asked = u32::from_le_bytes(bytes);
            let numbers = DeviceNumber::ALL.filter_map(DeviceNumber::new);
            numbers.filter(|number| asked & bit(*number) != 0).for_each(|number| self.eject(number));
        }
    }
}

#[cfg(test)]
#[path = "hotplug_tests.rs"]
mod tests;
