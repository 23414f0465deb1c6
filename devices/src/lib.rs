//! The devices that the guest sees: the buses, the serial port, the reset registers, and virtio devices whose
//! queues other processes serve. This crate knows virtio and PCI, and not KVM: a device asks the machine
//! through [`ports`]. It must never touch a queue's contents or guest memory while a backend serves the
//! queue. After a backend is lost, it reads them only to find out which descriptors were in flight.

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

/// Locks. The panic of another holder does not spread, because each of our states is valid at every step.
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
