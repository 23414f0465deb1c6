//! What the guest sees: the buses, the serial port, the reset registers and virtio devices whose
//! queues are served by other processes. Knows virtio and PCI, not KVM: what a device needs of the machine
//! it asks through [`ports`]. Must never touch a queue's contents, nor guest memory, while somebody
//! serves the queue; afterwards only to find out what was in flight when a backend died.

pub mod bus;
pub mod event_line;
pub mod hang_up;
pub mod pci;
pub mod ports;
pub mod pvpanic;
pub mod reset;
pub mod serial;
pub mod virtio;

#[cfg(test)]
mod testing;

use std::error::Error;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks; a panic of another holder does not spread, as each of our states is valid at every step.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The causes of `error`, outermost first, in one line.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
