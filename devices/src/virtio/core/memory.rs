//! Guest memory that comes and goes while a device runs. Called by whoever plugs memory, with the device's
//! lock held for one exchange with the backend; must never leave queues with memory that is gone.

use transport::memory::MemoryMap;
use transport::vhost_user::Refused;
use transport::vhost_user::vring::Ring;

use crate::virtio::backend::BackendError;
use crate::virtio::core::device::Device;
use crate::virtio::core::handle::DeviceHandle;
use crate::virtio::core::queues::OwnedRing;
use crate::virtio::core::state::Phase;

impl DeviceHandle {
    /// Makes `memory` the guest's memory as far as this device goes. Its queues go on: without a stop where
    /// the backend has memory slots. Waits for the backend, within its deadline.
    ///
    /// Memory that grows is told to devices before the guest, memory that shrinks after it.
    ///
    /// # Errors
    /// When the backend cannot hold it; then everything is as it was.
    pub fn change_memory(&self, memory: &MemoryMap) -> Result<(), Refused> {
        self.with(|device| device.change_memory(memory))
    }
}

impl Device {
    fn change_memory(&mut self, memory: &MemoryMap) -> Result<(), Refused> {
        if !matches!(self.phase, Phase::Running(_)) {
            // Told at the next start.
            self.memory = memory.clone();
            return Ok(());
        }
        let running = self.wiring.running(&self.registers).map_err(|error| {
            log::warn!("{}: cannot duplicate an eventfd: {error}", self.name);
            Refused
        })?;
        let rings: Vec<Ring<'_>> = running.iter().map(OwnedRing::as_ring).collect();
        match self.backend.change_memory(memory, &rings) {
            Ok(bases) => {
                self.memory = memory.clone();
                if !bases.is_empty() {
                    self.wiring.went_on(running.iter().map(OwnedRing::index).zip(bases));
                    self.begin_control();
                }
                Ok(())
            }
            Err(BackendError::Refused(error)) => {
                log::warn!("{}: its backend keeps the memory that it has: {error}", self.name);
                Err(Refused)
            }
            Err(lost @ BackendError::Lost(_)) => {
                self.memory = memory.clone();
                self.lose_by(&lost);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
