//! The interrupt of the ACPI event device (ACPI 6.5 §5.6.9): a guest that gets it asks each source of events what has
//! happened. Rare; must never carry what a source cannot say again when it is asked.

use std::os::fd::AsFd;
use std::sync::Mutex;

use transport::vhost_user::vring::{Call, Kick};

use crate::ports::{Guard, Interrupts, PortError};

/// The line. Level-triggered, so that an event before the guest's driver is there waits for it: an edge on a masked
/// pin would be lost. KVM lowers it at the end of the interrupt, before the guest looks at the sources; nobody need
/// raise it again.
#[derive(Debug)]
pub struct EventLine {
    raise: Call,
    /// Signalled by the machine at each end of an interrupt, and read by nobody.
    _ended: Kick,
    /// For its drop; nobody locks it.
    _route: Mutex<Guard>,
}

impl EventLine {
    /// The line with this GSI, low.
    ///
    /// # Errors
    /// When no eventfd can be had, or the machine refuses the line.
    pub fn new(interrupts: &dyn Interrupts, gsi: u32) -> Result<Self, PortError> {
        let cannot = |error| PortError::new("make an eventfd", error);
        let (raise, ended) = (Call::new().map_err(cannot)?, Kick::new().map_err(cannot)?);
        let route = interrupts.attach_level(raise.as_fd(), gsi, ended.as_fd())?;
        Ok(Self { raise, _ended: ended, _route: Mutex::new(route) })
    }

    /// Has the guest ask every source. Called after the source has noted its event, on any thread; does not wait.
    pub fn raise(&self) {
        if let Err(error) = self.raise.ring() {
            log::error!("the guest is not told of an event: {error}");
        }
    }
}
