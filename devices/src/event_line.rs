//! The interrupt of the ACPI event device (ACPI 6.5 §5.6.9): a guest that gets it asks each source of events what has
//! happened. Must never carry what a source cannot say when it is asked.
//!
//! Level-triggered, so that an event which comes before the guest's driver waits for it: an edge on a masked pin would
//! be lost. KVM lowers the line at the end of the interrupt, and when a pin is unmasked that was raised before, and says
//! so by [`EventLine::lowered`]; whoever still has news then raises it again.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;

use transport::vhost_user::vring::{Call, Kick};

use crate::ports::{Guard, Interrupts, PortError};

/// The line.
#[derive(Debug)]
pub struct EventLine {
    raise: Call,
    lowered: Kick,
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
        let (raise, lowered) = (Call::new().map_err(cannot)?, Kick::new().map_err(cannot)?);
        let route = interrupts.attach_level(raise.as_fd(), gsi, lowered.as_fd())?;
        Ok(Self { raise, lowered, _route: Mutex::new(route) })
    }

    /// Has the guest ask every source. Called after the source has noted its event, on any thread; does not wait.
    pub fn raise(&self) {
        if let Err(error) = self.raise.ring() {
            log::error!("the guest is not told of an event: {error}");
        }
    }

    /// Readable when the line was lowered.
    #[must_use]
    pub fn lowered(&self) -> BorrowedFd<'_> {
        self.lowered.as_fd()
    }

    /// Takes the news that it was.
    pub fn clear_lowered(&self) {
        if let Err(error) = self.lowered.take() {
            log::error!("cannot read the end of an event's interrupt: {error}");
        }
    }
}
