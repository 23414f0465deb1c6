//! The interrupt of the ACPI event device (ACPI 6.5 §5.6.9). A guest that gets it asks each source of events
//! what has happened. Must never carry an event that its source cannot report when it is asked.
//!
//! The line is level-triggered, so that an event waits for a guest whose driver is not loaded yet: an edge on
//! a masked pin would be lost. KVM lowers the line at the end of the interrupt, and also when the guest
//! unmasks a pin whose line was raised before. [`EventLine::lowered`] reports both; a source that still has
//! an event then raises the line again.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;

use transport::vhost_user::vring::{Call, Kick};

use crate::ports::{Guard, Interrupts, PortError};

/// The event line.
#[derive(Debug)]
pub struct EventLine {
    raise: Call,
    lowered: Kick,
    /// Held only to be dropped; never locked.
    _route: Mutex<Guard>,
}

impl EventLine {
    /// The event line with this GSI, low.
    ///
    /// # Errors
    /// When no eventfd can be had, or the machine refuses the line.
    pub fn new(interrupts: &dyn Interrupts, gsi: u32) -> Result<Self, PortError> {
        let cannot = |error| PortError::new("make an eventfd", error);
        let (raise, lowered) = (Call::new().map_err(cannot)?, Kick::new().map_err(cannot)?);
        let route = interrupts.attach_level(raise.as_fd(), gsi, lowered.as_fd())?;
        Ok(Self { raise, lowered, _route: Mutex::new(route) })
    }

    /// Raises the line, so that the guest asks every source. Called after the source has noted its event, on
    /// any thread; does not wait.
    pub fn raise(&self) {
        if let Err(error) = self.raise.ring() {
            log::error!("the guest is not told of an event: {error}");
        }
    }

    /// A descriptor that is readable when the line was lowered.
    #[must_use]
    pub fn lowered(&self) -> BorrowedFd<'_> {
        self.lowered.as_fd()
    }

    /// Makes [`EventLine::lowered`] unreadable until the line is lowered again.
    pub fn clear_lowered(&self) {
        if let Err(error) = self.lowered.take() {
            log::error!("cannot read the end of an event's interrupt: {error}");
        }
    }
}
