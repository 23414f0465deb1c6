//! What the device core asks of a transport: to show registers and configuration, and to connect queues. Must
//! never call the device.

use transport::vhost_user::vring::{Call, Kick};

use crate::ports::{Guard, PortError};
use crate::virtio::core::registers::Registers;

/// The transport as the device core sees it. Called with the device's lock held.
pub trait Face: Send {
    /// Connects a queue until the guard is dropped: the guest's notification rings `kick`, and `call`
    /// interrupts the guest.
    ///
    /// # Errors
    /// When the machine refuses.
    fn connect(&self, queue: u16, kick: &Kick, call: &Call) -> Result<Guard, PortError>;

    /// Makes `call` interrupt the guest as a configuration change, until the guard is dropped.
    ///
    /// # Errors
    /// When the machine refuses.
    fn connect_config(&self, call: &Call) -> Result<Guard, PortError>;

    /// Shows the registers as they are now.
    fn show_registers(&self, registers: &Registers);

    /// Shows the configuration space as it is now.
    fn show_config(&self, config: &[u8]);
}
