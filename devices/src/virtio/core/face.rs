//! What a device asks of its transport: to be shown, and to have its queues connected.

use transport::vhost_user::vring::{Call, Kick};

use crate::ports::{Guard, PortError};
use crate::virtio::core::registers::Registers;

/// How a transport shows a device to the guest. Called with the device's lock held.
pub trait Face: Send {
    /// Connects a queue: the guest's notification rings `kick`, `call` interrupts the guest, until the
    /// guard is dropped.
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
