//! The pvpanic device (QEMU, docs/specs/pvpanic.rst): one port, at which a guest's kernel reports that it has
//! panicked. Must never act on the report: the machine decides what follows.

use crate::bus::BusDevice;

/// The guest has panicked and does nothing more.
const PANICKED: u8 = 1;
/// The guest has panicked and its crash kernel takes over.
const CRASH_LOADED: u8 = 1 << 1;

/// The port.
pub struct PvPanic {
    on_panic: Box<dyn Fn() + Send + Sync>,
}

impl PvPanic {
    /// Length of the range.
    pub const LENGTH: u64 = 1;

    /// Calls `on_panic`, on a vCPU thread, when the guest has panicked for good; must not wait.
    pub fn new(on_panic: impl Fn() + Send + Sync + 'static) -> Self {
        Self { on_panic: Box::new(on_panic) }
    }
}

impl BusDevice for PvPanic {
    /// The events that the guest may report.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        match data {
            [event] if event & PANICKED != 0 => (self.on_panic)(),
            [event] if event & CRASH_LOADED != 0 => {
                log::warn!("the guest has panicked, and its crash kernel takes over");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn only_a_panic_without_a_crash_kernel_is_reported() {
        let panics = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&panics);
        let port = PvPanic::new(move || {
            counted.fetch_add(1, Ordering::Relaxed);
        });
        for ignored in [&[0][..], &[2], &[4], &[0x80], &[1, 0], &[]] {
            port.write(0, ignored);
        }
        assert_eq!(panics.load(Ordering::Relaxed), 0);
        port.write(0, &[1]);
        port.write(0, &[3]);
        assert_eq!(panics.load(Ordering::Relaxed), 2);
        let mut events = [0];
        port.read(0, &mut events);
        assert_eq!(events, [3]);
    }
}
